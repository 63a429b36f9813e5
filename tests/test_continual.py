"""Sequences of tasks: each student against its equations and special cases; resumed to the same numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mbrl import continual
from mbrl.continual import (
    Budget,
    Ewc,
    Finetune,
    Hypernetwork,
    MultiTask,
    Replay,
    Si,
    SingleTask,
    disagreement,
    errors,
    run,
    shares,
    summary,
)
from mbrl.core import Spec, StepInput
from mbrl.data import Dataset
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.heads import HeadsConfig
from mbrl.dynamics.hyper import HyperConfig, HyperFit

SPEC = Spec(2, 1)
NET = HeadsConfig(hidden=(24, 24))
QUICK = Budget(updates=150, batch=32, lr=5e-3, save_every=50)
HYPER = Hypernetwork(HyperConfig(hidden=(24, 24), hyper=(16,)), HyperFit(beta=0.5, lr_context=1e-2))
STUDENTS = {
    "hyper": HYPER,
    "hyper-weighed": Hypernetwork(HYPER.learner, HYPER.anchor, importance=True),
    "finetune": Finetune(NET),
    "single-task": SingleTask(NET),
    "multi-task": MultiTask(NET),
    "replay": Replay(NET, capacity=60),
    "ewc": Ewc(NET, 3000.0, 20),
    "si": Si(NET, 10.0),
}
GAINS = (1.0, -1.0, 2.0)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def world(gain, seed=0, episodes=8, length=40, obs_dim=2):
    """x' = 0.9 x + 0.2 (-gain x_1, x_0) + 0.4 gain a; the reward is x_0."""
    g = gen(seed)
    x = torch.randn(episodes, obs_dim, generator=g)
    obs, act, after = [], [], []
    for _ in range(length):
        a = torch.rand(episodes, 1, generator=g) * 2 - 1
        new = 0.9 * x + 0.4 * gain * a
        new[:, :2] += 0.2 * torch.stack([-gain * x[:, 1], x[:, 0]], 1)
        obs.append(x)
        act.append(a)
        after.append(new)
        x = new
    obs, act, after = (torch.stack(v, 1).flatten(0, 1) for v in (obs, act, after))
    yes = torch.ones(len(obs), dtype=torch.bool)
    starts = torch.arange(episodes + 1) * length
    return Dataset(obs, act, obs[:, 0], after, ~yes, yes, starts, -torch.ones(1), torch.ones(1))


TRAIN, TEST = [world(g) for g in GAINS], [world(g, seed=7) for g in GAINS]


def course(config, budget=QUICK, tasks=3, **kw):
    student = config.begin(SPEC, tasks, gen(1))
    return student, run(student, TRAIN[:tasks], TEST[:tasks], budget, 0, horizon=10, **kw)


# ---------------------------------------------------------------- who forgets


def test_what_is_forgotten_and_what_is_kept():
    ends = {}
    for name, config in STUDENTS.items():
        _, found = course(config)
        ends[name] = np.array(found.matrix)[-1, :, 0]
    lost = {k: x[:2].mean() for k, x in ends.items()}
    assert all(x[2] < 0.05 for k, x in ends.items() if k not in ("ewc", "si")), ends  # the last task is learned
    for keeps in ("hyper", "hyper-weighed", "single-task", "multi-task", "replay"):
        assert lost[keeps] < 0.2 * lost["finetune"], (keeps, ends)
    for holds in ("ewc", "si"):
        assert lost[holds] < 0.6 * lost["finetune"], (holds, ends)


