"""The true simulator as a planner's model: what plans earn in a gymnasium MuJoCo task (v5), or in a world of our own
(`mbrl_envs.robots`), from where it is now.

Plans run in threads on copies of the environment's full physical state (positions, velocities, actuators, the solver's
warm start), which is left as it is. Where reward and end read positions and velocities alone (HalfCheetah, Hopper,
InvertedPendulum, Swimmer, Walker2d, and our own), `mujoco.rollout` runs them; BoxPusher and LatchDoor, whose servos are
led from where they are, one step of all plans after the other. The others also read body positions and contact forces
as MuJoCo leaves them behind within its last substep, which `rollout` does not return: those are stepped one by one, in
threads as well (MuJoCo holds no interpreter lock), and read after each step, as the environment does.
"""

import importlib
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from mbrl_envs.evaluate import EnvError, to_env
from mbrl_envs.robots import BoxPusher, CartPoleLength, LatchDoor, Robot

mujoco: Any = importlib.import_module("mujoco")  # whose functions no type checker sees
Rollout: Any = importlib.import_module("mujoco.rollout").Rollout

LATER = 1e3  # s: plans begin so much later than the environment is, so that a reset to time 0 on divergence shows

Fields = dict[str, np.ndarray]  # of each row and moment, [N, H + 1, ...]: before the first step and after each


class Outcome(NamedTuple):
    """What the environment says of each step; after an end, what it would say if it were stepped on."""

    reward: Tensor  # [..., H] float64; nan from the step on at which the simulation diverged
    terminal: Tensor  # [..., H] bool


