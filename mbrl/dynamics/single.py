"""One network instead of an ensemble: deterministic, or Gaussian. What an ensemble gives besides, a value function that
is smooth where the model is wrong, a regulariser of the critic may give as well (Zheng et al., ICLR 2023, arXiv
2302.01244): `robust` and `spectral` of `mbrl.sac.SacConfig`."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from mbrl.core import Segment, Spec, Tree
from mbrl.nets import StackedMLP, apply_layers, truncated
from mbrl.onestep import OneStep


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
class Single(OneStep):
    """One network; noise and uncertainty are those of `mbrl.onestep.OneStep`."""

    config: SingleConfig

    def __init__(self, spec: Spec, config: SingleConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(spec, config)
        if len(config.weight_decay) != len(config.hidden) + 1:
            raise ValueError(
                f"SingleConfig: weight_decay has {len(config.weight_decay)} values, expected one a layer: "
                f"{len(config.hidden) + 1} for hidden {list(config.hidden)}"
            )
        sizes = [spec.obs + spec.act, *config.hidden, self.outputs]
        self.net = StackedMLP(1, sizes, "silu", truncated, generator)
        like = self.net.weights[0]
        self.bounds = nn.ParameterList()  # of the log-variance: upper, lower
        if config.gaussian:
            self.bounds.extend(like.new_full((spec.obs + 1,), x) for x in (0.5, -10.0))
        self._normalise(like.device, once=False)

    def evaluate(self, x: Tensor, cond: Tree) -> Tensor:
        return apply_layers(self.net.layers(), x[None], "silu")

    def limits(self, cond: Tree) -> tuple[Tensor, Tensor]:
        upper, lower = self.bounds
        return upper[None, None], lower[None, None]

    def trained(self, segment: Segment) -> Tree:
        return ()

    def groups(self) -> list[dict]:
        decays = zip(self.net.weights, self.config.weight_decay, strict=True)
        free = [*self.net.biases, *self.bounds]
        return [{"params": [p], "weight_decay": d} for p, d in decays] + [{"params": free, "weight_decay": 0.0}]
