"""MixER: one outer step (12 updates of the contexts, 12 of the weights, the gate solved for every 5) with ten experts
on fifty systems, against the same where every expert is evaluated for every row and the gate is read at every interval,
the unchosen results thrown away."""

import statistics
import time
from dataclasses import replace

import torch

from mbrl import device as devices
from mbrl.data import Dataset, joined
from mbrl.dynamics import mixer
from mbrl.dynamics.mixer import Coda, Mixer, MixerConfig, MixerFit, Ncf

SYSTEMS, EXPERTS = 50, 10


def data() -> Dataset:
    """Linear spirals, of a turn and a decay each, 4 orbits of 99 steps."""
    g, parts = torch.Generator().manual_seed(0), []
    for i in range(SYSTEMS):
        turn = torch.tensor([[0.0, 1 + i / 10], [-1 - i / 10, -0.02 * (i % 7)]])
        step = torch.linalg.matrix_exp(0.05 * turn)
        x = [torch.randn(4, 2, generator=g)]
        for _ in range(99):
            x.append(x[-1] @ step.T)
        x = torch.stack(x, 1)
        n, none = 4 * 99, torch.zeros(4 * 99, 0)
        yes, starts = torch.ones(n, dtype=torch.bool), torch.arange(0, n + 1, 99)
        before, after = x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)
        parts.append(Dataset(before, none, none.sum(1), after, ~yes, yes, starts, none[0], none[0], 0.05))
    return joined(parts, mixed=True)


def every(model: Mixer) -> None:
    """Makes a model evaluate all experts for all rows in training, and read the gate at every interval."""

    def moves(system: torch.Tensor, order: int | None = None) -> mixer.Move:
        g = len(system)

        def move(z: torch.Tensor, act: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
            ctx = model.contexts[system]
            own = torch.nn.functional.one_hot(model.chosen(ctx), EXPERTS).to(z)  # [G, E]
            which = torch.arange(EXPERTS, device=z.device).repeat_interleave(g)
            cond = model.served(ctx.repeat(EXPERTS, 1), which)
            wide = lambda x: x.repeat(EXPERTS, 1, 1)
            after = model.moved(cond, wide(z), wide(act), wide(dt)).unflatten(0, (EXPERTS, g))
            return (after * own.T[..., None, None]).sum(0)

        return move

    model.moves = moves


def run(harness) -> dict[str, dict[str, float]]:
    given, device = data().to(harness.device), harness.device
    rows = {}
    for name, kind in (("neural context flows", Ncf()), ("CoDA", Coda())):
        fit = MixerFit(1, batch=4, length=10, restarts=10, assign="hungarian")
        jobs = {}
        for which in ("ours", "every expert for every row"):
            model = MixerConfig(kind, EXPERTS).build(given.spec, devices.generator(0)).to(device)
            with torch.no_grad():
                model.contexts.copy_(0.2 * torch.randn(SYSTEMS, 10, generator=devices.generator(1)).to(device))
            if which != "ours":
                every(model)
            jobs[which] = mixer._Fit(model, given, fit, devices.generator(2))
        times: dict[str, list[float]] = {k: [] for k in jobs}
        end = time.perf_counter() + harness.seconds
        while time.perf_counter() < end or len(times["ours"]) < 3:
            for which, job in jobs.items():
                job.config = replace(fit, outer=job.outer + 1)
                devices.synchronize(device)
                begin = time.perf_counter()
                job.run(None, None, None)
                devices.synchronize(device)
                times[which].append(time.perf_counter() - begin)
            ours, theirs = (job.loss[-1] for job in jobs.values())
            if abs(ours - theirs) > 1e-2 * abs(ours):
                raise RuntimeError(f"the two came apart: losses {ours} and {theirs}")
        ms = {k: 1e3 * statistics.median(v) for k, v in times.items()}
        slow = ms["every expert for every row"]
        rows[name] = {"ours_ms": ms["ours"], "every_ms": slow, "ratio": slow / ms["ours"]}
    return rows
