"""Robots against gymnasium's, closed forms and what their mechanisms must do."""

import math
import pickle
import subprocess
import sys
import warnings
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from mbrl_envs import robots, tasks
from mbrl_envs.control import TrueCartPole
from mbrl_envs.evaluate import EnvError, make
from mbrl_envs.simulator import Simulator

from mbrl.core import StepInput

IDS = sorted(x for x in gym.registry if x.startswith("mbrl_envs/"))
DENSITIES = [(500.0, 500.0), (100.0, 500.0), (500.0, 100.0), (500.0, 250.0), (250.0, 500.0)]
HANDLES = [("pull", 1), ("round", 1), ("lever", 1), ("round", -1), ("lever", -1)]
warnings.filterwarnings("ignore", message=".*settotalmass.*")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log where it runs


def made(name, **kw) -> Any:
    return make(f"mbrl_envs/{name}-v0", **kw)


def actions(env, n, seed=0):
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(n)]


def row(x):
    return torch.as_tensor(np.asarray(x, dtype=np.float64))[None]


# ---------------------------------------------------------------- as environments


def test_importing_the_package_registers_them():
    code = "import gymnasium as g; print(*g.make('mbrl_envs:mbrl_envs/LatchDoor-v0').reset(seed=0)[0].shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "16"
    assert len(IDS) == 6 + 11


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [x for x in IDS if "Humanoid" not in x])
def test_gymnasiums_checker_passes(name):
    env: Any = make(name)
    check_env(env.unwrapped, skip_render_check=True)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert env.observation_space.contains(env.step(env.action_space.sample())[0])
    assert env.spec.max_episode_steps in (50, 100, 120, 200, 250, 1000)


ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("HalfCheetahBody", {"foot": 1.25}),
    ("ReacherLinks", {"first": 0.07, "second": 0.13}),
    ("CartPoleLength", {"length": 0.4}),
    ("BoxPusher", {"left": 100.0}),
    ("LatchDoor", {"handle": "lever", "turn": -1}),
    ("HopperPhysics", {"mass": 1.5}),
    ("SwimmerPhysics", {"damping": 2.0}),
    ("Walker2dPhysics", {"tilt": 0.1}),
    ("HalfCheetahPhysics", {"gain": 0.5}),
    ("InvertedPendulumPhysics", {"gravity": 2.0}),
    ("PusherPhysics", {"damping": 2.0}),
    ("ReacherPhysics", {"damping": 2.0}),
    ("HumanoidStandupPhysics", {"mass": 0.5}),
]


@pytest.mark.parametrize(("name", "kw"), ARGUMENTS, ids=[n for n, _ in ARGUMENTS])
def test_the_torch_functions_are_the_environments(name, kw):
    env = made(name, **kw)
    found = tasks.known(f"mbrl_envs/{name}-v0")
    assert found.env == f"mbrl_envs/{name}-v0"
    assert found.reward is not None
    obs, _ = env.reset(seed=0)
    before, acts, after, rewards, ends = [], [], [], [], []
    for t, raw in enumerate(actions(env, 90)):
        next_obs, reward, end, cut, _ = env.step(raw)
        box = env.action_space
        act = 2 * (raw.astype(np.float64) - box.low) / (np.float64(box.high) - box.low) - 1
        for out, x in zip((before, acts, after, rewards, ends), (obs, act, next_obs, reward, end), strict=True):
            out.append(x)
        obs = env.reset(seed=t)[0] if end or cut else next_obs
    args = [torch.from_numpy(np.stack(x)) for x in (before, acts, after)]
    np.testing.assert_allclose(found.reward(*args), rewards, atol=1e-6, rtol=0)
    assert found.terminal(*args).tolist() == ends
    assert any(ends) == (name in ("HopperPhysics", "Walker2dPhysics", "InvertedPendulumPhysics"))
    single = [x.float() for x in args]
    assert found.reward(*single).dtype == torch.float32


def test_what_is_not_observed_has_no_reward_and_other_widths_are_refused():
    for name in ("Ant", "Humanoid", "InvertedDoublePendulum"):
        assert tasks.known(f"mbrl_envs/{name}Physics-v0").reward is None
    for name, width in (("BoxPusher", 10), ("LatchDoor", 16), ("HalfCheetahBody", 18), ("HopperPhysics", 12)):
        found: Any = tasks.known(f"mbrl_envs/{name}-v0")
        bad = torch.zeros(2, width + 1)
        for f in (found.reward, found.terminal):
            with pytest.raises(ValueError, match=f"{width + 1} wide, expected {width}"):
                f(bad, torch.zeros(2, 1), bad)


@pytest.mark.parametrize(("name", "kw"), ARGUMENTS[:5], ids=[n for n, _ in ARGUMENTS[:5]])
def test_a_copy_through_pickle_has_the_same_body(name, kw):
    env = made(name, **kw).unwrapped
    other = pickle.loads(pickle.dumps(env))
    act = actions(env, 1)[0]
    seen = [(x.reset(seed=3)[0], x.step(act)[0]) for x in (env, other)]
    np.testing.assert_array_equal(seen[0], seen[1])


@pytest.mark.parametrize("name", ["CartPoleLength", "BoxPusher", "LatchDoor"])
def test_actions_beyond_their_bounds_are_the_bounds(name):
    env = made(name)
    width = env.action_space.shape[0]
    seen = []
    for size in (1.0, 3.0):
        env.reset(seed=0)
        seen.append(env.step(np.full(width, size)))
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("HalfCheetahBody", {"leg": 0.0}, "leg=0.0"),
    ("ReacherLinks", {"second": -0.1}, "second=-0.1"),
    ("CartPoleLength", {"length": math.inf}, "length=inf"),
    ("BoxPusher", {"right": -1.0}, "right=-1.0"),
    ("BoxPusher", {"noise": -1.0}, "noise=-1.0"),
    ("LatchDoor", {"handle": "flat"}, "handle='flat'.*pull, round, lever"),
    ("LatchDoor", {"handle": "round", "turn": 2}, "turn=2"),
    ("HopperPhysics", {"friction": -1.0}, "friction=-1.0"),
    ("HopperPhysics", {"mass": 0.0}, "mass=0.0"),
    ("HopperPhysics", {"tilt": math.nan}, "tilt=nan"),
    ("HopperPhysics", {"task": "Hopper-v4"}, "'Hopper-v4'"),
    ("HopperPhysics", {"task": "CartPole-v1"}, "'CartPole-v1'"),
]


@pytest.mark.parametrize(("name", "kw", "words"), BAD, ids=[w for _, _, w in BAD])
def test_bad_arguments_are_one_clear_error(name, kw, words):
    with pytest.raises(EnvError, match=words):
        made(name, **kw)


# ---------------------------------------------------------------- gymnasium's robots, changed


def test_unchanged_they_are_gymnasiums():
    for ours, theirs in (
        ("HalfCheetahBody", "HalfCheetah-v5"),
        ("ReacherLinks", "Reacher-v5"),
        ("HopperPhysics", "Hopper-v5"),
        ("PusherPhysics", "Pusher-v5"),
    ):
        env, want = made(ours), make(theirs)
        lead = int(isinstance(env.observation_space.sample(), np.ndarray) and "Speed" in str(env))
        np.testing.assert_array_equal(env.reset(seed=1)[0][lead:], want.reset(seed=1)[0])
        for act in actions(want, 30):
            a, b = env.step(act), want.step(act)
            np.testing.assert_array_equal(a[0][lead:], b[0])
            assert a[1:4] == b[1:4]
            if lead:
                assert a[0][0] == b[4]["x_velocity"]
        assert lead == (ours in ("HalfCheetahBody", "HopperPhysics"))


def volume(radius, half):
    return math.pi * radius**2 * 2 * half + 4 / 3 * math.pi * radius**3


@pytest.mark.parametrize("part", robots.HalfCheetahBody.PARTS)
def test_a_larger_part_takes_its_share_of_the_same_mass(part):
    base, large = (made("HalfCheetahBody", **kw).unwrapped.model for kw in ({}, {part: 1.25}))
    geoms = robots.HalfCheetahBody.PARTS[part]
    for i in range(base.ngeom):
        factor = 1.25 if base.geom(i).name in geoms else 1.0
        np.testing.assert_allclose(large.geom_size[i, :2], factor * base.geom_size[i, :2], rtol=1e-12)
    np.testing.assert_array_equal(large.body_pos, base.body_pos)  # joints stay
    assert large.body_mass.sum() == pytest.approx(14)
    whole = sum(volume(*large.geom_size[i, :2]) for i in range(1, large.ngeom))
    for name in geoms:
        body = large.geom(name).bodyid[0]
        own = sum(volume(*large.geom_size[i, :2]) for i in range(large.ngeom) if large.geom_bodyid[i] == body)
        assert large.body_mass[body] == pytest.approx(14 * own / whole)
    middle = lambda m: np.stack([m.geom(g).pos for g in geoms])
    np.testing.assert_allclose(middle(large), middle(base), atol=1e-12)


