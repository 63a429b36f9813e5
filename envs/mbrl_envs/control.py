"""Small control tasks in torch: a refrigerator, whose data cover a narrow band, and gymnasium's Pendulum as a learner
that knows the truth."""

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

from mbrl.core import Markov, Prediction, Segment, Spec, StepInput, Tree
from mbrl.data import Dataset
from mbrl.rollout import forced_mse

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


# ---------------------------------------------------------------- the pendulum


class TruePendulum(Markov):
    """gymnasium's Pendulum-v1 as a learner with nothing left to learn: obs (cos, sin, angular velocity), act [B, 1]
    the torque over 2 N m, exact reward. A step is 0.05 s whatever dt says, since data sets of it state no interval."""

    g: Tensor

    def __init__(self, g: float = 10.0) -> None:
        super().__init__()
        self.spec, self.noise_dim = Spec(obs=3, act=1), 0
        self.register_buffer("g", torch.tensor(g))

    def step(self, state: Tensor, inp: StepInput, cond: Tree) -> tuple[Tensor, Prediction]:
        cos, sin, speed = state.unbind(-1)
        torque = 2 * inp.act[:, 0].clamp(-1, 1)
        angle = torch.atan2(sin, cos)  # 0 is upright
        reward = -(angle.square() + 0.1 * speed.square() + 0.001 * torque.square())
        speed = (speed + 0.05 * (1.5 * self.g * angle.sin() + 3 * torque)).clamp(-8, 8)
        angle = angle + 0.05 * speed
        obs = torch.stack([angle.cos(), angle.sin(), speed], -1)
        return obs, Prediction(obs, reward, {})

    def draw(self, n: int, k: int, generator: torch.Generator) -> Tensor:
        return self.g.new_zeros(n, 0)

    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return forced_mse(self, segment, noise, 1.0, ())
