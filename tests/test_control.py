"""The refrigerator against closed forms; pendulum, cart-pole and reacher against gymnasium's."""

import math
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from mbrl_envs.control import (
    PI,
    Constant,
    Refrigerator,
    RefrigeratorEnv,
    TrueCartPole,
    TruePendulum,
    TrueReacher,
    collect,
    excursions,
)
from mbrl_envs.evaluate import EnvError, evaluator, make

from mbrl.core import Spec, StepInput
from mbrl.rollout import imagine, steps, unroll
from mbrl.testing import CHECKS, Subject

QUIET = Refrigerator(noise=0.0)


def run(fridge, temp, act, n):
    temp = torch.as_tensor(temp, dtype=torch.float64)
    act = torch.full((len(temp), 1), float(act), dtype=torch.float64)
    for _ in range(n):
        temp = fridge.step(temp, act)
    return temp


# ---------------------------------------------------------------- refrigerator


def test_switched_off_it_warms_exponentially_to_the_room():
    rate = 1 - 60 * 3 / 15e3
    for n in (1, 10, 400):
        want = [25 + (t - 25) * rate**n for t in (-30.0, 4.0, 30.0)]
        torch.testing.assert_close(run(QUIET, [-30.0, 4.0, 30.0], -1, n).tolist(), want)


def test_full_power_settles_where_leak_and_cooling_agree():
    a, b = run(QUIET, [25.0, -18.0], 1, 3000).tolist()
    assert a == pytest.approx(b, abs=1e-9)
    assert 3 * (25 - a) == pytest.approx(180 * (1 - math.exp(-(a + 20) / 8)))


def test_one_step_by_hand():
    u = 0.75
    saturated = math.tanh(u / 0.6) / math.tanh(1 / 0.6)
    heat = 3 * (25 - 4) - 180 * saturated * (1 - math.exp(-24 / 8))
    temp = torch.tensor([4.0], dtype=torch.float64)
    after = Refrigerator().step(temp, torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([2.0]))
    assert after.item() == pytest.approx(4 + heat * 60 / 15e3 + 0.02 * 2)


def test_cooling_saturates_and_stops_at_the_evaporator():
    off, half, full = (run(QUIET, [4.0], act, 1).item() for act in (-1, 0, 1))
    assert off - half > 1.5 * (half - full) > 0
    assert run(QUIET, [4.0], 5, 1).item() == full  # beyond its bounds an action is clipped
    below = [-25.0]
    assert run(QUIET, below, 1, 1).item() == run(QUIET, below, -1, 1).item() > -25


def test_reward():
    obs, after = torch.tensor([[9.0], [9.0], [9.0]]), torch.tensor([[4.0], [5.5], [2.0]])
    act = torch.tensor([[-1.0], [0.0], [1.0]])
    want = [0.0, -1.5 - 0.004 * 60, -2 - 0.004 * 120]
    torch.testing.assert_close(Refrigerator().reward(obs, act, after).tolist(), want)


def test_the_behaviour_keeps_its_band_and_the_excursions_leave_it():
    data = collect(20, 200, seed=0)
    assert (data.obs - 4).abs().max() < 2.5
    assert data.obs.mean().item() == pytest.approx(4, abs=0.15)
    assert data.act.std() > 0.2
    assert (data.act.abs() < 1).float().mean() > 0.7
    low, high = data.obs.min(), data.obs.max()
    for name, controller in excursions().items():
        other = collect(3, 200, seed=1, controller=controller).obs
        outside = (other < low) | (other > high)
        assert outside.float().mean() > 0.8, name


def test_the_integral_removes_the_offset_that_proportional_control_leaves():
    def settle(controller, start):
        temp, integral = torch.tensor([start]), torch.zeros(1)
        for _ in range(500):
            act, integral = controller(temp, integral, torch.zeros(1))
            temp = QUIET.step(temp, act)
        return temp.item()

    assert settle(PI(), 4.0) == pytest.approx(4, abs=1e-3)
    assert abs(settle(PI(ki=0.0), 4.0) - 4) > 0.1
    assert settle(PI(), 25.0) == pytest.approx(4, abs=1e-3)
    controller, temp, integral, lowest = PI(), torch.tensor([25.0]), torch.zeros(1), 25.0
    for _ in range(300):  # long at its bound, it does not overshoot for what it summed up there
        act, integral = controller(temp, integral, torch.zeros(1))
        temp = QUIET.step(temp, act)
        lowest = min(lowest, temp.item())
    assert lowest > 3.5