def test_memory_is_accounted_for():
    sizes = {k: c.begin(SPEC, 3, gen()) for k, c in STUDENTS.items()}
    shared = sum(p.numel() for p in HeadsConfig((24, 24)).build(Spec(2, 1, 3, 3)).parameters())
    one = sum(p.numel() for p in HeadsConfig((24, 24)).build(Spec(2, 1, 1, 1)).parameters())
    assert sizes["finetune"].memory() == {"parameters": shared, "extra": 0, "transitions": 0}
    assert sizes["single-task"].memory()["parameters"] == 3 * one
    _, found = course(STUDENTS["replay"], Budget(updates=2, batch=8))
    assert [m["transitions"] for m in found.memory] == [60, 60, 60]
    _, found = course(STUDENTS["multi-task"], Budget(updates=2, batch=8))
    assert [m["transitions"] for m in found.memory] == [320, 640, 960]
    trunk = 3 * 24 + 24 + 24 * 24 + 24
    assert sizes["ewc"].memory()["extra"] == sizes["si"].memory()["extra"] == 2 * trunk
    whole = Ewc(HeadsConfig((24, 24), shared=True)).begin(SPEC, 3, gen()).memory()
    assert whole["extra"] == 2 * whole["parameters"]
    student, _ = course(STUDENTS["hyper-weighed"], Budget(updates=2, batch=8))
    assert student.memory()["extra"] == 3 * student.model.size


# ---------------------------------------------------------------- equations


def test_the_penalty_is_the_sum_of_each_tasks_own():
    student = Ewc(NET, strength=3.0, batches=4).begin(SPEC, 3, gen())
    kept = []
    for _ in range(2):
        stiff = {k: torch.rand(p.shape, generator=gen(len(kept))) for k, p in student.held.items()}
        kept.append((stiff, {k: p.detach().clone() for k, p in student.held.items()}))
        student._hold(stiff)
        with torch.no_grad():
            for p in student.held.values():
                p.add_(0.1)
    params = list(student.held.values())
    got = torch.autograd.grad(student._penalty(), params)
    want = 1.5 * sum((f[k] * (p - at[k]) ** 2).sum() for f, at in kept for k, p in student.held.items())
    for a, b in zip(got, torch.autograd.grad(want, params), strict=True):
        torch.testing.assert_close(a, b)


def test_the_fisher_information_is_the_mean_square_gradient():
    student = Ewc(NET, strength=0.0, batches=3).begin(SPEC, 1, gen())
    budget, g = Budget(updates=1, batch=16), gen(5)
    student.learn(0, TRAIN[0], budget, g)
    again = gen(5)
    torch.randint(320, (16,), generator=again)  # the update's own batch
    total = {k: 0.0 for k in student.held}
    for _ in range(3):
        pick = torch.randint(320, (16,), generator=again)
        segment = TRAIN[0].windows(1)
        segment = type(segment)(*(x[pick] for x in segment[:-1]), segment.system)
        grads = torch.autograd.grad(student.model.loss(segment, pick)[0], list(student.held.values()))
        total = {k: t + 16 * x**2 / 3 for (k, t), x in zip(total.items(), grads, strict=True)}
    for k, f in student.stiff.items():
        torch.testing.assert_close(f, total[k])


def test_the_importance_of_si_is_the_fall_of_the_loss_along_the_way():
    """Over one small step of a task the sum over parameters of omega is the fall of the loss, to first order."""
    student = Si(NET, damping=1e-12).begin(SPEC, 1, gen())
    student.model.prepare(TRAIN[0].windows(1))
    start = {k: p.detach().clone() for k, p in student.held.items()}
    student.learn(0, TRAIN[0], Budget(updates=1, batch=16, lr=1e-5), gen(5))
    for k, p in student.held.items():
        way = (p.detach() - start[k]).abs()
        omega = student.stiff[k] * (way**2 + 1e-12)
        assert (omega >= 0).all()
        assert (omega[way > 0] > 0).all()  # each parameter went downhill
    pulls = {k: student.stiff[k] * p.detach() for k, p in student.held.items()}
    for k, x in pulls.items():
        torch.testing.assert_close(student.pull[k], x)


