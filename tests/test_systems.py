"""Flows and maps against autograd and closed forms; orbits against exact solutions and scipy's other solvers."""

import json
import math
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from mbrl_envs.systems import (
    SYSTEMS,
    Chua,
    DoublePendulum,
    Duffing,
    Dysts,
    Equations,
    Flow,
    ForcedDuffing,
    Henon,
    HindmarshRose,
    KuramotoSivashinsky,
    Logistic,
    Lorenz63,
    Lorenz96,
    Map,
    Multisine,
    RandomSteps,
    Roessler,
    VanDerPol,
    dysts,
    dysts_names,
    integrate,
    system,
    trajectory,
)
from scipy.integrate import solve_ivp

F64 = torch.float64
VARIANTS = [
    DoublePendulum(2.0, 0.7, 0.8, 1.3, damping=0.4),
    Lorenz96(4),
    KuramotoSivashinsky(33, 16.0),
    Lorenz96(7, 5.0),
]
ALL = [*SYSTEMS.values(), *VARIANTS]
ids = lambda s: s.name


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def points(s, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return s.starts(n, g) + torch.randn(n, s.dim, generator=g, dtype=F64)


def right(s, x, u=None):
    return s.step(x, u) if isinstance(s, Map) else s.field(x, u)


@dataclass(frozen=True)
class Decay(Flow):
    """dx/dt = u - x."""

    name, dim, inputs, dt = "decay", 1, 1, 0.3

    def field(self, x, u=None):
        return -x if u is None else u - x

    def jacobian(self, x, u=None):
        return -torch.ones_like(x)[..., None]


@dataclass(frozen=True)
class Harmonic(Equations):
    name, dim = "harmonic", 2

    def equations(self, x, u):
        return [x[1], -x[0]]

    def jacobian(self, x, u=None):
        raise NotImplementedError


# ---------------------------------------------------------------- the equations


@pytest.mark.parametrize("s", ALL, ids=ids)
def test_the_jacobian_is_autograds(s):
    x, u = points(s, 6), torch.rand(6, s.inputs, dtype=F64) if s.inputs else None
    field = lambda y, *v: right(s, y, *v)
    want = [torch.autograd.functional.jacobian(field, x[i] if u is None else (x[i], u[i])) for i in range(6)]
    want = torch.stack(want if u is None else [w[0] for w in want])
    torch.testing.assert_close(s.jacobian(x, u), want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(s.jacobian(x.reshape(2, 3, -1))[1, 2], s.jacobian(x)[5])


@pytest.mark.parametrize("s", ALL, ids=ids)
def test_shapes_and_types_are_those_of_the_states(s):
    x = points(s, 6).float().reshape(2, 3, -1)
    y = right(s, x)
    assert y.shape == x.shape
    assert y.dtype == s.jacobian(x).dtype == torch.float32
    torch.testing.assert_close(y[1, 0], right(s, x[1, 0]))
    shown = s.observe(x)
    assert shown.shape[:-1] == x.shape[:-1]
    assert s.starts(5, torch.Generator()).shape == (5, s.dim)


@pytest.mark.parametrize("s", [s for s in ALL if isinstance(s, Flow)], ids=ids)
def test_a_solver_is_given_the_same_field(s):
    x, u = points(s, 1)[0], torch.full((s.inputs,), 0.7, dtype=F64)
    np.testing.assert_allclose(s.rates(x.numpy()), s.field(x).numpy(), rtol=1e-12, atol=1e-13)
    if s.inputs:
        np.testing.assert_allclose(s.rates(x.numpy(), u.numpy()), s.field(x, u).numpy(), rtol=1e-12)


def test_starts_fill_the_box():
    s = Lorenz63()
    x = s.starts(2000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.amin(0), tensor(*s.low), atol=0.05, rtol=0)
    torch.testing.assert_close(x.amax(0), tensor(*s.high), atol=0.05, rtol=0)


def test_equilibria():
    q = math.sqrt(8 / 3 * 27)
    for s, x in (
        (Lorenz63(), tensor([0, 0, 0], [q, q, 27], [-q, -q, 27])),
        (Chua(), tensor([0, 0, 0], [1.5, 0, -1.5], [-1.5, 0, 1.5])),
        (Duffing(), tensor([0, 0], [1, 0], [-1, 0])),
        (VanDerPol(), tensor([0, 0])),
        (Lorenz96(9), torch.full((1, 9), 8.0, dtype=F64)),
        (DoublePendulum(), tensor([0, 0, 0, 0], [math.pi, 0, 0, 0])),
    ):
        torch.testing.assert_close(s.field(x), torch.zeros_like(x), atol=1e-12, rtol=0)
    s = Roessler()
    x = (s.c - math.sqrt(s.c**2 - 4 * s.a * s.b)) / 2
    torch.testing.assert_close(s.field(tensor(x, -x / s.a, x / s.a)), torch.zeros(3, dtype=F64), atol=1e-14, rtol=0)
    s = HindmarshRose()
    x = -1.0
    y = s.c - s.d * x * x
    want = tensor(y - s.a * x**3 + s.b * x * x - s.s * (x - s.rest) + s.current, 0, 0)
    torch.testing.assert_close(s.field(tensor(x, y, s.s * (x - s.rest))), want)


def test_an_input_pushes_with_its_gain():
    for s in (Duffing(gain=0.3), VanDerPol(gain=1.2)):
        x, u = points(s, 4), torch.linspace(-1, 1, 4, dtype=F64)[:, None]
        moved = s.field(x, u) - s.field(x)
        torch.testing.assert_close(moved, torch.cat([torch.zeros_like(u), s.gain * u], 1))
    assert (VanDerPol().inputs, VanDerPol(gain=1.0).inputs) == (0, 1)
    assert VanDerPol(gain=1.0).name == "vanderpol-driven"


def test_forced_duffing_is_the_driven_one_under_a_cosine():
    s, phase = ForcedDuffing(omega=1.3), tensor(0.4, 2.0)
    x = points(Duffing(), 2)
    y = s.field(torch.cat([x, phase.cos()[:, None], phase.sin()[:, None]], 1))
    torch.testing.assert_close(y[:, :2], Duffing().field(x, phase.cos()[:, None]))
    orbit = integrate(s, s.starts(1, torch.Generator()), 40)[0]
    time = s.dt * torch.arange(41, dtype=F64)
    torch.testing.assert_close(
        orbit[:, 2:], torch.stack([(1.3 * time).cos(), (1.3 * time).sin()], 1), atol=1e-7, rtol=0
    )


def test_linear_duffing_answers_with_the_known_amplitude():
    s = ForcedDuffing(delta=0.2, alpha=1.0, beta=0.0, gain=0.5, omega=1.3)
    x = integrate(s, tensor(0, 0, 1, 0), 2000)[0, 1200:, 0]
    want = 0.5 / math.hypot(1 - 1.3**2, 0.2 * 1.3)
    assert x.abs().max().item() == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize(("mu", "want"), [(0.1, 2.00010), (1.0, 2.00862)])
def test_van_der_pols_cycle_has_the_known_amplitude(mu, want):
    x = integrate(VanDerPol(mu), tensor(0.5, 0.0), 4000, 0.05)[0, 2500:, 0]
    assert x.max().item() == pytest.approx(want, abs=5e-4)


def test_hindmarsh_rose_bursts():
    x = trajectory(HindmarshRose(), 8000, 0, transient=400.0).obs[:, 0]
    spikes = ((x[1:] > 1) & (x[:-1] <= 1)).nonzero()[:, 0]
    gaps = spikes.diff().double() * 0.1
    assert len(spikes) > 20
    assert gaps.min() < 15
    assert gaps.max() > 60


# ---------------------------------------------------------------- double pendulum


def test_double_pendulum_keeps_its_energy():
    s = DoublePendulum(1.3, 0.6, 0.9, 1.2)
    path = integrate(s, points(s, 2), 300)
    energy = s.energy(path)
    torch.testing.assert_close(energy, energy[:, :1].expand_as(energy), atol=1e-6, rtol=0)
    assert path[..., 0].diff().abs().max() > 0.01


def test_friction_takes_the_energy_that_the_joints_turn_away():
    s = DoublePendulum(1.3, 0.6, 0.9, 1.2, damping=0.4)
    x = points(s, 5).requires_grad_()
    (grad,) = torch.autograd.grad(s.energy(x).sum(), x)
    v, w = x[:, 2], x[:, 3]
    torch.testing.assert_close((grad * s.field(x)).sum(1), -0.4 * (v**2 + (w - v) ** 2))


def test_small_double_pendulum_has_the_known_modes():
    j = DoublePendulum().jacobian(torch.zeros(4, dtype=F64))
    found = torch.linalg.eigvals(j).imag.sort().values[2:] ** 2
    torch.testing.assert_close(found, 9.81 * tensor(2 - math.sqrt(2), 2 + math.sqrt(2)))
    x = tensor(0.3, -2.0, 1.0, 2.0)
    torch.testing.assert_close(
        DoublePendulum().observe(x), torch.cat([x[:2].cos(), x[:2].sin(), x[2:]]), rtol=0, atol=0
    )


# ---------------------------------------------------------------- the large ones


def test_lorenz96_moves_energy_but_makes_none_in_its_quadratic_part():
    s = Lorenz96(11, 3.0)
    x = points(s, 4)
    moved = s.field(x) + x - 3.0
    torch.testing.assert_close((x * moved).sum(-1), torch.zeros(4, dtype=F64), atol=1e-11, rtol=0)
    assert moved.abs().max() > 1
    torch.testing.assert_close(s.field(x.roll(3, -1)), s.field(x).roll(3, -1))
    by_hand = (x[0, 5] - x[0, 2]) * x[0, 3] - x[0, 4] + 3.0
    torch.testing.assert_close(s.field(x)[0, 4], by_hand)


@pytest.mark.parametrize("s", [KuramotoSivashinsky(), KuramotoSivashinsky(33, 16.0)], ids=ids)
def test_ks_grows_linearly_at_k2_minus_k4(s):
    j = s.jacobian(torch.zeros(s.dim, dtype=F64))
    found = torch.linalg.eigvalsh((j + j.T) / 2)
    torch.testing.assert_close(j, j.T, atol=1e-9, rtol=0)
    mode = torch.arange(s.dim // 2 + 1, dtype=F64)
    k2 = (2 * math.pi / s.length * mode) ** 2
    rates = k2 - k2**2
    twice = rates[1:] if s.dim % 2 else rates[1:-1]  # of an even grid the highest mode is one, not two
    torch.testing.assert_close(found, torch.cat([rates, twice]).sort().values, atol=1e-8, rtol=1e-10)


def test_ks_of_a_sine():
    s = KuramotoSivashinsky()
    k = 2 * math.pi * 3 / s.length
    x = s.length / s.dim * torch.arange(s.dim, dtype=F64)
    want = 1.7 * (k**2 - k**4) * (k * x).sin() - 1.7**2 * k / 2 * (2 * k * x).sin()
    torch.testing.assert_close(s.field(1.7 * (k * x).sin()), want, atol=1e-10, rtol=0)


def test_the_product_in_ks_makes_no_energy_and_keeps_the_mean():
    s = KuramotoSivashinsky()
    rough = torch.fft.rfft(points(s, 3))
    rough[:, s.dim // 3 + 1 :] = 0
    x = torch.fft.irfft(rough, n=s.dim)
    quadratic = (s.field(x) - s.field(-x)) / 2 - s.field(x)  # minus its even part
    torch.testing.assert_close((x * quadratic).sum(-1), torch.zeros(3, dtype=F64), atol=1e-9, rtol=0)
    start = s.starts(1, torch.Generator().manual_seed(1))
    assert start.mean().abs() < 1e-15
    path = integrate(s, start + 0.3, 20)
    torch.testing.assert_close(path.mean(-1), torch.full((1, 21), 0.3, dtype=F64), atol=1e-9, rtol=0)


def test_sizes_that_the_equations_need():
    with pytest.raises(ValueError, match="dim is 3, expected at least 4"):
        Lorenz96(3)
    with pytest.raises(ValueError, match="dim is 4, expected at least 8"):
        KuramotoSivashinsky(4)


# ---------------------------------------------------------------- maps


def test_henon_contracts_areas_by_b():
    s = Henon()
    torch.testing.assert_close(torch.linalg.det(s.jacobian(points(s, 5))), torch.full((5,), -0.3, dtype=F64))
    x = (-0.7 + math.sqrt(0.49 + 4 * 1.4)) / 2.8
    torch.testing.assert_close(s.step(tensor(x, 0.3 * x)), tensor(x, 0.3 * x))


def test_logistic_settles_on_its_known_cycle_of_two():
    r = 3.2
    root = math.sqrt((r - 3) * (r + 1))
    path = integrate(Logistic(r), tensor([0.3], [0.6]), 400)
    assert path.shape == (2, 401, 1)
    for row in path[:, -2:, 0].sort(1).values:
        torch.testing.assert_close(row, tensor((r + 1 - root) / (2 * r), (r + 1 + root) / (2 * r)))
    torch.testing.assert_close(path[:, -1], path[:, -3])


# ---------------------------------------------------------------- integrate


def test_a_harmonic_orbit_is_exact_to_the_tolerance():
    time = 0.3 * torch.arange(101, dtype=F64)
    want = torch.stack([time.cos(), -time.sin()], 1)
    errors = [(integrate(Harmonic(), [1.0, 0.0], 100, 0.3, rtol=t, atol=t)[0] - want).abs().max() for t in (1e-4, 1e-9)]
    assert errors[1] < 1e-7
    assert errors[0] > 100 * errors[1]


def test_inputs_are_held_over_their_interval():
    g = torch.Generator().manual_seed(0)
    u, x = 2 * torch.rand(3, 40, 1, generator=g, dtype=F64) - 1, torch.randn(3, 1, generator=g, dtype=F64)
    path = integrate(Decay(), x, 40, inputs=u)
    keep = math.exp(-0.3)
    for t in range(40):
        torch.testing.assert_close(path[:, t + 1], keep * path[:, t] + (1 - keep) * u[:, t], atol=1e-8, rtol=0)
    torch.testing.assert_close(integrate(Decay(), x, 40, inputs=u[1])[1], path[1], rtol=0, atol=0)
    torch.testing.assert_close(integrate(Decay(), x, 5)[:, -1], x * math.exp(-1.5))


def test_rows_do_not_see_each_other():
    s = Lorenz63()
    x = points(s, 3)
    both = integrate(s, x, 50)
    assert both.dtype == F64
    assert torch.equal(both[:, 0], x)
    assert torch.equal(both[1:2], integrate(s, x[1], 50))
    assert integrate(s, x, 0).shape == (3, 1, 3)


def test_lorenz_against_an_implicit_solver_of_its_equations_written_anew():
    field = lambda t, y: [10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]]
    want = solve_ivp(field, (0, 2), [1.0, 2.0, 20.0], "Radau", rtol=1e-9, atol=1e-9).y[:, -1]
    np.testing.assert_allclose(integrate(Lorenz63(), [1.0, 2.0, 20.0], 200)[0, -1], want, atol=1e-5)


@pytest.mark.parametrize(
    ("s", "steps", "dt"), [(VanDerPol(100.0), 5, 10.0), (KuramotoSivashinsky(32), 8, 0.25)], ids=str
)
def test_stiff_systems_against_radau(s, steps, dt):
    assert s.stiff
    x = s.starts(1, torch.Generator().manual_seed(3))[0]
    want = solve_ivp(lambda t, y: s.field(torch.tensor(y)).numpy(), (0, steps * dt), x, "Radau", rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(integrate(s, x, steps, dt)[0, -1], want.y[:, -1], atol=1e-5)


@dataclass(frozen=True)
class Explodes(Equations):
    """dx/dt = x^2: 1 / (1 - t) from 1."""

    name, dim = "explodes", 1

    def equations(self, x, u):
        return [x[0] * x[0]]

    def jacobian(self, x, u=None):
        return 2 * x[..., None]


def test_orbits_that_leave_the_numbers_are_an_error():
    with pytest.raises(ValueError, match=r"explodes: row 1, from \[1.0\], leaves the finite numbers before time 1\b"):
        integrate(Explodes(), [[-1.0], [1.0]], 20, 0.1)
    with pytest.raises(ValueError, match=r"henon: row 0, .* leaves the finite numbers"):
        integrate(Henon(), [10.0, 10.0], 100)


@pytest.mark.parametrize(
    ("kw", "match"),
    [
        (dict(x0=[0.0, 0.0]), r"starts are \[1, 2\], expected \[rows, 3\]"),
        (dict(x0=[0.0, math.nan, 0.0]), "a start is not finite"),
        (dict(dt=0.0), "10 steps of 0.0, expected"),
        (dict(steps=-1), "-1 steps"),
        (dict(inputs=torch.zeros(10, 1)), r"inputs are \[10, 1\], expected \[10, 0\]"),
    ],
)
def test_wrong_arguments(kw, match):
    with pytest.raises(ValueError, match=match):
        integrate(Lorenz63(), **(dict(x0=[1.0, 1.0, 1.0], steps=10) | kw))


def test_wrong_arguments_of_maps_and_driven_systems():
    with pytest.raises(ValueError, match="for dt 1"):
        integrate(Henon(), [0.0, 0.0], 3, 0.1)
    with pytest.raises(ValueError, match=r"inputs are \[4, 3, 1\], expected \[3, 1\] or \[2, 3, 1\]"):
        integrate(Duffing(), torch.zeros(2, 2), 3, inputs=torch.zeros(4, 3, 1))


# ---------------------------------------------------------------- trajectory


def test_a_trajectory_is_made_of_the_orbit_after_the_transient():
    s = Lorenz63()
    data = trajectory(s, 50, 3, transient=1.0, start=[1.0, 2.0, 20.0])
    torch.testing.assert_close(data.obs, integrate(s, [1.0, 2.0, 20.0], 149)[0, 100:].float(), rtol=0, atol=0)
    assert (len(data), data.episodes, data.dt, data.name) == (50, 1, 0.01, "lorenz63")
    assert data.act.shape == (50, 0)
    assert data.paired.tolist() == [True] * 49 + [False]
    torch.testing.assert_close(data.next_obs[:-1], data.obs[1:], rtol=0, atol=0)
    assert json.loads(json.dumps(data.meta))["parameters"] == {"sigma": 10.0, "rho": 28.0, "beta": 8 / 3}


def test_seeds():
    first, again, other = (trajectory(Henon(), 40, seed, episodes=2) for seed in (1, 1, 2))
    assert first.sha256 == again.sha256 != other.sha256
    assert torch.equal(first.obs, again.obs)
    assert first.lengths.tolist() == [40, 40]
    assert not torch.equal(first.obs[:40], first.obs[40:])


def test_noise_is_a_part_of_each_dimensions_spread():
    clean, noisy = (trajectory(Henon(), 8000, 5, noise=noise) for noise in (0.0, 0.05))
    error = (noisy.obs - clean.obs).double()
    torch.testing.assert_close(error.std(0), 0.05 * clean.obs.double().std(0), rtol=0.03, atol=0)
    assert error.mean(0).abs().max() < 2e-3
    assert abs(np.corrcoef(error.T.numpy())[0, 1]) < 0.03
    assert noisy.meta["noise"] == 0.05


def test_standardised():
    data = trajectory(Lorenz96(5), 300, 0, transient=1.0, noise=0.1, standardised=True)
    torch.testing.assert_close(data.obs.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.obs.std(0, correction=0), torch.ones(5))
    plain = trajectory(Lorenz96(5), 300, 0, transient=1.0, noise=0.1)
    back = data.obs * torch.tensor(data.meta["std"]) + torch.tensor(data.meta["mean"])
    torch.testing.assert_close(back, plain.obs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("drive", [None, RandomSteps(0.5, 2.0)])
def test_the_actions_of_a_driven_system_are_those_that_drove_it(drive):
    s = Duffing()
    data = trajectory(s, 120, 0, episodes=2, transient=3.0, drive=drive)
    assert data.act.shape == (240, 1)
    assert (data.act_low.item(), data.act_high.item()) == (-1, 1)
    assert data.act.abs().max() <= 1
    again = integrate(s, data.obs[[0, 120]], 119, inputs=data.act.reshape(2, 120, 1)[:, :-1])
    torch.testing.assert_close(again.flatten(0, 1).float(), data.obs, atol=1e-4, rtol=0)
    assert data.act[:120].std() > 0.1
    assert repr(drive or Multisine()) == data.meta["drive"]


def test_what_is_observed_of_a_double_pendulum_is_bounded():
    data = trajectory(DoublePendulum(), 30, 0)
    assert data.obs.shape == (30, 6)
    torch.testing.assert_close(data.obs[:, :2] ** 2 + data.obs[:, 2:4] ** 2, torch.ones(30, 2))


def test_wrong_lengths():
    with pytest.raises(ValueError, match="1 series of 1 samples"):
        trajectory(Henon(), 1, 0)
    with pytest.raises(ValueError, match="noise -1"):
        trajectory(Henon(), 9, 0, noise=-1)


def test_multisine_holds_its_lines_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    u = Multisine(0.1, 0.5, 5)(1000, 0.1, 2, g)  # 100 units of time: lines at whole multiples of 0.01
    assert u.shape == (1000, 2)
    torch.testing.assert_close(u.abs().amax(0), torch.ones(2, dtype=F64))
    power = torch.fft.rfft(u, dim=0).abs()
    lines = [10, 20, 30, 40, 50]
    torch.testing.assert_close(power[lines], power[lines[0]].expand(5, 2))
    assert power[[i for i in range(501) if i not in lines]].max() < 1e-9 * power.max()
    assert not torch.equal(u[:, 0], u[:, 1])


def test_random_steps_are_held_as_long_as_asked():
    u = RandomSteps(0.5, 2.0)(4000, 0.1, 2, torch.Generator().manual_seed(0))
    assert u.shape == (4000, 2)
    assert u.min() < -0.95
    assert u.max() > 0.95
    for signal in u.T:
        held = (signal.diff() != 0).nonzero()[:, 0].diff()
        assert (held.min().item(), held.max().item()) == (5, 20)


# ---------------------------------------------------------------- by name


def test_names():
    assert all(system(name) is s for name, s in SYSTEMS.items())
    assert system("lorenz96-7") == Lorenz96(7)
    assert system("ks-32") == KuramotoSivashinsky(32)
    with pytest.raises(
        ValueError, match=r"'lorenz' is no system; did you mean lorenz63.*expected lorenz63, .*ks-<size>"
    ):
        system("lorenz")
    with pytest.raises(ValueError, match="is no system"):
        system("lorenz63-4")


# ---------------------------------------------------------------- dysts

STUB = """
import numpy as np
class DynSys:
    period = 1.5
    def rhs(self, X, t):
        return self._rhs(*X.T, t, *self.param_list)
class DynSysDelay(DynSys): pass
class Lorenz(DynSys):
    ic = np.array([1.0, 2.0, 20.0])
    params = {"beta": np.array(8 / 3), "rho": 28, "sigma": 10}
    param_list = [8 / 3, 28, 10]
    def _rhs(self, x, y, z, t, beta, rho, sigma):
        return sigma * (y - x), x * (rho - z) - y, x * y - beta * z
class Branch(Lorenz):
    def _rhs(self, x, y, z, t, beta, rho, sigma):
        return (sigma * (y - x) if x > -1e9 else 0), x * (rho - z) - y, x * y - beta * z
class Mixed(Lorenz):
    def rhs(self, X, t):
        X = np.asarray(X).flatten()
        return np.array(self._rhs(X[0], X[1], X[2], t, *self.param_list))
class Phase(DynSys):
    ic = np.array([0.5, 0.0])
    params, param_list = {"w": 2.0}, [2.0]
    def _rhs(self, x, phase, t, w):
        return -x, w
    def _postprocessing(self, x, phase):
        return x, np.sin(phase)
class Clocked(Phase):
    def _rhs(self, x, phase, t, w):
        return -x + t, w
class Late(DynSysDelay): pass
"""


@pytest.fixture
def stub(monkeypatch):
    package, flows = types.ModuleType("dysts"), types.ModuleType("dysts.flows")
    exec(
        STUB.replace("class DynSys:", "class DynSys:\n    __module__ = 'dysts.base'").replace(
            "class DynSysDelay(DynSys): pass", "class DynSysDelay(DynSys): __module__ = 'dysts.base'"
        ),
        flows.__dict__,
    )
    monkeypatch.setitem(sys.modules, "dysts", package)
    monkeypatch.setitem(sys.modules, "dysts.flows", flows)


@pytest.mark.parametrize("name", ["Lorenz", "Branch", "Mixed"])
def test_a_flow_of_dysts_is_integrated_as_our_own(stub, name):
    s, ours = dysts(name), Lorenz63()
    assert s.batched == (name == "Lorenz")
    assert (s.dim, s.dt, s.transient) == (3, 0.015, 30.0)
    x = points(ours, 3)
    torch.testing.assert_close(s.field(x), ours.field(x))
    torch.testing.assert_close(s.jacobian(x.reshape(3, 1, 3)), ours.jacobian(x.reshape(3, 1, 3)), atol=1e-7, rtol=0)
    torch.testing.assert_close(integrate(s, x, 60), integrate(ours, x, 60, 0.015), atol=1e-6, rtol=0)
    start = s.starts(100, torch.Generator().manual_seed(0)) / tensor(1.0, 2.0, 20.0)
    assert 0.99 <= start.min() < 0.995 < 1.005 < start.max() <= 1.01
    data = trajectory(system(f"dysts:{name}"), 20, 0, transient=0.3)
    assert data.name == f"dysts:{name}"
    assert json.loads(json.dumps(data.meta))["parameters"] == {"beta": 8 / 3, "rho": 28, "sigma": 10}


def test_unbounded_coordinates_of_dysts_are_shown_as_it_shows_them(stub):
    s = dysts("Phase", per_period=10)
    data = trajectory(s, 30, 0, episodes=2, transient=0.0, start=[0.5, 0.0])
    time = 0.15 * torch.arange(30)
    want = torch.stack([0.5 * torch.exp(-time), torch.sin(2 * time)], 1)
    torch.testing.assert_close(data.obs, want.repeat(2, 1), atol=1e-6, rtol=0)


def test_flows_of_dysts_that_cannot_serve(stub):
    assert dysts_names() == ["Branch", "Clocked", "Lorenz", "Mixed", "Phase"]
    with pytest.raises(ValueError, match=r"'Lorens' is no flow .* did you mean Lorenz"):
        dysts("Lorens")
    with pytest.raises(ValueError, match="'Late' is no flow without delays"):
        dysts("Late")
    with pytest.raises(ValueError, match="Clocked depends on the time itself"):
        dysts("Clocked")


def test_without_dysts_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dysts", None)
    monkeypatch.setitem(sys.modules, "dysts.flows", None)
    with pytest.raises(ImportError, match=r"pip install 'mbrl-suite\[dysts\]'"):
        system("dysts:Lorenz")


@pytest.mark.parametrize("name", ["Lorenz", "Duffing", "BelousovZhabotinsky", "Hopfield", "Lorenz96"])
def test_the_real_dysts(name):
    pytest.importorskip("dysts.flows", reason="needs the extra [dysts]")
    s = system(f"dysts:{name}")
    assert isinstance(s, Dysts)
    x = s.starts(2, torch.Generator().manual_seed(0))
    path = integrate(s, x, 20)
    rise = (s.field(path[:, 1:-1]) - (path[:, 2:] - path[:, :-2]) / (2 * s.dt)).abs().amax((0, 1))
    assert (rise <= 0.1 * s.field(path).abs().amax((0, 1)) + 1e-6).all()
    if name == "Lorenz":
        torch.testing.assert_close(s.field(x), Lorenz63(beta=2.667).field(x))
