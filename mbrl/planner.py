"""One sampling planner: CEM, iCEM (Pinneri et al., CoRL 2020), MPPI (Williams et al., ICRA 2017) and TD-MPC2's mixture
(Hansen et al., ICLR 2024) are settings of it, not classes.

Shapes: E environments, N candidates, H steps, A actions, P particles. Nothing here holds a state or draws a number: the
plan is a tuple that the caller keeps, noise comes in as tensors, shapes are fixed by the settings, and there is no host
synchronisation, so that a whole plan is one graph."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mbrl.core import Dynamics, StepInput, Tree, demand, repeat
from mbrl.rollout import Reward, Terminal

Critic = Callable[[Tensor], Tensor]  # obs [B, O] -> [B], the value of what comes after
Value = Callable[[Tensor], Tensor]  # acts [E, N, H, A] -> [E, N], higher is better


@dataclass(frozen=True)
class Planner:
    """How to search. Actions are in [-1, 1], and so are the units of `std`.

    Raises ValueError for settings that cannot be."""

    horizon: int = 15
    """Steps of a plan, H."""
    samples: int = 256
    """Candidates of the first iteration, proposals included; kept elites come on top."""
    iterations: int = 5
    elites: int = 32
    """Candidates that the next mean and standard deviation are made of; 0: all of them."""
    temperature: float = math.inf
    """Elites weigh softmax(return / temperature); infinite: all alike."""
    color: float = 0.0
    """Exponent of the noise's spectrum over time, power ~ 1 / f^color: 0 is white, 2 is Brownian."""
    keep: float = 0.0
    """The share of the elites that enter the next iteration, and, shifted by a step, the next plan."""
    decay: float = 1.0
    """Each iteration draws so many times fewer candidates than the one before, never fewer than two an elite."""
    momentum: float = 0.0
    """Of the mean and the standard deviation, from one iteration to the next."""
    std: float = 0.5
    """The standard deviation that a plan begins with."""
    min_std: float = 0.05
    max_std: float = 2.0
    execute: Literal["mean", "best"] = "mean"
    """What is returned: the mean of the last elites, or the best candidate that any iteration saw."""
    join: bool = False
    """The mean is a candidate of the last iteration."""
    proposals: int = 0
    """Candidates that come from a policy, the same in every iteration (TD-MPC2, LOOP)."""
    around: bool = False
    """A search begins around the mean of the proposals instead of the last plan: for policies that are good already."""
    gradient_steps: int = 0
    """Ascent steps of each iteration's elites along the gradient of their return; an elite that does not gain stays."""
    gradient_rate: float = 0.05
    """Length of such a step, in root-mean-square action."""

    def __post_init__(self) -> None:
        counts = ("horizon", "samples", "iterations", "elites", "proposals", "gradient_steps")
        demand("Planner", *((k, x := getattr(self, k), "a whole number", isinstance(x, Integral)) for k in counts))
        wrong = [
            f"{name} is {getattr(self, name)}, expected {what}"
            for name, what, holds in (
                ("horizon", ">= 1", self.horizon >= 1),
                ("iterations", ">= 1", self.iterations >= 1),
                ("elites", ">= 0", self.elites >= 0),
                ("samples", f">= 1 and elites, {self.elites}", self.samples >= max(1, self.elites)),
                ("temperature", "> 0", self.temperature > 0),
                ("color", ">= 0, finite", 0 <= self.color < math.inf),
                ("keep", "in [0, 1]", 0 <= self.keep <= 1),
                ("decay", ">= 1", self.decay >= 1),
                ("momentum", "in [0, 1)", 0 <= self.momentum < 1),
                ("std", "> 0, finite", 0 < self.std < math.inf),
                ("min_std", f"in [0, max_std], max_std is {self.max_std}", 0 <= self.min_std <= self.max_std),
                ("execute", "'mean' or 'best'", self.execute in ("mean", "best")),
                ("proposals", f"in [0, samples), samples is {self.samples}", 0 <= self.proposals < self.samples),
                ("around", "False where there are no proposals", self.proposals > 0 or not self.around),
                ("gradient_steps", ">= 0", self.gradient_steps >= 0),
                ("gradient_rate", "> 0, finite", 0 < self.gradient_rate < math.inf),
            )
            if not holds
        ]
        if not wrong and min(self.sizes()) < 1:
            last = min(self.sizes()) + self.proposals
            wrong.append(
                f"decay is {self.decay}, which leaves {last} candidates, expected more than the proposals, "
                f"{self.proposals}"
            )
        if wrong:
            raise ValueError("Planner: " + "; ".join(wrong))

    @property
    def kept(self) -> int:
        """How many elites are kept."""
        return int(self.keep * self.most_elites + 1e-9)

    @property
    def most_elites(self) -> int:
        """How many of the first iteration's candidates are elites."""
        return self.elites or self.samples

    def sizes(self) -> list[int]:
        """Candidates that each iteration draws: without proposals, kept elites and the mean."""
        least = min(2 * self.most_elites, self.samples)
        # a power beyond the largest number leaves none
        left = lambda i: int(self.samples / self.decay**i) if i == 0 or i * math.log(self.decay) < 700 else 0
        return [max(least, left(i)) - self.proposals for i in range(self.iterations)]

    def valued(self) -> list[int]:
        """Candidates that each iteration values: those, and the proposals, the kept elites and at last the mean."""
        counts = [n + self.proposals + self.kept for n in self.sizes()]
        return [*counts[:-1], counts[-1] + self.join]

    def noise(self, envs: int, act: int, generator: torch.Generator, like: Tensor) -> list[Tensor]:
        """One plan's white noise: per iteration, [E, N_i, H, A]."""
        draw: dict[str, Any] = {"generator": generator, "dtype": like.dtype, "device": like.device}
        return [torch.randn(envs, n, self.horizon, act, **draw) for n in self.sizes()]


