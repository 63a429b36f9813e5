"""Fits on an accelerator: a captured update is the eager one, and what is learned is what a CPU learns."""

import copy
import gc
import warnings

import pytest
import torch

from mbrl import device as devices
from mbrl.core import Spec
from mbrl.data import Dataset, joined
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.hyper import HyperConfig, HyperFit, fit_hyper
from mbrl.dynamics.mixer import Coda, MixerConfig, MixerFit, Ncf, fit_mixer
from mbrl.dynamics.plrnn import Constant, PlrnnConfig, PlrnnFit, Shallow, fit_plrnn
from mbrl.fit import FitConfig, fit

pytestmark = pytest.mark.gpu


def linear(seed: int, steps: int = 400, actions: int = 2) -> Dataset:
    """Episodes of 40 steps of a stable linear system of three observations."""
    g = torch.Generator().manual_seed(seed)
    A = 0.9 * torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
    B = torch.randn(actions, 3, generator=g, dtype=torch.float64)
    act = torch.rand(steps, actions, generator=g, dtype=torch.float64) * 2 - 1
    before, after = torch.zeros(steps, 3, dtype=torch.float64), torch.zeros(steps, 3, dtype=torch.float64)
    for t in range(steps):
        before[t] = after[t - 1] if t % 40 else torch.randn(3, generator=g, dtype=torch.float64)
        after[t] = before[t] @ A + act[t] @ B
    yes, bound = torch.ones(steps, dtype=torch.bool), torch.ones(actions)
    return Dataset(before, act, before[:, 0], after, ~yes, yes, torch.arange(0, steps + 1, 40), -bound, bound)


def parameters(model):
    return {k: v.detach().cpu() for k, v in model.state_dict().items()}


def close(got, want, **how):
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, msg=lambda m, name=name: f"{name}: {m}", **how)


def fitted(build, run, device, monkeypatch, graphs="1"):
    monkeypatch.setenv("MBRL_GRAPHS", graphs)
    model = build().double().to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, device)
    return parameters(model)


def ensemble():
    config = EnsembleConfig(members=3, elites=2, hidden=(16, 16), weight_decay=(0.0, 1e-4, 0.0), uncertainty=())
    return config.build(Spec(3, 2), devices.generator(0))


def fit_ensemble(model, device):
    config = FitConfig(batch=32, max_epochs=3)
    report = fit(model, linear(0).to(device), config, devices.generator(1))
    assert report.epochs == 3


def hypernetwork():
    config = HyperConfig(hidden=(16, 16), hyper=(8,), embedding=4)
    return config.build(Spec(3, 2, systems=2), devices.generator(0))


def fit_tasks(model, device):
    for task in range(2):
        config = HyperFit(updates=40, batch=16, beta=0.5)
        fit_hyper(model, linear(task).to(device), task, config, devices.generator(task))


def family():
    return joined([linear(s, 160) for s in range(4)], mixed=True)


def mixer(kind):
    config = MixerConfig(kind, 2)
    return lambda: config.build(family().spec, devices.generator(0))


def fit_family(model, device):
    config = MixerFit(3, inner=5, batch=2, length=8, gate_every=2, assign="hungarian", empty="reseed", restarts=2)
    fit_mixer(model, family().to(device), config, devices.generator(1))


def plrnn():
    return PlrnnConfig(Shallow(16), forcing=Constant(0.3)).build(Spec(3, 2), devices.generator(0))


def train_plrnn(model, device):
    config = PlrnnFit(epochs=2, batches=5, length=20, solver="loop")
    fit_plrnn([model], linear(0).to(device), config, [devices.generator(1)])


KINDS = {
    "ensemble": (ensemble, fit_ensemble),
    "hypernetwork": (hypernetwork, fit_tasks),
    "flows": (mixer(Ncf()), fit_family),
    "coda": (mixer(Coda()), fit_family),
    "plrnn": (plrnn, train_plrnn),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_learned_is_what_a_cpu_learns(name, monkeypatch):
    build, run = KINDS[name]
    here = fitted(build, run, torch.device("cpu"), monkeypatch)
    there = fitted(build, run, devices.pick(), monkeypatch)
    close(there, here, rtol=1e-5, atol=1e-7)
    start = parameters(build().double())
    assert any(not torch.allclose(start[k], here[k]) for k in start)


@pytest.mark.parametrize("name", ["ensemble", "hypernetwork"])
def test_captured_updates_are_the_eager_ones(name, monkeypatch):
    build, run = KINDS[name]
    graphed = fitted(build, run, devices.pick(), monkeypatch)
    eager = fitted(build, run, devices.pick(), monkeypatch, graphs="0")
    close(graphed, eager, rtol=1e-8, atol=1e-10)


def test_a_fit_that_is_resumed_on_the_device_goes_on_alike(monkeypatch):
    """Half of a task, then the other half from its checkpoint."""
    device, given = devices.pick(), linear(0).to(devices.pick())
    config, kept = HyperFit(updates=40, batch=16), []
    whole, half = (hypernetwork().double().to(device) for _ in range(2))
    keep = lambda state: kept.append({k: v.clone() for k, v in state.items()})
    fit_hyper(whole, given, 0, config, devices.generator(0), checkpoint=keep, every=20)
    fit_hyper(half, given, 0, config, devices.generator(5), resume=kept[0])
    close(parameters(half), parameters(whole), rtol=0, atol=0)


def test_a_graph_keeps_what_it_writes():
    device = devices.pick()

    def made():
        total = torch.zeros(2**20, device=device)
        return devices.graphed(total.add_, torch.ones(1, device=device), state=[total])

    go = made()
    gc.collect()
    others = [torch.full((2**20,), 7.0, device=device) for _ in range(64)]
    assert bool((go(torch.ones(1, device=device)) == 1).all())
    assert all(bool((x == 7).all()) for x in others)


def test_what_cannot_be_captured_is_called_as_it_is():
    device, state = devices.pick(), torch.zeros(1, device=devices.pick())
    fn = lambda x: state.add_(1) * float(x.sum())  # waits for the device
    x = torch.ones(2, device=device)
    with pytest.raises(RuntimeError):
        devices.graphed(fn, x)
    state.zero_()
    with pytest.warns(UserWarning, match="not captured"):
        go = devices.graphed(fn, x, state=[state], fallback=True)
    assert state.item() == 0
    assert go(x).item() == 2
    assert copy.copy(state).item() == 1
