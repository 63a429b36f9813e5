"""The command `mbrl reconstruct`: from a recorded series to a model with its attractor, spectrum and exponents, beside
the nulls that tell whether the scores mean anything."""

import copy
import math
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from mbrl import device as devices
from mbrl import metrics, nulls, piecewise
from mbrl.choices import KNOWN, RECONSTRUCTORS, Reconstructor, console
from mbrl.core import Dynamics, StepInput
from mbrl.data import Dataset
from mbrl.dynamics.plrnn import Plrnn, PlrnnConfig, PlrnnFit, fit_plrnn, orbit
from mbrl.fit import FitConfig, fit
from mbrl.run import Run, RunError, from_plain, machine, save_figure, to_plain, versions, write_json

SAVE_EVERY = 10.0  # seconds between checkpoints of a fit
LONGEST = 100_000  # steps of a series that scores are taken from
EXPONENTS = 10_000  # steps
ORBITS = 10  # of a known system, that share these steps
SHOWN = 1000  # steps of a series that the figure shows


@dataclass(frozen=True)
class Reconstruct:
    """Fit a model to a recorded series and judge it as a dynamical system, beside null models."""

    data: str | None = None
    """A .npy, .npz or CSV file, or system:NAME (system:list names them) to integrate one."""
    test: Path | None = None
    """A second file to judge by; by default the last part of the data."""
    holdout: float = 0.3
    """The share of the data that is that part."""
    columns: tuple[str, ...] = ()
    """Which are observed, by number or name; all that are no inputs by default."""
    inputs: tuple[str, ...] = ()
    """Which drive the system."""
    dt: float | None = None
    """Time between samples; the file's own, or 1, by default."""
    steps: int = 100_000
    """Of an integrated system."""
    noise: float = 0.0
    """Of an integrated system's training part, relative to each dimension's standard deviation."""
    compare: tuple[str, ...] = ()
    """Fit these learners instead of one and put them side by side; "all" for each."""
    resume: Path | None = None
    """Continue this run folder where it stopped, to the same numbers."""
    out: Path | None = None
    """The run folder; runs/<data>/<learner>-<seed> by default."""
    seeds: tuple[int, ...] = ()
    """Several are trained together. One is drawn, and recorded, where none is given."""
    ahead: int = 20
    """Steps of the prediction error PE(n)."""
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 is torch's own choice."""
    quiet: bool = False
    schedule: PlrnnFit = field(default_factory=lambda: PlrnnFit(epochs=500))
    """How PLRNNs are trained; the published fit has 5000 epochs."""
    fitting: FitConfig = field(default_factory=lambda: FitConfig(length=20, batch=32, max_epochs=40))
    """How other learners are trained."""
    dynamics: Reconstructor = field(default_factory=lambda: RECONSTRUCTORS["plrnn"])  # pyright: ignore[reportInvalidTypeForm]
    """The model; its settings follow its name."""


TYPES = (*KNOWN, PlrnnFit, Reconstruct)


# ---------------------------------------------------------------- the data


def load(args: Reconstruct) -> tuple[Dataset, Dataset, Any]:
    """(train, test, the system that is behind them where it is known). Raises ValueError for what cannot be used."""
    from mbrl_envs import series, systems

    if args.data is None:
        raise ValueError(
            "--data is missing; expected a .npy, .npz or CSV file, or system:NAME (system:list names them)"
        )
    if not 0 < args.holdout < 1:
        raise ValueError(f"--holdout: got {args.holdout}, expected a share between 0 and 1")
    kind, _, name = args.data.partition(":")
    if kind == "system":
        if name == "list":
            raise ValueError(f"systems: {', '.join(systems.SYSTEMS)}, dysts:NAME; and by size lorenz96-N, ks-N")
        system = systems.system(name)
        make = lambda seed, noise: systems.trajectory(system, args.steps, seed, dt=args.dt, noise=noise)
        return make(0, args.noise), make(1, 0.0), system
    number = lambda names: [int(x) if x.lstrip("-").isdigit() else x for x in names] or None
    read = lambda path: series.read_series(path, number(args.columns), number(args.inputs), dt=args.dt)
    data = read(args.data)
    train, test = series.split(data, 1 - args.holdout) if args.test is None else series.pair(data, read(args.test))
    if train.spec != test.spec:
        raise ValueError(f"--test {args.test}: is of {test.spec}, the data of {train.spec}")
    return train, test, None


