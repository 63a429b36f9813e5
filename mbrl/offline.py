"""The one offline loop: starts from the data, imagined rollouts, penalise or truncate by uncertainty, a policy update.

MOPO (Yu et al., NeurIPS 2020), MOReL (Kidambi et al., NeurIPS 2020), MOBILE (Sun et al., ICML 2023), MOREC (Luo et
al., ICLR 2024), behaviour cloning and TD3+BC (Fujimoto & Gu, NeurIPS 2021) are settings of it, see `PRESETS`.
Environments stay outside: termination, reward and evaluation come in as functions.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mbrl import device as devices
from mbrl.baselines import BcConfig, Td3BcConfig
from mbrl.core import (
    Diverged,
    Dynamics,
    Segment,
    Spec,
    StepInput,
    check_functions,
    check_learner,
    check_reward,
    repeat,
    rows,
)
from mbrl.data import Buffer, Dataset, Transitions
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.filtered import DynamicsReward, FilterConfig, Filtered, RewardConfig, fit_reward, unfiltered
from mbrl.fit import FitConfig, check_fit, fit
from mbrl.rollout import Reward, Terminal, imagine
from mbrl.sac import Sac, SacConfig, local_lipschitz, value_aware_error
from mbrl.terminal import TerminalConfig, fit_terminal, restored

Policy = Callable[[Tensor], Tensor]  # obs [n, O] -> act [n, A]
Evaluate = Callable[[Policy], Any]  # -> undiscounted returns [episodes]
VALUED = 2**14  # states at most that a CPU values at a time: a batch of rollouts has millions for MOBILE's penalty
PROBE = 1000  # transitions at most from which the value's steepness and the model's error are read


# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Penalty:
    """reward - coefficient * uncertainty."""

    coefficient: float = 0.0
    name: str = "aleatoric"
    """One of the learner's uncertainties, or "bellman": the standard deviation over the learner's parts of the mean
    target value of their next states (MOBILE). It is taken when a transition is imagined, with the targets of then;
    the authors' code takes it anew for every batch, at the cost of an evaluation of the whole ensemble an update."""
    samples: int = 10
    """Next states a part, for "bellman"."""
    scaled: bool = False
    """The coefficient is in standard deviations of the data's reward for an uncertainty as large as its mean over the
    data's transitions, so that one number serves data of any units. Not for "bellman", whose units are the reward's."""

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient < math.inf or self.samples < 1:
            raise ValueError(
                f"Penalty: got {self.coefficient} and {self.samples} samples, expected a finite number >= 0, and >= 1"
            )
        if self.scaled and self.name == "bellman":
            raise ValueError("Penalty: scaled goes with a learner's uncertainty, not with 'bellman'; leave one out")


@dataclass(frozen=True)
class Truncation:
    """A rollout ends with the first transition whose uncertainty is above the threshold."""

    name: str = "implausibility"
    threshold: float = math.inf
    relative: bool = False
    """The threshold is in units of the uncertainty of the model's own steps from the data's states under the data's
    actions (20 000 of them, where there are more; the finite ones): of the largest (MOReL), or of `quantile`."""
    then: Literal["terminal", "bootstrap", "drop"] = "terminal"
    """The cut transition is stored as an end without a value after it, as one with a value, or not at all. Where going
    on as the data do is worth less than nothing, "terminal" would pay for being cut: there the value after it is
    `worth_of_going_on`."""
    reward: float | None = None
    """The reward of the cut transition; as predicted where None (MOReL gives a large negative one)."""
    quantile: float = field(default=1.0, metadata={"added": True})
    """Which quantile of that uncertainty a relative threshold is in units of: with 0.99 and a threshold of 1, one in a
    hundred of the model's steps from where the data go is cut, whatever the uncertainty's units. It may be more of the
    data's own transitions, where the uncertainty reads the next state: a filter's candidates are the likely ones."""

    def __post_init__(self) -> None:
        if self.then not in ("terminal", "bootstrap", "drop"):
            raise ValueError(f"Truncation: then is {self.then!r}, expected 'terminal', 'bootstrap' or 'drop'")
        if math.isnan(self.threshold):
            raise ValueError("Truncation: threshold is nan, which cuts nothing; expected a number, or no truncation")
        if not 0 < self.quantile <= 1:
            raise ValueError(f"Truncation: quantile is {self.quantile}, expected a share in (0, 1]")
        if self.quantile < 1 and not self.relative:
            raise ValueError("Truncation: a quantile is what a relative threshold is in units of; set relative, too")


@dataclass(frozen=True)
class Morec:
    """A dynamics reward, fitted against the learner, that chooses among its candidates."""

    reward: RewardConfig = field(default_factory=RewardConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)


