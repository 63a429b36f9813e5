"""Adapting a learner with contexts to a system that it has not met: gradient descent on the context alone, the weights
fixed, from a few transitions or trajectories of that system."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mbrl.core import Dynamics, Segment, StepInput, demand
from mbrl.data import Dataset
from mbrl.fit import Adam, Rows
from mbrl.rollout import steps, unroll


class Adapted(NamedTuple):
    """What descent from each start came to, K of them, the best first."""

    tried: Tensor  # [K, C]
    errors: Tensor  # [K]  squared, of the observations, over `scale`
    share: Tensor  # [K]  see `adapt`
    start: Tensor  # [K] int64: which start each came from

    @property
    def ctx(self) -> Tensor:
        """The best context, [1, C]."""
        return self.tried[:1]


def adapt(
    model: Dynamics,
    segment: Segment,
    *,
    starts: Tensor | None = None,
    groups: Tensor | None = None,
    keep: int = 8,
    updates: int = 100,
    lr: float = 0.03,
    alpha: float = 0.0,
    scale: Tensor | None = None,
    prior: float = 0.0,
) -> Adapted:
    """Contexts that explain windows of one system, whatever the learner: by its predictions of the observations alone,
    forced by alpha (0: free runs over the windows); no reward is asked for.

    starts [K, C]: where descent may begin, by default the contexts of the systems that the learner was fitted to. A
    gate that chooses by the context has no gradient, so that descent stays with the expert of its start: the `keep`
    best of the starts are descended from, all at once, by `updates` steps of Adam. groups [K]: numbers that starts with
    the same expert share; the best of each group is among those kept, however many that are. share: what each would
    have of the belief if errors were normal and of unknown size, those of one window one observation of each dimension
    (its steps err together), and the starts equally likely: e_k^(-n / 2) over their sum, of n = windows x O; 0 where no
    error is finite.

    scale [O]: what squared errors are divided by, by default the windows' own mean square changes. Where little happens
    these are small, and descent explains the learner's own faults: then give those of the training data, and a `prior`:
    the weight of (ctx - mean)^2 / variance over the known systems' contexts, mean over dimensions.

    Raises ValueError for settings that cannot be, for a learner without contexts, for windows of another width or of
    several systems, that hold no transition or are not finite."""
    demand(
        "adapt",
        ("keep", keep, "at least 1", keep >= 1),
        ("updates", updates, "at least 0", updates >= 0),
        ("lr", lr, "a rate above 0", 0 < lr < math.inf),
        ("alpha", alpha, "0 to 1", 0 <= alpha <= 1),
        ("prior", prior, "0 or more", 0 <= prior < math.inf),
    )
    given = known(model) if starts is None else starts.detach()
    width = model.spec.ctx
    if segment.obs.shape[-1] != model.spec.obs or segment.act.shape[-1] != model.spec.act:
        raise ValueError(
            f"adapt: got {segment.obs.shape[-1]} observations and {segment.act.shape[-1]} actions, the learner has "
            f"{model.spec.obs} and {model.spec.act}"
        )
    if len(segment.system) != 1 or not bool(segment.mask.any()):
        count = int(segment.mask.sum())
        raise ValueError(f"adapt: got {len(segment.system)} systems and {count} transitions, expected one, and some")
    for name in ("obs", "act"):
        if not bool(getattr(segment, name).isfinite().all()):
            raise ValueError(f"adapt: the windows' {name} is not finite everywhere, expected finite trajectories")
    if not width:
        raise ValueError(f"adapt: {type(model).__name__} has no contexts; expected a learner with them, a hypernetwork")
    if given.ndim != 2 or given.shape[1] != width:
        raise ValueError(f"adapt: starts are {list(given.shape)}, expected [K, {width}]")
    if groups is not None and groups.shape != (len(given),):
        raise ValueError(f"adapt: groups are {list(groups.shape)}, expected one for each of the {len(given)} starts")
    if scale is None:
        scale = (segment.obs[:, 1:] - segment.obs[:, :-1])[segment.mask].square().mean(0)
    scale = torch.where(scale > 0, scale, 1.0).to(segment.obs)
    about = known(model).to(segment.obs) if prior else given.to(segment.obs)
    middle, width_of = about.mean(0), about.var(0, correction=0).clamp(min=1e-12)
    error = lambda e: _errors(model, segment, e, alpha, scale)
    cost = lambda e: error(e) + (prior * ((e - middle).square() / width_of).mean(-1) if prior else 0.0)
    with torch.no_grad():
        best = cost(given.to(segment.obs)).nan_to_num(torch.inf).argsort()
        if groups is not None:  # each group's best first, then the others
            inside = groups.to(best.device)[best]
            earlier = (inside[:, None] == inside[None]).tril(-1).any(1)
            best, keep = torch.cat([best[~earlier], best[earlier]]), max(keep, int((~earlier).sum()))
        best = best[:keep]
    e = given.to(segment.obs)[best].clone().requires_grad_()
    adam = Adam({"e": e}, lr)
    lowest, found = torch.full_like(e[:, 0], torch.inf), e.detach().clone()
    for _ in range(updates):
        with torch.enable_grad():
            errors = cost(e) + 0 * e.sum(1)  # also where a gate alone reads the context, or nothing does
            (grad,) = torch.autograd.grad(errors.sum(), [e])
        better = errors.detach() < lowest
        lowest = torch.where(better, errors.detach(), lowest)
        found = torch.where(better[:, None], e.detach(), found)
        adam.step([grad.nan_to_num(0.0, 0.0, 0.0)])
    with torch.no_grad():
        errors = cost(e)
        better = errors < lowest
        lowest, found = torch.where(better, errors, lowest), torch.where(better[:, None], e, found)
        order = lowest.argsort()
        lowest = error(found).nan_to_num(torch.inf, torch.inf) if prior else lowest
    n = segment.mask.any(1).sum() * model.spec.obs
    share = (-0.5 * n * lowest[order].clamp(min=torch.finfo(lowest.dtype).tiny).log()).softmax(0).nan_to_num(0.0)
    return Adapted(found[order].detach(), lowest[order], share, best[order])


def predicted(model: Dynamics, segment: Segment, ctx: Tensor, alpha: float = 0.0) -> Tensor:
    """The observations [K * B, T, O] of windows [B, T] under each context [K, C], contiguous by context, forced by
    alpha (0: free runs), without noise."""
    k, (b, t) = len(ctx), segment.mask.shape
    wide = lambda x: x.repeat(k, *[1] * (x.ndim - 1))
    obs, cond = wide(segment.obs), model.condition(ctx)
    inputs = StepInput(wide(segment.act), obs.new_zeros(k * b, t, model.noise_dim), wide(segment.dt))
    forced = obs[:, 1:] if alpha else None
    state = model.init(obs[:, 0], cond)
    return unroll(model, state, steps(inputs), cond, forced=forced, alpha=alpha, mask=wide(segment.mask))[1].obs


def _errors(model: Dynamics, segment: Segment, ctx: Tensor, alpha: float, scale: Tensor) -> Tensor:
    """[K]: what is predicted of the windows under each context [K, C]."""
    said = predicted(model, segment, ctx, alpha).unflatten(0, (len(ctx), -1))
    error = ((said - segment.obs[:, 1:]).square() / scale).mean(-1)
    return torch.where(segment.mask, error, 0.0).sum((1, 2)) / segment.mask.sum()


def known(model: Dynamics) -> Tensor:
    """The contexts of the systems that a learner was fitted to, [systems, C]."""
    device = next(model.parameters()).device
    return model.context(torch.arange(model.spec.systems, device=device)).detach()


def met(model: Dynamics, ctx: Tensor) -> int:
    """Adds a context [1, C] to the learner's table, in place; returns the number of that system."""
    table = dict(model.named_parameters()).get("contexts")
    if table is None or table.ndim != 2:
        raise ValueError(
            f"met: {type(model).__name__} has no table `contexts` [systems, C] to which one could be added"
        )
    if ctx.shape != (1, table.shape[1]):
        raise ValueError(f"met: the context is {list(ctx.shape)}, expected {[1, table.shape[1]]}")
    wide = torch.cat([table.detach(), ctx.detach().to(table)])
    model.register_parameter("contexts", nn.Parameter(wide, requires_grad=table.requires_grad))
    near = dict(model.named_buffers()).get("neighbour")
    if near is not None:  # of a mixture: no other system's context modulates this one
        model.register_buffer("neighbour", torch.cat([near, near.new_tensor([len(table)])]))
    model.spec = replace(model.spec, systems=len(wide), ctx=table.shape[1])
    return len(wide) - 1


