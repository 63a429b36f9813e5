"""The command `mbrl meta`: one model for families of systems, which sort themselves, and how it adapts to others."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from mbrl import device as devices
from mbrl.adapt import adapt, predicted, relative_errors, windows
from mbrl.choices import KNOWN, MIXERS, PLAIN, Mixture, by_option, console, refuse, unlike
from mbrl.core import demand
from mbrl.data import Dataset
from mbrl.dynamics.mixer import FIT, Mixer, MixerFit, MixerReport, check, fit_mixer, purity
from mbrl.run import Run, RunError, from_plain, machine, save_figure, to_plain, versions, write_json

ADDED = {"added": True}  # after results were kept: the default does not change what a run is known by


@dataclass(frozen=True)
class Meta:
    """Learn one model of many systems of unknown kinds, and adapt it to new ones by their contexts alone."""

    families: str | None = None
    """A set (four, ten, lotka-volterra, driven), or families by name, joined by commas; or a sequence of `mbrl
    continual`, as in cartpole-pole or Hopper-v5:mass, each of whose tasks is a system."""
    data: tuple[Path, ...] = field(default=(), metadata=ADDED)
    """Instead of families, series as `mbrl reconstruct` reads them, each file of one system. --experts says of how many
    kinds they may be."""
    new: tuple[Path, ...] = field(default=(), metadata=ADDED)
    """Series of systems that are not in training, to adapt to."""
    columns: tuple[str, ...] = field(default=(), metadata=ADDED)
    """Of the files: which are observed, by number or name."""
    inputs: tuple[str, ...] = field(default=(), metadata=ADDED)
    """Of the files: which drive the system."""
    dt: float | None = field(default=None, metadata=ADDED)
    """Time between samples, instead of each file's own."""
    holdout: float = field(default=0.25, metadata=ADDED)
    """Of each file, the last part, to judge by."""
    resume: Path | None = None
    """Continue this run folder where it stopped, to the same numbers."""
    out: Path | None = None
    """The run folder; runs/<families>/<learner>-<seed> by default."""
    seed: int | None = None
    """Drawn, and recorded, where none is given."""
    environments: int | None = None
    """Systems of each family to learn from; by default as many as were published."""
    trajectories: int = 4
    """Of each system, to learn from."""
    steps: int = 2000
    """Transitions of each task of a sequence, to learn from; half as many to judge by, in free runs over whole
    episodes."""
    tests: int = 32
    """Trajectories of each system to judge by."""
    noise: float = 0.0
    """Of the training data, in standard deviations of each dimension."""
    irregular: float = 0.0
    """Each point of the training data is moved in time by up to half of so many intervals, below 1, to either side."""
    shots: int = 1
    """Trajectories of a new system from which the model adapts."""
    adapt_updates: int = 200
    """Steps of that descent."""
    experts: int | None = None
    """By default as many as there are families; a mixture of one expert is a meta-learner."""
    save_every: int = 10
    """Outer steps between checkpoints."""
    fit: MixerFit = FIT
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 is torch's own choice."""
    quiet: bool = False
    dynamics: Mixture = field(default_factory=lambda: MIXERS["mixer"])  # pyright: ignore[reportInvalidTypeForm]
    """The mixture; its settings follow its name."""


TYPES = (*KNOWN, Meta, MixerFit)


@dataclass(frozen=True)
class Data:
    train: Dataset
    test: Dataset
    labels: list[str]  # "family:index" of each system
    new: tuple[Dataset, Dataset] | None  # to adapt by, and to judge by
    new_labels: list[str]
    sorts: bool = True  # whether the labels tell of which kind a system is


