"""Fitting any dynamics learner to a fixed dataset, through the hooks of the contract: holdout, early stopping and the
best snapshot of each part. A learner that is trained in phases builds its own fit from these pieces."""

import abc
import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from mbrl.core import Dynamics, Segment, Spec, demand
from mbrl.data import Dataset
from mbrl.device import drop_subnormals, graphed, sweep

KEPT = ("param", "mean", "square")
SAMPLE = 2**18  # rows from which normalisers are set: the first of the training rows, which are in random order


@dataclass(frozen=True)
class FitConfig:
    batch: int = 256  # windows a part and step
    lr: float = 1e-3
    length: int = 1  # steps a window
    holdout: float = 0.2  # of the windows, `holdout_max` at most, not all; whole episodes where these are longer than 1
    holdout_max: int = 1000
    patience: int = 5  # epochs without a gain after which a part stops
    gain: float = 0.01  # the relative fall of the held-out error that counts as one
    max_epochs: int | None = None
    clip: float | None = None  # of each part's gradient norm
    bootstrap: bool = True  # each part resamples the data with replacement, once; else it sees every row each epoch
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: matrix products under autocast


@dataclass(frozen=True)
class FitReport:
    epochs: int
    steps: int
    seconds: float  # of this call: a resumed fit does not know what came before
    train_loss: list[float]  # an epoch, over the parts that are finite
    holdout: list[list[float]]  # [epoch][part]
    best: list[float]  # [part]
    diverged: int  # how often a part was found not finite at an epoch's end and restored


