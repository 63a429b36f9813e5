"""D4RL's evaluation environments: closed forms, D4RL's own records, and gymnasium-robotics where that is right."""

import sys
from types import SimpleNamespace

import gymnasium as gym
import gymnasium_robotics
import mujoco
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium_robotics.utils import mujoco_utils
from mbrl_envs import d4rl, scores, tasks
from mbrl_envs.evaluate import EnvError, evaluator, make
from mbrl_envs.scores import D4RL_SCORES, d4rl_table, evaluation_env, identify, reference_scores

gym.register_envs(gymnasium_robotics)
MAZE_IDS = [k for k, v in d4rl_table().items() if v.family in ("maze2d", "antmaze")]
HANDS = ("door", "hammer", "relocate", "pen")


def made(name, **kw):
    return make(f"mbrl_envs.d4rl:D4RL/{name}", **kw)


@pytest.mark.parametrize("name", MAZE_IDS)
def test_every_maze_evaluates_in_itself(name):
    assert evaluation_env(name) == f"mbrl_envs.d4rl:D4RL/{name}"
    known, env = identify(evaluation_env(name)), made(name)
    assert known.scores == reference_scores(name)
    assert known.limit == env.spec.max_episode_steps
    widths = {"maze2d": (4, 2), "antmaze": (29, 8)}[known.family]
    assert (env.observation_space.shape[0], env.action_space.shape[0]) == widths
    ends = tasks.task(evaluation_env(name))
    assert (ends is None) == (known.family == "antmaze"), "an ant's goal is not observed"


@pytest.mark.parametrize("name", ["maze2d-umaze-v1", "antmaze-large-play-v2"])
def test_mazes_are_gymnasium_environments(name):
    check_env(made(name).unwrapped, skip_render_check=True)


# ---------------------------------------------------------------- maze2d


@pytest.mark.parametrize("name", ["UMaze", "Medium", "Large"])
def test_the_point_moves_as_gymnasium_robotics_point_does(name):
    """That one has D4RL's walls and forces, and another origin: along columns, against rows."""
    ours, theirs = made(f"maze2d-{name.lower()}-v1").unwrapped, gym.make(f"PointMaze_{name}-v3").unwrapped
    theirs.reset(seed=0)
    m, layout = theirs.maze, d4rl.MAZES[name.lower()].split()
    assert [[x == "#" for x in row] for row in layout] == [[x == 1 for x in row] for row in m.maze_map]
    place = lambda q: np.array([q[1] + 0.7 - m.x_map_center, m.y_map_center - q[0] - 0.7])
    rng, (obs, _) = np.random.default_rng(0), ours.reset(seed=3)
    theirs.point_env.set_state(place(obs[:2]), np.array([obs[3], -obs[2]]))
    act, fastest = np.zeros(2), 0.0
    for t in range(400):
        act = rng.uniform(-1, 1, 2) if t % 20 == 0 else act
        obs, *_ = ours.step(act)
        other = theirs.point_env.step(np.array([act[1], -act[0]]))[0]
        np.testing.assert_allclose(other, [*place(obs[:2]), obs[3], -obs[2]], atol=1e-9)
        fastest = max(fastest, np.abs(obs[2:]).max())
    assert fastest > 4.9, "so fast that the limit counts"


def test_a_step_in_the_open_is_that_of_a_damped_point():
    """Semi-implicit Euler, of a ball of density 1000 and radius 0.1, under 100 newton."""
    env = made("maze2d-open-v0").unwrapped
    mass, h = 1000 * 4 / 3 * np.pi * 0.1**3, 0.01
    env.place(np.array([2.0, 3.0]), np.array([7.0, -0.5]))  # faster than 5 it is not
    obs, *_ = env.step(np.array([0.3, -2.0]))  # nor is a force beyond 1
    v = np.array([5.0, -0.5])
    v = v + h * (100 * np.array([0.3, -1.0]) - v) / (mass + h)
    np.testing.assert_allclose(obs, [*(np.array([2.0, 3.0]) + h * v), *v], rtol=1e-6)


