"""What is forgotten: students of one task after another, on one stored stream of exploration data per set and seed.

    python experiments/continual.py [--sets cartpole-pole pusher cheetah-body] [--students hyper ...] [--seeds 0 1 2]

5 000 random transitions and 5 000 updates a task; judged on 1 000 other transitions of every task after every task, by
one-step and 20-step errors; in the end three episodes of 200 steps a task are planned by iCEM in the true environment.
A finished student is a row of experiments/results/continual.json and is not run again. The figures of a set are medians
over its seeds with 90 % bootstrap intervals.
"""

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from mbrl_envs import contexts
from mbrl_envs.evaluate import evaluator
from rich.console import Console
from rich.table import Table

from mbrl import continual
from mbrl import device as devices
from mbrl.continual import Budget, Ewc, Finetune, Hypernetwork, MultiTask, Replay, Si, SingleTask
from mbrl.dynamics.heads import HeadsConfig
from mbrl.dynamics.hyper import HyperConfig, HyperFit
from mbrl.mpc import Mpc
from mbrl.offline import digest
from mbrl.planner import ICEM, Worth
from mbrl.run import machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "continual.json"
NET = HeadsConfig(hidden=(200, 200))
HYPER = HyperConfig(hidden=(200, 200), hyper=(50, 50))
STUDENTS: dict[str, Any] = {
    "hyper": Hypernetwork(HYPER, HyperFit(beta=0.05)),
    "finetune": Finetune(NET),
    "single-task": SingleTask(NET),
    "multi-task": MultiTask(NET),
    "replay": Replay(NET, capacity=1000),
    "ewc": Ewc(NET),
    "si": Si(NET),
}


@dataclass(frozen=True)
class Args:
    sets: tuple[str, ...] = ("cartpole-pole", "pusher", "cheetah-body")
    students: tuple[str, ...] = tuple(STUDENTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget = field(default_factory=Budget)
    steps: int = 5000
    episodes: int = 3
    threads: int = 2


def run(name: str, student: str, seed: int, args: Args) -> dict[str, Any]:
    tasks, began = contexts.tasks(name), time.perf_counter()
    train = contexts.collect(tasks, args.steps, seed=seed)
    test = contexts.collect(tasks, 1000, seed=10_000 + seed)
    made = STUDENTS[student].begin(train[0].spec, len(tasks), devices.generator(seed))

    def tell(task: int, i: int, of: int, figures: dict[str, float]) -> None:
        if i == of:
            words = "  ".join(f"{k} {v:.3g}" for k, v in figures.items())
            print(f"{name} {student} {seed}  task {task}  {words}  {time.perf_counter() - began:.0f} s", flush=True)

    course = continual.run(made, train, test, args.budget, seed, progress=tell)
    returns = []
    for i, task in enumerate(tasks if args.episodes else []):
        model, ctx = made.known(i)
        stream = devices.generator(100 * seed + i)
        mpc = Mpc(ICEM, Worth(), model, generator=stream, reward=task.reward, terminal=task.terminal, ctx=ctx)
        play = evaluator(task.env, args.episodes, seed=1000 + seed, max_steps=200)
        returns.append(play(mpc, rows=mpc.rows).tolist())
        play.close()
    return {
        "set": name, "student": student, "seed": seed, "digest": mark(student, args),
        "matrix": np.array(course.matrix).round(7).tolist(), "seconds": [round(s, 1) for s in course.seconds],
        "memory": course.memory[-1], "returns": returns, "wall_s": round(time.perf_counter() - began, 1),
        "threads": args.threads, **machine(), "versions": versions(),
    }  # fmt: skip


def mark(student: str, args: Args) -> str:
    return digest(STUDENTS[student], replace(args.budget, save_every=0), args.steps)


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By set and student."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(r["set"] for r in rows):
        of = lambda student, name=name: sorted(
            (r for r in rows if (r["set"], r["student"]) == (name, student)), key=lambda r: r["seed"]
        )
        alone = {r["seed"]: np.array(r["matrix"])[:, :, 0].diagonal() for r in of("single-task")}
        found[name] = {}
        for student in STUDENTS:
            mine = of(student)
            if not mine:
                continue
            cube = np.array([r["matrix"] for r in mine])
            own = [alone[r["seed"]] for r in mine if r["seed"] in alone]
            one = continual.summary(cube[..., 0], np.array(own) if len(own) == len(mine) else None)
            many = continual.summary(cube[..., 1])
            found[name][student] = {
                "seeds": [r["seed"] for r in mine], "one_step": one, "many_steps": many, "memory": mine[0]["memory"],
                "return": float(np.median([np.mean(r["returns"]) for r in mine])) if mine[0]["returns"] else None,
            }  # fmt: skip
    return found


def table(found: dict[str, Any]) -> None:
    for name, students in found.items():
        words = Table("", "seeds", "final", "90 %", "learned", "forgetting", "20 steps", "return", "stored", title=name)
        for student, x in students.items():
            one = x["one_step"]
            words.add_row(
                student, str(len(x["seeds"])), f"{one['final']['median']:.3g}",
                f"{one['final']['low']:.3g} to {one['final']['high']:.3g}", f"{one['learned']['median']:.3g}",
                f"{one['forgetting']['median']:.3g}", f"{x['many_steps']['final']['median']:.3g}",
                "-" if x["return"] is None else f"{x['return']:.4g}", str(x["memory"]["transitions"]),
            )  # fmt: skip
        Console(width=110).print(words)


def main(args: Args) -> None:
    devices.keep_memory()
    torch.set_num_threads(args.threads)
    for seed in args.seeds:
        for name in args.sets:
            for student in args.students:
                rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
                key = lambda r: (r["set"], r["student"], r["seed"])
                there = {key(r): r["digest"] for r in rows}
                if there.get((name, student, seed)) != mark(student, args):
                    row = run(name, student, seed, args)
                    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
                    rows = [r for r in rows if key(r) != key(row)] + [row]
                    write_json(RESULTS, {"figures": figures(rows), "rows": sorted(rows, key=key)})
    table(json.loads(RESULTS.read_text())["figures"])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
