"""The ensemble where it must equal something simpler, member by member."""

import pytest
import torch
import torch.nn.functional as F

from mbrl.core import Segment, Spec, StepInput
from mbrl.dynamics.ensemble import TILES, EnsembleConfig
from mbrl.nets import ROWS, variance
from mbrl.rollout import unroll

close = torch.testing.assert_close
SPEC = Spec(obs=3, act=2)
SMALL = {"hidden": (16, 16), "weight_decay": (1e-5, 2e-5, 3e-5)}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=gen(seed), dtype=dtype)


def make(dtype=torch.float64, **options):
    """An ensemble as after a fit: normalisers set, elites chosen, biases and bounds of its own."""
    model = EnsembleConfig(**{**SMALL, **options}).build(SPEC, gen()).to(dtype)
    for i, p in enumerate([*model.net.biases, model.upper, model.lower]):
        p.data += 0.3 * normal(*p.shape, seed=i).to(p)
    model.prepare(segment(400, seed=9, dtype=dtype))
    model.finish(torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0])[: model.parts])
    return model


def segment(n, seed=0, dtype=torch.float64):
    obs = normal(n, 2, 3, seed=seed, dtype=dtype) * torch.tensor([1.0, 10.0, 0.1], dtype=dtype) + 2
    act, reward = normal(n, 1, 2, seed=seed + 1, dtype=dtype), normal(n, 1, seed=seed + 2, dtype=dtype)
    mask = torch.ones(n, 1, dtype=torch.bool)
    return Segment(obs, act, reward, ~mask, mask, torch.ones_like(reward)[..., None], torch.zeros(1, dtype=torch.int64))


def inputs(model, n, k=1, seed=3):
    like = next(model.parameters())
    act, one = normal(n, 2, seed=seed).to(like), torch.ones(n, 1, dtype=like.dtype)
    return normal(n, 3, seed=seed + 1).to(like), StepInput(act, model.draw(n, k, gen(seed)), one)


def member(model, i, obs, act):
    """Mean and standard deviation [B, O + 1], raw, of one member, from the recipe's own formulas."""
    x = (torch.cat([obs, act], -1) - model.inputs.mean) / model.inputs.std
    for weight, bias in zip(model.net.weights[:-1], model.net.biases[:-1], strict=True):
        x = F.silu(x @ weight[i] + bias[i])
    mean, raw = (x @ model.net.weights[-1][i] + model.net.biases[-1][i]).chunk(2, -1)
    logvar = model.upper[i] - F.softplus(model.upper[i] - raw)
    logvar = model.lower[i] + F.softplus(logvar - model.lower[i])
    return mean * model.targets.std + model.targets.mean, (0.5 * logvar).exp() * model.targets.std


def naming(model, elite):
    """The noise that names an elite."""
    return torch.special.ndtri((elite.double() + 0.5) / len(model.elites)).to(next(model.parameters()))


# ---------------------------------------------------------------- prediction


@pytest.mark.parametrize("scale", [False, True])
def test_a_step_is_taken_by_the_elite_that_the_noise_names(scale):
    model = make(scale_targets=scale)
    assert model.elites.tolist() == [1, 3, 5, 0, 2]
    obs, inp = inputs(model, 5)
    inp.noise[:, -1] = naming(model, torch.arange(5))
    state, pred = model.step(obs, inp, ())
    every = [member(model, i, obs, inp.act) for i in model.elites.tolist()]
    for row, (mean, std) in enumerate(every):
        y = mean[row] + std[row] * inp.noise[row, :-1]
        close(state[row], obs[row] + y[:-1])
        close(pred.reward[row], y[-1])
    close(pred.obs, state, rtol=0, atol=0)
    means, stds = (torch.stack(x) for x in zip(*every, strict=True))
    close(pred.uncertainty["aleatoric"], stds.norm(dim=-1).amax(0))
    apart = (means - means.mean(0))[..., :-1] / model.spread
    close(pred.uncertainty["disagreement"], apart.norm(dim=-1).amax(0))
    assert (model.targets.std != 1).all() == scale


