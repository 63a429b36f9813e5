"""The sparse-recordings task: its teacher against an independent integration, what is recorded and what is held out,
and its scores at both ends."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from mbrl_envs.recordings import SineTask, Trials, readout, record, relative_error, score
from scipy.integrate import solve_ivp

SMALL = Trials(levels=5, held=(2,), repeats=2, length=40)


@cache
def teacher():
    return SineTask(20).teach(0)


@cache
def recording(fraction):
    return record(teacher(), SMALL, fraction, 0)


def test_the_teacher_moves_by_its_equations():
    t, dt = teacher(), 0.3
    rng = np.random.default_rng(0)
    x, u = rng.normal(size=t.units), rng.uniform(-1, 1, (5, 1))
    start, held = torch.from_numpy(x)[None], torch.from_numpy(u)[None]
    got, fine = t.run(start, held, dt)[0], t.run(start, held, dt, 0.01)[0]
    assert np.array_equal(got[0], x)
    J, B, b = (m.numpy() for m in (t.J, t.B, t.b))
    for k in range(5):
        field = lambda _, x, k=k: -x + J @ np.tanh(x) + B @ u[k] + b
        x = solve_ivp(field, (0, dt), x, method="DOP853", rtol=1e-11, atol=1e-11).y[:, -1]
        np.testing.assert_allclose(got[k + 1], x, rtol=0, atol=1e-4)
        np.testing.assert_allclose(fine[k + 1], x, rtol=0, atol=1e-8)


def test_its_output_is_a_sine_of_the_frequency_that_the_input_sets():
    task, dt = SineTask(), 0.1
    u = torch.tensor([-0.9, -0.3, 0.2, 0.8], dtype=torch.float64)[:, None]
    x = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = task.teach(0)
    y = found.run(x, u[:, None].expand(-1, 1200, -1), dt)[:, 400:]
    y = (torch.tanh(y) @ found.W.T)[..., 0]
    up = (y[:, 1:] > 0) & (y[:, :-1] <= 0)
    for row, want in zip(up, task.frequency(u)[:, 0], strict=True):
        at = row.nonzero()[:, 0]
        period = (at[-1] - at[0]).item() * dt / (len(at) - 1)
        assert 2 * np.pi / period == pytest.approx(want.item(), rel=0.08)
    assert ((y.amax(1) - 1).abs() < 0.15).all()


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.01, 1), (0.1, 2), (0.3, 6), (1.0, 20)])
def test_a_fraction_of_the_units_is_observed_behind_the_outputs(fraction, count):
    r = recording(fraction)
    assert len(r.recorded) == count == len(r.recorded.unique())
    assert sorted([*r.recorded.tolist(), *r.unrecorded.tolist()]) == list(range(20))
    for part in (r.train, r.held):
        assert part.obs.shape == (*part.activity.shape[:2], 1 + count)
        torch.testing.assert_close(part.obs[..., 1:], part.activity[..., r.recorded].float())
        torch.testing.assert_close(part.obs[..., :1], (part.activity @ teacher().W.T).float())
        assert part.data.starts.tolist() == list(range(0, len(part.data) + 1, 40))


def test_a_larger_fraction_adds_units_and_changes_no_trial():
    few, many, other = recording(0.1), recording(0.3), record(teacher(), SMALL, 0.3, 1)
    assert many.recorded[:2].tolist() == few.recorded.tolist()
    assert torch.equal(few.train.activity, many.train.activity)
    assert other.recorded.tolist() != many.recorded.tolist()
    assert not torch.equal(other.train.activity, many.train.activity)


def test_held_out_levels_are_in_no_training_trial():
    r = recording(0.1)
    kept = [0, 1, 3, 4]
    assert {tuple(x) for x in r.train.levels.tolist()} == set(product(kept, kept))
    assert {tuple(x) for x in r.held.levels.tolist()} == {p for p in product(range(5), repeat=2) if 2 in p}
    assert len(r.train.levels) == 2 * 16
    assert len(r.held.levels) == 2 * 9
    for part in (r.train, r.held):
        u = torch.linspace(-1, 1, 5)[part.levels]
        assert torch.equal(part.act[:, :20, 0], u[:, :1].expand(-1, 20))
        assert torch.equal(part.act[:, 20:, 0], u[:, 1:].expand(-1, 20))
    assert (r.train.act != 0).all()


def test_activity_follows_from_the_inputs_that_are_given_with_it():
    part = recording(1.0).held
    x = part.activity.atanh()
    after = teacher().run(x.flatten(0, 1), part.act.double().flatten(0, 1)[:, None], SMALL.dt)[:, 1]
    torch.testing.assert_close(after.unflatten(0, x.shape[:2])[:, :-1].tanh(), part.activity[:, 1:])


# ---------------------------------------------------------------- scores

WARM = 10


def perfect(part):
    return part.obs[:, WARM:], part.activity[:, WARM:]


def average(part):
    level = recording(0.3).train.obs[:, WARM:].flatten(0, 1).mean(0)
    return level.expand_as(part.obs[:, WARM:]), torch.zeros(*part.activity[:, WARM:].shape[:2], 3)


def test_a_perfect_student_scores_0_and_the_mean_1():
    keys = {f"{a}{b}" for a in ("output", "recorded", "unrecorded") for b in ("", "_train")}
    best, mean = (score(recording(0.3), student, WARM) for student in (perfect, average))
    assert set(best) == set(mean) == keys
    assert all(v < 1e-6 for v in best.values())
    assert all(v == pytest.approx(1.0, abs=1e-6) for v in mean.values())
    assert set(score(recording(0.0), perfect, WARM)) == keys - {"recorded", "recorded_train"}
    assert set(score(recording(1.0), perfect, WARM)) == keys - {"unrecorded", "unrecorded_train"}


def test_a_score_is_of_its_own_units():
    """Of the features only those of recorded units are right, and of the output only the held-out trials'."""
    r = recording(0.3)

    def half(part):
        obs, features = perfect(part)
        return obs + (part is r.train), features[..., r.recorded]

    found = score(r, half, WARM)
    assert max(found["recorded"], found["recorded_train"], found["output"]) < 1e-6
    assert found["unrecorded"] > 1e-3
    scale = (r.train.obs[:, WARM:, 0] - r.train.obs[:, WARM:, 0].mean()).square().mean()
    assert found["output_train"] == pytest.approx(1 / scale.item(), rel=1e-5)


