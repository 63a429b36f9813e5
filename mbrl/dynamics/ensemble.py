"""The probabilistic ensemble: Gaussian networks, each fitted on its own stream of the data; every step is taken by one
of the elites (Chua et al., NeurIPS 2018; Janner et al., NeurIPS 2019; Yu et al., NeurIPS 2020)."""

import copy
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from mbrl.core import Diverged, Markov, Prediction, Segment, Spec, StepInput, Tree, group, randn, repeat
from mbrl.nets import ROWS, Normalizer, StackedMLP, apply_layers, gaussian_draw, gaussian_nll, kept_mean, truncated
from mbrl.rollout import transitions

UNCERTAINTY = ("aleatoric", "disagreement")
TILES = 8  # a step that evaluates only the drawn member of a row cuts the rows of each member into about so many


@dataclass(frozen=True)
class EnsembleConfig:
    """The published recipe. `weight_decay` has one value a layer (L2, weights only). `bound` is the coefficient that
    keeps the learned bounds of the log-variance together. `scale_targets` standardises the targets (change of the
    observation, reward) for the fit; the publications train on raw ones. Predictions are in raw units either way. Raw
    targets whose noise is below e^-5 meet the lower bound of the log-variance (a hopper's positions do: standardised,
    the held-out likelihood is better by a nat a dimension, while the raw squared error is a little worse).

    `uncertainty` says what a step reports, see `Ensemble`; with () it evaluates only the drawn member of each row."""

    members: int = 7
    elites: int = 5
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    bound: float = 0.01
    scale_targets: bool = False
    uncertainty: tuple[str, ...] = UNCERTAINTY

    def build(self, spec: Spec, generator: torch.Generator | None = None) -> "Ensemble":
        return Ensemble(spec, self, generator)


