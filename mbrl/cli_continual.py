"""The command `mbrl continual`: a robot meets one changed world after another, and a table says what was forgotten."""

import copy
import operator
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import tyro
from rich import box
from rich.table import Table
from torch import Tensor

from mbrl import continual, mpc
from mbrl import device as devices
from mbrl import planner as planners
from mbrl.border import World, episode_seed
from mbrl.choices import KNOWN, WORDS, Search, Student, console, only_its_own
from mbrl.continual import STUDENTS, Budget, Course, Hypernetwork
from mbrl.core import demand
from mbrl.data import Dataset, joined
from mbrl.dynamics.hyper import HyperConfig, HyperFit
from mbrl.mpc import Mpc
from mbrl.planner import ICEM, Worth
from mbrl.run import Run, from_plain, machine, save_figure, to_plain, versions, write_json

TEST = 1000  # transitions of each task to judge by


@dataclass(frozen=True)
class Anchor:
    """What holds earlier tasks, beta / t sum_j |h(e_j; theta*) - h(e_j; theta + dtheta)|^2 over t of them; all else of
    how a task is learned is the budget's."""

    beta: float = HyperFit.beta
    look_ahead: bool = HyperFit.look_ahead
    """dtheta is the step that Adam would take by the task's loss alone; else 0."""
    past: int | None = HyperFit.past
    """Of how many earlier tasks, drawn anew each time, an update sees the anchor; all by default."""
    lr_context: float = HyperFit.lr_context
    """Of the embeddings; the budget's lr where that is larger."""


def hypernetwork(
    learner: HyperConfig = STUDENTS["hyper"].learner,
    anchor: Anchor = Anchor(),
    importance: bool = STUDENTS["hyper"].importance,
    lr: float | None = STUDENTS["hyper"].lr,
) -> Hypernetwork:
    """
    Args:
        importance: The anchor weighs generated parameters by the loss's mean square gradient.
        lr: Of the weights; none takes the budget's.
    """
    kept = {f.name: getattr(anchor, f.name) for f in fields(anchor)}
    return Hypernetwork(learner, replace(STUDENTS["hyper"].anchor, **kept), importance, lr)


_hyper = Annotated[
    Hypernetwork,
    tyro.conf.subcommand("hyper", constructor=hypernetwork, description=WORDS["hyper"]),
    tyro.conf.AvoidSubcommands,
]
_others = [x for x in get_args(Student) if get_args(x)[0] is not Hypernetwork]
Pupil: Any = reduce(operator.or_, [_hyper, *_others])  # a Student whose options do what they say


@dataclass(frozen=True)
class Continual:
    """Learn the dynamics of one task after another; keep, plan, and judge on all of them."""

    tasks: str | None = None
    """A sequence: cheetah-body, pusher, door, cartpole-pole, reacher-links, or a v5 task and what differs, as in
    Hopper-v5:mass."""
    resume: Path | None = None
    """Continue this run folder where it stopped, to the same numbers and by its own settings: what is given beside and
    differs from them (and from the defaults) is refused, but for --threads and --quiet."""
    out: Path | None = None
    """The run folder; runs/<tasks>/<learner>-<seed> by default."""
    seed: int | None = None
    """Drawn, and recorded, where none is given."""
    first: int | None = None
    """Only so many tasks of the sequence."""
    steps: int = 5000
    """Transitions of each task, at least 2."""
    random: float = 1.0
    """The share of them with random actions, above 0; the rest is explored by planning with a copy of the student that
    has learned from the random ones."""
    hold: int = 1
    """Steps for which a random action is held."""
    horizon: int = 20
    """Steps of the long prediction error; no more than the longest of a task's held-out episodes has."""
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
    dynamics: Pupil = field(default_factory=lambda: STUDENTS["hyper"])  # pyright: ignore[reportInvalidTypeForm]
    """Who learns; its settings follow its name. `experts` are none of these: they learn from a stream that does not say
    which task it is of, from Python, by mbrl.dynamics.experts.fit_stream."""


TYPES = (*KNOWN, Continual, Budget)


