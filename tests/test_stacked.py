"""The compiled perceptrons against torch's own operations."""

import ctypes
import re
import types
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mbrl import compiled, stacked
from mbrl.nets import StackedMLP, apply_layers, gaussian_draw

pytestmark = pytest.mark.skipif(stacked.problem() is not None, reason="no C compiler")

SHAPES = [  # networks, sizes, rows, whether all networks have the same rows
    (1, [1, 1], 1, False),
    (2, [1, 1], 9, True),
    (3, [5, 13, 17, 3], 37, True),
    (2, [4, 33, 16], 129, False),
    (3, [8, 48, 49, 7], 257, True),
    (2, [3, 300, 64, 65, 128], 70, False),
    (5, [23, 200, 200, 36], 300, False),
]


def stack(n, sizes, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    return [x for i, o in pairwise(sizes) for x in (draw(n, i, o) / i**0.5, 0.3 * draw(n, 1, o))]


def by_torch(layers, x, activation):
    for i in range(0, len(layers), 2):
        x = x @ layers[i] + layers[i + 1]
        if i < len(layers) - 2:
            x = F.silu(x) if activation == "silu" else F.relu(x)
    return x


@pytest.fixture(autouse=True)
def no_gradients():
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize(("n", "sizes", "rows", "shared"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_compiled_networks_are_torchs_for_any_number_of_threads(dtype, n, sizes, rows, shared, activation):
    layers = stack(n, sizes, dtype)
    g = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(1 if shared else n, rows, sizes[0], generator=g, dtype=dtype)
    assert stacked.serves(layers, x, activation)
    out = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out.append(stacked.apply(layers, x, activation))
    assert all(torch.equal(y, out[0]) for y in out)
    want = by_torch([p.double() for p in layers], x.double(), activation)
    error = ((out[0] - want).norm() / want.norm()).item()
    assert error < (1e-6 if dtype == torch.float32 else 1e-14)
    alone = stacked.apply(layers, x[:, rows // 2 : rows // 2 + 1], activation)
    assert torch.equal(alone, out[0][:, rows // 2 : rows // 2 + 1]), "a row depends on those beside it"
    assert torch.equal(apply_layers(layers, x, activation), out[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_activation_is_accurate_everywhere(dtype):
    one, zero = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype)
    through = lambda x: stacked.apply((one, zero, one, zero), x[None, :, None], "silu")[0, :, 0]
    x = torch.linspace(-80, 120, 40_001, dtype=dtype)
    want = F.silu(x.double())
    tolerance = 4 * torch.finfo(dtype).eps
    assert ((through(x) - want).abs() <= tolerance * want.abs()).all()
    x = torch.tensor([-torch.inf, -1e20, -200.0, 200.0, 1e20, torch.inf, torch.nan], dtype=dtype)
    y = through(x)
    assert y[1:3].abs().max() < 1e-15
    assert torch.equal(y[3:6], x[3:6])
    assert y[6].isnan()
    assert not y[0].isfinite()
    relu = stacked.apply((one, zero, one, zero), x[None, :, None], "relu")[0, :, 0]
    assert torch.equal(relu[:-1], F.relu(x)[:-1])
    assert relu[-1].isnan()


def test_weights_and_rows_may_be_views_of_something_larger():
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(3, 4 * 6 + 6 + 6 * 2 + 2 + 5, generator=g)
    parts = flat.split([24, 6, 12, 2, 5], 1)
    shapes = [(3, 4, 6), (3, 1, 6), (3, 6, 2), (3, 1, 2)]
    layers = [p.reshape(s) if p.is_contiguous() else p.view(s) for p, s in zip(parts, shapes, strict=False)]
    x = torch.randn(20, 9, 3, generator=g).permute(2, 0, 1)[..., 2:6]
    assert layers[0].data_ptr() == flat.data_ptr()
    assert not x.is_contiguous()
    assert stacked.serves(layers, x, "silu")
    torch.testing.assert_close(stacked.apply(layers, x, "silu"), by_torch(layers, x, "silu"))
    same = x[:1].expand(3, -1, -1)
    torch.testing.assert_close(stacked.apply(layers, same, "silu"), by_torch(layers, same, "silu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "rows", "width"), [(1, 1, 1), (3, 37, 5), (2, 300, 18), (2, 40, 33)])
def test_a_draw_from_what_the_networks_say_is_torchs(monkeypatch, dtype, n, rows, width):
    layers = stack(n, [7, 40, 2 * width], dtype)
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    x, rest, least, more = draw(n, rows, 4), draw(n, rows, 3), draw(n, 1, width).exp(), draw(n, 1, width).exp()
    for noise in (draw(n, rows, width), draw(n, rows, width + 1)[..., :-1], draw(n, 1, width).expand(n, rows, width)):
        given = layers, x, rest, least, more, noise, "silu"
        got = gaussian_draw(*given)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(stacked.apply(layers, x, "silu", rest, (least, more, noise)), got)
        with monkeypatch.context() as plain:
            plain.setenv("MBRL_COMPILE", "0")
            wide = [p.double() for p in layers], *(z.double() for z in given[1:-1]), "silu"
            want = gaussian_draw(*wide)
        mean, raw = by_torch(wide[0], torch.cat(wide[1:3], -1), "silu").chunk(2, -1)
        torch.testing.assert_close(
            want, mean + noise.double() * (least.double() + more.double() * raw.sigmoid()).sqrt()
        )
        assert (got - want).abs().max() < (1e-5 if dtype == torch.float32 else 1e-13)
    mixed = gaussian_draw(layers, x, rest, least.double(), more.float(), noise.float(), "silu")
    assert mixed.dtype == dtype
    for wrong in ((layers, x, rest[:, :0], least, more, noise), (layers, x, rest, least[..., 1:], more, noise)):
        with pytest.raises(ValueError, match="stacked: "):
            gaussian_draw(*wrong, "silu")
    lone = draw(1, n, width).transpose(0, 1)  # dense, whatever the stride of the rows says
    one = gaussian_draw(layers, x[:, :1], rest[:, :1], least, more, lone, "silu")
    torch.testing.assert_close(one, gaussian_draw(layers, x[:, :1], rest[:, :1], least, more, lone.clone(), "silu"))
    odd = stack(n, [7, 4, 2 * width + 1], dtype)
    with pytest.raises(ValueError, match=f"give {2 * width + 1} numbers"):
        gaussian_draw(odd, x, rest, least, more, noise, "silu")
    assert not stacked.serves([p.to("meta") for p in layers], torch.cat([x, rest], -1), "silu")
    with pytest.raises(ValueError, match="beside"):
        gaussian_draw(layers, x, rest.float() if dtype == torch.float64 else rest.double(), least, more, noise, "silu")


def test_it_stands_back_where_it_does_not_serve(monkeypatch):
    layers, x = stack(2, [3, 8, 2], torch.float32), torch.randn(2, 5, 3)
    serves = lambda layers=layers, x=x, activation="silu": stacked.serves(layers, x, activation)
    assert serves()
    with torch.enable_grad():
        assert not serves()
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves()
    assert not serves(activation="tanh")
    assert not serves(x=x.half())
    assert not serves(x=x.double())
    assert not serves(x=x[:, :0])
    assert not serves([layers[0].transpose(1, 2).contiguous().transpose(1, 2), *layers[1:]])
    assert not serves([layers[0], layers[1].expand(2, 5, 8).contiguous(), *layers[2:]])
    assert not serves(stack(1, [3, stacked.WIDEST + 1, 2], torch.float32), x[:1])
    seen = []
    torch.func.vmap(lambda x: (seen.append(serves(x=x)), x)[1])(x[None])
    torch.func.jvp(lambda x: (seen.append(serves(x=x)), x)[1], (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        seen.append(serves(x=torch.autograd.forward_ad.make_dual(x, x)))
    assert seen == [False, False, False]
    monkeypatch.setenv("MBRL_COMPILE", "0")
    assert not serves()


def test_a_gradient_and_a_tangent_pass_through_networks_that_are_otherwise_compiled():
    net = StackedMLP(2, [3, 8, 2], generator=torch.Generator().manual_seed(0))
    x, t = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    _, tangent = torch.func.jvp(net, (x,), (t,))
    each = torch.func.vmap(net)(torch.stack([x, t]))
    torch.testing.assert_close(each, torch.stack([net(x), net(t)]))
    torch.testing.assert_close(tangent, (net(x + 1e-3 * t) - net(x - 1e-3 * t)) / 2e-3, rtol=1e-3, atol=1e-3)
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(net(x.requires_grad_()).sum(), x)
    assert grad.abs().sum() > 0


def test_shapes_that_do_not_fit_are_refused_before_anything_is_read():
    layers, x = stack(2, [3, 8, 2], torch.float32), torch.randn(2, 5, 3)
    for wrong, given in (
        (layers, x[..., :2]),
        (layers, torch.randn(3, 5, 3)),
        ([layers[0], layers[1][..., :7], *layers[2:]], x),
        ([*layers[:2], layers[2][:, :7].contiguous(), layers[3]], x),
        ([*layers[:2], layers[2][:1], layers[3][:1]], x),
    ):
        with pytest.raises(ValueError, match=r"stacked: weights .* meet inputs"):
            stacked.apply(wrong, given, "silu")


def test_threads_of_its_own_where_torch_lends_none(monkeypatch):
    layers, x = stack(4, [3, 8, 2], torch.float32), torch.randn(4, 500, 3)
    want = stacked.apply(layers, x, "silu")
    monkeypatch.setattr(compiled, "_team", lambda: None)
    torch.set_num_threads(3)
    assert torch.equal(stacked.apply(layers, x, "silu"), want)

    monkeypatch.setattr(compiled, "_Work", lambda work: interrupted)
    done = []

    def interrupted(job):
        if not done:
            done.append(job)
            raise KeyboardInterrupt
        done.append(job)

    with pytest.raises(KeyboardInterrupt):
        stacked.apply(layers, x, "silu")
    assert len(done) == 3


def test_memory_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda *of: types.SimpleNamespace(forward=lambda *given: 1))
    with pytest.raises(MemoryError, match="no memory for 8 rows of 2 layers"):
        stacked.apply(stack(1, [3, 8, 2], torch.float32), torch.randn(1, 5, 3), "silu")


def test_what_the_source_reads_is_what_it_is_given():
    """The structure of `stacked.c`, in the same order: a change of one alone would read what is not there."""
    text = stacked.SOURCE.read_text()
    body = re.sub(r"/\*.*?\*/", "", text[text.index("typedef struct") : text.index("} job;")], flags=re.S)
    assert re.findall(r"(\w+)(?:\[[^]]*\])?[,;]", body) == [name for name, _ in stacked._Job._fields_]
    assert f"#define LAYERS {stacked.LAYERS}\n" in text
    assert ctypes.sizeof(stacked._Job) == 8 * (8 + 65 + 2 * 64 + 2 + 2 * 64 + 4 + 2)
