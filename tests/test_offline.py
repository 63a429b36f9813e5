"""The offline loop, with models that are the environment and agents whose values are known."""

import math
import warnings
from dataclasses import make_dataclass, replace

import numpy as np
import pytest
import torch
from worlds import Constant, Line, Memory, earned, line_data, never

from mbrl import offline
from mbrl.core import Diverged, Segment, Spec, StepInput
from mbrl.data import Transitions, joined
from mbrl.dynamics.experts import ExpertsConfig
from mbrl.dynamics.filtered import FilterConfig, RewardConfig
from mbrl.dynamics.mixer import Coda, Geps, MixerConfig
from mbrl.dynamics.ode import OdeConfig
from mbrl.fit import FitConfig
from mbrl.offline import Imagination, Morec, OfflineConfig, Penalty, Truncation, truncate
from mbrl.sac import SacConfig, local_lipschitz, value_aware_error
from mbrl.solvers import RK4, Tsit5

SMALL = SacConfig(hidden=(32, 32), actor_lr=3e-3, critic_lr=3e-3, alpha_lr=3e-3)


def imagined(config, model=None, agent=None, terminal=never, reward=None, limit=math.inf, data=None, seed=0):
    """Every transition of one batch of rollouts, and the logs added up."""
    g = torch.Generator().manual_seed(seed)
    batches, logs = [], {}
    arguments = (model or Line(), data or line_data(), terminal, reward, config, limit, g)
    for batch, log in offline.rollouts(agent or Constant(), *arguments):
        batches.append(batch)
        logs = {k: logs.get(k, 0.0) + v for k, v in log.items()}
    return Transitions(*(torch.cat(x) for x in zip(*batches, strict=True))), logs


def test_a_model_that_is_the_environment_gives_the_environments_transitions():
    t, logs = imagined(Imagination(horizon=7, rollouts=30, block=3))
    assert len(t.obs) == 7 * 30 == logs["transitions"]
    torch.testing.assert_close(t.next_obs, 0.9 * t.obs + 0.5 * t.act)
    torch.testing.assert_close(t.reward, -(t.next_obs[:, 0] ** 2))
    assert (t.act == 0.5).all()
    assert not t.terminal.any()


def test_starts_are_observations_of_the_data():
    data = line_data()
    t, _ = imagined(Imagination(horizon=1, rollouts=200), data=data)
    assert torch.isin(t.obs, data.obs).all()
    assert len(t.obs.unique()) > 100


def test_rows_that_have_ended_are_dropped():
    """Every few steps, `block`, so that the model is asked for no more than those that live."""
    asked = []

    class Counted(Line):
        def step(self, state, inp, cond):
            asked.append(len(state))
            return super().step(state, inp, cond)

    end = lambda obs, act, after: after[:, 0] > 1.0
    config = Imagination(horizon=12, rollouts=40, block=3)
    t, _ = imagined(config, model=Counted(), agent=Constant(0.4), terminal=end)
    assert asked[:3] == [40] * 3
    assert len(t.obs) <= sum(asked) < 12 * 40
    assert asked == sorted(asked, reverse=True)
    assert all(len(set(asked[i : i + 3])) == 1 for i in range(0, len(asked), 3))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_targets_have_a_floor_where_rewards_are_positive(sign):
    """MOBILE's; of negative rewards 0 would be a ceiling."""
    data = line_data()
    data = replace(data, reward=sign * data.reward.abs())
    config = small(updates=1)
    assert config.imagination is not None
    config = replace(config, imagination=replace(config.imagination, floor=True))
    result = offline.train(config, data, models=[Line()], terminal=never)
    assert result.agent.config.target_min == (0.0 if sign > 0 else None)


def test_the_last_ten_are_ten():
    result = offline.Result(None, [], [(n, [[float(n), n + 2.0], [0.0, 0.0]]) for n in range(12)], {})
    assert result.last().tolist() == [sum(range(2, 12)) / 10 + 1, 0.0]
    assert result.last(1).tolist() == [12.0, 0.0]
    for none, n in ((result, 0), (offline.Result(None, [], [], {}), 10)):
        with pytest.raises(ValueError, match=f"last: got n={n} of {len(none.returns)} evaluations"):
            none.last(n)


def test_an_evaluation_that_is_no_list_of_returns_is_named():
    with pytest.raises(ValueError, match=r"it returned 3\.0, expected a list of returns"):
        offline.train(small(1), line_data(), models=[Line()], terminal=never, evaluate=lambda policy: 3.0)


@pytest.mark.parametrize("chunk", [7, 100])
@pytest.mark.parametrize("block", [1, 4, 10])
def test_blocks_and_chunks_change_no_number(block, chunk):
    end = lambda obs, act, after: after[:, 0] > 1.0
    config = Imagination(horizon=10, rollouts=40, block=block, chunk=chunk)
    t, logs = imagined(config, agent=Constant(0.4), terminal=end)
    want, _ = imagined(replace(config, block=10, chunk=chunk), agent=Constant(0.4), terminal=end)
    order = lambda t: t.pack()[t.pack()[:, 0].argsort(stable=True)]
    torch.testing.assert_close(order(t), order(want))
    assert logs["ended"] == t.terminal.sum() > 0
    assert ((t.next_obs[:, 0] > 1.0) == (t.terminal > 0)).all(), (
        "a terminal row is the last of its rollout, and no other"
    )


