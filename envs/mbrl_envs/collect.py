"""Data sets of known provenance: behaviour policies of a stated quality, written as D4RL-format HDF5.

    random         uniform actions within the bounds.
    expert         SAC after `train_steps` steps.
    medium         SAC stopped at the first evaluation whose mean return reaches the target: `target_return`, else a
                   third of the way from the random to the best score in `data/v5_scores.json`.
    medium-replay  what SAC saw while it was trained up to that target: its transitions in order, episodes whole.
                   Of more than `steps` transitions, episodes spread evenly over the training are kept; where one
                   learner saw fewer, further learners (own seeds) are trained likewise until `steps` are there.

SAC is stable-baselines3's with its defaults (MlpPolicy, two layers of 256), evaluated every `eval_every` steps by
`eval_episodes` episodes of its mean action. Medium and expert data are drawn from its stochastic policy, as D4RL's are;
`deterministic` takes the mean action instead, and `noise` adds Gaussian noise (in units of half the action range).

The file holds exactly `steps` rows: observations, actions (the environment's units), rewards, next_observations in
float32, terminals and timeouts in bool. A terminal row ended the task. A timeout row ended its episode otherwise: by
the environment's time limit, or because training or collection stopped there; a row is never both. With `compact`,
next_observations gives way to final_observations [episodes, O], what followed each episode's last row; every other
row is followed by the next one. Root attributes say how the file came about. The same config, on the same versions
of python, torch, numpy, gymnasium, mujoco and h5py and the same kind of processor, writes the same bytes.
"""

import json
import os
import platform
import random
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import gymnasium as gym
import h5py
import numpy as np
import torch
from gymnasium import spaces

from mbrl_envs import evaluate as evaluators
from mbrl_envs.scores import parted

Quality = Literal["random", "medium", "medium-replay", "expert"]
Progress = Callable[[int, int | None, dict[str, float]], None]
SCORES = Path(__file__).parent / "data" / "v5_scores.json"
TRAINING = {"train_steps", "width", "eval_every", "eval_episodes"}
ACTING = {"deterministic", "noise"}
UNREAD = {
    "random": TRAINING | ACTING | {"target_return"},
    "medium": set(),
    "medium-replay": ACTING,
    "expert": {"target_return"},
}
PACKAGES = ("mbrl-suite", "gymnasium", "mujoco", "stable-baselines3", "torch", "numpy", "h5py")


@dataclass(frozen=True)
class CollectConfig:
    """Collect transitions of a stated quality as a D4RL-format HDF5 file, and as a Minari dataset on request.

    random: uniform actions. expert: SAC after --train-steps. medium: SAC stopped at --target-return, a third of the way
    to the expert by default. medium-replay: what SAC saw on the way there."""

    env: str
    """gymnasium id with a bounded Box action space; my_module:Mine-v0 where a module registers it"""
    quality: Quality = "random"
    steps: int = 10_000
    """rows of the file"""
    out: Path | None = None
    """the file; <env>-<quality>.hdf5 by default"""
    seed: int = 0
    overwrite: bool = False
    compact: bool = False
    """store final_observations instead of next_observations"""
    compression: int = 9
    """gzip level, 0 to 9; 0 stores plain arrays"""
    minari: bool = False
    """also create the Minari dataset mbrl/<env>/<quality>-v0"""
    policy: Path | None = None
    """a saved stable-baselines3 SAC policy to use for medium or expert, instead of training one"""
    train_steps: int = 100_000
    """expert: the steps of training; medium and medium-replay: the most that a learner may take to its target"""
    target_return: float | None = None
    """the return at which training stops for medium and medium-replay"""
    width: int = 256
    """units of SAC's two hidden layers"""
    eval_every: int = 500
    """steps of training between evaluations"""
    eval_episodes: int = 10
    deterministic: bool = False
    """take SAC's mean action"""
    noise: float = 0.0
    """standard deviation of Gaussian noise on SAC's actions, where the action range is [-1, 1]"""
    threads: int = 1
    """of torch, while SAC is trained; the bytes depend on it"""
    runs: Path = Path("runs/collect")
    """folder for the trained policies"""


class CollectError(ValueError):
    """A data set that cannot be collected as asked."""


