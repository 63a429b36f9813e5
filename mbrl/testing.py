"""The contract's checks, for anybody's learner.

    check_dynamics(lambda spec: MyConfig().build(spec, torch.Generator()))

runs them all and raises one AssertionError that names those that fail. With pytest, one test for each:

    @pytest.mark.parametrize("check", CHECKS)
    def test_contract(check):
        CHECKS[check](Subject(build))

Everything is checked in float64 on small tensors, after `prepare` and `finish`, as a fit hands a learner over. The
inputs are random, the data are those of a linear system. A check takes from a millisecond to a second.
"""

import copy
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mbrl.core import Dynamics, Prediction, Segment, Spec, StepInput, Tree, choose, repeat, rows
from mbrl.rollout import imagine, stack, steps, unroll

ROWS = 6
GROUPS = (1, 3, ROWS)  # one system for all rows; environments with candidates; a context a row


SPEC = Spec(obs=3, act=2, ctx=4, systems=2)


@dataclass(frozen=True)
class Subject:
    """What is checked. `build` makes a fresh learner; what it draws from the global generator is made repeatable here.

    imposes: what a full correction makes the learner observe, (model, obs [B, O], cond) -> [B, O]. The default is the
    observation itself; a learner whose observation model is affine imposes the projection on what it can express.
    """

    build: Callable[[Spec], Dynamics]
    spec: Spec = SPEC
    imposes: Callable[[Any, Tensor, Tree], Tensor] | None = None
    dt: float = 1.0
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float64

    def fresh(self, seed: int = 0) -> Dynamics:
        """As `build` makes it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(self.spec).to(self.device, self.dtype)

    def model(self, seed: int = 0) -> Dynamics:
        """As a fit hands it over: prepared, its parts judged."""
        model = self.fresh(seed)
        model.prepare(self.segment(model, seed=100))
        errors = torch.arange(model.parts, 0, -1, device=self.device, dtype=self.dtype)  # the last is the best
        model.finish(errors)
        return model

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

    def args(self, model: Dynamics, groups: int = 1, n: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor, StepInput]:
        """obs [n, O], ctx [groups, C] and a step's input [n, ...]."""
        g = self.generator(seed)
        obs, ctx = self.normal(g, n, self.spec.obs), self.normal(g, groups, model.spec.ctx)
        act = self.normal(g, n, self.spec.act).tanh()
        noise = model.draw(n, 1, g)
        return obs, ctx, StepInput(act, noise, torch.full_like(obs[:, :1], self.dt))

    def segment(self, model: Dynamics, n: int = 8, length: int = 5, seed: int = 1) -> Segment:
        """Windows of a linear system, n for each system and part: x' = A x + B a, with the reward x_0 + |a|^2 / 10.
        A and B are the same whatever the seed."""
        fixed, g = self.generator(17), self.generator(seed)
        dim, act_dim, groups = self.spec.obs, self.spec.act, self.spec.systems * model.parts
        turn = torch.linalg.qr(self.normal(fixed, dim, dim))[0]
        push = self.normal(fixed, act_dim, dim) * 0.3
        obs = [self.normal(g, n * groups, dim)]
        act = self.normal(g, n * groups, length, act_dim).tanh()
        for t in range(length):
            obs.append(0.9 * obs[-1] @ turn + act[:, t] @ push)
        seen = torch.stack(obs, 1)
        reward = seen[:, 1:, 0] + 0.1 * act.pow(2).sum(-1)
        off = torch.zeros_like(reward, dtype=torch.bool)
        system = torch.arange(self.spec.systems, device=self.device).repeat(model.parts)
        return Segment(seen, act, reward, off, ~off, torch.full_like(seen[:, 1:, :1], self.dt), system)

    def training(self, model: Dynamics, seed: int = 1, length: int = 5) -> tuple[Segment, Tensor]:
        """A training batch and its noise [B, T, W]."""
        segment = self.segment(model, length=length, seed=seed)
        return segment, self.normal(self.generator(seed + 50), *segment.reward.shape, model.noise_dim)


CHECKS: dict[str, Callable[[Subject], None]] = {}


def check_dynamics(
    build: Callable[[Spec], Dynamics],
    spec: Spec = SPEC,
    skip: Collection[str] = (),
    *,
    imposes: Callable[[Any, Tensor, Tree], Tensor] | None = None,
    dt: float = 1.0,
    device: torch.device | str = "cpu",
) -> None:
    """Run every check but those in `skip`. Raises AssertionError naming each that fails, with the failures as its
    cause, or saying that the learner cannot be built; ValueError where `skip` names no check."""
    if unknown := set(skip) - set(CHECKS):
        raise ValueError(f"skip: got {sorted(unknown)}, expected names among {sorted(CHECKS)}")
    subject, failures = Subject(build, spec, imposes, dt, device), []
    names = [name for name in CHECKS if name not in skip]
    try:
        subject.fresh()
    except Exception as error:
        raise AssertionError(f"the learner cannot be built for {spec}: {_first_line(error)}") from error
    for name in names:
        try:
            CHECKS[name](subject)
        except Exception as error:
            error.add_note(f"in the check {name!r}")
            failures.append((name, error))
    if failures:
        lines = [f"  {name}: {_first_line(error)}" for name, error in failures]
        head = f"the learner breaks {len(failures)} of {len(names)} checks of the contract of a dynamics learner:"
        cause = ExceptionGroup("failed checks", [error for _, error in failures])
        raise AssertionError("\n".join([head, *lines])) from cause


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"


