"""Stacks of multilayer perceptrons as a CPU runs them from C (`stacked.c`), where no gradient is asked for: the
activations of a few rows stay in the cache from layer to layer, and threads meet once a pass, not once an operation.

The callers are `apply_layers` and `gaussian_draw` of `mbrl.nets`, whose plain torch gives the same numbers, to
rounding, where this does not serve. One use with gradients has its own code, `mbrl.likelihood`."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mbrl import compiled

SOURCE = Path(__file__).with_name("stacked.c")
FLAGS = ("-fno-math-errno", "-fno-trapping-math")  # it rounds by adding: no reordering of sums
ACTIVATIONS = {"silu": 1, "relu": 2}
LAYERS = 64  # at most, as the source has it
WIDEST = 1024  # of a layer: past it torch's products are as fast
BLOCK = 128  # rows of a network that a task takes through all layers
PER = 8  # rows to whose multiple blocks are rounded

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("networks", "rows", "layers", "act", "shared", "each", "first", "skip")),
        ("sizes", _int * (LAYERS + 1)), ("wide", _int * LAYERS), ("high", _int * LAYERS),
        ("x", _pointer), ("rest", _pointer), ("weights", _pointer * LAYERS), ("biases", _pointer * LAYERS),
        *((name, _pointer) for name in ("least", "more", "noise", "y")),
        ("next", _int), ("failed", _int),
    )  # fmt: skip


def problem(dtype: torch.dtype = torch.float32) -> str | None:
    """Why nothing can be compiled here; None where it can."""
    return compiled.problem(SOURCE, FLAGS, dtype)


def serves(layers: Sequence[Tensor], x: Tensor, activation: str) -> bool:
    """Whether `apply` takes these: plain tensors of one type on a CPU, of modest widths, weights [n, in, out] dense in
    their last two axes, biases [n, 1, out], and nobody who differentiates, transforms or traces the operations."""
    if (
        torch.is_grad_enabled()
        or not compiled.plain(x)
        or activation not in ACTIVATIONS
        or len(layers) > 2 * LAYERS
        or x.shape[1] == 0
    ):
        return False
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        _, inputs, outputs = weight.shape
        _, along, across = weight.stride()
        if (
            across != 1
            or along != outputs
            or not 0 < inputs <= WIDEST
            or outputs > WIDEST
            or bias.shape[1] != 1
            or bias.stride(2) != 1
            or not (weight.is_cpu and bias.is_cpu)
            or weight.dtype != x.dtype
            or bias.dtype != x.dtype
        ):
            return False
    return problem(x.dtype) is None


def apply(
    layers: Sequence[Tensor],
    x: Tensor,
    activation: str,
    rest: Tensor | None = None,
    draw: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """x [n or 1, B, in] through (weight [n, in, out], bias [n, 1, out], ...) -> [n, B, out]. rest: the last columns of
    x, as of a tensor beside it. draw: see `mbrl.nets.gaussian_draw`. Raises ValueError where the shapes do not fit
    together, MemoryError where there is none."""
    lead, rows, first = x.shape
    n, shared = layers[0].shape[0], rest is None and (lead == 1 or x.stride(0) == 0)
    width = first if rest is None else first + rest.shape[2]
    each = -(-rows // -(-rows // BLOCK))
    job = _Job(n, rows, len(layers) // 2, ACTIVATIONS[activation], int(shared), -(-each // PER) * PER, first)
    sizes, wide, high, weights, biases = job.sizes, job.wide, job.high, job.weights, job.biases
    sizes[0] = width
    for i in range(job.layers):
        weight, bias = layers[2 * i], layers[2 * i + 1]
        count, inputs, outputs = weight.shape
        if (count, inputs) != (n, width) or bias.shape != (n, 1, outputs) or lead not in (1, n):
            raise ValueError(
                f"stacked: weights {list(weight.shape)} and biases {list(bias.shape)} meet inputs "
                f"{[lead, rows, width]}, expected [{n}, {width}, out], [{n}, 1, out] and [{n} or 1, B, {width}]"
            )
        sizes[i + 1] = width = outputs
        wide[i], high[i] = weight.stride(0), bias.stride(0)
        weights[i], biases[i] = weight.data_ptr(), bias.data_ptr()
    if rest is not None:
        if lead != n or rest.shape[:2] != (n, rows) or rest.dtype != x.dtype:
            raise ValueError(
                f"stacked: got {list(rest.shape)} {rest.dtype} beside {list(x.shape)} {x.dtype}, expected the same, "
                f"[{n}, B] leading"
            )
        rest = rest.contiguous()
        job.rest = rest.data_ptr()
    if draw is not None:
        last, width = width, width // 2
        *bounds, noise = (z.to(x.dtype) for z in draw)
        bounds = [z.contiguous() for z in bounds]
        if noise.stride(2) != 1 or (n > 1 and noise.stride(0) != rows * noise.stride(1)):
            noise = noise.contiguous()
        if any(z.shape != (n, 1, width) for z in bounds) or noise.shape != (n, rows, width) or last % 2:
            raise ValueError(
                f"stacked: got bounds {[list(z.shape) for z in bounds]} and noise {list(noise.shape)} of networks that "
                f"give {last} numbers, expected [{n}, 1, half] and [{n}, {rows}, half]"
            )
        job.least, job.more, job.noise = (z.data_ptr() for z in (*bounds, noise))
        job.skip = width if noise.is_contiguous() else noise.stride(1)
    x = (x[:1] if shared else x).contiguous()
    y = x.new_empty(n, rows, width)
    job.x, job.y = x.data_ptr(), y.data_ptr()
    if compiled.shared(compiled.library(SOURCE, FLAGS, x.dtype).forward, job):
        raise MemoryError(f"stacked: no memory for {job.each} rows of {job.layers} layers")
    return y
