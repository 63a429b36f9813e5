"""The suite's statistics, against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from mbrl import suite


def results():
    out = []
    for algorithm, shift in (("a", 0.0), ("b", 10.0)):
        for dataset, base in (("x", 20.0), ("y", 60.0)):
            out += [
                {"algorithm": algorithm, "dataset": dataset, "seeds": [s], "score_last10": [base + shift + s]}
                for s in (2, 0, 1)
            ]
    return out


def test_the_table_is_by_algorithm_dataset_and_seed():
    scores = suite.table(results())
    assert scores == {"a": {"x": [20, 21, 22], "y": [60, 61, 62]}, "b": {"x": [30, 31, 32], "y": [70, 71, 72]}}


def test_runs_without_a_score_are_passed_over():
    assert suite.table([{"algorithm": "a", "dataset": "x", "seeds": [0]}]) == {}


def test_a_seed_counts_once():
    """Several runs of one, alone and beside others, say: the first counts."""
    run = lambda seeds, scores: {"algorithm": "a", "dataset": "x", "seeds": seeds, "score_last10": scores}
    alone, beside, without = run([1], [1.0]), run([1, 2], [9.0, 5.0]), run([1], None)
    assert suite.table([alone, beside]) == {"a": {"x": [1.0, 5.0]}}
    assert suite.table([without, beside, alone]) == {"a": {"x": [9.0, 5.0]}}


def test_points_are_the_interquartile_and_the_plain_mean():
    g = np.random.default_rng(0)
    scores = {"a": {d: list(g.normal(size=8)) for d in "xyz"}}
    got = suite.aggregate(scores, resamples=500)["a"]
    flat = np.concatenate([scores["a"][d] for d in "xyz"])
    assert got["iqm"].point == pytest.approx(stats.trim_mean(flat, 0.25))
    assert got["mean"].point == pytest.approx(flat.mean())
    assert got["mean"].low < got["mean"].point < got["mean"].high


def test_the_interval_of_the_mean_is_stratified():
    """Datasets far apart add nothing to the interval: it comes from the runs within each."""
    scores = {"a": {"x": [0.0, 1.0] * 10, "y": [1000.0, 1001.0] * 10}}
    got = suite.aggregate(scores, resamples=4000)["a"]["mean"]
    width = 2 * 1.96 * 0.5 / np.sqrt(40)
    assert got.high - got.low == pytest.approx(width, rel=0.15)


def test_an_algorithm_that_lacks_a_dataset_is_left_out():
    assert set(suite.aggregate({"a": {"x": [1.0], "y": [2.0]}, "b": {"x": [1.0]}}, resamples=50)) == {"a"}
    assert set(suite.aggregate({"a": {"x": [1.0], "y": [2.0]}, "b": {"x": [1.0, 3.0], "y": [2.0]}}, resamples=50)) == {
        "a"
    }
    assert suite.aggregate({}) == {}


def test_the_difference_resamples_each_cell_on_its_own():
    g = np.random.default_rng(1)
    a, b = ({d: list(g.normal(m, 1, 30)) for d, m in (("x", 0), ("y", 100))} for _ in range(2))
    got = suite.difference(a, b)
    point = np.mean([np.mean(a[d]) - np.mean(b[d]) for d in "xy"])
    error = np.sqrt(sum(np.var(v[d]) / 30 for v in (a, b) for d in "xy")) / 2
    assert got.point == pytest.approx(point)
    z = stats.norm.ppf(0.95)
    assert (got.low, got.high) == pytest.approx((point - z * error, point + z * error), abs=0.03)
    with pytest.raises(ValueError, match="no dataset in common"):
        suite.difference({"x": [1.0]}, {"y": [1.0]})
