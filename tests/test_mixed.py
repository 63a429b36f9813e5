"""Data of several systems: a learner is told which is which, and serves each under its own context."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mbrl import device as devices
from mbrl import offline
from mbrl.core import Dynamics, Markov, Prediction, Spec, StepInput
from mbrl.data import Dataset, joined
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.experts import ExpertsConfig
from mbrl.dynamics.filtered import Filtered
from mbrl.dynamics.heads import HeadsConfig
from mbrl.dynamics.hyper import HyperConfig
from mbrl.dynamics.mixer import Coda, MixerConfig, MixerFit, fit_mixer
from mbrl.dynamics.single import SingleConfig
from mbrl.fit import FitConfig, Rows, fit
from mbrl.offline import Imagination

gen = lambda seed=0: devices.generator(seed)
never = lambda obs, act, after: torch.zeros(len(obs), dtype=torch.bool)


def pushed(gain, n=600, episode=50, seed=0, dt=1.0):
    """x' = 0.9 x + gain a, in one dimension; the reward is -|x|."""
    act = 2 * torch.rand(n, 1, generator=gen(seed)) - 1
    obs, now = [], torch.zeros(1)
    for t in range(n):
        now = torch.zeros(1) if t % episode == 0 else now
        obs.append(now)
        now = 0.9 * now + gain * act[t]
    obs = torch.stack(obs)
    after = 0.9 * obs + gain * act
    off, one = torch.zeros(n, dtype=torch.bool), torch.ones(1)
    starts = torch.arange(0, n + 1, episode)
    return Dataset(obs, act, -after[:, 0].abs(), after, off, ~off, starts, -one, one, dt)


GAINS = (0.5, -0.5, 0.2)


def mixed():
    return joined([pushed(g, 600 - 100 * i, seed=i) for i, g in enumerate(GAINS)], mixed=True)


# ---------------------------------------------------------------- the data


def test_datasets_stand_one_after_the_other():
    a, b = pushed(0.5, 100), pushed(0.5, 150, seed=1)
    both = joined([a, b])
    assert both.starts.tolist() == [0, 50, 100, 150, 200, 250]
    assert torch.equal(both.obs, torch.cat([a.obs, b.obs]))
    assert both.spec == Spec(1, 1)
    (rows,) = both.of_system(torch.tensor([3, 120]))
    assert rows.tolist() == [3, 120]


def test_each_of_mixed_ones_is_a_system_of_its_own():
    data = mixed().to(torch.float64)
    assert data.spec == Spec(1, 1, systems=3)
    assert data.system.tolist() == [0] * 12 + [1] * 10 + [2] * 8
    assert data.system.dtype == torch.int64
    parts = data.of_system(torch.tensor([1499, 0, 600, 1100, 599]))
    assert [p.tolist() for p in parts] == [[0, 599], [600], [1499, 1100]]
    for part, gain in zip(data.of_system(torch.arange(len(data))), GAINS, strict=True):
        change = data.next_obs[part] - 0.9 * data.obs[part]
        torch.testing.assert_close(change, gain * data.act[part], rtol=0, atol=1e-6)


def test_what_was_joined_is_told_by_its_parts():
    """Else models of one and another mixture would have one name."""
    a, b, c = (replace(pushed(0.5, 50), sha256=x * 64) for x in "abc")
    own = [joined(x, mixed=y).sha256 for x in ([a, b], [a, c], [b, a], [a, b, c]) for y in (False, True)]
    assert len({*own}) == len(own)
    assert joined([a, b]).sha256 == joined([a, b]).sha256
    assert joined([a]).sha256 == a.sha256
    assert joined([pushed(0.5, 50)] * 2).sha256 == ""


def test_datasets_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"part 1 is of .* dt 2.0; the first of .* dt 1.0"):
        joined([pushed(0.5), pushed(0.5, dt=2.0)])
    with pytest.raises(ValueError, match="joined"):
        joined([mixed(), mixed()])
    wide = replace(pushed(0.5), act_high=torch.tensor([2.0]))
    with pytest.raises(
        ValueError, match=r"part 1 has actions within \[-1.0\] and \[2.0\], the first within \[-1.0\] and \[1.0\]"
    ):
        joined([pushed(0.5), wide])
    assert joined([pushed(0.5), wide], mixed=True).systems == 2


