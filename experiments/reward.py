"""The dynamics reward on Hopper: does it tell real transitions from the model's, and is the candidate that it chooses
nearer to the truth than the others, on the data's own distribution and on that of policies which the data did not see?

    python experiments/reward.py --data DIR        # DIR holds hopper-medium-v5.hdf5 and hopper-mixed-v5.hdf5

For each seed: an ensemble fitted to hopper-medium without the episodes held out, then a dynamics reward against it.
"in": the held-out episodes. "out": hopper-mixed. The figure is the mean squared error of the chosen candidate over the
mean of all ten candidates' (5 elites x 2 samples), each dimension in units of the standard deviation of its one-step
change. The nulls do without a dynamics reward: the candidate nearest the ensemble's mean; the ensemble's mean itself.
"nearest the anchors' mean" is an ablation: the networks inside the reward that are fitted by regression, without the
discriminator.
Writes experiments/results/reward_hopper.json.
"""

import dataclasses
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from mbrl_envs.datasets import load
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl import device as devices
from mbrl.core import StepInput
from mbrl.data import Dataset
from mbrl.dynamics.ensemble import Ensemble, EnsembleConfig
from mbrl.dynamics.filtered import HIGHEST, DynamicsReward, FilterConfig, RewardConfig, fit_reward
from mbrl.fit import FitConfig, fit
from mbrl.rollout import steps, unroll
from mbrl.run import to_plain, versions, write_json

RESULTS = Path(__file__).parent / "results"
console = Console()


@dataclass(frozen=True)
class Args:
    data: Path
    """The folder with the two files."""
    seeds: int = 3
    model_updates: int = 6_000
    """Of the ensemble, in whole epochs; the first try's number, well before its early stopping."""
    rows: int = 4_000
    """Transitions to evaluate on, of each kind."""
    windows: int = 500
    """Open-loop windows of 20 steps, of each kind."""
    ablate: bool = False
    """Also, on the first seed: the plain discriminator, a trained generator, multi-step generated states."""
    out: Path = RESULTS / "reward_hopper.json"
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


def without(data: Dataset, episodes: Tensor) -> Dataset:
    """The data with the steps of these episodes left unpaired: nothing is learned from them."""
    return dataclasses.replace(data, paired=data.paired & ~torch.isin(data.episode, episodes))


def auc(above: Tensor, below: Tensor) -> float:
    """How often a value of the first is above one of the second; ties count half."""
    both = torch.cat([above, below]).double()
    _, place, count = both.unique(return_inverse=True, return_counts=True)
    ranks = (count.cumsum(0) - (count - 1) / 2.0)[place]
    n, m = len(above), len(below)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


@torch.no_grad()
def choices(model: Ensemble, reward: DynamicsReward, data: Dataset, index: Tensor, seed: int) -> dict[str, float]:
    """Errors over the mean candidate's, and the AUC of r_D."""
    g, k = devices.generator(seed), 10
    obs, act, after = data.obs[index], data.act[index], data.next_obs[index]
    dt = torch.full_like(obs[:, :1], data.dt)
    noise, gumbel = model.draw(len(obs), k, g), torch.randn(len(obs), k, generator=g)
    candidates = model.branch(obs, StepInput(act, noise, dt), (), k)[1].obs.reshape(len(obs), k, -1)
    unit = reward.change.std
    square = lambda x: ((x - after.reshape(-1, *[1] * (x.ndim - 2), x.shape[-1])) / unit).square().mean(-1)
    errors = square(candidates)  # [B, K]
    base = errors.mean()
    nearest = lambda x: errors.gather(1, ((candidates - x[:, None]) / unit).square().mean(-1).argmin(1)[:, None])
    still = noise.reshape(len(obs), k, -1).clone()
    still[..., :-1] = 0.0  # each elite's mean, each twice
    mean = model.branch(obs, StepInput(act, still.flatten(1), dt), (), k)[1].obs.reshape(len(obs), k, -1).mean(1)
    figures = {
        "oracle": float(errors.amin(1).mean() / base),
        "null: the ensemble's mean": float(square(mean).mean() / base),
    }
    figures["null: nearest the ensemble's mean"] = float(nearest(mean).mean() / base)
    if reward.anchor is not None:
        x = reward.inputs(torch.cat([obs, act], -1))
        anchor = obs + reward.change.inverse(reward.anchor(x[None]).mean(0))
        figures["ablation: nearest the anchors' mean"] = float(nearest(anchor).mean() / base)
        figures["ablation: the anchors' mean"] = float(square(anchor).mean() / base)
    for choice in ("scaled", "published"):
        for temperature in (0.0, 0.1):
            rule = FilterConfig(candidates=k, temperature=temperature, choice=choice).build(model, reward)
            own = torch.cat([noise, gumbel], 1) if temperature else noise
            pred = rule.step(obs, StepInput(act, own, dt), ())[1]
            name = f"chosen: {choice}, {f'softmax {temperature}' if temperature else 'argmax'}"
            figures[name] = float(square(pred.obs).mean() / base)
            if choice == "scaled":
                low = HIGHEST - pred.uncertainty["implausibility"] < 0.6
                figures[f"share below 0.6, {name}"] = float(low.float().mean())
    real, (fake, _) = reward(obs, act, after), reward.rank(obs, act, candidates[:, 0])
    figures["share below 0.6, real"] = float((real < 0.6).float().mean())
    figures["auc of r_D"] = auc(real, fake)
    figures["auc of the logits"] = auc(reward.rank(obs, act, after)[1], reward.rank(obs, act, candidates[:, 0])[1])
    return figures | {"mean candidate's error": float(base)}


