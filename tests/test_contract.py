"""Every learner against the contract's checks; and the checks against learners that break it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mbrl import testing
from mbrl.core import Dynamics, Markov, Prediction, Spec, StepInput, group, pull, randn
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.experts import ExpertsConfig
from mbrl.dynamics.filtered import Filtered, RewardConfig
from mbrl.dynamics.heads import HeadsConfig
from mbrl.dynamics.hyper import HyperConfig
from mbrl.dynamics.mixer import Coda, Geps, Hierarchical, MixerConfig, Ncf
from mbrl.dynamics.ode import Local, OdeConfig, StiffnessRatio
from mbrl.dynamics.plrnn import AlmostLinear, Constant, Dendritic, PlrnnConfig, Shallow
from mbrl.dynamics.single import SingleConfig
from mbrl.rollout import forced_mse, imagine, unroll
from mbrl.solvers import RK4, Tsit5
from mbrl.testing import CHECKS, Subject, check_dynamics


def certain(obs):
    return Prediction(obs, obs.new_zeros(obs.shape[0]), {})


class Plain(Markov):
    """x' = x + f(x, a): deterministic, with a reward head and its own normaliser."""

    def __init__(self, spec):
        super().__init__()
        self.spec, self.noise_dim = spec, 0
        self.net = nn.Sequential(nn.Linear(spec.obs + spec.act, 16), nn.Tanh(), nn.Linear(16, spec.obs + 1))
        self.register_buffer("mean", torch.zeros(spec.obs))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # an index survives float types

    def prepare(self, segment):
        self.mean.copy_(segment.obs.flatten(0, 1).mean(0))

    def step(self, state, inp, cond):
        y = self.net(torch.cat([state - self.mean, inp.act], -1))
        obs = state + y[:, :-1]
        return obs, Prediction(obs, y[:, -1], {"size": y.norm(dim=-1)})

    def loss(self, segment, noise):
        return forced_mse(self, segment, noise, 1.0, ())


class Noisy(Plain):
    """x' = x + f(x, a) + s * noise."""

    def __init__(self, spec):
        super().__init__(spec)
        self.noise_dim = spec.obs
        self.scale = nn.Parameter(torch.tensor(0.1))

    def step(self, state, inp, cond):
        _, pred = super().step(state, inp, cond)
        obs = pred.obs + self.scale.abs() * inp.noise
        return obs, Prediction(obs, pred.reward, pred.uncertainty)


class Hyper(Markov):
    """The weights of a small network for each group, generated from the group's context; its contexts in a table."""

    def __init__(self, spec, width=8):
        super().__init__()
        self.spec, self.noise_dim = spec, 0
        self.contexts = nn.Parameter(torch.randn(spec.systems, spec.ctx))
        self.shapes = [(spec.obs + spec.act, width), (1, width), (width, spec.obs), (1, spec.obs)]
        self.hyper = nn.Linear(spec.ctx, sum(i * o for i, o in self.shapes))

    def condition(self, ctx):
        flat = self.hyper(ctx).split([i * o for i, o in self.shapes], -1)
        return tuple(w.reshape(-1, *shape) for w, shape in zip(flat, self.shapes, strict=True))

    def step(self, state, inp, cond):
        w1, b1, w2, b2 = cond
        x = group(torch.cat([state, inp.act], -1), w1.shape[0])
        obs = state + (F.silu(x @ w1 + b1) @ w2 + b2).flatten(0, 1)
        return obs, certain(obs)

    def context(self, system):
        return self.contexts[system]

    def loss(self, segment, noise):
        return forced_mse(self, segment, noise, 1.0, self.condition(self.contexts[segment.system]))


