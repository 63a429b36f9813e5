"""Online with one model or seven: the return against an ensemble's, with and without a regulariser of the critic, and
where the time goes (Zheng et al., ICLR 2023, arXiv 2302.01244, in MBPO).

    python experiments/online.py [--envs InvertedPendulum-v5 Hopper-v5] [--variants ...] [--seeds 0 1] [--together]

All variants standardise observations and targets, and differ in nothing but the model and the critic. A finished run is
a row of experiments/results/online.json, and one that is there already with today's settings is not run again; one that
was interrupted goes on from its folder under --out. Several processes with other --variants or --seeds may share both.
"""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import torch
import tyro
from mbrl_envs import evaluate as worlds
from mbrl_envs import tasks
from rich.console import Console
from rich.table import Table

from mbrl import device as devices
from mbrl import offline, online
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.single import SingleConfig
from mbrl.fit import FitConfig
from mbrl.online import Horizon, OnlineConfig
from mbrl.run import Run, git_hash, machine, to_plain, versions, write_json
from mbrl.sac import SacConfig

AGENT = SacConfig(actor_lr=3e-4, alpha_lr=3e-4, normalize=True)
# The published entropy targets and schedules of the horizon; steps, random steps and updates are of a smaller budget.
ENVS: dict[str, OnlineConfig] = {
    "InvertedPendulum-v5": OnlineConfig(
        replace(AGENT, target_entropy=-0.05), steps=5_000, random=500, evaluate_every=250, log_every=250
    ),
    "Hopper-v5": OnlineConfig(
        replace(AGENT, target_entropy=-1.0), steps=30_000, random=1_000, horizon=Horizon(1, 15, 20_000, 150_000)
    ),
}
ROBUST = {"robust": 0.1, "robust_eps": 0.1}  # neither is published
SPECTRAL = {"spectral": 4.0}
VARIANTS: dict[str, tuple[Any, dict[str, float]]] = {
    "single": (SingleConfig(), {}),
    "single-spectral": (SingleConfig(), SPECTRAL),
    "single-robust": (SingleConfig(), ROBUST),
    "single-gaussian": (SingleConfig(gaussian=True), {}),
    "ensemble": (EnsembleConfig(scale_targets=True, uncertainty=()), {}),
}
EXPECTED = 0.76  # of the ensemble's time, in which the robust single model is to reach its return


@dataclass(frozen=True)
class Args:
    envs: tuple[str, ...] = tuple(ENVS)
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1)
    out: Path = Path("runs/online")
    results: Path = Path(__file__).parent / "results" / "online.json"
    device: str = "auto"
    episodes: int = 5
    """Of each evaluation."""
    steps: int | None = None
    """Of the environment, instead of each one's own number."""
    robust: float = ROBUST["robust"]
    robust_eps: float = ROBUST["robust_eps"]
    spectral: float = SPECTRAL["spectral"]
    together: bool = False
    """All seeds at once, on an accelerator: their times are those of all of them, and their numbers others."""
    report: bool = False
    """Show what is there and run nothing."""


def settings(args: Args, env: str, variant: str) -> tuple[OnlineConfig, Any, FitConfig]:
    config, (dynamics, changes) = ENVS[env], VARIANTS[variant]
    changed = {k: getattr(args, k) for k in changes}
    config = replace(config, agent=replace(config.agent, **changed), steps=args.steps or config.steps)
    return config, dynamics, FitConfig()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["runs"] if path.exists() else []