@pytest.mark.parametrize("name", ["maze2d-umaze-v1", "maze2d-eval-medium-v1", "maze2d-large-dense-v0"])
def test_a_point_begins_anywhere_and_its_goal_stays(name):
    env = made(name).unwrapped
    maze = "-".join(w for w in name.split("-")[1:-1] if w != "dense")
    rows = d4rl.MAZES[maze].split()
    free = {(i, j) for i, row in enumerate(rows) for j, x in enumerate(row) if x != "#"}
    begun, speeds = set(), []
    for seed in range(60 * len(free) // 7):
        obs, _ = env.reset(seed=seed)
        cell = tuple(int(x) for x in np.round(obs[:2]))
        assert np.abs(obs[:2] - cell).max() <= 0.1
        begun.add(cell)
        speeds.append(obs[2:])
    assert begun == free
    assert np.std(speeds) == pytest.approx(0.1, rel=0.2)
    (goal,) = ((i, j) for i, row in enumerate(rows) for j, x in enumerate(row) if x == "G")
    assert tuple(env.goal) == goal
    for far in (0.0, 0.45, 0.55):
        env.place(np.array(goal, float), np.zeros(2))
        env.goal = np.array([goal[0] + far, goal[1]])
        _, reward, terminated, truncated, _ = env.step(np.zeros(2))
        assert reward == pytest.approx(np.exp(-far) if "dense" in name else float(far <= 0.5), abs=1e-6)
        assert not terminated
        assert not truncated


def test_a_policy_that_stands_at_the_goal_earns_every_step():
    returns = evaluator("mbrl_envs.d4rl:D4RL/maze2d-umaze-v1", episodes=40, obs=4)(lambda obs: 0 * obs[:, :2])
    assert set(np.round(returns)) <= {0, 300}, "pushed by nothing, it comes to rest in its cell"
    assert 300 in returns


# ---------------------------------------------------------------- antmaze


def test_the_ant_is_weaker_and_slower_than_gymnasiums():
    env = made("antmaze-umaze-v2").unwrapped
    assert env.model.opt.timestep == 0.02
    assert env.skip == 5
    assert set(env.model.actuator_gear[:, 0]) == {30.0}
    legs = env.model.geom_type != mujoco.mjtGeom.mjGEOM_BOX
    np.testing.assert_allclose(env.model.geom_solimp[legs, :3], [[0.8, 0.8, 0.01]] * legs.sum())
    plain = gym.make("Ant-v4").unwrapped.model
    assert [env.model.joint(i).name for i in range(9)] == [plain.joint(i).name for i in range(9)]
    np.testing.assert_array_equal(env.model.actuator_trnid[:, 0], plain.actuator_trnid[:, 0])
    walls = env.model.geom_pos[~legs]
    assert len(walls) == d4rl.ANT_MAZES["umaze"].count("#")
    np.testing.assert_allclose(walls.min(0)[:2], [-4, -4], err_msg="the ant is at the origin")


@pytest.mark.parametrize(("name", "anew"), [("antmaze-medium-play-v0", False), ("antmaze-medium-play-v2", True)])
def test_an_ant_starts_in_one_corner_and_its_goal_lies_in_the_other(name, anew):
    env, goals = made(name).unwrapped, []
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        assert np.abs(obs[:2]).max() <= 0.1
        assert obs[2] == pytest.approx(0.75, abs=0.1)
        goals.append(tuple(env.goal))
        np.testing.assert_array_equal(env.reset(seed=seed)[0], obs)
    assert len(set(goals)) == (20 if anew else 1)
    goals = np.array(goals)
    assert ((goals >= 20) & (goals <= 21.5)).all(), "cell 6, 6 is five cells of 4 m from cell 1, 1"
    near = np.concatenate([env.goal, obs[2:15]])
    env.place(near, np.zeros(14))
    _, reward, terminated, *_ = env.step(np.zeros(8))
    assert (reward, terminated) == (1.0, True)
    env.place(near + np.array([1.0, *[0] * 14]), np.zeros(14))
    _, reward, terminated, *_ = env.step(np.zeros(8))
    assert (reward, terminated) == (0.0, False)


def test_an_ants_goal_is_reached_through_the_maze():
    """Cells that are free are free in space, and walls are walls."""
    for maze in d4rl.ANT_MAZES:
        env = made(f"antmaze-{maze}-v2" if maze == "umaze" else f"antmaze-{maze}-play-v2").unwrapped
        env.reset(seed=0)
        boxes = env.model.geom_pos[env.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX][:, :2]
        for i, row in enumerate(d4rl.ANT_MAZES[maze].split()):
            for j, x in enumerate(row):
                at = 4.0 * np.array([j - env.origin[0], i - env.origin[1]])
                inside = (np.abs(boxes - at) < 2).all(1).any()
                assert inside == (x == "#")


# ---------------------------------------------------------------- hands


class Stub(gym.Env):
    """A MuJoCo model in a hand's place."""

    observation_space = action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, body):
        self.model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{body}</worldbody></mujoco>")
        self.data = mujoco.MjData(self.model)
        mujoco.mj_forward(self.model, self.data)

    def step(self, action):
        return np.zeros(1), np.nan, False, False, {}


