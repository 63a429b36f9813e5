"""Checkpoints of stable-baselines3: what goes over comes back, and both sides act and earn the same."""

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from mbrl_envs.adapters import AdapterError, from_sb3, to_sb3
from mbrl_envs.evaluate import evaluator
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from mbrl.core import Spec
from mbrl.data import Transitions
from mbrl.sac import SacConfig

PENDULUM = Spec(3, 1)
SMALL = SacConfig(hidden=(16, 24))


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(config=SMALL, spec=PENDULUM, seeds=2):
    """An agent whose targets have left its critics."""
    agent = config.build(spec, gen(), seeds)
    if config.normalize:
        agent.set_normalizer(torch.linspace(-0.5, 0.5, spec.obs), torch.linspace(0.5, 2, spec.obs))
    g = gen(1)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    for _ in range(5):
        shape = (seeds, 32)
        batch = Transitions(
            draw(*shape, spec.obs),
            draw(*shape, spec.act).tanh(),
            draw(*shape),
            draw(*shape, spec.obs),
            torch.zeros(shape),
        )
        agent.update(batch, draw(2, *shape, spec.act))
    return agent


def inputs(spec=PENDULUM, n=50):
    return torch.randn(n, spec.obs, generator=gen(2)), torch.rand(n, spec.act, generator=gen(3)) * 2 - 1


def act(agent, obs, seed=0):
    return agent.act(obs.expand(agent.seeds, -1, -1))[seed]


def q(agent, obs, act, target=False, seed=0):
    return agent.q(obs.expand(agent.seeds, -1, -1), act.expand(agent.seeds, -1, -1), target)[seed]


def sb3(path) -> Any:
    return SAC.load(path, device="cpu", buffer_size=1)


@pytest.fixture
def pendulum(tmp_path):
    """A new stable-baselines3 SAC and its checkpoint."""
    model = SAC("MlpPolicy", "Pendulum-v1", seed=3, buffer_size=1, policy_kwargs={"net_arch": [16, 24]}, device="cpu")
    model.save(tmp_path / "sac.zip")
    return model, tmp_path / "sac.zip"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("normalize", [False, True])
def test_both_sides_say_the_same(tmp_path, seed, normalize):
    agent = trained(SacConfig(hidden=(16, 24), critics=3, normalize=normalize))
    model = sb3(to_sb3(agent, "Pendulum-v1", tmp_path / "agent.zip", seed))
    obs, some = inputs()
    want = act(agent, obs, seed)
    assert not torch.allclose(want, act(agent, obs, 1 - seed), atol=1e-3)
    got = model.predict(obs.numpy(), deterministic=True)[0]
    np.testing.assert_allclose(got, 2 * want.numpy(), atol=1e-6)
    mean, log_std, _ = model.actor.get_action_dist_params(obs)
    drawn = agent.act(obs.expand(2, -1, -1), torch.full((2, len(obs), 1), 0.7))[seed]
    torch.testing.assert_close((mean + 0.7 * log_std.exp()).tanh(), drawn, atol=1e-6, rtol=1e-5)
    for network, target in ((model.critic, False), (model.critic_target, True)):
        values = torch.cat(network(obs, some), 1).T
        torch.testing.assert_close(values, q(agent, obs, some, target, seed), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(q(agent, obs, some, False, seed), q(agent, obs, some, True, seed), atol=1e-4)
    assert model.log_ent_coef.item() == pytest.approx(agent.log_alpha[seed].item())


def test_there_and_back(tmp_path):
    agent = trained()
    back = from_sb3(to_sb3(agent, "Pendulum-v1", tmp_path / "agent.zip", 1), PENDULUM, SMALL, seeds=3)
    obs, some = inputs()
    for seed in range(3):
        assert torch.equal(act(back, obs, seed), act(agent, obs, 1))
        for target in (False, True):
            assert torch.equal(q(back, obs, some, target, seed), q(agent, obs, some, target, 1))
    assert back.log_alpha.tolist() == [agent.log_alpha[1].item()] * 3
    folded = SacConfig(hidden=(16, 24), normalize=True)
    normal = trained(folded)
    path = to_sb3(normal, "Pendulum-v1", tmp_path / "normal.zip")
    back = from_sb3(path, PENDULUM, folded)
    torch.testing.assert_close(act(back, obs), act(normal, obs), atol=1e-6, rtol=1e-5)
    assert back.obs_std.tolist() == [1.0] * 3
    mean, std = torch.tensor([3.0, -1.0, 0.5]), torch.tensor([0.2, 2.0, 5.0])
    back = from_sb3(path, PENDULUM, folded, normalizer=(mean, std))
    assert torch.equal(back.obs_mean, mean)
    torch.testing.assert_close(act(back, obs), act(normal, obs), atol=1e-5, rtol=1e-4)
    for target in (False, True):
        torch.testing.assert_close(q(back, obs, some, target), q(normal, obs, some, target), atol=1e-5, rtol=1e-4)


def test_returns_agree(tmp_path):
    agent = trained()
    path = to_sb3(agent, "Pendulum-v1", tmp_path / "agent.zip")
    ours = evaluator("Pendulum-v1", episodes=4, seed=11)(lambda obs: act(agent, obs))
    envs = DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 4)
    envs.seed(11)
    theirs: Any
    theirs, lengths = evaluate_policy(sb3(path), envs, 4, return_episode_rewards=True, warn=False)
    assert lengths == [200] * 4
    np.testing.assert_allclose(sorted(theirs), sorted(ours), rtol=1e-4)


