"""The single network where it must equal something simpler: an ensemble of one member, its own formulas, a line."""

import pytest
import torch
import torch.nn.functional as F
from worlds import line_data, never

from mbrl import offline
from mbrl.core import Segment, Spec, StepInput, repeat
from mbrl.data import one_step
from mbrl.dynamics.ensemble import EnsembleConfig
from mbrl.dynamics.single import SingleConfig
from mbrl.fit import FitConfig, fit
from mbrl.nets import ROWS
from mbrl.offline import Imagination, OfflineConfig, Penalty
from mbrl.sac import SacConfig

close = torch.testing.assert_close
SPEC = Spec(obs=3, act=2)
SMALL = {"hidden": (16, 16), "weight_decay": (1e-3, 2e-3, 3e-3)}
ONE = EnsembleConfig(members=1, elites=1, uncertainty=("aleatoric",), **SMALL)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64)


def segment(n, seed=0):
    obs = normal(n, 2, 3, seed=seed) * torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64) + 2
    act, reward = normal(n, 1, 2, seed=seed + 1), normal(n, 1, seed=seed + 2)
    mask = torch.arange(n)[:, None] % 3 > 0
    return Segment(obs, act, reward, ~mask, mask, torch.ones_like(reward)[..., None], torch.zeros(1, dtype=torch.int64))


def make(**options):
    model = SingleConfig(**SMALL, **options).build(SPEC, gen()).double()
    for i, p in enumerate([*model.net.biases, *model.bounds]):
        p.data += 0.3 * normal(*p.shape, seed=i)
    model.prepare(segment(400, seed=9))
    return model


@pytest.mark.parametrize("n", [6, 2 * ROWS + 7])
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_a_step_is_the_formula(scale, gaussian, n):
    model = make(gaussian=gaussian, scale_targets=scale)
    obs, act, noise = normal(n, 3, seed=1), normal(n, 2, seed=2), normal(n, 4 if gaussian else 0, seed=3)
    x = (torch.cat([obs, act], -1) - model.inputs.mean) / model.inputs.std
    for weight, bias in zip(model.net.weights[:-1], model.net.biases[:-1], strict=True):
        x = F.silu(x @ weight[0] + bias[0])
    y = x @ model.net.weights[-1][0] + model.net.biases[-1][0]
    mean, std = y[:, :4] * model.targets.std + model.targets.mean, torch.zeros(n, 4, dtype=torch.float64)
    if gaussian:
        upper, lower = model.bounds
        logvar = upper - F.softplus(upper - y[:, 4:])
        std = (0.5 * (lower + F.softplus(logvar - lower))).exp() * model.targets.std
        mean = mean + std * noise
    with torch.no_grad():
        state, pred = model.step(obs, StepInput(act, noise, torch.ones(n, 1)), ())
    close((state, pred.obs, pred.reward), (obs + mean[:, :3], obs + mean[:, :3], mean[:, 3]))
    assert set(pred.uncertainty) == ({"aleatoric"} if gaussian else set())
    if gaussian:
        close(pred.uncertainty["aleatoric"], std.norm(dim=-1))
    assert (model.targets.std != 1).all() == scale


def test_a_gaussian_one_is_an_ensemble_of_one_member_step_loss_and_fit():
    one, many = (c.build(SPEC, gen()) for c in (SingleConfig(gaussian=True, scale_targets=False, **SMALL), ONE))
    data, config = line_data(), FitConfig(max_epochs=4, batch=64)
    pair = [c.build(data.spec, gen()) for c in (one.config, many.config)]
    reports = [fit(model, data, config, gen(5)) for model in pair]
    assert reports[0].best == pytest.approx(reports[1].best, rel=1e-4)
    obs, act, noise = torch.randn(9, 1), torch.randn(9, 1), torch.randn(9, 2)
    got = pair[0].step(obs, StepInput(act, noise, torch.ones(9, 1)), ())[1]
    want = pair[1].step(obs, StepInput(act, torch.cat([noise, noise[:, :1]], 1), torch.ones(9, 1)), ())[1]
    close(got, want, rtol=1e-3, atol=1e-5)
    part, nothing = segment(30), torch.zeros(())
    one, many = one.double(), many.double()
    for model in (one, many):
        model.prepare(part)
    close(one.loss(part, nothing)[0], many.loss(part, nothing)[0])
    close(one.validate(part, nothing), many.validate(part, nothing))


