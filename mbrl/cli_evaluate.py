"""The command `mbrl eval`: a policy that `mbrl offline` or `mbrl online` has learned, in the true simulator."""

import copy
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table

from mbrl import device as devices
from mbrl import offline, online
from mbrl.choices import KNOWN, console
from mbrl.cli_control import KINDS, Online, check_drawn, functions, opened, same_bounds
from mbrl.cli_offline import Offline, check_by, controllers_over, fitted, learned_end, planned_over, scale_of
from mbrl.core import Spec
from mbrl.planner import Over
from mbrl.run import Run, RunError, from_plain
from mbrl.sac import SacConfig


@dataclass(frozen=True)
class Evaluate:
    """Run a trained policy in the true simulator."""

    run: Annotated[Path, tyro.conf.Positional]
    episodes: int = 20
    seed: int = 1_000
    """Of the episodes' initial states; another than training's."""
    env: str | None = None
    """Instead of the run's own."""
    plan: bool = False
    """Plan over the policy in the run's fitted model, and show the gain."""
    plan_by: Literal["loop", "tdmpc"] = "loop"
    """How: LOOP, or TD-MPC2's mixture."""
    over: Over = field(default_factory=Over)
    export: Path | None = None
    """Write the policy as a stable-baselines3 SAC checkpoint; of several seeds the first one's."""
    video: Path | None = None
    """Write an .mp4 or .gif of one episode (MUJOCO_GL=egl where there is no screen); of several seeds the first
    one's."""


def settings_of(run: Run) -> Offline | Online:
    """What a run was started with. Raises RunError for one that learns no policy."""
    arguments = run.config.get("arguments") or {}
    kind = str(arguments.get("_type")).lower()
    if not arguments:
        raise RunError(f"{run.folder}: was made from Python; run its script again, which goes on from it or loads it")
    if kind not in ("offline", "online"):
        raise RunError(
            f"{run.folder}: is of `mbrl {kind}`, which learns no policy; expected `mbrl offline` or `online`"
        )
    return from_plain(arguments, (*KNOWN, Offline) if kind == "offline" else (*KINDS, Online))


def load_agent(run: Run) -> tuple[Any, str]:
    """The trained agent of a run, and the name of what it learned from. Raises RunError where there is none."""
    settings = settings_of(run)
    kept = run.load("agent")
    if kept is None:
        command = type(settings).__name__.lower()
        raise RunError(f"{run.folder}: no trained policy yet; continue it with `mbrl {command} --resume {run.folder}`")
    config = settings.algorithm.agent if isinstance(settings, Offline) else settings.setting.agent
    agent = config.build(Spec(*kept[1]["spec"]), devices.generator(0), seeds=len(settings.seeds))
    agent.load_state_dict(kept[0])
    return agent, run.config["data"]["name"] if isinstance(settings, Offline) else str(settings.env)


def returns_of(run: Run, agent: Any, args: Evaluate) -> dict[str, list[list[float]]]:
    """Undiscounted returns [seeds][episodes] of a run's "policy", its agent, and, with `args.plan`, "planned" over it,
    from the same initial states. Raises RunError where the run names no environment, or there is nothing to plan
    with, EnvError where nothing can be filmed."""
    from mbrl_envs import evaluate as worlds

    check_by(args)
    if args.episodes < 1:
        raise ValueError(f"--episodes: got {args.episodes}, expected at least 1")
    settings = settings_of(run)
    env = args.env or (run.result or {}).get("env") or settings.env
    if env in (None, "none"):
        raise RunError(f"{args.run}: the run names no environment; pass --env")
    if args.video:
        check_drawn(args.video, env, agent.spec.obs)
    bounds = _bounds(run, settings, args)
    evaluate = worlds.evaluator(env, episodes=args.episodes, seed=args.seed, obs=agent.spec.obs, **bounds)
    seeds = settings.seeds
    policies = lambda: [[float(x) for x in evaluate(offline.policy_of(agent, s))] for s in range(len(seeds))]
    if not args.plan:
        return {"policy": policies()}
    if isinstance(settings, Offline):
        own = run.config["data"]["act_low"], run.config["data"]["act_high"]
    else:
        with closing(opened(settings.env)) as world:
            own = world.action_space.low, world.action_space.high
    same_bounds(f"--plan in the model of {args.run}", own, str(env), evaluate.bounds)
    models, ends, dt = _models(run, settings, agent.spec)
    reward, terminal = functions(env, agent.spec.obs, settings.reward)
    ends = [terminal or end for end in ends]
    controls = controllers_over(copy.deepcopy(agent).to(devices.pick()), models, seeds, args, ends, reward, dt)
    return {"policy": policies(), "planned": planned_over(controls, seeds, evaluate)}


