"""MOREC (Luo et al., ICLR 2024, arXiv 2310.05422): a dynamics reward r_D(s, a, s'), learned adversarially, that real
transitions maximise, and a filter that chooses among the candidates of any learner by it.

A discriminator D(s, a, s') tells the data's transitions from a generator's; snapshots of it, each with its mean logits
on either, are kept. With z_k the logit of snapshot k, clamped to [learner_k, expert_k] and rescaled to [-1, 1],

    p_k = sigmoid(z_k),    r_D = -log(1 - mean_k p_k),    in [log(1 + 1/e), log(1 + e)] = [0.313, 1.313].
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbrl.core import Dynamics, Prediction, Segment, Spec, StepInput, Tree, demand, group, randn, repeat, take
from mbrl.data import Dataset
from mbrl.fit import SAMPLE, FitConfig, Rows, noise_of
from mbrl.nets import Normalizer, StackedMLP, uniform

HIGHEST = math.log(1 + math.e)  # of r_D; implausibility is counted from here

# ---------------------------------------------------------------- the filter


@dataclass(frozen=True)
class FilterConfig:
    """candidates: how many futures the inner learner offers. temperature: of the softmax by which one is drawn; 0 takes
    the best. choice: what the softmax reads. "published" is r_D itself, whose clamps leave many candidates equal;
    "scaled" is the mean of the snapshots' logits without the clamps, standardised over the candidates of a row, so that
    a temperature means the same whatever the reward's range. "implausibility" is of r_D either way.
    clip: candidates are held within so many standard deviations of the data (or as far out as the data themselves
    reach). chunk: candidates scored at a time; it bounds the memory and changes no result."""

    candidates: int = 10
    temperature: float = 0.1
    choice: Literal["published", "scaled"] = "scaled"
    clip: float = 25.0
    chunk: int = 16_384

    def build(self, inner: Dynamics, reward: "DynamicsReward") -> "Filtered":
        if not self.clip >= 0:
            raise ValueError(f"FilterConfig: clip is {self.clip}, expected 0 standard deviations or more")
        low, high = reward.bounds(self.clip)
        return Filtered(
            inner,
            reward,
            candidates=self.candidates,
            temperature=self.temperature,
            choice=self.choice,
            low=low,
            high=high,
            chunk=self.chunk,
        )


@final
class Filtered(Dynamics):
    """Of K futures that any learner offers, one that a dynamics reward finds likely. The state, the condition and the
    training are the inner learner's; `fit` trains the inner learner and leaves the reward as it is.

    reward: a module (obs [B, O], act [B, A], next_obs [B, O]) -> r_D [B]; for the choice "scaled" (see `FilterConfig`)
    one that has `rank`, as `DynamicsReward` does. low, high [O]: bounds of a candidate's observation; one beyond them
    is corrected to the bound, its state too. Reports "implausibility" = log(1 + e) - r_D
    of the chosen candidate, at least 0, infinite where no candidate is finite; a filter of a filter reports the worse
    of the two. The noise is that of the K futures, then K columns for the choice where the temperature is above 0."""

    low: Tensor
    high: Tensor
    reward: Any  # nn.Module; its `rank` is found where it is called

    def __init__(
        self,
        inner: Dynamics,
        reward: nn.Module,
        *,
        candidates: int = 10,
        temperature: float = 0.1,
        choice: Literal["published", "scaled"] = "published",
        low: Tensor | None = None,
        high: Tensor | None = None,
        chunk: int = 16_384,
    ) -> None:
        super().__init__()
        if candidates < 1 or not temperature >= 0 or chunk < 1:
            raise ValueError(
                f"Filtered: got candidates {candidates}, temperature {temperature}, chunk {chunk}; "
                "expected candidates >= 1, temperature >= 0, chunk >= 1"
            )
        if choice not in ("published", "scaled"):
            raise ValueError(f"Filtered: choice is {choice!r}, expected 'published' or 'scaled'")
        self.inner, self.reward, self.k, self.temperature = inner, reward, candidates, temperature
        self.choice, self.chunk = choice, chunk
        self.spec, self.parts, self.noisy_loss = inner.spec, inner.parts, inner.noisy_loss
        self.tells_reward = inner.tells_reward
        self.schedules = tuple(f"inner.{name}" for name in inner.schedules)
        self.noise_dim = candidates * (inner.noise_dim + (temperature > 0))
        like = next(inner.parameters())
        end = like.new_full((inner.spec.obs,), torch.inf)
        self.register_buffer("low", (-end if low is None else low.to(like)).clone())
        self.register_buffer("high", (end if high is None else high.to(like)).clone())

    def condition(self, ctx: Tensor) -> Tree:
        return self.inner.condition(ctx)

    def context(self, system: Tensor) -> Tensor:
        return self.inner.context(system)

    def pinned(self, part: Tensor) -> Tree:
        return self.inner.pinned(part)

    def init(self, obs: Tensor, cond: Tree) -> Tree:
        return self.inner.init(obs, cond)

    def observe(self, state: Tree, cond: Tree) -> Tensor:
        return self.inner.observe(state, cond)

    def correct(self, state: Tree, obs: Tensor, alpha: float | Tensor, cond: Tree) -> Tree:
        return self.inner.correct(state, obs, alpha, cond)

    def draw(self, n: int, k: int, generator: torch.Generator) -> Tensor:
        """Each future's candidates are drawn as the inner learner draws K futures: stratified where it does so."""
        inner = self.inner.draw(n * k, self.k, generator)
        choice = randn(self, n * k, self.noise_dim - inner.shape[1], generator)
        return torch.cat([inner, choice], -1).reshape(n, k * self.noise_dim)

    def step(self, state: Tree, inp: StepInput, cond: Tree) -> tuple[Tree, Prediction]:
        draws, choice = self._split(inp.noise)
        state, pred, r, score = self._candidates(state, inp._replace(noise=draws), cond)  # r, score [B, K]
        if self.temperature > 0:  # the largest of score / T + Gumbel noise is a draw from softmax(score / T)
            u = torch.special.ndtr(choice).clamp(1e-6, 1 - 1e-6)
            score = score / self.temperature - (-u.log()).log()
        best = score.argmax(-1)
        state, pred = take((state, pred), best)
        own = (HIGHEST - r.gather(1, best[:, None])[:, 0]).clamp(min=0)
        own = torch.maximum(own, pred.uncertainty.get("implausibility", own))
        return state, Prediction(pred.obs, pred.reward, pred.uncertainty | {"implausibility": own})

    def _split(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.k * self.inner.noise_dim
        return noise[:, :inner], noise[:, inner:]

    def _candidates(self, state: Tree, inp: StepInput, cond: Tree) -> tuple[Tree, Prediction, Tensor, Tensor]:
        """All K candidates [B * K, ...], within the bounds; their r_D and what the choice reads, [B, K] each and -inf
        where a candidate is not finite."""
        n = inp.act.shape[0]
        obs, act = self.observe(state, cond), inp.act
        state, pred = self.inner.branch(state, inp, cond, self.k)
        finite = pred.obs.isfinite().all(-1)
        held = pred.obs.clamp(self.low, self.high)
        beyond = (finite & (held != pred.obs).any(-1))[:, None]
        state = self.inner.correct(state, held, beyond.to(held.dtype), cond)
        seen = torch.where(beyond, self.observe(state, cond), pred.obs)
        m = max(1, self.chunk // self.k)  # rows, all candidates of a row in one piece
        rows = zip(obs.split(m), act.split(m), seen.split(m * self.k), strict=True)
        if self.choice == "published":
            r = score = torch.cat([self.reward(*repeat(x[:2], self.k), x[2]) for x in rows])
        else:
            r, score = (torch.cat(x) for x in zip(*(self.reward.rank(*x) for x in rows), strict=True))
        keep = group(finite & ~r.isnan() & ~score.isnan(), n)
        r, score = group(r, n), group(score, n)
        if self.choice == "scaled":
            score = standardised(score, keep)
        r, score = torch.where(keep, r, -torch.inf), torch.where(keep, score, -torch.inf)
        return state, Prediction(seen, pred.reward, pred.uncertainty), r, score

    # Training is the inner learner's. Of the noise of a window it reads what it would be given itself.

    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner.loss(segment, noise[..., : self.inner.noise_dim])

    def prepare(self, segment: Segment) -> None:
        self.inner.prepare(segment)

    def groups(self) -> list[dict]:
        return self.inner.groups()

    def losses(self, segment: Segment, noise: Tensor) -> Tensor:
        return self.inner.losses(segment, noise[..., : self.inner.noise_dim])

    def validate(self, segment: Segment, noise: Tensor) -> Tensor:
        return self.inner.validate(segment, noise[..., : self.inner.noise_dim])

    def advance(self, segment: Segment) -> None:
        self.inner.advance(segment)

    def finish(self, errors: Tensor) -> None:
        self.inner.finish(errors)

    def measure(self, segment: Segment) -> None:
        self.inner.measure(segment)


def standardised(x: Tensor, keep: Tensor) -> Tensor:
    """x [B, K] by the mean and standard deviation of what is kept of each row; all the same where nothing differs."""
    count = keep.sum(-1, keepdim=True).clamp(min=1)
    off = x - torch.where(keep, x, 0.0).sum(-1, keepdim=True) / count
    std = (torch.where(keep, off, 0.0).square().sum(-1, keepdim=True) / count).sqrt()
    return off / std.clamp(min=1e-12)


# ---------------------------------------------------------------- the reward


@dataclass(frozen=True)
class RewardConfig:
    """One setting for every dataset.

    members: snapshots kept, from the last `late` of the updates, evenly. hidden: of the discriminator.
    penalty: weight of the mean squared gradient of its logit with respect to s', in units of the change of the
    observation, between real and generated transitions. It lets the logits fall with the distance from what is real, in
    these units, rather than with what gives the generator away; r_D does not read their size.

    anchors: networks (s, a) -> s' fitted first, by the root mean square of a row's error and, every second one, by its
    mean square, at a rate that decays to zero; the discriminator sees s' also as its distance from their mean. 0 leaves
    it the plain network over (s, a, s' - s).

    generator: "fixed" takes generated transitions from the fitted model as it stands. "trained" improves a copy of it
    pathwise against the discriminator after every `every` updates of that, with `likelihood` times the model's own
    loss: the adversarial game of the paper. length: steps of a generated trajectory under the data's actions, from a
    real state: beyond 1, transitions at generated states are among those the discriminator learns to tell. spread:
    further noise on what is generated, for each row of a standard deviation that is uniform in [0, spread] times the
    anchors' typical error. The best logit is log p(real) - log p(generated): against the model's own samples alone it
    ranks candidates by the ratio, against a wide generator by the density of what is real, which is what a filter
    needs.

    experiments/reward.py --ablate tries other choices."""

    members: int = 10
    hidden: tuple[int, ...] = (256, 256)
    updates: int = 3_000
    batch: int = 256
    lr: float = 3e-4
    betas: tuple[float, float] = (0.5, 0.9)
    penalty: float = 1.0
    late: float = 0.75
    anchors: int = 4
    anchor_hidden: tuple[int, ...] = (200, 200, 200, 200)
    anchor_updates: int = 10_000
    anchor_lr: float = 1e-3
    generator: Literal["fixed", "trained"] = "fixed"
    every: int = 5
    generator_lr: float = 1e-4
    likelihood: float = 1.0
    length: int = 1
    spread: float = 30.0

    def __post_init__(self) -> None:
        if self.members < 1 or not 0 < self.late <= 1 or int(self.updates * self.late) < self.members:
            raise ValueError(
                f"RewardConfig: members {self.members}, updates {self.updates}, late {self.late}; expected late in "
                "(0, 1] and an update or more within the late part for each member"
            )
        if self.batch < 1 or self.length < 1 or self.every < 1 or self.anchors < 0:
            raise ValueError(
                f"RewardConfig: got batch {self.batch}, length {self.length}, every {self.every}, anchors "
                f"{self.anchors}; expected 1 or more, and 0 or more anchors"
            )
        rates = ("lr", "anchor_lr", "generator_lr", "penalty", "likelihood")
        values = {name: getattr(self, name) for name in rates}
        demand("RewardConfig", *((k, x, "a finite number >= 0", 0 <= x < math.inf) for k, x in values.items()))
        demand("RewardConfig", ("betas", self.betas, "two numbers in [0, 1)", all(0 <= x < 1 for x in self.betas)))
        if self.anchors and self.anchor_updates < 1:
            raise ValueError(f"RewardConfig: anchor_updates is {self.anchor_updates}, expected at least 1")
        if self.spread < 0 or (self.spread and not self.anchors):
            raise ValueError(
                f"RewardConfig: got spread {self.spread} and anchors {self.anchors}; the spread, 0 or more, is in "
                "units of the anchors' error: without anchors set it to 0"
            )

    def build(self, spec: Spec, generator: torch.Generator | None = None) -> "DynamicsReward":
        return DynamicsReward(spec, self, generator)


@final
class DynamicsReward(nn.Module):
    """(obs [B, O], act [B, A], next_obs [B, O]) -> r_D [B], from K snapshots of a discriminator.

    `heads` lead with the snapshot; expert, learner [K] are each snapshot's mean logits on real and generated
    transitions. reach [O]: how many standard deviations the data go from their mean. `fit` trains nothing of it."""

    expert: Tensor
    learner: Tensor
    reach: Tensor
    scale: Tensor

    def __init__(
        self, spec: Spec, config: RewardConfig, generator: torch.Generator | None = None, members: int | None = None
    ) -> None:
        super().__init__()
        if config.generator not in ("fixed", "trained"):
            raise ValueError(f"RewardConfig: generator is {config.generator!r}, expected 'fixed' or 'trained'")
        self.spec, self.config = spec, config
        k = config.members if members is None else members
        width = 3 * spec.obs if config.anchors else 2 * spec.obs
        self.heads = StackedMLP(k, [width + spec.act, *config.hidden, 1], "relu", uniform, generator)
        like = self.heads.weights[0]
        self.inputs = Normalizer(spec.obs + spec.act).to(like.device)
        self.change = Normalizer(spec.obs).to(like.device)
        self.anchor = None
        if config.anchors:
            sizes = [spec.obs + spec.act, *config.anchor_hidden, spec.obs]
            self.anchor = StackedMLP(config.anchors, sizes, "silu", generator=generator)
        self.register_buffer("expert", like.new_ones(k))
        self.register_buffer("learner", -like.new_ones(k))
        self.register_buffer("reach", like.new_zeros(spec.obs))
        self.register_buffer("scale", like.new_ones(spec.obs))  # the anchors' typical error, in units of `change`
        self.requires_grad_(False)

    def features(self, obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        """[B * n, O + A (+ O) + O]: what the discriminator sees of next_obs [B * n, O], n candidates a row. What does
        not depend on the candidate, the anchors above all, is evaluated once a row."""
        n = len(next_obs) // max(len(obs), 1)
        x = self.inputs(torch.cat([obs, act], -1))
        wide, obs = repeat((x, obs), n) if n > 1 else (x, obs)
        y = self.change(next_obs - obs)
        if self.anchor is None:
            return torch.cat([wide, y], -1)
        anchor = self.anchor(x[None]).mean(0)
        off = (y - (repeat(anchor, n) if n > 1 else anchor)) / self.scale
        return torch.cat([wide, y, off], -1)

    def logits(self, obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        """[K, B * n]"""
        return self.heads(self.features(obs, act, next_obs)[None])[..., 0]

    def forward(self, obs: Tensor, act: Tensor, next_obs: Tensor) -> Tensor:
        return self.rank(obs, act, next_obs)[0]

    def rank(self, obs: Tensor, act: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        """r_D [B * n], and the mean of the rescaled logits without the clamps [B * n]: what is equal in the first need
        not be in the second. A snapshot whose mean logits are equal or the wrong way round has a clamped vote in
        both. obs [B, O], act [B, A]; next_obs [B * n, O], n candidates a row, contiguous by row."""
        z = rescaled(self.logits(obs, act, next_obs), self.expert, self.learner)
        blind = self.expert - self.learner <= BLIND
        return dynamics_reward(z), torch.where(blind[:, None], z.clamp(-1, 1), z).mean(0)

    def bounds(self, clip: float) -> tuple[Tensor, Tensor]:
        """[O] each: `clip` standard deviations from the data's mean, or as far as the data go."""
        n = self.spec.obs
        far = self.reach.clamp(min=clip) * self.inputs.std[:n]
        return self.inputs.mean[:n] - far, self.inputs.mean[:n] + far


def unfiltered(model: Dynamics) -> Dynamics:
    """The learner inside, however many filters are around it."""
    while isinstance(model, Filtered):
        model = model.inner
    return model


BLIND = 1e-6  # mean logits that are no further apart do not tell what is real


def rescaled(logits: Tensor, expert: Tensor, learner: Tensor) -> Tensor:
    """logits [K, B] on the scale of each snapshot's mean logits [K]: 1 on real transitions, -1 on generated ones. Where
    these are the wrong way round or equal, the scale is 1e-6: the snapshot votes by the side of its mean."""
    return 2 * (logits - learner[:, None]) / (expert - learner).clamp(min=BLIND)[:, None] - 1


def dynamics_reward(z: Tensor) -> Tensor:
    """Rescaled logits [K, B] -> r_D [B], clamped."""
    return -torch.log1p(-torch.sigmoid(z.clamp(-1, 1)).mean(0))


# ---------------------------------------------------------------- its adversarial fit


def fit_reward(
    model: Dynamics,
    data: Dataset,
    config: RewardConfig,
    generator: torch.Generator,
    progress: Callable[[int, int | None, dict[str, float]], None] | None = None,
    *,
    checkpoint: Callable[[dict[str, Tensor]], None] | None = None,
    resume: Mapping[str, Tensor] | None = None,
    interval: int = 500,
) -> DynamicsReward:
    """Learns what tells the data's transitions from the model's. The model is left as it is.

    progress: (update, updates, figures) every `interval` updates, those of the anchors among them: "anchor", or "real"
    and "generated" (mean logits) and "loss". checkpoint: as often, a dict of tensors, to be saved before it returns;
    such a dict as `resume`, with the same model, data, config and interval, gives the numbers of an uninterrupted fit.
    Raises ValueError for data without a window of config.length steps."""
    like = next(model.parameters())
    first = generator.get_state() if resume is None else resume["generator.first"].cpu()
    generator.set_state(first)
    game = Game(model, data, config, generator, like)
    total = (config.anchor_updates if config.anchors else 0) + config.updates
    if resume is not None:
        game.load(resume)
        generator.set_state(resume["generator"].cpu())
    sums: dict[str, Tensor] = {}
    told = game.done  # a checkpoint is written whenever they are
    while game.done < total:
        for name, value in game.update(generator).items():
            sums[name] = sums.get(name, 0.0) + value
        if game.done % interval == 0 or game.done in (total, total - config.updates):
            if progress is not None:
                progress(game.done, total, {name: float(x) / (game.done - told) for name, x in sums.items()})
            sums, told = {}, game.done
            if checkpoint is not None:
                checkpoint(game.state() | {"generator.first": first, "generator": generator.get_state()})
    return game.reward


class Game:
    """The two players, their optimisers, and the snapshots so far."""

    def __init__(
        self, model: Dynamics, data: Dataset, config: RewardConfig, generator: torch.Generator, like: Tensor
    ) -> None:
        self.config, self.done = config, 0
        self.rows = Rows(data, config.length, like)
        windows = FitConfig(length=config.length)
        self.index = torch.cat(self.rows.split(windows, generator))  # all windows, in random order
        self.even = self.rows.even(self.index)
        self.reward = config.build(data.spec, generator).to(like)
        self.player = DynamicsReward(data.spec, config, generator, members=1).to(like)
        self._prepare()
        self.player.heads.requires_grad_(True)
        self.model = model
        if config.generator == "trained":
            self.model = copy.deepcopy(model).requires_grad_(True)
        adam = lambda params, **kw: torch.optim.Adam(params, fused=True, **kw)
        self.optimizers = {"player": adam(self.player.heads.parameters(), lr=config.lr, betas=config.betas)}
        if self.reward.anchor is not None:
            self.reward.anchor.requires_grad_(config.anchor_updates > 0)
            self.optimizers["anchor"] = adam(self.reward.anchor.parameters(), lr=config.anchor_lr)
        if config.generator == "trained":
            groups = [p for g in self.model.groups() for p in g["params"]]
            self.optimizers["generator"] = adam(groups, lr=config.generator_lr, betas=config.betas)
        self.sums = like.new_zeros(3)  # of the logits on real, on generated transitions, and how many, since a snapshot

    @torch.no_grad()
    def _prepare(self) -> None:
        """Both players see the data in the same units."""
        for at in range(0, len(self.index), SAMPLE):  # one block, of at most SAMPLE rows, sets the normalisers
            obs, act, after = self._flat(self.rows.segment(self.index[at : at + SAMPLE]))
            x = torch.cat([obs, act], -1)
            if at == 0:
                for r in (self.reward, self.player):
                    r.inputs.fit(x)
                    r.change.fit(after - obs)
            far = [self.reward.inputs(torch.cat([z, act], -1))[:, : obs.shape[1]].abs() for z in (obs, after)]
            self.reward.reach.copy_(torch.cat([*far, self.reward.reach[None]]).amax(0))
        self.player.anchor = self.reward.anchor

    def _flat(self, segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
        """Transitions [B * T, ...] of windows."""
        return segment.obs[:, :-1].flatten(0, 1), segment.act.flatten(0, 1), segment.obs[:, 1:].flatten(0, 1)

    def _batch(self, generator: torch.Generator) -> Segment:
        systems, n = self.even.shape
        size = (systems, max(1, self.config.batch // systems))
        pick = torch.randint(n, size, generator=generator, device=generator.device)
        return self.rows.segment(self.even.gather(1, pick.to(self.even.device)).flatten())

    def update(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of whoever's turn it is."""
        before = self.config.anchor_updates if self.config.anchors else 0
        if self.done < before:
            figures = self._anchor(self.done / before, generator)
        else:
            figures = self._discriminate(self.done - before, generator)
        self.done += 1
        return figures

    def _anchor(self, share: float, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of the anchors; share: of their updates that is behind them."""
        c, anchor, optimizer = self.config, self.reward.anchor, self.optimizers["anchor"]
        assert anchor is not None
        n = c.anchors
        pick = torch.randint(len(self.index), (n * c.batch,), generator=generator, device=generator.device)
        obs, act, after = self._flat(self.rows.segment(self.index[pick.to(self.index.device)]))
        x, y = self.reward.inputs(torch.cat([obs, act], -1)), self.reward.change(after - obs)
        square = (anchor(group(x, n)) - group(y, n)).square().mean(-1)  # [n, B * T]
        rms = (square[0::2] + 1e-6).sqrt().mean(1).sum()
        loss = rms + square[1::2].mean(1).sum()
        rate = c.anchor_lr * min(1.0, (self.done + 1) / 200) * 0.5 * (1 + math.cos(math.pi * share))
        for g in optimizer.param_groups:
            g["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if self.done + 1 == c.anchor_updates:
            self._freeze()
        return {"anchor": square.detach().mean()}

    @torch.no_grad()
    def _freeze(self) -> None:
        """The anchors are done: what they leave unexplained is the unit in which the discriminator sees it."""
        assert self.reward.anchor is not None
        self.reward.anchor.requires_grad_(False)
        obs, act, after = self._flat(self.rows.segment(self.index[:16_384]))
        x, y = self.reward.inputs(torch.cat([obs, act], -1)), self.reward.change(after - obs)
        error = (self.reward.anchor(x[None]).mean(0) - y).abs().mean(0).clamp(min=1e-3)
        self.reward.scale.copy_(error)
        self.player.scale.copy_(error)

    def _generate(self, segment: Segment, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The generator's transitions [B * T, ...] under the data's actions, from the data's first states."""
        model, (b, t) = self.model, segment.mask.shape
        cond = model.condition(model.context(segment.system).to(segment.obs))
        state, out = model.init(segment.obs[:, 0], cond), []
        for i in range(t):
            noise = model.draw(b, 1, generator)
            now = model.observe(state, cond)
            state, pred = model.step(state, StepInput(segment.act[:, i], noise, segment.dt[:, i]), cond)
            out.append((now, segment.act[:, i], pred.obs))
        obs, act, after = (torch.stack(x, 1).flatten(0, 1) for x in zip(*out, strict=True))
        return obs, act, after

    def _discriminate(self, at: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of the discriminator, and of the generator where it is its turn; a snapshot where one is due."""
        c, player, optimizer = self.config, self.player, self.optimizers["player"]
        segment = self._batch(generator)
        real = self._flat(segment)
        with torch.no_grad():
            fake = self._generate(segment, generator)
        ok = torch.cat([*fake], -1).isfinite().all(-1, keepdim=True)  # one that diverged gives way to the real one
        fake = tuple(torch.where(ok, f, r) for f, r in zip(fake, real, strict=True))
        weight = ok[:, 0].to(fake[0])
        if c.spread > 0:
            n, o = fake[2].shape
            noise = torch.randn(n, o + 1, generator=generator, device=generator.device, dtype=fake[2].dtype)
            size = c.spread * torch.special.ndtr(noise[:, -1:]) * self.reward.scale * self.reward.change.std
            fake = (fake[0], fake[1], fake[2] + size * noise[:, :-1])
        with torch.no_grad():
            feature = player.features(*(torch.cat(x) for x in zip(real, fake, strict=True)))
        logits = player.heads(feature[None])[0, :, 0]
        on_real, on_fake = logits.chunk(2)
        count = weight.sum().clamp(min=1)
        loss = F.softplus(-on_real).mean() + (weight * F.softplus(on_fake)).sum() / count
        figures = {"loss": loss.detach(), "real": on_real.detach().mean()}
        figures["generated"] = (weight * on_fake.detach()).sum() / count
        if c.penalty > 0:
            loss = loss + c.penalty * self._penalty(real, fake, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if c.generator == "trained" and (at + 1) % c.every == 0:
            figures["likelihood"] = self._improve(generator) * c.every
        self.sums += torch.stack([figures["real"], figures["generated"], torch.ones_like(figures["real"])])
        self._snapshot(at)
        return figures

    def _penalty(self, real: tuple, fake: tuple, generator: torch.Generator) -> Tensor:
        """The mean squared gradient of the logit by s', in units of `change`, at points between real and generated
        transitions of the same row."""
        n = len(real[0])
        mix = torch.rand(n, 1, generator=generator, device=generator.device, dtype=real[0].dtype)
        obs, act, after = (torch.lerp(r, f, mix) for r, f in zip(real, fake, strict=True))
        after = after.requires_grad_()
        logits = self.player.heads(self.player.features(obs, act, after)[None])
        slope = torch.autograd.grad(logits.sum(), after, create_graph=True)[0] * self.player.change.std
        return slope.square().sum(-1).mean()

    def _improve(self, generator: torch.Generator) -> Tensor:
        """One update of the generator, through the discriminator and its own step (both are differentiable); none where
        its gradient is not finite, as where it diverges."""
        c, optimizer = self.config, self.optimizers["generator"]
        segment = self._batch(generator)
        fake = self._generate(segment, generator)
        ok = torch.cat([*fake], -1).isfinite().all(-1, keepdim=True)
        score = self.player.logits(*(torch.where(ok, f, r) for f, r in zip(fake, self._flat(segment), strict=True)))
        own = self.model.losses(*self._own(segment, generator)).mean()
        weight = ok[:, 0].to(score)
        loss = (weight * F.softplus(-score)).sum() / weight.sum().clamp(min=1) + c.likelihood * own
        params = [p for g in optimizer.param_groups for p in g["params"]]
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        if nn.utils.clip_grad_norm_(params, 10.0).isfinite():
            optimizer.step()
        return own.detach()

    def _own(self, segment: Segment, generator: torch.Generator) -> tuple[Segment, Tensor]:
        """What the model's own loss reads: the same windows for each of its parts."""
        tile = lambda x: x.repeat(self.model.parts, *[1] * (x.ndim - 1))
        wide = Segment(*(tile(x) for x in segment))
        return wide, noise_of(self.model, len(wide.mask), wide.mask.shape[1], generator)

    @torch.no_grad()
    def _snapshot(self, at: int) -> None:
        """Member k is the discriminator at the end of the k-th of equal stretches of the late part; its clamps are the
        mean logits over that stretch."""
        c, reward = self.config, self.reward
        late = int(c.updates * c.late)
        begin = c.updates - late
        if at + 1 <= begin:
            self.sums.zero_()
            return
        k, before = (at + 1 - begin) * c.members // late, (at - begin) * c.members // late
        if k == before:
            return
        for target, source in zip(reward.heads.parameters(), self.player.heads.parameters(), strict=True):
            target[k - 1].copy_(source[0])
        reward.expert[k - 1].copy_(self.sums[0] / self.sums[2])
        reward.learner[k - 1].copy_(self.sums[1] / self.sums[2])
        self.sums.zero_()

    # ------------------------------------------------------------ resuming

    def _live(self) -> dict[str, Tensor]:
        """The tensors that an update changes, by name, themselves."""
        out: dict[str, Tensor] = {"sums": self.sums}
        parts: dict[str, nn.Module] = {"reward": self.reward, "player": self.player}
        if self.config.generator == "trained":
            parts["model"] = self.model
        for part, module in parts.items():
            out |= {f"{part}.{name}": x.detach() for name, x in module.state_dict().items()}
        for part, optimizer in self.optimizers.items():
            params = [p for g in optimizer.param_groups for p in g["params"]]
            for i, p in enumerate(params):
                if not optimizer.state[p]:
                    step = torch.zeros((), dtype=torch.float32, device=p.device)
                    zero = torch.zeros_like(p, memory_format=torch.preserve_format)
                    optimizer.state[p] = {"step": step, "exp_avg": zero, "exp_avg_sq": zero.clone()}
                out |= {f"adam.{part}.{i}.{k}": x for k, x in optimizer.state[p].items()}
        return out

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest depends on, but the model, the data, the config and the generator."""
        return self._live() | {"done": torch.tensor(self.done)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError where the state is of another fit."""
        own = self._live()
        for name, x in own.items():
            if name not in state or state[name].shape != x.shape:
                got = list(state[name].shape) if name in state else "nothing"
                raise ValueError(
                    f"fit_reward: resume holds {got} for {name}, expected {list(x.shape)}: another fit's state?"
                )
        for name, x in own.items():
            x.copy_(state[name])
        self.done = int(state["done"])
        if self.reward.anchor is not None and self.done >= self.config.anchor_updates:
            self.reward.anchor.requires_grad_(False)
