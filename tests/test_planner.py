"""The planner against what is known: closed forms, LQR, spectra, and values that are not numbers."""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
from torch import nn
from worlds import Line

from mbrl import planner
from mbrl.core import Markov, Prediction, Spec, StepInput
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.filtered import Filtered
from mbrl.planner import (
    ICEM,
    LOOP,
    OVER,
    PRESETS,
    Over,
    Plan,
    Planner,
    Worth,
    colored,
    fresh,
    propose,
    search,
    shift,
    value,
)

each = pytest.mark.parametrize("p", PRESETS.values(), ids=PRESETS)


def white(p, envs, act, seed=0, dtype=torch.float32):
    return p.noise(envs, act, torch.Generator().manual_seed(seed), torch.zeros((), dtype=dtype))


def small(p, **kw):
    """A preset at a size for tests; TD-MPC2's proposals come from elsewhere."""
    return replace(p, **({"samples": 128, "elites": min(p.elites, 16)} | kw))


def bowl(goal):
    return lambda acts: -((acts - goal) ** 2).sum((-1, -2))


class Linear(Markov):
    """x' = A x + B u, reward -(x' Q x + u' R u)."""

    def __init__(self, a, b, q, r):
        super().__init__()
        self.spec, self.noise_dim = Spec(a.shape[0], b.shape[1]), 0
        self.a, self.b, self.q, self.r = a, b, q, r
        self.anchor = nn.Parameter(torch.zeros((), dtype=a.dtype))

    def step(self, state, inp, cond):
        x = state @ self.a.T + inp.act @ self.b.T + self.anchor
        cost = ((state @ self.q) * state).sum(-1) + ((inp.act @ self.r) * inp.act).sum(-1)
        return x, Prediction(x, -cost, {"size": x.abs().amax(-1)})

    def loss(self, segment, noise):
        raise NotImplementedError


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"horizon": 0},
        {"samples": 8, "elites": 9},
        {"samples": 0, "elites": 0},
        {"temperature": 0.0},
        {"elites": -1},
        {"decay": 0.9},
        {"decay": math.nan},
        {"decay": 4.0, "samples": 64, "elites": 8, "proposals": 16},
        {"iterations": 0},
        {"momentum": 1.0},
        {"proposals": 256},
        {"keep": 1.1},
        {"color": -1.0},
        {"execute": "worst"},
        {"std": math.inf},
        {"color": math.inf},
        {"gradient_rate": math.inf},
        {"horizon": 2.5},
        {"iterations": 2.0},
        {"proposals": 0.5},
    ],
)
def test_a_setting_that_cannot_be_is_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*expected"):
        Planner(**wrong)


@pytest.mark.parametrize("decay", [1e200, math.inf])
def test_a_decay_beyond_all_numbers_leaves_the_least(decay):
    assert Planner(samples=40, elites=10, decay=decay, iterations=4).sizes() == [40, 20, 20, 20]


def test_each_iteration_draws_fewer_but_never_fewer_than_two_an_elite():
    p = Planner(samples=40, elites=10, decay=1.25, iterations=6)
    assert p.sizes() == [40, 32, 25, 20, 20, 20]
    assert replace(p, proposals=5).sizes() == [35, 27, 20, 15, 15, 15]
    assert Planner(samples=12, elites=10).sizes() == [12] * 5
    assert ICEM.kept == 3
    assert Planner(samples=200, elites=100, keep=0.29).kept == 29


def test_the_presets_are_the_published_settings():
    """iCEM: Pinneri et al., 2020; TD-MPC2: Hansen et al., 2024; LOOP: Sikchi et al., 2021."""
    icem = {"samples": 40, "decay": 1.25, "horizon": 30, "iterations": 3, "elites": 10, "keep": 0.3, "momentum": 0.1,
            "std": 0.5, "join": True, "execute": "best", "proposals": 0}  # fmt: skip
    tdmpc = {"iterations": 6, "samples": 512, "elites": 64, "horizon": 3, "temperature": 2, "min_std": 0.05,
             "max_std": 2, "std": 2}  # fmt: skip
    for preset, want in (
        (ICEM, icem),
        (PRESETS["tdmpc"], tdmpc | {"proposals": 0}),
        (OVER["tdmpc"], tdmpc | {"proposals": 24}),
        (PRESETS["mppi"], {"iterations": 1, "elites": 0}),
    ):
        assert {k: getattr(preset, k) for k in want} == want
    assert 0.25 <= ICEM.color <= 3.5
    loop = OVER["loop"]
    assert 3 <= loop.horizon <= 5
    assert loop.proposals / loop.samples == 0.05


# ---------------------------------------------------------------- the search


@each
@pytest.mark.parametrize("horizon", [12, 1])
def test_it_finds_the_optimum_of_each_environment(p, horizon):
    one = p.iterations == 1
    p = small(p, horizon=horizon, std=0.5, **({"iterations": 6, "temperature": 0.3} if one else {}))
    goal = torch.linspace(-0.8, 0.8, 3)[:, None, None, None].expand(3, 1, horizon, 2)
    plan = fresh(p, 3, 2, goal)
    for i in range(8):
        found, plan = search(p, bowl(goal), plan, white(p, 3, 2, i))
        plan = plan._replace(std=torch.full_like(plan.std, p.std))
    assert found.some.all()
    assert (found.bad == 0).all()
    assert ((found.acts - goal[:, 0]) ** 2).mean() < 0.04


