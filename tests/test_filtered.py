"""The filter, where it must equal something simpler; the dynamics reward, where the answer is known."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from mbrl.core import Dynamics, Markov, Prediction, Spec, StepInput, group, pull
from mbrl.data import Dataset
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.filtered import (
    HIGHEST,
    DynamicsReward,
    FilterConfig,
    Filtered,
    Game,
    RewardConfig,
    dynamics_reward,
    fit_reward,
    rescaled,
)
from mbrl.fit import FitConfig, fit
from mbrl.rollout import forced_mse
from mbrl.testing import CHECKS, Subject

close = torch.testing.assert_close
S = Spec(obs=2, act=1)
SMALL = RewardConfig(members=2, hidden=(8,), anchors=1, anchor_hidden=(8,))


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def ensemble(spec=S, **kw):
    return EnsembleConfig(**({"members": 5, "elites": 5, "hidden": (16,), "weight_decay": (0.0, 0.0)} | kw)).build(
        spec, gen()
    )


def inputs(n, width, seed=1, act=1):
    g = gen(seed)
    return StepInput(torch.randn(n, act, generator=g), torch.randn(n, width, generator=g), torch.ones(n, 1))


# ---------------------------------------------------------------- the contract


class Hyper(Markov):
    """x' = x + a small map of (x, a) whose weights are a group's context, through a matrix."""

    def __init__(self, spec):
        super().__init__()
        self.spec, self.noise_dim = spec, 0
        self.contexts = nn.Parameter(torch.randn(spec.systems, spec.ctx))
        self.hyper = nn.Linear(spec.ctx, (spec.obs + spec.act) * spec.obs)

    def condition(self, ctx):
        return (self.hyper(ctx).reshape(-1, self.spec.obs + self.spec.act, self.spec.obs) * 0.3,)

    def step(self, state, inp, cond):
        x = state + (group(torch.cat([state, inp.act], -1), cond[0].shape[0]) @ cond[0]).flatten(0, 1)
        return x, Prediction(x, x.new_zeros(x.shape[0]), {})

    def loss(self, segment, noise):
        return forced_mse(self, segment, noise, 1.0, self.condition(self.contexts[segment.system]))


class Latent(Dynamics):
    """z' = A z + C a + noise / 10 and x = the first O of z, whose rest is hidden."""

    def __init__(self, spec, hidden=2):
        super().__init__()
        self.spec, self.noise_dim = spec, spec.obs + hidden
        self.A = nn.Parameter(
            0.5 * torch.eye(spec.obs + hidden) + 0.1 * torch.randn(spec.obs + hidden, spec.obs + hidden)
        )
        self.C = nn.Parameter(torch.randn(spec.act, spec.obs + hidden) * 0.3)

    def init(self, obs, cond):
        return torch.cat([obs, obs[:, :1].expand(-1, len(self.A) - self.spec.obs)], -1)

    def observe(self, state, cond):
        return state[:, : self.spec.obs]

    def correct(self, state, obs, alpha, cond):
        z = torch.where(state.isfinite().all(-1, keepdim=True), state, self.init(obs, cond))
        return pull(state, torch.cat([obs, z[:, self.spec.obs :]], -1), alpha)

    def step(self, state, inp, cond):
        z = state @ self.A.T + inp.act @ self.C + 0.1 * inp.noise
        return z, Prediction(z[:, : self.spec.obs], z[:, -1], {})

    def loss(self, segment, noise):
        return forced_mse(self, segment, noise, 1.0, ())


def judged(inner, config=SMALL, **kw):
    return FilterConfig(**({"candidates": 4} | kw)).build(inner, config.build(inner.spec, gen(3)))


SUBJECTS = {
    "ensemble": lambda s: judged(ensemble(s, members=3, elites=2), clip=1.0, chunk=7),
    "hyper-argmax": lambda s: judged(Hyper(s), temperature=0.0),
    "latent-published": lambda s: judged(Latent(s), clip=0.5, choice="published"),
    "twice": lambda s: judged(judged(Latent(s), candidates=2), candidates=2),
}


