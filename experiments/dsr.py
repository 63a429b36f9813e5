"""Dynamics reconstruction from recorded series, with the nulls beside every score.

    python experiments/dsr.py --data DIR [--settings ecg-gtf ...] [--seeds 0 1 2 3 4] [--out runs/dsr]

DIR holds ecg_train.npy, ecg_test.npy, eeg.npy, lorenz63_noise0.05_train.npy and lorenz63_test.npy, each [T, N]; the
Lorenz-96 system and the bursting neuron are integrated here, 100 000 samples for each of training (5 % noise), test and
floor (neither with noise). The seeds of a setting are trained together, on the seed axis. A finished setting is
a row of experiments/results/dsr.json and is not run again; an interrupted one goes on from its checkpoint in `out`.
Every score is of the last parameters, never of the best. `published` are medians of 20 runs (arXiv 2306.04406).
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from mbrl_envs import systems
from mbrl_envs.series import standardise
from safetensors.torch import load_file, save_file
from torch import Tensor

from mbrl import device as devices
from mbrl import metrics
from mbrl.data import Dataset
from mbrl.dynamics.plrnn import Adaptive, Constant, PlrnnConfig, PlrnnFit, Shallow, Sparse, fit_plrnn, orbit
from mbrl.nulls import null_table
from mbrl.offline import digest
from mbrl.run import machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "dsr.json"
EVERY = 50  # epochs a checkpoint
ORBITS, STEPS = 32, 4000  # of a Lyapunov spectrum
LONG = 100_000  # samples of an integrated series


@dataclass(frozen=True)
class Setting:
    data: str
    learner: PlrnnConfig
    fit: PlrnnFit = field(default_factory=PlrnnFit)
    published: dict[str, float] | None = None
    goal: dict[str, float] | None = None


ECG = PlrnnConfig(Shallow(250), readout="affine", forcing=Constant(0.3), readout_decay=1e-7)
EEG = PlrnnConfig(Shallow(512), 16, "affine", Constant(0.1), latent_decay=1e-4, readout_decay=1e-6)
row = lambda d_stsp, d_h, pe: {"d_stsp": d_stsp, "d_h": d_h, "pe_20": pe}
SETTINGS = {
    "ecg-gtf": Setting("ecg", ECG, published=row(4.3, 0.34, 2.4e-3)),
    "ecg-stf": Setting("ecg", replace(ECG, forcing=Sparse(10)), published=row(7.1, 0.38, 5e-3)),
    "ecg-agtf": Setting(
        "ecg", replace(ECG, forcing=Adaptive(), latent_decay=1e-5, readout_decay=1e-6), published=row(4.5, 0.34, 2.4e-3)
    ),
    "ecg-agtf-noise": Setting(
        "ecg",
        PlrnnConfig(Shallow(249), readout="affine", latent_decay=1e-5, readout_decay=1e-6, noise="constant"),
        goal=row(2.0, 0.20, 1.5e-3),
    ),
    "ecg-stf-noise": Setting(
        "ecg",
        replace(ECG, kind=Shallow(249), forcing=Sparse(20), noise="constant"),
        PlrnnFit(clip=1.0),
        goal=row(2.0, 0.20, 1.5e-3),
    ),
    "lorenz63": Setting("lorenz63", PlrnnConfig(Shallow(100), latent_decay=1e-5), PlrnnFit(2000)),
    "lorenz96": Setting("lorenz96-20", PlrnnConfig(Shallow(200), forcing=Constant(0.15)), PlrnnFit(600, length=100)),
    "neuron": Setting(
        "hindmarsh-rose", PlrnnConfig(Shallow(200), forcing=Constant(0.1), noise="constant"), PlrnnFit(1500)
    ),
    "eeg": Setting("eeg", EEG, PlrnnFit(600, length=50), published=row(2.1, 0.11, 0.55)),
}
FLOWS = ("lorenz63", "lorenz96-20", "hindmarsh-rose")


@dataclass(frozen=True)
class Args:
    data: Path
    settings: tuple[str, ...] = tuple(SETTINGS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    out: Path = Path("runs/dsr")
    threads: int = 2


def series(name: str, folder: Path) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """(train [T, N], test [T, N], an independent stretch of the truth where the training series is not one, the
    interval)."""
    read = lambda file: torch.from_numpy(np.load(folder / file, allow_pickle=False)).float()
    if name == "ecg":
        return read("ecg_train.npy"), read("ecg_test.npy"), None, 1.0
    if name == "eeg":
        return read("eeg.npy"), read("eeg.npy"), None, 1.0  # the published train and test files are the same array
    system = systems.system(name)
    if name == "lorenz63":
        other = systems.trajectory(system, LONG, 2, dt=0.01, standardised=True)
        return read("lorenz63_noise0.05_train.npy"), read("lorenz63_test.npy"), other.obs.float(), 0.01
    train = systems.trajectory(system, LONG, 0, noise=0.05)
    test, other = (standardise(systems.trajectory(system, LONG, seed), train).obs.float() for seed in (1, 2))
    return standardise(train).obs.float(), test, other, system.dt


def dataset(x: Tensor, dt: float) -> Dataset:
    n = len(x) - 1
    none, yes = x.new_zeros(n, 0), torch.ones(n, dtype=torch.bool)
    return Dataset(x[:-1], none, x.new_zeros(n), x[1:], ~yes, yes, torch.tensor([0, n]), none[0], none[0], dt)


def run(name: str, args: Args) -> dict[str, Any]:
    """Train the seeds together, or go on; then score each."""
    s = SETTINGS[name]
    train, test, _, dt = series(s.data, args.data)
    data = dataset(train, dt)
    models = [s.learner.build(data.spec, devices.generator(seed)) for seed in args.seeds]
    generators = [devices.generator(1000 + seed) for seed in args.seeds]
    saved = args.out / f"{name}-{digest(s.learner, s.fit, args.seeds)}.safetensors"
    saved.parent.mkdir(parents=True, exist_ok=True)
    clock, spent = time.perf_counter(), 0.0
    before = load_file(saved) if saved.exists() else None
    if before is not None:
        spent = float(before["seconds"])

    def keep(state: dict[str, Tensor]) -> None:
        if int(state["epoch"]) % EVERY == 0 or int(state["epoch"]) == s.fit.epochs:
            state = state | {"seconds": torch.tensor(spent + time.perf_counter() - clock, dtype=torch.float64)}
            save_file({k: v.contiguous().clone() for k, v in state.items()}, saved.with_suffix(".part"))
            saved.with_suffix(".part").replace(saved)

    def tell(epoch: int, epochs: int | None, figures: dict[str, float]) -> None:
        if epoch % 200 == 0:
            words = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
            print(f"{name}  {epoch} / {epochs}  {words}  {time.perf_counter() - clock:.0f} s", flush=True)

    report = fit_plrnn(models, data, s.fit, generators, tell, checkpoint=keep, resume=before)
    figures = [score(m, train, test, dt, seed) for m, seed in zip(models, args.seeds, strict=True)]
    keys = [k for k, v in figures[0].items() if isinstance(v, float)]
    median = {k: statistics.median(f[k] for f in figures) for k in keys}
    mad = {k: statistics.median(abs(f[k] - median[k]) for f in figures) for k in keys}
    return {
        "setting": name, "digest": digest(s.learner, s.fit, args.seeds), "seeds": list(args.seeds),
        "parameters": sum(p.numel() for p in models[0].parameters()) + max(models[0].noise_dim - 1, 0),
        "updates": report.updates,
        "solver": report.solver, "wall_s": round(spent + report.seconds, 1), "skipped": report.skipped,
        "alpha": [round(a, 4) for a in report.alpha[-1]], "median": median, "mad": mad, "each": figures,
        "true_spectrum": true_spectrum(s.data, dt) if s.data in FLOWS else None,
        "published": s.published, "goal": s.goal, "threads": args.threads, **machine(), "versions": versions(),
    }  # fmt: skip


def score(model: Any, train: Tensor, test: Tensor, dt: float, seed: int) -> dict[str, Any]:
    """A free run from the test's first observation against the whole test series, 20 steps ahead from every time, and
    the Lyapunov spectrum per unit of time. Where the model has noise the free run draws it, and nothing else does."""
    model.requires_grad_(False)
    cond = model.condition(test)
    stream = devices.generator(seed) if model.noise_dim else None
    free = metrics.settled(lambda steps: orbit(model, test[:1], steps, generator=stream)[0], len(test))
    predict: Callable[[Tensor, int], Tensor] = lambda x, n: metrics.forecast(model, x, n, cond=cond)
    found = metrics.scores(test, free, predict, 20, generator=devices.generator(seed))
    starts = test[:: len(test) // ORBITS][:ORBITS]
    walk = metrics.model_step(model, cond, jacobian=model.jacobian)
    spectrum = exponents(walk, model.init(starts, cond), dt, 5)
    return {k: float(v) for k, v in found.items()} | {"lyapunov": spectrum[0], "spectrum": spectrum}


def exponents(walk: metrics.StepJacobian, begin: Tensor, dt: float, most: int) -> list[float]:
    """The means over orbits of the largest ones."""
    k = min(most, begin.shape[1])
    return metrics.lyapunov_spectrum(walk, begin, STEPS, transient=STEPS // 4, k=k, dt=dt).mean(0).tolist()


def true_spectrum(name: str, dt: float) -> list[float]:
    system = systems.system(name)
    assert isinstance(system, systems.Flow)
    starts = systems.integrate(system, system.starts(ORBITS, devices.generator(0)), 1, max(system.transient, 50.0))
    walk = metrics.flow_step(system.field, system.jacobian, dt, max(1, round(dt / 0.01)))
    return exponents(walk, starts[:, -1], dt, 20)


def main(args: Args) -> None:
    devices.keep_memory()
    torch.set_num_threads(args.threads)
    table: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"nulls": {}, "rows": {}}
    for name in args.settings:
        s = SETTINGS[name]
        if s.data not in table["nulls"]:
            train, test, truth, _ = series(s.data, args.data)
            order = {"eeg": 5, "ecg": 20}.get(s.data, 20)
            stream = devices.generator(0)
            table["nulls"][s.data] = null_table(train, test, 20, generator=stream, order=order, truth=truth)
        done = table["rows"].get(name)
        if done is None or done["digest"] != digest(s.learner, s.fit, args.seeds):
            result = run(name, args)
            disk = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"nulls": {}, "rows": {}}
            table = {"nulls": disk["nulls"] | table["nulls"], "rows": disk["rows"]}  # another run may have written
            table["rows"][name] = result
        write_json(RESULTS, table)
        print(json.dumps({name: table["rows"][name]["median"]}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
