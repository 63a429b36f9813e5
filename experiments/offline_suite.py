"""The offline suite: hopper and halfcheetah, medium and mixed, every algorithm on the same fitted model and reward.

    python experiments/offline_suite.py --data DIR [--seeds 0 1 2] [--updates 100000] [--workers 2]

DIR holds {hopper,halfcheetah}-{medium,mixed}-v5.hdf5. BC and TD3+BC, MOPO with each of four coefficients (the best one
for all sets is reported), MOREC-MOPO with one setting. Scores are on D4RL's constants. Finished runs are kept under
--out and never run again; the summary goes to experiments/results/offline_suite.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from mbrl import suite
from mbrl.cli import Suite, run_suite
from mbrl.run import machine, versions, write_json

SETS = {
    "hopper-medium-v5": ("hopper-medium-v2", 1714),
    "hopper-mixed-v5": ("hopper-medium-v2", 652),
    "halfcheetah-medium-v5": ("halfcheetah-medium-v2", 3926),
    "halfcheetah-mixed-v5": ("halfcheetah-medium-v2", 2386),
}
COEFFICIENTS = (0.5, 1.0, 2.5, 5.0)
MOPO = tuple(f"mopo@{c:g}" for c in COEFFICIENTS)
OURS = "morec-mopo"
EXPECTED = 4.6  # points by which MOREC-MOPO is expected to lead MOPO on the average


@dataclass(frozen=True)
class Args:
    data: Path
    out: Path = Path("runs/offline_suite")
    seeds: tuple[int, ...] = (0, 1, 2)
    updates: int = 100_000
    evaluate_every: int = 5_000
    workers: int = 2
    together: bool = False
    sets: tuple[str, ...] = tuple(SETS)
    algorithms: tuple[str, ...] = (OURS, *MOPO, "bc", "td3-bc")
    report: bool = False


def main(args: Args) -> None:
    summary = run_suite(
        Suite(
            datasets=tuple(str(args.data / f"{name}.hdf5") for name in args.sets),
            scale=tuple(SETS[name][0] for name in args.sets),
            algorithms=args.algorithms,
            seeds=args.seeds,
            out=args.out,
            updates=args.updates,
            evaluate_every=args.evaluate_every,
            workers=args.workers,
            together=args.together,
            report=args.report,
        )
    )
    result = judge(summary)
    keep = ("algorithm", "dataset", "seeds", "updates", "last10", "final", "score_last10", "score_final")
    rows = [{k: r.get(k) for k in (*keep, "seconds", "wall_s", "threads")} for r in summary["results"]]
    config = {"sets": SETS, "algorithms": args.algorithms, "updates": args.updates, "seeds": args.seeds}
    out = {"config": config, "figures": result, "runs": rows, "versions": versions(), **machine()}
    write_json(Path(__file__).parent / "results" / "offline_suite.json", out)
    print(json.dumps(result))


def judge(summary: dict) -> dict:
    """What was expected, and what came."""
    scores, results = summary.get("scores", {}), summary["results"]
    figures: dict = {"aggregate": summary.get("aggregate", {})}
    whole = {a: row for a, row in scores.items() if a.startswith("mopo@") and set(row) == set(SETS)}
    mean = lambda row: sum(sum(v) / len(v) for v in row.values()) / len(row)
    if whole and set(scores.get(OURS, ())) == set(SETS):
        best = max(whole, key=lambda a: mean(whole[a]))
        lead = suite.difference(scores[OURS], whole[best], confidence=0.90)
        figures |= {"best_mopo": best, "lead": [lead.point, lead.low, lead.high], "lead_expected": EXPECTED}
    words = Table("set", "behaviour", "algorithm", "last-10 return, mean over seeds", "above behaviour")
    above = {}
    for name, (_, behaviour) in SETS.items():
        returns = [x for r in results if r["dataset"] == name and r["algorithm"] == OURS for x in r.get("last10", ())]
        if returns:
            value = sum(returns) / len(returns)
            above[name] = value > behaviour
            words.add_row(name, str(behaviour), OURS, f"{value:.0f} ({len(returns)})", str(above[name]))
    Console().print(words)
    return figures | {"above_behaviour": above}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
