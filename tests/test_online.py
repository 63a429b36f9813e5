"""The online loop, in worlds whose answers are known and with models that are the environment."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import Box, Line, LineEnv, Memory, earned, never

from mbrl import offline, online
from mbrl.border import episode_seed
from mbrl.data import Transitions
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.single import SingleConfig
from mbrl.fit import FitConfig
from mbrl.online import Horizon, Met, OnlineConfig
from mbrl.sac import SacConfig
from mbrl.terminal import TerminalConfig

AGENT = SacConfig(hidden=(32, 32), actor_lr=3e-3, critic_lr=3e-3, alpha_lr=3e-3)
SMALL = OnlineConfig(
    AGENT, steps=120, random=40, refit_every=20, rollouts=50, retain=2, updates=2, batch=32, evaluate_every=40,
    log_every=30, save_every=2,
)  # fmt: skip
SINGLE = SingleConfig(hidden=(16,), weight_decay=(0.0, 0.0), gaussian=True)
SHORT = FitConfig(max_epochs=2, batch=16)


@dataclass(frozen=True)
class True_:
    """Builds a learner that is the environment."""

    shift: float = 0.0

    def build(self, spec, generator=None):
        return Shifted(self.shift)


class Shifted(Line):
    """`Line`, and so far beside it."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def step(self, state, inp, cond):
        x, pred = super().step(state, inp, cond)
        return x + self.shift, pred._replace(obs=x + self.shift)


def run(config=SMALL, env=None, **options):
    options = {"dynamics": True_(), "fitting": SHORT, "terminal": never, **options}
    return online.train(config, env or LineEnv(), **options)


def test_it_learns_to_hold_the_line_at_zero():
    config = replace(SMALL, steps=200, updates=8, horizon=Horizon(1, 3, 40, 120), batch=64)
    result = run(config, evaluate=earned, seed=1)
    best, nothing = (earned(p)[0] for p in (lambda x: -0.9 * x / 0.5, lambda x: 0 * x))
    assert result.last(1).item() > best + 0.2 * (nothing - best)
    assert [n for n, _ in result.returns] == [40, 80, 120, 160, 200]
    assert result.agent.updates == 160 * 8
    assert set(result.seconds) >= {"fit", "rollout", "update", "environment", "evaluate", "probe"}


def test_actions_are_rescaled_at_the_border_and_kept_as_they_were():
    env, memory = LineEnv(), Memory()
    run(env=env, record=memory)
    t = Transitions.unpack(memory.kept["online.partial"][0]["rows"][0], Line().spec)
    assert len(t.obs) == 120 == len(env.acts)
    assert (t.act.abs() <= 1).all()
    assert t.act[:40].std() > 0.4, "the first are uniform"
    sent = torch.tensor(np.stack(env.acts))
    torch.testing.assert_close(sent, t.act * 3 + 1)
    torch.testing.assert_close(t.next_obs, 0.9 * t.obs + 0.5 * t.act)
    torch.testing.assert_close(t.reward, -(t.next_obs[:, 0] ** 2))
    torch.testing.assert_close(t.obs[1:20], t.next_obs[:19])
    assert (t.obs[20] != t.next_obs[19]).all(), "an episode of 20 steps, then another"


def test_what_is_cut_is_not_an_end():
    memory = Memory()
    result = run(env=LineEnv(length=7, edge=1.2), record=memory, seed=2)
    t = Transitions.unpack(memory.kept["online.partial"][0]["rows"][0], Line().spec)
    over = t.next_obs[:, 0].abs() > 1.2
    assert 0 < over.sum() < len(result.episodes)
    assert torch.equal(t.terminal > 0, over)
    lengths = np.diff([0, *(n for n, _ in result.episodes)])
    assert lengths.max() == 7
    (ends,) = memory.kept["online.partial"][1]["starts"]
    assert ends == [0, *(n for n, _ in result.episodes if n <= ends[-1])]
    total = sum(r for n, r in result.episodes)
    assert t.reward[: result.episodes[-1][0]].sum().item() == pytest.approx(total, rel=1e-4)


