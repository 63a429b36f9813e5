"""What a reconstructed system is judged by: its attractor, its spectrum, its forecasts, its Lyapunov exponents.

Series are [T, N], or [S, T, N] where a function says [..., T, N]; the truth is one series. Everything is computed in
float64, whatever comes in. Metrics of the same name differ between papers and programs: a score says its variant in its
key, and none is to be compared across lengths T. What a score is worth, `mbrl.nulls` tells.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from mbrl import device as devices
from mbrl.core import Dynamics, StepInput, Tree, repeat
from mbrl.rollout import unroll

StepJacobian = Callable[[Tensor], tuple[Tensor, Tensor]]  # state [B, M] -> the next [B, M], its Jacobian [B, M, M]
STILL = 1e-6  # a series that moves less than this part of the truth's standard deviation has no spectrum
PIECE = 2**22  # distances held at a time


def _series(x: Tensor, where: str) -> Tensor:
    """[..., T, N] in float64, outside any graph."""
    x = torch.as_tensor(x).detach().double()
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"{where}: got a series of shape {list(x.shape)}, expected [T, N], or [S, T, N] of several")
    return x


def _truth(x: Tensor, where: str) -> Tensor:
    """One series [T, N], finite, in float64."""
    x = _series(x, where)
    if x.ndim > 2 or not bool(x.isfinite().all()):
        raise ValueError(f"{where}: the truth has shape {list(x.shape)}, expected [T, N] of finite numbers")
    return x


def _pair(true: Tensor, generated: Tensor, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """The truth [T, N], what is compared to it [..., T', N], and where that is finite [...]."""
    true, generated = _truth(true, where), _series(generated, where)
    if true.shape[-1] != generated.shape[-1]:
        raise ValueError(
            f"{where}: the truth has {true.shape[-1]} dimensions, what was generated {generated.shape[-1]}"
        )
    return true, generated, generated.isfinite().flatten(-2).all(-1)


def _spread(true: Tensor, where: str) -> Tensor:
    """[N]: the standard deviations of the truth, none of them zero."""
    std = true.std(0, correction=0)
    still = (std <= 1e-12 * true.abs().amax(0)).nonzero()[:, 0].tolist()
    if still:
        raise ValueError(f"{where}: the truth does not move in the dimensions {still}: leave these out of both series")
    return std


# ---------------------------------------------------------------- the attractor


def d_stsp_histogram(
    true: Tensor, generated: Tensor, bins: int = 30, margin: float = 0.1, laplace: float = 1e-5
) -> Tensor:
    """KL(true || generated) of the states' histograms, for generated [..., T, N] -> [...].

    `bins` in each dimension over [min - margin std, max + margin std] of the truth; `laplace` is added to the counts of
    all bins^N cells, of which only the occupied ones are held. Points outside the range are dropped, as by
    np.histogramdd: a series that lies outside as a whole scores as if it were uniform over the range, log(bins^N) less
    the entropy of the truth, which is less than a fixed point inside may score. Infinite where it is not finite.
    """
    where = "d_stsp_histogram"
    true, generated, finite = _pair(true, generated, where)
    if bins < 1 or laplace <= 0:
        raise ValueError(f"{where}: got bins {bins} and laplace {laplace}, expected both positive")
    width = true.shape[1]
    if width * math.log2(bins) >= 63:
        raise ValueError(f"{where}: {bins}^{width} cells cannot be counted: take fewer bins, or d_stsp_mixture")
    pad = margin * _spread(true, where)
    low, high = true.amin(0) - pad, true.amax(0) + pad
    edges = low[:, None] + (high - low)[:, None] * (torch.arange(bins + 1).to(true) / bins)
    edges[:, -1] = high
    own, cells = _cells(true, edges), float(bins**width)

    def divergence(other: Tensor) -> Tensor:
        occupied, index = torch.unique(torch.cat([own, other]), return_inverse=True)
        total = torch.tensor([[len(own)], [len(other)]]).to(true) + laplace * cells
        counts = torch.stack([part.bincount(minlength=len(occupied)) for part in index.split([len(own), len(other)])])
        p, q = (counts.to(true) + laplace) / total
        p0, q0 = (laplace / total)[:, 0]  # of every cell that neither visits
        return (p * (p / q).log()).sum() + (cells - len(occupied)) * p0 * (p0 / q0).log()

    rows = zip(generated.flatten(0, -3) if generated.ndim > 2 else generated[None], finite.reshape(-1), strict=True)
    values = [divergence(_cells(x, edges)) if ok else true.new_tensor(torch.inf) for x, ok in rows]
    return torch.stack(values).reshape(finite.shape)


def _cells(x: Tensor, edges: Tensor) -> Tensor:
    """The cell numbers of those points of x [T, N] that lie within the edges [N, bins + 1]."""
    bins, x = edges.shape[1] - 1, x.T.contiguous()
    index = torch.searchsorted(edges, x, right=True) - 1
    index = torch.where(x == edges[:, -1:], bins - 1, index)  # the last bin is closed
    inside = ((index >= 0) & (index < bins)).all(0)
    weight = torch.tensor([bins**i for i in range(len(x))], device=x.device)
    return (index[:, inside] * weight[:, None]).sum(0)


def d_stsp_mixture(
    true: Tensor,
    generated: Tensor,
    generator: torch.Generator,
    variance: float = 1.0,
    points: int = 10_000,
    samples: int = 1000,
) -> Tensor:
    """KL(true || generated) of mixtures of equal Gaussians of this variance on the first `points` states of each,
    estimated from `samples` draws of the true one; generated [..., T, N] -> [...], all by the same draws. It may come
    out below 0. Infinite where a series is not finite."""
    true, generated, finite = _pair(true, generated, "d_stsp_mixture")
    centre = true.mean(0)
    true, generated = true[:points] - centre, generated[..., :points, :] - centre
    pick = torch.randint(len(true), (samples,), generator=generator, device=generator.device)
    noise = torch.randn(samples, true.shape[1], generator=generator, dtype=true.dtype, device=generator.device)
    drawn = true[pick.to(true.device)] + variance**0.5 * noise.to(true.device)
    own = _log_mixture(drawn, true, variance)
    rows = zip(generated.flatten(0, -3) if generated.ndim > 2 else generated[None], finite.reshape(-1), strict=True)
    values = [(own - _log_mixture(drawn, x, variance)).mean() if ok else own.new_tensor(torch.inf) for x, ok in rows]
    return torch.stack(values).reshape(finite.shape)


def _log_mixture(x: Tensor, centres: Tensor, variance: float) -> Tensor:
    """The log-density [S] at x [S, N], but for what all mixtures of one variance share."""
    size = centres.square().sum(1)
    parts = []
    for part in x.split(max(1, PIECE // len(centres))):
        square = part.square().sum(1, keepdim=True) + size - 2 * part @ centres.T
        parts.append(torch.logsumexp(square / (-2 * variance), 1))
    return torch.cat(parts) - math.log(len(centres))


def d_stsp(true: Tensor, generated: Tensor, generator: torch.Generator) -> tuple[Tensor, str]:
    """The distance of the attractors, and which variant it is: the histogram below six dimensions, else the mixture,
    with the published settings (Hess et al., ICML 2023). Only the mixture draws from the generator."""
    if true.shape[-1] < 6:
        return d_stsp_histogram(true, generated), "d_stsp_histogram30"
    return d_stsp_mixture(true, generated, generator), "d_stsp_mixture1"


def wasserstein(x: Tensor, y: Tensor) -> Tensor:
    """The 1-Wasserstein distance of the marginals, exactly: x [T, N], y [..., T', N] -> [..., N]. Infinite where y is
    not finite."""
    x, y, finite = _pair(x, y, "wasserstein")
    x, y = x.T.contiguous().sort(-1).values, y.mT.contiguous().sort(-1).values  # [N, T], [..., N, T']
    if x.shape[-1] == y.shape[-1]:
        distance = (x - y).abs().mean(-1)
    else:  # the area between the two distribution functions
        x = x.expand(*y.shape[:-1], -1).contiguous()
        ends = torch.cat([x, y], -1).sort(-1).values
        share = lambda z: torch.searchsorted(z, ends[..., :-1].contiguous(), right=True).to(z) / z.shape[-1]
        distance = ((share(x) - share(y)).abs() * ends.diff(dim=-1)).sum(-1)
    return torch.where(finite[..., None], distance, torch.inf)


def sliced_wasserstein(x: Tensor, y: Tensor, generator: torch.Generator, slices: int = 100) -> Tensor:
    """The mean 1-Wasserstein distance of the projections onto `slices` random directions: x [T, N], y [..., T', N]
    -> [...]. It sees how the dimensions hang together, which the marginals do not."""
    x, y, _ = _pair(x, y, "sliced_wasserstein")
    size = (x.shape[1], slices)
    direction = torch.randn(size, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    direction = direction / direction.norm(dim=0)
    return wasserstein(x @ direction, y @ direction).mean(-1)


# ---------------------------------------------------------------- time


def d_h(true: Tensor, generated: Tensor, sigma: float = 20.0) -> Tensor:
    """The Hellinger distance of the power spectra, in [0, 1], mean over the dimensions: generated [..., T, N] -> [...].

    Every dimension is standardised by its own moments; |rfft|^2 is smoothed by a Gaussian of `sigma` frequency bins
    (cut at 4 sigma, reflected at the ends) and made to sum to 1. A generated dimension that stands still (a standard
    deviation below 1e-6 of the truth's) shares nothing with the truth and counts 1, as does a series that is not
    finite, or so large that its spectrum is not. Raises ValueError where the lengths differ: the bins would be other
    frequencies."""
    true, generated, finite = _pair(true, generated, "d_h")
    if len(true) != generated.shape[-2]:
        raise ValueError(
            f"d_h: the truth has {len(true)} steps, what was generated {generated.shape[-2]}: cut the longer"
        )
    still = generated.std(-2, correction=0) <= STILL * _spread(true, "d_h")  # [..., N]
    p, q = _spectrum(true, sigma), _spectrum(generated, sigma)
    distance = ((p.sqrt() - q.sqrt()).square().sum(-2) / 2).sqrt()
    return torch.where(finite[..., None] & ~still & distance.isfinite(), distance, 1.0).mean(-1)


def _spectrum(x: Tensor, sigma: float) -> Tensor:
    """[..., T, N] -> [..., T // 2 + 1, N], which sums to 1 over the frequencies."""
    x = (x - x.mean(-2, keepdim=True)) / x.std(-2, correction=0, keepdim=True)
    power = torch.fft.rfft(x, dim=-2).abs().square()
    if sigma > 0:
        size, radius = power.shape[-2], int(4 * sigma + 0.5)
        tap = torch.arange(-radius, radius + 1, dtype=torch.float64)
        weight = (-0.5 * (tap / sigma) ** 2).exp()
        at = torch.arange(-radius, size + radius, device=power.device) % (2 * size)
        padded = power.index_select(-2, torch.where(at < size, at, 2 * size - 1 - at))
        power = torch.zeros_like(power)
        for i, w in enumerate((weight / weight.sum()).tolist()):
            power.add_(padded[..., i : i + size, :], alpha=w)
    return power / power.sum(-2, keepdim=True)


def autocorrelation(x: Tensor, lags: int, unbiased: bool = False) -> Tensor:
    """[..., T, N] -> [..., lags + 1, N], by FFT. Biased: sums over T - lag products are divided by T; unbiased: by
    T - lag. A dimension that stands still has none: NaN."""
    x = _series(x, "autocorrelation")
    length = x.shape[-2]
    if not 0 <= lags < length:
        raise ValueError(f"autocorrelation: got {lags} lags, expected 0 <= lags < T = {length}")
    still = x.std(-2, correction=0, keepdim=True) <= STILL * x.abs().amax(-2, keepdim=True)
    x = torch.where(still, 0.0, x - x.mean(-2, keepdim=True))
    spectrum = torch.fft.rfft(x, n=2 * length, dim=-2).abs().square()
    sums = torch.fft.irfft(spectrum, n=2 * length, dim=-2)[..., : lags + 1, :]
    if unbiased:
        sums = sums * (length / (length - torch.arange(lags + 1).to(x)))[:, None]
    return sums / x.square().sum(-2, keepdim=True)


# ---------------------------------------------------------------- runs of a model


def settled(run: Callable[[int], Tensor], length: int) -> Tensor:
    """The protocol of a free run: of floor(1.25 length) steps the first quarter of `length` is dropped, so that
    `length` remain. run: steps -> [..., steps, N], of a model (`free_run`) or of a null (`Null.free_run`)."""
    drop = length // 4
    return run(length + drop)[..., drop:, :]


def _inputs(model: Dynamics, act: Tensor, dt: float, generator: torch.Generator | None) -> Iterator[StepInput]:
    """The inputs of act.shape[1] steps, act [B, T, A]. Without a generator the noise is its mean, zero."""
    n, like = len(act), torch.full_like(act[:, :1].sum(-1), dt)  # [B, 1]
    zero = like.new_zeros(n, model.noise_dim)
    for t in range(act.shape[1]):
        yield StepInput(act[:, t], zero if generator is None else model.draw(n, 1, generator).to(zero), like)


def _acts(model: Dynamics, act: Tensor | None, obs: Tensor, steps: int, where: str) -> Tensor:
    """The actions [..., steps, A] beside observations [..., O]."""
    if act is None:
        act = obs.new_zeros(*obs.shape[:-2], steps, 0)
    act = act.to(obs)
    if act.shape[-1] != model.spec.act or act.shape[-2] < steps:
        want = f"[>= {steps}, {model.spec.act}]"
        raise ValueError(f"{where}: the actions are {list(act.shape)}, expected {want}: one for each step taken")
    return act[..., :steps, :]


def _begun(model: Dynamics, known: Tensor, inputs: Iterator[StepInput], cond: Tree) -> Tree:
    """The state at the last of the observations known [B, W, O], forced through all of them."""
    state = model.init(known[:, 0], cond)
    if known.shape[1] > 1:
        forced = known[:, 1:]
        state, _ = unroll(model, state, islice(inputs, forced.shape[1]), cond, forced=forced, alpha=1.0)
    return state


@torch.no_grad()
def free_run(
    model: Dynamics,
    obs: Tensor,
    steps: int,
    *,
    cond: Tree = (),
    act: Tensor | None = None,
    dt: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A long run on its own: obs [W, O] -> [steps, O], or obs [B, W, O] -> [B, steps, O] for B runs at once.

    The state begins at the first of the W observations and is forced through the rest (W = 1: a first observation
    alone); what comes back are the observations after the last of them, in the model's type. act [W - 1 + steps, A]
    (or [B, ...]) counts from the first observation. cond: of one system, or of groups of the B runs. Noise is drawn
    from the generator, zero without one. A run that diverges goes on as it is: not finite."""
    known = obs.to(next(model.parameters(), obs))
    if known.ndim not in (2, 3) or known.shape[-1] != model.spec.obs or 0 in known.shape:
        raise ValueError(f"free_run: obs is {list(obs.shape)}, expected [W, {model.spec.obs}] or [B, W, ...]")
    known_steps = known.shape[-2] - 1
    act = _acts(model, act, known, known_steps + steps, "free_run")
    known, act = (x if x.ndim == 3 else x[None] for x in (known, act))
    act = act.expand(len(known), -1, -1)
    inputs = _inputs(model, act, dt, generator)
    state = _begun(model, known, inputs, cond)
    out = known.new_empty(len(known), steps, model.spec.obs)
    for t, inp in enumerate(inputs):
        state, pred = model.step(state, inp, cond)
        out[:, t] = pred.obs
    return out if obs.ndim == 3 else out[0]


@torch.no_grad()
def forecast(
    model: Dynamics,
    obs: Tensor,
    n: int,
    *,
    cond: Tree = (),
    act: Tensor | None = None,
    dt: float = 1.0,
    warmup: int = 0,
    chunk: int = 4096,
    generator: torch.Generator | None = None,
) -> Tensor:
    """n free steps from every time of a series obs [T, O] that has n after it: [T - warmup - n, n, O], in the model's
    type; row b forecasts obs[b + warmup + 1 :].

    Each begins at an observation `warmup` steps earlier and is forced through those between, so that states which an
    observation does not show can settle. act [>= T - 1, A]: act[t] leads from obs[t] to obs[t + 1]. cond: of one
    system. `chunk` rows are stepped at a time. Noise is drawn from the generator, zero without one."""
    starts = len(obs) - warmup - n
    if obs.ndim != 2 or obs.shape[-1] != model.spec.obs or n < 1 or warmup < 0 or starts < 1:
        raise ValueError(
            f"forecast: got obs {list(obs.shape)}, n {n}, warmup {warmup}; "
            f"expected [T, {model.spec.obs}], n >= 1, warmup >= 0 and T > warmup + n"
        )
    obs = obs.to(next(model.parameters(), obs))
    act = _acts(model, act, obs, len(obs) - 1, "forecast")
    windows = obs.unfold(0, warmup + 1, 1).mT[:starts]  # [starts, warmup + 1, O], a view
    drive = act.unfold(0, warmup + n, 1).mT  # [starts, warmup + n, A]
    out = obs.new_empty(starts, n, model.spec.obs)
    for known, acts, free in zip(windows.split(chunk), drive.split(chunk), out.split(chunk), strict=True):
        inputs = _inputs(model, acts, dt, generator)
        state = _begun(model, known, inputs, cond)
        free.copy_(unroll(model, state, inputs, cond)[1].obs)
    return out


# ---------------------------------------------------------------- forecasts


def k_step_error(predicted: Tensor, true: Tensor) -> Tensor:
    """[..., B, n, N] against the series true [T, N] -> [..., n]: the squared error at each step, mean over the
    forecasts and the dimensions, in the series' units. The forecasts are those of the last B times that have n steps
    after them: the last one ends where the series ends. Infinite where one is not finite."""
    true = _truth(true, "k_step_error")
    count, n, width = predicted.shape[-3:]
    start = len(true) - n - count  # the time that the first forecast begins at
    if start < 0 or width != true.shape[1]:
        raise ValueError(
            f"k_step_error: {list(predicted.shape)} forecasts do not fit a series {list(true.shape)}, "
            f"expected [B, n, {true.shape[1]}] with B + n <= {len(true)}"
        )
    errors = []
    for k in range(n):
        target = true[start + k + 1 : start + k + 1 + count]
        errors.append((predicted[..., k, :].double() - target).square().mean((-2, -1)))
    out = torch.stack(errors, -1)
    return torch.where(out.isfinite(), out, torch.inf)


def prediction_error(predicted: Tensor, true: Tensor) -> Tensor:
    """PE(n) of forecasts [..., B, n, N] of the series true [T, N] -> [...]: the mean squared error at step n alone, not
    over the steps before it; see `k_step_error`."""
    true = _truth(true, "prediction_error")
    n = predicted.shape[-2]
    return k_step_error(predicted[..., -1:, :], true[n - 1 :])[..., -1]


@dataclass(frozen=True)
class Smape:
    """The symmetric error 200 |x - y| / (|x| + |y|) in percent, 0 to 200, mean over the dimensions; over the whole
    forecast so far (`prefix`, as Gilpin, arXiv 2303.08011), or at each step alone."""

    threshold: float = 30.0
    prefix: bool = True

    @property
    def name(self) -> str:
        return f"smape>{self.threshold:g}%_{'prefix' if self.prefix else 'step'}"

    def error(self, predicted: Tensor, true: Tensor, std: Tensor) -> Tensor:
        size = predicted.abs() + true.abs()
        ratio = torch.where(size == 0, 0.0, (predicted - true).abs() / size)
        error = 200 * ratio.mean(-1)
        if self.prefix:
            error = error.cumsum(-1) / torch.arange(1, error.shape[-1] + 1, device=error.device)
        return error


@dataclass(frozen=True)
class Nrmse:
    """The root mean square over the dimensions of the error in standard deviations, at each step (Vlachas et al.,
    2020)."""

    threshold: float = 0.4

    @property
    def name(self) -> str:
        return f"nrmse>{self.threshold:g}_step"

    def error(self, predicted: Tensor, true: Tensor, std: Tensor) -> Tensor:
        return ((predicted - true) / std).square().mean(-1).sqrt()


def valid_prediction_time(
    predicted: Tensor,
    true: Tensor,
    dt: float,
    lyapunov: float,
    rule: Smape | Nrmse = Nrmse(),
    std: Tensor | None = None,
) -> tuple[Tensor, str]:
    """How long forecasts [..., T, N] stay with the truth [..., T, N], both from the first step after their common start
    on: [...], and the rule's name. The steps before the first whose error exceeds the threshold or is NaN, times
    dt and the maximal exponent `lyapunov` (per unit time): in Lyapunov times. A forecast that stays to the end counts
    T steps. std [N]: the truth's standard deviations, for `Nrmse`; those of `true` over time where None, which a short
    stretch understates."""
    predicted, true = _series(predicted, "valid_prediction_time"), _series(true, "valid_prediction_time")
    if predicted.shape[-2:] != true.shape[-2:]:
        raise ValueError(
            f"valid_prediction_time: forecasts are {list(predicted.shape)}, the truth {list(true.shape)}, "
            "expected the same [T, N]"
        )
    std = true.std(-2, correction=0, keepdim=True) if std is None else std.to(true)
    fine = rule.error(predicted, true, std) <= rule.threshold  # [..., T]; not of NaN
    return fine.cumprod(-1).sum(-1).double() * (dt * lyapunov), f"vpt_{rule.name}"


# ---------------------------------------------------------------- Lyapunov exponents


@torch.no_grad()
def lyapunov_spectrum(
    step_jacobian: StepJacobian,
    state: Tensor,
    steps: int,
    *,
    transient: int = 0,
    k: int | None = None,
    dt: float = 1.0,
    every: int = 1,
) -> Tensor:
    """The k largest exponents (all M by default), per unit time, descending: state [B, M] -> [B, k]. Each row is an
    orbit of its own. Benettin's method: k tangent vectors follow the orbit and are made orthonormal every `every`
    steps; the first `transient` steps align them and do not count (fewer than M vectors begin in no special direction,
    and need some transient). A map that is not invertible has exponents of minus infinity, or as low as
    rounding allows; an orbit that diverges has NaN."""
    rows, width = state.shape
    k = width if k is None else k
    if not 1 <= k <= width or steps < 1 or transient < 0 or every < 1:
        raise ValueError(
            f"lyapunov_spectrum: got k {k}, steps {steps}, transient {transient}, every {every}; "
            f"expected 1 <= k <= {width}, steps and every of at least 1, transient of at least 0"
        )
    state = state.double()
    tangent = torch.eye(width, k, dtype=state.dtype)
    if k < width:  # coordinates may be invariant, and hold only some of the exponents
        tangent = torch.linalg.qr(torch.randn(width, k, generator=devices.generator(0), dtype=state.dtype))[0]
    tangent = tangent.to(state.device).expand(rows, -1, -1)
    total = state.new_zeros(rows, k)
    for t in range(1, transient + steps + 1):
        state, jacobian = step_jacobian(state)
        tangent = jacobian @ tangent
        counted = t - transient
        if t % every == 0 or counted in (0, steps):
            tangent, r = torch.linalg.qr(tangent)
            if counted > 0:  # the signs of the diagonal are the factorisation's own choice
                total += r.diagonal(dim1=-2, dim2=-1).abs().log()
    return (total / (steps * dt)).sort(-1, descending=True).values


def flow_step(
    field: Callable[[Tensor], Tensor], jacobian: Callable[[Tensor], Tensor], dt: float, substeps: int = 1
) -> StepJacobian:
    """The map of a flow over dt, and its Jacobian, by `substeps` Runge-Kutta steps (RK4) of state and tangent together.
    field: [B, M] -> [B, M] and its jacobian: [B, M] -> [B, M, M], rows apart from each other."""
    if substeps < 1:
        raise ValueError(f"flow_step: got {substeps} substeps, expected at least 1")
    h = dt / substeps

    def rates(x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        return field(x), jacobian(x) @ tangent

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        tangent = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
        for _ in range(substeps):
            a, da = rates(x, tangent)
            b, db = rates(x + h / 2 * a, tangent + h / 2 * da)
            c, dc = rates(x + h / 2 * b, tangent + h / 2 * db)
            d, dd = rates(x + h * c, tangent + h * dc)
            x, tangent = x + h / 6 * (a + 2 * b + 2 * c + d), tangent + h / 6 * (da + 2 * db + 2 * dc + dd)
        return x, tangent

    return step


def model_step(
    model: Dynamics,
    cond: Tree = (),
    act: Tensor | None = None,
    dt: float = 1.0,
    jacobian: Callable[[Tensor, StepInput, Tree], Tensor] | None = None,
) -> StepJacobian:
    """A learner whose state is one tensor [B, M] as such a map, without noise; computed in the learner's type.
    act [A]: an action that is held. jacobian(state, inp, cond) -> [B, M, M] where the learner knows its own; else by
    differentiation."""

    def step(state: Tensor) -> tuple[Tensor, Tensor]:
        x = state.detach().to(next(model.parameters(), state))
        n, width = x.shape
        if jacobian is not None:
            inp = held(x)
            return move(x, inp).detach().to(state), jacobian(x, inp, cond).detach().to(state)
        with torch.enable_grad():  # a copy of each row for each part of its next state: one pass back gives them all
            copies = repeat(x, width).requires_grad_()
            new = move(copies, held(copies)).reshape(n, width, width)
            (rows,) = torch.autograd.grad(new.diagonal(dim1=1, dim2=2).sum(), copies)
        return new[:, 0].detach().to(state), rows.reshape(n, width, width).to(state)

    def held(x: Tensor) -> StepInput:
        if act is None and model.spec.act:
            raise ValueError(f"model_step: got no action, expected one of {model.spec.act} parts, held over the steps")
        acts = (x.new_zeros(0) if act is None else act.to(x)).expand(len(x), -1)
        return StepInput(acts, x.new_zeros(len(x), model.noise_dim), x.new_full((len(x), 1), dt))

    def move(x: Tensor, inp: StepInput) -> Tensor:
        new = model.step(x, inp, cond)[0]
        if not isinstance(new, Tensor) or new.shape != x.shape:
            raise ValueError(f"model_step: the state of {type(model).__name__} is not one tensor [B, M]")
        return new

    return step


def kaplan_yorke(exponents: Tensor) -> Tensor:
    """The Kaplan-Yorke dimension of spectra [..., k] -> [...]: how many exponents sum to no less than 0, and the part
    of the next that is left. k where all do: then the spectrum is that of a volume, or is not whole. NaN where an
    exponent is NaN."""
    spectrum = exponents.double().sort(-1, descending=True).values
    sums = spectrum.cumsum(-1)
    whole = (sums >= 0).cumprod(-1).sum(-1)  # [...]
    last = sums.gather(-1, (whole - 1).clamp(min=0)[..., None])[..., 0]
    after = spectrum.gather(-1, whole.clamp(max=spectrum.shape[-1] - 1)[..., None])[..., 0]
    partial = (whole > 0) & (whole < spectrum.shape[-1])
    found = whole + torch.where(partial, last / after.abs(), 0.0)
    return torch.where(spectrum.isnan().any(-1), torch.nan, found)


class Divergence(NamedTuple):
    """How neighbours part."""

    exponent: Tensor  # []  per unit time
    curve: (
        Tensor  # [K + 1]  mean logarithm of the distance after each number of steps: is it straight where it was fit?
    )


@torch.no_grad()
def lyapunov_from_data(
    series: Tensor,
    fit: tuple[int, int],
    *,
    theiler: int,
    dt: float = 1.0,
    dimension: int = 1,
    delay: int = 1,
    references: int = 2000,
) -> Divergence:
    """The maximal exponent from a series [T, N] alone (Rosenstein et al., 1993): the slope of the mean log-distance of
    nearest neighbours over the steps fit[0] .. fit[1].

    theiler: neighbours are more than so many steps apart in time; about one period. dimension, delay: the states are
    series of that many delayed copies. `references` states, evenly spread, look for their neighbour among all.
    Its limits: it tells nothing of the other exponents; the fit range must lie where the curve is straight, after the
    vectors have turned and before the distances reach the attractor's size, and is the user's to choose; noise of size
    s hides every distance below s and flattens the curve; a series that is not chaotic has a slope of about 0, noise
    has a steep first step and then none. Expect 5 to 10 % where data are clean and long, and prefer `lyapunov_spectrum`
    where there is a model."""
    x = _truth(series, "lyapunov_from_data")
    (first, last), span = fit, (dimension - 1) * delay
    rows = len(x) - span - last  # states that can be followed for so long
    if not 0 <= first < last or theiler < 0 or dimension < 1 or delay < 1 or rows <= theiler + 1:
        raise ValueError(
            f"lyapunov_from_data: got {len(x)} steps, fit {fit}, theiler {theiler}, dimension {dimension}, "
            f"delay {delay}; expected 0 <= fit[0] < fit[1] and over theiler + fit[1] + (dimension - 1) delay + 1 steps"
        )
    x = torch.cat([x[i * delay : len(x) - span + i * delay] for i in range(dimension)], 1)
    at = torch.linspace(0, rows - 1, min(references, rows), dtype=torch.float64, device=x.device).long()
    time, near = torch.arange(rows, device=x.device), []
    for part in at.split(max(1, PIECE // rows)):
        # no expansion of the square: the distances that count are the smallest
        distance = torch.cdist(x[part], x[:rows], compute_mode="donot_use_mm_for_euclid_dist")
        barred = ((part[:, None] - time).abs() <= theiler) | (distance == 0)
        least, index = distance.masked_fill(barred, torch.inf).min(1)
        near.append(torch.where(least.isfinite(), index, -1))
    mate = torch.cat(near)
    at, mate = at[mate >= 0], mate[mate >= 0]
    if len(at) == 0:
        raise ValueError("lyapunov_from_data: no state has a neighbour but itself: the series repeats exactly")
    curve = []
    for step in range(last + 1):
        distance = (x[at + step] - x[mate + step]).norm(dim=1)
        curve.append(distance[distance > 0].log().mean())
    curve = torch.stack(curve)
    step = torch.arange(first, last + 1, dtype=x.dtype, device=x.device)
    step = step - step.mean()
    slope = (step * curve[first:]).sum() / step.square().sum()
    return Divergence(slope / dt, curve)


# ---------------------------------------------------------------- together


def scores(
    test: Tensor,
    generated: Tensor,
    predict: Callable[[Tensor, int], Tensor] | None = None,
    n: int = 20,
    *,
    generator: torch.Generator,
) -> dict[str, float]:
    """The scores of a free run `generated` [T, N] (see `settled`) against the whole test series [T, N], by keys that
    name the variants: d_stsp_histogram30 or d_stsp_mixture1, d_h_sigma20 and, where there are forecasts, pe_n.
    predict: (series [T, N], n) -> [B, n, N], the forecasts of the last B times that have n steps after them, as
    `forecast` and `Null.forecast` make them. The generator serves the mixture alone."""
    distance, variant = d_stsp(test, generated, generator)
    out = {variant: distance.item(), "d_h_sigma20": d_h(test, generated).item()}
    if predict is not None:
        out[f"pe_{n}"] = prediction_error(predict(test, n), test).item()
    return out
