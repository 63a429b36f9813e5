"""The command `mbrl continual`: a robot meets one changed world after another, and a table says what was forgotten."""

import copy
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from mbrl import continual, mpc
from mbrl import device as devices
from mbrl.border import World, episode_seed
from mbrl.choices import KNOWN, Search, Student, console
from mbrl.continual import STUDENTS, Budget, Course
from mbrl.data import Dataset, joined
from mbrl.mpc import Mpc
from mbrl.planner import ICEM, Worth
from mbrl.run import Run, RunError, from_plain, machine, save_figure, to_plain, versions, write_json

TEST = 1000  # transitions of each task to judge by


@dataclass(frozen=True)
class Continual:
    """Learn the dynamics of one task after another; keep, plan, and judge on all of them."""

    tasks: str | None = None
    """A sequence: cheetah-body, pusher, door, cartpole-pole, reacher-links, or a v5 task and what differs, as in
    Hopper-v5:mass."""
    resume: Path | None = None
    """Continue this run folder where it stopped, to the same numbers."""
    out: Path | None = None
    """The run folder; runs/<tasks>/<learner>-<seed> by default."""
    seed: int | None = None
    """Drawn, and recorded, where none is given."""
    first: int | None = None
    """Only so many tasks of the sequence."""
    steps: int = 5000
    """Transitions of each task."""
    random: float = 1.0
    """The share of them with random actions; the rest is explored by planning with a copy of the student that has
    learned from the random ones."""
    hold: int = 1
    """Steps for which a random action is held."""
    horizon: int = 20
    """Steps of the long prediction error."""
    episodes: int = 0
    """Episodes of each task that are planned in the end, with the last model."""
    length: int = 200
    """Steps of an episode that is planned."""
    budget: Budget = field(default_factory=Budget)
    worth: Worth = field(default_factory=Worth)
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 is torch's own choice."""
    quiet: bool = False
    planner: Search = ICEM  # pyright: ignore[reportInvalidTypeForm]
    """How to search; its settings follow its name."""
    dynamics: Student = field(default_factory=lambda: STUDENTS["hyper"])  # pyright: ignore[reportInvalidTypeForm]
    """Who learns; its settings follow its name."""


TYPES = (*KNOWN, Continual, Budget)


def run_continual(args: Continual) -> Run:
    """The command; returns the finished run."""
    run, args, tasks = _begin(args)
    assert args.seed is not None
    began, device = time.perf_counter(), devices.pick(args.device)
    with run:
        test = _collected(tasks, TEST, args, 1, device)
        kept = run.load("course")
        student = args.dynamics.begin(test[0].spec, len(tasks), devices.generator(args.seed))
        student.to(device)
        course = Course([], [], [])
        if kept is not None:
            student.load({k: v.to(device) for k, v in kept[0].items()})
            course = Course(**kept[1]["course"])
        course = _learned(run, args, tasks, student, test, course, device)
        returns = _returns(run, args, tasks, student, device)
        matrix = np.array(course.matrix)
        result = {
            "tasks": args.tasks, "names": [t.name for t in tasks], "seed": args.seed, "learner": name_of(args.dynamics),
            "matrix": course.matrix, "horizon": args.horizon, "seconds": course.seconds, "memory": course.memory,
            "one_step": continual.summary(matrix[None, :, :, 0]), "returns": returns,
            "wall_s": round(time.perf_counter() - began, 1), **machine(), "versions": versions(),
        }  # fmt: skip
        draw(run.folder / "report.png", result)
        write_json(run.folder / "result.json", result)
    if not args.quiet:
        tell(result)
        console.print(f"report: {run.folder / 'report.png'}")
    return run


def name_of(config: Any) -> str:
    return next((n for n, x in STUDENTS.items() if type(x) is type(config)), "custom")


