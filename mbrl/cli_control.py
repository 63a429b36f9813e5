"""The commands that drive an environment: `mbrl plan` (PETS, or planning with a model that is there) and `mbrl online`
(MBPO)."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from mbrl import cli_meta, mpc, online
from mbrl import device as devices
from mbrl.border import World, episode_seed, spec_of
from mbrl.choices import KNOWN, LEARNERS, Learner, Search, console, only_its_own
from mbrl.core import Spec
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.fit import FitConfig
from mbrl.mpc import Adapting, ByValue, Mpc, PetsConfig
from mbrl.planner import ICEM, PRESETS, Worth
from mbrl.run import Run, RunError, from_plain, machine, save_figure, to_plain, versions, write_json

KINDS = (*KNOWN, online.OnlineConfig, online.Horizon)


@dataclass(frozen=True)
class Driving:
    """What the two commands have in common."""

    env: str | None = None
    """A gymnasium id."""
    resume: Path | None = None
    """Continue this run folder after the last episode that it saved, to the same numbers and by its own settings:
    what is given beside and differs from them is refused, but for --threads and --quiet."""
    out: Path | None = None
    """The run folder; runs/<env>/<command>-<seed> by default."""
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 is torch's own choice."""
    quiet: bool = False


@dataclass(frozen=True)
class Plan(Driving):
    """Control an environment by planning: learn its model on the way (PETS), or plan with one that is there."""

    seed: int | None = None
    """Drawn, and recorded, where none is given."""
    model: str | None = None
    """Plan with this instead of learning: the folder of a finished `mbrl plan`; of a finished `mbrl meta`, whose
    context then follows each episode; or "true", the simulator itself."""
    random: int = 1
    """Episodes of random actions at first."""
    episodes: int = 10
    """Episodes under the planner."""
    reward: Literal["task", "learned"] = "task"
    """The task's own reward where it is known (else, or with "learned", the learner's head)."""
    worth: Worth = field(default_factory=lambda: Worth(particles=5))
    fitting: FitConfig = field(default_factory=lambda: PetsConfig().fitting)
    video: Path | None = None
    """Write an .mp4 or .gif of one more episode (MUJOCO_GL=egl where there is no screen)."""
    planner: Search = ICEM  # pyright: ignore[reportInvalidTypeForm]
    """How to search; its settings follow its name."""
    dynamics: Learner = field(default_factory=lambda: EnsembleConfig(members=5, uncertainty=()))  # pyright: ignore[reportInvalidTypeForm]
    """The model of the world; its settings follow its name."""


@dataclass(frozen=True)
class Online(Driving):
    """Learn a policy in an environment through a model of it (MBPO)."""

    seeds: tuple[int, ...] = ()
    """Several learn side by side, each in an environment of its own. One is drawn, and recorded, where none is
    given."""
    steps: int | None = None
    """Of the environment, instead of the setting's own number."""
    episodes: int = 10
    """Episodes an evaluation."""
    reward: Literal["learned", "task"] = "learned"
    setting: online.OnlineConfig = field(default_factory=online.OnlineConfig)
    fitting: FitConfig = field(default_factory=FitConfig)
    dynamics: Learner = field(default_factory=EnsembleConfig)  # pyright: ignore[reportInvalidTypeForm]
    """The model of the world; its settings follow its name."""


# ---------------------------------------------------------------- what is known of an environment


def opened(env_id: str | None) -> Any:
    """The environment. Raises ValueError for a name that is none."""
    from mbrl_envs import evaluate as worlds

    if env_id is None:
        raise ValueError("--env is missing; expected a gymnasium id, e.g. Pendulum-v1")
    return worlds.make(env_id)


def functions(env_id: str, obs: int, reward: str) -> tuple[Any, Any]:
    """(reward, terminal) of the task, each None where it is not known; the reward also where it is to be learned."""
    from mbrl_envs import tasks

    try:
        task = tasks.task(env_id, obs)
    except ValueError:  # a variant with other observations: what it lacks is learned
        task = None
    return (task.reward if task and reward == "task" else None), (task.terminal if task else None)


