"""Loops in time that a CPU runs from C: `forced.c`, compiled at first use by the machine's own compiler and kept.

A loop of small products costs a CPU more for the calls than for the arithmetic. Where there is no compiler, or
MBRL_COMPILE=0, the callers' plain torch gives the same numbers; `problem` says why."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("forced.c")
TASK = 8  # rows a task, as the source has it
TYPES = {torch.float32: ("float", "int32_t"), torch.float64: ("double", "int64_t")}
FLAGS = ("-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-shared", "-fPIC")
WIDEST = 32  # of a state: past it the products are large enough for torch
NARROW = 8  # of a state whose Jacobian stays in the registers


def problem() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    return "MBRL_COMPILE is 0" if os.environ.get("MBRL_COMPILE") == "0" else _fault()


@cache
def _fault() -> str | None:
    try:
        _library(2, True, torch.float32)
    except (OSError, subprocess.SubprocessError) as error:
        return f"no working C compiler: {getattr(error, 'stderr', None) or error}"
    return None


def serves(state: Tensor) -> bool:
    """Whether `forced` takes states like this one [S, B, M]."""
    return state.device.type == "cpu" and state.dtype in TYPES and state.shape[-1] <= WIDEST and problem() is None


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
                f"compiled.forced: {name} is {list(x.shape)} of {x.dtype}, expected {list(want[name])} of {drive.dtype}"
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
    call = getattr(_library(width, clipped, like.dtype), name)
    part = lambda a, b: call(*map(ctypes.c_int64, (a, b, *sizes)), *(ctypes.c_void_p(x.data_ptr()) for x in arrays))
    cuts = [tasks * i // threads for i in range(threads + 1)]
    if threads == 1:
        failed = [part(*cuts)]
    else:
        begun = [_pool(threads).submit(part, *cut) for cut in pairwise(cuts)]
        try:
            failed = [x.result() for x in begun]
        finally:
            wait(begun)
    if any(failed):
        raise MemoryError(f"{name}: no memory for the weights of a PLRNN of width {width} and {sizes[2]} hidden units")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "mbrl-forced")


@cache
def _library(width: int, clipped: bool, dtype: torch.dtype) -> ctypes.CDLL:
    """Raises OSError or SubprocessError where it cannot be made."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("neither cc, gcc nor clang is on the PATH")
    real, integer = TYPES[dtype]
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    names = (f"-DREAL={real}", f"-DINT={integer}", f"-DM={width}", f"-DCLIPPED={int(clipped)}")
    command = [compiler, *FLAGS, tune, *names]
    kept = _folder() / f"forced-{_digest(' '.join(command))}.so"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as room:
            made = Path(room) / "made.so"
            subprocess.run([*command, "-o", str(made), str(SOURCE)], check=True, capture_output=True, text=True)
            os.replace(made, kept)
    return ctypes.CDLL(str(kept))


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mbrl-suite"


def _digest(command: str) -> str:
    """Of all that the machine code depends on: the source, how it is compiled, and for which processor."""
    about = Path("/proc/cpuinfo")
    kinds = ("flags", "Features", "model name")
    lines = about.read_text().splitlines() if about.exists() else [platform.processor()]
    processor = {line for line in lines if line.startswith(kinds)} or {platform.processor()}
    text = "\n".join([SOURCE.read_text(), command, platform.platform(), *sorted(processor)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
