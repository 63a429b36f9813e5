"""One imagined step of 10 000 rows with MOPO's penalty, and five of them: the widths of a half cheetah, 5 elites of
4 x 200. A version counts the members that it executes: 2 x 131 800 operations a row and member."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from benches import uncompiled
from mbrl.core import Segment, Spec, StepInput
from mbrl.dynamics.ensemble import Ensemble, EnsembleConfig
from mbrl.rollout import imagine

ROWS = 10_000
FLOPS = 2 * 131_800 * ROWS  # of one member


def setting(device: torch.device, n: int = ROWS) -> tuple[Ensemble, Tensor, StepInput]:
    """A prepared ensemble, and n rows to begin from."""
    generator = torch.Generator().manual_seed(0)
    model = EnsembleConfig().build(Spec(17, 6), generator).to(device)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(device)
    obs, act, one = normal(n, 17), normal(n, 6).tanh(), torch.ones(n, 1, device=device)
    after, reward = obs + 0.1 * normal(n, 17), normal(n, 1)
    mask = reward > -torch.inf
    system = torch.zeros(1, dtype=torch.int64, device=device)
    model.prepare(Segment(torch.stack([obs, after], 1), act[:, None], reward, ~mask, mask, one[:, None], system))
    model.finish(torch.arange(7.0, device=device))
    return model.requires_grad_(False), obs, StepInput(act, normal(n, model.noise_dim), one)


def step(model: Ensemble, obs: Tensor, inp: StepInput, coefficient: float = 0.5) -> tuple[Tensor, Tensor]:
    """The next observation and the penalised reward."""
    obs, pred = model.step(obs, inp, ())
    return obs, pred.reward - coefficient * pred.uncertainty["aleatoric"]


def rollout(model: Ensemble, obs: Tensor, inp: StepInput, horizon: int = 5) -> tuple[Tensor, Tensor]:
    """As the offline loop imagines, but for the policy: here the actions are given."""
    alive = torch.ones(len(obs), dtype=torch.bool, device=obs.device)
    system = torch.zeros(1, dtype=torch.int64, device=obs.device)
    never = lambda obs, act, after: torch.zeros(len(obs), dtype=torch.bool, device=obs.device)
    noise = [(inp.act, inp.noise)] * horizon
    _, _, segment, doubt = imagine(model, lambda obs, act: act, never, obs, alive, noise, inp.dt, (), system)
    return segment.obs, segment.reward - 0.5 * doubt["aleatoric"]


def naive(model: Ensemble, obs: Tensor, inp: StepInput) -> tuple[Tensor, Tensor]:
    """A loop over all the members, the elites drawn afterwards: the recipe as usually written."""
    x = model.inputs(torch.cat([obs, inp.act], -1))
    means, stds = [], []
    for i in range(model.parts):
        h = x
        for weight, bias in zip(model.net.weights[:-1], model.net.biases[:-1], strict=True):
            h = F.silu(h @ weight[i] + bias[i])
        mean, raw = (h @ model.net.weights[-1][i] + model.net.biases[-1][i]).chunk(2, -1)
        logvar = model.upper[i] - F.softplus(model.upper[i] - raw)
        logvar = model.lower[i] + F.softplus(logvar - model.lower[i])
        means.append(mean)
        stds.append((0.5 * logvar).exp())
    mean, std = torch.stack(means), torch.stack(stds)
    row = torch.arange(len(obs), device=obs.device)
    pick = model.elites[torch.randint(len(model.elites), (len(obs),), device=obs.device)]
    y = mean[pick, row] + std[pick, row] * inp.noise[:, :-1]
    return obs + y[:, :-1], y[:, -1] - 0.5 * std.norm(dim=-1).amax(0)


@torch.no_grad()
def run(harness) -> dict[str, dict[str, float]]:
    model, obs, inp = setting(harness.device)
    quiet = model.reporting()
    low = model.reporting("aleatoric")
    worn = copy.deepcopy(low)  # as a fit left it that did not drop subnormal numbers: a quarter of the last layer
    worn.net.weights[-1][:, :, 27:] = 1e-40
    cast = torch.autocast(harness.device.type, torch.bfloat16)

    def halved() -> object:
        with cast:
            return step(low, obs, inp)

    fns = {
        "step with MOPO's penalty": lambda: step(low, obs, inp),
        "5 steps": lambda: rollout(low, obs, inp),
        "step, the drawn member only": lambda: quiet.step(obs, inp, ()),
        "step with the penalty, bfloat16": halved,
        "step with the penalty, nothing compiled": uncompiled(lambda: step(low, obs, inp)),
        "naive: a loop over all members": lambda: naive(model, obs, inp),
        "step with the penalty, subnormal weights": lambda: step(worn, obs, inp),
    }
    members = dict(zip(fns, (5, 25, 1, 5, 5, 7, 5), strict=True))
    rows = harness.compare(fns, {name: FLOPS * n for name, n in members.items()})
    for name, n in members.items():
        count = 5 if name == "5 steps" else 1
        rows[name] |= {"members": n // count, "transitions/s": 1e3 * count * ROWS / rows[name]["ms"]}
    for n in (1_000, 100_000) if harness.device.type != "cpu" else ():
        model, obs, inp = setting(harness.device, n)
        low, name = model.reporting("aleatoric"), f"step with MOPO's penalty, {n} rows"
        more = harness.compare(
            {name: lambda low=low, obs=obs, inp=inp: step(low, obs, inp)}, {name: 5 * FLOPS * n / ROWS}
        )
        rows[name] = more[name] | {"members": 5, "transitions/s": 1e3 * n / more[name]["ms"]}
    return rows
