"""Reference scores of our own for gymnasium's tasks: 0 is the uniform random policy, 100 a SAC policy.

    python experiments/v5_scores.py [--envs ENV ...] [--policy ENV=policy.zip:STEPS ...] [--seed 0] [--episodes 100]

`min` is the mean return of `--episodes` episodes of uniform actions, `max` that of as many episodes of the mean action
of a policy trained by `mbrl collect --quality expert` (stable-baselines3's SAC). Each `--policy` states the steps of
its training, and `--trained` the command. Without a policy `max` stays what it is in the file, null at first: no score
of that task can be normalised. The result is merged into envs/mbrl_envs/data/v5_scores.json, entry by entry.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from mbrl_envs.collect import SCORES, atomic, load_actor, measure, versions
from rich.console import Console
from rich.table import Table

TASKS = [
    "InvertedPendulum",
    "InvertedDoublePendulum",
    "Reacher",
    "Pusher",
    "Swimmer",
    "Hopper",
    "HalfCheetah",
    "Walker2d",
    "Ant",
]
ENVS = ["Pendulum-v1", *(f"{task}-v5" for task in TASKS)]


def of(returns: np.ndarray) -> tuple[float, float]:
    """Mean, and its standard error."""
    return round(float(returns.mean()), 4), round(float(returns.std(ddof=1) / len(returns) ** 0.5), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description="Reference scores of gymnasium's tasks.")
    parser.add_argument("--envs", nargs="*", default=[], help="measure the random policy here; all tasks: all")
    parser.add_argument("--policy", metavar="ENV=ZIP:STEPS", help="measure this policy of that many training steps")
    parser.add_argument("--trained", default="", help="the command that trained it, recorded as it is given")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=SCORES)
    args = parser.parse_args()
    scores: dict[str, dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    said = f"--episodes {args.episodes} --seed {args.seed}"
    for env in ENVS if args.envs == ["all"] else args.envs:
        mean, error = of(measure(env, args.episodes, args.seed))
        entry = {"min": mean, "min_error": error, "max": None, "episodes": args.episodes, "train_steps": None}
        entry["command"] = f"python experiments/v5_scores.py --envs {env} {said}"
        kept = {k: v for k, v in scores.get(env, {}).items() if k.startswith(("max", "train"))}
        scores[env] = entry | kept | {"versions": versions()}
    if args.policy:
        env, _, rest = args.policy.partition("=")
        path, _, steps = rest.rpartition(":")
        if env not in scores or not path or not steps.isdigit():
            parser.error(f"--policy is {args.policy!r}, expected ENV=ZIP:STEPS with an ENV that has a min by --envs")
        mean, error = of(measure(env, args.episodes, args.seed, load_actor(Path(path), env)))
        trained = args.trained or f"mbrl collect --env {env} --quality expert --train-steps {steps}"
        scores[env] |= {"max": mean, "max_error": error, "train_steps": int(steps)}
        scores[env]["max_command"] = (
            f"{trained}; python experiments/v5_scores.py --policy {env}=<the .zip>:{steps} {said}"
        )
    order = {env: i for i, env in enumerate(ENVS)}
    scores = dict(sorted(scores.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
    with atomic(args.out) as tmp:
        tmp.write_text(json.dumps(scores, indent=1) + "\n")
    table = Table("task", "random", "SAC", "steps of training", title=f"mean of {args.episodes} episodes")
    for env, e in scores.items():
        show = lambda k, e=e: "" if e.get(k) is None else f"{e[k]:.5g} +- {e[k + '_error']:.2g}"
        table.add_row(env, show("min"), show("max"), str(e["train_steps"] or ""))
    Console().print(table)


if __name__ == "__main__":
    main()
