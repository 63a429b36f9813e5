"""Small control tasks in torch: a refrigerator, whose data cover a narrow band; and worlds as learners that know the
truth, so that a planner, a loop or an adapter can be given the environment itself as its model: gymnasium's
Pendulum-v1, a cart-pole that is to be swung up, and gymnasium's Reacher-v5. The package registers the cart-pole with
gymnasium as `mbrl_envs/CartPoleSwingUp-v0`.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from mbrl.core import Markov, Prediction, Segment, Spec, StepInput, Tree, pull
from mbrl.data import Dataset
from mbrl.rollout import forced_mse
from mbrl_envs.tasks import known

# ---------------------------------------------------------------- the refrigerator


@dataclass(frozen=True)
class Refrigerator:
    """One temperature T and one compressor, whose power is u = (act + 1) / 2 of its maximum:

        capacity dT/dt = leak (room - T) - cooling * s(u) * h(T)
        s(u) = tanh(u / knee) / tanh(1 / knee)                     more power cools less and less
        h(T) = max(0, 1 - exp(-(T - evaporator) / width))          nothing is cooled below the evaporator

    one explicit Euler step of dt, plus noise (doors, food). Around the set-point the change is almost linear in T;
    far below it cooling ceases, far above it the leak does: what data from there would tell, data from the band do
    not. The setting of the synthetic example of MOREC (arXiv 2310.05422), whose equations are not published."""

    dt: float = 60.0  # s
    capacity: float = 15e3  # J / K
    leak: float = 3.0  # W / K
    room: float = 25.0  # degrees Celsius
    cooling: float = 180.0  # W, the most heat moved
    knee: float = 0.6  # share of the power
    evaporator: float = -20.0  # degrees Celsius
    width: float = 8.0  # K
    power: float = 120.0  # W, the most the compressor draws
    noise: float = 0.02  # K, standard deviation a step
    setpoint: float = 4.0  # degrees Celsius
    price: float = 0.004  # reward lost for each W drawn over a step

    def step(self, temp: Tensor, act: Tensor, noise: Tensor | None = None) -> Tensor:
        """temp [B] (degrees Celsius), act [B, 1] in [-1, 1], noise [B] standard normal -> temp [B] one dt later."""
        u = self.share(act)
        saturated = (u / self.knee).tanh() / math.tanh(1 / self.knee)
        depth = (1 - torch.exp(-(temp - self.evaporator) / self.width)).clamp(min=0)
        heat = self.leak * (self.room - temp) - self.cooling * saturated * depth
        after = temp + self.dt / self.capacity * heat
        return after if noise is None else after + self.noise * noise

    def reward(self, obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        """obs, next_obs [B, 1], act [B, 1] -> [B]: minus the distance from the set-point that the step leads to (K),
        minus the price of its energy."""
        return -(next_obs[..., 0] - self.setpoint).abs() - self.price * self.power * self.share(act)

    @staticmethod
    def share(act: Tensor) -> Tensor:
        """act [B, 1] -> u [B] in [0, 1]."""
        return (act[..., 0].clamp(-1, 1) + 1) / 2


Controller = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(temp [B], what it remembers [B], noise [B] standard normal) -> (act [B, 1], what it remembers)."""


