"""Fixed points, cycles and linear regions of a piecewise-linear map, a trained PLRNN's for one.

In a region the map is affine, F(z) = J z + b, so a cycle through given regions solves a linear system. Newton's method
on all the cycle's points at once solves one such system after the other: it reads the regions of its points, solves for
the cycle that they would have, and goes on from the regions of what it found until the solution lies in the regions
that it was solved for. That is the search of SCYFI (Eisenmann et al., NeurIPS 2023, arXiv 2310.17561).

Shapes: R rows, M states, k the cycle's order. A map is two functions of float64 rows: `step` [R, M] -> [R, M] and
`jacobian` [R, M] -> [R, M, M], which share no work between rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]

MARGIN = 1e-6  # an eigenvalue whose modulus is this close to 1 leaves the stability open
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Cycle:
    """points [k, M], each the image of the one before, the first that of the last; eigenvalues [M] complex, of the
    product of the Jacobians along them, largest modulus first; error: the largest |F(z_i) - z_i+1| of any entry.

    For a point on a border between regions the eigenvalues are those of the region that `jacobian` counts it to."""

    points: Tensor
    eigenvalues: Tensor
    error: float

    @property
    def order(self) -> int:
        return len(self.points)

    @property
    def stability(self) -> str:
        """stable (every modulus is below 1), unstable (every one above), saddle (some are), or non-hyperbolic where one
        is 1 to within MARGIN: the linear part does not tell. A cycle with an eigenvalue 1 may be one of a continuum."""
        modulus = self.eigenvalues.abs()
        if ((modulus - 1).abs() <= MARGIN).any():
            return "non-hyperbolic"
        outside = modulus > 1
        return "unstable" if outside.all() else "saddle" if outside.any() else "stable"


def report(found: list[Cycle]) -> list[dict[str, Any]]:
    """Cycles as plain values that JSON takes; an eigenvalue is [real, imaginary]."""
    return [
        {
            "order": cycle.order,
            "stability": cycle.stability,
            "radius": float(cycle.eigenvalues.abs().max()),
            "eigenvalues": torch.view_as_real(cycle.eigenvalues).tolist(),
            "points": cycle.points.tolist(),
            "error": cycle.error,
        }
        for cycle in found
    ]


@torch.no_grad()
def cycles(
    step: Map,
    jacobian: Map,
    order: int,
    starts: Tensor,
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-9,
    generator: torch.Generator | None = None,
) -> list[Cycle]:
    """The cycles of exactly that order that the search finds from starts [R, M], points of an orbit say; order 1 gives
    the fixed points. Sorted by their first point, which is the one whose first entry is least.

    Every row takes `max_iterations` Newton steps on k points, at first its start's orbit. One that has found a cycle,
    diverged, or come back to where it was begins again: each of its k points is drawn from the starts and moved by up
    to ten or so of their standard deviations (`generator`; without one the draws are the same each time). It is a
    heuristic: that the search finds nothing more does not prove that there is nothing more.

    A cycle is kept where F(z_i) = z_i+1 to within `tolerance` times the largest |entry| of the starts, rounding
    included: what lies so far out that rounding hides the difference is not found. Two that come within a thousand
    times that are one. Of a continuum of cycles, one is kept for each sequence of affine maps.

    Raises ValueError for starts that are not finite rows, an order below 1 and functions of other shapes or types."""
    if starts.ndim != 2 or not len(starts) or not torch.isfinite(starts).all():
        raise ValueError(
            f"starts: got shape {tuple(starts.shape)}, expected finite rows [R, M]: leave out diverged ones"
        )
    if order < 1:
        raise ValueError(f"order: got {order}, expected 1 for fixed points or k for cycles of k points")
    starts = starts.double()
    width, scale = starts.shape[1], float(starts.abs().max()) or 1.0
    spread = starts.std(0, correction=0)
    spread = torch.where(spread > 0, spread, scale)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    found = _Found(tolerance * scale * 1e3)

    def drawn(n: int) -> Tensor:
        random = {"generator": generator, "device": generator.device}
        pick = torch.randint(len(starts), (n, order), **random)
        reach = 10 ** (4 * torch.rand(n, 1, 1, **random) - 3).to(starts)
        return starts[pick.to(starts.device)] + reach * spread * torch.randn(n, order, width, **random).to(starts)

    orbit = [starts]
    for _ in range(order - 1):
        orbit.append(_evaluate(step, orbit[-1], (width,)))
    points = torch.stack(orbit, 1)  # [R, k, M]
    anchor, age = torch.full_like(points, torch.inf), torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for _ in range(max_iterations + 1):
        image = _evaluate(step, points.flatten(0, 1), (width,)).view_as(points)
        jacobians = _evaluate(jacobian, points.flatten(0, 1), (width, width)).view(*points.shape, width)
        gap = image - points.roll(-1, 1)
        finite = torch.isfinite(image).flatten(1).all(1) & torch.isfinite(jacobians).flatten(1).all(1)
        error = gap.abs().amax((1, 2)) + 4 * EPS * points.abs().amax((1, 2))
        closed = finite & (age > 0) & (error <= tolerance * scale)  # what no step has made is near a cycle at best
        if closed.any():
            found.add(points[closed], jacobians[closed], gap[closed])
        moved = points.clone()
        moved[finite] += _newton(jacobians[finite], gap[finite], scale / tolerance)
        # Brent's way to notice a loop: the iterate that later ones are compared with is renewed at doubling ages.
        stuck = (moved - anchor).abs().amax((1, 2)) <= tolerance * scale
        again = ~finite | closed | stuck | ~torch.isfinite(moved).flatten(1).all(1)
        renew = (age & (age + 1)) == 0
        anchor = torch.where(renew[:, None, None], moved, anchor)
        moved[again], anchor[again] = drawn(int(again.sum())), torch.inf
        points, age = moved, torch.where(again, 0, age + 1)
    return found.sorted()


def _evaluate(function: Map, z: Tensor, shape: tuple[int, ...]) -> Tensor:
    out = function(z)
    if out.shape != (len(z), *shape) or out.dtype != torch.float64:
        raise ValueError(
            f"the map: a function of float64 rows {list(z.shape)} returned {list(out.shape)}, {out.dtype}; expected "
            f"{[len(z), *shape]} in float64: convert the model with .double()"
        )
    return out


def _newton(jacobians: Tensor, gap: Tensor, far: float) -> Tensor:
    """[R, k, M], [R, k, M, M] -> the steps d [R, k, M] with d_i+1 = J_i d_i + gap_i around the cycle. Where that has no
    solution nearer than `far`, the one of least squares in the first of them."""
    product, offset = torch.eye(gap.shape[2]).to(gap).expand_as(jacobians[:, 0]), torch.zeros_like(gap[:, 0])
    for i in range(gap.shape[1]):
        product = jacobians[:, i] @ product
        offset = (jacobians[:, i] @ offset[:, :, None])[:, :, 0] + gap[:, i]
    matrix = torch.eye(gap.shape[2]).to(gap) - product
    first = torch.linalg.solve_ex(matrix, offset[:, :, None])[0]
    sane = torch.isfinite(matrix).flatten(1).all(1) & torch.isfinite(offset).all(1)
    singular = ~(first.abs().amax((1, 2)) < far) & sane
    if singular.any():
        first[singular] = torch.linalg.pinv(matrix[singular]) @ offset[singular][:, :, None]
    steps = [first]
    for i in range(gap.shape[1] - 1):
        steps.append(jacobians[:, i] @ steps[-1] + gap[:, i, :, None])
    return torch.stack(steps, 1)[..., 0]


class _Found:
    """The distinct cycles so far. Two are one where they share a point; and, where the equation is singular, where they
    pass the same affine maps: what lies between them are cycles, too."""

    def __init__(self, near: float) -> None:
        self.near = near
        self.cycles: list[Cycle] = []
        self.continua: list[tuple[Tensor, Tensor]] = []  # J [k, M, M] and b [k, M] of singular ones

    def add(self, points: Tensor, jacobians: Tensor, gap: Tensor) -> None:
        """[n, k, M] and what belongs to them."""
        new = torch.ones(len(points), dtype=torch.bool, device=points.device)
        if points.shape[1] > 1:  # no repeats of shorter ones
            new = (points[:, 1:] - points[:, :1]).abs().amax(2).amin(1) > self.near
        if self.cycles:
            new &= self._apart(points, torch.cat([cycle.points for cycle in self.cycles]))
        offsets = points.roll(-1, 1) - (jacobians @ points[..., None])[..., 0]
        for continuum in self.continua:
            new &= ~self._within(jacobians, offsets, *continuum)
        while new.any():
            i = int(new.nonzero()[0, 0])
            product = torch.eye(points.shape[2]).to(points)
            for j in jacobians[i]:
                product = j @ product
            values = torch.linalg.eigvals(product)
            first = int(points[i, :, 0].argmin())
            order = values.abs().argsort(descending=True)
            self.cycles.append(Cycle(points[i].roll(-first, 0), values[order], float(gap[i].abs().max())))
            new[i] = False
            new &= self._apart(points, points[i])
            if ((values - 1).abs() <= MARGIN).any():
                self.continua.append((jacobians[i], offsets[i]))
                new &= ~self._within(jacobians, offsets, *self.continua[-1])

    def _apart(self, points: Tensor, others: Tensor) -> Tensor:
        return torch.cdist(points[:, 0], others, p=math.inf).amin(1) > self.near

    def _within(self, jacobians: Tensor, offsets: Tensor, j: Tensor, b: Tensor) -> Tensor:
        same = torch.zeros(len(offsets), dtype=torch.bool, device=offsets.device)
        for shift in range(len(b)):
            one = (jacobians - j.roll(shift, 0)).abs().amax((1, 2, 3)) <= MARGIN * j.abs().max()
            same |= one & ((offsets - b.roll(shift, 0)).abs().amax((1, 2)) <= self.near)
        return same

    def sorted(self) -> list[Cycle]:
        return sorted(self.cycles, key=lambda cycle: cycle.points.flatten().tolist())


@dataclass(frozen=True, eq=False)
class Regions:
    """symbols [T]: which linear region each point of an orbit lies in, numbered from the one most visited;
    shares [N]: the part of the time that each of them takes."""

    symbols: Tensor
    shares: Tensor


@torch.no_grad()
def regions(step: Map, jacobian: Map, orbit: Tensor) -> Regions:
    """The linear regions that an orbit [T, M] visits, told apart by their affine maps (J, b). Two whose maps agree to
    1e-9 count as one. Raises ValueError for an orbit that is not finite rows."""
    if orbit.ndim != 2 or not len(orbit) or not torch.isfinite(orbit).all():
        raise ValueError(
            f"orbit: got shape {tuple(orbit.shape)}, expected finite rows [T, M]: cut it where it diverged"
        )
    orbit = orbit.double()
    width = orbit.shape[1]
    # Two affine maps differ at almost every point, and their values in almost every direction.
    generator = torch.Generator().manual_seed(0)
    point, direction = torch.randn(2, width, generator=generator, dtype=torch.float64).to(orbit)
    away = point * orbit.abs().max() - orbit
    slope = _evaluate(jacobian, orbit, (width, width))
    value = (_evaluate(step, orbit, (width,)) + (slope @ away[..., None])[..., 0]) @ direction
    value, index = value.sort()
    split = value.diff() > 1e-9 * value.abs().max()
    label = torch.empty_like(index)
    label[index] = torch.cat([split.new_zeros(1), split]).cumsum(0)
    count, old = label.bincount().sort(descending=True)
    return Regions(old.argsort()[label], count.double() / len(orbit))
