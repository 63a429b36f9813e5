"""Adaptation by the context alone, of any learner that has one, and inside control."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from mbrl import device as devices
from mbrl.adapt import adapt, known, met, predicted, relative_errors, windows
from mbrl.core import Spec, StepInput
from mbrl.data import Dataset, joined
from mbrl.dynamics.experts import ExpertsConfig
from mbrl.dynamics.heads import HeadsConfig
from mbrl.dynamics.hyper import HyperConfig
from mbrl.dynamics.mixer import Coda, Mixer, MixerConfig
from mbrl.dynamics.single import SingleConfig
from mbrl.fit import FitConfig, fit
from mbrl.mpc import Adapting, Follow, Mpc
from mbrl.planner import ICEM, Worth
from mbrl.solvers import Tsit5

gen = lambda seed=0: devices.generator(seed)
GAINS = (-1.0, -0.5, 0.5, 1.0)


def pushed(gain, n=400, episode=20, seed=0):
    """x' = 0.9 x + gain a, in one dimension; the reward is -|x'|."""
    act = 2 * torch.rand(n, 1, generator=gen(seed)) - 1
    obs, now = [], torch.zeros(1)
    for t in range(n):
        now = torch.randn(1, generator=gen(seed + t)) if t % episode == 0 else now
        obs.append(now)
        now = 0.9 * now + gain * act[t]
    obs = torch.stack(obs)
    after = 0.9 * obs + gain * act
    off, one = torch.zeros(n, dtype=torch.bool), torch.ones(1)
    return Dataset(obs, act, -after[:, 0].abs(), after, off, ~off, torch.arange(0, n + 1, episode), -one, one)


LEARNERS = {
    "hyper": HyperConfig(hidden=(16,), hyper=(16,), embedding=2),
    "mixer": MixerConfig(Coda((16,)), 1, 2, solver=Tsit5()),
}


@pytest.fixture(scope="module", params=LEARNERS)
def fitted(request):
    data = joined([pushed(g, seed=1000 * i) for i, g in enumerate(GAINS)], mixed=True)
    model = LEARNERS[request.param].build(data.spec, gen())
    fit(model, data, FitConfig(64, 1e-2, max_epochs=40, patience=40), gen(1))
    return model.eval()


def gain(model, ctx):
    obs, act = torch.zeros(20, 1), torch.linspace(-1, 1, 20)[:, None]
    inp = StepInput(act, torch.zeros(20, model.noise_dim), torch.ones(20, 1))
    pred = model.step(obs, inp, model.condition(ctx))[1].obs
    return ((pred * act).sum() / (act * act).sum()).item()


# ---------------------------------------------------------------- adapting


@pytest.mark.parametrize("new", [-0.75, 0.0, 0.75])
def test_a_new_system_is_met_by_its_context_alone(fitted, new):
    before = {k: v.clone() for k, v in fitted.state_dict().items()}
    segment = windows(pushed(new, 40, seed=77), 0, fitted.contexts, 4)
    got = adapt(fitted, segment, updates=150, keep=3)
    assert gain(fitted, got.ctx) == pytest.approx(new, abs=0.12)
    assert (got.errors.diff() >= 0).all()
    assert got.share.sum() == pytest.approx(1.0)
    assert all(torch.equal(v, before[k]) for k, v in fitted.state_dict().items())
    rest = adapt(fitted, segment, updates=0)
    assert got.errors[0] < rest.errors[0]
    assert torch.equal(rest.tried, fitted.contexts.detach()[rest.start])


def test_without_updates_the_nearest_known_system_is_chosen(fitted):
    for i, g in enumerate(GAINS):
        got = adapt(fitted, windows(pushed(g, 40, seed=78), 0, fitted.contexts), updates=0)
        assert got.start[0] == i
        assert got.share[0] > 0.9
    few = adapt(fitted, windows(pushed(0.5, 40), 0, fitted.contexts), starts=fitted.contexts[:2], keep=1, updates=0)
    assert len(few.tried) == 1
    assert torch.equal(few.tried, fitted.contexts.detach()[1:2])


def test_the_share_is_the_posterior_under_errors_of_unknown_size(fitted):
    for length, count in ((1, 20), (4, 5)):  # a window is one observation, however long
        segment = windows(pushed(0.6, 20, seed=79), 0, fitted.contexts, length)
        assert len(segment.obs) == count
        got = adapt(fitted, segment, updates=0)
        want = got.errors.double() ** (-count * fitted.spec.obs / 2)
        torch.testing.assert_close(got.share.double(), want / want.sum(), rtol=1e-3, atol=1e-6)


def test_each_group_of_starts_is_descended_from_by_its_best(fitted):
    segment = windows(pushed(GAINS[0], 40, seed=80), 0, fitted.contexts)
    plain = adapt(fitted, segment, updates=0, keep=len(GAINS))
    groups = torch.zeros(len(GAINS), dtype=torch.int64)
    groups[plain.start[-1]] = 1  # the worst has a group of its own
    few = adapt(fitted, segment, updates=0, keep=1, groups=groups)
    assert few.start.tolist() == [int(plain.start[0]), int(plain.start[-1])]
    more = adapt(fitted, segment, updates=0, keep=3, groups=groups)
    assert more.start.tolist() == [*plain.start[:2].tolist(), int(plain.start[-1])]
    with pytest.raises(ValueError, match="groups are"):
        adapt(fitted, segment, groups=groups[:1])


def test_each_systems_errors_are_over_its_own_length(fitted):
    long, short = pushed(GAINS[0], 40, seed=81), pushed(GAINS[1], 10, 10, seed=82)
    both = joined([long, short], mixed=True)
    alone = [relative_errors(fitted, x, fitted.contexts[i : i + 1])[0] for i, x in enumerate((long, short))]
    torch.testing.assert_close(relative_errors(fitted, both, fitted.contexts[:2]), torch.stack(alone))


def test_each_episode_runs_to_its_own_end(fitted):
    parts = [pushed(GAINS[0], n, n, seed=83) for n in (20, 6, 1)]  # the last as a limit of steps cuts it
    alone = torch.stack([relative_errors(fitted, x, fitted.contexts[:1])[0] for x in parts])
    got = relative_errors(fitted, joined(parts), fitted.contexts[:1])
    torch.testing.assert_close(got, alone.mean(0, keepdim=True))


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_where_no_start_gives_a_finite_error_none_has_a_share(fitted, prior):
    model = copy.deepcopy(fitted)
    segment = windows(pushed(0.5, 20), 0, model.contexts)
    starts = model.contexts.detach()[:2].clone()
    starts[1] = torch.nan
    some = adapt(model, segment, starts=starts, updates=1, prior=prior)
    assert some.share.tolist() == [1.0, 0.0]
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    got = adapt(model, segment, starts=fitted.contexts, updates=1, prior=prior)
    assert got.errors.isinf().all()
    assert got.share.tolist() == [0.0] * len(GAINS)


def test_forced_by_one_each_step_begins_at_what_was_observed(fitted):
    segment, ctx = windows(pushed(0.5, 20), 0, fitted.contexts), fitted.contexts[1:2]
    with torch.no_grad():
        said = predicted(fitted, segment, ctx, alpha=1.0)[0]
        inp = StepInput(segment.act[0], torch.zeros(20, fitted.noise_dim), torch.ones(20, 1))
        want = fitted.step(segment.obs[0, :-1], inp, fitted.condition(ctx))[0]
        torch.testing.assert_close(said, want)
        assert not torch.allclose(predicted(fitted, segment, ctx)[0], want, atol=1e-3)
    forced = adapt(fitted, segment, starts=ctx, updates=0, alpha=1.0, scale=torch.ones(1))
    torch.testing.assert_close(forced.errors[0], (want - segment.obs[0, 1:]).square().mean())


BLIND = {
    "experts": ExpertsConfig(SingleConfig(hidden=(8,), weight_decay=(0.0, 0.0)), 3),
    "shared-head": HeadsConfig((8,), shared=True),
}


@pytest.mark.parametrize("name", BLIND)
@pytest.mark.parametrize("frozen", [True, False])
def test_where_a_context_has_no_gradient_the_best_start_stays(name, frozen):
    model = BLIND[name].build(Spec(1, 1, 3, 3), gen()).requires_grad_(not frozen)
    got = adapt(model, windows(pushed(0.5, 20), 0, torch.zeros(1)), updates=3)
    assert torch.equal(got.tried, known(model)[got.start])
    assert (got.errors.diff() >= 0).all()
    assert (len(got.errors.unique()) == 1) == (name == "shared-head")


def test_a_prior_holds_the_context_where_little_happens(fitted):
    """Near rest the learner's own faults are all there is to see."""
    rest = pushed(0.75, 40, seed=80)
    rest = replace(rest, obs=1e-3 * rest.obs, act=0 * rest.act, next_obs=9e-4 * rest.obs)
    segment, mean, sd = windows(rest, 0, fitted.contexts, 4), known(fitted).mean(0), known(fitted).std(0, correction=0)
    free = adapt(fitted, segment, starts=mean[None], updates=200)
    scale = torch.tensor([0.5])
    held = adapt(fitted, segment, starts=mean[None], updates=200, scale=scale, prior=10.0)
    far = lambda x: ((x.ctx[0] - mean) / sd).abs().max()
    assert far(held) < 0.5
    assert far(free) > 3 * far(held)
    plain = adapt(fitted, segment, starts=mean[None], updates=0)
    weighed = adapt(fitted, segment, starts=mean[None], updates=0, scale=scale)
    change = (segment.obs[:, 1:] - segment.obs[:, :-1]).square().mean()
    torch.testing.assert_close(weighed.errors * 0.5, plain.errors * change, rtol=1e-3, atol=0)