def group(args: Args, env: str, variant: str, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for each of the seeds, which learn at once: started anew, or gone on with."""
    config, dynamics, fitting = settings(args, env, variant)
    digest = name_of(args, env, variant, seeds)
    folder = args.out / env / variant / f"{'-'.join(map(str, seeds))}-{digest}"
    facts = {"online": to_plain(config), "dynamics": to_plain(dynamics), "fitting": to_plain(fitting)}
    run = Run.continued(folder, {"env": env, "seeds": list(seeds), **facts}, {})
    task = tasks.task(env)
    assert task is not None
    device = devices.pick(args.device)
    started, processor = time.perf_counter(), time.process_time()
    with run, ExitStack() as stack:
        results = online.train_together(
            config,
            [stack.enter_context(gym.make(env)) for _ in seeds],
            seeds=seeds,
            dynamics=dynamics,
            fitting=fitting,
            terminal=task.terminal,
            evaluate=[worlds.evaluator(env, episodes=args.episodes, seed=10_000 + seed) for seed in seeds],
            device=device,
            record=run,
        )
    wall, cpu = time.perf_counter() - started, time.process_time() - processor
    seconds = {k: round(v, 2) for k, v in results[0].seconds.items()}
    return [
        {
            "env": env,
            "variant": variant,
            "seed": seed,
            "together": len(seeds),  # seeds that the times are of
            "settings": digest,
            "config": facts,
            "returns": [(n, torch.tensor(x).mean().item()) for n, x in result.returns],
            "last5": result.last(5).item(),
            "probes": result.probes,
            "seconds": seconds,
            "seconds_total": round(sum(seconds.values()), 2),  # of all sittings
            "wall_s": round(wall, 2),  # of this one
            "cpu_s": round(cpu, 2),  # of this one: more than its wall time says, on a busy machine
            "device": devices.describe(device),
            "git": git_hash(),
            "versions": versions(),
            **machine(),
        }
        for seed, result in zip(seeds, results, strict=True)
    ]


def name_of(args: Args, env: str, variant: str, seeds: tuple[int, ...]) -> str:
    """Twelve digits for what the numbers of a row depend on, but the code and the seed itself."""
    return offline.digest(*settings(args, env, variant), args.episodes, *([list(seeds)] if len(seeds) > 1 else []))


def main(args: Args) -> None:
    for env in args.envs:
        for seeds in [args.seeds] if args.together else [(seed,) for seed in args.seeds]:
            for variant in args.variants:
                digest = name_of(args, env, variant, seeds)
                found = rows(args.results)
                mine = lambda r, env=env, variant=variant, seeds=seeds: (
                    (r["env"], r["variant"]) == (env, variant) and r["seed"] in seeds
                )
                done = {r["seed"] for r in found if mine(r) and r["settings"] == digest}
                if args.report or done == set(seeds):
                    continue
                new = group(args, env, variant, seeds)
                with locked(args.results):
                    kept = [r for r in rows(args.results) if not mine(r)]
                    order = lambda r: (list(ENVS).index(r["env"]), list(VARIANTS).index(r["variant"]), r["seed"])
                    write_json(args.results, {"runs": sorted([*kept, *new], key=order)})
    show(rows(args.results))


def show(found: list[dict[str, Any]]) -> None:
    """What came of it, beside the ensemble: means over seeds; of the probes, the median over all refits."""
    parts = ("fit", "rollout", "update", "environment")
    mean = lambda values: sum(values) / max(len(values), 1)
    console = Console(width=max(Console().width, 120))  # all columns, in a file too
    for env in ENVS:
        names = [v for v in VARIANTS if any((r["env"], r["variant"]) == (env, v) for r in found)]
        if not names:
            continue
        of = {v: [r for r in found if (r["env"], r["variant"]) == (env, v)] for v in names}
        seconds = {v: mean([r["seconds_total"] - r["seconds"].get("evaluate", 0.0) for r in of[v]]) for v in names}
        table = Table("variant", "seeds", "last 5", "s", *parts, "share", "Lipschitz", "value error", title=env)
        for v in names:
            middle = lambda name, runs=of[v]: mean(
                [median(p[name] for _, p in r["probes"]) for r in runs if r["probes"]]
            )
            table.add_row(
                v,
                str(len(of[v])),
                f"{mean([r['last5'] for r in of[v]]):.0f}",
                f"{seconds[v]:.0f}",
                *(f"{mean([r['seconds'].get(p, 0.0) for r in of[v]]):.0f}" for p in parts),
                f"{seconds[v] / seconds['ensemble']:.2f}" if "ensemble" in seconds else "-",
                f"{middle('l2_mean'):.3g}",
                f"{middle('value_error'):.3g}",
            )
        console.print(table)
    console.print(f"expected: single-robust at least the ensemble's return, in at most {EXPECTED} of its time (share)")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
