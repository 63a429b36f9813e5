"""What is known of named datasets and tasks: reference scores, evaluation environments, time steps, places of files.

A score is 100 (R - min) / (max - min): 0 is a random policy's return, 100 an expert's. Scales of different simulators
are kept apart: a `-v5` id is answered from measurements of our own (`data/v5_scores.json`) or not at all, and D4RL's
constants serve v5 returns only where a caller names a D4RL id as the scale.
"""

import difflib
import functools
import importlib
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator

V5_FILE = Path(__file__).with_name("data") / "v5_scores.json"
D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"


class DataError(ValueError):
    """Data that cannot be used as they are: says which file and key, what came, what was expected, what to do."""


@dataclass(frozen=True)
class Known:
    """What is known of one dataset id or environment id."""

    id: str
    kind: str  # "D4RL", "NeoRL", "NeoRL-2" or "gymnasium"
    family: str  # the task, whatever its version: "hopper", "door", ...
    scores: tuple[float, float] | None = None  # (min, max) return
    env: str | None = None  # the gymnasium id that evaluates; None where no maintained one exists
    url: str = ""  # of the file, where there is a public one
    endless: bool = False  # the task never ends by itself: whatever marks an end is a boundary of the recording
    dt: float | None = None  # seconds a step
    limit: int | None = None  # steps after which the environment cuts an episode
    bound: float | None = None  # actions lie in [-bound, bound]; None: ask the environment


# Tasks that no observed state ends. D4RL's pen ends when the pen falls, gymnasium-robotics' does not; the other hands
# run to their limit, as does the kitchen but for one in which all is done.
ENDLESS = frozenset(
    {"halfcheetah", "pendulum", "swimmer", "reacher", "pusher", "humanoidstandup", "door", "hammer", "relocate"}
    | {"kitchen", "maze2d", "bullet-halfcheetah", "safetyhalfcheetah"}
)
# Actions lie in [-bound, bound] in every coordinate.
BOUND = {"humanoid": 0.4, "humanoidstandup": 0.4, "pendulum": 2.0, "pusher": 2.0, "invertedpendulum": 3.0}
BOUND |= dict.fromkeys(("hopper", "walker2d", "halfcheetah", "ant", "swimmer", "reacher"), 1.0)
BOUND |= dict.fromkeys(("inverteddoublependulum", "door", "hammer", "relocate", "pen"), 1.0)
# Seconds a step: the simulator's time step times the frame skip.
SECONDS = {
    **{"hopper": 0.008, "walker2d": 0.008, "halfcheetah": 0.05, "ant": 0.05, "pendulum": 0.05, "humanoid": 0.015},
    **{"humanoidstandup": 0.015, "swimmer": 0.04, "pusher": 0.05, "reacher": 0.02, "invertedpendulum": 0.04},
    **{"inverteddoublependulum": 0.05, "door": 0.01, "hammer": 0.01, "relocate": 0.01, "pen": 0.01},
}
# Arguments that change only what is drawn.
DRAWING = frozenset({"render_mode", "width", "height", "camera_id", "camera_name", "default_camera_config"})
DRAWING |= {"max_geom", "visual_options", "screen_size", "render_fps"}
# Adroit's widths (observation, action) tell its tasks apart, so that a renamed file is still read for what it is.
WIDTHS = {(39, 28): "door", (46, 26): "hammer", (39, 30): "relocate", (45, 24): "pen"}

MUJOCO = ("hopper", "halfcheetah", "walker2d", "ant")
MUJOCO_ENV = {"hopper": "Hopper", "halfcheetah": "HalfCheetah", "walker2d": "Walker2d", "ant": "Ant"}
OURS = "mbrl_envs.d4rl:D4RL/"  # and the id: environments that D4RL's own are made of there
ADROIT_ENV = {t: f"AdroitHand{t.capitalize()}-v1" for t in ("pen", "hammer", "relocate", "door")}