def test_the_variance_is_the_soft_bounded_one():
    raw, upper, lower = normal(1000) * 8, torch.tensor(0.5).double(), torch.tensor(-10.0).double()
    logvar = upper - F.softplus(upper - raw)
    close(variance(raw, upper, lower).log(), lower + F.softplus(logvar - lower))
    far = variance(torch.tensor([-1e4, 1e4]), torch.tensor(0.5), torch.tensor(-10.0))
    close(far, torch.tensor([-10.0, 0.5]).exp(), rtol=1e-4, atol=0)  # finite in float32, at the bounds


def test_only_elites_predict():
    model = make()
    obs, inp = inputs(model, 600)
    want = model.step(obs, inp, ())
    idle = [i for i in range(7) if i not in model.elites.tolist()]
    for p in model.parameters():
        p.data[idle] = torch.nan
    got = model.step(obs, inp, ())
    close(got[0], want[0], rtol=0, atol=0)
    close(got[1].uncertainty, want[1].uncertainty, rtol=0, atol=0)


def test_branching_evaluates_once():
    model, seen = make(), []
    inner = model._predicted
    model._predicted = lambda x, members: (seen.append(tuple(x.shape[:2])), inner(x, members))[1]
    obs, inp = inputs(model, 6, k=10)
    model.branch(obs, inp, (), 10)
    assert seen == [(1, 6)]
    obs, inp = inputs(model.reporting(), 6, k=10)
    model.reporting().branch(obs, inp, (), 10)
    assert seen[1:] == [(1, 6)]  # 10 futures of 5 elites: all are drawn, one evaluation of all serves


def test_a_cpu_takes_many_rows_in_chunks_to_the_same_end():
    model = make()
    obs, inp = inputs(model, 2 * ROWS + 77, k=2)
    want = model.branch(obs, inp, (), 2)  # with gradients: whole
    with torch.no_grad():
        got = model.branch(obs, inp, (), 2)
    close(got[0], want[0].detach())
    close(got[1].uncertainty, {k: v.detach() for k, v in want[1].uncertainty.items()})


def test_uncertainty_that_is_no_number_is_infinite():
    model = make()
    obs, inp = inputs(model, 4)
    obs[1] = torch.nan
    doubt = model.step(obs, inp, ())[1].uncertainty
    for value in doubt.values():
        assert value.isinf().tolist() == [False, True, False, False]


# ---------------------------------------------------------------- only what is drawn

MANY = 5 * TILES * 16  # rows from which it pays


@pytest.mark.parametrize("draws", ["random", "one", "skewed", "two futures"])
def test_only_the_drawn_member_of_a_row_is_evaluated(draws):
    model = make()
    n, k = MANY + 3, 2 if draws == "two futures" else 1
    obs, inp = inputs(model, n, k)
    if draws == "one":
        inp.noise[:, -1] = naming(model, torch.tensor(4))
    if draws == "skewed":
        inp.noise[:, -1] = naming(model, (torch.arange(n) == 17) * 3)
    quick, rows = model.reporting(), []
    inner = quick._predicted
    quick._predicted = lambda x, members: (rows.append(x.shape[0] * x.shape[1]), inner(x, members))[1]
    want, got = model.branch(obs, inp, (), k), quick.branch(obs, inp, (), k)
    close(got[0], want[0])
    close(got[1].reward, want[1].reward)
    assert got[1].uncertainty == {}
    assert sum(rows) < 1.2 * n * k  # where all the elites would be five times as many
    rows.clear()
    with torch.no_grad():
        close(quick.branch(obs, inp, (), k)[0], want[0])
    assert sum(rows) < 1.2 * n * k
    assert (len(rows) > 1) == (n * k > 2 * ROWS)  # a few tiles at a time


