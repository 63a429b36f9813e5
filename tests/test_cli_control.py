"""`mbrl plan` and `mbrl online` on small settings: what they leave behind, resuming, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from mbrl_envs import evaluate as worlds
from stable_baselines3 import SAC

from mbrl import cli, cli_control, cli_evaluate, cli_offline, cli_plan, mpc, offline
from mbrl.border import World
from mbrl.core import Spec, StepInput
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.fit import FitConfig
from mbrl.planner import ICEM, LOOP, OVER, Over, Planner, Worth
from mbrl.run import Run, RunError, to_plain
from mbrl.sac import SacConfig

PLAN = ["plan", "--env", "Pendulum-v1", "--seed", "0", "--threads", "1", "--quiet", "--worth.particles", "2"]
SEARCH = ["planner:icem", "--planner.horizon", "4", "--planner.samples", "12", "--planner.elites", "4"]
LEARNER = ["dynamics:single", "--dynamics.hidden", "16", "--dynamics.weight-decay", "0.0", "0.0"]


def plan(*options):
    learns, certain = "--model" not in options, "true" in options
    cli.main(
        [
            *PLAN[: -2 if certain else None],
            *["--fitting.max-epochs", "3"] * learns,
            *options,
            *SEARCH,
            *LEARNER * learns,
        ]
    )


class Edge(gym.Env):
    """A point that a step moves by a tenth, on a strip that ends at 0.5 on either side. No task is known of it."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.4, 0.4, 1)
        return self.x.astype(np.float32), {}

    def step(self, act):
        self.x = self.x + 0.1 * act
        return self.x.astype(np.float32), float(1 - abs(self.x[0])), bool(abs(self.x[0]) > 0.5), False, {}


class Parts(Edge):
    """The same with observations in parts, the place and its half."""

    observation_space = gym.spaces.Dict([("x", Edge.observation_space), ("half", Edge.observation_space)])

    def reset(self, **kw):
        obs, told = super().reset(**kw)
        return {"x": obs, "half": obs / 2}, told


class Wide(Edge):
    """The same, with actions of twice the range."""

    action_space = gym.spaces.Box(-2, 2, (1,))


