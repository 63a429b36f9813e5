"""The command `mbrl offline`."""

import itertools
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from mbrl import device as devices
from mbrl import mpc, offline
from mbrl.choices import KNOWN, LEARNERS, PLAIN, Algorithm, Learner, console, only_its_own
from mbrl.cli_control import check_spread, functions, last_words, telling
from mbrl.core import Spec, check_reward
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.fit import FitConfig, check_fit
from mbrl.planner import OVER, Over
from mbrl.run import Run, RunError, draw_report, folder_name, from_plain, machine, to_plain, versions, write_json
from mbrl.sac import SacConfig
from mbrl.terminal import TerminalConfig, restored

SAY_EVERY = 20.0  # seconds between lines that say how far a plan is, where the terminal is none


@dataclass(frozen=True)
class Offline:
    """Learn a policy from a fixed dataset, in a learned model of it, and run it in the true simulator."""

    dataset: str | None = None
    """A file of your own or D4RL's (HDF5, or .npz with its columns), a D4RL id, minari:<id>, a NeoRL .npz, or
    embedded:pendulum / embedded:hopper."""
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
    """Evaluate in this gymnasium environment instead of the data's own, named as my_module:Mine-v0 where a module
    registers it; "none" for no evaluation. Its termination holds in the model, too, where it is known; but with
    --resume that of the run's own does."""
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
    """At the end, evaluate planning over the policy as well, from the same initial states."""
    plan_by: Literal["loop", "tdmpc"] = "loop"
    """How: LOOP, or TD-MPC2's mixture."""
    over: Over = field(default_factory=Over)
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
        same = replace(
            config, **{k: getattr(preset, k) for k in ("updates", "evaluate_every", "save_every", "log_every")}
        )
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


