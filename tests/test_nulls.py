"""The baselines, against statsmodels, closed forms and what each promises to keep."""

import numpy as np
import pytest
import torch
from scipy import signal

from mbrl import metrics
from mbrl.nulls import (
    GaussianConfig,
    Persistence,
    PersistenceConfig,
    Surrogate,
    SurrogateConfig,
    VarConfig,
    Varx,
    VarxConfig,
    driven_table,
    null_table,
)

close = torch.testing.assert_close
F64 = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=gen(seed), dtype=F64)


def series(length=600, seed=0):
    """A stable VAR(2) in three dimensions, with an offset."""
    a = torch.tensor([[0.5, 0.2, 0.0], [-0.3, 0.6, 0.1], [0.0, 0.1, 0.4]], dtype=F64)
    b = torch.tensor([[0.2, 0.0, 0.1], [0.0, -0.3, 0.0], [0.1, 0.0, 0.2]], dtype=F64)
    noise, x = normal(length, 3, seed=seed) @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0.2], [0, 0, 0.5]], dtype=F64), []
    for t in range(length):
        x.append(noise[t] + 1 if t < 2 else noise[t] + a @ x[-1] + b @ x[-2] + 1)
    return torch.stack(x)


def test_the_gaussian_has_the_datas_mean_and_covariance_and_no_memory():
    train = series()
    null = GaussianConfig().fit(train.float())
    run = null.free_run(200_000, gen())
    close(run.mean(0), train.mean(0), rtol=0.02, atol=0.02)
    close(run.T.cov(), train.T.cov(), rtol=0.03, atol=0.03)
    assert metrics.autocorrelation(run, 1)[1].abs().max() < 0.01
    got = null.forecast(train, 4)
    assert got.shape == (596, 4, 3)
    close(got, train.float().double().mean(0).expand(596, 4, 3))
    close(metrics.prediction_error(got, train), (train[4:] - train.mean(0)).square().mean())
    dependent = GaussianConfig().fit(train[:, [0, 0]]).free_run(50, gen())  # a singular covariance
    close(dependent[:, 0], dependent[:, 1])
    assert GaussianConfig().fit(train[:, :1]).free_run(5, gen()).shape == (5, 1)


@pytest.mark.parametrize("order", [1, 3])
def test_var_is_statsmodels(order):
    var = pytest.importorskip("statsmodels.tsa.api").VAR
    train = series()
    null, want = VarConfig(order).fit(train), var(train.numpy()).fit(order)
    close(null.intercept, torch.tensor(want.intercept))
    close(null.lags, torch.tensor(want.coefs))
    close(null.cov, torch.tensor(want.sigma_u))
    history = train[100 : 100 + order]
    close(null.predict(history[None], 6)[0], torch.tensor(want.forecast(history.numpy(), 6)))
    assert null.name == f"var({order})"


@pytest.mark.parametrize("criterion", ["aic", "bic"])
@pytest.mark.parametrize("length", [80, 600])
def test_the_order_is_statsmodels(criterion, length):
    var = pytest.importorskip("statsmodels.tsa.api").VAR
    train = series(length, seed=4)
    want = var(train.numpy()).select_order(8)
    assert 0 < want.selected_orders[criterion] < 8
    assert VarConfig(max_order=8, criterion=criterion).fit(train).history == want.selected_orders[criterion]


@pytest.mark.parametrize("delays", [2, 3])
def test_the_order_does_not_read_what_dimensions_say_of_each_other_exactly(delays):
    for seed in range(4):
        rng, x = np.random.default_rng(seed), [0.0]
        for _ in range(3000):
            x.append(0.8 * x[-1] + rng.standard_normal())
        embedded = torch.tensor(x, dtype=torch.float64).unfold(0, delays, 1)
        assert VarConfig().fit(embedded).history == 1


def test_an_ar_of_order_one_predicts_as_well_as_it_can():
    train = torch.tensor(signal.lfilter([1.0], [1.0, -0.8], normal(100_000).numpy()))[:, None]
    got = metrics.k_step_error(VarConfig(1).fit(train).forecast(train, 5), train)
    want = (1 - 0.8 ** (2 * torch.arange(1, 6, dtype=F64))) / (1 - 0.8**2)
    close(got, want, rtol=0.05, atol=0)


