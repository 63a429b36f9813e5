"""The command `mbrl suite`: datasets x algorithms x seeds."""

import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from mbrl import device as devices
from mbrl import suite
from mbrl.choices import KNOWN, PLAIN, Learner, console
from mbrl.cli_offline import Offline, algorithm_named, run_offline, sized
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.fit import FitConfig
from mbrl.run import Run, RunError, folder_name, from_plain, machine, save_figure, versions, write_json


@dataclass(frozen=True)
class Suite:
    """Datasets x algorithms x seeds. Finished runs are not run again, interrupted ones continue."""

    datasets: tuple[str, ...]
    algorithms: tuple[str, ...] = ("mopo", "morec-mopo")
    """Presets; NAME@X sets the penalty's coefficient to X."""
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs/suite")
    updates: int | None = None
    evaluate_every: int | None = None
    episodes: int = 10
    scale: tuple[str, ...] = ()
    """One reference id a dataset, where its own scale is not the one wanted."""
    workers: int = 1
    """Processes side by side, each with its share of the cores."""
    together: bool = False
    """Train all seeds of a cell side by side in one process (for an accelerator)."""
    device: str = "auto"
    report: bool = False
    """Only print the table of what is there."""
    fitting: FitConfig = field(default_factory=FitConfig)
    dynamics: Learner = field(default_factory=EnsembleConfig)  # pyright: ignore[reportInvalidTypeForm]
    """The model of the world; its settings follow its name."""


def run_suite(args: Suite) -> dict[str, Any]:
    """The command `mbrl suite`; returns the summary that it also writes to <out>/summary.json. Where algorithms can be
    compared, <out>/suite.png shows them."""
    if args.scale and len(args.scale) not in (1, len(args.datasets)):
        raise ValueError(f"--scale: got {len(args.scale)} for {len(args.datasets)} datasets, expected one or one each")
    if empty := [f"--{name}" for name in ("datasets", "algorithms", "seeds") if not getattr(args, name)]:
        raise ValueError(f"{', '.join(empty)}: got none, expected at least one")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds: got {' '.join(map(str, args.seeds))}, expected no two alike")
    for name in args.algorithms:
        algorithm_named(name)
    stems = [_stem(source) for source in args.datasets]
    if twice := {s for s in stems if stems.count(s) > 1}:
        raise ValueError(
            f"--datasets: several are called {', '.join(sorted(twice))}, and a table has one column a name"
        )
    groups: list[list[tuple[Offline, Path]]] = []
    seed_groups = [args.seeds] if args.together else [(s,) for s in args.seeds]
    for seeds in seed_groups:  # whole seeds first: an interrupted suite still compares like with like
        for i, source in enumerate(args.datasets):
            scale = args.scale[i % len(args.scale)] if args.scale else None
            stem = _stem(source)
            cells = []
            for name in args.algorithms:
                folder = args.out / stem / name / "-".join(map(str, seeds))
                cell = Offline(
                    dataset=source,
                    out=folder,
                    seeds=seeds,
                    updates=args.updates,
                    evaluate_every=args.evaluate_every,
                    episodes=args.episodes,
                    scale=scale,
                    models=args.out / "models",
                    device=args.device,
                    threads=max(1, (os.cpu_count() or 1) // args.workers) if args.workers > 1 else 0,
                    quiet=args.workers > 1,
                    fitting=args.fitting,
                    algorithm=algorithm_named(name),
                    dynamics=args.dynamics,
                )
                cells.append((cell, folder))
            groups.append(cells)
    failures: dict[Path, str] = {}
    if not args.report:
        if args.workers > 1:
            watch = {"initializer": _leave_with, "initargs": (os.getpid(),)}
            with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"), **watch) as pool:
                try:
                    for done in pool.map(_run_group, groups):
                        failures |= done
                except BrokenProcessPool:
                    raise RunError(
                        "a worker was killed, for its memory perhaps; the same command goes on, with fewer --workers"
                    ) from None
        else:
            for cells in groups:
                failures |= _run_group(cells)
    results, counted, twice = [], {}, []
    asked = {folder for cells in groups for _, folder in cells}
    for path in sorted(args.out.glob("*/*/*/result.json"), key=lambda p: (p.parent not in asked, p)):
        if path.parent in failures:  # it is of other settings or data
            continue
        found, folder = Run(path.parent).result or {}, path.parent
        results.append(found | {"algorithm": folder.parent.name, "dataset": folder.parent.parent.name})
        for seed, _ in zip(
            found.get("seeds", ()), found.get("score_last10") or found.get("last10") or (), strict=False
        ):
            if (first := counted.setdefault((folder.parent, seed), folder)) != folder:
                twice.append(
                    f"seed {seed} of {folder.parent}: counted once, as in {first.name}, not as in {folder.name}"
                )
    if args.report and not results:
        raise ValueError(
            f"--report: {args.out} holds no finished run, expected <dataset>/<algorithm>/<seeds>/result.json in it; "
            "name the --out of a suite, or leave --report out to run it"
        )
    summary = _summarise(results)
    for words in twice:
        console.print(words, **PLAIN)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "summary.json", summary)
    if summary.get("aggregate"):
        _draw(summary, args.out / "suite.png")
        console.print(f"picture: {args.out / 'suite.png'}", **PLAIN)
    for folder, words in failures.items():
        console.print(f"[red]failed[/red] {escape(f'{folder}: {words}')}")
    if failures:
        raise RunError(f"{len(failures)} of {sum(map(len, groups))} runs failed; the same command tries them again")
    return summary