def _without_doubts(config: offline.Imagination, data: Any, model: Any) -> str:
    """What to do on the command line where a learner does not tell the uncertainty that imagination reads."""
    try:
        offline.check_doubts(replace(config, penalty=replace(config.penalty, coefficient=0.0)), data, [model])
    except ValueError:
        return "its rollouts are cut by it: take a learner that tells it, as dynamics:ensemble, or another algorithm"
    return "--algorithm.imagination.penalty.coefficient 0, before dynamics:"


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
        start = run.local.get("start") or args.start
        args = replace(args, start=start and Path(start), scale=given.scale or args.scale)
        own = replace(args, dataset=given.dataset, env=given.env)
        only_its_own(run, given, own, algorithm=offline.PRESETS, dynamics=LEARNERS)
        device = devices.pick(args.device)
        data = datasets.load(source, strict=args.strict, device=device)
        if data.sha256 != config["data"]["sha256"]:
            raise RunError(
                f"{source}: not the data of {run.folder} ({data.sha256[:12]}, expected {config['data']['sha256'][:12]})"
            )
        run.shared = args.models
        world = World.of(args, data, given.env)
        _check_plan(args, world, data.spec)
        run.rewind()
        return _train(args, run, data, world)
    if args.dataset is None:
        raise ValueError(
            "--dataset is missing; expected a file, a D4RL id, minari:<id>, or embedded:pendulum to try it"
        )
    data = datasets.load(args.dataset, strict=args.strict, device=device)
    algorithm = args.algorithm
    algorithm = sized(algorithm, args.updates, args.evaluate_every)
    seeds = args.seeds or (devices.fresh_seed(),)
    offline.check(algorithm, data, None, seeds)  # what is wrong is found before there is a folder
    algorithm.agent.build(data.spec, devices.generator(0))
    if args.start is not None and not isinstance(algorithm.agent, SacConfig):
        raise ValueError(f"--start {args.start}: {name_of(algorithm)} starts from no SAC policy; leave --start out")
    world = World.of(replace(args, seeds=seeds), data)
    _check_plan(replace(args, algorithm=algorithm), world, data.spec)
    if algorithm.imagination is not None:
        check_fit(args.fitting)
        model = offline.unfitted(algorithm.imagination, data, args.dynamics)
        check_reward(model, world.reward)
        try:
            offline.check_doubts(algorithm.imagination, data, [model])
        except ValueError as error:
            advice = _without_doubts(algorithm.imagination, data, model)
            raise ValueError(f"{name_of(algorithm)}: {error} ({advice})") from error
    if args.start is not None:
        _start(Path(args.start), replace(args, seeds=seeds), data)
    label = name_of(algorithm)
    out = args.out or Path("runs") / folder_name(data.name) / f"{label}-{'-'.join(map(str, seeds))}"
    local = {
        "source": str(Path(args.dataset).resolve()) if Path(args.dataset).exists() else args.dataset,
        "models": str(args.models.resolve()) if args.models else None,
        "start": str(args.start.resolve()) if args.start else None,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    args = replace(args, algorithm=algorithm, seeds=seeds, dataset=data.name, out=None, models=None)
    plain = to_plain(replace(args, start=str(args.start) if args.start else None))
    if not args.over.given:
        del plain["over"]
    config = {
        "algorithm": label,
        "data": {
            **{"name": data.name, "sha256": data.sha256, "steps": len(data), "episodes": data.episodes},
            **{"act_low": data.act_low.tolist(), "act_high": data.act_high.tolist(), "dt": data.dt},
        },
        "arguments": plain,
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
    def of(cls, args: Offline, data: Any, instead: str | None = None) -> "World":
        """instead: where a run that goes on is evaluated, if not in its own environment, whose termination and reward
        it keeps. Raises ValueError where the settings name what there is not, or an environment that does not fit the
        data."""
        from mbrl_envs import evaluate as worlds

        own = args.env or data.env
        own, env = (None if x in ("", "none") else x for x in (own, instead or own))
        reward, terminal = functions(own, data.spec.obs, args.reward) if own else (None, None)
        if args.reward == "task" and reward is None:
            raise ValueError(
                f"--reward task: no reward function is known for {own or data.name}; leave it to the learner"
            )
        evaluate = None
        if env:
            bounds = {"act_low": data.act_low.cpu().numpy(), "act_high": data.act_high.cpu().numpy()}
            seed = (10_000 + 1_000 * args.seeds[0]) % 2**31  # some environments take no more than 32 bits
            evaluate = worlds.evaluator(env, episodes=args.episodes, seed=seed, obs=data.spec.obs, **bounds)
            try:
                evaluate.open()
            except ValueError as error:
                raise ValueError(f"{error}; or pass --env none, to learn without evaluations") from error
            box: Any = evaluate.envs[0].action_space
            if data.meta.get("bounds") == "assumed" and not ((box.low == -1).all() and (box.high == 1).all()):
                warnings.warn(
                    f"{data.name}: states no action bounds, so its actions are taken as they are, and kept within "
                    f"[-1, 1]; those of {env} go from {box.low.tolist()} to {box.high.tolist()}: state action_low and "
                    "action_high, or env_id, in the file (`mbrl data info` shows what it states)",
                    stacklevel=2,
                )
        elsewhere = instead or args.env
        scale = scale_of(args.scale) if args.scale else scale_of(env or data.name, None if elsewhere else data)
        if args.scale and scale is None:
            raise ValueError(f"--scale {args.scale}: no reference scores are known; `mbrl data scores ID` asks for one")
        return cls(env, evaluate, terminal, reward, scale)


def _train(args: Offline, run: Run, data: Any, world: World) -> Run:
    if not args.quiet:
        console.print(f"[bold]{run.folder}[/bold]  {data.name}: {len(data)} steps, {data.episodes} episodes, ", end="")
        console.print(f"mean return {data.returns.mean():.1f}; {run.config['algorithm']}, seeds {args.seeds}")
    start = None
    if args.start is not None and run.load("policy.partial") is None:  # else what it has learned since goes on
        start = _start(Path(args.start), args, data)
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
            models = [fitted(run, args, s, data.spec) for s in args.seeds]
            ends = [world.terminal or offline.learn_terminal(data, TerminalConfig(), args.seeds[0], run)] * len(models)
            controls = controllers_over(result.agent, models, args.seeds, args, ends, world.reward, data.dt)
            planned = planned_over(controls, args.seeds, world.evaluate)
        finish(run, args, data, result, world, planned)
    return run


def check_by(args: Any) -> None:
    """Raises ValueError where --plan-by or --over is given for a plan that is not."""
    said = [f"--plan-by {args.plan_by}"] * (args.plan_by != "loop")
    said += [f"--over.{k.replace('_', '-')} {v}" for k, v in args.over.given.items()]
    if said and not args.plan:
        raise ValueError(f"{', '.join(said)}: says how --plan plans, which is not given; pass --plan too")


def _check_plan(args: Offline, world: "World", spec: Spec) -> None:
    """Before anything is learned. Raises ValueError for what --plan cannot plan over."""
    check_by(args)
    if not args.plan:
        return
    if args.algorithm.imagination is None or not isinstance(args.algorithm.agent, SacConfig):
        raise ValueError(f"--plan: {name_of(args.algorithm)} has no model or no critic to plan with; leave --plan out")
    if world.evaluate is None:
        raise ValueError("--plan: there is no environment to plan in; leave --plan or --env none out")
    agent, model = (x.build(spec, devices.generator(0)) for x in (args.algorithm.agent, args.dynamics))
    controllers_over(agent, [model], [0], args, reward=world.reward)


def learned_end(run: Run, args: Offline, spec: Spec) -> Any:
    """The termination head that a run has learned, or None."""
    facts, config = run.config["data"], TerminalConfig()
    kept = run.load(offline.fitted_name("terminal", facts["sha256"], facts["steps"], config, args.seeds[0]))
    return None if kept is None else restored(kept[0], spec, config).to(devices.pick(args.device))


def fitted(run: Run, args: Offline, seed: int, spec: Spec) -> Any:
    """The model that a run was learned in, without the filter around it, whose cost at every step of every candidate
    a plan cannot bear. Raises RunError where it is gone."""
    facts = run.config["data"]
    name = offline.fitted_name("model", facts["sha256"], facts["steps"], args.dynamics, args.fitting, seed)
    kept = run.load(name)
    if kept is None:
        raise RunError(f"{run.folder}: its fitted model ({name}) is not there any more; it cannot be planned with")
    model = args.dynamics.build(spec, devices.generator(0))
    model.load_state_dict(kept[0])
    return model.eval().to(devices.pick(args.device))


def controllers_over(
    agent: Any, models: Any, seeds: Any, args: Any, ends: Any = None, reward: Any = None, dt: float = 1.0
) -> list[mpc.Mpc]:
    """Planning over the policy of each of an agent's seeds, in its model and under its termination, as args.plan_by and
    args.over have it. Raises ValueError for settings that cannot be."""
    critics: Literal["mean", "least"] = "mean" if args.plan_by == "tdmpc" else "least"
    found = []
    for i, (seed, model, terminal) in enumerate(zip(seeds, models, ends or [None] * len(models), strict=True)):
        planner, worth = args.over.applied(OVER[args.plan_by], mpc.worth_over(agent.config.gamma))
        if args.over.pessimism:
            check_spread(worth, model, "--over")
        stream = devices.generator(seed, next(model.parameters()).device)
        one = mpc.over(
            agent, i, telling(worth, model), generator=stream, planner=planner, worth=worth, critics=critics,
            terminal=terminal, reward=reward, dt=dt,
        )  # fmt: skip
        found.append(one)
    return found


def planned_over(controls: list[mpc.Mpc], seeds: Any, evaluate: Any) -> list[list[float]]:
    """Returns [seeds][episodes] under these."""
    found = []
    for seed, control in zip(seeds, controls, strict=True):
        with console.status("planning") as status:
            act = watched(control, f"seed {seed}: planning over its policy", status)
            found.append([float(x) for x in evaluate(act, rows=lambda kept, begun, c=control: c.rows(kept, begun))])
    return found


def watched(control: Any, what: str, status: Any) -> Any:
    """The controller, with a line on the terminal that says how far it is."""
    steps, said = itertools.count(1), time.monotonic()

    def act(obs: torch.Tensor) -> torch.Tensor:
        nonlocal said
        words = f"{what}, step {next(steps)}, {len(obs)} episodes under way"
        status.update(words)
        if not console.is_terminal and time.monotonic() - said > SAY_EVERY:  # no line that is written over
            console.print(words, **PLAIN)
            said = time.monotonic()
        return control(obs).to(obs.device)

    return act


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
        mean, std = (kept[0][k] for k in ("obs_mean", "obs_std"))
        if not settings.normalize and not (bool((mean == 0).all()) and bool((std == 1).all())):
            raise RunError(
                f"--start {path}: its policy reads standardised observations, this one would read them raw; pass "
                "--algorithm.agent.normalize, or start from a policy that reads them raw"
            )
        return kept[0]
    from mbrl_envs import adapters

    agent = args.algorithm.agent
    normalizer = offline.normalizer_of(data.obs) if getattr(agent, "normalize", False) else None
    return adapters.from_sb3(path, data.spec, agent, seeds=len(args.seeds), normalizer=normalizer).state_dict()


def early(config: offline.OfflineConfig, spec: Spec, result: offline.Result) -> str:
    """How many of these a policy that is still held near the data has earned."""
    agent = config.agent
    if not isinstance(agent, SacConfig):
        return ""
    held = replace(agent, total=config.updates).build(spec, devices.generator(0)).held
    few = sum(updates <= held for updates, _ in result.returns[-10:])
    return f", {few} of them before cloning is let go at update {held}" if few else ""


def scale_of(id: str, data: Any = None) -> tuple[float, float] | None:
    """Reference scores, or None where none are known."""
    from mbrl_envs import datasets

    if data is not None and {"min_score", "max_score"} <= set(data.meta) and data.meta["max_score"] is not None:
        return data.meta["min_score"], data.meta["max_score"]
    try:
        return datasets.reference_scores(id)
    except ValueError:
        return None


def finish(run: Run, args: Offline, data: Any, result: offline.Result, world: World, planned: Any = None) -> None:
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
        "wall_s": round(run.seconds, 1),
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
    if result.returns:
        console.print(f"{last_words(len(result.returns))}{early(args.algorithm, data.spec, result)}; ", end="")
        console.print("never the best one. ", end="")
    words = "no reference scores are known for this environment"
    if scale:
        words = f"score: 0 is a return of {scale[0]:.1f}, 100 one of {scale[1]:.1f}"
    console.print(words, highlight=False)
    console.print(f"seconds: {', '.join(f'{k} {v:.0f}' for k, v in result.seconds.items())}")
    console.print(f"figure: {run.folder / 'report.png'}    curves: tensorboard --logdir {run.folder}")