# (min, max) of D4RL 1.1, by task. Its v0, v1 and v2 sets of one task share them.
D4RL_SCORES = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
    "door": (-56.512833, 2880.5693087298737),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "minigrid": (0.01442, 2.89685),
    "flow-ring": (-165.22, 24.42),
    "flow-merge": (118.67993, 330.03179),
    "carla-lane": (-0.8503839912088142, 1023.5784385429523),
    "carla-town": (-114.81579500772153, 2440.1772022247314),
    "bullet-halfcheetah": (-1275.766996, 2381.6725),
    "bullet-hopper": (20.058972, 1441.8059623430963),
    "bullet-ant": (373.705955, 2650.495),
    "bullet-walker2d": (16.523877, 1623.6476303317536),
}
MAZE2D_SCORES = {
    "open-v0": (0.01, 20.66),
    "open-dense-v0": (11.17817, 27.166538620695782),
    "umaze-v0": (0.94, 62.6),
    "umaze-dense-v0": (23.249793, 81.78995240126592),
    "umaze-v1": (23.85, 161.86),
    "umaze-dense-v1": (68.537689, 193.66285642381482),
    "medium-v0": (5.77, 85.14),
    "medium-dense-v0": (19.47762, 96.03474232952358),
    "medium-v1": (13.13, 277.39),
    "medium-dense-v1": (44.264742, 297.4552547777125),
    "large-v0": (4.83, 191.99),
    "large-dense-v0": (27.38831, 215.09965671563742),
    "large-v1": (6.7, 273.99),
    "large-dense-v1": (30.569041, 303.4857382709002),
    "eval-umaze-v1": (36.63, 141.4),
    "eval-umaze-dense-v1": (56.95455, 178.21373133248397),
    "eval-medium-v1": (13.07, 204.93),
    "eval-medium-dense-v1": (42.28578, 235.5658957482388),
    "eval-large-v1": (16.4, 302.22),
    "eval-large-dense-v1": (56.95455, 326.09647655082637),
}
BULLET_MAZE_SCORES = {
    "open": (8.75, 64.15),
    "umaze": (32.46, 153.99),
    "medium": (14.87, 238.05),
    "large": (1.82, 285.92),
}
NEORL_SCORES = {"HalfCheetah": (-298.0, 12284.0), "Hopper": (5.0, 3294.0), "Walker2d": (1.0, 5143.0)}
NEORL2_SCORES = {
    "Pipeline": (-296.0, 751.0),
    "Simglucose": (9.75, 475.0),
    "RocketRecovery": (-176.0, 208.0),
    "RandomFrictionHopper": (-3.0, 503.0),
    "DMSD": (30.60, 849.51),
    "Fusion": (-107.601, 98.05),
    "Salespromotion": (357.62, 602.21),
    "SafetyHalfCheetah": (-283.0, 2507.0),
}


# ---------------------------------------------------------------- D4RL's table


