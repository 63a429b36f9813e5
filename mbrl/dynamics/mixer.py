"""A mixture of reconstructors for families of systems: each system has a context vector, a gate that reads the context
alone chooses one expert, and the experts share the context (MixER: Nzoyem et al., arXiv 2502.05335).

Systems sort themselves by family: `fit_mixer` alternates between contexts and weights, and again and again clusters the
contexts, gives each cluster the expert that errs least there, and solves for the gate by least squares."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from mbrl.core import Diverged, Markov, Prediction, Segment, Spec, StepInput, Tree, demand, group, pull
from mbrl.data import Dataset
from mbrl.device import graphed
from mbrl.fit import BETAS, Moments, Rows
from mbrl.nets import Activation, Normalizer, StackedMLP, apply_layers, uniform
from mbrl.rollout import masked_mean
from mbrl.solvers import RK4, Tsit5

Move = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z [G, R, O], act [G, R, A], dt [G, R, 1]) -> [G, R, O]
Params = Mapping[str, Tensor]  # of the experts [E, ...], or of the chosen ones [G, ...]
Draw = Callable[..., Tensor]  # (*shape, fan) -> uniform within 1 / sqrt(fan)
JITTER = 1e-4  # of the contexts for the gate's least squares, as published
SWEEPS = 20  # of K-means at most


# ---------------------------------------------------------------- experts
#
# A kind says which parameters one expert has (`draw`), and makes of those of chosen experts [G, ...] and of contexts
# [G, C] what a rollout needs of them (`fold`). Vector fields become layers; the context is gone into them.


def _mlp(name: str, sizes: Sequence[int], draw: Draw) -> dict[str, Tensor]:
    out = {}
    for n, (i, o) in enumerate(pairwise(sizes)):
        out |= {f"{name}_w{n}": draw(i, o, fan=i), f"{name}_b{n}": 0 * draw(1, o, fan=1)}
    return out


def _layers(p: Params, name: str) -> list[Tensor]:
    """(weight [G, in, out], bias [G, 1, out], ...)"""
    n = sum(k.startswith(f"{name}_w") for k in p)
    return [p[f"{name}_{k}{i}"] for i in range(n) for k in ("w", "b")]


@dataclass(frozen=True)
class Ncf:
    """Neural context flow (arXiv 2405.02154): a net of the state and one of the context, whose features a third net
    reads; the context's side is a bias of its first layer. shared: the first net is one for all experts."""

    features: tuple[int, ...] = (64,)
    context: tuple[int, ...] = (64, 64)
    main: tuple[int, ...] = (64,)
    shared: bool = False

    def draw(self, width: int, act: int, ctx: int, draw: Draw) -> dict[str, Tensor]:
        first, last = self.main[0], self.features[-1]
        p = _mlp("features", (width + act, *self.features), draw) | _mlp("context", (ctx, *self.context), draw)
        fan = last + self.context[-1]
        p |= {"join_w": draw(last, first, fan=fan), "join_c": draw(self.context[-1], first, fan=fan)}
        return p | {"join_b": 0 * draw(1, first, fan=1)} | _mlp("main", (*self.main, width), draw)

    def fold(self, p: Params, ctx: Tensor, activation: Activation) -> list[Tensor]:
        code = apply_layers(_layers(p, "context"), ctx[:, None], activation)  # [G, 1, H]
        bias = torch.baddbmm(p["join_b"], code, p["join_c"])
        return [*_layers(p, "features"), p["join_w"], bias, *_layers(p, "main")]


@dataclass(frozen=True)
class Coda:
    """One net whose weights are moved by a linear map of the context (Kirchmeyer et al., ICML 2022, arXiv
    2202.01889)."""

    hidden: tuple[int, ...] = (64, 64)

    def draw(self, width: int, act: int, ctx: int, draw: Draw) -> dict[str, Tensor]:
        sizes = (width + act, *self.hidden, width)
        p = _mlp("root", sizes, draw)
        for n, (i, o) in enumerate(pairwise(sizes)):
            p |= {f"move_w{n}": draw(ctx, i * o, fan=i), f"move_b{n}": draw(ctx, o, fan=i)}
        return p

    def fold(self, p: Params, ctx: Tensor, activation: Activation) -> list[Tensor]:
        return [
            x + torch.bmm(ctx[:, None], m).reshape(x.shape)
            for x, m in zip(_layers(p, "root"), _layers(p, "move"), strict=True)
        ]


