"""The shallow PLRNN's loop in time as a CPU runs it from C (`forced.c`): a loop of small products costs a CPU more for
the calls than for the arithmetic. Where nothing can be compiled (`problem` says why) the callers' plain torch gives the
same numbers."""

import ctypes
from concurrent.futures import wait
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbrl import compiled

SOURCE = Path(__file__).with_name("forced.c")
TASK = 8  # rows a task, as the source has it
FLAGS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
WIDEST = 32  # of a state: past it the products are large enough for torch
NARROW = 8  # of a state whose Jacobian stays in the registers


def problem() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    return compiled.problem(SOURCE, _flags(2, True), torch.float32)


def serves(state: Tensor) -> bool:
    """Whether `forced` takes states like this one [S, B, M]."""
    return (
        state.device.type == "cpu" and state.dtype in compiled.TYPES and state.shape[-1] <= WIDEST and problem() is None
    )


def forced(
    A: Tensor,
    W1: Tensor,
    W2: Tensor,
    h2: Tensor,
    start: Tensor,
    drive: Tensor,
    signal: Tensor,
    keep: Tensor,
    clipped: bool,
) -> Tensor:
    """S teacher-forced shallow PLRNNs, y [S, B, T, M]: with x the first of which is `start` [S, B, M],

        y_t = A x_t + W1 (relu(W2 x_t + h2) [- relu(W2 x_t)]) + drive_t,    x_{t+1} = keep_t y_t + (1 - keep_t) signal_t

    A [S, M], W1 [S, M, L], W2 [S, L, M], h2 [S, L]; drive, signal [S, B, T, M]; keep [S, T, M], a number that 1 or 0
    chooses, not interpolates. Gradients reach all but signal and keep. Rows are shared out to as many threads as torch
    uses; the numbers do not depend on how many. Raises ValueError for other shapes and types."""
    (seeds, rows, steps, width), hidden = drive.shape, h2.shape[-1]
    given = {"A": A, "W1": W1, "W2": W2, "h2": h2, "start": start, "signal": signal, "keep": keep}
    want = {
        "A": (seeds, width), "W1": (seeds, width, hidden), "W2": (seeds, hidden, width), "h2": (seeds, hidden),
        "start": (seeds, rows, width), "signal": tuple(drive.shape), "keep": (seeds, steps, width),
    }  # fmt: skip
    for name, x in given.items():  # the loop in C reads what it is told to
        if x.shape != want[name] or x.dtype != drive.dtype:
            raise ValueError(
                f"forced: {name} is {list(x.shape)} of {x.dtype}, expected {list(want[name])} of {drive.dtype}"
            )
    return _Forced.apply(A, W1, W2, h2, start, drive, signal, keep, clipped)


@torch.no_grad()
def jacobians(A: Tensor, W1: Tensor, W2: Tensor, h2: Tensor, x: Tensor, clipped: bool) -> Tensor:
    """Those of the same step at states x [S, R, M]: [S, R, M, M]; no gradient."""
    given = [v.contiguous() for v in (A, W1, W2, h2, x)]
    out = x.new_empty(*x.shape, x.shape[-1])
    _share("jacobians", clipped, x, [*given, out], x.shape[0] * x.shape[1], (x.shape[1], 1, h2.shape[1]))
    return out


@torch.no_grad()
def spectral(J: Tensor) -> Tensor:
    """The largest singular values of J [..., M, M], to 3e-6 of each and to rounding; no gradient."""
    flat = J.reshape(-1, *J.shape[-2:]).contiguous()
    out = flat.new_empty(len(flat))
    _share("spectral", True, flat, [flat, out], len(flat), (1, 1, 1))
    return out.clamp_(min=0).sqrt_().reshape(J.shape[:-2])


class _Forced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A, W1, W2, h2, start, drive, signal, keep, clipped) -> Tensor:
        given = [x.detach().contiguous() for x in (A, W1, W2, h2, start, drive, signal, keep)]
        y = torch.empty_like(given[5])
        _run("forward", clipped, y, [*given, y])
        ctx.save_for_backward(*given[:5], *given[6:], y)
        ctx.clipped = clipped
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, y = ctx.saved_tensors  # A, W1, W2, h2, start, signal, keep
        A, W1, W2, h2, start = given[:5]
        seeds, each = y.shape[0], -(-y.shape[1] // TASK)
        drive, first = torch.empty_like(y), torch.empty_like(start)
        sums = [x.new_empty(seeds, each, *x.shape[1:]) for x in (A, W1, W2, h2)]
        _run("backward", ctx.clipped, y, [*given, y, grads[0].contiguous(), drive, first, *sums])
        return *(x.sum(1) for x in sums), first, drive, None, None, None


def _run(name: str, clipped: bool, y: Tensor, arrays: list[Tensor]) -> None:
    seeds, rows, length, _ = y.shape
    _share(name, clipped, y, arrays, seeds * -(-rows // TASK), (rows, length, arrays[1].shape[2]))


def _share(
    name: str, clipped: bool, like: Tensor, arrays: list[Tensor], tasks: int, sizes: tuple[int, int, int]
) -> None:
    """Shares out tasks among as many threads as torch uses, and waits for all of them, also where one fails or Ctrl-C
    comes: they write to the arrays."""
    width, threads = like.shape[-1], torch.get_num_threads()
    call = getattr(compiled.library(SOURCE, _flags(width, clipped), like.dtype), name)
    part = lambda a, b: call(*map(ctypes.c_int64, (a, b, *sizes)), *(ctypes.c_void_p(x.data_ptr()) for x in arrays))
    cuts = [tasks * i // threads for i in range(threads + 1)]
    if threads == 1:
        failed = [part(*cuts)]
    else:
        begun = [compiled.pool(threads).submit(part, *cut) for cut in pairwise(cuts)]
        try:
            failed = [x.result() for x in begun]
        finally:
            wait(begun)
    if any(failed):
        raise MemoryError(f"{name}: no memory for the weights of a PLRNN of width {width} and {sizes[2]} hidden units")


def _flags(width: int, clipped: bool) -> tuple[str, ...]:
    return *FLAGS, f"-DM={width}", f"-DCLIPPED={int(clipped)}"
