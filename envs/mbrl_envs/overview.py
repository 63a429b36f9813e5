"""What a person wants to see of a dataset: a table, and a figure."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbrl.data import Dataset
from mbrl_envs.scores import DataError, normalized_score, score_scale


def info(data: Dataset) -> Any:
    """A rich renderable: where the data are from, their episodes and returns, and the range of every coordinate."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    meta, returns, lengths = data.meta, data.returns.cpu().double().numpy(), data.lengths.cpu().numpy()
    five = lambda x: " / ".join(f"{v:.4g}" for v in np.quantile(x, [0, 0.25, 0.5, 0.75, 1]))
    low, high = data.act_low.tolist(), data.act_high.tolist()
    terminations, act, rewards = int(data.terminal.sum()), data.act.cpu().numpy(), data.reward.cpu().numpy()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "dataset": data.name,
        "source": f"{meta.get('kind', '?')}, {meta.get('file', '')}".rstrip(", "),
        "sha256": data.sha256,
        "evaluates in": data.env or "(no known environment)",
        "steps": f"{len(data):,} of {data.dt:g} s" if data.dt != 1 else f"{len(data):,}",
        "episodes": f"{data.episodes:,}: {terminations:,} ended by the task, {data.episodes - terminations:,} cut",
        "observation, action": f"{data.spec.obs}, {data.spec.act}",
        "without successor": f"{int((~data.paired).sum()):,} steps",
        "return": f"{returns.mean():.4g} on average; min / quartiles / max {five(returns)}",
        "length": f"{lengths.mean():.4g} on average; min / quartiles / max {five(lengths)}",
        "reward": f"{float(data.reward.mean()):.4g} on average; min / quartiles / max {five(rewards)}",
        "actions at a bound": f"{100 * float((np.abs(act) >= 0.999).mean()):.1f} % of components",
        "clipped": f"{meta.get('clipped', 0):,} components in {meta.get('clipped_rows', 0):,} steps",
        "action bounds": f"[{min(low):g}, {max(high):g}]" if len({*low}) == len({*high}) == 1 else f"{low} to {high}",
    }
    if "min_score" in meta:
        scale = (meta["min_score"], meta["max_score"])
        score, spread = normalized_score(scale, returns.mean()), score_scale(scale) * returns.std()
        rows["score"] = f"{score:.1f} on average, sd {spread:.1f}, on the scale {scale[0]:.6g} to {scale[1]:.6g}"
    else:
        rows["score"] = "no scale is known for this source"
    for key, value in rows.items():
        table.add_row(key, Text(value))  # no markup: names come from outside
    ranges = Table(title="ranges", title_justify="left", box=None, pad_edge=False)
    for column in ("", "min", "mean", "sd", "max"):
        ranges.add_column(column, justify="right")
    shown = 24
    for name, x in (("obs", data.obs), ("act", data.act)):
        figures = _ranges(x)
        for i, row in enumerate(figures[:shown]):
            ranges.add_row(f"{name} {i}", *(f"{v:.4g}" for v in row))
        if len(figures) > shown:
            rest = figures[shown:]
            ends = (rest[:, 0].min(), rest[:, 1].mean(), rest[:, 2].max(), rest[:, 3].max())
            ranges.add_row(f"{name} {shown}-{len(figures) - 1}", *(f"{v:.4g}" for v in ends))
    return Group(table, "", ranges)


def _ranges(x: torch.Tensor) -> np.ndarray:
    """[D, 4]: min, mean, standard deviation, max of each coordinate."""
    mean = x.mean(0, dtype=torch.float64)
    sd = torch.stack([x[:, i].double().std(correction=0) for i in range(x.shape[1])])
    return torch.stack([x.amin(0).double(), mean, sd, x.amax(0).double()], 1).cpu().numpy()


def draw(data: Dataset, path: str | os.PathLike) -> Path:
    """A figure of returns, lengths and ranges, written to `path` (its ending chooses the format). Raises DataError for
    a path that is no file's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        what = f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise DataError(f"the figure cannot be written: {what}; pass the name of a file in one (--figure)")
    returns, lengths = data.returns.double().cpu().numpy(), data.lengths.cpu().numpy()  # bins need the digits
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    figure.suptitle(f"{data.name}: {len(data):,} steps, {data.episodes:,} episodes")
    terminal = data.terminal[data.starts[1:] - 1].cpu().numpy()
    labels = [f"ended by the task ({terminal.sum()})", f"cut ({(~terminal).sum()})"]
    histogram = lambda ax, x: ax.hist(
        [x[terminal], x[~terminal]], bins=min(40, max(10, len(x) // 5)), stacked=True, label=labels,
        color=["tab:orange", "tab:blue"],
    )  # fmt: skip
    histogram(axes[0, 0], returns)
    axes[0, 0].axvline(returns.mean(), color="black", linestyle="--", linewidth=1, label=f"mean {returns.mean():.4g}")
    axes[0, 0].set(xlabel="return", ylabel="episodes")
    axes[0, 0].legend()
    if "min_score" in data.meta:
        low, high = data.meta["min_score"], data.meta["max_score"]
        score = axes[0, 0].secondary_xaxis(
            "top", functions=(lambda r: 100 * (r - low) / (high - low), lambda s: low + s * (high - low) / 100)
        )
        score.set_xlabel("normalised score")
    histogram(axes[0, 1], lengths)
    axes[0, 1].set(xlabel="length (steps)", ylabel="episodes")
    for ax, name, x in ((axes[1, 0], "observation", data.obs), (axes[1, 1], "action", data.act)):
        x = x[:: max(1, len(x) // 50_000)].cpu().numpy()
        at = np.arange(x.shape[1])
        q = np.quantile(x, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], axis=0)
        ax.vlines(at, q[0], q[6], color="tab:blue", linewidth=1, alpha=0.5, label="min to max")
        ax.vlines(at, q[1], q[5], color="tab:blue", linewidth=3, label="5 % to 95 %")
        ax.vlines(at, q[2], q[4], color="tab:orange", linewidth=6, label="quartiles")
        ax.plot(at, q[3], "k.", markersize=4, label="median")
        ax.set(xlabel=f"{name} coordinate", ylabel="value" if name == "observation" else "value in [-1, 1]")
        if len(at) <= 20:
            ax.set_xticks(at)
        if np.abs(q).max() > 20 * max(1e-12, float(np.median(np.abs(q[[1, 5]])))):
            ax.set_yscale("symlog", linthresh=1.0)
    axes[1, 0].legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    handle, name = tempfile.mkstemp(prefix=path.stem + ".", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        figure.savefig(name, format=path.suffix.lstrip(".") or "png", dpi=120)
        Path(name).chmod(0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path
