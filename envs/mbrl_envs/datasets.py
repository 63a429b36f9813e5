"""Datasets from files and packages: D4RL HDF5, Minari, NeoRL, episodes in memory -> `mbrl.data.Dataset`.

How ends of flat files are read. `terminals` are terminations where the task can end by itself (hopper falls). In a
task that no state ends (door, halfcheetah, kitchen: `scores.ENDLESS`) a terminal cannot be one: it marks where the
recording of an episode stops, and `terminal` is False everywhere. Demonstrations of such a task may run past the
environment's time limit, which the file still marks in `timeouts` (D4RL's door-human-v0); so where its terminals mark
ends, a time-out at which the observation goes on without a jump is no end. Everywhere else every terminal and every
time-out ends an episode, and so does a row whose `next_observations` is not the following observation. A file with
neither time-outs nor `next_observations` is also cut at the task's time limit, as D4RL's own reader does.

How rows are paired. `next_observations` where the file has them, else the next observation of the same episode; the
last step of an episode then has no successor (`paired` False, `next_obs` repeats `obs`), unless the file gives one for
each episode in `final_observations` [episodes, width], as compact files of `mbrl collect` do. A successor that is, at
an episode's end, exactly the next episode's first observation was written by shifting the array and is dropped.
"""

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import re
import sys
import tempfile
import urllib.request
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import torch
from gymnasium import spaces

from mbrl.data import Dataset
from mbrl_envs.scores import (
    WIDTHS,
    DataError,
    Known,
    altered,
    close_matches,
    d4rl_table,
    evaluation_env,
    identify,
    minari_scores,
    minari_spec,
    named,
    normalized_score,
    parted,
    reference_scores,
    score_scale,
)

__all__ = [
    "DataError",
    "embedded",
    "evaluation_env",
    "load",
    "normalized_score",
    "reference_scores",
    "score_scale",
]

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where the server says

EMBEDDED = Path(__file__).with_name("data")
BLOCK = 1 << 16  # rows looked at together, so that checks need little memory
TOLERANCE = 1e-6  # of an action beyond its bound, in units of [-1, 1]: rounding, not an excess
LEGEND = {"obs": "observations", "act": "actions", "reward": "rewards", "terminal": "terminals"}
LEGEND |= {"next_obs": "next_observations", "timeout": "timeouts"}
NEORL = {"obs": "obs", "act": "action", "reward": "reward", "terminal": "done", "next_obs": "next_obs"}
NEORL |= {"timeout": "truncated", "index": "index"}
REQUIRED = ("obs", "act", "reward", "terminal")
EPISODE = ("observations", "actions", "rewards", "terminations", "truncations")
STATED = ("env_id", "action_low", "action_high", "dt")  # beside the columns: attributes of HDF5, keys elsewhere


@dataclass
class Source:
    """Where columns come from and what is known beside them."""

    label: str  # what errors call it
    kind: str  # "d4rl", "neorl", "minari", "embedded" or "episodes"
    name: str
    sha256: str = ""
    env: str = ""
    known: Known | None = None
    low: np.ndarray | None = None  # [A] action bounds, where stated
    high: np.ndarray | None = None
    dt: float | None = None
    scores: tuple[float, float] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Columns:
    """Checked arrays of one source, as it gives them; `_finish` turns them into a Dataset, in place where it can."""

    obs: np.ndarray  # [N, O] float32
    act: np.ndarray  # [N, A] float32
    reward: np.ndarray  # [N] float32
    terminal: np.ndarray  # [N] bool
    timeout: np.ndarray | None = None  # [N] bool
    next_obs: np.ndarray | None = None  # [N, O] float32
    ends: np.ndarray | None = None  # [E] one past the last row of episodes, where the source has an index of them
    final: np.ndarray | None = None  # [E, O] float32: what follows the last row of each episode


def load(
    source: Any,
    *,
    strict: bool = False,
    device: Any = "cpu",
    progress: Progress | None = None,
    env: str | gymnasium.Env | None = None,
) -> Dataset:
    """A dataset from

    - the path of a D4RL-format HDF5 file, a NeoRL `.npz`, or a Minari dataset's folder;
    - a D4RL id (`hopper-medium-v2`): `<id>.hdf5` or the URL's base name in D4RL_DATASET_DIR, else ~/.d4rl/datasets,
      else downloaded there (progress is called with the bytes so far and in all);
    - `minari:<id>`, here or downloaded through the package; `embedded:<name>`, one that ships with this package;
    - an object with gymnasium-style episodes: an iterable of things with `observations` (T + 1), `actions`, `rewards`,
      `terminations`, `truncations` as attributes or keys; its `action_space`, `observation_space` and `env_spec` are
      used where it has them. Or a mapping with D4RL's columns;
    - and env, for what is in memory: the environment that it was recorded in, or its id, where it does not say itself.

    A file with D4RL's columns or a mapping of them may state `env_id`, `action_low`, `action_high` and `dt`: attributes
    of an HDF5's root, keys of the others.

    An environment whose spec has other arguments than its id (a Pendulum of other gravity) is `env` with these, as
    `Pendulum-v1{"g": 1.6}`; where JSON does not hold them, `env` is "", with a warning.

    Actions become [-1, 1] by the bounds that the source states, else its environment's, else they are taken to be
    there. Finite actions beyond the bounds are clipped, as the simulator does, with a warning and a count in
    `meta["clipped"]` (components); strict makes that an error. Raises DataError for whatever else is wrong."""
    if isinstance(source, Dataset):
        return source.to(device)
    if isinstance(source, str) and source.startswith("minari:"):
        data = _minari(_find_minari(source.removeprefix("minari:")), source, strict)
    elif isinstance(source, str | os.PathLike):
        if env is not None:
            raise DataError(f"{source}: a file says itself where it was recorded (env_id); leave env out")
        data = _path(source, strict, progress)
    elif hasattr(source, "storage") and hasattr(source, "episode_indices"):
        data = _minari(source, f"minari:{source.id}", strict)
    elif isinstance(source, Mapping) and "terminals" in source:
        data = _mapping(source, strict, env)
    else:
        data = _objects(source, strict, env)
    return data.to(device)


