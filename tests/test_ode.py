"""Neural ODEs where they must equal something simpler: closed forms, orders of methods, scipy, finite differences."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from mbrl_envs import systems
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from mbrl import solvers
from mbrl.core import Segment, Spec, StepInput
from mbrl.dynamics.ode import ErrorEstimate, Local, OdeConfig, StiffnessRatio
from mbrl.fit import FitConfig, fit
from mbrl.rollout import forced_mse, steps, unroll
from mbrl.solvers import RK4, Dopri5, Tsit5, rk4_step, tsit5_step
from mbrl.testing import CHECKS, Subject

close = torch.testing.assert_close
SPEC = Spec(obs=2, act=1)
FIXED = (RK4(), Tsit5())


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64)


def segment(b=6, t=4, seed=0, dt=None):
    """Smooth windows far from standardised; dt differs from row to row and from step to step."""
    scale, shift = torch.tensor([1.0, 10.0], dtype=torch.float64), torch.tensor([3.0, -5.0], dtype=torch.float64)
    obs = (normal(b, 1, 2, seed=seed) + 0.1 * normal(b, t + 1, 2, seed=seed + 1).cumsum(1)) * scale + shift
    act, reward = normal(b, t, 1, seed=seed + 2).tanh(), normal(b, t, seed=seed + 3)
    mask = torch.ones(b, t, dtype=torch.bool)
    dt = 0.1 + 0.2 * normal(b, t, 1, seed=seed + 4).sigmoid() if dt is None else torch.full((b, t, 1), dt)
    return Segment(obs, act, reward, ~mask, mask, dt.double(), torch.zeros(1, dtype=torch.int64))


def make(prepared=True, **options):
    model = OdeConfig(**{"hidden": (16, 16), "reward_hidden": (8,)} | options).build(SPEC, gen()).double()
    for i, p in enumerate(model.parameters()):
        p.data += 0.3 * normal(*p.shape, seed=i)
    if prepared:
        model.prepare(segment(40, seed=9))
    return model


def inputs(n=5, dt=None):
    dt = (
        0.05 + 0.3 * torch.arange(n, dtype=torch.float64)[:, None] / n
        if dt is None
        else torch.full((n, 1), dt).double()
    )
    return normal(n, 2, seed=1) * 2 + 1, StepInput(normal(n, 1, seed=2), torch.zeros(n, 0), dt)


def pendulum(x):
    return torch.stack([x[:, 1], -x[:, 0].sin() - 0.2 * x[:, 1] * x[:, 0] ** 2], 1)


def reference(x, time):
    f = lambda _, y: pendulum(torch.from_numpy(y)[None])[0].numpy()
    return torch.tensor(
        np.array([solve_ivp(f, (0, time), r, "DOP853", rtol=1e-13, atol=1e-14).y[:, -1] for r in x.numpy()])
    )


# ---------------------------------------------------------------- steps


METHODS = {
    "rk4": (rk4_step, 4),
    "tsit5": (lambda f, x, h: tsit5_step(f, x, h).x, 5),
    "embedded": (lambda f, x, h: (s := tsit5_step(f, x, h)).x - s.error, 4),
}


@pytest.mark.parametrize("name", METHODS)
def test_order(name):
    step, order = METHODS[name]
    start, want = normal(8, 2, seed=3), reference(normal(8, 2, seed=3), 2.0)
    errors = []
    for n in (32, 64):
        x = start
        for _ in range(n):
            x = step(pendulum, x, 2.0 / n)
        errors.append((x - want).norm())
    assert errors[1] < 1e-5
    assert 0.8 * 2**order < errors[0] / errors[1] < 1.35 * 2**order


def test_tsit5_meets_the_order_conditions():
    """On x' = t^p and on linear systems the coefficients act through these sums alone."""
    a = np.zeros((7, 7))
    for i, row in enumerate(solvers.TSIT5):
        a[i + 1, : i + 1] = row
    b, c, other = a[6], a.sum(1), a[6] - np.array(solvers.TSIT5_ERROR)
    assert c == pytest.approx([0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1], abs=1e-14)
    for weights, order in ((b, 5), (other, 4)):
        for p in range(1, order + 1):
            assert weights @ c ** (p - 1) == pytest.approx(1 / p, abs=1e-13)  # quadrature
            chain = np.ones(7)
            for _ in range(p - 1):
                chain = a @ chain
            assert weights @ chain == pytest.approx(1 / math.factorial(p), abs=1e-13)  # exp
    assert abs(other @ c**4 - 1 / 5) > 1e-5


