"""Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905) for S seeds at once.

Every tensor leads with the seeds [S, ...]; seeds never see each other. A network's parameters are one flat row a
network, so that an optimiser's step or a target's move is a few operations on one tensor, whatever the layers. The
update's gradients are written out by hand: on a CPU an update of this size spends a third of its time in autograd's
book-keeping and in gradients that nobody reads. `critic_loss`, `robust_loss` and `actor_loss` say the same in plain
autograd form; critics with layer normalisation take that path.

Two regularisers of the critics keep their values smooth, so that one model may take the place of an ensemble (Zheng et
al., ICLR 2023, arXiv 2302.01244): `robust` and `spectral` of `SacConfig`. `local_lipschitz` and `value_aware_error`
measure what they are for.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbrl.core import Dynamics, Spec, StepInput, first_context
from mbrl.data import Transitions
from mbrl.device import sweep
from mbrl.nets import power_iteration

BEHAVIOUR_STD_MIN, BEHAVIOUR_LR = 0.1, 1e-3
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # stable-baselines3's, so that policies can be exchanged
Layers = list[tuple[Tensor, Tensor]]  # (weight [out, in], bias [out]) each
Views = list[list[Tensor]]
ADDED = {"added": True}  # of a setting that `mbrl.offline.digest` leaves out while it holds its default

# ---------------------------------------------------------------- networks as flat rows


@dataclass(frozen=True)
class FlatMLP:
    """A ReLU network whose parameters are one flat row [P]: per layer the weight [in, out], the bias [out] and, with
    `layer_norm` and but for the last layer, a scale and a shift [out]. Sections begin at multiples of 64 bytes of
    float32, for the sake of matrix products; what lies between is zero and stays zero. n rows are n networks."""

    sizes: tuple[int, ...]
    layer_norm: bool = False

    @property
    def shapes(self) -> list[tuple[int, int]]:
        out = []
        for i, (a, b) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            out += [(a, b), (1, b)]
            if self.layer_norm and i + 2 < len(self.sizes):
                out += [(1, b), (1, b)]
        return out

    @property
    def width(self) -> int:
        """P, the length of a row."""
        return sum(-(-a * b // 16) * 16 for a, b in self.shapes)

    def views(self, flat: Tensor) -> Views:
        """flat [n, P] -> per layer [weight [n, in, out], bias [n, 1, out] (, scale, shift)], all of them views."""
        out, at = [], 0
        for a, b in self.shapes:
            out.append(flat[:, at : at + a * b].unflatten(1, (a, b)))
            at += -(-a * b // 16) * 16
        step = 4 if self.layer_norm else 2
        return [out[i : i + step] for i in range(0, len(out), step)]

    def init(self, generator: torch.Generator, dtype: torch.dtype | None = None) -> Tensor:
        """One row [P]: weights and biases uniform within 1 / sqrt(in), as torch.nn.Linear's."""
        flat = torch.zeros(1, self.width, dtype=dtype, device=generator.device)
        for layer in self.views(flat):
            bound = layer[0].shape[1] ** -0.5
            for x in layer[:2]:
                x.uniform_(-bound, bound, generator=generator)
            for x in layer[2:3]:
                x.fill_(1.0)
        return flat[0]

    def forward(self, layers: Views, x: Tensor, work: "Work | None" = None) -> list[Tensor]:
        """layers as `views` gives them, x [n, B, in] -> each layer's input, then the output [n, B, out]. Differentiable
        without work; with it, the tape's inner parts are work's own and live until it is used again."""
        tape = [x]
        for i, (w, b, *norm) in enumerate(layers):
            last = i + 1 == len(layers)
            if w.shape[2] == 1:  # a batch of products with a vector, at which bmm is eight times slower
                x = torch.mul(x, w.mT, out=work and work.spare(x.shape[2], x.shape[1])).sum(2, keepdim=True) + b
            else:
                x = torch.baddbmm(b, x, w, out=None if work is None or last else work.hidden[i])
            if norm:
                x = F.layer_norm(x, x.shape[-1:]) * norm[0] + norm[1]
            tape.append(x if last else x.relu_())
            x = tape[-1]
        return tape

    def backward(
        self,
        layers: Views,
        tape: list[Tensor],
        dy: Tensor,
        work: "Work",
        grads: Views | None,
        inputs: slice | None = None,
    ) -> Tensor | None:
        """From dy [n, B, out], the gradient with respect to the output: writes that of the parameters into the views
        grads, if given, and returns that of the columns `inputs` of x, if given. The tape's inner parts are
        overwritten. Not with layer_norm."""
        for i in reversed(range(len(layers))):
            w, x = layers[i][0], tape[i]
            if grads is not None:
                torch.sum(dy, 1, keepdim=True, out=grads[i][1])
                if w.shape[2] == 1:
                    torch.sum(
                        torch.mul(x, dy, out=work.spare(x.shape[2], x.shape[1])), 1, keepdim=True, out=grads[i][0].mT
                    )
                else:
                    torch.bmm(x.mT, dy, out=grads[i][0])
            if i == 0:
                return None if inputs is None else torch.bmm(dy, w[:, inputs].mT)
            spare = work.spare(x.shape[2], x.shape[1])
            dx = torch.mul(dy, w.mT, out=spare) if w.shape[2] == 1 else torch.bmm(dy, w.mT, out=spare)
            dy = torch.ops.aten.threshold_backward(dx, x, 0, grad_input=x)
        raise AssertionError("a network has at least one layer")

    def linears(self, row: Tensor) -> Layers:
        """row [P] -> per layer (weight [out, in], bias [out]) as torch.nn.Linear holds them: copies."""
        return [(layer[0][0].mT.clone(), layer[1][0, 0].clone()) for layer in self.views(row[None])]

    def load_linears(self, row: Tensor, layers: Layers) -> None:
        """The inverse of `linears`, into row [P]."""
        views = self.views(row[None])
        want = [tuple(w[0].mT.shape) for w, *_ in views]
        if (got := [tuple(w.shape) for w, _ in layers]) != want:
            raise ValueError(f"network: got weights of shapes {got}, expected {want}; set `hidden` to match")
        for (w, b, *_), (weight, bias) in zip(views, layers, strict=True):
            w[0].copy_(weight.mT)
            b[0, 0].copy_(bias)


