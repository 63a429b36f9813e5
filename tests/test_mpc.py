"""Environment, planner and learner together: on a line whose best control is known, and with stand-ins."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_contract import SUBJECTS
from worlds import Line, Memory

from mbrl import device as devices
from mbrl import mpc as mpc_module
from mbrl.border import World, episode_seed
from mbrl.core import Dynamics, Prediction, Spec, StepInput, pull
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.ode import OdeConfig
from mbrl.fit import FitConfig
from mbrl.mpc import ByValue, Episode, Mpc, PetsConfig, episode, gathered, over, pets, shares
from mbrl.offline import policy_of
from mbrl.planner import CEM, ICEM, Planner, Worth
from mbrl.sac import SacConfig

SMALL = replace(CEM, horizon=4, samples=64, elites=8, iterations=4)


class LineEnv:
    """x' = 0.9 x + 0.5 a with a in [-2, 2] / 2, reward -x'^2, eight steps; ends beyond |x| = 5."""

    def __init__(self, length=8, low=-2.0, high=2.0):
        self.length = length
        self.action_space = spaces.Box(low, high, (1,), np.float32)
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.spoil: dict[int, str] = {}

    def reset(self, *, seed=None):
        self.x, self.t = np.random.default_rng(seed).uniform(-1, 1), 0
        return np.array([self.x], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x = 0.9 * self.x + 0.5 * float(action[0]) / 2
        self.t += 1
        obs, reward = np.array([self.x], np.float32), -(self.x**2)
        if self.spoil.get(self.t) == "obs":
            obs[:] = np.nan
        if self.spoil.get(self.t) == "reward":
            reward = np.inf
        return obs, reward, abs(self.x) > 5, self.t >= self.length, {}


def controller(model=None, planner=SMALL, seed=0, **kw):
    return Mpc(planner, Worth(), model or Line(), generator=devices.generator(seed), **kw)


# ---------------------------------------------------------------- control


def test_it_drives_the_line_to_where_the_reward_is():
    mpc = controller()
    mpc.begin(3)
    x = torch.tensor([[0.5], [-0.5], [0.2]])
    for _ in range(4):
        act = mpc(x)
        x = 0.9 * x + 0.5 * act
    assert x.abs().max() < 0.06
    assert mpc.counts["lost"] == 0
    assert mpc.counts["seen"] == 4 * 3 * 64 * 4


@pytest.mark.parametrize("planner", [SMALL, replace(ICEM, horizon=4)])
def test_begin_and_clear_leave_nothing_of_the_past(planner):
    x = torch.tensor([[0.5], [0.5]])
    mpc = controller(planner=planner)
    mpc.begin(2)
    first = mpc(x)
    mpc(x)
    mpc.begin(2)
    mpc.generator.manual_seed(0)
    assert torch.equal(mpc(x), first)
    mpc.clear(torch.tensor([True, False]))
    mpc.generator.manual_seed(0)
    again = mpc(x)
    assert torch.equal(again[0], first[0])
    assert not torch.equal(again[1], first[1])


class Counter(Dynamics):
    """Its state remembers how often it was stepped, and the observation: what correction cannot see must be carried."""

    def __init__(self):
        super().__init__()
        self.spec, self.noise_dim = Spec(1, 1), 0
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def init(self, obs, cond):
        return obs, torch.zeros_like(obs)

    def observe(self, state, cond):
        return state[0]

    def step(self, state, inp, cond):
        obs, n = state[0] + inp.act, state[1] + 1
        return (obs, n), Prediction(obs, -(obs[:, 0] ** 2), {})

    def correct(self, state, obs, alpha, cond):
        return pull(state[0], obs, alpha), state[1]

    def loss(self, segment, noise):
        raise NotImplementedError


def test_a_hidden_state_goes_with_its_episode():
    mpc = controller(Counter())
    mpc.begin(3)
    for _ in range(2):
        mpc(torch.zeros(3, 1))
    assert mpc.state[1].flatten().tolist() == [2, 2, 2]
    mpc.rows([2, 0], 1)
    mpc(torch.tensor([[0.1], [0.2], [0.3]]))
    assert mpc.state[1].flatten().tolist() == [3, 3, 1]
    mpc.clear(torch.tensor([False, True, False]))
    mpc(torch.tensor([[0.1], [0.2], [0.3]]))
    assert mpc.state[1].flatten().tolist() == [4, 1, 2]


def test_the_state_is_corrected_to_what_was_observed():
    mpc = controller(Counter())
    mpc.begin(1)
    mpc(torch.zeros(1, 1))
    act = mpc(torch.tensor([[0.7]]))
    torch.testing.assert_close(mpc.state[0], 0.7 + act)


def test_rows_keep_their_own_plans():
    mpc = controller()
    mpc.begin(3)
    mpc(torch.tensor([[0.9], [0.0], [-0.9]]))
    before = mpc.plan
    mpc.rows([2, 0], 1)
    assert torch.equal(mpc.plan.mean[:2], before.mean[[2, 0]])
    assert (mpc.plan.mean[2] == 0).all()
    assert mpc.new.tolist() == [False, False, True]


def test_every_particle_keeps_another_part_and_the_first_is_drawn(monkeypatch):
    model = EnsembleConfig(members=4, elites=4, hidden=(8,), weight_decay=(0.0, 0.0)).build(Spec(1, 1))
    mpc = Mpc(SMALL, Worth(particles=3), model, generator=devices.generator(0))
    seen = []
    plain = model.pinned
    monkeypatch.setattr(model, "pinned", lambda part: (seen.append(part.tolist()), plain(part))[1])
    mpc.begin(2)
    for _ in range(6):
        mpc(torch.zeros(2, 1))
    for part in seen:
        rows = np.array(part).reshape(2, 3)
        assert ((rows - rows[:, :1]) == [0, 1, 2]).all()
    assert len({part[0] for part in seen}) > 1


def test_a_policys_proposal_is_taken_where_it_is_best():
    planner = Planner(horizon=3, samples=8, elites=2, iterations=1, std=0.01, proposals=2, execute="best")
    mpc = controller(planner=planner, policy=lambda obs, z: (-1.8 * obs + 0 * z).clamp(-1, 1))
    mpc.begin(1)
    act = mpc(torch.tensor([[0.5]]))
    torch.testing.assert_close(act, torch.tensor([[-0.9]]))
    with pytest.raises(ValueError, match="there is no policy"):
        controller(planner=planner)


def test_where_nothing_tells_the_reward_nothing_is_planned():
    model = OdeConfig(hidden=(8,)).build(Spec(1, 1))
    with pytest.raises(ValueError, match="no function tells it, and this NeuralODE has no head for it"):
        controller(model)
    controller(model, reward=lambda o, a, x: x[:, 0])


def test_the_critic_looks_beyond_the_horizon():
    """One step, no reward: only the value of the end speaks, and 0.9 x + 0.5 a = 0.4 is the best."""
    planner = Planner(horizon=1, samples=256, elites=8, iterations=8, min_std=1e-3)
    mpc = controller(planner=planner, reward=lambda o, a, x: 0 * x[:, 0], critic=lambda o: -((o[:, 0] - 0.4) ** 2))
    mpc.begin(1)
    torch.testing.assert_close(mpc(torch.tensor([[0.5]])), torch.tensor([[-0.1]]), atol=0.01, rtol=0)


def test_observations_of_another_number_or_width_are_refused():
    mpc = controller()
    mpc.begin(2)
    with pytest.raises(ValueError, match=r"of 1 environments, expected 2; say `begin\(E\)` first"):
        mpc(torch.zeros(1, 1))
    for rows in (1, 2):
        with pytest.raises(ValueError, match="observations 3 wide, expected 1, as the model has"):
            mpc(torch.zeros(rows, 3))


def test_what_cannot_be_planned_with_is_named():
    with pytest.raises(ValueError, match="got a object for a model, expected a Dynamics"):
        controller(object())
    for dt in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"dt is {dt}, expected > 0, finite"):
            controller(dt=dt)
    for ctx in (torch.zeros(1, 2), torch.zeros(0)):
        with pytest.raises(ValueError, match=r"shape of ctx is \[.*\], expected \[1, 0\]"):
            controller(ctx=ctx)
    assert controller(ctx=torch.zeros(1, 0)).ctx.shape == (1, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"critic": lambda obs: obs}, r"for 2 rows the critic returned \[2, 1\], expected \[2\]"),
        ({"critic": lambda obs: 0.0}, "the critic returned a float"),
        ({"policy": lambda obs, noise: torch.zeros(2, 3)}, r"the policy returned \[2, 3\], expected \[2, 1\]"),
        (
            {"policy": lambda obs, noise: obs @ torch.zeros(4, 1)},
            r"the policy cannot read .* \[2, 1\] of torch.float32",
        ),
    ],
)
def test_what_values_and_proposes_is_tried_before_the_first_plan(given, message):
    with pytest.raises(ValueError, match=message):
        controller(**given)


def test_observations_that_are_none_are_refused():
    mpc = controller()
    mpc.begin(1)
    with pytest.raises(ValueError, match="1 of 1 observations are not finite"):
        mpc(torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match=r"got observations \[1\], expected \[E, O\]"):
        mpc(torch.zeros(1))
    assert mpc(np.zeros((1, 1))).shape == (1, 1)


def test_a_policy_reads_rows_of_any_kind():
    agent = SacConfig(hidden=(8,)).build(Spec(1, 1), devices.generator(0))
    policy = policy_of(agent)
    assert torch.equal(policy(np.zeros((2, 1), np.float32)), policy(torch.zeros(2, 1)))
    with pytest.raises(ValueError, match=r"policy: got observations \[1\], expected \[n, 1\]"):
        policy(torch.zeros(1))


def test_a_learner_without_actions_is_not_planned_with():
    with pytest.raises(ValueError, match="number of actions is 0, expected >= 1"):
        controller(EnsembleConfig(hidden=(8,), weight_decay=(0.0, 0.0)).build(Spec(1, 0)))


def test_a_mask_of_other_environments_is_refused():
    mpc = controller()
    mpc.begin(3)
    with pytest.raises(ValueError, match=r"clear got \[1\], expected \[3\]"):
        mpc.clear(torch.ones(1, dtype=torch.bool))


def test_one_future_is_not_asked_for_several_times():
    mpc = Mpc(SMALL, Worth(particles=5), Line(), generator=devices.generator(0))
    assert mpc.worth.particles == 1
    several = [Mpc(SMALL, Worth(particles=5), m).worth.particles for m in (Line(parts=2), Line(noise_dim=1))]
    assert several == [5, 5]


def test_a_plan_heeds_the_end_of_an_episode():
    """Each step costs, and beyond 0.5 nothing does any more."""
    kw = {"reward": lambda o, a, x: -torch.ones(len(o)) - 0.1 * x[:, 0].abs()}
    end = lambda o, a, x: x[:, 0].abs() > 0.5
    for terminal, further in ((None, False), (end, True)):
        mpc = controller(terminal=terminal, **kw)
        mpc.begin(1)
        after = 0.9 * 0.3 + 0.5 * mpc(torch.tensor([[0.3]])).item()
        assert (abs(after) > 0.5) == further


@pytest.mark.parametrize("name", ["reward", "terminal"])
def test_a_tasks_function_that_does_not_return_a_row_each_is_named(name):
    with pytest.raises(ValueError, match=rf"{name}: for 2 transitions .*\[2, 1\], expected .* \[2\], one a row"):
        controller(**{name: lambda obs, act, after: after > 0})


def test_a_learner_without_parameters_is_planned_with():
    class Bare(Line):
        def __init__(self):
            super().__init__()
            del self.anchor
            self.anchor = 0.0

    bare, usual = controller(Bare()), controller()
    for mpc in (bare, usual):
        mpc.begin(2)
    torch.testing.assert_close(bare(torch.tensor([[0.5], [-0.2]])), usual(torch.tensor([[0.5], [-0.2]])))


LEARNERS = [
    *("hyper", "latent", "single", "single-gaussian", "ensemble", "filtered-single", "plrnn-clipped", "ode"),
    *("hypernetwork", "experts", "heads", "mixer", "mixer-plrnn", "filtered-mixer", "filtered-plrnn"),
]


@pytest.mark.parametrize("name", LEARNERS)
def test_any_learner_is_planned_with(name):
    """Whatever its state and its condition, and to the same plans under the same stream of noise."""
    subject = SUBJECTS[name]
    model, planner = subject.fresh(), replace(ICEM, horizon=3, samples=12, elites=4)
    obs = torch.randn(2, subject.spec.obs, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    make = lambda: Mpc(
        planner, Worth(particles=2), model, generator=devices.generator(0), reward=lambda o, a, x: -x.square().sum(1)
    )
    mpc = make()
    mpc.begin(2)
    first, second = mpc(obs), mpc(obs + 0.1)
    assert first.shape == (2, subject.spec.act)
    assert first.isfinite().all()
    assert second.isfinite().all()
    again = make()
    again.begin(2)
    assert torch.equal(again(obs), first)


@pytest.mark.parametrize("name", ["hyper", "hypernetwork", "heads", "mixer"])
def test_of_several_systems_the_first_is_planned_for(name):
    """Unless another's context is given; zeros would be no system's."""
    model = SUBJECTS[name].fresh()
    assert model.spec.systems > 1
    plan = lambda **kw: Mpc(SMALL, Worth(), model, **kw).ctx
    table = model.context(torch.arange(model.spec.systems))
    assert torch.equal(plan(), table[:1])
    assert torch.equal(plan(ctx=table[1:2]), table[1:2])


@pytest.mark.parametrize("name", ["ensemble", "filtered-single"])
def test_elites_climb_a_learners_gradient(name):
    """Of the same candidates, the best is better for it, and no gradient stays behind."""
    subject = SUBJECTS[name]
    obs = torch.randn(2, subject.spec.obs, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = []
    for steps in (0, 3):
        planner = replace(CEM, horizon=3, samples=12, elites=4, iterations=1, execute="best", gradient_steps=steps)
        model = subject.fresh()
        reward = lambda o, a, x: -x.square().sum(1)
        mpc = Mpc(planner, Worth(particles=2), model, generator=devices.generator(0), reward=reward)
        mpc.begin(2)
        mpc(obs)
        assert mpc.found is not None
        found.append(mpc.found)
        assert all(p.grad is None for p in model.parameters())
    assert (found[1].value > found[0].value).all()


def test_noise_is_drawn_anew_for_each_step_of_a_plan():
    """So that, not pinned, a particle goes from part to part (TS-1)."""
    seen = []

    class Spy(Line):
        def __init__(self):
            super().__init__()
            self.noise_dim = 1

        def draw(self, n, k, generator):
            return torch.rand(n * k, 1, generator=generator)

        def step(self, state, inp, cond):
            seen.append(inp.noise.unique().tolist())
            return super().step(state, inp._replace(noise=inp.noise[:, :0]), cond)

    mpc = Mpc(replace(SMALL, iterations=1), Worth(particles=2, pinned=False), Spy(), generator=devices.generator(0))
    mpc.begin(1)
    mpc(torch.zeros(1, 1))
    drawn = seen[: SMALL.horizon]
    assert all(len(x) == 2 for x in drawn), "a draw for each particle, the same for all candidates"
    assert len({v for x in drawn for v in x}) == 2 * SMALL.horizon


def test_planning_over_an_agent_takes_its_policy_and_its_least_critic():
    agent = SacConfig(hidden=(8,)).build(Spec(1, 1), devices.generator(0), seeds=2)
    mpc = over(agent, 1, Line(), generator=devices.generator(0))
    obs, noise = torch.randn(5, 1), torch.randn(5, 1)
    two = lambda x: torch.stack([x, x])
    assert mpc.policy is not None
    assert mpc.critic is not None
    torch.testing.assert_close(mpc.policy(obs, noise), agent.act(two(obs), two(noise))[1])
    torch.testing.assert_close(mpc.critic(obs), agent.q(two(obs), agent.act(two(obs)))[1].min(0).values)
    mean = over(agent, 1, Line(), generator=devices.generator(0), critics="mean").critic
    assert mean is not None
    torch.testing.assert_close(mean(obs), agent.q(two(obs), agent.act(two(obs)))[1].mean(0))
    assert mpc.worth == Worth(discount=0.99, particles=1, pessimism=1.0)
    several = over(agent, 1, Line(parts=3), generator=devices.generator(0)).worth
    assert several == Worth(discount=0.99, particles=5, pessimism=1.0)
    assert over(agent, 1, Line(noise_dim=2), generator=devices.generator(0)).worth == several
    wide = SacConfig(hidden=(8,)).build(Spec(2, 1), devices.generator(0))
    with pytest.raises(ValueError, match="the agent is of 2 observations and 1 actions, the model of 1 and 1"):
        over(wide, 0, Line(), generator=devices.generator(0))
    mpc.begin(2)
    assert mpc(torch.zeros(2, 1)).shape == (2, 1)


def test_planning_over_an_agent_steps_the_model_by_the_datas_interval():
    seen = set()

    class Timed(Line):
        def step(self, state, inp, cond):
            seen.update(inp.dt.flatten().tolist())
            return super().step(state, inp, cond)

    agent = SacConfig(hidden=(8,)).build(Spec(1, 1), devices.generator(0))
    mpc = over(agent, 0, Timed(), generator=devices.generator(0), dt=0.25)
    mpc.begin(1)
    mpc(torch.zeros(1, 1))
    assert seen == {0.25}


def test_a_limit_on_what_the_learner_does_not_tell_is_found_before_the_first_plan():
    learner = EnsembleConfig(members=3, elites=2, hidden=(8,), weight_decay=(0.0, 0.0)).build(Spec(1, 1))
    with pytest.raises(ValueError, match="'disagreement', the learner pinned to a part reports aleatoric; pass pinned"):
        Mpc(SMALL, Worth(particles=3, limit=1.0), learner)
    mpc = Mpc(SMALL, Worth(particles=3, limit=1.0, pinned=False), learner, generator=devices.generator(0))
    mpc.begin(2)
    assert mpc(torch.zeros(2, 1)).isfinite().all()
    silent = learner.reporting()
    for pinned, it in ((True, "the learner pinned to a part reports none"), (False, "the learner reports none")):
        with pytest.raises(ValueError, match=rf"{it}; plan with a learner that .* \(dynamics:ensemble\)"):
            Mpc(SMALL, Worth(particles=3, limit=1.0, pinned=pinned), silent)
    with pytest.raises(ValueError, match=r"'disagreement', the learner reports doubt; name .*\(--worth.uncertainty;"):
        Mpc(SMALL, Worth(limit=1.0), Line())


def test_a_plan_valued_from_outside_goes_on_a_step_later():
    control = ByValue(SMALL, lambda acts: -((acts - torch.tensor([0.1, 0.5, -0.5, 0.9])[:, None]) ** 2).sum((-1, -2)),
                      1, devices.generator(0))  # fmt: skip
    act = control(torch.zeros(1, 1))
    torch.testing.assert_close(act, torch.tensor([[0.1]]), atol=0.25, rtol=0)
    want = torch.tensor([0.5, -0.5, 0.9, 0.9])[None, :, None]
    torch.testing.assert_close(control.plan.mean, want, atol=0.25, rtol=0)


def test_plans_that_are_lost_are_counted_since_the_last_episode():
    begun = {"bad": 0, "seen": 0, "lost": 0}
    assert shares({"bad": 1, "seen": 4, "lost": 0}, begun) == {"not_finite": 0.25, "lost": 0.0}
    mpc = controller(reward=lambda o, a, x: torch.where(o[:, 0] > 1, torch.nan, x[:, 0]))
    mpc.begin(1)
    mpc(torch.zeros(1, 1))
    before = dict(mpc.counts)
    mpc(torch.full((1, 1), 9.0))
    assert shares(mpc.counts, before) == {"not_finite": 1.0, "lost": 1.0}


# ---------------------------------------------------------------- episodes


def test_an_episode_rescales_actions_and_keeps_what_happened(monkeypatch):
    seen = []
    env = LineEnv(low=-1.0, high=3.0)
    plain = env.step
    monkeypatch.setattr(env, "step", lambda a: (seen.append(float(a[0])), plain(a))[1])
    e = episode(env, lambda obs: torch.full((1, 1), 0.5), seed=3)
    assert seen == [2.0] * 8
    assert e.obs.shape == (9, 1)
    assert e.act.flatten().tolist() == [0.5] * 8
    assert not e.terminal
    np.testing.assert_allclose(e.total, -(e.obs[1:] ** 2).sum(), rtol=1e-6)


def test_gathered_never_pairs_across_an_end():
    one = Episode(torch.arange(4.0)[:, None], torch.zeros(3, 1), torch.ones(3), True)
    two = Episode(10 + torch.arange(3.0)[:, None], torch.zeros(2, 1), torch.ones(2), False)
    data = gathered([one, two], World(LineEnv(low=-1.0, high=3.0)))
    assert data.obs.flatten().tolist() == [0, 1, 2, 10, 11]
    assert data.next_obs.flatten().tolist() == [1, 2, 3, 11, 12]
    assert data.terminal.tolist() == [False, False, True, False, False]
    assert data.starts.tolist() == [0, 3, 5]
    assert data.paired.all()
    assert (data.act_low.tolist(), data.act_high.tolist()) == ([-1.0], [3.0])


@pytest.mark.parametrize("what", ["obs", "reward"])
def test_an_environment_that_is_not_finite_is_named(what):
    env = LineEnv()
    env.spoil = {3: what}
    with pytest.raises(ValueError, match="environment: step 3 returned"):
        episode(env, lambda obs: torch.zeros(1, 1), seed=0)


def test_an_episode_that_has_no_end_is_an_error(monkeypatch):
    monkeypatch.setattr("mbrl.mpc.ENDLESS", 12)
    env = LineEnv(length=10**9)
    still = lambda obs: torch.zeros(1, 1)
    with pytest.raises(
        ValueError, match=r"an episode took 12 steps and .* no limit; wrap .*TimeLimit, or .*max_episode"
    ):
        episode(env, still, seed=0)
    assert len(episode(env, still, seed=0, steps=20).act) == 20
    assert len(episode(LineEnv(length=12), still, seed=0).act) == 12
    env = gym.wrappers.TimeLimit(gym.make("Pendulum-v1").unwrapped, 25)
    assert len(episode(env, still, seed=0).act) == 25


def test_an_episode_tells_how_far_it_is():
    said = []
    env = gym.wrappers.TimeLimit(gym.make("Pendulum-v1").unwrapped, 4)
    still = lambda obs: torch.zeros(1, 1)
    e = episode(env, still, seed=0, told=lambda *x: said.append(x))
    assert [x[:2] for x in said] == [(1, 4), (2, 4), (3, 4)]
    assert said[-1][2] == pytest.approx(e.reward[:3].sum().item())
    episode(env, still, seed=0, steps=2, told=lambda *x: said.append(x))
    assert said[-1][:2] == (1, 2)


def test_actions_of_another_width_are_not_broadcast():
    world = World(LineEnv())
    world.reset(0)
    with pytest.raises(ValueError, match=r"step 1: got an action of shape \(2,\), expected \(1,\)"):
        world.step(np.zeros(2, np.float32))


# ---------------------------------------------------------------- PETS

FIT = FitConfig(batch=32, holdout=0.2, max_epochs=30, patience=30, lr=3e-3)
LEARNER = EnsembleConfig(members=3, elites=2, hidden=(32, 32), weight_decay=(0.0, 0.0, 0.0), uncertainty=())
PETS = PetsConfig(planner=SMALL, worth=Worth(particles=2), random=2, episodes=3, fitting=FIT)


def test_pets_learns_the_line():
    env = LineEnv(length=25)
    well = replace(FIT, max_epochs=300, patience=300)
    result = pets(replace(PETS, episodes=4, fitting=well), env, LEARNER, seed=0)
    returns = [r for _, r in result.returns]
    best = []
    for i in range(6):
        x, total = np.random.default_rng(episode_seed(0, i)).uniform(-1, 1), 0.0
        for _ in range(25):
            x = 0.9 * x + 0.5 * np.clip(-1.8 * x, -1, 1)
            total -= x**2
        best.append(total)
    assert np.mean(returns[-2:]) > np.mean(best[-2:]) - 0.3
    assert np.mean(returns[:2]) < np.mean(best[:2]) - 1
    assert [n for n, _ in result.returns] == [25 * (i + 1) for i in range(6)]
    assert len(result.data) == 150


def test_pets_refits_its_learner_from_where_it_stands_and_plans_as_it_is_told(monkeypatch):
    begun, inner = [], mpc_module.fit
    watched = lambda model, *rest: (begun.append(model.net.weights[0].clone()), inner(model, *rest))[1]
    monkeypatch.setattr(mpc_module, "fit", watched)
    ends = []

    class Noted(Memory):
        def save(self, name, tensors, facts):
            super().save(name, tensors, facts)
            ends.extend(x.clone() for k, x in tensors.items() if k == "model.net.weights.0")

    result = pets(PETS, LineEnv(), LEARNER, seed=0, record=Noted())
    assert len(begun) == len(ends) == 3
    assert torch.equal(begun[0], LEARNER.build(Spec(1, 1), devices.generator(0)).net.weights[0])
    assert all(torch.equal(a, b) for a, b in zip(begun[1:], ends[:-1], strict=True))
    assert result.mpc.worth == PETS.worth
    assert result.mpc.planner == PETS.planner


def test_an_episode_of_lost_plans_is_warned_of():
    worthless = lambda obs, act, after: after[:, 0] * math.nan
    with pytest.warns(UserWarning, match="all 8 plans of episode 3 were lost"):
        pets(replace(PETS, episodes=1), LineEnv(), LEARNER, seed=0, reward=worthless)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((SMALL, LEARNER), "pets: got a Planner for a config, expected a PetsConfig"),
        ((PETS, EnsembleConfig), "got the class EnsembleConfig, expected a learner's config"),
    ],
)
def test_what_is_no_config_is_named(given, message):
    config, dynamics = given
    with pytest.raises(ValueError, match=message):
        pets(config, LineEnv(), dynamics, seed=0)


def test_random_episodes_too_short_for_a_model_are_one_error():
    with pytest.raises(ValueError, match="the 1 random episodes hold 1 transitions, too few for a model; set `random`"):
        pets(replace(PETS, random=1), LineEnv(length=1), LEARNER, seed=0)


def test_runs_of_other_seeds_share_no_episode_and_episodes_no_stream():
    starts, acts = [], []
    for seed in (0, 1):
        data = pets(replace(PETS, random=3, episodes=0), LineEnv(), LEARNER, seed=seed).data
        starts += data.obs[data.starts[:-1], 0].tolist()
        acts += data.act[data.starts[:-1], 0].tolist()
    assert len(set(starts)) == len(set(acts)) == 6


@pytest.mark.parametrize("saves", [1, 3, 5])
def test_pets_resumes_to_the_same_numbers(saves):
    whole = pets(PETS, LineEnv(), LEARNER, seed=1, record=Memory())
    record = Memory(saves=saves)
    with pytest.raises(KeyboardInterrupt):
        pets(PETS, LineEnv(), LEARNER, seed=1, record=record)
    record.left = 10**9
    again = pets(PETS, LineEnv(), LEARNER, seed=1, record=record)
    assert again.returns == whole.returns
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.data.obs, again.data.obs)


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"dynamics": replace(LEARNER, members=4)}, {"config": replace(PETS, worth=Worth())}]
)
def test_pets_refuses_the_record_of_another_run(other):
    """One that does not say whose it is, of before it did, is gone on with."""
    record = Memory(saves=1)
    go = lambda **kw: pets(**{"config": PETS, "env": LineEnv(), "dynamics": LEARNER, "seed": 1, "record": record, **kw})
    with pytest.raises(KeyboardInterrupt):
        go()
    record.left = 10**9
    with pytest.raises(ValueError, match="a run of other settings or seeds; continue that with its own"):
        go(**other)
    assert record.kept["pets"][1].pop("of")
    record.left = 1
    with pytest.raises(KeyboardInterrupt):
        go(**other)
    assert record.kept["pets"][1]["lengths"] == [8, 8]


def test_pets_plans_with_the_tasks_reward_where_it_is_given():
    seen = []
    away = lambda o, a, x: (seen.append(1), x[:, 0])[1]
    result = pets(replace(PETS, episodes=1), LineEnv(), LEARNER, seed=0, record=Memory(), reward=away)
    assert seen
    assert result.data.act[-6:].mean() > 0.8
    with pytest.raises(ValueError, match="random 0"):
        PetsConfig(random=0)


@pytest.mark.parametrize("ends", [True, False])
def test_pets_learns_the_end_where_no_function_tells_it(ends):
    class Short(LineEnv):
        def step(self, action):
            obs, reward, _, truncated, info = super().step(action)
            return obs, reward, abs(self.x) > 0.4, truncated, info

    memory = Memory()
    result = pets(replace(PETS, random=6, episodes=1), Short(), LEARNER, seed=0, record=memory, ends=ends)
    assert result.data.terminal.any()
    assert (result.mpc.terminal is not None) == ends
    again = pets(replace(PETS, random=6, episodes=1), Short(), LEARNER, seed=0, record=memory, ends=ends)
    assert again.returns == result.returns, "which runs no episode"
    head, kept = result.mpc.terminal, again.mpc.terminal
    if ends:
        assert head.state_dict().keys() == kept.state_dict().keys()
        assert all(torch.equal(x, kept.state_dict()[k]) for k, x in head.state_dict().items() if k != "accuracy")
    else:
        assert kept is None


def test_inputs_of_the_step_are_whole(monkeypatch):
    """The model is stepped under the executed action with the noise's mean."""
    model = Line(noise_dim=2)
    seen = []
    step = model.step
    monkeypatch.setattr(model, "step", lambda s, i, c: (seen.append(i), step(s, i, c))[1])
    mpc = controller(model, dt=0.5)
    mpc.begin(1)
    act = mpc(torch.tensor([[0.3]]))
    assert all((x.dt == 0.5).all() for x in seen)
    last: StepInput = seen[-1]
    assert torch.equal(last.act, act)
    assert (last.noise == 0).all()
