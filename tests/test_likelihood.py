"""The compiled likelihood and its gradient against torch's own operations."""

import ctypes
import re
import types
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mbrl import compiled, likelihood
from mbrl.core import Segment, Spec
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.nets import gaussian_nll

pytestmark = pytest.mark.skipif(likelihood.problem() is not None, reason="no C compiler")

SHAPES = [  # networks, sizes, rows, whether all networks have the same rows
    (1, [1, 2], 1, False),
    (3, [5, 13, 17, 6], 37, True),
    (2, [3, 300, 64, 65, 14], 70, False),
    (2, [4, 11, 8], 256, False),
    (5, [4, 33, 26], 333, False),
    (3, [2, 3, 16, 2], 777, True),
    (7, [23, 200, 200, 200, 200, 36], 256, False),
]


@pytest.fixture(autouse=True)
def the_same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def problem(n, sizes, rows, shared, dtype=torch.float32, seed=0):
    """layers, x, y, kept, upper, lower"""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    layers = [z for i, o in pairwise(sizes) for z in (draw(n, i, o) / i**0.5, 0.3 * draw(n, 1, o))]
    lead, width = 1 if shared else n, sizes[-1] // 2
    kept = draw(lead, rows) > -1
    kept[:, 0] = True
    upper, lower = 0.5 + 0.1 * draw(n, 1, width), -4 + 0.1 * draw(n, 1, width)
    x, y = draw(lead, rows, sizes[0]), draw(lead, rows, width)
    *layers, upper, lower = (p.requires_grad_() for p in (*layers, upper, lower))
    return layers, x, y, kept, upper, lower


def written_out(layers, x, y, kept, upper, lower, activation):
    """[n], from the definition of the bounds."""
    for i in range(0, len(layers), 2):
        x = x @ layers[i] + layers[i + 1]
        if i < len(layers) - 2:
            x = F.silu(x) if activation == "silu" else F.relu(x)
    mean, raw = x.chunk(2, -1)
    logvar = upper - F.softplus(upper - raw)
    logvar = lower + F.softplus(logvar - lower)
    one = (mean - y) ** 2 * (-logvar).exp() + logvar
    return torch.stack([row[keep].mean() for row, keep in zip(one, kept.expand(len(one), -1), strict=True)])


def gradient(losses, layers, upper, lower, weights=None):
    weights = torch.ones_like(losses) if weights is None else weights.to(losses)
    return torch.autograd.grad((losses * weights).sum(), [*layers, upper, lower])


