"""The command `mbrl meta`: one model for families of systems, which sort themselves, and how it adapts to others."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from mbrl import device as devices
from mbrl.adapt import adapt, predicted, relative_errors, windows
from mbrl.choices import KNOWN, MIXERS, PLAIN, Mixture, console
from mbrl.data import Dataset
from mbrl.dynamics.mixer import Mixer, MixerFit, MixerReport, fit_mixer, purity
from mbrl.run import Run, RunError, from_plain, machine, save_figure, to_plain, versions, write_json

FIT = MixerFit(
    length=10, lr=3e-3, lr_context=1e-2, assign="hungarian", warm=20, restarts=10, guard=1.1
)  # what was measured to work; MixerFit() has the published choices


@dataclass(frozen=True)
class Meta:
    """Learn one model of many systems of unknown kinds, and adapt it to new ones by their contexts alone."""

    families: str | None = None
    """A set (four, ten, lotka-volterra, driven), or families by name, joined by commas; or a sequence of `mbrl
    continual`, as in cartpole-pole or Hopper-v5:mass, each of whose tasks is a system."""
    resume: Path | None = None
    """Continue this run folder where it stopped, to the same numbers."""
    out: Path | None = None
    """The run folder; runs/<families>/<learner>-<seed> by default."""
    seed: int | None = None
    """Drawn, and recorded, where none is given."""
    environments: int | None = None
    """Systems of each family; by default as many as were published."""
    trajectories: int = 4
    """Of each system, to learn from."""
    steps: int = 2000
    """Transitions of each task of a sequence."""
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
    """By default as many as there are families."""
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


def run_meta(args: Meta) -> Run:
    """The command; returns the finished run."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.resume is not None:
        run = Run.resumed(args.resume, "meta", args.threads, quiet=args.quiet)
        old = from_plain(run.config["arguments"], TYPES)
        if args.families not in (None, old.families):
            raise RunError(f"{args.resume}: is of {old.families}; it cannot go on with {args.families}")
        run.rewind()
        args = replace(old, quiet=args.quiet, device=run.local["device"])
        data = load(args)
    else:
        _check(args)
        args = replace(args, seed=devices.fresh_seed() if args.seed is None else args.seed)
        data = load(args)
        args = replace(args, dynamics=sized(args, data))
        fit_mixer(  # raises for what would fail in the course of the run
            args.dynamics.build(data.train.spec, devices.generator(0)), data.train, replace(args.fit, outer=0),
            devices.generator(0),
        )  # fmt: skip
        name = (args.families or "").replace(",", "+").replace(":", "_")
        out = args.out or Path("runs") / name / f"{name_of(args.dynamics)}-{args.seed}"
        local = {"device": str(devices.pick(args.device)), "threads": torch.get_num_threads()}
        plain = to_plain(replace(args, out=None, quiet=False))
        run = Run.create(out, {"algorithm": "meta", "arguments": plain}, local, quiet=args.quiet)
    with run:
        result = _go(run, args, data)
    if not args.quiet:
        tell(result)
    console.print(f"report: {run.folder / 'report.png'}", **PLAIN)
    return run


def name_of(config: Any) -> str:
    """By what it is, however its sizes were set."""
    if config.gating != "solved":
        return {"gradient": "naive-gate", "own": "separate"}[config.gating]
    if config.experts == 1:
        return "meta-learner"
    return next(n for n, x in MIXERS.items() if type(x.expert) is type(config.expert))


