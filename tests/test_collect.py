"""Collected files against a direct replay of the environment, and the training that makes their policies."""

import json
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from gymnasium import spaces
from mbrl_envs import collect as c
from mbrl_envs.datasets import load

DATA = Path(c.__file__).parent / "data"


class Walk(gym.Env):
    """A step counter with a Dict observation, ended by the task after five steps; goals are drawn at each reset."""

    observation_space = spaces.Dict({"goal": spaces.Box(-9, 9, (1,), np.float64), "at": spaces.Discrete(8)})
    action_space = spaces.Box(-1, np.array([1, 3], np.float32), (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal, self.at = self.np_random.uniform(-9, 9, 1), 0
        return self.obs(), {}

    def obs(self):
        return {"goal": self.goal, "at": np.int64(self.at)}

    def step(self, action):
        self.at += 1
        return self.obs(), float(action.sum()), self.at == 5, self.at == 5, {}


class Lines(Walk):
    observation_space = spaces.Sequence(spaces.Discrete(3))


class Own(Walk):
    """Counts steps in one array of its own, which is also what it returns."""

    observation_space = spaces.Box(-9, 9, (1,), np.float32)
    seen = np.zeros(1, np.float32)

    def obs(self):
        self.seen[:] = self.at
        return self.seen


class Endless(Own):
    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        return obs, reward, False, False, info


gym.register("Endless-v0", f"{__name__}:Endless", disable_env_checker=True)
gym.register("Own-v0", f"{__name__}:Own", disable_env_checker=True)
gym.register("Walk-v0", f"{__name__}:Walk", disable_env_checker=True)
gym.register("Local-v0", lambda: Walk(), disable_env_checker=True)  # noqa: PLW0108 - cannot be written down
gym.register("Lines-v0", f"{__name__}:Lines", disable_env_checker=True)


def read(path):
    with h5py.File(path) as f:
        return {k: v[()] for k, v in f.items()}, dict(f.attrs)


def tiny(tmp_path, **kw):
    given = {"env": "Pendulum-v1", "steps": 450, "out": tmp_path / "x.hdf5", "runs": tmp_path / "runs"}
    return c.CollectConfig(**given | kw)


def learned(tmp_path, **kw):
    given = {"steps": 250, "train_steps": 200, "eval_every": 100, "eval_episodes": 2, "width": 16}
    given |= {} if kw["quality"] == "expert" else {"target_return": -1e4}
    return tiny(tmp_path, **given | kw)


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    """A saved policy and the data that were drawn from it. Its training ends between two evaluations."""
    config = learned(tmp_path_factory.mktemp("expert"), quality="expert", deterministic=True, train_steps=250)
    c.collect(config)
    return config, next(config.runs.glob("*.zip"))


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Hopper-v5"])
def test_rows_are_what_the_environment_does(env_id, tmp_path):
    config = tiny(tmp_path, env=env_id, seed=3)
    data, attrs = read(c.collect(config))
    env = gym.make(env_id)
    env.action_space.seed(0)
    ends = []
    obs, _ = env.reset(seed=c.seeds(3, 4))
    for i in range(450):
        np.testing.assert_array_equal(data["observations"][i], np.float32(obs))
        obs, reward, terminal, timeout, _ = env.step(data["actions"][i])
        np.testing.assert_array_equal(data["next_observations"][i], np.float32(obs))
        assert data["rewards"][i] == np.float32(reward)
        assert data["terminals"][i] == terminal
        last = i == 449
        assert data["timeouts"][i] == ((timeout or last) and not terminal)
        if terminal or timeout or last:
            ends.append(i)
            obs, _ = env.reset()
    assert attrs["episodes"] == len(ends) > 2
    starts = [0, *(i + 1 for i in ends)]
    returns = [data["rewards"][a:b].sum() for a, b in pairwise(starts)]
    want = [np.mean(returns), np.min(returns), np.max(returns)]
    np.testing.assert_allclose([attrs[f"return_{k}"] for k in ("mean", "min", "max")], want, rtol=1e-5)
    assert attrs["terminated"] == data["terminals"].sum()
    np.testing.assert_array_equal(attrs["action_low"], env.action_space.low)
    np.testing.assert_array_equal(attrs["action_high"], env.action_space.high)
    assert data["actions"].dtype == data["observations"].dtype == np.float32
    assert data["terminals"].dtype == data["timeouts"].dtype == bool


def test_random_actions_fill_the_bounds_evenly(tmp_path):
    data, _ = read(c.collect(tiny(tmp_path, env="Walk-v0", steps=4000)))
    act = data["actions"]
    assert act.min(0) == pytest.approx([-1, -1], abs=0.01)
    assert act.max(0) == pytest.approx([1, 3], abs=0.01)
    assert act.mean(0) == pytest.approx([0, 1], abs=0.08)
    assert act.var(0) == pytest.approx([1 / 3, 4 / 3], rel=0.1)


def test_nested_observations_are_flattened_and_an_end_is_the_tasks_where_both_hold(tmp_path):
    data, attrs = read(c.collect(tiny(tmp_path, env="Walk-v0", steps=12)))
    at = spaces.flatten_space(Walk.observation_space)
    assert data["observations"].shape == (12, at.shape[0])
    np.testing.assert_array_equal(np.flatnonzero(data["terminals"]), [4, 9])  # also truncated there: the task wins
    np.testing.assert_array_equal(np.flatnonzero(data["timeouts"]), [11])
    assert attrs["episodes"] == 3


def test_an_environment_may_write_on_what_it_returned(tmp_path):
    data, _ = read(c.collect(tiny(tmp_path, env="Own-v0", steps=10)))
    np.testing.assert_array_equal(data["observations"][:, 0], [*range(5)] * 2)
    np.testing.assert_array_equal(data["next_observations"], data["observations"] + 1)


def test_compact_keeps_what_followed_each_episode(tmp_path):
    full, _ = read(c.collect(tiny(tmp_path, env="Hopper-v5")))
    small, attrs = read(c.collect(tiny(tmp_path, env="Hopper-v5", out=tmp_path / "y", compact=True, compression=0)))
    assert "next_observations" not in small
    assert attrs["command"].endswith("--compact --compression 0")
    after = np.concatenate([small["observations"][1:], small["observations"][:1]])
    ends = small["terminals"] | small["timeouts"]
    after[ends] = small["final_observations"]
    np.testing.assert_array_equal(after, full["next_observations"])


# ---------------------------------------------------------------- provenance


def test_the_same_config_writes_the_same_bytes(tmp_path):
    digest = lambda **kw: sha256(c.collect(tiny(tmp_path, **kw)).read_bytes()).hexdigest()
    first = digest()
    torch.rand(3), np.random.rand(3)  # noqa: NPY002
    assert digest(out=tmp_path / "elsewhere.hdf5") == first
    assert digest(overwrite=True, seed=1) != first


def test_attributes_say_how_the_file_came_about(tmp_path):
    _, attrs = read(c.collect(tiny(tmp_path, seed=4)))
    assert attrs["command"] == "mbrl collect --env Pendulum-v1 --quality random --steps 450 --seed 4"
    assert (attrs["env_id"], attrs["quality"], attrs["seed"], attrs["dt"]) == ("Pendulum-v1", "random", 4, 0.05)
    assert json.loads(attrs["versions"])["gymnasium"] == gym.__version__


def test_an_id_may_bring_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    env = 'Pendulum-v1{"g": 1.6, "max_episode_steps": 20}'
    path = c.collect(replace(tiny(tmp_path, env=env, steps=60, minari=True), out=None))
    assert path == Path("Pendulum-v1-g-1.6-max_episode_steps-20-random.hdf5")
    data, twin = load(path), load("minari:mbrl/Pendulum-v1-g-1-6-max_episode_steps-20/random-v0")
    assert (data.lengths.tolist(), data.env, data.act_high.item()) == ([20] * 3, env, 2)
    torch.testing.assert_close(data.next_obs, twin.next_obs)
    assert f"--env '{env}' " in data.meta["attributes"]["command"]
    with pytest.raises(c.CollectError, match=r"no environment 'Pendulum-v1.*no_such"):
        c.collect(tiny(tmp_path, env='Pendulum-v1{"no_such": 1}'))


def test_the_command_states_the_target_that_was_looked_up(tmp_path, monkeypatch):
    scores = tmp_path / "scores.json"
    scores.write_text('{"Pendulum-v1": {"min": -1200, "max": -150}, "Ant-v5": {"min": -50, "max": null}}')
    monkeypatch.setattr(c, "SCORES", scores)
    config = c.CollectConfig("Pendulum-v1", "medium")
    assert "--target-return -850.0" in c.command(config)
    with pytest.raises(c.CollectError, match=r"best score of Ant-v5.*--target-return"):
        c.collect(tiny(tmp_path, env="Ant-v5", quality="medium"))


@pytest.mark.parametrize("path", sorted(DATA.glob("*.hdf5")), ids=lambda p: p.stem)
def test_embedded_data_are_whole_and_small(path):
    data, attrs = read(path)
    assert path.stat().st_size < 2.5e6
    ends = data["terminals"] | data["timeouts"]
    assert ends[-1]
    assert not (data["terminals"] & data["timeouts"]).any()
    inside = ~ends[:-1]
    np.testing.assert_array_equal(data["next_observations"][:-1][inside], data["observations"][1:][inside])
    assert (np.abs(data["actions"]) <= attrs["action_high"]).all()
    starts = np.concatenate([[0], np.flatnonzero(ends) + 1])
    assert np.add.reduceat(data["rewards"], starts[:-1]).mean() == pytest.approx(attrs["return_mean"], rel=1e-5)
    assert attrs["command"] in (DATA / "README.md").read_text()
    env = gym.make(str(attrs["env_id"]))
    if attrs["env_id"] == "Pendulum-v1":  # its reward is a function of the row
        angle = np.arctan2(data["observations"][:, 1], data["observations"][:, 0])
        reward = -(angle**2 + 0.1 * data["observations"][:, 2] ** 2 + 0.001 * data["actions"][:, 0] ** 2)
        np.testing.assert_allclose(data["rewards"], reward, atol=2e-4)
    assert data["observations"].shape[1:] == env.observation_space.shape


# ---------------------------------------------------------------- trained policies


def test_the_actor_is_stable_baselines3s(expert):
    from stable_baselines3 import SAC

    config, path = expert
    model = SAC.load(path)
    data, attrs = read(config.out)
    want = model.predict(data["observations"], deterministic=True)[0]
    np.testing.assert_allclose(data["actions"], want, atol=2e-5)
    assert attrs["policy_steps"] == 250  # an expert is trained to the end, whatever its return


def test_the_actors_noise_is_its_gaussians(expert):
    """tanh(mean + std noise), with the mean and std that stable-baselines3 computes."""
    from stable_baselines3 import SAC

    path = expert[1]
    policy = SAC.load(path).policy
    obs = torch.tensor([[0.6, 0.8, -1.0]])
    mean, log_std, _ = policy.actor.get_action_dist_params(obs)
    act = c.load_actor(path, "Pendulum-v1")(obs[0].numpy(), np.float32([0.7]))
    want = 2 * torch.tanh(mean + 0.7 * log_std.exp())
    assert act == pytest.approx(want[0].detach().numpy(), abs=1e-5)
    plus = c.load_actor(path, "Pendulum-v1")(obs[0].numpy(), None, np.float32([9.0]))
    assert plus == pytest.approx([2.0])  # extra noise is added after the squashing, and clipped


def test_a_saved_policy_stands_in_for_training(expert, tmp_path):
    config, path = expert
    again = tiny(tmp_path, quality="expert", steps=250, policy=path, deterministic=True, runs=tmp_path / "none")
    data, attrs = read(c.collect(again))
    trained, _ = read(config.out)
    for name in data:
        np.testing.assert_array_equal(data[name], trained[name])
    assert attrs["policy_sha256"] == sha256(path.read_bytes()).hexdigest()
    assert not (tmp_path / "none").exists()
    noisy, _ = read(c.collect(replace(again, deterministic=False, out=tmp_path / "noisy.hdf5")))
    assert np.abs(noisy["actions"] - data["actions"]).max() > 0.1
    shaken, attrs = read(c.collect(replace(again, noise=0.1, out=tmp_path / "shaken.hdf5")))
    mean = np.stack([c.load_actor(path, "Pendulum-v1")(obs) for obs in shaken["observations"]])
    off = (shaken["actions"] - mean)[np.abs(mean) < 1.4] / 2  # in units of half the range
    assert np.std(off) == pytest.approx(0.1, rel=0.2)
    assert attrs["command"].endswith("--noise 0.1")


def test_medium_stops_where_the_target_is_first_reached(tmp_path):
    told = []
    config = learned(tmp_path, quality="medium", steps=5)
    _, attrs = read(c.collect(config, progress=lambda *a: told.append(a)))
    assert attrs["policy_steps"] == 100  # the first evaluation is good enough
    training = [(step, figures) for step, total, figures in told if total == 200]
    assert [step for step, _ in training] == [100]
    assert training[0][1]["return"] == attrs["policy_return"]
    assert told[-1][:2] == (5, 5)
    with pytest.raises(c.CollectError, match=r"in 200 steps .* expected 0; raise --train-steps"):
        c.collect(replace(config, target_return=0.0, overwrite=True))


def test_medium_replay_is_what_the_learners_saw(tmp_path):
    """Each of three learners stops at its first evaluation; their rows follow one another, and the last is cut."""
    config = learned(tmp_path, quality="medium-replay")
    first = c.collect(config)
    data, attrs = read(first)
    assert attrs["learners"] == 3
    np.testing.assert_array_equal(np.flatnonzero(data["timeouts"]), [99, 199, 249])
    _, seen, _ = c.train(config, 1, -1e4, 200, tmp_path / "p.zip", None)
    np.testing.assert_array_equal(data["observations"][100:200], np.float32(seen.obs))
    assert not np.isin(data["observations"][100:], data["observations"][:100]).all(1).any()  # another start and seed
    np.testing.assert_array_equal(data["actions"][100:200], seen.act)
    assert np.abs(data["actions"]).max() > 1  # the environment's units, not [-1, 1]
    assert first.read_bytes() == c.collect(replace(config, out=tmp_path / "second")).read_bytes()


def test_spread_keeps_whole_episodes_from_all_of_the_training():
    n = 1000
    flag = np.zeros(n, bool)
    flag[9::10] = True
    x = np.arange(n, dtype=float)[:, None]
    steps = c.Steps(x, x, x[:, 0], x + 1, flag, np.zeros(n, bool))
    kept = c.spread(steps, 205)
    assert len(kept.reward) == 205
    assert kept.timeout.nonzero()[0].tolist() == [204]
    firsts = kept.obs[::10, 0] // 10
    assert (kept.obs[:200, 0].reshape(20, 10) % 10 == np.arange(10)).all()
    assert (np.diff(firsts) > 0).all()
    np.testing.assert_allclose(np.diff(firsts), 1000 / 205, atol=1)
    whole = c.spread(steps, n)
    np.testing.assert_array_equal(whole.obs, x)
    assert not whole.timeout.any()


def test_training_leaves_the_callers_randomness_alone(tmp_path):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    want = torch.rand(4), np.random.rand(4)  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    c.collect(learned(tmp_path, quality="medium", steps=5))
    assert torch.equal(torch.rand(4), want[0])
    np.testing.assert_array_equal(np.random.rand(4), want[1])  # noqa: NPY002


# ---------------------------------------------------------------- minari


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Walk-v0"])
def test_minari_holds_the_same_steps(env_id, tmp_path, monkeypatch):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    config = tiny(tmp_path, env=env_id, steps=120, minari=True)
    data, _ = read(c.collect(config))
    with pytest.raises(c.CollectError, match=r"Minari dataset mbrl/\S+/random-v0 exists"):
        c.collect(replace(config, out=tmp_path / "other.hdf5"))
    c.collect(replace(config, overwrite=True))  # replaces both
    found = minari.load_dataset(f"mbrl/{env_id}/random-v0")
    assert found.env_spec.id == env_id
    assert found.total_steps == 120
    start = 0
    for episode in found:
        end = start + len(episode.actions)
        obs = episode.observations
        if env_id == "Walk-v0":  # in the declared order of the environment's own space
            parts = [np.eye(8)[obs["at"]], obs["goal"]]
            obs = np.concatenate(parts if next(iter(Walk.observation_space.spaces)) == "at" else parts[::-1], 1)
        np.testing.assert_array_equal(data["observations"][start:end], np.float32(obs[:-1]))
        np.testing.assert_array_equal(data["next_observations"][start:end], np.float32(obs[1:]))
        np.testing.assert_array_equal(data["actions"][start:end], episode.actions)
        np.testing.assert_array_equal(data["rewards"][start:end], np.float32(episode.rewards))
        np.testing.assert_array_equal(data["terminals"][start:end], episode.terminations)
        np.testing.assert_array_equal(data["timeouts"][start:end], episode.truncations)
        start = end
    assert start == 120


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env": "NoSuchThing-v0"}, "no environment 'NoSuchThing-v0'"),
        ({"env": "no_such_module:Thing-v0"}, "no environment"),
        ({"env": "CartPole-v1"}, r"CartPole-v1 has actions Discrete\(2\), expected a Box"),
        ({"env": "Lines-v0"}, r"Lines-v0 has observations Sequence.*flattens to a vector"),
        ({"env": "Local-v0", "minari": True}, "Local-v0 cannot be stored with a Minari dataset"),
        ({"steps": 0}, "--steps is 0, expected at least 1"),
        ({"train_steps": -1}, "--train-steps is -1, expected at least 1"),
        ({"seed": -1}, "--seed is -1"),
        ({"noise": float("nan")}, "--noise is nan"),
        ({"target_return": float("nan"), "quality": "medium"}, "--target-return is nan"),
        ({"compression": 10}, "--compression is 10"),
        ({"quality": "good"}, "--quality is 'good', expected one of random, medium, medium-replay, expert"),
        ({"policy": Path("x.zip")}, "--quality is random, expected medium or expert"),
        ({"policy": Path("no/such.zip"), "quality": "expert"}, r"no policy no/such\.zip"),
        ({"noise": 0.1}, "--noise is 0.1, which --quality random does not read; leave it out"),
        ({"deterministic": True, "quality": "medium-replay"}, "--deterministic is True, which --quality medium-replay"),
        ({"target_return": 0.0, "quality": "expert"}, "--target-return is 0.0, which --quality expert does"),
        ({"width": 8, "policy": Path("x.zip"), "quality": "medium"}, "--width is 8, .* medium with --policy does not"),
    ],
)
def test_errors(change, message, tmp_path):
    with pytest.raises(c.CollectError, match=message):
        c.collect(tiny(tmp_path, **change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["out", "runs"])
def test_where_nothing_can_be_written_is_said_before_anything_is_trained(option, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(c, "train", None)
    place = tmp_path / "file" / "x"
    with pytest.raises(c.CollectError, match=rf"nothing can be written to .*file.* pass another --{option}"):
        c.collect(learned(tmp_path, quality="medium", **{option: place}))


def test_a_policy_is_not_judged_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(c.evaluators, "ENDLESS", 50)
    with pytest.raises(c.CollectError, match="an episode of Endless-v0 took 50 steps and the environment states no"):
        c.measure("Endless-v0", 1, 0)
    assert c.measure("Pendulum-v1", 1, 0).shape == (1,)
    assert len(read(c.collect(tiny(tmp_path, env="Endless-v0", steps=60)))[0]["rewards"]) == 60


def test_an_existing_file_is_kept(tmp_path):
    out = tmp_path / "x.hdf5"
    out.write_text("mine")
    with pytest.raises(c.CollectError, match=r"x\.hdf5 exists already; .* --overwrite"):
        c.collect(tiny(tmp_path))
    assert out.read_text() == "mine"
    c.collect(tiny(tmp_path, overwrite=True))
    assert len(read(out)[0]["rewards"]) == 450


def test_a_policy_of_another_task_or_of_none_is_refused(expert, tmp_path):
    with pytest.raises(c.CollectError, match=r"maps 3 observations to 1 actions, expected 11 to 3 as in Hopper-v5"):
        c.collect(tiny(tmp_path, env="Hopper-v5", quality="expert", policy=expert[1]))
    broken = tmp_path / "broken.zip"
    broken.write_bytes(expert[1].read_bytes()[:1000])
    with pytest.raises(c.CollectError, match=r"broken\.zip: cannot be read as a stable-baselines3 checkpoint"):
        c.collect(tiny(tmp_path, quality="expert", policy=broken))


def test_a_policy_of_other_layers_is_refused(tmp_path):
    from stable_baselines3 import SAC

    layers = {"net_arch": [4], "activation_fn": torch.nn.Tanh}
    path = tmp_path / "tanh.zip"
    SAC("MlpPolicy", "Pendulum-v1", policy_kwargs=layers, buffer_size=1, device="cpu").save(path)
    with pytest.raises(c.CollectError, match=r"tanh\.zip: its activation is .*Tanh.*, expected ReLU"):
        c.load_actor(path, "Pendulum-v1")


@pytest.mark.parametrize("minari", [False, True])
def test_an_interrupt_leaves_nothing(minari, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def stop(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        c.collect(tiny(tmp_path), progress=stop)
    if minari:
        import minari.dataset.minari_storage as storage

        monkeypatch.setattr(storage.MinariStorage, "update_metadata", stop)
    else:
        monkeypatch.setattr(h5py.AttributeManager, "__setitem__", stop)
    with pytest.raises(KeyboardInterrupt):
        c.collect(tiny(tmp_path, minari=minari))
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".hdf5", ".tmp") or p.name.startswith("random-v0")]