# A compiled rollout traces the step over and over: one filter is enough for it.
@pytest.mark.parametrize(
    ("subject", "check"), [(s, c) for s in SUBJECTS for c in CHECKS if s == "twice" or c != "rollout_compiles_whole"]
)
def test_contract(subject, check):
    CHECKS[check](Subject(SUBJECTS[subject]))


# ---------------------------------------------------------------- the filter


class First(nn.Module):
    """r_D grows with the first coordinate of s'; what `rank` gives besides does too, in other units."""

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, obs, act, next_obs):
        return 0.8 + 0.5 * torch.tanh(next_obs[:, 0])

    def rank(self, obs, act, next_obs):
        return self(obs, act, next_obs), self.scale * next_obs[:, 0] + self.shift


def all_candidates(model, obs, inp, k):
    """[B, K, O]: each candidate by a step of its own."""
    draws = inp.noise[:, : k * model.noise_dim].reshape(len(obs), k, -1)
    return torch.stack([model.step(obs, inp._replace(noise=draws[:, i]), ())[1].obs for i in range(k)], 1)


def test_a_filter_of_one_candidate_is_its_learner():
    m, x = ensemble(), torch.randn(5, 2)
    f, inp = Filtered(m, First(), candidates=1), inputs(5, m.noise_dim)
    got = f.step(x, inp._replace(noise=torch.cat([inp.noise, torch.randn(5, 1)], 1)), ())[1]
    want = m.step(x, inp, ())[1]
    close(got.obs, want.obs)
    close(got.reward, want.reward)
    for name, u in want.uncertainty.items():
        close(got.uncertainty[name], u)
    assert set(got.uncertainty) == {*want.uncertainty, "implausibility"}


@pytest.mark.parametrize("choice", ["published", "scaled"])
@pytest.mark.parametrize("temperature", [0.0, 1e-5])
def test_prefers_what_its_reward_prefers(choice, temperature):
    m, x = ensemble().double(), torch.randn(300, 2, dtype=torch.float64)
    f = Filtered(m, First(), candidates=8, temperature=temperature, choice=choice)
    inp = StepInput(x[:, :1] * 0, f.draw(300, 1, gen()), x[:, :1] * 0 + 1)
    state, pred = f.step(x, inp, ())
    every = all_candidates(m, x, inp, 8)
    close(pred.obs, every[torch.arange(300), every[..., 0].argmax(1)])
    close(state, pred.obs)
    close(pred.uncertainty["implausibility"], HIGHEST - 0.8 - 0.5 * torch.tanh(pred.obs[:, 0]))


def test_samples_in_proportion():
    m, n = ensemble(), 20_000

    class Two(nn.Module):
        def forward(self, obs, act, next_obs):
            return 0.5 + 0.4 * (torch.arange(len(obs)) % 2)

    f = Filtered(m, Two(), candidates=2, temperature=0.5)
    noise, x = f.draw(n, 1, gen()), torch.zeros(n, 2)
    inp = StepInput(torch.zeros(n, 1), noise, torch.ones(n, 1))
    second = all_candidates(m, x, inp, 2)[:, 1]
    share = (f.step(x, inp, ())[1].obs == second).all(1).double().mean()
    want = math.exp(0.9 / 0.5) / (math.exp(0.9 / 0.5) + math.exp(0.5 / 0.5))
    assert abs(float(share) - want) < 0.012


def test_the_scaled_choice_does_not_read_the_units_of_its_score():
    m, x = ensemble().double(), torch.randn(200, 2, dtype=torch.float64)
    make = lambda choice, *a: Filtered(m, First(*a), candidates=6, temperature=0.7, choice=choice)
    inp = StepInput(x[:, :1] * 0, make("scaled").draw(200, 1, gen()), x[:, :1] * 0 + 1)
    a, b = (make("scaled", *units).step(x, inp, ())[0] for units in ((1.0, 0.0), (100.0, -3.0)))
    close(a, b)
    every = all_candidates(m, x, inp, 6)[..., 0]
    score = (every - every.mean(1, keepdim=True)) / every.std(1, keepdim=True, correction=0)
    u = torch.special.ndtr(inp.noise[:, 6 * m.noise_dim :])
    want = (score / 0.7 - (-u.log()).log()).argmax(1)
    close(a[:, 0], every[torch.arange(200), want])


