"""What a resumed command is given beside the run folder: a run's own settings may be said again, others are refused."""

from dataclasses import replace

import pytest
import torch

from mbrl import cli, cli_offline, offline
from mbrl.choices import console
from mbrl.cli_control import Online
from mbrl.cli_plan import Plan
from mbrl.cli_reconstruct import RECONSTRUCTORS, Reconstruct
from mbrl.dynamics.single import SingleConfig
from mbrl.online import OnlineConfig
from mbrl.planner import CEM
from mbrl.run import Run, to_plain

LOCAL = {"device": "cpu", "threads": torch.get_num_threads(), "source": "gone.hdf5", "models": None, "data": "gone.npy"}
DATA = {"sha256": "0", "steps": 1}
OWN = {
    "offline": cli_offline.Offline(dataset="gone", seeds=(3,), updates=50, algorithm=replace(offline.MOPO, updates=50)),
    "plan": Plan(
        env="Nowhere-v0", seed=3, episodes=4, planner=replace(CEM, samples=90), dynamics=SingleConfig(hidden=(8, 8))
    ),
    "online": Online(env="Nowhere-v0", seeds=(3,), steps=700, setting=OnlineConfig(steps=700)),
    "reconstruct": Reconstruct(data="gone", seeds=(3,), dynamics=RECONSTRUCTORS["plrnn-gtf"]),
}
CASES = [
    ("offline", ["--seeds", "4"], "--seeds 4 (its own is 3)"),
    ("offline", ["--start", "here"], "here (its own is None)"),
    ("offline", ["algorithm:morec-mobile"], "algorithm:morec-mobile (its own is algorithm:mopo)"),
    (
        "offline",
        ["algorithm:mopo", "--algorithm.imagination.penalty.coefficient", "1.5"],
        "--algorithm.imagination.penalty.coefficient 1.5 (its own is 2.5)",
    ),
    ("offline", ["algorithm:mopo", "dynamics:single"], "dynamics:single (its own is dynamics:ensemble)"),
    ("plan", ["--episodes", "5"], "--episodes 5 (its own is 4)"),
    ("plan", ["planner:mppi"], "planner:mppi (its own is planner:cem)"),
    ("plan", ["planner:cem", "--planner.samples", "80"], "--planner.samples 80 (its own is 90)"),
    ("plan", ["--worth.particles", "2"], "--worth.particles 2 (its own is 5)"),
    ("plan", ["dynamics:single", "--dynamics.hidden", "9"], "--dynamics.hidden 9 (its own is 8 8)"),
    ("online", ["--steps", "800"], "--steps 800 (its own is 700)"),
    ("online", ["--setting.agent.gamma", "0.9"], "--setting.agent.gamma 0.9 (its own is 0.99)"),
    ("reconstruct", ["--ahead", "5"], "--ahead 5 (its own is 20)"),
    ("reconstruct", ["--schedule.epochs", "7"], "--schedule.epochs 7 (its own is 500)"),
    ("reconstruct", ["dynamics:ode"], "dynamics:ode (its own is dynamics:plrnn-gtf)"),
]


def test_a_name_with_colons_is_no_emoji():
    assert console.render_str("minari:door:").plain == "minari:door:"


@pytest.fixture
def begun(tmp_path):
    """Run folders as the commands leave them before their first step."""

    def make(command):
        args = OWN[command]
        config = {"algorithm": command, "data": DATA, "arguments": to_plain(args)}
        with Run.create(tmp_path / command, config, LOCAL | {"test": None}, quiet=True):
            pass
        return tmp_path / command

    return make


def refused(words, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("command", "words", "says"), CASES, ids=[" ".join((c, *w)) for c, w, _ in CASES])
def test_other_settings_are_refused_by_name(begun, capsys, command, words, says):
    folder = begun(command)
    before = {x: x.read_bytes() for x in folder.rglob("*") if x.is_file()}
    text = refused([command, "--resume", str(folder), *words], capsys)
    assert "goes on by its own settings" in text
    assert says in text
    assert text.count("its own is") == 1, text
    assert {x: x.read_bytes() for x in folder.rglob("*") if x.is_file()} == before


SAME = [
    ("offline", ["--seeds", "3", "--updates", "50", "--dataset", "gone2.hdf5", "algorithm:mopo"], "gone2.hdf5"),
    ("offline", ["--device", "cpu", "--quiet"], "gone.hdf5"),
    ("plan", ["--seed", "3", "planner:cem", "--planner.samples", "90", "dynamics:single", "--dynamics.hidden", "8",
              "8"], "Nowhere"),
    ("plan", ["planner:cem", "dynamics:single", "--dynamics.hidden", "8", "8"], "Nowhere"),
    ("online", ["--steps", "700", "dynamics:ensemble"], "Nowhere"),
    ("reconstruct", ["--threads", "1", "dynamics:plrnn-gtf"], "gone.npy"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "words", "then"), SAME, ids=[" ".join((c, *w)) for c, w, _ in SAME])
def test_its_own_settings_may_be_said_again(begun, capsys, command, words, then):
    """It then goes on, to what is missing here: the data, or the environment."""
    folder = begun(command)
    text = refused([command, "--resume", str(folder), "--out", str(folder), *words], capsys)
    assert "own settings" not in text
    assert then in text
