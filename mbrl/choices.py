"""What can be chosen on the command line, by name: learners, algorithms, planners."""

import operator
import warnings
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from mbrl import device as devices
from mbrl import offline, planner
from mbrl.baselines import BcConfig, Td3BcConfig
from mbrl.continual import STUDENTS
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.experts import ExpertsConfig
from mbrl.dynamics.filtered import FilterConfig, RewardConfig
from mbrl.dynamics.heads import HeadsConfig
from mbrl.dynamics.hyper import HyperConfig, HyperFit
from mbrl.dynamics.mixer import Coda, Geps, Hierarchical, MixerConfig, MixerFit, Ncf
from mbrl.dynamics.ode import ErrorEstimate, Local, OdeConfig, StiffnessRatio
from mbrl.dynamics.plrnn import (
    Adaptive,
    AlmostLinear,
    Annealed,
    Constant,
    Dendritic,
    PlrnnConfig,
    Shallow,
    Sparse,
)
from mbrl.dynamics.single import SingleConfig
from mbrl.fit import FitConfig
from mbrl.planner import Over, Planner, Worth
from mbrl.run import Run, RunError, types_of
from mbrl.sac import SacConfig
from mbrl.solvers import RK4, Dopri5, Tsit5

console = Console(emoji=False)  # minari:door: is a name
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}  # for a path, which stays whole


def learners() -> dict[str, Any]:
    """Name -> default config of every dynamics learner: ours, and those that other packages announce under the entry
    point group "mbrl.learners" (a name and a frozen dataclass with `build(spec, generator)`, all fields defaulted)."""
    found: dict[str, Any] = {"ensemble": EnsembleConfig(), "ensemble-scaled": EnsembleConfig(scale_targets=True)}
    found |= {"single": SingleConfig(), "single-gaussian": SingleConfig(gaussian=True, scale_targets=False)}
    control = PlrnnConfig(Shallow(200, clipped=False), forcing=Constant(0.5), noise=True, reward=True)
    found |= {"plrnn": control, "ode": OdeConfig(reward=True)}
    found |= {"hyper": HyperConfig(gaussian=True), "experts": ExpertsConfig(SingleConfig())}
    found |= {"mixer": MixerConfig(Coda((128, 128)), gating="gradient", reward=True)}
    for point in metadata.entry_points(group="mbrl.learners"):
        if point.name in found:
            warnings.warn(f"learner {point.name!r} of {point.value}: the name is taken; passed over", stacklevel=2)
            continue
        try:
            cls = point.load()
            if not (isinstance(cls, type) and is_dataclass(cls) and hasattr(cls, "build")):
                warnings.warn(
                    f"learner {point.name!r}: {point.value} is not a dataclass with build(); passed over", stacklevel=2
                )
                continue
            config: Any = cls()
        except Exception as error:  # another package's fault must not take the command line down
            warnings.warn(f"learner {point.name!r} of {point.value} cannot be loaded: {error!r}", stacklevel=2)
            continue
        names = {x.__name__: x for x in types_of(*found.values(), offline.MOREC_MOPO)}
        if taken := [x.__name__ for x in types_of(config) if names.get(x.__name__, x) is not x]:
            warnings.warn(
                f"learner {point.name!r}: {point.value} has settings called {taken[0]}, as others are; passed over",
                stacklevel=2,
            )
            continue
        found[point.name] = config
    return found


