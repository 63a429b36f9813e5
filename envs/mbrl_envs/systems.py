"""Chaotic flows and maps in torch, batched, with analytic Jacobians; orbits of them as Datasets.

`SYSTEMS` holds them by name with published parameters, `system` finds one (of another size: "lorenz96-40"; of the
package dysts: "dysts:Halvorsen"), `integrate` gives states to a tolerance, `trajectory` a series with noise.
Times are in the units of each system's equations.
"""

import abc
import importlib
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from mbrl.data import Dataset
from mbrl_envs.scores import close_matches
from mbrl_envs.series import from_arrays, standardise


class System(abc.ABC):
    """States x [..., D], inputs u [..., A] in [-1, 1] (None: zero). Subclasses are frozen dataclasses of their
    parameters; type and device are the states'. A new system states dim, dt, and a box from which orbits start."""

    name: str
    dim: int
    inputs: int = 0
    dt: float = 1.0  # usual time between samples
    transient: float = 0.0  # after which an orbit that starts in the box is on the attractor
    low: float | tuple[float, ...] = -1.0  # the box, for each dimension or for all
    high: float | tuple[float, ...] = 1.0

    @abc.abstractmethod
    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """[..., D, D]: derivatives of the field, or of the map, by the state."""

    def observe(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., O]: what a series of the system shows; the state itself unless that is unbounded."""
        return x

    def starts(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, D] float64, uniform in the box."""
        low, high = (torch.tensor(side, dtype=torch.float64) for side in (self.low, self.high))
        return low + (high - low) * torch.rand(n, self.dim, generator=generator, dtype=torch.float64)

    def parameters(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass


class Flow(System):
    """dx/dt = field(x, u)."""

    stiff: bool = False  # whether explicit steps would be bounded by stability instead of accuracy

    @abc.abstractmethod
    def field(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D]."""

    def rates(self, x: np.ndarray, u: np.ndarray | None = None) -> np.ndarray:
        """The field at one point [D], for a solver."""
        return self.field(torch.from_numpy(x), None if u is None else torch.from_numpy(u)).numpy()


class Equations(Flow):
    """A flow of few states, its right-hand side written once for tensors and for plain numbers, in which a solver that
    asks for one point at a time is five times as fast."""

    @abc.abstractmethod
    def equations(self, x: Any, u: Any) -> list[Any]:
        """The rates, from sequences of states and inputs; u is empty where the input is zero."""

    def field(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        return torch.stack(self.equations(x.unbind(-1), () if u is None else u.unbind(-1)), -1)

    def rates(self, x: np.ndarray, u: np.ndarray | None = None) -> np.ndarray:
        return np.array(self.equations(x.tolist(), () if u is None else u.tolist()))


class Map(System):
    """x' = step(x, u); a step is the unit of time."""

    @abc.abstractmethod
    def step(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D]."""


def _matrix(like: Tensor, rows: list[list[Tensor | float]]) -> Tensor:
    """[..., D, D] from entries of the shape of `like`, or numbers."""
    full = lambda e: e if isinstance(e, Tensor) else torch.full_like(like, e)
    return torch.stack([torch.stack([full(e) for e in row], -1) for row in rows], -2)


def sine(x: Any) -> Any:
    return x.sin() if isinstance(x, Tensor) else math.sin(x)


def cosine(x: Any) -> Any:
    return x.cos() if isinstance(x, Tensor) else math.cos(x)


# ---------------------------------------------------------------- flows


@dataclass(frozen=True)
class Lorenz63(Equations):
    """Convection (Lorenz 1963, J. Atmos. Sci. 20)."""

    sigma: float = 10.0
    rho: float = 28.0
    beta: float = 8 / 3

    name, dim, dt, transient = "lorenz63", 3, 0.01, 50.0
    low, high = (-10.0, -10.0, 15.0), (10.0, 10.0, 35.0)

    def equations(self, x: Any, u: Any) -> list[Any]:
        x, y, z = x
        return [self.sigma * (y - x), x * (self.rho - z) - y, x * y - self.beta * z]

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        x, y, z = x.unbind(-1)
        return _matrix(x, [[-self.sigma, self.sigma, 0.0], [self.rho - z, -1.0, -x], [y, x, -self.beta]])


@dataclass(frozen=True)
class Lorenz96(Flow):
    """dx_i/dt = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + force on a ring of `dim` sites (Lorenz 1996, Seminar on
    Predictability, ECMWF). dt 0.05 stands for 6 hours."""

    dim: int = 20
    force: float = 8.0

    dt, transient = 0.05, 20.0

    def __post_init__(self) -> None:
        if self.dim < 4:
            raise ValueError(f"Lorenz96: dim is {self.dim}, expected at least 4 sites")

    @property
    def name(self) -> str:
        return f"lorenz96-{self.dim}"

    @property
    def low(self) -> float:
        return self.force - 1

    @property
    def high(self) -> float:
        return self.force + 1

    def field(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        return self._ring(x, torch.cat([x[..., -2:], x, x[..., :1]], -1))

    def rates(self, x: np.ndarray, u: np.ndarray | None = None) -> np.ndarray:
        return self._ring(x, np.concatenate([x[-2:], x, x[:1]]))

    def _ring(self, x: Any, around: Any) -> Any:
        """around: x from two sites before the first to one behind the last."""
        return (around[..., 3:] - around[..., :-3]) * around[..., 1:-2] - x + self.force

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        by = torch.diag_embed(x.roll(1, -1))  # rolled by columns, the entry (i, i) becomes the one at i's neighbour
        at = torch.diag_embed(x.roll(-1, -1) - x.roll(2, -1))
        eye = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        return by.roll(1, -1) - by.roll(-2, -1) + at.roll(-1, -1) - eye


@dataclass(frozen=True)
class Roessler(Equations):
    """Rössler 1976 (Phys. Lett. A 57)."""

    a: float = 0.2
    b: float = 0.2
    c: float = 5.7

    name, dim, dt, transient = "roessler", 3, 0.05, 200.0
    low, high = (-4.0, -4.0, 0.0), (4.0, 4.0, 0.1)

    def equations(self, x: Any, u: Any) -> list[Any]:
        x, y, z = x
        return [-y - z, x + self.a * y, self.b + z * (x - self.c)]

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        x, _, z = x.unbind(-1)
        return _matrix(x, [[0.0, -1.0, -1.0], [1.0, self.a, 0.0], [z, 0.0, x - self.c]])


@dataclass(frozen=True)
class Chua(Equations):
    """Chua's circuit, the double scroll (Matsumoto, Chua, Komuro 1985, IEEE Trans. Circuits Syst. 32), without units:

    dx/dt = alpha (y - x - h(x)), dy/dt = x - y + z, dz/dt = -beta y

    h is piecewise linear, of slope `inner` for |x| < 1 and `outer` beyond."""

    alpha: float = 9.0
    beta: float = 100 / 7
    inner: float = -8 / 7
    outer: float = -5 / 7

    name, dim, dt, transient = "chua", 3, 0.05, 100.0
    low, high = (-0.8, -0.1, -0.1), (0.8, 0.1, 0.1)

    def equations(self, x: Any, u: Any) -> list[Any]:
        x, y, z = x
        diode = self.outer * x + (self.inner - self.outer) * (abs(x + 1) - abs(x - 1)) / 2
        return [self.alpha * (y - x - diode), x - y + z, -self.beta * y]

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        x = x[..., 0]
        slope = self.outer + (self.inner - self.outer) * (x.abs() < 1).to(x)
        return _matrix(x, [[-self.alpha * (1 + slope), self.alpha, 0.0], [1.0, -1.0, 1.0], [0.0, -self.beta, 0.0]])


@dataclass(frozen=True)
class Duffing(Equations):
    """d2x/dt2 = -delta dx/dt - alpha x - beta x^3 + gain u: a beam between two wells, pushed by an action (Moon, Holmes
    1979, J. Sound Vib. 65). State (x, dx/dt)."""

    delta: float = 0.25
    alpha: float = -1.0
    beta: float = 1.0
    gain: float = 0.3  # the force at u = 1

    name, dim, dt, transient = "duffing-driven", 2, 0.1, 100.0
    inputs = 1

    def equations(self, x: Any, u: Any) -> list[Any]:
        x, v = x
        push = -self.delta * v - self.alpha * x - self.beta * x * x * x
        return [v, push + self.gain * u[0] if u else push]

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        x = x[..., 0]
        return _matrix(x, [[0.0, 1.0], [-self.alpha - 3 * self.beta * x**2, -self.delta]])


@dataclass(frozen=True)
class ForcedDuffing(Duffing):
    """Duffing under the force gain cos(omega t), autonomous: state (x, dx/dt, cos, sin of omega t). At the default
    parameters (Guckenheimer, Holmes 1983, section 2.2) the attractor is strange. Besides the zero exponent of the flow,
    the circle's radius gives another."""

    omega: float = 1.0

    name, dim = "duffing", 4
    inputs = 0
    low, high = (-1.0, -1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.0)  # phase 0

    def equations(self, x: Any, u: Any) -> list[Any]:
        cos, sin = x[2:]
        return [*super().equations(x[:2], [cos]), -self.omega * sin, self.omega * cos]

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        x, w = x[..., 0], self.omega
        beam = [[0.0, 1.0, 0.0, 0.0], [-self.alpha - 3 * self.beta * x**2, -self.delta, self.gain, 0.0]]
        return _matrix(x, [*beam, [0.0, 0.0, 0.0, -w], [0.0, 0.0, w, 0.0]])


@dataclass(frozen=True)
class VanDerPol(Equations):
    """d2x/dt2 = mu (1 - x^2) dx/dt - x + gain u (van der Pol 1926, Phil. Mag. 2). State (x, dx/dt); it takes an input
    where gain is not 0."""

    mu: float = 1.0
    gain: float = 0.0

    dim, dt, transient = 2, 0.1, 50.0
    low, high = -2.0, 2.0

    @property
    def name(self) -> str:
        return "vanderpol-driven" if self.gain else "vanderpol"

    @property
    def inputs(self) -> int:
        return int(self.gain != 0)

    @property
    def stiff(self) -> bool:
        return self.mu > 20

    def equations(self, x: Any, u: Any) -> list[Any]:
        x, v = x
        push = self.mu * (1 - x * x) * v - x
        return [v, push + self.gain * u[0] if u else push]

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        x, v = x.unbind(-1)
        return _matrix(x, [[0.0, 1.0], [-2 * self.mu * x * v - 1, self.mu * (1 - x**2)]])


@dataclass(frozen=True)
class DoublePendulum(Equations):
    """Two point masses on rods in a plane (Shinbrot, Grebogi, Wisdom, Yorke 1992, Am. J. Phys. 60). State: angles from
    hanging (rad), of each rod by itself, and their rates (rad / s); observed are the angles' cosines, their sines and
    the rates. Without damping energy is conserved: there is no attractor, and orbits from different starts lie on
    different shells. The box is chaotic: both rods horizontal or above, at rest."""

    mass1: float = 1.0  # kg
    mass2: float = 1.0
    length1: float = 1.0  # m
    length2: float = 1.0
    gravity: float = 9.81  # m / s^2
    damping: float = 0.0  # N m s, in each joint

    name, dim, dt = "double-pendulum", 4, 0.02
    low, high = (math.pi / 2, math.pi / 2, 0.0, 0.0), (math.pi, math.pi, 0.0, 0.0)

    def _inertia(self, turn: Any) -> tuple[float, Any, float, Any]:
        """Entries m11, m12, m22 of the mass matrix, and its determinant, of the angle between the rods."""
        m11 = (self.mass1 + self.mass2) * self.length1**2
        m12 = self.mass2 * self.length1 * self.length2 * cosine(turn)
        m22 = self.mass2 * self.length2**2
        return m11, m12, m22, m11 * m22 - m12 * m12

    def equations(self, x: Any, u: Any) -> list[Any]:
        a, b, v, w = x
        swirl = self.mass2 * self.length1 * self.length2 * sine(a - b)
        weight1 = (self.mass1 + self.mass2) * self.gravity * self.length1
        weight2 = self.mass2 * self.gravity * self.length2
        f1 = -swirl * w * w - weight1 * sine(a) - self.damping * (2 * v - w)
        f2 = swirl * v * v - weight2 * sine(b) - self.damping * (w - v)
        m11, m12, m22, det = self._inertia(a - b)
        return [v, w, (m22 * f1 - m12 * f2) / det, (m11 * f2 - m12 * f1) / det]

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        a, b, v, w = x.unbind(-1)
        p = self.mass2 * self.length1 * self.length2
        c, cos, sin = self.damping, p * (a - b).cos(), p * (a - b).sin()
        weight1 = (self.mass1 + self.mass2) * self.gravity * self.length1 * a.cos()
        weight2 = self.mass2 * self.gravity * self.length2 * b.cos()
        _, _, acc1, acc2 = self.equations((a, b, v, w), ())
        # d(f - M acc) / d(a, b, v, w), acc held: of M only m12 moves, by -sin for a and by sin for b
        df1 = [-cos * w**2 - weight1 + sin * acc2, cos * w**2 - sin * acc2, 0 * a - 2 * c, -2 * sin * w + c]
        df2 = [cos * v**2 + sin * acc1, -cos * v**2 - weight2 - sin * acc1, 2 * sin * v + c, 0 * a - c]
        m11, m12, m22, det = self._inertia(a - b)
        row1: list[Tensor | float] = [(m22 * f1 - m12 * f2) / det for f1, f2 in zip(df1, df2, strict=True)]
        row2: list[Tensor | float] = [(m11 * f2 - m12 * f1) / det for f1, f2 in zip(df1, df2, strict=True)]
        return _matrix(a, [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], row1, row2])

    def observe(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :2].cos(), x[..., :2].sin(), x[..., 2:]], -1)

    def energy(self, x: Tensor) -> Tensor:
        """[..., 4] -> [...] J, 0 where both joints are level with the pivot and at rest."""
        a, b, v, w = x.unbind(-1)
        m11, m12, m22, _ = self._inertia(a - b)
        kinetic = (m11 * v**2 + m22 * w**2) / 2 + m12 * v * w
        height = (self.mass1 + self.mass2) * self.length1 * a.cos() + self.mass2 * self.length2 * b.cos()
        return kinetic - self.gravity * height


