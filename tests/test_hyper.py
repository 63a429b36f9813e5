"""Hypernetworks: the parametrisations, and continual training against its equations and special cases."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from mbrl.core import Spec, StepInput
from mbrl.data import Dataset
from mbrl.dynamics import hyper
from mbrl.dynamics.hyper import HyperConfig, HyperFit, errors_of, fit_hyper, identify, importance_of, infer
from mbrl.nets import apply_layers

SPEC = Spec(2, 1, 3, 4)
SMALL = HyperConfig(hidden=(12,), hyper=(9,))
FIT = HyperFit(updates=30, batch=16, lr=1e-3, lr_context=1e-2, beta=0.5)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def build(config=SMALL, spec=SPEC, seed=0):
    return config.build(spec, gen(seed)).double()


def world(gain, n=400, seed=0):
    """x' = x + 0.2 (-gain x_1, x_0) + 0.3 gain a, of standard normal states; the reward is x_0."""
    g = gen(seed)
    obs = torch.randn(n, 2, generator=g, dtype=torch.float64)
    act = torch.rand(n, 1, generator=g, dtype=torch.float64) * 2 - 1
    after = obs + 0.2 * torch.stack([-gain * obs[:, 1], obs[:, 0]], 1) + 0.3 * gain * act
    yes = torch.ones(n, dtype=torch.bool)
    return Dataset(obs, act, obs[:, 0], after, ~yes, yes, torch.tensor([0, n]), -torch.ones(1), torch.ones(1))


def segment(data, rows=slice(0, 60), system=0):
    return data.windows(1)._replace(system=torch.tensor([system])) if rows is None else cut(data, rows, system)


def cut(data, rows, system):
    whole = data.windows(1)
    *fields, _ = whole
    return type(whole)(*(x[rows] for x in fields), torch.tensor([system]))


# ---------------------------------------------------------------- what is generated


def test_the_heads_give_each_tensor_its_weights():
    """By hand, for one hidden layer: flat = relu(e W + b) H + c, cut in order into the layers."""
    model = build()
    e = model.contexts[:2]
    flat = torch.relu(e @ model.weights[0] + model.biases[0]) @ model.head + model.own
    W1, b1, W2, b2 = model.condition(e)
    assert [tuple(x.shape) for x in (W1, b1, W2, b2)] == [(2, 3, 12), (2, 1, 12), (2, 12, 3), (2, 1, 3)]
    torch.testing.assert_close(torch.cat([x.flatten(1) for x in (W1, b1, W2, b2)], 1), flat)
    assert model.size == 3 * 12 + 12 + 12 * 3 + 3


@pytest.mark.parametrize("mip", [False, True])
def test_chunks_join_to_the_same_network(mip):
    """As many chunks as the parameters need; one as large as all of them is one head with one more input."""
    model = build(HyperConfig(hidden=(12,), hyper=(9,), chunk=20, mip=mip))
    assert model.chunks.shape == (math.ceil(model.size / 20), 3)
    made = model.generate(model.contexts)
    rows = []
    for e in model.contexts:
        for c in model.chunks:
            x = torch.cat([e, c])
            if mip:
                angle = torch.sigmoid(x) * math.pi / 2
                x = torch.cat([angle.cos(), angle.sin()])
            rows.append(torch.relu(x @ model.weights[0] + model.biases[0]) @ model.head)
    flat = torch.stack(rows)
    flat = (flat if mip else flat + model.own).reshape(4, -1)[:, : model.size]
    torch.testing.assert_close(made, flat + model.own if mip else flat)


def test_the_magnitude_invariant_input_has_a_constant_norm_and_adds_to_a_network_of_its_own():
    model = build(HyperConfig(hidden=(12,), hyper=(9,), mip=True))
    seen = []
    nn.Module.__setattr__(model, "weights", nn.ParameterList([torch.eye(6, dtype=torch.float64)]))
    nn.Module.__setattr__(model, "biases", nn.ParameterList([torch.zeros(6, dtype=torch.float64)]))
    model.head = nn.Parameter(torch.eye(6, model.size, dtype=torch.float64))
    for scale in (0.0, 1.0, 100.0):
        seen.append((model.generate(scale * model.contexts) - model.own)[:, :6].square().sum(1))
    torch.testing.assert_close(
        torch.stack(seen), torch.full((3, 4), 3.0, dtype=torch.float64)
    )  # cos^2 + sin^2, 3 times
    first = model.own[: 3 * 12]
    assert 0.4 < first.var().item() / (2 / 3) < 2.0  # a network's own Kaiming weights, fan-in 3
    assert (model.own[36:48] == 0).all()


