"""A whole plan as one captured graph: what it replays is what is computed without it, for every learner."""

from dataclasses import replace

import pytest
import torch
from test_contract import SUBJECTS

from mbrl import device as devices
from mbrl.mpc import Mpc
from mbrl.planner import PRESETS, Worth
from mbrl.testing import Subject

pytestmark = pytest.mark.gpu


@pytest.mark.filterwarnings("error:not captured as a graph")
@pytest.mark.parametrize(
    "name",
    [
        *("noisy", "hyper", "latent", "single", "ensemble", "filtered-ensemble"),
        *("plrnn-shallow", "ode", "hypernetwork", "experts", "heads", "mixer"),
    ],
)
@pytest.mark.parametrize("preset", ["cem", "icem"])
def test_a_replayed_plan_is_the_plan(name, preset, monkeypatch):
    device, subject = devices.pick(), SUBJECTS[name]
    model = Subject(subject.build, subject.spec, subject.imposes, device=device).fresh()
    planner = replace(PRESETS[preset], horizon=4)
    acts = []
    for graphs in ("1", "0"):
        monkeypatch.setenv("MBRL_GRAPHS", graphs)
        mpc = Mpc(planner, Worth(particles=2), model, generator=devices.generator(0, device))
        mpc.begin(3)
        g = devices.generator(1, device)
        acts.append(
            [mpc(torch.randn(3, subject.spec.obs, generator=g, device=device, dtype=torch.float64)) for _ in range(3)]
        )
    for graphed, eager in zip(*acts, strict=True):
        torch.testing.assert_close(graphed, eager)
