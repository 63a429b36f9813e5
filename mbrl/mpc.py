"""Environment <-> planner <-> learner: model-predictive control with any learner, and PETS (Chua et al., NeurIPS 2018),
which fits the learner to what the control has seen, episode after episode.

Environments stay outside: they come in as objects with gymnasium's `reset` and `step`."""

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mbrl import device as devices
from mbrl.adapt import adapt, known
from mbrl.border import Env, World, episode_seed
from mbrl.core import (
    Dynamics,
    Segment,
    Spec,
    StepInput,
    Tree,
    check_config,
    check_functions,
    check_learner,
    check_reward,
    choose,
    demand,
    first_context,
    like_of,
    repeat,
    rows,
)
from mbrl.data import Dataset
from mbrl.fit import FitConfig, check_fit, fit
from mbrl.offline import Forget, Record, check_whose, digest
from mbrl.planner import (
    ICEM,
    LOOP,
    Critic,
    Found,
    Plan,
    Planner,
    Worth,
    fresh,
    propose,
    reset,
    search,
    shift,
    value,
)
from mbrl.rollout import Reward, Terminal
from mbrl.terminal import TerminalConfig, TerminalHead, fit_terminal, restored

Act = Callable[[Tensor], Tensor]  # obs [E, O] -> act [E, A]
Told = Callable[[int, int | None, float], None]  # steps so far, of how many, the return so far
ENDLESS = 10_000  # steps after which an environment that states no limit is taken to have none