@pytest.mark.parametrize(
    ("far", "angle", "speed", "reward"),
    [
        (0.3824059, 0.01185, 62.5827065, -0.2816496),
        (0.017713, 0.5780851, 27.2643738, 1.8995665),
        (0.0195306, 1.0996317, 64.9555588, 9.9752731),
        (0.1190386, 1.5141917, 87.6898804, 19.986908),
    ],
)
def test_a_door_earns_what_d4rl_recorded(far, angle, speed, reward):
    """Rows of door-human-v0: distance of palm and handle, angle, the sum of squared velocities, the reward."""
    world = Stub(
        f'<site name="S_grasp" pos="{far} 0 0"/><site name="S_handle"/>'
        '<body><geom size="1"/><joint name="door_hinge"/></body><body><geom size="1"/><joint name="other"/></body>'
    )
    world.data.qpos[0], world.data.qvel[1] = angle, speed**0.5
    _, earned, *_ = d4rl.Adroit(world, "door").step(np.zeros(1))
    assert earned == pytest.approx(reward, abs=2e-6)


@pytest.mark.parametrize(
    ("height", "left", "want"),
    [
        (0.0, 0.3, -0.1 * 0.5 - 0.5 - 10 * 0.3 - 1e-2 * 3),
        (0.1, 0.3, -0.1 * 0.5 - 0.5 - 10 * 0.3 - 1e-2 * 3 + 2),
        (0.1, 0.015, -0.1 * 0.5 - 0.5 - 10 * 0.015 - 1e-2 * 3 + 27),
        (0.1, 0.005, -0.1 * 0.5 - 0.5 - 10 * 0.005 - 1e-2 * 3 + 102),
    ],
)
def test_a_hammer_earns_as_in_d4rl(height, left, want):
    world = Stub(
        f'<body name="Object" pos="0 0 {height}"><geom size="1"/><joint/></body>'
        f'<site name="S_grasp" pos="0.5 0 {height}"/>'
        f'<site name="tool" pos="0 0 {height}"/><site name="S_target" pos="0 0.5 {height}"/>'
        f'<site name="nail_goal" pos="{left} 0.5 {height}"/>'
    )
    world.data.qvel[0] = 3.0
    _, earned, *_ = d4rl.Adroit(world, "hammer").step(np.zeros(1))
    assert earned == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("height", "left", "want"),
    [
        (0.0, 0.5, -0.05),
        (0.1, 0.5, -0.05 + 1 - 0.5 * 2**0.5 / 2 - 0.25),
        (0.1, 0.07, -0.05 + 1 - 0.5 * (0.25 + 0.0049) ** 0.5 - 0.035 + 10),
        (0.0, 0.04, -0.05 + 30),
    ],
)
def test_a_relocated_ball_earns_as_in_d4rl(height, left, want):
    world = Stub(
        f'<body name="Object" pos="0 0 {height}"><geom size="1"/></body><site name="S_grasp" pos="0.5 0 {height}"/>'
        f'<site name="target" pos="0 {left} {height}"/>'
    )
    _, earned, *_ = d4rl.Adroit(world, "relocate").step(np.zeros(1))
    assert earned == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("turned", "left", "height", "want", "done"),
    [
        (60, 0.5, 0.2, 0.5 - 0.5, False),
        (20, 0.05, 0.2, np.cos(np.pi / 9) - 0.05 + 10, False),
        (10, 0.05, 0.2, np.cos(np.pi / 18) - 0.05 + 60, False),
        (60, 0.5, 0.07, 0.5 - 0.5 - 5, True),
    ],
)
def test_a_pen_earns_as_in_d4rl_and_must_not_fall(turned, left, height, want, done):
    c, s = np.cos(np.radians(turned)), np.sin(np.radians(turned))
    world = Stub(
        f'<body name="Object" pos="0 0 {height}"><geom size="1"/><site name="object_top" pos="0.1 0 0"/>'
        f'<site name="object_bottom" pos="-0.1 0 0"/></body><site name="eps_ball" pos="{left} 0 {height}"/>'
        f'<site name="target_top" pos="{0.3 * c} {0.3 * s} 0"/><site name="target_bottom"/>'
    )
    _, earned, terminated, *_ = d4rl.Adroit(world, "pen").step(np.zeros(1))
    assert earned == pytest.approx(want, abs=1e-6)
    assert terminated == done