@pytest.mark.parametrize(("first", "second"), [(0.06, 0.14), (0.15, 0.05)])
def test_the_reachers_fingertip_is_at_the_end_of_its_links(first, second):
    env = made("ReacherLinks", first=first, second=second)
    obs, _ = env.reset(seed=2)
    a, b = np.arctan2(obs[2:4], obs[:2])
    tip = first * np.array([math.cos(a), math.sin(a)]) + (second + 0.01) * np.array([math.cos(a + b), math.sin(a + b)])
    np.testing.assert_allclose(obs[8:] + obs[4:6], tip, atol=1e-12)
    model = env.unwrapped.model
    assert model.geom("link0").size[1] == pytest.approx(first / 2)
    assert model.geom("link1").size[1] == pytest.approx(second / 2)


def test_a_mass_factor_is_what_the_compiler_would_make_of_it():
    path = robots.HalfCheetahEnv().fullpath
    spec = mujoco.MjSpec.from_file(path)
    spec.compiler.settotalmass = 28
    want = spec.compile()
    got = robots.physics("HalfCheetah-v5", mass=2.0).unwrapped.model  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("body_mass", "body_inertia", "body_subtreemass", "body_invweight0", "dof_invweight0", "dof_M0"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-9, atol=1e-12, err_msg=name)


def test_each_factor_changes_what_it_names():
    base = make("Hopper-v5").unwrapped.model  # pyright: ignore[reportAttributeAccessIssue]
    model = lambda **kw: made("HopperPhysics", **kw).unwrapped.model
    np.testing.assert_allclose(model(gravity=0.5).opt.gravity, [0, 0, -4.905])
    np.testing.assert_allclose(
        model(tilt=0.3, gravity=2.0).opt.gravity, 19.62 * np.array([math.sin(0.3), 0, -math.cos(0.3)])
    )
    np.testing.assert_allclose(model(friction=0.5).geom_friction, base.geom_friction * [0.5, 1, 1])
    np.testing.assert_allclose(model(damping=3.0).dof_damping, 3 * base.dof_damping)
    np.testing.assert_allclose(model(gain=2.0).actuator_gainprm[:, 0], 2 * base.actuator_gainprm[:, 0])
    env, twice = made("HopperPhysics"), made("HopperPhysics", gain=2.0)
    for x, act in ((env, 1.0), (twice, 0.5)):
        x.reset(seed=0)
        x.last = x.step(np.full(3, act, np.float32))[0]
    np.testing.assert_allclose(env.last, twice.last, rtol=1e-12)


def test_a_changed_robot_is_planned_with_in_the_true_simulator():
    worth = []
    for name, kw in (
        ("HalfCheetahBody", {"torso": 1.25}),
        ("HalfCheetahPhysics", {"tilt": 0.3}),
        ("ReacherLinks", {"first": 0.15, "second": 0.05}),
    ):
        env = made(name, **kw)
        env.reset(seed=0)
        width = env.action_space.shape[0]
        acts = 2 * torch.rand(3, 6, width, generator=torch.Generator().manual_seed(0)) - 1
        found = Simulator(env, threads=1).rollout(acts).reward
        for plan, got in zip(acts, found, strict=True):
            env.reset(seed=0)
            np.testing.assert_allclose(got, [env.step(a)[1] for a in plan.numpy()], atol=1e-9)
        worth.append(found.sum())
    assert worth[0] != worth[1]


# ---------------------------------------------------------------- cart-pole


def test_a_pole_of_a_metre_moves_by_the_equations():
    env, truth = made("CartPoleLength"), TrueCartPole().double()
    obs, _ = env.reset(seed=0)
    for act in actions(env, 60):
        want = row(obs)
        inp = StepInput(row(act), torch.zeros(1, 0), torch.ones(1, 1))
        for _ in range(2):
            want, pred = truth.step(want, inp, ())
        obs, reward, end, _, _ = env.step(act)
        np.testing.assert_allclose(obs, want[0], atol=1e-9)
        assert reward == pytest.approx(pred.reward.item(), abs=1e-9)
        assert end == (abs(obs[0]) > 2.4)


