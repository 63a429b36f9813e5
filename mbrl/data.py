"""Transitions on the device: a fixed Dataset with its episodes, and the replay Buffer of imagined ones."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbrl.core import Segment, Spec


class Transitions(NamedTuple):
    """A batch of transitions; the leading axes ([B], or [S, B] over seeds) are shared."""

    obs: Tensor  # [..., O]
    act: Tensor  # [..., A]
    reward: Tensor  # [...]
    next_obs: Tensor  # [..., O]
    terminal: Tensor  # [...]  1 where no value follows, as a float

    def pack(self) -> Tensor:
        """[..., 2 O + A + 2]: one row a transition, so that sampling is one gather."""
        flat = (self.obs, self.act, self.reward[..., None], self.next_obs, self.terminal[..., None].to(self.obs))
        return torch.cat(flat, -1)

    @staticmethod
    def unpack(x: Tensor, spec: Spec) -> "Transitions":
        """Views of packed rows [..., 2 O + A + 2]."""
        obs, act, reward, after, terminal = x.split([spec.obs, spec.act, 1, spec.obs, 1], -1)
        return Transitions(obs, act, reward[..., 0], after, terminal[..., 0])


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A fixed set of episodes as flat tensors on one device. Row i is one step; episode e holds the rows
    starts[e] .. starts[e + 1] - 1. Units are the source's own, but for actions, which are in [-1, 1].

    A step may lack its successor (a D4RL file without `next_observations` does not say what follows the last step
    of an episode): then `paired` is False and `next_obs` repeats `obs`. Nothing is ever paired across an episode's end.
    """

    obs: Tensor  # [N, O]
    act: Tensor  # [N, A]
    reward: Tensor  # [N]
    next_obs: Tensor  # [N, O]
    terminal: Tensor  # [N] bool: the task ended here
    paired: Tensor  # [N] bool: next_obs is known
    starts: Tensor  # [E + 1] int64; the last is N
    act_low: Tensor  # [A]  the source's action bounds: raw = low + (act + 1) / 2 * (high - low)
    act_high: Tensor  # [A]
    dt: float = 1.0  # seconds where the source states it, else 1
    dts: Tensor | None = None  # [N] those of each step, where they differ; dt is then their mean
    name: str = ""
    sha256: str = ""  # of the source's bytes
    env: str = ""  # the gymnasium id in which a policy is evaluated, where known
    system: Tensor | None = None  # [E] int64: which system each episode is of, 0, 1, ...; None: all of one
    systems: int = 1  # how many there are
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.obs.shape[0]

    def __repr__(self) -> str:
        facts = f"{len(self)} steps, {self.episodes} episodes, {self.spec.obs} observations, {self.spec.act} actions"
        return f"Dataset({self.name!r}: {facts}, env={self.env!r}, dt={self.dt:g}, on {self.obs.device})"

    @property
    def rows(self) -> dict[str, Tensor]:
        """What is told of each step, [N, ...], by name."""
        names = ("obs", "act", "reward", "next_obs", "terminal", "paired", "dts")
        return {k: x for k in names if (x := getattr(self, k)) is not None}

    @property
    def spec(self) -> Spec:
        return Spec(self.obs.shape[1], self.act.shape[1], systems=self.systems)

    @property
    def episodes(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """[E] steps."""
        return self.starts[1:] - self.starts[:-1]

    @property
    def followed(self) -> Tensor:
        """[E] steps whose successor is known."""
        return torch.bincount(self.episode[self.paired], minlength=self.episodes)

    @property
    def longest(self) -> int:
        """Steps of the longest stretch without a gap."""
        rows = torch.arange(len(self), device=self.paired.device)
        gap = torch.maximum(torch.where(self.paired, -1, rows), self.starts[self.episode] - 1)
        return int((rows - gap.cummax(0).values).max())

    @property
    def returns(self) -> Tensor:
        """[E] undiscounted sums of the rewards."""
        total = torch.cat([self.reward.new_zeros(1, dtype=torch.float64), self.reward.double().cumsum(0)])
        return (total[self.starts[1:]] - total[self.starts[:-1]]).to(self.reward)

    @property
    def episode(self) -> Tensor:
        """[N]: the episode of each row."""
        return torch.repeat_interleave(torch.arange(self.episodes, device=self.obs.device), self.lengths)

    def to(self, *args: Any, **kw: Any) -> "Dataset":
        """As `Tensor.to`: device, dtype; index and masks keep their types."""
        floats = {k: x.to(*args, **kw) for k, x in self.rows.items() if x.is_floating_point()}
        device = floats["obs"].device
        rest = ("terminal", "paired", "starts", "act_low", "act_high", *(() if self.system is None else ("system",)))
        return replace(self, **floats, **{k: getattr(self, k).to(device) for k in rest})

    def of_system(self, index: Tensor) -> list[Tensor]:
        """Rows by the system they are of, in their order."""
        if self.system is None:
            return [index]
        which = self.system[self.episode][index]
        return [index[which == s] for s in range(self.systems)]

    def transitions(self, index: Tensor | None = None) -> Transitions:
        """Rows for a value function: those that have a successor or end the task. index: which rows, all by default."""
        if index is None:
            index = (self.paired | self.terminal).nonzero()[:, 0]
        get = lambda x: x[index]
        fields = (self.obs, self.act, self.reward, self.next_obs, self.terminal.to(self.obs))
        return Transitions(*map(get, fields))

    def windows(self, length: int, index: Tensor | None = None) -> Segment:
        """Windows [B, length + 1] that begin at the rows `index` [B] (all rows where `length` paired steps follow in
        the same episode, by default). Steps past an episode's end are masked, with the last observation repeated."""
        rows = torch.arange(len(self), device=self.obs.device)
        end = self.starts[1:][self.episode]  # [N] one past the episode's last row
        last_paired = torch.where(self.paired[end - 1], end, end - 1)
        if index is None:
            index = ((rows + length <= last_paired) & self.paired).nonzero()[:, 0]
        at = index[:, None] + torch.arange(length, device=self.obs.device)  # [B, T]
        mask = at < last_paired[index][:, None]
        at = torch.where(mask, at, torch.maximum(last_paired[index] - 1, index)[:, None])
        obs = torch.cat([self.obs[index][:, None], self.next_obs[at]], 1)
        dt = self.intervals(at)
        zero = torch.zeros(1, dtype=torch.int64, device=obs.device)
        reward = torch.where(mask, self.reward[at], 0.0)
        return Segment(obs, self.act[at], reward, self.terminal[at] & mask, mask, dt, zero)

    def intervals(self, index: Tensor) -> Tensor:
        """Rows [...] -> the seconds of each step, [..., 1]."""
        if self.dts is None:
            return self.obs.new_full((*index.shape, 1), self.dt)
        return self.dts[index][..., None].to(self.obs)

    def split(self, holdout: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Paired rows in random order, cut in two: (train, held out)."""
        index = self.paired.nonzero()[:, 0]
        order = torch.randperm(len(index), generator=generator, device=generator.device).to(index.device)
        index = index[order]
        return index[holdout:], index[:holdout]


def joined(parts: Sequence[Dataset], *, mixed: bool = False) -> Dataset:
    """Datasets one after the other. mixed: each is of a system of its own, number 0, 1, ...; else all are of one, whose
    facts (dt, name, action bounds) are the first's. `sha256` is of the parts' own.
    Raises ValueError where they cannot stand together, as parts of one system do not whose actions in [-1, 1] stand for
    other ranges."""
    first = parts[0]
    for i, x in enumerate(parts):
        timed = x.dt == first.dt or x.dts is not None
        if x.system is not None:
            raise ValueError(f"joined: part {i} holds {x.systems} systems already, expected parts of one system each")
        if x.spec != first.spec or not timed or (x.dts is None) != (first.dts is None):
            raise ValueError(f"joined: part {i} is of {x.spec}, dt {x.dt}; the first of {first.spec}, dt {first.dt}")
        sides = ((x.act_low, first.act_low), (x.act_high, first.act_high))
        if not mixed and not all(torch.allclose(mine.double(), its.double()) for mine, its in sides):
            own, its = ([side.tolist() for side in (d.act_low, d.act_high)] for d in (x, first))
            raise ValueError(
                f"joined: part {i} has actions within {own[0]} and {own[1]}, the first within {its[0]} and {its[1]}; "
                "load both with the same bounds (of what is in memory: `action_low`, `action_high`, or `env=`)"
            )
    both: dict[str, Any] = {k: torch.cat([x.rows[k] for x in parts]) for k in first.rows}
    if first.dts is not None:
        both["dt"] = float(both["dts"].double().mean())
    ends = torch.cat([x.lengths for x in parts]).cumsum(0)
    if len(parts) > 1 and any(x.sha256 for x in parts):
        both["sha256"] = hashlib.sha256(json.dumps([mixed, *(x.sha256 for x in parts)]).encode()).hexdigest()
    data = replace(first, **both, starts=torch.cat([ends.new_zeros(1), ends]))
    if not mixed:
        return data
    counts = torch.tensor([x.episodes for x in parts], device=ends.device)
    system = torch.arange(len(parts), device=ends.device).repeat_interleave(counts)
    return replace(data, system=system, systems=len(parts))


def one_step(data: Transitions, dt: float = 1.0) -> Segment:
    """Transitions [B] as windows of one step, without copying more than the observations."""
    like = data.reward[:, None]
    mask = torch.ones_like(like, dtype=torch.bool)
    zero = torch.zeros(1, dtype=torch.int64, device=like.device)
    obs = torch.stack([data.obs, data.next_obs], 1)
    dts = torch.full_like(like, dt)[..., None]
    return Segment(obs, data.act[:, None], like, data.terminal[:, None] > 0.5, mask, dts, zero)


class Buffer:
    """A ring of packed transitions for each of S seeds; the oldest rows give way. Seeds may hold different numbers."""

    def __init__(self, seeds: int, capacity: int, spec: Spec, *, device: Any = None, dtype: Any = None) -> None:
        if capacity < 1:
            raise ValueError(f"Buffer: capacity is {capacity}, expected at least 1")
        self.spec = spec
        self.capacity = capacity
        self.rows = torch.zeros(seeds, capacity, 2 * spec.obs + spec.act + 2, device=device, dtype=dtype)
        self.size = [0] * seeds
        self.head = [0] * seeds
        self.ring = torch.zeros(2, seeds, 1, device=device, dtype=torch.float64)  # size and head, for sampling

    def add(self, seed: int, data: Transitions) -> None:
        """Append a batch [B]; of more than `capacity` rows the last are kept."""
        new = data.pack()[-self.capacity :]
        n, head = len(new), self.head[seed]
        first = min(n, self.capacity - head)
        self.rows[seed, head : head + first] = new[:first]
        self.rows[seed, : n - first] = new[first:]
        self._set(seed, min(self.size[seed] + n, self.capacity), (head + n) % self.capacity)

    def keep(self, seed: int, n: int) -> None:
        """Forget all but the last n rows of a seed."""
        self._set(seed, min(self.size[seed], n), self.head[seed])

    def _set(self, seed: int, size: int, head: int) -> None:
        self.size[seed], self.head[seed] = size, head
        self.ring[0, seed], self.ring[1, seed] = size, head

    def sample(self, uniform: Tensor) -> Tensor:
        """uniform [S, B] in [0, 1) -> packed rows [S, B, D], each drawn from what its seed holds. Capturable."""
        size, head = self.ring
        index = (head - 1 - (uniform.double() * size).floor()).long() % self.capacity  # counted back from the newest
        seeds, batch = index.shape
        if seeds == 1:
            return self.rows[0].index_select(0, index[0])[None]
        flat = (index + torch.arange(seeds, device=index.device)[:, None] * self.capacity).flatten()
        return self.rows.flatten(0, 1).index_select(0, flat).reshape(seeds, batch, self.rows.shape[2])

    def state_dict(self) -> dict[str, Tensor]:
        """What is held: rows [S, most, D], oldest first, and how many each seed has [S]. Sampling goes on alike after
        `load_state_dict`."""
        out = self.rows.new_zeros(len(self.size), max(self.size), self.rows.shape[2])
        for seed, (size, head) in enumerate(zip(self.size, self.head, strict=True)):
            index = (torch.arange(size, device=out.device) + head - size) % self.capacity
            out[seed, :size] = self.rows[seed, index]
        return {"rows": out, "size": torch.tensor(self.size)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        rows = state["rows"]
        want = (self.rows.shape[0], self.rows.shape[2])
        if (rows.shape[0], rows.shape[2]) != want or rows.shape[1] > self.capacity:
            raise ValueError(
                f"Buffer: saved rows are {tuple(rows.shape)}, expected [{want[0]}, <= {self.capacity}, {want[1]}]"
            )
        self.rows[:, : rows.shape[1]] = rows
        for seed, size in enumerate(state["size"].tolist()):
            self._set(seed, size, size % self.capacity)
