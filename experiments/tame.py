"""Experts on an unlabelled stream: five pole lengths, then returns to earlier ones; who is told nothing, who is told
all.

    python experiments/tame.py [--seeds 0 1 2]

Batches of 100 random transitions of one world after another (0.4, 0.7, 1.0, 1.3, 0.55 m; then 0.4, 1.0, 0.55, 0.7,
1.3), each seen once, 10 updates a batch. Figures: the batches until a change is noticed, false alarms, the share of
batches whose expert is the one that its task mostly has, the experts that were made, and the error on held-out
transitions of each task under the expert that `select` finds from one batch of it, beside the oracle that is told the
task and gives each its own network with the same updates.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from mbrl_envs import contexts
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl import device as devices
from mbrl.continual import errors
from mbrl.core import Segment, Spec
from mbrl.data import Dataset
from mbrl.dynamics.experts import Experts, ExpertsConfig, TameConfig, alignment, fit_stream, select
from mbrl.dynamics.single import SingleConfig
from mbrl.fit import Rows
from mbrl.run import machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "tame.json"
LENGTHS = ("0.4", "0.7", "1.0", "1.3", "0.55")
ORDER = (0, 1, 2, 3, 4, 0, 2, 4, 1, 3)
BATCH = 100


@dataclass(frozen=True)
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)
    stay: int = 120  # batches of one world
    most: int = 8
    tame: TameConfig = TameConfig(steps=10)  # noqa: RUF009
    threads: int = 2


def batches(data: Dataset, n: int, stream: torch.Generator) -> list[tuple[Segment, Tensor]]:
    rows, order = Rows(data, 1, data.obs), torch.randperm(len(data), generator=stream)[: n * BATCH].split(BATCH)
    return [(rows.segment(index), torch.zeros(BATCH, 1, 0)) for index in order]


def run(seed: int, args: Args) -> dict[str, Any]:
    tasks = [contexts.ContextTask(x, "mbrl_envs/CartPoleLength-v0", {"length": float(x)}, (float(x),)) for x in LENGTHS]
    visits = max(ORDER.count(i) for i in range(len(tasks)))
    train = contexts.collect(tasks, visits * args.stay * BATCH, seed=seed)
    test = contexts.collect(tasks, 1000, seed=10_000 + seed)
    stream = devices.generator(seed)
    parts = [batches(data, visits * args.stay, stream) for data in train]
    taken, feed, labels = [0] * len(tasks), [], []
    for task in ORDER:
        feed += parts[task][taken[task] : taken[task] + args.stay]
        taken[task] += args.stay
        labels += [task] * args.stay
    spec = Spec(train[0].spec.obs, train[0].spec.act)
    learner = ExpertsConfig(SingleConfig(hidden=(200, 200), weight_decay=(0.0,) * 3), args.most)
    model = learner.build(spec, devices.generator(seed))
    report = fit_stream(model, feed, args.tame, devices.generator(100 + seed))
    shifts = [args.stay * i for i in range(1, len(ORDER))]
    found = [min((s for s in report.switched if s >= x and s < x + args.stay), default=None) for x in shifts]
    delays = [None if f is None else f - x for f, x in zip(found, shifts, strict=True)]
    false = [s for s in report.switched if s not in found]
    ours = [judged(model, data) for data in test]
    oracle = []
    for task, data in enumerate(test):
        own = ExpertsConfig(learner.expert, 1).build(spec, devices.generator(seed))
        calm = TameConfig(steps=args.tame.steps, lr=args.tame.lr, sigmas=float("inf"))
        fit_stream(own, parts[task][: taken[task]], calm, devices.generator(200 + seed))
        oracle.append(errors(own, torch.zeros(1, 0), data)[0])
    return {
        "seed": seed, "delays": delays, "missed": sum(d is None for d in delays), "false_alarms": len(false),
        "right_expert": alignment(report.chosen, labels), "experts": int((model.seen > 0).sum()),
        "error": ours, "oracle": oracle, "ratio": sum(ours) / sum(oracle), "seconds": round(report.seconds, 1),
    }  # fmt: skip


def judged(model: Experts, data: Dataset) -> float:
    """The error of the expert that one batch chooses."""
    select(model, Rows(data, 1, data.obs).segment(torch.arange(BATCH)), torch.zeros(BATCH, 1, 0))
    return errors(model, torch.zeros(1, 0), data)[0]


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    began, rows = time.perf_counter(), []
    for seed in args.seeds:
        rows.append(run(seed, args))
        print(rows[-1], flush=True)
    keys = ("missed", "false_alarms", "right_expert", "experts", "ratio")
    middle: dict[str, float] = {k: median(r[k] for r in rows) for k in keys}
    noticed = [d for r in rows for d in r["delays"] if d is not None]
    middle |= {"delay": median(noticed), "delay_most": max(noticed)}
    facts = {"arguments": args.__dict__ | {"tame": args.tame.__dict__}, **machine(), "versions": versions()}
    write_json(RESULTS, {"median": middle, "rows": rows, **facts, "wall_s": round(time.perf_counter() - began, 1)})
    words = Table("seed", "delays", "missed", "false alarms", "right expert", "experts", "error / oracle's")
    for r in rows:
        words.add_row(
            str(r["seed"]), " ".join(map(str, r["delays"])), str(r["missed"]), str(r["false_alarms"]),
            f"{r['right_expert']:.3f}", str(r["experts"]), f"{r['ratio']:.3f}",
        )  # fmt: skip
    Console(width=110).print(words)
    print(json.dumps(middle))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