class Steps(NamedTuple):
    """Consecutive steps of whole episodes; the last row of each episode is terminal or a timeout."""

    obs: np.ndarray  # [N, O]
    act: np.ndarray  # [N, A] in the environment's units
    reward: np.ndarray  # [N]
    next_obs: np.ndarray  # [N, O]
    terminal: np.ndarray  # [N] bool
    timeout: np.ndarray  # [N] bool

    def ends(self) -> np.ndarray:
        """[E]: one past each episode's last row."""
        return np.flatnonzero(self.terminal | self.timeout) + 1

    def returns(self) -> np.ndarray:
        """[E], those of episodes that were cut short included."""
        ends = self.ends()
        return np.array([self.reward[a:b].sum() for a, b in zip([0, *ends[:-1]], ends, strict=True)])

    def head(self, n: int) -> "Steps":
        """The first n rows; an episode cut by that ends with a timeout."""
        cut = Steps(*(x[:n].copy() for x in self))
        cut.timeout[-1] |= not cut.terminal[-1]
        return cut


class Recorder(gym.Wrapper):
    """Keeps every step that the environment takes."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.rows: list[tuple] = []

    def reset(self, **kw: Any) -> tuple[Any, dict]:
        obs, info = self.env.reset(**kw)
        self.last = np.array(obs)  # the environment may write on its own
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        obs, reward, terminal, timeout, info = self.env.step(action)
        row = (self.last, action, reward, obs, terminal, timeout and not terminal)
        self.rows.append(tuple(np.array(x) for x in row))
        self.last = self.rows[-1][3]
        return obs, reward, terminal, timeout, info

    def steps(self) -> Steps:
        every = Steps(*(np.stack(x) for x in zip(*self.rows, strict=True)))
        return every.head(len(every.reward))


# ---------------------------------------------------------------- policies


class Actor:
    """The actor of a stable-baselines3 SAC policy (ReLU layers, squashed Gaussian), from its state_dict."""

    def __init__(self, state: dict[str, torch.Tensor], low: np.ndarray, high: np.ndarray) -> None:
        get = lambda name: tuple(state[f"actor.{name}.{k}"].cpu().numpy() for k in ("weight", "bias"))
        numbers = sorted(int(m[1]) for m in (re.fullmatch(r"actor\.latent_pi\.(\d+)\.weight", k) for k in state) if m)
        self.layers = [get(f"latent_pi.{i}") for i in numbers]
        self.mu, self.log_std = get("mu"), get("log_std")
        self.low, self.high = low, high
        self.obs = self.layers[0][0].shape[1] if self.layers else self.mu[0].shape[1]

    def __call__(self, obs: np.ndarray, noise: np.ndarray | None = None, extra: np.ndarray | float = 0.0) -> np.ndarray:
        """obs [O], standard normal noise [A] (None: the mean action) -> the action [A] in the environment's units."""
        x = obs.astype(np.float32)
        for w, b in self.layers:
            x = np.maximum(w @ x + b, 0)
        act = self.mu[0] @ x + self.mu[1]
        if noise is not None:
            act = act + np.exp(np.clip(self.log_std[0] @ x + self.log_std[1], -20, 2)) * noise
        act = np.clip(np.tanh(act) + extra, -1, 1)
        return (self.low + (act + 1) / 2 * (self.high - self.low)).astype(np.float32)


def make(env_id: str) -> gym.Env:
    """The environment with flat observations; CollectError where it cannot be had."""
    try:
        env = evaluators.make(env_id)
    except evaluators.EnvError as error:
        why = error.__cause__ or error
        raise CollectError(
            f"collect: no environment {env_id!r}: {why}. Give an id that gymnasium.make accepts"
        ) from None
    act, obs = env.action_space, env.observation_space
    if not isinstance(act, spaces.Box) or len(act.shape) != 1 or not act.is_bounded():
        raise CollectError(f"collect: {env_id} has actions {act}, expected a Box of one axis with finite bounds")
    if isinstance(obs, spaces.Box) and len(obs.shape) == 1:
        return env
    if not obs.is_np_flattenable:
        raise CollectError(f"collect: {env_id} has observations {obs}, expected a space that flattens to a vector")
    return gym.wrappers.FlattenObservation(env)


def bounds(env: gym.Env) -> tuple[np.ndarray, np.ndarray]:
    space = env.action_space
    assert isinstance(space, spaces.Box)
    return space.low.astype(np.float32), space.high.astype(np.float32)


