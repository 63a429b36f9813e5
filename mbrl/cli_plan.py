"""The command `mbrl plan`: PETS, or planning with a model that is there."""

import functools
import json
import math
import shlex
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from mbrl import cli_meta, mpc, offline, online
from mbrl import device as devices
from mbrl.border import episode_seed, spec_of
from mbrl.choices import LEARNERS, PLAIN, Learner, Search, console
from mbrl.cli_control import (
    KINDS,
    Driving,
    Online,
    begin,
    check_drawn,
    check_spread,
    draw,
    functions,
    opened,
    same_bounds,
    telling,
    warn_endless,
)
from mbrl.cli_offline import Offline, learned_end, watched
from mbrl.core import Spec
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.fit import FitConfig
from mbrl.mpc import Adapting, ByValue, Mpc, PetsConfig
from mbrl.planner import ICEM, Worth
from mbrl.run import Run, RunError, from_plain, machine, to_plain, versions, write_json
from mbrl.terminal import TerminalConfig, restored


@dataclass(frozen=True)
class Plan(Driving):
    """Control an environment by planning: learn its model on the way (PETS), or plan with one that is there."""

    seed: int | None = None
    """Drawn, and recorded, where none is given."""
    model: str | None = None
    """Plan with this instead of learning: the folder of a finished `mbrl plan`, `mbrl online` or `mbrl offline` (of
    several seeds the first one's model, without a filter); of a finished `mbrl meta`, whose context then follows each
    episode; or "true", the simulator itself. A file of settings, such as a run's config.json, names the learner to
    fit, instead of dynamics:NAME."""
    random: int = 1
    """Episodes of random actions at first; like the settings of the fit and the learner, not beside a model that is
    there."""
    episodes: int = 10
    """Episodes under the planner."""
    reward: Literal["task", "learned"] = "task"
    """The task's own reward where it is known (else, or with "learned", the learner's head); the simulator's is its
    own."""
    worth: Worth = field(default_factory=lambda: Worth(particles=5))
    fitting: FitConfig = field(default_factory=lambda: PetsConfig().fitting)
    video: Path | None = None
    """Write an .mp4 or .gif of one more episode (MUJOCO_GL=egl where there is no screen)."""
    planner: Search = ICEM  # pyright: ignore[reportInvalidTypeForm]
    """How to search; its settings follow its name."""
    dynamics: Learner = field(default_factory=lambda: EnsembleConfig(members=5, uncertainty=()))  # pyright: ignore[reportInvalidTypeForm]
    """The model of the world; its settings follow its name."""


def truth(env_id: str, env: Any, planner: Any, worth: Worth, seed: int, threads: int = 0) -> Any:
    """A controller that plans in the simulator itself, on so many threads (0: one for each processor)."""
    from mbrl_envs.simulator import Simulator

    stream = devices.generator(seed)
    _certain(worth, "the true simulator")
    if (known := _known_truth(env_id)) is not None:
        name, world = known
        _, terminal = functions(name, spec_of(env).obs, "task")
        return Mpc(planner, replace(worth, particles=1), world, generator=stream, terminal=terminal)
    simulator = Simulator(env, threads or None)
    width = env.action_space.shape[0]

    def value(acts: torch.Tensor) -> torch.Tensor:
        return simulator.value(acts[0], worth.discount)[None]

    return ByValue(planner, value, width, stream)


def _known_truth(env_id: str) -> tuple[str, Any] | None:
    """The id without arguments, and its equations, where these are known: however long an episode is, and at any
    gravity of a pendulum's."""
    from mbrl_envs import control, scores

    name, kw = scores.parted(env_id)
    name = name.rpartition(":")[2]
    own = {k: v for k, v in scores.altered(name, kw).items() if k != "max_episode_steps"}
    if name not in control.TRUTHS or not set(own) <= ({"g"} if name == "Pendulum-v1" else set()):
        return None
    return name, control.TRUTHS[name](**own)