@pytest.mark.parametrize("task", HANDS)
def test_hands_are_gymnasium_robotics_with_d4rls_reward(task):
    """What differs is the sign of one distance, where its version has that wrong."""
    name = f"{task}-expert-v1"
    env, plain = made(name), gym.make(f"AdroitHand{task.capitalize()}-v1").unwrapped
    assert env.spec.max_episode_steps == {"pen": 100}.get(task, 200)
    assert identify(evaluation_env(name)).scores == D4RL_SCORES[task]
    (obs, _), (other, _) = env.reset(seed=1), plain.reset(seed=1)
    gaps = []
    for t in range(60):
        act = np.random.default_rng(t).uniform(-1, 1, env.action_space.shape)
        obs, reward, terminated, *_ = env.step(act)
        other, theirs, *_ = plain.step(act)
        np.testing.assert_allclose(obs, other, atol=1e-9)
        far = {"door": obs[35:38], "relocate": obs[30:33], "hammer": obs[33:36] - obs[36:39], "pen": np.ones(1)}[task]
        ends = tasks.task(evaluation_env(name))
        if task == "pen":
            x = torch.as_tensor(obs)
            assert terminated == bool(ends.terminal(x[None], torch.zeros(1, 24), x[None]))
        gaps.append(float(np.asarray(theirs - reward).squeeze()) / np.linalg.norm(far))
        if terminated:
            break
    assert np.allclose(gaps, 0, atol=1e-6) or np.allclose(gaps, 0.2, atol=1e-6)


def test_a_pen_that_falls_ends_d4rls_task_and_not_gymnasium_robotics():
    """In imagination as in evaluation."""
    ends = {env: tasks.task(env).terminal for env in ("AdroitHandPen-v1", evaluation_env("pen-human-v1"))}
    for name, terminal in ends.items():
        env, fallen = make(name), 0
        env.reset(seed=1)
        for t in range(100):
            obs, _, terminated, *_ = env.step(np.random.default_rng(t).uniform(-1, 1, 24))
            x = torch.as_tensor(obs)[None]
            assert terminal(x, torch.zeros(1, 24), x).tolist() == [terminated]
            fallen += obs[26] < 0.075
            if terminated:
                break
        assert fallen == 1 if terminated else fallen > 1
        assert terminated != identify(name).endless
        env.close()


@pytest.mark.parametrize("task", ["Door", "Hammer", "Relocate"])
def test_who_evaluates_in_a_flawed_reward_is_told(task):
    with pytest.warns(UserWarning, match=f"D4RL/{task.lower()}-expert-v1 is the same environment without that"):
        evaluator(f"AdroitHand{task}-v1", episodes=1).open()


def test_hands_and_kitchens_say_which_extra_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    for name in ("door-human-v1", "kitchen-mixed-v0"):
        with pytest.raises(EnvError, match=r"pip install mbrl-suite\[robotics\]"):
            evaluator(evaluation_env(name)).open()


# ---------------------------------------------------------------- the kitchen


