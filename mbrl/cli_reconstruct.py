"""The command `mbrl reconstruct`: from a recorded series to a model with its attractor, spectrum and exponents, beside
the nulls that tell whether the scores mean anything."""

import copy
import math
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from mbrl import device as devices
from mbrl import forced, metrics, nulls, piecewise
from mbrl.choices import KNOWN, PLAIN, RECONSTRUCTORS, Reconstructor, console, only_its_own
from mbrl.core import Diverged, Dynamics, Spec, StepInput
from mbrl.data import Dataset
from mbrl.dynamics.plrnn import Plrnn, PlrnnConfig, PlrnnFit, Shallow, fit_plrnn, orbit
from mbrl.fit import FitConfig, Rows, fit
from mbrl.run import Run, RunError, folder_name, from_plain, machine, save_figure, to_plain, versions, write_json

SAVE_EVERY = 10.0  # seconds between checkpoints of a fit
LONGEST = 100_000  # steps of a series that scores are taken from
WINDOW = 20_000  # of these, by which a prediction error is taken
EXPONENTS = 10_000  # steps
ORBITS = 10  # of a known system, each of half as many steps
FINEST = 5  # parts of such a step, a hundredth of a period or so, that are enough
SHOWN = 1000  # steps of a series that the figure shows
DRAWN = 10_000  # of an attractor
STILL = 0.01  # of the truth's range: a run that ends in a point spans less in its last quarter
AWAY = 10.0  # ranges of the truth: one that leaves goes farther from its middle


@dataclass(frozen=True)
class Reconstruct:
    """Fit a model to a recorded series and judge it as a dynamical system, beside null models."""

    data: str | None = None
    """A .npy, .npz or CSV file, or system:NAME (system:list names them) to integrate one. A CSV's first row is a header
    unless all of it is numbers; a column named time, timestamp or t tells dt and is not observed."""
    test: Path | None = None
    """A second file to judge by; by default the last part of the data."""
    holdout: float = 0.3
    """The share of the data that is that part."""
    columns: tuple[str, ...] = ()
    """Which are observed, by number or name; all that are no inputs and no time by default."""
    inputs: tuple[str, ...] = ()
    """Which drive the system."""
    dt: float | None = None
    """Time between samples; the file's own (a .npz's dt, a CSV's column of time), or 1, by default."""
    steps: int = 100_000
    """Of an integrated system."""
    noise: float = 0.0
    """Of an integrated system's training part, relative to each dimension's standard deviation."""
    compare: tuple[str, ...] = ()
    """Fit these learners instead of one and put them side by side; "all" for each."""
    resume: Path | None = None
    """Continue this run folder where it stopped, to the same numbers and by its own settings: what is given beside and
    differs from them is refused, but for --threads, --quiet, and where its data lie now."""
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
    """Print nothing but where the report is."""
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
    number = lambda names: [int(x) if x.lstrip("-").isdecimal() else x for x in names] or None
    read = lambda path: series.read_series(path, number(args.columns), number(args.inputs), dt=args.dt)
    data = read(args.data)
    if args.test is None:
        return *series.split(data, 1 - args.holdout), None
    test = read(args.test)
    try:
        return *series.pair(data, test), None
    except ValueError as error:
        raise ValueError(f"--test {args.test}: {error}; --columns, --inputs and --dt hold for both files") from None


def longest(data: Dataset) -> tuple[Tensor, Tensor]:
    """The longest episode: obs [T, N], at most `LONGEST` steps, and act [T, A]."""
    return _episode(data, int(data.lengths.argmax()))


def episodes(data: Dataset) -> list[tuple[Tensor, Tensor]]:
    """The same of every episode that has two observations, the longest first."""
    order = data.lengths.argsort(descending=True, stable=True)
    return [_episode(data, int(e)) for e in order if data.lengths[e] > 1]


def _episode(data: Dataset, e: int) -> tuple[Tensor, Tensor]:
    part = slice(int(data.starts[e]), min(int(data.starts[e + 1]), int(data.starts[e]) + LONGEST))
    return data.obs[part], data.act[part]


# ---------------------------------------------------------------- fitting