def run_meta(args: Meta) -> Run:
    """The command; returns the finished run."""
    devices.use_threads(args.threads)
    if args.resume is not None:
        run = Run.resumed(args.resume, "meta", args.threads, quiet=args.quiet)
        args = _resumed(run, args)
        data = load(args)
        if args.data and shas(data) != run.config["data"]["sha256"]:
            files = " ".join(map(str, args.data + args.new))
            raise RunError(f"{run.folder}: {files} are not the files that it was begun with; put those back")
        run.rewind()
    else:
        _check(args)
        given = args.dynamics
        args = replace(args, seed=devices.fresh_seed() if args.seed is None else args.seed)
        data = load(args)
        args = replace(args, dynamics=sized(args, data))
        if args.dynamics.experts == 1 and args.experts is None and not args.quiet and "meta" not in name_of(given):
            console.print("one family, hence one expert, which is a meta-learner; --experts N takes more")
        fit_mixer(  # raises for what would fail in the course of the run
            args.dynamics.build(data.train.spec, devices.generator(0)), data.train, replace(args.fit, outer=0),
            devices.generator(0),
        )  # fmt: skip
        for i in range(data.new[0].systems if data.new else 0):
            assert data.new is not None
            windows(data.new[0], i, torch.zeros(1), args.fit.length)
        name = (args.families or "+".join(x.stem for x in args.data)[:80]).replace(",", "+").replace(":", "_")
        out = args.out or Path("runs") / name / f"{name_of(args.dynamics)}-{args.seed}"
        local = {"device": str(devices.pick(args.device)), "threads": torch.get_num_threads()}
        local |= {k: [str(x.resolve()) for x in getattr(args, k)] for k in ("data", "new")}
        files = {k: tuple(str(x) for x in getattr(args, k)) for k in ("data", "new")}
        plain = to_plain(replace(args, out=None, quiet=False, **files))
        facts = {"name": data.train.name, "sha256": shas(data), "systems": data.train.systems}
        run = Run.create(out, {"algorithm": "meta", "data": facts, "arguments": plain}, local, quiet=args.quiet)
    with run:
        result = _go(run, args, data)
    if not args.quiet:
        tell(result)
    console.print(f"report: {run.folder / 'report.png'}", **PLAIN)
    return run


def _resumed(run: Run, given: Meta) -> Meta:
    """The run's own settings. Raises RunError for options that are none of them."""
    old, paths = from_plain(run.config["arguments"], TYPES), ("data", "new")
    old = replace(old, **{k: tuple(Path(x) for x in run.local.get(k, ())) for k in paths})
    asked = replace(given, **{k: tuple(x.resolve() for x in getattr(given, k)) for k in paths})
    mine, its = by_option(asked), by_option(old)
    its |= {"--device": run.local["device"], "--out": run.folder.resolve()}
    kind = lambda config: (type(config.expert), config.gating)  # of one expert a mixture has another name
    one = given.dynamics.experts == 1 < old.dynamics.experts
    if one or kind(given.dynamics) != kind(old.dynamics):
        mine = {k: v for k, v in mine.items() if not k.startswith("--dynamics.")}
        if given.dynamics != MIXERS["mixer"]:
            mine["dynamics:"], its["dynamics:"] = name_of(given.dynamics), name_of(old.dynamics)
    usual = by_option(Meta(dynamics=MIXERS[name_of(given.dynamics)]))
    refuse(run, unlike(mine, usual, its))
    return replace(old, quiet=given.quiet, device=run.local["device"])


def shas(data: Data) -> list[str]:
    """Of all data of a run: to learn from, to judge by, to adapt by."""
    return [x.sha256 for x in (data.train, data.test, *(data.new or ()))]


def name_of(config: Any) -> str:
    """By what it is, however its sizes were set."""
    if config.gating != "solved":
        return {"gradient": "naive-gate", "own": "separate"}[config.gating]
    if config.experts == 1:
        return "meta-learner"
    return next(n for n, x in MIXERS.items() if type(x.expert) is type(config.expert))


