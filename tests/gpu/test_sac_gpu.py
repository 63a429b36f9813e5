"""On an accelerator: a captured update is the eager one, and the eager one is the CPU's."""

import copy
import math
from functools import partial

import pytest
import torch

from mbrl import device as devices
from mbrl.baselines import BcConfig, Td3BcConfig
from mbrl.core import Spec
from mbrl.data import Transitions
from mbrl.sac import SacConfig

pytestmark = pytest.mark.gpu
SPEC = Spec(17, 6)
CONFIGS = [
    SacConfig(total=20),
    SacConfig(layer_norm=True),
    SacConfig(normalize=True, deterministic_backup=True, target_min=0.0),
    SacConfig(robust=0.1, robust_eps=0.05, spectral=2.0),
    SacConfig(robust=0.1, layer_norm=True),
    SacConfig(cloning=1.0, normalize=True),
    SacConfig(cloning=1.0, cloning_end=0.1, total=5),  # let go after four updates
    BcConfig(),
    Td3BcConfig(),
]


def batches(seeds, count, rows=256):
    g = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    for _ in range(count):
        obs, act, reward, after = (normal(seeds, rows, *shape) for shape in ((17,), (6,), (), (17,)))
        terminal = (normal(seeds, rows) > 1).float()
        yield Transitions(obs, act.tanh(), reward, after, terminal), normal(2, seeds, rows, 6)


def move(batch, noise, device):
    return Transitions(*(x.to(device) for x in batch)), noise.to(device)


def updates_of(agent):
    """Its update, with a quarter of a batch for the data's own rows where it clones these."""
    return partial(agent.update, real=64) if getattr(agent.config, "cloning", 0) else agent.update


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seeds", [1, 4])
def test_captured_updates_are_the_eager_ones(config, seeds):
    device = devices.pick()
    agent = config.build(SPEC, torch.Generator().manual_seed(0), seeds).to(device)
    eager = copy.deepcopy(agent)
    data = [move(*x, device) for x in batches(seeds, 8)]
    before = copy.deepcopy(agent.state_dict())
    update = devices.graphed(updates_of(agent), *data[0])
    agent.load_state_dict(before)
    for batch, noise in data:
        got, want = update(batch, noise), updates_of(eager)(batch, noise)
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-4)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(agent.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert not torch.equal(agent.actor, before["actor"])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seeds", [1, 4])
def test_updates_are_those_of_the_cpu(config, seeds):
    device = devices.pick()
    here = config.build(SPEC, torch.Generator().manual_seed(0), seeds, torch.float64)
    there = copy.deepcopy(here).to(device)
    for batch, noise in batches(seeds, 5):
        batch, noise = Transitions(*(x.double() for x in batch)), noise.double()
        want = updates_of(here)(batch, noise)
        got = updates_of(there)(*move(batch, noise, device))
        for name in want:
            torch.testing.assert_close(got[name].cpu(), want[name], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(there.actor.cpu(), here.actor, atol=1e-7, rtol=1e-6)


def test_a_captured_update_leaves_out_a_broken_seed():
    device = devices.pick()
    agent = SacConfig().build(SPEC, torch.Generator().manual_seed(0), 3).to(device)
    (batch, noise), (second, _) = (move(*x, device) for x in batches(3, 2))
    update = devices.graphed(agent.update, batch, noise)
    before = copy.deepcopy(agent.state_dict())
    second.obs[1, 7] = math.nan
    assert update(second, noise)["skipped"].tolist() == [0.0, 3.0, 0.0]
    for name in ("actor", "critics", "target", "log_alpha"):
        now = agent.state_dict()[name]
        assert torch.equal(now[1], before[name][1]), name
        assert bool(now.isfinite().all()), name
        assert not torch.equal(now[0], before[name][0]), name