gym.register("Wide-v0", f"{__name__}:Wide", max_episode_steps=25, disable_env_checker=True)
gym.register("Edge-v0", f"{__name__}:Edge", max_episode_steps=25, disable_env_checker=True)
gym.register("Parts-v0", f"{__name__}:Parts", max_episode_steps=25, disable_env_checker=True)
OPENED = cli_control.opened


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Episodes of 25 steps."""
    make = cli_control.opened
    for module in (cli_control, cli_plan):
        monkeypatch.setattr(module, "opened", lambda env, **kw: gym.wrappers.TimeLimit(make(env, **kw).unwrapped, 25))


def test_observations_in_parts_are_driven_as_policies_are_shown_them():
    env, judge = OPENED("Parts-v0"), worlds.evaluator("Parts-v0")
    obs = env.reset(seed=3)[0]
    shown = worlds.flatten_obs(judge.open()[0].observation_space, judge.envs[0].reset(seed=3)[0])
    np.testing.assert_array_equal(World(env).reset(3), shown)
    np.testing.assert_array_equal(obs, shown)
    assert shown.shape == (2,)


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ("Edge-v0", "Edge-v0"),
        (f"{__name__}:Edge-v0", f"{__name__}_Edge-v0"),
        ('Edge-v0{"max_episode_steps": 9}', "Edge-v0_max_episode_steps_9"),
        ("mbrl_envs/CartPoleSwingUp-v0", "mbrl_envs_CartPoleSwingUp-v0"),
    ],
)
def test_a_folder_is_named_by_what_shells_and_file_systems_take(env, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, args = cli_control.begin(cli_plan.Plan(env=env, seed=1), cli_plan.Plan, "plan", lambda *_: None)
    run.close()
    assert (run.folder, args.env) == (Path("runs") / folder / "plan-1", env)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_plan_learns_leaves_a_run_and_its_model_serves_again(tmp_path, capsys):
    plan("--episodes", "2", "--out", str(tmp_path / "a"))
    got = result(tmp_path / "a")
    assert [n for n, _ in got["returns"]] == [25, 50, 75]
    assert got["last10"] == pytest.approx(np.mean([r for _, r in got["returns"][1:]]))
    assert (tmp_path / "a/report.png").stat().st_size > 5000
    stages = {x["stage"] for x in Run.open(tmp_path / "a").metrics()}
    assert {"model", "episode"} <= stages
    plan("--episodes", "1", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"))
    assert len(result(tmp_path / "b")["returns"]) == 1
    with pytest.raises(SystemExit):
        plan("--episodes", "1", "--model", str(tmp_path / "a"), "--worth.pessimism", "1", "--out", str(tmp_path / "c"))
    assert "all are alike under a Single without noise or parts" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        cli.main(["plan", "--env", "InvertedPendulum-v5", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "c")])
    assert refused.value.code == 2
    assert "its model is of Pendulum-v1; InvertedPendulum-v5 has 4 observations" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_file_of_settings_names_the_learner_to_fit(tmp_path, capsys):
    """A run's config.json, or the settings alone: the same run as by name."""
    plan("--episodes", "1", "--out", str(tmp_path / "a"))
    want = result(tmp_path / "a")["returns"]
    own = json.loads((tmp_path / "a/config.json").read_text())["arguments"]["dynamics"]
    (tmp_path / "own.json").write_text(json.dumps(own))
    named = lambda file, out, *more: cli.main(
        [*PLAN, "--fitting.max-epochs", "3", "--episodes", "1", "--model", str(file), "--out", str(out), *SEARCH, *more]
    )
    (tmp_path / "arguments.json").write_text(json.dumps({"_type": "Plan", "model": None, "dynamics": own}))
    for i, file in enumerate((tmp_path / "a/config.json", tmp_path / "own.json", tmp_path / "arguments.json")):
        out = tmp_path / f"b{i}"
        named(file, out)
        assert result(out)["returns"] == want
        held = json.loads((out / "config.json").read_text())["arguments"]
        assert (held["model"], held["dynamics"]) == (None, own), "a resumed run needs no file"
    agent = {"_type": "SacConfig"}
    for held, word in (
        ("{", "is no JSON"), ("[1]", "names no learner"), (json.dumps({"dynamics": agent}), "names no learner"),
        ('{"_type": "Other"}', "names no learner"), ('{"_type": ["x"]}', "names no learner"),
        ('{"arguments": [1]}', "names no learner"),
        (json.dumps({"arguments": {"_type": "Plan", "model": "runs/x", "dynamics": own}}), "but took runs/x"),
        (json.dumps(own | {"hidden": "x"}), "hidden is 'x'"),
        (json.dumps(own | {"bound": -1.0, "weight_decay": [0.1]}), "weight_decay has 1 values"),
    ):  # fmt: skip
        (tmp_path / "bad.json").write_text(held)
        with pytest.raises(SystemExit):
            named(tmp_path / "bad.json", tmp_path / "c")
        assert word in capsys.readouterr().err
    with pytest.raises(SystemExit):
        named(tmp_path / "own.json", tmp_path / "c", *LEARNER)
    assert "beside a learner with its settings" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_plan_resumes_to_the_same_numbers(tmp_path, monkeypatch, capsys):
    plan("--episodes", "3", "--out", str(tmp_path / "whole"))
    real, count = mpc.episode, []

    def stopping(*args, **kw):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(*args, **kw)

    filmed = []
    monkeypatch.setattr("mbrl_envs.evaluate.video", lambda act, env, path, **kw: (filmed.append((path, kw)), 0.0)[1])
    monkeypatch.setattr(mpc, "episode", stopping)
    with pytest.raises(SystemExit) as stopped:
        plan("--episodes", "3", "--out", str(tmp_path / "cut"), "--video", str(tmp_path / "v.gif"))
    assert stopped.value.code == 130
    assert "mbrl plan --resume" in capsys.readouterr().out
    cli.main(["plan", "--resume", str(tmp_path / "cut"), "--quiet"])
    assert result(tmp_path / "cut")["returns"] == result(tmp_path / "whole")["returns"]
    *frames, (path, rest) = filmed
    assert [kw["max_steps"] for _, kw in frames] == [0, 0], "before it begins, and before it goes on"
    assert (path, rest) == (tmp_path / "v.gif", {})
    with pytest.raises(SystemExit):
        cli.main(["plan", "--resume", str(tmp_path / "whole"), "--video", str(tmp_path / "w.gif")])
    said = capsys.readouterr().err
    assert f"has finished; `mbrl plan --model {tmp_path / 'whole'} --env Pendulum-v1" in said
    assert f"--video {tmp_path / 'w.gif'}` films its model" in said


