"""Sparse recordings (after arXiv 2005.02211): a network is trained on the outputs of another and the activity of some
of its units; does it find what the other units do, under conditions that it has not met?

The teacher generates a sine whose frequency the input sets; in a trial the input goes from one level to another. Whole
levels are held out: a student never sees them. `record` gives what a student sees and, apart from it, what it is scored
by; `score` is the same for every student.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mbrl.data import Dataset
from mbrl_envs.series import from_arrays

# ---------------------------------------------------------------- the teacher


@dataclass(frozen=True, eq=False)
class Teacher:
    """dx/dt = -x + J r + B u + b, r = tanh(x), y = W r: N rate units, A inputs, O outputs, float64. Times are in the
    units' time constant."""

    J: Tensor  # [N, N]
    B: Tensor  # [N, A]
    b: Tensor  # [N]
    W: Tensor  # [O, N]

    @property
    def units(self) -> int:
        return len(self.b)

    def field(self, x: Tensor, u: Tensor) -> Tensor:
        """x [R, N], u [R, A] -> dx/dt [R, N]"""
        return -x + torch.tanh(x) @ self.J.T + u @ self.B.T + self.b

    def run(self, x: Tensor, u: Tensor, dt: float, step: float = 0.1) -> Tensor:
        """From x [R, N] under u [R, T, A], each held for dt: [R, T + 1, N], x first; in steps of at most `step`."""
        substeps = max(1, math.ceil(dt / step - 1e-9))
        out = [x]
        for t in range(u.shape[1]):
            for _ in range(substeps):
                x = _rk4(lambda z, _, held=u[:, t]: self.field(z, held), x, 0.0, dt / substeps)
            out.append(x)
        return torch.stack(out, 1)


def _rk4(f: Callable[[Tensor, float], Tensor], x: Tensor, t: float, h: float) -> Tensor:
    k1 = f(x, t)
    k2 = f(x + h / 2 * k1, t + h / 2)
    k3 = f(x + h / 2 * k2, t + h / 2)
    k4 = f(x + h * k3, t + h)
    return x + h / 6 * (k1 + 2 * (k2 + k3) + k4)


@dataclass(frozen=True)
class SineTask:
    """Sines of periods from `slow` (u = -1) to `fast` (u = 1), linear in frequency.

    The teacher is found in one solve, by the idea of full-FORCE (DePasquale et al., PLoS ONE 2018): a random network of
    strength `gain` is driven by the wanted sine and its cosine at `levels` inputs, and J is the ridge regression, on
    the rates, of all that its units receive from the others and from the drive."""

    units: int = 32
    gain: float = 1.2
    slow: float = 12.0
    fast: float = 5.0
    levels: int = 12
    ridge: float = 1e-4

    def teach(self, seed: int) -> Teacher:
        if self.units < 4 or self.levels < 2 or not 0 < self.fast < self.slow:
            raise ValueError(
                f"SineTask: got {self.units} units, {self.levels} levels, periods {self.fast} to {self.slow}; expected "
                "at least 4 units, 2 levels, and 0 < fast < slow"
            )
        g, n, h = torch.Generator().manual_seed(seed), self.units, 0.1
        normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
        uniform = lambda *shape: 2 * torch.rand(*shape, generator=g, dtype=torch.float64) - 1
        random, drive, B, b = self.gain * normal(n, n) / n**0.5, 2 * uniform(n, 2), uniform(n, 1), uniform(n)
        u = torch.linspace(-1, 1, self.levels, dtype=torch.float64)[:, None]
        wanted = lambda t: torch.cat([(self.frequency(u) * t).sin(), (self.frequency(u) * t).cos()], 1)
        driven = Teacher(random, B, b, drive[:0])
        field = lambda x, t: driven.field(x, u) + wanted(t) @ drive.T
        settle = math.ceil(20 / h)
        x, rates, received, sines = normal(self.levels, n), [], [], []
        for k in range(settle + math.ceil(4 * self.slow / h)):
            if k >= settle:
                r, f = torch.tanh(x), wanted(k * h)
                rates.append(r)
                received.append(r @ random.T + f @ drive.T)
                sines.append(f[:, :1])
            x = _rk4(field, x, k * h, h)
        r = torch.cat(rates)
        gram = r.T @ r / len(r) + self.ridge * torch.eye(n, dtype=r.dtype)
        solve = lambda y: torch.linalg.solve(gram, r.T @ torch.cat(y) / len(r)).T
        return Teacher(solve(received), B, b, solve(sines))

    def frequency(self, u: Tensor) -> Tensor:
        """In radians a time constant."""
        low, high = 2 * math.pi / self.slow, 2 * math.pi / self.fast
        return low + (u + 1) / 2 * (high - low)