# ---------------------------------------------------------------- judging


def windows(
    data: Dataset, system: int, like: Tensor, length: int | None = None, episodes: int | None = None
) -> Segment:
    """Windows of one of the data's systems, one after the other without overlap, of `length` steps or whole episodes,
    of its first `episodes`; as a segment of one system, for `adapt`. Raises ValueError where there is none, and for a
    system that the data do not have."""
    demand(
        "windows",
        ("system", system, f"0 to {data.systems - 1}, the data's systems", 0 <= system < data.systems),
        ("length", length, "at least 1", length is None or length >= 1),
    )
    mine = torch.arange(data.episodes) if data.system is None else (data.system.cpu() == system).nonzero()[:, 0]
    mine = mine[:episodes]
    length = int(data.followed.cpu()[mine].min()) if length is None else length
    rows = Rows(data, length, like)
    fits = torch.zeros(len(data), dtype=torch.bool).index_fill_(0, rows.whole().cpu(), True)
    starts = data.starts.cpu()
    begins = torch.cat([torch.arange(int(starts[e]), int(starts[e + 1]), length) for e in mine])
    begins = begins[fits[begins]]
    if len(begins) == 0:
        raise ValueError(f"windows: system {system} has no window of {length} steps: pass a smaller length")
    return rows.segment(begins.to(rows.table.device))._replace(system=rows.system[:1])


@torch.no_grad()
def relative_errors(model: Dynamics, data: Dataset, ctx: Tensor) -> Tensor:
    """[systems]: of free runs from each episode's first observation to its end, |x' - x|^2 / |x|^2, the squares summed
    over times and dimensions, mean over a system's episodes; ctx [systems, C]: their contexts. Infinite where a run is
    not finite."""
    like, out = next(model.parameters()).detach(), []
    data, followed = data.to(like), data.followed.to(like.device)
    for system in range(data.systems):
        own = torch.ones_like(followed) > 0 if data.system is None else data.system == system
        segment = data.windows(int(followed[own].max()), data.starts[:-1][own])
        true = segment.obs[:, 1:].double()
        gap = predicted(model, segment, ctx[system : system + 1].to(like)).double() - true
        total = lambda x, some=segment.mask[..., None]: torch.where(some, x, 0.0).square().sum((1, 2))
        error = total(gap) / total(true)
        out.append(error.nan_to_num(torch.inf, torch.inf).mean())
    return torch.stack(out)