def truth(env_id: str, env: Any, planner: Any, worth: Worth, seed: int) -> Any:
    """A controller that plans in the simulator itself."""
    from mbrl_envs import control
    from mbrl_envs.simulator import Simulator

    stream = devices.generator(seed)
    if env_id in control.TRUTHS:
        _, terminal = functions(env_id, spec_of(env).obs, "task")
        one = replace(worth, particles=1)
        return Mpc(planner, one, control.TRUTHS[env_id](), generator=stream, terminal=terminal)
    if worth.limit < math.inf or worth.pessimism:
        raise ValueError(
            f"--worth: got limit {worth.limit} and pessimism {worth.pessimism}, and the true simulator is not "
            "uncertain; leave both out"
        )
    simulator = Simulator(env)
    width = env.action_space.shape[0]

    def value(acts: torch.Tensor) -> torch.Tensor:
        return simulator.value(acts[0], worth.discount)[None]

    return ByValue(planner, value, width, stream)


# ---------------------------------------------------------------- mbrl plan


def run_plan(args: Plan) -> Run:
    """The command `mbrl plan`; returns the finished run."""
    run, args = _begin(args, Plan, "plan", _check_plan)
    assert args.env is not None
    assert args.seed is not None
    device = devices.pick(args.device)
    env = opened(args.env)
    try:
        reward, terminal = functions(args.env, spec_of(env).obs, args.reward)
        began = time.perf_counter()
        config = PetsConfig(args.planner, args.worth, args.random, args.episodes, args.fitting)
        with run:
            if args.model is None:
                result = mpc.pets(
                    config, env, args.dynamics, seed=args.seed, record=run, reward=reward, terminal=terminal,
                    device=device,
                )  # fmt: skip
                returns, controller = result.returns, result.mpc
            else:
                controller = _given(args, env, reward, terminal, device)
                returns = _driven(args, env, controller, run, device)
            wall = time.perf_counter() - began
            last = torch.tensor([r for _, r in returns[-max(1, min(10, args.episodes)) :]])
            out = {
                "env": args.env, "seed": args.seed, "model": args.model or type(args.dynamics).__name__,
                "planner": to_plain(args.planner), "returns": returns, "last10": last.mean().item(),
                "steps": returns[-1][0], "wall_s": round(wall, 1), **machine(), "versions": versions(),
            }  # fmt: skip
            random = args.random * (not args.model)
            draw(run.folder / "report.png", f"{args.env}, seed {args.seed}", {args.seed: returns}, random)
            write_json(run.folder / "result.json", out)
        if not args.quiet:
            words = Table("episode", "environment steps", "return", title=f"{args.env}, planning")
            for i, (n, r) in enumerate(returns):
                words.add_row(f"{i + 1}{' (random)' if not args.model and i < args.random else ''}", str(n), f"{r:.1f}")
            console.print(words)
            console.print(f"{wall:.0f} s; figure: {run.folder / 'report.png'}")
        if args.video:
            _film(args, controller, device)
    finally:
        env.close()
    return run


def _check_plan(args: Plan, env: Any) -> None:
    """Before there is a folder. Raises ValueError for what cannot be planned."""
    PetsConfig(args.planner, args.worth, args.random, args.episodes, args.fitting)
    if args.planner.proposals:
        raise ValueError(
            f"--planner.proposals {args.planner.proposals}: there is no policy to propose; `mbrl offline --plan` plans "
            "over one"
        )
    if args.model is None:
        reward, terminal = functions(str(args.env), spec_of(env).obs, args.reward)
        learner = args.dynamics.build(spec_of(env), devices.generator(0))
        Mpc(args.planner, args.worth, learner, generator=devices.generator(0), reward=reward, terminal=terminal)
        return
    if args.episodes < 1:
        raise ValueError(f"--episodes: got {args.episodes}, expected at least 1 where nothing is learned")
    reward, terminal = functions(str(args.env), spec_of(env).obs, args.reward)
    controller = _given(replace(args, seed=0), env, reward, terminal, devices.pick("cpu"))
    if args.video and isinstance(controller, ByValue):
        raise ValueError("--video: a plan in the true simulator is of one environment alone; leave --video out")


