"""Planning on pendulums of unknown mass: a model of many masses whose context follows what an episode shows, beside the
same model told the context that fits the mass, one that keeps the mean context, and the true simulator.

    python experiments/mixer_control.py [--seeds 0 1 2]

Pendulum-v1 with masses 0.3 to 2 kg (the torque's effect is 3 u / (m l^2)): 20 episodes of 200 steps under random
torques, held for 5 steps, of each of nine masses; four other masses to control, three episodes each by iCEM. "told":
the context that descent finds from all of 20 episodes of random torques of that mass. Returns are undiscounted; medians
over seeds.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from mbrl_envs.control import TruePendulum
from mbrl_envs.tasks import task
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl import device as devices
from mbrl.adapt import adapt, known, windows
from mbrl.border import World
from mbrl.data import Dataset, joined
from mbrl.dynamics.mixer import Coda, MixerConfig, MixerFit, fit_mixer
from mbrl.mpc import Adapting, Episode, Follow, Mpc, episode, gathered
from mbrl.planner import ICEM, Worth
from mbrl.run import machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "mixer_control.json"
MASSES = tuple(float(x) for x in np.geomspace(0.3, 2.0, 9).round(3))
NEW = (0.35, 0.6, 1.1, 1.8)


@dataclass(frozen=True)
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)
    outer: int = 150
    episodes: int = 3
    threads: int = 1


def pendulum(mass: float) -> gym.Env:
    env = gym.make("Pendulum-v1")
    env.unwrapped.m = mass  # type: ignore[attr-defined]
    return env


def chance(mass: float, seed: int, episodes: int = 20) -> Dataset:
    """Random torques, each held for 5 steps."""
    env, out = pendulum(mass), []
    for i in range(episodes):
        draw = np.random.default_rng([seed, round(1000 * mass), i])
        acts = draw.uniform(-1, 1, 40).repeat(5).astype(np.float32)
        left = iter(torch.from_numpy(acts)[:, None, None])
        out.append(episode(env, lambda obs, left=left: next(left), 1000 * seed + i))
    return gathered(out, World(env))


def played(mass: float, act: Any, seed: int, episodes: int) -> list[float]:
    returns = []
    for i in range(episodes):
        act.begin(1)
        found: Episode = episode(pendulum(mass), act, 10_000 + 100 * seed + i)
        returns.append(found.total)
    return returns


def run(seed: int, args: Args) -> dict[str, Any]:
    began = time.perf_counter()
    data = joined([chance(m, seed) for m in MASSES], mixed=True)
    model = MixerConfig(Coda((64, 64)), 2, 4).build(data.spec, devices.generator(seed))
    fit = MixerFit(args.outer, length=5, batch=16, lr=3e-3, lr_context=1e-2, warm=20, restarts=5, guard=1.1)
    report = fit_mixer(model, data, fit, devices.generator(seed + 1))
    model.requires_grad_(False)
    print(f"seed {seed}: fitted, loss {report.loss[-1]:.2e}, {time.perf_counter() - began:.0f} s", flush=True)
    known_task, planner = task("Pendulum-v1"), replace(ICEM, horizon=20)
    assert known_task is not None
    reward = known_task.reward
    mpc = lambda m, ctx=None: Mpc(planner, Worth(), m, generator=devices.generator(seed + 2), reward=reward, ctx=ctx)
    mean: Tensor = known(model).mean(0, keepdim=True)
    rows, follow = [], Follow(window=100, every=5, updates=20, lr=0.01, prior=1e-4)
    scale = (data.next_obs - data.obs).square().mean(0)
    for mass in NEW:
        told = adapt(model, windows(chance(mass, seed + 500), 0, mean, 5), updates=300, keep=2).ctx
        rows.append({
            "mass": mass,
            "adapting": played(mass, Adapting(mpc(model), follow, scale=scale), seed, args.episodes),
            "told": played(mass, mpc(model, told), seed, args.episodes),
            "mean": played(mass, mpc(model, mean), seed, args.episodes),
            "true": played(mass, mpc(TruePendulum(mass=mass)), seed, args.episodes),
        })  # fmt: skip
        print({k: round(float(np.mean(v)), 1) for k, v in rows[-1].items()}, flush=True)
    return {"seed": seed, "loss": report.loss[-1], "rows": rows, "wall_s": round(time.perf_counter() - began, 1)}


def main(args: Args) -> None:
    devices.keep_memory()
    torch.set_num_threads(args.threads)
    runs = [run(seed, args) for seed in args.seeds]
    kinds = ("adapting", "told", "mean", "true")
    of = lambda i, kind: median(float(np.mean(r["rows"][i][kind])) for r in runs)
    table = {str(m): {k: round(of(i, k), 1) for k in kinds} for i, m in enumerate(NEW)}
    whole = {k: round(median(float(np.mean([x for row in r["rows"] for x in row[k]])) for r in runs), 1) for k in kinds}
    facts = {"arguments": args.__dict__, "masses": MASSES, **machine(), "versions": versions()}
    write_json(RESULTS, {"by_mass": table, "all": whole, "runs": runs, **facts})
    words = Table("mass, kg", *kinds)
    for m, row in table.items():
        words.add_row(m, *(f"{row[k]:.0f}" for k in kinds))
    words.add_row("all", *(f"{whole[k]:.0f}" for k in kinds))
    Console().print(words)
    print(json.dumps(whole))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
