import hashlib
import io
import json
import urllib.error
import warnings
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mbrl_envs import datasets, evaluate, overview, scores, tasks
from mbrl_envs.datasets import DataError, load
from rich.console import Console

from mbrl.data import Dataset


def columns(lengths=(5, 4, 6), obs=3, act=2, seed=0, ended=(True, False, True)):
    """D4RL's columns of episodes that walk at random, each from a place of its own far from the others."""
    rng = np.random.default_rng(seed)
    out = {k: [] for k in ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts")}
    for i, (n, end) in enumerate(zip(lengths, ended, strict=True)):
        path = 100 * (i + 1) + np.cumsum(0.1 * rng.normal(size=(n + 1, obs)), 0)
        flag = np.arange(n) == n - 1
        parts = (path[:-1], path[1:], rng.uniform(-1, 1, (n, act)), rng.normal(size=n), flag & end, flag & (not end))
        for key, x in zip(out, parts, strict=True):
            out[key].append(x)
    data = {k: np.concatenate(v) for k, v in out.items()}
    return {k: x if x.dtype == bool else x.astype(np.float32) for k, x in data.items()}


def write(path, data, **attrs):
    with h5py.File(path, "w") as file:
        for key, x in data.items():
            file[key] = x
        file.attrs.update(attrs)
    return path


def check(data: Dataset):
    """What holds for every Dataset, whatever it came from."""
    n = len(data)
    for x, dtype in ((data.obs, torch.float32), (data.act, torch.float32), (data.reward, torch.float32)):
        assert x.dtype == dtype
        assert len(x) == n
        assert x.isfinite().all()
    assert data.next_obs.shape == data.obs.shape
    assert data.next_obs.isfinite().all()
    assert data.act.abs().max() <= 1
    assert data.terminal.dtype == data.paired.dtype == torch.bool
    assert data.starts.dtype == torch.int64
    assert data.starts[0] == 0
    assert data.starts[-1] == n
    assert (data.lengths > 0).all()
    inner = torch.ones(n, dtype=torch.bool)
    inner[data.starts[1:] - 1] = False
    assert data.paired[inner].all()  # inside an episode every step has its successor,
    rows = inner.nonzero()[:, 0]
    torch.testing.assert_close(data.next_obs[rows], data.obs[rows + 1], rtol=1e-4, atol=1e-4)  # the following row,
    assert not data.terminal[inner].any()  # and no end
    assert torch.equal(data.next_obs[~data.paired], data.obs[~data.paired])
    assert json.loads(json.dumps(dict(data.meta))) == dict(data.meta)
    assert data.meta["terminations"] == int(data.terminal.sum())
    assert data.meta["terminations"] + data.meta["timeouts"] == data.episodes == data.meta["episodes"]
    return data


# ---------------------------------------------------------------- D4RL's files


def test_a_complete_file_comes_out_as_it_went_in(tmp_path):
    raw = columns()
    path = write(tmp_path / "walk.hdf5", raw)
    data = check(load(path))
    for key, x in (("observations", data.obs), ("next_observations", data.next_obs), ("actions", data.act)):
        np.testing.assert_array_equal(x.numpy(), raw[key])
    np.testing.assert_array_equal(data.reward.numpy(), raw["rewards"])
    np.testing.assert_array_equal(data.terminal.numpy(), raw["terminals"])
    assert data.starts.tolist() == [0, 5, 9, 15]
    assert data.paired.all()
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (data.name, data.env, data.dt) == ("walk", "", 1.0)
    assert data.meta["file"] == "walk.hdf5"
    assert str(tmp_path) not in json.dumps(dict(data.meta))  # a dataset is known by its name, not by its place
    assert torch.equal(load(str(path)).obs, data.obs)


def test_without_next_observations_the_last_step_of_an_episode_is_unpaired(tmp_path):
    raw = columns()
    del raw["next_observations"]
    data = check(load(write(tmp_path / "a.hdf5", raw)))
    assert data.starts.tolist() == [0, 5, 9, 15]
    assert (~data.paired).nonzero()[:, 0].tolist() == [4, 8, 14]
    assert data.terminal.nonzero()[:, 0].tolist() == [4, 14]


def test_without_timeouts_an_episode_ends_where_the_successor_is_not_the_next_observation(tmp_path):
    raw = columns()
    del raw["timeouts"]
    data = check(load(write(tmp_path / "a.hdf5", raw)))
    assert data.starts.tolist() == [0, 5, 9, 15]
    assert data.terminal.nonzero()[:, 0].tolist() == [4, 14]
    assert data.meta["unmarked_ends"] == 1
    del raw["next_observations"]  # now nothing but the terminals marks an end
    assert check(load(write(tmp_path / "b.hdf5", raw))).starts.tolist() == [0, 5, 15]


def test_without_timeouts_the_time_limit_of_the_task_ends_an_episode(tmp_path):
    raw = columns(lengths=(450, 120), ended=(False, False))
    del raw["timeouts"], raw["next_observations"]
    data = load(write(tmp_path / "a.hdf5", raw, env_id="Pendulum-v1", action_low=[-1.0] * 2, action_high=[1.0] * 2))
    assert data.starts.tolist() == [0, 200, 400, 570]
    assert (~data.paired).nonzero()[:, 0].tolist() == [199, 399, 569]


def test_rows_out_of_order_are_told_of(tmp_path):
    raw = columns((40, 40, 40), ended=(False,) * 3)
    order = np.random.default_rng(0).permutation(120)
    with pytest.warns(UserWarning, match=r"a\.hdf5.*of 120 steps.*in order of time"):
        data = check(load(write(tmp_path / "a.hdf5", {k: x[order] for k, x in raw.items()})))
    assert data.paired.all()


def test_terminals_of_human_demonstrations_are_no_terminations_even_where_the_task_can_end(tmp_path):
    raw, lengths = door(np.random.default_rng(1), obs=45, act=24)
    data = check(load(write(tmp_path / "pen-human-v1.hdf5", raw)))
    assert data.lengths.tolist() == lengths
    assert not data.terminal.any()
    for name in ("pen-expert-v1.hdf5", "renamed.hdf5"):
        data = load(write(tmp_path / name, raw))
        assert int(data.terminal.sum()) == len(lengths)
        assert data.env == "mbrl_envs.d4rl:D4RL/pen-expert-v1", "where a fall ends an episode, too"
    data = load(write(tmp_path / "other.hdf5", raw, env_id="AdroitHandPen-v1"))
    assert (data.lengths.tolist(), data.terminal.any().item()) == (lengths, False), "there it does not"


def test_successors_made_by_shifting_are_not_believed_at_an_end(tmp_path):
    raw = columns()
    raw["next_observations"] = np.roll(raw["observations"], -1, 0)
    data = check(load(write(tmp_path / "a.hdf5", raw)))
    assert (~data.paired).nonzero()[:, 0].tolist() == [4, 8, 14]


def test_final_observations_pair_the_ends(tmp_path):
    raw = columns()
    after = raw.pop("next_observations")
    raw["final_observations"] = after[[4, 8, 14]]
    data = check(load(write(tmp_path / "a.hdf5", raw)))
    assert data.paired.all()
    np.testing.assert_array_equal(data.next_obs.numpy(), after)
    raw["final_observations"] = after[[4, 8]]
    with pytest.raises(DataError, match=r"final_observations.*\[2, 3\].*\[3, 3\]"):
        load(write(tmp_path / "b.hdf5", raw))


def door(rng, episodes=6, limit=20, obs=39, act=28):
    """As D4RL's door-human-v0: `terminals` at the real ends, `timeouts` at the time limit that each demonstration
    outlives, no `next_observations`."""
    out = {k: [] for k in ("observations", "actions", "rewards", "terminals", "timeouts")}
    for _ in range(episodes):
        n = limit + int(rng.integers(5, 15))
        start = np.concatenate([np.zeros(obs - 4), rng.uniform(-1, 1, 4)])
        out["observations"].append(start + np.cumsum(0.05 * rng.normal(size=(n, obs)) + 0.05, 0))
        out["actions"].append(rng.uniform(-1, 1, (n, act)))
        out["rewards"].append(rng.normal(size=n))
        out["terminals"].append(np.arange(n) == n - 1)
        out["timeouts"].append(np.arange(n) == limit - 1)
    data = {k: np.concatenate(v) for k, v in out.items()}
    return {k: x if x.dtype == bool else x.astype(np.float32) for k, x in data.items()}, [
        len(x) for x in out["rewards"]
    ]


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("door-human-v0.hdf5", "mbrl_envs.d4rl:D4RL/door-human-v0"),
        ("door-v0_demos_clipped.hdf5", "mbrl_envs.d4rl:D4RL/door-human-v0"),
        ("renamed.hdf5", "AdroitHandDoor-v1"),
    ],
)
def test_demonstrations_that_outlive_the_time_limit_are_whole_and_not_terminated(tmp_path, name, env):
    raw, lengths = door(np.random.default_rng(1))
    data = check(load(write(tmp_path / name, raw)))
    assert data.lengths.tolist() == lengths
    assert not data.terminal.any()
    assert data.env == env
    assert data.meta["ignored_timeouts"] == len(lengths)
    assert int((~data.paired).sum()) == len(lengths)


