"""Sets of contexts, and data of all of them at once against environments that are stepped one by one."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from mbrl_envs.contexts import PHYSICS, SEQUENCES, ContextTask, collect, first_seed, tasks, varied

from mbrl.core import Spec

warnings.filterwarnings("ignore", message=".*settotalmass.*")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log where it runs


def stepped(found, data, seed, first=0):
    """The dataset's actions in the environments themselves: whatever they give must be what was collected."""
    for i, (task, d) in enumerate(zip(found, data, strict=True)):
        env: Any = task.env()
        low, high = np.float64(env.action_space.low), np.float64(env.action_space.high)
        for e in range(d.episodes):
            obs, _ = env.reset(seed=first_seed(seed, i + first, e))
            begin, end = int(d.starts[e]), int(d.starts[e + 1])
            for k in range(begin, end):
                np.testing.assert_array_equal(d.obs[k], obs.astype(np.float32))
                raw = low + (np.float64(d.act[k].numpy()) + 1) / 2 * (high - low)
                obs, reward, over, cut, _ = env.step(raw.astype(np.float32))
                np.testing.assert_array_equal(d.next_obs[k], obs.astype(np.float32))
                assert d.reward[k].item() == pytest.approx(float(reward), rel=1e-5, abs=1e-6)
                assert d.terminal[k].item() == over
                assert (over or cut) == (k == end - 1) or k == len(d) - 1
        env.close()


# ---------------------------------------------------------------- sets


SIZES = {"cheetah-body": 5, "pusher": 5, "door": 5, "cartpole-pole": 10, "reacher-links": 10}


@pytest.mark.parametrize(("name", "n"), SIZES.items())
def test_a_sequence_is_of_worlds_of_one_shape_that_differ(name, n):
    found = tasks(name)
    assert found == list(SEQUENCES[name])
    assert len({t.name for t in found}) == len({t.context for t in found}) == len(found) == n
    assert len({t.id for t in found}) == 1
    models = [t.env().unwrapped.model for t in (found[0], found[-1])]  # pyright: ignore[reportAttributeAccessIssue]
    assert any(not np.array_equal(getattr(models[0], k), getattr(models[1], k)) for k in ("body_mass", "geom_size"))
    assert found[0].reward is not None


def test_contexts_are_what_the_worlds_are_made_of():
    assert tasks("cheetah-body")[2].context == (1.0, 1.25, 1.0, 1.0)
    assert [t.context for t in tasks("pusher")][:2] == [(500.0, 500.0), (100.0, 500.0)]
    assert [t.context[0] for t in tasks("cartpole-pole")] == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]
    assert all(sum(t.context) == pytest.approx(0.2) for t in tasks("reacher-links"))
    doors = {t.name: t.context for t in tasks("door")}
    assert doors["pull"] == (1, 0, 0, 0)
    assert doors["lever-left"] == (0, 0, 1, -1)
    env: Any = tasks("pusher")[1].env(render_mode=None).unwrapped
    assert env.density == {"left": 100.0, "right": 500.0}


@pytest.mark.parametrize("what", PHYSICS)
def test_any_v5_task_under_other_physics(what):
    found = tasks(f"Hopper-v5:{what}")
    place = list(PHYSICS).index(what)
    assert [t.context[place] for t in found] == list(PHYSICS[what])
    unchanged = [v[0] for v in PHYSICS.values()]
    assert list(found[0].context) == unchanged
    assert [x for i, x in enumerate(found[3].context) if i != place] == [
        x for i, x in enumerate(unchanged) if i != place
    ]
    first = [t.env() for t in (found[0], found[3])]
    after = [(e.reset(seed=0), [e.step(np.full(3, 0.5, np.float32)) for _ in range(30)][-1][0])[1] for e in first]
    assert not np.array_equal(*after)


def test_several_quantities_vary_together():
    found = varied("Walker2d-v5", mass=(1.0, 2.0), tilt=(0.0, 0.1))
    assert [t.name for t in found] == ["mass=1,tilt=0", "mass=2,tilt=0.1"]
    assert found[1].context == (1.0, 0.1, 2.0, 1.0, 1.0, 1.0)
    assert found[1].kwargs == {"mass": 2.0, "tilt": 0.1}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tasks("cheetah"), "got the sequence 'cheetah', expected one of cheetah-body"),
        (lambda: tasks("Hopper-v4:mass"), "got the task 'Hopper-v4', expected one of Ant-v5"),
        (lambda: tasks("Hopper-v5:weight"), "got weight, expected some of gravity"),
        (lambda: varied("Hopper-v5"), "values, expected as many of each"),
        (lambda: varied("Hopper-v5", mass=(1.0,), tilt=(0.0, 1.0)), r"\{'mass': 1, 'tilt': 2\} values"),
    ],
)
def test_names_that_there_are_not(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("name", "steps", "some"),
    [
        ("cheetah-body", 30, slice(1, 4)),
        ("pusher", 130, slice(1, 3)),
        ("door", 110, slice(1, 4)),
        ("cartpole-pole", 150, slice(0, None, 8)),
        ("reacher-links", 60, slice(0, 2)),
        ("Swimmer-v5:damping", 30, slice(1, 3)),
        ("Hopper-v5:mass", 60, slice(1, 3)),
        ("InvertedPendulum-v5:gravity", 40, slice(1, 3)),
    ],
)
def test_collected_at_once_or_stepped_one_by_one(name, steps, some):
    found = tasks(name)[some]
    data = collect(found, steps, seed=3, threads=2)
    assert [len(d) for d in data] == [steps] * len(found)
    stepped(found, data, seed=3)
    again = collect(found, steps, seed=3, threads=1)
    assert [d.sha256 for d in again] == [d.sha256 for d in data]
    assert len({d.sha256 for d in data} | {d.sha256 for d in collect(found, steps, seed=4)}) == 2 * len(found)