def test_a_fit_pairs_nothing_across_the_end_of_an_episode():
    met = Met(Line().spec, torch.zeros(10, 5), LineEnv())
    for i in range(7):
        met.add(np.array([i]), np.array([0.0]), 0.0, np.array([i + 1]), False)
        if i == 2:
            met.starts.append(3)
    data = met.dataset()
    assert data.starts.tolist() == [0, 3, 7]
    met.starts.append(7)  # an episode that has not begun
    assert met.dataset().starts.tolist() == [0, 3, 7]
    assert data.windows(3).obs[:, 0, 0].tolist() == [0, 3, 4]
    assert (data.act_low.tolist(), data.act_high.tolist()) == ([-2.0], [4.0])


def test_every_episode_has_a_seed_of_its_own_that_the_runs_seed_determines():
    envs = [LineEnv() for _ in range(3)]
    for env, seed in zip(envs, (0, 0, 1), strict=True):
        run(env=env, seed=seed)
    assert envs[0].seeds == envs[1].seeds == [episode_seed(0, i) for i in range(6)]
    assert len({*envs[0].seeds, *envs[2].seeds}) == 12


@pytest.mark.parametrize(
    ("horizon", "want"),
    [
        (Horizon(), {0: 1, 10**6: 1}),
        (Horizon(1, 15, 20, 90), {0: 1, 20: 1, 24: 1, 25: 2, 55: 8, 89: 14, 90: 15, 1000: 15}),
        (Horizon(5, 1, 0, 4), {0: 5, 1: 4, 2: 3, 4: 1}),
        (Horizon(2, 7, 50, 50), {49: 2, 50: 7}),
    ],
)
def test_the_horizon_is_linear_between_two_steps(horizon, want):
    assert {step: horizon.at(step) for step in want} == want


def test_rollouts_have_the_schedules_length_and_the_last_batches_are_kept():
    memory = Memory()
    config = replace(SMALL, horizon=Horizon(1, 5, 40, 80), steps=100)
    run(config, record=memory)
    lines = {n: v for stage, n, v in memory.lines if stage == "rollout"}
    assert {n: v["transitions"] for n, v in lines.items()} == {40: 50.0, 60: 150.0, 80: 250.0}
    assert memory.kept["online.partial"][0]["buffer.size"].tolist() == [400], "the last two, of room for 500"


def test_the_last_step_is_evaluated_and_logged_whatever_the_intervals():
    memory = Memory()
    result = run(replace(SMALL, steps=50, evaluate_every=20), record=memory, evaluate=earned)
    assert [n for n, _ in result.returns] == [20, 40, 50]
    assert [n for stage, n, _ in memory.lines if stage == "policy"] == [50]
    assert result.returns[-1][1] == [[pytest.approx(earned(offline.policy_of(result.agent))[0])]]


def test_the_first_fit_is_after_the_random_steps():
    memory = Memory()
    run(replace(SMALL, random=50), record=memory)
    assert [n for stage, n, _ in memory.lines if stage == "model"] == [50, 70, 90, 110]


def test_it_acts_by_draws_of_its_policy():
    """Which nothing changes here, in a world that stands still."""

    class Still(LineEnv):
        def step(self, action):
            acts.append(float(action[0]))
            return np.zeros(1, np.float32), 0.0, False, len(acts) % 20 == 0, {}

        def reset(self, *, seed=None):
            return np.zeros(1, np.float32), {}

    acts = []
    run(replace(SMALL, updates=0), Still())
    assert len({*acts[40:]}) == 80


