"""Sets of contexts: worlds of one shape that differ in something which is not observed (a body, an object, gravity), in
the order in which a learner meets them; and data from all of them at once.

| sequence         | tasks | what differs                                                                             |
|------------------|-------|------------------------------------------------------------------------------------------|
| cheetah-body     | 5     | HalfCheetahBody: none, torso, thighs, legs or feet larger by 1.25                         |
| pusher           | 5     | BoxPusher: densities of the box's halves                                                 |
| door             | 5     | LatchDoor: handle, and the direction in which its knob turns                             |
| cartpole-pole    | 10    | CartPoleLength: 0.4 to 1.3 m                                                             |
| reacher-links    | 10    | ReacherLinks: 0.06 and 0.14 m to 0.15 and 0.05 m                                          |
| Hopper-v5:mass   | 5     | any v5 task of MuJoCo; gravity, tilt, mass, friction, damping or gain (`robots.physics`)  |

The first four are those of HyperCRL (arXiv 2009.11997), whose cart-pole and reacher had ten contexts, too.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from mbrl.data import Dataset
from mbrl_envs.evaluate import Policy, ask, make
from mbrl_envs.robots import LatchDoor, Robot, mujoco
from mbrl_envs.simulator import LATER, Rollout
from mbrl_envs.tasks import Function, known

# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class ContextTask:
    """One world of a set. context: what makes it differ, in numbers whose meaning is the set's own: none of them is
    observed. Equal where name, id, arguments and context are."""

    name: str
    id: str  # of gymnasium
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)  # for gymnasium.make
    context: tuple[float, ...] = ()

    def env(self, **kw: Any) -> gym.Env:
        """A new environment; kw: further arguments, a render_mode say."""
        return make(self.id, **self.kwargs, **kw)

    @property
    def reward(self) -> Function | None:
        """(obs [B, O], act [B, A] in [-1, 1], next_obs [B, O]) -> [B]; None where the observations do not tell."""
        return known(self.id).reward

    @property
    def terminal(self) -> Function:
        """Of the same arguments: [B] bool, whether the task ended with this transition."""
        return known(self.id).terminal


def _bodies() -> Iterator[ContextTask]:
    parts = ("torso", "thigh", "leg", "foot")
    for large in ("base", *parts):
        factors = {p: 1.25 if p == large else 1.0 for p in parts}
        yield ContextTask(large, "mbrl_envs/HalfCheetahBody-v0", factors, tuple(factors.values()))


def _boxes() -> Iterator[ContextTask]:
    for left, right in ((500.0, 500.0), (100.0, 500.0), (500.0, 100.0), (500.0, 250.0), (250.0, 500.0)):
        name = f"{left:.0f}-{right:.0f}"
        yield ContextTask(name, "mbrl_envs/BoxPusher-v0", {"left": left, "right": right}, (left, right))


def _doors() -> Iterator[ContextTask]:
    for handle, turn in (("pull", 1), ("round", 1), ("lever", 1), ("round", -1), ("lever", -1)):
        name = handle + ("" if handle == "pull" else "-right" if turn > 0 else "-left")
        kind = tuple(float(handle == x) for x in LatchDoor.HANDLES)
        turned = 0.0 if handle == "pull" else float(turn)
        yield ContextTask(name, "mbrl_envs/LatchDoor-v0", {"handle": handle, "turn": turn}, (*kind, turned))


def _poles() -> Iterator[ContextTask]:
    for length in (x / 10 for x in range(4, 14)):
        yield ContextTask(f"{length:.1f}", "mbrl_envs/CartPoleLength-v0", {"length": length}, (length,))


def _links() -> Iterator[ContextTask]:
    for first, second in ((x / 100, (20 - x) / 100) for x in range(6, 16)):
        name, links = f"{first:.2f}-{second:.2f}", {"first": first, "second": second}
        yield ContextTask(name, "mbrl_envs/ReacherLinks-v0", links, (first, second))


SEQUENCES: Mapping[str, tuple[ContextTask, ...]] = {
    "cheetah-body": tuple(_bodies()),
    "pusher": tuple(_boxes()),
    "door": tuple(_doors()),
    "cartpole-pole": tuple(_poles()),
    "reacher-links": tuple(_links()),
}

PHYSICS: Mapping[str, tuple[float, ...]] = {
    "gravity": (1.0, 0.5, 0.75, 1.25, 1.5),
    "tilt": (0.0, -0.2, -0.1, 0.1, 0.2),
    "mass": (1.0, 0.5, 0.75, 1.25, 1.5),
    "friction": (1.0, 0.25, 0.5, 1.5, 2.0),
    "damping": (1.0, 0.25, 0.5, 2.0, 4.0),
    "gain": (1.0, 0.5, 0.75, 1.25, 1.5),
}
"""What of a v5 task can differ, and the values of its tasks: factors, of the tilt rad; the unchanged one first."""


def varied(task: str, **values: Sequence[float]) -> list[ContextTask]:
    """Tasks of a v5 task, the i-th with the i-th of each given value: varied("Hopper-v5", mass=(1.0, 2.0),
    tilt=(0.0, 0.1)). Contexts are the values, in the order of `PHYSICS`.

    Raises ValueError for a task or a quantity that is not known, and for values of different number."""
    env_id = f"mbrl_envs/{task.removesuffix('-v5')}Physics-v0"
    if not task.endswith("-v5") or env_id not in gym.registry:
        there = sorted(
            x.removeprefix("mbrl_envs/").replace("Physics-v0", "-v5") for x in gym.registry if "Physics" in x
        )
        raise ValueError(f"contexts: got the task {task!r}, expected one of {', '.join(there)}")
    if strange := values.keys() - PHYSICS.keys():
        raise ValueError(f"contexts: got {', '.join(sorted(strange))}, expected some of {', '.join(PHYSICS)}")
    if not values or len({len(x) for x in values.values()}) != 1:
        raise ValueError(f"contexts: got { ({k: len(x) for k, x in values.items()}) } values, expected as many of each")
    out = []
    for row in zip(*values.values(), strict=True):
        given = dict(zip(values, map(float, row), strict=True))
        name = ",".join(f"{k}={x:g}" for k, x in given.items())
        whole = tuple(given.get(k, x[0]) for k, x in PHYSICS.items())
        out.append(ContextTask(name, env_id, given, whole))
    return out


def tasks(name: str) -> list[ContextTask]:
    """The tasks of a sequence, by its name in `SEQUENCES`, or as "Hopper-v5:mass" with the values of `PHYSICS`.

    Raises ValueError for a name that there is not."""
    if name in SEQUENCES:
        return list(SEQUENCES[name])
    task, colon, what = name.partition(":")
    if not colon:
        raise ValueError(
            f"contexts: got the sequence {name!r}, expected one of {', '.join(SEQUENCES)}, or a v5 task and what "
            "differs, as in Hopper-v5:mass"
        )
    return varied(task, **{what: PHYSICS.get(what, ())})


# ---------------------------------------------------------------- data


def collect(
    tasks: Sequence[ContextTask],
    steps: int,
    policy: Policy | Tensor | None = None,
    seed: int = 0,
    threads: int | None = None,
    hold: int = 1,
) -> list[Dataset]:
    """`steps` transitions of each task, all of one id, in episodes that end as the environment's do; the last is cut.

    policy: of obs [n, O] (float32) to act [n, A] in [-1, 1]; or the actions themselves, [E, T, A] for all tasks or
    [tasks, E, T, A]: episode e plays row e until it ends or T steps are done; by default uniform random actions, each
    held for `hold` steps. threads: by default one for each processor.

    Episode e of task i begins with `first_seed(seed, i, e)`. Robots of ours run side by side in `mujoco.rollout`, and
    so do gymnasium's half-cheetah and swimmer where the actions are no policy's; all else is stepped in threads, one
    environment a task. Either gives what the environment gives.

    Raises ValueError for tasks of several ids, for actions of another shape or too few, and for a simulation that
    diverges."""
    threads = os.cpu_count() or 1 if threads is None else threads
    if not tasks or min(steps, threads, hold) < 1:
        got = f"{len(tasks)} tasks, steps={steps}, threads={threads}, hold={hold}"
        raise ValueError(f"collect: got {got}; expected at least one of each")
    if len(ids := sorted({task.id for task in tasks})) > 1:
        raise ValueError(f"collect: got tasks of {', '.join(ids)}, whose spaces differ; expected tasks of one id")
    worlds = [_World(task) for task in tasks]
    source = _source(policy, len(tasks), worlds[0], steps, seed, hold)
    play = _robots if worlds[0].robot else _runners if worlds[0].unseen and source.acts else _stepped
    taken: list[list[_Episode]] = [[] for _ in tasks]
    with ThreadPoolExecutor(threads) as pool, Rollout(nthread=threads if threads > 1 else 0) as simulate:
        scratch = [mujoco.MjData(worlds[0].base.model) for _ in range(threads)]
        batch = _Batch(worlds, source, seed, pool, simulate, scratch)
        while missing := {i: n for i, x in enumerate(taken) if (n := steps - sum(len(e.act) for e in x)) > 0}:
            rows = [(i, len(taken[i]) + e) for i, n in missing.items() for e in range(-(-n // source.length))]
            if source.most is not None and max(e for _, e in rows) >= source.most:
                raise ValueError(f"collect: {source.most} episodes of actions do not make {steps} steps; pass more")
            for (i, _), episode in zip(rows, play(batch, rows), strict=True):
                taken[i].append(episode)
    for world in worlds:
        world.env.close()
    return [_dataset(w, x, steps, seed) for w, x in zip(worlds, taken, strict=True)]


def first_seed(seed: int, task: int, episode: int) -> int:
    """What an episode's environment is reset with."""
    return int(np.random.SeedSequence([seed, task, episode]).generate_state(1)[0]) % 2**31


