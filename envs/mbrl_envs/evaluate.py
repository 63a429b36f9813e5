"""What a policy earns in the real environment: episodes in lock-step, so that the policy is asked once for all of them.

A policy maps obs [n, O] (float32, as the data hold it: Dict observations flattened) to act [n, A] in [-1, 1]. Its
rows are the episodes that still run, so n falls as they end.
"""

import importlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from mbrl_envs.scores import parted, robotics

Policy = Callable[[Tensor], Tensor]
ROBOTICS = r"AdroitHand|AntMaze|PointMaze|FrankaKitchen|Fetch|HandReach|HandManipulate|MaMuJoCo"
FLAWED = r"AdroitHand(Door|Hammer|Relocate)-v1"
ANTMAZE = 29  # observations of D4RL's antmaze: 2 of the position, 27 of the body
ENDLESS = 10_000  # steps after which an environment that states no limit is taken to have none


class EnvError(ValueError):
    """An environment that cannot be made, or a policy that does not fit it."""


def evaluator(
    env_id: str | gym.Env | Callable[[], gym.Env],
    episodes: int = 10,
    seed: int = 0,
    act_low: Any = None,
    act_high: Any = None,
    max_steps: int | None = None,
    copies: int | None = None,
    obs: int | None = None,
) -> "Evaluator":
    """A function of a policy that returns its undiscounted returns, one an episode.

    env_id: a gymnasium id; a function that makes an environment; or one environment (a robot, say), in which the
    episodes follow one another. act_low, act_high [A]: what actions of -1 and 1 mean, by default the action space's
    bounds; what leaves those bounds is clipped. max_steps: cut episodes there; an environment without a time limit of
    its own needs it. copies: how many environments run side by side, by default one an episode, 32 at most. obs: the
    width of the observations that the policy knows; where an environment with goals has more, the policy is shown
    those of D4RL's antmaze (position, then observation) or maze2d (observation) if they are as wide.

    Environments are made at the first call, or by `open`. Raises EnvError for an id that does not exist, an action
    space that is not a bounded box, or observations of another width."""
    return Evaluator(env_id, episodes, seed, act_low, act_high, max_steps, copies, obs)


