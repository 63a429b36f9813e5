"""PLRNNs: closed forms, and that every way to a forced trajectory is the plain loop."""

import math
import time
import types
from dataclasses import replace

import pytest
import torch

from mbrl import compiled, forced
from mbrl.core import Segment, Spec, StepInput
from mbrl.data import Dataset
from mbrl.dynamics import plrnn
from mbrl.dynamics.plrnn import (
    Adaptive,
    AlmostLinear,
    Annealed,
    Constant,
    Dendritic,
    PlrnnConfig,
    PlrnnFit,
    Shallow,
    Sparse,
    fit_plrnn,
    growth,
    jacobian,
    orbit,
    random_features,
)
from mbrl.fit import FitConfig, fit

KINDS = {
    "shallow": Shallow(7, clipped=False),
    "clipped": Shallow(7),
    "dendritic": Dendritic(4),
    "dendritic-clipped": Dendritic(4, clipped=True),
    "almost-linear": AlmostLinear(2),
}
SPEC = Spec(obs=3, act=2)
needs_compiler = pytest.mark.skipif(forced.problem() is not None, reason="no C compiler")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def build(kind, spec=SPEC, seed=0, **kw):
    """In float64, with everything that begins at zero moved away from it."""
    model = PlrnnConfig(kind, **kw).build(spec, gen(seed)).double()
    g = gen(seed + 100)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return model


def dataset(steps=60, spec=SPEC, seed=0, episodes=1):
    """A damped rotation that the first action pushes; the reward is the second observation."""
    g = gen(seed)
    turn = 0.95 * torch.linalg.qr(torch.randn(spec.obs, spec.obs, generator=g, dtype=torch.float64))[0]
    rows, acts = [], []
    for _ in range(episodes):
        x = torch.randn(spec.obs, generator=g, dtype=torch.float64)
        act = torch.rand(steps, spec.act, generator=g, dtype=torch.float64) * 2 - 1
        track = [x]
        for a in act:
            x = x @ turn + (a.sum() * 0.3 if spec.act else 0.0)
            track.append(x)
        rows.append(torch.stack(track))
        acts.append(act)
    obs, after = torch.cat([r[:-1] for r in rows]), torch.cat([r[1:] for r in rows])
    n = len(obs)
    yes = torch.ones(n, dtype=torch.bool)
    starts = torch.arange(episodes + 1) * steps
    bound = torch.ones(spec.act)
    return Dataset(obs, torch.cat(acts), after[:, 1], after, ~yes, yes, starts, -bound, bound)


def segment(model, data, length=6, rows=5):
    return data.windows(length, torch.arange(rows) * 7)


# ---------------------------------------------------------------- the equations


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("latent", [3, 5])
def test_the_jacobian_is_the_derivative_of_the_step(kind, latent):
    model = build(kind, latent=latent)
    z, act = torch.randn(4, latent, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    inp = StepInput(act, z[:, :0], z[:, :1])
    want = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda x, i=i: model.step(x[None], StepInput(*(v[i : i + 1] for v in inp)), ())[0][0], z[i]
            )
            for i in range(4)
        ]
    )
    torch.testing.assert_close(model.jacobian(z, inp, ()), want)


def test_the_steps_are_the_papers_equations():
    z, s = torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    relu = torch.relu
    go = lambda model: model.step(z[None], StepInput(s[None], z[None, :0], z[None, :1]), ())[0][0]
    for clipped in (False, True):
        p = (model := build(Shallow(7, clipped))).theta
        u = p["W2"] @ z
        c = relu(u + p["h2"]) - clipped * relu(u)
        torch.testing.assert_close(go(model), p["A"] * z + p["W1"] @ c + p["h1"] + p["C"] @ s)
        p = (model := build(Dendritic(4, clipped))).theta
        c = sum(p["alpha"][b] * (relu(z - p["H"][b]) - clipped * relu(z)) for b in range(4))
        torch.testing.assert_close(go(model), p["A"] * z + p["W"] @ c + p["h1"] + p["C"] @ s)
    p = (model := build(AlmostLinear(2))).theta
    c = torch.stack([z[0], relu(z[1]), relu(z[2])])
    torch.testing.assert_close(go(model), p["A"] * z + p["W"] @ c + p["h1"] + p["C"] @ s)


def test_clipped_orbits_stay_where_A_holds_them():
    """|z'| <= max|A| |z| + |W1| |h2|: past the fixed point of that bound, norms fall."""
    model = build(Shallow(50), latent=3)
    model.theta["A"].data.clamp_(-0.9, 0.9)
    p = model.theta
    bound = (torch.linalg.matrix_norm(p["W1"], 2) * p["h2"].norm() + p["h1"].norm()) / (1 - p["A"].abs().max())
    z = 1e3 * torch.randn(20, 3, dtype=torch.float64)
    none = StepInput(torch.zeros(20, 2, dtype=torch.float64), z[:, :0], z[:, :1])
    for _ in range(400):
        z = model.step(z, none, ())[0]
    assert (z.norm(dim=1) <= bound + 1e-6).all()


