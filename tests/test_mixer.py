"""MixER: experts whose context is folded in, the gate, clusters and their experts, the fit, and adaptation."""

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mbrl import device as devices
from mbrl.core import Diverged, Spec, StepInput
from mbrl.data import Dataset, joined
from mbrl.dynamics import mixer
from mbrl.dynamics.mixer import (
    AdaBelief,
    Coda,
    Geps,
    Hierarchical,
    MixerConfig,
    MixerFit,
    Ncf,
    every_error,
    fit_mixer,
    greedy,
    hungarian,
    kmeans,
    purity,
    scattered,
    solved_gate,
)
from mbrl.fit import FitConfig, Rows, fit
from mbrl.solvers import RK4

gen = lambda seed=0: devices.generator(seed)
SMALL = {"ncf": Ncf((8,), (6, 6), (8,)), "coda": Coda((8, 8)), "geps": Geps((8, 8)), "hierarchical": Hierarchical(8)}
FIELDS = ["ncf", "coda", "geps"]


def turning(rate, damping, n=6, steps=20, seed=0, dt=0.2):
    """Exact orbits of x'' = -rate^2 x (damping 0), or of x' = -damping x, in two dimensions."""
    g, out = gen(seed), []
    t = dt * torch.arange(steps + 1)[:, None]
    for _ in range(n):
        a, b = torch.randn(2, 1, generator=g)
        if damping:
            x = torch.cat([a * torch.exp(-damping * t), b * torch.exp(-damping * t)], 1)
        else:
            x = torch.cat([a * torch.cos(rate * t + b), -a * rate * torch.sin(rate * t + b)], 1)
        out.append(x)
    x = torch.stack(out)
    rows, none = n * steps, torch.zeros(n * steps, 0)
    yes = torch.ones(rows, dtype=torch.bool)
    starts = torch.arange(0, rows + 1, steps)
    before, after = x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)
    return Dataset(before, none, none.sum(1), after, ~yes, yes, starts, none[0], none[0], dt)


def families(seed=0, n=6, rates=(0.9, 1.0, 1.1), dampings=(0.4, 0.5, 0.6)):
    """Three oscillators, then three that decay."""
    parts = [turning(r, 0, n, seed=seed + i) for i, r in enumerate(rates)]
    return joined(parts + [turning(0, d, n, seed=seed + 9 + i) for i, d in enumerate(dampings)], mixed=True)


CONFIG = MixerConfig(Coda((16,)), 2, 4)
FIT = MixerFit(60, batch=6, length=5, lr=1e-2, lr_context=1e-2, restarts=3, assign="hungarian")


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_folded_is_what_the_paper_has(name):
    """NCF reads [features, code]; CoDA has W + c H; GEPS W + A diag(c) B."""
    config = MixerConfig(SMALL[name], 3, 4, activation="tanh")
    model = config.build(Spec(obs=3, act=2, systems=5), gen()).requires_grad_(False)
    ctx, x = torch.randn(2, 4, generator=gen(1)), torch.randn(2, 7, 5, generator=gen(2))
    layers = model.served(ctx, torch.tensor([2, 0]))
    got = mixer.apply_layers(layers, x, "tanh")
    for g, expert in enumerate((2, 0)):
        p = {k: v[expert].double() for k, v in model.experts.items()}
        c, h = ctx[g].double(), x[g].double()
        if name == "ncf":
            h = torch.tanh(h @ p["features_w0"] + p["features_b0"])
            code = torch.tanh(c @ p["context_w0"] + p["context_b0"][0]) @ p["context_w1"] + p["context_b1"][0]
            both = torch.cat([p["join_w"], p["join_c"]])
            h = torch.tanh(torch.cat([h, code.expand(len(h), -1)], 1) @ both + p["join_b"])
            h = h @ p["main_w0"] + p["main_b0"]
        else:
            for n in range(3):
                if name == "coda":
                    w = p[f"root_w{n}"] + (c @ p[f"move_w{n}"]).reshape(p[f"root_w{n}"].shape)
                    b = p[f"root_b{n}"] + c @ p[f"move_b{n}"]
                else:
                    w = p[f"root_w{n}"] + p[f"left_{n}"] @ c.diag() @ p[f"right_{n}"]
                    b = p[f"root_b{n}"] + c @ p[f"shift_{n}"]
                h = h @ w + b
                h = torch.tanh(h) if n < 2 else h
        torch.testing.assert_close(got[g].double(), h, rtol=1e-4, atol=1e-5)