def fit(
    model: Dynamics,
    data: Dataset,
    config: FitConfig,
    generator: torch.Generator,
    progress: Callable[[int, int | None, dict[str, float]], None] | None = None,
    *,
    checkpoint: Callable[[dict[str, Tensor]], None] | None = None,
    resume: Mapping[str, Tensor] | None = None,
) -> FitReport:
    """Trains the model in place and leaves each part at its best.

    Parts are independent: each has its own stream of the data, its own best snapshot and its own end. A part whose
    held-out error has not fallen by `gain` for `patience` epochs is done; the fit ends with the last. A part that is
    not finite at an epoch's end is restored to its best snapshot, weights and moments, and the epoch counts against
    its patience; one that never was finite has an infinite error.

    progress: (epoch, max_epochs, figures) after each epoch. checkpoint: after each epoch, a dict of the live tensors,
    to be saved before it returns; such a dict as `resume`, with the same data and config, gives the numbers of an
    uninterrupted fit. Raises ValueError for data with too few windows, and as `check_fit`."""
    start = time.perf_counter()
    check_fit(config)
    if resume is not None:
        generator.set_state(resume["generator.first"])
    first = generator.get_state()
    rows = Rows(data, config.length, next(model.parameters()))
    train, held = rows.split(config, generator)
    model.prepare(rows.segment(train[:SAMPLE]))
    parts = Parts(model, config)
    step = parts.stepper(rows)
    held_segment = rows.segment(rows.even(held, shortest=True).flatten())
    held_noise = noise_of(model, len(held_segment.mask), config.length, generator)
    own = streams(rows.even(train), model.parts, config, generator)
    batch = max(1, config.batch // data.systems)
    per_epoch = own.shape[1] // min(batch, own.shape[1])
    if resume is not None:
        parts.load(resume)
        generator.set_state(resume["generator"])
    while bool((parts.wait < config.patience).any()) and parts.epoch != config.max_epochs:
        total = torch.zeros(model.parts, dtype=rows.table.dtype, device=train.device)
        for index in order(own, batch, generator):
            noise = noise_of(model, len(index), config.length, generator)
            total += step(index, noise)
        errors = model.validate(held_segment, held_noise)
        losses = (total / per_epoch)[total.isfinite()]
        parts.record(losses.mean() if len(losses) else total.new_tensor(torch.nan), errors)
        if progress is not None:
            figures = {"train": float(parts.train_loss[-1]), "holdout": float(parts.best.mean())}
            progress(parts.epoch, config.max_epochs, figures | {"active": float((parts.wait < config.patience).sum())})
        if checkpoint is not None:
            checkpoint(parts.state() | {"generator.first": first, "generator": generator.get_state()})
    parts.finish()
    model.finish(parts.best)
    model.measure(rows.segment(rows.even(train[: SAMPLE // config.length]).flatten()))
    return FitReport(
        epochs=parts.epoch,
        steps=parts.epoch * per_epoch,
        seconds=time.perf_counter() - start,
        train_loss=parts.train_loss.tolist(),
        holdout=parts.holdout.tolist(),
        best=parts.best.tolist(),
        diverged=parts.diverged,
    )


def check_fit(config: FitConfig) -> None:
    """Raises ValueError for settings that no fit goes by."""
    found = {k: getattr(config, k) for k in ("batch", "length", "patience", "max_epochs")}
    if wrong := [f"{k}={v}" for k, v in found.items() if v is not None and v < 1]:
        raise ValueError(f"fit: got {', '.join(wrong)}; expected at least 1")
    demand(
        "fit",
        ("holdout", config.holdout, "a share in [0, 1]", 0 <= config.holdout <= 1),
        ("lr", config.lr, "a rate above 0", 0 < config.lr < math.inf),
        ("gain", config.gain, "a number >= 0", config.gain >= 0),
        ("clip", config.clip, "a norm above 0, or None", config.clip is None or config.clip > 0),
    )


# ---------------------------------------------------------------- data


class Rows:
    """The paired steps of a dataset as one table, so that a batch of windows is one gather."""

    def __init__(self, data: Dataset, length: int, like: Tensor) -> None:
        if length < 1:
            raise ValueError(f"fit: the window length is {length}, expected at least 1")
        self.data, self.length, self.spec = data, length, data.spec
        columns = (data.obs, data.next_obs, data.act, data.reward[:, None], data.terminal[:, None])
        self.table = torch.cat([x.to(like) for x in columns], 1)  # [N, 2 O + A + 2]
        self.dt = like.detach().new_tensor(data.dt) if data.dts is None else data.dts.to(like.detach())[:, None]
        self.system = torch.arange(data.systems, device=like.device)

    def even(self, index: Tensor, shortest: bool = False) -> Tensor:
        """[systems, n]: the rows index [N] by their system, as many of each as of the one that has most, the others'
        over and over, or as the one that has fewest. Raises ValueError where a system has none."""
        pools = self.data.of_system(index)
        sizes = [len(x) for x in pools]
        if min(sizes) == 0:
            raise ValueError(
                f"fit: the data's systems have {sizes} windows in one of the training and the held-out part, expected "
                "some of each: pass more data of the system that has none"
            )
        n = (min if shortest else max)(sizes)
        return torch.stack([x.repeat(-(-n // len(x)))[:n] for x in pools])

    def segment(self, index: Tensor, parts: int = 1) -> Segment:
        """Windows that begin at the rows `index` [B]; all of their steps are in the data. Where these hold several
        systems, as many of each, contiguous, for each of the parts."""
        n, t = len(index), self.length
        if t > 1:
            index = (index[:, None] + torch.arange(t, device=index.device)).flatten()
        rows = self.table.index_select(0, index).unflatten(0, (n, t))
        dt = self.dt if self.dt.ndim == 0 else self.dt.index_select(0, index).unflatten(0, (n, t))
        return segment_of(rows, self.spec, dt, self.system.repeat(parts))

    def whole(self) -> Tensor:
        """The rows at which a whole window begins, in order."""
        t, data = self.length, self.data
        if t == 1:
            return data.paired.nonzero()[:, 0]
        unpaired = torch.cat([data.paired.new_zeros(1, dtype=torch.int64), (~data.paired).long().cumsum(0)])
        rows = torch.arange(len(data), device=unpaired.device)
        ends = data.starts[1:][data.episode]
        return ((rows + t <= ends) & (unpaired[(rows + t).clamp(max=len(data))] == unpaired[rows])).nonzero()[:, 0]

    def split(self, config: FitConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows at which a whole window begins, in random order: (train, held out)."""
        device, t, data = self.table.device, self.length, self.data
        index = self.whole()
        total = len(index)
        if total < 2:
            raise ValueError(
                f"fit: the data hold {total} windows of {t} steps within an episode, expected at least 2: "
                "pass more data, or a smaller window length"
            )
        count = max(1, min(int(total * config.holdout), config.holdout_max, total - 1))
        if t == 1:
            train, held = data.split(count, generator)
            return train.to(device), held.to(device)
        order = torch.randperm(total, generator=generator, device=generator.device).to(index.device)
        index = index[order]
        episode = data.episode[index]
        sizes = torch.bincount(episode, minlength=data.episodes)
        shuffled = torch.randperm(data.episodes, generator=generator, device=generator.device).to(index.device)
        taken = sizes[shuffled].cumsum(0) <= count  # whole episodes, as many as fit
        apart = torch.zeros(data.episodes, dtype=torch.bool, device=index.device)
        apart[shuffled[taken]] = True
        out = apart[episode]
        kinds = [(len(x), len(y)) for x, y in zip(data.of_system(index[~out]), data.of_system(index[out]), strict=True)]
        if not all(min(x) for x in kinds):  # one long episode, say: hold out its last windows, which few others overlap
            few = lambda n: max(1, count * n // total)
            last = [x.sort().values[len(x) - few(len(x)) :] for x in data.of_system(index) if len(x)]
            out = torch.isin(index, torch.cat(last))
        return index[~out].to(device), index[out].to(device)


def segment_of(rows: Tensor, spec: Spec, dt: Tensor, system: Tensor) -> Segment:
    """Windows of rows [B, T, 2 O + A + 2] of `Rows.table`, of the systems [G]; dt: [] or [B, T, 1]."""
    n, t, o = *rows.shape[:2], spec.obs
    obs = rows[..., : 2 * o].reshape(n, 2, o) if t == 1 else torch.cat([rows[:, :1, :o], rows[..., o : 2 * o]], 1)
    _, act, reward, terminal = rows.split([2 * o, spec.act, 1, 1], -1)
    mask = torch.ones((), dtype=torch.bool, device=rows.device).expand(n, t)
    return Segment(obs, act, reward[..., 0], terminal[..., 0] > 0.5, mask, dt.expand(n, t, 1), system)


def streams(train: Tensor, parts: int, config: FitConfig, generator: torch.Generator) -> Tensor:
    """train [N], or [systems, N] -> [parts * systems, N] int32: the rows of each part, by system."""
    train = train.int().reshape(-1, train.shape[-1])
    if not config.bootstrap or parts == 1:
        return train.repeat(parts, 1)
    systems, n = train.shape
    pick = torch.randint(n, (parts, systems, n), generator=generator, device=generator.device)
    return torch.gather(train.expand(parts, -1, -1), 2, pick.to(train.device)).flatten(0, 1)


def order(streams: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """[steps, streams * batch]: an epoch of shuffled rows, contiguous by stream; what is less than a batch waits."""
    parts, n = streams.shape
    batch = min(batch, n)
    steps = n // batch
    out = []
    for stream in streams:
        perm = torch.randperm(n, generator=generator, device=generator.device)[: steps * batch]
        out.append(stream[perm.to(stream.device)].reshape(steps, batch))
    return torch.stack(out, 1).reshape(steps, parts * batch)


def noise_of(model: Dynamics, b: int, t: int, generator: torch.Generator) -> Tensor:
    """[B, T, W]"""
    if not model.noisy_loss:
        return next(model.parameters()).detach().new_zeros(()).expand(b, t, model.noise_dim)
    return model.draw(b * t, 1, generator).reshape(b, t, model.noise_dim)


# ---------------------------------------------------------------- parts


class Parts:
    """The parameters of a model by part, their optimiser, and what each part has reached."""

    def __init__(self, model: Dynamics, config: FitConfig) -> None:
        self.model, self.config, self.n = model, config, model.parts
        names = {p: name for name, p in model.named_parameters()}
        groups = [g | {"params": list(g["params"])} for g in model.groups()]
        self.params: dict[str, nn.Parameter] = {names[p]: p for g in groups for p in g["params"]}
        for name, p in self.params.items():
            if self.n > 1 and p.shape[:1] != (self.n,):
                raise ValueError(f"fit: parameter {name} is {list(p.shape)}, expected to lead with the {self.n} parts")
        like = next(iter(self.params.values()))
        self.optimizer = torch.optim.Adam(groups, lr=config.lr, fused=True, capturable=not like.is_cpu)
        self.moments = {
            name: (torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())) for name, p in self.params.items()
        }
        for name, p in self.params.items():
            mean, square, step = self.moments[name]
            step = step.to(p.device)
            self.moments[name] = (mean, square, step)
            self.optimizer.state[p] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        self.snapshot = {name: tuple(x.detach().clone() for x in self._live(name)) for name in self.params}
        self.best = torch.full((self.n,), torch.inf, dtype=torch.float64, device=like.device)
        self.mark = self.best.clone()  # the error from which a gain is counted
        self.wait = torch.zeros(self.n, dtype=torch.int64, device=like.device)
        low = config.dtype == "bfloat16"
        self.cast = contextlib.nullcontext()
        if low:  # a graph would replay what the cache held when it was captured
            self.cast = torch.autocast(like.device.type, torch.bfloat16, cache_enabled=like.is_cpu)
        self.epoch, self.diverged = 0, 0
        self.train_loss = torch.zeros(0, dtype=torch.float64)
        self.holdout = torch.zeros(0, self.n, dtype=torch.float64)

    def _live(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """What a snapshot holds: the parameter and its moments."""
        return (self.params[name], *self.moments[name][:2])

    def _wide(self, mask: Tensor, p: Tensor) -> Tensor:
        """mask [parts] to the shape of p."""
        return mask.reshape(-1, *[1] * (p.ndim - 1)) if self.n > 1 else mask[0]

    def step(self, segment: Segment, noise: Tensor) -> Tensor:
        """One update of every part, on its own rows of the segment. Returns the losses [parts]. The learner's schedules
        are `stepper`'s."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.cast:
            losses = self.model.losses(segment, noise)
        losses.sum().backward()
        if self.config.clip is not None:
            self._clip(self.config.clip)
        self.optimizer.step()
        return losses.detach()

    def stepper(self, rows: Rows) -> Callable[[Tensor, Tensor], Tensor]:
        """`step` on rows by their index, a graph where there is an accelerator, and the learner's schedules after it:
        (index [parts * B], noise) -> losses [parts], overwritten by the next call."""
        model, scheduled = self.model, type(self.model).advance is not Dynamics.advance
        whole = lambda index, noise: self.step(rows.segment(index, model.parts), noise)
        go: Callable[[Tensor, Tensor], Tensor] | None = None

        def step(index: Tensor, noise: Tensor) -> Tensor:
            nonlocal go
            if go is None:
                live = [*model.parameters(), *model.buffers(), *(x for m in self.moments.values() for x in m)]
                go = graphed(whole, index, noise, state=live, fallback=True)
            losses = go(index, noise)
            if scheduled:  # may wait for the device, and so stays outside
                model.advance(rows.segment(index, model.parts))
            return losses

        return step

    def _clip(self, limit: float) -> None:
        """Each part's gradient to a norm of at most `limit`; one that is not finite is dropped, for that part only."""
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        norms = [g.reshape(self.n, -1).norm(dim=1) for g in grads]
        norm = torch.stack(norms).norm(dim=0)
        scale, ok = (limit / (norm + 1e-6)).clamp(max=1.0), norm.isfinite()
        for g in grads:
            g.copy_(torch.where(self._wide(ok, g), g * self._wide(scale, g), 0.0))

    @torch.no_grad()
    def record(self, loss: Tensor, errors: Tensor) -> None:
        """At an epoch's end: the errors [parts] decide which snapshots are taken, who waits and who is restored."""
        errors = errors.double()
        active = self.wait < self.config.patience
        finite = errors.isfinite()
        for p in self.params.values():
            finite = finite & p.reshape(self.n, -1).isfinite().all(1)
        better = active & finite & (errors < self.best)
        gained = active & finite & (self.mark.isinf() | (self.mark - errors > self.config.gain * self.mark.abs()))
        self.best = torch.where(better, errors, self.best)
        self.mark = torch.where(gained, errors, self.mark)
        self.wait = torch.where(gained, 0, self.wait + 1)
        self.diverged += int((active & ~finite).sum())
        for name in self.params:
            drop_subnormals(*self._live(name))
            for x, best in zip(self._live(name), self.snapshot[name], strict=True):
                best.copy_(torch.where(self._wide(better, x), x, best))
                x.copy_(torch.where(self._wide(finite, x), x, best))
        self.epoch += 1
        self.train_loss = torch.cat([self.train_loss, loss.detach().double().cpu()[None]])
        self.holdout = torch.cat([self.holdout, errors.cpu()[None]])

    @torch.no_grad()
    def finish(self) -> None:
        for name, p in self.params.items():
            p.copy_(self.snapshot[name][0])
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest of the fit depends on, but the data, the config and the generator."""
        out = {"best": self.best, "mark": self.mark, "wait": self.wait}
        out |= {"epoch": torch.tensor(self.epoch), "diverged": torch.tensor(self.diverged)}
        out |= {"train_loss": self.train_loss, "holdout": self.holdout}
        out |= {f"schedule.{name}": self.model.get_buffer(name) for name in self.model.schedules}
        for name, p in self.params.items():
            out |= {f"param.{name}": p.detach()}
            out |= {f"snapshot.{k}.{name}": x for k, x in zip(KEPT, self.snapshot[name], strict=True)}
            out |= {f"{k}.{name}": x for k, x in zip(("mean", "square", "step"), self.moments[name], strict=True)}
        return out

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError where the state is of another model."""
        own = self.state()
        for name, x in own.items():
            free = name in ("train_loss", "holdout")
            if name not in state or (not free and state[name].shape != x.shape):
                got = list(state[name].shape) if name in state else "nothing"
                raise ValueError(
                    f"fit: resume holds {got} for {name}, expected {list(x.shape)}: another model's state?"
                )
        for name, x in own.items():
            if "." in name or name in ("best", "mark", "wait"):
                x.copy_(state[name])
        self.epoch, self.diverged = int(state["epoch"]), int(state["diverged"])
        self.train_loss, self.holdout = state["train_loss"].cpu().clone(), state["holdout"].cpu().clone()


# ---------------------------------------------------------------- updates by hand


BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's
BLOCK = 2**17  # numbers that a CPU works on at a time: what lies between stays in its cache


class Moments(abc.ABC):
    """An optimiser of named tensors that keeps two moments of each. Steps are counted in tensors beside the parameters,
    so that a captured step goes on counting."""

    def __init__(self, params: Mapping[str, Tensor], lr: float) -> None:
        self.params, self.lr = dict(params), lr
        self.clocks = [torch.zeros((), device=p.device) for p in params.values()]
        self.mean = [torch.zeros_like(p) for p in params.values()]
        self.square = [torch.zeros_like(p) for p in params.values()]

    @property
    def steps(self) -> int:
        return int(self.clocks[0])

    def live(self) -> list[Tensor]:
        """What a step changes."""
        return [*self.params.values(), *self.mean, *self.square, *self.clocks]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        self._step(list(self.params.values()), self.mean, self.square, grads)
        sweep(self.clocks[0], *self.mean, *self.square)

    @abc.abstractmethod
    def _step(self, params: list[Tensor], mean: list[Tensor], square: list[Tensor], grads: Sequence[Tensor]) -> None:
        """Changes what it is given, and the clocks, in place."""

    def state(self, name: str) -> dict[str, Tensor]:
        out = {f"{name}.steps": torch.tensor(self.steps)}
        for (k, p), m, s in zip(self.params.items(), self.mean, self.square, strict=True):
            out |= {f"{name}.param.{k}": p.detach(), f"{name}.mean.{k}": m, f"{name}.square.{k}": s}
        return out

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], name: str) -> None:
        """Raises ValueError where the state is of another model."""
        for key, x in self.state(name).items():
            if key not in state or state[key].shape != x.shape:
                got = list(state[key].shape) if key in state else "nothing"
                own = type(self).__name__
                raise ValueError(
                    f"{own}: resume holds {got} for {key}, expected {list(x.shape)}: another model's state?"
                )
            if not key.endswith(".steps"):
                x.copy_(state[key])
        for clock in self.clocks:
            clock.fill_(int(state[f"{name}.steps"]))


class Adam(Moments):
    """Adam that can also tell where its next step would lead; one pass over memory a step."""

    def __init__(self, params: Mapping[str, Tensor], lr: float) -> None:
        super().__init__(params, lr)
        self.trial: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """What the parameters would be after a step by these gradients, which is not taken. The tensors are used again
        by the next call."""
        if not self.trial:
            self.trial = {k: torch.empty_like(p) for k, p in self.params.items()}
        if not self.clocks[0].is_cpu:
            return self._look(grads)
        t = self.steps + 1
        root, rate = (1 - BETAS[1] ** t) ** -0.5, -self.lr / (1 - BETAS[0] ** t)
        every = zip(self.trial.values(), self.params.values(), self.mean, self.square, grads, strict=True)
        for tensors in every:
            for new, p, m, s, g in zip(*(x.reshape(-1).split(BLOCK) for x in tensors), strict=True):
                below = torch.mul(s, BETAS[1]).addcmul_(g, g, value=1 - BETAS[1]).sqrt_().mul_(root).add_(EPSILON)
                torch.addcdiv(p, torch.lerp(m, g, 1 - BETAS[0]), below, value=rate, out=new)
        return self.trial

    def _look(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        new, params, grads = list(self.trial.values()), list(self.params.values()), list(grads)
        t = self.clocks[0] + 1
        below = torch._foreach_mul(self.square, BETAS[1])
        torch._foreach_addcmul_(below, grads, grads, 1 - BETAS[1])
        torch._foreach_sqrt_(below)
        torch._foreach_mul_(below, (1 - BETAS[1] ** t).rsqrt())
        torch._foreach_add_(below, EPSILON)
        moved = torch._foreach_lerp(self.mean, grads, 1 - BETAS[0])
        torch._foreach_div_(moved, below)
        torch._foreach_mul_(moved, -self.lr / (1 - BETAS[0] ** t))
        torch._foreach_copy_(new, torch._foreach_add(params, moved))
        return self.trial

    def _step(self, params: list[Tensor], mean: list[Tensor], square: list[Tensor], grads: Sequence[Tensor]) -> None:
        dense = [g.contiguous() for g in grads]  # the fused kernel reads them in the parameters' order
        adam(
            params, dense, mean, square, [], self.clocks, fused=True, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1],
            lr=self.lr, weight_decay=0.0, eps=EPSILON, maximize=False,
        )  # fmt: skip
