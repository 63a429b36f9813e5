"""Twenty chaotic systems of dysts with one setting: valid prediction times, spectra, Lyapunov exponents.

    python experiments/twenty.py [--systems Aizawa Halvorsen] [--seeds 0 1 2]

The systems are the first twenty by the alphabet of those flows in dysts that

- are autonomous, without delays, three-dimensional, and bounded as they are written (dysts does not post-process them);
- are evaluated by dysts for many points at once;
- are not stiff: DOP853 to 1e-9 takes fewer than 1000 evaluations a period, and stays finite. The period is dysts';
- contract volume, and are chaotic: of the spectrum computed here the sum is below 0 and the largest exponent at least
  0.05 a period, which is told from 0 beyond doubt.

None of this looks at a learner. Each is integrated from three initial states, 200 periods of 50 samples without noise,
after a transient of 20: to train, to test, and for the floor; in units of the training series. A clipped shallow PLRNN
of three states begins with `random_features` ("start") and is trained by `fit_plrnn` with adaptive forcing, the seeds
together; scores are of the last parameters. The true exponents are computed as the model's are, along as many orbits of
the same length; dysts' own are not used. Valid prediction times are medians over starts along the test series, in true
Lyapunov times, of at most 10 or 100 periods: `vpt_whole` is the share of starts that reached the end.

A finished system is a row of experiments/results/twenty.json and is not run again; twenty.png is drawn
beside it where the series of all runs are in `out`."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from dsr import dataset
from mbrl_envs import systems
from mbrl_envs.series import standardise
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from scipy.integrate import solve_ivp
from torch import Tensor

from mbrl import device as devices
from mbrl import metrics
from mbrl.dynamics.plrnn import Plrnn, PlrnnConfig, PlrnnFit, Shallow, fit_plrnn, orbit, random_features
from mbrl.nulls import PersistenceConfig, VarConfig, null_table
from mbrl.offline import digest
from mbrl.run import machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "twenty.json"
LEARNER = PlrnnConfig(Shallow(400), latent_decay=1e-6)
FIT = PlrnnFit(300, length=50, lr=2e-3, lr_end=2e-5)
ORDER = 20  # of the VAR
DRAWN = 2000  # samples of an attractor in the figure


@dataclass(frozen=True)
class Protocol:
    per_period: int = 50
    samples: int = 10_000
    evaluations: float = 1000.0  # a period, from which a system is stiff
    chaotic: float = 0.05  # the least exponent a period
    orbits: int = 64  # of a spectrum
    periods: int = 100  # of each
    settle: int = 20  # and before
    substeps: int = 2  # Runge-Kutta steps a sample
    starts: int = 100  # of forecasts
    lyapunov_times: float = 10.0  # which they last, and no longer than so many periods:
    longest: int = 100
    ridge: float = 1e-8


RULES = Protocol()


@dataclass(frozen=True)
class Args:
    systems: tuple[str, ...] = ()  # of dysts, by name; by default the twenty
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs/twenty")  # series of the figure
    count: int = 20


# ---------------------------------------------------------------- the systems


def examine(name: str) -> dict[str, Any]:
    """Whether the rule takes a flow, why not, and what was computed of it; exponents per unit of time."""
    try:
        system = systems.dysts(name, RULES.per_period)
    except ValueError:
        return {"verdict": "not autonomous"}
    if system.dim != 3:
        return {"verdict": f"{system.dim} dimensions"}
    if getattr(system.model, "_postprocessing", None) is not None:
        return {"verdict": "unbounded coordinates"}
    if not system.batched:
        return {"verdict": "evaluated point by point"}
    period = RULES.per_period * system.dt
    field = lambda _, x: system.rates(x)
    solved = solve_ivp(field, (0.0, 20 * period), system.ready, method="DOP853", rtol=1e-9, atol=1e-9)
    facts: dict[str, Any] = {"period": period, "evaluations": round(solved.nfev / 20)}
    if not solved.success or solved.nfev >= 20 * RULES.evaluations:
        return {"verdict": "stiff"} | facts
    raw = systems.trajectory(system, RULES.samples, 2).obs
    walk = metrics.flow_step(system.field, system.jacobian, system.dt, RULES.substeps)
    each = exponents(walk, raw, system.dt)
    found, error = each.mean(0).tolist(), (each[:, 0].std() / len(each) ** 0.5).item()
    facts |= {"spectrum": found, "standard_error": error, "kaplan_yorke": metrics.kaplan_yorke(each.mean(0)).item()}
    if not sum(found) < 0:
        return {"verdict": "does not contract volume"} | facts
    if not found[0] * period >= RULES.chaotic:
        return {"verdict": "hardly chaotic"} | facts
    return {"verdict": "taken"} | facts


def exponents(walk: metrics.StepJacobian, series: Tensor, dt: float) -> Tensor:
    """[orbits, 3], along orbits from states spread over a series."""
    begin = series[:: len(series) // RULES.orbits][: RULES.orbits]
    steps, settle = RULES.periods * RULES.per_period, RULES.settle * RULES.per_period
    return metrics.lyapunov_spectrum(walk, begin, steps, transient=settle, dt=dt, every=5)


# ---------------------------------------------------------------- one of them


def run(name: str, facts: dict[str, Any], args: Args) -> dict[str, Any]:
    clock, cpu = time.perf_counter(), time.process_time()
    system = systems.dysts(name, RULES.per_period)
    raw = [systems.trajectory(system, RULES.samples, seed) for seed in range(3)]
    train, test, truth = (standardise(x, raw[0]).obs.float() for x in raw)
    data = dataset(train, system.dt)
    exponent = facts["spectrum"][0]
    valid = valid_times(test, system.dt, exponent)
    models = [LEARNER.build(data.spec, devices.generator(seed)) for seed in args.seeds]
    for model, seed in zip(models, args.seeds, strict=True):
        random_features(model, data, RULES.ridge, devices.generator(seed))
    start = [score(model, test, valid, seed)[0] for model, seed in zip(models, args.seeds, strict=True)]
    report = fit_plrnn(models, data, FIT, [devices.generator(1000 + seed) for seed in args.seeds])
    each = []
    for model, seed in zip(models, args.seeds, strict=True):
        figures, free = score(model, test, valid, seed)
        cond = model.condition(test)
        walk = metrics.model_step(model, cond, jacobian=model.jacobian)
        found = exponents(walk, model.init(test, cond), system.dt).mean(0)
        figures |= {"lyapunov": found[0].item(), "exponent_error": (found[0] / exponent - 1).abs().item()}
        each.append(figures | {"spectrum": [plain(x) for x in found.tolist()]})
        if seed == args.seeds[0]:
            args.out.mkdir(parents=True, exist_ok=True)
            shown = {"truth": test[:DRAWN].contiguous(), "model": free[:DRAWN].contiguous()}
            save_file(shown, args.out / f"{name}.safetensors")
    nulls = null_table(train, test, 20, generator=devices.generator(0), order=ORDER, truth=truth)
    for config in (VarConfig(ORDER), PersistenceConfig()):
        null = config.fit(train)
        past = test.double().unfold(0, null.history, 1).mT  # [., history, N]
        nulls[null.name] |= valid(lambda at, n, null=null, past=past: null.predict(past[at - null.history + 1], n))
    return {
        "system": name, "digest": digest(RULES, LEARNER, FIT, args.seeds), "true_lyapunov": exponent,
        "true_error": facts["standard_error"] / exponent, "median": medians(each), "start": medians(start),
        "nulls": {k: {name: plain(x) for name, x in row.items()} for k, row in nulls.items()},
        "each": [{k: plain(v) if isinstance(v, float) else v for k, v in row.items()} for row in each],
        "seeds": list(args.seeds), "updates": report.updates, "solver": report.solver, "skipped": report.skipped,
        "alpha": [round(a, 4) for a in report.alpha[-1]], "train_s": round(report.seconds, 1),
        "cpu_s": round(time.process_time() - cpu, 1), "wall_s": round(time.perf_counter() - clock, 1),
        **machine(), "versions": versions(),
    }  # fmt: skip


def valid_times(test: Tensor, dt: float, exponent: float) -> Callable[..., dict[str, float]]:
    """A function of forecasts, (times [B], n) -> [B, n, N], that scores them."""
    most = RULES.longest * RULES.per_period
    n = min(math.ceil(RULES.lyapunov_times / (exponent * dt)), most, len(test) // 2)
    at = torch.linspace(ORDER - 1, len(test) - n - 1, RULES.starts).long()
    true = test[at[:, None] + torch.arange(1, n + 1)]
    std = test.std(0, correction=0)

    def valid(predict: Callable[[Tensor, int], Tensor]) -> dict[str, float]:
        found, name = metrics.valid_prediction_time(predict(at, n), true, dt, exponent, std=std)
        whole = (found >= n * dt * exponent * (1 - 1e-9)).double().mean()
        return {name: found.median().item(), "vpt_whole": whole.item()}

    return valid


def score(model: Plrnn, test: Tensor, valid: Any, seed: int) -> tuple[dict[str, Any], Tensor]:
    """And the free run from the test's first observation."""
    free = metrics.settled(lambda steps: orbit(model, test[:1], steps)[0], len(test))
    predict = lambda x, n: orbit(model, x[:-n], n)
    found = metrics.scores(test, free, predict, 20, generator=devices.generator(seed))
    return found | valid(lambda at, n: orbit(model, test[at], n)), free


