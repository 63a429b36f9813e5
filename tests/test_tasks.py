"""Reward and termination against the environments' own."""

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from mbrl_envs import tasks
from torch.utils._python_dispatch import TorchDispatchMode

task: Any = tasks.task

VERSIONS = ("v4", "v5")
POSITIONS = {"exclude_current_positions_from_observation": False}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log of unstable states where it runs


def make(env_id, **kw) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gymnasium.make(env_id, disable_env_checker=True, **kw)


def raw(env, act):
    box = env.action_space
    return (box.low + (act + 1) / 2 * (box.high.astype(np.float64) - box.low)).astype(np.float64)


def row(x):
    return torch.as_tensor(np.asarray(x, dtype=np.float64))[None]


def check(env, found, obs, act):
    """One step of the environment; returns whether it ended, after comparing."""
    after, reward, terminated, truncated, _ = env.step(raw(env, act))
    args = row(obs), row(act), row(after)
    assert found.terminal(*args).dtype == torch.bool
    assert found.terminal(*args).tolist() == [terminated]
    if found.reward is not None:
        assert found.reward(*args).item() == pytest.approx(reward, abs=1e-6)
    return after, terminated, truncated


def rollouts(env, found, steps, scale=1.0):
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    ends = 0
    for t in range(steps):
        obs, terminated, truncated = check(env, found, obs, scale * rng.uniform(-1, 1, env.action_space.shape))
        ends += terminated
        if terminated or truncated:
            obs, _ = env.reset(seed=t)
    return ends


REWARDED = ("InvertedPendulum", "Reacher", "HumanoidStandup")
ENDING = ("Hopper", "Walker2d", "Ant", "Humanoid", "InvertedPendulum", "InvertedDoublePendulum")
PLAIN = ("HalfCheetah", "Swimmer", "Reacher", "HumanoidStandup")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ENDING + PLAIN)
def test_random_rollouts_agree(name, version):
    env = make(f"{name}-{version}")
    found = task(f"{name}-{version}")
    assert found.env == f"{name}-{version}"
    assert (found.reward is not None) == (name in REWARDED)
    ends = rollouts(env, found, 120 if "Humanoid" in name else 300)
    assert bool(ends) == (name in ENDING)


@pytest.mark.parametrize("name", ["Ant-v5", "Humanoid-v5", "InvertedDoublePendulum-v5"])
def test_what_the_observations_do_not_determine_is_left_to_a_learned_head(name):
    """The reward reads places that are not those of the observed state, x included: by more than rounding."""
    env = make(name, **({} if "Inverted" in name else POSITIONS))
    base, data = env.unwrapped, env.unwrapped.data
    env.reset(seed=0)
    off = []
    for _ in range(5):
        before = data.qpos[0]
        _, _, _, _, info = env.step(env.action_space.high)
        if "Inverted" in name:
            stale = data.site_xpos[0].copy()
            forward(base)
            off.append(np.abs(data.site_xpos[0] - stale).max())
        else:
            off.append(abs(info["x_velocity"] - (data.qpos[0] - before) / base.dt))
    assert max(off) > 1e-6
    assert task(name).reward is None


def forward(base):
    """The places that belong to the state, for a look; the step after it must not depend on them."""
    import mujoco

    mujoco.mj_kinematics(base.model, base.data)


def test_every_v5_task_of_gymnasium_is_known():
    ids = [k for k in gymnasium.registry if k.endswith("-v5") and "mujoco" in str(gymnasium.registry[k].entry_point)]
    assert len(ids) == 11
    assert all(task(name).env == name for name in ids)


def test_the_swing_up_ends_off_the_track_and_earns_one_at_most():
    found = task("mbrl_envs/CartPoleSwingUp-v0")
    after = torch.zeros(5, 5)
    after[:, 2] = 1
    after[:, 0] = torch.tensor([0.0, 1.2, -2.4, 2.41, torch.nan])
    after[1, 2] = 0
    args = (after, torch.zeros(5, 1), after)
    assert found.terminal(*args).tolist() == [False, False, False, True, True]
    assert found.reward(*args)[:4].tolist() == pytest.approx([1.0, 0.375, 0.0, 0.0], abs=1e-6)
    assert found.reward(after, torch.full((5, 1), 0.5), after)[0].item() == pytest.approx(1 - 0.0025)
    with pytest.raises(ValueError, match="4 wide, expected 5"):
        found.terminal(*torch.zeros(3, 2, 4))