def seeds(seed: int, *path: int) -> int:
    """A seed of its own for each use."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])


def evaluate(env: gym.Env, policy: Callable[[np.ndarray], np.ndarray], episodes: int, seed: int) -> np.ndarray:
    """Returns [episodes]. Raises CollectError for an episode without an end."""
    totals = np.zeros(episodes)
    for i in range(episodes):
        obs, _ = env.reset(seed=seed if i == 0 else None)
        done, steps = False, 0
        while not done:
            obs, reward, terminal, timeout, _ = env.step(policy(obs))
            totals[i] += float(reward)
            done, steps = terminal or timeout, steps + 1
            if steps >= evaluators.ENDLESS and not done and env.spec is not None and env.spec.max_episode_steps is None:
                raise CollectError(
                    f"collect: an episode of {env.spec.id} took {steps} steps and the environment states no limit; "
                    "register it with max_episode_steps"
                )
    return totals


def uniform(env: gym.Env, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    low, high = bounds(env)
    rng = np.random.default_rng(seed)
    return lambda obs: rng.uniform(low, high).astype(np.float32)


@contextmanager
def own_randomness(threads: int) -> Iterator[None]:
    """stable-baselines3 seeds and draws from the process's generators: give them back as they were."""
    count, python, numpy = torch.get_num_threads(), random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(count)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def train(
    config: CollectConfig, learner: int, target: float | None, most: int, path: Path, progress: Progress | None
) -> tuple[Actor, Steps, list[tuple[int, float]]]:
    """SAC number `learner` of this seed, trained for `most` steps or until an evaluation reaches the target; saved at
    `path` as stable-baselines3 saves it. Returns its actor, all that it saw, and [(step, mean return)]."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger

    curve: list[tuple[int, float]] = []
    env, test = Recorder(make(config.env)), make(config.env)
    low, high = bounds(env)

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps % config.eval_every and self.num_timesteps != most:
                return True
            actor = Actor(self.model.policy.state_dict(), low, high)
            mean = float(evaluate(test, actor, config.eval_episodes, seeds(config.seed, 1)).mean())
            curve.append((self.num_timesteps, mean))
            if progress:
                progress(self.num_timesteps, most, {"return": mean, "learner": float(learner)})
            return target is None or mean < target

    with own_randomness(config.threads):
        layers = {"net_arch": [config.width] * 2}
        own = seeds(config.seed, 0, learner)
        model = SAC("MlpPolicy", env, buffer_size=most, policy_kwargs=layers, seed=own, device="cpu")
        model.set_logger(Logger(None, []))  # its own makes a folder among the system's temporary ones
        model.learn(most, callback=Watch())
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as tmp, open(tmp, "wb") as f:
            model.save(f)
    actor = Actor({k: v.clone() for k, v in model.policy.state_dict().items()}, low, high)
    steps = env.steps()
    env.close()
    test.close()
    return actor, steps, curve


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it at the end; removed on an error or an interrupt."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


# ---------------------------------------------------------------- collecting


def collect(config: CollectConfig, progress: Progress | None = None) -> Path:
    """Collect the data set and write it; returns the file's path. Nothing is left of a file that was not finished.

    progress(done, total, figures) is called at each evaluation in training, with the mean "return" and the number of
    the "learner", and about a hundred times while a policy acts, with the mean "return" of the episodes so far. Raises
    CollectError for a config that cannot be carried out."""
    out = config.out or Path(f"{_plain(config.env)}-{config.quality}.hdf5")
    _check(config, out)
    attrs = _about(config)
    if config.quality == "random":
        steps = act(config, None, progress)
    elif config.quality == "medium-replay":
        steps = _replay(config, attrs, progress)
    else:
        actor = _load(config, config.policy, attrs) if config.policy else _teach(config, attrs, progress)
        steps = act(config, actor, progress)
    returns = steps.returns()
    attrs |= {"episodes": len(returns), "return_mean": float(returns.mean()), "return_max": float(returns.max())}
    attrs |= {"return_min": float(returns.min()), "terminated": int(steps.terminal.sum())}
    with atomic(out) as tmp:
        write(tmp, steps, attrs, config)
        if config.minari:
            to_minari(config, steps, attrs)
    return out


def act(config: CollectConfig, actor: Actor | None, progress: Progress | None) -> Steps:
    """`steps` steps of an actor in the environment, or of uniform actions."""
    env = Recorder(make(config.env))
    low, _ = bounds(env)
    rng = np.random.default_rng(seeds(config.seed, 2))
    anything = uniform(env, seeds(config.seed, 3))

    def policy(obs: np.ndarray) -> np.ndarray:
        if actor is None:
            return anything(obs)
        draw, extra = rng.standard_normal((2, len(low)), dtype=np.float32)
        return actor(obs, None if config.deterministic else draw, config.noise * extra)

    every, done, total, ended = max(1, config.steps // 100), True, 0.0, []
    for i in range(config.steps):
        if done:
            obs, _ = env.reset(seed=seeds(config.seed, 4) if i == 0 else None)
        obs, reward, terminal, timeout, _ = env.step(policy(obs))
        total += float(reward)
        done = terminal or timeout
        if done:
            ended.append(total)
            total = 0.0
        if progress and ((i + 1) % every == 0 or i + 1 == config.steps):
            progress(i + 1, config.steps, {"return": float(np.mean(ended))} if ended else {})
    env.close()
    return env.steps()


def measure(env_id: str, episodes: int, seed: int, actor: Actor | None = None) -> np.ndarray:
    """Returns [episodes] of an actor's mean action, or of uniform actions: what reference scores are made of."""
    env = make(env_id)
    returns = evaluate(env, actor or uniform(env, seeds(seed, 3)), episodes, seeds(seed, 5))
    env.close()
    return returns


