"""The command `mbrl reconstruct`: what it leaves behind, resuming, and what it refuses."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import torch
from mbrl_envs import systems
from safetensors.torch import load_file, save_file
from worlds import interrupted

from mbrl import cli, cli_reconstruct, nulls
from mbrl.core import Diverged
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


def interrupted_once(does):
    """Ctrl-C at the first call."""
    left = [KeyboardInterrupt]

    class Once(list):
        def __call__(self, *a, **kw):
            if self:
                raise self.pop()
            return does(*a, **kw)

    return Once(left)


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------- what it leaves behind


def test_a_run_holds_scores_nulls_exponents_and_a_picture(tmp_path, spiral):
    go("--data", spiral, "--out", tmp_path / "a", "--seeds", "0", "1")
    got = result(tmp_path / "a")
    rows = got["learners"]["plrnn"]
    assert len(rows) == 2
    assert [(r["ends"], r["finite_fit"]) for r in rows] == [("point", True)] * 2
    assert (got["test"], got["dimensions"]) == ("spiral[420:600]", ["dimension 0", "dimension 1"])
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
    go(
        "--data",
        spiral,
        "--out",
        tmp_path / "a",
        "--compare",
        "plrnn",
        "plrnn-almost-linear",
        "ode",
        epochs=2,
        options=(),
    )
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
    assert got["nulls"]["varx(1)"]["rmse"][0] < 1e-3 < np.std(x) / 2 < got["nulls"]["persistence"]["rmse"][0]


def test_a_known_system_brings_its_exponents(tmp_path):
    go("--data", "system:henon", "--steps", "400", "--out", tmp_path / "a", epochs=2)
    got = result(tmp_path / "a")
    assert got["test"] == "henon, another orbit"
    assert got["true_lyapunov"][0] == pytest.approx(0.419, abs=0.08)
    assert sum(got["true_lyapunov"]) == pytest.approx(np.log(0.3), abs=1e-6)  # the area shrinks by b each step


def test_a_stiff_system_has_no_exponents_here():
    assert cli_reconstruct.true_exponents(systems.system("ks-64")) == []


@pytest.fixture
def stepped(monkeypatch):
    """(interval, substeps) of every flow that is stepped."""
    found, real = [], cli_reconstruct.metrics.flow_step
    monkeypatch.setattr(cli_reconstruct.metrics, "flow_step", lambda *a: found.append(a[2:]) or real(*a))
    monkeypatch.setattr(cli_reconstruct, "EXPONENTS", 60)
    return found


def test_exponents_of_a_system_do_not_depend_on_how_it_is_sampled(tmp_path, stepped):
    go("--data", "system:lorenz63", "--dt", "0.002", "--steps", "400", "--out", tmp_path / "a", epochs=1)
    assert sum(result(tmp_path / "a")["true_lyapunov"]) == pytest.approx(-41 / 3, rel=1e-3)
    assert stepped == [(0.01, 2)]


def test_exponents_of_a_slow_system_take_no_more_steps(stepped):
    class Slow(systems.Flow):
        name, dim, dt, transient = "slow", 3, 10.0, 0.0

        def field(self, x, u=None):
            return -1e-3 * x

        def jacobian(self, x, u=None):
            return -1e-3 * torch.eye(3).to(x).expand(len(x), 3, 3)

    assert cli_reconstruct.true_exponents(Slow()) == pytest.approx([-1e-3] * 3)
    assert stepped == [(10.0, cli_reconstruct.FINEST)]


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


# ---------------------------------------------------------------- what failed is said


def wave(length=400, scale=1.0):
    t = torch.arange(length) * 0.1
    return scale * torch.stack([t.sin(), t.cos()], 1)


def test_how_a_free_run_ends():
    truth, fades = wave(), torch.exp(-torch.arange(400) / 20)[:, None]
    nan = torch.where(torch.arange(400)[:, None] == 7, torch.nan, wave())
    early = torch.where(torch.arange(400)[:, None] == 7, 1e6, wave())
    for free, want in (
        (wave(scale=0.1), "moves"),
        (truth[:1].expand(400, -1), "point"),
        (wave() * fades, "point"),
        (torch.cat([wave()[:, :1], torch.zeros(400, 1)], 1), "moves"),
        (wave() / fades, "leaves"),
        (wave() + 18.0, "moves"),
        (wave() + 25.0, "leaves"),
        (nan, "leaves"),
        (early, "moves"),
    ):
        assert cli_reconstruct.ends(free, truth) == want
    rest = truth * (torch.arange(400) < 200)[:, None]
    assert cli_reconstruct.ends(rest, rest, driven=True) == "moves"  # as its inputs want it
    assert cli_reconstruct.ends(rest, rest) == "point"
    assert cli_reconstruct.ends(rest, truth, driven=True) == "point"


def test_failed_seeds_are_counted_in_plain_lines():
    row = lambda end, ok=True: {"ends": end, "finite_fit": ok}
    rows = {"a": [row("moves")] * 2, "b": [row("point"), row("moves"), row("point")], "c": [row("leaves", False)]}
    assert cli_reconstruct.failures(rows) == [
        "b: 2 of 3 free runs end in a point",
        "c: 1 of 1 fits are not finite: their losses are nan or infinite",
        "c: 1 of 1 free runs leave the data's range or are not finite",
    ]


@pytest.mark.parametrize("learner", ["plrnn", "ode"])
def test_a_fit_that_is_not_finite_says_so(tmp_path, spiral, capsys, monkeypatch, learner):
    monkeypatch.setattr(cli_reconstruct, "judge", failing := interrupted_once(cli_reconstruct.judge))
    options, rate = () if learner == "ode" else ("--dynamics.kind.hidden", "5"), ("--schedule.lr", "1e20")
    if learner == "ode":
        fit = cli_reconstruct.fit
        lost = lambda *a, **kw: replace(fit(*a, **kw), train_loss=[1.0, math.nan])
        monkeypatch.setattr(cli_reconstruct, "fit", lost)
    with pytest.raises(SystemExit):
        go("--data", spiral, "--out", tmp_path / "a", *rate, epochs=2, learner=learner, options=options)
    assert failing == []
    cli.main(["reconstruct", "--resume", str(tmp_path / "a")])  # the fit is read, not repeated
    assert f"{learner}: 1 of 1 fits are not finite" in " ".join(capsys.readouterr().out.split())
    assert [r["finite_fit"] for r in result(tmp_path / "a")["learners"][learner]] == [False]


def test_a_fit_that_gives_no_model_is_one_error(tmp_path, spiral, capsys, monkeypatch):
    def diverging(*a, **kw):
        raise Diverged("fit_plrnn: a seed has diverged")

    monkeypatch.setattr(cli_reconstruct, "fit_plrnn", diverging)
    with pytest.raises(SystemExit):
        go("--data", spiral, "--out", tmp_path / "a")
    assert "plrnn: fit_plrnn: a seed has diverged; begin again with a smaller --schedule.lr" in said(capsys)


# ---------------------------------------------------------------- the picture


def drawn(monkeypatch, run, test, runs, **more):
    """The figure's axes, left open."""
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(cli_reconstruct, "save_figure", lambda figure, path: kept.append(figure))
    ends = {n: cli_reconstruct.ends(x, test) for n, x in runs.items()}
    facts = {"test": "late[300:400]", "dimensions": ["level", "flow"], "dt": 0.5, "seeds": [3, 4], "test_steps": 400}
    learners = {n: [{"ends": e}] for n, e in ends.items()}
    cli_reconstruct.draw(run, run.folder / "report.png", test, runs, {**facts, "learners": learners, **more})
    plt.close(kept[0])
    return kept[0], kept[0].axes