def test_the_penalty_is_subtracted():
    plain, _ = imagined(Imagination(horizon=3, rollouts=20))
    t, _ = imagined(Imagination(horizon=3, rollouts=20, penalty=Penalty(2.5, "doubt")))
    torch.testing.assert_close(t.reward, plain.reward - 2.5 * t.next_obs[:, 0].abs())


def test_an_uncertainty_that_the_model_lacks_is_an_error():
    with pytest.raises(ValueError, match=r"'aleatoric'.*\['doubt'\]"):
        imagined(Imagination(penalty=Penalty(1.0)))


def test_the_tasks_reward_replaces_the_learned_one():
    t, _ = imagined(Imagination(horizon=3, rollouts=20), reward=lambda obs, act, after: obs[:, 0] + 10 * act[:, 0])
    torch.testing.assert_close(t.reward, t.obs[:, 0] + 5)


def segment_of(mask):
    mask = torch.tensor(mask)
    b, t = mask.shape
    zero = torch.zeros(b, t)
    return Segment(
        torch.zeros(b, t + 1, 1), zero[..., None], zero + 1, mask & False, mask, zero[..., None], zero[0, :1]
    )


@pytest.mark.parametrize("then", ["terminal", "bootstrap", "drop"])
def test_truncation_ends_a_row_with_its_first_doubtful_transition(then):
    segment = segment_of([[True] * 4, [True] * 4, [True, True, False, False], [True] * 4])
    doubt = torch.tensor([[0.0, 2, 0, 3], [0, 0, 0, 0], [0, 0, 9, 9], [5, 0, 0, 0]])
    out, cut, _ = truncate(segment, doubt, 1.0, Truncation("doubt", 1.0, then=then, reward=-7.0))
    assert cut.tolist() == [True, False, False, True], "what is masked is not doubtful"
    ends = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    if then == "drop":
        ends[0][1] = ends[3][0] = 0
    assert out.mask.int().tolist() == ends
    terminal = torch.zeros(4, 4, dtype=torch.bool)
    if then == "terminal":
        terminal[0, 1] = terminal[3, 0] = True
    assert torch.equal(out.terminal & out.mask, terminal)
    if then != "drop":
        assert out.reward[0].tolist()[:2] == [1.0, -7.0]
        assert out.reward[3, 0] == -7


def test_a_cut_rollout_does_not_go_on_in_the_next_block():
    config = Imagination(horizon=30, rollouts=50, block=3, truncation=Truncation("doubt", 1.5))
    t, logs = imagined(config, agent=Constant(1.0), limit=1.5)
    over = t.next_obs[:, 0].abs() > 1.5
    assert logs["cut"] == over.sum() == 50, "x settles at 5: every rollout passes the limit, once"
    assert torch.equal(over, t.terminal > 0)


def test_bellman_inconsistency_is_the_spread_over_parts_of_the_mean_value():
    model, x = Line(parts=3, noise_dim=1), torch.randn(5, 1)
    inp = (torch.zeros(5, 1), torch.ones(5, 1))
    noise = torch.randn(5, 4), torch.randn(20, 1)
    got = offline.bellman_inconsistency(Constant(), model, x, *inp, (), *noise)
    torch.testing.assert_close(got, torch.ones(5))  # values differ by 0, 1, 2; the spread is the unbiased one
    far = offline.bellman_inconsistency(Constant(), model, x * 0 - 100, *inp, (), *noise)
    torch.testing.assert_close(far, torch.ones(5))  # values below zero differ as any others do
    alone = offline.bellman_inconsistency(Constant(), Line(parts=1, noise_dim=1), x, *inp, (), *noise)
    assert (alone == 0).all()


def test_bellman_inconsistency_is_that_of_the_stochastic_policy():
    """Were tanh(mean) taken, the noise of the policy would make no difference."""
    agent = SMALL.build(Spec(1, 1), torch.Generator().manual_seed(0)).one(0)
    model, x, z = Line(parts=2, noise_dim=1), torch.randn(5, 1), torch.randn(5, 3)
    inp = (torch.zeros(5, 1), torch.ones(5, 1))
    first, second = (
        offline.bellman_inconsistency(agent, model, x, *inp, (), z, e) for e in (torch.zeros(15, 1), torch.ones(15, 1))
    )
    assert (first != second).any()
    after = model.each(x, StepInput(inp[0], z, inp[1]), (), 3).obs  # [2, 15, 1]
    act = lambda a: agent.act(a[None], torch.ones(1, 15, 1))
    value = torch.stack([agent.q(a[None], act(a), target=True)[0].amin(0) for a in after])
    torch.testing.assert_close(second, value.reshape(2, 5, 3).mean(-1).std(0))


