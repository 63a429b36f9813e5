"""The contract of a dynamics learner.

Shapes: B rows, T time, O observation, A action, C context, W noise, K futures, G groups, S seeds.
Every leaf of a state has the rows as its leading axis. Every leaf of a condition leads with its own G, which divides
B; rows are contiguous by group. Repeating rows keeps them contiguous, so a condition is never copied: a step views its
rows as [G, B / G] and multiplies with `bmm`.
"""

import abc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Tree = Any


@dataclass(frozen=True)
class Spec:
    """What the data fix about a system, before any learner is chosen: the widths of its observations, actions and
    contexts, and the number of systems that the data hold."""

    obs: int
    act: int = 0
    ctx: int = 0
    systems: int = 1


class StepInput(NamedTuple):
    """What acts on the system over one interval. Only to be read: rows may share their memory."""

    act: Tensor  # [B, A]  in [-1, 1], held over the interval; A is 0 for an autonomous system
    noise: Tensor  # [B, W]  standard normal, W = model.noise_dim
    dt: Tensor  # [B, 1]  the interval's length


class Prediction(NamedTuple):
    """What a learner says of the end of the interval."""

    obs: Tensor  # [B, O]
    reward: Tensor  # [B]  zeros where the learner has no reward head
    uncertainty: dict[str, Tensor]  # named, [B] each, >= 0, larger is worse


class Segment(NamedTuple):
    """Windows of trajectories, contiguous by system; what is masked is finite and weighs nothing."""

    obs: Tensor  # [B, T + 1, O]  obs[:, t + 1] follows obs[:, t] under act[:, t]
    act: Tensor  # [B, T, A]
    reward: Tensor  # [B, T]
    terminal: Tensor  # [B, T] bool
    mask: Tensor  # [B, T] bool
    dt: Tensor  # [B, T, 1]
    system: Tensor  # [G]  rows in a learner's table of contexts


