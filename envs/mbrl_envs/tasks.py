"""What imagined transitions of a known task earn, and when they end: reward and termination as torch functions.

They repeat gymnasium's MuJoCo environments (v4 and v5, whose conditions v2 and v3 share), its Pendulum, our cart-pole
swing-up, and the Adroit, maze and kitchen tasks, at their default arguments. Each function equals the environment's own
step to 1e-6 where the observations determine it in closed form; elsewhere `reward` is None and a learned head serves,
or the simulator itself (`mbrl_envs.simulator`). For the v5 tasks:

| task                   | end                            | reward                                                   |
|------------------------|--------------------------------|----------------------------------------------------------|
| HalfCheetah, Swimmer   | never                          | if x is observed (1)                                     |
| Hopper                 | height, angle, state's size (2)| if x is observed (1)                                     |
| Walker2d               | height, angle                  | if x is observed (1)                                     |
| Ant                    | height, or not finite          | none (3)                                                 |
| Humanoid               | height                         | none (3)                                                 |
| HumanoidStandup        | never                          | height, action, contact forces, all observed             |
| InvertedPendulum       | angle, or not finite           | 1 while it stands                                        |
| InvertedDoublePendulum | height of the tip (4)          | none (4)                                                 |
| Pusher, Reacher        | never                          | distances, which are observed as charged, and action     |
| Pendulum               | never                          | state before the step and action                         |
| CartPoleSwingUp        | cart's position                | state after the step and action                          |

and for the robots of `mbrl_envs.robots`:

| CartPoleLength         | as CartPoleSwingUp             | as CartPoleSwingUp                                       |
| BoxPusher              | never                          | corners' distances from the goal's, and action           |
| LatchDoor              | never                          | hand to grip, knob, door, and action                     |
| ReacherLinks           | never                          | as Reacher                                               |
| HalfCheetahBody        | never                          | forward velocity, which is observed, and action          |
| HopperPhysics ..       | as the v5 task                 | as the v5 task; of the four runners from the forward     |
|                        |                                | velocity, which is observed                              |

(1) They reward (x' - x) / dt. By default x is left out of the observation, and the observed velocity is that at the
    step's end, not the mean over its 4 or 5 substeps. Where the source observes x
    (`exclude_current_positions_from_observation=False`, or NeoRL's files), `task(id, obs=width)` gives the reward.
(2) Hopper and Walker2d clip observed velocities to [-10, 10]. Hopper ends when any of |state[2:]| reaches 100,
    velocities included; of those a clipped observation never tells, so that only the angles can end an episode by this
    limit (an episode which the simulator ended for a velocity alone would be missed: data hold none, since 100 is far
    beyond what the actuators reach).
(3) They reward the velocity of a body (Ant's torso, Humanoid's centre of mass) whose place MuJoCo computed at the last
    stage of its last Runge-Kutta substep, not at the state that is observed; no observation holds that place, with x
    or without. Health, control and contact costs alone would be determined.
(4) The tip's place is computed at that earlier stage too (off by up to 1e-4 from what the angles give: an episode's end
    is exact but within that of the limit, a height of 1), and the reward charges angular velocities that the
    observation clips.

A prediction that is not finite is unhealthy, as the simulator's is.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mbrl_envs.scores import parted

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """One task's functions of (obs [B, O], act [B, A] in [-1, 1], next_obs [B, O])."""

    env: str  # the gymnasium id whose conditions these are; "" for a family of several
    terminal: Function  # -> [B] bool: the task ended with this transition
    reward: Function | None = None  # -> [B]; None where the observations do not determine it