def test_collected_data_hold_the_steps_that_were_taken():
    data = collect(3, 50, seed=5)
    assert len(data) == 150
    assert data.starts.tolist() == [0, 50, 100, 150]
    assert data.spec == Spec(1, 1)
    assert (data.act_low.item(), data.act_high.item(), data.dt) == (0.0, 120.0, 60.0)
    inside = torch.arange(150) % 50 != 49
    torch.testing.assert_close(data.next_obs[inside], data.obs[1:][inside[:-1]], rtol=0, atol=0)
    left = data.next_obs[:, 0] - QUIET.step(data.obs[:, 0], data.act)
    assert left.std().item() == pytest.approx(0.02, rel=0.2)
    torch.testing.assert_close(data.reward, QUIET.reward(data.obs, data.act, data.next_obs))
    assert data.paired.all()
    assert not data.terminal.any()
    again, other = collect(3, 50, seed=5), collect(3, 50, seed=6)
    assert torch.equal(again.obs, data.obs)
    assert again.sha256 == data.sha256 != other.sha256
    exact = collect(2, 30, 0, fridge=QUIET, controller=Constant(0.3))
    torch.testing.assert_close(exact.next_obs[:, 0], QUIET.step(exact.obs[:, 0], exact.act))
    with pytest.raises(ValueError, match="got 0 episodes"):
        collect(0)


def test_the_environment_is_the_simulator():
    env = RefrigeratorEnv(QUIET, length=25)
    obs, _ = env.reset(seed=0, options={"temp": 7.0})
    assert obs.tolist() == [7.0]
    temp, ends = torch.tensor([7.0], dtype=torch.float64), []
    for t in range(25):
        act = math.sin(t)
        obs, reward, terminated, truncated, _ = env.step(np.array([120 * (act + 1) / 2]))
        tensor = torch.tensor([[act]], dtype=torch.float64)
        after = QUIET.step(temp, tensor)
        assert reward == pytest.approx(QUIET.reward(temp[:, None], tensor, after[:, None]).item())
        assert obs.item() == pytest.approx(after.item(), rel=1e-6)
        temp = after
        ends.append((terminated, truncated))
    assert ends == [(False, False)] * 24 + [(False, True)]


def test_the_evaluator_takes_it():
    make = lambda: RefrigeratorEnv(replace(QUIET, price=0.0), length=10, start=(25.0, 0.0))
    evaluate = evaluator(make, episodes=3)
    assert evaluate(lambda obs: torch.full((len(obs), 1), -1.0)).tolist() == [-210.0] * 3  # off, at the room's 25
    better = evaluate(lambda obs: torch.ones(len(obs), 1))
    assert len(set(better)) == 1
    assert better[0] > -210
    noisy = evaluator(RefrigeratorEnv, episodes=3, seed=1)
    act = lambda obs: -torch.ones(len(obs), 1)
    assert len(set(noisy(act))) == 3
    assert noisy(act).tolist() == noisy(act).tolist()


# ---------------------------------------------------------------- pendulum