def test_a_shared_trunk_is_one_for_all_experts():
    spec = Spec(obs=3, act=2, systems=5)
    model = MixerConfig(replace(SMALL["ncf"], shared=True), 3, 4).build(spec, gen()).requires_grad_(False)
    apart = MixerConfig(SMALL["ncf"], 3, 4).build(spec, gen()).requires_grad_(False)
    ctx = torch.randn(2, 4, generator=gen(1))
    ours, theirs = (m.served(ctx, torch.tensor([2, 1])) for m in (model, apart))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if i < 2:  # the features' weight and bias
            assert torch.equal(a, apart.experts[f"features_{'wb'[i]}0"][[0, 0]])
        else:
            assert torch.equal(a, b)
    sizes = [sum(p.numel() for p in m.experts.values()) for m in (model, apart)]
    assert sizes[0] == sizes[1] - 2 * (5 * 8 + 8)


def test_the_hierarchical_map_is_a_clipped_shallow_plrnn_of_linear_parameters():
    model = MixerConfig(Hierarchical(8), 2, 4).build(Spec(obs=3, act=2, systems=5), gen()).requires_grad_(False)
    ctx, z, a = torch.randn(1, 4, generator=gen(1)), torch.randn(7, 3, generator=gen(2)), torch.randn(7, 2)
    p = {k: v[1] for k, v in model.experts.items()}
    A, W1, W2, h1, h2, C = (p[k] + (ctx @ p[f"by_{k}"]).reshape(p[k].shape) for k in ("A", "W1", "W2", "h1", "h2", "C"))
    want = A * z + (torch.relu(z @ W2 + h2) - torch.relu(z @ W2)) @ W1 + h1 + a @ C
    cond = model.served(ctx, torch.tensor([1]))
    got = model.step(z, StepInput(a, torch.zeros(7, 0), torch.full((7, 1), 0.3)), cond)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_fields_rate_is_in_units_of_the_datas_and_its_step_rk4():
    data = families()
    model = MixerConfig(Coda(()), 1, 4, solver=RK4(2)).build(data.spec, gen()).requires_grad_(False)
    rows = Rows(data, 1, data.obs)
    model.prepare(rows.segment(torch.arange(len(data))))
    z = (data.obs - model.observed.mean) / model.observed.std
    after = (data.next_obs - model.observed.mean) / model.observed.std
    torch.testing.assert_close(model.rate, ((after - z) / 0.2).square().mean(0).sqrt())
    cond = model.condition(model.contexts[:1])
    w, b = model.experts["root_w0"][0] * model.rate, model.experts["root_b0"][0] * model.rate
    x, h = z[:5], 0.1
    f = lambda y: y @ w + b
    for _ in range(2):
        k1 = f(x)
        k2 = f(x + h / 2 * k1)
        k3 = f(x + h / 2 * k2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(x + h * k3))
    got = model.step(data.obs[:5], StepInput(data.act[:5], data.act[:5], torch.full((5, 1), 0.2)), cond)[0]
    torch.testing.assert_close(got, x * model.observed.std + model.observed.mean)
    model.prepare(rows.segment(torch.arange(9)))  # set once
    torch.testing.assert_close(model.rate, ((after - z) / 0.2).square().mean(0).sqrt())


# ---------------------------------------------------------------- the gate


@pytest.mark.parametrize("name", SMALL)
def test_the_gate_chooses_one_expert_by_the_context_alone(name):
    model = MixerConfig(SMALL[name], 3, 2).build(Spec(obs=3, act=1, systems=4), gen()).requires_grad_(False)
    with torch.no_grad():
        model.gate.copy_(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.5]]))
    ctx = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.1, 3.0]])
    assert model.chosen(ctx).tolist() == [0, 1, 2]
    cond = model.condition(ctx)
    for g in range(3):
        one = model.served(ctx[g : g + 1], torch.tensor([g]))
        for a, b in zip(cond, one, strict=True):
            torch.testing.assert_close(a[g : g + 1], b, rtol=1e-5, atol=1e-6)
    x, inp = torch.randn(6, 3), StepInput(torch.randn(6, 1), torch.zeros(6, 0), torch.ones(6, 1))
    before = model.step(x, inp, cond)[0]
    for k, p in model.experts.items():  # what was not chosen is not read
        p[1] = torch.nan if k else p[1]
    after = model.step(x, inp, model.condition(ctx))[0]
    assert torch.equal(after[:2], before[:2])
    assert torch.equal(after[4:], before[4:])
    assert after[2:4].isnan().all()