def embedded() -> list[str]:
    """Names of the datasets that ship with this package, as `load` takes them."""
    return [f"embedded:{p.stem}" for p in sorted(EMBEDDED.glob("*.hdf5"))]


# ---------------------------------------------------------------- files


def _path(source: str | os.PathLike, strict: bool, progress: Progress | None) -> Dataset:
    text = os.fspath(source)
    if not text.strip():
        raise DataError(
            f"got {text!r} as a source of data, expected a path, an id of D4RL, minari:<id> or "
            f"{' or '.join(embedded())}; name one of these"
        )
    path = Path(text).expanduser()
    if text.startswith("embedded:"):
        path = EMBEDDED / f"{text.removeprefix('embedded:')}.hdf5"
        if text not in embedded():
            raise DataError(f"{text!r} does not ship with this package; it has {', '.join(embedded()) or 'none'}")
        return _hdf5(path, Source(text, "embedded", text), strict)
    if path.is_dir():
        if not (path / "data").is_dir():
            raise DataError(f"{path} is a folder without Minari's data/ in it; expected a file or a Minari dataset")
        return _minari(_open_minari(path / "data"), str(path), strict)
    if not path.exists():
        known = identify(text)
        if known is not None and known.kind == "D4RL":
            path = _d4rl_file(known, progress)
            return _hdf5(path, Source(str(path), "d4rl", known.id, known=known), strict)
        if isinstance(source, os.PathLike) or path.suffix in (".hdf5", ".h5", ".npz") or "/" in text:
            raise DataError(
                f"{path}: no such file; expected a D4RL .hdf5, a NeoRL .npz, an id of D4RL, minari:<id> or "
                f"{' or '.join(embedded())}"
            )
        if known is not None and known.kind.startswith("NeoRL"):
            raise DataError(f"{text}: NeoRL's sets are read from files; pass the path of its .npz")
        if known is not None and known.kind not in ("D4RL", "NeoRL", "NeoRL-2"):
            raise DataError(
                f"{text!r} is an environment, not a dataset of it; make one with `mbrl collect --env {text}`"
            )
        names = [*d4rl_table(), *embedded()]
        raise DataError(f"{text!r} is neither a file nor an id of D4RL{close_matches(text, names)}")
    label, known = str(path), identify(path.stem)
    with open(path, "rb") as file:
        magic = file.read(4)
    if not magic:
        raise DataError(f"{label}: the file is empty, expected D4RL's HDF5 or NeoRL's .npz; download or write it again")
    if path.suffix.lower() in (".csv", ".npy"):
        raise DataError(
            f"{label}: got a {path.suffix} file, which is a series, expected D4RL's HDF5 or NeoRL's .npz; `mbrl "
            "reconstruct --data` takes series, or store its observations, actions and rewards as an .npz"
        )
    if path.suffix == ".npz" and not magic.startswith(b"PK"):
        raise DataError(f"{label}: not NumPy's .npz, which is a zip archive; download or write it again")
    if magic.startswith(b"PK"):
        return _npz(path, Source(label, "neorl", path.stem, known=known), strict)
    name = known.id if known is not None else path.stem
    return _hdf5(path, Source(label, "d4rl", name, known=known), strict)


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _reading(label: str, what: str, hint: str) -> Iterator[None]:
    """Whatever a reader raises on damaged bytes, as one DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{label}: cannot be read as {what} ({type(error).__name__}: {error}); {hint}") from error


def _hdf5(path: Path, source: Source, strict: bool) -> Dataset:
    with _reading(source.label, "HDF5", "is it complete? Download or write it again"):
        source.sha256 = _sha256(path)
        with h5py.File(path, "r") as file:
            _attributes(source, dict(file.attrs))
            if "episode_0" in file and "observations" not in file:
                raise DataError(
                    f"{source.label}: key 'observations' is missing; this is Minari's file: load it as minari:<id>, "
                    "or by the path of the dataset's folder"
                )
            columns = _columns(source, {k: file[k] for k in LEGEND.values() if k in file}, LEGEND, file)
            if "final_observations" in file and columns.next_obs is None:
                columns.final = _floats(source.label, "final_observations", file["final_observations"])
    return _finish(source, columns, strict)


def _attributes(source: Source, attrs: Mapping[str, Any]) -> None:
    """What an HDF5's root says of itself: env_id, action_low, action_high, dt; the rest is kept as provenance."""
    plain: dict[str, Any] = {}
    for key, value in attrs.items():
        value = value.decode(errors="replace") if isinstance(value, bytes) else value
        plain[key] = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    env = plain.get("env_id")
    if isinstance(env, str) and env:
        stated = identify(env)
        if stated is not None and ("/" in env or env not in gymnasium.registry):
            env = stated.env or ""  # of a dataset's id, too
        source.env = env
        if source.known is None or source.known.env != env:
            source.known = stated  # the file knows better than its name
    for side in ("low", "high"):
        if f"action_{side}" in plain:
            setattr(source, side, _numbers(source.label, f"attribute action_{side}", plain[f"action_{side}"]).ravel())
    if "dt" in plain:
        source.dt = float(_numbers(source.label, "attribute dt", plain["dt"]).ravel()[0])
        if not 0 < source.dt < np.inf:
            raise DataError(
                f"{source.label}: attribute dt is {source.dt}, expected finite seconds a step, above 0; correct it"
            )
    if plain:
        source.meta["attributes"] = {k: v for k, v in plain.items() if isinstance(v, str | int | float | list)}