def fresh(folder, *lines):
    run = Run.create(folder, {}, {})
    for stage, step, values in lines:
        run.log(stage, step, values)
    return run


def test_the_picture_tells_which_runs_fail(tmp_path, monkeypatch):
    still = torch.full((400, 2), 0.25)
    runs = {"good": wave(scale=0.9), "flat": still, "lost": wave() * torch.nan, "far": wave() * 1e30}
    figure, (attractor, series, spectrum, *_) = drawn(monkeypatch, fresh(tmp_path / "a"), wave(), runs)
    named = lambda ax: [x.get_text() for x in ax.get_legend().get_texts()]
    assert named(attractor) == ["data", "good", "flat (ends in a point)", "lost (leaves)", "far (leaves)"]
    assert named(series) == named(attractor)
    assert named(spectrum) == ["data", "good"]
    (point,) = [x for x in attractor.get_lines() if x.get_marker() == "o"]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (0.25, 0.25)
    assert all(x.get_linewidth() >= 2 for x in attractor.get_legend().get_lines())
    low, high = spectrum.get_ylim()
    power = spectrum.get_lines()[0].get_ydata()
    assert power.min() / 10 < low < power.min() < power.max() < high
    assert (attractor.get_xlabel(), attractor.get_ylabel(), series.get_ylabel()) == ("level", "flow", "level")
    assert figure.get_suptitle() == "late[300:400], T = 400, seed 3"