def task(env_id: str, obs: int | None = None) -> Task | None:
    """The task of an environment's id ("Hopper-v5", "mbrl_envs/CartPoleSwingUp-v0") or a dataset's
    ("hopper-medium-v2", "D4RL/door/human-v2"); None where the task is not known, as that of "Hopper-Heavy-v0" is not,
    nor that of an id with arguments, as 'Pendulum-v1{"g": 1.6}', unless it is another time limit alone.
    obs: the observations' width; needed only where they begin with the position that the task leaves out by default,
    since the reward of such a source is determined.

    Raises ValueError for a width that the task does not have, as the functions themselves do, and for arguments that
    are no JSON."""
    name, own = parted(env_id)
    if set(own) - {"max_episode_steps"}:  # another world; a limit changes neither what it earns nor where it ends
        return None
    name = name.rpartition(":")[2].removeprefix("mbrl_envs/")  # without minari:, or the module that registers it
    version = re.search(r"-v(\d+)", name)
    words = [w for w in re.split(r"[/_\-]", re.sub(rf"-v\d+({_NEORL})*$", "", name)) if w]
    space = words.pop(0).lower() if "/" in name and words else ""
    if not words or space not in ("", "d4rl", "mujoco", "neorl"):
        return None
    old = space != "mujoco" and version is not None and int(version[1]) < 5
    first, *kind = words
    first = first.lower()
    family = re.sub(r"^adroithand(\w+?)(sparse)?$", r"\1", first)
    if family not in ("maze2d", "pointmaze") and not set(kind) <= _KINDS:
        return None
    if family in _RECORDED and not kind and first == family:
        return None
    if re.fullmatch(r"(D4RL/)?pen-[a-z]+-v\d+", name) and not env_id.startswith("minari:"):
        return _pen(obs)
    if family in _NEVER:
        return Task(_NEVER[family], _never({}, family))
    build = _FAMILIES.get(family)
    return None if build is None else build(4 if old else 5, obs)


# ---------------------------------------------------------------- tools


def _lead(widths: Mapping[int, int], env: str, obs: int) -> int:
    """How many unobserved-by-default positions a width has in front."""
    if obs not in widths:
        known = " or ".join(str(w) for w in sorted(widths))
        raise ValueError(
            f"{env}: observations are {obs} wide, expected {known}; for a variant of the environment "
            "train a termination and a reward head instead"
        )
    return widths[obs]


