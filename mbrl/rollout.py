"""The loops over time: open loop, teacher-forced, and closed with a policy. They hold no state of their own."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mbrl.core import Dynamics, Prediction, Segment, StepInput, Tree, choose

Terminal = Callable[[Tensor, Tensor, Tensor], Tensor]  # (obs [B, O], act [B, A], next obs [B, O]) -> [B] bool
Reward = Callable[[Tensor, Tensor, Tensor], Tensor]  # the same -> [B]


def steps(inputs: StepInput) -> list[StepInput]:
    """[B, T, ...] -> T inputs. Loops take any iterable: a generator draws a step's noise when the step comes."""
    return [StepInput(*x) for x in zip(*(x.unbind(1) for x in inputs), strict=True)]


def stack(trees: list[Tree]) -> Tree:
    """T trees of [B, ...] -> one of [B, T, ...]."""
    return pytree.tree_map(lambda *x: torch.stack(x, 1), *trees)


def unroll(
    model: Dynamics,
    state: Tree,
    inputs: Iterable[StepInput],
    cond: Tree,
    *,
    forced: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tree, Prediction]:
    """Open loop under given inputs; with `forced` [B, T, O], teacher-forced by alpha wherever the mask [B, T] holds.
    Returns the last state and the predictions stacked over time, [B, T, ...]."""
    preds = []
    for t, inp in enumerate(inputs):
        state, pred = model.step(state, inp, cond)
        preds.append(pred)
        if forced is not None:
            state = model.correct(state, forced[:, t], alpha if mask is None else alpha * mask[:, t, None], cond)
    return state, stack(preds)


def imagine(
    model: Dynamics,
    policy: Callable[[Tensor, Tensor], Tensor],
    terminal: Terminal,
    state: Tree,
    alive: Tensor,
    noise: Iterable[tuple[Tensor, Tensor]],
    dt: Tensor,
    cond: Tree,
    system: Tensor,
) -> tuple[Tree, Tensor, Segment, dict[str, Tensor]]:
    """Closed loop, from any state.

    policy: (obs [B, O], noise) -> act [B, A]; terminal: (obs, act, next obs) -> [B] bool; alive: [B] bool;
    noise: per step, the policy's and the learner's; dt: [B, 1].
    A row ends with its terminal transition; one whose prediction is not finite ends before it. Rows that have ended
    keep their state and are masked. Returns the last state, alive, the Segment and each step's uncertainty [B, T]:
    call again to go on, with fewer rows if you like."""
    obs, out = model.observe(state, cond), []
    first = obs
    for act_noise, model_noise in noise:
        act = policy(obs, act_noise)
        new, pred = model.step(state, StepInput(act, model_noise, dt), cond)
        mask = alive & pred.obs.isfinite().all(-1) & pred.reward.isfinite()
        end = mask & terminal(obs, act, pred.obs)
        alive = mask & ~end
        still = pytree.tree_map(torch.zeros_like, pred)._replace(obs=obs)
        state, pred = choose(mask, (new, pred), (state, still))
        obs = pred.obs
        out.append((pred, act, end, mask, dt))
    pred, act, end, mask, dt = stack(out)
    segment = Segment(torch.cat([first[:, None], pred.obs], 1), act, pred.reward, end, mask, dt, system)
    return state, alive, segment, pred.uncertainty


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x [..., D] over D and wherever the mask [...] holds; 0 where it holds nowhere."""
    return torch.where(mask[..., None], x, 0.0).sum() / (mask.sum().clamp(min=1) * x.shape[-1])


def transitions(segment: Segment) -> tuple[Tensor, Tensor]:
    """What a learner of single steps is fitted to: inputs (observation, action) [B * T, O + A] and targets (change of
    the observation, reward) [B * T, O + 1]."""
    now, after = segment.obs[:, :-1], segment.obs[:, 1:]
    x = torch.cat([now, segment.act], -1)
    y = torch.cat([after - now, segment.reward[..., None]], -1)
    return x.flatten(0, 1), y.flatten(0, 1)


def forced_mse(
    model: Dynamics, segment: Segment, noise: Tensor, alpha: float | Tensor, cond: Tree
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss. alpha 1: one-step; 0: free-running; between: generalized teacher forcing (Hess et al., ICML 2023)."""
    state = model.init(segment.obs[:, 0], cond)
    inputs = steps(StepInput(segment.act, noise, segment.dt))
    _, pred = unroll(model, state, inputs, cond, forced=segment.obs[:, 1:], alpha=alpha, mask=segment.mask)
    mse = masked_mean((pred.obs - segment.obs[:, 1:]) ** 2, segment.mask)
    return mse, {"mse": mse.detach()}
