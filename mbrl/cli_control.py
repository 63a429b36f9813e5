"""What the commands have in common that drive an environment, and one of them: `mbrl online` (MBPO)."""

import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from mbrl import device as devices
from mbrl import online
from mbrl.border import World, spec_of
from mbrl.choices import KNOWN, LEARNERS, Learner, console, only_its_own
from mbrl.core import check_reward
from mbrl.dynamics.ensemble import Ensemble, EnsembleConfig
from mbrl.fit import FitConfig, check_fit
from mbrl.planner import PRESETS, Worth
from mbrl.run import Run, RunError, folder_name, from_plain, machine, save_figure, to_plain, versions, write_json

KINDS = (*KNOWN, online.OnlineConfig, online.Horizon)


@dataclass(frozen=True)
class Driving:
    """What the two commands have in common."""

    env: str | None = None
    """A gymnasium id, with the module that registers it before a colon, and arguments after it, where there are such:
    my_module:Mine-v0, 'Pendulum-v1{"g": 1.6}', 'Mine-v0{"max_episode_steps": 500}'."""
    resume: Path | None = None
    """Continue this run folder from what it last saved, to the same numbers and by its own settings: what is given
    beside and differs from them is refused, but for --threads and --quiet."""
    out: Path | None = None
    """The run folder; runs/<env>/<command>-<seeds> by default."""
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 is torch's own choice."""
    quiet: bool = False


@dataclass(frozen=True)
class Online(Driving):
    """Learn a policy in an environment through a model of it (MBPO)."""

    seeds: tuple[int, ...] = ()
    """Several learn side by side, each in an environment of its own. One is drawn, and recorded, where none is
    given."""
    steps: int | None = None
    """Of the environment, instead of the setting's own number."""
    episodes: int = 10
    """Episodes an evaluation."""
    reward: Literal["learned", "task"] = "learned"
    setting: online.OnlineConfig = field(default_factory=online.OnlineConfig)
    fitting: FitConfig = field(default_factory=FitConfig)
    dynamics: Learner = field(default_factory=EnsembleConfig)  # pyright: ignore[reportInvalidTypeForm]
    """The model of the world; its settings follow its name."""


# ---------------------------------------------------------------- what is known of an environment


def opened(env_id: str | None, **kw: Any) -> Any:
    """The environment, its observations flat. Raises ValueError for a name that is none."""
    from mbrl_envs import evaluate as worlds

    if env_id is None:
        raise ValueError("--env is missing; expected a gymnasium id, e.g. Pendulum-v1")
    return worlds.flat(worlds.make(env_id, **kw))


def warn_endless(env_id: str, env: Any, most: str) -> None:
    """Says of an environment that states no limit what an episode may take."""
    if env.spec is None or env.spec.max_episode_steps is None:
        console.print(
            f"[yellow]warning:[/yellow] {env_id} states no limit of its episodes: one that takes {most} is an error; "
            "an id may bring one, as in 'Id-v0{\"max_episode_steps\": 1000}'",
            highlight=False,
        )


def functions(env_id: str, obs: int, reward: str) -> tuple[Any, Any]:
    """(reward, terminal) of the task, each None where it is not known; the reward also where it is to be learned."""
    from mbrl_envs import tasks

    try:
        task = tasks.task(env_id, obs)
    except ValueError:  # a variant with other observations: what it lacks is learned
        task = None
    return (task.reward if task and reward == "task" else None), (task.terminal if task else None)


def same_bounds(whose: str, own: tuple[Any, Any], env: str, its: tuple[Any, Any]) -> None:
    """Raises RunError where a model's actions of [-1, 1], which stand for own (low [A], high [A]), stand for others in
    the environment."""
    if not all(np.allclose(a, b) for a, b in zip(own, its, strict=True)):
        (least, most), (low, high) = ([list(map(float, x)) for x in bounds] for bounds in (own, its))
        raise RunError(
            f"{whose}: its actions span {least} to {most}, those of {env} {low} to {high}; expected the same"
        )


def check_drawn(path: Path, env_id: str, obs: int | None = None) -> None:
    """Raises EnvError where no film of this environment can be written there: before what is filmed is at work."""
    from mbrl_envs import evaluate as worlds

    worlds.check_film(path)
    with tempfile.TemporaryDirectory() as folder:
        worlds.video(lambda rows: rows, env_id, Path(folder) / "frame.gif", max_steps=0, obs=obs)