@pytest.mark.parametrize("length", [0.4, 1.3])
def test_a_pole_of_another_length_swings_at_its_frequency(length):
    env = made("CartPoleLength", length=length).unwrapped
    mass, half = 0.1 * length, length / 2
    np.testing.assert_allclose(env.model.body_mass[1:], [1.0, mass])
    env.set_state(np.array([0, math.pi + 1e-4]), np.zeros(2))
    want = 9.8 * half * mass / (4 / 3 * mass * half**2 - (mass * half) ** 2 / (1 + mass))
    assert -env.data.qacc[1] / 1e-4 == pytest.approx(want, rel=1e-5)
    obs, _ = env.reset(seed=0)
    assert np.abs(obs[[0, 1, 4]]).max() < 0.05
    assert obs[2] < -0.99


# ---------------------------------------------------------------- pusher


def turned(obs):
    """Yaw in degrees, of the corners."""
    side = obs[6:8] - obs[2:4]
    return math.degrees(math.atan2(side[1], side[0]))


def pushed(left, right, steps=10):
    env = made("BoxPusher", left=left, right=right, noise=0.0)
    obs, _ = env.reset(seed=0)
    for _ in range(steps):
        obs = env.step(np.array([1.0, 0.0], np.float32))[0]
    return env, obs


def test_the_box_turns_towards_its_heavier_half():
    yaw = [turned(pushed(*pair)[1]) for pair in DENSITIES]
    assert yaw[0] == pytest.approx(0, abs=1e-3)
    assert yaw[2] == pytest.approx(-yaw[1], abs=0.01)
    assert yaw[4] == pytest.approx(-yaw[3], abs=0.01)
    assert yaw[1] == pytest.approx(-38, abs=4)
    assert yaw[3] == pytest.approx(20, abs=3)


def test_the_boxs_mass_and_centre_are_those_of_its_halves():
    for left, right in DENSITIES:
        model = made("BoxPusher", left=left, right=right).unwrapped.model
        body, half = model.body("box").id, 0.16 * 0.08 * 0.08
        assert model.body_mass[body] == pytest.approx((left + right) * half)
        np.testing.assert_allclose(model.body_ipos[body], [0, 0.04 * (left - right) / (left + right), 0], atol=1e-12)


def test_corners_and_finger_are_seen_where_they_are():
    env, obs = pushed(100.0, 500.0)
    model, data = env.unwrapped.model, env.unwrapped.data
    mujoco.mj_forward(model, data)
    box, finger = data.body("box"), data.body("finger")
    corners = [box.xpos + box.xmat.reshape(3, 3) @ [i * 0.08, j * 0.08, 0] for i in (-1, 1) for j in (-1, 1)]
    np.testing.assert_allclose(obs[2:].reshape(4, 2), np.stack(corners)[:, :2], atol=1e-12)
    np.testing.assert_allclose(obs[:2], (box.xpos - finger.xpos)[:2], atol=1e-12)


def test_a_box_that_is_not_pushed_stays_and_the_servo_leads_the_finger():
    env = made("BoxPusher", left=100.0, noise=0.0)
    first, _ = env.reset(seed=0)
    for t in range(20):
        obs = env.step(np.array([0.0, 1.0 if t < 5 else 0.0], np.float32))[0]
    np.testing.assert_allclose(obs[2:], first[2:], atol=1e-4)
    np.testing.assert_allclose(first[:2] - obs[:2], [0, 5 * 0.03], atol=8e-3)


def test_a_box_at_the_goal_earns_four():
    found: Any = tasks.known("mbrl_envs/BoxPusher-v0")
    obs = torch.tensor([[0.0, 0, 0.07, -0.08, 0.07, 0.08, 0.23, -0.08, 0.23, 0.08]]).repeat(3, 1)
    obs[1, 2:] += torch.tensor([0.03, 0.04]).repeat(4)
    act = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.6, 0.8]])
    want = [4.0, 4 * (1 - math.tanh(0.5)), 3.75]
    torch.testing.assert_close(found.reward(obs, act, obs).tolist(), want)


# ---------------------------------------------------------------- door


