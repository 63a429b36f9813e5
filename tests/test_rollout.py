"""The loops over time, on systems whose every number is known."""

import pytest
import torch

from mbrl.core import Dynamics, Markov, Prediction, Segment, Spec, StepInput, pull
from mbrl.rollout import forced_mse, imagine, masked_mean, stack, steps, unroll

F64 = torch.float64
NONE = torch.zeros(1, dtype=torch.int64)


class Line(Markov):
    """x' = gain x + a + noise, reward x', uncertainty |x|."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.spec, self.noise_dim = Spec(1, 1), 1
        self.gain = torch.nn.Parameter(torch.tensor(gain, dtype=F64))

    def step(self, state, inp, cond):
        obs = self.gain * state + inp.act + inp.noise
        return obs, Prediction(obs, obs[:, 0], {"size": state[:, 0].abs()})

    def loss(self, segment, noise):
        return forced_mse(self, segment, noise, 1.0, ())


class Pair(Dynamics):
    """Two numbers, of which the first is seen: x' = x + v, v' = v + a. A correction leaves v."""

    spec, noise_dim = Spec(1, 1), 0

    def init(self, obs, cond):
        return {"x": obs, "v": torch.zeros_like(obs)}

    def observe(self, state, cond):
        return state["x"]

    def step(self, state, inp, cond):
        x = state["x"] + state["v"]
        return {"x": x, "v": state["v"] + inp.act}, Prediction(x, x[:, 0], {})

    def correct(self, state, obs, alpha, cond):
        return {"x": pull(state["x"], obs, alpha), "v": state["v"]}

    def loss(self, segment, noise):
        return forced_mse(self, segment, noise, 1.0, ())


def column(*values):
    return torch.tensor(values, dtype=F64)[:, None]


def series(*rows):
    """[B, T, 1]"""
    return torch.tensor(rows, dtype=F64)[..., None]


def inputs(act, noise=None):
    return StepInput(act, torch.zeros_like(act) if noise is None else noise, torch.ones_like(act))


def test_steps_and_stack_are_inverse():
    x = StepInput(torch.arange(6.0).reshape(1, 3, 2), torch.zeros(1, 3, 0), torch.ones(1, 3, 1))
    cut = steps(x)
    assert [s.act.tolist() for s in cut] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(torch.equal(a, b) for a, b in zip(stack(cut), x, strict=True))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        steps(x._replace(dt=torch.ones(1, 2, 1)))


def test_unroll_open_loop():
    state, pred = unroll(Line(2.0), column(1, -1), steps(inputs(series([1, 0, 0], [0, 0, 1]))), ())
    assert pred.obs[..., 0].tolist() == [[3, 6, 12], [-2, -4, -7]]
    assert pred.reward.tolist() == pred.obs[..., 0].tolist()
    assert pred.uncertainty["size"].tolist() == [[1, 3, 6], [1, 2, 4]]
    assert state[:, 0].tolist() == [12, -7]


@pytest.mark.parametrize(
    ("alpha", "want"),
    [(1.0, [2, 20, 40]), (0.0, [2, 4, 8]), (0.5, [2, 12, 32])],  # 2 -> 6 -> 12 -> 16 -> 32
)
def test_unroll_forced(alpha, want):
    """What is predicted is reported before it is corrected."""
    free = steps(inputs(series([0, 0, 0])))
    state, pred = unroll(Line(2.0), column(1), free, (), forced=series([10, 20, 30]), alpha=alpha)
    assert pred.obs[0, :, 0].tolist() == want
    assert state.item() == pull(column(want[-1]), column(30), alpha).item()


def test_unroll_is_forced_where_the_mask_holds():
    mask = torch.tensor([[True, False], [False, True]])
    target = series([10, torch.nan], [torch.nan, 20])
    state, pred = unroll(Line(), column(0, 0), steps(inputs(series([1, 1], [1, 1]))), (), forced=target, mask=mask)
    assert pred.obs[..., 0].tolist() == [[1, 11], [1, 2]]
    assert state[:, 0].tolist() == [11, 20]


def test_unroll_takes_a_strength_for_each_row():
    alpha, target = column(0, 1), series([10, 10], [10, 10])
    mask = torch.ones(2, 2, dtype=torch.bool)
    for how in ({}, {"mask": mask}):
        _, pred = unroll(
            Line(), column(0, 0), steps(inputs(series([1, 1], [1, 1]))), (), forced=target, alpha=alpha, **how
        )
        assert pred.obs[..., 0].tolist() == [[1, 2], [1, 11]]


def test_a_hidden_part_of_the_state_survives_a_correction():
    model = Pair()
    act = series([1, 0, 0])
    state, pred = unroll(model, model.init(column(0), ()), steps(inputs(act)), (), forced=series([5, 5, 5]))
    assert pred.obs[0, :, 0].tolist() == [0, 6, 6]
    assert (state["x"].item(), state["v"].item()) == (5, 1)


def test_unroll_draws_its_inputs_as_it_goes():
    """A generator of inputs is asked for a step's noise when the step comes."""
    log = []

    class Logging(Line):
        def step(self, state, inp, cond):
            log.append("step")
            return super().step(state, inp, cond)

    def source():
        for _ in range(2):
            log.append("noise")
            yield StepInput(column(0), column(1), column(1))

    state, _ = unroll(Logging(), column(0), source(), ())
    assert log == ["noise", "step"] * 2
    assert state.item() == 2