@pytest.mark.parametrize("mass", [1.0, 0.4])
def test_the_pendulum_is_gymnasiums(mass):
    env: Any = gym.make("Pendulum-v1", disable_env_checker=True).unwrapped
    env.m = mass
    model, rng = TruePendulum(mass=mass).double(), np.random.default_rng(0)
    states = rng.uniform([-8, -8], [8, 8], (300, 2))
    acts = rng.uniform(-1.2, 1.2, 300)  # the torque is clipped
    rewards, after = [], []
    env.reset(seed=0)
    for state, act in zip(states, acts, strict=True):
        env.state = state
        rewards.append(env.step(np.array([2 * act]))[1])
        after.append([np.cos(env.state[0]), np.sin(env.state[0]), env.state[1]])
    obs = torch.tensor(np.stack([np.cos(states[:, 0]), np.sin(states[:, 0]), states[:, 1]], 1))
    inp = StepInput(torch.tensor(acts)[:, None], model.draw(300, 1, torch.Generator()), torch.ones(300, 1))
    state, pred = model.step(obs, inp, ())
    torch.testing.assert_close(pred.reward, torch.tensor(rewards), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(state, torch.tensor(after), atol=1e-9, rtol=1e-9)
    assert (state[:, 2].abs() == 8).sum() > 3  # the speed's limit was met
    assert pred.uncertainty == {}


def test_a_policy_earns_the_same_in_the_model():
    gain = torch.tensor([[0.3], [-0.9], [-0.2]])
    policy = lambda obs, noise=None: (obs @ gain).tanh()
    evaluate = evaluator("Pendulum-v1", episodes=4, seed=3, max_steps=60)
    real = evaluate(policy)
    env = gym.make("Pendulum-v1")
    first = torch.tensor(np.stack([env.reset(seed=3 + i)[0] for i in range(4)]))
    never = lambda obs, act, after: torch.zeros(4, dtype=torch.bool)
    noise = [(torch.empty(0), torch.empty(4, 0))] * 60
    alive, dt, zero = torch.ones(4, dtype=torch.bool), torch.ones(4, 1), torch.zeros(1, dtype=torch.int64)
    _, _, segment, _ = imagine(TruePendulum(), policy, never, first, alive, noise, dt, (), zero)
    np.testing.assert_allclose(segment.reward.sum(1), real, rtol=1e-4)


def test_gravity_and_rest():
    hanging = torch.tensor([[-1.0, 0.0, 0.0]], dtype=torch.float64)
    upright = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    inputs = steps(StepInput(torch.zeros(1, 50, 1), torch.zeros(1, 50, 0), torch.ones(1, 50, 1)))
    model = TruePendulum().double()
    state, pred = unroll(model, upright, inputs, ())
    assert torch.equal(state, upright)
    assert pred.reward.sum() == 0
    assert unroll(model, hanging, inputs, ())[1].reward.mean().item() == pytest.approx(-(math.pi**2))
    weak = TruePendulum(g=0.0).double()
    moving = torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64)
    state, _ = unroll(weak, moving, inputs, ())
    assert torch.atan2(state[0, 1], state[0, 0]).item() == pytest.approx(50 * 0.05 * 0.5)


# ---------------------------------------------------------------- cart-pole


def held(act):
    """A step's input of acts [B, A]."""
    return StepInput(act, act[:, :0], act.new_ones(len(act), 1))


def test_the_cart_pole_moves_as_gymnasiums():
    """Which knows two forces only, and whose own integrator is the explicit one unless it is told."""
    env: Any = gym.make("CartPole-v1", disable_env_checker=True).unwrapped
    env.kinematics_integrator = "semi-implicit euler"
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    states, acts, after = rng.uniform([-2, -4, -7, -9], [2, 4, 7, 9], (200, 4)), rng.integers(0, 2, 200), []
    for state, act in zip(states, acts, strict=True):
        env.state, env.steps_beyond_terminated = state, None
        env.step(int(act))
        after.append(env.state)
    seen = lambda x: torch.tensor(np.stack([x[:, 0], x[:, 1], np.cos(x[:, 2]), np.sin(x[:, 2]), x[:, 3]], 1))
    model, act = TrueCartPole().double(), torch.tensor(2.0 * acts - 1)[:, None]
    state, pred = model.step(seen(states), held(act), ())
    torch.testing.assert_close(state, seen(np.stack(after)), atol=1e-9, rtol=1e-9)
    want = (1 + state[:, 2]) / 2 * (1 - (state[:, 0] / 2.4) ** 2).clamp(min=0) - 0.01
    torch.testing.assert_close(pred.reward, want)
    torch.testing.assert_close(model.step(seen(states), held(3 * act), ())[0], state)  # the force is clipped


def test_a_prediction_off_the_circle_is_read_by_its_angle():
    for model, columns in ((TrueCartPole(), [2, 3]), (TruePendulum(), [0, 1]), (TrueReacher(), [0, 1, 2, 3])):
        obs = model.double().starts(4, torch.Generator().manual_seed(0))
        act = torch.full((4, model.spec.act), 0.7, dtype=torch.float64)
        off = obs.clone()
        off[:, columns] *= 1.3
        start = lambda x, model=model: model.init(x, ())
        torch.testing.assert_close(model.step(start(off), held(act), ())[0], model.step(start(obs), held(act), ())[0])