def test_driving_resumes_to_the_same_numbers_and_no_episode_is_another_again(tmp_path, monkeypatch):
    """With a model that is there: each episode has its own start and its own stream, whenever it is driven."""
    true = ["--model", "true", "--episodes", "3"]
    plan(*true, "--out", str(tmp_path / "whole"))
    real, seeds = mpc.episode, []

    def stopping(env, act, seed, *args, **kw):
        seeds.append(seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return real(env, act, seed, *args, **kw)

    monkeypatch.setattr(mpc, "episode", stopping)
    with pytest.raises(SystemExit):
        plan(*true, "--out", str(tmp_path / "cut"))
    monkeypatch.setattr(mpc, "episode", real)
    cli.main(["plan", "--resume", str(tmp_path / "cut"), "--quiet"])
    assert result(tmp_path / "cut")["returns"] == result(tmp_path / "whole")["returns"]
    assert seeds[0] != seeds[1]
    lines, again = (Run.open(tmp_path / x).metrics() for x in ("whole", "cut"))
    assert lines == again
    assert [(x["not_finite"], x["lost"]) for x in lines] == [(0.0, 0.0)] * 3


def test_a_plan_goes_on_with_the_same_model_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan("--episodes", "1", "--out", "runs/a")
    with_it = ["--model", "runs/a", "--episodes", "2"]
    plan(*with_it, "--out", "whole")
    real, count = mpc.episode, []

    def stopping(*args, **kw):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return real(*args, **kw)

    monkeypatch.setattr(mpc, "episode", stopping)
    with pytest.raises(SystemExit):
        plan(*with_it, "--out", "cut")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli.main(["plan", "--resume", str(tmp_path / "cut"), "--quiet"])
    whole, cut = (result(tmp_path / x) for x in ("whole", "cut"))
    assert (cut["returns"], cut["model"]) == (whole["returns"], "runs/a")


def test_a_plan_in_the_truth_is_filmed_where_it_is_valued(tmp_path, monkeypatch):
    """In the environment whose simulator it is, from a new plan; another one would go another way."""
    shown = []

    def video(act, env, path):
        obs, _ = env.reset(seed=0)
        env.step(np.asarray(act(torch.as_tensor(obs[None], dtype=torch.float32))[0]))
        shown.append((env.render_mode, env.unwrapped))
        return 0.0

    begun, given = [], cli_plan._given
    keep = lambda *a: (begun.append(given(*a)), begun[-1])[1]
    monkeypatch.setattr(cli_plan, "_given", keep)
    monkeypatch.setattr("mbrl_envs.evaluate.video", video)
    monkeypatch.setattr(cli_plan, "check_drawn", lambda *_: None)
    cli.main(["plan", "--env", "InvertedPendulum-v5", "--seed", "0", "--model", "true", "--episodes", "1", "--quiet",
              "--threads", "1", "--out", str(tmp_path / "t"), "--video", str(tmp_path / "x.gif"), "planner:icem",
              "--planner.horizon", "5"])  # fmt: skip
    ((mode, env),) = shown
    assert mode == "rgb_array"
    simulator = begun[-1].value.__closure__
    assert any(getattr(c.cell_contents, "envs", [None])[0] is env for c in simulator)
    assert any(getattr(c.cell_contents, "threads", 0) == 1 for c in simulator)


def test_each_driven_episode_has_a_stream_of_its_own(tmp_path, monkeypatch):
    drawn = []

    def noting(env, act, seed, *args, **kw):
        drawn.append(torch.rand(3, generator=act.__closure__[0].cell_contents.generator).tolist())
        return real(env, act, seed, *args, **kw)

    real = mpc.episode
    monkeypatch.setattr(mpc, "episode", noting)
    plan("--model", "true", "--episodes", "2", "--out", str(tmp_path / "x"))
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("env", ["Pendulum-v1", "InvertedPendulum-v5"])
@pytest.mark.parametrize("worth", [Worth(particles=5, pessimism=2.0), Worth(limit=1.0)])
def test_the_truth_is_not_uncertain(env, worth):
    with pytest.raises(ValueError, match="the true simulator is not uncertain; leave both out"):
        cli_plan.truth(env, cli_control.opened(env), ICEM, worth, 0)


def test_the_truth_is_known_by_whatever_name(monkeypatch):
    """However long episodes are, and at any gravity of the pendulum's, whose steps it then takes."""
    pole, cut = 'Pendulum-v1{"g": 1.6, "max_episode_steps": 50}', "mbrl_envs/CartPoleSwingUp-v0"
    env = gym.make("Pendulum-v1", g=1.6)
    obs, _ = env.reset(seed=3)
    told = cli_plan.truth(pole, cli_control.opened(pole), ICEM, Worth(), 0).model
    inp = StepInput(torch.tensor([[0.25]]), torch.zeros(1, 0), torch.ones(1, 1))
    after = told.step(torch.as_tensor(obs)[None], inp, ())[0]
    np.testing.assert_allclose(after[0], env.step(np.array([0.5], np.float32))[0], atol=1e-6)
    own, its = (
        cli_plan.truth(x, cli_control.opened(cut), ICEM, Worth(), 0) for x in (cut, f'{cut}{{"max_episode_steps": 9}}')
    )
    assert type(own.model) is type(its.model)
    assert None not in (own.terminal, its.terminal)


def test_the_truth_is_told_the_discount_and_the_end(monkeypatch):
    env = cli_control.opened("InvertedPendulum-v5")
    env.reset(seed=0)
    seen = []
    note = lambda self, acts, discount: (seen.append(discount), torch.zeros(len(acts)))[1]
    monkeypatch.setattr("mbrl_envs.simulator.Simulator.value", note)
    worth = Worth(discount=0.9)
    cli_plan.truth("InvertedPendulum-v5", env, ICEM, worth, 0)(torch.zeros(1, 4))
    assert set(seen) == {0.9}
    cart = cli_control.opened("mbrl_envs/CartPoleSwingUp-v0")
    control = cli_plan.truth("mbrl_envs/CartPoleSwingUp-v0", cart, ICEM, worth, 0)
    at = lambda x: torch.tensor([[x, 0.0, 1.0, 0.0, 0.0]])
    assert control.terminal(at(0.0), torch.zeros(1, 1), at(3.0)).tolist() == [True]
    assert control.worth.discount == 0.9


@pytest.mark.parametrize("env", ["Pendulum-v1", "InvertedPendulum-v5"])
def test_the_true_model_is_the_upper_bound(tmp_path, env):
    """In the truth itself a planner holds what a random policy cannot."""
    torch.manual_seed(0)
    cli.main(["plan", "--env", env, "--seed", "0", "--model", "true", "--episodes", "1", "--quiet", "--threads", "1",
              "--out", str(tmp_path / "t"), "planner:icem", "--planner.horizon", "12"])  # fmt: skip
    got = result(tmp_path / "t")["returns"][0][1]
    made = gym.wrappers.TimeLimit(gym.make(env).unwrapped, 25)
    chance = mpc.episode(made, lambda obs: 2 * torch.rand(1, 1) - 1, 0).total
    assert got > chance
    if env.startswith("Inverted"):
        assert got == 25


def test_a_limit_is_read_whatever_the_ensemble_was_to_report(tmp_path):
    """Its weights do not depend on it: neither while they are learned nor afterwards need anything be named."""
    small = EnsembleConfig(members=3, elites=2, hidden=(8,), weight_decay=(0.0, 0.0), uncertainty=())
    worth = Worth(particles=2, pinned=False, limit=1e-3)
    search, fitting = Planner(horizon=2, samples=8, iterations=1, elites=2), FitConfig(batch=8, max_epochs=2)
    args = cli_plan.Plan(
        env="Pendulum-v1", seed=0, episodes=1, worth=worth, planner=search, fitting=fitting, dynamics=small, quiet=True
    )
    assert len(result(cli_plan.run_plan(replace(args, out=tmp_path / "limited")).folder)["returns"]) == 2
    free = cli_plan.run_plan(replace(args, out=tmp_path / "free", worth=Worth(particles=2)))
    again = replace(args, model=str(free.folder), fitting=cli_plan.Plan().fitting, dynamics=cli_plan.Plan().dynamics)
    cli_plan.run_plan(replace(again, out=tmp_path / "again"))
    control = cli_plan._given(again, cli_control.opened("Pendulum-v1"), None, None, torch.device("cpu"))
    assert control.model.uncertainty == ("disagreement",)
    assert control.worth == worth


def test_what_is_asked_otherwise_of_planning_over_a_policy_holds():
    agent = SacConfig(hidden=(8,)).build(Spec(3, 1), torch.Generator().manual_seed(0), seeds=2)
    small = EnsembleConfig(members=3, elites=2, hidden=(8,), weight_decay=(0.0, 0.0), uncertainty=())
    models = [small.build(Spec(3, 1)) for _ in range(2)]
    of = lambda **kw: cli_offline.controllers_over(
        agent, models, (4, 5), cli_evaluate.Evaluate(Path("x"), plan=True, **kw)
    )
    usual = of()
    assert [x.planner for x in usual] == [LOOP, LOOP]
    assert usual[0].worth == Worth(discount=0.99, particles=5, pessimism=1.0)
    one, other = of(over=Over(horizon=2, pessimism=0.5, limit=1.0))
    assert one.planner == other.planner == replace(LOOP, horizon=2)
    assert one.worth == Worth(discount=0.99, particles=5, pessimism=0.5, limit=1.0, pinned=False)
    assert one.model.uncertainty == ("disagreement",)
    assert of(plan_by="tdmpc", over=Over(horizon=2))[0].planner == replace(OVER["tdmpc"], horizon=2)
    with pytest.raises(ValueError, match=r"--over.pessimism 1.0: .* there is one"):
        of(over=Over(pessimism=1.0, particles=1))


@pytest.mark.parametrize(("limit", "warned"), [(None, True), (200, False)])
def test_an_environment_without_a_limit_is_warned_of(limit, warned, capsys):
    env = cli_control.opened("Pendulum-v1")
    assert env.spec is not None
    env.spec.max_episode_steps = limit
    cli_control._check_online(cli_control.Online(env="Pendulum-v1", seeds=(0,)), env)
    assert ("states no limit of its episodes" in capsys.readouterr().out.replace("\n", " ")) is warned


def test_the_last_evaluations_are_as_many_as_there_are():
    words = [cli_control.last_words(n) for n in (1, 2, 10, 40)]
    assert words[0] == "last-10: the only evaluation"
    assert words[1:] == [f"last-10: mean over the last {n} evaluations" for n in (2, 10, 10)]


def test_online_leaves_a_run(tmp_path):
    cli.main(["online", "--env", "InvertedPendulum-v5", "--steps", "120", "--quiet", "--threads", "1",
              "--episodes", "1", "--out", str(tmp_path / "o"), "--setting.random", "60", "--setting.refit-every", "30",
              "--setting.rollouts", "50", "--setting.updates", "1", "--setting.evaluate-every", "60",
              "--setting.agent.hidden", "16", "--fitting.max-epochs", "2", "dynamics:single", "--dynamics.hidden",
              "16", "--dynamics.weight-decay", "0.0", "0.0"])  # fmt: skip
    got = result(tmp_path / "o")
    assert len(got["seeds"]) == 1, "one is drawn"
    assert {"fit", "rollout", "update", "environment"} <= set(got["seconds"])
    assert [n for n, _ in got["returns"]] == [60, 120]
    assert got["final"] == [pytest.approx(np.mean(got["returns"][-1][1]))]
    with pytest.raises(SystemExit) as refused:
        cli.main(["online", "--resume", str(tmp_path / "o")])
    assert refused.value.code == 2


def test_online_evaluates_from_seeds_that_every_environment_takes(tmp_path, monkeypatch):
    seen = []

    def stop(*_, evaluate, **__):
        seen.extend(judge.seed for judge in evaluate)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_control.online, "train_together", stop)
    with pytest.raises(SystemExit):
        cli.main(
            ["online", "--env", "Edge-v0", "--seeds", "3", str(2**31 - 1), "--quiet", "--out", str(tmp_path / "o")]
        )
    assert seen == [13_000, 9_000]


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """An online run of two seeds in a world whose end is learned."""
    out = tmp_path_factory.mktemp("online") / "o"
    cli.main(["online", "--env", "Edge-v0", "--seeds", "3", "1", "--steps", "100", "--quiet", "--threads", "1",
              "--episodes", "2", "--out", str(out), "--setting.random", "60", "--setting.refit-every", "40",
              "--setting.rollouts", "50", "--setting.updates", "1", "--setting.evaluate-every", "50",
              "--setting.agent.hidden", "16", "--fitting.max-epochs", "2", "dynamics:single", "--dynamics.hidden",
              "16", "--dynamics.weight-decay", "0.0", "0.0"])  # fmt: skip
    return out