def test_a_time_out_that_is_followed_by_a_jump_still_ends_an_episode(tmp_path):
    raw, lengths = door(np.random.default_rng(1))
    # as in a file that joins demonstrations with rollouts: the second episode is cut at the limit
    drop = slice(lengths[0] + 20, lengths[0] + lengths[1])
    raw = {k: np.delete(x, drop, 0) for k, x in raw.items()}
    data = check(load(write(tmp_path / "door-cloned-v0.hdf5", raw)))
    assert data.lengths.tolist() == [lengths[0], 20, *lengths[2:]]


def test_where_a_task_can_end_terminals_are_terminations_and_time_outs_ends(tmp_path):
    raw, lengths = door(np.random.default_rng(1), obs=11, act=3)
    data = check(load(write(tmp_path / "hopper-medium-v2.hdf5", raw)))
    assert data.episodes == 2 * len(lengths)
    assert int(data.terminal.sum()) == len(lengths)
    assert (data.env, data.name, data.dt) == ("Hopper-v4", "hopper-medium-v2", 0.008)
    assert (data.meta["min_score"], data.meta["max_score"]) == (-20.272305, 3234.3)


def test_terminals_of_a_task_that_never_ends_are_no_terminations(tmp_path):
    data = check(load(write(tmp_path / "a.hdf5", columns(act=6, obs=17), env_id="HalfCheetah-v5")))
    assert data.starts.tolist() == [0, 5, 9, 15]
    assert not data.terminal.any()
    assert (data.env, data.dt) == ("HalfCheetah-v5", 0.05)


def test_v5_data_take_our_scores_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "V5_FILE", tmp_path / "v5_scores.json")
    path = write(tmp_path / "hopper-medium-v5.hdf5", columns(obs=11, act=3), env_id="Hopper-v5")
    assert "min_score" not in load(path).meta
    scores.V5_FILE.write_text(json.dumps({"Hopper-v5": {"min": 1, "max": 3500, "command": ""}}))
    assert load(path).meta["max_score"] == 3500
    raw = columns(obs=11, act=3)
    other = write(tmp_path / "hopper-medium-v2.hdf5", raw, env_id="Hopper-v5")  # the file's word against its name's
    assert (load(other).env, load(other).meta["max_score"]) == ("Hopper-v5", 3500)


@pytest.mark.parametrize(
    ("stated", "env"),
    [
        ("hopper-medium-v2", "Hopper-v4"),
        ("hopper-medium-v5", "Hopper-v5"),
        ("Hopper-v3", "Hopper-v3"),
        ("NeoRL/Hopper-v3", "mbrl_envs.scores:NeoRL/Hopper-v3"),
        ("nobodys/Hopper-v5", "nobodys/Hopper-v5"),
    ],
)
def test_a_file_that_states_a_datasets_id_evaluates_where_that_does(stated, env, tmp_path):
    assert load(write(tmp_path / "a.hdf5", columns(obs=11, act=3), env_id=stated)).env == env


def test_embedded_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "EMBEDDED", tmp_path)
    write(tmp_path / "pendulum.hdf5", columns(act=1), env_id="Pendulum-v1", action_low=[-2.0], action_high=[2.0])
    data = check(load("embedded:pendulum"))
    assert (data.name, data.env, data.meta["kind"]) == ("embedded:pendulum", "Pendulum-v1", "embedded")
    assert datasets.embedded() == ["embedded:pendulum"]
    with pytest.raises(DataError, match=r"embedded:pendlum.*embedded:pendulum"):
        load("embedded:pendlum")


# ---------------------------------------------------------------- actions


def test_actions_are_rescaled_by_the_stated_bounds_and_back(tmp_path):
    raw = columns()
    low, high = np.array([-2.0, 0.0]), np.array([2.0, 5.0])
    raw["actions"] = (low + (raw["actions"] + 1) / 2 * (high - low)).astype(np.float32)
    data = check(load(write(tmp_path / "a.hdf5", raw, action_low=low, action_high=high)))
    back = data.act_low + (data.act + 1) / 2 * (data.act_high - data.act_low)
    np.testing.assert_allclose(back.numpy(), raw["actions"], atol=1e-5)
    assert data.meta["clipped"] == 0
    assert (data.act < 0).any()


