"""The command `mbrl reconstruct`: what it leaves behind, resuming, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from mbrl_envs import systems

from mbrl import cli, cli_reconstruct
from mbrl.run import Run

QUICK = ["--threads", "1", "--quiet", "--seeds", "0", "--ahead", "5", "--schedule.batches", "10",
         "--schedule.length", "20", "--fitting.max-epochs", "1", "--fitting.length", "5"]  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(cli_reconstruct, "EXPONENTS", 300)


@pytest.fixture
def spiral(tmp_path):
    """A damped, kicked oscillation, [600, 2]."""
    rng, x, out = np.random.default_rng(0), np.zeros(2), []
    turn = 0.98 * np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    for _ in range(600):
        x = turn @ x + 0.1 * rng.standard_normal(2)
        out.append(x)
    path = tmp_path / "spiral.npy"
    np.save(path, np.array(out))
    return path


def go(*words, epochs=8, learner="plrnn", options=("--dynamics.kind.hidden", "8")):
    cli.main(
        ["reconstruct", *QUICK, "--schedule.epochs", str(epochs), *map(str, words), f"dynamics:{learner}", *options]
    )


def result(folder):
    return json.loads((folder / "result.json").read_text())


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------- what it leaves behind


def test_a_run_holds_scores_nulls_exponents_and_a_picture(tmp_path, spiral):
    go("--data", spiral, "--out", tmp_path / "a", "--seeds", "0", "1")
    got = result(tmp_path / "a")
    rows = got["learners"]["plrnn"]
    assert len(rows) == 2
    assert {"d_stsp_histogram30", "d_h_sigma20", "pe_5", "lyapunov", "fixed_points"} <= set(rows[0])
    assert rows[0]["pe_5"] != rows[1]["pe_5"]
    assert {"iid_gaussian", "phase_surrogate", "persistence", "truth"} <= set(got["nulls"])
    assert any(k.startswith("var(") for k in got["nulls"])
    assert (got["steps"], got["test_steps"]) == (420, 180)
    assert got["true_lyapunov"] is None
    assert (tmp_path / "a/report.png").stat().st_size > 20_000
    stages = [x for x in Run.open(tmp_path / "a").metrics() if x["stage"] == "fit plrnn"]
    assert [x["step"] for x in stages] == list(range(1, 9))
    assert {"mse", "alpha"} <= set(stages[0])


def test_learners_side_by_side(tmp_path, spiral):
    go("--data", spiral, "--out", tmp_path / "a", "--compare", "plrnn", "plrnn-almost-linear", "ode", epochs=2)
    got = result(tmp_path / "a")
    assert list(got["learners"]) == ["plrnn", "plrnn-almost-linear", "ode"]
    assert all(got["parameters"][k] > 0 for k in got["learners"])


def test_driven_data_are_judged_under_their_inputs(tmp_path):
    """x' = 0.9 x + u: a PLRNN's free run comes close, and a VARX's, which is the system, nearly exactly."""
    rng = np.random.default_rng(1)
    u = rng.uniform(-1, 1, 800)
    x = [0.0]
    for value in u[:-1]:
        x.append(0.9 * x[-1] + value)
    path = tmp_path / "driven.csv"
    np.savetxt(path, np.stack([x, u], 1), delimiter=",", header="level,valve", comments="")
    words = ("--data", path, "--inputs", "valve", "--out", tmp_path / "a", "--schedule.lr", "2e-2")
    options = ("--dynamics.kind.hidden", "8", "--dynamics.forcing.alpha", "0.3")
    go(*words, "--schedule.lr-end", "1e-3", epochs=100, learner="plrnn-gtf", options=options)
    got = result(tmp_path / "a")
    (row,) = got["learners"]["plrnn-gtf"]
    assert row["rmse"][0] < 0.3 * np.std(x)
    assert "lyapunov" not in row
    assert got["nulls"]["varx(10)"]["rmse"][0] < 1e-3 < np.std(x) / 2 < got["nulls"]["persistence"]["rmse"][0]


def test_a_known_system_brings_its_exponents(tmp_path):
    go("--data", "system:henon", "--steps", "400", "--out", tmp_path / "a", epochs=2)
    got = result(tmp_path / "a")
    assert got["true_lyapunov"][0] == pytest.approx(0.419, abs=0.08)
    assert sum(got["true_lyapunov"]) == pytest.approx(np.log(0.3), abs=1e-6)  # the area shrinks by b each step


def test_a_stiff_system_has_no_exponents_here():
    assert cli_reconstruct.true_exponents(systems.system("ks-64"), 0.25) == []


