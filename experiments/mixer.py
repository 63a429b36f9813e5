"""Families of systems: does a mixture sort them, and what does it gain over one model, a naive gate, and a model each?

    python experiments/mixer.py [--sets four ten lotka-volterra] [--learners mixer ...] [--seeds 0 1 2] [--gate]
        [--robust]

Each row is one fit: relative squared error |x' - x|^2 / |x|^2 of free runs over 32 test trajectories a system (mean
over systems, and their median), the same of new systems after adaptation from one trajectory by the context alone,
purity of the assignment, wall time. --gate: the mixture with the published gate, by least squares, instead of that of
the nearest centre, guarded as suits it ("least-squares"), and in the other's place, nothing else changed
("least-squares-free"). --robust: the four families with too few and too many experts, with 5 % noise, with training
points moved in time by up to 0.4 intervals, with one system that belongs to no family of theirs (a Lotka-Volterra), and
with the published choices but for the rates and the number of outer steps (a gate after each update, by one start of
K-means, empty clusters passed over; no warm steps; whole episodes, errors not relative);
Lotka-Volterra, one family that three experts share, with what might mend it. A finished row is in
experiments/results/mixer.json and is not run again.
"""

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from mbrl_envs.series import cut
from rich.console import Console
from rich.table import Table

from mbrl import cli_meta
from mbrl import device as devices
from mbrl.choices import MIXERS
from mbrl.cli_meta import Meta
from mbrl.data import Dataset
from mbrl.dynamics.mixer import FIT, MixerConfig, MixerFit, Ncf, fit_mixer
from mbrl.offline import digest
from mbrl.run import machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "mixer.json"
LEARNERS = ("mixer", "naive-gate", "meta-learner", "separate")
ONE_KIND = 3  # experts for a set of one family
MENDED: dict[str, dict[str, Any]] = {
    "soft-start": {"fit": replace(FIT, warm=150)},  # one expert for half of the fit, then one outer step to sort
    "two-experts": {"experts": 2},
    "shared-trunk": {"dynamics": MixerConfig(Ncf(shared=True))},
    "must-pay": {"fit": replace(FIT, guard=0.95)},  # experts that do not lower the loss stay unused
    "cold": {"fit": replace(FIT, warm=0)},
}
LEAST = replace(FIT, solve="least-squares", guard=1.1, until=1.0)  # the published gate in company that suits it
GATES = {"least-squares": LEAST, "least-squares-free": replace(FIT, solve="least-squares")}
STRANGER = "stranger"
ROBUST: dict[str, dict[str, Any]] = {
    "two-experts": {"experts": 2},
    "eight-experts": {"experts": 8},
    "noise": {"noise": 0.05},
    "irregular": {"irregular": 0.8},
    STRANGER: {"families": "harmonic-four,shear-four,double-well-four,duffing-four,lotka-volterra", "experts": 4},
    "published": {"fit": MixerFit(lr=FIT.lr, lr_context=FIT.lr_context, gate_every=1, relative=False)},
}


@dataclass(frozen=True)
class Args:
    sets: tuple[str, ...] = ("four", "ten", "lotka-volterra")
    learners: tuple[str, ...] = LEARNERS
    seeds: tuple[int, ...] = (0, 1, 2)
    outer: int = 300
    gate: bool = False
    robust: bool = False
    threads: int = 1


def kept(data: Dataset, systems: int) -> Dataset:
    """The first systems of the data, which are contiguous."""
    assert data.system is not None
    system = data.system[data.system < systems]
    return replace(cut(data, 0, int(data.starts[len(system)])), system=system, systems=systems)