def test_a_trained_gate_scales_the_step_by_its_softmax():
    spec = Spec(obs=2, systems=3)
    model = MixerConfig(Coda((8,)), 3, 2, gating="gradient").build(spec, gen())
    ctx = torch.randn(1, 2, generator=gen(1))
    share = model.logits(ctx).softmax(-1).max()
    plain = MixerConfig(Coda((8,)), 3, 2).build(spec, gen())
    plain.load_state_dict(model.state_dict())
    a, b = model.condition(ctx), plain.condition(ctx)
    torch.testing.assert_close(a[-2], b[-2] * share)
    torch.testing.assert_close(a[-1], b[-1] * share)
    for x, y in zip(a[:-2], b[:-2], strict=True):
        assert torch.equal(x, y)
    data = families()
    big = MixerConfig(Coda((8,)), 3, 2, gating="gradient").build(data.spec, gen())
    segment = Rows(data, 5, data.obs).segment(torch.arange(0, 720, 120))
    loss = big.loss(segment, torch.zeros(6, 5, 0))[0]
    loss.backward()
    assert big.gate.grad.abs().sum() > 0


def test_models_of_their_own_share_nothing():
    data = families()
    model = MixerConfig(Coda((8,)), 6, 6, gating="own").build(data.spec, gen())
    assert model.chosen(model.contexts).tolist() == list(range(6))
    before = {k: p.clone() for k, p in model.experts.items()}
    contexts = model.contexts.clone()
    report = fit_mixer(model, data, replace(FIT, outer=2), gen(1))
    assert torch.equal(model.contexts, contexts)
    assert report.solved == report.passed == 0
    assert all(not torch.equal(p, before[k]) for k, p in model.experts.items())


# ---------------------------------------------------------------- clusters


def test_kmeans_by_l1_from_warm_centres():
    contexts = torch.tensor([[0.0, 0.0], [0.2, 0.0], [5.0, 5.0], [5.0, 5.2], [9.0, 0.0]])
    found = kmeans(contexts, 3, torch.tensor([[8.0, 1.0], [0.1, 0.1], [4.0, 4.0]]), gen())
    assert found.label.tolist() == [1, 1, 2, 2, 0]
    torch.testing.assert_close(found.centre, torch.tensor([[9.0, 0.0], [0.1, 0.0], [5.0, 5.1]]))
    assert found.spread == pytest.approx(0.4)
    # (3, 3) is nearer to (0, 5) than to (5.5, 5.5) by L1, and farther by L2
    found = kmeans(torch.tensor([[3.0, 3.1], [0.0, 5.0], [5.4, 5.4]]), 2, torch.tensor([[0.0, 5.0], [5.4, 5.4]]), gen())
    assert found.label.tolist() == [1, 0, 1]


def test_an_empty_cluster_is_passed_over_or_begins_anew():
    contexts = torch.tensor([[0.0], [0.1], [0.3], [4.0]])
    start = torch.tensor([[0.0], [4.0], [99.0]])
    assert kmeans(contexts, 3, start, gen()) is None
    found = kmeans(contexts, 3, start, gen(), reseed=True)
    assert sorted(torch.bincount(found.label, minlength=3).tolist()) == [1, 1, 2]
    assert kmeans(torch.zeros(4, 2), 2, None, gen()) is None  # as at the beginning of a fit
    assert kmeans(torch.zeros(4, 2), 2, None, gen(), reseed=True) is not None


def test_scattered_starts_are_apart():
    contexts = torch.cat([torch.zeros(50, 1), torch.full((1, 1), 10.0)])
    for seed in range(5):
        assert sorted(scattered(contexts, 2, gen(seed))[:, 0].tolist()) == [0.0, 10.0]


def test_hungarian_is_scipys_and_greedy_takes_what_is_left():
    rng = np.random.default_rng(0)
    for k, m in ((1, 1), (3, 3), (4, 6), (7, 7)):
        for _ in range(20):
            cost = rng.standard_normal((k, m))
            got = hungarian(torch.tensor(cost))
            rows, columns = linear_sum_assignment(cost)
            assert len(set(got)) == k
            assert cost[np.arange(k), got].sum() == pytest.approx(cost[rows, columns].sum())
    assert greedy(torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, 9.0], [1.0, 1.0, 7.0]])) == [0, 1, 2]
    for bad in (torch.tensor([[1.0, torch.nan]]), torch.tensor([[torch.inf]]), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match=r"expected .* of finite numbers"):
            hungarian(bad)


def test_each_cluster_gets_the_median_of_its_systems():
    errors = torch.tensor([[1.0, 9.0], [2.0, 9.0], [9.0, 9.0], [4.0, 3.0]])
    assert mixer.costs(errors, torch.tensor([0, 0, 0, 1]), 2).tolist() == [[2.0, 9.0], [4.0, 3.0]]
    assert mixer.costs(errors, torch.tensor([0, 1, 1, 0]), 2).tolist() == [[2.5, 6.0], [5.5, 9.0]]


