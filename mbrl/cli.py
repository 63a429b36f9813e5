"""The command line: `mbrl --help`. What the commands of a family share is in the `cli_` module of its name."""

import operator
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.markup import escape

import mbrl
from mbrl import device as devices
from mbrl import offline
from mbrl.choices import LEARNERS, PLAIN, console
from mbrl.cli_continual import Continual, run_continual
from mbrl.cli_control import Online, run_online
from mbrl.cli_evaluate import Evaluate, run_evaluate
from mbrl.cli_meta import Meta, run_meta
from mbrl.cli_offline import Offline, run_offline
from mbrl.cli_plan import Plan, run_plan
from mbrl.cli_reconstruct import Reconstruct, run_reconstruct
from mbrl.cli_suite import Suite, run_suite
from mbrl.core import Diverged
from mbrl.dynamics.filtered import FilterConfig, RewardConfig
from mbrl.fit import FitConfig
from mbrl.planner import PRESETS
from mbrl.run import Run
from mbrl.sac import SacConfig

CROWDED = 1.5  # times as long as on one thread, from which a machine is too busy for several

# ---------------------------------------------------------------- the small commands


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
class Demo:
    """The main job on the embedded Pendulum data: model, dynamics reward, policy, true simulator, in minutes."""

    out: Path | None = None
    seed: int = 0


def run_info(args: Info) -> None:
    from mbrl_envs import datasets, overview

    if args.figure is not None:
        _check_figure(args.figure)
    data = datasets.load(args.source, strict=args.strict)
    console.print(overview.info(data))
    path = args.figure or Path(f"{data.name.replace('/', '_').replace(':', '_')}.png")
    overview.draw(data, path)
    console.print(f"figure: {path}", **PLAIN)


def _check_figure(path: Path) -> None:
    """Raises ValueError where no figure of that kind can be written there: before what it shows is read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    endings = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in endings:
        raise ValueError(
            f"--figure {path}: no figure ends in {path.suffix}, expected one of .{', .'.join(sorted(endings))}; "
            "rename it"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--figure {path}: there is no folder {path.parent}; make it, or write elsewhere")


def run_scores(args: Scores) -> None:
    from mbrl_envs import datasets

    low, high = datasets.reference_scores(args.id)
    console.print(f"{args.id}: min {low:g}, max {high:g}; score = 100 (return - min) / (max - min)")


def run_list(args: List) -> None:
    from mbrl_envs import datasets, scores

    every = {"algorithms": offline.PRESETS, "learners": LEARNERS, "planners": PRESETS, "embedded": datasets.embedded()}
    for title, names in every.items():
        console.print(f"[bold]{title}[/bold]: {', '.join(names)}")
    ids = sorted(scores.names())
    console.print(f"[bold]ids with reference scores[/bold]: {len(ids)}" + ("" if args.ids else " (--ids lists them)"))
    if args.ids:
        console.print("\n".join(ids))


def run_collect(args: Any) -> None:
    from mbrl_envs import collect

    with Run(Path(".")) as bar:  # only its progress display
        path = collect.collect(args, progress=lambda step, total, values: bar.progress("collect", step, total, values))
    console.print(f"wrote {path}; look at it with `mbrl data info {path}`", **PLAIN)


def run_demo(args: Demo) -> Run:
    """The command `mbrl demo`."""
    folder = args.out or Path("runs/demo")
    number = 2
    begun = args.out is None and (folder / "config.json").exists() and not (folder / "result.json").exists()
    if begun and Run.open(folder).config["arguments"]["seeds"] == [args.seed]:
        console.print(f"{folder} was interrupted: going on with it", **PLAIN)
        return _demonstrated(run_offline(Offline(resume=folder)))
    while args.out is None and (folder / "config.json").exists():
        folder, number = Path(f"runs/demo-{number}"), number + 1
    threads = 0
    if devices.slowdown() > CROWDED:
        threads = 1
        console.print("other processes keep this machine's cores busy: one thread is the faster", **PLAIN)
    return _demonstrated(run_offline(demo_settings(folder, args.seed, threads)))


def _demonstrated(run: Run) -> Run:
    folder = shlex.quote(str(run.folder))
    console.print(
        f"next: look at {folder}/report.png; `mbrl eval {folder} --episodes 50` asks more initial states;", **PLAIN
    )
    console.print(
        f"`mbrl eval {folder} --plan` plans over the policy; `mbrl offline --dataset FILE` takes your data", **PLAIN
    )
    return run


def demo_settings(folder: Path, seed: int, threads: int = 0) -> Offline:
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
    source, own = "embedded:pendulum", {"algorithm": algorithm, "fitting": fitting, "threads": threads}
    return Offline(dataset=source, out=folder, seeds=(seed,), **own)


# ---------------------------------------------------------------- all of them


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
    """The console script `mbrl`. Exit status: 0 done, 2 for input, or a place for output, that cannot be used, 130 when
    interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not {"", here := os.getcwd()} & set(sys.path):
        sys.path.append(here)  # where a module with an environment of one's own lies
    devices.keep_memory()
    if argv[:1] == ["--version"]:
        print(f"mbrl-suite {mbrl.__version__}")
        return
    from mbrl_envs import evaluate

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
        seeds = (*getattr(command, "seeds", ()), getattr(command, "seed", None) or 0)
        worst = min(seeds) if min(seeds) < 0 else max(seeds)
        own = isinstance(command, (Reconstruct, Continual, Meta))  # which say so themselves
        if not own and not 0 <= worst <= 2**62:
            raise ValueError(f"--seed{'s' * hasattr(command, 'seeds')} is {worst}, expected 0 or more, 2^62 at most")
        if getattr(command, "threads", None) == 0 and sys.stderr.isatty() and (times := devices.slowdown()) > CROWDED:
            _say(
                "[yellow]warning:[/yellow] other processes keep this machine's cores busy: small products take "
                f"{times:.0f} times as long on its threads as on one; --threads 1 is the faster"
            )
        does.get(type(command), run_collect)(command)
    except KeyboardInterrupt as stop:
        words = "interrupted"
        if isinstance(command, Suite):
            words += "; the same command continues it to the same numbers"
        elif isinstance(command, (Offline, Demo, Plan, Online, Reconstruct, Continual, Meta)):
            name = "offline" if isinstance(command, Demo) else type(command).__name__.lower()
            again = f"mbrl {name} --resume {shlex.quote(str(stop.args[0])) if stop.args else '<run folder>'}"
            words += f"; `{again}` continues it to the same numbers"
        console.print(f"\n{words}", **PLAIN)
        sys.exit(130)
    except (ValueError, Diverged, OSError, ImportError, evaluate.gym.error.Error) as error:
        _say(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(2)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error):
            raise
        _say(
            f"[red]error:[/red] there is not enough memory: {escape(str(error).strip().partition(chr(10))[0])}; ask "
            "for less at a time (steps, rollouts, samples, particles, batch)"
        )
        sys.exit(2)


def _say(words: str) -> None:
    """To standard error, in one line."""
    Console(stderr=True, emoji=False).print(words, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
