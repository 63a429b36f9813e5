import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mbrl.baselines import BcConfig, Td3BcConfig
from mbrl.core import Spec
from mbrl.data import Transitions

DOUBLE = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def random_batch(spec, seeds, n, g):
    randn = lambda *shape: torch.randn(seeds, n, *shape, generator=g, dtype=DOUBLE)
    act = torch.rand(seeds, n, spec.act, generator=g, dtype=DOUBLE) * 2 - 1
    terminal = (torch.rand(seeds, n, generator=g) < 0.3).to(DOUBLE)
    return Transitions(randn(spec.obs), act, randn(), randn(spec.obs), terminal)


def random_noise(spec, seeds, n, g):
    return torch.randn(2, seeds, n, spec.act, generator=g, dtype=DOUBLE)


def build(config, seeds=2, spec=Spec(4, 2), seed=0):  # noqa: B008
    agent = config.build(spec, gen(seed), seeds, DOUBLE)
    if config.normalize:
        agent.set_normalizer(torch.arange(4.0), torch.arange(4.0) + 0.5)
    return agent


def plain_net(net, row):
    layers = []
    for w, b in net.linears(row):
        linear = nn.Linear(w.shape[1], w.shape[0], dtype=row.dtype)
        linear.weight.data.copy_(w)
        linear.bias.data.copy_(b)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def same_net(net, row, plain):
    want = [(m.weight.detach(), m.bias.detach()) for m in plain if isinstance(m, nn.Linear)]
    torch.testing.assert_close(net.linears(row), want, atol=1e-8, rtol=1e-7)


# ---------------------------------------------------------------- BC


def test_bc_recovers_a_linear_policy():
    g, spec = gen(1), Spec(3, 2)
    gain = torch.tensor([[0.5, -0.2], [0.1, 0.4], [-0.3, 0.2]])
    agent = BcConfig(hidden=(32,), lr=1e-2, normalize=False).build(spec, g, 2)
    for _ in range(400):
        obs = torch.randn(2, 64, 3, generator=g)
        agent.update(Transitions(obs, (obs @ gain).tanh(), obs[..., 0], obs, obs[..., 0]))
    obs = torch.randn(2, 500, 3, generator=g)
    error = (agent.act(obs) - (obs @ gain).tanh()).square().mean((1, 2)).sqrt()
    assert error.max() < 0.05


def test_bc_updates_are_those_of_a_plain_implementation():
    agent, g = build(BcConfig(hidden=(8, 6), lr=1e-2)), gen(2)
    plain = [plain_net(agent.actor_net, row) for row in agent.actor]
    optimisers = [torch.optim.Adam(p.parameters(), 1e-2) for p in plain]
    for _ in range(5):
        batch = random_batch(agent.spec, 2, 16, g)
        log = agent.update(batch)
        for s in range(2):
            obs = (batch.obs[s] - agent.obs_mean) / agent.obs_std
            loss = F.mse_loss(plain[s](obs).tanh(), batch.act[s])
            optimisers[s].zero_grad()
            loss.backward()
            optimisers[s].step()
            assert log["actor_loss"][s].item() == pytest.approx(loss.item())
    for s in range(2):
        same_net(agent.actor_net, agent.actor[s], plain[s])


# ---------------------------------------------------------------- TD3+BC