def test_bellman_inconsistency_is_valued_a_part_at_a_time(monkeypatch):
    """The activations of all states at once would take tens of gigabytes."""
    agent = SMALL.build(Spec(1, 1), torch.Generator().manual_seed(0)).one(0)
    sizes, q = [], agent.q
    agent.q = lambda obs, act, target=False: (sizes.append(obs.shape[1]), q(obs, act, target))[1]
    arguments = torch.randn(5, 1), torch.zeros(5, 1), torch.ones(5, 1), (), torch.randn(5, 3), torch.randn(15, 1)
    call = lambda: offline.bellman_inconsistency(agent, Line(parts=2, noise_dim=1), *arguments)
    whole = call()
    monkeypatch.setattr(offline, "VALUED", 8)
    torch.testing.assert_close(call(), whole)
    assert sizes == [30, 8, 8, 8, 6]


def test_a_relative_threshold_is_in_units_of_the_datas_worst():
    data = line_data()
    limit = offline.uncertainty_limit(Line(), data, Truncation("doubt", 0.5, relative=True), torch.Generator())
    assert limit == pytest.approx(0.5 * data.next_obs.abs().max().item())
    assert offline.uncertainty_limit(Line(), data, Truncation("doubt", 0.5), torch.Generator()) == 0.5


def test_a_relative_threshold_may_leave_out_the_datas_worst():
    data = line_data()
    own = offline.doubts_on(Line(), data, "doubt", torch.Generator())
    limit = offline.uncertainty_limit(
        Line(), data, Truncation("doubt", 2.0, relative=True, quantile=0.9), torch.Generator()
    )
    assert limit == pytest.approx(2 * np.quantile(own.numpy().astype(float), 0.9))
    with pytest.raises(ValueError, match="quantile is 0, expected a share"):
        Truncation("doubt", relative=True, quantile=0)
    with pytest.raises(ValueError, match="set relative"):
        Truncation("doubt", quantile=0.9)


def test_morec_cuts_one_in_a_thousand_of_the_datas_own_and_as_published_below_six_tenths():
    data = line_data(4000)
    own = offline.doubts_on(Line(), data, "doubt", torch.Generator())
    for preset in (offline.MOREC_MOPO, offline.MOREC_MOBILE):
        cut = preset.imagination.truncation
        limit = offline.uncertainty_limit(Line(), data, replace(cut, name="doubt"), torch.Generator())
        assert cut.name == "implausibility"
        assert (own > limit).double().mean().item() == pytest.approx(0.001, abs=1 / len(own))
    published = offline.MOREC_PUBLISHED.imagination.truncation
    r = math.log(1 + math.e) - offline.uncertainty_limit(Line(), data, published, torch.Generator())
    assert (published.name, published.then, r) == ("implausibility", "terminal", pytest.approx(0.6))


def small(updates=600, **kw):
    imagination = Imagination(horizon=4, rollouts=100, every=100, **kw)
    return OfflineConfig(SMALL, imagination, updates=updates, batch=64, evaluate_every=200, log_every=100)


def test_the_loop_learns_in_a_model_that_is_the_environment():
    result = offline.train(small(), line_data(), models=[Line()], terminal=never, evaluate=earned, seeds=(1,))
    best = earned(lambda x: -0.9 * x / 0.5)[0]  # to zero at once, as far as the bounds allow
    nothing = earned(lambda x: 0 * x)[0]
    assert best < 0
    assert result.last(1).item() > best + 0.15 * (nothing - best)
    assert [u for u, _ in result.returns] == [200, 400, 600]