@final
class Mpc:
    """Plans anew at each step, for E environments at once, from the last plan moved on by a step.

        mpc = Mpc(ICEM, Worth(), model, reward=task)
        mpc.begin(E)            # E new episodes
        act = mpc(obs)          # [E, O] -> [E, A] in [-1, 1]; once a step
        mpc.rows(kept, n)       # some episodes ended, n new ones came

    A learner with a hidden state is stepped under the executed action and corrected by the next observation. reward and
    terminal are the task's functions (the learner's reward head, and no end, where None); critic is the value after the
    horizon; policy (obs [B, O], noise [B, A]) -> act offers the planner's proposals. ctx [1, C]: the system's context,
    by default that of the first system that the learner was fitted to.
    `counts` says how many candidates were not finite, of how many, and in how many plans none was finite."""

    def __init__(
        self,
        planner: Planner,
        worth: Worth,
        model: Dynamics,
        *,
        generator: torch.Generator | None = None,
        reward: Reward | None = None,
        terminal: Terminal | None = None,
        critic: Critic | None = None,
        policy: Callable[[Tensor, Tensor], Tensor] | None = None,
        ctx: Tensor | None = None,
        dt: float = 1.0,
    ) -> None:
        if planner.proposals and policy is None:
            raise ValueError(f"Mpc: the planner wants {planner.proposals} proposals a plan, and there is no policy")
        if not isinstance(model, Dynamics):
            raise ValueError(f"Mpc: got a {type(model).__name__} for a model, expected a Dynamics, as configs build it")
        width, shape = model.spec.ctx, None if ctx is None else list(ctx.shape)
        demand(
            "Mpc",
            ("the shape of ctx", shape, f"[1, {width}]", shape is None or (len(shape) == 2 and shape[1] == width)),
            ("dt", dt, "> 0, finite", 0 < dt < math.inf),
            ("the model's number of actions", model.spec.act, ">= 1, which a planner chooses", model.spec.act >= 1),
        )
        check_reward(model, reward)
        if model.parts == 1 and model.noise_dim == 0:  # one future, however often it is asked for
            worth = replace(worth, particles=1)
        self.planner, self.worth, self.model, self.policy = planner, worth, model, policy
        self.reward, self.terminal, self.critic, self.dt = reward, terminal, critic, dt
        self.like = like_of(model)
        obs, act = (self.like.new_zeros(2, n) for n in (model.spec.obs, model.spec.act))
        check_functions(obs, act, obs, reward=reward, terminal=terminal)
        _check_policy(obs, act, critic, policy)
        self.generator = generator or devices.generator(devices.fresh_seed(), self.like.device)
        self.ctx = (first_context(model, self.like.device) if ctx is None else ctx).to(self.like)
        self.pins = worth.pinned and model.parts > 1
        if worth.limit < math.inf:
            self._check_limit()
        self.counts = {"bad": 0, "seen": 0, "lost": 0}
        self.found: Found | None = None
        self._graphs: dict[int, Callable] = {}
        self.begin(0)

    def begin(self, envs: int) -> None:
        """Forget everything: E new episodes."""
        self.plan = fresh(self.planner, envs, self.model.spec.act, self.like)
        self.state: Tree = None
        self.new = torch.ones(envs, dtype=torch.bool, device=self.like.device)

    def rows(self, kept: Sequence[int], begun: int = 0) -> None:
        """Only the environments `kept` go on, in this order, and `begun` new ones follow them."""
        index = torch.as_tensor(list(kept), dtype=torch.int64, device=self.like.device)
        old = Plan(*rows(tuple(self.plan), index))
        new = fresh(self.planner, begun, self.model.spec.act, self.like)
        self.plan = Plan(*(torch.cat(x) for x in zip(old, new, strict=True)))
        self.new = torch.cat([self.new[index], self.new.new_ones(begun)])
        if self.state is not None:
            pad = lambda x: torch.cat([x[index], x.new_zeros(begun, *x.shape[1:])])
            self.state = pytree.tree_map(pad, self.state)

    def clear(self, ended: Tensor) -> None:
        """The environments where ended [E] holds begin a new episode: nothing of the old plan survives there."""
        ended = ended.to(self.new.device)
        if ended.shape != self.new.shape:
            raise ValueError(f"Mpc: clear got {list(ended.shape)}, expected [{len(self.new)}], one an environment")
        self.plan = reset(self.planner, self.plan, ended)
        self.new = self.new | ended

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        obs = torch.as_tensor(obs).to(self.like)
        if obs.ndim != 2:
            raise ValueError(f"Mpc: got observations {list(obs.shape)}, expected [E, O], a row an environment")
        envs, width = obs.shape
        if width != self.model.spec.obs:
            raise ValueError(
                f"Mpc: got observations {width} wide, expected {self.model.spec.obs}, as the model has; plan with a "
                "model of this environment"
            )
        if envs != len(self.new):
            raise ValueError(
                f"Mpc: got observations of {envs} environments, expected {len(self.new)}; say `begin(E)` first, and "
                "`rows` where episodes end"
            )
        if bad := int((~obs.isfinite()).any(1).sum()):
            raise ValueError(
                f"Mpc: {bad} of {envs} observations are not finite, expected numbers; the world has diverged"
            )
        cond = self.model.condition(self.ctx)
        first = self.model.init(obs, cond)
        state = first if self.state is None else choose(self.new, first, self.model.correct(self.state, obs, 1.0, cond))
        p, w = self.planner, self.worth
        draw = lambda n, k: [self.model.draw(n, k, self.generator) for _ in range(p.horizon)]
        given = {
            "state": state,
            "plan": self.plan,
            "white": p.noise(envs, self.model.spec.act, self.generator, self.like),
            "noise": draw(envs, w.particles),
            "cond": cond,
            "pinned": self._pinned(envs, cond),
            "proposals": [],
        }
        if p.proposals:
            n = envs * p.proposals
            like: dict[str, Any] = {"generator": self.generator, "dtype": self.like.dtype, "device": self.like.device}
            acts = [torch.randn(n, self.model.spec.act, **like) for _ in range(p.horizon)]
            given["proposals"] = list(zip(acts, draw(n, 1), strict=True))
        if envs not in self._graphs:
            self._graphs[envs] = devices.graphed(self._whole, given, fallback=True)
        found, plan, state = self._graphs[envs](given)
        acts, worth, some, bad = (x.clone() for x in found[:4])
        self.found = Found(acts, worth, some, bad, found[4])
        self.plan, self.state = pytree.tree_map(torch.clone, (Plan(*plan), state))
        self.new = torch.zeros_like(self.new)
        _count(self.counts, self.found)
        return self.found.acts[:, 0]

    @torch.no_grad()
    def _check_limit(self) -> None:
        """Raises ValueError where the learner does not tell what the limit is on."""
        p, spec, like = self.worth.particles, self.model.spec, self.like
        free = self.model.condition(self.ctx)
        state = repeat(self.model.init(like.new_zeros(1, spec.obs), free), p)
        inp = StepInput(
            like.new_zeros(p, spec.act), like.new_zeros(p, self.model.noise_dim), like.new_full((p, 1), self.dt)
        )
        told = lambda cond: self.model.step(state, inp, cond)[1].uncertainty
        part = torch.arange(p, device=like.device)
        name, has = self.worth.uncertainty, told(self.model.pinned(part) if self.pins else free)
        if name not in has:
            if self.pins and name in told(free):
                advice = "pass pinned=False (--worth.no-pinned; over a policy --over.pinned False)"
            elif has:
                advice = (
                    "name what it reports (--worth.uncertainty; over a policy --over.uncertainty), or set what it is "
                    "to report"
                )
            else:
                advice = (
                    "plan with a learner that reports it, as an ensemble does (dynamics:ensemble), or without a limit"
                )
            raise ValueError(
                f"Mpc: the limit is on {name!r}, the learner{' pinned to a part' * self.pins} reports "
                f"{', '.join(has) or 'none'}; {advice}"
            )

    def _parts(self, envs: int) -> Tensor:
        """Which part each particle keeps: all in turn, from one that is drawn. Parts are counted round, and how many
        there are (an ensemble's elites) is the learner's: so large a number is as good as uniform over any of them."""
        begin = torch.randint(2**31, (envs, 1), generator=self.generator, device=self.like.device)
        return (begin + torch.arange(self.worth.particles, device=self.like.device)).flatten()

    def _pinned(self, envs: int, cond: Tree) -> Tree:
        part = self._parts(envs)  # drawn in any case: what follows in the stream does not depend on it
        return self.model.pinned(part) if self.pins else cond

    def _whole(self, given: dict[str, Any]) -> tuple[tuple, tuple, Tree]:
        """A plan and what follows from executing its first action: one graph where there is an accelerator."""
        state, one, cond, model = given["state"], given["cond"], given["pinned"], self.model
        envs = given["plan"].mean.shape[0]
        dt = torch.full((envs, 1), self.dt, dtype=self.like.dtype, device=self.like.device)
        others = None
        if self.planner.proposals and self.policy is not None:
            others = propose(model, state, one, self.policy, given["proposals"], dt, self.planner.proposals)
        worth = lambda acts: value(
            self.worth, model, state, cond, acts, given["noise"], dt,
            reward=self.reward, terminal=self.terminal, critic=self.critic,
        )  # fmt: skip
        found, plan = search(self.planner, worth, given["plan"], given["white"], others)
        mean = torch.zeros(envs, model.noise_dim, dtype=dt.dtype, device=dt.device)
        state, _ = model.step(state, StepInput(found.acts[:, 0], mean, dt), one)
        return tuple(found), tuple(shift(self.planner, plan)), state


