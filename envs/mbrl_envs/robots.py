"""Robots whose bodies, objects and physics change, as gymnasium environments on MuJoCo: half-cheetahs of other bodies,
reachers of other links, any v5 task under other physics; and three worlds of our own, whose models are in `data`: a
cart-pole of any pole, a box of two densities that a finger pushes, and a door with a latch and five handles.

The package registers them with gymnasium. Their actions are in [-1, 1], but for those of v5 tasks that have others;
their rewards and ends are the functions of `mbrl_envs.tasks`, or equal them where gymnasium's own step computes them.
Sets and sequences of them are in `mbrl_envs.contexts`.
"""

import abc
import importlib
import math
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv
from gymnasium.utils import EzPickle

from mbrl_envs.evaluate import EnvError, make
from mbrl_envs.tasks import BOX, FINGER, GRIP, known

mujoco: Any = importlib.import_module("mujoco")  # whose functions no type checker sees

DATA = Path(__file__).parent / "data"


def _positive(env: str, **values: float) -> None:
    """Raises EnvError for a value that is not finite and above 0."""
    wrong = [f"{k}={v}" for k, v in values.items() if not (math.isfinite(v) and v > 0)]
    if wrong:
        raise EnvError(f"{env}: got {', '.join(wrong)}; expected finite values above 0")


class Edited(MujocoEnv, abc.ABC):
    """A MuJoCo environment whose model is edited before it is compiled. earns: of a robot of gymnasium whose body alone
    is another, gymnasium's class, so that `mbrl_envs.simulator` knows its reward."""

    earns: type

    @abc.abstractmethod
    def edit(self, spec: Any) -> None:
        """Change the MjSpec of the environment's file."""

    def _initialize_simulation(self) -> tuple[Any, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of attributes in gymnasium's files that MuJoCo would rather not read
            spec = mujoco.MjSpec.from_file(self.fullpath)
            self.edit(spec)
            model = spec.compile()
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, self.width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, self.height)
        return model, mujoco.MjData(model)


# ---------------------------------------------------------------- gymnasium's robots, changed


