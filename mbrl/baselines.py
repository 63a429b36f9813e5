"""Model-free rows to compare with: behaviour cloning, and TD3+BC (Fujimoto & Gu 2021, arXiv 2106.06860).

Both follow the protocol of `mbrl.sac`: `build`, `act`, `update(batch, noise)` in place, a leading axis of seeds.
Their policies are deterministic: `act` takes noise for the protocol's sake and does not read it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mbrl.core import Spec, demand
from mbrl.data import Transitions
from mbrl.sac import ActorCritic, Adam, Agent, FlatMLP, cloning_grad


@dataclass(frozen=True)
class BcConfig:
    """Behaviour cloning: tanh of a network, squared error, over the batch and the action's parts alike."""

    hidden: tuple[int, ...] = (256, 256)
    lr: float = 3e-4
    normalize: bool = True  # observations by `set_normalizer`

    def build(self, spec: Spec, generator: torch.Generator, seeds: int = 1, dtype: torch.dtype | None = None) -> "Bc":
        """Lives on the generator's device. The first seeds do not depend on how many follow."""
        return Bc(self, spec, generator, seeds, dtype)


class Bc(Agent):
    """The cloned policy."""

    def __init__(
        self, config: BcConfig, spec: Spec, generator: torch.Generator, seeds: int, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(spec, seeds, config.normalize, torch.zeros(0, dtype=dtype, device=generator.device))
        if min(config.hidden, default=0) < 1:
            raise ValueError(f"BcConfig: got hidden={config.hidden}, expected at least one layer, of positive width")
        _check(config, "lr")
        self.config, self.actor_net = config, FlatMLP((spec.obs, *config.hidden, spec.act))
        actor = torch.stack([self.actor_net.init(generator, dtype) for _ in range(seeds)])
        self.actor = nn.Parameter(actor, requires_grad=False)  # [S, P]
        self.actor_adam = Adam(self.actor)

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """obs [S, B, O] -> actions [S, B, A] in [-1, 1]."""
        return self.actor_net.forward(self.layers(self.actor_net, self.actor), self.scale(obs))[-1].tanh()

    @torch.no_grad()
    def update(self, batch: Transitions, noise: Tensor | None = None) -> dict[str, Tensor]:
        """One update in place. batch: [S, B, ...], of which obs and act are read. Returns what to log, [S] each."""
        work = self.work(self.actor_net, self.seeds, batch.obs.shape[1])
        layers = self.layers(self.actor_net, self.actor)
        tape = self.actor_net.forward(layers, self.scale(batch.obs), work)
        act = tape[-1].tanh()
        error = act - batch.act
        dy = cloning_grad(error) * (1 - act.square())
        self.actor_net.backward(layers, tape, dy, work, self.layers(self.actor_net, self.actor_adam.grad))
        skipped = 1 - self.actor_adam.step(self.actor, self.config.lr)
        self.updates.add_(1)
        return {"actor_loss": error.square().mean((1, 2)), "skipped": skipped}


@dataclass(frozen=True)
class Td3BcConfig:
    """The published settings."""

    hidden: tuple[int, ...] = (256, 256)
    critics: int = 2
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    alpha: float = 2.5  # the weight of Q, of which the mean magnitude is made 1, against cloning; 0: cloning alone
    gamma: float = 0.99
    tau: float = 0.005
    policy_noise: float = 0.2  # standard deviation of what smooths the target's action
    noise_clip: float = 0.5
    policy_delay: int = 2  # the actor and all targets move at every such update
    layer_norm: bool = False  # in the critics, before each ReLU
    normalize: bool = True  # observations by `set_normalizer`

    def build(
        self, spec: Spec, generator: torch.Generator, seeds: int = 1, dtype: torch.dtype | None = None
    ) -> "Td3Bc":
        """Lives on the generator's device. The first seeds do not depend on how many follow."""
        return Td3Bc(self, spec, generator, seeds, dtype)


class Td3Bc(ActorCritic):
    """The agent. An update between two of the actor's computes the actor's gradient and leaves it unused: which update
    it is stands in a tensor, so that updates can be captured."""

    actor_target: Tensor  # [S, P]

    def __init__(
        self, config: Td3BcConfig, spec: Spec, generator: torch.Generator, seeds: int, dtype: torch.dtype | None = None
    ) -> None:
        if config.policy_delay < 1:
            raise ValueError(f"Td3BcConfig: got policy_delay={config.policy_delay}, expected at least 1")
        _check(config, "actor_lr", "critic_lr", "alpha", "policy_noise", "noise_clip")
        _check(config, "gamma", "tau", most=1.0)
        super().__init__(config, spec.act, spec, generator, seeds, dtype)
        self.config = config
        self.register_buffer("actor_target", self.actor.clone())

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """obs [S, B, O] -> actions [S, B, A] in [-1, 1]."""
        return self.policy(self.actor, self.scale(obs))

    def policy(self, actor: Tensor, obs: Tensor) -> Tensor:
        """Actor rows [S, P], scaled obs -> actions [S, B, A]; differentiable in the rows."""
        return self.actor_net.forward(self.layers(self.actor_net, actor), obs)[-1].tanh()

    def actor_loss(self, actor: Tensor, obs: Tensor, act: Tensor) -> Tensor:
        """[S]: squared distance to the data's actions, less alpha Q / mean |Q|. obs as the data hold it."""
        obs = self.scale(obs)
        ours = self.policy(actor, obs)
        q = self.values(self.critics[:, :1], obs, ours)[:, 0]
        weight = self.config.alpha / q.detach().abs().mean(1)
        return (ours - act).square().mean((1, 2)) - weight * q.mean(1)

    @torch.no_grad()
    def update(self, batch: Transitions, noise: Tensor) -> dict[str, Tensor]:
        """One update in place. batch: [S, B, ...]; noise [2, S, B, A], of which the second smooths the target's
        action. Returns what to log, [S] each; "skipped" counts optimiser's steps left out for a gradient that was
        not finite."""
        config, b = self.config, batch.reward.shape[-1]
        obs, after = self.scale(batch.obs), self.scale(batch.next_obs)
        self.updates.add_(1)
        when = (self.updates % config.policy_delay == 0).expand(self.seeds)

        smooth = (config.policy_noise * noise[1]).clamp(-config.noise_clip, config.noise_clip)
        act = (self.policy(self.actor_target, after) + smooth).clamp(-1, 1)
        critic_work = self.work(self.critic_net, self.seeds * config.critics, b)
        value = self.values(self.target, after, act, critic_work).amin(1)
        target = torch.addcmul(batch.reward, 1 - batch.terminal, value, value=config.gamma)
        critic_loss, q = self.critic_grad(batch, obs, target)
        fine = self.critic_adam.step(self.critics, config.critic_lr)

        net, work = self.actor_net, self.work(self.actor_net, self.seeds, b)
        layers = self.layers(net, self.actor)
        tape = net.forward(layers, obs, work)
        act = tape[-1].tanh()
        error = act - batch.act
        q_act, dact = self.act_grad(self.critics[:, :1], obs, act)  # [S, B], [S, B, A]
        weight = config.alpha / q_act.abs().mean(1)
        dy = (cloning_grad(error) - weight[:, None, None] / b * dact) * (1 - act.square())
        net.backward(layers, tape, dy, work, self.layers(net, self.actor_adam.grad))
        ok = self.actor_adam.step(self.actor, config.actor_lr, when)

        move = (config.tau * ok * fine)[:, None]
        self.actor_target.lerp_(self.actor, move)
        self.target.lerp_(self.critics, move[..., None])
        return {
            "critic_loss": critic_loss,
            "actor_loss": error.square().mean((1, 2)) - weight * q_act.mean(1),
            "weight": weight,
            "q": q.mean((1, 2)),
            "skipped": 1 - fine + when.to(ok) - ok,
        }


def _check(config: BcConfig | Td3BcConfig, *names: str, most: float = math.inf) -> None:
    """Raises ValueError for settings that are below 0, above the most, or not finite."""
    want = "a finite number >= 0" if most == math.inf else f"a number in [0, {most:g}]"
    values = {k: getattr(config, k) for k in names}
    demand(type(config).__name__, *((k, x, want, 0 <= x <= most and x < math.inf) for k, x in values.items()))