def test_medians_count_seeds_that_diverged():
    rows = lambda key, *values: [{key: x} for x in values]
    assert cli_reconstruct.middle(rows("pe_5", 1.0, math.inf, 3.0), "pe_5") == 3.0
    assert cli_reconstruct.middle(rows("pe_5", 1.0, math.inf, math.inf), "pe_5") == math.inf
    assert cli_reconstruct.middle(rows("lyapunov", [0.9], [], [0.7]), "lyapunov") == 0.9
    assert cli_reconstruct.middle(rows("lyapunov", [], [], [0.9]), "lyapunov") is None


def test_the_exponents_of_a_linear_model_are_its_own():
    """z' = A z: |A| gives them."""
    from mbrl.core import Spec
    from mbrl.dynamics.plrnn import AlmostLinear, PlrnnConfig

    model = PlrnnConfig(AlmostLinear(0)).build(Spec(2))
    with torch.no_grad():
        model.theta["A"].copy_(torch.tensor([0.9, 0.5]))
        model.theta["W"].zero_()
    found = cli_reconstruct.exponents(model, torch.ones(3, 2), (), 0.5)
    assert found == pytest.approx([np.log(0.9) / 0.5, np.log(0.5) / 0.5], rel=1e-4)


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("learner", ["plrnn", "ode"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, spiral, monkeypatch, learner):
    monkeypatch.setattr(cli_reconstruct, "SAVE_EVERY", 0.0)
    options = () if learner == "ode" else ("--dynamics.kind.hidden", "8")
    words = ("--data", spiral, "--fitting.max-epochs", "3")
    go(*words, "--out", tmp_path / "a", learner=learner, options=options)
    save, count = Run.save, []

    def failing(self, name, *rest):
        save(self, name, *rest)
        count.append(name)
        if len(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", failing)
    with pytest.raises(SystemExit):
        go(*words, "--out", tmp_path / "b", learner=learner, options=options)
    assert all(name.endswith(".partial") for name in count)
    monkeypatch.setattr(Run, "save", save)
    cli.main(["reconstruct", "--resume", str(tmp_path / "b"), "--quiet"])
    assert result(tmp_path / "b")["learners"] == result(tmp_path / "a")["learners"]


def test_other_data_or_a_finished_run_are_not_gone_on_with(tmp_path, spiral, capsys, monkeypatch):
    monkeypatch.setattr(cli_reconstruct, "judge", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        go("--data", spiral, "--out", tmp_path / "a", epochs=1)
    capsys.readouterr()
    other = tmp_path / "other.npy"
    np.save(other, np.load(spiral) + 1)
    with pytest.raises(SystemExit):
        cli.main(["reconstruct", "--resume", str(tmp_path / "a"), "--data", str(other), "--quiet"])
    assert "not the data of" in said(capsys)
    monkeypatch.undo()
    cli.main(["reconstruct", "--resume", str(tmp_path / "a"), "--quiet"])
    with pytest.raises(SystemExit):
        cli.main(["reconstruct", "--resume", str(tmp_path / "a"), "--quiet"])
    assert "has finished" in said(capsys)


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--data is missing"),
        (["--data", "system:lorenz"], "lorenz"),
        (["--data", "system:list"], "lorenz63"),
        (["--data", "nothing.npy"], "nothing.npy"),
        (["--data", "{spiral}", "--holdout", "2"], "--holdout: got 2.0"),
        (["--data", "{spiral}", "--ahead", "400"], "--ahead 400"),
        (["--data", "{spiral}", "--columns", "level"], "level"),
        (["--data", "{spiral}", "--compare", "lstm"], "--compare lstm"),
        (["--data", "{spiral}", "--test", "{other}"], "{other}"),
        (["--data", "{broken}"], "{broken}"),
    ],
)
def test_bad_input_is_one_error_and_no_folder(tmp_path, spiral, capsys, words, says):
    other, broken = tmp_path / "wide.npy", tmp_path / "broken.npy"
    np.save(other, np.zeros((300, 3)) + np.arange(300)[:, None])
    np.save(broken, np.full((300, 2), np.nan))
    named = {"spiral": spiral, "other": other, "broken": broken}
    with pytest.raises(SystemExit):
        go(*[w.format(**named) for w in words], "--out", tmp_path / "a")
    assert says.format(**{k: v.stem for k, v in named.items()}) in said(capsys)
    assert not (tmp_path / "a").exists()


def test_a_window_longer_than_the_data_says_so(tmp_path, spiral, capsys):
    with pytest.raises(SystemExit):
        go("--data", spiral, "--out", tmp_path / "a", "--schedule.length", "5000")
    assert "the longest stretch of the training part has 419 steps" in said(capsys)