Rows = list[tuple[int, int]]  # task and episode, contiguous by task


class _Episode(NamedTuple):
    obs: np.ndarray  # [T + 1, O]
    act: np.ndarray  # [T, A] in [-1, 1]
    reward: np.ndarray  # [T]
    terminal: bool  # whether its last step ended the task


_UNSEEN = {"HalfCheetahBody": 1, "HalfCheetahPhysics": 1, "SwimmerPhysics": 2}
"""Robots of gymnasium that never end and observe their joints, but for so many of the first positions, behind their
forward velocity."""


class _World:
    """A task with its environment."""

    def __init__(self, task: ContextTask) -> None:
        self.task, self.env = task, task.env()
        self.base: Any = self.env.unwrapped
        self.robot = isinstance(self.base, Robot)
        self.unseen = _UNSEEN.get(task.id.removeprefix("mbrl_envs/").removesuffix("-v0"))
        obs, box = self.env.observation_space, self.env.action_space
        assert isinstance(obs, gym.spaces.Box)
        assert isinstance(box, gym.spaces.Box)
        self.obs, self.box = obs.shape[0], box

    def sent(self, act: np.ndarray) -> np.ndarray:
        """Actions in the environment's units, exactly themselves where its bounds are -1 and 1."""
        low, high = np.float64(self.box.low), np.float64(self.box.high)
        return (low + (act.astype(np.float64) + 1) / 2 * (high - low)).astype(self.box.dtype)

    def valued(self, obs: np.ndarray, act: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and ends of transitions, [n] each."""
        assert self.task.reward is not None
        args = [torch.from_numpy(x.astype(np.float64)) for x in (obs, act, after)]
        return self.task.reward(*args).numpy(), self.task.terminal(*args).numpy()


class _Source(NamedTuple):
    """Where actions come from: of a policy, or acts(task, episode) -> [length, A]."""

    length: int  # steps at which an episode is cut
    width: int  # of actions
    policy: Policy | None = None
    acts: Callable[[int, int], np.ndarray] | None = None
    most: int | None = None  # episodes that there are


class _Batch(NamedTuple):
    worlds: list[_World]
    source: _Source
    seed: int
    pool: ThreadPoolExecutor
    simulate: Any
    scratch: list[Any]  # one for each of its threads

    def starts(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """The full states with which episodes begin, and the solver's warm starts: [R, S], [R, nv]."""
        full, out = mujoco.mjtState.mjSTATE_FULLPHYSICS.value, []
        for i, e in rows:
            base = self.worlds[i].base
            self.worlds[i].env.reset(seed=first_seed(self.seed, i, e))
            state = np.empty(mujoco.mj_stateSize(base.model, full))
            mujoco.mj_getState(base.model, base.data, state, full)
            out.append((state, base.data.qacc_warmstart.copy()))
        first, warm = zip(*out, strict=True)
        return np.stack(first), np.stack(warm)

    def run(self, rows: Rows, state: np.ndarray, ctrl: np.ndarray, warm: np.ndarray | None = None) -> np.ndarray:
        """Full states [R, T, S] after each step of the environment under ctrl [R, T, nu]."""
        base = self.worlds[0].base
        skip = base.frame_skip
        models, inputs = [self.worlds[i].base.model for i, _ in rows], ctrl.astype(np.float64).repeat(skip, 1)
        state = np.concatenate([np.full_like(state[:, :1], LATER), state[:, 1:]], 1)
        out = self.simulate.rollout(models, self.scratch, state, inputs, initial_warmstart=warm)[0][:, skip - 1 :: skip]
        lost = (out[..., 0] < LATER).any(1)  # MuJoCo begins anew at time 0
        if lost.any():
            raise _diverged(self.worlds[rows[int(lost.argmax())][0]])
        return out

    def plans(self, rows: Rows) -> np.ndarray | None:
        """[R, length, A]; None where a policy acts."""
        acts = self.source.acts
        return None if acts is None else np.stack([acts(*row) for row in rows])


_LOST = tuple(getattr(mujoco.mjtWarning, f"mjWARN_BAD{x}") for x in ("QPOS", "QVEL", "QACC"))


def _diverged(world: _World) -> ValueError:
    return ValueError(
        f"collect: the simulation of {world.task.name} ({world.task.id}) has diverged; give milder actions or contexts"
    )


def _split(base: Any, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Full states [..., S] -> positions, velocities."""
    nq, nv = base.model.nq, base.model.nv
    return state[..., 1 : 1 + nq], state[..., 1 + nq : 1 + nq + nv]


def _robots(batch: _Batch, rows: Rows) -> list[_Episode]:
    """Robots of ours: all episodes side by side, step by step."""
    worlds, base, length = batch.worlds, batch.worlds[0].base, batch.source.length
    task, plans = np.array([i for i, _ in rows]), batch.plans(rows)

    def seen(live: np.ndarray) -> np.ndarray:
        """[len(live), O]; rows are contiguous by task."""
        of = [live[task[live] == i] for i in np.unique(task[live])]
        return np.concatenate([worlds[task[x[0]]].base.observation(*_split(base, state[x])) for x in of])

    state, _ = batch.starts(rows)
    live = np.arange(len(rows))
    obs = np.empty((len(rows), length + 1, worlds[0].obs))
    act = np.empty((len(rows), length, base.action_space.shape[0]), np.float32)
    reward, last, ended = np.empty((len(rows), length)), np.full(len(rows), length), np.zeros(len(rows), dtype=bool)
    obs[:, 0] = seen(live)
    for t in range(length):
        act[live, t] = _asked(batch.source, obs[live, t]) if plans is None else plans[live, t]
        ctrl = base.control(act[live, t].astype(np.float64), _split(base, state[live])[0])
        state[live] = batch.run([rows[k] for k in live], state[live], ctrl[:, None])[:, -1]
        obs[live, t + 1] = seen(live)
        reward[live, t], end = worlds[0].valued(obs[live, t], act[live, t], obs[live, t + 1])
        ended[live[end]], last[live[end]] = True, t + 1
        live = live[~end]
        if not len(live):
            break
    return [
        _Episode(obs[k, : n + 1], act[k, :n], reward[k, :n], bool(end))
        for k, (n, end) in enumerate(zip(last, ended, strict=True))
    ]


def _runners(batch: _Batch, rows: Rows) -> list[_Episode]:
    """Robots of gymnasium that observe their joints alone: all episodes at once, from actions that are known."""
    worlds, base, acts = batch.worlds, batch.worlds[0].base, batch.plans(rows)
    assert acts is not None
    state, warm = batch.starts(rows)
    ctrl = np.stack([worlds[0].sent(x) for x in acts])
    states = np.concatenate([state[:, None], batch.run(rows, state, ctrl, warm)], 1)
    qpos, qvel = _split(base, states)
    speed = np.diff(qpos[..., :1], axis=1, prepend=qpos[:, :1, :1]) / base.dt
    obs = np.concatenate([speed, qpos[..., worlds[0].unseen :], qvel], -1)
    return [_Episode(x, a, worlds[0].valued(x[:-1], a, x[1:])[0], False) for x, a in zip(obs, acts, strict=True)]


def _stepped(batch: _Batch, rows: Rows) -> list[_Episode]:
    """Any robots: one environment a task, whose episodes follow one another; the tasks side by side."""
    done: dict[tuple[int, int], _Episode] = {}
    lanes = [_Lane(batch, i, [row for row in rows if row[0] == i]) for i in dict.fromkeys(i for i, _ in rows)]
    while lanes:
        if batch.source.policy is None:
            acts: Sequence[np.ndarray | None] = [None] * len(lanes)
        else:
            acts = list(_asked(batch.source, np.stack([lane.obs[-1] for lane in lanes])))
        list(batch.pool.map(lambda lane, act: lane.step(act), lanes, acts))
        for lane in lanes:
            done |= lane.taken
        lanes = [lane for lane in lanes if lane.rows]
    return [done[row] for row in rows]


class _Lane:
    """The episodes that one environment is to play."""

    def __init__(self, batch: _Batch, task: int, rows: Rows) -> None:
        self.batch, self.world, self.rows = batch, batch.worlds[task], rows
        self.taken: dict[tuple[int, int], _Episode] = {}
        self.begin()

    def begin(self) -> None:
        first, _ = self.world.env.reset(seed=first_seed(self.batch.seed, *self.rows[0]))
        self.obs, self.act, self.reward = [first], [], []
        acts = self.batch.source.acts
        self.plan = None if acts is None else acts(*self.rows[0])

    def step(self, act: np.ndarray | None) -> None:
        """One step; without an action, the whole of a planned episode."""
        for a in (act,) if self.plan is None else self.plan:
            assert a is not None
            obs, reward, end, cut, _ = self.world.env.step(self.world.sent(a))
            if any(self.world.base.data.warning[x].number for x in _LOST):
                raise _diverged(self.world)
            self.obs.append(obs)
            self.act.append(a)
            self.reward.append(float(reward))
            if end or cut or len(self.act) == self.batch.source.length:
                obs, acts, rewards = map(np.stack, (self.obs, self.act, self.reward))
                self.taken[self.rows.pop(0)] = _Episode(obs, acts, rewards, bool(end))
                if self.rows:
                    self.begin()
                return


def _asked(source: _Source, obs: np.ndarray) -> np.ndarray:
    """The policy's actions [n, A] within [-1, 1] for obs [n, O]."""
    assert source.policy is not None
    act = ask(source.policy, obs.astype(np.float32), source.width)
    if not np.isfinite(act).all():
        raise ValueError("collect: the policy's action is not finite")
    return act.clip(-1, 1)


def _source(policy: Policy | Tensor | None, n: int, world: _World, steps: int, seed: int, hold: int) -> _Source:
    spec, (width,) = world.env.spec, world.box.shape
    assert spec is not None
    assert spec.max_episode_steps is not None
    limit = min(spec.max_episode_steps, steps)
    if policy is None:

        def random(task: int, episode: int) -> np.ndarray:
            draw = np.random.default_rng([seed, task, episode, 1])  # 1: another stream than first_seed's
            kept = draw.uniform(-1, 1, (-(-limit // hold), width)).astype(np.float32)
            return kept.repeat(hold, 0)[:limit]

        return _Source(limit, width, acts=random)
    if not isinstance(policy, Tensor):
        return _Source(limit, width, policy)
    given = policy.detach().float().cpu().numpy()
    own, want = given.ndim == 4, f"[E, T, {width}] or [{n}, E, T, {width}]"
    if given.ndim not in (3, 4) or given.shape[-1] != width or 0 in given.shape or (own and len(given) != n):
        raise ValueError(
            f"collect: got actions {list(given.shape)}, expected {want}, with an episode and a step at least"
        )
    if not np.isfinite(given).all():
        raise ValueError("collect: got actions that are not finite")
    given, length = given.clip(-1, 1), min(limit, given.shape[-2])
    acts = lambda i, e: (given[i] if own else given)[e, :length]
    return _Source(length, width, acts=acts, most=given.shape[-3])


def _dataset(world: _World, episodes: list[_Episode], steps: int, seed: int) -> Dataset:
    """The first `steps` of the episodes' transitions."""
    lengths = np.minimum(np.cumsum([len(e.act) for e in episodes]), steps)
    obs = np.concatenate([e.obs[:-1] for e in episodes])[:steps].astype(np.float32)
    after = np.concatenate([e.obs[1:] for e in episodes])[:steps].astype(np.float32)
    act = np.concatenate([e.act for e in episodes])[:steps].astype(np.float32)
    terminal = np.zeros(sum(len(e.act) for e in episodes), dtype=bool)
    terminal[np.cumsum([len(e.act) for e in episodes]) - 1] = [e.terminal for e in episodes]
    reward = np.concatenate([e.reward for e in episodes])[:steps].astype(np.float32)
    task = world.task
    names = ("obs", "act", "reward", "next_obs", "terminal")
    columns: dict[str, Any] = {
        k: torch.from_numpy(x) for k, x in zip(names, (obs, act, reward, after, terminal[:steps]), strict=True)
    }
    return Dataset(
        **columns,
        paired=torch.ones(steps, dtype=torch.bool),
        starts=torch.from_numpy(np.concatenate([[0], lengths])),
        act_low=torch.from_numpy(world.box.low.copy()),
        act_high=torch.from_numpy(world.box.high.copy()),
        dt=float(world.base.dt),
        name=task.name,
        sha256=hashlib.sha256(b"".join(x.tobytes() for x in (obs, act, reward, after))).hexdigest(),
        env=task.id,
        meta={"kwargs": dict(task.kwargs), "context": task.context, "seed": seed},
    )
