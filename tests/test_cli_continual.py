"""The command `mbrl continual`."""

import io
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from mbrl_envs import contexts
from rich.console import Console
from worlds import interrupted

from mbrl import cli_continual, continual
from mbrl.cli import main
from mbrl.dynamics.hyper import HyperConfig, HyperFit
from mbrl.run import Run, from_plain

QUICK = ["--steps", "120", "--budget.updates", "30", "--budget.batch", "16", "--budget.save-every", "10", "--quiet"]
POLES = ("--tasks", "cartpole-pole")
BAD = ["dynamics:hyper", "--dynamics.learner.embedding", "0"]
SMALL = ["--dynamics.learner.hidden", "12", "12"]


def go(out, *words, student="finetune", tasks=("--tasks", "cartpole-pole", "--first", "2", "--seed", "3")):
    main(["continual", *tasks, "--out", str(out), *QUICK, *words, f"dynamics:{student}", *SMALL])
    return json.loads((out / "result.json").read_text())


def test_a_run_holds_the_matrix_the_memory_the_returns_and_a_picture(tmp_path):
    found = go(tmp_path / "a", "--episodes", "1", "--length", "5", "--random", "0.5")
    assert found["names"] == ["0.4", "0.5"]
    assert [len(row) for row in found["matrix"]] == [2, 2]
    assert all(len(cell) == 2 for row in found["matrix"] for cell in row)
    assert found["memory"][-1]["transitions"] == 0
    assert [len(x) for x in found["returns"]] == [1, 1]
    assert found["quantity"] == "length"
    assert (tmp_path / "a" / "report.png").stat().st_size > 10_000
    stages = {x["stage"] for x in Run.open(tmp_path / "a").metrics()}
    assert {"task 0", "task 1", "explore 0", "explore 1", "errors", "returns"} <= stages


@pytest.mark.parametrize("student", ["hyper", "replay"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, student):
    whole = go(tmp_path / "a", student=student)
    with interrupted(6) as names, pytest.raises(SystemExit):
        go(tmp_path / "b", student=student)
    assert names == ["within", "within", "within", "course", "within", "within"]  # 10, 20, 30; the first task; 10, 20
    main(["continual", "--resume", str(tmp_path / "b"), "--quiet"])
    again = json.loads((tmp_path / "b" / "result.json").read_text())
    assert again["matrix"] == whole["matrix"]
    assert again["memory"] == whole["memory"]
    with pytest.raises(SystemExit):
        main(["continual", "--resume", str(tmp_path / "b"), "--quiet"])


def test_what_was_explored_is_logged_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cli_continual, "TEST", 60)
    monkeypatch.setattr(cli_continual, "draw", lambda path, result: None)
    words = ["--steps", "30", "--random", "0.5", "--length", "8", "planner:icem", "--planner.horizon", "2"]
    with interrupted(1), pytest.raises(SystemExit):  # 10 updates into the task
        go(
            tmp_path / "a",
            *words,
            "--planner.samples",
            "4",
            "--planner.elites",
            "2",
            tasks=(*POLES, "--first", "1", "--seed", "3"),
        )
    main(["continual", "--resume", str(tmp_path / "a"), "--quiet"])
    lines = [(x["stage"], x["step"]) for x in Run.open(tmp_path / "a").metrics()]
    assert lines == [("explore 0", 1), ("explore 0", 2), *(("task 0", n) for n in (10, 20, 30)), ("errors", 0)]