class Speed(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Puts in front of the observation the mean forward velocity over the last step (m / s, 0 after a reset), which the
    runners reward and which nothing else that they observe determines."""

    def __init__(self, env: gym.Env) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        box = env.observation_space
        assert isinstance(box, spaces.Box)
        self.observation_space = spaces.Box(-np.inf, np.inf, (box.shape[0] + 1,), np.float64)

    def reset(self, **kw: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kw)
        return np.concatenate([[0.0], obs]), info

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return np.concatenate([[info["x_velocity"]], obs]), reward, terminated, truncated, info


class HalfCheetahBody(Edited, HalfCheetahEnv):
    """gymnasium's HalfCheetah-v5 with parts whose geoms are longer and thicker by a factor each: torso, both thighs,
    both legs (shins), both feet. Joints stay where they are, and so does the whole mass, 14 kg, which the geoms share
    by volume. Made by id it observes [18], the forward velocity first (`Speed`).

    Raises EnvError for a factor that is not positive."""

    earns = HalfCheetahEnv
    PARTS = {"torso": ("torso",), "thigh": ("bthigh", "fthigh"), "leg": ("bshin", "fshin"), "foot": ("bfoot", "ffoot")}  # noqa: RUF012

    def __init__(self, torso: float = 1.0, thigh: float = 1.0, leg: float = 1.0, foot: float = 1.0, **kw: Any) -> None:
        self.factors = {"torso": torso, "thigh": thigh, "leg": leg, "foot": foot}
        _positive("HalfCheetahBody", **self.factors)
        super().__init__(**kw)
        EzPickle.__init__(self, torso, thigh, leg, foot, **kw)

    def edit(self, spec: Any) -> None:
        for part, factor in self.factors.items():
            for name in self.PARTS[part]:
                geom = spec.geom(name)
                geom.size = np.asarray(geom.size) * factor
                if np.isfinite(geom.fromto).all():  # of a geom given by its ends
                    ends = np.reshape(geom.fromto, (2, 3))
                    middle = ends.mean(0)
                    geom.fromto = (middle + factor * (ends - middle)).ravel()


class ReacherLinks(Edited, ReacherEnv):
    """gymnasium's Reacher-v5 with links of other lengths, in m. Their inertia is small beside the joints' armature:
    what changes is where the fingertip is, 0.01 m beyond the second link.

    Raises EnvError for a length that is not positive."""

    earns = ReacherEnv

    def __init__(self, first: float = 0.1, second: float = 0.1, **kw: Any) -> None:
        self.links = {"first": first, "second": second}
        _positive("ReacherLinks", **self.links)
        super().__init__(**kw)
        EzPickle.__init__(self, first, second, **kw)

    def edit(self, spec: Any) -> None:
        first, second = self.links.values()
        spec.geom("link0").fromto = [0, 0, 0, first, 0, 0]
        spec.body("body1").pos = [first, 0, 0]
        spec.geom("link1").fromto = [0, 0, 0, second, 0, 0]
        spec.body("fingertip").pos = [second + 0.01, 0, 0]


def physics(
    task: str,
    gravity: float = 1.0,
    tilt: float = 0.0,
    mass: float = 1.0,
    friction: float = 1.0,
    damping: float = 1.0,
    gain: float = 1.0,
    **kw: Any,
) -> gym.Env:
    """A v5 task of gymnasium ("Hopper-v5") under other physics: factors of its gravity, of all masses and inertias, of
    sliding friction, of the joints' damping and of the actuators' force; tilt: rad by which gravity leans forward, so
    that a positive one leads downhill. kw: gymnasium's own arguments. It has no time limit; made by id, the task's.

    Raises EnvError for a task that is none of these, and for a factor that is negative (a mass: or 0)."""
    spec = gym.registry.get(task)
    if spec is None or not task.endswith("-v5") or "gymnasium.envs.mujoco" not in str(spec.entry_point):
        raise EnvError(f"physics: got the task {task!r}, expected one of gymnasium's MuJoCo tasks, e.g. Hopper-v5")
    factors = {"gravity": gravity, "friction": friction, "damping": damping, "gain": gain}
    wrong = [f"{k}={v}" for k, v in factors.items() if not (math.isfinite(v) and v >= 0)]
    if wrong or not math.isfinite(tilt):
        raise EnvError(
            f"physics: got {', '.join(wrong) or f'tilt={tilt}'}; expected finite values, factors of at least 0"
        )
    _positive("physics", mass=mass)
    env: Any = make(task, **kw).unwrapped
    model = env.model
    x, y, z = gravity * model.opt.gravity
    cos, sin = math.cos(tilt), math.sin(tilt)
    model.opt.gravity[:] = cos * x - sin * z, y, sin * x + cos * z
    model.body_mass[:] *= mass
    model.body_inertia[:] *= mass
    model.geom_friction[:, 0] *= friction
    model.pair_friction[:, :2] *= friction
    model.dof_damping[:] *= damping
    model.actuator_gainprm[:, 0] *= gain
    mujoco.mj_setConst(model, env.data)  # what the solver keeps of masses
    mujoco.mj_resetData(model, env.data)
    return env


# ---------------------------------------------------------------- worlds of our own


class Robot(Edited, EzPickle):
    """A model of `data` as an environment. Its state is positions and velocities alone (the solver is not
    warm-started), and what it observes, does and rewards are functions over rows, so that many of them run in one
    `mujoco.rollout`; `control` is the same in all contexts.

    noise: a factor of the spread of first states, 0 for none. `xml` is the file in `data`, `skip` the simulator's steps
    in one of the environment, `sizes` the widths of observations and actions."""

    xml: str
    skip: int
    sizes: tuple[int, int]
    metadata = {"render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, noise: float, **kw: Any) -> None:
        if not (math.isfinite(noise) and noise >= 0):
            raise EnvError(f"{type(self).__name__}: got noise={noise}, expected a finite value of at least 0")
        self.noise = noise
        self.rule = known(f"mbrl_envs/{type(self).__name__}-v0")
        box = spaces.Box(-np.inf, np.inf, (self.sizes[0],), np.float64)
        super().__init__(str(DATA / self.xml), self.skip, box, camera_id=0, **kw)

    def _set_action_space(self) -> spaces.Space:
        self.action_space = spaces.Box(-1.0, 1.0, (self.sizes[1],), np.float32)
        return self.action_space

    @abc.abstractmethod
    def control(self, act: np.ndarray, qpos: np.ndarray) -> np.ndarray:
        """[..., A] in [-1, 1] and the positions [..., nq] at which it is taken -> the actuators' inputs [..., nu]."""

    @abc.abstractmethod
    def observation(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """[..., nq], [..., nv] -> [..., O]."""

    @abc.abstractmethod
    def start(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The positions [nq] and velocities [nv] with which an episode begins."""

    def outcome(self, obs: np.ndarray) -> dict[str, Any]:
        """What `info` says of an observation."""
        return {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        act = np.asarray(action, dtype=np.float64).clip(-1, 1)
        before = self._get_obs()
        self.do_simulation(self.control(act, self.data.qpos), self.frame_skip)
        obs = self._get_obs()
        rows = [torch.from_numpy(x)[None] for x in (before, act, obs)]
        assert self.rule.reward is not None
        if self.render_mode == "human":
            self.render()
        return obs, self.rule.reward(*rows).item(), bool(self.rule.terminal(*rows).item()), False, self.outcome(obs)

    def reset_model(self) -> np.ndarray:
        self.set_state(*self.start(self.np_random))
        return self._get_obs()

    def _get_obs(self) -> np.ndarray:
        return self.observation(self.data.qpos, self.data.qvel)


class CartPoleLength(Robot):
    """`control.CartPoleSwingUp` in MuJoCo, with a pole of any length (m) and 0.1 kg a metre: at 1 m the same motion.
    Observes [5] (x, velocity, cos, sin, angular velocity), takes the force over 10 N, [1], for 0.04 s, two of that
    task's steps. Reward and end are its own. Made by id it is cut after 200 steps, 8 s."""

    xml, skip, sizes = "cartpole.xml", 2, (5, 1)
    metadata = Robot.metadata | {"render_fps": 25}

    def __init__(self, length: float = 1.0, noise: float = 1.0, **kw: Any) -> None:
        _positive("CartPoleLength", length=length)
        self.length = length
        super().__init__(noise, **kw)
        EzPickle.__init__(self, length, noise, **kw)

    def edit(self, spec: Any) -> None:
        pole, mass = spec.body("pole"), 0.1 * self.length
        about = mass * self.length**2 / 12  # kg m^2, a thin rod's about its centre
        pole.mass, pole.ipos, pole.inertia = mass, [0, 0, self.length / 2], [about, about, 1e-9]
        spec.geom("pole").fromto = [0, 0, 0, 0, 0, self.length]

    def control(self, act: np.ndarray, qpos: np.ndarray) -> np.ndarray:
        return act

    def observation(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        angle = qpos[..., 1]
        return np.stack([qpos[..., 0], qvel[..., 0], np.cos(angle), np.sin(angle), qvel[..., 1]], -1)

    def start(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        off = self.noise * draw.uniform(-0.05, 0.05, (2, 2))
        return off[0] + [0, math.pi], off[1]


class BoxPusher(Robot):
    """A finger that pushes a box of two halves, left (y > 0) and right, each of its own density (kg / m^3), to a goal:
    pushed through its middle the box turns towards its heavier side. After HyperCRL's pusher (arXiv 2009.11997), with a
    finger instead of an arm.

    Observes [10]: from the finger to the box (x, y), then the corners (x, y each). Takes [2] where the finger's servos
    are led, up to 0.03 m from where it is, for 0.1 s. Never ends; made by id it is cut after 120 steps, 12 s."""

    xml, skip, sizes = "pusher.xml", 20, (10, 2)
    reach = 0.03  # m

    def __init__(self, left: float = 500.0, right: float = 500.0, noise: float = 1.0, **kw: Any) -> None:
        self.density = {"left": left, "right": right}
        _positive("BoxPusher", **self.density)
        super().__init__(noise, **kw)
        EzPickle.__init__(self, left, right, noise, **kw)

    def edit(self, spec: Any) -> None:
        for name, density in self.density.items():
            spec.geom(name).density = density

    def control(self, act: np.ndarray, qpos: np.ndarray) -> np.ndarray:
        return qpos[..., 7:] + self.reach * act

    def observation(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        place, finger = qpos[..., :2], qpos[..., 7:]
        w, x, y, z = np.moveaxis(qpos[..., 3:7], -1, 0)
        along = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z)], -1)  # the box's axes, seen from above
        across = np.stack([2 * (x * y - w * z), 1 - 2 * (x * x + z * z)], -1)
        corners = [place + BOX * (i * along + j * across) for i in (-1, 1) for j in (-1, 1)]
        return np.concatenate([place - finger, *corners], -1)

    def start(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        x, y, yaw, a, b = self.noise * draw.uniform(-1, 1, 5) * [0.01, 0.01, 0.05, 0.01, 0.01]
        box = [x - 0.1, y, 0.04, math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)]
        return np.array([*box, FINGER + a, b]), np.zeros(8)


class LatchDoor(Robot):
    """A hand of two fingers before a door that opens towards it, by 0.2 rad at least. Of its handles, "pull" is a bar
    without a latch; on "round" and "lever" a bolt holds the door until the knob is turned by about 0.6 rad, in its one
    direction (turn 1 or -1, about the axis that leads into the door), and springs back when it is let go. After
    HyperCRL's door (arXiv 2009.11997), with a hand instead of an arm.

    Observes [16]: from hand to grip (x, y, z), the hand's roll, both fingers' distances from its middle, the knob's
    angle and the door's, then the velocities of hand (3), roll, fingers (2), knob and door. Takes [5], where servos are
    led from where they are: hand (0.03 m a component), roll (0.3 rad) and closing of the fingers (0.02 m), for 0.1 s.
    Never ends; made by id it is cut after 100 steps, 10 s. info["success"]: whether the door is open.

    Raises EnvError for a handle or a turn that there is not."""

    xml, skip, sizes = "door.xml", 25, (16, 5)
    HANDLES = ("pull", "round", "lever")
    reach = np.array([0.03, 0.03, 0.03, 0.3, 0.02, 0.02])  # m, rad
    knob = np.array([-0.07, 0.32, 0.0])  # m, in the door
    draws = 0.02  # m that the bolt is drawn back for each rad of the knob

    def __init__(self, handle: str = "pull", turn: int = 1, noise: float = 1.0, **kw: Any) -> None:
        if handle not in self.HANDLES or turn not in (-1, 1):
            raise EnvError(
                f"LatchDoor: got handle={handle!r}, turn={turn}; expected one of {', '.join(self.HANDLES)}, and 1 or -1"
            )
        self.handle, self.turn = handle, turn
        self.arm = GRIP if handle == "lever" else 0.0  # m from the knob's axis to where it is gripped
        super().__init__(noise, **kw)
        EzPickle.__init__(self, handle, turn, noise, **kw)

    def edit(self, spec: Any) -> None:
        knob, look = spec.body("knob"), {"name": "handle", "rgba": [0.5, 0.5, 0.55, 1], "mass": 0.1}
        look |= {"contype": 0, "conaffinity": 0}
        kind = mujoco.mjtGeom
        if self.handle == "pull":
            knob.add_geom(type=kind.mjGEOM_CAPSULE, size=[0.01, 0, 0], fromto=[0, 0, -0.06, 0, 0, 0.06], **look)
        elif self.handle == "lever":
            knob.add_geom(type=kind.mjGEOM_CAPSULE, size=[0.01, 0, 0], fromto=[0, 0, 0, 0, -0.1, 0], **look)
        else:
            knob.add_geom(type=kind.mjGEOM_CYLINDER, size=[0.03, 0, 0], fromto=[-0.015, 0, 0, 0.015, 0, 0], **look)
        for finger in ("finger0", "finger1"):
            pair = spec.add_pair(geomname1=finger, geomname2="handle", condim=4)
            pair.friction = [1, 1, 0.02, 1e-4, 1e-4]
        free = self.handle == "pull"
        if not free:
            spec.joint("knob").range = [0, 1.2] if self.turn > 0 else [-1.2, 0]
        data = np.zeros(mujoco.mjNEQDATA)
        data[:2] = (-0.04, 0) if free else (0, -self.draws * self.turn)
        joint = mujoco.mjtObj.mjOBJ_JOINT
        tie = spec.add_equality(type=mujoco.mjtEq.mjEQ_JOINT, objtype=joint, name1="bolt", name2="knob", data=data)
        tie.solref = [0.01, 1]

    def control(self, act: np.ndarray, qpos: np.ndarray) -> np.ndarray:
        lead = np.concatenate([act[..., :4], -act[..., 4:], -act[..., 4:]], -1)
        return qpos[..., 3:] + self.reach * lead

    def observation(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        door, turned = qpos[..., 0], qpos[..., 1]
        x, y, z = self.knob[0], self.knob[1] - self.arm * np.cos(turned), -self.arm * np.sin(turned)
        cos, sin = np.cos(door), np.sin(door)
        grip = np.stack([cos * x - sin * y, sin * x + cos * y, z], -1)
        return np.concatenate(
            [grip - qpos[..., 3:6], qpos[..., 6:], qpos[..., [1, 0]], qvel[..., 3:], qvel[..., [1, 0]]], -1
        )

    def start(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        hand = self.knob + [-0.06, -self.arm, 0] + self.noise * draw.uniform(-0.01, 0.01, 3)
        bolt = -0.04 if self.handle == "pull" else 0.0
        return np.array([0, 0, bolt, *hand, 0, 0.045, 0.045]), np.zeros(9)

    def outcome(self, obs: np.ndarray) -> dict[str, Any]:
        return {"success": bool(obs[7] >= 0.2)}