class Latent(Dynamics):
    """z' = A z + W1 (relu(W2 z + h2) - relu(W2 z)) + h1 + C a and x = B z + b: a hidden state of any width. What can be
    imposed of an observation is its projection on the range of B."""

    def __init__(self, spec, latent=6, hidden=16):
        super().__init__()
        self.spec, self.noise_dim = spec, 0
        self.register_buffer("alpha", torch.tensor(0.2))
        self.A = nn.Parameter(torch.full((latent,), 0.9))
        self.W1 = nn.Parameter(torch.randn(latent, hidden) * 0.05)
        self.W2 = nn.Parameter(torch.randn(hidden, latent) * 0.05)
        self.h1 = nn.Parameter(torch.zeros(latent))
        self.h2 = nn.Parameter(torch.randn(hidden) * 0.1)
        self.C = nn.Parameter(torch.randn(latent, spec.act) * 0.1)
        self.B = nn.Parameter(torch.randn(spec.obs, latent) / latent**0.5)
        self.b = nn.Parameter(torch.zeros(spec.obs))

    def condition(self, ctx):
        return (torch.linalg.pinv(self.B)[None],)  # [1, latent, O]: one for all rows

    def init(self, obs, cond):
        return (obs - self.b) @ cond[0][0].T

    def observe(self, state, cond):
        return state @ self.B.T + self.b

    def correct(self, state, obs, alpha, cond):
        z = torch.where(state.isfinite().all(-1, keepdim=True), state, self.init(obs, cond))
        return pull(state, z + (obs - self.observe(z, cond)) @ cond[0][0].T, alpha)

    def step(self, state, inp, cond):
        u = state @ self.W2.T
        z = self.A * state + (F.relu(u + self.h2) - F.relu(u)) @ self.W1.T + self.h1 + inp.act @ self.C.T
        return z, certain(self.observe(z, cond))

    def loss(self, segment, noise):
        return forced_mse(self, segment, noise, self.alpha, self.condition(segment.obs[:1, 0, :0]))


def projection(model, obs, cond):
    """The nearest to obs that B z + b can be."""
    return (obs - model.b) @ (model.B @ torch.linalg.pinv(model.B)).T + model.b


def ensemble(spec, **options):
    config = EnsembleConfig(members=3, elites=2, hidden=(16,), weight_decay=(1e-4, 1e-4), **options)
    return config.build(spec)


def single(spec, **options):
    return SingleConfig(hidden=(16,), weight_decay=(1e-4, 1e-4), **options).build(spec)


def plrnn(spec, kind, **options):
    return PlrnnConfig(kind, forcing=Constant(0.5), heads=(8,), **options).build(spec)


def imposed_on(model, obs, cond):
    """What B z can be, in the units of the data."""
    B = model.theta["B"]
    return model.observed.inverse(model.observed(obs) @ (B @ torch.linalg.pinv(B)).T)


def ode(spec, **options):
    return OdeConfig(hidden=(16,), reward_hidden=(8,), **options).build(spec)


def filtered(inner, bound=None, **options):
    """Around any learner; bound: of the candidates' observations, so tight that it is often met."""
    spec = inner.spec
    reward = RewardConfig(members=2, hidden=(8,), anchor_hidden=(8,), anchors=1).build(spec)
    high = None if bound is None else torch.full((spec.obs,), bound)
    return Filtered(inner, reward, candidates=3, low=None if high is None else -high, high=high, **options)


def hypernetwork(spec, **settings):
    return HyperConfig(hidden=(16, 16), hyper=(8,), **settings).build(spec)


def mixer(spec, expert, experts, **settings):
    return MixerConfig(expert, experts, 4, reward=True, reward_hidden=(16,), **settings).build(spec)


def experts(spec, expert):
    return ExpertsConfig(expert, 4).build(spec)