def test_the_picture_of_a_fit_has_an_axis_for_each_kind_of_number(tmp_path, monkeypatch):
    lines = [("fit good", i, {"mse": 1 / i, "alpha": 0.9}) for i in (1, 2, 3)]
    lines += [("fit ode-7", i, {"train": 0.5 if i == 1 else math.nan, "holdout": 2.0}) for i in (1, 2, 3)]
    _, axes = drawn(monkeypatch, fresh(tmp_path / "a", *lines), wave(), {"good": wave(), "ode": wave()})
    fit, right = axes[3], axes[4]
    assert [x.get_label() for x in fit.get_lines()] == ["good: mse", "ode-7: train (not finite)", "ode-7: holdout"]
    assert [x.get_label() for x in right.get_lines()] == ["good: alpha"]
    assert (fit.get_ylabel(), fit.get_yscale()) == ("loss", "log")
    assert "alpha" in right.get_ylabel()
    assert right.get_yscale() == "linear"
    assert all(float(x).is_integer() for x in fit.get_xticks())
    assert len({x.get_color() for x in fit.get_lines()}) == 2
    bare = [("fit good", i, {"mse": math.nan, "alpha": 0.9}) for i in (1, 2)]
    _, axes = drawn(monkeypatch, fresh(tmp_path / "b", *bare), wave(), {"good": wave()})
    assert [x.get_text() for x in axes[3].texts] == ["no loss is finite"]


def test_a_short_series_has_a_spectrum():
    assert len(cli_reconstruct._power(torch.tensor([1.0, 2.0, 4.0, 2.0]), 1.0)[1]) == 2


# ---------------------------------------------------------------- what is printed


@pytest.fixture
def table(tmp_path):
    """A driven, damped level with a clock."""
    rng, x = np.random.default_rng(2), 0.0
    lines = ["Time,level,valve"]
    for i in range(300):
        u = rng.uniform(-1, 1)
        lines.append(f"{0.25 * i},{x},{u}")
        x = 0.9 * x + u
    path = tmp_path / "tank.csv"
    path.write_text("\n".join(lines))
    return path