def test_actions_are_rescaled_by_the_bounds_of_the_environment(tmp_path):
    raw = columns(act=1)
    raw["actions"] *= 2
    data = load(write(tmp_path / "a.hdf5", raw, env_id="Pendulum-v1"))
    np.testing.assert_allclose(data.act.numpy(), raw["actions"] / 2, atol=1e-6)
    with pytest.warns(UserWarning, match="beyond"):
        data = load(write(tmp_path / "b.hdf5", raw, env_id="MountainCarContinuous-v0"))
    assert data.act_high.tolist() == [1.0]  # one that is in no table here: asked of the environment itself
    said = r"the action space of .*CartPole-v1.* is Discrete\(2\), expected a Box, .* correct env_id"
    with pytest.raises(DataError, match=rf"c\.hdf5: {said}"):
        load(write(tmp_path / "c.hdf5", raw, env_id="CartPole-v1"))
    for env in ("CartPole-v1", gymnasium.make("CartPole-v1")):
        with pytest.raises(DataError, match=f"mapping: {said}"):
            load(raw, env=env)


def test_what_is_in_memory_or_an_npz_states_its_world_as_a_file_does(tmp_path):
    raw = columns(act=1)
    stated = {"env_id": "Pendulum-v1", "action_low": [-4.0], "action_high": [2.0], "dt": 0.1}
    want = load(write(tmp_path / "a.hdf5", raw, **stated))
    np.savez(tmp_path / "a.npz", **raw, **stated)
    for got in (load(raw | stated), load(tmp_path / "a.npz")):
        assert torch.equal(got.act, want.act)
        assert (got.act_low.item(), got.act_high.item(), got.env, got.dt) == (-4, 2, "Pendulum-v1", 0.1)
    assert load(raw | stated).sha256 != load(raw).sha256  # one model does not serve both


def test_a_key_that_is_missing_is_told_with_those_that_are_there(tmp_path):
    raw = columns()
    raw["terminations"] = raw.pop("terminals")
    with pytest.raises(DataError, match=r"'terminals' is missing.*got actions, .*rewards, terminations, timeouts;"):
        load(write(tmp_path / "a.hdf5", raw))


class Sent(gymnasium.Env):
    """Of asymmetric bounds and of observations that are not in the order of the alphabet."""

    dt = 0.2
    action_space = spaces.Box(np.array([-1.0]), np.array([3.0]), dtype=np.float64)
    observation_space = spaces.Dict([("v", spaces.Box(-9, 9, (1,))), ("a", spaces.Box(-9, 9, (1,)))])


def test_the_environment_of_what_is_in_memory_may_be_named(tmp_path):
    e = episode(3, np.random.default_rng(0)) | {"actions": np.array([[-1.0], [1.0], [3.0]])}
    e["observations"] = {"a": np.full((4, 1), 1.0), "v": np.full((4, 1), 2.0)}
    data = check(load([e], env=Sent()))
    assert (data.act.flatten().tolist(), data.dt, data.env) == ([-1, 0, 1], 0.2, "")
    assert data.obs[0].tolist() == [2.0, 1.0]  # as a policy will be shown them
    e["actions"] = np.array([[-2.0], [1.0], [2.0]])
    data = load([e], env="Pendulum-v1")
    assert (data.act.flatten().tolist(), data.dt, data.env) == ([-1, 0.5, 1], 0.05, "Pendulum-v1")
    with pytest.raises(DataError, match="says itself"):
        load(write(tmp_path / "a.hdf5", columns()), env="Pendulum-v1")


def test_a_bound_that_is_infinite_leaves_the_others(tmp_path):
    raw = columns(act=3)
    raw["actions"] *= np.float32([2, 1, 4])
    bounds = {"action_low": [-2.0, -np.inf, -4.0], "action_high": [2.0, np.inf, 4.0]}
    data = check(load(write(tmp_path / "a.hdf5", raw, **bounds)))
    assert data.act_low.tolist() == [-2, -1, -4]
    assert data.act_high.tolist() == [2, 1, 4]
    np.testing.assert_allclose(data.act.numpy(), raw["actions"] / [2, 1, 4], atol=1e-6)
    raw["actions"][3, 1] = 1.5
    with pytest.raises(DataError, match=r"no finite bounds in the coordinates \[1\], where actions reach 1.5"):
        load(write(tmp_path / "a.hdf5", raw, **bounds))


def test_actions_beyond_the_bounds_are_clipped_counted_and_warned_of(tmp_path):
    raw = columns()
    raw["actions"][[1, 1, 7], [0, 1, 0]] = [1.5, -3.0, 1.01]
    raw["actions"][2, 0] = np.float32(1 + 1e-7)  # rounding is no excess
    path = write(tmp_path / "a.hdf5", raw)
    with pytest.warns(UserWarning, match=r"a\.hdf5.*'actions'.*3 components, in 2 of 15 steps.*furthest 3"):
        data = load(path)
    assert (data.meta["clipped"], data.meta["clipped_rows"]) == (3, 2)
    with pytest.warns(UserWarning, match="no others are stated: state action_low and action_high"):
        load(path)
    with pytest.warns(UserWarning, match="no others are stated and Crat-v0 cannot be made here: state action_low"):
        load(raw, env="Crat-v0")
    np.testing.assert_array_equal(data.act.numpy(), np.clip(raw["actions"], -1, 1))
    with pytest.raises(DataError, match=r"3 components.*strict"):
        load(path, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(write(tmp_path / "b.hdf5", columns()), strict=True)


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"action_low": [-1.0], "action_high": [1.0]}, "1 entries.*2 wide"),
        ({"action_low": [1.0, 1.0], "action_high": [1.0, 1.0]}, "expected low < high"),
        ({"action_low": [-1.0, -1.0]}, "only one of"),
        ({"action_low": "x", "action_high": "y"}, "expected numbers"),
        ({"action_low": [np.nan, 0], "action_high": [1.0, 1.0]}, "expected numbers"),
        ({"dt": -1.0}, "above 0"),
        ({"dt": np.inf}, "dt is inf, expected finite seconds"),
    ],
)
def test_bad_attributes(tmp_path, attrs, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "a.hdf5", columns(), **attrs))


# ---------------------------------------------------------------- bad files


def bad(key, change):
    def apply(raw):
        raw[key] = change(raw[key])

    return apply