class Doubtful(Line):
    """`Line`, whose doubt is scaled, and which keeps the intervals that it is asked for."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.asked = scale, []

    def step(self, state, inp, cond):
        self.asked += inp.dt.unique().tolist()
        state, pred = super().step(state, inp, cond)
        return state, pred._replace(uncertainty={"doubt": self.scale * pred.uncertainty["doubt"]})


def test_each_seed_learns_in_its_own_model_by_that_models_units(monkeypatch):
    own, rollouts = [], offline.rollouts

    def watched(agent, model, data, terminal, reward, config, limit, generator, unit, after):
        own.append((model.scale, limit, unit))
        return rollouts(agent, model, data, terminal, reward, config, limit, generator, unit, after)

    monkeypatch.setattr(offline, "rollouts", watched)
    doubt = {"truncation": Truncation("doubt", 2.0, relative=True), "penalty": Penalty(0.1, "doubt", scaled=True)}
    data, models = replace(line_data(), dt=0.25), [Doubtful(1.0), Doubtful(10.0)]
    offline.train(small(updates=1, **doubt), data, models=models, terminal=never, seeds=(1, 2))
    (one, limit, unit), (ten, wide, small_unit) = own
    assert (one, ten) == (1.0, 10.0)
    assert limit == pytest.approx(2 * data.next_obs.abs().max().item())
    assert (wide, small_unit) == pytest.approx((10 * limit, unit / 10))
    assert {*models[0].asked, *models[1].asked} == {0.25}, "intervals are the data's"


def test_the_agent_reads_the_data_standardised_and_slows_down_over_its_updates():
    config = replace(small(updates=4), agent=replace(SMALL, normalize=True))
    agent = offline.train(config, line_data(), models=[Line()], terminal=never).agent
    mean, std = offline.normalizer_of(line_data().obs)
    torch.testing.assert_close((agent.obs_mean, agent.obs_std), (mean, std))
    assert agent.actor_lr() == pytest.approx(0.0, abs=1e-9), "it is done"


def test_values_are_probed_where_state_is_saved():
    """On the data's own transitions; state at the first evaluation far enough from the last, and at the end."""

    class Saves(Memory):
        def save(self, name, tensors, facts):
            super().save(name, tensors, facts)
            self.lines.append(("save", facts["updates"], {"name": name}))

    memory, data = Saves(), line_data()
    config = replace(small(updates=700), evaluate_every=100, save_every=250)
    result = offline.train(config, data, models=[Line()], terminal=never, evaluate=earned, seeds=(1, 2), record=memory)
    lines = {n: found for stage, n, found in memory.lines if stage == "probe"}
    assert list(lines) == [300, 600, 700]
    assert [n for stage, n, x in memory.lines if stage == "save" and x["name"] == "policy.partial"] == [300, 600, 700]
    some = data.transitions() if len(data) <= offline.PROBE else pytest.fail("more rows than are probed")
    steep = local_lipschitz(result.agent, some.obs.expand(2, -1, -1))
    for name, values in steep.items():
        assert lines[700][name] == pytest.approx(values.mean().item(), rel=1e-5)
    assert lines[700]["value_error"] == pytest.approx(0, abs=1e-4), "the model is the environment"
    off = Line()
    off.step, plain = lambda *x: (lambda s, p: (s, p._replace(obs=p.obs + 1)))(*plain(*x)), off.step
    memory = Memory()
    result = offline.train(config, data, models=[off], terminal=never, seeds=(1,), record=memory)
    want = value_aware_error(result.agent, off, some, torch.Generator().manual_seed(0)).item()
    found = next(x for stage, n, x in memory.lines if (stage, n) == ("probe", 700))
    assert found["value_error"] == pytest.approx(want, rel=1e-5)
    assert want > 1e-3


@pytest.mark.parametrize("seeds", [(3,), (3, 4)])
def test_an_interrupted_loop_continues_to_the_same_numbers(seeds):
    config = replace(small(), log_every=150, save_every=200)  # its figures are gathered across a checkpoint
    go = lambda record: offline.train(
        config, line_data(), models=[Line()], terminal=never, evaluate=earned, seeds=seeds, record=record
    )
    first = Memory()
    whole = go(first)
    memory = Memory(saves=2)
    with pytest.raises(KeyboardInterrupt):
        go(memory)
    memory.left = 10**9
    again = go(memory)
    assert again.returns == whole.returns
    assert [x for x in memory.lines if x[1] > 400] == [x for x in first.lines if x[1] > 400]
    assert all(torch.equal(v, again.agent.state_dict()[k]) for k, v in whole.agent.state_dict().items())


@pytest.mark.parametrize("preset", [offline.MOREC_MOBILE, offline.BC, offline.TD3_BC], ids=["morec", "bc", "td3-bc"])
def test_the_loop_is_as_precise_as_the_data(preset):
    """Again where it takes up what was fitted."""
    reward = RewardConfig(members=2, hidden=(8,), updates=10, anchors=2, anchor_hidden=(8,), anchor_updates=10)
    dynamics = offline.EnsembleConfig(members=3, elites=2, hidden=(8,), weight_decay=(0.0,) * 2)
    agent = replace(preset.agent, hidden=(8,))
    config = replace(preset, agent=agent, updates=10, batch=16, evaluate_every=10)
    if (imagination := preset.imagination) is not None:
        own = {"horizon": 2, "rollouts": 20, "budget": None, "morec": Morec(reward)}
        config = replace(config, imagination=replace(imagination, **own))
    data, record = line_data().to(torch.float64), Memory()
    call = lambda: offline.train(
        config, data, dynamics=dynamics, fitting=FitConfig(max_epochs=1), evaluate=earned, record=record
    )
    whole = call()
    del record.kept["policy.partial"]
    again = call()
    for module in (whole.agent, *whole.models):
        assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert all(torch.equal(v, again.agent.state_dict()[k]) for k, v in whole.agent.state_dict().items())


def test_without_imagination_only_the_data_are_seen():
    preset = replace(offline.BC, updates=300, evaluate_every=300, batch=64)
    result = offline.train(preset, replace(line_data(), act=torch.full((400, 1), 0.3)))
    assert result.models == []
    got = offline.policy_of(result.agent)(torch.randn(50, 1))
    torch.testing.assert_close(got, torch.full((50, 1), 0.3), atol=0.05, rtol=0)