def test_a_quadratic_in_thirty_dimensions_is_solved():
    """Ill-conditioned (1 : 30), 30 actions at once: both ways of search end within a percent of where they began."""
    goal = torch.linspace(-0.7, 0.7, 30)[None, None, None]
    scale = torch.logspace(0, math.log10(30), 30)
    f = lambda acts: -(scale * (acts - goal) ** 2).sum((-1, -2))
    begin = -f(torch.zeros(1, 1, 1, 30)).item()
    for p in (
        Planner(horizon=1, samples=300, elites=30, iterations=40, min_std=1e-4),
        Planner(horizon=1, samples=300, elites=30, iterations=40, min_std=1e-4, keep=0.3, momentum=0.1, execute="best"),
        Planner(horizon=1, samples=60, elites=6, iterations=25, min_std=1e-4, gradient_steps=5, execute="best"),
    ):
        found, _ = search(p, f, fresh(p, 1, 30, goal), white(p, 1, 30))
        assert -f(found.acts[:, None]).item() < 0.01 * begin


def riccati(a, b, q, r, horizon):
    """First gain of the finite-horizon problem whose last state costs nothing (its reward is never collected)."""
    v = torch.zeros_like(q)
    for _ in range(horizon):
        gain = torch.linalg.solve(r + b.T @ v @ b, b.T @ v @ a)
        v = q + a.T @ v @ (a - b @ gain)
    return gain, v


def test_lqr_gain_and_cost_are_recovered():
    d: dict[str, Any] = {"dtype": torch.float64}
    a, b = torch.tensor([[1.0, 0.2], [0.0, 1.0]], **d), torch.tensor([[0.02], [0.2]], **d)
    q, r, horizon = torch.eye(2, **d), 0.5 * torch.eye(1, **d), 8
    gain, cost = riccati(a, b, q, r, horizon)
    model, start = Linear(a, b, q, r), torch.tensor([[0.4, 0.0], [0.0, 0.4], [-0.3, 0.2]], **d)
    p = Planner(horizon=horizon, samples=400, elites=20, iterations=60, min_std=1e-5)
    dt, noise = torch.ones(3, 1, **d), [torch.zeros(3, 0, **d)] * horizon
    f = lambda acts: value(Worth(), model, start, (), acts, noise, dt)
    found, _ = search(p, f, fresh(p, 3, 1, start), white(p, 3, 1, dtype=torch.float64))
    torch.testing.assert_close(found.acts[:, 0], -start @ gain.T, atol=2e-3, rtol=0)
    torch.testing.assert_close(found.value, -((start @ cost) * start).sum(-1), atol=1e-4, rtol=1e-4)
    # the gain itself, from the two unit states
    k = torch.stack([-found.acts[0, 0] / 0.4, -found.acts[1, 0] / 0.4], -1)
    torch.testing.assert_close(k, gain, atol=5e-3, rtol=0)


@each
def test_the_order_of_candidates_does_not_matter(p):
    p = small(p, iterations=1, keep=0.0, execute="best")
    noise, goal = white(p, 2, 2)[0], torch.full((2,), 0.3)
    one, a = search(p, bowl(goal), fresh(p, 2, 2, goal), [noise])
    two, b = search(p, bowl(goal), fresh(p, 2, 2, goal), [noise[:, torch.randperm(noise.shape[1])]])
    torch.testing.assert_close((one.acts, one.value, a.mean, a.std), (two.acts, two.value, b.mean, b.std))


def test_environments_do_not_see_each_other():
    goal = torch.tensor([-0.5, 0.5])[:, None, None, None].expand(2, 1, 15, 1)
    noise = white(ICEM, 2, 1)
    p = replace(ICEM, horizon=30)
    goal = goal[:, :, :1].expand(-1, -1, 30, -1)
    both, plan = search(p, bowl(goal), fresh(p, 2, 1, goal), noise)
    for e in range(2):
        alone, own = search(p, bowl(goal[e : e + 1]), fresh(p, 1, 1, goal), [z[e : e + 1] for z in noise])
        torch.testing.assert_close(alone.acts[0], both.acts[e])
        torch.testing.assert_close(own.elites[0], plan.elites[e])


@pytest.mark.parametrize("temperature", [0.5, 2.0, math.inf])
def test_weights_are_the_softmax_of_returns_over_temperature(temperature):
    v, acts = torch.tensor([[0.0, -1.0, -2.0]]), torch.tensor([0.1, 0.2, 0.3])
    p = Planner(horizon=1, samples=3, elites=3, iterations=1, temperature=temperature, min_std=0.0)
    noise = ((acts - 0.0) / p.std)[None, :, None, None]
    found, plan = search(p, lambda a: v, fresh(p, 1, 1, v), [noise])
    w = (v[0] / temperature).softmax(0) if temperature < math.inf else torch.full((3,), 1 / 3)
    mean = (w * acts).sum()
    torch.testing.assert_close(found.acts.squeeze(), mean)
    torch.testing.assert_close(plan.std.squeeze(), (w * (acts - mean) ** 2).sum().sqrt())