def test_an_expert_that_fails_on_a_cluster_is_given_to_it_only_where_it_must_be():
    """Of all assignments, one with the fewest failures, and of these the cheapest."""
    g, k = gen(), 4
    for scale in (1e-6, 1.0, 1e6) * 15:
        errors, fails = scale * torch.rand(k, k, generator=g), torch.rand(k, k, generator=g) < 0.4
        broken = torch.where(fails, torch.tensor([torch.inf, torch.nan, torch.inf, torch.nan]), errors)

        def worth(order, errors=errors, fails=fails):
            bad = fails[range(k), order]
            return int(bad.sum()), errors[range(k), order][~bad].double().sum().item()

        got = worth(hungarian(mixer.costs(broken, torch.arange(k), k)))
        assert got == pytest.approx(min(worth(list(x)) for x in permutations(range(k))), rel=1e-5)


def test_the_gate_is_least_squares_of_the_one_hot_experts():
    contexts, expert = torch.randn(9, 3, generator=gen()), torch.tensor([0, 1, 2] * 3)
    got = solved_gate(contexts, expert, 4, gen(1))
    x = np.concatenate([contexts.numpy(), np.ones((9, 1))], 1)
    want = np.linalg.lstsq(x, np.eye(4)[expert], rcond=None)[0]
    np.testing.assert_allclose(got.numpy(), want, atol=2e-3)  # the jitter
    apart = torch.eye(4)[:3, :3] * 5
    gate = solved_gate(apart.repeat(2, 1), torch.tensor([2, 0, 1] * 2), 3, gen())
    assert (torch.cat([apart, torch.ones(3, 1)], 1) @ gate).argmax(1).tolist() == [2, 0, 1]


def test_the_nearest_centres_expert_serves_and_none_is_masked():
    centre, order = torch.randn(5, 3, generator=gen()), [2, 0, 4, 1, 3]
    x = torch.cat([torch.randn(40, 3, generator=gen(1)), torch.ones(40, 1)], 1)
    got = (x @ mixer.nearest_gate(centre, order)).argmax(1)
    assert got.tolist() == [order[i] for i in torch.cdist(x[:, :3], centre).argmin(1).tolist()]
    line = torch.tensor([[-1.0], [0.0], [1.0]])  # three clusters in a row
    choose = lambda gate: (torch.cat([line, torch.ones(3, 1)], 1) @ gate).argmax(1).tolist()
    systems, label = line[[0] * 9 + [1] * 5 + [2] * 9], torch.tensor([0] * 9 + [1] * 5 + [2] * 9)
    assert 1 not in choose(solved_gate(systems, label, 3, gen()))  # the middle one is masked by least squares
    assert choose(mixer.nearest_gate(line, [0, 1, 2])) == [0, 1, 2]


@pytest.mark.parametrize("solve", ["least-squares", "nearest"])
def test_each_clusters_expert_serves_it(solve, monkeypatch):
    """Three clusters, whose best experts are 2, 0 and 1."""
    data, best = families(), [2, 2, 0, 0, 1, 1]
    model = replace(CONFIG, experts=3).build(data.spec, gen())
    job = mixer._Fit(model, data, replace(FIT, solve=solve), gen(2))
    corners = torch.eye(4)[[0, 0, 1, 1, 2, 2]] * 3
    with torch.no_grad():
        model.contexts.copy_(corners + 0.1 * torch.randn(6, 4, generator=gen(3)))
    errors = torch.ones(6, 3).scatter(1, torch.tensor(best)[:, None], 0.1)
    monkeypatch.setattr(mixer, "every_error", lambda *a: errors)
    job._solve(job._batch())
    assert model.chosen(model.contexts).tolist() == best
    x = torch.cat([model.contexts, torch.ones(6, 1)], 1).detach()
    scores = x @ model.gate
    if solve == "least-squares":
        assert scores.sum(1).tolist() == pytest.approx([1.0] * 6, abs=1e-2)  # as the one-hot experts do
    else:
        away = torch.cdist(model.contexts.detach(), job.centre) ** 2
        order = [best[away[:, k].argmin()] for k in range(3)]
        torch.testing.assert_close(scores[:, order].diff(), -away.diff(), atol=1e-4, rtol=1e-4)


def test_the_norm_decides_which_centre_is_near():
    contexts = torch.tensor([[3.0, 0.0], [2.0, 2.0], [0.0, 0.0]])  # of which the last is 3 and 4, or 3 and 2.8 away
    assert kmeans(contexts, 2, contexts[:2], gen()).label.tolist() == [0, 1, 0]
    assert kmeans(contexts, 2, contexts[:2], gen(), p=2.0).label.tolist() == [0, 1, 1]