def longest(data: Dataset) -> tuple[Tensor, Tensor]:
    """The longest episode: obs [T, N], at most `LONGEST` steps, and act [T, A]."""
    e = int(data.lengths.argmax())
    part = slice(int(data.starts[e]), min(int(data.starts[e + 1]), int(data.starts[e]) + LONGEST))
    return data.obs[part], data.act[part]


# ---------------------------------------------------------------- fitting


def train(run: Run, args: Reconstruct, config: Any, data: Dataset, name: str) -> list[Dynamics]:
    """The fitted models, a seed each; those that the run already holds are read, an interrupted fit goes on."""
    models = [config.build(data.spec, devices.generator(seed)) for seed in args.seeds]
    device = devices.pick(args.device)
    for model in models:
        model.to(device)
    kept = run.load(f"fitted-{name}")
    if kept is not None:
        for i, model in enumerate(models):
            own = {k.partition(".")[2]: v for k, v in kept[0].items() if k.startswith(f"{i}.")}
            model.load_state_dict(own)
        return models
    if isinstance(config, PlrnnConfig):
        _together(run, args, models, data, name)
    else:
        for model, seed in zip(models, args.seeds, strict=True):
            _alone(run, args, model, data, f"{name}-{seed}", seed)
    states = {f"{i}.{k}": v for i, m in enumerate(models) for k, v in m.state_dict().items()}
    run.save(f"fitted-{name}", states, {"seeds": list(args.seeds)})
    return models


class _Saver:
    """Checkpoints of a fit, one now and then."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name, self.last = run, f"{name}.partial", time.monotonic()

    def __call__(self, state: dict[str, Tensor]) -> None:
        if time.monotonic() - self.last > SAVE_EVERY:
            self.run.save(self.name, state, {})
            self.last = time.monotonic()


def _together(run: Run, args: Reconstruct, models: Any, data: Dataset, name: str) -> None:
    before = run.load(f"fitted-{name}.partial")

    def tell(epoch: int, epochs: int | None, figures: dict[str, float]) -> None:
        run.log(f"fit {name}", epoch, figures)
        run.progress(f"fit {name}", epoch, epochs, figures)

    streams = [devices.generator(1_000 + seed) for seed in args.seeds]
    save, resume = _Saver(run, f"fitted-{name}"), before and before[0]
    report = fit_plrnn(models, data, args.schedule, streams, tell, checkpoint=save, resume=resume)
    facts = {"skipped": sum(report.skipped), "fallbacks": report.fallbacks, "seconds": report.seconds}
    run.log(f"fit {name}, done", report.epochs, facts)


def _alone(run: Run, args: Reconstruct, model: Dynamics, data: Dataset, name: str, seed: int) -> None:
    done = run.load(f"part-{name}")
    if done is not None:
        model.load_state_dict(done[0])
        return
    before = run.load(f"part-{name}.partial")

    def tell(epoch: int, epochs: int | None, figures: dict[str, float]) -> None:
        run.log(f"fit {name}", epoch, figures)
        run.progress(f"fit {name}", epoch, epochs, figures)

    stream, save = devices.generator(1_000 + seed), _Saver(run, f"part-{name}")
    fit(model, data, args.fitting, stream, tell, checkpoint=save, resume=before and before[0])
    run.save(f"part-{name}", model.state_dict(), {})


# ---------------------------------------------------------------- judging


@torch.no_grad()
def judge(model: Dynamics, test: Dataset, ahead: int, seed: int) -> tuple[dict[str, Any], Tensor]:
    """Scores, and the free run that they were taken from [T, N]. An autonomous system runs floor(1.25 T) steps, of
    which the first T / 4 do not count; a driven one runs under the test's inputs."""
    obs, act = longest(test)
    cond, stream = model.condition(obs.new_zeros(1, model.spec.ctx)), devices.generator(seed)
    length, dt = len(obs), test.dt
    go = lambda steps, act: metrics.free_run(model, obs[:1], steps, cond=cond, act=act, dt=dt)
    if isinstance(model, Plrnn):
        go = lambda steps, act: orbit(model, obs[:1], steps, None if act is None else act[None, :steps])[0]
    driven = test.spec.act > 0
    free = go(length - 1, act) if driven else metrics.settled(lambda steps: go(steps, None), length)
    truth = obs[1:] if driven else obs
    window = obs[: min(length, 20_000)]
    predict = lambda x, n: metrics.forecast(model, x, n, cond=cond, act=act[: len(x)], dt=dt)
    found: dict[str, Any] = metrics.scores(truth, free, None, ahead, generator=stream)
    found[f"pe_{ahead}"] = metrics.prediction_error(predict(window, ahead), window).item()
    if driven:
        found["rmse"] = [float(x) for x in (free - truth).square().mean(0).sqrt()]
    else:
        found["lyapunov"] = exponents(model, free, cond, dt)
    if isinstance(model, Plrnn) and not driven and bool(free.isfinite().all()):
        found["fixed_points"] = fixed_points(model, free, cond)
    return found, free


