"""What is forgotten: students of one task after another, on one stored stream of exploration data per set and seed.

    python experiments/continual.py [--sets cartpole-pole pusher cheetah-body door] [--students hyper ...] [--seeds 0]

5 000 random transitions and 5 000 updates a task (half-cheetah: episodes of 200 steps; pusher: actions held for 5
steps); judged on 1 000 other transitions (4 000 of these two) of every task after every task, by one-step and 20-step
errors; in the end three episodes of 200 steps a task are planned by iCEM in the true environment.
Door: three handles of the five tasks, and half of its stream (and of its test data) by a clumsy explorer that goes for
the handle, closes on it, turns it either way and pulls, since random actions hardly ever open a door; `success` is the
share of final episodes in which the door came open.
A finished student is a row of experiments/results/continual.json and is not run again. The figures of a set are medians
over its seeds with 90 % bootstrap intervals.

    python experiments/continual.py --truth [--sets cartpole-pole ...] [--seeds 0]

measures instead of students the bound of those returns: the same planner on the same first states, which plans in the
true simulator. Its rows and figures are kept apart, under "truth".
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from mbrl_envs import contexts
from mbrl_envs.evaluate import evaluator
from mbrl_envs.simulator import Simulator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl import continual
from mbrl import device as devices
from mbrl.continual import Budget, Ewc, Finetune, Hypernetwork, MultiTask, Replay, Si, SingleTask
from mbrl.data import Dataset, joined
from mbrl.dynamics.heads import HeadsConfig
from mbrl.dynamics.hyper import HyperConfig, HyperFit
from mbrl.mpc import ByValue, Mpc, episode
from mbrl.offline import digest
from mbrl.planner import ICEM, Worth
from mbrl.run import machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "continual.json"
LENGTH = 200  # steps of an episode of the half-cheetah's exploration
PLAYED = 200  # steps of a final episode, at most
TEST = {"cheetah-body": 4000, "pusher": 4000}  # transitions of each task to judge by, else 1 000
NET = HeadsConfig(hidden=(200, 200))
HYPER = HyperConfig(hidden=(200, 200), hyper=(50, 50))
STUDENTS: dict[str, Any] = {
    "hyper": Hypernetwork(HYPER, HyperFit(beta=0.05), lr=2e-4),
    "finetune": Finetune(NET),
    "single-task": SingleTask(NET),
    "multi-task": MultiTask(NET),
    "replay": Replay(NET, capacity=1000),
    "ewc": Ewc(NET),
    "si": Si(NET),
}


@dataclass(frozen=True)
class Args:
    sets: tuple[str, ...] = ("cartpole-pole", "pusher", "cheetah-body", "door")
    students: tuple[str, ...] = tuple(STUDENTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget = field(default_factory=Budget)
    steps: int = 5000
    episodes: int = 3
    threads: int = 2
    truth: bool = False
    """Plan in the true simulator instead, with nothing learned."""


def explorer(seed: int) -> Callable[[Tensor], Tensor]:
    """Of what it observes of a door and chance alone: obs [n, 16] -> act [n, 5]."""
    stream = devices.generator(seed)

    def act(obs: Tensor) -> Tensor:
        noise = torch.randn(len(obs), 5, generator=stream)
        way = torch.where(obs[:, 3].abs() > 0.1, obs[:, 3], noise[:, 3]).sign()  # goes on turning as it began
        near, held = obs[:, :3].norm(dim=-1) < 0.02, obs[:, 4] < 0.03
        turned = held & (obs[:, 3].abs() > 1.0)
        lead = torch.cat([obs[:, :3] / 0.03, torch.zeros(len(obs), 2)], -1)
        lead[:, 3] = torch.where(held & ~turned, way, 0.0)
        lead[:, 4] = torch.where(near | held, 1.0, -0.5)
        lead[:, 0] = torch.where(turned, -0.7, lead[:, 0])
        return (lead + 0.4 * noise).clamp(-1, 1)

    return act


def stream(name: str, steps: int, seed: int) -> list[Dataset]:
    """The exploration data of a set's tasks."""
    tasks = tasks_of(name)
    if name == "cheetah-body":  # short episodes: in 1 000 steps some fall on their back, and stay there
        draw = np.random.default_rng([seed, 4])
        acts = draw.uniform(-1, 1, (len(tasks), -(-steps // LENGTH), LENGTH, 6)).astype(np.float32)
        return contexts.collect(tasks, steps, torch.from_numpy(acts))
    if name == "pusher":  # held actions: a finger that trembles hardly ever meets the box
        return contexts.collect(tasks, steps, seed=seed, hold=5)
    if name != "door":
        return contexts.collect(tasks, steps, seed=seed)
    drawn = contexts.collect(tasks, steps // 2, seed=seed, hold=3)
    led = contexts.collect(tasks, steps - steps // 2, explorer(seed), seed=50_000 + seed)
    return [joined(pair) for pair in zip(drawn, led, strict=True)]


def tasks_of(name: str) -> list[contexts.ContextTask]:
    return contexts.tasks(name)[: 3 if name == "door" else None]


class Watched:
    """A planner's actions, and how far open a door was."""

    def __init__(self, mpc: Mpc) -> None:
        self.mpc, self.most = mpc, torch.zeros(0)

    def __call__(self, obs: Tensor) -> Tensor:
        self.most = obs[:, 7] if len(self.most) != len(obs) else torch.maximum(self.most, obs[:, 7])
        return self.mpc(obs)


def run(name: str, student: str, seed: int, args: Args) -> dict[str, Any]:
    tasks, began = tasks_of(name), time.perf_counter()
    train, test = stream(name, args.steps, seed), stream(name, TEST.get(name, 1000), 10_000 + seed)
    made = STUDENTS[student].begin(train[0].spec, len(tasks), devices.generator(seed))

    def tell(task: int, i: int, of: int, figures: dict[str, float]) -> None:
        if i == of:
            words = "  ".join(f"{k} {v:.3g}" for k, v in figures.items())
            print(f"{name} {student} {seed}  task {task}  {words}  {time.perf_counter() - began:.0f} s", flush=True)

    course = continual.run(made, train, test, args.budget, seed, progress=tell)
    returns, opened = [], []
    for i, task in enumerate(tasks if args.episodes else []):
        model, ctx = made.known(i)
        draws = devices.generator(100 * seed + i)
        mpc = Mpc(ICEM, Worth(), model, generator=draws, reward=task.reward, terminal=task.terminal, ctx=ctx)
        play = evaluator(task.env, args.episodes, seed=1000 + seed, max_steps=PLAYED)
        watched = Watched(mpc)
        returns.append(play(watched if name == "door" else mpc, rows=mpc.rows).tolist())
        opened += (watched.most >= 0.2).tolist()
        play.close()
    return {
        "set": name, "student": student, "seed": seed, "digest": mark(name, student, args),
        "matrix": np.array(course.matrix).round(7).tolist(), "seconds": [round(s, 1) for s in course.seconds],
        "memory": course.memory[-1], "returns": returns, "success": sum(opened) / len(opened) if opened else None,
        "wall_s": round(time.perf_counter() - began, 1),
        "threads": args.threads, **machine(), "versions": versions(),
    }  # fmt: skip


def bound(name: str, seed: int, args: Args) -> dict[str, Any]:
    """What iCEM earns in the true simulator, on the first states of the students' final episodes."""
    began, returns, opened = time.perf_counter(), [], []
    for i, task in enumerate(tasks_of(name)):
        env = task.env()
        width, simulator = env.action_space.shape[0], Simulator(env, args.threads)  # pyright: ignore[reportOptionalSubscript]
        value = lambda acts, simulator=simulator: simulator.value(acts[0], Worth().discount)[None]
        control, total = ByValue(ICEM, value, width, devices.generator(100 * seed + i)), []
        for k in range(args.episodes):
            control.begin()
            e = episode(env, control, 1000 + seed + k, PLAYED)
            total.append(e.total)
            opened += [bool(e.obs[:-1, 7].max() >= 0.2)] if name == "door" else []
        returns.append(total)
        simulator.close()
        env.close()
        print(
            f"{name} truth {seed}  task {i}  return {np.mean(total):.4g}  {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return {
        "set": name, "seed": seed, "digest": digest(ICEM, Worth(), args.episodes, PLAYED), "returns": returns,
        "success": sum(opened) / len(opened) if opened else None, "wall_s": round(time.perf_counter() - began, 1),
        "threads": args.threads, **machine(), "versions": versions(),
    }  # fmt: skip


def bounds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the true simulator, by set."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(r["set"] for r in rows):
        mine = sorted((r for r in rows if r["set"] == name), key=lambda r: r["seed"])
        found[name] = {
            "seeds": [r["seed"] for r in mine], "return": float(np.median([np.mean(r["returns"]) for r in mine])),
            **({"success": [r["success"] for r in mine]} if mine[0]["success"] is not None else {}),
        }  # fmt: skip
    return found


def mark(name: str, student: str, args: Args) -> str:
    given = (STUDENTS[student], replace(args.budget, save_every=0), args.steps)
    return digest(*given, TEST[name], LENGTH) if name in TEST else digest(*given)


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
                **({"success": [r["success"] for r in mine]} if mine[0].get("success") is not None else {}),
            }  # fmt: skip
    return found


def table(found: dict[str, Any], truth: dict[str, Any]) -> None:
    for name in [*found, *(x for x in truth if x not in found)]:
        words = Table("", "seeds", "final", "90 %", "learned", "forgetting", "20 steps", "return", "stored", title=name)
        for student, x in found.get(name, {}).items():
            one = x["one_step"]
            words.add_row(
                student, str(len(x["seeds"])), f"{one['final']['median']:.3g}",
                f"{one['final']['low']:.3g} to {one['final']['high']:.3g}", f"{one['learned']['median']:.3g}",
                f"{one['forgetting']['median']:.3g}", f"{x['many_steps']['final']['median']:.3g}",
                "-" if x["return"] is None else f"{x['return']:.4g}", str(x["memory"]["transitions"]),
            )  # fmt: skip
        if x := truth.get(name):
            words.add_row("true simulator", str(len(x["seeds"])), *["-"] * 5, f"{x['return']:.4g}", "-")
        Console(width=110).print(words)


def kept() -> dict[str, Any]:
    """What the file holds."""
    there = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {"figures": {}, "rows": [], **there}


def learn(name: str, student: str, seed: int, args: Args) -> None:
    """A student's row, unless the file has it."""
    key = lambda r: (r["set"], r["student"], r["seed"])
    there = {key(r): r["digest"] for r in kept()["rows"]}
    if there.get((name, student, seed)) != mark(name, student, args):
        row, file = run(name, student, seed, args), kept()
        rows = [r for r in file["rows"] if key(r) != key(row)] + [row]
        write_json(RESULTS, file | {"figures": figures(rows), "rows": sorted(rows, key=key)})


def measure(name: str, seed: int, args: Args) -> None:
    """The true simulator's row, unless the file has it."""
    key = lambda r: (r["set"], r["seed"])
    of = lambda file: file.get("truth", {"rows": []})["rows"]
    there = {key(r): r["digest"] for r in of(kept())}
    if there.get((name, seed)) != digest(ICEM, Worth(), args.episodes, PLAYED):
        row, file = bound(name, seed, args), kept()
        rows = sorted([r for r in of(file) if key(r) != key(row)] + [row], key=key)
        write_json(RESULTS, file | {"truth": {"figures": bounds(rows), "rows": rows}})


def main(args: Args) -> None:
    devices.keep_memory()
    torch.set_num_threads(args.threads)
    for seed in args.seeds:
        for name in args.sets:
            if args.truth:
                measure(name, seed, args)
                continue
            for student in args.students:
                learn(name, student, seed, args)
    file = kept()
    table(file["figures"], file.get("truth", {"figures": {}})["figures"])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