def test_a_checkpoint_is_read(pendulum):
    model, path = pendulum
    agent = from_sb3(path, PENDULUM, SMALL, gen(9))
    obs, some = inputs()
    np.testing.assert_allclose(
        model.predict(obs.numpy(), deterministic=True)[0], 2 * act(agent, obs).numpy(), atol=1e-6
    )
    with torch.no_grad():
        for network, target in ((model.critic, False), (model.critic_target, True)):
            torch.testing.assert_close(torch.cat(network(obs, some), 1).T, q(agent, obs, some, target))
    assert from_sb3(path.with_suffix(""), PENDULUM, SMALL).log_alpha.item() == 0


def test_a_fixed_temperature_is_kept(tmp_path):
    model = SAC("MlpPolicy", "Pendulum-v1", ent_coef=0.2, buffer_size=1, policy_kwargs={"net_arch": [8]}, device="cpu")
    model.save(tmp_path / "fixed")
    config = SacConfig(hidden=(8,), alpha_lr=0.0)
    agent = from_sb3(tmp_path / "fixed.zip", PENDULUM, config)
    assert agent.log_alpha.exp().item() == pytest.approx(0.2)
    again = sb3(to_sb3(agent, "Pendulum-v1", tmp_path / "again"))
    assert again.log_ent_coef is None
    assert again.ent_coef_tensor.item() == pytest.approx(0.2)


def test_an_exported_agent_trains_on(tmp_path):
    config = SacConfig(hidden=(16,), gamma=0.9, tau=0.02, critic_lr=1e-3, target_entropy=-3.0)
    path = to_sb3(config.build(PENDULUM, gen()), "Pendulum-v1", tmp_path / "agent")
    assert path.name == "agent.zip"
    assert [x.name for x in tmp_path.iterdir()] == ["agent.zip"]
    model: Any = SAC.load(path, env=gym.make("Pendulum-v1"), device="cpu", custom_objects={"buffer_size": 200})
    assert (model.gamma, model.tau, model.learning_rate, model.target_entropy) == (0.9, 0.02, 1e-3, -3.0)
    before = model.actor.mu.weight.clone()
    model.learn(110)
    assert not torch.equal(before, model.actor.mu.weight)
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("data"))["buffer_size"] == 1_000_000


class Pair(gym.Env):
    """Dict observations, declared in an order that is not the alphabet's."""

    def __init__(self):
        parts: Any = OrderedDict(speed=spaces.Box(-9, 9, (2,)), angle=spaces.Box(-9, 9, (1,)))
        self.observation_space = spaces.Dict(parts)
        self.action_space = spaces.Box(np.array([-1, 0], np.float32), np.array([3, 1], np.float32))


