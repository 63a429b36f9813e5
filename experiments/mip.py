"""The magnitude-invariant parametrisation (arXiv 2304.07645) against the plain one: updates to equal loss.

    python experiments/mip.py [--seeds 0 1 2] [--updates 3000]

Three tasks (the first three pole lengths of cartpole-pole) are learned together by one hypernetwork, with Adam at each
of three rates; every 50 updates the error on held-out transitions is taken (squared, in standard deviations of the
targets). For each parametrisation the rate whose final error is least (median over seeds) counts. The figure is the
update at which each first reaches the plain one's least error of its last updates, and the ratio of the two.
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

from mbrl import device as devices
from mbrl.core import Segment, Spec
from mbrl.dynamics.hyper import HyperConfig
from mbrl.fit import Rows, segment_of
from mbrl.run import machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "mip.json"
EVERY = 50
RATES = (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)
    updates: int = 3000
    batch: int = 100  # transitions of each task
    tasks: int = 3
    threads: int = 2


def batch(sets: list[Rows], index: list[torch.Tensor]) -> Segment:
    rows = torch.cat([x.table[i] for x, i in zip(sets, index, strict=True)])
    return segment_of(rows[:, None], sets[0].spec, sets[0].dt, torch.arange(len(sets)))


def curve(mip: bool, rate: float, seed: int, args: Args, train: list[Rows], test: list[Rows]) -> list[float]:
    spec = Spec(train[0].spec.obs, train[0].spec.act, 10, args.tasks)
    model = HyperConfig(hidden=(200, 200), mip=mip).build(spec, devices.generator(seed))
    whole = lambda sets: batch(sets, [torch.arange(min(len(d.table) for d in sets)) for _ in sets])
    model.prepare(whole(train))
    held, none = whole(test), torch.zeros(0)
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    stream, errors = devices.generator(1000 + seed), []
    for update in range(args.updates):
        if update % EVERY == 0:
            errors.append(model.validate(held, none).item())
        rows = [torch.randint(len(d.table), (args.batch,), generator=stream) for d in train]
        optimizer.zero_grad(set_to_none=True)
        model.loss(batch(train, rows), none)[0].backward()
        optimizer.step()
    return [*errors, model.validate(held, none).item()]


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    devices.keep_memory()
    tasks, began = contexts.tasks("cartpole-pole")[: args.tasks], time.perf_counter()
    curves: dict[str, dict[str, list[list[float]]]] = {"plain": {}, "mip": {}}
    for seed in args.seeds:
        drawn = (contexts.collect(tasks, 5000, seed=seed), contexts.collect(tasks, 1000, seed=10_000 + seed))
        train, test = ([Rows(d, 1, d.obs) for d in sets] for sets in drawn)
        for name in curves:
            for rate in RATES:
                found = curve(name == "mip", rate, seed, args, train, test)
                curves[name].setdefault(f"{rate:g}", []).append(found)
                print(name, rate, seed, f"{found[-1]:.4g}  {time.perf_counter() - began:.0f} s", flush=True)
    best = {n: min(x, key=lambda r, x=x: median(c[-1] for c in x[r])) for n, x in curves.items()}
    reached: dict[str, list[int | None]] = {n: [] for n in curves}  # None: never
    for i in range(len(args.seeds)):
        goal = min(curves["plain"][best["plain"]][i][-10:])
        for name in curves:
            c = curves[name][best[name]][i]
            first = next((EVERY * k for k, x in enumerate(c) if x <= goal), None)
            reached[name].append(first)
    both = zip(reached["mip"], reached["plain"], strict=True)
    ratio = [m / p for m, p in both if m is not None and p]  # of the seeds where it gets there
    out: dict[str, Any] = {
        "rate": best, "final": {n: median(c[-1] for c in curves[n][best[n]]) for n in curves},
        "final_by_rate": {n: {r: median(c[-1] for c in x) for r, x in curves[n].items()} for n in curves},
        "updates_to_equal_loss": reached, "ratio": ratio, "median_ratio": median(ratio) if ratio else None,
    }  # fmt: skip
    kept = {n: [[round(v, 7) for v in c] for c in curves[n][best[n]]] for n in curves}
    wall = round(time.perf_counter() - began, 1)
    write_json(
        RESULTS, out | {"curves": kept, "arguments": args.__dict__, **machine(), "versions": versions(), "wall_s": wall}
    )
    words = Table("", "rate", "final error", *(f"updates, seed {s}" for s in args.seeds))
    for n in curves:
        words.add_row(n, best[n], f"{out['final'][n]:.3g}", *("never" if x is None else str(x) for x in reached[n]))
    Console().print(words)
    print(json.dumps(out))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