def test_every_step_so_far_is_learned_from(monkeypatch):
    seen, memory = [], Memory()
    inner = online.Sac.update
    spy = lambda agent, batch, noise: (seen.append(batch.obs.clone()), inner(agent, batch, noise))[1]
    monkeypatch.setattr(online.Sac, "update", spy)
    run(replace(SMALL, real_ratio=1.0), record=memory)
    rows = memory.kept["online.partial"][0]["rows"][0, :, 0]
    assert torch.isin(rows, torch.cat(seen, 1).flatten()).float().mean() > 0.97
    assert torch.isin(torch.cat(seen[:2], 1), rows[:41]).all()


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_a_batch_holds_the_real_share(ratio, monkeypatch):
    """Real rewards are -x^2, imagined ones are told apart by the task's function."""
    seen = []
    inner = online.Sac.update
    monkeypatch.setattr(
        online.Sac, "update", lambda agent, batch, noise: (seen.append(batch), inner(agent, batch, noise))[1]
    )
    run(replace(SMALL, real_ratio=ratio), reward=lambda obs, act, after: 0 * obs[:, 0] + 7.0)
    assert len(seen) == 160
    assert {int((batch.reward != 7.0).sum()) for batch in seen} == {int(32 * ratio)}


def interrupted(go, saves):
    memory = Memory(saves)
    with pytest.raises(KeyboardInterrupt):
        go(memory)
    memory.left = 10**9
    return memory, go(memory)


@pytest.mark.parametrize(
    ("dynamics", "agent"),
    [
        (SINGLE, replace(AGENT, robust=0.1, spectral=2.0, normalize=True)),
        (EnsembleConfig(3, 2, (8,), (0.0, 0.0), uncertainty=()), AGENT),
    ],
)
@pytest.mark.parametrize("saves", [1, 5, 9])
def test_an_interrupted_run_goes_on_to_the_same_numbers(dynamics, agent, saves):
    """Episodes of 13 steps: neither a refit, a log nor an evaluation falls on their ends."""
    config, options = replace(SMALL, agent=agent), {"dynamics": dynamics, "evaluate": earned, "seed": 4}
    go = lambda record: run(config, LineEnv(13, 2.0), record=record, **options)
    first = Memory()
    whole = go(first)
    memory, again = interrupted(go, saves)
    saved = [n for stage, n, _ in first.lines if stage == "episode"][saves - 1]
    assert (again.returns, again.episodes, again.probes) == (whole.returns, whole.episodes, whole.probes)
    for one, two in ((whole.agent, again.agent), (whole.models[0], again.models[0])):
        assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    after = lambda lines: [x for x in lines if x[1] > saved]
    tail = after(memory.lines)[-len(after(first.lines)) :]
    assert tail == after(first.lines)
    assert all(torch.equal(v, memory.kept["online.partial"][0][k]) for k, v in first.kept["online.partial"][0].items())


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 5},
        {"fitting": replace(SHORT, batch=8)},
        {"dynamics": True_(0.1)},
        {"config": replace(SMALL, updates=1)},
    ],
)
def test_a_record_of_another_run_is_refused(other):
    """One that does not say whose it is, of before it did, is gone on with."""
    memory = Memory(saves=2)
    with pytest.raises(KeyboardInterrupt):
        run(record=memory, seed=4)
    memory.left = 10**9
    with pytest.raises(ValueError, match="a run of other settings or seeds; continue that with its own"):
        run(record=memory, **{"seed": 4, **other})
    assert memory.kept["online.partial"][1].pop("of")
    memory.left = 1
    with pytest.raises(KeyboardInterrupt):
        run(record=memory, **{"seed": 4, **other})
    assert memory.kept["online.partial"][1]["steps"] == 60