class Evaluator:
    """evaluate(policy, round=k) -> [episodes] float64.

    Episode i of round k starts from the seed `seed + k * episodes + i`: calls with the same round repeat the same
    initial states, other rounds have others. An episode in which the policy's action is not finite ends there with a
    return of nan; the action is not sent."""

    def __init__(
        self,
        env_id: str | gym.Env | Callable[[], gym.Env],
        episodes: int,
        seed: int,
        act_low: Any,
        act_high: Any,
        max_steps: int | None,
        copies: int | None,
        obs: int | None = None,
    ) -> None:
        if episodes < 1 or (max_steps is not None and max_steps < 1) or (copies is not None and copies < 1):
            got = f"episodes={episodes}, max_steps={max_steps}, copies={copies}"
            raise EnvError(f"evaluator: got {got}; expected at least 1 of each")
        self.source, self.episodes, self.seed, self.max_steps = env_id, episodes, seed, max_steps
        self.copies = 1 if isinstance(env_id, gym.Env) else min(episodes, copies or 32)
        self.given, self.width = (act_low, act_high), obs
        self.envs: list[gym.Env] = []

    def __call__(
        self, policy: Policy, round: int = 0, rows: Callable[[list[int], int], None] | None = None
    ) -> np.ndarray:
        """rows: told (kept, begun) whenever episodes end or begin, for a policy that remembers: of the rows of the
        last call those of the indices `kept` go on, in this order, and `begun` new ones follow them."""
        told = rows or (lambda kept, begun: None)
        envs = self.open()
        low, high = self.bounds
        box, view = envs[0].action_space, _view(envs[0].observation_space, self.width, self.name)
        returns = np.zeros(self.episodes)
        waiting = iter(range(self.episodes))
        live: list[tuple[gym.Env, int]] = []
        seen: list[np.ndarray] = []
        steps: list[int] = []

        def begin(env: gym.Env) -> None:
            i = next(waiting, None)
            if i is not None:
                live.append((env, i))
                obs, _ = env.reset(seed=self.seed + round * self.episodes + i)
                seen.append(self._finite(view(obs), "reset", "observation"))
                steps.append(0)

        with quiet():
            for env in envs:
                begin(env)
            told([], len(live))
            while live:
                act = ask(policy, np.stack(seen), low.shape[0])
                sent = to_env(act, low, high, box)
                freed = []
                for j, (env, i) in enumerate(live):
                    if not np.isfinite(act[j]).all():
                        returns[i], ended = np.nan, True
                    else:
                        steps[j] += 1
                        where = f"step {steps[j]} of an episode"
                        obs, reward, over = self._step(env, sent[j], where)
                        returns[i] += reward
                        seen[j] = self._finite(view(obs), where, "observation")
                        ended = over or steps[j] == self.max_steps
                    if ended:
                        freed.append(j)
                    elif steps[j] >= ENDLESS and self.max_steps is None and self.endless:
                        raise EnvError(
                            f"{self.name}: an episode took {ENDLESS} steps and the environment states no limit; "
                            "pass max_steps, or the id with one, as in 'Id-v0{\"max_episode_steps\": 1000}'"
                        )
                done = [live[j][0] for j in freed]
                for j in reversed(freed):
                    del live[j], seen[j], steps[j]
                kept = [j for j in range(len(seen) + len(freed)) if j not in freed]
                for env in done:
                    begin(env)
                if freed:
                    told(kept, len(live) - len(kept))
        return returns

    def _step(self, env: gym.Env, act: Any, where: str) -> tuple[Any, float, bool]:
        """The observation, the reward, and whether the episode is over."""
        out: tuple = env.step(act)
        if len(out) != 5 or np.size(out[1]) != 1:
            got = f"{len(out)} things" if len(out) != 5 else f"the reward {out[1]}"
            raise EnvError(
                f"{self.name}: {where} returned {got}, expected gymnasium's observation, reward (one number), "
                "terminated, truncated and info; wrap the environment"
            )
        obs, reward, terminated, truncated, _ = out
        return obs, float(np.ravel(self._finite(reward, where, "reward"))[0]), bool(terminated or truncated)

    def _finite(self, x: Any, where: str, what: str) -> Any:
        if not np.isfinite(x).all():
            raise EnvError(f"{self.name}: {where} returned the {what} {x}, expected finite numbers; it has diverged")
        return x

    @property
    def name(self) -> str:
        return self.source if isinstance(self.source, str) else type(self.source).__name__

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The actions [A] that -1 and 1 stand for."""
        return _bounds(self.open()[0], *self.given, self.name)

    def close(self) -> None:
        """Close the environments made here; the next call makes them anew. One that was given stays open."""
        if not isinstance(self.source, gym.Env):
            for env in self.envs:
                env.close()
        self.envs = []

    def open(self) -> list[gym.Env]:
        """The environments, made now if they were not yet; what does not fit raises EnvError."""
        if not self.envs:
            if isinstance(self.source, str) and (hand := re.fullmatch(FLAWED, self.source)):
                warnings.warn(
                    f"{self.source}: gymnasium-robotics, from 1.2.1 on, rewards a distance there where nearness was "
                    f"meant; mbrl_envs.d4rl:D4RL/{hand[1].lower()}-expert-v1 is the same environment without that",
                    stacklevel=2,
                )
            envs = [_make(self.source, self.width) for _ in range(self.copies)]
            _bounds(envs[0], *self.given, self.name)
            _view(envs[0].observation_space, self.width, self.name)
            spec = envs[0].spec
            self.endless = spec is None or spec.max_episode_steps is None
            self.envs = envs
        return self.envs


def video(
    policy: Policy,
    env_id: str | gym.Env | Callable[[], gym.Env],
    path: str | Path,
    seed: int = 0,
    max_steps: int = 1000,
    act_low: Any = None,
    act_high: Any = None,
    gl: str | None = None,
    obs: int | None = None,
) -> float:
    """Run one episode, write it as a film (.gif; .mp4 where imageio-ffmpeg is installed) and return its return.

    act_low, act_high, obs: as for `evaluator`. gl: MuJoCo's backend, "egl" (a GPU, no display) or "osmesa" (no GPU);
    it counts only before MuJoCo first draws. An environment that is given must have render_mode "rgb_array". Raises
    EnvError where nothing can be drawn."""
    path = Path(path)
    if gl is not None:
        os.environ["MUJOCO_GL"] = gl
    env = None
    try:
        with quiet():
            env = _make(env_id, obs, render_mode="rgb_array")
            low, high = _bounds(env, act_low, act_high, str(env_id))
            view = _view(env.observation_space, obs, str(env_id))
            if env.render_mode != "rgb_array":
                raise EnvError(f"video: {env_id} has render_mode {env.render_mode!r}; make it with 'rgb_array'")
            seen, _ = env.reset(seed=seed)
            with _film(path, int(env.metadata.get("render_fps", 30))) as add:
                total, ended, steps = 0.0, False, 0
                add(env.render())
                while not ended and steps < max_steps:
                    act = ask(policy, view(seen)[None], low.shape[0])
                    if not np.isfinite(act).all():
                        raise EnvError("video: the policy's action is not finite")
                    seen, reward, terminated, truncated, _ = env.step(to_env(act, low, high, env.action_space)[0])
                    total += float(reward)
                    ended = terminated or truncated
                    steps += 1
                    add(env.render())
        return total
    except EnvError:
        raise
    except Exception as error:  # each backend fails in its own way, some with AttributeError deep inside OpenGL
        hint = "; for MuJoCo pass gl='egl' or gl='osmesa' (or set MUJOCO_GL)"
        if env is not None and "mujoco" not in type(env.unwrapped).__module__:
            hint = ""
        raise EnvError(f"video: cannot draw {env_id}: {type(error).__name__}: {error}{hint}") from error
    finally:
        if env is not None and not isinstance(env_id, gym.Env):
            env.close()


def check_film(path: Path) -> None:
    """Raises EnvError where no film of that kind can be written there: before what is to be filmed takes hours."""
    above = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir() or not above.is_dir():
        raise EnvError(
            f"video: {path} cannot be written, {path if path.is_dir() else above} is in the way; name another"
        )
    if not os.access(above, os.W_OK):
        raise EnvError(f"video: {path} cannot be written, {above} lets nobody write here; name another folder")
    with tempfile.TemporaryDirectory() as folder:
        _writer(Path(folder) / f"film{path.suffix}", path).close()


def _writer(part: Path, path: Path, **kw: Any) -> Any:
    """What writes the frames of the film `path` to the file `part`."""
    import imageio.v2 as imageio

    try:
        return imageio.get_writer(part, **kw)
    except (ImportError, ValueError, OSError) as error:
        part.unlink(missing_ok=True)
        hint = "use a name that ends in .gif, or pip install imageio-ffmpeg for .mp4"
        raise EnvError(f"video: cannot write {path}: {str(error).strip().partition(chr(10))[0]}; {hint}") from error


@contextmanager
def _film(path: Path, fps: int) -> Iterator[Callable[[Any], None]]:
    """A function that takes the frames one by one; of more than 30 a second only some are kept. The file appears when
    the last one is in."""
    skip = max(1, round(fps / 30))
    kw: dict[str, Any] = {"duration": 1000 * skip / fps, "loop": 0} if path.suffix == ".gif" else {"fps": fps / skip}
    part = path.with_name(f".{path.stem}.tmp{path.suffix}")
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = _writer(part, path, **kw)

    def add(frame: Any) -> None:
        nonlocal count
        if count % skip == 0:
            writer.append_data(np.asarray(frame))
        count += 1

    try:
        yield add
        writer.close()
        part.replace(path)
    finally:
        writer.close()
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- environments


@contextmanager
def quiet() -> Iterator[None]:
    """Without gymnasium's advice to leave the v4 environments, in which D4RL's scores are measured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*is out of date.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*(deprecated|does not support the v\d|mujoco-bindings).*")
        yield


