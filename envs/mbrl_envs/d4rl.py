"""The environments in which D4RL's maze2d, antmaze, Adroit and kitchen sets are evaluated, by the sets' own ids.

`gymnasium.make("mbrl_envs.d4rl:D4RL/maze2d-umaze-v1")` makes one. None that is maintained earns what D4RL's (Fu et al.
2020, arXiv 2004.07219) did: gymnasium-robotics' mazes draw a new goal for each episode, which a policy of these sets
is not shown, and measure positions from another origin, its ant is five times as strong, its pen may fall, and its
door, hammer and relocation (from 1.2.1 on, under an unchanged id) reward distance where nearness was meant. So the
mazes are built here, on gymnasium's ant; the hands and the kitchen are gymnasium-robotics' (extra `[robotics]`),
with D4RL's reward, observation and end.
"""

import importlib
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from mbrl_envs.evaluate import EnvError, make
from mbrl_envs.scores import d4rl_table

mujoco: Any = importlib.import_module("mujoco")

# Walls #, the goal G. Rows are the first coordinate of maze2d, and the second of antmaze, which starts at R.
MAZES = {
    "open": "####### #.....# #..G..# #.....# #######",
    "umaze": "##### #G..# ###.# #...# #####",
    "medium": "######## #..##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########",
    "large": "############ #....#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# ##.#.#.#.### #..#...#.G.# "
    "############",
    "eval-umaze": "##### #..G# #.### #...# #####",
    "eval-medium": "######## #.....G# #.#.##.# #....#.# ###..### #......# #..##..# ########",
    "eval-large": "############ #..#...#.G.# ##.###.#.#.# #..#.#.....# #.##.#..##.# #......#...# #.##.#.#.### "
    "#....#.....# ############",
}
ANT_MAZES = {
    "umaze": "##### #R..# ###.# #G..# #####",
    "medium": "######## #R.##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########",
    "large": "############ #R...#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# ##.#.#.#.### #..#...#.G.# "
    "############",
}
SCALE = 4.0  # of an ant's maze: metres a cell
REACH = 0.5  # from the goal, in either kind of maze
KITCHEN = {
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}
# Where each object is to be brought: from this joint on (of 9 of the arm and 21 of objects), to these positions.
ELEMENTS: Mapping[str, tuple[int, tuple[float, ...]]] = {
    "bottom burner": (11, (-0.88, -0.01)),
    "light switch": (17, (-0.69, -0.05)),
    "slide cabinet": (19, (0.37,)),
    "microwave": (22, (-0.75,)),
    "kettle": (23, (-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06)),
}


def _cells(maze: str, kind: str) -> list[tuple[int, int]]:
    return [(i, j) for i, row in enumerate(maze.split()) for j, x in enumerate(row) if x in kind]


