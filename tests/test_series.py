"""Series from files: round trips, parts, pairs, and one clear error for each thing that can be wrong."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from mbrl_envs.scores import DataError
from mbrl_envs.series import alike, cut, digest, dimensions, from_arrays, mixed, pair, read_series, split, standardise

RNG = np.random.default_rng(0)
X = RNG.standard_normal((12, 3)) * [1, 10, 100] + [0, 5, -50]  # observations
U = RNG.uniform(-3, 7, (12, 2))  # inputs


def close(a, b):
    want = b if isinstance(b, torch.Tensor) else torch.as_tensor(np.array(b))
    torch.testing.assert_close(a, want.float())


def raw(data):
    return data.act_low + (data.act + 1) / 2 * (data.act_high - data.act_low)


@pytest.fixture
def save(tmp_path):
    def write(name, *a, **kw):
        path = tmp_path / name
        if name.endswith(".npy"):
            np.save(path, *a, **kw)
        elif name.endswith(".npz"):
            np.savez(path, *a, **kw)
        else:
            path.write_bytes(a[0] if isinstance(a[0], bytes) else a[0].encode())
        return path

    return write


# ---------------------------------------------------------------- arrays


def test_one_series(save):
    data = read_series(save("wave.npy", X))
    close(data.obs, X)
    close(data.next_obs[:-1], X[1:])
    close(data.next_obs[-1], X[-1])
    assert data.paired.tolist() == [True] * 11 + [False]
    assert not data.terminal.any()
    assert not data.reward.any()
    assert data.starts.tolist() == [0, 12]
    assert data.act.shape == (12, 0)
    assert (data.name, data.dt) == ("wave", 1.0)
    assert data.obs.dtype == torch.float32
    assert data.windows(4).obs.shape == (8, 5, 3)
    assert json.loads(json.dumps(data.meta))["file"] == "wave.npy"


def test_one_dimension_and_whole_numbers(save):
    data = read_series(save("x.npy", np.arange(5)), dt=0.5)
    assert data.obs.tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    assert data.dt == 0.5


def test_episodes_are_the_first_of_three_axes(save):
    data = read_series(save("x.npy", X.reshape(3, 4, 3)))
    close(data.obs, X)
    assert data.starts.tolist() == [0, 4, 8, 12]
    assert data.paired.tolist() == [True, True, True, False] * 3
    assert data.windows(3).obs.shape[0] == 3


def test_columns_and_inputs_by_number(save):
    path = save("x.npy", np.concatenate([X, U], 1))
    data = read_series(path, inputs=[4, 3])
    close(data.obs, X)
    close(raw(data), U[:, ::-1])
    close(data.act.amin(0), [-1, -1])
    close(data.act.amax(0), [1, 1])
    close(data.act_low, U.min(0)[::-1])
    close(data.act_high, U.max(0)[::-1])
    close(read_series(path, columns=[2, 0]).obs, X[:, [2, 0]])
    close(read_series(path, columns=1, inputs=3).obs, X[:, [1]])
    close(read_series(path, columns="1", inputs="3").obs, X[:, [1]])  # as a command line gives them
    three = read_series(save("y.npy", np.concatenate([X, U], 1).reshape(3, 4, 5)), columns=[1], inputs=[3])
    close(raw(three), U[:, :1])
    assert three.episodes == 3


@pytest.mark.parametrize("names", [("obs", "act"), ("x", "u"), ("x", "inputs")])
def test_npz(save, names):
    path = save("x.npz", **{names[0]: X.reshape(2, 6, 3), names[1]: U.reshape(2, 6, 2), "dt": 0.25})
    data = read_series(path)
    close(data.obs, X)
    close(raw(data), U)
    assert (data.episodes, data.dt) == (2, 0.25)
    assert read_series(path, dt=2.0).dt == 2.0
    close(read_series(path, columns=[1]).obs, X[:, [1]])


def test_an_input_that_never_changes_is_zero(save):
    data = read_series(save("x.npz", x=X, u=np.full(12, 3.0)))
    assert not data.act.any()
    close(raw(data), np.full((12, 1), 3.0))


def test_the_digest_is_that_of_the_numbers(save):
    path = save("x.npy", np.concatenate([X, U], 1))
    whole, part = read_series(path), read_series(path, columns=[0])
    copied = read_series(save("y.npy", np.concatenate([X, U], 1)))
    assert whole.sha256 == copied.sha256 != part.sha256
    assert read_series(path, dt=0.1).sha256 != whole.sha256
    assert len(whole.sha256) == 64
    assert whole.meta["file_sha256"] == part.meta["file_sha256"]
    assert digest(torch.zeros(2, 3)) != digest(torch.zeros(3, 2))


# ---------------------------------------------------------------- CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " ", ", "])
@pytest.mark.parametrize("header", [True, False])
def test_csv(save, delimiter, header):
    rows = [delimiter.join(repr(float(v)) for v in row) for row in np.concatenate([X, U], 1)]
    top = [delimiter.join(["a", '"b"', "c", "p", "q"])] if header else []
    path = save("x.csv", "\n".join(top + rows) + "\n")
    data = read_series(path, inputs=["q"] if header else [4])
    close(data.obs, np.concatenate([X, U[:, :1]], 1))
    close(raw(data), U[:, 1:])
    assert data.meta["columns"] == (["a", "b", "c", "p"] if header else [0, 1, 2, 3])
    if header:
        close(read_series(path, columns=["c", "a"]).obs, X[:, [2, 0]])


def test_csv_with_a_gap_in_a_column_that_nobody_asks_for(save):
    path = save("x.csv", '"uEst","yEst","Ts",\r\n1.5,2,4,\r\n2.5,3,,\r\n3.5,4,,\r\n')
    data = read_series(path, columns="yEst", inputs="uEst", dt=4.0)
    assert data.obs.tolist() == [[2.0], [3.0], [4.0]]
    assert data.act.tolist() == [[-1.0], [0.0], [1.0]]
    with pytest.raises(DataError, match="column 'Ts' is empty in line 3, expected a finite number"):
        read_series(path)


def test_csv_with_remarks_a_mark_and_one_column(save):
    data = read_series(save("x.csv", "\ufeff# measured on a Monday\n\n# t y\n1 2\n# pause\n3 4\n"), columns="y")
    assert data.obs.tolist() == [[2.0], [4.0]]
    assert read_series(save("y.txt", "# once\n1\n2\n3\n")).obs.tolist() == [[1.0], [2.0], [3.0]]
    assert read_series(save("z.dat", "temp\n1e-3\n2\n")).meta["columns"] == ["temp"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_any_way(save, end):
    data = read_series(save("x.csv", end.join(["a,b", "# pause", "1,2", "", "3,4", "5,6", ""])))
    assert data.obs.tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    with pytest.raises(DataError, match="column 'b' holds 'x' in line 3"):
        read_series(save("x.csv", end.join(["a,b", "1,2", "3,x"])))


def test_the_index_of_pandas_is_not_observed(save, recwarn):
    path = save("x.csv", ",a,b\n3,1,2\n4,3,4\n5,5,6\n")
    with pytest.warns(UserWarning, match="first column has no name and counts the rows"):
        data = read_series(path, inputs="b")
    assert (data.obs.tolist(), data.meta["columns"]) == ([[1.0], [3.0], [5.0]], ["a"])
    recwarn.clear()
    assert read_series(path, columns=[0, 1]).obs[:, 0].tolist() == [3.0, 4.0, 5.0]
    assert read_series(path, columns="a", inputs=[0]).obs.shape == (3, 1)
    assert read_series(save("y.csv", ",a\n0,1\n2,3\n4,5\n")).obs.shape == (3, 2)
    assert read_series(save("z.csv", "n,a\n0,1\n1,3\n2,5\n")).obs.shape == (3, 2)
    assert not recwarn


def test_csv_whose_episodes_a_column_tells(save):
    path = save("x.csv", "run,y\na,1\na,2\na,3\nb,4\nb,5\n")
    data = read_series(path, episode="run")
    assert data.starts.tolist() == [0, 3, 5]
    assert data.obs.tolist() == [[1.0], [2.0], [3.0], [4.0], [5.0]]
    assert data.paired.tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("name", ["time", "T", "TimeStamp"])
def test_a_column_of_time_tells_dt_and_is_not_observed(save, name):
    path = save("x.csv", f"y,{name},u\n5,0.00,1\n6,0.25,2\n8,0.50,4\n9,0.75,5\n")
    data = read_series(path, inputs="u")
    assert data.obs.tolist() == [[5.0], [6.0], [8.0], [9.0]]
    assert (data.dt, data.meta["columns"], data.meta["time"]) == (0.25, ["y"], name)
    assert data.act.shape == (4, 1)
    own = read_series(path, dt=3.0)
    assert (own.dt, own.meta["columns"], own.meta["time"]) == (3.0, ["y", "u"], name)
    assert (read_series(path, columns="y").dt, read_series(path, columns=["y"]).obs.shape) == (0.25, (4, 1))
    asked = read_series(path, columns=[name, "y"])
    assert (asked.dt, asked.obs[:, 0].tolist(), "time" in asked.meta) == (1.0, [0.0, 0.25, 0.5, 0.75], False)
    driven = read_series(path, columns="y", inputs=name)
    assert (driven.dt, driven.act.shape) == (1.0, (4, 1))
    alone = read_series(save("z.csv", f"{name}\n1\n3\n5\n"))
    assert (alone.dt, alone.obs.shape) == (1.0, (3, 1))


def test_time_that_is_not_even_or_begins_again(save):
    uneven = save("x.csv", "t,y\n0,5\n1,6\n3,7\n")
    data = read_series(uneven, dt=0.5)
    assert (data.dt, data.obs.tolist()) == (0.5, [[5.0], [6.0], [7.0]])
    data = read_series(uneven, columns="y")
    assert (data.dt, "time" in data.meta) == (1.0, False)
    days = save("y.csv", "time,y\nMonday,5\nTuesday,6\n")
    assert read_series(days, columns="y").dt == read_series(days, dt=1.0).dt == 1.0
    again = read_series(save("z.csv", "t,run,y\n0,a,5\n2,a,6\n0,b,7\n2,b,8\n4,b,8\n"), episode="run")
    assert (again.dt, again.starts.tolist(), again.obs.shape) == (2.0, [0, 2, 5], (5, 1))
    rounded = read_series(save("w.csv", "t,y\n0.000,5\n0.333,6\n0.667,7\n1.000,8\n"))
    assert rounded.dt == pytest.approx(1 / 3)
    first = read_series(save("v.csv", "t,time,y\n7,0,5\n3,2,6\n5,4,7\n"))  # a temperature, say
    assert (first.dt, first.meta["columns"]) == (2.0, ["t", "y"])


def test_a_first_row_of_numbers_is_data(save):
    assert read_series(save("x.csv", "1,2\n3,4\n5,6\n")).obs.tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


def test_dimensions_are_called_as_the_file_calls_them(save):
    assert dimensions(read_series(save("x.csv", "t,a,b\n0,1,2\n1,3,4\n"))) == ["a", "b"]
    assert dimensions(read_series(save("y.csv", "1,2\n3,4\n"), columns=[1, 0])) == ["dimension 0", "dimension 1"]
    assert dimensions(read_series(save("x.npy", X))) == ["dimension 0", "dimension 1", "dimension 2"]


# ---------------------------------------------------------------- errors


def alarm():
    raise AssertionError("unpickled")


class Evil:
    def __reduce__(self):
        return alarm, ()


@pytest.mark.parametrize(
    ("name", "content", "kw", "match"),
    [
        ("x.npy", np.array([[1.0, np.nan]] * 3), {}, r"obs holds nan at \[0, 1\], expected finite"),
        ("x.npy", np.array([1.0, 2.0, np.inf]), {}, r"obs holds inf at \[2, 0\]"),
        ("x.npy", np.array([1.0, 1e300]), {}, r"obs holds 1e\+300 at \[1, 0\], expected finite float32"),
        ("x.npy", np.array(["a", "b"]), {}, "obs has dtype <U1, expected real numbers"),
        ("x.npy", np.array([1j, 2j]), {}, "obs has dtype complex128, expected real"),
        ("x.npy", np.zeros((1, 3)), {}, "an episode has 1 samples, expected at least 2"),
        ("x.npy", np.zeros((5, 1, 3)), {}, "an episode has 1 samples"),
        ("x.npy", np.zeros((0, 3)), {}, r"shape \[0, 3\]"),
        ("x.npy", np.float64(3.0), {}, r"shape \[\], expected \[T\]"),
        ("x.npy", np.zeros((2, 2, 2, 2)), {}, r"shape \[2, 2, 2, 2\]"),
        ("x.npy", X, dict(columns=[3]), "no column 3; it has numbers from 0 to 2"),
        ("x.npy", X, dict(columns=[-1]), "no column -1"),
        ("x.npy", X, dict(columns=["y"]), "no column 'y'"),
        ("x.npy", X, dict(columns="²"), "no column '²'"),
        ("x.npy", X, dict(columns=[0, 0]), "column 0 is asked for twice"),
        ("x.npy", X, dict(columns=[0], inputs=[0]), "column 0 is asked for twice"),
        ("x.npy", X, dict(inputs=[0, 1, 2]), "no column is left to observe"),
        ("x.npy", X, dict(episode="run"), "episode='run' is for CSV"),
        ("x.npy", X, dict(dt=0.0), "dt is 0.0, expected"),
        ("x.npy", X, dict(dt=float("nan")), "dt is nan, expected"),
        ("x.npz", dict(y=X), {}, r"holds the arrays \['y'\], expected one of obs, x"),
        ("x.npz", dict(x=X, obs=X), {}, r"holds the arrays \['obs', 'x'\]"),
        ("x.npz", dict(x=X, u=U[:5]), {}, "5 inputs in episodes of 5 and 12 samples in episodes of 12"),
        ("x.npz", dict(x=X, u=U.reshape(2, 6, 2)), {}, "12 inputs in episodes of 6 and 12 samples"),
        ("x.npz", dict(x=X, u=U * np.nan), {}, "act holds nan"),
        ("x.npz", dict(x=X, u=U), dict(inputs=[0]), "array 'u' holds the inputs; leave inputs="),
        ("x.npz", dict(x=X, dt=np.array([1.0, 2.0])), {}, "dt is array.*expected one number"),
        ("x.mat", "1 2", {}, "unknown suffix '.mat'"),
        ("x.csv", "", {}, "the file is empty"),
        ("x.csv", "# nothing\n", {}, "has no rows"),
        ("x.csv", "a,b\n", {}, "has 0 samples, expected at least 2"),
        ("x.csv", "a,b\n1,2\n", {}, "has 1 samples, expected at least 2"),
        ("x.csv", "a,b\n1,2\n3,4,5\n", {}, "line 3 has 3 columns, expected 2 as in line 1"),
        ("x.csv", "a,b\n1,2\n\n3,oops\n", {}, "column 'b' holds 'oops' in line 4"),
        (
            "x.csv",
            "a;b\n1,5;2\n2,5;3\n",
            {},
            "column 'a' holds '1,5' in line 2, expected a finite number with a decimal point",
        ),
        ("x.csv", "1,5;2,3\n2,5;3,1\n", {}, "holds '2,5' in line 2"),
        ("x.csv", "a,b\n1,nan\n3,4\n", {}, "column 'b' holds 'nan' in line 2, expected a finite number"),
        ("x.csv", "1,inf\n3,4\n", {}, "column 1 holds 'inf' in line 1, expected a finite number"),
        (
            "x.csv",
            "Time,b\n0,1\n1,2\n3,4\n",
            {},
            r"column 'Time' goes on by 1 to 2, expected even .*; resample, or pass dt \(--dt\) .*, or columns",
        ),
        ("x.csv", "t,b\n2,1\n1,2\n0,4\n", {}, "column 't' goes on by -1 to -1"),
        ("x.csv", "timestamp,b\nMonday,1\nTuesday,2\n", {}, "column 'timestamp' holds 'Monday' in line 2"),
        ("x.csv", "a,a\n1,2\n3,4\n", {}, "two columns are called 'a'"),
        (
            "x.csv",
            "speed,power\n1,2\n3,4\n",
            dict(columns="sped"),
            "no column 'sped'; it has speed, power; did you mean speed",
        ),
        ("x.csv", "run,y\na,1\na,2\nb,4\n", dict(episode="run"), "an episode has 1 samples"),
        ("x.csv", b"a,b\n\xff,2\n", {}, "not text in UTF-8"),
        ("x.csv", f"{'1' * 140_000},2\n3,4\n", {}, r"cannot be read as CSV \(field larger than field limit"),
    ],
)
def test_one_clear_error(save, name, content, kw, match):
    path = save(name, **content) if isinstance(content, dict) else save(name, content)
    with pytest.raises(DataError, match=match) as error:
        read_series(path, **kw)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_nothing_is_unpickled(tmp_path, save, name):
    holder = np.array([1, "two", None], dtype=object)
    path = save(name, holder) if name == "x.npy" else save(name, x=holder)
    with pytest.raises(DataError, match="holds Python objects, which are never unpickled"):
        read_series(path)
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="never unpickled"):
        read_series(path)
    with pytest.raises(DataError, match="obs has dtype object"):
        from_arrays(holder)


def test_files_that_are_not_what_they_say(tmp_path, save):
    with pytest.raises(DataError, match="no such file"):
        read_series(tmp_path / "absent.npy")
    with pytest.raises(DataError, match="is a folder"):
        read_series(tmp_path)
    (tmp_path / "x.npy").write_bytes(save("y.npz", x=X).read_bytes())
    with pytest.raises(DataError, match=r"name it \.npz"):
        read_series(tmp_path / "x.npy")
    (tmp_path / "x.npz").write_bytes(save("y.npy", X).read_bytes())
    with pytest.raises(DataError, match=r"name it \.npy"):
        read_series(tmp_path / "x.npz")
    for name in ("y.npy", "y.npz"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="cannot be read as numpy's arrays"):
            read_series(tmp_path / name)


def test_arrays_that_do_not_fit():
    with pytest.raises(DataError, match="lengths add to 11 and there are 12"):
        from_arrays(X, lengths=[5, 6])
    with pytest.raises(DataError, match=r"beyond their bounds \[-1, 1\]"):
        from_arrays(X, U, bounds=(-1, 1))
    data = from_arrays(X, U, lengths=[5, 7], bounds=(-10, 10))
    close(data.act, U / 10)
    assert data.starts.tolist() == [0, 5, 12]


# ---------------------------------------------------------------- parts, pairs, units


def test_split_in_time():
    data = from_arrays(X, U, dt=0.5, name="s")
    train, test = split(data, 0.75)
    close(train.obs, X[:9])
    close(test.obs, X[9:])
    close(torch.cat([raw(train), raw(test)]), U)
    assert train.paired.tolist() == [True] * 8 + [False]
    close(train.next_obs[-1], X[8])  # what follows is the test's
    assert test.starts.tolist() == [0, 3]
    assert (train.dt, train.name, test.meta["rows"]) == (0.5, "s[0:9]", [9, 12])
    assert len({data.sha256, train.sha256, test.sha256}) == 3
    assert data.paired.tolist() == [True] * 11 + [False]
    for fraction in (0.0, 1.0, 2):
        with pytest.raises(ValueError, match="fraction is"):
            split(data, fraction)
    with pytest.raises(ValueError, match="rows 0 to 1 of 12, expected at least 2"):
        split(data, 0.05)


def test_a_cut_keeps_whose_an_episode_is():
    parts = [from_arrays(np.full((2, 10, 1), i)) for i in range(3)]
    for start, stop, want in ((0, 30, [0, 0, 1]), (30, None, [1, 2, 2]), (15, 45, [0, 1, 1, 2]), (20, 40, [1, 1])):
        part = cut(mixed(parts, "m", {}), start, stop)
        assert part.system.tolist() == want
        assert torch.equal(part.system[part.episode], part.obs[:, 0].long())
        assert part.systems == 3


def test_a_cut_keeps_the_ends_of_episodes():
    data = from_arrays(X, lengths=[4, 4, 4])
    part = cut(data, 2, 10)
    close(part.obs, X[2:10])
    assert part.starts.tolist() == [0, 2, 6, 8]
    assert part.paired.tolist() == [True, False, True, True, True, False, True, False]
    close(cut(data, -4).obs, X[8:])
    closed = replace(data, paired=torch.ones(12, dtype=torch.bool))  # a source that says what follows an episode
    assert cut(closed, 0, 8).paired.all()
    assert cut(closed, 0, 7).paired.tolist() == [True] * 6 + [False]


def test_a_pair_shares_one_range_of_inputs():
    train, test = from_arrays(X, U), from_arrays(X[:6], U[:6] * 3 + 1)
    a, b = pair(train, test)
    assert torch.equal(a.act_low, b.act_low)
    assert torch.equal(a.act_high, b.act_high)
    close(raw(a), U)
    close(raw(b), U[:6] * 3 + 1)
    both = torch.cat([a.act, b.act])
    close(both.amin(0), [-1, -1])
    close(both.amax(0), [1, 1])
    assert a.sha256 != train.sha256
    assert pair(train, train)[0] is train


def test_series_of_several_systems_share_one_range_and_keep_their_intervals():
    first, second = (
        from_arrays(np.zeros((3, 1)), np.array([[a], [b], [a]]), dt=dt)
        for a, b, dt in ((0.0, 1.0, 0.1), (-1.0, 3.0, 0.2))
    )
    a, b = alike([first, second])
    assert a.act_low.tolist() == b.act_low.tolist() == [-1.0]
    assert a.act_high.tolist() == b.act_high.tolist() == [3.0]
    assert a.act.flatten().tolist() == [-0.5, 0.0, -0.5]
    assert (a.dts.unique().tolist(), b.dts.unique().tolist()) == (pytest.approx([0.1]), pytest.approx([0.2]))
    assert alike([first, first])[0].dts is None


def test_an_interval_that_nobody_told_is_not_mixed_with_another(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(4.0))
    np.savez(tmp_path / "b.npz", obs=np.arange(4.0), dt=0.1)
    read = lambda dt=None: [read_series(tmp_path / f, dt=dt) for f in ("a.npy", "a.npy", "b.npz")]
    assert [x.dt for x in alike(read(0.1))] == [0.1] * 3
    assert [x.dt for x in alike(read()[:2])] == [1.0] * 2
    np.savez(tmp_path / "b.npz", obs=np.arange(4.0), dt=1.0)
    assert [x.dt for x in alike(read())] == [1.0] * 3
    np.savez(tmp_path / "b.npz", obs=np.arange(4.0), dt=0.1)
    with pytest.raises(ValueError, match=r"a: its file does not tell .* b has 0\.1; put dt into the file"):
        alike(read())


def test_the_digest_of_several_is_that_of_the_numbers():
    data = from_arrays(np.arange(4.0)[:, None], dt=0.1)
    sha = lambda x: mixed([data, x], "x", {}).sha256
    assert sha(data) == mixed([data, data], "y", {}).sha256
    assert len({sha(data), sha(replace(data, obs=data.obs + 1)), sha(replace(data, reward=data.reward + 1))}) == 3
    slow = replace(data, dt=0.2)
    assert mixed([slow, slow], "x", {}).sha256 != sha(data)


def test_a_pair_must_be_of_one_system():
    train = from_arrays(X, U, name="early")
    for test, match in (
        (from_arrays(X[:, :2], U, name="late"), "late has 2 observed columns, expected 3 as early has"),
        (from_arrays(X, U[:, :1]), "has 1 inputs, expected 2"),
        (from_arrays(X, U, dt=2.0), "has dt 2, expected 1 as early has"),
    ):
        with pytest.raises(ValueError, match=match):
            pair(train, test)


def test_a_pair_has_the_same_columns_in_the_same_order(save):
    read = lambda name, text: read_series(save(name, text))
    one, swapped = read("a.csv", "p,q\n1,2\n3,5\n"), read("b.csv", "q,p\n1,2\n3,5\n")
    with pytest.raises(ValueError, match=r"b has 2 observed columns \(q, p\), expected 2 \(p, q\) as a has"):
        pair(one, swapped)
    assert pair(one, read("c.csv", "r,s\n1,2\n3,5\n"))[1].obs.shape == (2, 2)


def test_a_pair_has_one_dt_to_what_times_are_rounded_to():
    train, test = from_arrays(X, U, dt=1 / 3), from_arrays(X, U, dt=0.3333)
    after = pair(train, test)[1]
    assert after.dt == train.dt
    assert after.sha256 == train.sha256


def test_standardise_in_the_units_of_another():
    train, test = from_arrays(X, U), from_arrays(X[:5] + 1, U[:5])
    a = standardise(train)
    close(a.obs.mean(0), np.zeros(3))
    close(a.obs.std(0, correction=0), np.ones(3))
    close(a.next_obs[:-1], a.obs[1:])
    close(standardise(test, like=train).obs, (X[:5] + 1 - X.mean(0)) / X.std(0))
    close(torch.tensor(a.meta["std"]), X.std(0))
    assert a.sha256 != train.sha256
    with pytest.raises(ValueError, match="standardise: dimension 1 never changes"):
        standardise(from_arrays(X * [1, 0, 1]))
