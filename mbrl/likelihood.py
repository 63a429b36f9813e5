"""The Gaussian likelihood of stacks of perceptrons and its gradient, as a CPU computes both in one pass from C
(`likelihood.c`): a few rows go through all layers and back while what lies between stays in the cache.

The caller is `mbrl.nets.gaussian_nll`: its plain torch gives the same numbers to rounding where this does not serve."""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbrl import compiled
from mbrl.stacked import ACTIVATIONS, FLAGS, LAYERS, WIDEST

SOURCE = Path(__file__).with_name("likelihood.c")
MOST, LEAST, TASKS = 256, 64, 8  # rows of a network that a task takes, and how many tasks there should be

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("networks", "rows", "layers", "act", "shared", "each", "split")),
        ("sizes", _int * (LAYERS + 1)),
        *((name, _pointer) for name in ("x", "y", "kept", "upper", "lower", "losses", "dupper", "dlower")),
        *((name, _pointer * LAYERS) for name in ("weights", "biases", "dweights", "dbiases")),
        ("spare", _pointer), ("done", _pointer),
        ("next", _int), ("failed", _int),
    )  # fmt: skip


def problem(dtype: torch.dtype = torch.float32) -> str | None:
    """Why nothing can be compiled here; None where it can."""
    return compiled.problem(SOURCE, FLAGS, dtype)


def serves(
    layers: Sequence[Tensor], x: Tensor, y: Tensor, kept: Tensor, upper: Tensor, lower: Tensor, activation: str
) -> bool:
    """Whether `apply` takes these: plain dense tensors of one type on a CPU, of modest widths, rows that lead alike,
    parameters that are asked for a gradient, and neither x nor y."""
    params = (*layers, upper, lower)
    return (
        torch.is_grad_enabled()
        and any(p.requires_grad for p in params)
        and not (x.requires_grad or y.requires_grad)
        and compiled.plain(x)
        and activation in ACTIVATIONS
        and len(layers) <= 2 * LAYERS
        and x.shape[1] > 0
        and y.is_cpu
        and kept.is_cpu
        and y.dtype == x.dtype
        and x.shape[0] == y.shape[0] == kept.shape[0]
        and all(p.is_cpu and p.is_contiguous() and p.dtype == x.dtype for p in params)
        and all(0 < size <= WIDEST for p in layers[::2] for size in p.shape[1:])
        and all(p.shape[1] == 1 for p in (*layers[1::2], upper, lower))
        and problem(x.dtype) is None
    )


def apply(
    layers: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    kept: Tensor,
    upper: Tensor,
    lower: Tensor,
    activation: str,
    plain: Callable[..., Tensor],
) -> Tensor:
    """As `mbrl.nets.gaussian_nll`. plain: the same by torch, of the same arguments, for who differentiates the
    gradient. Raises ValueError where the shapes do not fit together, MemoryError where there is none."""
    return _Likelihood.apply(x, y, kept, activation, plain, upper, lower, *layers)


class _Likelihood(torch.autograd.Function):
    """The gradient is found on the way forward, for losses that count alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, kept: Tensor, activation: str, plain: Any, *params: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, kept, *params)
        ctx.activation, ctx.plain = activation, plain
        losses, ctx.found = _found(x, y, kept, activation, *params)
        return losses

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (x, y, kept, *params) = weights, ctx.saved_tensors
        if torch.is_grad_enabled():  # what becomes of the gradient is differentiated, too
            upper, lower, *layers = params
            wanted = [p for p, want in zip(params, ctx.needs_input_grad[5:], strict=True) if want]
            losses = ctx.plain(layers, x, y, kept, upper, lower, ctx.activation)
            grads = iter(torch.autograd.grad(losses, wanted, weight, create_graph=True))
            return *[None] * 5, *(next(grads) if want else None for want in ctx.needs_input_grad[5:])
        found, ctx.found = ctx.found, None
        if found is None:  # asked for again: the first who asked may have changed what was found
            _, found = _found(x, y, kept, ctx.activation, *params)
        if not _ones(weight):
            found = [g * weight.reshape(-1, 1, 1) for g in found]
        return *[None] * 5, *found


def _ones(weight: Tensor) -> bool:
    """Whether nothing is to be multiplied. Of a batch of gradients (`is_grads_batched`) nobody can tell."""
    try:
        return bool((weight == 1).all())
    except RuntimeError:
        return False


def _found(
    x: Tensor, y: Tensor, kept: Tensor, activation: str, upper: Tensor, lower: Tensor, *layers: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The losses [n], and the gradients by the bounds and the layers, in their order."""
    lead, rows, width = x.shape
    n, shared = layers[0].shape[0], lead == 1
    each = -(-rows // max(1, min(rows // LEAST, max(-(-rows // MOST), -(-TASKS // n)))))
    parts, threads = -(-rows // each), torch.get_num_threads()
    split = 0 if parts == 1 else n % threads if n > threads else n  # those left when all threads had equally many
    job = _Job(n, rows, len(layers) // 2, ACTIVATIONS[activation], int(shared), each, split)
    sizes = [width]
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        count, inputs, outputs = weight.shape
        if (count, inputs) != (n, sizes[-1]) or bias.shape != (n, 1, outputs):
            raise ValueError(
                f"gaussian_nll: weights {list(weight.shape)} and biases {list(bias.shape)} meet inputs of width "
                f"{sizes[-1]}, expected [{n}, {sizes[-1]}, out] and [{n}, 1, out]"
            )
        sizes.append(outputs)
    of, bounds = (lead, rows), (n, 1, sizes[-1] // 2)
    fit = y.shape == (*of, bounds[2]) and kept.shape == of and upper.shape == lower.shape == bounds
    if lead not in (1, n) or not fit or sizes[-1] % 2:
        raise ValueError(
            f"gaussian_nll: got x {list(x.shape)}, y {list(y.shape)}, kept {list(kept.shape)} and bounds "
            f"{list(upper.shape)} and {list(lower.shape)} of networks that give {sizes[-1]} numbers, expected "
            f"[{n} or 1, B, {width}], the same with half of these and without the last, and [{n}, 1, half]"
        )
    x, y, kept = x.contiguous(), y.to(x.dtype).contiguous(), kept.to(x.dtype).contiguous()
    losses, found = x.new_empty(n), [torch.empty_like(p) for p in (upper, lower, *layers)]
    spare = x.new_empty(split, parts - 1, 1 + sum(p[0].numel() for p in found))
    done = torch.zeros(split, dtype=torch.int64)
    job.x, job.y, job.kept = x.data_ptr(), y.data_ptr(), kept.data_ptr()
    job.upper, job.lower, job.losses = (z.data_ptr() for z in (upper, lower, losses))
    job.dupper, job.dlower, job.spare, job.done = (z.data_ptr() for z in (*found[:2], spare, done))
    job.sizes[: len(sizes)] = sizes
    for i in range(job.layers):
        job.weights[i], job.biases[i] = layers[2 * i].data_ptr(), layers[2 * i + 1].data_ptr()
        job.dweights[i], job.dbiases[i] = found[2 + 2 * i].data_ptr(), found[3 + 2 * i].data_ptr()
    if compiled.shared(compiled.library(SOURCE, FLAGS, x.dtype).gradient, job):
        raise MemoryError(f"gaussian_nll: no memory for {each} rows of {job.layers} layers")
    return losses, found