@functools.cache
def d4rl_table() -> Mapping[str, Known]:
    """Every id of the table of D4RL 1.1 (and the older maze2d and antmaze versions it registers beside it). An id for
    which D4RL gives a file but no constants (ant-random-expert-v0, carla-town-full-v0) takes those of its task."""
    table: dict[str, Known] = {}

    def add(name: str, path: str, family: str, scores: tuple[float, float], env: str | None, limit: int | None) -> None:
        url, dt = D4RL_URL + path + ".hdf5", SECONDS.get(family)
        # a demonstration ends when the demonstrator is done, whatever the task
        endless = family in ENDLESS or "-human-" in name
        if env == OURS:
            env += name
        table[name] = Known(name, "D4RL", family, scores, env, url, endless, dt, limit, 1.0)

    for task in MUJOCO:
        put = functools.partial(add, family=task, scores=D4RL_SCORES[task], env=MUJOCO_ENV[task] + "-v4", limit=1000)
        for quality in ("random", "medium", "expert", "medium-replay", "medium-expert"):
            file = f"{task}_{quality}".replace("medium-replay", "mixed").replace("walker2d_mixed", "walker_mixed")
            put(f"{task}-{quality}-v0", f"gym_mujoco/{file.replace('-', '_')}")
        for quality in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
            for v in ("v1", "v2"):
                put(f"{task}-{quality}-{v}", f"gym_mujoco_{v}/{task}_{quality.replace('-', '_')}-{v}")
        if task == "ant":
            put("ant-random-expert-v0", "gym_mujoco/ant_random_expert")
    for task in ADROIT_ENV:
        put = functools.partial(
            add, family=task, scores=D4RL_SCORES[task], env=OURS, limit=100 if task == "pen" else 200
        )
        files = {"human": "v0_demos_clipped", "cloned": "demos-v0-bc-combined", "expert": "v0_expert_clipped"}
        for quality, file in files.items():
            put(f"{task}-{quality}-v0", f"hand_dapg/{task}-{file}")
            put(f"{task}-{quality}-v1", f"hand_dapg_v1/{task}-{quality}-v1")
    for name, scores in MAZE2D_SCORES.items():
        maze = name.removeprefix("eval-").split("-")[0]
        kind = name[:-3] if "dense" in name else name[:-3] + "-sparse"
        path = f"maze2d/maze2d-{kind}{'-v1' if name.endswith('v1') else ''}"
        limit = {"open": (150, 150), "umaze": (150, 300), "medium": (250, 600), "large": (600, 800)}[maze][
            int(name[-1])
        ]
        add(f"maze2d-{name}", path, "maze2d", scores, OURS, limit)
    mazes = {"umaze": ("False", "False"), "umaze-diverse": ("True", "True")}
    mazes |= {f"{m}-{k}": ("True", str(k == "diverse")) for m in ("medium", "large") for k in ("play", "diverse")}
    for name, (starts, goals) in mazes.items():
        maze = name.split("-")[0]
        old = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}[maze]
        tail = f"noisy_multistart_{starts}_multigoal_{goals}_sparse"
        put = functools.partial(
            add, family="antmaze", scores=(0.0, 1.0), env=OURS, limit=700 if maze == "umaze" else 1000
        )
        put(f"antmaze-{name}-v0", f"ant_maze_new/Ant_maze_{old}_{tail}")
        put(f"antmaze-{name}-v1", f"ant_maze_v1/Ant_maze_{maze}_{tail}")
        put(f"antmaze-{name}-v2", f"ant_maze_v2/Ant_maze_{old}_{tail}_fixed")
    for quality, file in {
        "complete": "mini_kitchen_microwave_kettle_light_slider",
        "partial": "kitchen_microwave_kettle_light_slider",
        "mixed": "kitchen_microwave_kettle_bottomburner_light",
    }.items():
        add(f"kitchen-{quality}-v0", f"kitchen/{file}-v0", "kitchen", (0.0, 4.0), OURS, 280)
    for tail, file in (("", ""), ("-random", "_random")):
        scores = D4RL_SCORES["minigrid"]
        add(f"minigrid-fourrooms{tail}-v0", f"minigrid/minigrid4rooms{file}", "minigrid", scores, None, None)
    for road in ("ring", "merge"):
        for driver, file in (("random", "random"), ("controller", "idm")):
            family = f"flow-{road}"
            add(f"{family}-{driver}-v0", f"flow/{family}-v0-{file}", family, D4RL_SCORES[family], None, None)
    for name, file in {"lane": "lane_follow_flat", "town": "town_subsamp_flat", "town-full": "town_flat"}.items():
        family = "carla-" + name.split("-")[0]
        add(f"carla-{name}-v0", f"carla/carla_{file}-v0", family, D4RL_SCORES[family], None, None)
    for task in MUJOCO:
        for quality in ("random", "medium", "expert", "medium-expert", "medium-replay"):
            family, file = f"bullet-{task}", quality.replace("-", "_")
            add(f"{family}-{quality}-v0", f"bullet/{family}_{file}", family, D4RL_SCORES[family], None, None)
    for maze, scores in BULLET_MAZE_SCORES.items():
        add(f"bullet-maze2d-{maze}-v0", f"bullet/bullet-maze2d-{maze}-sparse", "bullet-maze2d", scores, None, None)
    return table


# ---------------------------------------------------------------- identification


