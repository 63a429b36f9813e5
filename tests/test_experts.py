"""Experts: the chosen one is the learner itself; shifts are found, old tasks come back to their expert."""

import math
from dataclasses import replace

import pytest
import torch

from mbrl.core import Diverged, Segment, Spec, StepInput
from mbrl.dynamics.experts import ExpertsConfig, Tame, TameConfig, alignment, fit_stream, select
from mbrl.dynamics.plrnn import PlrnnConfig, Shallow
from mbrl.dynamics.single import SingleConfig

SPEC = Spec(2, 1)
SMALL = SingleConfig(hidden=(24,), weight_decay=(0.0, 0.0))
QUICK = TameConfig(window=16, lr=1e-2, steps=3)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def build(most=4, expert=SMALL, spec=SPEC):
    return ExpertsConfig(expert, most).build(spec, gen()).double()


def batch(gain, g, n=48):
    """x' = x + 0.3 (-gain x_1, x_0) + 0.5 gain a, with a little noise."""
    obs = torch.randn(n, 1, 2, generator=g, dtype=torch.float64)
    act = torch.rand(n, 1, 1, generator=g, dtype=torch.float64) * 2 - 1
    after = obs + 0.3 * torch.stack([-gain * obs[..., 1], obs[..., 0]], -1) + 0.5 * gain * act
    after = after + 0.02 * torch.randn(after.shape, generator=g, dtype=torch.float64)
    off = torch.zeros(n, 1, dtype=torch.bool)
    return Segment(
        torch.cat([obs, after], 1), act, obs[:, :, 0], off, ~off, torch.ones(n, 1, 1, dtype=torch.float64),
        torch.zeros(1, dtype=torch.int64),
    ), torch.zeros(n, 1, 0, dtype=torch.float64)  # fmt: skip


def stream(gains, length=60, seed=0):
    g = gen(seed)
    return [batch(gain, g) for gain in gains for _ in range(length)]


# ---------------------------------------------------------------- one of them is the learner itself


def test_the_chosen_expert_is_the_learner_that_it_was_built_as():
    model = build(3, spec=Spec(2, 1, 3, 3))
    segment, noise = batch(1.0, gen())
    model.prepare(segment)
    g = gen()
    alone = [SMALL.build(SPEC, g).double() for _ in range(3)]
    for m in alone:
        m.prepare(segment)
    obs, inp = segment.obs[:6, 0], StepInput(segment.act[:6, 0], torch.zeros(6, 0), torch.ones(6, 1))
    ctx = torch.tensor([[0.1, 0.9, 0.0], [0.0, 0.2, 3.0]])  # the second, then the third
    _, pred = model.step(obs, inp, model.condition(ctx))
    for part, which in ((slice(0, 3), 1), (slice(3, 6), 2)):
        _, want = alone[which].step(obs[part], StepInput(*(x[part] for x in inp)), ())
        torch.testing.assert_close(pred.obs[part], want.obs)
        torch.testing.assert_close(pred.reward[part], want.reward)
    model.alive[:] = True
    torch.testing.assert_close(
        model.errors(segment, noise), torch.stack([m.loss(segment, noise)[0] for m in alone]).detach()
    )
    both = Segment(*(torch.cat([x, x]) for x in segment[:-1]), torch.tensor([0, 2]))
    want = (alone[0].loss(segment, noise)[0] + alone[2].loss(segment, noise)[0]) / 2
    torch.testing.assert_close(model.loss(both, torch.cat([noise, noise]))[0], want)


def test_without_contexts_the_active_one_serves():
    model = build()
    segment, noise = batch(1.0, gen())
    model.prepare(segment)
    obs, inp = segment.obs[:6, 0], StepInput(segment.act[:6, 0], torch.zeros(6, 0), torch.ones(6, 1))
    seen = []
    for active in (0, 2):
        model.active.fill_(active)
        model.alive[active] = True
        seen.append(model.step(obs, inp, model.condition(torch.zeros(1, 0)))[1].obs)
        own = model.loss(segment, noise)[0]
        torch.testing.assert_close(model.errors(segment, noise)[active], own.detach())
    assert not torch.allclose(*seen)
    assert model.errors(segment, noise)[[1, 3]].isinf().all()  # not alive