def _check(args: Meta) -> None:
    """Raises ValueError for settings that cannot be."""
    if (args.families is None) == (not args.data):
        which = "are both given; leave one out" if args.data else "are missing; give one of them"
        raise ValueError(
            f"--families and --data {which}: four, ten, lotka-volterra, driven, families by name, or files of series"
        )
    least = {"trajectories": 1, "steps": 2, "tests": 1, "shots": 1, "adapt_updates": 0, "save_every": 1, "experts": 1}
    for name, low in least.items():
        if (got := getattr(args, name)) is not None and got < low:
            raise ValueError(f"--{name.replace('_', '-')} {got}: expected at least {low}")
    demand("--fit", ("outer", args.fit.outer, "at least 1", args.fit.outer >= 1))
    check(args.fit)
    if args.seed is not None and not 0 <= args.seed <= 2**62:
        raise ValueError(f"--seed {args.seed}: expected 0 to 2^62")
    if args.dynamics.experts != (usual := MIXERS[name_of(args.dynamics)].experts):
        raise ValueError(
            f"--dynamics.experts {args.dynamics.experts}: the number of experts is an option of the command, and not "
            f"of the learner (which has {usual}): pass --experts {args.dynamics.experts}"
        )
    name = name_of(args.dynamics)
    if args.experts is not None and name in ("separate", "meta-learner"):
        raise ValueError(f"--experts {args.experts}: not for {name}; leave it out, or take dynamics:mixer")
    if name not in ("separate", "meta-learner", "naive-gate") and args.fit.outer <= args.fit.warm:
        raise ValueError(
            f"--fit.outer {args.fit.outer}: systems change places after the first {args.fit.warm} outer steps "
            "(--fit.warm); pass more, or a smaller --fit.warm"
        )
    names = [str(x) for x in args.data + args.new] or str(args.families).split(",")
    if len(set(names)) < len(names):
        raise ValueError(f"{'--data' if args.data else '--families'} {' '.join(names)}: expected each once")
    apart = ("environments", "trajectories", "tests", "noise", "irregular")
    if args.data:
        _refuse(args, "files of series", (*apart, "steps", "shots"))
        if args.experts is None and args.dynamics.experts > 1 and args.dynamics.gating != "own":
            raise ValueError("--experts is missing: of how many kinds the systems of files are is not known")
        if not 0 < args.holdout < 1:
            raise ValueError(f"--holdout {args.holdout}: expected a share between 0 and 1")
        if args.dt is not None and not 0 < args.dt < math.inf:
            raise ValueError(f"--dt {args.dt}: expected a time between samples, above 0")
        return
    sequence = is_sequence(str(args.families))
    _refuse(args, args.families, (*(() if sequence else ("steps",)), "new", "columns", "inputs", "dt", "holdout"))
    if sequence:
        _refuse(args, f"{args.families}, which is of a simulator", (*apart, "shots"))


def _refuse(args: Meta, what: Any, names: tuple[str, ...]) -> None:
    """Raises ValueError where options are given that do nothing there."""
    given = [f"--{k.replace('_', '-')}" for k in names if getattr(args, k) != getattr(Meta, k)]
    if given:
        raise ValueError(f"{', '.join(given)}: not for {what}; leave it out")


def is_sequence(name: str) -> bool:
    from mbrl_envs import contexts

    return name in contexts.SEQUENCES or name.count(":") == 1


def sized(args: Meta, data: Data) -> Any:
    """The mixture with as many experts as were asked for."""
    config, families = args.dynamics, len(dict.fromkeys(kinds(data.labels)))
    own = data.train.systems if config.gating == "own" else 1 if config.experts == 1 else families
    width = max(config.width, data.train.systems) if config.gating == "own" else config.width
    return replace(config, experts=args.experts or own, width=width)


def kinds(labels: list[str]) -> list[str]:
    """The family of each system, by its label."""
    return [x.rpartition(":")[0] for x in labels]