def _teach(config: CollectConfig, attrs: dict[str, Any], progress: Progress | None) -> Actor:
    target = _target(config) if config.quality == "medium" else None
    path = _checkpoint(config, 0)
    actor, _, curve = train(config, 0, target, config.train_steps, path, progress)
    _reached(config, target, curve)
    attrs |= {"policy_steps": curve[-1][0], "policy_return": curve[-1][1]}
    attrs |= {} if target is None else {"target_return": target}
    return actor


def _replay(config: CollectConfig, attrs: dict[str, Any], progress: Progress | None) -> Steps:
    target, seen, last, learner = _target(config), 0, (0, 0.0), 0
    runs: list[Steps] = []
    while seen < config.steps:
        # a further learner need not go on once there are enough rows: those that follow would be cut
        most = config.train_steps if learner == 0 else min(config.train_steps, config.steps - seen)
        _, steps, curve = train(config, learner, target, most, _checkpoint(config, learner), progress)
        if most == config.train_steps:
            _reached(config, target, curve)
        if learner == 0:
            last = curve[-1]
        runs.append(steps)
        seen += len(steps.reward)
        learner += 1
    attrs |= {"policy_steps": last[0], "policy_return": last[1], "target_return": target, "learners": learner}
    every = Steps(*(np.concatenate(x) for x in zip(*runs, strict=True)))
    return spread(every, config.steps)


def spread(steps: Steps, n: int) -> Steps:
    """n rows in order: whole episodes spread evenly over `steps`, the last one cut where it does not fit."""
    kept, rows, start = 0, [], 0
    for end in steps.ends():
        if kept * len(steps.reward) < n * int(end):
            rows.append(np.arange(start, end))
            kept += int(end) - start
        start = int(end)
    index = np.concatenate(rows)
    return Steps(*(x[index] for x in steps)).head(n)


def _scores(env_id: str) -> dict[str, Any]:
    """What `data/v5_scores.json` says of an environment."""
    return (json.loads(SCORES.read_text()) if SCORES.exists() else {}).get(env_id) or {}


def _target(config: CollectConfig) -> float:
    """What medium means here."""
    if config.target_return is not None:
        return config.target_return
    entry = _scores(config.env)
    if entry.get("min") is None or entry.get("max") is None:
        raise CollectError(
            f"collect: {SCORES.name} has no best score of {config.env}, so a third of the way to it is unknown; "
            "say at which return training stops: --target-return"
        )
    return entry["min"] + (entry["max"] - entry["min"]) / 3


def _reached(config: CollectConfig, target: float | None, curve: list[tuple[int, float]]) -> None:
    if target is not None and curve[-1][1] < target:
        best = max(mean for _, mean in curve)
        raise CollectError(
            f"collect: in {curve[-1][0]} steps of training SAC reached a return of {best:.6g}, expected {target:.6g}; "
            "raise --train-steps or lower --target-return"
        )


def _plain(env: str) -> str:
    """An id, of what names of files are made of."""
    return re.sub(r"[^\w.+-]+", "-", env).strip("-")