def test_dict_observations(tmp_path):
    spec = Spec(3, 2)
    agent = trained(spec=spec)
    path = to_sb3(agent, Pair(), tmp_path / "agent.zip")
    obs, _ = inputs(spec)
    want = act(agent, obs).numpy() * np.array([2, 0.5]) + np.array([1, 0.5])
    got = sb3(path).predict({"angle": obs[:, 2:].numpy(), "speed": obs[:, :2].numpy()}, deterministic=True)[0]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert torch.equal(act(from_sb3(path, spec, SMALL), obs), act(agent, obs))


def test_actions_that_mean_others_than_the_environments_are_exported_as_such(tmp_path):
    agent = trained()
    path = to_sb3(agent, "Pendulum-v1", tmp_path / "agent.zip", act_low=[-0.5], act_high=[1.5])
    obs, _ = inputs()
    want = 0.5 + act(agent, obs).numpy()
    np.testing.assert_allclose(sb3(path).predict(obs.numpy(), deterministic=True)[0], want, atol=1e-6)
    same = to_sb3(agent, "Pendulum-v1", tmp_path / "same.zip", act_low=[-2.0], act_high=[2.0000001])
    assert sb3(same).action_space == spaces.Box(-2.0, 2.0, (1,))
    for low, high in (([-3.0], [1.0]), ([-1.0, -1.0], [1.0, 1.0]), ([1.0], [1.0])):
        with pytest.raises(AdapterError, match=r"within those of Pendulum-v1, \[-2\.0\] to \[2\.0\]"):
            to_sb3(agent, "Pendulum-v1", tmp_path / "no.zip", act_low=low, act_high=high)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "taken.zip").mkdir()
    with pytest.raises(AdapterError, match=r"taken\.zip is a folder, expected the name of a file"):
        to_sb3(trained(), "Pendulum-v1", tmp_path / "taken")
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(PermissionError))
    with pytest.raises(PermissionError):
        to_sb3(trained(), "Pendulum-v1", tmp_path / "agent.zip")
    assert [x.name for x in tmp_path.iterdir()] == ["taken.zip"]


def test_critics_without_a_counterpart_are_left_out(tmp_path):
    agent = trained(SacConfig(hidden=(16,), layer_norm=True))
    with pytest.warns(UserWarning, match="layer normalisation"):
        path = to_sb3(agent, "Pendulum-v1", tmp_path / "agent.zip")
    obs, _ = inputs()
    np.testing.assert_allclose(sb3(path).predict(obs.numpy(), deterministic=True)[0], 2 * act(agent, obs), atol=1e-6)


def test_agents_that_do_not_fit(tmp_path):
    agent = trained()
    path = tmp_path / "agent.zip"
    with pytest.raises(AdapterError, match=r"4 observations and actions of shape \(1,\), the agent 3 and \(1,\)"):
        to_sb3(agent, "InvertedPendulum-v5", path)
    with pytest.raises(AdapterError, match="Discrete"):
        to_sb3(agent, "CartPole-v1", path)
    with pytest.raises(AdapterError, match=r"seed 2, expected 0 \.\. 1"):
        to_sb3(agent, "Pendulum-v1", path, seed=2)
    with pytest.raises(AdapterError, match="got a Linear, expected a Sac"):
        to_sb3(torch.nn.Linear(2, 2), "Pendulum-v1", path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spec", "config", "match"),
    [
        (Spec(4, 1), SMALL, "reads 3 observations and gives 1 actions, expected 4 and 1"),
        (Spec(3, 2), SMALL, "reads 3 observations and gives 1 actions, expected 3 and 2"),
        (PENDULUM, SacConfig(), r"need SacConfig\(hidden=\(16, 24\), critics=2, layer_norm=False\), got hidden=\(256,"),
        (PENDULUM, SacConfig(hidden=(16, 24), critics=1), "critics=2.*got.*critics=1"),
        (PENDULUM, SacConfig(hidden=(16, 24), layer_norm=True), "layer_norm=False.*got.*layer_norm=True"),
        (PENDULUM, 3, "got a int to build"),
    ],
)
def test_configs_that_do_not_fit(pendulum, spec, config, match):
    with pytest.raises(AdapterError, match=match):
        from_sb3(pendulum[1], spec, config)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PPO("MlpPolicy", "Pendulum-v1", device="cpu"), "expected SAC"),
        (lambda: TD3("MlpPolicy", "Pendulum-v1", buffer_size=1, device="cpu"), "holds TD3, expected SAC"),
        (lambda: SAC("MlpPolicy", "Pendulum-v1", buffer_size=1, use_sde=True, device="cpu"), "use_sde=True"),
        (
            lambda: SAC(
                "MlpPolicy",
                "Pendulum-v1",
                buffer_size=1,
                policy_kwargs={"activation_fn": torch.nn.Tanh, "net_arch": [16, 24]},
            ),
            "activation is .*Tanh.*expected ReLU",
        ),
        (
            lambda: SAC("MlpPolicy", "Pendulum-v1", buffer_size=1, policy_kwargs={"net_arch": {"pi": [8], "qf": [9]}}),
            r"actor has layers of \[8\], its critics others",
        ),
    ],
)
def test_other_policies_are_refused(make, match, tmp_path):
    make().save(tmp_path / "other.zip")
    with pytest.raises(AdapterError, match=match):
        from_sb3(tmp_path / "other.zip", PENDULUM, SMALL)