def test_momentum_pulls_mean_and_std_towards_the_old():
    p = Planner(horizon=1, samples=4, elites=1, iterations=1, momentum=0.25, std=0.5, min_std=0.0)
    noise = torch.tensor([0.2, 0.4, 0.8, 1.2])[None, :, None, None]
    _, plan = search(p, lambda a: a[..., 0, 0], fresh(p, 1, 1, noise), [noise])
    torch.testing.assert_close(plan.mean.item(), 0.75 * 0.6)
    torch.testing.assert_close(plan.std.item(), 0.25 * 0.5)


def test_the_spread_of_the_next_candidates_keeps_within_its_bounds():
    """A lone elite does not end the search, and elites at both bounds do not spread it beyond the most."""
    seen = []
    f = lambda a: (seen.append(a), a[..., 0, 0])[1]
    for p, want in (
        (Planner(horizon=1, samples=2, elites=1, iterations=2, min_std=0.05), 0.05),
        (Planner(horizon=1, samples=2, elites=2, iterations=2, max_std=0.2, momentum=0.5), 0.2),
    ):
        noise = torch.tensor([[-2.0, 2.0]])[..., None, None]
        _, plan = search(p, f, fresh(p, 1, 1, noise), [noise, noise / 2])
        assert plan.std.item() == pytest.approx(want)
        assert (seen[-1].max() - seen[-1].mean()).item() == pytest.approx(want if p.elites > 1 else want / 2, abs=1e-6)


@pytest.mark.parametrize("std", [0.1, 1.0])
def test_sigma_has_its_effect(std):
    """Candidates are spread by it, clipped at the bounds, and the plan's own spread is what the elites have."""
    seen = []
    p = Planner(horizon=4, samples=4096, elites=4096, iterations=1, std=std)
    f = lambda a: (seen.append(a), torch.zeros(a.shape[:2]))[1]
    search(p, f, fresh(p, 1, 1, torch.zeros(())), white(p, 1, 1))
    want = np.clip(std * np.random.default_rng(0).standard_normal(200_000), -1, 1).std()
    assert abs(seen[0].std().item() - want) < 0.01
    assert seen[0].abs().max() <= 1


def test_the_best_seen_is_executed_and_elites_are_kept():
    p = Planner(horizon=2, samples=32, elites=8, iterations=3, keep=0.5, execute="best")
    seen = []
    f = lambda a: (seen.append(a), bowl(0.3)(a))[1]
    found, plan = search(p, f, fresh(p, 1, 1, torch.zeros(())), white(p, 1, 1))
    every = torch.cat(seen, 1)
    best = bowl(0.3)(every)[0].argmax()
    assert torch.equal(found.acts[0], every[0, best])
    assert found.value == bowl(0.3)(every).max()
    assert [s.shape[1] for s in seen] == [36, 36, 36]
    assert found.seen == 108
    torch.testing.assert_close(seen[1][:, -4:], seen[0].gather(
        1, bowl(0.3)(seen[0]).topk(4)[1][..., None, None].expand(-1, -1, 2, 1)))  # fmt: skip
    assert plan.elites.shape == (1, 4, 2, 1)
    joined = replace(p, join=True)
    seen.clear()
    search(joined, f, fresh(p, 1, 1, torch.zeros(())), white(p, 1, 1))
    assert [s.shape[1] for s in seen] == [36, 36, 37]


def test_proposals_are_candidates_of_every_iteration():
    p = Planner(horizon=3, samples=16, elites=4, iterations=2, proposals=2, execute="best")
    given = torch.full((1, 2, 3, 1), 0.9)
    found, _ = search(p, bowl(0.9), fresh(p, 1, 1, given), white(p, 1, 1), given)
    assert torch.equal(found.acts, given[:, 0])
    for wrong in (None, given[:, :1]):
        with pytest.raises(ValueError, match="expected 2"):
            search(p, bowl(0.9), fresh(p, 1, 1, given), white(p, 1, 1), wrong)


def test_a_search_begins_around_the_proposals_where_it_is_told_to():
    """With a spread so small, what is found lies where it began: at the proposals' mean, or at the last plan's."""
    settings: dict[str, Any] = {"horizon": 2, "samples": 16, "elites": 16, "iterations": 1, "proposals": 2}
    given = torch.tensor([0.4, 0.8])[None, :, None, None].expand(1, 2, 2, 1)
    flat = lambda a: torch.zeros(a.shape[:2])
    for around, centre in ((True, 0.6), (False, 0.0)):
        p = Planner(**settings, std=1e-4, min_std=0.0, around=around)
        seen = []
        search(p, lambda a, seen=seen: (seen.append(a), flat(a))[1], fresh(p, 1, 1, given), white(p, 1, 1), given)
        torch.testing.assert_close(seen[0][:, :14].mean(), torch.tensor(centre), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="around is True"):
        Planner(around=True)