def test_online_learns_several_seeds_side_by_side(met):
    """The command is `train_together`, and each of its evaluations is of that seed's policy."""
    got = result(met)
    assert got["seeds"] == [3, 1]
    assert len(got["episodes"]) == len(got["probes"]) == 2
    assert got["episodes"][0] != got["episodes"][1]
    logged = [x for x in Run.open(met).metrics() if x["stage"] == "episode"]
    for seed, episodes in zip((3, 1), got["episodes"], strict=True):
        assert [[x["step"], x["return"]] for x in logged if x["seed"] == seed] == episodes
    assert [(n, np.shape(r)) for n, r in got["returns"]] == [(50, (2, 2)), (100, (2, 2))]
    agent, _ = cli_evaluate.load_agent(Run.open(met))
    for s, seed in enumerate((3, 1)):
        judge = worlds.evaluator("Edge-v0", episodes=2, seed=10_000 + 1_000 * seed)
        assert [float(x) for x in judge(offline.policy_of(agent, s))] == got["returns"][-1][1][s]
        assert got["final"][s] == pytest.approx(np.mean(got["returns"][-1][1][s]))
        assert got["last10"][s] == pytest.approx(np.mean([r[s] for _, r in got["returns"]]))
    with pytest.raises(SystemExit) as refused:
        cli.main(["online", "--env", "Edge-v0", "--seeds", "2", "2"])
    assert refused.value.code == 2