def test_an_expert_with_a_state_and_noise_of_its_own():
    """A PLRNN with unseen states, under the wrapper: free runs equal the PLRNN's."""
    config = PlrnnConfig(Shallow(8), latent=4, noise=True, reward=True)
    model, alone = build(2, config), config.build(SPEC, gen()).double()
    segment, _ = batch(1.0, gen())
    model.prepare(segment)
    alone.prepare(segment)
    cond, own = model.condition(torch.zeros(1, 0)), alone.condition(torch.zeros(1, 0))
    state, z = model.init(segment.obs[:4, 0], cond), alone.init(segment.obs[:4, 0], own)
    for _ in range(3):
        inp = StepInput(segment.act[:4, 0], torch.randn(4, 3, generator=gen(), dtype=torch.float64), torch.ones(4, 1))
        state, pred = model.step(state, inp, cond)
        z, want = alone.step(z, inp, own)
        torch.testing.assert_close(pred.obs, want.obs)
        torch.testing.assert_close(pred.uncertainty, want.uncertainty)
    torch.testing.assert_close(
        model.correct(state, segment.obs[4:8, 0], 0.5, cond), alone.correct(z, segment.obs[4:8, 0], 0.5, own)
    )


# ---------------------------------------------------------------- the stream


def test_shifts_are_found_and_old_tasks_come_back_to_their_expert():
    gains = [1.0, -1.0, 3.0, 1.0, -1.0]
    tasks = [gains.index(g) for g in gains for _ in range(60)]
    model = build(6)
    report = fit_stream(model, stream(gains), QUICK, gen(1))
    assert len(report.begun) == 2  # for the second and the third; the two returns begin none
    assert len(report.switched) == 4  # one each shift: no false alarm
    for at, shift in zip(report.switched, (60, 120, 180, 240), strict=True):
        assert 0 <= at - shift <= 10
    assert alignment(report.chosen, tasks) > 0.95
    assert len({report.chosen[i] for i in (59, 119, 179)}) == 3
    assert report.chosen[239] == report.chosen[59]
    assert report.chosen[299] == report.chosen[119]
    held = {gain: batch(gain, gen(9)) for gain in set(gains)}
    for gain, at in ((1.0, 59), (-1.0, 119), (3.0, 179)):
        assert select(model, *held[gain]) == report.chosen[at]
        assert int(model.active) == report.chosen[at]


def test_a_stream_that_does_not_change_needs_one_expert():
    report = fit_stream(build(), stream([1.0], 200), QUICK, gen(1))
    assert report.switched == report.begun == []
    assert set(report.chosen) == {0}
    assert report.errors[-1] < 0.1 * report.errors[0]


def test_batches_that_are_not_finite_are_left_out():
    """At the beginning, before the window is full, and after."""
    batches, clean = stream([1.0], 44), stream([1.0], 44)
    for at, value in ((0, torch.nan), (1, torch.inf), (9, torch.nan), (30, torch.inf), (43, torch.nan)):
        batches[at][0].obs[0, at % 2] = value
    model, plain = build(), build()
    report = fit_stream(model, batches, QUICK, gen(1))
    left = [i for i, e in enumerate(report.errors) if math.isnan(e)]
    assert left == [0, 1, 9, 30, 43]
    want = fit_stream(plain, [x for i, x in enumerate(clean) if i not in left], QUICK, gen(1))
    assert [e for i, e in enumerate(report.errors) if i not in left] == want.errors
    assert report.switched == want.switched == []
    assert len(report.chosen) == 44
    for k, x in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[k], x, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(Diverged, match="the errors of the last 1 batches are nan"):
        fit_stream(build(), batches[:1], QUICK, gen())


def test_an_expert_without_a_number_for_its_error_has_an_infinite_one():
    model, part = build(2), batch(1.0, gen())
    tame = Tame(model, QUICK, gen())
    tame.update(*part)
    theta = {k: x.detach().clone() for k, x in model.theta.items()}
    with torch.no_grad():
        for x in model.theta.values():
            x[0] = torch.nan
    assert model.errors(*part).isinf().all()
    tame.update(*part)
    assert int(model.seen[0]) == 1  # nothing is learned from it
    with torch.no_grad():
        for k, x in model.theta.items():
            x.copy_(theta[k])
    tame.update(*part)
    assert model.average[0].item() == tame.errors[-1] < math.inf  # it begins anew