# ---------------------------------------------------------------- with a policy


def go(model, obs, length, terminal=lambda obs, act, after: after[:, 0] >= 3, alive=None, noise=0.0, system=NONE):
    """The policy is 1 + its noise."""
    start = model.init(column(*obs), ())
    alive = torch.ones(len(obs), dtype=torch.bool) if alive is None else alive
    extra = [(column(*[0.0] * len(obs)), column(*[noise] * len(obs))[:, : model.noise_dim]) for _ in range(length)]
    policy = lambda obs, noise: torch.ones_like(obs) + noise
    return imagine(model, policy, terminal, start, alive, extra, torch.full_like(column(*obs), 0.5), (), system)


def test_a_row_ends_with_its_terminal_transition():
    state, alive, seg, doubt = go(Line(), [0, 2, -5], 4)
    assert seg.obs[..., 0].tolist() == [[0, 1, 2, 3, 3], [2, 3, 3, 3, 3], [-5, -4, -3, -2, -1]]
    assert seg.mask.long().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert seg.terminal.long().tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert seg.reward.tolist() == [[1, 2, 3, 0], [3, 0, 0, 0], [-4, -3, -2, -1]]
    assert doubt["size"].tolist() == [[0, 1, 2, 0], [2, 0, 0, 0], [5, 4, 3, 2]]
    assert alive.tolist() == [False, False, True]
    assert state[:, 0].tolist() == [3, 3, -1]
    assert seg.dt.shape == (3, 4, 1)
    assert seg.dt.eq(0.5).all()
    assert seg.system is NONE


def test_a_row_that_is_not_finite_ends_before_it():
    class Breaking(Line):
        def step(self, state, inp, cond):
            obs, pred = super().step(state, inp, cond)
            broken = torch.where(obs > 1.5, torch.inf, obs)
            reward = torch.where((obs > -4.5) & (obs < -3.5), torch.nan, obs)[:, 0]
            return broken, pred._replace(obs=broken, reward=reward)

    state, alive, seg, doubt = go(Breaking(), [0, -5, -20], 3, terminal=lambda obs, act, after: after[:, 0] > 1)
    assert seg.mask.long().tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert not seg.terminal.any(), "a divergence is no end of the task, whatever the termination says of infinity"
    assert alive.tolist() == [False, False, True]
    assert seg.obs[..., 0].tolist() == [[0, 1, 1, 1], [-5, -5, -5, -5], [-20, -19, -18, -17]]
    assert state[:, 0].tolist() == [1, -5, -17]
    assert seg.reward.isfinite().all()
    assert doubt["size"].isfinite().all()


def test_rows_that_are_dead_at_the_start_stay_so():
    alive = torch.tensor([False, True])
    state, alive, seg, _ = go(Line(), [0, 0], 2, alive=alive)
    assert seg.mask.long().tolist() == [[0, 0], [1, 1]]
    assert alive.tolist() == [False, True]
    assert state[:, 0].tolist() == [0, 2]


def test_imagine_goes_on_where_it_left_off():
    whole_state, whole_alive, whole, _ = go(Line(), [0, 1, -9], 4)
    state, alive, first, _ = go(Line(), [0, 1, -9], 2)
    state, alive, second, _ = go(Line(), state[:, 0].tolist(), 2, alive=alive)
    assert torch.equal(torch.cat([first.mask, second.mask], 1), whole.mask)
    assert torch.equal(torch.cat([first.obs, second.obs[:, 1:]], 1), whole.obs)
    assert torch.equal(state, whole_state)
    assert torch.equal(alive, whole_alive)


