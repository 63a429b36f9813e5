"""Piecewise-linear recurrent networks for dynamics reconstruction, and their training by teacher forcing in between.

The latent state z [M] moves by

    z' = A z + phi(z) + h1 + C s,    A diagonal, s the action,

where phi is the kind's: shallow (Hess et al., ICML 2023, arXiv 2306.04406), dendritic (Brenner et al., ICML 2022, arXiv
2207.02542) or almost linear (Brenner et al., NeurIPS 2024, arXiv 2410.14240). What is observed is the first of the
latent states, or x = B z. `fit_plrnn` trains several seeds at once with the published schedule."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbrl import forced, parallel
from mbrl.core import Diverged, Dynamics, Prediction, Segment, Spec, StepInput, Tree, pull
from mbrl.data import Dataset
from mbrl.nets import Normalizer, StackedMLP, apply_layers, uniform, variance

Params = Mapping[str, Tensor]  # each leads with the seeds, [S, ...]
LOG_VARIANCE = (-12.0, 2.0)  # the noise head's, softly bounded
QUARTILE = 0.6744897501960817  # half of a standard normal's draws are within it
MEASURED = 2**17  # transitions that constant noise is measured on


# ---------------------------------------------------------------- the kinds


@dataclass(frozen=True)
class Shallow:
    """phi(z) = W1 (relu(W2 z + h2) [- relu(W2 z), clipped]), with `hidden` units L: W1 [M, L], W2 [L, M], h2 [L].
    Clipped, orbits are bounded wherever |A| < 1."""

    hidden: int = 50
    clipped: bool = True

    def init(self, m: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        bound = 1 / self.hidden**0.5
        h2 = _uniform(bound, generator, self.hidden) if self.clipped else torch.zeros(self.hidden)
        W1, W2 = _uniform(bound, generator, m, self.hidden), _uniform(1 / m**0.5, generator, self.hidden, m)
        return {"A": _positive(m, generator).diagonal().clone(), "W1": W1, "W2": W2, "h2": h2}

    def phi(self, p: Params, z: Tensor) -> Tensor:
        """z [S, R, M] -> [S, R, M]"""
        u = z @ p["W2"].mT
        c = torch.relu(u + p["h2"][:, None])
        return (c - torch.relu(u) if self.clipped else c) @ p["W1"].mT

    def slope(self, p: Params, z: Tensor) -> Tensor:
        """The Jacobian of phi, [S, R, M, M]."""
        u = z @ p["W2"].mT
        on = (u + p["h2"][:, None] > 0).to(u)
        if self.clipped:
            on = on - (u > 0).to(u)
        outer = p["W1"].mT[..., :, None] * p["W2"][..., None, :]  # [S, L, M, M]
        return (on @ outer.flatten(2)).unflatten(2, z.shape[-1:] * 2)


@dataclass(frozen=True)
class Dendritic:
    """phi(z) = W sum_b alpha_b (relu(z - H_b) [- relu(z), clipped]), with `bases` b: W [M, M], alpha [B], H [B, M]."""

    bases: int = 20
    clipped: bool = False

    def init(self, m: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        both = _positive(m, generator)
        A = both.diagonal().clone()
        alpha = _uniform(1 / self.bases**0.5, generator, self.bases)
        return {"A": A, "W": both - A.diag(), "alpha": alpha, "H": _uniform(2.0, generator, self.bases, m)}

    def phi(self, p: Params, z: Tensor) -> Tensor:
        c = torch.relu(z[..., None, :] - p["H"][:, None])  # [S, R, B, M]
        if self.clipped:
            c = c - torch.relu(z)[..., None, :]
        return (p["alpha"][:, None, None] @ c)[..., 0, :] @ p["W"].mT

    def slope(self, p: Params, z: Tensor) -> Tensor:
        on = (z[..., None, :] > p["H"][:, None]).to(z)
        if self.clipped:
            on = on - (z > 0).to(z)[..., None, :]
        return p["W"][:, None] * (p["alpha"][:, None, None] @ on)  # [S, 1, M, M] * [S, R, 1, M]


@dataclass(frozen=True)
class AlmostLinear:
    """phi(z) = W (z with only its last `rectified` units rectified): W [M, M]."""

    rectified: int = 2

    def init(self, m: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        if not 0 <= self.rectified <= m:
            raise ValueError(f"AlmostLinear: rectified is {self.rectified}, expected 0 to the {m} latent states")
        both = _positive(m, generator)
        A = both.diagonal().clone()
        return {"A": A, "W": both - A.diag()}

    def phi(self, p: Params, z: Tensor) -> Tensor:
        free = z.shape[-1] - self.rectified
        return torch.cat([z[..., :free], torch.relu(z[..., free:])], -1) @ p["W"].mT

    def slope(self, p: Params, z: Tensor) -> Tensor:
        free = z.shape[-1] - self.rectified
        on = torch.cat([torch.ones_like(z[..., :free]), (z[..., free:] > 0).to(z)], -1)
        return p["W"][:, None] * on[..., None, :]


Kind = Shallow | Dendritic | AlmostLinear


def step(kind: Kind, p: Params, z: Tensor, act: Tensor) -> Tensor:
    """z [S, R, M], act [S, R, A] -> z' [S, R, M]"""
    return p["A"][:, None] * z + kind.phi(p, z) + p["h1"][:, None] + act @ p["C"].mT


def jacobian(kind: Kind, p: Params, z: Tensor) -> Tensor:
    """dz' / dz [S, R, M, M]"""
    return torch.diag_embed(p["A"])[:, None] + kind.slope(p, z)


def _uniform(bound: float, generator: torch.Generator | None, *shape: int) -> Tensor:
    return nn.init.uniform_(_empty(generator, *shape), -bound, bound, generator=generator)


