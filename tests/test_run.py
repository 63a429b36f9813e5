"""The run folder: nothing half-written, nothing lost, nothing unpickled."""

import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mbrl import offline
from mbrl.offline import OfflineConfig
from mbrl.run import Run, RunError, draw_report, from_plain, machine, to_plain, write_text

KNOWN = (
    *(OfflineConfig, offline.Imagination, offline.Penalty, offline.Truncation, offline.Morec),
    *(offline.SacConfig, offline.BcConfig, offline.Td3BcConfig, offline.RewardConfig, offline.FilterConfig),
)


def made(tmp_path, **kw):
    return Run.create(tmp_path / "run", {"algorithm": "x"}, {"source": "y"}, quiet=True, **kw)


@pytest.mark.parametrize("name", offline.PRESETS)
def test_settings_survive_json(name):
    text = json.dumps(to_plain(offline.PRESETS[name]))
    assert from_plain(json.loads(text), KNOWN) == offline.PRESETS[name]


def test_settings_of_an_unknown_type_or_field_are_refused():
    with pytest.raises(RunError, match="'Path'"):
        from_plain({"_type": "Path", "x": 1}, KNOWN)
    with pytest.raises(RunError, match=r"unknown \['coeficient'\]"):
        from_plain({"_type": "Penalty", "coeficient": 1.0}, KNOWN)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("coefficient", "much", "coefficient is 'much', expected float"),
        ("name", 3, "name is 3, expected str"),
        ("samples", 1.5, "samples is 1.5, expected int"),
        ("scaled", 1, "scaled is 1, expected bool"),
    ],
)
def test_settings_of_another_type_are_refused(name, value, says):
    with pytest.raises(RunError, match=says):
        from_plain({"_type": "Penalty", name: value}, KNOWN)
    assert from_plain({"_type": "Penalty", "coefficient": 2}, KNOWN).coefficient == 2


def test_settings_of_others_may_be_mappings():
    @dataclass(frozen=True)
    class Other:
        options: dict[str, float]

    assert from_plain({"_type": "Other", "options": {"a": 1.0}}, [Other]) == Other({"a": 1.0})

    @dataclass(frozen=True)
    class Typed:
        x: "NowhereToBeFound"  # noqa: F821

    assert from_plain({"_type": "Typed", "x": 1}, [Typed]) == Typed(1)


def test_one_process_at_a_time_writes_in_a_folder(tmp_path):
    run = Run.create(tmp_path / "run", {"arguments": {"_type": "Meta"}}, {"threads": 1}, quiet=True)
    with pytest.raises(RunError, match="another process is at work there"):
        Run.resumed(run.folder, "meta", 0)
    assert Run.open(run.folder).config["arguments"] == {"_type": "Meta"}  # reading is free
    run.close()
    Run.resumed(run.folder, "meta", 0).close()


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="the device is there")
def test_a_run_of_a_device_that_is_not_here_is_not_gone_on_with(tmp_path):
    """And is not offered another one, which draws other numbers."""
    local = {"threads": 1, "device": "cuda:7"}
    Run.create(tmp_path / "run", {"arguments": {"_type": "Meta"}}, local, quiet=True).close()
    with pytest.raises(RunError, match=r"was begun on cuda:7, which is not here; .* begin another run"):
        Run.resumed(tmp_path / "run", "meta", 0)


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="a file is in the way"):
            Run.create(folder, {}, {})
        with pytest.raises(RunError, match="expected the folder of a run"):
            Run.resumed(folder, "meta", 0)