@pytest.mark.parametrize(("until", "warm", "solved"), [(0.5, 0, [0, 1, 2]), (1.0, 0, [0, 1, 2, 3, 4]), (0.2, 3, [3])])
def test_the_gate_stays_after_its_share_of_the_steps(monkeypatch, until, warm, solved):
    """Of five outer steps; once in any case, else warm steps would never end."""
    _, job = prepared(outer=5, inner=1, until=until, warm=warm, gate_every=1)
    seen = []
    monkeypatch.setattr(job, "_solve", lambda segment: seen.append(job.outer))
    job.run(None, None, None)
    assert list(dict.fromkeys(seen)) == solved


def test_purity_counts_the_majority_of_each_expert():
    assert purity([0, 0, 1, 1], "aabb") == 1.0
    assert purity([0, 0, 0, 1], "aabb") == 0.75
    assert purity([0, 0, 0, 0], "aabc") == 0.5


def test_every_experts_error_is_that_of_the_model_if_it_were_chosen():
    data = families()
    model = MixerConfig(Coda((8,)), 3, 4).build(data.spec, gen())
    rows = Rows(data, 5, data.obs)
    model.prepare(rows.segment(torch.arange(0, 720, 120)))
    segment = rows.segment(torch.tensor([[120 * s, 120 * s + 20] for s in range(6)]).flatten())
    got = every_error(model, segment)
    assert got.shape == (6, 3)
    for e in range(3):
        model.chosen = lambda ctx, e=e: torch.full((len(ctx),), e)
        want = model.errors(segment, model.moves(segment.system))
        torch.testing.assert_close(got[:, e], want)
    assert got.mean(0)[2] == pytest.approx(model.loss(segment, torch.zeros(12, 5, 0))[0].item(), rel=1e-5)


# ---------------------------------------------------------------- self-modulation


@pytest.mark.parametrize("name", FIELDS)
def test_modulation_is_a_taylor_expansion_in_the_context(name):
    """About a system's own context it changes nothing; from a near one it errs by the next order."""
    data, gaps = families(), {}
    segment = Rows(data, 3, data.obs).segment(torch.arange(0, 720, 120))
    for order in (0, 1, 2):
        model = MixerConfig(SMALL[name], 1, 3, modulation=order).build(data.spec, gen())
        with torch.no_grad():
            model.contexts.copy_(torch.randn(6, 3, generator=gen(5)) * 0.1)
        exact = model.errors(segment, model.moves(segment.system))
        if order == 0:
            plain = exact
            continue
        torch.testing.assert_close(exact, plain)
        model.neighbour.copy_(torch.tensor([1, 2, 3, 4, 5, 0]))
        far = model.errors(segment, model.moves(segment.system))
        gaps[order] = (far - plain).abs().max().item()
        far.sum().backward()
        assert model.contexts.grad.abs().min() > 0
    assert 0 < gaps[2] < 0.5 * gaps[1]


def test_modulation_needs_a_field_and_no_scale():
    for bad in (MixerConfig(Hierarchical(), modulation=1), MixerConfig(gating="gradient", modulation=1)):
        with pytest.raises(ValueError, match="modulation"):
            bad.build(Spec(2, systems=3), gen())


def test_models_of_their_own_need_a_context_each():
    with pytest.raises(ValueError, match="pass width=12"):
        MixerConfig(gating="own", width=10).build(Spec(2, systems=12), gen())


# ---------------------------------------------------------------- the fit


def test_adabelief_is_the_papers():
    """Two numbers, three steps, by hand."""
    p = torch.tensor([1.0, -2.0], dtype=torch.float64)
    ours, x = AdaBelief({"p": p}, 0.1), np.array([1.0, -2.0])
    m, s = np.zeros(2), np.zeros(2)
    for t in range(1, 4):
        g = np.array([0.3 * t, -1.0 / t])
        ours.step([torch.tensor(g)])
        m = 0.9 * m + 0.1 * g
        s = 0.999 * s + 0.001 * (g - m) ** 2 + 1e-16
        x = x - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(s / (1 - 0.999**t)) + 1e-16)
        np.testing.assert_allclose(p.numpy(), x, rtol=1e-10)


@pytest.mark.parametrize("how", [{}, {"solve": "nearest", "until": 0.5}])
def test_systems_sort_themselves_by_family(how):
    data = families()
    model = CONFIG.build(data.spec, gen())
    report = fit_mixer(model, data, replace(FIT, **how), gen(1))
    assigned = report.assigned[-1][1]
    assert assigned == model.chosen(model.contexts).tolist()
    assert purity(assigned, "aaabbb") == 1.0
    assert len(set(assigned)) == 2
    assert report.updates == 60 * 24
    assert report.solved + report.passed == 60 * 24 // 5 * (0.5 if how else 1)
    assert report.skipped == 0
    assert report.loss[-1] < 0.02 * report.loss[0]
    fresh = families(seed=50)
    segment = Rows(fresh, 20, fresh.obs).segment(torch.arange(0, 720, 20))
    assert model.validate(segment, torch.zeros(36, 20, 0)).item() < 0.02