class Dynamics(nn.Module, abc.ABC):
    """A learned system. Its methods are pure in everything but the parameters: no hidden state, no random draw, no
    host synchronisation, shapes fixed by the inputs' shapes. `mbrl.testing.check_dynamics` runs the contract."""

    spec: Spec
    noise_dim: int
    parts: int = 1  # how many independently trained parts it has (an ensemble's members)
    noisy_loss: bool = True  # whether `loss`, `losses` and `validate` read their noise; where not, `fit` gives zeros
    schedules: tuple[str, ...] = ()  # the buffers that `advance` writes
    tells_reward: bool = True  # whether a step predicts the reward; where not, it is 0

    def condition(self, ctx: Tensor) -> Tree:
        """[G, C] -> what a rollout needs of its contexts, once per rollout."""
        return ()

    def context(self, system: Tensor) -> Tensor:
        """The contexts [G, C], as `condition` takes them, of systems [G] of the data that it was fitted to: rows of its
        table, for a learner that has one; else zeros."""
        like = next(self.parameters(), torch.zeros((), device=system.device))
        return like.new_zeros(len(system), self.spec.ctx)

    def pinned(self, part: Tensor) -> Tree:
        """[G] -> the condition under which one part alone steps group g, all the way (TS-infinity): of those that take
        part in rollouts, number part[g], counted round. A learner of one part that needs no context has nothing to
        pin; one that has contexts or parts overrides this."""
        return ()

    @abc.abstractmethod
    def init(self, obs: Tensor, cond: Tree) -> Tree:
        """The state at a first observation [B, O]."""

    @abc.abstractmethod
    def observe(self, state: Tree, cond: Tree) -> Tensor:
        """[B, O]; after a step, exactly the observation that the step predicted."""

    @abc.abstractmethod
    def step(self, state: Tree, inp: StepInput, cond: Tree) -> tuple[Tree, Prediction]:
        """One interval on."""

    def branch(self, state: Tree, inp: StepInput, cond: Tree, k: int) -> tuple[Tree, Prediction]:
        """k futures of each state: inp.noise is [B, k * W], results are [B * k, ...], contiguous by row.
        Override where one evaluation serves all k; the results must stay those of k steps."""
        if self.noise_dim == 0:
            return repeat(self.step(state, inp, cond), k)
        noise = inp.noise.reshape(-1, self.noise_dim)
        state, act, dt = repeat((state, inp.act, inp.dt), k)
        return self.step(state, StepInput(act, noise, dt), cond)

    def draw(self, n: int, k: int, generator: torch.Generator) -> Tensor:
        """[n, k * W]: the noise of k futures of n rows, each standard normal; override to stratify over k."""
        return randn(self, n, k * self.noise_dim, generator)

    def each(self, state: Tree, inp: StepInput, cond: Tree, k: int) -> Prediction:
        """k futures of each state by every part that takes part in rollouts (an ensemble's elites), under the same
        noise [B, k * W]: leaves are [parts, B * k, ...]. What the parts' disagreement about a value is read from."""
        return pytree.tree_map(lambda x: x[None], self.branch(state, inp, cond, k)[1])

    @abc.abstractmethod
    def correct(self, state: Tree, obs: Tensor, alpha: float | Tensor, cond: Tree) -> Tree:
        """The state pulled towards a real observation. alpha ([] or [B, 1]): 0 leaves the state, whatever obs holds;
        1 imposes what can be imposed and replaces a state that is not finite by `init(obs)`."""

    @abc.abstractmethod
    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss, and what to log. noise: [B, T, W]."""

    # What `fit` asks of a learner. The defaults serve any learner that is one part and needs no preparation.

    def prepare(self, segment: Segment) -> None:
        """Called once before a fit with (a sample of) the training data: set normalisers and other buffers."""

    def groups(self) -> list[dict]:
        """Parameter groups for the optimiser, as torch.optim takes them (a "weight_decay" each, say)."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def losses(self, segment: Segment, noise: Tensor) -> Tensor:
        """[parts]: each part's loss on its own rows. Rows are contiguous by part."""
        return self.loss(segment, noise)[0][None]

    def validate(self, segment: Segment, noise: Tensor) -> Tensor:
        """[parts]: each part's held-out error, all on the same rows; lower is better."""
        return self.loss(segment, noise)[0].detach()[None]

    def advance(self, segment: Segment) -> None:
        """Called after each update with its batch: the one place that writes schedules (a forcing's strength, a
        regulariser's weight), which are buffers that a captured update reads."""

    def finish(self, errors: Tensor) -> None:
        """Called once after a fit with the best held-out error of each part [parts] (an ensemble picks its elites)."""

    def measure(self, segment: Segment) -> None:
        """Called last, with (a sample of) the training data and the parameters that the fit keeps: set buffers that
        say something about these (how large their errors are)."""

    def forward(self, f: Callable, *args):
        """f(self, *args): through this, `functional_call` and `vmap` reach every method and every loop."""
        return f(self, *args)


class Markov(Dynamics):
    """A learner whose state is the observation."""

    def init(self, obs: Tensor, cond: Tree) -> Tree:
        return obs

    def observe(self, state: Tree, cond: Tree) -> Tensor:
        return state

    def correct(self, state: Tree, obs: Tensor, alpha: float | Tensor, cond: Tree) -> Tree:
        return pull(state, obs, alpha)


# ---------------------------------------------------------------- rows and groups


def pull(x: Tensor, y: Tensor, alpha: float | Tensor) -> Tensor:
    """x moved towards y; the ends are chosen, not interpolated, since 0 * nan is nan."""
    alpha = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)
    return torch.where(alpha <= 0, x, torch.where(alpha >= 1, y, torch.lerp(x, y, alpha)))


