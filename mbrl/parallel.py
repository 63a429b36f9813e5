"""Teacher-forced trajectories and their gradient without a graph of the loop; in time step by step, or all at once.

With F the step, a trajectory under forcing is

    x_0 = start,    y_t = F(x_t, act_t),    x_{t+1} = keep_t y_t + (1 - keep_t) signal_t

and the loss is of the y_t. The states are found without a graph: by the loop, or as the root of the whole trajectory's
residual by Newton's method, each iteration of which is an affine recurrence, solved by a scan of logarithmic depth
(DEER, Lim et al., ICLR 2024, arXiv 2309.12252; of forced networks, arXiv 2605.12683). For a piecewise-linear F the
iterations end exactly. Then F is evaluated once, on all states at once, with a graph, and the gradients g_t of y_t
become those of the whole loop by the adjoint recurrence

    lambda_t = g_t + keep_t (J_{t+1}' lambda_{t+1}),    J the Jacobian of F,

which is affine, too: a loop or one scan. So no solve is differentiated, and the graph does not grow with T.

Shapes: T time, any rows, M states, A actions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]  # (z [..., M], act [..., A]) -> z' [..., M]; [*rows] or [T, *rows] lead
Jacobian = Callable[[Tensor, Tensor], Tensor]  # the same -> dz' / dz [..., M, M], the row is that of z'
Method = Literal["auto", "sequential", "parallel"]


@dataclass(frozen=True)
class Newton:
    """A solve has converged where no state misses what the step before it gives by more than `tolerance` roundings of
    the row's largest state. It may take so many `iterations`. Three to ten do where the forcing tames the dynamics (of
    strength alpha, where (1 - alpha) exp(lambda) < 1 with a margin, lambda the largest Lyapunov exponent of a step);
    beyond that hardly any number does."""

    iterations: int = 20
    tolerance: float = 128.0


class Forced(NamedTuple):
    """A trajectory under forcing."""

    pred: Tensor  # [T, *rows, M]  y_t, unforced, with a graph to the step's parameters, to start and to act
    states: Tensor  # [T, *rows, M]  x_t, from which the steps start; detached
    iterations: int  # linear solves; 0 where Newton was not tried
    parallel: bool  # whether states are Newton's; False where the loop gave them
    converged: bool  # False where Newton was tried and gave up, so that the loop had to do it all the same


def pays(device: torch.device, T: int, M: int) -> bool:
    """Whether "auto" solves parallel in time. Not on a CPU: there the loop was the faster for every T and M tried. On
    other devices, which wait for small kernels to be launched, by the number of these: about 14 for each step of a loop
    of shallow PLRNNs, and as many for each doubling of T in each solve, so that at T = 128 the loop launches 1.6
    times as many as seven solves. That rule has not been timed."""
    return device.type != "cpu" and T >= 128 and M <= 16


def forced(
    step: Step,
    jacobian: Jacobian,
    start: Tensor,
    act: Tensor,
    signal: Tensor,
    keep: Tensor,
    method: Method = "auto",
    newton: Newton = Newton(),
) -> Forced:
    """The trajectory from start [*rows, M] under act [T, *rows, A], forced towards signal [T, *rows, M].

    keep, to be broadcast to signal's shape, is 1 - alpha for generalized teacher forcing; 0 where a component is
    replaced and 1 where it is left alone, and there the other one may be nan. The last signal and keep force nothing.
    Signal and keep are constants in the gradient. Rows do not touch each other, except that if one does not converge,
    all are done again by the loop. Where an orbit is chaotic and hardly forced, Newton's states and the loop's are both
    orbits to rounding, but not the same one.

    The loop can be compiled and mapped over (`torch.func.vmap`), and never waits for the device; Newton looks at its
    residuals after each iteration. The memory is that of the Jacobians, T rows M^2 numbers: one such tensor is kept for
    the gradient, and three to four are held at the height of a solve (T = 20 000, M = 16 and 16 rows in float32: 0.33
    GB each, 1.15 GB in all). Gradients can be taken once, not twice."""
    rows = start.shape[:-1]
    if not len(signal) or signal.shape[1:] != start.shape or act.shape[:-1] != signal.shape[:-1]:
        got = f"start {list(start.shape)}, act {list(act.shape)} and signal {list(signal.shape)}"
        raise ValueError(f"forced: got {got}, expected [*rows, M], [T, *rows, A] and [T, *rows, M] with T >= 1")
    if method not in ("auto", "sequential", "parallel"):
        raise ValueError(f"forced: method is {method!r}, expected 'auto', 'sequential' or 'parallel'")
    T, M = signal.shape[0], signal.shape[-1]
    attempt = T > 1 and (method == "parallel" or (method == "auto" and pays(signal.device, T, M)))
    with torch.no_grad():
        pull = _Pull(signal, keep)
        states, iterations = None, 0
        if attempt:
            states, iterations = _newton(step, jacobian, start, act, signal, pull, newton)
        parallel = states is not None
        if states is None:
            states = _loop(step, start, act, pull)
    pred = step(torch.cat([start[None], states[1:]]), act)
    if torch.is_grad_enabled() and T > 1:  # `requires_grad` is no guide: inside vmap it is False
        with torch.no_grad():
            J = jacobian(states[1:], act[1:]).expand(T - 1, *rows, M, M)
            transfer = pull.slope(J.mT)
        pred = _Adjoint.apply(pred, transfer, parallel)
    return Forced(pred, states, iterations, parallel, parallel or not attempt)


class _Pull:
    """y_t [T - 1, *rows, M] -> x_{t+1}; the ends are chosen, not interpolated, since 0 * nan is nan."""

    def __init__(self, signal: Tensor, keep: Tensor) -> None:
        keep = keep.to(signal).expand(signal.shape)[:-1]
        self.keep, self.cut = keep, keep == 0
        self.drawn = torch.where(keep == 1, 0.0, (1 - keep) * signal[:-1])

    def __call__(self, y: Tensor) -> Tensor:
        return _mix(y, self.keep, self.cut, self.drawn)

    def slope(self, J: Tensor) -> Tensor:
        """diag(keep_t) J_t [T - 1, *rows, M, M]"""
        return (J * self.keep[..., None]).masked_fill_(self.cut[..., None], 0.0)


def _mix(y: Tensor, keep: Tensor, cut: Tensor, drawn: Tensor) -> Tensor:
    return torch.where(cut, drawn, torch.addcmul(drawn, keep, y))


def _loop(step: Step, start: Tensor, act: Tensor, pull: _Pull) -> Tensor:
    states = [start]
    for a, keep, cut, drawn in zip(act[:-1], pull.keep, pull.cut, pull.drawn, strict=True):
        states.append(_mix(step(states[-1], a), keep, cut, drawn))
    return torch.stack(states)


def _newton(
    step: Step, jacobian: Jacobian, start: Tensor, act: Tensor, signal: Tensor, pull: _Pull, newton: Newton
) -> tuple[Tensor | None, int]:
    """The states, or None where Newton gave up; and how many iterations it made."""
    x = torch.cat([start[None], torch.where(signal.isfinite(), signal, start)[:-1]])
    tolerance = newton.tolerance * torch.finfo(x.dtype).eps
    for iteration in range(newton.iterations + 1):
        residual = pull(step(x[:-1], act[:-1])) - x[1:]
        error, size = _largest(residual), _largest(torch.where(x.isfinite(), x, 0.0))
        unsolved = ~(error <= tolerance * size)  # nan is unsolved
        ongoing, finite = torch.stack([unsolved.any(), error.isfinite().all()]).tolist()
        if not ongoing:
            return x, iteration
        if not finite or iteration == newton.iterations:
            return None, iteration
        change = affine_scan(pull.slope(jacobian(x[:-1], act[:-1])), residual)
        x[1:] += torch.where(unsolved[..., None], change, 0.0)  # what is solved stays as it is
    raise AssertionError


def _largest(x: Tensor) -> Tensor:
    """[T, *rows, M] -> [*rows]"""
    return x.abs().amax((0, -1))


class _Adjoint(torch.autograd.Function):
    """The identity on y [T, *rows, M]; its backward pass adds to the gradient of each y what it does to those after it.
    transfer [T - 1, *rows, M, M]: diag(keep_t) J_{t+1}'."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, transfer: Tensor, parallel: bool) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.parallel = inputs[2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (transfer,) = ctx.saved_tensors
        solve = affine_scan if ctx.parallel else _affine_loop
        return torch.cat([solve(transfer, g[:-1], g[-1], reverse=True), g[-1:]]), None, None


