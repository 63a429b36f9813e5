"""C for a CPU: sources of this package, compiled at first use by the machine's own compiler and kept in a cache.

Where there is no compiler, or MBRL_COMPILE=0, callers compute the same by plain torch; `problem` says why."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

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


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mbrl-suite"


def _digest(source: Path, command: str) -> str:
    """Of all that the machine code depends on: the source, how it is compiled, and for which processor."""
    about = Path("/proc/cpuinfo")
    kinds = ("flags", "Features", "model name")
    lines = about.read_text().splitlines() if about.exists() else [platform.processor()]
    processor = {line for line in lines if line.startswith(kinds)} or {platform.processor()}
    text = "\n".join([source.read_text(), command, platform.platform(), *sorted(processor)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