def test_a_free_pole_gains_no_energy_and_half_a_force_is_half_a_push():
    model = TrueCartPole().double()
    state, heights = model.hanging(torch.tensor([[0.0, 0.0, 0.5, 0.0]], dtype=torch.float64)), []
    for _ in range(1000):
        state, _ = model.step(state, held(torch.zeros(1, 1, dtype=torch.float64)), ())
        heights.append(-state[0, 2].item())
    first, last = min(heights[:250]), min(heights[-250:])
    assert first == pytest.approx(math.cos(0.5), abs=5e-3)
    assert last == pytest.approx(first, abs=5e-3)
    rest = model.hanging(torch.zeros(3, 4, dtype=torch.float64))
    speed = model.step(rest, held(torch.tensor([[0.5], [1.0], [0.0]], dtype=torch.float64)), ())[0][:, 1]
    assert speed[1] == pytest.approx(2 * speed[0].item())
    assert speed[2] == pytest.approx(0, abs=1e-12)


def test_a_pole_that_is_put_upright_stands():
    """In double precision, in which it would else fall from what single precision leaves of pi."""
    env = make("mbrl_envs/CartPoleSwingUp-v0")
    assert np.abs(env.reset(options={"state": (0, 0, 0, 0)})[0] - [0, 0, 1, 0, 0]).max() < 1e-15
    for _ in range(250):
        obs = env.step(np.zeros(1, np.float32))[0]
    np.testing.assert_allclose(obs, [0, 0, 1, 0, 0], atol=1e-5)


def test_the_swing_up_draws_its_cart_and_pole():
    env = make("mbrl_envs/CartPoleSwingUp-v0", render_mode="rgb_array")
    pole = lambda picture: np.argwhere((picture == (202, 152, 101)).all(-1))  # rows (down), columns (right)
    env.reset(options={"state": (1.0, 0, 0, 0)})
    up = pole(env.render())
    assert (up[:, 0].min(), up[:, 1].mean()) == (pytest.approx(90, abs=2), pytest.approx(385, abs=2))
    env.reset(options={"state": (0.0, 0, math.pi / 2, 0)})
    right = pole(env.render())
    assert (right[:, 1].max(), right[:, 0].mean()) == (pytest.approx(385, abs=2), pytest.approx(175, abs=2))
    assert env.unwrapped.__class__().render() is None


def test_the_swing_up_is_its_twin():
    env, model = make("mbrl_envs/CartPoleSwingUp-v0"), TrueCartPole().double()
    obs, _ = env.reset(seed=0)
    again, _ = env.reset(seed=0)
    assert obs.tolist() == again.tolist() != env.reset(seed=1)[0].tolist()
    assert obs[2] < -0.99
    obs, ends = env.reset(options={"state": (2.3, 0.5, 0.2, 0.1)})[0], []
    assert obs.tolist() == pytest.approx([2.3, 0.5, math.cos(0.2), math.sin(0.2), 0.1])
    while not any(ends[-1:]):
        act = env.action_space.sample()
        _, pred = model.step(torch.tensor(obs)[None], held(torch.tensor(act).double()[None]), ())
        obs, reward, *end, _ = env.step(act)
        ends = [*ends, end[0]]
        np.testing.assert_allclose(pred.obs[0], obs, atol=1e-12)
        assert pred.reward.item() == pytest.approx(reward, abs=1e-12)
        assert end[0] == (abs(obs[0]) > 2.4)
    env.reset(seed=0)
    cut = [env.step(np.zeros(1))[2:4] for _ in range(250)]
    assert cut == [(False, False)] * 249 + [(False, True)]
    with pytest.raises(EnvError, match="CartPoleSwingDown"):
        make("mbrl_envs/CartPoleSwingDown-v0")


# ---------------------------------------------------------------- reacher