def v5_scores() -> dict[str, dict[str, Any]]:
    """Our own scale of gymnasium's v5 (and Pendulum) tasks: {env id: {"min", "max", "command"}}, the command being the
    one that measured it. Empty where the file is absent."""
    if not V5_FILE.exists():
        return {}
    whole = lambda v: isinstance(v, dict) and None not in (v.get("min"), v.get("max"))
    return {k: v for k, v in json.loads(V5_FILE.read_text()).items() if whole(v)}


def identify(name: str) -> Known | None:
    """What is known of a dataset id, an environment id, or a data file's stem (a D4RL file carries its id or the base
    name of its URL). None for an unknown name."""
    table = d4rl_table()
    if "{" in name:  # an environment of other arguments than its id's
        return None
    if name in table:
        return table[name]
    if name in _stems():
        return table[_stems()[name]]
    # The observations of NeoRL's MuJoCo tasks include the x position, so they evaluate in an environment of their own.
    if found := re.fullmatch(
        r"(HalfCheetah|Hopper|Walker2d)-v3(-(low|medium|high|expert))?(-\d+)?(-(train|val).*)?", name
    ):
        task = found[1].lower()
        env = f"mbrl_envs.scores:NeoRL/{found[1]}-v3"
        return Known(name, "NeoRL", task, NEORL_SCORES[found[1]], env, "", task in ENDLESS, SECONDS[task], 1000, 1.0)
    if (found := re.fullmatch(r"(\w+?)(-(train|val))?", name)) and found[1] in NEORL2_SCORES:
        family = found[1].lower()
        return Known(name, "NeoRL-2", family, NEORL2_SCORES[found[1]], None, "", family in ENDLESS, bound=1.0)
    if found := re.fullmatch(rf"({'|'.join(MUJOCO)})[-_][a-z_-]+[-_]v5", name):
        known = identify(MUJOCO_ENV[found[1]] + "-v5")
        return None if known is None else replace(known, id=name)
    if found := re.fullmatch(r"(mbrl_envs\.scores:)?NeoRL/(\w+-v3)", name):
        known = identify(found[2])
        return None if known is None else replace(known, id=name)
    if (found := re.fullmatch(r"(mbrl_envs\.d4rl:)?D4RL/(.+)", name)) and found[2] in table:
        known = table[found[2]]
        return replace(known, id=name, endless=known.family in ENDLESS)
    return _environment(name)


@functools.cache
def _stems() -> dict[str, str]:
    """Base name of the URL without its ending -> id, where it names one id only."""
    stems: dict[str, list[str]] = {}
    for name, known in d4rl_table().items():
        stems.setdefault(Path(known.url).stem, []).append(name)
    return {stem: names[0] for stem, names in stems.items() if len(names) == 1}


def _environment(env: str) -> Known | None:
    for task, name in ADROIT_ENV.items():
        if re.fullmatch(name.removesuffix("-v1") + r"(Sparse)?-v\d+", env):
            limit = 100 if task == "pen" else 200
            return Known(env, "gymnasium", task, None, env, "", True, SECONDS[task], limit, 1.0)
    if re.fullmatch(r"FrankaKitchen-v\d+", env):
        return Known(env, "gymnasium", "kitchen", None, env, "", True, None, 280)
    if found := re.fullmatch(r"(PointMaze|AntMaze)_\w+-v\d+", env):
        family = "maze2d" if found[1] == "PointMaze" else "antmaze"
        return Known(env, "gymnasium", family, None, env, "", family in ENDLESS)
    try:
        limit = gymnasium.spec(env).max_episode_steps
    except Exception:  # gymnasium's errors and, for ids it cannot parse or import, others
        return None
    # another namespace stays a part of it: what is called as a task of ours there need not be that
    family = env.rpartition("-v")[0].removeprefix("mbrl_envs/").lower()
    entry = v5_scores().get(env)
    scores = None if entry is None else (float(entry["min"]), float(entry["max"]))
    if scores is None and env == MUJOCO_ENV.get(family, "") + "-v4":
        scores = D4RL_SCORES[family]  # v4 is the simulation in which D4RL's sets are evaluated
    endless, dt, bound = family in ENDLESS, SECONDS.get(family), BOUND.get(family)
    return Known(env, "gymnasium", family, scores, env, "", endless, dt, limit, bound)