def train(
    run: Run, args: Reconstruct, config: Any, data: Dataset, name: str
) -> tuple[list[Dynamics], list[bool], float]:
    """The fitted models, a seed each, whether their losses were finite at the end, and the seconds that all took; those
    that the run already holds are read, an interrupted fit goes on. Raises RunError for a fit that gives no model."""
    models = [config.build(data.spec, devices.generator(seed)) for seed in args.seeds]
    device = devices.pick(args.device)
    for model in models:
        model.to(device)
    kept = run.load(f"fitted-{name}")
    if kept is not None:
        for i, model in enumerate(models):
            own = {k.partition(".")[2]: v for k, v in kept[0].items() if k.startswith(f"{i}.")}
            model.load_state_dict(own)
        return models, kept[1].get("finite", [True] * len(models)), kept[1].get("seconds", 0.0)
    try:
        if isinstance(config, PlrnnConfig):
            finite, seconds = _together(run, args, models, data, name)
        else:
            pairs = zip(models, args.seeds, strict=True)
            each = [_alone(run, args, model, data, f"{name}-{seed}", seed) for model, seed in pairs]
            finite, seconds = [ok for ok, _ in each], sum(spent for _, spent in each)
    except Diverged as error:
        part = "schedule" if isinstance(config, PlrnnConfig) else "fitting"
        raise RunError(f"{name}: {error}; begin again with a smaller --{part}.lr, or --{part}.clip 1") from error
    states = {f"{i}.{k}": v for i, m in enumerate(models) for k, v in m.state_dict().items()}
    run.save(f"fitted-{name}", states, {"seeds": list(args.seeds), "finite": finite, "seconds": seconds})
    return models, finite, seconds


