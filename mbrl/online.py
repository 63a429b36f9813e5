"""The online loop: a policy acts in an environment, a model is fitted to what it met, short rollouts of the model feed
the policy's updates (MBPO: Janner et al., NeurIPS 2019, arXiv 1906.08253).

With the ensemble it is MBPO; with `SingleConfig` and a regularised critic it is the single model of Zheng et al. (ICLR
2023, arXiv 2302.01244). The environment comes in as an object with gymnasium's `reset` and `step`; termination, reward
and evaluation as functions, as in `mbrl.offline`, whose rollouts these are.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbrl import device as devices
from mbrl.border import Env, World, episode_seed
from mbrl.core import Spec
from mbrl.data import Buffer, Dataset, Transitions
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.fit import FitConfig, fit
from mbrl.offline import (
    Evaluate,
    Forget,
    Imagination,
    Laps,
    Record,
    Result,
    Reward,
    Terminal,
    captured,
    means_of,
    policy_of,
    rollouts,
)
from mbrl.sac import Sac, SacConfig, local_lipschitz, value_aware_error
from mbrl.terminal import TerminalConfig, fit_terminal

PROBE = 1000  # transitions at most from which the value's steepness and the model's error are read


# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Horizon:
    """The length of the imagined rollouts: `first` up to the step `begin` of the environment, `last` from the step
    `end` on, linear between, rounded down."""

    first: int = 1
    last: int = 1
    begin: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        if min(self.first, self.last) < 1 or not 0 <= self.begin <= self.end:
            raise ValueError(f"Horizon: got {self}, expected lengths of at least 1 and 0 <= begin <= end")

    def at(self, step: int) -> int:
        if step >= self.end:
            return self.last
        share = max(0, step - self.begin) / (self.end - self.begin) if step > self.begin else 0.0
        return math.floor(self.first + share * (self.last - self.first) + 1e-9)

    @property
    def most(self) -> int:
        return max(self.first, self.last)


@dataclass(frozen=True)
class OnlineConfig:
    """Steps are those of the environment. The defaults are MBPO's, but for the number of rollouts (published: 400 a
    step, 100 000 each time), random steps (5 000) and updates (20 to 40), which are of a size for a short run."""

    agent: SacConfig = field(default_factory=lambda: SacConfig(actor_lr=3e-4, alpha_lr=3e-4))
    """With `normalize`, observations are standardised by the random steps'."""
    steps: int = 30_000
    """All of them, the random ones included."""
    random: int = 1_000
    """First steps, with uniform actions; nothing is learned before they are over."""
    refit_every: int = 250
    """Steps from one fit of the model, and the rollouts after it, to the next. A fit goes on from the weights of the
    one before, with normalisers set anew and fresh moments of the optimiser."""
    horizon: Horizon = field(default_factory=Horizon)
    rollouts: int = 20_000
    """Start states, drawn from all steps so far, each time."""
    retain: int = 4
    """How many such batches of rollouts the buffer holds."""
    updates: int = 10
    """Of the agent, each step after the random ones."""
    batch: int = 256
    real_ratio: float = 0.05
    """The share of a batch that comes from the environment."""
    evaluate_every: int = 1_000
    log_every: int = 1_000
    save_every: int = 1_000
    """State is saved at the first end of an episode so many steps after it was last saved."""


@dataclass(frozen=True)
class OnlineResult(Result):
    """What came out. returns: per evaluation, (steps, returns [1, episodes]). seconds: by "fit", "rollout", "update",
    "environment" (its steps, and the policy's actions for them), "evaluate", "probe" and "checkpoint". episodes: of
    the training, (the step at its end, its undiscounted return). probes: at each fit but the first, (step, figures):
    what `local_lipschitz` finds at the observations since the last fit, and "value_error", what `value_aware_error`
    finds on those transitions, which the model has not seen yet."""

    episodes: list[tuple[int, float]]
    probes: list[tuple[int, dict[str, float]]]


# ---------------------------------------------------------------- what was met


class Met:
    """What was met in the environment so far, as packed rows on the device, and where its episodes begin."""

    def __init__(self, spec: Spec, capacity: int, env: Env, device: torch.device) -> None:
        self.spec, self.n, self.starts = spec, 0, [0]
        self.rows = torch.zeros(capacity, 2 * spec.obs + spec.act + 2, device=device)
        self.bounds = [torch.as_tensor(np.float32(x)) for x in (env.action_space.low, env.action_space.high)]

    def add(self, obs: np.ndarray, act: np.ndarray, reward: float, after: np.ndarray, terminal: bool) -> None:
        row = np.concatenate([obs, act, [reward], after, [float(terminal)]]).astype(np.float32)
        self.rows[self.n] = torch.from_numpy(row).to(self.rows.device)
        self.n += 1

    def transitions(self, first: int, last: int) -> Transitions:
        return Transitions.unpack(self.rows[first:last], self.spec)

    def dataset(self) -> Dataset:
        """Views of the rows so far."""
        t, device = self.transitions(0, self.n), self.rows.device
        starts = torch.tensor([*(x for x in self.starts if x < self.n), self.n], device=device)
        paired = torch.ones(self.n, dtype=torch.bool, device=device)
        low, high = (x.to(device) for x in self.bounds)
        return Dataset(t.obs, t.act, t.reward, t.next_obs, t.terminal > 0.5, paired, starts, low, high, name="online")