class Simulator:
    """The plans of one environment, or of several of one task, which may be in different states and have different
    parameters.

    envs: made with gymnasium.make, wrapped or not; reset before the first use. Wrappers are passed over: actions are
    in [-1, 1], scaled to the bounds of the environment itself; rewards and ends are its own, at its own arguments
    (weights, ranges, frame_skip, `terminate_when_unhealthy`); its time limit does not count. threads: by default one
    for each processor.

    Raises EnvError for an environment that is no MuJoCo one, for one whose reward it does not know, and for several
    that are not of one kind."""

    def __init__(self, envs: gym.Env | Sequence[gym.Env], threads: int | None = None) -> None:
        self.envs: list[Any] = [x.unwrapped for x in ([envs] if isinstance(envs, gym.Env) else envs)]
        self.threads = os.cpu_count() or 1 if threads is None else threads
        if not self.envs or self.threads < 1:
            raise EnvError(f"Simulator: got {len(self.envs)} environments and {threads} threads, expected at least 1")
        kinds = sorted({_kind(x) for x in self.envs})
        sizes = {(x.model.nq, x.model.nv, x.model.nu, x.model.nbody, x.frame_skip) for x in self.envs}
        if len(kinds) > 1 or len(sizes) > 1:
            raise EnvError(f"Simulator: got environments of {', '.join(kinds)}, expected one kind and size")
        self.rule = RULES[kinds[0]]
        self.pool: Any = None

    def rollout(self, acts: Tensor) -> Outcome:
        """acts [N, H, A] for one environment, or [E, N, H, A] for E of them, in [-1, 1]: what each plan meets from its
        environment's present state. Returns [N, H] or [E, N, H], on the CPU."""
        width = self.envs[0].action_space.shape[0]
        lead = (len(self.envs),) if acts.ndim == 4 else ()
        if acts.ndim not in (3, 4) or acts.shape[-1] != width or len(self.envs) != (acts.shape[0] if lead else 1):
            want = f"[{len(self.envs)}, N, H, {width}]" + (f" or [N, H, {width}]" if len(self.envs) == 1 else "")
            raise EnvError(f"Simulator: got actions {list(acts.shape)}, expected {want}")
        if 0 in acts.shape:
            raise EnvError(f"Simulator: got actions {list(acts.shape)}, expected at least one step of one plan")
        plans = acts.detach().float().cpu().numpy().reshape(len(self.envs), -1, *acts.shape[-2:])  # [E, N, H, A]
        known = np.asarray(np.isfinite(plans).all(-1))
        ctrl = np.stack([_scaled(env, np.nan_to_num(x)) for env, x in zip(self.envs, plans, strict=True)])
        fields = self._native(ctrl) if {"qpos", "qvel"}.issuperset(self.rule.fields) else self._stepped(ctrl)
        found = []
        for i, env in enumerate(self.envs):
            rows = {k: x[i] for k, x in fields.items()}
            held = (rows["time"][:, 1:] > env.data.time + LATER / 2) & known[i]
            sound = np.minimum.accumulate(held, axis=1)
            end = self.rule.terminal(env, rows)
            reward = np.where(sound, self.rule.reward(env, rows, ctrl[i], end), np.nan)
            found.append((reward, end & sound))
        reward, end = (torch.from_numpy(np.stack(x)) for x in zip(*found, strict=True))
        return Outcome(reward, end) if lead else Outcome(reward[0], end[0])

    def value(self, acts: Tensor, discount: float = 1.0) -> Tensor:
        """[N] or [E, N], on the actions' device and of their type: sum over t of discount^t reward_t until the episode
        ends, the step that ends it included; minus infinity where the simulation diverges before that."""
        reward, end = self.rollout(acts)
        before = end.long().cumsum(-1) - end.long()  # ends before this step
        factor = discount ** torch.arange(reward.shape[-1], dtype=torch.float64)
        total = (torch.where(before > 0, 0.0, reward) * factor).sum(-1)
        return torch.where(total.isfinite(), total, -torch.inf).to(acts.device, acts.dtype)

    def close(self) -> None:
        """End the threads; the next rollout starts new ones."""
        if self.pool is not None:
            self.pool.shutdown() if isinstance(self.pool, ThreadPoolExecutor) else self.pool.close()
            self.pool = None

    def _native(self, ctrl: np.ndarray) -> Fields:
        envs, skip, (e, n, h) = self.envs, self.envs[0].frame_skip, ctrl.shape[:3]
        if self.pool is None:
            self.pool = Rollout(nthread=self.threads if self.threads > 1 else 0)
            self.data = [mujoco.MjData(envs[0].model) for _ in range(self.threads)]
        spec = mujoco.mjtState.mjSTATE_FULLPHYSICS.value
        start = np.empty((e, mujoco.mj_stateSize(envs[0].model, spec)))
        for env, x in zip(envs, start, strict=True):
            mujoco.mj_getState(env.model, env.data, x, spec)
        start[:, 0] += LATER
        models = [env.model for env in envs for _ in range(n)]
        warm = np.stack([env.data.qacc_warmstart for env in envs]).repeat(n, 0)
        nq, nv = envs[0].model.nq, envs[0].model.nv

        def run(state: np.ndarray, inputs: np.ndarray) -> np.ndarray:
            """[E, N, S] and [E, N, T, nu] -> [E, N, T, S], after each step of the environment."""
            held = inputs.reshape(e * n, -1, inputs.shape[-1]).repeat(skip, 1).astype(np.float64)
            out, _ = self.pool.rollout(models, self.data, state.reshape(e * n, -1), held, initial_warmstart=warm)
            return out[:, skip - 1 :: skip].reshape(e, n, -1, out.shape[-1])

        parts = [start[:, None, None].repeat(n, 1)]  # time, qpos, qvel ..
        if self.rule.led:
            for t in range(h):
                now = parts[-1][:, :, 0]
                rows = zip(envs, ctrl[:, :, t].astype(np.float64), now[..., 1 : 1 + nq], strict=True)
                parts.append(run(now, np.stack([env.control(act, qpos) for env, act, qpos in rows])[:, :, None]))
        else:
            parts.append(run(parts[0][:, :, 0], ctrl))
        states = np.concatenate(parts, 2)
        return {"time": states[..., 0], "qpos": states[..., 1 : 1 + nq], "qvel": states[..., 1 + nq : 1 + nq + nv]}

    def _stepped(self, ctrl: np.ndarray) -> Fields:
        if self.pool is None:
            self.pool, self.free = ThreadPoolExecutor(self.threads), queue.SimpleQueue()
            for _ in range(self.threads):
                self.free.put(mujoco.MjData(self.envs[0].model))
        e, n, h = ctrl.shape[:3]
        names = ("time", *self.rule.fields)
        first = self.envs[0].data
        out: Fields = {k: np.empty((e, n, h + 1, *np.shape(getattr(first, k)))) for k in names}
        forces = "cfrc_ext" in names

        def run(rows: np.ndarray) -> None:
            data = self.free.get()
            try:
                for i, j in (divmod(int(r), n) for r in rows):
                    env = self.envs[i]
                    mujoco.mj_copyData(data, env.model, env.data)
                    data.time += LATER
                    for t in range(h + 1):
                        if t:
                            data.ctrl[:] = ctrl[i, j, t - 1]
                            mujoco.mj_step(env.model, data, nstep=env.frame_skip)
                            if forces:
                                mujoco.mj_rnePostConstraint(env.model, data)
                        for k in names:
                            out[k][i, j, t] = getattr(data, k)
            finally:
                self.free.put(data)

        list(self.pool.map(run, np.array_split(np.arange(e * n), min(e * n, 4 * self.threads))))
        return out


