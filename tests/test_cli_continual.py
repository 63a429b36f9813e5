"""The command `mbrl continual`."""

import json

import pytest
import torch

from mbrl import continual
from mbrl.cli import main
from mbrl.run import Run

QUICK = ["--steps", "120", "--budget.updates", "30", "--budget.batch", "16", "--budget.save-every", "10", "--quiet"]
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
    assert (tmp_path / "a" / "report.png").stat().st_size > 10_000
    stages = {x["stage"] for x in Run.open(tmp_path / "a").metrics()}
    assert {"task 0", "task 1", "explore 0", "explore 1", "errors", "returns"} <= stages


@pytest.mark.parametrize("student", ["hyper", "replay"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch, student):
    whole = go(tmp_path / "a", student=student)
    save, count = Run.save, []

    def failing(self, name, *rest):
        save(self, name, *rest)
        count.append(name)
        if len(count) == 6:  # within 10, 20, 30; the first task; within 10, 20
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", failing)
    with pytest.raises(SystemExit):
        go(tmp_path / "b", student=student)
    assert count == ["within", "within", "within", "course", "within", "within"]
    monkeypatch.setattr(Run, "save", save)
    main(["continual", "--resume", str(tmp_path / "b"), "--quiet"])
    again = json.loads((tmp_path / "b" / "result.json").read_text())
    assert again["matrix"] == whole["matrix"]
    assert again["memory"] == whole["memory"]
    with pytest.raises(SystemExit):
        main(["continual", "--resume", str(tmp_path / "b"), "--quiet"])


def test_another_list_of_tasks_does_not_overwrite_a_run(tmp_path, monkeypatch, capsys):
    learn = continual.run
    monkeypatch.setattr(continual, "run", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        go(tmp_path / "a")
    monkeypatch.setattr(continual, "run", learn)
    before = (tmp_path / "a" / "config.json").read_text()
    for words in (["--tasks", "pusher"], ["--first", "4"]):
        with pytest.raises(SystemExit):
            main(["continual", "--resume", str(tmp_path / "a"), "--quiet", *words])
        assert "is a sequence of cartpole-pole" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        go(tmp_path / "a")
    assert "holds a run already" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "a" / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("tasks", "words", "says"),
    [
        ((), [], "--tasks is missing"),
        (("--tasks", "kitchen"), [], "'kitchen'"),
        (("--tasks", "cartpole-pole"), ["--random", "2"], "--random 2.0"),
        (("--tasks", "cartpole-pole"), ["--steps", "1"], "--steps 1"),
        (("--tasks", "Ant-v5:mass"), ["--episodes", "1"], "no reward is known"),
    ],
)
def test_bad_input_is_one_error_and_no_folder(tmp_path, capsys, tasks, words, says):
    with pytest.raises(SystemExit):
        go(tmp_path / "a", *words, tasks=tasks)
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a").exists()


def test_students_move_with_what_they_carry():
    for config in continual.STUDENTS.values():
        student = config.begin(continual.Spec(2, 1), 2, torch.Generator().manual_seed(0))
        student.to(torch.device("cpu"))
        assert all(x.device.type == "cpu" for x in student.state().values())
