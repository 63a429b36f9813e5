"""Families against their formulas written anew, closed forms and first integrals; their data against their seeds."""

import json
import math
import warnings
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from mbrl_envs import contexts, families
from mbrl_envs.families import FAMILIES, SETS, Environment, Factors, Family, environments, generate, robots
from mbrl_envs.series import cut
from mbrl_envs.systems import integrate, sine

from mbrl.core import Spec
from mbrl.data import joined
from mbrl.fit import Rows

warnings.filterwarnings("ignore", message=".*settotalmass.*")
F64 = torch.float64

RIGHT = {
    "harmonic": lambda x, y, c: (y, -c[0] * x),
    "damped-harmonic": lambda x, y, c: (y, -(c[0] * x + c[1] * y)),
    "pendulum": lambda x, y, c: (y, -c[0] * np.sin(x)),
    "double-well": lambda x, y, c: (y, x - x**3 - c[0] * y),
    "bead": lambda x, y, c: (y, np.sin(2 * x) / 2 - c[0] * np.sin(x)),
    "shear": lambda x, y, c: (np.cos(x) / np.tan(y), np.sin(x) * (1 + (c[0] - 1) * np.sin(y) ** 2)),
    "van-der-pol": lambda x, y, c: (y, c[0] * (1 - x**2) * y - x),
    "van-der-pol-simplified": lambda x, y, c: (c[0] * (y + x - x**3 / 3), -x / c[0]),
    "glycolytic": lambda x, y, c: (y * (c[0] + x**2) - x, c[1] - c[0] * x - x**2 * y),
    "duffing": lambda x, y, c: (y, c[0] * (1 - x**2) * y - x),
    "lotka-volterra": lambda x, y, c: (x * (0.5 - c[0] * y), y * (c[1] * x - 0.5)),
}
GAINS = {"driven-pendulum": lambda c: c[0] ** 2, "driven-van-der-pol": lambda c: 1.0, "driven-duffing": lambda c: 1.0}
PAGE = {  # number, reference, horizon, low, high
    "harmonic": (24, (2.1,), 10, (0.0, -0.03), (0.4, 0.2)),
    "damped-harmonic": (25, (4.5, 0.43), 8, (0.0, -0.3), (0.12, 0.043)),
    "pendulum": (28, (0.9,), 15, (-1.9, 0.0), (0.3, 0.8)),
    "double-well": (32, (0.18,), 5, (-2.8, -1.8), (-1.8, 1.0)),
    "bead": (34, (0.93,), 20, (-1.2, -0.2), (2.1, 0.0)),
    "shear": (35, (4.2,), 5, (0.7, -1.7), (1.13, -0.3)),
    "van-der-pol": (37, (0.43,), 15, (0.1, 0.0), (2.2, 3.2)),
    "van-der-pol-simplified": (38, (3.37,), 15, (-1.1, -0.7), (0.7, 0.0)),
    "glycolytic": (39, (2.4, 0.07), 4, (0.2, -0.7), (0.4, 0.31)),
    "duffing": (40, (0.886,), 10, (0.2, -0.03), (0.63, 0.2)),
}
FOUR = {
    "harmonic-four": (24, (2.1,), 6, (0.5, 0.5), (0.75, 0.75)),
    "shear-four": (35, (2.0,), 6, (0.3, -0.5), (0.5, -0.3)),
    "double-well-four": (32, (0.1,), 8, (-0.7, -0.7), (-0.5, -0.5)),
    "duffing-four": (40, (0.886,), 8, (0.3, 0.0), (0.4, 0.1)),
}
LOTKA_VOLTERRA = (None, (1.0, 1.0), 10, (1.0, 1.0), (2.0, 2.0))


def plain(name):
    return name.removeprefix("driven-").removesuffix("-four")


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def orbits(data, env=0):
    """[E, T + 1, 2] of one of its systems."""
    mine = data.of_system(torch.arange(len(data)))[env]
    length = int(data.lengths[data.system == env][0])
    obs, after = (getattr(data, k)[mine].double().reshape(-1, length, 2) for k in ("obs", "next_obs"))
    assert torch.equal(obs[:, 1:], after[:, :-1])
    return torch.cat([obs, after[:, -1:]], 1)