def test_an_online_policy_is_evaluated_and_exported(met, tmp_path, capsys):
    """In the world it has learned in, for each of its seeds."""
    cli.main(["eval", str(met), "--episodes", "3", "--seed", "7", "--export", str(tmp_path / "p.zip")])
    out = capsys.readouterr().out
    assert "Edge-v0, 3 episodes" in out
    assert "checkpoint of seed 3: " in out
    found = cli_evaluate.run_evaluate(cli_evaluate.Evaluate(met, episodes=3, seed=7))
    agent, source = cli_evaluate.load_agent(Run.open(met))
    judge = worlds.evaluator("Edge-v0", episodes=3, seed=7)
    assert found == [[float(x) for x in judge(offline.policy_of(agent, s))] for s in range(2)]
    assert found[0] != found[1]
    assert source == "Edge-v0"
    obs = torch.rand(5, 1)
    theirs = SAC.load(tmp_path / "p.zip").predict(obs.numpy(), deterministic=True)[0]
    torch.testing.assert_close(offline.policy_of(agent)(obs), torch.from_numpy(theirs), atol=1e-5, rtol=0)


def test_over_an_online_policy_is_planned_in_its_own_model(met, monkeypatch):
    """And under the termination that each seed has learned."""
    given, real = [], mpc.over
    monkeypatch.setattr(mpc, "over", lambda *args, **kw: (given.append((*args, kw)), real(*args, **kw))[1])
    monkeypatch.setattr(mpc.Mpc, "__call__", lambda self, obs: torch.zeros(len(obs), 1))
    run = Run.open(met)
    cli_evaluate.run_evaluate(cli_evaluate.Evaluate(met, episodes=1, plan=True))
    assert len(given) == 2
    for s, (_, which, model, kw) in enumerate(given):
        assert which == s
        for name, module in ((f"model{s}", model), (f"terminal{s}", kw["terminal"])):
            kept, _ = run.load(name) or pytest.fail(name)
            state = module.state_dict()
            assert kept.keys() == state.keys()
            assert all(torch.equal(kept[k].nan_to_num(), v.cpu().nan_to_num()) for k, v in state.items())
        assert kw["terminal"].endings > 0
        assert kw["reward"] is None
    one, other = (model.state_dict() for _, _, model, _ in given)
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_over_an_online_policy_is_planned_only_where_actions_mean_what_they_did(met):
    with pytest.raises(RunError, match=r"span \[-1\.0\] to \[1\.0\], those of Wide-v0 \[-2\.0\] to \[2\.0\]"):
        cli_evaluate.run_evaluate(cli_evaluate.Evaluate(met, episodes=1, env="Wide-v0", plan=True))