def put(value):
    def change(x):
        x = x.copy()
        x[3] = value
        return x

    return change


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda raw: raw.pop("observations"), ["observations", "missing"]),
        (lambda raw: raw.pop("rewards"), ["rewards", "missing"]),
        (lambda raw: raw.pop("terminals"), ["terminals", "missing"]),
        (bad("observations", lambda x: x[:, 0]), ["observations", "[15]", "[steps, width]"]),
        (bad("actions", lambda x: x[:, 0]), ["actions", "[15]", "[steps, width]"]),
        (bad("actions", lambda x: x[:, :0]), ["actions", "[15, 0]"]),
        (bad("rewards", lambda x: np.stack([x, x], 1)), ["rewards", "[15, 2]", "[steps]"]),
        (bad("rewards", lambda x: x[:-1]), ["rewards", "14", "15"]),
        (bad("next_observations", lambda x: x[:, :2]), ["next_observations", "[15, 2]", "[15, 3]"]),
        (bad("observations", put(np.nan)), ["observations", "nan", "[3, 0]", "finite"]),
        (bad("rewards", put(-np.inf)), ["rewards", "-inf", "[3]", "finite"]),
        (bad("actions", put(np.inf)), ["actions", "inf", "finite"]),
        (bad("observations", lambda x: x.astype(float) * 1e300), ["observations", "inf", "float32"]),
        (bad("actions", lambda x: np.zeros(len(x), int)), ["actions", "discrete", "Box"]),
        (bad("terminals", lambda x: 2 * x.astype(int)), ["terminals", "2", "0 and 1"]),
        (bad("rewards", lambda x: x.astype("S8")), ["rewards", "dtype", "|S8"]),
        (lambda raw: raw.update({k: x[:0] for k, x in raw.items()}), ["0 steps", "empty"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, spoil, words):
    raw = columns()
    spoil(raw)
    with pytest.raises(DataError) as error:
        load(write(tmp_path / "broken.hdf5", raw))
    for word in ["broken.hdf5", *words]:
        assert word in str(error.value)


def test_flags_may_be_numbers_and_columns_may_have_a_unit_axis(tmp_path):
    raw = columns()
    want = load(write(tmp_path / "a.hdf5", raw))
    raw |= {k: raw[k].astype(np.float64)[:, None] for k in ("rewards", "terminals", "timeouts")}
    raw["observations"] = raw["observations"].astype(np.float64)
    got = check(load(write(tmp_path / "b.hdf5", raw)))
    assert torch.equal(got.reward, want.reward)
    assert torch.equal(got.terminal, want.terminal)
    assert torch.equal(got.starts, want.starts)


@pytest.mark.parametrize("source", ["", " "])
def test_no_source_at_all_is_not_taken_for_this_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=f"got '{source}' as a source of data, expected a path, .*; name one"):
        load(source)


def test_files_that_are_none(tmp_path):
    empty, text, group = tmp_path / "a.hdf5", tmp_path / "b.hdf5", tmp_path / "c.hdf5"
    empty.touch()
    text.write_text("not a dataset at all")
    with h5py.File(group, "w") as file:
        file.create_group("observations")
        for key in ("actions", "rewards", "terminals"):
            file[key] = h5py.Empty("f4")
    minari = write(tmp_path / "d.hdf5", {"episode_0/actions": np.zeros(3)})
    cases = {empty: "is empty", text: "cannot be read as HDF5", group: "expected an array", minari: "minari:<id>"}
    for path, message in cases.items():
        with pytest.raises(DataError, match=message) as error:
            load(path)
        assert path.name in str(error.value)
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "absent.hdf5")
    with pytest.raises(DataError, match="Minari"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"did you mean.*hopper-medium-v2"):
        load("hoper-medium-v2")
    with pytest.raises(DataError, match="npz"):
        load("Hopper-v3-low-100")
    with pytest.raises(DataError, match="int object"):
        load(3)


def valid(path, tmp_path):
    """load either raises DataError, naming the file, or gives a valid Dataset; nothing new lies in the folder."""
    before = sorted(tmp_path.iterdir())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = load(path)
    except DataError as error:
        assert path.name in str(error)  # noqa: PT017
        assert {*";?"} & {*str(error).partition(": ")[2]}, "and what to do"  # noqa: PT017
        return None
    finally:
        assert sorted(tmp_path.iterdir()) == before
    return check(data)


several = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@several
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files(tmp_path, share):
    whole = write(tmp_path / "whole.hdf5", columns()).read_bytes()
    path = tmp_path / "cut.hdf5"
    path.write_bytes(whole[: int(share * len(whole))])
    assert valid(path, tmp_path) is None


@several
@given(at=st.floats(0, 1, exclude_max=True), bits=st.binary(min_size=1, max_size=16), packed=st.booleans())
def test_overwritten_bytes(tmp_path, at, bits, packed):
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for key, x in columns().items():
            file.create_dataset(key, data=x, compression="gzip" if packed else None)
    whole = bytearray(path.read_bytes())
    start = int(at * len(whole))
    whole[start : start + len(bits)] = bits[: len(whole) - start]
    path.write_bytes(whole)
    valid(path, tmp_path)


@several
@given(data=st.data())
def test_spoiled_columns(tmp_path, data):
    raw = columns()
    for key in data.draw(st.lists(st.sampled_from(sorted(raw)), min_size=1, max_size=2, unique=True)):
        x = raw.pop(key)
        kind = data.draw(st.sampled_from(["drop", "value", "dtype", "rank", "length", "group"]))
        if kind == "value":
            x = x.astype(np.float64)
            at = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
            x[at] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e300, 7.0, -0.5]))
        elif kind == "dtype":
            x = x.astype(data.draw(st.sampled_from(["f2", "f8", "i4", "u1", "c8", "S4", "?"])))
        elif kind == "rank":
            x = data.draw(st.sampled_from([x[None], x[..., None], x.ravel(), x.reshape(len(x), -1)[:, 0], x.sum()]))
        elif kind == "length":
            x = x[: data.draw(st.integers(0, len(x)))]
        if kind != "drop":
            raw[f"{key}/x" if kind == "group" else key] = x
    valid(write(tmp_path / "a.hdf5", raw), tmp_path)


@several
@given(data=st.data())
def test_episode_ends_never_pair(tmp_path, data):
    """Whatever the flags and whichever optional column is there: the rules of `check`, and a known number of ends."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    ended = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    raw = columns(lengths, ended=ended)
    gone = data.draw(st.sampled_from([(), ("next_observations",), ("timeouts",)]))
    for key in gone:
        del raw[key]
    got = valid(write(tmp_path / "a.hdf5", raw), tmp_path)
    assert got is not None
    assert got.lengths.tolist() == lengths
    assert got.terminal[got.starts[1:] - 1].tolist() == ended
    assert bool(got.paired.all()) == ("next_observations" not in gone)


# ---------------------------------------------------------------- D4RL ids


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty dataset folder, a home of its own, and no network."""

    def none(url):
        raise urllib.error.URLError("no network")
        yield

    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "shelf"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(datasets, "_fetch", none)
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