@pytest.mark.parametrize("choice", ["published", "scaled"])
@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_never_takes_what_is_not_finite_while_it_has_another(choice, temperature):
    m, x = ensemble(), torch.randn(50, 2)
    f, w = Filtered(m, First(), candidates=4, temperature=temperature, choice=choice), m.noise_dim
    low, high = torch.full((2,), -9.0), torch.full((2,), 9.0)
    bounded = Filtered(m, First(), candidates=4, temperature=temperature, choice=choice, low=low, high=high)
    for model in (f, bounded):
        noise = model.draw(50, 1, gen())
        for c, bad in ((0, torch.nan), (1, torch.inf), (3, torch.nan)):
            noise[:, c * w] = bad
        inp = StepInput(torch.zeros(50, 1), noise, torch.ones(50, 1))
        state, pred = model.step(x, inp, ())
        third = m.step(x, inp._replace(noise=noise[:, 2 * w : 3 * w]), ())[0]
        close(state, third)
        assert pred.uncertainty["implausibility"].isfinite().all()
        noise[:, 2 * w] = torch.nan
        assert (model.step(x, inp, ())[1].uncertainty["implausibility"] == torch.inf).all()


def test_a_reward_that_is_not_a_number_chooses_nothing():
    class Broken(First):
        def forward(self, obs, act, next_obs):
            return torch.where(torch.arange(len(obs)) % 4 == 2, 0.7, torch.nan)

    m, x = ensemble(), torch.randn(9, 2)
    f = Filtered(m, Broken(), candidates=4, temperature=0.0)
    inp = inputs(9, f.noise_dim)
    close(f.step(x, inp, ())[0], all_candidates(m, x, inp, 4)[:, 2])


def test_a_filter_of_a_filter_reports_the_worse():
    inner = Filtered(ensemble(), First(), candidates=2)

    class Other(First):
        def forward(self, obs, act, next_obs):
            return 0.8 + 0.5 * torch.tanh(next_obs[:, 1])

    f = Filtered(inner, Other(), candidates=1, temperature=0.0)
    x, inp = torch.randn(200, 2), inputs(200, f.noise_dim)
    a, b = inner.step(x, inp, ())[1], f.step(x, inp, ())[1]
    own = HIGHEST - 0.8 - 0.5 * torch.tanh(b.obs[:, 1])
    close(b.uncertainty["implausibility"], torch.maximum(a.uncertainty["implausibility"], own))
    assert (own > a.uncertainty["implausibility"]).any()
    assert (own < a.uncertainty["implausibility"]).any()


def test_implausibility_is_never_negative():
    class High(First):
        def forward(self, obs, act, next_obs):
            return next_obs[:, 0] * 0 + 7.0

    f = Filtered(ensemble(), High(), candidates=2)
    assert (f.step(torch.randn(4, 2), inputs(4, f.noise_dim), ())[1].uncertainty["implausibility"] == 0).all()


@pytest.mark.parametrize("choice", ["published", "scaled"])
def test_chunks_change_nothing(choice):
    m, x = ensemble().double(), torch.randn(40, 2, dtype=torch.float64)
    reward = SMALL.build(S, gen(5)).double()
    steps = []
    for chunk in (1, 7, 40, 10_000):
        f = Filtered(m, reward, candidates=10, choice=choice, chunk=chunk)
        inp = StepInput(x[:, :1] * 0, f.draw(40, 1, gen()), x[:, :1] * 0 + 1)
        steps.append(f.step(x, inp, ())[1])
    for pred in steps[1:]:
        close(pred.obs, steps[0].obs)
        close(pred.uncertainty["implausibility"], steps[0].uncertainty["implausibility"])


def test_scores_a_chunk_at_a_time():
    seen = []

    class Counts(First):
        def forward(self, obs, act, next_obs):
            seen.append(len(obs))
            return super().forward(obs, act, next_obs)

    f = Filtered(ensemble(), Counts(), candidates=10, chunk=64)
    f.step(torch.randn(20, 2), inputs(20, f.noise_dim), ())
    assert seen == [60, 60, 60, 20], "all candidates of a row in one piece"