def _stem(source: str) -> str:
    """What a dataset's column and folder are called: a file's name, or the whole of an id, whose end several share."""
    return folder_name(source if source.startswith("minari:") else Path(source).stem)


def _other(cell: Offline, folder: Path, sha256: Callable[[], str]) -> str | None:
    """What of a run that lies there already is not what is asked for now. Of a bare result the updates tell.
    sha256: of the data asked for."""
    run = Run(folder)
    begun = (folder / "config.json").exists()
    has = run.config["data"]["sha256"] if begun else (run.result or {}).get("sha256")
    if has and has != (want := sha256()):
        return f"other data ({has[:12]}, {cell.dataset} is {want[:12]})"
    if begun:
        kept = from_plain(run.config["arguments"], (*KNOWN, Offline))
        wanted = replace(cell, algorithm=sized(cell.algorithm, cell.updates, cell.evaluate_every))
        names = ("algorithm", "seeds", "episodes", "scale", "fitting", "dynamics")
        wrong = [n for n in names if getattr(kept, n) != getattr(wanted, n)]
        return f"other settings ({', '.join(wrong)})" if wrong else None
    updates = cell.updates or cell.algorithm.updates
    if run.result is not None and run.result["updates"] != updates:
        return f"{run.result['updates']} updates instead of {updates}"
    return None


def _leave_with(parent: int) -> None:
    """A worker whose suite was killed ends too: it would write to folders that the next suite continues."""
    devices.keep_memory()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_group(cells: Sequence[tuple[Offline, Path]]) -> dict[Path, str]:
    """Runs, one after another, on the same data and seeds: the first fits the models that the others read. Returns what
    went wrong in which folders."""
    from mbrl_envs import datasets

    failures: dict[Path, str] = {}
    sha256 = functools.cache(lambda: datasets.load(cells[0][0].dataset).sha256)
    for cell, folder in cells:
        began = time.perf_counter()
        try:
            if wrong := _other(cell, folder, sha256):
                failures[folder] = f"holds a run with {wrong}; name another --out, or remove that folder"
                continue
            if (folder / "result.json").exists():
                continue
            if (folder / "config.json").exists():
                source = cell.dataset if Path(cell.dataset or "").exists() else None
                run = run_offline(Offline(resume=folder, dataset=source, threads=cell.threads, quiet=cell.quiet))
            else:
                run = run_offline(cell)
            result = run.result or {}
            last = ", ".join(f"{x:.1f}" for x in result.get("last10") or ()) or "-"
            print(f"{folder}: last-10 {last}, {time.perf_counter() - began:.0f} s", flush=True)
        except (ValueError, RuntimeError, OSError) as error:  # one cell's fault is not the others'
            failures[folder] = str(error)
    return failures


