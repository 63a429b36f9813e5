"""Baselines that stand beside every score of a reconstruction and tell whether it means anything.

Settings are fitted to a training series [T, N], or to several of one system, and give a `Null`, which runs freely and,
where it can, predicts. All in float64.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from mbrl.metrics import prediction_error, scores, settled

EXACT = 1e-12  # of the data's variance: what a VAR leaves below this is rounding


class Null(abc.ABC):
    """A fitted baseline. history: how many observations a prediction reads, 0 where it makes none."""

    name: str
    history: int = 1

    @abc.abstractmethod
    def free_run(self, steps: int, generator: torch.Generator) -> Tensor:
        """[steps, N]"""

    def predict(self, history: Tensor, n: int) -> Tensor:
        """The expected next n observations after history [B, self.history, N]: [B, n, N]."""
        raise NotImplementedError(f"{self.name}: it makes no predictions")

    def forecast(self, series: Tensor, n: int, chunk: int = 4096) -> Tensor:
        """Predictions from every time of a series [T, N] that has enough before and n after it:
        [T - history - n + 1, n, N]."""
        starts = len(series) - self.history - n + 1
        if starts < 1:
            raise ValueError(
                f"{self.name}: got {len(series)} steps, expected at least {self.history + n} to forecast {n}"
            )
        windows = series.double().unfold(0, max(self.history, 1), 1).mT[:starts]
        return torch.cat([self.predict(part, n) for part in windows.split(chunk)])


Series = Tensor | Sequence[Tensor]  # [T, N], or several such


def _training(train: Tensor, where: str) -> Tensor:
    train = train.detach().double()
    if train.ndim != 2 or len(train) < 2 or not bool(train.isfinite().all()):
        raise ValueError(f"{where}: got a series {list(train.shape)}, expected [T >= 2, N] of finite numbers")
    return train


def _parts(train: Series, where: str) -> list[Tensor]:
    """The longest first."""
    every = [train] if isinstance(train, Tensor) else train
    return sorted((_training(x, where) for x in every), key=len, reverse=True)


def _normal(like: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)


def _root(cov: Tensor) -> Tensor:
    """A matrix whose square, L L', is a covariance that may be singular."""
    value, vector = torch.linalg.eigh(cov)
    return vector * value.clamp(min=0).sqrt()


# ---------------------------------------------------------------- no time


@dataclass(frozen=True)
class GaussianConfig:
    """Independent draws of a Gaussian with the data's mean and covariance; predicts the mean."""

    def fit(self, train: Series) -> "Gaussian":
        train = torch.cat(_parts(train, "GaussianConfig"))
        return Gaussian(train.mean(0), train.T.cov().reshape(train.shape[1], train.shape[1]))


@final
@dataclass(frozen=True, eq=False)
class Gaussian(Null):
    mean: Tensor  # [N]
    cov: Tensor  # [N, N]
    name = "iid_gaussian"

    def free_run(self, steps: int, generator: torch.Generator) -> Tensor:
        return self.mean + _normal(self.mean, generator, steps, len(self.mean)) @ _root(self.cov).T

    def predict(self, history: Tensor, n: int) -> Tensor:
        return self.mean.expand(len(history), n, -1)


@dataclass(frozen=True)
class PersistenceConfig:
    """Nothing changes any more: predicts the last observation; runs freely as the last of the longest training series,
    a fixed point."""

    def fit(self, train: Series) -> "Persistence":
        return Persistence(_parts(train, "PersistenceConfig")[0][-1])


@final
@dataclass(frozen=True, eq=False)
class Persistence(Null):
    last: Tensor  # [N]
    name = "persistence"

    def free_run(self, steps: int, generator: torch.Generator) -> Tensor:
        return self.last.repeat(steps, 1)

    def predict(self, history: Tensor, n: int) -> Tensor:
        return history[:, -1:].expand(-1, n, -1)


# ---------------------------------------------------------------- linear time


