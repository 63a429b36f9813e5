"""Neural ordinary differential equations (Chen et al., NeurIPS 2018), regularised locally so that an adaptive solver
needs fewer steps (Pal et al., UAI 2023, arXiv 2303.02262).

All is integrated in standardised coordinates z = (x - mean) / std of the data: tolerances and estimates of error are in
standard deviations. Runge-Kutta steps commute with that change of coordinates; fixed steps are those in x."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from mbrl.core import Diverged, Markov, Prediction, Segment, Spec, StepInput, Tree, pull
from mbrl.nets import Activation, Normalizer, StackedMLP, apply_layers, uniform
from mbrl.rollout import masked_mean
from mbrl.solvers import RK4, TSIT5_STABILITY, Dopri5, Field, Seen, Solver, Steps, Tsit5Step, tsit5_step

TINY = 1e-24  # under square roots
TURN = 0x9E3779B9  # 2^32 / golden ratio: its multiples, modulo 2^32, fill the range evenly


# ---------------------------------------------------------------- local regularisation


@dataclass(frozen=True)
class ErrorEstimate:
    """The step's length times the root mean square of error / (atol + rtol max(|z0|, |z1|))."""

    rtol: float = 1e-3
    atol: float = 1e-3  # standard deviations of the data

    def size(self, step: Tsit5Step, z: Tensor, dt: Tensor) -> Tensor:
        """Of a step from z [B, O] over dt [B, 1], [B]."""
        scale = self.atol + self.rtol * torch.maximum(z.abs(), step.x.abs())
        return dt[:, 0] * ((step.error / scale).square().mean(-1) + TINY).sqrt()


@dataclass(frozen=True)
class StiffnessRatio:
    """|k7 - k6| / |g7 - g6|, of the last two slopes and of where they were taken, over the method's reach 3.5068: an
    estimate of the field's largest eigenvalue, per unit of time."""

    def size(self, step: Tsit5Step, z: Tensor, dt: Tensor) -> Tensor:
        """As ErrorEstimate's."""
        change = (step.stages[6] - step.stages[5]).square().sum(-1)
        apart = (step.x - step.sixth).square().sum(-1)
        return (change / (apart + TINY) + TINY).sqrt() / TSIT5_STABILITY