# ---------------------------------------------------------------- the loop


def train(
    config: OnlineConfig,
    env: Env,
    *,
    dynamics: Any = None,
    fitting: FitConfig | None = None,
    terminal: Terminal | None = None,
    reward: Reward | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    record: Record | None = None,
) -> OnlineResult:
    """Learn a policy in an environment through a model of it.

    env: one environment; its episodes must end, by themselves or by a time limit; episode e is reset with
    `episode_seed(seed, e)`. A truncated episode ends without a terminal transition. dynamics: a learner's config, the
    probabilistic ensemble by default; fitting: of each refit. terminal: the task's termination, learned anew at each
    refit where None. reward: the task's reward, the learner's own head where None. evaluate: called with a policy,
    returns [episodes], in an environment of its own.

    record: where numbers and state go. The state of an environment cannot be saved in general, so the loop's is saved
    at the end of an episode: a record that holds an interrupted run's makes this call go on from there, to the numbers
    of an uninterrupted run, as far as the environment is one that its seed determines.

    Raises ValueError where the settings do not go together, the environment is of the wrong kind, or returns what is
    not finite."""
    record, fitting = record or Forget(), fitting or FitConfig()
    check(config)
    world, device = World(env), torch.device(device)
    spec, lap = world.spec, Laps(device)
    generator = devices.generator(seed, device)
    model = (dynamics or EnsembleConfig()).build(spec, generator).to(device).eval()
    agent = config.agent.build(spec, generator)
    met = Met(spec, config.steps, env, device)
    capacity = config.retain * config.rollouts * config.horizon.most
    buffer = Buffer(1, capacity, spec, device=device)
    n_real = int(config.batch * config.real_ratio)
    head: Terminal | None = terminal

    def update(pick: Tensor, uniform: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """From row numbers [1, n], uniforms [1, m] and normals [2, 1, B, A]."""
        batch = torch.cat([met.rows[pick], buffer.sample(uniform)], 1)
        return agent.update(Transitions.unpack(batch, spec), noise)

    first, episode, counted = 0, 0, 0
    returns: list[tuple[int, list[list[float]]]] = []
    episodes: list[tuple[int, float]] = []
    probes: list[tuple[int, dict[str, float]]] = []
    sums: dict[str, Tensor] = {}  # of the figures since they were last logged, over so many updates
    counts: list[int] = []  # transitions of the last batches of rollouts
    if kept := record.load("online.partial"):
        tensors, facts = kept
        part = lambda name: {k[len(name) :]: v for k, v in tensors.items() if k.startswith(name)}
        agent.load_state_dict(part("agent."))
        model.load_state_dict(part("model."))
        buffer.load_state_dict(part("buffer."))
        sums = {k: v.to(device) for k, v in part("sums.").items()}
        generator.set_state(tensors["generator"].cpu())
        first, episode, counted, counts = (facts[k] for k in ("steps", "episode", "counted", "counts"))
        returns, episodes, probes = ([(n, x) for n, x in facts[k]] for k in ("returns", "episodes", "probes"))
        met.rows[:first] = tensors["rows"].to(device)
        met.n, met.starts = first, facts["starts"]
        lap.seconds = dict(facts["seconds"])

    def checkpoint(done: int) -> None:
        tensors = {"generator": generator.get_state(), "rows": met.rows[:done]}
        for name, state in (("agent", agent), ("model", model), ("buffer", buffer)):
            tensors |= {f"{name}.{k}": v for k, v in state.state_dict().items()}
        tensors |= {f"sums.{k}": v for k, v in sums.items()}
        facts = {
            "steps": done,
            "episode": episode,
            "counted": counted,
            "counts": list(counts),
            "seconds": dict(lap.seconds),
        }
        facts |= {
            "returns": list(returns),
            "episodes": list(episodes),
            "probes": list(probes),
            "starts": list(met.starts),
        }
        record.save("online.partial", tensors, facts)

    def refit(step: int) -> None:
        """The model to all that was met, then rollouts from it."""
        nonlocal counts, head
        data = met.dataset()
        if step > config.random:
            since = met.transitions(max(step - config.refit_every, step - PROBE), step)
            found = {k: v.item() for k, v in local_lipschitz(agent, since.obs[None]).items()}
            apart = devices.generator(episode_seed(seed, -step), device)
            found["value_error"] = value_aware_error(agent, model, since, apart).item()
            probes.append((step, found))
            record.log("probe", step, found)
            lap("probe")
        elif config.agent.normalize:
            agent.set_normalizer(data.obs.mean(0), data.obs.std(0, correction=0) + 1e-3)
        told = lambda epoch, total, figures: record.progress("model", epoch, total, figures)
        report = fit(model, data, fitting, generator, told)
        model.eval()
        record.log("model", step, {"epochs": report.epochs, "holdout": sum(report.best) / len(report.best)})
        if terminal is None:
            head = fit_terminal(data, TerminalConfig(), generator)
        lap("fit")
        assert head is not None
        horizon = config.horizon.at(step)
        imagination = Imagination(horizon=horizon, rollouts=config.rollouts)
        counts = [*counts[1 - config.retain :], 0] if config.retain > 1 else [0]
        logs: dict[str, float] = {}
        for batch, log in rollouts(agent, model, data, head, reward, imagination, math.inf, generator):
            buffer.add(0, batch)
            counts[-1] += len(batch.obs)
            logs = {k: logs.get(k, 0.0) + v for k, v in log.items()}
        buffer.keep(0, sum(counts))
        if min(buffer.size) == 0:
            raise ValueError("no imagined transition was kept: no rollout was finite at its start")
        record.log("rollout", step, means_of(logs) | {"horizon": float(horizon)})
        lap("rollout")

    go = None
    saved, total = first, config.steps
    obs, earned, running = np.zeros(spec.obs), 0.0, False
    lap("setup")
    for step in range(first, total):
        if not running:
            obs, earned, running = world.reset(episode_seed(seed, episode)), 0.0, True
            lap("environment")
        if step >= config.random and (step - config.random) % config.refit_every == 0:
            refit(step)
        if step < config.random:
            drawn = torch.rand(spec.act, generator=generator, device=device) * 2 - 1
        else:
            drawn = _act(agent, obs, torch.randn(1, 1, spec.act, generator=generator, device=device))
        act = drawn.cpu().numpy()
        after, r, terminated, truncated = world.step(act)
        met.add(obs, act, r, after, terminated)
        obs, earned, done = after, earned + r, step + 1
        lap("environment")
        for _ in range(config.updates if step >= config.random else 0):
            pick = torch.randint(met.n, (1, n_real), generator=generator, device=device)
            uniform = torch.rand(1, config.batch - n_real, generator=generator, device=device)
            noise = torch.randn(2, 1, config.batch, spec.act, generator=generator, device=device)
            if go is None:
                go = captured(update, agent, pick, uniform, noise)
            for name, value in go(pick, uniform, noise).items():
                sums[name] = sums[name] + value if name in sums else value.clone()
            counted += 1
        lap("update")
        if terminated or truncated:
            running, episode = False, episode + 1
            met.starts.append(done)
            episodes.append((done, earned))
            record.log("episode", done, {"return": earned, "length": float(done - met.starts[-2])})
            record.progress("online", done, total, {"return": earned})
        if counted and (done % config.log_every == 0 or done == total):
            means = {k: (v / counted).mean().item() for k, v in sums.items()}
            sums, counted = {}, 0
            record.log("policy", done, means)
            record.progress("online", done, total, means)
        if evaluate is not None and (done % config.evaluate_every == 0 or done == total):
            found = [float(x) for x in evaluate(policy_of(agent))]
            returns.append((done, [found]))
            record.log("evaluate", done, {"return": sum(found) / len(found)})
            lap("evaluate")
        if not running and done - saved >= config.save_every:
            checkpoint(done)
            saved = done
            lap("checkpoint")
    facts = {"spec": [spec.obs, spec.act], "updates": int(agent.updates), "returns": returns, "seconds": lap.seconds}
    record.save("model", model.state_dict(), {})
    record.save("agent", agent.state_dict(), facts)
    return OnlineResult(agent, [model], returns, lap.seconds, episodes, probes)


@torch.no_grad()
def _act(agent: Sac, obs: np.ndarray, noise: Tensor) -> Tensor:
    """[A]"""
    return agent.act(torch.from_numpy(obs.astype(np.float32)).to(noise)[None, None], noise)[0, 0]


def check(config: OnlineConfig) -> None:
    """Raises ValueError for settings that do not go together."""
    if not 0 <= config.real_ratio <= 1:
        raise ValueError(f"real_ratio: got {config.real_ratio}, expected a share in [0, 1]")
    if config.agent.cloning:
        raise ValueError(f"cloning: got {config.agent.cloning}, expected 0: online there are no actions to imitate")
    small = ("refit_every", "rollouts", "retain", "batch", "evaluate_every", "log_every", "save_every")
    if wrong := [f"{k}={getattr(config, k)}" for k in small if getattr(config, k) < 1]:
        raise ValueError(f"online: got {', '.join(wrong)}; expected at least 1")
    if config.updates < 0 or not 2 <= config.random <= config.steps:
        got = f"updates={config.updates}, random={config.random}, steps={config.steps}"
        raise ValueError(f"online: got {got}; expected updates >= 0 and 2 <= random <= steps")