def times(env):
    return env.family.interval * torch.arange(env.family.points, dtype=F64)


@pytest.fixture(scope="module")
def everything():
    """One trajectory of each environment, by set."""
    return {name: generate(environments(name), 1, 0) for name in SETS}


def family(equations, **kw):
    return Family(**{"name": "own", "parameters": (), "reference": (), "horizon": 10.0, "box": ((1.0, 1.0), (2.0, 2.0))}
                  | kw, equations=equations)  # fmt: skip


def alone(f):
    return [Environment(f, f.reference, 0)]


# ---------------------------------------------------------------- families


@pytest.mark.parametrize("f", FAMILIES.values(), ids=lambda f: f.name)
def test_the_field_is_the_formula(f):
    g = np.random.default_rng(0)
    x, p, u = g.uniform(-2, 2, (40, 2)), g.uniform(0.2, 4, (40, len(f.reference))), g.uniform(-1, 1, (40, f.act))
    speed, rate = RIGHT[plain(f.name)](*x.T, p.T)
    want = np.stack([speed, rate + GAINS[f.name](p.T) * u[:, 0] if f.act else rate], -1)
    given = [torch.from_numpy(a) for a in (x, u, p)]
    found = f.field(*given)
    np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-12)
    both = f.field(given[0], given[1], given[2][:3, None])
    assert both.shape == (3, 40, 2)
    torch.testing.assert_close(both[1, 7], f.field(given[0][7], given[1][7], given[2][1]))
    assert f.field(*(a.float() for a in given)).dtype == torch.float32
    np.testing.assert_allclose(f.field(given[0], None, given[2]), np.stack([speed, rate], -1), rtol=1e-10, atol=1e-12)


def test_sets_are_the_published_ones():
    assert list(SETS) == ["four", "ten", "lotka-volterra", "driven"]
    assert [f.name for f in SETS["ten"]] == list(PAGE)
    assert [f.name for f in SETS["four"]] == list(FOUR)
    assert [f.name for f in SETS["lotka-volterra"]] == ["lotka-volterra"]
    assert [f.name for f in SETS["driven"]] == list(GAINS)
    assert len(FAMILIES) == 18
    for name, want in {**PAGE, **FOUR, "lotka-volterra": LOTKA_VOLTERRA}.items():
        f = FAMILIES[name]
        assert (f.odebench, f.reference, f.horizon, f.low, f.high) == want
        assert f.act == 0
        assert f.points == (20 if name == "lotka-volterra" else 100)
        assert f.interval == f.horizon / f.points
        assert f.parameters == (("beta", "delta") if name == "lotka-volterra" else ("c0", "c1")[: len(f.reference)])
    for name in GAINS:
        f, base = FAMILIES[name], FAMILIES[plain(name)]
        assert replace(f, name=base.name, odebench=base.odebench, act=0, equations=base.equations) == base
        assert (f.act, f.odebench) == (1, None)


def values(name, split: Literal["train", "adapt"] = "train", n=None):
    return np.array([e.parameters for e in environments(name, split, n)])


@pytest.mark.parametrize("name", [n for n, x in {**PAGE, **FOUR}.items() if len(x[1]) == 1] + list(GAINS))
def test_one_parameter_lies_on_a_line(name):
    c = {**PAGE, **FOUR, **{n: PAGE[plain(n)] for n in GAINS}}[name][1][0]
    low, high = (0.8, 1.2) if name in FOUR else (0.9, 1.1)
    np.testing.assert_allclose(values(name)[:, 0], np.linspace(low, high, 5) * c, rtol=1e-14)
    np.testing.assert_allclose(values(name, n=16)[:, 0], np.linspace(low, high, 16) * c, rtol=1e-14)
    for n in (4, 5):
        found = values(name, "adapt", None if n == 4 else n)
        np.testing.assert_allclose(found[:, 0], np.linspace(0.8, 1.2, n) * c, rtol=1e-14)