def load(args: Meta) -> Data:
    """The data of a run: from its seed alone, or from files. Raises ValueError for families that there are not, and
    for files that cannot stand together."""
    from mbrl_envs import contexts, families
    from mbrl_envs.scores import close_matches

    assert args.seed is not None
    if args.data:
        return _read(args)
    assert args.families is not None
    seed = int(np.random.SeedSequence([args.seed, 3]).generate_state(1)[0] // 2)
    if is_sequence(args.families):
        train, labels = families.robots(args.families, args.steps, seed)
        test, _ = families.robots(args.families, args.steps // 2, seed + 1)
        return Data(train, test, labels, None, [])
    names = [args.families] if args.families in families.SETS else args.families.split(",")
    if wrong := [x for x in names if x not in families.SETS and x not in families.FAMILIES]:
        raise ValueError(
            f"--families: there is no {wrong[0]!r}{close_matches(wrong[0], families.FAMILIES)}; expected a set "
            f"({', '.join(families.SETS)}), families ({', '.join(families.FAMILIES)}), or a sequence of tasks "
            f"({', '.join(contexts.SEQUENCES)}, or as in Hopper-v5:mass)"
        )
    of = lambda split, n: [e for name in names for e in families.environments(name, split, n)]
    envs, others = of("train", args.environments), of("adapt", None)
    if len(envs) > len({e.label for e in envs}):
        raise ValueError(f"--families {args.families}: a set holds what is named beside it; expected each family once")
    make = lambda e, n, k, **kw: families.generate(e, n, seed + k, **kw)
    seen = {"noise": args.noise, "irregular": args.irregular}
    train, test = make(envs, args.trajectories, 0, **seen), make(envs, args.tests, 1)
    new = make(others, args.shots, 2, **seen), make(others, args.tests, 3)
    return Data(train, test, [e.label for e in envs], new, [e.label for e in others])


def functions_of(args: Meta, env_id: str) -> tuple[Any, Any]:
    """(reward, terminal) of the sequence's tasks in that environment, each None where it is not known."""
    from mbrl_envs import contexts

    if args.families is None or not is_sequence(args.families):
        return None, None
    task = contexts.tasks(args.families)[0]
    return (task.reward, task.terminal) if task.id == env_id else (None, None)


def _read(args: Meta) -> Data:
    """Files, each of one system: the first part to learn from or to adapt by, the last to judge by."""
    from mbrl_envs import series

    number = lambda names: [int(x) if x.removeprefix("-").isdecimal() else x for x in names] or None
    read = lambda path: series.read_series(path, number(args.columns), number(args.inputs), dt=args.dt)
    every = series.alike([read(x) for x in (*args.data, *args.new)])
    halves, many = [_halves(x, args.holdout) for x in every], len(args.data)

    def whole(part: int, some: slice) -> Dataset:
        parts = [x[part] for x in halves[some]]
        return series.mixed(parts, "+".join(x.stem for x in (*args.data, *args.new)[some]), {"kind": "series"})

    paths = (*args.data, *args.new)
    once = len({x.stem for x in paths}) == len(paths)
    labels = [f"{x.stem if once else x}:{i}" for i, x in enumerate(paths)]
    first, rest = slice(0, many), slice(many, None)
    new = (whole(0, rest), whole(1, rest)) if args.new else None
    return Data(whole(0, first), whole(1, first), labels[first], new, labels[rest], False)


def _halves(data: Dataset, holdout: float) -> tuple[Dataset, Dataset]:
    """A file of several episodes is cut between two of them, at least one on either side."""
    from mbrl_envs import series

    if data.episodes == 1:
        try:
            return series.split(data, 1 - holdout)
        except ValueError:
            raise ValueError(
                f"{data.name}: {len(data)} rows cannot be cut in two by --holdout {holdout}; expected at least two on "
                "either side: leave the file out, or pass another --holdout"
            ) from None
    first = min(max(1, round((1 - holdout) * data.episodes)), data.episodes - 1)
    at = int(data.starts[first])
    return series.cut(data, 0, at), series.cut(data, at)


# ---------------------------------------------------------------- the run


def _go(run: Run, args: Meta, data: Data) -> dict[str, Any]:
    assert args.seed is not None
    device = devices.pick(args.device)
    train = data.train.to(device, torch.float32)
    model = args.dynamics.build(train.spec, devices.generator(args.seed)).to(device)
    kept = run.load("fit")

    def tell_step(outer: int, of: int | None, figures: dict[str, float]) -> None:
        run.log("fit", outer, figures)
        run.progress("fit", outer, of, figures)

    def keep(state: dict[str, Tensor]) -> None:
        if int(state["counts"][0]) % args.save_every == 0 or int(state["counts"][0]) == args.fit.outer:
            run.save("fit", state, {})

    report = fit_mixer(
        model, train, args.fit, devices.generator(args.seed + 1), tell_step, checkpoint=keep,
        resume=None if kept is None else {k: v.to(device) if k != "generator" else v for k, v in kept[0].items()},
    )  # fmt: skip
    model.requires_grad_(False)
    result = judged(args, data, model, report, lambda i, of: run.progress("adapt", i, of, {}))
    result |= {"wall_s": round(run.seconds, 1), **machine(), "versions": versions()}
    changes = data.train.next_obs - data.train.obs
    facts: dict[str, Any] = {"systems": train.systems, "dt": train.dt}
    facts |= {k: getattr(train, k).tolist() for k in ("act_low", "act_high")}
    facts |= {"scale": changes[data.train.paired].square().mean(0).tolist()}
    run.save("model", model.state_dict(), facts)
    draw(run.folder / "report.png", result, data, model)
    write_json(run.folder / "result.json", result)
    return result


def judged(
    args: Meta, data: Data, model: Mixer, report: MixerReport, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """What a fit has come to: errors by system and family beside those of models that know nothing, purity where it
    means something, and how it adapts. progress: (systems that were adapted to, all)."""
    table = model.contexts.detach()
    errors = relative_errors(model, data.test, table)
    chosen, truth = model.chosen(table).tolist(), kinds(data.labels)
    followed = torch.cat([x.followed for x in (data.test, *(data.new or ())[1:])])
    tells = data.sorts and len(set(truth)) > 1 and model.config.gating != "own" and model.config.experts > 1
    found: dict[str, Any] = {
        "families": args.families, "learner": name_of(args.dynamics), "experts": model.config.experts,
        "seed": args.seed, "parameters": sum(p.numel() for p in model.parameters()), "labels": data.labels,
        "assigned": chosen, "purity": purity(chosen, truth) if tells else None, "errors": errors.tolist(),
        "nulls": nulls(data.test, data.train).tolist(),
        "steps": [int(followed.min()), int(followed.max())],
        "loss": report.loss, "assignments": report.assigned, "solved": report.solved, "passed": report.passed,
        "skipped": report.skipped, "fit_s": round(report.seconds, 1),
    }  # fmt: skip
    if data.new is not None and model.config.gating != "own":
        contexts, served, shares = [], [], []
        groups = model.chosen(table)
        for i in range(data.new[0].systems):
            seen = windows(data.new[0], i, table, args.fit.length)
            got = adapt(model, seen, groups=groups, updates=args.adapt_updates, keep=4)
            expert = model.chosen(got.tried)
            contexts.append(got.ctx)
            served.append(int(expert[0]))
            shares.append(min(1.0, float(got.share[expert == expert[0]].sum())))
            if progress is not None:
                progress(i + 1, data.new[0].systems)
        new = relative_errors(model, data.new[1], torch.cat(contexts))
        found |= {
            "new_labels": data.new_labels, "new_errors": new.tolist(), "new_assigned": served, "confidence": shares,
            "new_contexts": torch.cat(contexts).tolist(), "new_nulls": nulls(data.new[1], data.new[0]).tolist(),
        }  # fmt: skip
    return found


def nulls(test: Dataset, train: Dataset) -> Tensor:
    """[systems]: the relative squared error, as of `relative_errors`, of what does not know the system: the lesser of
    those of staying at a trajectory's first observation and at the mean of the system's data in `train`."""
    whose = torch.zeros(test.episodes, dtype=torch.int64) if test.system is None else test.system
    some = test.paired[:, None]
    means = [train.obs[i].double().mean(0) for i in train.of_system(torch.arange(len(train)))]
    first = test.obs[test.starts[:-1]].double()  # [E, O]
    after = torch.where(some, test.next_obs.double(), 0.0)
    total = lambda x: torch.zeros(test.episodes, dtype=x.dtype).index_add_(0, test.episode, x.sum(1))
    scale, out = total(after.square()), []
    for guess in (first, torch.stack(means)[whose]):
        gap = torch.where(some, guess[test.episode] - after, 0.0)
        error = total(gap.square()) / scale
        mean = torch.zeros(test.systems, dtype=error.dtype).index_add_(0, whose, error)
        out.append(mean / torch.bincount(whose, minlength=test.systems))
    return torch.minimum(*out)


def by_family(labels: list[str], values: list[float]) -> dict[str, float]:
    """The mean of each family's systems."""
    found: dict[str, list[float]] = {}
    for label, x in zip(kinds(labels), values, strict=True):
        found.setdefault(label, []).append(x)
    return {k: float(np.mean(v)) for k, v in found.items()}


def tell(result: dict[str, Any]) -> None:
    words = Table("family", "systems", "served by expert", "error", "adapted", "null")
    words.title = f"{result['families'] or 'files'}, {result['learner']}"
    nulls = by_family(result["labels"], result["nulls"])
    adapted_by: dict[str, list[int]] = {}
    for label, expert in zip(kinds(result.get("new_labels", [])), result.get("new_assigned", []), strict=True):
        adapted_by.setdefault(label, []).append(expert)
    adapted = by_family(result["new_labels"], result["new_errors"]) if "new_errors" in result else {}
    for family, error in by_family(result["labels"], result["errors"]).items():
        mine = [a for a, k in zip(result["assigned"], kinds(result["labels"]), strict=True) if k == family]
        served = ", ".join(f"{e}" for e in dict.fromkeys(mine))
        if others := sorted(set(adapted_by.get(family, ())) - set(mine)):
            served += f" (new: {', '.join(map(str, others))})"
        other = f"{adapted[family]:.3g}" if family in adapted else "-"
        words.add_row(family, str(len(mine)), served, f"{error:.3g}", other, f"{nulls[family]:.3g}")
    for family in [x for x in adapted if x not in nulls]:
        served = ", ".join(str(e) for e in dict.fromkeys(adapted_by[family]))
        null = by_family(result["new_labels"], result["new_nulls"])[family]
        words.add_row(family, "new", served, "-", f"{adapted[family]:.3g}", f"{null:.3g}")
    steps = " to ".join(str(n) for n in dict.fromkeys(result["steps"]))
    words.caption = (
        f"error: |x' - x|^2 / |x|^2 of free runs over test trajectories, of {steps} steps each; adapted: of new "
        "systems, by their contexts alone; null: of staying at the start or at the data's mean, whichever errs less"
    )
    console.print(words)
    pure = "-" if result["purity"] is None else f"{result['purity']:.3g}"
    console.print(
        f"purity {pure} with {result['experts']} experts, {result['parameters']} parameters, fit in "
        f"{result['fit_s']:.0f} s"
    )


def draw(path: Path, result: dict[str, Any], data: Data, model: Mixer) -> None:
    """Contexts in the plane, free runs, errors by family, and the fit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families = list(dict.fromkeys(kinds(result["labels"] + result.get("new_labels", []))))
    known = by_family(result["labels"], result["errors"])
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    ax, table = axes[0, 0], model.contexts.detach().cpu().double()
    centre = table.mean(0)
    basis = torch.linalg.svd(table - centre, full_matrices=False).Vh[:2].T
    basis = torch.nn.functional.pad(basis, (0, 2 - basis.shape[1]))  # of one number, a line
    plane = lambda x: ((x - centre) @ basis).numpy()
    marks, colors = "osD^v<>PX*", plt.get_cmap("tab10")
    for i, family in enumerate(families):
        mine = [n for n, k in enumerate(kinds(result["labels"])) if k == family]
        tint = [colors(result["assigned"][n] % 10) for n in mine]
        ax.scatter(*plane(table[mine].reshape(-1, table.shape[1])).T, c=tint, marker=marks[i % 10], s=45)
        ax.scatter([], [], c="gray", marker=marks[i % 10], label=family)
        if "new_contexts" in result and family in kinds(result["new_labels"]):
            new = [n for n, k in enumerate(kinds(result["new_labels"])) if k == family]
            where = plane(torch.tensor(result["new_contexts"], dtype=torch.float64)[new])
            tint = [colors(result["new_assigned"][n] % 10) for n in new]
            ax.scatter(*where.T, facecolors="none", edgecolors=tint, marker=marks[i % 10], s=45)
    ax.set(title="contexts: shape family, colour expert, hollow adapted", xlabel="first component", ylabel="second")
    ax.legend(fontsize=7)
    ax = axes[0, 1]
    for i, family in enumerate(known):
        n = kinds(result["labels"]).index(family)
        segment = windows(data.test, n, model.contexts, None, 1)
        said = predicted(model, segment, model.contexts[n : n + 1])
        a, b = segment.obs[0].cpu().numpy(), said[0].detach().cpu().numpy()
        last = min(1, a.shape[1] - 1)
        ax.plot(a[:, 0], a[:, last], color=colors(i % 10), lw=3, alpha=0.3)
        ax.plot(b[:, 0], b[:, last], color=colors(i % 10), lw=1, ls="--", label=family)
    ax.set(
        title="a test trajectory of each family: truth wide, model dashed", xlabel="first dimension", ylabel="second"
    )
    ax.legend(fontsize=7)
    ax, where = axes[1, 0], np.arange(len(families))
    ax.bar(where - 0.2, [known.get(k, np.nan) for k in families], 0.4, label="systems of training")
    if "new_errors" in result:
        new = by_family(result["new_labels"], result["new_errors"])
        ax.bar(where + 0.2, [new.get(k, np.nan) for k in families], 0.4, label="new systems, adapted")
    nulls = by_family(result["labels"], result["nulls"])
    if "new_nulls" in result:
        nulls = by_family(result["new_labels"], result["new_nulls"]) | nulls
    ax.plot(where, [nulls[k] for k in families], "k_", ms=14, label="null")
    ax.set_xticks(where, families, rotation=45, ha="right")
    ax.set(title="relative squared error of free runs", yscale="log")
    ax.legend(fontsize=8)
    ax = axes[1, 1]
    ax.plot(np.arange(1, len(result["loss"]) + 1), result["loss"], lw=1)
    ax.set(title="the fit", xlabel="outer step", ylabel="loss, relative", yscale="log")
    other, truth = ax.twinx(), kinds(result["labels"])
    told = result["purity"] is not None
    value = (lambda to: purity(to, truth)) if told else (lambda to: len(set(to)))
    steps_, course = zip(*[(at, value(to)) for at, to in result["assignments"]], strict=True)
    other.step([*steps_, len(result["loss"])], [*course, course[-1]], where="post", color="C1")
    other.set_ylim(0, 1.05 * (1 if told else result["experts"]))
    other.set_ylabel("purity" if told else "experts in use", color="C1")
    figure.suptitle(f"{result['families'] or 'files'}, {result['learner']}, seed {result['seed']}")
    save_figure(figure, path)