def begun(out, monkeypatch, **kw):
    """A run folder that has begun and learned nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(continual, "run", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            go(out, **kw)
    return out


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    return begun(tmp_path / "a", monkeypatch)


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


OTHER = [
    (["--tasks", "pusher"], "--tasks pusher (its own is cartpole-pole)"),
    (["--first", "4"], "--first 4 (its own is 2)"),
    (["--tasks", "cartpole-pole", "--first", "3"], "--first 3 (its own is 2)"),
    (["--seed", "7"], "--seed 7 (its own is 3)"),
    (["--steps", "100"], "--steps 100 (its own is 120)"),
    (["--out", "elsewhere"], "elsewhere (its own is "),
    (["--budget.updates", "31"], "--budget.updates 31 (its own is 30)"),
    (["--budget.save-every", "20"], "--budget.save-every 20 (its own is 10)"),
    (["planner:cem"], "planner:cem (its own is planner:icem)"),
    (["planner:icem", "--planner.horizon", "9"], "--planner.horizon 9 (its own is 30)"),
    (["dynamics:ewc"], "dynamics:ewc (its own is dynamics:finetune)"),
    (["dynamics:hyper", "--dynamics.anchor.beta", "3"], "dynamics:hyper (its own is dynamics:finetune)"),
    (
        ["dynamics:finetune", "--dynamics.learner.hidden", "9"],
        "--dynamics.learner.hidden 9 (its own is 12 12)",
    ),
]


def test_other_settings_than_its_own_are_refused_by_name_and_do_not_overwrite_a_run(stopped, capsys):
    files = lambda: {x: x.read_bytes() for x in stopped.rglob("*") if x.is_file()}
    before = files()
    capsys.readouterr()
    for words, says in OTHER:
        with pytest.raises(SystemExit):
            main(["continual", "--resume", str(stopped), "--quiet", *words])
        text = said(capsys)
        assert says in text
        assert text.count("its own is") == 1, text
    with pytest.raises(SystemExit):
        main(["continual", "--resume", str(stopped), "--seed", "7", "--steps", "100", "dynamics:ewc"])
    text = said(capsys)
    assert all(x in text for x in ("--seed 7", "--steps 100", "dynamics:ewc"))
    with pytest.raises(SystemExit):
        go(stopped)
    assert "holds a run already" in said(capsys)
    assert files() == before


def test_its_own_settings_may_be_said_again(stopped, capsys):
    own = ["--tasks", "cartpole-pole", "--first", "2", "--seed", "3", "--steps", "120", "--out", str(stopped)]
    main(
        ["continual", "--resume", str(stopped), *own, "--threads", "1", "--device", "cpu", "dynamics:finetune", *SMALL]
    )
    assert (stopped / "result.json").exists()
    out = " ".join(capsys.readouterr().out.split())
    assert "goes on by its own settings: the first 2 of 10 tasks of cartpole-pole, finetune, seed 3, 120 steps" in out


def test_all_tasks_are_as_many_as_there_are(tmp_path, monkeypatch, capsys):
    out = begun(tmp_path / "a", monkeypatch, tasks=("--tasks", "pusher", "--seed", "3"))
    with pytest.raises(SystemExit):
        main(["continual", "--resume", str(out), "--first", "2"])
    assert "--first 2 (its own is 5)" in said(capsys)
    with pytest.raises(SystemExit):
        main(["continual", "--resume", str(out), "--first", "5", "--seed", "4"])
    text = said(capsys)
    assert "--seed 4" in text
    assert "--first" not in text


@pytest.mark.parametrize(
    ("tasks", "words", "says"),
    [
        ((), [], "--tasks is missing"),
        (("--tasks", "kitchen"), [], "'kitchen'"),
        (POLES, ["--random", "2"], "--random is 2.0"),
        (POLES, ["--random", "0"], "--random is 0.0"),
        (POLES, ["--steps", "1"], "--steps is 1"),
        (POLES, ["--first", "0"], "--first is 0, expected 1 to 10"),
        (POLES, ["--first", "99"], "--first is 99, expected 1 to 10"),
        (POLES, ["--first", "99", "--hold", "0"], "tasks of cartpole-pole; --hold is 0"),
        (POLES, ["--seed", "-1"], "--seed is -1"),
        (POLES, ["--seed", str(2**70)], f"--seed is {2**70}"),
        (POLES, ["--threads", "-1"], "--threads -1: expected 0"),
        (POLES, ["--episodes", "-1"], "--episodes is -1"),
        (POLES, ["--length", "0", "--episodes", "1"], "--length is 0"),
        (POLES, ["--horizon", "0"], "--horizon is 0"),
        ((*POLES, "--first", "2"), ["--horizon", "500"], "horizon is 500, expected 1 to"),
        (POLES, ["--budget.updates", "0", "--budget.lr", "nan"], "updates is 0, expected at least 1; lr is nan"),
        (POLES, ["--budget.batch", "0"], "batch is 0"),
        (
            (*POLES, "--first", "1"),
            ["--episodes", "1", "--worth.limit", "1", "--worth.uncertainty", "foo"],
            "the limit is on 'foo'",
        ),
        (("--tasks", "Ant-v5:mass"), ["--episodes", "1"], "no reward is known"),
    ],
)
def test_bad_input_is_one_error_and_no_folder(tmp_path, capsys, tasks, words, says):
    with pytest.raises(SystemExit):
        go(tmp_path / "a", *words, tasks=tasks)
    text = said(capsys)
    assert says in text
    assert text.count("error:") == 1
    assert not (tmp_path / "a").exists()


def test_a_student_that_cannot_be_leaves_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["continual", *POLES, "--first", "1", "--out", str(tmp_path / "a"), *BAD])
    assert "embedding is 0" in said(capsys)
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- the options


def test_a_hypernetwork_is_offered_what_the_budget_does_not_decide(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(continual, "run", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    words = ["continual", *POLES, "--first", "1", "--out", str(tmp_path / "a"), "dynamics:hyper", *SMALL]
    anchor = "--dynamics.anchor.beta 0.3 --dynamics.anchor.past 2 --dynamics.anchor.lr-context 0.01"
    with pytest.raises(SystemExit):
        main(
            [
                *words,
                *anchor.split(),
                "--dynamics.anchor.no-look-ahead",
                "--dynamics.importance",
                "--dynamics.lr",
                "0.003",
            ]
        )
    got = from_plain(Run.open(tmp_path / "a").config["arguments"], cli_continual.TYPES).dynamics
    fit = HyperFit(beta=0.3, past=2, lr_context=0.01, look_ahead=False)
    assert got == continual.Hypernetwork(HyperConfig((12, 12)), fit, importance=True, lr=0.003)
    assert cli_continual.hypernetwork() == continual.STUDENTS["hyper"] == cli_continual.Continual().dynamics
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["continual", "dynamics:hyper", "--help"])
    offered = set(re.findall(r"--dynamics\.anchor\.([a-z-]+)", capsys.readouterr().out))
    assert offered == {"beta", "past", "lr-context", "look-ahead", "no-look-ahead"}


def test_help_says_who_learns_and_where_experts_are(capsys):
    with pytest.raises(SystemExit):
        main(["continual", "--help"])
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert all(f"dynamics:{name}" in text for name in continual.STUDENTS)
    assert "mbrl.dynamics.experts.fit_stream" in text


# ---------------------------------------------------------------- what is shown


def result(n=10, returns=True):
    """Errors that are all different: 1.11e-05 on task 0 after task 0, and so on."""
    matrix = [[[1.11e-5 * (1 + i + n * j), 1.23e-7 * (1 + i + n * j)] for i in range(n)] for j in range(n)]
    names = [f"friction={0.05 * i:g}" for i in range(n)]
    return {
        "tasks": "Hopper-v5:friction", "learner": "hyper", "seed": 0, "names": names, "quantity": "", "horizon": 20,
        "matrix": matrix, "one_step": continual.summary(np.array(matrix)[None, :, :, 0]),
        "returns": [[-12345.0 - i, -12347.0 - i] for i in range(n)] if returns else [],
        "memory": [{"parameters": 7, "extra": 5, "transitions": 3}],
    }  # fmt: skip


def test_the_table_of_ten_tasks_is_whole_at_80_columns(monkeypatch):
    found, out, wide = result(), io.StringIO(), io.StringIO()
    monkeypatch.setattr(cli_continual, "console", Console(width=80, file=wide))
    cli_continual.tell(found | {"names": [f"{x},gravity=1.25" for x in found["names"]]})
    assert "…" not in wide.getvalue()  # names give way, numbers do not
    monkeypatch.setattr(cli_continual, "console", Console(width=80, file=out))
    cli_continual.tell(found)
    lines = out.getvalue().splitlines()
    assert all(len(x) <= 80 for x in lines)
    assert "…" not in out.getvalue()
    one, many = np.array(found["matrix"])[..., 0], np.array(found["matrix"])[..., 1]
    short = lambda x: f"{x:.3g}"
    for i, name in enumerate(found["names"]):
        (row,) = [x.split() for x in lines if x.split()[:1] == [name]]
        before = short(one[i - 1, i]) if i else "-"
        want = [before, *map(short, (one[i, i], one[-1, i], one[-1, i] / one[i, i], many[-1, i], -12346.0 - i))]
        assert row[1:] == want
    (mean,) = [x.split() for x in lines if x.split()[:1] == ["mean"]]
    ratio = np.exp(np.log(one[-1] / one.diagonal())[:-1].mean())
    means = (one.diagonal().mean(), one[-1].mean(), ratio, many[-1].mean(), -12350.5)
    assert mean[1:] == ["-", *map(short, means)]
    text = " ".join(out.getvalue().split())
    assert "normalised squared error, one step" in text
    assert "ratio: final over just after" in text
    assert "20 steps: final" in text
    assert "5 extra (further numbers" in text
    assert "3 transitions (stored" in text


def test_the_table_of_one_task_without_returns(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(cli_continual, "console", Console(width=80, file=out))
    cli_continual.tell(result(1, returns=False))
    assert "return" not in out.getvalue()
    assert "forgetting" not in out.getvalue()


@pytest.mark.parametrize(
    ("tasks", "what"),
    [("cartpole-pole", "length"), ("pusher", "left-right"), ("cheetah-body", ""), ("Hopper-v5:mass", "")],
)
def test_numbers_that_name_tasks_are_of_a_quantity(tasks, what):
    assert cli_continual.quantity(contexts.tasks(tasks)) == what


@pytest.mark.parametrize("returns", [True, False])
def test_the_figure_shows_both_errors_the_returns_and_what_was_not_learned(monkeypatch, tmp_path, returns):
    kept, found = [], result(returns=returns)
    found["matrix"][2][1][1] = float("nan")  # a prediction that diverged
    monkeypatch.setattr(cli_continual, "save_figure", lambda figure, path: kept.append(figure))
    cli_continual.draw(tmp_path / "a.png", found)
    (figure,) = kept
    figure.draw_without_rendering()
    titled = {ax.get_title().replace("\n", " "): ax for ax in figure.axes if ax.get_title()}
    assert len(titled) == 4 + returns
    assert sum("normalised" in x for x in titled) == 4
    assert any("return" in x for x in titled) == returns
    for k, steps in enumerate(("one-step", "20-step")):
        ax = titled[f"{steps} normalised squared error (above the red line: not yet learned)"]
        (image,) = ax.get_images()
        np.testing.assert_array_equal(image.get_array().filled(np.nan), np.array(found["matrix"])[..., k])
        (line,) = ax.lines  # goes between the diagonal and what is right of it
        points = {tuple(x) for x in line.get_xydata()}
        assert points == {(j + 0.5, j - 0.5) for j in range(9)} | {(j + 0.5, j + 0.5) for j in range(9)}
        curves = titled[f"{steps} normalised squared error of each task, from its turn on"].lines
        for i, curve in enumerate(curves):
            np.testing.assert_array_equal(curve.get_xdata(), range(i, 10))
            np.testing.assert_array_equal(curve.get_ydata(), [row[i][k] for row in found["matrix"][i:]])
    (legend,) = figure.legends
    assert [x.get_text() for x in legend.get_texts()] == found["names"]
    box = legend.get_window_extent()
    assert not any(box.overlaps(ax.get_window_extent()) for ax in figure.axes)
    plt.close(figure)


def test_students_move_with_what_they_carry():
    for config in continual.STUDENTS.values():
        student = config.begin(continual.Spec(2, 1), 2, torch.Generator().manual_seed(0))
        student.to(torch.device("cpu"))
        assert all(x.device.type == "cpu" for x in student.state().values())