@dataclass(frozen=True)
class VarConfig:
    """x_t = c + A_1 x_{t-1} + ... + A_p x_{t-p} + e_t by least squares, e of the residuals' covariance.

    order: p, or None: the one of 1 .. max_order (and what the data can carry) with the least Akaike or Bayes criterion,
    all judged on the same rows. Of several series all are fitted that are longer than the order; a free run begins
    where the longest ends."""

    order: int | None = None
    max_order: int = 20
    criterion: Literal["aic", "bic"] = "bic"

    @staticmethod
    def most(train: Series) -> int:
        """The largest order that the data can carry: with more rows than coefficients, and residuals of full rank."""
        lengths = [len(x) for x in ([train] if isinstance(train, Tensor) else train)]
        width = (train if isinstance(train, Tensor) else train[0]).shape[1]
        carried = lambda p: sum(max(n - p, 0) for n in lengths) - p * width >= width + 2
        return next((p for p in range(max(lengths) - 1, 0, -1) if carried(p)), 0)

    def fit(self, train: Series) -> "Var":
        """Data whose dimensions depend on each other exactly (delay embeddings do) are no trouble: of all best
        coefficients the smallest are taken. Raises ValueError for series too short for the order."""
        parts = _parts(train, "VarConfig")
        length, width = sum(map(len, parts)), parts[0].shape[1]
        most = self.most(parts)
        order = self._select(parts, min(self.max_order, most)) if self.order is None else self.order
        if not 1 <= order <= most:
            raise ValueError(
                f"VarConfig: got {length} steps of {width} dimensions and order {self.order}, max_order "
                f"{self.max_order}; expected an order of 1 .. {most}, which the data can carry"
            )
        r, rows = _triangle(parts, order)
        k = 1 + width * order
        coef = torch.linalg.pinv(r[:k, :k]) @ r[:k, k:]  # [k, N]
        rest = r[:, k:] - r[:, :k] @ coef
        cov = rest.T @ rest / (rows - k)
        lags = coef[1:].reshape(order, width, width).mT  # A_1 .. A_p
        return Var(coef[0], lags, cov, parts[0][-order:].clone())

    def _select(self, parts: list[Tensor], most: int) -> int:
        if most < 1:
            return 0
        width = parts[0].shape[1]
        r, rows = _triangle(parts, most)
        price = {"aic": 2.0, "bic": math.log(rows)}[self.criterion] / rows
        values, least = [], EXACT * float(torch.cat(parts).var(0, correction=0).sum())
        for p in range(1, most + 1):
            rest = r[1 + width * p :, -width:]  # what the first columns leave: the factorisation is nested
            spread = torch.linalg.eigvalsh(rest.T @ rest / rows).clamp(min=least)  # what is exact stays out of it
            values.append(spread.log().sum() + price * p * width**2)
        return int(torch.stack(values).argmin()) + 1


def _triangle(parts: list[Tensor], order: int) -> tuple[Tensor, int]:
    """R of the regression's columns and its targets side by side, [1, x_{t-1}, ..., x_{t-p}, x_t]: all that least
    squares needs of the data, without squaring their condition number; and how many rows there are."""
    rows = []
    for x in (x for x in parts if len(x) > order):
        lags = [x[order - i : len(x) - i] for i in range(1, order + 1)]
        rows.append(torch.cat([torch.ones_like(x[order:, :1]), *lags, x[order:]], 1))
    return torch.linalg.qr(torch.cat(rows), mode="r").R, sum(map(len, rows))


@final
@dataclass(frozen=True, eq=False)
class Var(Null):
    intercept: Tensor  # [N]
    lags: Tensor  # [p, N, N]  A_1 .. A_p
    cov: Tensor  # [N, N]  of the noise
    last: Tensor  # [p, N]  the end of the training data, where a free run begins

    @property
    def history(self) -> int:
        return len(self.lags)

    @property
    def name(self) -> str:
        return f"var({self.history})"

    @property
    def weight(self) -> Tensor:
        """[N, p N], to be applied to p observations in their order, the oldest first."""
        return self.lags.flip(0).transpose(0, 1).flatten(1)

    def free_run(self, steps: int, generator: torch.Generator) -> Tensor:
        """With noise. One that is unstable grows without bound."""
        noise = _normal(self.cov, generator, steps, len(self.cov)) @ _root(self.cov).T
        out = torch.cat([self.last, self.intercept + noise])
        p, width = self.last.shape
        weight, flat = self.weight, out.view(-1)
        for t in range(steps):
            out[p + t].addmv_(weight, flat[t * width : (t + p) * width])
        return out[p:]

    def predict(self, history: Tensor, n: int) -> Tensor:
        rows, p, width = history.shape
        out, weight = torch.cat([history, history.new_empty(rows, n, width)], 1), self.weight.T
        for t in range(n):
            out[:, p + t] = torch.addmm(self.intercept, out[:, t : t + p].flatten(1), weight)
        return out[:, p:]


