"""The ensemble's training step as `fit` runs it: 7 members, 4 x 200, 17 observations, 6 actions, batch 256."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches import uncompiled
from mbrl.core import Spec
from mbrl.data import Dataset
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.fit import FitConfig, Parts, Rows, noise_of, order, streams

FLOPS = 1.417e9  # 6 x 131 800 weights x 256 rows x 7 members


def data(device: torch.device, n: int = 20_000) -> Dataset:
    """A linear system with noise, of the widths of a half cheetah."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    obs, act = normal(n, 17), normal(n, 6).tanh()
    after = 0.9 * obs + act @ normal(6, 17) + 0.1 * normal(n, 17)
    yes = torch.ones(n, dtype=torch.bool)
    starts, one = torch.tensor([0, n]), torch.ones(6)
    return Dataset(obs, act, obs[:, 0], after, ~yes, yes, starts, -one, one).to(device)


def stacked(device: torch.device, dtype: torch.dtype = torch.float32, low: bool = False):
    """The step of `mbrl.fit`."""
    generator = torch.Generator().manual_seed(0)
    config = FitConfig(dtype="bfloat16" if low else "float32")
    model = EnsembleConfig().build(Spec(17, 6), generator).to(device, dtype)
    rows = Rows(data(device), 1, next(model.parameters()))
    train, _ = rows.split(config, generator)
    model.prepare(rows.segment(train))
    go = Parts(model, config).stepper(rows)
    batches = itertools.cycle(order(streams(train, model.parts, config, generator), config.batch, generator))

    def step() -> None:
        index = next(batches)
        go(index, noise_of(model, len(index), 1, generator))

    return step


class Member(nn.Module):
    """One network of the naive version."""

    def __init__(self) -> None:
        super().__init__()
        self.linears: Any = nn.ModuleList(
            nn.Linear(i, o) for i, o in zip([23, *[200] * 4], [*[200] * 4, 36], strict=True)
        )
        self.upper, self.lower = nn.Parameter(torch.full((18,), 0.5)), nn.Parameter(torch.full((18,), -10.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for linear in self.linears[:-1]:
            x = F.silu(linear(x))
        mean, raw = self.linears[-1](x).chunk(2, -1)
        logvar = self.upper - F.softplus(self.upper - raw)
        return mean, self.lower + F.softplus(logvar - self.lower)


def naive(device: torch.device):
    """A list of members, a loop over them, torch's Adam as it comes."""
    torch.manual_seed(0)
    members = [Member().to(device) for _ in range(7)]
    source = data(device)
    decays = [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]
    groups = [{"params": [m.linears[i].weight for m in members], "weight_decay": decays[i]} for i in range(5)]
    rest = [p for m in members for name, p in m.named_parameters() if not name.endswith("weight")]
    optimizer = torch.optim.Adam([*groups, {"params": rest}], lr=1e-3)
    x = torch.cat([source.obs, source.act], 1)
    y = torch.cat([source.next_obs - source.obs, source.reward[:, None]], 1)
    mean, std = x.mean(0), x.std(0)

    def step() -> None:
        loss = torch.zeros((), device=device)
        for member in members:
            index = torch.randint(len(x), (256,), device=device)
            center, logvar = member((x[index] - mean) / std)
            loss = loss + ((center - y[index]) ** 2 * (-logvar).exp() + logvar).mean()
            loss = loss + 0.01 * (member.upper - member.lower).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def run(harness) -> dict[str, dict[str, float]]:
    steps: dict[str, Any] = {
        "ensemble step": stacked(harness.device),
        "naive: a loop over members": naive(harness.device),
    }
    steps["ensemble step, bfloat16"] = stacked(harness.device, low=True)
    if harness.device.type == "cpu":
        steps["ensemble step, nothing compiled"] = uncompiled(stacked(harness.device))
    else:
        steps["ensemble step, float64"] = stacked(harness.device, torch.float64)
    return harness.compare(steps, dict.fromkeys(steps, FLOPS))
