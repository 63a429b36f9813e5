"""The command `mbrl meta`."""

import json

import pytest
from worlds import interrupted

from mbrl import cli_meta
from mbrl.choices import MIXERS
from mbrl.cli import main
from mbrl.run import Run

QUICK = ["--trajectories", "2", "--tests", "3", "--threads", "1", "--seed", "3", "--fit.outer", "6", "--fit.warm", "2",
         "--adapt-updates", "5", "--save-every", "2", "--quiet"]  # fmt: skip
TWO = ("--families", "harmonic,damped-harmonic", "--environments", "2")
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
    assert all(0 < x <= 1 + 1e-6 for x in found["confidence"])
    assert (tmp_path / "a" / "report.png").stat().st_size > 10_000
    assert [x["step"] for x in Run.open(tmp_path / "a").metrics()] == [1, 2, 3, 4, 5, 6]


def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, capsys):
    whole = go(tmp_path / "a")
    with interrupted(2), pytest.raises(SystemExit):
        go(tmp_path / "b")
    assert f"mbrl meta --resume {tmp_path / 'b'}`" in capsys.readouterr().out
    main(["meta", "--resume", str(tmp_path / "b"), "--quiet"])
    again = json.loads((tmp_path / "b" / "result.json").read_text())
    assert timeless(again) == timeless(whole)


@pytest.mark.parametrize(("learner", "experts"), [("meta-learner", 1), ("separate", 4), ("naive-gate", 2)])
def test_what_stands_beside_has_as_many_experts_as_it_should(tmp_path, learner, experts):
    found = go(tmp_path / "a", learner=learner, settings=["--dynamics.expert.main", "8"])
    assert found["experts"] == experts
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


def test_families_are_counted_and_their_errors_averaged():
    labels = ["a:0", "a:1", "b:0"]
    assert cli_meta.kinds(labels) == ["a", "a", "b"]
    assert cli_meta.by_family(labels, [1.0, 3.0, 5.0]) == {"a": 2.0, "b": 5.0}
    assert [cli_meta.name_of(x) for x in MIXERS.values()] == list(MIXERS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--families", "harmonics"], "'harmonics'"),
        (["--families", "harmonic,driven-pendulum"], "actions of several widths"),
        (["--families", "harmonic", "--environments", "0"], "n=0"),
        (["--families", "harmonic", "--environments", "1"], "hold 1 systems, expected two"),
        (["--families", "harmonic", "--experts", "9"], "5 systems, expected two and as many as the 9 experts"),
        (["--families", "harmonic", "--shots", "0"], "--shots 0: expected at least 1"),
        (["--families", "harmonic", "--fit.length", "500"], "no window of 500 steps"),
        (["--families", "harmonic", "--fit.lr", "nan"], "rates in (0, 1)"),
        (["--families", "harmonic", "--noise", "-1"], "noise=-1"),
        (["--families", "harmonic", "--irregular", "1"], "irregular=1"),
        (["--families", "cartpole-pole", "--irregular", "0.5"], "is of a simulator"),
        ([], "--families is missing"),
    ],
)
def test_bad_input_is_one_error_and_no_folder(tmp_path, capsys, words, says):
    with pytest.raises(SystemExit):
        go(tmp_path / "a", *words, which=())
    assert says in said(capsys)
    assert not (tmp_path / "a").exists()


def test_another_set_cannot_be_gone_on_with(tmp_path, capsys):
    go(tmp_path / "a")
    (tmp_path / "a" / "result.json").unlink()
    with pytest.raises(SystemExit):
        main(["meta", "--resume", str(tmp_path / "a"), "--families", "four"])
    assert "is of harmonic,damped-harmonic; it cannot go on with four" in said(capsys)