def _summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = suite.table(results)
    returns = suite.table([r for r in results if not r.get("score_last10")], "last10")  # no scale is known: as they are
    summary: dict[str, Any] = {"results": list(results)}
    if scores:
        total = suite.aggregate(scores)
        whole = {a: [str(total[a][k]) if a in total else "-" for k in ("iqm", "mean")] for a in scores}
        _show(scores, "normalised score", whole)
        console.print(
            "cells: mean ± standard deviation over seeds (their number); intervals: 95 %, stratified bootstrap, "
            "50 000; -: not of as many seeds on every dataset"
        )
        numbers = lambda x: [x.point, x.low, x.high]
        plain = {a: {k: numbers(v) for k, v in row.items()} for a, row in total.items()}
        better = {a: {b: suite.improvement(scores[a], scores[b]) for b in total if b != a} for a in total}
        if len(total) > 1:
            best = max(total, key=lambda a: total[a]["iqm"].point)
            told = ", ".join(f"{b} {v.point:.2f} [{v.low:.2f}, {v.high:.2f}]" for b, v in better[best].items())
            console.print(f"how probably a run of {best} scores more than one of {told}", **PLAIN)
        summary = {"scores": scores, "aggregate": plain} | summary | {"versions": versions(), **machine()}
        summary["improvement"] = {a: {b: numbers(v) for b, v in row.items()} for a, row in better.items()}
    if returns:
        _show(returns, "return", {})
        console.print(
            "no reference scores are known of these datasets: mean ± standard deviation over seeds of returns"
        )
        summary["returns"] = returns
    if not (scores or returns):
        console.print("no finished run with an evaluation yet")
    return summary


def _draw(summary: dict[str, Any], path: Path) -> None:
    """Performance profiles, and interquartile means with their intervals, of the algorithms that can be compared."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores, total = summary["scores"], summary["aggregate"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    every = [x for a in total for row in scores[a].values() for x in row]
    low, high = min(0.0, *every), max(every)
    levels = [low + (high - low) * i / 200 for i in range(201)]
    ranked = sorted(total, key=lambda a: total[a]["iqm"][0])
    for i, a in enumerate(ranked):
        point, *ends = total[a]["iqm"]
        color = f"C{i % 10}"
        left.plot(levels, suite.profile(scores[a], levels), color=color, label=a)
        right.plot(ends, [i, i], color=color, lw=6, alpha=0.4)
        right.plot([point], [i], "o", color=color)
    left.set(
        title="performance profiles", xlabel="normalised score", ylabel="share of runs above it", ylim=(-0.02, 1.02)
    )
    left.legend(fontsize=8)
    right.set(
        title="interquartile mean, 95 %", xlabel="normalised score", yticks=range(len(ranked)), yticklabels=ranked
    )
    save_figure(figure, path)


def _show(table: dict[str, dict[str, list[float]]], what: str, whole: dict[str, list[str]]) -> None:
    """A row an algorithm, a column a dataset; whole: of all datasets together, by algorithm."""
    datasets = sorted({d for row in table.values() for d in row})
    words = Table(
        "algorithm", *datasets, *(["IQM", "mean"] if whole else []), title=f"{what}, mean over the last ten evaluations"
    )
    for algorithm, row in table.items():
        cells = []
        for d in datasets:
            x = torch.tensor(row.get(d, []))
            cells.append("-" if not len(x) else f"{x.mean():.1f} ± {x.std(correction=0):.1f} ({len(x)})")
        words.add_row(algorithm, *cells, *whole.get(algorithm, []))
    console.print(words)