def _given(args: Plan, env: Any, reward: Any, terminal: Any, device: torch.device) -> Any:
    """A controller with a model that is there."""
    assert args.env is not None
    assert args.seed is not None
    if args.model == "true":
        return truth(args.env, env, args.planner, args.worth, args.seed)
    other, stream = Run.open(Path(str(args.model))), devices.generator(args.seed, device)
    settings = from_plain(other.config["arguments"], (*KINDS, Plan, *cli_meta.TYPES))
    make = functools.partial(Mpc, args.planner, generator=stream)
    if isinstance(settings, cli_meta.Meta):
        tensors, facts = other.load("model") or ({}, {"systems": 1})
        if settings.dynamics.gating == "own":
            raise RunError(f"--model {args.model}: is of separate models, none of which adapts; take another run")
        spec = replace(spec_of(env), systems=facts["systems"])
        model = _built(args, settings.dynamics, spec, tensors, settings.families or "files").to(device)
        model.requires_grad_(False)
        space, known = env.action_space, cli_meta.functions_of(settings, args.env)
        if not all(np.allclose(facts[f"act_{k}"], getattr(space, k)) for k in ("low", "high")):
            raise RunError(
                f"--model {args.model}: its actions span {facts['act_low']} to {facts['act_high']}, those of "
                f"{args.env} {space.low.tolist()} to {space.high.tolist()}; expected the same"
            )
        reward = reward or (known[0] if args.reward == "task" else None)
        if reward is None and not settings.dynamics.reward:
            raise RunError(f"--model {args.model}: it tells no reward, and none is known of {args.env}")
        one = replace(args.worth, particles=1)  # no noise
        plans = make(one, model, reward=reward, terminal=terminal or known[1], dt=facts["dt"])
        return Adapting(plans, scale=torch.tensor(facts["scale"], device=device))
    tensors, _ = other.load("pets") or ({}, {})
    model = _built(args, settings.dynamics, spec_of(env), mpc.weights(tensors), settings.env).to(device)
    terminal = terminal or mpc.learned_end(tensors, model.spec, device)
    return make(args.worth, model, reward=reward, terminal=terminal)


def _built(args: Plan, dynamics: Any, spec: Spec, weights: dict[str, torch.Tensor], of: str) -> Any:
    """The learner with these weights. Raises RunError where there are none, or those of other spaces."""
    if not weights:
        raise RunError(
            f"--model {args.model}: holds no model; expected the folder of a finished `mbrl plan` or `mbrl meta`, or "
            "true"
        )
    model = dynamics.build(spec, devices.generator(0))
    want, got = ({k: tuple(v.shape) for k, v in x.items()} for x in (model.state_dict(), weights))
    if want != got:
        raise RunError(
            f"--model {args.model}: its model is of {of}; {args.env} has {spec.obs} observations and {spec.act} "
            "actions, which do not fit it"
        )
    model.load_state_dict(weights)
    return model.eval()


def _driven(args: Plan, env: Any, controller: Any, run: Run, device: torch.device) -> list[tuple[int, float]]:
    """Episodes under a controller that does not learn. Those that the run holds are not driven again."""
    kept = run.load("driven")
    returns = [(int(n), float(r)) for n, r in kept[1]["returns"]] if kept else []
    assert args.seed is not None
    for i in range(len(returns), args.episodes):
        controller.generator.manual_seed(episode_seed(args.seed, i))
        controller.begin(1)
        e = mpc.episode(env, lambda obs: controller(obs.to(device)), episode_seed(args.seed, i))
        returns.append(((returns[-1][0] if returns else 0) + len(e.act), e.total))
        run.log("episode", returns[-1][0], {"return": e.total, "length": float(len(e.act))})
        run.progress("episode", i + 1, args.episodes, {"return": e.total})
        run.save("driven", {"n": torch.tensor(len(returns))}, {"returns": returns})
    return returns


def _film(args: Plan, controller: Any, device: torch.device) -> None:
    from mbrl_envs import evaluate as worlds

    controller.begin(1)
    assert args.video is not None
    total = worlds.video(lambda obs: controller(torch.as_tensor(obs).to(device)), str(args.env), args.video)
    console.print(f"video: {args.video}, return {total:.1f}")


# ---------------------------------------------------------------- mbrl online