def test_the_deterministic_loss_is_the_squared_error_in_units_of_the_datas_spread():
    model, part = make(), segment(30)
    keep = part.mask[:, 0]
    obs, act = part.obs[keep, 0], part.act[keep, 0]
    pred = model.step(obs, StepInput(act, obs[:, :0], obs[:, :1]), ())[1]
    wrong = torch.cat([pred.obs - part.obs[keep, 1], (pred.reward - part.reward[keep, 0])[:, None]], 1)
    close(model.loss(part, part.obs[..., :0])[0], (wrong / model.targets.std).square().mean())


@pytest.mark.parametrize("gaussian", [False, True])
def test_it_learns_a_line_and_its_reward(gaussian):
    data = line_data()
    config = SingleConfig(gaussian=gaussian, hidden=(32, 32), weight_decay=(0.0,) * 3)
    model = config.build(data.spec, gen())
    fit(model, data, FitConfig(lr=3e-3, max_epochs=60, batch=32), gen(1))
    noise = torch.zeros(len(data), model.noise_dim)
    pred = model.step(data.obs, StepInput(data.act, noise, torch.ones(len(data), 1)), ())[1]
    assert (pred.obs - data.next_obs).square().mean() < 1e-3 * data.next_obs.var()
    assert (pred.reward - data.reward).square().mean() < 1e-2 * data.reward.var()
    if gaussian:  # the line has no noise: the variance falls
        assert pred.uncertainty["aleatoric"].mean() < 0.2


def test_the_variance_of_noisy_data_is_learned():
    data = line_data(2000)
    t = data.transitions()
    t = t._replace(next_obs=t.next_obs + 0.3 * torch.randn(t.obs.shape, generator=gen(7)))
    model = SingleConfig(gaussian=True, hidden=(16,), weight_decay=(0.0, 0.0)).build(data.spec, gen())
    model.prepare(one_step(t))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        model.loss(one_step(t), torch.zeros(()))[0].backward()
        optimizer.step()
    inp = StepInput(repeat(t.act[:1], 4000), torch.randn(4000, 2, generator=gen(8)), torch.ones(4000, 1))
    drawn = model.step(repeat(t.obs[:1], 4000), inp, ())[0]
    assert drawn.std().item() == pytest.approx(0.3, rel=0.15)


def test_a_doubt_that_is_not_a_number_is_infinite():
    model = make(gaussian=True)
    obs = normal(2, 3)
    obs[1] = torch.nan
    doubt = model.step(obs, StepInput(normal(2, 2), normal(2, 4), normal(2, 1)), ())[1].uncertainty["aleatoric"]
    assert doubt.isfinite().tolist() == [True, False]
    assert doubt[1] == torch.inf


def test_branches_evaluate_once():
    model, seen = make(gaussian=True), []
    inner = model.evaluate
    model.evaluate = lambda x, cond: (seen.append(len(x)), inner(x, cond))[1]
    model.branch(normal(6, 3), StepInput(normal(6, 2), normal(6, 40), normal(6, 1)), (), 10)
    assert seen == [6]


def offline_config(penalty):
    imagination = Imagination(horizon=2, rollouts=20, every=10, penalty=penalty)
    agent = SacConfig(hidden=(8,), robust=0.1, spectral=2.0)
    return OfflineConfig(agent, imagination, updates=20, batch=16, evaluate_every=20)


def run_offline(config, penalty, **options):
    fitting = FitConfig(max_epochs=2)
    return offline.train(
        offline_config(penalty), line_data(), dynamics=config, fitting=fitting, terminal=never, **options
    )


@pytest.mark.parametrize(("gaussian", "penalty"), [(True, Penalty(1.0)), (False, Penalty(0.0))])
def test_the_offline_loop_learns_in_one(gaussian, penalty):
    result = run_offline(SingleConfig(gaussian=gaussian, **SMALL), penalty)
    assert all(v.isfinite().all() for v in result.agent.state_dict().values())
    assert type(result.models[0]).__name__ == "Single"


@pytest.mark.parametrize(
    ("penalty", "message"),
    [(Penalty(1.0), r"'aleatoric'.*got none"), (Penalty(1.0, "bellman"), "spread over the parts")],
)
def test_a_penalty_that_it_cannot_tell_is_an_error_before_anything_is_fitted(penalty, message):
    class Refuse(offline.Forget):
        def save(self, name, tensors, facts):
            raise AssertionError("something was fitted")

    with pytest.raises(ValueError, match=message):
        run_offline(SingleConfig(**SMALL), penalty, record=Refuse())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SingleConfig(hidden=(4,)).build(SPEC), ValueError, "5 values, expected one a layer: 2"),
        (lambda: make().prepare(segment(4)._replace(dt=torch.rand(4, 1, 1))), ValueError, "several lengths"),
        (lambda: make().finish(torch.tensor([torch.inf])), RuntimeError, "diverged"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
