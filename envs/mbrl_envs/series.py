"""Recorded series as Datasets: `.npy`, `.npz` and CSV files, with inputs; parts of one in time; two made comparable.

A series is rows of samples at equal distances dt. Row i is followed by row i + 1 of its episode, and the last row of
each episode by nothing (`paired` False). Rewards are 0 and nothing is terminal. Observations keep their units; inputs
become actions, scaled into [-1, 1] by their own range over the file, which `act_low` and `act_high` keep. `sha256` is
that of the numbers, so that other columns of the same file are other data; `meta` holds that of the file's bytes.
"""

import csv
import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbrl.data import Dataset, joined
from mbrl_envs.scores import DataError, close_matches

Column = int | str
OBS, ACT = ("obs", "x"), ("act", "u", "inputs")  # what a .npz may call them
DELIMITERS = ("\t", ";", ",", None)  # None: any white space
TIME = ("time", "timestamp", "t")  # what a CSV may call the column that tells dt, in any case of letters
EVEN = 0.01  # of dt: how far a step of time may be from it
SAME_DT = 1e-3  # relative: two files' dt that are so close are one


def read_series(
    path: str | os.PathLike,
    columns: Sequence[Column] | Column | None = None,
    inputs: Sequence[Column] | Column | None = None,
    *,
    episode: Column | None = None,
    dt: float | None = None,
) -> Dataset:
    """A Dataset from

    - `.npy`: [T], [T, N] or [E, T, N] (E episodes);
    - `.npz`: such an array named obs or x, and where it has them act (or u, or inputs) alike, and dt;
    - `.csv`, `.tsv`, `.txt`, `.dat`: a row a sample, with or without a header; separated by tab, semicolon, comma or
      white space; lines that begin with # are comments, but for a header there. A first row of numbers is data. Of a
      header's columns one named time, timestamp or t tells dt and is not observed (`meta` holds its name as time),
      where it is evenly spaced and neither asked for nor all there is. A first column without a name that counts the
      rows, as pandas writes it, is not observed either unless it is asked for; a warning says so.

    columns: which are observed, by number or, in a file with a header, by name; by default all but the inputs, the
    episode's and the time. inputs: which drive the system. episode: of a CSV, the column whose changes begin a new
    episode. dt: the time between samples, by default the file's, else 1. Raises DataError for whatever is wrong;
    nothing is ever unpickled."""
    file = Path(path).expanduser()
    label = str(file)
    if not file.is_file():
        raise DataError(f"{label}: {'is a folder' if file.is_dir() else 'no such file'}; expected .npy, .npz or CSV")
    raw = file.read_bytes()
    if not raw:
        raise DataError(f"{label}: the file is empty; expected a series")
    suffix = file.suffix.lower()
    if suffix in (".npy", ".npz"):
        if episode is not None:
            raise DataError(f"{label}: episode={episode!r} is for CSV; in an array episodes are the first of 3 axes")
        read = _npy(label, file, columns, inputs) if suffix == ".npy" else _npz(label, file, columns, inputs)
    elif suffix in (".csv", ".tsv", ".txt", ".dat"):
        try:
            read = _csv(label, raw, columns, inputs, episode, dt)
        except csv.Error as error:
            raise DataError(f"{label}: cannot be read as CSV ({error}); save it anew, a row a line") from error
    else:
        raise DataError(f"{label}: unknown suffix {file.suffix!r}; expected .npy, .npz, .csv, .tsv, .txt or .dat")
    meta = {"kind": "series", "file": file.name, "file_sha256": hashlib.sha256(raw).hexdigest()}
    if dt is None and "dt" not in read:
        meta["dt"] = "assumed"
    return from_arrays(
        read["obs"],
        read.get("act"),
        lengths=read.get("lengths"),
        dt=read.get("dt", 1.0) if dt is None else dt,
        name=file.stem,
        meta=read["meta"] | meta,
        label=label,
    )


