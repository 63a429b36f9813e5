"""Planning over offline policies (LOOP) in the model that each was learned in, without a filter: the gain of each run.

    python experiments/loop.py RUN [RUN ...] [--episodes 10] [--over.pessimism 0] [--over.limit 1] [--over.horizon 2]

RUN is a finished run folder of `mbrl offline` or of the offline suite. Policy and planner start from the same initial
states. A run is a row of experiments/results/loop.json; one of the same data, algorithm, seed, policy and settings
asked for (`over`) is replaced.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from mbrl import cli_evaluate
from mbrl import device as devices
from mbrl.offline import digest
from mbrl.planner import LOOP, Over, Worth
from mbrl.run import Run, machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "loop.json"


@dataclass(frozen=True)
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    episodes: int = 10
    seed: int = 1_000
    over: Over = field(default_factory=Over)


def main(args: Args) -> None:
    devices.keep_memory()
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for folder in args.runs:
        run, began = Run.open(folder), time.perf_counter()
        if "data" not in run.config:
            raise SystemExit(f"loop.py: {folder} has learned from no dataset; expected runs of `mbrl offline`")
        settings = cli_evaluate.Evaluate(folder, episodes=args.episodes, seed=args.seed, plan=True, over=args.over)
        found = cli_evaluate.returns_of(run, cli_evaluate.load_agent(run)[0], settings)
        result = run.result or {}
        key = {k: result.get(k) for k in ("dataset", "algorithm", "seeds", "sha256", "updates")}
        mean = lambda what, found=found: [sum(r) / len(r) for r in found[what]]
        gain = [a - b for a, b in zip(mean("planned"), mean("policy"), strict=True)]
        planner, over = args.over.applied(LOOP, Worth())[0], {"over": args.over.given} if args.over.given else {}
        new = key | {"gain": gain, "planner": digest(planner), **over, "returns": found, "scale": result.get("scale")}
        new |= {"wall_s": round(time.perf_counter() - began, 1), "versions": versions(), **machine()}
        rows = [r for r in rows if {k: r[k] for k in key} != key or r.get("over", {}) != args.over.given] + [new]
        write_json(RESULTS, {"rows": rows})
    table = Table("data", "algorithm", "seeds", "over", "policy", "planned", "gain")
    for r in rows:
        words = [", ".join(f"{sum(x) / len(x):.0f}" for x in r["returns"][what]) for what in ("policy", "planned")]
        gain = ", ".join(f"{x:+.0f}" for x in r["gain"])
        over = ", ".join(f"{k} {v}" for k, v in r.get("over", {}).items())
        table.add_row(r["dataset"], r["algorithm"], ", ".join(map(str, r["seeds"])), over, *words, gain)
    Console().print(table)
    print(json.dumps([{k: r[k] for k in ("dataset", "algorithm", "seeds", "over", "gain") if k in r} for r in rows]))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
