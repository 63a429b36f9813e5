"""C for a CPU: sources of this package, compiled at first use by the machine's own compiler and kept in a cache.

Where there is no compiler, or MBRL_COMPILE=0, callers compute the same by plain torch; `problem` says why."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch

_Launch = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

TYPES = {torch.float32: ("float", "int32_t"), torch.float64: ("double", "int64_t")}


def problem(source: Path, flags: tuple[str, ...], dtype: torch.dtype) -> str | None:
    """Why `library` cannot make this here; None where it can."""
    return "MBRL_COMPILE is 0" if os.environ.get("MBRL_COMPILE") == "0" else _fault(source, flags, dtype)


@cache
def _fault(source: Path, flags: tuple[str, ...], dtype: torch.dtype) -> str | None:
    try:
        library(source, flags, dtype)
    except (OSError, subprocess.SubprocessError) as error:
        return f"no working C compiler: {getattr(error, 'stderr', None) or error}"
    return None


@cache
def library(source: Path, flags: tuple[str, ...], dtype: torch.dtype) -> ctypes.CDLL:
    """The source, compiled with the flags for numbers of a type in TYPES. Raises OSError or SubprocessError where it
    cannot be made."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("neither cc, gcc nor clang is on the PATH")
    real, integer = TYPES[dtype]
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    command = [compiler, "-O3", *flags, "-shared", "-fPIC", tune, f"-DREAL={real}", f"-DINT={integer}"]
    kept = _folder() / f"{source.stem}-{_digest(source, ' '.join(command))}.so"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as room:
            made = Path(room) / "made.so"
            subprocess.run([*command, "-o", str(made), str(source)], check=True, capture_output=True, text=True)
            os.replace(made, kept)
    return ctypes.CDLL(str(kept))


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """For calls into C, which leave the interpreter free."""
    return ThreadPoolExecutor(threads, "mbrl-compiled")


def plain(x: torch.Tensor) -> bool:
    """Whether these are numbers on a CPU of a type in TYPES, and nobody transforms or traces what is done with them."""
    return (x.is_cpu and x.dtype in TYPES) and not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore  vmap, jvp and the like
        or torch.autograd.forward_ad._current_level >= 0
    )


def shared(call: Any, job: ctypes.Structure) -> int:
    """call(job, launch, threads) with as many threads as torch has, and what it returns: `launch_t` of `vectors.h`."""
    threads, broken = torch.get_num_threads(), []
    go: Any = _team() if threads > 1 else None
    if go is None and threads > 1:
        go = _Launch(lambda work, of, count, _: _together(work, of, count, broken))
    failed = call(ctypes.byref(job), go, ctypes.c_int64(threads))
    if broken:
        raise broken[0]
    return failed


@cache
def _team() -> ctypes.c_void_p | None:
    """What begins work on the threads that torch itself uses: others would have to wait for these, which spin for a
    while after each operation. None where torch was not built with it."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError, TypeError):
        return None


def _together(work: int, job: int, count: int, broken: list[BaseException]) -> None:
    """The same by threads of Python's. It is called from C, which an exception cannot pass, and waits for all of them
    also where Ctrl-C comes: they write to the arrays."""
    call: Callable[[int], None] = _Work(work)
    begun = [pool(count).submit(call, job) for _ in range(count - 1)]
    try:
        call(job)
    except BaseException as error:
        broken.append(error)
    while not all(x.done() for x in begun):
        try:
            wait(begun)
        except BaseException as error:
            broken.append(error)
    broken.extend(error for x in begun if (error := x.exception()) is not None)


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mbrl-suite"


def _digest(source: Path, command: str) -> str:
    """Of all that the machine code depends on: the source, how it is compiled, and for which processor."""
    about = Path("/proc/cpuinfo")
    kinds = ("flags", "Features", "model name")
    lines = about.read_text().splitlines() if about.exists() else [platform.processor()]
    processor = {line for line in lines if line.startswith(kinds)} or {platform.processor()}
    headers = [x.read_text() for x in sorted(source.parent.glob("*.h"))]
    text = "\n".join([source.read_text(), *headers, command, platform.platform(), *sorted(processor)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
