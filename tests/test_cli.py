"""The command line, from outside where it matters: real processes, really killed."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from mbrl_envs import adapters, evaluate, tasks
from mbrl_envs import datasets as worlds
from stable_baselines3 import SAC

import mbrl
from mbrl import choices, cli, cli_control, cli_evaluate, cli_offline, cli_plan, cli_suite, mpc, offline, suite
from mbrl.core import Spec
from mbrl.fit import FitConfig
from mbrl.planner import OVER
from mbrl.run import Run, RunError, git_hash, to_plain
from mbrl.terminal import TerminalConfig, TerminalHead

SMALL = (
    "--fitting.max-epochs=4",
    "--fitting.patience=50",
    "--updates=300",
    "--evaluate-every=100",
    "--episodes=2",
    "--threads=1",
    "algorithm:morec-mopo",
    "--algorithm.agent.hidden=16",
    "--algorithm.agent.hidden=16",
    "--algorithm.batch=32",
    "--algorithm.log-every=50",
    "--algorithm.imagination.horizon=4",
    "--algorithm.imagination.rollouts=50",
    "--algorithm.imagination.every=100",
    "--algorithm.save-every=100",
    "--algorithm.imagination.morec.reward.updates=60",
    "--algorithm.imagination.morec.reward.anchor-updates=60",
)


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """A D4RL file of random actions in Pendulum-v1."""
    env, rows = gym.make("Pendulum-v1"), []
    env.action_space.seed(0)
    for episode in range(4):
        obs, _ = env.reset(seed=episode)
        for t in range(200):
            act = env.action_space.sample()
            after, reward, _, _, _ = env.step(act)
            rows.append((obs, act, reward, after, t == 199))
            obs = after
    path = tmp_path_factory.mktemp("data") / "pendulum-random.hdf5"
    names = ("observations", "actions", "rewards", "next_observations", "timeouts")
    with h5py.File(path, "w") as file:
        for name, column in zip(names, zip(*rows, strict=True), strict=True):
            file[name] = np.array(column, dtype=bool if name == "timeouts" else np.float32)
        file["terminals"] = np.zeros(len(rows), dtype=bool)
        file.attrs.update(env_id="Pendulum-v1", action_low=env.action_space.low, action_high=env.action_space.high)
    return path


def small(*args):
    """`SMALL` with the width given once, as tyro takes a sequence."""
    head = [a for a in SMALL if not a.startswith("--algorithm.agent.hidden")]
    at = head.index("algorithm:morec-mopo") + 1
    return [*args, *head[:at], "--algorithm.agent.hidden", "16", "16", *head[at:]]


def command(*args):
    return [sys.executable, "-m", "mbrl.cli", *args]


def call(*args, **kw):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command(*args), capture_output=True, text=True, env=environment, check=False, **kw)


def killed_at(pattern, folder, *args):
    """Start the command, and kill -9 it as soon as a file that matches appears."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(*args), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end, f"no {pattern} in {folder}"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


@pytest.mark.slow
def test_a_run_that_was_killed_continues_to_the_same_numbers(pendulum, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = call("offline", "--dataset", str(pendulum), "--out", str(whole), "--seeds", "5", *small())
    assert done.returncode == 0, done.stderr
    killed_at(
        "checkpoints/model-*.partial.safetensors",
        parts,
        "offline",
        "--dataset",
        str(pendulum),
        "--out",
        str(parts),
        "--seeds",
        "5",
        *small(),
    )
    assert not list(parts.glob("checkpoints/agent*"))
    killed_at("checkpoints/policy.partial.safetensors", parts, "offline", "--resume", str(parts))
    assert not (parts / "result.json").exists()
    done = call("offline", "--resume", str(parts))
    assert done.returncode == 0, done.stderr
    a, b = Run.open(whole), Run.open(parts)
    assert a.metrics() == b.metrics()
    first, second = a.load("agent")[0], b.load("agent")[0]
    assert all(torch.equal(x, second[k]) for k, x in first.items())
    assert a.result["returns"] == b.result["returns"]
    assert {p.name for p in whole.iterdir()} == {p.name for p in parts.iterdir()}
    assert (parts / "report.png").stat().st_size > 20_000
    again = call("offline", "--resume", str(parts))
    assert again.returncode == 2
    assert "has finished" in again.stderr


@pytest.fixture(scope="module")
def finished(pendulum, tmp_path_factory):
    """A finished run, made in this process."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    cli.main(["offline", "--dataset", str(pendulum), "--out", str(folder), "--seeds", "5", *small("--quiet", "--plan")])
    return folder


def test_a_run_folder_says_what_was_done(finished, pendulum):
    run = Run.open(finished)
    config, result = run.config, run.result
    assert config["data"]["name"] == "pendulum-random"
    assert len(config["data"]["sha256"]) == 64
    assert str(pendulum) not in (finished / "config.json").read_text(), (
        "data are recorded by name and hash, not by path"
    )
    assert config["arguments"]["seeds"] == [5]
    assert config["versions"]["torch"]
    assert config["git"] == git_hash()
    assert result["updates"] == 300
    assert [u for u, _ in result["returns"]] == [100, 200, 300]
    assert result["final"][0] == pytest.approx(np.mean(result["returns"][-1][1][0]), abs=0.01)
    assert result["last10"][0] == pytest.approx(np.mean([r[1][0] for r in result["returns"]]), abs=0.01)
    assert {m["stage"] for m in run.metrics()} >= {"model", "reward", "rollout", "policy", "evaluate"}
    assert not list(finished.rglob("*.tmp"))
    assert np.shape(result["planned"]) == (1, 2)
    assert result["planned"] != result["returns"][-1][1]


def test_eval_gives_actions_the_meaning_that_they_have_in_the_data(finished, monkeypatch):
    """Data whose bounds are half the environment's: the same policy then earns something else."""
    run = Run.open(finished)
    config = run.config
    assert (config["data"]["act_low"], config["data"]["act_high"]) == ([-2.0], [2.0])
    wide = cli_evaluate.run_evaluate(cli_evaluate.Evaluate(finished, episodes=1))
    config["data"] |= {"act_low": [-0.5], "act_high": [0.5]}
    monkeypatch.setattr(Run, "config", config)
    assert cli_evaluate.run_evaluate(cli_evaluate.Evaluate(finished, episodes=1)) != wide
    assert cli_evaluate.run_evaluate(cli_evaluate.Evaluate(finished, episodes=1, env="Pendulum-v1")) == wide


def test_eval_plans_only_where_actions_mean_what_they_did_to_the_model(finished, monkeypatch):
    run = Run.open(finished)
    config = run.config
    config["data"] |= {"act_low": [-0.5], "act_high": [0.5]}
    monkeypatch.setattr(Run, "config", config)
    asked = cli_evaluate.Evaluate(finished, episodes=1, env="Pendulum-v1", plan=True)
    with pytest.raises(
        RunError, match=r"its actions span \[-0.5\] to \[0.5\], those of Pendulum-v1 \[-2.0\] to \[2.0\]"
    ):
        cli_evaluate.run_evaluate(asked)


def test_eval_of_no_episode_is_refused(finished):
    with pytest.raises(ValueError, match="--episodes: got 0, expected at least 1"):
        cli_evaluate.run_evaluate(cli_evaluate.Evaluate(finished, episodes=0))


def test_eval_refuses_what_it_cannot_write_before_it_evaluates(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_evaluate, "returns_of", lambda *_: pytest.fail("evaluated"))
    (tmp_path / "p.zip").mkdir()
    with pytest.raises(adapters.AdapterError, match="is a folder, expected the name of a file"):
        cli_evaluate.run_evaluate(cli_evaluate.Evaluate(finished, export=tmp_path / "p.zip"))


def test_eval_films_and_exports_what_it_evaluates(finished, tmp_path, monkeypatch):
    run, filmed = Run.open(finished), []
    config = run.config
    config["data"] |= {"act_low": [-0.5], "act_high": [0.5]}
    monkeypatch.setattr(Run, "config", config)
    monkeypatch.setattr(evaluate, "video", lambda policy, env, path, **kw: filmed.append((env, path, kw)))
    export, video = tmp_path / "p.zip", tmp_path / "v.gif"
    cli_evaluate.run_evaluate(cli_evaluate.Evaluate(finished, episodes=1, export=export, video=video))
    assert [(env, kw["max_steps"]) for env, _, kw in filmed[:1]] == [("Pendulum-v1", 0)], "one frame, before all else"
    assert filmed[1:] == [("Pendulum-v1", video, {"act_low": [-0.5], "act_high": [0.5], "obs": 3})]
    obs = torch.randn(6, 3)
    theirs, _ = SAC.load(export, device="cpu").predict(obs.numpy(), deterministic=True)
    ours = offline.policy_of(cli_evaluate.load_agent(run)[0])(obs)
    np.testing.assert_allclose(0.5 * ours.numpy(), theirs, atol=1e-5)


def test_in_another_world_the_score_is_on_its_scale(finished, monkeypatch, capsys):
    gym.register("Pendulum-Other-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=20)
    scales = {"Pendulum-Other-v0": (-1e6, 1e6)}
    monkeypatch.setattr(cli_evaluate, "scale_of", scales.get)

    def score(**kw):
        cli_evaluate.run_evaluate(cli_evaluate.Evaluate(finished, episodes=1, **kw))
        (row,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("│ 5 "))
        return row.split("│")[-2].strip()

    assert abs(float(score(env="Pendulum-Other-v0")) - 50) < 0.1
    assert abs(float(score(env="Pendulum-v1")) - 50) > 0.1
    scales.clear()
    assert score(env="Pendulum-Other-v0") == "-"


def test_eval_runs_the_policy_and_exports_it(finished, tmp_path, capsys):
    path = tmp_path / "policy.zip"
    cli.main(["eval", str(finished), "--episodes", "2", "--export", str(path)])
    assert "Pendulum-v1" in capsys.readouterr().out
    agent, _ = cli_evaluate.load_agent(Run.open(finished))
    obs = torch.randn(6, 3)
    ours = offline.policy_of(agent)(obs)
    theirs, _ = SAC.load(path, device="cpu").predict(obs.numpy(), deterministic=True)
    np.testing.assert_allclose(2 * ours.numpy(), theirs, atol=1e-5)


def test_eval_plans_over_the_policy(finished, pendulum, monkeypatch, capsys):
    """With the agent's own seed and model, from the same initial states; what comes out is shown beside the policy."""
    seen = []
    real = mpc.over
    monkeypatch.setattr(
        mpc,
        "over",
        lambda agent, i, model, **kw: (seen.append((model, kw)), real(agent, i, model, **kw))[1],
    )
    monkeypatch.setattr(mpc.Mpc, "__call__", lambda self, obs: torch.full((len(obs), 1), 0.3))
    constant = cli_evaluate.run_evaluate(cli_evaluate.Evaluate(finished, episodes=2, plan=True))
    assert "5, planned" in capsys.readouterr().out
    kept = Run.open(finished).load(next(p.stem for p in (finished / "checkpoints").glob("model-*.safetensors")))
    assert kept is not None
    cli_evaluate.run_evaluate(cli_evaluate.Evaluate(finished, episodes=2, plan=True, plan_by="tdmpc"))
    loop, tdmpc = ({k: kw[k] for k in ("planner", "critics")} for _, kw in seen)
    assert loop == {"planner": OVER["loop"], "critics": "least"}
    assert tdmpc == {"planner": OVER["tdmpc"], "critics": "mean"}
    model, given = seen[0]
    assert all(torch.equal(kept[0][k], v) for k, v in model.state_dict().items())
    dt = Run.open(finished).config["data"]["dt"]
    assert given["dt"] == dt == worlds.load(str(pendulum)).dt
    assert len(constant) == 1


def test_eval_plans_to_the_end_that_the_run_has_learned(finished, tmp_path, monkeypatch):
    """Where nobody has written the task's own down."""
    run = Run.open(shutil.copytree(finished, tmp_path / "run"))
    facts, config = run.config["data"], TerminalConfig()
    head = TerminalHead(3, 1, config, torch.Generator().manual_seed(1))
    run.save(offline.fitted_name("terminal", facts["sha256"], facts["steps"], config, 5), head.state_dict(), {})

    def unknown(*args):
        raise ValueError

    monkeypatch.setattr(tasks, "task", unknown)
    seen, real = [], mpc.over
    monkeypatch.setattr(mpc, "over", lambda *args, **kw: (seen.append(kw["terminal"]), real(*args, **kw))[1])
    monkeypatch.setattr(mpc.Mpc, "__call__", lambda self, obs: torch.zeros(len(obs), 1))
    cli_evaluate.run_evaluate(cli_evaluate.Evaluate(run.folder, episodes=1, plan=True))
    (found,) = seen
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in head.state_dict().items() if k != "accuracy")


def test_an_offline_runs_model_serves_to_plan_with(finished):
    """The fitted one, without the filter, by the interval of its data."""
    args = cli_plan.Plan(env="Pendulum-v1", seed=0, model=str(finished))
    control = cli_plan._given(args, cli_control.opened("Pendulum-v1"), None, None, torch.device("cpu"))
    run = Run.open(finished)
    kept = run.load(next(p.stem for p in (finished / "checkpoints").glob("model-*.safetensors")))
    assert kept is not None
    assert control.model.state_dict().keys() == kept[0].keys()
    assert all(torch.equal(kept[0][k], v) for k, v in control.model.state_dict().items())
    assert control.dt == run.config["data"]["dt"]
    assert control.pins, "a particle keeps to one member"


def test_a_run_that_names_no_environment_is_evaluated_in_none(finished, monkeypatch):
    config = Run.open(finished).config
    config["arguments"]["env"] = "none"
    monkeypatch.setattr(Run, "config", config)
    monkeypatch.setattr(Run, "result", None)
    with pytest.raises(RunError, match="names no environment; pass --env"):
        cli_evaluate.run_evaluate(cli_evaluate.Evaluate(finished, episodes=1))
    assert cli_evaluate.run_evaluate(cli_evaluate.Evaluate(finished, episodes=1, env="Pendulum-v1"))


def test_scores_of_a_policy_that_is_still_held_are_told_apart():
    let_go = replace(offline.MOPO, updates=100, agent=replace(offline.MOPO.agent, cloning_end=0.3))
    result = offline.Result(None, [], [(n, [[0.0]]) for n in range(10, 101, 10)], {})
    assert cli_offline.early(let_go, Spec(3, 1), result) == ", 8 of them before cloning is let go at update 80"
    assert (
        cli_offline.early(offline.MOPO, Spec(3, 1), result) == cli_offline.early(offline.BC, Spec(3, 1), result) == ""
    )


@pytest.mark.parametrize("kind", ["run", "stable-baselines3"])
def test_a_run_starts_from_a_checkpoint(finished, pendulum, tmp_path, kind):
    """With no update to speak of, the policy is still the one that was handed in."""
    out, start = tmp_path / "next", finished
    if kind == "stable-baselines3":
        start = tmp_path / "policy.zip"
        cli.main(["eval", str(finished), "--episodes", "1", "--export", str(start)])
    given = ["--dataset", str(pendulum), "--out", str(out), "--seeds", "6", "--start", str(start)]
    args = ["offline", *given, *small("--quiet")]
    args[args.index("--updates=300")] = "--updates=1"
    cli.main(args)
    obs = torch.randn(6, 3)
    before, after = (offline.policy_of(cli_evaluate.load_agent(Run.open(f))[0])(obs) for f in (finished, out))
    torch.testing.assert_close(before, after, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["offline"], "--dataset is missing"),
        (["offline", "--dataset", "nowhere.hdf5"], "nowhere.hdf5"),
        (["offline", "--dataset", "hopper-midium-v2"], "hopper-medium-v2"),
        (["offline", "--resume", "nowhere"], "no config.json"),
        (["offline", "--dataset", "embedded:pendulum", "--device", "tpu9"], "expected 'auto'"),
        (["offline", "--dataset", "embedded:pendulum", "--env", "Pendulumm-v1"], "Pendulumm"),
        (["offline", "--dataset", "embedded:pendulum", "--env", "Hopper-v5"], "act_low has 1 entries, expected 3"),
        (["offline", "--dataset", "embedded:pendulum", "--scale", "hoper-medium-v2"], "hoper-medium-v2"),
        (["offline", "--dataset", "embedded:pendulum", "--updates", "0"], "--updates: got 0"),
        (["offline", "--dataset", "embedded:pendulum", "--start", "no.zip", "algorithm:mopo"], "no.zip"),
        (["offline", "--dataset", "embedded:pendulum", "algorithm:mopo", "dynamics:mixer"], "uncertainty 'aleatoric'"),
        (["offline", "--dataset", "embedded:pendulum", "--threads", "-2"], "--threads -2"),
        (["offline", "--dataset", "minari:foo"], "minari:<namespace>/<name>-v<number>"),
        (["offline", "--dataset", "Hopper-v5"], "mbrl collect --env Hopper-v5"),
        (["suite", "--datasets", "a/x.hdf5", "b/x.hdf5"], "called x"),
        (["suite", "--datasets", "embedded:pendulum", "--algorithms", "mopo2"], "'mopo2'"),
        (["suite", "--datasets", "embedded:pendulum", "--algorithms", "bc@3"], "no penalty"),
        (["suite", "--datasets", "embedded:pendulum", "--algorithms", "mopo@x"], "'x' is not a number"),
        (["data", "scores", "no-such-id"], "no-such-id"),
        (["data", "scores", "no:door:id"], "no:door:id"),
        (["offline", "--dataset", "embedded:pendulum", "--plan", "algorithm:bc"], "bc has no model"),
        (["offline", "--dataset", "embedded:pendulum", "--plan-by", "tdmpc"], "pass --plan too"),
        (["offline", "--dataset", "embedded:pendulum", "--seeds", "0", "0"], "no two alike"),
        (["offline", "--dataset", "embedded:pendulum", "algorithm:mopo", "--algorithm.log-every", "0"], "log_every=0"),
        (
            ["offline", "--dataset", "embedded:pendulum", "algorithm:mopo", "--algorithm.save-every", "0"],
            "save_every=0",
        ),
        (
            ["offline", "--dataset", "embedded:pendulum", "algorithm:mopo", "--algorithm.real-ratio", "0"],
            "no row of a batch",
        ),
        (
            ["offline", "--dataset", "embedded:pendulum", "algorithm:mopo", "--algorithm.agent.cloning-end", "2"],
            "cloning_end=2.0 with cloning=1.5",
        ),
        (["offline", "--dataset", "embedded:pendulum", "--plan", "--env", "none"], "no environment to plan in"),
        (["offline", "--dataset", "nowhere.hdf5", "--seeds", "3", "-20"], "--seeds is -20, expected 0 or more"),
        (["online", "--env", "Nowhere-v1", "--seeds", "-20"], "--seeds is -20, expected 0 or more"),
        (["eval", "nowhere", "--seed", "-1"], "--seed is -1, expected 0 or more"),
        (["suite", "--datasets", "embedded:pendulum", "--seeds"], "--seeds: got none, expected at least one"),
        (["suite", "--datasets", "embedded:pendulum", "--seeds", "2", "2"], "--seeds: got 2 2, expected no two alike"),
        (["offline", "--dataset", "embedded:pendulum", "--fitting.patience", "0"], "patience=0"),
        (
            ["data", "info", "nowhere", "--figure", "x.xyz"],
            "--figure x.xyz: no figure ends in .xyz, expected one of .",
        ),
        (["data", "info", "nowhere", "--figure", "none/x.png"], "there is no folder none; make it"),
        (["data", "info", ""], "got '' as a source of data"),
        (
            [
                "offline",
                "--dataset",
                "embedded:pendulum",
                "algorithm:morec-mopo",
                "--algorithm.imagination.morec.filter.candidates",
                "0",
            ],
            "got candidates 0",
        ),
    ],
)
def test_bad_input_is_one_clear_error(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir()), "found before anything is made"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "runs"), "Permission denied: 'runs'"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory\nframe #0"),
            "there is not enough memory: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate "
            "memory; ask for less at a time (steps, rollouts, samples, particles, batch)",
        ),
        (IsADirectoryError(21, "Is a directory", "x"), "Is a directory: 'x'"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ImportError("pip install 'mbrl-suite[dysts]'"), "pip install 'mbrl-suite[dysts]'"),
        (gym.error.ResetNeeded("call reset"), "call reset"),
    ],
)
def test_what_the_machine_or_an_environment_refuses_is_one_clear_error(error, said, capsys, monkeypatch):
    monkeypatch.setattr(cli, "run_list", lambda args: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit) as stop:
        cli.main(["list"])
    assert stop.value.code == 2
    assert f"{said}\n" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_swings_up_where_its_data_do_not(tmp_path):
    """Model, dynamics reward and policy as the demo has them, in a third of its updates: from -1070 to about -120."""
    asked = cli.demo_settings(tmp_path / "demo", 0, threads=1)
    assert (asked.algorithm.updates, asked.algorithm.evaluate_every) == (12_000, 500)
    shorter = replace(asked.algorithm, updates=4_000, evaluate_every=1_000)
    run = cli_offline.run_offline(replace(asked, algorithm=shorter, quiet=True))
    assert run.result is not None
    assert run.result["behaviour_mean"] < -1000
    assert run.result["final"][0] > -300
    assert {"model", "reward", "policy", "rollout", "evaluate"} <= {x["stage"] for x in run.metrics()}


def test_the_demo_goes_on_with_an_interrupted_one_of_its_seed(tmp_path, monkeypatch, capsys):
    asked = []

    class Ran:
        folder = Path("runs/demo")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run_offline", lambda args: asked.append(args) or Ran())
    monkeypatch.setattr(cli.devices, "slowdown", lambda: 0.7)
    demo = lambda seed=0: (cli.run_demo(cli.Demo(seed=seed)), asked[-1])[1]
    assert demo() == cli.demo_settings(Path("runs/demo"), 0)
    plain = to_plain(replace(cli.demo_settings(Path("runs/demo"), 0), out=None))
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/config.json").write_text(json.dumps({"arguments": plain}))
    assert demo().resume == Path("runs/demo")
    assert "runs/demo was interrupted: going on with it" in capsys.readouterr().out
    assert demo(1) == cli.demo_settings(Path("runs/demo-2"), 1), "another seed is another run"
    Path("runs/demo/result.json").write_text("{}")
    monkeypatch.setattr(cli.devices, "slowdown", lambda: 7.0)
    assert demo() == cli.demo_settings(Path("runs/demo-2"), 0, threads=1), "where the cores are busy"
    assert "one thread is the faster" in capsys.readouterr().out


def test_a_busy_machine_is_warned_of_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(cli.devices, "slowdown", lambda: 6.6)
    monkeypatch.setattr(cli, "run_offline", lambda args: None)
    go = lambda *more: (cli.main(["offline", "--dataset", "embedded:pendulum", *more]), capsys.readouterr().err)[1]
    assert go() == "", "not in a file"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "7 times as long on its threads as on one; --threads 1" in go().replace("\n", " ")
    assert go("--threads", "2") == "", "which were asked for"
    monkeypatch.setattr(cli.devices, "slowdown", lambda: 1.1)
    assert go() == ""


def test_an_error_of_ours_is_no_want_of_memory(monkeypatch):
    monkeypatch.setattr(cli, "run_list", lambda args: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["list"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["collect", "--env", "Pendulum-v1"], "interrupted"),
        (["data", "info", "embedded:pendulum"], "interrupted"),
        (
            ["suite", "--datasets", "embedded:pendulum"],
            "interrupted; the same command continues it to the same numbers",
        ),
        (["demo"], "interrupted; `mbrl offline --resume runs/demo` continues it to the same numbers"),
    ],
)
def test_an_interrupted_command_says_how_it_goes_on(args, said, capsys, monkeypatch):
    name = "run_info" if args[0] == "data" else f"run_{args[0]}"
    monkeypatch.setattr(cli, name, lambda args: (_ for _ in ()).throw(KeyboardInterrupt(Path("runs/demo"))))
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 130
    assert capsys.readouterr().out == f"\n{said}\n"


def test_evaluations_begin_from_seeds_that_every_environment_takes():
    data = worlds.load("embedded:pendulum")
    seed = lambda s: cli_offline.World.of(cli_offline.Offline(seeds=(s,)), data).evaluate.seed
    assert [seed(s) for s in (0, 7, 2**31 - 1)] == [10_000, 17_000, 9_000]


@pytest.mark.parametrize(("bounds", "said"), [({}, 1), ({"action_low": [-2.0], "action_high": [2.0]}, 0)])
def test_actions_of_no_stated_bounds_are_warned_of_where_the_worlds_are_others(bounds, said):
    """A file whose actions are -2 .. 2 of Pendulum's or shares of them: nobody but its owner can tell."""
    zero, act = np.zeros(4, np.float32), np.zeros((4, 1), np.float32)
    obs = np.zeros((4, 3), np.float32)
    told = {"observations": obs, "actions": act, "rewards": zero, "terminals": zero, **bounds}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        cli_offline.World.of(cli_offline.Offline(seeds=(0,), env="Pendulum-v1"), worlds.load(told))
    assert sum("states no action bounds" in str(x.message) for x in warned) == said


def test_a_run_folder_is_not_written_over(finished, pendulum, capsys):
    with pytest.raises(SystemExit):
        cli.main(["offline", "--dataset", str(pendulum), "--out", str(finished), "--quiet"])
    assert "holds a finished run; name another folder (--out)" in capsys.readouterr().err


def test_a_module_of_the_folder_at_hand_is_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "nearby_world.py").write_text(
        "import gymnasium as gym\nfrom gymnasium.envs.classic_control import PendulumEnv\n"
        "gym.register('Nearby-v0', PendulumEnv, max_episode_steps=3)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x not in ("", str(tmp_path))])
    cli.main(["plan", "--env", "nearby_world:Nearby-v0", "--seed", "0", "--random", "2", "--episodes", "0", "--quiet"])
    assert len(json.loads((tmp_path / "runs/nearby_world_Nearby-v0/plan-0/result.json").read_text())["returns"]) == 2


def test_the_package_is_the_console_script():
    told = subprocess.run([sys.executable, "-m", "mbrl", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout == f"mbrl-suite {mbrl.__version__}\n"


def test_other_data_do_not_continue_a_run(pendulum, tmp_path, capsys):
    other = tmp_path / "other.hdf5"
    other.write_bytes(pendulum.read_bytes())
    with h5py.File(other, "r+") as file:
        file["rewards"][0] = 1.0
    out = tmp_path / "run"
    killed_at("config.json", out, "offline", "--dataset", str(pendulum), "--out", str(out), "--seeds", "5", *small())
    with pytest.raises(SystemExit):
        cli.main(["offline", "--resume", str(out), "--dataset", str(other)])
    assert "not the data of" in capsys.readouterr().err.replace("\n", " ")


def test_a_start_that_does_not_fit_leaves_no_folder(finished, pendulum, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        cli.main(["offline", "--dataset", str(pendulum), "--out", str(out), "--start", str(finished), "algorithm:bc"])
    assert "leave --start out" in capsys.readouterr().err
    assert not out.exists()


def test_a_start_of_another_shape_leaves_no_folder(finished, pendulum, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        cli.main(["offline", "--dataset", str(pendulum), "--out", str(out), "--start", str(finished), "algorithm:mopo"])
    assert "hidden (256, 256), 3 observations" in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()


LITTLE = replace(offline.MOPO, agent=replace(offline.MOPO.agent, hidden=(8,)))


def begun(monkeypatch, **options):
    """A run as it stands before anything is learned. Returns its folder, and a function that goes on with it that far:
    options -> the settings and the world that it would learn by."""
    seen = []
    told = lambda args, run, data, world: (seen.append((args, world)), run.close(), run)[-1]
    monkeypatch.setattr(cli_offline, "_train", told)
    run = cli_offline.run_offline(cli_offline.Offline(seeds=(1,), algorithm=LITTLE, quiet=True, **options))
    again = lambda **kw: (cli_offline.run_offline(cli_offline.Offline(resume=run.folder, quiet=True, **kw)), seen[-1])[
        1
    ]
    return run.folder, again


def test_another_environment_to_go_on_in_changes_nothing_that_is_learned(pendulum, tmp_path, monkeypatch):
    task = tasks.task("Pendulum-v1")
    monkeypatch.setattr(tasks, "task", lambda env, obs: {"Pendulum-v1": task}[env])
    _, again = begun(monkeypatch, dataset=str(pendulum), out=tmp_path / "run", reward="task")
    own = again()[1]
    assert own.env == "Pendulum-v1"
    without = again(env="none")[1]
    assert (without.env, without.evaluate) == (None, None)
    for world in (own, without):
        assert (world.terminal, world.reward) == (task.terminal, task.reward)


def test_a_plan_needs_an_environment_when_a_run_goes_on_too(pendulum, tmp_path, monkeypatch):
    _, again = begun(monkeypatch, dataset=str(pendulum), out=tmp_path / "run", plan=True)
    with pytest.raises(ValueError, match="no environment to plan in"):
        again(env="none")


def a_start(folder, config=LITTLE.agent):
    """A run folder with a policy to start from, and that policy's state."""
    agent = config.build(Spec(3, 1), torch.Generator().manual_seed(3))
    if config.normalize:
        agent.set_normalizer(torch.ones(3), torch.full((3,), 2.0))
    with Run.create(folder, {}, {}, quiet=True) as run:
        run.save("agent", agent.state_dict(), {})
    return agent.state_dict()


def test_a_start_is_found_from_anywhere_and_read_once(pendulum, tmp_path, monkeypatch):
    state, taken = a_start(tmp_path / "first"), []

    def train(*args, start, **kw):
        taken.append(start)
        raise KeyboardInterrupt

    monkeypatch.setattr(offline, "train", train)
    monkeypatch.chdir(tmp_path)
    learn = cli_offline._train
    folder, again = begun(monkeypatch, dataset=str(pendulum), out=tmp_path / "run", start=Path("first"), env="none")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert again(start=Path("../first"))[0].start == again()[0].start == (tmp_path / "first").resolve()
    monkeypatch.setattr(cli_offline, "_train", learn)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert all(torch.equal(v, taken[0][k]) for k, v in state.items())
    shutil.rmtree(tmp_path / "first")
    Run.open(folder).save("policy.partial", state, {})
    with pytest.raises(KeyboardInterrupt):
        again()
    assert taken[1] is None


def test_a_start_that_standardises_observations_asks_for_the_same(pendulum, tmp_path):
    raw = replace(LITTLE.agent, normalize=False)
    a_start(tmp_path / "standard")
    want = {k: v.clone() for k, v in a_start(tmp_path / "raw", raw).items()}
    data = worlds.load(str(pendulum))
    args = cli_offline.Offline(seeds=(1,), algorithm=replace(LITTLE, agent=raw))
    with pytest.raises(RunError, match=r"reads standardised observations, .* pass --algorithm\.agent\.normalize"):
        cli_offline._start(tmp_path / "standard", args, data)
    assert torch.equal(cli_offline._start(tmp_path / "raw", args, data)["actor"], want["actor"])
    assert cli_offline._start(tmp_path / "standard", replace(args, algorithm=LITTLE), data)


def test_a_suite_does_not_report_runs_with_other_settings(pendulum, tmp_path, capsys):
    args = ["suite", "--datasets", str(pendulum), "--algorithms", "bc", "--seeds", "1", "--out", str(tmp_path / "s")]
    args += ["--episodes", "1", "--scale", "hopper-medium-v2", "--updates"]
    cli.main([*args, "20"])
    cli.main([*args, "20"])
    capsys.readouterr()
    summary = tmp_path / "s/summary.json"
    assert json.loads(summary.read_text())["scores"]
    with pytest.raises(SystemExit):
        cli.main([*args, "30"])
    said = capsys.readouterr().out.replace("\n", " ")
    assert "holds a run with other settings (algorithm)" in said
    assert "no finished run with an evaluation yet" in said
    assert json.loads(summary.read_text())["results"] == [], "it counts among none of these"


class Killed:
    """A pool whose worker the machine has killed."""

    def __init__(self, *args, **kw): ...
    def __enter__(self):
        return self

    def __exit__(self, *args): ...
    def map(self, *args):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")


def test_a_worker_that_is_killed_is_one_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli_suite, "ProcessPoolExecutor", Killed)
    with pytest.raises(SystemExit) as stop:
        cli.main(["suite", "--datasets", "embedded:pendulum", "--workers", "2", "--out", str(tmp_path / "s")])
    assert stop.value.code == 2
    assert "a worker was killed, for its memory perhaps" in capsys.readouterr().err


def test_failures_are_told_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli_suite, "_run_group", lambda cells: {tmp_path: "got [bold], expected [/red]"})
    with pytest.raises(SystemExit):
        cli.main(["suite", "--datasets", "embedded:pendulum", "--out", str(tmp_path / "s")])
    assert "[bold], expected [/red]" in capsys.readouterr().out


def in_folder(folder, cell, sha256="a" * 64):
    """A run of these settings and data, as far as a suite looks at it."""
    folder.mkdir(parents=True)
    plain = to_plain(replace(cell, dataset="data", out=None, models=None))
    (folder / "config.json").write_text(json.dumps({"arguments": plain, "data": {"sha256": sha256}}))


@pytest.mark.parametrize("change", [
    {"algorithm": offline.MOPO}, {"seeds": (2,)}, {"episodes": 3}, {"scale": "hopper-medium-v2"},
    {"fitting": FitConfig(lr=1.0)}, {"dynamics": offline.EnsembleConfig(members=3)},
])  # fmt: skip
def test_a_suite_compares_every_setting_of_a_run_that_is_there(change, tmp_path):
    cell = cli_offline.Offline(dataset="data", seeds=(1,), algorithm=offline.BC)
    in_folder(tmp_path / "run", cell)
    other = lambda cell: cli_suite._other(cell, tmp_path / "run", lambda: "a" * 64)
    assert other(cell) is None
    assert other(replace(cell, **change)) == f"other settings ({next(iter(change))})"


@pytest.mark.parametrize("bare", [True, False])
def test_a_suite_does_not_take_other_data_for_its_own(bare, pendulum, tmp_path):
    """Two files of one name, say, one after the other: with settings beside the result, or without."""
    cell = cli_offline.Offline(dataset=str(pendulum), seeds=(1,), algorithm=offline.BC)
    folder, own = tmp_path / "run", worlds.load(str(pendulum)).sha256
    for sha256, want in ((own, ""), ("a" * 64, f"other data (aaaaaaaaaaaa, {pendulum} is {own[:12]})")):
        shutil.rmtree(folder, ignore_errors=True)
        in_folder(folder, cell, sha256)
        if bare:
            (folder / "config.json").unlink()
        (folder / "result.json").write_text(json.dumps({"sha256": sha256, "updates": cell.algorithm.updates}))
        words = "holds a run with {}; name another --out, or remove that folder"
        assert cli_suite._run_group([(cell, folder)]) == ({folder: words.format(want)} if want else {})


def test_a_suite_calls_an_id_by_the_whole_of_it():
    names = {f"minari:mujoco/{x}/medium-v0": f"minari_mujoco_{x}_medium-v0" for x in ("hopper", "walker2d")}
    names |= {"a/x.hdf5": "x", "hopper-medium-v2": "hopper-medium-v2", "embedded:hopper": "embedded_hopper"}
    assert {x: cli_suite._stem(x) for x in names} == names


def test_a_suite_counts_a_seed_once_and_says_so(tmp_path, capsys, monkeypatch):
    """That of the run that was asked for, where there are several."""
    monkeypatch.setattr(suite, "aggregate", lambda scores: {})
    for name, scores in (("1", [10.0]), ("1-2", [20.0, 30.0])):
        folder = tmp_path / "data/bc" / name
        folder.mkdir(parents=True)
        row = {"seeds": [int(s) for s in name.split("-")], "score_last10": scores, "updates": 1}
        (folder / "result.json").write_text(json.dumps(row))
    for seeds, want in (((1,), [10.0, 30.0]), ((1, 2), [20.0, 30.0])):
        args = cli_suite.Suite(("data",), ("bc",), seeds, tmp_path, together=True, report=True)
        assert cli_suite.run_suite(args)["scores"] == {"bc": {"data": want}}
        asked, other = "-".join(map(str, seeds)), {(1,): "1-2", (1, 2): "1"}[seeds]
        words = f"seed 1 of {tmp_path / 'data/bc'}: counted once, as in {asked}, not as in {other}"
        assert words in capsys.readouterr().out


def test_a_suite_says_how_probably_one_scores_more_and_draws_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "aggregate", functools.partial(suite.aggregate, resamples=100))
    scores = {
        "bc": {"x": [1.0, 3.0], "y": [2.0, 5.0]},
        "mopo": {"x": [2.0, 4.0], "y": [6.0, 7.0]},
        "part": {"x": [9.0]},
    }
    for name, row in scores.items():
        for data, each in row.items():
            for seed, score in enumerate(each):
                folder = tmp_path / data / name / str(seed)
                folder.mkdir(parents=True)
                (folder / "result.json").write_text(json.dumps({"seeds": [seed], "score_last10": [score]}))
    summary = cli_suite.run_suite(cli_suite.Suite(("x", "y"), ("bc", "mopo"), (0, 1), tmp_path, report=True))
    assert summary["improvement"]["mopo"]["bc"][0] == pytest.approx((0.75 + 1) / 2)
    assert summary["improvement"]["bc"]["mopo"][0] == pytest.approx((0.25 + 0) / 2)
    assert set(summary["improvement"]) == {"bc", "mopo"}, "one that lacks a dataset does not compare"
    assert "how probably a run of mopo scores more than one of bc 0.88 [" in capsys.readouterr().out
    assert (tmp_path / "suite.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("begun", [False, True])
def test_a_suite_without_a_finished_run_has_nothing_to_report(begun, tmp_path, capsys):
    out = tmp_path / "suite"
    if begun:
        in_folder(out / "pendulum/bc/1", cli_offline.Offline(seeds=(1,), algorithm=offline.BC))
    before = [*tmp_path.rglob("*")]
    with pytest.raises(SystemExit) as stop:
        cli.main(["suite", "--datasets", "embedded:pendulum", "--report", "--out", str(out)])
    assert stop.value.code == 2
    assert f"--report: {out} holds no finished run" in capsys.readouterr().err
    assert [*tmp_path.rglob("*")] == before


@pytest.mark.parametrize("scored", [True, False])
def test_a_suite_shows_the_returns_of_data_without_a_scale(scored, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "aggregate", lambda scores: {})
    for data, seed, row in (("mine", 1, {}), ("mine", 2, {}), ("known", 1, {"score_last10": [50.0]})):
        if data == "mine" or scored:
            folder = tmp_path / data / "bc" / str(seed)
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps({"seeds": [seed], "last10": [7.0 * seed], **row}))
    summary = cli_suite.run_suite(cli_suite.Suite(("mine", "known"), ("bc",), (1, 2), tmp_path, report=True))
    assert summary["returns"] == {"bc": {"mine": [7.0, 14.0]}}
    assert summary.get("scores") == ({"bc": {"known": [50.0]}} if scored else None)
    assert "10.5 ± 3.5 (2)" in capsys.readouterr().out


def test_list_names_everything(capsys):
    cli.main(["list"])
    out = capsys.readouterr().out
    assert all(name in out for name in (*offline.PRESETS, "ensemble", "embedded:pendulum", "embedded:hopper"))


def test_names_of_settings():
    assert cli_offline.name_of(offline.MOPO) == "mopo"
    assert cli_offline.name_of(cli_offline.algorithm_named("mopo@5")) == "mopo@5"
    assert cli_offline.name_of(cli.demo_settings(Path("x"), 0).algorithm) == "morec-mopo-custom"


@dataclass(frozen=True)
class MineConfig:
    width: int = 3

    def build(self, spec, generator):
        raise NotImplementedError


@dataclass(frozen=True)
class AsksConfig(MineConfig):
    depth: int = field(kw_only=True)


class Point:
    def __init__(self, name, value):
        self.name, self.value, self.load = name, "somewhere:Config", value


def test_learners_of_other_packages_are_found(monkeypatch):
    points = [Point("mine", lambda: MineConfig), Point("broken", lambda: 1 / 0), Point("no", lambda: int)]
    points += [
        Point("asks", lambda: AsksConfig),
        Point("made", MineConfig),
        Point("single", lambda: MineConfig),
    ]
    monkeypatch.setattr(choices.metadata, "entry_points", lambda group: points if group == "mbrl.learners" else [])
    with pytest.warns(UserWarning, match="learner") as warned:
        found = choices.learners()
    assert found["mine"] == MineConfig()
    assert set(found) == {
        "ensemble",
        "mixer",
        "ensemble-scaled",
        "single",
        "single-gaussian",
        "plrnn",
        "ode",
        "hyper",
        "experts",
        "mine",
    }
    assert found["single"] == choices.SingleConfig()
    assert len(warned) == 5


@pytest.mark.slow
def test_a_suite_shares_its_models_and_is_not_run_twice(pendulum, tmp_path, capsys, monkeypatch):
    out = tmp_path / "suite"
    fits = []
    original = offline.fit
    monkeypatch.setattr(offline, "fit", lambda *a, **k: (fits.append(1), original(*a, **k))[1])
    args = [
        "suite",
        "--datasets",
        str(pendulum),
        "--algorithms",
        "mopo@0.5",
        "mopo",
        "bc",
        "--seeds",
        "1",
        "--out",
        str(out),
    ]
    args += ["--updates", "20", "--evaluate-every", "10", "--episodes", "1", "--scale", "hopper-medium-v2"]
    args += [
        "--fitting.max-epochs",
        "1",
        "dynamics:ensemble",
        "--dynamics.hidden",
        "8",
        "--dynamics.weight-decay",
        "0",
        "0",
    ]
    monkeypatch.setitem(offline.PRESETS, "mopo", tiny(offline.MOPO))
    cli.main(args)
    assert len(fits) == 1, "two penalties, one fit"
    summary = json.loads((out / "summary.json").read_text())
    assert {a: set(row) for a, row in summary["scores"].items()} == {
        a: {"pendulum-random"} for a in ("mopo@0.5", "mopo", "bc")
    }
    low, high = scale = worlds.reference_scores("hopper-medium-v2")
    for path in out.glob("*/*/*/result.json"):
        found = json.loads(path.read_text())
        assert found["scale"] == list(scale)
        for what in ("last10", "final"):
            assert found[f"score_{what}"] == pytest.approx([100 * (x - low) / (high - low) for x in found[what]])
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/*/*/result.json")}
    (out / "pendulum-random/bc/1/result.json").unlink()  # one is lost: only it is made again
    (out / "pendulum-random/bc/1/config.json").unlink()
    cli.main(args)
    after = {p: p.stat().st_mtime_ns for p in out.glob("*/*/*/result.json")}
    assert {p.parent.parent.name for p in after if after[p] != stamps[p]} == {"bc"}
    assert len(fits) == 1
    lost = out / "pendulum-random/mopo/1"  # one was interrupted: it is gone on with, to the same numbers
    before = Run.open(lost)
    agent, metrics = before.load("agent")[0], before.metrics()
    (lost / "result.json").unlink()
    (lost / "checkpoints/agent.safetensors").unlink()
    cli.main(args)
    again = Run.open(lost)
    assert (lost / "result.json").exists()
    assert all(torch.equal(v, again.load("agent")[0][k]) for k, v in agent.items())
    assert again.metrics() == metrics


MINE = """
from dataclasses import dataclass
from mbrl.dynamics.single import SingleConfig


@dataclass(frozen=True)
class Size:
    width: int = 8


@dataclass(frozen=True)
class MineConfig:
    size: Size = Size()

    def build(self, spec, generator=None):
        width = (self.size.width,)
        return SingleConfig(gaussian=True, hidden=width, weight_decay=(0.0, 0.0)).build(spec, generator)
"""


@pytest.mark.slow
def test_a_learner_of_another_package_goes_everywhere(pendulum, tmp_path, monkeypatch):
    """From an entry point to a run that was killed, and its policy; settings within settings come along."""
    home = tmp_path / "site"
    (home / "mine-1.0.dist-info").mkdir(parents=True)
    (home / "mine.py").write_text(MINE)
    (home / "mine-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (home / "mine-1.0.dist-info/entry_points.txt").write_text("[mbrl.learners]\nmine = mine:MineConfig\n")
    monkeypatch.setenv("PYTHONPATH", str(home))
    run = tmp_path / "run"
    options = ["--updates", "20", "--episodes", "1", "--fitting.max-epochs", "1", "--quiet"]
    own = ["algorithm:mopo", "--algorithm.agent.hidden", "16", "--algorithm.imagination.rollouts", "20"]
    done = call(
        *("offline", "--dataset", str(pendulum), "--out", str(run), "--seeds", "1"), *options, *own,
        "dynamics:mine", "--dynamics.size.width", "6",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Run.open(run).config["arguments"]["dynamics"] == {
        "_type": "MineConfig", "size": {"_type": "Size", "width": 6},
    }  # fmt: skip
    (run / "result.json").unlink()
    (run / "checkpoints/agent.safetensors").unlink()
    for args in (["offline", "--resume", str(run)], ["eval", str(run), "--episodes", "1", "--plan"]):
        done = call(*args)
        assert done.returncode == 0, done.stderr
    assert "1, planned" in done.stdout


def tiny(config):
    from dataclasses import replace

    return replace(config, imagination=replace(config.imagination, rollouts=50, every=10, horizon=2))
