"""Steps and solvers of ordinary differential equations x' = f(x), batched over rows, each with a length of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Field = Callable[[Tensor], Tensor]  # z [B, O] -> dz/dt [B, O]
Steps = list[tuple[Tensor, Tensor]]  # an interval each: where the solver's steps begin and their sizes [n], as shares

# Tsitouras, Comput. Math. Appl. 62 (2011): stages 2 to 7, and the weights of the fifth less those of the fourth order.
TSIT5 = (
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
    (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
)
TSIT5_ERROR = (
    *(-0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995, -0.1447110071732629),
    *(0.5823571654525552, -0.45808210592918697, 1 / 66),
)
TSIT5_STABILITY = 3.5068  # how far its region of stability reaches along the negative axis


# ---------------------------------------------------------------- steps


class Tsit5Step(NamedTuple):
    x: Tensor  # [B, O]  fifth order
    error: Tensor  # [B, O]  x less the embedded solution of fourth order
    stages: tuple[Tensor, ...]  # the seven slopes [B, O]; the last is the field at x, and the next step's first
    sixth: Tensor  # [B, O]  where the sixth slope was taken; the seventh was taken at x


def tsit5_step(f: Field, x: Tensor, dt: Tensor | float) -> Tsit5Step:
    """One step of x' = f(x), x [B, O], over dt [B, 1]: Tsitouras' pair of orders 5 and 4."""
    after, slopes, sixth = fifth(f, x, dt)
    slopes.append(f(after))
    return Tsit5Step(after, dt * _weighted(TSIT5_ERROR, slopes), tuple(slopes), sixth)


def rk4_step(f: Field, x: Tensor, dt: Tensor | float) -> Tensor:
    """One step of x' = f(x), x [B, O], over dt [B, 1]: the classical method of fourth order."""
    k1 = f(x)
    k2 = f(x + dt / 2 * k1)
    k3 = f(x + dt / 2 * k2)
    k4 = f(x + dt * k3)
    return x + dt / 6 * (k1 + 2 * (k2 + k3) + k4)


def fifth(f: Field, x: Tensor, dt: Tensor | float) -> tuple[Tensor, list[Tensor], Tensor]:
    """The step's end, six slopes, and where the sixth was taken."""
    slopes, points = [f(x)], [x]
    for row in TSIT5[:-1]:
        points.append(x + dt * _weighted(row, slopes))
        slopes.append(f(points[-1]))
    return x + dt * _weighted(TSIT5[-1], slopes), slopes, points[-1]


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for w, k in zip(weights[1:], slopes[1:], strict=True):
        total = total + w * k
    return total


# ---------------------------------------------------------------- solvers


@dataclass(frozen=True)
class RK4:
    """Classical Runge-Kutta, so many equal steps an interval (4 evaluations each)."""

    substeps: int = 1

    def flow(self, f: Field, z: Tensor, dt: Tensor, params: tuple[Tensor, ...], log: Steps | None = None) -> Tensor:
        """z [B, O] one interval of lengths dt [B, 1] on. params: the tensors that f depends on, for an adjoint; log:
        receives the interval's steps."""
        return _fixed(lambda x, h: rk4_step(f, x, h), z, dt, self.substeps, log)


@dataclass(frozen=True)
class Tsit5:
    """Tsitouras' fifth order, so many equal steps an interval (6 evaluations each)."""

    substeps: int = 1

    def flow(self, f: Field, z: Tensor, dt: Tensor, params: tuple[Tensor, ...], log: Steps | None = None) -> Tensor:
        """As RK4's."""
        return _fixed(lambda x, h: fifth(f, x, h)[0], z, dt, self.substeps, log)


@dataclass(frozen=True)
class Dopri5:
    """Dormand and Prince's adaptive method, by torchdiffeq (`pip install mbrl-suite[ode]`).

    The rows of a batch share one sequence of steps, and the tolerances hold for the root mean square over all of them:
    a hard row among many easy ones errs by more than it would alone. Its steps depend on values: it runs neither
    compiled nor captured nor under `vmap`. adjoint: gradients by integrating backwards, in constant memory, instead of
    through the steps."""

    rtol: float = 1e-5
    atol: float = 1e-6  # standard deviations of the data
    adjoint: bool = False
    max_steps: int = 10_000

    def flow(self, f: Field, z: Tensor, dt: Tensor, params: tuple[Tensor, ...], log: Steps | None = None) -> Tensor:
        """As RK4's. Raises RuntimeError where the solver fails, and where it cannot run."""
        seen = Seen(f, z, dt)
        after = self.solve(seen, z, z.new_tensor([0.0, 1.0]), (*params, dt))[-1]
        if log is not None:
            begin, size = z.new_tensor(seen.accepted).T
            log.append((begin, size))
        return after

    def solve(self, seen: "Seen", z: Tensor, times: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        """[T, B, O]: at the rising times [T] of `seen`; z [B, O] is at the first."""
        try:
            from torchdiffeq import odeint, odeint_adjoint
        except ImportError as error:
            raise ImportError("Dopri5 needs torchdiffeq: pip install mbrl-suite[ode], or use RK4 or Tsit5") from error
        where = "Dopri5: an adaptive solver runs neither compiled nor captured nor under vmap; use RK4 or Tsit5 there"
        if torch.compiler.is_compiling():
            raise RuntimeError(where)
        try:
            seen.sound.any().item()  # what the solver does at each step
        except RuntimeError as error:
            raise RuntimeError(where) from error
        settings = {"rtol": self.rtol, "atol": self.atol, "options": {"max_num_steps": self.max_steps}}
        start = torch.where(seen.sound, z, 0.0)
        try:
            if self.adjoint and torch.is_grad_enabled():
                found = odeint_adjoint(seen, start, times, method="dopri5", adjoint_params=params, **settings)
            else:
                found = odeint(seen, start, times, method="dopri5", **settings)
        except AssertionError as error:
            raise RuntimeError(
                f"Dopri5: torchdiffeq gave up ({error}): a row of the batch diverges, or the field is too stiff; "
                "loosen the tolerances, or use RK4 or Tsit5, where rows do not share their steps"
            ) from error
        assert isinstance(found, Tensor)
        return torch.where(seen.sound, found, torch.nan)


Solver = RK4 | Tsit5 | Dopri5


def _fixed(step: Callable, z: Tensor, dt: Tensor, substeps: int, log: Steps | None) -> Tensor:
    h = dt / substeps
    for _ in range(substeps):
        z = step(z, h)
    if log is not None:
        begin = torch.arange(substeps, device=z.device, dtype=z.dtype) / substeps
        log.append((begin, torch.full_like(begin, 1 / substeps)))
    return z


class Seen:
    """A field over intervals of lengths dt [B, 1], each taken as 1, in torchdiffeq's form; what the solver did with it.
    Rows that do not begin finite stand still."""

    def __init__(self, f: Field, z: Tensor, dt: Tensor) -> None:
        self.f, self.dt, self.sound = f, dt, z.detach().isfinite().all(-1, keepdim=True)
        self.evaluations, self.accepted = 0, []  # (begin, size) of each accepted step

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        self.evaluations += 1
        return torch.where(self.sound, self.dt * self.f(z), 0.0)

    def callback_accept_step(self, begin: Tensor, z: Tensor, size: Tensor) -> None:
        self.accepted.append((float(begin.detach()), float(size.detach())))
