"""The command line: `mbrl --help`. The only module of `mbrl` that reaches for the environments."""

import copy
import operator
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import reduce
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import mbrl
from mbrl import device as devices
from mbrl import mpc, offline, suite
from mbrl.choices import KNOWN, LEARNERS, PLAIN, Algorithm, Learner, console, only_its_own
from mbrl.cli_continual import Continual, run_continual
from mbrl.cli_control import Online, Plan, run_online, run_plan
from mbrl.cli_meta import Meta, run_meta
from mbrl.cli_reconstruct import Reconstruct, run_reconstruct
from mbrl.core import Diverged, Spec
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.filtered import FilterConfig, RewardConfig
from mbrl.fit import FitConfig
from mbrl.run import Run, RunError, draw_report, from_plain, machine, to_plain, versions, write_json
from mbrl.sac import SacConfig
from mbrl.terminal import TerminalConfig, TerminalHead

# ---------------------------------------------------------------- commands


@dataclass(frozen=True)
class Offline:
    """Learn a policy from a fixed dataset, in a learned model of it, and run it in the true simulator."""

    dataset: str | None = None
    """A D4RL HDF5 file or id, minari:<id>, a NeoRL .npz, or embedded:pendulum / embedded:hopper."""
    resume: Path | None = None
    """Continue this run folder where it stopped, to the same numbers and by its own settings: what is given beside and
    differs from them is refused, but for --threads, --quiet, --env, --scale, and where its data lie now."""
    out: Path | None = None
    """The run folder; runs/<dataset>/<algorithm>-<seed> by default."""
    seeds: tuple[int, ...] = ()
    """Several are trained side by side. One is drawn, and recorded, where none is given."""
    updates: int | None = None
    """Instead of the algorithm's own number."""
    evaluate_every: int | None = None
    """Updates between evaluations, instead of the algorithm's own number."""
    env: str | None = None
    """Evaluate in this gymnasium environment instead of the data's own; "none" for no evaluation."""
    episodes: int = 10
    """Episodes an evaluation."""
    scale: str | None = None
    """Normalise by the reference scores of this dataset id instead of the data's own."""
    reward: Literal["learned", "task"] = "learned"
    """The learner's reward head, or the task's own function where it is known."""
    models: Path | None = None
    """A folder of fitted models that several runs on the same data share."""
    start: Path | None = None
    """Start from this policy: a stable-baselines3 SAC checkpoint, or a run folder."""
    plan: bool = False
    """At the end, evaluate planning over the policy as well (LOOP), from the same initial states."""
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 is torch's own choice."""
    strict: bool = False
    """Actions beyond the bounds are an error instead of a warning."""
    quiet: bool = False
    fitting: FitConfig = field(default_factory=FitConfig)
    algorithm: Algorithm = offline.MOREC_MOPO  # pyright: ignore[reportInvalidTypeForm]
    """What learns; its settings follow its name."""
    dynamics: Learner = field(default_factory=EnsembleConfig)  # pyright: ignore[reportInvalidTypeForm]
    """The model of the world; its settings follow its name."""


@dataclass(frozen=True)
class Evaluate:
    """Run a trained policy in the true simulator."""

    run: Annotated[Path, tyro.conf.Positional]
    episodes: int = 20
    seed: int = 1_000
    """Of the episodes' initial states; another than training's."""
    env: str | None = None
    """Instead of the run's own."""
    plan: bool = False
    """Plan over the policy in the run's fitted model (LOOP), and show the gain."""
    export: Path | None = None
    """Write the policy as a stable-baselines3 SAC checkpoint."""
    video: Path | None = None
    """Write an .mp4 or .gif of one episode (MUJOCO_GL=egl where there is no screen)."""


@dataclass(frozen=True)
class Info:
    """What a dataset holds, as a table and a figure."""

    source: Annotated[str, tyro.conf.Positional]
    figure: Path | None = None
    """Where the picture goes; <name>.png in this folder by default."""
    strict: bool = False


@dataclass(frozen=True)
class Scores:
    """The reference scores (min, max) of a dataset id."""

    id: Annotated[str, tyro.conf.Positional]


@dataclass(frozen=True)
class Data:
    """Look at datasets."""

    action: tyro.conf.OmitArgPrefixes[
        Annotated[Info, tyro.conf.subcommand("info", prefix_name=False)]
        | Annotated[Scores, tyro.conf.subcommand("scores", prefix_name=False)]
    ]