@pytest.mark.parametrize("seeds", [[4], [4, 8]])
def test_learned_terminations_are_kept(seeds, monkeypatch):
    """Also by a run that is interrupted after its last refit, which comes to the same ones."""
    monkeypatch.setattr(online, "TerminalConfig", lambda: TerminalConfig(hidden=(8,), steps=20))
    config = replace(SMALL, steps=119, save_every=2 if len(seeds) == 1 else 110)
    go = lambda record: together(seeds, config, lambda: LineEnv(13, 2.0), dynamics=SINGLE, terminal=None, record=record)
    first, names = Memory(), ["terminal"] if len(seeds) == 1 else ["terminal0", "terminal1"]
    found = go(first)
    memory, again = interrupted(
        go, len(found[0].episodes) if len(seeds) == 1 else 1
    )  # after step 106, a refit is at 100
    for name in names:
        kept = [m.kept[name][0] for m in (first, memory)]
        assert kept[0].keys() == kept[1].keys() > {"endings", "prior"}
        assert all(torch.equal(v.nan_to_num(), kept[1][k].nan_to_num()) for k, v in kept[0].items())
    assert [x.episodes for x in found] == [x.episodes for x in again]
    models, ends = online.learned(first, SINGLE, Line().spec, len(seeds))
    for model, result in zip(models, found, strict=True):
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in result.models[0].state_dict().items())
    for name, end in zip(names, ends, strict=True):
        state = end.state_dict()
        assert all(torch.equal(v.nan_to_num(), state[k].nan_to_num()) for k, v in first.kept[name][0].items())
    with pytest.raises(ValueError, match="no model yet"):
        online.learned(Memory(), SINGLE, Line().spec, len(seeds))


def together(seeds, config=SMALL, make=LineEnv, **options):
    options = {"dynamics": True_(), "fitting": SHORT, "terminal": never, **options}
    return online.train_together(config, [make() for _ in seeds], seeds=seeds, **options)


def test_one_seed_among_several_is_that_of_one():
    (found,) = together([4], dynamics=SINGLE, evaluate=earned)
    alone = run(dynamics=SINGLE, evaluate=earned, seed=4)
    assert (found.returns, found.episodes, found.probes) == (alone.returns, alone.episodes, alone.probes)


def test_several_seeds_learn_each_in_a_world_and_with_a_model_of_its_own():
    """Worlds whose episodes end at different times; each learns from its own transitions alone."""
    memory, envs = Memory(), [LineEnv(13, 2.0), LineEnv(20), LineEnv(7, 1.0)]
    config = replace(SMALL, steps=200, updates=8, batch=64)
    options = {"dynamics": True_(), "fitting": SHORT, "terminal": never, "evaluate": earned, "record": memory}
    found = online.train_together(config, envs, seeds=[5, 6, 9], **options)
    rows = memory.kept["online.partial"][0]["rows"]
    for s, (seed, env, result) in enumerate(zip((5, 6, 9), envs, found, strict=True)):
        assert env.seeds == [episode_seed(seed, i) for i in range(len(env.seeds))]
        t = Transitions.unpack(rows[s], Line().spec)
        torch.testing.assert_close(torch.tensor(np.stack(env.acts)), t.act * 3 + 1)
        assert sum(r for _, r in result.episodes) == pytest.approx(
            t.reward[: result.episodes[-1][0]].sum().item(), rel=1e-4
        )
        assert [n for n, _ in result.probes] == list(range(60, 200, 20))
        assert [n for n, _ in result.returns] == [40, 80, 120, 160, 200]
        assert result.last(1).shape == (1,)
        assert result.agent.seeds == 1
        assert result.last(1).item() == pytest.approx(earned(offline.policy_of(result.agent))[0])
    best, nothing = (earned(p)[0] for p in (lambda x: -0.9 * x / 0.5, lambda x: 0 * x))
    assert all(x.last(1).item() > best + 0.5 * (nothing - best) for x in found)
    assert len({len(env.seeds) for env in envs}) == 3
    assert len({id(x.models[0]) for x in found}) == 3
    for stage in ("episode", "model", "probe", "rollout"):
        assert {x["seed"] for told, _, x in memory.lines if told == stage} == {5.0, 6.0, 9.0}
    logged = [(n, {k: v for k, v in x.items() if k != "seed"}) for told, n, x in memory.lines if told == "probe"]
    assert sorted(logged, key=str) == sorted((x for result in found for x in result.probes), key=str)