def group(x: Tensor, g: int) -> Tensor:
    """[B, ...] -> [G, B / G, ...]"""
    return x.reshape(g, x.shape[0] // g, *x.shape[1:])


@torch.no_grad()
def first_context(model: Dynamics, device: torch.device) -> Tensor:
    """[1, C]: the context of the first system that a learner was fitted to, for who names none."""
    return model.context(torch.zeros(1, dtype=torch.int64, device=device))


def repeat(tree: Tree, n: int) -> Tree:
    """[B, ...] -> [B * n, ...], contiguous by row: for states and inputs. A condition needs no such thing."""
    return pytree.tree_map(lambda x: x.repeat_interleave(n, 0), tree)


def take(tree: Tree, index: Tensor) -> Tree:
    """From [B * K, ...], the candidate index[b] of each b."""
    rows = index.shape[0]
    return pytree.tree_map(lambda x: group(x, rows)[torch.arange(rows, device=x.device), index], tree)


def choose(mask: Tensor, new: Tree, old: Tree) -> Tree:
    """Row by row, new where the mask [B] holds."""
    return pytree.tree_map(lambda a, b: torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def rows(tree: Tree, index: Tensor) -> Tree:
    """The rows index [R] of every leaf."""
    return pytree.tree_map(lambda x: x[index], tree)


def like_of(model: nn.Module) -> Tensor:
    """A tensor of the model's type and on its device: its first floating parameter or buffer, or a zero where it has
    none."""
    floats = (x for x in itertools.chain(model.parameters(), model.buffers()) if x.is_floating_point())
    return next(floats, torch.zeros(()))


def randn(model: nn.Module, n: int, m: int, generator: torch.Generator, kind: Callable = torch.randn) -> Tensor:
    """[n, m] of the model's dtype, on its device."""
    like = like_of(model)
    return kind(n, m, generator=generator, dtype=like.dtype, device=like.device)


# ---------------------------------------------------------------- settings


class Diverged(RuntimeError):
    """A fit that cannot go on: nothing of it is finite any more."""


def check_reward(model: Dynamics, reward: Any) -> None:
    """Raises ValueError where neither a task's function nor the learner tells the reward, which would be 0."""
    if reward is None and not model.tells_reward:
        raise ValueError(
            f"reward: no function tells it, and this {type(model).__name__} has no head for it; set `reward` in its "
            "settings, or give the task's function"
        )


@torch.no_grad()
def check_functions(obs: Tensor, act: Tensor, after: Tensor, **functions: Callable | None) -> None:
    """A task's functions of (obs [B, O], act [B, A], next obs [B, O]) by name, tried on these rows. Raises ValueError
    for one that does not return [B], of bool where it is called `terminal`."""
    for name, f in functions.items():
        if f is None:
            continue
        out, want = f(obs, act, after), f"a {'bool ' * (name == 'terminal')}tensor of shape [{len(obs)}], one a row"
        bad = not isinstance(out, Tensor) or out.shape != (len(obs),)
        if bad or (name == "terminal" and out.dtype != torch.bool):
            got = f"{out.dtype} of shape {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ValueError(f"{name}: for {len(obs)} transitions the function returned {got}, expected {want}")


def check_learner(dynamics: Any) -> None:
    """Raises ValueError for what is no learner's config."""
    if isinstance(dynamics, type) or not callable(getattr(dynamics, "build", None)):
        got = f"the class {dynamics.__name__}" if isinstance(dynamics, type) else f"a {type(dynamics).__name__}"
        raise ValueError(f"dynamics: got {got}, expected a learner's config, such as EnsembleConfig()")


def check_config(who: str, config: Any, kind: type) -> None:
    """Raises ValueError for a config of another kind."""
    if not isinstance(config, kind):
        raise ValueError(f"{who}: got a {type(config).__name__} for a config, expected a {kind.__name__}")


def demand(who: str, *rules: tuple[str, Any, str, bool]) -> None:
    """rules: a setting's name, its value, what is expected, whether it holds. Raises one ValueError that names all of
    which it does not."""
    if wrong := [f"{name} is {value}, expected {want}" for name, value, want, holds in rules if not holds]:
        raise ValueError(f"{who}: {'; '.join(wrong)}")