def test_published_initialisation():
    model = PlrnnConfig(Shallow(400), latent=4, readout="affine").build(Spec(obs=2), gen())
    p = model.theta
    assert 0 < p["A"].min() <= p["A"].max() <= 1
    for name, bound in (("W1", 400**-0.5), ("W2", 0.5), ("h2", 400**-0.5)):
        assert 0.7 * bound < p[name].abs().max() <= bound, name
    B = PlrnnConfig(Shallow(4), latent=50, readout="affine").build(Spec(obs=90), gen()).theta["B"]
    assert B.std().item() == pytest.approx((2 / 50) ** 0.5, rel=0.05)  # Kaiming's normal, of the latent states
    assert B.abs().max() > 3 * B.std()
    assert (p["h1"] == 0).all()
    assert (PlrnnConfig(Shallow(9, clipped=False)).build(Spec(obs=2), gen()).theta["h2"] == 0).all()
    p = PlrnnConfig(AlmostLinear(2), latent=6).build(Spec(obs=2), gen()).theta
    both = p["W"] + p["A"].diag()  # K / lambda_max: positive definite, its largest eigenvalue 1
    torch.testing.assert_close(torch.linalg.eigvalsh(both)[-1], torch.tensor(1.0))
    assert torch.linalg.eigvalsh(both)[0] > 0


def test_parameters_are_counted_as_published():
    """ECG: 5 latent states, 250 hidden units, an affine readout of 5 dimensions: 2785."""
    model = PlrnnConfig(Shallow(250), readout="affine").build(Spec(obs=5))
    assert sum(p.numel() for p in model.parameters()) == 2785


# ---------------------------------------------------------------- forcing


