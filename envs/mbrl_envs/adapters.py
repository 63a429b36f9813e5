"""Between this library and gymnasium's and stable-baselines3's agents: learned models as their environments, and
policies as their checkpoints.

Any `Dynamics` is an environment of theirs, in which an unmodified agent trains: `ModelVecEnv` for stable-baselines3,
`ModelVectorEnv` for gymnasium's vector interface, `ModelEnv` as a single environment. All rows are stepped by one call
of the model.

A SAC checkpoint of either side runs on the other with the same actions. Both keep a ReLU network that gives mean and
log standard deviation (in [-20, 2]), squashed by tanh, with actions in [-1, 1] rescaled to the action space's bounds at
the border. Optimisers' states are not exchanged.
"""

import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from mbrl.core import Dynamics, Spec, StepInput, check_functions, check_reward, choose, first_context
from mbrl.sac import Layers, Sac, SacConfig
from mbrl_envs.evaluate import EnvError, flatten_obs, make, quiet

Function = Callable[[Tensor, Tensor, Tensor], Tensor]  # (obs [B, O], act [B, A], next obs [B, O]) -> [B]


class AdapterError(ValueError):
    """A checkpoint, an agent or a model that the other side cannot take."""


# ---------------------------------------------------------------- models as environments


class _Outcome(NamedTuple):
    """Of one step, [n, ...]."""

    obs: np.ndarray  # [n, O] float32
    reward: np.ndarray  # [n] float64
    terminated: np.ndarray  # [n] bool
    truncated: np.ndarray  # [n] bool
    lost: np.ndarray  # [n] bool: the prediction was not finite


