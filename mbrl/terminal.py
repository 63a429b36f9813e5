"""A learned termination function, for data whose task's own is not known."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbrl.core import Spec
from mbrl.data import Dataset
from mbrl.nets import Normalizer, StackedMLP


@dataclass(frozen=True)
class TerminalConfig:
    hidden: tuple[int, ...] = (128, 128)
    batch: int = 256  # half of it transitions that end the task
    steps: int = 3000
    lr: float = 1e-3  # falls to zero along a cosine
    weight_decay: float = 1e-4
    holdout: float = 0.2  # of the transitions of either kind


class TerminalHead(nn.Module):
    """(obs [B, O], act [B, A], next_obs [B, O]) -> [B] bool: whether the transition ends the task, by a classifier on
    all three, standardised.

    `endings` counts the terminal transitions that it learned from; where that is zero it never ends anything.
    `accuracy` is its balanced accuracy on held-out transitions, NaN where they were too few to tell."""

    endings: Tensor
    prior: Tensor
    accuracy: Tensor

    def __init__(self, obs: int, act: int, config: TerminalConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        width = 2 * obs + act
        self.inputs = Normalizer(width)
        self.net = StackedMLP(1, [width, *config.hidden, 1], generator=generator)
        self.register_buffer("endings", torch.zeros((), dtype=torch.int64))
        self.register_buffer("prior", torch.zeros(()))  # log odds of an ending in the data
        self.register_buffer("accuracy", torch.full((), torch.nan))

    def logit(self, obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        """[B]: the log odds of an ending at the data's own frequency. The classifier is trained on as many endings as
        others, so that its own logit has odds of one to begin with; the difference is `prior`."""
        x = self.inputs(torch.cat([obs, act, next_obs], -1))
        return self.net(x[None])[0, :, 0] + self.prior

    def forward(self, obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        return (self.logit(obs, act, next_obs) > 0) & (self.endings > 0)

    def describe(self) -> str:
        """One line for a log."""
        if self.endings == 0:
            return "terminal head: no transition with a successor ends the task; imagined ones never do"
        accuracy = float(self.accuracy)
        shown = "not known: too few endings to hold any out" if accuracy != accuracy else f"{accuracy:.3f}"
        return f"terminal head: learned from {int(self.endings)} endings, balanced accuracy {shown}"


def restored(state: Mapping[str, Tensor], spec: Spec, config: TerminalConfig) -> TerminalHead:
    """A head that was learned, from its state."""
    head = TerminalHead(spec.obs, spec.act, config)
    head.load_state_dict(dict(state))
    return head


def fit_terminal(data: Dataset, config: TerminalConfig, generator: torch.Generator) -> TerminalHead:
    """Trains a head on the transitions whose successor is known. Warns where these hold none of the data's endings."""
    spec, device = data.spec, data.obs.device
    head = TerminalHead(spec.obs, spec.act, config, generator).to(data.obs)
    index = data.paired.nonzero()[:, 0]
    x = torch.cat([data.obs, data.act, data.next_obs], 1)[index]
    label = data.terminal[index]
    if not label.any() or label.all():
        head.endings.fill_(int(label.sum()))
        head.prior.fill_(torch.inf if len(label) and label.all() else -torch.inf)
        if not label.any() and (n := int(data.terminal.sum())):
            warnings.warn(
                f"{data.name or 'data'}: {head.describe()}, since the {n} that end it have none; "
                "pass data with next_observations, or name an environment whose termination is known",
                stacklevel=2,
            )
        return head.requires_grad_(False)
    head.inputs.fit(x)
    x = head.inputs(x)
    kinds = []  # (train, held out) rows, of those that do not end the task and of those that do
    for kind in (False, True):
        rows = (label == kind).nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=generator, device=generator.device).to(device)
        cut = int(len(rows) * config.holdout)
        kinds.append((rows[order[cut:]], rows[order[:cut]]))
    half = config.batch // 2
    target = torch.cat([x.new_zeros(half), x.new_ones(half)])
    optimizer = torch.optim.AdamW(head.net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for _ in range(config.steps):
        pick = [
            rows[torch.randint(len(rows), (half,), generator=generator, device=generator.device).to(device)]
            for rows, _ in kinds
        ]
        logit = head.net(x[torch.cat(pick)][None])[0, :, 0]
        loss = F.binary_cross_entropy_with_logits(logit, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    head.endings.fill_(int(label.sum()))
    head.prior.copy_(label.double().mean().logit())
    with torch.no_grad():
        said = [head.net(x[held][None])[0, :, 0] + head.prior > 0 for _, held in kinds]
    right = torch.stack([(y == kind).double().mean() for kind, y in enumerate(said)])
    head.accuracy.copy_(right.mean())
    return head.requires_grad_(False)