def test_td3bc_updates_are_those_of_a_plain_implementation():
    """Two critics and their targets, a delayed actor, smoothed targets; nn.Linear and torch.optim."""
    config = Td3BcConfig(hidden=(8, 6), actor_lr=1e-2, critic_lr=1e-2, tau=0.1)
    agent, g = build(config), gen(3)
    actors = [plain_net(agent.actor_net, row) for row in agent.actor]
    critics = [nn.ModuleList(plain_net(agent.critic_net, row) for row in rows) for rows in agent.critics]
    actor_targets, targets = copy.deepcopy(actors), copy.deepcopy(critics)
    actor_optimisers = [torch.optim.Adam(a.parameters(), 1e-2) for a in actors]
    critic_optimisers = [torch.optim.Adam(c.parameters(), 1e-2) for c in critics]
    for step in range(1, 8):
        batch, noise = random_batch(agent.spec, 2, 16, g), random_noise(agent.spec, 2, 16, g) * 2
        log = agent.update(batch, noise)
        for s in range(2):
            obs, act, reward, after, terminal = (x[s] for x in batch)
            obs, after = ((x - agent.obs_mean) / agent.obs_std for x in (obs, after))
            with torch.no_grad():
                smooth = (0.2 * noise[1, s]).clamp(-0.5, 0.5)
                x = torch.cat([after, (actor_targets[s](after).tanh() + smooth).clamp(-1, 1)], -1)
                value = torch.minimum(targets[s][0](x), targets[s][1](x))[:, 0]
                target = reward + 0.99 * (1 - terminal) * value
            x = torch.cat([obs, act], -1)
            critic_loss = sum(F.mse_loss(critic(x)[:, 0], target) for critic in critics[s])
            critic_optimisers[s].zero_grad()
            critic_loss.backward()
            critic_optimisers[s].step()
            assert log["critic_loss"][s].item() == pytest.approx(critic_loss.item())
            if step % 2 == 0:
                ours = actors[s](obs).tanh()
                q = critics[s][0](torch.cat([obs, ours], -1))[:, 0]
                weight = 2.5 / q.abs().mean().detach()
                loss = -weight * q.mean() + F.mse_loss(ours, act)
                actor_optimisers[s].zero_grad()
                loss.backward()
                actor_optimisers[s].step()
                assert log["actor_loss"][s].item() == pytest.approx(loss.item())
                assert log["weight"][s].item() == pytest.approx(weight.item())
                pairs = ((actors[s], actor_targets[s]), (critics[s], targets[s]))
                for new, old in pairs:
                    for p, t in zip(new.parameters(), old.parameters(), strict=True):
                        t.data.lerp_(p.data, 0.1)
    for s in range(2):
        same_net(agent.actor_net, agent.actor[s], actors[s])
        same_net(agent.actor_net, agent.actor_target[s], actor_targets[s])
        for n in range(2):
            same_net(agent.critic_net, agent.critics[s, n], critics[s][n])
            same_net(agent.critic_net, agent.target[s, n], targets[s][n])


def test_td3bc_without_the_weight_of_q_is_bc():
    config = Td3BcConfig(hidden=(8,), alpha=0.0, policy_delay=1, actor_lr=1e-2)
    agent, cloned, g = build(config), build(BcConfig(hidden=(8,), lr=1e-2)), gen(4)
    cloned.load_state_dict({"actor": agent.actor}, strict=False)
    for _ in range(4):
        batch = random_batch(agent.spec, 2, 16, g)
        agent.update(batch, random_noise(agent.spec, 2, 16, g))
        cloned.update(batch)
    torch.testing.assert_close(agent.actor, cloned.actor)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_td3bc_actor_gradient_is_that_of_its_loss_whatever_the_scale_of_q(layer_norm):
    config = Td3BcConfig(hidden=(8, 6), policy_delay=1, critic_lr=0.0, layer_norm=layer_norm)
    agent, g = build(config), gen(5)
    for critic in (agent.critics, agent.target):
        for x in agent.critic_net.views(critic.flatten(0, 1))[-1][:2]:
            x.mul_(1e3)
    batch = random_batch(agent.spec, 2, 16, g)
    actor = agent.actor.detach().clone().requires_grad_()
    loss = agent.actor_loss(actor, batch.obs, batch.act)
    (grad,) = torch.autograd.grad(loss.sum(), actor)
    q = agent.q(batch.obs, agent.act(batch.obs))[:, 0]
    log = agent.update(batch, random_noise(agent.spec, 2, 16, g))
    torch.testing.assert_close(agent.actor_adam.m, 0.1 * grad)
    torch.testing.assert_close(log["weight"], 2.5 / q.abs().mean(1))
    torch.testing.assert_close(log["actor_loss"], loss.detach())