class _Rows:
    """n episodes in a model, side by side. A row's course depends on the seed, its number and its own actions alone:
    every step draws the noise and the next first observation of every row, whether a row needs them or not."""

    def __init__(
        self,
        model: Dynamics,
        starts: Tensor | np.ndarray,
        horizon: int,
        num_envs: int,
        reward: Function | None,
        terminal: Function | None,
        seed: int,
        ctx: Tensor | None,
        dt: float,
    ) -> None:
        if not isinstance(model, Dynamics):
            raise AdapterError(
                f"a model as an environment: got a {type(model).__name__}, expected a Dynamics, as configs build it"
            )
        spec, starts = model.spec, torch.as_tensor(starts)
        floats = [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]
        like = floats[0] if floats else starts
        ctx = (first_context(model, like.device) if ctx is None else ctx).to(like)
        problems = [
            ("num_envs", num_envs, "at least 1", num_envs >= 1),
            ("horizon", horizon, "at least 1", horizon >= 1),
            ("starts", list(starts.shape), f"[N, {spec.obs}], N >= 1", _is_table(starts, spec.obs)),
            ("starts that are not finite", int((~starts.isfinite()).sum()), "none", bool(starts.isfinite().all())),
            (
                "ctx",
                list(ctx.shape),
                f"[G, {spec.ctx}] with a G that divides the {num_envs} environments",
                _is_table(ctx, spec.ctx) and num_envs % len(ctx) == 0,
            ),
            ("a model that takes actions of width", spec.act, "at least 1", spec.act >= 1),
            ("dt", dt, "more than 0, finite", 0 < dt < np.inf),
        ]
        if wrong := [f"got {name} {got}, expected {want}" for name, got, want, holds in problems if not holds]:
            raise AdapterError(f"a model as an environment: {'; '.join(wrong)}")
        self.model, self.starts, self.horizon, self.n = model, starts.to(like), horizon, num_envs
        obs = self.starts[:1].repeat(2, 1)
        try:
            check_reward(model, reward)
            check_functions(obs, like.new_zeros(2, spec.act), obs, reward=reward, terminal=terminal)
        except ValueError as error:
            raise AdapterError(f"a model as an environment: {error}") from None
        self.reward, self.terminal = reward, terminal
        self.dt = like.new_full((num_envs, 1), dt)
        with torch.no_grad():
            self.cond = model.condition(ctx)
        self.noise = torch.Generator(like.device)
        self.obs: Any = None  # [n, O], once an episode has begun
        self.lost = 0
        self.seed(seed, seeding.np_random(seed)[0])
        self.observation_space = spaces.Box(-np.inf, np.inf, (spec.obs,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (spec.act,), np.float32)

    def seed(self, seed: int | None, rng: np.random.Generator) -> None:
        """rng draws the first observations; the model's noise is that of a torch generator seeded with `seed`."""
        self.rng = rng
        if seed is not None:
            self.noise.manual_seed(seed)
        self.draw()

    @torch.no_grad()
    def begin(self, fresh: np.ndarray | None = None) -> np.ndarray:
        """New episodes in the rows fresh [n], by default in all. Returns every row's observation [n, O]."""
        if fresh is not None and self.obs is None:
            raise AdapterError("reset: got a reset_mask before any episode has begun; call reset without one first")
        first = self.starts[torch.as_tensor(self.next, device=self.starts.device)]
        state = self.model.init(first, self.cond)
        if fresh is None:
            self.state, self.obs, self.steps = state, first, np.zeros(self.n, dtype=np.int64)
        else:
            mask = torch.as_tensor(fresh, device=first.device)
            self.state, self.obs = choose(mask, (state, first), (self.state, self.obs))
            self.steps[fresh] = 0
        return self.seen()

    def draw(self, fresh: np.ndarray | None = None) -> None:
        """Which first observations come next; in the rows fresh [n] alone by a stream apart, so that the others' stays
        as it is."""
        rng = self.rng if fresh is None else self.rng.spawn(1)[0]
        drawn = rng.integers(len(self.starts), size=self.n)
        self.next = drawn if fresh is None else np.where(fresh, drawn, self.next)

    def seen(self) -> np.ndarray:
        return self.obs.float().cpu().numpy().copy()  # a copy: who gets it may write to it

    @torch.no_grad()
    def step(self, actions: Any, fresh: np.ndarray | None = None) -> _Outcome:
        """actions [n, A]. Rows that are fresh [n] begin an episode instead."""
        act = torch.as_tensor(np.asarray(actions), dtype=self.dt.dtype, device=self.dt.device)
        if act.shape != (want := (self.n, self.model.spec.act)):
            raise AdapterError(f"got actions {list(act.shape)}, expected {list(want)}")
        if self.obs is None:
            raise AdapterError("step: no episode has begun; call reset first")
        act, obs = act.clamp(-1, 1), self.obs
        noise = self.model.draw(self.n, 1, self.noise)
        state, pred = self.model.step(self.state, StepInput(act, noise, self.dt), self.cond)
        reward = pred.reward if self.reward is None else self.reward(obs, act, pred.obs)
        sound = pred.obs.float().isfinite().all(-1) & reward.isfinite()
        end = torch.zeros_like(sound) if self.terminal is None else sound & self.terminal(obs, act, pred.obs)
        self.state, self.obs = choose(sound, (state, pred.obs), (self.state, obs))
        self.draw()
        self.steps += 1
        flags = torch.stack([end, ~sound]).cpu().numpy()
        out = _Outcome(
            self.seen(),
            torch.where(sound, reward, 0.0).double().cpu().numpy(),
            flags[0],
            flags[1] | (self.steps >= self.horizon),
            flags[1],
        )
        if fresh is not None and fresh.any():
            for x in out[1:]:
                x[fresh] = 0
            out = out._replace(obs=self.begin(fresh))
        self.lost += int(out.lost.sum())
        return out


def _is_table(x: Tensor, width: int) -> bool:
    return x.ndim == 2 and len(x) >= 1 and x.shape[1] == width


class ModelEnv(gym.Env):
    """A model as one gymnasium environment; arguments as for `ModelVectorEnv`."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        model: Dynamics,
        starts: Tensor | np.ndarray,
        horizon: int,
        *,
        reward: Function | None = None,
        terminal: Function | None = None,
        seed: int = 0,
        ctx: Tensor | None = None,
        dt: float = 1.0,
    ) -> None:
        self.rows = _Rows(model, starts, horizon, 1, reward, terminal, seed, ctx, dt)
        self.observation_space, self.action_space = self.rows.observation_space, self.rows.action_space
        self.np_random = self.rows.rng

    @property
    def lost(self) -> int:
        """Episodes that a prediction which is not finite has ended."""
        return self.rows.lost

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.rows.seed(seed, self.np_random)
        obs = self.rows.begin()[0]
        self.rows.draw()
        return obs, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, lost = self.rows.step(np.asarray(action)[None])
        info = {"lost": True} if lost[0] else {}
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info


class ModelVectorEnv(VectorEnv):
    """A model as num_envs gymnasium environments, stepped by one call of the model.

    starts [N, O]: observations, one of which, drawn anew, begins each episode. horizon: steps after which an episode is
    truncated. reward, terminal: functions of (obs [B, O], act [B, A], next obs [B, O]), as the loops take them; by
    default the model's own reward, and no end but the horizon. seed: of starts and the model's noise, until `reset` is
    given another. ctx [G, C]: the contexts of the rows, contiguous, G dividing num_envs; by default that of the
    first system that the model was fitted to. dt: the length of a step, as stored with the model's data.

    Actions are in [-1, 1], what leaves that is clipped; observations are raw, in float32. A prediction (observation or
    reward) that is not finite truncates its row's episode: the row keeps its last observation, earns nothing, is
    marked "lost" in the infos and counted in `lost`. A row's course depends on the seed, its number and its own
    actions, not on other rows. As gymnasium prescribes: under NEXT_STEP the step after an end begins the next episode,
    ignores the action and earns nothing; under SAME_STEP the end returns the first observation of the next, and
    infos["final_obs"] holds the last of that which ended. reset(options={"reset_mask": [num_envs] bool}) begins anew
    in some rows.

    Raises AdapterError for arguments that do not fit the model or each other."""

    def __init__(
        self,
        model: Dynamics,
        starts: Tensor | np.ndarray,
        horizon: int,
        num_envs: int = 1,
        *,
        reward: Function | None = None,
        terminal: Function | None = None,
        seed: int = 0,
        ctx: Tensor | None = None,
        dt: float = 1.0,
        autoreset: AutoresetMode = AutoresetMode.NEXT_STEP,
    ) -> None:
        if autoreset not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise AdapterError(f"ModelVectorEnv: got autoreset {autoreset}, expected NEXT_STEP or SAME_STEP")
        self.rows = _Rows(model, starts, horizon, num_envs, reward, terminal, seed, ctx, dt)
        self.metadata = {"render_modes": [], "autoreset_mode": autoreset}
        self.num_envs = num_envs
        self.single_observation_space = self.rows.observation_space
        self.single_action_space = self.rows.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.np_random = self.rows.rng
        self.ended = np.zeros(num_envs, dtype=np.bool_)

    @property
    def lost(self) -> int:
        """Episodes that a prediction which is not finite has ended."""
        return self.rows.lost

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.rows.seed(seed, self.np_random)
        mask = (options or {}).get("reset_mask")
        mask = None if mask is None else np.asarray(mask)
        if mask is not None and (mask.shape != (self.num_envs,) or mask.dtype != np.bool_):
            got = f"{mask.dtype} of shape {mask.shape}"
            raise AdapterError(f"reset: got a reset_mask of {got}, expected bool of shape ({self.num_envs},)")
        self.ended = np.zeros_like(self.ended) if mask is None else self.ended & ~mask
        obs = self.rows.begin(mask)
        self.rows.draw(mask)
        return obs, {}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        same = self.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        out = self.rows.step(actions, None if same else self.ended)
        obs, ended, infos = out.obs, out.terminated | out.truncated, {}
        if same:
            for i in np.flatnonzero(ended):
                final = {"lost": True} if out.lost[i] else {}
                infos = self._add_info(infos, {"final_obs": obs[i].copy(), "final_info": final}, int(i))
            if ended.any():
                obs = self.rows.begin(ended)
        else:
            self.ended = ended
            if out.lost.any():
                infos = {"lost": out.lost, "_lost": out.lost.copy()}
        return obs, out.reward, out.terminated, out.truncated, infos


class ModelVecEnv(VecEnv):
    """A model as a stable-baselines3 `VecEnv`; arguments, units and what is lost as for `ModelVectorEnv`.

    An end resets its row at once; infos[i] then holds the ended episode's last observation as "terminal_observation",
    and "TimeLimit.truncated" says whether the horizon, or a prediction that is not finite, ended it, so that agents
    bootstrap there. Wrap it in stable-baselines3's `VecMonitor` to log returns."""

    render_mode = None

    def __init__(
        self,
        model: Dynamics,
        starts: Tensor | np.ndarray,
        horizon: int,
        num_envs: int = 1,
        *,
        reward: Function | None = None,
        terminal: Function | None = None,
        seed: int = 0,
        ctx: Tensor | None = None,
        dt: float = 1.0,
    ) -> None:
        self.rows = _Rows(model, starts, horizon, num_envs, reward, terminal, seed, ctx, dt)
        super().__init__(num_envs, self.rows.observation_space, self.rows.action_space)

    @property
    def lost(self) -> int:
        """Episodes that a prediction which is not finite has ended."""
        return self.rows.lost

    def reset(self) -> np.ndarray:
        """Rows share one seed, the first of those that `seed` set."""
        if (seed := self._seeds[0]) is not None:
            self.rows.seed(seed, seeding.np_random(seed)[0])
        self._reset_seeds()
        self._reset_options()
        obs = self.rows.begin()
        self.rows.draw()
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        obs, reward, terminated, truncated, lost = self.rows.step(self.actions)
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": bool(x)} for x in truncated & ~terminated]
        for i in np.flatnonzero(done):
            infos[i]["terminal_observation"] = obs[i].copy()
            if lost[i]:
                infos[i]["lost"] = True
        if done.any():
            obs = self.rows.begin(done)
        return obs, reward.astype(np.float32), done, infos

    def close(self) -> None:
        """Nothing is held open."""

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """For all rows, which share what there is."""
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: int | Iterable[int] | None = None, **method_kwargs: Any
    ) -> list[Any]:
        raise AttributeError(f"the rows of a ModelVecEnv are one model's; there is no {method_name!r} of a single one")

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper], indices: int | Iterable[int] | None = None
    ) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


