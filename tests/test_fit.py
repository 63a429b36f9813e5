"""The generic fit: its rules by stand-ins with scripted errors, its numbers by equality with plain torch."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from mbrl.core import Markov, Spec, StepInput
from mbrl.data import Dataset, joined
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.fit import Adam, FitConfig, Parts, Rows, fit, order, streams

close = torch.testing.assert_close
SMALL = EnsembleConfig(members=3, elites=2, hidden=(16, 16), weight_decay=(1e-4, 2e-4, 3e-4))


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(n=600, episode=30, seed=0, dtype=torch.float32) -> Dataset:
    """x' = A x + B a and a reward, in episodes that time out."""
    g = gen(seed)
    a = torch.tensor([[0.9, 0.2], [-0.2, 0.9]])
    act = torch.rand(n, 1, generator=g) * 2 - 1
    obs, after = torch.zeros(n, 2), torch.zeros(n, 2)
    for i in range(n):
        obs[i] = torch.randn(2, generator=g) if i % episode == 0 else after[i - 1]
        after[i] = obs[i] @ a + torch.tensor([0.0, 0.5]) * act[i]
    yes = torch.ones(n, dtype=torch.bool)
    starts = torch.arange(0, n + 1, episode)
    low = -torch.ones(1)
    return Dataset(obs, act, after[:, 0], after, ~yes, yes, starts, low, -low, dt=0.5).to(dtype)


class Scripted(Markov):
    """Three parts whose parameters count their updates (at lr 1 and without momentum to speak of) and whose held-out
    errors are given: errors [epochs, 3]."""

    def __init__(self, errors):
        super().__init__()
        self.spec, self.noise_dim, self.parts, self.epoch = Spec(2, 1), 0, 3, 0
        self.errors, self.w = torch.tensor(errors), nn.Parameter(torch.zeros(3, 2))
        self.final = None

    def step(self, state, inp, cond):
        raise NotImplementedError

    def loss(self, segment, noise):
        raise NotImplementedError

    def losses(self, segment, noise):
        return -self.w.sum(1)  # Adam's step under a constant gradient is lr

    def validate(self, segment, noise):
        self.epoch += 1
        return self.errors[self.epoch - 1]

    def finish(self, errors):
        self.final = errors.tolist()


def scripted(errors, **options):
    model = Scripted(errors)
    config = FitConfig(lr=1.0, batch=480, max_epochs=len(errors), **options)  # one update an epoch
    return model, fit(model, linear(), config, gen())


# ---------------------------------------------------------------- when parts stop, and at what


def test_each_part_keeps_its_best_and_has_its_own_end():
    table = [
        [9.0, 9.0, 5.0],
        [5.0, 9.0, 6.0],
        [8.0, 7.0, 7.0],
        [8.0, 6.0, 8.0],
        [8.0, 5.0, 9.0],
        [1.0, 4.0, 1.0],
        [1.0, 4.5, 1.0],
    ]
    model, report = scripted([*table, *[[9.0, 9.0, 9.0]] * 3], patience=3)
    # part 0 is done after epoch 5, part 2 after 4: what they would reach in epoch 6 comes too late; part 1 goes on
    assert report.epochs == 9
    assert report.best == [5.0, 4.0, 5.0] == model.final
    close(model.w.data, torch.tensor([[2.0, 2.0], [6.0, 6.0], [1.0, 1.0]]), atol=1e-4, rtol=0)
    assert report.holdout == [*table, *[[9.0] * 3] * 2]
    assert report.steps == 9
    assert report.diverged == 0


def test_small_gains_are_kept_and_add_up():
    errors = [
        100.0,
        99.4,
        98.9,
        98.4,
        97.9,
        97.5,
        97.3,
    ]  # never 1 % at once; 1.1 % after three epochs, 1.01 % after two more
    model, report = scripted([[e] * 3 for e in [*errors, 97.2]], patience=3)
    assert report.epochs == 8
    assert report.best == pytest.approx([97.2] * 3)
    model, report = scripted([[e] * 3 for e in [100.0, 99.9, 99.8, 99.7, 50.0]], patience=3)
    assert report.epochs == 4
    assert report.best == pytest.approx([99.7] * 3)  # too small a gain to go on, yet the best there was
    close(model.w.data, torch.full((3, 2), 4.0), atol=1e-4, rtol=0)


