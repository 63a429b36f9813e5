"""Families of planar ODEs for meta-learning: one field, environments that differ in its parameters, Datasets of many.

| set            | families | environments to train (to adapt)  | points | what it is                                  |
|----------------|----------|-----------------------------------|--------|---------------------------------------------|
| ten            | 10       | 5 (4) of each                     | 100    | ODEBench's (arXiv 2310.05573) in MixER      |
| four           | 4        | 5 (4) of each                     | 100    | the set that MixER's authors ship           |
| lotka-volterra | 1        | 9 (4)                             | 20     | CoDA's (arXiv 2202.01889)                   |
| driven         | 3        | 5 (4) of each                     | 100    | three of the ten with an action             |

MixER is arXiv 2502.05335, whose experiments take 4 trajectories of each environment to train and 32 to test. Points are
horizon / points apart, the first at 0. In data, time is counted in these intervals, so that families of every horizon
stand in one Dataset: dt is 1, and the field of `Environment.system` is the family's times its interval.
"""

import hashlib
import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mbrl.data import Dataset
from mbrl_envs import contexts
from mbrl_envs.collect import atomic
from mbrl_envs.scores import close_matches
from mbrl_envs.series import digest, mixed
from mbrl_envs.systems import Equations, RandomSteps, cosine, integrate, sine

TOLERANCE = 1e-9  # of the solver, relative and absolute
DRIVE = RandomSteps(1.0, 10.0)  # actions: levels uniform in [-1, 1], each held for 1 to 10 intervals

# ---------------------------------------------------------------- families