def test_of_a_new_plans_kept_elites_one_counts():
    """They are all the mean; where that is the best plan, it is one elite and not as many as are kept."""
    p = Planner(horizon=3, samples=32, iterations=1, elites=8, keep=0.5)
    noise, value = white(p, 2, 1), bowl(torch.zeros(2, 1, 3, 1))
    found, plan = search(p, value, fresh(p, 2, 1, torch.zeros(())), noise)
    drawn = (p.std * noise[0]).clamp(-1, 1)
    best = drawn.gather(1, value(drawn).topk(7, 1).indices[..., None, None].expand(-1, -1, 3, 1))
    torch.testing.assert_close(plan.mean, best.sum(1) / 8)
    assert (found.seen, found.bad.tolist()) == (36, [0, 0])


def test_over_has_every_setting_and_changes_what_is_given():
    """Whatever a planner or a worth can be set to can be set over a policy, too."""
    names = lambda *kinds: [f.name for kind in kinds for f in fields(kind)]
    assert sorted(names(Over)) == sorted(names(Planner, Worth))
    usual = (LOOP, Worth(particles=5, pessimism=1.0))
    assert Over().applied(*usual) == usual
    planner, worth = Over(horizon=2, samples=30, pessimism=0.0).applied(*usual)
    assert planner == replace(LOOP, horizon=2, samples=30)
    assert worth == Worth(particles=5, pessimism=0.0)
    pinned = lambda **kw: Over(limit=1.0, **kw).applied(*usual)[1].pinned
    assert [pinned(), pinned(pinned=True), pinned(uncertainty="aleatoric")] == [False, True, True]
    with pytest.raises(ValueError, match="horizon is 0"):
        Over(horizon=0).applied(*usual)


def test_shift_moves_a_step_and_reset_clears_everything():
    p = Planner(horizon=3, keep=0.5, elites=4, samples=8)
    mean = torch.tensor([1.0, 2.0, 3.0])[None, :, None].expand(2, -1, -1)
    plan = Plan(mean, torch.full_like(mean, 0.01), mean[:, None].expand(-1, 2, -1, -1))
    later = shift(p, plan)
    assert later.mean[0, :, 0].tolist() == [2, 3, 3]
    assert later.elites[1, 1, :, 0].tolist() == [2, 3, 3]
    assert (later.std == p.std).all()
    new = planner.reset(p, plan, torch.tensor([True, False]))
    for got, begun, old in zip(new, fresh(p, 2, 1, mean), plan, strict=True):
        assert torch.equal(got[0], begun[0])
        assert torch.equal(got[1], old[1])


# ---------------------------------------------------------------- what is not a number


@each
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [40, 5, 1])
def test_what_is_not_finite_never_enters(p, bad, n):
    """With bad candidates the plan is that of the n finite ones, even where they are fewer than the elites."""
    p = small(p, iterations=1, samples=64, join=False)
    noise = white(p, 2, 1)[0]
    noise[0, n:] = noise[0, n:].abs() + 9
    ok = torch.ones(2, 64 + p.kept, dtype=torch.bool)
    ok[0, n:] = False
    f = lambda a: torch.where(ok, bowl(0.0)(a), bad)
    found, plan = search(p, f, fresh(p, 2, 1, noise), [noise])
    alone = replace(p, samples=n, elites=min(p.elites, n), keep=0.0)
    want, own = search(alone, bowl(0.0), fresh(alone, 1, 1, noise), [noise[:1, :n]])
    torch.testing.assert_close(found.acts[:1], want.acts)
    torch.testing.assert_close(plan.std[:1], own.std)
    assert found.some.all()
    assert found.bad.tolist() == [64 + p.kept - n, 0]
    assert all(x.isfinite().all() for x in plan)


@each
def test_where_nothing_is_finite_the_plan_stays(p):
    p = small(p)
    start = fresh(p, 3, 2, torch.zeros(()))
    start = start._replace(mean=0.1 * torch.randn(3, p.horizon, 2))
    f = lambda a: torch.where(torch.arange(3)[:, None] == 1, torch.nan, bowl(0.0)(a))
    found, plan = search(p, f, start, white(p, 3, 2))
    assert found.some.tolist() == [True, False, True]
    assert found.bad[1] == found.seen
    assert torch.equal(found.acts[1], start.mean[1])
    assert torch.equal(plan.std[1], start.std[1])
    assert all(x.isfinite().all() for x in plan)
    assert found.value[1] == -torch.inf


def test_nan_does_not_outrank_a_negative_return():
    p = Planner(samples=64, elites=8)
    f = lambda a: torch.where(a[..., 0, 0] > 0, torch.nan, -1 - a[..., 0, 0] ** 2)
    found, _ = search(p, f, fresh(p, 1, 1, torch.zeros(())), white(p, 1, 1))
    assert found.acts[0, 0, 0] <= 0


