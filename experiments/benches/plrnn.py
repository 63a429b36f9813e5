"""One training update of PLRNNs, everything included (windows, forward, backward, RAdam), at the shapes of the
published ECG fit: 5 states, 250 hidden units, clipped, affine readout, batch 16, windows of T steps; by each way to a
forced trajectory, for 1 seed and 20 stacked, against a plain loop with autograd.

The weights are those after 100 updates on Lorenz 96 of 5 sites: for initial ones Newton's method has less to do. Before
anything is timed, all versions' errors and gradients must be those of the plain loop to rounding. `ratio`: the plain
loop's time over that of a run, of which 20 seeds are 20. A version that would take seconds an update is left out."""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mbrl import device as devices
from mbrl import forced
from mbrl.data import Dataset
from mbrl.dynamics.plrnn import Constant, Plrnn, PlrnnConfig, PlrnnFit, Shallow, Track, _Trainer, fit_plrnn

STRENGTH, DECAY, SEEDS, ROWS = 0.3, 1e-7, 20, 16
CONFIG = PlrnnConfig(Shallow(250), readout="affine", forcing=Constant(STRENGTH), readout_decay=DECAY)
Solver = Literal["compiled", "loop", "parallel"]


def series(steps: int) -> Dataset:
    """Lorenz 96 of 5 sites, force 8, by RK4, standardised."""
    x, out = torch.tensor([8.01, 8.0, 8.0, 8.0, 8.0], dtype=torch.float64), []
    field = lambda x: (x.roll(-1) - x.roll(2)) * x.roll(1) - x + 8
    for _ in range(steps + 201):
        a = field(x)
        b = field(x + 0.0125 * a)
        c = field(x + 0.0125 * b)
        x = x + 0.025 / 6 * (a + 2 * b + 2 * c + field(x + 0.025 * c))
        out.append(x)
    obs = torch.stack(out[200:])
    obs = ((obs - obs.mean(0)) / obs.std(0)).float()
    n, yes, none = steps, torch.ones(steps, dtype=torch.bool), torch.zeros(steps, 0)
    return Dataset(obs[:-1], none, torch.zeros(n), obs[1:], ~yes, yes, torch.tensor([0, n]), none[0], none[0])


def trainer(models: list[Plrnn], length: int, solver: Solver) -> _Trainer:
    p = {k: torch.cat([m.params()[k].detach() for m in models]).requires_grad_() for k in models[0].params()}
    optimizer = torch.optim.RAdam(p.values(), lr=1e-6, foreach=True)
    return _Trainer(
        models[0], p, optimizer, PlrnnFit(length=length, solver=solver), torch.stack([m.alpha for m in models])
    )


class Naive:
    """One seed's update as usually written: a loop whose graph autograd keeps."""

    def __init__(self, model: Plrnn, track: Track) -> None:
        names = ("A", "W1", "W2", "h1", "h2", "B")
        self.p = {k: model.theta[k].detach().clone().requires_grad_() for k in names}
        self.optimizer = torch.optim.RAdam(self.p.values(), lr=1e-6)
        self.track = track

    def loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the squared error in it, of x [B, T + 1, N], standardised."""
        A, W1, W2, h1, h2, B = self.p.values()
        inverse = torch.linalg.pinv(B)
        z = x[:, 0] @ inverse.T
        signal = (x[:, 1:] @ inverse.T).detach()
        out = []
        for t in range(x.shape[1] - 1):
            u = z @ W2.T
            y = A * z + (torch.relu(u + h2) - torch.relu(u)) @ W1.T + h1
            out.append(y)
            z = (1 - STRENGTH) * y + STRENGTH * signal[:, t]
        error = ((torch.stack(out, 1) @ B.T - x[:, 1:]) ** 2).mean()
        s = torch.linalg.svdvals(B)
        return error + DECAY * (1 - s[0] / s[-1]) ** 2, error

    def __call__(self, index: Tensor) -> Tensor:
        loss, _ = self.loss(self.track.window(index[None]).obs[0])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def updated(one: _Trainer, track: Track, index: Tensor) -> Callable[[], Tensor]:
    return lambda: one.update(track.window(index))


def run(harness) -> dict:
    devices.keep_memory()
    device = harness.device
    cpu = device.type == "cpu"
    rows: dict[str, dict[str, float]] = {}
    data = series(5000).to(device)
    models = [CONFIG.build(data.spec, torch.Generator().manual_seed(s)).to(device) for s in range(SEEDS)]
    streams = [torch.Generator().manual_seed(s) for s in range(SEEDS)]
    fit_plrnn(models, data, PlrnnFit(epochs=1, batches=100, length=200), streams)
    for length in (200, 2000, 20_000):
        track = Track(data if length < 5000 else series(25_000).to(device), length, models[0].theta["A"])
        track.obs = models[0].observed(track.obs)
        pick = torch.randint(len(track.first), (SEEDS, ROWS), generator=torch.Generator().manual_seed(0))
        index = track.first[pick].to(device)
        solvers: list[Solver] = ["loop", "parallel"]
        if cpu and forced.problem() is None:
            solvers.insert(0, "compiled")
        naive = Naive(models[0], track)
        fns: dict[str, Callable[[], object]] = {"naive": lambda naive=naive, index=index: naive(index[0])}
        runs = {"naive": 1}
        for solver in solvers:
            for seeds in (1, SEEDS):
                if cpu and length > 200 and solver != "compiled" and seeds > 1:
                    continue
                if solver == "loop" and length > (2000 if cpu else 200):
                    continue
                one = trainer(models[:seeds], length, solver)
                name = f"{solver}, {seeds} seed{'s' * (seeds > 1)}"
                if not _agree(copy.copy(one), Naive(models[0], track), track, index[:seeds]):
                    rows[f"T {length}, {name}"] = {"fallbacks": 1}  # the loop took over: there is nothing to time
                    continue
                fns[name] = updated(one, track, index[:seeds])
                runs[name] = seeds
        found = harness.compare(fns, {})
        for name, row in found.items():
            if name in runs:
                row |= {"ms_a_run": row["ms"] / runs[name], "ratio": found["naive"]["ms"] / (row["ms"] / runs[name])}
                rows[f"T {length}, {name}"] = row
    return rows


def _agree(ours: _Trainer, naive: Naive, track: Track, index: Tensor) -> bool:
    """Whether Newton's method came to an end for each seed. Raises AssertionError where the first seed's error or
    gradients are not the plain loop's."""
    loss, want = naive.loss(track.window(index[:1]).obs[0])
    grads = torch.autograd.grad(loss, list(naive.p.values()))
    ours.optimizer = torch.optim.SGD(ours.p.values(), lr=0.0)
    error = ours.update(track.window(index))[0]
    torch.testing.assert_close(error, want.detach(), rtol=1e-5, atol=0.0)
    for k, g in zip(naive.p, grads, strict=True):
        mine = ours.p[k].grad
        assert mine is not None
        off = float((mine[0] - g).norm() / g.norm())
        assert off <= 1e-4, f"T {track.length}, {ours.solver}, {k}: the gradients differ by {off:.1e} of their norm"
    for p in ours.p.values():
        p.grad = None
    return not ours.fallbacks