def _checkpoint(config: CollectConfig, learner: int) -> Path:
    return config.runs / f"{_plain(config.env)}-{config.quality}-seed{config.seed}-learner{learner}.zip"


def _load(config: CollectConfig, path: Path, attrs: dict[str, Any]) -> Actor:
    actor = load_actor(path, config.env)
    attrs["policy_sha256"] = sha256(path.read_bytes()).hexdigest()
    return actor


def load_actor(path: Path, env_id: str) -> Actor:
    """The actor of a stable-baselines3 SAC checkpoint; only its tensors are read, nothing is unpickled. Raises
    CollectError for one that is not of plain ReLU layers, or does not fit the environment."""
    from mbrl_envs import adapters  # late: stable-baselines3 is slow to load

    env = make(env_id)
    low, high = bounds(env)
    width = spaces.flatdim(env.observation_space)
    env.close()
    if not path.is_file():
        raise CollectError(f"collect: no policy {path}; it is written by an earlier collect under --runs")
    try:
        data, state, _ = adapters.read_checkpoint(path)
        adapters.check_kind(path, data, state)
        actor = Actor(state, low, high)
    except adapters.AdapterError as e:
        raise CollectError(f"collect: {e}") from None
    except KeyError as e:
        raise CollectError(f"collect: {path} lacks {e}, expected stable-baselines3's SAC with an MlpPolicy") from None
    if (actor.obs, len(actor.mu[1])) != (width, len(low)):
        raise CollectError(
            f"collect: {path} maps {actor.obs} observations to {len(actor.mu[1])} actions, expected {width} to "
            f"{len(low)} as in {env_id}"
        )
    return actor


# ---------------------------------------------------------------- checks and files


def _check(config: CollectConfig, out: Path) -> None:
    say = lambda name, got, expected: CollectError(f"collect: {name} is {got}, expected {expected}")
    if config.quality not in get_args(Quality):
        raise say("--quality", repr(config.quality), f"one of {', '.join(get_args(Quality))}")
    for name in ("steps", "train_steps", "eval_every", "eval_episodes", "threads", "width"):
        if getattr(config, name) < 1:
            raise say("--" + name.replace("_", "-"), getattr(config, name), "at least 1")
    if config.seed < 0:
        raise say("--seed", config.seed, "at least 0")
    if not 0 <= config.compression <= 9:
        raise say("--compression", config.compression, "0 to 9")
    if not (np.isfinite(config.noise) and config.noise >= 0):
        raise say("--noise", config.noise, "a finite number, at least 0")
    if config.target_return is not None and not np.isfinite(config.target_return):
        raise say("--target-return", config.target_return, "a finite number")
    if config.policy and config.quality not in ("medium", "expert"):
        raise say("--quality", config.quality, "medium or expert where --policy is given")
    unread = UNREAD[config.quality] | (TRAINING | {"target_return"} if config.policy else set())
    for f in fields(config):
        if f.name in unread and getattr(config, f.name) != f.default:
            reader = f"--quality {config.quality}" + (" with --policy" if config.policy else "")
            raise CollectError(
                f"collect: --{f.name.replace('_', '-')} is {getattr(config, f.name)}, which {reader} does not read; "
                "leave it out"
            )
    if out.is_dir() or (out.exists() and not config.overwrite):
        raise CollectError(f"collect: {out} exists already; choose another --out, or pass --overwrite")
    env = make(config.env)
    env.close()
    if config.quality == "medium-replay" or (config.quality == "medium" and not config.policy):
        _target(config)
    if config.minari:
        folder = minari_folder(config)
        if folder.exists() and not config.overwrite:
            raise CollectError(f"collect: the Minari dataset {minari_id(config)} exists already; pass --overwrite")
        try:
            env.spec.to_json() if env.spec else None
        except ValueError as e:
            raise CollectError(f"collect: {config.env} cannot be stored with a Minari dataset: {e}") from None
    trained = config.quality != "random" and not config.policy
    for name, folder in {"out": out.parent, **({"runs": config.runs} if trained else {})}.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as e:
            raise CollectError(
                f"collect: nothing can be written to {folder} ({e.strerror}), expected a folder; pass another --{name}"
            ) from None