@dataclass(frozen=True)
class Imagination:
    """Rollouts of the policy in the learned model."""

    horizon: int = 5
    rollouts: int = 50_000
    """Start states, drawn from the data, each time."""
    budget: int | None = None
    """No new chunk of starts once so many transitions have been kept: short rollouts make room for more of them."""
    every: int = 1_000
    """Updates from one batch of rollouts to the next."""
    retain: int = 5
    """How many such batches the buffer holds."""
    block: int = 5
    """Steps between two clearings of rows that have ended. It changes no number but the random stream."""
    chunk: int = 10_000
    """Rows a call of the model."""
    penalty: Penalty = field(default_factory=Penalty)
    truncation: Truncation | None = None
    morec: Morec | None = None
    floor: bool = False
    """Targets of values are kept >= 0, as MOBILE does; not where the data's mean reward is negative, since there
    the bound would be false."""

    def share(self, n: int, systems: int, system: int) -> int:
        """Of n, what falls to one of the data's systems."""
        return (n + systems - 1 - system) // systems

    def most(self, systems: int = 1) -> int:
        """How many transitions a batch of rollouts may hold: each system's last chunk may begin just below its share
        of the budget."""
        starts = 0
        for system in range(systems):
            own = self.share(self.rollouts, systems, system)
            if self.budget is not None:
                own = min(own, -(-self.share(self.budget, systems, system) // self.horizon) + self.chunk)
            starts += own
        return starts * self.horizon


@dataclass(frozen=True)
class OfflineConfig:
    """A policy learner and what it learns from. Without imagination it sees the data alone."""

    agent: SacConfig | BcConfig | Td3BcConfig = field(default_factory=SacConfig)
    imagination: Imagination | None = field(default_factory=Imagination)
    updates: int = 100_000
    batch: int = 256
    real_ratio: float = 0.05
    """The share of a batch that comes from the data."""
    evaluate_every: int = 5_000
    save_every: int = field(default=5_000, metadata={"added": True})
    """State is saved at the first evaluation so many updates after it was last saved, and at the end. With it goes a
    line of metrics, "probe": what `mbrl.sac.local_lipschitz` finds on transitions of the data, and `value_aware_error`,
    as "value_error", of the models, which have seen these."""
    log_every: int = 1_000


# Published: plain SAC on raw observations, actor and temperature at 1e-4 from a temperature of 1, a twentieth of real
# rows, over three million updates. In the 100 000 of these settings MOREC-MOPO keeps no hopper up that way. So every
# algorithm that learns in a model has the same agent, quicker, and kept near to what the data did where they show one
# way to act; none is ahead by it. `PUBLISHED` is without.
PUBLISHED = SacConfig()
_AGENT = SacConfig(actor_lr=3e-4, alpha_lr=3e-4, init_alpha=0.2, normalize=True, cloning=1.5)
_POLICY: dict[str, Any] = {"agent": _AGENT, "real_ratio": 0.25}
MOPO = OfflineConfig(imagination=Imagination(penalty=Penalty(2.5)), **_POLICY)
MOREL = OfflineConfig(
    **_POLICY,
    imagination=Imagination(
        truncation=Truncation("disagreement", 1.0, relative=True, reward=-10.0), horizon=100, rollouts=2_000
    ),
)
MOBILE = OfflineConfig(
    agent=replace(_AGENT, deterministic_backup=True),
    real_ratio=_POLICY["real_ratio"],
    imagination=Imagination(penalty=Penalty(1.0, "bellman"), floor=True, rollouts=10_000),
)
# Published: r_D < 0.6 cuts. Where that lies depends on what the discriminator was told to tell apart: with this reward
# it let half-cheetahs learn to earn what they did not get. One in a thousand of the filtered model's steps from the
# data's states is a bound that means the same for every dataset and reward. (One in a hundred cut hoppers wherever they
# touched the ground.)
_CUT = Truncation("implausibility", 1.0, relative=True, quantile=0.999)
# Published: 2000 starts of up to 100 steps. Over so many a half-cheetah may still learn to earn what it does not get,
# for all that cuts; over 20 it did not. Starts are drawn up to a budget, at a known cost, since many are cut before.
# Released: a cut is stored as an end whose target is max(0, r - penalty). Here it is an end, too, but no target has a
# floor: where rewards are negative on the average, an end at 0 would be the best there is (`Truncation`).
_LONG: dict[str, Any] = {"horizon": 20, "rollouts": 5_000, "budget": 20_000, "chunk": 250}
MOREC_MOPO = OfflineConfig(
    **_POLICY,
    imagination=Imagination(morec=Morec(), penalty=Penalty(1.0, scaled=True), truncation=_CUT, **_LONG),
)
# As near to the paper as it can be known, for ablations: the adversarial game with a generator that is trained, the
# plain discriminator, r_D itself as the softmax's weights, targets that are not below 0. Ten snapshots stand for the
# paper's forty, for their cost; its entropy term on the discriminator is left out.
_PLAIN = RewardConfig(generator="trained", anchors=0, spread=0.0, penalty=0.0, updates=6_000)
MOREC_PUBLISHED = OfflineConfig(
    agent=PUBLISHED,
    imagination=Imagination(
        morec=Morec(_PLAIN, FilterConfig(choice="published")),
        penalty=Penalty(0.5, scaled=True),
        truncation=Truncation("implausibility", math.log(1 + math.e) - 0.6),
        floor=True,
        horizon=100,
        rollouts=2_000,
    ),
)
MOREC_MOBILE = replace(
    MOBILE,
    imagination=Imagination(morec=Morec(), penalty=Penalty(0.5, "bellman"), floor=True, truncation=_CUT, **_LONG),
)
# Agent and share of real rows as published, for comparisons.
MOPO_PUBLISHED = replace(MOPO, agent=PUBLISHED, real_ratio=0.05)
MOBILE_PUBLISHED = replace(MOBILE, agent=replace(PUBLISHED, deterministic_backup=True), real_ratio=0.05)
BC = OfflineConfig(agent=BcConfig(), imagination=None, real_ratio=1.0)
TD3_BC = OfflineConfig(agent=Td3BcConfig(), imagination=None, real_ratio=1.0)
PRESETS: dict[str, OfflineConfig] = {
    "morec-mopo": MOREC_MOPO,
    "morec-mobile": MOREC_MOBILE,
    "morec-published": MOREC_PUBLISHED,
    "mopo": MOPO,
    "mopo-published": MOPO_PUBLISHED,
    "morel": MOREL,
    "mobile": MOBILE,
    "mobile-published": MOBILE_PUBLISHED,
    "bc": BC,
    "td3-bc": TD3_BC,
}


# ---------------------------------------------------------------- what a loop tells and keeps


class Record(Protocol):
    """Where a loop's numbers and its state go. `mbrl.run.Run` is one on disk; this one forgets."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step of a stage."""

    def progress(self, stage: str, step: int, total: int | None, values: Mapping[str, float]) -> None:
        """How far a stage is."""

    def save(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep tensors and plain facts under a name, all or nothing."""

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept under a name, if anything was."""


class Forget:
    """A record that keeps nothing."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...
    def progress(self, stage: str, step: int, total: int | None, values: Mapping[str, float]) -> None: ...
    def save(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None: ...
    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None: ...


class Laps:
    """Where the time goes: each call adds the seconds since the last one to a name's sum."""

    def __init__(self, device: torch.device | None = None) -> None:
        """device: waited for before the clock is read."""
        self.seconds: dict[str, float] = {}
        self.device, self.last = device, time.perf_counter()

    def __call__(self, name: str) -> None:
        if self.device is not None:
            devices.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


@dataclass(frozen=True)
class Result:
    """What came out. returns: per evaluation, (updates, returns [S, episodes])."""

    agent: Any
    models: Sequence[Dynamics]
    returns: list[tuple[int, list[list[float]]]]
    seconds: dict[str, float]

    def last(self, n: int = 10) -> Tensor:
        """[S]: each seed's mean return over the last n evaluations. Not the best: the last. Raises ValueError where
        there is none."""
        if n < 1 or not self.returns:
            raise ValueError(
                f"last: got n={n} of {len(self.returns)} evaluations, expected one or more; pass `evaluate`"
            )
        return torch.tensor([r for _, r in self.returns[-n:]]).mean((0, 2))


def digest(*parts: Any) -> str:
    """Twelve hexadecimal digits that name what was fitted: the same data, settings and seed, the same name. A setting
    that came later (`added` in its field's metadata) is left out while it holds its default, so that names stay. Of
    settings within settings the type is told where an earlier one that may stand there has the same fields, or any
    may."""
    fields_of = lambda cls: [(f.name, f.type) for f in dataclasses.fields(cls)]

    def plain(x: Any, hint: Any = None) -> Any:
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            kept = (
                f for f in dataclasses.fields(x) if not (f.metadata.get("added") and getattr(x, f.name) == f.default)
            )
            earlier = itertools.takewhile(lambda t: t is not type(x), get_args(hint))
            alike = hint is Any or any(dataclasses.is_dataclass(t) and fields_of(t) == fields_of(x) for t in earlier)
            told = {"_": type(x).__name__} if alike else {}
            return {f.name: plain(getattr(x, f.name), f.type) for f in kept} | told
        if isinstance(x, list | tuple):
            return [plain(y) for y in x]
        return {k: plain(y) for k, y in x.items()} if isinstance(x, Mapping) else x

    def named(x: Any) -> Any:
        return plain(x) | {"_": type(x).__name__} if dataclasses.is_dataclass(x) and not isinstance(x, type) else x

    text = json.dumps([named(x) for x in parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---------------------------------------------------------------- the stages before the policy


def fitted_name(kind: str, sha256: str, steps: int, *settings: Any) -> str:
    """Under which a record keeps what was fitted to so many steps of these data. settings: the fit's, its seed last."""
    return f"{kind}-{digest(sha256, steps, *settings)}"


def learn_model(data: Dataset, dynamics: Any, config: FitConfig, seed: int, record: Record) -> Dynamics:
    """The fitted learner: from the record where it holds one, else fitted (and resumed where that was interrupted)."""
    like = data.obs
    name = fitted_name("model", data.sha256, len(data), dynamics, config, seed)
    generator = devices.generator(seed, like.device)
    model = dynamics.build(data.spec, generator).to(like)
    if kept := record.load(name):
        model.load_state_dict(kept[0])
        return model.eval()
    keep = lambda state: record.save(f"{name}.partial", state, {})
    partial = record.load(f"{name}.partial")
    told = lambda step, total, values: tell(record, "model", step, total, values)
    report = fit(model, data, config, generator, progress=told, checkpoint=keep, resume=partial[0] if partial else None)
    record.save(name, model.state_dict(), dataclasses.asdict(report))
    return model.eval()


def learn_reward(
    model: Dynamics, data: Dataset, dynamics: Any, fitting: FitConfig, config: RewardConfig, seed: int, record: Record
) -> DynamicsReward:
    """The dynamics reward fitted against the model, by the same rules as `learn_model`."""
    like = data.obs
    name = fitted_name("reward", data.sha256, len(data), dynamics, fitting, config, seed)
    if kept := record.load(name):
        reward = config.build(data.spec).to(like)
        reward.load_state_dict(kept[0])
        return reward.eval()
    keep = lambda state: record.save(f"{name}.partial", state, {})
    partial = record.load(f"{name}.partial")
    told = lambda step, total, values: tell(record, "reward", step, total, values)
    reward = fit_reward(
        model,
        data,
        config,
        devices.generator(seed + 1, like.device),
        progress=told,
        checkpoint=keep,
        resume=partial[0] if partial else None,
    )
    record.save(name, reward.state_dict(), {})
    return reward.eval()


def check_whose(facts: Mapping[str, Any], whose: str, other: str) -> None:
    """Raises ValueError where a record's facts are of another digest than this run's; those from before there was one
    pass. other: what it then holds."""
    if facts.get("of", whose) != whose:
        raise ValueError(f"record: it holds {other}; continue that with its own, or take a new record")


def learn_terminal(data: Dataset, config: TerminalConfig, seed: int, record: Record) -> Terminal:
    """A termination head, for a source whose termination nobody has written down."""
    name = fitted_name("terminal", data.sha256, len(data), config, seed)
    if kept := record.load(name):
        return restored(kept[0], data.spec, config).to(data.obs)
    head = fit_terminal(data, config, devices.generator(seed + 2, data.obs.device))
    figures = {"endings": float(head.endings), "accuracy": float(head.accuracy)}
    tell(record, "terminal", config.steps, config.steps, {k: v for k, v in figures.items() if not math.isnan(v)})
    record.save(name, head.state_dict(), {})
    return head


def tell(record: Record, stage: str, step: int, total: int | None, values: Mapping[str, float]) -> None:
    """To the display and to the log."""
    record.progress(stage, step, total, values)
    record.log(stage, step, values)


# ---------------------------------------------------------------- imagined transitions


def bellman_inconsistency(
    agent: Sac, model: Dynamics, state: Any, act: Tensor, dt: Tensor, cond: Any, noise: Tensor, act_noise: Tensor
) -> Tensor:
    """[B]: the standard deviation (unbiased) over the learner's parts of the mean target value of their next states,
    under actions that the policy draws there (MOBILE, Sun et al. 2023); 0 for a learner of one part. agent: of one
    seed. noise: [B, k * W] of k futures; act_noise: [B * k, A], the same for every part, so that they differ by their
    states alone. A filter is looked through: the parts are the inner learner's."""
    model = unfiltered(model)
    k = noise.shape[1] // model.noise_dim if model.noise_dim else 1
    after = model.each(state, StepInput(act, noise, dt), cond, k).obs  # [P, B * k, O]
    parts, n, _ = after.shape
    flat, z = after.flatten(0, 1)[None], act_noise.repeat(parts, 1)[None]  # [1, P * B * k, O], [1, P * B * k, A]
    most = VALUED if flat.is_cpu else flat.shape[1]
    pieces = zip(flat.split(most, 1), z.split(most, 1), strict=True)
    value = torch.cat([agent.q(x, agent.act(x, e), target=True)[0].amin(0) for x, e in pieces])
    mean = value.reshape(parts, n // k, k).mean(-1)
    return mean.std(0) if parts > 1 else torch.zeros_like(mean[0])


def truncate(
    segment: Segment, doubt: Tensor, limit: float, config: Truncation, after: float = 0.0
) -> tuple[Segment, Tensor, Tensor]:
    """Ends every row with its first transition whose doubt [B, T] exceeds the limit. Returns the Segment with what
    follows the cut masked (and the cut itself, where it is dropped), the rows that were cut [B], and the number of
    transitions that were alive before [B]."""
    cut = (doubt > limit) & segment.mask  # [B, T]
    seen = cut.cumsum(1)
    first = cut & (seen == 1)
    mask = segment.mask & ((seen == 0) | first)
    reward, terminal = segment.reward, segment.terminal
    if config.reward is not None:
        reward = torch.where(first, torch.full_like(reward, config.reward), reward)
    if config.then == "terminal":
        reward = torch.where(first & ~terminal, reward + after, reward)
        terminal = terminal | first
    elif config.then == "drop":
        mask = mask & ~first
    return segment._replace(mask=mask, reward=reward, terminal=terminal), cut.any(1), segment.mask.sum(1)


@torch.no_grad()
def rollouts(
    agent: Sac,
    model: Dynamics,
    data: Dataset,
    terminal: Terminal,
    reward: Reward | None,
    config: Imagination,
    limit: float,
    generator: torch.Generator,
    unit: float = 1.0,
    after: float = 0.0,
) -> Iterator[tuple[Transitions, dict[str, float]]]:
    """Batches of imagined transitions, a block of steps at a time, with what to log of them. agent: of one seed.
    Where the data hold several systems, as many rollouts of each, under its own context.
    limit: of `truncation`, in the uncertainty's own units; unit: what the penalty's coefficient is multiplied by;
    after: what the reward of a cut that is stored as an end stands for besides itself."""
    given = (agent, model, data, terminal, reward, config, limit, generator, unit, after)
    for system, pool in enumerate(data.of_system(data.paired.nonzero()[:, 0])):
        yield from _rollouts_of(system, pool, *given)


def _rollouts_of(
    system: int,
    starts: Tensor,
    agent: Sac,
    model: Dynamics,
    data: Dataset,
    terminal: Terminal,
    reward: Reward | None,
    config: Imagination,
    limit: float,
    generator: torch.Generator,
    unit: float,
    after: float,
) -> Iterator[tuple[Transitions, dict[str, float]]]:
    """The share of one of the data's systems, from its own rows."""
    device = data.obs.device
    act_dim, horizon = data.spec.act, config.horizon
    core = unfiltered(model)
    share = lambda n: config.share(n, data.systems, system)
    drawn = starts[torch.randint(len(starts), (share(config.rollouts),), generator=generator, device=device)]
    made, which = 0, torch.tensor([system], device=device)
    for index in drawn.split(config.chunk):
        if config.budget is not None and made >= share(config.budget):
            return
        n = len(index)
        cond = model.condition(model.context(which).to(data.obs))
        state = model.init(data.obs[index], cond)
        alive = torch.ones(n, dtype=torch.bool, device=device)
        step = 0
        while step < horizon and len(alive):
            n, block = len(alive), min(config.block, horizon - step)
            dt = torch.full((n, 1), data.dt, dtype=data.obs.dtype, device=device)
            normal = lambda n=n: torch.randn(n, act_dim, generator=generator, dtype=data.obs.dtype, device=device)
            noise = ((normal(), model.draw(n, 1, generator)) for _ in range(block))
            policy = lambda obs, z: agent.act(obs[None], z[None])[0]
            state, alive, segment, doubts = imagine(model, policy, terminal, state, alive, noise, dt, cond, which)
            log: dict[str, float] = {}
            if reward is not None:
                flat = (segment.obs[:, :-1].flatten(0, 1), segment.act.flatten(0, 1), segment.obs[:, 1:].flatten(0, 1))
                segment = segment._replace(reward=reward(*flat).reshape(n, block))
            penalty = config.penalty
            if penalty.coefficient and penalty.name == "bellman":
                obs, act = segment.obs[:, :-1].flatten(0, 1), segment.act.flatten(0, 1)
                z = core.draw(n * block, penalty.samples, generator)
                seen = core.init(obs, cond)  # a latent state is read anew from what was observed
                z_act = normal(n * block * penalty.samples)
                doubts["bellman"] = bellman_inconsistency(
                    agent, core, seen, act, repeat(dt, block), cond, z, z_act
                ).reshape(n, block)
            if penalty.coefficient:
                doubt = _named(doubts, penalty.name)
                segment = segment._replace(reward=segment.reward - penalty.coefficient * unit * doubt)
            cut, ends = torch.zeros_like(alive), segment.terminal
            if config.truncation is not None:
                doubt = _named(doubts, config.truncation.name)
                segment, cut, _ = truncate(segment, doubt, limit, config.truncation, after)
                alive = alive & ~cut
            wrong = segment.mask & ~segment.reward.isfinite()  # an infinite doubt, penalised: as a prediction that is
            segment = segment._replace(mask=segment.mask & (wrong.cumsum(1) == 0))  # not finite, the row ends before it
            alive = alive & ~wrong.any(1)
            ended, keep = float((ends & segment.mask).sum()), segment.mask.flatten()
            flat = Transitions(
                segment.obs[:, :-1].flatten(0, 1),
                segment.act.flatten(0, 1),
                segment.reward.flatten(),
                segment.obs[:, 1:].flatten(0, 1),
                segment.terminal.flatten().to(segment.obs),
            )
            kept = Transitions(*(x[keep] for x in flat))
            made += len(kept.obs)
            log = {
                "starts": float(len(index) if step == 0 else 0),
                "transitions": float(len(kept.obs)),
                "cut": float(cut.sum()),
                "ended": ended,
                "reward_sum": float(kept.reward.double().sum()),
            } | {f"{name}_sum": float(x.flatten()[keep].double().sum()) for name, x in doubts.items()}
            yield kept, log
            step += block
            if model_is_free(cond):
                left = alive.nonzero()[:, 0]
                state, alive = rows(state, left), alive[left]


def model_is_free(cond: Any) -> bool:
    """Whether every leaf of a condition leads with 1 (or there is none), so that single rows may be dropped."""
    return all(x.shape[0] == 1 for x in pytree.tree_leaves(cond))


def _named(doubts: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in doubts:
        raise ValueError(
            f"uncertainty {name!r} is not one that the model has: got {sorted(doubts) or 'none'}; name one of these, "
            "or take the penalty's coefficient 0 and no truncation by it"
        )
    return doubts[name]


def uncertainty_limit(model: Dynamics, data: Dataset, config: Truncation, generator: torch.Generator) -> float:
    """The threshold in the uncertainty's own units. Warns where a bounded uncertainty lies at its bound for so many of
    the steps that the quantile is the bound itself, beyond which nothing is."""
    if not config.relative:
        return config.threshold
    doubt = doubts_on(model, data, config.name, generator).double()
    at = float(doubt.quantile(config.quantile))
    if config.quantile < 1 and config.threshold >= 1 and at == doubt.max() > doubt.min():
        warnings.warn(
            f"{config.name} is {at:g}, the largest there is, for {float((doubt == at).double().mean()):.2%} of the "
            f"steps from {data.name or 'the data'}: at the quantile {config.quantile:g} nothing is cut; pass a smaller "
            "truncation.quantile or a threshold below 1",
            stacklevel=2,
        )
    return config.threshold * at


def worth_of_going_on(
    model: Dynamics, data: Dataset, config: Penalty, unit: float, gamma: float, generator: torch.Generator
) -> float:
    """What follows a cut that is stored as an end, where that is negative, else 0: the data's mean reward for ever,
    less the penalty of the model's steps from the data. Bellman's inconsistency, which changes with the policy, is not
    counted. 0 without a discount below 1."""
    if gamma >= 1:
        return 0.0
    mean = data.reward.double().mean().item()
    if config.coefficient and config.name != "bellman":
        mean -= config.coefficient * unit * doubts_on(model, data, config.name, generator).double().mean().item()
    return min(0.0, gamma * mean / (1 - gamma))


def penalty_unit(model: Dynamics, data: Dataset, config: Penalty, generator: torch.Generator) -> float:
    """What a scaled coefficient is multiplied by: the reward's standard deviation over the mean uncertainty. Warns
    where that is 0."""
    if not config.scaled or not config.coefficient:
        return 1.0
    if bool((data.reward == data.reward[0]).all()):
        warnings.warn(
            f"{data.name or 'data'}: every reward is {data.reward[0]:g}, in whose standard deviation, 0, the penalty's "
            "coefficient is given: nothing is penalised; pass a coefficient that is not scaled",
            stacklevel=2,
        )
    mean = doubts_on(model, data, config.name, generator).double().mean()
    return float(data.reward.double().std(correction=0) / mean.clamp(min=1e-12))


@torch.no_grad()
def doubts_on(model: Dynamics, data: Dataset, name: str, generator: torch.Generator, most: int = 20_000) -> Tensor:
    """The uncertainty of that name of the model's steps from the data's states under the data's actions, at most so
    many of them; the finite ones. Raises Diverged where there is none."""
    index = data.paired.nonzero()[:, 0]
    if len(index) > most:
        order = torch.randperm(len(index), generator=generator, device=index.device)
        index = index[order[:most]]
    found = []
    for system, own in enumerate(data.of_system(index)):
        cond = model.condition(model.context(torch.tensor([system], device=index.device)).to(data.obs))
        for part in own.split(5_000):
            inp = StepInput(data.act[part], model.draw(len(part), 1, generator), data.intervals(part))
            doubt = _named(model.step(model.init(data.obs[part], cond), inp, cond)[1].uncertainty, name)
            found.append(doubt[doubt.isfinite()])
    doubts = torch.cat(found)
    if len(doubts) == 0:
        raise Diverged(
            f"uncertainty {name!r}: not finite on any of the data's own transitions; the model, or the dynamics reward "
            "around it, has diverged: try smaller learning rates"
        )
    return doubts


# ---------------------------------------------------------------- the loop


def train(
    config: OfflineConfig,
    data: Dataset,
    *,
    dynamics: Any = None,
    fitting: FitConfig | None = None,
    terminal: Terminal | None = None,
    reward: Reward | None = None,
    evaluate: Evaluate | None = None,
    seeds: Sequence[int] = (0,),
    models: Sequence[Dynamics] | None = None,
    start: Mapping[str, Tensor] | None = None,
    record: Record | None = None,
) -> Result:
    """Fit a model (and a dynamics reward) to the data, then learn a policy in it, all on the data's device and in their
    floating point type.

    dynamics: a learner's config, the probabilistic ensemble by default. terminal: the task's termination, learned
    from the data where None. reward: the task's reward, the learner's own head where None. evaluate: called with a
    policy, returns [episodes] of the real environment. models: fitted learners, one a seed (or one for all), instead
    of fitting any. start: an agent's state to start from. record: where numbers and state go; a record that holds an
    interrupted run's state makes this call continue it, to the same numbers.

    Raises ValueError where the settings and the data do not go together."""
    record = record or Forget()
    dynamics, fitting = dynamics or EnsembleConfig(), fitting or FitConfig()
    check_learner(dynamics)
    check(config, data, models, seeds)
    check_evaluate(evaluate)
    check_functions(data.obs[:2], data.act[:2], data.next_obs[:2], reward=reward, terminal=terminal)
    if config.imagination is not None and not models:
        check_fit(fitting)
    device, spec, lap = data.obs.device, data.spec, Laps()

    imagination, limits, units, afters = config.imagination, [], [], []
    gamma = getattr(config.agent, "gamma", 1.0)
    if imagination is not None and imagination.floor and data.reward.double().mean() < 0:
        imagination = replace(imagination, floor=False)
    made: list[Dynamics] = []
    if imagination is not None:
        tried = models or [unfitted(imagination, data, dynamics)]
        check_doubts(imagination, data, tried)
        for model in tried:
            check_reward(model, reward)
        for seed in seeds:
            model = models[len(made) % len(models)] if models else learn_model(data, dynamics, fitting, seed, record)
            lap("model")
            if imagination.morec is not None and not models:
                rule = imagination.morec
                r = learn_reward(model, data, dynamics, fitting, rule.reward, seed, record)
                model = rule.filter.build(model, r).to(data.obs).eval()
                lap("reward")
            made.append(model)
            cut = imagination.truncation
            stream = devices.generator(seed + 3, device)
            limits.append(math.inf if cut is None else uncertainty_limit(model, data, cut, stream))
            units.append(penalty_unit(model, data, imagination.penalty, stream))
            ends = cut is not None and cut.then == "terminal"
            after = (model, data, imagination.penalty, units[-1], gamma, stream)
            afters.append(worth_of_going_on(*after) if ends else 0.0)
        if terminal is None:
            terminal = learn_terminal(data, TerminalConfig(), seeds[0], record)
            lap("terminal")

    generator = devices.generator(group_seed(seeds), device)
    settings = config.agent
    if isinstance(settings, SacConfig):
        floor = 0.0 if imagination is not None and imagination.floor else settings.target_min
        settings = replace(settings, total=config.updates, target_min=floor)
    agent = settings.build(spec, generator, seeds=len(seeds), dtype=data.obs.dtype).to(device)
    if settings.normalize:
        agent.set_normalizer(*normalizer_of(data.obs))
    if start is not None:
        agent.load_state_dict(dict(start))
        agent.updates.zero_()  # else the actor's learning rate begins where that of the other training ended, at 0
    buffer = None
    if imagination is not None:
        capacity = imagination.retain * imagination.most(data.systems)
        buffer = Buffer(len(seeds), capacity, spec, device=device, dtype=data.obs.dtype)
    real = data.transitions().pack()
    n_real = config.batch if buffer is None else int(config.batch * config.real_ratio)

    def update(pick: Tensor, uniform: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """One update of every seed from row numbers [S, n], uniforms [S, m] and normals [2, S, B, A]."""
        batch = real[pick]
        if buffer is not None:
            batch = torch.cat([batch, buffer.sample(uniform)], 1)
        own = {"real": n_real} if isinstance(agent, Sac) else {}
        return agent.update(Transitions.unpack(batch, spec), noise, **own)

    first, history, counted = 0, [], 0
    sums: dict[str, Tensor] = {}  # of the figures since they were last logged, over so many updates
    counts: list[list[int]] = [[] for _ in seeds]  # transitions of the last batches of rollouts, of each seed
    whose = digest(config, dynamics, fitting, list(seeds), data.sha256, len(data))
    if kept := record.load("policy.partial"):
        tensors, facts = kept
        check_whose(facts, whose, "a policy that was learned with other settings, seeds or data")
        agent.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("agent.")})
        if buffer is not None:
            buffer.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("buffer.")})
        generator.set_state(tensors["generator"].cpu())
        sums = {k[5:]: v.to(device) for k, v in tensors.items() if k.startswith("sums.")}
        first, history, counts, counted = (facts[k] for k in ("updates", "returns", "counts", "counted"))
        history = [(updates, found) for updates, found in history]  # JSON has no tuples
        for name, value in facts["seconds"].items():
            lap.seconds[name] = lap.seconds.get(name, 0.0) + value

    def checkpoint(done: int) -> None:
        tensors = {f"agent.{k}": v for k, v in agent.state_dict().items()} | {"generator": generator.get_state()}
        if buffer is not None:
            tensors |= {f"buffer.{k}": v for k, v in buffer.state_dict().items()}
        tensors |= {f"sums.{k}": v for k, v in sums.items()}
        policy_time = {k: v for k, v in lap.seconds.items() if k in ("rollout", "update", "evaluate")}
        facts = {"updates": done, "returns": history, "counts": counts, "counted": counted, "seconds": policy_time}
        facts["of"] = whose
        record.save("policy.partial", tensors, facts)

    def probe(done: int) -> None:
        """How steep the values are on the data, and how far the models, which have seen them, mislead the values."""
        if not isinstance(agent, Sac):
            return
        some = Transitions.unpack(real[:: math.ceil(len(real) / PROBE)], spec)
        steep = local_lipschitz(agent, some.obs.expand(len(seeds), -1, -1))
        found = {k: v.mean().item() for k, v in steep.items()}
        if made and data.systems == 1:
            streams = [devices.generator(seed + 5, device) for seed in seeds]
            errors = [value_aware_error(agent.one(s), m, some, streams[s], data.dt) for s, m in enumerate(made)]
            found["value_error"] = torch.cat(errors).mean().item()
        record.log("probe", done, found)

    go = None
    saved, total = first, config.updates
    lap("setup")
    for i in range(first, total):
        if imagination is not None and buffer is not None and i % imagination.every == 0:
            assert terminal is not None
            assert isinstance(agent, Sac)
            logs: dict[str, float] = {}
            for s, model in enumerate(made):
                arguments = (terminal, reward, imagination, limits[s], generator, units[s], afters[s])
                counts[s] = [*counts[s][1 - imagination.retain :], 0] if imagination.retain > 1 else [0]
                for batch, log in rollouts(agent.one(s), model, data, *arguments):
                    buffer.add(s, batch)
                    counts[s][-1] += len(batch.obs)
                    logs = {k: logs.get(k, 0.0) + v for k, v in log.items()}
                buffer.keep(s, sum(counts[s]))
            if min(buffer.size) == 0:
                raise ValueError("no imagined transition was kept: every rollout was cut, or not finite, at its start")
            record.log("rollout", i, means_of(logs))
            lap("rollout")
        pick = torch.randint(len(real), (len(seeds), n_real), generator=generator, device=device)
        uniform = torch.rand(len(seeds), config.batch - n_real, generator=generator, device=device)
        noise = torch.randn(
            2, len(seeds), config.batch, spec.act, generator=generator, device=device, dtype=data.obs.dtype
        )
        if go is None:
            go = captured(update, agent, pick, uniform, noise)
        for name, value in go(pick, uniform, noise).items():
            sums[name] = sums[name] + value if name in sums else value.clone()
        counted += 1
        done = i + 1
        if done % config.log_every == 0 or done == total:
            means = {k: (v / counted).mean().item() for k, v in sums.items()}
            sums, counted = {}, 0
            lap("update")
            record.log("policy", done, means)
            record.progress("policy", done, total, means)
        if done % config.evaluate_every == 0 or done == total:
            lap("update")
            if evaluate is not None:
                returns = [evaluated(evaluate, agent, s) for s in range(len(seeds))]
                history.append((done, returns))
                mean = torch.tensor(returns).mean().item()
                record.log("evaluate", done, {"return": mean})
                record.progress("policy", done, total, {"return": mean})
            lap("evaluate")
            if done - saved >= config.save_every or done == total:
                probe(done)
                checkpoint(done)
                saved = done
            lap("checkpoint")
    record.save(
        "agent",
        agent.state_dict(),
        {"spec": [spec.obs, spec.act], "updates": total, "returns": history, "seconds": lap.seconds},
    )
    return Result(agent, made, history, lap.seconds)


def normalizer_of(obs: Tensor) -> tuple[Tensor, Tensor]:
    """obs [N, O] -> mean and standard deviation [O], as agents with `normalize` read observations."""
    return obs.mean(0), obs.std(0, correction=0) + 1e-3


def policy_of(agent: Any, seed: int = 0) -> Policy:
    """The deterministic policy of one seed: obs [n, O] -> act [n, A] in [-1, 1]."""

    one = agent.one(seed)
    like = next(agent.parameters())

    @torch.no_grad()
    def act(obs: Tensor) -> Tensor:
        obs = torch.as_tensor(obs)
        if obs.ndim != 2:
            raise ValueError(f"policy: got observations {list(obs.shape)}, expected [n, {agent.spec.obs}]")
        return one.act(obs.to(like)[None])[0].to(obs.device)

    return act


def check_evaluate(*functions: Evaluate | None) -> None:
    """Raises ValueError for what is no function of a policy."""
    for x in functions:
        if not (x is None or callable(x)):
            raise ValueError(
                f"evaluate: got a {type(x).__name__}, expected a function of a policy that returns returns; of an "
                "environment mbrl_envs.evaluate.evaluator makes one"
            )


def evaluated(evaluate: Evaluate, agent: Any, seed: int) -> list[float]:
    """The returns of one seed's policy. Raises ValueError where the function gives no list of them."""
    found = evaluate(policy_of(agent, seed))
    try:
        return [float(x) for x in found]
    except TypeError:
        raise ValueError(f"evaluate: it returned {found!r}, expected a list of returns, one an episode") from None


def captured(update: Callable, agent: nn.Module, *example: Tensor) -> Callable:
    """`update` as a graph where the device has such; the agent is left as it was."""
    return devices.graphed(update, *example, state=list(agent.state_dict().values()))


def means_of(logs: Mapping[str, float]) -> dict[str, float]:
    """The sums that `rollouts` logs, as means a transition or a start."""
    n, starts = max(logs.get("transitions", 0.0), 1.0), max(logs.get("starts", 0.0), 1.0)
    out = {k.removesuffix("_sum"): v / n for k, v in logs.items() if k.endswith("_sum")}
    cut = {"transitions": logs.get("transitions", 0.0), "cut": logs.get("cut", 0.0) / starts}
    return out | cut | {"ended": logs.get("ended", 0.0) / starts, "length": logs.get("transitions", 0.0) / starts}


def group_seed(seeds: Sequence[int]) -> int:
    """One seed for a group of them: that of a single seed is the seed."""
    return seeds[0] if len(seeds) == 1 else int(digest(list(seeds)), 16) % 2**31


def unfitted(config: Imagination, data: Dataset, dynamics: Any) -> Dynamics:
    """The learner, within its filter where there is one, as it is before any fit. Raises ValueError for settings of
    which there is none, or by which the data cannot be fitted."""
    like, rule = data.obs, config.morec
    generator = devices.generator(0, like.device)
    model = dynamics.build(data.spec, generator).to(like)
    if rule is None:
        return model
    if rule.reward.length > data.longest:
        raise ValueError(
            f"RewardConfig: length is {rule.reward.length}, expected at most {data.longest}, the steps of the data's "
            "longest stretch"
        )
    return rule.filter.build(model, rule.reward.build(data.spec, generator).to(like))


@torch.no_grad()
def check_doubts(config: Imagination, data: Dataset, models: Sequence[Dynamics]) -> None:
    """Raises ValueError where a learner, fitted or not, cannot tell what it is to be penalised and cut by."""
    generator = devices.generator(0, data.obs.device)
    for model in models:
        _check_doubts(config, data, model, generator)


def _check_doubts(config: Imagination, data: Dataset, model: Dynamics, generator: torch.Generator) -> None:
    cond = model.condition(data.obs.new_zeros(1, model.spec.ctx))
    inp = StepInput(data.act[:1], model.draw(1, 1, generator).to(data.obs), data.obs.new_full((1, 1), data.dt))
    known = model.step(model.init(data.obs[:1], cond), inp, cond)[1].uncertainty
    if config.morec is not None and not isinstance(model, Filtered):
        raise ValueError(
            f"models: got a {type(model).__name__} for rollouts that a dynamics reward filters (morec); wrap it by "
            "FilterConfig().build(model, reward), or leave morec out"
        )
    if config.penalty.coefficient and config.penalty.name != "bellman":
        _named(known, config.penalty.name)
    elif config.penalty.coefficient:
        core = unfiltered(model)
        few = inp._replace(noise=core.draw(1, 1, generator).to(data.obs))
        if (parts := len(core.each(core.init(data.obs[:1], cond), few, cond, 1).obs)) < 2:
            raise ValueError(
                f"penalty 'bellman': it is the spread over the parts of a learner that take part in rollouts (an "
                f"ensemble's elites), this one has {parts}"
            )
    if config.truncation is not None:
        _named(known, config.truncation.name)


def check(config: OfflineConfig, data: Dataset, models: Sequence[Dynamics] | None, seeds: Sequence[int]) -> None:
    """Raises ValueError for settings that do not go together, or not with the data."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds: got {list(seeds)}, expected at least one and no two alike")
    if min(seeds) < 0:
        raise ValueError(f"seeds: got {list(seeds)}, expected none below 0")
    if config.imagination is None and config.real_ratio < 1:
        raise ValueError(f"real_ratio: got {config.real_ratio} without imagination, expected 1")
    if config.imagination is not None and not isinstance(config.agent, SacConfig):
        raise ValueError(f"agent: got {type(config.agent).__name__} with imagination, expected SacConfig")
    if not 0 <= config.real_ratio <= 1:
        raise ValueError(f"real_ratio: got {config.real_ratio}, expected a share in [0, 1]")
    if getattr(config.agent, "cloning", 0) and int(config.batch * config.real_ratio) < 1:
        raise ValueError(
            f"cloning: no row of a batch of {config.batch} is the data's own at real_ratio {config.real_ratio}"
        )
    small = ("updates", "batch", "evaluate_every", "save_every", "log_every")
    if wrong := [f"{k}={getattr(config, k)}" for k in small if getattr(config, k) < 1]:
        raise ValueError(f"offline: got {', '.join(wrong)}; expected at least 1")
    if config.imagination is not None:
        found = {
            k: getattr(config.imagination, k) for k in ("horizon", "rollouts", "every", "retain", "block", "chunk")
        }
        if config.imagination.budget is not None:
            found["budget"] = config.imagination.budget
        if wrong := [f"{k}={v}" for k, v in found.items() if v < 1]:
            raise ValueError(f"imagination: got {', '.join(wrong)}; expected at least 1")
    if int(data.paired.sum()) < 2:
        raise ValueError(f"{data.name or 'data'}: {int(data.paired.sum())} transitions with a successor, expected more")
    if models and len(models) not in (1, len(seeds)):
        raise ValueError(f"models: got {len(models)} for {len(seeds)} seeds, expected 1 or one a seed")
    for model in models or ():
        want = Spec(data.spec.obs, data.spec.act, model.spec.ctx, model.spec.systems)
        if model.spec != want:
            raise ValueError(f"models: one is for {model.spec}, the data are {want}")
        if model.spec.ctx and model.spec.systems < data.systems:
            raise ValueError(f"models: one knows {model.spec.systems} systems, the data are of {data.systems}")
