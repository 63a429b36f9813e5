"""A whole plan as one captured graph: what it replays is what is computed without it, for every learner and every way
to search."""

import math
from dataclasses import replace

import pytest
import torch
from test_contract import SUBJECTS

from mbrl import device as devices
from mbrl.core import StepInput, first_context
from mbrl.mpc import Mpc, over
from mbrl.planner import CEM, OVER, PRESETS, Worth
from mbrl.sac import SacConfig
from mbrl.testing import Subject

pytestmark = pytest.mark.gpu

LEARNERS = [
    *("noisy", "hyper", "latent", "single", "single-gaussian", "ensemble", "plrnn-shallow", "plrnn-clipped"),
    *("plrnn-dendritic", "plrnn-dendritic-clipped", "plrnn-almost-linear", "ode", "hypernetwork", "experts", "heads"),
    *("mixer", "mixer-plrnn", "filtered-ensemble", "filtered-single", "filtered-mixer", "filtered-plrnn"),
]
TELLING = ["noisy", "single-gaussian", "ensemble", "plrnn-shallow", "hypernetwork", "experts", "heads"]
TELLING += [name for name in LEARNERS if name.startswith("filtered")]  # of how uncertain they are
SEARCHES = {**PRESETS, "loop": OVER["loop"], "tdmpc-over": OVER["tdmpc"], "gradient": replace(CEM, gradient_steps=2)}
PAIRS = [(name, search) for search in SEARCHES for name in LEARNERS] + [(name, "limit") for name in TELLING]


def threshold(model, name):
    """What half of a learner's first steps exceed of this uncertainty, as it goes from part to part."""
    g = devices.generator(2, (like := next(model.parameters())).device)
    obs, act = (torch.randn(64, n, generator=g).to(like) for n in (model.spec.obs, model.spec.act))
    cond = model.condition(first_context(model, like.device))
    inp = StepInput(act.tanh(), model.draw(64, 1, g), torch.ones_like(obs[:, :1]))
    return model.step(model.init(obs, cond), inp, cond)[1].uncertainty[name].median().item()


def controller(name, search, device):
    """Plans with this learner; by its own reward where it tells one, and until an end."""
    subject = SUBJECTS[name]
    model = Subject(subject.build, subject.spec, subject.imposes, device=device).fresh()
    given = {
        "generator": devices.generator(0, device),
        "reward": None if model.tells_reward else lambda obs, act, after: -after.square().sum(-1),
        "terminal": lambda obs, act, after: after[:, 0].abs() > 2,
    }
    if search == "limit":
        doubt = "disagreement" if "ensemble" in name else "size" if name == "noisy" else "aleatoric"
        doubt = "implausibility" if name == "filtered-mixer" else doubt
        limit = threshold(model, doubt)
        assert 0 <= limit < math.inf
        worth = Worth(particles=2, uncertainty=doubt, limit=limit, pinned=False)
        return Mpc(replace(PRESETS["icem"], horizon=4), worth, model, **given)
    planner = replace(SEARCHES[search], horizon=4)
    if planner.proposals:
        agent = SacConfig(hidden=(8,)).build(model.spec, devices.generator(3, device), dtype=torch.float64)
        worth = Worth(discount=0.99, particles=2, pessimism=1.0)
        return over(agent, 0, model, planner=planner, worth=worth, **given)
    return Mpc(planner, Worth(particles=2), model, **given)


@pytest.mark.filterwarnings("error:not captured as a graph")
@pytest.mark.parametrize(("name", "search"), PAIRS, ids=map("-".join, PAIRS))
def test_a_replayed_plan_is_the_plan(name, search, monkeypatch):
    device, acts = devices.pick(), []
    for graphs in ("1", "0"):
        monkeypatch.setenv("MBRL_GRAPHS", graphs)
        mpc = controller(name, search, device)
        mpc.begin(3)
        g, width = devices.generator(1, device), mpc.model.spec.obs
        acts.append([mpc(torch.randn(3, width, generator=g, device=device, dtype=torch.float64)) for _ in range(3)])
    for graphed, eager in zip(*acts, strict=True):
        torch.testing.assert_close(graphed, eager)