def _empty(generator: torch.Generator | None, *shape: int) -> Tensor:
    return torch.empty(*shape, device="cpu" if generator is None else generator.device)


def _positive(m: int, generator: torch.Generator | None) -> Tensor:
    """K / lambda_max(K) [M, M], K = R' R / M + I, R standard normal."""
    R = _empty(generator, m, m).normal_(generator=generator)
    K = R.mT @ R / m + torch.eye(m, device=R.device)
    return K / torch.linalg.eigvalsh(K)[-1]


# ---------------------------------------------------------------- teacher forcing


Estimator = Literal["product", "arithmetic", "exact"]


@dataclass(frozen=True)
class Constant:
    """Generalized teacher forcing of one strength: z <- (1 - alpha) z + alpha z_hat after each step."""

    alpha: float = 0.3


@dataclass(frozen=True)
class Sparse:
    """The data replace what can be imposed, every `interval` steps (Mikhaeil et al., NeurIPS 2022)."""

    interval: int = 10


@dataclass(frozen=True)
class Annealed:
    """alpha falls from `start` to `end` exponentially over so many updates, and stays there."""

    start: float = 1.0
    end: float = 0.02
    updates: int = 50_000


@dataclass(frozen=True)
class Adaptive:
    """alpha is estimated from the Jacobians J_t at a batch's forcing signals, every so many updates: with kappa the
    largest G of its sequences, it rises at once to max(0, 1 - 1 / kappa), else falls towards it, alpha <- decay alpha +
    (1 - decay) max(0, 1 - 1 / kappa). G is the geometric mean of the spectral norms of J_t over time ("product"), the
    spectral norm of their mean ("arithmetic"), or that of their product, to the power of 1 / T ("exact")."""

    estimator: Estimator = "product"
    start: float = 1.0
    every: int = 5
    decay: float = 0.999


Forcing = Constant | Sparse | Annealed | Adaptive


def spectral(J: Tensor) -> Tensor:
    """The largest singular value of [..., M, M]."""
    return torch.linalg.eigvalsh(J.mT @ J)[..., -1].clamp(min=0).sqrt()


def growth(J: Tensor, estimator: Estimator, spectral: Callable[[Tensor], Tensor] = spectral) -> Tensor:
    """G of sequences of Jacobians [..., T, M, M] -> [...]; see `Adaptive`."""
    if estimator == "arithmetic":
        return spectral(J.mean(-3))
    if estimator == "product":
        return spectral(J).clamp(min=torch.finfo(J.dtype).tiny).log().mean(-1).exp()
    total, size = J[..., 0, :, :], torch.zeros_like(J[..., 0, 0, 0])
    for t in range(1, J.shape[-3]):  # rescaled at each step: the product itself leaves the range of floats
        norm = total.flatten(-2).norm(dim=-1).clamp(min=torch.finfo(J.dtype).tiny)
        total, size = J[..., t, :, :] @ (total / norm[..., None, None]), size + norm.log()
    return ((spectral(total).clamp(min=torch.finfo(J.dtype).tiny).log() + size) / J.shape[-3]).exp()


def estimate(kind: Kind, forcing: Forcing, p: Params, alpha: Tensor, update: int, signal: Tensor) -> Tensor:
    """The strengths [S] for the next update, after so many of them; signal [S, B, T, M] is where `Adaptive` looks."""
    if isinstance(forcing, Annealed):
        share = min(1.0, update / max(forcing.updates, 1))
        return torch.full_like(alpha, forcing.start * (forcing.end / forcing.start) ** share)
    if not isinstance(forcing, Adaptive) or update % forcing.every:
        return alpha
    rows, norm = signal.flatten(1, 2), spectral
    if isinstance(kind, Shallow) and signal.shape[-1] <= forced.NARROW and forced.serves(rows):
        J = forced.jacobians(p["A"], p["W1"], p["W2"], p["h2"], rows, kind.clipped)
        norm = forced.spectral
    else:
        J = jacobian(kind, p, rows)
    kappa = growth(J.unflatten(1, signal.shape[1:3]), forcing.estimator, norm).amax(1)
    want = torch.where(kappa.isfinite(), (1 - 1 / kappa.clamp(min=1e-8)).clamp(min=0), alpha)
    return torch.where(want > alpha, want, forcing.decay * alpha + (1 - forcing.decay) * want)


def strengths(forcing: Forcing, alpha: Tensor, length: int) -> Tensor:
    """alpha [S] -> the strength after each step, [S, T]."""
    wide = alpha[:, None].expand(-1, length)
    if not isinstance(forcing, Sparse):
        return wide
    t = torch.arange(1, length + 1, device=alpha.device)
    return torch.where(t % forcing.interval == 0, 1.0, 0.0).to(alpha).expand_as(wide)


# ---------------------------------------------------------------- what is observed


def lift(p: Params, x: Tensor, inverse: Tensor | None) -> Tensor:
    """Standardised observations [S, R, N] -> the states [S, R, M] at which a trajectory begins; inverse: pinv(B)."""
    if inverse is not None:
        return x @ inverse.mT
    return torch.cat([x, x @ p["L"].mT], -1) if "L" in p else x


def read(p: Params, z: Tensor, n: int) -> Tensor:
    """[S, R, M] -> [S, R, N]"""
    return z @ p["B"].mT if "B" in p else z[..., :n]


# ---------------------------------------------------------------- the learner