@torch.no_grad()
def _check_policy(obs: Tensor, act: Tensor, critic: Critic | None, policy: Any) -> None:
    """Tries what is to value and to propose on these rows [B, O] and [B, A]. Raises ValueError where it does not give
    [B] and [B, A]."""
    tries: list[tuple[str, Any, tuple[Tensor, ...], list[int]]] = [
        ("critic", critic, (obs,), [len(obs)]),
        ("policy", policy, (obs, act), list(act.shape)),
    ]
    for name, f, given, want in tries:
        if f is None:
            continue
        try:
            out = f(*given)
        except RuntimeError as error:
            raise ValueError(
                f"Mpc: the {name} cannot read the model's observations {list(obs.shape)} of {obs.dtype}: {error}"
            ) from error
        got = list(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        if got != want:
            raise ValueError(f"Mpc: for {len(obs)} rows the {name} returned {got}, expected {want}")


@dataclass(frozen=True)
class Follow:
    """How a context follows what control sees: each `every` steps of an environment, by `updates` steps of gradient
    descent on the latest `window` transitions of its episode, from the `keep` best, on these, of the last
    context and the learner's own."""

    window: int = 100
    every: int = 5
    updates: int = 20
    lr: float = 0.03
    keep: int = 3
    prior: float = 0.0
    """See `mbrl.adapt.adapt`."""

    def __post_init__(self) -> None:
        least = {"window": 1, "every": 1, "updates": 0, "keep": 1, "prior": 0}
        rules = [(k, getattr(self, k), f"at least {n}", getattr(self, k) >= n) for k, n in least.items()]
        demand("Follow", *rules, ("lr", self.lr, "a rate above 0", self.lr > 0))


@final
class Adapting:
    """An `Mpc` whose learner adapts its context within an episode, each environment's for itself; used as it is. An
    episode begins with the context `first` [1, C], by default the mean of those of the learner's systems. scale [O]:
    see `mbrl.adapt.adapt`."""

    def __init__(
        self, mpc: Mpc, follow: Follow | None = None, first: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        table = known(mpc.model)
        self.mpc, self.follow, self.scale = mpc, follow or Follow(), scale
        self.first = (table.mean(0, keepdim=True) if first is None else first).to(table)
        self.begin(0)

    @property
    def generator(self) -> torch.Generator:
        return self.mpc.generator

    @property
    def counts(self) -> dict[str, int]:
        return self.mpc.counts

    def begin(self, envs: int) -> None:
        """Forget everything: E new episodes."""
        self.mpc.begin(envs)
        self.seen = [self._window() for _ in range(envs)]
        self.steps = [0] * envs
        self.ctx = self.first.repeat(envs, 1)
        self.last: list[tuple[Tensor, Tensor] | None] = [None] * envs

    def rows(self, kept: Sequence[int], begun: int = 0) -> None:
        """As `Mpc.rows`."""
        self.mpc.rows(kept, begun)
        pick = lambda x, new: [x[i] for i in kept] + [new() for _ in range(begun)]
        self.seen, self.steps, self.last = (
            pick(self.seen, self._window),
            pick(self.steps, int),
            pick(self.last, lambda: None),
        )
        self.ctx = torch.cat([self.ctx[list(kept)], self.first.repeat(begun, 1)])

    def clear(self, ended: Tensor) -> None:
        """As `Mpc.clear`."""
        self.mpc.clear(ended)
        for i in ended.nonzero()[:, 0].tolist():
            self.seen[i], self.steps[i], self.last[i] = self._window(), 0, None
            self.ctx[i] = self.first[0]

    def __call__(self, obs: Tensor) -> Tensor:
        obs, f = obs.to(self.ctx), self.follow
        for i, now in enumerate(obs):
            if (last := self.last[i]) is not None:
                self.seen[i].append((*last, now))
                self.steps[i] += 1
                if self.steps[i] % f.every == 0:
                    self.ctx[i] = self._adapted(i)
        self.mpc.ctx = self.ctx.clone()
        act = self.mpc(obs)
        self.last = list(zip(obs.unbind(), act.unbind(), strict=True))
        return act

    def _window(self) -> deque[tuple[Tensor, Tensor, Tensor]]:
        """(obs, act, next obs) of the latest steps."""
        return deque(maxlen=self.follow.window)

    def _adapted(self, i: int) -> Tensor:
        """[C], from what environment i has shown."""
        before, act, after = (torch.stack(x)[:, None] for x in zip(*self.seen[i], strict=True))
        like = before[..., 0]
        segment = Segment(
            torch.cat([before, after], 1), act, torch.zeros_like(like), torch.zeros_like(like) > 0,
            torch.ones_like(like) > 0, torch.full_like(like, self.mpc.dt)[..., None],
            torch.zeros(1, dtype=torch.int64, device=like.device),
        )  # fmt: skip
        starts = torch.cat([self.ctx[i : i + 1], known(self.mpc.model)])
        f = self.follow
        return adapt(
            self.mpc.model, segment, starts=starts, keep=f.keep, updates=f.updates, lr=f.lr, scale=self.scale,
            prior=f.prior,
        ).ctx[0]  # fmt: skip


def over(
    agent: Any,
    seed: int,
    model: Dynamics,
    *,
    generator: torch.Generator,
    planner: Planner = LOOP,
    worth: Worth | None = None,
    reward: Reward | None = None,
    terminal: Terminal | None = None,
    dt: float = 1.0,
    critics: Literal["least", "mean"] = "least",
) -> Mpc:
    """Planning over a policy that was learned, at test time (LOOP: Sikchi et al., CoRL 2021): the agent, a
    `mbrl.sac.Sac`, proposes, and the least of its critics values what comes after the horizon, or their mean (TD-MPC2,
    Hansen et al., ICLR 2024, draws two for it; an agent has two). seed: which of the agent's seeds. worth: by default
    the agent's discount, 5 particles and mean - std over them. dt: as stored with the model's data."""
    if (agent.spec.obs, agent.spec.act) != (model.spec.obs, model.spec.act):
        raise ValueError(
            f"over: the agent is of {agent.spec.obs} observations and {agent.spec.act} actions, the model of "
            f"{model.spec.obs} and {model.spec.act}; expected the same of both"
        )
    one = agent.one(seed)
    worth = worth or worth_over(agent.config.gamma)
    policy = lambda obs, noise: one.act(obs[None], noise[None])[0]
    both = {"least": torch.amin, "mean": torch.mean}[critics]
    critic = lambda obs: both(one.q(obs[None], one.act(obs[None])), 1)[0]
    return Mpc(
        planner, worth, model, generator=generator, reward=reward, terminal=terminal, critic=critic, policy=policy,
        dt=dt,
    )  # fmt: skip


def worth_over(gamma: float) -> Worth:
    """What plans over a policy of this discount are worth, unless something else is asked for."""
    return Worth(discount=gamma, particles=5, pessimism=1.0)


@final
class ByValue:
    """Control of one environment by whatever can value plans: value(acts [1, N, H, A]) -> [1, N], from the state in
    which the environment is now. With a true simulator it is the upper bound of what a planner can reach. Used as `Mpc`
    is, on the CPU."""

    def __init__(
        self, planner: Planner, value: Callable[[Tensor], Tensor], act: int, generator: torch.Generator
    ) -> None:
        if planner.proposals:
            raise ValueError(f"ByValue: the planner wants {planner.proposals} proposals a plan, and there is no policy")
        if planner.gradient_steps:
            raise ValueError(
                f"ByValue: the planner wants {planner.gradient_steps} gradient steps, and a value from outside torch "
                "has no gradient"
            )
        self.planner, self.value, self.act, self.generator = planner, value, act, generator
        self.counts = {"bad": 0, "seen": 0, "lost": 0}
        self.begin()

    def begin(self, envs: int = 1) -> None:
        """Forget everything: a new episode."""
        if envs != 1:
            raise ValueError(f"ByValue: got {envs} environments, expected 1")
        self.plan = fresh(self.planner, 1, self.act, torch.zeros(()))

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        noise = self.planner.noise(1, self.act, self.generator, self.plan.mean)
        found, plan = search(self.planner, lambda acts: self.value(acts).to(acts), self.plan, noise)
        self.plan = shift(self.planner, plan)
        _count(self.counts, found)
        return found.acts[:, 0]


def _count(counts: dict[str, int], found: Found) -> None:
    counts["bad"] += int(found.bad.sum())
    counts["seen"] += found.seen * len(found.some)
    counts["lost"] += int((~found.some).sum())


def shares(counts: Mapping[str, int], before: Mapping[str, int] | None = None) -> dict[str, float]:
    """What a log says of a controller's counts since there were those before: the share of candidates that were not
    finite, and how many plans were lost."""
    since = {k: n - (before or {}).get(k, 0) for k, n in counts.items()}
    return {"not_finite": since["bad"] / max(1, since["seen"]), "lost": float(since["lost"])}


# ---------------------------------------------------------------- episodes


@dataclass(frozen=True)
class Episode:
    """T steps of one environment: what a dataset is made of."""

    obs: Tensor  # [T + 1, O]
    act: Tensor  # [T, A] in [-1, 1]
    reward: Tensor  # [T]
    terminal: bool

    @property
    def total(self) -> float:
        """The undiscounted return."""
        return float(self.reward.double().sum())


def episode(env: Env, act: Act, seed: int, steps: int | None = None, told: Told | None = None) -> Episode:
    """One episode from reset(seed=seed), to its end or for so many steps. act: obs [1, O] -> [1, A] in [-1, 1]. told:
    after each step but the last, how many there were, of how many, and the return so far.

    Raises ValueError where the environment gives an observation or a reward that is not finite, or, without `steps`,
    no end and states no limit."""
    world, limit = World(env), getattr(getattr(env, "spec", None), "max_episode_steps", None)
    seen, acts, rewards = [torch.from_numpy(world.reset(seed))], [], []
    terminated, truncated, earned = False, False, 0.0
    while not (terminated or truncated or len(acts) == steps):
        acts.append(act(seen[-1][None])[0].detach().cpu().clamp(-1, 1).float())
        obs, reward, terminated, truncated = world.step(acts[-1].numpy())
        rewards.append(reward)
        seen.append(torch.from_numpy(obs))
        earned += reward
        if told is not None and not (terminated or truncated or len(acts) == steps):
            told(len(acts), steps or limit, earned)
        if len(acts) == ENDLESS and steps is None and not (limit is not None or terminated or truncated):
            raise ValueError(
                f"environment: an episode took {ENDLESS} steps and the environment states no limit; wrap it in "
                "gymnasium's TimeLimit, or name one with its id, as in 'Id-v0{\"max_episode_steps\": 1000}'"
            )
    return Episode(torch.stack(seen), torch.stack(acts), torch.tensor(rewards), terminated)


def telling(record: Record) -> Told:
    """How an episode tells a record how far it is."""
    return lambda step, of, earned: record.progress("step", step, of, {"return": earned})


def gathered(episodes: Sequence[Episode], world: World, name: str = "") -> Dataset:
    """Episodes of an environment as one dataset, on the CPU."""
    lengths = torch.tensor([0] + [len(e.act) for e in episodes])
    ends = lengths.cumsum(0)
    n = int(ends[-1])
    terminal = torch.zeros(n, dtype=torch.bool)
    for e, end in zip(episodes, ends[1:].tolist(), strict=True):
        terminal[end - 1] = e.terminal
    join = lambda f: torch.cat([f(e) for e in episodes])
    bound = lambda x: torch.as_tensor(x, dtype=torch.float32)
    return Dataset(
        join(lambda e: e.obs[:-1]), join(lambda e: e.act), join(lambda e: e.reward), join(lambda e: e.obs[1:]),
        terminal, torch.ones(n, dtype=torch.bool), ends, bound(world.low), bound(world.high), name=name, sha256="",
    )  # fmt: skip


# ---------------------------------------------------------------- PETS


@dataclass(frozen=True)
class PetsConfig:
    """Random episodes, then: fit, plan for an episode, and again. The learner is fitted anew from where it stands."""

    planner: Planner = ICEM
    worth: Worth = field(default_factory=lambda: Worth(particles=5))
    random: int = 1
    """Episodes of random actions at first."""
    episodes: int = 10
    """Episodes under the planner."""
    fitting: FitConfig = field(default_factory=lambda: FitConfig(batch=32, holdout=0.1, patience=20, max_epochs=100))

    def __post_init__(self) -> None:
        if self.random < 1 or self.episodes < 0:
            raise ValueError(f"PetsConfig: got random {self.random}, episodes {self.episodes}; expected >= 1 and >= 0")
        check_fit(self.fitting)


@dataclass(frozen=True)
class PetsResult:
    """returns: of every episode, the random ones first, as (environment steps so far, return)."""

    model: Dynamics
    data: Dataset
    returns: list[tuple[int, float]]
    mpc: Mpc


def pets(
    config: PetsConfig,
    env: Env,
    dynamics: Any,
    *,
    seed: int,
    record: Record | None = None,
    reward: Reward | None = None,
    terminal: Terminal | None = None,
    ends: bool = True,
    device: torch.device | str = "cpu",
) -> PetsResult:
    """Learn to control an environment with a model that is fitted to what the control has seen.

    dynamics: a learner's config, `build(spec, generator)`. reward, terminal: the task's functions; without a reward
    the learner's head serves, without a termination one is learned where `ends` and some episode has ended. After each
    episode the state goes to the record; a record that holds one makes this call go on from there to the same numbers
    (episode i is reset with `episode_seed(seed, i)`, and has a random stream of its own).

    Raises ValueError for spaces that do not fit, for a record of other settings or another seed, and where the
    environment gives what is not finite."""
    check_config("pets", config, PetsConfig)
    check_learner(dynamics)
    world, record = World(env), record or Forget()
    done: list[Episode] = []
    model = dynamics.build(world.spec, devices.generator(seed)).to(device)
    end, mine = terminal, digest(config, dynamics, seed)
    if (kept := record.load("pets")) is not None:
        check_whose(kept[1], mine, "a run of other settings or seeds")
        done = _unpacked(*kept)
        if found := weights(kept[0]):
            model.load_state_dict(found)
        end = terminal or learned_end(kept[0], world.spec, device)
    steps, total = sum(len(e.act) for e in done), config.random + config.episodes
    control = Mpc(config.planner, config.worth, model.eval(), reward=reward, terminal=end)
    for i in range(len(done), total):
        learned = i >= config.random
        if learned:
            stream = devices.generator(episode_seed(seed, i), device)
            data = gathered(done, world).to(device)
            if len(data) < 2:
                raise ValueError(
                    f"pets: the {config.random} random episodes hold {len(data)} transitions, too few for a model; "
                    "set `random` (--random) to more"
                )
            told = lambda epoch, of, figures: record.progress("model", epoch, of, figures)
            report = fit(model.train(), data, config.fitting, stream, told)
            record.log("model", steps, {"error": min(report.best), "epochs": float(report.epochs)})
            end = terminal
            if end is None and ends and data.terminal.any():
                end = fit_terminal(data, TerminalConfig(), stream)
            control = Mpc(config.planner, config.worth, model.eval(), generator=stream, reward=reward, terminal=end)
            control.begin(1)
            act = lambda obs, control=control: control(obs.to(device))
        else:
            stream = devices.generator(episode_seed(seed, i))
            act = lambda obs, stream=stream: 2 * torch.rand(1, world.spec.act, generator=stream) - 1
        new = episode(env, act, episode_seed(seed, i), told=telling(record))
        done.append(new)
        steps += len(new.act)
        figures = {"return": new.total, "length": float(len(new.act))}
        tensors, facts = _packed(done)
        facts["of"] = mine
        if learned:
            if control.counts["lost"] == len(new.act):
                warnings.warn(
                    f"pets: all {len(new.act)} plans of episode {i + 1} were lost, no candidate's worth was finite: "
                    "either the reward function is not, or the model has diverged",
                    stacklevel=2,
                )
            figures |= shares(control.counts)
            tensors |= {f"model.{k}": v for k, v in model.state_dict().items()}
            if isinstance(end, TerminalHead):
                tensors |= {f"terminal.{k}": v for k, v in end.state_dict().items()}
        record.log("episode", steps, figures)
        record.progress("episode", i + 1, total, {"return": new.total})
        record.save("pets", tensors, facts)
    lengths = torch.tensor([len(e.act) for e in done]).cumsum(0).tolist()
    returns = [(n, e.total) for n, e in zip(lengths, done, strict=True)]
    return PetsResult(model, gathered(done, world), returns, control)


def weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of what `pets` saves, the model's state; {} where none was fitted yet."""
    return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}


def learned_end(tensors: Mapping[str, Tensor], spec: Spec, device: torch.device | str) -> TerminalHead | None:
    """Of what `pets` saves, the termination that was learned last; None where none was."""
    found = {k.removeprefix("terminal."): v for k, v in tensors.items() if k.startswith("terminal.")}
    if not found:
        return None
    return restored(found, spec, TerminalConfig()).to(device)


def _packed(episodes: Sequence[Episode]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    join = lambda f: torch.cat([f(e) for e in episodes])
    tensors = {"obs": join(lambda e: e.obs), "act": join(lambda e: e.act), "reward": join(lambda e: e.reward)}
    return tensors, {"lengths": [len(e.act) for e in episodes], "terminal": [e.terminal for e in episodes]}


def _unpacked(tensors: dict[str, Tensor], facts: dict[str, Any]) -> list[Episode]:
    n = facts["lengths"]
    obs = tensors["obs"].split([x + 1 for x in n])
    parts = zip(obs, tensors["act"].split(n), tensors["reward"].split(n), facts["terminal"], strict=True)
    return [Episode(o.clone(), a.clone(), r.clone(), bool(t)) for o, a, r, t in parts]