def command(config: CollectConfig) -> str:
    """The command line that writes the same bytes: without what says where, not what."""
    if config.quality in ("medium", "medium-replay") and not config.policy:
        config = replace(config, target_return=_target(config))  # the table of scores may change
    words = ["mbrl collect"]
    for f in fields(config):
        value = getattr(config, f.name)
        always = f.name in ("env", "quality", "steps", "seed")
        if f.name in ("out", "overwrite", "runs", "minari") or (value == f.default and not always):
            continue
        flag = "--" + f.name.replace("_", "-")
        value = Path(value).name if isinstance(value, Path) else value
        words.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    return " ".join(words)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _about(config: CollectConfig) -> dict[str, Any]:
    env = make(config.env)
    low, high = bounds(env)
    dt = getattr(env.unwrapped, "dt", None)
    env.close()
    about = {"env_id": config.env, "quality": config.quality, "seed": config.seed, "action_low": low}
    about |= {"action_high": high, "command": command(config), "versions": json.dumps(versions())}
    about["algorithm"] = "uniform actions" if config.quality == "random" else "SAC (stable-baselines3)"
    about["license"] = "Apache-2.0"
    return about | ({"dt": float(dt)} if isinstance(dt, float | int) else {})


def write(path: Path, steps: Steps, attrs: dict[str, Any], config: CollectConfig) -> None:
    """The HDF5 file. It holds no times, so its bytes depend on the contents alone."""
    columns = {"observations": steps.obs, "actions": steps.act, "rewards": steps.reward}
    columns |= {"terminals": steps.terminal, "timeouts": steps.timeout}
    if config.compact:
        columns["final_observations"] = steps.next_obs[steps.ends() - 1]
    else:
        columns["next_observations"] = steps.next_obs
    pack = {"compression": "gzip", "compression_opts": config.compression, "shuffle": True}
    with h5py.File(path, "w", track_order=False) as f:
        for name, x in columns.items():
            x = x if x.dtype == bool else x.astype(np.float32)
            f.create_dataset(name, data=x, track_times=False, **(pack if config.compression else {}))
        for name, value in attrs.items():
            f.attrs[name] = value


def minari_id(config: CollectConfig) -> str:
    name, brace, own = config.env.partition("{")
    place = name.replace(":", "/") + re.sub(r"\W+", "-", brace + own).rstrip("-")
    return f"mbrl/{place}/{config.quality}-v0"


def minari_folder(config: CollectConfig) -> Path:
    from minari.storage import get_dataset_path

    return Path(get_dataset_path(minari_id(config)))


def to_minari(config: CollectConfig, steps: Steps, attrs: dict[str, Any]) -> None:
    """The same steps as a Minari dataset, in the environment's own precision and observation space. (Minari's
    DataCollector would make the same of them, but it needs jax.)"""
    import minari
    from minari.data_collector import EpisodeBuffer

    def shape(flat: np.ndarray) -> Any:
        if isinstance(space, spaces.Box) and len(space.shape) == 1:
            return flat.astype(space.dtype)
        every = [spaces.unflatten(space, x) for x in flat]
        return _stack(every)

    name, own = parted(config.env)
    env = gym.make(name, **own)
    space, dtype = env.observation_space, env.action_space.dtype
    folder, entry = minari_folder(config), _scores(config.env)
    low, high = entry.get("min"), entry.get("max")
    episodes, start = [], 0
    for end in steps.ends():
        at = slice(start, end)
        obs = shape(np.concatenate([steps.obs[at], steps.next_obs[end - 1 : end]]))
        columns = list(steps.act[at].astype(dtype)), list(steps.reward[at].astype(float))
        flags = list(steps.terminal[at]), list(steps.timeout[at])
        episodes.append(EpisodeBuffer(len(episodes), None, None, obs, *columns, *flags, None))
        start = end
    if folder.exists():
        minari.delete_dataset(minari_id(config))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)  # of optional fields that are not given
            minari.create_dataset_from_buffers(
                minari_id(config),
                episodes,
                env=env,
                algorithm_name=str(attrs["algorithm"]),
                author="mbrl-suite",
                description=f"Made by: {attrs['command']}. Versions: {attrs['versions']}",
                ref_min_score=None if high is None else low,  # both or neither
                ref_max_score=high,
            )
    except BaseException:  # an interrupt too
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        env.close()


def _stack(rows: list[Any]) -> Any:
    """A list of nested observations as nested arrays over time."""
    if isinstance(rows[0], dict):
        return {k: _stack([row[k] for row in rows]) for k in rows[0]}
    if isinstance(rows[0], tuple):
        return tuple(_stack(list(x)) for x in zip(*rows, strict=True))
    return np.stack(rows)
