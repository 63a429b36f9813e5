"""Real driven systems, simulated freely: Silverbox and Cascaded Tanks, beside a linear model.

    python experiments/driven.py --data DIR [--sets silverbox tanks] [--seeds 0 1 2]

DIR holds silverbox_snls80mv.npy ([131072, 2]: input, output, in V, at 610.35 Hz) and cascaded_tanks.csv (columns uEst,
uVal, yEst, yVal in V, every 4 s). Silverbox: the first 40 000 samples, an input that grows beyond what the fit has
seen, are the test; the rest is fitted. Tanks: uEst and yEst are fitted, uVal and yVal the test. The figure is the root
mean square error of a free run over the test from its 50th sample on; the first 50 are given.

A model's state is the last `lags` outputs, its inputs are those of this and the next sample and of the lags. The PLRNN
begins as the linear model (a pair of rectifiers passes a state on as it is; the other units begin with next to no
weight) and is trained by teacher forcing that is annealed away. The linear model is an ARX of the same form, fitted by
least squares. Lags of both are chosen by the free run over the last fifth of what is fitted; then all of that is
fitted. Last parameters, medians over seeds.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from mbrl_envs.series import from_arrays
from rich.console import Console
from rich.table import Table

from mbrl import device as devices
from mbrl.data import Dataset
from mbrl.dynamics.plrnn import Annealed, Plrnn, PlrnnConfig, PlrnnFit, Shallow, fit_plrnn, orbit
from mbrl.offline import digest
from mbrl.run import machine, save_figure, versions, write_json

RESULTS = Path(__file__).parent / "results" / "driven.json"
WARM = 50


@dataclass(frozen=True)
class Setting:
    unit: str
    hidden: int
    lags: tuple[int, ...]  # that the PLRNN tries
    linear: tuple[int, ...]  # that the ARX tries
    fit: PlrnnFit
    anneal: int  # updates


SETTINGS = {
    "silverbox": Setting(
        "mV", 100, (2, 3), (2, 3, 4, 6, 8, 10), PlrnnFit(200, 50, 32, 150, lr=2e-3, lr_end=1e-5, clip=1.0), 5000
    ),
    "tanks": Setting(
        "V", 30, (2, 4, 8), (1, 2, 3, 4, 6, 8), PlrnnFit(60, 50, 16, 150, lr=1e-3, lr_end=1e-5, clip=1.0), 1500
    ),
}


@dataclass(frozen=True)
class Args:
    data: Path
    sets: tuple[str, ...] = tuple(SETTINGS)
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 2
    out: Path = field(default_factory=lambda: RESULTS.with_suffix(".png"))


Series = tuple[np.ndarray, np.ndarray]  # input [T], output [T]


def series(name: str, folder: Path) -> tuple[Series, Series]:
    """(what is fitted, the test)."""
    if name == "silverbox":
        a = np.load(folder / "silverbox_snls80mv.npy", allow_pickle=False).astype(np.float64)
        u, y = a[:, 0], 1e3 * a[:, 1]
        return (u[40_000:], y[40_000:]), (u[:40_000], y[:40_000])
    rows = np.genfromtxt(folder / "cascaded_tanks.csv", delimiter=",", names=True, usecols=(0, 1, 2, 3))
    return (rows["uEst"], rows["yEst"]), (rows["uVal"], rows["yVal"])


def lagged(data: Series, lags: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [T', lags], the newest first, and inputs [T', lags + 1], from the next sample's back."""
    u, y = data
    at = np.arange(lags - 1, len(y))
    after = np.minimum(at + 1, len(y) - 1)
    obs = np.stack([y[at - i] for i in range(lags)], 1)
    return obs, np.stack([u[after], *(u[at - i] for i in range(lags))], 1)


def dataset(data: Series, lags: int, scale: tuple[np.ndarray, np.ndarray]) -> Dataset:
    obs, act = lagged(data, lags)
    return from_arrays(obs, (act - scale[0]) / scale[1], bounds=(-1.0, 1.0))


def rmse(predicted: np.ndarray, data: Series, first: int) -> float:
    return float(np.sqrt(np.mean((predicted - data[1][first : first + len(predicted)]) ** 2)))


# ---------------------------------------------------------------- linear


def arx(data: Series, lags: int) -> np.ndarray:
    obs, act = lagged(data, lags)
    x = np.concatenate([obs[:-1], act[:-1], np.ones((len(obs) - 1, 1))], 1)
    return np.linalg.lstsq(x, obs[1:, 0], rcond=None)[0]


def simulated(w: np.ndarray, data: Series, lags: int) -> np.ndarray:
    """Outputs from sample WARM on, of a free run."""
    _, act = lagged(data, lags)
    state = data[1][WARM - lags : WARM][::-1].copy()
    out = []
    for t in range(WARM - 1, len(data[1]) - 1):
        y = state @ w[:lags] + act[t - lags + 1] @ w[lags:-1] + w[-1]
        y = float(np.clip(y, -1e9, 1e9))
        state = np.concatenate([[y], state[:-1]])
        out.append(y)
    return np.array(out)


# ---------------------------------------------------------------- PLRNN