@final
class Ensemble(Markov):
    """Predicts the change of the observation and the reward. One more column of the noise, the last, names the elite
    that takes the step: elite number floor(E * Phi(noise)) of E.

    A step reports, by name:
    - "aleatoric": the largest over the elites of ||std||, over the observation and the reward in raw units (MOPO's; the
      authors take the largest over all members);
    - "disagreement": the largest over the elites of ||mean_i - mean of the elites||, over the observation, each
      dimension in units of the standard deviation of its one-step change in the data.
    Both need every elite evaluated. Under a condition made by `pinned` only the pinned one is, and "aleatoric" is its
    own ||std||; there is no "disagreement". Where a value would be NaN it is infinite.

    Parameters lead with the member, `elites` [E] indexes those that predict: all of them until `finish` chooses."""

    noisy_loss = False
    elites: Tensor
    spread: Tensor

    def __init__(self, spec: Spec, config: EnsembleConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 1 <= config.elites <= config.members:
            raise ValueError(f"EnsembleConfig: elites is {config.elites}, expected 1 to members, {config.members}")
        if len(config.weight_decay) != len(config.hidden) + 1:
            raise ValueError(
                f"EnsembleConfig: weight_decay has {len(config.weight_decay)} values, expected one a layer: "
                f"{len(config.hidden) + 1} for hidden {list(config.hidden)}"
            )
        width = spec.obs + 1
        self.spec, self.config, self.parts, self.noise_dim = spec, config, config.members, width + 1
        self.uncertainty = _known(config.uncertainty)
        sizes = [spec.obs + spec.act, *config.hidden, 2 * width]
        self.net = StackedMLP(config.members, sizes, "silu", truncated, generator)
        like = self.net.weights[0]
        self.upper = nn.Parameter(like.new_full((config.members, 1, width), 0.5))  # of the log-variance
        self.lower = nn.Parameter(like.new_full((config.members, 1, width), -10.0))
        self.inputs = Normalizer(spec.obs + spec.act).to(like.device)
        self.targets = Normalizer(width).to(like.device)
        self.register_buffer("elites", torch.arange(config.elites, device=like.device))
        self.register_buffer("spread", like.new_ones(spec.obs))

    def reporting(self, *uncertainty: str) -> "Ensemble":
        """The same parameters and buffers (shared, not copied), with another choice of what a step reports."""
        view = copy.copy(self)
        view.uncertainty = _known(uncertainty)
        return view

    # ------------------------------------------------------------ prediction

    def pinned(self, part: Tensor) -> Tree:
        """[G] -> the condition under which elite number part[g], counted round, alone steps group g, all the way
        (TS-infinity)."""
        return self._folded(self.elites[part % self.elites.shape[0]])

    def step(self, state: Tensor, inp: StepInput, cond: Tree) -> tuple[Tensor, Prediction]:
        return self.branch(state, inp, cond, 1)

    def branch(self, state: Tensor, inp: StepInput, cond: Tree, k: int) -> tuple[Tensor, Prediction]:
        """One evaluation serves all k futures."""
        rows, n = state.shape[0], self.elites.shape[0]
        noise = inp.noise.reshape(rows, k, self.noise_dim)
        if cond and k == 1 and not self.uncertainty:
            layers, least, more = cond
            x, act, z = (group(part, least.shape[0]) for part in (state, inp.act, noise[:, 0, :-1]))
            change = gaussian_draw(layers, x, act, least, more, z, "silu").flatten(0, 1)
            obs = state + change[:, :-1]
            return obs, Prediction(obs, change[:, -1], {})
        if not cond and not self.uncertainty and k < n and rows * k >= n * TILES * 16:
            obs, reward = self._drawn(repeat(state, k), repeat(inp.act, k), noise.flatten(0, 1)[:, None])
            doubt = {}
        else:
            obs, reward, doubt = self._every(state, inp.act, noise, cond or self._folded(self.elites), bool(cond))
        obs = obs.flatten(0, 1)
        return obs, Prediction(obs, reward.flatten(), repeat(doubt, k))

    def each(self, state: Tensor, inp: StepInput, cond: Tree, k: int) -> Prediction:
        """Every elite's own k futures; the noise's last column is not read. Under a pinned condition, that one's."""
        if cond:
            return super().each(state, inp, cond, k)
        noise = inp.noise.reshape(state.shape[0], k, self.noise_dim)[..., :-1]
        mean, var = self._predicted(torch.cat([state, inp.act], -1)[None], self._folded(self.elites))
        y = mean[:, :, None] + var.sqrt()[:, :, None] * noise  # [E, B, k, O + 1]
        y = y.flatten(1, 2)
        return Prediction(repeat(state, k) + y[..., :-1], y[..., -1], {})

    def _folded(self, index: Tensor) -> Tree:
        """The weights and the bounds of the members `index` [m], for `_predicted`: what goes before the first product
        and follows the last one, from and to raw units, is part of them."""
        weight, bias, *rest = self.net.layers(index)
        upper, lower = self.upper[index], self.lower[index]
        weight = weight / self.inputs.std[:, None]
        *rest, weight, bias = (weight, bias - self.inputs.mean[None] @ weight, *rest)  # of the last, from here on
        scale, width = self.targets.std, upper.shape[-1]
        weight = torch.cat([weight[..., :width] * scale, weight[..., width:]], -1)
        bias = torch.cat([bias[..., :width] * scale + self.targets.mean, bias[..., width:] - upper], -1)
        return (*rest, weight, bias), lower.exp() * scale**2, upper.exp() * scale**2

    def _predicted(self, x: Tensor, folded: Tree) -> tuple[Tensor, Tensor]:
        """Observations and actions [n or 1, B, in] -> mean and variance [n, B, O + 1] of the change and the reward."""
        layers, least, more = folded
        y, width = apply_layers(layers, x, "silu"), least.shape[-1]
        return y[..., :width], torch.addcmul(least, more, torch.sigmoid(y)[..., width:])  # `mbrl.nets.variance`

    def _every(self, obs: Tensor, act: Tensor, noise: Tensor, members: Tree, pinned: bool):
        """noise [B, k, W] -> obs [B, k, O], reward [B, k], uncertainty [B], with all the given members evaluated."""
        x = torch.cat([obs, act], -1)
        if pinned:
            mean, var = (y.flatten(0, 1)[None] for y in self._predicted(group(x, members[1].shape[0]), members))
        else:
            mean, var = self._predicted(x[None], members)
        doubt = {}
        if "aleatoric" in self.uncertainty:
            doubt["aleatoric"] = _finite(var.sum(-1).amax(0).sqrt())
        if "disagreement" in self.uncertainty and not pinned:
            scaled = mean[..., :-1] / self.spread
            doubt["disagreement"] = _finite((scaled - scaled.mean(0)).norm(dim=-1).amax(0))
        if pinned:
            y = torch.addcmul(mean[0][:, None], var[0].sqrt()[:, None], noise[..., :-1])
        else:
            pick = self._pick(noise, mean.shape[0]).T[..., None].expand(-1, -1, mean.shape[-1])  # [k, B, O + 1]
            y = mean.gather(0, pick) + var.gather(0, pick).sqrt() * noise[..., :-1].transpose(0, 1)
            y = y.transpose(0, 1)
        return obs[:, None] + y[..., :-1], y[..., -1], doubt

    def _drawn(self, obs: Tensor, act: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """As `_every` with k = 1, but each row meets its own member only. Rows are laid out in tiles of R rows of one
        member each, and a tile is multiplied by its member's weights. However the draws fall, B / R + E tiles hold
        them, so that the inputs' shapes fix all shapes (no host synchronisation, one graph); the price is that E tiles
        of rows are padding, and that each tile's weights are copied. With R = B / (8 E) the padding is an eighth of the
        evaluation of one member for all rows, where `_every` costs E of these."""
        rows, n = obs.shape[0], self.elites.shape[0]
        size = -(-rows // (n * TILES))
        tiles = rows // size + n
        x = torch.cat([obs, act], -1)
        pick = self._pick(noise, n)[:, 0]  # [B]
        index = torch.arange(n, device=x.device)
        mine = (pick[:, None] == index).long()
        rank = mine.cumsum(0).gather(1, pick[:, None])[:, 0] - 1  # among the rows of the same member
        ends = ((mine.sum(0) + size - 1) // size).cumsum(0)  # [n]  one past the last tile of each member
        begin = torch.cat([ends.new_zeros(1), ends[:-1]])
        slot = begin[pick] * size + rank  # [B]
        of_slot = torch.zeros(tiles * size, dtype=slot.dtype, device=x.device)
        of_slot = of_slot.scatter(0, slot, torch.arange(rows, device=x.device))  # padding repeats the first row
        owner = (torch.arange(tiles, device=x.device)[:, None] >= ends).sum(1).clamp(max=n - 1)
        cut = max(1, 2 * ROWS // size) if x.is_cpu and not torch.is_grad_enabled() else tiles
        each = zip(group(x[of_slot], tiles).split(cut), self.elites[owner].split(cut), strict=True)
        mean, var = zip(*(self._predicted(x, self._folded(index)) for x, index in each), strict=True)
        mean, var = (torch.cat(y).flatten(0, 1)[slot] for y in (mean, var))
        y = torch.addcmul(mean, var.sqrt(), noise[:, 0, :-1])
        return (obs + y[:, :-1])[:, None], y[:, -1:]

    def _pick(self, noise: Tensor, n: int) -> Tensor:
        """[..., W] -> the number of the elite, of n."""
        return (torch.special.ndtr(noise[..., -1]) * n).long().clamp(0, n - 1)

    def draw(self, n: int, k: int, generator: torch.Generator) -> Tensor:
        """The k futures of a row share the elites out evenly: 10 futures of 5 elites are 2 draws from each."""
        noise = randn(self, n, k * self.noise_dim, generator)
        if k == 1:
            return noise
        noise = noise.reshape(n, k, self.noise_dim)
        uniform = randn(self, n, 2 * k, generator, torch.rand)
        u = (uniform[:, :k].argsort(-1) + uniform[:, k:].clamp(1e-4, 1 - 1e-4)) / k
        noise[..., -1] = torch.special.ndtri(u)
        return noise.flatten(1)

    # ------------------------------------------------------------ training

    def prepare(self, segment: Segment) -> None:
        """Sets the normalisers. Raises ValueError where the windows' dt differ: the ensemble takes no account of it."""
        keep = segment.mask.flatten()
        if len(segment.dt.unique()) > 1:
            raise ValueError("Ensemble: the data hold intervals of several lengths dt, expected one")
        x, y = (z[keep] for z in transitions(segment))
        self.inputs.fit(x)
        scale = Normalizer(y.shape[-1]).to(y)
        scale.fit(y)
        self.spread.copy_(scale.std[:-1])
        if self.config.scale_targets:
            self.targets.load_state_dict(scale.state_dict())

    def groups(self) -> list[dict]:
        decays = zip(self.net.weights, self.config.weight_decay, strict=True)
        free = [*self.net.biases, self.upper, self.lower]
        return [{"params": [p], "weight_decay": d} for p, d in decays] + [{"params": free, "weight_decay": 0.0}]

    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of the members' losses, all on the same rows."""
        loss = self._nll(segment, 1).mean()
        return loss, {"loss": loss.detach()}

    def losses(self, segment: Segment, noise: Tensor) -> Tensor:
        return self._nll(segment, self.parts)

    @torch.no_grad()
    def validate(self, segment: Segment, noise: Tensor) -> Tensor:
        """[members]: the mean squared error of the mean, in the units of the fit."""
        x, y = transitions(segment)
        mean = self.net(self.inputs(x)[None])[..., : y.shape[-1]]
        return kept_mean((mean - self.targets(y)) ** 2, segment.mask.reshape(1, -1))

    def finish(self, errors: Tensor) -> None:
        """The members with the least error become the elites. One whose error is not finite never does: where too
        few are left they are repeated. Raises Diverged where none is."""
        n = int(errors.isfinite().sum())
        if n == 0:
            raise Diverged("Ensemble: every member has diverged; expected finite data, or try a smaller learning rate")
        order = torch.where(errors.isfinite(), errors, torch.inf).argsort(stable=True)
        count = torch.arange(len(self.elites), device=order.device) % n
        self.elites.copy_(order[count])

    def _nll(self, segment: Segment, streams: int) -> Tensor:
        """[members]: rows are contiguous by stream, one a member, or one for all."""
        x, y = transitions(segment)
        x, y, mask = group(self.inputs(x), streams), group(self.targets(y), streams), segment.mask.reshape(streams, -1)
        nll = gaussian_nll(self.net.layers(), x, y, mask, self.upper, self.lower, "silu")
        return nll + self.config.bound * (self.upper - self.lower).sum((1, 2))


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.inf, x)


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := [n for n in names if n not in UNCERTAINTY]:
        raise ValueError(f"Ensemble: uncertainty {wrong[0]!r} is not known, expected one of {', '.join(UNCERTAINTY)}")
    return tuple(names)