def test_the_read_out_is_of_training_trials_alone():
    """Features that are the activity in training and its negative elsewhere: an error of 2, squared, about the mean."""
    r = recording(1.0)
    flipped = lambda part: (part.obs[:, WARM:], part.activity[:, WARM:] * (1 if part is r.train else -1))
    found = score(r, flipped, WARM)
    assert found["recorded_train"] < 1e-6
    x = r.held.activity[:, WARM:]
    mean = r.train.activity[:, WARM:].flatten(0, 1).mean(0)
    assert found["recorded"] == pytest.approx(((2 * x) ** 2).mean().item() / ((x - mean) ** 2).mean().item(), rel=1e-3)


def test_a_prediction_that_is_not_finite_is_infinitely_wrong():
    x = torch.randn(4, 3)
    bad = x.clone()
    bad[0, 0] = torch.nan
    assert relative_error(x, bad, torch.zeros(3)) == float("inf")
    assert relative_error(x, 3 * x, torch.zeros(3)) == pytest.approx(4.0)


def test_a_read_out_is_affine_and_its_ridge_does_not_depend_on_units():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(50, 4, generator=g), torch.randn(4, 2, generator=g)
    y = x @ w + torch.tensor([3.0, -5.0])
    torch.testing.assert_close(readout(x, y, 0.0)(x), y.double(), atol=1e-5, rtol=0)
    a, b = readout(x, y, 0.5)(x), readout(1000 * x + 7, y, 0.5)(1000 * x + 7)
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert (a - y).square().mean() > 0.01
    torch.testing.assert_close(a.mean(0), y.double().mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: record(teacher(), SMALL, 1.2, 0), "fraction is 1.2"),
        (lambda: record(teacher(), Trials(held=()), 0.1, 0), "held is"),
        (lambda: record(teacher(), Trials(levels=3, held=(0, 1)), 0.1, 0), "two to remain"),
        (lambda: record(teacher(), Trials(levels=3, held=(3,)), 0.1, 0), "held is"),
        (lambda: record(teacher(), Trials(repeats=0), 0.1, 0), "repeats 0"),
        (lambda: SineTask(units=2).teach(0), "2 units"),
        (lambda: SineTask(slow=5.0, fast=6.0).teach(0), "periods 6.0 to 5.0"),
        (lambda: score(recording(0.3), lambda part: (part.obs, part.activity), WARM), "after the first `warm`"),
        (lambda: relative_error(torch.zeros(3, 2), torch.zeros(3, 1), torch.zeros(2)), r"expected \[3, 2\]"),
        (lambda: relative_error(torch.ones(3, 2), torch.zeros(3, 2), torch.ones(2)), "does not differ"),
    ],
)
def test_bad_input_is_one_error(call, says):
    with pytest.raises(ValueError, match=says):
        call()