def run_continual(args: Continual) -> Run:
    """The command; returns the finished run."""
    run, args, tasks, test, student, device = _begin(args)
    with run:
        kept = run.load("course")
        course = Course([], [], [])
        if kept is not None:
            student.load({k: v.to(device) for k, v in kept[0].items()})
            course = Course(**kept[1]["course"])
        course = _learned(run, args, tasks, student, test, course, device)
        returns = _returns(run, args, tasks, student, device)
        matrix = np.array(course.matrix)
        result = {
            "tasks": args.tasks, "names": [t.name for t in tasks], "quantity": quantity(tasks), "seed": args.seed,
            "learner": name_of(args.dynamics),
            "matrix": course.matrix, "horizon": args.horizon, "seconds": course.seconds, "memory": course.memory,
            "one_step": continual.summary(matrix[None, :, :, 0]), "returns": returns,
            "wall_s": round(run.seconds, 1), **machine(), "versions": versions(),
        }  # fmt: skip
        draw(run.folder / "report.png", result)
        write_json(run.folder / "result.json", result)
    if not args.quiet:
        tell(result)
        console.print(
            f"report: {run.folder / 'report.png'}; every error after every task: {run.folder / 'result.json'}"
        )
    return run


def name_of(config: Any) -> str:
    return next((n for n, x in STUDENTS.items() if type(x) is type(config)), "custom")


def quantity(tasks: list[Any]) -> str:
    """What the numbers are that tasks are named by; "" where their names have words."""
    return "" if any(c.isalpha() for t in tasks for c in t.name) else "-".join(tasks[0].kwargs)


# ---------------------------------------------------------------- before anything is learned


def _begin(args: Continual) -> tuple[Run, Continual, list[Any], list[Dataset], Any, torch.device]:
    """The run folder, new or resumed, its settings, its tasks with held-out data, and a new student. Raises ValueError
    before there is a folder, and before anything changes in one."""
    from mbrl_envs import contexts

    devices.use_threads(args.threads)
    run = None
    if args.resume is not None:
        run = Run.resumed(args.resume, "continual", args.threads, quiet=args.quiet)
        args = _resumed(run, args)
        tasks = contexts.tasks(str(args.tasks))[: args.first]
    else:
        if args.tasks is None:
            raise ValueError(
                f"--tasks is missing; expected one of {', '.join(contexts.SEQUENCES)}, or as in Hopper-v5:mass"
            )
        tasks = contexts.tasks(args.tasks)
        _check(args, tasks)
        tasks, args = tasks[: args.first], replace(args, seed=devices.fresh_seed() if args.seed is None else args.seed)
    assert args.seed is not None
    device = devices.pick(args.device)
    test = _collected(tasks, TEST, args, 1, device)
    continual.check_horizon(args.horizon, test)
    student = args.dynamics.begin(test[0].spec, len(tasks), devices.generator(args.seed))
    student.to(device)
    if args.episodes or args.random < 1:  # what cannot be planned with says so now
        trial = _controller(args, tasks[0], student, 0, 0)
        trial.begin(1)
        trial(test[0].obs[:1])
    if run is not None:
        run.rewind()
        return run, args, tasks, test, student, device
    name = name_of(args.dynamics)
    out = args.out or Path("runs") / str(args.tasks).replace(":", "_") / f"{name}-{args.seed}"
    local = {"device": str(device), "threads": torch.get_num_threads()}
    plain = to_plain(replace(args, out=None, quiet=False))
    run = Run.create(out, {"algorithm": "continual", "arguments": plain}, local, quiet=args.quiet)
    return run, args, tasks, test, student, device


