"""The online loop: a policy acts in an environment, a model is fitted to what it met, short rollouts of the model feed
the policy's updates (MBPO: Janner et al., NeurIPS 2019, arXiv 1906.08253).

With the ensemble it is MBPO; with `SingleConfig` and a regularised critic it is the single model of Zheng et al. (ICLR
2023, arXiv 2302.01244). The environment comes in as an object with gymnasium's `reset` and `step`; termination, reward
and evaluation as functions, as in `mbrl.offline`, whose rollouts these are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbrl import device as devices
from mbrl.border import Env, World, episode_seed
from mbrl.core import Spec, check_config, check_functions, check_learner, check_reward
from mbrl.data import Buffer, Dataset, Transitions
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.fit import FitConfig, check_fit, fit
from mbrl.offline import (
    PROBE,
    Evaluate,
    Forget,
    Imagination,
    Laps,
    Record,
    Result,
    Reward,
    Terminal,
    captured,
    check_evaluate,
    check_whose,
    digest,
    evaluated,
    group_seed,
    means_of,
    normalizer_of,
    rollouts,
)
from mbrl.sac import Sac, SacConfig, local_lipschitz, value_aware_error
from mbrl.terminal import TerminalConfig, TerminalHead, fit_terminal, restored

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
        if self.end == 0 and self.first != self.last:
            raise ValueError(
                f"Horizon: got {self}, where every step has the length `last`; give the step `end` from which on it "
                "has, or the same `first` and `last`"
            )

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
    """With `normalize`, observations are standardised by the random steps', of all seeds that learn together: in like
    environments these differ little, and each has the units of the others."""
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
    """State is saved at the first end of an episode so many steps after it was last saved, ten times as many where no
    episode ends before, and at the end."""


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
    """What was met in the environment so far, as packed rows [capacity, 2 O + A + 2], and where its episodes begin."""

    def __init__(self, spec: Spec, rows: Tensor, env: Env) -> None:
        self.spec, self.rows, self.n, self.starts = spec, rows, 0, [0]
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


def train(config: OnlineConfig, env: Env, *, seed: int = 0, **given: Any) -> OnlineResult:
    """Learn a policy in an environment through a model of it.

    env: one environment; its episodes must end, by themselves or by a time limit; episode e is reset with
    `episode_seed(seed, e)`. A truncated episode ends without a terminal transition. What else is given, and what is
    raised, is as for `train_together`, of which this is the case of one seed.

    The state of an environment cannot be saved in general, so the loop's is saved at the end of an episode: a record
    that holds an interrupted run's makes this call go on from there, to the numbers of an uninterrupted run, as far as
    the environment is one that its seed determines."""
    return train_together(config, [env], seeds=[seed], **given)[0]


def train_together(
    config: OnlineConfig,
    envs: Sequence[Env],
    *,
    seeds: Sequence[int],
    dynamics: Any = None,
    fitting: FitConfig | None = None,
    terminal: Terminal | None = None,
    reward: Reward | None = None,
    evaluate: Evaluate | Sequence[Evaluate] | None = None,
    device: torch.device | str = "cpu",
    record: Record | None = None,
) -> list[OnlineResult]:
    """Several seeds at once, each in an environment and with a model of its own, a step of each at a time, their agents
    updated together: what an accelerator takes little longer for than for one. `seconds` are those of all.

    envs: one for each seed, of one kind. dynamics: a learner's config, the probabilistic ensemble by default; fitting:
    of each refit. terminal: the task's termination, learned anew at each refit where None. reward: the task's reward,
    the learner's own head where None. evaluate: called with a policy, returns [episodes], in an environment of its own;
    one for all seeds, or one each.

    record: where numbers and state go. A record that holds an interrupted run's state makes this call go on from
    there, to the same numbers. That of several seeds, or of a long episode, is saved in the midst of episodes: on going
    on, an episode is run again from its start, under the actions that it was given.

    Raises ValueError where the settings do not go together, the record is of other settings or seeds, an environment
    is of the wrong kind, returns what is not finite, or, run again, returns something else."""
    record, fitting, dynamics = record or Forget(), fitting or FitConfig(), dynamics or EnsembleConfig()
    check_config("online", config, OnlineConfig)
    check_learner(dynamics)
    check(config)
    check_fit(fitting)
    many = len(seeds)
    if len(envs) != many or not seeds or len(set(seeds)) < many:
        raise ValueError(f"online: got {len(envs)} environments and seeds {list(seeds)}; expected one each, none twice")
    if len({id(env) for env in envs}) < many:
        raise ValueError("online: got one environment twice, which cannot be at two places; expected one each")
    worlds, device = [World(env) for env in envs], torch.device(device)
    if len({(w.spec, *w.low.flatten(), *w.high.flatten()) for w in worlds}) > 1:
        raise ValueError("online: the environments are not alike; expected one kind, for one seed each")
    judges = list(evaluate) if isinstance(evaluate, Sequence) else [evaluate] * many
    check_evaluate(*judges)
    if len(judges) != many:
        raise ValueError(f"online: got {len(judges)} functions to evaluate by, expected one, or one for each seed")
    spec, lap, whose = worlds[0].spec, Laps(device), range(many)
    obs, act = (torch.zeros(2, n, device=device) for n in (spec.obs, spec.act))
    check_functions(obs, act, obs, reward=reward, terminal=terminal)
    generator = devices.generator(group_seed(seeds), device)
    models = [dynamics.build(spec, generator).to(device).eval() for _ in whose]
    check_reward(models[0], reward)
    agent = config.agent.build(spec, generator, seeds=many)
    rows = torch.zeros(many, config.steps, 2 * spec.obs + spec.act + 2, device=device)
    mets = [Met(spec, rows[s], env) for s, env in enumerate(envs)]
    capacity = config.retain * config.rollouts * config.horizon.most
    buffer = Buffer(many, capacity, spec, device=device)
    n_real = int(config.batch * config.real_ratio)
    heads: list[TerminalHead | None] = [None] * many  # where the task's termination is learned
    which = torch.arange(many, device=device)[:, None]

    def update(pick: Tensor, uniform: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """From row numbers [S, n], uniforms [S, m] and normals [2, S, B, A]."""
        batch = torch.cat([rows[which, pick], buffer.sample(uniform)], 1)
        return agent.update(Transitions.unpack(batch, spec), noise)

    first, counted = 0, 0
    episode = [0] * many  # of each seed, the one that runs or comes next
    returns: list[tuple[int, list[list[float]]]] = []
    episodes: list[list[tuple[int, float]]] = [[] for _ in whose]
    probes: list[list[tuple[int, dict[str, float]]]] = [[] for _ in whose]
    sums: dict[str, Tensor] = {}  # of the figures since they were last logged, over so many updates
    counts: list[list[int]] = [[] for _ in whose]  # transitions of the last batches of rollouts, of each seed
    obs, earned, running = np.zeros((many, spec.obs)), [0.0] * many, [False] * many
    mine = digest(config, dynamics, fitting, list(seeds))
    if kept := record.load("online.partial"):
        tensors, facts = kept
        check_whose(facts, mine, "a run of other settings or seeds")
        part = lambda name: {k[len(name) :]: v for k, v in tensors.items() if k.startswith(name)}
        agent.load_state_dict(part("agent."))
        for s, model in enumerate(models):
            model.load_state_dict(part(key("model", s, many) + "."))
            if head := part(key("terminal", s, many) + "."):
                heads[s] = restored(head, spec, TerminalConfig()).to(device)
        buffer.load_state_dict(part("buffer."))
        sums = {k: v.to(device) for k, v in part("sums.").items()}
        generator.set_state(tensors["generator"].cpu())
        first, episode, counted, counts = (facts[k] for k in ("steps", "episode", "counted", "counts"))
        returns = [(n, x) for n, x in facts["returns"]]
        episodes, probes = ([[(n, x) for n, x in own] for own in facts[k]] for k in ("episodes", "probes"))
        rows[:, :first] = tensors["rows"].to(device)
        for s, met in enumerate(mets):
            met.n, met.starts = first, facts["starts"][s]
            running[s] = met.starts[-1] < first < config.steps
            if running[s]:
                obs[s], earned[s] = _again(worlds[s], met, episode_seed(seeds[s], episode[s]))
        lap.seconds = dict(facts["seconds"])

    def checkpoint(done: int) -> None:
        tensors = {"generator": generator.get_state(), "rows": rows[:, :done]}
        for name, state in (("agent", agent), ("buffer", buffer)):
            tensors |= {f"{name}.{k}": v for k, v in state.state_dict().items()}
        for s, model in enumerate(models):
            tensors |= {f"{key('model', s, many)}.{k}": v for k, v in model.state_dict().items()}
            if (head := heads[s]) is not None:
                tensors |= {f"{key('terminal', s, many)}.{k}": v for k, v in head.state_dict().items()}
        tensors |= {f"sums.{k}": v for k, v in sums.items()}
        facts = {"steps": done, "episode": list(episode), "counted": counted, "counts": [list(x) for x in counts]}
        facts |= {"seconds": dict(lap.seconds), "returns": list(returns), "starts": [list(m.starts) for m in mets]}
        facts |= {"episodes": [list(x) for x in episodes], "probes": [list(x) for x in probes], "of": mine}
        record.save("online.partial", tensors, facts)

    def probe(step: int) -> None:
        """How steep the values are, and how wrong the models, where they have not been fitted yet."""
        since = [met.transitions(max(step - config.refit_every, step - PROBE), step) for met in mets]
        steep = local_lipschitz(agent, torch.stack([x.obs for x in since]))
        for s, model in enumerate(models):
            found = {k: v[s].item() for k, v in steep.items()}
            apart = devices.generator(episode_seed(seeds[s], -step), device)
            found["value_error"] = value_aware_error(agent.one(s), model, since[s], apart).item()
            probes[s].append((step, found))
            record.log("probe", step, found | told_of(s))
        lap("probe")

    def refit(step: int) -> None:
        """Each model to all that was met, then rollouts from it."""
        if step > config.random:
            probe(step)
        elif config.agent.normalize:
            agent.set_normalizer(*normalizer_of(rows[:, :step, : spec.obs].flatten(0, 1)))
        horizon = config.horizon.at(step)
        imagination = Imagination(horizon=horizon, rollouts=config.rollouts)
        for s, model in enumerate(models):
            data = mets[s].dataset()
            told = lambda epoch, total, figures: record.progress("model", epoch, total, figures)
            report = fit(model, data, fitting, generator, told)
            model.eval()
            figures = {"epochs": float(report.epochs), "holdout": sum(report.best) / len(report.best)}
            record.log("model", step, figures | told_of(s))
            ends = terminal
            if ends is None:
                ends = heads[s] = fit_terminal(data, TerminalConfig(), generator)
            lap("fit")
            counts[s] = [*counts[s][1 - config.retain :], 0] if config.retain > 1 else [0]
            logs: dict[str, float] = {}
            for batch, log in rollouts(agent.one(s), model, data, ends, reward, imagination, math.inf, generator):
                buffer.add(s, batch)
                counts[s][-1] += len(batch.obs)
                logs = {k: logs.get(k, 0.0) + v for k, v in log.items()}
            buffer.keep(s, sum(counts[s]))
            record.log("rollout", step, means_of(logs) | {"horizon": float(horizon)} | told_of(s))
            lap("rollout")
        if min(buffer.size) == 0:
            raise ValueError("no imagined transition was kept: no rollout was finite at its start")

    told_of = lambda s: {"seed": float(seeds[s])} if many > 1 else {}
    go = None
    saved, total = first, config.steps
    lap("setup")
    for step in range(first, total):
        if not all(running):
            for s in whose:
                if not running[s]:
                    obs[s], earned[s], running[s] = worlds[s].reset(episode_seed(seeds[s], episode[s])), 0.0, True
            lap("environment")
        if step >= config.random and (step - config.random) % config.refit_every == 0:
            refit(step)
        if step < config.random:
            drawn = torch.rand(many, spec.act, generator=generator, device=device) * 2 - 1
        else:
            drawn = _act(agent, obs, torch.randn(many, 1, spec.act, generator=generator, device=device))
        acts, done, ended = drawn.cpu().numpy(), step + 1, []
        for s in whose:
            after, r, terminated, truncated = worlds[s].step(acts[s])
            mets[s].add(obs[s], acts[s], r, after, terminated)
            obs[s], earned[s] = after, earned[s] + r
            if terminated or truncated:
                ended.append(s)
        lap("environment")
        for _ in range(config.updates if step >= config.random else 0):
            pick = torch.randint(done, (many, n_real), generator=generator, device=device)
            uniform = torch.rand(many, config.batch - n_real, generator=generator, device=device)
            noise = torch.randn(2, many, config.batch, spec.act, generator=generator, device=device)
            if go is None:
                go = captured(update, agent, pick, uniform, noise)
            for name, value in go(pick, uniform, noise).items():
                sums[name] = sums[name] + value if name in sums else value.clone()
            counted += 1
        lap("update")
        for s in ended:
            running[s], episode[s] = False, episode[s] + 1
            mets[s].starts.append(done)
            episodes[s].append((done, earned[s]))
            length = float(done - mets[s].starts[-2])
            record.log("episode", done, {"return": earned[s], "length": length} | told_of(s))
            record.progress("online", done, total, {"return": earned[s]})
        if counted and (done % config.log_every == 0 or done == total):
            means = {k: (v / counted).mean().item() for k, v in sums.items()}
            sums, counted = {}, 0
            record.log("policy", done, means)
            record.progress("online", done, total, means)
        if evaluate is not None and (done % config.evaluate_every == 0 or done == total):
            found = [evaluated(judge, agent, s) for s, judge in enumerate(judges) if judge]
            returns.append((done, found))
            mean = sum(map(sum, found)) / sum(map(len, found))
            record.log("evaluate", done, {"return": mean})
            record.progress("evaluate", done, total, {"return": mean})
            lap("evaluate")
        wait = 10 if many == 1 and running[0] else 1  # at an episode's end, unless it goes on and on
        if done - saved >= wait * config.save_every:
            checkpoint(done)
            saved = done
            lap("checkpoint")
    if saved < total:
        checkpoint(total)
    facts = {"spec": [spec.obs, spec.act], "updates": int(agent.updates), "returns": returns, "seconds": lap.seconds}
    for s, model in enumerate(models):
        record.save(key("model", s, many), model.state_dict(), {})
        if (head := heads[s]) is not None:
            record.save(key("terminal", s, many), head.state_dict(), {})
    record.save("agent", agent.state_dict(), facts)
    return [
        OnlineResult(
            agent if many == 1 else agent.one(s), [models[s]], [(n, [x[s]]) for n, x in returns], lap.seconds,
            episodes[s], probes[s],
        )
        for s in whose
    ]  # fmt: skip


def learned(record: Record, dynamics: Any, spec: Spec, seeds: int) -> tuple[list[Any], list[TerminalHead | None]]:
    """Of a finished run of so many seeds: each one's model, and its termination, where that was learned. dynamics: the
    learner's config. Raises ValueError where the record holds none."""
    models: list[Any] = []
    ends: list[TerminalHead | None] = []
    for s in range(seeds):
        kept, end = record.load(key("model", s, seeds)), record.load(key("terminal", s, seeds))
        if kept is None:
            raise ValueError("online: the run holds no model yet; expected one that has finished")
        models.append(dynamics.build(spec, devices.generator(0)).eval())
        models[-1].load_state_dict(kept[0])
        ends.append(None if end is None else restored(end[0], spec, TerminalConfig()))
    return models, ends


def key(name: str, s: int, many: int) -> str:
    """What a record calls that of the seed in this place, of so many."""
    return f"{name}{s}" if many > 1 else name


def _again(world: World, met: Met, seed: int) -> tuple[np.ndarray, float]:
    """The episode that is under way, run again from its start under the actions that it was given: its observation and
    its return so far. Raises ValueError where the environment returns something else than it did."""
    obs, earned = world.reset(seed), 0.0
    seen = met.transitions(met.starts[-1], met.n)
    for act, after in zip(seen.act.cpu().numpy(), seen.next_obs.cpu().numpy(), strict=True):
        obs, reward, _, _ = world.step(act)
        earned += reward
        if not np.array_equal(obs, after):
            raise ValueError("environment: an episode that was run again went another way; it cannot be gone on with")
    return obs, earned


@torch.no_grad()
def _act(agent: Sac, obs: np.ndarray, noise: Tensor) -> Tensor:
    """obs [S, O], noise [S, 1, A] -> [S, A]"""
    return agent.act(torch.from_numpy(obs.astype(np.float32)).to(noise)[:, None], noise)[:, 0]


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