def test_pusher_agrees():
    env = make("Pusher-v5")
    rollouts(env, task("Pusher-v5"), 150)
    obs, act, after = torch.randn(3, 5, 23).double().unbind()
    old, new = task("Pusher-v4"), task("Pusher-v5")  # v4 does not run on a current MuJoCo: it charges the state before
    torch.testing.assert_close(old.reward(obs, act, after), new.reward(after, act, obs))


@pytest.mark.parametrize(("version", "width", "forces"), [("v4", 376, 84), ("v5", 348, 78)])
def test_a_hard_impact_costs_ten_at_most(version, width, forces):
    obs = torch.zeros(2, width)
    obs[1, -forces:] = 1e4
    reward = task(f"HumanoidStandup-{version}").reward(obs, torch.zeros(2, 17), obs)
    assert reward.tolist() == [1.0, -9.0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("name", "width"), [("Hopper", 12), ("Walker2d", 18), ("HalfCheetah", 18), ("Swimmer", 10)])
def test_an_observed_position_determines_the_reward(name, width, version):
    env = make(f"{name}-{version}", **POSITIONS)
    found = task(f"{name}-{version}", obs=width)
    assert found.reward is not None
    ends = rollouts(env, found, 200)
    assert bool(ends) == (name in ENDING)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["Ant", "Humanoid"])
def test_leading_positions_are_skipped(name, version):
    env = make(f"{name}-{version}", **POSITIONS)
    found = task(f"{name}-{version}", obs=env.observation_space.shape[0])
    assert found.reward is None
    rollouts(env, found, 60)


def healthy(env, found, qpos, qvel=None):
    """Compare on a state set by hand; no physics in between, so that limits are met to the last bit."""
    base = env.unwrapped
    base.set_state(qpos, np.zeros(base.model.nv) if qvel is None else qvel)
    obs = row(base._get_obs())
    end = found.terminal(obs, torch.zeros(1, base.model.nu), obs).item()
    assert end == (not base.is_healthy), qpos
    return end


def around(limit):
    return np.concatenate(
        [[limit], limit + np.array([1e-9, 1e-3, 0.02, 0.1, 5.0]), limit - np.array([1e-9, 1e-3, 0.02])]
    )


