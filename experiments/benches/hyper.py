"""Hypernetworks and changing worlds: a training step with the anchors of ten past tasks, against one that runs the
hypernetwork once for each task and uses torch's own Adam; and steps of the environment a second in batched collection
over contexts, against one gymnasium loop.

Widths of a half cheetah (17 obs, 6 act), the generated network 4 x 200, batch 100, for hypernetworks [50, 50] and
[256, 256]."""

import copy
import time

import numpy as np
import torch
from torch import nn

from mbrl import device as devices
from mbrl.core import Spec
from mbrl.data import Dataset
from mbrl.dynamics.hyper import Hyper, HyperConfig, HyperFit, fit_hyper
from mbrl.fit import Rows

PAST, BATCH = 10, 100


def data(device: torch.device) -> Dataset:
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    obs, act = normal(5000, 17), normal(5000, 6).tanh()
    yes, bound = torch.ones(5000, dtype=torch.bool), torch.ones(6)
    after = obs + 0.1 * normal(5000, 17)
    return Dataset(obs, act, obs[:, 0], after, ~yes, yes, torch.tensor([0, 5000]), -bound, bound).to(device)


class Naive:
    """The published update as usually written."""

    def __init__(self, model: Hyper, given: Dataset, fit: HyperFit) -> None:
        self.model, self.fit = model, fit
        self.theta = [p for k, p in model.named_parameters() if k != "contexts"]
        self.own = model.contexts.detach()[PAST : PAST + 1].clone().requires_grad_()
        self.slow, self.fast = torch.optim.Adam(self.theta, fit.lr), torch.optim.Adam([self.own], fit.lr_context)
        self.rows = Rows(given, 1, model.head)
        self.past = model.contexts.detach()[:PAST].clone()
        self.goal = [model.generate(e[None]).detach() for e in self.past]
        self.generator = torch.Generator().manual_seed(0)
        self.ahead = copy.deepcopy(model)

    def __call__(self) -> None:
        model, fit = self.model, self.fit
        pick = torch.randint(5000, (BATCH,), generator=self.generator).to(self.rows.table.device)
        loss = model.loss_of(model.generate(self.own), self.rows.segment(pick))
        grads = torch.autograd.grad(loss, [*self.theta, self.own])
        moved = [p for k, p in self.ahead.named_parameters() if k != "contexts"]
        with torch.no_grad():
            for p, q, g in zip(self.theta, moved, grads, strict=False):
                s = self.slow.state[p]
                t = int(s["step"]) + 1 if s else 1
                mean = 0.9 * s["exp_avg"] + 0.1 * g if s else 0.1 * g
                square = 0.999 * s["exp_avg_sq"] + 0.001 * g * g if s else 0.001 * g * g
                q.copy_(p - fit.lr * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8))
        anchor = torch.zeros((), device=loss.device)
        for e, want in zip(self.past, self.goal, strict=True):
            anchor = anchor + ((want - self.ahead.generate(e[None])) ** 2).sum()
        pulls = torch.autograd.grad(fit.beta / PAST * anchor, moved)
        for p, g, pull in zip(self.theta, grads, pulls, strict=False):
            p.grad = g + pull
        self.own.grad = grads[-1]
        nn.utils.clip_grad_norm_(self.theta, fit.clip)
        self.slow.step()
        self.fast.step()


def step(hyper: tuple[int, int], device: torch.device, seconds: float) -> dict[str, float]:
    """Milliseconds an update of both, in turns, after a check that they do the same."""
    given, spec = data(device), Spec(17, 6, 10, PAST + 1)
    fresh = lambda: HyperConfig(hyper=hyper).build(spec, torch.Generator().manual_seed(0)).to(device)
    ours, theirs = fresh(), fresh()
    for model in (ours, theirs):
        model.prepare(given.windows(1))
    fit = HyperFit(updates=2)
    naive = Naive(theirs, given, fit)
    fit_hyper(ours, given, PAST, fit, torch.Generator().manual_seed(0))
    naive()
    naive()
    torch.testing.assert_close(ours.head, theirs.head, rtol=1e-3, atol=2e-5)
    kept: dict[str, list[float]] = {"ours": [], "naive": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(kept["ours"]) < 3:
        n = 50 if device.type != "cpu" else 5 if hyper[0] < 100 else 2
        begun: list[float] = []
        tell = lambda *_, begun=begun: begun.append(time.perf_counter())
        fit_hyper(ours, given, PAST, HyperFit(updates=n + 1), torch.Generator().manual_seed(0), tell, every=1)
        kept["ours"].append((begun[-1] - begun[0]) / n)
        devices.synchronize(device)
        start = time.perf_counter()
        for _ in range(n):
            naive()
        devices.synchronize(device)
        kept["naive"].append((time.perf_counter() - start) / n)
    ms = {k: 1e3 * float(np.median(v)) for k, v in kept.items()}
    return ms | {"ratio": ms["naive"] / ms["ours"]}


def collection(seconds: float) -> dict[str, dict[str, float]]:
    """Steps a second, over the tasks of a sequence."""
    from mbrl_envs import contexts

    found = {}
    for name in ("cheetah-body", "pusher", "cartpole-pole"):
        tasks = contexts.tasks(name)[:5]
        rates: dict[str, list[float]] = {"ours": [], "loop": []}
        contexts.collect(tasks, 200, seed=0)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(rates["ours"]) < 2:
            start = time.perf_counter()
            contexts.collect(tasks, 4000, seed=0)
            rates["ours"].append(len(tasks) * 4000 / (time.perf_counter() - start))
            env = tasks[0].env()
            env.reset(seed=0)
            rng, start = np.random.default_rng(0), time.perf_counter()
            low, high = env.action_space.low, env.action_space.high  # pyright: ignore[reportAttributeAccessIssue]
            for _ in range(4000):
                _, _, terminated, truncated, _ = env.step(rng.uniform(low, high).astype(np.float32))
                if terminated or truncated:
                    env.reset()
            rates["loop"].append(4000 / (time.perf_counter() - start))
            env.close()
        middle = {k: float(np.median(v)) for k, v in rates.items()}
        found[name] = middle | {"ratio": middle["ours"] / middle["loop"]}
    return found


def run(harness) -> dict:
    devices.keep_memory()
    out: dict = {str(list(h)): step(h, harness.device, harness.seconds) for h in ((50, 50), (256, 256))}
    if harness.device.type == "cpu":
        out["collection"] = collection(harness.seconds)
    return out