@dataclass(frozen=True)
class Factors:
    """What reference values are multiplied by: linspace(low, high), n environments where none else are asked for.

    grid: every parameter by its own factor, the last one's changing fastest, on the smallest square grid of at least n
    environments, of which the first n are kept; else all parameters by the same."""

    low: float
    high: float
    n: int
    grid: bool = True

    def parameters(self, reference: tuple[float, ...], n: int | None = None) -> list[tuple[float, ...]]:
        n, axes = self.n if n is None else n, len(reference) if self.grid else 1
        side = next(s for s in itertools.count(1) if s**axes >= n)
        line = np.linspace(self.low, self.high, side).tolist()
        rows = itertools.islice(itertools.product(line, repeat=axes), n)
        return [tuple(f * r for f, r in zip(row * (len(reference) // axes), reference, strict=True)) for row in rows]


@dataclass(frozen=True)
class Family:
    """dx/dt = field(x, act, p) of two states; times are in the equations' own units."""

    name: str
    parameters: tuple[str, ...]
    reference: tuple[float, ...]
    horizon: float
    box: tuple[tuple[float, float], tuple[float, float]]  # two states; between their components orbits start, uniformly
    equations: Callable[[Any, Any, Any], list[Any]]  # as `systems.Equations`', of x, u and p
    odebench: int | None = None  # the number there
    points: int = 100
    act: int = 0
    train: Factors = Factors(0.9, 1.1, 5)
    adapt: Factors = Factors(0.8, 1.2, 4, grid=False)

    @property
    def interval(self) -> float:
        return self.horizon / self.points

    @property
    def low(self) -> tuple[float, ...]:
        return tuple(map(min, *self.box))

    @property
    def high(self) -> tuple[float, ...]:
        return tuple(map(max, *self.box))

    def field(self, x: Tensor, act: Tensor | None, p: Tensor) -> Tensor:
        """x [..., 2], act [..., A] (None: zero), p [..., P] -> [..., 2]; leading axes broadcast."""
        rates = self.equations(x.unbind(-1), () if act is None else act.unbind(-1), p.unbind(-1))
        return torch.stack(torch.broadcast_tensors(*rates), -1)


def _driven(family: Family, gain: Callable[[Any], Any]) -> Family:
    """With an action, times its gain, added to the acceleration."""

    def equations(x: Any, u: Any, p: Any) -> list[Any]:
        speed, rate = family.equations(x, u, p)
        return [speed, rate + gain(p) * u[0] if u else rate]

    return replace(family, name=f"driven-{family.name}", odebench=None, act=1, equations=equations)


def _harmonic(x: Any, u: Any, p: Any) -> list[Any]:
    return [x[1], -p[0] * x[0]]


def _damped(x: Any, u: Any, p: Any) -> list[Any]:
    return [x[1], -p[0] * x[0] - p[1] * x[1]]


def _pendulum(x: Any, u: Any, p: Any) -> list[Any]:
    return [x[1], -p[0] * sine(x[0])]


def _double_well(x: Any, u: Any, p: Any) -> list[Any]:
    return [x[1], -p[0] * x[1] - x[0] * x[0] * x[0] + x[0]]


def _bead(x: Any, u: Any, p: Any) -> list[Any]:
    return [x[1], (cosine(x[0]) - p[0]) * sine(x[0])]


def _shear(x: Any, u: Any, p: Any) -> list[Any]:
    """Singular where y is a multiple of pi."""
    sin, cos = sine(x[1]), cosine(x[1])
    return [cosine(x[0]) * cos / sin, sine(x[0]) * (p[0] * sin * sin + cos * cos)]


def _van_der_pol(x: Any, u: Any, p: Any) -> list[Any]:
    return [x[1], -p[0] * x[1] * (x[0] * x[0] - 1) - x[0]]


def _simplified(x: Any, u: Any, p: Any) -> list[Any]:
    return [p[0] * (x[0] - x[0] * x[0] * x[0] / 3 + x[1]), -x[0] / p[0]]


def _glycolytic(x: Any, u: Any, p: Any) -> list[Any]:
    made = x[0] * x[0] * x[1]
    return [p[0] * x[1] + made - x[0], -p[0] * x[0] + p[1] - made]


def _lotka_volterra(x: Any, u: Any, p: Any) -> list[Any]:
    """alpha and gamma are 0.5."""
    met = x[0] * x[1]
    return [0.5 * x[0] - p[0] * met, p[1] * met - 0.5 * x[1]]


_ONE, _TWO = ("c0",), ("c0", "c1")
_TEN = (
    Family("harmonic", _ONE, (2.1,), 10.0, ((0.4, -0.03), (0.0, 0.2)), _harmonic, 24),
    Family("damped-harmonic", _TWO, (4.5, 0.43), 8.0, ((0.12, 0.043), (0.0, -0.3)), _damped, 25),
    Family("pendulum", _ONE, (0.9,), 15.0, ((-1.9, 0.0), (0.3, 0.8)), _pendulum, 28),
    Family("double-well", _ONE, (0.18,), 5.0, ((-1.8, -1.8), (-2.8, 1.0)), _double_well, 32),
    Family("bead", _ONE, (0.93,), 20.0, ((2.1, 0.0), (-1.2, -0.2)), _bead, 34),
    Family("shear", _ONE, (4.2,), 5.0, ((1.13, -0.3), (0.7, -1.7)), _shear, 35),
    Family("van-der-pol", _ONE, (0.43,), 15.0, ((2.2, 0.0), (0.1, 3.2)), _van_der_pol, 37),
    Family("van-der-pol-simplified", _ONE, (3.37,), 15.0, ((0.7, 0.0), (-1.1, -0.7)), _simplified, 38),
    Family("glycolytic", _TWO, (2.4, 0.07), 4.0, ((0.4, 0.31), (0.2, -0.7)), _glycolytic, 39),
    # as ODEBench calls it; with van der Pol's equation
    Family("duffing", _ONE, (0.886,), 10.0, ((0.63, -0.03), (0.2, 0.2)), _van_der_pol, 40),
)
_BY_NAME = {f.name: f for f in _TEN}


def _shipped(name: str, horizon: float, box: Any, reference: float | None = None) -> Family:
    family = _BY_NAME[name]
    values = family.reference if reference is None else (reference,)
    return replace(family, name=f"{name}-four", reference=values, horizon=horizon, box=box, train=Factors(0.8, 1.2, 5))


_LOTKA_VOLTERRA = Family(
    "lotka-volterra",
    ("beta", "delta"),
    (1.0, 1.0),
    10.0,
    ((1.0, 1.0), (2.0, 2.0)),
    _lotka_volterra,
    points=20,
    train=Factors(0.5, 1.0, 9),
    adapt=Factors(0.625, 1.125, 4),
)

SETS: Mapping[str, tuple[Family, ...]] = {
    "four": (
        _shipped("harmonic", 6.0, ((0.5, 0.5), (0.75, 0.75))),
        _shipped("shear", 6.0, ((0.3, -0.3), (0.5, -0.5)), 2.0),
        _shipped("double-well", 8.0, ((-0.5, -0.5), (-0.7, -0.7)), 0.1),
        _shipped("duffing", 8.0, ((0.4, 0.0), (0.3, 0.1))),
    ),
    "ten": _TEN,
    "lotka-volterra": (_LOTKA_VOLTERRA,),
    "driven": (
        # c0 is one over the length where gravity and mass are 1: a torque turns the more, the shorter the pendulum
        _driven(_BY_NAME["pendulum"], lambda p: p[0] * p[0]),
        _driven(_BY_NAME["van-der-pol"], lambda p: 1.0),
        _driven(_BY_NAME["duffing"], lambda p: 1.0),
    ),
}
FAMILIES: Mapping[str, Family] = {f.name: f for families in SETS.values() for f in families}

# ---------------------------------------------------------------- environments


@dataclass(frozen=True)
class Environment:
    """A family with its parameters. index: of its draws, with the family's name; whatever else is generated beside it,
    and in which order, changes none of its numbers."""

    family: Family
    parameters: tuple[float, ...]
    index: int

    @property
    def label(self) -> str:
        return f"{self.family.name}:{self.index}"

    @property
    def system(self) -> "Counted":
        return Counted(self)


@dataclass(frozen=True)
class Counted(Equations):
    """An environment whose time is counted in its family's intervals."""

    environment: Environment

    dim = 2

    @property
    def name(self) -> str:
        return self.environment.label

    @property
    def inputs(self) -> int:
        return self.environment.family.act

    @property
    def low(self) -> tuple[float, ...]:
        return self.environment.family.low

    @property
    def high(self) -> tuple[float, ...]:
        return self.environment.family.high

    def parameters(self) -> dict[str, Any]:
        return dict(zip(self.environment.family.parameters, self.environment.parameters, strict=True))

    def equations(self, x: Any, u: Any) -> list[Any]:
        family = self.environment.family
        return [family.interval * rate for rate in family.equations(x, u, self.environment.parameters)]

    def rates(self, x: np.ndarray, u: np.ndarray | None = None) -> np.ndarray:
        try:
            return super().rates(x, u)
        except (ArithmeticError, ValueError):  # plain numbers raise where tensors are not finite
            return np.full(self.dim, math.nan)

    def jacobian(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        along = lambda e: torch.func.jvp(lambda y: self.field(y, u), (x,), (e.expand_as(x),))[1]
        return torch.stack([along(e) for e in torch.eye(self.dim).to(x)], -1)


MOST = 100_000  # environments of one family


def environments(name: str, split: Literal["train", "adapt"] = "train", n: int | None = None) -> list[Environment]:
    """Those of a set or of one family, by its name; n of each family, by default as many as were published.

    The data by which a learner adapts and those that judge it are both of the "adapt" environments. By default none of
    them is in training as well, but of the set "four" the first and the last of each family. A trajectory's draws do
    not depend on the split: give other data another seed. Raises ValueError for a name or a split that there is not,
    and for n below 1 or above MOST."""
    if name not in SETS and name not in FAMILIES:
        known = dict.fromkeys([*SETS, *FAMILIES])
        raise ValueError(f"environments: got {name!r}{close_matches(name, known)}; expected one of {', '.join(known)}")
    if split not in ("train", "adapt"):
        raise ValueError(f"environments: got the split {split!r}, expected train or adapt")
    if n is not None and not 1 <= n <= MOST:
        raise ValueError(
            f"environments: got n={n}, expected 1 to {MOST} of each family; None takes the published number"
        )
    families = SETS[name] if name in SETS else (FAMILIES[name],)
    factors = {f: f.train if split == "train" else f.adapt for f in families}
    return [Environment(f, p, i) for f in families for i, p in enumerate(factors[f].parameters(f.reference, n))]


# ---------------------------------------------------------------- data


def generate(
    envs: Sequence[Environment],
    trajectories: int,
    seed: int,
    *,
    noise: float = 0.0,
    irregular: float = 0.0,
    cache: Path | None = None,
) -> Dataset:
    """Episodes of points - 1 transitions, `trajectories` of each environment, one after the other; system i is envs[i],
    and `meta` holds labels and parameters. Starts are uniform in the family's box, actions as `DRIVE` draws them.

    A trajectory's draws are of (seed, family, environment's index, trajectory) alone: of fewer environments or
    trajectories they are the same, up to the noise's scale. noise: of the measurement, normal, in parts of each
    dimension's standard deviation over the environment's clean observations; the orbits are the same with and without.
    irregular: each point but the first and the last is moved in time, uniformly by up to half of so many intervals to
    either side; the data say so by `dts`.
    cache: a folder in which clean orbits are kept; a file there that is not what it should be is written anew.

    Raises ValueError for no environments or trajectories, for a seed or noise below 0, for an irregularity that is not
    in [0, 1), for environments whose actions differ in width, and for an orbit that leaves the finite numbers, which
    it names."""
    if not 0 <= irregular < 1:
        raise ValueError(f"generate: got irregular={irregular}, expected a part of the interval in [0, 1)")
    if not envs or trajectories < 1 or seed < 0 or not (0 <= noise < math.inf):
        got = f"{len(envs)} environments, trajectories={trajectories}, seed={seed}, noise={noise}"
        raise ValueError(f"generate: got {got}; expected at least 1 and 1, and finite numbers from 0 on")
    if len({e.family.act for e in envs}) > 1:
        widths = ", ".join(f"{e.label} of {e.family.act}" for e in {e.family.act: e for e in envs}.values())
        raise ValueError(f"generate: got actions of several widths: {widths}; generate these apart")
    parts = []
    for env in envs:
        dts = _intervals(env, trajectories, seed, irregular) if irregular else None
        states, act = _orbits(env, trajectories, seed, cache, dts)
        if noise:
            normal = [_stream(env, seed, k, 1).standard_normal(states.shape[1:]) for k in range(trajectories)]
            std = states.flatten(0, 1).std(0, correction=0)
            states = states + noise * std * torch.from_numpy(np.stack(normal))
        parts.append(_dataset(env, states, act, dts))
    meta = {"kind": "families", "seed": seed, "trajectories": trajectories, "noise": noise, "irregular": irregular}
    meta |= {"labels": [e.label for e in envs], "parameters": [e.system.parameters() for e in envs]}
    return mixed(parts, "+".join(dict.fromkeys(e.family.name for e in envs)), meta)


def robots(name: str, steps: int, seed: int) -> tuple[Dataset, list[str]]:
    """Data of the tasks of `contexts.tasks(name)` under random actions, `steps` transitions of each, and the tasks'
    labels, "name:task"; system i is task i. Raises ValueError as `contexts.tasks` and `contexts.collect` do."""
    tasks = contexts.tasks(name)
    labels = [f"{name}:{task.name}" for task in tasks]
    meta = {"kind": "robots", "seed": seed, "labels": labels, "contexts": [task.context for task in tasks]}
    return mixed(contexts.collect(tasks, steps, seed=seed), name, meta), labels


def _stream(env: Environment, seed: int, trajectory: int, *more: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(env.family.name.encode()), env.index, trajectory, *more])


def _intervals(env: Environment, trajectories: int, seed: int, irregular: float) -> Tensor:
    """[E, points - 1], float64, of sum points - 1."""
    points = env.family.points
    drawn = [_stream(env, seed, k, 2).uniform(-0.5, 0.5, points) for k in range(trajectories)]
    moved = irregular * torch.from_numpy(np.stack(drawn))
    moved[:, 0], moved[:, -1] = 0.0, 0.0
    return (torch.arange(points) + moved).diff()


def _orbits(
    env: Environment, trajectories: int, seed: int, cache: Path | None, dts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Clean states [E, points, 2], float64, and actions [E, points - 1, A], float32."""
    family, system, steps = env.family, env.system, env.family.points - 1
    streams = [_stream(env, seed, k) for k in range(trajectories)]
    start = torch.from_numpy(np.stack([s.uniform(family.low, family.high) for s in streams]))
    act = torch.zeros(trajectories, steps, family.act)
    if family.act:
        own = [torch.Generator().manual_seed(int(s.integers(2**63))) for s in streams]
        act = torch.stack([DRIVE(steps, 1.0, family.act, g) for g in own]).float()
    rates = system.field(start, act[:, 0].double() if family.act else None)
    if not rates.isfinite().all():
        bad = start[(~rates.isfinite().all(-1)).nonzero()[0, 0]].tolist()
        raise ValueError(f"{env.label}: the field is not finite at the start {bad}; keep the box off its singularities")
    driven, dt = act if family.act else None, 1.0 if dts is None else dts
    solve = lambda: integrate(system, start, steps, dt, driven, rtol=TOLERANCE, atol=TOLERANCE)
    if cache is None:
        return solve(), act
    told = (
        f"{env.label} {TOLERANCE} {digest(start, act, rates)}"  # the rates tell the equations, parameters and interval
    )
    told += f" {digest(dts)}" if dts is not None else ""
    key = hashlib.sha256(told.encode()).hexdigest()
    path = Path(cache) / f"{family.name}-{env.index}-{key[:16]}.npz"
    states = _kept(path, key, (trajectories, family.points, 2))
    if states is None:
        states = solve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as tmp, open(tmp, "wb") as file:
            np.savez(file, key=np.array(key), states=states.numpy())
    return states, act


def _kept(path: Path, key: str, shape: tuple[int, ...]) -> Tensor | None:
    """The states of a file, or None where it does not hold them, whatever is wrong with it."""
    with suppress(Exception), np.load(path, allow_pickle=False) as found:
        states = found["states"]
        if str(found["key"]) == key and states.shape == shape and states.dtype == np.float64:
            return torch.from_numpy(states)
    return None


def _dataset(env: Environment, states: Tensor, act: Tensor, dts: Tensor | None) -> Dataset:
    rows = states.float()
    if not rows.isfinite().all():
        raise ValueError(f"{env.label}: states leave what float32 holds; check the parameters, or shorten the horizon")
    episodes, steps, width = act.shape
    n = episodes * steps
    return Dataset(
        obs=rows[:, :-1].flatten(0, 1),
        act=act.flatten(0, 1),
        reward=torch.zeros(n),
        next_obs=rows[:, 1:].flatten(0, 1),
        terminal=torch.zeros(n, dtype=torch.bool),
        paired=torch.ones(n, dtype=torch.bool),
        starts=torch.arange(0, n + 1, steps),
        act_low=-torch.ones(width),
        act_high=torch.ones(width),
        dts=None if dts is None else dts.float().flatten(),
    )
