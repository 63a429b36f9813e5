"""A sequence of tasks, each with data of its own that is gone when the next one comes: students that learn it, what
they keep, and how much they forget.

`Hypernetwork` is HyperCRL (arXiv 2009.11997); the others are what it is compared with: fine-tuning, a network for each
task, the multi-task oracle that keeps all data, rehearsal, EWC (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796) and SI
(Zenke et al., ICML 2017, arXiv 1703.04200)."""

import abc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mbrl.core import Diverged, Dynamics, Segment, Spec, StepInput, demand
from mbrl.data import Dataset
from mbrl.dynamics.heads import HeadsConfig
from mbrl.dynamics.hyper import Hyper, HyperConfig, HyperFit, check_fit, fit_hyper, importance_of
from mbrl.fit import Rows, segment_of
from mbrl.rollout import unroll

Progress = Callable[[int, int, dict[str, float]], None]  # (update, updates, figures)
State = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """What a task gets: `updates` of `batch` transitions with Adam at `lr`, anew for each task."""

    updates: int = 5000
    batch: int = 256
    lr: float = 1e-3
    clip: float = 5.0
    save_every: int = 500


def check(budget: Budget) -> None:
    """Raises ValueError for a budget that cannot be."""
    demand(
        "budget",
        ("updates", budget.updates, "at least 1", budget.updates >= 1),
        ("batch", budget.batch, "at least 1", budget.batch >= 1),
        ("lr", budget.lr, "a positive number", 0 < budget.lr < math.inf),
        ("clip", budget.clip, "above 0", budget.clip > 0),
        ("save_every", budget.save_every, "at least 1", budget.save_every >= 1),
    )


def check_horizon(horizon: int, test: Sequence[Dataset]) -> None:
    """Raises ValueError where the held-out episodes of a task cannot tell an error of so many steps."""
    most, task = min(((x.longest, i) for i, x in enumerate(test)), default=(horizon, 0))
    what = f"1 to {most}, as many steps as the longest held-out episode of task {task} has"
    demand("continual", ("horizon", horizon, what, 1 <= horizon <= most))


# ---------------------------------------------------------------- students