@dataclass(frozen=True)
class List:
    """Algorithms, learners, embedded datasets and the ids with reference scores."""

    ids: bool = False
    """Every id, not only how many."""


@dataclass(frozen=True)
class Suite:
    """Datasets x algorithms x seeds. Finished runs are not run again, interrupted ones continue."""

    datasets: tuple[str, ...]
    algorithms: tuple[str, ...] = ("mopo", "morec-mopo")
    """Presets; NAME@X sets the penalty's coefficient to X."""
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs/suite")
    updates: int | None = None
    evaluate_every: int | None = None
    episodes: int = 10
    scale: tuple[str, ...] = ()
    """One reference id a dataset, where its own scale is not the one wanted."""
    workers: int = 1
    """Processes side by side, each with its share of the cores."""
    together: bool = False
    """Train all seeds of a cell side by side in one process (for an accelerator)."""
    device: str = "auto"
    report: bool = False
    """Only print the table of what is there."""
    fitting: FitConfig = field(default_factory=FitConfig)
    dynamics: Learner = field(default_factory=EnsembleConfig)  # pyright: ignore[reportInvalidTypeForm]
    """The model of the world; its settings follow its name."""


@dataclass(frozen=True)
class Demo:
    """The main job on the embedded Pendulum data: model, dynamics reward, policy, true simulator, in minutes."""

    out: Path | None = None
    seed: int = 0


# ---------------------------------------------------------------- mbrl offline


def algorithm_named(name: str) -> offline.OfflineConfig:
    """A preset, or NAME@X with the penalty's coefficient X. Raises ValueError for a name that is none."""
    base, _, coefficient = name.partition("@")
    if base not in offline.PRESETS:
        raise ValueError(f"algorithm {base!r}: expected one of {', '.join(offline.PRESETS)}")
    config = offline.PRESETS[base]
    if not coefficient:
        return config
    if config.imagination is None:
        raise ValueError(f"algorithm {name!r}: {base} has no penalty to set")
    try:
        value = float(coefficient)
    except ValueError:
        raise ValueError(f"algorithm {name!r}: {coefficient!r} is not a number") from None
    penalty = replace(config.imagination.penalty, coefficient=value)
    return replace(config, imagination=replace(config.imagination, penalty=penalty))


def sized(config: offline.OfflineConfig, updates: int | None, evaluate_every: int | None) -> offline.OfflineConfig:
    """With these numbers of updates, where they are given. Raises ValueError for one below 1."""
    for name, value in (("updates", updates), ("evaluate_every", evaluate_every)):
        if value is not None:
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
            config = replace(config, **{name: value})
    return config


def name_of(config: offline.OfflineConfig) -> str:
    """The preset that a config is, give or take its numbers of updates and its penalty."""
    for name, preset in offline.PRESETS.items():
        same = replace(config, updates=preset.updates, evaluate_every=preset.evaluate_every)
        if same == preset:
            return name
        if same.imagination is not None and preset.imagination is not None:
            penalty = replace(preset.imagination.penalty, coefficient=same.imagination.penalty.coefficient)
            if same == replace(preset, imagination=replace(preset.imagination, penalty=penalty)):
                return f"{name}@{penalty.coefficient:g}"
    kind = lambda c: (
        type(c.agent),
        c.imagination and (c.imagination.morec is None, c.imagination.penalty.name, c.imagination.truncation is None),
    )
    return next(
        (f"{name}-custom" for name, preset in offline.PRESETS.items() if kind(preset) == kind(config)), "custom"
    )


