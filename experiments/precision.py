"""An ensemble fitted in bfloat16 against the same in float32: held-out error, and time.

    python experiments/precision.py [--data embedded:hopper] [--seeds 0 1 2] [--epochs 40]

Both begin at the same parameters, hold out the same rows and take as many epochs at most; the best of each member's
counts. The error is what the fit judges its members by (mean squared error of the mean, in standard deviations), mean
over the elites. The result goes to experiments/results/precision.json.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from mbrl_envs import datasets
from rich.console import Console
from rich.table import Table

from mbrl import device as devices
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.fit import FitConfig, fit
from mbrl.run import machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "precision.json"
TYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Args:
    data: str = "embedded:hopper"
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 40
    threads: int = 1


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    data, rows = datasets.load(args.data), []
    for seed in args.seeds:
        for dtype in TYPES:
            generator, began = devices.generator(seed), time.perf_counter()
            model = EnsembleConfig().build(data.spec, generator)
            report = fit(model, data, FitConfig(dtype=dtype, max_epochs=args.epochs), generator)
            took = time.perf_counter() - began
            errors = sorted(report.best)[: EnsembleConfig().elites]
            row: dict[str, Any] = {
                "seed": seed,
                "dtype": dtype,
                "error": sum(errors) / len(errors),
                "members": report.best,
            }
            rows.append(row | {"epochs": report.epochs, "seconds": round(took, 1)})
            print(seed, dtype, f"error {row['error']:.4g}, {report.epochs} epochs, {took:.0f} s", flush=True)
    of = {(r["seed"], r["dtype"]): r for r in rows}
    ratios = [of[s, "bfloat16"]["error"] / of[s, "float32"]["error"] for s in args.seeds]
    pace = [r["seconds"] / r["epochs"] for r in rows]
    figures = {
        "error": {t: median(of[s, t]["error"] for s in args.seeds) for t in TYPES},
        "ratio": {"median": median(ratios), "each": ratios},
        "seconds_an_epoch": {t: median(p for p, r in zip(pace, rows, strict=True) if r["dtype"] == t) for t in TYPES},
    }
    table = Table("", *TYPES)
    table.add_row("held-out error", *(f"{figures['error'][t]:.4g}" for t in TYPES))
    table.add_row("seconds an epoch", *(f"{figures['seconds_an_epoch'][t]:.2f}" for t in TYPES))
    Console().print(table)
    config = {"data": args.data, "sha256": data.sha256, "seeds": list(args.seeds), "epochs": args.epochs}
    write_json(RESULTS, {"config": config, "figures": figures, "rows": rows, "versions": versions(), **machine()})
    print(json.dumps(figures))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
