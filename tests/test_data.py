"""Datasets and buffers against plain Python."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy import stats

from mbrl.core import Spec
from mbrl.data import Buffer, Dataset, Transitions, one_step


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def episodes(lengths, unpaired=(), terminal=(), dt=1.0):
    """Row (e, s) of episode e has obs (e, s), act s, reward 10 e + s and is followed by (e, s + 1); the last row of the
    episodes `unpaired` by no one knows what."""
    e = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    s = torch.tensor([j for n in lengths for j in range(n)])
    last = torch.tensor([j == n - 1 for n in lengths for j in range(n)])
    inside = lambda which: torch.tensor([i in which for i in e.tolist()], dtype=torch.bool)
    obs = torch.stack([e, s], 1).float()
    paired = ~(last & inside(unpaired))
    after = obs + paired[:, None] * torch.tensor([0.0, 1.0])
    starts = torch.tensor([0, *np.cumsum(lengths).tolist()])
    end = last & inside(terminal)
    bounds = torch.full((1,), -2.0), torch.full((1,), 3.0)
    return Dataset(obs, s[:, None].float(), 10.0 * e + s, after, end, paired, starts, *bounds, dt=dt)


FEW = st.lists(st.integers(1, 6), min_size=1, max_size=5)


# ---------------------------------------------------------------- transitions


SPEC = Spec(3, 2)


def transitions(n, spec=SPEC):
    g = gen()
    shape = lambda *s: torch.randn(*n, *s, generator=g)
    end = torch.rand(n, generator=g) < 0.5
    return Transitions(shape(spec.obs), shape(spec.act), shape(), shape(spec.obs), end.float())


@pytest.mark.parametrize("n", [(4,), (2, 4), (0,)])
@pytest.mark.parametrize("spec", [SPEC, Spec(1, 0)])
def test_packed_transitions_unpack(n, spec):
    data = transitions(n, spec)
    packed = data.pack()
    assert packed.shape == (*n, 2 * spec.obs + spec.act + 2)
    got = Transitions.unpack(packed, spec)
    assert all(torch.equal(a, b) for a, b in zip(got, data, strict=True))
    if packed.numel():
        assert got.reward.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr(), "views, not copies"


def test_a_terminal_of_booleans_packs():
    data = transitions((5,))
    got = Transitions.unpack(data._replace(terminal=data.terminal > 0.5).pack(), SPEC)
    assert torch.equal(got.terminal, data.terminal)


def test_transitions_as_windows_of_one_step():
    data = transitions((5,))
    seg = one_step(data, dt=0.25)
    assert torch.equal(seg.obs, torch.stack([data.obs, data.next_obs], 1))
    assert torch.equal(seg.act[:, 0], data.act)
    assert torch.equal(seg.reward[:, 0], data.reward)
    assert torch.equal(seg.terminal[:, 0], data.terminal == 1)
    assert seg.terminal.dtype == torch.bool
    assert seg.mask.all()
    assert seg.mask.shape == (5, 1)
    assert seg.dt.eq(0.25).all()
    assert seg.dt.shape == (5, 1, 1)
    assert seg.system.tolist() == [0]


# ---------------------------------------------------------------- datasets


@given(FEW)
def test_the_index_of_episodes(lengths):
    data = episodes(lengths)
    assert len(data) == sum(lengths)
    assert data.episodes == len(lengths)
    assert data.lengths.tolist() == lengths
    assert torch.equal(data.episode, data.obs[:, 0].long())
    assert data.spec == Spec(2, 1)


def test_returns_are_numpy_s():
    rng = np.random.default_rng(0)
    lengths = [1, 500, 3, 1]
    reward = rng.normal(1e4, 1.0, sum(lengths)).astype(np.float32)
    data = replace(episodes(lengths), reward=torch.from_numpy(reward))
    cuts = np.split(reward.astype(np.float64), np.cumsum(lengths)[:-1])
    np.testing.assert_allclose(data.returns.numpy(), [c.sum() for c in cuts], rtol=1e-7)
    assert data.returns.dtype == torch.float32


@given(FEW, st.integers(1, 4), st.data())
def test_windows_hold_whole_stretches_of_one_episode(lengths, size, draw):
    unpaired = draw.draw(st.sets(st.integers(0, len(lengths) - 1)))
    data = episodes(lengths, unpaired, dt=0.5)
    seg = data.windows(size)
    steps = [n - (e in unpaired) for e, n in enumerate(lengths)]  # that have a successor
    want = [(e, s) for e, n in enumerate(steps) for s in range(n - size + 1)]
    assert [tuple(row) for row in seg.obs[:, 0].long().tolist()] == want
    for (e, s), obs, act, reward in zip(want, seg.obs, seg.act, seg.reward, strict=True):
        assert obs.tolist() == [[e, s + t] for t in range(size + 1)]
        assert act[:, 0].tolist() == [s + t for t in range(size)]
        assert reward.tolist() == [10 * e + s + t for t in range(size)]
    assert seg.mask.all()
    assert seg.mask.shape == (len(want), size)
    assert seg.dt.eq(0.5).all()
    assert seg.dt.shape == (len(want), size, 1)


@given(FEW, st.integers(1, 4), st.data())
def test_windows_that_begin_anywhere_are_masked_past_the_end(lengths, size, draw):
    unpaired = draw.draw(st.sets(st.integers(0, len(lengths) - 1)))
    data = episodes(lengths, unpaired, terminal=range(len(lengths)))
    index = torch.tensor(draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=8)))
    seg = data.windows(size, index)
    for i, row in enumerate(index.tolist()):
        e, s = data.obs[row].long().tolist()
        left = max(lengths[e] - (e in unpaired) - s, 0)  # steps that follow and have a successor
        mask = [t < left for t in range(size)]
        assert seg.mask[i].tolist() == mask
        assert seg.obs[i].tolist() == [[e, s + min(t, left)] for t in range(size + 1)], "the last repeats"
        assert seg.reward[i].tolist() == [(10 * e + s + t) * m for t, m in enumerate(mask)]
        ends = [m and s + t == lengths[e] - 1 for t, m in enumerate(mask)]
        assert seg.terminal[i].tolist() == ends
        assert seg.act[i].isfinite().all()


def test_rows_for_a_value_function():
    """A row with no successor counts where the task ended there: no value is asked of what follows."""
    data = episodes([2, 2, 2], unpaired=[0, 1], terminal=[1])
    got = data.transitions()
    assert got.obs.tolist() == [[0, 0], [1, 0], [1, 1], [2, 0], [2, 1]]
    assert got.next_obs.tolist() == [[0, 1], [1, 1], [1, 1], [2, 1], [2, 2]]
    assert got.terminal.tolist() == [0, 0, 1, 0, 0]
    assert got.terminal.dtype == torch.float32
    chosen = data.transitions(torch.tensor([4, 0]))
    assert chosen.obs.tolist() == [[2, 0], [0, 0]]
    assert chosen.reward.tolist() == [20, 0]


@given(FEW, st.integers(0, 12), st.integers(0, 3))
def test_a_split_deals_out_the_paired_rows_once(lengths, holdout, seed):
    data = episodes(lengths, unpaired=[0])
    train, held = data.split(holdout, gen(seed))
    paired = data.paired.nonzero()[:, 0].tolist()
    assert sorted([*train.tolist(), *held.tolist()]) == paired
    assert len(held) == min(holdout, len(paired))
    again = data.split(holdout, gen(seed))
    assert torch.equal(train, again[0])
    assert torch.equal(held, again[1])


def test_a_split_is_in_random_order():
    """Position of a row and row are not correlated; another seed gives another order."""
    data = episodes([1000])
    train, held = data.split(200, gen(0))
    order = torch.cat([held, train]).numpy()
    assert stats.spearmanr(order, np.arange(1000)).pvalue > 0.01
    assert not torch.equal(held, data.split(200, gen(1))[1])


def test_to_another_type_keeps_index_and_masks():
    data = replace(episodes([2, 3]), name="x", sha256="y", env="z", meta={"k": 1}, dt=0.1)
    got = data.to(torch.float64)
    for name in ("obs", "act", "reward", "next_obs"):
        assert getattr(got, name).dtype == torch.float64
        assert torch.equal(getattr(got, name).float(), getattr(data, name))
    for name in ("terminal", "paired", "starts", "act_low", "act_high"):
        assert getattr(got, name) is getattr(data, name)
    assert (got.name, got.sha256, got.env, got.meta, got.dt) == ("x", "y", "z", {"k": 1}, 0.1)
    assert data.obs.dtype == torch.float32


def test_to_another_device_takes_everything():
    got = episodes([2, 3]).to("meta")
    for name in ("obs", "act", "reward", "next_obs", "terminal", "paired", "starts", "act_low", "act_high"):
        assert getattr(got, name).device.type == "meta", name
    assert got.starts.dtype == torch.int64


# ---------------------------------------------------------------- the buffer

ONE = Spec(1, 1)


def numbered(start, n):
    """Transitions that hold start, start + 1, ..."""
    x = torch.arange(start, start + n, dtype=torch.float64)
    return Transitions(x[:, None], -x[:, None], x / 2, x[:, None] + 1, x % 2)


def held(buffer, seed):
    """What a seed holds, oldest first, by its own numbers."""
    n, head = buffer.size[seed], buffer.head[seed]
    x = buffer.rows[seed, :n]
    return (x.roll(-head, 0) if n == buffer.capacity else x)[:, 0].tolist()


def everything(buffer, seed):
    """What sampling can reach, by sweeping the unit interval."""
    n = buffer.size[seed]
    uniform = ((torch.arange(n) + 0.5) / n).expand(len(buffer.size), -1)
    return sorted(buffer.sample(uniform)[seed, :, 0].tolist())


@given(
    st.integers(1, 7), st.lists(st.tuples(st.integers(0, 1), st.integers(0, 20)), min_size=1, max_size=12), st.data()
)
def test_a_buffer_is_a_deque_for_each_seed(capacity, batches, draw):
    buffer, models, count = Buffer(2, capacity, ONE, dtype=torch.float64), [deque(maxlen=capacity) for _ in range(2)], 0
    stop = draw.draw(st.integers(0, len(batches) - 1))
    for i, (seed, n) in enumerate(batches):
        buffer.add(seed, numbered(count, n))
        models[seed].extend(range(count, count + n))
        count += n
        if i == stop:  # saved and loaded in mid-ring
            state = load(save({k: v.clone() for k, v in buffer.state_dict().items()}))
            buffer = Buffer(2, capacity, ONE, dtype=torch.float64)
            buffer.load_state_dict(state)
        for s, model in enumerate(models):
            assert buffer.size[s] == len(model)
            assert held(buffer, s) == list(model)
        if all(models):
            for s, model in enumerate(models):
                assert everything(buffer, s) == sorted(model)


def test_sampled_rows_are_what_was_added():
    buffer = Buffer(1, 10, ONE, dtype=torch.float64)
    data = numbered(3, 4)
    buffer.add(0, data)
    got = Transitions.unpack(buffer.sample(torch.tensor([[0.0, 0.3, 0.6, 0.99]])), ONE)
    assert all(torch.equal(a[0], b.flip(0)) for a, b in zip(got, data, strict=True)), "newest first"


@pytest.mark.parametrize("sizes", [[7], [7, 3, 10]])
def test_sampling_is_uniform_over_what_each_seed_holds(sizes):
    buffer = Buffer(len(sizes), 10, ONE)
    for seed, n in enumerate(sizes):
        buffer.add(seed, numbered(100 * seed, n))
    x = buffer.sample(torch.rand(len(sizes), 20_000, generator=gen(0)))
    assert x.shape == (len(sizes), 20_000, 5)
    for seed, n in enumerate(sizes):
        counts = np.bincount(x[seed, :, 0].long().numpy() - 100 * seed, minlength=n)
        assert len(counts) == n
        assert stats.chisquare(counts).pvalue > 0.01


def test_the_largest_uniform_number_stays_inside():
    buffer = Buffer(2, 2**20, ONE)
    for seed in range(2):
        buffer._set(seed, 2**20, 0)
    buffer.rows[:, 0] = 7.0
    top = torch.nextafter(torch.ones(2, 1), torch.zeros(2, 1))
    assert buffer.sample(top)[:, 0].eq(7).all()


def test_a_buffer_that_was_loaded_goes_on_alike():
    a, b = Buffer(2, 5, ONE), Buffer(2, 5, ONE)
    a.add(0, numbered(0, 7))
    a.add(1, numbered(50, 3))
    b.add(0, numbered(90, 5))  # what was there gives way
    b.load_state_dict(a.state_dict())
    for buffer in (a, b):
        buffer.add(0, numbered(20, 2))
        buffer.add(1, numbered(70, 4))
    uniform = torch.rand(2, 30, generator=gen(1))
    assert torch.equal(a.sample(uniform), b.sample(uniform))
    assert a.size == b.size


@pytest.mark.parametrize("n", [0, 2, 5, 9])
def test_a_buffer_forgets_all_but_the_last_rows(n):
    buffer = Buffer(2, 5, ONE)
    for seed in range(2):
        buffer.add(seed, numbered(0, 8))  # 3 .. 7 are left
    buffer.keep(1, n)
    assert everything(buffer, 0) == [3, 4, 5, 6, 7]
    want = list(range(8))[-min(n, 5) :] if n else []
    assert everything(buffer, 1) == want
    other = Buffer(2, 5, ONE)
    other.load_state_dict(buffer.state_dict())
    assert everything(other, 1) == want
    buffer.add(1, numbered(20, 2))
    assert everything(buffer, 1) == [*want, 20, 21][-5:]


def test_a_buffer_saves_no_more_than_it_holds():
    buffer = Buffer(1, 1000, ONE)
    buffer.add(0, numbered(0, 3))
    assert buffer.state_dict()["rows"].shape == (1, 3, 5)


@pytest.mark.parametrize(("seeds", "capacity", "spec"), [(1, 5, ONE), (2, 4, ONE), (2, 5, Spec(2, 1))])
def test_another_buffer_s_state_is_refused(seeds, capacity, spec):
    full = Buffer(2, 5, ONE)
    full.add(0, numbered(0, 5))
    with pytest.raises(ValueError, match=r"saved rows are \(2, 5, 5\), expected \["):
        Buffer(seeds, capacity, spec).load_state_dict(full.state_dict())


def test_a_buffer_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match="capacity is 0, expected at least 1"):
        Buffer(1, 0, ONE)


def test_the_longest_stretch_has_no_gap():
    assert episodes([3, 5, 2]).longest == 5
    assert episodes([3, 5, 2], unpaired=(1,)).longest == 4
    data = episodes([3, 6])
    paired = data.paired.clone()
    paired[5] = False  # the third of six
    assert replace(data, paired=paired).longest == 3


def test_a_dataset_is_shown_as_a_line():
    shown = repr(replace(episodes([2, 3]), name="mine", env="Mine-v0"))
    assert shown == "Dataset('mine': 5 steps, 2 episodes, 2 observations, 1 actions, env='Mine-v0', dt=1, on cpu)"