def test_a_batch_of_tasks_is_each_task_by_itself():
    model, data = build(HyperConfig(hidden=(12,), hyper=(9,), gaussian=True)), world(1.0)
    model.prepare(segment(data))
    obs, act = data.obs[:6], data.act[:6]
    inp = StepInput(act, torch.randn(6, 3, generator=gen(), dtype=torch.float64), torch.ones(6, 1))
    _, both = model.step(obs, inp, model.condition(model.contexts[:2]))
    for i, part in enumerate((slice(0, 3), slice(3, 6))):
        own = StepInput(*(x[part] for x in inp))
        _, one = model.step(obs[part], own, model.condition(model.contexts[i : i + 1]))
        torch.testing.assert_close(both.obs[part], one.obs)
        torch.testing.assert_close(both.uncertainty["aleatoric"][part], one.uncertainty["aleatoric"])


def test_without_a_context_the_first_embedding_serves():
    model = build(SMALL, Spec(2, 1))
    assert model.contexts.shape == (1, SMALL.embedding)
    assert model.context(torch.zeros(3, dtype=torch.int64)).shape == (3, 0)
    for got, want in zip(
        model.condition(torch.zeros(5, 0)), model.split(model.generate(model.contexts[:1])), strict=True
    ):
        assert torch.equal(got, want)


def test_several_systems_bring_contexts():
    model = build(SMALL, Spec(2, 1, 0, 2))
    assert model.spec == Spec(2, 1, SMALL.embedding, 2)
    assert torch.equal(model.context(torch.tensor([1, 0])), model.contexts.flip(0))
    with_its_own = model.condition(model.context(torch.tensor([1])))
    for got, want in zip(with_its_own, model.split(model.generate(model.contexts[1:])), strict=True):
        assert torch.equal(got, want)


def test_the_prediction_is_the_generated_network_in_raw_units():
    model, data = build(), world(1.0)
    model.prepare(segment(data))
    cond = model.condition(model.contexts[1:2])
    inp = StepInput(data.act[:5], torch.zeros(5, 0), torch.ones(5, 1))
    obs, pred = model.step(data.obs[:5], inp, cond)
    x = (torch.cat([data.obs[:5], data.act[:5]], 1) - model.inputs.mean) / model.inputs.std
    y = apply_layers(cond, x[None], "silu")[0] * model.targets.std + model.targets.mean
    torch.testing.assert_close(obs, data.obs[:5] + y[:, :2])
    torch.testing.assert_close(pred.reward, y[:, 2])


# ---------------------------------------------------------------- continual training


def reference(model, data, task, config, generator, importance=None):
    """The published two-stage step with torch's own Adam, one forward for each earlier task."""
    model.prepare(data.windows(1))
    theta = [p for k, p in model.named_parameters() if k != "contexts"]
    own = model.contexts.detach()[task : task + 1].clone().requires_grad_()
    slow, fast = torch.optim.Adam(theta, config.lr), torch.optim.Adam([own], config.lr_context)
    past = model.contexts.detach()[:task].clone()
    goal = [model.generate(e[None]).detach() for e in past]
    losses = []
    for _ in range(config.updates):
        pick = torch.randint(len(data), (config.batch,), generator=generator)
        loss = model.loss_of(model.generate(own), cut(data, pick, task))
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, [*theta, own])
        total = [g.clone() for g in grads[:-1]]
        if task:
            ahead = copy.deepcopy(model)
            if config.look_ahead:
                trial = torch.optim.Adam([p for k, p in ahead.named_parameters() if k != "contexts"], config.lr)
                trial.load_state_dict(copy.deepcopy(slow.state_dict()))
                for p, g in zip(trial.param_groups[0]["params"], grads, strict=False):
                    p.grad = g.clone()
                trial.step()
            moved = [p for k, p in ahead.named_parameters() if k != "contexts"]
            for j, e in enumerate(past):
                weigh = 1.0 if importance is None else importance[j]
                anchor = config.beta / task * (weigh * (goal[j] - ahead.generate(e[None])) ** 2).sum()
                for t, g in zip(total, torch.autograd.grad(anchor, moved), strict=True):
                    t.add_(g)
        for p, g in zip(theta, total, strict=True):
            p.grad = g
        own.grad = grads[-1]
        nn.utils.clip_grad_norm_(theta, config.clip)
        slow.step()
        fast.step()
    with torch.no_grad():
        model.contexts[task] = own[0]
    return losses


