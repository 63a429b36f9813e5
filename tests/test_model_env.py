"""Models as environments: what their interfaces promise, and that a rollout in them is the model's own."""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from mbrl_envs.adapters import AdapterError, ModelEnv, ModelVecEnv, ModelVectorEnv
from mbrl_envs.control import TruePendulum, TrueReacher
from mbrl_envs.tasks import task
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_checker import check_env as check_sb3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor
from test_contract import SUBJECTS
from test_mpc import LEARNERS
from torch import Tensor

from mbrl.core import Markov, Prediction, Spec, StepInput
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.filtered import FilterConfig, RewardConfig
from mbrl.dynamics.ode import OdeConfig
from mbrl.rollout import unroll

SAME, NEXT = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


class Counter(Markov):
    """x' = x + a + ctx + noise / 10, reward x'. Beyond 100 it predicts nan; a latent leaf counts its steps."""

    def __init__(self, noise_dim=1):
        super().__init__()
        self.spec, self.noise_dim, self.calls = Spec(1, 1, ctx=1), noise_dim, 0
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def condition(self, ctx):
        return ctx

    def init(self, obs, cond) -> Any:
        return obs, torch.zeros_like(obs)

    def observe(self, state, cond) -> Tensor:
        return state[0]

    def step(self, state, inp, cond) -> Any:
        self.calls += 1
        x = state[0] + inp.act + cond.repeat_interleave(len(inp.act) // len(cond), 0)
        if self.noise_dim:
            x = x + 0.1 * inp.noise
        x = torch.where(x > 100, torch.nan, x)
        return (x, state[1] + 1), Prediction(x, x[:, 0] + self.anchor, {})

    def correct(self, state, obs, alpha, cond) -> Any:
        raise NotImplementedError

    def loss(self, segment, noise) -> Any:
        raise NotImplementedError


def filtered():
    spec = Spec(3, 1)
    inner = EnsembleConfig(members=2, elites=2, hidden=(16, 16), weight_decay=(0, 0, 0)).build(spec, gen())
    return FilterConfig(candidates=3).build(inner, RewardConfig().build(spec, gen(1)))


ONE = torch.zeros(1, 1)
PENDULUM = TruePendulum().starts(50, gen(5))
MODELS = {"pendulum": TruePendulum, "filtered": filtered}


def past(limit):
    return lambda obs, act, after: after[:, 0] > limit


# ---------------------------------------------------------------- the rollout is the model's


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_returns_are_those_of_a_rollout_by_hand(make):
    model, n, length = make(), 4, 12
    env = ModelVecEnv(model, PENDULUM, length, n, seed=7)
    first = env.reset()
    acts = torch.rand(n, length, 1, generator=gen(3)) * 2 - 1
    rewards, seen = [], []
    for t in range(length):
        obs, reward, done, infos = env.step(acts[:, t].numpy())
        rewards.append(reward)
        seen.append([x["terminal_observation"] for x in infos] if t == length - 1 else obs)
    noise = gen(7)
    inputs = (StepInput(acts[:, t], model.draw(n, 1, noise), torch.ones(n, 1)) for t in range(length))
    with torch.no_grad():
        cond = model.condition(torch.zeros(1, 0))
        _, pred = unroll(model, model.init(torch.tensor(first), cond), inputs, cond)
    np.testing.assert_allclose(np.stack(rewards, 1), pred.reward, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.stack(seen, 1), pred.obs, rtol=1e-5, atol=1e-5)
    assert done.all()
    assert env.lost == 0


@pytest.mark.parametrize("name", LEARNERS)
def test_any_learner_is_an_environment(name):
    """Of several systems the first, by default; rewards are the task's."""
    subject = SUBJECTS[name]
    model, spec, n, length = subject.fresh(), subject.spec, 3, 4
    like = {"dtype": torch.float64, "generator": gen(2)}
    starts, acts = torch.randn(20, spec.obs, **like), torch.rand(n, length, spec.act, **like) * 2 - 1
    env = ModelVecEnv(model, starts, length + 1, n, reward=lambda o, a, x: -x.square().sum(1), seed=7)
    first, noise = torch.tensor(env.reset(), dtype=torch.float64), gen(7)
    inputs = [StepInput(acts[:, t], model.draw(n, 1, noise), torch.ones(n, 1).double()) for t in range(length)]
    with torch.no_grad():
        cond = model.condition(model.context(torch.zeros(1, dtype=torch.int64)))
        _, pred = unroll(model, model.init(first, cond), inputs, cond)
    for t in range(length):
        obs, reward, done, _ = env.step(acts[:, t].numpy())
        np.testing.assert_allclose(obs, pred.obs[:, t], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(reward, -pred.obs[:, t].square().sum(1), rtol=1e-4, atol=1e-5)
        assert not done.any()


def test_starts_are_drawn_from_all_and_anew():
    starts = torch.arange(20.0)[:, None]
    env = ModelVectorEnv(Counter(0), starts.numpy(), 1, 50, autoreset=SAME)
    drawn = {float(x) for _ in range(10) for x in env.step(np.zeros((50, 1)))[0][:, 0]} if env.reset() else set()
    assert drawn == set(range(20))
    assert env.reset()[0].tolist() != env.reset()[0].tolist()


def test_reward_and_end_can_be_functions():
    known = task("Reacher-v5")
    assert known is not None
    assert known.reward is not None
    model = TrueReacher()
    reward = lambda obs, act, after: 10 * known.reward(obs, act, after) + obs[:, 0]
    starts = model.starts(3, gen())
    plain, own = (ModelVectorEnv(model, starts, 9, 3, seed=1, reward=f) for f in (None, reward))
    (before, _), _ = plain.reset(seed=1), own.reset(seed=1)
    act = np.full((3, 2), 0.3)
    want, got = plain.step(act), own.step(act)
    np.testing.assert_allclose(got[1], 10 * want[1] + before[:, 0], rtol=1e-5)
    env = ModelVectorEnv(Counter(0), ONE, 9, 2, terminal=past(1.2))
    env.reset()
    flags = [env.step(np.array([[1.0], [0.5]]))[2].tolist() for _ in range(3)]
    assert flags == [[False, False], [True, False], [False, True]]


def test_a_model_that_tells_no_reward_or_is_none_is_refused():
    model = OdeConfig(hidden=(8,)).build(Spec(1, 1))
    with pytest.raises(AdapterError, match="no function tells it, and this NeuralODE has no head for it"):
        ModelVectorEnv(model, ONE, 9, 2)
    ModelVectorEnv(model, ONE, 9, 2, reward=lambda obs, act, after: after[:, 0]).reset()
    with pytest.raises(AdapterError, match="got a OdeConfig, expected a Dynamics"):
        ModelVectorEnv(OdeConfig(), ONE, 9, 2)  # pyright: ignore[reportArgumentType]


def test_contexts_and_steps_of_other_lengths_reach_the_model():
    env = ModelVectorEnv(Counter(0), ONE, 9, 4, ctx=torch.tensor([[1.0], [5.0]]))
    env.reset()
    assert env.step(np.zeros((4, 1)))[0][:, 0].tolist() == [1, 1, 5, 5]
    seen = []

    class Timed(Counter):
        def step(self, state, inp, cond) -> Any:
            seen.append(inp.dt.tolist())
            return super().step(state, inp, cond)

    env = ModelEnv(Timed(0), ONE, 9, dt=0.5)
    env.reset()
    env.step(np.zeros(1))
    assert seen == [[[0.5]]]


def test_actions_are_clipped_and_one_call_serves_all_rows():
    model = Counter(0)
    env = ModelVectorEnv(model, ONE, 9, 3)
    env.reset()
    assert env.step(np.array([[4.0], [-4.0], [0.5]]))[0][:, 0].tolist() == [1, -1, 0.5]
    assert model.calls == 1


# ---------------------------------------------------------------- ends


def test_next_step_ends():
    env = ModelVectorEnv(Counter(0), ONE, 3, 2, terminal=past(1.5))
    assert env.metadata["autoreset_mode"] is NEXT
    env.reset()
    out = [env.step(np.array([[1.0], [0.25]])) for _ in range(5)]
    obs, reward, terminated, truncated = (np.stack([x[i] for x in out], 1) for i in range(4))
    assert obs[..., 0].tolist() == [[1, 2, 0, 1, 2], [0.25, 0.5, 0.75, 0, 0.25]]
    assert reward.tolist() == [[1, 2, 0, 1, 2], [0.25, 0.5, 0.75, 0, 0.25]]
    assert terminated.tolist() == [[False, True, False, False, True], [False] * 5]
    assert truncated.tolist() == [[False] * 5, [False, False, True, False, False]]


def test_same_step_ends():
    env = ModelVectorEnv(Counter(0), ONE, 3, 2, terminal=past(1.5), autoreset=SAME)
    assert env.metadata["autoreset_mode"] is SAME
    env.reset()
    out = [env.step(np.array([[1.0], [0.25]])) for _ in range(4)]
    obs, _, terminated, truncated = (np.stack([x[i] for x in out], 1) for i in range(4))
    assert obs[..., 0].tolist() == [[1, 0, 1, 0], [0.25, 0.5, 0, 0.25]]
    assert terminated[0].tolist() == [False, True, False, True]
    assert truncated[1].tolist() == [False, False, True, False]
    assert "final_obs" not in out[0][4]
    assert out[1][4]["_final_obs"].tolist() == [True, False]
    assert out[1][4]["final_obs"][0].tolist() == [2]
    assert out[2][4]["final_obs"][1].tolist() == [0.75]


def test_an_interface_of_gymnasium_works_on_it():
    """Its own statistics wrapper, in both modes, against episodes whose returns are known."""
    for mode in (SAME, NEXT):
        env = gym.wrappers.vector.RecordEpisodeStatistics(ModelVectorEnv(Counter(0), ONE, 4, 2, autoreset=mode))
        env.reset(seed=0)
        returns = []
        for _ in range(12):
            info = env.step(np.ones((2, 1)))[4]
            info = info.get("final_info", info) if mode is SAME and "episode" not in info else info
            if "episode" in info:
                returns += info["episode"]["r"].tolist()
        assert set(returns) == {10.0}


def test_sb3_ends():
    env = ModelVecEnv(Counter(0), ONE, 3, 2, terminal=past(1.5))
    env.reset()
    out = [env.step(np.array([[1.0], [0.25]])) for _ in range(3)]
    assert np.stack([x[0] for x in out], 1)[..., 0].tolist() == [[1, 0, 1], [0.25, 0.5, 0]]
    assert np.stack([x[2] for x in out], 1).tolist() == [[False, True, False], [False, False, True]]
    assert out[1][3][0]["terminal_observation"].tolist() == [2]
    assert out[2][3][1]["terminal_observation"].tolist() == [0.75]
    assert [[x["TimeLimit.truncated"] for x in o[3]] for o in out] == [[False, False], [False, False], [False, True]]
    assert "terminal_observation" not in out[1][3][1]
    assert out[0][1].dtype == np.float32


def test_what_ends_by_itself_at_the_horizon_is_no_truncation_for_sb3():
    env = ModelVecEnv(Counter(0), ONE, 2, 1, terminal=past(1.5))
    env.reset()
    env.step(np.ones((1, 1)))
    _, _, done, infos = env.step(np.ones((1, 1)))
    assert done[0]
    assert not infos[0]["TimeLimit.truncated"]


def test_a_prediction_that_is_not_finite_truncates_and_is_counted():
    starts = torch.tensor([[99.5]])
    act = np.array([[1.0], [-1.0]])
    env = ModelVectorEnv(Counter(0), starts, 9, 2, autoreset=SAME)
    env.reset()
    obs, reward, terminated, truncated, info = env.step(act)
    assert obs[:, 0].tolist() == [99.5, 98.5]
    assert reward.tolist() == [0, 98.5]
    assert truncated.tolist() == [True, False]
    assert not terminated.any()
    assert info["final_obs"][0].tolist() == [99.5]
    assert info["final_info"]["lost"].tolist() == [True, False]
    assert env.lost == 1
    other = ModelVectorEnv(Counter(0), starts, 9, 2)
    other.reset()
    first = other.step(act)
    assert first[4]["lost"].tolist() == [True, False]
    assert first[0][:, 0].tolist() == [99.5, 98.5]
    other.step(act)  # begins anew: what the model says of the ended row does not count
    assert other.lost == 1
    other.step(act)
    assert other.lost == 2
    vec = ModelVecEnv(Counter(0), starts, 9, 2)
    vec.reset()
    _, reward, done, infos = vec.step(act)
    assert done.tolist() == [True, False]
    assert reward[0] == 0
    assert infos[0]["TimeLimit.truncated"]
    assert infos[0]["lost"]
    assert infos[0]["terminal_observation"].tolist() == [99.5]
    rewarded = ModelVectorEnv(Counter(0), ONE, 9, 1, reward=lambda obs, act, after: after[:, 0] / 0)
    rewarded.reset()
    assert rewarded.step(np.ones((1, 1)))[3].tolist() == [True]


def test_rows_can_be_begun_anew():
    env = ModelVectorEnv(Counter(0), ONE, 3, 2)
    env.reset()
    for _ in range(2):
        env.step(np.ones((2, 1)))
    obs, _ = env.reset(options={"reset_mask": np.array([True, False])})
    assert obs[:, 0].tolist() == [0, 2]
    obs, _, _, truncated, _ = env.step(np.ones((2, 1)))
    assert obs[:, 0].tolist() == [1, 3]
    assert truncated.tolist() == [False, True]
    with pytest.raises(AdapterError, match="reset_mask"):
        env.reset(options={"reset_mask": [0, 1]})
    assert env.reset(options={"reset_mask": [False, True]})[0][:, 0].tolist() == [1, 0]


@pytest.mark.parametrize("mode", [SAME, NEXT])
def test_a_row_that_is_begun_anew_leaves_the_others_their_course(mode):
    starts = torch.randn(40, 1, generator=gen())
    begun, courses = [], []
    for reset in (False, True):
        env = ModelVectorEnv(Counter(), starts, 3, 2, autoreset=mode, seed=3)
        courses.append([env.reset(seed=3)[0][1]])
        for t in range(12):
            for _ in range(3 * reset * (t == 1)):
                begun.append(env.reset(options={"reset_mask": np.array([True, False])})[0][0, 0])
            courses[-1].append(env.step(np.full((2, 1), 0.1))[0][1])
    assert np.array_equal(*courses)
    assert len(set(begun)) == 3, "each time from another start"


def test_a_step_before_the_first_reset_is_refused():
    for env in (ModelVectorEnv(Counter(0), ONE, 3, 1), ModelVecEnv(Counter(0), ONE, 3, 1)):
        with pytest.raises(AdapterError, match="call reset first"):
            env.step(np.ones((1, 1)))
    with pytest.raises(AdapterError, match="reset_mask before any episode has begun; call reset without one first"):
        ModelVectorEnv(Counter(0), ONE, 3, 2).reset(options={"reset_mask": np.array([True, True])})


@pytest.mark.parametrize("mask", [None, np.array([True, True])])
def test_a_reset_after_an_end_is_not_followed_by_another(mask):
    env = ModelVectorEnv(Counter(0), ONE, 1, 2)
    env.reset()
    env.step(np.ones((2, 1)))
    env.reset(options={} if mask is None else {"reset_mask": mask})
    assert env.step(np.ones((2, 1)))[0][:, 0].tolist() == [1, 1]


# ---------------------------------------------------------------- seeds and rows


def course(env, acts, seed=None):
    """Observations of a run, from a reset or as it stands."""
    out = [env.reset(seed=seed)[0]]
    return np.stack(out + [env.step(a)[0] for a in acts])


@pytest.mark.parametrize("mode", [SAME, NEXT])
def test_seeds_repeat(mode):
    acts = np.random.default_rng(0).uniform(-1, 1, (12, 3, 1))
    starts = torch.randn(40, 1, generator=gen())
    make = lambda seed: ModelVectorEnv(Counter(), starts, 5, 3, seed=seed, autoreset=mode)
    env = make(4)
    want = course(env, acts, 11)
    assert np.array_equal(course(env, acts, 11), want)
    assert not np.array_equal(course(env, acts), want)
    assert not np.array_equal(course(env, acts, 12), want)
    assert np.array_equal(course(make(11), acts), want)
    vec = ModelVecEnv(Counter(), starts, 5, 3, seed=4)
    runs = []
    for _ in range(2):
        vec.seed(11)
        runs.append([vec.reset(), *(vec.step(a)[0] for a in acts)])
    assert np.array_equal(*map(np.stack, runs))
    if mode is SAME:
        assert np.array_equal(np.stack(runs[0]), want)


@pytest.mark.parametrize("mode", [SAME, NEXT])
def test_rows_do_not_see_each_other(mode):
    """Row 0 has the same course whatever the others do, ends and diverges."""
    starts = torch.randn(40, 1, generator=gen())
    make = lambda: ModelVectorEnv(Counter(), starts, 5, 3, terminal=past(2.5), autoreset=mode, seed=3)
    acts = np.random.default_rng(0).uniform(-1, 1, (20, 3, 1))
    other = acts.copy()
    other[:, 1:] = 1
    other[8:, 2] = np.nan
    a, b = course(make(), acts), course(make(), other)
    assert np.array_equal(a[:, 0], b[:, 0])
    assert not np.array_equal(a[:, 1], b[:, 1])


def test_what_is_returned_is_a_copy():
    env = ModelEnv(Counter(0), ONE, 9)
    env.reset()[0][:] = 7
    obs = env.step(np.ones(1))[0]
    assert obs.tolist() == [1]
    obs[:] = 7
    assert env.step(np.ones(1))[0].tolist() == [2]


# ---------------------------------------------------------------- checkers and agents


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_checkers_pass(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(infinity|unbounded|EnvSpec|spec).*")
        check_env(ModelEnv(make(), PENDULUM, 20), skip_render_check=True)
        check_sb3(ModelEnv(make(), PENDULUM, 20))


PPO_KW = {"n_steps": 32, "batch_size": 32, "n_epochs": 1}
SAC_KW = {"learning_starts": 20, "batch_size": 16, "train_freq": 8, "gradient_steps": 2}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("agent", "kw"), [(PPO, PPO_KW), (SAC, SAC_KW)], ids=["PPO", "SAC"])
def test_an_agent_trains_in_it(agent, kw, make):
    env = VecMonitor(ModelVecEnv(make(), PENDULUM, 25, 4))
    learner = agent("MlpPolicy", env, seed=0, device="cpu", policy_kwargs={"net_arch": [16]}, **kw)
    before = [p.clone() for p in learner.policy.parameters()]
    learner.learn(300)
    assert learner.num_timesteps >= 300
    assert {x["l"] for x in learner.ep_info_buffer} == {25}
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))
    assert all(p.isfinite().all() for p in learner.policy.parameters())