def hopper(path):
    return write(path, columns(obs=11, act=3))


@pytest.mark.parametrize("name", ["hopper-medium-v2.hdf5", "hopper_medium-v2.hdf5"])
def test_an_id_is_looked_up_under_both_names(shelf, name, monkeypatch, tmp_path):
    hopper(shelf / name)
    data = load("hopper-medium-v2")
    assert (data.name, data.env, data.meta["file"]) == ("hopper-medium-v2", "Hopper-v4", name)
    home = tmp_path / ".d4rl" / "datasets"
    home.mkdir(parents=True)
    (shelf / name).rename(home / name)
    assert load("hopper-medium-v2").name == "hopper-medium-v2"
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert load("hopper-medium-v2").name == "hopper-medium-v2"


def test_without_network_the_error_says_what_to_place_where(shelf):
    with pytest.raises(DataError) as error:
        load("hopper-medium-v2")
    for word in ("hopper-medium-v2.hdf5", "hopper_medium-v2.hdf5", str(shelf), "gym_mujoco_v2", "no network"):
        assert word in str(error.value)
    assert not list(shelf.iterdir())


def serve(monkeypatch, content, total=None, fail=None):
    asked = []

    def fetch(url):
        asked.append(url)
        half = len(content) // 2
        yield content[:half], total
        if fail:
            raise fail
        yield content[half:], total

    monkeypatch.setattr(datasets, "_fetch", fetch)
    return asked