VARIANTS = [
    SMALL,
    HyperConfig(hidden=(12,), hyper=(9,), mip=True, chunk=20),
    HyperConfig(hidden=(12,), hyper=(9,), gaussian=True),
    HyperConfig(hidden=(12,), hyper=()),
]


@pytest.mark.parametrize("config", VARIANTS)
@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("weighed", [True, False])
def test_an_update_is_the_published_one(config, look, weighed):
    ours, theirs = build(config), build(config)
    fit = HyperFit(updates=12, batch=16, lr=1e-3, lr_context=1e-3, beta=3.0, look_ahead=look, clip=0.5)
    for task, gain in enumerate((1.0, -1.0, 0.5)):
        importance = torch.rand(task, ours.size, generator=gen(3), dtype=torch.float64) if weighed else None
        report = fit_hyper(ours, world(gain), task, fit, gen(task), importance=importance)
        losses = reference(theirs, world(gain), task, fit, gen(task), importance)
        assert report.loss[-1] == pytest.approx(losses[-1])  # a tenth of 12 updates: one or two; the last is one
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_anchors_keep_what_fine_tuning_forgets():
    """Two worlds that contradict each other: without an anchor the first is lost, with one it is kept."""
    first, second, errors = world(1.0), world(-1.0, seed=1), {}
    for beta in (0.0, 1.0):
        model = build(HyperConfig(hidden=(32,), hyper=(16,)))
        fit = HyperFit(updates=300, batch=32, lr=3e-3, lr_context=1e-2, beta=beta)
        fit_hyper(model, first, 0, fit, gen(1))
        before = errors_of(model, segment(first), model.contexts[:1]).item()
        fit_hyper(model, second, 1, fit, gen(2))
        after = errors_of(model, segment(first), model.contexts[:1]).item()
        new = errors_of(model, segment(second), model.contexts[1:2]).item()
        errors[beta] = (before, after, new)
    assert errors[1.0][1] < 2 * errors[1.0][0] < 0.2
    assert errors[1.0][2] < 0.2
    assert errors[0.0][1] > 5 * errors[1.0][1]


def test_the_first_normalisers_and_the_other_embeddings_stay():
    model = build()
    fit_hyper(model, world(1.0), 0, FIT, gen())
    mean, others = model.inputs.mean.clone(), model.contexts.detach().clone()
    wide = world(1.0)
    wide.obs.mul_(10)
    fit_hyper(model, wide, 1, FIT, gen())
    assert torch.equal(model.inputs.mean, mean)
    assert torch.equal(model.contexts[[0, 2, 3]], others[[0, 2, 3]])
    assert not torch.equal(model.contexts[1], others[1])


def test_fewer_anchors_an_update_are_those_that_are_drawn():
    """With as many as there are, nothing is drawn and nothing changes."""
    runs = []
    for past in (None, 2, 1):
        model = build()
        for task, gain in enumerate((1.0, -1.0, 0.5)):
            fit = HyperFit(updates=10, batch=16, lr=1e-2, beta=0.5, past=past)
            fit_hyper(model, world(gain), task, fit, gen(task))
        runs.append(model.head.detach())
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])


def test_a_resumed_task_gives_the_numbers_of_an_uninterrupted_one():
    def begun():
        model = build()
        fit_hyper(model, world(1.0), 0, FIT, gen())
        return model

    whole, kept = begun(), []
    keep = lambda state: kept.append({k: v.clone() for k, v in state.items()})
    report = fit_hyper(whole, world(-1.0), 1, FIT, gen(7), checkpoint=keep, every=10)
    assert [int(x["done"]) for x in kept] == [10, 20, 30]
    again, other = begun(), gen(99)
    resumed = fit_hyper(again, world(-1.0), 1, FIT, other, resume=kept[0], every=10)
    assert resumed.loss == report.loss
    assert resumed.anchor == report.anchor
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_importance_is_the_mean_square_gradient_of_what_is_generated():
    model, data = build(), world(1.0)
    model.prepare(segment(data))
    got = importance_of(model, data, 0, gen(5), batches=2, batch=8)
    total, g = 0.0, gen(5)
    for _ in range(2):
        rows = cut(data, torch.randint(len(data), (8,), generator=g), 0)
        flat = model.generate(model.contexts[:1]).detach().requires_grad_()
        total = total + torch.autograd.grad(model.loss_of(flat, rows), flat)[0][0] ** 2
    torch.testing.assert_close(got, total / total.mean())


