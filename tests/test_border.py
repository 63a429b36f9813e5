"""The border to an environment, with gymnasium's own and with stand-ins."""

from types import SimpleNamespace
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from mbrl.border import World, spec_of

BOX = spaces.Box(-1, 1, (1,), np.float32)


class Echo:
    """Observes what it is told, whatever the action."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(np.array([-1, 0], np.float32), np.array([3, 10], np.float32))

    def __init__(self, obs=(0.0, 0.0), reward=0.0):
        self.obs, self.reward, self.acts = np.array(obs, np.float64), reward, []

    def reset(self, *, seed=None):
        return self.obs, {}

    def step(self, action):
        self.acts.append(action)
        return self.obs, self.reward, False, False, {}


def test_it_serves_gymnasiums_own_environments():
    world = World(gym.make("Pendulum-v1"))
    assert (world.spec.obs, world.spec.act) == (3, 1)
    world.reset(3)
    obs, reward, terminated, truncated = world.step(np.ones(1, np.float32))
    other = gym.make("Pendulum-v1")
    other.reset(seed=3)
    want = other.step(np.array([2.0], np.float32))
    assert (obs == want[0]).all()
    assert (reward, terminated, truncated) == (pytest.approx(float(want[1])), want[2], want[3])
    with pytest.raises(ValueError, match="flat Box"):
        spec_of(gym.make("CartPole-v1"))


def test_actions_are_rescaled_entry_by_entry_to_the_spaces_own_type():
    env = Echo()
    World(env).step(np.array([-0.5, 1.0], np.float32))
    assert env.action_space.contains(env.acts[0])
    assert env.acts[0].tolist() == [0.0, 10.0]


def test_rounding_leads_no_action_out_of_the_box():
    env = Echo()
    env.action_space = gym.spaces.Box(np.array([-0.1, -0.1]), np.array([0.3, 0.3]), dtype=np.float64)
    World(env).step(np.ones(2, np.float32))
    assert env.action_space.contains(env.acts[0])
    assert env.acts[0].tolist() == [0.3, 0.3]


def test_observations_come_in_single_precision_and_are_the_callers_own():
    env = Echo((0.1, 2.0))
    obs = World(env).reset(0)
    assert obs.dtype == np.float32
    env.obs[:] = 7
    assert obs.tolist() == [np.float32(0.1), 2.0]


@pytest.mark.parametrize("obs", [(np.nan, 0.0), (0.0, np.inf), (1e60, 0.0)])
def test_what_single_precision_cannot_hold_is_refused(obs):
    """The last is finite where it comes from, and would be infinite in every learner."""
    with pytest.raises(ValueError, match="reset returned the observation"):
        World(Echo(obs)).reset(0)
    with pytest.raises(ValueError, match="step 1 returned the observation"):
        World(Echo(obs)).step(np.zeros(2, np.float32))


def test_a_reward_may_come_as_an_array_of_one():
    assert World(Echo(reward=np.array([2.5]))).step(np.zeros(2, np.float32))[1] == 2.5
    for wrong in (np.zeros(2), None, {}, 1j):
        with pytest.raises(ValueError, match=r"step 1 returned a reward of .*, expected a finite number"):
            World(Echo(reward=cast(Any, wrong))).step(np.zeros(2, np.float32))


def test_an_environment_of_gyms_old_interface_is_told_apart():
    env = Echo()
    env.step = lambda action: (env.obs, 0.0, False, {})
    with pytest.raises(ValueError, match=r"step 1 returned 4 things, expected gymnasium's five.*written for gym"):
        World(env).step(np.zeros(2, np.float32))


def test_an_action_that_is_not_finite_is_not_the_environments_fault():
    env = Echo()
    world = World(env)
    with pytest.raises(ValueError, match=r"step 1: the action is .*what acts has diverged"):
        world.step(np.array([0.0, np.nan], np.float32))
    assert not env.acts, "it is not sent"


@pytest.mark.parametrize(
    ("act", "obs"),
    [
        (spaces.Discrete(3), BOX),
        (spaces.Box(-np.inf, np.inf, (1,)), BOX),
        (spaces.Box(-1, 1, (2, 2)), BOX),
        (spaces.Box(0, 5, (1,), np.int64), BOX),
        (BOX, spaces.Dict({"a": BOX})),
        (BOX, spaces.Box(-1, 1, (0,))),
    ],
)
def test_a_space_that_is_no_flat_box_is_refused(act, obs):
    with pytest.raises(ValueError, match=r"space is .*expected"):
        spec_of(cast(Any, SimpleNamespace(action_space=act, observation_space=obs)))


def test_what_is_no_environment_is_named():
    with pytest.raises(ValueError, match="got a str, expected an object with gymnasium's spaces"):
        spec_of(cast(Any, "Pendulum-v1"))