def test_a_download_is_reported_checked_and_kept(shelf, monkeypatch, tmp_path):
    content = hopper(tmp_path / "source.hdf5").read_bytes()
    asked, seen = serve(monkeypatch, content, len(content)), []
    data = load("hopper-medium-v2", progress=lambda done, total: seen.append((done, total)))
    assert len(data) == 15
    assert asked == [scores.d4rl_table()["hopper-medium-v2"].url]
    assert [p.name for p in shelf.iterdir()] == ["hopper_medium-v2.hdf5"]
    assert seen == [(len(content) // 2, len(content)), (len(content), len(content))]
    load("hopper-medium-v2")
    assert len(asked) == 1  # the second time it was here


@pytest.mark.parametrize(
    ("make", "total", "fail", "message"),
    [
        (lambda whole: whole[:-100], 0, None, "expected"),
        (lambda whole: whole[:-100], None, None, "no HDF5"),
        (lambda whole: b"<html>sign in</html>", None, None, "no HDF5"),
        (lambda whole: whole, 0, ConnectionResetError("reset"), "could not be downloaded.*reset"),
        (lambda whole: None, None, None, "actions.*missing"),
    ],
)
def test_a_broken_download_leaves_nothing(shelf, monkeypatch, tmp_path, make, total, fail, message):
    whole = hopper(tmp_path / "source.hdf5").read_bytes()
    content = make(whole)
    if content is None:
        raw = columns()
        del raw["actions"]
        content = write(tmp_path / "source.hdf5", raw).read_bytes()
    serve(monkeypatch, content, len(whole) if total == 0 else None, fail)
    with pytest.raises(DataError, match=message):
        load("hopper-medium-v2")
    assert not list(shelf.iterdir())


def test_an_interrupted_download_leaves_nothing(shelf, monkeypatch, tmp_path):
    serve(monkeypatch, hopper(tmp_path / "source.hdf5").read_bytes(), None, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load("hopper-medium-v2")
    assert not list(shelf.iterdir())


def test_fetch_reads_blocks_and_the_length(monkeypatch):
    class Response(io.BytesIO):
        headers = {"Content-Length": "300000"}  # noqa: RUF012

    monkeypatch.setattr(datasets.urllib.request, "urlopen", lambda url, timeout: Response(bytes(300000)))
    blocks = list(datasets._fetch("http://example.org/a.hdf5"))
    assert [total for _, total in blocks] == [300000] * 2
    assert sum(len(block) for block, _ in blocks) == 300000


# ---------------------------------------------------------------- NeoRL


def neorl(lengths, width=12, act=3):
    raw = columns(lengths, width, act, ended=[False] * len(lengths))
    done = raw["terminals"].copy()
    done[np.cumsum(lengths) - 1] = True
    out = {"obs": raw["observations"], "next_obs": raw["next_observations"], "action": raw["actions"]}
    return out | {"reward": raw["rewards"][:, None], "done": done[:, None], "index": np.cumsum(lengths)}


def test_neorl(tmp_path):
    path = tmp_path / "Hopper-v3-low-3-train-noise.npz"
    raw = neorl((300, 1000, 20))
    np.savez(path, **raw)
    data = check(load(path))
    assert data.lengths.tolist() == [300, 1000, 20]
    assert data.terminal.nonzero()[:, 0].tolist() == [299, 1319]  # `done` at the limit of 1000 steps is the limit's
    assert data.paired.all()
    np.testing.assert_array_equal(data.reward.numpy(), raw["reward"][:, 0])
    env = gymnasium.make(data.env)
    assert env.observation_space.shape == (12,)
    env.close()
    assert data.meta["max_score"] == 3294
    raw["index"] = raw["index"] - [300, 1000, 20]  # first rows say the same
    np.savez(path, **raw)
    assert load(path).lengths.tolist() == [300, 1000, 20]
    del raw["index"]
    np.savez(path, **raw)
    assert load(path).lengths.tolist() == [300, 1000, 20]
    np.savez(tmp_path / "HalfCheetah-v3-low-3.npz", **neorl((1000, 30), 18, 6))
    assert not load(tmp_path / "HalfCheetah-v3-low-3.npz").terminal.any()


def test_neorl2_keeps_time_outs_apart(tmp_path):
    raw = neorl((5, 4))
    raw["done"][4], raw["truncated"] = False, np.arange(9)[:, None] == 4
    del raw["index"]
    np.savez(tmp_path / "Fusion-train.npz", **raw)
    data = check(load(tmp_path / "Fusion-train.npz"))
    assert data.lengths.tolist() == [5, 4]
    assert data.terminal.nonzero()[:, 0].tolist() == [8]
    assert data.meta["min_score"] == -107.601


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_an_npz_is_never_unpickled(tmp_path):
    raw = neorl((5, 4)) | {"obs": np.array([Bomb(tmp_path / "went off")] * 9, dtype=object)}
    np.savez(tmp_path / "a.npz", **raw)
    with pytest.raises(DataError, match=r"a\.npz"):
        load(tmp_path / "a.npz")
    assert not (tmp_path / "went off").exists()


@several
@given(data=st.data())
def test_spoiled_npz(tmp_path, data):
    path, raw = tmp_path / "Hopper-v3-low-2.npz", neorl((5, 4))
    kind = data.draw(st.sampled_from(["cut", "bits", "drop", "object", "nan", "index"]))
    key = data.draw(st.sampled_from(sorted(raw)))
    if kind == "drop":
        del raw[key]
    elif kind == "object":
        raw[key] = np.array([{"no": "pickles"}] * 9, dtype=object)
    elif kind == "nan":
        raw[key] = np.full(raw[key].shape, data.draw(st.sampled_from([np.nan, 1e300, -3.5])))
    elif kind == "index":
        raw["index"] = np.array(data.draw(st.lists(st.integers(-5, 20), max_size=4)))
    np.savez_compressed(path, **raw)
    whole = path.read_bytes()
    if kind == "cut":
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    elif kind == "bits":
        at = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    valid(path, tmp_path)


# ---------------------------------------------------------------- Minari and episodes in memory


def episode(n, rng, terminated=False, act=2, wrap=lambda x: x):
    flag = np.arange(n) == n - 1
    return {
        "observations": wrap(rng.normal(size=(n + 1, 3))),
        "actions": rng.uniform(-2, 2, (n, act)).astype(np.float32),
        "rewards": rng.normal(size=n),
        "terminations": flag & terminated,
        "truncations": flag & (not terminated),
    }


BOX = spaces.Box(-2, 2, (2,), np.float32)


@pytest.fixture
def minari_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    import minari

    def none(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(minari, "download_dataset", none)
    return minari


def store(minari, name, episodes, obs_space, act_space=BOX, **kw):
    from minari.data_collector import EpisodeBuffer

    buffers = [EpisodeBuffer(id=i, seed=i, **e) for i, e in enumerate(episodes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minari.create_dataset_from_buffers(
            name, buffers, observation_space=obs_space, action_space=act_space, **kw
        )


def test_minari(minari_home, tmp_path):
    rng = np.random.default_rng(0)
    episodes = [episode(5, rng, True), episode(4, rng)]
    space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    stored = store(minari_home, "test/walk-v0", episodes, space, env="Pendulum-v1", ref_min_score=1, ref_max_score=3)
    data = check(load("minari:test/walk-v0"))
    assert data.starts.tolist() == [0, 5, 9]
    assert data.paired.all()  # T + 1 observations: every step has its successor
    assert data.terminal.nonzero()[:, 0].tolist() == [4]
    for i, e in enumerate(episodes):
        rows = slice(data.starts[i], data.starts[i + 1])
        np.testing.assert_allclose(data.obs[rows], e["observations"][:-1], rtol=1e-6)
        np.testing.assert_allclose(data.next_obs[rows], e["observations"][1:], rtol=1e-6)
        np.testing.assert_allclose(data.act[rows], e["actions"] / 2, rtol=1e-6)
        np.testing.assert_allclose(data.reward[rows], e["rewards"], rtol=1e-6)
    assert (data.name, data.env) == ("minari:test/walk-v0", "Pendulum-v1")
    assert datasets.evaluation_env("minari:test/walk-v0") == "Pendulum-v1"
    assert datasets.reference_scores("minari:test/walk-v0") == (1.0, 3.0)
    assert (data.meta["min_score"], data.meta["max_score"]) == (1, 3)
    file = Path(stored.storage.data_path) / "main_data.hdf5"
    assert data.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for same in (load(stored), load(file.parent.parent), load(str(file.parent.parent))):
        assert torch.equal(same.obs, data.obs)
        assert same.sha256 == data.sha256
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DataError, match="test/walk-v0"):
        load("minari:test/walk-v0")


def test_a_part_of_a_minari_dataset_is_not_called_as_the_whole_or_another_part(minari_home):
    """What was fitted to one half would be taken for the other's, of as many steps."""
    rng, space = np.random.default_rng(0), spaces.Box(-np.inf, np.inf, (3,), np.float64)
    stored = store(minari_home, "test/walk-v0", [episode(5, rng) for _ in range(2)], space, env="Pendulum-v1")
    halves = [load(stored.filter_episodes(lambda e, i=i: e.id == i)) for i in range(2)]
    assert not torch.equal(halves[0].obs, halves[1].obs)
    assert len({load(stored).sha256, *(x.sha256 for x in halves)}) == 3
    assert load(stored.filter_episodes(lambda e: e.id == 1)).sha256 == halves[1].sha256


def test_minari_without_reference_scores_takes_the_environments(minari_home, monkeypatch, tmp_path):
    monkeypatch.setattr(scores, "V5_FILE", tmp_path / "v5.json")
    scores.V5_FILE.write_text(json.dumps({"Pendulum-v1": {"min": -1200, "max": -150, "command": ""}}))
    space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    store(minari_home, "test/walk-v0", [episode(5, np.random.default_rng(0))], space, env="Pendulum-v1")
    assert load("minari:test/walk-v0").meta["max_score"] == -150
    assert datasets.reference_scores("minari:test/walk-v0") == (-1200.0, -150.0)


def test_minari_evaluates_where_its_metadata_say(minari_home):
    space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    e = [episode(5, np.random.default_rng(0))]
    store(minari_home, "test/walk-v0", e, space, env="MountainCarContinuous-v0", eval_env="Pendulum-v1")
    assert load("minari:test/walk-v0").env == datasets.evaluation_env("minari:test/walk-v0") == "Pendulum-v1"


def test_a_minari_kitchen_evaluates_in_the_tasks_that_it_states(minari_home):
    scores.robotics()
    spec = replace(gymnasium.spec("FrankaKitchen-v1"), kwargs={"tasks_to_complete": ["kettle"]})
    space, rng = spaces.Box(-np.inf, np.inf, (3,), np.float64), np.random.default_rng(0)
    store(minari_home, "test/kitchen-v0", [episode(5, rng)], space, env=spec)
    env = datasets.evaluation_env("minari:test/kitchen-v0")
    assert env == load("minari:test/kitchen-v0").env == 'FrankaKitchen-v1{"tasks_to_complete": ["kettle"]}'
    made = evaluate.make(env)
    assert made.unwrapped.goal.keys() == {"kettle"}
    assert made.reset(seed=0)[0]["observation"].shape == (59,)
    assert made.step(made.action_space.sample())[1] == 0.0
    made.close()


def test_an_environment_of_other_arguments_is_not_taken_for_its_id(minari_home, recwarn):
    space, e = spaces.Box(-np.inf, np.inf, (3,), np.float64), [episode(5, np.random.default_rng(0))]
    moon = gymnasium.make("Pendulum-v1", g=1.6)
    store(minari_home, "test/moon-v0", e, space, env=moon, ref_min_score=1, ref_max_score=3)
    held = SimpleNamespace(iterate_episodes=lambda: e, action_space=BOX, env_spec=moon.spec)
    for source in ("minari:test/moon-v0", held):
        data = check(load(source))
        assert (data.env, data.dt) == ('Pendulum-v1{"g": 1.6}', 0.05)
        assert tasks.task(data.env) is None
    assert "max_score" not in data.meta
    assert datasets.evaluation_env("minari:test/moon-v0") == data.env
    held.env_spec = gymnasium.make("Pendulum-v1", g=np.float32(1.6)).spec  # which JSON does not hold
    with pytest.warns(UserWarning, match="Pendulum-v1 with another g than"):
        assert load(held).env == ""
    assert datasets.reference_scores("minari:test/moon-v0") == (1.0, 3.0)  # its own
    recwarn.clear()
    held.env_spec = gymnasium.make("Pendulum-v1", g=10, render_mode="rgb_array").spec  # as by default, and drawn
    assert load(held).env == "Pendulum-v1"
    assert not recwarn


def test_dict_observations_are_flattened_in_declared_order(minari_home):
    # OrderedDict keeps the order of the declaration in gymnasium, where a plain dict would be sorted by key
    inner = spaces.Dict(OrderedDict(y=spaces.Box(-9, 9, (1,)), x=spaces.Discrete(3)))
    space = spaces.Dict(OrderedDict(velocity=spaces.Box(-9, 9, (2,)), goal=inner, angle=spaces.Box(-9, 9, (2, 1))))
    rng = np.random.default_rng(0)
    n = 4
    obs = {
        "angle": rng.normal(size=(n + 1, 2, 1)).astype(np.float32),
        "goal": {"x": rng.integers(0, 3, n + 1), "y": rng.normal(size=(n + 1, 1)).astype(np.float32)},
        "velocity": rng.normal(size=(n + 1, 2)).astype(np.float32),
    }
    e = episode(n, rng, wrap=lambda _: obs)
    at = lambda t: {
        "angle": obs["angle"][t],
        "goal": {k: v[t] for k, v in obs["goal"].items()},
        "velocity": obs["velocity"][t],
    }
    want = np.stack([spaces.flatten(space, at(t)) for t in range(n + 1)])
    store(minari_home, "test/dict-v0", [e], space)
    data = check(load("minari:test/dict-v0"))
    np.testing.assert_array_equal(data.obs.numpy(), want[:-1])
    np.testing.assert_array_equal(data.next_obs.numpy(), want[1:])
    np.testing.assert_array_equal(data.obs[:, :2].numpy(), obs["velocity"][:-1])  # as declared, not as sorted
    # in memory, with the space, and without: then in the order of the mapping
    holder = SimpleNamespace(iterate_episodes=lambda: [e], observation_space=space, action_space=BOX)
    np.testing.assert_array_equal(load(holder).obs.numpy(), want[:-1])
    e["observations"] = {"b": np.full((n + 1, 1), 2.0), "a": np.full((n + 1, 1), 1.0)}
    e["actions"] = e["actions"] / 2
    assert load([e]).obs[0].tolist() == [2.0, 1.0]


def test_discrete_actions_and_unknown_minari_ids(minari_home, tmp_path):
    rng = np.random.default_rng(0)
    e = episode(4, rng) | {"actions": rng.integers(0, 2, 4)}
    space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    store(minari_home, "test/discrete-v0", [e], space, spaces.Discrete(2))
    with pytest.raises(DataError, match=r"minari:test/discrete-v0: .* Discrete\(2\), expected a Box.*; choose a task"):
        load("minari:test/discrete-v0")
    with pytest.raises(DataError, match=r"discrete-v1.*no network.*did you mean minari:test/discrete-v0"):
        load("minari:test/discrete-v1")
    for name in ("minari:no version", "minari:../../etc-v0"):
        with pytest.raises(DataError, match=name.split(":")[1][:4].replace(".", r"\.")):
            load(name)
    assert not (tmp_path / "minari" / "test" / "discrete-v1").exists()


@pytest.mark.parametrize("key", datasets.EPISODE)
def test_a_minari_episode_that_lacks_something_says_which_and_what(key, minari_home):
    rng, space = np.random.default_rng(0), spaces.Box(-np.inf, np.inf, (3,), np.float64)
    stored = store(minari_home, "test/walk-v0", [episode(4, rng), episode(5, rng)], space)
    with h5py.File(Path(stored.storage.data_path) / "main_data.hdf5", "a") as file:
        del file["episode_1"][key]
    with pytest.raises(DataError, match=f"minari:test/walk-v0, episode 1: '{key}' is missing; expected .*; record it"):
        load("minari:test/walk-v0")
    with h5py.File(Path(stored.storage.data_path) / "main_data.hdf5", "a") as file:
        del file["episode_1"]  # which is no longer whole
    with pytest.raises(DataError, match=r"'episode_1' doesn't exist.*download it again"):
        load("minari:test/walk-v0")


def test_a_minari_dataset_that_is_absent_is_downloaded(minari_home, monkeypatch, tmp_path):
    space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    asked = []

    def fetch(name):
        asked.append(name)
        store(minari_home, name, [episode(4, np.random.default_rng(0))], space)

    monkeypatch.setattr(minari_home, "download_dataset", fetch)
    assert len(load("minari:test/far-v0")) == len(load("minari:test/far-v0")) == 4
    assert asked == ["test/far-v0"]

    def half(name):
        (tmp_path / "minari" / name).mkdir(parents=True)
        raise ConnectionError("reset")

    monkeypatch.setattr(minari_home, "download_dataset", half)
    with pytest.raises(DataError, match="reset"):
        load("minari:test/other-v0")
    assert not (tmp_path / "minari" / "test" / "other-v0").exists()  # half a dataset is not left to be found


def test_d4rl_and_minari_twins_agree(minari_home, tmp_path):
    raw, lengths = door(np.random.default_rng(3))
    ends = np.cumsum(lengths)
    episodes = []
    for n, end in zip(lengths, ends, strict=True):
        rows, flag = slice(end - n, end), np.arange(n) == n - 1
        obs = raw["observations"][rows]
        obs = np.concatenate([obs, obs[-1:] + 0.1])  # Minari knows what followed the last step
        rest = {"actions": raw["actions"][rows], "rewards": raw["rewards"][rows]}
        episodes.append({"observations": obs, **rest, "terminations": flag & False, "truncations": flag})
    box = spaces.Box(-np.inf, np.inf, (39,), np.float32)
    store(minari_home, "D4RL/door/human-v2", episodes, box, spaces.Box(-1, 1, (28,), np.float32))
    a, b = load(write(tmp_path / "door-human-v0.hdf5", raw)), load("minari:D4RL/door/human-v2")
    for key in ("obs", "act", "reward", "starts", "terminal"):
        assert torch.equal(getattr(a, key), getattr(b, key)), key
    assert torch.equal(a.next_obs[a.paired], b.next_obs[a.paired])
    torch.testing.assert_close(a.returns, b.returns)


def test_episodes_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [episode(5, rng, True), episode(1, rng), episode(4, rng)]
    keys = check(load(SimpleNamespace(iterate_episodes=lambda: episodes, action_space=BOX)))
    attributes = load(
        SimpleNamespace(iterate_episodes=lambda: [SimpleNamespace(**e) for e in episodes], action_space=BOX)
    )
    assert keys.lengths.tolist() == [5, 1, 4]
    assert keys.terminal.nonzero()[:, 0].tolist() == [4]
    assert keys.paired.all()
    assert keys.sha256 == attributes.sha256 != ""
    for e in episodes:
        e["actions"] = e["actions"] / 2
    plain = load(e for e in episodes)  # any iterable; without a space the actions are taken to be in [-1, 1]
    assert torch.equal(plain.act, keys.act)
    assert load(episodes[0]).episodes == 1
    assert load(plain) is not None
    assert torch.equal(load(plain).obs, plain.obs)
    # where episodes repeat their first observation at their end, the pair is a real one
    still = [episode(3, rng, act=1) | {"observations": np.zeros((4, 1)), "actions": np.zeros((3, 1))} for _ in range(2)]
    still = load(still)
    assert still.paired.all()
    assert still.lengths.tolist() == [3, 3]  # though nothing in the observations tells where the first one ends


def test_termination_inside_a_recorded_episode_ends_it():
    e = episode(6, np.random.default_rng(0), True)
    e["terminations"][2] = True
    e["actions"] /= 2
    data = check(load([e]))
    assert data.lengths.tolist() == [3, 3]
    assert data.terminal.nonzero()[:, 0].tolist() == [2, 5]
    assert data.paired.all()


def test_d4rl_columns_in_memory_are_left_as_they_were():
    raw = columns()
    raw["actions"] *= 2
    kept = {k: x.copy() for k, x in raw.items()}
    with pytest.warns(UserWarning, match="beyond"):
        data = check(load(raw))
    assert data.starts.tolist() == [0, 5, 9, 15]
    data.obs.zero_(), data.reward.zero_()
    for key, x in kept.items():
        np.testing.assert_array_equal(raw[key], x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": None}, "episode 1.*'rewards' is missing; expected .*; record it too"),
        ({"observations": np.zeros((4, 3))}, "4 observations and 4 rewards; expected 5 observations"),
        ({"actions": np.zeros((3, 2))}, "3 actions and 4 rewards; expected 4 actions"),
        ({"truncations": np.zeros(5, bool)}, "5 truncations and 4 rewards"),
        ({"actions": np.zeros(4)}, r"'actions' has shape \[4\]"),
        ({"actions": np.zeros(4, int)}, r"episode 1: 'actions' are discrete \(int64\), expected floating .*; choose"),
        ({"actions": {"a": np.zeros((4, 2))}}, r"'actions' is a dict of object, expected an array \[4, width\]"),
        ({"observations": np.full((5, 3), np.nan)}, "'observations' holds nan"),
        ({"observations": np.zeros((5, 2))}, r"\(2, 2\) wide, expected \(3, 2\)"),
        ({"observations": {"a": np.zeros(5), "b": "text"}}, "expected"),
    ],
)
def test_bad_episodes(change, message):
    rng = np.random.default_rng(0)
    good = episode(4, rng)
    with pytest.raises(DataError, match=message):
        load([good, episode(4, rng) | change])
    with pytest.raises(DataError, match="empty"):
        load([])


# ---------------------------------------------------------------- what a person sees


def shown(data):
    console = Console(file=io.StringIO(), width=200)
    console.print(overview.info(data))
    return console.file.getvalue()


def test_info_says_what_is_there(tmp_path):
    raw = columns(obs=11, act=3)
    raw["rewards"][:] = 1.0
    raw["actions"][:] = 0.0
    raw["actions"][:3] = 1.0
    raw["observations"][2, 4] = raw["next_observations"][1, 4] = -777.0
    data = load(write(tmp_path / "hopper-medium-v2.hdf5", raw))
    text = shown(data)
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    for word in (data.sha256, "Hopper-v4", "hopper-medium-v2", "3: 2 ended by the task, 1 cut"):
        assert word in text
    assert "5 on average" in lines["return"]
    assert "4 / 4.5 / 5 / 5.5 / 6" in lines["return"]
    assert "20.0 %" in lines["actions at a bound"]
    assert f"{datasets.normalized_score('hopper-medium-v2', 5.0):.1f} on average" in lines["score"]
    assert "-777" in lines["obs 4"]
    assert "no scale is known" in shown(load(write(tmp_path / "walk.hdf5", columns())))
    assert "obs 24-38" in shown(load(write(tmp_path / "door-human-v0.hdf5", door(np.random.default_rng(0))[0])))


def test_info_says_names_as_they_are(tmp_path):
    data = load(write(tmp_path / "a[old]:door:.hdf5", columns()))
    assert shown(data).count("a[old]:door:") == 2


@pytest.mark.parametrize(("name", "message"), [("", "is a folder"), ("none/figure.png", "there is no folder .*none;")])
def test_draw_says_where_it_cannot_write(name, message, tmp_path):
    with pytest.raises(DataError, match=message):
        overview.draw(load(columns()), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_draw_writes_one_whole_figure(tmp_path):
    from matplotlib import image

    data = load(write(tmp_path / "hopper-medium-v2.hdf5", columns(obs=11, act=3)))
    (tmp_path / "out").mkdir()
    assert overview.draw(data, tmp_path / "out" / "figure.png") == tmp_path / "out" / "figure.png"
    pixels = image.imread(tmp_path / "out" / "figure.png")[..., :3]
    assert pixels.shape[0] > 500
    halves = [half for side in np.array_split(pixels, 2, 0) for half in np.array_split(side, 2, 1)]
    assert all((half.min(-1) < 0.5).mean() > 0.005 for half in halves)  # each of the four panels is drawn in
    with pytest.raises(ValueError, match="nonsense"):
        overview.draw(data, tmp_path / "out" / "figure.nonsense")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["figure.png"]


def test_returns_that_single_precision_cannot_part_are_drawn(tmp_path):
    data = load(columns((5,), ended=(False,)) | {"rewards": np.full(5, -4.4e6, np.float32)})
    overview.draw(data, tmp_path / "figure.png")


@pytest.mark.parametrize("name", ["series.csv", "SERIES.NPY"])
def test_a_series_is_told_from_a_dataset(tmp_path, name):
    (tmp_path / name).write_bytes(b"time,x\n0,1\n")
    with pytest.raises(DataError, match=r"which is a series, expected .*`mbrl reconstruct --data` takes series"):
        load(tmp_path / name)