class Work:
    """Memory for one network's pass over a batch, kept between updates: to allocate the activations anew costs a
    quarter of an update in page faults, since a C library hands blocks of this size back to the system."""

    def __init__(self, net: FlatMLP, n: int, batch: int, like: Tensor) -> None:
        self.n = n
        self.hidden = [like.new_empty(n, batch, width) for width in net.sizes[1:-1]]
        self.flat = like.new_empty(n * batch * max(net.sizes[1:-1]))
        self.spares: dict[tuple[int, int], Tensor] = {}

    def spare(self, width: int, batch: int) -> Tensor:
        """[n, batch, width] to write on, the same memory each time."""
        key = (width, batch)
        if key not in self.spares:
            self.spares[key] = self.flat[: self.n * batch * width].view(self.n, batch, width)
        return self.spares[key]


class Cache(dict):
    """What an agent need not make anew at each update. A copy of an agent begins with none of it."""

    def __deepcopy__(self, memo: dict) -> "Cache":
        return Cache()

    def __reduce__(self) -> tuple:
        return Cache, ()


class Adam(nn.Module):
    """Adam (Kingma & Ba 2015) of parameters [S, ...], each seed with a step count of its own. The caller writes the
    gradient into `grad`. A seed whose gradient is not finite keeps its parameters, moments and count."""

    m: Tensor  # [S, P], as are v, grad and work
    v: Tensor
    grad: Tensor
    work: Tensor
    steps: Tensor  # [S, 1], a float: how many each seed took

    def __init__(self, like: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__()
        self.betas, self.eps, seeds = betas, eps, like.shape[0]
        for name in ("m", "v", "grad", "work"):
            self.register_buffer(name, torch.zeros_like(like).view(seeds, -1), persistent=name in ("m", "v"))
        self.register_buffer("steps", like.new_zeros(seeds, 1))

    @torch.no_grad()
    def step(self, param: Tensor, lr: float | Tensor, when: Tensor | None = None) -> Tensor:
        """One step in place; returns which seeds took it, [S] of zeros and ones. when [S]: which seeds may. `grad` is
        consumed."""
        p, g, (beta1, beta2) = param.view_as(self.m), self.grad, self.betas
        total = g.sum(1, keepdim=True)
        fine = total.sub_(total) == 0  # a sum is finite only where every part is
        if when is not None:
            fine = fine & when[:, None]
        ok = fine.to(g.dtype)
        self.steps.add_(ok)
        sweep(self.steps, self.m, self.v)
        if len(ok) == 1 and ok.dtype == torch.float32:
            # torch's own kernel, one pass over the memory; it can leave out all or nothing, and counts in float32
            torch._fused_adam_(
                [p], [g], [self.m], [self.v], [], [self.steps],
                lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=self.eps, amsgrad=False, maximize=False,
                found_inf=1 - ok,
            )  # fmt: skip
            return ok[:, 0]
        g.nan_to_num_(0.0, 0.0, 0.0)  # since 0 * nan is nan
        self.m.lerp_(g, (1 - beta1) * ok)
        self.v.lerp_(g.square_(), (1 - beta2) * ok)
        steps = self.steps.clamp(min=1)
        debias1, debias2 = (-torch.expm1(steps * math.log(beta)) for beta in self.betas)
        torch.sqrt(self.v, out=self.work).mul_(debias2.rsqrt()).add_(self.eps)
        p.addcmul_(torch.div(self.m, self.work, out=self.work), ok / debias1 * -lr)
        return ok[:, 0]


# ---------------------------------------------------------------- what agents share


class Agent(nn.Module):
    """S seeds of a policy on [S, B, ...] tensors, with an optional normaliser of observations.

    `obs_mean` and `obs_std` are identity until `set_normalizer` is called.
    """

    spec: Spec
    seeds: int
    obs_mean: Tensor
    obs_std: Tensor
    updates: Tensor  # []: how many updates were made

    def __init__(self, spec: Spec, seeds: int, normalize: bool, like: Tensor) -> None:
        super().__init__()
        if spec.act < 1 or seeds < 1:
            raise ValueError(
                f"agent: got {spec.act} action dimensions and {seeds} seeds, expected at least one of each"
            )
        self.spec, self.seeds, self.normalize = spec, seeds, normalize
        self.register_buffer("obs_mean", like.new_zeros(spec.obs))
        self.register_buffer("obs_std", like.new_ones(spec.obs))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=like.device))
        self._cache = Cache()

    def set_normalizer(self, mean: Tensor, std: Tensor) -> None:
        """Observations are read as (obs - mean) / std from here on; mean and std are [O], std > 0."""
        if not self.normalize:
            raise ValueError("set_normalizer: this agent was built with normalize=False; build it with normalize=True")
        if not bool((std > 0).all()):
            raise ValueError("set_normalizer: got a standard deviation that is not positive; add a small constant")
        self.obs_mean.copy_(mean)
        self.obs_std.copy_(std)

    def one(self, seed: int) -> Self:
        """A view of one seed as an agent of its own [1, ...], on the same storage: for acting and valuing, not updates.
        Raises IndexError for a seed that is not there."""
        if not -self.seeds <= seed < self.seeds:
            raise IndexError(f"agent: seed number {seed} of {self.seeds}")
        if self.seeds == 1:
            return self
        seed %= self.seeds
        cut = lambda x: x[seed : seed + 1]
        view = copy.copy(self)
        view.seeds, view._cache = 1, Cache()
        view._parameters = {
            k: nn.Parameter(cut(p), requires_grad=False) for k, p in self._parameters.items() if p is not None
        }
        shared = ("obs_mean", "obs_std", "updates")
        view._buffers = {k: b if k in shared or b is None else cut(b) for k, b in self._buffers.items()}
        return view

    def scale(self, obs: Tensor) -> Tensor:
        """Observations as the networks read them."""
        return (obs - self.obs_mean) / self.obs_std if self.normalize else obs

    def _apply(self, fn, recurse: bool = True):
        self._cache.clear()
        return super()._apply(fn, recurse)

    def work(self, net: FlatMLP, n: int, batch: int, use: str = "") -> Work:
        """The memory for passes of this shape; another one where another use is named."""
        key = (net, n, batch, use)
        if key not in self._cache:
            self._cache[key] = Work(net, n, batch, self.obs_mean)
        return self._cache[key]

    def layers(self, net: FlatMLP, flat: Tensor) -> Views:
        """`net.views` of the rows flat [..., P]. Those of the agent's own tensors are made once: an update would make
        a hundred. The cache keeps alive the memory that its keys name, so no other tensor comes to live there."""
        cache, key = self._cache, (net, flat.data_ptr(), flat.numel())
        if flat.requires_grad or flat.data_ptr() not in self._own():
            return net.views(flat.view(-1, net.width))
        if key not in cache:
            cache[key] = net.views(flat.view(-1, net.width))
        return cache[key]

    def _own(self) -> set[int]:
        if "own" not in self._cache:
            self._cache["own"] = {x.data_ptr() for x in (*self.parameters(), *self.buffers())}
        return self._cache["own"]

    def fold(self, layers: Layers, sign: int = 1) -> Layers:
        """Layers that read normalised observations (first, before any actions) as layers that read raw ones: the
        normaliser goes into the first layer. sign=-1: the inverse."""
        (weight, bias), *rest = layers
        weight, o = weight.clone(), self.spec.obs
        if sign > 0:
            weight[:, :o] /= self.obs_std
            bias = bias - weight[:, :o] @ self.obs_mean
        else:
            bias = bias + weight[:, :o] @ self.obs_mean
            weight[:, :o] *= self.obs_std
        return [(weight, bias), *rest]