def test_a_proposal_that_is_not_finite_is_as_if_it_were_not_there():
    p = Planner(horizon=2, samples=20, elites=4, iterations=2, momentum=0.1, proposals=3, around=True)
    start = fresh(p, 2, 1, torch.zeros(()))
    proposals = torch.rand(2, 3, 2, 1, generator=torch.Generator().manual_seed(1))
    spoilt = proposals.clone()
    spoilt[1, 0, 1] = torch.nan
    noise = white(p, 2, 1)
    found, plan = search(p, bowl(0.3), start, noise, spoilt)
    assert all(x.isfinite().all() for x in (found.acts, *plan))
    assert found.bad.tolist() == [0, 2], "once an iteration"
    assert torch.equal(found.acts[0], search(p, bowl(0.3), start, noise, proposals)[0].acts[0])
    seen = []
    search(replace(p, iterations=1), lambda a: (seen.append(a), bowl(0.3)(a))[1], start, [0 * noise[0]], spoilt)
    torch.testing.assert_close(seen[0][1, 0], proposals[1, 1:].mean(0))
    none, _ = search(p, bowl(0.3), start, noise, torch.full_like(proposals, torch.nan))
    assert none.acts.isfinite().all()


@pytest.mark.parametrize("samples", [64, 256, 300])
def test_every_candidate_of_mppi_weighs(samples):
    p = replace(PRESETS["mppi"], samples=samples, horizon=2)
    seen = []
    found, _ = search(p, lambda a: (seen.append(a), bowl(0.3)(a))[1], fresh(p, 1, 1, torch.zeros(())), white(p, 1, 1))
    (acts,) = seen
    assert acts.shape[1] == samples
    w = bowl(0.3)(acts).softmax(1)[..., None, None]
    torch.testing.assert_close(found.acts, (w * acts).sum(1))


def test_actions_that_are_not_finite_never_enter():
    p = small(ICEM)
    start = fresh(p, 2, 1, torch.zeros(()))
    start = start._replace(elites=torch.full_like(start.elites, torch.nan))
    found, plan = search(p, lambda a: torch.zeros(a.shape[:2]), start, white(p, 2, 1))
    assert found.acts.isfinite().all()
    assert all(x.isfinite().all() for x in plan)


def test_a_gradient_that_is_not_finite_moves_nothing():
    p = Planner(horizon=2, samples=8, elites=2, iterations=1, gradient_steps=1)
    f = lambda a: a.abs().sqrt().sum((-1, -2)) * 0 + torch.zeros(a.shape[:2])  # its gradient at 0 is NaN
    start = fresh(p, 1, 1, torch.zeros(()))
    found, _ = search(p, f, start, [torch.zeros(1, 8, 2, 1)])
    assert (found.acts == 0).all()


def test_a_step_along_the_gradient_that_loses_is_not_taken():
    p = Planner(horizon=1, samples=8, elites=2, iterations=1, gradient_steps=3, gradient_rate=1.0, execute="best")
    noise, f = white(p, 1, 1), bowl(0.01)
    found, _ = search(p, f, fresh(p, 1, 1, torch.zeros(())), noise)
    assert found.value >= f((p.std * noise[0]).clamp(-1, 1)).max()
    torch.testing.assert_close(found.value, f(found.acts[:, None])[:, 0])


def test_a_step_along_the_gradient_keeps_to_the_bounds():
    p = Planner(horizon=2, samples=8, elites=2, iterations=1, gradient_steps=1, gradient_rate=5.0, execute="best")
    seen = []
    found, _ = search(
        p, lambda a: (seen.append(a.detach()), a.sum((-1, -2)))[1], fresh(p, 1, 1, torch.zeros(())), white(p, 1, 1)
    )
    assert all(a.abs().max() <= 1 for a in seen)
    assert (found.acts == 1).all()