# ---------------------------------------------------------------- helpers


def _check(fn: Callable[[Subject], None]) -> Callable[[Subject], None]:
    CHECKS[fn.__name__] = fn
    return fn


def _same(got: Tree, want: Tree, says: str, *, exact: bool = False) -> None:
    """Equal structure and values (nan equals nan)."""
    (a, left), (b, right) = pytree.tree_flatten(got), pytree.tree_flatten(want)
    assert left == right, f"{says}\nstructures differ: {left} and {right}"
    tolerance = 0.0 if exact else None
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{says}\n{m}")


def _one(model: Dynamics, obs: Tensor, ctx: Tensor, inp: StepInput) -> tuple[Tree, Prediction]:
    cond = model.condition(ctx)
    return model.step(model.init(obs, cond), inp, cond)


def _join(trees: list[Tree], by: Callable[[list[Tensor]], Tensor] = torch.cat) -> Tree:
    return pytree.tree_map(lambda *x: by(list(x)), *trees)


def _interleave(parts: list[Tensor]) -> Tensor:
    """k leaves [B, ...] -> [B * k, ...], contiguous by row."""
    return torch.stack(parts, 1).flatten(0, 1)


def _filled(x: Tensor, value: float) -> Tensor:
    return torch.full_like(x, value) if x.is_floating_point() else x


def _buffers(model: Dynamics) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in (*model.named_parameters(), *model.named_buffers())}


def _everything(subject: Subject, model: Dynamics, seed: int = 0) -> list[Tree]:
    """What every method that a loop calls returns."""
    obs, ctx, inp = subject.args(model, 3, seed=seed)
    cond = model.condition(ctx)
    state = model.init(obs, cond)
    after, pred = model.step(state, inp, cond)
    wide = inp._replace(noise=model.draw(ROWS, 2, subject.generator(seed)))
    segment, noise = subject.training(model, seed)
    return [
        cond,
        state,
        (after, pred),
        model.observe(after, cond),
        model.branch(state, wide, cond, 2),
        model.each(state, wide, cond, 2),
        model.correct(after, obs, 0.3, cond),
        model.loss(segment, noise),
        model.losses(segment, noise),
        model.validate(segment, noise),
    ]


