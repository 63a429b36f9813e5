"""Plans in the simulator against the environment that is stepped."""

import warnings
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from mbrl_envs import contexts
from mbrl_envs.evaluate import EnvError, make, to_env
from mbrl_envs.robots import BoxPusher
from mbrl_envs.simulator import ROBOTS, RULES, Simulator

ENDING = ("Ant", "Hopper", "Humanoid", "InvertedDoublePendulum", "InvertedPendulum", "Walker2d")
OURS = [x.__name__ for x in ROBOTS]


def started(name, steps=3, seed=0, **kw) -> Any:
    """An environment in the midst of an episode."""
    env = make(f"mbrl_envs/{name}-v0" if name in OURS else f"{name}-v5", **kw)
    env.reset(seed=seed)
    env.action_space.seed(seed)
    for _ in range(steps):
        env.step(env.action_space.sample())
    return env


def plans(*shape, scale=1.0, seed=0):
    return (scale * (2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1)).clamp(-1, 1)


def stepped(env, acts):
    """Rewards and ends [N, H] of the environment itself, which is put back where it was."""
    base, out = env.unwrapped, []
    box = base.action_space
    here = mujoco.MjData(base.model)
    mujoco.mj_copyData(here, base.model, base.data)
    for plan in acts:
        mujoco.mj_copyData(base.data, base.model, here)
        out.append([base.step(a)[1:3] for a in to_env(plan.numpy(), box.low, box.high, box)])
    mujoco.mj_copyData(base.data, base.model, here)
    return np.array(out, dtype=np.float64).transpose(2, 0, 1)


def check(env, acts, **kw):
    simulator = Simulator(env, **kw)
    got = simulator.rollout(acts)
    want = stepped(env, acts)
    assert got.reward.dtype == torch.float64
    np.testing.assert_allclose(got.reward, want[0], atol=1e-8, rtol=0)
    np.testing.assert_array_equal(got.terminal, want[1].astype(bool))
    simulator.close()
    return got


@pytest.mark.parametrize("name", RULES)
def test_a_plan_meets_what_the_environment_does(name):
    env = started(name)
    width = env.action_space.shape[0]
    found = check(env, plans(4, {"Humanoid": 40, "Ant": 60}.get(name, 25), width, scale=2.0))
    ends = found.terminal.any().item()
    if name in ("Hopper", "Walker2d", "InvertedPendulum", "InvertedDoublePendulum", "Humanoid"):
        assert ends
    if name not in ENDING:
        assert not ends


TASKS = [task for name in ("pusher", "door", "cartpole-pole") for task in contexts.tasks(name)]
TASKS += [
    contexts.ContextTask("odd", "mbrl_envs/BoxPusher-v0", {"left": 40.0, "right": 3000.0}),
    contexts.ContextTask("odd", "mbrl_envs/CartPoleLength-v0", {"length": 0.15}),
]
LEADS = {  # the finger into the box, the hand that closes and pulls, the cart off its track
    "BoxPusher": [([1.0, 0.0], 8), ([1.0, 0.6], 8)],
    "LatchDoor": [([0.6, 0.0, 0.0, 0.5, 1.0], 8), ([-1.0, 0.0, 0.0, -0.5, 1.0], 8)],
    "CartPoleLength": [([1.0], 40)],
}


