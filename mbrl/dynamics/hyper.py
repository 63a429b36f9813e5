"""A hypernetwork that generates the dynamics network of each task from the task's embedding, and its continual
training: what it generates for earlier tasks is anchored, so that nothing of their data is kept.

HyperCRL (Huang et al., ICRA 2021, arXiv 2009.11997) after von Oswald et al. (ICLR 2020, arXiv 1906.00695); the
magnitude-invariant parametrisation is that of Ortiz et al. (arXiv 2304.07645)."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbrl.core import Diverged, Segment, Spec, Tree, demand, group
from mbrl.data import Dataset
from mbrl.device import graphed
from mbrl.fit import Adam, Rows
from mbrl.nets import apply_layers
from mbrl.onestep import OneStep
from mbrl.rollout import masked_mean

BOUNDS = (0.5, -10.0)  # of the log-variance, upper and lower, as they begin


@dataclass(frozen=True)
class HyperConfig:
    """`hidden` is the generated network's, `hyper` the hypernetwork's; without any it is linear. Embeddings have the
    width of the data's contexts or, where these have none, `embedding`.

    chunk: None has one linear head for each generated tensor; a number generates so many parameters at a time from one
    head, which is told by a learned embedding of that chunk which they are. `mip`: the magnitude-invariant
    parametrisation: embeddings are encoded at a constant norm, and what is generated is added to a network of its own.
    `gaussian`: a variance is learned, too; its bounds are generated as the weights are. `scale_targets`: see
    `mbrl.dynamics.single.SingleConfig`."""

    hidden: tuple[int, ...] = (200, 200, 200, 200)
    hyper: tuple[int, ...] = (50, 50)
    embedding: int = 10
    chunk: int | None = None
    mip: bool = False
    gaussian: bool = False
    bound: float = 0.01
    scale_targets: bool = True

    def build(self, spec: Spec, generator: torch.Generator | None = None) -> "Hyper":
        return Hyper(spec, self, generator)


@final
class Hyper(OneStep):
    """A condition is the generated weights, leading with the
    contexts; a context is an embedding, those of the data's systems are the rows of `contexts` [systems, E]. Where the
    spec has no contexts, several systems make it have them; of a single one, the row serves.

    Noise and uncertainty are those of `mbrl.onestep.OneStep`. The normalisers are set once, by the first call of
    `prepare`, and stay: what was anchored would mean something else otherwise."""

    config: HyperConfig
    anchored: Tensor  # [] bool: whether the normalisers are set

    def __init__(self, spec: Spec, config: HyperConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(spec, config)
        demand(
            "HyperConfig",
            ("hidden", config.hidden, "widths of at least 1", all(n >= 1 for n in config.hidden)),
            ("hyper", config.hyper, "widths of at least 1", all(n >= 1 for n in config.hyper)),
            ("embedding", config.embedding, "at least 1", config.embedding >= 1),
            ("chunk", config.chunk, "at least 1, or none", config.chunk is None or config.chunk >= 1),
        )
        sizes = [spec.obs + spec.act, *config.hidden, self.outputs]
        self.shapes = [shape for i, o in pairwise(sizes) for shape in ((i, o), (1, o))]
        if config.gaussian:
            self.shapes += 2 * [(1, spec.obs + 1)]
        self.size = sum(i * o for i, o in self.shapes)
        device = "cpu" if generator is None else generator.device
        embedding = spec.ctx or config.embedding
        if spec.systems > 1:
            self.spec = replace(spec, ctx=embedding)
        normal = lambda *shape: torch.empty(*shape, device=device).normal_(generator=generator)
        self.contexts = nn.Parameter(normal(spec.systems, embedding))
        chunks = 0 if config.chunk is None else -(-self.size // config.chunk)
        self.chunks = nn.Parameter(normal(chunks, embedding)) if chunks else None
        inputs = (2 if config.mip else 1) * embedding * (2 if chunks else 1)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise([inputs, *config.hyper]):
            self.weights.append(_drawn(normal(i, o), 2 / i if config.mip else 2 / (i + o)))
            self.biases.append(torch.zeros(o, device=device))
        last = [inputs, *config.hyper][-1]
        fan = lambda n: 2 / n if config.mip else 2 / (last + n)
        if config.chunk is None:
            heads = [_drawn(normal(last, i * o), fan(i * o)) for i, o in self.shapes]
            self.head = nn.Parameter(torch.cat(heads, 1))  # [H, P]
        else:
            mean = self.size / len(self.shapes)  # a chunk is of no tensor; of one of the mean size, say
            self.head = nn.Parameter(_drawn(normal(last, config.chunk), fan(max(mean, config.chunk))))
        self.own = nn.Parameter(self._own(normal))  # [P], or [chunk] without mip: what is generated is added to
        self._normalise(device, once=True)

    def _own(self, normal: Callable[..., Tensor]) -> Tensor:
        """The output layer's bias: zeros, or with mip a network's own initial weights."""
        if not self.config.mip:
            return 0 * normal(self.size if self.config.chunk is None else self.config.chunk)
        last = 2 * len(self.config.hidden) + 1  # after the last layer come the bounds
        parts = [
            _drawn(normal(i * o), 2 / i) if n % 2 == 0 and n <= last else 0 * normal(i * o)
            for n, (i, o) in enumerate(self.shapes)
        ]
        return torch.cat(parts)

    # ------------------------------------------------------------ generation

    def generate(self, ctx: Tensor) -> Tensor:
        """Embeddings [G, E] -> all generated parameters [G, P], in one pass."""
        x = self.features(ctx)
        if self.chunks is None:
            return torch.addmm(self.own, x, self.head)
        made = x @ self.head
        if not self.config.mip:
            made = made + self.own
        made = made.reshape(len(ctx), self.chunks.shape[0] * self.head.shape[1])[:, : self.size]
        return made + self.own if self.config.mip else made

    def features(self, ctx: Tensor) -> Tensor:
        """What the head reads, [G, H], or [G * chunks, H]."""
        x = ctx
        if self.chunks is not None:
            n = self.chunks.shape[0]
            x = torch.cat([ctx.repeat_interleave(n, 0), self.chunks.repeat(len(ctx), 1)], -1)
        if self.config.mip:
            angle = 0.5 * math.pi * torch.sigmoid(x)
            x = torch.cat([angle.cos(), angle.sin()], -1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = F.relu(x @ weight + bias)
        return x

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """[G, P] -> the layers (weight [G, in, out], bias [G, 1, out], ...), and the bounds [G, 1, O + 1] where there
        is a variance."""
        parts = flat.split([i * o for i, o in self.shapes], -1)
        out = [x.unflatten(1, shape) for x, shape in zip(parts, self.shapes, strict=True)]
        if self.config.gaussian:
            out[-2], out[-1] = out[-2] + BOUNDS[0], out[-1] + BOUNDS[1]
        return tuple(out)

    def condition(self, ctx: Tensor) -> Tree:
        return self.split(self.generate(ctx if self.spec.ctx else self.contexts[:1]))

    def context(self, system: Tensor) -> Tensor:
        return self.contexts[system] if self.spec.ctx else super().context(system)

    def pinned(self, part: Tensor) -> Tree:
        return self.split(self.generate(self.contexts[:1]))

    def evaluate(self, x: Tensor, cond: Tree) -> Tensor:
        layers = cond[:-2] if self.config.gaussian else cond
        return apply_layers(layers, group(x, layers[0].shape[0]), "silu")

    def limits(self, cond: Tree) -> tuple[Tensor, Tensor]:
        return cond[-2], cond[-1]

    def trained(self, segment: Segment) -> Tree:
        """Each system by its own network."""
        return self.split(self.generate(self.contexts[segment.system]))

    def loss_of(self, flat: Tensor, segment: Segment) -> Tensor:
        """The loss of generated parameters [G, P]."""
        return self.loss_under(self.split(flat), segment)


def _drawn(normal: Tensor, variance: float) -> Tensor:
    return normal * variance**0.5


# ---------------------------------------------------------------- continual training


@dataclass(frozen=True)
class HyperFit:
    """How a task is learned. `beta` weighs the anchor, beta / t sum_j |h(e_j; theta*) - h(e_j; theta + dtheta)|^2 over
    the t earlier tasks; dtheta is the step that Adam would take by the task's loss alone, where there is
    `look_ahead`, else 0. `past`: of how many earlier tasks, drawn anew each time, an update sees the anchor; all by
    default. `clip`: of the gradient's norm, without the embedding's."""

    updates: int = 5000
    batch: int = 100
    lr: float = 1e-4
    lr_context: float = 1e-4
    beta: float = 0.05
    look_ahead: bool = True
    past: int | None = None
    clip: float = 5.0


def check_fit(config: HyperFit) -> None:
    """Raises ValueError for settings that cannot be."""
    positive = lambda x: 0 < x < math.inf
    demand(
        "HyperFit",
        ("updates", config.updates, "at least 0", config.updates >= 0),
        ("batch", config.batch, "at least 1", config.batch >= 1),
        ("lr", config.lr, "a positive number", positive(config.lr)),
        ("lr_context", config.lr_context, "a positive number", positive(config.lr_context)),
        ("beta", config.beta, "a number of at least 0", 0 <= config.beta < math.inf),
        ("past", config.past, "at least 1, or none", config.past is None or config.past >= 1),
        ("clip", config.clip, "above 0", config.clip > 0),
    )


@dataclass(frozen=True)
class HyperReport:
    updates: int
    seconds: float  # of this call
    loss: list[float]  # the task's, means over tenths of the updates
    anchor: list[float]  # likewise, without beta


ROWS = 16  # of the head a product at a time: all 256 at once took a CPU four times as long


def fit_hyper(
    model: Hyper,
    data: Dataset,
    task: int,
    config: HyperFit,
    generator: torch.Generator,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    *,
    importance: Tensor | None = None,
    checkpoint: Callable[[dict[str, Tensor]], None] | None = None,
    resume: Mapping[str, Tensor] | None = None,
    every: int = 100,
) -> HyperReport:
    """Learns task number `task` from its own data, in place; tasks 0 .. task - 1 are those that came before. What the
    model generates for them when this begins is what is anchored. The embeddings of other tasks do not move.

    importance [task, P]: weighs what is anchored (see `importance_of`); ones by default. progress: (update, updates,
    figures) every so many updates, then checkpoint: a dict of live tensors; such a dict as `resume`, with the model as
    it was when the task began, gives the numbers of an uninterrupted fit. Raises ValueError for settings that cannot
    be, for a task that the model has no embedding for, and for data of another spec or without a pair; Diverged
    where the loss is not finite."""
    began, spec = time.perf_counter(), model.spec
    check_fit(config)
    if not 0 <= task < spec.systems:
        raise ValueError(f"fit_hyper: task {task} is not one of the {spec.systems} that the model was built for")
    if (data.spec.obs, data.spec.act) != (spec.obs, spec.act):
        raise ValueError(
            f"fit_hyper: the data have {data.spec.obs} observations and {data.spec.act} actions, the model "
            f"{spec.obs} and {spec.act}"
        )
    if importance is not None and importance.shape != (task, model.size):
        raise ValueError(f"fit_hyper: importance is {list(importance.shape)}, expected {[task, model.size]}")
    rows = Rows(data, 1, model.head)
    index = data.paired.nonzero()[:, 0].to(rows.table.device)
    if len(index) == 0:
        raise ValueError("fit_hyper: the data hold no transition")
    model.prepare(rows.segment(index))
    theta = {k: p for k, p in model.named_parameters() if k != "contexts"}
    own = model.contexts.detach()[task : task + 1].clone().requires_grad_()
    past = model.contexts.detach()[:task]
    with torch.no_grad():
        goal = model.generate(past)  # [task, P]
    slow = Adam(theta, config.lr)
    fast = Adam({"context": own}, config.lr_context)
    done, curve = 0, goal.new_zeros(2, 10, dtype=torch.float64)
    if resume is not None:
        if resume["goal"].shape != goal.shape:
            raise ValueError(
                f"fit_hyper: resume holds {list(resume['goal'].shape)} anchors, expected {list(goal.shape)}"
            )
        slow.load(resume, "theta")
        fast.load(resume, "own")
        goal, curve, done = resume["goal"].clone(), resume["curve"].clone(), int(resume["done"])
        generator.set_state(resume["generator"])
    at = index.device

    def update(pick: Tensor, some: Tensor | None) -> tuple[Tensor, Tensor]:
        loss = model.loss_of(model.generate(own), rows.segment(index[pick]))
        grads = torch.autograd.grad(loss, [*theta.values(), own])
        anchor = loss.new_zeros(())
        if task and config.beta:
            moved = slow.look(grads[:-1]) if config.look_ahead else theta
            e, want = (past, goal) if some is None else (past[some], goal[some])
            weigh = importance if importance is None or some is None else importance[some]
            anchor = _anchor(model, moved, config.beta, e, want, weigh, dict(zip(theta, grads, strict=False)))
        norm = torch.stack(torch._foreach_norm(grads[:-1])).norm()
        scale = (config.clip / (norm + 1e-6)).clamp(max=1.0)
        if not scale.is_cpu or scale < 1:  # spares a CPU a pass over memory, and an accelerator a wait
            torch._foreach_mul_(grads[:-1], scale)
        slow.step(grads[:-1])
        fast.step(grads[-1:])
        return loss.detach(), anchor

    go = None
    while done < config.updates:
        pick = torch.randint(len(index), (config.batch,), generator=generator, device=generator.device).to(at)
        some = None
        if config.past is not None and config.past < task:
            some = torch.randperm(task, generator=generator, device=generator.device)[: config.past].to(at)
        go = go or graphed(update, pick, some, state=[*slow.live(), *fast.live()])
        loss, anchor = go(pick, some)
        curve[:, 10 * done // config.updates] += torch.stack([loss, anchor])
        done += 1
        if done % every == 0 or done == config.updates:
            value = loss.item()
            if not math.isfinite(value):
                raise Diverged(
                    f"fit_hyper: the loss of task {task} is {value}; expected finite data, or try a smaller lr"
                )
            if progress is not None:
                progress(done, config.updates, {"loss": value, "anchor": float(anchor)})
            if checkpoint is not None:
                state = slow.state("theta") | fast.state("own")
                checkpoint(
                    state
                    | {"goal": goal, "curve": curve, "done": torch.tensor(done), "generator": generator.get_state()}
                )
    with torch.no_grad():
        model.contexts[task] = own[0]
    counts = torch.bincount(10 * torch.arange(config.updates) // max(config.updates, 1), minlength=10).clamp(min=1)
    means = curve.cpu() / counts
    return HyperReport(config.updates, time.perf_counter() - began, means[0].tolist(), means[1].tolist())


def _anchor(
    model: Hyper,
    theta: Mapping[str, Tensor],
    beta: float,
    e: Tensor,
    goal: Tensor,
    weigh: Tensor | None,
    grads: Mapping[str, Tensor],
) -> Tensor:
    """sum_j |goal_j - h(e_j; theta)|^2 / t over the t tasks e [t, E], all in one pass. beta times its gradient by theta
    is added to grads."""
    at = {k: p.detach().requires_grad_(k not in ("head", "own")) for k, p in theta.items()}
    call = lambda f: torch.func.functional_call(model, at, (f,))
    if model.chunks is not None:
        at = {k: p.requires_grad_() for k, p in at.items()}
        made = call(lambda m: m.generate(e))
        error = made - goal
        total = (error**2 if weigh is None else error**2 * weigh).sum() / len(e)
        for g, pull in zip(grads.values(), torch.autograd.grad(beta * total, list(at.values())), strict=True):
            g.add_(pull)
        return total.detach()
    x = call(lambda m: m.features(e))
    with torch.no_grad():  # the head's gradient is a product that can be added where it belongs
        error = torch.addmm(at["own"], x, at["head"]).sub_(goal)
        slope = error if weigh is None else error * weigh
        total = (slope * error).sum() / len(e)
        slope.mul_(2 * beta / len(e))
        grads["own"].add_(slope.sum(0))
        for g, part in zip(grads["head"].split(ROWS), x.T.split(ROWS), strict=True):
            g.addmm_(part, slope)
        back = slope @ at["head"].T
    rest = [k for k in at if k not in ("head", "own")]
    if rest:  # none where the hypernetwork is linear
        for k, pull in zip(rest, torch.autograd.grad(x, [at[k] for k in rest], back), strict=True):
            grads[k].add_(pull)
    return total


def importance_of(
    model: Hyper, data: Dataset, task: int, generator: torch.Generator, batches: int = 100, batch: int = 100
) -> Tensor:
    """[P]: how much the loss of a task depends on each parameter that is generated for it: the mean square of the
    gradient over batches, scaled to a mean of 1. For `fit_hyper` of later tasks."""
    rows = Rows(data, 1, model.head)
    index = data.paired.nonzero()[:, 0].to(rows.table.device)
    flat = model.generate(model.contexts[task : task + 1]).detach().requires_grad_()
    total = torch.zeros_like(flat)
    for _ in range(batches):
        pick = torch.randint(len(index), (batch,), generator=generator, device=generator.device)
        segment = rows.segment(index[pick.to(index.device)])
        total += torch.autograd.grad(model.loss_of(flat, segment), flat)[0] ** 2
    return (total / total.mean().clamp(min=1e-30))[0]


# ---------------------------------------------------------------- tasks that are not told


@torch.no_grad()
def errors_of(model: Hyper, segment: Segment, contexts: Tensor) -> Tensor:
    """[K]: the mean squared errors of the same transitions under embeddings [K, E], in the units of the fit."""
    wide = _repeated(segment, len(contexts))
    error = model.squares(model.split(model.generate(contexts)), wide)
    return torch.stack([masked_mean(x, segment.mask.flatten()) for x in group(error, len(contexts))])


def identify(model: Hyper, segment: Segment, tasks: int) -> tuple[int, Tensor]:
    """Which of the first `tasks` tasks the transitions are of, by the least error; and the errors [tasks]."""
    errors = errors_of(model, segment, model.contexts[:tasks])
    return int(errors.nan_to_num(torch.inf).argmin()), errors


def infer(model: Hyper, segment: Segment, starts: Tensor, steps: int = 200, lr: float = 0.05) -> tuple[Tensor, Tensor]:
    """The embedding [1, E] that explains transitions best: gradient descent from each of starts [K, E] at once, the
    weights fixed. Returns it with its error []."""
    e = starts.detach().clone().requires_grad_()
    wide = _repeated(segment, len(starts))
    adam = Adam({"e": e}, lr)
    for _ in range(steps):
        loss = masked_mean(model.squares(model.split(model.generate(e)), wide), wide.mask.flatten()) * len(starts)
        adam.step(torch.autograd.grad(loss, [e]))
    errors = errors_of(model, segment, e.detach())
    best = errors.nan_to_num(torch.inf).argmin()
    return e.detach()[best][None], errors[best]


def _repeated(segment: Segment, k: int) -> Segment:
    """The same windows for each of k systems, contiguous by system."""
    *fields, system = segment
    return Segment._make([*(x.repeat(k, *[1] * (x.ndim - 1)) for x in fields), system.repeat(k)])