def run_plan(args: Plan) -> Run:
    """The command `mbrl plan`; returns the finished run."""
    resumed = args.resume is not None
    args = _configured(args)
    _check_unfinished(args)
    run, args = begin(args, Plan, "plan", _check_plan)
    if resumed and args.video:
        check_drawn(args.video, str(args.env))
    named, args = args.model, replace(args, model=run.local.get("model", args.model))  # found from another folder, too
    assert args.env is not None
    assert args.seed is not None
    device = devices.pick(args.device)
    draws = {"render_mode": "rgb_array"} if args.video and args.model == "true" else {}
    env = opened(args.env, **draws)
    try:
        reward, terminal = functions(args.env, spec_of(env).obs, args.reward)
        config = PetsConfig(args.planner, args.worth, args.random, args.episodes, args.fitting)
        with run:
            if args.model is None:
                _note_reward(args, reward)
                learner = telling(args.worth, args.dynamics)
                result = mpc.pets(
                    config, env, learner, seed=args.seed, record=run, reward=reward, terminal=terminal, device=device
                )
                returns, controller = result.returns, result.mpc
            else:
                controller = _given(args, env, reward, terminal, device)
                if args.model != "true":
                    _note_reward(args, getattr(controller, "mpc", controller).reward)
                if (of := _world_of(args)) not in (None, "none", args.env) and not args.quiet:
                    console.print(f"note: {named} is of {of}, and steps {args.env} here", **PLAIN)
                returns = _driven(args, env, controller, run, device)
            last = torch.tensor([r for _, r in returns[-max(1, min(10, args.episodes)) :]])
            out = {
                "env": args.env, "seed": args.seed, "model": named or type(args.dynamics).__name__,
                "planner": to_plain(args.planner), "returns": returns, "last10": last.mean().item(),
                "steps": returns[-1][0], "wall_s": round(run.seconds, 1), **machine(), "versions": versions(),
            }  # fmt: skip
            random = args.random * (not args.model)
            draw(run.folder / "report.png", f"{args.env}, seed {args.seed}", {args.seed: returns}, random)
            write_json(run.folder / "result.json", out)
        if not args.quiet:
            words = Table("episode", "environment steps", "return", title=f"{args.env}, planning")
            for i, (n, r) in enumerate(returns):
                words.add_row(f"{i + 1}{' (random)' if not args.model and i < args.random else ''}", str(n), f"{r:.1f}")
            console.print(words)
            console.print(f"{out['wall_s']:.0f} s; figure: {run.folder / 'report.png'}")
        if args.video:
            _film(args, controller, env, device)
    finally:
        env.close()
    return run


def _configured(args: Plan) -> Plan:
    """With the learner of the file that --model names, where it names one. Raises RunError where that holds none."""
    if args.model in (None, "true") or not (path := Path(args.model)).is_file():
        return args
    whose = f"--model {args.model}"
    if args.dynamics != Plan().dynamics:
        raise RunError(f"{whose}: got beside a learner with its settings; expected one of the two")
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{whose}: is no JSON ({error}); expected settings such as a run's config.json") from None
    named = sorted({type(x).__name__ for x in LEARNERS.values()})
    for inner in ("arguments", "dynamics"):
        if isinstance(held, dict) and held.get("model"):
            raise RunError(f"{whose}: is of a run that learned no model, but took {held['model']}; name that run's")
        if isinstance(held, dict) and held.get("_type") not in named:
            held = held.get(inner, held)
    if not isinstance(held, dict) or held.get("_type") not in named:
        raise RunError(
            f"{whose}: names no learner; expected its settings, or those of a run, which has them under arguments, "
            f"dynamics; known: {', '.join(named)}"
        )
    return replace(args, model=None, dynamics=from_plain(held, KINDS))


def _note_reward(args: Plan, reward: Any) -> None:
    """Says that the learner's head tells the reward where the task's was asked for."""
    if reward is None and args.reward == "task" and not args.quiet:
        console.print(f"note: no reward function is known for {args.env}; the learner's head tells it", **PLAIN)


def _check_unfinished(args: Plan) -> None:
    """Raises RunError where a run that has finished is to be filmed, with the way round."""
    if args.video is None or args.resume is None or (run := Run.open(args.resume)).result is None:
        return
    own = run.config.get("arguments") or {}
    if own.get("_type") == "Plan":
        model = own.get("model") or args.resume
        again = f"mbrl plan --model {shlex.quote(str(model))} --env {shlex.quote(str(own.get('env')))}"
        again += f" --episodes 1 --video {shlex.quote(str(args.video))}"
        raise RunError(f"{args.resume}: has finished; `{again}` films its model")


