"""Evaluation against loops written out, and on environments whose returns are known."""

import sys
import warnings
from collections import OrderedDict
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from mbrl_envs import evaluate as worlds
from mbrl_envs.evaluate import EnvError, evaluator, flatten_obs, to_env, video


class Counter(gym.Env):
    """Lasts 1 + seed % 5 steps and pays the action, which lies in [0, 10]; shows the seed and the time."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, endless=False, box=None, render_mode=None):
        parts: Any = OrderedDict(time=spaces.Box(-np.inf, np.inf, (1,)), seed=spaces.Box(-np.inf, np.inf, (1, 2)))
        self.observation_space = spaces.Dict(parts)
        self.action_space = spaces.Box(0, 10, (1, 1)) if box is None else box
        self.endless, self.render_mode, self.open, self.sent = endless, render_mode, True, []

    def see(self):
        return {"seed": np.full((1, 2), self.seed), "time": np.array([self.time])}

    def reset(self, *, seed=None, options=None):
        assert seed is not None
        self.seed, self.time = seed, 0
        return self.see(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        self.sent.append(action.item())
        return self.see(), action.item(), not self.endless and self.time == 1 + self.seed % 5, False, {}

    def render(self):
        return np.full((8, 8, 3), 20 * self.time, dtype=np.uint8)

    def close(self):
        self.open = False


def constant(value):
    return lambda obs: torch.full((len(obs), 1), value)


def test_returns_are_those_of_a_plain_loop():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gym.make("Hopper-v4")
    policy = lambda obs: torch.tanh(obs[:, :3])  # row by row the same, whatever the batch
    want, lengths = [], []
    for i in range(4):
        obs, _ = env.reset(seed=7 + i)
        total, ended, steps = 0.0, False, 0
        while not ended:
            act = policy(torch.as_tensor(obs, dtype=torch.float32)[None])[0].numpy()
            obs, reward, terminated, truncated, _ = env.step(act)
            total, ended, steps = total + float(reward), terminated or truncated, steps + 1
        want.append(total)
        lengths.append(steps)
    assert len(set(lengths)) > 1
    evaluate = evaluator("Hopper-v4", episodes=4, seed=7)
    np.testing.assert_allclose(evaluate(policy), want, rtol=1e-4)
    assert evaluate(policy).tolist() == evaluate(policy, round=0).tolist()


def test_rounds_differ_and_repeat():
    evaluate = evaluator("Pendulum-v1", episodes=3, seed=2, max_steps=20)
    policy = constant(0.1)
    first, second = evaluate(policy), evaluate(policy, round=1)
    assert len(set(first) | set(second)) == 6
    assert evaluator("Pendulum-v1", episodes=3, seed=5, max_steps=20)(policy).tolist() == second.tolist()
    assert evaluate(policy).tolist() == first.tolist()
    assert evaluate(policy, round=1).tolist() == second.tolist()


@pytest.mark.parametrize("copies", [1, 2, 5, None])
def test_each_episode_runs_once_and_leaves_the_batch(copies):
    seen = []

    def policy(obs):
        seen.append(obs.clone())
        return torch.zeros(len(obs), 1)

    returns = evaluator(Counter, episodes=5, seed=0, copies=copies)(policy)
    assert returns.dtype == np.float64
    assert returns.tolist() == [5.0, 10.0, 15.0, 20.0, 25.0]
    if copies is None:
        assert [len(x) for x in seen] == [5, 4, 3, 2, 1]
        assert seen[2].tolist() == [[2, 2, 2], [2, 3, 3], [2, 4, 4]]  # in declared order: time, then seed
        assert seen[0].dtype == torch.float32
    assert sum(len(x) for x in seen) == 15


def test_one_given_environment_serves_all_episodes_and_stays_open():
    env = Counter()
    evaluate = evaluator(env, episodes=5)
    assert evaluate(constant(-1.0)).tolist() == [0.0] * 5
    assert len(env.sent) == 15
    evaluate.close()
    assert env.open
    made = []
    evaluate = evaluator(lambda: made.append(Counter()) or made[-1], episodes=3)
    evaluate(constant(0.0))
    evaluate(constant(0.0))
    assert len(made) == 3
    evaluate.close()
    assert not any(env.open for env in made)


@pytest.mark.parametrize(("act", "sent"), [(-1, 0), (0, 5), (1, 10), (0.5, 7.5), (3, 10), (-7, 0)])
def test_actions_are_rescaled_and_clipped(act, sent):
    env = Counter()
    evaluator(env, episodes=1)(constant(float(act)))
    assert env.sent == [sent]


def test_bounds_of_the_data_replace_those_of_the_environment():
    env = Counter()
    evaluator(env, episodes=1, act_low=[2.0], act_high=torch.tensor([4.0]))(constant(0.5))
    evaluator(env, episodes=1, act_low=[-4.0], act_high=[4.0])(constant(-1.0))  # never beyond the environment's
    evaluator(env, episodes=1, act_low=[2.0], act_high=[4.0])(constant(3.0))
    assert env.sent == [3.5, 0.0, 4.0]
    free = Counter(box=spaces.Box(-np.inf, np.inf, (1,)))
    with pytest.raises(EnvError, match="finite bounds, pass act_low and act_high"):
        evaluator(free)(constant(0.0))
    assert evaluator(free, episodes=1, act_low=[-2], act_high=[2])(constant(1.0)).tolist() == [2.0]


def test_rescaling_keeps_asymmetric_bounds_and_shape():
    box = spaces.Box(np.array([[-1.0, 0.0]], np.float32), np.array([[3.0, 0.5]], np.float32))
    got = to_env(np.array([[0, 1], [-1, -1]], np.float32), box.low.ravel(), box.high.ravel(), box)
    np.testing.assert_array_equal(got, np.array([[[1.0, 0.5]], [[-1.0, 0.0]]], np.float32))


def test_an_action_that_is_not_finite_is_not_sent():
    env = Counter()

    def policy(obs):  # seeds 1, 2, 3 run two, three and four steps; seed 2 fails at its second
        bad = (obs[:, 1] == 2) & (obs[:, 0] == 1)
        return torch.where(bad, float("nan"), 0.0)[:, None]

    returns = evaluator(env, episodes=3, seed=1)(policy)
    assert np.isnan(returns).tolist() == [False, True, False]
    assert returns[[0, 2]].tolist() == [10.0, 20.0]
    assert len(env.sent) == 2 + 1 + 4


@pytest.mark.parametrize("what", ["reset", "reward", "observation"])
def test_an_environment_that_is_not_finite_is_named(what, monkeypatch):
    env = Counter(box=spaces.Box(0, 10, (1, 1)))
    see, step = env.see, env.step
    late = lambda: what == "reset" or (what == "observation" and env.time == 2)
    monkeypatch.setattr(env, "see", lambda: see() | ({"time": np.array([np.nan])} if late() else {}))
    if what == "reward":
        monkeypatch.setattr(env, "step", lambda a: (step(a)[0], np.inf, False, False, {}))
    where = {"reset": "reset returned the observation", "reward": "step 1 of an episode returned the reward inf"}
    with pytest.raises(EnvError, match=where.get(what, "step 2 of an episode returned the observation")):
        evaluator(env, episodes=1, seed=4)(constant(0.0))


def test_what_a_step_returns(monkeypatch):
    env = Counter()
    step = env.step
    monkeypatch.setattr(env, "step", lambda a: (step(a)[0], np.array([2.0]), env.time == 3, False, {}))
    assert evaluator(env, episodes=1)(constant(0.0)).tolist() == [6.0]
    monkeypatch.setattr(env, "step", lambda a: (step(a)[0], np.zeros(2), False, False, {}))
    with pytest.raises(EnvError, match=r"Counter: step 1 of an episode returned the reward \[0. 0.\], expected"):
        evaluator(env, episodes=1)(constant(0.0))
    monkeypatch.setattr(env, "step", lambda a: (step(a)[0], 0.0, False, {}))
    with pytest.raises(EnvError, match="Counter: step 1 of an episode returned 4 things, expected gymnasium's"):
        evaluator(env, episodes=1)(constant(0.0))


def test_limits_of_time(monkeypatch):
    assert evaluator(Counter, episodes=5, max_steps=2)(constant(1.0)).tolist() == [10, 20, 20, 20, 20]
    monkeypatch.setattr(worlds, "ENDLESS", 50)
    with pytest.raises(EnvError, match=r"50 steps .* pass max_steps, or .*max_episode"):
        evaluator(lambda: Counter(endless=True), episodes=2)(constant(1.0))
    assert evaluator(lambda: Counter(endless=True), episodes=2, max_steps=60)(constant(1.0)).tolist() == [600, 600]
    assert np.isfinite(evaluator("Pendulum-v1", episodes=1)(constant(0.0))).all()  # states a limit of 200: no error


def test_a_policy_of_the_wrong_width():
    with pytest.raises(EnvError, match=r"actions \[5, 2\], expected \[5, 1\]"):
        evaluator(Counter, episodes=5)(lambda obs: torch.zeros(len(obs), 2))


def test_nothing_is_said_of_old_versions(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluator("HalfCheetah-v4", episodes=2, max_steps=3)(lambda obs: torch.zeros(len(obs), 6))
    out, err = capfd.readouterr()
    assert out + err == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("Hoper-v5", "'Hoper-v5'.*Hopper"),
        ("CartPole-v1", "Discrete"),
        (lambda: 3, "got a int"),
        (lambda: Counter(box=spaces.Box(0, 9, (1,), dtype=np.int64)), "floating point"),
    ],
)
def test_what_cannot_be_evaluated(source, match):
    with pytest.raises(EnvError, match=match):
        evaluator(source)(constant(0.0))


@pytest.mark.parametrize("bad", [{"episodes": 0}, {"max_steps": 0}, {"copies": 0}])
def test_bad_settings(bad):
    with pytest.raises(EnvError, match="at least 1"):
        evaluator(Counter, **bad)


def test_an_id_may_bring_arguments():
    policy = lambda obs: torch.zeros(len(obs), 1)
    moon, earth = (evaluator(x, episodes=3, seed=5, max_steps=20) for x in ('Pendulum-v1{"g": 1.6}', "Pendulum-v1"))
    want = evaluator(lambda: gym.make("Pendulum-v1", g=1.6), episodes=3, seed=5, max_steps=20)(policy)
    assert (moon(policy) == want).all()
    assert (moon(policy) != earth(policy)).all()
    assert worlds.make('Pendulum-v1{"g": 1.6}', g=3.0).unwrapped.g == 1.6  # type: ignore[attr-defined]
    with pytest.raises(EnvError, match=r"cannot make .*moons"):
        worlds.make('Pendulum-v1{"moons": 2}')
    bad = (
        'Hopper-v5{"frame_skip": 0}',
        'Hopper-v5{"frame_skip": -1}',
        'Pendulum-v1{"g": "heavy"}',
        'Hopper-v5{"xml_file": "none.xml"}',
    )
    for name in (*bad, 'Pendulum-v1{"max_episode_steps": 0}'):  # in making it, or in its first step
        with pytest.raises(EnvError, match=r"cannot make .*mend its arguments|cannot make .*TypeError"):
            worlds.make(name)
    with pytest.raises(ValueError, match=r"Pendulum-v1\{g=1\}: its arguments are no JSON .*expected as in"):
        worlds.make("Pendulum-v1{g=1}")


def test_bad_bounds():
    with pytest.raises(EnvError, match="both or none"):
        evaluator(Counter, act_low=[0.0])(constant(0.0))
    with pytest.raises(EnvError, match="act_high has 2 entries, expected 1"):
        evaluator(Counter, act_low=[0.0], act_high=[1.0, 1.0])(constant(0.0))
    with pytest.raises(EnvError, match=r"lie in \[1.0\] .. \[0.0\]"):
        evaluator(Counter, act_low=[1.0], act_high=[0.0])(constant(0.0))


class Maze(Counter):
    """Observations with a goal, as gymnasium-robotics has them."""

    def __init__(self, **kw):
        super().__init__(**kw)
        box = lambda n: spaces.Box(-np.inf, np.inf, (n,))
        self.observation_space = spaces.Dict(observation=box(3), achieved_goal=box(2), desired_goal=box(2))

    def dress(self, out):
        part = {"observation": [1.0, 2, 3], "achieved_goal": [4.0, 5], "desired_goal": [6.0, 7]}
        return ({k: np.array(v, dtype=np.float32) for k, v in part.items()}, *out[1:])

    def reset(self, **kw):
        return self.dress(super().reset(**kw))

    def step(self, action):
        return self.dress(super().step(action))


@pytest.mark.parametrize(("width", "row"), [(3, [1, 2, 3]), (5, [4, 5, 1, 2, 3]), (7, [1, 2, 3, 4, 5, 6, 7])])
def test_a_policy_of_d4rl_s_mazes_sees_what_it_was_trained_on(width, row):
    seen = []

    def policy(obs):
        seen.append(obs[0].tolist())
        return torch.zeros(len(obs), 1)

    evaluator(Maze, episodes=1, max_steps=1, obs=width)(policy)
    assert seen[0] == row


def test_observations_of_another_width_are_an_error_before_the_first_episode():
    with pytest.raises(EnvError, match="7 wide, the policy's are 4"):
        evaluator(Maze, obs=4).open()


@pytest.mark.parametrize("name", ["AdroitHandDoor-v1", "AntMaze_UMaze-v4", "FrankaKitchen-v1", "PointMaze_UMaze-v3"])
def test_a_missing_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(EnvError, match=r"pip install mbrl-suite\[robotics\]"):
        evaluator(name)(constant(0.0))


def test_flat_observations_keep_the_declared_order():
    inner: Any = OrderedDict(y=spaces.MultiBinary(2), b=spaces.Box(-9, 9, ()))
    pair: Any = [spaces.Discrete(3), spaces.Box(0, 1, (1,), dtype=np.float64)]
    parts: Any = OrderedDict(z=spaces.Box(-1, 1, (2, 2)), a=spaces.Tuple(pair), m=spaces.Dict(inner))
    space = spaces.Dict(parts)
    for seed in range(5):
        space.seed(seed)
        obs = space.sample()
        shuffled = dict(reversed(obs.items()))
        got = flatten_obs(space, shuffled)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, np.asarray(spaces.flatten(space, obs), np.float32))
    assert flatten_obs(space, obs)[:4].tolist() == obs["z"].ravel().tolist()
    with pytest.raises(EnvError, match="cannot be flattened"):
        flatten_obs(spaces.Sequence(spaces.Discrete(2)), (1,))


def test_a_film_holds_the_episode(tmp_path):
    import imageio.v3 as imageio

    path = tmp_path / "new" / "film.gif"
    assert video(constant(0.0), Counter(render_mode="rgb_array"), path, seed=3) == 20.0
    frames = imageio.imread(path)
    assert [round(x) for x in frames.mean((1, 2, 3))] == [0, 20, 40, 60, 80]
    assert [x.name for x in path.parent.iterdir()] == ["film.gif"]
    assert video(constant(0.0), Counter(render_mode="rgb_array"), path, seed=3, max_steps=2) == 10.0


def test_a_film_is_of_what_is_evaluated(tmp_path):
    """The policy sees as much of a goal's observations, and its actions mean the same."""
    seen, bounds = [], {"act_low": [2.0], "act_high": [4.0], "obs": 5}
    policy = lambda obs: (seen.append(obs[0].tolist()), torch.full((1, 1), 0.5))[1]
    env = lambda **kw: Maze(render_mode="rgb_array", **kw)
    assert video(policy, env, tmp_path / "film.gif", seed=3, **bounds) == 4 * 3.5
    assert evaluator(env, episodes=1, seed=3, **bounds)(policy).tolist() == [4 * 3.5]
    assert seen == [[4, 5, 1, 2, 3]] * 8
    with pytest.raises(EnvError, match="7 wide, the policy's are 4"):
        video(policy, env, tmp_path / "film.gif", obs=4)