class _World(gym.Env):
    """What the mazes have in common: a MuJoCo model, stepped and drawn."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - as gymnasium has it

    def __init__(self, xml: str, skip: int, acts: int, obs: int, render_mode: str | None) -> None:
        self.model = mujoco.MjModel.from_xml_string(xml)
        self.data, self.skip, self.render_mode = mujoco.MjData(self.model), skip, render_mode
        self.start = self.data.qpos.copy()
        self.action_space = spaces.Box(-1.0, 1.0, (acts,), np.float32)
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs,), np.float64)
        self.renderer: Any = None

    def place(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel
        mujoco.mj_forward(self.model, self.data)
        return self.seen()

    def advance(self, action: np.ndarray) -> np.ndarray:
        self.data.ctrl[:] = np.clip(action, -1.0, 1.0)
        mujoco.mj_step(self.model, self.data, self.skip)
        return self.seen()

    def seen(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.renderer is None:
            self.renderer = mujoco.Renderer(self.model, 240, 320)
            self.camera = mujoco.MjvCamera()
            mujoco.mjv_defaultFreeCamera(self.model, self.camera)
            walls = self.model.geom_pos[self.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX]
            low, high = walls.min(0), walls.max(0)
            self.camera.elevation, self.camera.distance = -89.0, 1.5 * (high - low).max()
            self.camera.lookat[:] = (low + high) / 2
        self.renderer.update_scene(self.data, self.camera)
        return self.renderer.render()

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None


class Maze2d(_World):
    """A point that is pushed through a maze; obs: position and velocity, act: force along either axis. It earns 1 in
    each step that ends near the goal, or, `dense`, exp(-distance), and begins in any cell, the goal's included."""

    def __init__(self, maze: str, dense: bool = False, render_mode: str | None = None) -> None:
        layout = MAZES[maze]
        walls = "".join(
            f'<geom conaffinity="1" type="box" pos="{i + 1} {j + 1} 0" size="0.5 0.5 0.2" rgba="0.7 0.5 0.3 1"/>'
            for i, j in _cells(layout, "#")
        )
        joints = "".join(
            f'<joint name="{n}" type="slide" axis="{axis}"/>' for n, axis in (("x", "1 0 0"), ("y", "0 1 0"))
        )
        motors = "".join(f'<motor joint="{n}" ctrlrange="-1 1" ctrllimited="true" gear="100"/>' for n in "xy")
        xml = f"""<mujoco>
          <compiler inertiafromgeom="true" angle="radian"/>
          <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
          <default>
            <joint damping="1" limited="false"/>
            <geom friction=".5 .1 .1" density="1000" margin="0.002" condim="1" contype="2" conaffinity="1"/>
          </default>
          <worldbody>
            <light pos="4 4 20" dir="0 0 -1" directional="true"/>
            <geom type="plane" size="40 40 0.25" pos="0 0 -0.1" contype="1" conaffinity="0" rgba=".2 .3 .4 1"/>
            <body pos="1.2 1.2 0">{joints}<geom type="sphere" size="0.1" contype="1" rgba="0.3 0.6 0.3 1"/></body>
            {walls}
          </worldbody>
          <actuator>{motors}</actuator>
        </mujoco>"""
        super().__init__(xml, 1, 2, 4, render_mode)
        (goal,) = _cells(layout, "G")
        self.goal, self.dense = np.array(goal, dtype=float), dense
        self.starts = np.array([*_cells(layout, "."), goal], dtype=float)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        cell = self.starts[self.np_random.integers(len(self.starts))]
        return self.place(cell + self.np_random.uniform(-0.1, 0.1, 2), 0.1 * self.np_random.standard_normal(2)), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.data.qvel[:] = np.clip(self.data.qvel, -5.0, 5.0)
        obs = self.advance(action)
        far = np.linalg.norm(obs[:2] - self.goal)
        return obs, float(np.exp(-far) if self.dense else far <= REACH), False, False, {}


class AntMaze(_World):
    """An ant in a maze; obs: its 15 positions and 14 velocities, act: torques at its 8 joints. It starts in one corner,
    and earns 1 and is done near the goal, which lies anew in the other corner's cell: for each episode, or, not
    `anew`, once."""

    def __init__(self, maze: str, anew: bool = True, render_mode: str | None = None) -> None:
        folder = Path(str(importlib.import_module("gymnasium.envs.mujoco").__file__)).parent
        tree = ET.parse(folder / "assets" / "ant.xml")
        find = lambda path: [x for x in tree.iter() if x.tag == path]
        (option,), (body,) = find("option"), find("worldbody")
        option.set("timestep", "0.02")
        (default,) = (x for x in find("default")[0] if x.tag == "geom")
        default.set("solref", ".02 1")
        default.set("solimp", ".8 .8 .01")
        for motor in find("motor"):
            motor.set("gear", "30")
        layout = ANT_MAZES[maze]
        ((row, column),), (self.goal_cell,) = _cells(layout, "R"), _cells(layout, "G")
        for i, j in _cells(layout, "#"):
            place = {
                "pos": f"{(j - column) * SCALE} {(i - row) * SCALE} {SCALE / 4}",
                "size": f"{SCALE / 2} {SCALE / 2} {SCALE / 4}",
            }
            look = {"type": "box", "contype": "1", "conaffinity": "1", "rgba": "0.7 0.5 0.3 1"}
            ET.SubElement(body, "geom", place | look)
        super().__init__(ET.tostring(tree.getroot(), encoding="unicode"), 5, 8, 29, render_mode)
        self.origin, self.anew = np.array([column, row]), anew
        self.goal: np.ndarray | None = None

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        draw = self.np_random.uniform
        corner = SCALE * (np.array(self.goal_cell[::-1]) - self.origin)
        goal = np.maximum(corner + draw(0, 0.25 * SCALE, 2) + draw(0, 0.125 * SCALE, 2), 0)
        if self.anew or self.goal is None:  # drawn in either case, so that a seed's start is the same
            self.goal = goal
        qvel = 0.1 * self.np_random.standard_normal(self.model.nv)
        return self.place(self.start + draw(-0.1, 0.1, self.model.nq), qvel), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs = self.advance(action)
        there = bool(np.linalg.norm(obs[:2] - self.goal) <= REACH)
        return obs, float(there), there, False, {}