def _gradients(model: Dynamics, loss: Tensor) -> dict[str, Tensor]:
    free = {k: p for k, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(free.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(free, grads, strict=True))


# ---------------------------------------------------------------- shapes, purity, rows and groups


@_check
def shapes(s: Subject) -> None:
    """Rows lead every state; predictions, uncertainties and losses have the shapes and types that loops rely on."""
    model = s.model()
    assert isinstance(model, Dynamics), f"build returned a {type(model).__name__}, expected a mbrl.core.Dynamics"
    brings = s.spec.systems > 1 and s.spec.ctx == 0  # contexts of its own, of a width that it chooses
    known = replace(s.spec, ctx=model.spec.ctx) if brings else s.spec
    assert model.spec == known, f"spec is {model.spec}, expected the one it was built for, {s.spec}"
    for name, least in [("noise_dim", 0), ("parts", 1)]:
        value = getattr(model, name)
        ok = isinstance(value, int) and value >= least
        assert ok, f"{name} is {value!r}, expected an integer that is at least {least}"
    for groups in GROUPS:
        obs, ctx, inp = s.args(model, groups)
        cond = model.condition(ctx)
        state = model.init(obs, cond)
        for where, (tree, pred) in {
            "step": (model.step(state, inp, cond)),
            "init": (state, None),
            "correct": (model.correct(state, obs, 0.5, cond), None),
        }.items():
            for x in pytree.tree_leaves(tree):
                assert x.shape[:1] == (ROWS,), f"{where}: a leaf of the state is {tuple(x.shape)}, expected {ROWS} rows"
                assert not x.is_floating_point() or x.dtype == s.dtype, f"{where}: state in {x.dtype}, given {s.dtype}"
            if pred is not None:
                _prediction(s, pred, (ROWS,))
        noise = model.draw(ROWS, 2, s.generator(0))
        want = (ROWS, 2 * model.noise_dim)
        assert noise.shape == want, f"draw: noise of 2 futures is {tuple(noise.shape)}, expected {want}"
    segment, noise = s.training(model)
    loss, logs = model.loss(segment, noise)
    assert loss.shape == (), f"loss is {tuple(loss.shape)}, expected one number"
    assert loss.isfinite(), f"loss is {loss.item()} on finite data"
    assert all(not x.requires_grad for x in logs.values()), "what a loss logs must be detached from the graph"
    for name in ("losses", "validate"):
        value = getattr(model, name)(segment, noise)
        assert value.shape == (model.parts,), f"{name} is {tuple(value.shape)}, expected a number for each of its parts"
        assert value.isfinite().all(), f"{name} is not finite: {value}"


def _prediction(s: Subject, pred: Prediction, lead: tuple[int, ...]) -> None:
    want = {"obs": (*lead, s.spec.obs), "reward": lead}
    for name, x in [("obs", pred.obs), ("reward", pred.reward)]:
        assert x.shape == want[name], f"the predicted {name} is {tuple(x.shape)}, expected {want[name]}"
        assert x.dtype == s.dtype, f"the predicted {name} is in {x.dtype}, the inputs are in {s.dtype}"
    for name, x in pred.uncertainty.items():
        assert x.shape == lead, f"the uncertainty {name!r} is {tuple(x.shape)}, expected {lead}"
        assert (x >= 0).all(), f"the uncertainty {name!r} is negative or nan: {x.min()}"


@_check
def dtypes(s: Subject) -> None:
    """Numbers come out in the type that they went in with: float32 as well as float64."""
    single = Subject(s.build, s.spec, s.imposes, s.dt, s.device, torch.float32)
    shapes(single)


@_check
def pure(s: Subject) -> None:
    """The same inputs give the same outputs, whatever was asked before; inputs, parameters and buffers stay."""
    model = s.model()
    args = s.args(model, 3)
    before, parameters = copy.deepcopy(args), _buffers(model)
    first = _everything(s, model)
    _everything(s, model, seed=9)  # something else in between: nothing of it may remain
    _same(_everything(s, model), first, "the same calls gave other values: a state is hidden", exact=True)
    _one(model, *args)
    _same(args, before, "step or init wrote into its inputs", exact=True)
    state, _ = _one(model, *args)
    kept = pytree.tree_map(torch.clone, state)
    cond = model.condition(args[1])
    model.correct(state, args[0], 0.3, cond)
    model.step(state, args[2], cond)
    model.branch(state, args[2]._replace(noise=model.draw(ROWS, 2, s.generator(0))), cond, 2)
    _same(state, kept, "correct, step or branch wrote into the state that it was given", exact=True)
    segment, noise = s.training(model)
    held = pytree.tree_map(torch.clone, segment)
    model.loss(segment, noise)[0].backward()
    _same(segment, held, "loss wrote into the segment", exact=True)
    _same(_buffers(model), parameters, "a method changed a parameter or a buffer", exact=True)


@_check
def draws_from_no_global_generator(s: Subject) -> None:
    """Noise is an argument; `draw` draws from the generator that it is given."""
    model = s.model()
    device = torch.device(s.device)
    own = torch if device.type == "cpu" else torch.get_device_module(device)
    now = lambda: {
        "torch": torch.get_rng_state().tolist(),
        "the device": own.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state(legacy=False)),  # noqa: NPY002
        "random": random.getstate(),
    }
    before = now()
    _everything(s, model)
    after = now()
    for name, was in before.items():
        assert after[name] == was, f"drew from the global generator of {name}"


