"""One network with a head for each task: the shape in which fine-tuning, rehearsal, EWC, SI and the multi-task oracle
of continual learning are usually tried (e.g. by HyperCRL, arXiv 2009.11997)."""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from mbrl.core import Segment, Spec, Tree, group
from mbrl.nets import StackedMLP, apply_layers, truncated
from mbrl.onestep import OneStep


@dataclass(frozen=True)
class HeadsConfig:
    """`hidden` are the shared layers; a head is one linear layer. `shared`: one head serves all tasks. `gaussian`,
    `bound` and `scale_targets`: see `mbrl.dynamics.single.SingleConfig`."""

    hidden: tuple[int, ...] = (200, 200, 200, 200)
    shared: bool = False
    gaussian: bool = False
    bound: float = 0.01
    scale_targets: bool = True

    def build(self, spec: Spec, generator: torch.Generator | None = None) -> "Heads":
        return Heads(spec, self, generator)


@final
class Heads(OneStep):
    """A context [G, C] weighs the C heads; `contexts`
    [systems, C] are the systems' own, rows of the identity. Where the spec has no contexts there is a head for each
    system, and the first serves.

    Noise and uncertainty are those of `mbrl.onestep.OneStep`. The normalisers are set once, by the first call of
    `prepare`."""

    config: HeadsConfig
    contexts: Tensor  # [systems, C]
    anchored: Tensor  # [] bool: whether the normalisers are set

    def __init__(self, spec: Spec, config: HeadsConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(spec, config)
        if spec.ctx and spec.ctx < spec.systems:
            raise ValueError(
                f"HeadsConfig: contexts of width {spec.ctx} for {spec.systems} systems, expected a head each"
            )
        if spec.systems > 1 and not config.shared:
            self.spec = spec = replace(spec, ctx=spec.ctx or spec.systems)
        heads = 1 if config.shared else spec.ctx or spec.systems
        self.trunk = StackedMLP(1, [spec.obs + spec.act, *config.hidden], "silu", truncated, generator)
        self.heads = StackedMLP(heads, [config.hidden[-1], self.outputs], "silu", truncated, generator)
        like = self.trunk.weights[0]
        self.bounds = nn.ParameterList()  # of the log-variance: upper, lower
        if config.gaussian:
            self.bounds.extend(like.new_full((heads, spec.obs + 1), x) for x in (0.5, -10.0))
        eye = torch.eye(spec.ctx or spec.systems, device=like.device)[: spec.systems]
        self.register_buffer("contexts", eye)
        self._normalise(like.device, once=True)

    def condition(self, ctx: Tensor) -> Tree:
        """The heads as weighed: weight [G, H, out], bias [G, 1, out]; bounds [G, O + 1] where there is a variance."""
        return self._weighed(ctx if self.spec.ctx else self.contexts[:1])

    def context(self, system: Tensor) -> Tensor:
        return self.contexts[system] if self.spec.ctx else super().context(system)

    def pinned(self, part: Tensor) -> Tree:
        return self._weighed(self.contexts[:1])

    def _weighed(self, ctx: Tensor) -> Tree:
        tables = [*self.heads.layers(), *self.bounds]
        ctx = torch.ones_like(ctx[:, :1]) if self.config.shared else ctx
        return tuple((ctx.to(x) @ x.flatten(1)).unflatten(1, x.shape[1:]) for x in tables)

    def evaluate(self, x: Tensor, cond: Tree) -> Tensor:
        features = nn.functional.silu(apply_layers(self.trunk.layers(), x[None], "silu")[0])
        return apply_layers(cond[:2], group(features, cond[0].shape[0]), "silu")

    def limits(self, cond: Tree) -> tuple[Tensor, Tensor]:
        upper, lower = cond[2:]
        return upper[:, None], lower[:, None]

    def trained(self, segment: Segment) -> Tree:
        """Each system by its own head."""
        return self._weighed(self.contexts[segment.system])