LEARNERS = learners()
RECONSTRUCTORS: dict[str, Any] = {
    "plrnn": PlrnnConfig(Shallow(100)),
    "plrnn-gtf": PlrnnConfig(Shallow(100), forcing=Constant(0.2)),
    "plrnn-stf": PlrnnConfig(Shallow(100), forcing=Sparse(20)),
    "plrnn-annealed": PlrnnConfig(Shallow(100), forcing=Annealed(0.5, 0.05, 20_000)),
    "plrnn-dendritic": PlrnnConfig(Dendritic(20), latent=20, forcing=Adaptive()),
    "plrnn-almost-linear": PlrnnConfig(AlmostLinear(10), latent=20, forcing=Sparse(20)),
    "ode": OdeConfig(),
}  # for series: without reward and noise
MIXERS: dict[str, Any] = {
    "mixer": MixerConfig(),
    "mixer-coda": MixerConfig(Coda()),
    "mixer-geps": MixerConfig(Geps()),
    "mixer-plrnn": MixerConfig(Hierarchical(), alpha=0.1),
    "meta-learner": MixerConfig(experts=1),
    "naive-gate": MixerConfig(gating="gradient"),
    "separate": MixerConfig(gating="own"),
}  # for families of systems
KNOWN = (
    *types_of(*LEARNERS.values()),
    *(offline.OfflineConfig, offline.Imagination, offline.Penalty, offline.Truncation, offline.Morec),
    *(RK4, Tsit5, Dopri5, Local, ErrorEstimate, StiffnessRatio),
    *(SacConfig, BcConfig, Td3BcConfig, RewardConfig, FilterConfig, FitConfig),
    *(Planner, Worth, Over, HeadsConfig, HyperFit),
    *{type(x) for x in STUDENTS.values()},
    *(MixerConfig, MixerFit, Ncf, Coda, Geps, Hierarchical),
    *(PlrnnConfig, Shallow, Dendritic, AlmostLinear, Constant, Sparse, Annealed, Adaptive),
)


WORDS = {
    "morec-mopo": "A dynamics reward chooses among the model's candidates and cuts rollouts; MOPO's penalty.",
    "morec-mobile": "The same with MOBILE's penalty.",
    "morec-published": "MOREC-MOPO with the dynamics reward as the paper has it, for ablations.",
    "mopo": "Rewards less the model's uncertainty; short rollouts.",
    "mopo-published": "The same with the published agent: plain SAC, a twentieth of real rows.",
    "morel": "Rollouts end where the model's members disagree.",
    "mobile": "Rewards less the spread of the members' values; short rollouts.",
    "mobile-published": "The same with the published agent: plain SAC, a twentieth of real rows.",
    "bc": "Behaviour cloning: no model.",
    "td3-bc": "TD3 with a cloning term: no model.",
    "ensemble": "Gaussian networks, to the published recipe.",
    "ensemble-scaled": "The same with standardised targets: for observations of very different magnitudes.",
    "single": "One deterministic network.",
    "single-gaussian": "One Gaussian network: an ensemble of one.",
    "ode": "A neural ordinary differential equation; intervals of any length.",
    "experts": "Single networks that a stream without task labels calls up.",
    "hyper": "A hypernetwork that generates the network of each task.",
    "plrnn": "A shallow piecewise-linear recurrent network with teacher forcing.",
    "plrnn-gtf": "The same under forcing of one strength.",
    "plrnn-stf": "The same, the data imposed now and then.",
    "plrnn-annealed": "The same under forcing that falls.",
    "plrnn-dendritic": "A PLRNN whose units are sums of shifted rectifiers.",
    "plrnn-almost-linear": "A PLRNN of which few units are rectified.",
    "mixer": "Experts that share a context, and a gate that reads it.",
    "mixer-coda": "The same of networks whose weights the context moves.",
    "mixer-geps": "The same by low-rank products.",
    "mixer-plrnn": "The same of piecewise-linear maps.",
    "meta-learner": "One expert for all.",
    "naive-gate": "A gate that is trained by gradient with the rest.",
    "separate": "A model for each system.",
    "finetune": "One network goes on from task to task.",
    "single-task": "A network for each task.",
    "multi-task": "The oracle that keeps all data.",
    "replay": "Rehearsal of stored transitions.",
    "ewc": "Elastic weight consolidation.",
    "si": "Synaptic intelligence.",
    "cem": "Cross-entropy method: white noise, all elites alike.",
    "icem": "Coloured noise, kept elites, few candidates; the best seen is executed.",
    "mppi": "One iteration; every candidate weighs exp(return / temperature).",
    "tdmpc": "TD-MPC2's mixture: short horizon, elites weigh by their return.",
}


