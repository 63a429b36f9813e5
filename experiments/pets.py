"""PETS with iCEM: return against environment steps, beside the same planner in the true model.

    python experiments/pets.py [--tasks Pendulum-v1 ...] [--seeds 0 1 2] [--workers 2]

Each finished (task, seed) is a row of experiments/results/pets.json and is not run again: the table may be filled over
several sittings, and what is interrupted goes on after its last episode. A row holds the training's returns, `learned`:
those of 20 further episodes under the planner in the last model (three where they are as long as HalfCheetah-v5's), and
`true`: those of as many episodes (fewer where the simulator is slow) in the true model.
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro
from mbrl_envs import evaluate as worlds

from mbrl import cli_control, cli_plan, mpc
from mbrl import device as devices
from mbrl.border import episode_seed
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.fit import FitConfig
from mbrl.mpc import PetsConfig
from mbrl.offline import digest
from mbrl.planner import ICEM, Planner, Worth
from mbrl.run import Run, machine, to_plain, versions, write_json

RESULTS = Path(__file__).parent / "results" / "pets.json"
LEARNER = EnsembleConfig(members=5, elites=5, uncertainty=())


@dataclass(frozen=True)
class Setting:
    """One task's: how long it is learned and how the planner searches."""

    episodes: int
    planner: Planner
    true: int = 20  # episodes in the true model
    learned: int = 20
    worth: Worth = field(default_factory=lambda: Worth(particles=5))
    fitting: FitConfig = field(default_factory=lambda: PetsConfig().fitting)
    learner: EnsembleConfig = field(default=LEARNER, metadata={"added": True})


SETTINGS = {
    "Pendulum-v1": Setting(10, replace(ICEM, samples=24, elites=6, horizon=20)),
    "mbrl_envs/CartPoleSwingUp-v0": Setting(15, replace(ICEM, horizon=50)),
    "Reacher-v5": Setting(20, replace(ICEM, horizon=15), true=10),
    "HalfCheetah-v5": Setting(
        20,
        replace(ICEM, horizon=20, color=0.25),
        2,
        3,
        Worth(particles=3),
        FitConfig(batch=64, holdout=0.1, patience=5, max_epochs=20),
        replace(LEARNER, scale_targets=True),  # unscaled, the same epochs leave 1-step errors several times as large
    ),
}
SOLVED = -200  # Pendulum-v1, mean over 20 episodes, within 10
SHARE = 0.8  # of the true model's return, cart-pole, within 15


@dataclass(frozen=True)
class Args:
    tasks: tuple[str, ...] = tuple(SETTINGS)
    seeds: tuple[int, ...] = (0, 1, 2)
    workers: int = 2
    out: Path = Path("runs/pets")
    """Where what was interrupted goes on from, an episode at a time."""


def settings_of(task: str) -> str:
    return digest(SETTINGS[task], LEARNER)


def row(task: str, seed: int, out: Path) -> dict[str, Any]:
    """Learn, then measure."""
    torch.set_num_threads(1)
    devices.keep_memory()
    s = SETTINGS[task]
    env = cli_control.opened(task)
    reward, terminal = cli_control.functions(task, env.observation_space.shape[0], "task")
    config = PetsConfig(s.planner, s.worth, random=1, episodes=s.episodes, fitting=s.fitting)
    folder = out / task.replace("/", "_") / f"{seed}-{settings_of(task)}"
    with Run.continued(folder, {"env": task, "seed": seed, "setting": to_plain(s)}, {}, quiet=True) as run:
        result = mpc.pets(config, env, s.learner, seed=seed, record=run, reward=reward, terminal=terminal)
        learning = run.seconds
    evaluate = worlds.evaluator(task, episodes=s.learned, seed=50_000 + 1_000 * seed)
    control = result.mpc
    control.generator.manual_seed(episode_seed(seed, 50_000))  # whether or not the run was interrupted
    learned = evaluate(control, rows=control.rows).tolist()
    truth = cli_plan.truth(task, env, s.planner, s.worth, seed)
    true, clock = [], time.perf_counter()
    for i in range(s.true):
        truth.begin(1)
        true.append(mpc.episode(env, truth, 50_000 + 1_000 * seed + i).total)
    return {
        "task": task, "seed": seed, "settings": settings_of(task), "returns": result.returns, "learned": learned,
        "true": true, "wall_s": round(learning, 1),
        "true_s": round(time.perf_counter() - clock, 1),
        "not_finite": control.counts["bad"], **machine(), "versions": versions(),
    }  # fmt: skip


def main(args: Args) -> None:
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = [r for r in rows if r["settings"] == settings_of(r["task"])]
    have = {(r["task"], r["seed"]) for r in rows}
    cells = [(t, s) for t in args.tasks for s in args.seeds if (t, s) not in have]
    with ProcessPoolExecutor(max(1, args.workers), mp_context=get_context("spawn")) as pool:
        for done in pool.map(row, *zip(*cells, strict=True), [args.out] * len(cells)) if cells else ():
            rows.append(done)
            write_json(RESULTS, {"figures": figures(rows), "rows": rows})
            print(done["task"], done["seed"], f"{done['wall_s']} s", [round(r) for _, r in done["returns"]], flush=True)
    write_json(RESULTS, {"figures": figures(rows), "rows": rows})
    print(json.dumps(figures(rows)))


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over seeds, with the least and the largest."""
    found: dict[str, Any] = {}
    for task in SETTINGS:
        mine = [r for r in rows if r["task"] == task]
        if not mine:
            continue
        mean = lambda key, mine=mine: sorted(sum(r[key]) / len(r[key]) for r in mine)
        learned, true = mean("learned"), mean("true")
        spread = lambda x: {"median": x[len(x) // 2] if len(x) % 2 else sum(x[len(x) // 2 - 1 :][:2]) / 2,
                            "least": x[0], "most": x[-1]}  # fmt: skip
        found[task] = {"seeds": len(mine), "learned": spread(learned), "true": spread(true)}
        if task == "Pendulum-v1":
            found[task]["solved"] = [v > SOLVED for v in learned]
        if task.startswith("mbrl_envs/"):
            share = sorted(sum(r["learned"]) / len(r["learned"]) / (sum(r["true"]) / len(r["true"])) for r in mine)
            found[task] |= {"share_of_true": share, "bar": SHARE}
    return found


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