def _never(widths: Mapping[int, int], env: str) -> Function:
    def terminal(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        if widths:
            _lead(widths, env, next_obs.shape[-1])
        return torch.zeros(next_obs.shape[:-1], dtype=torch.bool, device=next_obs.device)

    return terminal


def _unless(healthy: Callable[[Tensor], Tensor], widths: Mapping[int, int], env: str) -> Function:
    """Terminal unless healthy(next_obs without its leading positions)."""

    def terminal(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        return ~healthy(next_obs[..., _lead(widths, env, next_obs.shape[-1]) :])

    return terminal


def known(env_id: str) -> Task:
    """The task of an id that must be known."""
    found = task(env_id)
    assert found is not None, env_id
    return found


def _within(x: Tensor, low: float, high: float) -> Tensor:
    return (low < x) & (x < high)


def _runner(
    env: str,
    version: int,
    obs: int | None,
    widths: dict[int, int],
    healthy: Callable[[Tensor], Tensor] | None,
    dt: float,
    ctrl: float,
) -> Task:
    """HalfCheetah, Hopper, Walker2d, Swimmer: forward velocity of qpos[0], minus ctrl |a|^2, plus 1 for health where
    there is such a thing (up to v4 also on the step that ends the episode)."""
    lead = 0 if obs is None else _lead(widths, env, obs)
    terminal = _never(widths, env) if healthy is None else _unless(healthy, widths, env)

    def reward(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        if _lead(widths, env, next_obs.shape[-1]) != lead:
            raise ValueError(
                f"{env}: observations are {next_obs.shape[-1]} wide; the reward needs them to begin with x"
            )
        speed = (next_obs[..., 0] - obs[..., 0]) / dt
        total = speed - ctrl * act.square().sum(-1)
        if healthy is None:
            return total
        return total + (1.0 if version < 5 else (~terminal(obs, act, next_obs)).to(total))

    return Task(f"{env}-v{version}", terminal, reward if lead else None)


# ---------------------------------------------------------------- the tasks


def _hopper(version: int, obs: int | None) -> Task:
    def healthy(x: Tensor) -> Tensor:  # x = qpos[1:], qvel; state[2:] is x[1:]: the height may be anything above 0.7
        return (x[..., 0] > 0.7) & _within(x[..., 1], -0.2, 0.2) & _within(x[..., 1:], -100, 100).all(-1)

    return _runner("Hopper", version, obs, {11: 0, 12: 1}, healthy, dt=0.008, ctrl=1e-3)


def _walker(version: int, obs: int | None) -> Task:
    healthy = lambda x: _within(x[..., 0], 0.8, 2) & _within(x[..., 1], -1, 1)
    return _runner("Walker2d", version, obs, {17: 0, 18: 1}, healthy, dt=0.008, ctrl=1e-3)


def _cheetah(version: int, obs: int | None) -> Task:
    return _runner("HalfCheetah", version, obs, {17: 0, 18: 1}, None, dt=0.05, ctrl=0.1)


def _swimmer(version: int, obs: int | None) -> Task:
    return _runner("Swimmer", version, obs, {8: 0, 10: 2}, None, dt=0.04, ctrl=1e-4)


def _ant(version: int, obs: int | None) -> Task:
    # 27 positions and velocities; contact forces are 78 more in v5, 84 on request in v4 and always in v2
    widths = {27: 0, 29: 2, 105: 0, 107: 2, 111: 0, 113: 2}
    if obs is not None:
        _lead(widths, "Ant", obs)
    healthy = lambda x: x.isfinite().all(-1) & (x[..., 0] >= 0.2) & (x[..., 0] <= 1)
    return Task(f"Ant-v{version}", _unless(healthy, widths, "Ant"))


def _humanoid_widths(version: int) -> dict[int, int]:
    return {348: 0, 350: 2} if version == 5 else {376: 0, 378: 2}


def _humanoid(version: int, obs: int | None) -> Task:
    widths = _humanoid_widths(version)
    if obs is not None:
        _lead(widths, "Humanoid", obs)
    return Task(f"Humanoid-v{version}", _unless(lambda x: _within(x[..., 0], 1, 2), widths, "Humanoid"))


def _standup(version: int, obs: int | None) -> Task:
    env, widths = "HumanoidStandup", _humanoid_widths(version)
    forces = 78 if version == 5 else 84  # cfrc_ext; v5 drops the world's six, which are zero
    if obs is not None:
        _lead(widths, env, obs)

    def reward(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        height = next_obs[..., _lead(widths, env, next_obs.shape[-1])]
        impact = 0.5e-6 * next_obs[..., -forces:].square().sum(-1)
        return height / 0.003 - 0.1 * (0.4 * act).square().sum(-1) - impact.clamp(max=10) + 1

    return Task(f"{env}-v{version}", _never(widths, env), reward)


def _fixed(width: int, env: str, obs: int | None) -> dict[int, int]:
    widths = {width: 0}
    if obs is not None:
        _lead(widths, env, obs)
    return widths


def _inverted(version: int, obs: int | None) -> Task:
    env = f"InvertedPendulum-v{version}"
    widths = _fixed(4, env, obs)
    terminal = _unless(lambda x: x.isfinite().all(-1) & (x[..., 1].abs() <= 0.2), widths, env)

    def reward(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        end = terminal(obs, act, next_obs)
        return torch.where(end, 0.0 if version == 5 else 1.0, 1.0).to(next_obs)

    return Task(env, terminal, reward)


def _double(version: int, obs: int | None) -> Task:
    env = f"InvertedDoublePendulum-v{version}"

    def up(x: Tensor) -> Tensor:  # the height of the tip of two links of 0.6; the second angle is relative to the first
        sin, cos = x[..., 1:3], x[..., 3:5]
        return ~(0.6 * (cos[..., 0] + cos.prod(-1) - sin.prod(-1)) <= 1)  # not finite: goes on, as the simulator does

    return Task(env, _unless(up, _fixed(9 if version == 5 else 11, env, obs), env))


def _reacher(version: int, obs: int | None) -> Task:
    env = f"Reacher-v{version}"
    widths = _fixed(10 if version == 5 else 11, env, obs)

    def reward(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        at = next_obs if version == 5 else obs  # up to v4 the distance is that before the step
        _lead(widths, env, at.shape[-1])
        return -at[..., 8:].norm(dim=-1) - act.square().sum(-1)

    return Task(env, _never(widths, env), reward)


def _pusher(version: int, obs: int | None) -> Task:
    env = f"Pusher-v{version}"
    widths = _fixed(23, env, obs)

    def reward(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        at = next_obs if version == 5 else obs  # as Reacher
        _lead(widths, env, at.shape[-1])
        tip, thing, goal = at[..., 14:17], at[..., 17:20], at[..., 20:23]
        near, dist = (thing - tip).norm(dim=-1), (thing - goal).norm(dim=-1)
        return -dist - 0.5 * near - 0.1 * (2 * act).square().sum(-1)

    return Task(env, _never(widths, env), reward)


def _pendulum(version: int, obs: int | None) -> Task:
    widths = _fixed(3, "Pendulum-v1", obs)

    def reward(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        _lead(widths, "Pendulum-v1", obs.shape[-1])
        angle = torch.atan2(obs[..., 1], obs[..., 0])  # 0 is upright; the state before the step is charged
        torque = 2 * act[..., 0].clamp(-1, 1)
        return -(angle.square() + 0.1 * obs[..., 2].square() + 0.001 * torque.square())

    return Task("Pendulum-v1", _never(widths, "Pendulum-v1"), reward)


TRACK = 2.4  # m: a cart further from the middle has left the track


def _swingup(version: int, obs: int | None, env: str = "mbrl_envs/CartPoleSwingUp-v0") -> Task:
    """Of (x, velocity, cos, sin, angular velocity), the angle being 0 upright."""
    widths = _fixed(5, env, obs)

    def reward(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        _lead(widths, env, next_obs.shape[-1])
        upright = (1 + next_obs[..., 2]) / 2
        centred = (1 - (next_obs[..., 0] / TRACK).square()).clamp(min=0)
        return upright * centred - 0.01 * act[..., 0].clamp(-1, 1).square()

    return Task(env, _unless(lambda x: x[..., 0].abs() <= TRACK, widths, env), reward)


BOX = 0.08  # m, half a side of the box that is pushed, seen from above
FINGER = -0.25  # m, where the finger begins
GOAL = 0.15  # m, where along x the box's middle belongs


def _push(version: int, obs: int | None) -> Task:
    """Of (finger to box, 4 corners), x and y each: a corner earns 1 where it belongs, 0 far from there (arXiv
    2009.11997)."""
    env = "mbrl_envs/BoxPusher-v0"
    widths = _fixed(10, env, obs)

    @functools.cache  # a graph cannot be captured of what copies from the host
    def goal(device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.tensor(
            [(GOAL + i * BOX, j * BOX) for i in (-1, 1) for j in (-1, 1)], dtype=torch.float64, device=device
        ).to(dtype)

    def reward(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        _lead(widths, env, next_obs.shape[-1])
        corners = next_obs[..., 2:].unflatten(-1, (4, 2))
        far = (corners - goal(corners.device, corners.dtype)).norm(dim=-1)
        return (1 - (10 * far).tanh()).sum(-1) - 0.25 * act.norm(dim=-1)

    return Task(env, _never(widths, env), reward)


GRIP = 0.05  # m from a lever's axis to where it is gripped
RELEASE, OPEN = 0.6, 0.2  # rad of the knob and of the door at which they earn all that they can


def _latch(version: int, obs: int | None) -> Task:
    """Of the observations of LatchDoor: up to 0.25 for a hand at the grip, 0.25 for a knob that is turned, 1 for a door
    that is open."""
    env = "mbrl_envs/LatchDoor-v0"
    widths = _fixed(16, env, obs)

    def reward(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        _lead(widths, env, next_obs.shape[-1])
        near = 1 - (10 * next_obs[..., :3].norm(dim=-1)).tanh()
        turned = (next_obs[..., 6].abs() / RELEASE).clamp(max=1)
        opened = (next_obs[..., 7] / OPEN).clamp(0, 1)
        return 0.25 * near + 0.25 * turned + opened - 0.01 * act.square().sum(-1)

    return Task(env, _never(widths, env), reward)


def _led(env: str, width: int, base: Callable[[int, int | None], Task], ctrl: float, bonus: float = 0.0) -> "Family":
    """A v5 runner whose observations [width] begin with the mean forward velocity over the last step."""

    def build(version: int, obs: int | None) -> Task:
        widths, inner = _fixed(width, env, obs), base(5, None)

        def terminal(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
            _lead(widths, env, next_obs.shape[-1])
            return inner.terminal(obs[..., 1:], act, next_obs[..., 1:])

        def reward(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
            total = next_obs[..., 0] - ctrl * act.square().sum(-1)
            end = terminal(obs, act, next_obs)
            return total + bonus * (~end).to(total) if bonus else total

        return Task(env, terminal, reward)

    return build


def _as(env: str, base: Callable[[int, int | None], Task]) -> "Family":
    """A robot of ours whose functions are those of a v5 task."""
    return lambda version, obs: replace(base(5, obs), env=env)


def _pen(obs: int | None) -> Task:
    """D4RL's, which ends when the pen falls. gymnasium-robotics', in which Minari's sets were recorded, goes on."""
    env = "mbrl_envs.d4rl:D4RL/pen-expert-v1"
    widths = _fixed(45, env, obs)

    def terminal(obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        _lead(widths, env, next_obs.shape[-1])
        return next_obs[..., 26] < 0.075  # the pen's height, after 24 joints and its x, y

    return Task(env, terminal)


Family = Callable[[int, int | None], Task]  # (version, width of the observations or None)

_RUNNERS: dict[str, tuple[int, Family, float, float]] = {
    "HalfCheetah": (18, _cheetah, 0.1, 0.0),
    "Hopper": (12, _hopper, 1e-3, 1.0),
    "Swimmer": (9, _swimmer, 1e-4, 0.0),
    "Walker2d": (18, _walker, 1e-3, 1.0),
}
_OTHERS: dict[str, Family] = {
    "Ant": _ant,
    "Humanoid": _humanoid,
    "HumanoidStandup": _standup,
    "InvertedDoublePendulum": _double,
    "InvertedPendulum": _inverted,
    "Pusher": _pusher,
    "Reacher": _reacher,
}

_FAMILIES: dict[str, Family] = {
    "hopper": _hopper,
    "walker2d": _walker,
    "halfcheetah": _cheetah,
    "swimmer": _swimmer,
    "ant": _ant,
    "humanoid": _humanoid,
    "humanoidstandup": _standup,
    "invertedpendulum": _inverted,
    "inverteddoublependulum": _double,
    "reacher": _reacher,
    "pusher": _pusher,
    "pendulum": _pendulum,
    "cartpoleswingup": _swingup,
    "cartpolelength": lambda version, obs: _swingup(version, obs, "mbrl_envs/CartPoleLength-v0"),
    "boxpusher": _push,
    "latchdoor": _latch,
    "halfcheetahbody": _led("mbrl_envs/HalfCheetahBody-v0", *_RUNNERS["HalfCheetah"]),
    "reacherlinks": _as("mbrl_envs/ReacherLinks-v0", _reacher),
    **{f"{k.lower()}physics": _led(f"mbrl_envs/{k}Physics-v0", *v) for k, v in _RUNNERS.items()},
    **{f"{k.lower()}physics": _as(f"mbrl_envs/{k}Physics-v0", v) for k, v in _OTHERS.items()},
}

# What follows the task in the name of a dataset, where an environment's has nothing.
_KINDS = frozenset({"random", "medium", "expert", "full", "replay", "mixed", "simple"})
_KINDS |= {"human", "cloned", "complete", "partial"}
_NEORL = r"-(low|medium|high|expert|train|val|noise|\d+)"
_RECORDED = frozenset({"door", "hammer", "relocate", "pen", "kitchen"})  # so called by datasets alone
# Tasks that only their time limit ends. Antmaze is none: in D4RL's data it ends at a goal that is not observed. Nor is
# D4RL's own pen. A kitchen also ends when all of its tasks are done, which is not observed and after which nothing is
# earned.
_NEVER = {
    "door": "AdroitHandDoor-v1",
    "hammer": "AdroitHandHammer-v1",
    "relocate": "AdroitHandRelocate-v1",
    "pen": "AdroitHandPen-v1",
    "kitchen": "FrankaKitchen-v1",
    "frankakitchen": "FrankaKitchen-v1",
    "maze2d": "",
    "pointmaze": "",
}