def _kind(env: Any) -> str:
    """The task's name. Raises EnvError where there is no rule for it."""
    kind = getattr(env, "earns", type(env))
    if not (hasattr(env, "model") and hasattr(env, "data") and "mujoco" in type(env.model).__module__):
        raise EnvError(
            f"Simulator: got a {kind.__name__}, which is no MuJoCo environment; Pendulum, CartPoleSwingUp and Reacher "
            "are learners that know the truth in mbrl_envs.control"
        )
    name, of = kind.__name__.removesuffix("Env"), kind.__module__
    if kind not in ROBOTS and not (name in RULES and of.endswith("_v5") and of.startswith("gymnasium.")):
        known = ", ".join(f"{x}-v5" for x in RULES if all(x != r.__name__ for r in ROBOTS))
        known += "".join(f", mbrl_envs/{r.__name__}-v0" for r in ROBOTS)
        raise EnvError(f"Simulator: there is no rule for {of}.{kind.__name__}; expected one of {known}")
    return name


def _scaled(env: Any, plans: np.ndarray) -> np.ndarray:
    """[N, H, A] in the environment's units, of the type in which it gets them: its costs round to that."""
    box = env.action_space
    return to_env(plans.reshape(-1, plans.shape[-1]), box.low, box.high, box).reshape(plans.shape)


# ---------------------------------------------------------------- what the environments reward


@dataclass(frozen=True)
class Rule:
    """fields: what of MjData is read. terminal(env, fields) -> [N, H] bool; reward(env, fields, ctrl [N, H, A] in the
    environment's units, terminal's result) -> [N, H]. led: the actuators' inputs are the robot's `control` of an action
    and of where it is taken, else the action itself."""

    fields: tuple[str, ...]
    reward: Callable[[Any, Fields, np.ndarray, np.ndarray], np.ndarray]
    terminal: Callable[[Any, Fields], np.ndarray]
    led: bool = False


def _never(env: Any, f: Fields) -> np.ndarray:
    return np.zeros((f["time"].shape[0], f["time"].shape[1] - 1), dtype=bool)


def _unless(healthy: Callable[[Any, Fields], np.ndarray]) -> Callable[[Any, Fields], np.ndarray]:
    return lambda env, f: ~healthy(env, f) & bool(env._terminate_when_unhealthy)


