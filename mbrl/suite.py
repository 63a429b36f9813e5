"""Many runs, one table: scores, interquartile means and their intervals (Agarwal et al., NeurIPS 2021)."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval."""

    point: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:  # of one run a dataset there is no interval
            return f"{self.point:.1f}"
        return f"{self.point:.1f} [{self.low:.1f}, {self.high:.1f}]"


def table(results: Sequence[Mapping[str, Any]], key: str = "score_last10") -> dict[str, dict[str, list[float]]]:
    """algorithm -> dataset -> one score a seed, in the order of the seeds: of several runs of one the first's. Runs
    without a score are passed over."""
    out: dict[str, dict[str, dict[int, float]]] = {}
    for r in results:
        for seed, score in zip(r["seeds"], r.get(key) or (), strict=False):
            out.setdefault(r["algorithm"], {}).setdefault(r["dataset"], {}).setdefault(seed, score)
    return {a: {d: [v[seed] for seed in sorted(v)] for d, v in row.items()} for a, row in out.items()}


def _matrix(row: Mapping[str, Sequence[float]], datasets: Sequence[str]) -> np.ndarray | None:
    """[runs, datasets], or None where not every dataset has as many."""
    runs = {len(row.get(d, ())) for d in datasets}
    return np.array([row[d] for d in datasets], dtype=float).T if len(runs) == 1 and 0 not in runs else None


def aggregate(
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    resamples: int = 50_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """algorithm -> {"iqm", "mean"} over runs x datasets with stratified bootstrap intervals by rliable. Algorithms
    that lack a dataset that another one has, or runs on some of them, are left out: their means would not compare."""
    from rliable import library, metrics

    datasets = sorted({d for row in scores.values() for d in row})
    whole = {a: m for a, row in scores.items() if (m := _matrix(row, datasets)) is not None}
    if not whole:
        return {}
    function = lambda m: np.array([metrics.aggregate_iqm(m), metrics.aggregate_mean(m)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="random_state is deprecated", category=FutureWarning)
        points, intervals = library.get_interval_estimates(
            whole,
            function,
            reps=resamples,
            confidence_interval_size=confidence,
            random_state=np.random.RandomState(seed),
        )
    return {
        a: {name: Interval(points[a][i], *intervals[a][:, i]) for i, name in enumerate(("iqm", "mean"))} for a in whole
    }


def difference(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    *,
    resamples: int = 50_000,
    confidence: float = 0.90,
    seed: int = 0,
) -> Interval:
    """The mean over datasets of a's mean less b's, resampling the runs of each dataset and algorithm on their own."""
    return _compared(a, b, lambda x, y: x.mean(-1) - y.mean(-1), resamples, confidence, seed)


def improvement(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    *,
    resamples: int = 50_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The probability that a run of a scores more than one of b on the same dataset, a tie counting half, averaged over
    the datasets that both have; the interval resamples the runs of each dataset and algorithm on their own."""
    wins = lambda x, y: (np.sign(x[..., :, None] - y[..., None, :]) + 1) / 2  # of each run against each
    return _compared(a, b, lambda x, y: wins(x, y).mean((-2, -1)), resamples, confidence, seed)


def _compared(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    of: Callable[[np.ndarray, np.ndarray], Any],
    resamples: int,
    confidence: float,
    seed: int,
) -> Interval:
    """The mean over the datasets that both have of a figure of two algorithms' runs, of([..., n], [..., m]) -> [...],
    and its bootstrap interval, stratified by dataset and algorithm."""
    datasets = sorted(set(a) & set(b))
    if not datasets:
        raise ValueError(f"no dataset in common: {sorted(a)} and {sorted(b)}")
    generator = np.random.default_rng(seed)
    total, point = np.zeros(resamples), 0.0
    for d in datasets:
        runs = [np.asarray(row[d], dtype=float) for row in (a, b)]
        point += of(*runs) / len(datasets)
        total += of(*(x[generator.integers(len(x), size=(resamples, len(x)))] for x in runs)) / len(datasets)
    edge = (1 - confidence) / 2
    return Interval(float(point), *np.quantile(total, [edge, 1 - edge]))


def profile(row: Mapping[str, Sequence[float]], levels: Sequence[float]) -> list[float]:
    """The performance profile: at each level the share of runs that score more, averaged over datasets."""
    shares = [(np.asarray(x, dtype=float)[:, None] > np.asarray(levels)).mean(0) for x in row.values() if len(x)]
    if not shares:
        raise ValueError("profile: no dataset has a run")
    return np.mean(shares, axis=0).tolist()