def test_tensors_and_facts_come_back_as_they_were(tmp_path):
    run = made(tmp_path)
    state = {"a": torch.randn(3, 4), "b": torch.arange(3), "t": torch.randn(4, 3).T, "g": torch.Generator().get_state()}
    run.save("agent", state, {"updates": 7, "returns": [[1, [[2.5]]]]})
    tensors, facts = Run.open(run.folder).load("agent")
    assert all(torch.equal(tensors[k], v) for k, v in state.items())
    assert (facts["updates"], facts["returns"]) == (7, [[1, [[2.5]]]])
    assert run.load("nothing") is None
    mode = lambda name: (run.folder / name).stat().st_mode
    assert mode("checkpoints/agent.safetensors") == mode("config.json"), "whoever may read a run may read all of it"


def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch):
    run = made(tmp_path)
    run.save("agent", {"a": torch.ones(2)}, {})
    with pytest.raises(AttributeError):
        run.save("agent", {"a": "no tensor"}, {})
    monkeypatch.setattr("mbrl.run.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run.save("agent", {"a": torch.zeros(2)}, {})
    with pytest.raises(OSError, match="disk full"):
        write_text(run.folder / "config.json", "{}")
    assert torch.equal(run.load("agent")[0]["a"], torch.ones(2))
    assert run.config["algorithm"] == "x"
    assert not [p for p in run.folder.rglob("*") if p.suffix == ".tmp"]


def test_a_finished_stage_drops_its_partial_state(tmp_path):
    run = made(tmp_path)
    run.save("model-1.partial", {"a": torch.ones(2)}, {})
    run.save("model-1", {"a": torch.ones(2)}, {})
    assert run.load("model-1.partial") is None
    assert run.load("model-1") is not None


def test_fitted_models_are_shared_and_policies_are_not(tmp_path):
    shared = tmp_path / "models"
    one = Run.create(tmp_path / "a", {}, {}, shared=shared)
    two = Run.create(tmp_path / "b", {}, {}, shared=shared)
    for name in ("model-1", "reward-1", "terminal-1", "agent"):
        one.save(name, {"a": torch.ones(1)}, {})
    assert None not in [two.load(f"{name}-1") for name in ("model", "reward", "terminal")]
    assert two.load("agent") is None


def test_numbers_logged_after_the_last_checkpoint_are_dropped(tmp_path):
    run = made(tmp_path)
    run.log("policy", 1, {"loss": 1.0})
    run.save("policy.partial", {"a": torch.ones(1)}, {})
    run.log("policy", 2, {"loss": 2.0})
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "pol')  # killed in the middle of a line
    again = Run.open(run.folder)
    assert [m["step"] for m in again.metrics()] == [1, 2]
    again.rewind()
    assert [m["step"] for m in again.metrics()] == [1]
    again.log("policy", 2, {"loss": 2.0})
    assert again.metrics()[-1] == {"stage": "policy", "step": 2, "loss": 2.0}


def test_a_rewind_adds_nothing_to_numbers_that_were_lost(tmp_path):
    """As where the machine fell: a checkpoint is there, and of the numbers before it the last are not."""
    run = made(tmp_path)
    for i in range(3):
        run.log("policy", i, {"loss": 1.0})
    run.save("policy.partial", {"a": torch.ones(1)}, {})
    path = run.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    again = Run.open(run.folder)
    again.rewind()
    again.log("policy", 3, {"loss": 2.0})
    assert [m["step"] for m in again.metrics()] == [0, 1, 3]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_seconds_of_a_run_are_those_of_all_its_sittings_up_to_their_checkpoints(tmp_path, monkeypatch, elsewhere):
    now = [100.0]
    monkeypatch.setattr("mbrl.run.time.perf_counter", lambda: now[0])
    run = Run.create(tmp_path / "run", {}, {}, shared=tmp_path / "models" if elsewhere else None)
    now[0] += 5.0
    assert run.seconds == 5.0
    run.save("model-1", {"a": torch.ones(1)}, {})
    now[0] = 1_000.0
    again = Run.open(run.folder)
    now[0] += 1.0
    again.rewind()
    now[0] += 2.0
    assert again.seconds == 8.0


def test_a_run_is_begun_once_and_then_gone_on_with_by_one_process(tmp_path):
    begin = lambda n: Run.continued(tmp_path / "run", {"n": n}, {}, quiet=True)
    with begin(1) as run:
        run.log("policy", 1, {"loss": 1.0})
        run.save("policy.partial", {"a": torch.ones(1)}, {})
        run.log("policy", 2, {"loss": 2.0})
        with pytest.raises(RunError, match="another process is at work there"):
            begin(2)
    with begin(2) as again:
        assert again.config["n"] == 1
        assert [m["step"] for m in again.metrics()] == [1]
        with pytest.raises(RunError, match="another process is at work there"):
            begin(3)


def test_numbers_of_a_stage_that_lies_elsewhere_are_kept(tmp_path):
    """A model in the folder that runs share is not fitted again, so its curve must survive."""
    run = Run.create(tmp_path / "a", {}, {}, shared=tmp_path / "models")
    run.log("model", 1, {"loss": 1.0})
    run.save("model-1", {"a": torch.ones(1)}, {})
    run.log("policy", 1, {"loss": 2.0})
    again = Run.open(run.folder)
    again.rewind()
    assert [m["stage"] for m in again.metrics()] == ["model"]


def test_a_run_is_not_written_over(tmp_path):
    made(tmp_path)
    with pytest.raises(RunError, match="--resume"):
        made(tmp_path)


def test_what_is_no_run_is_one_error(tmp_path):
    with pytest.raises(RunError, match=r"no config\.json"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="not JSON"):
        Run.open(tmp_path)


def test_a_corrupt_checkpoint_is_one_error(tmp_path):
    run = made(tmp_path)
    run.save("agent", {"a": torch.ones(1000)}, {})
    path = run.checkpoints / "agent.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=r"agent\.safetensors"):
        run.load("agent")


def test_the_curves_are_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = made(tmp_path)
    for i in range(3):
        run.log("policy", i, {"loss": i / 2, "note": "text"})
        run.log("model", i, {"loss": 1.0, "seed": 3.0})
        run.log("model", i, {"loss": 2.0, "seed": 1.0})
    run.close()
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("policy/loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    tags = events.Tags()["scalars"]
    seeds = [x for x in tags if x.startswith("model/")]
    assert len(seeds) == 2, "a curve for each seed"
    for tag, value in zip(sorted(seeds), (2.0, 1.0), strict=True):
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(i, value) for i in range(3)]


def test_the_report_is_a_picture_of_what_was_logged(tmp_path):
    import matplotlib.image

    run = made(tmp_path)
    draw_report(run, run.folder / "empty.png", "nothing yet")
    for i in range(5):
        run.log("model", i, {"loss": 1.0 / (i + 1)})
        run.log("evaluate", i, {"return": float(i)})
        run.log("rollout", i, {"length": 3.0, "cut": 0.2, "ended": 0.1})
    draw_report(run, run.folder / "report.png", "title", [1.0, 2.0], (0.0, 10.0))
    empty, full = (matplotlib.image.imread(run.folder / f"{n}.png") for n in ("empty", "report"))
    assert (full[..., :3] < 0.9).mean() > (empty[..., :3] < 0.9).mean() + 0.002, "more ink"


@dataclass(frozen=True)
class Other:
    x: tuple[int, ...] = (1, 2)


def test_lists_become_tuples_again():
    assert from_plain(json.loads(json.dumps(to_plain(Other()))), [Other]) == Other()


def test_a_record_tells_machines_apart():
    facts = machine()
    assert facts["cores"] == os.cpu_count()
    assert facts["processor"].startswith(f"{platform.machine()}, ")
    if (kept := Path("/proc/cpuinfo")).exists():
        text = kept.read_text()
        assert facts["bfloat16"] == (re.search(r"\b\w*bf16\w*\b", text) is not None)
        name = re.search(r"model name\s*: (.*)", text)
        assert name is None or facts["processor"].endswith(name[1].strip())