def test_what_is_not_drawn_is_not_evaluated():
    model = make().reporting()
    obs, inp = inputs(model, MANY)
    inp.noise[:, -1] = naming(model, torch.arange(MANY) % 2 * 2)  # elites 0 and 2
    want = model.step(obs, inp, ())[0]
    for p in model.parameters():
        p.data[model.elites[[1, 3, 4]]] = torch.nan
    close(model.step(obs, inp, ())[0], want, rtol=0, atol=0)


def test_drawn_rows_compile_and_vmap():
    model = make().reporting()
    obs, inp = inputs(model, MANY)
    want = model.step(obs, inp, ())
    torch._dynamo.reset()
    whole = torch.compile(lambda o, i: model.step(o, i, ()), fullgraph=True, backend="aot_eager")
    close(whole(obs, inp)[0], want[0])
    params, buffers = torch.func.stack_module_state([model, model])
    one = lambda m, o, i: m.step(o, i, ())[0]
    got = torch.func.vmap(lambda p, b: torch.func.functional_call(model, (p, b), (one, obs, inp)))(params, buffers)
    close(got, torch.stack([want[0]] * 2))


def test_reporting_shares_the_parameters():
    model = make()
    view = model.reporting("disagreement")
    obs, inp = inputs(model, 5)
    assert set(view.step(obs, inp, ())[1].uncertainty) == {"disagreement"}
    assert set(model.step(obs, inp, ())[1].uncertainty) == {"aleatoric", "disagreement"}
    model.net.weights[0].data.mul_(2)
    model.finish(torch.arange(7.0))
    close(view.step(obs, inp, ())[0], model.step(obs, inp, ())[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match="epistemic"):
        model.reporting("epistemic")


# ---------------------------------------------------------------- draws and pins


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_futures_are_shared_out_among_the_elites(dtype):
    model = make(dtype)
    noise = model.draw(2000, 10, gen()).view(2000, 10, -1)
    one_hot = F.one_hot((torch.special.ndtr(noise[..., -1]) * 5).long(), 5)
    assert (one_hot.sum(1) == 2).all(), "10 futures of 5 elites are 2 draws from each"
    assert (one_hot[:, 0].sum(0) - 400).abs().max() < 80, "each future alone picks any elite"
    single = F.one_hot((torch.special.ndtr(model.draw(5000, 1, gen())[:, -1]) * 5).long(), 5).sum(0)
    assert (single - 1000).abs().max() < 120
    flat = noise[..., :-1].flatten()
    assert abs(flat.mean()) < 0.02
    assert abs(flat.std() - 1) < 0.02


def test_a_pinned_elite_steps_its_group_alone():
    model = make()
    obs, inp = inputs(model, 12)
    elite = torch.tensor([3, 0, 3])
    inp.noise[:, -1] = naming(model, elite).repeat_interleave(4)
    cond = model.pinned(elite)
    free, (state, pred) = model.step(obs, inp, ()), model.step(obs, inp, cond)
    close(state, free[0])
    close(pred.reward, free[1].reward)
    assert set(pred.uncertainty) == {"aleatoric"}
    own = [
        member(model, model.elites[e], obs[4 * g : 4 * g + 4], inp.act[4 * g : 4 * g + 4])[1]
        for g, e in enumerate(elite)
    ]
    close(pred.uncertainty["aleatoric"], torch.cat(own).norm(dim=-1))
    inp.noise[:, -1] = 0.3  # no longer read
    for p in model.parameters():
        p.data[model.elites[[1, 2, 4]]] = torch.nan
    close(model.step(obs, inp, model.pinned(elite))[0], state)
    whole = unroll(model, obs, [inp] * 5, model.pinned(elite))[0]
    first = unroll(model, obs[:4], [StepInput(*(x[:4] for x in inp))] * 5, model.pinned(elite[:1]))[0]
    close(whole[:4], first)
    with pytest.raises(RuntimeError):
        model.step(obs[:10], StepInput(*(x[:10] for x in inp)), cond)  # 3 groups do not divide 10 rows


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("scale", [False, True])
def test_the_losses_are_the_likelihoods_of_each_members_own_rows(scale):
    model, seg = make(scale_targets=scale, members=3, elites=2), segment(12)
    mask = seg.mask.clone()
    mask[5:7] = False
    seg = seg._replace(mask=mask)
    got = model.losses(seg, torch.zeros(12, 1, 5))
    target = torch.cat([seg.obs[:, 1] - seg.obs[:, 0], seg.reward], -1)
    for i in range(3):
        keep = torch.arange(4 * i, 4 * i + 4)
        keep = keep[mask[keep, 0]]
        mean, std = member(model, i, seg.obs[keep, 0], seg.act[keep, 0])
        log_prob = torch.distributions.Normal(mean, std).log_prob(target[keep]) + model.targets.std.log()
        nll = (-2 * log_prob - torch.log(torch.tensor(2 * torch.pi))).mean()
        close(got[i], nll + 0.01 * (model.upper[i] - model.lower[i]).sum())
    errors = model.validate(seg, torch.zeros(12, 1, 5))
    keep = mask[:, 0]
    for i in range(3):
        mean, _ = member(model, i, seg.obs[keep, 0], seg.act[keep, 0])
        close(errors[i], (((mean - target[keep]) / model.targets.std) ** 2).mean())


def test_a_member_that_is_lost_does_not_touch_the_others():
    model, seg, noise = make(), segment(70), torch.zeros(70, 1, 5)
    model.losses(seg, noise).sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.net.weights[1].data[4] = torch.nan
    model.zero_grad()
    losses = model.losses(seg, noise)
    losses.sum().backward()
    others = [0, 1, 2, 3, 5, 6]
    assert losses[others].isfinite().all()
    assert losses[4].isnan()
    for name, p in model.named_parameters():
        close(p.grad[others], want[name][others], rtol=0, atol=0)


def test_preparing_sets_the_units():
    model, seg = make(scale_targets=True), segment(500, seed=4)
    seg.mask[400:] = False
    seg.obs[400:] = 1e6  # masked rows weigh nothing
    model.prepare(seg)
    x = torch.cat([seg.obs[:400, 0], seg.act[:400, 0]], -1)
    change = seg.obs[:400, 1] - seg.obs[:400, 0]
    close(model.inputs.mean, x.mean(0))
    close(model.inputs.std, x.std(0, correction=0))
    close(model.spread, change.std(0, correction=0))
    close(model.targets.std, torch.cat([change, seg.reward[:400]], -1).std(0, correction=0))
    plain = make()
    plain.prepare(seg)
    close(plain.targets.std, torch.ones(4).double())
    with pytest.raises(ValueError, match="dt"):
        model.prepare(seg._replace(dt=torch.linspace(0, 1, 500)[:, None, None]))


def test_every_weight_decays_by_its_layer():
    model = EnsembleConfig().build(SPEC, gen())
    groups = model.groups()
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert [decay[id(w)] for w in model.net.weights] == [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]
    assert all(decay[id(p)] == 0 for p in [*model.net.biases, model.upper, model.lower])
    assert len(decay) == len(list(model.parameters()))
    assert model.upper.requires_grad
    assert [tuple(w.shape) for w in model.net.weights] == [(7, 5, 200), *[(7, 200, 200)] * 3, (7, 200, 8)]


def test_the_best_become_the_elites():
    model = make()
    nan, inf = torch.nan, torch.inf
    model.finish(torch.tensor([0.5, nan, 0.1, 0.4, inf, 0.2, 0.3]))
    assert model.elites.tolist() == [2, 5, 6, 3, 0]
    model.finish(torch.tensor([0.5, nan, 0.1, inf, inf, nan, nan]))
    assert model.elites.tolist() == [2, 0, 2, 0, 2]
    with pytest.raises(RuntimeError, match="diverged"):
        model.finish(torch.full((7,), nan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elites": 8}, "elites is 8"),
        ({"hidden": (8,)}, "one a layer"),
        ({"uncertainty": ("aleatoric", "doubt")}, "doubt"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleConfig(**{**SMALL, **options}).build(SPEC, gen())
