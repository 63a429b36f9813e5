"""`mbrl plan` and `mbrl online` on small settings: what they leave behind, resuming, and what they refuse."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch

from mbrl import cli, cli_control, mpc
from mbrl.planner import ICEM, Worth
from mbrl.run import Run, to_plain

PLAN = ["plan", "--env", "Pendulum-v1", "--seed", "0", "--threads", "1", "--fitting.max-epochs", "3", "--quiet",
        "--worth.particles", "2"]  # fmt: skip
SMALL = ["planner:icem", "--planner.horizon", "4", "--planner.samples", "12", "--planner.elites", "4",
         "dynamics:single", "--dynamics.hidden", "16", "--dynamics.weight-decay", "0.0", "0.0"]  # fmt: skip


def plan(*options):
    cli.main([*PLAN, *options, *SMALL])


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Episodes of 25 steps."""
    make = cli_control.opened
    monkeypatch.setattr(cli_control, "opened", lambda env: gym.wrappers.TimeLimit(make(env).unwrapped, 25))


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_plan_learns_leaves_a_run_and_its_model_serves_again(tmp_path):
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
        cli.main(["plan", "--env", "InvertedPendulum-v5", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "c")])


def test_plan_resumes_to_the_same_numbers(tmp_path, monkeypatch, capsys):
    plan("--episodes", "3", "--out", str(tmp_path / "whole"))
    real, count = mpc.episode, []

    def stopping(*args, **kw):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(*args, **kw)

    monkeypatch.setattr(mpc, "episode", stopping)
    with pytest.raises(SystemExit) as stopped:
        plan("--episodes", "3", "--out", str(tmp_path / "cut"), "--video", str(tmp_path / "v.gif"))
    assert stopped.value.code == 130
    assert "mbrl plan --resume" in capsys.readouterr().out
    filmed = []
    monkeypatch.setattr("mbrl_envs.evaluate.video", lambda act, env, path: (filmed.append(path), 0.0)[1])
    cli.main(["plan", "--resume", str(tmp_path / "cut"), "--quiet"])
    assert result(tmp_path / "cut")["returns"] == result(tmp_path / "whole")["returns"]
    assert filmed == [tmp_path / "v.gif"]


def test_driving_resumes_to_the_same_numbers_and_no_episode_is_another_again(tmp_path, monkeypatch):
    """With a model that is there: each episode has its own start and its own stream, whenever it is driven."""
    true = ["--model", "true", "--episodes", "3"]
    plan(*true, "--out", str(tmp_path / "whole"))
    real, seeds = mpc.episode, []

    def stopping(env, act, seed, *args):
        seeds.append(seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return real(env, act, seed, *args)

    monkeypatch.setattr(mpc, "episode", stopping)
    with pytest.raises(SystemExit):
        plan(*true, "--out", str(tmp_path / "cut"))
    monkeypatch.setattr(mpc, "episode", real)
    cli.main(["plan", "--resume", str(tmp_path / "cut"), "--quiet"])
    assert result(tmp_path / "cut")["returns"] == result(tmp_path / "whole")["returns"]
    assert seeds[0] != seeds[1]


def test_each_driven_episode_has_a_stream_of_its_own(tmp_path, monkeypatch):
    drawn = []

    def noting(env, act, seed, *args):
        drawn.append(torch.rand(3, generator=act.__closure__[0].cell_contents.generator).tolist())
        return real(env, act, seed, *args)

    real = mpc.episode
    monkeypatch.setattr(mpc, "episode", noting)
    plan("--model", "true", "--episodes", "2", "--out", str(tmp_path / "x"))
    assert drawn[0] != drawn[1]


def test_the_truth_is_told_the_discount_and_the_end(monkeypatch):
    env = cli_control.opened("InvertedPendulum-v5")
    env.reset(seed=0)
    seen = []
    note = lambda self, acts, discount: (seen.append(discount), torch.zeros(len(acts)))[1]
    monkeypatch.setattr("mbrl_envs.simulator.Simulator.value", note)
    worth = Worth(discount=0.9)
    cli_control.truth("InvertedPendulum-v5", env, ICEM, worth, 0)(torch.zeros(1, 4))
    assert set(seen) == {0.9}
    cart = cli_control.opened("mbrl_envs/CartPoleSwingUp-v0")
    control = cli_control.truth("mbrl_envs/CartPoleSwingUp-v0", cart, ICEM, worth, 0)
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


def test_online_leaves_a_run(tmp_path):
    cli.main(["online", "--env", "InvertedPendulum-v5", "--seed", "0", "--steps", "120", "--quiet", "--threads", "1",
              "--episodes", "1", "--out", str(tmp_path / "o"), "--setting.random", "60", "--setting.refit-every", "30",
              "--setting.rollouts", "50", "--setting.updates", "1", "--setting.evaluate-every", "60",
              "--setting.agent.hidden", "16", "--fitting.max-epochs", "2", "dynamics:single", "--dynamics.hidden",
              "16", "--dynamics.weight-decay", "0.0", "0.0"])  # fmt: skip
    got = result(tmp_path / "o")
    assert {"fit", "rollout", "update", "environment"} <= set(got["seconds"])
    assert [n for n, _ in got["returns"]] == [60, 120]
    assert got["final"] == pytest.approx(np.mean(got["returns"][-1][1]))
    with pytest.raises(SystemExit) as refused:
        cli.main(["online", "--resume", str(tmp_path / "o")])
    assert refused.value.code == 2


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
        (["plan", "--env", "Pendulum-v1", "dynamics:single", "--dynamics.hidden", "8"], "weight_decay"),
        (["plan", "--env", "Pendulum-v1", "planner:tdmpc", "--planner.proposals", "24"], "no policy"),
        (["plan", "--env", "HalfCheetah-v5", "--model", "true", "--video", "x.gif"], "--video"),
        (
            ["plan", "--env", "HalfCheetah-v5", "--model", "true", "planner:cem", "--planner.gradient-steps", "1"],
            "gradient",
        ),
        (["plan", "--env", "Pendulum-v1", "--device", "tpu"], "device"),
        (["online", "--env", "Pendulum-v1", "--reward", "task", "--steps", "0"], "steps"),
        (["online", "--env", "Hopper-v5", "--reward", "task"], "--reward task"),
        (["online", "--env", "Pendulum-v1", "--episodes", "0"], "--episodes"),
        (["online", "--env", "Pendulum-v1", "--setting.agent.spectral", "-1"], "spectral"),
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
    Run.create(tmp_path / "p", {"algorithm": "plan", "arguments": to_plain(cli_control.Plan())}, {})
    with pytest.raises(SystemExit) as refused:
        cli.main([other, "--resume", str(tmp_path / "p")])
    assert refused.value.code == 2
    assert f"is of `mbrl plan`, expected one of `mbrl {other}`" in " ".join(capsys.readouterr().err.split())


def test_the_figure_is_drawn_whole(tmp_path):
    cli_control.draw(tmp_path / "x.png", "t", [(1, 2.0), (2, 3.0)], 1)
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