@dataclass(frozen=True)
class PlrnnConfig:
    """`latent`: how many states M, by default as many as observations. `readout`: "identity" observes the first of them
    (the others begin at L x, learned), "affine" is x = B z, inverted by pinv(B). Observations are standardised by the
    training data.

    latent_decay: lambda (|1 - A|^2 + |W1|^2 + |W2|^2 + |h1|^2 + |h2|^2 + |C|^2), or the kind's weights; readout_decay:
    lambda (1 - s_max / s_min)^2 of B. `noise`: a second network tells the variance of observation (and reward) from z
    and the action, so that the learner can be sampled and reports "aleatoric"; "constant" has no network, but one
    variance for each of them, that of the training data's one-step errors, each from the state at what was observed
    (by their median: a few sudden events do not count). `reward`: one tells the reward from z, the action and z'. None
    of them shapes the dynamics."""

    kind: Kind = field(default_factory=Shallow)
    latent: int | None = None
    readout: Literal["identity", "affine"] = "identity"
    forcing: Forcing = field(default_factory=Adaptive)
    latent_decay: float = 0.0
    readout_decay: float = 0.0
    noise: bool | Literal["constant"] = False
    reward: bool = False
    heads: tuple[int, ...] = (64, 64)

    def build(self, spec: Spec, generator: torch.Generator | None = None) -> "Plrnn":
        return Plrnn(spec, self, generator)


