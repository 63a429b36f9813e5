"""A refrigerator whose data cover a narrow band of temperatures: what a model fitted to them says outside of it, alone
and with the dynamics reward choosing among its candidates.

    python experiments/refrigerator.py

The data are PI control around 4 degrees Celsius. The test: the same starts, then the actions of policies that leave the
band (compressor off, at full power, other set-points), replayed open loop in the model, in the model filtered by its
dynamics reward, and in the model filtered by an oracle that takes the candidate nearest to the truth. "outside": steps
at which the true temperature is beyond the data's range. One-step errors there start from the true temperature;
open-loop errors from the model's own. "nearest the anchors" is an ablation: the regression inside the
reward without the discriminator. The test goes some 80 standard deviations of the data away, so the bound at which the
filter holds candidates is wider here than its default. Writes experiments/results/refrigerator.json and .png.
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
from mbrl_envs.control import Refrigerator, collect, excursions
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mbrl import device as devices
from mbrl.core import Dynamics, StepInput
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.filtered import DynamicsReward, FilterConfig, Filtered, RewardConfig, fit_reward
from mbrl.fit import FitConfig, fit
from mbrl.rollout import steps, unroll
from mbrl.run import to_plain, versions, write_json

RESULTS = Path(__file__).parent / "results"
console = Console()


@dataclass(frozen=True)
class Args:
    seeds: int = 3
    episodes: int = 20
    """Of the behaviour's data, 200 steps each."""
    length: int = 100
    """Steps of a test trajectory."""
    starts: int = 20
    """Test trajectories of each policy."""
    ensemble: EnsembleConfig = field(default_factory=lambda: EnsembleConfig(hidden=(64,) * 3, weight_decay=(5e-5,) * 4))
    fit: FitConfig = field(default_factory=FitConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    filter: FilterConfig = field(default_factory=lambda: FilterConfig(temperature=0.0, clip=250.0))
    out: Path = RESULTS / "refrigerator.json"


class Oracle(nn.Module):
    """A dynamics reward that knows the simulator."""

    def __init__(self, fridge: Refrigerator) -> None:
        super().__init__()
        self.fridge = fridge

    def forward(self, obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        return -(next_obs[:, 0] - self.fridge.step(obs[:, 0], act)).abs()


class Nearest(nn.Module):
    """The ablation: the nearer the anchors' mean, the better."""

    def __init__(self, reward: DynamicsReward) -> None:
        super().__init__()
        self.of = reward

    def forward(self, obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        return -self.of.features(obs, act, next_obs)[:, -1].abs()


def trajectories(fridge: Refrigerator, args: Args, seed: int) -> tuple[list[str], Tensor, Tensor]:
    """The policies' names; temperatures [P, N, T + 1] without noise; actions [P, N, T, 1]."""
    names, temps, acts = [], [], []
    still = dataclasses.replace(fridge, noise=0.0)
    for name, policy in excursions().items():
        data = collect(args.starts, args.length, seed + 1000, still, policy)
        path = data.obs.reshape(args.starts, args.length)
        last = data.next_obs.reshape(args.starts, args.length)[:, -1:]
        names.append(name)
        temps.append(torch.cat([path, last], 1))
        acts.append(data.act.reshape(args.starts, args.length, 1))
    return names, torch.stack(temps), torch.stack(acts)


@torch.no_grad()
def errors(model: Dynamics, temps: Tensor, act: Tensor, dt: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """One-step errors and open-loop errors [R, T] in K, and the open-loop path [R, T]."""
    n, length = act.shape[:2]
    g = devices.generator(seed)
    noise = torch.stack([model.draw(n, 1, g) for _ in range(length)], 1)
    dts = torch.full_like(act[..., :1], dt)
    flat = StepInput(act.flatten(0, 1), noise.flatten(0, 1), dts.flatten(0, 1))
    one = model.step(model.init(temps[:, :-1].reshape(-1, 1), ()), flat, ())[1].obs.reshape(n, length)
    _, pred = unroll(model, model.init(temps[:, :1], ()), steps(StepInput(act, noise, dts)), ())
    path = pred.obs[..., 0]
    return one - temps[:, 1:], path - temps[:, 1:], path


def one_seed(args: Args, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    fridge = Refrigerator()
    data = collect(args.episodes, 200, seed, fridge)
    g = devices.generator(seed)
    clock = time.perf_counter()
    model = args.ensemble.build(data.spec, g)
    report = fit(model, data, args.fit, g)
    fitted = time.perf_counter() - clock
    reward = fit_reward(model, data, args.reward, devices.generator(seed + 1))
    names, temps, act = trajectories(fridge, args, seed)
    low, high = float(data.obs.min()), float(data.obs.max())
    flat_temps, flat_act = temps.flatten(0, 1), act.flatten(0, 1)
    outside = (flat_temps[:, :-1] < low) | (flat_temps[:, :-1] > high)  # [R, T]
    nearest = Filtered(model, Nearest(reward), candidates=args.filter.candidates, temperature=0.0)
    oracle = Filtered(model, Oracle(fridge), candidates=args.filter.candidates, temperature=0.0)
    figures, paths = {}, {}
    models = {"plain": model, "MOREC": args.filter.build(model, reward), "oracle": oracle}
    for name, m in (models | {"nearest the anchors": nearest}).items():
        one, free, path = errors(m, flat_temps, flat_act, data.dt, seed)
        rms = lambda e, where: float(e[where].double().square().mean().sqrt())
        figures[name] = {
            "one step, outside": rms(one, outside),
            "open loop, outside": rms(free, outside),
            "one step, inside": rms(one, ~outside),
            "open loop, inside": rms(free, ~outside),
            "one step, outside, mean absolute": float(one[outside].abs().mean()),
            "open loop, outside, mean absolute": float(free[outside].abs().mean()),
        }
        by = free.reshape(len(names), args.starts, -1), outside.reshape(len(names), args.starts, -1)
        figures[name]["open loop, by policy"] = {
            policy: rms(by[0][i], by[1][i]) for i, policy in enumerate(names) if by[1][i].any()
        }
        paths[name] = path.reshape(len(names), args.starts, -1)[:, 0], one
    facts = {
        "seed": seed,
        "band": [low, high],
        "share_outside": float(outside.float().mean()),
        "epochs": report.epochs,
        "seconds": {"model": fitted, "reward": time.perf_counter() - clock - fitted},
    }
    shown = {"names": names, "temps": temps[:, 0], "flat": flat_temps[:, :-1], "paths": paths, "band": (low, high)}
    return facts | figures, shown


def draw(shown: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names, colours = shown["names"], {"plain": "tab:red", "MOREC": "tab:blue", "oracle": "tab:green"}
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(3.2 * (len(names) + 1), 3.2), layout="constrained")
    for i, name in enumerate(names):
        axes[i].axhspan(*shown["band"], color="0.9", label="data")
        axes[i].plot(shown["temps"][i], "k--", label="truth")
        for who, colour in colours.items():
            axes[i].plot(range(1, shown["temps"].shape[1]), shown["paths"][who][0][i], color=colour, label=who)
        span = shown["temps"][i]
        axes[i].set_ylim(float(span.min()) - 10, float(span.max()) + 10)
        axes[i].set(title=f"policy: {name}", xlabel="step")
    axes[0].set_ylabel("temperature (degrees Celsius)")
    axes[0].legend(fontsize=7)
    axes[-1].axvspan(*shown["band"], color="0.9")
    for who, colour in colours.items():
        order = shown["flat"].flatten().argsort()
        x, y = shown["flat"].flatten()[order], shown["paths"][who][1].flatten()[order].abs()
        bins = torch.linspace(float(x[0]), float(x[-1]), 41)
        at = torch.bucketize(x, bins)
        mids = [(float(x[at == b].mean()), float(y[at == b].mean())) for b in at.unique()]
        axes[-1].plot(*zip(*mids, strict=True), color=colour)
    axes[-1].set(yscale="log", title="one-step error", xlabel="temperature (degrees Celsius)", ylabel="K")
    figure.savefig(path, dpi=70)
    plt.close(figure)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    runs, shown = [], None
    for seed in range(args.seeds):
        run, picture = one_seed(args, seed)
        runs.append(run)
        shown = shown or picture
        console.log(f"seed {seed}", run)
    assert shown is not None
    keys = [k for k in runs[0]["plain"] if k != "open loop, by policy"]
    medians = {
        who: {k: statistics.median(r[who][k] for r in runs) for k in keys} for who in ("plain", "MOREC", "oracle")
    }
    ratio = {
        who: {k: statistics.median(r[who][k] / r["plain"][k] for r in runs) for k in keys}
        for who in ("MOREC", "oracle")
    }
    config = {"length": args.length, "starts": args.starts, "episodes": args.episodes, "seeds": args.seeds}
    config |= {k: to_plain(getattr(args, k)) for k in ("ensemble", "fit", "reward", "filter")}
    facts = {"versions": versions(), "machine": devices.describe(torch.device("cpu"))}
    facts |= {"wall_seconds": time.perf_counter() - start, "unit": "K, root mean square unless said"}
    RESULTS.mkdir(exist_ok=True)
    write_json(args.out, {"config": config, **facts, "median": medians, "median_over_plain": ratio, "seeds": runs})
    draw(shown, args.out.with_suffix(".png"))
    table = Table(title=f"Refrigerator, errors in K (root mean square); medians of {args.seeds} seeds")
    for column in ("", *medians, *(f"{who} / plain" for who in ratio)):
        table.add_column(column, justify="left" if not column else "right")
    for k in keys:
        cells = [medians[who][k] for who in ("plain", "MOREC", "oracle")] + [
            ratio[who][k] for who in ("MOREC", "oracle")
        ]
        table.add_row(k, *(f"{c:.3f}" for c in cells))
    console.print(table)
    print(json.dumps({"median": medians, "median_over_plain": ratio}))


if __name__ == "__main__":
    main(tyro.cli(Args))