@torch.no_grad()
def linear_start(model: Plrnn, data: Dataset, generator: torch.Generator) -> None:
    """z' = K z + C s + h by least squares: K's diagonal is A, the rest goes through pairs relu(z) - relu(-z)."""
    model.observed.fit(torch.cat([data.obs, data.next_obs[-1:]]))
    z, after = (model.observed(x).double() for x in (data.obs, data.next_obs))
    m, p = model.width, model.theta
    x = torch.cat([z, data.act.double(), torch.ones_like(z[:, :1])], 1)
    w = torch.linalg.lstsq(x, after).solution.T.float()
    K = w[:, :m]
    p["A"].copy_(K.diagonal())
    p["C"].copy_(w[:, m:-1])
    p["h1"].copy_(w[:, -1])
    rest = K - K.diagonal().diag()
    p["W1"].normal_(generator=generator).mul_(1e-3)
    p["W1"][:, : 2 * m] = torch.cat([rest, -rest], 1)
    p["W2"].normal_(generator=generator).div_(m**0.5)
    p["W2"][: 2 * m] = torch.cat([torch.eye(m), -torch.eye(m)])
    through = z[torch.randint(len(z), (len(p["h2"]),), generator=generator)].float()
    p["h2"].copy_(-(p["W2"] * through).sum(1))
    p["h2"][: 2 * m] = 0.0


def learned(s: Setting, fit: Series, tests: list[Series], lags: int, seeds: tuple[int, ...]) -> list[list[np.ndarray]]:
    """[seed][test]: free runs from sample WARM on."""
    inputs = np.concatenate([lagged(x, lags)[1] for x in (fit, *tests)])
    scale = inputs.mean(0), np.abs(inputs - inputs.mean(0)).max(0) * (1 + 1e-9)
    data = dataset(fit, lags, scale)
    config = PlrnnConfig(Shallow(s.hidden, clipped=False), forcing=Annealed(0.3, 0.003, s.anneal))
    models = [config.build(data.spec, devices.generator(seed)) for seed in seeds]
    for model, seed in zip(models, seeds, strict=True):
        linear_start(model, data, devices.generator(seed))
    fit_plrnn(models, data, s.fit, [devices.generator(1000 + seed) for seed in seeds])
    found = []
    for model in models:
        model.requires_grad_(False)
        runs = []
        for test in tests:
            given = dataset(test, lags, scale)
            obs, inputs = given.obs, torch.as_tensor((lagged(test, lags)[1] - scale[0]) / scale[1], dtype=torch.float32)
            first = WARM - lags  # the row whose newest output is the last that is given
            steps = len(test[1]) - WARM
            free = orbit(model, obs[first : first + 1], steps, inputs[None, first : first + steps])[0]
            runs.append(free[:, 0].double().numpy())
        found.append(runs)
    return found


def run(name: str, args: Args) -> dict[str, Any]:
    began, s = time.perf_counter(), SETTINGS[name]
    fit, test = series(name, args.data)
    cut = int(0.8 * len(fit[1]))
    part, held = (fit[0][:cut], fit[1][:cut]), (fit[0][cut:], fit[1][cut:])
    linear = {n: rmse(simulated(arx(part, n), held, n), held, WARM) for n in s.linear}
    order = min(linear, key=lambda n: linear[n])
    line = simulated(arx(fit, order), test, order)
    tried = {}
    for n in s.lags:
        runs = learned(s, part, [held], n, args.seeds)
        tried[n] = statistics.median(rmse(r[0], held, WARM) for r in runs)
        print(name, "lags", n, f"held out {tried[n]:.4g} {s.unit}  {time.perf_counter() - began:.0f} s", flush=True)
    lags = min(tried, key=lambda n: tried[n])
    runs = [r[0] for r in learned(s, fit, [test], lags, args.seeds)]
    each = [rmse(r, test, WARM) for r in runs]
    middle = statistics.median(each)
    draw(name, test, line, runs[each.index(middle)] if middle in each else runs[0], args.out)
    return {
        "set": name, "digest": digest(s, args.seeds), "unit": s.unit, "rmse": middle, "each": each, "lags": lags,
        "mad": statistics.median(abs(e - middle) for e in each), "held_out": tried, "linear": rmse(line, test, WARM),
        "linear_order": order, "linear_held_out": linear, "seeds": list(args.seeds), "test": len(test[1]) - WARM,
        "spread_of_output": float(test[1].std()), "wall_s": round(time.perf_counter() - began, 1),
        "threads": args.threads, **machine(), "versions": versions(),
    }  # fmt: skip


def draw(name: str, test: Series, line: np.ndarray, free: np.ndarray, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    truth = test[1][WARM:]
    last = slice(-300, None)
    axes[0].plot(truth[last], "k", lw=0.8, label="measured")
    axes[0].plot(line[last], "C1", lw=0.8, label="linear")
    axes[0].plot(free[last], "C0", lw=0.8, label="PLRNN")
    axes[0].legend(fontsize=7)
    axes[0].set(title=f"{name}: the last 300 samples", xlabel="sample", ylabel=SETTINGS[name].unit)
    step = max(1, len(truth) // 2000)
    axes[1].plot(np.arange(len(truth))[::step], (line - truth)[::step], "C1", lw=0.4, label="linear")
    axes[1].plot(np.arange(len(truth))[::step], (free - truth)[::step], "C0", lw=0.4, label="PLRNN")
    axes[1].set(title="error of the free run", xlabel="sample", ylabel=SETTINGS[name].unit)
    save_figure(figure, path.with_name(f"{path.stem}_{name}{path.suffix}"))


def main(args: Args) -> None:
    devices.keep_memory()
    torch.set_num_threads(args.threads)
    for name in args.sets:
        table = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if table.get(name, {}).get("digest") != digest(SETTINGS[name], args.seeds):
            row = run(name, args)
            write_json(RESULTS, (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | {name: row})
    words = Table("", "PLRNN", "each seed", "linear", "output's deviation", title="free-run RMSE")
    for name, row in json.loads(RESULTS.read_text()).items():
        each = " ".join(f"{e:.3g}" for e in row["each"])
        cells = (f"{row['rmse']:.3g} {row['unit']}", each, f"{row['linear']:.3g}", f"{row['spread_of_output']:.3g}")
        words.add_row(name, *cells)
    Console().print(words)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