SUBJECTS = {
    "plain": Subject(Plain),
    "noisy": Subject(Noisy),
    "hyper": Subject(Hyper),
    "latent": Subject(Latent, imposes=projection),
    "latent-narrow": Subject(lambda spec: Latent(spec, latent=2), imposes=projection),
    "autonomous": Subject(Plain, Spec(obs=3)),
    "ensemble": Subject(ensemble),
    "ensemble-drawn-only": Subject(lambda spec: ensemble(spec, uncertainty=(), scale_targets=True)),
    "single": Subject(single),
    "single-gaussian": Subject(lambda spec: single(spec, gaussian=True, scale_targets=False)),
    "plrnn-shallow": Subject(lambda spec: plrnn(spec, Shallow(16, clipped=False), noise=True, reward=True)),
    "plrnn-constant-noise": Subject(lambda spec: plrnn(spec, Shallow(16), noise="constant", reward=True)),
    "plrnn-clipped": Subject(lambda spec: plrnn(spec, Shallow(60), latent=5, readout="affine"), imposes=imposed_on),
    "plrnn-narrow": Subject(lambda spec: plrnn(spec, Shallow(60), latent=2, readout="affine"), imposes=imposed_on),
    "plrnn-dendritic": Subject(lambda spec: plrnn(spec, Dendritic(4), latent=5)),
    "plrnn-dendritic-clipped": Subject(lambda spec: plrnn(spec, Dendritic(4, clipped=True))),
    "plrnn-almost-linear": Subject(lambda spec: plrnn(spec, AlmostLinear(2), latent=6)),
    "ode": Subject(lambda spec: ode(spec, solver=RK4(2), local=Local(start=0.01, end=0.001), reward=True)),
    "ode-biased": Subject(
        lambda spec: ode(spec, solver=Tsit5(2), alpha=0.2, local=Local(StiffnessRatio(), sampling="biased"))
    ),
    "hypernetwork": Subject(lambda spec: hypernetwork(spec, gaussian=True)),
    "hypernetwork-chunked": Subject(lambda spec: hypernetwork(spec, chunk=20)),
    "hypernetwork-mip": Subject(lambda spec: hypernetwork(spec, mip=True), Spec(obs=3, act=2)),
    "hypernetwork-mip-chunked": Subject(lambda spec: hypernetwork(spec, mip=True, chunk=20, gaussian=True)),
    "filtered-hypernetwork": Subject(lambda spec: filtered(hypernetwork(spec, gaussian=True))),
    "experts": Subject(lambda spec: experts(spec, SingleConfig(True, (16, 16), (0.0,) * 3))),
    "experts-untold": Subject(lambda spec: experts(spec, PlrnnConfig(Shallow(16), 5)), Spec(obs=3, act=2)),
    "heads": Subject(lambda spec: HeadsConfig((16, 16), gaussian=True).build(spec)),
    "hypernetwork-alone": Subject(hypernetwork, Spec(obs=3, act=2, systems=2)),
    "experts-alone": Subject(lambda spec: experts(spec, SingleConfig(False, (16,), (0.0,) * 2)), Spec(3, 2, systems=2)),
    "heads-alone": Subject(lambda spec: HeadsConfig((16,)).build(spec), Spec(obs=3, act=2, systems=2)),
    "heads-shared": Subject(lambda spec: HeadsConfig((16,), shared=True).build(spec), Spec(obs=3, act=2, systems=2)),
    "mixer": Subject(lambda spec: mixer(spec, Ncf((8,), (8,), (8,)), 3)),
    "mixer-coda": Subject(lambda spec: mixer(spec, Coda((16,)), 3, gating="gradient")),
    "mixer-geps": Subject(lambda spec: mixer(spec, Geps((16,)), 2, solver=Tsit5(2), alpha=0.3)),
    "mixer-plrnn": Subject(lambda spec: mixer(spec, Hierarchical(16), 3, alpha=0.5)),
    "mixer-alone": Subject(lambda spec: mixer(spec, Coda((16,)), 2), Spec(obs=3, act=2)),
    "filtered-mixer": Subject(lambda spec: filtered(mixer(spec, Ncf((8,), (8,), (8,)), 2))),
    "filtered-ode": Subject(lambda spec: filtered(ode(spec, solver=Tsit5(), reward=True))),
    "filtered-plrnn": Subject(lambda spec: filtered(plrnn(spec, Shallow(16, clipped=False), noise=True, reward=True))),
    "filtered-single": Subject(lambda spec: filtered(single(spec, gaussian=True), bound=1.0)),
    "filtered-ensemble": Subject(lambda spec: filtered(ensemble(spec), bound=1.0)),
    "filtered-argmax": Subject(lambda spec: filtered(ensemble(spec), temperature=0.0)),
    "filtered-in-chunks": Subject(lambda spec: filtered(Noisy(spec), chunk=10)),
    "filtered-hyper": Subject(lambda spec: filtered(Hyper(spec))),
    "filtered-latent": Subject(
        lambda spec: filtered(Latent(spec)), imposes=lambda model, *args: projection(model.inner, *args)
    ),
    "filtered-filtered": Subject(lambda spec: filtered(filtered(ensemble(spec)))),
}
ALIKE = {
    "plain",
    "latent-narrow",
    "autonomous",
    "plrnn-narrow",
    "plrnn-constant-noise",
    "plrnn-dendritic-clipped",
    "filtered-plrnn",
    "hypernetwork-mip-chunked",
    "experts-untold",
    "heads-shared",
    "hypernetwork-alone",
    "experts-alone",
    "heads-alone",
    "filtered-hypernetwork",
    "ode-biased",
    "mixer-alone",
    "mixer-geps",
    "filtered-mixer",
    "filtered-ode",
    "filtered-argmax",
    "filtered-single",
    "filtered-hyper",
    "filtered-in-chunks",
}  # compiled as another is


