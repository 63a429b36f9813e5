"""The search for cycles on maps whose cycles are known: in closed form, or by trying every sequence of regions."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from mbrl.piecewise import cycles, regions, report

close = torch.testing.assert_close
MOEBIUS = [0, 1, -1, -1, 0, -1, 1, -1, 0]


def tensor(*x):
    return torch.tensor(x, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(angle):
    return tensor([math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)])


def line(*pieces):
    """A map of the line: (upper end, slope, offset) of each piece, the last without an end."""
    ends, slopes, offsets = (tensor(*x) for x in zip(*pieces, strict=True))
    which = lambda z: torch.bucketize(z[:, 0], ends[:-1])
    step = lambda z: slopes[which(z)][:, None] * z + offsets[which(z)][:, None]
    return step, lambda z: slopes[which(z)][:, None, None]


def tent(top=0.5):
    return line((top, 1 / top, 0.0), (math.inf, -1 / (1 - top), 1 / (1 - top)))


def affine(a, b):
    return lambda z: z @ a.T + b, lambda z: a.expand(len(z), *a.shape)


def lozi(a=1.7, b=0.5):
    step = lambda z: torch.stack([1 - a * z[:, 0].abs() + z[:, 1], b * z[:, 0]], 1)

    def jacobian(z):
        slope = -a * z[:, 0].sign()
        row = torch.stack([slope, torch.ones_like(slope)], 1)
        return torch.stack([row, tensor(b, 0.0).expand_as(row)], 1)

    return step, jacobian


def shallow(seed, m, units, clipped=False):
    """A shallow PLRNN, the pattern [R, ...] of a point's active units, and J, b and the pattern of every region."""
    a, w1 = torch.diag(normal(m, seed=seed).tanh()), 3 * normal(m, units, seed=seed + 1) / units**0.5
    w2, h1, h2 = normal(units, m, seed=seed + 2) / m**0.5, normal(m, seed=seed + 3) / 2, normal(units, seed=seed + 4)
    borders = torch.stack([-h2, 0 * h2])[: 1 + clipped]
    signs = tensor(1.0, -1.0)[: 1 + clipped, None]
    active = lambda z: ((z @ w2.T)[:, None] > borders).double()  # [R, 1 or 2, L]
    step = lambda z: z @ a + (signs * ((z @ w2.T)[:, None] - borders).relu()).sum(1) @ w1.T + h1
    jacobian = lambda z: a + (w1 * (signs * active(z)).sum(1)[:, None]) @ w2
    pieces = []
    for bits in itertools.product((0.0, 1.0), repeat=borders.numel()):
        pattern = tensor(*bits).view_as(borders)
        inside = lambda z, pattern=pattern: bool((active(z[None])[0] == pattern).all())
        on = signs * pattern
        pieces.append((a + (w1 * on.sum(0)) @ w2, h1 - w1 @ (on * borders).sum(0), inside))
    return step, jacobian, active, pieces