@_check
def rows_do_not_see_each_other(s: Subject) -> None:
    """A row's step is the same alone as in a batch."""
    model = s.model()
    for groups in GROUPS:
        obs, ctx, inp = s.args(model, groups)
        at = lambda tree, i: pytree.tree_map(lambda x: x[i : i + 1], tree)
        each = [_one(model, at(obs, i), at(ctx, i * groups // ROWS), at(inp, i)) for i in range(ROWS)]
        says = f"rows stepped alone and stepped together differ ({groups} groups): rows see each other"
        _same(_one(model, obs, ctx, inp), _join(each), says)


@_check
def conditions_lead_with_groups(s: Subject) -> None:
    """Every leaf of a condition leads with the number of contexts, or with 1 where all rows share it."""
    model = s.model()
    for groups in GROUPS:
        for x in pytree.tree_leaves(model.condition(s.args(model, groups)[1])):
            leads = x.shape[:1] in ((1,), (groups,))
            assert leads, (
                f"condition: a leaf is {tuple(x.shape)} for {groups} contexts; it must lead with 1 or {groups}"
            )


@_check
def the_datas_systems_have_contexts(s: Subject) -> None:
    """`context` gives those of the systems it is asked for, in that order, as `condition` takes them."""
    model = s.model()
    order = torch.arange(s.spec.systems, device=s.device).flip(0)
    ctx = model.context(order)
    want = (s.spec.systems, model.spec.ctx)
    assert ctx.shape == want, f"context is {tuple(ctx.shape)} for {s.spec.systems} systems, expected {want}"
    each = torch.cat([model.context(x[None]) for x in order])
    _same(each, ctx, "contexts asked for one by one and together differ", exact=True)
    obs, _, inp = s.args(model, n=s.spec.systems)
    shape = _one(model, obs, ctx, inp)[1].obs.shape
    assert shape == obs.shape, f"a step under the systems' contexts predicts {tuple(shape)} of {tuple(obs.shape)}"


@_check
def a_shared_context_is_a_repeated_context(s: Subject) -> None:
    """G contexts of B / G rows each are the same as a context for every row."""
    model = s.model()
    for groups in GROUPS:
        obs, ctx, inp = s.args(model, groups)
        wide = ctx.repeat_interleave(ROWS // groups, 0)
        says = f"{groups} contexts and the same contexts repeated for each row give different steps"
        _same(_one(model, obs, ctx, inp), _one(model, obs, wide, inp), says)


@_check
def candidates_share_the_condition(s: Subject) -> None:
    """Repeated rows are stepped under the same condition, untouched."""
    model, n = s.model(), 4
    for groups in GROUPS:
        obs, ctx, inp = s.args(model, groups, n=groups)
        cond = model.condition(ctx)
        state = model.init(obs, cond)
        got = model.step(repeat(state, n), StepInput(*repeat(tuple(inp), n)), cond)
        says = f"rows repeated {n} times under the same condition ({groups} groups) do not step as one row does"
        _same(got, repeat(model.step(state, inp, cond), n), says)


@_check
def a_step_observes_what_it_predicts(s: Subject) -> None:
    """`observe` after a step is the step's prediction."""
    model = s.model()
    for groups in GROUPS:
        obs, ctx, inp = s.args(model, groups)
        state, pred = _one(model, obs, ctx, inp)
        _same(model.observe(state, model.condition(ctx)), pred.obs, "observe(state) is not the predicted observation")


# ---------------------------------------------------------------- futures and noise


@_check
def branch_is_steps(s: Subject) -> None:
    """k futures are k steps under k noises, contiguous by row."""
    model, k = s.model(), 3
    for groups in GROUPS:
        obs, ctx, inp = s.args(model, groups)
        cond = model.condition(ctx)
        state, noise = model.init(obs, cond), model.draw(ROWS, k, s.generator(1))
        each = [
            model.step(state, inp._replace(noise=x), cond) for x in noise.unflatten(1, (k, model.noise_dim)).unbind(1)
        ]
        got = model.branch(state, inp._replace(noise=noise), cond, k)
        _same(got, _join(each, _interleave), f"branch differs from {k} steps ({groups} groups)")


@_check
def each_part_tells_its_future(s: Subject) -> None:
    """`each` gives [parts, B * k, ...]; a learner of one part gives what `branch` gives."""
    model, k = s.model(), 3
    obs, ctx, inp = s.args(model, 3)
    cond = model.condition(ctx)
    state = model.init(obs, cond)
    wide = inp._replace(noise=model.draw(ROWS, k, s.generator(1)))
    each, branch = model.each(state, wide, cond, k), model.branch(state, wide, cond, k)[1]
    parts = each.obs.shape[0]
    assert 1 <= parts <= model.parts, f"each: {parts} parts of a learner that has {model.parts}"
    _prediction(s, each, (parts, ROWS * k))
    if parts == 1:
        _same(pytree.tree_map(lambda x: x[0], each.obs), branch.obs, "each differs from branch, with one part only")


@_check
def draws_are_standard_normal(s: Subject) -> None:
    """... and repeatable, in the parameters' type, and others the next time."""
    model, n = s.model(), 2000
    generator = s.generator(3)
    x, later = model.draw(n, 2, generator), model.draw(n, 2, generator)
    assert x.dtype == s.dtype, f"draw gave {x.dtype}, expected the parameters' {s.dtype}"
    _same(x, model.draw(n, 2, s.generator(3)), "draw is not a function of the generator", exact=True)
    if model.noise_dim == 0:
        return
    assert x.isfinite().all(), "draw gave noise that is not finite"
    assert not torch.equal(x, later), "draw gave the same noise twice from one generator"
    off = max(x.mean(0).abs().max().item(), (x.std(0) - 1).abs().max().item())
    assert off < 0.15, f"draw: a column's mean or standard deviation is off by {off:.2f}; expected standard normal"
    inside = (x.abs() < 1).double().mean(0)
    off = (inside - 0.6827).abs().max().item()
    assert off < 0.07, f"draw: a column holds {0.6827 - off:.2f} or {0.6827 + off:.2f} within one standard deviation"


# ---------------------------------------------------------------- loops


@_check
def unroll_is_steps(s: Subject) -> None:
    """Open loop; and forced, where each step is followed by a correction wherever the mask holds."""
    model = s.model()
    for groups in GROUPS:
        obs, ctx, inp = s.args(model, groups)
        cond = model.condition(ctx)
        inputs = [inp, StepInput(*(x.flip(0) for x in inp))]
        target = s.normal(s.generator(5), ROWS, 2, s.spec.obs)
        mask = torch.arange(2 * ROWS, device=obs.device).reshape(ROWS, 2) % 3 > 0
        for forced in (False, True):
            state, preds = model.init(obs, cond), []
            for t, x in enumerate(inputs):
                state, pred = model.step(state, x, cond)
                if forced:
                    state = choose(mask[:, t], model.correct(state, target[:, t], 0.4, cond), state)
                preds.append(pred)
            how = {"forced": target, "alpha": 0.4, "mask": mask} if forced else {}
            got = unroll(model, model.init(obs, cond), iter(inputs), cond, **how)
            _same(got, (state, stack(preds)), f"unroll differs from its steps ({groups} groups, forced: {forced})")


def _imagine(
    s: Subject, model: Dynamics, start: Tree, alive: Tensor, noise: list, cond: Tree, limit: float
) -> tuple[Tree, Tensor, Segment, dict[str, Tensor]]:
    policy = lambda obs, noise: torch.tanh(obs.mean(-1, keepdim=True) + noise)
    terminal = lambda obs, act, after: after[:, 0].abs() > limit
    system = torch.zeros(1, dtype=torch.int64, device=alive.device)
    dt = torch.full_like(alive[:, None], s.dt, dtype=s.dtype)
    return imagine(model, policy, terminal, start, alive, noise, dt, cond, system)


def _noise(s: Subject, model: Dynamics, length: int) -> list[tuple[Tensor, Tensor]]:
    g = s.generator(7)
    return [(s.normal(g, ROWS, s.spec.act), model.draw(ROWS, 1, g)) for _ in range(length)]


@_check
def imagine_is_unroll_until_a_row_ends(s: Subject) -> None:
    """A row follows the open loop under the policy's actions; it ends with its terminal transition and stays there."""
    model, length = s.model(), 6
    for groups in GROUPS:
        obs, ctx, _ = s.args(model, groups)
        cond, noise = model.condition(ctx), _noise(s, model, length)
        limit = obs[:, 0].abs().median().item()
        alive = torch.ones(ROWS, dtype=torch.bool, device=obs.device)
        _, alive, seg, doubt = _imagine(s, model, model.init(obs, cond), alive, noise, cond, limit)
        inputs = StepInput(seg.act, torch.stack([n for _, n in noise], 1), seg.dt)
        _, pred = unroll(model, model.init(obs, cond), steps(inputs), cond)
        out = seg.obs[:, 1:, 0].abs() > limit
        for i in range(ROWS):
            n = int(seg.mask[i].sum())
            here = f"imagine, row {i} of {groups} groups:"
            assert seg.mask[i, :n].all(), f"{here} came back after it had ended"
            assert not out[i, : n - 1].any(), f"{here} went on past its terminal transition"
            ended = n < length or bool(out[i, -1])
            assert bool(alive[i]) != ended, f"{here} alive is {bool(alive[i])}, but it has ended: {ended}"
            at = seg.terminal[i].nonzero().flatten().tolist()
            assert at == ([n - 1] if ended else []), f"{here} terminal at {at}, ended: {ended} after {n}"
            _same(seg.obs[i, 1 : n + 1], pred.obs[i, :n], f"{here} observations differ from the open loop's")
            _same(seg.reward[i, :n], pred.reward[i, :n], f"{here} rewards differ from the open loop's")
            cut = lambda tree, i=i, n=n: pytree.tree_map(lambda x: x[i, :n], tree)
            _same(cut(doubt), cut(pred.uncertainty), f"{here} uncertainties differ from the open loop's")
            assert (seg.obs[i, n:] == seg.obs[i, n]).all(), f"{here} moved after it had ended"
            assert (seg.reward[i, n:] == 0).all(), f"{here} was rewarded after it had ended"


@_check
def ended_rows_may_be_dropped(s: Subject) -> None:
    """Under a condition that all rows share, going on with the rows that are left changes nothing for them."""
    model = s.model()
    obs, ctx, _ = s.args(model)
    cond, noise = model.condition(ctx), _noise(s, model, 6)
    start, alive = model.init(obs, cond), torch.ones(ROWS, dtype=torch.bool, device=obs.device)
    limit = obs[:, 0].abs().median().item()
    _, end, whole, _ = _imagine(s, model, start, alive, noise, cond, limit)
    state, mid, first, _ = _imagine(s, model, start, alive, noise[:3], cond, limit)
    _same(whole.mask[:, :3], first.mask, "imagine in two calls: the first differs")
    left = mid.nonzero().flatten()
    if len(left) == 0:
        return
    rest = [(a[left], w[left]) for a, w in noise[3:]]
    _, end_left, second, _ = _imagine(s, model, rows(state, left), mid[left], rest, cond, limit)
    _same(second.mask, whole.mask[left, 3:], "with ended rows dropped, others end at another step")
    _same(second.obs, whole.obs[left, 3:], "with ended rows dropped, others go another way")
    _same(end_left, end[left], "with ended rows dropped, others are alive or not")


@_check
def a_row_that_diverges_ends_before(s: Subject) -> None:
    """A prediction that is not finite is masked, and touches no other row."""
    model = s.model()
    obs, ctx, _ = s.args(model)
    bad = obs.clone()
    bad[2] = torch.nan
    cond, noise = model.condition(ctx), _noise(s, model, 3)
    go = lambda obs: _imagine(
        s, model, model.init(obs, cond), torch.ones(ROWS, dtype=torch.bool, device=obs.device), noise, cond, torch.inf
    )
    state, alive, seg, doubt = go(bad)
    others = torch.arange(ROWS, device=obs.device) != 2
    assert not seg.mask[2].any(), "a step from nan gave a finite prediction: the row seems alive"
    assert not alive[2], "a row whose first prediction is not finite is still alive"
    assert seg.reward[2].eq(0).all(), "a row that diverged was rewarded"
    good, lived, clean, want = go(obs)
    take = lambda tree: pytree.tree_map(lambda x: x[others], tree)
    _same(
        take((state, alive, seg[:5], doubt)),
        take((good, lived, clean[:5], want)),
        "a row that is not finite changed another row",
    )


# ---------------------------------------------------------------- corrections


@_check
def correct_at_0_leaves_the_state(s: Subject) -> None:
    """... whatever the observation holds: nan is a missing one."""
    model = s.model()
    for groups in GROUPS:
        obs, ctx, inp = s.args(model, groups)
        state, cond = _one(model, obs, ctx, inp)[0], model.condition(ctx)
        _same(model.correct(state, obs, 0.0, cond), state, "correct at 0 changed the state", exact=True)
        missing = torch.full_like(obs, torch.nan)
        says = "correct at 0 with a missing observation (nan) changed the state"
        _same(model.correct(state, missing, 0.0, cond), state, says, exact=True)


@_check
def correct_at_1_imposes(s: Subject) -> None:
    """What is observed after a full correction, or after `init`, is the observation, or its projection (`imposes`)."""
    model = s.model()
    imposes = s.imposes or (lambda model, obs, cond: obs)
    for groups in GROUPS:
        obs, ctx, inp = s.args(model, groups)
        state, cond = _one(model, obs, ctx, inp)[0], model.condition(ctx)
        target = s.normal(s.generator(11), ROWS, s.spec.obs)
        full, want = model.correct(state, target, 1.0, cond), imposes(model, target, cond)
        _same(model.observe(full, cond), want, "correct at 1 does not impose the observation (see `imposes`)")
        _same(model.observe(model.init(target, cond), cond), want, "init does not observe what it was given")
        _same(model.correct(full, target, 1.0, cond), full, "correct at 1 twice differs from once")


@_check
def correct_between_interpolates(s: Subject) -> None:
    """Between 0 and 1 the state moves in proportion; the strength is one number, or one for each row."""
    model = s.model()
    for groups in GROUPS:
        obs, ctx, inp = s.args(model, groups)
        state, cond = _one(model, obs, ctx, inp)[0], model.condition(ctx)
        target = s.normal(s.generator(11), ROWS, s.spec.obs)
        full = model.correct(state, target, 1.0, cond)
        floats = lambda tree: [x for x in pytree.tree_leaves(tree) if x.is_floating_point()]
        part = floats(model.correct(state, target, 0.25, cond))
        want = [0.75 * x + 0.25 * y for x, y in zip(floats(state), floats(full), strict=True)]
        _same(part, want, "correct at 1/4 is not a quarter of the way")
        alpha = torch.tensor([[0.0], [1.0]] * (ROWS // 2), device=obs.device, dtype=obs.dtype)
        got = model.correct(state, target, alpha, cond)
        _same(
            got, choose(alpha[:, 0] > 0.5, full, state), "correct with a strength for each row differs from each row's"
        )
        tensor = torch.tensor(0.25, device=obs.device, dtype=obs.dtype)
        _same(floats(model.correct(state, target, tensor, cond)), want, "correct: alpha as a tensor [] acts otherwise")


@_check
def correct_at_1_replaces_what_is_not_finite(s: Subject) -> None:
    """A state that is lost becomes `init(obs)`: its unseen part cannot be imposed."""
    model = s.model()
    for groups in GROUPS:
        obs, ctx, inp = s.args(model, groups)
        state, cond = _one(model, obs, ctx, inp)[0], model.condition(ctx)
        lost = torch.arange(ROWS, device=obs.device) < 2
        want = choose(lost, model.init(obs, cond), model.correct(state, obs, 1.0, cond))
        for bad in (torch.nan, torch.inf):
            broken = choose(lost, pytree.tree_map(lambda x, bad=bad: _filled(x, bad), state), state)
            got = model.correct(broken, obs, 1.0, cond)
            _same(got, want, f"correct at 1 of a state that is {bad} is not init(obs)")


# ---------------------------------------------------------------- training


@_check
def what_is_masked_weighs_nothing(s: Subject) -> None:
    """Masked steps leave no trace in the gradient."""
    model = s.model()
    segment, noise = s.training(model)
    mask = segment.mask.clone()
    mask[::2, 3:] = False
    kept = segment._replace(mask=mask)
    junk = kept._replace(obs=segment.obs.clone(), act=segment.act.clone(), reward=segment.reward.clone())
    junk.obs[::2, 4:] = 7.0
    junk.act[::2, 3:] = -1.0
    junk.reward[::2, 3:] = 5.0
    for name, f in {
        "loss": lambda x: model.loss(x, noise)[0],
        "losses": lambda x: model.losses(x, noise).sum(),
    }.items():
        says = f"{name}: the gradient depends on masked steps"
        _same(_gradients(model, f(kept)), _gradients(model, f(junk)), says)
    _same(model.validate(kept, noise), model.validate(junk, noise), "validate depends on masked steps")


@_check
def groups_hold_every_parameter_once(s: Subject) -> None:
    """What `groups` gives the optimiser: every parameter that is trained, none twice."""
    model = s.model()
    given = [id(p) for g in model.groups() for p in g["params"]]
    assert len(given) == len(set(given)), "groups: a parameter stands in two groups"
    names = {id(p): k for k, p in model.named_parameters() if p.requires_grad}
    missing = [name for key, name in names.items() if key not in set(given)]
    assert not missing, f"groups: these would not be trained (requires_grad_(False) says so on purpose): {missing}"


@_check
def parts_do_not_see_each_other(s: Subject) -> None:
    """A part's loss is that of its own rows alone."""
    model = s.model()
    if model.parts == 1:
        return
    segment, noise = s.training(model)
    n = len(segment.obs) // model.parts
    other = segment._replace(obs=segment.obs.clone())
    other.obs[:n, 1:] += 1.0
    a, b = model.losses(segment, noise), model.losses(other, noise)
    assert (a[0] - b[0]).abs() > 1e-6, "losses: the first part does not notice that its own rows changed"
    _same(a[1:], b[1:], "losses: a part's loss depends on the rows of another")


@_check
def a_loss_without_noise_ignores_it(s: Subject) -> None:
    """`noisy_loss = False` promises that the noise of a loss is not read: fits pass zeros."""
    model = s.model()
    if model.noisy_loss:
        return
    segment, noise = s.training(model)
    losses = lambda noise: [f(segment, noise) for f in (model.loss, model.losses, model.validate)]
    _same(losses(noise), losses(noise * 0), "noisy_loss is False, but a loss depends on its noise", exact=True)


@_check
def saves_and_loads(s: Subject) -> None:
    """The state_dict holds everything: through safetensors, another instance predicts the same, bit for bit."""
    from safetensors.torch import load, save

    model = s.model()
    data = save({k: v.contiguous() for k, v in model.state_dict().items()})
    other = s.fresh(seed=1)
    other.load_state_dict(load(data))
    want, got = _everything(s, model), _everything(s, other)
    _same(
        got, want, "a learner that was saved and loaded predicts otherwise: its state_dict lacks something", exact=True
    )


@_check
def learns_a_linear_system(s: Subject) -> None:
    """Sixty steps of Adam lower the loss by a fifth, every part's held-out error, and that of one-step predictions."""
    model = s.fresh()
    segment, _ = s.training(model)
    unseen, unseen_noise = s.training(model, seed=2)
    model.prepare(segment)
    optimizer, losses, g = torch.optim.Adam(model.groups(), lr=1e-2), [], s.generator(4)
    held = lambda: model.validate(unseen, unseen_noise)
    before, error = held(), _error(s, model, unseen)
    for _ in range(60):
        noise = s.normal(g, *segment.reward.shape, model.noise_dim)
        loss = model.losses(segment, noise).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2 * abs(losses[0]), f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g} only"
    after = held()
    assert (after < before).all(), f"the held-out error of the parts went from {before.tolist()} to {after.tolist()}"
    model.finish(after)
    final = _error(s, model, unseen)
    if error is not None and final is not None:
        says = f"the loss falls, but the error of one-step predictions goes from {error:.4g} to {final:.4g}"
        assert final < error, says


@torch.no_grad()
def _error(s: Subject, model: Dynamics, segment: Segment) -> float | None:
    """The mean squared error of the first step of each window; None where it takes contexts, which a learner that has
    them learns for itself."""
    obs, n = segment.obs[:, 0], len(segment.obs)
    if any(len(x) > 1 for x in pytree.tree_leaves(model.condition(obs.new_zeros(2, model.spec.ctx)))):
        return None
    ctx = obs.new_zeros(1, model.spec.ctx)
    inp = StepInput(segment.act[:, 0], model.draw(n, 1, s.generator(6)), segment.dt[:, 0])
    return (_one(model, obs, ctx, inp)[1].obs - segment.obs[:, 1]).square().mean().item()


# ---------------------------------------------------------------- devices, compilation, seeds


@contextmanager
def _elsewhere() -> Iterator[None]:
    """A default device on which nothing can be computed."""
    with torch.device("meta"):
        yield


@_check
def makes_no_tensor_on_the_default_device(s: Subject) -> None:
    """A constant that is made without `device=` meets a tensor on another device, and raises."""
    model = s.model()
    obs, ctx, inp = s.args(model, 3)
    wide = inp._replace(noise=model.draw(ROWS, 2, s.generator(0)))
    segment, noise = s.training(model)
    generator = s.generator(0)
    alpha = torch.tensor(0.3, device=obs.device, dtype=obs.dtype)
    with _elsewhere():
        try:
            state, _ = _one(model, obs, ctx, inp)
            cond = model.condition(ctx)
            out = [state, model.correct(state, obs, alpha, cond), model.observe(state, cond)]
            out += [
                model.branch(state, wide, cond, 2),
                model.each(state, wide, cond, 2),
                model.draw(ROWS, 2, generator),
            ]
            out += [model.loss(segment, noise), model.losses(segment, noise), model.validate(segment, noise)]
        except Exception as error:
            raise AssertionError("a method makes a tensor on the default device, not on its inputs'") from error
    stray = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor) and x.device.type == "meta"]
    assert not stray, "a method returns a tensor on the default device, not on its inputs'"


def _compiled(fn: Callable[..., Any], backend: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend=backend, dynamic=False)


def _compiles(what: str, fn: Callable[..., Any], *args: Any, backend: str = "aot_eager") -> None:
    with torch.no_grad():
        want = fn(*args)
    try:
        with torch.no_grad():
            got = _compiled(fn, backend)(*args)
    except Exception as error:
        raise AssertionError(f"{what} does not compile as one graph: {_first_line(error)}") from error
    _same(got, want, f"{what}: compiled and eager differ")


@_check
def step_compiles_whole(s: Subject) -> None:
    """`torch.compile(fullgraph=True)`: no host synchronisation, no branch on a value, no generator."""
    model = s.model()
    _compiles("step", lambda *args: _one(model, *args), *s.args(model, 3))


@_check
def rollout_compiles_whole(s: Subject) -> None:
    """A forced rollout, its condition included, as one graph; and one with a policy. Traced only: what becomes of a
    step's graph later is `step_compiles_whole`'s to say."""
    model = s.model()
    obs, ctx, inp = s.args(model, 3)
    inputs = StepInput(*(torch.stack([x] * 2, 1) for x in inp))
    alpha = torch.tensor(0.3, device=obs.device, dtype=obs.dtype)
    noise = _noise(s, model, 1)
    alive = torch.ones(ROWS, dtype=torch.bool, device=obs.device)

    def run(obs: Tensor, ctx: Tensor, inputs: StepInput, alive: Tensor, noise: list) -> Tree:
        cond = model.condition(ctx)
        start = model.init(obs, cond)
        forced = torch.zeros_like(obs)[:, None].expand(-1, 2, -1)
        return unroll(model, start, steps(inputs), cond, forced=forced, alpha=alpha), _imagine(
            s, model, start, alive, noise, cond, 1.0
        )

    _compiles("a rollout", run, obs, ctx, inputs, alive, noise, backend="eager")


@_check
def loss_compiles_whole(s: Subject) -> None:
    """The training loss and its gradient."""
    model = s.model()
    segment, noise = s.training(model, length=2)
    run = lambda segment, noise: model.losses(segment, noise).sum()
    want = _gradients(model, run(segment, noise))
    try:
        got = _gradients(model, _compiled(run, "aot_eager")(segment, noise))
    except Exception as error:
        raise AssertionError(f"losses does not compile as one graph: {_first_line(error)}") from error
    _same(got, want, "losses: the compiled and the eager gradient differ")


def _over_seeds(model: Dynamics, fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn(model, *args) for parameters, buffers and arguments that lead with the seeds."""
    call = torch.func.functional_call
    return torch.func.vmap(lambda p, b, *args: call(model, (p, b), (fn, *args)), randomness="error")


def _seeds(s: Subject, n: int = 3) -> tuple[list[Dynamics], dict[str, Tensor], dict[str, Tensor]]:
    many = [s.model(seed) for seed in range(n)]
    for seed, model in enumerate(many):  # they differ, whatever build draws from
        g = s.generator(seed)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * s.normal(g, *p.shape)
    return many, *torch.func.stack_module_state(many)  # type: ignore[return-value]


@_check
def vmaps_over_seeds(s: Subject) -> None:
    """Several seeds in one call are the seeds one by one."""
    many, params, buffers = _seeds(s)
    args = s.args(many[0], 3)
    want = _join([_one(model, *args) for model in many], torch.stack)
    wide = pytree.tree_map(lambda x: torch.stack([x] * len(many)), args)
    try:
        got = _over_seeds(many[0], _one)(params, buffers, *wide)
    except Exception as error:
        raise AssertionError(f"step does not vmap over seeds: {_first_line(error)}") from error
    _same(got, want, "seeds stepped together differ from seeds stepped one by one")


@_check
def seeds_trained_together_are_seeds_trained_apart(s: Subject) -> None:
    """Gradient steps on stacked seeds; the data of one are not finite: it stays, and the others do not notice."""
    many, params, buffers = _seeds(s)
    template, rate = many[0], 0.01
    train = {k for k, p in template.named_parameters() if p.requires_grad}
    data = [s.training(model, seed) for seed, model in enumerate(many)]
    data[1][0].obs[0, 1] = torch.nan
    batch = _join(data, torch.stack)
    params = {k: p.detach() for k, p in params.items()}
    loss = _over_seeds(template, lambda model, segment, noise: model.losses(segment, noise).sum())
    for _ in range(2):
        free = {k: p.clone().requires_grad_() for k, p in params.items() if k in train}
        try:
            total = loss({**params, **free}, buffers, *batch).sum()
        except Exception as error:
            raise AssertionError(f"losses does not vmap over seeds: {_first_line(error)}") from error
        grads = torch.autograd.grad(total, list(free.values()), allow_unused=True, materialize_grads=True)
        sound = torch.stack([g.reshape(len(g), -1).isfinite().all(1) for g in grads]).all(
            0
        )  # [S]: as loops do, seed by seed
        moved = {k: free[k].detach() - rate * g for k, g in zip(free, grads, strict=True)}
        params |= {k: choose(sound, x, params[k]) for k, x in moved.items()}
    for i in (0, 2):
        for _ in range(2):
            grads = _gradients(many[i], many[i].losses(*data[i]).sum())
            with torch.no_grad():
                for k, p in many[i].named_parameters():
                    if k in train:
                        p -= rate * grads[k]
        got = {k: p[i] for k, p in params.items()}
        want = {k: p.detach() for k, p in many[i].named_parameters()}
        _same(got, want, f"seed {i} trained together with others ends elsewhere than alone")