@final
class Plrnn(Dynamics):
    """The state is z [B, M], in units of the standardised observation. It takes no account of dt.

    Where it has noise, the noise [B, O + 1] is that of the observation and, last, of the reward, in the standardised
    units; it moves the latent state. What of an affine readout is imposed on the state is pinv(B) x."""

    noisy_loss = False
    schedules = ("alpha", "updates")
    alpha: Tensor  # []: the forcing's strength
    updates: Tensor  # [] int64: so many are done
    bounds: Tensor  # [2]: of the noise head's log-variance, softly

    def __init__(self, spec: Spec, config: PlrnnConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        m, forcing = spec.obs if config.latent is None else config.latent, config.forcing
        least = spec.obs if config.readout == "identity" else 1
        if m < least:
            raise ValueError(
                f"PlrnnConfig: latent is {m}, expected at least {least} for {spec.obs} observed dimensions"
            )
        if config.noise == "constant" and config.readout == "identity" and m > spec.obs:
            raise ValueError(f"PlrnnConfig: constant noise needs every state observed, got {m} for {spec.obs} observed")
        if isinstance(forcing, Sparse) and forcing.interval < 1:
            raise ValueError(f"Sparse: interval is {forcing.interval}, expected at least 1")
        first = {Constant: "alpha", Annealed: "start", Adaptive: "start"}.get(type(forcing))
        alpha = 1.0 if first is None else float(getattr(forcing, first))
        if isinstance(forcing, Annealed) and min(forcing.start, forcing.end) <= 0:
            raise ValueError(
                f"Annealed: the strength goes from {forcing.start} to {forcing.end}, expected both to be positive: the "
                "way between is exponential"
            )
        others = {Annealed: ("end",), Adaptive: ("decay",)}.get(type(forcing), ())
        for name in (() if first is None else (first,)) + others:
            if not 0 <= getattr(forcing, name) <= 1:
                raise ValueError(f"{type(forcing).__name__}: {name} is {getattr(forcing, name)}, expected 0 to 1")
        if isinstance(forcing, Adaptive) and forcing.every < 1:
            raise ValueError(f"Adaptive: every is {forcing.every}, expected at least 1")
        self.spec, self.config, self.width = spec, config, m
        self.noise_dim = spec.obs + 1 if config.noise else 0
        p = config.kind.init(m, generator)
        p |= {"h1": torch.zeros_like(p["A"]), "C": _uniform(1 / max(spec.act, 1) ** 0.5, generator, m, spec.act)}
        if config.readout == "affine":
            p["B"] = _empty(generator, spec.obs, m).normal_(0, (2 / m) ** 0.5, generator=generator)  # as published
        elif m > spec.obs:
            p["L"] = _uniform(1 / spec.obs**0.5, generator, m - spec.obs, spec.obs)
        self.theta = nn.ParameterDict(p)
        head = lambda inputs, out: StackedMLP(1, [inputs, *config.heads, out], "silu", uniform, generator)
        self.doubt = head(m + spec.act, spec.obs + 1) if config.noise is True else None
        self.worth = head(2 * m + spec.act, 1) if config.reward else None
        self.tells_reward = config.reward
        device = p["A"].device
        self.observed, self.rewarded = Normalizer(spec.obs).to(device), Normalizer(1).to(device)
        self.register_buffer("bounds", torch.tensor(LOG_VARIANCE, device=device))
        self.register_buffer("alpha", torch.tensor(alpha, device=device))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        if config.noise == "constant":
            self.register_buffer("residual", torch.zeros(spec.obs + 1, device=device))

    def params(self) -> dict[str, Tensor]:
        """All that is trained, with a leading axis of one seed: the equation's letters, and the heads' layers."""
        heads = {"doubt": self.doubt, "worth": self.worth}
        layers = {f"{k}.{i}": x for k, net in heads.items() if net is not None for i, x in enumerate(net.layers())}
        return {k: v[None] for k, v in self.theta.items()} | layers

    # ------------------------------------------------------------ prediction

    def condition(self, ctx: Tensor) -> Tree:
        """pinv(B) [1, M, N]; nothing where the readout is the identity."""
        return torch.linalg.pinv(self.theta["B"])[None] if self.config.readout == "affine" else ()

    def pinned(self, part: Tensor) -> Tree:
        return self.condition(part)

    def init(self, obs: Tensor, cond: Tree) -> Tensor:
        return lift(self.params(), self.observed(obs)[None], cond if isinstance(cond, Tensor) else None)[0]

    def observe(self, state: Tensor, cond: Tree) -> Tensor:
        return self.observed.inverse(read(self.params(), state[None], self.spec.obs)[0])

    def step(self, state: Tensor, inp: StepInput, cond: Tree) -> tuple[Tensor, Prediction]:
        p, act = self.params(), inp.act[None]
        z, doubt, shift = step(self.config.kind, p, state[None], act)[0], {}, 0.0
        if self.config.noise:
            std = self._variance(p, state, act).sqrt()
            error = std * inp.noise
            z = z + self.moved(error[:, :-1], cond)
            shift = error[:, -1] * self.rewarded.std
            size = (std * torch.cat([self.observed.std, self.rewarded.std * self.config.reward])).norm(dim=-1)
            doubt["aleatoric"] = torch.where(size.isnan(), torch.inf, size)
        reward = torch.zeros_like(state[:, 0])
        if self.config.reward:
            reward = self.rewarded.inverse(worth(p, state[None], act, z[None])[0])[:, 0] + shift
        return z, Prediction(self.observe(z, cond), reward, doubt)

    def moved(self, error: Tensor, cond: Tree) -> Tensor:
        """What an error of the observation [..., O], standardised, does to the state: [..., M]."""
        return error @ cond[0].mT if isinstance(cond, Tensor) else F.pad(error, (0, self.width - self.spec.obs))

    def _variance(self, p: Params, state: Tensor, act: Tensor) -> Tensor:
        """[B, O + 1]"""
        if self.config.noise == "constant":
            return self.get_buffer("residual").expand(len(state), -1)
        return spread(p, self.bounds, state[None], act)[0]

    @torch.no_grad()
    def residuals(self, obs: Tensor, act: Tensor, after: Tensor, reward: Tensor) -> Tensor:
        """The variances [O + 1] of one-step errors from rows [R, ...], standardised, as normal errors of the same
        median size would have; of the reward, last, 0 where it has no head."""
        p, own = self.params(), []
        z = lift(p, self.observed(obs)[None], self._inverse())
        y = step(self.config.kind, p, z, act[None])
        own.append(read(p, y, self.spec.obs)[0] - self.observed(after))
        scaled = self.rewarded(reward[:, None])
        own.append(worth(p, z, act[None], y)[0] - scaled if self.config.reward else torch.zeros_like(scaled))
        return (torch.cat(own, 1).abs().median(0).values / QUARTILE).square()

    def jacobian(self, state: Tensor, inp: StepInput, cond: Tree) -> Tensor:
        """dz' / dz [B, M, M] in closed form, without noise."""
        return jacobian(self.config.kind, self.params(), state[None])[0]

    def correct(self, state: Tensor, obs: Tensor, alpha: float | Tensor, cond: Tree) -> Tensor:
        target = self.init(obs, cond)
        if self.config.readout == "identity" and self.width > self.spec.obs:  # the unseen states cannot be imposed
            n = self.spec.obs
            kept = torch.cat([target[:, :n], state[:, n:]], -1)
            target = torch.where(state.isfinite().all(-1, keepdim=True), kept, target)
        return pull(state, target, alpha)

    # ------------------------------------------------------------ training

    def prepare(self, segment: Segment) -> None:
        """Sets the normalisers. Raises ValueError where the windows' dt differ: it takes no account of it."""
        if len(segment.dt.unique()) > 1:
            raise ValueError("Plrnn: the data hold intervals of several lengths dt, expected one")
        self.observed.fit(segment.obs[:, 1:][segment.mask])
        self.rewarded.fit(segment.reward[segment.mask][:, None])

    @torch.no_grad()
    def advance(self, segment: Segment) -> None:
        """Sets `alpha` for the next update."""
        self.updates += 1
        x = self.observed(segment.obs[:, 1:])
        flat, nowhere = x.flatten(0, 1)[None], x.new_zeros(1, x[..., 0].numel(), self.width)
        signal = imposed(nowhere, flat, self._inverse()).unflatten(1, x.shape[:2])
        kind, forcing = self.config.kind, self.config.forcing
        self.alpha.copy_(estimate(kind, forcing, self.params(), self.alpha[None], int(self.updates), signal)[0])

    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The squared error of the forced prediction, standardised, with the regularisers and what the heads add."""
        return self._loss(segment, strengths(self.config.forcing, self.alpha[None], segment.act.shape[1])[0])

    @torch.no_grad()
    def validate(self, segment: Segment, noise: Tensor) -> Tensor:
        """[1]: the squared error of free runs over the windows, standardised."""
        free = torch.zeros_like(segment.dt[0, :, 0])
        return self._loss(segment, free)[1]["mse"][None]

    def finish(self, errors: Tensor) -> None:
        """Raises Diverged where the fit never reached a finite error."""
        if not bool(errors.isfinite().all()):
            raise Diverged("Plrnn: the fit has diverged; expected finite data, or try a stronger forcing")

    def measure(self, segment: Segment) -> None:
        """Sets the constant noise."""
        keep = segment.mask
        self._measure(*(x[keep] for x in (segment.obs[:, :-1], segment.act, segment.obs[:, 1:], segment.reward)))

    def _measure(self, *rows: Tensor) -> None:
        if self.config.noise == "constant":
            self.get_buffer("residual").copy_(self.residuals(*(x[:MEASURED] for x in rows)))

    def _inverse(self) -> Tensor | None:
        return self.condition(self.theta["A"]) if self.config.readout == "affine" else None

    def _loss(self, segment: Segment, alpha: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """alpha [T]: the strength after each step."""
        p, kind, inverse = self.params(), self.config.kind, self._inverse()
        x = self.observed(segment.obs)
        z = lift(p, x[None, :, 0], inverse)
        states, after = [], []
        for t in range(segment.act.shape[1]):
            y = step(kind, p, z, segment.act[None, :, t])
            states.append(z)
            after.append(y)
            target = imposed(y, x[None, :, t + 1], inverse)
            z = pull(y, target, alpha[t] * segment.mask[:, t, None])
        reward = self.rewarded(segment.reward[..., None])[..., 0]
        window = Window(*(w[None] for w in (x, segment.act, reward, segment.mask)))
        loss, mse = objective(self.config, p, self.bounds, window, torch.stack(after, 2), torch.stack(states, 2))
        return loss[0], {"mse": mse[0].detach()}


class Window(NamedTuple):
    """Windows of S seeds, standardised."""

    obs: Tensor  # [S, B, T + 1, N]
    act: Tensor  # [S, B, T, A]
    reward: Tensor  # [S, B, T]
    mask: Tensor  # [S, B, T] bool


def imposed(y: Tensor, x: Tensor, inverse: Tensor | None) -> Tensor:
    """What full forcing makes of states y [S, R, M] at observations x [S, R, N]; pinv(B) x is a constant."""
    if inverse is not None:
        return (x @ inverse.mT).detach()
    return torch.cat([x, y[..., x.shape[-1] :]], -1)


def spread(p: Params, bounds: Tensor, z: Tensor, act: Tensor) -> Tensor:
    """The noise head: the variance [S, R, O + 1] of the standardised observation and reward."""
    return variance(_head(p, "doubt", z, act), bounds[1], bounds[0])


def worth(p: Params, z: Tensor, act: Tensor, after: Tensor) -> Tensor:
    """The reward head: [S, R, 1], standardised."""
    return _head(p, "worth", z, act, after)


def _head(p: Params, name: str, *inputs: Tensor) -> Tensor:
    layers = [x for k, x in p.items() if k.startswith(name)]
    return apply_layers(layers, torch.cat(inputs, -1), "silu")


def objective(
    config: PlrnnConfig, p: Params, bounds: Tensor, window: Window, after: Tensor, states: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The losses [S] and the mean squared errors [S] of predictions `after` [S, B, T, M] made from `states`, which only
    heads read."""
    n, mask = window.obs.shape[-1], window.mask
    flat = lambda x: x.flatten(1, -2)
    error = read(p, flat(after), n) - flat(window.obs[:, :, 1:])
    many = mask.sum((1, 2)).clamp(min=1)  # masked_mean of each seed
    mean = lambda x: torch.where(flat(mask[..., None]), x, 0.0).sum((1, 2)) / (many * x.shape[-1])
    mse = mean(error**2)
    loss = mse + decay(config, p)
    if states is not None and (config.noise is True or config.reward):
        z, y, act = flat(states).detach(), flat(after).detach(), flat(window.act)
        wrong = torch.zeros_like(error[..., :1])
        if config.reward:
            wrong = worth(p, z, act, y) - window.reward.flatten(1)[..., None]
            loss = loss + mean(wrong**2)
        if config.noise is True:
            wide = torch.cat([error, wrong], -1).detach() ** 2
            var = spread(p, bounds, z, act)
            loss = loss + 0.5 * mean((wide / var + var.log())[..., : n + config.reward])
    return loss, mse


def decay(config: PlrnnConfig, p: Params) -> Tensor | float:
    """The regularisers [S]."""
    total: Tensor | float = 0.0
    if config.latent_decay:
        square = lambda x: (x**2).flatten(1).sum(1)
        shrunk = [square(p[k]) for k in ("W1", "W2", "W", "alpha", "h1", "h2", "C") if k in p]
        total = total + config.latent_decay * (square(1 - p["A"]) + sum(shrunk))
    if config.readout_decay and "B" in p:
        s = torch.linalg.svdvals(p["B"])
        total = total + config.readout_decay * (1 - s[:, 0] / s[:, -1]) ** 2
    return total


# ---------------------------------------------------------------- the published fit


@dataclass(frozen=True)
class PlrnnFit:
    """The published schedule (arXiv 2306.04406): RAdam, its rate falling exponentially from `lr` to `lr_end`, windows
    drawn uniformly with replacement. The last parameters are kept.

    `solver`: how forced trajectories are found. "compiled": a loop in C, for shallow ones on a CPU; "loop": step by
    step without a graph, then one adjoint recursion; "parallel": by Newton's method over all times (`mbrl.parallel`);
    "auto" takes what is fastest here. `clip`: of each seed's gradient norm. `noise`: the standard deviation, in those
    of the observations, of what is added to the observations that begin and force a trajectory, and not to those that
    it is compared with: the model learns to come back."""

    epochs: int = 5000
    batches: int = 50  # an epoch
    batch: int = 16  # windows
    length: int = 200  # steps a window
    lr: float = 1e-3
    lr_end: float = 1e-6
    clip: float | None = None
    noise: float = 0.0
    solver: Literal["auto", "compiled", "loop", "parallel"] = "auto"


@dataclass(frozen=True)
class PlrnnReport:
    epochs: int
    updates: int
    seconds: float  # of this call: a resumed fit does not know what came before
    solver: str  # what found the trajectories
    loss: list[list[float]]  # [epoch][seed], the mean squared error of the forced predictions, standardised
    alpha: list[list[float]]  # [epoch][seed], at its end
    skipped: list[int]  # [seed] updates whose gradient was not finite
    fallbacks: int  # parallel solves that did not converge, so that the loop took over


def fit_plrnn(
    models: Sequence[Plrnn],
    data: Dataset,
    config: PlrnnFit,
    generators: Sequence[torch.Generator],
    progress: Callable[[int, int | None, dict[str, float]], None] | None = None,
    *,
    checkpoint: Callable[[dict[str, Tensor]], None] | None = None,
    resume: Mapping[str, Tensor] | None = None,
) -> PlrnnReport:
    """Trains models of one config, a seed each, in place and together: seeds never see each other, and each has its own
    generator (on the CPU).

    progress: (epoch, epochs, figures) after each epoch. checkpoint: after each epoch, a dict of live tensors, to be
    saved before it returns; such a dict as `resume`, with the same data and config, gives the numbers of an
    uninterrupted fit. Raises ValueError for models of different configs, for data without a window of `length` steps or
    with intervals of several lengths, and for a compiled solver where it cannot serve; Diverged where a seed's
    parameters are not finite at an epoch's end."""
    began = time.perf_counter()
    model = models[0]
    if any(m.config != model.config or m.spec != model.spec for m in models) or len(models) != len(generators):
        raise ValueError(
            f"fit_plrnn: got {len(models)} models and {len(generators)} generators, expected as many, and models "
            "of one config and spec"
        )
    if data.spec != model.spec:
        raise ValueError(f"fit_plrnn: the data are of {data.spec}, the models of {model.spec}")
    if data.dts is not None and len(data.dts.unique()) > 1:
        raise ValueError("fit_plrnn: the data hold intervals of several lengths dt, expected one")
    track = Track(data, config.length, model.theta["A"])
    for m in models:
        m.observed.fit(track.obs)
        m.rewarded.fit(data.reward[:, None])
    like = lambda x: x.to(model.theta["A"])
    columns = (data.obs, data.act, data.next_obs, data.reward)
    track.obs = model.observed(track.obs)
    track.reward = model.rewarded(track.reward[:, None])[:, 0]
    p = {k: torch.cat([m.params()[k].detach() for m in models]).requires_grad_() for k in model.params()}
    optimizer = torch.optim.RAdam(p.values(), lr=config.lr, foreach=True)
    for x in p.values():
        optimizer.state[x] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(x),
            "exp_avg_sq": torch.zeros_like(x),
        }
    trainer = _Trainer(model, p, optimizer, config, torch.stack([m.alpha for m in models]))
    curves = {"loss": torch.zeros(0, len(models)), "alpha": torch.zeros(0, len(models))}
    if resume is not None:
        trainer.load(resume)
        curves = {k: resume[f"curve.{k}"].clone() for k in curves}
        for seed, generator in enumerate(generators):
            generator.set_state(resume[f"generator.{seed}"])
    while trainer.epoch < config.epochs:
        loss = trainer.run_epoch(track, generators)
        curves = {k: torch.cat([curves[k], x.cpu()[None]]) for k, x in (("loss", loss), ("alpha", trainer.alpha))}
        if not all(bool(x.isfinite().all()) for x in p.values()):
            raise Diverged("fit_plrnn: a seed has diverged; expected finite data, or try a stronger forcing or `clip`")
        if progress is not None:
            progress(
                trainer.epoch, config.epochs, {"mse": float(loss.median()), "alpha": float(trainer.alpha.median())}
            )
        if checkpoint is not None:
            states = {f"generator.{i}": g.get_state() for i, g in enumerate(generators)}
            checkpoint(trainer.state() | states | {f"curve.{k}": x for k, x in curves.items()})
    with torch.no_grad():
        for seed, m in enumerate(models):
            for k, x in m.params().items():  # views of what is trained
                x.copy_(p[k][seed : seed + 1])
            m.alpha.copy_(trainer.alpha[seed])
            m.updates.fill_(trainer.updates)
            at = data.paired.nonzero()[:, 0]
            m._measure(*(like(x[at]) for x in columns))
    return PlrnnReport(
        epochs=trainer.epoch,
        updates=trainer.updates,
        seconds=time.perf_counter() - began,
        solver=trainer.solver,
        loss=curves["loss"].tolist(),
        alpha=curves["alpha"].tolist(),
        skipped=trainer.skipped.tolist(),
        fallbacks=trainer.fallbacks,
    )