def test_the_policy_sees_what_is_observed_and_the_model_its_own_noise():
    seen = []

    def policy(obs, noise):
        seen.append((obs.clone(), noise.clone()))
        return torch.zeros_like(obs)

    noise = [(column(10.0 * t), column(1.0)) for t in range(3)]
    never = lambda obs, act, after: torch.zeros(1, dtype=torch.bool)
    _, _, seg, _ = imagine(
        Line(), policy, never, column(0), torch.ones(1, dtype=torch.bool), noise, column(1), (), NONE
    )
    assert [x.item() for x, _ in seen] == [0, 1, 2]
    assert [z.item() for _, z in seen] == [0, 10, 20]
    assert seg.obs[0, :, 0].tolist() == [0, 1, 2, 3]


def test_termination_is_asked_of_the_transition():
    """(obs, act, next obs): here a row ends where the change is small, which no one of them tells."""
    small = lambda obs, act, after: (after - obs)[:, 0].abs() * act[:, 0] < 1.5
    _, _, seg, _ = go(Line(2.0), [0, 3], 2, terminal=small)  # changes: 0 + 1, 3 + 1
    assert seg.terminal.tolist() == [[True, False], [False, False]]


def test_a_tree_as_state_is_frozen_whole():
    state, _, seg, _ = go(Pair(), [2.5, 0], 3)  # v grows by 1 a step: 2.5, 3.5 ends; 0, 1, 3 ends
    assert seg.mask.long().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert state["x"][:, 0].tolist() == [3.5, 3]
    assert state["v"][:, 0].tolist() == [2, 3]


# ---------------------------------------------------------------- losses


def test_masked_mean():
    x = torch.tensor([[1.0, 3.0], [torch.nan, 7.0], [5.0, 7.0]])
    assert masked_mean(x, torch.tensor([True, False, True])).item() == 4
    assert masked_mean(x, torch.zeros(3, dtype=torch.bool)).item() == 0
    assert masked_mean(x[[0, 2]].unflatten(0, (1, 2)), torch.ones(1, 2, dtype=torch.bool)).item() == 4


def test_masked_mean_has_no_gradient_where_it_is_masked():
    x = torch.tensor([[1.0], [2.0]], requires_grad=True)
    (masked_mean(x.log(), torch.tensor([True, False])) * 3).backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [3, 0]


def window(obs, mask=None):
    seen = series(obs)
    rest = torch.zeros_like(seen[:, 1:, 0])
    on = torch.ones_like(rest, dtype=torch.bool) if mask is None else torch.tensor([mask])
    return Segment(seen, rest[..., None], rest, ~on, on, torch.ones_like(rest)[..., None], NONE)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_forced_mse_in_closed_form(alpha):
    """x' = g x against 1, 1, 1: with z_0 = 1, p_t = g z_t and z_{t+1} = (1 - alpha) p_t + alpha."""
    model, segment = Line(0.5), window([1, 1, 1])
    first = 0.5
    second = 0.5 * ((1 - alpha) * first + alpha)
    want = ((first - 1) ** 2 + (second - 1) ** 2) / 2
    loss, logs = forced_mse(model, segment, torch.zeros(1, 2, 1, dtype=F64), alpha, ())
    assert loss.item() == pytest.approx(want)
    assert logs["mse"].item() == pytest.approx(want)
    assert not logs["mse"].requires_grad
    slope = (first - 1) + (second - 1) * ((1 - alpha) * first + alpha + 0.5 * (1 - alpha))
    (grad,) = torch.autograd.grad(loss, model.gain)
    assert grad.item() == pytest.approx(slope)


def test_forced_mse_of_one_step_does_not_care_for_alpha():
    noise = torch.zeros(1, 1, 1, dtype=F64)
    losses = [forced_mse(Line(0.5), window([1, 3]), noise, a, ())[0].item() for a in (0.0, 0.5, 1.0)]
    assert losses == [6.25] * 3


def test_forced_mse_is_not_led_by_what_is_masked():
    """Beyond a masked step the roll-out is free: nothing was observed there."""
    noise = torch.zeros(1, 2, 1, dtype=F64)
    loss, _ = forced_mse(Line(0.5), window([4, 100, 2], [False, True]), noise, 1.0, ())
    assert loss.item() == (0.25 * 4 - 2) ** 2


def test_forced_mse_reads_the_noise_and_the_actions():
    segment = window([0, 0])._replace(act=series([2]))
    loss, _ = forced_mse(Line(), segment, series([1]), 1.0, ())
    assert loss.item() == 9