LIMITS = {
    "Hopper": {1: (0.7, 100.0), 2: (-0.2, 0.2), 3: (-100.0, 100.0), 4: (-100.0, 100.0), 5: (-100.0, 100.0)},
    "Walker2d": {1: (0.8, 2.0), 2: (-1.0, 1.0), 3: (100.0,)},
    "Ant": {2: (0.2, 1.0), 7: (100.0,)},
    "Humanoid": {2: (1.0, 2.0), 7: (100.0,)},
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_from_both_sides(name, version):
    env = make(f"{name}-{version}")
    env.reset(seed=0)
    found = task(f"{name}-{version}")
    base = env.unwrapped.init_qpos.copy()
    base[{"Hopper": 1, "Walker2d": 1}.get(name, 2)] = {"Ant": 0.5, "Humanoid": 1.4}.get(name, 1.25)
    assert not healthy(env, found, base)
    for index, limits in LIMITS[name].items():
        ends = set()
        for limit in limits:
            for value in around(limit):
                qpos = base.copy()
                qpos[index] = value
                ends.add(healthy(env, found, qpos))
        is_limit = not (index in (3, 7) and name != "Hopper")
        assert ends == ({True, False} if is_limit else {False})


def test_hopper_has_no_ceiling():
    env = make("Hopper-v5")
    env.reset(seed=0)
    qpos = np.array([0.0, 150.0, 0.0, 0.0, 0.0, 0.0])
    assert not healthy(env, task("Hopper-v5"), qpos)
    qpos[:2] = -500, 1.25  # x is no part of it
    assert not healthy(env, task("Hopper-v5"), qpos)


def test_a_velocity_beyond_the_observed_range_cannot_be_seen():
    env = make("Hopper-v5")
    env.reset(seed=0)
    base = env.unwrapped
    base.set_state(base.init_qpos, np.full(6, 150.0))
    obs = row(base._get_obs())
    assert not base.is_healthy
    assert obs[0, 5:].tolist() == [10.0] * 6
    assert not task("Hopper-v5").terminal(obs, torch.zeros(1, 3), obs).item()
    obs[0, 7] = 150.0  # a learner that predicts such a velocity has left the task
    assert task("Hopper-v5").terminal(obs, torch.zeros(1, 3), obs).item()


@pytest.mark.parametrize("version", VERSIONS)
def test_inverted_pendulum_limits(version):
    env, found = make(f"InvertedPendulum-{version}"), task(f"InvertedPendulum-{version}")
    env.reset(seed=0)
    ends = []
    for angle in np.linspace(-0.25, 0.25, 101):
        env.reset(seed=0)
        env.unwrapped.set_state(np.array([0.1, angle]), np.zeros(2))
        ends.append(check(env, found, env.unwrapped._get_obs(), np.zeros(1))[1])
    assert 60 < ends.count(False) < 90


@pytest.mark.parametrize("version", VERSIONS)
def test_double_pendulum_limit(version):
    env, found = make(f"InvertedDoublePendulum-{version}"), task(f"InvertedDoublePendulum-{version}")
    ends = []
    for first in np.linspace(-0.9, 0.9, 25):
        for second in np.linspace(-1.2, 1.2, 25):
            env.reset(seed=0)
            env.unwrapped.set_state(np.array([0.3, first, second]), np.zeros(3))
            obs, _, terminated, _, _ = env.step(np.zeros(1))
            if abs(env.unwrapped.data.site_xpos[0][2] - 1) > 1e-4:
                assert found.terminal(row(obs), torch.zeros(1, 1), row(obs)).item() == terminated
                ends.append(terminated)
    assert 100 < sum(ends) < 500
    assert len(ends) > 620


@pytest.mark.parametrize("name", ["Hopper-v5", "Walker2d-v4", "Humanoid-v5", "Ant-v4", "InvertedPendulum-v5"])
def test_what_is_not_finite_ends(name):
    width = make(name).observation_space.shape[0]
    obs = torch.full((1, width), float("nan"))
    assert task(name).terminal(obs, obs, obs).item()


def test_ant_ends_where_anything_is_not_finite():
    obs = torch.full((3, 27), 0.5)
    obs[1, 9], obs[2, 26] = float("inf"), float("nan")
    assert task("Ant-v4").terminal(obs, obs, obs).tolist() == [False, True, True]


def test_pendulum_agrees():
    env = make("Pendulum-v1")
    found = task("Pendulum-v1")
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(300):
        env.unwrapped.state = rng.uniform([-9, -8], [9, 8])
        angle, speed = env.unwrapped.state
        obs = [np.cos(angle), np.sin(angle), speed]  # the state before the step, unrounded
        act = rng.uniform(-1, 1, 1)
        after, reward, *_ = env.step(2 * act)
        assert found.reward(row(obs), row(act), row(after)).item() == pytest.approx(reward, abs=1e-9)
        assert not found.terminal(row(obs), row(act), row(after)).item()


def test_d4rls_pen_is_dropped_below_its_height():
    obs = torch.zeros(3, 45)
    obs[:, 26] = torch.tensor([0.0749, 0.0751, 0.2])
    for name in ("pen-human-v1", "D4RL/pen-cloned-v0", "mbrl_envs.d4rl:D4RL/pen-expert-v1"):
        assert task(name).terminal(obs, obs, obs).tolist() == [True, False, False]
        with pytest.raises(ValueError, match="39 wide, expected 45"):
            task(name, obs=39)


@pytest.mark.parametrize(
    "name",
    [
        "door-human-v1",
        "D4RL/hammer/expert-v2",
        "relocate-cloned-v0",
        "AdroitHandRelocate-v1",
        "AdroitHandPen-v1",
        "D4RL/pen/cloned-v2",
        "minari:D4RL/pen/human-v2",
        "minari:pen-expert-v1",
        "kitchen-mixed-v0",
        "FrankaKitchen-v1",
        "maze2d-large-v1",
        "PointMaze_Open-v3",
    ],
)
def test_tasks_that_never_end(name):
    obs = torch.full((4, 45), -1e3)
    found = task(name)
    assert found.reward is None
    assert found.terminal(obs, obs, obs).tolist() == [False] * 4


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("hopper-medium-v2", "Hopper-v4"),
        ("halfcheetah-random-v0", "HalfCheetah-v4"),
        ("mujoco/walker2d/medium-v0", "Walker2d-v5"),
        ("minari:mujoco/humanoidstandup/expert-v0", "HumanoidStandup-v5"),
        ("Hopper-v3", "Hopper-v4"),
        ("hopper-medium-v5", "Hopper-v5"),
        ("Pendulum-v1", "Pendulum-v1"),
        ("ant-medium-replay-v2", "Ant-v4"),
        ("walker2d-random-expert-v0", "Walker2d-v4"),
        ("Hopper-v3-medium-1000-train-noise", "Hopper-v4"),
        ("D4RL/kitchen/complete-v2", "FrankaKitchen-v1"),
        ("AdroitHandPenSparse-v1", "AdroitHandPen-v1"),
        ("pen-human-v1", "mbrl_envs.d4rl:D4RL/pen-expert-v1"),
        ("PointMaze_Medium_Diverse_GDense-v3", ""),
        ('Pendulum-v1{"max_episode_steps": 50}', "Pendulum-v1"),
        ('mbrl_envs:mbrl_envs/BoxPusher-v0{"max_episode_steps": 50}', "mbrl_envs/BoxPusher-v0"),
    ],
)
def test_ids(name, env):
    assert task(name).env == env