def close_matches(name: str, among: Iterable[str]) -> str:
    """ ", did you mean a, b?" or "": the end of an error about an unknown name."""
    lower = {n.lower(): n for n in among}
    found = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=4, cutoff=0.55)]
    return f"; did you mean {', '.join(found)}?" if found else ""


def names() -> list[str]:
    """The ids with reference scores."""
    neorl = [f"{t}-v3-{q}" for t in NEORL_SCORES for q in ("low", "medium", "high")]
    return [*d4rl_table(), *neorl, *NEORL2_SCORES, *v5_scores()]


def _need(name: str) -> Known:
    known = identify(name)
    if known is None:
        known_by_name = [*names(), *(f"{t}-v5" for t in MUJOCO_ENV.values())]
        raise DataError(f"{name!r} is no id of D4RL, NeoRL or gymnasium{close_matches(name, known_by_name)}")
    return known


def evaluation_env(name: str) -> str | None:
    """The gymnasium id in which policies learned from a dataset are evaluated, or None where no maintained environment
    exists (flow, carla, bullet, D4RL's minigrid, NeoRL-2). An environment id is its own answer.

    D4RL's MuJoCo sets evaluate in `-v4`, never `-v5`: the friction of walker2d and the healthy reward differ. Its
    mazes, hands and kitchens are those of `mbrl_envs.d4rl`, the latter two with the extra `[robotics]`. A Minari set
    evaluates in the environment that it states, by `named` where that has arguments of its own. Raises DataError for an
    id that nobody knows."""
    if name.startswith("minari:"):
        return minari_facts(name.removeprefix("minari:"))[0]
    return _need(name).env


def reference_scores(name: str) -> tuple[float, float]:
    """(min, max) return of a dataset id (D4RL, NeoRL, NeoRL-2, `minari:<id>`) or of an environment id. Minari's come
    from the dataset's metadata; `-v5` ids from our own table. Raises DataError where none is known."""
    if name.startswith("minari:"):
        env, scores = minari_facts(name.removeprefix("minari:"))
        if scores is None and env and (known := identify(env)):
            scores = known.scores
    else:
        scores = _need(name).scores
    if scores is None:
        raise DataError(
            f"{name!r} has no reference scores: no trained policy's return was measured for its environment. Name "
            "another id as the scale, such as hopper-medium-v2, and say so beside the number; or measure one: `mbrl "
            "collect --env ID --quality expert ...`, then `python experiments/v5_scores.py --policy ID=<zip>:<steps>`"
        )
    return scores


def minari_facts(name: str) -> tuple[str | None, tuple[float, float] | None]:
    """(evaluation environment, (min, max)) from the metadata of a local Minari dataset; None where it states none."""
    import minari  # imported late: it is slow to load

    try:
        metadata = minari.load_dataset(name).storage.metadata
    except Exception as error:
        raise DataError(f"minari:{name} is not here ({error}); load it once, then ask again") from error
    env, kwargs = minari_spec(metadata)
    return named(env, altered(env, kwargs)) or None, minari_scores(metadata)


