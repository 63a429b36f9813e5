"""Metrics against closed forms, published constants and independent libraries."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, ndimage, stats

from mbrl import metrics
from mbrl.core import Dynamics, Markov, Prediction, Spec, StepInput, pull
from mbrl.dynamics.single import SingleConfig
from mbrl.metrics import Nrmse, Smape

close = torch.testing.assert_close
F64 = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=gen(seed), dtype=F64)


def smooth(*shape, seed=0):
    """Series with a spectrum, on dimensions of several sizes."""
    walk = normal(*shape, seed=seed).cumsum(-2)
    return (walk - walk.roll(7, -2)) * torch.logspace(-1, 1, shape[-1], dtype=F64) + 3


# ---------------------------------------------------------------- the attractor


def dense_kl(true, generated, bins, margin, laplace):
    true, generated = true.numpy(), generated.numpy()
    pad = margin * true.std(0)
    box = list(zip(true.min(0) - pad, true.max(0) + pad, strict=True))
    p, q = (np.histogramdd(x, bins, box)[0] + laplace for x in (true, generated))
    return stats.entropy((p / p.sum()).ravel(), (q / q.sum()).ravel())


@pytest.mark.parametrize(
    ("width", "bins", "margin", "laplace"), [(1, 30, 0.1, 1e-5), (2, 30, 0.1, 1e-5), (3, 7, 0.0, 0.5)]
)
def test_the_sparse_histogram_is_the_dense_one(width, bins, margin, laplace):
    true, generated = normal(2000, width), 1.3 * normal(3, 1500, width, seed=1) + 0.2  # some lie outside
    got = metrics.d_stsp_histogram(true, generated, bins, margin, laplace)
    want = [dense_kl(true, x, bins, margin, laplace) for x in generated]
    close(got, torch.tensor(want, dtype=F64), rtol=1e-9, atol=0)
    few = metrics.d_stsp_histogram(true[:9], generated[0], 30, 3.0, laplace)  # where the std's definition tells
    assert few.item() == pytest.approx(dense_kl(true[:9], generated[0], 30, 3.0, laplace))
    one = metrics.d_stsp_histogram(true, generated[1], bins, margin, laplace)
    assert one.shape == ()
    close(one, got[1])


def test_the_histograms_defaults_and_its_ends():
    true = normal(500, 2)
    assert metrics.d_stsp_histogram(true, true).item() == pytest.approx(0, abs=1e-12)
    got = metrics.d_stsp_histogram(true.float(), true.flip(1).float())
    close(got, torch.tensor(dense_kl(true.float().double(), true.flip(1).float().double(), 30, 0.1, 1e-5), dtype=F64))
    grid = torch.tensor([[0.0], [0.0], [0.5], [1.0]], dtype=F64)  # both ends belong to the range
    got = metrics.d_stsp_histogram(grid, grid[:2], bins=2, margin=0.0, laplace=1.0)
    close(got.item(), 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))


def test_a_series_outside_scores_as_uniform_and_one_that_is_not_finite_is_infinitely_far():
    true = normal(1000, 5)
    edges = [np.linspace(x.min() - 0.1 * x.std(), x.max() + 0.1 * x.std(), 31) for x in true.T.numpy()]
    cell = np.stack([np.digitize(x, e) for x, e in zip(true.T.numpy(), edges, strict=True)])
    p = np.unique(cell, axis=1, return_counts=True)[1]
    cells, total = 30.0**5, 1000 + 1e-5 * 30.0**5
    p = (p + 1e-5) / total
    entropy = -(p * np.log(p)).sum() - (cells - len(p)) * 1e-5 / total * math.log(1e-5 / total)
    broken = true.clone()
    broken[7, 2] = torch.nan
    got = metrics.d_stsp_histogram(true, torch.stack([true + 100, broken, true - torch.inf]))
    assert got[0].item() == pytest.approx(math.log(cells) - entropy, rel=1e-9)
    assert got[1:].tolist() == [math.inf] * 2
    assert metrics.d_stsp_mixture(true, torch.stack([true, broken]), gen())[1] == torch.inf


@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_the_mixture_of_one_point_each_is_the_closed_form(variance):
    a, b = normal(1, 7), normal(1, 7, seed=1)
    samples = 200_000
    got = metrics.d_stsp_mixture(a, b, gen(), variance, samples=samples).item()
    want = ((a - b) ** 2).sum().item() / (2 * variance)
    assert abs(got - want) < 5 * (2 * want / samples) ** 0.5  # the log-ratio's standard deviation is |a - b| / sigma
    far = metrics.d_stsp_mixture(a, b + 1e4, gen(), variance).item()
    assert far == pytest.approx(((a - b - 1e4) ** 2).sum().item() / (2 * variance), rel=1e-2)


def test_the_mixture_is_a_mean_of_log_ratios_of_gaussian_kernel_densities(monkeypatch):
    true, generated = normal(300, 6), 1.5 * normal(2, 120, 6, seed=1)
    drawn = []
    inner = metrics._log_mixture
    monkeypatch.setattr(metrics, "_log_mixture", lambda x, c, v: (drawn.append((x, c)), inner(x, c, v))[1])
    monkeypatch.setattr(metrics, "PIECE", 5000)  # several chunks
    got = metrics.d_stsp_mixture(true, generated, gen(), points=150, samples=100)

    def logs(x, centres):
        density = [stats.multivariate_normal(c.numpy()).pdf(x.numpy()) for c in centres]
        return np.log(np.mean(density, 0))

    assert [len(c) for _, c in drawn] == [150, 120, 120]
    close(drawn[0][1] - drawn[0][1][:1], true[:150] - true[:1])
    close(drawn[1][1] - drawn[0][1][:1], generated[0, :150] - true[:1])
    want = [(logs(x, drawn[0][1]) - logs(x, c)).mean() for x, c in drawn[1:]]
    close(got, torch.tensor(want, dtype=F64))
    x = drawn[0][0]
    assert len(x) == 100
    assert ((x[:, None] - drawn[0][1]).square().sum(-1).amin(1).mean() < 6).item()  # drawn from the truth
    assert metrics.d_stsp_mixture(true, true, gen()).item() == pytest.approx(0, abs=1e-12)
    metrics.d_stsp_mixture(true[:1], generated, gen(), variance=0.25, samples=2000)
    assert drawn[-3][0].std().item() == pytest.approx(0.5, rel=0.03)


def test_dimensions_choose_the_variant():
    true, generated = normal(200, 5), normal(200, 5, seed=1)
    value, name = metrics.d_stsp(true, generated, gen())
    assert name == "d_stsp_histogram30"
    close(value, metrics.d_stsp_histogram(true, generated))
    true, generated = normal(200, 6), normal(200, 6, seed=1)
    value, name = metrics.d_stsp(true, generated, gen(3))
    assert name == "d_stsp_mixture1"
    close(value, metrics.d_stsp_mixture(true, generated, gen(3)))


@pytest.mark.parametrize("length", [400, 277])
def test_wasserstein_is_scipys(length):
    x, y = normal(400, 3), 2 * normal(2, length, 3, seed=1) + 1
    x[:50] = x[50:100]  # ties
    got = metrics.wasserstein(x, y)
    want = [[stats.wasserstein_distance(x[:, i], z[:, i]) for i in range(3)] for z in y]
    close(got, torch.tensor(want, dtype=F64), rtol=1e-12, atol=0)
    close(metrics.wasserstein(x, y[1]), got[1])
    y[0, 3] = torch.nan
    assert metrics.wasserstein(x, y).isinf().tolist() == [[True] * 3, [False] * 3]


def test_sliced_wasserstein_sees_what_the_marginals_do_not():
    x = torch.special.ndtri((torch.arange(400, dtype=F64) + 0.5) / 400)[:, None].repeat(1, 2)
    y = torch.cat([x[:, :1], -x[:, 1:]], 1)  # the other diagonal
    assert metrics.wasserstein(x, y).max() < 0.1
    # a direction at angle t sees N(0, (cos t +- sin t)^2): the mean of | |cos+sin| - |cos-sin| | sqrt(2 / pi)
    t = np.linspace(0, 2 * np.pi, 100_001)
    want = np.abs(np.abs(np.cos(t) + np.sin(t)) - np.abs(np.cos(t) - np.sin(t))).mean() * (2 / np.pi) ** 0.5
    assert metrics.sliced_wasserstein(x, y, gen(), slices=1000).item() == pytest.approx(want, rel=0.05)
    shift = torch.tensor([3.0, 0.0], dtype=F64)  # a shift is seen as |cos t| of it
    got = metrics.sliced_wasserstein(x, torch.stack([x + shift, x]), gen(), slices=1000)
    close(got, torch.tensor([3 * 2 / np.pi, 0.0], dtype=F64), rtol=0.05, atol=1e-12)


# ---------------------------------------------------------------- time


def reference_d_h(true, generated, sigma):
    out = []
    for x, y in zip(true.T.numpy(), generated.T.numpy(), strict=True):
        p, q = (np.abs(np.fft.rfft((z - z.mean()) / z.std())) ** 2 for z in (x, y))
        p, q = (ndimage.gaussian_filter1d(z, sigma) if sigma else z for z in (p, q))
        out.append(np.sqrt(max(0.0, 1 - np.sqrt(p / p.sum() * q / q.sum()).sum())))
    return np.mean(out)


@pytest.mark.parametrize(("length", "sigma"), [(1000, 20.0), (1001, 3.0), (300, 0.0), (60, 20.0)])
def test_d_h_is_the_one_of_scipys_filter(length, sigma):
    true, generated = smooth(length, 3), smooth(2, length, 3, seed=1).cumsum(1)
    got = metrics.d_h(true, generated, sigma)
    want = [reference_d_h(true, x, sigma) for x in generated]
    close(got, torch.tensor(want, dtype=F64), rtol=1e-8, atol=1e-8)
    assert (got > 0.005).all()
    close(metrics.d_h(true, generated[0], sigma), got[0])
    if sigma == 20:
        close(metrics.d_h(true, generated), got)


def test_d_h_counts_a_series_whose_spectrum_overflows_as_wholly_wrong():
    true = torch.randn(200, 1, generator=gen(), dtype=F64)
    assert metrics.d_h(true, torch.linspace(0, 398, 200, dtype=F64).exp()[:, None]).item() == 1


def test_d_h_ignores_units_and_counts_a_still_dimension_as_wholly_wrong():
    true = smooth(500, 4)
    units = torch.tensor([2.0, -3.0, 1e-3, 50.0], dtype=F64)
    assert metrics.d_h(true, true * units + 7).item() == pytest.approx(0, abs=1e-9)
    still = true.clone()
    still[:, 1] = 5 + 1e-9 * normal(500)  # rounding, not motion
    broken = true.clone()
    broken[3, 0] = torch.inf
    close(
        metrics.d_h(true, torch.stack([true, still, broken])), torch.tensor([0, 0.25, 1], dtype=F64), rtol=0, atol=1e-9
    )


def test_autocorrelation_is_statsmodels():
    stattools = pytest.importorskip("statsmodels.tsa.stattools")
    x = smooth(2, 257, 3)
    for unbiased in (False, True):
        got = metrics.autocorrelation(x, 200, unbiased)
        assert got.shape == (2, 201, 3)
        for s in range(2):
            for i in range(3):
                want = stattools.acf(x[s, :, i].numpy(), nlags=200, adjusted=unbiased, fft=False)
                close(got[s, :, i], torch.tensor(want), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- runs of a model


class Push(Markov):
    """x' = gain x + a + noise, dt along."""

    def __init__(self, act=1, noise_dim=0):
        super().__init__()
        self.spec, self.noise_dim = Spec(1, act), noise_dim
        self.gain = torch.nn.Parameter(torch.tensor(0.5, dtype=F64))
        self.rows = []

    def step(self, state, inp, cond):
        self.rows.append(len(state))
        obs = self.gain * state + inp.act.sum(-1, keepdim=True) + inp.noise.sum(-1, keepdim=True) + (inp.dt - 1)
        return obs, Prediction(obs, obs[:, 0], {})

    def loss(self, segment, noise):
        raise NotImplementedError