def test_a_policy_earns_in_the_model_what_it_earns_in_the_world():
    policy = PPO("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
    real: Any = gym.make("Pendulum-v1", max_episode_steps=40)
    first = torch.tensor(real.reset(seed=3)[0])[None]
    obs, want = first[0].numpy(), 0.0
    for _ in range(40):
        act, _ = policy.predict(obs, deterministic=True)
        obs, reward, *_ = real.step(act)
        want += reward

    class Halved:
        """The agent's actions are torques, the model's shares of the largest."""

        def predict(self, obs, **kw):
            act, state = policy.predict(obs, **kw)
            return act / 2, state

    env = ModelVecEnv(TruePendulum(), first, 40, 2)
    got, _ = evaluate_policy(Halved(), VecMonitor(env), 2)  # type: ignore[arg-type]
    assert got == pytest.approx(want, rel=1e-4)


def test_other_methods_of_a_vec_env():
    env = ModelVecEnv(Counter(0), ONE, 3, 3)
    assert env.get_attr("render_mode", [0, 2]) == [None, None]
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 3
    assert not env.has_attr("action_masks")
    env.set_attr("note", 5)
    assert env.get_attr("note", 1) == [5]
    with pytest.raises(AttributeError, match="'reset' of a single one"):
        env.env_method("reset")
    env.close()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"starts": torch.zeros(0, 1)}, r"got starts \[0, 1\], expected \[N, 1\]"),
        ({"starts": torch.zeros(4, 3)}, r"got starts \[4, 3\], expected \[N, 1\]"),
        ({"starts": torch.tensor([[torch.nan]])}, "1, expected none"),
        ({"horizon": 0}, "horizon 0, expected at least 1"),
        ({"num_envs": 0}, "num_envs 0"),
        ({"ctx": torch.zeros(3, 1)}, "divides the 4"),
        ({"ctx": torch.zeros(1, 2)}, r"ctx \[1, 2\]"),
        ({"dt": 0.0}, "dt 0"),
        ({"reward": lambda obs, act, after: after}, r"reward: .* shape \[2, 1\], expected a tensor of shape \[2\]"),
        ({"terminal": lambda obs, act, after: after[:, 0]}, "terminal: .*float32 .* expected a bool tensor"),
        ({"autoreset": AutoresetMode.DISABLED}, "expected NEXT_STEP or SAME_STEP"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    kw: dict[str, Any] = {"starts": torch.zeros(4, 1), "horizon": 5, "num_envs": 4} | change
    with pytest.raises(AdapterError, match=match):
        ModelVectorEnv(Counter(), **kw)


def test_actions_of_another_width_are_refused():
    env = ModelVectorEnv(Counter(), ONE, 5, 2)
    env.reset()
    with pytest.raises(AdapterError, match=r"got actions \[2, 3\], expected \[2, 1\]"):
        env.step(np.zeros((2, 3)))