@pytest.mark.parametrize("name", ["damped-harmonic", "glycolytic"])
def test_two_parameters_lie_on_a_square_that_is_cut(name):
    c = np.array(PAGE[name][1])
    grid = lambda s: np.array([(a, b) for a in np.linspace(0.9, 1.1, s) for b in np.linspace(0.9, 1.1, s)]) * c
    np.testing.assert_allclose(values(name), grid(3)[:5], rtol=1e-14)
    for n, side in ((1, 1), (4, 2), (9, 3), (10, 4), (16, 4)):
        np.testing.assert_allclose(values(name, n=n), grid(side)[:n], rtol=1e-14)
    np.testing.assert_allclose(values(name, "adapt"), np.linspace(0.8, 1.2, 4)[:, None] * c, rtol=1e-14)


def test_lotka_volterras_parameters():
    assert values("lotka-volterra").tolist() == [[b, d] for b in (0.5, 0.75, 1.0) for d in (0.5, 0.75, 1.0)]
    assert values("lotka-volterra", "adapt").tolist() == [[b, d] for b in (0.625, 1.125) for d in (0.625, 1.125)]


@pytest.mark.parametrize(("name", "train", "adapt"), [("ten", 50, 40), ("four", 20, 16), ("driven", 15, 12)])
def test_environments_of_a_set_are_those_of_its_families(name, train, adapt):
    assert (len(environments(name)), len(environments(name, "adapt"))) == (train, adapt)
    assert environments(name) == [e for f in SETS[name] for e in environments(f.name)]
    assert environments(name, "adapt") == [e for f in SETS[name] for e in environments(f.name, "adapt")]
    assert [e.label for e in environments(name, n=2)][:3] == [
        *(f"{SETS[name][0].name}:{i}" for i in (0, 1)),
        f"{SETS[name][1].name}:0",
    ]
    shared = {(e.family.name, e.parameters) for e in environments(name, "adapt")} & {
        (e.family.name, e.parameters) for e in environments(name)
    }
    assert len(shared) == (8 if name == "four" else 0)


# ---------------------------------------------------------------- an environment as a system


def test_time_is_counted_in_intervals():
    (env,) = environments("damped-harmonic", n=1)
    s, g = env.system, torch.Generator().manual_seed(0)
    x = s.starts(50, g)
    want = 0.08 * env.family.field(x, None, tensor(*env.parameters))
    torch.testing.assert_close(s.field(x), want)
    np.testing.assert_allclose(s.rates(x[3].numpy()), want[3], rtol=1e-13)
    assert (s.name, s.dim, s.inputs, s.dt) == ("damped-harmonic:0", 2, 0, 1.0)
    assert s.parameters() == {"c0": env.parameters[0], "c1": env.parameters[1]}
    assert s.low == (0.0, -0.3)
    assert s.high == (0.12, 0.043)
    a, b = env.parameters
    torch.testing.assert_close(s.jacobian(x), (0.08 * tensor([0, 1], [-a, -b])).expand(50, 2, 2))


def test_the_jacobian_of_a_driven_environment_is_that_of_differences():
    s = environments("driven-pendulum")[1].system
    x, u, h = torch.rand(3, 4, 2, dtype=F64), torch.rand(3, 4, 1, dtype=F64), 1e-6
    steps = [s.field(x + h * e, u) - s.field(x - h * e, u) for e in torch.eye(2, dtype=F64)]
    torch.testing.assert_close(s.jacobian(x, u), torch.stack(steps, -1) / (2 * h), rtol=1e-7, atol=1e-9)
    assert s.inputs == 1


# ---------------------------------------------------------------- closed forms


def test_a_harmonic_orbit_is_a_rotation():
    envs = environments("harmonic")
    data = generate(envs, 2, 0)
    for i, env in enumerate(envs):
        x, w, t = orbits(data, i), math.sqrt(env.parameters[0]), times(env)
        first, speed = x[:, :1, 0], x[:, :1, 1]
        want = first * (w * t).cos() + speed / w * (w * t).sin()
        torch.testing.assert_close(x[..., 0], want, atol=1e-6, rtol=0)
        torch.testing.assert_close(x[..., 1], speed * (w * t).cos() - w * first * (w * t).sin(), atol=1e-6, rtol=0)


