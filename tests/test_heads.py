"""The network with heads: its special cases."""

import pytest
import torch

from mbrl.core import Spec, StepInput
from mbrl.dynamics.heads import HeadsConfig
from mbrl.dynamics.single import SingleConfig

SPEC = Spec(3, 2, 4, 4)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def given(n=6, noise=0):
    g = gen(1)
    return torch.randn(n, 3, generator=g), StepInput(
        torch.rand(n, 2, generator=g), torch.randn(n, noise, generator=g), torch.ones(n, 1)
    )


@pytest.mark.parametrize("gaussian", [False, True])
def test_with_one_head_it_is_the_single_network(gaussian):
    heads = HeadsConfig((16, 16), gaussian=gaussian).build(Spec(3, 2), gen())
    single = SingleConfig(gaussian, (16, 16), (0.0,) * 3).build(Spec(3, 2), gen())
    layers = [*heads.trunk.layers(), *heads.heads.layers()]
    with torch.no_grad():
        for mine, its in zip(layers, single.net.layers(), strict=True):
            its.copy_(mine)
    obs, inp = given(noise=heads.noise_dim)
    _, got = heads.step(obs, inp, heads.condition(torch.zeros(1, 0)))
    _, want = single.step(obs, inp, ())
    torch.testing.assert_close(got, want)


def test_each_group_has_the_head_of_its_context_and_mixtures_are_linear():
    model = HeadsConfig((16,)).build(SPEC, gen())
    obs, inp = given()
    at = lambda ctx: model.step(obs, inp, model.condition(ctx))[1].obs
    alone = [at(model.contexts[i : i + 1]) for i in range(4)]
    both = at(model.contexts[[1, 3]])
    torch.testing.assert_close(both[:3], alone[1][:3])
    torch.testing.assert_close(both[3:], alone[3][3:])
    torch.testing.assert_close(at(torch.tensor([[0.5, 0.5, 0.0, 0.0]])), (alone[0] + alone[1]) / 2)


def test_a_shared_head_takes_no_account_of_the_task():
    model = HeadsConfig((16,), shared=True).build(SPEC, gen())
    obs, inp = given()
    at = lambda i: model.step(obs, inp, model.condition(model.contexts[i : i + 1]))[1].obs
    assert torch.equal(at(0), at(3))
    assert model.heads.n == 1


def test_too_few_contexts_are_refused():
    with pytest.raises(ValueError, match="contexts of width 2 for 3 systems"):
        HeadsConfig().build(Spec(3, 2, 2, 3))
