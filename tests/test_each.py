"""Parts that each tell their own future: an elite, a seed."""

import torch

from mbrl.core import Spec, StepInput
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.sac import SacConfig


def gen(seed):
    return torch.Generator().manual_seed(seed)


def test_each_elite_tells_its_own_futures():
    """What an elite tells of k futures is what the step gives where the noise names that elite."""
    model = EnsembleConfig(members=4, elites=3, hidden=(16,), weight_decay=(0.0, 0.0)).build(Spec(2, 1), gen(0))
    model.elites.copy_(torch.tensor([2, 0, 3]))
    x, act, k = torch.randn(5, 2, generator=gen(1)), torch.randn(5, 1, generator=gen(2)), 4
    noise = torch.randn(5, k, model.noise_dim, generator=gen(3))
    inp = StepInput(act, noise.flatten(1), torch.ones(5, 1))
    got = model.each(x, inp, (), k)
    assert got.obs.shape == (3, 20, 2)
    for elite in range(3):
        named = noise.clone()
        named[..., -1] = torch.special.ndtri(torch.tensor((elite + 0.5) / 3))
        want = model.branch(x, inp._replace(noise=named.flatten(1)), (), k)[1]
        torch.testing.assert_close(got.obs[elite], want.obs)
        torch.testing.assert_close(got.reward[elite], want.reward)


def test_one_seed_is_a_view_of_its_own_agent():
    spec = Spec(3, 2)
    agent = SacConfig(hidden=(8, 8)).build(spec, gen(0), seeds=3)
    obs, act = torch.randn(3, 5, 3, generator=gen(1)), torch.randn(3, 5, 2, generator=gen(2))
    every_act, every_q, target = agent.act(obs), agent.q(obs, act), agent.q(obs, act, target=True)
    for s in range(3):
        one = agent.one(s)
        torch.testing.assert_close(one.act(obs[s : s + 1]), every_act[s : s + 1])
        torch.testing.assert_close(one.q(obs[s : s + 1], act[s : s + 1]), every_q[s : s + 1])
        torch.testing.assert_close(one.q(obs[s : s + 1], act[s : s + 1], target=True), target[s : s + 1])
    one = agent.one(2)
    agent.actor[2] *= 0
    assert (one.act(obs[:1]) == 0).all(), "a view: it follows the agent"
    assert len(list(agent.parameters())) == 3
    assert agent.actor.shape[0] == 3