# ---------------------------------------------------------------- recordings


@dataclass(frozen=True)
class Trials:
    """A condition is an ordered pair of `levels` inputs, evenly spaced over [-1, 1]: the first holds for the first half
    of a trial, the second for the rest. Conditions with a level that is numbered in `held` are held out. `repeats`
    trials of each, from random states after `settle` time constants of the first level; `length` samples a trial, `dt`
    apart."""

    levels: int = 7
    held: tuple[int, ...] = (2, 4)
    repeats: int = 3
    length: int = 120
    dt: float = 0.2
    settle: float = 20.0


@dataclass(frozen=True, eq=False)
class Part:
    """Trials of the same conditions, one after the other: in `data` each is an episode."""

    data: Dataset  # observed: the outputs, then the recorded units
    activity: Tensor  # [E, T, N] the rates of all units
    levels: Tensor  # [E, 2]

    @property
    def obs(self) -> Tensor:
        """[E, T, O + n]"""
        return self.data.obs.unflatten(0, self.activity.shape[:2])

    @property
    def act(self) -> Tensor:
        """[E, T, A]"""
        return self.data.act.unflatten(0, self.activity.shape[:2])


@dataclass(frozen=True, eq=False)
class Recording:
    train: Part
    held: Part
    recorded: Tensor  # [n] which units, in the order in which they are observed
    outputs: int

    @property
    def unrecorded(self) -> Tensor:
        """[N - n]"""
        keep = torch.ones(self.train.activity.shape[2], dtype=torch.bool)
        keep[self.recorded] = False
        return keep.nonzero()[:, 0]


def record(teacher: Teacher, trials: Trials, fraction: float, seed: int) -> Recording:
    """The outputs and a share `fraction` of the units, at least one unless it is 0, drawn by the seed: a larger
    fraction adds units, and changes no trial. Raises ValueError for a fraction outside [0, 1] and for trials that leave
    nothing to train on or nothing to test on."""
    held = sorted(set(trials.held))
    if not 0 <= fraction <= 1:
        raise ValueError(f"record: fraction is {fraction}, expected a share of the units, 0 to 1")
    if not held or held[0] < 0 or held[-1] >= trials.levels or len(held) > trials.levels - 2:
        raise ValueError(
            f"Trials: held is {trials.held} of {trials.levels} levels; expected at least one, numbered from 0, and at "
            "least two to remain"
        )
    if trials.repeats < 1 or trials.length < 2 or trials.dt <= 0 or trials.settle < 0:
        raise ValueError(
            f"Trials: got repeats {trials.repeats}, length {trials.length}, dt {trials.dt}, settle {trials.settle}; "
            "expected >= 1, >= 2, > 0 and >= 0"
        )
    n = max(math.ceil(fraction), round(fraction * teacher.units))
    g = torch.Generator().manual_seed(seed)
    recorded = torch.randperm(teacher.units, generator=g)[:n]
    levels = torch.cartesian_prod(*[torch.arange(trials.levels)] * 2).repeat_interleave(trials.repeats, 0)
    u = torch.linspace(-1, 1, trials.levels, dtype=torch.float64)[levels]
    first, second = u[:, :1, None], u[:, 1:, None]
    start = torch.randn(len(levels), teacher.units, generator=g, dtype=torch.float64)
    before = first.expand(-1, math.ceil(trials.settle / trials.dt), -1)
    start = teacher.run(start, before, trials.dt)[:, -1]
    half = trials.length // 2
    during = torch.cat([first.expand(-1, half, -1), second.expand(-1, trials.length - half, -1)], 1)
    activity = torch.tanh(teacher.run(start, during[:, :-1], trials.dt))
    seen = torch.cat([activity @ teacher.W.T, activity[..., recorded]], 2)
    out = torch.isin(levels, torch.tensor(held)).any(1)

    def part(keep: Tensor, name: str) -> Part:
        data = from_arrays(
            seen[keep].numpy(), during[keep].numpy(), dt=trials.dt, bounds=(-1.0, 1.0), name=name, label="record"
        )
        return Part(data, activity[keep], levels[keep])

    return Recording(part(~out, "recordings-train"), part(out, "recordings-held"), recorded, len(teacher.W))