def telling(worth: Worth, learner: Any) -> Any:
    """A learner, or its config: an ensemble also reports what the worth's limit reads, since its weights do not depend
    on that."""
    name = worth.uncertainty
    if worth.limit == math.inf or not isinstance(learner, Ensemble | EnsembleConfig) or name in learner.uncertainty:
        return learner
    names = (*learner.uncertainty, name)
    return learner.reporting(*names) if isinstance(learner, Ensemble) else replace(learner, uncertainty=names)


def check_spread(worth: Worth, model: Any, option: str = "--worth") -> None:
    """Raises ValueError for a pessimism over particles that are all alike."""
    one, certain = worth.particles == 1, model.parts == 1 and model.noise_dim == 0
    if worth.pessimism and (one or certain):
        why = "there is one" if one else f"all are alike under a {type(model).__name__} without noise or parts"
        raise ValueError(
            f"{option}.pessimism {worth.pessimism}: is in standard deviations over the particles, and {why}; leave it "
            "out, or take several of a learner with noise or parts"
        )


def last_words(evaluations: int) -> str:
    """What is called last-10, of so many evaluations."""
    few = min(evaluations, 10)
    return "last-10: the only evaluation" if few == 1 else f"last-10: mean over the last {few} evaluations"


# ---------------------------------------------------------------- mbrl online


def run_online(args: Online) -> Run:
    """The command `mbrl online`; returns the finished run."""
    from mbrl_envs import evaluate as worlds

    if args.steps is not None and args.resume is None:
        if args.setting.steps not in (args.steps, online.OnlineConfig().steps):
            raise ValueError(f"--steps {args.steps}: got beside --setting.steps {args.setting.steps}; expected one")
        args = replace(args, setting=replace(args.setting, steps=args.steps))
    run, args = begin(args, Online, "online", _check_online)
    assert args.env is not None
    with ExitStack() as stack:
        envs = [stack.enter_context(closing(opened(args.env))) for _ in args.seeds]
        world = World(envs[0])
        reward, terminal = functions(args.env, world.spec.obs, args.reward)
        judge = functools.partial(
            worlds.evaluator, args.env, episodes=args.episodes, act_low=world.low, act_high=world.high,
            obs=world.spec.obs,
        )  # fmt: skip
        with run:
            results = online.train_together(
                args.setting, envs, seeds=args.seeds, dynamics=args.dynamics, fitting=args.fitting, terminal=terminal,
                reward=reward, evaluate=[judge(seed=(10_000 + 1_000 * seed) % 2**31) for seed in args.seeds],
                device=devices.pick(args.device), record=run,
            )  # fmt: skip
            seconds = results[0].seconds
            curves = {
                seed: [(n, torch.tensor(r).mean().item()) for n, r in result.returns]
                for seed, result in zip(args.seeds, results, strict=True)
            }
            out = {
                "env": args.env, "seeds": list(args.seeds), "model": type(args.dynamics).__name__,
                "returns": [(n, [x.returns[i][1][0] for x in results]) for i, (n, _) in enumerate(results[0].returns)],
                "episodes": [result.episodes for result in results],
                "probes": [result.probes for result in results],
                "seconds": {k: round(v, 2) for k, v in seconds.items()}, "wall_s": round(run.seconds, 1), **machine(),
                "versions": versions(),
            }  # fmt: skip
            out |= {"final": [curve[-1][1] for curve in curves.values()]}
            out |= {"last10": [result.last(10).item() for result in results]}
            beside = {
                seed: {
                    "training": result.episodes,
                    "slope of Q, mean": [(n, found["l2_mean"]) for n, found in result.probes],
                    "error of the model, in units of value": [(n, found["value_error"]) for n, found in result.probes],
                }
                for seed, result in zip(args.seeds, results, strict=True)
            }
            draw(run.folder / "report.png", f"{args.env}, {_seeds(args.seeds)}", curves, 0, beside)
            write_json(run.folder / "result.json", out)
            run.forget("online.partial")
        if not args.quiet:
            words = Table("seed", "last-10 mean", "final", title=f"{args.env}, {type(args.dynamics).__name__}")
            for seed, last, final in zip(args.seeds, out["last10"], out["final"], strict=True):
                words.add_row(str(seed), f"{last:.1f}", f"{final:.1f}")
            console.print(words)
            console.print(f"{last_words(len(out['returns']))}; never the best one.", highlight=False)
            console.print(f"seconds: {', '.join(f'{k} {v:.0f}' for k, v in seconds.items())}")
            console.print(f"figure: {run.folder / 'report.png'}    curves: tensorboard --logdir {run.folder}")
    return run


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _check_online(args: Online, env: Any) -> None:
    """Before there is a folder. Raises ValueError for what cannot be learned."""
    from mbrl_envs import evaluate as worlds

    assert args.env is not None
    online.check(args.setting)
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds: got {' '.join(map(str, args.seeds))}; expected none twice")
    if args.episodes < 1:
        raise ValueError(f"--episodes: got {args.episodes}, expected at least 1")
    warn_endless(args.env, env, f"{worlds.ENDLESS} steps in an evaluation")
    reward = functions(args.env, spec_of(env).obs, args.reward)[0]
    if args.reward == "task" and reward is None:
        raise ValueError(f"--reward task: no reward function is known for {args.env}; leave it to the learner")
    check_fit(args.fitting)
    args.setting.agent.build(spec_of(env), devices.generator(0))
    check_reward(args.dynamics.build(spec_of(env), devices.generator(0)), reward)