@pytest.mark.parametrize("task", TASKS, ids=[f"{t.id[10:-3]}-{t.name}" for t in TASKS])
def test_a_plan_in_a_world_of_ours_meets_what_it_does_in_every_task_of_a_sequence(task):
    """Random plans, extreme ones and one that is led to where it touches, from the start and from the midst of that; of
    a door, with the knob turned and the door ajar."""
    env: Any = task.env()
    base, name = env.unwrapped, type(env.unwrapped).__name__
    led = torch.cat([torch.tensor([act]).expand(n, -1) for act, n in LEADS[name]])
    horizon, width = led.shape
    corners = plans(3, 1, width, seed=1).sign().expand(-1, horizon, -1)
    acts = torch.cat([plans(3, horizon, width), plans(2, horizon, width, scale=9.0, seed=2), corners, led[None]])
    first, _ = env.reset(seed=3)
    ends = check(env, acts).terminal
    assert bool(ends[-1].any()) == (name == "CartPoleLength")
    if name == "LatchDoor":
        turned = 0.0 if task.name == "pull" else 0.7 * task.kwargs["turn"]
        base.set_state(base.data.qpos + np.array([0.05, turned, -0.02, 0, 0, 0, 0, 0, 0]), base.data.qvel)
    for act in led[: horizon // 2]:
        obs = env.step(act.numpy())[0]
    check(env, acts)
    if name == "BoxPusher":
        assert abs(obs[2:] - first[2:]).max() > 0.005  # the box has moved


def test_robots_of_different_contexts_are_simulated_side_by_side():
    envs = [task.env() for task in contexts.tasks("door")]
    for i, env in enumerate(envs):
        env.reset(seed=i)
    acts = plans(5, 4, 6, 5, scale=2.0)
    got = Simulator(envs, threads=2).rollout(acts)
    for i, env in enumerate(envs):
        np.testing.assert_allclose(got.reward[i], stepped(env, acts[i])[0], atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", ["Ant", "BoxPusher", "HalfCheetah", "Humanoid", "Reacher"])
def test_the_environment_stays_where_it_is(name):
    env = started(name)
    base, spec = env.unwrapped, mujoco.mjtState.mjSTATE_INTEGRATION.value
    before, after = (np.empty(mujoco.mj_stateSize(base.model, spec)) for _ in range(2))
    mujoco.mj_getState(base.model, base.data, before, spec)
    places = base.data.xpos.copy()
    Simulator(env, threads=2).rollout(plans(6, 4, base.action_space.shape[0]))
    mujoco.mj_getState(base.model, base.data, after, spec)
    assert np.array_equal(before, after)
    assert np.array_equal(places, base.data.xpos)


ARGUMENTS: list[tuple[str, dict]] = [
    ("Hopper", {"forward_reward_weight": 2.0, "ctrl_cost_weight": 0.3, "healthy_reward": 3.0, "frame_skip": 3}),
    ("Hopper", {"healthy_z_range": (1.24, 2.0), "terminate_when_unhealthy": False}),
    ("Hopper", {"healthy_state_range": (-0.5, 0.5)}),
    ("Walker2d", {"healthy_angle_range": (-0.02, 0.02), "healthy_reward": 2.0}),
    ("Ant", {"main_body": "front_left_leg", "contact_cost_weight": 0.5, "healthy_z_range": (0.6, 0.8)}),
    ("Ant", {"terminate_when_unhealthy": False, "contact_force_range": (-0.5, 2.0), "reset_noise_scale": 0.3}),
    ("Humanoid", {"contact_cost_weight": 1.0, "contact_cost_range": (2.0, 5.0), "healthy_z_range": (1.35, 1.5)}),
    ("HumanoidStandup", {"impact_cost_weight": 1.0, "impact_cost_range": (2.0, 5.0), "ctrl_cost_weight": 2.0}),
    ("Pusher", {"reward_near_weight": 2.0, "reward_dist_weight": 3.0, "reward_control_weight": 0.7}),
    ("Reacher", {"reward_dist_weight": 3.0, "reward_control_weight": 0.7}),
    ("InvertedDoublePendulum", {"healthy_reward": 3.0}),
    ("HalfCheetah", {"exclude_current_positions_from_observation": False, "frame_skip": 2}),
]


@pytest.mark.parametrize(("name", "kw"), ARGUMENTS, ids=[f"{n}{i}" for i, (n, _) in enumerate(ARGUMENTS)])
def test_the_environments_arguments_are_honoured(name, kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            env = started(name, **kw)
        except AssertionError:  # some fix the frames they are drawn at
            pytest.skip("this environment takes no other frame_skip")
    check(env, plans(3, 20, env.unwrapped.model.nu))


@pytest.mark.parametrize("name", ["HalfCheetah", "Reacher"])
@pytest.mark.parametrize("threads", [1, 3])
def test_several_environments_in_any_number_of_threads(name, threads):
    envs = [started(name, steps=s, seed=s) for s in (2, 5)]
    envs[1].unwrapped.model.opt.gravity[0] = -3.0  # its own parameters, too
    envs[1].unwrapped.model.dof_damping[:] *= 2
    acts = plans(2, 5, 4, envs[0].unwrapped.model.nu)
    simulator = Simulator(envs, threads)
    got = simulator.rollout(acts)
    assert got.reward.shape == got.terminal.shape == (2, 5, 4)
    for i, env in enumerate(envs):
        np.testing.assert_allclose(got.reward[i], stepped(env, acts[i])[0], atol=1e-8, rtol=0)
        np.testing.assert_allclose(simulator.value(acts, 0.9)[i], Simulator(env).value(acts[i], 0.9), rtol=1e-6)
    simulator.close()
    assert torch.equal(simulator.rollout(acts).reward, got.reward)


def test_it_follows_the_environment():
    env = started("Hopper", steps=0)
    simulator, acts = Simulator(env), plans(2, 6, 3)
    for t in range(3):
        want = stepped(env, acts)
        np.testing.assert_allclose(simulator.rollout(acts).reward, want[0], atol=1e-8, rtol=0)
        env.step(acts[0, t].numpy())
    env.reset(seed=5)
    np.testing.assert_allclose(simulator.rollout(acts).reward, stepped(env, acts)[0], atol=1e-8, rtol=0)


def test_values_are_discounted_until_the_end():
    env = started("Hopper", steps=10)
    acts = plans(8, 60, 3)
    reward, end = Simulator(env).rollout(acts)
    value = Simulator(env).value(acts, 0.95)
    assert value.dtype == torch.float32
    lengths = []
    for n in range(8):
        total = 0.0
        for t in range(60):
            total += 0.95**t * reward[n, t].item()
            if end[n, t]:
                break
        lengths.append(t)
        assert value[n].item() == pytest.approx(total, rel=1e-5)
    assert min(lengths) < 59
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("name", ["BoxPusher", "HalfCheetah", "Reacher"])
def test_what_diverges_is_worth_minus_infinity(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log where it runs
    env = started(name, steps=0)
    acts = plans(3, 5, env.unwrapped.model.nu)
    acts[1, 2, 0] = torch.nan
    reward, _ = Simulator(env).rollout(acts)
    assert reward.isnan().tolist() == [[False] * 5, [False] * 2 + [True] * 3, [False] * 5]
    assert Simulator(env).value(acts).isfinite().tolist() == [True, False, True]
    assert Simulator(env).value(acts)[1] == -torch.inf
    env.unwrapped.data.qvel[0] = 1e12
    assert Simulator(env).rollout(plans(2, 3, env.unwrapped.model.nu)).reward.isnan().all()


def test_nothing_ends_after_it_diverged():
    env = started("Hopper", steps=0)
    acts = plans(4, 100, 3)
    assert Simulator(env).rollout(acts).terminal.any(1).all()
    acts[:, 1] = torch.inf
    reward, end = Simulator(env).rollout(acts)
    assert not end.any()
    assert reward[:, 1:].isnan().all()


@pytest.mark.parametrize("name", ["Walker2d", "Ant"])
def test_the_solver_begins_where_the_environments_would(name):
    """With one iteration, what it starts from shows."""
    env = started(name, steps=0)
    env.unwrapped.model.opt.iterations = 1
    for _ in range(25):
        env.step(env.action_space.sample())
    check(env, plans(3, 10, env.unwrapped.model.nu))


class Other(HopperEnv):
    """One whose reward may be another."""


def test_what_it_cannot_know_is_refused():
    with pytest.raises(EnvError, match=r"PendulumEnv, which is no MuJoCo environment; .* mbrl_envs.control"):
        Simulator(make("Pendulum-v1"))
    with pytest.raises(
        EnvError, match=r"hopper_v4.*expected one of Ant-v5, HalfCheetah-v5.*v5, mbrl_envs/BoxPusher-v0"
    ):
        Simulator(make("Hopper-v4"))
    with pytest.raises(EnvError, match=r"no rule for .*Other"):
        Simulator(Other())
    with pytest.raises(EnvError, match=r"no rule for .*BoxPusher"):
        Simulator(type("BoxPusher", (BoxPusher,), {})())
    with pytest.raises(EnvError, match="environments of HalfCheetah, Hopper, expected one kind"):
        Simulator([make("HalfCheetah-v5"), make("Hopper-v5")])
    with pytest.raises(EnvError, match="0 environments"):
        Simulator([])
    env = started("Hopper", steps=0)
    with pytest.raises(EnvError, match="0 threads"):
        Simulator(env, threads=0)
    for shape in ((5, 4, 2), (4, 3), (2, 5, 4, 3), (5, 0, 3)):
        with pytest.raises(EnvError, match=r"got actions \["):
            Simulator(env).rollout(torch.zeros(shape))
