"""Devices and generators, as far as a machine without an accelerator can tell; see tests/gpu for the rest."""

import pytest
import torch

from mbrl import device as devices


def test_pick_names_what_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.pick() == torch.device("cpu")
    assert devices.pick("cpu") == torch.device("cpu")
    assert not devices.available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.pick() == torch.device("cuda")
    assert devices.pick("cuda:1") == torch.device("cuda", 1)
    assert devices.pick("cpu") == torch.device("cpu")
    assert devices.available()


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta", "mps"])
def test_a_device_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=f"device: got '{name}', expected 'auto', 'cpu' or 'cuda"):
        devices.pick(name)


def test_an_accelerator_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"got 'cuda', but this machine .* has none; pass --device cpu"):
        devices.pick("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"got 'cuda:2', but this machine .* has 2 of them"):
        devices.pick("cuda:2")


def test_the_cpu_is_described_and_never_waited_for():
    assert devices.describe(torch.device("cpu")) == f"cpu, {torch.get_num_threads()} threads"
    assert devices.synchronize(torch.device("cpu")) is None


def test_a_generator_is_its_own():
    before = torch.get_rng_state()
    a, b = devices.generator(3), devices.generator(3)
    assert torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))
    assert not torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=devices.generator(4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_seeds_are_fresh_whatever_was_seeded():
    torch.manual_seed(0)
    first = [devices.fresh_seed() for _ in range(4)]
    torch.manual_seed(0)
    second = [devices.fresh_seed() for _ in range(4)]
    assert len({*first, *second}) == 8
    assert all(0 <= seed < 2**31 for seed in (*first, *second))


def test_nothing_is_captured_on_the_cpu():
    calls = []
    fn = lambda x: calls.append(1) or x + 1
    assert devices.graphed(fn, torch.zeros(1)) is fn
    assert devices.graphed(fn, 3, {"a": ()}) is fn
    assert not calls, "nor is anything run"


def test_the_slowdown_leaves_the_threads_as_they_were(monkeypatch):
    """And is that of several threads beside one: with a clock of ours, whose ticks are the threads' number."""
    before, now = torch.get_num_threads(), [0.0]

    def clock() -> float:
        now[0] += torch.get_num_threads() / 100
        return now[0]

    monkeypatch.setattr(devices.time, "perf_counter", clock)
    try:
        torch.set_num_threads(3)
        assert devices.slowdown(1.0) == pytest.approx(3.0, rel=0.1)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        assert devices.slowdown(1.0) == 1.0
    finally:
        torch.set_num_threads(before)


def test_freed_memory_is_kept_and_nothing_else_changes():
    """Where the C library can, what is freed comes back at once: the same tensors, without new pages."""
    import resource

    if not devices.keep_memory():
        pytest.skip("this C library has no mallopt")
    work = lambda: torch.zeros(4_000_000).add_(1).sum().item()
    assert work() == 4_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert all(work() == 4_000_000 for _ in range(10))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 10 * 4_000_000 * 4 / 4096 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_too_small_to_change_a_sum_becomes_zero(dtype):
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([0.0, tiny / 4, -tiny / 4, tiny, 1e-20, -1e-20, 1.0, torch.inf, -torch.inf], dtype=dtype)
    devices.drop_subnormals(x)
    assert x.tolist() == [0, 0, 0, 0, *x[4:].tolist()]
    assert x[4:6].abs().min() > 0
    assert x[6:].tolist() == [1, torch.inf, -torch.inf]
    odd = torch.tensor([torch.nan, tiny], dtype=dtype)
    devices.drop_subnormals(odd, x)
    assert odd.isnan().tolist() == [True, False], "what has diverged stays so"
