"""The worlds: datasets, tasks and environments.

Importing the package registers its environments with gymnasium, which loads none by itself: after `import mbrl_envs`,
or as `gymnasium.make("mbrl_envs:mbrl_envs/LatchDoor-v0")`, they are made by id.
"""

import gymnasium as gym
from gymnasium.envs.registration import WrapperSpec

_SPEED = (WrapperSpec("Speed", "mbrl_envs.robots:Speed", {}),)  # what runners need to observe what they earn
_RUNNERS = ("HalfCheetah", "Hopper", "Swimmer", "Walker2d")
_TASKS = (
    *_RUNNERS, "Ant", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum", "Pusher", "Reacher",
)  # fmt: skip


def _register() -> None:
    def add(name: str, where: str, steps: int | None, **kw: object) -> None:
        if (env_id := f"mbrl_envs/{name}-v0") not in gym.registry:
            gym.register(env_id, entry_point=f"mbrl_envs.{where}", max_episode_steps=steps, **kw)  # pyright: ignore[reportArgumentType]

    add("CartPoleSwingUp", "control:CartPoleSwingUp", 250)
    add("CartPoleLength", "robots:CartPoleLength", 200)
    add("BoxPusher", "robots:BoxPusher", 120)
    add("LatchDoor", "robots:LatchDoor", 100)
    add("ReacherLinks", "robots:ReacherLinks", 50)
    add("HalfCheetahBody", "robots:HalfCheetahBody", 1000, additional_wrappers=_SPEED)
    for name in _TASKS:
        task, wrappers = f"{name}-v5", _SPEED if name in _RUNNERS else ()
        steps = gym.spec(task).max_episode_steps
        add(f"{name}Physics", "robots:physics", steps, kwargs={"task": task}, additional_wrappers=wrappers)


_register()