@pytest.mark.parametrize("saves", [1, 4, 5])
def test_several_seeds_interrupted_in_the_midst_of_episodes_go_on_to_the_same_numbers(saves):
    """The fifth time state is saved is at the end, whereupon nothing is left to do."""
    config = replace(SMALL, save_every=25)
    go = lambda record: together(
        [4, 8], config, lambda: LineEnv(13, 2.0), dynamics=SINGLE, evaluate=earned, record=record
    )
    whole = go(Memory())
    memory, again = interrupted(go, saves)
    assert memory.kept["online.partial"][1]["steps"] == config.steps
    for one, two in zip(whole, again, strict=True):
        assert (one.returns, one.episodes, one.probes) == (two.returns, two.episodes, two.probes)
        assert all(torch.equal(v, two.agent.state_dict()[k]) for k, v in one.agent.state_dict().items())


def test_an_episode_that_goes_on_and_on_is_saved_in_its_midst():
    config = replace(SMALL, save_every=5)
    go = lambda record: run(config, LineEnv(10_000), dynamics=SINGLE, evaluate=earned, record=record)
    whole = go(Memory())
    memory = Memory(1)
    with pytest.raises(KeyboardInterrupt):
        go(memory)
    assert memory.kept["online.partial"][1]["steps"] == 50
    memory.left = 10**9
    again = go(memory)
    assert (whole.returns, whole.probes) == (again.returns, again.probes)
    assert all(torch.equal(v, again.agent.state_dict()[k]) for k, v in whole.agent.state_dict().items())


def test_an_environment_that_is_not_its_seeds_alone_is_not_gone_on_with():
    class Fickle(LineEnv):
        def reset(self, *, seed=None):
            super().reset(seed=seed)
            self.x += 1e-3
            return self.x, {}

    config, memory = replace(SMALL, save_every=25), Memory(1)
    with pytest.raises(KeyboardInterrupt):
        together([4, 8], config, lambda: LineEnv(13, 2.0), dynamics=SINGLE, evaluate=earned, record=memory)
    memory.left = 10**9
    with pytest.raises(ValueError, match="run again went another way"):
        together([4, 8], config, Fickle, dynamics=SINGLE, evaluate=earned, record=memory)


@pytest.mark.parametrize(
    ("envs", "options", "message"),
    [
        ([LineEnv()], {"seeds": [0, 1]}, "got 1 environments and seeds"),
        ([LineEnv(), LineEnv()], {"seeds": [1, 1]}, "none twice"),
        ([], {"seeds": []}, "got 0 environments"),
        ([LineEnv(), LineEnv()], {"seeds": [0, 1], "evaluate": [earned]}, "got 1 functions"),
        ([LineEnv()], {"seeds": [0], "evaluate": LineEnv()}, "got a LineEnv, expected a function of a policy"),
        ([LineEnv()], {"seeds": [0], "reward": lambda obs, act, after: after}, r"reward: .* shape \[2, 1\]"),
    ],
)
def test_seeds_and_environments_that_do_not_go_together_are_one_error(envs, options, message):
    with pytest.raises(ValueError, match=message):
        online.train_together(SMALL, envs, **options)
    wide = LineEnv()
    with pytest.raises(ValueError, match="one environment twice"):
        online.train_together(SMALL, [wide, wide], seeds=[0, 1])
    wide.action_space = Box([-1.0], [1.0])
    with pytest.raises(ValueError, match="environments are not alike"):
        online.train_together(SMALL, [LineEnv(), wide], seeds=[0, 1])


def test_state_is_saved_at_ends_of_episodes_so_many_steps_apart():
    class Count(Memory):
        steps: tuple = ()

        def save(self, name, tensors, facts):
            if name == "online.partial":
                self.steps = (*self.steps, facts["steps"])
            super().save(name, tensors, facts)

    memory = Count(saves=1)
    go = lambda: run(replace(SMALL, save_every=30), LineEnv(length=20), record=memory)
    with pytest.raises(KeyboardInterrupt):
        go()
    memory.left = 10**9
    go()
    assert memory.steps == (40, 80, 120)