def test_the_last_stage_is_the_next_steps_first():
    x = normal(4, 2)
    one = tsit5_step(pendulum, x, 0.1)
    assert len(one.stages) == 7
    close(one.stages[0], pendulum(x), rtol=0, atol=0)
    close(one.stages[5], pendulum(one.sixth), rtol=0, atol=0)
    close(one.stages[6], pendulum(one.x), rtol=0, atol=0)
    close(one.stages[6], tsit5_step(pendulum, one.x, 0.2).stages[0], rtol=0, atol=0)


def test_a_step_takes_a_dt_for_each_row():
    x, dt = normal(3, 2), torch.tensor([[0.1], [0.0], [0.3]], dtype=torch.float64)
    for step in (rk4_step, lambda *a: tsit5_step(*a).x):
        close(step(pendulum, x, dt), torch.cat([step(pendulum, x[i : i + 1], float(dt[i])) for i in range(3)]))
        close(step(pendulum, x, dt)[1], x[1])


# ---------------------------------------------------------------- the learner


@pytest.mark.parametrize("solver", [RK4(80), Tsit5(20), Dopri5(1e-10, 1e-12)])
def test_a_linear_field_is_the_matrix_exponential(solver):
    """x' = A x + B a + c in raw units, through normalisers that are not the identity."""
    model = make(hidden=(), solver=solver)
    A, B, c = normal(2, 2, seed=4), normal(2, 1, seed=5), normal(2, seed=6)
    x, a, std = model.observed, model.acted, model.observed.std * model.rate
    model.net.weights[0].data[0] = torch.cat([A * x.std, B * a.std], 1).T / std
    model.net.biases[0].data[0, 0] = (A @ x.mean + B @ a.mean + c) / std
    obs, inp = inputs()
    big = torch.zeros(4, 4, dtype=torch.float64)
    big[:2] = torch.cat([A, B, c[:, None]], 1)
    full = torch.cat([obs, inp.act, torch.ones(5, 1).double()], 1)
    want = torch.stack([torch.from_numpy(expm(big.numpy() * float(h))) @ v for h, v in zip(inp.dt, full, strict=True)])
    close(model.step(obs, inp, ())[0], want[:, :2], rtol=1e-8, atol=1e-8)
    close(model.field(obs, inp.act), obs @ A.T + inp.act @ B.T + c)
    close(model.field_jacobian(obs, inp.act), A.expand(5, 2, 2))