@pytest.mark.parametrize("name", ["pusher", "reacher-links"])
def test_what_leaves_the_bounds_is_clipped(name):
    found = tasks(name)[:1]
    plan = torch.full((1, 6, 2), 3.0)
    for policy in (plan, lambda obs: plan[0, : len(obs)]):
        data = collect(found, 6, policy)
        assert torch.equal(data[0].act, torch.ones(6, 2))
        stepped(found, data, seed=0)


def act(obs):
    return (obs[:, :2].flip(-1) * 5).tanh()


@pytest.mark.parametrize("name", ["pusher", "reacher-links", "Swimmer-v5:gain"])
def test_a_policy_acts_on_what_it_sees(name):
    found = tasks(name)[1:3]
    data = collect(found, 125, act, seed=5)
    stepped(found, data, seed=5)
    for d in data:
        torch.testing.assert_close(d.act, act(d.obs), atol=1e-5, rtol=0)


def test_actions_may_be_given_and_are_those_of_every_task():
    plans = 2 * torch.rand(3, 40, 2, generator=torch.Generator().manual_seed(0)) - 1
    found = tasks("pusher")[1:3]
    data = collect(found, 100, plans)
    stepped_lengths = [d.lengths.tolist() for d in data]
    assert stepped_lengths == [[40, 40, 20]] * 2
    for d in data:
        assert torch.equal(d.act, plans.flatten(0, 1)[:100])
    own = collect(found, 100, torch.stack([plans, -plans]))
    assert torch.equal(own[0].obs, data[0].obs)
    assert torch.equal(own[1].act, -data[1].act)
    with pytest.raises(ValueError, match="3 episodes of actions do not make 130 steps"):
        collect(found, 130, plans)


def test_random_actions_fill_their_range_and_are_held():
    d = collect(tasks("pusher")[:1], 240, hold=4)[0]
    assert d.lengths.tolist() == [120, 120]
    kept = d.act.reshape(60, 4, 2)
    assert torch.equal(kept, kept[:, :1].expand(-1, 4, -1))
    assert len(kept[:, 0].unique(dim=0)) == 60
    assert kept.min() < -0.9
    assert kept.max() > 0.9


def test_a_dataset_says_where_it_is_from():
    found = tasks("door")[3:4]
    d = collect(found, 20, seed=7)[0]
    assert (d.name, d.env, d.dt) == ("round-left", "mbrl_envs/LatchDoor-v0", pytest.approx(0.1))
    assert d.meta == {"kwargs": {"handle": "round", "turn": -1}, "context": (0, 1, 0, -1), "seed": 7}
    assert d.spec == Spec(16, 5)
    assert d.act_low.tolist() == [-1.0] * 5
    assert d.paired.all()
    pendulum = collect(tasks("InvertedPendulum-v5:gain")[:1], 20)[0]
    assert pendulum.act_high.tolist() == [3.0]
    assert pendulum.act.abs().max() <= 1
    assert pendulum.terminal.any()


CALLS: list[tuple[Any, str]] = [
    (lambda f: collect([], 5), "got 0 tasks"),
    (lambda f: collect(f, 0), "steps=0"),
    (lambda f: collect(f, 5, threads=0), "threads=0"),
    (lambda f: collect(f, 5, hold=0), "hold=0"),
    (lambda f: collect([*f, *tasks("door")], 5), "BoxPusher-v0, mbrl_envs/LatchDoor-v0, whose spaces differ"),
    (lambda f: collect(f, 5, torch.zeros(1, 5, 3)), r"got actions \[1, 5, 3\], expected \[E, T, 2\] or \[5, E, T, 2\]"),
    (lambda f: collect(f, 5, torch.zeros(4, 1, 5, 2)), r"got actions \[4, 1, 5, 2\]"),
    (lambda f: collect(f, 5, torch.full((1, 5, 2), torch.nan)), "not finite"),
    (lambda f: collect(f, 5, lambda obs: obs), r"returned actions \[5, 10\], expected \[5, 2\]"),
    (lambda f: collect(f, 5, lambda obs: obs[:, :2] / 0), "action is not finite"),
]


@pytest.mark.parametrize(("call", "words"), CALLS, ids=[w for _, w in CALLS])
def test_what_cannot_be_collected_is_one_clear_error(call, words):
    with pytest.raises(ValueError, match=words):
        call(tasks("pusher"))


@pytest.mark.parametrize("policy", [None, lambda obs: torch.ones(len(obs), 6)], ids=["at once", "stepped"])
def test_a_simulation_that_diverges_is_named(policy):
    wild = ContextTask("wild", "mbrl_envs/HalfCheetahPhysics-v0", {"gain": 1e9})
    with pytest.raises(ValueError, match=r"simulation of wild .* has diverged"):
        collect([wild], 50, policy)