class Track:
    """The data's episodes end to end, each with its last observation, and where windows of `length` steps begin."""

    def __init__(self, data: Dataset, length: int, like: Tensor) -> None:
        if length < 1:
            raise ValueError(f"fit_plrnn: the window length is {length}, expected at least 1")
        last = data.starts[1:] - 1  # [E]
        every = torch.arange(len(data), device=data.obs.device) + data.episode  # each row's place on the track
        size = len(data) + data.episodes
        place = lambda rows: rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, every, rows)
        obs = place(data.obs).index_copy_(0, every[last] + 1, data.next_obs[last])
        paired = place(data.paired.long())
        ahead = torch.cat([paired.new_zeros(1), paired.cumsum(0)])
        first = torch.arange(max(size - length, 0), device=obs.device)
        self.first = first[ahead[first + length] - ahead[first] == length].cpu()  # [K]
        if len(self.first) == 0:
            raise ValueError(
                f"fit_plrnn: no episode of the data has {length} steps (the longest has {data.longest}): pass longer "
                "series, or a smaller window length"
            )
        self.obs, self.act, self.reward = (x.to(like) for x in (obs, place(data.act), place(data.reward)))
        self.length = length

    def window(self, index: Tensor) -> Window:
        """index [S, B], from `first`."""
        index = index.to(self.obs.device)[..., None] + torch.arange(self.length + 1, device=self.obs.device)
        act, reward = self.act[index[..., :-1]], self.reward[index[..., :-1]]
        mask = torch.ones((), dtype=torch.bool, device=act.device).expand(reward.shape)
        return Window(self.obs[index], act, reward, mask)