def _check(args: Continual, tasks: list[Any]) -> None:
    """Raises ValueError for settings that cannot be."""
    n = len(tasks)
    demand(
        "continual",
        ("--seed", args.seed, "0 to 2^62", args.seed is None or 0 <= args.seed <= 2**62),
        ("--first", args.first, f"1 to {n}, the tasks of {args.tasks}", args.first is None or 1 <= args.first <= n),
        ("--steps", args.steps, "at least 2", args.steps >= 2),
        ("--random", args.random, "a share above 0, at most 1", 0 < args.random <= 1),
        ("--hold", args.hold, "at least 1", args.hold >= 1),
        ("--horizon", args.horizon, "at least 1", args.horizon >= 1),
        ("--episodes", args.episodes, "at least 0", args.episodes >= 0),
        ("--length", args.length, "at least 1", args.length >= 1),
    )
    continual.check(args.budget)
    if (args.episodes or args.random < 1) and any(t.reward is None for t in tasks):
        raise ValueError(f"--tasks {args.tasks}: no reward is known there; leave --episodes and --random out")


def _resumed(run: Run, given: Continual) -> Continual:
    """The run's own settings. Raises RunError for options that are none of them."""
    from mbrl_envs import contexts

    old, device = from_plain(run.config["arguments"], TYPES), run.local["device"]
    many = len(contexts.tasks(old.tasks))
    own = replace(old, first=many if old.first is None else old.first)
    only_its_own(run, given, own, planner=planners.PRESETS, dynamics=STUDENTS)
    if not given.quiet:
        name = f"the first {own.first} of {many} tasks of {old.tasks}, {name_of(old.dynamics)}"
        console.print(f"{run.folder} goes on by its own settings: {name}, seed {old.seed}, {old.steps} steps each")
    return replace(old, quiet=given.quiet, device=device)


# ---------------------------------------------------------------- learning


def _collected(tasks: list[Any], steps: int, args: Continual, part: int, device: torch.device) -> list[Dataset]:
    """Random transitions of each task; `part` keeps those to judge by apart from those to learn from."""
    from mbrl_envs import contexts

    assert args.seed is not None
    seed = int(np.random.SeedSequence([args.seed, part]).generate_state(1)[0])
    found = contexts.collect(tasks, steps, seed=seed, hold=args.hold)
    return [x.to(device, torch.float32) for x in found]


def _explored(
    run: Run, args: Continual, tasks: list[Any], task: int, student: Any, device: torch.device, again: bool
) -> Dataset:
    """The task's data: random, then by planning with a copy of the student. again: a run that goes on within the task
    has its returns already."""
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
        if not again:
            run.log(f"explore {task}", i, {"return": e.total})
    more = mpc.gathered(episodes, World(env)).to(device, torch.float32)
    env.close()
    return joined([data, replace(more, dt=data.dt)])


