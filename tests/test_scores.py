import json
import re

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from mbrl_envs import scores
from mbrl_envs.scores import (
    DataError,
    d4rl_table,
    evaluation_env,
    identify,
    normalized_score,
    reference_scores,
    score_scale,
)


@pytest.fixture
def v5(tmp_path, monkeypatch):
    """A table of measured scores that is the test's own."""
    monkeypatch.setattr(scores, "V5_FILE", tmp_path / "v5_scores.json")
    return lambda **entries: (tmp_path / "v5_scores.json").write_text(json.dumps(entries))


# What D4RL 1.1's infos.py holds, counted by hand: ids of each family, with and without constants of their own.
FAMILIES = {
    r"(hopper|halfcheetah|walker2d)-.*-v0": 15,
    r"ant-.*-v0": 6,
    r"(hopper|halfcheetah|walker2d|ant)-.*-v[12]": 48,
    r"(pen|hammer|relocate|door)-(human|cloned|expert)-v[01]": 24,
    r"maze2d-(open|umaze|medium|large)(-dense)?-v[01]": 14,  # 8 of them in infos.py, the older v0 beside them
    r"maze2d-eval-.*-v1": 6,
    r"antmaze-.*-v[012]": 18,  # 12 in infos.py
    r"kitchen-.*-v0": 3,
    r"flow-.*-v0": 4,
    r"carla-.*-v0": 3,
    r"minigrid-.*-v0": 2,
    r"bullet-(hopper|halfcheetah|walker2d|ant)-.*-v0": 20,
    r"bullet-maze2d-.*-v0": 4,
}


def test_every_id_of_d4rl_is_known_and_has_a_scale_and_a_file():
    table = d4rl_table()
    for pattern, count in FAMILIES.items():
        assert len([n for n in table if re.fullmatch(pattern, n)]) == count, pattern
    assert len(table) == sum(FAMILIES.values())
    assert len({known.url for known in table.values()}) == len(table)
    for name in table:
        low, high = reference_scores(name)
        assert low < high
        assert table[name].url.endswith(".hdf5")


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("hopper-medium-v2", -20.272305, 3234.3),
        ("hopper-full-replay-v1", -20.272305, 3234.3),
        ("halfcheetah-random-v0", -280.178953, 12135.0),
        ("walker2d-medium-expert-v2", 1.629008, 4592.3),
        ("ant-medium-replay-v2", -325.6, 3879.7),
        ("maze2d-open-v0", 0.01, 20.66),
        ("maze2d-open-dense-v0", 11.17817, 27.166538620695782),
        ("maze2d-umaze-v1", 23.85, 161.86),
        ("maze2d-large-dense-v1", 30.569041, 303.4857382709002),
        ("maze2d-eval-medium-v1", 13.07, 204.93),
        ("antmaze-large-diverse-v2", 0, 1),
        ("kitchen-mixed-v0", 0, 4),
        ("pen-cloned-v1", 96.262799, 3076.8331017826877),
        ("hammer-expert-v0", -274.856578, 12794.134825156867),
        ("relocate-human-v1", -6.425911, 4233.877797728884),
        ("door-human-v0", -56.512833, 2880.5693087298737),
        ("flow-ring-controller-v0", -165.22, 24.42),
        ("flow-merge-random-v0", 118.67993, 330.03179),
        ("carla-lane-v0", -0.8503839912088142, 1023.5784385429523),
        ("carla-town-v0", -114.81579500772153, 2440.1772022247314),
        ("minigrid-fourrooms-v0", 0.01442, 2.89685),
        ("bullet-ant-medium-v0", 373.705955, 2650.495),
        ("bullet-maze2d-large-v0", 1.82, 285.92),
        ("HalfCheetah-v3-low-100", -298, 12284),
        ("Hopper-v3-medium-1000-train-noise", 5, 3294),
        ("Walker2d-v3", 1, 5143),
        ("Pipeline", -296, 751),
        ("Simglucose-train", 9.75, 475),
        ("Fusion", -107.601, 98.05),
        ("SafetyHalfCheetah-val", -283, 2507),
    ],
)
def test_reference_scores(name, low, high):
    assert reference_scores(name) == (low, high)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("hopper-medium-v2", "gym_mujoco_v2/hopper_medium-v2.hdf5"),
        ("walker2d-medium-replay-v0", "gym_mujoco/walker_mixed.hdf5"),
        ("halfcheetah-medium-replay-v0", "gym_mujoco/halfcheetah_mixed.hdf5"),
        ("halfcheetah-full-replay-v2", "gym_mujoco_v2/halfcheetah_full_replay-v2.hdf5"),
        ("ant-random-expert-v0", "gym_mujoco/ant_random_expert.hdf5"),
        ("door-human-v0", "hand_dapg/door-v0_demos_clipped.hdf5"),
        ("pen-cloned-v0", "hand_dapg/pen-demos-v0-bc-combined.hdf5"),
        ("pen-cloned-v1", "hand_dapg_v1/pen-cloned-v1.hdf5"),
        ("maze2d-open-v0", "maze2d/maze2d-open-sparse.hdf5"),
        ("maze2d-umaze-v1", "maze2d/maze2d-umaze-sparse-v1.hdf5"),
        ("maze2d-eval-large-dense-v1", "maze2d/maze2d-eval-large-dense-v1.hdf5"),
        (
            "antmaze-medium-play-v2",
            "ant_maze_v2/Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
        ),
        ("antmaze-umaze-v0", "ant_maze_new/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse.hdf5"),
        ("kitchen-complete-v0", "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5"),
        ("flow-ring-controller-v0", "flow/flow-ring-v0-idm.hdf5"),
        ("carla-town-full-v0", "carla/carla_town_flat-v0.hdf5"),
        ("bullet-hopper-medium-replay-v0", "bullet/bullet-hopper_medium_replay.hdf5"),
        ("bullet-maze2d-umaze-v0", "bullet/bullet-maze2d-umaze-sparse.hdf5"),
        ("minigrid-fourrooms-random-v0", "minigrid/minigrid4rooms_random.hdf5"),
    ],
)
def test_files_of_d4rl_and_back(name, base):
    assert d4rl_table()[name].url == scores.D4RL_URL + base
    assert identify(base.rpartition("/")[2].removesuffix(".hdf5")).id == name  # a cached file is known by its name