# ---------------------------------------------------------------- tasks that are not told


def test_the_error_tells_the_task_and_gradient_descent_finds_it_again():
    model = build(HyperConfig(hidden=(32,), hyper=(16,)))
    fit = HyperFit(updates=300, batch=32, lr=3e-3, lr_context=1e-2, beta=1.0)
    for task, gain in enumerate((1.0, -1.0)):
        fit_hyper(model, world(gain), task, fit, gen(task))
    for task, gain in enumerate((1.0, -1.0)):
        new = segment(world(gain, seed=5))
        found, errors = identify(model, new, 2)
        assert found == task
        assert errors.shape == (2,)
        for i in range(2):
            alone = errors_of(model, new, model.contexts[i : i + 1])
            torch.testing.assert_close(errors[i : i + 1], alone)
        start = model.contexts.detach()[:2].mean(0, keepdim=True)
        e, error = infer(model, new, torch.cat([start, start + 0.1]), steps=100)
        assert error < 0.5 * errors_of(model, new, start)[0]
        torch.testing.assert_close(error, errors_of(model, new, e)[0])


def test_a_task_without_an_error_is_not_the_one():
    model = build()
    model.prepare(segment(world(1.0)))
    with torch.no_grad():
        model.contexts[1] = torch.nan
    found, errors = identify(model, segment(world(1.0)), 3)
    assert errors.isnan().tolist() == [False, True, False]
    assert found == (0 if errors[0] < errors[2] else 2)


def test_validate_is_the_error_of_each_system_under_its_own_network():
    model, one, two = build(), world(1.0), world(-1.0)
    model.prepare(segment(one))
    both = [torch.cat([a, b]) for a, b in zip(segment(one)[:-1], segment(two)[:-1], strict=True)]
    wide = type(segment(one))(*both, torch.tensor([0, 2]))
    want = (
        errors_of(model, segment(one), model.contexts[:1]) + errors_of(model, segment(two), model.contexts[2:3])
    ) / 2
    torch.testing.assert_close(model.validate(wide, torch.zeros(0)), want)


# ---------------------------------------------------------------- bad input


def test_what_cannot_be_done_says_why():
    model, data = build(), world(1.0)
    with pytest.raises(ValueError, match="task 4 is not one of the 4"):
        fit_hyper(model, data, 4, FIT, gen())
    with pytest.raises(ValueError, match="2 observations and 1 actions, the model 3 and 1"):
        fit_hyper(build(spec=Spec(3, 1, 3, 4)), data, 0, FIT, gen())
    with pytest.raises(ValueError, match=r"importance is \[2, 5\], expected \[1, 87\]"):
        fit_hyper(model, data, 1, FIT, gen(), importance=torch.ones(2, 5))
    for field, value in (("chunk", 0), ("embedding", 0), ("hidden", (8, 0)), ("hyper", (-1,))):
        with pytest.raises(ValueError, match=f"HyperConfig: {field} is {re.escape(str(value))}, expected"):
            HyperConfig(**{field: value}).build(SPEC)
    with pytest.raises(ValueError, match="embedding is 0, expected at least 1; chunk is 0, expected"):  # all at once
        HyperConfig(embedding=0, chunk=0).build(SPEC)
    for field, value in (
        *(("updates", -1), ("batch", 0), ("lr", float("nan")), ("lr", 0.0), ("lr_context", float("inf"))),
        *(("beta", -1.0), ("past", 0), ("clip", 0.0)),
    ):
        with pytest.raises(ValueError, match=f"HyperFit: {field} is {value}, expected"):
            fit_hyper(model, data, 0, HyperFit(**{field: value}), gen())
    kept = []
    fit_hyper(model, data, 0, FIT, gen(), checkpoint=lambda s: kept.append(dict(s)))
    with pytest.raises(ValueError, match=r"resume holds \[0, 87\] anchors, expected \[1, 87\]"):
        fit_hyper(model, data, 1, FIT, gen(), resume=kept[-1])
    with pytest.raises(ValueError, match="another model's state"):
        fit_hyper(build(HyperConfig(hidden=(12,), hyper=(5,))), data, 0, FIT, gen(), resume=kept[-1])
    data.obs[:] = torch.nan
    with pytest.raises(RuntimeError, match="the loss of task 0 is nan"):
        fit_hyper(build(), data, 0, FIT, gen())
    with pytest.raises(RuntimeError, match="diverged"):
        model.finish(torch.tensor([torch.inf]))
    assert hyper.BOUNDS[0] > hyper.BOUNDS[1]