class Carry(Dynamics):
    """Sees x of (x, v): x' = x + v; a correction learns v from two observations. cond scales v."""

    spec, noise_dim = Spec(1), 0

    def init(self, obs, cond):
        return torch.cat([obs, torch.zeros_like(obs)], 1)

    def observe(self, state, cond):
        return state[:, :1]

    def step(self, state, inp, cond):
        x, v = state.split(1, 1)
        state = torch.cat([x + v * (cond[0].repeat_interleave(len(x) // len(cond[0]), 0) if cond else 1), v], 1)
        return state, Prediction(state[:, :1], state[:, 0], {})

    def correct(self, state, obs, alpha, cond):
        x, v = state.split(1, 1)
        return torch.cat([pull(x, obs, alpha), pull(v, v + obs - x, alpha)], 1)

    def loss(self, segment, noise):
        raise NotImplementedError


def test_a_free_run_goes_on_after_the_warm_up():
    model, act = Push(), normal(7, 1)
    obs, want = torch.tensor([[3.0], [-2.0], [1.0]], dtype=F64), []
    x = obs[-1]
    for a in act[2:]:
        x = 0.5 * x + a
        want.append(x)
    got = metrics.free_run(model, obs, 5, act=act)
    close(got, torch.stack(want).detach())
    assert not got.requires_grad
    close(metrics.free_run(model, obs[-1:], 5, act=act[2:], dt=1.0), got)
    both = metrics.free_run(model, torch.stack([obs, obs + 1]), 5, act=act)
    assert both.shape == (2, 5, 1)
    close(both[0], got)
    close(both[1] - both[0], 0.5 ** torch.arange(1, 6, dtype=F64)[:, None])
    close(metrics.free_run(model, obs, 1, act=act, dt=3.0)[0], got[0] + 2)


def test_the_warm_up_settles_a_state_that_is_not_seen():
    line = torch.arange(6.0, dtype=F64)[:, None] * 2 + 1
    close(metrics.free_run(Carry(), line[:1], 3), line[:1].expand(3, 1))
    close(metrics.free_run(Carry(), line[:3], 3), line[3:])
    runs = torch.stack([line[:2]] * 4)
    cond = (torch.tensor([[1.0], [3.0]], dtype=F64),)
    assert metrics.free_run(Carry(), runs, 2, cond=cond)[..., 0].tolist() == [[5, 7]] * 2 + [[9, 15]] * 2
    got = metrics.forecast(Carry(), line, 2, warmup=2)
    close(got, torch.stack([line[3:5], line[4:6]]))
    close(metrics.forecast(Carry(), line, 2)[0], line[:1].expand(2, 1))


def test_noise_is_zero_or_drawn_step_by_step():
    model, obs = Push(0, 2), torch.zeros(3, 1, 1, dtype=F64)
    assert (metrics.free_run(model, obs, 4) == 0).all()
    got, g, x = metrics.free_run(model, obs, 4, generator=gen(5)), gen(5), torch.zeros(3, dtype=F64)
    for t in range(4):
        x = 0.5 * x + model.draw(3, 1, g).sum(1)
        close(got[:, t, 0], x.detach())


@pytest.mark.parametrize("warmup", [0, 3])
def test_forecasts_from_every_time_in_chunks(warmup):
    obs, act, model = normal(30, 1), normal(29, 1, seed=1), Push()
    got = metrics.forecast(model, obs, 4, act=act, warmup=warmup, chunk=10)
    assert got.shape == (26 - warmup, 4, 1)
    assert max(model.rows) == 10
    assert not got.requires_grad
    for row, t in enumerate(range(warmup, 26)):
        close(got[row], metrics.free_run(model, obs[t : t + 1], 4, act=act[t:]))
    close(metrics.forecast(model.float(), obs, 4, act=act, warmup=warmup), got.float())


def test_settled_is_the_published_protocol():
    for length in (4, 5, 6, 7, 1000):
        asked = []
        run = lambda steps, asked=asked: (asked.append(steps), torch.arange(steps)[None, :, None])[1]
        got = metrics.settled(run, length)
        assert asked == [math.floor(1.25 * length)]
        assert got[0, :, 0].tolist() == list(range(math.floor(0.25 * length), asked[0]))
        assert got.shape[1] == length


def test_scores_name_their_variants():
    test, generated = smooth(300, 2), smooth(300, 2, seed=1)
    got = metrics.scores(test, generated, generator=gen())
    want = {
        "d_stsp_histogram30": metrics.d_stsp_histogram(test, generated),
        "d_h_sigma20": metrics.d_h(test, generated),
    }
    assert got == {k: v.item() for k, v in want.items()}
    stay = lambda obs, n: obs[2:-n, None].expand(-1, n, -1)  # from the third on
    got = metrics.scores(test, generated, stay, 5, generator=gen())
    assert list(got) == [*want, "pe_5"]
    assert got["pe_5"] == pytest.approx((test[7:] - test[2:-5]).square().mean().item())


# ---------------------------------------------------------------- forecasts


def test_the_prediction_error_is_that_of_the_last_step():
    true = smooth(50, 3)
    stay = true[:-4, None].expand(-1, 4, -1)
    want = [(true[k : 46 + k] - true[:46]).square().mean() for k in range(1, 5)]
    close(metrics.k_step_error(stay, true), torch.stack(want))
    close(metrics.prediction_error(stay, true), want[-1])
    late = (true[10 + 4 :] - true[10:-4]).square().mean()
    close(metrics.prediction_error(stay[10:], true), late)  # the last B
    seeds = torch.stack([stay, stay + 1])
    got = metrics.k_step_error(seeds, true)
    close(got[0], torch.stack(want))
    close(metrics.prediction_error(seeds, true), got[:, -1])
    broken = seeds.clone()
    broken[1, 3, 2] = torch.nan
    assert metrics.k_step_error(broken, true).isinf().tolist() == [[False] * 4, [False, False, True, False]]


def test_valid_prediction_time_counts_the_steps_before_the_first_that_fails():
    true = torch.ones(6, 2, dtype=F64)
    scale = torch.tensor([1.0, 2.0], dtype=F64)
    predicted = true + torch.tensor([0.0, 0.1, 0.3, 0.5, 0.0, 0.0], dtype=F64)[:, None] * scale
    value, name = metrics.valid_prediction_time(predicted, true, 0.5, 0.9, std=scale)
    assert name == "vpt_nrmse>0.4_step"
    assert value.item() == pytest.approx(3 * 0.5 * 0.9, rel=1e-12)
    assert metrics.valid_prediction_time(predicted, true, 1, 1, Nrmse(0.05), scale)[0].item() == 1
    predicted[1] = torch.nan
    batch = torch.stack([predicted, true])
    assert metrics.valid_prediction_time(batch, true, 1, 1, std=scale)[0].tolist() == [1, 6]  # to the end: all of it
    moving = smooth(40, 2)
    off = moving + 0.5 * moving.std(0, correction=0) * (torch.arange(40) >= 7)[:, None]
    assert metrics.valid_prediction_time(off, moving, 1, 1)[0].item() == 7
    assert metrics.valid_prediction_time(off, moving, 1, 1, Nrmse(0.51))[0].item() == 40


def test_the_symmetric_error_over_the_prefix_and_at_a_step():
    true = torch.ones(5, 1, dtype=F64)
    predicted = torch.tensor([1.0, 1.0, 2.0, 3.0, 3.0], dtype=F64)[:, None]  # errors 0 0 66.7 100 100 percent
    value, name = metrics.valid_prediction_time(predicted, true, 1, 1, Smape())
    assert (value.item(), name) == (3, "vpt_smape>30%_prefix")  # means 0 0 22.2 41.7
    value, name = metrics.valid_prediction_time(predicted, true, 1, 1, Smape(prefix=False))
    assert (value.item(), name) == (2, "vpt_smape>30%_step")
    error = Smape(prefix=False).error(predicted[2:4], true[:2], true)
    close(error, torch.tensor([200 / 3, 100], dtype=F64))
    zero = torch.zeros(3, 1, dtype=F64)
    assert metrics.valid_prediction_time(zero, zero, 1, 1, Smape())[0].item() == 3


# ---------------------------------------------------------------- Lyapunov exponents


def lorenz(x):
    a, b, c = x.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


def lorenz_jacobian(x):
    a, b, c = x.unbind(-1)
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    rows = [[-10 * one, 10 * one, zero], [28 - c, -one, -a], [b, a, -8 / 3 * one]]
    return torch.stack([torch.stack(r, -1) for r in rows], -2)


def henon(x):
    a, b = x.unbind(-1)
    one = torch.ones_like(a)
    jacobian = torch.stack([torch.stack([-2.8 * a, one], -1), torch.stack([0.3 * one, 0 * one], -1)], -2)
    return torch.stack([1 - 1.4 * a * a + b, 0.3 * a], -1), jacobian


def test_the_lorenz_spectrum():
    step = metrics.flow_step(lorenz, lorenz_jacobian, 0.01)
    start = normal(48, 3) * 5 + torch.tensor([0.0, 0, 25], dtype=F64)
    got = metrics.lyapunov_spectrum(step, start, 2500, transient=600, dt=0.01, every=2)
    assert got.shape == (48, 3)
    mean = got.mean(0)
    assert mean[0].item() == pytest.approx(0.906, rel=0.03)
    assert mean[1].item() == pytest.approx(0, abs=0.02)
    assert mean[2].item() == pytest.approx(-14.57, rel=0.005)
    close(got.sum(1), torch.full((48,), -(10 + 1 + 8 / 3), dtype=F64), rtol=1e-4, atol=0)  # the divergence
    assert metrics.kaplan_yorke(mean).item() == pytest.approx(2.062, abs=0.005)


def test_the_henon_and_logistic_maps():
    start = torch.tensor([[0.1, 0.1], [0.2, -0.1], [0.0, 0.0], [0.3, 0.1]], dtype=F64)
    got = metrics.lyapunov_spectrum(henon, start, 4000, transient=100, every=3)
    close(got.sum(1), torch.full((4,), math.log(0.3), dtype=F64))
    assert got[:, 0].mean().item() == pytest.approx(0.419, rel=0.02)
    one = metrics.lyapunov_spectrum(henon, start, 4000, transient=100, k=1, every=3)
    close(one, got[:, :1])
    logistic = lambda x: (4 * x * (1 - x), (4 - 8 * x)[..., None])
    got = metrics.lyapunov_spectrum(logistic, torch.rand(400, 1, generator=gen(), dtype=F64), 500)
    assert got.mean().item() == pytest.approx(math.log(2), rel=0.01)


def test_linear_maps_and_flows_are_closed_forms():
    turn = torch.linalg.qr(normal(3, 3)).Q
    sizes = torch.tensor([0.5, 3.0, 1.2], dtype=F64)
    a = turn @ sizes.diag() @ turn.T
    linear = lambda x: (x @ a.T, a.expand(len(x), 3, 3))
    want = sizes.log().sort(descending=True).values.expand(2, 3)
    for every in (1, 4, 7):
        got = metrics.lyapunov_spectrum(linear, normal(2, 3), 300, transient=61, every=every, dt=0.5)
        close(got, want / 0.5, rtol=1e-9, atol=1e-9)
    apart = lambda x: (x * sizes, sizes.diag().expand(len(x), 3, 3))  # no turn brings the first direction forward
    close(metrics.lyapunov_spectrum(apart, normal(2, 3), 5), want)
    flow = torch.tensor([[-0.3, 2.0, 0], [-2.0, -0.3, 0], [0, 1.0, -1.5]], dtype=F64)  # -0.3 +- 2i, -1.5
    step = metrics.flow_step(lambda x: x @ flow.T, lambda x: flow.expand(len(x), 3, 3), 0.2, substeps=4)
    close(step(normal(2, 3))[1], torch.linalg.matrix_exp(0.2 * flow).expand(2, 3, 3), rtol=1e-6, atol=1e-6)
    got = metrics.lyapunov_spectrum(step, normal(1, 3), 2000, transient=100, dt=0.2)
    close(got[0], torch.tensor([-0.3, -0.3, -1.5], dtype=F64), rtol=0, atol=1e-3)
    singular = lambda x: (x[:, :1].expand(-1, 2), torch.tensor([[1.0, 0], [1, 0]], dtype=F64).expand(len(x), 2, 2))
    close(metrics.lyapunov_spectrum(singular, normal(1, 2), 10, transient=1)[0, 1].exp().item(), 0.0)


def test_a_flows_step_is_runge_kuttas_and_its_jacobian_the_steps_own():
    x = normal(3, 3) * 5
    new, jacobian = metrics.flow_step(lorenz, lorenz_jacobian, 0.1, substeps=50)(x)
    for row, end in zip(x, new, strict=True):
        f = lambda t, y: lorenz(torch.tensor(y)).numpy()
        want = integrate.solve_ivp(f, (0, 0.1), row.numpy(), method="DOP853", rtol=1e-11, atol=1e-11).y[:, -1]
        close(end, torch.tensor(want), rtol=1e-6, atol=1e-6)
    coarse = metrics.flow_step(lorenz, lorenz_jacobian, 0.1, substeps=2)
    auto = torch.stack([torch.autograd.functional.jacobian(lambda z: coarse(z[None])[0][0], row) for row in x])
    close(coarse(x)[1], auto)
    assert jacobian.shape == (3, 3, 3)


@pytest.mark.parametrize("analytic", [False, True])
def test_a_models_map_and_its_jacobian(analytic):
    model = SingleConfig(hidden=(8,), weight_decay=(0.0,) * 2).build(Spec(3, 2), gen())  # float32
    x, act = normal(4, 3), torch.tensor([0.3, -0.2])
    inp = StepInput(act.expand(4, 2), torch.zeros(4, 0), torch.ones(4, 1))
    row = lambda r: StepInput(*(y[r : r + 1] for y in inp))
    move = lambda z, r: model.step(z[None], row(r), ())[0][0]
    jac = torch.autograd.functional.jacobian
    want = torch.stack([jac(lambda z, r=r: move(z, r), x[r].float()) for r in range(4)])  # pyright: ignore
    given = (lambda state, inp, cond: want) if analytic else None
    with torch.no_grad():
        new, jacobian = metrics.model_step(model, act=act, jacobian=given)(x)
    close(new.float(), model.step(x.float(), inp, ())[0].detach())
    close(jacobian, want.double())
    assert new.dtype == F64
    assert not new.requires_grad
    assert not jacobian.requires_grad


def test_the_spectrum_of_a_model_under_conditions_of_its_own():
    step = metrics.model_step(Carry(), (torch.tensor([[2.0], [5.0]], dtype=F64),))
    _, jacobian = step(normal(4, 2))
    assert jacobian[:, 0, 1].tolist() == [2, 2, 5, 5]
    got = metrics.lyapunov_spectrum(metrics.model_step(Push(0)), torch.ones(2, 1, dtype=F64), 5, dt=0.1)
    close(got, torch.full((2, 1), math.log(0.5) / 0.1, dtype=F64))


def test_the_kaplan_yorke_dimension():
    spectra = [[0.9, 0.0, -14.5], [-14.5, 0.9, 0.0], [-1.0, -2.0, -3.0], [1.0, 0.5, 0.1], [0.4, -0.8, -9]]
    got = metrics.kaplan_yorke(torch.tensor(spectra, dtype=F64))
    close(got, torch.tensor([2 + 0.9 / 14.5, 2 + 0.9 / 14.5, 0, 3, 1.5], dtype=F64))


def test_an_orbit_that_diverged_has_no_dimension():
    found = metrics.kaplan_yorke(torch.tensor([[math.nan, -1.0], [0.5, -1.0]]))
    assert found[0].isnan()
    assert found[1] == 1.5


def test_the_largest_exponents_are_found_where_coordinates_are_invariant():
    walk = lambda x: (x, torch.diag(torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)).expand(len(x), -1, -1))
    for k in (1, 2, 3):
        got = metrics.lyapunov_spectrum(walk, torch.ones(1, 3), 200, transient=100, k=k)[0]
        assert got.tolist() == pytest.approx([math.log(2), -math.log(2), math.log(0.1)][:k], abs=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.3, 1000 / 3, 0.0])
def test_a_series_that_stands_still_has_no_autocorrelation(value):
    assert metrics.autocorrelation(torch.full((100, 1), value, dtype=torch.float64), 3).isnan().all()


def test_the_maximal_exponent_from_data():
    x = [torch.tensor([0.3, 0.1], dtype=F64)]
    for _ in range(5000):
        x.append(henon(x[-1])[0])
    orbit = torch.stack(x[100:])
    got = metrics.lyapunov_from_data(orbit, (1, 7), theiler=10, references=1500)
    assert got.exponent.item() == pytest.approx(0.419, rel=0.08)
    assert got.curve.shape == (8,)
    halved = metrics.lyapunov_from_data(orbit, (1, 7), theiler=10, references=1500, dt=2.0)
    close(halved.exponent, got.exponent / 2)
    delayed = metrics.lyapunov_from_data(orbit[:, :1], (1, 7), theiler=10, dimension=2, references=1500)
    assert delayed.exponent.item() == pytest.approx(0.419, rel=0.1)
    wave = (torch.arange(3000, dtype=F64) * 0.1)[:, None].sin()
    calm = metrics.lyapunov_from_data(wave, (0, 40), theiler=60, dimension=2, delay=15, dt=0.1)
    assert calm.exponent.abs() < 0.01


def test_neighbours_are_those_of_the_definition():
    x, (first, last), theiler = normal(60, 2).cumsum(0), (1, 4), 5
    rows, logs = 56, []
    for i in range(rows):
        d = (x[:rows] - x[i]).norm(dim=1)
        d[max(0, i - theiler) : i + theiler + 1] = torch.inf
        j = int(d.argmin())
        logs.append([(x[i + k] - x[j + k]).norm().log().item() for k in range(last + 1)])
    curve = np.mean(logs, 0)
    got = metrics.lyapunov_from_data(x, (first, last), theiler=theiler, dt=0.1)
    close(got.curve, torch.tensor(curve))
    close(got.exponent.item(), np.polyfit(np.arange(first, last + 1), curve[first:], 1)[0] / 0.1)


def test_distances_of_zero_have_no_logarithm_and_do_not_count():
    got = metrics.lyapunov_from_data((normal(200, 1) * 2).round(), (0, 5), theiler=3)
    assert got.curve[0] == 0  # one unit, since states that are equal are no neighbours
    assert got.curve.isfinite().all()
    assert got.curve[1:].min() > 0


# ---------------------------------------------------------------- errors

FLAT = torch.ones(20, 2, dtype=F64)


class Pair(Carry):
    """Its state is no tensor."""

    def step(self, state, inp, cond):
        state, pred = super().step(state, inp, cond)
        return (state, state), pred


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.d_stsp_histogram(normal(5), normal(5)), r"shape \[5\], expected \[T, N\]"),
        (lambda: metrics.d_stsp_histogram(normal(2, 5, 1), normal(5, 1)), "the truth has shape"),
        (lambda: metrics.d_stsp_histogram(normal(5, 1) / 0, normal(5, 1)), "finite numbers"),
        (lambda: metrics.d_stsp_histogram(normal(5, 2), normal(5, 3)), "2 dimensions, what was generated 3"),
        (lambda: metrics.d_stsp_histogram(FLAT, FLAT), r"does not move in the dimensions \[0, 1\]"),
        (lambda: metrics.d_stsp_histogram(normal(5, 2), normal(5, 2), laplace=0.0), "expected both positive"),
        (lambda: metrics.d_stsp_histogram(normal(5, 20), normal(5, 20)), r"30\^20 cells"),
        (lambda: metrics.d_h(normal(6, 2), normal(5, 2)), "6 steps, what was generated 5"),
        (lambda: metrics.autocorrelation(normal(6, 2), 6), "0 <= lags < T = 6"),
        (lambda: metrics.k_step_error(normal(9, 4, 2), normal(12, 2)), r"B \+ n <= 12"),
        (lambda: metrics.valid_prediction_time(normal(9, 2), normal(8, 2), 1, 1), "the same"),
        (lambda: metrics.free_run(Push(), normal(3, 1), 5), r"expected \[>= 7, 1\]"),
        (lambda: metrics.free_run(Push(), normal(3, 1), 5, act=normal(6, 1)), r"expected \[>= 7, 1\]"),
        (lambda: metrics.free_run(Push(), normal(3, 2), 5), r"expected \[W, 1\]"),
        (lambda: metrics.forecast(Push(0), normal(6, 1), 4, warmup=2), r"T > warmup \+ n"),
        (lambda: metrics.lyapunov_spectrum(henon, normal(1, 2), 10, k=3), "1 <= k <= 2"),
        (lambda: metrics.flow_step(lorenz, lorenz_jacobian, 0.1, 0), "at least 1"),
        (lambda: metrics.model_step(Push())(normal(1, 1)), "expected one of 1 parts"),
        (lambda: metrics.model_step(Pair())(normal(1, 2)), "state of Pair is not one tensor"),
        (lambda: metrics.lyapunov_from_data(normal(20, 1), (3, 3), theiler=2), r"fit\[0\] < fit\[1\]"),
        (lambda: metrics.lyapunov_from_data(FLAT, (0, 3), theiler=2), "repeats exactly"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