def test_batches_hold_as_many_rows_of_each():
    data = mixed()
    rows = Rows(data, 1, data.obs)
    some = torch.tensor([0, 1, 2, 3, 600, 601, 1100])
    assert rows.even(some).tolist() == [[0, 1, 2, 3], [600, 601, 600, 601], [1100] * 4]
    assert rows.even(some, shortest=True).tolist() == [[0], [600], [1100]]
    segment = rows.segment(rows.even(some).flatten(), parts=2)
    assert segment.system.tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError, match=r"the data's systems have \[4, 0, 1\] windows"):
        rows.even(torch.tensor([0, 1, 2, 3, 1100]))


# ---------------------------------------------------------------- fitting

HYPER = HyperConfig(hidden=(16,), hyper=(16,), embedding=4)
HEADS = HeadsConfig(hidden=(16,))
SINGLE = SingleConfig(hidden=(16,), weight_decay=(0.0, 0.0))
MIXER = MixerConfig(Coda((16,)), 2, 4, gating="gradient", reward=True, reward_hidden=(16,))
LEARNERS = {"hyper": HYPER, "heads": HEADS, "experts": ExpertsConfig(SINGLE, 4), "mixer": MIXER, "single": SINGLE}


def gains(model):
    """What each system's actions are taken to do."""
    obs, act = torch.zeros(20, 1), torch.linspace(-1, 1, 20)[:, None]
    out = []
    for system in range(3):
        cond = model.condition(model.context(torch.tensor([system])))
        pred = model.step(obs, StepInput(act, torch.zeros(20, model.noise_dim), torch.ones(20, 1)), cond)[1]
        out.append((pred.obs * act).sum().item() / (act * act).sum().item())
    return out


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_with_contexts_learns_each_system_and_one_without_their_mean(name):
    data = mixed()
    model = LEARNERS[name].build(data.spec, gen())
    report = fit(model, data, FitConfig(batch=64, lr=1e-2, patience=20, max_epochs=40), gen())
    assert report.steps == 40 * (480 // (64 // 3)) or report.epochs < 40
    want = list(GAINS) if name != "single" else [sum(GAINS) / 3] * 3
    assert gains(model.eval()) == pytest.approx(want, abs=0.05)


def test_an_ensemble_sees_as_much_of_each_system():
    data = mixed()
    model = EnsembleConfig(2, 1, (16,), (0.0, 0.0)).build(data.spec, gen())
    seen, losses = [], model.losses
    model.losses = lambda segment, noise: (seen.append(segment), losses(segment, noise))[1]
    fit(model, data, FitConfig(batch=60, max_epochs=1), gen())
    segment = seen[0]
    assert segment.system.tolist() == [0, 1, 2, 0, 1, 2]
    gain = (segment.obs[:, 1] - 0.9 * segment.obs[:, 0]) / segment.act[:, 0]
    each = gain.reshape(2, 3, 20).transpose(0, 1).flatten(1)
    torch.testing.assert_close(each, torch.tensor(GAINS)[:, None].expand(3, 40), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- the offline loop


class Drift(Markov):
    """x' = x + its context, without noise; the systems' contexts are 1, 2, 3."""

    noise_dim = 0

    def __init__(self):
        super().__init__()
        self.spec = Spec(1, 1, 1, 3)
        self.table = nn.Parameter(torch.tensor([[1.0], [2.0], [3.0]]))

    def condition(self, ctx):
        return (ctx,)

    def context(self, system):
        return self.table[system]

    def step(self, state, inp, cond):
        obs = state + cond[0].repeat_interleave(len(state) // len(cond[0]), 0)
        return obs, Prediction(obs, obs[:, 0], {"far": obs[:, 0].abs()})

    def loss(self, segment, noise):
        raise NotImplementedError


def rollouts(rollouts=90, horizon=2, **kw):
    data = mixed()
    agent = replace(offline.MOPO.agent, hidden=(8,)).build(data.spec, gen()).one(0)
    config = Imagination(horizon=horizon, rollouts=rollouts, every=10, penalty=offline.Penalty(coefficient=0.0), **kw)
    batches = offline.rollouts(agent, Drift(), data, never, None, config, 1e9, gen())
    return [batch for batch, _ in batches]


def test_each_systems_rollouts_begin_in_its_own_rows_under_its_own_context():
    batches, data = rollouts(horizon=1), mixed()
    for i, (batch, part) in enumerate(zip(batches, data.of_system(torch.arange(len(data))), strict=True)):
        assert len(batch.obs) == 30
        assert torch.isin(batch.obs, data.obs[part]).all()
        torch.testing.assert_close(batch.next_obs, batch.obs + i + 1)


def test_the_number_of_rollouts_and_the_budget_are_shared():
    assert sum(len(b.obs) for b in rollouts(91)) == 182
    few = rollouts(90, chunk=5, budget=30)
    assert sum(len(b.obs) for b in few) == 30


def test_doubts_are_each_systems_own():
    data = mixed()
    doubts = offline.doubts_on(Drift(), data, "far", gen())
    want = torch.cat([(data.obs[p] + i + 1)[:, 0].abs() for i, p in enumerate(data.of_system(torch.arange(1500)))])
    torch.testing.assert_close(doubts.sort().values, want.sort().values)


def test_a_model_of_fewer_systems_than_the_data_is_refused():
    data = mixed()
    model = HYPER.build(Spec(1, 1, 4, 2), gen())
    config = replace(offline.MOPO, updates=1, batch=4)
    with pytest.raises(ValueError, match="one knows 2 systems, the data are of 3"):
        offline.train(config, data, models=[model], terminal=never)


@pytest.mark.parametrize("name", ["hyper", "experts", "mixer"])
def test_the_filter_and_the_loop_take_a_learner_with_contexts(name):
    """MOREC around it, on the mixed set: the reward's generator and the rollouts are each system's own."""
    data, preset = mixed(), offline.MOREC_MOPO
    learner = {
        "hyper": replace(HYPER, gaussian=True),
        "experts": ExpertsConfig(replace(SINGLE, gaussian=True), 3),
        "mixer": replace(MIXER, gating="solved"),
    }[name]
    rule = preset.imagination.morec
    reward = replace(rule.reward, updates=60, anchor_updates=30, hidden=(16, 16), anchor_hidden=(16,))
    imagination = Imagination(
        horizon=3, rollouts=60, every=10, truncation=preset.imagination.truncation, morec=replace(rule, reward=reward)
    )
    agent = replace(preset.agent, hidden=(16,))
    config = replace(preset, agent=agent, imagination=imagination, updates=20, batch=32)
    models = None
    if name == "mixer":  # a fit of its own comes first
        model = learner.build(data.spec, gen())
        schedule = MixerFit(80, batch=32, length=1, lr=1e-2, lr_context=1e-2, restarts=3, warm=20)
        fit_mixer(model, data, schedule, gen(1))
        judge = offline.learn_reward(model, data, learner, FitConfig(), reward, 0, offline.Forget())
        models = [rule.filter.build(model, judge).eval()]
    result = offline.train(
        config, data, dynamics=learner, fitting=FitConfig(batch=64, lr=1e-2, max_epochs=30), models=models,
        terminal=never,
    )  # fmt: skip
    (model,) = result.models
    assert isinstance(model, Filtered)
    assert isinstance(model, Dynamics)
    assert gains(model.inner) == pytest.approx(list(GAINS), abs=0.1)
    assert all(x.isfinite().all() for x in result.agent.state_dict().values())
    kept = offline.rollouts(result.agent.one(0), model, data, never, None, replace(imagination, horizon=1), 9, gen())
    obs, act, _, after, _ = (torch.cat(x) for x in zip(*(t for t, _ in kept), strict=True))
    assert len(obs) == 60
    drift = (after - 0.9 * obs)[act.abs() > 0.2] / act[act.abs() > 0.2]
    near = (drift[:, None] - torch.tensor(GAINS)).abs().amin(1)
    assert near.median() < 0.1