@contextmanager
def _no_compiler_warnings(env_id: str) -> Iterator[None]:
    """Without what MuJoCo's compiler writes to stderr and to a file MUJOCO_LOG.TXT about gymnasium's own models."""
    spec = gym.registry.get(env_id)
    if spec is None or "mujoco" not in str(spec.entry_point):
        yield
        return
    mujoco: Any = importlib.import_module("mujoco")

    before = mujoco.get_mju_user_warning() if hasattr(mujoco, "get_mju_user_warning") else None
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def make(env_id: str, **kw: Any) -> gym.Env:
    """gymnasium.make, with gymnasium-robotics registered where its ids are asked for. The id may bring arguments, which
    go before kw: `Pendulum-v1{"g": 1.6}`; one step is tried with them. Raises EnvError, and DataError for arguments
    that are no JSON."""
    name, own = parted(env_id)
    if re.match(ROBOTICS, env_id):
        try:
            robotics()
        except ImportError as error:
            raise EnvError(f"{env_id} needs gymnasium-robotics: pip install mbrl-suite[robotics] ({error})") from error
    try:
        with quiet(), _no_compiler_warnings(name):
            env = gym.make(name, disable_env_checker=True, **(kw | own))
            if own:
                _try(env)
            return env
    except gym.error.Error as error:
        raise EnvError(f"cannot make the environment {env_id!r}: {error}") from error
    except (ImportError, AssertionError, TypeError) as error:  # a package, a version, or an argument that it has not
        raise EnvError(f"cannot make the environment {env_id!r}: {error!r}") from error
    except Exception as error:  # what an environment raises for a bad argument is its own
        if not own:
            raise
        drawn = ", or what draws it (MUJOCO_GL=egl or osmesa)" if "render_mode" in kw else ""
        raise EnvError(f"cannot make the environment {env_id!r}: {error!r}; mend its arguments{drawn}") from error