def _learned(
    run: Run, args: Continual, tasks: list[Any], student: Any, test: list[Dataset], course: Course, device: torch.device
) -> Course:
    """The tasks that are left, or the rest of one; judged on all and saved after each."""
    assert args.seed is not None
    kept, resume, now = run.load("within"), None, len(course.matrix)
    if kept is not None and int(kept[1]["task"]) == now:
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

    explored = lambda task: _explored(run, args, tasks, task, student, device, resume is not None and task == now)
    return continual.run(
        student, explored, test, args.budget, args.seed,
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


# ---------------------------------------------------------------- what is shown


def tell(result: dict[str, Any]) -> None:
    """A row for each task; what fits into 80 columns."""
    matrix, n, horizon = np.array(result["matrix"]), len(result["names"]), f"{result['horizon']} steps"
    one, own = matrix[:, :, 0], np.diagonal(matrix[:, :, 0])
    before = [np.nan, *(one[i - 1, i] for i in range(1, n))]
    columns = {"before": before, "just after": own, "final": one[-1], "ratio": one[-1] / own, horizon: matrix[-1, :, 1]}
    summary = {k: x["median"] for k, x in result["one_step"].items()}
    means = {"just after": summary["learned"], "final": summary["final"], "ratio": summary.get("ratio")}
    means[horizon] = float(matrix[-1, :, 1].mean())
    if result["returns"]:
        columns["return"] = [float(np.mean(r)) for r in result["returns"]]
        means["return"] = float(np.mean(columns["return"]))
    title = f"{result['tasks']}, {result['learner']}, seed {result['seed']}: normalised squared error, one step"
    words = Table(title=title, box=box.SIMPLE, pad_edge=False)
    words.add_column(result.get("quantity") or "task", overflow="fold")
    for name in columns:
        words.add_column(name, justify="right", no_wrap=name != "just after")
    for i, name in enumerate(result["names"]):
        words.add_row(name, *(_short(x[i]) for x in columns.values()))
    words.add_section()
    words.add_row("mean", *(_short(means.get(k)) for k in columns))
    console.print(words)
    console.print(caption(result), soft_wrap=False, highlight=False)
    if "forgetting" in summary:
        console.print(f"forgetting, the mean rise from just after to final: {_short(summary['forgetting'])}")
    memory = result["memory"][-1]
    console.print(
        f"kept in the end: {memory['parameters']} parameters, {memory['extra']} extra (further numbers carried from "
        f"task to task), {memory['transitions']} transitions (stored, of earlier tasks)",
        highlight=False,
    )


def _short(x: float | None) -> str:
    return "-" if x is None or np.isnan(x) else f"{x:.3g}"


def caption(result: dict[str, Any]) -> str:
    words = (
        "Errors are over the variance of the change: 1 is as good as the mean change. before: just before the task's "
        "turn; just after: it; final: after the last task; ratio: final over just after, above 1 is forgotten (its "
        f"mean is geometric, without the last task); {result['horizon']} steps: final, so far ahead, over the variance "
        "of the observation."
    )
    each = f" return: mean of {len(result['returns'][0])} episodes planned in the end." if result["returns"] else ""
    return words + each


def draw(path: Path, result: dict[str, Any]) -> None:
    """Errors of one and of many steps: the matrix, and each task's as the sequence goes on; returns where there are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    matrix, names, returns = np.array(result["matrix"]), result["names"], result["returns"]
    n, what = len(names), result.get("quantity") or "task"
    figure = plt.figure(figsize=(16 if returns else 12, 9), layout="constrained")
    grid = figure.add_gridspec(2, 3 if returns else 2)
    colors = [plt.get_cmap("tab10")(i) if n <= 10 else plt.get_cmap("viridis")(i / (n - 1)) for i in range(n)]
    edge = np.arange(n - 1).repeat(2) + 0.5  # above it, what was not yet learned
    for row, steps in enumerate(("one-step", f"{result['horizon']}-step")):
        x = matrix[:, :, row]
        seen, title = x[np.isfinite(x) & (x > 0)], f"{steps} normalised squared error"
        low, high = (float(seen.min()), float(seen.max())) if seen.size else (1.0, 1.0)
        left, right = figure.add_subplot(grid[row, 0]), figure.add_subplot(grid[row, 1])
        low = max(low, 1e-8)
        image = left.imshow(np.ma.masked_invalid(x), norm=LogNorm(low, max(high, 1.01 * low)), cmap="viridis")
        left.plot(edge, np.concatenate([[-0.5], edge[:-1]]) if n > 1 else [], color="red", lw=2)
        left.set(title=f"{title}\n(above the red line: not yet learned)", xlabel=f"on {what}", ylabel=f"after {what}")
        left.set_xticks(range(n), names, rotation=45, ha="right")
        left.set_yticks(range(n), names)
        figure.colorbar(image, ax=left)
        for i, name in enumerate(names):
            right.plot(range(i, n), x[i:, i], marker="o", ms=3, color=colors[i], label=name if row == 0 else None)
        right.set(title=f"{title}\nof each task, from its turn on", xlabel="tasks learned", yscale="log")
        right.set_xticks(range(n), [str(i + 1) for i in range(n)])
    if returns:
        ax = figure.add_subplot(grid[:, 2])
        ax.bar(range(n), [float(np.mean(r)) for r in returns], color=colors, alpha=0.5)
        for i, r in enumerate(returns):
            ax.plot([i] * len(r), r, "o", color=colors[i], ms=4)
        ax.set(title="return, planned with the last model\n(bars: means of the episodes)", xlabel=what)
        ax.set_xticks(range(n), names, rotation=45, ha="right")
    figure.legend(loc="outside right upper", title=what)
    figure.suptitle(f"{result['tasks']}, {result['learner']}, seed {result['seed']}")
    save_figure(figure, path)