def exponents(model: Dynamics, free: Tensor, cond: Any, dt: float) -> list[float]:
    """The model's Lyapunov spectrum per unit of time, from where the free run ended; at most ten."""
    if not bool(free[-1].isfinite().all()):
        return []
    state = model.init(free[-1:].to(next(model.parameters())), cond)
    if not isinstance(state, Tensor):
        return []
    own = model.jacobian if isinstance(model, Plrnn) else None
    walk = metrics.model_step(model, cond, dt=dt, jacobian=own)
    k = min(10, state.shape[1])
    return metrics.lyapunov_spectrum(walk, state, EXPONENTS, transient=EXPONENTS // 10, k=k, dt=dt)[0].tolist()


def fixed_points(model: Plrnn, free: Tensor, cond: Any) -> list[dict[str, Any]]:
    """The equilibria that a search from the free run finds, at most twenty."""
    twin = copy.deepcopy(model).double()
    starts = twin.init(free[:: max(1, len(free) // 50)].double(), twin.condition(free))
    inp = lambda z: StepInput(z.new_zeros(len(z), model.spec.act), z.new_zeros(len(z), model.noise_dim), z[:, :1])
    found = piecewise.cycles(
        lambda z: twin.step(z, inp(z), twin.condition(z))[0], lambda z: twin.jacobian(z, inp(z), ()), 1, starts,
        max_iterations=30,
    )  # fmt: skip
    return piecewise.report(found)[:20]


def true_exponents(system: Any, dt: float, seed: int = 0) -> list[float]:
    """The Lyapunov spectrum of a system that is known, per unit of time, the mean over ORBITS orbits; at most ten. None
    of a stiff one: explicit steps of its tangents would be too small."""
    from mbrl_envs.systems import Flow, integrate

    start = system.starts(ORBITS, devices.generator(seed)).double()
    if isinstance(system, Flow):
        if system.stiff:
            return []
        if system.transient:
            start = integrate(system, start, 1, system.transient)[:, -1]
        walk = metrics.flow_step(system.field, system.jacobian, dt, max(1, round(dt / 0.01)))
    else:
        walk = lambda x: (system.step(x), system.jacobian(x))
    k, steps = min(10, system.dim), EXPONENTS // ORBITS
    return metrics.lyapunov_spectrum(walk, start, steps, transient=steps // 5, k=k, dt=dt).mean(0).tolist()


# ---------------------------------------------------------------- the command


def run_reconstruct(args: Reconstruct) -> Run:
    """The command `mbrl reconstruct`; returns the finished run."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.resume is not None:
        given, run = args, Run.resumed(args.resume, "reconstruct", args.threads, quiet=args.quiet)
        config = run.config
        args = from_plain(config["arguments"], TYPES)
        local = run.local
        args = replace(
            args, data=given.data or local["data"], test=given.test or (local["test"] and Path(local["test"]))
        )
        args = replace(args, device=given.device, quiet=given.quiet)
        train_set, test_set, system = load(args)
        if train_set.sha256 != config["data"]["sha256"]:
            raise RunError(
                f"{args.data}: not the data of {run.folder}; pass --data with the file that it was begun with"
            )
        run.rewind()
        return _go(run, args, train_set, test_set, system)
    for name in args.compare:
        if name != "all" and name not in RECONSTRUCTORS:
            raise ValueError(f"--compare {name}: expected names among {', '.join(RECONSTRUCTORS)}, or all")
    train_set, test_set, system = load(args)
    _check(args, train_set, test_set)
    args = replace(args, seeds=args.seeds or (devices.fresh_seed(),))
    label = "compare" if args.compare else name_of(args.dynamics)
    stem = train_set.name.partition("[")[0].replace("/", "_").replace(":", "_")
    out = args.out or Path("runs") / stem / f"{label}-{'-'.join(map(str, args.seeds))}"
    file = lambda x: str(Path(x).resolve()) if x is not None and Path(x).exists() else x and str(x)
    local = {"data": file(args.data), "test": file(args.test), "threads": torch.get_num_threads()}
    facts = {"name": train_set.name, "sha256": train_set.sha256, "steps": len(train_set), "dt": train_set.dt}
    plain = to_plain(replace(args, data=train_set.name, test=None, out=None))
    run = Run.create(out, {"algorithm": label, "data": facts, "arguments": plain}, local, quiet=args.quiet)
    return _go(run, args, train_set, test_set, system)


def _check(args: Reconstruct, train: Dataset, test: Dataset) -> None:
    """Raises ValueError for what would fail in the course of a run."""
    have = len(longest(test)[0])
    if args.ahead < 1 or have <= args.ahead + 1:
        what = f"expected at least 1, and at most {have - 2} for the test's longest stretch of {have} observations"
        raise ValueError(f"--ahead {args.ahead}: {what}")
    for part, x in (("training", longest(train)[0]), ("test", longest(test)[0])):
        still = (x == x[:1]).all(0).nonzero()[:, 0].tolist()
        if still:
            raise ValueError(f"{train.name}: the {part} part does not move in the dimensions {still}; leave these out")
    longest_fit, needs = train.longest, args.schedule.length
    plrnn = args.compare or isinstance(args.dynamics, PlrnnConfig)
    if plrnn and longest_fit < needs:
        raise ValueError(
            f"--schedule.length {needs}: the longest stretch of the training part has {longest_fit} steps; pass a "
            "smaller length, or longer series"
        )


def name_of(config: Any) -> str:
    """The learner's name on the command line."""
    kind = lambda x: (type(x), type(getattr(x, "kind", None)), type(getattr(x, "forcing", None)))
    return next((n for n, x in RECONSTRUCTORS.items() if kind(x) == kind(config)), "custom")


def _go(run: Run, args: Reconstruct, data: Dataset, test: Dataset, system: Any) -> Run:
    device, began = devices.pick(args.device), time.perf_counter()
    data, test = data.to(device, torch.float32), test.to(device, torch.float32)
    names = tuple(RECONSTRUCTORS) if "all" in args.compare else args.compare
    configs = {n: RECONSTRUCTORS[n] for n in names} or {name_of(args.dynamics): args.dynamics}
    if not args.quiet:
        words = f"{data.name}: {len(data)} steps of {data.spec.obs} dimensions, dt {data.dt:g}"
        console.print(f"[bold]{run.folder}[/bold]  {words}; {', '.join(configs)}, seeds {args.seeds}")
    found: dict[str, list[dict[str, Any]]] = {}
    runs: dict[str, Tensor] = {}
    sizes, seconds = {}, {}
    with run:
        for name, config in configs.items():
            clock = time.perf_counter()
            models = train(run, args, config, data, name)
            seconds[name] = round(time.perf_counter() - clock, 1)
            sizes[name] = sum(p.numel() for p in models[0].parameters())
            each = [judge(m, test, args.ahead, seed) for m, seed in zip(models, args.seeds, strict=True)]
            found[name], runs[name] = [scores for scores, _ in each], each[0][1].cpu()
        known, floor = longest(data)[0].cpu(), longest(test)[0].cpu()
        run.progress("nulls", 0, 1, {})
        stream = devices.generator(0)
        if data.spec.act == 0:
            table = nulls.null_table(known, floor, args.ahead, generator=stream)
        else:
            drive = longest(data)[1].cpu(), longest(test)[1].cpu()
            table = nulls.driven_table((known, drive[0]), (floor, drive[1]), args.ahead, generator=stream)
        run.progress("nulls", 1, 1, {})
    true = true_exponents(system, data.dt) if system is not None and data.spec.act == 0 else None
    result = {
        "command": "reconstruct", "dataset": data.name, "sha256": data.sha256, "seeds": list(args.seeds),
        "steps": len(data), "test_steps": len(floor), "dt": data.dt, "learners": found, "parameters": sizes,
        "seconds": seconds, "nulls": table, "true_lyapunov": true, "wall_s": round(time.perf_counter() - began, 1),
        **machine(), "versions": versions(),
    }  # fmt: skip
    draw(run, run.folder / "report.png", floor, runs, result)
    write_json(run.folder / "result.json", result)
    if not args.quiet:
        tell(result)
        console.print(f"report: {run.folder / 'report.png'}")
    return run


def middle(rows: list[dict[str, Any]], key: str) -> float | None:
    """The median over seeds of a score; of a list, of its first entry. A seed that has none counts as one that
    diverged; None where most have none."""
    found = [r.get(key) for r in rows]
    values = [math.inf if x is None or x == [] else x[0] if isinstance(x, list) else x for x in found]
    value = statistics.median(math.inf if math.isnan(x) else x for x in values)
    return value if math.isfinite(value) or all(x not in (None, []) for x in found) else None


NULLS = {
    "iid_gaussian": "i.i.d. Gaussian",
    "phase_surrogate": "random phases",
    "truth": "truth elsewhere",
}  # the other names speak for themselves


def _heading(key: str) -> tuple[str, str]:
    """A score's name over a column, and which variant it is."""
    if key.startswith("d_stsp_histogram"):
        return "D_stsp", f"D_stsp: histogram, {key.removeprefix('d_stsp_histogram')} bins a dimension"
    if key.startswith("d_stsp"):
        return "D_stsp", "D_stsp: mixtures of unit Gaussians"
    if key.startswith("d_h_sigma"):
        return "D_H", f"D_H: spectra smoothed over {key.removeprefix('d_h_sigma')} frequencies"
    if key.startswith("pe_"):
        return f"PE({key.removeprefix('pe_')})", ""
    return key, ""


def tell(result: dict[str, Any]) -> None:
    """The table: every learner's medians over seeds, then the nulls."""
    learners, null_rows = result["learners"], result["nulls"]
    keys = [k for k in next(iter(learners.values()))[0] if k not in ("lyapunov", "fixed_points", "rmse")]
    extra = ["rmse"] if any("rmse" in rows[0] for rows in learners.values()) else ["lyapunov"]
    title = f"{result['dataset']}: medians over {len(result['seeds'])} seeds, T = {result['test_steps']}"
    last = "RMSE" if extra == ["rmse"] else "exponent"
    names, says = zip(*(_heading(k) for k in keys), strict=True)
    also = ["size: parameters", "s: seconds of fitting"]
    also.insert(
        0, "RMSE: of a free run, first dimension" if last == "RMSE" else "exponent: the largest, per unit of time"
    )
    words = Table("", *names, last, "size", "s", title=title, caption="; ".join([*(x for x in says if x), *also]))
    words.columns[0].no_wrap = True
    show = lambda x: "-" if x is None else f"{x:.3g}"
    for name, rows in learners.items():
        cells = [show(middle(rows, k)) for k in (*keys, *extra)]
        words.add_row(name, *cells, str(result["parameters"][name]), f"{result['seconds'][name]:.0f}")
    words.add_section()
    for name, row in null_rows.items():
        rmse = row.get("rmse", [None])[0]
        words.add_row(f"[dim]{NULLS.get(name, name)}[/dim]", *(show(row.get(k)) for k in keys), show(rmse), "-", "-")
    console.print(words)
    if result["true_lyapunov"]:
        console.print("the system's own exponents: " + ", ".join(f"{x:.3g}" for x in result["true_lyapunov"]))
    for name, rows in learners.items():
        if rows[0].get("lyapunov"):
            console.print(f"{name}: exponents " + ", ".join(f"{x:.3g}" for x in rows[0]["lyapunov"]))
        points = rows[0].get("fixed_points")
        if points is not None:
            kinds = [p["stability"] for p in points]
            counted = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds)) or "none found"
            console.print(f"{name}: fixed points: {counted}")


def draw(run: Run, path: Path, test: Tensor, runs: dict[str, Tensor], result: dict[str, Any]) -> None:
    """Attractor, series, spectra, and the fit's course."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    dims = (0, min(1, test.shape[1] - 1)) if test.shape[1] > 1 else (0, 0)
    lag = 0 if test.shape[1] > 1 else max(1, _lag(test[:, 0]))
    show = lambda x: (x[: len(x) - lag or None, dims[0]][:20_000], x[lag:, dims[1]][:20_000])
    series = {"data": test, **runs}
    for i, (name, x) in enumerate(series.items()):
        kw = {"color": "0.6" if i == 0 else f"C{i - 1}", "label": name}
        axes[0, 0].plot(*show(x), lw=0.3, alpha=0.8, **kw)
        axes[0, 1].plot(torch.arange(min(SHOWN, len(x))) * result["dt"], x[:SHOWN, 0], lw=0.8, **kw)
        frequency, power = _power(x[:, 0], result["dt"])
        axes[1, 0].plot(frequency, power, lw=0.8, **kw)
    second = f"dimension {dims[1] + 1}" if lag == 0 else f"dimension 1, {lag} steps later"
    axes[0, 0].set(title="attractor", xlabel="dimension 1", ylabel=second)
    low, high = test.amin(0), test.amax(0)
    room = 0.3 * (high - low)
    axes[0, 0].set(xlim=(low[dims[0]] - room[dims[0]], high[dims[0]] + room[dims[0]]))
    axes[0, 0].set(ylim=(low[dims[1]] - room[dims[1]], high[dims[1]] + room[dims[1]]))
    axes[0, 1].set(title="series, dimension 1", xlabel="time", ylim=(low[0] - room[0], high[0] + room[0]))
    axes[1, 0].set(title="power spectrum, dimension 1", xlabel="frequency", xscale="log", yscale="log")
    for ax in (axes[0, 0], axes[0, 1], axes[1, 0]):
        ax.legend(fontsize=8)
    ax, lines = axes[1, 1], run.metrics()
    for stage in dict.fromkeys(x["stage"] for x in lines if not x["stage"].endswith("done")):
        for key in ("mse", "train", "holdout", "alpha"):
            points = [(x["step"], x[key]) for x in lines if x["stage"] == stage and x.get(key)]
            if points:
                ax.plot(
                    *zip(*points, strict=True), lw=0.8, ls=":" if key == "alpha" else "-", label=f"{stage[4:]}: {key}"
                )
    ax.set(title="fit", xlabel="epochs", yscale="log")
    if ax.get_lines():
        ax.legend(fontsize=7)
    figure.suptitle(f"{result['dataset']}, T = {result['test_steps']}")
    save_figure(figure, path)


def _lag(x: Tensor) -> int:
    """The first lag at which the autocorrelation has fallen to 1 / e."""
    fallen = metrics.autocorrelation(x[:, None], min(len(x) // 4, 1000))[:, 0] < 0.3679
    return int(fallen.float().argmax()) if bool(fallen.any()) else 1


def _power(x: Tensor, dt: float, parts: int = 8) -> tuple[Tensor, Tensor]:
    """Frequencies and the power spectrum, averaged over stretches (Bartlett), normalised."""
    n = len(x) // parts
    chunks = (x[: n * parts].double().reshape(parts, n) - x.double().mean()).nan_to_num()
    power = torch.fft.rfft(chunks).abs().square().mean(0)[1:]
    return torch.fft.rfftfreq(n, dt)[1:], (power / power.sum().clamp(min=1e-300)).clamp(min=1e-12)