def test_a_kitchen_shows_positions_and_what_is_to_be_done(monkeypatch):
    """By a stand-in with its spaces, which tells what it was asked for and what becomes of each number."""
    asked = {}

    class Counter(gym.Env):
        observation_space = spaces.Dict(observation=spaces.Box(-9, 99, (59,)), rest=spaces.Box(0, 1, (1,)))
        action_space = spaces.Box(-1, 1, (9,))
        width = 59

        def reset(self, *, seed=None, options=None):
            return {"observation": np.arange(self.width, dtype=float), "rest": np.zeros(1)}, {}

    monkeypatch.setattr(d4rl, "make", lambda name, **kw: (asked.update(kw, name=name), Counter())[1])
    env = d4rl.kitchen("mixed")
    assert asked["name"] == "FrankaKitchen-v1"
    assert asked["tasks_to_complete"] == ["microwave", "kettle", "bottom burner", "light switch"]
    assert asked["terminate_on_tasks_completed"]
    assert asked["remove_task_when_completed"]
    obs, _ = env.reset()
    assert obs[:30].tolist() == [*range(9), *range(18, 39)]
    goal = np.zeros(30)
    goal[[11, 12, 17, 18, 22]] = -0.88, -0.01, -0.69, -0.05, -0.75
    goal[23:] = -0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06
    assert obs[30:].tolist() == goal.tolist()
    Counter.width = 60
    with pytest.raises(EnvError, match=r"\(60,\), expected \(59,\)"):
        env.reset()


@pytest.fixture
def plain_mujoco(monkeypatch):
    """gymnasium-robotics as it comes, whatever was made before."""
    monkeypatch.setattr(mujoco_utils, "mujoco", mujoco)


@pytest.mark.parametrize("name", ["FetchReach-v4", "FrankaKitchen-v1"])
def test_what_asks_for_the_kinds_of_joints_can_be_made(name, plain_mujoco):
    env = make(name)
    kinds, shown = mujoco.mjtJoint, mujoco_utils.mujoco
    assert [np.int32(int(x)) in (getattr(shown.mjtJoint, k),) for k, x in kinds.__members__.items()] == [True] * 4
    assert shown.mj_forward is mujoco.mj_forward
    scores.robotics()
    assert mujoco_utils.mujoco is shown, "once is enough"
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.close()


def test_a_mujoco_whose_kinds_are_numbers_is_left_as_it_is(monkeypatch):
    apart = SimpleNamespace(mjtJoint=SimpleNamespace(mjJNT_HINGE=3))
    monkeypatch.setattr(mujoco_utils, "mujoco", apart)
    scores.robotics()
    assert mujoco_utils.mujoco is apart
    monkeypatch.setitem(sys.modules, "gymnasium_robotics.utils.mujoco_utils", None)  # another version has none
    scores.robotics()


@pytest.mark.parametrize("quality", ["complete", "mixed"])
def test_a_kitchen_pays_once_for_each_of_four_things_and_is_done_with_the_last(quality, plain_mujoco):
    name = f"kitchen-{quality}-v0"
    env = make(evaluation_env(name))
    world = env.unwrapped
    obs, _ = env.reset(seed=0)
    assert env.spec.max_episode_steps == identify(name).limit == 280
    assert obs.shape == env.observation_space.shape == (60,)
    np.testing.assert_allclose(obs[:30], world.data.qpos, atol=0.02, err_msg="9 of the arm, 21 of objects; with noise")
    where = {n: slice(first, first + len(x)) for n, (first, x) in d4rl.ELEMENTS.items()}
    want = np.zeros(30)
    for task in d4rl.KITCHEN[quality]:
        want[where[task]] = world.goal[task]
    np.testing.assert_array_equal(obs[30:], want)
    for _ in range(3):
        obs, reward, terminated, truncated, _ = env.step(np.zeros(9))
        assert (reward, terminated, truncated) == (0.0, False, False)
        np.testing.assert_allclose(obs[:30], world.data.qpos, atol=0.02)
    earned = []
    for task in d4rl.KITCHEN[quality]:
        state = world.data.qpos.copy()
        state[where[task]] = world.goal[task]
        world.robot_env.set_state(state, np.zeros_like(world.data.qvel))
        earned += [env.step(np.zeros(9))[1:3] for _ in range(2)]
        if earned[-2][1]:
            break
    assert earned[:-1] == [(1.0, False), (0.0, False)] * 3 + [(1.0, True)]
    env.close()