def _bounds(run: Run, settings: Offline | Online, args: Evaluate) -> dict[str, Any]:
    """What actions of -1 and 1 mean, where the run's data say so: in their own environment."""
    own = isinstance(settings, Offline) and args.env is None
    return {k: run.config["data"][k] for k in ("act_low", "act_high")} if own else {}


def _models(run: Run, settings: Offline | Online, spec: Spec) -> tuple[list[Any], list[Any], float]:
    """What a run has learned to plan with: the model of each seed, its termination, where it was learned, and the
    interval between steps. Raises RunError where there is none."""
    many, device = len(settings.seeds), devices.pick()  # the run may be from another machine
    if isinstance(settings, Offline):
        if settings.algorithm.imagination is None or not isinstance(settings.algorithm.agent, SacConfig):
            raise RunError(f"--plan: {run.folder} has no model or no critic to plan with; leave --plan out")
        run.shared = Path(run.local["models"]) if run.local.get("models") else None
        settings = replace(settings, device="auto")
        models = [fitted(run, settings, s, spec) for s in settings.seeds]
        return models, [learned_end(run, settings, spec)] * many, run.config["data"].get("dt", 1.0)
    models, ends = online.learned(run, settings.dynamics, spec, many)
    return [model.to(device) for model in models], [end and end.to(device) for end in ends], 1.0


def run_evaluate(args: Evaluate) -> list[list[float]]:
    """The command `mbrl eval`; returns [seeds][episodes]."""
    from mbrl_envs import adapters
    from mbrl_envs import evaluate as worlds

    run = Run.open(args.run)
    agent, source = load_agent(run)
    if args.export:
        adapters.sb3_path(agent, args.export)
    found, settings = returns_of(run, agent, args), settings_of(run)
    result, bounds = run.result or {}, _bounds(run, settings, args)
    own = result.get("env") or settings.env
    env = str(args.env or own)
    scale = (result.get("scale") if env == own else None) or scale_of(env)
    title = f"{env}, {args.episodes} episodes" + (f", {source}" if source != env else "")
    words = Table("seed", "mean return", "std", "min", "max", "score", title=title)
    for what, rows in found.items():
        for seed, row in zip(settings.seeds, rows, strict=True):
            x = torch.tensor(row)
            score = f"{100 * (x.mean() - scale[0]) / (scale[1] - scale[0]):.1f}" if scale else "-"
            cells = (x.mean(), x.std(correction=0), x.min(), x.max())
            name = str(seed) if what == "policy" else f"{seed}, {what}"
            words.add_row(name, *(f"{v:.1f}" for v in cells), score)
    console.print(words)
    of = f" of seed {settings.seeds[0]}" if len(settings.seeds) > 1 else ""
    if args.export:
        path = adapters.to_sb3(agent, env, args.export, **bounds)
        console.print(f"stable-baselines3 checkpoint{of}: {path}")
    if args.video:
        worlds.video(offline.policy_of(agent), env, args.video, obs=agent.spec.obs, **bounds)
        console.print(f"video of one more episode{of}: {args.video}")
    return found["policy"]