@dataclass(frozen=True)
class PI:
    """The behaviour policy: proportional and integral control around a set-point, with noise on the action. While the
    action is at its bound the integral stands still."""

    setpoint: float = 4.0  # degrees Celsius
    kp: float = 1.2  # action per K
    ki: float = 0.04  # action per K and step
    noise: float = 0.3  # standard deviation of the action's noise

    def __call__(self, temp: Tensor, integral: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        error = temp - self.setpoint
        raw = self.kp * error + self.ki * (integral + error)
        held = (raw.abs() > 1) & (raw * error > 0)
        act = (raw + self.noise * noise).clamp(-1, 1)
        return act[:, None], torch.where(held, integral, integral + error)


@dataclass(frozen=True)
class Constant:
    """One action, whatever the temperature."""

    act: float

    def __call__(self, temp: Tensor, integral: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(temp, self.act)[:, None], integral


def excursions() -> dict[str, Controller]:
    """Policies that leave the behaviour's band: those on which a learner is tested."""
    return {"off": Constant(-1.0), "full": Constant(1.0), "cold": PI(setpoint=-6.0), "warm": PI(setpoint=14.0)}


def collect(
    n_episodes: int = 20,
    length: int = 200,
    seed: int = 0,
    fridge: Refrigerator | None = None,
    controller: Controller | None = None,
    start: tuple[float, float] = (4.0, 0.5),
) -> Dataset:
    """Episodes of `length` steps under a controller (by default the behaviour), from temperatures of mean and standard
    deviation `start`. Raw actions are the compressor's power in W."""
    if n_episodes < 1 or length < 1:
        raise ValueError(f"collect: got {n_episodes} episodes of {length} steps, expected at least one of each")
    fridge, controller = fridge or Refrigerator(), controller or PI()
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(n_episodes, generator=generator, dtype=torch.float64)
    temp = start[0] + start[1] * draw()
    integral = torch.zeros_like(temp)
    temps, acts = [temp], []
    for _ in range(length):
        act, integral = controller(temp, integral, draw())
        temp = fridge.step(temp, act, draw())
        temps.append(temp)
        acts.append(act)
    path, act = torch.stack(temps, 1)[..., None].float(), torch.stack(acts, 1).float()  # [E, T + 1, 1], [E, T, 1]
    obs, after = path[:, :-1].flatten(0, 1), path[:, 1:].flatten(0, 1)
    act = act.flatten(0, 1)
    off = torch.zeros(len(obs), dtype=torch.bool)
    data = torch.cat([obs, act, after], 1).numpy().tobytes()
    made = {"fridge": asdict(fridge), "controller": repr(controller), "start": start, "seed": seed}
    return Dataset(
        obs=obs,
        act=act,
        reward=fridge.reward(obs, act, after),
        next_obs=after,
        terminal=off,
        paired=~off,
        starts=torch.arange(n_episodes + 1) * length,
        act_low=torch.zeros(1),
        act_high=torch.tensor([fridge.power]),
        dt=fridge.dt,
        name="refrigerator",
        sha256=hashlib.sha256(data).hexdigest(),
        meta=made,
    )


class RefrigeratorEnv(gym.Env):
    """The same task as an environment: observes the temperature [1] (degrees Celsius), takes the compressor's power
    [1] in W, lasts `length` steps. reset(options={"temp": T}) starts from T."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self, fridge: Refrigerator | None = None, length: int = 200, start: tuple[float, float] = (4.0, 0.5)
    ) -> None:
        self.fridge, self.length, self.start = fridge or Refrigerator(), length, start
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Box(0.0, self.fridge.power, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        drawn = self.start[0] + self.start[1] * self.np_random.standard_normal()
        self.temp = torch.tensor([float((options or {}).get("temp", drawn))], dtype=torch.float64)
        self.steps = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        power = torch.as_tensor(np.asarray(action, dtype=np.float64)).reshape(1, 1)
        act = (2 * power / self.fridge.power - 1).clamp(-1, 1)
        noise = torch.as_tensor(self.np_random.standard_normal(1))
        before, self.temp = self.temp, self.fridge.step(self.temp, act, noise)
        self.steps += 1
        reward = self.fridge.reward(before[:, None], act, self.temp[:, None]).item()
        return self._obs(), reward, False, self.steps >= self.length, {}

    def _obs(self) -> np.ndarray:
        return self.temp.numpy().astype(np.float32)


# ---------------------------------------------------------------- worlds that know the truth


class Truth(Markov):
    """A learner with nothing left to learn: no noise, no uncertainty, no parameters; its loss is the one-step error.
    A step is as long as the environment's whatever dt says, since data sets of these tasks state no interval."""

    like: Tensor  # tells device and type

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.noise_dim = spec, 0
        self.register_buffer("like", torch.zeros(()))

    def draw(self, n: int, k: int, generator: torch.Generator) -> Tensor:
        return self.like.new_zeros(n, 0)

    def uniform(self, n: int, generator: torch.Generator, bounds: list[float]) -> Tensor:
        """[n, len(bounds)]: each column within its bound of 0."""
        bound = torch.tensor(bounds, dtype=self.like.dtype, device=self.like.device)
        draw = torch.rand(n, len(bounds), generator=generator, dtype=self.like.dtype, device=self.like.device)
        return (2 * draw - 1) * bound

    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return forced_mse(self, segment, noise, 1.0, ())


class TruePendulum(Truth):
    """gymnasium's Pendulum-v1: obs (cos, sin, angular velocity), 0 being upright; act [B, 1] the torque over 2 N m."""

    def __init__(self, g: float = 10.0, mass: float = 1.0) -> None:
        super().__init__(Spec(obs=3, act=1))
        self.g, self.mass = g, mass  # m / s^2, kg

    def step(self, state: Tensor, inp: StepInput, cond: Tree) -> tuple[Tensor, Prediction]:
        cos, sin, speed = state.unbind(-1)
        torque = 2 * inp.act[:, 0].clamp(-1, 1)
        angle = torch.atan2(sin, cos)
        reward = -(angle.square() + 0.1 * speed.square() + 0.001 * torque.square())
        speed = (speed + 0.05 * (1.5 * self.g * angle.sin() + 3 / self.mass * torque)).clamp(-8, 8)
        angle = angle + 0.05 * speed
        obs = torch.stack([angle.cos(), angle.sin(), speed], -1)
        return obs, Prediction(obs, reward, {})

    def starts(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, 3] first observations, distributed as the environment's: any angle, angular velocity within 1."""
        angle, speed = self.uniform(n, generator, [math.pi, 1.0]).unbind(-1)
        return torch.stack([angle.cos(), angle.sin(), speed], -1)


class TrueCartPole(Truth):
    """A cart-pole that is to be swung up and kept there, by the equations of gymnasium's CartPole (its constants, and
    of its two integrators the semi-implicit Euler, under which a pole that swings freely gains no energy).

    obs (x in m, velocity, cos, sin, angular velocity), the angle being 0 upright; act [B, 1] the force over 10 N, any
    value of [-1, 1] where CartPole knows two. A step is 0.02 s. The reward, of the state that the step leads to, is

        (1 + cos) / 2 * max(0, 1 - (x / 2.4)^2) - 0.01 act^2

    1 at most, upright in the middle of the track. An episode ends where |x| exceeds 2.4 m: `mbrl_envs.tasks` tells, as
    for every task. It begins hanging, each coordinate within 0.05 of rest."""

    step_s = 0.02

    def __init__(self, g: float = 9.8) -> None:
        super().__init__(Spec(obs=5, act=1))
        self.g = g  # m / s^2
        self.reward = known("mbrl_envs/CartPoleSwingUp-v0").reward

    def step(self, state: Tensor, inp: StepInput, cond: Tree) -> tuple[Tensor, Prediction]:
        x, speed, cos, sin, turn = state.unbind(-1)
        angle = torch.atan2(sin, cos)
        cos, sin = angle.cos(), angle.sin()  # of a prediction that left the circle, the angle counts
        pole, half, total = 0.1, 0.5, 1.1  # kg, m, kg
        push = (10 * inp.act[:, 0].clamp(-1, 1) + pole * half * turn.square() * sin) / total
        turn_rate = (self.g * sin - cos * push) / (half * (4 / 3 - pole * cos.square() / total))
        speed = speed + self.step_s * (push - pole * half * turn_rate * cos / total)
        turn = turn + self.step_s * turn_rate
        x, angle = x + self.step_s * speed, angle + self.step_s * turn
        obs = torch.stack([x, speed, angle.cos(), angle.sin(), turn], -1)
        assert self.reward is not None
        return obs, Prediction(obs, self.reward(state, inp.act, obs), {})

    def starts(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, 5] first observations, distributed as the environment's."""
        return self.hanging(self.uniform(n, generator, [0.05] * 4))

    @staticmethod
    def hanging(off: Tensor) -> Tensor:
        """[n, 5]: the observation whose x, velocity, angle and angular velocity are off [n, 4] from hanging at rest."""
        x, speed, angle, turn = off.unbind(-1)
        return torch.stack([x, speed, -angle.cos(), -angle.sin(), turn], -1)


class CartPoleSwingUp(gym.Env):
    """TrueCartPole as an environment, in float64: observes [5], takes the force over 10 N, [1] in [-1, 1]. Made by id
    it is cut after 250 steps, 5 s. reset(options={"state": (x, velocity, angle, angular velocity)}) starts there. It
    draws itself where render_mode is "rgb_array"."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.world = TrueCartPole().double()
        self.terminal = known("mbrl_envs/CartPoleSwingUp-v0").terminal
        self.observation_space = spaces.Box(-np.inf, np.inf, (5,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        off = torch.tensor(self.np_random.uniform(-0.05, 0.05, (1, 4)))
        if options and "state" in options:
            hanging = torch.tensor([0, 0, math.pi, 0], dtype=torch.float64)
            off = torch.as_tensor(options["state"], dtype=torch.float64).reshape(1, 4) - hanging
        self.state = self.world.hanging(off)
        return self.state[0].numpy().copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        act = torch.as_tensor(np.asarray(action, dtype=np.float64)).reshape(1, 1)
        before = self.state
        self.state, pred = self.world.step(before, StepInput(act, act[:, :0], act.new_ones(1, 1)), ())
        end = self.terminal(before, act, self.state).item()
        return self.state[0].numpy().copy(), pred.reward.item(), bool(end), False, {}

    def render(self) -> np.ndarray | None:
        """[300, 600, 3] uint8: the cart on its track and the pole of 1 m; None without a render_mode."""
        if self.render_mode is None:
            return None
        from PIL import Image, ImageDraw

        x, _, cos, sin, _ = self.state[0].tolist()
        metre, ground, middle = 85.0, 175.0, 300.0
        at = middle + metre * x
        picture = Image.new("RGB", (600, 300), "white")
        draw = ImageDraw.Draw(picture)
        ends = [middle + side * 2.4 * metre for side in (-1, 1)]
        draw.line([ends[0], ground, ends[1], ground], fill="black", width=2)
        for end in ends:
            draw.line([end, ground - 12, end, ground + 12], fill="black", width=2)
        draw.rectangle([at - 25, ground - 14, at + 25, ground + 14], fill="black")
        draw.line([at, ground, at + metre * sin, ground - metre * cos], fill=(202, 152, 101), width=10)
        draw.ellipse([at - 5, ground - 5, at + 5, ground + 5], fill=(129, 132, 203))
        return np.asarray(picture)


class TrueReacher(Truth):
    """gymnasium's Reacher-v5, its physics written out: obs (cos of both joints, sin of both, target's x and y, angular
    velocities, fingertip minus target in x and y), act [B, 2] the torques over 200 N m. A step is two Runge-Kutta
    substeps of 0.01 s of

        M(q) dv/dt + c(q, v) = 200 act - v + limit

    with MuJoCo's inertia of the two links, unit armature and damping, and its soft limit of the second joint at 3 rad
    (one constraint at most is active, so that its solution is closed). As in the environment, the fingertip that is
    observed and rewarded is that of the last stage of the last substep, not the one at the observed angles.

    The state is the observation and the joints' angles [B, 2] in rad, which go on beyond a half turn: a strong swing
    into its limit can overshoot it by more than the 0.14 rad that are left, and an observation alone cannot tell an
    angle beyond pi from one on the other side. So rollouts are the environment's, to rounding, where they begin with
    the second joint within a half turn, as every episode does, and so are single steps from such observations;
    `correct` keeps the turn that is nearest to the state's. For every other MuJoCo task, the true simulator serves
    (`mbrl_envs.simulator`)."""

    # Two capsules of length 0.1 m and radius 0.01 m, whose centres are 0.05 m from their joints, and the fingertip's
    # sphere, 0.11 m from the second: masses in kg, inertia about the centre in kg m^2, density 1000 kg / m^3.
    link = 0.1
    link_mass = 1000 * math.pi * 0.01**2 * (0.1 + 4 / 3 * 0.01)
    link_inertia = 3.917566039026e-5
    tip_mass = 1000 * math.pi * 4 / 3 * 0.01**3
    tip_inertia = 0.4 * tip_mass * 0.01**2
    tip = 0.11
    limit, weight = 3.0, 0.99982115496028  # rad; the second joint's inverse inertia in the model's rest position

    def __init__(self) -> None:
        super().__init__(Spec(obs=10, act=2))
        self.reward = known("Reacher-v5").reward

    def init(self, obs: Tensor, cond: Tree) -> tuple[Tensor, Tensor]:
        return obs, self.angles(obs)

    def observe(self, state: tuple[Tensor, Tensor], cond: Tree) -> Tensor:
        return state[0]

    def correct(
        self, state: tuple[Tensor, Tensor], obs: Tensor, alpha: float | Tensor, cond: Tree
    ) -> tuple[Tensor, Tensor]:
        seen, q = state
        new = self.angles(obs)
        turns = ((q - new) / (2 * math.pi)).round()
        return pull(seen, obs, alpha), pull(q, new + 2 * math.pi * torch.where(turns.isfinite(), turns, 0.0), alpha)

    def step(
        self, state: tuple[Tensor, Tensor], inp: StepInput, cond: Tree
    ) -> tuple[tuple[Tensor, Tensor], Prediction]:
        before, q = state
        v = before[:, 6:8]  # [B, 2], as q
        torque, h, at = 200 * inp.act.clamp(-1, 1), 0.01, q
        for _ in range(2):
            a1 = self.acceleration(q, v, torque)
            v2 = v + h / 2 * a1
            a2 = self.acceleration(q + h / 2 * v, v2, torque)
            v3 = v + h / 2 * a2
            a3 = self.acceleration(q + h / 2 * v2, v3, torque)
            at, v4 = q + h * v3, v + h * a3
            a4 = self.acceleration(at, v4, torque)
            q = q + h / 6 * (v + 2 * v2 + 2 * v3 + v4)
            v = v + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
        first, both = at[:, :1], at.sum(-1, keepdim=True)
        tip = torch.cat(
            [self.link * first.cos() + self.tip * both.cos(), self.link * first.sin() + self.tip * both.sin()], -1
        )
        target = before[:, 4:6]
        obs = torch.cat([q.cos(), q.sin(), target, v, tip - target], -1)
        assert self.reward is not None
        return (obs, q), Prediction(obs, self.reward(before, inp.act, obs), {})

    @staticmethod
    def angles(obs: Tensor) -> Tensor:
        """[B, 2] in (-pi, pi], from observations [B, 10]."""
        return torch.atan2(obs[:, 2:4], obs[:, :2])

    def acceleration(self, q: Tensor, v: Tensor, torque: Tensor) -> Tensor:
        """[B, 2] from angles, angular velocities and torques, [B, 2] each."""
        arm = self.link_mass * self.link / 2 + self.tip_mass * self.tip  # kg m, about the second joint
        outer = self.link_inertia + self.link_mass * (self.link / 2) ** 2
        outer += self.tip_inertia + self.tip_mass * self.tip**2
        inner = self.link_inertia + self.link_mass * (self.link / 2) ** 2
        inner += (self.link_mass + self.tip_mass) * self.link**2
        angle, (v1, v2) = q[:, 1], v.unbind(-1)
        lever = self.link * arm * angle.cos()
        m11, m12, m22 = 1 + inner + outer + 2 * lever, outer + lever, 1 + outer
        det = m11 * m22 - m12.square()
        swirl = self.link * arm * angle.sin()
        f1 = torque[:, 0] - v1 + swirl * v2 * (2 * v1 + v2)
        f2 = torque[:, 1] - v2 - swirl * v1.square()
        free = (m11 * f2 - m12 * f1) / det
        # MuJoCo's soft constraint at its defaults: solref (0.02, 1), solimp (0.9, 0.95, 0.001, 0.5, 2)
        side = -angle.sign()  # where a force of the limit pushes
        depth = (angle.abs() - self.limit).clamp(min=0)
        x = (depth / 0.001).clamp(max=1)
        hard = 0.9 + 0.05 * torch.where(x < 0.5, 2 * x.square(), 1 - 2 * (1 - x).square())
        wanted = -2 / (0.95 * 0.02) * side * v2 + hard * depth / (0.95 * 0.02) ** 2
        push = (wanted - side * free) / (m11 / det + (1 - hard) / hard * self.weight)
        f2 = f2 + torch.where(depth > 0, side * push.clamp(min=0), 0.0)
        return torch.stack([(m22 * f1 - m12 * f2) / det, (m11 * f2 - m12 * f1) / det], -1)

    def starts(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, 10] first observations, distributed as the environment's: joints within 0.1 rad of straight, almost at
        rest, the target anywhere within 0.2 m."""
        q1, q2, v1, v2 = self.uniform(n, generator, [0.1, 0.1, 0.005, 0.005]).unbind(-1)
        draw = torch.rand(n, 2, generator=generator, dtype=self.like.dtype, device=self.like.device)
        radius, angle = 0.2 * draw[:, 0].sqrt(), 2 * math.pi * draw[:, 1]
        x, y = radius * angle.cos(), radius * angle.sin()
        dx = self.link * q1.cos() + self.tip * (q1 + q2).cos() - x
        dy = self.link * q1.sin() + self.tip * (q1 + q2).sin() - y
        return torch.stack([q1.cos(), q2.cos(), q1.sin(), q2.sin(), x, y, v1, v2, dx, dy], -1)


TRUTHS: dict[str, type[TruePendulum] | type[TrueCartPole]] = {
    "Pendulum-v1": TruePendulum,
    "mbrl_envs/CartPoleSwingUp-v0": TrueCartPole,
}
"""What a planner takes for the simulator itself. Reacher-v5 is MuJoCo's, whose own rollouts serve."""