def test_an_online_runs_model_serves_to_plan_with(met, tmp_path, monkeypatch, capsys):
    """The first seed's, under the termination that it has learned; in another range of actions it is refused."""
    args = cli_plan.Plan(env="Edge-v0", seed=0, model=str(met))
    run, env = Run.open(met), cli_control.opened("Edge-v0")
    mpc = cli_plan._given(args, env, None, None, torch.device("cpu"))
    for name, module in (("model0", mpc.model), ("terminal0", mpc.terminal)):
        assert all(
            torch.equal(v.nan_to_num(), module.state_dict()[k].nan_to_num()) for k, v in run.load(name)[0].items()
        )
    cli.main(["plan", "--env", "Edge-v0", "--model", str(met), "--episodes", "1", "--reward", "learned", "--seed", "0",
              "--out", str(tmp_path / "p"), "planner:icem", "--planner.horizon", "4"])  # fmt: skip
    assert len(result(tmp_path / "p")["returns"]) == 1
    note = "note: no reward function is known for Edge-v0; the learner's head tells it"
    assert note not in capsys.readouterr().out
    said = []
    monkeypatch.setattr(Run, "progress", lambda self, stage, step, of, figures: said.append((stage, step, of)))
    cli.main(["plan", "--env", "Edge-v0", "--model", str(met), "--episodes", "1", "--seed", "0",
              "--out", str(tmp_path / "q"), "planner:icem", "--planner.horizon", "4"])  # fmt: skip
    assert note in capsys.readouterr().out
    assert said[:2] == [("step", 1, 25), ("step", 2, 25)]
    assert said[-1] == ("episode", 1, 1)
    monkeypatch.setattr(env, "action_space", gym.spaces.Box(-2, 1, (1,)))
    with pytest.raises(ValueError, match=r"span \[-1\.0\] to \[1\.0\], those of Edge-v0 \[-2\.0\] to \[1\.0\]"):
        cli_plan._given(args, env, None, None, torch.device("cpu"))