def test_cloning_asks_for_the_actions_of_the_data_not_of_the_rollouts():
    data = replace(line_data(), act=torch.full((400, 1), 0.3))
    agent = replace(SMALL, cloning=300.0, alpha_lr=0.0, init_alpha=1e-3)
    config = replace(small(), agent=agent, real_ratio=0.25, updates=300, evaluate_every=300)
    result = offline.train(config, data, models=[Line()], terminal=never)
    got = offline.policy_of(result.agent)(data.obs[:50])
    torch.testing.assert_close(got, torch.full((50, 1), 0.3), atol=0.05, rtol=0)


def morec(**change):
    return replace(offline.MOREC_MOPO, imagination=replace(offline.MOREC_MOPO.imagination, morec=Morec(**change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": (1, 1)}, "no two alike"),
        ({"seeds": ()}, "at least one"),
        ({"config": replace(offline.BC, real_ratio=0.5)}, "expected 1"),
        ({"config": replace(offline.MOPO, real_ratio=1.5)}, r"share in \[0, 1\]"),
        ({"config": replace(offline.MOPO, real_ratio=0.003)}, "no row of a batch of 256 is the data's own"),
        ({"config": replace(offline.MOPO, updates=0)}, "at least 1"),
        ({"seeds": (-11,)}, r"got \[-11\], expected none below 0"),
        *(
            ({"config": replace(offline.MOPO, imagination=Imagination(**{k: 0}))}, f"imagination: got {k}=0; expected")
            for k in ("horizon", "rollouts", "every", "retain", "block", "chunk", "budget")
        ),
        ({"fitting": FitConfig(max_epochs=0)}, "fit: got max_epochs=0; expected at least 1"),
        *(
            ({"config": morec(filter=FilterConfig(**bad))}, "expected .*" + says)
            for bad, says in (
                ({"candidates": 0}, "candidates >= 1"),
                ({"temperature": math.nan}, "temperature >= 0"),
                ({"clip": math.nan}, "0 standard deviations or more"),
            )
        ),
        ({"config": morec(reward=RewardConfig(hidden=(0,)))}, "StackedMLP: got n 10 and sizes"),
        ({"config": morec(reward=RewardConfig(length=21))}, "length is 21, expected at most 20"),
        ({"models": [Line(), Line()]}, "got 2 for 1 seeds"),
        ({"evaluate": object()}, "got a object, expected a function of a policy"),
        (
            {"reward": lambda obs, act, after: after[:, :1]},
            r"reward: .* shape \[2, 1\], expected a tensor of shape \[2\]",
        ),
        ({"terminal": lambda obs, act, after: after[:, 0]}, r"terminal: .*float32 .* expected a bool tensor of"),
        ({"config": offline.MOBILE, "models": [Line()]}, "spread over the parts .* this one has 1"),
        (
            {
                "config": offline.MOBILE,
                "dynamics": offline.EnsembleConfig(members=3, elites=1, hidden=(8,), weight_decay=(0.0,) * 2),
            },
            "spread over the parts .* this one has 1",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_error(change, message, monkeypatch):
    """Before anything is fitted."""
    monkeypatch.setattr(offline, "fit", lambda *a, **k: pytest.fail("fitted"))
    config = change.pop("config", offline.MOPO)
    with pytest.raises(ValueError, match=message):
        offline.train(config, line_data(), **change)


@pytest.mark.parametrize("change", [
    {"truncation": Truncation("doubt", 1.0, relative=True)}, {"penalty": Penalty(1.0, "doubt", scaled=True)}
])  # fmt: skip
def test_a_model_that_has_diverged_is_one_error(change):
    model = Line()
    model.anchor.data.fill_(math.nan)
    with pytest.raises(Diverged, match="'doubt': not finite on any of the data's own transitions"):
        offline.train(small(**change), line_data(), models=[model], terminal=never)


def test_every_rollout_cut_at_its_start_is_an_error():
    config = small(truncation=Truncation("doubt", -1.0, then="drop"))
    with pytest.raises(ValueError, match="no imagined transition was kept"):
        offline.train(config, line_data(), models=[Line()], terminal=never)


@pytest.mark.parametrize("name", sorted({*offline.PRESETS} - {"bc", "td3-bc"}))
def test_presets_are_settings_of_one_loop(name):
    """Each runs, from the fit of its model to a policy, on a small set and at a small size."""
    preset = offline.PRESETS[name]
    imagination = replace(preset.imagination, horizon=3, rollouts=40, every=20)
    if imagination.morec:
        few = replace(imagination.morec.reward, **TINY_REWARD)
        imagination = replace(imagination, morec=replace(imagination.morec, reward=few))
    agent = replace(preset.agent, hidden=(16, 16))
    config = replace(preset, agent=agent, imagination=imagination, updates=40, batch=32, evaluate_every=40)
    memory = Memory()
    options = {
        "dynamics": offline.EnsembleConfig(hidden=(16, 16), weight_decay=(0.0,) * 3),
        "fitting": offline.FitConfig(max_epochs=2),
    }
    result = offline.train(config, line_data(), terminal=never, record=memory, evaluate=earned, **options)
    assert all(v.isfinite().all() for v in result.agent.state_dict().values())
    (line,) = [v for stage, step, v in memory.lines if stage == "rollout" and step == 20]
    assert 0 < line["transitions"] <= 120
    if preset.imagination.penalty.coefficient:
        assert line[preset.imagination.penalty.name] > 0
    again = offline.train(config, line_data(), terminal=never, record=memory, evaluate=earned, **options)
    assert again.returns == result.returns


TINY_REWARD = {"updates": 40, "anchor_updates": 40, "hidden": (16, 16), "anchor_hidden": (16,)}


def test_a_scaled_penalty_is_in_the_datas_own_units():
    data = line_data()
    unit = offline.penalty_unit(Line(), data, Penalty(0.5, "doubt", scaled=True), torch.Generator())
    want = data.reward.std(correction=0) / data.next_obs.abs().mean()
    assert unit == pytest.approx(want.item(), rel=1e-5)
    assert offline.penalty_unit(Line(), data, Penalty(0.5, "doubt"), torch.Generator()) == 1.0
    g = lambda: torch.Generator().manual_seed(0)
    config = Imagination(horizon=3, rollouts=20, penalty=Penalty(2.0, "doubt", scaled=True))
    (batch, _), *_ = offline.rollouts(Constant(), Line(), data, never, None, config, math.inf, g(), unit=0.25)
    torch.testing.assert_close(batch.reward, -(batch.next_obs[:, 0] ** 2) - 0.5 * batch.next_obs[:, 0].abs())
    for scaled in (data, replace(data, reward=10 * data.reward)):  # the penalty follows the reward's units
        result = offline.penalty_unit(Line(), scaled, Penalty(1.0, "doubt", scaled=True), torch.Generator())
        assert result * data.next_obs.abs().mean() == pytest.approx(scaled.reward.std(correction=0).item(), rel=1e-5)


def test_a_learner_that_tells_no_reward_is_an_error_where_no_function_does():
    given = {
        "data": line_data(),
        "dynamics": OdeConfig(hidden=(8,)),
        "terminal": never,
        "fitting": FitConfig(max_epochs=1),
    }
    config = OfflineConfig(SMALL, Imagination(horizon=1, rollouts=10, every=2), updates=2, batch=8, evaluate_every=2)
    with pytest.raises(ValueError, match="no function tells it, and this NeuralODE has no head for it"):
        offline.train(config, **given)
    offline.train(config, **given, reward=lambda obs, act, after: -(after[:, 0] ** 2))


def test_a_scaled_penalty_of_nothing_is_told_of():
    """As where a pole that is held up earns one a step, and falls in none of the data."""
    data = replace(line_data(), reward=torch.ones(400))
    with pytest.warns(UserWarning, match="line: every reward is 1, .* nothing is penalised"):
        unit = offline.penalty_unit(Line(), data, Penalty(0.5, "doubt", scaled=True), torch.Generator())
    assert unit == 0


@pytest.mark.parametrize(
    "bad",
    [{"coefficient": x} for x in (-1.0, math.nan, math.inf)] + [{"samples": 0}, {"name": "bellman", "scaled": True}],
)
def test_a_penalty_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match="Penalty"):
        Penalty(**bad)
    with pytest.raises(ValueError, match="Truncation: then is 'stop', expected 'terminal'"):
        Truncation(then="stop")
    with pytest.raises(ValueError, match="Truncation: threshold is nan"):
        Truncation(threshold=math.nan)


def test_a_budget_ends_the_rollouts_with_the_chunk_that_meets_it():
    t, logs = imagined(Imagination(horizon=4, rollouts=100, chunk=10, budget=81))
    assert len(t.obs) == 120
    assert logs["starts"] == 30
    t, logs = imagined(Imagination(horizon=4, rollouts=100, chunk=10, budget=80))
    assert len(t.obs) == 80


def test_the_buffer_has_room_for_the_batches_of_several_systems():
    """Each of which may exceed its share of the budget by a chunk."""
    data = joined([line_data(seed=s) for s in range(3)], mixed=True)
    model = Line()
    model.spec = data.spec
    config = Imagination(horizon=4, rollouts=90, chunk=10, budget=30, retain=2, every=10)
    t, _ = imagined(config, model=model, data=data)
    assert len(t.obs) == 3 * 10 * 4 <= config.most(3)
    assert config.most() == 72, "one system: the budget and one chunk"
    memory = Memory()
    offline.train(replace(small(20), imagination=config), data, models=[model], terminal=never, record=memory)
    tensors, facts = memory.kept["policy.partial"]
    assert tensors["buffer.size"].tolist() == [240]
    assert facts["counts"] == [[120, 120]]


def test_a_record_of_another_policy_is_not_taken_for_this_one():
    memory, given = Memory(), {"models": [Line()], "terminal": never}
    offline.train(small(20), line_data(), record=memory, **given)
    offline.train(small(20), line_data(), record=memory, **given)
    other = replace(small(20), imagination=Imagination(horizon=3, rollouts=30, penalty=Penalty(100.0, "doubt")))
    for config, data, seeds in (
        (other, line_data(), (0,)), (small(20), line_data(seed=1), (0,)), (small(20), line_data(), (1,)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="record: it holds a policy that was learned with other settings"):
            offline.train(config, data, record=memory, seeds=seeds, **given)


def test_rollouts_that_are_filtered_ask_for_a_filter():
    config = replace(offline.MOREC_MOPO, updates=5)
    with pytest.raises(ValueError, match="models: got a Line for rollouts that a dynamics reward filters"):
        offline.train(config, line_data(), models=[Line()], terminal=never)


def test_the_buffer_holds_the_last_batches_of_rollouts_and_no_older():
    """With a buffer that could hold more: rollouts that end early do not keep old ones alive."""
    end = lambda obs, act, after: torch.ones(len(obs), dtype=torch.bool)  # every rollout is one step
    memory = Memory()
    config = small(updates=500)
    config = replace(config, imagination=replace(config.imagination, rollouts=30, every=100, retain=2))
    offline.train(config, line_data(), models=[Line()], terminal=end, record=memory)
    tensors, facts = memory.kept["policy.partial"]
    assert tensors["buffer.size"].tolist() == [60]
    assert facts["counts"] == [[30, 30]]


class Unsure(Line):
    """Its doubt is infinite beyond 1."""

    def step(self, state, inp, cond):
        state, pred = super().step(state, inp, cond)
        doubt = pred.uncertainty["doubt"]
        return state, pred._replace(uncertainty={"doubt": torch.where(doubt > 1.0, torch.inf, doubt)})


@pytest.mark.parametrize("truncation", [None, Truncation("doubt", 1.0)])
@pytest.mark.parametrize("block", [1, 4])
def test_a_rollout_ends_before_a_reward_that_is_not_finite(truncation, block):
    config = Imagination(horizon=10, rollouts=20, block=block, penalty=Penalty(1.0, "doubt"), truncation=truncation)
    t, _ = imagined(config, model=Unsure(), agent=Constant(1.0), limit=1.0)
    assert t.reward.isfinite().all()
    assert (t.next_obs.abs() <= 1.0).all(), "and does not go on after it"


def test_a_policy_to_start_from_is_trained_on():
    """The other training's cosine had brought the actor's learning rate to zero; this one's begins anew."""
    config = small(100)
    first = offline.train(config, line_data(), models=[Line()], terminal=never).agent
    again = offline.train(config, line_data(), models=[Line()], terminal=never, start=first.state_dict()).agent
    assert (again.actor - first.actor).abs().max() > 1e-3
    assert again.updates == 100


def test_what_a_termination_was_learned_from_is_logged():
    memory, data = Memory(), line_data()
    data = replace(data, terminal=data.next_obs[:, 0] > 1.0)
    head = offline.learn_terminal(data, offline.TerminalConfig(steps=5), 0, memory)
    want = {"endings": float(data.terminal.sum()), "accuracy": float(head.accuracy)}
    assert memory.lines == [("terminal", 5, want)]


def test_a_cut_is_not_paid_for():
    """Where life costs, an end without a value is a gift: a cut goes on at the given value, a task's end does not."""
    segment = segment_of([[True] * 3, [True] * 3])
    terminal = segment.terminal.clone()
    terminal[1, 1] = True
    doubt = torch.tensor([[0.0, 2, 0], [0, 2, 0]])
    out, _, _ = truncate(segment._replace(terminal=terminal), doubt, 1.0, Truncation("doubt", 1.0), after=-50.0)
    assert out.reward[0].tolist()[:2] == [1.0, -49.0]
    assert out.reward[1].tolist()[:2] == [1.0, 1.0]
    assert out.terminal[:, 1].all()
    for then in ("bootstrap", "drop"):
        out, _, _ = truncate(segment, doubt, 1.0, Truncation("doubt", 1.0, then=then), after=-50.0)
        assert out.reward[0, 1] == 1


def test_the_value_after_a_cut_is_that_of_the_mean_reward():
    memory, data = Memory(), line_data()
    config = small(updates=10, truncation=Truncation("doubt", -1.0))
    for shift in (0.0, 10.0):  # every transition is cut; its stored reward tells what was added
        moved = replace(data, reward=data.reward + shift)
        config = replace(config, batch=20, evaluate_every=10)
        memory = Memory()
        offline.train(config, moved, models=[Line()], terminal=never, record=memory)
        rows = memory.kept["policy.partial"][0]["buffer.rows"][0]
        t = Transitions.unpack(rows, data.spec)
        after = min(0.0, 0.99 * moved.reward.mean().item() / 0.01)
        torch.testing.assert_close(t.reward, -(t.next_obs[:, 0] ** 2) + after, rtol=1e-4, atol=1e-3)
        assert (after < 0) == (shift == 0.0)


def test_what_follows_a_cut_pays_the_penalty_of_going_on():
    """Scaled, going on costs `coefficient` standard deviations of the reward a step; in raw units what it costs."""
    data, model, g = line_data(), Line(), torch.Generator()
    going = lambda penalty, unit: offline.worth_of_going_on(model, data, penalty, unit, 0.9, g)
    mean, std = data.reward.double().mean().item(), data.reward.double().std(correction=0).item()
    doubt = offline.doubts_on(model, data, "doubt", g).double().mean().item()
    scaled = Penalty(2.0, "doubt", scaled=True)
    assert going(scaled, offline.penalty_unit(model, data, scaled, g)) == pytest.approx(9 * (mean - 2 * std), rel=1e-4)
    assert going(Penalty(3.0, "doubt"), 1.0) == pytest.approx(9 * (mean - 3 * doubt), rel=1e-4)
    assert going(Penalty(3.0, "bellman"), 1.0) == pytest.approx(9 * mean, rel=1e-4)
    rich = replace(data, reward=data.reward - mean + 1.5 * std)  # earns, but not enough for two standard deviations
    left = offline.worth_of_going_on(model, rich, scaled, offline.penalty_unit(model, rich, scaled, g), 0.9, g)
    assert left == pytest.approx(-9 * 0.5 * std, rel=1e-3)
    assert offline.worth_of_going_on(model, rich, Penalty(0.0, "doubt"), 1.0, 0.9, g) == 0
    assert offline.worth_of_going_on(model, data, scaled, 1.0, 1.0, g) == 0


def test_a_quantile_at_the_bound_of_an_uncertainty_is_warned_of():
    class Bounded(Line):
        def step(self, state, inp, cond):
            after, p = super().step(state, inp, cond)
            return after, p._replace(uncertainty={"doubt": p.uncertainty["doubt"].clamp(max=top)})

    data = line_data()
    doubt = offline.doubts_on(Line(), data, "doubt", torch.Generator())
    cut = Truncation("doubt", 1.0, relative=True, quantile=0.9)
    limit = lambda config=cut: offline.uncertainty_limit(Bounded(), data, config, torch.Generator())
    top = doubt.quantile(0.95).item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert limit() < top
    top = doubt.quantile(0.8).item()
    with pytest.warns(UserWarning, match=r"doubt is .*, the largest there is, for 2\d\.\d\d% of the steps"):
        assert limit() == pytest.approx(top)
    assert limit(replace(cut, threshold=0.5)) == pytest.approx(top / 2)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("morec-mopo", "099285dfa93e"),
        ("morec-published", "17a09edb5e8a"),
        ("mopo", "6cf31a790261"),
        ("bc", "a446081fbc0d"),
        ("morel", "f0b794bc8b4a"),
        ("mobile", "7e03e24bcf22"),
        ("morec-mobile", "10de991999b1"),
        ("td3-bc", "cc3c412a40b4"),
    ],
)
def test_a_setting_that_came_later_leaves_the_names_of_what_was_fitted(name, want):
    """Kept results name the settings of an earlier day, and stay those of today while the presets do."""
    parts = FitConfig(), offline.EnsembleConfig()
    preset = offline.PRESETS[name]
    assert offline.digest(preset, *parts) == want
    if isinstance(preset.agent, SacConfig):
        other = replace(preset, agent=replace(preset.agent, robust=0.1))
        assert offline.digest(other, *parts) != want
    assert offline.digest(replace(preset, batch=7), *parts) != want


def test_settings_within_settings_are_told_by_their_type_where_others_look_the_same():
    learners = [OdeConfig(solver=x(2)) for x in (RK4, Tsit5)] + [MixerConfig(x((8,))) for x in (Coda, Geps)]
    assert len({offline.digest(x) for x in learners}) == len(learners)
    first = {"hidden": [100, 100], "activation": "tanh", "solver": {"substeps": 2}, "alpha": 0.0, "local": None}
    first |= {"reward": False, "reward_hidden": [100, 100], "_": "OdeConfig"}
    assert offline.digest(learners[0]) == offline.digest(first), "what stands there first keeps its name"
    one, other = (make_dataclass(name, [("width", int)])(3) for name in ("One", "Other"))
    assert offline.digest(ExpertsConfig(one)) != offline.digest(ExpertsConfig(other))


def test_a_class_in_a_learners_place_is_named():
    with pytest.raises(ValueError, match="got the class ExpertsConfig, expected a learner's config"):
        offline.train(offline.MOPO, line_data(), dynamics=ExpertsConfig, seeds=[0])
