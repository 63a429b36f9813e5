"""Rows, groups and corrections; and what a learner inherits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbrl.core import (
    Dynamics,
    Markov,
    Prediction,
    Segment,
    Spec,
    StepInput,
    choose,
    group,
    pull,
    randn,
    repeat,
    rows,
    take,
)

NAN, INF = math.nan, math.inf


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


class Adder(Markov):
    """x' = x + gain * (a + noise): every number can be told."""

    def __init__(self, noise_dim=1):
        super().__init__()
        self.spec, self.noise_dim = Spec(1, 1), noise_dim
        self.gain = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.fixed = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def step(self, state, inp, cond):
        obs = state + self.gain * (inp.act + inp.noise.sum(-1, keepdim=True))
        return obs, Prediction(obs, inp.act[:, 0], {"size": obs[:, 0].abs()})

    def loss(self, segment, noise):
        loss = (segment.obs[:, 1:] * self.gain).square().mean()
        return loss, {"loss": loss.detach()}


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


# ---------------------------------------------------------------- pull


@pytest.mark.parametrize(
    ("x", "y", "alpha", "want"),
    [
        (1.0, 3.0, 0.0, 1.0),
        (1.0, 3.0, 1.0, 3.0),
        (1.0, 3.0, 0.25, 1.5),
        (1.0, NAN, 0.0, 1.0),  # nothing was observed
        (NAN, 3.0, 1.0, 3.0),  # the state is lost
        (INF, 3.0, 1.0, 3.0),
        (1.0, INF, 0.0, 1.0),
        (NAN, 3.0, 0.5, NAN),
        (1.0, NAN, 0.5, NAN),
    ],
)
def test_pull(x, y, alpha, want):
    for strength in (alpha, torch.tensor(alpha, dtype=torch.float64), column(alpha)):
        got = pull(column(x), column(y), strength)
        torch.testing.assert_close(got, column(want), rtol=0, atol=0, equal_nan=True)


def test_pull_takes_a_strength_for_each_row():
    got = pull(column(1, 1, 1), column(NAN, 3, 3), column(0, 1, 0.5))
    assert got[:, 0].tolist() == [1, 3, 2]


def test_pull_passes_the_gradient_to_what_it_chose():
    x, y = column(1, 1, 1).requires_grad_(), column(3, 3, 3).requires_grad_()
    pull(x, y, column(0, 0.25, 1)).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad[:, 0].tolist() == [1, 0.75, 0]
    assert y.grad[:, 0].tolist() == [0, 0.25, 1]


def test_pull_keeps_the_type():
    assert pull(torch.zeros(1), torch.ones(1), torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float32


# ---------------------------------------------------------------- rows and groups


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_group_is_contiguous_by_group(g, n, width):
    x = torch.arange(g * n * width).reshape(g * n, width)
    got = group(x, g)
    assert got.shape == (g, n, width)
    for i in range(g):
        assert torch.equal(got[i], x[i * n : (i + 1) * n])


@given(st.integers(1, 5), st.integers(1, 4))
def test_repeated_rows_are_contiguous_and_stay_in_their_group(b, n):
    x = torch.arange(b)
    tree = {"a": x[:, None], "b": (x, x.double())}
    got = repeat(tree, n)
    assert got["a"][:, 0].tolist() == [i for i in range(b) for _ in range(n)]
    assert torch.equal(group(got["b"][0], b), x[:, None].expand(b, n))
    assert got["b"][1].dtype == torch.float64


@given(st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False))
def test_take_picks_a_candidate_of_each_row(b, k, random):
    index = [random.randrange(k) for _ in range(b)]
    x = torch.arange(b * k * 2).reshape(b * k, 2)
    got = take((x, x[:, 0]), torch.tensor(index))
    want = torch.stack([x[i * k + index[i]] for i in range(b)])
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], want[:, 0])


def test_take_undoes_repeat():
    x = torch.randn(4, 3, generator=gen())
    assert torch.equal(take(repeat(x, 5), torch.tensor([0, 4, 2, 1])), x)


def test_choose_goes_row_by_row_and_keeps_nothing_of_the_other():
    mask = torch.tensor([True, False])
    new, old = (torch.tensor([1, 2]), torch.full((2, 3), NAN)), (torch.tensor([3, 4]), torch.zeros(2, 3))
    a, b = choose(mask, new, old)
    assert a.tolist() == [1, 4]
    assert b[0].isnan().all()
    assert b[1].eq(0).all()


