"""Small worlds and stand-ins that several tests share."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mbrl.core import Markov, Prediction, Spec, StepInput
from mbrl.data import Dataset
from mbrl.offline import Forget
from mbrl.run import Run


class Line(Markov):
    """x' = 0.9 x + 0.5 a, reward -x'^2, a doubt |x'| and, for each part p, a next state p further on."""

    def __init__(self, parts: int = 1, noise_dim: int = 0) -> None:
        super().__init__()
        self.spec, self.noise_dim, self.parts = Spec(1, 1), noise_dim, parts
        self.anchor = nn.Parameter(torch.zeros(1))

    def step(self, state: Tensor, inp: StepInput, cond):
        x = 0.9 * state + 0.5 * inp.act + 0 * self.anchor
        return x, Prediction(x, -(x[:, 0] ** 2), {"doubt": x[:, 0].abs()})

    def each(self, state, inp, cond, k):
        pred = self.branch(state, inp, cond, k)[1]
        obs = torch.stack([pred.obs + p for p in range(self.parts)])
        return Prediction(obs, pred.reward.expand(self.parts, -1), {})

    def loss(self, segment, noise):
        x = self.step(segment.obs[:, 0], StepInput(segment.act[:, 0], noise[:, 0], segment.dt[:, 0]), ())[0]
        loss = ((x - segment.obs[:, 1]) ** 2).mean()
        return loss, {}


def line_data(n: int = 400, seed: int = 0, episode: int = 20) -> Dataset:
    """Random actions in `Line`, in episodes of a fixed length that time out."""
    g = torch.Generator().manual_seed(seed)
    obs, after = torch.zeros(n, 1), torch.zeros(n, 1)
    act = torch.rand(n, 1, generator=g) * 2 - 1
    for i in range(n):
        obs[i] = torch.randn(1, generator=g) if i % episode == 0 else after[i - 1]
        after[i] = 0.9 * obs[i] + 0.5 * act[i]
    starts = torch.arange(0, n + 1, episode)
    false = torch.zeros(n, dtype=torch.bool)
    low = torch.full((1,), -1.0)
    reward = -(after[:, 0] ** 2)
    return Dataset(obs, act, reward, after, false, ~false, starts, low, -low, name="line", sha256=f"{seed:064x}")


def never(obs: Tensor, act: Tensor, after: Tensor) -> Tensor:
    return torch.zeros(len(obs), dtype=torch.bool)


class Constant:
    """A stand-in for an agent: one action, and a value that is the sum of the observation."""

    def __init__(self, act: float = 0.5, n_act: int = 1) -> None:
        self.value, self.n_act = act, n_act

    def act(self, obs, noise=None):
        return torch.full((*obs.shape[:-1], self.n_act), self.value)

    def q(self, obs, act, target=False):
        return torch.stack([obs.sum(-1), obs.sum(-1) + 1], 1)


class Box:
    """What a loop reads of a gymnasium Box."""

    def __init__(self, low: list[float], high: list[float]) -> None:
        self.low, self.high = np.array(low, np.float32), np.array(high, np.float32)
        self.shape, self.dtype = self.low.shape, self.low.dtype


class LineEnv:
    """`Line` with gymnasium's interface: actions of [-2, 4] stand for [-1, 1]; an episode is cut after `length` steps
    and ends beyond |x| > edge. What it was asked is kept: `seeds`, `acts`."""

    def __init__(self, length: int = 20, edge: float = np.inf) -> None:
        self.observation_space, self.action_space = Box([-np.inf], [np.inf]), Box([-2.0], [4.0])
        self.length, self.edge = length, edge
        self.seeds: list[int] = []
        self.acts: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None):
        assert seed is not None
        self.seeds.append(seed)
        self.x, self.t = np.random.default_rng(seed).normal(size=1).astype(np.float32), 0
        return self.x, {}

    def step(self, action):
        self.acts.append(action)
        self.x = (0.9 * self.x + 0.5 * ((action + 2) / 3 - 1)).astype(np.float32)
        self.t += 1
        ended = bool(abs(self.x[0]) > self.edge)
        return self.x, -float(self.x[0] ** 2), ended, self.t == self.length and not ended, {}


def earned(policy):
    """The return of 20 steps of the line from x = 2."""
    x, total = torch.full((1, 1), 2.0), 0.0
    for _ in range(20):
        x = 0.9 * x + 0.5 * policy(x).clamp(-1, 1)
        total -= (x**2).item()
    return [total]


class Memory(Forget):
    """Keeps what is saved, facts as a file would, and can be made to fail after a number of saves."""

    def __init__(self, saves=10**9):
        self.kept, self.left, self.lines = {}, saves, []

    def log(self, stage, step, values):
        self.lines.append((stage, step, dict(values)))

    def save(self, name, tensors, facts):
        self.kept[name] = ({k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(facts, default=str)))
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def load(self, name):
        return self.kept.get(name)


@contextmanager
def interrupted(saves: int):
    """Ctrl-C right after a run's save of that number. Yields the names of what was saved."""
    save, names = Run.save, []

    def failing(self, name, *rest):
        save(self, name, *rest)
        names.append(name)
        if len(names) == saves:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", failing)
        yield names