def from_arrays(
    obs: Any,
    act: Any = None,
    *,
    lengths: Sequence[int] | None = None,
    dt: float = 1.0,
    bounds: tuple[float, float] | None = None,
    name: str = "series",
    meta: Mapping[str, Any] | None = None,
    label: str = "series",
) -> Dataset:
    """A float32 Dataset of obs [T], [T, N] or [E, T, N] and inputs act [T], [T, A] or [E, T, A] in their own units.

    lengths: the samples of each episode, where the rows of several are one after the other. bounds: (low, high) of
    every input; by default each input's least and greatest value (one that never changes becomes 0). label: what errors
    call the source. Raises DataError."""
    obs, length = _numbers(label, "obs", obs)
    act, driven = (np.zeros((len(obs), 0)), length) if act is None else _numbers(label, "act", act)
    if (len(act), driven) != (len(obs), length):
        raise DataError(
            f"{label}: {len(act)} inputs in episodes of {driven} and {len(obs)} samples in episodes of {length}; "
            "expected an input for each sample"
        )
    lengths = [length] * (len(obs) // length) if lengths is None else list(lengths)
    if sum(lengths) != len(obs):
        raise DataError(f"{label}: lengths add to {sum(lengths)} and there are {len(obs)} samples")
    if min(lengths) < 2:
        raise DataError(f"{label}: an episode has {min(lengths)} samples, expected at least 2")
    if not (math.isfinite(dt) and dt > 0):
        raise DataError(f"{label}: dt is {dt}, expected a time between samples, above 0")
    if bounds is None:
        low, high = act.min(0), act.max(0)
        still = (low == high).astype(float)
        low, high = low - still, high + still
    else:
        low, high = (np.full(act.shape[1], side, dtype=np.float64) for side in bounds)
        if ((act < low) | (act > high)).any():
            raise DataError(f"{label}: inputs span {act.min()} to {act.max()}, beyond their bounds {list(bounds)}")
    rows = torch.from_numpy(obs.astype(np.float32))
    starts = torch.tensor([0, *np.cumsum(lengths)])
    last = starts[1:] - 1
    paired = torch.ones(len(rows), dtype=torch.bool)
    paired[last] = False
    after = rows.roll(-1, 0)
    after[last] = rows[last]
    scaled = torch.from_numpy((2 * (act - low) / (high - low) - 1).clip(-1, 1).astype(np.float32))
    return _hashed(
        Dataset(
            obs=rows,
            act=scaled,
            reward=torch.zeros(len(rows)),
            next_obs=after,
            terminal=torch.zeros_like(paired),
            paired=paired,
            starts=starts,
            act_low=torch.from_numpy(low.astype(np.float32)),
            act_high=torch.from_numpy(high.astype(np.float32)),
            dt=float(dt),
            name=name,
            meta=dict(meta or {}),
        )
    )


# ---------------------------------------------------------------- parts, pairs, units


def cut(data: Dataset, start: int, stop: int | None = None) -> Dataset:
    """Rows start .. stop - 1 (as a slice: negative counts from the end). What followed row stop - 1 belongs to another
    part, so that it is no longer paired."""
    start, stop, _ = slice(start, stop).indices(len(data))
    if stop - start < 2:
        raise ValueError(f"cut: rows {start} to {stop} of {len(data)}, expected at least 2")
    inside = data.starts[(data.starts > start) & (data.starts < stop)]
    of = None if data.system is None else data.system[(data.starts[:-1] < stop) & (data.starts[1:] > start)]
    rows = {k: x[start:stop].clone() for k, x in data.rows.items()}
    if not (data.starts == stop).any():
        rows["paired"][-1] = False
        rows["next_obs"][-1] = data.obs[stop - 1]
    return _hashed(
        replace(
            data,
            **rows,
            starts=torch.cat([inside.new_tensor([start]), inside, inside.new_tensor([stop])]) - start,
            system=of,
            name=f"{data.name}[{start}:{stop}]",
            meta=dict(data.meta, rows=[start, stop]),
        )
    )


def split(data: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """(train, test): the first `fraction` of the rows, and the rest. (`Dataset.split` draws rows at random.)"""
    if not 0 < fraction < 1:
        raise ValueError(f"split: fraction is {fraction}, expected above 0 and below 1")
    at = round(fraction * len(data))
    return cut(data, 0, at), cut(data, at)


def pair(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    """The two, their actions scaled by one range, which spans both: two files give each its own. Raises ValueError
    where they cannot be of one system: other widths, the same columns in another order, or another dt. One that
    differs by no more than what times are rounded to becomes train's."""
    _same_columns(test, train)
    if not math.isclose(test.dt, train.dt, rel_tol=SAME_DT):
        raise ValueError(f"{test.name} has dt {test.dt:g}, expected {train.dt:g} as {train.name} has; resample it")
    if test.dt != train.dt:
        test = _hashed(replace(test, dt=train.dt))
    return tuple(_one_range([train, test]))  # type: ignore[return-value]


def alike(parts: Sequence[Dataset]) -> list[Dataset]:
    """Series of several systems, their actions scaled by one range, which spans all; where their dt differ, each says
    its own step by step (`dts`). Raises ValueError where they observe other columns than the first, or where the dt of
    one differs that its file does not tell."""
    for x in parts[1:]:
        _same_columns(x, parts[0])
    if len({x.dt for x in parts}) > 1:
        for x in parts:
            if x.meta.get("dt") == "assumed":
                other = next(y for y in parts if y.dt != x.dt)
                raise ValueError(
                    f"{x.name}: its file does not tell the time between samples, for which 1 would be taken, and "
                    f"{other.name} has {other.dt:g}; put dt into the file (a .npz's dt, a CSV's column time), or pass "
                    "dt (--dt) for all"
                )
        parts = [_hashed(replace(x, dts=x.obs.new_full((len(x),), x.dt))) for x in parts]
    return _one_range(parts)


def mixed(parts: Sequence[Dataset], name: str, meta: Mapping[str, Any]) -> Dataset:
    """Datasets as one of several systems, part i of system i."""
    return _hashed(replace(joined(parts, mixed=True), name=name, meta=meta))


def _same_columns(data: Dataset, like: Dataset) -> None:
    for what, key, got, want in (
        ("observed columns", "columns", data.obs.shape[1], like.obs.shape[1]),
        ("inputs", "inputs", data.act.shape[1], like.act.shape[1]),
    ):
        mine, others = ([str(x) for x in d.meta.get(key) or []] for d in (data, like))
        if got != want or (mine != others and sorted(mine) == sorted(others)):
            listed = lambda names: f" ({', '.join(names)})" if names else ""
            have = f"{data.name} has {got} {what}{listed(mine)}, expected {want}{listed(others)} as {like.name} has"
            raise ValueError(f"{have}; choose the same of both")


def _one_range(parts: Sequence[Dataset]) -> list[Dataset]:
    low = torch.stack([x.act_low for x in parts]).amin(0)
    high = torch.stack([x.act_high for x in parts]).amax(0)
    return [_rescaled(x, low, high) for x in parts]


def standardise(data: Dataset, like: Dataset | None = None) -> Dataset:
    """Observations less the mean and over the standard deviation of each dimension of `like` (by default of data
    itself), which `meta` keeps as mean and std. Raises ValueError for a dimension that never changes."""
    source = (data if like is None else like).obs.double()
    mean, std = source.mean(0), source.std(0, correction=0)
    if not (std > 0).all():
        still = dimensions(data)[int((std <= 0).nonzero()[0])]
        raise ValueError(f"standardise: {still} never changes; leave that column out")
    scaled = {k: ((getattr(data, k).double() - mean) / std).to(data.obs) for k in ("obs", "next_obs")}
    return _hashed(replace(data, **scaled, meta=dict(data.meta, mean=mean.tolist(), std=std.tolist())))


def dimensions(data: Dataset) -> list[str]:
    """What the observed dimensions are called: a CSV's names of columns, or "dimension 0" and so on."""
    names = data.meta.get("columns") or [None] * data.obs.shape[1]
    return [x if isinstance(x, str) else f"dimension {i}" for i, x in enumerate(names)]


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' shapes and bytes."""
    out = hashlib.sha256()
    for x in tensors:
        out.update(str(tuple(x.shape)).encode())
        out.update(x.detach().cpu().contiguous().numpy().data)
    return out.hexdigest()


def _hashed(data: Dataset) -> Dataset:
    dt = torch.tensor(data.dt, dtype=torch.float64)
    return replace(data, sha256=digest(*data.rows.values(), data.starts, data.act_low, data.act_high, dt))


def _rescaled(data: Dataset, low: Tensor, high: Tensor) -> Dataset:
    if torch.equal(low, data.act_low) and torch.equal(high, data.act_high):
        return data
    raw = data.act_low + (data.act.double() + 1) / 2 * (data.act_high - data.act_low)
    act = (2 * (raw - low) / (high - low) - 1).clamp(-1, 1).to(data.act)
    return _hashed(replace(data, act=act, act_low=low, act_high=high))


# ---------------------------------------------------------------- arrays


def _numbers(label: str, key: str, value: Any) -> tuple[np.ndarray, int]:
    """([rows, width] float64, rows of an episode) of [T], [T, N] or [E, T, N], all of it finite as float32."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise DataError(f"{label}: {key} has dtype {array.dtype}, expected real numbers")
    if array.ndim not in (1, 2, 3) or array.size == 0:
        raise DataError(
            f"{label}: {key} has shape {list(array.shape)}, expected [T], [T, N] or [E, T, N], none of them 0"
        )
    array = array[:, None] if array.ndim == 1 else array
    array = array.astype(np.float64)
    with np.errstate(over="ignore"):
        good = np.isfinite(array.astype(np.float32))
    if not good.all():
        at = np.argwhere(~good)[0]
        raise DataError(
            f"{label}: {key} holds {array[tuple(at)]} at {at.tolist()}, expected finite float32 numbers; cut the "
            "series there or fill the gap"
        )
    return array.reshape(-1, array.shape[-1]), array.shape[-2]


def _load(label: str, file: Path) -> Any:
    """What numpy makes of the file: an array, or a mapping of arrays, whatever the suffix says."""
    try:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return {k: found[k] for k in found.files}
    except Exception as error:  # whatever damaged bytes raise
        pickled = "allow_pickle" in str(error)
        why = "it holds Python objects, which are never unpickled" if pickled else f"{type(error).__name__}: {error}"
        raise DataError(f"{label}: cannot be read as numpy's arrays ({why}); save plain arrays of numbers") from error


def _npy(label: str, file: Path, columns: Any, inputs: Any) -> dict[str, Any]:
    array = _load(label, file)
    if not isinstance(array, np.ndarray):
        raise DataError(f"{label}: holds the arrays {sorted(array)}, as an .npz does; name it .npz")
    return _columns(label, array, columns, inputs)


def _npz(label: str, file: Path, columns: Any, inputs: Any) -> dict[str, Any]:
    arrays = _load(label, file)
    if isinstance(arrays, np.ndarray):
        raise DataError(f"{label}: holds one array, as an .npy does; name it .npy")
    obs, act = ([k for k in names if k in arrays] for names in (OBS, ACT))
    if len(obs) != 1 or len(act) > 1:
        raise DataError(
            f"{label}: holds the arrays {sorted(arrays)}, expected one of {', '.join(OBS)} and at most one of "
            f"{', '.join(ACT)}; save it anew under those names"
        )
    if act and inputs is not None:
        raise DataError(f"{label}: the array {act[0]!r} holds the inputs; leave inputs={inputs!r} out")
    read = _columns(label, arrays[obs[0]], columns, inputs)
    if act:
        read["act"] = arrays[act[0]]
    if "dt" in arrays:
        if arrays["dt"].dtype.kind not in "fiu" or arrays["dt"].size != 1:
            raise DataError(f"{label}: dt is {arrays['dt']!r}, expected one number")
        read["dt"] = arrays["dt"].item()
    return read


def _columns(label: str, array: np.ndarray, columns: Any, inputs: Any) -> dict[str, Any]:
    if columns is None and inputs is None:
        return {"obs": array, "meta": {}}
    array = array[:, None] if array.ndim == 1 else array
    chosen, driving, _ = _choose(label, [], array.shape[-1], columns, inputs, None)
    read: dict[str, Any] = {"obs": array[..., chosen], "meta": {"columns": chosen, "inputs": driving}}
    return read | ({"act": array[..., driving]} if driving else {})


def _choose(
    label: str, names: list[str], width: int, columns: Any, inputs: Any, episode: Column | None
) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the observed, the driving and the episode's column."""

    def find(which: Any) -> list[int]:
        which = [] if which is None else [which] if isinstance(which, int | str) else list(which)
        out = []
        for column in which:
            if isinstance(column, str) and column in names:
                out.append(names.index(column))
            elif str(column).isdecimal() and int(column) < width:
                out.append(int(column))
            else:
                have = f"{', '.join(names)}" if names else f"numbers from 0 to {width - 1}"
                raise DataError(f"{label}: no column {column!r}; it has {have}{close_matches(str(column), names)}")
        return out

    driving, splitting = find(inputs), find(episode)
    chosen = [i for i in range(width) if i not in driving + splitting] if columns is None else find(columns)
    every = chosen + driving + splitting
    if twice := [i for i in every if every.count(i) > 1]:
        raise DataError(f"{label}: column {names[twice[0]] if names else twice[0]!r} is asked for twice; expected once")
    if not chosen:
        raise DataError(f"{label}: no column is left to observe; expected at least one beside the inputs")
    return chosen, driving, splitting


# ---------------------------------------------------------------- CSV


def _csv(label: str, raw: bytes, columns: Any, inputs: Any, episode: Column | None, dt: float | None) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{label}: not text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    every = [(i, line.strip(" ")) for i, line in enumerate(lines, 1) if line.strip()]
    data = [(i, line) for i, line in every if not line.startswith("#")]
    if not data:
        raise DataError(f"{label}: has no rows; expected a series")
    remarks = [line for i, line in every if line.startswith("#") and i < data[0][0]]
    numbers = [i for i, _ in data]
    delimiter = _delimiter([line for _, line in data[:20]])
    rows = [_cells(line, delimiter) for _, line in data]
    width = len(rows[0])
    for number, row in zip(numbers, rows, strict=True):
        if len(row) != width:
            raise DataError(f"{label}: line {number} has {len(row)} columns, expected {width} as in line {numbers[0]}")
    while width > 1 and not any(row[width - 1] for row in rows):
        width -= 1  # what a delimiter at the end of each line leaves
    names: list[str] = []
    if any(cell and not _is_number(cell) for cell in rows[0]):
        names, rows, numbers = rows[0][:width], rows[1:], numbers[1:]
    elif remarks and len(above := _cells(remarks[-1].lstrip("# "), delimiter)) == width:
        names = above
    if twice := [n for n in names if names.count(n) > 1]:
        raise DataError(f"{label}: two columns are called {twice[0]!r}; rename one")
    chosen, driving, splitting = _choose(label, names, width, columns, inputs, episode)
    clock = next((i for t in TIME for i, n in enumerate(names) if n.casefold() == t), None)
    if clock in driving + splitting or (clock in chosen and (columns is not None or len(chosen) == 1)):
        clock = None
    chosen = [i for i in chosen if i != clock]
    if columns is None and len(chosen) > 1 and chosen[0] == 0 and names and not names[0] and _counts(rows):
        warnings.warn(
            f"{label}: its first column has no name and counts the rows; it is left out (columns, --columns, asks for "
            "what is observed)",
            stacklevel=3,
        )
        chosen = chosen[1:]
    named = lambda which: [names[i] for i in which] if names else which
    table = np.array(
        [[_number(label, names, row, n, i) for i in chosen + driving] for n, row in zip(numbers, rows, strict=True)]
    )
    if len(table) < 2:
        raise DataError(f"{label}: has {len(table)} samples, expected at least 2")
    read: dict[str, Any] = {"obs": table[:, : len(chosen)]}
    read["meta"] = {"columns": named(chosen), "inputs": named(driving)}
    if driving:
        read["act"] = table[:, len(chosen) :]
    edges = [0, len(rows)]
    if splitting:
        ids = [row[splitting[0]] for row in rows]
        edges = [0, *(i for i in range(1, len(ids)) if ids[i] != ids[i - 1]), len(ids)]
        read["lengths"] = [b - a for a, b in pairwise(edges)]
    told = None
    if clock is not None and dt is None:
        told = _spacing(label, names, rows, numbers, clock, edges, strict=columns is None)
        read |= {} if told is None else {"dt": told}
    if clock is not None and (told is not None or columns is None):
        read["meta"]["time"] = names[clock]
    return read


def _spacing(
    label: str, names: list[str], rows: list[list[str]], lines: list[int], clock: int, edges: list[int], strict: bool
) -> float | None:
    """dt by the column of time. None where that is not evenly spaced within episodes; DataError where strict."""
    if not strict and not all(_is_number(row[clock]) for row in rows):
        return None
    time = np.array([_number(label, names, row, n, clock) for n, row in zip(lines, rows, strict=True)])
    steps = np.concatenate([np.diff(time[a:b]) for a, b in pairwise(edges)])
    dt = float(f"{np.mean(steps):.9g}") if len(steps) else math.nan
    if dt > 0 and (np.abs(steps - dt) <= EVEN * dt).all():
        return dt
    if not strict:
        return None
    raise DataError(
        f"{label}: the column {names[clock]!r} goes on by {steps.min():g} to {steps.max():g}, expected even steps of "
        "time; resample, or pass dt (--dt) as the time between samples, or columns (--columns) to say what is observed"
    )


def _cells(line: str, delimiter: str | None) -> list[str]:
    cells = line.split() if delimiter is None else next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    return [cell.strip().strip('"') for cell in cells]


def _width(line: str, delimiter: str | None) -> int:
    return len(_cells(line, delimiter))


def _delimiter(sample: Sequence[str]) -> str | None:
    """The first that cuts every line into as many columns, more than one; else the first that cuts the first line."""
    cuts = [d for d in DELIMITERS if _width(sample[0], d) > 1]
    return next((d for d in cuts if len({_width(line, d) for line in sample}) == 1), cuts[0] if cuts else None)


def _counts(rows: list[list[str]]) -> bool:
    """Whether the first column goes on by 1 from row to row."""
    first = [row[0] for row in rows]
    return all(x.isdecimal() for x in first) and all(int(b) - int(a) == 1 for a, b in pairwise(first))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(label: str, names: list[str], row: list[str], line: int, column: int) -> float:
    cell = row[column]
    if _is_number(cell) and math.isfinite(float(cell)):
        return float(cell)
    called = f"column {names[column]!r}" if names else f"column {column}"
    what = f"holds {cell!r}" if cell else "is empty"
    raise DataError(
        f"{label}: {called} {what} in line {line}, expected a finite number with a decimal point; choose other "
        "columns, or fill it"
    )