def test_a_part_that_diverges_is_restored():
    nan = torch.nan
    model, report = scripted([[9.0, 9.0, nan], [5.0, nan, nan], [4.0, 7.0, nan], [3.0, 6.0, nan]], patience=2)
    assert report.best == [3.0, 6.0, torch.inf]
    assert report.diverged == 3  # part 2 was done after two
    # part 1: the first update is kept, the second undone with its moments: two more from there, as steps 3 and 4
    adam = lambda seen, step: (1 - 0.9**seen) / (1 - 0.9**step) * ((1 - 0.999**step) / (1 - 0.999**seen)) ** 0.5
    w = 1 + adam(2, 3) + adam(3, 4)
    close(model.w.data, torch.tensor([[4.0, 4.0], [w, w], [0.0, 0.0]]), atol=1e-3, rtol=0)


def test_a_lost_member_leaves_the_others_bit_for_bit():
    def train(lost):
        model = SMALL.build(Spec(2, 1), gen(1))
        if lost:
            model.net.weights[0].data[1] = torch.nan
        report = fit(model, linear(), FitConfig(batch=64, max_epochs=3), gen(2))
        return model, report

    (good, plain), (bad, report) = train(False), train(True)
    for a, b in zip(good.parameters(), bad.parameters(), strict=True):
        close(a[[0, 2]], b[[0, 2]], rtol=0, atol=0)
    assert report.best[1] == torch.inf
    assert [report.best[i] for i in (0, 2)] == [plain.best[i] for i in (0, 2)]
    assert report.diverged == 3
    assert sorted(bad.elites.tolist()) == [0, 2]
    assert all(x == x for x in report.train_loss)


