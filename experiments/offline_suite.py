"""The offline suite: hopper and halfcheetah, medium and mixed, every algorithm on the same fitted model and reward.

    python experiments/offline_suite.py --data DIR [--seeds 0 1 2] [--updates 100000] [--workers 2]

DIR holds {hopper,halfcheetah}-{medium,mixed}-v5.hdf5. BC and TD3+BC, MOPO with each of four coefficients (the best one
for all sets is reported), MOREC-MOPO with one setting. Scores are on D4RL's constants. Every finished run is a row of
experiments/results/offline_suite.json (drawn in offline_suite.png), and one that is there already, with the settings
and the data of today, is not run again; one of other settings stays in the file and out of the figures. The suite may
be filled over several sittings and machines, a few --sets, --algorithms or --seeds at a time.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from mbrl import offline, suite
from mbrl.choices import KNOWN
from mbrl.cli_offline import Offline, algorithm_named, sized
from mbrl.cli_suite import Suite, run_suite
from mbrl.run import Run, from_plain, machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "offline_suite.json"

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


def settings_of(args: Args, algorithm: str) -> str:
    """What a row's numbers depend on, but the data, the seed and the code, in twelve digits."""
    config = sized(algorithm_named(algorithm), args.updates, args.evaluate_every)
    default = Suite(datasets=())
    return offline.digest(config, default.fitting, default.dynamics)


def settings_kept(folder: Path) -> str | None:
    """The same of a run that lies in a folder, by what it was run with; None where no run does."""
    if not (folder / "config.json").exists():
        return None
    kept = from_plain(Run(folder).config["arguments"], (*KNOWN, Offline))
    return offline.digest(kept.algorithm, kept.fitting, kept.dynamics)


def restore(args: Args, path: Path) -> list[dict[str, Any]]:
    """Finished rows of the file become finished runs under --out, where the suite looks for them. Returns those that do
    not, since they are of data that are not at hand or of other settings."""
    left: list[dict[str, Any]] = []
    for row in json.loads(path.read_text())["runs"] if path.exists() else ():
        name = f"{row['dataset']}/{row['algorithm']}/{'-'.join(map(str, row['seeds']))}"
        file = args.data / f"{row['dataset']}.hdf5"
        same = file.exists() and row["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        if not same or row["settings"] != settings_of(args, row["algorithm"]):
            print(f"{name}: its row is of other {'settings' if same else 'data'} and stays as it is")
            left.append(row)
            continue
        folder = args.out / name
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "result.json", row)
    return left


def main(args: Args) -> None:
    left = restore(args, RESULTS)
    runs = [p.parent for p in args.out.glob("*/*/*/config.json")]
    if stale := [p for p in runs if settings_kept(p) != settings_of(args, p.parent.name)]:
        raise SystemExit(f"offline_suite.py: {', '.join(map(str, stale))}: run with other settings; move these away")
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
    keep = ("algorithm", "dataset", "sha256", "seeds", "updates", "last10", "final", "score_last10", "score_final")
    keep += ("behaviour_mean", "seconds", "wall_s", "threads", "processor", "versions")
    rows: list[dict[str, Any]] = []
    for r in summary["results"]:
        row = {k: r[k] for k in keep if k in r}
        folder = args.out / r["dataset"] / r["algorithm"] / "-".join(map(str, r["seeds"]))
        rows.append(row | {"settings": settings_kept(folder) or r["settings"]})
    whose = lambda row: [row[k] for k in ("dataset", "sha256", "algorithm", "seeds", "settings")]
    found = [whose(row) for row in rows]
    rows += [row for row in left if whose(row) not in found]
    config = {"sets": SETS, "updates": args.updates, "evaluate_every": args.evaluate_every}
    write_json(RESULTS, {"config": config, "figures": result, "runs": rows, "versions": versions(), **machine()})
    if (picture := args.out / "suite.png").exists():
        shutil.copyfile(picture, RESULTS.with_suffix(".png"))
    print(json.dumps(result))


def judge(summary: dict) -> dict:
    """What was expected, and what came."""
    scores, results = summary.get("scores", {}), summary["results"]
    figures: dict = {"aggregate": summary.get("aggregate", {})}
    mopo = {a: row for a, row in scores.items() if a.startswith("mopo@")}
    whole = {a: row for a, row in mopo.items() if set(row) == set(SETS)}
    mean = lambda row: sum(sum(v) / len(v) for v in row.values()) / len(row)
    if whole and set(scores.get(OURS, ())) == set(SETS):
        best = max(whole, key=lambda a: mean(whole[a]))
        lead = suite.difference(scores[OURS], whole[best], confidence=0.90)
        figures |= {"best_mopo": best, "lead": [lead.point, lead.low, lead.high], "lead_expected": EXPECTED}
    else:
        both = [name for name in SETS if name in scores.get(OURS, ()) and any(name in row for row in mopo.values())]
        value = lambda row, name: sum(row[name]) / len(row[name])
        most = {name: max(value(row, name) for row in mopo.values() if name in row) for name in both}
        figures["lead_over_the_best_mopo_of_each_set"] = {n: value(scores[OURS], n) - most[n] for n in both}
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