@pytest.mark.parametrize(
    "name",
    [
        "CartPole-v1",
        "D4RL/minigrid/fourrooms-v0",
        "mine/Hopper-v5",
        "",
        "/",
        "FetchReach-v3",
        'Pendulum-v1{"g": 1.6}',
        'Pendulum-v1{"g": 1.6, "max_episode_steps": 50}',
    ],
)
def test_unknown_ids(name):
    assert task(name) is None


def test_arguments_that_are_no_json_are_an_error():
    with pytest.raises(ValueError, match="its arguments are no JSON"):
        task("Pendulum-v1{g: 1.6}")


@pytest.mark.parametrize(
    "name",
    [
        "Pendulum-Sparse-v0",
        "PendulumSparse-v0",
        "my_envs:Reacher-Hard-v0",
        "Ant-Dir-v0",
        "Hopper-Medium-v0",
        "hopper-heavy-v0",
        "Hopper_Heavy-v5",
        "Hopper-v3-Heavy",
        "mbrl_envs/Pendulum-Sparse-v0",
        "Door-v0",
        "Pen-v1",
    ],
)
def test_a_variant_is_not_taken_for_the_task_whose_name_it_begins_with(name):
    assert task(name) is None


def test_widths_are_checked():
    obs = torch.zeros(2, 13)
    with pytest.raises(ValueError, match="13 wide, expected 11 or 12"):
        task("Hopper-v5").terminal(obs, obs, obs)
    with pytest.raises(ValueError, match="13 wide"):
        task("Hopper-v5", obs=13)
    with pytest.raises(ValueError, match="begin with x"):
        task("Hopper-v5", obs=12).reward(*torch.zeros(3, 2, 11))


def test_leading_axes_are_kept():
    obs = torch.zeros(4, 3, 11)
    obs[..., 0] = 1
    obs[1, 2, 0] = 0.5
    end = task("Hopper-v5").terminal(obs, obs, obs)
    assert end.shape == (4, 3)
    assert end.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("name", ["NeoRL/Hopper-v3", "mbrl_envs.scores:NeoRL/Hopper-v3"])
def test_neorl_s_observations_begin_with_x(name):
    """Its ids name the module that registers them, its termination is Hopper's, and x makes the reward known."""
    found = tasks.task(name, 12)
    assert found is not None
    assert found.reward is not None
    state = torch.tensor([[5.0, 1.2, 0.1, *[0.0] * 9], [5.0, 0.5, 0.1, *[0.0] * 9]])
    assert found.terminal(state, torch.zeros(2, 3), state).tolist() == [False, True]


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "AntMaze_UMaze-v4"])
def test_an_end_that_observations_do_not_tell_is_left_to_a_learned_head(name):
    assert tasks.task(name) is None


class Copies(TorchDispatchMode):
    """Counts the copies to another device or type."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "obs", "act"), [("mbrl_envs/BoxPusher-v0", 10, 2), ("mbrl_envs/LatchDoor-v0", 16, 5)])
def test_what_a_plan_earns_is_told_without_the_host(name, obs, act):
    """A copy from there while a plan is captured as a graph would be an error."""
    found, rows = task(name), (torch.zeros(3, obs), torch.zeros(3, act), torch.ones(3, obs))
    first = found.reward(*rows)
    with Copies() as copies:
        assert torch.equal(found.reward(*rows), first)
        found.terminal(*rows)
    assert copies.count == 0