def pairs(obs: Tensor, act: Tensor, n: int) -> Tensor:
    """[S, B, O], [S, B, A] -> [S * n, B, O + A]: what n critics a seed read; no copy for one seed."""
    x = torch.cat([obs, act], -1)
    return x[:, None].expand(-1, n, -1, -1).flatten(0, 1)


# ---------------------------------------------------------------- actors with critics


class Settings(Protocol):
    """What the configurations of actor-critics have in common."""

    @property
    def hidden(self) -> tuple[int, ...]: ...
    @property
    def critics(self) -> int: ...
    @property
    def layer_norm(self) -> bool: ...
    @property
    def normalize(self) -> bool: ...


class ActorCritic(Agent):
    """A policy and N critics a seed, each critic with a target of its own, and the optimisers of both."""

    target: Tensor  # [S, N, P]

    def __init__(
        self,
        config: Settings,
        out: int,
        spec: Spec,
        generator: torch.Generator,
        seeds: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        """out: the width of the actor's last layer."""
        super().__init__(spec, seeds, config.normalize, torch.zeros(0, dtype=dtype, device=generator.device))
        if min(config.hidden, default=0) < 1 or config.critics < 1:
            raise ValueError(
                f"agent: got hidden={config.hidden}, critics={config.critics}; expected at least one hidden layer, "
                "positive widths and at least one critic"
            )
        self.actor_net = FlatMLP((spec.obs, *config.hidden, out))
        self.critic_net = FlatMLP((spec.obs + spec.act, *config.hidden, 1), config.layer_norm)
        actor, critics = [], []
        for _ in range(seeds):
            actor.append(self.actor_net.init(generator, dtype))
            critics.append(torch.stack([self.critic_net.init(generator, dtype) for _ in range(config.critics)]))
        self.actor = nn.Parameter(torch.stack(actor), requires_grad=False)  # [S, P]
        self.critics = nn.Parameter(torch.stack(critics), requires_grad=False)  # [S, N, P]
        self.register_buffer("target", self.critics.clone())
        self.actor_adam, self.critic_adam = Adam(self.actor), Adam(self.critics)

    def q(self, obs: Tensor, act: Tensor, target: bool = False) -> Tensor:
        """obs [S, B, O], act [S, B, A] -> [S, N, B]: the N critics' values (by default N = 2)."""
        return self.values(self.target if target else self.critics, self.scale(obs), act)

    def values(self, critics: Tensor, obs: Tensor, act: Tensor, work: Work | None = None) -> Tensor:
        """Critic rows [S, N, P], scaled obs, act -> [S, N, B]"""
        n = critics.shape[1]
        y = self.critic_net.forward(self.layers(self.critic_net, critics), pairs(obs, act, n), work)[-1]
        return y[..., 0].unflatten(0, (-1, n))

    def critic_loss(self, critics: Tensor, batch: Transitions, target: Tensor) -> Tensor:
        """[S]: squared errors against target [S, B], mean over the batch, sum over the critics."""
        return (self.values(critics, self.scale(batch.obs), batch.act) - target[:, None]).square().mean(2).sum(1)

    # -------- gradients

    def critic_grad(self, batch: Transitions, obs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the critics' gradient where their optimiser reads it. Returns the loss [S] and Q [S, N, B]."""
        net, n = self.critic_net, self.critics.shape[1]
        if net.layer_norm:
            with torch.enable_grad():
                critics = self.critics.detach().requires_grad_()
                q = self.values(critics, obs, batch.act)
                loss = (q - target[:, None]).square().mean(2).sum(1)
                self.critic_adam.grad.copy_(torch.autograd.grad(loss.sum(), critics)[0].flatten(1))
            return loss.detach(), q.detach()
        layers, work = self.layers(net, self.critics), self.work(net, self.seeds * n, obs.shape[1])
        tape = net.forward(layers, pairs(obs, batch.act, n), work)
        q = tape[-1][..., 0].unflatten(0, (-1, n))
        error = q - target[:, None]
        dy = (error * (2 / error.shape[2])).flatten(0, 1)[..., None]
        net.backward(layers, tape, dy, work, self.layers(net, self.critic_adam.grad))
        return error.square().mean(2).sum(1), q

    def act_grad(self, critics: Tensor, obs: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
        """The least of the critics [S, N, P] at the action [S, B], and its gradient with respect to it [S, B, A]."""
        net, n = self.critic_net, critics.shape[1]
        if net.layer_norm:
            with torch.enable_grad():
                act = act.detach().requires_grad_()
                best = self.values(critics, obs, act).min(1).values
                return best.detach(), torch.autograd.grad(best.sum(), act)[0]
        layers, work = self.layers(net, critics), self.work(net, self.seeds * n, obs.shape[1])
        tape = net.forward(layers, pairs(obs, act, n), work)
        best, index = tape[-1][..., 0].unflatten(0, (-1, n)).min(1)
        which = torch.arange(n, device=index.device)[:, None] == index[:, None]  # [S, N, B]
        dy = which.to(best).flatten(0, 1)[..., None]
        dx = net.backward(layers, tape, dy, work, None, slice(self.spec.obs, None))
        assert dx is not None
        return best, dx.unflatten(0, (-1, n)).sum(1)

    # -------- exchange

    def linears(self, seed: int) -> dict[str, list[Layers] | Layers]:
        """One seed's networks on raw observations, as (weight [out, in], bias [out]) a layer: "actor" (the last layer
        of SAC's gives A means, then A log standard deviations), "critics" and "target" (N each, on cat(obs, act))."""
        if self.critic_net.layer_norm:
            raise ValueError("linears: critics with layer normalisation are not plain linear layers")
        critics = {
            name: [self.fold(self.critic_net.linears(row)) for row in rows[seed]]
            for name, rows in (("critics", self.critics), ("target", self.target))
        }
        return {"actor": self.fold(self.actor_net.linears(self.actor[seed])), **critics}

    @torch.no_grad()
    def load_linears(self, seed: int, actor: Layers, critics: Sequence[Layers], target: Sequence[Layers]) -> None:
        """The inverse of `linears`. Raises ValueError where shapes disagree. The optimisers keep their state."""
        for got in (critics, target):
            if len(got) != self.critics.shape[1]:
                raise ValueError(f"load_linears: got {len(got)} critics, expected {self.critics.shape[1]}")
        self.actor_net.load_linears(self.actor[seed], self.fold(actor, -1))
        for rows, given in ((self.critics, critics), (self.target, target)):
            for row, layers in zip(rows[seed], given, strict=True):
                self.critic_net.load_linears(row, self.fold(layers, -1))


# ---------------------------------------------------------------- SAC


@dataclass(frozen=True)
class SacConfig:
    """The settings that model-based offline RL uses.

    `normalize` is off because the published numbers were made on raw observations, and because an exported policy
    then is the trained one; where it is on, `linears` folds the normaliser into the first layers.
    """

    hidden: tuple[int, ...] = (256, 256)
    critics: int = 2
    actor_lr: float = 1e-4
    critic_lr: float = 3e-4
    alpha_lr: float = 1e-4  # 0 keeps the temperature at init_alpha
    init_alpha: float = 1.0
    target_entropy: float | None = None  # None: minus the number of actions
    gamma: float = 0.99
    tau: float = 0.005  # how far the targets move at each update
    total: int = 0
    """Updates over which the actor's learning rate falls to 0 along a half cosine; 0: it stays. The offline loop puts
    its own number of updates here."""
    deterministic_backup: bool = False  # targets without the entropy's term (MOBILE)
    target_min: float | None = None  # targets are at least this (MOBILE and MOREC: 0)
    layer_norm: bool = False  # in the critics, before each ReLU
    normalize: bool = False  # observations by `set_normalizer`
    cloning: float = field(default=0.0, metadata=ADDED)
    """The actor's loss is raised by this times mean |Q| over the batch times the mean of (tanh(mean) - mu)^2 /
    (1 + (sigma / narrow)^4) over the data's own rows of the batch and the action's dimensions. mu and sigma (from 0.1
    to 1) are the behaviour's: those of a Gaussian that a network of its own reads from obs, fitted to these rows as the
    agent learns. So data that show one narrow way to act are cloned beside Q, with the weights of TD3+BC (Fujimoto &
    Gu, NeurIPS 2021, whose alpha is one over this), and data that try everything leave the policy free."""
    cloning_end: float | None = field(default=None, metadata=ADDED)
    """What `cloning` is once `cloning_hold` of `total` updates are done: values are learned near to the data, and then
    followed (as Beeson & Montana, 2022, arXiv 2211.11802, relax TD3+BC at the end). The actor's learning rate falls
    to 0 twice, before and after. None: it stays; of no `cloning` there is no end."""
    cloning_hold: float = field(default=0.8, metadata=ADDED)
    narrow: float = field(default=0.2, metadata=ADDED)
    """The behaviour's standard deviation, in an action of [-1, 1], at which `cloning` has half of its weight."""
    robust: float = field(default=0.0, metadata=ADDED)
    """The critics' loss is raised by this times the mean over the batch, summed over the critics, of the largest
    (Q(s', pi(s')) - Q(s, a))^2 over states s' that differ from s by at most `robust_eps` in any component. The maximum
    is that of one step of the fast gradient sign method (from s, through Q and through pi), each critic's own; pi is
    the policy's mean action; s' and pi are constants of the critics' gradient, both values are not."""
    robust_eps: float = field(default=0.1, metadata=ADDED)
    """In units of the observations as the networks read them: raw, or standardised where `normalize` is on."""
    spectral: float | None = field(default=None, metadata=ADDED)
    """The largest spectral norm that a critic's layer may have: one beyond it is scaled back onto it after each update,
    by a norm that `spectral_iterations` of power iteration estimate from vectors kept from update to update. With L
    layers Q's Lipschitz constant is at most the L-th power. The targets, mixtures of critics, keep to it as well.
    One iteration estimates from below, so that a layer that has just grown may be beyond it for some updates. Of
    observations as the networks read them: standardised ones where `normalize` is on."""
    spectral_iterations: int = field(default=1, metadata=ADDED)

    def build(self, spec: Spec, generator: torch.Generator, seeds: int = 1, dtype: torch.dtype | None = None) -> "Sac":
        """Lives on the generator's device. Seeds are drawn one after the other: the first k of a build with more
        seeds are those of a build with k seeds and the same generator."""
        return Sac(self, spec, generator, seeds, dtype)


class Sac(ActorCritic):
    """The agent. `state_dict` holds everything that an update reads or writes, so a reloaded agent continues bit for
    bit. Changes of state are in place, so that an update can be captured (`mbrl.device.graphed`)."""

    vectors: Tensor  # [S, N, sum of out]: the first right singular vector of each critic's layers, where `spectral`

    def __init__(
        self, config: SacConfig, spec: Spec, generator: torch.Generator, seeds: int, dtype: torch.dtype | None = None
    ) -> None:
        rates = (config.actor_lr, config.critic_lr, config.alpha_lr)
        if not (0 <= config.gamma <= 1 and 0 <= config.tau <= 1 and min(rates) >= 0):
            got = f"gamma={config.gamma}, tau={config.tau}, actor_lr, critic_lr, alpha_lr={rates}"
            raise ValueError(f"agent: got {got}; expected gamma and tau in [0, 1] and rates >= 0")
        if not 0 <= config.init_alpha < math.inf or (config.init_alpha == 0 and config.alpha_lr > 0):
            got = f"init_alpha={config.init_alpha}, alpha_lr={config.alpha_lr}"
            raise ValueError(f"agent: got {got}; expected a finite init_alpha above 0, or 0 with alpha_lr 0")
        if not (0 <= config.cloning < math.inf and config.narrow > 0):
            got = f"cloning={config.cloning}, narrow={config.narrow}"
            raise ValueError(f"agent: got {got}; expected a finite cloning >= 0 and narrow > 0")
        if config.cloning and config.cloning_end is not None and not 0 <= config.cloning_end <= config.cloning:
            got = f"cloning_end={config.cloning_end} with cloning={config.cloning}"
            raise ValueError(f"agent: got {got}; expected no more than that, or None for what stays")
        if config.cloning_end is not None and not 0 < config.cloning_hold < 1:
            raise ValueError(f"agent: got cloning_hold={config.cloning_hold}; expected a share between 0 and 1")
        if not (0 <= config.robust < math.inf and 0 <= config.robust_eps < math.inf):
            got = f"robust={config.robust}, robust_eps={config.robust_eps}"
            raise ValueError(f"agent: got {got}; expected finite numbers >= 0")
        if config.spectral is not None and not (config.spectral > 0 and config.spectral_iterations >= 1):
            got = f"spectral={config.spectral}, spectral_iterations={config.spectral_iterations}"
            raise ValueError(f"agent: got {got}; expected a positive bound and at least 1")
        if math.isnan(config.target_min or 0) or not math.isfinite(config.target_entropy or 0):
            got = f"target_min={config.target_min}, target_entropy={config.target_entropy}"
            raise ValueError(f"agent: got {got}; expected numbers, the entropy a finite one, or None")
        if config.spectral is not None and config.layer_norm:
            raise ValueError("agent: layer_norm undoes the bounds that spectral puts on the layers; leave one out")
        super().__init__(config, 2 * spec.act, spec, generator, seeds, dtype)
        self.config = config
        if config.spectral is not None:
            width = sum(self.critic_net.sizes[1:])
            self.register_buffer("vectors", self.critics.new_zeros(seeds, config.critics, width))
            self.find_vectors()
            self.bound(self.critics.new_ones(seeds))
            self.target.copy_(self.critics)
            self._cache.clear()  # it names what the agent owns so far
        log_alpha = torch.full_like(self.actor[:, 0], config.init_alpha).log()
        self.log_alpha = nn.Parameter(log_alpha, requires_grad=False)  # [S]
        self.alpha_adam = Adam(self.log_alpha)
        if config.cloning:
            self.behaviour = nn.Parameter(self.actor.clone(), requires_grad=False)  # [S, P]
            self.behaviour_adam = Adam(self.behaviour)
        self.target_entropy = -float(spec.act) if config.target_entropy is None else config.target_entropy

    # -------- what is asked of a policy

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """obs [S, B, O], noise [S, B, A] standard normal -> actions [S, B, A] in [-1, 1]; without noise tanh(mean)."""
        y = self.actor_net.forward(self.layers(self.actor_net, self.actor), self.scale(obs))[-1]
        mean, log_std, _ = self.head(y)
        return mean.tanh() if noise is None else torch.addcmul(mean, log_std.exp(), noise).tanh()

    # -------- pieces, differentiable in the flat parameters that they are given

    def head(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The actor's output [S, B, 2 A] -> mean, clamped log_std, log_std as it was."""
        mean, raw = y.chunk(2, -1)
        return mean, raw.clamp(LOG_STD_MIN, LOG_STD_MAX), raw

    def sample(self, actor: Tensor, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actor rows [S, P], scaled obs, noise -> actions [S, B, A] and their log-densities [S, B]."""
        mean, log_std, _ = self.head(self.actor_net.forward(self.layers(self.actor_net, actor), obs)[-1])
        u = mean + log_std.exp() * noise
        return u.tanh(), log_density(u, log_std, noise)

    def behaviour_of(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The behaviour's output [S, n, 2 A] -> mean and standard deviation of the data's actions [S, n, A]."""
        mean, raw = y.chunk(2, -1)
        return mean.tanh(), BEHAVIOUR_STD_MIN + (1 - BEHAVIOUR_STD_MIN) * raw.sigmoid()

    def behaviour_loss(self, behaviour: Tensor, obs: Tensor, act: Tensor) -> Tensor:
        """[S]: behaviour rows [S, P], obs as the data hold it, act [S, n, A] -> the mean over rows and dimensions of
        -log N(act; mean, std), but for the constant."""
        net = self.actor_net
        mean, std = self.behaviour_of(net.forward(self.layers(net, behaviour), self.scale(obs))[-1])
        return (((act - mean) / std).square() / 2 + std.log()).mean((1, 2))

    def actor_loss(self, actor: Tensor, obs: Tensor, noise: Tensor, real: int = 0) -> tuple[Tensor, Tensor]:
        """[S]: alpha log pi - min Q, mean over the batch, and what the first `real` rows are away from the behaviour;
        and the mean of log pi [S]. obs as the data hold it."""
        obs = self.scale(obs)
        act, log_prob = self.sample(actor, obs, noise)
        q = self.values(self.critics, obs, act).min(1).values
        alpha = self.log_alpha.exp()[:, None]
        loss = (alpha * log_prob - q).mean(1)
        if self.config.cloning and real:
            read = lambda rows: self.actor_net.forward(self.layers(self.actor_net, rows), obs[:, :real])[-1]
            center, std = self.behaviour_of(read(self.behaviour))
            away = (self.head(read(actor))[0].tanh() - center).square() * self.pull(std)
            loss = loss + self.cloning() * q.detach().abs().mean(1) * away.mean((1, 2))
        return loss, log_prob.mean(1)

    def cloning(self) -> float | Tensor:
        """The setting's value at this update."""
        first, last = self.config.cloning, self.config.cloning_end
        if last is None or not self.config.total:
            return first
        return last + (first - last) * (self.updates < self.held).to(self.actor.dtype)

    def pull(self, std: Tensor) -> Tensor:
        """How much of `cloning` remains where the behaviour has these standard deviations."""
        return 1 / (1 + (std / self.config.narrow) ** 4)

    # -------- learning

    @torch.no_grad()
    def update(self, batch: Transitions, noise: Tensor, real: int = 0) -> dict[str, Tensor]:
        """One update of critics, actor, temperature and targets, in place. batch: [S, B, ...]; noise [2, S, B, A]:
        for the actions at obs, and at next_obs; real: how many of its first rows are the data's own, for `cloning`.
        Returns what to log, [S] each, without waiting for the device; "skipped" counts the optimiser's steps of this
        update (of 3, or of 4 with `cloning`) left out for a gradient that was not finite."""
        config, b = self.config, batch.reward.shape[-1]
        obs, after = self.scale(batch.obs), self.scale(batch.next_obs)
        alpha = self.log_alpha.exp()[:, None]  # [S, 1]

        # The actor serves both parts of the update as it is: one pass over obs and next_obs.
        work = self.work(self.actor_net, self.seeds, 2 * b)
        layers = self.layers(self.actor_net, self.actor)
        tape = self.actor_net.forward(layers, torch.cat([obs, after], 1), work)
        mean, log_std, raw = self.head(tape[-1])
        std, eps = log_std.exp(), torch.cat([noise[0], noise[1]], 1)
        u = torch.addcmul(mean, std, eps)
        act, log_prob = u.tanh(), log_density(u, log_std, eps)  # [S, 2 B, A], [S, 2 B]

        critic_work = self.work(self.critic_net, self.seeds * config.critics, b)
        value = self.values(self.target, after, act[:, b:], critic_work).amin(1)
        if not config.deterministic_backup:
            value = value - alpha * log_prob[:, b:]
        target = torch.addcmul(batch.reward, 1 - batch.terminal, value, value=config.gamma)
        if config.target_min is not None:
            target = target.clamp(min=config.target_min)
        logs = {}
        if config.robust:
            moved = self.perturbed(obs, batch.act, mean[:, :b].tanh(), tape)
            critic_loss, q, logs["robust"] = self.robust_grad(batch, obs, target, *moved)
        else:
            critic_loss, q = self.critic_grad(batch, obs, target)
        ok = self.critic_adam.step(self.critics, config.critic_lr)
        if config.spectral is not None:
            self.bound(ok)
        skipped = 1 - ok
        self.target.lerp_(self.critics, (config.tau * ok)[:, None, None])

        # Actor: d/du of alpha log pi is 2 alpha tanh(u); that of log_std itself is -alpha.
        act, log_prob, std, eps = act[:, :b], log_prob[:, :b], std[:, :b], eps[:, :b]
        best, dact = self.act_grad(self.critics, obs, act)  # [S, B], [S, B, A]
        a = alpha[..., None]
        du = (2 * a * act - dact * (1 - act * act)) / b
        dlog_std = (du * std * eps - a / b) * ((raw[:, :b] >= LOG_STD_MIN) & (raw[:, :b] <= LOG_STD_MAX))
        if config.cloning and real:
            mode, weight = mean[:, :real].tanh(), self.cloning() * best.abs().mean(1)  # [S, real, A], [S]
            center, width, logs["behaviour_loss"], ok = self.imitate(obs[:, :real], batch.act[:, :real])
            error, pull, skipped = mode - center, self.pull(width), skipped + 1 - ok
            du[:, :real] += weight[:, None, None] * cloning_grad(error) * pull * (1 - mode.square())
            logs["cloning"] = weight * (error.square() * pull).mean((1, 2))
            best = best - logs["cloning"][:, None]  # for the loss that is logged
        dy = torch.cat([du, dlog_std], -1)
        grads = self.layers(self.actor_net, self.actor_adam.grad)
        self.actor_net.backward(layers, [x[:, :b] for x in tape], dy, work, grads)
        skipped = skipped + 1 - self.actor_adam.step(self.actor, self.actor_lr())

        log_prob = log_prob.mean(1)
        torch.neg(log_prob + self.target_entropy, out=self.alpha_adam.grad[:, 0])
        skipped = skipped + 1 - self.alpha_adam.step(self.log_alpha, config.alpha_lr)
        self.updates.add_(1)
        return {
            "critic_loss": critic_loss,
            "actor_loss": alpha[:, 0] * log_prob - best.mean(1),
            "alpha": alpha[:, 0],
            "entropy": -log_prob,
            "q": q.mean((1, 2)),
            "skipped": skipped,
        } | logs

    def imitate(self, obs: Tensor, act: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step of the behaviour's network towards act [S, n, A] at scaled obs. Returns its mean, its standard
        deviation and its loss before, and whether the step was taken [S]."""
        net, work = self.actor_net, self.work(self.actor_net, self.seeds, obs.shape[1], "behaviour")
        layers = self.layers(net, self.behaviour)
        tape = net.forward(layers, obs, work)
        mean, std = self.behaviour_of(tape[-1])
        z = (act - mean) / std
        dstd = (std - BEHAVIOUR_STD_MIN) * (1 - std) / (1 - BEHAVIOUR_STD_MIN)  # of the sigmoid
        dy = torch.cat([z * (mean.square() - 1), (1 - z.square()) * dstd], -1) / (std.repeat(1, 1, 2) * act[0].numel())
        net.backward(layers, tape, dy, work, self.layers(net, self.behaviour_adam.grad))
        ok = self.behaviour_adam.step(self.behaviour, BEHAVIOUR_LR)
        return mean, std, (z.square() / 2 + std.log()).mean((1, 2)), ok

    # -------- regularisers of the critics

    def perturbed(self, obs: Tensor, act: Tensor, pi: Tensor, tape: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Each critic's worst states near obs, [S, N, B, O], by one step of the fast gradient sign method, and the
        policy's mean actions there [S, N, B, A]. obs as the networks read it; pi [S, B, A] and the tape (whose first B
        rows are read and stay as they are): of the actor at obs."""
        net, (s, b, o), n = self.critic_net, obs.shape, self.critics.shape[1]
        if net.layer_norm:
            return self.perturbed_plainly(self.critics, obs, act)
        layers, work = self.layers(net, self.critics), self.work(net, s * n, 2 * b)
        x = torch.cat([pairs(obs, act, n), pairs(obs, pi, n)], 1)
        y = net.forward(layers, x, work)
        gap = y[-1][:, b:, 0] - y[-1][:, :b, 0]  # [S * N, B]
        dx = net.backward(layers, [z[:, b:] for z in y], torch.ones_like(gap)[..., None], work, None, slice(None))
        assert dx is not None
        dx = dx.unflatten(0, (s, n))  # [S, N, B, O + A]
        dmean = (dx[..., o:] * (1 - pi * pi)[:, None]).flatten(1, 2)
        layers, work = self.layers(self.actor_net, self.actor), self.work(self.actor_net, s, n * b, "perturbed")
        dy = torch.cat([dmean, torch.zeros_like(dmean)], -1)
        again = [z[:, :b].repeat(1, n, 1) for z in tape]
        through = self.actor_net.backward(layers, again, dy, work, None, slice(None))
        assert through is not None
        up = torch.where(gap < 0, -1.0, 1.0).view(s, n, b, 1)  # where they agree both ways lead up
        after = obs[:, None] + (dx[..., :o] + through.view(s, n, b, o)).sign() * up * self.config.robust_eps
        mean = self.actor_net.forward(layers, after.flatten(1, 2), work)[-1].chunk(2, -1)[0]
        return after, mean.tanh().view(s, n, b, -1)

    def perturbed_plainly(self, critics: Tensor, obs: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
        """`perturbed` by autograd, for the given critics."""
        pi = lambda x: self.head(self.actor_net.forward(self.layers(self.actor_net, self.actor), x)[-1])[0].tanh()
        n = critics.shape[1]
        with torch.enable_grad():
            x = obs[:, None].repeat(1, n, 1, 1).flatten(1, 2).requires_grad_()  # a copy for each critic
            mine = torch.eye(n, dtype=obs.dtype, device=obs.device)[:, :, None]
            value = self.values(critics.detach(), x, pi(x)).unflatten(2, (n, -1))  # [S, N, N, B]
            (slope,) = torch.autograd.grad((value * mine).sum(), x)
            gap = (value * mine).sum(2) - self.values(critics.detach(), obs, act)
        up = torch.where(gap < 0, -1.0, 1.0).detach()[..., None]
        after = obs[:, None] + slope.unflatten(1, (n, -1)).sign() * up * self.config.robust_eps
        return after, pi(after.flatten(1, 2)).unflatten(1, (n, -1))

    def gaps(self, critics: Tensor, obs: Tensor, act: Tensor, after: Tensor, pi: Tensor) -> tuple[Tensor, Tensor]:
        """Q(s, a), and Q(s', pi(s')) - Q(s, a), both [S, N, B]; after [S, N, B, O], pi [S, N, B, A]."""
        n, b = critics.shape[1], obs.shape[1]
        x = torch.cat([pairs(obs, act, n), torch.cat([after, pi], -1).flatten(0, 1)], 1)
        y = self.critic_net.forward(self.layers(self.critic_net, critics), x)[-1][..., 0].unflatten(0, (-1, n))
        return y[..., :b], y[..., b:] - y[..., :b]

    def robust_loss(self, critics: Tensor, batch: Transitions, after: Tensor, pi: Tensor) -> Tensor:
        """[S]: the mean over the batch, summed over the critics, of (Q(s', pi(s')) - Q(s, a))^2, without its
        coefficient; after and pi as `perturbed` gives them."""
        return self.gaps(critics, self.scale(batch.obs), batch.act, after, pi)[1].square().mean(2).sum(1)

    def robust_grad(
        self, batch: Transitions, obs: Tensor, target: Tensor, after: Tensor, pi: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `critic_grad`, of critic_loss + robust * robust_loss. Returns the two losses and Q: [S], [S, N, B], [S],
        as (critic_loss, Q, robust_loss)."""
        net, n, b, weight = self.critic_net, self.critics.shape[1], obs.shape[1], self.config.robust
        if net.layer_norm:
            with torch.enable_grad():
                critics = self.critics.detach().requires_grad_()
                q, gap = self.gaps(critics, obs, batch.act, after, pi)
                loss, extra = ((x.square().mean(2).sum(1)) for x in (q - target[:, None], gap))
                self.critic_adam.grad.copy_(torch.autograd.grad((loss + weight * extra).sum(), critics)[0].flatten(1))
            return loss.detach(), q.detach(), extra.detach()
        layers, work = self.layers(net, self.critics), self.work(net, self.seeds * n, 2 * b)
        x = torch.cat([pairs(obs, batch.act, n), torch.cat([after, pi], -1).flatten(0, 1)], 1)
        tape = net.forward(layers, x, work)
        y = tape[-1][..., 0].unflatten(0, (-1, n))
        q, gap = y[..., :b], y[..., b:] - y[..., :b]
        error, pull = q - target[:, None], weight * gap
        dy = (torch.cat([error - pull, pull], -1) * (2 / b)).flatten(0, 1)[..., None]
        net.backward(layers, tape, dy, work, self.layers(net, self.critic_adam.grad))
        return error.square().mean(2).sum(1), q, gap.square().mean(2).sum(1)

    @torch.no_grad()
    def find_vectors(self) -> None:
        """Sets the vectors of the power iteration to the singular vectors themselves."""
        weights = [layer[0] for layer in self.layers(self.critic_net, self.critics)]
        first = [torch.linalg.svd(w, full_matrices=False)[2][:, 0] for w in weights]
        self.vectors.copy_(torch.cat(first, 1).view_as(self.vectors))

    @torch.no_grad()
    def bound(self, ok: Tensor) -> None:
        """Scales the critics' layers back to the largest norm that they may have; of the seeds that ok [S] names with
        a 1, the others and their vectors stay as they are."""
        assert self.config.spectral is not None
        n, flat = self.critics.shape[1], self.vectors.flatten(0, 1)
        here = ok.bool().repeat_interleave(n)[:, None]
        layers = self.layers(self.critic_net, self.critics)
        for (weight, *_), old in zip(layers, flat.split(self.critic_net.sizes[1:], 1), strict=True):
            norm, new = power_iteration(weight, old, self.config.spectral_iterations)
            old.copy_(torch.where(here, new, old))
            scale = (self.config.spectral / norm).clamp(max=1.0)
            weight.mul_(torch.where(here[:, 0], scale, 1.0)[:, None, None])

    def load_linears(self, seed: int, actor: Layers, critics: Sequence[Layers], target: Sequence[Layers]) -> None:
        super().load_linears(seed, actor, critics, target)
        if self.config.spectral is not None:
            self.find_vectors()
            for flat in (self.critics[seed : seed + 1], self.target[seed : seed + 1]):
                for weight, *_ in self.layers(self.critic_net, flat):
                    norm = torch.linalg.matrix_norm(weight, 2)
                    weight.mul_((self.config.spectral / norm).clamp(max=1.0)[:, None, None])

    def actor_lr(self) -> float | Tensor:
        """The actor's learning rate at this update."""
        if not self.config.total:
            return self.config.actor_lr
        return 0.5 * self.config.actor_lr * (1 + (math.pi * self.part()).cos())

    @property
    def held(self) -> int:
        """After how many of `total` updates cloning changes."""
        config = self.config
        lets_go = config.cloning > 0 and config.cloning_end is not None
        return 0 if not lets_go else min(round(config.cloning_hold * config.total), config.total - 1)

    def part(self) -> Tensor:
        """[]: of `total` updates, or of those before and those after cloning changes, how many are done."""
        done, held, total = self.updates.to(self.actor.dtype), self.held, self.config.total
        after = ((done - held) / (total - held)).clamp(max=1)
        return torch.where(done < held, done / max(held, 1), after)


def log_density(u: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
    """[..., A] -> [...]: log-density of tanh(u) where u = mean + exp(log_std) * noise. log(1 - tanh(u)^2) is written
    as 2 (log 2 - u - log(1 + exp(-2 u))), which is exact where tanh(u) rounds to 1."""
    half = torch.add(u, F.softplus(-u, 2), alpha=2) - log_std / 2  # half of each term, without the constants
    constant = u.shape[-1] * (0.5 * math.log(2 * math.pi) + 2 * math.log(2))
    return 2 * half.addcmul(noise, noise, value=-0.25).sum(-1) - constant


# ---------------------------------------------------------------- how smooth the value is, and what a model costs it


def local_lipschitz(agent: Sac, obs: Tensor, act: Tensor | None = None) -> dict[str, Tensor]:
    """How steep Q, the least critic's, is at obs [S, B, O], under the actions act [S, B, A], held fixed (the policy's
    mean ones where None): [S] each, the mean and the largest over the B of the norms of its gradient with respect to
    the raw observation. The gradient's 2-norm is the local Lipschitz constant for changes of the observation that are
    measured by their 2-norm ("l2_mean", "l2_max"); its 1-norm is that for changes measured by their largest component,
    as in the ball of `robust_eps` ("linf_mean", "linf_max")."""
    act = (agent.act(obs) if act is None else act).detach()
    with torch.enable_grad():
        x = obs.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(agent.q(x, act).amin(1).sum(), x)
    norms = {"l2": slope.norm(dim=-1), "linf": slope.abs().sum(-1)}  # [S, B]
    return {f"{k}_mean": x.mean(1) for k, x in norms.items()} | {f"{k}_max": x.amax(1) for k, x in norms.items()}


@torch.no_grad()
def value_aware_error(
    agent: Sac, model: Dynamics, batch: Transitions, generator: torch.Generator, dt: float = 1.0
) -> Tensor:
    """[S]: the mean of |V(s'_model) - V(s'_real)| over transitions [B] that the model was not fitted to, with
    V(s) = min Q(s, pi(s)) under the policy's mean action. s'_model is one draw of the model. Transitions that end the
    task, whose value after it nobody asks for, are left out; NaN where there is no other."""
    cond = model.condition(first_context(model, batch.obs.device))
    noise = model.draw(len(batch.obs), 1, generator)
    inp = StepInput(batch.act, noise, torch.full_like(batch.reward, dt)[:, None])
    guess = model.step(model.init(batch.obs, cond), inp, cond)[1].obs
    both = torch.cat([guess, batch.next_obs]).expand(agent.seeds, -1, -1)
    ours, real = agent.q(both, agent.act(both)).amin(1).chunk(2, 1)  # [S, B]
    weight = 1 - batch.terminal
    return (torch.where(weight > 0, (ours - real).abs(), 0.0)).sum(1) / weight.sum()


def cloning_grad(error: Tensor) -> Tensor:
    """The gradient of the mean square of errors [S, B, A], one mean a seed."""
    return error * (2 / (error.shape[1] * error.shape[2]))