def run_online(args: Online) -> Run:
    """The command `mbrl online`; returns the finished run."""
    from mbrl_envs import evaluate as worlds

    if args.steps is not None and args.resume is None:
        args = replace(args, setting=replace(args.setting, steps=args.steps))
    run, args = _begin(args, Online, "online", _check_online)
    assert args.env is not None
    with ExitStack() as stack:
        envs = [stack.enter_context(closing(opened(args.env))) for _ in args.seeds]
        world = World(envs[0])
        reward, terminal = functions(args.env, world.spec.obs, args.reward)
        judge = functools.partial(
            worlds.evaluator, args.env, episodes=args.episodes, act_low=world.low, act_high=world.high,
            obs=world.spec.obs,
        )  # fmt: skip
        began = time.perf_counter()
        with run:
            results = online.train_together(
                args.setting, envs, seeds=args.seeds, dynamics=args.dynamics, fitting=args.fitting, terminal=terminal,
                reward=reward, evaluate=[judge(seed=10_000 + 1_000 * seed) for seed in args.seeds],
                device=devices.pick(args.device), record=run,
            )  # fmt: skip
            wall, seconds = time.perf_counter() - began, results[0].seconds
            curves = {
                seed: [(n, torch.tensor(r).mean().item()) for n, r in result.returns]
                for seed, result in zip(args.seeds, results, strict=True)
            }
            out = {
                "env": args.env, "seeds": list(args.seeds), "model": type(args.dynamics).__name__,
                "returns": [(n, [x.returns[i][1][0] for x in results]) for i, (n, _) in enumerate(results[0].returns)],
                "episodes": [result.episodes for result in results],
                "seconds": {k: round(v, 2) for k, v in seconds.items()}, "wall_s": round(wall, 1), **machine(),
                "versions": versions(),
            }  # fmt: skip
            out |= {"final": [curve[-1][1] for curve in curves.values()]}
            out |= {"last10": [result.last(10).item() for result in results]}
            draw(run.folder / "report.png", f"{args.env}, {_seeds(args.seeds)}", curves, 0)
            write_json(run.folder / "result.json", out)
        if not args.quiet:
            words = Table("seed", "last-10 mean", "final", title=f"{args.env}, {type(args.dynamics).__name__}")
            for seed, last, final in zip(args.seeds, out["last10"], out["final"], strict=True):
                words.add_row(str(seed), f"{last:.1f}", f"{final:.1f}")
            console.print(words)
            console.print("last-10: mean over the last ten evaluations; never the best one.")
            console.print(f"seconds: {', '.join(f'{k} {v:.0f}' for k, v in seconds.items())}")
            console.print(f"figure: {run.folder / 'report.png'}    curves: tensorboard --logdir {run.folder}")
    return run


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _check_online(args: Online, env: Any) -> None:
    """Before there is a folder. Raises ValueError for what cannot be learned."""
    assert args.env is not None
    online.check(args.setting)
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds: got {' '.join(map(str, args.seeds))}; expected none twice")
    if args.episodes < 1:
        raise ValueError(f"--episodes: got {args.episodes}, expected at least 1")
    if args.reward == "task" and functions(args.env, spec_of(env).obs, args.reward)[0] is None:
        raise ValueError(f"--reward task: no reward function is known for {args.env}; leave it to the learner")
    for part in (args.dynamics, args.setting.agent):
        part.build(spec_of(env), devices.generator(0))


# ---------------------------------------------------------------- run folders


def _begin(args: Any, kind: type, name: str, check: Callable[[Any, Any], None]) -> tuple[Run, Any]:
    """The run folder, new or resumed, and the settings that hold there."""
    devices.use_threads(args.threads)
    if args.resume is not None:
        run = Run.resumed(args.resume, name, args.threads, quiet=args.quiet)
        old = from_plain(run.config["arguments"], (*KINDS, kind))
        if getattr(old, "video", None):
            old = replace(old, video=Path(old.video))
        presets = {"planner": PRESETS, "dynamics": LEARNERS}
        only_its_own(run, args, old, **{k: v for k, v in presets.items() if hasattr(args, k)})
        run.rewind()
        return run, replace(old, quiet=args.quiet, device=run.local["device"], out=run.folder)
    if isinstance(args, Online):
        args = replace(args, seeds=args.seeds or (devices.fresh_seed(),))
    elif args.seed is None:
        args = replace(args, seed=devices.fresh_seed())
    device = devices.pick(args.device)
    env = opened(args.env)  # what is wrong is found before there is a folder
    try:
        spec_of(env)
        check(args, env)
    finally:
        env.close()
    stem = str(args.env).replace("/", "_")
    label = "-".join(map(str, args.seeds)) if isinstance(args, Online) else args.seed
    out = args.out or Path("runs") / stem / f"{name}-{label}"
    kept = replace(args, out=None, quiet=False)
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in to_plain(kept).items()}
    config = {"algorithm": name, "arguments": plain}
    local = {"device": str(device), "threads": torch.get_num_threads()}
    return Run.create(out, config, local, quiet=args.quiet), replace(args, out=out)


def draw(path: Path, title: str, curves: Mapping[int, Sequence[tuple[int, float]]], random: int) -> None:
    """Return against environment steps for each seed; the first `random` points are of random actions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for seed, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        ax.plot(steps, values, marker="o", ms=4, label=f"seed {seed}")
        ax.plot(steps[:random], values[:random], "o", color="gray", label="random actions" if random else None)
    if random or len(curves) > 1:
        ax.legend()
    ax.set(title=title, xlabel="environment steps", ylabel="undiscounted return")
    save_figure(figure, path)
