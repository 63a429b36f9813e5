"""Policies to and from stable-baselines3: a SAC checkpoint of either side runs on the other with the same actions.

Both keep a ReLU network that gives mean and log standard deviation (in [-20, 2]), squashed by tanh, with actions in
[-1, 1] rescaled to the action space's bounds at the border. Optimisers' states are not exchanged.
"""

import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from gymnasium import spaces
from torch import Tensor, nn

from mbrl.core import Spec
from mbrl.sac import Layers, Sac, SacConfig
from mbrl_envs.evaluate import EnvError, flatten_obs, make, quiet


class AdapterError(ValueError):
    """A checkpoint, or an agent, that the other side cannot take."""


def to_sb3(agent: Sac, env_id: str | gym.Env, path: str | Path, seed: int = 0) -> Path:
    """Write one seed of an agent as a stable-baselines3 SAC checkpoint, which `SAC.load` reads and can train on.
    Returns its path, ending in .zip where the given one has no ending.

    The environment fixes the spaces that the checkpoint states, the bounds of its actions among them. An agent's
    normaliser goes into the first layers. Critics with layer normalisation have no counterpart: theirs are then new
    ones, with a warning. Raises AdapterError where agent and environment do not fit, or the agent is no SAC."""
    from stable_baselines3 import SAC

    if not isinstance(agent, Sac):
        raise AdapterError(f"to_sb3: got a {type(agent).__name__}, expected a Sac; other policies have no counterpart")
    if not 0 <= seed < agent.seeds:
        raise AdapterError(f"to_sb3: got seed {seed}, expected 0 .. {agent.seeds - 1}")
    config = agent.config
    env = make(env_id) if isinstance(env_id, str) else env_id
    try:
        _fits(agent.spec, env, str(env_id))
        with quiet():
            model = SAC(
                "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy",
                env,
                learning_rate=config.critic_lr,
                gamma=config.gamma,
                tau=config.tau,
                buffer_size=1,
                ent_coef="auto" if config.alpha_lr else agent.log_alpha[seed].exp().item(),
                target_entropy=agent.target_entropy,
                policy_kwargs={"net_arch": list(config.hidden), "n_critics": config.critics},
                device="cpu",
            )
    finally:
        if isinstance(env_id, str):
            env.close()
    model.buffer_size = 1_000_000  # what SAC.load sets up, for who trains on
    actor = agent.fold(agent.actor_net.linears(agent.actor[seed]))
    policy: Any = model.policy
    *inner, (weight, bias) = actor
    hidden = [x for x in policy.actor.latent_pi if isinstance(x, nn.Linear)]
    heads = zip((policy.actor.mu, policy.actor.log_std), weight.chunk(2), bias.chunk(2), strict=True)
    for layer, (w, b) in zip(hidden, inner, strict=True):
        _put(layer, w, b)
    for layer, w, b in heads:
        _put(layer, w, b)
    if config.layer_norm:
        warnings.warn("to_sb3: critics with layer normalisation cannot be written; new ones stand there", stacklevel=2)
    else:
        ours = agent.linears(seed)
        for name, module in (("critics", policy.critic), ("target", policy.critic_target)):
            for network, layers in zip(module.q_networks, ours[name], strict=True):
                for layer, (w, b) in zip((x for x in network if isinstance(x, nn.Linear)), layers, strict=True):
                    _put(layer, w, b)
    if model.log_ent_coef is not None:
        model.log_ent_coef.data.fill_(agent.log_alpha[seed].item())
    path = Path(path)
    path = path if path.suffix else path.with_name(path.name + ".zip")
    path.parent.mkdir(parents=True, exist_ok=True)
    memory = io.BytesIO()
    model.save(memory)
    part = path.with_name(path.name + ".tmp")
    part.write_bytes(memory.getvalue())
    part.replace(path)
    return path


def from_sb3(
    path: str | Path, spec: Spec, config: SacConfig, generator: torch.Generator | None = None, seeds: int = 1
) -> Sac:
    """A stable-baselines3 SAC checkpoint as an agent: policy, critics, their targets and temperature, the same in each
    of `seeds`. Nothing is unpickled: of the file only tensors and plain JSON are read.

    Statistics of a VecNormalize wrapper lie outside the checkpoint: a policy trained with one sees other observations
    than the environment's and is not what its file alone says. Raises AdapterError for a file that is no such
    checkpoint, of another algorithm or another network; FileNotFoundError for none."""
    path = Path(path)
    if not isinstance(config, SacConfig):
        raise AdapterError(f"from_sb3: got a {type(config).__name__} to build, expected a SacConfig")
    data, tensors, rest = _read(path)
    _check_kind(path, data, tensors)
    actor, critics, target = _networks(path, tensors)
    hidden = tuple(len(bias) for _, bias in actor[:-1])
    widths = actor[0][0].shape[1], actor[-1][0].shape[0] // 2
    if widths != (spec.obs, spec.act):
        raise AdapterError(
            f"{path}: its policy reads {widths[0]} observations and gives {widths[1]} actions, "
            f"expected {spec.obs} and {spec.act}; is it of another environment?"
        )
    kinds = {tuple(len(bias) for _, bias in layers[:-1]) for layers in (*critics, *target)}
    if kinds != {hidden}:
        raise AdapterError(f"{path}: its actor has layers of {list(hidden)}, its critics others; expected the same")
    if (hidden, len(critics), False) != (config.hidden, config.critics, config.layer_norm):
        got = f"hidden={config.hidden}, critics={config.critics}, layer_norm={config.layer_norm}"
        raise AdapterError(
            f"{path}: its networks need SacConfig(hidden={hidden}, critics={len(critics)}, layer_norm=False), got {got}"
        )
    agent = config.build(spec, generator or torch.Generator().manual_seed(0), seeds)
    for seed in range(seeds):
        try:
            agent.load_linears(seed, actor, critics, target)
        except ValueError as error:
            raise AdapterError(f"{path}: {error}") from error
    if not {"log_ent_coef", "ent_coef_tensor"} & rest.keys():
        raise AdapterError(f"{path}: pytorch_variables.pth lacks the temperature, 'log_ent_coef'")
    log_alpha = rest["log_ent_coef"] if "log_ent_coef" in rest else rest["ent_coef_tensor"].log()
    agent.log_alpha.data.fill_(log_alpha.item())
    return agent