def test_what_stands_for_an_elite_that_is_none_does_not_become_one_by_a_step():
    """Of 64 candidates two are finite; so is the mean, which stands for the other elites."""
    noise = white(p := Planner(horizon=2, samples=64, elites=16, iterations=1, gradient_rate=1e-6), 1, 1)
    best = noise[0].clamp(-1, 1)[0, :2]
    near = lambda a: ((a[0, :, None] - best).abs().amax((-1, -2)) < 1e-3).any(-1)
    value = lambda a: torch.where(near(a) | (a[0].abs().amax((-1, -2)) < 1e-3), a[0].sum((-1, -2)), torch.nan)[None]
    start = fresh(p, 1, 1, torch.zeros(()))
    plans = [search(replace(p, gradient_steps=n), value, start, noise)[1] for n in (0, 1)]
    torch.testing.assert_close(plans[1].mean, plans[0].mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(plans[1].std, plans[0].std, atol=1e-4, rtol=0)


def test_values_and_proposals_of_another_type_are_taken_as_the_plans():
    p = Planner(horizon=2, samples=16, elites=4, iterations=2, proposals=1, gradient_steps=1, keep=0.5)
    go = lambda f, proposals: search(p, f, fresh(p, 1, 1, torch.zeros(())), white(p, 1, 1), proposals)[0]
    given = torch.full((1, 1, 2, 1), 0.25)
    want, got = go(bowl(0.3), given), go(lambda a: bowl(0.3)(a).double(), given.double())
    assert got.acts.dtype == got.value.dtype == torch.float32
    torch.testing.assert_close(got.acts, want.acts)


def test_candidates_are_drawn_with_the_planners_colour():
    p = Planner(horizon=64, samples=500, iterations=1, elites=8, color=2.0, std=0.05)
    seen = []
    search(p, lambda a: (seen.append(a), bowl(0.0)(a))[1], fresh(p, 1, 1, torch.zeros(())), white(p, 1, 1))
    power = torch.fft.rfft(seen[0][0, :, :, 0], dim=-1).abs().square().mean(0)
    assert 0.7 < (power[2] / power[20] / 100).item() < 1.4, "power falls as the square of the frequency"


def test_the_mean_joins_the_last_iteration():
    p = Planner(horizon=2, samples=16, iterations=2, elites=4, join=True, std=0.5)
    seen = []
    search(p, lambda a: (seen.append(a), bowl(0.3)(a))[1], fresh(p, 1, 1, torch.zeros(())), white(p, 1, 1))
    top = bowl(0.3)(seen[0]).topk(4, 1).indices
    torch.testing.assert_close(seen[1][:, -1], seen[0].gather(1, top[..., None, None].expand(-1, -1, 2, 1)).mean(1))


def test_noise_of_another_number_of_iterations_is_refused():
    p = Planner(horizon=2, samples=16, iterations=2, elites=4)
    with pytest.raises(ValueError, match="noise of 0 iterations, expected 2"):
        search(p, bowl(0.3), fresh(p, 1, 1, torch.zeros(())), [])


def test_proposals_keep_to_the_bounds():
    p = Planner(horizon=2, samples=8, elites=2, iterations=1, proposals=1, execute="best")
    start = fresh(p, 1, 1, torch.zeros(()))
    found, _ = search(p, lambda a: a.sum((-1, -2)), start, white(p, 1, 1), torch.full((1, 1, 2, 1), 3.0))
    assert (found.acts == 1).all()


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("steps", [2, 3, 14, 15, 30])
@pytest.mark.parametrize("color", [0.25, 1.0, 3.5, 60.0])
def test_coloured_noise_has_unit_variance(steps, color):
    x = colored(torch.randn(20_000, steps, 1, generator=torch.Generator().manual_seed(0)), color)
    assert abs(x.var().item() - 1) < 0.05


@pytest.mark.parametrize("color", [0.0, 1.0, 2.5])
def test_the_spectrum_falls_with_the_colour(color):
    """A line through log power against log frequency, by scipy's periodogram, has the slope -color."""
    x = colored(torch.randn(4000, 64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64), color)
    f, power = scipy.signal.periodogram(x[..., 0].numpy(), detrend=False)  # pyright: ignore[reportArgumentType]
    f, power = f[1:-1], power.mean(0)[1:-1]
    slope = np.polyfit(np.log(f), np.log(power), 1)[0]
    assert abs(slope + color) < 0.03
    least = torch.fft.rfft(x[..., 0])[:, :2].abs().square().mean(0)
    assert abs(least[0] / least[1] - 1) < 0.1, "what does not change in time has the power of the slowest change"


# ---------------------------------------------------------------- worth

SPEC = Spec(3, 2)


def learners():
    g = torch.Generator().manual_seed(0)
    ensemble = EnsembleConfig(members=5, elites=4, hidden=(16,), weight_decay=(0.0, 0.0)).build(SPEC, g).double()

    class Near(nn.Module):
        def forward(self, obs, act, after):
            return -((after - obs) ** 2).sum(-1)

    return {"ensemble": ensemble, "filtered": Filtered(ensemble, Near(), candidates=4)}


def by_hand(worth, model, start, conds, acts, noise, reward, terminal, critic):
    """The same by loops: an environment, a candidate, a particle at a time."""
    envs, n, horizon, _ = acts.shape
    out = torch.zeros(envs, n, dtype=acts.dtype)
    one = torch.ones(1, 1, dtype=acts.dtype)
    for e in range(envs):
        for i in range(n):
            totals = []
            for q in range(worth.particles):
                obs, total = start[e : e + 1], 0.0
                for t in range(horizon):
                    z = noise[t][e].reshape(worth.particles, -1)[q : q + 1]
                    act = acts[e, i, t][None]
                    after, _pred = model.step(obs, StepInput(act, z, one), conds(e, q))
                    total = total + worth.discount**t * reward(obs, act, after)
                    end = terminal(obs, act, after).item()
                    obs = after
                    if end:
                        break
                else:
                    total = total + worth.discount**horizon * critic(obs)
                totals.append(total)
            totals = torch.cat(totals)
            out[e, i] = totals.mean() - worth.pessimism * totals.std(correction=0)
    return out


@pytest.mark.parametrize("name", learners())
@pytest.mark.parametrize("pinned", [True, False])
def test_worth_is_the_sum_of_rewards_until_the_end_and_then_the_critic(name, pinned):
    model, g = learners()[name], torch.Generator().manual_seed(1)
    envs, n, horizon, p = 2, 5, 4, 3
    worth = Worth(discount=0.9, particles=p, pessimism=0.7, pinned=pinned)
    normal = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    start, acts = normal(envs, 3), normal(envs, n, horizon, 2).clamp(-1, 1)
    noise = [model.draw(envs, p, g) for _ in range(horizon)]
    reward = lambda o, a, x: (x * o).sum(-1) + a[:, 0]
    terminal = lambda o, a, x: x[:, 0] > start.max() * 0.8
    critic = lambda o: o.sin().sum(-1)
    cond = model.pinned(torch.arange(p).repeat(envs)) if pinned else ()
    single = (lambda e, q: model.pinned(torch.tensor([q]))) if pinned else (lambda e, q: ())
    dt = torch.ones(envs, 1, dtype=torch.float64)
    got = value(worth, model, start, cond, acts, noise, dt, reward=reward, terminal=terminal, critic=critic)
    want = by_hand(worth, model, start, single, acts, noise, reward, terminal, critic)
    torch.testing.assert_close(got, want)
    free = value(worth, model, start, cond, acts, noise, dt, reward=reward, critic=critic)
    assert not torch.allclose(free, want), "no episode ended: the test shows nothing"


def test_the_learners_own_reward_serves_where_no_other_is_given():
    model, g = learners()["ensemble"], torch.Generator().manual_seed(1)
    noise, start = [model.draw(1, 1, g)], torch.zeros(1, 3, dtype=torch.float64)
    acts = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    cond, dt = model.pinned(torch.tensor([2])), torch.ones(1, 1, dtype=torch.float64)
    got = value(Worth(), model, start, cond, acts, noise, dt)
    _, pred = model.step(start, StepInput(acts[0, 0], noise[0], dt), cond)
    torch.testing.assert_close(got[0], pred.reward)


def test_a_divergence_before_the_end_is_no_return_and_after_it_is_none_of_ours():
    model = Line()
    start, dt, noise = torch.tensor([[1.0], [1.0]]), torch.ones(2, 1), [torch.zeros(2, 0)] * 3
    acts = torch.zeros(2, 1, 3, 1)
    acts[1, 0, 1] = torch.nan  # the prediction of the second step is not finite in the second environment
    unhealthy = lambda o, a, x: ~x.isfinite()[:, 0]
    got = value(Worth(), model, start, (), acts, noise, dt, terminal=unhealthy)
    assert got[0].isfinite()
    assert got[1].isnan()
    early = lambda o, a, x: x[:, 0] < 0.95  # the first step ends it
    got = value(Worth(), model, start, (), acts, noise, dt, terminal=early)
    torch.testing.assert_close(got[:, 0], torch.full((2,), -0.81))


def test_beyond_the_limit_ranks_below_all_that_are_within():
    model = Linear(*(torch.ones(1, 1) for _ in range(4)))
    start, dt = torch.zeros(1, 1), torch.ones(1, 1)
    acts = torch.tensor([0.1, -0.2, 0.6, 0.9])[None, :, None, None].expand(-1, -1, 2, -1)
    noise = [torch.zeros(1, 0)] * 2
    prize = lambda o, a, x: x[:, 0]
    got = value(Worth(uncertainty="size", limit=0.5), model, start, (), acts, noise, dt, reward=prize)[0]
    torch.testing.assert_close(got[:2], torch.tensor([0.3, -0.6]))
    assert got[2] < -0.6
    assert got[3] < got[2]
    assert got.isfinite().all()
    with pytest.raises(ValueError, match="limit is on 'doubt', the learner reports size"):
        value(Worth(uncertainty="doubt", limit=1.0), model, start, (), acts, noise, dt)


def test_an_uncertainty_that_is_not_a_number_is_within_no_limit():
    class Doubtful(Line):
        def step(self, state, inp, cond):
            x, pred = super().step(state, inp, cond)
            return x, pred._replace(uncertainty={"doubt": torch.where(inp.act[:, 0] > 0, torch.nan, 0.0)})

    acts, noise = torch.tensor([0.5, -0.5])[None, :, None, None], [torch.zeros(1, 0)]
    worth = Worth(uncertainty="doubt", limit=1.0)
    got = value(worth, Doubtful(), torch.zeros(1, 1), (), acts, noise, torch.ones(1, 1))[0]
    assert got.isfinite().tolist() == [False, True]


def test_what_is_beyond_the_limit_is_worth_the_same_in_any_company():
    """Values of several iterations are compared with each other."""
    model = Linear(*(torch.ones(1, 1) for _ in range(4)))
    prize = lambda o, a, x: -5000 * (x[:, 0] - 1).abs()
    worth, noise = Worth(uncertainty="size", limit=0.5), [torch.zeros(1, 0)]
    of = lambda *acts: value(
        worth, model, torch.zeros(1, 1), (), torch.tensor(acts)[None, :, None, None], noise, torch.ones(1, 1),
        reward=prize,
    )[0]  # fmt: skip
    together = of(0.9, 0.3, 0.0, 0.6)
    for x, want in zip((0.9, 0.3, 0.0, 0.6), together, strict=True):
        assert of(x)[0] == want
    assert together.argsort(descending=True).tolist() == [1, 2, 3, 0]
    p = Planner(horizon=1, samples=2, elites=1, gradient_steps=1, gradient_rate=0.05)
    f = lambda a: value(worth, model, torch.zeros(1, 1), (), a, noise, torch.ones(1, 1), reward=prize)
    new, gained = planner._ascend(f, torch.full((1, 1, 1, 1), 0.55), f(torch.full((1, 1, 1, 1), 0.55)), p.gradient_rate)
    assert new.item() == pytest.approx(0.5), "back towards the limit"
    assert gained.item() > -5000


@pytest.mark.parametrize("wrong", [{"limit": math.nan}, {"pessimism": math.nan}, {"limit": -1.0}, {"particles": 0}])
def test_a_worth_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"Worth: got.*expected"):
        Worth(**wrong)