def test_a_film_that_cannot_be_made(tmp_path, monkeypatch):
    with pytest.raises(EnvError, match="render_mode None; make it with 'rgb_array'"):
        video(constant(0.0), Counter(), tmp_path / "film.gif")
    with pytest.raises(EnvError, match=r"cannot write .*film\.what.*use a name that ends in \.gif"):
        video(constant(0.0), Counter(render_mode="rgb_array"), tmp_path / "film.what")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    (tmp_path / "folder.gif").mkdir()
    for place, way in (("file/film.gif", "file"), ("file/deeper/film.gif", "file"), ("folder.gif", "folder.gif")):
        with pytest.raises(EnvError, match=f"cannot be written, .*{way} is in the way"):
            worlds.check_film(tmp_path / place)
    worlds.check_film(tmp_path / "new" / "film.gif")
    monkeypatch.setattr(worlds.os, "access", lambda *_: False)
    with pytest.raises(EnvError, match="lets nobody write here"):
        worlds.check_film(tmp_path / "new" / "film.gif")
    assert not (tmp_path / "new").exists()


def test_a_policy_that_remembers_is_told_which_rows_go_on():
    """Two copies, five episodes of one length each: at each end both rows leave and new ones come, the last alone."""
    told = []
    evaluate = evaluator("Pendulum-v1", episodes=5, seed=0, copies=2, max_steps=3)
    plain = evaluate(lambda obs: torch.zeros(len(obs), 1))
    again = evaluate(lambda obs: torch.zeros(len(obs), 1), rows=lambda kept, begun: told.append((kept, begun)))
    assert told == [([], 2), ([], 2), ([], 1), ([], 0)]
    assert (plain == again).all()
