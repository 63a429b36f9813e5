"""One network instead of an ensemble: deterministic, or Gaussian. What an ensemble gives besides, a value function that
is smooth where the model is wrong, a regulariser of the critic may give as well (Zheng et al., ICLR 2023, arXiv
2302.01244): `robust` and `spectral` of `mbrl.sac.SacConfig`."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from mbrl.core import Markov, Prediction, Segment, Spec, StepInput, Tree
from mbrl.nets import Normalizer, StackedMLP, apply_layers, shifted, truncated, variance
from mbrl.rollout import masked_mean, transitions

CHUNK = 512  # rows a CPU evaluates at a time: the activations of a layer stay in its cache


@dataclass(frozen=True)
class SingleConfig:
    """The sizes and the decay (L2 of the weights, one value a layer) are those of a member of the ensemble. `gaussian`:
    a variance is learned, too, by the likelihood, within soft bounds that `bound` keeps together; else the mean alone,
    by the squared error.

    `scale_targets` standardises the targets (change of the observation, reward) for the fit. A squared error needs it,
    since no learned variance weighs the dimensions; a Gaussian one without it is the ensemble's published recipe with
    one member."""

    gaussian: bool = False
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    bound: float = 0.01
    scale_targets: bool = True

    def build(self, spec: Spec, generator: torch.Generator | None = None) -> "Single":
        return Single(spec, self, generator)


@final
class Single(Markov):
    """Predicts the change of the observation and the reward.

    Deterministic, it has no noise and reports no uncertainty. Gaussian, the noise [B, O + 1] is that of the observation
    and, last, of the reward, and a step reports "aleatoric": ||std|| over both in raw units, infinite where it would be
    NaN."""

    noisy_loss = False

    def __init__(self, spec: Spec, config: SingleConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if len(config.weight_decay) != len(config.hidden) + 1:
            raise ValueError(
                f"SingleConfig: weight_decay has {len(config.weight_decay)} values, expected one a layer: "
                f"{len(config.hidden) + 1} for hidden {list(config.hidden)}"
            )
        width = spec.obs + 1
        self.spec, self.config, self.noise_dim = spec, config, width if config.gaussian else 0
        out = 2 * width if config.gaussian else width
        self.net = StackedMLP(1, [spec.obs + spec.act, *config.hidden, out], "silu", truncated, generator)
        like = self.net.weights[0]
        self.bounds = nn.ParameterList()  # of the log-variance: upper, lower
        if config.gaussian:
            self.bounds.extend([like.new_full((width,), 0.5), like.new_full((width,), -10.0)])
        self.inputs = Normalizer(spec.obs + spec.act).to(like.device)
        self.targets = Normalizer(width).to(like.device)

    # ------------------------------------------------------------ prediction

    def step(self, state: Tensor, inp: StepInput, cond: Tree) -> tuple[Tensor, Prediction]:
        return self.branch(state, inp, cond, 1)

    def branch(self, state: Tensor, inp: StepInput, cond: Tree, k: int) -> tuple[Tensor, Prediction]:
        """One evaluation serves all k futures."""
        x = self.inputs(torch.cat([state, inp.act], -1))
        if x.is_cpu and not torch.is_grad_enabled() and len(x) > CHUNK:
            mean, var = (torch.cat(y) for y in zip(*map(self._moments, x.split(CHUNK)), strict=True))
        else:
            mean, var = self._moments(x)
        std = var.sqrt() * self.targets.std if self.config.gaussian else None
        return shifted(state, mean * self.targets.std + self.targets.mean, std, inp.noise, k)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised inputs [B, O + A] -> mean and variance [B, O + 1] in the units of the fit; the variance of a
        deterministic one is its mean and not read."""
        y = apply_layers(self.net.layers(), x[None], "silu")[0]
        if not self.config.gaussian:
            return y, y
        mean, raw = y.chunk(2, -1)
        upper, lower = self.bounds
        return mean, variance(raw, upper, lower)

    # ------------------------------------------------------------ training

    def prepare(self, segment: Segment) -> None:
        """Sets the normalisers. Raises ValueError where the windows' dt differ: it takes no account of it."""
        if len(segment.dt.unique()) > 1:
            raise ValueError("Single: the data hold intervals of several lengths dt, expected one")
        keep = segment.mask.flatten()
        x, y = (z[keep] for z in transitions(segment))
        self.inputs.fit(x)
        if self.config.scale_targets:
            self.targets.fit(y)

    def groups(self) -> list[dict]:
        decays = zip(self.net.weights, self.config.weight_decay, strict=True)
        free = [*self.net.biases, *self.bounds]
        return [{"params": [p], "weight_decay": d} for p, d in decays] + [{"params": free, "weight_decay": 0.0}]

    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The squared error, or the Gaussian's negative log-likelihood (twice it, but for a constant)."""
        x, y = transitions(segment)
        mean, var = self._moments(self.inputs(x))
        error, mask = (mean - self.targets(y)) ** 2, segment.mask.flatten()
        if not self.config.gaussian:
            loss = masked_mean(error, mask)
        else:
            upper, lower = self.bounds
            loss = masked_mean(error / var + var.log(), mask) + self.config.bound * (upper - lower).sum()
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def validate(self, segment: Segment, noise: Tensor) -> Tensor:
        """[1]: the mean squared error of the mean, in the units of the fit."""
        x, y = transitions(segment)
        mean, _ = self._moments(self.inputs(x))
        return masked_mean((mean - self.targets(y)) ** 2, segment.mask.flatten())[None]

    def finish(self, errors: Tensor) -> None:
        """Raises RuntimeError where the fit never reached a finite error."""
        if not bool(errors.isfinite().all()):
            raise RuntimeError("Single: the fit has diverged; expected finite data, or try a smaller learning rate")
