"""A whole plan by CEM: the widths of a half cheetah, 4 x 200, five members, 30 steps, 400 candidates, 5 iterations. A
particle keeps its member (TS-infinity); one member a particle and step is counted: 2 x 131 800 operations."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benches import uncompiled
from mbrl.core import Segment, Spec
from mbrl.device import graphed
from mbrl.dynamics.ensemble import Ensemble, EnsembleConfig
from mbrl.planner import CEM, Plan, Worth, fresh, search, value

PLANNER = replace(CEM, horizon=30, samples=400, iterations=5, elites=40)
FLOPS = 2 * 131_800 * PLANNER.samples * PLANNER.horizon * PLANNER.iterations  # of one environment and particle


def model_on(device: torch.device) -> Ensemble:
    """A prepared ensemble of five."""
    generator = torch.Generator().manual_seed(0)
    model = EnsembleConfig(members=5, elites=5, uncertainty=()).build(Spec(17, 6), generator).to(device)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(device)
    obs, after, reward = normal(512, 17), normal(512, 17), normal(512, 1)
    mask, one = reward > -torch.inf, torch.ones(512, 1, 1, device=device)
    system = torch.zeros(1, dtype=torch.int64, device=device)
    act = normal(512, 1, 6).tanh()
    model.prepare(Segment(torch.stack([obs, obs + 0.1 * after], 1), act, reward, ~mask, mask, one, system))
    return model.requires_grad_(False)


def task(obs: Tensor, act: Tensor, after: Tensor) -> Tensor:
    """A half cheetah's: forward velocity less the price of the actions."""
    return after[:, 8] - 0.1 * act.square().sum(-1)


def planned(model: Ensemble, envs: int, particles: int, device: torch.device):
    """A function that plans, with the same noise each time."""
    generator = torch.Generator(device).manual_seed(0)
    obs = torch.randn(envs, 17, generator=generator, device=device)
    white = PLANNER.noise(envs, 6, generator, obs)
    noise = [model.draw(envs, particles, generator) for _ in range(PLANNER.horizon)]
    part = torch.arange(particles, device=device).repeat(envs)
    dt, worth = torch.ones(envs, 1, device=device), Worth(particles=particles)

    def plan(obs: Tensor, start: Plan, white: list[Tensor], noise: list[Tensor]) -> tuple[Tensor, Plan]:
        cond = model.pinned(part)
        f = lambda acts: value(worth, model, obs, cond, acts, noise, dt, reward=task)
        found, after = search(PLANNER, f, start, white)
        return found.acts, after

    given = (obs, fresh(PLANNER, envs, 6, obs), white, noise)
    whole = graphed(plan, *given)
    return lambda: whole(*given)


def naive(model: Ensemble, device: torch.device):
    """One environment as usually written: each candidate has drawn its member, the candidates of one member are
    gathered, and the mean and the standard deviation are those of the elites."""
    generator = torch.Generator(device).manual_seed(0)
    start = torch.randn(17, generator=generator, device=device)
    weights, biases = list(model.net.weights), list(model.net.biases)
    upper, lower = model.upper, model.lower

    def plan() -> Tensor:
        mean = torch.zeros(PLANNER.horizon, 6, device=device)
        std = torch.full_like(mean, PLANNER.std)
        n = PLANNER.samples
        for _ in range(PLANNER.iterations):
            noise = torch.randn(n, PLANNER.horizon, 6, generator=generator, device=device)
            acts = (mean + std * noise).clamp(-1, 1)
            obs, total = start.expand(n, -1), torch.zeros(n, device=device)
            order = torch.randperm(n, generator=generator, device=device).reshape(5, -1)
            for t in range(PLANNER.horizon):
                x = model.inputs(torch.cat([obs, acts[:, t]], -1))[order]
                for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
                    x = x @ w + b
                    x = F.silu(x) if i < len(weights) - 1 else x
                mu, raw = x.chunk(2, -1)
                logvar = upper - F.softplus(upper - raw)
                logvar = lower + F.softplus(logvar - lower)
                y = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator, device=device)
                delta = torch.empty(n, 18, device=device)
                delta[order.flatten()] = y.flatten(0, 1)
                after = obs + delta[:, :-1]
                total = total + task(obs, acts[:, t], after)
                obs = after
            elite = acts[total.topk(PLANNER.elites).indices]
            mean, std = elite.mean(0), elite.std(0)
        return mean

    return plan


@torch.no_grad()
def run(harness) -> dict[str, dict[str, float]]:
    device = harness.device
    model = model_on(device)
    shapes = {"1 environment": (1, 1), "5 particles": (1, 5), "16 environments": (16, 1)}
    if device.type == "cuda":
        shapes = {
            "1 environment": (1, 1),
            "5 particles": (1, 5),
            "64 environments": (64, 1),
            "1024 environments": (1024, 1),
        }
    fns = {name: planned(model, *shape, device) for name, shape in shapes.items()}
    flops = {name: FLOPS * envs * particles for name, (envs, particles) in shapes.items()}
    fns["1 environment, naive"] = naive(model, device)
    flops["1 environment, naive"] = FLOPS
    if device.type == "cpu":
        fns["5 particles, nothing compiled"] = uncompiled(fns["5 particles"])
        flops["5 particles, nothing compiled"] = 5 * FLOPS
    rows = harness.compare(fns, flops)
    for name, (envs, _) in shapes.items():
        rows[name]["plans_per_s"] = 1e3 * envs / rows[name]["ms"]
    return rows