def test_the_first_solution_waits_for_the_warm_steps_and_copies_the_expert():
    data = families()
    model = CONFIG.build(data.spec, gen())
    seen = []

    def tell(outer, of, figures):
        same = all(torch.equal(p[0], p[1]) for p in model.experts.values())
        seen.append((outer, figures["experts"], same))

    report = fit_mixer(model, data, replace(FIT, outer=4, warm=3), gen(1), tell)
    assert [(n, same) for n, _, same in seen] == [(1, False), (2, False), (3, True), (4, False)]
    assert [e for _, e, _ in seen[:3]] == [1, 1, 1]
    assert report.solved + report.passed == 24 * 4 // 5 - 24 * 3 // 5


def test_warm_steps_copy_weights_and_moments_of_mixtures_alone():
    data = families()
    for gating, width in (("solved", 4), ("gradient", 1), ("own", 6)):  # a gate [2, 2] is no expert either
        model = replace(CONFIG, gating=gating, width=width).build(data.spec, gen())
        job = mixer._Fit(model, data, replace(FIT, outer=1, warm=1), gen(1))
        job.run(None, None, None)
        held = zip(job.slow.params.items(), job.slow.mean, job.slow.square, strict=True)
        for (name, p), *moments in held:
            same = [torch.equal(x[0], x[1]) for x in (p, *moments) if len(x) > 1]
            assert all(same) if gating == "solved" else not any(same), (gating, name)


def prepared(**settings):
    data = families()
    model = CONFIG.build(data.spec, gen())
    with torch.no_grad():
        model.contexts.copy_(torch.randn(6, 4, generator=gen(3)))
    return model, mixer._Fit(model, data, replace(FIT, **settings), gen(2))


def stepped(monkeypatch):
    """(rate, gradients) of every step of an optimiser, none of which is taken."""
    seen = []
    monkeypatch.setattr(AdaBelief, "step", lambda self, grads: seen.append((self.lr, [g.clone() for g in grads])))
    return seen


def test_rates_fall_after_each_third(monkeypatch):
    seen = stepped(monkeypatch)
    _, job = prepared(outer=6, inner=1, lr=0.1, lr_context=1.0, gate_every=99)
    job.run(None, None, None)
    assert [r for r, _ in seen[1::2]] == pytest.approx([0.1, 0.1, 0.04, 0.04, 0.016, 0.016])
    assert [r for r, _ in seen[::2]] == pytest.approx([1, 1, 0.4, 0.4, 0.16, 0.16])


def test_the_proximal_pull_is_the_gradient_of_its_mean_square(monkeypatch):
    seen = stepped(monkeypatch)
    model, job = prepared(proximal=10.0, batch=6, length=20, gate_every=99)  # whole episodes: always the same batch
    contexts = [model.contexts]
    for shift in (0.0, 0.5):
        job._update(contexts, [p.detach() - shift for p in contexts], job.fast, 1.0)
    (plain,), (pulled,) = seen[0][1], seen[1][1]
    torch.testing.assert_close(pulled - plain, torch.full_like(plain, 10.0 * 0.5 / plain.numel()), rtol=0.01, atol=0)


def test_gradients_are_clipped_to_a_norm(monkeypatch):
    seen = stepped(monkeypatch)
    for clip in (None, 1e-3):
        _, job = prepared(proximal=0.0, clip=clip, batch=6, length=20, gate_every=99)
        job._update(job.weights, [p.detach() for p in job.weights], job.slow, 1.0)
    plain, clipped = (torch.cat([g.flatten() for g in grads]) for _, grads in seen)
    assert plain.norm() > 2e-3
    torch.testing.assert_close(clipped.norm(), torch.tensor(1e-3), rtol=2e-3, atol=0)
    torch.testing.assert_close(clipped / clipped.norm(), plain / plain.norm())


def test_systems_are_modulated_from_others_of_their_expert():
    data = families()
    model = replace(CONFIG, modulation=1).build(data.spec, gen())
    with torch.no_grad():
        model.contexts.copy_(torch.randn(6, 4, generator=gen(3)))
    job, chosen = mixer._Fit(model, data, FIT, gen(2)), model.chosen(model.contexts)
    assert len(set(chosen.tolist())) == 2
    met = [(job._meet(), model.neighbour.clone())[1] for _ in range(40)]
    assert all(torch.equal(chosen[x], chosen) for x in met)
    pairs = {(i, int(j)) for x in met for i, j in enumerate(x)}
    assert pairs == {(i, j) for i in range(6) for j in range(6) if chosen[i] == chosen[j]}


