"""Local regularisation of a neural ODE: does an adaptive solver need fewer evaluations, at an equal error?

    python experiments/local_regularisation.py [--seeds 0 1 2] [--updates 1000]

A network is fitted to noisy orbits by multiple shooting with a fixed solver, without and with each regulariser (error
estimate or stiffness ratio, at uniform times or where the solver's steps began) at several weights. All seeds and
weights of one kind are trained at once, as one stack. Test orbits are then predicted over the whole horizon with
Dopri5, each orbit by itself: the evaluations of the field, the time, and the error against the noiseless truth.

For each kind the greatest weight is taken whose error on validation orbits is, in the median over seeds, at most a
tenth above that without; the figure is the ratio of evaluations on the test orbits, and beside it that of the errors.
"""

import json
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from scipy.integrate import solve_ivp
from torch import Tensor

from mbrl import device as devices
from mbrl.core import Segment, Spec
from mbrl.dynamics.ode import ErrorEstimate, Local, NeuralODE, OdeConfig, StiffnessRatio
from mbrl.run import machine, versions, write_json
from mbrl.solvers import Dopri5, Tsit5

RESULTS = Path(__file__).parent / "results" / "local_regularisation.json"
NONE = 1e-30  # a weight that is none
KINDS = {
    f"{kind}-{sampling}": (measure, sampling)
    for kind, measure in {"error": ErrorEstimate(1e-6, 1e-6), "stiffness": StiffnessRatio()}.items()
    for sampling in ("unbiased", "biased")
}


@dataclass(frozen=True)
class World:
    """Orbits on a grid of `steps` intervals dt, from starts uniform in a box."""

    field: Any
    dt: float
    steps: int
    low: tuple[float, float]
    high: tuple[float, float]
    weights: dict[str, tuple[float, ...]]  # of each kind's regulariser, at the start; a tenth of it at the end

    def orbits(self, n: int, seed: int) -> Tensor:
        """[n, steps + 1, 2], float64"""
        rng, times = np.random.default_rng(seed), self.dt * np.arange(self.steps + 1)
        settings: dict[str, Any] = {"method": "DOP853", "t_eval": times, "rtol": 1e-10, "atol": 1e-10}
        starts = rng.uniform(self.low, self.high, (n, 2))
        return torch.from_numpy(np.stack([solve_ivp(self.field, (0, times[-1]), x, **settings).y.T for x in starts]))


SPIRAL = np.array([[-0.1, 2.0], [-2.0, -0.1]])
WEIGHTS = {"error": (1e-1, 1.0, 10.0, 100.0), "stiffness": (1e-3, 1e-2, 1e-1, 1.0)}
WORLDS = {
    "van-der-pol": World(lambda _, x: (x[1], (1 - x[0] ** 2) * x[1] - x[0]), 0.1, 100, (-2, -2), (2, 2), WEIGHTS),
    "cubic-spiral": World(lambda _, x: SPIRAL @ x**3, 0.1, 150, (0.5, -2), (2, 2), WEIGHTS),
}


@dataclass(frozen=True)
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)
    worlds: tuple[str, ...] = tuple(WORLDS)
    updates: int = 1000
    noise: float = 0.02  # standard deviations of each dimension
    orbits: int = 16  # for training, and as many to validate and to test
    length: int = 4  # intervals a window
    batch: int = 32
    substeps: int = 1
    save: bool = True


def main(args: Args) -> None:
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), []
    for name in args.worlds:
        world = WORLDS[name]
        train, held, test = (world.orbits(args.orbits, 10 + i) for i in range(3))
        for kind in KINDS:
            models = fit(args, world, kind, train)
            for (seed, weight), model in models.items():
                row = {"world": name, "kind": kind, "seed": seed, "weight": weight}
                for part, orbits in (("held", held), ("test", test)):
                    row |= {f"{part}_{k}": v for k, v in measure(model, world, orbits).items()}
                rows.append(row)
                print(row, flush=True)
    out = {"figures": figures(rows), "arguments": args.__dict__, "rows": rows}
    out |= {"versions": versions() | {"torchdiffeq": metadata.version("torchdiffeq")}, **machine()}
    if args.save:
        write_json(RESULTS, out | {"wall_s": round(time.perf_counter() - began, 1)})
    print(json.dumps(out["figures"]))