def exhaustive(pieces, order):
    """Every cycle of that order, as sorted first points, from every sequence of regions."""
    found = []
    for sequence in itertools.product(pieces, repeat=order):
        m = len(sequence[0][1])
        product, offset = torch.eye(m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
        for j, b, _ in sequence:
            product, offset = j @ product, j @ offset + b
        points = [torch.linalg.solve(torch.eye(m, dtype=torch.float64) - product, offset)]
        for j, b, _ in sequence[:-1]:
            points.append(j @ points[-1] + b)
        repeats = any((p - points[0]).abs().max() < 1e-6 for p in points[1:])
        if not repeats and all(inside(p) for p, (_, _, inside) in zip(points, sequence, strict=True)):
            found.append(min(p.tolist() for p in points))
    return sorted({tuple(round(x, 7) for x in p): p for p in found}.values())


def verify(step, jacobian, found, order):
    """That each is a cycle of just this order with the product's eigenvalues, in the promised arrangement."""
    for cycle in found:
        assert cycle.order == order == len(cycle.points)
        close(step(cycle.points), cycle.points.roll(-1, 0), rtol=1e-9, atol=1e-9)
        assert cycle.error == pytest.approx(
            float((step(cycle.points) - cycle.points.roll(-1, 0)).abs().max()), abs=1e-13
        )
        product = torch.eye(cycle.points.shape[1], dtype=torch.float64)
        for i, point in enumerate(cycle.points):
            product = jacobian(point[None])[0] @ product
            assert i == 0 or (point - cycle.points[0]).abs().max() > 1e-6
            assert cycle.points[0, 0] <= point[0]
        np.testing.assert_allclose(np.poly(cycle.eigenvalues.numpy()), np.poly(product.numpy()), atol=1e-9)
        assert (cycle.eigenvalues.abs().diff() <= 1e-12).all()
    assert firsts(found) == sorted(firsts(found))


def search(system, order, starts, **options):
    """The cycles found, verified."""
    step, jacobian = system
    found = cycles(step, jacobian, order, starts, **options)
    verify(step, jacobian, found, order)
    return found


def firsts(found):
    return [cycle.points[0].tolist() for cycle in found]


BOX = torch.linspace(0, 1, 30, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("order", range(1, 9))
def test_the_full_tent_map_has_as_many_cycles_as_moebius_counts(order):
    found = search(tent(), order, BOX)
    assert len(found) == sum(MOEBIUS[order // d] * 2**d for d in range(1, order + 1) if order % d == 0) // order
    for cycle in found:
        assert cycle.stability == "unstable"
        close(cycle.eigenvalues.abs(), tensor(2.0**order))
        turns = int((cycle.points > 0.5).sum())
        assert cycle.eigenvalues.real.sign() == (-1) ** turns


def test_the_tent_maps_fixed_points_and_cycle_of_two():
    fixed, pair = search(tent(), 1, BOX), search(tent(), 2, BOX)
    close(torch.cat([c.points for c in fixed]), tensor([0.0], [2 / 3]), atol=1e-14, rtol=0)
    close(torch.cat([c.eigenvalues for c in fixed]).real, tensor(2.0, -2.0))
    assert len(pair) == 1
    close(pair[0].points, tensor([0.4], [0.8]), atol=1e-14, rtol=0)
    close(pair[0].eigenvalues, tensor(-4.0).to(torch.complex128))


@pytest.mark.parametrize("top", [0.2, 0.7])
def test_the_skew_tent_map(top):
    fixed, pair = search(tent(top), 1, BOX), search(tent(top), 2, BOX)
    close(torch.cat([c.points for c in fixed]), tensor([0.0], [1 / (2 - top)]), atol=1e-14, rtol=0)
    close(torch.cat([c.eigenvalues for c in fixed]).real, tensor(1 / top, -1 / (1 - top)))
    low = top / (1 + top - top**2)
    close(pair[0].points, tensor([low], [low / top]), atol=1e-14, rtol=0)
    close(pair[0].eigenvalues.real, tensor(-1 / (top * (1 - top))))
    assert [len(search(tent(top), k, BOX)) for k in (2, 3, 4, 5)] == [1, 2, 3, 6]


def test_one_start_finds_what_many_do():
    """A row begins again where it has found a cycle or goes round among virtual ones."""
    found = search(tent(), 4, tensor([0.3]))
    assert len(found) == 3
    assert len(search(tent(), 4, tensor([0.3]), max_iterations=4)) < 3


@pytest.mark.parametrize(("a", "b"), [(1.7, 0.5), (1.4, -0.3), (0.3, 0.4)])
def test_the_lozi_maps_fixed_points_and_eigenvalues(a, b):
    found = search(lozi(a, b), 1, normal(20, 2))
    right, left = 1 / (1 + a - b), 1 / (1 - a - b)
    want = [(right, -1)] if a < 1 - b else [(left, 1), (right, -1)]
    assert len(found) == len(want)
    for cycle, (x, sign) in zip(found, want, strict=True):
        close(cycle.points, tensor([x, b * x]), atol=1e-13, rtol=0)
        root = complex(a * a + 4 * b) ** 0.5
        values = sorted([(sign * a + root) / 2, (sign * a - root) / 2], key=abs, reverse=True)
        np.testing.assert_allclose(cycle.eigenvalues.numpy(), values, atol=1e-12)
        assert cycle.stability == ("saddle" if (a, b) == (1.7, 0.5) or sign == 1 else "stable" if a < 1 else "saddle")


@pytest.mark.parametrize("order", range(1, 7))
def test_the_lozi_attractors_cycles_are_those_of_all_sequences_of_signs(order):
    step, jacobian = lozi()
    pieces = [
        (tensor([-1.7 * s, 1.0], [0.5, 0.0]), tensor(1.0, 0.0), lambda z, s=s: bool(s * z[0] > 0)) for s in (-1, 1)
    ]
    want = exhaustive(pieces, order)
    found = search((step, jacobian), order, orbit(step, tensor([0.1, 0.1]), 40))
    assert len(found) == len(want) == [2, 1, 0, 1, 0, 4][order - 1]
    close(tensor(*firsts(found)).reshape(-1, 2), tensor(*want).reshape(-1, 2), atol=1e-9, rtol=0)


def orbit(step, z, n):
    points = [z]
    for _ in range(n - 1):
        points.append(step(points[-1]))
    return torch.cat(points)


@pytest.mark.parametrize("m", [1, 4])
def test_a_linear_map_has_one_fixed_point_and_no_other_cycle(m):
    a, b = normal(m, m, seed=1), normal(m, seed=2)
    (found,) = search(affine(a, b), 1, normal(3, m), max_iterations=1)
    close(found.points[0], torch.linalg.solve(torch.eye(m, dtype=torch.float64) - a, b))
    for order in (2, 3):
        assert search(affine(a, b), order, normal(3, m)) == []
    assert cycles(*affine(a, b), 1, normal(3, m), max_iterations=0) == []


@pytest.mark.parametrize(
    ("a", "stability"),
    [
        (rotation(0.4) * 0.9, "stable"),
        (rotation(0.4) * 1.1, "unstable"),
        (rotation(0.4), "non-hyperbolic"),
        (rotation(0.4) * (1 + 5e-7), "non-hyperbolic"),
        (rotation(0.4) * (1 - 1e-5), "stable"),
        (torch.diag(tensor(0.5, -1.5)), "saddle"),
        (torch.diag(tensor(0.5, -1.0)), "non-hyperbolic"),
        (torch.diag(tensor(3.0, 1.0)), "non-hyperbolic"),
    ],
)
def test_stability_is_read_from_the_moduli(a, stability):
    (found,) = search(affine(a, a.new_zeros(2)), 1, normal(5, 2))
    assert found.stability == stability


def test_a_contracting_map_has_a_stable_cycle_of_two():
    c = 0.25  # slope -2 within [-1, 1], -c outside
    system = line((-1.0, -c, 2 - c), (1.0, -2.0, 0.0), (math.inf, -c, -2 + c))
    (fixed,), (pair,) = (search(system, k, tensor([0.1], [2.0])) for k in (1, 2))
    assert (fixed.stability, pair.stability) == ("unstable", "stable")
    x = (2 - c) / (1 - c)
    close(pair.points, tensor([-x], [x]), atol=1e-14, rtol=0)
    close(pair.eigenvalues.real, tensor(c * c))
    assert [search(system, k, tensor([0.1], [2.0])) for k in (3, 4)] == [[], []]


SMALL = [  # states, units, order, clipped, seeds of networks that have many cycles, and of some that have none
    (2, 6, 1, False, (30, 710, 1560, 1820, 130, 0, 10)),
    (3, 6, 1, False, (750, 1080, 80, 100, 610, 0, 10)),
    (2, 3, 2, False, (2900, 1240, 1190, 600, 480, 0, 10)),
    (3, 3, 2, False, (130, 3860, 3090, 2730, 1620, 0, 10)),
    (2, 2, 3, False, (2940, 1390, 220, 2120, 0, 10)),
    (2, 3, 1, True, (1590, 1960, 1480, 520, 0, 10)),
    (2, 2, 2, True, (1520, 1210, 530, 270, 0, 10)),
]


@pytest.mark.parametrize(("m", "units", "order", "clipped", "seeds"), SMALL)
def test_a_shallow_plrnns_cycles_are_those_of_all_sequences_of_regions(m, units, order, clipped, seeds):
    total = 0
    for seed in seeds:
        step, jacobian, _, pieces = shallow(seed, m, units, clipped)
        want = exhaustive(pieces, order)
        found = search((step, jacobian), order, 3 * normal(30, m, seed=seed + 9))
        assert len(found) == len(want), f"seed {seed}"
        if want:
            close(tensor(*firsts(found)), tensor(*want), atol=1e-6, rtol=1e-6)
        total += len(want)
    assert total > 12


def test_cycles_far_from_the_starts_are_found():
    system = line((50.0, 2.0, -1.0), (math.inf, 0.5, 60.0))  # fixed points at 1 and 120
    found = search(system, 1, tensor([0.0], [20.0]))
    close(tensor(*firsts(found)), tensor([1.0], [120.0]))


@pytest.mark.parametrize(("small", "count"), [(1e-5, 1), (1e-8, 0)])
def test_what_rounding_hides_is_not_found(small, count):
    assert len(search(line((math.inf, 1 - small, 1.0)), 1, tensor([1.0]))) == count  # at 1 / small


@pytest.mark.parametrize("start", [1 + 1e-10, 1 + 1e-12])
def test_a_start_that_is_almost_a_cycle_is_solved_for(start):
    (found,) = search(line((math.inf, 0.5, 0.5)), 1, tensor([start]))
    assert abs(float(found.points) - 1) < 1e-15


@pytest.mark.parametrize("b", [tensor(1.0, 0.0), tensor(0.3, 0.2)])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_translation_has_none(b, order):
    for turn in (0.0, 0.4, 1.1):  # turned, I - A is singular but for rounding, and solutions lie 1e16 away
        turned = rotation(turn) @ torch.diag(tensor(1.0, 0.5)) @ rotation(-turn)
        assert cycles(*affine(turned, rotation(turn) @ b), order, normal(9, 2)) == []
    assert cycles(*affine(torch.eye(2, dtype=torch.float64), b), order, normal(9, 2)) == []


@pytest.mark.parametrize("turn", [0.0, 0.4, 1.1])
def test_of_a_line_of_fixed_points_one_is_kept(turn):
    turned = rotation(turn) @ torch.diag(tensor(1.0, 0.5)) @ rotation(-turn)
    (found,) = search(affine(turned, rotation(turn) @ tensor(0.0, 3.0)), 1, normal(9, 2))
    assert found.stability == "non-hyperbolic"
    close((rotation(-turn) @ found.points[0])[1], torch.tensor(6.0, dtype=torch.float64))
    eye = torch.eye(2, dtype=torch.float64)
    assert [len(search(affine(eye, eye[0] * 0), k, normal(9, 2))) for k in (1, 2)] == [1, 0]


def test_continua_under_the_same_jacobians_are_told_apart_by_their_offsets():
    """x -> -x around 0 and x -> 10 - x around 5: pairs change places around both; the pieces between expand."""
    system = line((-1.0, 3.0, 4.0), (1.0, -1.0, 0.0), (4.0, 7 / 3, -10 / 3), (6.0, -1.0, 10.0), (math.inf, 3.0, -14.0))
    starts = torch.linspace(-1, 6, 40, dtype=torch.float64)[:, None]
    found = search(system, 2, starts)
    sums = [round(float(c.points.sum()), 9) for c in found if c.stability == "non-hyperbolic"]
    assert sorted(sums) == [0.0, 10.0]
    fixed = search(system, 1, starts)
    close(tensor(*firsts(fixed)), tensor([-2.0], [0.0], [2.5], [5.0], [7.0]), atol=1e-12, rtol=0)


def test_a_continuum_of_cycles_is_one_wherever_they_begin():
    """x -> 2 x + 3 -> x for every x in (-1, 1)."""
    (found,) = search(line((1.0, 2.0, 3.0), (math.inf, 0.5, -1.5)), 2, torch.linspace(-1, 5, 41).double()[:, None])
    close(found.points[1], 2 * found.points[0] + 3)
    close(found.eigenvalues.real, tensor(1.0))


@pytest.mark.parametrize(("apart", "count"), [(1e-4, 2), (1e-7, 1)])
def test_cycles_are_told_apart_down_to_a_thousand_tolerances(apart, count):
    system = line((apart / 3, 2.0, 0.0), (math.inf, 0.5, apart / 2))  # fixed points at 0 and apart
    assert len(search(system, 1, torch.linspace(-1, 1, 20).double()[:, None])) == count


def test_a_start_at_the_origin_has_a_scale_too():
    assert firsts(search(tent(), 1, tensor([0.0]))) == [[0.0], [pytest.approx(2 / 3)]]


def test_orbits_that_are_not_finite_are_dropped():
    system = line((1.0, 0.5, 0.1), (math.inf, 1e200, 0.0))
    (found,) = search(system, 1, tensor([5.0], [0.5]))
    close(found.points, tensor([0.2]))
    assert search(system, 2, tensor([5.0], [0.5])) == []
    steep = affine(torch.diag(tensor(1e200, 0.5)), tensor(0.0, 0.0))  # the orbit is finite, the product is not
    assert search(steep, 3, tensor([0.0, 1.0])) == []
    hole = lambda z: torch.where((z - 1).abs() > 0.1, 0.5, math.nan).double()[..., None]
    assert cycles(lambda z: 0.5 * z + 0.5, hole, 1, tensor([5.0], [0.5])) == []
    assert len(search(line((1.0, -1.5, 0.0), (math.inf, 1e200, 0.0)), 1, tensor([5.0]))) == 1
    for order in (1, 3):
        assert cycles(lambda z: z / 0, lambda z: torch.ones_like(z)[..., None], order, tensor([5.0], [0.0])) == []
        assert cycles(lambda z: z + 1, lambda z: z[..., None] * math.nan, order, tensor([5.0])) == []


def test_the_search_repeats_itself_and_leaves_the_global_generator_alone():
    step, jacobian, _, _ = shallow(10, 3, 6)
    starts, state = normal(3, 3), torch.get_rng_state()
    runs = [firsts(cycles(step, jacobian, 2, starts)) for _ in range(2)]
    given = [firsts(cycles(tent()[0], tent()[1], 9, BOX[9:10], max_iterations=30, generator=g)) for g in seeds(1, 1, 2)]
    assert runs[0] == runs[1]
    assert given[0] == given[1] != given[2]
    assert (torch.get_rng_state() == state).all()


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def test_results_do_not_depend_on_units():
    system, unit = tent(), 1e-6
    step, jacobian = line((0.5 * unit, 2.0, 0.0), (math.inf, -2.0, 2.0 * unit))
    want = [search(system, k, BOX) for k in (1, 2, 3, 4)]
    for k, one in enumerate(want, 1):
        found = cycles(step, jacobian, k, BOX * unit)
        close(tensor(*firsts(found)) / unit, tensor(*firsts(one)), atol=1e-9, rtol=0)


def test_inputs_are_checked():
    step, jacobian = tent()
    for starts in (tensor(0.3, 0.4), tensor([math.nan]), tensor([0.0])[:0]):
        with pytest.raises(ValueError, match=r"starts: got .* expected finite rows"):
            cycles(step, jacobian, 1, starts)
        with pytest.raises(ValueError, match=r"orbit: got .* expected finite rows"):
            regions(step, jacobian, starts)
    with pytest.raises(ValueError, match="order: got 0"):
        cycles(step, jacobian, 0, BOX)
    with pytest.raises(ValueError, match="float32"):
        cycles(lambda z: step(z).float(), jacobian, 1, BOX)
    with pytest.raises(ValueError, match=r"expected \[30, 1, 1\]"):
        cycles(step, lambda z: jacobian(z)[:, 0], 1, BOX)
    assert len(cycles(step, jacobian, 1, BOX.float())) == len(regions(step, jacobian, BOX.float()).shares) == 2


def test_a_report_is_plain_json():
    step, jacobian = affine(0.5 * rotation(math.pi / 2), tensor(1.0, 0.0))
    (row,) = json.loads(json.dumps(report(cycles(step, jacobian, 1, normal(3, 2)))))
    assert row["order"] == 1
    assert row["stability"] == "stable"
    assert row["radius"] == pytest.approx(0.5)
    np.testing.assert_allclose(row["points"], [[0.8, 0.4]])
    np.testing.assert_allclose(sorted(row["eigenvalues"]), [[0, -0.5], [0, 0.5]], atol=1e-12)
    assert row["error"] < 1e-15
    assert report([]) == []


# ------------------------------------------------------------ regions


def test_an_orbits_regions_are_its_symbolic_dynamics():
    step, jacobian = lozi()
    points = orbit(step, tensor([0.1, 0.1]), 3000)
    right = points[:, 0] > 0
    got = regions(step, jacobian, points)
    assert right.double().mean() > 0.5
    assert (got.symbols == (~right).long()).all()
    close(got.shares, torch.stack([right, ~right]).double().mean(1))


def test_regions_are_numbered_by_the_time_spent_in_them():
    system = line((0.0, 1.0, 0.0), (1.0, 2.0, 0.0), (math.inf, -1.0, 3.0))
    got = regions(*system, tensor([-1.0], [5.0], [0.5], [5.0], [4.0], [0.7]))
    assert got.symbols.tolist() == [2, 0, 1, 0, 0, 1]
    close(got.shares, tensor(1 / 2, 1 / 3, 1 / 6))


def test_regions_of_the_same_jacobian_are_told_apart_by_their_offsets():
    """A clipped unit is flat on both sides."""
    step = lambda z: 0.5 * z + (z + 1).relu() - z.relu()
    jacobian = lambda z: (0.5 + (z > -1).double() - (z > 0).double())[..., None]
    got = regions(step, jacobian, tensor([-3.0], [-2.0], [-2.5], [2.0], [1.0], [-0.5]))
    assert got.symbols.tolist() == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("clipped", [False, True])
def test_as_many_regions_are_counted_as_patterns_of_units(clipped):
    step, jacobian, active, _ = shallow(20, 3, 5, clipped)
    points = 4 * normal(500, 3, seed=3)
    which = [tuple(x.tolist()) for x in active(points).flatten(1)]
    got = regions(step, jacobian, points)
    assert len(got.shares) == len(set(which)) > 8
    assert len(set(zip(which, got.symbols.tolist(), strict=True))) == len(set(which))
    assert (got.shares.diff() <= 0).all()
    close(got.symbols.bincount().double() / len(points), got.shares)
    assert (regions(step, jacobian, points.flip(0)).shares == got.shares).all()