def test_a_gaussian_expert_stays_in_a_world_that_does_not_change():
    """Its error is a likelihood, below 0 once it has learned."""
    model = build(3, replace(SMALL, gaussian=True))
    batches = [(s, torch.zeros(48, 1, model.noise_dim, dtype=torch.float64)) for s, _ in stream([1.0], 64)]
    report = fit_stream(model, batches, QUICK, gen(0))
    assert report.errors[-1] < 0
    assert report.switched == []


def test_a_trained_model_is_loaded():
    model, fresh = build(), build()
    fit_stream(model, stream([1.0], 3), QUICK, gen(1))
    fresh.load_state_dict(model.state_dict())
    assert fresh.window.shape == (4, QUICK.window)
    part = batch(1.0, gen(5))
    for x in (model, fresh):
        fit_stream(x, [part], QUICK, gen(2))
    for k, x in model.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[k], x, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="size mismatch for window"):
        build(3).load_state_dict(model.state_dict())


def test_others_are_left_alone_while_one_learns():
    model = build()
    model.prepare(batch(1.0, gen())[0])
    before = {k: x.clone() for k, x in model.theta.items()}
    Tame(model, QUICK, gen()).update(*batch(1.0, gen()))
    for k, x in model.theta.items():
        assert not torch.equal(x[0], before[k][0])
        assert torch.equal(x[1:], before[k][1:])


def test_thresholds_are_mean_and_deviation_with_a_floor():
    model = build(3)
    tame = Tame(model, TameConfig(window=4, sigmas=3.0, floor=0.1), gen())
    model.window[0] = torch.tensor([1.0, 2.0, 3.0, 2.0])
    model.window[1] = torch.tensor([torch.nan, torch.nan, 2.0, 2.0])
    want = [2.0 + 3 * 0.5**0.5, 2.0 + 3 * 0.2, torch.inf]
    torch.testing.assert_close(tame.thresholds(), torch.tensor(want, dtype=torch.float64))
    assert [tame.full(k) for k in range(3)] == [True, False, False]
    model.window[0] = torch.tensor([9.0, 5.0, 1.0, 2.0])  # falls: the newer half alone
    assert tame.thresholds()[0].item() == pytest.approx(1.5 + 3 * 0.5)


def test_a_full_house_gives_up_the_expert_that_another_explains():
    """Three places; the first two hold the same world, the third another one."""
    model = build(3)
    model.prepare(batch(1.0, gen())[0])
    tame = Tame(model, QUICK, gen())
    g = gen(2)
    for k, gain in ((0, 1.0), (1, 1.0), (2, -1.0)):
        model.alive[k] = True
        for _ in range(40):
            part = batch(gain, g)
            tame._learn(k, *part)
            model.seen[k] += 1
        tame.last[k] = part
    model.active.fill_(2)
    assert tame._place() in (0, 1)
    model.active.fill_(0)
    assert tame._place() == 1
    with torch.no_grad():  # a likelihood as of Gaussians: 50 less for each
        model.errors, errors = lambda *x: errors(*x) - 50, model.errors
        assert tame._place() == 1
        del model.errors
        model.theta["net/weights/0"][2] = torch.nan  # an expert whose error is none is explained best by any other
    assert tame._place() == 2
    tame.last.clear()
    model.seen[:] = torch.tensor([5, 9, 7])
    assert tame._place() == 2  # the active one may not go: of the others, the one that has seen least


def test_what_cannot_be_done_says_why():
    with pytest.raises(ValueError, match="most is 2, expected at least one expert for each of the 3"):
        build(2, spec=Spec(2, 1, 0, 3))
    with pytest.raises(ValueError, match="window is 1"):
        Tame(build(), TameConfig(window=1), gen())
    with pytest.raises(ValueError, match="no batch"):
        fit_stream(build(), [], QUICK, gen())