@torch.no_grad()
def open_loop(
    model: Ensemble, reward: DynamicsReward, data: Dataset, index: Tensor, seed: int, length: int = 20
) -> dict[str, float]:
    """Over windows of the data's actions: the root mean square error at the last step, each dimension in standard
    deviations of the observation; the median over the windows, and the mean of the square root."""
    windows = data.windows(length, index)
    unit, figures = reward.inputs.std[: data.spec.obs], {}
    for name, rule in {
        "without": model,
        "with, argmax": FilterConfig(temperature=0.0).build(model, reward),
        "with, softmax 0.1": FilterConfig().build(model, reward),
    }.items():
        g = devices.generator(seed)
        noise = torch.stack([rule.draw(len(index), 1, g) for _ in range(length)], 1)
        inputs = steps(StepInput(windows.act, noise, windows.dt))
        _, pred = unroll(rule, rule.init(windows.obs[:, 0], ()), inputs, ())
        error = ((pred.obs - windows.obs[:, 1:]) / unit).square().mean(-1).sqrt()  # [B, T]
        figures[f"{name}: median at step {length}"] = float(error[:, -1].median())
        figures[f"{name}: mean at step {length}"] = float(error[:, -1].mean())
        figures[f"{name}: median over steps 1 to {length}"] = float(error.mean(1).median())
    return figures


def measure(
    model: Ensemble, reward: DynamicsReward, sets: dict[str, tuple[Dataset, Tensor, Tensor]], seed: int
) -> dict:
    return {
        name: choices(model, reward, data, rows, seed) | open_loop(model, reward, data, windows, seed)
        for name, (data, rows, windows) in sets.items()
    }


def one_seed(args: Args, medium: Dataset, mixed: Dataset, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    g = devices.generator(seed)
    held = torch.randperm(medium.episodes, generator=g)[: max(1, medium.episodes // 10)]
    train = without(medium, held)
    pick = lambda index, n: index[torch.randperm(len(index), generator=g)[:n]]
    sets = {}
    for name, data, apart in (("in", medium, torch.isin(medium.episode, held)), ("out", mixed, mixed.paired)):
        rows = pick((data.paired & apart).nonzero()[:, 0], args.rows)
        begin = torch.arange(len(data))
        whole = apart & (begin + 20 < data.starts[1:][data.episode])
        sets[name] = (data, rows, pick(whole.nonzero()[:, 0], args.windows))
    clock = time.perf_counter()
    model = args.ensemble.build(medium.spec, g)
    epochs = max(1, round(args.model_updates / (int(train.paired.sum()) // 256)))
    report = fit(model, train, FitConfig(max_epochs=epochs), g)
    seconds = {"model": time.perf_counter() - clock}
    console.log(f"seed {seed}: the model, {report.steps} updates in {seconds['model']:.0f} s, best {report.best}")

    def learn(config: RewardConfig) -> tuple[dict, float]:
        clock = time.perf_counter()
        reward = fit_reward(model, train, config, devices.generator(seed + 1))
        spent = time.perf_counter() - clock
        return measure(model, reward, sets, seed), spent

    figures, seconds["reward"] = learn(args.reward)
    console.log(f"seed {seed}: the reward in {seconds['reward']:.0f} s", figures)
    extra = {}
    if args.ablate and seed == 0:
        change = lambda **kw: dataclasses.replace(args.reward, **kw)
        for name, config in {
            "no anchors": change(anchors=0, spread=0.0, updates=6_000),
            "no spread": change(spread=0.0),
            "penalty 0.1": change(penalty=0.1),
            "spread 3": change(spread=3.0),
            "trained generator": change(generator="trained"),
            "multi-step, 5": change(length=5, batch=64),
        }.items():
            ablated, spent = learn(config)
            extra[name] = ablated | {"seconds": spent}
            console.log(f"{name}: {spent:.0f} s", ablated)
    facts = {"held_out_error": report.best, "model_steps": report.steps, "seconds": seconds}
    return {"seed": seed, **figures, **facts}, extra


def main(args: Args) -> None:
    torch.set_num_threads(1)
    medium, mixed = (load(args.data / f"hopper-{x}-v5.hdf5") for x in ("medium", "mixed"))
    start, runs, ablations = time.perf_counter(), [], {}
    for seed in range(args.seeds):
        run, extra = one_seed(args, medium, mixed, seed)
        runs, ablations = [*runs, run], ablations | extra
        names = list(run["in"])
        medians = {where: {n: statistics.median(r[where][n] for r in runs) for n in names} for where in ("in", "out")}
        config = {k: to_plain(v) for k, v in dataclasses.asdict(args).items() if k not in ("data", "out")}
        config |= {"ensemble": to_plain(args.ensemble), "reward": to_plain(args.reward)}
        RESULTS.mkdir(exist_ok=True)
        write_json(
            args.out,
            {
                "config": config,
                "data": {x.name: x.sha256 for x in (medium, mixed)},
                "versions": versions(),
                "machine": devices.describe(medium.obs.device),
                "wall_seconds": time.perf_counter() - start,
                "median": medians,
                "seeds": runs,
                "ablations_seed_0": ablations,
            },
        )
    table = Table(title=f"The dynamics reward, hopper-medium; medians of {args.seeds} seeds")
    for column in ("", "in: held-out episodes", "out: hopper-mixed"):
        table.add_column(column, justify="left" if not column else "right")
    for name in medians["in"]:
        table.add_row(name, *(f"{medians[where][name]:.3f}" for where in ("in", "out")))
    console.print(table)
    print(json.dumps(medians))


if __name__ == "__main__":
    main(tyro.cli(Args))