def test_the_gate_is_solved_by_weighted_errors_and_the_tightest_clusters(monkeypatch):
    model, job = prepared(restarts=2, guard=None)
    label = torch.tensor([0, 0, 0, 1, 1, 1])
    loose = mixer.Clusters(1 - label, torch.zeros(2, 4), 2.0)
    tried = iter([None, loose, mixer.Clusters(label, torch.ones(2, 4), 1.0)])
    errors = torch.tensor([[1.02, 1.0]] * 3 + [[1e-2, 1e-4]] * 3)
    monkeypatch.setattr(mixer, "kmeans", lambda *a: next(tried))
    monkeypatch.setattr(mixer, "every_error", lambda *a: errors)
    job.weight = torch.tensor([1.0] * 3 + [1e3] * 3)  # the second cluster's loss is the greater for the wrong expert
    job._solve(job._batch())
    assert torch.equal(job.centre, torch.ones(2, 4))
    want = solved_gate(model.contexts.detach(), label, 2, gen(0))
    torch.testing.assert_close(model.gate, want, atol=1e-2, rtol=0)


def test_errors_under_full_forcing_are_those_of_one_interval():
    data = families()
    model = replace(CONFIG, alpha=1.0).build(data.spec, gen())
    model.prepare(Rows(data, 1, data.obs).segment(torch.arange(720)))
    windows, each = (Rows(data, n, data.obs).segment(torch.arange(0, 720, n)) for n in (20, 1))
    forced = model.errors(windows, model.moves(windows.system))
    torch.testing.assert_close(forced, model.errors(each, model.moves(each.system)))
    assert (model.errors(windows, model.moves(windows.system), 0.0) - forced).abs().min() > 1e-3


def test_a_gate_that_would_cost_more_is_passed_over():
    data = families()
    model = CONFIG.build(data.spec, gen())
    fit_mixer(model, data, FIT, gen(1))
    assert purity(model.chosen(model.contexts).tolist(), "aaabbb") == 1.0
    job = mixer._Fit(model, data, replace(FIT, restarts=0, guard=1.1), gen(2))
    before = model.gate.clone()
    job.centre = model.contexts.detach()[[0, 1]] + torch.tensor([[0.0], [1e-3]])  # parts what belongs together
    wrong = mixer.Clusters(torch.tensor([0, 1, 0, 1, 0, 1]), job.centre, 0.0)
    mixer.kmeans, old = (lambda *a: wrong), mixer.kmeans
    try:
        job._solve(job._batch())
        assert (job.solved, job.passed, job.centre) == (0, 1, None)
        assert torch.equal(model.gate, before)
        job.config = replace(job.config, guard=None)
        job._solve(job._batch())
        assert (job.solved, job.passed) == (1, 1)
        assert not torch.equal(model.gate, before)
    finally:
        mixer.kmeans = old


def test_the_proximal_term_holds_a_block_of_updates_back():
    data, moved = families(), {}
    for weight in (0.0, 1e6):
        model = CONFIG.build(data.spec, gen())
        before = model.experts["root_w0"].detach().clone()
        fit_mixer(model, data, replace(FIT, outer=1, proximal=weight, lr=1e-3, gate_every=99), gen(1))
        moved[weight] = (model.experts["root_w0"] - before).abs().mean().item()
    assert moved[1e6] < 0.5 * moved[0.0]


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, modulation=1), replace(CONFIG, gating="gradient")])
def test_a_resumed_fit_gives_the_same_numbers(config):
    data, kept = families(), {}
    fit_of = replace(FIT, outer=4, warm=1)
    whole = config.build(data.spec, gen())
    want = fit_mixer(whole, data, fit_of, gen(1))
    short = config.build(data.spec, gen())

    def keep(state):
        if int(state["counts"][0]) == 2:
            kept.update({k: v.clone() for k, v in state.items()})

    fit_mixer(short, data, fit_of, gen(1), checkpoint=keep)
    again = config.build(data.spec, gen(7))
    kept["seconds"] += 1e6
    got = fit_mixer(again, data, fit_of, gen(8), resume=kept)
    assert got.seconds > 1e6  # with those of before
    assert (got.loss, got.assigned, got.solved, got.updates) == (want.loss, want.assigned, want.solved, want.updates)
    for k, v in whole.state_dict().items():
        assert torch.equal(v, again.state_dict()[k]), k


