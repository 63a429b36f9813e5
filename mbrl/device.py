"""The one file that knows of accelerators: choosing a device, seeding, capturing a function as a graph."""

import ctypes
import os
import secrets
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

SWEEP = 1000  # steps of an optimiser from one look for subnormal moments to the next, on a CPU


def pick(name: str = "auto") -> torch.device:
    """For "auto" the first accelerator, or else the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, expected 'auto', 'cpu' or 'cuda[:N]'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, expected 'auto', 'cpu' or 'cuda[:N]'")
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= here:
        has = f"{here} of them" if here else "none"
        raise ValueError(
            f"device: got {name!r}, but this machine (or this build of torch) has {has}; pass --device cpu"
        )
    return device


def use_threads(n: int) -> None:
    """CPU threads of this process; 0 leaves torch its own choice. Raises ValueError for fewer."""
    if n < 0:
        raise ValueError(f"--threads {n}: expected 0 (torch's own choice) or more")
    if n:
        torch.set_num_threads(n)


def slowdown(seconds: float = 0.1) -> float:
    """How many times as long a small matrix product and an activation take on this process's threads as on one, from
    so many seconds of each. Below 1 where the cores are free; several times as long where another process keeps one of
    them busy, since all threads wait for that which shares its core, and spin while they do."""
    count = torch.get_num_threads()
    if count == 1:
        return 1.0
    x, took = torch.rand(256, 256), []
    try:
        for threads in (1, count):
            torch.set_num_threads(threads)
            done, begin = 0, time.perf_counter()
            while (spent := time.perf_counter() - begin) < seconds or done < 3:
                torch.sigmoid(x @ x)
                done += 1
            took.append(spent / done)
    finally:
        torch.set_num_threads(count)
    return took[1] / took[0]


def available() -> bool:
    """Whether an accelerator is at hand."""
    return torch.cuda.is_available()


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> str:
    """The device in words, for a run's record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def fresh_seed() -> int:
    """A seed for a run that was given none; the run records it."""
    return secrets.randbelow(2**31)


def keep_memory() -> bool:
    """Ask the C library (glibc; elsewhere nothing happens) to keep what tensors free, instead of giving it back to the
    system and fetching it anew, page by page, for the next tensor: a plan of small matrix products is up to a quarter
    faster on a CPU. For this whole process: the command line and the benchmarks call it, the library does not. Returns
    whether it was done."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim, pad, mapped = -1, -2, -3  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
    return all(mallopt(what, size) == 1 for what, size in ((trim, 2**31 - 1), (pad, 2**26), (mapped, 2**25)))


@torch.no_grad()
def drop_subnormals(*tensors: torch.Tensor) -> None:
    """Sets to zero, in place, what is too small to change a sum of ordinary numbers: in float32 below 2^23 times the
    smallest normal number, 1e-31. Weights under a decay and the moments of units that have died approach zero and stay
    just above it, where a CPU takes many times as long for a product. Whoever trains calls it from time to time."""
    for x in tensors:
        kind = torch.finfo(x.dtype)
        x.masked_fill_(x.abs() < kind.tiny / kind.eps, 0.0)


def sweep(steps: torch.Tensor, *moments: torch.Tensor) -> None:
    """`drop_subnormals` at every SWEEP-th step of an optimiser, where they cost: on a CPU. steps: how many were taken,
    the most counts."""
    if steps.is_cpu and int(steps.max()) % SWEEP == 0:
        drop_subnormals(*moments)


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own: nothing draws from the global one."""
    return torch.Generator(device=device).manual_seed(seed)


def graphed(
    fn: Callable, *example: Any, warmup: int = 3, state: Sequence[torch.Tensor] = (), fallback: bool = False
) -> Callable:
    """fn with its device work captured once as a graph and replayed at each call.

    fn takes and returns trees of tensors, writes state only in place and never synchronises. Inputs are copied into
    the captured ones; outputs are the captured ones, overwritten by the next call. Where the example tensors are not
    on an accelerator, or MBRL_GRAPHS=0, fn itself is returned. Capturing runs fn `warmup` times: the tensors `state`,
    those that fn changes, are as before when this returns. fallback: where fn cannot be captured, a warning, and fn
    itself is returned; else RuntimeError.
    """
    leaves = [x for x in pytree.tree_leaves(example) if isinstance(x, torch.Tensor)]
    if not leaves or leaves[0].device.type != "cuda" or os.environ.get("MBRL_GRAPHS") == "0":
        return fn
    device = leaves[0].device
    static = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, example)
    before = [x.detach().clone() for x in state]
    with torch.cuda.device(device):  # whose a new stream is
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(side):
                for _ in range(warmup):
                    fn(*static)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, stream=side):  # its own would be of the device that captured first
                out = fn(*static)
        except RuntimeError as error:
            if not fallback:
                raise
            torch.cuda.synchronize()
            text = str(error).strip().partition("\n")[0]
            warnings.warn(f"not captured as a graph, each operation is launched by itself: {text}", stacklevel=2)
            return fn
        finally:
            with torch.no_grad():
                for x, old in zip(state, before, strict=True):
                    x.copy_(old)
    targets = [x for x in pytree.tree_leaves(static) if isinstance(x, torch.Tensor)]

    def replay(*args: Any) -> Any:
        given = [x for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        with torch.cuda.device(device):
            for target, new in zip(targets, given, strict=True):
                target.copy_(new)
            graph.replay()
        return out

    replay.fn = fn  # pyright: ignore[reportFunctionMemberAccess]  keeps alive what the graph reads and writes
    return replay