def test_a_refit_goes_on_from_the_weights_of_the_last():
    seen = []

    @dataclass(frozen=True)
    class Spy:
        def build(self, spec, generator=None):
            model = SINGLE.build(spec, generator)
            inner = model.prepare
            model.prepare = lambda segment: (seen.append(model.net.weights[0].detach().clone()), inner(segment))[1]
            finish = model.finish
            model.finish = lambda errors: (finish(errors), seen.append(model.net.weights[0].detach().clone()))[0]
            return model

    run(dynamics=Spy())
    begins, ends = seen[0::2], seen[1::2]
    assert len(begins) == len(ends) == 4
    for end, begin in zip(ends[:-1], begins[1:], strict=True):
        assert torch.equal(end, begin)
    assert not torch.equal(begins[0], ends[0])


def test_the_probes_tell_the_models_error_on_what_it_has_not_seen():
    right, wrong = (run(dynamics=True_(shift), seed=5) for shift in (0.0, 0.3))
    assert [n for n, _ in right.probes] == [60, 80, 100]
    assert all(p["value_error"] < 1e-5 for _, p in right.probes)
    assert all(p["value_error"] > 1e-3 for _, p in wrong.probes)
    for _, p in right.probes:
        assert p["linf_max"] >= p["linf_mean"] > 0
        assert p["l2_max"] == pytest.approx(p["linf_max"]), "of one dimension the norms are one"


def test_probes_are_of_the_transitions_since_the_last_fit(monkeypatch):
    seen, memory = [], Memory()
    monkeypatch.setattr(online, "value_aware_error", lambda *args: (seen.append(args[2]), torch.zeros(1))[1])
    run(record=memory)
    t = Transitions.unpack(memory.kept["online.partial"][0]["rows"][0], Line().spec)
    assert len(seen) == 3
    for i, batch in enumerate(seen):
        torch.testing.assert_close(batch.next_obs, t.next_obs[40 + 20 * i : 60 + 20 * i])


def test_observations_are_standardised_by_the_random_steps():
    memory = Memory()
    result = run(replace(SMALL, agent=replace(AGENT, normalize=True)), record=memory)
    obs = Transitions.unpack(memory.kept["online.partial"][0]["rows"][0], Line().spec).obs[:40]
    torch.testing.assert_close(result.agent.obs_mean, obs.mean(0))
    torch.testing.assert_close(result.agent.obs_std, obs.std(0, correction=0) + 1e-3)


def test_probing_changes_no_number(monkeypatch):
    whole = run(dynamics=SINGLE, seed=6)
    monkeypatch.setattr(online, "value_aware_error", lambda *args: torch.zeros(1))
    blind = run(dynamics=SINGLE, seed=6)
    assert torch.equal(whole.agent.actor, blind.agent.actor)


def test_without_the_tasks_termination_it_is_learned(monkeypatch):
    monkeypatch.setattr(online, "TerminalConfig", lambda: TerminalConfig(steps=300))
    memory = Memory()
    config = replace(SMALL, horizon=Horizon(5, 5), steps=100, random=80)
    run(config, LineEnv(length=20, edge=0.8), terminal=None, record=memory)
    (line,) = [v for stage, _, v in memory.lines if stage == "rollout"]
    assert line["ended"] > 0.05


class Sick(LineEnv):
    """Returns what it should not at its fifth step."""

    def __init__(self, obs=None, reward=None, start=None):
        super().__init__()
        self.bad, self.start = (obs, reward), start

    def reset(self, *, seed=None):
        obs, info = super().reset(seed=seed)
        return (obs if self.start is None else self.start), info

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if self.t == 5:
            obs = obs if self.bad[0] is None else np.array(self.bad[0], np.float32)
            reward = reward if self.bad[1] is None else self.bad[1]
        return obs, reward, *rest