def _check_plan(args: Plan, env: Any) -> None:
    """Before there is a folder. Raises ValueError for what cannot be planned, or filmed."""
    warn_endless(str(args.env), env, f"{mpc.ENDLESS} steps")
    if args.video:
        check_drawn(args.video, str(args.env))
    PetsConfig(args.planner, args.worth, args.random, args.episodes, args.fitting)
    if args.worth.limit == math.inf and args.worth.uncertainty != Worth().uncertainty:
        raise ValueError(f"--worth.uncertainty {args.worth.uncertainty}: is what --worth.limit reads; got no limit")
    if args.planner.proposals:
        raise ValueError(
            f"--planner.proposals {args.planner.proposals}: there is no policy to propose; `mbrl offline --plan` plans "
            "over one"
        )
    if args.model is None:
        reward, terminal = functions(str(args.env), spec_of(env).obs, args.reward)
        learner = telling(args.worth, args.dynamics).build(spec_of(env), devices.generator(0))
        check_spread(args.worth, learner)
        Mpc(args.planner, args.worth, learner, generator=devices.generator(0), reward=reward, terminal=terminal)
        return
    if args.episodes < 1:
        raise ValueError(f"--episodes: got {args.episodes}, expected at least 1 where nothing is learned")
    usual = Plan()
    idle = {"--random": "random", "--fitting": "fitting", "dynamics:NAME": "dynamics"}
    idle |= {"--reward learned": "reward"} if args.model == "true" else {}
    if said := [k for k, v in idle.items() if getattr(args, v) != getattr(usual, v)]:
        raise ValueError(f"{', '.join(said)}: got beside --model {args.model}, where nothing is learned; leave out")
    reward, terminal = functions(str(args.env), spec_of(env).obs, args.reward)
    control = _given(replace(args, seed=0), env, reward, terminal, devices.pick("cpu"))
    idle = {"--worth.particles": "particles", "--worth.no-pinned": "pinned"}
    said = [k for k, v in idle.items() if getattr(args.worth, v) != getattr(usual.worth, v)]
    if said and (args.model == "true" or isinstance(control, Adapting)):
        what = "the true simulator" if args.model == "true" else f"the mixture of {args.model}"
        raise ValueError(f"{', '.join(said)}: {what} is not uncertain and has one future; leave out")


def _certain(worth: Worth, what: str) -> None:
    if worth.limit < math.inf or worth.pessimism:
        raise ValueError(
            f"--worth: got limit {worth.limit} and pessimism {worth.pessimism}, and {what} is not uncertain; leave "
            "both out"
        )