def medians(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """NaN counts as the worst."""
    bad = lambda x: math.inf if math.isnan(x) else x
    return {k: plain(median(bad(row[k]) for row in rows)) for k, v in rows[0].items() if isinstance(v, float)}


def plain(x: float) -> float | None:
    """JSON knows no infinity."""
    return x if math.isfinite(x) else None


# ---------------------------------------------------------------- all of them


def tabled(rows: list[dict[str, Any]]) -> Table:
    table = Table("system", "VPT", "start", "VAR", "persists", "D_H", "VAR", "floor", "D_stsp", "floor",
                  "true exponent", "model's", title="medians over seeds")  # fmt: skip
    vpt, distance = metrics.Nrmse().name, "d_stsp_histogram30"
    words = lambda x: "-" if x is None else f"{x:.3g}"
    for row in rows:
        own, nulls = row["median"], row["nulls"]
        var = nulls[f"var({ORDER})"]
        figures = [
            own[f"vpt_{vpt}"], row["start"][f"vpt_{vpt}"], var[f"vpt_{vpt}"], nulls["persistence"][f"vpt_{vpt}"],
            own["d_h_sigma20"], var["d_h_sigma20"], nulls["truth"]["d_h_sigma20"],
            own[distance], nulls["truth"][distance], row["true_lyapunov"], own["lyapunov"],
        ]  # fmt: skip
        table.add_row(row["system"], *map(words, figures))
    return table


def draw(rows: list[dict[str, Any]], folder: Path, path: Path) -> None:
    """The attractors, of the truth and of the first seed's free run; and the scores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    whole = plt.figure(figsize=(12, 8.4), layout="constrained")
    above, below = (whole.add_subfigure(cell) for cell in whole.add_gridspec(2, 1, height_ratios=(1.9, 1)))
    axes = above.subplots(4, 10)
    for ax in axes.flat:
        ax.set_axis_off()
    for row, (left, right) in zip(rows, axes.reshape(-1, 2), strict=False):
        series = load_file(folder / f"{row['system']}.safetensors")
        truth = series["truth"]
        pad = 0.1 * (truth.amax(0) - truth.amin(0))
        for ax, x, colour in ((left, truth, "0.3"), (right, series["model"], "tab:blue")):
            ax.plot(x[:, 0], x[:, 2], color=colour, linewidth=0.3)
            ax.set_xlim(float(truth[:, 0].min() - pad[0]), float(truth[:, 0].max() + pad[0]))
            ax.set_ylim(float(truth[:, 2].min() - pad[2]), float(truth[:, 2].max() + pad[2]))
        left.set_title(row["system"], fontsize=7, loc="left")
    vpt = f"vpt_{metrics.Nrmse().name}"
    panels = below.subplots(1, 3)
    at, names = range(len(rows)), [row["system"] for row in rows]
    var = [row["nulls"][f"var({ORDER})"] for row in rows]
    value = lambda x: math.nan if x is None else x
    panels[0].plot(at, [value(row["median"][vpt]) for row in rows], "o", color="tab:blue", label="PLRNN")
    panels[0].plot(at, [value(row["start"][vpt]) for row in rows], "_", color="tab:orange", label="random features")
    panels[0].plot(at, [value(x[vpt]) for x in var], "x", color="0.5", label=f"VAR({ORDER})")
    panels[0].set_title("valid prediction time (Lyapunov times)", fontsize=8)
    panels[1].plot(at, [value(row["median"]["d_h_sigma20"]) for row in rows], "o", color="tab:blue", label="PLRNN")
    panels[1].plot(at, [value(x["d_h_sigma20"]) for x in var], "x", color="0.5", label=f"VAR({ORDER})")
    floor = [row["nulls"]["truth"]["d_h_sigma20"] for row in rows]
    panels[1].plot(at, floor, "_", color="k", label="truth against truth")
    panels[1].set_title("D_H", fontsize=8)
    panels[1].set_yscale("log")
    ratio = [value(row["median"]["lyapunov"]) / row["true_lyapunov"] for row in rows]
    panels[2].plot(at, ratio, "o", color="tab:blue", label="PLRNN")
    panels[2].axhline(1, color="k", linewidth=0.5)
    panels[2].set_title("largest exponent, over the true one", fontsize=8)
    for ax in panels:
        ax.set_xticks(list(at), names, rotation=90, fontsize=6)
        ax.tick_params(axis="y", labelsize=6)
        ax.legend(fontsize=6)
    whole.savefig(path, dpi=75, pil_kwargs={"optimize": True})
    plt.close(whole)


def main(args: Args) -> None:
    devices.keep_memory()
    torch.set_num_threads(1)
    table: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    table = {"rule": digest(RULES), "examined": {}, "rows": {}} if table.get("rule") != digest(RULES) else table
    own = digest(RULES, LEARNER, FIT, args.seeds)
    rows: list[dict[str, Any]] = []
    for name in args.systems or systems.dysts_names():
        if len(rows) == args.count:
            break
        if name not in table["examined"]:
            table["examined"][name] = examine(name)
            write_json(RESULTS, table)
        facts = table["examined"][name]
        if facts["verdict"] != "taken":
            print(f"{name}: {facts['verdict']}", flush=True)
            continue
        if table["rows"].get(name, {}).get("digest") != own:
            table["rows"][name] = run(name, facts, args)
            write_json(RESULTS, table)
        rows.append(table["rows"][name])
        print(json.dumps({name: rows[-1]["median"], "cpu_s": rows[-1]["cpu_s"]}), flush=True)
    Console(width=160).print(tabled(rows))
    if not args.systems and all((args.out / f"{row['system']}.safetensors").exists() for row in rows):
        draw(rows, args.out, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