@pytest.mark.parametrize("readout", ["identity", "affine"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_the_contracts_unroll(readout, alpha):
    """... `forced_mse` in standardised units, where every state can be imposed."""
    from mbrl.rollout import forced_mse

    model = build(Shallow(7), readout=readout, forcing=Constant(alpha))
    data = dataset()
    model.prepare(data.windows(6))
    model.observed.std.fill_(2.0)  # one scale, so that standardising commutes with the mean
    seg = segment(model, data)
    noise = seg.reward.new_zeros(*seg.reward.shape, 0)
    want = forced_mse(model, seg, noise, alpha, model.condition(torch.zeros(1, 0)))[0] / 4
    torch.testing.assert_close(model.loss(seg, noise)[0], want)


def test_sparse_forcing_replaces_what_is_seen_at_every_interval():
    model, data = build(Shallow(7), latent=5, forcing=Sparse(3)), dataset()
    model.prepare(data.windows(8))
    seg = segment(model, data, length=8)
    x = model.observed(seg.obs)
    z = torch.cat([x[:, 0], x[:, 0] @ model.theta["L"].mT], -1)
    error = []
    for t in range(8):
        z = model.step(z, StepInput(seg.act[:, t], z[:, :0], seg.dt[:, t]), ())[0]
        error.append((z[:, :3] - x[:, t + 1]) ** 2)
        if (t + 1) % 3 == 0:
            z = torch.cat([x[:, t + 1], z[:, 3:]], -1)
    torch.testing.assert_close(model.loss(seg, seg.reward)[0], torch.stack(error).mean())


def test_growth_has_its_three_readings():
    g = gen()
    J = torch.randn(2, 5, 3, 3, generator=g, dtype=torch.float64)
    norm = lambda x: torch.linalg.matrix_norm(x, 2)
    torch.testing.assert_close(growth(J, "product"), norm(J).prod(1) ** 0.2)
    torch.testing.assert_close(growth(J, "arithmetic"), norm(J.mean(1)))
    product = J[:, 4] @ J[:, 3] @ J[:, 2] @ J[:, 1] @ J[:, 0]
    torch.testing.assert_close(growth(J, "exact"), norm(product) ** 0.2)
    assert growth(100 * torch.randn(1, 500, 3, 3, generator=g), "exact").isfinite().all()  # 100^500 is not a float


def test_adaptive_strength_rises_at_once_and_falls_slowly():
    """z' = 2 z: kappa = 2 wherever one looks, so that alpha goes to 1 - 1/2."""
    kind, forcing = AlmostLinear(0), Adaptive(decay=0.9, every=5)
    p = {"A": torch.full((2, 3), 2.0), "W": torch.zeros(2, 3, 3)}
    signal = torch.randn(2, 4, 6, 3, generator=gen())
    alpha = torch.tensor([0.1, 1.0])
    torch.testing.assert_close(plrnn.estimate(kind, forcing, p, alpha, 10, signal), torch.tensor([0.5, 0.95]))
    assert torch.equal(plrnn.estimate(kind, forcing, p, alpha, 11, signal), alpha)
    calm = {"A": torch.full((2, 3), 0.5), "W": torch.zeros(2, 3, 3)}  # contracts: nothing to force
    torch.testing.assert_close(plrnn.estimate(kind, forcing, calm, alpha, 0, signal), torch.tensor([0.09, 0.9]))


def test_adaptive_strength_is_that_of_the_sequence_that_grows_most():
    """z_2' = z_2 / 2 + 3.5 max(z_2, 0): one sequence where the rectifier is open, and one where it is shut."""
    kind, forcing = AlmostLinear(1), Adaptive(decay=0.0, every=1)
    p = {"A": torch.tensor([[0.5, 0.5]]), "W": torch.tensor([[[0.0, 0.0], [0.0, 3.5]]])}
    signal = torch.tensor([1.0, -1.0])[None, :, None, None].expand(1, 2, 6, 2)
    each = growth(jacobian(kind, p, signal.flatten(1, 2)).unflatten(1, (2, 6)), "product")[0]
    torch.testing.assert_close(each, torch.tensor([4.0, 0.5]))
    got = plrnn.estimate(kind, forcing, p, torch.zeros(1), 0, signal)
    torch.testing.assert_close(got, torch.tensor([0.75]))


def test_the_regularisers_are_their_formulae():
    model = build(Shallow(7), latent=5, readout="affine", latent_decay=0.3, readout_decay=0.2)
    p = {k: v.detach() for k, v in model.theta.items()}
    shrunk = sum((p[k] ** 2).sum() for k in ("W1", "W2", "h1", "h2", "C")) + ((1 - p["A"]) ** 2).sum()
    s = torch.linalg.eigvalsh(p["B"].T @ p["B"]).clamp(min=0).sqrt()[-3:]  # of rank 3, the least first
    want = 0.3 * shrunk + 0.2 * (1 - s[-1] / s[0]) ** 2
    torch.testing.assert_close(plrnn.decay(model.config, model.params()), want[None])


@pytest.mark.parametrize("clip", [None, 0.5])
def test_each_seeds_gradient_is_clipped_by_its_own_norm(clip):
    p = {"A": torch.zeros(2, 3, requires_grad=True), "W": torch.zeros(2, 2, 2, requires_grad=True)}
    trainer = plrnn._Trainer(
        build(AlmostLinear(0), Spec(3)), p, torch.optim.SGD(p.values()), PlrnnFit(clip=clip), torch.ones(2)
    )
    given = {"A": torch.tensor([[3.0, 0, 0], [0.1, 0, 0]]), "W": torch.tensor([[[4.0, 0], [0, 0]], [[0.2, 0], [0, 0]]])}
    for k, x in p.items():
        x.grad = given[k].clone()
    trainer._guard()
    scale = torch.tensor([0.1 if clip else 1.0, 1.0])  # norms of 5 and 0.22
    torch.testing.assert_close(p["A"].grad, given["A"] * scale[:, None])
    torch.testing.assert_close(p["W"].grad, given["W"] * scale[:, None, None])


def test_annealed_strength_falls_exponentially_and_stays():
    go = lambda update: plrnn.estimate(
        Shallow(), Annealed(1.0, 0.01, 100), {}, torch.ones(1), update, torch.zeros(0)
    ).item()
    assert [go(u) for u in (0, 50, 100, 500)] == pytest.approx([1.0, 0.1, 0.01, 0.01])


def test_advance_writes_the_schedule_that_a_fit_saves():
    model, data = build(Shallow(7), forcing=Annealed(1.0, 0.01, 100)), dataset()
    model.prepare(data.windows(6))
    for _ in range(50):
        model.advance(segment(model, data))
    assert model.alpha.item() == pytest.approx(0.1)
    assert set(model.schedules) == {"alpha", "updates"} <= set(model.state_dict())


# ---------------------------------------------------------------- the fast ways


def trained(
    solver, kind, forcing, readout="identity", latent=None, seeds=(0, 1), resume=None, epochs=2, keep=None, **kw
):
    data = kw.pop("data", None) or dataset(80, episodes=2)
    models = [build(kind, seed=s, forcing=forcing, readout=readout, latent=latent, **kw) for s in seeds]
    config = PlrnnFit(epochs=epochs, batches=3, batch=9, length=11, lr=1e-2, lr_end=1e-3, solver=solver)
    saved = []
    save = lambda state: saved.append({k: v.clone() for k, v in state.items()})
    report = fit_plrnn(models, data, config, [gen(s + 50) for s in seeds], checkpoint=save, resume=resume)
    return models, report, saved


def same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.state_dict(), y.state_dict(), rtol=1e-7, atol=1e-9)


FORCINGS = {"constant": Constant(0.3), "sparse": Sparse(4), "full": Constant(1.0), "free": Constant(0.0)}


@needs_compiler
@pytest.mark.parametrize("forcing", FORCINGS.values(), ids=FORCINGS)
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize(("readout", "latent"), [("identity", None), ("identity", 5), ("affine", 4), ("affine", 2)])
def test_compiled_training_is_training_by_the_loop(forcing, clipped, readout, latent):
    a = trained("compiled", Shallow(13, clipped), forcing, readout, latent)
    b = trained("loop", Shallow(13, clipped), forcing, readout, latent)
    same(a[0], b[0])
    assert (a[1].solver, b[1].solver) == ("compiled", "loop")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_parallel_training_is_training_by_the_loop(kind):
    a, b = trained("parallel", kind, Constant(0.4), latent=4), trained("loop", kind, Constant(0.4), latent=4)
    same(a[0], b[0])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("solver", ["auto", "loop"])
def test_one_update_is_the_gradient_of_the_loss(kind, solver):
    """RAdam's first step without rectification is lr * gradient / (1 - beta1) * (1 - beta1): plain descent."""
    data = dataset(80)
    kw = {"latent_decay": 0.01, "noise": True, "reward": True, "latent": 4}
    model, twin = (build(kind, forcing=Constant(0.3), **kw) for _ in range(2))
    config = PlrnnFit(epochs=1, batches=1, batch=9, length=11, lr=1e-2, solver=solver)
    fit_plrnn([model], data, config, [gen(5)])
    twin.observed.fit(torch.cat([data.obs, data.next_obs[-1:]]))
    twin.rewarded.fit(data.reward[:, None])
    index = torch.randint(80 - 11 + 1, (1, 9), generator=gen(5))[0]
    seg = data.windows(11, index)
    twin.loss(seg, seg.reward)[0].backward()
    for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p - 0.01 * p.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_no_thread_outlives_the_call_that_began_it(monkeypatch):
    """It would write to memory that is another's by then."""
    J, done = torch.zeros(20, 2, 2), []

    def work(first, *rest):
        if first.value == 0:
            raise KeyboardInterrupt
        time.sleep(0.1)
        done.append(first.value)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(compiled, "library", lambda *of: types.SimpleNamespace(spectral=work))
    with pytest.raises(KeyboardInterrupt):
        forced.spectral(J)
    assert done == [10]


@needs_compiler
def test_the_compiled_loop_in_both_types_and_for_any_number_of_rows_and_threads():
    threads = torch.get_num_threads()
    g = gen(3)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    seeds, m, hidden, time = 3, 4, 11, 17
    for rows in (1, 5, 8, 19):
        args = [draw(seeds, m) * 0.3, draw(seeds, m, hidden) * 0.3, draw(seeds, hidden, m), draw(seeds, hidden)]
        args += [draw(seeds, rows, m), draw(seeds, rows, time, m)]
        args = [x.requires_grad_() for x in args]
        signal, weight = draw(seeds, rows, time, m), draw(seeds, rows, time, m)
        keep = torch.rand(seeds, time, m, generator=g, dtype=torch.float64).round(decimals=1)
        keep[:, ::5] = 0.0
        signal[(keep == 1)[:, None].expand_as(signal)] = torch.nan  # what is not read may be anything
        A, W1, W2, h2, x, drive = args
        out = []
        for t in range(time):
            u = x @ W2.mT
            y = A[:, None] * x + (torch.relu(u + h2[:, None]) - torch.relu(u)) @ W1.mT + drive[:, :, t]
            k = keep[:, None, t]
            x = torch.where(k == 1, y, k * y + (1 - k) * signal[:, :, t].nan_to_num())
            out.append(y)
        want = torch.stack(out, 2)
        grads = torch.autograd.grad(want, args, weight)
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
            cast = [x.detach().to(dtype).requires_grad_() for x in args]
            results = []
            for count in (1, 3):
                torch.set_num_threads(count)
                got = forced.forced(*cast, signal.to(dtype), keep.to(dtype), True)
                results.append((got, *torch.autograd.grad(got, cast, weight.to(dtype))))
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "threads change the numbers"
            for a, b in zip(results[0], (want, *grads), strict=True):
                assert ((a - b).norm() / b.norm()).item() < tolerance


@needs_compiler
@pytest.mark.parametrize("clipped", [True, False])
def test_compiled_jacobians_and_spectral_norms_are_those_of_torch(clipped):
    g, kind = gen(3), Shallow(11, clipped)
    for m, rows in ((1, 3), (4, 9), (8, 21)):
        one = [kind.init(m, g) for _ in range(2)]
        p = {k: torch.stack([x[k] for x in one]).double() for k in one[0]} | {
            "h2": torch.randn(2, 11, generator=g).double()
        }
        x = torch.randn(2, rows, m, generator=g, dtype=torch.float64)
        J = forced.jacobians(p["A"], p["W1"], p["W2"], p["h2"], x, clipped)
        torch.testing.assert_close(J, jacobian(kind, p, x))
        torch.testing.assert_close(forced.spectral(J), torch.linalg.matrix_norm(J, 2), rtol=3e-6, atol=0)
    close = torch.diag(torch.tensor([1.0, 1 - 1e-5, 0.3], dtype=torch.float64))  # squaring parts these slowly
    J = torch.stack([close, 0 * close, 1e-9 * close, 1e9 * close])
    want = torch.tensor([1.0, 0.0, 1e-9, 1e9], dtype=torch.float64)
    torch.testing.assert_close(forced.spectral(J), want, rtol=3e-6, atol=0)
    torch.testing.assert_close(forced.spectral(J[:, None].float()), want[:, None].float(), rtol=4e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize("estimator", ["product", "arithmetic", "exact"])
def test_the_compiled_estimate_is_that_of_torch(estimator, monkeypatch):
    kind, one = Shallow(11), Shallow(11).init(3, gen())
    p = {k: (3 * v).expand(2, *v.shape) for k, v in one.items()}
    signal = torch.randn(2, 4, 6, 3, generator=gen(1))
    go = lambda: plrnn.estimate(kind, Adaptive(estimator), p, torch.zeros(2), 0, signal)
    fast = go()
    monkeypatch.setenv("MBRL_COMPILE", "0")
    torch.testing.assert_close(fast, go(), rtol=1e-5, atol=1e-6)
    assert (fast > 0.01).all()


def test_without_a_compiler_training_goes_on_and_says_why(monkeypatch):
    monkeypatch.setenv("MBRL_COMPILE", "0")
    assert trained("auto", Shallow(7), Constant(0.3))[1].solver == "loop"
    with pytest.raises(ValueError, match="MBRL_COMPILE is 0"):
        trained("compiled", Shallow(7), Constant(0.3))


def test_a_compiler_that_fails_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    bad = tmp_path / "cc"
    bad.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("CC", str(bad))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kept in (compiled._fault, compiled.library):
        kept.cache_clear()
    try:
        assert "out of luck" in forced.problem()
        assert trained("auto", Shallow(7), Constant(0.3))[1].solver == "loop"
    finally:
        for kept in (compiled._fault, compiled.library):
            kept.cache_clear()


def test_seeds_trained_together_are_seeds_trained_alone():
    both, _, _ = trained("auto", Shallow(13), Adaptive())
    for seed in (0, 1):
        alone, _, _ = trained("auto", Shallow(13), Adaptive(), seeds=(seed,))
        same(alone, both[seed : seed + 1])


def test_a_resumed_fit_gives_the_numbers_of_an_uninterrupted_one():
    whole, report, saved = trained("auto", Shallow(13), Adaptive(), epochs=4)
    again, second, _ = trained("auto", Shallow(13), Adaptive(), epochs=4, resume=saved[1])
    for a, b in zip(whole, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert (report.loss, report.alpha, report.updates) == (second.loss, second.alpha, second.updates)
    with pytest.raises(ValueError, match="other models' state"):
        trained("auto", Shallow(14), Adaptive(), resume=saved[0])


def test_a_seed_whose_gradient_is_not_finite_is_counted_and_the_others_go_on():
    data = dataset(80)
    models = [build(Shallow(7), seed=s, forcing=Constant(0.0)) for s in (0, 1)]
    models[0].theta["A"].data.fill_(1e40)  # overflows within the window
    config = PlrnnFit(epochs=1, batches=3, batch=4, length=20, lr=1e-2)
    report = fit_plrnn(models, data, config, [gen(1), gen(2)])
    assert report.skipped == [3, 0]
    assert models[1].theta["A"].isfinite().all()


def test_windows_stay_within_their_episodes():
    data = dataset(12, episodes=3)
    track = plrnn.Track(data, 11, torch.zeros((), dtype=torch.float64))
    assert track.first.tolist() == [0, 1, 13, 14, 26, 27]
    window = track.window(torch.tensor([[13, 27]]))
    want = data.windows(11, torch.tensor([12, 25]))
    assert torch.equal(window.obs[0], want.obs)
    assert torch.equal(window.act[0], want.act)
    with pytest.raises(ValueError, match="no episode of the data has 13 steps"):
        plrnn.Track(data, 13, torch.zeros(()))


def test_the_fit_learns_a_linear_system():
    data = dataset(300, seed=4)
    model = PlrnnConfig(Shallow(50, clipped=False), forcing=Constant(0.8)).build(SPEC, gen())
    report = fit_plrnn([model], data.to(torch.float32), PlrnnFit(25, 20, 16, 10, lr=3e-2, lr_end=1e-3), [gen(1)])
    assert report.loss[-1][0] < 1e-2 < 1e-1 < report.loss[0][0]


# ---------------------------------------------------------------- heads, random features


def test_the_noise_head_tells_the_noise_and_the_reward_head_the_reward():
    g = gen(7)
    x = torch.randn(3000, 1, generator=g)
    obs = torch.cat([x[:-1], torch.randn(2999, 1, generator=g)], 1)
    loud = torch.where(obs[:, 1:] > 0, 1.0, 0.1)  # the second dimension tells how noisy the first will be
    after = torch.cat([0.5 * obs[:, :1] + loud * torch.randn(2999, 1, generator=g), obs[:, 1:] * 0.5], 1)
    yes, n = torch.ones(2999, dtype=torch.bool), 2999
    none = torch.zeros(n, 0)
    data = Dataset(obs, none, 3 * obs[:, 0], after, ~yes, yes, torch.arange(n + 1), none[0], none[0])
    model = PlrnnConfig(Shallow(20), noise=True, reward=True, forcing=Constant(1.0)).build(data.spec, gen())
    fit_plrnn([model], data, PlrnnFit(12, 50, 64, 1, lr=2e-2, lr_end=2e-3), [gen(1)])
    probe = torch.tensor([[0.5, 1.0], [0.5, -1.0]])
    inp = StepInput(torch.zeros(2, 0), torch.zeros(2, 3), torch.ones(2, 1))
    with torch.no_grad():
        _, pred = model.step(model.init(probe, ()), inp, ())
        many = StepInput(torch.zeros(8000, 0), torch.randn(8000, 3, generator=g), torch.ones(8000, 1))
        drawn = model.step(model.init(probe.repeat_interleave(4000, 0), ()), many, ())[1].obs[:, 0].view(2, 4000).std(1)
    assert pred.uncertainty["aleatoric"][0] > 3 * pred.uncertainty["aleatoric"][1]
    assert drawn.tolist() == pytest.approx([1.0, 0.1], rel=0.35)
    assert pred.reward.tolist() == pytest.approx([1.5, 1.5], abs=0.15)


def autoregressive(n=4000):
    """x' = 0.5 x + 0.3 e in two dimensions, the second of a tenth of the size; the reward is x_0 and noise of 0.2."""
    g, size = gen(5), torch.tensor([0.3, 0.03])
    x, noise = [torch.zeros(2)], torch.randn(n, 2, generator=g)
    for e in noise:
        x.append(0.5 * x[-1] + size * e)
    x, yes, none = torch.stack(x), torch.ones(n, dtype=torch.bool), torch.zeros(n, 0)
    reward = x[:-1, 0] + 0.2 * torch.randn(n, generator=g)
    return Dataset(x[:-1], none, reward, x[1:], ~yes, yes, torch.tensor([0, n]), none[0], none[0])


@pytest.mark.parametrize("readout", ["identity", "affine"])
@pytest.mark.parametrize("by", ["fit_plrnn", "fit"])
def test_constant_noise_is_what_one_step_misses(readout, by):
    data = autoregressive()
    config = PlrnnConfig(
        Shallow(10), readout=readout, forcing=Constant(0.9), noise="constant", reward=True, heads=(16,)
    )
    model = config.build(data.spec, gen())
    if by == "fit":
        fit(model, data, FitConfig(64, 1e-2, 5, max_epochs=6), gen(1))
    else:
        fit_plrnn([model], data, PlrnnFit(6, 50, 64, 5, lr=1e-2), [gen(1)])
    model.requires_grad_(False)
    cond, inp = model.condition(data.obs), StepInput(data.act, data.obs.new_zeros(4000, 3), data.obs[:, :1])
    pred = model.step(model.init(data.obs, cond), inp, cond)[1]
    error = torch.cat([pred.obs - data.next_obs, (pred.reward - data.reward)[:, None]], 1).abs().median(0).values
    error = error / 0.67449  # as large as normal errors of this median are
    std = (inp._replace(noise=x) for x in torch.eye(3)[:, None].expand(3, 4000, 3))
    moved = [model.step(model.init(data.obs, cond), x, cond)[1] for x in std]
    told = torch.stack([moved[0].obs[0, 0] - pred.obs[0, 0], moved[1].obs[0, 1] - pred.obs[0, 1]])
    told = torch.cat([told, (moved[2].reward - pred.reward)[:1]])
    torch.testing.assert_close(told, error, rtol=1e-3 if by == "fit_plrnn" else 0.1, atol=0)  # `fit` holds rows out
    assert told[:2].tolist() == pytest.approx([0.3, 0.03], rel=0.1)
    assert pred.uncertainty["aleatoric"][0].item() == pytest.approx(told.norm().item(), rel=1e-4)
    long = orbit(model, data.obs[:1], 4000, generator=gen(3))[0]
    assert long.std(0).tolist() == pytest.approx([0.3 / 0.75**0.5, 0.03 / 0.75**0.5], rel=0.25)


@pytest.mark.parametrize("noise", [True, "constant", False])
def test_a_noisy_orbit_is_the_steps_under_its_draws(noise, monkeypatch):
    spec = Spec(obs=3, act=1)
    model = PlrnnConfig(Shallow(8), readout="affine", latent=4, noise=noise).build(spec, gen())
    model.requires_grad_(False)
    if noise == "constant":
        model.residual.copy_(torch.tensor([0.01, 0.04, 0.09, 0.0]))
    obs, act = torch.randn(2, 3, generator=gen(1)), torch.randn(2, 5, 1, generator=gen(2))
    got = orbit(model, obs, 5, act, generator=gen(4))
    drawn, cond, want = torch.randn(5, 2, model.noise_dim, generator=gen(4)), model.condition(obs), []
    state = model.init(obs, cond)
    for t in range(5):
        state, pred = model.step(state, StepInput(act[:, t], drawn[t], torch.ones(2, 1)), cond)
        want.append(pred.obs)
    torch.testing.assert_close(got, torch.stack(want, 1))
    still = orbit(model, obs, 5, act)
    assert torch.equal(still, got) == (noise is False)
    monkeypatch.setattr(plrnn.forced, "serves", lambda x: False)
    torch.testing.assert_close(orbit(model, obs, 5, act, generator=gen(4)), got)


def test_constant_noise_is_that_of_the_parameters_which_a_fit_keeps():
    data, config = autoregressive(), PlrnnConfig(Shallow(10), forcing=Constant(0.9), noise="constant")
    model = config.build(data.spec, gen())

    def spoil(epoch, of, figures):
        if epoch == 3:
            with torch.no_grad():
                model.theta["A"].fill_(torch.nan)

    report = fit(model, data, FitConfig(64, 1e-2, 5, max_epochs=5), gen(1), spoil)
    assert report.diverged == 1
    want = model.residuals(data.obs, data.act, data.next_obs, data.reward)
    torch.testing.assert_close(model.residual, want, rtol=0.1, atol=0)


def test_random_features_leave_noise_of_their_own_size():
    data, model = autoregressive(), PlrnnConfig(Shallow(10), noise="constant").build(Spec(2), gen())
    random_features(model, data, generator=gen(1))
    std = model.residual[:2].sqrt() * model.observed.std
    assert std.tolist() == pytest.approx([0.3, 0.03], rel=0.1)


@pytest.mark.parametrize("engine", ["compiled", "steps"])
def test_an_orbits_actions_are_one_for_each_step(engine, monkeypatch):
    if engine == "steps":
        monkeypatch.setattr(plrnn.forced, "serves", lambda x: False)
    model = build(Shallow(7), Spec(obs=3, act=2)).requires_grad_(False)
    obs, act = torch.randn(4, 3, generator=gen(1)), torch.randn(1, 9, 2, generator=gen(2))
    want = orbit(model, obs, 6, act[:, :6].expand(4, -1, -1))
    torch.testing.assert_close(orbit(model, obs, 6, act), want, rtol=0, atol=0)
    torch.testing.assert_close(orbit(model, obs, 6, act[0]), want, rtol=0, atol=0)
    for bad, steps in ((act, 10), (act[..., :1], 6), (act.expand(3, -1, -1), 6)):
        with pytest.raises(ValueError, match="orbit: the actions are"):
            orbit(model, obs, steps, bad)


def test_the_compiled_loop_refuses_what_it_would_read_beyond():
    p = {"A": (1, 3), "W1": (1, 3, 5), "W2": (1, 5, 3), "h2": (1, 5), "start": (1, 2, 3)}
    good = {k: torch.zeros(s) for k, s in p.items()}
    good |= {"drive": torch.zeros(1, 2, 4, 3), "signal": torch.zeros(1, 2, 4, 3), "keep": torch.ones(1, 4, 3)}
    plrnn.forced.forced(**good, clipped=True)
    for name, bad in (("keep", torch.ones(1, 3, 3)), ("start", good["start"].double()), ("W2", torch.zeros(1, 3, 5))):
        with pytest.raises(ValueError, match=f"forced: {name} is"):
            plrnn.forced.forced(**(good | {name: bad}), clipped=True)


def test_a_strength_that_falls_to_nothing_is_refused():
    for bad in (Annealed(0.0, 0.1, 5), Annealed(1.0, 0.0, 5)):
        with pytest.raises(ValueError, match="expected both to be positive"):
            build(Shallow(7), forcing=bad)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (Annealed(1, 3, 1), "Annealed: end is 3, expected 0 to 1"),
        (Adaptive(decay=2), "Adaptive: decay is 2, expected 0 to 1"),
        (Adaptive(decay=-1), "Adaptive: decay is -1"),
        (Adaptive(start=1.5), "Adaptive: start is 1.5"),
        (Adaptive(every=0), "Adaptive: every is 0, expected at least 1"),
    ],
)
def test_strengths_are_shares(bad, says):
    with pytest.raises(ValueError, match=says):
        build(Shallow(7), forcing=bad)


def test_intervals_of_several_lengths_are_refused():
    data = dataset(60)
    data = replace(data, dts=torch.where(torch.arange(60) < 30, 0.1, 0.5))
    with pytest.raises(ValueError, match="several lengths dt"):
        fit_plrnn([build(Shallow(7))], data, PlrnnFit(1, 1, 4, 5), [gen()])


def test_constant_noise_needs_every_state_observed():
    with pytest.raises(ValueError, match="constant noise needs every state observed, got 5 for 3 observed"):
        PlrnnConfig(Shallow(8), latent=5, noise="constant").build(Spec(obs=3), gen())


def test_heads_do_not_shape_the_dynamics():
    data = dataset(80)
    fits = []
    for heads in (False, True):
        model = PlrnnConfig(Shallow(7), forcing=Constant(0.3)).build(SPEC, gen()).double()
        full = PlrnnConfig(Shallow(7), forcing=Constant(0.3), noise=heads, reward=heads).build(SPEC, gen()).double()
        full.theta.load_state_dict(model.theta.state_dict())
        fit_plrnn([full], data, PlrnnFit(2, 3, 9, 11), [gen(1)])
        fits.append(full.theta.state_dict())
    torch.testing.assert_close(fits[0], fits[1])


def test_random_features_fit_a_map_in_one_solve():
    """The logistic map, well: and what ridge regression does not reach is told."""
    x = [0.3]
    for _ in range(2000):
        x.append(3.9 * x[-1] * (1 - x[-1]))
    x = torch.tensor(x, dtype=torch.float64)[:, None]
    n = 2000
    yes, none = torch.ones(n, dtype=torch.bool), torch.zeros(n, 0, dtype=torch.float64)
    data = Dataset(x[:-1], none, x[1:, 0], x[1:], ~yes, yes, torch.tensor([0, n]), none[0], none[0])
    model = PlrnnConfig(Shallow(200)).build(data.spec, gen()).double()
    error = random_features(model, data, 1e-9, gen(2))
    z = model.init(x[:-1], ())
    with torch.no_grad():
        _, pred = model.step(z, StepInput(none, none, x[:-1]), ())
    measured = ((pred.obs - x[1:]) / model.observed.std).square().mean().item()
    assert error == pytest.approx(measured, rel=1e-6)
    assert error < 1e-4
    with pytest.raises(ValueError, match="expected a shallow PLRNN"):
        random_features(build(AlmostLinear(1)), dataset())


# ---------------------------------------------------------------- bad input


def test_what_cannot_be_built_says_why():
    with pytest.raises(ValueError, match="latent is 2, expected at least 3"):
        PlrnnConfig(latent=2).build(SPEC)
    with pytest.raises(ValueError, match="rectified is 9"):
        PlrnnConfig(AlmostLinear(9)).build(SPEC)
    with pytest.raises(ValueError, match=r"alpha is 1\.5, expected 0 to 1"):
        PlrnnConfig(forcing=Constant(1.5)).build(SPEC)
    with pytest.raises(ValueError, match="interval is 0"):
        PlrnnConfig(forcing=Sparse(0)).build(SPEC)
    model = build(Shallow(7))
    seg = segment(model, dataset())
    with pytest.raises(ValueError, match="several lengths dt"):
        model.prepare(seg._replace(dt=torch.rand_like(seg.dt)))
    with pytest.raises(ValueError, match="the data are of"):
        fit_plrnn([model], dataset(spec=Spec(3)), PlrnnFit(1), [gen()])
    with pytest.raises(ValueError, match="2 models and 1 generators"):
        fit_plrnn([model, model], dataset(), PlrnnFit(1), [gen()])


def test_masked_steps_end_the_forcing_too():
    model, data = build(Shallow(7), forcing=Constant(1.0)), dataset()
    model.prepare(data.windows(6))
    seg = segment(model, data)
    short = Segment(*(x[:, : 4 if i else 5] if x.ndim > 1 else x for i, x in enumerate(seg)))
    mask = seg.mask.clone()
    mask[:, 4:] = False
    torch.testing.assert_close(model.loss(seg._replace(mask=mask), seg.reward)[0], model.loss(short, short.reward)[0])
    assert math.isfinite(model.validate(seg, seg.reward).item())


def test_noise_reaches_what_forces_and_not_what_is_compared():
    """Fully forced, a step's error is that of the map at noisy observations: a map that shrinks is preferred."""
    data = dataset(300, seed=4).to(torch.float32)
    shrunk = {}
    for noise in (0.0, 1.0):
        model = PlrnnConfig(AlmostLinear(0), forcing=Constant(1.0)).build(SPEC, gen())
        fit = PlrnnFit(25, 20, 16, 10, lr=3e-2, lr_end=1e-3, noise=noise)
        report = fit_plrnn([model], data, fit, [gen(1)])
        again = PlrnnConfig(AlmostLinear(0), forcing=Constant(1.0)).build(SPEC, gen())
        assert fit_plrnn([again], data, fit, [gen(1)]).loss == report.loss
        shrunk[noise] = torch.linalg.matrix_norm(torch.diag(model.theta["A"]) + model.theta["W"], 2).item()
    assert shrunk[1.0] < 0.7 * shrunk[0.0]  # regression dilution: by 1 / (1 + noise^2), the data being standardised