def _begin(args: Continual) -> tuple[Run, Continual, list[Any]]:
    """The run folder, new or resumed, its settings and its tasks. Raises ValueError before there is a folder."""
    from mbrl_envs import contexts

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.resume is not None:
        run = Run.resumed(args.resume, "continual", args.threads, quiet=args.quiet)
        old = from_plain(run.config["arguments"], TYPES)
        if args.tasks not in (None, old.tasks) or args.first not in (None, old.first):
            other = args.tasks or f"its first {args.first} tasks"
            raise RunError(f"{args.resume}: is a sequence of {old.tasks}; it cannot go on with {other}")
        run.rewind()
        return run, replace(old, quiet=args.quiet, device=run.local["device"]), contexts.tasks(old.tasks)[: old.first]
    if args.tasks is None:
        raise ValueError(
            f"--tasks is missing; expected one of {', '.join(contexts.SEQUENCES)}, or as in Hopper-v5:mass"
        )
    if not 0 <= args.random <= 1 or args.steps < 2 or (args.first is not None and args.first < 1):
        got = f"--random {args.random}, --steps {args.steps}, --first {args.first}"
        raise ValueError(f"{got}: expected a share, at least 2 steps and at least one task")
    tasks = contexts.tasks(args.tasks)[: args.first]
    if (args.episodes or args.random < 1) and any(t.reward is None for t in tasks):
        raise ValueError(f"--tasks {args.tasks}: no reward is known there; leave --episodes and --random out")
    seed = devices.fresh_seed() if args.seed is None else args.seed
    out = args.out or Path("runs") / args.tasks.replace(":", "_") / f"{name_of(args.dynamics)}-{seed}"
    local = {"device": str(devices.pick(args.device)), "threads": torch.get_num_threads()}
    args = replace(args, seed=seed)
    plain = to_plain(replace(args, out=None, quiet=False))
    return Run.create(out, {"algorithm": "continual", "arguments": plain}, local, quiet=args.quiet), args, tasks


def _collected(tasks: list[Any], steps: int, args: Continual, part: int, device: torch.device) -> list[Dataset]:
    """Random transitions of each task; `part` keeps those to judge by apart from those to learn from."""
    from mbrl_envs import contexts

    assert args.seed is not None
    seed = int(np.random.SeedSequence([args.seed, part]).generate_state(1)[0])
    found = contexts.collect(tasks, steps, seed=seed, hold=args.hold)
    return [x.to(device, torch.float32) for x in found]


def _explored(run: Run, args: Continual, tasks: list[Any], task: int, student: Any, device: torch.device) -> Dataset:
    """The task's data: random, then by planning with a copy of the student."""
    assert args.seed is not None
    n = max(2, round(args.random * args.steps))
    data = _collected([tasks[task]], n, replace(args, seed=args.seed + 7919 * (task + 1)), 2, device)[0]
    if n >= args.steps:
        return data
    trial = copy.deepcopy(student)
    tell = lambda i, of, f: run.progress(f"explore {task}", i, of, f)
    trial.learn(task, data, args.budget, devices.generator(args.seed + task), tell)
    controller = _controller(args, tasks[task], trial, task, episode_seed(args.seed, task))
    env = tasks[task].env()
    episodes, left, i = [], args.steps - n, 0
    while left > 0:
        controller.begin(1)
        seed = episode_seed(args.seed, 1000 * (task + 1) + i)
        e = mpc.episode(env, lambda obs: controller(obs.to(device)), seed, min(left, args.length))
        episodes.append(e)
        left, i = left - len(e.act), i + 1
        run.log(f"explore {task}", i, {"return": e.total})
    more = mpc.gathered(episodes, World(env)).to(device, torch.float32)
    env.close()
    return joined([data, replace(more, dt=data.dt)])