def test_a_snapshot_that_tells_nothing_does_not_rank_alone():
    """Its vote is within -1 and 1 in the ranking, as it is in r_D."""
    reward = dataclasses.replace(SMALL, members=3, hidden=(8,)).build(S, gen(1))
    obs, act, after = torch.randn(1, 2), torch.randn(1, 1), torch.randn(50, 2)
    reward.expert[:] = torch.tensor([1.0, 1.0, 0.0])
    reward.learner[:] = torch.tensor([-1.0, -1.0, 0.001])
    z = reward.logits(obs, act, after)
    vote = (2e6 * (z[2] - 0.001) - 1).clamp(-1, 1)
    torch.testing.assert_close(reward.rank(obs, act, after)[1], (z[0] + z[1] + vote) / 3, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"anchors": 0}, {"spread": -1.0}])
def test_a_spread_in_units_that_there_are_not_is_refused(wrong):
    with pytest.raises(ValueError, match=r"got spread .* and anchors"):
        RewardConfig(**wrong)


@pytest.mark.parametrize("anchors", [0, 2])
def test_candidates_of_a_row_are_judged_as_rows_of_their_own(anchors):
    """What a row's candidates share is evaluated once a row: no number may tell."""
    reward = dataclasses.replace(SMALL, anchors=anchors, spread=0.0).build(S, gen())
    obs, act, after = torch.randn(6, 2), torch.randn(6, 1), torch.randn(24, 2)
    got = reward.rank(obs, act, after)
    want = reward.rank(obs.repeat_interleave(4, 0), act.repeat_interleave(4, 0), after)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_filter_draws_its_candidates_stratified():
    m = ensemble()
    f = Filtered(m, First(), candidates=10)
    z = f.draw(50, 3, gen()).reshape(150, -1)[:, : 10 * m.noise_dim].reshape(150, 10, -1)
    pick = (torch.special.ndtr(z[..., -1]) * 5).long()
    assert (nn.functional.one_hot(pick, 5).sum(1) == 2).all(), "10 candidates of 5 elites are 2 of each"


def test_a_candidate_beyond_the_bounds_is_held_and_its_state_with_it():
    class Sees(nn.Module):
        def forward(self, obs, act, next_obs):
            assert (next_obs <= 0.5).all()
            assert (next_obs >= -0.25).all()
            return next_obs[:, 0] * 0 + 0.5

    m, low, high = Latent(S), torch.tensor([-0.25, -0.25]), torch.tensor([0.5, 0.5])
    f = Filtered(m, Sees(), candidates=3, temperature=0.0, low=low, high=high)
    x = torch.randn(60, 2) * 2
    inp = inputs(60, f.noise_dim)
    state, pred = f.step(m.init(x, ()), inp, ())
    free, want = m.step(m.init(x, ()), inp._replace(noise=inp.noise[:, : m.noise_dim]), ())
    close(pred.obs, want.obs.clamp(low, high))  # all are equally good: the first is taken
    close(state, torch.cat([want.obs.clamp(low, high), free[:, 2:]], -1))
    assert (want.obs > high).any()
    assert (want.obs < low).any()


def test_bounds_are_in_standard_deviations_or_as_far_as_the_data_go():
    r = SMALL.build(S)
    r.inputs.mean.copy_(torch.tensor([10.0, -1.0, 0.0]))
    r.inputs.std.copy_(torch.tensor([2.0, 0.5, 1.0]))
    r.reach.copy_(torch.tensor([1.0, 30.0]))
    f = FilterConfig(clip=10.0).build(ensemble(), r)
    close(f.low, torch.tensor([-10.0, -16.0]))
    close(f.high, torch.tensor([30.0, 14.0]))