def run(job: Meta, name: str) -> dict[str, Any]:
    seed = job.seed or 0
    data = cli_meta.load(job)
    if name == STRANGER:  # of its family, the first system alone
        count = 1 + sum("lotka" not in label for label in data.labels)
        train, test = (kept(x, count) for x in (data.train, data.test))
        data = replace(data, train=train, test=test, labels=data.labels[:count])
    job = replace(job, dynamics=cli_meta.sized(job, data))
    model = job.dynamics.build(data.train.spec, devices.generator(seed))
    began = time.perf_counter()

    def tell(outer: int, of: int | None, figures: dict[str, float]) -> None:
        if outer % 50 == 0:
            words = "  ".join(f"{k} {v:.3g}" for k, v in figures.items())
            print(f"  {outer} / {of}  {words}  {time.perf_counter() - began:.0f} s", flush=True)

    report = fit_mixer(model, data.train.to(torch.float32), job.fit, devices.generator(seed + 1), tell)
    model.requires_grad_(False)
    found = cli_meta.judged(job, data, model, report)
    mean = lambda x: float(np.mean(x))
    row = {k: found[k] for k in ("experts", "seed", "parameters", "assigned", "purity", "solved", "passed", "skipped")}
    row |= {"error": mean(found["errors"]), "error_median": statistics.median(found["errors"])}
    if "new_errors" in found:
        row |= {"adapted": mean(found["new_errors"]), "adapted_median": statistics.median(found["new_errors"])}
        row |= {"confidence": mean(found["confidence"])}
    row |= {"family": cli_meta.by_family(found["labels"], found["errors"]), "changes": len(report.assigned)}
    row |= {"loss": [float(f"{x:.4g}") for x in report.loss[9::10]], "fit_s": round(report.seconds, 1)}
    return row | {"threads": torch.get_num_threads(), **machine(), "versions": versions()}


def main(args: Args) -> None:
    devices.keep_memory()
    torch.set_num_threads(args.threads)
    base, jobs = Meta(fit=FIT), []
    for seed in args.seeds:
        for name in args.sets:
            whole = replace(base, families=name, seed=seed)
            many = replace(whole, experts=ONE_KIND if name == "lotka-volterra" else None)  # of a mixture
            made = {"mixer": many, "naive-gate": replace(many, fit=LEAST)}  # no gate is solved there, nor for these:
            made |= {k: replace(whole, fit=LEAST) for k in ("meta-learner", "separate")}
            jobs += [(name, k, replace(made[k], dynamics=MIXERS[k])) for k in args.learners]
            jobs += [(name, k, replace(many, fit=how)) for k, how in GATES.items() if args.gate]
        if args.robust:
            four = replace(base, families="four", seed=seed)
            one = replace(base, families="lotka-volterra", seed=seed, experts=ONE_KIND)
            jobs += [("four", k, replace(four, **change)) for k, change in ROBUST.items()]
            jobs += [("lotka-volterra", k, replace(one, **change)) for k, change in MENDED.items()]
    for name, learner, job in jobs:
        job = replace(job, fit=replace(job.fit, outer=args.outer))
        rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
        long = f"-{args.outer}" if args.outer != Args.outer else ""
        key, mark = f"{name}{long} {learner} {job.seed}", digest(replace(job, out=None))
        if key in rows and rows[key]["digest"] == mark:
            continue
        print(key, flush=True)
        row = run(job, learner) | {"digest": mark}
        rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
        rows[key] = row
        write_json(RESULTS, {"figures": figures(rows), "rows": rows})
    show(figures(json.loads(RESULTS.read_text())["rows"]))


def figures(rows: dict[str, Any]) -> dict[str, Any]:
    """Medians over the seeds, with the least and the largest."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, row in rows.items():
        groups.setdefault(key.rpartition(" ")[0], []).append(row)
    keys = ("error", "error_median", "adapted", "adapted_median", "purity", "fit_s")
    spread = lambda x: {"median": statistics.median(x), "low": min(x), "high": max(x)}
    return {
        g: {"seeds": len(x), "parameters": x[0]["parameters"]}
        | {k: spread(y) for k in keys if (y := [r[k] for r in x if r.get(k) is not None])}
        for g, x in groups.items()
    }


def show(found: dict[str, Any]) -> None:
    words = Table("", "seeds", "error", "median system", "adapted", "median system", "purity", "fit, s")
    for name, x in found.items():
        cells = [
            f"{x[k]['median']:.3g}" if k in x else "-" for k in ("error", "error_median", "adapted", "adapted_median")
        ]
        pure = f"{x['purity']['median']:.3g}" if "purity" in x else "-"
        words.add_row(name, str(x["seeds"]), *cells, pure, f"{x['fit_s']['median']:.0f}")
    Console(width=110).print(words)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
