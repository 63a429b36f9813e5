"""Small worlds and stand-ins that several tests share."""

import torch
from torch import Tensor, nn

from mbrl.core import Markov, Prediction, Spec, StepInput
from mbrl.data import Dataset


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