@pytest.mark.parametrize("config", [Ewc(NET, 1e6, 20), Si(NET, 1e6)])
@pytest.mark.parametrize("shared", [True, False])
def test_a_head_is_held_where_all_tasks_share_it(config, shared):
    student = replace(config, learner=replace(NET, shared=shared, gaussian=True)).begin(SPEC, 2, gen(1))
    budget, g, moved = Budget(updates=30, batch=32, lr=5e-3), gen(3), {}
    student.learn(0, TRAIN[0], budget, g)
    before = {k: p.detach().clone() for k, p in student.model.named_parameters()}
    student.learn(1, TRAIN[1], budget, g)
    for k, p in student.model.named_parameters():
        moved.setdefault(k.partition(".")[0], []).append((p.detach() - before[k]).abs().mean().item())
    still = {k: max(x) < 0.01 for k, x in moved.items()}
    assert still == {"trunk": True, "heads": shared, "bounds": shared}


def test_strength_zero_is_fine_tuning():
    _, plain = course(STUDENTS["finetune"], tasks=2)
    for config in (Ewc(NET, 0.0, 5), Si(NET, 0.0)):
        _, found = course(config, tasks=2)
        np.testing.assert_allclose(found.matrix, plain.matrix, rtol=1e-5)


def test_replay_keeps_a_part_of_each_task():
    student, _ = course(Replay(NET, 30), Budget(updates=2, batch=8))
    assert {k: len(x) for k, x in student.kept.items()} == {0: 10, 1: 10, 2: 10}
    for k, x in student.kept.items():
        rows = torch.cat([TRAIN[k].obs, TRAIN[k].next_obs], 1)
        assert all(bool((rows == row[:4]).all(1).any()) for row in x)


# ---------------------------------------------------------------- judging


class Truth(torch.nn.Module):
    """The world itself, with an error added to the first dimension."""

    noise_dim = 0

    def __init__(self, gain, wrong=0.0):
        super().__init__()
        self.gain, self.wrong = gain, wrong
        self.one = torch.nn.Parameter(torch.zeros(()))

    def condition(self, ctx):
        return ()

    def init(self, obs, cond):
        return obs

    def step(self, state, inp, cond):
        from mbrl.core import Prediction

        new = 0.9 * state + 0.4 * self.gain * inp.act
        new = new + 0.2 * torch.stack([-self.gain * state[:, 1], state[:, 0]], 1)
        new = new + torch.tensor([self.wrong, 0.0])
        return new, Prediction(new, new[:, 0], {})


def test_errors_are_normalised_by_dimension():
    none = torch.zeros(1, 0)
    assert errors(Truth(1.0), none, TEST[0]) == pytest.approx((0.0, 0.0), abs=1e-10)
    one, many = errors(Truth(1.0, 0.1), none, TEST[0], horizon=1)
    change, obs = (TEST[0].next_obs - TEST[0].obs)[:, 0], TEST[0].obs[:, 0]
    assert one == pytest.approx(0.01 / change.var(correction=0).item() / 2, rel=1e-4)
    assert many == pytest.approx(0.01 / obs.var(correction=0).item() / 2, rel=1e-4)
    assert np.isnan(errors(Truth(1.0), none, TEST[0], horizon=41)[1])  # no episode is that long
    assert errors(Truth(1.0), none, TEST[0], horizon=40)[1] < 1e-10
    gap = torch.arange(len(TEST[0])) % 40 == 20  # in each episode a step without its successor
    holed = replace(TEST[0], paired=~gap, next_obs=torch.where(gap[:, None], TEST[0].obs, TEST[0].next_obs))
    assert errors(Truth(1.0), none, holed, horizon=20) == pytest.approx((0.0, 0.0), abs=1e-10)
    assert np.isnan(errors(Truth(1.0), none, holed, horizon=21)[1])  # no stretch is that long


def test_the_summary_of_a_known_matrix():
    a = np.array([[1.0, 9.0, 9.0], [2.0, 1.0, 9.0], [4.0, 3.0, 1.0]])
    found = summary(np.stack([a, a, a + 1]), alone=np.full((3, 3), 2.0))
    assert found["final"]["each"] == pytest.approx([8 / 3, 8 / 3, 11 / 3])
    assert found["final"]["median"] == pytest.approx(8 / 3)
    assert found["forgetting"]["each"] == pytest.approx([2.5, 2.5, 2.5])
    assert found["ratio"]["each"][0] == pytest.approx((4.0 * 3.0) ** 0.5)
    assert found["learned"]["each"] == pytest.approx([1.0, 1.0, 2.0])
    assert found["transfer"]["each"] == pytest.approx([0.5, 0.5, 0.0])
    assert found["final"]["low"] == pytest.approx(8 / 3)
    assert found["final"]["high"] == pytest.approx(11 / 3)