# ---------------------------------------------------------------- writing


def _put(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


def _fits(spec: Spec, env: gym.Env, name: str) -> None:
    box = env.action_space
    if not isinstance(box, spaces.Box):
        raise AdapterError(f"to_sb3: {name} has the action space {box}, expected a Box")
    try:
        width = len(flatten_obs(env.observation_space, env.observation_space.sample()))
    except EnvError as error:
        raise AdapterError(f"to_sb3: {name}: {error}") from error
    if (got := (width, box.shape)) != (want := (spec.obs, (spec.act,))):
        raise AdapterError(
            f"to_sb3: {name} has {got[0]} observations and actions of shape {got[1]}, "
            f"the agent {want[0]} and {want[1]}; pass the environment that it was trained for"
        )


# ---------------------------------------------------------------- reading


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The plain fields, the policy's tensors, and those beside it."""
    if not path.exists() and not path.suffix:
        path = path.with_name(path.name + ".zip")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint written by stable-baselines3's SAC.save")
    try:
        with zipfile.ZipFile(path) as archive:
            names = ("data", "policy.pth", "pytorch_variables.pth")
            if missing := [name for name in names if name not in archive.namelist()]:
                raise AdapterError(f"{path}: holds no {missing[0]!r}; expected a stable-baselines3 SAC checkpoint")
            data, *tensors = (archive.read(name) for name in names)
            plain = json.loads(data)
            policy, rest = (
                torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True) if raw else {} for raw in tensors
            )
    except pickle.UnpicklingError as error:
        raise AdapterError(f"{path}: holds more than tensors and is not read; save it again with SAC.save") from error
    except (zipfile.BadZipFile, EOFError, RuntimeError, OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise AdapterError(f"{path}: cannot be read as a stable-baselines3 checkpoint: {reason}") from error
    for part in (policy, rest):
        if not isinstance(part, dict) or not all(isinstance(x, Tensor) for x in part.values()):
            raise AdapterError(f"{path}: expected tensors by name in policy.pth and pytorch_variables.pth")
    if not isinstance(plain, dict):
        raise AdapterError(f"{path}: 'data' is not a JSON object")
    return plain, policy, rest


def _check_kind(path: Path, data: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Only the text that stands in the JSON beside each pickle is looked at."""
    of = data.get("policy_class")
    module = str(of.get("__module__", "")) if isinstance(of, dict) else ""
    name = re.match(r"(?:stable_baselines3|sb3_contrib)\.(\w+)\.policies", module)
    if (name and name[1] != "sac") or not {"actor.mu.weight", "actor.log_std.weight"} <= tensors.keys():
        kind = name[1].upper() if name and name[1] != "sac" else "a policy that is no plain SAC"
        if data.get("use_sde"):
            kind = "SAC with use_sde=True"
        raise AdapterError(f"{path}: holds {kind}, expected SAC with MlpPolicy and use_sde=False")
    if data.get("use_sde"):
        raise AdapterError(f"{path}: holds SAC with use_sde=True, expected use_sde=False")
    wanted = re.compile(
        r"actor\.(latent_pi\.\d+|mu|log_std)\.(weight|bias)|critic(_target)?\.qf\d+\.\d+\.(weight|bias)"
    )
    if strange := [k for k in tensors if not wanted.fullmatch(k)]:
        raise AdapterError(f"{path}: holds {strange[0]!r}, which a policy of plain layers (MlpPolicy) has not")
    options = data.get("policy_kwargs")
    activation = str(options.get("activation_fn", "ReLU")) if isinstance(options, dict) else "ReLU"
    if not re.search(r"\bReLU\b", activation):
        raise AdapterError(f"{path}: its activation is {activation}, expected ReLU")


def _networks(path: Path, tensors: dict[str, Tensor]) -> tuple[Layers, list[Layers], list[Layers]]:
    def layer(name: str) -> tuple[Tensor, Tensor]:
        try:
            return tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()
        except KeyError as error:
            raise AdapterError(f"{path}: policy.pth lacks {error.args[0]!r}") from error

    def stack(prefix: str) -> Layers:
        numbers: Callable = lambda k: re.fullmatch(re.escape(prefix) + r"\.(\d+)\.weight", k)
        found = sorted(int(m[1]) for m in map(numbers, tensors) if m)
        return [layer(f"{prefix}.{n}") for n in found]

    def critics(prefix: str) -> list[Layers]:
        count = len({m[1] for m in (re.match(prefix + r"\.(qf\d+)\.", k) for k in tensors) if m})
        out = [stack(f"{prefix}.qf{i}") for i in range(count)]
        if not out or not all(out):
            raise AdapterError(f"{path}: policy.pth lacks {prefix}.qf0")
        return out

    heads = layer("actor.mu"), layer("actor.log_std")
    head = tuple(torch.cat(x) for x in zip(*heads, strict=True))
    return [*stack("actor.latent_pi"), (head[0], head[1])], critics("critic"), critics("critic_target")