def by_option(x: Any, name: str = "-") -> dict[str, Any]:
    """Each of a command's settings by its option."""
    if not is_dataclass(x):
        return {name: x.resolve() if isinstance(x, Path) else x}
    of = lambda f: f"{name}{'-' if name == '-' else '.'}{f.name.replace('_', '-')}"
    return {k: v for f in fields(x) for k, v in by_option(getattr(x, f.name), of(f)).items()}


def unlike(given: dict[str, Any], usual: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Options that were given, so that they are not as usual, and are not a run's own, in words."""
    word = lambda x: " ".join(map(str, x)) if isinstance(x, tuple | list) else str(x)
    return [
        f"{k} {word(v)} (its own is {word(own.get(k))})"
        for k, v in given.items()
        if k not in ("--quiet", "--threads", "--resume") and v not in (usual.get(k), own.get(k))
    ]


def only_its_own(run: Run, given: Any, own: Any, **presets: dict[str, Any]) -> None:
    """Raises RunError where options of a resumed command were given (are not the command's defaults) and are not the
    run's own. presets: what is chosen by name, name -> config, by field."""
    device = given.device if given.device == "auto" else str(devices.pick(given.device))
    given, own = replace(given, device=device), replace(own, device=run.local.get("device", device), out=run.folder)
    usual, differ = type(given)(), []
    mine = by_option(given)
    for name, known in presets.items():
        option = f"--{name}"
        mine = {k: v for k, v in mine.items() if not k.startswith(f"{option}.")}
        asked, default, has = (getattr(x, name) for x in (given, usual, own))
        if asked in (default, has):
            continue
        # of what can be named, that from which a config differs least; the command's own default is one of these
        near = _nearest(default, list(known.items()))[0]
        among = [*known.items(), *((n, default) for n in near)]
        (named, start), (its, _) = _nearest(asked, among), _nearest(has, among)
        if set(named) & set(its):
            differ += unlike(by_option(asked, option), by_option(start, option), by_option(has, option))
        else:
            differ.append(f"{name}:{named[0]} (its own is {name}:{its[0]})")
    refuse(run, unlike(mine, by_option(usual), by_option(own)) + differ)


def refuse(run: Run, differ: list[str]) -> None:
    """Raises RunError where a resumed command was given what is not the run's own."""
    if differ:
        words = ", ".join(differ)
        raise RunError(
            f"{run.folder}: goes on by its own settings, not by {words}; leave these out, or begin another run"
        )


def _nearest(config: Any, among: list[tuple[str, Any]]) -> tuple[list[str], Any]:
    """Names of the configs that differ in the fewest settings, those of its own kind first; and the first of these."""
    mine = by_option(config)

    def far(other: Any) -> tuple[bool, int]:
        its = by_option(other)
        return type(other) is not type(config), sum(mine.get(k) != its.get(k) for k in {*mine, *its})

    least = min(far(x) for _, x in among)
    found = [(n, x) for n, x in among if far(x) == least]
    return [n for n, _ in found], found[0][1]


def union(options: dict[str, tuple[Any, Any]]) -> Any:
    """A union of (type, default) by name, each a subcommand."""
    avoid = tyro.conf.AvoidSubcommands  # a preset fixes which parts it has; their settings stay open
    sub = lambda name, default: tyro.conf.subcommand(name, default=default, description=WORDS.get(name))
    made = [Annotated[t, sub(name, d), avoid] for name, (t, d) in options.items()]
    return reduce(operator.or_, made)


Algorithm: Any = union({name: (offline.OfflineConfig, preset) for name, preset in offline.PRESETS.items()})
Student: Any = union({name: (type(x), x) for name, x in STUDENTS.items()})
Learner: Any = union({name: (type(x), x) for name, x in LEARNERS.items()})
Reconstructor: Any = union({name: (type(x), x) for name, x in RECONSTRUCTORS.items()})
Mixture: Any = union({name: (type(x), x) for name, x in MIXERS.items()})
Search: Any = union({name: (Planner, x) for name, x in planner.PRESETS.items()})