class _Saver:
    """Checkpoints of a fit, one now and then, and the last one of an earlier sitting."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name, self.last = run, f"{name}.partial", time.monotonic()
        self.state, facts = run.load(self.name) or (None, {})
        self.before = facts.get("seconds", 0.0) - run.seconds

    def __call__(self, state: dict[str, Tensor]) -> None:
        if time.monotonic() - self.last > SAVE_EVERY:
            self.run.save(self.name, state, {"seconds": self.seconds})
            self.last = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + self.run.seconds


def _together(run: Run, args: Reconstruct, models: Any, data: Dataset, name: str) -> tuple[list[bool], float]:
    def tell(epoch: int, epochs: int | None, figures: dict[str, float]) -> None:
        run.log(f"fit {name}", epoch, figures)
        run.progress(f"fit {name}", epoch, epochs, figures)

    streams = [devices.generator(1_000 + seed) for seed in args.seeds]
    save = _Saver(run, f"fitted-{name}")
    report = fit_plrnn(models, data, args.schedule, streams, tell, checkpoint=save, resume=save.state)
    facts = {"skipped": sum(report.skipped), "fallbacks": report.fallbacks, "seconds": report.seconds}
    run.log(f"fit {name}, done", report.epochs, facts)
    return [math.isfinite(x) for x in report.loss[-1]], save.seconds


def _alone(run: Run, args: Reconstruct, model: Dynamics, data: Dataset, name: str, seed: int) -> tuple[bool, float]:
    done = run.load(f"part-{name}")
    if done is not None:
        model.load_state_dict(done[0])
        return done[1].get("finite", True), done[1].get("seconds", 0.0)

    def tell(epoch: int, epochs: int | None, figures: dict[str, float]) -> None:
        run.log(f"fit {name}", epoch, figures)
        run.progress(f"fit {name}", epoch, epochs, figures)

    stream, save = devices.generator(1_000 + seed), _Saver(run, f"part-{name}")
    report = fit(model, data, args.fitting, stream, tell, checkpoint=save, resume=save.state)
    finite = all(math.isfinite(x) for x in (*report.best, *report.train_loss[-1:]))
    run.save(f"part-{name}", model.state_dict(), {"finite": finite, "seconds": save.seconds})
    return finite, save.seconds


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
    window = obs[:WINDOW]
    predict = lambda x, n: metrics.forecast(model, x, n, cond=cond, act=act[: len(x)], dt=dt)
    found: dict[str, Any] = metrics.scores(truth, free, None, ahead, generator=stream)
    found["ends"] = ends(free, truth, driven)
    found[f"pe_{ahead}"] = metrics.prediction_error(predict(window, ahead), window).item()
    if driven:
        found["rmse"] = [float(x) for x in (free - truth).square().mean(0).sqrt()]
    else:
        found["lyapunov"] = exponents(model, free, cond, dt)
    if isinstance(model, Plrnn) and not driven and bool(free.isfinite().all()):
        found["fixed_points"] = fixed_points(model, free, cond)
    return found, free


def ends(free: Tensor, truth: Tensor, driven: bool = False) -> str:
    """How a free run [T, N] ends: it "leaves" (is not finite, or far from the truth in its last quarter), stays in a
    "point" (a driven one: where the truth does not), or "moves"."""
    last, same = (x[-max(2, len(x) // 4) :] for x in (free, truth))
    low, high = truth.amin(0), truth.amax(0)
    if not bool(free.isfinite().all()) or bool(((last - (low + high) / 2).abs() > AWAY * (high - low)).any()):
        return "leaves"
    rests = lambda x: bool((x.amax(0) - x.amin(0) < STILL * (high - low)).all())
    return "point" if rests(last) and not (driven and rests(same)) else "moves"


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


def true_exponents(system: Any, seed: int = 0) -> list[float]:
    """The Lyapunov spectrum of a system that is known, per unit of time, the mean over ORBITS orbits of so many of its
    usual steps; at most ten. None of a stiff one: explicit steps of its tangents would be too small."""
    from mbrl_envs.systems import Flow, integrate

    start, dt = system.starts(ORBITS, devices.generator(seed)).double(), system.dt
    if isinstance(system, Flow):
        if system.stiff:
            return []
        if system.transient:
            start = integrate(system, start, 1, system.transient)[:, -1]
        walk = metrics.flow_step(system.field, system.jacobian, dt, min(max(2, round(dt / 0.01)), FINEST))
    else:
        walk = lambda x: (system.step(x), system.jacobian(x))
    k, steps = min(10, system.dim), EXPONENTS // 2
    return metrics.lyapunov_spectrum(walk, start, steps, transient=steps // 5, k=k, dt=dt).mean(0).tolist()


# ---------------------------------------------------------------- the command


def run_reconstruct(args: Reconstruct) -> Run:
    """The command `mbrl reconstruct`; returns the finished run."""
    devices.use_threads(args.threads)
    if args.resume is not None:
        given, run = args, Run.resumed(args.resume, "reconstruct", args.threads, quiet=args.quiet)
        config = run.config
        args = from_plain(config["arguments"], TYPES)
        local = run.local
        args = replace(
            args, data=given.data or local["data"], test=given.test or (local["test"] and Path(local["test"]))
        )
        only_its_own(run, given, args, dynamics=RECONSTRUCTORS)
        args = replace(args, device=local.get("device", given.device), quiet=given.quiet)
        train_set, test_set, system = load(args)
        its, own = config["data"], args.test or args.data
        if train_set.sha256 != its["sha256"]:
            raise RunError(
                f"{args.data}: not the data of {run.folder}; pass --data with the file that it was begun with"
            )
        if test_set.sha256 != its.get("test_sha256", test_set.sha256):
            option = "--data" if args.test is None else "--test"
            raise RunError(
                f"{own}: not what {run.folder} is judged by; pass {option} with the file that it was begun with"
            )
        run.rewind()
        return _go(run, args, train_set, test_set, system)
    _check_settings(args)
    train_set, test_set, system = load(args)
    _check(args, train_set, test_set)
    args = replace(args, seeds=args.seeds or (devices.fresh_seed(),))
    label = "compare" if args.compare else name_of(args.dynamics)
    stem = folder_name(train_set.name.partition("[")[0])
    out = args.out or Path("runs") / stem / f"{label}-{'-'.join(map(str, args.seeds))}"
    file = lambda x: str(Path(x).resolve()) if x is not None and Path(x).exists() else x and str(x)
    local = {"data": file(args.data), "test": file(args.test), "threads": torch.get_num_threads()}
    local["device"] = str(devices.pick(args.device))
    facts = {"name": train_set.name, "sha256": train_set.sha256, "steps": len(train_set), "dt": train_set.dt}
    facts["test_sha256"] = test_set.sha256
    plain = to_plain(replace(args, data=train_set.name, test=None, out=None))
    run = Run.create(out, {"algorithm": label, "data": facts, "arguments": plain}, local, quiet=args.quiet)
    return _go(run, args, train_set, test_set, system)


COUNTS = ("epochs", "batches", "batch", "length", "holdout-max", "patience", "max-epochs", "hidden", "reward-hidden",
          "heads", "bases", "every", "interval")  # at least 1  # fmt: skip
POSITIVE = ("lr", "lr-end", "clip")
SIZES = ("noise", "gain", "latent-decay", "readout-decay", "rectified")  # at least 0


FILES, SYSTEMS = ("test", "holdout", "columns", "inputs"), ("steps", "noise")  # options of the one kind of data


def _numbers(option: str, config: Any) -> Iterator[tuple[str, float]]:
    """The option of every number in a config, and the number."""
    for f in fields(config):
        value, name = getattr(config, f.name), f"{option}.{f.name.replace('_', '-')}"
        if is_dataclass(value):
            yield from _numbers(name, value)
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, int | float) and not isinstance(x, bool):
                yield name, x


def _check_settings(args: Reconstruct) -> None:
    """Raises ValueError for settings that serve with no data."""
    for name in args.compare:
        if name != "all" and name not in RECONSTRUCTORS:
            raise ValueError(f"--compare {name}: expected names among {', '.join(RECONSTRUCTORS)}, or all")
    if args.compare and args.dynamics != RECONSTRUCTORS["plrnn"]:
        own = f"dynamics:{name_of(args.dynamics)} and its settings"
        raise ValueError(
            f"--compare {' '.join(args.compare)}: fits these with their presets; got {own}, which would not be "
            "fitted; leave one of the two out"
        )
    if min(args.seeds, default=0) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))}: expected numbers from 0 on, each once")
    if args.dt is not None and not 0 < args.dt < math.inf:
        raise ValueError(f"--dt {args.dt}: expected a time between samples, above 0")
    if args.steps < 2:
        raise ValueError(f"--steps {args.steps}: expected at least 2")
    if not 0 <= args.noise < math.inf:
        raise ValueError(f"--noise {args.noise}: expected a share of the standard deviation, 0 or more")
    mine, whose = (FILES, "an integrated system") if str(args.data).startswith("system:") else (SYSTEMS, "a file")
    if idle := [f"--{name}" for name in mine if getattr(args, name) != getattr(Reconstruct, name)]:
        raise ValueError(f"{', '.join(idle)}: not for {whose}; leave it out")
    if args.test is not None and args.holdout != Reconstruct.holdout:
        raise ValueError(
            f"--holdout {args.holdout}: not beside --test, which is judged by whole; leave one of the two out"
        )
    parts = {"--schedule": args.schedule, "--fitting": args.fitting, "--dynamics": args.dynamics}
    for option, value in (x for at, config in parts.items() for x in _numbers(at, config)):
        name, least = option.rpartition(".")[2], None
        if name in COUNTS and value < 1:
            least = "at least 1"
        elif name in POSITIVE and not value > 0:
            least = "a number above 0"
        elif name in SIZES and not value >= 0:
            least = "0 or more"
        elif option == "--fitting.holdout" and not 0 < value < 1:
            least = "a share between 0 and 1"
        if least or not math.isfinite(value):
            raise ValueError(f"{option} {value}: expected {least or 'a finite number'}")


def _check(args: Reconstruct, train: Dataset, test: Dataset) -> None:
    """Raises ValueError for what would fail in the course of a run."""
    from mbrl_envs.series import dimensions

    have = min(len(longest(test)[0]), WINDOW)
    if args.ahead < 1 or have <= args.ahead + 1:
        what = (
            f"expected at least 1, and at most {have - 2} for the {have} observations of the test that it is taken over"
        )
        raise ValueError(f"--ahead {args.ahead}: {what}")
    for part, x in (("training", longest(train)[0]), ("test", longest(test)[0])):
        still = (x == x[:1]).all(0).nonzero()[:, 0].tolist()
        if still:
            named = ", ".join(dimensions(train)[i] for i in still)
            raise ValueError(f"{train.name}: the {part} part does not move in {named}; leave it out with --columns")
    configs, device = configs_of(args), devices.pick(args.device)
    for name, config in configs.items():
        _build(args, name, config, train.spec)
    kinds = {name: config.kind for name, config in configs.items() if isinstance(config, PlrnnConfig)}
    if kinds and train.longest < args.schedule.length:
        raise ValueError(
            f"--schedule.length {args.schedule.length}: the longest stretch of the training part has {train.longest} "
            "steps; pass a smaller length, or longer series"
        )
    if args.schedule.solver == "compiled":
        serves = forced.serves(torch.zeros(1, 1, 1, device=device))
        without = [name for name, kind in kinds.items() if not (serves and isinstance(kind, Shallow))]
        if without:
            why = forced.problem() or "it serves shallow PLRNNs on a CPU"
            raise ValueError(f"--schedule.solver compiled: not for {', '.join(without)}: {why}; leave it at auto")
    if len(kinds) < len(configs):
        try:
            Rows(train, args.fitting.length, torch.zeros(1)).split(args.fitting, devices.generator(0))
        except ValueError as error:
            raise ValueError(f"--fitting.length {args.fitting.length}: {error}") from None


def _build(args: Reconstruct, name: str, config: Any, spec: Spec) -> None:
    """Raises ValueError, which names the option where the learner says which of its settings it cannot be built by."""
    try:
        config.build(spec, devices.generator(0))
    except (ValueError, ArithmeticError, RuntimeError) as error:
        said = re.match(r"(\w+): (\w+) is (\S+), (.*)", str(error), re.DOTALL)
        at = {type(x).__name__: option for option, x in _configs("--dynamics", config)}
        if args.compare or said is None or said[1] not in at:
            option = f"--compare {name}" if args.compare else f"dynamics:{name}"
            raise ValueError(f"{option}: {error}") from error
        raise ValueError(f"{at[said[1]]}.{said[2].replace('_', '-')} {said[3]}: {said[4]}") from error


def _configs(option: str, config: Any) -> Iterator[tuple[str, Any]]:
    yield option, config
    for f in fields(config):
        if is_dataclass(getattr(config, f.name)):
            yield from _configs(f"{option}.{f.name.replace('_', '-')}", getattr(config, f.name))


def configs_of(args: Reconstruct) -> dict[str, Any]:
    """What is fitted, by name."""
    names = tuple(RECONSTRUCTORS) if "all" in args.compare else args.compare
    return {n: RECONSTRUCTORS[n] for n in names} or {name_of(args.dynamics): args.dynamics}


def name_of(config: Any) -> str:
    """The learner's name on the command line."""
    kind = lambda x: (type(x), type(getattr(x, "kind", None)), type(getattr(x, "forcing", None)))
    return next((n for n, x in RECONSTRUCTORS.items() if kind(x) == kind(config)), "custom")


