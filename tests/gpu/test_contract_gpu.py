"""The contract on an accelerator, and what a captured graph replays."""

import pytest
import torch
from test_contract import SUBJECTS

from mbrl import device as devices
from mbrl.core import Spec
from mbrl.data import Buffer, Transitions
from mbrl.testing import CHECKS, Subject

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "name",
    ["noisy", "hyper", "latent", "ensemble", "filtered-ensemble", "hypernetwork", "plrnn-clipped", "ode", "mixer"],
)
def test_keeps_the_contract(name, check):
    subject = SUBJECTS[name]
    CHECKS[check](Subject(subject.build, subject.spec, subject.imposes, device=devices.pick()))


def test_a_replayed_graph_computes_what_the_function_does():
    device = devices.pick()
    weight = torch.randn(8, 8, device=device)
    fn = lambda x: {"y": (x["a"] @ weight).relu(), "z": x["b"] + 1}
    inputs = lambda seed: {
        "a": torch.randn(4, 8, device=device, generator=devices.generator(seed, device)),
        "b": torch.full((2,), float(seed), device=device),
    }
    replay = devices.graphed(fn, inputs(0))
    for seed in (1, 2):
        got = {k: v.clone() for k, v in replay(inputs(seed)).items()}
        want = fn(inputs(seed))
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_a_replayed_graph_changes_state_in_place():
    device = devices.pick()
    total = torch.zeros(3, device=device)
    replay = devices.graphed(total.add_, torch.ones(3, device=device))
    total.zero_()  # what capturing left
    for value in (1.0, 10.0):
        replay(torch.full((3,), value, device=device))
    assert total.tolist() == [11.0] * 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one accelerator at most")
def test_a_graph_is_of_the_device_that_its_tensors_are_on():
    """Whichever is the current one, and whichever captured before."""
    current = torch.cuda.current_device()
    for number in (0, 1):
        device = torch.device("cuda", number)
        total = torch.zeros(3, device=device)
        replay = devices.graphed(lambda x, total=total: total.add_(x) + 1, torch.ones(3, device=device), state=[total])
        assert total.tolist() == [0.0] * 3
        assert replay(torch.full((3,), 2.0, device=device)).tolist() == [3.0] * 3
        assert replay(torch.full((3,), 3.0, device=device)).tolist() == [6.0] * 3
        assert total.tolist() == [5.0] * 3
    assert torch.cuda.current_device() == current


def test_graphs_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("MBRL_GRAPHS", "0")
    fn = lambda x: x + 1
    assert devices.graphed(fn, torch.zeros(1, device=devices.pick())) is fn


def test_sampling_can_be_captured_while_the_buffer_grows():
    """A graph that was captured over a small buffer reaches what was added later."""
    device, spec = devices.pick(), Spec(1, 0)
    buffer = Buffer(2, 10, spec, device=device)
    rows = lambda start, n: Transitions(
        torch.arange(start, start + n, device=device)[:, None].float(),
        torch.zeros(n, 0, device=device),
        torch.zeros(n, device=device),
        torch.zeros(n, 1, device=device),
        torch.zeros(n, device=device),
    )
    for seed in range(2):
        buffer.add(seed, rows(0, 2))
    sweep = ((torch.arange(10, device=device) + 0.5) / 10).expand(2, -1).contiguous()
    sample = devices.graphed(buffer.sample, sweep)
    buffer.add(0, rows(2, 8))
    got = sample(sweep)[..., 0]
    assert got[0].tolist() == list(range(9, -1, -1))  # counted back from the newest
    assert got[1].tolist() == [1] * 5 + [0] * 5