CEM = Planner()
# But for the floor of the standard deviation, `min_std`, which the paper has not, and the last action of a kept elite
# that is moved on, which is held here and drawn anew there.
ICEM = Planner(
    horizon=30, samples=40, iterations=3, elites=10, color=2.5, keep=0.3, decay=1.25, momentum=0.1, execute="best",
    join=True,
)  # fmt: skip
MPPI = Planner(iterations=1, elites=0, temperature=1.0)
# TD-MPC2 multiplies returns by 0.5 where `temperature` divides. Its policy's trajectories come as proposals. It
# executes one of its elites, drawn by weight, where this executes the mean, and begins the last step at 0 where this
# holds it.
TDMPC = Planner(horizon=3, samples=512, iterations=6, elites=64, temperature=2.0, std=2.0)
# Around a learned policy, with its critic behind the horizon (LOOP: Sikchi et al., CoRL 2021).
LOOP = Planner(
    horizon=4, samples=100, iterations=3, elites=20, momentum=0.1, std=0.1, min_std=0.02, proposals=5, around=True
)
PRESETS: dict[str, Planner] = {"cem": CEM, "icem": ICEM, "mppi": MPPI, "tdmpc": TDMPC}
OVER: dict[str, Planner] = {"loop": LOOP, "tdmpc": replace(TDMPC, proposals=24)}
"""Around a policy that was learned."""


@dataclass(frozen=True)
class Over:
    """What planning over a policy is to have otherwise than one of `OVER` and the policy's own worth have it; what is
    None stays. See `Planner` and `Worth`."""

    horizon: int | None = None
    samples: int | None = None
    iterations: int | None = None
    elites: int | None = None
    temperature: float | None = None
    color: float | None = None
    keep: float | None = None
    decay: float | None = None
    momentum: float | None = None
    std: float | None = None
    min_std: float | None = None
    max_std: float | None = None
    execute: Literal["mean", "best"] | None = None
    join: bool | None = None
    proposals: int | None = None
    around: bool | None = None
    gradient_steps: int | None = None
    gradient_rate: float | None = None
    discount: float | None = None
    particles: int | None = None
    pinned: bool | None = None
    """Off where there is a limit on "disagreement", unless it is given."""
    pessimism: float | None = None
    uncertainty: str | None = None
    limit: float | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What is to be otherwise."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    def applied(self, planner: Planner, worth: "Worth") -> tuple[Planner, "Worth"]:
        """These, but for what is to be otherwise. Raises ValueError where they cannot be."""
        of = lambda x: replace(x, **{k: v for k, v in self.given.items() if k in asdict(x)})
        planner, worth = of(planner), of(worth)
        free = self.pinned is None and worth.limit < math.inf and worth.uncertainty == "disagreement"
        return planner, replace(worth, pinned=False) if free else worth