def _learned(
    run: Run, args: Continual, tasks: list[Any], student: Any, test: list[Dataset], course: Course, device: torch.device
) -> Course:
    """The tasks that are left, or the rest of one; judged on all and saved after each."""
    assert args.seed is not None
    kept, resume = run.load("within"), None
    if kept is not None and int(kept[1]["task"]) == len(course.matrix):
        resume = {k: v.to(device) if k != "generator" else v for k, v in kept[0].items()}

    def keep(task: int, state: dict[str, Tensor]) -> None:
        run.save("within", state, {"task": task})

    def tell(task: int, i: int, of: int, figures: dict[str, float]) -> None:
        run.log(f"task {task}", i, figures)
        run.progress(f"task {task}", i, of, figures)

    def save(task: int, state: dict[str, Tensor], so_far: Course) -> None:
        run.log("errors", task, {f"error {i}": float(e) for i, (e, _) in enumerate(so_far.matrix[-1])})
        run.save("course", state, {"course": so_far.__dict__})
        run.forget("within")

    return continual.run(
        student, lambda task: _explored(run, args, tasks, task, student, device), test, args.budget, args.seed,
        horizon=args.horizon, progress=tell, keep=keep, save=save, course=course, resume=resume,
    )  # fmt: skip


def _controller(args: Continual, task: Any, student: Any, number: int, seed: int) -> Mpc:
    model, ctx = student.known(number)
    stream = devices.generator(seed, ctx.device)
    return Mpc(args.planner, args.worth, model, generator=stream, reward=task.reward, terminal=task.terminal, ctx=ctx)


def _returns(run: Run, args: Continual, tasks: list[Any], student: Any, device: torch.device) -> list[list[float]]:
    """[task][episode], by planning with the last model."""
    from mbrl_envs.evaluate import evaluator

    assert args.seed is not None
    found = []
    for i, task in enumerate(tasks if args.episodes else []):
        controller = _controller(args, task, student, i, episode_seed(args.seed, 10_000 + i))
        play = evaluator(task.env, episodes=args.episodes, seed=10_000 + args.seed, max_steps=args.length)
        got = play(lambda obs, c=controller: c(obs.to(device)).cpu(), rows=controller.rows)
        play.close()
        found.append([float(x) for x in got])
        run.log("returns", i, {"return": float(np.mean(got))})
        run.progress("returns", i + 1, len(tasks), {"return": float(np.mean(got))})
    return found


def tell(result: dict[str, Any]) -> None:
    matrix, names = np.array(result["matrix"])[:, :, 0], result["names"]
    words = Table("after task", *names, title=f"{result['tasks']}, {result['learner']}: one-step error (normalised)")
    for j, row in enumerate(matrix):
        words.add_row(names[j], *(f"[dim]{x:.3g}[/dim]" if i > j else f"{x:.3g}" for i, x in enumerate(row)))
    if result["returns"]:
        words.add_section()
        words.add_row("return", *(f"{np.mean(r):.4g}" for r in result["returns"]))
    console.print(words)
    one, memory = result["one_step"], result["memory"][-1]
    figures = {k: one[k]["median"] for k in ("final", "learned", "forgetting", "ratio") if k in one}
    console.print(", ".join(f"{k} {v:.3g}" for k, v in figures.items()))
    console.print(", ".join(f"{v} {k}" for k, v in memory.items()))


def draw(path: Path, result: dict[str, Any]) -> None:
    """The matrix, and each task's error as the sequence goes on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    matrix, names = np.array(result["matrix"]), result["names"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    low = np.tril(matrix[:, :, 0])
    seen = np.ma.masked_where(np.triu(np.ones_like(low), 1) > 0, matrix[:, :, 0])
    scale = LogNorm(max(float(seen.min()), 1e-8), max(float(seen.max()), 2e-8))
    image = axes[0].imshow(seen, norm=scale, cmap="viridis")
    axes[0].set(title="one-step error", xlabel="on task", ylabel="after task")
    axes[0].set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes[0].set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axes[0])
    for i, name in enumerate(names):
        axes[1].plot(range(i, len(names)), matrix[i:, i, 0], marker="o", ms=3, label=name)
    axes[1].set(title="one-step error of each task", xlabel="tasks learned", yscale="log")
    axes[1].set_xticks(range(len(names)), [str(i + 1) for i in range(len(names))])
    axes[1].legend(fontsize=7)
    figure.suptitle(f"{result['tasks']}, {result['learner']}, seed {result['seed']}")
    save_figure(figure, path)