def linear_data(n=2_000, bias=0.0, std=0.3, seed=0):
    """s' = 0.9 s + 0.5 a (+ bias) + std * noise in 2 dimensions, episodes of 20 steps."""
    g = gen(seed)
    obs, act = torch.randn(n, 2, generator=g), torch.rand(n, 1, generator=g) * 2 - 1
    after = obs.clone()
    for t in range(n):
        if t % 20:
            obs[t] = after[t - 1]
        after[t] = 0.9 * obs[t] + 0.5 * act[t] + bias + std * torch.randn(2, generator=g)
    no, yes = torch.zeros(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    starts, one = torch.arange(0, n + 1, 20), torch.ones(1)
    return Dataset(obs, act, obs[:, 0], after, no, yes, starts, -one, one)


def test_a_fit_of_a_filter_fits_its_learner():
    data, config = linear_data(400), FitConfig(batch=32, max_epochs=3)
    alone, inner = ensemble(), ensemble()
    f = judged(inner)
    reward = {k: v.clone() for k, v in f.reward.state_dict().items()}
    a, b = fit(alone, data, config, gen(4)), fit(f, data, config, gen(4))
    assert a.holdout == b.holdout
    for (name, x), y in zip(alone.state_dict().items(), inner.state_dict().values(), strict=True):
        close(x, y, rtol=0, atol=0, msg=name)
    assert all(torch.equal(v, reward[k]) for k, v in f.reward.state_dict().items())


@pytest.mark.parametrize(
    "setting", [{"candidates": 0}, {"temperature": -0.1}, {"chunk": 0}, {"choice": "best"}], ids=lambda s: next(iter(s))
)
def test_settings_that_make_no_filter_are_refused(setting):
    with pytest.raises(ValueError, match=str(next(iter(setting.values())))):
        Filtered(ensemble(), First(), **setting)


# ---------------------------------------------------------------- the reward


def test_r_d_is_the_published_formula():
    logits = torch.tensor([[0.0, 3.0, -9.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    expert, learner = torch.tensor([2.0, 3.0]).double(), torch.tensor([-2.0, 1.0]).double()
    z = rescaled(logits, expert, learner)
    close(z, torch.tensor([[0.0, 1.5, -4.5], [-1.0, -1.0, -1.0]]).double())
    sig = lambda v: 1 / (1 + math.exp(-v))
    want = [-math.log(1 - (sig(a) + sig(-1)) / 2) for a in (0.0, 1.0, -1.0)]
    close(dynamics_reward(z), torch.tensor(want).double())


def test_r_d_spans_its_range_and_no_more():
    low, high = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    assert (round(low, 3), round(high, 3)) == (0.313, 1.313)
    close(dynamics_reward(torch.tensor([[-50.0, 50.0]] * 3)), torch.tensor([low, high]))
    assert pytest.approx(high) == HIGHEST


def test_a_snapshot_whose_means_are_the_wrong_way_round_stays_finite():
    logits = torch.tensor([[-5.0, 5.0]])
    r = dynamics_reward(rescaled(logits, torch.tensor([-1.0]), torch.tensor([1.0])))
    close(r, torch.tensor([math.log(1 + math.exp(-1)), math.log(1 + math.e)]))


@pytest.mark.parametrize("anchors", [0, 2])
def test_a_reward_saves_and_loads(anchors):
    config = dataclasses.replace(SMALL, anchors=anchors, spread=0.0)
    a, b = config.build(S, gen(1)), config.build(S, gen(2))
    for buffer in (a.expert, a.learner, a.scale, a.reach):
        buffer.uniform_(0.5, 2.0, generator=gen(3))
    a.learner.neg_()
    b.load_state_dict(a.state_dict())
    args = torch.randn(6, 2), torch.randn(6, 1), torch.randn(6, 2)
    close(a(*args), b(*args), rtol=0, atol=0)
    assert not torch.equal(a(*args), config.build(S, gen(2))(*args))


class Biased(Markov):
    """s' = 0.9 s + 0.5 a + bias + std * noise."""

    def __init__(self, bias, std=0.3):
        super().__init__()
        self.spec, self.noise_dim, self.std = S, 2, std
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def step(self, state, inp, cond):
        x = 0.9 * state + 0.5 * inp.act + self.bias + self.std * inp.noise
        return x, Prediction(x, x[:, 0], {})

    def loss(self, segment, noise):
        return forced_mse(self, segment, noise, 1.0, ())


LEARN = RewardConfig(
    members=5,
    hidden=(32,),
    updates=400,
    batch=128,
    lr=3e-3,
    penalty=0.0,
    spread=0.0,
    anchors=1,
    anchor_hidden=(32,),
    anchor_updates=300,
)


def auc(above, below):
    ranks = torch.cat([above, below]).argsort().argsort().double() + 1
    n, m = len(above), len(below)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def test_the_gradient_penalty_is_a_squared_slope():
    """Of a linear logit |w|^2, in units of the change, wherever between the two."""
    config = dataclasses.replace(LEARN, anchors=0)
    game = Game(Biased(0.3), linear_data(500), config, gen(1), torch.zeros(()))
    game.player.change.std.copy_(torch.tensor([2.0, 0.5]))
    w, seen = torch.tensor([3.0, -4.0]), []
    game.player.features = lambda obs, act, after: (seen.append(after), after)[1]
    game.player.heads = torch.nn.Linear(2, 1, bias=False)
    game.player.heads.weight = torch.nn.Parameter(w[None])
    real, fake = ((torch.zeros(64, 2), torch.zeros(64, 1), torch.full((64, 2), x)) for x in (0.0, 1.0))
    assert game._penalty(real, fake, gen(2)).item() == pytest.approx((3 * 2) ** 2 + (4 * 0.5) ** 2)
    assert (seen[0][:, 0] == seen[0][:, 1]).all()
    assert seen[0][:, 0].std().item() == pytest.approx(12**-0.5, rel=0.2)


def test_the_gradient_penalty_flattens_the_discriminator():
    slopes = []
    for penalty in (0.0, 1.0):
        config = dataclasses.replace(LEARN, anchors=0, penalty=penalty)
        game = Game(Biased(0.3), linear_data(2_000), config, gen(1), torch.zeros(()))
        for _ in range(150):
            game.update(gen(3))
        real = game._flat(game._batch(gen(4)))
        slopes.append(game._penalty(real, real, gen(2)).item())
    assert slopes[1] < 0.5 * slopes[0]


def test_the_generators_spread_is_in_units_of_what_the_anchors_leave():
    """Noise of a size that is uniform from nothing to `spread` of these."""
    config = dataclasses.replace(LEARN, anchors=1, anchor_updates=1, spread=3.0, batch=4_000)
    game = Game(Biased(0.0), linear_data(5_000), config, gen(1), torch.zeros(()))
    game.update(gen(3))  # the anchors' turn
    seen, inner = [], game.player.features
    game._generate = lambda segment, generator: game._flat(segment)
    game.player.features = lambda obs, act, after: (seen.append(after), inner(obs, act, after))[1]
    game.update(gen(4))
    real, fake = seen[0].chunk(2)
    unit = (fake - real) / (game.reward.scale * game.reward.change.std)
    assert unit.var().item() == pytest.approx(3.0**2 / 3, rel=0.1)
    size = unit.square().mean(1)
    assert (size < 0.1).float().mean() > 0.02, "some of next to nothing"


@pytest.mark.parametrize("anchors", [0, 1])
def test_learns_the_likelihood_ratio(anchors):
    """Two Gaussians a distance 0.3 sqrt(2) apart at a standard deviation of 0.3: the log ratio is linear in s', and the
    best possible AUC is Phi(sqrt(2) / sqrt(2)) = 0.841."""
    data, model = linear_data(4_000), Biased(0.3)
    reward = fit_reward(model, data, dataclasses.replace(LEARN, anchors=anchors), gen(1))
    held = linear_data(2_000, seed=9)
    inp = StepInput(held.act, torch.randn(2_000, 2, generator=gen(7)), torch.ones(2_000, 1))
    fake = model.step(held.obs, inp, ())[0].detach()
    ratio = lambda after: -(after - 0.9 * held.obs - 0.5 * held.act - 0.15).sum(-1)
    (r, z), (r_fake, z_fake) = reward.rank(held.obs, held.act, held.next_obs), reward.rank(held.obs, held.act, fake)
    best = auc(ratio(held.next_obs), ratio(fake))
    assert abs(best - 0.841) < 0.02
    assert best - 0.025 < auc(z, z_fake) < best + 0.01
    both, truth = torch.cat([z, z_fake]), torch.cat([ratio(held.next_obs), ratio(fake)])
    assert torch.corrcoef(torch.stack([both, truth]))[0, 1] > 0.97
    assert r.mean() > r_fake.mean()
    assert auc(r, r_fake) > 0.75
    assert reward.expert.min() > 0 > reward.learner.max()


def test_a_trained_generator_is_improved_against_the_discriminator_and_the_model_is_left_alone():
    model, data = Biased(0.6), linear_data(2_000)
    config = dataclasses.replace(LEARN, generator="trained", every=2, generator_lr=5e-3, likelihood=0.0, updates=600)
    g = gen(2)
    game = Game(model, data, config, g, model.bias)
    gaps = []
    while game.done < config.anchor_updates + config.updates:
        figures = game.update(g)
        if "real" in figures:
            gaps.append(float(figures["real"] - figures["generated"]))
    assert abs(float(game.model.bias.detach())) < 0.2  # it began at 0.6; the truth is 0
    assert sum(gaps[-50:]) < 0.5 * max(sum(gaps[i : i + 50]) for i in range(0, 400, 50))
    assert float(model.bias.detach()) == pytest.approx(0.6)
    assert model.bias.grad is None


def test_likelihood_keeps_the_generator_at_its_own_loss():
    model, data = Biased(0.6), linear_data(2_000)
    config = dataclasses.replace(
        LEARN, generator="trained", every=1, generator_lr=1e-2, likelihood=1e4, anchors=0, spread=0.0, updates=150
    )
    g = gen(2)
    game = Game(model, data, config, g, model.bias)
    for _ in range(150):
        game.update(g)
    assert abs(float(game.model.bias.detach())) < 0.1


@pytest.mark.parametrize("length", [1, 3])
def test_generated_trajectories_follow_the_data_s_actions_from_a_real_state(length):
    model, data = Biased(0.5, std=0.0), linear_data(200)
    g = gen(0)
    game = Game(model, data, dataclasses.replace(LEARN, length=length), g, model.bias)
    segment = game.rows.segment(game.index[:10])
    with torch.no_grad():
        obs, act, after = (x.reshape(10, length, -1) for x in game._generate(segment, g))
    close(obs[:, 0], segment.obs[:, 0])
    close(obs[:, 1:], after[:, :-1])
    close(act, segment.act)
    close(after, 0.9 * obs + 0.5 * act + 0.5)


def test_clamps_are_the_mean_logits_of_each_snapshot_s_stretch():
    config = dataclasses.replace(LEARN, updates=80, late=0.5, members=4, anchors=0, spread=0.0)
    seen = []
    reward = fit_reward(Biased(0.3), linear_data(400), config, gen(), lambda *a: seen.append(a), interval=1)
    assert [s[:2] for s in seen] == [(i + 1, 80) for i in range(80)]
    for name, clamp in (("real", reward.expert), ("generated", reward.learner)):
        each = torch.tensor([s[2][name] for s in seen])
        close(clamp, each[40:].reshape(4, 10).mean(1))


def test_the_last_snapshot_is_the_discriminator_and_the_others_came_before():
    config = dataclasses.replace(LEARN, updates=40, members=4, anchors=0, spread=0.0)
    g = gen()
    game = Game(Biased(0.3), linear_data(400), config, g, torch.zeros(1))
    history = []
    for _ in range(40):
        game.update(g)
        history.append(game.player.heads.weights[0][0].detach().clone())
    for k, at in enumerate((17, 24, 32, 39)):  # the late part is the last 30 updates
        close(game.reward.heads.weights[0][k].detach(), history[at], rtol=0, atol=0)


FAST = dataclasses.replace(LEARN, updates=40, anchor_updates=20, members=3, batch=32, hidden=(8,), anchor_hidden=(8,))


def same_rewards(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        close(x, y, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"generator": "trained", "every": 3},
        {"length": 2, "spread": 1.0, "penalty": 0.5, "anchors": 2},
        {"anchors": 0, "spread": 0.0},
    ],
    ids=["fixed", "trained", "multi-step", "plain"],
)
def test_a_resumed_fit_gives_the_same_numbers(setting):
    config, data, model = dataclasses.replace(FAST, **setting), linear_data(400), Biased(0.3)
    kept = []
    keep = lambda state: kept.append({k: v.clone() for k, v in state.items()})
    whole = fit_reward(model, data, config, gen(3), checkpoint=keep, interval=8)
    same_rewards(whole, fit_reward(model, data, config, gen(3), interval=1000))  # the same generator, the same numbers
    other = fit_reward(model, data, config, gen(4), interval=8)
    assert not torch.equal(other.expert, whole.expert)
    assert len(kept) >= 5
    for at in (0, 2, len(kept) // 2, -1):
        same_rewards(whole, fit_reward(model, data, config, gen(99), resume=kept[at], interval=8))


def test_resuming_another_fit_is_refused():
    kept = []
    fit_reward(Biased(0.3), linear_data(200), FAST, gen(), checkpoint=kept.append, interval=20)
    with pytest.raises(ValueError, match=r"fit_reward: resume holds \[1, .*another fit's state"):
        fit_reward(Biased(0.3), linear_data(200), dataclasses.replace(FAST, anchors=2), gen(), resume=kept[0])


def test_a_generator_that_diverges_does_not_spoil_the_reward():
    class Diverges(Biased):
        def step(self, state, inp, cond):
            _, pred = super().step(state, inp, cond)
            bad = (torch.arange(len(state)) % 3 == 0)[:, None]
            x = torch.where(bad, torch.inf, pred.obs)
            return x, pred._replace(obs=x)

    reward = fit_reward(Diverges(0.3), linear_data(400), FAST, gen())
    assert all(v.isfinite().all() for v in reward.state_dict().values())
    assert (reward.expert > reward.learner).all()


@pytest.mark.parametrize("through", [False, True], ids=["beside", "through"])
def test_a_trained_generator_outlives_rows_that_diverge(through):
    """Rows whose gradient is finite, since what is infinite stands beside the model, are left out; where it is not, the
    update is."""

    class Diverges(Biased):
        def step(self, state, inp, cond):
            _, pred = super().step(state, inp, cond)
            far = torch.where(torch.arange(len(state)) % 3 == 0, torch.inf, 1.0)[:, None]
            x = pred.obs * far if through else torch.where(far.isinf(), far, pred.obs)
            return x, pred._replace(obs=x)

    model = Diverges(0.3)
    config = dataclasses.replace(FAST, generator="trained", every=2, generator_lr=1e-2, likelihood=0.0)
    game, g = Game(model, linear_data(400), config, gen(1), model.bias), gen(2)
    while game.done < config.anchor_updates + config.updates:
        game.update(g)
    assert game.model.bias.isfinite().all()
    assert bool((game.model.bias == model.bias).all()) is through


def test_the_reward_knows_how_far_the_data_go():
    data = linear_data(400)
    reward = fit_reward(Biased(0.3), data, FAST, gen())
    seen = torch.cat([data.obs, data.next_obs])
    z = (seen - data.obs.mean(0)) / data.obs.std(0, correction=0)
    close(reward.reach, z.abs().amax(0))
    low, high = reward.bounds(0.0)
    assert (seen >= low - 1e-4).all()
    assert (seen <= high + 1e-4).all()


def test_no_window_is_an_error():
    with pytest.raises(ValueError, match="windows of 30 steps"):
        fit_reward(Biased(0.3), linear_data(200), dataclasses.replace(FAST, length=30), gen())


@pytest.mark.parametrize(
    "setting",
    [
        *({"members": 0}, {"late": 0.0}, {"members": 41}, {"batch": 0}, {"length": 0}, {"anchor_updates": 0}),
        *({name: x} for name in ("lr", "anchor_lr", "generator_lr", "penalty", "likelihood") for x in (-1.0, math.nan)),
        {"betas": (0.5, 1.0)},
    ],
    ids=lambda s: next(iter(s)),
)
def test_settings_that_make_no_reward_are_refused(setting):
    with pytest.raises(ValueError, match="RewardConfig"):
        dataclasses.replace(FAST, **setting)


def test_an_unknown_generator_is_refused():
    with pytest.raises(ValueError, match="'adversary'"):
        dataclasses.replace(FAST, generator="adversary").build(S)
    assert isinstance(FAST.build(S), DynamicsReward)