def test_a_damped_orbit_is_a_rotation_that_decays():
    (env,) = environments("damped-harmonic", n=1)
    x, t = orbits(generate([env], 3, 1)), times(env)
    c0, c1 = env.parameters
    w = math.sqrt(c0 - c1**2 / 4)
    first, speed = x[:, :1, 0], x[:, :1, 1]
    want = (-c1 * t / 2).exp() * (first * (w * t).cos() + (speed + c1 * first / 2) / w * (w * t).sin())
    torch.testing.assert_close(x[..., 0], want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["harmonic", "driven-pendulum"])
def test_points_that_are_moved_in_time(name):
    (env,) = environments(name, n=1)
    data, plain = generate([env], 3, 0, irregular=0.8), generate([env], 3, 0)
    assert data.dts is not None
    dts = data.dts.double().reshape(3, -1)
    assert (dts.min() > 0.2) & (dts.max() < 1.8)
    assert dts.std() > 0.2
    torch.testing.assert_close(dts.sum(1), torch.full((3,), env.family.points - 1.0, dtype=torch.float64))
    assert not torch.equal(dts[0], dts[1])
    assert data.dt == pytest.approx(1, abs=1e-6)
    assert torch.equal(data.act, plain.act)
    x, y = orbits(data), orbits(plain)
    torch.testing.assert_close(x[:, 0], y[:, 0], atol=0, rtol=0)
    if name == "harmonic":  # a rotation, at the times that the data say
        w, t = math.sqrt(env.parameters[0]), env.family.interval * dts.cumsum(1)
        want = x[:, :1, 0] * (w * t).cos() + x[:, :1, 1] / w * (w * t).sin()
        torch.testing.assert_close(x[:, 1:, 0], want, atol=2e-6, rtol=0)
        torch.testing.assert_close(x[:, -1], y[:, -1], atol=1e-6, rtol=0)
    else:  # each interval, by itself, with the action that it has
        flat = lambda z: z.double().flatten(0, 1)
        after = integrate(env.system, flat(x[:, :-1]), 1, flat(dts)[:, None], data.act[:, None])
        torch.testing.assert_close(after[:, 1], flat(x[:, 1:]), atol=1e-5, rtol=0)
    windows = Rows(data, 5, torch.zeros(())).segment(torch.tensor([0, 100]))
    assert torch.equal(windows.dt[..., 0], data.dts[torch.tensor([0, 100])[:, None] + torch.arange(5)])
    assert torch.equal(data.windows(5, torch.tensor([0, 100])).dt, windows.dt)
    assert data.to(torch.float64).dts.dtype == torch.float64  # pyright: ignore[reportOptionalMemberAccess]


def test_moved_points_are_kept_apart_from_regular_ones(tmp_path):
    (env,) = environments("harmonic", n=1)
    plain, moved = generate([env], 2, 0, cache=tmp_path), generate([env], 2, 0, irregular=0.5, cache=tmp_path)
    assert not torch.equal(plain.obs, moved.obs)
    assert torch.equal(generate([env], 2, 0, irregular=0.5, cache=tmp_path).obs, moved.obs)
    half = cut(moved, 0, 99)
    assert half.dts is not None
    assert torch.equal(half.dts, moved.dts[:99])
    with pytest.raises(ValueError, match="joined: part 1"):
        joined([replace(x, system=None, systems=1) for x in (plain, moved)])


INTEGRALS = {
    "pendulum": lambda x, y, c: y**2 / 2 - c[0] * x.cos(),
    "bead": lambda x, y, c: y**2 / 2 - x.sin() ** 2 / 2 - c[0] * x.cos(),
    "lotka-volterra": lambda x, y, c: c[1] * x - 0.5 * x.log() + c[0] * y - 0.5 * y.log(),
}