def _try(env: gym.Env) -> None:
    """Some environments read their arguments in their first step."""
    interval = getattr(env.unwrapped, "dt", 1.0)
    if isinstance(interval, float) and interval <= 0:
        raise ValueError(f"a step of it takes {interval:g} s")
    try:
        env.reset(seed=0)
        if isinstance(env.action_space, spaces.Box):
            env.step(np.clip(np.zeros_like(env.action_space.low), env.action_space.low, env.action_space.high))
    except Exception:
        env.close()
        raise


def flat(env: gym.Env) -> gym.Env:
    """The environment, with Dict and Tuple observations flattened as a policy is shown them."""
    composed = isinstance(env.observation_space, spaces.Dict | spaces.Tuple)
    return gym.wrappers.FlattenObservation(env) if composed else env


def _make(source: str | gym.Env | Callable[[], gym.Env], width: int | None, **kw: Any) -> gym.Env:
    """For a policy that knows observations of this width."""
    if isinstance(source, str):
        if source.startswith("AntMaze") and width == ANTMAZE:
            kw["continuing_task"] = False  # D4RL's ends at the goal
        return make(source, **kw)
    if isinstance(source, gym.Env):
        return source
    env = source()
    if not isinstance(env, gym.Env):
        raise EnvError(
            f"got a {type(env).__name__} from the function that makes environments, expected a gymnasium.Env"
        )
    return env


def _bounds(env: gym.Env, low: Any, high: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    box = env.action_space
    if not isinstance(box, spaces.Box) or box.dtype.kind != "f":
        raise EnvError(f"{name}: the action space is {box}, expected a Box of floating point numbers")
    if (low is None) != (high is None):
        raise EnvError(f"{name}: got one of act_low and act_high, expected both or none")
    ends = []
    for key, given, own in (("act_low", low, box.low), ("act_high", high, box.high)):
        x = np.asarray(own if given is None else given, dtype=np.float32).ravel()
        if x.shape != own.ravel().shape:
            raise EnvError(f"{name}: {key} has {x.size} entries, expected {own.size}, one for each action")
        ends.append(x)
    if not (np.isfinite(ends).all() and (ends[0] < ends[1]).all()):
        got = f"{ends[0].tolist()} .. {ends[1].tolist()}"
        raise EnvError(f"{name}: actions lie in {got}; expected finite bounds, pass act_low and act_high")
    return ends[0], ends[1]


def ask(policy: Policy, rows: np.ndarray, width: int) -> np.ndarray:
    """The policy's actions [n, width] for rows [n, O], float32 both. Raises EnvError for another shape."""
    act: Any = policy(torch.from_numpy(rows))
    act = act.detach().cpu().numpy() if isinstance(act, Tensor) else np.asarray(act)
    if act.shape != (len(rows), width):
        raise EnvError(f"the policy returned actions {list(act.shape)}, expected {[len(rows), width]}")
    return act.astype(np.float32)


def to_env(act: np.ndarray, low: np.ndarray, high: np.ndarray, box: spaces.Space) -> np.ndarray:
    """Actions [n, A] in [-1, 1] in the environment's units and shape, [n, ...], within its bounds."""
    assert isinstance(box, spaces.Box)
    scaled = low + np.float32(0.5) * (act.clip(-1, 1) + np.float32(1)) * (high - low)
    return scaled.reshape(len(act), *box.shape).clip(box.low, box.high).astype(box.dtype)


def _view(space: spaces.Space, width: int | None, name: str) -> Callable[[Any], np.ndarray]:
    """What of an observation a policy sees, [width]. Raises EnvError where nothing of it is so wide."""
    own = spaces.flatdim(space)
    if width in (None, own):
        return lambda obs: flatten_obs(space, obs)
    if isinstance(space, spaces.Dict) and {"observation", "achieved_goal"} <= set(space.spaces):
        for keys in (("observation",), ("achieved_goal", "observation")):
            if sum(spaces.flatdim(space[k]) for k in keys) == width:
                return lambda obs: np.concatenate([flatten_obs(space[k], obs[k]) for k in keys])
    raise EnvError(
        f"{name}: its observations are {own} wide, the policy's are {width}; name the data's own environment"
    )


def flatten_obs(space: spaces.Space, obs: Any) -> np.ndarray:
    """[O] float32: the leaves of an observation side by side, in the order in which the space declares them."""
    if isinstance(space, spaces.Box):
        return np.asarray(obs, dtype=np.float32).ravel()
    if isinstance(space, spaces.Dict):
        return np.concatenate([flatten_obs(s, obs[k]) for k, s in space.spaces.items()])
    if isinstance(space, spaces.Tuple):
        return np.concatenate([flatten_obs(s, x) for s, x in zip(space.spaces, obs, strict=True)])
    if not space.is_np_flattenable:
        raise EnvError(f"observations in the space {space} cannot be flattened to numbers")
    return np.asarray(spaces.flatten(space, obs), dtype=np.float32)
