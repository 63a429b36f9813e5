"""Forced trajectories and their gradients, by the loop and parallel in time, against a plain loop under autograd."""

import pytest
import torch

from mbrl import parallel
from mbrl.parallel import Newton, affine_scan, forced, pays

close = torch.testing.assert_close
S, B, M, A, L = 2, 3, 4, 2, 12  # seeds, rows, states, actions, hidden units


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------- maps, and what stands for the truth


def shallow(p, z):
    return torch.relu(z @ p["W2"].mT + p["h2"][:, None]) @ p["W1"].mT


def clipped(p, z):
    return shallow(p, z) - torch.relu(z @ p["W2"].mT) @ p["W1"].mT


def dendritic(p, z):
    bases = torch.relu(z[..., None, :] - p["H"][:, None])  # [..., S, B, bases, M]
    return (p["slopes"][:, None, :, None] * bases).sum(-2) @ p["W"].mT


def almost_linear(p, z):
    return torch.cat([z[..., :2], torch.relu(z[..., 2:])], -1) @ p["W"].mT


KINDS = {kind.__name__: kind for kind in (shallow, clipped, dendritic, almost_linear)}


def params(dtype=torch.float64):
    """Of S seeds of every kind; all of them contract."""
    shapes = {"W1": (M, L), "W2": (L, M), "h2": (L,), "W": (M, M), "slopes": (5,), "H": (5, M), "h1": (M,), "C": (M, A)}
    p = {name: randn(S, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    scale = {"W1": 0.12, "W2": 0.4, "W": 0.15, "slopes": 0.3}
    p = {name: scale.get(name, 1.0) * x for name, x in p.items()} | {
        "A": 0.6 * torch.rand(S, M, generator=gen(9)).double()
    }
    return {name: x.to(dtype).requires_grad_() for name, x in p.items()}


def stepper(kind, p):
    return lambda z, act: p["A"][:, None] * z + kind(p, z) + p["h1"][:, None] + act @ p["C"].mT


def jacobian_of(step):
    """By autograd, one row of the matrix at a time: rows of the batch do not touch each other."""

    def jacobian(z, act):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            y = step(z, act)
            rows = [torch.autograd.grad(y[..., i].sum(), z, retain_graph=True)[0] for i in range(z.shape[-1])]
        return torch.stack(rows, -2)

    return jacobian


def loop(step, start, act, signal, keep):
    """(y, x), with a graph through all of it."""
    keep, x, ys, xs = keep.expand(signal.shape), start, [], []
    for t in range(len(signal)):
        xs.append(x)
        ys.append(step(x, act[t]))
        mixed = keep[t] * ys[-1] + (1 - keep[t]) * signal[t]
        x = torch.where(keep[t] == 0, signal[t], torch.where(keep[t] == 1, ys[-1], mixed))
    return torch.stack(ys), torch.stack(xs)


def lozi(a=1.4, b=0.3):
    """A piecewise-linear map of the plane, chaotic: 0.195 per step at these parameters."""
    step = lambda z, act: torch.stack([1 - a * z[..., 0].abs() + z[..., 1], b * z[..., 0]], -1)
    return step, jacobian_of(step)


def orbits(T, rows=3, dtype=torch.float64):
    """(start [rows, 2], act [T, rows, 0], what follows [T, rows, 2]) of the Lozi map's attractor."""
    step, _ = lozi()
    x = 0.1 * randn(rows, 2).to(dtype)
    for _ in range(100):
        x = step(x, None)
    act = torch.zeros(T, rows, 0, dtype=dtype)
    return x, act, loop(step, x, act, act.new_zeros(T, rows, 2), torch.ones((), dtype=dtype))[0]


# ---------------------------------------------------------------- equal to the loop

T = 23
NAN = float("nan")


def _sparse():
    keep = torch.ones(T, 1, 1, 1)
    keep[4::5] = 0
    return keep, torch.where(keep == 1, NAN, 0.0)


# keep, and what is added to the signals: nan where they must not be read
FORCINGS = {
    "constant": (torch.tensor(0.7), torch.tensor(0.0)),
    "in-time": (torch.linspace(0, 1, T)[:, None, None, None], torch.tensor(0.0)),
    "sparse": _sparse(),
    "partial": (torch.tensor([0.5, 0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, NAN, NAN])),
    "free": (torch.tensor(1.0), torch.tensor(NAN)),
    "full": (torch.tensor(0.0), torch.tensor(0.0)),
}


def compare(kind, forcing, method, dtype, rtol, lead=(S, B)):
    p = params(dtype)
    step, (keep, hole) = stepper(KINDS[kind], p), FORCINGS[forcing]
    start, act = randn(*lead, M, dtype=dtype).requires_grad_(), randn(T, *lead, A, dtype=dtype).requires_grad_()
    signal, weight = randn(T, *lead, M, seed=1, dtype=dtype) + hole.to(dtype), randn(T, *lead, M, seed=2, dtype=dtype)
    want, states = loop(step, start, act, signal, keep.to(dtype))
    got = forced(step, jacobian_of(step), start, act, signal, keep.to(dtype), method)
    assert got.parallel == (method == "parallel")
    assert got.converged
    assert not got.states.requires_grad
    assert got.pred.dtype == dtype
    close(got.pred, want, rtol=rtol, atol=rtol)
    close(got.states, states, rtol=rtol, atol=rtol)
    leaves = [*p.values(), start, act]
    of = lambda y: torch.autograd.grad((weight * y).sum() + y.pow(2).sum(), leaves, allow_unused=True)
    for g, w in zip(of(got.pred), of(want), strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            close(g, w, rtol=rtol, atol=rtol * w.abs().max().item())


@pytest.mark.parametrize("method", ["sequential", "parallel"])
@pytest.mark.parametrize("forcing", FORCINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_a_loop_under_autograd(kind, forcing, method):
    compare(kind, forcing, method, torch.float64, 1e-10)


@pytest.mark.parametrize("method", ["sequential", "parallel"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_single_precision(kind, method):
    compare(kind, "constant", method, torch.float32, 2e-5)


@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_more_axes_may_lead(method):
    compare("clipped", "constant", method, torch.float64, 1e-10, lead=(5, S, B))


@pytest.mark.parametrize("method", ["sequential", "parallel"])
@pytest.mark.parametrize("length", [1, 2])
def test_one_row_without_an_axis_and_few_steps(method, length):
    W = randn(M, M).mul(0.3).requires_grad_()
    step, start = lambda z, act: torch.tanh(z @ W.T), randn(M).requires_grad_()
    act, signal, keep = torch.zeros(length, 0), randn(length, M, seed=1), torch.tensor(0.5, dtype=torch.float64)
    want, states = loop(step, start, act, signal, keep)
    got = forced(step, jacobian_of(step), start, act, signal, keep, method)
    assert got.parallel == (method == "parallel" and length > 1)
    close(got.pred, want)
    close(got.states, states)
    of = lambda y: torch.autograd.grad(y.pow(2).sum(), [W, start])
    close(of(got.pred), of(want))


def test_curved_maps_are_solved_to_rounding():
    W = randn(M, M).requires_grad_()
    step = lambda z, act: torch.tanh(z @ W.T)
    start, act, signal, keep = randn(B, M), torch.zeros(200, B, 0), randn(200, B, M, seed=1), torch.tensor(0.5)
    want, states = loop(step, start, act, signal, keep)
    got = forced(step, jacobian_of(step), start, act, signal, keep, "parallel")
    assert got.parallel
    close(got.states, states, rtol=0, atol=1e-12)
    of = lambda y: torch.autograd.grad(y.pow(2).sum(), [W])[0]
    close(of(got.pred), of(want), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_rounding_is_relative_to_the_states(unit):
    W = 0.4 * randn(M, M)
    step = lambda z, act: z @ W.T - 0.5 * z.abs()
    start, act, signal, keep = (
        unit * randn(B, M),
        torch.zeros(50, B, 0),
        unit * randn(50, B, M, seed=1),
        torch.tensor(0.7),
    )
    got = forced(step, jacobian_of(step), start, act, signal, keep, "parallel")
    assert got.parallel
    close(got.states, loop(step, start, act, signal, keep)[1], rtol=0, atol=1e-13 * unit)


def test_signal_and_keep_are_constants():
    p = params()
    step, start, act = stepper(clipped, p), randn(S, B, M), randn(T, S, B, A)
    signal, keep = (
        randn(T, S, B, M, seed=1).requires_grad_(),
        torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
    )
    pred = forced(step, jacobian_of(step), start, act, signal, keep).pred
    assert torch.autograd.grad(pred.sum(), [signal, keep], allow_unused=True) == (None, None)


@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_what_is_replaced_leaks_nothing(method):
    """Neither a start that is not finite, nor a slope that is infinite where what it would act on is replaced."""
    scale = torch.ones(2, dtype=torch.float64, requires_grad=True)
    step = lambda z, act: scale * z.abs().sqrt()
    jacobian = lambda z, act: torch.diag_embed(z.sign() / (2 * z.abs().sqrt()))  # nan at 0
    signal, act = randn(9, 3, 2).abs() + 0.5, torch.zeros(9, 3, 0)
    signal[4] = 0
    keep = torch.full((9, 1, 1), 0.5, dtype=torch.float64)
    keep[4] = 0
    start = randn(3, 2, seed=1).abs() + 0.5
    of = lambda y: torch.autograd.grad(y.sum(), scale)
    want = loop(step, start, act, signal, keep)[0]
    got = forced(step, jacobian, start, act, signal, keep, method).pred
    close(got, want)
    close(of(got), of(want))
    start[1] = NAN
    keep = torch.cat([torch.zeros(1, 1, 1), keep[1:4], keep[5:]])
    got = forced(step, jacobian, start, act[1:], signal[torch.arange(9) != 4], keep, method)
    assert got.parallel == (method == "parallel")
    assert got.pred[0, 1].isnan().all()
    assert got.pred[1:].isfinite().all()


# ---------------------------------------------------------------- Newton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [200, 2000])
def test_a_chaotic_piecewise_linear_map_takes_few_iterations(length, dtype):
    step, jacobian = lozi()
    start, act, truth = orbits(length, dtype=dtype)
    signal, keep = truth + 0.05 * randn(*truth.shape, dtype=dtype), torch.tensor(0.7)
    got = forced(step, jacobian, start, act, signal, keep, "parallel")
    assert got.parallel
    assert 2 <= got.iterations <= 5
    close(got.states, loop(step, start, act, signal, keep)[1], rtol=0, atol=1e4 * torch.finfo(dtype).eps)


def test_a_chaotic_map_unforced_falls_back_to_the_loop():
    step, jacobian = lozi()
    start, act, truth = orbits(2000)
    signal = truth + 0.05 * randn(*truth.shape)
    got = forced(step, jacobian, start, act, signal, torch.tensor(1.0), "parallel")
    assert not got.parallel
    assert not got.converged
    assert 1 <= got.iterations <= 20
    close(got.pred, truth, rtol=0, atol=0)


def test_the_loop_is_not_a_fallback():
    step, jacobian = lozi()
    start, act, truth = orbits(10)
    got = forced(step, jacobian, start, act, truth, torch.tensor(0.5), "sequential")
    assert (got.iterations, got.parallel, got.converged) == (0, False, True)


@pytest.mark.parametrize("wrong", [0.0, 3.0, NAN])
def test_a_wrong_jacobian_gives_no_wrong_states(wrong):
    step, right = lozi()
    start, act, truth = orbits(50)
    jacobian = lambda z, a: wrong * right(z, a)
    got = forced(step, jacobian, start, act, truth + 0.05 * randn(*truth.shape), torch.tensor(0.9), "parallel")
    assert not got.parallel
    want = loop(step, start, act, truth + 0.05 * randn(*truth.shape), torch.tensor(0.9))[1]
    close(got.states, want, rtol=0, atol=1e-9)


def test_no_more_iterations_than_allowed():
    step, jacobian = lozi()
    start, act, truth = orbits(200)
    args = step, jacobian, start, act, truth + 0.05 * randn(*truth.shape), torch.tensor(0.7), "parallel"
    need = forced(*args).iterations
    assert forced(*args, Newton(iterations=need)).parallel
    short = forced(*args, Newton(iterations=need - 1))
    assert (short.iterations, short.parallel, short.converged) == (need - 1, False, False)
    loose = forced(*args, Newton(tolerance=4e15))
    assert loose.parallel
    assert loose.iterations < need


def test_a_row_that_is_solved_stays_as_it_is():
    """The first row's guess is an orbit but for roundings, which an iteration would enlarge; the others need some."""
    step, jacobian = lozi()
    start, act, truth = orbits(100)
    signal = truth + 0.05 * randn(*truth.shape)
    signal[:, 0] = truth[:, 0] * (1 + 1e-15 * randn(100, 2).clamp(-2, 2))
    keep = torch.tensor([1.0, 0.6, 0.6])[:, None]
    got = forced(step, jacobian, start, act, signal, keep, "parallel")
    assert got.parallel
    assert got.iterations > 1
    assert torch.equal(got.states[1:, 0], signal[:-1, 0])


def test_a_row_that_is_lost_is_lost_alone():
    step, jacobian = lozi()
    start, act, truth = orbits(30)
    start[1] = torch.inf
    got = forced(step, jacobian, start, act, truth, torch.tensor(0.5), "parallel")
    assert (got.iterations, got.parallel) == (0, False)  # no iteration can help
    close(got.states, loop(step, start, act, truth, torch.tensor(0.5))[1], equal_nan=True)
    assert got.states[:, [0, 2]].isfinite().all()


def test_jacobians_are_evaluated_where_they_are_needed():
    step, jacobian = lozi()
    start, act, truth = orbits(50)
    lengths = []

    def counted(z, a):
        assert not torch.is_grad_enabled()
        lengths.append(len(z))
        return jacobian(z, a)

    args = start.requires_grad_(), act, truth + 0.05 * randn(*truth.shape), torch.tensor(0.6)
    want = forced(step, counted, *args, "sequential")
    assert want.pred.requires_grad
    assert lengths == [49]
    want.pred.sum().backward()
    assert lengths == [49]
    with torch.no_grad():
        got = forced(step, counted, *args, "sequential")
        assert lengths == [49]
        assert not got.pred.requires_grad
        close(got.pred, want.pred, rtol=0, atol=0)
        lengths.clear()
        got = forced(step, counted, *args, "parallel")
        assert not got.pred.requires_grad
        assert len(lengths) == got.iterations > 0
    lengths.clear()
    got = forced(step, counted, *args, "parallel")
    assert len(lengths) == got.iterations + 1


@pytest.mark.parametrize(
    ("method", "keep", "scans"), [("sequential", 0.6, 0), ("parallel", 0.6, 1), ("parallel", 1.0, 0)]
)
def test_the_gradient_is_a_scan_where_the_states_were(method, keep, scans, monkeypatch):
    step, jacobian = lozi()
    start, act, truth = orbits(200)
    signal, calls = truth + 0.05 * randn(*truth.shape), []
    monkeypatch.setattr(
        parallel, "affine_scan", lambda J, b, *a, **k: calls.append((len(b), k)) or affine_scan(J, b, *a, **k)
    )
    got = forced(step, jacobian, start.requires_grad_(), act, signal, torch.tensor(keep), method)
    assert got.parallel == bool(scans)
    whole = lambda: [k for length, k in calls if length == 199]  # a scan is made of shorter ones
    assert len(whole()) == got.iterations
    got.pred.sum().backward()
    assert whole()[got.iterations :] == [{"reverse": True}] * scans


def test_auto_asks_what_pays(monkeypatch):
    step, jacobian = lozi()
    start, act, truth = orbits(50)
    args = step, jacobian, start, act, truth + 0.05 * randn(*truth.shape), torch.tensor(0.6)
    assert not forced(*args).parallel
    asked = []
    monkeypatch.setattr(parallel, "pays", lambda *given: asked.append(given) or True)
    assert forced(*args).parallel
    assert not forced(*args, "sequential").parallel
    assert asked == [(torch.device("cpu"), 50, 2)]


def test_what_pays():
    cpu, other = torch.device("cpu"), torch.device("cuda")
    assert not pays(cpu, 20_000, 3)
    assert pays(other, 128, 16)
    assert not pays(other, 127, 16)
    assert not pays(other, 20_000, 17)


# ---------------------------------------------------------------- transformed, and refused


def seeds():
    """(parameters of three models of S seeds each, their loss, their gradients one by one)"""
    models = [{k: v.detach() * (1 - 0.1 * i) for k, v in params().items()} for i in range(3)]
    start, act, signal, keep = randn(S, B, M), randn(3, S, B, A), randn(3, S, B, M, seed=1), torch.tensor(0.7)

    def loss(p):
        step = stepper(clipped, p)
        on = lambda z: (z @ p["W2"].mT + p["h2"][:, None] > 0).to(z) - (z @ p["W2"].mT > 0).to(z)
        slope = lambda z: (p["W1"][:, None] * on(z)[..., None, :]) @ p["W2"][:, None]
        jacobian = lambda z, a: torch.diag_embed(p["A"])[:, None] + slope(z)
        return forced(step, jacobian, start, act, signal, keep, "sequential").pred.pow(2).sum()

    alone = [
        torch.func.grad(lambda p: loop(stepper(clipped, p), start, act, signal, keep)[0].pow(2).sum())(p)
        for p in models
    ]
    return models, loss, alone


def test_the_loop_maps_over_seeds():
    models, loss, alone = seeds()
    stacked, want = ({k: torch.stack([p[k] for p in ps]) for k in models[0]} for ps in (models, alone))
    close(torch.func.vmap(torch.func.grad(loss))(stacked), want)
    close(torch.func.grad(lambda ps: torch.func.vmap(loss)(ps).sum())(stacked), want)
    leaves = {k: v.clone().requires_grad_() for k, v in stacked.items()}
    torch.func.vmap(loss)(leaves).sum().backward()
    for name, leaf in leaves.items():
        close(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, want[name])


def test_the_loop_compiles_as_one_graph():
    models, loss, alone = seeds()
    leaves = {k: v.clone().requires_grad_() for k, v in models[0].items()}
    torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)(leaves).backward()
    for name, leaf in leaves.items():
        close(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, alone[0][name])


def test_gradients_are_taken_once():
    p = params()
    step = stepper(clipped, p)
    pred = forced(step, jacobian_of(step), randn(S, B, M), randn(T, S, B, A), randn(T, S, B, M), torch.tensor(0.7)).pred
    (first,) = torch.autograd.grad(pred.pow(2).sum(), [p["W1"]], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("start", "act", "signal"),
    [
        ((3, 2), (5, 3, 0), (5, 4, 2)),
        ((3, 2), (4, 3, 0), (5, 3, 2)),
        ((2,), (5, 3, 0), (5, 3, 2)),
        ((3, 2), (0, 3, 0), (0, 3, 2)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(start, act, signal):
    step, jacobian = lozi()
    with pytest.raises(ValueError, match=r"forced: got start .* expected \[\*rows, M\]"):
        forced(step, jacobian, torch.zeros(start), torch.zeros(act), torch.zeros(signal), torch.tensor(0.5))


def test_an_unknown_method_is_refused():
    step, jacobian = lozi()
    start, act, truth = orbits(5)
    with pytest.raises(ValueError, match="method is 'newton'"):
        forced(step, jacobian, start, act, truth, torch.tensor(0.5), "newton")  # type: ignore[arg-type]


# ---------------------------------------------------------------- affine recurrences


@pytest.mark.parametrize("rows", [(), (3,), (2, 3)])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 64, 100])
def test_a_scan_is_its_loop(length, rows):
    J, b, start = 0.5 * randn(length, *rows, M, M), randn(length, *rows, M, seed=1), randn(*rows, M, seed=2)
    for reverse in (False, True):
        for first in (start, None):
            x, want = torch.zeros_like(start) if first is None else first, torch.empty_like(b)
            for t in reversed(range(length)) if reverse else range(length):
                x = torch.einsum("...ij,...j->...i", J[t], x) + b[t]
                want[t] = x
            close(affine_scan(J, b, first, reverse), want)


def test_a_scan_has_logarithmic_depth():
    """Each doubling adds as many calls as the one before it."""
    calls = []
    for length in (64, 128, 256):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            affine_scan(torch.zeros(length, 1, 2, 2), torch.zeros(length, 1, 2))
        calls.append(sum(event.count for event in profile.key_averages() if event.key == "aten::bmm"))
    assert calls[1] - calls[0] == calls[2] - calls[1] <= 4
