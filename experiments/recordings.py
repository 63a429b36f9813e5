"""Sparse recordings: what a student that sees a network's outputs and some of its units finds of the others.

    python experiments/recordings.py [--fractions 0 0.05 0.1 0.3 1] [--seeds 0 1 2] [--fit.epochs 40]

A teacher of 32 rate units generates a sine whose frequency its input sets, and the input changes in a trial. Students
see the first `warm` samples of a trial and then its input alone; what they predict is compared with the truth in trials
with input levels that no training trial had. Errors are relative to the mean prediction's: 0 is perfect, 1 is the mean.
Units are read out of the student's state linearly, by training trials.

The student is a PLRNN of 40 latent states, trained by partial forcing; beside it stand the linear model with inputs,
VARX, read out of its last observations, and the mean. A fraction is trained with all of the seeds at once.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from mbrl_envs.recordings import Part, Recording, SineTask, Student, Trials, readout, record, score
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl import device as devices
from mbrl.core import StepInput
from mbrl.dynamics.plrnn import Annealed, Plrnn, PlrnnConfig, PlrnnFit, Shallow, fit_plrnn
from mbrl.rollout import steps, unroll
from mbrl.run import machine, save_figure, versions, write_json

RESULTS = Path(__file__).parent / "results"
LAGS = 5  # of the linear model
STUDENT = PlrnnConfig(Shallow(100, clipped=False), latent=40, forcing=Annealed(1.0, 0.1, 1200))


@dataclass(frozen=True)
class Args:
    fractions: tuple[float, ...] = (0.0, 0.05, 0.1, 0.3, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    teacher: int = 0
    warm: int = 30
    trials: Trials = field(default_factory=Trials)
    student: PlrnnConfig = STUDENT
    fit: PlrnnFit = field(default_factory=lambda: PlrnnFit(epochs=40, length=30, lr=5e-3, lr_end=1e-4, clip=1.0))
    threads: int = 1
    save: bool = True


def latent(model: Plrnn, warm: int) -> Student:
    """Forced by the first samples, as strongly as at the end of the training, then free; its features are the latent
    states."""

    @torch.no_grad()
    def student(part: Part) -> tuple[Tensor, Tensor]:
        obs, act = part.obs, part.act
        cond = model.condition(obs)
        inputs = steps(StepInput(act, act[..., :0], torch.ones_like(act[..., :1])))
        first = model.init(obs[:, 0], cond)
        state, _ = unroll(model, first, inputs[: warm - 1], cond, forced=obs[:, 1:warm], alpha=model.alpha)
        seen, states = [], []
        for inp in inputs[warm - 1 : -1]:
            state, pred = model.step(state, inp, cond)
            seen.append(pred.obs)
            states.append(state)
        return torch.stack(seen, 1), torch.stack(states, 1)

    return student


def linear(recording: Recording, warm: int) -> Student:
    """x_t = c + A_1 x_{t-1} + ... + A_p x_{t-p} + B u_{t-1}; its features are the last p observations."""
    windows = lambda x: x.unfold(1, LAGS, 1).flatten(2)  # [E, T - p + 1, D p]
    with_input = lambda x, u: torch.cat([x, u], -1)
    part = recording.train
    past = with_input(windows(part.obs)[:, :-1], part.act[:, LAGS - 1 : -1])
    step = readout(past, part.obs[:, LAGS:], 1e-6)

    def student(part: Part) -> tuple[Tensor, Tensor]:
        x, act = part.obs[:, :warm].double(), part.act.double()
        for t in range(warm, part.obs.shape[1]):
            last = x[:, -LAGS:].mT.flatten(1)
            x = torch.cat([x, step(with_input(last, act[:, t - 1]))[:, None]], 1)
        return x[:, warm:], windows(x)[:, warm - LAGS + 1 :]

    return student


def mean(recording: Recording, warm: int) -> Student:
    level = recording.train.obs[:, warm:].flatten(0, 1).mean(0)

    def student(part: Part) -> tuple[Tensor, Tensor]:
        obs = level.expand(len(part.levels), part.obs.shape[1] - warm, -1)
        return obs, torch.zeros_like(obs[..., :1])

    return student


def run(args: Args, fraction: float) -> dict[str, Any]:
    """Train the seeds of a fraction together, and score them and the nulls."""
    began = time.perf_counter()
    recording = record(SineTask().teach(args.teacher), args.trials, fraction, args.teacher)
    data = recording.train.data
    models = [args.student.build(data.spec, devices.generator(seed)) for seed in args.seeds]
    report = fit_plrnn(models, data, args.fit, [devices.generator(1000 + seed) for seed in args.seeds])
    each = [score(recording, latent(m.requires_grad_(False), args.warm), args.warm) for m in models]
    return {
        "fraction": fraction, "recorded": len(recording.recorded),
        "plrnn": {k: statistics.median(s[k] for s in each) for k in each[0]}, "each": each,
        "varx": score(recording, linear(recording, args.warm), args.warm),
        "mean": score(recording, mean(recording, args.warm), args.warm),
        "loss": report.loss[-1], "updates": report.updates, "solver": report.solver,
        "wall_s": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def shown(rows: list[dict[str, Any]]) -> Table:
    keys = ("output", "output_train", "recorded", "recorded_train", "unrecorded", "unrecorded_train")
    table = Table("units", "student", *keys, title="relative error, held-out conditions and training trials")
    for row in rows:
        for name in ("plrnn", "varx", "mean"):
            cells = [f"{row[name][k]:.3g}" if k in row[name] else "-" for k in keys]
            table.add_row(str(row["recorded"]), name, *cells)
    return table


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2, sharey=True), ("output", "unrecorded"), strict=True):
        for name, colour in (("plrnn", "C0"), ("varx", "C1"), ("mean", "0.6")):
            have = [(r["recorded"], r[name][key]) for r in rows if key in r[name]]
            axis.plot(*zip(*have, strict=True), color=colour, marker="o", label=name)
        points = [(r["recorded"], e[key]) for r in rows for e in r["each"] if key in e]
        axis.plot(*zip(*points, strict=True), ".", color="C0", alpha=0.4)
        axis.set(xlabel="recorded units of 32", title=f"{key}, held-out conditions", yscale="log", xscale="symlog")
    figure.axes[0].set_ylabel("relative error")
    figure.axes[0].legend()
    save_figure(figure, path)


def main(args: Args) -> None:
    devices.keep_memory()
    torch.set_num_threads(args.threads)
    rows = []
    for fraction in args.fractions:
        rows.append(run(args, fraction))
        print(json.dumps({k: rows[-1][k] for k in ("fraction", "plrnn", "varx", "wall_s")}), flush=True)
    Console(width=140).print(shown(rows))
    if args.save:
        facts = {"teacher": args.teacher, "seeds": args.seeds, "warm": args.warm, "threads": args.threads}
        write_json(RESULTS / "recordings.json", {"rows": rows} | facts | machine() | {"versions": versions()})
        draw(RESULTS / "recordings.png", rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