class Adroit(gym.Wrapper):
    """A hand of gymnasium-robotics' that earns what D4RL's earns, and is done when the pen has fallen."""

    def __init__(self, env: gym.Env, task: str) -> None:
        super().__init__(env)
        self.task = task

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        obs, _, terminated, truncated, info = self.env.step(action)
        world: Any = self.env.unwrapped
        fallen = self.task == "pen" and world.data.body("Object").xpos[2] < 0.075
        return obs, float(getattr(self, self.task)(world.data)), terminated or bool(fallen), truncated, info

    def door(self, data: Any) -> float:
        angle = data.joint("door_hinge").qpos[0]
        far = np.linalg.norm(data.site("S_grasp").xpos - data.site("S_handle").xpos)
        reward = -0.1 * far - 0.1 * (angle - 1.57) ** 2 - 1e-5 * np.sum(data.qvel**2)
        return reward + 2 * (angle > 0.2) + 8 * (angle > 1.0) + 10 * (angle > 1.35)

    def hammer(self, data: Any) -> float:
        hammer, head, nail = data.body("Object").xpos, data.site("tool").xpos, data.site("S_target").xpos
        left = np.linalg.norm(nail - data.site("nail_goal").xpos)
        reward = -0.1 * np.linalg.norm(data.site("S_grasp").xpos - hammer) - np.linalg.norm(head - nail)
        reward -= 10 * left + 1e-2 * np.linalg.norm(data.qvel)
        lifted = hammer[2] > 0.04 and head[2] > 0.04
        return float(reward + 2 * lifted + 25 * (left < 0.02) + 75 * (left < 0.01))

    def relocate(self, data: Any) -> float:
        ball, palm, goal = data.body("Object").xpos, data.site("S_grasp").xpos, data.site("target").xpos
        left = np.linalg.norm(ball - goal)
        reward = -0.1 * np.linalg.norm(palm - ball)
        if ball[2] > 0.04:
            reward += 1.0 - 0.5 * np.linalg.norm(palm - goal) - 0.5 * left
        return float(reward + 10 * (left < 0.1) + 20 * (left < 0.05))

    def pen(self, data: Any) -> float:
        at = lambda name: data.site(name).xpos
        pen, ways = data.body("Object").xpos, [at(f"{x}_top") - at(f"{x}_bottom") for x in ("object", "target")]
        alike = float(ways[0] @ ways[1] / np.linalg.norm(ways[0]) / np.linalg.norm(ways[1]))
        left = np.linalg.norm(pen - at("eps_ball"))
        near = left < 0.075
        return float(alike - left + 10 * (near and alike > 0.9) + 50 * (near and alike > 0.95) - 5 * (pen[2] < 0.075))


class Kitchen(gym.ObservationWrapper):
    """gymnasium-robotics' kitchen, in which four things are to be done, as D4RL's shows it: 9 positions of the arm, 21
    of objects, and where all of these are to be."""

    def __init__(self, env: gym.Env, tasks: tuple[str, ...]) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(-np.inf, np.inf, (60,), np.float64)
        self.goal = np.zeros(30)
        for name in tasks:
            first, values = ELEMENTS[name]
            self.goal[first : first + len(values)] = values

    def observation(self, observation: Any) -> np.ndarray:
        x = np.asarray(observation["observation"])
        if x.shape != (59,):
            raise EnvError(
                f"FrankaKitchen-v1: got observations {x.shape}, expected (59,): 18 of the arm, 41 of objects"
            )
        return np.concatenate([x[:9], x[18:39], self.goal])


def adroit(task: str, **kw: Any) -> gym.Env:
    return Adroit(make(f"AdroitHand{task.capitalize()}-v1", **kw), task)


def kitchen(quality: str, **kw: Any) -> gym.Env:
    tasks = KITCHEN[quality]
    done = {"remove_task_when_completed": True, "terminate_on_tasks_completed": True}
    return Kitchen(make("FrankaKitchen-v1", tasks_to_complete=list(tasks), **done, **kw), tasks)


def _register() -> None:
    for name, known in d4rl_table().items():
        words = name.split("-")
        version = words[-1]
        if known.family == "maze2d":
            maze = "-".join(w for w in words[1:-1] if w != "dense")
            entry, kw = "Maze2d", {"maze": maze, "dense": "dense" in words}
        elif known.family == "antmaze":
            entry, kw = "AntMaze", {"maze": words[1], "anew": version == "v2"}
        elif known.family == "kitchen":
            entry, kw = "kitchen", {"quality": words[1]}
        elif known.env is not None and known.env.startswith("mbrl_envs.d4rl:"):
            entry, kw = "adroit", {"task": known.family}
        else:
            continue
        if (env_id := f"D4RL/{name}") not in gym.registry:
            gym.register(env_id, entry_point=f"mbrl_envs.d4rl:{entry}", max_episode_steps=known.limit, kwargs=kw)


_register()