def test_a_score_is_0_at_the_minimum_100_at_the_maximum_and_scale_has_no_offset():
    low, high = reference_scores("hopper-medium-v2")
    np.testing.assert_allclose(
        normalized_score("hopper-medium-v2", np.array([low, high, (low + high) / 2])), [0, 100, 50]
    )
    assert normalized_score("hopper-medium-v2", high) == pytest.approx(100)
    assert torch.equal(normalized_score((0.0, 10.0), torch.tensor([1.0, 2.0])), torch.tensor([10.0, 20.0]))
    np.testing.assert_allclose(normalized_score((0, 10), [1, 2]), [10, 20])
    returns = np.random.default_rng(0).normal(1000, 200, 50)
    spread = normalized_score("hopper-medium-v2", returns).std()
    assert spread == pytest.approx(score_scale("hopper-medium-v2") * returns.std())
    for pair in ((1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(DataError, match="no scale"):
            normalized_score(pair, 0.0)


def test_evaluation_environments():
    for task, env in {"hopper": "Hopper", "halfcheetah": "HalfCheetah", "walker2d": "Walker2d", "ant": "Ant"}.items():
        for version in ("v0", "v1", "v2"):
            assert evaluation_env(f"{task}-medium-{version}") == f"{env}-v4"
    for name in (
        "door-human-v0",
        "pen-expert-v1",
        "antmaze-medium-diverse-v2",
        "kitchen-partial-v0",
        "maze2d-umaze-v1",
    ):
        assert evaluation_env(name) == f"mbrl_envs.d4rl:D4RL/{name}"
    assert evaluation_env("hopper-medium-v5") == evaluation_env("Hopper-v5") == "Hopper-v5"
    assert evaluation_env("Pendulum-v1") == "Pendulum-v1"
    for name in (
        "flow-ring-random-v0",
        "carla-town-v0",
        "bullet-hopper-medium-v0",
        "minigrid-fourrooms-v0",
        "Pipeline",
    ):
        assert evaluation_env(name) is None


def test_neorl_evaluates_where_the_x_position_is_observed():
    for task, width in {"HalfCheetah": 18, "Hopper": 12, "Walker2d": 18}.items():
        name = evaluation_env(f"{task}-v3-low-100")
        env = gymnasium.make(name)
        assert env.observation_space.shape == (width,)
        assert reference_scores(name) == reference_scores(f"{task}-v3")
        env.close()


@pytest.mark.parametrize("name", ["hoper-medium-v2", "hopper-medum-v2", "hopper-medium"])
def test_an_unknown_id_names_close_ones(name):
    for ask in (evaluation_env, reference_scores):
        with pytest.raises(DataError, match=r"hopper-medium-v2"):
            ask(name)
    with pytest.raises(DataError) as error:
        reference_scores("zzzzzz")
    assert "did you mean" not in str(error.value)


def test_v5_answers_from_our_own_table_or_not_at_all(v5):
    for name in ("Hopper-v5", "hopper-medium-v5"):
        with pytest.raises(DataError, match="no reference scores"):
            reference_scores(name)
    v5(**{"Hopper-v5": {"min": 10, "max": 3500, "command": "mbrl collect ..."}, "Ant-v5": {"min": 3, "max": None}})
    assert reference_scores("Hopper-v5") == reference_scores("hopper-mixed-v5") == (10.0, 3500.0)
    assert reference_scores("hopper-medium-v2") == (-20.272305, 3234.3)  # D4RL's stay D4RL's
    assert reference_scores("Hopper-v4") == reference_scores("hopper-medium-v2")
    with pytest.raises(DataError):
        reference_scores("Ant-v5")


def test_whatever_is_listed_with_scores_has_some(v5):
    v5(**{"Hopper-v5": {"min": 10, "max": 3500}})
    assert {"Hopper-v5", "hopper-medium-v2", "Hopper-v3-low"} < {*scores.names()}
    for name in scores.names():
        reference_scores(name)
    with pytest.raises(DataError, match=r"did you mean .*Walker2d-v5"):
        evaluation_env("Walker2-v5")


def test_an_environment_of_another_namespace_is_not_taken_for_a_task_of_the_same_name(monkeypatch):
    for env in ("lab/Reacher-v0", "mbrl_envs/Reacher-v0"):
        monkeypatch.setitem(gymnasium.registry, env, EnvSpec(env, "lab:Reacher", max_episode_steps=50))
    known = identify("lab/Reacher-v0")
    assert (known.env, known.limit) == ("lab/Reacher-v0", 50)
    assert (known.endless, known.dt, known.bound) == (False, None, None)
    for env in ("mbrl_envs/Reacher-v0", "Reacher-v5"):
        known = identify(env)
        assert (known.endless, known.dt, known.bound) == (True, 0.02, 1.0)


def test_bounds_and_seconds_are_those_of_the_environments():
    names = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5", "halfcheetah": "HalfCheetah-v5", "ant": "Ant-v5"}
    names |= {"humanoid": "Humanoid-v5", "humanoidstandup": "HumanoidStandup-v5", "swimmer": "Swimmer-v5"}
    names |= {"pusher": "Pusher-v5", "reacher": "Reacher-v5", "invertedpendulum": "InvertedPendulum-v5"}
    names |= {"inverteddoublependulum": "InvertedDoublePendulum-v5", "pendulum": "Pendulum-v1"}
    adroit = {"door", "hammer", "relocate", "pen"}
    assert set(names) == set(scores.BOUND) - adroit == set(scores.SECONDS) - adroit
    for family, name in names.items():
        known, env = identify(name), gymnasium.make(name)
        assert known.family == family
        assert known.limit == env.spec.max_episode_steps
        np.testing.assert_allclose(env.action_space.high, known.bound)
        np.testing.assert_allclose(env.action_space.low, -known.bound)
        assert env.unwrapped.dt == pytest.approx(known.dt)
        env.close()