@pytest.mark.parametrize(
    ("name", "check"),
    [(name, check) for name in SUBJECTS for check in CHECKS if not (name in ALIKE and "compiles" in check)],
)
def test_keeps_the_contract(name, check):
    CHECKS[check](SUBJECTS[name])


@pytest.mark.parametrize("reward", [True, False])
@pytest.mark.parametrize(
    "config", [OdeConfig(), PlrnnConfig(Shallow(8)), MixerConfig()], ids=lambda x: type(x).__name__
)
def test_a_learner_without_a_reward_head_says_so(config, reward):
    config, spec = replace(config, reward=reward), Spec(2, 1)
    inner = config.build(spec, torch.Generator().manual_seed(0))
    filtered = Filtered(inner, RewardConfig(hidden=(8,), members=2, anchors=0, spread=0.0).build(spec), candidates=2)
    for model in (inner, ExpertsConfig(config).build(spec), filtered):
        assert model.tells_reward == reward
    obs, cond = torch.randn(4, 2), inner.condition(inner.context(torch.zeros(1, dtype=torch.int64)))
    inp = StepInput(torch.ones(4, 1), torch.zeros(4, inner.noise_dim), torch.ones(4, 1))
    assert bool(inner.step(inner.init(obs, cond), inp, cond)[1].reward.any()) == reward


# ---------------------------------------------------------------- learners that break it


class Chatty(Plain):
    def loss(self, segment, noise):
        mse = forced_mse(self, segment, noise, 1.0, ())[0]
        return mse, {"mse": mse}  # holds the graph


class Negative(Plain):
    def step(self, state, inp, cond):
        obs, pred = super().step(state, inp, cond)
        return obs, pred._replace(uncertainty={"size": -pred.uncertainty["size"]})


class Double(Plain):
    def step(self, state, inp, cond):
        obs = super().step(state, inp, cond)[0] + torch.full((1,), 0.1, dtype=torch.float64, device=state.device)
        return obs, certain(obs)


class Counting(Plain):
    def step(self, state, inp, cond):
        self.steps += 1
        return super().step(state, inp, cond)


class Remembering(Plain):
    """The third and each later step go elsewhere."""

    seen = 0

    def step(self, state, inp, cond):
        self.seen += 1
        obs, pred = super().step(state, inp, cond)
        return obs, pred._replace(reward=pred.reward + (self.seen > 2))


class Overwriting(Plain):
    def correct(self, state, obs, alpha, cond):
        return state.copy_(pull(state, obs, alpha))


class Drawing(Plain):
    def step(self, state, inp, cond):
        np.random.rand()  # noqa: NPY002
        return super().step(state, inp, cond)


class Dropping(Plain):
    def step(self, state, inp, cond):
        return super().step(F.dropout(state, 0.5), inp, cond)


class Centring(Plain):
    def step(self, state, inp, cond):
        obs, pred = super().step(state, inp, cond)
        return obs, pred._replace(reward=pred.reward - state[:, 0].mean())


class Leafy(Hyper):
    def condition(self, ctx):
        return (*super().condition(ctx), ctx.new_zeros(5))

    def step(self, state, inp, cond):
        return super().step(state, inp, cond[:4])