def test_a_report_shows_training_and_probes_beside_the_returns(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(cli_control, "save_figure", lambda figure, path: figures.append(figure))
    curves, probes = {0: [(1, 2.0), (2, 3.0)], 1: [(1, 1.0)]}, {"slope": [(1, 4.0)], "error": []}
    cli_control.draw(tmp_path / "a.png", "a", curves, 0, {0: {"training": [(1, 5.0), (3, 6.0)], **probes}, 1: probes})
    top, slope = figures[0].axes
    assert [len(line.get_xdata()) for line in top.lines if line.get_linewidth() < 1] == [2]
    assert slope.get_ylabel() == "slope"
    assert [line.get_ydata().tolist() for line in slope.lines] == [[4.0], [4.0]]
    cli_control.draw(tmp_path / "a.png", "a", curves, 1)
    assert len(figures[1].axes) == 1


def test_a_run_that_was_made_from_python_says_so(tmp_path, capsys):
    Run.continued(tmp_path / "r", {}, {}).close()
    for argv in (["eval", str(tmp_path / "r")], [*PLAN, "--model", str(tmp_path / "r")]):
        with pytest.raises(SystemExit):
            cli.main(argv)
        assert "was made from Python" in capsys.readouterr().err


def test_a_run_without_a_model_is_not_planned_with(tmp_path, capsys):
    Run.create(tmp_path / "d", {"algorithm": "x", "arguments": {"_type": "Reconstruct"}}, {})
    with pytest.raises(SystemExit) as refused:
        cli.main(["plan", "--env", "Edge-v0", "--model", str(tmp_path / "d")])
    assert refused.value.code == 2
    assert "is of `mbrl reconstruct`; expected a run of `mbrl plan`" in capsys.readouterr().err


def test_a_run_without_a_policy_is_not_evaluated(tmp_path, capsys):
    Run.create(tmp_path / "p", {"algorithm": "plan", "arguments": to_plain(cli_plan.Plan())}, {})
    with pytest.raises(SystemExit) as refused:
        cli.main(["eval", str(tmp_path / "p")])
    assert refused.value.code == 2
    assert "mbrl plan" in capsys.readouterr().err
    Run.create(tmp_path / "o", {"algorithm": "online", "arguments": to_plain(cli_control.Online())}, {})
    with pytest.raises(SystemExit) as refused:
        cli.main(["eval", str(tmp_path / "o")])
    assert "mbrl online --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["plan"], "--env is missing"),
        (["plan", "--env", "Nowhere-v1"], "Nowhere"),
        (["plan", "--env", "CartPole-v1"], "action space"),
        (["plan", "--env", "Pendulum-v1", "--model", "missing"], "missing"),
        (["online", "--env", "CartPole-v1"], "action space"),
        (["plan", "--env", "Pendulum-v1", "--model", "true", "--episodes", "0"], "--episodes"),
        (["plan", "--env", "Pendulum-v1", "--random", "0"], "random 0"),
        (["plan", "--env", "Pendulum-v1", "planner:icem", "--planner.horizon", "0"], "horizon is 0"),
        (["plan", "--env", "Pendulum-v1", "planner:icem", "--planner.samples", "8"], "samples is 8"),
        (["plan", "--env", "Pendulum-v1", "planner:cem", "--planner.elites", "600"], "elites"),
        (["plan", "--env", "Pendulum-v1", "dynamics:single", "--dynamics.hidden", "8"], "weight_decay"),
        (["plan", "--env", "Pendulum-v1", "planner:tdmpc", "--planner.proposals", "24"], "no policy"),
        (
            ["plan", "--env", "HalfCheetah-v5", "--model", "true", "planner:cem", "--planner.gradient-steps", "1"],
            "gradient",
        ),
        (["plan", "--env", "Pendulum-v1", "--model", "true", "--reward", "learned"], "--reward learned: got beside"),
        (
            ["plan", "--env", "Pendulum-v1", "--model", "true", "--worth.particles", "3", "--worth.no-pinned"],
            "--worth.particles, --worth.no-pinned: the true simulator is not uncertain and has one future",
        ),
        (["plan", "--env", "Pendulum-v1", "--model", "ensemble"], "a learner to fit is named as dynamics:ensemble"),
        (["plan", "--env", "Pendulum-v1", "--worth.limit", "1"], "pass pinned=False (--worth.no-pinned;"),
        (["plan", "--env", "Pendulum-v1", "--worth.limit", "1", "planner:cem", *LEARNER], "as an ensemble does"),
        (["plan", "--env", "Edge-v0", "--video", "x.gif"], "cannot make the environment 'Edge-v0'"),
        (
            ["offline", "--dataset", "embedded:pendulum", "--over.horizon", "2"],
            "--over.horizon 2: says how --plan plans",
        ),
        (["offline", "--dataset", "embedded:pendulum", "--plan", "--over.horizon", "0"], "horizon is 0"),
        (
            ["offline", "--dataset", "embedded:pendulum", "algorithm:morel", "dynamics:single"],
            "its rollouts are cut by it: take a learner that tells it, as dynamics:ensemble",
        ),
        (
            ["offline", "--dataset", "embedded:pendulum", "algorithm:mopo", "dynamics:single"],
            "(--algorithm.imagination.penalty.coefficient 0, before dynamics:)",
        ),
        (["plan", "--env", "Pendulum-v1", "--model", "runs/x", "--random", "7"], "--random: got beside --model runs/x"),
        (
            ["plan", "--env", "Pendulum-v1", "--model", "true", "--fitting.max-epochs", "3", "planner:cem", *LEARNER],
            "--fitting, dynamics:NAME: got beside --model true, where nothing is learned; leave out",
        ),
        (
            ["plan", "--env", "Pendulum-v1", "--episodes", "0", "--worth.pessimism", "1", "--worth.particles", "1"],
            "over the particles, and there is one",
        ),
        (
            ["plan", "--env", "Pendulum-v1", "--episodes", "0", "--worth.pessimism", "1", "planner:cem", *LEARNER],
            "all are alike under a Single without noise or parts",
        ),
        (["plan", "--env", "Pendulum-v1", "--device", "tpu"], "device"),
        (["online", "--env", "Pendulum-v1", "--reward", "task", "--steps", "0"], "steps"),
        (["online", "--env", "Hopper-v5", "--reward", "task"], "--reward task"),
        (["online", "--env", "Pendulum-v1", "--episodes", "0"], "--episodes"),
        (
            ["online", "--env", "Pendulum-v1", "--steps", "1000", "--setting.steps", "2000"],
            "--steps 1000: got beside --setting.steps 2000",
        ),
        (["plan", "--env", "Pendulum-v1", "--worth.uncertainty", "other"], "got no limit"),
        (
            ["online", "--env", "Pendulum-v1", "--steps", "1000", "dynamics:plrnn", "--dynamics.no-reward"],
            "this Plrnn has no head for it",
        ),
        (
            ["plan", "--env", "Edge-v0", "--episodes", "0", "dynamics:ode", "--dynamics.no-reward"],
            "this NeuralODE has no head for it",
        ),
        (["plan", "--env", "Pendulum-v1", "--fitting.batch", "0"], "batch=0"),
        (["online", "--env", "Pendulum-v1", "--steps", "1000", "--fitting.holdout", "2"], "holdout is 2"),
        (["online", "--env", "Pendulum-v1", "--setting.agent.spectral", "-1"], "spectral"),
        (["plan", "--env", "Pendulum-v1", "--episodes", "0", "--video", "x.txt"], "cannot write x.txt"),
        (["plan", "--env", "Pendulum-v1", "--seed", "9" * 20], "expected 0 or more, 2^62 at most"),
        (
            ["online", "--env", "Pendulum-v1", "--steps", "0", "--seeds", "0", "9" * 20],
            "expected 0 or more, 2^62 at most",
        ),
        (["plan", "--resume", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_one_error(argv, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        cli.main([argv[0], "--quiet", *argv[1:]])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert word in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir()), "no folder is left that would stand in the next try's way"


@pytest.mark.parametrize("other", ["online", "offline"])
def test_a_run_of_another_command_is_not_continued(other, tmp_path, capsys):
    Run.create(tmp_path / "p", {"algorithm": "plan", "arguments": to_plain(cli_plan.Plan())}, {})
    with pytest.raises(SystemExit) as refused:
        cli.main([other, "--resume", str(tmp_path / "p")])
    assert refused.value.code == 2
    assert f"is of `mbrl plan`, expected one of `mbrl {other}`" in " ".join(capsys.readouterr().err.split())


def test_the_figure_is_drawn_whole(tmp_path):
    cli_control.draw(tmp_path / "x.png", "t", {0: [(1, 2.0), (2, 3.0)], 4: [(1, 1.0), (2, 5.0)]}, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