def _numbers(label: str, key: str, value: Any) -> np.ndarray:
    try:
        value = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{label}: {key} is {value!r}, expected numbers; correct it") from None
    if value.size == 0 or np.isnan(value).any():
        raise DataError(f"{label}: {key} is {value.tolist()!r}, expected numbers; correct it")
    return value


def _npz(path: Path, source: Source, strict: bool) -> Dataset:
    with _reading(source.label, "NumPy's .npz", "is it complete? Download or write it again"):
        source.sha256 = _sha256(path)
        with np.load(path, allow_pickle=False) as file:
            legend = LEGEND if "observations" in file.files else NEORL
            if legend is LEGEND:
                source.kind = "d4rl"
            arrays = {k: file[k] for k in legend.values() if k in file.files}
            _attributes(source, {k: file[k] for k in STATED if k in file.files})
            columns = _columns(source, arrays, legend, file.files)
    return _finish(source, columns, strict)


def _mapping(source: Mapping, strict: bool, env: Any) -> Dataset:
    found = Source("mapping", "d4rl", "mapping")
    with _reading(found.label, "D4RL's columns", "expected arrays"):
        _attributes(found, {k: source[k] for k in STATED if k in source})
        _recorded_in(found, env)
        # copies: what is rescaled in place must not be the caller's
        columns = _columns(found, {k: np.array(source[k]) for k in LEGEND.values() if k in source}, LEGEND, source)
    found.sha256 = _sha256_arrays(columns, found.low, found.high)
    return _finish(found, columns, strict)


def _recorded_in(source: Source, env: str | gymnasium.Env | None) -> None:
    """What the environment, or its id, tells of a source in memory, as far as that does not itself."""
    if isinstance(env, str):
        if not source.env:
            _attributes(source, {"env_id": env})
    elif env is not None:
        if not source.env and env.spec is not None:
            _world(source, env.spec.id, env.spec.kwargs)
        if source.low is None and source.high is None:
            source.low, source.high = _box(source.label, env.action_space, str(env))
        source.dt = source.dt or getattr(env.unwrapped, "dt", None)


def _box(label: str, space: Any, env: str = "") -> tuple[np.ndarray, np.ndarray]:
    """The bounds [A] of a space of actions; env: whose it is, where it is not the data's own."""
    if not isinstance(space, spaces.Box):
        raise DataError(
            f"{label}: the action space{f' of {env}' if env else ''} is {space}, expected a Box, since only continuous "
            f"actions are supported; {'correct env_id, or env' if env else 'choose a task that has one'}"
        )
    return space.low.ravel().astype(float), space.high.ravel().astype(float)