def _check(args: Meta) -> None:
    if args.families is None:
        raise ValueError("--families is missing; expected four, ten, lotka-volterra, driven, or families by name")
    least = {"trajectories": 1, "steps": 2, "tests": 1, "shots": 1, "adapt_updates": 0, "save_every": 1}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {low}")
    fit = args.fit
    if min(fit.outer, fit.inner, fit.batch, fit.gate_every) < 1 or not 0 < fit.lr < 1 or not 0 < fit.lr_context < 1:
        got = f"outer {fit.outer}, inner {fit.inner}, batch {fit.batch}, gate-every {fit.gate_every}"
        raise ValueError(f"--fit: got {got}, lr {fit.lr}, {fit.lr_context}: expected at least 1, rates in (0, 1)")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected at least 0")


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
    """The data of a run: from its seed alone. Raises ValueError for families that there are not."""
    from mbrl_envs import contexts, families

    assert args.seed is not None
    assert args.families is not None
    seed = int(np.random.SeedSequence([args.seed, 3]).generate_state(1)[0] // 2)
    if args.families in contexts.SEQUENCES or args.families.count(":") == 1:
        if args.irregular or args.noise:
            raise ValueError(f"--irregular, --noise: of families of equations; {args.families} is of a simulator")
        train, labels = families.robots(args.families, args.steps, seed)
        test, _ = families.robots(args.families, args.steps // 2, seed + 1)
        return Data(train, test, labels, None, [])
    names = [args.families] if args.families in families.SETS else args.families.split(",")
    of = lambda split, n: [e for name in names for e in families.environments(name, split, n)]
    envs, others = of("train", args.environments), of("adapt", None)
    make = lambda e, n, k, **kw: families.generate(e, n, seed + k, **kw)
    seen = {"noise": args.noise, "irregular": args.irregular}
    train, test = make(envs, args.trajectories, 0, **seen), make(envs, args.tests, 1)
    new = make(others, args.shots, 2, **seen), make(others, args.tests, 3)
    return Data(train, test, [e.label for e in envs], new, [e.label for e in others])


# ---------------------------------------------------------------- the run


def _go(run: Run, args: Meta, data: Data) -> dict[str, Any]:
    assert args.seed is not None
    began, device = time.perf_counter(), devices.pick(args.device)
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
    result = judged(args, data, model, report)
    result |= {"wall_s": round(time.perf_counter() - began, 1), **machine(), "versions": versions()}
    run.save("model", model.state_dict(), {})
    draw(run.folder / "report.png", result, data, model)
    write_json(run.folder / "result.json", result)
    return result


def judged(args: Meta, data: Data, model: Mixer, report: MixerReport) -> dict[str, Any]:
    """What a fit has come to: errors by system and family, purity, and how it adapts."""
    table = model.contexts.detach()
    errors = relative_errors(model, data.test, table)
    chosen = model.chosen(table).tolist()
    found: dict[str, Any] = {
        "families": args.families, "learner": name_of(args.dynamics), "experts": model.config.experts,
        "seed": args.seed, "parameters": sum(p.numel() for p in model.parameters()), "labels": data.labels,
        "assigned": chosen, "purity": purity(chosen, kinds(data.labels)), "errors": errors.tolist(),
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
            shares.append(float(got.share[expert == expert[0]].sum()))
        new = relative_errors(model, data.new[1], torch.cat(contexts))
        found |= {
            "new_labels": data.new_labels, "new_errors": new.tolist(), "new_assigned": served, "confidence": shares,
            "new_contexts": torch.cat(contexts).tolist(),
        }  # fmt: skip
    return found


def by_family(labels: list[str], values: list[float]) -> dict[str, float]:
    """The mean of each family's systems."""
    found: dict[str, list[float]] = {}
    for label, x in zip(kinds(labels), values, strict=True):
        found.setdefault(label, []).append(x)
    return {k: float(np.mean(v)) for k, v in found.items()}


def tell(result: dict[str, Any]) -> None:
    words = Table(
        "family", "systems", "experts", "error", "adapted", title=f"{result['families']}, {result['learner']}"
    )
    adapted = by_family(result["new_labels"], result["new_errors"]) if "new_errors" in result else {}
    for family, error in by_family(result["labels"], result["errors"]).items():
        mine = [a for a, k in zip(result["assigned"], kinds(result["labels"]), strict=True) if k == family]
        served = ", ".join(f"{e}" for e in dict.fromkeys(mine))
        words.add_row(family, str(len(mine)), served, f"{error:.3g}", f"{adapted[family]:.3g}" if adapted else "-")
    words.caption = "error: |x' - x|^2 / |x|^2 of free runs over test trajectories; adapted: new systems, by contexts"
    console.print(words)
    console.print(
        f"purity {result['purity']:.3g} with {result['experts']} experts, {result['parameters']} parameters, fit in "
        f"{result['fit_s']:.0f} s"
    )


def draw(path: Path, result: dict[str, Any], data: Data, model: Mixer) -> None:
    """Contexts in the plane, free runs, errors by family, and the fit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families = list(dict.fromkeys(kinds(result["labels"])))
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    ax, table = axes[0, 0], model.contexts.detach().cpu().double()
    centre = table.mean(0)
    basis = torch.linalg.svd(table - centre, full_matrices=False).Vh[:2].T
    plane = lambda x: ((x - centre) @ basis).numpy()
    marks, colors = "osD^v<>PX*", plt.get_cmap("tab10")
    for i, family in enumerate(families):
        mine = [n for n, k in enumerate(kinds(result["labels"])) if k == family]
        tint = [colors(result["assigned"][n] % 10) for n in mine]
        ax.scatter(*plane(table[mine]).T, c=tint, marker=marks[i % 10], s=45)
        ax.scatter([], [], c="gray", marker=marks[i % 10], label=family)
        if "new_contexts" in result:
            new = [n for n, k in enumerate(kinds(result["new_labels"])) if k == family]
            where = plane(torch.tensor(result["new_contexts"], dtype=torch.float64)[new])
            tint = [colors(result["new_assigned"][n] % 10) for n in new]
            ax.scatter(*where.T, facecolors="none", edgecolors=tint, marker=marks[i % 10], s=45)
    ax.set(title="contexts: shape family, colour expert, hollow adapted", xlabel="first component", ylabel="second")
    ax.legend(fontsize=7)
    ax = axes[0, 1]
    for i, family in enumerate(families):
        n = kinds(result["labels"]).index(family)
        segment = windows(data.test, n, model.contexts, None, 1)
        said = predicted(model, segment, model.contexts[n : n + 1])
        a, b = segment.obs[0].cpu().numpy(), said[0].detach().cpu().numpy()
        last = min(1, a.shape[1] - 1)
        ax.plot(a[:, 0], a[:, last], color=colors(i % 10), lw=3, alpha=0.3)
        ax.plot(b[:, 0], b[:, last], color=colors(i % 10), lw=1, ls="--", label=family)
    ax.set(title="a test trajectory of each family: truth wide, model dashed", xlabel="x", ylabel="y")
    ax.legend(fontsize=7)
    ax, where = axes[1, 0], np.arange(len(families))
    ax.bar(where - 0.2, list(by_family(result["labels"], result["errors"]).values()), 0.4, label="systems of training")
    if "new_errors" in result:
        new = list(by_family(result["new_labels"], result["new_errors"]).values())
        ax.bar(where + 0.2, new, 0.4, label="new systems, adapted")
    ax.set_xticks(where, families, rotation=45, ha="right")
    ax.set(title="relative squared error of free runs", yscale="log")
    ax.legend(fontsize=8)
    ax = axes[1, 1]
    ax.plot(np.arange(1, len(result["loss"]) + 1), result["loss"], lw=1)
    ax.set(title="the fit", xlabel="outer step", ylabel="loss, relative", yscale="log")
    other = ax.twinx()
    truth = kinds(result["labels"])
    steps_, pure = zip(*[(at, purity(to, truth)) for at, to in result["assignments"]], strict=True)
    other.step([*steps_, len(result["loss"])], [*pure, pure[-1]], where="post", color="C1")
    other.set_ylim(0, 1.05)
    other.set_ylabel("purity", color="C1")
    figure.suptitle(f"{result['families']}, {result['learner']}, seed {result['seed']}")
    save_figure(figure, path)