@dataclass(frozen=True)
class Geps:
    """One net whose layers are moved by low-rank products that the context scales, W + A diag(c) B (Koupai et al.,
    NeurIPS 2024, arXiv 2410.23889); biases by a linear map of it."""

    hidden: tuple[int, ...] = (64, 64)

    def draw(self, width: int, act: int, ctx: int, draw: Draw) -> dict[str, Tensor]:
        sizes = (width + act, *self.hidden, width)
        p = _mlp("root", sizes, draw)
        for n, (i, o) in enumerate(pairwise(sizes)):
            p |= {
                f"left_{n}": draw(i, ctx, fan=i),
                f"right_{n}": draw(ctx, o, fan=1),
                f"shift_{n}": draw(ctx, o, fan=i),
            }
        return p

    def fold(self, p: Params, ctx: Tensor, activation: Activation) -> list[Tensor]:
        out, root = [], _layers(p, "root")
        for n in range(len(root) // 2):
            out.append(torch.baddbmm(root[2 * n], p[f"left_{n}"] * ctx[:, None], p[f"right_{n}"]))
            out.append(torch.baddbmm(root[2 * n + 1], ctx[:, None], p[f"shift_{n}"]))
        return out


@dataclass(frozen=True)
class Hierarchical:
    """A clipped shallow PLRNN, z' = A z + W1 (relu(W2 z + h2) - relu(W2 z)) + h1 + C a, whose parameters are linear in
    the context (after Brenner et al., arXiv 2410.04814). It is a map: intervals count, their lengths do not. To be
    trained by generalized teacher forcing (`MixerConfig.alpha`)."""

    hidden: int = 50

    def draw(self, width: int, act: int, ctx: int, draw: Draw) -> dict[str, Tensor]:
        n, shapes = self.hidden, self._shapes(width, act)
        fans = {"A": 1, "W1": n, "W2": width, "h1": 1, "h2": n, "C": max(act, 1)}
        p = {k: draw(*shape, fan=fans[k]) for k, shape in shapes.items()}
        p |= {"A": 0.9 + 0 * p["A"], "h1": 0 * p["h1"]}
        return p | {f"by_{k}": 0.1 * draw(ctx, x.numel(), fan=fans[k]) for k, x in p.items()}

    def _shapes(self, width: int, act: int) -> dict[str, tuple[int, int]]:
        n = self.hidden
        return {"A": (1, width), "W1": (n, width), "W2": (width, n), "h1": (1, width), "h2": (1, n), "C": (act, width)}

    def fold(self, p: Params, ctx: Tensor, activation: Activation) -> list[Tensor]:
        letters = ("A", "W1", "W2", "h1", "h2", "C")
        return [p[k] + torch.bmm(ctx[:, None], p[f"by_{k}"]).reshape(p[k].shape) for k in letters]


Expert = Ncf | Coda | Geps | Hierarchical


def _map(folded: Sequence[Tensor], z: Tensor, act: Tensor) -> Tensor:
    """z [G, R, O], act [G, R, A] -> z' - z"""
    A, W1, W2, h1, h2, C = folded
    u = z @ W2
    return (A - 1) * z + (torch.relu(u + h2) - torch.relu(u)) @ W1 + h1 + act @ C


# ---------------------------------------------------------------- the learner


@dataclass(frozen=True)
class MixerConfig:
    """`width`: of the contexts, where the data do not say. `solver`: of vector fields, whose outputs are in units of
    the data's own rates of change. `alpha`: the teacher forcing of a training window, from 0, which runs freely, to 1,
    one interval at a time.

    gating: "solved" has a gate that `fit_mixer` solves for; "gradient" trains it with the rest, the chosen expert's
    step being scaled by the gate's softmax (the naive way); "own" gives system e the expert e modulo the experts, and
    contexts that stay as they are: separate models. modulation: of vector fields, the order (0, 1 or 2) of a Taylor
    expansion in the context, from that of another system of the same expert to a system's own (contextual
    self-modulation, arXiv 2410.01655); it is used in training alone. `reward`: a further net, which all share, tells a
    transition's reward."""

    expert: Expert = field(default_factory=Ncf)
    experts: int = 4
    width: int = 10
    activation: Activation = "silu"
    solver: RK4 | Tsit5 = field(default_factory=RK4)
    alpha: float = 0.0
    gating: Literal["solved", "gradient", "own"] = "solved"
    modulation: int = 0
    reward: bool = False
    reward_hidden: tuple[int, ...] = (100, 100)

    def build(self, spec: Spec, generator: torch.Generator | None = None) -> "Mixer":
        return Mixer(spec, self, generator)


@final
class Mixer(Markov):
    """A condition is the chosen experts' parameters with their contexts folded in, leading with the contexts; the gate
    is read there, once. Deterministic. Contexts of the data's systems are the rows of `contexts` [systems, C], zeros at
    first. Where the spec has no contexts, several systems make it have them; of a single one, the row serves.

    The normalisers are set once, by the first call of `prepare`: contexts are adapted to a model that stays."""

    noisy_loss = False
    noise_dim = 0
    rate: Tensor  # [O]: the root mean square of dz/dt over the data, z standardised
    anchored: Tensor  # [] bool: whether the normalisers are set
    neighbour: Tensor  # [systems] int64: whose context modulates a system's in training

    def __init__(self, spec: Spec, config: MixerConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        _check(config)
        width = spec.ctx or config.width
        self.spec = replace(spec, ctx=width) if spec.systems > 1 else spec
        self.config, self.tells_reward = config, config.reward
        device = torch.device("cpu" if generator is None else generator.device)

        def draw(*shape: int, fan: int) -> Tensor:
            bound = 1 / max(fan, 1) ** 0.5
            return torch.empty(*shape, device=device).uniform_(-bound, bound, generator=generator)

        every = [config.expert.draw(spec.obs, spec.act, width, draw) for _ in range(config.experts)]
        self.experts = nn.ParameterDict({k: torch.stack([p[k] for p in every]) for k in every[0]})
        if isinstance(config.expert, Ncf) and config.expert.shared:
            for k in [k for k in self.experts if k.startswith("features")]:
                self.experts[k] = nn.Parameter(self.experts[k].detach()[:1].clone())
        gate = torch.empty(width + 1, config.experts, device=device).normal_(generator=generator)
        if config.gating == "gradient":
            self.gate = nn.Parameter(gate)
        else:
            self.register_buffer("gate", gate)
        contexts = torch.zeros(spec.systems, width, device=device)
        if config.gating == "own":
            if spec.systems > width:
                raise ValueError(
                    f"MixerConfig: width is {width}, expected at least {spec.systems}, one for each system, of which "
                    f"each has a model of its own: pass width={spec.systems}"
                )
            contexts = torch.eye(max(spec.systems, width), device=device)[: spec.systems, :width]
            with torch.no_grad():
                turns = torch.arange(width, device=device) % config.experts
                self.gate.copy_(torch.cat([nn.functional.one_hot(turns, config.experts), 0 * self.gate[:1]]))
        self.contexts = nn.Parameter(contexts, requires_grad=config.gating != "own")
        self.worth = None
        if config.reward:
            self.worth = StackedMLP(1, [2 * spec.obs + spec.act, *config.reward_hidden, 1], "silu", uniform, generator)
        self.observed, self.acted = Normalizer(spec.obs).to(device), Normalizer(spec.act).to(device)
        self.rewarded = Normalizer(1).to(device)
        self.register_buffer("rate", torch.ones(spec.obs, device=device))
        self.register_buffer("anchored", torch.zeros((), dtype=torch.bool, device=device))
        self.register_buffer("neighbour", torch.arange(spec.systems, device=device))

    # ------------------------------------------------------------ the gate

    def logits(self, ctx: Tensor, gate: Tensor | None = None) -> Tensor:
        """[G, C] -> [G, E]: what the gate [C + 1, E], by default its own, says of each expert."""
        return torch.cat([ctx, torch.ones_like(ctx[:, :1])], 1) @ (self.gate if gate is None else gate)

    def chosen(self, ctx: Tensor) -> Tensor:
        """[G, C] -> [G] int64: which expert serves."""
        return self.logits(ctx).argmax(-1)

    def condition(self, ctx: Tensor) -> Tree:
        ctx = ctx if self.spec.ctx else self.contexts[:1]
        logits = self.logits(ctx)
        return self.served(ctx, logits.argmax(-1), logits)

    def served(self, ctx: Tensor, expert: Tensor, logits: Tensor | None = None) -> Tree:
        """The condition under which `expert` [G] serves contexts [G, C], whatever the gate says."""
        p = {k: x[expert % len(x)] for k, x in self.experts.items()}
        folded = self.config.expert.fold(p, ctx, self.config.activation)
        scale = self._scale(self.logits(ctx) if logits is None else logits, expert)
        if isinstance(self.config.expert, Hierarchical):
            return (*folded, scale)
        return (*folded[:-2], folded[-2] * self.rate * scale, folded[-1] * self.rate * scale)

    def _scale(self, logits: Tensor, expert: Tensor) -> Tensor:
        """[G, 1, 1]"""
        if self.config.gating != "gradient":
            return torch.ones_like(logits[:, :1, None])
        return logits.softmax(-1).gather(1, expert[:, None])[..., None]

    def context(self, system: Tensor) -> Tensor:
        return self.contexts[system] if self.spec.ctx else super().context(system)

    def pinned(self, part: Tensor) -> Tree:
        return self.condition(self.contexts[:1])

    # ------------------------------------------------------------ prediction

    def step(self, state: Tensor, inp: StepInput, cond: Tree) -> tuple[Tensor, Prediction]:
        z, act, g = self.observed(state), self.acted(inp.act), cond[0].shape[0]
        after = self.moved(cond, group(z, g), group(act, g), group(inp.dt, g)).flatten(0, 1)
        obs = self.observed.inverse(after)
        reward = torch.zeros_like(obs[:, 0])
        if self.worth is not None:
            reward = self.rewarded.inverse(self._worth(z, act, after))[:, 0]
        return obs, Prediction(obs, reward, {})

    def moved(self, cond: Tree, z: Tensor, act: Tensor, dt: Tensor) -> Tensor:
        """One interval, all standardised and by group: z [G, R, O], act [G, R, A], dt [G, R, 1] -> [G, R, O]."""
        if isinstance(self.config.expert, Hierarchical):
            return z + cond[-1] * _map(cond[:-1], z, act)
        return self.config.solver.flow(self._field(cond, act), z, dt, ())

    def _field(self, layers: Sequence[Tensor], act: Tensor) -> Callable[[Tensor], Tensor]:
        """dz/dt of z [G, R, O]; what the held action adds to the first layer is computed once."""
        first, bias = layers[0], layers[1]
        if act.shape[-1]:
            width = self.spec.obs
            bias = torch.baddbmm(bias, act, first[:, width:])
            first = first[:, :width]
        rest, activation = (first, bias, *layers[2:]), self.config.activation
        return lambda z: apply_layers(rest, z, activation)

    def _worth(self, z: Tensor, act: Tensor, after: Tensor) -> Tensor:
        """[B, 1], standardised."""
        assert self.worth is not None
        return self.worth(torch.cat([z, act, after], -1)[None])[0]

    # ------------------------------------------------------------ training

    def prepare(self, segment: Segment) -> None:
        """Sets the normalisers, once. Raises ValueError for a dt that is not positive."""
        if bool(self.anchored):
            return
        keep = segment.mask
        obs, after, act, dt = (x[keep] for x in (segment.obs[:, :-1], segment.obs[:, 1:], segment.act, segment.dt))
        if not bool((dt > 0).all()):
            raise ValueError(f"Mixer: the data hold an interval dt of {float(dt.min())}, expected all to be positive")
        self.observed.fit(obs)
        self.acted.fit(act)
        self.rewarded.fit(segment.reward[keep][:, None])
        rate = ((after - obs) / self.observed.std / dt).double().square().mean(0).sqrt()
        self.rate.copy_(torch.where(rate > 0, rate, 1.0))
        self.anchored.fill_(True)

    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The squared error of the forced windows, standardised, each system by its context; and that of the reward."""
        error = self.errors(segment, self.moves(segment.system)).mean()
        loss, logs = error, {"mse": error.detach()}
        if self.worth is not None:
            wrong = self._wrong(segment)
            loss = loss + wrong
            logs["reward"] = wrong.detach()
        return loss, logs

    @torch.no_grad()
    def validate(self, segment: Segment, noise: Tensor) -> Tensor:
        """[1]: the squared error of free runs over the windows, standardised, and that of the reward."""
        error = self.errors(segment, self.moves(segment.system, 0), alpha=0.0).mean()
        return (error if self.worth is None else error + self._wrong(segment))[None]

    def finish(self, errors: Tensor) -> None:
        """Raises Diverged where the fit never reached a finite error."""
        if not bool(errors.isfinite().all()):
            raise Diverged(
                "Mixer: the fit has diverged; expected finite data, or try shorter windows, a larger alpha, more "
                "substeps or a smaller learning rate"
            )

    def moves(self, system: Tensor, order: int | None = None) -> Move:
        """What `moved` does for systems [G] in training, modulated to this order, by default the config's."""
        ctx = self.contexts[system]
        expert, order = self.chosen(ctx), self.config.modulation if order is None else order
        if not order:
            cond = self.served(ctx, expert)
            return lambda z, act, dt: self.moved(cond, z, act, dt)
        near = self.contexts[self.neighbour[system]]
        fold = lambda c: self.served(c, expert)
        rates = [fold(near)]  # the layers and their derivatives along the way from there
        for _ in range(order):
            fold = _along(fold, ctx - near)
            rates.append(fold(near))

        def curve(s: Tensor) -> list[Tensor]:
            layers = [x + s * y for x, y in zip(*rates[:2], strict=True)]
            return layers if order == 1 else [x + s**2 / 2 * y for x, y in zip(layers, rates[2], strict=True)]

        def modulated(z: Tensor, act: Tensor, dt: Tensor) -> Tensor:
            f = lambda x: _taylor(lambda s: self._field(curve(s), act)(x), x.new_zeros(()), order)
            return self.config.solver.flow(f, z, dt, ())

        return modulated

    def errors(self, segment: Segment, move: Move, alpha: float | None = None) -> Tensor:
        """[G]: the mean squared error of each group's forced windows, standardised."""
        alpha, g = self.config.alpha if alpha is None else alpha, len(segment.system)
        x, act = group(self.observed(segment.obs), g), group(self.acted(segment.act), g)  # [G, R, T ...]
        dt, mask = group(segment.dt, g), group(segment.mask, g)
        z, ends = x[:, :, 0], []
        for t in range(act.shape[2]):
            z = move(z, act[:, :, t], dt[:, :, t])
            ends.append(z)
            if alpha:
                z = pull(z, x[:, :, t + 1], alpha * mask[:, :, t, None])
        square = (torch.stack(ends, 2) - x[:, :, 1:]).square().mean(-1)
        return torch.where(mask, square, 0.0).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)

    def _wrong(self, segment: Segment) -> Tensor:
        """The mean squared error of the reward, standardised."""
        x, act = self.observed(segment.obs), self.acted(segment.act)
        said = self._worth(*(y.flatten(0, 1) for y in (x[:, :-1], act, x[:, 1:])))
        error = said - self.rewarded(segment.reward.reshape(-1, 1))
        return masked_mean(error**2, segment.mask.flatten())


def _along(f: Callable[[Tensor], Sequence[Tensor]], way: Tensor) -> Callable[[Tensor], Sequence[Tensor]]:
    """The derivative of f along a direction."""
    return lambda x: torch.func.jvp(lambda y: tuple(f(y)), (x,), (way,))[1]


def _taylor(f: Callable[[Tensor], Tensor], zero: Tensor, order: int) -> Tensor:
    """f(1) of a number, by its derivatives at zero."""
    one = torch.ones_like(zero)
    if order == 1:
        return sum(torch.func.jvp(f, (zero,), (one,)))  # type: ignore[return-value]
    slope = lambda s: torch.func.jvp(f, (s,), (one,))
    both = torch.func.jvp(slope, (zero,), (one,))
    (value, first), (_, second) = both[0], both[1]
    return value + first + second / 2


def _check(config: MixerConfig) -> None:
    gatings, kind = ("solved", "gradient", "own"), type(config.expert).__name__
    sizes = [(f"{f.name} of {kind}", getattr(config.expert, f.name)) for f in fields(config.expert)]
    layers = [(name, x if isinstance(x, tuple) else (x,)) for name, x in sizes if not isinstance(x, bool)]
    linear = 0 if isinstance(config.expert, Ncf) else 1  # no layer at all
    demand(
        "MixerConfig",
        ("experts", config.experts, "at least 1", config.experts >= 1),
        ("width", config.width, "at least 1", config.width >= 1),
        ("alpha", config.alpha, "0 to 1", 0 <= config.alpha <= 1),
        ("gating", config.gating, f"one of {', '.join(gatings)}", config.gating in gatings),
        ("modulation", config.modulation, "0, 1 or 2", config.modulation in (0, 1, 2)),
        ("substeps of the solver", config.solver.substeps, "at least 1", config.solver.substeps >= 1),
        *((name, x, "units of each layer, at least 1", min(x, default=linear) >= 1) for name, x in layers),
        ("reward_hidden", config.reward_hidden, "at least 1 each", min(config.reward_hidden, default=1) >= 1),
    )
    if config.modulation and isinstance(config.expert, Hierarchical):
        raise ValueError("MixerConfig: modulation is of vector fields, and Hierarchical is a map: pass modulation 0")
    if config.modulation and config.gating == "gradient":
        raise ValueError("MixerConfig: modulation expands experts alone, and gating 'gradient' scales them: pass one")


# ---------------------------------------------------------------- who gets which expert


class Clusters(NamedTuple):
    label: Tensor  # [systems] int64
    centre: Tensor  # [K, C]
    spread: float  # the sum of the distances to the centres


def kmeans(
    contexts: Tensor, k: int, start: Tensor | None, generator: torch.Generator, reseed: bool = False, p: float = 1.0
) -> Clusters | None:
    """Clusters of contexts [systems, C], assigned by the distance of norm p, from `start` [K, C] or from k contexts
    that are drawn; None where a cluster is empty or the assignment has not settled in 20 sweeps. reseed: an empty
    cluster begins anew at the context farthest from its centre, and what has not settled is taken."""
    centre = start
    if centre is None:
        drawn = torch.randperm(len(contexts), generator=generator, device=generator.device)[:k]
        centre = contexts[drawn.to(contexts.device)]
    label = None
    for _ in range(SWEEPS):
        apart = torch.cdist(contexts, centre, p=p, compute_mode="donot_use_mm_for_euclid_dist")
        new = apart.argmin(1)
        counts = torch.bincount(new, minlength=k)
        if reseed:
            for empty in (counts == 0).nonzero()[:, 0].tolist():
                far = apart.gather(1, new[:, None])[:, 0].masked_fill(counts[new] < 2, -1.0).argmax()
                new[far] = empty
                counts = torch.bincount(new, minlength=k)
        elif bool((counts == 0).any()):
            return None
        if label is not None and torch.equal(new, label):
            return Clusters(label, centre, float(apart.gather(1, label[:, None]).sum()))
        label = new
        total = torch.zeros_like(centre).index_add_(0, label, contexts)
        centre = total / counts.clamp(min=1)[:, None]
    if not reseed or label is None:
        return None
    apart = torch.cdist(contexts, centre, p=p, compute_mode="donot_use_mm_for_euclid_dist")
    return Clusters(label, centre, float(apart.gather(1, label[:, None]).sum()))


def scattered(contexts: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k contexts [K, C] that are apart: each drawn with a chance that grows with its distance to those before
    (k-means++, by L1)."""
    draw = lambda p: torch.multinomial(p.to(generator.device), 1, generator=generator).to(contexts.device)
    picked = draw(torch.ones(len(contexts)))
    for _ in range(k - 1):
        near = torch.cdist(contexts, contexts[picked], p=1.0).amin(1)
        picked = torch.cat([picked, draw(near if bool(near.sum() > 0) else torch.ones(len(contexts)))])
    return contexts[picked]


def costs(errors: Tensor, label: Tensor, k: int) -> Tensor:
    """errors [systems, E] of every expert -> [K, E], double: the median over each cluster's systems; one that is not
    finite is worse than any choice of those that are."""
    cost = torch.stack([errors[label == i].quantile(0.5, dim=0) for i in range(k)]).double()
    some = cost.isfinite()
    return torch.where(some, cost, (k + 1) * torch.where(some, cost, 0.0).max())


def greedy(cost: Tensor) -> list[int]:
    """cost [K, E] -> the expert of each cluster: in order, the one of least cost that no earlier cluster has."""
    taken: list[int] = []
    for row in cost.tolist():
        free = [e for e in range(len(row)) if e not in taken]
        taken.append(min(free, key=row.__getitem__))
    return taken


def hungarian(cost: Tensor) -> list[int]:
    """cost [K, E], K <= E -> the expert of each cluster, none twice, of least total cost (Kuhn 1955, in the form with
    potentials and shortest augmenting paths). Raises ValueError for another shape and for costs that are not finite."""
    if cost.ndim != 2 or cost.shape[0] > cost.shape[1] or not bool(cost.isfinite().all()):
        raise ValueError(f"hungarian: got costs {cost.tolist()}, expected [K, E >= K] of finite numbers")
    c = [[0.0] * (cost.shape[1] + 1)] + [[0.0, *row] for row in cost.double().tolist()]
    k, m = cost.shape
    u, v, owner = [0.0] * (k + 1), [0.0] * (m + 1), [0] * (m + 1)
    for row in range(1, k + 1):
        owner[0], at = row, 0
        least, seen, way = [float("inf")] * (m + 1), [False] * (m + 1), [0] * (m + 1)
        while owner[at]:
            seen[at] = True
            i, delta, best = owner[at], float("inf"), 0
            for j in range(1, m + 1):
                if seen[j]:
                    continue
                if (left := c[i][j] - u[i] - v[j]) < least[j]:
                    least[j], way[j] = left, at
                if least[j] < delta:
                    delta, best = least[j], j
            for j in range(m + 1):
                if seen[j]:
                    u[owner[j]] += delta
                    v[j] -= delta
                else:
                    least[j] -= delta
            at = best
        while at:
            owner[at] = owner[way[at]]
            at = way[at]
    found = [0] * k
    for j in range(1, m + 1):
        if owner[j]:
            found[owner[j] - 1] = j - 1
    return found


def solved_gate(contexts: Tensor, expert: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """[C + 1, E]: least squares from contexts [systems, C], jittered, and a one, to the one-hot experts."""
    noise = torch.randn(contexts.shape, generator=generator, device=generator.device, dtype=contexts.dtype)
    x = torch.cat([contexts + JITTER * noise.to(contexts.device), torch.ones_like(contexts[:, :1])], 1)
    target = nn.functional.one_hot(expert, experts).to(x)
    return torch.linalg.pinv(x.double()).to(x) @ target


def nearest_gate(centre: Tensor, expert: Sequence[int]) -> Tensor:
    """[C + 1, E]: the gate that sends a context x to the expert of the nearest, by L2, of the centres c [E, C], which
    `expert` names for each. It is linear: -|x - c|^2 is 2 c x - |c|^2, but for what is the same of all."""
    gate = torch.cat([2 * centre, -centre.square().sum(1, keepdim=True)], 1)
    out = torch.empty_like(gate)
    out[list(expert)] = gate
    return out.T


def purity(assigned: Sequence[int], labels: Sequence[Any]) -> float:
    """The share of systems whose expert serves mostly systems of their label."""
    counts: dict[int, dict[Any, int]] = {}
    for a, b in zip(assigned, labels, strict=True):
        mine = counts.setdefault(a, {})
        mine[b] = mine.get(b, 0) + 1
    return sum(max(x.values()) for x in counts.values()) / len(labels)


# ---------------------------------------------------------------- the published fit


@dataclass(frozen=True)
class MixerFit:
    """Proximal alternation: in each of `outer` steps, `inner` updates of the contexts and as many of the weights, each
    with proximal / 2 mean (theta - theta_old)^2 and AdaBelief, whose rate falls by 0.4 after a third and two thirds.

    batch: windows of each system an update, of `length` steps; without a length whole episodes, each beginning at its
    first observation. gate_every: updates between two solutions of the gate. assign: which cluster gets which expert.
    empty: what to do about a cluster without systems: "skip" this solution, as published, or "reseed" it. warm: so many
    outer steps at first have the gate that was drawn, which sends systems, whose contexts are still alike, to few
    experts; then all begin as that of the first system. restarts: besides from the centres before, K-means begins so
    many times from contexts that are apart, and the tightest clusters count. guard: a gate that would make the loss
    more than so many times what it is, is passed over (after warm steps: experts that were never trained would be shut
    out). relative: each system's error counts over the variance of its observations. `clip`: of the gradient's norm.
    solve: the gate is the "least-squares" one of the one-hot experts, as published, which may leave a cluster that lies
    between others without systems (masking: Hastie et al., The Elements of Statistical Learning, 4.2), or "nearest":
    each context goes where its cluster's centre is; K-means then assigns by L2, so that systems are sorted as the
    clusters are. until: the gate is solved for in this share of the outer steps, the first, and then stays: a system
    that changes places late is served by an expert that has not learned it."""

    outer: int = 500
    inner: int = 12
    proximal: float = 10.0
    lr: float = 1e-3
    lr_context: float = 1e-3
    batch: int = 4
    length: int | None = None
    gate_every: int = 5
    assign: Literal["greedy", "hungarian"] = "greedy"
    empty: Literal["skip", "reseed"] = "skip"
    warm: int = 0
    restarts: int = 0
    guard: float | None = None
    relative: bool = True
    clip: float | None = None
    solve: Literal["least-squares", "nearest"] = field(default="least-squares", metadata={"added": True})
    until: float = field(default=1.0, metadata={"added": True})


FIT = MixerFit(
    length=10,
    lr=3e-3,
    lr_context=1e-2,
    assign="hungarian",
    warm=20,
    restarts=10,
    solve="nearest",
    until=0.5,
)  # what was measured to work; MixerFit() has the published choices


def check(config: MixerFit) -> None:
    """Raises ValueError for settings that cannot be."""
    c = config
    positive = lambda x: 0 < x < math.inf
    demand(
        "MixerFit",
        ("outer", c.outer, "at least 0", c.outer >= 0),
        ("inner", c.inner, "at least 1", c.inner >= 1),
        ("batch", c.batch, "at least 1", c.batch >= 1),
        ("gate_every", c.gate_every, "at least 1", c.gate_every >= 1),
        ("length", c.length, "at least 1", c.length is None or c.length >= 1),
        ("lr", c.lr, "a rate above 0", positive(c.lr)),
        ("lr_context", c.lr_context, "a rate above 0", positive(c.lr_context)),
        ("proximal", c.proximal, "0 or more", 0 <= c.proximal < math.inf),
        ("warm", c.warm, "at least 0", c.warm >= 0),
        ("restarts", c.restarts, "at least 0", c.restarts >= 0),
        ("guard", c.guard, "a number above 0", c.guard is None or positive(c.guard)),
        ("clip", c.clip, "a number above 0", c.clip is None or positive(c.clip)),
        ("assign", c.assign, "greedy or hungarian", c.assign in ("greedy", "hungarian")),
        ("until", c.until, "a share, 0 to 1", 0 <= c.until <= 1),
        ("solve", c.solve, "least-squares or nearest", c.solve in ("least-squares", "nearest")),
        ("empty", c.empty, "skip or reseed", c.empty in ("skip", "reseed")),
    )


@dataclass(frozen=True)
class MixerReport:
    outer: int
    updates: int
    seconds: float  # with those of the calls that it was resumed from
    loss: list[float]  # an outer step, the mean over its updates of weights
    assigned: list[tuple[int, list[int]]]  # (outer step, each system's expert), whenever it changed
    solved: int  # solutions of the gate
    passed: int  # that were passed over, for an empty cluster, one that did not settle, or the guard
    skipped: int  # updates whose gradient was not finite


EPSILON = 1e-16
ADVICE = "expected trajectories of like sizes: try smaller rates, a clip, or shorter windows (length)"


class AdaBelief(Moments):
    """Adam that divides by the gradient's deviation from its mean (Zhuang et al., NeurIPS 2020, arXiv 2010.07468); what
    `square` holds is that of the deviation."""

    def _step(self, params: list[Tensor], mean: list[Tensor], square: list[Tensor], grads: Sequence[Tensor]) -> None:
        slow, fast = BETAS
        torch._foreach_add_(self.clocks, 1.0)
        steps = self.steps
        one, two = 1 - slow**steps, 1 - fast**steps
        grads = list(grads)
        torch._foreach_lerp_(mean, grads, 1 - slow)
        away = torch._foreach_sub(grads, mean)
        torch._foreach_mul_(square, fast)
        torch._foreach_addcmul_(square, away, away, 1 - fast)
        torch._foreach_add_(square, EPSILON)
        below = torch._foreach_div(square, two)
        torch._foreach_sqrt_(below)
        torch._foreach_add_(below, EPSILON)
        torch._foreach_addcdiv_(params, mean, below, -self.lr / one)


def fit_mixer(
    model: Mixer,
    data: Dataset,
    config: MixerFit,
    generator: torch.Generator,
    progress: Callable[[int, int | None, dict[str, float]], None] | None = None,
    *,
    checkpoint: Callable[[dict[str, Tensor]], None] | None = None,
    resume: Mapping[str, Tensor] | None = None,
) -> MixerReport:
    """Trains contexts, weights and gate, in place, on data of several systems.

    progress: (outer step, all, figures) after each. checkpoint: after each, a dict of live tensors, to be saved before
    it returns; such a dict as `resume`, with the same data and config, gives the numbers of an uninterrupted fit.
    Raises ValueError for settings that cannot be, for data of one system, of fewer systems than experts, of another
    spec, that are not finite, or without a window for each system; Diverged where no update of an outer step was
    finite."""
    return _Fit(model, data, config, generator).run(progress, checkpoint, resume)


class _Fit:
    def __init__(self, model: Mixer, data: Dataset, config: MixerFit, generator: torch.Generator) -> None:
        check(config)
        self.began, self.before = time.perf_counter(), 0.0
        self.model, self.config, self.generator = model, config, generator
        systems, experts = data.systems, model.config.experts
        want = (model.spec.obs, model.spec.act, model.spec.systems)
        if (data.spec.obs, data.spec.act, systems) != want:
            raise ValueError(
                f"fit_mixer: the data have {data.spec.obs} observations, {data.spec.act} actions and {systems} "
                f"systems, the model {want[0]}, {want[1]} and {want[2]}"
            )
        if systems < 2 or systems < experts:
            raise ValueError(
                f"fit_mixer: the data hold {systems} systems, expected two and as many as the {experts} experts: pass "
                "more systems, or fewer experts"
            )
        for name, x in data.rows.items():
            if not bool(x.isfinite().all()):
                raise ValueError(f"fit_mixer: the data's {name} is not finite everywhere, expected finite trajectories")
        like = model.contexts
        lengths = data.followed
        length = int(lengths.max()) if config.length is None else config.length
        if config.length is None and int(lengths.min()) != length:
            raise ValueError(
                f"fit_mixer: episodes have {int(lengths.min())} to {length} steps; expected one length, or a `length` "
                "for the windows"
            )
        self.rows = Rows(data, length, like)
        begins = self.rows.whole()
        pools = data.of_system(begins)
        if min(map(len, pools)) == 0:
            raise ValueError(f"fit_mixer: some system has no window of {length} steps: pass a smaller length")
        self.sizes = torch.tensor([len(x) for x in pools])
        self.pools = torch.stack([x.repeat(-(-int(self.sizes.max()) // len(x)))[: self.sizes.max()] for x in pools])
        model.prepare(Rows(data, 1, like).segment(data.paired.nonzero()[:, 0].to(like.device)))
        z = model.observed(data.obs.to(like))
        self.weight = torch.ones(systems, device=like.device, dtype=like.dtype)
        if config.relative:
            owner = data.of_system(torch.arange(len(data), device=data.obs.device))
            spread = torch.stack([z[i.to(z.device)].var(0, correction=0).mean() for i in owner])
            self.weight = 1 / spread.clamp(min=1e-6 * float(spread.max()))
        weights = {k: p for k, p in model.named_parameters() if k != "contexts"}
        self.weights = list(weights.values())
        self.slow = AdaBelief(weights, config.lr)
        self.fast = AdaBelief({"contexts": model.contexts}, config.lr_context)
        self.slopes: dict[str, Callable[[Segment], tuple[Tensor, list[Tensor]]]] = {}
        self.centre: Tensor | None = None
        self.outer = self.updates = self.solved = self.passed = self.skipped = 0
        self.loss: list[float] = []
        self.assigned: list[tuple[int, list[int]]] = []

    # ------------------------------------------------------------ one outer step

    def run(self, progress, checkpoint, resume) -> MixerReport:
        if resume is not None:
            self.load(resume)
        while self.outer < self.config.outer:
            self._log()
            total, updates, skipped = 0.0, self.updates, self.skipped
            for params, optimizer, lr in (
                ([self.model.contexts], self.fast, self.config.lr_context),
                (self.weights, self.slow, self.config.lr),
            ):
                if not params[0].requires_grad:  # contexts that stay
                    continue
                old = [p.detach().clone() for p in params]
                total = sum(self._update(params, old, optimizer, lr) for _ in range(self.config.inner))
            self.outer += 1
            if self.outer == self.config.warm and self.model.config.gating == "solved":
                self._spread()
            self.loss.append(float(total) / self.config.inner)
            if self.skipped - skipped == self.updates - updates:
                raise Diverged(
                    f"fit_mixer: no update of outer step {self.outer} was finite at lr {self.config.lr:g} and "
                    f"lr_context {self.config.lr_context:g}; {ADVICE}"
                )
            self._log()
            if progress is not None:
                used = len(set(self.assigned[-1][1]))
                progress(self.outer, self.config.outer, {"loss": self.loss[-1], "experts": float(used)})
            if checkpoint is not None:
                checkpoint(self.state())
        if self.outer:
            segment = self._batch()
            with torch.no_grad():
                some = bool(self.model.errors(segment, self.model.moves(segment.system, 0)).isfinite().any())
            if not some:
                raise Diverged(f"fit_mixer: after {self.outer} outer steps no system is predicted finitely; {ADVICE}")
        return MixerReport(
            self.outer, self.updates, self.seconds, self.loss, self.assigned, self.solved, self.passed, self.skipped
        )

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def _update(self, params: Sequence[Tensor], old: list[Tensor], optimizer: AdaBelief, lr: float) -> Tensor:
        model, config = self.model, self.config
        segment = self._batch()
        if model.config.modulation:
            self._meet()
        whose = "weights" if params is self.weights else "contexts"
        if whose not in self.slopes:
            self.slopes[whose] = graphed(partial(self._slopes, params), segment, fallback=True)
        loss, grads = self.slopes[whose](segment)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        third = config.outer / 3
        rate = lr * 0.4 ** ((self.outer >= third) + (self.outer >= 2 * third))
        if bool(norm.isfinite()):
            if config.clip is not None:
                torch._foreach_mul_(grads, (config.clip / (norm + 1e-6)).clamp(max=1.0))
            with torch.no_grad():
                pull = config.proximal / sum(p.numel() for p in params)
                torch._foreach_add_(grads, torch._foreach_sub(list(params), old), alpha=pull)
            optimizer.lr = rate
            optimizer.step(grads)
        else:
            self.skipped += 1
        self.updates += 1
        now = config.warm <= self.outer < max(config.until * config.outer, config.warm + 1)
        if model.config.gating == "solved" and now and self.updates % config.gate_every == 0:
            self._solve(segment)
        return loss.clone()

    def _slopes(self, params: Sequence[Tensor], segment: Segment) -> tuple[Tensor, list[Tensor]]:
        """The loss, and its gradients by params."""
        model = self.model
        loss = (model.errors(segment, model.moves(segment.system)) * self.weight).mean()
        whole = loss if model.worth is None or params is not self.weights else loss + model._wrong(segment)
        grads = torch.autograd.grad(whole, params, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
        return loss.detach(), grads

    def _batch(self) -> Segment:
        """So many windows of each system."""
        n, sizes, rows = self.config.batch, self.sizes[:, None], self.pools
        draw = torch.rand(len(self.sizes), n, generator=self.generator, device=self.generator.device)
        if bool((sizes != n).any()):  # else all there are
            rows = rows.gather(1, (draw.cpu() * sizes).long().clamp(max=sizes - 1).to(rows.device))
        return self.rows.segment(rows.flatten().to(self.rows.table.device))

    def _meet(self) -> None:
        """Each system gets another of its expert, or itself, whose context modulates it next."""
        model = self.model
        chosen = model.chosen(model.contexts.detach())
        same = (chosen[:, None] == chosen[None]).float()
        pick = torch.multinomial(same.to(self.generator.device), 1, generator=self.generator)[:, 0]
        model.neighbour.copy_(pick)

    @torch.no_grad()
    def _spread(self) -> None:
        """All experts begin as that of the first system."""
        lead = int(self.model.chosen(self.model.contexts)[0])
        for name, p, m, s in zip(self.slow.params, self.weights, self.slow.mean, self.slow.square, strict=True):
            for x in (p, m, s) if name.startswith("experts.") and len(p) > 1 else ():
                x.copy_(x[lead].expand_as(x))

    @torch.no_grad()
    def _solve(self, segment: Segment) -> None:
        """The gate anew: clusters of contexts, each with the expert that errs least there."""
        model, config, k = self.model, self.config, self.model.config.experts
        contexts = model.contexts.detach()
        starts = [self.centre, *(scattered(contexts, k, self.generator) for _ in range(config.restarts))]
        p = 2.0 if config.solve == "nearest" else 1.0
        tried = [kmeans(contexts, k, x, self.generator, config.empty == "reseed", p) for x in starts]
        found = min((x for x in tried if x is not None), key=lambda x: x.spread, default=None)
        if found is None:
            self.centre, self.passed = None, self.passed + 1
            return
        errors = every_error(model, segment)
        cost = costs(errors * self.weight[:, None], found.label, k)
        order = (hungarian if config.assign == "hungarian" else greedy)(cost)
        if config.solve == "nearest":
            gate = nearest_gate(found.centre, order)
        else:
            expert = torch.tensor(order, device=contexts.device)[found.label]
            gate = solved_gate(contexts, expert, k, self.generator)
        if config.guard is not None:
            chosen = lambda gate: model.logits(contexts, gate).argmax(-1, keepdim=True)
            by = lambda gate: (errors.gather(1, chosen(gate))[:, 0] * self.weight).mean()
            if not by(gate) <= config.guard * by(model.gate):
                self.centre, self.passed = None, self.passed + 1
                return
        model.gate.copy_(gate)
        self.centre, self.solved = found.centre, self.solved + 1

    def _log(self) -> None:
        with torch.no_grad():
            chosen = self.model.chosen(self.model.contexts).tolist()
        if not self.assigned or self.assigned[-1][1] != chosen:
            self.assigned.append((self.outer, chosen))

    # ------------------------------------------------------------ resuming

    def state(self) -> dict[str, Tensor]:
        counts = [self.outer, self.updates, self.solved, self.passed, self.skipped]
        none = self.model.contexts.detach().new_zeros(0, self.model.contexts.shape[1])
        return {
            **self.slow.state("slow"), **self.fast.state("fast"), "gate": self.model.gate.detach(),
            "neighbour": self.model.neighbour, "counts": torch.tensor(counts),
            "centre": none if self.centre is None else self.centre,
            "loss": torch.tensor(self.loss, dtype=torch.float64), "generator": self.generator.get_state(),
            "assigned.at": torch.tensor([at for at, _ in self.assigned]),
            "assigned.to": torch.tensor([to for _, to in self.assigned]),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
        }  # fmt: skip

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.slow.load(state, "slow")
        self.fast.load(state, "fast")
        with torch.no_grad():
            self.model.gate.copy_(state["gate"])
            self.model.neighbour.copy_(state["neighbour"])
        self.outer, self.updates, self.solved, self.passed, self.skipped = state["counts"].tolist()
        self.centre = state["centre"].to(self.model.contexts).clone() if len(state["centre"]) else None
        self.loss, self.before = state["loss"].tolist(), float(state.get("seconds", 0.0))
        self.generator.set_state(state["generator"].cpu())
        self.assigned = list(zip(state["assigned.at"].tolist(), state["assigned.to"].tolist(), strict=True))


@torch.no_grad()
def every_error(model: Mixer, segment: Segment) -> Tensor:
    """[systems, E]: the error of every expert on each group's windows, under the group's context."""
    ctx, k, g = model.contexts[segment.system], model.config.experts, len(segment.system)
    wide = Segment._make(x.repeat(k, *[1] * (x.ndim - 1)) for x in segment)
    expert = torch.arange(k, device=ctx.device).repeat_interleave(g)
    cond = model.served(ctx.repeat(k, 1), expert)
    return model.errors(wide, lambda z, act, dt: model.moved(cond, z, act, dt)).reshape(k, g).T