class Plan(NamedTuple):
    """Where the next search begins."""

    mean: Tensor  # [E, H, A]
    std: Tensor  # [E, H, A]
    elites: Tensor  # [E, kept, H, A]


class Found(NamedTuple):
    """What a search found."""

    acts: Tensor  # [E, H, A]
    value: Tensor  # [E]  the best candidate's; -inf where no candidate was finite
    some: Tensor  # [E] bool  whether any candidate was finite; where not, `acts` is the mean that the search began with
    bad: Tensor  # [E]  how many candidates were not finite, of `seen`
    seen: int


# ---------------------------------------------------------------- the search


def colored(white: Tensor, color: float) -> Tensor:
    """White noise [..., H, A] -> noise of the same shape, unit variance and power ~ 1 / f^color along H; the zeroth
    frequency has the power of the first (Timmer & Koenig, 1995)."""
    steps = white.shape[-2]
    if color == 0 or steps == 1:
        return white
    scale = torch.arange(steps // 2 + 1, device=white.device, dtype=white.dtype).clamp(min=1) ** (-color / 2)
    weight = torch.full_like(scale, 2.0)  # every frequency but the ends stands for two
    weight[:1].fill_(1.0)
    if steps % 2 == 0:
        weight[-1:].fill_(1.0)
    scale = scale / ((weight * scale**2).sum() / steps).sqrt()
    return torch.fft.irfft(torch.fft.rfft(white, dim=-2) * scale[:, None], n=steps, dim=-2)


def fresh(p: Planner, envs: int, act: int, like: Tensor) -> Plan:
    """A plan that knows nothing: mean 0, and kept elites that are the mean, of which `search` counts one."""
    mean = like.new_zeros(envs, p.horizon, act)
    return Plan(mean, torch.full_like(mean, p.std), mean[:, None].expand(-1, p.kept, -1, -1).clone())


def shift(p: Planner, plan: Plan) -> Plan:
    """The plan one step later: the last action is held, the standard deviation begins anew."""
    later = lambda x: torch.cat([x[..., 1:, :], x[..., -1:, :]], -2)
    return Plan(later(plan.mean), torch.full_like(plan.std, p.std), later(plan.elites))


def reset(p: Planner, plan: Plan, ended: Tensor) -> Plan:
    """The plan, begun anew in the environments where ended [E] holds: nothing of it survives there."""
    new = fresh(p, plan.mean.shape[0], plan.mean.shape[-1], plan.mean)
    return Plan(*(torch.where(ended.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(new, plan, strict=True)))


def search(
    p: Planner, value: Value, start: Plan, white: Iterable[Tensor], proposals: Tensor | None = None
) -> tuple[Found, Plan]:
    """Plans of every environment at once, and the plan from which to go on (see `shift`).

    value: acts [E, N, H, A] in [-1, 1] -> [E, N]; what is not finite counts as minus infinity. white: per iteration,
    [E, N_i, H, A] standard normal, as `Planner.noise` draws it. proposals: [E, p.proposals, H, A]."""
    mean, std, kept = start
    best, best_value = mean, mean.new_full(mean.shape[:1], -torch.inf)
    bad, seen = torch.zeros_like(best_value, dtype=torch.int64), 0
    if p.proposals and (proposals is None or proposals.shape[1] != p.proposals):
        got = "none" if proposals is None else proposals.shape[1]
        raise ValueError(f"search: got {got} proposals, expected {p.proposals}, as the planner has it")
    if proposals is not None:
        proposals = proposals.to(mean)
    if p.around and proposals is not None:
        fine = proposals.isfinite().flatten(2).all(-1)[..., None, None]  # [E, n, 1, 1]
        total = torch.where(fine, proposals.clamp(-1, 1), 0.0).sum(1)
        mean = torch.where(fine.any(1), total / fine.sum(1).clamp(min=1), mean)
    noises = list(white)
    if len(noises) != p.iterations:
        raise ValueError(
            f"search: got noise of {len(noises)} iterations, expected {p.iterations}, as the planner has it"
        )
    copies = (kept[:, 1:] == kept[:, :1]).flatten(2).all(-1)  # [E, kept - 1]  of a new plan's, all but one
    for i, noise in enumerate(noises):
        parts = [(mean[:, None] + std[:, None] * colored(noise, p.color)).clamp(-1, 1), kept]
        if proposals is not None and p.proposals:
            parts.append(proposals.clamp(-1, 1))
        if p.join and i == len(noises) - 1:
            parts.append(mean[:, None])
        acts = torch.cat(parts, 1)
        v = _finite(value(acts), acts)
        bad, seen = bad + (v == -torch.inf).sum(1), seen + v.shape[1]
        if i == 0 and p.kept > 1:
            others = v[:, noise.shape[1] + 1 : noise.shape[1] + p.kept]
            others.copy_(torch.where(copies, -torch.inf, others))
        top, index = v.topk(min(p.elites or v.shape[1], v.shape[1]), 1)
        ok = top > -torch.inf  # [E, elites]  with too few finite candidates, the last elites are none
        elite = acts.gather(1, index[..., None, None].expand(-1, -1, *acts.shape[2:]))
        elite = torch.where(ok[..., None, None], elite, mean[:, None])  # 0 * nan is nan: a weight of 0 is not enough
        for _ in range(p.gradient_steps):
            elite, top = _ascend(value, elite, top, p.gradient_rate)
        if p.gradient_steps:
            top, order = top.sort(dim=1, descending=True, stable=True)
            elite = elite.gather(1, order[..., None, None].expand_as(elite))
            ok = top > -torch.inf
        w = torch.where(ok, torch.exp((top - top[:, :1]) / p.temperature), 0.0)
        w = (w / w.sum(1, keepdim=True).clamp(min=1.0))[..., None, None]  # the best weighs 1, so that only none is 0
        new = (w * elite).sum(1)
        spread = (w * (elite - new[:, None]) ** 2).sum(1).sqrt()
        some = ok[:, :1, None]
        better = ok[:, 0] & (top[:, 0] > best_value)
        best = torch.where(better[:, None, None], elite[:, 0], best)
        best_value = torch.where(better, top[:, 0], best_value)
        mean = torch.where(some, torch.lerp(new, mean, p.momentum), mean)
        std = torch.where(some, torch.lerp(spread, std, p.momentum).clamp(p.min_std, p.max_std), std)
        if p.kept:
            few = elite[:, : p.kept]
            kept = torch.cat([few, mean[:, None].expand(-1, p.kept - few.shape[1], -1, -1)], 1)
    acts = best if p.execute == "best" else mean
    return Found(acts, best_value, best_value > -torch.inf, bad, seen), Plan(mean, std, kept)


def _finite(v: Tensor, acts: Tensor) -> Tensor:
    """A value [E, N] that is not finite, or whose actions are not, is minus infinity; of the actions' type."""
    v = v.to(acts)
    return torch.where(v.isfinite() & acts.isfinite().flatten(2).all(-1), v, -torch.inf)


def _ascend(value: Value, elite: Tensor, v: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Elites [E, n, H, A] of value v [E, n] one step along their gradient, where that gains. What stands for an elite
    that is none, of value minus infinity, remains none."""
    with torch.enable_grad():
        x = elite.detach().requires_grad_()
        y = value(x)
        (grad,) = torch.autograd.grad(torch.where(y.isfinite(), y, 0.0).sum(), x)
    size = grad.square().mean((-2, -1), keepdim=True).sqrt()
    move = torch.where((size > 0) & size.isfinite(), rate * grad / size, 0.0)
    new = (elite + move).clamp(-1, 1)
    with torch.no_grad():
        gained = _finite(value(new), new)
    better = (gained > v) & (v > -torch.inf)
    return torch.where(better[..., None, None], new, elite), torch.where(better, gained, v)


# ---------------------------------------------------------------- what a plan is worth


BEYOND = -1e9  # the worth of a candidate just beyond the limit: the same in every call, whatever else is in it


@dataclass(frozen=True)
class Worth:
    """How a plan is valued: sum over t of discount^t reward_t while the episode lasts, and then discount^H critic."""

    discount: float = 1.0
    particles: int = 1
    """Futures of a candidate, the same noise for all candidates."""
    pinned: bool = True
    """A particle keeps one part of the learner (an ensemble's member) all the way: TS-infinity. Otherwise the learner
    draws one for every step: TS-1."""
    pessimism: float = 0.0
    """beta in mean - beta * std over the particles."""
    uncertainty: str = "disagreement"
    limit: float = math.inf
    """A candidate that exceeds this uncertainty while its episode lasts, in any particle, is worth -1e9 and less, the
    less the more it exceeds, whatever it earns; where it is NaN, the worth is. "disagreement" needs every part
    evaluated: not with `pinned`."""

    def __post_init__(self) -> None:
        demand("Worth", ("particles", self.particles, "a whole number", isinstance(self.particles, Integral)))
        if not (0 < self.discount <= 1 and self.particles >= 1 and self.limit >= 0 and math.isfinite(self.pessimism)):
            raise ValueError(
                f"Worth: got discount {self.discount}, particles {self.particles}, limit {self.limit}, pessimism "
                f"{self.pessimism}; expected 0 < discount <= 1, particles >= 1, limit >= 0, a finite pessimism"
            )


def value(
    worth: Worth,
    model: Dynamics,
    state: Tree,
    cond: Tree,
    acts: Tensor,
    noise: Sequence[Tensor],
    dt: Tensor,
    *,
    reward: Reward | None = None,
    terminal: Terminal | None = None,
    critic: Critic | None = None,
) -> Tensor:
    """The worth [E, N] of plans [E, N, H, A] from the states [E, ...] of E environments.

    noise: per step, [E, P * W], P the particles. dt: [E, 1]. reward: the task's; the learner's own where None.
    Rows are [E, P, N]: one condition serves whether it leads with 1, with E (a context an environment) or with E * P
    (a part a particle, as `model.pinned` gives), and is never copied. What happens after an episode's end counts
    nothing, whatever it is; a prediction that is not finite before it makes the worth not finite."""
    envs, n, _, width = acts.shape
    p, w = worth.particles, model.noise_dim
    rows, dt = repeat((state, dt), p * n)
    obs = model.observe(rows, cond)
    total, alive, factor = acts.new_zeros(envs * p * n), None, 1.0
    excess = acts.new_zeros(envs * p * n) if worth.limit < math.inf else None
    for t, z in enumerate(noise):
        act = acts[:, None, :, t].expand(-1, p, -1, -1).reshape(-1, width)
        same = z.reshape(envs * p, 1, w).expand(-1, n, -1).flatten(0, 1)  # a view where there is one row of it
        rows, pred = model.step(rows, StepInput(act, same, dt), cond)
        gain = pred.reward if reward is None else reward(obs, act, pred.obs)
        gain = torch.add(
            gain, pred.obs.sum(-1), alpha=0
        )  # a prediction that is not finite shows, even where it would end the episode
        if excess is not None:
            if worth.uncertainty not in pred.uncertainty:
                has = ", ".join(pred.uncertainty) or "none"
                raise ValueError(f"value: the limit is on {worth.uncertainty!r}, the learner reports {has}")
            over = (pred.uncertainty[worth.uncertainty] - worth.limit).clamp(min=0)
            excess = excess + (over if alive is None else torch.where(alive, over, 0.0))
        total = torch.add(total, gain if alive is None else torch.where(alive, gain, 0.0), alpha=factor)
        if terminal is not None:
            on = ~terminal(obs, act, pred.obs)
            alive = on if alive is None else alive & on
        factor *= worth.discount
        obs = pred.obs
    if critic is not None:
        last = factor * critic(obs)
        total = total + (last if alive is None else torch.where(alive, last, 0.0))
    total = total.reshape(envs, p, n)
    worths = total.mean(1)
    if worth.pessimism:
        worths = worths - worth.pessimism * total.std(1, correction=0)
    if excess is None:
        return worths
    over = excess.reshape(envs, p, n).amax(1)
    return torch.where(worths.isfinite() & ~(over <= 0), BEYOND * (1 + over), worths)  # NaN is within no limit


def propose(
    model: Dynamics,
    state: Tree,
    cond: Tree,
    policy: Callable[[Tensor, Tensor], Tensor],
    noise: Sequence[tuple[Tensor, Tensor]],
    dt: Tensor,
    n: int,
) -> Tensor:
    """n plans [E, n, H, A] that a policy makes in the model from the states of E environments.

    policy: (obs [B, O], noise [B, A]) -> act [B, A]. noise: per step, ([E * n, A], [E * n, W]). cond: leads with 1, E
    or E * n."""
    rows, dt = repeat((state, dt), n)
    acts = []
    for act_noise, model_noise in noise:
        act = policy(model.observe(rows, cond), act_noise)
        rows, _ = model.step(rows, StepInput(act, model_noise, dt), cond)
        acts.append(act)
    acts = torch.stack(acts, 1)  # [E * n, H, A]
    return acts.reshape(-1, n, *acts.shape[1:])