# ---------------------------------------------------------------- which contexts to look at


def test_doubt_and_uniform_share_the_steps():
    assert shares([1.0, 3.0], 100, uniform=0.0) == [25, 75]
    assert shares([1.0, 3.0], 100, uniform=1.0) == [50, 50]
    assert shares([0.0, 4.0], 100, uniform=0.5) == [25, 75]
    assert shares([0.0, 0.0, 0.0], 10) == [4, 3, 3]
    assert sum(shares(np.random.default_rng(0).random(7), 1001)) == 1001
    for bad in ([], [-1.0], [float("nan")]):
        with pytest.raises(ValueError, match="expected numbers of at least 0"):
            shares(bad, 10)


def test_an_ensemble_doubts_the_context_that_it_has_not_seen():
    model = EnsembleConfig(members=3, elites=3, hidden=(16,), weight_decay=(0.0, 0.0)).build(SPEC, gen())
    model.prepare(TRAIN[0].windows(1))
    model.finish(torch.zeros(3))
    near = disagreement(model, TRAIN[0], gen())
    far = Dataset(**{**TRAIN[0].__dict__, "obs": 5 * TRAIN[0].obs, "next_obs": TRAIN[0].next_obs + 4 * TRAIN[0].obs})
    assert disagreement(model, far, gen()) > 2 * near > 0
    pick = torch.arange(0, 320)
    said = model.each(
        TRAIN[0].obs[pick], StepInput(TRAIN[0].act[pick], torch.zeros(320, model.noise_dim), torch.ones(320, 1)), (), 1
    )
    change = (TRAIN[0].next_obs - TRAIN[0].obs).std(0, correction=0)
    assert near == pytest.approx((said.obs.std(0, correction=0) / change).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="one part"):
        disagreement(HeadsConfig((8,)).build(SPEC, gen()), TRAIN[0], gen())


# ---------------------------------------------------------------- going on


def test_a_hypernetworks_own_rate_stands_for_the_budgets():
    runs = [(HYPER, 3e-3), (replace(HYPER, lr=3e-3), 1e-3), (HYPER, 1e-3)]
    heads = [course(config, Budget(updates=3, batch=8, lr=lr), tasks=1)[0].model.head for config, lr in runs]
    assert not torch.equal(heads[1], heads[2])
    torch.testing.assert_close(heads[1], heads[0], rtol=1e-2, atol=1e-4)  # contexts keep the budget's


@pytest.mark.parametrize(("lr", "moved"), [(1e-3, 1e-2), (5e-2, 5e-2)])
def test_embeddings_learn_at_the_larger_of_the_two_rates(lr, moved):
    before = HYPER.begin(SPEC, 1, gen(1)).model.contexts.detach()
    after = course(HYPER, Budget(updates=1, batch=8, lr=lr), tasks=1)[0].model.contexts.detach()
    torch.testing.assert_close((after - before).abs(), torch.full_like(before, moved), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", STUDENTS)
def test_an_interrupted_sequence_goes_on_to_the_same_numbers(name):
    """Stopped within the second task: its student is loaded as the first task left it, and the task goes on from what
    was kept within it."""
    budget, after, within = Budget(updates=40, batch=16, lr=5e-3, save_every=10), {}, {}
    copied = lambda state: {k: v.clone() for k, v in state.items()}
    save = lambda task, state, course: after.update({task: (copied(state), course)})
    keep = lambda task, state: within.update({(task, int(state["done"])): copied(state)})
    _, whole = course(STUDENTS[name], budget, save=save, keep=keep)
    assert sorted(within) == [(t, n) for t in range(3) for n in (10, 20, 30, 40)]
    student = STUDENTS[name].begin(SPEC, 3, gen(1))
    state, so_far = after[0]
    student.load(state)
    again = run(student, TRAIN, TEST, budget, 0, horizon=10, course=so_far, resume=within[1, 20])
    assert again.matrix == whole.matrix
    assert again.memory == whole.memory


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("updates", 0), ("batch", 0), ("lr", 0.0), ("lr", float("nan")), ("lr", float("inf"))),
        *(("clip", 0.0), ("save_every", 0)),
    ],
)
def test_a_budget_that_cannot_be_is_refused_before_anything_is_learned(field, value):
    student = Finetune(NET).begin(SPEC, 1, gen())
    before = {k: v.clone() for k, v in student.state().items()}
    with pytest.raises(ValueError, match=f"budget: {field} is {value}, expected"):
        run(student, TRAIN[:1], TEST[:1], Budget(**{field: value}), 0)
    assert all(torch.equal(v, before[k]) for k, v in student.state().items())