@pytest.mark.parametrize("name", INTEGRALS)
def test_what_is_conserved(name):
    envs = environments(name)
    data = generate(envs, 1, 0)
    for i, env in enumerate(envs):
        x = orbits(data, i)
        kept = INTEGRALS[name](x[..., 0], x[..., 1], env.parameters)
        assert (kept - kept[:, :1]).abs().max() < 2e-6
        assert x.std(1).min() > 0.05


# ---------------------------------------------------------------- data


def test_what_data_hold(everything):
    for name, data in everything.items():
        envs = environments(name)
        points = 20 if name == "lotka-volterra" else 100
        n = len(envs) * (points - 1)
        width = 1 if name == "driven" else 0
        assert (len(data), data.episodes, data.spec) == (n, len(envs), Spec(2, width, systems=len(envs)))
        assert data.lengths.tolist() == [points - 1] * len(envs)
        assert data.system.tolist() == list(range(len(envs)))
        assert data.dt == 1.0
        assert data.paired.all()
        assert not data.terminal.any()
        assert not data.reward.any()
        assert data.obs.isfinite().all()
        assert data.obs.dtype == data.act.dtype == torch.float32
        assert (data.act_low.tolist(), data.act_high.tolist()) == ([-1] * width, [1] * width)
        assert data.name == "+".join(f.name for f in SETS[name])
        meta = json.loads(json.dumps(data.meta))
        assert meta["labels"] == [e.label for e in envs]
        assert [tuple(p.values()) for p in meta["parameters"]] == [e.parameters for e in envs]
        assert {k: meta[k] for k in ("seed", "noise", "trajectories")} == {"seed": 0, "noise": 0, "trajectories": 1}


@pytest.mark.parametrize("name", ["ten", "four", "lotka-volterra"])
def test_orbits_start_all_over_the_box(name):
    for f in SETS[name]:
        env = Environment(replace(f, points=2, horizon=1e-3), f.reference, 0)
        x = orbits(generate([env], 150, 0))[:, 0]
        low, high = tensor(*f.low), tensor(*f.high)
        part = (x - low) / (high - low)
        assert part.min() > -1e-6
        assert part.max() < 1 + 1e-6
        assert part.amin(0).max() < 0.07
        assert part.amax(0).min() > 0.93
        assert abs(np.corrcoef(part.T.numpy())[0, 1]) < 0.25


def test_fewer_environments_or_trajectories_are_the_same_numbers():
    envs = environments("four", n=2)
    data = generate(envs, 3, 5)
    again = generate(envs, 3, 5)
    assert torch.equal(again.obs, data.obs)
    assert again.sha256 == data.sha256
    some = generate([envs[4], envs[1]], 2, 5)
    assert torch.equal(orbits(some, 0), orbits(data, 4)[:2])
    assert torch.equal(orbits(some, 1), orbits(data, 1)[:2])
    other = generate(envs, 3, 6)
    assert other.sha256 != data.sha256
    starts = torch.cat([data.obs[data.starts[:-1]], other.obs[other.starts[:-1]]])
    boxes = torch.tensor([[e.family.low, e.family.high] for e in envs]).repeat_interleave(3, 0).repeat(2, 1, 1)
    parts = (starts - boxes[:, 0]) / (boxes[:, 1] - boxes[:, 0])
    assert len(parts.mul(1e4).round().unique(dim=0)) == len(parts) == 48  # no two draws alike, of all that there are


def test_both_data_to_adapt_are_of_the_same_environments():
    envs = environments("harmonic", "adapt")
    few, judge = generate(envs, 1, 1), generate(envs, 3, 2)
    assert few.meta["labels"] == judge.meta["labels"]
    assert few.meta["parameters"] == judge.meta["parameters"]
    for i, c in enumerate(np.linspace(0.8, 1.2, 4) * 2.1):
        for data in (few, judge):
            x, y = orbits(data, i).unbind(-1)
            energy = c * x**2 + y**2
            assert (energy - energy[:, :1]).abs().max() < 1e-6 * energy.max() + 1e-7
    train = {e.parameters for e in environments("harmonic")}
    assert not train & {e.parameters for e in envs}