@pytest.mark.parametrize("strength", [0.02, 0.5])
def test_the_reacher_is_gymnasiums(strength):
    """Physics, the fingertip that lags behind, reward; with the second joint at its limit, too."""
    env: Any = gym.make("Reacher-v5", disable_env_checker=True).unwrapped
    rng, rows = np.random.default_rng(0), []
    for episode in range(6):
        obs, _ = env.reset(seed=episode)
        push = strength * rng.normal(size=2)
        for _ in range(40):
            act = np.clip(push + strength * rng.normal(size=2), -1.2, 1.2).astype(np.float32)  # the torque is clipped
            before, angle = obs, env.data.qpos[1]
            obs, _, _, _, info = env.step(act)
            if max(abs(angle), abs(env.data.qpos[1])) < math.pi:
                rows.append((before, act, obs, info["reward_dist"], abs(angle) > 3))
    obs, act, after, dist, limited = (torch.tensor(np.stack(x)).double() for x in zip(*rows, strict=True))
    assert len(rows) > 100
    assert limited.any() == (strength == 0.5)
    model = TrueReacher().double()
    _, pred = model.step(model.init(obs, ()), held(act), ())
    torch.testing.assert_close(pred.obs, after, atol=1e-6, rtol=1e-8)  # MuJoCo's solver stops at 1e-8
    torch.testing.assert_close(pred.obs[:, 8:], after[:, 8:], atol=1e-8, rtol=0)
    torch.testing.assert_close(pred.reward, dist - act.square().sum(1), atol=1e-8, rtol=0)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_reachers_rollout_knows_how_often_a_joint_has_turned(corrected):
    """Under full torques, each held for five steps, which throw the second joint beyond a half turn; in open loop, and
    where the state is moved off after each step and the observation corrects it."""
    env: Any = gym.make("Reacher-v5", disable_env_checker=True).unwrapped
    model, most = TrueReacher().double(), 0.0
    for episode in range(8):
        obs = env.reset(seed=episode)[0]
        acts = np.sign(np.random.default_rng(episode).uniform(-1, 1, (10, 2))).repeat(5, 0)
        state, totals = model.init(torch.tensor(obs)[None], ()), np.zeros(2)
        for act in acts:
            state, pred = model.step(state, held(torch.tensor(act)[None]), ())
            obs, reward, *_ = env.step(act)
            np.testing.assert_allclose(pred.obs[0], obs, atol=1e-5)
            np.testing.assert_allclose(state[1][0], env.data.qpos[:2], atol=1e-5)
            if corrected:
                state = (state[0] + 0.3, state[1] + 0.3)
                state = model.correct(state, torch.tensor(obs)[None], 1.0, ())
                np.testing.assert_allclose(state[1][0], env.data.qpos[:2], atol=1e-9)
            totals += reward, pred.reward.item()
            most = max(most, abs(env.data.qpos[1]))
        assert totals[0] == pytest.approx(totals[1], abs=1e-5)
    assert most > math.pi


def test_starts_are_the_environments():
    """Bounds and, over many, spread; each is a state that the environment can be in."""
    g = torch.Generator().manual_seed(0)
    for model, env_id in (
        (TruePendulum(), "Pendulum-v1"),
        (TrueCartPole(), "mbrl_envs/CartPoleSwingUp-v0"),
        (TrueReacher(), "Reacher-v5"),
    ):
        env = make(env_id)
        real = np.stack([env.reset(seed=i)[0] for i in range(1500)])
        ours = model.starts(1500, g).numpy()
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours.mean(0), real.mean(0), atol=0.12, err_msg=env_id)
        np.testing.assert_allclose(ours.std(0), real.std(0), rtol=0.2, atol=1e-3, err_msg=env_id)
        np.testing.assert_allclose(np.abs(ours).max(0), np.abs(real).max(0), rtol=0.1, err_msg=env_id)
    obs = TrueReacher().double().starts(5, g)
    angles = torch.atan2(obs[:, 2:4], obs[:, :2])
    env.unwrapped.set_state(np.concatenate([angles[0], obs[0, 4:6]]), np.concatenate([obs[0, 6:8], [0, 0]]))
    np.testing.assert_allclose(env.unwrapped._get_obs(), obs[0], atol=1e-9)


WORLDS = {"pendulum": TruePendulum, "cartpole": TrueCartPole, "reacher": TrueReacher}
TRAINED = {  # these differentiate the loss by the parameters, of which there are none
    "pure",
    "what_is_masked_weighs_nothing",
    "learns_a_linear_system",
    "loss_compiles_whole",
    "seeds_trained_together_are_seeds_trained_apart",
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("check", sorted(CHECKS.keys() - TRAINED))
def test_the_worlds_keep_the_contract(check, world):
    make_world = WORLDS[world]
    CHECKS[check](Subject(lambda spec: make_world(), make_world().spec))
