"""The border to an environment: actions in [-1, 1] on this side, gymnasium's interface on the other, and what comes
back is checked. Environments stay outside: they come in as objects."""

import hashlib
import json
import math
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mbrl.core import Spec


class Env(Protocol):
    """What is asked of an environment: gymnasium's interface, with a flat Box of observations and a bounded flat Box
    of actions."""

    @property
    def observation_space(self) -> Any: ...
    @property
    def action_space(self) -> Any: ...
    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]: ...
    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]: ...


def spec_of(env: Env) -> Spec:
    """The widths of an environment. Raises ValueError for one whose spaces do not serve."""
    if hasattr(env, "num_envs"):
        raise ValueError("environment: got a vector of environments, expected a single one")
    if not (hasattr(env, "action_space") and hasattr(env, "observation_space")):
        raise ValueError(
            f"environment: got a {type(env).__name__}, expected an object with gymnasium's spaces, reset and step, as "
            "gymnasium.make gives"
        )
    act, obs = env.action_space, env.observation_space
    flat = lambda x: hasattr(x, "low") and hasattr(x, "high") and len(x.shape) == 1 and x.shape[0] > 0
    if not flat(act):
        raise ValueError(f"environment: its action space is {act}, expected a flat Box: wrap it in one that has it")
    if not np.issubdtype(act.dtype, np.floating):  # -1 .. 1 would be cut to whole numbers
        raise ValueError(f"environment: its action space is {act}, expected floating point numbers: wrap it")
    if not (np.isfinite(act.low).all() and np.isfinite(act.high).all() and (act.low < act.high).all()):
        raise ValueError(f"environment: its action space is {act}, expected finite bounds, low < high: rescale it")
    if not flat(obs):
        raise ValueError(
            f"environment: its observation space is {obs}, expected a flat Box: wrap it in FlattenObservation"
        )
    return Spec(int(obs.shape[0]), int(act.shape[0]))


def episode_seed(seed: int, episode: int) -> int:
    """What a run's episode is reset with: one that goes on begins the episode as the uninterrupted run did, and runs of
    other seeds share no episode."""
    return int(hashlib.sha256(json.dumps([[seed, episode]]).encode()).hexdigest()[:12], 16) % 2**31


class World:
    """An environment at the border. low, high [A]: the actions that -1 and 1 stand for.

    Raises ValueError, once, for an observation of another shape and for anything that is not finite, an action
    included."""

    def __init__(self, env: Env) -> None:
        self.env, self.spec = env, spec_of(env)
        space = env.action_space
        self.low, self.high, self.dtype = np.float64(space.low), np.float64(space.high), space.dtype
        self.steps = 0

    def reset(self, seed: int) -> np.ndarray:
        """The first observation [O] of an episode, in single precision."""
        return self._checked(_asked("reset", lambda: self.env.reset(seed=seed))[0], "reset")

    def step(self, act: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """act [A] in [-1, 1] -> observation [O], reward, terminated, truncated."""
        self.steps += 1
        if act.shape != self.low.shape:
            raise ValueError(
                f"step {self.steps}: got an action of shape {act.shape}, expected {self.low.shape}; what acts is of "
                "another environment"
            )
        if not np.isfinite(act).all():
            raise ValueError(f"step {self.steps}: the action is {act}, expected finite numbers; what acts has diverged")
        raw = self.low + (act.astype(np.float64) + 1) / 2 * (self.high - self.low)
        raw = np.clip(raw, self.low, self.high)  # rounding may lead out of the box
        out = _asked(f"step {self.steps}", lambda: self.env.step(raw.astype(self.dtype)))
        if len(out) != 5:
            raise ValueError(
                f"environment: step {self.steps} returned {len(out)} things, expected gymnasium's five: observation, "
                "reward, terminated, truncated, info; wrap one that was written for gym"
            )
        obs, reward, terminated, truncated, _ = out
        if not math.isfinite(number := _number(reward)):  # in single precision, as it is kept
            raise ValueError(f"environment: step {self.steps} returned a reward of {reward}, expected a finite number")
        return self._checked(obs, f"step {self.steps}"), number, bool(terminated), bool(truncated)

    def _checked(self, obs: Any, where: str) -> np.ndarray:
        obs = np.asarray(obs)
        if obs.shape != (self.spec.obs,):
            raise ValueError(f"environment: {where} returned shape {obs.shape}, expected ({self.spec.obs},)")
        with np.errstate(over="ignore"):
            single = obs.astype(np.float32)  # a copy: the environment may write on its own
        if not np.isfinite(single).all():
            raise ValueError(
                f"environment: {where} returned the observation {obs}, expected finite numbers; it has diverged"
            )
        return single


def _asked(what: str, call: Callable[[], Any]) -> Any:
    """What an environment gives. What it raises, of whatever kind, is a ValueError that says whose it is, and where."""
    try:
        return call()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        others = (__file__, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
        own = [x for x in frames if not x.filename.startswith(others)]  # of who wrote the environment, where there are
        last = (own or frames)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        raise ValueError(f"environment: its {what} raised {type(error).__name__}: {error} ({where})") from error


def _number(x: Any) -> float:
    """A number, or an array of one; NaN for what is neither, or is too large for single precision."""
    try:
        number = float(np.asarray(x).item())
        return number if abs(number) <= float(np.finfo(np.float32).max) else math.nan
    except (TypeError, ValueError):
        return math.nan