def test_an_end_may_be_told_by_where_the_step_began():
    began = lambda o, a, x: o[:, 0] > 0.95
    acts, noise = torch.zeros(1, 1, 3, 1), [torch.zeros(1, 0)] * 3
    got = value(Worth(), Line(), torch.ones(1, 1), (), acts, noise, torch.ones(1, 1), terminal=began)
    torch.testing.assert_close(got, torch.full((1, 1), -0.81))


class Shaken(Linear):
    """`Linear`, moved by the noise."""

    def __init__(self):
        super().__init__(*(torch.ones(1, 1) for _ in range(4)))
        self.noise_dim = 1

    def step(self, state, inp, cond):
        return super().step(state + inp.noise, inp, cond)


def test_one_particle_beyond_the_limit_is_enough_but_none_after_the_end_counts():
    start, dt, acts = torch.zeros(1, 1), torch.ones(1, 1), torch.full((1, 1, 2, 1), 0.4)
    prize = lambda o, a, x: x[:, 0]
    f = lambda limit, noise, end: value(
        Worth(particles=2, uncertainty="size", limit=limit), Shaken(), start, (), acts, noise, dt, reward=prize,
        terminal=end,
    ).item()  # fmt: skip
    calm, one = [torch.zeros(1, 2)] * 2, [torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2)]
    never = lambda o, a, x: x[:, 0] > 9
    assert f(1.0, calm, never) == pytest.approx(1.2)
    assert f(1.0, one, never) < -100
    soon = lambda o, a, x: x[:, 0] > 0.3
    assert f(0.5, calm, soon) == pytest.approx(0.4), "the second step would be beyond"


