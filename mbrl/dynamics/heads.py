"""One network with a head for each task: the shape in which fine-tuning, rehearsal, EWC, SI and the multi-task oracle
of continual learning are usually tried (e.g. by HyperCRL, arXiv 2009.11997)."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from mbrl.core import Markov, Prediction, Segment, Spec, StepInput, Tree, group
from mbrl.nets import Normalizer, StackedMLP, apply_layers, shifted, truncated, variance
from mbrl.rollout import masked_mean, transitions


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
class Heads(Markov):
    """Predicts the change of the observation and the reward. A context [G, C] weighs the C heads; `contexts`
    [systems, C] are the systems' own, rows of the identity. Where the spec has no contexts there is a head for each
    system, and the first serves.

    Noise and uncertainty are those of `mbrl.dynamics.single.Single`. The normalisers are set once, by the first call of
    `prepare`: what was learned would mean something else otherwise."""

    noisy_loss = False
    contexts: Tensor  # [systems, C]
    anchored: Tensor  # [] bool: whether the normalisers are set

    def __init__(self, spec: Spec, config: HeadsConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if spec.ctx and spec.ctx < spec.systems:
            raise ValueError(
                f"HeadsConfig: contexts of width {spec.ctx} for {spec.systems} systems, expected a head each"
            )
        width, heads = spec.obs + 1, 1 if config.shared else spec.ctx or spec.systems
        self.spec, self.config, self.noise_dim = spec, config, width if config.gaussian else 0
        out = 2 * width if config.gaussian else width
        self.trunk = StackedMLP(1, [spec.obs + spec.act, *config.hidden], "silu", truncated, generator)
        self.heads = StackedMLP(heads, [config.hidden[-1], out], "silu", truncated, generator)
        like = self.trunk.weights[0]
        self.bounds = nn.ParameterList()  # of the log-variance: upper, lower
        if config.gaussian:
            self.bounds.extend([like.new_full((heads, width), 0.5), like.new_full((heads, width), -10.0)])
        eye = torch.eye(spec.ctx or spec.systems, device=like.device)[: spec.systems]
        self.register_buffer("contexts", eye)
        self.inputs = Normalizer(spec.obs + spec.act).to(like.device)
        self.targets = Normalizer(width).to(like.device)
        self.register_buffer("anchored", torch.zeros((), dtype=torch.bool, device=like.device))

    def condition(self, ctx: Tensor) -> Tree:
        """The heads as weighed: weight [G, H, out], bias [G, 1, out]; bounds [G, O + 1] where there is a variance."""
        return self._weighed(ctx if self.spec.ctx else self.contexts[:1])

    def pinned(self, part: Tensor) -> Tree:
        return self._weighed(self.contexts[:1])

    def _weighed(self, ctx: Tensor) -> Tree:
        tables = [*self.heads.layers(), *self.bounds]
        ctx = torch.ones_like(ctx[:, :1]) if self.config.shared else ctx
        return tuple((ctx.to(x) @ x.flatten(1)).unflatten(1, x.shape[1:]) for x in tables)

    def step(self, state: Tensor, inp: StepInput, cond: Tree) -> tuple[Tensor, Prediction]:
        return self.branch(state, inp, cond, 1)

    def branch(self, state: Tensor, inp: StepInput, cond: Tree, k: int) -> tuple[Tensor, Prediction]:
        """One evaluation serves all k futures."""
        mean, var = self._moments(self.inputs(torch.cat([state, inp.act], -1)), cond)
        std = var.sqrt() * self.targets.std if self.config.gaussian else None
        return shifted(state, mean * self.targets.std + self.targets.mean, std, inp.noise, k)

    def _moments(self, x: Tensor, cond: Tree) -> tuple[Tensor, Tensor]:
        """Standardised inputs [B, O + A] -> mean and variance [B, O + 1] in the units of the fit; the variance of a
        deterministic one is its mean and not read."""
        features = nn.functional.silu(apply_layers(self.trunk.layers(), x[None], "silu")[0])
        y = apply_layers(cond[:2], group(features, cond[0].shape[0]), "silu")
        if not self.config.gaussian:
            return y.flatten(0, 1), y.flatten(0, 1)
        mean, raw = y.chunk(2, -1)
        upper, lower = (x[:, None] for x in cond[2:])
        return mean.flatten(0, 1), variance(raw, upper, lower).flatten(0, 1)

    # ------------------------------------------------------------ training

    def prepare(self, segment: Segment) -> None:
        """Sets the normalisers, the first time. Raises ValueError where the windows' dt differ: it takes no account of
        it."""
        if len(segment.dt.unique()) > 1:
            raise ValueError("Heads: the data hold intervals of several lengths dt, expected one")
        if bool(self.anchored):
            return
        keep = segment.mask.flatten()
        x, y = (z[keep] for z in transitions(segment))
        self.inputs.fit(x)
        if self.config.scale_targets:
            self.targets.fit(y)
        self.anchored.fill_(True)

    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The squared error, or the Gaussian's negative log-likelihood (twice it, but for a constant), of the
        segment's systems, each by its own head."""
        x, y = transitions(segment)
        cond = self._weighed(self.contexts[segment.system])
        mean, var = self._moments(self.inputs(x), cond)
        error, mask = (mean - self.targets(y)) ** 2, segment.mask.flatten()
        if not self.config.gaussian:
            loss = masked_mean(error, mask)
        else:
            upper, lower = cond[2:]
            loss = masked_mean(error / var + var.log(), mask) + self.config.bound * (upper - lower).sum(1).mean()
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def validate(self, segment: Segment, noise: Tensor) -> Tensor:
        """[1]: the mean squared error of the mean, in the units of the fit."""
        x, y = transitions(segment)
        mean, _ = self._moments(self.inputs(x), self._weighed(self.contexts[segment.system]))
        return masked_mean((mean - self.targets(y)) ** 2, segment.mask.flatten())[None]

    def finish(self, errors: Tensor) -> None:
        """Raises RuntimeError where the fit never reached a finite error."""
        if not bool(errors.isfinite().all()):
            raise RuntimeError("Heads: the fit has diverged; expected finite data, or try a smaller learning rate")