def rewrite(path, **new):
    """The archive with some members replaced; None removes one."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members.update(new)
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in members.items():
            if raw is not None:
                archive.writestr(name, raw)


def saved(x):
    memory = io.BytesIO()
    torch.save(x, memory)
    return memory.getvalue()


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_no_pickle_is_run(pendulum):
    _, path = pendulum
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    bomb = __import__("base64").b64encode(pickle.dumps(Bomb())).decode()
    for field in ("policy_class", "action_space", "observation_space", "lr_schedule"):
        data[field][":serialized:"] = bomb
    rewrite(path, data=json.dumps(data).encode())
    obs, _ = inputs()
    assert act(from_sb3(path, PENDULUM, SMALL), obs).isfinite().all()  # the pickles among the plain fields: not touched
    rewrite(path, **{"policy.pth": saved({"actor.mu.weight": Bomb()})})
    with pytest.raises(AdapterError, match="holds more than tensors"):
        from_sb3(path, PENDULUM, SMALL)


@pytest.mark.parametrize(
    ("new", "match"),
    [
        ({"policy.pth": None}, "holds no 'policy.pth'"),
        ({"data": None}, "holds no 'data'"),
        ({"data": b"{not json"}, "cannot be read"),
        ({"data": b"[]"}, "not a JSON object"),
        ({"policy.pth": b"garbage"}, "more than tensors|cannot be read"),
        ({"policy.pth": saved([1, 2])}, "expected tensors by name"),
        ({"pytorch_variables.pth": saved({})}, "lacks the temperature"),
        ({"policy.pth": saved({"actor.mu.weight": torch.zeros(1, 24)})}, "no plain SAC"),
    ],
)
def test_damaged_checkpoints(pendulum, new, match):
    rewrite(pendulum[1], **new)
    with pytest.raises(AdapterError, match=match):
        from_sb3(pendulum[1], PENDULUM, SMALL)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("critic.qf0.2.bias"), r"lacks 'critic\.qf0\.2\.bias'"),
        (lambda t: t.update({"actor.features_extractor.0.weight": torch.zeros(1)}), "features_extractor"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("critic_target")], "lacks critic_target"),
        (lambda t: t.update({"critic.qf1.0.weight": torch.zeros(16, 7)}), "weights of shapes"),
    ],
)
def test_damaged_networks(pendulum, change, match):
    _, path = pendulum
    with zipfile.ZipFile(path) as archive:
        tensors = torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)
    change(tensors)
    rewrite(path, **{"policy.pth": saved(tensors)})
    with pytest.raises(AdapterError, match=match):
        from_sb3(path, PENDULUM, SMALL)


def test_no_file_and_no_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.zip: no such file"):
        from_sb3(tmp_path / "none", PENDULUM, SMALL)
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(AdapterError, match="cannot be read as a stable-baselines3 checkpoint"):
        from_sb3(tmp_path / "text.zip", PENDULUM, SMALL)