class Interleaved(Hyper):
    """Takes its rows to be in turn of the groups."""

    def step(self, state, inp, cond):
        w1, b1, w2, b2 = cond
        x = torch.cat([state, inp.act], -1).unflatten(0, (-1, w1.shape[0])).transpose(0, 1)
        obs = state + (F.silu(x @ w1 + b1) @ w2 + b2).transpose(0, 1).flatten(0, 1)
        return obs, certain(obs)


class Counted(Hyper):
    """Depends on how many groups there are."""

    def step(self, state, inp, cond):
        obs, pred = super().step(state, inp, cond)
        return obs, pred._replace(reward=0.0 * pred.reward + cond[1].shape[0])


class Mislaid(Hyper):
    """Hands out its whole table, whatever it is asked for."""

    def context(self, system):
        return self.contexts


class Lying(Plain):
    def step(self, state, inp, cond):
        obs, pred = super().step(state, inp, cond)
        return obs, pred._replace(obs=obs + 1e-3)


class Tiled(Noisy):
    def branch(self, state, inp, cond, k):
        noise = inp.noise.unflatten(1, (k, self.noise_dim)).transpose(0, 1).flatten(0, 1)
        tile = lambda x: x.repeat(k, 1)
        return self.step(tile(state), inp._replace(act=tile(inp.act), noise=noise, dt=tile(inp.dt)), cond)


class Deaf(Noisy):
    def each(self, state, inp, cond, k):
        return super().each(state, inp._replace(noise=0 * inp.noise), cond, k)


class Uniform(Noisy):
    def draw(self, n, k, generator):
        return 3**0.5 * (2 * randn(self, n, k * self.noise_dim, generator, torch.rand) - 1)


class Stuck(Noisy):
    def draw(self, n, k, generator):
        return super().draw(n, k, torch.Generator().manual_seed(0))


class Lerping(Plain):
    def correct(self, state, obs, alpha, cond):
        return torch.lerp(state, obs, torch.as_tensor(alpha, dtype=state.dtype, device=state.device))


class Shy(Plain):
    def correct(self, state, obs, alpha, cond):
        return torch.where(
            state.isfinite().all(-1, keepdim=True), pull(state, obs, 0.9 * alpha), pull(state, obs, alpha)
        )


class Hasty(Plain):
    def correct(self, state, obs, alpha, cond):
        return pull(state, obs, torch.as_tensor(alpha, dtype=state.dtype, device=state.device).sqrt())


class Scalar(Plain):
    """Takes the strength of the first row for all."""

    def correct(self, state, obs, alpha, cond):
        alpha = torch.as_tensor(alpha, dtype=state.dtype, device=state.device)
        return pull(state, obs, alpha.reshape(-1)[0])


class Lost(Latent):
    def correct(self, state, obs, alpha, cond):
        return pull(state, state + (obs - self.observe(state, cond)) @ cond[0][0].T, alpha)


class Unmasked(Plain):
    def loss(self, segment, noise):
        return super().loss(segment._replace(mask=torch.ones_like(segment.mask)), noise)


class Forgetful(Plain):
    def groups(self):
        return [{"params": list(self.net[0].parameters())}]


class Twins(Plain):
    """Two parts, both trained on all rows."""

    def __init__(self, spec):
        super().__init__(spec)
        self.parts = 2

    def losses(self, segment, noise):
        return self.loss(segment, noise)[0].expand(2)

    def validate(self, segment, noise):
        return self.losses(segment, noise).detach()


class Promising(Noisy):
    noisy_loss = False


class Unsaved(Plain):
    shift = 0.0

    def prepare(self, segment):
        self.shift = float(segment.obs.mean())

    def step(self, state, inp, cond):
        obs, pred = super().step(state, inp, cond)
        return obs, pred._replace(reward=pred.reward + self.shift)


class Perverse(Plain):
    def loss(self, segment, noise):
        mse, logs = super().loss(segment, noise)
        return -mse, logs


class Homebound(Plain):
    def step(self, state, inp, cond):
        obs, pred = super().step(state, inp, cond)
        return obs, pred._replace(reward=pred.reward + torch.ones(1).to(obs.dtype))


class Peeking(Plain):
    def step(self, state, inp, cond):
        if state.detach().abs().max().item() > 1e9:
            raise OverflowError
        return super().step(state, inp, cond)