class _Trainer:
    """The stacked parameters, their optimiser and the forcing's strength, from update to update."""

    def __init__(
        self, model: Plrnn, p: dict[str, Tensor], optimizer: torch.optim.Optimizer, config: PlrnnFit, alpha: Tensor
    ) -> None:
        self.model, self.p, self.optimizer, self.config, self.alpha = model, p, optimizer, config, alpha
        self.epoch = self.updates = self.fallbacks = 0
        self.skipped = torch.zeros(len(alpha), dtype=torch.int64, device=alpha.device)
        shallow, state = isinstance(model.config.kind, Shallow), p["A"][:, None]
        if config.solver == "compiled" and not (shallow and forced.serves(state)):
            why = forced.problem() or "it serves shallow PLRNNs of float32 or float64 on a CPU"
            raise ValueError(f"PlrnnFit: solver is 'compiled', but {why}: pass 'auto'")
        self.solver = config.solver
        if config.solver == "auto":
            newton = parallel.pays(state.device, config.length, model.width)
            self.solver = "compiled" if shallow and forced.serves(state) else "parallel" if newton else "loop"

    def run_epoch(self, track: Track, generators: Sequence[torch.Generator]) -> Tensor:
        """Returns the mean squared errors [S] of its batches."""
        c, total = self.config, torch.zeros_like(self.alpha)
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * (c.lr_end / c.lr) ** (self.epoch / c.epochs)
        draw = lambda g: torch.randint(len(track.first), (c.batches, c.batch), generator=g, device=g.device)
        index = track.first[torch.stack([draw(g).cpu() for g in generators], 1)]  # [batches, S, B]
        for batch in index:
            window = track.window(batch)
            seen = window.obs
            if c.noise:
                added = [torch.randn(seen.shape[1:], generator=g, device=g.device) for g in generators]
                seen = seen + c.noise * torch.stack(added).to(seen)
            total += self.update(window, seen)
        self.epoch += 1
        return total / c.batches

    def update(self, window: Window, seen: Tensor | None = None) -> Tensor:
        """One update of every seed; seen: the observations [S, B, T + 1, N] that begin and force, by default the
        window's. Returns the mean squared errors [S]."""
        config, p = self.model.config, self.p
        x, (seeds, rows, length) = window.obs if seen is None else seen, window.reward.shape
        inverse = torch.linalg.pinv(p["B"]) if "B" in p else None
        start = lift(p, x[:, :, 0], inverse)
        with torch.no_grad():
            signal = imposed(
                start.new_zeros(seeds, rows * length, self.model.width), x[:, :, 1:].flatten(1, 2), inverse
            )
            signal = signal.unflatten(1, (rows, length))
            self.alpha = estimate(config.kind, config.forcing, p, self.alpha, self.updates, signal)
            keep = 1 - strengths(config.forcing, self.alpha, length)[..., None].expand(-1, -1, self.model.width)
            if inverse is None:
                keep = torch.cat([keep[..., : x.shape[-1]], torch.ones_like(keep[..., x.shape[-1] :])], -1)
        after, states = self.trajectory(start, window.act, signal, keep)
        loss, mse = objective(config, p, self.model.bounds, window, after, states)
        self.optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        self._guard()
        self.optimizer.step()
        self.updates += 1
        return mse.detach()

    def trajectory(self, start: Tensor, act: Tensor, signal: Tensor, keep: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predictions [S, B, T, M] from start [S, B, M], and the states that they were made from where heads want them;
        signal [S, B, T, M], keep [S, T, M]."""
        p, kind = self.p, self.model.config.kind
        if self.solver == "compiled":
            assert isinstance(kind, Shallow)
            drive = (p["h1"][:, None, None] + act @ p["C"][:, None].mT).expand(signal.shape)
            weights = (p["A"], p["W1"], p["W2"], p["h2"])
            after = forced.forced(*weights, start, drive, signal, keep, kind.clipped)
            if not (self.model.config.noise is True or self.model.config.reward):
                return after, None
            with torch.no_grad():
                mixed = pull(after, signal, (1 - keep)[:, None])
                return after, torch.cat([start[:, :, None], mixed[:, :, :-1]], 2)
        method = "parallel" if self.solver == "parallel" else "sequential"
        first = lambda x: x.movedim(2, 0) if x.ndim == 4 else x.movedim(1, 0)[:, :, None]  # time leads
        times = lambda f: lambda z, a: _over_times(f, z, a)
        found = parallel.forced(
            times(lambda z, a: step(kind, p, z, a)),
            times(lambda z, a: jacobian(kind, p, z)),
            start,
            first(act),
            first(signal),
            first(keep),
            method,
        )
        self.fallbacks += method == "parallel" and not found.converged
        return found.pred.movedim(0, 2), found.states.movedim(0, 2)

    @torch.no_grad()
    def _guard(self) -> None:
        """Drops the gradients of seeds whose gradient is not finite; clips the others'."""
        grads = [x.grad for x in self.p.values() if x.grad is not None]
        norm = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)  # [S]
        ok = norm.isfinite()
        self.skipped += ~ok
        scale = torch.ones_like(norm) if self.config.clip is None else (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
        if self.config.clip is not None or not bool(ok.all()):
            for g in grads:
                wide = lambda x, g=g: x.reshape(-1, *[1] * (g.ndim - 1))
                g.copy_(torch.where(wide(ok), g * wide(scale), 0.0))

    def state(self) -> dict[str, Tensor]:
        out = {"epoch": torch.tensor(self.epoch), "updates": torch.tensor(self.updates), "alpha": self.alpha}
        out |= {"skipped": self.skipped, "fallbacks": torch.tensor(self.fallbacks)}
        for name, x in self.p.items():
            out[f"param.{name}"] = x.detach()
            out |= {f"{k}.{name}": v for k, v in self.optimizer.state[x].items()}
        return out

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError where the state is of other models."""
        for name, x in self.state().items():
            if name not in state or state[name].shape != x.shape:
                got = list(state[name].shape) if name in state else "nothing"
                raise ValueError(
                    f"fit_plrnn: resume holds {got} for {name}, expected {list(x.shape)}: other models' state?"
                )
            if "." in name or name == "skipped":
                x.copy_(state[name])
        self.epoch, self.updates, self.fallbacks = (int(state[k]) for k in ("epoch", "updates", "fallbacks"))
        self.alpha = state["alpha"].to(self.alpha)


def _over_times(f: Callable[[Tensor, Tensor], Tensor], z: Tensor, act: Tensor) -> Tensor:
    """f of z [S, R, M], for one time [S, B, M] or all of them [T, S, B, M]."""
    if z.ndim == 3:
        return f(z, act)
    rows = lambda x: x.movedim(0, 1).flatten(1, 2)  # [S, T * B, ...]
    return f(rows(z), rows(act)).unflatten(1, (z.shape[0], z.shape[2])).movedim(1, 0)


# ---------------------------------------------------------------- without gradient descent


@torch.no_grad()
def random_features(
    model: Plrnn, data: Dataset, ridge: float = 1e-6, generator: torch.Generator | None = None
) -> float:
    """Fits A, W1, h1 and C of a shallow PLRNN by ridge regression of one step, for random W2 and h2 whose kinks pass
    through the data: a baseline, and a start for `fit_plrnn`. ridge: relative to the mean square of the features.
    Returns the mean squared error of one step, standardised. Raises ValueError for another kind, for a readout that is
    not the identity, and for unseen states."""
    kind, p = model.config.kind, model.theta
    if not isinstance(kind, Shallow) or model.config.readout != "identity" or model.width != model.spec.obs:
        raise ValueError(
            f"random_features: got {kind}, readout {model.config.readout!r}, {model.width} latent states for "
            f"{model.spec.obs} observed; expected a shallow PLRNN that observes all of its states as they are"
        )
    model.observed.fit(data.obs)
    at = data.paired.nonzero()[:, 0]
    now, after = (model.observed(x[at].to(p["A"])).double() for x in (data.obs, data.next_obs))
    m = model.width
    W2 = torch.randn(kind.hidden, m, generator=generator).to(now) / m**0.5
    through = now[torch.randint(len(now), (kind.hidden,), generator=generator).to(now.device)]
    h2 = -(W2 * through).sum(1)
    u = now @ W2.mT
    c = torch.relu(u + h2) - (torch.relu(u) if kind.clipped else 0.0)
    shared = torch.cat([c, data.act[at].to(now), torch.ones_like(now[:, :1])], 1)  # [R, L + A + 1]
    gram, cross = shared.mT @ shared, shared.mT @ now
    error = 0.0
    for i in range(m):
        z, y = now[:, i : i + 1], after[:, i : i + 1]
        left = torch.cat([torch.cat([z.mT @ z, cross[:, i : i + 1].mT], 1), torch.cat([cross[:, i : i + 1], gram], 1)])
        left.diagonal().add_(ridge * left.diagonal().mean())
        w = torch.linalg.solve(left, torch.cat([z.mT @ y, shared.mT @ y]))[:, 0]
        p["A"][i], p["W1"][i], p["C"][i], p["h1"][i] = w[0], w[1 : 1 + kind.hidden], w[1 + kind.hidden : -1], w[-1]
        error += float((z[:, 0] * w[0] + shared @ w[1:] - y[:, 0]).square().mean()) / m
    p["W2"].copy_(W2)
    p["h2"].copy_(h2)
    model._measure(*(x[at].to(p["A"]) for x in (data.obs, data.act, data.next_obs, data.reward)))
    return error


# ---------------------------------------------------------------- long runs


@torch.no_grad()
def orbit(
    model: Plrnn, obs: Tensor, steps: int, act: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """Free runs [B, steps, O] from observations [B, O], as `mbrl.metrics.free_run` gives them, by the compiled loop
    where it serves: a hundred times faster. act: [steps, A] for all or [B, steps, A], zeros by default; later ones do
    not count. Noise is drawn from the generator, all of it at once (`free_run` draws step by step, so that its runs
    are others), and is zero without one. Raises ValueError for actions of another shape or too few."""
    act = obs.new_zeros(len(obs), steps, model.spec.act) if act is None else act
    act = act if act.ndim == 3 else act[None]
    if act.shape[0] not in (1, len(obs)) or act.shape[1] < steps or act.shape[2] != model.spec.act:
        want = f"[{len(obs)}, >= {steps}, {model.spec.act}]"
        raise ValueError(f"orbit: the actions are {list(act.shape)}, expected {want}: one for each step taken")
    act = act[:, :steps].expand(len(obs), -1, -1)
    p, cond, kind = model.params(), model.condition(obs), model.config.kind
    state = model.init(obs.to(p["A"]), cond)
    act = act.to(state)
    noise = act.new_zeros(len(obs), steps, model.noise_dim)
    if generator is not None:
        shape = (steps, len(obs), model.noise_dim)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(act).movedim(0, 1)
    noisy = generator is not None and model.noise_dim > 0
    told = noisy and model.config.noise is True  # by the state
    if not (isinstance(kind, Shallow) and forced.serves(state[None])) or told:
        out, dt = [], torch.ones_like(act[:, 0, :1].sum(-1, keepdim=True))
        for t in range(steps):
            state, pred = model.step(state, StepInput(act[:, t], noise[:, t], dt), cond)
            out.append(pred.obs)
        return torch.stack(out, 1)
    drive = p["h1"][:, None, None] + act @ p["C"][:, None].mT
    if noisy:
        drive = drive + model.moved(noise[..., :-1] * model.get_buffer("residual")[:-1].sqrt(), cond)
    keep = drive.new_ones(1, steps, model.width)
    z = forced.forced(p["A"], p["W1"], p["W2"], p["h2"], state[None], drive, drive, keep, kind.clipped)[0]
    return model.observe(z.flatten(0, 1), cond).unflatten(0, z.shape[:2])