@dataclass(frozen=True)
class SurrogateConfig:
    """The data with random phases (Prichard & Theiler 1994): each frequency is turned by one angle in all dimensions,
    which keeps power and cross spectra, hence all that is linear, and destroys the rest. Of several series the longest.
    It makes no predictions."""

    def fit(self, train: Series) -> "Surrogate":
        return Surrogate(_parts(train, "SurrogateConfig")[0])


@final
@dataclass(frozen=True, eq=False)
class Surrogate(Null):
    train: Tensor  # [T, N]
    name = "phase_surrogate"
    history = 0

    def free_run(self, steps: int, generator: torch.Generator) -> Tensor:
        """A new surrogate at each call. It has the training data's length as its period and is continued by it."""
        length = len(self.train)
        spectrum = torch.fft.rfft(self.train, dim=0)
        turn = torch.rand(len(spectrum), generator=generator, dtype=torch.float64, device=generator.device)
        turn[0] = 0  # the mean
        if length % 2 == 0:
            turn[-1] = 0  # the highest frequency is real
        angle = (2 * torch.pi * turn).to(spectrum.device)
        drawn = torch.fft.irfft(spectrum * torch.polar(torch.ones_like(angle), angle)[:, None], n=length, dim=0)
        return drawn[torch.arange(steps, device=drawn.device) % length]


# ---------------------------------------------------------------- the table

NullConfig = GaussianConfig | VarConfig | SurrogateConfig | PersistenceConfig