def test_noise_is_a_part_of_an_environments_own_spread():
    envs = [environments("pendulum")[0], environments("harmonic")[0]]
    clean, noisy, again = (generate(envs, 20, 3, noise=x) for x in (0.0, 0.1, 0.1))
    assert torch.equal(noisy.obs, again.obs)
    assert noisy.meta["noise"] == 0.1
    for i in range(2):
        x, error = orbits(clean, i), orbits(noisy, i) - orbits(clean, i)
        std = x.flatten(0, 1).std(0, correction=0)
        torch.testing.assert_close(error.flatten(0, 1).std(0), 0.1 * std, rtol=0.05, atol=0)
        assert (error.flatten(0, 1).mean(0) / std).abs().max() < 0.01
        assert abs(np.corrcoef(error[..., 0].flatten(), error[..., 1].flatten())[0, 1]) < 0.07
    unit = [(orbits(noisy, i) - orbits(clean, i)).flatten()[:300] for i in range(2)]
    assert abs(np.corrcoef(unit[0], unit[1])[0, 1]) < 0.2
    of = orbits(noisy)[:2, :, 0] - orbits(clean)[:2, :, 0]
    assert abs(np.corrcoef(of)[0, 1]) < 0.4


def test_systems_stand_in_the_order_of_the_environments():
    a, b = environments("harmonic")[0], environments("duffing")[3]
    data = generate([b, a], 2, 0)
    assert torch.equal(data.obs, torch.cat([generate([b], 2, 0).obs, generate([a], 2, 0).obs]))
    assert data.system is not None
    assert data.system.tolist() == [0, 0, 1, 1]
    assert data.meta["labels"] == ["duffing:3", "harmonic:0"]


# ---------------------------------------------------------------- actions


@pytest.mark.parametrize("name", GAINS)
def test_a_family_without_its_actions_is_the_one_that_has_none(name):
    driven, free = environments(name)[1], environments(plain(name))[1]
    x = free.system.starts(2, torch.Generator().manual_seed(0))
    zero = torch.zeros(2, 10, 1)
    want = integrate(free.system, x, 10)
    torch.testing.assert_close(integrate(driven.system, x, 10, inputs=zero), want, atol=1e-7, rtol=0)
    assert (integrate(driven.system, x, 10, inputs=zero + 0.5) - want).abs().max() > 0.01


def test_the_actions_of_a_driven_family_are_those_that_drove_it(everything):
    data, envs = everything["driven"], environments("driven")
    act = data.act.reshape(len(envs), 99, 1)
    for i in (0, 6, 12):
        x = orbits(data, i)
        again = integrate(envs[i].system, x[:, 0], 12, inputs=act[i : i + 1, :12])
        torch.testing.assert_close(again, x[:, :13], atol=1e-4, rtol=0)
    assert act.abs().max() <= 1
    assert act.min() < -0.9
    assert act.max() > 0.9
    assert len({tuple(a.flatten().tolist()) for a in act}) == len(envs)
    held = [np.diff(np.flatnonzero(np.diff(a.flatten()))) for a in act.numpy()]
    assert min(h.min() for h in held) == 1
    assert max(h.max() for h in held) == 10


# ---------------------------------------------------------------- the cache


@pytest.fixture
def counted(monkeypatch):
    calls = []

    def solve(system, *args, **kw):
        calls.append(system.name)
        return integrate(system, *args, **kw)

    monkeypatch.setattr(families, "integrate", solve)
    return calls


@pytest.mark.parametrize("name", ["double-well", "driven-duffing"])
def test_the_cache_holds_what_would_be_solved(tmp_path, counted, name):
    envs, folder = [replace(e, family=replace(e.family, points=12)) for e in environments(name, n=2)], tmp_path / "new"
    plain = generate(envs, 2, 0)
    counted.clear()
    first, again = (generate(envs, 2, 0, cache=folder) for _ in range(2))
    assert counted == [f"{name}:0", f"{name}:1"]
    noisy = generate(envs[1:], 2, 0, noise=0.1, cache=folder)
    assert len(counted) == 2
    assert torch.equal(noisy.obs, generate(envs[1:], 2, 0, noise=0.1).obs)
    for data in (first, again):
        assert data.sha256 == plain.sha256
        assert torch.equal(data.obs, plain.obs)
        assert torch.equal(data.act, plain.act)
    files = sorted(folder.iterdir())
    assert [f.name[: len(name) + 3] for f in files] == [f"{name}-0-", f"{name}-1-"]
    assert {f.suffix for f in files} == {".npz"}
    with np.load(files[0], allow_pickle=False) as found:
        assert found["states"].shape == (2, 12, 2)


