"""Experts that a stream without task labels calls up: when the recent error of the active one leaves its usual range,
an earlier expert that explains the data takes over, or a new one begins.

The detection is that of TAME (Zhu et al., CoLLAs 2022, arXiv 2210.03869), for dynamics: what tells the task is in
(s, a, s'), so that an expert is chosen by its error on recent transitions, and no classifier of s is needed. Any
learner serves as the expert."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from mbrl.core import Diverged, Dynamics, Prediction, Segment, Spec, StepInput, Tree, group
from mbrl.fit import Adam

State = dict[str, Tensor]


@dataclass(frozen=True)
class ExpertsConfig:
    """`expert`: the config of any learner; `most`: how many there can be at once."""

    expert: Any
    most: int = 8

    def build(self, spec: Spec, generator: torch.Generator | None = None) -> "Experts":
        return Experts(spec, self, generator)


@final
class Experts(Dynamics):
    """Up to `most` experts K of one shape, their parameters stacked. A context [G, C] is read as scores of the first C
    experts, the largest of which is chosen, one a group; where the spec has no contexts, the `active` one serves.
    System number s of a segment trains expert s, or the active one where the spec has a single system.

    State, noise and uncertainties are the expert's. The buffers hold what is known of each: whether it is `alive`, how
    many batches it has `seen`, its moving `average` error and the `window` of its last errors as the active one."""

    inner: Dynamics  # one expert's shape; its own numbers are not this module's
    alive: Tensor  # [K] bool
    active: Tensor  # [] int64
    seen: Tensor  # [K] int64
    average: Tensor  # [K]
    window: Tensor  # [K, W], the newest last; NaN where there is none yet

    def __init__(self, spec: Spec, config: ExpertsConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if config.most < max(1, spec.systems if spec.systems > 1 else 1, spec.ctx):
            raise ValueError(
                f"ExpertsConfig: most is {config.most}, expected at least one expert for each of the "
                f"{max(spec.systems, spec.ctx)} systems or contexts"
            )
        inner = Spec(spec.obs, spec.act)
        made = [config.expert.build(inner, generator) for _ in range(config.most)]
        if spec.systems > 1:
            spec = replace(spec, ctx=spec.ctx or spec.systems)
        self.spec, self.config = spec, config
        self.noise_dim, self.noisy_loss = made[0].noise_dim, made[0].noisy_loss
        self.tells_reward = made[0].tells_reward
        object.__setattr__(self, "inner", made[0])  # unregistered
        params, buffers = torch.func.stack_module_state(made)
        self.names = {k: k.replace(".", "/") for k in (*params, *buffers)}
        self.theta = nn.ParameterDict({self.names[k]: x.detach() for k, x in params.items()})
        self.buffer_names = tuple(buffers)
        for k, x in buffers.items():
            self.register_buffer(f"of/{self.names[k]}", x)
        like, k = next(iter(self.theta.values())), config.most
        self.register_buffer("alive", torch.arange(k, device=like.device) == 0)
        self.register_buffer("active", torch.zeros((), dtype=torch.int64, device=like.device))
        self.register_buffer("seen", torch.zeros(k, dtype=torch.int64, device=like.device))
        self.register_buffer("average", like.new_full((k,), torch.nan))
        self.register_buffer("window", like.new_full((k, 1), torch.nan))

    def _load_from_state_dict(self, state_dict: State, prefix: str, *rest: Any) -> None:
        """A window of whatever length."""
        kept = state_dict.get(f"{prefix}window")
        if kept is not None and kept.ndim == 2:
            self.window = self.window.new_full((self.config.most, kept.shape[1]), torch.nan)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def stacked(self) -> State:
        """Every parameter and buffer of the experts, [K, ...], by its name in one expert."""
        out: State = {k: self.get_buffer(f"of/{self.names[k]}") for k in self.buffer_names}
        return out | {k: self.theta[name] for k, name in self.names.items() if name in self.theta}

    def pick(self, index: Tensor) -> State:
        """[G, ...]: those of the experts index [G]."""
        return {k: x.index_select(0, index) for k, x in self.stacked().items()}

    def _over(self, f: Callable[..., Any], state: State, *args: Any) -> Any:
        """f(expert, *args) for each of G experts on its own group; leaves of args and of what f returns lead with G."""
        one = lambda theta, *x: functional_call(self.inner, theta, (f, *x))
        if next(iter(state.values())).shape[0] == 1:
            out = one({k: x[0] for k, x in state.items()}, *pytree.tree_map(lambda x: x[0], args))
            return pytree.tree_map(lambda x: x[None], out)
        return vmap(one)(state, *args)

    # ------------------------------------------------------------ prediction

    def condition(self, ctx: Tensor) -> Tree:
        """The chosen experts' parameters, and their own conditions, [G, ...]."""
        index = ctx.argmax(1) if self.spec.ctx else self.active[None]
        return self._conditions(self.pick(index))

    def context(self, system: Tensor) -> Tensor:
        """The active expert's scores, or those of a system's own."""
        like, wide = next(iter(self.theta.values())), self.spec.ctx
        if not wide:
            return super().context(system)
        own = system if self.spec.systems > 1 else self.active.expand(len(system))
        return nn.functional.one_hot(own, self.config.most)[:, :wide].to(like)

    def pinned(self, part: Tensor) -> Tree:
        return self._conditions(self.pick(self.active[None]))

    def _conditions(self, state: State) -> Tree:
        none = next(iter(state.values())).new_zeros(next(iter(state.values())).shape[0], 1, 0)
        return state, self._over(lambda m, c: m.condition(c), state, none)

    def init(self, obs: Tensor, cond: Tree) -> Tree:
        return self._rows(lambda m, c, x: m.init(x, c), cond, obs)

    def observe(self, state: Tree, cond: Tree) -> Tensor:
        return self._rows(lambda m, c, x: m.observe(x, c), cond, state)

    def step(self, state: Tree, inp: StepInput, cond: Tree) -> tuple[Tree, Prediction]:
        return self._rows(lambda m, c, x, i: m.step(x, i, c), cond, state, inp)

    def branch(self, state: Tree, inp: StepInput, cond: Tree, k: int) -> tuple[Tree, Prediction]:
        return self._rows(lambda m, c, x, i: m.branch(x, i, c, k), cond, state, inp)

    def draw(self, n: int, k: int, generator: torch.Generator) -> Tensor:
        like = next(iter(self.theta.values()))
        return self.inner.to(like.device, like.dtype).draw(n, k, generator)

    def correct(self, state: Tree, obs: Tensor, alpha: float | Tensor, cond: Tree) -> Tree:
        rows = obs.new_zeros(len(obs), 1) + torch.as_tensor(alpha, dtype=obs.dtype, device=obs.device)
        return self._rows(lambda m, c, x, o, a: m.correct(x, o, a, c), cond, state, obs, rows)

    def _rows(self, f: Callable[..., Any], cond: Tree, *args: Any) -> Any:
        """f(expert, its condition, *args) on rows [B, ...], contiguous by group."""
        state, inner = cond
        g = next(iter(state.values())).shape[0]
        wide = pytree.tree_map(lambda x: group(x, g), args)
        return pytree.tree_map(lambda x: x.flatten(0, 1), self._over(f, state, inner, *wide))

    # ------------------------------------------------------------ training

    def prepare(self, segment: Segment) -> None:
        """Prepares the experts that have seen nothing yet."""
        for k in range(self.config.most):
            if int(self.seen[k]) == 0:
                self._edit(k, lambda m: m.prepare(segment))

    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._losses(self.pick(self._trained(segment)), segment, noise).mean()
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def validate(self, segment: Segment, noise: Tensor) -> Tensor:
        """[1]: the experts' own held-out errors, mean over the segment's systems."""
        parts = self._segments(segment, noise)
        check = lambda m, s, n: m.validate(s, n).mean()
        return self._over(check, self.pick(self._trained(segment)), *parts).mean()[None]

    def finish(self, errors: Tensor) -> None:
        for k in range(self.config.most):
            self._edit(k, lambda m: m.finish(errors.expand(m.parts)))

    def measure(self, segment: Segment) -> None:
        """Each expert on the transitions of its own systems."""
        own, rows = self._trained(segment), len(segment.obs) // len(segment.system)
        for k in own.unique().tolist():
            mine = (own == k).repeat_interleave(rows)
            part = Segment._make((*(x[mine] for x in segment[:-1]), segment.system.new_zeros(1)))
            self._edit(k, lambda m, part=part: m.measure(part))

    @torch.no_grad()
    def errors(self, segment: Segment, noise: Tensor) -> Tensor:
        """[K]: the error of every expert on the same transitions; infinite for one that is not alive, and where it is
        not a number."""
        k = self.config.most
        wide = pytree.tree_map(lambda x: x.repeat(k, *[1] * (x.ndim - 1)), (segment[:-1], noise))
        parts = Segment._make((*wide[0], torch.arange(k, device=segment.obs.device)))
        found = self._losses(self.stacked(), parts, wide[1])
        return torch.where(self.alive & ~found.isnan(), found, torch.inf)

    def _trained(self, segment: Segment) -> Tensor:
        return segment.system if self.spec.systems > 1 else self.active.expand(len(segment.system))

    def _losses(self, state: State, segment: Segment, noise: Tensor) -> Tensor:
        """[G]"""
        parts = self._segments(segment, noise)
        return self._over(lambda m, s, n: m.loss(s, n)[0], state, *parts)

    def _segments(self, segment: Segment, noise: Tensor) -> tuple[Segment, Tensor]:
        """A segment of one system for each group, [G, ...]."""
        g = len(segment.system)
        fields, noise = pytree.tree_map(lambda x: group(x, g), (tuple(segment[:-1]), noise))
        return Segment._make((*fields, segment.system.new_zeros(g, 1))), noise

    @torch.no_grad()
    def _edit(self, k: int, change: Callable[[Dynamics], Any]) -> None:
        """Expert k as a module of its own, changed and put back."""
        own = self.stacked()
        like = next(iter(self.theta.values()))
        self.inner.to(like.device, like.dtype)
        self.inner.load_state_dict({name: x[k] for name, x in own.items()})
        change(self.inner)
        for name, x in self.inner.state_dict().items():
            own[name][k].copy_(x)

    @torch.no_grad()
    def begin(self, k: int, segment: Segment, generator: torch.Generator) -> None:
        """Expert k anew, with normalisers of the segment."""
        fresh = self.config.expert.build(Spec(self.spec.obs, self.spec.act), generator)
        own = self.stacked()
        for name, x in fresh.state_dict().items():
            own[name][k].copy_(x)
        self._edit(k, lambda m: m.prepare(segment))
        self.alive[k], self.seen[k], self.average[k] = True, 0, torch.nan
        self.window[k] = torch.nan