def null_table(
    train: Series,
    test: Tensor,
    n: int = 20,
    *,
    generator: torch.Generator,
    order: int | None = None,
    truth: Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """The scores of every null, by the protocol of a model's: {name: `mbrl.metrics.scores`}; pe_n is absent where one
    makes no predictions. train [T, N], or several such; test [T, N].

    order: the VAR's, chosen by the Bayes criterion, so that the test series has enough before n steps of it, where
    None; its row is absent where the training series are too short for any. "truth" compares the truth with itself,
    the floor: the first T steps of a second stretch, `truth`, or of the longest training series; the row is absent
    where these are fewer than the test's T steps. It is a floor only where they are independent of the test series,
    and of noise."""
    linear = VarConfig(order, max(1, min(VarConfig.max_order, len(test) - n)))
    configs: list[NullConfig] = [GaussianConfig(), linear, SurrogateConfig(), PersistenceConfig()]
    if order is None and VarConfig.most(train) < 1:
        configs.remove(linear)
    table = {}
    for config in configs:
        null: Null = config.fit(train)
        run = settled(lambda steps, null=null: null.free_run(steps, generator), len(test))
        table[null.name] = scores(test, run, null.forecast if null.history else None, n, generator=generator)
    truth = _parts(train, "null_table")[0] if truth is None else truth
    if len(truth) >= len(test):
        table["truth"] = scores(test, truth[: len(test)], generator=generator)
    return table


# ---------------------------------------------------------------- driven systems


RIDGES = (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)  # in parts of each regressor's variance
FOLDS = 3  # stretches of a training series, each held out once, on which orders are chosen
LONGEST = 10_000  # steps of a free run that they are chosen by
SLACK = 0.01  # of the least error: so much more a smaller order may have
ROUNDING = 1e-6  # what a stable VARX's largest eigenvalue may have above 1, of data that are float32


@dataclass(frozen=True)
class VarxConfig:
    """x_{t+1} = c + sum_i (A_i x_{t-i} + B_i s_{t-i}), i = 0 .. order - 1: the linear model of a system with inputs s.

    order: by plain least squares; or None: that of 1 .. max_order (and what the data can carry), with that ridge of
    `RIDGES`, whose free runs over thirds of the data, each fitted to the other two, err least. Lagged values of a
    smooth series are nearly collinear, and plain least squares of many of them explodes: an unstable one is taken only
    where none is stable."""

    order: int | None = None
    max_order: int = 10

    def most(self, steps: int, each: int) -> int:
        """The largest order that is tried with a series of so many steps, each: N + A. 0: it carries none."""
        return max((p for p in range(1, self.max_order + 1) if _carries(steps // FOLDS, p, each)), default=0)

    def fit(self, obs: Tensor, act: Tensor, more: Sequence[tuple[Tensor, Tensor]] = ()) -> "Varx":
        """obs [T, N]; act [T - 1 or more, A]: act[t] leads from obs[t] to obs[t + 1]; more: further such series, which
        the coefficients, not the order, are fitted to as well where they are longer than it. Of all best coefficients
        the smallest are taken, in units of the regressors' spreads. Raises ValueError for a series too short for the
        order."""
        obs = _training(obs, "VarxConfig")
        act = act.detach().double()[: len(obs) - 1]
        each = obs.shape[1] + act.shape[1]  # regressors of a lag
        parts = [(obs, act), *((x.detach().double(), u.detach().double()[: len(x) - 1]) for x, u in more)]

        def again(p: int, ridge: float) -> Varx:
            every = [_triangle_driven(x, u, p) for x, u in parts if len(x) > p]
            r = every[0] if len(every) == 1 else torch.linalg.qr(torch.cat(every), mode="r").R
            return _solved(r, p, obs.shape[1], act.shape[1], ridge)

        if self.order is not None:
            if not _carries(len(obs), self.order, each):
                want = f"expected more than {self.order * (each + 1) + 1} steps"
                raise ValueError(f"VarxConfig: got {len(obs)} steps and order {self.order}, {want}")
            return again(self.order, 0.0)
        most = self.most(len(obs), each)
        if most == 0:
            want = f"expected max_order at least 1, and at least {FOLDS * (each + 3)} steps"
            raise ValueError(f"VarxConfig: got {len(obs)} steps and max_order {self.max_order}, {want}")
        ranked = _ranked(obs, act, most)
        return next((null for null in (again(*x) for x in ranked) if null.stable), again(*ranked[0]))


def _carries(steps: int, order: int, each: int) -> bool:
    return order >= 1 and steps > order * (each + 1) + 1


def _ranked(obs: Tensor, act: Tensor, most: int) -> list[tuple[int, float]]:
    """Orders and ridges, the best first: by free runs over each fold of what is fitted to the others."""
    choices = [(p, ridge) for p in range(1, most + 1) for ridge in RIDGES]
    widths, fold, total = (obs.shape[1], act.shape[1]), len(obs) // FOLDS, torch.zeros(len(choices)).to(obs)
    parts = [(obs[i : i + fold], act[i : i + fold - 1]) for i in range(0, FOLDS * fold, fold)]
    each = [_triangle_driven(*part, most) for part in parts]
    for i, (true, drive) in enumerate(parts):
        true, drive = true[: LONGEST + most], drive[: LONGEST + most - 1]
        r = torch.linalg.qr(torch.cat([x for j, x in enumerate(each) if j != i]), mode="r").R
        wide = [_solved(r, p, *widths, ridge).padded(most) for p, ridge in choices]
        forced = torch.stack([x.forced(drive[None]) for x in wide])
        free = _rolled(torch.stack([x.weight for x in wide]), true[:most].expand(len(wide), 1, -1, -1), forced)
        error = (free[:, 0] - true[most:]).square().mean(1) / obs.var(0, correction=0).clamp(min=1e-300)
        total += error.mean(1).nan_to_num(nan=math.inf, posinf=math.inf) / FOLDS
    errors = total.tolist()
    near = (1 + SLACK) * min(errors) + EXACT
    rank = lambda i: (0, choices[i][0], errors[i]) if errors[i] <= near else (1, errors[i], 0)
    return [choices[i] for i in sorted(range(len(choices)), key=rank)]


def _triangle_driven(obs: Tensor, act: Tensor, order: int) -> Tensor:
    """R of [1, x_t, s_t, x_{t-1}, s_{t-1}, ..., x_{t+1}]; without its first row and column that of the same less their
    means."""
    steps = range(order - 1, -1, -1)
    past = [torch.cat([obs[i : len(obs) - order + i], act[i : len(act) - order + 1 + i]], 1) for i in steps]
    return torch.linalg.qr(torch.cat([torch.ones_like(obs[order:, :1]), *past, obs[order:]], 1), mode="r").R


def _solved(r: Tensor, order: int, width: int, inputs: int, ridge: float) -> "Varx":
    """The fit of this order or a smaller one than `_triangle_driven` had; the ridge spares the constant."""
    k = order * (width + inputs)
    size = r[1:, 1 : 1 + k].norm(dim=0)
    size = torch.where(size > EXACT * r[:, 1 : 1 + k].norm(dim=0), size, math.inf)  # one that never changes has no say
    u, s, v = torch.linalg.svd(r[1 : 1 + k, 1 : 1 + k] / size, full_matrices=False)
    kept = s > s[0] * k * torch.finfo(s.dtype).eps
    inverse = torch.where(kept, s / (s.square() + ridge).clamp(min=1e-300), 0.0)
    coef = v.mT @ (inverse[:, None] * (u.mT @ r[1 : 1 + k, -width:])) / size[:, None]  # [p (N + A), N]
    both = coef.reshape(order, -1, width).mT  # [p, N, N + A]
    constant = (r[0, -width:] - r[0, 1 : 1 + k] @ coef) / r[0, 0]
    return Varx(constant, both[..., :width], both[..., width:])


def _rolled(weight: Tensor, history: Tensor, forced: Tensor) -> Tensor:
    """Free steps of M models, weight [M, p N, N], after history [M, B, p, N], each with what is added to it, forced
    [M, B, n, N]: [M, B, n, N]."""
    p, out = history.shape[2], torch.cat([history, forced], 2)
    for t in range(forced.shape[2]):
        out[:, :, p + t] += out[:, :, t : t + p].flatten(2) @ weight
    return out[:, :, p:]


@final
@dataclass(frozen=True, eq=False)
class Varx:
    intercept: Tensor  # [N]
    lags: Tensor  # [p, N, N]  A_0 .. A_{p-1}
    inputs: Tensor  # [p, N, A]  B_0 .. B_{p-1}

    @property
    def name(self) -> str:
        return f"varx({len(self.lags)})"

    @property
    def weight(self) -> Tensor:
        """[p N, N], which p observations in their order, the oldest first, are multiplied by."""
        return self.lags.flip(0).mT.flatten(0, 1)

    @property
    def stable(self) -> bool:
        p, width = self.lags.shape[:2]
        companion = torch.zeros(p * width, p * width, dtype=self.lags.dtype, device=self.lags.device)
        companion[:width] = self.lags.transpose(0, 1).flatten(1)
        companion[width:, :-width] = torch.eye((p - 1) * width)
        return bool(torch.linalg.eigvals(companion).abs().max() <= 1 + ROUNDING)

    def padded(self, order: int) -> "Varx":
        """The same with lags of nothing, up to this order."""
        more = lambda x: torch.cat([x, x.new_zeros(order - len(x), *x.shape[1:])])
        return Varx(self.intercept, more(self.lags), more(self.inputs))

    def forced(self, act: Tensor) -> Tensor:
        """What does not depend on observations, of act [B, p - 1 + n, A]: [B, n, N]."""
        windows = act.double().unfold(1, len(self.inputs), 1)  # [B, n, A, p], the oldest first
        return self.intercept + torch.einsum("btap,pna->btn", windows, self.inputs.flip(0))

    def run(self, obs: Tensor, act: Tensor) -> Tensor:
        """Free steps after observations [B, p, N] under act [B, p - 1 + n, A], which counts from the first of them:
        [B, n, N]."""
        return _rolled(self.weight[None], obs.double()[None], self.forced(act)[None])[0]


def driven_table(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    n: int = 20,
    *,
    generator: torch.Generator,
    order: int | None = None,
    more: Sequence[tuple[Tensor, Tensor]] = (),
) -> dict[str, dict[str, float | list[float]]]:
    """The nulls of a system with inputs, (obs [T, N], act [T - 1 or more, A]) each, as a model is judged: a free run
    under the test's inputs against what follows its beginning, and PE(n). {name: scores, with "rmse" of each dimension}
    of a VARX, begun on the test's first `order` observations, and of persistence, on the first.

    order: the VARX's; chosen, as `VarxConfig` does, where None, and its row absent where the training series is too
    short for any. more: its further series."""
    (obs, act), (true, drive) = train, (test[0].double(), test[1].double()[: len(test[0]) - 1])
    config = VarxConfig(order, max(1, min(VarxConfig.max_order, len(true) - n)))
    free, ahead = {}, {}
    if order is not None or config.most(len(obs), obs.shape[1] + act.shape[1]):
        linear = config.fit(obs, act, more)
        p = len(linear.lags)
        free[linear.name] = linear.run(true[None, :p], drive[None])[0]
        starts = len(true) - p - n + 1
        windows, acts = true.unfold(0, p, 1).mT[:starts], drive.unfold(0, p - 1 + n, 1).mT[:starts]
        ahead[linear.name] = linear.run(windows, acts)
    free["persistence"] = true[:1].expand(len(true) - 1, -1)
    ahead["persistence"] = PersistenceConfig().fit(obs).forecast(true, n)
    table: dict[str, dict[str, float | list[float]]] = {}
    for name, x in free.items():
        truth = true[len(true) - len(x) :]
        found = {k: float(v) for k, v in scores(truth, x, None, n, generator=generator).items()}
        found[f"pe_{n}"] = prediction_error(ahead[name], true).item()
        table[name] = {**found, "rmse": [float(v) for v in (x - truth).square().mean(0).sqrt()]}
    return table