def _go(run: Run, args: Reconstruct, data: Dataset, test: Dataset, system: Any) -> Run:
    from mbrl_envs.series import dimensions

    device = devices.pick(args.device)
    data, test = data.to(device, torch.float32), test.to(device, torch.float32)
    configs, dims = configs_of(args), dimensions(data)
    scored = test.name
    if scored == data.name:
        scored += ", another orbit" if system is not None else ", the file of --test"
    if not args.quiet:
        console.print(f"{run.folder}  {in_words(data, dims)}; {', '.join(configs)}, seeds {args.seeds}", **PLAIN)
        console.print(f"scored on {scored}: {len(longest(test)[0])} steps", **PLAIN)
    found: dict[str, list[dict[str, Any]]] = {}
    runs: dict[str, Tensor] = {}
    sizes, seconds = {}, {}
    with run:
        for name, config in configs.items():
            models, finite, spent = train(run, args, config, data, name)
            seconds[name] = round(spent, 1)
            sizes[name] = sum(p.numel() for p in models[0].parameters())
            each = [judge(m, test, args.ahead, seed) for m, seed in zip(models, args.seeds, strict=True)]
            found[name] = [{**scores, "finite_fit": ok} for (scores, _), ok in zip(each, finite, strict=True)]
            runs[name] = each[0][1].cpu()
        run.progress("nulls", 0, 1, {})
        known, (floor, drive), stream = episodes(data.to("cpu")), longest(test.to("cpu")), devices.generator(0)
        if data.spec.act == 0:
            table = nulls.null_table([x for x, _ in known], floor, args.ahead, generator=stream)
        else:
            table = nulls.driven_table(known[0], (floor, drive), args.ahead, generator=stream, more=known[1:])
        run.progress("nulls", 1, 1, {})
        true = None
        if system is not None and data.spec.act == 0:
            run.progress("exponents", 0, 1, {})
            true = true_exponents(system)
            run.progress("exponents", 1, 1, {})
    result = {
        "command": "reconstruct", "dataset": data.name, "test": scored, "sha256": data.sha256,
        "seeds": list(args.seeds), "dimensions": dims, "steps": len(data), "test_steps": len(floor), "dt": data.dt,
        "learners": found, "parameters": sizes, "seconds": seconds, "nulls": table, "true_lyapunov": true,
        "wall_s": round(run.seconds, 1), **machine(), "versions": versions(),
    }  # fmt: skip
    draw(run, run.folder / "report.png", floor, runs, result)
    write_json(run.folder / "result.json", result)
    if not args.quiet:
        tell(result)
    console.print(f"report: {run.folder / 'report.png'}", **PLAIN)
    return run