def _given(args: Plan, env: Any, reward: Any, terminal: Any, device: torch.device) -> Any:
    """A controller with a model that is there."""
    assert args.env is not None
    assert args.seed is not None
    if args.model == "true":
        return truth(args.env, env, args.planner, args.worth, args.seed, args.threads)
    if args.model in LEARNERS and not Path(args.model).exists():
        raise RunError(
            f"--model {args.model}: no such folder; expected that of a run whose model is there, or true; a learner to "
            f"fit is named as dynamics:{args.model}"
        )
    other, stream = Run.open(Path(str(args.model))), devices.generator(args.seed, device)
    kind = str((other.config.get("arguments") or {}).get("_type"))
    if not other.config.get("arguments"):
        raise RunError(f"--model {args.model}: was made from Python; run its script again, which loads its model")
    if kind not in (names := [x.__name__ for x in (Plan, Online, Offline, cli_meta.Meta)]):
        expected = ", ".join(f"`mbrl {x.lower()}`" for x in names)
        raise RunError(f"--model {args.model}: is of `mbrl {kind.lower()}`; expected a run of {expected}, or true")
    settings = from_plain(other.config["arguments"], (*KINDS, Plan, Online, Offline, *cli_meta.TYPES))
    make = functools.partial(Mpc, args.planner, generator=stream)
    whose, its = f"--model {args.model}", (env.action_space.low, env.action_space.high)
    if isinstance(settings, cli_meta.Meta):
        tensors, facts = other.load("model") or ({}, {"systems": 1})
        if settings.dynamics.gating == "own":
            raise RunError(f"--model {args.model}: is of separate models, none of which adapts; take another run")
        spec = replace(spec_of(env), systems=facts["systems"])
        model = _built(args, settings.dynamics, spec, tensors, settings.families or "files").to(device)
        model.requires_grad_(False)
        known = cli_meta.functions_of(settings, args.env)
        same_bounds(whose, (facts["act_low"], facts["act_high"]), str(args.env), its)
        reward = reward or (known[0] if args.reward == "task" else None)
        if reward is None and not settings.dynamics.reward:
            raise RunError(f"--model {args.model}: it tells no reward, and none is known of {args.env}")
        _certain(args.worth, f"the mixture of {args.model}")
        one = replace(args.worth, particles=1)  # no noise
        plans = make(one, model, reward=reward, terminal=terminal or known[1], dt=facts["dt"])
        return Adapting(plans, scale=torch.tensor(facts["scale"], device=device))
    spec, of, dt = spec_of(env), settings.env, 1.0
    if isinstance(settings, Offline):
        data = other.config["data"]
        other.shared = Path(other.local["models"]) if other.local.get("models") else None
        name = offline.fitted_name(
            "model", data["sha256"], data["steps"], settings.dynamics, settings.fitting, settings.seeds[0]
        )
        weights, _ = other.load(name) or ({}, {})
        of, dt = data["name"], data.get("dt", 1.0)
        low, high = data["act_low"], data["act_high"]
    else:
        with closing(opened(of)) as world:
            low, high = world.action_space.low, world.action_space.high
        if isinstance(settings, Online):
            weights, _ = other.load(online.key("model", 0, len(settings.seeds))) or ({}, {})
        else:
            weights = mpc.weights((other.load("pets") or ({}, {}))[0])
    model = _built(args, settings.dynamics, spec, weights, of).to(device)
    same_bounds(whose, (low, high), str(args.env), its)
    check_spread(args.worth, model)
    model = telling(args.worth, model)
    terminal = terminal or _learned_end(other, settings, spec, device)
    return make(args.worth, model, reward=reward, terminal=terminal, dt=dt)


def _learned_end(run: Run, settings: Any, spec: Spec, device: torch.device) -> Any:
    """The termination that a run has learned beside its model, or None."""
    if isinstance(settings, Offline):
        end = learned_end(run, replace(settings, device="cpu"), spec)  # the run may be from another machine
        return end and end.to(device)
    if isinstance(settings, Online):
        kept = run.load(online.key("terminal", 0, len(settings.seeds)))
        return kept and restored(kept[0], spec, TerminalConfig()).to(device)
    return mpc.learned_end((run.load("pets") or ({}, {}))[0], spec, device)


def _world_of(args: Plan) -> str | None:
    """The environment of the run that gives the model, where it is one that drives an environment."""
    return None if args.model == "true" else (Run.open(Path(str(args.model))).config.get("arguments") or {}).get("env")


def _built(args: Plan, dynamics: Any, spec: Spec, weights: dict[str, torch.Tensor], of: str) -> Any:
    """The learner with these weights. Raises RunError where there are none, or those of other spaces."""
    if not weights:
        raise RunError(
            f"--model {args.model}: holds no model; expected the folder of a finished `mbrl plan`, `mbrl online`, "
            "`mbrl offline` or `mbrl meta`, or true"
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
        before = dict(controller.counts)
        act = lambda obs: controller(obs.to(device))
        e = mpc.episode(env, act, episode_seed(args.seed, i), told=mpc.telling(run))
        returns.append(((returns[-1][0] if returns else 0) + len(e.act), e.total))
        figures = {"return": e.total, "length": float(len(e.act))} | mpc.shares(controller.counts, before)
        run.log("episode", returns[-1][0], figures)
        run.progress("episode", i + 1, args.episodes, {"return": e.total})
        run.save("driven", {"n": torch.tensor(len(returns))}, {"returns": returns})
    return returns


def _film(args: Plan, controller: Any, env: Any, device: torch.device) -> None:
    """In an environment of its own, or, of a plan that is valued in this one's simulator, in this one."""
    from mbrl_envs import evaluate as worlds

    controller.begin(1)
    assert args.video is not None
    source = env if isinstance(controller, ByValue) else str(args.env)
    with console.status("filming") as status:
        act = watched(controller, "filming", status)
        total = worlds.video(lambda obs: act(torch.as_tensor(obs).to(device)), source, args.video)
    console.print(f"video of one more episode: {args.video}, return {total:.1f}")
