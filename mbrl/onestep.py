"""What learners share that predict a step by one evaluation of a network: the change of the observation and the reward,
alone or with a variance."""

import abc
from typing import Protocol

import torch
from torch import Tensor

from mbrl.core import Diverged, Markov, Prediction, Segment, Spec, StepInput, Tree, repeat
from mbrl.nets import Normalizer, variance
from mbrl.rollout import masked_mean, transitions


class OneStepConfig(Protocol):
    @property
    def gaussian(self) -> bool:
        """Whether a variance is learned, too, by the likelihood; else the mean alone, by the squared error."""
        ...

    @property
    def bound(self) -> float:
        """The coefficient that keeps the soft bounds of the log-variance together."""
        ...

    @property
    def scale_targets(self) -> bool:
        """Whether the targets are standardised for the fit."""
        ...


class OneStep(Markov):
    """Predicts the change of the observation and the reward, O + 1 numbers. A learner says by `evaluate` what its
    network gives, by `limits` where the log-variance ends, and by `trained` under which condition it is fitted.

    Deterministic, it has no noise and reports no uncertainty. Gaussian, the noise [B, O + 1] is that of the observation
    and, last, of the reward, and a step reports "aleatoric": ||std|| over both in raw units, infinite where it would be
    NaN."""

    noisy_loss = False
    config: OneStepConfig

    def __init__(self, spec: Spec, config: OneStepConfig) -> None:
        super().__init__()
        width = spec.obs + 1
        self.spec, self.config, self.noise_dim = spec, config, width if config.gaussian else 0
        self.outputs = 2 * width if config.gaussian else width  # of the network

    def _normalise(self, device: torch.device | str, once: bool) -> None:
        """The normalisers, set by `prepare`: each time, or `once`, since what was learned would mean something else
        otherwise. The buffer `anchored` then tells whether they are set."""
        self.inputs = Normalizer(self.spec.obs + self.spec.act).to(device)
        self.targets = Normalizer(self.spec.obs + 1).to(device)
        if once:
            self.register_buffer("anchored", torch.zeros((), dtype=torch.bool, device=device))

    @abc.abstractmethod
    def evaluate(self, x: Tensor, cond: Tree) -> Tensor:
        """Standardised inputs [B, O + A] -> [G, B / G, O + 1] in the units of the fit, twice as wide where there is a
        variance."""

    @abc.abstractmethod
    def limits(self, cond: Tree) -> tuple[Tensor, Tensor]:
        """The upper and the lower bound of the log-variance, [G or 1, 1, O + 1] each."""

    @abc.abstractmethod
    def trained(self, segment: Segment) -> Tree:
        """The condition of the segment's systems."""

    # ------------------------------------------------------------ prediction

    def step(self, state: Tensor, inp: StepInput, cond: Tree) -> tuple[Tensor, Prediction]:
        return self.branch(state, inp, cond, 1)

    def branch(self, state: Tensor, inp: StepInput, cond: Tree, k: int) -> tuple[Tensor, Prediction]:
        """One evaluation serves all k futures."""
        mean, var = self.moments(self.inputs(torch.cat([state, inp.act], -1)), cond)
        change, doubt = repeat(mean * self.targets.std + self.targets.mean, k), {}
        if var is not None:
            std = var.sqrt() * self.targets.std
            change = change + repeat(std, k) * inp.noise.reshape(-1, std.shape[-1])
            size = std.norm(dim=-1)
            doubt["aleatoric"] = repeat(torch.where(size.isnan(), torch.inf, size), k)
        obs = repeat(state, k) + change[:, :-1]
        return obs, Prediction(obs, change[:, -1], doubt)

    def moments(self, x: Tensor, cond: Tree) -> tuple[Tensor, Tensor | None]:
        """Standardised inputs [B, O + A] -> mean and variance [B, O + 1] in the units of the fit; no variance where it
        is deterministic."""
        y = self.evaluate(x, cond)
        if not self.config.gaussian:
            return y.flatten(0, 1), None
        mean, raw = y.chunk(2, -1)
        return mean.flatten(0, 1), variance(raw, *self.limits(cond)).flatten(0, 1)

    # ------------------------------------------------------------ training

    def prepare(self, segment: Segment) -> None:
        """Sets the normalisers. Raises ValueError where the windows' dt differ: it takes no account of it."""
        if len(segment.dt.unique()) > 1:
            name = type(self).__name__
            raise ValueError(f"{name}: the data hold intervals of several lengths dt, expected one")
        anchored = self._buffers.get("anchored")
        if anchored is not None and bool(anchored):
            return
        keep = segment.mask.flatten()
        x, y = (z[keep] for z in transitions(segment))
        self.inputs.fit(x)
        if self.config.scale_targets:
            self.targets.fit(y)
        if anchored is not None:
            anchored.fill_(True)

    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The squared error, or the Gaussian's negative log-likelihood (twice it, but for a constant), of the
        segment's systems, each under its own condition."""
        loss = self.loss_under(self.trained(segment), segment)
        return loss, {"loss": loss.detach()}

    def loss_under(self, cond: Tree, segment: Segment) -> Tensor:
        """The loss under a condition of the segment's systems."""
        x, y = transitions(segment)
        mean, var = self.moments(self.inputs(x), cond)
        error, mask = (mean - self.targets(y)) ** 2, segment.mask.flatten()
        if var is None:
            return masked_mean(error, mask)
        upper, lower = self.limits(cond)
        return masked_mean(error / var + var.log(), mask) + self.config.bound * (upper - lower).sum((1, 2)).mean()

    @torch.no_grad()
    def validate(self, segment: Segment, noise: Tensor) -> Tensor:
        """[1]: the mean squared error of the mean, in the units of the fit."""
        return masked_mean(self.squares(self.trained(segment), segment), segment.mask.flatten())[None]

    def squares(self, cond: Tree, segment: Segment) -> Tensor:
        """The squared errors [B * T, O + 1] of the mean, in the units of the fit."""
        x, y = transitions(segment)
        return (self.moments(self.inputs(x), cond)[0] - self.targets(y)) ** 2

    def finish(self, errors: Tensor) -> None:
        """Raises Diverged where the fit never reached a finite error."""
        if not bool(errors.isfinite().all()):
            name = type(self).__name__
            raise Diverged(f"{name}: the fit has diverged; expected finite data, or try a smaller learning rate")