class Faulty(LineEnv):
    """Whose own code fails at its third step."""

    def step(self, action):
        if self.t == 2:
            Path("/no/such/file").read_text()
        return super().step(action)


def spaces(**spaces):
    env = LineEnv()
    for name, space in spaces.items():
        setattr(env, name, space)
    return env


class Discrete:
    n, shape = 3, ()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (spaces(action_space=Discrete()), "action space.*flat Box"),
        (spaces(action_space=Box([-np.inf], [1.0])), "finite bounds"),
        (spaces(action_space=Box([[-1.0]], [[1.0]])), "action space.*flat Box"),
        (spaces(observation_space=Box([[-1.0]], [[1.0]])), "observation space.*flat Box"),
        (spaces(observation_space=Discrete()), "observation space.*flat Box"),
        (spaces(num_envs=3), "expected a single one"),
        (Sick(obs=[np.nan]), "step 5 returned the observation"),
        (Sick(reward=np.nan), "step 5 returned a reward of nan"),
        (Sick(reward=-1e39), r"step 5 returned a reward of -1e\+39"),
        (Sick(obs=[1.0, 2.0]), r"step 5 returned shape \(2,\), expected \(1,\)"),
        (Sick(start=np.array([np.inf])), "reset returned the observation"),
        (Faulty(), r"its step 3 raised FileNotFoundError: .*no/such/file.* \(test_online.py:\d+\)"),
    ],
)
def test_an_environment_that_does_not_fit_is_one_error(env, message):
    with pytest.raises(ValueError, match=message):
        run(env=env)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"real_ratio": 1.5}, r"share in \[0, 1\]"),
        ({"agent": replace(SMALL.agent, cloning=1.0)}, "no actions to imitate"),
        ({"random": 1}, "2 <= random"),
        ({"random": 121}, "2 <= random"),
        ({"retain": 0, "batch": 0}, "retain=0, batch=0"),
    ],
)
def test_settings_that_do_not_go_together_are_one_error(change, message):
    with pytest.raises(ValueError, match=message):
        run(replace(SMALL, **change))


@pytest.mark.parametrize("bad", [{"first": 0}, {"begin": 5, "end": 4}, {"first": 5}, {"last": 3}])
def test_a_schedule_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match="Horizon"):
        Horizon(**bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamics": SingleConfig}, "got the class SingleConfig, expected a learner's config"),
        ({"dynamics": "single"}, "got a str, expected a learner's config"),
        ({"config": SHORT}, "online: got a FitConfig for a config, expected a OnlineConfig"),
    ],
)
def test_what_is_no_config_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_evaluations_are_told_while_it_runs():
    told = []

    class Told(Memory):
        def progress(self, stage, step, total, values):
            told.append((stage, step, total, dict(values)))

    result = run(evaluate=earned, record=Told())
    assert [x for x in told if x[0] == "evaluate"] == [
        ("evaluate", n, 120, {"return": float(r[0][0])}) for n, r in result.returns
    ]


def test_a_model_that_tells_no_reward_is_one_error_where_no_function_does(monkeypatch):
    monkeypatch.setattr(Shifted, "tells_reward", False)
    with pytest.raises(ValueError, match="no function tells it, and this Shifted has no head for it"):
        run()
    run(replace(SMALL, steps=41), reward=lambda obs, act, after: -(after[:, 0] ** 2))


def test_a_fit_that_cannot_be_is_refused_before_the_first_step():
    env = LineEnv()
    with pytest.raises(ValueError, match="batch=0"):
        run(env=env, fitting=replace(SHORT, batch=0))
    assert not env.seeds


def test_a_model_that_is_nowhere_finite_is_one_error():
    with pytest.raises(ValueError, match="no imagined transition was kept"):
        run(dynamics=True_(float("nan")))