class Student(abc.ABC):
    """Learns tasks 0, 1, ... in turn. `begin` makes one from its config, a frozen dataclass."""

    model: Dynamics

    @abc.abstractmethod
    def learn(
        self,
        task: int,
        data: Dataset,
        budget: Budget,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Callable[[State], None] | None = None,
        resume: Mapping[str, Tensor] | None = None,
    ) -> None:
        """One task from its own data. checkpoint: each `save_every` updates, a dict of live tensors; such a dict as
        `resume`, with the student as it was when the task began, gives the numbers of an uninterrupted one."""

    def known(self, task: int) -> tuple[Dynamics, Tensor]:
        """The model of a task and its context [1, C]."""
        which = torch.tensor([task], device=next(self.model.parameters()).device)
        return self.model, self.model.context(which).detach()

    def state(self) -> State:
        """All that it needs for later tasks."""
        return {f"model.{k}": v for k, v in self.model.state_dict().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError where the state is of another student."""
        own = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        mine = self.model.state_dict()
        for k, x in mine.items():
            if k not in own or own[k].shape != x.shape:
                got = list(own[k].shape) if k in own else "nothing"
                raise ValueError(
                    f"continual: the checkpoint holds {got} for {k}, expected {list(x.shape)}: of other settings?"
                )
        self.model.load_state_dict(own)

    def to(self, device: torch.device) -> None:
        """Moves it, in place."""
        self.model.to(device)

    def memory(self) -> dict[str, int]:
        """parameters: of its networks; extra: other numbers that it carries from task to task; transitions: of
        earlier tasks that it stores."""
        return {"parameters": sum(p.numel() for p in self.model.parameters()), "extra": 0, "transitions": 0}


def spec_of(learner: Any, spec: Spec, tasks: int) -> Spec:
    """For a learner with a table of contexts: that of a sequence of so many tasks."""
    return Spec(spec.obs, spec.act, learner.embedding if isinstance(learner, HyperConfig) else tasks, tasks)


@dataclass(frozen=True)
class Hypernetwork:
    """HyperCRL. `importance`: the anchor weighs generated parameters by the loss's mean square gradient. The budget's
    updates, batch, lr and clip stand in for the anchor's, and no lr_context is smaller than the budget's lr. `lr`: of
    the weights, instead of the budget's: a step moves every weight that is generated."""

    learner: HyperConfig = field(default_factory=HyperConfig)
    anchor: HyperFit = field(default_factory=HyperFit)
    importance: bool = False
    lr: float | None = None

    def begin(self, spec: Spec, tasks: int, generator: torch.Generator) -> "Student":
        return _Hyper(self, spec_of(self.learner, spec, tasks), generator)


class _Hyper(Student):
    def __init__(self, config: Hypernetwork, spec: Spec, generator: torch.Generator) -> None:
        check_fit(config.anchor)
        if config.lr is not None and not 0 < config.lr < float("inf"):
            raise ValueError(f"Hypernetwork: lr is {config.lr}, expected a positive number, or none")
        self.config, self.model = config, config.learner.build(spec, generator)
        self.weigh = torch.zeros(0, self.model.size, device=self.model.head.device)

    def learn(self, task, data, budget, generator, progress=None, checkpoint=None, resume=None) -> None:
        assert isinstance(self.model, Hyper)
        lr = budget.lr if self.config.lr is None else self.config.lr
        fit = replace(self.config.anchor, updates=budget.updates, batch=budget.batch, lr=lr, clip=budget.clip)
        fit = replace(fit, lr_context=max(budget.lr, fit.lr_context))
        fit_hyper(
            self.model, data, task, fit, generator, progress,
            importance=self.weigh if self.config.importance else None,
            checkpoint=checkpoint, resume=resume, every=budget.save_every,
        )  # fmt: skip
        if self.config.importance:
            new = importance_of(self.model, data, task, generator)
            self.weigh = torch.cat([self.weigh.to(new), new[None]])

    def state(self) -> State:
        return super().state() | {"weigh": self.weigh}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.weigh = state["weigh"].clone()

    def memory(self) -> dict[str, int]:
        return super().memory() | {"extra": self.weigh.numel()}


@dataclass(frozen=True)
class Finetune:
    """One network goes on from task to task."""

    learner: HeadsConfig = field(default_factory=HeadsConfig)

    def begin(self, spec: Spec, tasks: int, generator: torch.Generator) -> "Student":
        return _Shared(self, spec, tasks, generator)


@dataclass(frozen=True)
class SingleTask(Finetune):
    """A network for each task."""

    def begin(self, spec: Spec, tasks: int, generator: torch.Generator) -> "Student":
        return _Apart(self, spec, tasks, generator)


@dataclass(frozen=True)
class MultiTask(Finetune):
    """The oracle: all data so far are kept, and each batch is drawn from all of them."""


@dataclass(frozen=True)
class Replay(Finetune):
    """Rehearsal: `capacity` transitions are kept, as many of each earlier task (a reservoir of what each task showed);
    half of the loss is theirs."""

    capacity: int = 1000


@dataclass(frozen=True)
class Ewc(Finetune):
    """strength / 2 sum_j F_j (theta - theta_j)^2, F_j the mean square gradient of task j's loss over `batches`
    batches, times the size of a batch: an estimate of the diagonal Fisher information. A task's own head is not held:
    other tasks do not move it. One that all tasks share is."""

    strength: float = 3e3
    batches: int = 100


@dataclass(frozen=True)
class Si(Finetune):
    """strength sum_j Omega_j (theta - theta_j)^2, Omega_j the fall of task j's loss along the way of each parameter
    over the square of that way (`damping` keeps it finite). What is held is as in `Ewc`."""

    strength: float = 10.0
    damping: float = 1e-3


class _Shared(Student):
    """A network with heads, and what holds it or is rehearsed."""

    def __init__(self, config: Finetune, spec: Spec, tasks: int, generator: torch.Generator) -> None:
        _check_student(config)
        self.config, self.tasks = config, tasks
        self.model = config.learner.build(spec_of(config.learner, spec, tasks), generator)
        whole = config.learner.shared
        self.held = {k: p for k, p in self.model.named_parameters() if whole or k.startswith("trunk")}
        zeros = lambda: {k: torch.zeros_like(p) for k, p in self.held.items()}
        self.stiff, self.pull = zeros(), zeros()  # sum_j F_j and sum_j F_j theta_j
        self.kept: dict[int, Tensor] = {}  # rows of `Rows.table`, of earlier tasks

    def learn(self, task, data, budget, generator, progress=None, checkpoint=None, resume=None) -> None:
        model, config = self.model, self.config
        _check(model.spec, self.tasks, task, data)
        rows = Rows(data, 1, next(model.parameters()))
        index = data.paired.nonzero()[:, 0].to(rows.table.device)
        model.prepare(rows.segment(index))
        tables = {task: rows.table[index], **self.kept}
        optimizer = torch.optim.Adam(model.parameters(), lr=budget.lr)
        for p in model.parameters():
            zero = torch.zeros((), device=p.device)
            optimizer.state[p] = {"step": zero, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        way = {k: torch.zeros_like(p) for k, p in self.held.items()}  # SI's fall of the loss
        first = {k: p.detach().clone() for k, p in self.held.items()}
        live: Callable[[], State] = lambda: self._live(optimizer, way, first)
        done = 0
        if resume is not None:
            done = int(resume["done"])
            for k, x in live().items():
                x.copy_(resume[k])
            generator.set_state(resume["generator"])
        dt = rows.dt
        draw = lambda which, n: _segment(tables, which, n, data.spec, dt, generator)
        past = sorted(self.kept)
        while done < budget.updates:
            if isinstance(config, MultiTask):
                which = sorted(tables)
                loss = model.loss(draw(which, max(1, budget.batch // len(which))), index)[0]
            else:
                loss = model.loss(draw([task], budget.batch), index)[0]
                if past:
                    loss = 0.5 * loss + 0.5 * model.loss(draw(past, max(1, budget.batch // len(past))), index)[0]
            own = (
                torch.autograd.grad(loss, list(self.held.values()), retain_graph=True) if isinstance(config, Si) else ()
            )
            optimizer.zero_grad(set_to_none=True)
            (loss + self._penalty()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), budget.clip)
            before = [p.detach().clone() for p in self.held.values()] if own else []
            optimizer.step()
            with torch.no_grad():
                for w, g, p, b in zip(way.values(), own, self.held.values(), before, strict=False):
                    w -= g * (p - b)
            done += 1
            if done % budget.save_every == 0 or done == budget.updates:
                value = loss.item()
                if not np.isfinite(value):
                    raise Diverged(
                        f"continual: the loss of task {task} is {value}; expected finite data, or try a smaller lr"
                    )
                if progress is not None:
                    progress(done, budget.updates, {"loss": value})
                if checkpoint is not None:
                    checkpoint(live() | {"done": torch.tensor(done), "generator": generator.get_state()})
        self._remember(task, tables[task], data, dt, way, first, budget, generator)

    def _live(self, optimizer: torch.optim.Optimizer, way: State, first: State) -> State:
        out = {f"model.{k}": v.detach() for k, v in self.model.state_dict().items()}
        for k, p in self.model.named_parameters():
            out |= {f"{name}.{k}": x for name, x in optimizer.state[p].items()}
        return out | {f"way.{k}": x for k, x in way.items()} | {f"first.{k}": x for k, x in first.items()}

    def _penalty(self) -> Tensor | float:
        scale = {Ewc: 0.5, Si: 1.0}.get(type(self.config))
        if scale is None:
            return 0.0
        strength = self.config.strength  # type: ignore[attr-defined]
        pairs = [(p, self.stiff[k], self.pull[k]) for k, p in self.held.items()]
        return strength * scale * sum((f * p * p - 2 * g * p).sum() for p, f, g in pairs)  # but for a constant

    def _remember(
        self, task: int, table: Tensor, data: Dataset, dt: Tensor, way: State, first: State, budget: Budget, generator
    ) -> None:
        config = self.config
        if isinstance(config, MultiTask):
            self.kept[task] = table
        elif isinstance(config, Replay):
            each = max(1, config.capacity // (len(self.kept) + 1))
            order = torch.randperm(len(table), generator=generator, device=generator.device).to(table.device)
            self.kept = {k: x[:each] for k, x in self.kept.items()} | {task: table[order[:each]]}
        elif isinstance(config, Ewc):
            fisher = {k: torch.zeros_like(p) for k, p in self.held.items()}
            for _ in range(config.batches):
                segment = _segment({task: table}, [task], budget.batch, data.spec, dt, generator)
                loss = self.model.loss(segment, segment.system)[0]
                for f, g in zip(fisher.values(), torch.autograd.grad(loss, list(self.held.values())), strict=True):
                    f += budget.batch * g**2 / config.batches
            self._hold(fisher)
        elif isinstance(config, Si):
            moved = {k: p.detach() - first[k] for k, p in self.held.items()}
            self._hold({k: way[k].clamp(min=0) / (moved[k] ** 2 + config.damping) for k in way})

    @torch.no_grad()
    def _hold(self, stiff: State) -> None:
        for k, f in stiff.items():
            self.stiff[k] += f
            self.pull[k] += f * self.held[k].detach()

    def state(self) -> State:
        out = super().state() | {f"kept.{k}": x for k, x in self.kept.items()}
        return out | {f"stiff.{k}": x for k, x in self.stiff.items()} | {f"pull.{k}": x for k, x in self.pull.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.kept = {int(k.removeprefix("kept.")): x.clone() for k, x in state.items() if k.startswith("kept.")}
        self.stiff = {k: state[f"stiff.{k}"].clone() for k in self.stiff}
        self.pull = {k: state[f"pull.{k}"].clone() for k in self.pull}

    def to(self, device: torch.device) -> None:
        super().to(device)
        over = lambda x: {k: v.to(device) for k, v in x.items()}
        self.stiff, self.pull, self.kept = over(self.stiff), over(self.pull), over(self.kept)

    def memory(self) -> dict[str, int]:
        holds = isinstance(self.config, Ewc | Si)
        extra = 2 * sum(x.numel() for x in self.stiff.values()) if holds else 0
        return super().memory() | {"extra": extra, "transitions": sum(len(x) for x in self.kept.values())}


class _Apart(Student):
    """A network for each task, of one head."""

    def __init__(self, config: SingleTask, spec: Spec, tasks: int, generator: torch.Generator) -> None:
        each = Finetune(config.learner)
        self.each = [_Shared(each, spec, 1, generator) for _ in range(tasks)]
        self.model = self.each[0].model

    def learn(self, task, data, budget, generator, progress=None, checkpoint=None, resume=None) -> None:
        _check(self.model.spec, len(self.each), task, data)
        self.each[task].learn(0, data, budget, generator, progress, checkpoint, resume)

    def known(self, task: int) -> tuple[Dynamics, Tensor]:
        return self.each[task].known(0)

    def state(self) -> State:
        return {f"{i}.{k}": v for i, x in enumerate(self.each) for k, v in x.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for i, x in enumerate(self.each):
            x.load({k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{i}.")})

    def to(self, device: torch.device) -> None:
        for x in self.each:
            x.to(device)

    def memory(self) -> dict[str, int]:
        return {k: sum(x.memory()[k] for x in self.each) for k in ("parameters", "extra", "transitions")}


STUDENTS: dict[str, Any] = {
    "hyper": Hypernetwork(lr=2e-4),
    "finetune": Finetune(),
    "single-task": SingleTask(),
    "multi-task": MultiTask(),
    "replay": Replay(),
    "ewc": Ewc(),
    "si": Si(),
}


def _check_student(config: Finetune) -> None:
    widths = config.learner.hidden
    rules: list[tuple[str, Any, str, bool]] = [
        ("hidden", widths, "widths of at least 1", len(widths) > 0 and min(widths) >= 1)
    ]
    if isinstance(config, Replay):
        rules.append(("capacity", config.capacity, "at least 1", config.capacity >= 1))
    elif isinstance(config, Ewc | Si):
        rules.append(("strength", config.strength, "a number of at least 0", 0 <= config.strength < math.inf))
        if isinstance(config, Ewc):
            rules.append(("batches", config.batches, "at least 1", config.batches >= 1))
        else:
            rules.append(("damping", config.damping, "a positive number", 0 < config.damping < math.inf))
    demand(type(config).__name__, *rules)


def _check(spec: Spec, tasks: int, task: int, data: Dataset) -> None:
    if not 0 <= task < tasks:
        raise ValueError(f"continual: task {task} is not one of the {tasks} that the student was begun for")
    if (data.spec.obs, data.spec.act) != (spec.obs, spec.act):
        raise ValueError(
            f"continual: task {task} has {data.spec.obs} observations and {data.spec.act} actions, the tasks before "
            f"{spec.obs} and {spec.act}; expected tasks of one space"
        )
    if data.dts is not None:
        raise ValueError(f"continual: task {task} has steps of several lengths (`dts`), expected one: resample it")


def _segment(
    tables: Mapping[int, Tensor], which: Sequence[int], n: int, spec: Spec, dt: Tensor, generator: torch.Generator
) -> Segment:
    """n transitions of each of the tasks, contiguous by task."""
    parts = []
    for task in which:
        table = tables[task]
        pick = torch.randint(len(table), (n,), generator=generator, device=generator.device)
        parts.append(table[pick.to(table.device)])
    rows = torch.cat(parts)
    return segment_of(rows[:, None], spec, dt, torch.tensor(list(which), device=rows.device))


# ---------------------------------------------------------------- judging


@torch.no_grad()
def errors(model: Dynamics, ctx: Tensor, data: Dataset, horizon: int = 20, starts: int = 256) -> tuple[float, float]:
    """(one step, `horizon` steps): squared errors of the predicted observation, each dimension's mean over that
    dimension's variance (of the change, and of the observation), mean over the dimensions that vary. Without noise,
    from as many starts as there are, evenly spread. nan where no episode is long enough. Raises ValueError for a
    horizon below 1."""
    demand("errors", ("horizon", horizon, "at least 1", horizon >= 1))
    like = next(model.parameters())
    obs, act, after = (x.to(like) for x in (data.obs, data.act, data.next_obs))
    cond, pairs = model.condition(ctx.to(like)), data.paired.nonzero()[:, 0]
    inp = lambda a: StepInput(a, a.new_zeros(len(a), model.noise_dim), a.new_full((len(a), 1), data.dt))
    seen = obs[pairs]
    pred = model.step(model.init(seen, cond), inp(act[pairs]), cond)[1].obs
    one = _normalised(pred, after[pairs], after[pairs] - seen)
    rows = torch.arange(len(data), device=obs.device)
    whole = torch.cat([data.paired.new_zeros(1, dtype=torch.int64), (~data.paired).long().cumsum(0)])
    end = (rows + horizon).clamp(max=len(data))
    begin = (rows + horizon <= data.starts[1:][data.episode]) & (whole[end] == whole[rows])
    first = begin.nonzero()[:, 0]
    if len(first) == 0:
        return one, float("nan")
    first = first[torch.linspace(0, len(first) - 1, min(starts, len(first)), device=obs.device).long()]
    steps = [inp(act[first + t]) for t in range(horizon)]
    _, preds = unroll(model, model.init(obs[first], cond), steps, cond)
    return one, _normalised(preds.obs[:, -1], after[first + horizon - 1], obs)


def _normalised(pred: Tensor, true: Tensor, scale: Tensor) -> float:
    var = scale.double().var(0, correction=0)
    moves = var > 1e-12
    ratio = (pred.double() - true.double()).square().mean(0)[moves] / var[moves]
    return float(ratio.mean())


@dataclass(frozen=True)
class Course:
    """matrix [tasks, tasks, 2]: after learning task j, the errors on task i of one and of many steps."""

    matrix: list[list[tuple[float, float]]]
    seconds: list[float]  # to learn each task
    memory: list[dict[str, int]]  # after each task


def run(
    student: Student,
    train: Sequence[Dataset] | Callable[[int], Dataset],
    test: Sequence[Dataset],
    budget: Budget,
    seed: int,
    *,
    horizon: int = 20,
    progress: Callable[[int, int, int, dict[str, float]], None] | None = None,
    save: Callable[[int, State, Course], None] | None = None,
    keep: Callable[[int, State], None] | None = None,
    course: Course | None = None,
    resume: Mapping[str, Tensor] | None = None,
) -> Course:
    """Learns the tasks in turn and judges all of them after each. Task j's draws depend on the seed and j alone.

    train: each task's data, or what gives them when their turn comes; test: each task's held-out data. progress: (task,
    update, updates, figures). save: after each task, its number, the student's state and the course so far; `course`
    with that state loaded goes on after it. keep: within a task (see `Student.learn`), for `resume`. Raises ValueError
    where the spaces of the tasks differ, for a budget that cannot be, and where a task has no held-out episode of
    `horizon` steps."""
    check(budget)
    check_horizon(horizon, test)
    given = None if callable(train) else train
    known = test if given is None else (*given, *test)
    for i, data in enumerate(known):
        _check(known[0].spec, len(known), i, data)
    course = course or Course([], [], [])
    for task in range(len(course.matrix), len(test) if given is None else len(given)):
        data = train(task) if callable(train) else train[task]
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, task]).generate_state(1)[0]))
        tell = None if progress is None else (lambda n, of, f, task=task: progress(task, n, of, f))
        put = None if keep is None else (lambda state, task=task: keep(task, state))
        student.learn(task, data, budget, generator, tell, put, resume)
        resume = None
        seconds = time.perf_counter() - began
        row = [errors(*student.known(i), data, horizon) for i, data in enumerate(test)]
        course = Course([*course.matrix, row], [*course.seconds, seconds], [*course.memory, student.memory()])
        if save is not None:
            save(task, student.state(), course)
    return course


# ---------------------------------------------------------------- what was forgotten


def summary(matrix: np.ndarray, alone: np.ndarray | None = None, resamples: int = 10_000) -> dict[str, Any]:
    """Of errors matrix [seeds, tasks, tasks] (after task j, on task i; lower is better), with their medians over seeds
    and the 90 % bootstrap intervals of those medians:

    final: the mean over tasks at the end; forgetting: the mean increase from just after each task but the last to the
    end (negative: backward transfer); ratio: the geometric mean of final over just-after, of the same tasks; learned:
    the mean error just after each task; transfer: 1 - learned / alone, where the errors alone [seeds, tasks] of a
    network for each task are given: forward transfer."""
    last, own = matrix[:, -1], np.diagonal(matrix, axis1=1, axis2=2)
    found = {"final": last.mean(1), "learned": own.mean(1)}
    if matrix.shape[1] > 1:
        found["forgetting"] = (last - own)[:, :-1].mean(1)
        found["ratio"] = np.exp(np.log(last[:, :-1] / own[:, :-1]).mean(1))
    if alone is not None:
        found["transfer"] = 1 - own.mean(1) / alone.mean(1)
    rng = np.random.default_rng(0)
    pick = rng.integers(len(matrix), size=(resamples, len(matrix)))
    out = {}
    for name, x in found.items():
        low, high = np.quantile(np.median(x[pick], axis=1), (0.05, 0.95))
        out[name] = {"median": float(np.median(x)), "low": float(low), "high": float(high), "each": x.tolist()}
    return out


# ---------------------------------------------------------------- which contexts to look at


@torch.no_grad()
def disagreement(model: Dynamics, data: Dataset, generator: torch.Generator, rows: int = 1000) -> float:
    """How far a learner's parts (an ensemble's elites) are apart on transitions of a context: the standard deviation of
    their predictions over that of the change, mean over rows and the dimensions that vary. An estimate of the error
    that more data would mend. Raises ValueError for a learner of one part."""
    like = next(model.parameters())
    pairs = data.paired.nonzero()[:, 0]
    pick = pairs[torch.linspace(0, len(pairs) - 1, min(rows, len(pairs))).long().to(pairs.device)]
    obs, act, after = (x[pick].to(like) for x in (data.obs, data.act, data.next_obs))
    cond = model.condition(obs.new_zeros(1, model.spec.ctx))
    inp = StepInput(act, 0 * model.draw(len(obs), 1, generator), torch.full_like(obs[:, :1], data.dt))
    said = model.each(model.init(obs, cond), inp, cond, 1).obs  # [parts, B, O]
    if len(said) < 2:
        raise ValueError(f"disagreement: {type(model).__name__} has one part, expected an ensemble")
    std = (after - obs).std(0, correction=0)
    moves = std > 1e-6
    return float((said.std(0, correction=0)[:, moves] / std[moves]).mean())


def shares(doubt: Sequence[float], total: int, uniform: float = 0.5) -> list[int]:
    """How many of `total` steps each context gets: a share `uniform` evenly, the rest in proportion to what is in doubt
    there (WAKER, arXiv 2306.09205, for few contexts). Whole numbers, of the largest remainders. Raises ValueError for
    doubts that are not finite and at least 0."""
    d = np.asarray(doubt, dtype=float)
    if len(d) == 0 or not np.isfinite(d).all() or (d < 0).any() or not 0 <= uniform <= 1 or total < 0:
        raise ValueError(
            f"shares: got doubts {list(doubt)}, total {total}, uniform {uniform}; expected numbers of at least 0"
        )
    even = np.full(len(d), 1 / len(d))
    p = uniform * even + (1 - uniform) * (d / d.sum() if d.sum() > 0 else even)
    whole = np.floor(p * total + 1e-9).astype(int)
    for i in np.argsort(-(p * total - whole), kind="stable")[: total - whole.sum()]:
        whole[i] += 1
    return whole.tolist()