def minari_spec(metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(id, arguments) of the environment that a Minari dataset says to evaluate in; ("", {}) where it says none."""
    spec = metadata.get("eval_env_spec") or metadata.get("env_spec")
    stated = json.loads(spec) if isinstance(spec, str) else {}
    return stated.get("id") or "", stated.get("kwargs") or {}


def named(env: str, kwargs: Mapping[str, Any]) -> str:
    """An environment's id with arguments, as `Pendulum-v1{"g": 1.6}`; "" where JSON does not hold them."""
    try:
        return env + (json.dumps(kwargs, sort_keys=True) if kwargs else "")
    except (TypeError, ValueError):
        return ""


def parted(env: str) -> tuple[str, dict[str, Any]]:
    """(id, arguments) of such a name, or of an id alone. Raises DataError for arguments that are no JSON object."""
    name, brace, rest = env.partition("{")
    try:
        return name, json.loads(brace + rest) if brace else {}
    except ValueError as error:
        raise DataError(f'{env}: its arguments are no JSON ({error}); expected as in Pendulum-v1{{"g": 1.6}}') from None


def altered(env: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of a spec's arguments, those with which it is another world than the one that its id makes by itself."""
    if not (kwargs := {k: v for k, v in kwargs.items() if k not in DRAWING}):
        return {}
    if env not in gymnasium.registry:
        with suppress(ImportError):
            robotics()
    try:
        own = gymnasium.spec(env)
        made: Any = own.entry_point if callable(own.entry_point) else load_env_creator(own.entry_point or "")
        usual = {k: p.default for k, p in inspect.signature(made).parameters.items()} | own.kwargs
    except Exception:  # not installed, or not registered: it cannot be made, with or without them
        return {}
    plain = lambda x: json.loads(json.dumps(x, default=repr))
    return {k: v for k, v in kwargs.items() if k not in usual or plain(v) != plain(usual[k])}


def robotics() -> None:
    """Register gymnasium-robotics' environments, such as can be made. Raises ImportError where it is not installed.

    Its kitchen, its Fetch and its hands with goals ask whether a joint's kind, as NumPy holds it, is one of MuJoCo's
    enumeration. To MuJoCo 4 no such number is; where that is so, the module that asks is shown plain numbers."""
    gymnasium.register_envs(importlib.import_module("gymnasium_robotics"))
    with suppress(ImportError, AttributeError, gymnasium.error.Error):  # one that is otherwise made needs none of it
        asks: Any = importlib.import_module("gymnasium_robotics.utils.mujoco_utils")
        kinds = asks.mujoco.mjtJoint
        if kinds.mjJNT_HINGE != np.int32(int(kinds.mjJNT_HINGE)):
            asks.mujoco = _Shown(asks.mujoco, {k: int(v) for k, v in kinds.__members__.items()})


class _Shown:
    """MuJoCo, with the kinds of joints in plain numbers."""

    def __init__(self, module: Any, kinds: Mapping[str, int]) -> None:
        self.module, self.mjtJoint = module, SimpleNamespace(**kinds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def minari_scores(metadata: Mapping[str, Any]) -> tuple[float, float] | None:
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return None if low is None or high is None else (float(low), float(high))


# ---------------------------------------------------------------- scores


def _pair(scale: str | tuple[float, float]) -> tuple[float, float]:
    low, high = reference_scores(scale) if isinstance(scale, str) else map(float, scale)
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        raise DataError(f"reference scores ({low}, {high}) are no scale: expected finite numbers, min < max")
    return low, high


def normalized_score(scale: str | tuple[float, float], returns: Any) -> Any:
    """100 (R - min) / (max - min) for a number, array or tensor of returns. scale: an id, or (min, max)."""
    low, high = _pair(scale)
    returns = np.asarray(returns) if isinstance(returns, list | tuple) else returns
    return (returns - low) * (100.0 / (high - low))


def score_scale(scale: str | tuple[float, float]) -> float:
    """Points of normalised score per unit of return, 100 / (max - min). A standard deviation or a difference of returns
    becomes one of scores by this factor alone: it has no offset to subtract, unlike a return."""
    low, high = _pair(scale)
    return 100.0 / (high - low)


# NeoRL's observations hold the x position. "mbrl_envs.scores:NeoRL/Hopper-v3" makes gymnasium import this module first.
for _task, _entry in {"HalfCheetah": "half_cheetah_v4", "Hopper": "hopper_v4", "Walker2d": "walker2d_v4"}.items():
    if f"NeoRL/{_task}-v3" not in gymnasium.registry:
        gymnasium.register(
            f"NeoRL/{_task}-v3",
            entry_point=f"gymnasium.envs.mujoco.{_entry}:{_task}Env",
            max_episode_steps=1000,
            kwargs={"exclude_current_positions_from_observation": False},
        )