def test_a_small_family_counts_as_much_where_errors_are_relative():
    parts = [turning(1.0, 0, seed=1), turning(0, 0.5, seed=2)]
    parts[1] = replace(parts[1], obs=0.01 * parts[1].obs, next_obs=0.01 * parts[1].next_obs)
    data = joined(parts, mixed=True)
    job = mixer._Fit(MixerConfig(Coda((8,)), 2, 2).build(data.spec, gen()), data, FIT, gen())
    assert job.weight[1] / job.weight[0] > 1e3
    flat = mixer._Fit(MixerConfig(Coda((8,)), 2, 2).build(data.spec, gen()), data, replace(FIT, relative=False), gen())
    assert flat.weight.tolist() == [1.0, 1.0]


def test_the_generic_fit_trains_contexts_and_weights_at_once():
    data = families(n=20)
    model = MixerConfig(Coda((16,)), 1, 4).build(data.spec, gen())
    report = fit(model, data, FitConfig(60, 1e-2, 5, max_epochs=15, patience=20), gen(1))
    assert report.holdout[-1][0] < 0.05 * report.holdout[0][0]
    assert model.contexts.std(0).min() > 0.01


BAD = [
    (lambda d: turning(1.0, 0), {}, r"the data have .* 1 systems, the model"),
    (lambda d: d, {"experts": 7}, "hold 6 systems, expected two and as many as the 7 experts"),
    (lambda d: replace(d, obs=d.obs.clone().fill_(math.nan)), {}, "the data's obs is not finite"),
    (
        lambda d: joined([turning(1.0, 0, steps=20), turning(1.0, 0, steps=30)] * 3, mixed=True),
        {"length": None},
        "20 to 30 steps",
    ),
    (lambda d: d, {"length": 21}, "no window of 21 steps"),
]


@pytest.mark.parametrize(("change", "settings", "says"), BAD)
def test_bad_data_are_one_clear_error(change, settings, says):
    data = families()
    model = replace(CONFIG, experts=settings.get("experts", 2)).build(data.spec, gen())
    config = replace(FIT, length=settings.get("length", 5))
    with pytest.raises(ValueError, match=says):
        fit_mixer(model, change(data), config, gen())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"outer": -1}, "outer is -1, expected at least 0"),
        ({"inner": 0, "batch": 0}, "inner is 0, expected at least 1; batch is 0"),
        ({"lr_context": 0.0}, "lr_context is 0.0, expected a rate above 0"),
        ({"proximal": -1.0}, "proximal is -1.0, expected 0 or more"),
        ({"assign": "foo"}, "assign is foo, expected greedy or hungarian"),
    ],
)
def test_a_fits_settings_that_cannot_be(settings, says):
    data = families()
    with pytest.raises(ValueError, match=says):
        fit_mixer(CONFIG.build(data.spec, gen()), data, replace(FIT, **settings), gen())


def test_settings_that_cannot_be_built():
    spec = families().spec
    for change, says in (
        ({"gating": "foo"}, "gating is foo, expected one of solved, gradient, own"),
        ({"expert": Ncf(main=())}, r"main of Ncf is \(\), expected"),
        ({"experts": 0, "alpha": 2.0}, "experts is 0, expected at least 1; alpha is 2.0"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(CONFIG, **change).build(spec)


def test_a_fit_of_which_nothing_is_finite_ends():
    data = families()
    with pytest.raises(Diverged, match=r"no update of outer step \d+ was finite.*lr 1e\+30"):
        fit_mixer(CONFIG.build(data.spec, gen()), data, replace(FIT, lr=1e30), gen())
    with pytest.raises(Diverged, match="after 1 outer steps no system is predicted finitely"):
        fit_mixer(CONFIG.build(data.spec, gen()), data, replace(FIT, lr=1e30, outer=1, inner=1), gen())


def test_whole_episodes_of_a_series_end_where_it_does():
    """Nothing is known to follow their last step."""
    data = families()
    last = data.starts[1:] - 1
    data = replace(data, paired=data.paired.index_fill(0, last, False))
    job = mixer._Fit(CONFIG.build(data.spec, gen()), data, replace(FIT, outer=1, length=None), gen())
    assert job.rows.length == 19
    assert job.run(None, None, None).updates == 24


def test_a_single_system_is_none_for_a_mixture():
    data = turning(1.0, 0)
    model = CONFIG.build(data.spec, gen())
    with pytest.raises(ValueError, match="hold 1 systems, expected two"):
        fit_mixer(model, data, FIT, gen())


def test_another_models_state_is_refused():
    data, kept = families(), {}
    fit_mixer(CONFIG.build(data.spec, gen()), data, replace(FIT, outer=1), gen(), checkpoint=kept.update)
    other = replace(CONFIG, expert=Coda((9,))).build(data.spec, gen())
    with pytest.raises(ValueError, match="another model's"):
        fit_mixer(other, data, FIT, gen(), resume=kept)
