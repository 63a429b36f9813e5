"""A run on disk: settings, numbers, checkpoints, a figure. Nothing in it is ever half-written, nothing is a pickle.

config.json     settings (with their types), seeds, the data's name and SHA-256, versions, git hash
local.json      where the data lay on this machine
metrics.jsonl   one JSON object a line: stage, step, numbers
tensorboard/    the same numbers as curves
checkpoints/    safetensors, plain facts in their header
result.json     what came out
report.png      the same as a picture
"""

import dataclasses
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from mbrl import device as devices

SHARED = ("model-", "reward-", "terminal-")  # what several runs on the same data may share
VERSIONED = ("mbrl-suite", "torch", "numpy", "gymnasium", "mujoco", "stable-baselines3", "minari")


class RunError(ValueError):
    """A run folder that cannot be made, read or continued."""


def write_text(path: Path, text: str) -> None:
    """All or nothing: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=False, default=str) + "\n")


def versions() -> dict[str, str]:
    """What a number may depend on."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version(), "machine": platform.machine()}


def git_hash() -> str | None:
    """The commit of the checkout that this file lies in, with "+" where files have changed since."""
    here = Path(__file__).parent
    call = lambda *a: subprocess.run(
        ["git", "-C", str(here), *a], check=False, capture_output=True, text=True, timeout=10
    )
    try:
        head, tracked = call("rev-parse", "--short=12", "HEAD"), call("ls-files", "--error-unmatch", __file__)
        if head.returncode or tracked.returncode:
            return None  # an installed package inside somebody else's repository
        return head.stdout.strip() + ("+" if call("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return None


# ---------------------------------------------------------------- settings as JSON


def to_plain(value: Any) -> Any:
    """A frozen dataclass as JSON, each with the name of its type."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"_type": type(value).__name__} | fields
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    return value


def from_plain(value: Any, known: Iterable[type]) -> Any:
    """The inverse, for the known types only: nothing is imported because a file names it. Lists become tuples.
    Raises RunError for a type or a field that is not known."""
    types = {t.__name__: t for t in known}

    def build(x: Any) -> Any:
        if isinstance(x, list):
            return tuple(build(v) for v in x)
        if not isinstance(x, dict):
            return x
        if "_type" not in x:
            return {k: build(v) for k, v in x.items()}
        if x["_type"] not in types:
            raise RunError(
                f"settings of type {x['_type']!r}: not known here; where it is a learner's of your own, install the "
                f"package that announces it under mbrl.learners; known: {', '.join(sorted(types))}"
            )
        cls = types[x["_type"]]
        names = {f.name for f in dataclasses.fields(cls)}
        if extra := set(x) - names - {"_type"}:
            raise RunError(f"settings of {cls.__name__}: unknown {sorted(extra)}; it has {sorted(names)}")
        made = {k: build(v) for k, v in x.items() if k != "_type"}
        for name, hint in _hints(cls).items():
            if name in made and not _fits(made[name], hint):
                raise RunError(f"settings of {cls.__name__}: {name} is {made[name]!r}, expected {_words(hint)}")
        return cls(**made)

    return build(value)


def types_of(*values: Any) -> list[type]:
    """The dataclasses that settings are of, with those that their fields hold or may hold."""
    found: list[type] = []

    def add(x: Any) -> None:
        if dataclasses.is_dataclass(x):
            cls = x if isinstance(x, type) else type(x)
            if cls not in found:
                found.append(cls)
                for hint in _hints(cls).values():
                    add(hint)
            if not isinstance(x, type):
                for field in dataclasses.fields(x):
                    add(getattr(x, field.name))
        elif isinstance(x, tuple | list):
            for part in x:
                add(part)
        else:
            for part in get_args(x):
                add(part)

    add(values)
    return found


def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except NameError:  # of names that are there for a type checker alone
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a setting is of its type; what JSON has no word for (a path, another class) is not looked at."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, x) for x in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return isinstance(value, tuple) and (inner[-1:] != (...,) or all(_fits(x, inner[0]) for x in value))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint in (bool, str, NoneType):
        return isinstance(value, hint)
    return not (isinstance(value, dict) and dataclasses.is_dataclass(hint))


def _words(hint: Any) -> str:
    return getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint).replace("typing.", "")


# ---------------------------------------------------------------- the folder


def folder_name(name: str) -> str:
    """What the folder of something of that name is called: without slashes, colons, braces, quotes and blanks."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_")


class Run:
    """A record (see `mbrl.offline.Record`) in a folder.

    shared: another folder for fitted models, so that runs on the same data find each other's."""

    def __init__(self, folder: Path, *, shared: Path | None = None, quiet: bool = False) -> None:
        self.folder, self.shared = Path(folder), shared
        self.checkpoints = self.folder / "checkpoints"
        self.quiet = quiet
        self._writer: Any = None
        self._progress: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._said: dict[str, float] = {}
        self._began, self._before = time.perf_counter(), 0.0
        self._lock = FileLock(self.folder / ".lock")

    @classmethod
    def create(cls, folder: Path, config: Mapping[str, Any], local: Mapping[str, Any], **kw: Any) -> "Run":
        """A new folder. Raises RunError where it holds a run already."""
        folder = Path(folder)
        if (folder / "config.json").exists():
            if (folder / "result.json").exists():
                raise RunError(f"{folder}: holds a finished run; name another folder (--out)")
            raise RunError(f"{folder}: holds a run already; continue it with --resume {folder}, or name another folder")
        run = cls(folder, **kw)
        try:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError):
            raise RunError(f"{folder}: a file is in the way; expected a folder, or a name that is free") from None
        run.lock()
        write_json(folder / "local.json", local)
        facts = {"versions": versions(), "git": git_hash(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(folder / "config.json", {**config, **facts})
        return run

    @classmethod
    def open(cls, folder: Path, **kw: Any) -> "Run":
        """An existing one, to read; to go on with it takes `lock` and `rewind`, as in `continued`."""
        folder = Path(folder)
        run = cls(folder, **kw)
        run.config  # noqa: B018  (raises where there is none)
        return run

    @classmethod
    def continued(cls, folder: Path, config: Mapping[str, Any], local: Mapping[str, Any], **kw: Any) -> "Run":
        """The run in the folder, to go on after its last checkpoint, or a new one where there is none."""
        if not (Path(folder) / "config.json").exists():
            return cls.create(folder, config, local, **kw)
        run = cls.open(folder, **kw)
        run.lock()
        run.rewind()
        return run

    @classmethod
    def resumed(cls, folder: Path, command: str, threads: int, **kw: Any) -> "Run":
        """A run of `mbrl <command>` that has not finished, on so many CPU threads, or for 0 on as many as before: sums
        then come out in the order they came in before. Raises RunError for another run, and for one whose device is
        not here: another draws other numbers."""
        run = cls.open(folder, **kw)
        kind = str((run.config.get("arguments") or {}).get("_type")).lower()
        if kind != command:
            raise RunError(f"{folder}: is of `mbrl {kind}`, expected one of `mbrl {command}`")
        if run.result is not None:
            raise RunError(f"{folder}: has finished; its report is {Path(folder) / 'report.png'}")
        try:
            devices.pick(run.local.get("device", "cpu"))
        except ValueError:
            device = run.local["device"]
            raise RunError(
                f"{folder}: was begun on {device}, which is not here; go on with it where that is, or begin another run"
            ) from None
        devices.use_threads(threads or run.local["threads"])
        run.lock()
        return run

    def lock(self) -> None:
        """Keep other processes from writing there too, until `close` or the end of this one, however it ends. Raises
        RunError where one is at it."""
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise RunError(f"{self.folder}: another process is at work there; wait for its end, or stop it") from None
        except NotImplementedError:  # a file system without locks
            return

    def rewind(self) -> None:
        """Drop the numbers that were logged after the last checkpoint: they will be computed again, and be the same."""
        path, marks = self.folder / "metrics.jsonl", [self._facts(x) for x in self.checkpoints.glob("*.safetensors")]
        if (self.checkpoints / "shared.json").exists():
            marks.append(self._json("checkpoints/shared.json"))
        kept = max((x.get("_metrics", 0) for x in marks), default=0)
        self._before = max((x.get("_seconds", 0.0) for x in marks), default=0.0)
        if path.exists():
            with path.open("r+b") as file:
                file.truncate(file.read(kept).rfind(b"\n") + 1)  # whole lines, also where the machine's fall lost some
        for old in (self.folder / "tensorboard").glob("*"):
            old.unlink()
        for line in self.metrics():
            self._curve(line["stage"], line["step"], {k: v for k, v in line.items() if k not in ("stage", "step")})

    @property
    def seconds(self) -> float:
        """Wall-clock time that the run has taken, of earlier sittings up to their last checkpoints."""
        return self._before + time.perf_counter() - self._began

    @property
    def config(self) -> dict[str, Any]:
        return self._json("config.json")

    @property
    def local(self) -> dict[str, Any]:
        return self._json("local.json")

    @property
    def result(self) -> dict[str, Any] | None:
        return self._json("result.json") if (self.folder / "result.json").exists() else None

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            return json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"{self.folder}: no {name} there; expected the folder of a run") from None
        except json.JSONDecodeError as error:
            raise RunError(f"{path}: not JSON ({error}); the run cannot be read") from None

    def metrics(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        lines = []
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the last line of a run that was killed
        return lines

    # ------------------------------------------------------------ the record

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        line = {"stage": stage, "step": step, **values}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._curve(stage, step, values)

    def _curve(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), flush_secs=30)
        of = f" (seed {values['seed']:.0f})" if "seed" in values else ""  # a curve for each
        for name, value in values.items():
            if isinstance(value, int | float) and name != "seed":
                self._writer.add_scalar(f"{stage}/{name}{of}", value, step)

    def _path(self, name: str) -> Path:
        where = self.shared if self.shared is not None and name.startswith(SHARED) else self.checkpoints
        return where / f"{name}.safetensors"

    def save(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        metrics = self.folder / "metrics.jsonl"
        mark = {"_metrics": metrics.stat().st_size if metrics.exists() else 0, "_seconds": self.seconds}
        facts = {**facts, **mark}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            safetensors.torch.save_file(plain, str(temporary), metadata={"facts": json.dumps(facts, default=str)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod((self.folder / "config.json").stat().st_mode)  # safetensors would let nobody else read it
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if path.parent != self.checkpoints:  # what lies elsewhere does not say how far this run's numbers go
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.checkpoints / "shared.json", mark)
        if not name.endswith(".partial"):
            self._path(f"{name}.partial").unlink(missing_ok=True)

    def forget(self, name: str) -> None:
        """Drop what was kept under a name."""
        self._path(name).unlink(missing_ok=True)

    @staticmethod
    def _facts(path: Path) -> dict[str, Any]:
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                return json.loads((file.metadata() or {}).get("facts", "{}"))
        except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise RunError(f"{path}: not a checkpoint ({error}); delete it to compute that stage again") from None

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self._path(name)
        if not path.exists():
            return None
        facts = self._facts(path)
        return safetensors.torch.load_file(str(path)), facts

    def progress(self, stage: str, step: int, total: int | None, values: Mapping[str, float]) -> None:
        if self.quiet:
            return
        words = "  ".join(f"{k} {v:.4g}" for k, v in list(values.items())[:4] if isinstance(v, int | float))
        console = Console(stderr=True)
        if not console.is_terminal:  # a log file gets a line now and then, not a bar
            now = time.monotonic()
            if now - self._said.get(stage, -1e9) > 20 or step == total:
                self._said[stage] = now
                print(f"{stage} {step}/{total or '?'}  {words}", flush=True)
            return
        if self._progress is None:
            columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[words]}"))
            self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, words=words)
        self._progress.update(self._tasks[stage], completed=step, total=total, words=words)

    def close(self) -> None:
        """End the progress display and flush the curves. What was logged and saved stands without it."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()
        if isinstance(error, KeyboardInterrupt):
            error.args = (self.folder,)  # where to go on


# ---------------------------------------------------------------- the figure


def draw_report(
    run: Run, path: Path, title: str, behaviour: Iterable[float] = (), scale: tuple[float, float] | None = None
) -> None:
    """The learning curves of the model and the policy, the returns beside the data's own, and what rollouts were like.
    behaviour: the data's episode returns."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    lines = run.metrics()
    of = lambda stage: [x for x in lines if x["stage"] == stage]
    curve = lambda ax, stage, key, **kw: ax.plot(
        *zip(*[(x["step"], x[key]) for x in of(stage) if key in x], strict=True),
        **{"marker": "." if sum(key in x for x in of(stage)) < 10 else None, **kw},  # a line of one point is none
    )
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    ax = axes[0, 0]
    behaviour = np.asarray(list(behaviour), dtype=float)
    if of("evaluate"):
        curve(ax, "evaluate", "return", marker="o", ms=3, label="policy, true environment")
    if len(behaviour):
        ax.axhline(behaviour.mean(), color="gray", ls="--", label=f"data: mean {behaviour.mean():.0f}")
        ax.axhline(behaviour.max(), color="gray", ls=":", label=f"data: best {behaviour.max():.0f}")
    ax.set(title="return", xlabel="updates", ylabel="undiscounted return")
    if ax.get_lines():
        ax.legend(fontsize=8)
    if scale:
        low, high = scale
        right = ax.secondary_yaxis(
            "right", functions=(lambda r: 100 * (r - low) / (high - low), lambda s: low + s * (high - low) / 100)
        )
        right.set_ylabel(f"score (0: {low:.0f}, 100: {high:.0f})")
    for ax, stage, name, unit in (
        (axes[0, 1], "model", "dynamics model", "epochs"),
        (axes[1, 0], "policy", "policy", "updates"),
    ):
        apart = ("stage", "step", "return", "active")
        keys = [k for k in dict.fromkeys(k for x in of(stage) for k in x) if k not in apart]
        for key in keys[:6]:
            curve(ax, stage, key, label=key, lw=1)
        if of("reward") and stage == "model":
            ax.text(
                0.98,
                0.6,
                f"and a dynamics reward, in {of('reward')[-1]['step']} updates",
                transform=ax.transAxes,
                ha="right",
                fontsize=8,
            )
        if not keys:
            ax.set_axis_off()
            continue
        ax.set(title=name, xlabel=unit)
        ax.set_yscale("symlog", linthresh=1.0)
        ax.legend(fontsize=7, ncols=2)
    ax = axes[1, 1]
    if of("rollout"):
        curve(ax, "rollout", "length", label="mean length")
        ax.set(title="imagined rollouts", xlabel="updates", ylabel="steps")
        ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
        other = ax.twinx()
        other.set_ylabel("share of rollouts")
        curve(other, "rollout", "cut", color="C1", label="share cut as implausible")
        curve(other, "rollout", "ended", color="C2", label="share ended by the task")
        other.set_ylim(0, 1.05)
        handles = [*ax.get_lines(), *other.get_lines()]
        ax.legend(handles, [h.get_label() for h in handles], fontsize=7)
    else:
        ax.hist(behaviour, bins=30)
        ax.set(title="the data's returns")
    figure.suptitle(title)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """A matplotlib figure as a .png, whole or not at all; it is closed."""
    import matplotlib.pyplot as plt

    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)


def machine() -> dict[str, Any]:
    """The machine in words, for a result's record. bfloat16: whether the processor says that it multiplies such."""
    try:
        told = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
    except OSError:  # not Linux
        told = []
    of = {name.strip(): value.strip() for name, _, value in told}
    name = of.get("model name") or platform.processor() or "unknown"
    facts = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": f"{platform.machine()}, {name}"}
    return facts | {"bfloat16": any("bf16" in flag for flag in of.get("flags", of.get("Features", "")).split())}