def _sha256_arrays(c: Columns, *stated: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for x in (c.obs, c.act, c.reward, c.terminal, c.timeout, c.next_obs, *stated):
        if x is not None:
            digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()


# ---------------------------------------------------------------- columns, checked


def _columns(source: Source, found: Mapping[str, Any], legend: Mapping[str, str], names: Iterable[str]) -> Columns:
    """found: key -> something with shape, dtype and [()]. legend: our name -> the source's key. names: of all that the
    source has."""
    label, index = source.label, None
    for ours in REQUIRED:
        key = legend[ours]
        if key not in found:
            have = ", ".join(sorted(map(str, names))) or "nothing"
            want = ", ".join(legend[k] for k in REQUIRED)
            raise DataError(f"{label}: key {key!r} is missing; expected {want}, got {have}; write that array and retry")
    if "index" in legend and legend["index"] in found:
        index = found[legend["index"]]
        found = {k: v for k, v in found.items() if k != legend["index"]}
    for key, column in found.items():
        if not hasattr(column, "shape") or column.shape is None:
            raise DataError(f"{label}: key {key!r} is a {type(column).__name__}, expected an array; write one there")
    act = found[legend["act"]]
    if act.dtype.kind in "iub":
        raise DataError(
            f"{label}: key {legend['act']!r} has {act.dtype} (discrete) actions; expected floating point ones, since "
            "only continuous actions are supported; choose a task with a Box action space"
        )
    lengths = {}
    for ours, key in legend.items():
        if key not in found:
            continue
        shape = tuple(found[key].shape)
        wide = ours in ("obs", "act", "next_obs")
        flat = wide or len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
        if not flat or (wide and (len(shape) != 2 or shape[1] == 0)):
            want = "[steps, width] with a width above 0" if wide else "[steps]"
            raise DataError(f"{label}: key {key!r} has shape {list(shape)}, expected {want}; reshape it")
        lengths[key] = shape[0]
    steps = lengths[legend["obs"]]
    for key, length in lengths.items():
        if length != steps:
            raise DataError(
                f"{label}: key {key!r} has {length} steps and {legend['obs']!r} {steps}; expected the same number; "
                "was the file cut while it was written?"
            )
    if steps == 0:
        raise DataError(
            f"{label}: key {legend['obs']!r} has 0 steps, expected at least 1; record episodes into it, it is empty"
        )
    if legend["next_obs"] in found and found[legend["next_obs"]].shape != found[legend["obs"]].shape:
        got, want = found[legend["next_obs"]].shape, found[legend["obs"]].shape
        raise DataError(
            f"{label}: key {legend['next_obs']!r} has shape {list(got)}, expected {list(want)}, as the observations; "
            "repair the key, or leave it out"
        )

    read = lambda ours: _floats(label, legend[ours], found[legend[ours]])
    flag = lambda ours: _flags(label, legend[ours], found[legend[ours]])
    optional = lambda ours, how: how(ours) if legend[ours] in found else None
    columns = Columns(read("obs"), read("act"), read("reward").reshape(steps), flag("terminal"))
    columns.timeout, columns.next_obs = optional("timeout", flag), optional("next_obs", read)
    if index is not None:
        columns.ends = _index(label, legend["index"], np.asarray(index), steps)
    return columns


def _floats(label: str, key: str, column: Any) -> np.ndarray:
    """As float32, straight into the array that stays."""
    if column.dtype.kind not in "fiub":
        raise DataError(
            f"{label}: key {key!r} has dtype {column.dtype}, expected floating point numbers; write it anew as float32"
        )
    if isinstance(column, h5py.Dataset) and column.dtype.kind != "b":
        out = np.empty(column.shape, np.float32)
        column.read_direct(out)
    else:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is reported as such
            out = np.ascontiguousarray(column[()], dtype=np.float32)
    for i in range(0, len(out), BLOCK):
        good = np.isfinite(out[i : i + BLOCK])
        if not good.all():
            at = np.argwhere(~good)[0]
            at[0] += i
            raise DataError(
                f"{label}: key {key!r} holds {out[tuple(at)]} at {at.tolist()}, expected finite float32 numbers; drop "
                "that episode or repair the value"
            )
    return out


def _flags(label: str, key: str, column: Any) -> np.ndarray:
    if column.dtype.kind not in "biuf":
        raise DataError(
            f"{label}: key {key!r} has dtype {column.dtype}, expected true or false a step; write it anew as bool"
        )
    values = np.asarray(column[()]).reshape(-1)
    if values.dtype.kind != "b" and not ((values == 0) | (values == 1)).all():
        bad = values[~((values == 0) | (values == 1))][0]
        raise DataError(
            f"{label}: key {key!r} holds {bad}, expected only 0 and 1 (false and true); write it anew as bool"
        )
    return values.astype(bool)


def _index(label: str, key: str, index: np.ndarray, steps: int) -> np.ndarray:
    """NeoRL's index holds where episodes end (one past the last row); a list of first rows says the same."""
    values = index.reshape(-1)
    if values.dtype.kind not in "iuf" or (values != np.floor(values)).any():
        raise DataError(
            f"{label}: key {key!r} is not a list of row numbers (dtype {values.dtype}), expected where episodes end; "
            "write it anew as integers"
        )
    if values.size and (values.min() < 0 or values.max() > steps):
        raise DataError(
            f"{label}: key {key!r} holds {values.max()}, expected row numbers between 0 and {steps}; was the file cut "
            "while it was written?"
        )
    ends = np.unique(np.append(values.astype(np.int64), steps))
    return ends[ends > 0]


# ---------------------------------------------------------------- from columns to a Dataset


def _finish(source: Source, c: Columns, strict: bool) -> Dataset:
    steps = len(c.obs)
    known = source.known
    family = WIDTHS.get((c.obs.shape[1], c.act.shape[1]))
    if known is None and source.kind == "d4rl" and not source.env and family:
        # of the two pens the one that a fall ends, as terminals tell
        known = source.known = identify("D4RL/pen-expert-v1" if family == "pen" else f"AdroitHand{family.title()}-v1")
        source.meta["recognised"] = f"{family}, by its widths"
    if not source.env and known is not None:
        source.env = known.env or ""
    broken = None if c.next_obs is None else _broken(c.obs, c.next_obs)
    last, terminal, ignored = _ends(c, broken, known, source.kind)
    paired = np.ones(steps, bool)
    if c.next_obs is None:
        paired = ~last
        after = np.empty_like(c.obs)
        after[:-1] = c.obs[1:]
        after[last] = c.obs[last]
        if c.final is not None:
            want = (int(last.sum()), c.obs.shape[1])
            if c.final.shape != want:
                raise DataError(
                    f"{source.label}: key 'final_observations' has shape {list(c.final.shape)}, expected {list(want)}, "
                    "a row for each episode that terminals and timeouts mark; write it again"
                )
            after[last] = c.final
            paired[:] = True
        c.next_obs = after
    elif source.kind not in ("minari", "episodes"):
        assert broken is not None
        shifted = last.copy()
        shifted[:-1] &= ~broken
        shifted[-1] = bool(shifted[:-1].any()) and bool((~broken)[last[:-1]].all())
        paired[shifted] = False
        c.next_obs[shifted] = c.obs[shifted]
    starts = np.concatenate([[0], np.flatnonzero(last) + 1])
    marked = c.terminal if c.timeout is None else c.terminal | c.timeout
    if c.ends is not None:
        marked = marked.copy()
        marked[c.ends - 1] = True
    unmarked = int((last & ~marked)[:-1].sum())
    if unmarked > 0.1 * steps:
        warnings.warn(
            f"{source.label}: at {unmarked} of {steps} steps next_observations is not the following observation, and "
            "no flag marks an end; each of them ends an episode. Are the rows in order of time?",
            stacklevel=4,
        )
    clipped, rows, low, high, dt = _rescale(source, c, strict)
    scores = source.scores or (known.scores if known is not None else None)
    meta = dict(source.meta, kind=source.kind, steps=steps, episodes=len(starts) - 1)
    meta |= {"terminations": int(terminal.sum()), "timeouts": int((last & ~terminal).sum())}
    meta |= {"unpaired": int((~paired).sum()), "unmarked_ends": unmarked, "ignored_timeouts": ignored}
    meta |= {"clipped": clipped, "clipped_rows": rows, "file": Path(source.label).name}
    if scores is not None:
        meta |= {"min_score": scores[0], "max_score": scores[1]}
    return Dataset(
        obs=torch.from_numpy(c.obs),
        act=torch.from_numpy(c.act),
        reward=torch.from_numpy(c.reward),
        next_obs=torch.from_numpy(c.next_obs),
        terminal=torch.from_numpy(terminal),
        paired=torch.from_numpy(paired),
        starts=torch.from_numpy(starts.astype(np.int64)),
        act_low=torch.from_numpy(low.astype(np.float32)),
        act_high=torch.from_numpy(high.astype(np.float32)),
        dt=dt,
        name=source.name,
        sha256=source.sha256,
        env=source.env,
        meta=meta,
    )


def _broken(obs: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[N - 1]: the successor that the source states is not the following row's observation."""
    out = np.empty(len(obs) - 1, bool)
    for i in range(0, len(out), BLOCK):
        a, b = after[i : min(i + BLOCK, len(out))], obs[i + 1 : min(i + BLOCK, len(out)) + 1]
        out[i : i + BLOCK] = (np.abs(a - b) > 1e-5 * (1 + np.abs(b))).any(1)
    return out


def _ends(c: Columns, broken: np.ndarray | None, known: Known | None, kind: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(last rows of episodes [N], terminations [N], time-outs that end nothing), by the rules of this module's text."""
    # episodes of gymnasium's kind keep the two apart themselves and are believed
    endless = known is not None and known.endless and kind not in ("minari", "episodes")
    terminal = np.zeros_like(c.terminal) if endless else c.terminal.copy()
    last = c.terminal.copy()
    ignored = 0
    if c.timeout is not None:
        timeout = c.timeout
        if endless and kind == "d4rl" and c.terminal.any():
            outlived = timeout & ~c.terminal
            outlived[-1] = False
            at = np.flatnonzero(outlived)
            outlived[at] = ~_jumps(c.obs, at, ~(c.terminal | timeout)[:-1])
            timeout, ignored = timeout & ~outlived, int(outlived.sum())
        last |= timeout
    if c.ends is not None:
        last[c.ends - 1] = True
    if broken is not None:
        last[:-1] |= broken
    last[-1] = True
    limit = None if known is None else known.limit
    if limit and c.timeout is None:
        if broken is None and c.ends is None:
            edges = np.concatenate([[0], np.flatnonzero(last) + 1])
            for start, end in itertools.pairwise(edges):
                last[np.arange(start + limit, end, limit) - 1] = True
        if kind == "neorl":
            # `done` does not tell the two kinds of end apart: one at the limit is the limit's
            edges = np.concatenate([[0], np.flatnonzero(last) + 1])
            terminal[edges[1:][np.diff(edges) == limit] - 1] = False
    return last, terminal, ignored


def _jumps(obs: np.ndarray, at: np.ndarray, within: np.ndarray) -> np.ndarray:
    """[len(at)]: more than a quarter of the coordinates move further from row `at` to the next than 99 % of the steps
    inside episodes (`within` [N - 1]) do: after a reset most do, inside an episode hardly any."""
    inside = np.flatnonzero(within)
    inside = inside[:: max(1, len(inside) // 20000)]
    if len(inside) == 0:
        return np.ones(len(at), bool)
    usual = np.quantile(np.abs(obs[inside + 1] - obs[inside]), 0.99, axis=0)
    return (np.abs(obs[at + 1] - obs[at]) > usual).mean(1) > 0.25


def _rescale(source: Source, c: Columns, strict: bool) -> tuple[int, int, np.ndarray, np.ndarray, float]:
    """Actions to [-1, 1] in place. (components clipped, rows they are in, low [A], high [A], dt)."""
    width = c.act.shape[1]
    label, known, low, high = source.label, source.known, source.low, source.high
    dt = source.dt or (known.dt if known is not None else None)
    if (low is None) != (high is None):
        raise DataError(
            f"{label}: only one of action_low and action_high is stated, expected both or neither; add the other"
        )
    if low is None and known is not None and known.bound is not None:
        low, high = np.full(width, -known.bound), np.full(width, known.bound)
    elif source.env and (low is None or dt is None) and (found := _environment(label, source.env)) is not None:
        low, high = (found[0], found[1]) if low is None else (low, high)
        dt = dt or found[2]
    if assumed := low is None:
        source.meta["bounds"] = "assumed"
    low = np.full(width, -1.0) if low is None else np.asarray(low, np.float64)
    high = np.full(width, 1.0) if high is None else np.asarray(high, np.float64)
    for side, bound in (("low", low), ("high", high)):
        if bound.shape != (width,):
            raise DataError(
                f"{label}: the action space{f' of {source.env}' if source.env else ''} has {bound.size} entries in its "
                f"{side} bound and the actions are {width} wide; expected the same; correct action_{side} or env_id"
            )
    if not (high > low).all():
        raise DataError(f"{label}: action bounds {low.tolist()}, {high.tolist()}; expected low < high")
    if (free := ~(np.isfinite(low) & np.isfinite(high))).any():
        if (furthest := np.abs(c.act[:, free]).max()) > 1:
            raise DataError(
                f"{label}: the action space has no finite bounds in the coordinates {np.flatnonzero(free).tolist()}, "
                f"where actions reach {furthest:.3g}; expected bounds to rescale by; state action_low and action_high"
            )
        low, high = np.where(free, -1.0, low), np.where(free, 1.0, high)
    if not ((low == -1).all() and (high == 1).all()):
        c.act -= ((low + high) / 2).astype(np.float32)
        c.act /= ((high - low) / 2).astype(np.float32)
    clipped = rows = 0
    for i in range(0, len(c.act), BLOCK):
        beyond = np.abs(c.act[i : i + BLOCK]) > 1 + TOLERANCE
        clipped += int(beyond.sum())
        rows += int(beyond.any(1).sum())
    if clipped:
        furthest = float(np.abs(c.act).max())
        unmade = f" and {source.env} cannot be made here" if source.env else ""
        what = (
            f"{label}: key 'actions': {clipped} components, in {rows} of {len(c.act)} steps, lie beyond the bounds "
            f"(furthest {furthest:.4g}, expected within [-1, 1]"
            + (
                f", since no others are stated{unmade}: state action_low and action_high)"
                if assumed
                else " after rescaling)"
            )
        )
        if strict:
            raise DataError(f"{what}; correct the actions or the stated bounds, or load without strict to clip them")
        warnings.warn(f"{what}; clipped as the simulator does", stacklevel=5)
    np.clip(c.act, -1, 1, out=c.act)
    return clipped, rows, low, high, float(dt or 1.0)


def _environment(label: str, env: str) -> tuple[np.ndarray, np.ndarray, float | None] | None:
    """Action bounds and time step of an environment that can be made here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            name, own = parted(env)
            made = gymnasium.make(name, **own)
    except Exception:  # not installed, or not registered: the file's own word is all there is
        return None
    try:
        return *_box(label, made.action_space, env), getattr(made.unwrapped, "dt", None)
    finally:
        made.close()


# ---------------------------------------------------------------- episodes


def _find_minari(name: str) -> Any:
    from minari.dataset.minari_dataset import parse_dataset_id  # late: slow to load, and only this needs it
    from minari.storage.datasets_root_dir import get_dataset_path

    if not re.search(r"-v\d+$", name):
        raise DataError(f"minari:{name}: no version in it; expected minari:<namespace>/<name>-v<number>")
    try:
        parse_dataset_id(name)
        place = get_dataset_path(name)
    except Exception as error:
        raise DataError(f"minari:{name}: {error}") from error
    if not (place / "data").exists():
        _download_minari(name, place)
    return _open_minari(place / "data")


def _open_minari(data: Path) -> Any:
    import minari

    with _reading(str(data), "a Minari dataset", "is it complete? Delete its folder and download it again"):
        return minari.MinariDataset(data)


def _download_minari(name: str, place: Path) -> None:
    import shutil

    import minari

    existed = place.exists()
    try:
        minari.download_dataset(name)
    except Exception as error:
        if not existed and place.exists():
            shutil.rmtree(place, ignore_errors=True)
        here: list[str] = []
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            here = [f"minari:{n}" for n in minari.list_local_datasets()]
        raise DataError(
            f"minari:{name} is not in {place} and could not be downloaded ({type(error).__name__}: {error}); place the "
            f"dataset's folder there, or correct the id{close_matches(f'minari:{name}', here)}"
        ) from error
    if not (place / "data").exists():
        raise DataError(f"minari:{name}: the download left nothing in {place}; place the dataset's folder there")


def _minari(dataset: Any, label: str, strict: bool) -> Dataset:
    with _reading(label, "a Minari dataset", "is it complete? Delete its folder and download it again"):
        metadata = dataset.storage.metadata
        source = Source(label, "minari", f"minari:{dataset.id}")
        _world(source, *minari_spec(metadata))
        source.scores = minari_scores(metadata)
        folder = Path(dataset.storage.data_path)
        source.sha256 = _sha256(*sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "metadata.json"))
        kept = [int(i) for i in dataset.episode_indices]
        if kept != list(range(dataset.storage.total_episodes)):  # else a part would be called as the whole
            source.sha256 = hashlib.sha256(json.dumps([source.sha256, kept]).encode()).hexdigest()
        raw = dataset.storage.read_raw_metadata(folder).get("observation_space")
        space = dataset.observation_space if raw is None else _declared(json.loads(raw))
        columns = _episodes(source, _recorded(label, dataset.iterate_episodes()), space, dataset.action_space)
    return _finish(source, columns, strict)


def _recorded(label: str, episodes: Iterable[Any]) -> Iterator[Any]:
    """Minari's episodes, which it reads one by one: what an episode's group lacks is one error."""
    rest = iter(episodes)
    for i in itertools.count():
        try:
            episode = next(rest)
        except StopIteration:
            return
        except KeyError as error:
            if key := re.search(rf"'({'|'.join(EPISODE)})'", str(error)):
                raise _lacks(f"{label}, episode {i}", key[1]) from error
            raise
        yield episode


def _lacks(at: str, key: str) -> DataError:
    return DataError(
        f"{at}: {key!r} is missing; expected T + 1 observations and T actions, rewards, terminations and truncations; "
        "record it too, or leave that episode out"
    )


def _declared(raw: Mapping[str, Any]) -> spaces.Space:
    """A space from Minari's JSON with its entries in the order written: Minari and gymnasium sort a plain dict's."""
    from minari.serialization import deserialize_space

    if raw["type"] == "Dict":
        return spaces.Dict(OrderedDict((k, _declared(v)) for k, v in raw["subspaces"].items()))
    if raw["type"] == "Tuple":
        return spaces.Tuple(tuple(_declared(v) for v in raw["subspaces"]))
    return deserialize_space(dict(raw))


def _objects(objects: Any, strict: bool, env: Any) -> Dataset:
    label = f"{type(objects).__name__} object"
    if _get(objects, "observations") is not None:
        objects = [objects]  # one episode
    iterate = getattr(objects, "iterate_episodes", None)
    if iterate is None and not isinstance(objects, Iterable):
        raise DataError(
            f"{label}: expected a path, an id, or episodes that have observations, actions, rewards, terminations "
            "and truncations"
        )
    spec = getattr(objects, "env_spec", None) or getattr(objects, "spec", None)
    name = getattr(objects, "name", None) or getattr(objects, "id", None)
    source = Source(label, "episodes", name if isinstance(name, str) else "episodes")
    _world(source, getattr(spec, "id", "") or "", getattr(spec, "kwargs", {}))
    with _reading(label, "episodes", "expected gymnasium-style arrays"):
        each = objects if iterate is None else iterate()
        space = getattr(objects, "observation_space", getattr(env, "observation_space", None))
        columns = _episodes(source, each, space, getattr(objects, "action_space", None))
        own = source.low is not None
        _recorded_in(source, env)
        source.sha256 = _sha256_arrays(columns, *(() if own else (source.low, source.high)))
    return _finish(source, columns, strict)


def _world(source: Source, env: str, kwargs: Mapping[str, Any]) -> None:
    """The environment of a spec, and what is known of it, which is nothing where it has arguments of its own: another
    world would evaluate, score and end what was recorded in it."""
    own = altered(env, kwargs)
    source.env = named(env, own)
    source.known = identify(source.env) if source.env else None
    if own and not source.env:
        warnings.warn(
            f"{source.label}: recorded in {env} with another {', '.join(own)} than that id has, which no name holds: "
            "policies are evaluated, and tasks known, only in an environment that is passed (--env)",
            stacklevel=4,
        )


def _get(episode: Any, key: str) -> Any:
    return episode.get(key) if isinstance(episode, Mapping) else getattr(episode, key, None)


def _episodes(
    source: Source, episodes: Iterable[Any], obs_space: spaces.Space | None, act_space: spaces.Space | None
) -> Columns:
    """Columns of episodes of T + 1 observations: every step has its successor."""
    label = source.label
    if act_space is not None:
        source.low, source.high = _box(label, act_space)
    found: list[tuple[np.ndarray, ...]] = []
    width = None
    for i, episode in enumerate(episodes):
        at = f"{label}, episode {i}"
        for key in EPISODE:
            if _get(episode, key) is None:
                raise _lacks(at, key)
        reward = _floats(at, "rewards", np.asarray(_get(episode, "rewards")).reshape(-1))
        steps = len(reward)
        raw = np.asarray(_get(episode, "actions"))
        if raw.dtype.kind in "iub" and steps:
            raise DataError(
                f"{at}: 'actions' are discrete ({raw.dtype}), expected floating point ones, since only continuous "
                "actions are supported; choose a task with a Box action space"
            )
        if raw.dtype.kind not in "fiub":
            raise DataError(
                f"{at}: 'actions' is a {type(_get(episode, 'actions')).__name__} of {raw.dtype}, expected an array "
                f"[{steps}, width] of floating point numbers; write them side by side"
            )
        if raw.ndim < 2 and steps:
            raise DataError(f"{at}: 'actions' has shape {list(raw.shape)}, expected [{steps}, width]; reshape it")
        obs = _flatten(at, _get(episode, "observations"), obs_space)
        flags = [_flags(at, k, np.asarray(_get(episode, k)).reshape(-1)) for k in ("terminations", "truncations")]
        lengths = {"observations": len(obs) - 1, "actions": len(raw), "terminations": len(flags[0])}
        for key, length in (lengths | {"truncations": len(flags[1])}).items():
            if length != steps:
                one = int(key == "observations")
                raise DataError(f"{at}: {length + one} {key} and {steps} rewards; expected {steps + one} {key}")
        if steps == 0:
            continue
        act = _floats(at, "actions", raw.reshape(steps, -1))
        if width not in (None, (obs.shape[1], act.shape[1])):
            got = (obs.shape[1], act.shape[1])
            raise DataError(
                f"{at}: observations and actions are {got} wide, expected {width} as in episode 0; leave it out"
            )
        width = (obs.shape[1], act.shape[1])
        found.append((_floats(at, "observations", obs), act, reward, *flags))
    if not found or width is None:
        raise DataError(f"{label}: 0 steps, expected at least 1; the dataset is empty, record episodes into it")
    ends = np.cumsum([len(e[2]) for e in found])
    obs, after = (np.empty((ends[-1], width[0]), np.float32) for _ in range(2))
    for e, end in zip(found, ends, strict=True):
        rows = slice(end - len(e[2]), end)
        obs[rows], after[rows] = e[0][:-1], e[0][1:]
    act, reward, terminal = (np.concatenate([e[k] for e in found]) for k in (1, 2, 3))
    return Columns(obs, act, reward, terminal, None, after, ends)


def _flatten(at: str, value: Any, space: spaces.Space | None) -> np.ndarray:
    """[T + 1, O]: the leaves side by side, in the order in which the space (else the mapping) declares them, as
    `gymnasium.spaces.flatten` does."""
    if isinstance(space, spaces.Dict) or (space is None and isinstance(value, Mapping)):
        if not isinstance(value, Mapping):
            raise DataError(
                f"{at}: 'observations' is a {type(value).__name__}, expected the keys of {space}; record those"
            )
        parts: Any = space.spaces if space is not None else dict.fromkeys(value)
        if missing := [k for k in parts if k not in value]:
            raise DataError(f"{at}: 'observations' lacks {missing[0]!r}, expected {list(parts)}; record it too")
        return np.concatenate([_flatten(at, value[k], s) for k, s in parts.items()], 1)
    if isinstance(space, spaces.Tuple) or (space is None and isinstance(value, tuple)):
        parts = space.spaces if space is not None else [None] * len(value)
        if len(parts) != len(value):
            raise DataError(f"{at}: 'observations' has {len(value)} parts, expected {len(parts)}; record all of them")
        return np.concatenate([_flatten(at, v, s) for v, s in zip(value, parts, strict=True)], 1)
    if space is not None and not isinstance(
        space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    ):
        raise DataError(f"{at}: observations in the space {space} cannot be flattened to numbers; record numbers")
    value = np.asarray(value)
    if value.ndim == 0 or value.dtype.kind not in "fiub":
        raise DataError(f"{at}: 'observations' has shape {list(value.shape)} of {value.dtype}, expected [T + 1, ...]")
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return np.stack([np.asarray(spaces.flatten(space, x)) for x in value]).astype(np.float32)
    with np.errstate(over="ignore"):
        return value.reshape(len(value), int(np.prod(value.shape[1:]))).astype(np.float32)


# ---------------------------------------------------------------- D4RL's files


def _d4rl_file(known: Known, progress: Progress | None) -> Path:
    folders = [Path.home() / ".d4rl" / "datasets"]
    if stated := os.environ.get("D4RL_DATASET_DIR"):
        folders.insert(0, Path(stated).expanduser())
    folder, base = folders[0], known.url.rpartition("/")[2]
    for place in folders:
        for name in (f"{known.id}.hdf5", base):
            if (place / name).exists():
                return place / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _download(known, folder / base, progress)
    except (OSError, http.client.HTTPException) as error:  # no network, time-outs, what the file system says
        raise DataError(
            f"{known.id}: {known.id}.hdf5 is not in {folder} and could not be downloaded ({error}); fetch {base} from "
            f"{known.url} where there is a network and place it in {folder}, as {base} or {known.id}.hdf5"
        ) from error


def _download(known: Known, target: Path, progress: Progress | None) -> Path:
    """To a temporary file beside the target; checked, then renamed. Nothing is left behind on failure."""
    handle, name = tempfile.mkstemp(prefix=target.stem + ".", suffix=".tmp", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, _bar(known.id, progress) as report:
            done, total = 0, None
            for block, total in _fetch(known.url):
                file.write(block)
                done += len(block)
                report(done, total)
        if total is not None and done != total:
            raise DataError(f"{known.url}: {done} bytes came, expected {total}; the connection broke: try again")
        try:
            with h5py.File(temporary, "r") as opened:
                missing = [LEGEND[k] for k in REQUIRED if LEGEND[k] not in opened]
        except OSError as error:
            raise DataError(f"{known.url}: what came is no HDF5 file ({error}); is a proxy in between?") from error
        if missing:
            raise DataError(f"{known.url}: key {missing[0]!r} is missing from what came; expected D4RL's columns")
        temporary.chmod(0o644)
        os.replace(temporary, target)
        return target
    finally:
        temporary.unlink(missing_ok=True)


def _fetch(url: str) -> Iterator[tuple[bytes, int | None]]:
    """Blocks of the file at an http(s) URL, with its length where the server says."""
    with urllib.request.urlopen(url, timeout=30) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        while block := response.read(1 << 18):
            yield block, total


@contextlib.contextmanager
def _bar(name: str, progress: Progress | None) -> Iterator[Progress]:
    if progress is not None or not sys.stderr.isatty():
        yield progress or (lambda done, total: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