def _speed(env: Any, x: np.ndarray) -> np.ndarray:
    """[N, H] from places [N, H + 1]."""
    return (x[:, 1:] - x[:, :-1]) / env.dt


def _within(x: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return (limits[0] < x) & (x < limits[1])


def _squares(x: np.ndarray, axes: int = 1) -> np.ndarray:
    """The sum of squares over the last axes, in x's own type."""
    return np.square(x).sum(tuple(range(-axes, 0)))


def _runner(healthy: Callable[[Any, Fields], np.ndarray] | None) -> Rule:
    """HalfCheetah, Hopper, Swimmer, Walker2d."""

    def reward(env: Any, f: Fields, ctrl: np.ndarray, end: np.ndarray) -> np.ndarray:
        forward = env._forward_reward_weight * _speed(env, f["qpos"][..., 0])
        bonus = 0.0 if healthy is None else healthy(env, f) * env._healthy_reward
        return forward + bonus - env._ctrl_cost_weight * _squares(ctrl)

    return Rule(("qpos", "qvel"), reward, _never if healthy is None else _unless(healthy))


def _walker_healthy(env: Any, f: Fields) -> np.ndarray:
    z, angle = f["qpos"][:, 1:, 1], f["qpos"][:, 1:, 2]
    return _within(z, env._healthy_z_range) & _within(angle, env._healthy_angle_range)


def _hopper_healthy(env: Any, f: Fields) -> np.ndarray:
    state = np.concatenate([f["qpos"], f["qvel"]], -1)[:, 1:, 2:]
    return _walker_healthy(env, f) & _within(state, env._healthy_state_range).all(-1)


def _ant_healthy(env: Any, f: Fields) -> np.ndarray:
    state = np.concatenate([f["qpos"], f["qvel"]], -1)[:, 1:]
    low, high = env._healthy_z_range
    return np.isfinite(state).all(-1) & (low <= state[..., 2]) & (state[..., 2] <= high)


def _ant_reward(env: Any, f: Fields, ctrl: np.ndarray, end: np.ndarray) -> np.ndarray:
    torso = f["xpos"][:, :, env.model.body(env._main_body).id, 0]
    forces = f["cfrc_ext"][:, 1:].clip(*env._contact_force_range)
    costs = env._ctrl_cost_weight * _squares(ctrl) + env._contact_cost_weight * _squares(forces, 2)
    bonus = _ant_healthy(env, f) * env._healthy_reward
    return env._forward_reward_weight * _speed(env, torso) + bonus - costs


def _humanoid_healthy(env: Any, f: Fields) -> np.ndarray:
    return _within(f["qpos"][:, 1:, 2], env._healthy_z_range)


def _humanoid_reward(env: Any, f: Fields, ctrl: np.ndarray, end: np.ndarray) -> np.ndarray:
    mass = env.model.body_mass
    centre = f["xipos"][..., 0] @ mass / mass.sum()
    contact = env._contact_cost_weight * _squares(f["cfrc_ext"][:, 1:], 2)
    costs = env._ctrl_cost_weight * _squares(ctrl.astype(np.float64)) + contact.clip(*env._contact_cost_range)
    bonus = _humanoid_healthy(env, f) * env._healthy_reward
    return env._forward_reward_weight * _speed(env, centre) + bonus - costs


def _standup_reward(env: Any, f: Fields, ctrl: np.ndarray, end: np.ndarray) -> np.ndarray:
    up = f["qpos"][:, 1:, 2] / env.model.opt.timestep  # the environment reads no weight of it
    impact = env._impact_cost_weight * _squares(f["cfrc_ext"][:, 1:], 2)
    return up - env._ctrl_cost_weight * _squares(ctrl.astype(np.float64)) - impact.clip(*env._impact_cost_range) + 1


def _inverted_end(env: Any, f: Fields) -> np.ndarray:
    state = np.concatenate([f["qpos"], f["qvel"]], -1)[:, 1:]
    return ~np.isfinite(state).all(-1) | (np.abs(state[..., 1]) > 0.2)


def _double_end(env: Any, f: Fields) -> np.ndarray:
    return f["site_xpos"][:, 1:, 0, 2] <= 1


def _double_reward(env: Any, f: Fields, ctrl: np.ndarray, end: np.ndarray) -> np.ndarray:
    x, y = f["site_xpos"][:, 1:, 0, 0], f["site_xpos"][:, 1:, 0, 2]
    v1, v2 = f["qvel"][:, 1:, 1], f["qvel"][:, 1:, 2]
    return env._healthy_reward * ~end - (0.01 * x**2 + (y - 2) ** 2) - (1e-3 * v1**2 + 5e-3 * v2**2)


def _distance(env: Any, f: Fields, a: str, b: str) -> np.ndarray:
    """[N, H] between the places of two bodies."""
    places = [f["xpos"][:, 1:, env.model.body(name).id] for name in (a, b)]
    return np.linalg.norm(places[0] - places[1], axis=-1)


def _reacher_reward(env: Any, f: Fields, ctrl: np.ndarray, end: np.ndarray) -> np.ndarray:
    far = _distance(env, f, "fingertip", "target") * env._reward_dist_weight
    return -far - _squares(ctrl) * env._reward_control_weight


def _pusher_reward(env: Any, f: Fields, ctrl: np.ndarray, end: np.ndarray) -> np.ndarray:
    near = _distance(env, f, "object", "tips_arm") * env._reward_near_weight
    far = _distance(env, f, "object", "goal") * env._reward_dist_weight
    return -far - _squares(ctrl) * env._reward_control_weight - near


def _robot(led: bool) -> Rule:
    """A world of our own, by the functions of its observations; none ends by its action."""

    def seen(env: Any, f: Fields) -> tuple[Tensor, Tensor]:
        obs = torch.from_numpy(env.observation(f["qpos"], f["qvel"]))  # [N, H + 1, O]
        return obs[:, :-1], obs[:, 1:]

    def reward(env: Any, f: Fields, ctrl: np.ndarray, end: np.ndarray) -> np.ndarray:
        before, after = seen(env, f)
        return env.rule.reward(before, torch.from_numpy(ctrl.astype(np.float64)), after).numpy()

    def terminal(env: Any, f: Fields) -> np.ndarray:
        before, after = seen(env, f)
        return env.rule.terminal(before, before[..., :0], after).numpy()

    return Rule(("qpos", "qvel"), reward, terminal, led)


ROBOTS: dict[type[Robot], Rule] = {
    BoxPusher: _robot(led=True),
    CartPoleLength: _robot(led=False),
    LatchDoor: _robot(led=True),
}
RULES = {
    "Ant": Rule(("qpos", "qvel", "xpos", "cfrc_ext"), _ant_reward, _unless(_ant_healthy)),
    "HalfCheetah": _runner(None),
    "Hopper": _runner(_hopper_healthy),
    "Humanoid": Rule(("qpos", "xipos", "cfrc_ext"), _humanoid_reward, _unless(_humanoid_healthy)),
    "HumanoidStandup": Rule(("qpos", "cfrc_ext"), _standup_reward, _never),
    "InvertedDoublePendulum": Rule(("qvel", "site_xpos"), _double_reward, _double_end),
    "InvertedPendulum": Rule(("qpos", "qvel"), lambda env, f, ctrl, end: (~end).astype(np.float64), _inverted_end),
    "Pusher": Rule(("xpos",), _pusher_reward, _never),
    "Reacher": Rule(("xpos",), _reacher_reward, _never),
    "Swimmer": _runner(None),
    "Walker2d": _runner(_walker_healthy),
    **{robot.__name__: rule for robot, rule in ROBOTS.items()},
}
