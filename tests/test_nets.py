"""Stacked networks and normalisers, by their equality with torch's own layers."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mbrl.nets import ROWS, Normalizer, StackedMLP, apply_layers, orthogonal, truncated, uniform

close = torch.testing.assert_close


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def plain(net: StackedMLP, i: int) -> nn.Sequential:
    """Network i of a stack, of torch's own layers."""
    layers = []
    for weight, bias in zip(net.weights, net.biases, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[2]).to(weight)
        linear.weight.data, linear.bias.data = weight[i].T.clone(), bias[i, 0].clone()
        layers += [linear, {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh}[net.activation]()]
    return nn.Sequential(*layers[:-1])


def stack(activation="silu", sizes=(5, 8, 6, 3)):
    net = StackedMLP(4, sizes, activation, uniform, gen()).double()
    for bias in net.biases:
        nn.init.normal_(bias, generator=gen(1))
    return net


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
def test_a_stack_is_its_networks(activation):
    net, x = stack(activation), torch.randn(4, 7, 5, generator=gen(2), dtype=torch.float64)
    want = torch.stack([plain(net, i)(x[i]) for i in range(4)])
    close(net(x), want)
    before = x.clone()
    with torch.no_grad():
        close(net(x), want)  # activations are then made in place, the input is not
    close(x, before, rtol=0, atol=0)


def test_one_set_of_rows_serves_all():
    net, x = stack(), torch.randn(1, 7, 5, generator=gen(2), dtype=torch.float64)
    close(net(x), net(x.repeat(4, 1, 1)))


def test_gradients_are_those_of_the_networks():
    net, x = stack(), torch.randn(4, 7, 5, generator=gen(2), dtype=torch.float64)
    net(x).pow(2).sum().backward()
    for i in range(4):
        one = plain(net, i)
        one(x[i]).pow(2).sum().backward()
        for layer, weight, bias in zip(one[::2], net.weights, net.biases, strict=True):
            close(weight.grad[i], layer.weight.grad.T)
            close(bias.grad[i, 0], layer.bias.grad)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("n", [ROWS, ROWS + 1, 3 * ROWS + 5])
def test_many_rows_are_taken_a_few_at_a_time(n, shared, monkeypatch):
    monkeypatch.setenv("MBRL_COMPILE", "0")
    net, x = stack(), torch.randn(1 if shared else 4, n, 5, generator=gen(2), dtype=torch.float64)
    before, want = x.clone(), net(x)
    seen = []
    with torch.no_grad(), Rows(seen):
        close(net(x), want)
    close(x, before, rtol=0, atol=0)
    assert max(seen) <= ROWS


def test_biases_of_the_rows_own_go_with_their_rows():
    net, n = stack(), 2 * ROWS + 3
    x = torch.randn(4, n, 5, generator=gen(2), dtype=torch.float64)
    layers = list(net.layers())
    layers[1] = torch.randn(4, n, layers[1].shape[2], generator=gen(3), dtype=torch.float64)
    want = apply_layers(layers, x, "silu")
    with torch.no_grad():
        close(apply_layers(layers, x, "silu"), want)


class Rows(TorchFunctionMode):
    """Notes the rows of the matrix products."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.baddbmm:
            self.seen.append(args[1].shape[1])
        return func(*args, **(kwargs or {}))


def test_some_of_the_networks():
    net, x = stack(), torch.randn(3, 7, 5, generator=gen(2), dtype=torch.float64)
    index = torch.tensor([2, 0, 2])
    want = torch.stack([plain(net, i)(x[j]) for j, i in enumerate(index.tolist())])
    close(apply_layers(net.layers(index), x, "silu"), want)


def test_seeds_by_vmap():
    nets, x = [stack(), stack()], torch.randn(4, 7, 5, generator=gen(2), dtype=torch.float64)
    nets[1].weights[0].data *= 2
    params, buffers = torch.func.stack_module_state(nets)
    got = torch.func.vmap(lambda p, b: torch.func.functional_call(nets[0], (p, b), (x,)))(params, buffers)
    close(got, torch.stack([net(x) for net in nets]))
    with torch.no_grad():
        got = torch.func.vmap(lambda p, b: torch.func.functional_call(nets[0], (p, b), (x,)))(params, buffers)
    close(got, torch.stack([net(x) for net in nets]))


def test_truncated_initialisation():
    w = torch.empty(400, 300)
    truncated(w, gen())
    std = 0.5 / 400**0.5
    assert w.abs().max() <= 2 * std
    assert abs(w.std() / std - 0.8796) < 0.01  # a standard normal cut at two has this deviation
    assert abs(w.mean()) < 1e-4


def test_other_initialisations():
    w = torch.empty(100, 300)
    uniform(w, gen())
    assert 0.099 < w.abs().max() <= 0.1
    assert abs(w.std() - 0.1 / 3**0.5) < 1e-3
    w = torch.empty(30, 20)
    orthogonal(w, gen())
    close(w.T @ w, 2 * torch.eye(20), atol=1e-5, rtol=0)


def test_members_differ_and_seeds_repeat():
    state = torch.get_rng_state()
    a, b, c = (StackedMLP(3, [4, 5, 2], generator=gen(s)) for s in (0, 0, 1))
    close(a.weights[0], b.weights[0], rtol=0, atol=0)
    assert not torch.equal(a.weights[0], c.weights[0])
    assert not torch.equal(a.weights[0][0], a.weights[0][1])
    assert all((bias == 0).all() for bias in a.biases)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("n", "sizes"), [(0, [3, 2]), (1, [3]), (1, [3, 0, 2])])
def test_bad_sizes(n, sizes):
    with pytest.raises(ValueError, match="sizes"):
        StackedMLP(n, sizes)


def test_bad_activation():
    with pytest.raises(ValueError, match="gelu"):
        StackedMLP(1, [2, 2], "gelu")  # pyright: ignore


def test_normalizer_standardises_and_inverts():
    x = torch.randn(500, 3, generator=gen()) * torch.tensor([1.0, 100.0, 1e-3]) + torch.tensor([5.0, -1000.0, 0.0])
    norm = Normalizer(3)
    close(norm(x), x, rtol=0, atol=0)
    norm.fit(x.reshape(50, 10, 3))  # any leading axes
    y = norm(x)
    close(y.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    close(y.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    close(norm.inverse(y), x)
    other = Normalizer(3)
    other.load_state_dict(norm.state_dict())
    close(other(x), y, rtol=0, atol=0)


def test_a_column_that_does_not_move_is_only_centred():
    x = torch.full((100, 3), 2.0)
    x[:, 1] = 1e6 + torch.linspace(0, 0.25, 100)  # the rounding of float32, no signal
    x[:, 2] = 0.0
    norm = Normalizer(3)
    norm.fit(x)
    close(norm.std, torch.ones(3), rtol=0, atol=0)
    close(norm(x[:1] + 1).isfinite().all(), torch.tensor(True))
    with pytest.raises(ValueError, match="no rows"):
        norm.fit(x[:0])


def test_small_units_are_signal_and_the_dust_of_float64_is_none():
    signal = torch.randn(300, 3, generator=gen(), dtype=torch.float64)
    norm = Normalizer(3)
    norm.fit(1e-9 * signal)
    close(norm((1e-9 * signal).float()).std(0, correction=0), torch.ones(3), rtol=1e-4, atol=0)
    norm.fit(signal * torch.tensor([1.0, 1e-15, 1e-9]))
    close(norm.std, torch.tensor([1.0, 1.0, 1e-9]), rtol=0.2, atol=0)