# ---------------------------------------------------------------- the stream


@dataclass(frozen=True)
class TameConfig:
    """`average`: the share of a new error in the moving average. An expert's threshold is the mean of its window plus
    `sigmas` times its standard deviation, which counts as at least `floor` of the mean's size (a likelihood may be
    below 0); it stays while the expert is not active. Where the error still falls (the newer half's mean lies by more
    than `falling` of the whole's size below the older half's) the newer half is the window: the older one would widen
    the range. An expert whose window is not full is not suspected. A batch whose own error is above the threshold, or
    not finite, is not learned from; a shift is where the moving average is above it, too. Then the first expert takes
    over for whom the batch's error is usual.

    `agree`: with all `most` experts alive, a new one takes the place of the one that another explains best, where that
    adds to its error on its last batch less than `agree` - 1 of its size, else of the one that has seen least.
    `steps`: updates a batch."""

    window: int = 50
    average: float = 0.2
    sigmas: float = 3.0
    floor: float = 0.1
    falling: float = 0.25
    agree: float = 1.5
    lr: float = 1e-3
    steps: int = 1


@dataclass(frozen=True)
class TameReport:
    chosen: list[int]  # [batch]: the expert that was active after it
    errors: list[float]  # [batch]: of the expert that was active when it came, before it learned from it; nan: left out
    begun: list[int]  # the batches at which an expert began
    switched: list[int]  # the batches at which another took over, a new one or an earlier one
    seconds: float