def test_rows_of_a_tree():
    a, b = rows((torch.arange(4), torch.arange(8).reshape(4, 2)), torch.tensor([3, 1, 3]))
    assert a.tolist() == [3, 1, 3]
    assert b.tolist() == [[6, 7], [2, 3], [6, 7]]


def test_randn_has_the_model_s_type_and_the_generator_s_numbers():
    model = Adder()
    got = randn(model, 3, 2, gen(5))
    assert torch.equal(got, torch.randn(3, 2, generator=gen(5), dtype=torch.float64))
    uniform = randn(model, 3, 2, gen(5), torch.rand)
    assert torch.equal(uniform, torch.rand(3, 2, generator=gen(5), dtype=torch.float64))


# ---------------------------------------------------------------- what a learner inherits


def test_a_learner_must_say_how_it_steps_and_learns():
    class Half(Markov):
        def step(self, state, inp, cond):
            raise NotImplementedError

    with pytest.raises(TypeError, match="loss"):
        Half()


def test_a_markov_state_is_the_observation():
    model, obs = Adder(), column(1, 2)
    assert model.init(obs, ()) is obs
    assert model.observe(obs, ()) is obs
    assert model.correct(obs, column(5, 5), column(0, 1), ())[:, 0].tolist() == [1, 5]
    assert model.condition(torch.zeros(1, 0)) == ()


def test_branches_are_contiguous_by_row():
    model = Adder()
    noise = torch.tensor([[0, 1, 2], [10, 20, 30]], dtype=torch.float64)
    state, pred = model.branch(column(100, 200), StepInput(column(0.5, 0.25), noise, column(1, 1)), (), 3)
    want = [100 + 2 * (0.5 + e) for e in (0, 1, 2)] + [200 + 2 * (0.25 + e) for e in (10, 20, 30)]
    assert state[:, 0].tolist() == want
    assert pred.reward.tolist() == [0.5] * 3 + [0.25] * 3
    each = model.each(column(100, 200), StepInput(column(0.5, 0.25), noise, column(1, 1)), (), 3)
    assert torch.equal(each.obs, pred.obs[None])
    assert torch.equal(each.uncertainty["size"], pred.uncertainty["size"][None])


def test_without_noise_the_futures_of_a_row_are_one():
    class Counting(Adder):
        calls = 0

        def step(self, state, inp, cond):
            self.calls += len(state)
            return super().step(state, inp, cond)

    model = Counting(noise_dim=0)
    inp = StepInput(column(0.5, 0.25), torch.zeros(2, 0, dtype=torch.float64), column(1, 1))
    state, _ = model.branch(column(1, 2), inp, (), 3)
    assert state[:, 0].tolist() == [2, 2, 2, 2.5, 2.5, 2.5]
    assert model.calls == 2, "evaluated once for all"
    assert model.draw(2, 3, gen()).shape == (2, 0)


def test_noise_of_k_futures_of_several_columns():
    assert Adder(noise_dim=4).draw(5, 3, gen()).shape == (5, 12)


def test_hooks_of_a_learner_of_one_part():
    model = Adder()
    obs = torch.ones(2, 2, 1, dtype=torch.float64)
    like = obs[:, 1:, 0]
    segment = Segment(obs, obs[:, 1:], like, like > 2, like > 0, obs[:, 1:], torch.zeros(1, dtype=torch.int64))
    noise = torch.zeros(2, 1, 1, dtype=torch.float64)
    assert (model.parts, model.noisy_loss, model.tells_reward) == (1, True, True)
    assert model.losses(segment, noise).tolist() == [4.0]
    assert model.losses(segment, noise).requires_grad
    assert model.validate(segment, noise).tolist() == [4.0]
    assert not model.validate(segment, noise).requires_grad
    assert [p is model.gain for g in model.groups() for p in g["params"]] == [True], "what is not trained is left out"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert model.prepare(segment) is None
    assert model.finish(torch.ones(1)) is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_forward_reaches_every_method():
    model = Adder()
    assert model(lambda m, x: m.observe(x, ()), column(3)).item() == 3
    params = {"gain": torch.tensor(-1.0, dtype=torch.float64)}
    step = lambda m, x: m.step(x, StepInput(column(1), column(0), column(1)), ())[0]
    assert torch.func.functional_call(model, params, (step, column(3))).item() == 2


def test_a_learner_is_abstract_in_what_only_it_can_know():
    assert Dynamics.__abstractmethods__ == {"init", "observe", "step", "correct", "loss"}