@dataclass(frozen=True)
class Local:
    """weight * r is added to the loss; r is the kind's measure of one further step of Tsit5 from a random time of each
    window. Where that step begins and its length are constants: the gradient runs through it alone, so that any solver,
    and any adjoint, serves the rest. Its length is that of the solver's own step there.

    The time is uniform over the window ("unbiased"), or one of those at which a step of the solver began ("biased": of
    an adaptive one, more often where the field is hard). The weight goes from `start` to `end` exponentially over so
    many updates and stays."""

    kind: ErrorEstimate | StiffnessRatio = field(default_factory=ErrorEstimate)
    start: float = 2.5
    end: float = 1.0
    updates: int = 10_000
    sampling: Literal["unbiased", "biased"] = "unbiased"

    def place(self, u: Tensor, dt: Tensor, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
        """u [B] in [0, 1) to a time of each window, dt [B, T] -> the interval [B], the share of it that has passed [B]
        and the size [B], as a share, of the step that the solver took there."""
        begin, size = (torch.cat(x) for x in zip(*steps, strict=True))  # [N]
        counts = [len(b) for b, _ in steps]
        interval = torch.cat([torch.full_like(b, t) for t, (b, _) in enumerate(steps)])
        if self.sampling == "biased":
            pick = (u * sum(counts)).long().clamp(max=sum(counts) - 1)
            return interval[pick].long(), begin[pick], size[pick]
        ends = dt.cumsum(1)
        target = u[:, None] * ends[:, -1:]
        where = (ends[:, :-1] <= target).sum(1)
        row = torch.arange(len(u), device=u.device)
        share = 1 - (ends[row, where] - target[:, 0]) / dt[row, where]
        pick = (interval + begin <= (where + share)[:, None]).sum(1) - 1
        return where, share, size[pick]


# ---------------------------------------------------------------- the learner


@dataclass(frozen=True)
class OdeConfig:
    """x' = f(x, a): a network of sizes `hidden` (none: f is linear), whose outputs are in units of the data's own rates
    of change.

    alpha: the teacher forcing of a training window, from 0, which runs freely (multiple shooting), to 1, one interval
    at a time. `reward`: a second network of sizes `reward_hidden` tells a transition's reward from its observation and
    action; it is fitted at the data's and does not shape the field."""

    hidden: tuple[int, ...] = (100, 100)
    activation: Activation = "tanh"
    solver: Solver = field(default_factory=RK4)
    alpha: float = 0.0
    local: Local | None = None
    reward: bool = False
    reward_hidden: tuple[int, ...] = (100, 100)

    def build(self, spec: Spec, generator: torch.Generator | None = None) -> "NeuralODE":
        return NeuralODE(spec, self, generator)


class Solution(NamedTuple):
    obs: Tensor  # [B, T, O]
    evaluations: int  # of the field, all rows at once
    accepted: list[float]  # the times at which the solver's steps began


@final
class NeuralODE(Markov):
    """Deterministic; any dt, which may differ from row to row and from step to step.

    The regulariser's times are no noise of a step: a buffer, `moment`, shifts them all, and row b of B takes the share
    moment + b / B (modulo 1) of its window. `advance` moves it between updates through a sequence that fills [0, 1)
    evenly from a random beginning, so that each row's time is uniform and the loss stays a function of its inputs."""

    noisy_loss = False
    noise_dim = 0
    rate: Tensor  # [O]: the root mean square of dz/dt over the data
    weight: Tensor  # []: the regulariser's
    moment: Tensor  # []: in [0, 1)
    updates: Tensor  # [] int64: so many are done
    begin: Tensor  # [] int64, in [0, 2^32): where the sequence of moments begins

    def __init__(self, spec: Spec, config: OdeConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        _check(config)
        self.spec, self.config, self.tells_reward = spec, config, config.reward
        width = spec.obs + spec.act
        self.net = StackedMLP(1, [width, *config.hidden, spec.obs], config.activation, uniform, generator)
        device = self.net.weights[0].device
        self.worth = None
        if config.reward:
            self.worth = StackedMLP(1, [width, *config.reward_hidden, 1], "silu", uniform, generator)
        self.observed, self.acted = Normalizer(spec.obs).to(device), Normalizer(spec.act).to(device)
        self.rewarded = Normalizer(1).to(device)
        self.register_buffer("rate", torch.ones(spec.obs, device=device))
        if config.local is not None:
            self.schedules = ("weight", "moment", "updates")
            begin = torch.randint(2**32, (), generator=generator, device=device)
            self.register_buffer("begin", begin)
            self.register_buffer("updates", torch.zeros_like(begin))
            self.register_buffer("weight", torch.tensor(config.local.start, device=device))
            self.register_buffer("moment", (begin / 2**32).to(self.weight) % 1)

    # ------------------------------------------------------------ prediction

    def step(self, state: Tensor, inp: StepInput, cond: Tree) -> tuple[Tensor, Prediction]:
        z, act = self.observed(state), self.acted(inp.act)
        f, params = self._field(act)
        obs = self.observed.inverse(self.config.solver.flow(f, z, inp.dt, params))
        reward = torch.zeros_like(obs[:, 0])
        if self.worth is not None:
            reward = self.rewarded.inverse(self._worth(z, act))[:, 0]
        return obs, Prediction(obs, reward, {})

    def field(self, obs: Tensor, act: Tensor) -> Tensor:
        """dx/dt [B, O] at obs [B, O] under act [B, A]."""
        return self._field(self.acted(act))[0](self.observed(obs)) * self.observed.std

    def field_jacobian(self, obs: Tensor, act: Tensor) -> Tensor:
        """d(dx/dt)/dx [B, O, O] at obs [B, O] under act [B, A]."""
        one = lambda x, a: self.field(x[None], a[None])[0]
        return torch.func.vmap(torch.func.jacrev(one))(obs, act)

    @torch.no_grad()
    def solve(self, obs: Tensor, act: Tensor, times: Tensor, solver: Dopri5) -> Solution:
        """From obs [B, O] at time 0 to the rising times [T], act [B, A] held: one adaptive solution, which is
        interpolated at the times and does not begin anew at each."""
        z = self.observed(obs)
        seen = Seen(self._field(self.acted(act))[0], z, torch.ones_like(z[:, :1]))
        found = solver.solve(seen, z, torch.cat([times.new_zeros(1), times]), ())[1:]
        return Solution(self.observed.inverse(found).transpose(0, 1), seen.evaluations, [t for t, _ in seen.accepted])

    def _field(self, act: Tensor) -> tuple[Field, tuple[Tensor, ...]]:
        """The field under act [B, A], all standardised, and what it depends on."""
        layers, activation = self.net.layers(), self.config.activation
        f = lambda z: self.rate * apply_layers(layers, torch.cat([z, act], -1)[None], activation)[0]
        return f, (*layers, act)

    def _worth(self, z: Tensor, act: Tensor) -> Tensor:
        """[B, 1], standardised."""
        assert self.worth is not None
        return self.worth(torch.cat([z, act], -1)[None])[0]

    # ------------------------------------------------------------ training

    def prepare(self, segment: Segment) -> None:
        """Sets the normalisers. Raises ValueError for a dt that is not positive."""
        keep = segment.mask
        obs, after, act, dt = (x[keep] for x in (segment.obs[:, :-1], segment.obs[:, 1:], segment.act, segment.dt))
        if not bool((dt > 0).all()):
            raise ValueError(
                f"NeuralODE: the data hold an interval dt of {float(dt.min())}, expected all to be positive"
            )
        self.observed.fit(obs)
        self.acted.fit(act)
        self.rewarded.fit(segment.reward[keep][:, None])
        rate = ((after - obs) / self.observed.std / dt).double().square().mean(0).sqrt()
        self.rate.copy_(torch.where(rate > 0, rate, 1.0))

    def loss(self, segment: Segment, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The squared error of the forced windows, standardised; that of the reward; and the regulariser."""
        starts, error, steps = self._forced(segment, self.config.alpha)
        loss = error
        logs = {"mse": error.detach()}
        if self.worth is not None:
            wrong = self._wrong(segment)
            loss = loss + wrong
            logs["reward"] = wrong.detach()
        if self.config.local is not None:
            r = self._regulariser(self.config.local, segment, starts, steps)
            loss = loss + self.weight * r
            logs["local"] = r.detach()
        return loss, logs

    @torch.no_grad()
    def validate(self, segment: Segment, noise: Tensor) -> Tensor:
        """[1]: the squared error of free runs over the windows, standardised, and that of the reward."""
        error = self._forced(segment, 0.0)[1]
        return (error if self.worth is None else error + self._wrong(segment))[None]

    @torch.no_grad()
    def advance(self, segment: Segment) -> None:
        """Sets the regulariser's weight and moment for the next update."""
        local = self.config.local
        if local is None:
            return
        self.updates += 1
        share = (self.updates / max(local.updates, 1)).clamp(max=1.0)
        self.weight.copy_(local.start * (local.end / local.start) ** share)
        self.moment.copy_(((self.begin + TURN * self.updates) % 2**32 / 2**32).to(self.moment) % 1)

    def finish(self, errors: Tensor) -> None:
        """Raises Diverged where the fit never reached a finite error."""
        if not bool(errors.isfinite().all()):
            raise Diverged(
                "NeuralODE: the fit has diverged; expected finite data, or try shorter windows, a larger alpha, more "
                "substeps or a smaller learning rate"
            )

    def _forced(self, segment: Segment, alpha: float) -> tuple[Tensor, Tensor, Steps]:
        """The states [B, T, O] from which the intervals began, the mean squared error of their ends, and the solver's
        steps."""
        x, act = self.observed(segment.obs), self.acted(segment.act)
        z, starts, ends, steps = x[:, 0], [], [], []
        for t in range(act.shape[1]):
            f, params = self._field(act[:, t])
            starts.append(z)
            z = self.config.solver.flow(f, z, segment.dt[:, t], params, steps)
            ends.append(z)
            z = pull(z, x[:, t + 1], alpha * segment.mask[:, t, None])
        error = masked_mean((torch.stack(ends, 1) - x[:, 1:]) ** 2, segment.mask)
        return torch.stack(starts, 1), error, steps

    def _wrong(self, segment: Segment) -> Tensor:
        """The mean squared error of the reward, standardised."""
        z, act = self.observed(segment.obs[:, :-1]), self.acted(segment.act)
        error = self._worth(z.flatten(0, 1), act.flatten(0, 1)) - self.rewarded(segment.reward.reshape(-1, 1))
        return masked_mean(error**2, segment.mask.flatten())

    def _regulariser(self, local: Local, segment: Segment, starts: Tensor, steps: Steps) -> Tensor:
        """The mean over the windows of the measure r; a time that is masked weighs nothing."""
        row = torch.arange(len(starts), device=starts.device)
        u = (self.moment + row.to(self.moment) / len(starts)) % 1
        with torch.no_grad():
            interval, share, size = local.place(u, segment.dt[..., 0], steps)
            here = lambda x: x[row, interval]
            f, params = self._field(self.acted(here(segment.act)))
            dt = here(segment.dt)
            z = self.config.solver.flow(f, here(starts), dt * share[:, None], params)
        h = dt * size[:, None]
        r = local.kind.size(tsit5_step(f, z, h), z, h)
        return masked_mean(r[:, None], here(segment.mask))


def _check(config: OdeConfig) -> None:
    solver, local = config.solver, config.local
    if isinstance(solver, Dopri5):
        if min(solver.rtol, solver.atol) <= 0:
            raise ValueError(f"Dopri5: rtol and atol are {solver.rtol} and {solver.atol}, expected them positive")
    elif solver.substeps < 1:
        raise ValueError(f"{type(solver).__name__}: substeps is {solver.substeps}, expected at least 1")
    if not 0 <= config.alpha <= 1:
        raise ValueError(f"OdeConfig: alpha is {config.alpha}, expected 0 to 1")
    if local is not None and min(local.start, local.end) <= 0:
        raise ValueError(
            f"Local: the weight goes from {local.start} to {local.end}, expected both to be positive: the way between "
            "is exponential"
        )