@dataclass(frozen=True)
class HindmarshRose(Equations):
    """A neuron that bursts, irregularly at the default current (Hindmarsh, Rose 1984, Proc. R. Soc. B 221):

    dx/dt = y - a x^3 + b x^2 - z + current, dy/dt = c - d x^2 - y, dz/dt = r (s (x - rest) - z)"""

    a: float = 1.0
    b: float = 3.0
    c: float = 1.0
    d: float = 5.0
    r: float = 0.006
    s: float = 4.0
    rest: float = -1.6
    current: float = 3.25

    name, dim, dt, transient = "hindmarsh-rose", 3, 0.1, 1000.0
    low, high = (-1.6, -10.0, 2.5), (-1.0, -4.0, 3.5)

    def equations(self, x: Any, u: Any) -> list[Any]:
        x, y, z = x
        square = x * x
        spike = y - self.a * square * x + self.b * square - z + self.current
        return [spike, self.c - self.d * square - y, self.r * (self.s * (x - self.rest) - z)]

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        x = x[..., 0]
        spike = [-3 * self.a * x**2 + 2 * self.b * x, 1.0, -1.0]
        return _matrix(x, [spike, [-2 * self.d * x, -1.0, 0.0], [self.r * self.s, 0.0, -self.r]])


@lru_cache
def _ks_symbols(dim: int, length: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the linear part, and of -i d/dx as far as it is resolved: [dim // 2 + 1] each."""
    mode = np.arange(dim // 2 + 1)
    k = 2 * math.pi / length * mode
    return k**2 - k**4, k * (mode <= dim / 3)


@dataclass(frozen=True)
class KuramotoSivashinsky(Flow):
    """u_t = -u u_x - u_xx - u_xxxx on a ring of `length`, at `dim` equidistant points: derivatives are spectral, and
    the product is dealiased (modes beyond dim / 3 feel none of it). Length 22 is the smallest system that is studied as
    turbulent (Cvitanovic, Davidchack, Siminos 2010, SIAM J. Appl. Dyn. Syst. 9). The mean is conserved, and 0 in the
    box. Rates reach -(pi dim / length)^4, so it is stiff."""

    dim: int = 64
    length: float = 22.0

    dt, transient = 0.25, 200.0
    stiff = True

    def __post_init__(self) -> None:
        if self.dim < 8:
            raise ValueError(f"KuramotoSivashinsky: dim is {self.dim}, expected at least 8 points")

    @property
    def name(self) -> str:
        return f"ks-{self.dim}"

    def field(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        return self._spectral(torch.fft, x, *self._symbols(x))

    def rates(self, x: np.ndarray, u: np.ndarray | None = None) -> np.ndarray:
        return self._spectral(np.fft, x, *_ks_symbols(self.dim, self.length))

    def _spectral(self, fft: Any, x: Any, linear: Any, slope: Any) -> Any:
        return fft.irfft(linear * fft.rfft(x) - 0.5j * slope * fft.rfft(x * x), n=self.dim)

    def _symbols(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(s).to(x) for s in _ks_symbols(self.dim, self.length))

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        basis = torch.fft.rfft(torch.eye(self.dim, dtype=x.dtype, device=x.device), dim=0)
        dense = lambda symbol: torch.fft.irfft(symbol[:, None] * basis, n=self.dim, dim=0)
        linear, slope = self._symbols(x)
        return dense(linear) - dense(1j * slope) * x[..., None, :]

    def starts(self, n: int, generator: torch.Generator) -> Tensor:
        drawn = super().starts(n, generator)
        return drawn - drawn.mean(-1, keepdim=True)


# ---------------------------------------------------------------- maps


@dataclass(frozen=True)
class Logistic(Map):
    """x' = r x (1 - x) (May 1976, Nature 261)."""

    r: float = 4.0

    name, dim, transient = "logistic", 1, 1000.0
    low, high = 0.1, 0.9

    def step(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        return self.r * x * (1 - x)

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        return (self.r * (1 - 2 * x))[..., None]


@dataclass(frozen=True)
class Henon(Map):
    """x' = 1 - a x^2 + y, y' = b x (Hénon 1976, Commun. Math. Phys. 50)."""

    a: float = 1.4
    b: float = 0.3

    name, dim, transient = "henon", 2, 1000.0
    low, high = -0.1, 0.1

    def step(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        x, y = x.unbind(-1)
        return torch.stack([1 - self.a * x**2 + y, self.b * x], -1)

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        x = x[..., 0]
        return _matrix(x, [[-2 * self.a * x, 1.0], [self.b, 0.0]])


# ---------------------------------------------------------------- dysts


@dataclass(frozen=True, eq=False, kw_only=True)
class Dysts(Flow):
    """A flow of the package dysts (Gilpin 2021, arXiv 2110.05266) behind this module's interface; `dysts` makes one.
    The field is numpy's, without gradients; the Jacobian is by central differences. Of its metadata the parameters, the
    initial condition (orbits start within 1 % of it) and the period are used, not the exponents, which are unreliable.
    Where it has unbounded coordinates, observed is what dysts makes of them."""

    name: str
    dim: int
    model: Any
    ready: np.ndarray  # [D] its initial condition
    dt: float
    transient: float
    stiff: bool
    batched: bool  # whether its function takes many points at once

    def field(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        points = x.detach().cpu().double().reshape(-1, self.dim).numpy()
        if self.batched:
            rates = _dysts_rates(self.model, points)
        else:
            rates = np.stack([_dysts_rates(self.model, point) for point in points])
        return torch.from_numpy(rates).to(x).reshape(x.shape)

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        x64 = x.detach().double()
        scale = torch.maximum(x64.abs(), torch.from_numpy(np.abs(self.ready)).to(x64.device))
        h = 6e-6 * torch.where(scale > 0, scale, 1.0)  # about the cube root of the rounding
        off = torch.diag_embed(h)
        ahead, behind = (self.field(x64[..., None, :] + side * off) for side in (1, -1))  # [..., D (by which), D]
        return ((ahead - behind) / (2 * h[..., None])).mT.to(x)

    def observe(self, x: Tensor) -> Tensor:
        bounded = getattr(self.model, "_postprocessing", None)
        if bounded is None:
            return x
        columns = bounded(*np.moveaxis(x.detach().cpu().double().numpy(), -1, 0))
        return torch.from_numpy(np.stack(np.broadcast_arrays(*columns), -1)).to(x)

    def starts(self, n: int, generator: torch.Generator) -> Tensor:
        drawn = 2 * torch.rand(n, self.dim, generator=generator, dtype=torch.float64) - 1
        return torch.from_numpy(self.ready) * (1 + 0.01 * drawn)

    def parameters(self) -> dict[str, Any]:
        return {k: np.asarray(v).tolist() for k, v in self.model.params.items()}

    def rates(self, x: np.ndarray, u: np.ndarray | None = None) -> np.ndarray:
        return _dysts_rates(self.model, x)


def _dysts_rates(model: Any, points: np.ndarray) -> np.ndarray:
    """[D] or [n, D] -> alike."""
    with np.errstate(all="ignore"):
        rates = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in model.rhs(points, 0.0)))
    return np.stack(rates, -1).reshape(points.shape)


def _dysts_flows() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that numba is absent
            return importlib.import_module("dysts.flows")
    except ImportError as error:
        raise ImportError(f"dysts cannot be imported ({error}); pip install 'mbrl-suite[dysts]'") from error


def dysts_names() -> list[str]:
    """The flows of the installed dysts, but for those with delays, whose state is a function."""
    flows = vars(_dysts_flows()).items()
    named = [k for k, v in flows if inspect.isclass(v) and v.__module__ == "dysts.flows" and not k.startswith("_")]
    delayed = [k for k in named if any(c.__name__ == "DynSysDelay" for c in vars(_dysts_flows())[k].__mro__)]
    return sorted(set(named) - set(delayed))


def dysts(name: str, per_period: float = 100.0, stiff: bool = False) -> Dysts:
    """A system of dysts by its class's name, sampled `per_period` times in what dysts holds for its period; the
    transient is 20 of them. Raises ImportError without the package, ValueError for an unknown name."""
    flows, names = _dysts_flows(), dysts_names()
    if name not in names:
        raise ValueError(f"{name!r} is no flow without delays of dysts {close_matches(name, names)}".rstrip())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(flows, name)()
    ready = np.atleast_2d(np.asarray(model.ic, dtype=np.float64))[0]
    some = ready * np.array([[1.0], [1.01], [0.98]])
    singly = np.stack([_dysts_rates(model, x) for x in some])
    with np.errstate(all="ignore"):
        later = np.array([float(np.asarray(v).reshape(())) for v in model.rhs(ready, 0.731)])
    if not np.allclose(later, singly[0], rtol=1e-9):
        raise ValueError(f"dysts' {name} depends on the time itself; expected an autonomous system; take another")
    try:
        batched = np.allclose(_dysts_rates(model, some), singly, rtol=1e-9)
    except (ValueError, TypeError, IndexError):  # its function reads one point
        batched = False
    period = float(model.period)
    return Dysts(
        name=f"dysts:{name}",
        dim=len(ready),
        model=model,
        ready=ready,
        dt=period / per_period,
        transient=20 * period,
        stiff=stiff,
        batched=batched,
    )


# ---------------------------------------------------------------- by name

SYSTEMS: dict[str, System] = {
    s.name: s
    for s in (
        Lorenz63(),
        Lorenz96(),
        Roessler(),
        Chua(),
        ForcedDuffing(),
        Duffing(),
        VanDerPol(),
        VanDerPol(gain=1.0),
        DoublePendulum(),
        HindmarshRose(),
        KuramotoSivashinsky(),
        Logistic(),
        Henon(),
    )
}
SIZED: dict[str, Callable[[int], System]] = {"lorenz96": Lorenz96, "ks": KuramotoSivashinsky}


def system(name: str) -> System:
    """The system of that name, with its published parameters: one of SYSTEMS, `lorenz96-<sites>`, `ks-<points>` or
    `dysts:<Name>`. Raises ValueError that lists them."""
    if name in SYSTEMS:
        return SYSTEMS[name]
    if name.startswith("dysts:"):
        return dysts(name.removeprefix("dysts:"))
    kind, _, size = name.rpartition("-")
    if kind in SIZED and size.isdecimal():
        return SIZED[kind](int(size))
    sized = ", ".join(f"{k}-<size>" for k in SIZED)
    raise ValueError(
        f"{name!r} is no system{close_matches(name, SYSTEMS)}; expected {', '.join(SYSTEMS)}, {sized} or dysts:<Name>"
    )


# ---------------------------------------------------------------- input signals


@dataclass(frozen=True)
class Multisine:
    """Sines of equal amplitude and random phases at `lines` frequencies, evenly over [low, high] cycles per unit of
    time; each signal's greatest absolute value is 1."""

    low: float = 0.02
    high: float = 0.4
    lines: int = 20

    def __call__(self, steps: int, dt: float, inputs: int, generator: torch.Generator) -> Tensor:
        """[steps, inputs] in [-1, 1]."""
        phase = 2 * math.pi * torch.rand(inputs, self.lines, generator=generator, dtype=torch.float64)
        time = dt * torch.arange(steps, dtype=torch.float64)
        angle = 2 * math.pi * torch.linspace(self.low, self.high, self.lines, dtype=torch.float64) * time[:, None]
        signal = (angle[:, None] + phase).sin().sum(-1)
        return signal / signal.abs().amax(0)


@dataclass(frozen=True)
class RandomSteps:
    """Levels uniform in [-1, 1], each held for a time uniform in [shortest, longest]."""

    shortest: float = 1.0
    longest: float = 10.0

    def __call__(self, steps: int, dt: float, inputs: int, generator: torch.Generator) -> Tensor:
        """[steps, inputs] in [-1, 1]."""
        draw = lambda: torch.rand(steps, inputs, generator=generator, dtype=torch.float64)
        held = self.shortest + (self.longest - self.shortest) * draw()
        ends = (held / dt).round().clamp(min=1).cumsum(0)  # one past the last step of each level
        level = 2 * draw() - 1
        now = torch.arange(steps, dtype=torch.float64).expand(inputs, steps).contiguous()
        return level.gather(0, torch.searchsorted(ends.T.contiguous(), now, right=True).T)


Drive = Callable[[int, float, int, torch.Generator], Tensor]
"""(steps, dt, inputs, generator) -> [steps, inputs] in [-1, 1]."""


# ---------------------------------------------------------------- orbits


def integrate(
    system: System,
    x0: Any,
    steps: int,
    dt: Any = None,
    inputs: Any = None,
    *,
    rtol: float = 1e-9,
    atol: float = 1e-9,
) -> Tensor:
    """States [B, steps + 1, D], float64, at the times 0, dt, ... from x0 [B, D] (or [D], a batch of one). dt: a number
    or, of a flow, each interval's own [B, steps].

    Each row is solved by itself, by scipy's DOP853, a stiff system by its LSODA with the analytic Jacobian, to rtol and
    atol. inputs [steps, A] or [B, steps, A] are held over their interval, where the solver starts anew; None is zero. A
    map is iterated. Raises ValueError for wrong shapes and for an orbit that leaves the finite numbers."""
    start = torch.as_tensor(x0, dtype=torch.float64).cpu()
    start = start[None] if start.ndim == 1 else start
    if start.ndim != 2 or start.shape[1] != system.dim:
        raise ValueError(f"{system.name}: starts are {list(start.shape)}, expected [rows, {system.dim}]")
    if not start.isfinite().all():
        raise ValueError(f"{system.name}: a start is not finite: {start.tolist()}")
    every = torch.as_tensor(system.dt if dt is None else dt, dtype=torch.float64).cpu()
    if every.ndim and every.shape != (len(start), steps):
        raise ValueError(f"{system.name}: dt is {list(every.shape)}, expected a number or {[len(start), steps]}")
    if steps < 0 or not bool((every > 0).all()) or (isinstance(system, Map) and bool((every != 1).any())):
        least = "1" if isinstance(system, Map) else "a positive one"
        raise ValueError(f"{system.name}: {steps} steps of {dt}, expected at least none, and for dt {least}")
    times = (
        every.expand(len(start), steps).cumsum(1)
        if every.ndim
        else every * torch.arange(1, steps + 1).expand(len(start), -1)
    )
    held = None
    if inputs is not None:
        held = torch.as_tensor(inputs, dtype=torch.float64).cpu()
        shapes = (steps, system.inputs), (1, steps, system.inputs), (len(start), steps, system.inputs)
        if held.shape not in shapes:
            raise ValueError(
                f"{system.name}: inputs are {list(held.shape)}, expected {list(shapes[0])} or {list(shapes[2])}"
            )
        held = held.expand(shapes[2]) if system.inputs else None
    with torch.no_grad():
        if isinstance(system, Map):
            states = [start]
            for t in range(steps):
                states.append(system.step(states[-1], None if held is None else held[:, t]))
            out = torch.stack(states, 1)
        else:
            assert isinstance(system, Flow)
            each = zip(start, every.expand(len(start), steps), times, strict=True)
            rows = [
                _solve(system, x, dts, at, None if held is None else held[i], rtol, atol)
                for i, (x, dts, at) in enumerate(each)
            ]
            out = torch.stack(rows)
    if not (good := out.isfinite().all(-1)).all():
        row, at = (~good).nonzero()[0].tolist()
        at_time = float(times[row, at - 1]) if at else 0.0
        raise ValueError(
            f"{system.name}: row {row}, from {start[row].tolist()}, leaves the finite numbers before time {at_time:g}; "
            "start nearer the attractor, or check the parameters"
        )
    return out


def _solve(
    system: Flow, x: Tensor, dts: Tensor, times: Tensor, held: Tensor | None, rtol: float, atol: float
) -> Tensor:
    """[steps + 1, D] of one row; NaN from where the solver gives up."""
    steps = len(dts)
    out = np.full((steps + 1, system.dim), np.nan)
    out[0] = x

    def advance(y: np.ndarray, times: np.ndarray, u: np.ndarray | None) -> np.ndarray:
        how: dict[str, Any] = {"method": "DOP853"}
        if system.stiff:
            how = {"method": "LSODA", "jac": lambda _, y: system.jacobian(torch.from_numpy(y)).numpy()}
        field = lambda _, y: system.rates(y, u)
        with np.errstate(all="ignore"):
            return solve_ivp(field, (0.0, times[-1]), y, t_eval=times, rtol=rtol, atol=atol, **how).y.T

    if held is None and steps:
        found = advance(out[0], times.numpy(), None)
        out[1 : 1 + len(found)] = found
    for t in range(steps if held is not None else 0):
        assert held is not None
        found = advance(out[t], dts[t : t + 1].numpy(), held[t].numpy())
        if not len(found) or not np.isfinite(found).all():
            break
        out[t + 1] = found[-1]
    return torch.from_numpy(out)


def trajectory(
    system: System,
    steps: int,
    seed: int,
    *,
    episodes: int = 1,
    dt: float | None = None,
    transient: float | None = None,
    noise: float = 0.0,
    standardised: bool = False,
    drive: Drive | None = None,
    start: Any = None,
    rtol: float = 1e-9,
    atol: float = 1e-9,
) -> Dataset:
    """Series of `steps` samples each, from starts in the system's box (or `start`, [D] or [episodes, D]), after a
    transient (in time) that is not kept.

    noise: of the measurement, normal, its standard deviation in parts of each dimension's. standardised: each dimension
    to mean 0 and standard deviation 1, noise included (`series.standardise` brings a test series to the training
    series' units). drive: what a system with inputs gets, by default Multisine(), also during the transient. The same
    seed gives the same orbit with and without noise."""
    if steps < 2 or episodes < 1 or noise < 0:
        raise ValueError(
            f"trajectory: {episodes} series of {steps} samples with noise {noise}, expected at least 1, 2 and 0"
        )
    generator = torch.Generator().manual_seed(seed)
    dt = system.dt if dt is None else dt
    transient = system.transient if transient is None else transient
    skip = math.ceil(transient / dt - 1e-9)
    if start is None:
        start = system.starts(episodes, generator)
    start = torch.as_tensor(start, dtype=torch.float64).expand(episodes, system.dim)
    meta: dict[str, Any] = {"kind": "system", "system": system.name, "parameters": system.parameters(), "seed": seed}
    meta |= {"noise": noise, "transient": transient, "rtol": rtol, "atol": atol}
    held = None
    if system.inputs:
        drive = drive or Multisine()
        held = torch.stack([drive(skip + steps, dt, system.inputs, generator) for _ in range(episodes)])
        meta["drive"] = repr(drive)
    driven = None if held is None else held[:, :-1]
    states = integrate(system, start, skip + steps - 1, dt, driven, rtol=rtol, atol=atol)[:, skip:]
    obs = system.observe(states)  # [E, T, O]
    if noise:
        std = obs.flatten(0, 1).std(0, correction=0)
        obs = obs + noise * std * torch.randn(obs.shape, generator=generator, dtype=torch.float64)
    act = None if held is None else held[:, skip:].numpy()
    data = from_arrays(obs.numpy(), act, dt=dt, bounds=(-1.0, 1.0), name=system.name, meta=meta, label=system.name)
    return standardise(data) if standardised else data
