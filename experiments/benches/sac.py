"""One SAC update, everything included (both losses, Adam, targets): 256-256, batch 256, 17 observations, 6 actions.

Counted as 0.59 GFLOP: the products of what the algorithm needs, without the critics' weight gradients in the actor's
step. On an accelerator the update is captured as a graph, for one seed and for 32 at once.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbrl import device as devices
from mbrl.core import Spec
from mbrl.data import Transitions
from mbrl.sac import SacConfig

FLOPS = 0.59e9
SPEC, BATCH = Spec(17, 6), 256


def data(seeds: int, device: torch.device) -> tuple[Transitions, Tensor]:
    """A batch and its noise, always the same: what is timed does not depend on the values."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(device)
    obs, act, reward, after = (normal(seeds, BATCH, *shape) for shape in ((17,), (6,), (), (17,)))
    return Transitions(obs, act.tanh(), reward, after, torch.zeros_like(reward)), normal(2, seeds, BATCH, 6)


def ours(seeds: int, device: torch.device, graph: bool):
    """`Sac.update`, captured where `graph` and the device allow."""
    agent = SacConfig(total=10**6).build(SPEC, torch.Generator().manual_seed(0), seeds).to(device)
    batch, noise = data(seeds, device)
    update = devices.graphed(agent.update, batch, noise) if graph else agent.update
    return lambda: update(batch, noise)


class Naive:
    """The update as textbooks write it: modules, autograd, torch's Adam as it comes, a loop over the targets."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        net = lambda i, o: nn.Sequential(
            nn.Linear(i, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, o)
        ).to(device)
        self.actor = net(17, 12)
        self.critics = nn.ModuleList([net(23, 1), net(23, 1)])
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = torch.zeros((), device=device, requires_grad=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), 1e-4)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), 3e-4)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], 1e-4)

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        u = normal.rsample()
        act = u.tanh()
        return act, (normal.log_prob(u) - (1 - act**2 + 1e-6).log()).sum(-1)

    def update(self, batch: Transitions) -> None:
        obs, act, reward, after, terminal = batch
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_act, log_prob = self.sample(after)
            x = torch.cat([after, next_act], -1)
            value = torch.min(*(target(x)[:, 0] for target in self.targets)) - alpha * log_prob
            target = reward + 0.99 * (1 - terminal) * value
        x = torch.cat([obs, act], -1)
        critic_loss = torch.stack([F.mse_loss(critic(x)[:, 0], target) for critic in self.critics]).sum()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        ours, log_prob = self.sample(obs)
        x = torch.cat([obs, ours], -1)
        actor_loss = (alpha * log_prob - torch.min(*(critic(x)[:, 0] for critic in self.critics))).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        self.alpha_optimizer.zero_grad()
        (-self.log_alpha * (log_prob.detach() - 6).mean()).backward()
        self.alpha_optimizer.step()
        with torch.no_grad():
            for new, old in zip(self.critics.parameters(), self.targets.parameters(), strict=True):
                old.lerp_(new, 0.005)


def naive(device: torch.device):
    agent = Naive(device)
    batch = Transitions(*(x[0] for x in data(1, device)[0]))
    return lambda: agent.update(batch)


def stable_baselines(device: torch.device):
    """One gradient step of stable-baselines3's `SAC.train`, which draws its batch from a replay buffer in numpy."""
    import gymnasium
    import numpy as np
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    class Nowhere(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (17,))
        action_space = gymnasium.spaces.Box(-1, 1, (6,))

    model = SAC("MlpPolicy", Nowhere(), buffer_size=1000, batch_size=BATCH, device=device)
    model.set_logger(Logger(None, []))
    buffer, draw = model.replay_buffer, np.random.default_rng(0)
    assert buffer is not None
    for _ in range(1000):
        obs, after = draw.normal(size=(2, 1, 17))
        buffer.add(obs, after, draw.uniform(-1, 1, (1, 6)), draw.normal(size=1), np.zeros(1), [{}])
    return lambda: model.train(1, BATCH)


def run(harness) -> dict[str, dict[str, float]]:
    device = harness.device
    fns = {"SAC update": ours(1, device, graph=False)}
    flops = {"SAC update": FLOPS}
    seeds = {"SAC update": 1}
    if device.type != "cpu":
        for n in (1, 8, 32):
            name = f"SAC update, captured, {n} seed{'s' * (n > 1)}"
            fns[name], flops[name], seeds[name] = ours(n, device, graph=True), n * FLOPS, n
    fns["naive: modules and autograd"] = naive(device)
    fns["stable-baselines3: train(1)"] = stable_baselines(device)
    for name in ("naive: modules and autograd", "stable-baselines3: train(1)"):
        flops[name], seeds[name] = FLOPS, 1
    rows = harness.compare(fns, flops)
    for name, n in seeds.items():
        rows[name]["updates/s"] = n * 1e3 / rows[name]["ms"]
    return rows