class Selecting(Plain):
    def loss(self, segment, noise):
        now, after, act = (x[segment.mask] for x in (segment.obs[:, :-1], segment.obs[:, 1:], segment.act))
        mse = (now + self.net(torch.cat([now - self.mean, act], -1))[:, :-1] - after).square().mean()
        return mse, {"mse": mse.detach()}


class Patching(Plain):
    def step(self, state, inp, cond):
        obs, pred = super().step(state, inp, cond)
        return obs.nan_to_num(), pred._replace(obs=obs.nan_to_num(), reward=pred.reward.nan_to_num())


class Scattered(Plain):
    """Seeds share what is no parameter and no buffer."""

    def __init__(self, spec):
        super().__init__(spec)
        self.own = [torch.randn(())]

    def step(self, state, inp, cond):
        obs, pred = super().step(state, inp, cond)
        return obs, pred._replace(reward=pred.reward + self.own[0].to(obs))


COMPILED = {check for check in CHECKS if "compiles" in check}
BROKEN = {  # what each must fail; with ..., whatever else
    Chatty: {"shapes", "dtypes"},
    Negative: {"shapes", "dtypes", "each_part_tells_its_future"},
    Double: {"dtypes"},
    Counting: {"pure"},
    Remembering: {"pure", "unroll_is_steps", ...},
    Overwriting: {"pure", "unroll_is_steps", "learns_a_linear_system"},
    Drawing: {"draws_from_no_global_generator"},
    Dropping: {"pure", "draws_from_no_global_generator", "vmaps_over_seeds", ...},
    Centring: {
        "rows_do_not_see_each_other",
        "a_row_that_diverges_ends_before",
        "imagine_is_unroll_until_a_row_ends",  # a mean over rows that have ended, where the open loop goes on
    },
    Leafy: {"conditions_lead_with_groups"},
    Interleaved: {
        "rows_do_not_see_each_other",
        "a_shared_context_is_a_repeated_context",
        "candidates_share_the_condition",
    },
    Counted: {"rows_do_not_see_each_other", "a_shared_context_is_a_repeated_context"},
    Mislaid: {"the_datas_systems_have_contexts"},
    Lying: {"a_step_observes_what_it_predicts", "ended_rows_may_be_dropped"},
    Tiled: {"branch_is_steps"},
    Deaf: {"each_part_tells_its_future"},
    Uniform: {"draws_are_standard_normal"},
    Stuck: {"draws_are_standard_normal"},
    Lerping: {"correct_at_0_leaves_the_state", "correct_at_1_replaces_what_is_not_finite"},
    Shy: {"correct_at_1_imposes"},
    Hasty: {"correct_between_interpolates"},
    Scalar: {"correct_between_interpolates", "unroll_is_steps"},
    Lost: {"correct_at_1_replaces_what_is_not_finite"},
    Unmasked: {"what_is_masked_weighs_nothing"},
    Forgetful: {"groups_hold_every_parameter_once"},
    Twins: {"parts_do_not_see_each_other"},
    Promising: {"a_loss_without_noise_ignores_it"},
    Unsaved: {"saves_and_loads"},
    Perverse: {"learns_a_linear_system"},
    Homebound: {"makes_no_tensor_on_the_default_device"},
    Peeking: {"vmaps_over_seeds", "seeds_trained_together_are_seeds_trained_apart", *COMPILED},
    Selecting: {"seeds_trained_together_are_seeds_trained_apart"},
    Patching: {"a_row_that_diverges_ends_before"},
    Scattered: {"saves_and_loads", "vmaps_over_seeds"},
}


@pytest.mark.parametrize("build", BROKEN)
def test_a_broken_learner_fails_the_checks_of_what_it_breaks_and_no_other(build):
    want = BROKEN[build] - {...}
    subject = Subject(build, imposes=projection if issubclass(build, Latent) else None)
    failed = set()
    for name, check in CHECKS.items():
        if name in want or name not in COMPILED:
            try:
                check(subject)
            except AssertionError:
                failed.add(name)
    assert (failed & want if ... in BROKEN[build] else failed) == want


def test_each_check_that_a_learner_can_fail_is_failed_by_one():
    """The loops' own checks are failed by broken loops, in the next test."""
    assert set().union(*BROKEN.values()) - {...} == set(CHECKS)