def test_dimensions_that_depend_on_each_other_are_no_trouble():
    wave = (torch.arange(400, dtype=F64) * 0.3).sin() + 0.1 * normal(400)
    embedded = torch.stack([wave[6:], wave[3:-3], wave[:-6]], 1)
    null = VarConfig(8).fit(embedded)
    assert null.lags.abs().max() < 10
    free = metrics.k_step_error(null.forecast(embedded, 3), embedded)
    best = metrics.k_step_error(VarConfig(14).fit(wave[:, None]).forecast(wave[:, None], 3), wave[:, None])
    assert free[0] < best[0]  # two of three dimensions are known exactly one step on
    assert metrics.prediction_error(null.forecast(embedded, 1)[..., 1:], embedded[:, 1:]) < 1e-20
    assert null.free_run(50, gen()).isfinite().all()


def test_a_free_run_of_a_var_goes_on_from_the_data_and_has_their_covariance():
    train = series(3000)
    null = VarConfig(2).fit(train)
    run = null.free_run(60_000, gen())
    close(run.mean(0), train.mean(0), rtol=0.05, atol=0.05)
    close(run.T.cov(), train.T.cov(), rtol=0.15, atol=0.15)
    lag = metrics.autocorrelation(run, 3) - metrics.autocorrelation(train, 3)
    assert lag.abs().max() < 0.05
    quiet = VarConfig(2).fit(train)
    quiet.cov.zero_()
    close(quiet.free_run(7, gen()), quiet.predict(train[None, -2:], 7)[0])
    residual = run[2:] - null.intercept - run[1:-1] @ null.lags[0].T - run[:-2] @ null.lags[1].T
    close(residual.T.cov(), null.cov, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("length", [200, 201])
def test_a_surrogate_keeps_what_is_linear_and_nothing_else(length):
    train = series(length) ** 2
    null = SurrogateConfig().fit(train)
    got, again = null.free_run(length, gen()), null.free_run(length, gen(1))
    assert not torch.allclose(got, again)
    spectra = [torch.fft.rfft(x, dim=0) for x in (train, got)]
    cross = [x[:, :, None] * x[:, None].conj() for x in spectra]
    close(cross[0], cross[1])
    close(got.mean(0), train.mean(0))
    close(got.T.cov(), train.T.cov())
    turn = (spectra[1] / spectra[0])[:, 0].angle()[1 : (length - 1) // 2]
    assert turn.abs().max() > 2.5  # all the way round
    assert abs(turn.mean()) < 0.5
    long = null.free_run(2 * length + 5, gen())
    close(long[:length], got)
    close(long[length : 2 * length], got)
    with pytest.raises(NotImplementedError, match="no predictions"):
        null.predict(train[None, :1], 3)


def test_persistence_stays():
    train = series(50)
    null = PersistenceConfig().fit(train)
    assert (null.free_run(9, gen()) == train[-1]).all()
    got = null.forecast(train, 3, chunk=10)
    close(got, train[:47, None].expand(-1, 3, -1))
    close(null.predict(train[None], 2), train[-1:].expand(1, 2, -1))


def test_forecasts_begin_where_there_is_enough_history():
    train = series(60)
    null = VarConfig(5).fit(train)
    got = null.forecast(train, 4, chunk=7)
    assert got.shape == (60 - 5 - 4 + 1, 4, 3)
    close(got[10], null.predict(train[None, 10:15], 4)[0])
    error = metrics.k_step_error(got, train)
    close(error[0], (got[:, 0] - train[5:57]).square().mean())


def test_the_table_gives_every_null_the_same_scores_by_the_same_protocol():
    train, test = series(500), series(400, seed=1)
    table = null_table(train, test, 3, generator=gen())
    order = VarConfig().fit(train).history
    assert list(table) == ["iid_gaussian", f"var({order})", "phase_surrogate", "persistence", "truth"]
    shapes = {"d_stsp_histogram30", "d_h_sigma20"}
    for name, row in table.items():
        assert set(row) == shapes | (set() if name in ("phase_surrogate", "truth") else {"pe_3"})
    assert table["truth"] == metrics.scores(test, train[:400], generator=gen())
    assert table["iid_gaussian"]["pe_3"] > table[f"var({order})"]["pe_3"]
    assert table["persistence"]["d_h_sigma20"] == 1
    fixed = metrics.scores(test, train[-1:].expand(400, -1), generator=gen())
    assert table["persistence"]["d_stsp_histogram30"] == fixed["d_stsp_histogram30"]
    run = metrics.settled(lambda steps: GaussianConfig().fit(train).free_run(steps, gen()), 400)
    want = metrics.scores(test, run, GaussianConfig().fit(train).forecast, 3, generator=gen())
    assert table["iid_gaussian"] == want  # the first to draw
    assert null_table(train, test, 3, generator=gen()) == table
    assert "var(4)" in null_table(train, test, 3, generator=gen(), order=4)
    short = null_table(train[:300], test, 3, generator=gen())
    assert "truth" not in short
    other = null_table(train[:300], test, 3, generator=gen(), truth=train[50:450])
    assert other["truth"] == metrics.scores(test, train[50:450], generator=gen())


def test_series_apart_are_one_fit_without_pairs_across_their_ends():
    parts = [series(60, seed=2), series(300), series(5, seed=3), series(2, seed=4)]
    null = VarConfig(3).fit(parts)
    rows = [(torch.cat([torch.ones(1), *x[t - 3 : t].flip(0)]), x[t]) for x in parts for t in range(3, len(x))]
    past, now = (torch.stack(x).to(F64) for x in zip(*rows, strict=True))
    want = torch.linalg.lstsq(past, now)
    close(null.intercept, want.solution[0])
    close(null.lags, want.solution[1:].reshape(3, 3, 3).mT)
    close(null.cov, (now - past @ want.solution).T @ (now - past @ want.solution) / (len(now) - 10))
    close(null.last, parts[1][-3:], rtol=0, atol=0)
    assert VarConfig().fit([x[:20] for x in [series()] * 9]).history >= 1
    close(GaussianConfig().fit(parts).mean, torch.cat(parts).mean(0))
    table = null_table(parts, series(200, seed=1), 3, generator=gen(), order=3)
    assert table["persistence"] == null_table(parts[1], series(200, seed=1), 3, generator=gen())["persistence"]
    assert table["truth"] == null_table(parts[1], series(200, seed=1), 3, generator=gen())["truth"]


def test_the_order_leaves_room_in_the_test_and_a_series_too_short_has_no_linear_row():
    delayed = normal(400, 1)
    for t in range(8, 400):  # x_t = 0.9 x_{t-8} + e_t
        delayed[t] += 0.9 * delayed[t - 8]
    assert VarConfig().fit(delayed).history == 8
    (name,) = (x for x in null_table(delayed, delayed[:23], 19, generator=gen()) if x.startswith("var("))
    assert int(name[4:-1]) <= 4
    wide = normal(60, 30)
    assert VarConfig.most(wide) == 0
    assert list(null_table(wide, normal(50, 30, seed=1), 3, generator=gen())) == [
        "iid_gaussian", "phase_surrogate", "persistence", "truth"
    ]  # fmt: skip


def test_wide_series_are_scored_by_the_mixture():
    wide = torch.cat([series(300), series(300, seed=1)], 1)
    table = null_table(wide[:150], wide[150:], 2, generator=gen())
    assert all("d_stsp_mixture1" in row for row in table.values())
    assert np.isfinite([v for row in table.values() for v in row.values()]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianConfig().fit(normal(5)), r"expected \[T >= 2, N\]"),
        (lambda: SurrogateConfig().fit(normal(5, 2) / 0), "finite numbers"),
        (lambda: VarConfig(4).fit(normal(18, 3)), r"order 4, .*expected an order of 1 \.\. 3"),
        (lambda: VarConfig(0).fit(normal(20, 3)), r"expected an order of 1"),
        (lambda: VarConfig().fit(normal(6, 3)), r"order None, .*which the data can carry"),
        (lambda: Persistence(normal(2)).forecast(normal(5, 2), 5), "expected at least 6"),
        (lambda: Surrogate(normal(5, 2)).forecast(normal(5, 2), 6), "expected at least 6"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- driven systems


def pushed(length, seed=0):
    """x' = A x + B s + 0.1, exactly, and its inputs."""
    A, B = torch.tensor([[0.8, 0.3], [-0.4, 0.7]], dtype=F64), torch.tensor([[0.5], [1.0]], dtype=F64)
    drive, out = normal(length - 1, 1, seed=seed), [normal(2, seed=seed + 1)]
    for s in drive:
        out.append(A @ out[-1] + B @ s + 0.1)
    return torch.stack(out), drive, A, B


def test_a_varx_is_the_linear_system_it_was_given():
    obs, act, A, B = pushed(200)
    null = VarxConfig(1).fit(obs, act)
    close(null.lags[0], A)
    close(null.inputs[0], B)
    close(null.intercept, torch.full((2,), 0.1, dtype=F64))
    assert null.name == "varx(1)"
    close(null.run(obs[None, :1], act[None])[0], obs[1:])
    close(VarxConfig(3).fit(obs, act).run(obs[None, 5:8], act[None, 5:20])[0], obs[8:21])


def test_a_varx_is_statsmodels_with_its_own_lags():
    """An input that acts with a delay, and noise."""
    from statsmodels.api import OLS

    g, (obs, act, *_) = gen(3), pushed(400)
    obs = obs + 0.1 * torch.randn(obs.shape, generator=g, dtype=F64)
    null = VarxConfig(2).fit(obs, act)
    x = torch.cat([torch.ones(398, 1, dtype=F64), obs[1:-1], act[1:], obs[:-2], act[:-1]], 1)
    want = OLS(obs[2:].numpy(), x.numpy()).fit().params
    got = torch.cat([null.intercept[None], null.lags[0].T, null.inputs[0].T, null.lags[1].T, null.inputs[1].T])
    close(got, torch.from_numpy(want))


def test_driven_nulls_are_judged_as_models_are():
    (obs, act, *_), (true, drive, *_) = pushed(300), pushed(200, seed=9)
    table = driven_table((obs, act), (true, drive), 5, generator=gen(), order=3)
    assert list(table) == ["varx(3)", "persistence"]
    exact, still = table["varx(3)"], table["persistence"]
    assert max(exact["rmse"]) < 1e-6 < 0.1 < min(still["rmse"])
    assert exact["pe_5"] < 1e-10
    close(torch.tensor(still["rmse"], dtype=F64), (true[1:] - true[0]).square().mean(0).sqrt())
    close(torch.tensor(still["pe_5"], dtype=F64), (true[5:] - true[:-5]).square().mean())
    assert {"d_stsp_histogram30", "d_h_sigma20"} <= set(exact)


def duffing(steps, seed):
    """A noise-free hardening oscillator, x'' = -x - x^3 - 0.2 x' + s, of float32, its inputs held for 20 samples."""
    rng, x, out, acts = np.random.default_rng(seed), np.array([0.1, 0.0]), [], []
    field = lambda x, s: np.array([x[1], -x[0] - x[0] ** 3 - 0.2 * x[1] + s])
    levels = rng.uniform(-1, 1, -(-steps // 20))
    for s in np.repeat(levels, 20)[:steps]:
        out.append(x)
        acts.append([s])
        k1 = field(x, s)
        k2 = field(x + 0.05 * k1, s)
        k3 = field(x + 0.05 * k2, s)
        k4 = field(x + 0.1 * k3, s)
        x = x + 0.1 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return torch.tensor(np.array(out)).float(), torch.tensor(np.array(acts)).float()


def test_the_varx_of_nearly_collinear_lags_does_not_explode():
    """Plain least squares of ten lags does: the free run of the null must be the best linear one."""
    (obs, act), (true, drive) = duffing(200, 3), duffing(700, 4)
    rmse = lambda null: (
        (null.run(true[None, : len(null.lags)], drive[None, :-1])[0] - true[len(null.lags) :]).square().mean().sqrt()
    )
    many, best = VarxConfig(10).fit(obs, act), VarxConfig().fit(obs, act)
    assert not many.stable
    assert rmse(many) > 1e20
    assert best.stable
    fixed = [VarxConfig(p).fit(obs, act) for p in range(1, 11)]
    assert rmse(best) < 1.05 * min(rmse(x) for x in fixed if x.stable)
    table = driven_table((obs, act), (true, drive), 5, generator=gen())
    own = torch.tensor(table[best.name]["rmse"])
    assert own.square().mean().sqrt() == pytest.approx(float(rmse(best)), rel=1e-5)
    assert (own < true.std(0)).all()


@pytest.mark.parametrize(("steps", "seed"), [(200, 0), (100, 3), (100, 5)])
def test_an_unstable_varx_is_taken_only_where_none_is_stable(steps, seed):
    (obs, act), (true, _) = duffing(steps, seed), duffing(400, seed + 1)
    best = VarxConfig().fit(obs, act)
    assert best.stable
    rest = best.run(true[None, : len(best.lags)], torch.zeros(1, 5000 + len(best.lags), 1))
    assert rest.abs().max() < 100
    drive, out = normal(299, 1), [torch.ones(1, dtype=F64)]
    for s in drive:
        out.append(1.05 * out[-1] + s)
    grown = VarxConfig().fit(torch.stack(out), drive)
    assert not grown.stable
    close(grown.lags[0], torch.tensor([[1.05]], dtype=F64), rtol=1e-3, atol=0)


def test_a_ridge_makes_stable_what_no_order_is():
    """An integrator whose noise makes every plain fit grow."""
    drive = normal(119, 1, seed=33)
    obs = torch.cat([torch.zeros(1, 1, dtype=F64), (drive + 0.1 * normal(119, 1, seed=1033)).cumsum(0)])
    assert not any(VarxConfig(p).fit(obs, drive).stable for p in range(1, 11))
    null = VarxConfig().fit(obs, drive)
    assert null.stable
    close(null.lags[0], torch.ones(1, 1, dtype=F64), rtol=0.01, atol=0)


def test_orders_are_judged_on_what_they_were_not_fitted_to():
    """A free run over its own training data would take seven lags or eight of these."""
    for seed in range(4):
        obs, act, *_ = pushed(90, seed=10 * seed)
        assert len(VarxConfig(max_order=8).fit(obs + 0.5 * normal(90, 2, seed=99 + seed), act).lags) <= 5


def test_the_order_of_a_varx_is_the_smallest_that_serves():
    obs, act, *_ = pushed(300)
    null = VarxConfig().fit(obs, act)
    assert null.name == "varx(1)"
    delayed = [torch.zeros(1, dtype=F64)] * 3  # x_{t+1} = 0.5 x_{t-1} + s_{t-2}, with noise
    noise = 0.01 * normal(600, 1, seed=5)
    drive = normal(599, 1)
    for t in range(2, 599):
        delayed.append(0.5 * delayed[t - 1] + drive[t - 2] + noise[t])
    late = VarxConfig().fit(torch.stack(delayed), drive)
    assert late.name == "varx(3)"
    close(late.inputs[2], torch.ones(1, 1, dtype=F64), rtol=0.01, atol=0)
    assert len(VarxConfig(max_order=2).fit(torch.stack(delayed), drive).lags) <= 2


def test_stability_is_that_of_the_companions_eigenvalues():
    made = lambda *lags: Varx(
        torch.zeros(1, dtype=F64), torch.tensor(lags, dtype=F64)[:, None, None], torch.zeros(len(lags), 1, 1, dtype=F64)
    )
    assert made(0.5, 0.49).stable
    assert not made(0.5, 0.51).stable
    assert made(1.0).stable  # an integrator
    assert not made(0.2, -1.1).stable
    turn = torch.tensor([[[0.6, -0.8], [0.8, 0.6]]], dtype=F64)  # a rotation
    assert Varx(torch.zeros(2), turn, torch.zeros(1, 2, 1)).stable
    assert not Varx(torch.zeros(2), 1.01 * turn, torch.zeros(1, 2, 1)).stable


def test_an_input_that_never_changes_has_no_say():
    obs, act, A, _ = pushed(200)
    still = torch.cat([act, torch.full_like(act, 0.3)], 1)
    null = VarxConfig(1).fit(obs, still)
    close(null.lags[0], A)
    assert not null.inputs[0][:, 1].any()


def test_a_short_test_series_bounds_the_order():
    obs, act = duffing(200, 3)
    order = len(VarxConfig().fit(obs, act).lags)
    assert order > 2
    table = driven_table((obs, act), (obs[:10], act[:10]), 8, generator=gen())
    assert set(table) <= {"varx(1)", "varx(2)", "persistence"}
    assert all(np.isfinite(x["pe_8"]) for x in table.values())


def test_a_series_too_short_for_a_varx_is_refused():
    obs, act, *_ = pushed(12)
    with pytest.raises(ValueError, match="got 12 steps and order 4, expected more than 17 steps"):
        VarxConfig(4).fit(obs, act)
    with pytest.raises(ValueError, match=r"got 14 steps and max_order 10, expected .* at least 18 steps"):
        VarxConfig().fit(*pushed(14)[:2])
    assert VarxConfig().fit(*pushed(18)[:2]).name == "varx(1)"
    with pytest.raises(ValueError, match="max_order 0"):
        VarxConfig(max_order=0).fit(*pushed(200)[:2])
    short, long = pushed(14)[:2], pushed(60)[:2]
    assert list(driven_table(short, long, 3, generator=gen())) == ["persistence"]


def test_further_driven_series_are_fitted_without_pairs_across_their_ends():
    parts = [(x + 0.1 * normal(*x.shape, seed=9), u) for x, u in (pushed(n, seed=n)[:2] for n in (60, 40, 2))]
    null = VarxConfig(2).fit(*parts[0], parts[1:])
    lagged = lambda x, u, t: torch.cat([torch.ones(1, dtype=F64), x[t], u[t], x[t - 1], u[t - 1]])
    rows = [(lagged(x, u, t), x[t + 1]) for x, u in parts for t in range(1, len(x) - 1)]
    past, now = (torch.stack(x) for x in zip(*rows, strict=True))
    want = torch.linalg.lstsq(past, now).solution
    close(null.intercept, want[0])
    close(torch.cat([null.lags, null.inputs], 2).mT.flatten(0, 1), want[1:])