def test_the_facts_name_columns_time_and_the_part_that_is_scored(tmp_path, table, capsys):
    words = [x for x in QUICK if x != "--quiet"]
    more = ["--data", str(table), "--inputs", "valve", "--out", str(tmp_path / "a"), "--schedule.epochs", "1"]
    cli.main(["reconstruct", *words, *more, "dynamics:plrnn", "--dynamics.kind.hidden", "5"])
    out = " ".join(capsys.readouterr().out.split())
    assert "210 steps of 1 dimensions (level) under valve, dt 0.25 (the column 'Time' is time" in out
    assert "scored on tank[210:300]: 90 steps" in out
    assert "tank[210:300]: medians over 1 seeds" in out
    assert "RMSE: of a free run, level" in out
    assert out.endswith(f"report: {tmp_path / 'a/report.png'}")
    assert (result(tmp_path / "a")["dt"], result(tmp_path / "a")["dimensions"]) == (0.25, ["level"])


def test_a_second_file_is_named_and_quiet_prints_where_the_report_is_and_nothing_else(tmp_path, spiral, capsys):
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other/spiral.npy", np.load(spiral)[:200])
    go("--data", spiral, "--test", tmp_path / "other/spiral.npy", "--out", tmp_path / "a", epochs=1)
    assert result(tmp_path / "a")["test"] == "spiral, the file of --test"
    assert capsys.readouterr().out == f"report: {tmp_path / 'a/report.png'}\n"


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("learner", ["plrnn", "ode"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, spiral, monkeypatch, capsys, learner):
    monkeypatch.setattr(cli_reconstruct, "SAVE_EVERY", 0.0)
    options = () if learner == "ode" else ("--dynamics.kind.hidden", "8")
    words = ("--data", spiral, "--fitting.max-epochs", "3")
    go(*words, "--out", tmp_path / "a", learner=learner, options=options)
    capsys.readouterr()
    with interrupted(2) as names, pytest.raises(SystemExit) as end:
        go(*words, "--out", tmp_path / "b c", learner=learner, options=options)
    assert end.value.code == 130
    told = f"interrupted; `mbrl reconstruct --resume '{tmp_path / 'b c'}'` continues it"
    out = capsys.readouterr().out
    assert told in out
    assert out.count("interrupted; ") == 1
    assert all(name.endswith(".partial") for name in names)
    (path,) = (tmp_path / "b c/checkpoints").glob("*.partial.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    facts |= {"seconds": facts["seconds"] + 1_000.0, "_seconds": facts["_seconds"] + 2_000.0}  # as of a longer sitting
    save_file(load_file(path), path, {"facts": json.dumps(facts)})
    cli.main(["reconstruct", "--resume", str(tmp_path / "b c"), "--quiet"])
    got = result(tmp_path / "b c")
    assert got["learners"] == result(tmp_path / "a")["learners"]
    assert 1_000 < got["seconds"][learner] < 2_000 < got["wall_s"]


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


def test_another_test_file_is_not_judged_by(tmp_path, spiral, capsys, monkeypatch):
    first, second = tmp_path / "one.npy", tmp_path / "two.npy"
    np.save(first, np.load(spiral)[:300])
    np.save(second, np.load(spiral)[300:])
    monkeypatch.setattr(cli_reconstruct, "judge", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        go("--data", spiral, "--test", first, "--out", tmp_path / "a", epochs=1)
    monkeypatch.undo()
    again = ["reconstruct", "--resume", str(tmp_path / "a"), "--quiet"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main([*again, "--test", str(second)])
    assert "two.npy: not what" in said(capsys)
    first.write_bytes(second.read_bytes())
    with pytest.raises(SystemExit):
        cli.main(again)
    assert "pass --test with the file that it was begun with" in said(capsys)
    np.save(first, np.load(spiral)[:300])
    cli.main(again)
    assert result(tmp_path / "a")["test"] == "one"


def test_nulls_are_fitted_to_every_episode(tmp_path, spiral):
    data, path = np.load(spiral), tmp_path / "parts.npz"
    np.savez(path, obs=np.stack([data[:200], data[200:400], data[400:]]))
    np.save(tmp_path / "test.npy", data[:150])
    go("--data", path, "--test", tmp_path / "test.npy", "--out", tmp_path / "a", epochs=1)
    got = result(tmp_path / "a")["nulls"]
    parts = [torch.from_numpy(x).float() for x in (data[:200], data[200:400], data[400:])]
    floor = torch.from_numpy(data[:150]).float()
    assert got == nulls.null_table(parts, floor, 5, generator=torch.Generator().manual_seed(0))


def test_short_and_wide_series_are_judged_to_the_end(tmp_path):
    rng, wide = np.random.default_rng(0), tmp_path / "wide.npy"
    np.save(wide, rng.standard_normal((130, 30)).cumsum(0))
    go("--data", wide, "--out", tmp_path / "a", epochs=1)
    assert "persistence" in result(tmp_path / "a")["nulls"]
    delayed, short = rng.standard_normal((600, 1)).cumsum(0), tmp_path / "short.npy"
    delayed[15:] += delayed[:-15].copy()
    np.save(short, delayed)
    go("--data", short, "--holdout", "0.05", "--ahead", "20", "--out", tmp_path / "b", epochs=1)
    assert "pe_20" in result(tmp_path / "b")["nulls"]["persistence"]


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
        (["--data", "{spiral}", "--test", "{other}"], "wide has 3 observed columns, expected 2 as spiral has"),
        (["--data", "{still}"], "the training part does not move in dimension 1; leave it out"),
        (["--data", "{named}"], "the training part does not move in flow; leave it out"),
        (["--data", "{spiral}", "--seeds", "0", "0"], "--seeds 0 0: expected numbers from 0 on, each once"),
        (["--data", "{spiral}", "--seeds", "3", "-1"], "--seeds 3 -1: expected"),
        (["--data", "{spiral}", "--threads", "-1"], "--threads -1: expected 0"),
        (["--data", "{spiral}", "--dt", "0"], "--dt 0.0: expected a time"),
        (["--data", "{spiral}", "--dt", "inf"], "--dt inf: expected a time"),
        (["--data", "system:henon", "--steps", "1"], "--steps 1: expected at least 2"),
        (["--data", "system:henon", "--noise", "nan"], "--noise nan: expected"),
        (
            ["--data", "system:henon", "--columns", "0", "--test", "x.npy"],
            "--test, --columns: not for an integrated system",
        ),
        (["--data", "{spiral}", "--steps", "50", "--noise", "0.5"], "--steps, --noise: not for a file; leave it out"),
        (["--data", "{spiral}", "--test", "{spiral}", "--holdout", "0.5"], "--holdout 0.5: not beside --test"),
        (["--data", "{spiral}", "--device", "abacus"], "device: got 'abacus'"),
        (["--data", "{spiral}", "--schedule.lr", "nan"], "--schedule.lr nan: expected a number above 0"),
        (["--data", "{spiral}", "--schedule.lr", "inf"], "--schedule.lr inf: expected a finite number"),
        (["--data", "{spiral}", "--schedule.lr-end", "0"], "--schedule.lr-end 0.0: expected a number above 0"),
        (["--data", "{spiral}", "--schedule.epochs", "0"], "--schedule.epochs 0: expected at least 1"),
        (["--data", "{spiral}", "--schedule.batch", "-4"], "--schedule.batch -4: expected at least 1"),
        (["--data", "{spiral}", "--schedule.clip", "0"], "--schedule.clip 0.0: expected a number above 0"),
        (["--data", "{spiral}", "--schedule.noise", "-1"], "--schedule.noise -1.0: expected 0 or more"),
        (["--data", "{spiral}", "--fitting.max-epochs", "0"], "--fitting.max-epochs 0: expected at least 1"),
        (["--data", "{spiral}", "--fitting.holdout", "1"], "--fitting.holdout 1.0: expected a share"),
        (
            ["--data", "{spiral}", "--compare", "plrnn", "ode"],
            "--compare plrnn ode: fits these with their presets; got dynamics:plrnn",
        ),
    ],
)
def test_bad_input_is_one_error_and_no_folder(tmp_path, spiral, capsys, words, says):
    other, broken = tmp_path / "wide.npy", tmp_path / "broken.npy"
    np.save(other, np.zeros((300, 3)) + np.arange(300)[:, None])
    np.save(broken, np.full((300, 2), np.nan))
    still, header = tmp_path / "still.npy", tmp_path / "named.csv"
    np.save(still, np.load(spiral) * [1, 0])
    np.savetxt(header, np.load(spiral) * [1, 0], delimiter=",", header="level,flow", comments="")
    named = {"spiral": spiral, "other": other, "broken": broken, "still": still, "named": header}
    with pytest.raises(SystemExit):
        go(*[w.format(**named) for w in words], "--out", tmp_path / "a")
    assert says.format(**{k: v.stem for k, v in named.items()}) in said(capsys)
    assert not (tmp_path / "a").exists()


def test_a_strength_that_is_no_share_is_named_by_its_option(tmp_path, spiral, capsys):
    with pytest.raises(SystemExit):
        go("--data", spiral, "--out", tmp_path / "a", options=("--dynamics.forcing.decay", "2"))
    assert "--dynamics.forcing.decay 2.0: expected 0 to 1" in said(capsys)


def test_a_window_longer_than_the_data_says_so(tmp_path, spiral, capsys):
    with pytest.raises(SystemExit):
        go("--data", spiral, "--out", tmp_path / "a", "--schedule.length", "5000")
    assert "the longest stretch of the training part has 419 steps" in said(capsys)


@pytest.mark.parametrize(
    ("learner", "options", "says"),
    [
        ("plrnn", ["--dynamics.kind.hidden", "0"], "--dynamics.kind.hidden 0: expected at least 1"),
        ("plrnn", ["--dynamics.latent", "1"], "--dynamics.latent 1: expected at least 2 for 2 observed dimensions"),
        ("plrnn", ["--dynamics.latent-decay", "nan"], "--dynamics.latent-decay nan: expected 0 or more"),
        ("plrnn-dendritic", ["--dynamics.kind.bases", "0"], "--dynamics.kind.bases 0: expected at least 1"),
        (
            "plrnn-almost-linear",
            ["--dynamics.kind.rectified", "30"],
            "--dynamics.kind.rectified 30: expected 0 to the 20",
        ),
        ("plrnn-gtf", ["--dynamics.forcing.alpha", "2"], "--dynamics.forcing.alpha 2.0: expected 0 to 1"),
        ("plrnn-stf", ["--dynamics.forcing.interval", "0"], "--dynamics.forcing.interval 0: expected at least 1"),
        ("ode", ["--dynamics.hidden", "10", "0"], "--dynamics.hidden 0: expected at least 1"),
        ("ode", ["--dynamics.alpha", "nan"], "--dynamics.alpha nan: expected a finite number"),
    ],
)
def test_a_learner_that_cannot_be_built_is_one_error_and_no_folder(tmp_path, spiral, capsys, learner, options, says):
    with pytest.raises(SystemExit):
        go("--data", spiral, "--out", tmp_path / "a", learner=learner, options=options)
    assert says in said(capsys)
    assert not (tmp_path / "a").exists()


def test_what_only_some_of_the_compared_can_do_is_found_first(tmp_path, capsys):
    path = tmp_path / "wide.npy"
    np.save(path, np.random.default_rng(0).standard_normal((300, 25)))
    for words, says in (
        (["--compare", "ode", "plrnn-dendritic"], "--compare plrnn-dendritic: PlrnnConfig: latent is 20"),
        (["--compare", "ode", "--fitting.length", "900"], "--fitting.length 900: fit: the data hold 0 windows"),
        (["--compare", "ode", "plrnn-dendritic", "--schedule.solver", "compiled", "--columns", "0", "1"],
         "--schedule.solver compiled: not for plrnn-dendritic"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            go("--data", path, "--out", tmp_path / "a", *words, options=())
        assert says in said(capsys)
        assert not (tmp_path / "a").exists()