def run_offline(args: Offline) -> Run:
    """The command `mbrl offline`; returns the finished run."""
    from mbrl_envs import datasets

    devices.use_threads(args.threads)
    device = devices.pick(args.device)
    if args.resume is not None:
        given = args
        run = Run.resumed(args.resume, "offline", args.threads, quiet=args.quiet)
        config = run.config
        source = args.dataset or run.local["source"]
        args = replace(from_plain(config["arguments"], (*KNOWN, Offline)), threads=args.threads, quiet=args.quiet)
        args = replace(args, device=run.local["device"], models=run.local["models"] and Path(run.local["models"]))
        args = replace(args, env=given.env or args.env, scale=given.scale or args.scale)
        own = replace(args, dataset=given.dataset, start=args.start and Path(args.start))
        only_its_own(run, given, own, algorithm=offline.PRESETS, dynamics=LEARNERS)
        device = devices.pick(args.device)
        data = datasets.load(source, strict=args.strict, device=device)
        if data.sha256 != config["data"]["sha256"]:
            raise RunError(
                f"{source}: not the data of {run.folder} ({data.sha256[:12]}, expected {config['data']['sha256'][:12]})"
            )
        run.shared = args.models
        world = World.of(args, data)
        run.rewind()
        return _train(args, run, data, world)
    if args.dataset is None:
        raise ValueError(
            "--dataset is missing; expected a file, a D4RL id, minari:<id>, or embedded:pendulum to try it"
        )
    data = datasets.load(args.dataset, strict=args.strict, device=device)
    algorithm = args.algorithm
    algorithm = sized(algorithm, args.updates, args.evaluate_every)
    if args.start is not None and not isinstance(algorithm.agent, SacConfig):  # before there is a folder
        raise ValueError(f"--start {args.start}: {name_of(algorithm)} starts from no SAC policy; leave --start out")
    seeds = args.seeds or (devices.fresh_seed(),)
    world = World.of(replace(args, seeds=seeds), data)
    _check_plan(replace(args, algorithm=algorithm), world)
    if algorithm.imagination is not None:
        try:
            offline.check_doubts(algorithm.imagination, data, args.dynamics)
        except ValueError as error:
            option = "--algorithm.imagination.penalty.coefficient 0, before dynamics:"
            raise ValueError(f"{name_of(algorithm)}: {error} ({option})") from error
    if args.start is not None:
        _start(Path(args.start), replace(args, seeds=seeds), data)
    label = name_of(algorithm)
    stem = data.name.replace("/", "_").replace(":", "_")
    out = args.out or Path("runs") / stem / f"{label}-{'-'.join(map(str, seeds))}"
    local = {
        "source": str(Path(args.dataset).resolve()) if Path(args.dataset).exists() else args.dataset,
        "models": str(args.models.resolve()) if args.models else None,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    args = replace(args, algorithm=algorithm, seeds=seeds, dataset=data.name, out=None, models=None)
    start = str(args.start) if args.start else None
    config = {
        "algorithm": label,
        "data": {
            **{"name": data.name, "sha256": data.sha256, "steps": len(data), "episodes": data.episodes},
            **{"act_low": data.act_low.tolist(), "act_high": data.act_high.tolist(), "dt": data.dt},
        },
        "arguments": to_plain(replace(args, start=start)),
    }
    shared = Path(local["models"]) if local["models"] else None
    run = Run.create(out, config, local, shared=shared, quiet=args.quiet)
    return _train(args, run, data, world)


@dataclass(frozen=True)
class World:
    """Where a policy is evaluated, and what is known of it. Wrong names are found here, before anything is learned."""

    env: str | None
    evaluate: Any
    terminal: Any
    reward: Any
    scale: tuple[float, float] | None

    @classmethod
    def of(cls, args: Offline, data: Any) -> "World":
        """Raises ValueError where the settings name what there is not, or an environment that does not fit the data."""
        from mbrl_envs import evaluate as worlds
        from mbrl_envs import tasks

        env = args.env or data.env or None
        env = None if env == "none" else env
        try:
            task = tasks.task(env, data.spec.obs) if env else None
        except ValueError:  # a variant with other observations: its termination and reward are learned
            task = None
        reward = task.reward if task and args.reward == "task" else None
        if args.reward == "task" and reward is None:
            raise ValueError(
                f"--reward task: no reward function is known for {env or data.name}; leave it to the learner"
            )
        evaluate = None
        if env:
            bounds = {"act_low": data.act_low.cpu().numpy(), "act_high": data.act_high.cpu().numpy()}
            seed = 10_000 + 1_000 * args.seeds[0]
            evaluate = worlds.evaluator(env, episodes=args.episodes, seed=seed, obs=data.spec.obs, **bounds)
            try:
                evaluate.open()
            except ValueError as error:
                raise ValueError(f"{error}; or pass --env none, to learn without evaluations") from error
        scale = scale_of(args.scale) if args.scale else scale_of(env or data.name, None if args.env else data)
        if args.scale and scale is None:
            raise ValueError(f"--scale {args.scale}: no reference scores are known; `mbrl data scores ID` asks for one")
        return cls(env, evaluate, task.terminal if task else None, reward, scale)


def _train(args: Offline, run: Run, data: Any, world: World) -> Run:
    if not args.quiet:
        console.print(f"[bold]{run.folder}[/bold]  {data.name}: {len(data)} steps, {data.episodes} episodes, ", end="")
        console.print(f"mean return {data.returns.mean():.1f}; {run.config['algorithm']}, seeds {args.seeds}")
    start = None
    if args.start is not None:
        start = _start(Path(args.start), args, data)
    began = time.perf_counter()
    with run:
        result = offline.train(
            args.algorithm,
            data,
            dynamics=args.dynamics,
            fitting=args.fitting,
            terminal=world.terminal,
            reward=world.reward,
            evaluate=world.evaluate,
            seeds=args.seeds,
            start=start,
            record=run,
        )
        planned = None
        if args.plan:
            models = [_fitted(run, args, s, data.spec) for s in args.seeds]
            terminal = world.terminal or offline.learn_terminal(data, TerminalConfig(), args.seeds[0], run)
            planned = _planned(result.agent, models, args.seeds, world.evaluate, terminal, world.reward, data.dt)
        finish(run, args, data, result, world, time.perf_counter() - began, planned)
    return run


def _check_plan(args: Offline, world: "World") -> None:
    """Before anything is learned. Raises ValueError for what --plan cannot plan over."""
    if not args.plan:
        return
    if args.algorithm.imagination is None or not isinstance(args.algorithm.agent, SacConfig):
        raise ValueError(f"--plan: {name_of(args.algorithm)} has no model or no critic to plan with; leave --plan out")
    if world.evaluate is None:
        raise ValueError("--plan: there is no environment to plan in; leave --plan or --env none out")


def _learned_end(run: Run, args: Offline, spec: Spec) -> Any:
    """The termination head that a run has learned, or None."""
    facts, config = run.config["data"], TerminalConfig()
    kept = run.load(f"terminal-{offline.digest(facts['sha256'], facts['steps'], config, args.seeds[0])}")
    if kept is None:
        return None
    head = TerminalHead(spec.obs, spec.act, config)
    head.load_state_dict(kept[0])
    return head.to(devices.pick(args.device))


def _fitted(run: Run, args: Offline, seed: int, spec: Spec) -> Any:
    """The model that a run was learned in, without the filter around it, whose cost at every step of every candidate
    a plan cannot bear. Raises RunError where it is gone."""
    facts = run.config["data"]
    name = f"model-{offline.digest(facts['sha256'], facts['steps'], args.dynamics, args.fitting, seed)}"
    kept = run.load(name)
    if kept is None:
        raise RunError(f"{run.folder}: its fitted model ({name}) is not there any more; it cannot be planned with")
    model = args.dynamics.build(spec, devices.generator(0))
    model.load_state_dict(kept[0])
    return model.eval().to(devices.pick(args.device))


def _planned(
    agent: Any, models: Any, seeds: Any, evaluate: Any, terminal: Any, reward: Any, dt: float
) -> list[list[float]]:
    """Returns [seeds][episodes] of planning over each seed's policy."""
    found = []
    for i, (seed, model) in enumerate(zip(seeds, models, strict=True)):
        device = next(model.parameters()).device
        stream = devices.generator(seed, device)
        control = mpc.over(agent, i, model, generator=stream, terminal=terminal, reward=reward, dt=dt)
        act = lambda obs, control=control: control(obs).to(obs.device)
        found.append([float(x) for x in evaluate(act, rows=lambda kept, begun, c=control: c.rows(kept, begun))])
    return found


def _start(path: Path, args: Offline, data: Any) -> dict[str, torch.Tensor]:
    if path.is_dir():
        kept = Run.open(path).load("agent")
        if kept is None:
            raise RunError(f"{path}: holds no trained policy")
        settings = args.algorithm.agent
        want = settings.build(data.spec, devices.generator(0), seeds=len(args.seeds)).state_dict()
        shapes = lambda state: {k: tuple(v.shape) for k, v in state.items()}
        if shapes(want) != shapes(kept[0]):
            raise RunError(
                f"--start {path}: its policy is of another algorithm, width, data or number of seeds; expected one of "
                f"{type(settings).__name__}, hidden {settings.hidden}, {data.spec.obs} observations, {data.spec.act} "
                f"actions, {len(args.seeds)} seeds, with{'' if getattr(settings, 'cloning', 0) else 'out'} cloning"
            )
        return kept[0]
    from mbrl_envs import adapters

    agent = args.algorithm.agent
    normalizer = offline.normalizer_of(data.obs) if getattr(agent, "normalize", False) else None
    return adapters.from_sb3(path, data.spec, agent, seeds=len(args.seeds), normalizer=normalizer).state_dict()


def scale_of(id: str, data: Any = None) -> tuple[float, float] | None:
    """Reference scores, or None where none are known."""
    from mbrl_envs import datasets

    if data is not None and {"min_score", "max_score"} <= set(data.meta) and data.meta["max_score"] is not None:
        return data.meta["min_score"], data.meta["max_score"]
    try:
        return datasets.reference_scores(id)
    except ValueError:
        return None


def finish(
    run: Run, args: Offline, data: Any, result: offline.Result, world: World, wall: float, planned: Any = None
) -> None:
    """result.json, report.png and the words at the end."""
    scale = world.scale
    out: dict[str, Any] = {
        "algorithm": run.config["algorithm"],
        "dataset": data.name,
        "sha256": data.sha256,
        "env": world.env,
        "seeds": list(args.seeds),
        "behaviour_mean": data.returns.mean().item(),
        "behaviour_best": data.returns.max().item(),
        "updates": args.algorithm.updates,
        "scale": scale,
        "seconds": {k: round(v, 2) for k, v in result.seconds.items()},
        "wall_s": round(wall, 1),
        **machine(),
        "versions": versions(),
        "returns": [[u, [[round(x, 2) for x in row] for row in r]] for u, r in result.returns],
    }
    if result.returns:
        final, last = torch.tensor(result.returns[-1][1]).mean(1), result.last(10)
        out |= {"final": final.tolist(), "last10": last.tolist()}
        if scale:
            score = lambda x: (100 * (x - scale[0]) / (scale[1] - scale[0])).tolist()
            out |= {"score_final": score(final), "score_last10": score(last)}
    if planned is not None:
        out |= {"planned": [[round(x, 2) for x in row] for row in planned]}
    title = f"{data.name}, {run.config['algorithm']}, seeds {', '.join(map(str, args.seeds))}"
    draw_report(run, run.folder / "report.png", title, data.returns.tolist(), scale)
    write_json(run.folder / "result.json", out)
    run.forget("policy.partial")
    if args.quiet:
        return
    run.close()
    words = Table(title=title, show_header=True)
    for column in ("seed", "last-10 mean", "final", "score, last-10", "score, final", "data: mean", "data: best"):
        words.add_column(column, justify="right")
    for i, seed in enumerate(args.seeds):
        cells = [out[k][i] if k in out else None for k in ("last10", "final", "score_last10", "score_final")]
        cells += [out["behaviour_mean"], out["behaviour_best"]]
        words.add_row(str(seed), *("-" if x is None else f"{x:.1f}" for x in cells))
    console.print(words)
    if planned is not None:
        for seed, row, own in zip(args.seeds, planned, result.returns[-1][1], strict=True):
            with_, without = sum(row) / len(row), sum(own) / len(own)
            console.print(f"seed {seed}: planning over the policy {with_:.1f}, a gain of {with_ - without:+.1f}")
    console.print("last-10: mean over the last ten evaluations; never the best one. ", end="")
    console.print(f"scale: {scale}" if scale else "no reference scores are known for this environment")
    console.print(f"seconds: {', '.join(f'{k} {v:.0f}' for k, v in result.seconds.items())}")
    console.print(f"figure: {run.folder / 'report.png'}    curves: tensorboard --logdir {run.folder}")


# ---------------------------------------------------------------- the other commands


def returns_of(run: Run, agent: Any, args: Evaluate) -> dict[str, list[list[float]]]:
    """Undiscounted returns [seeds][episodes] of a run's "policy", its agent, and, with `args.plan`, "planned" over it,
    from the same initial states. Raises RunError where the run names no environment, or there is nothing to plan
    with."""
    from mbrl_envs import evaluate as worlds
    from mbrl_envs import tasks

    settings = from_plain(run.config["arguments"], (*KNOWN, Offline))
    env = args.env or (run.result or {}).get("env")
    if env is None:
        raise RunError(f"{args.run}: the run names no environment; pass --env")
    facts = run.config["data"]
    bounds = {k: facts[k] for k in ("act_low", "act_high")} if args.env is None else {}
    evaluate = worlds.evaluator(env, episodes=args.episodes, seed=args.seed, obs=agent.spec.obs, **bounds)
    seeds = settings.seeds
    found = {"policy": [[float(x) for x in evaluate(offline.policy_of(agent, s))] for s in range(len(seeds))]}
    if not args.plan:
        return found
    if settings.algorithm.imagination is None or not isinstance(settings.algorithm.agent, SacConfig):
        raise RunError(f"--plan: {args.run} has no model or no critic to plan with; leave --plan out")
    run.shared = Path(run.local["models"]) if run.local.get("models") else None
    settings = replace(settings, device="auto")  # the run may be from another machine
    models = [_fitted(run, settings, s, agent.spec) for s in seeds]
    try:
        task = tasks.task(env, agent.spec.obs)
    except ValueError:  # as in `World.of`
        task = None
    reward = task.reward if task and settings.reward == "task" else None
    terminal = task.terminal if task else _learned_end(run, settings, agent.spec)
    agent = copy.deepcopy(agent).to(devices.pick())
    dt = facts.get("dt", 1.0)
    return found | {"planned": _planned(agent, models, seeds, evaluate, terminal, reward, dt)}


def run_evaluate(args: Evaluate) -> list[list[float]]:
    """The command `mbrl eval`; returns [seeds][episodes]."""
    from mbrl_envs import adapters
    from mbrl_envs import evaluate as worlds

    run = Run.open(args.run)
    agent, data = load_agent(run)
    found = returns_of(run, agent, args)
    seeds = from_plain(run.config["arguments"], (*KNOWN, Offline)).seeds
    result = run.result or {}
    env = str(args.env or result.get("env"))
    scale = result.get("scale")
    words = Table("seed", "mean return", "std", "min", "max", "score", title=f"{env}, {args.episodes} episodes, {data}")
    for what, rows in found.items():
        for seed, row in zip(seeds, rows, strict=True):
            x = torch.tensor(row)
            score = f"{100 * (x.mean() - scale[0]) / (scale[1] - scale[0]):.1f}" if scale else "-"
            cells = (x.mean(), x.std(correction=0), x.min(), x.max())
            name = str(seed) if what == "policy" else f"{seed}, {what}"
            words.add_row(name, *(f"{v:.1f}" for v in cells), score)
    console.print(words)
    if args.export:
        adapters.to_sb3(agent, env, args.export)
        console.print(f"stable-baselines3 checkpoint: {args.export}")
    if args.video:
        worlds.video(offline.policy_of(agent), env, args.video)
        console.print(f"video: {args.video}")
    return found["policy"]


def load_agent(run: Run) -> tuple[Any, str]:
    """The trained agent of a run, and the name of its data. Raises RunError where there is none."""
    settings = from_plain(run.config["arguments"], (*KNOWN, Offline))
    kept = run.load("agent")
    if kept is None:
        raise RunError(f"{run.folder}: no trained policy yet; continue it with `mbrl offline --resume {run.folder}`")
    widths = kept[1]["spec"]
    spec = Spec(*widths)
    agent = settings.algorithm.agent.build(spec, devices.generator(0), seeds=len(settings.seeds))
    agent.load_state_dict(kept[0])
    return agent, run.config["data"]["name"]


def run_info(args: Info) -> None:
    from mbrl_envs import datasets

    data = datasets.load(args.source, strict=args.strict)
    console.print(datasets.info(data))
    path = args.figure or Path(f"{data.name.replace('/', '_').replace(':', '_')}.png")
    datasets.draw(data, path)
    console.print(f"figure: {path}")


def run_scores(args: Scores) -> None:
    from mbrl_envs import datasets

    low, high = datasets.reference_scores(args.id)
    console.print(f"{args.id}: min {low:g}, max {high:g}; score = 100 (return - min) / (max - min)")


def run_list(args: List) -> None:
    from mbrl_envs import datasets, scores

    for title, names in (("algorithms", offline.PRESETS), ("learners", LEARNERS), ("embedded", datasets.embedded())):
        console.print(f"[bold]{title}[/bold]: {', '.join(names)}")
    ids = sorted(scores.names())
    console.print(f"[bold]ids with reference scores[/bold]: {len(ids)}" + ("" if args.ids else " (--ids lists them)"))
    if args.ids:
        console.print("\n".join(ids))


def run_collect(args: Any) -> None:
    from mbrl_envs import collect

    with Run(Path(".")) as bar:  # only its progress display
        path = collect.collect(args, progress=lambda step, total, values: bar.progress("collect", step, total, values))
    console.print(f"wrote {path}; look at it with `mbrl data info {path}`")


def run_suite(args: Suite) -> dict[str, Any]:
    """The command `mbrl suite`; returns the summary that it also writes to <out>/summary.json."""
    if args.scale and len(args.scale) not in (1, len(args.datasets)):
        raise ValueError(f"--scale: got {len(args.scale)} for {len(args.datasets)} datasets, expected one or one each")
    for name in args.algorithms:
        algorithm_named(name)
    stems = [_stem(source) for source in args.datasets]
    if twice := {s for s in stems if stems.count(s) > 1}:
        raise ValueError(
            f"--datasets: several are called {', '.join(sorted(twice))}, and a table has one column a name"
        )
    groups: list[list[tuple[Offline, Path]]] = []
    seed_groups = [args.seeds] if args.together else [(s,) for s in args.seeds]
    for seeds in seed_groups:  # whole seeds first: an interrupted suite still compares like with like
        for i, source in enumerate(args.datasets):
            scale = args.scale[i % len(args.scale)] if args.scale else None
            stem = _stem(source)
            cells = []
            for name in args.algorithms:
                folder = args.out / stem / name / "-".join(map(str, seeds))
                cell = Offline(
                    dataset=source,
                    out=folder,
                    seeds=seeds,
                    updates=args.updates,
                    evaluate_every=args.evaluate_every,
                    episodes=args.episodes,
                    scale=scale,
                    models=args.out / "models",
                    device=args.device,
                    threads=max(1, (os.cpu_count() or 1) // args.workers) if args.workers > 1 else 0,
                    quiet=args.workers > 1,
                    fitting=args.fitting,
                    algorithm=algorithm_named(name),
                    dynamics=args.dynamics,
                )
                cells.append((cell, folder))
            groups.append(cells)
    failures: list[str] = []
    if not args.report:
        if args.workers > 1:
            watch = {"initializer": _leave_with, "initargs": (os.getpid(),)}
            with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"), **watch) as pool:
                for done in pool.map(_run_group, groups):
                    failures += done
        else:
            for cells in groups:
                failures += _run_group(cells)
    results = []
    for path in sorted(args.out.glob("*/*/*/result.json")):
        found = Run(path.parent).result or {}
        results.append(found | {"algorithm": path.parent.parent.name, "dataset": path.parent.parent.parent.name})
    summary = _summarise(results)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "summary.json", summary)
    for failure in failures:
        console.print(f"[red]failed[/red] {failure}")
    if failures:
        raise RunError(f"{len(failures)} of {sum(map(len, groups))} runs failed; the same command tries them again")
    return summary


def _stem(source: str) -> str:
    return Path(source).stem.replace("/", "_").replace(":", "_")


def _other(cell: Offline, folder: Path) -> str | None:
    """What of a run that lies there already is not what is asked for now. Of a bare result the updates tell."""
    run = Run(folder)
    if (folder / "config.json").exists():
        kept = from_plain(run.config["arguments"], (*KNOWN, Offline))
        wanted = replace(cell, algorithm=sized(cell.algorithm, cell.updates, cell.evaluate_every))
        names = ("algorithm", "seeds", "episodes", "scale", "fitting", "dynamics")
        wrong = [n for n in names if getattr(kept, n) != getattr(wanted, n)]
        return f"other settings ({', '.join(wrong)})" if wrong else None
    updates = cell.updates or cell.algorithm.updates
    if run.result is not None and run.result["updates"] != updates:
        return f"{run.result['updates']} updates instead of {updates}"
    return None


def _leave_with(parent: int) -> None:
    """A worker whose suite was killed ends too: it would write to folders that the next suite continues."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_group(cells: Sequence[tuple[Offline, Path]]) -> list[str]:
    """Runs, one after another, on the same data and seeds: the first fits the models that the others read."""
    failures = []
    for cell, folder in cells:
        if wrong := _other(cell, folder):
            failures.append(f"{folder}: holds a run with {wrong}; name another --out, or remove that folder")
            continue
        if (folder / "result.json").exists():
            continue
        began = time.perf_counter()
        try:
            if (folder / "config.json").exists():
                source = cell.dataset if Path(cell.dataset or "").exists() else None
                run = run_offline(Offline(resume=folder, dataset=source, threads=cell.threads, quiet=cell.quiet))
            else:
                run = run_offline(cell)
            result = run.result or {}
            print(f"{folder}: last-10 {result.get('last10')}, {time.perf_counter() - began:.0f} s", flush=True)
        except (ValueError, RuntimeError, OSError) as error:  # one cell's fault is not the others'
            failures.append(f"{folder}: {error}")
    return failures


def _summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = suite.table(results)
    if not scores:
        console.print("no finished run with a score yet")
        return {"results": list(results)}
    datasets = sorted({d for row in scores.values() for d in row})
    words = Table("algorithm", *datasets, "IQM", "mean", title="normalised score, mean over the last ten evaluations")
    total = suite.aggregate(scores)
    for algorithm, row in scores.items():
        cells = []
        for d in datasets:
            x = torch.tensor(row.get(d, []))
            cells.append("-" if not len(x) else f"{x.mean():.1f} ± {x.std(correction=0):.1f} ({len(x)})")
        whole = [str(total[algorithm][k]) if algorithm in total else "-" for k in ("iqm", "mean")]
        words.add_row(algorithm, *cells, *whole)
    console.print(words)
    console.print(
        "cells: mean ± standard deviation over seeds (their number); intervals: 95 %, stratified bootstrap, 50 000"
    )
    plain = {a: {k: [v.point, v.low, v.high] for k, v in row.items()} for a, row in total.items()}
    return {"scores": scores, "aggregate": plain, "results": list(results), "versions": versions(), **machine()}


def run_demo(args: Demo) -> Run:
    """The command `mbrl demo`."""
    folder = args.out or Path("runs/demo")
    number = 2
    while args.out is None and (folder / "config.json").exists():
        folder, number = Path(f"runs/demo-{number}"), number + 1
    return run_offline(demo_settings(folder, args.seed))


def demo_settings(folder: Path, seed: int) -> Offline:
    """The embedded default: MOREC-MOPO on the Pendulum set, sized for two cores."""
    preset = offline.MOREC_MOPO
    assert preset.imagination is not None
    small = {"hidden": (128, 128), "anchor_hidden": (128, 128), "anchors": 2, "penalty": 1.0}
    reward = RewardConfig(updates=1_500, members=5, anchor_updates=1_500, **small)
    morec = offline.Morec(reward, FilterConfig())
    imagination = replace(preset.imagination, morec=morec, horizon=20, rollouts=400, budget=None, every=500)
    agent = SacConfig(hidden=(128, 128), actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3)
    algorithm = replace(preset, agent=agent, imagination=imagination, updates=12_000, evaluate_every=500, log_every=100)
    fitting = FitConfig(max_epochs=15)
    return Offline(dataset="embedded:pendulum", out=folder, seeds=(seed,), algorithm=algorithm, fitting=fitting)


def _commands() -> Any:
    from mbrl_envs.collect import CollectConfig

    named = {
        "offline": Offline,
        "eval": Evaluate,
        "data": Data,
        "collect": CollectConfig,
        "suite": Suite,
        "plan": Plan,
        "online": Online,
        "reconstruct": Reconstruct,
        "continual": Continual,
        "meta": Meta,
        "list": List,
        "demo": Demo,
    }
    made = [Annotated[cls, tyro.conf.subcommand(name, prefix_name=False)] for name, cls in named.items()]
    return reduce(operator.or_, made)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `mbrl`. Exit status: 0 done, 2 for input that cannot be used, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    devices.keep_memory()
    if argv[:1] == ["--version"]:
        print(f"mbrl-suite {mbrl.__version__}")
        return
    description = "Offline model-based reinforcement learning and dynamics learning."
    command = tyro.cli(_commands(), args=argv or ["--help"], prog="mbrl", description=description)
    if isinstance(command, Data):
        command = command.action
    does = {
        Offline: run_offline,
        Evaluate: run_evaluate,
        Info: run_info,
        Scores: run_scores,
        List: run_list,
        Suite: run_suite,
        Plan: run_plan,
        Online: run_online,
        Reconstruct: run_reconstruct,
        Continual: run_continual,
        Meta: run_meta,
        Demo: run_demo,
    }
    try:
        does.get(type(command), run_collect)(command)
    except KeyboardInterrupt as stop:
        named = (Plan, Online, Reconstruct, Continual, Meta)
        name = type(command).__name__.lower() if isinstance(command, named) else "offline"
        again = f"mbrl {name} --resume {shlex.quote(str(stop.args[0])) if stop.args else '<run folder>'}"
        console.print(f"\ninterrupted; `{again}` continues it to the same numbers", **PLAIN)
        sys.exit(130)
    except (ValueError, Diverged, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