# ---------------------------------------------------------------- run folders


def begin(args: Any, kind: type, name: str, check: Callable[[Any, Any], None]) -> tuple[Run, Any]:
    """The run folder, new or resumed, and the settings that hold there."""
    devices.use_threads(args.threads)
    if args.resume is not None:
        run = Run.resumed(args.resume, name, args.threads, quiet=args.quiet)
        old = from_plain(run.config["arguments"], (*KINDS, kind))
        if getattr(old, "video", None):
            old = replace(old, video=Path(old.video))
        presets = {"planner": PRESETS, "dynamics": LEARNERS}
        only_its_own(run, args, old, **{k: v for k, v in presets.items() if hasattr(args, k)})
        run.rewind()
        own = {"device": run.local["device"], "threads": args.threads or old.threads}
        return run, replace(old, quiet=args.quiet, out=run.folder, **own)
    if isinstance(args, Online):
        args = replace(args, seeds=args.seeds or (devices.fresh_seed(),))
    elif args.seed is None:
        args = replace(args, seed=devices.fresh_seed())
    device = devices.pick(args.device)
    env = opened(args.env)  # what is wrong is found before there is a folder
    try:
        spec_of(env)
        check(args, env)
    finally:
        env.close()
    label = "-".join(map(str, args.seeds)) if isinstance(args, Online) else args.seed
    out = args.out or Path("runs") / folder_name(str(args.env)) / f"{name}-{label}"
    kept = replace(args, out=None, quiet=False)
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in to_plain(kept).items()}
    config = {"algorithm": name, "arguments": plain}
    local = {"device": str(device), "threads": torch.get_num_threads()}
    if (model := getattr(args, "model", None)) not in (None, "true"):
        local["model"] = str(Path(model).resolve())
    return Run.create(out, config, local, quiet=args.quiet), replace(args, out=out)


Curve = Sequence[tuple[int, float]]  # (environment steps, value)


def draw(
    path: Path,
    title: str,
    curves: Mapping[int, Curve],
    random: int,
    beside: Mapping[int, Mapping[str, Curve]] | None = None,
) -> None:
    """Return against environment steps for each seed; the first `random` points are of random actions. beside: of each
    seed, "training", the returns of its episodes, drawn thin behind these, and what is drawn on axes of its own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    more = {seed: {k: x for k, x in own.items() if x} for seed, own in (beside or {}).items()}
    names = list(dict.fromkeys(k for own in more.values() for k in own if k != "training"))
    figure, axes = plt.subplots(
        1 + len(names), figsize=(7, 4.5 + 2.2 * len(names)), layout="constrained", sharex=True, squeeze=False,
        height_ratios=[2.0, *[1.0] * len(names)],
    )  # fmt: skip
    ax, *others = axes[:, 0]
    for i, (seed, curve) in enumerate(curves.items()):
        own, color = more.get(seed, {}), f"C{i}"
        steps, values = zip(*curve, strict=True)
        if "training" in own:
            ax.plot(*zip(*own["training"], strict=True), color=color, lw=0.6, alpha=0.5)
        ax.plot(steps, values, marker="o", ms=4, color=color, label=f"seed {seed}")
        ax.plot(steps[:random], values[:random], "o", color="gray", label="random actions" if random else None)
        for name, panel in zip(names, others, strict=True):
            if name in own:
                panel.plot(*zip(*own[name], strict=True), color=color, marker=".")
            panel.set(ylabel=name.replace(", ", ",\n"))
    if random or len(curves) > 1:
        ax.legend()
    ax.set(title=title, ylabel="undiscounted return" + (", thin in training" if more else ""))
    axes[-1, 0].set(xlabel="environment steps")
    save_figure(figure, path)