def grasped(env, turn, steps=45):
    """Take the handle, turn it (or not, at 0), then pull. Returns the observations [steps + 1, 16], the last info."""
    arm, info = env.unwrapped.arm, {}
    path = [env.reset(seed=0)[0]]
    for t in range(steps):
        obs, act = path[-1], np.zeros(5)
        aim = obs[:3].copy()
        if 8 <= t < 24 and turn:  # the hand leads the lever along its arc
            ahead = obs[6] + 0.5 * turn
            aim[1:] += arm * np.array([math.cos(obs[6]) - math.cos(ahead), math.sin(obs[6]) - math.sin(ahead)])
            act[3] = (1.2 * turn - obs[3]) / 0.3
        act[:3] = aim / 0.03
        act[4] = float(t >= 5)
        if t >= 24:
            act[0] = -0.7
        obs, *_, info = env.step(act.clip(-1, 1))
        path.append(obs)
    return np.stack(path), info


@pytest.mark.parametrize(("handle", "turn"), HANDLES)
def test_the_latch_holds_until_the_knob_turns(handle, turn):
    env = made("LatchDoor", handle=handle, turn=turn, noise=0.0)
    path, info = grasped(env, turn if handle != "pull" else 0)
    assert path[:, 7].max() > 0.3
    assert info["success"] == (path[-1, 7] >= 0.2)
    if handle == "pull":
        assert np.abs(path[:, 6]).max() < 0.05
        return
    opened = int((path[:, 7] > 0.05).argmax())
    assert turn * path[:opened, 6].max() > 0 if turn > 0 else path[:opened, 6].min() < 0
    assert np.abs(path[: opened + 1, 6]).max() > 0.5
    for wrong in (0, -turn):
        path, info = grasped(env, wrong)
        assert path[:, 7].max() < 0.03, wrong
        assert not info["success"]
        assert np.abs(path[:, 6]).max() < 0.5


def test_the_knob_draws_the_bolt_and_springs_back():
    env = made("LatchDoor", handle="round", turn=-1, noise=0.0).unwrapped
    env.reset(seed=0)
    qpos = env.data.qpos.copy()
    qpos[1], qpos[2] = -1.0, -0.02
    env.set_state(qpos, np.zeros(9))
    seen = []
    for _ in range(40):
        env.step(np.zeros(5))
        seen.append(env.data.qpos[1:3].copy())
    knob, bolt = np.stack(seen).T
    np.testing.assert_allclose(bolt, 0.02 * knob, atol=2e-3)
    assert knob[-1] == pytest.approx(0, abs=0.02)
    assert env.data.qpos[0] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(("handle", "turn"), HANDLES)
def test_the_grip_is_seen_where_the_handle_is(handle, turn):
    env = made("LatchDoor", handle=handle, turn=turn).unwrapped
    env.reset(seed=0)
    qpos = env.data.qpos + np.array([0.4, 0.0 if handle == "pull" else 0.7 * turn, 0, 0.02, -0.03, 0.05, 0.2, -0.01, 0])
    qvel = np.arange(9) / 10.0
    env.set_state(qpos, qvel)
    obs = env._get_obs()
    data = env.data
    np.testing.assert_allclose(obs[:3], data.geom("handle").xpos - data.body("hand").xpos, atol=1e-12)
    np.testing.assert_allclose(obs[3:8], qpos[[6, 7, 8, 1, 0]], atol=1e-12)
    np.testing.assert_allclose(obs[8:], qvel[[3, 4, 5, 6, 7, 8, 1, 0]], atol=1e-12)


def test_a_door_earns_for_hand_knob_and_opening():
    found: Any = tasks.known("mbrl_envs/LatchDoor-v0")
    obs = torch.zeros(4, 16)
    obs[1, 6], obs[2, 7], obs[3, :2] = -0.3, 0.1, torch.tensor([0.03, 0.04])
    act = torch.zeros(4, 5)
    act[0] = 1
    want = [0.25 - 0.05, 0.25 + 0.125, 0.25 + 0.5, 0.25 * (1 - math.tanh(0.5))]
    torch.testing.assert_close(found.reward(obs, act, obs).tolist(), want)
    obs[:, 6], obs[:, 7] = 5.0, 1.5
    assert found.reward(obs, 0 * act, obs)[0].item() == pytest.approx(1.5)