def fit(args: Args, world: World, kind: str, orbits: Tensor) -> dict[tuple[int, float], NeuralODE]:
    """A model for each seed and weight; all weights of a seed see the same noise, windows and initial networks."""
    measure, sampling = KINDS[kind]
    models: dict[tuple[int, float], NeuralODE] = {}
    data = {}
    for seed in args.seeds:
        noise = args.noise * orbits.std((0, 1)) * torch.randn(orbits.shape, generator=devices.generator(seed))
        data[seed] = (orbits + noise).float()
        for weight in (NONE, *world.weights[kind.partition("-")[0]]):
            local = Local(measure, weight, weight / 10, args.updates, sampling)  # type: ignore[arg-type]
            config = OdeConfig((32, 32), solver=Tsit5(args.substeps), local=local)
            models[seed, weight] = config.build(Spec(orbits.shape[-1]), devices.generator(seed))
            models[seed, weight].prepare(windows(data[seed], torch.arange(len(orbits)), 0, world.steps, world.dt))
    template, stack = next(iter(models.values())), list(models.values())
    params, buffers = torch.func.stack_module_state(stack)  # type: ignore[arg-type]
    params = {k: p.detach().requires_grad_() for k, p in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    loss = torch.func.vmap(
        lambda p, b, *x: torch.func.functional_call(
            template, (p, b), (lambda m, *y: m.loss(Segment._make((*y, fixed)), fixed)[0], *x)
        )
    )
    fixed = torch.zeros(1, dtype=torch.int64)
    generators = {seed: devices.generator(1000 + seed) for seed in args.seeds}
    for _ in range(args.updates):
        batches = {}
        for seed, generator in generators.items():
            orbit = torch.randint(args.orbits, (args.batch,), generator=generator)
            first = torch.randint(world.steps - args.length + 1, (args.batch,), generator=generator)
            batches[seed] = windows(data[seed], orbit, first, args.length, world.dt)
        fields = [torch.stack(x) for x in zip(*(tuple(batches[seed][:-1]) for seed, _ in models), strict=True)]
        optimizer.zero_grad()
        loss(params, buffers, *fields).sum().backward()
        optimizer.step()
        schedule.step()
        for i, model in enumerate(stack):
            model.advance(batches[args.seeds[0]])
            for k in model.schedules:
                buffers[k][i] = model.get_buffer(k)
    with torch.no_grad():
        for i, model in enumerate(stack):
            for k, p in model.named_parameters():
                p.copy_(params[k][i])
            model.double()
    return models


def windows(orbits: Tensor, orbit: Tensor, first: Tensor | int, length: int, dt: float) -> Segment:
    index = torch.as_tensor(first).expand(len(orbit))[:, None] + torch.arange(length + 1)
    obs, zero = orbits[orbit[:, None], index], torch.zeros(len(orbit), length, dtype=orbits.dtype)
    mask = torch.ones_like(zero, dtype=torch.bool)
    system = torch.zeros(1, dtype=torch.int64)
    return Segment(obs, zero[..., None][..., :0], zero, ~mask, mask, torch.full_like(zero, dt)[..., None], system)


def measure(model: NeuralODE, world: World, orbits: Tensor) -> dict[str, Any]:
    """Of the predictions of each orbit by itself: evaluations and milliseconds, means over the orbits; the root mean
    square error in standard deviations; an orbit that the solver gives up counts as infinite."""
    times, solver = world.dt * torch.arange(1, world.steps + 1, dtype=torch.float64), Dopri5(1e-6, 1e-6)
    evaluations, seconds, errors = [], [], []
    for orbit in orbits:
        start = orbit[:1]
        began = time.perf_counter()
        found = model.solve(start, start[:, :0], times, solver)
        seconds.append(time.perf_counter() - began)
        evaluations.append(found.evaluations)
        errors.append(((found.obs[0] - orbit[1:]) / orbits.std((0, 1))).square().mean())
    error = torch.stack(errors).mean().sqrt().item()
    return {"evaluations": float(np.mean(evaluations)), "ms": 1000 * median(seconds), "error": error}


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    table = Table("world", "regulariser", "weight", "evaluations", "ratio", "time", "error", "ratio")
    for world in dict.fromkeys(r["world"] for r in rows):
        found[world] = {}
        for kind in KINDS:
            mine = [r for r in rows if (r["world"], r["kind"]) == (world, kind)]
            value = lambda weight, key, mine=mine: median(r[key] for r in mine if r["weight"] == weight)
            plain = {r["seed"]: r for r in mine if r["weight"] == NONE}
            fit = [w for w in {r["weight"] for r in mine} if value(w, "held_error") <= 1.1 * value(NONE, "held_error")]
            weight = max(fit)
            ratio = lambda key, mine=mine, weight=weight, plain=plain: median(
                r[key] / plain[r["seed"]][key] for r in mine if r["weight"] == weight
            )
            keys = ("evaluations", "ms", "error")
            found[world][kind] = {
                "weight": weight if weight > NONE else 0.0,
                "without": {k: value(NONE, f"test_{k}") for k in keys},
                "with": {k: value(weight, f"test_{k}") for k in keys},
                "ratio": {k: ratio(f"test_{k}") for k in keys},
            }
            a, b, c = (found[world][kind][k] for k in ("without", "with", "ratio"))
            table.add_row(
                *(world, kind, f"{weight:g}", f"{a['evaluations']:.0f} -> {b['evaluations']:.0f}"),
                *(f"{c['evaluations']:.3f}", f"{c['ms']:.3f}", f"{a['error']:.3g} -> {b['error']:.3g}"),
                f"{c['error']:.3f}",
            )
    Console(width=140).print(table)
    return found


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
