"""The offline loop with the true simulator in the model's place: what the policy learner makes of the truth.

    python experiments/truth.py --data FILE [--agents preset published] [--seeds 0] [--updates 100000]

FILE holds data of Hopper-v5, HalfCheetah-v5 or Walker2d-v5, whose observations are the simulator's state but for the
place along x (and, for Hopper and Walker2d, velocities clipped to 10). Rollouts are those of MOREC-MOPO, without
penalty and cut. "preset" is its agent and share of real rows, "published" plain SAC with a twentieth of real rows.
A run is a row of experiments/results/truth.json; one of the same data, agent, seed and length is replaced.
"""

import importlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from mbrl_envs import datasets, evaluate, tasks
from mbrl_envs.simulator import RULES
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl import device as devices
from mbrl import offline
from mbrl.core import Markov, Prediction, Segment, Spec, StepInput
from mbrl.run import machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "truth.json"
CLIP = {"Hopper": 10.0, "Walker2d": 10.0}  # of the velocities that are observed

mujoco: Any = importlib.import_module("mujoco")
Rollout: Any = importlib.import_module("mujoco.rollout").Rollout


@dataclass(frozen=True)
class Args:
    data: Path
    agents: tuple[Literal["preset", "published"], ...] = ("preset", "published")
    seeds: tuple[int, ...] = (0,)
    updates: int = 100_000
    evaluate_every: int = 5_000


class Truth(Markov):
    """The simulator as a learner that has nothing to learn."""

    def __init__(self, env: str, spec: Spec) -> None:
        super().__init__()
        self.spec, self.noise_dim, self.kind = spec, 0, env.removesuffix("-v5")
        if self.kind not in ("Hopper", "HalfCheetah", "Walker2d"):
            raise SystemExit(f"truth.py: got data of {env}, expected Hopper-v5, HalfCheetah-v5 or Walker2d-v5")
        self.env: Any = gym.make(env).unwrapped
        self.scratch, self.pool = mujoco.MjData(self.env.model), Rollout(nthread=0)

    def draw(self, n: int, k: int, generator: torch.Generator) -> Tensor:
        return torch.zeros(n, 0)

    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError("there is nothing to fit")

    def step(self, state: Tensor, inp: StepInput, cond: Any) -> tuple[Tensor, Prediction]:
        model, skip = self.env.model, self.env.frame_skip
        kind = mujoco.mjtState.mjSTATE_FULLPHYSICS.value
        start = np.zeros((len(state), mujoco.mj_stateSize(model, kind)))  # time, places from x on, velocities
        start[:, 2 : 1 + model.nq + model.nv] = state.double().numpy()
        ctrl = inp.act.double().numpy()
        full, _ = self.pool.rollout([model] * len(state), [self.scratch], start, ctrl[:, None].repeat(skip, 1))
        full = np.stack([start, full[:, -1]], 1)
        moment, qpos, qvel = np.split(full, [1, 1 + model.nq], -1)
        fields = {"time": moment[..., 0], "qpos": qpos, "qvel": qvel[..., : model.nv]}
        rule = RULES[self.kind]
        reward = rule.reward(self.env, fields, ctrl[:, None], rule.terminal(self.env, fields))[:, 0]
        clip = CLIP.get(self.kind, np.inf)
        obs = np.concatenate([fields["qpos"][:, 1, 1:], fields["qvel"][:, 1].clip(-clip, clip)], 1)
        after = torch.from_numpy(obs).to(state)
        return after, Prediction(after, torch.from_numpy(reward).to(state), {})


def run(args: Args, agent: str, seed: int, data: Any, evaluator: Any) -> dict[str, Any]:
    began, preset, task = time.perf_counter(), offline.MOREC_MOPO, tasks.task(data.env, data.spec.obs)
    assert preset.imagination is not None
    assert task is not None
    plain = replace(preset.imagination, morec=None, penalty=offline.Penalty(), truncation=None)
    config = replace(preset, imagination=plain, updates=args.updates, evaluate_every=args.evaluate_every)
    if agent == "published":
        config = replace(config, agent=offline.PUBLISHED, real_ratio=offline.MOREC_PUBLISHED.real_ratio)
    result = offline.train(
        config,
        data,
        models=[Truth(data.env, data.spec)],
        terminal=task.terminal,
        evaluate=evaluator,
        seeds=(seed,),
        record=Told(f"{data.name} {agent} {seed}"),
    )
    means = [[step, float(np.mean(returns[0]))] for step, returns in result.returns]
    row = {"data": data.name, "sha256": data.sha256, "agent": agent, "seed": seed, "updates": args.updates}
    return row | {
        "last10": float(result.last()[0]),
        "final": means[-1][1],
        "returns": means,
        "behaviour_mean": data.returns.mean().item(),
        "settings": offline.digest(config),
        "wall_s": round(time.perf_counter() - began, 1),
        "versions": versions(),
        **machine(),
    }


class Told(offline.Forget):
    """Each evaluation is a line on the screen."""

    def __init__(self, name: str) -> None:
        self.name = name

    def log(self, stage: str, step: int, values: Any) -> None:
        if stage == "evaluate":
            print(f"{self.name}: {step} updates, return {values['return']:.0f}", flush=True)


def main(args: Args) -> None:
    devices.keep_memory()
    data = datasets.load(args.data)
    low, high = data.act_low.numpy(), data.act_high.numpy()
    evaluator = evaluate.evaluator(data.env, episodes=10, seed=10_000, obs=data.spec.obs, act_low=low, act_high=high)
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for agent in args.agents:
        for seed in args.seeds:
            new = run(args, agent, seed, data, evaluator)
            key = ("data", "sha256", "agent", "seed", "updates")
            rows = [r for r in rows if any(r[k] != new[k] for k in key)] + [new]
            write_json(RESULTS, {"rows": rows})
    table = Table("data", "agent", "seed", "updates", "behaviour", "last-10 return", "final")
    for r in rows:
        figures = (f"{r[k]:.0f}" for k in ("behaviour_mean", "last10", "final"))
        table.add_row(r["data"], r["agent"], str(r["seed"]), str(r["updates"]), *figures)
    Console().print(table)
    print(json.dumps([{k: r[k] for k in ("data", "agent", "seed", "last10")} for r in rows]))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