def fit_stream(
    model: Experts,
    batches: Iterable[tuple[Segment, Tensor]],
    config: TameConfig,
    generator: torch.Generator,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> TameReport:
    """Learns from batches (segment, noise) as they come, each seen once, in place; those that are not finite are left
    out. Raises ValueError for an empty stream, Diverged where no error of the last window is finite."""
    tame, began = Tame(model, config, generator), time.perf_counter()
    for i, (segment, noise) in enumerate(batches):
        tame.update(segment, noise)
        if progress is not None:
            progress(i, {"error": tame.errors[-1], "active": float(tame.chosen[-1])})
    if not tame.chosen:
        raise ValueError("fit_stream: the stream holds no batch")
    if not any(map(math.isfinite, tame.errors[-config.window :])):
        raise Diverged(
            f"fit_stream: the errors of the last {min(len(tame.errors), config.window)} batches are {tame.errors[-1]}; "
            "expected finite data, or try a smaller lr"
        )
    return TameReport(tame.chosen, tame.errors, tame.begun, tame.switched, time.perf_counter() - began)


class Tame:
    """The detection, from batch to batch; what it knows of the experts is in the model's buffers."""

    def __init__(self, model: Experts, config: TameConfig, generator: torch.Generator) -> None:
        if config.window < 2 or not 0 < config.average <= 1:
            raise ValueError(
                f"TameConfig: window is {config.window} and average {config.average}, expected at least 2, and 0 to 1"
            )
        self.model, self.config, self.generator = model, config, generator
        k = model.config.most
        if model.window.shape[1] != config.window:
            model.window = model.window.new_full((k, config.window), torch.nan)
        self.optimizers = [self._optimizer(i) for i in range(k)]
        self.last: dict[int, tuple[Segment, Tensor]] = {}  # each expert's last batch
        self.chosen: list[int] = []
        self.errors: list[float] = []
        self.begun: list[int] = []
        self.switched: list[int] = []

    def _optimizer(self, k: int) -> Adam:
        return Adam({name: p[k].detach() for name, p in self.model.theta.items()}, self.config.lr)

    def thresholds(self) -> Tensor:
        """[K]: of the windows as they are; infinite for one that is empty."""
        w = self.model.window
        older, newer = w.chunk(2, 1)
        falls = older.mean(1) - newer.mean(1) > self.config.falling * w.mean(1).abs()  # False where it is not full
        w = torch.where(falls[:, None] & (torch.arange(w.shape[1], device=w.device) < older.shape[1]), torch.nan, w)
        there = ~w.isnan()
        n = there.sum(1).clamp(min=1)
        mean = w.nan_to_num().sum(1) / n
        std = ((w - mean[:, None]).nan_to_num().square().sum(1) / n).sqrt()
        out = mean + self.config.sigmas * torch.maximum(std, self.config.floor * mean.abs())
        return torch.where(there.any(1), out, torch.inf)

    def full(self, k: int) -> bool:
        return not bool(self.model.window[k].isnan().any())

    def update(self, segment: Segment, noise: Tensor) -> int:
        """Who is active after this batch."""
        model, now = self.model, len(self.chosen)
        if not all(bool(x.isfinite().all()) for x in (segment.obs, segment.act, segment.reward)):
            self.errors.append(math.nan)
            self.chosen.append(int(model.active))
            return self.chosen[-1]
        if int(model.seen.sum()) == 0:
            model.prepare(segment)
        errors = model.errors(segment, noise)
        a = self.config.average
        model.average.copy_(torch.where(model.average.isfinite(), (1 - a) * model.average + a * errors, errors))
        active, limits = int(model.active), self.thresholds()
        self.errors.append(errors[active].item())
        if self.full(active) and bool(torch.minimum(model.average, errors)[active] > limits[active]):
            known = model.alive & (model.seen > 0) & (errors <= limits)
            known[active] = False
            if bool(known.any()):
                active = int(known.nonzero()[0])
            else:
                active = self._place()
                model.begin(active, segment, self.generator)
                self.optimizers[active] = self._optimizer(active)
                self.begun.append(now)
            self.switched.append(now)
            model.active.fill_(active)
            errors, limits = model.errors(segment, noise), self.thresholds()
            model.average[active] = errors[active]
        usual = not self.full(active) or bool(errors[active] <= limits[active])
        if usual and bool(errors[active].isfinite()):
            self._learn(active, segment, noise)
            w = model.window[active]
            model.window[active] = torch.cat([w[1:], errors[active][None]])
            model.seen[active] += 1
            self.last[active] = (segment, noise)
        self.chosen.append(active)
        return active

    def _place(self) -> int:
        """Where a new expert goes."""
        model = self.model
        if not bool(model.alive.all()):
            return int((~model.alive).nonzero()[0])
        worst, best = -1, float("inf")
        for k, (segment, noise) in self.last.items():
            if k == int(model.active):
                continue
            errors = model.errors(segment, noise)
            own, others = min(errors[k].item(), 1e30), torch.cat([errors[:k], errors[k + 1 :]]).min().item()
            cost = (others - own) / max(abs(own), 1e-30)
            if cost < min(self.config.agree - 1, best):
                worst, best = k, cost
        if worst >= 0:
            return worst
        seen = model.seen.clone()
        seen[int(model.active)] = torch.iinfo(seen.dtype).max
        return int(seen.argmin())

    def _learn(self, k: int, segment: Segment, noise: Tensor) -> None:
        """Adam on expert k alone."""
        model, which = self.model, torch.tensor([k], device=self.model.active.device)
        for _ in range(self.config.steps):
            loss = model._losses(model.pick(which), segment, noise)[0]
            grads = torch.autograd.grad(loss, list(model.theta.values()), materialize_grads=True)
            self.optimizers[k].step([g[k] for g in grads])


def select(model: Experts, segment: Segment, noise: Tensor) -> int:
    """The expert with the least error on recent transitions; it becomes the active one."""
    best = int(model.errors(segment, noise).argmin())
    model.active.fill_(best)
    return best


def alignment(chosen: Sequence[int], tasks: Sequence[int]) -> float:
    """The share of batches whose expert is the one that its task has most often."""
    owner = {}
    for task in set(tasks):
        mine = [c for c, t in zip(chosen, tasks, strict=True) if t == task]
        owner[task] = max(set(mine), key=mine.count)
    return sum(owner[t] == c for c, t in zip(chosen, tasks, strict=True)) / max(len(tasks), 1)