# ---------------------------------------------------------------- affine recurrences


def affine_scan(A: Tensor, b: Tensor, start: Tensor | None = None, reverse: bool = False) -> Tensor:
    """x_1 ... x_T [T, *rows, M] of x_{t+1} = A_t x_t + b_t, with A [T, *rows, M, M], b [T, *rows, M] and x_0 = start
    [*rows, M], zero where None. Reversed, x_0 ... x_{T-1} of x_t = A_t x_{t+1} + b_t, x_T = start.

    By halving: two steps are one step of their product, so every other state comes from a recurrence of half the
    length, and the states between from those. Depth 2 log2 T, T products of matrices."""
    T = len(b)
    start = torch.zeros_like(b[0]) if start is None else start
    if T == 1:
        return _affine(A, start[None], b)
    half, odd = divmod(T, 2)
    if reverse:  # pairs end at T
        outer, inner, between = slice(odd, None, 2), slice(odd + 1, None, 2), slice(1 - odd, None, 2)
    else:  # pairs begin at 0
        outer, inner, between = slice(1, None, 2), slice(0, 2 * half, 2), slice(0, None, 2)
    coarse = affine_scan(A[outer] @ A[inner], _affine(A[outer], b[inner], b[outer]), start, reverse)
    before = (
        torch.cat([coarse[1 - odd :], start[None]]) if reverse else torch.cat([start[None], coarse[: T - half - 1]])
    )
    x = torch.empty_like(b)
    x[outer] = coarse
    x[between] = _affine(A[between], before, b[between])
    return x


def _affine_loop(A: Tensor, b: Tensor, start: Tensor, reverse: bool = False) -> Tensor:
    """`affine_scan`, one step after the other."""
    As, bs = (
        A.flatten(1, -3).unbind() if A.ndim > 3 else A[:, None].unbind(),
        b.reshape(len(b), -1, b.shape[-1], 1).unbind(),
    )
    x, out = start.reshape(bs[0].shape), []
    for t in reversed(range(len(bs))) if reverse else range(len(bs)):
        x = torch.baddbmm(bs[t], As[t], x)
        out.append(x)
    return torch.stack(out[::-1] if reverse else out).reshape(b.shape)


def _affine(A: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """A x + b"""
    return (A @ x[..., None])[..., 0] + b
