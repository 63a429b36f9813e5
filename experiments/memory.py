"""Peak memory of a run on a million transitions, and how long the file takes to load.

    python experiments/memory.py [--steps 1000000]

writes a D4RL-format file of halfcheetah's widths with random contents, loads it, and runs MOPO on it until its buffer
of imagined transitions is full and a checkpoint was saved, in a process of its own, so that the peak is its own. The
result goes to experiments/results/memory.json.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import tyro

from mbrl.run import Run, machine, versions, write_json

OBS, ACT, EPISODE = 17, 6, 1_000


@dataclass(frozen=True)
class Args:
    steps: int = 1_000_000
    child: Path | None = None
    """Internal: measure this file in this process."""


def peak() -> float:
    """GB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def write(path: Path, steps: int) -> None:
    """Random contents, written in pieces."""
    rng = np.random.default_rng(0)
    widths = {"observations": (OBS,), "actions": (ACT,), "rewards": (), "next_observations": (OBS,)}
    with h5py.File(path, "w") as file:
        for name, width in widths.items():
            column = file.create_dataset(name, (steps, *width), "f4")
            for at in range(0, steps, 100_000):
                n = min(100_000, steps - at)
                column[at : at + n] = np.tanh(rng.standard_normal((n, *width), dtype=np.float32))
        ends = np.arange(1, steps + 1) % EPISODE == 0
        file["timeouts"], file["terminals"] = ends, np.zeros(steps, dtype=bool)


def measure(path: Path) -> dict[str, float]:
    from mbrl_envs import datasets

    from mbrl import offline

    before, clock = peak(), time.perf_counter()
    data = datasets.load(path)
    loaded, took = peak(), time.perf_counter() - clock
    assert offline.MOPO.imagination is not None
    config = replace(offline.MOPO, updates=5_200, evaluate_every=5_200)
    never = lambda obs, act, after: after[:, 0] > 9e9
    fitting = offline.FitConfig(max_epochs=1)
    with Run.continued(path.with_suffix(""), {"memory": len(data)}, {}) as run:
        result = offline.train(config, data, fitting=fitting, terminal=never, record=run)
    floats = 4 * len(data) * (2 * OBS + ACT + 1) / 1e9
    return {
        "file_GB": path.stat().st_size / 1e9,
        "data_GB": floats,
        "load_s": took,
        "load_MB_per_s": path.stat().st_size / 1e6 / took,
        "imports_peak_GB": before,
        "load_peak_GB": loaded,
        "run_peak_GB": peak(),
        **{f"{k}_s": v for k, v in result.seconds.items()},
    }


def main(args: Args) -> None:
    if args.child is not None:
        print(json.dumps(measure(args.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "million.hdf5"
        write(path, args.steps)
        command = [sys.executable, __file__, "--child", str(path)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = {k: round(v, 3) for k, v in json.loads(out.splitlines()[-1]).items()}
    config = {"steps": args.steps, "obs": OBS, "act": ACT}
    out = {"config": config, "figures": figures, "versions": versions(), **machine()}
    write_json(Path(__file__).parent / "results" / "memory.json", out)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