# ---------------------------------------------------------------- policies as checkpoints


def sb3_path(agent: Any, path: str | Path, seed: int = 0) -> Path:
    """The file that `to_sb3` writes. Raises AdapterError for what it cannot, before any work."""
    if not isinstance(agent, Sac):
        raise AdapterError(f"to_sb3: got a {type(agent).__name__}, expected a Sac; other policies have no counterpart")
    if not 0 <= seed < agent.seeds:
        raise AdapterError(f"to_sb3: got seed {seed}, expected 0 .. {agent.seeds - 1}")
    path = Path(path)
    path = path if path.suffix else path.with_name(path.name + ".zip")
    if path.is_dir():
        raise AdapterError(f"to_sb3: {path} is a folder, expected the name of a file; name another")
    return path


def to_sb3(
    agent: Sac,
    env_id: str | gym.Env,
    path: str | Path,
    seed: int = 0,
    act_low: Any = None,
    act_high: Any = None,
) -> Path:
    """Write one seed of an agent as a stable-baselines3 SAC checkpoint, which `SAC.load` reads and can train on.
    Returns its path, ending in .zip where the given one has no ending.

    The environment fixes the spaces that the checkpoint states. act_low, act_high [A]: the actions that -1 and 1 stand
    for, by default its bounds; others, which must lie within these, are what the checkpoint states, so that its policy
    acts as the agent does (to train on, it then wants an environment with these bounds, as gymnasium's RescaleAction
    makes one). An agent's normaliser goes into the first layers. Critics with layer normalisation have no counterpart:
    theirs are then new ones, with a warning.

    Raises AdapterError where agent and environment do not fit, the agent is no SAC, or a folder has the path."""
    from stable_baselines3 import SAC

    path = sb3_path(agent, path, seed)
    config = agent.config
    env = made = make(env_id) if isinstance(env_id, str) else env_id
    try:
        _fits(agent.spec, env, str(env_id))
        if act_low is not None or act_high is not None:
            env = _bounded(env, act_low, act_high, str(env_id))
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
            made.close()
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
    path.parent.mkdir(parents=True, exist_ok=True)
    memory = io.BytesIO()
    model.save(memory)
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_bytes(memory.getvalue())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def from_sb3(
    path: str | Path,
    spec: Spec,
    config: SacConfig,
    generator: torch.Generator | None = None,
    seeds: int = 1,
    normalizer: tuple[Tensor, Tensor] | None = None,
) -> Sac:
    """A stable-baselines3 SAC checkpoint as an agent: policy, critics, their targets and temperature, the same in each
    of `seeds`. Nothing is unpickled: of the file only tensors and plain JSON are read.

    normalizer: (mean, std) [O] by which an agent with `normalize` reads observations; the checkpoint's first layers,
    which read them raw, are rescaled so that policy and values are the same. Without one it reads them raw.

    Statistics of a VecNormalize wrapper lie outside the checkpoint: a policy trained with one sees other observations
    than the environment's and is not what its file alone says. Raises AdapterError for a file that is no such
    checkpoint, of another algorithm or another network; FileNotFoundError for none."""
    path = Path(path)
    if not isinstance(config, SacConfig):
        raise AdapterError(f"from_sb3: got a {type(config).__name__} to build, expected a SacConfig")
    data, tensors, rest = read_checkpoint(path)
    check_kind(path, data, tensors)
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
    if normalizer is not None:
        agent.set_normalizer(*normalizer)
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


def _bounded(env: gym.Env, low: Any, high: Any, name: str) -> gym.Env:
    """The environment as one whose actions have these bounds [A]."""
    box: Any = env.action_space
    low, high = (np.asarray(x, dtype=np.float32) for x in (low, high))
    if all(x.shape == y.shape and np.allclose(x, y) for x, y in ((low, box.low), (high, box.high))):
        return env
    fits = low.shape == high.shape == box.shape and (low < high).all()
    if not (fits and (box.low <= low).all() and (high <= box.high).all()):
        raise AdapterError(
            f"to_sb3: got actions from {low.tolist()} to {high.tolist()}, expected bounds within those of {name}, "
            f"{box.low.tolist()} to {box.high.tolist()}, at which a checkpoint's actions are not clipped; name another "
            "environment"
        )
    env = gym.Wrapper(env)
    env.action_space = spaces.Box(low, high, dtype=box.dtype)
    return env


# ---------------------------------------------------------------- reading


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
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


def check_kind(path: Path, data: dict[str, Any], tensors: dict[str, Tensor]) -> None:
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