def far(got, want):
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize(("n", "sizes", "rows", "shared"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_and_its_gradient_are_those_of_the_definition(dtype, n, sizes, rows, shared, activation):
    given = layers, x, y, kept, upper, lower = problem(n, sizes, rows, shared, dtype)
    assert likelihood.serves(layers, x, y, kept, upper, lower, activation)
    weights = torch.linspace(0.5, 2, n)
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        losses = gaussian_nll(*given, activation)
        found.append((losses.detach(), *gradient(losses, layers, upper, lower, weights)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True)), "depends on the threads"
    wide = [[p.detach().double().requires_grad_() for p in layers], *(z.detach().double() for z in (x, y)), kept]
    wide += [p.detach().double().requires_grad_() for p in (upper, lower)]
    losses = written_out(*wide, activation)
    want = (losses.detach(), *gradient(losses, wide[0], *wide[4:], weights))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert all(far(a, b) < tolerance for a, b in zip(found[0], want, strict=True))


def test_plain_torch_says_the_same(monkeypatch):
    given = layers, _, _, _, upper, lower = problem(3, [5, 13, 6], 70, False, torch.float64)
    losses = gaussian_nll(*given, "silu")
    found = gradient(losses, layers, upper, lower)
    with torch.no_grad():
        torch.testing.assert_close(gaussian_nll(*given, "silu"), losses)
    monkeypatch.setenv("MBRL_COMPILE", "0")
    plain = gaussian_nll(*given, "silu")
    torch.testing.assert_close(plain, losses)
    torch.testing.assert_close(gradient(plain, layers, upper, lower), found)


def test_the_ensembles_training_loss_is_compiled(monkeypatch):
    g = torch.Generator().manual_seed(0)
    model = EnsembleConfig(members=3, elites=2, hidden=(16, 16), weight_decay=(0.0,) * 3).build(Spec(4, 2), g)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    b = 3 * 40
    mask = torch.rand(b, 1, generator=g) > 0.3
    never, dt, system = torch.zeros_like(mask), torch.ones(b, 1, 1), torch.zeros(1, dtype=torch.int64)
    segment = Segment(draw(b, 2, 4), draw(b, 1, 2), draw(b, 1), never, mask, dt, system)
    calls = []
    real = likelihood.apply
    monkeypatch.setattr(likelihood, "apply", lambda *given: calls.append(1) or real(*given))
    found = torch.autograd.grad(model.losses(segment, draw(b, 1, 0)).sum(), list(model.parameters()))
    assert calls == [1]
    monkeypatch.setenv("MBRL_COMPILE", "0")
    want = torch.autograd.grad(model.losses(segment, draw(b, 1, 0)).sum(), list(model.parameters()))
    assert calls == [1]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_a_network_that_is_not_finite_leaves_the_others_alone():
    given = layers, x, y, kept, upper, lower = problem(3, [5, 13, 6], 300, True)
    want = gaussian_nll(*given, "silu")
    grads = gradient(want, layers, upper, lower)
    for bad in (torch.nan, torch.inf, 1e38):
        with torch.no_grad():
            spoiled = [p.clone() for p in layers]
            spoiled[0][1] = bad
        spoiled = [p.requires_grad_() for p in spoiled]
        losses = gaussian_nll(spoiled, x, y, kept, upper, lower, "silu")
        assert not losses[1].isfinite()
        assert torch.equal(losses[[0, 2]], want[[0, 2]])
        for got, good in zip(gradient(losses, spoiled, upper, lower), grads, strict=True):
            assert torch.equal(got[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("compiled_", ["1", "0"])
def test_rows_that_do_not_count_do_not(monkeypatch, compiled_):
    monkeypatch.setenv("MBRL_COMPILE", compiled_)
    layers, x, y, kept, upper, lower = problem(2, [4, 11, 8], 90, False)
    losses = gaussian_nll(layers, x, y, kept, upper, lower, "silu")
    want = gradient(losses, layers, upper, lower)
    other = torch.where(kept[..., None], y, torch.nan)
    again = gaussian_nll(layers, x, other, kept, upper, lower, "silu")
    assert torch.equal(again, losses)
    assert all(torch.equal(a, b) for a, b in zip(gradient(again, layers, upper, lower), want, strict=True))
    nothing = gaussian_nll(layers, x, y, torch.zeros_like(kept), upper, lower, "silu")
    assert torch.equal(nothing, torch.zeros(2))
    assert all(not g.any() for g in gradient(nothing, layers, upper, lower))


def test_the_gradient_is_taken_over_as_it_is_and_can_be_asked_for_again():
    given = layers, _, _, _, upper, lower = problem(2, [4, 11, 8], 90, False)
    params = [*layers, upper, lower]
    losses = gaussian_nll(*given, "silu")
    first = torch.autograd.grad(losses.sum(), params, retain_graph=True)
    want = [g.clone() for g in first]
    assert all(g.is_contiguous() for g in first)
    for g in first:
        g.zero_()
    again = torch.autograd.grad(losses.sum(), params, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
    with torch.no_grad():
        layers[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(losses.sum(), params)


def test_what_becomes_of_the_gradient_is_differentiated_too(monkeypatch):
    given = layers, _, _, _, upper, lower = problem(2, [4, 11, 8], 90, False, torch.float64)
    upper.requires_grad_(False)
    params = [*layers, lower]

    def found():
        losses = gaussian_nll(*given, "silu")
        penalty = sum(g.square().sum() for g in torch.autograd.grad(losses.sum(), params, create_graph=True))
        rows = torch.autograd.grad(gaussian_nll(*given, "silu"), params, torch.eye(2).double(), is_grads_batched=True)
        return [*torch.autograd.grad(losses.sum() + penalty, params), *rows]

    got = found()
    monkeypatch.setenv("MBRL_COMPILE", "0")
    torch.testing.assert_close(got, found())


def test_it_stands_back_where_it_does_not_serve(monkeypatch):
    layers, x, y, kept, upper, lower = problem(2, [3, 8, 4], 5, False)
    given = {"layers": layers, "x": x, "y": y, "kept": kept, "upper": upper, "lower": lower, "activation": "silu"}
    serves = lambda **other: likelihood.serves(**(given | other))
    assert serves()
    with torch.no_grad():
        assert not serves()
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves()
    assert not serves(layers=[p.detach() for p in layers], upper=upper.detach(), lower=lower.detach())
    assert not serves(activation="tanh")
    assert not serves(x=x.double())
    assert not serves(y=y.double())
    assert not serves(x=x[:, :0])
    assert not serves(x=x.clone().requires_grad_())
    assert not serves(y=y.clone().requires_grad_())
    assert not serves(x=x[:1])
    assert not serves(kept=kept[:1])
    for name in ("x", "y", "kept", "upper", "lower"):
        assert not serves(**{name: given[name].to("meta")})
    assert not serves(layers=[layers[0].to("meta"), *layers[1:]])
    assert not serves(layers=[layers[0].transpose(1, 2).contiguous().transpose(1, 2), *layers[1:]])
    assert not serves(layers=[layers[0], layers[1].expand(2, 5, 8).contiguous(), *layers[2:]])
    assert not serves(upper=upper.expand(2, 5, 2).contiguous())
    seen = []
    torch.func.vmap(lambda x: (seen.append(serves(x=x)), x)[1])(x[None])
    assert seen == [False]
    shared = gaussian_nll(layers, x[:1], y, kept, upper, lower, "silu")
    torch.testing.assert_close(shared, gaussian_nll(layers, x[:1].repeat(2, 1, 1), y, kept, upper, lower, "silu"))
    monkeypatch.setenv("MBRL_COMPILE", "0")
    assert not serves()


def test_shapes_that_do_not_fit_are_refused_before_anything_is_read():
    layers, x, y, kept, upper, lower = problem(2, [3, 8, 4], 5, False)
    apply = lambda *given: likelihood.apply(*given, "silu", gaussian_nll)
    for wrong in ([layers[0], layers[1][..., :7], *layers[2:]], [*layers[:2], layers[2][:1], layers[3][:1]]):
        with pytest.raises(ValueError, match=r"gaussian_nll: weights .* meet inputs"):
            apply(wrong, x, y, kept, upper, lower)
    with pytest.raises(ValueError, match=r"gaussian_nll: weights .* meet inputs"):
        apply(layers, x[..., :2], y, kept, upper, lower)
    good = {"x": x, "y": y, "kept": kept, "upper": upper, "lower": lower}
    cut = {"x": x[:, :4], "y": y[..., :1], "kept": kept[:, :4], "upper": upper[..., :1], "lower": lower[:1]}
    for name, value in cut.items():
        with pytest.raises(ValueError, match=r"gaussian_nll: got x .* expected"):
            apply(layers, *(good | {name: value}).values())
    odd, *rest = problem(2, [3, 8, 5], 5, False)
    with pytest.raises(ValueError, match="networks that give 5 numbers"):
        apply(odd, *rest)


def test_a_nan_of_any_bits_is_one():
    layers, x, y, kept, upper, lower = problem(1, [3, 8, 4], 5, False)
    with torch.no_grad():
        layers[-1][..., 2:] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    losses = gaussian_nll(layers, x, y, kept, upper, lower, "silu")
    assert losses.isnan().all()
    assert gradient(losses, layers, upper, lower)[-3][..., 2:].isnan().all()


def test_memory_that_is_not_there_is_an_error(monkeypatch):
    given = problem(1, [3, 8, 2], 5, False)
    monkeypatch.setattr(compiled, "library", lambda *of: types.SimpleNamespace(gradient=lambda *given: 1))
    with pytest.raises(MemoryError, match="no memory for 5 rows of 2 layers"):
        likelihood.apply(*given, "silu", gaussian_nll)


def test_what_the_source_reads_is_what_it_is_given():
    """The structure of `likelihood.c`, in the same order: a change of one alone would read what is not there."""
    text = likelihood.SOURCE.read_text()
    body = re.sub(r"/\*.*?\*/", "", text[text.index("typedef struct") : text.index("} job;")], flags=re.S)
    names = re.findall(r"\*?(\w+)(?:\[[^\]]*\])?(?=[,;])", body)
    assert names == [name for name, _ in likelihood._Job._fields_]
    assert f"#define LAYERS {likelihood.LAYERS}\n" in text
    assert ctypes.sizeof(likelihood._Job) == 8 * (7 + 65 + 8 + 4 * 64 + 2 + 2)