def test_solvers_agree():
    obs, inp = inputs()
    want = make(solver=Tsit5(64)).step(obs, inp, ())[0]
    assert (want - obs).abs().min() > 1e-3
    for solver in (RK4(200), Dopri5(1e-10, 1e-12), Dopri5(1e-10, 1e-12, adjoint=True)):
        close(make(solver=solver).step(obs, inp, ())[0], want, rtol=1e-8, atol=1e-8)
    field = lambda i: lambda _, y: make().field(torch.from_numpy(y)[None], inp.act[i : i + 1])[0].detach().numpy()
    found = solve_ivp(field(2), (0, float(inp.dt[2])), obs[2].numpy(), "DOP853", rtol=1e-11, atol=1e-11)
    close(want[2], torch.from_numpy(found.y[:, -1]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", FIXED)
def test_two_half_steps_are_one_of_two_substeps(solver):
    obs, inp = inputs()
    half, model = inp._replace(dt=inp.dt / 2), make(solver=solver)
    twice = model.step(model.step(obs, half, ())[0], half, ())[0]
    close(make(solver=replace(solver, substeps=2)).step(obs, inp, ())[0], twice)
    assert (model.step(obs, inp, ())[0] - twice).abs().max() > 1e-11


def test_field_jacobian_is_that_of_finite_differences():
    model, (obs, inp) = make(activation="silu"), inputs()
    got, eps = model.field_jacobian(obs, inp.act), 1e-5
    for i in range(2):
        move = torch.zeros(2).double()
        move[i] = eps
        want = (model.field(obs + move, inp.act) - model.field(obs - move, inp.act)) / (2 * eps)
        close(got[:, :, i], want, rtol=1e-6, atol=1e-6)


def test_the_networks_output_is_in_units_of_the_datas_rates():
    model, data = make(hidden=()), segment(40, seed=9)
    rate = (data.obs[:, 1:] - data.obs[:, :-1]) / data.dt
    std = data.obs[:, :-1].flatten(0, 1).std(0, correction=0)
    close(model.rate * std, rate.flatten(0, 1).square().mean(0).sqrt())
    model.net.weights[0].data.zero_()
    model.net.biases[0].data.fill_(1.0)
    close(model.field(*(x[:, 0] for x in (data.obs, data.act))), (model.rate * std).expand(40, 2))


def test_a_reward_head_is_fitted_at_the_data_and_does_not_shape_the_field():
    plain, model = make(), make(reward=True)
    model.net.load_state_dict(plain.net.state_dict())
    data, noise = segment(), torch.zeros(6, 4, 0)
    obs, inp = inputs()
    assert not plain.step(obs, inp, ())[1].reward.any()
    pred = model.step(obs, inp, ())[1]
    x = torch.cat([model.observed(obs), model.acted(inp.act)], -1)
    close(pred.reward, model.worth(x[None])[0, :, 0] * model.rewarded.std + model.rewarded.mean)
    loss, logs = model.loss(data, noise)
    mine, theirs = (torch.autograd.grad(m.loss(data, noise)[0], list(m.net.parameters())) for m in (model, plain))
    close(mine, theirs)
    seen = model.step(
        data.obs[:, :-1].flatten(0, 1), StepInput(data.act.flatten(0, 1), None, data.dt.flatten(0, 1)), ()
    )
    error = ((seen[1].reward - data.reward.flatten()) / model.rewarded.std).square().mean()
    close(loss, plain.loss(data, noise)[0] + error)
    close(logs["reward"], error.detach())
    close(model.validate(data, noise)[0], loss.detach())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_the_forced_error_in_standard_deviations(alpha):
    data, noise = segment(), torch.zeros(6, 4, 0)
    data.mask[::2, 2:] = False
    bare = make(prepared=False, alpha=alpha)
    close(bare.loss(data, noise)[0], forced_mse(bare, data, noise, alpha, ())[0])
    close(bare.validate(data, noise)[0], forced_mse(bare, data, noise, 0.0, ())[0].detach())
    model = make(alpha=alpha)
    inp = steps(StepInput(data.act, noise, data.dt))
    forced = {"forced": data.obs[:, 1:], "alpha": alpha, "mask": data.mask}
    error = (unroll(model, data.obs[:, 0], inp, (), **forced)[1].obs - data.obs[:, 1:]) / model.observed.std
    close(model.loss(data, noise)[0], error[data.mask].square().mean())


# ---------------------------------------------------------------- the adaptive solver


ADAPTIVE = (
    "shapes",
    "dtypes",
    "pure",
    "a_row_that_diverges_ends_before",
    "makes_no_tensor_on_the_default_device",
    "correct_at_1_replaces_what_is_not_finite",
)


@pytest.mark.parametrize("check", ADAPTIVE)
def test_an_adaptive_learner_keeps_the_contract(check):
    config = OdeConfig(hidden=(8,), solver=Dopri5(1e-7, 1e-7), local=Local(sampling="biased"), reward=True)
    CHECKS[check](Subject(config.build))


def test_the_adjoint_gives_the_gradient():
    data, noise = segment(3, 2), torch.zeros(3, 2, 0)
    grads = {}
    for adjoint in (False, True):
        model = make(solver=Dopri5(1e-9, 1e-11, adjoint))
        moved = data._replace(act=data.act.clone().requires_grad_(), dt=data.dt.clone().requires_grad_())
        grads[adjoint] = torch.autograd.grad(model.loss(moved, noise)[0], [moved.act, moved.dt, *model.parameters()])
    assert all(g.abs().max() > 1e-3 for g in grads[True])
    close(grads[True], grads[False], rtol=1e-4, atol=1e-6)


def test_solve_is_one_solution_and_counts():
    model, (obs, inp) = make(), inputs()
    times = torch.tensor([0.1, 0.3, 1.0]).double()
    found = model.solve(obs, inp.act, times, Dopri5(1e-9, 1e-11))
    assert found.obs.shape == (5, 3, 2)
    for t, got in zip(times, found.obs.unbind(1), strict=True):
        close(
            got, make(solver=Tsit5(64)).step(obs, inp._replace(dt=t.expand(5, 1)), ())[0].detach(), rtol=1e-6, atol=1e-6
        )
    assert found.accepted == sorted(found.accepted)
    assert found.accepted[0] == 0
    assert found.accepted[-1] < 1
    assert found.evaluations >= 2 + 6 * len(found.accepted)  # torchdiffeq: two to begin, six a step
    loose = model.solve(obs, inp.act, times, Dopri5(1e-3, 1e-3))
    assert 8 <= loose.evaluations < found.evaluations


def test_a_row_that_is_not_finite_leaves_the_others():
    model, (obs, inp) = make(solver=Dopri5()), inputs()
    want = model.step(obs[1:], StepInput(*(x[1:] for x in inp)), ())[0]
    obs[0, 1] = torch.nan
    got = model.step(obs, inp, ())[0]
    assert got[0].isnan().all()
    close(got[1:], want, rtol=1e-4, atol=1e-4)


def test_an_adaptive_solver_says_what_it_cannot(monkeypatch):
    model, (obs, inp) = make(hidden=(), solver=Dopri5(max_steps=20)), inputs()
    run = lambda x: model.step(x, inp, ())[0]
    with pytest.raises(RuntimeError, match="neither compiled nor captured"):
        torch.func.vmap(run)(obs[None])
    with pytest.raises(Exception, match="neither compiled nor captured"):
        torch.compile(run, fullgraph=True, backend="eager")(obs)
    model.rate.fill_(1e12)
    model.net.weights[0].data.fill_(1.0)
    with pytest.raises(RuntimeError, match=r"gave up.*RK4"):
        run(obs)
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"mbrl-suite\[ode\]"):
        run(obs)


# ---------------------------------------------------------------- local regularisation


def measure(kind, f, z, h):
    """The formulas of the paper, from the step's parts."""
    one = tsit5_step(f, z, h)
    if isinstance(kind, StiffnessRatio):
        return (one.stages[6] - one.stages[5]).norm(dim=1) / (one.x - one.sixth).norm(dim=1) / 3.5068
    scale = kind.atol + kind.rtol * torch.stack([z.abs(), one.x.abs()]).amax(0)
    return h[:, 0] * (one.error / scale).square().mean(1).sqrt()


@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
@pytest.mark.parametrize("kind", [ErrorEstimate(1e-4, 2e-5), StiffnessRatio()])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_the_regularisers_gradient_runs_through_its_own_step_alone(kind, sampling, alpha):
    """Value and gradient, against finite differences in which the step's beginning and length stand still."""
    n, data, noise = 2, segment(), torch.zeros(6, 4, 0)
    data.mask[1, 2:] = False
    local = Local(kind, start=0.7, sampling=sampling)
    model, plain = make(solver=RK4(n), local=local, alpha=alpha), make(solver=RK4(n), alpha=alpha)
    u = (model.moment + torch.arange(6) / 6) % 1
    z, h, act, weigh = [], [], [], []
    for b, share in enumerate(u.tolist()):
        dt = data.dt[b, :, 0].tolist()
        if sampling == "biased":
            t, k = divmod(int(share * 4 * n), n)
            passed = dt[t] * k / n
        else:
            passed, t = share * sum(dt), 0
            while passed > dt[t]:
                passed, t = passed - dt[t], t + 1
        one = Segment(*(x[b : b + 1] for x in data[:-1]), data.system)
        x = one.obs[:, 0]
        if t:
            inp = steps(StepInput(one.act[:, :t], noise[:1, :t], one.dt[:, :t]))
            forced = {"forced": one.obs[:, 1:], "alpha": alpha, "mask": one.mask}
            x = unroll(model, x, inp, (), **forced)[0]
        x = model.step(x, StepInput(one.act[:, t], noise[:1, 0], torch.full((1, 1), passed).double()), ())[0]
        z.append(model.observed(x.detach())[0])
        h.append(dt[t] / n)
        act.append(model.acted(one.act[0, t]))
        weigh.append(float(one.mask[0, t]))
    z, act, h, weigh = torch.stack(z), torch.stack(act), torch.tensor(h).double()[:, None], torch.tensor(weigh).double()
    assert weigh.sum() < 6

    def r():
        return (measure(kind, model._field(act)[0], z, h) * weigh).sum() / weigh.sum()

    loss, logs = model.loss(data, noise)
    close(logs["local"], r().detach(), rtol=1e-6, atol=1e-12)
    close(loss, plain.loss(data, noise)[0] + 0.7 * r(), rtol=1e-6, atol=1e-9)
    grads, params = torch.autograd.grad(loss, list(model.parameters())), list(model.parameters())
    base = torch.autograd.grad(plain.loss(data, noise)[0], list(plain.parameters()))
    move = [normal(*p.shape, seed=i) for i, p in enumerate(params)]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(params, move, strict=True):
                p += sign * 1e-5 * d
            values.append(r())
            for p, d in zip(params, move, strict=True):
                p -= sign * 1e-5 * d
    slope = sum(((g - b) * d).sum() for g, b, d in zip(grads, base, move, strict=True))
    assert slope.abs() > 1e-7
    close(slope, 0.7 * (values[0] - values[1]) / 2e-5, rtol=1e-4, atol=1e-9)


def test_biased_times_are_where_steps_began_and_unbiased_ones_uniform():
    """Two intervals, the first of three steps, the second, thrice as long, of one."""
    f = lambda *x: torch.tensor(x).double()
    table = [(f(0, 0.1, 0.4), f(0.1, 0.3, 0.6)), (f(0), f(1))]
    u, dt = (torch.arange(4000).double() + 0.5) / 4000, torch.tensor([[1.0, 3.0]]).double().expand(4000, 2)
    where, share, size = Local(sampling="biased").place(u, dt, table)
    found = torch.stack([where, share, size], 1).unique(dim=0, return_counts=True)
    close(found[0], torch.tensor([[0, 0, 0.1], [0, 0.1, 0.3], [0, 0.4, 0.6], [1, 0, 1]]).double())
    assert found[1].tolist() == [1000] * 4
    where, share, size = Local(sampling="unbiased").place(u, dt, table)
    close(where + share, torch.where(u < 0.25, 4 * u, 1 + (4 * u - 1) / 3))
    first = where == 0
    want = torch.where(share < 0.1, 0.1, torch.where(share < 0.4, 0.3, 0.6)).double()
    close(size, torch.where(first, want, 1.0).double())
    assert (first == (u < 0.25)).all()


def test_an_adaptive_solvers_own_steps_are_drawn_from():
    log, model, (obs, inp) = [], make(solver=Dopri5(1e-8, 1e-8)), inputs(dt=1.0)
    model.config.solver.flow(*(model._field(inp.act)[0], model.observed(obs), inp.dt, (), log))
    begin, size = log[0]
    assert len(begin) > 3
    assert begin[0] == 0
    close(begin[1:], (begin + size)[:-1])
    assert begin[-1] < 1 <= begin[-1] + size[-1]
    assert size.max() > 1.5 * size[0]


def test_advance_anneals_the_weight_and_fills_the_window_with_times():
    model = make(local=Local(start=8.0, end=0.5, updates=100))
    other = OdeConfig(local=Local()).build(SPEC, gen(1))
    weights, moments = [float(model.weight)], [float(model.moment)]
    for _ in range(200):
        model.advance(segment())
        weights.append(float(model.weight))
        moments.append(float(model.moment))
    assert weights[0] == 8
    assert weights[50] == pytest.approx(2.0)
    assert weights[100] == weights[200] == pytest.approx(0.5)
    gaps = np.diff(np.sort(moments))
    assert gaps.min() > 0
    assert gaps.max() < 3 / 200
    assert min(moments) >= 0
    assert max(moments) < 1
    assert abs(float(other.moment) - moments[0]) > 1e-3
    assert set(model.schedules) == {"weight", "moment", "updates"} <= set(model.state_dict())
    assert make().schedules == ()


# ---------------------------------------------------------------- fits


def van_der_pol(seed=0, episodes=4):
    """The limit cycle, 6 units of time an episode."""
    return systems.trajectory(systems.VanDerPol(), 60, seed, episodes=episodes, transient=10.0)


def test_a_fit_learns_van_der_pol():
    data, local = van_der_pol(episodes=6), Local(ErrorEstimate(), start=1.0, end=0.1, updates=100)
    model = OdeConfig(hidden=(32,), local=local).build(data.spec, gen())
    report = fit(model, data, FitConfig(batch=64, lr=2e-2, length=2, max_epochs=40, patience=40), gen(1))
    test = van_der_pol(seed=5, episodes=8)
    first, last = test.obs[test.starts[:-1]], test.obs[test.starts[:-1] + 35]  # half a period on
    found = model.solve(first, first[:, :0], torch.tensor([3.5]), Dopri5())
    error = ((found.obs[:, 0] - last) / model.observed.std).square().mean(1).sqrt()
    assert ((first - last) / model.observed.std).square().mean(1).sqrt().min() > 1.0
    assert error.max() < 0.5
    assert int(model.updates) == report.steps > 100
    assert float(model.weight) == pytest.approx(0.1)


def test_a_resumed_fit_has_the_same_times_and_weights():
    data, kept = van_der_pol(), {}
    config = FitConfig(batch=32, lr=1e-2, length=4, max_epochs=3, patience=9)
    build = lambda: OdeConfig(hidden=(8,), local=Local(updates=20)).build(data.spec, gen())
    keep = lambda state: kept.setdefault(int(state["epoch"]), {k: v.clone() for k, v in state.items()})
    whole, again = build(), build()
    fit(whole, data, config, gen(1), checkpoint=keep)
    fit(again, data, config, gen(1), resume=kept[1])
    for (name, x), y in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        close(x, y, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"solver": RK4(0)}, "RK4: substeps is 0"),
        ({"solver": Tsit5(-1)}, "Tsit5: substeps is -1"),
        ({"solver": Dopri5(rtol=0.0)}, "Dopri5: rtol and atol"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"local": Local(end=0.0)}, "expected both to be positive"),
    ],
)
def test_bad_settings(options, says):
    with pytest.raises(ValueError, match=says):
        OdeConfig(**options).build(SPEC)


def test_bad_data():
    with pytest.raises(ValueError, match="dt of 0"):
        make().prepare(segment(dt=0.0))
    with pytest.raises(RuntimeError, match="diverged"):
        make().finish(torch.tensor([torch.inf]))
