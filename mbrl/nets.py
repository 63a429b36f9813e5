"""Networks that come in stacks: n independent networks of one shape, evaluated by batched matrix products."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbrl import likelihood, stacked

Activation = Literal["silu", "relu", "tanh"]
Init = Callable[[Tensor, torch.Generator | None], object]  # fills one weight [in, out] in place
ROWS = 512  # of one network at a time on a CPU, so that the activations stay in its caches


def truncated(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Normal of standard deviation 1 / (2 sqrt(in)), redrawn beyond two standard deviations."""
    std = 0.5 / weight.shape[0] ** 0.5
    nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std, generator=generator)


def uniform(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Uniform within 1 / sqrt(in), as torch's own linear layers."""
    bound = 1 / max(weight.shape[0], 1) ** 0.5
    nn.init.uniform_(weight, -bound, bound, generator=generator)


def orthogonal(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Orthonormal columns or rows, scaled by sqrt(2)."""
    nn.init.orthogonal_(weight, 2**0.5, generator=generator)


class StackedMLP(nn.Module):
    """n multilayer perceptrons of the same sizes, e.g. [in, 200, 200, out]; no activation after the last layer.

    `weights[l]` is [n, in, out], `biases[l]` is [n, 1, out]. The weights are drawn by `init`, on the CPU, from the
    generator (torch's global one where None); biases begin at zero."""

    def __init__(
        self,
        n: int,
        sizes: Sequence[int],
        activation: Activation = "silu",
        init: Init = truncated,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if n < 1 or len(sizes) < 2 or min(sizes[1:]) < 1 or sizes[0] < 0:
            raise ValueError(f"StackedMLP: got n {n} and sizes {list(sizes)}, expected n >= 1 and two sizes or more")
        if activation not in get_args(Activation):
            raise ValueError(f"StackedMLP: activation is {activation!r}, expected one of {get_args(Activation)}")
        self.n, self.sizes = n, tuple(sizes)
        self.activation: Activation = activation
        device = "cpu" if generator is None else generator.device
        weights = [torch.empty(n, i, o, device=device) for i, o in pairwise(sizes)]
        for weight in weights:
            for member in weight:
                init(member, generator)
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList([torch.zeros(n, 1, o, device=device) for o in sizes[1:]])

    def layers(self, index: Tensor | None = None) -> tuple[Tensor, ...]:
        """(weight, bias, weight, bias ...), or those of the networks `index` [m] only, for `apply_layers`."""
        flat = [p for pair in zip(self.weights, self.biases, strict=True) for p in pair]
        return tuple(flat if index is None else (p[index] for p in flat))

    def forward(self, x: Tensor) -> Tensor:
        """[n or 1, B, in] -> [n, B, out]; a leading 1 gives every network the same rows."""
        return apply_layers(self.layers(), x, self.activation)


def apply_layers(layers: Sequence[Tensor], x: Tensor, activation: Activation) -> Tensor:
    """x [n or 1, B, in] through (weight [n, in, out], bias [n, 1 or B, out], ...) -> [n, B, out]."""
    reuse = not torch.is_grad_enabled()  # then nobody needs what the activation was given
    n, size = layers[0].shape[0], x.shape[1]
    if stacked.serves(layers, x, activation):
        return stacked.apply(layers, x, activation)
    if reuse and x.is_cpu and size > ROWS and not torch.compiler.is_compiling():
        x, done, step = x.expand(n, -1, -1), [], -(-size // -(-size // ROWS))
        for i in range(n):
            for at in range(0, size, step):
                rows = slice(at, at + step)
                own = [p[i : i + 1, rows] if j % 2 and p.shape[1] > 1 else p[i : i + 1] for j, p in enumerate(layers)]
                done.append(apply_layers(own, x[i : i + 1, rows], activation))
        return torch.cat(done, 1).reshape(n, size, -1)
    if activation == "tanh":
        act = torch.tanh_ if reuse else torch.tanh
    else:
        act = (lambda y: F.silu(y, inplace=reuse)) if activation == "silu" else (lambda y: F.relu(y, inplace=reuse))
    last = len(layers) - 2
    for i in range(0, last + 2, 2):
        weight, bias = layers[i], layers[i + 1]
        if x.shape[0] != weight.shape[0]:
            x = x.expand(weight.shape[0], -1, -1)
        x = torch.baddbmm(bias, x, weight)
        if i < last:
            x = act(x)
    return x


def power_iteration(weight: Tensor, vector: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """The spectral norms of the matrices weight [n, in, out], and vectors [n, out] nearer to their first right singular
    vectors than the given ones. The norms approach their values from below; from a vector that has some share in the
    first singular direction they reach them, and one kept from call to call follows weights that change slowly. A
    vector that the matrix takes to zero is left as it is."""
    v = vector[..., None]
    for _ in range(steps):
        new = weight.mT @ (weight @ v)
        size = new.norm(dim=1, keepdim=True)
        v = torch.where(size > 0, new / size, v)
    return (weight @ v)[..., 0].norm(dim=1), v[..., 0]


def variance(raw: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """The soft bounds of the log-variance, solved for the variance: with
    v = upper - softplus(upper - raw) and log var = lower + softplus(v - lower),
    var = e^lower + e^upper / (1 + e^(upper - raw)), exactly."""
    return lower.exp() + upper.exp() * torch.sigmoid(raw - upper)


def gaussian_draw(
    layers: Sequence[Tensor],
    x: Tensor,
    rest: Tensor,
    least: Tensor,
    more: Tensor,
    noise: Tensor,
    activation: Activation,
) -> Tensor:
    """[n, B, W]: mean + noise sqrt(least + more sigmoid(raw)), where the networks, as those of `apply_layers`, give
    the mean and raw [n, B, 2 W] at the inputs x [n, B, I] and, beside them, rest [n, B, J]. least, more: [n, 1, W]."""
    if stacked.serves(layers, x, activation) and all(z.is_cpu for z in (rest, least, more, noise)):
        return stacked.apply(layers, x, activation, rest, (least, more, noise))
    y, width = apply_layers(layers, torch.cat([x, rest], -1), activation), least.shape[-1]
    return torch.addcmul(y[..., :width], noise, torch.addcmul(least, more, torch.sigmoid(y[..., width:])).sqrt())


def gaussian_nll(
    layers: Sequence[Tensor], x: Tensor, y: Tensor, kept: Tensor, upper: Tensor, lower: Tensor, activation: Activation
) -> Tensor:
    """[n]: twice the negative log-likelihood, but for a constant, of y [n or 1, B, W] under each network's Gaussian at
    x [n or 1, B, in]: the mean over W and over the rows that count, `kept` [n or 1, B] bool. The networks, as those of
    `apply_layers`, give 2 W numbers, the mean and what `variance` turns into one under the bounds [n, 1, W]. What y is
    where it does not count is not read."""
    if likelihood.serves(layers, x, y, kept, upper, lower, activation):
        return likelihood.apply(layers, x, y, kept, upper, lower, activation, _gaussian_nll)
    return _gaussian_nll(layers, x, y, kept, upper, lower, activation)


def _gaussian_nll(
    layers: Sequence[Tensor], x: Tensor, y: Tensor, kept: Tensor, upper: Tensor, lower: Tensor, activation: Activation
) -> Tensor:
    """`gaussian_nll` by torch's own operations."""
    y = torch.where(kept[..., None], y, 0.0)  # the gradient of what is not finite would be so
    mean, raw = apply_layers(layers, x, activation).chunk(2, -1)
    var = variance(raw, upper, lower)
    return kept_mean((mean - y) ** 2 / var + var.log(), kept)


def kept_mean(x: Tensor, kept: Tensor) -> Tensor:
    """x [n, B, W], kept [n or 1, B] bool -> [n]: the mean over W and over the rows that count; 0 where none does."""
    return torch.where(kept[..., None], x, 0.0).sum((1, 2)) / (kept.sum(1).clamp(min=1) * x.shape[-1])


class Normalizer(nn.Module):
    """Standardises the last axis by a mean and a standard deviation that `fit` sets; the identity until then.
    They are buffers: saved with the model, not trained."""

    mean: Tensor  # [D]
    std: Tensor  # [D]

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """x [..., D]: a column that hardly moves (a standard deviation below 1e-6 of its size, or below 1e-12 of the
        largest column's, which is rounding) is only centred. Computed in float64."""
        if x.shape[-1] == 0:
            return
        x = x.detach().reshape(-1, x.shape[-1]).double()
        if len(x) == 0:
            raise ValueError("Normalizer: got no rows, expected at least one")
        mean, std = x.mean(0), x.std(0, correction=0)
        still = std <= torch.maximum(1e-6 * x.abs().amax(0), 1e-12 * std.amax()).clamp(min=1e-30)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(still, 1.0, std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean
