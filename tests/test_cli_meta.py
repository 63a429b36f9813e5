"""The command `mbrl meta`."""

import json
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from mbrl_envs import series as read
from worlds import interrupted

from mbrl import cli_meta, cli_plan
from mbrl import device as devices
from mbrl.choices import MIXERS
from mbrl.cli import main
from mbrl.dynamics.mixer import FIT, Coda, MixerConfig, fit_mixer
from mbrl.run import Run, RunError

QUICK = ["--threads", "1", "--seed", "3", "--fit.outer", "6", "--fit.warm", "2",
         "--adapt-updates", "5", "--save-every", "2", "--quiet"]  # fmt: skip
TWO = ("--families", "harmonic,damped-harmonic", "--environments", "2", "--trajectories", "2", "--tests", "3")
SMALL = ["--dynamics.expert.hidden", "8", "8"]


def go(out, *words, which=TWO, learner="mixer-coda", settings=SMALL):
    main(["meta", *which, "--out", str(out), *QUICK, *words, f"dynamics:{learner}", *settings])
    return json.loads((out / "result.json").read_text())


def timeless(result):
    return {k: v for k, v in result.items() if k not in ("fit_s", "wall_s")}


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_a_run_holds_errors_assignments_contexts_and_a_picture(tmp_path):
    found = go(tmp_path / "a")
    assert found["labels"] == ["harmonic:0", "harmonic:1", "damped-harmonic:0", "damped-harmonic:1"]
    assert found["experts"] == 2
    assert len(found["errors"]) == len(found["assigned"]) == 4
    assert len(found["loss"]) == 6
    assert found["assignments"][-1][1] == found["assigned"]
    assert {x.rpartition(":")[0] for x in found["new_labels"]} == {"harmonic", "damped-harmonic"}
    assert len(found["new_errors"]) == len(found["new_labels"]) == len(found["confidence"])
    assert all(0 < x <= 1 for x in found["confidence"])
    assert len(found["nulls"]) == 4
    assert found["steps"] == [found["steps"][0]] * 2  # all of one length
    assert len(found["new_nulls"]) == len(found["new_labels"])
    assert (tmp_path / "a" / "report.png").stat().st_size > 10_000
    assert [x["step"] for x in Run.open(tmp_path / "a").metrics()] == [1, 2, 3, 4, 5, 6]


def test_contexts_of_one_number_are_drawn_on_a_line(tmp_path, monkeypatch):
    files, kept = tuple(map(Path, series(tmp_path, (0.1, 0.2, 0.3), "abc", steps=40))), []
    args = cli_meta.Meta(data=files[:2], new=files[2:], seed=0, adapt_updates=1)
    data = cli_meta.load(args)
    model = MixerConfig(Coda((4,)), 1, 1).build(data.train.spec, devices.generator(0))
    report = fit_mixer(model, data.train, replace(FIT, outer=1, warm=0), devices.generator(1))
    result = cli_meta.judged(args, data, model.requires_grad_(False), report)
    monkeypatch.setattr(cli_meta, "save_figure", lambda figure, path: kept.append(figure))
    cli_meta.draw(tmp_path / "a.png", result, data, model)
    drawn = [x for points in kept[0].axes[0].collections for x in points.get_offsets().tolist()]
    table = model.contexts[:, 0].double()
    ours = torch.cat([table, torch.tensor(result["new_contexts"])[:, 0]]) - table.mean()
    assert sorted(abs(x) for x, _ in drawn) == pytest.approx(sorted(ours.abs().tolist()))
    assert all(y == 0 for _, y in drawn)
    plt.close(kept[0])


def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, capsys, monkeypatch):
    whole = go(tmp_path / "a")
    with interrupted(2), pytest.raises(SystemExit):
        go(tmp_path / "b")
    assert f"mbrl meta --resume {tmp_path / 'b'}`" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    main(["meta", "--resume", "b", "--out", "b", "--quiet"])
    again = json.loads((tmp_path / "b" / "result.json").read_text())
    assert timeless(again) == timeless(whole)


@pytest.mark.parametrize(("learner", "experts"), [("meta-learner", 1), ("separate", 4), ("naive-gate", 2)])
def test_what_stands_beside_has_as_many_experts_as_it_should(tmp_path, learner, experts):
    found = go(tmp_path / "a", learner=learner, settings=["--dynamics.expert.main", "8"])
    assert found["experts"] == experts
    assert (found["purity"] is None) == (experts != 2)  # where there is no choice
    if learner == "separate":
        assert found["assigned"] == [0, 1, 2, 3]
        assert "new_errors" not in found  # contexts that stay cannot adapt
    assert found["learner"] == learner


def test_tasks_of_robots_are_systems_too(tmp_path):
    which = ("--families", "cartpole-pole", "--steps", "60")
    found = go(tmp_path / "a", "--fit.length", "5", "--experts", "2", which=which)
    assert len(found["errors"]) == 10
    assert found["experts"] == 2
    assert found["labels"][0] == "cartpole-pole:0.4"
    assert found["purity"] is None  # of one family


def test_what_it_has_learned_of_a_simulator_plans_there(tmp_path, capsys):
    which = ("--families", "cartpole-pole", "--steps", "60", "--experts", "1")
    go(tmp_path / "a", "--fit.length", "5", which=which)
    small = ["planner:icem", "--planner.horizon", "3", "--planner.samples", "16"]
    plan = lambda env, out: main(
        ["plan", "--env", env, "--model", str(tmp_path / "a"), "--seed", "0", "--episodes", "1", "--threads", "1",
         "--quiet", "--out", str(out), *small]
    )  # fmt: skip
    plan("mbrl_envs/CartPoleLength-v0", tmp_path / "b")
    found = json.loads((tmp_path / "b" / "result.json").read_text())
    assert np.isfinite(found["returns"][0][1])
    assert Run.open(tmp_path / "b").metrics()[-1]["lost"] == 0
    with pytest.raises(SystemExit):
        plan("Pendulum-v1", tmp_path / "c")
    assert "its model is of cartpole-pole; Pendulum-v1 has 3 observations" in said(capsys)


def test_planning_follows_by_what_the_run_has_kept(tmp_path):
    which = ("--families", "cartpole-pole", "--steps", "60", "--experts", "1")
    go(tmp_path / "a", "--fit.length", "5", which=which)
    env = gym.make("mbrl_envs/CartPoleLength-v0")
    args = cli_plan.Plan(env="mbrl_envs/CartPoleLength-v0", seed=0, model=str(tmp_path / "a"))
    given = lambda args, reward=None: cli_plan._given(args, env, reward, None, torch.device("cpu"))
    control = given(args)
    data = cli_meta.load(cli_meta.Meta(families="cartpole-pole", steps=60, seed=3)).train
    assert control.scale.tolist() == pytest.approx((data.next_obs - data.obs).square().mean(0).tolist(), rel=1e-5)
    assert control.mpc.dt == data.dt
    assert control.mpc.reward is not None  # the tasks' own
    assert cli_meta.functions_of(cli_meta.Meta(families="cartpole-pole"), "Pendulum-v1") == (None, None)
    assert torch.equal(control.first[0], control.mpc.model.contexts.mean(0))
    with pytest.raises(RunError, match="tells no reward, and none is known"):
        given(replace(args, reward="learned"))
    own = lambda obs, act, after: after[:, 0]
    assert given(replace(args, reward="learned"), own).mpc.reward is own
    with pytest.raises(ValueError, match=r"the mixture of .*a is not uncertain; leave both out"):
        given(replace(args, worth=replace(args.worth, pessimism=1.0)))
    go(tmp_path / "b", "--fit.length", "5", which=which[:-2], learner="separate", settings=[])
    with pytest.raises(RunError, match="separate models, none of which adapts"):
        given(replace(args, model=str(tmp_path / "b")))
    run = Run.open(tmp_path / "a")
    tensors, facts = run.load("model")
    run.save("model", tensors, facts | {"act_high": [2.0]})
    with pytest.raises(RunError, match=r"its actions span \[-1.0\] to \[2.0\]"):
        given(args)


def series(folder, rates, names, steps=120):
    """A file of two waves for each rate."""
    time = np.arange(steps)[:, None]
    for name, rate in zip(names, rates, strict=True):
        np.save(folder / f"{name}.npy", np.concatenate([np.sin(rate * time), np.cos(rate * time)], 1))
    return [str(folder / f"{name}.npy") for name in names]


def test_files_of_ones_own_are_systems(tmp_path, capsys):
    files = series(tmp_path, (0.1, 0.2, 0.5), "abc")
    which = ("--data", *files[:2], "--new", files[2], "--experts", "2")
    whole = go(tmp_path / "a", which=which)
    assert (whole["labels"], whole["new_labels"]) == (["a:0", "b:1"], ["c:2"])
    assert whole["purity"] is None
    assert whole["experts"] == 2
    assert len(whole["errors"]) == 2
    assert len(whole["new_errors"]) == 1
    with interrupted(2), pytest.raises(SystemExit):
        go(tmp_path / "b", which=which)
    capsys.readouterr()
    for name in "ac":  # in what judges, of a system in training and of a new one
        kept = np.load(tmp_path / f"{name}.npy")
        np.save(tmp_path / f"{name}.npy", np.concatenate([kept[:110], kept[110:] + 0.1]))
        with pytest.raises(SystemExit):
            main(["meta", "--resume", str(tmp_path / "b"), "--quiet"])
        assert "are not the files that it was begun with" in said(capsys)
        np.save(tmp_path / f"{name}.npy", kept)
    main(["meta", "--resume", str(tmp_path / "b"), "--quiet"])
    assert timeless(json.loads((tmp_path / "b" / "result.json").read_text())) == timeless(whole)


def test_files_are_cut_in_two_and_keep_their_intervals(tmp_path):
    files = series(tmp_path, (0.1, 0.2), "ab")
    for name, file, dt in zip("ab", files, (1.0, 0.5), strict=True):
        np.savez(tmp_path / f"{name}.npz", obs=np.load(file), dt=dt)
    args = cli_meta.Meta(data=(tmp_path / "a.npz", tmp_path / "b.npz"), seed=0, holdout=0.25)
    data = cli_meta.load(args)
    assert data.train.lengths.tolist() == [90, 90]
    assert data.test.lengths.tolist() == [30, 30]
    assert data.train.dts.unique_consecutive().tolist() == [1.0, 0.5]
    assert data.train.system.tolist() == [0, 1]
    assert np.allclose(data.test.obs[:30].numpy(), np.load(files[0])[90:])


def test_a_model_that_knows_nothing_stays_at_the_start_or_at_the_mean():
    from mbrl_envs import series

    still, away, short = [1.0, 1.0, 1.0, 3.0], [5.0, 1.0, -1.0, 1.0], [2.0, 4.0]
    stack = lambda *xs: np.concatenate(xs)[:, None]
    waves = [series.from_arrays(stack(still)), series.from_arrays(stack(away, short), lengths=[4, 2])]
    known = [series.from_arrays(np.full((2, 1), x)) for x in (9.0, 0.5)]  # the data's means
    found = cli_meta.nulls(series.mixed(waves, "x", {}), series.mixed(known, "y", {}))
    mean = ((0.5**2 + 1.5**2 + 0.5**2) / 3 + 3.5**2 / 16) / 2  # each episode to its end
    assert found.tolist() == pytest.approx([2.0**2 / 11, mean], rel=1e-6)


def test_a_column_is_a_number_only_where_it_is_one(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(read, "read_series", lambda path, *names, dt: given.append(names) or 1 / 0)
    args = cli_meta.Meta(data=(tmp_path / "a.npy",), seed=0, columns=("1", "-1", "--1", "\u00b2"), inputs=("x",))
    with pytest.raises(ZeroDivisionError):
        cli_meta.load(args)
    assert given == [([1, -1, "--1", "\u00b2"], ["x"])]


def test_files_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "x").mkdir()
    files = [*series(tmp_path, (0.1,), "a"), *series(tmp_path / "x", (0.2,), "a")]
    data = cli_meta.load(cli_meta.Meta(data=tuple(map(Path, files)), seed=0))
    assert cli_meta.kinds(data.labels) == files


def test_a_file_of_several_episodes_is_cut_between_them(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(5, 6, 2)))
    np.save(tmp_path / "b.npy", np.random.default_rng(1).normal(size=(2, 6, 2)))
    data = cli_meta.load(cli_meta.Meta(data=(tmp_path / "a.npy", tmp_path / "b.npy"), seed=0))
    assert data.train.lengths.tolist() == [6] * 5
    assert data.test.lengths.tolist() == [6] * 2
    assert data.test.system.tolist() == [0, 1]


def test_families_are_counted_and_their_errors_averaged():
    labels = ["a:0", "a:1", "b:0"]
    assert cli_meta.kinds(labels) == ["a", "a", "b"]
    assert cli_meta.by_family(labels, [1.0, 3.0, 5.0]) == {"a": 2.0, "b": 5.0}
    assert [cli_meta.name_of(x) for x in MIXERS.values()] == list(MIXERS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--families", "harmonics"], "'harmonics'; did you mean harmonic"),
        (["--families", "hopper"], "a sequence of tasks (cheetah-body"),
        (["--families", "four", "--data", "x.npy"], "are both given"),
        (["--data", "no.npy"], "--experts is missing"),
        (["--data", "no.npy", "--experts", "2"], "no.npy: no such file"),
        (["--data", "no.npy", "--experts", "2", "--noise", "0.1", "--shots", "2"], "--noise, --shots: not for files"),
        (["--data", "a.npy", "b.npy", "--new", "c.npy", "--experts", "2"], "system 0 has no window of 10 steps"),
        (["--families", "harmonic", "--holdout", "0.5"], "--holdout: not for harmonic"),
        (
            ["--families", "cartpole-pole", "--trajectories", "9"],
            "--trajectories: not for cartpole-pole, which is of a",
        ),
        (["--families", "harmonic", "--experts", "0"], "--experts 0: expected at least 1"),
        (["--families", "harmonic", "--threads", "-1"], "--threads -1"),
        (["--families", "harmonic,harmonic"], "--families harmonic harmonic: expected each once"),
        (["--families", "driven,driven-pendulum"], "a set holds what is named beside it; expected each family once"),
        (["--families", "harmonic", "--seed", str(2**70)], f"--seed {2**70}: expected 0 to 2^62"),
        (["--families", "harmonic", "--seed", "-1"], "--seed -1: expected 0 to 2^62"),
        (["--families", "harmonic", "--steps", "9"], "--steps: not for harmonic"),
        (["--families", "harmonic", "--fit.warm", "6"], "--fit.outer 6: systems change places after the first 6"),
        (
            ["--data", "a.npy", "b.npy", "--holdout", "0.999", "--experts", "2"],
            "cannot be cut in two by --holdout 0.999",
        ),
        (["--families", "harmonic", "--fit.warm", "-1"], "warm is -1, expected at least 0"),
        (["--families", "harmonic", "--fit.guard", "-1"], "guard is -1.0, expected a number above 0"),
        (["--families", "harmonic,driven-pendulum"], "actions of several widths"),
        (["--families", "harmonic", "--environments", "0"], "n=0"),
        (["--families", "harmonic", "--environments", "1"], "hold 1 systems, expected two"),
        (["--families", "harmonic", "--experts", "9"], "5 systems, expected two and as many as the 9 experts"),
        (["--families", "harmonic", "--shots", "0"], "--shots 0: expected at least 1"),
        (["--families", "harmonic", "--fit.length", "500"], "no window of 500 steps"),
        (["--families", "harmonic", "--fit.lr", "nan"], "lr is nan, expected a rate above 0"),
        (["--families", "harmonic", "--noise", "-1"], "noise=-1"),
        (["--families", "harmonic", "--irregular", "1"], "irregular=1"),
        (["--families", "cartpole-pole", "--irregular", "0.5"], "is of a simulator"),
        ([], "--families and --data are missing"),
    ],
)
def test_bad_input_is_one_error_and_no_folder(tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    series(tmp_path, (0.1, 0.2), "ab")
    series(tmp_path, (0.3,), "c", steps=12)
    with pytest.raises(SystemExit):
        go(tmp_path / "a", *words, which=())
    assert says in said(capsys)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["--experts", "2", "dynamics:separate"], "--experts 2: not for separate"),
        (["--experts", "2", "dynamics:meta-learner"], "--experts 2: not for meta-learner"),
        (
            ["dynamics:mixer-coda", "--dynamics.expert.hidden", "8", "-5"],
            "hidden of Coda is (8, -5), expected units of each layer",
        ),
        (
            ["dynamics:mixer-coda", "--dynamics.solver.substeps", "0"],
            "substeps of the solver is 0, expected at least 1",
        ),
        (["dynamics:mixer-coda", "--dynamics.experts", "3"], "pass --experts 3"),
    ],
)
def test_settings_of_the_learner_that_cannot_be(tmp_path, capsys, settings, says):
    with pytest.raises(SystemExit):
        main(["meta", *TWO, "--out", str(tmp_path / "a"), *QUICK, *settings])
    assert says in said(capsys)
    assert not (tmp_path / "a").exists()


def test_a_mixture_of_one_expert_goes_on_by_its_name(tmp_path):
    with interrupted(2), pytest.raises(SystemExit):
        go(
            tmp_path / "a",
            which=("--families", "harmonic", "--environments", "2", "--trajectories", "2", "--tests", "3"),
        )
    main(["meta", "--resume", str(tmp_path / "a"), "--quiet", "dynamics:mixer-coda", *SMALL])
    assert Run.open(tmp_path / "a").result["experts"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--families", "four"], "not by --families four (its own is harmonic,damped-harmonic)"),
        (["--fit.outer", "9"], "not by --fit.outer 9 (its own is 6)"),
        (["dynamics:mixer-geps"], "not by dynamics: mixer-geps (its own is mixer-coda)"),
        (["dynamics:mixer-coda", "--dynamics.expert.hidden", "9"], "--dynamics.expert.hidden 9 (its own is 8 8)"),
    ],
)
def test_a_run_goes_on_by_its_own_settings(tmp_path, capsys, words, says):
    with interrupted(2), pytest.raises(SystemExit):
        go(tmp_path / "a")
    with pytest.raises(SystemExit):
        main(["meta", "--resume", str(tmp_path / "a"), *words])
    assert says in said(capsys)


def test_a_mixture_does_not_go_on_as_a_meta_learner(tmp_path, capsys):
    with interrupted(1), pytest.raises(SystemExit):
        go(tmp_path / "a", learner="mixer", settings=["--dynamics.expert.main", "8"])
    with pytest.raises(SystemExit):
        main(["meta", "--resume", str(tmp_path / "a"), "--quiet", "dynamics:meta-learner"])
    assert "not by dynamics: meta-learner (its own is mixer)" in said(capsys)


def test_the_table_says_who_serves_new_systems(capsys):
    result = {"families": None, "learner": "mixer", "labels": ["a:0", "b:1"], "errors": [0.1, 0.2], "nulls": [0.5, 0.6],
              "assigned": [0, 1], "purity": None, "experts": 3, "parameters": 7, "fit_s": 1.0,
              "new_labels": ["a:0", "c:1"], "new_errors": [0.3, 0.4], "new_nulls": [0.7, 0.8],
              "new_assigned": [2, 1], "steps": [8, 57]}  # fmt: skip
    cli_meta.tell(result)
    cli_meta.tell(result | {"steps": [24, 24]})
    text = capsys.readouterr().out
    assert "of 8 to 57 steps each" in " ".join(text.split())
    assert "of 24 steps each" in " ".join(text.split())
    lines = text.splitlines()
    row = lambda name: [x.strip() for x in next(x for x in lines if x.startswith(f"│ {name}")).split("│")[1:-1]]
    assert row("a") == ["a", "1", "0 (new: 2)", "0.1", "0.3", "0.5"]
    assert row("b") == ["b", "1", "1", "0.2", "-", "0.6"]
    assert row("c") == ["c", "new", "1", "-", "0.4", "0.8"]


def test_a_fit_that_is_not_finite_ends_with_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        go(tmp_path / "a", "--fit.lr", "1e30")
    assert "no update of outer step" in said(capsys)