def test_proposals_are_the_policys_own_rollouts():
    model, p = Line(), 3
    start, dt = torch.tensor([[1.0], [-2.0]]), torch.ones(2, 1)
    noise = [(torch.full((2 * p, 1), 0.1 * t), torch.zeros(2 * p, 0)) for t in range(2)]
    acts = propose(model, start, (), lambda obs, z: (0.5 * obs + z).clamp(-1, 1), noise, dt, p)
    first = (0.5 * start).clamp(-1, 1)
    second = (0.5 * (0.9 * start + 0.5 * first) + 0.1).clamp(-1, 1)
    want = torch.stack([first, second], 1)[:, None].expand(-1, p, -1, -1)
    torch.testing.assert_close(acts, want)


@each
def test_a_whole_plan_compiles_as_one_graph(p):
    torch._dynamo.reset()
    p = small(p, horizon=3, iterations=min(p.iterations, 2), samples=32, elites=4)
    model = learners()["ensemble"].float().requires_grad_(False)
    start, dt = torch.randn(2, 3), torch.ones(2, 1)
    noise = [model.draw(2, 2, torch.Generator().manual_seed(t)) for t in range(3)]

    def whole(obs, plan, z):
        cond = model.pinned(torch.arange(2).repeat(2))
        return search(p, lambda a: value(Worth(particles=2), model, obs, cond, a, noise, dt), plan, z)

    plan, z = fresh(p, 2, 2, start), white(p, 2, 2)
    got = torch.compile(whole, fullgraph=True, backend="aot_eager")(start, plan, z)
    torch.testing.assert_close(got, whole(start, plan, z))


def test_a_condition_is_never_copied(monkeypatch):
    model, seen = Line(), []
    step = model.step
    monkeypatch.setattr(model, "step", lambda s, i, c: (seen.append((len(s), c)), step(s, i, c))[1])
    cond = (torch.zeros(2, 1),)
    value(Worth(particles=2), model, torch.zeros(2, 1), cond, torch.zeros(2, 5, 3, 1), [torch.zeros(2, 0)] * 3,
          torch.ones(2, 1))  # fmt: skip
    assert [n for n, _ in seen] == [20] * 3
    assert all(c is cond for _, c in seen)


def test_worth_refuses_what_cannot_be():
    wrongs: list[dict[str, Any]] = [{"discount": 0.0}, {"particles": 0}, {"limit": -1.0}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="Worth: got"):
            Worth(**wrong)
