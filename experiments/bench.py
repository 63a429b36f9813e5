"""Speed, as ratios measured in one process.

    python experiments/bench.py NAME [--threads N] [--seconds S] [--save]

prints a table and, as its last line, one JSON object with every figure. A benchmark is a function
`run(harness) -> dict` in `experiments/benches/NAME.py`. The yardstick is this machine's own matrix product, timed
interleaved with the runs, with the same threads.
"""

import argparse
import importlib
import json
import pkgutil
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import benches
import torch
from rich.console import Console
from rich.table import Table

import mbrl
from mbrl import device as devices

HERE = Path(__file__).parent


class Harness:
    """Times functions in turns: a, b, product, a, b, product ... and gives the median of each."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.seconds, self.device = seconds, device
        self.product = torch.randn(4096, 4096, device=device)
        self.out = torch.empty_like(self.product)

    def _time(self, fn: Callable[[], object], least: float = 0.1) -> float:
        """Seconds a call, over enough calls to last `least` seconds."""
        n = 1
        while True:
            devices.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(n):
                fn()
            devices.synchronize(self.device)
            took = time.perf_counter() - start
            if took >= least:
                return took / n
            n = max(2 * n, int(n * least / max(took, 1e-9)))

    def compare(self, fns: dict[str, Callable[[], object]], flops: dict[str, float]) -> dict[str, dict[str, float]]:
        """Each function's median milliseconds and, where its floating-point operations a call are given, the rate it
        achieves and that rate's share of `torch.mm` (4096^3, float32, precision "highest", same threads)."""
        torch.set_float32_matmul_precision("highest")
        yard = lambda: torch.mm(self.product, self.product, out=self.out)
        every = {**fns, "_mm": yard}
        for fn in every.values():
            fn()
        times: dict[str, list[float]] = {name: [] for name in every}
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end or len(times["_mm"]) < 5:
            for name, fn in every.items():
                times[name].append(self._time(fn))
        rate = 2 * 4096**3 / statistics.median(times["_mm"])
        result = {}
        for name in fns:
            seconds = statistics.median(times[name])
            result[name] = {"ms": 1e3 * seconds}
            if name in flops:
                result[name] |= {"gflops": flops[name] / seconds / 1e9, "share": flops[name] / seconds / rate}
        result["torch.mm 4096"] = {"ms": 1e3 * statistics.median(times["_mm"]), "gflops": rate / 1e9, "share": 1.0}
        return result


def machine(device: torch.device) -> dict[str, object]:
    """What a figure depends on."""
    return {
        "mbrl": mbrl.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": devices.describe(device),
        "threads": torch.get_num_threads(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    names = sorted(m.name for m in pkgutil.iter_modules(benches.__path__))
    parser = argparse.ArgumentParser(description="Speed, as ratios measured in one process.")
    parser.add_argument("name", choices=names)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure each comparison")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--save", action="store_true", help="keep the JSON under experiments/results/")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    devices.keep_memory()
    device = devices.pick(args.device)
    start = time.perf_counter()
    rows = importlib.import_module(f"benches.{args.name}").run(Harness(args.seconds, device))
    result = {"bench": args.name, "rows": rows, **machine(device), "wall_s": round(time.perf_counter() - start, 1)}
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = Table("what", *columns, title=f"bench {args.name}")
    show = lambda x: "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)
    for name, row in rows.items():
        table.add_row(name, *(show(row.get(key)) for key in columns))
    Console().print(table)
    if args.save:
        path = HERE / "results" / f"bench_{args.name}_{device.type}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