def unroll_uncorrected(model, state, inputs, cond, **forced):
    return unroll(model, state, inputs, cond)


def unroll_unmasked(model, state, inputs, cond, *, mask=None, **forced):
    return unroll(model, state, inputs, cond, **forced)


def imagine_resurrecting(*args):
    """A row that has ended goes on."""
    state, alive, seg, doubt = imagine(*args)
    return state, torch.ones_like(alive), seg._replace(mask=torch.ones_like(seg.mask)), doubt


def imagine_overrunning(model, policy, terminal, *rest):
    """Terminal transitions are noted, but end nothing."""
    never = lambda obs, act, after: after[:, 0] != after[:, 0]
    state, alive, seg, doubt = imagine(model, policy, never, *rest)
    ends = [terminal(None, None, after) for after in seg.obs[:, 1:].unbind(1)]
    return state, alive, seg._replace(terminal=torch.stack(ends, 1) & seg.mask), doubt


def imagine_trusting(model, policy, terminal, state, alive, *rest):
    """What is not finite is as good as any."""
    state, alive, seg, doubt = imagine(model, policy, terminal, state, alive, *rest)
    return state, torch.ones_like(alive), seg._replace(mask=torch.ones_like(seg.mask)), doubt


@pytest.mark.parametrize(
    ("loop", "broken", "check"),
    [
        ("unroll", unroll_uncorrected, "unroll_is_steps"),
        ("unroll", unroll_unmasked, "unroll_is_steps"),
        ("imagine", imagine_resurrecting, "imagine_is_unroll_until_a_row_ends"),
        ("imagine", imagine_overrunning, "imagine_is_unroll_until_a_row_ends"),
        ("imagine", imagine_trusting, "a_row_that_diverges_ends_before"),
    ],
)
def test_a_broken_loop_fails_its_check(monkeypatch, loop, broken, check):
    monkeypatch.setattr(testing, loop, broken)
    with pytest.raises(AssertionError):
        CHECKS[check](Subject(Plain))


# ---------------------------------------------------------------- the one line


def quick(*but):
    return {name for name in CHECKS if "compiles" in name or name in but}


def test_one_line_checks_a_learner_and_names_what_fails():
    check_dynamics(Plain, Spec(obs=2, act=1), skip=quick())
    with pytest.raises(AssertionError) as error:
        check_dynamics(Forgetful, skip=quick())
    head, line = str(error.value).splitlines()
    assert head.startswith(f"the learner breaks 1 of {len(CHECKS) - len(COMPILED)} checks")
    assert line.startswith("  groups_hold_every_parameter_once: groups: these would not be trained")
    assert "net.2.weight" in line
    assert isinstance(error.value.__cause__, ExceptionGroup)
    check_dynamics(Forgetful, skip=quick("groups_hold_every_parameter_once"))


def test_one_line_survives_a_learner_that_raises():
    class Raising(Plain):
        def branch(self, state, inp, cond, k):
            raise KeyError("k")

    with pytest.raises(AssertionError, match="branch_is_steps: KeyError: 'k'"):
        check_dynamics(Raising, skip=quick())


def test_a_learner_that_cannot_be_built_is_said_once():
    class Abstract(Markov):
        pass

    with pytest.raises(AssertionError, match=r"cannot be built for Spec.*: TypeError: Can't instantiate") as caught:
        check_dynamics(lambda spec: Abstract())  # type: ignore[abstract]
    assert "\n" not in str(caught.value)


def test_one_line_takes_what_an_affine_observation_imposes():
    check_dynamics(Latent, skip=quick(), imposes=projection)
    narrow = lambda spec: Latent(spec, latent=2)
    with pytest.raises(AssertionError, match=r"breaks 1 of .*\n  correct_at_1_imposes: "):
        check_dynamics(narrow, skip=quick())


def test_a_skip_that_names_no_check_is_an_error():
    with pytest.raises(ValueError, match="skip: got \\['speed'\\], expected names among"):
        check_dynamics(Plain, skip=["speed"])


def test_the_checks_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    check_dynamics(Noisy, skip=quick())
    assert torch.equal(torch.get_rng_state(), before)