def test_max_epochs_and_progress():
    seen = []
    model = SMALL.build(Spec(2, 1), gen())
    report = fit(model, linear(), FitConfig(max_epochs=2), gen(), lambda *x: seen.append(x))
    assert [(a, b) for a, b, _ in seen] == [(1, 2), (2, 2)]
    assert [x["train"] for _, _, x in seen] == report.train_loss
    assert seen[-1][2]["holdout"] == pytest.approx(sum(report.best) / 3)
    assert seen[-1][2]["active"] == 3
    assert report.steps == 2 * (480 // 256)


# ---------------------------------------------------------------- what it computes


def test_an_ensemble_learns_a_linear_system():
    model, data = (
        EnsembleConfig(members=3, elites=2, hidden=(64, 64), weight_decay=(0.0,) * 3).build(Spec(2, 1), gen()),
        linear(2000),
    )
    report = fit(model, data, FitConfig(batch=64, max_epochs=60, lr=3e-3), gen())
    assert max(report.best) < 1e-4  # the changes themselves have a mean square of 0.05
    assert report.train_loss[-1] < report.train_loss[0] - 4
    fresh = linear(300, seed=5)
    inp = StepInput(fresh.act, torch.zeros(300, 4), torch.full((300, 1), 0.5))
    _, pred = model.step(fresh.obs, inp, ())
    assert (pred.obs - fresh.next_obs).pow(2).mean() < 2e-4
    assert (pred.reward - fresh.reward).pow(2).mean() < 2e-4
    errors = torch.tensor(report.best)
    assert set(model.elites.tolist()) == set(errors.argsort()[:2].tolist())


def test_the_best_error_is_that_of_the_model_left_behind():
    model, data = SMALL.build(Spec(2, 1), gen()), linear()
    config = FitConfig(batch=64, max_epochs=6, lr=3e-2)
    report = fit(model, data, config, gen(3))
    rows = Rows(data, 1, model.upper)
    _, held = rows.split(config, gen(3))
    assert model.validate(rows.segment(held), torch.zeros(len(held), 1, 4)).tolist() == report.best
    assert min(x[0] for x in report.holdout) == report.best[0]


def test_the_update_is_adam_with_coupled_decay_member_by_member():
    data, config = linear(dtype=torch.float64), FitConfig(batch=32, lr=1e-2)
    model = SMALL.build(Spec(2, 1), gen()).double()
    rows = Rows(data, 1, model.upper)
    train, _ = rows.split(config, gen())
    model.prepare(rows.segment(train))
    batches = list(order(streams(train, 3, config, gen()), 32, gen()))[:5]
    members = []
    for i in range(3):  # each alone, the decay written into the loss
        single = dataclasses.replace(SMALL, members=1, elites=1).build(Spec(2, 1), gen()).double()
        state = {
            k: v[i : i + 1] if v.shape[:1] == (3,) and "puts" not in k and "gets" not in k else v
            for k, v in model.state_dict().items()
        }
        single.load_state_dict(state | {"elites": torch.zeros(1, dtype=torch.int64)})
        optimizer = torch.optim.Adam(single.parameters(), lr=1e-2)
        for index in batches:
            segment = rows.segment(index.reshape(3, 32)[i])
            loss = single.losses(segment, torch.zeros(32, 1, 4)).sum()
            for w, decay in zip(single.net.weights, SMALL.weight_decay, strict=True):
                loss = loss + 0.5 * decay * (w**2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        members.append(single)
    parts = Parts(model, config)
    for index in batches:
        parts.step(rows.segment(index), torch.zeros(96, 1, 4))
    for name, p in model.named_parameters():
        close(p, torch.cat([dict(m.named_parameters())[name] for m in members]), rtol=1e-7, atol=1e-9)


def test_where_the_next_step_leads_is_told_alike_by_a_cpu_and_an_accelerator():
    p = {"a": torch.randn(7, 3, generator=gen()), "b": torch.randn(5, generator=gen(1))}
    adam, g = Adam(p, 1e-2), gen(2)
    for _ in range(3):
        grads = [torch.randn(x.shape, generator=g) for x in p.values()]
        here = {k: x.clone() for k, x in adam.look(grads).items()}
        there = {k: x.clone() for k, x in adam._look(grads).items()}
        before = [x.clone() for x in p.values()]
        adam.step(grads)
        for (k, x), old in zip(p.items(), before, strict=True):
            assert not torch.equal(x, old)
            close(here[k], x, rtol=1e-5, atol=1e-7)
            close(there[k], x, rtol=1e-5, atol=1e-7)
    assert adam.steps == 3


def test_weights_that_decay_to_nothing_are_dropped_at_an_epochs_end():
    """A CPU takes many times as long for a product of subnormal numbers; the predictions are the same without them."""
    data, config = linear(), FitConfig(batch=32)
    model = SMALL.build(Spec(2, 1), gen())
    rows = Rows(data, 1, model.upper)
    model.prepare(rows.segment(rows.split(config, gen())[0]))
    parts, small = Parts(model, config), 1e-40
    weight = model.net.weights[-1]
    mean, square, _ = parts.moments["net.weights.2"]
    with torch.no_grad():
        for x in (weight, mean, square):
            x[:, :, 3:] = small
    state, inp = torch.randn(9, 2), StepInput(torch.randn(9, 1), torch.randn(9, 4), torch.full((9, 1), 0.5))
    before = model.step(state, inp, model.condition(model.context(torch.zeros(1, dtype=torch.int64))))[1]
    parts.record(torch.zeros(()), torch.ones(3))
    after = model.step(state, inp, model.condition(model.context(torch.zeros(1, dtype=torch.int64))))[1]
    for x in (weight, mean, square, *parts.snapshot["net.weights.2"]):
        assert not x[:, :, 3:].any()
    assert weight[:, :, :3].all()
    close(after, before, rtol=0, atol=0)


def test_moments_by_hand_drop_what_is_nothing(monkeypatch):
    monkeypatch.setattr("mbrl.device.SWEEP", 3)
    adam = Adam({"x": torch.ones(2)}, 1e-3)
    for i in range(3):
        adam.step([torch.tensor([1.0, 1e-19 if i == 0 else 0.0])])
        assert adam.mean[0].all(), "small, but not too small to tell"
        assert bool(adam.square[0].all()) == (i < 2)


def test_clipping_is_per_part():
    model = Scripted([[1.0] * 3])
    scale = torch.tensor([[0.1], [10.0], [torch.nan]])
    model.losses = lambda segment, noise: (model.w * scale).sum(1)
    parts = Parts(model, FitConfig(clip=1.0))
    rows = Rows(linear(), 1, model.w)
    parts.step(rows.segment(torch.arange(3)), torch.zeros(3, 1, 0))
    close(model.w.grad.norm(dim=1), torch.tensor([0.1 * 2**0.5, 1.0, 0.0]))
    assert model.w.isfinite().all()


def test_bfloat16_reaches_a_like_error():
    best = {}
    for dtype in ("float32", "bfloat16"):
        model = EnsembleConfig(members=2, elites=1, hidden=(32, 32), weight_decay=(0.0,) * 3).build(Spec(2, 1), gen())
        report = fit(model, linear(1000), FitConfig(batch=64, max_epochs=15, dtype=dtype), gen())
        best[dtype] = sum(report.best)
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert best["float32"] != best["bfloat16"]  # it did run in another precision
    assert best["bfloat16"] < 2 * best["float32"]


# ---------------------------------------------------------------- streams and windows


def test_each_part_has_a_stream_of_its_own():
    train = torch.arange(100, 200)
    own = streams(train, 3, FitConfig(), gen())
    assert own.shape == (3, 100)
    assert ((own >= 100) & (own < 200)).all()
    assert all(50 < len(x.unique()) < 75 for x in own)  # with replacement: 63 % of the rows
    assert not torch.equal(own[0], own[1])
    epoch = order(own, 25, gen(1))
    assert epoch.shape == (4, 75)
    for i in range(3):
        assert torch.equal(epoch.reshape(4, 3, 25)[:, i].flatten().sort().values, own[i].sort().values)
    whole = order(streams(train, 3, FitConfig(bootstrap=False), gen()), 30, gen(1)).reshape(3, 3, 30)
    for i in range(3):
        assert len(whole[:, i].unique()) == 90  # every row at most once an epoch
    assert not torch.equal(whole[:, 0], whole[:, 1])


@pytest.mark.parametrize(("n", "count"), [(600, 120), (9000, 1000)])
def test_the_holdout_is_a_fifth_up_to_a_thousand(n, count):
    rows = Rows(linear(n), 1, torch.zeros(1))
    train, held = rows.split(FitConfig(), gen())
    assert len(held) == count
    assert torch.equal(torch.cat([train, held]).sort().values, torch.arange(n))


@pytest.mark.parametrize("length", [1, 4])
def test_a_holdout_of_all_leaves_something_to_learn_from(length):
    train, held = Rows(linear(60), length, torch.zeros(1)).split(FitConfig(length=length, holdout=1.0), gen())
    assert len(train) > 0
    assert len(held) > 0


def test_a_step_without_a_successor_is_left_out():
    data = linear(60)
    paired = data.paired.clone()
    paired[[29, 59]] = False
    data = dataclasses.replace(data, paired=paired)
    for length, starts in ((1, 58), (4, 52)):
        train, held = Rows(data, length, torch.zeros(1)).split(FitConfig(length=length), gen())
        every = torch.cat([train, held])
        assert len(every) == len(every.unique()) == starts
        assert (every % 30 + length <= 29).all()


@pytest.mark.parametrize("length", [1, 4])
def test_windows_are_the_datasets(length):
    data = linear()
    index = torch.tensor([3, 31, 590])
    got, want = Rows(data, length, torch.zeros(1)).segment(index), data.windows(length, index)
    for a, b in zip(got, want, strict=True):
        close(a, b, rtol=0, atol=0)


def test_longer_windows_are_held_out_by_episode():
    data = linear()
    train, held = Rows(data, 5, torch.zeros(1)).split(FitConfig(length=5), gen())
    apart = set(data.episode[held].tolist())
    assert apart.isdisjoint(data.episode[train].tolist())
    assert len(train) + len(held) == 20 * 26
    assert 0 < len(held) <= 0.2 * 20 * 26
    one = dataclasses.replace(data, starts=torch.tensor([0, 600]))
    train, held = Rows(one, 5, torch.zeros(1)).split(FitConfig(length=5), gen())
    assert len(held) == 119
    assert held.min() > train.max()


def test_longer_windows_are_held_out_of_every_system():
    """The last ones of each, where that many whole episodes are not to be had of all of them."""
    long, short = (dataclasses.replace(linear(), starts=torch.arange(0, 601, n)) for n in (600, 30))
    for parts in ([long, long], [long, short]):
        data = joined(parts, mixed=True)
        train, held = Rows(data, 5, torch.zeros(1)).split(FitConfig(length=5), gen())
        for own, apart in zip(data.of_system(train), data.of_system(held), strict=True):
            assert (len(own) + len(apart)) // 5 - len(apart) in (0, 1)
            assert apart.min() > own.max()


def test_longer_windows_train():
    model = SMALL.build(Spec(2, 1), gen())
    report = fit(model, linear(), FitConfig(length=3, batch=32, max_epochs=3), gen())
    assert report.train_loss[-1] < report.train_loss[0]


@pytest.mark.parametrize(
    ("bad", "says"),
    [({k: 0}, f"got {k}=0; expected at least 1") for k in ("batch", "length", "patience", "max_epochs")]
    + [({"holdout": x}, f"holdout is {x}, expected a share") for x in (-0.1, 1.5, math.nan)]
    + [({"lr": x}, f"lr is {x}, expected a rate above 0") for x in (0.0, -1e-3, math.nan, math.inf)]
    + [({"clip": x}, f"clip is {x}, expected a norm above 0") for x in (0.0, -1.0, math.nan)]
    + [({"gain": x}, f"gain is {x}, expected a number >= 0") for x in (-0.1, math.nan)],
)
def test_settings_that_no_fit_goes_by_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        fit(SMALL.build(Spec(2, 1), gen()), linear(60), FitConfig(**bad), gen())


def test_too_little_data():
    for data, length in ((linear(30), 30), (linear(60, episode=2), 3)):
        with pytest.raises(ValueError, match="windows of"):
            fit(SMALL.build(Spec(2, 1), gen()), data, FitConfig(length=length), gen())
    report = fit(SMALL.build(Spec(2, 1), gen()), linear(30), FitConfig(max_epochs=1), gen())
    assert report.steps == 1  # fewer rows than a batch: all of them are one


def test_every_parameter_must_lead_with_the_parts():
    model = Scripted([[1.0] * 3])
    model.shared = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="shared"):
        fit(model, linear(), FitConfig(), gen())


# ---------------------------------------------------------------- the same numbers again


def test_a_seed_repeats_and_the_global_generator_is_left_alone():
    def train():
        model = SMALL.build(Spec(2, 1), gen())
        return model, fit(model, linear(), FitConfig(batch=64, max_epochs=2), gen(4))

    state = torch.get_rng_state()
    (a, first), (b, second) = train(), train()
    assert torch.equal(state, torch.get_rng_state())
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(second, seconds=0)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"bootstrap": False, "clip": 0.5}, {"length": 3, "dtype": "bfloat16"}])
@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_fit_goes_on_to_the_same_numbers(options, at):
    config = FitConfig(batch=64, max_epochs=5, patience=2, lr=2e-2, **options)
    saved = []
    keep = lambda state: saved.append(save({k: v.contiguous() for k, v in state.items()}))
    whole, want = SMALL.build(Spec(2, 1), gen()), None
    want = fit(whole, linear(), config, gen(7), checkpoint=keep)
    assert len(saved) == want.epochs > at
    again = SMALL.build(Spec(2, 1), gen(99))  # what it held before does not matter
    got = fit(again, linear(), config, gen(98), resume=load(saved[at - 1]))
    assert dataclasses.replace(got, seconds=0) == dataclasses.replace(want, seconds=0)
    for (name, x), y in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        close(x, y, rtol=0, atol=0, msg=name)


def test_another_models_state_is_refused():
    saved = []
    fit(SMALL.build(Spec(2, 1), gen()), linear(), FitConfig(max_epochs=1), gen(), checkpoint=saved.append)
    other = dataclasses.replace(SMALL, hidden=(8, 16)).build(Spec(2, 1), gen())
    with pytest.raises(ValueError, match="another model"):
        fit(other, linear(), FitConfig(max_epochs=2), gen(), resume=saved[0])
