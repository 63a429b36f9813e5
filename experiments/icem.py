"""iCEM against CEM in the true model: how many candidates a plan does each need for the same return?

    python experiments/icem.py [--seeds 0 1 2] [--episodes 10] [--report]

Both plan with the same horizon, iterations and share of elites; a plan's candidates are counted over its iterations,
kept elites included. The figure is, for each task, the fewest candidates from which on the median over seeds of the
mean return stays within a fiftieth of the way from a random policy's return to the best that either reached; and the
fewest from which on it stays at least at what CEM earns with each of its numbers. --report works these out anew from
the rows of the last run.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from mbrl_envs import control, tasks
from mbrl_envs import evaluate as worlds
from rich.console import Console
from rich.table import Table

from mbrl import device as devices
from mbrl.mpc import Mpc
from mbrl.planner import CEM, ICEM, Worth
from mbrl.run import machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "icem.json"
TASKS = {"Pendulum-v1": 25, "mbrl_envs/CartPoleSwingUp-v0": 50}  # horizon
SAMPLES = (6, 9, 14, 20, 30, 45, 68, 100, 150)


@dataclass(frozen=True)
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)
    episodes: int = 10
    samples: tuple[int, ...] = SAMPLES
    save: bool = True
    report: bool = False


def planners(samples: int, horizon: int) -> dict[str, Any]:
    elites = max(2, round(0.15 * samples))
    size: dict[str, Any] = {"samples": samples, "elites": elites, "horizon": horizon, "iterations": 3}
    return {"cem": replace(CEM, **size), "icem": replace(ICEM, **size)}


def main(args: Args) -> None:
    if args.report:
        out = json.loads(RESULTS.read_text())
        write_json(RESULTS, out | {"figures": figures(out["rows"])})
        return
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), []
    for task, horizon in TASKS.items():
        found = tasks.task(task)
        assert found is not None
        for seed in args.seeds:
            evaluate = worlds.evaluator(task, episodes=args.episodes, seed=70_000 + 1_000 * seed)
            stream = devices.generator(seed)
            chance = evaluate(lambda obs, g=stream: 2 * torch.rand(len(obs), 1, generator=g) - 1)
            rows.append({"task": task, "seed": seed, "planner": "random", "candidates": 0, "return": chance.mean()})
            for samples in args.samples:
                for name, planner in planners(samples, horizon).items():
                    mpc = Mpc(
                        planner,
                        Worth(),
                        control.TRUTHS[task](),
                        generator=devices.generator(seed),
                        terminal=found.terminal,
                    )
                    value = evaluate(mpc, rows=mpc.rows).mean()
                    assert mpc.found is not None
                    rows.append(
                        {"task": task, "seed": seed, "planner": name, "samples": samples, "return": value,
                         "candidates": mpc.found.seen}
                    )  # fmt: skip
                    print(task, seed, name, mpc.found.seen, round(value, 1), flush=True)
    out = {"figures": figures(rows), "episodes": args.episodes, "rows": rows, "versions": versions(), **machine()}
    if args.save:
        write_json(RESULTS, out | {"wall_s": round(time.perf_counter() - began, 1)})
    print(json.dumps(out["figures"]))


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each task and planner: {candidates: median return}, and the fewest from which on these suffice."""
    found: dict[str, Any] = {}
    table = Table("task", "planner", "candidates: median return over seeds", "enough")
    for task in TASKS:
        mine = [r for r in rows if r["task"] == task]
        curve = lambda name, mine=mine: {
            c: median(r["return"] for r in mine if r["planner"] == name and r["candidates"] == c)
            for c in sorted({r["candidates"] for r in mine if r["planner"] == name})
        }
        curves, chance = {name: curve(name) for name in ("cem", "icem")}, curve("random")[0]
        best = max(v for c in curves.values() for v in c.values())
        bar = best - 0.02 * (best - chance)
        enough = {name: lasting(x, bar) for name, x in curves.items()}
        found[task] = {"random": chance, "bar": bar, **curves, "enough": enough}
        if enough["cem"] and enough["icem"]:
            found[task]["ratio"] = enough["cem"] / enough["icem"]
        found[task]["icem_for_cem"] = {c: lasting(curves["icem"], v) for c, v in curves["cem"].items()}
        for name, x in curves.items():
            table.add_row(task, name, ", ".join(f"{c}: {v:.0f}" for c, v in x.items()), str(enough[name]))
    Console().print(table)
    return found


def lasting(curve: dict[int, float], bar: float) -> int | None:
    """The number from which on the curve stays at or above the bar; None where its end is below."""
    enough = None
    for candidates, value in reversed(curve.items()):
        if value < bar:
            break
        enough = candidates
    return enough


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
