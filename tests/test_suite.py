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


def test_the_probability_of_improvement_is_rliables():
    from rliable import metrics

    generator = np.random.default_rng(0)
    a, b = ({d: generator.normal(size=5).round(1).tolist() for d in ("x", "y", "z")} for _ in range(2))
    matrix = lambda row: np.array([row[d] for d in ("x", "y", "z")]).T
    found = suite.improvement(a, b, resamples=2_000)
    assert found.point == pytest.approx(metrics.probability_of_improvement(matrix(a), matrix(b)))
    assert found.low < found.point < found.high
    assert suite.improvement(a, a | {"w": [1.0]}).point == pytest.approx(0.5)
    surely = suite.improvement({"x": [1.0, 2.0]}, {"x": [0.0, 0.5, 0.9]})
    assert (surely.low, surely.point, surely.high) == (1, 1, 1)
    half = suite.improvement({"x": [1.0]}, {"x": [1.0, 1.0]})
    assert (half.low, half.point, half.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no dataset in common"):
        suite.improvement({"x": [1.0]}, {"y": [1.0]})


def test_a_profile_is_rliables():
    from rliable import library

    scores = np.random.default_rng(1).normal(size=(4, 3))
    levels = np.linspace(-2, 2, 9)
    want, _ = library.create_performance_profile({"a": scores}, levels, reps=10)
    found = suite.profile({str(d): scores[:, d].tolist() for d in range(3)}, levels.tolist())
    assert found == pytest.approx(want["a"].tolist())
    assert suite.profile({"x": [1.0, 3.0], "y": [1.0], "z": []}, [0.0, 1.0, 2.0]) == [1.0, 0.25, 0.25]
    with pytest.raises(ValueError, match="no dataset has a run"):
        suite.profile({"x": []}, [0.0])