def test_a_context_is_added_to_the_table(fitted):
    model = copy.deepcopy(fitted)
    ctx = torch.full((1, 2), 0.3)
    assert met(model, ctx) == 4
    assert model.spec.systems == 5
    torch.testing.assert_close(model.context(torch.tensor([4])), ctx)
    assert torch.equal(known(model)[:4], known(fitted))
    again = type(model)(model.spec, model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.context(torch.tensor([4])), model.context(torch.tensor([4])))
    if isinstance(model, Mixer):
        z, act, dt = torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1)
        plain, modulated = (model.moves(torch.tensor([4]), order)(z, act, dt) for order in (0, 1))
        torch.testing.assert_close(modulated, plain)  # by itself
    with pytest.raises(ValueError, match=r"met: the context is \[1, 3\], expected \[1, 2\]"):
        met(model, torch.zeros(1, 3))


def test_what_cannot_adapt_says_so(fitted):
    data = pushed(0.5, 40)
    segment = windows(data, 0, fitted.contexts)
    single = SingleConfig(hidden=(8,), weight_decay=(0.0, 0.0)).build(Spec(1, 1))
    with pytest.raises(ValueError, match="Single has no contexts"):
        adapt(single, segment)
    with pytest.raises(ValueError, match="Single has no table"):
        met(single, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="got 2 observations and 1 actions, the learner has 1 and 1"):
        adapt(fitted, segment._replace(obs=segment.obs.repeat(1, 1, 2)))
    with pytest.raises(ValueError, match="the windows' obs is not finite"):
        adapt(fitted, segment._replace(obs=segment.obs * torch.nan))
    with pytest.raises(ValueError, match="got 2 systems"):
        adapt(fitted, segment._replace(system=torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(ValueError, match="0 transitions"):
        adapt(fitted, segment._replace(mask=~segment.mask))
    with pytest.raises(ValueError, match=r"starts are \[3\]"):
        adapt(fitted, segment, starts=torch.zeros(3))
    with pytest.raises(ValueError, match="keep is 0, expected at least 1; updates is -1"):
        adapt(fitted, segment, keep=0, updates=-1)
    with pytest.raises(ValueError, match="every is 0, expected at least 1"):
        Follow(every=0)


def test_windows_are_those_of_one_system_without_overlap():
    data = joined([pushed(0.5, 60), pushed(-0.5, 60, seed=9)], mixed=True)
    segment = windows(data, 1, data.obs, 6)
    assert segment.obs.shape == (9, 7, 1)
    assert segment.system.tolist() == [0]
    torch.testing.assert_close(segment.obs[:, 0], data.obs[[60, 66, 72, 80, 86, 92, 100, 106, 112]])
    assert len(windows(data, 1, data.obs, None, 2).obs) == 2
    with pytest.raises(ValueError, match="system 1 has no window of 21 steps"):
        windows(data, 1, data.obs, 21)
    with pytest.raises(ValueError, match="system is 17, expected 0 to 1"):
        windows(data, 17, data.obs)


def test_relative_errors_are_those_of_free_runs(fitted):
    data = joined([pushed(g, 40, seed=90 + i) for i, g in enumerate(GAINS)], mixed=True)
    got = relative_errors(fitted, data, fitted.contexts)
    assert got.max() < 0.05
    swapped = relative_errors(fitted, data, fitted.contexts.flip(0))
    assert swapped.min() > 0.5
    state, errors = data.obs[[0, 20]], []
    with torch.no_grad():
        cond = fitted.condition(fitted.contexts[:1])
        for t in range(20):
            inp = StepInput(data.act[[t, 20 + t]], torch.zeros(2, fitted.noise_dim), torch.ones(2, 1))
            state = fitted.step(state, inp, cond)[0]
            errors.append((state - data.next_obs[[t, 20 + t]]).square())
    true = torch.stack([data.next_obs[:20], data.next_obs[20:40]]).square().sum((1, 2))
    want = (torch.stack(errors).sum(0)[:, 0] / true).mean()
    assert got[0].item() == pytest.approx(want.item(), rel=1e-4)
    ends = torch.tensor([19, 39])
    open_ended = replace(  # as of a series: nothing is known to follow the last step
        data, paired=data.paired.index_fill(0, ends, False), next_obs=data.next_obs.index_copy(0, ends, data.obs[ends])
    )
    last = torch.stack(errors)[:19].sum(0)[:, 0] / torch.stack([data.next_obs[:19], data.next_obs[20:39]]).square().sum(
        (1, 2)
    )
    assert relative_errors(fitted, open_ended, fitted.contexts)[0].item() == pytest.approx(last.mean().item(), rel=1e-4)
    broken = torch.full((4, 2), math.nan)
    assert relative_errors(fitted, data, broken).isinf().all()


# ---------------------------------------------------------------- in control


def driven(act, true, envs, steps=30):
    """The summed reward -|x' - 2|, by environments of gains true [E], from 0."""
    x, total = torch.zeros(envs, 1), torch.zeros(envs)
    for _ in range(steps):
        x = 0.9 * x + true[:, None] * act(x)
        total -= (x[:, 0] - 2).abs()
    return total


def controller(model, ctx=None):
    planner = replace(ICEM, horizon=6, samples=32, elites=8)
    reward = lambda obs, act, after: -(after[:, 0] - 2).abs()
    return Mpc(planner, Worth(), model, generator=gen(), reward=reward, ctx=ctx)


def test_control_finds_out_within_an_episode_which_way_actions_push(fitted):
    true = torch.tensor([-0.75, 0.75])
    follow = Follow(window=20, every=3, updates=30)
    adapting = Adapting(controller(fitted), follow, first=fitted.contexts[:1])  # the one of gain -1
    adapting.begin(2)
    got = driven(adapting, true, 2)
    blind = controller(fitted, fitted.contexts[:1].detach())
    blind.begin(2)
    lost = driven(blind, true, 2)
    assert gain(fitted, adapting.ctx[:1]) < -0.5
    assert gain(fitted, adapting.ctx[1:]) > 0.5
    assert got[1] > lost[1] + 20
    assert got[0] > lost[0] - 3
    again = Adapting(controller(fitted), follow, first=fitted.contexts[:1])
    again.begin(2)
    assert torch.equal(driven(again, true, 2), got)


def test_an_episode_that_ends_is_forgotten(fitted):
    adapting = Adapting(controller(fitted), Follow(every=1, updates=2))
    mean = fitted.contexts.detach().mean(0)
    adapting.begin(3)
    assert torch.equal(adapting.ctx, mean.expand(3, -1))
    for _ in range(3):
        adapting(torch.ones(3, 1))
    assert [len(x) for x in adapting.seen] == [2, 2, 2]
    ctx = adapting.ctx.clone()
    assert not torch.equal(ctx[0], mean)
    adapting.clear(torch.tensor([False, True, False]))
    assert [len(x) for x in adapting.seen] == [2, 0, 2]
    assert torch.equal(adapting.ctx[1], mean)
    adapting.rows([2, 1], 1)
    assert [len(x) for x in adapting.seen] == [2, 0, 0]
    assert torch.equal(adapting.ctx, torch.stack([ctx[2], mean, mean]))
    adapting(torch.ones(3, 1))
    assert [len(x) for x in adapting.seen] == [3, 0, 0]