def test_td3bc_value_is_discounted_and_its_policy_leaves_the_data_for_a_better_action():
    """obs 0 leads to obs 1; there the episode ends with the action as reward. The data hold actions around 0."""
    g = gen(6)
    config = Td3BcConfig(hidden=(32, 32), actor_lr=1e-2, critic_lr=1e-2, gamma=0.5, tau=0.1, policy_noise=0.0)
    agent = Td3BcConfig(**{**vars(config), "normalize": False}).build(Spec(1, 1), g)
    for _ in range(600):
        obs = torch.randint(0, 2, (1, 32, 1), generator=g).float()
        act = torch.rand(1, 32, 1, generator=g) * 2 - 1
        end = obs[..., 0]
        agent.update(
            Transitions(obs, act, act[..., 0] * end, torch.ones_like(obs), end), torch.randn(2, 1, 32, 1, generator=g)
        )
    obs = torch.tensor([[[0.0], [1.0]]])
    act = agent.act(obs)
    assert act[0, 1, 0] > 0.8
    want = torch.stack([0.5 * act[0, 1, 0], torch.zeros(())]).expand(1, 2, 2)
    torch.testing.assert_close(agent.q(obs, torch.zeros(1, 2, 1)), want, atol=0.07, rtol=0)


# ---------------------------------------------------------------- both


CONFIGS = [BcConfig(hidden=(8,)), Td3BcConfig(hidden=(8,)), Td3BcConfig(hidden=(8,), layer_norm=True)]


@pytest.mark.parametrize("config", CONFIGS)
def test_reload_continues_bit_for_bit_and_seeds_do_not_meet(config):
    g = gen(7)
    spec = Spec(4, 2)
    agent, stream = build(config, 2), gen(0)
    apart = [config.build(spec, stream, 1, DOUBLE) for _ in range(2)]
    for one in apart:
        one.set_normalizer(agent.obs_mean, agent.obs_std)
    other = build(config, 2, seed=9)
    for step in range(6):
        if step == 3:
            other.load_state_dict(copy.deepcopy(agent.state_dict()))
        batch, noise = random_batch(spec, 2, 8, g), random_noise(spec, 2, 8, g)
        agent.update(batch, noise)
        other.update(batch, noise)
        for s, one in enumerate(apart):
            one.update(Transitions(*(x[s : s + 1] for x in batch)), noise[:, s : s + 1])
    for name, value in agent.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    torch.testing.assert_close(agent.actor, torch.cat([one.actor for one in apart]))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_broken_batch_of_one_seed_touches_nobody(config):
    g = gen(8)
    agent = build(config)
    batch, noise = random_batch(agent.spec, 2, 8, g), random_noise(agent.spec, 2, 8, g)
    agent.update(batch, noise)
    twin, before = copy.deepcopy(agent), {k: v.clone() for k, v in agent.state_dict().items()}
    broken = batch._replace(obs=batch.obs.clone())
    broken.obs[1] = math.nan
    log = agent.update(broken, noise)
    twin.update(batch, noise)
    assert log["skipped"].tolist() == [0.0, float(len(before) > 8) + 1]
    for name in {"actor", "critics", "target", "actor_target", "actor_adam.m", "actor_adam.v"} & before.keys():
        now = agent.state_dict()[name]
        assert torch.equal(now[1], before[name][1]), name
        assert not torch.equal(now[0], before[name][0]), name
        torch.testing.assert_close(now[0], twin.state_dict()[name][0])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BcConfig(hidden=()), "hidden"),
        (Td3BcConfig(hidden=(0,)), "hidden"),
        (Td3BcConfig(policy_delay=0), "policy_delay=0"),
        *((BcConfig(lr=x), f"BcConfig: lr is {x}, expected a finite number >= 0") for x in (-1e-3, math.nan, math.inf)),
        *(
            (Td3BcConfig(**{k: x}), f"Td3BcConfig: {k} is {x}, expected a finite number >= 0")
            for k in ("actor_lr", "critic_lr", "alpha", "policy_noise", "noise_clip")
            for x in (-1.0, math.nan)
        ),
        *((Td3BcConfig(**{k: 1.5}), rf"{k} is 1.5, expected a number in \[0, 1\]") for k in ("gamma", "tau")),
    ],
)
def test_bad_settings_are_one_clear_error(config, words):
    with pytest.raises(ValueError, match=words):
        config.build(Spec(3, 1), gen())