def in_words(data: Dataset, dims: list[str]) -> str:
    """What the data are, in a line."""
    named = f" ({', '.join(dims)})" if data.meta.get("columns") and len(dims) <= 10 else ""
    inputs = [x for x in data.meta.get("inputs") or () if isinstance(x, str)]
    driven = f" under {', '.join(inputs) or f'{data.spec.act} inputs'}" if data.spec.act else ""
    clock = data.meta.get("time")
    timed = f" (the column {clock!r} is time, and not observed)" if clock else ""
    return f"{data.name}: {len(data)} steps of {data.spec.obs} dimensions{named}{driven}, dt {data.dt:g}{timed}"


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
    keys = [k for k, x in next(iter(learners.values()))[0].items() if isinstance(x, float)]
    extra = ["rmse"] if any("rmse" in rows[0] for rows in learners.values()) else ["lyapunov"]
    title = f"{escape(result['test'])}: medians over {len(result['seeds'])} seeds, T = {result['test_steps']}"
    last = "RMSE" if extra == ["rmse"] else "exponent"
    names, says = zip(*(_heading(k) for k in keys), strict=True)
    also = ["size: parameters", "s: seconds of fitting"]
    also.insert(
        0,
        f"RMSE: of a free run, {escape(result['dimensions'][0])}"
        if last == "RMSE"
        else "exponent: the largest, per unit of time",
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
    for line in failures(learners):
        console.print(line, **PLAIN)
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


def failures(learners: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line for each learner and each way in which some of its seeds failed."""
    out = []
    for name, rows in learners.items():
        count = lambda key, value, rows=rows: sum(r[key] == value for r in rows)
        for many, what in (
            (count("finite_fit", False), "fits are not finite: their losses are nan or infinite"),
            (count("ends", "leaves"), "free runs leave the data's range or are not finite"),
            (count("ends", "point"), "free runs end in a point"),
        ):
            out += [f"{name}: {many} of {len(rows)} {what}"] if many else []
    return out


ENDS = {"leaves": " (leaves)", "point": " (ends in a point)", "moves": ""}


def draw(run: Run, path: Path, test: Tensor, runs: dict[str, Tensor], result: dict[str, Any]) -> None:
    """Attractor, series, spectra, and the fit's course; of each learner the first seed's run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    names, second = result["dimensions"], min(1, test.shape[1] - 1)
    lag = 0 if second else max(1, _lag(test[:, 0]))
    low, high = test.amin(0), test.amax(0)
    room = 0.3 * (high - low)
    show = lambda x: (x[: len(x) - lag or None, 0][:DRAWN], x[lag:, second][:DRAWN])
    colors = {name: f"C{i}" for i, name in enumerate(runs)}
    for i, (name, x) in enumerate({"data": test, **runs}.items()):
        end = "moves" if i == 0 else result["learners"][name][0]["ends"]
        kw = {"color": "0.55" if i == 0 else colors[name], "label": name + ENDS[end]}
        x = torch.where((x - low).abs() < 2 * AWAY * (high - low), x, torch.nan)  # far away is no number to draw
        axes[0, 0].plot(*show(x), lw=0.6, alpha=0.9 if i == 0 else 0.7, **kw)
        axes[0, 1].plot(torch.arange(min(SHOWN, len(x))) * result["dt"], x[:SHOWN, 0], lw=1, **kw)
        if end == "point":
            axes[0, 0].plot(x[-1, 0], x[-1, second], "o", ms=8, mec="black", color=kw["color"], zorder=5)
        if end == "moves":  # others have no spectrum
            axes[1, 0].plot(*_power(x[:, 0], result["dt"]), lw=1, **kw)
    limits = lambda d: (float(low[d] - room[d]), float(high[d] + room[d]))
    other = names[1] if second else f"{names[0]}, {lag} steps later"
    axes[0, 0].set(title="attractor", xlabel=names[0], ylabel=other, xlim=limits(0), ylim=limits(second))
    axes[0, 1].set(title=f"series, {names[0]}", xlabel="time", ylabel=names[0], ylim=limits(0))
    axes[1, 0].set(title=f"power spectrum, {names[0]}", xlabel="frequency", ylabel="share of the power")
    power = _power(test[:, 0], result["dt"])[1]
    axes[1, 0].set(xscale="log", yscale="log", ylim=(float(power.min()) / 5, float(power.max()) * 5))
    for ax in (axes[0, 0], axes[0, 1], axes[1, 0]):
        for line in ax.legend(fontsize=8).get_lines():
            line.set(linewidth=2.5, alpha=1)
    _draw_fits(axes[1, 1], run, colors)
    seed = f", seed {result['seeds'][0]}" if len(result["seeds"]) > 1 else ""
    figure.suptitle(f"{result['test']}, T = {result['test_steps']}{seed}")
    save_figure(figure, path)


def _draw_fits(ax: Any, run: Run, colors: dict[str, str]) -> None:
    """Losses, and on an axis of its own the forcing's strength."""
    from matplotlib.ticker import MaxNLocator

    lines = run.metrics()
    right: Any = None
    for stage in dict.fromkeys(x["stage"] for x in lines if not x["stage"].endswith("done")):
        label = stage.removeprefix("fit ")
        color = colors.get(label) or colors.get(label.rpartition("-")[0])
        for key, style in (("mse", "-"), ("train", "-"), ("holdout", "--"), ("alpha", ":")):
            points = [(x["step"], x[key]) for x in lines if x["stage"] == stage and key in x]
            good = [p for p in points if math.isfinite(p[1]) and (p[1] > 0 or key == "alpha")]
            if not points:
                continue
            if key == "alpha" and right is None:
                right = ax.twinx()
                right.set(ylabel="alpha, the forcing's strength", ylim=(-0.02, 1.05))
            where, kw = right if key == "alpha" else ax, {"marker": "." if len(good) < 10 else None}
            lost = " (not finite)" if not math.isfinite(points[-1][1]) else ""
            x, y = zip(*good, strict=True) if good else ((), ())
            where.plot(x, y, lw=1, ls=style, color=color, label=f"{label}: {key}{lost}", **kw)
    ax.set(title="fit", xlabel="epochs", ylabel="loss")
    if any(len(x.get_xdata()) for x in ax.get_lines()):
        ax.set_yscale("log")
    else:
        ax.text(0.5, 0.5, "no loss is finite", transform=ax.transAxes, ha="center")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [*ax.get_lines(), *(right.get_lines() if right is not None else ())]
    if handles:
        (right or ax).legend(handles, [x.get_label() for x in handles], fontsize=7)


def _lag(x: Tensor) -> int:
    """The first lag at which the autocorrelation has fallen to 1 / e."""
    fallen = metrics.autocorrelation(x[:, None], min(len(x) // 4, 1000))[:, 0] < 0.3679
    return int(fallen.float().argmax()) if bool(fallen.any()) else 1


def _power(x: Tensor, dt: float, parts: int = 8) -> tuple[Tensor, Tensor]:
    """Frequencies and the power spectrum, averaged over stretches (Bartlett), normalised."""
    parts = max(1, min(parts, len(x) // 8))
    n = len(x) // parts
    chunks = (x[: n * parts].double().reshape(parts, n) - x.double().mean()).nan_to_num()
    power = torch.fft.rfft(chunks).abs().square().mean(0)[1:]
    return torch.fft.rfftfreq(n, dt)[1:], (power / power.sum().clamp(min=1e-300)).clamp(min=1e-12)