# ---------------------------------------------------------------- scores

Student = Callable[[Part], tuple[Tensor, Tensor]]
"""From the first `warm` samples of each trial and all of its inputs: what the student observes later
[E, T - warm, O + n] and its features there [E, T - warm, F], from which activity is read out."""


def relative_error(true: Tensor, predicted: Tensor, mean: Tensor) -> float:
    """The squared error of predicted [..., D] over that of the constant `mean` [D], over all dimensions together: 0 is
    perfect, 1 is what the mean does; infinite where a prediction is not finite. Raises ValueError for other shapes and
    for a truth that is the mean."""
    if true.shape != predicted.shape:
        raise ValueError(f"relative_error: predicted is {list(predicted.shape)}, expected {list(true.shape)}")
    true, predicted = true.double(), predicted.double()
    scale = float((true - mean).square().mean())
    if scale <= 1e-24:
        raise ValueError("relative_error: the truth does not differ from the mean; expected activity that moves")
    error = float((predicted - true).square().mean()) / scale
    return error if math.isfinite(error) else math.inf


def readout(features: Tensor, target: Tensor, ridge: float = 1e-6) -> Callable[[Tensor], Tensor]:
    """The linear map from features [..., F] to targets [..., D] by ridge regression, relative to the mean variance of
    the features; the intercept is free."""
    x, y = features.double().flatten(0, -2), target.double().flatten(0, -2)
    at, level = x.mean(0), y.mean(0)
    x, y = x - at, y - level
    gram = x.T @ x / len(x)
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-30)
    weight = torch.linalg.solve(gram, x.T @ y / len(x))
    return lambda f: (f.double() - at) @ weight + level


def score(recording: Recording, student: Student, warm: int, ridge: float = 1e-6) -> dict[str, float]:
    """Relative errors: of the student's own "output", and "recorded" and "unrecorded"
    units by a linear read-out of its features that training trials alone have fitted. Those are of held-out conditions;
    the same with "_train" of the training trials. What there are no units for is absent."""
    parts = {"_train": recording.train, "": recording.held}
    found = {key: student(part) for key, part in parts.items()}
    steps = recording.train.activity.shape[1] - warm
    for key, (obs, features) in found.items():
        want = [len(parts[key].activity), steps]
        if [*obs.shape[:2]] != want or [*features.shape[:2]] != want:
            raise ValueError(
                f"score: the student gave {list(obs.shape)} and {list(features.shape)}, expected {want} in front: "
                "trials, and samples after the first `warm`"
            )
    after = {key: part.activity[:, warm:] for key, part in parts.items()}
    read = readout(found["_train"][1], after["_train"], ridge)
    mean = after["_train"].flatten(0, 1).mean(0)
    level = recording.train.obs[:, warm:, : recording.outputs].flatten(0, 1).mean(0)
    out = {}
    for key, part in parts.items():
        obs, features = found[key]
        true = part.obs[:, warm:, : recording.outputs]
        out[f"output{key}"] = relative_error(true, obs[..., : recording.outputs], level)
        units = read(features)
        for name, index in (("recorded", recording.recorded), ("unrecorded", recording.unrecorded)):
            if len(index):
                out[f"{name}{key}"] = relative_error(after[key][..., index], units[..., index], mean[index])
    return out