def test_a_horizon_that_no_held_out_episode_has_is_refused_before_anything_is_learned():
    student = Finetune(NET).begin(SPEC, 2, gen())
    quick = Budget(updates=2, batch=4)
    asked = []
    for horizon in (0, -1, 31):
        with pytest.raises(ValueError, match=f"horizon is {horizon}, expected 1 to 30, .* episode of task 1 has"):
            run(student, asked.append, [TEST[0], world(-1.0, length=30)], quick, 0, horizon=horizon)
    assert asked == []
    found = run(student, TRAIN[:2], [TEST[0], world(-1.0, length=30)], quick, 0, horizon=30)
    assert np.isfinite(found.matrix).all()
    with pytest.raises(ValueError, match="horizon is 0, expected at least 1"):
        errors(Truth(1.0), torch.zeros(1, 0), TEST[0], horizon=0)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Finetune(HeadsConfig(())), r"Finetune: hidden is \(\), expected"),
        (SingleTask(HeadsConfig((8, 0))), r"hidden is \(8, 0\), expected"),
        (Replay(NET, 0), "Replay: capacity is 0, expected"),
        (Ewc(NET, -1.0), "Ewc: strength is -1.0, expected"),
        (Ewc(NET, batches=0), "Ewc: batches is 0, expected"),
        (Si(NET, float("nan")), "Si: strength is nan, expected"),
        (Si(NET, damping=0.0), "Si: damping is 0.0, expected"),
        (Hypernetwork(lr=0.0), "Hypernetwork: lr is 0.0, expected"),
        (Hypernetwork(HYPER.learner, HyperFit(past=0)), "HyperFit: past is 0, expected"),
        (Hypernetwork(HyperConfig(embedding=0)), "HyperConfig: embedding is 0, expected"),
    ],
)
def test_a_student_that_cannot_be_is_not_begun(config, says):
    with pytest.raises(ValueError, match=says):
        config.begin(SPEC, 2, gen())


def test_what_cannot_be_done_says_why():
    student = Finetune(NET).begin(SPEC, 2, gen())
    with pytest.raises(ValueError, match="task 2 is not one of the 2"):
        student.learn(2, TRAIN[0], QUICK, gen())
    with pytest.raises(ValueError, match="3 observations and 1 actions, the tasks before 2 and 1"):
        run(student, [TRAIN[0], world(1.0, obs_dim=3)], TEST[:2], QUICK, 0)
    other = Finetune(HeadsConfig((8,))).begin(SPEC, 2, gen())
    with pytest.raises(ValueError, match="of other settings"):
        other.load(student.state())
    bad = world(1.0)
    bad.next_obs[:] = torch.nan
    with pytest.raises(RuntimeError, match="loss of task 0 is nan"):
        student.learn(0, bad, Budget(updates=3, batch=4), gen())
    assert set(continual.STUDENTS) == {"hyper", "finetune", "single-task", "multi-task", "replay", "ewc", "si"}