def test_whatever_differs_is_another_file(tmp_path, monkeypatch):
    (env,) = environments("driven-duffing", n=1)
    short = replace(env.family, points=4)
    others = [
        (replace(env, family=short), 1, 0),
        (replace(env, family=short), 2, 0),
        (replace(env, family=short), 1, 1),
        (replace(env, family=replace(short, horizon=9.0)), 1, 0),
        (replace(env, family=replace(short, points=5, horizon=12.5)), 1, 0),
        (replace(env, family=replace(short, box=((0.0, 0.0), (0.1, 0.1)))), 1, 0),
        (replace(env, family=replace(short, equations=lambda x, u, p: [x[1], u[0] if u else 0.0 * x[0]])), 1, 0),
        (replace(env, family=replace(short, name="else")), 1, 0),
        (replace(env, family=short, parameters=(0.9,)), 1, 0),
        (replace(env, family=short, index=1), 1, 0),
    ]
    for i, (e, n, seed) in enumerate(others):
        data = generate([e], n, seed, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == i + 1
        assert torch.equal(data.obs, generate([e], n, seed).obs)
    monkeypatch.setattr(families, "TOLERANCE", 1e-6)
    generate([others[0][0]], 1, 0, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(others) + 1


def test_a_file_that_is_not_what_it_should_be_is_written_anew(tmp_path, counted):
    envs = environments("double-well", n=1)
    want = generate(envs, 2, 0, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    with np.load(path) as found:
        key, states = found["key"], found["states"]

    def write(**arrays):
        with path.open("wb") as file:
            np.savez(file, **arrays)

    def flip(at):
        path.write_bytes(good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :])

    spoils = [
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"nothing of ours"),
        lambda: path.write_bytes(good[: len(good) // 2]),
        lambda: flip(len(good) // 2),
        lambda: np.save(path.open("wb"), states),
        lambda: write(states=states),
        lambda: write(key=key),
        lambda: write(key=np.array("0" * 64), states=states + 1),
        lambda: write(key=key, states=states[:1]),
        lambda: write(key=key, states=states.astype(np.float32) + 1),
        lambda: write(key=key, states=np.array([[["a"] * 2] * 100] * 2, dtype=object)),
    ]
    for i, spoil in enumerate(spoils):
        spoil()
        counted.clear()
        assert torch.equal(generate(envs, 2, 0, cache=tmp_path).obs, want.obs), i
        assert counted == ["double-well:0"], i
        assert list(tmp_path.iterdir()) == [path]
        assert generate(envs, 2, 0, cache=tmp_path).sha256 == want.sha256
        assert len(counted) == 1, i


# ---------------------------------------------------------------- robots


def test_robots_are_the_tasks_of_a_sequence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log where it runs
    data, labels = robots("cartpole-pole", 7, 3)
    tasks = contexts.tasks("cartpole-pole")
    assert labels == [f"cartpole-pole:{t.name}" for t in tasks]
    assert data.meta["labels"] == labels
    assert data.meta["contexts"] == [t.context for t in tasks]
    assert (data.name, data.systems, data.env) == ("cartpole-pole", 10, tasks[0].id)
    parts = contexts.collect(tasks, 7, seed=3)
    for rows, part in zip(data.of_system(torch.arange(70)), parts, strict=True):
        assert torch.equal(data.obs[rows], part.obs)
        assert torch.equal(data.act[rows], part.act)
    assert robots("cartpole-pole", 7, 4)[0].sha256 != data.sha256 == robots("cartpole-pole", 7, 3)[0].sha256


# ---------------------------------------------------------------- errors


def test_unknown_names():
    with pytest.raises(ValueError, match="got 'pendulun'; did you mean pendulum"):
        environments("pendulun")
    with pytest.raises(ValueError, match=r"expected one of four, ten, lotka-volterra, driven, harmonic-four, .*driven"):
        environments("x")
    with pytest.raises(ValueError, match="got the split 'test', expected train or adapt"):
        environments("ten", "test")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="got the sequence 'nothing', expected one of"):
        robots("nothing", 5, 0)


@pytest.mark.parametrize("n", [0, -1, 10**9])
def test_too_few_or_many_environments(n):
    with pytest.raises(ValueError, match=f"got n={n}, expected 1 to"):
        environments("ten", n=n)


@pytest.mark.parametrize(
    ("kw", "match"),
    [
        (dict(envs=[]), "got 0 environments"),
        (dict(trajectories=0), "trajectories=0"),
        (dict(seed=-1), "seed=-1"),
        (dict(noise=-0.1), "noise=-0.1; expected"),
        (dict(irregular=1.0), "irregular=1.0, expected"),
        (dict(irregular=-0.1), "irregular=-0.1"),
        (dict(noise=math.nan), "noise=nan"),
        (dict(noise=math.inf), "noise=inf"),
        (
            dict(envs=environments("driven-duffing", n=2) + environments("duffing", n=2)),
            "several widths: driven-duffing:1 of 1, duffing:1 of 0",
        ),
    ],
)
def test_wrong_arguments(kw, match):
    with pytest.raises(ValueError, match=match):
        generate(**(dict(envs=environments("harmonic", n=1), trajectories=1, seed=0) | kw))


def test_orbits_that_leave_the_numbers_name_their_environment():
    grows = family(lambda x, u, p: [x[0] * x[0], x[1]])
    fast = family(lambda x, u, p: [100 * x[0], 0 * sine(x[0])])  # the sine of a plain infinity is an error
    for f in (grows, fast):
        with pytest.raises(ValueError, match=r"own:0: row 0, .* leaves the finite numbers"):
            generate(alone(f), 1, 0)
    large = family(lambda x, u, p: [10 * x[0], x[1]])
    with pytest.raises(ValueError, match="own:0: states leave what float32 holds"):
        generate(alone(large), 1, 0)
    pole = family(FAMILIES["shear"].equations, reference=(1.0,), parameters=("c0",), box=((1.0, 0.0), (2.0, 0.0)))
    with pytest.raises(ValueError, match=r"own:0: the field is not finite at the start \[1\.\d+, 0\.0\]"):
        generate(alone(pole), 1, 0)
    with pytest.raises(ValueError, match="the field is not finite"):
        generate([environments("shear")[0], *alone(pole)], 1, 0)


def test_plain_numbers_that_raise_are_not_finite():
    (env,) = alone(family(lambda x, u, p: [1 / x[0], sine(x[1])]))
    assert np.isnan(env.system.rates(np.array([0.0, 1.0]))).all()
    assert np.isnan(env.system.rates(np.array([1.0, math.inf]))).all()
    assert np.isfinite(env.system.rates(np.array([1.0, 1.0]))).all()


def test_a_family_of_ones_own(tmp_path):
    own = family(
        lambda x, u, p: [-p[0] * x[0], -p[1] * x[1]],
        parameters=("a", "b"),
        reference=(1.0, 2.0),
        horizon=3.0,
        points=6,
        train=Factors(0.5, 1.5, 3),
    )
    envs = [Environment(own, p, i) for i, p in enumerate(own.train.parameters(own.reference))]
    assert [e.parameters for e in envs] == [(0.5, 1.0), (0.5, 3.0), (1.5, 1.0)]
    data = generate(envs, 2, 0, cache=tmp_path)
    for i, e in enumerate(envs):
        x = orbits(data, i)
        want = x[:, :1] * (-tensor(*e.parameters) * times(e)[:, None]).exp()
        torch.testing.assert_close(x, want, atol=1e-6, rtol=0)
