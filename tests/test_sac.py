import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mbrl.core import Markov, Prediction, Spec
from mbrl.data import Transitions
from mbrl.nets import power_iteration
from mbrl.sac import Adam, FlatMLP, SacConfig, local_lipschitz, log_density, value_aware_error

DOUBLE = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def random_batch(spec, seeds, n, g, dtype=DOUBLE):
    randn = lambda *shape: torch.randn(seeds, n, *shape, generator=g, dtype=dtype)
    act = torch.rand(seeds, n, spec.act, generator=g, dtype=dtype) * 2 - 1
    terminal = (torch.rand(seeds, n, generator=g) < 0.3).to(dtype)
    return Transitions(randn(spec.obs), act, randn(), randn(spec.obs), terminal)


def random_noise(spec, seeds, n, g, dtype=DOUBLE):
    return torch.randn(2, seeds, n, spec.act, generator=g, dtype=dtype)


# ---------------------------------------------------------------- probing environments: the answer is known


FAST = {"hidden": (32, 32), "actor_lr": 1e-2, "critic_lr": 1e-2, "tau": 0.1}


def learn(config, batch_of, updates=300, n=32, seeds=1, spec=Spec(1, 1)):  # noqa: B008
    """batch_of(g) -> Transitions [seeds, n, ...] in float32."""
    g = gen(1)
    agent = config.build(spec, g, seeds)
    for _ in range(updates):
        log = agent.update(batch_of(g, n), random_noise(spec, seeds, n, g, torch.float32))
    return agent, log


def column(x):
    return x[None, :, None]


def uniform(g, n):
    return torch.rand(1, n, 1, generator=g) * 2 - 1


def test_value_of_one_step_is_its_reward():
    def batch(g, n):
        zero = torch.zeros(1, n, 1)
        return Transitions(zero, uniform(g, n), torch.ones(1, n), zero, torch.ones(1, n))

    agent, _ = learn(SacConfig(**FAST), batch, 150)
    torch.testing.assert_close(
        agent.q(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)), torch.ones(1, 2, 1), atol=0.02, rtol=0
    )


def test_value_reads_the_observation():
    def batch(g, n):
        obs = column(torch.randint(0, 2, (n,), generator=g) * 2.0 - 1)
        return Transitions(obs, uniform(g, n), obs[..., 0], obs, torch.ones(1, n))

    agent, _ = learn(SacConfig(**FAST), batch, 200)
    obs = column(torch.tensor([-1.0, 1.0]))
    want = torch.tensor([-1.0, 1.0]).expand(1, 2, 2)
    torch.testing.assert_close(agent.q(obs, torch.zeros(1, 2, 1)), want, atol=0.03, rtol=0)


def two_steps(reward_at_end):
    """obs 0 leads to obs 1 without reward; from obs 1 the episode ends with a reward."""

    def batch(g, n):
        obs = column(torch.randint(0, 2, (n,), generator=g).float())
        return Transitions(obs, uniform(g, n), reward_at_end * obs[..., 0], torch.ones_like(obs), obs[..., 0])

    return batch


def test_value_two_steps_before_the_reward_is_discounted_once():
    agent, _ = learn(SacConfig(**FAST, gamma=0.5, deterministic_backup=True), two_steps(1.0))
    q = agent.q(column(torch.tensor([0.0, 1.0])), torch.zeros(1, 2, 1))
    torch.testing.assert_close(q, torch.tensor([0.5, 1.0]).expand(1, 2, 2), atol=0.03, rtol=0)


def test_backup_holds_the_entropy_times_the_temperature():
    config = SacConfig(**FAST, gamma=0.9, init_alpha=0.5, alpha_lr=0.0)
    agent, log = learn(config, two_steps(0.0))
    assert log["alpha"].item() == 0.5
    obs = torch.ones(1, 4000, 1)
    _, log_prob = agent.sample(agent.actor, obs, torch.randn(1, 4000, 1, generator=gen(5)))
    entropy = -log_prob.mean()
    assert 0.65 < entropy < math.log(2) + 0.01  # nothing but entropy is paid for: nearly uniform on [-1, 1]
    q = agent.q(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    torch.testing.assert_close(q, (0.9 * 0.5 * entropy).expand(1, 2, 1), atol=0.03, rtol=0)


def peak(width):
    """One step; the reward is largest at action 0.5."""

    def batch(g, n):
        zero, act = torch.zeros(1, n, 1), uniform(g, n)
        return Transitions(zero, act, -width * (act[..., 0] - 0.5) ** 2, zero, torch.ones(1, n))

    return batch


def test_policy_finds_the_best_action():
    agent, log = learn(SacConfig(**FAST, init_alpha=1e-3, alpha_lr=0.0), peak(1.0), 600)
    assert agent.act(torch.zeros(1, 1, 1)).item() == pytest.approx(0.5, abs=0.07)
    assert log["entropy"].item() < -1.0


def test_temperature_brings_the_entropy_to_its_target():
    agent, log = learn(SacConfig(**FAST, alpha_lr=1e-2, target_entropy=-0.5), peak(10.0), 700)
    assert log["entropy"].item() == pytest.approx(-0.5, abs=0.2)
    assert agent.act(torch.zeros(1, 1, 1)).item() == pytest.approx(0.5, abs=0.1)
    assert 0.0 < log["alpha"].item() < 1.0


@pytest.mark.parametrize(("terminal", "value"), [(0.0, 2.0), (1.0, 1.0)])
def test_only_a_terminal_step_ends_the_value(terminal, value):
    def batch(g, n):
        zero = torch.zeros(1, n, 1)
        return Transitions(zero, uniform(g, n), torch.ones(1, n), zero, torch.full((1, n), terminal))

    agent, _ = learn(SacConfig(**FAST, gamma=0.5, deterministic_backup=True), batch, 200)
    q = agent.q(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    torch.testing.assert_close(q, torch.full((1, 2, 1), value), atol=0.05, rtol=0)


# ---------------------------------------------------------------- against plain implementations


def test_log_density_is_that_of_the_squashed_normal():
    g = gen(2)
    mean, log_std, noise = torch.randn(3, 50, 4, generator=g, dtype=DOUBLE)
    normal = torch.distributions.Normal(mean, log_std.exp())
    squash = torch.distributions.TransformedDistribution(normal, torch.distributions.transforms.TanhTransform(1))
    u = mean + log_std.exp() * noise
    want = squash.log_prob(u.tanh()).sum(-1)
    torch.testing.assert_close(log_density(u, log_std, noise), want, atol=1e-6, rtol=1e-6)


def test_log_density_is_finite_and_right_where_tanh_rounds_to_one():
    u, zero = torch.tensor([[30.0], [-30.0]]), torch.zeros(2, 1)
    want = -0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 30.0)
    torch.testing.assert_close(log_density(u, zero, zero), torch.full((2,), want))


class Plain:
    """One seed of SAC as a textbook writes it: nn.Linear, torch.optim, two losses and two backward passes."""

    def __init__(self, agent, seed):
        self.config, self.spec = agent.config, agent.spec
        self.mean, self.std = agent.obs_mean, agent.obs_std
        self.actor = self.net(agent.actor_net, agent.actor[seed])
        self.critics = nn.ModuleList(self.net(agent.critic_net, row) for row in agent.critics[seed])
        self.target = copy.deepcopy(self.critics)
        self.log_alpha = agent.log_alpha[seed].clone().requires_grad_()
        self.actor_optimiser = torch.optim.Adam(self.actor.parameters(), self.config.actor_lr)
        self.critic_optimiser = torch.optim.Adam(self.critics.parameters(), self.config.critic_lr)
        self.alpha_optimiser = torch.optim.Adam([self.log_alpha], self.config.alpha_lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.actor_optimiser, self.rate)

    def rate(self, step):
        total = self.config.total
        return 0.5 * (1 + math.cos(math.pi * min(step / total, 1))) if total else 1.0

    @staticmethod
    def net(shape, row):
        layers = []
        for i, (w, b) in enumerate(layer[:2] for layer in shape.views(row[None])):
            linear = nn.Linear(w.shape[1], w.shape[2], dtype=row.dtype)
            linear.weight.data.copy_(w[0].T)
            linear.bias.data.copy_(b[0, 0])
            layers.append(linear)
            if i + 2 < len(shape.sizes):
                layers += [nn.LayerNorm(w.shape[2], dtype=row.dtype)] * shape.layer_norm + [nn.ReLU()]
        return nn.Sequential(*layers)

    def sample(self, obs, noise):
        mean, log_std = self.actor(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        u = mean + log_std.clamp(-20, 2).exp() * noise
        log_prob = normal.log_prob(u) - 2 * (math.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), log_prob.sum(-1)

    def q(self, critics, obs, act):
        return torch.stack([critic(torch.cat([obs, act], -1))[:, 0] for critic in critics])

    def update(self, batch, noise):
        config = self.config
        obs, after = ((x - self.mean) / self.std for x in (batch.obs, batch.next_obs))
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            act, log_prob = self.sample(after, noise[1])
            value = self.q(self.target, after, act).min(0).values
            if not config.deterministic_backup:
                value = value - alpha * log_prob
            target = batch.reward + config.gamma * (1 - batch.terminal) * value
            if config.target_min is not None:
                target = target.clamp(min=config.target_min)
        critic_loss = sum(F.mse_loss(q, target) for q in self.q(self.critics, obs, batch.act))
        self.critic_optimiser.zero_grad()
        critic_loss.backward()
        self.critic_optimiser.step()
        act, log_prob = self.sample(obs, noise[0])
        actor_loss = (alpha * log_prob - self.q(self.critics, obs, act).min(0).values).mean()
        self.actor_optimiser.zero_grad()
        actor_loss.backward()
        self.actor_optimiser.step()
        self.schedule.step()
        target_entropy = -self.spec.act if config.target_entropy is None else config.target_entropy
        self.alpha_optimiser.zero_grad()
        (-self.log_alpha * (log_prob.detach() + target_entropy).mean()).backward()
        self.alpha_optimiser.step()
        with torch.no_grad():
            for new, old in zip(self.critics.parameters(), self.target.parameters(), strict=True):
                old.lerp_(new, config.tau)
        return critic_loss.item(), actor_loss.item(), alpha.item(), -log_prob.mean().item()


def rows(plain):
    """A plain agent's networks in the order of linears()."""
    layers = lambda net: [(m.weight, m.bias) for m in net if isinstance(m, nn.Linear)]
    nets = [plain.actor, *plain.critics, *plain.target]
    return [x for net in nets for layer in layers(net) for x in layer]


def flat_rows(agent, seed):
    nets = [(agent.actor_net, agent.actor[seed])]
    nets += [(agent.critic_net, row) for flat in (agent.critics, agent.target) for row in flat[seed]]
    return [x for net, row in nets for layer in net.linears(row) for x in layer]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"total": 4},
        {"deterministic_backup": True, "target_min": 0.0},
        {"layer_norm": True},
        {"normalize": True, "hidden": (16, 8, 12)},
        {"critics": 3, "target_entropy": 0.5, "init_alpha": 0.2, "hidden": (9,)},
    ],
)
def test_updates_are_those_of_a_plain_implementation(settings):
    spec, seeds, g = Spec(5, 2), 2, gen(3)
    config = SacConfig(**{"hidden": (16, 16), "tau": 0.1, "actor_lr": 1e-2, "alpha_lr": 1e-2, **settings})
    agent = config.build(spec, g, seeds, DOUBLE)
    agent.actor_net.views(agent.actor)[-1][1][:, :, 3] = 2.0  # some log standard deviations are clamped, some not
    if config.normalize:
        agent.set_normalizer(torch.randn(5, generator=g, dtype=DOUBLE), torch.rand(5, generator=g, dtype=DOUBLE) + 0.5)
    plain = [Plain(agent, s) for s in range(seeds)]
    for _ in range(6):
        batch, noise = random_batch(spec, seeds, 32, g), random_noise(spec, seeds, 32, g)
        log = agent.update(batch, noise)
        for s in range(seeds):
            want = plain[s].update(Transitions(*(x[s] for x in batch)), noise[:, s])
            got = [log[k][s].item() for k in ("critic_loss", "actor_loss", "alpha", "entropy")]
            assert got == pytest.approx(want, abs=1e-7)
    for s in range(seeds):
        torch.testing.assert_close(flat_rows(agent, s), [x.detach() for x in rows(plain[s])], atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(agent.log_alpha[s], plain[s].log_alpha.detach())
    assert log["skipped"].tolist() == [0.0, 0.0]


def test_gradients_by_hand_are_those_of_the_losses():
    spec, seeds, g = Spec(4, 3), 2, gen(4)
    agent = SacConfig(hidden=(12, 10), critics=3).build(spec, g, seeds, DOUBLE)
    batch = random_batch(spec, seeds, 20, g)
    target = torch.randn(seeds, 20, generator=g, dtype=DOUBLE)
    critics = agent.critics.detach().clone().requires_grad_()
    loss = agent.critic_loss(critics, batch, target)
    got, _ = agent.critic_grad(batch, batch.obs, target)
    torch.testing.assert_close(got, loss.detach())
    (want,) = torch.autograd.grad(loss.sum(), critics)
    torch.testing.assert_close(agent.critic_adam.grad, want.flatten(1))

    act = batch.act.clone().requires_grad_()
    best = agent.q(batch.obs, act).amin(1)
    (want,) = torch.autograd.grad(best.sum(), act)
    got, dact = agent.act_grad(agent.critics, batch.obs, batch.act)
    torch.testing.assert_close((got, dact), (best.detach(), want))


@pytest.mark.parametrize("settings", [{}, {"robust": 0.5}, {"cloning": 0.7, "narrow": 0.6}])
@pytest.mark.parametrize("real", [0, 5])
def test_first_actor_step_goes_down_the_actor_loss(settings, real):
    """Adam's first moment shows the gradient of `actor_loss`."""
    spec, g = Spec(4, 2), gen(6)
    agent = SacConfig(hidden=(8,), critic_lr=0.0, **settings).build(spec, g, 2, DOUBLE)
    batch, noise = random_batch(spec, 2, 16, g), random_noise(spec, 2, 16, g)
    actor = agent.actor.detach().clone().requires_grad_()
    cloned = bool(real and settings.get("cloning"))
    if cloned:
        agent.behaviour += torch.randn(agent.behaviour.shape, generator=g, dtype=DOUBLE) / 3
        behaviour = agent.behaviour.detach().clone().requires_grad_()
        want = agent.behaviour_loss(behaviour, batch.obs[:, :real], batch.act[:, :real])
        (dwant,) = torch.autograd.grad(want.sum(), behaviour)
    loss, log_prob = agent.actor_loss(actor, batch.obs, noise[0], real)
    (grad,) = torch.autograd.grad(loss.sum(), actor)
    log = agent.update(batch, noise, real)
    if cloned:
        torch.testing.assert_close(log["behaviour_loss"], want.detach())
        torch.testing.assert_close(agent.behaviour_adam.m, 0.1 * dwant)
        assert (log["cloning"] > 0).all()
    assert ("cloning" in log) == cloned
    torch.testing.assert_close(log["actor_loss"], loss.detach())
    torch.testing.assert_close(log["entropy"], -log_prob.detach())
    torch.testing.assert_close(agent.actor_adam.m, 0.1 * grad)


@pytest.mark.parametrize("spread", [0.2, 0.6])
def test_cloning_pulls_to_data_that_show_one_way_to_act_and_leaves_free_where_they_show_many(spread):
    """The data act with 0.5 on the average, the value is 1 - a^2: the best action minimises pull (a - 0.5)^2 + a^2 at
    pull = cloning |Q| / (1 + (spread / narrow)^4), whatever was done in the rows that are not the data's."""

    def batch(g, n):
        zero, act = torch.zeros(1, n, 1), uniform(g, n)
        act[:, : n // 2] = 0.5 + spread * torch.tensor([-1.0, 1.0]).repeat(n // 4)[None, :, None]
        return Transitions(zero, act, 1 - act[..., 0] ** 2, zero, torch.ones(1, n))

    g, spec = gen(1), Spec(1, 1)
    agent = SacConfig(**FAST, cloning=2.0, narrow=0.2, init_alpha=1e-4, alpha_lr=0.0).build(spec, g)
    for _ in range(600):
        agent.update(batch(g, 64), random_noise(spec, 1, 64, g, torch.float32), 32)
    net = agent.actor_net
    mean, std = agent.behaviour_of(net.forward(agent.layers(net, agent.behaviour), torch.zeros(1, 1, 1))[-1])
    torch.testing.assert_close((mean.item(), std.item()), (0.5, spread), atol=0.03, rtol=0)
    a = agent.act(torch.zeros(1, 1, 1)).item()
    pull = 2.0 * (1 - a**2) / (1 + (spread / 0.2) ** 4)
    assert a == pytest.approx(0.5 * pull / (1 + pull), abs=0.05)
    assert (a > 0.15) == (spread < 0.3)


def test_cloning_is_held_and_then_let_go():
    """Before and after it is the agent that knows only the one value, on its own part of the updates."""
    spec, g = Spec(4, 2), gen(6)
    batch, noise = random_batch(spec, 2, 16, g), random_noise(spec, 2, 16, g)
    build = lambda **kw: SacConfig(hidden=(8,), **kw).build(spec, gen(1), 2, DOUBLE)
    for done, want, total, at in (
        *((0, 0.8, 8, 0), (4, 0.8, 8, 4), (7, 0.8, 8, 7)),
        *((8, 0.2, 4, 0), (10, 0.2, 4, 2), (12, 0.2, 4, 4), (20, 0.2, 4, 4)),
    ):
        falls = build(cloning=0.8, cloning_end=0.2, cloning_hold=2 / 3, total=12)
        stays = build(cloning=want, total=total)
        falls.updates.fill_(done)
        stays.updates.fill_(at)
        torch.testing.assert_close(falls.actor_loss(falls.actor, batch.obs, noise[0], 16), stays.actor_loss(
            stays.actor, batch.obs, noise[0], 16))  # fmt: skip
        found, expected = falls.update(batch, noise, 16), stays.update(batch, noise, 16)
        torch.testing.assert_close(found["cloning"], expected["cloning"])
        torch.testing.assert_close(falls.actor_adam.m, stays.actor_adam.m)
        torch.testing.assert_close(falls.actor, stays.actor)


def test_without_cloning_there_is_nothing_to_let_go():
    """The setting that an agent would end with is left standing where a preset's cloning is turned off."""
    build = lambda **kw: SacConfig(hidden=(8,), total=100, **kw).build(Spec(1, 1), gen(), 1, DOUBLE)
    without, off = build(), build(cloning_end=0.3)
    for done in (0, 50, 90, 100):
        without.updates.fill_(done)
        off.updates.fill_(done)
        torch.testing.assert_close(without.actor_lr(), off.actor_lr(), atol=0, rtol=0)
    assert build(cloning=1.5, cloning_end=0.3).held == 80


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_the_last_update_is_one_without_cloning_held(total):
    agent = SacConfig(hidden=(8,), cloning=0.8, cloning_end=0.2, total=total).build(Spec(1, 1), gen(), 1, DOUBLE)
    rates = []
    for done in range(total + 1):
        agent.updates.fill_(done)
        rates.append((float(agent.cloning()), float(agent.actor_lr())))
    assert rates[total - 1][0] == rates[total][0] == pytest.approx(0.2)
    assert rates[total][1] == 0
    assert min(lr for _, lr in rates[:total]) > 0


def test_a_policy_cannot_be_pushed_away_from_the_data():
    for bad in (
        {"cloning": -1.0},
        {"narrow": -1.0},
        {"cloning_end": -0.1, "cloning": 1.0},
        {"cloning_end": 1.5, "cloning": 1.0},
        {"cloning_hold": 1.0, "cloning_end": 0.1, "cloning": 1.0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
            SacConfig(**bad).build(Spec(1, 1), gen())


# ---------------------------------------------------------------- regularisers of the critics


def built(spec, seeds, g, **settings):
    """In float64, with a normaliser of its own where it has one."""
    agent = SacConfig(**{"hidden": (12, 10), **settings}).build(spec, g, seeds, DOUBLE)
    if agent.normalize:
        agent.set_normalizer(*(torch.rand(2, spec.obs, generator=g, dtype=DOUBLE) + 0.5))
    return agent


def steepest(agent, s, n, obs, act, eps):
    """The definition for one critic of one seed, by torch.nn modules and autograd: s' [B, O] and pi(s') [B, A]."""
    plain = Plain(agent, s)
    policy = lambda x: plain.actor(x).chunk(2, -1)[0].tanh()
    q = lambda x, a: plain.critics[n](torch.cat([x, a], -1))[:, 0]
    x = obs.clone().requires_grad_()
    (slope,) = torch.autograd.grad((q(x, policy(x)) - q(obs, act)).square().sum(), x)
    after = (obs + eps * slope.sign()).detach()
    return after, policy(after).detach(), (q(after, policy(after)) - q(obs, act)).square().mean()


@pytest.mark.parametrize(
    "settings",
    [{}, {"normalize": True}, {"layer_norm": True}, {"critics": 3, "hidden": (9,)}, {"layer_norm": True, "critics": 3}],
)
def test_the_robust_gradient_is_autograds_of_the_published_loss(settings):
    spec, seeds, g = Spec(4, 3), 2, gen(31)
    agent = built(spec, seeds, g, robust=0.7, robust_eps=0.05, **settings)
    if not settings.get("layer_norm"):  # which begins as 1 and 0: steepest knows no other
        agent.critics.data += 0.1 * torch.randn(agent.critics.shape, generator=g, dtype=DOUBLE)
    batch, noise = random_batch(spec, seeds, 20, g), random_noise(spec, seeds, 20, g)
    obs, target = agent.scale(batch.obs), torch.randn(seeds, 20, generator=g, dtype=DOUBLE)
    tape = agent.actor_net.forward(agent.layers(agent.actor_net, agent.actor), torch.cat([obs, obs + 1], 1))
    before = [x.clone() for x in tape]
    after, pi = agent.perturbed(obs, batch.act, tape[-1][:, :20, :3].tanh(), tape)
    torch.testing.assert_close(tape, before)
    torch.testing.assert_close((after, pi), agent.perturbed_plainly(agent.critics, obs, batch.act))
    assert ((after - obs[:, None]).abs() - 0.05).abs().max() < 1e-12
    total = 0.0
    for s in range(seeds):
        for n in range(agent.critics.shape[1]):
            want, action, loss = steepest(agent, s, n, obs[s], batch.act[s], 0.05)
            torch.testing.assert_close((after[s, n], pi[s, n]), (want, action))
            total = total + loss
    critics = agent.critics.detach().clone().requires_grad_()
    loss, extra = agent.critic_loss(critics, batch, target), agent.robust_loss(critics, batch, after, pi)
    torch.testing.assert_close(extra.sum(), total)
    (grad,) = torch.autograd.grad((loss + 0.7 * extra).sum(), critics)
    got, _, penalty = agent.robust_grad(batch, obs, target, after, pi)
    torch.testing.assert_close((got, penalty), (loss.detach(), extra.detach()))
    torch.testing.assert_close(agent.critic_adam.grad, grad.flatten(1))
    agent.critic_adam.grad.zero_()
    log = agent.update(batch, noise)  # the same in an update: Adam's first moment shows the gradient
    torch.testing.assert_close(log["robust"], extra.detach())


def test_an_update_takes_the_robust_gradient_where_the_policy_is_perturbed_with_the_state():
    spec, g = Spec(4, 2), gen(32)
    settings = {"robust": 0.7, "gamma": 0.0}  # the target is the reward
    agent = built(spec, 2, g, **settings)
    batch, noise = random_batch(spec, 2, 16, g), random_noise(spec, 2, 16, g)
    critics = agent.critics.detach().clone().requires_grad_()
    moved = agent.perturbed_plainly(agent.critics, batch.obs, batch.act)
    loss = agent.critic_loss(critics, batch, batch.reward) + 0.7 * agent.robust_loss(critics, batch, *moved)
    (grad,) = torch.autograd.grad(loss.sum(), critics)
    agent.update(batch, noise)
    torch.testing.assert_close(agent.critic_adam.m, 0.1 * grad.flatten(1))


def test_a_robust_coefficient_of_zero_is_no_regulariser_bit_for_bit():
    spec, g = Spec(3, 2), gen(33)
    agents = [SacConfig(hidden=(8, 8), robust=r, robust_eps=e).build(spec, gen(1)) for r, e in ((0.0, 0.1), (0.0, 9.0))]
    agents += [SacConfig(hidden=(8, 8)).build(spec, gen(1)), SacConfig(hidden=(8, 8), spectral=1e9).build(spec, gen(1))]
    for _ in range(3):
        batch, noise = random_batch(spec, 1, 8, g, torch.float32), random_noise(spec, 1, 8, g, torch.float32)
        for agent in agents:
            agent.update(batch, noise)
    for agent in agents[1:]:
        assert all(torch.equal(v, agent.state_dict()[k]) for k, v in agents[0].state_dict().items())
    assert set(agents[0].state_dict()) == set(agents[2].state_dict())


def test_the_robust_regulariser_makes_the_value_flatter():
    def batch(g, n):
        obs = torch.rand(1, n, 1, generator=g) * 4 - 2
        return Transitions(obs, uniform(g, n), (3 * obs[..., 0]).sin(), obs, torch.ones(1, n))

    obs = torch.linspace(-2, 2, 50)[None, :, None]
    steep = [
        local_lipschitz(learn(SacConfig(**FAST, robust=r, robust_eps=0.3), batch, 150)[0], obs)["l2_mean"].item()
        for r in (0.0, 1.0)
    ]
    assert steep[1] < 0.7 * steep[0]


def test_power_iteration_reaches_the_largest_singular_value():
    g = gen(34)
    for shape in ((5, 8, 6), (3, 4, 1), (2, 1, 7), (4, 16, 16)):
        weight = torch.randn(shape, generator=g, dtype=DOUBLE)
        start = torch.randn(shape[0], shape[2], generator=g, dtype=DOUBLE)
        first = start / start.norm(dim=1, keepdim=True)
        want = torch.linalg.svdvals(weight)[:, 0]
        norm, vector = power_iteration(weight, first, 400)
        torch.testing.assert_close(norm, want, rtol=1e-6, atol=0)
        torch.testing.assert_close((weight @ vector[..., None]).norm(dim=1)[:, 0], want, rtol=1e-6, atol=0)
        kept = first
        for _ in range(400):  # one at a time from the vectors kept is the same
            norm, kept = power_iteration(weight, kept)
            assert (norm <= want * (1 + 1e-12)).all()
        torch.testing.assert_close((norm, kept), power_iteration(weight, first, 400))
    zero = torch.zeros(1, 3, 2)
    assert power_iteration(zero, torch.tensor([[0.6, 0.8]]))[1].tolist() == [[0.6000000238418579, 0.800000011920929]]


@pytest.mark.parametrize(("bound", "iterations", "slack"), [(0.4, 100, 1.002), (0.4, 5, 1.05), (1.5, 1, 1.1)])
def test_critics_and_targets_keep_to_the_spectral_bound(bound, iterations, slack):
    spec, seeds, g = Spec(3, 2), 2, gen(35)
    agent = built(spec, seeds, g, spectral=bound, critic_lr=1e-2, tau=0.3, spectral_iterations=iterations)
    free = built(spec, seeds, gen(35), critic_lr=1e-2)
    norms = lambda flat: [
        torch.linalg.svdvals(w)[:, 0] for w, *_ in agent.critic_net.views(flat.reshape(-1, flat.shape[-1]))
    ]
    for _ in range(40):
        for layer in (*norms(agent.critics), *norms(agent.target)):
            assert (layer <= bound * slack).all()
        batch, noise = random_batch(spec, seeds, 16, g), random_noise(spec, seeds, 16, g)
        agent.update(batch._replace(reward=5 * batch.obs.sum(-1)), noise)
        free.update(batch._replace(reward=5 * batch.obs.sum(-1)), noise)
    assert max(x.max() for x in norms(free.critics)) > 1.5 * bound
    assert max(x.max() for x in norms(agent.critics)) > 0.9 * bound, "and no further down than to it"
    obs = torch.randn(seeds, 100, 3, generator=g, dtype=DOUBLE)
    assert (local_lipschitz(agent, obs)["l2_max"] <= (slack * bound) ** 3).all()


def test_critics_that_are_loaded_keep_to_the_bound_as_well():
    """One step of the power iteration, from the vectors of other weights, would not see how large these are."""
    agent = SacConfig(hidden=(32, 32), spectral=1.0, critic_lr=0.0, tau=1.0).build(Spec(3, 2), gen(1), 1, DOUBLE)
    other = SacConfig(hidden=(32, 32)).build(Spec(3, 2), gen(2), 1, DOUBLE)
    agent.load_linears(0, **other.linears(0))
    agent.update(random_batch(Spec(3, 2), 1, 8, gen(3)), random_noise(Spec(3, 2), 1, 8, gen(3)))
    for weight, *_ in agent.critic_net.views(agent.critics[0]):
        assert (torch.linalg.svdvals(weight)[:, 0] <= 1 + 1e-9).all()


def test_targets_that_are_loaded_keep_to_the_bound_and_to_their_directions():
    make = lambda **kw: SacConfig(hidden=(16, 16), **kw).build(Spec(3, 2), gen(1), 2, DOUBLE)
    agent, other = make(spectral=1.0), make()
    other.critics.data.mul_(4.0)
    other.target.data.mul_(3.0)
    agent.critics.data[1].mul_(1.01)  # beyond the bound, as a layer that has just grown may be
    untouched = agent.target[1].clone(), agent.critics[1].clone()
    agent.load_linears(0, **other.linears(0))
    for flat, given in ((agent.critics, other.critics), (agent.target, other.target)):
        for (weight, *_), (full, *_) in zip(*(agent.critic_net.views(x[0]) for x in (flat, given)), strict=True):
            norms = torch.linalg.svdvals(full)[:, 0]
            torch.testing.assert_close(weight, full / norms.clamp(min=1)[:, None, None])
            assert (norms > 1).any()
    assert torch.equal(agent.target[1], untouched[0])
    assert torch.equal(agent.critics[1], untouched[1])


REGULAR = {"hidden": (8, 8), "robust": 0.5, "spectral": 1.0, "critic_lr": 1e-2}


def test_regularised_seeds_do_not_see_each_other_and_a_broken_one_stays():
    spec, g = Spec(3, 2), gen(36)
    many = SacConfig(**REGULAR).build(spec, gen(2), 3, DOUBLE)
    few = SacConfig(**REGULAR).build(spec, gen(2), 2, DOUBLE)
    for step in range(4):
        batch, noise = random_batch(spec, 3, 8, g), random_noise(spec, 3, 8, g)
        if step == 2:
            batch.reward[1] = math.nan
        before = {k: v.clone() for k, v in many.state_dict().items()}
        many.update(batch, noise)
        few.update(Transitions(*(x[:2] for x in batch)), noise[:, :2])
        if step == 2:
            assert torch.equal(many.critics[1], before["critics"][1])
            assert torch.equal(many.vectors[1], before["vectors"][1])
    for k, v in few.state_dict().items():
        if v.ndim and k not in ("obs_mean", "obs_std"):
            torch.testing.assert_close(many.state_dict()[k][:2], v, msg=k)
    one = many.one(1)
    torch.testing.assert_close(one.vectors, many.vectors[1:2])


def test_a_reloaded_regularised_agent_continues_bit_for_bit():
    spec, g = Spec(3, 2), gen(37)
    agent, other = (SacConfig(**REGULAR).build(spec, gen(s), 2) for s in (0, 9))
    data = [(random_batch(spec, 2, 8, g, torch.float32), random_noise(spec, 2, 8, g, torch.float32)) for _ in range(6)]
    for batch, noise in data[:3]:
        agent.update(batch, noise)
    other.load_state_dict({k: v.clone() for k, v in agent.state_dict().items()})
    assert "vectors" in agent.state_dict()
    for batch, noise in data[3:]:
        agent.update(batch, noise)
        other.update(batch, noise)
    for name, value in agent.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def linear_agent(obs_slope, act_slope, seeds=1, **settings):
    """Q = obs_slope . s + act_slope . a + 5 where that is above -95; there the one unit of each critic is active."""
    spec = Spec(len(obs_slope), len(act_slope))
    agent = SacConfig(hidden=(1,), **settings).build(spec, gen(), seeds, DOUBLE)
    for flat in (agent.critics, agent.target):
        (w, b), (w2, b2) = agent.critic_net.views(flat.view(-1, flat.shape[-1]))
        w[..., 0] = torch.tensor([*obs_slope, *act_slope], dtype=DOUBLE)
        b[:], w2[:], b2[:] = 100.0, 1.0, -95.0
    return agent


def test_the_local_lipschitz_constant_of_a_linear_value_is_its_slope():
    agent = linear_agent([3.0, -4.0], [10.0], seeds=2)
    got = local_lipschitz(agent, torch.randn(2, 30, 2, generator=gen(), dtype=DOUBLE))
    for name, value in got.items():
        assert value.tolist() == pytest.approx([5.0, 5.0] if name.startswith("l2") else [7.0, 7.0]), name
    assert len(got) == 4
    scaled = linear_agent([3.0, -4.0], [10.0], normalize=True)
    scaled.set_normalizer(torch.zeros(2), torch.tensor([3.0, 0.5]))
    got = local_lipschitz(scaled, torch.randn(1, 30, 2, generator=gen(), dtype=DOUBLE))
    assert got["l2_max"].item() == pytest.approx(math.hypot(1.0, 8.0)), "of the raw observation"
    bent = linear_agent([100.0], [0.0])  # from obs < -1 on there is no slope: the mean is of both kinds, the max of one
    got = local_lipschitz(bent, torch.tensor([[[-2.0], [0.0], [0.5], [-3.0]]], dtype=DOUBLE))
    assert [got[k].item() for k in ("l2_mean", "l2_max", "linf_mean")] == [50.0, 100.0, 50.0]


class Off(Markov):
    """s' = s + (a, 0 ...) + shift."""

    def __init__(self, spec, shift):
        super().__init__()
        self.spec, self.noise_dim, self.shift = spec, 0, nn.Parameter(shift)

    def step(self, state, inp, cond):
        obs = state + self.shift
        return obs, Prediction(obs, obs[:, 0], {})

    def loss(self, segment, noise):
        raise NotImplementedError


def test_the_value_aware_error_of_a_linear_value_is_the_slope_times_the_models_error():
    agent = linear_agent([3.0, -4.0], [0.0], seeds=2)
    agent.actor.data[1] += 1.0
    batch = Transitions(*(x[0] for x in random_batch(agent.spec, 1, 40, gen(38))))
    batch = batch._replace(next_obs=batch.obs)
    at = lambda x, y: value_aware_error(agent, Off(agent.spec, torch.tensor([x, y], dtype=DOUBLE)), batch, gen())
    torch.testing.assert_close(at(1.0, 1.0), torch.ones(2, dtype=DOUBLE))
    torch.testing.assert_close(at(1.0, -1.0), torch.full((2,), 7.0, dtype=DOUBLE))
    assert at(4.0, 3.0).max() < 1e-9, "an error that the value does not see is none"
    wrong = torch.where(batch.terminal[:, None] > 0, 1000.0, batch.next_obs)  # no value follows an end
    batch = batch._replace(next_obs=wrong)
    torch.testing.assert_close(at(1.0, 1.0), torch.ones(2, dtype=DOUBLE))


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])  # one seed in float32 has an optimiser's kernel of its own
def test_seeds_trained_together_are_seeds_trained_apart(dtype):
    spec, g = Spec(3, 2), gen(7)
    config = SacConfig(hidden=(16, 16), total=10)
    together = config.build(spec, gen(8), 3, dtype)
    stream = gen(8)
    apart = [config.build(spec, stream, 1, dtype) for _ in range(3)]
    torch.testing.assert_close(together.critics, torch.cat([a.critics for a in apart]), atol=0, rtol=0)
    assert not torch.equal(together.actor[0], together.actor[1])
    for _ in range(4):
        batch, noise = random_batch(spec, 3, 16, g, dtype), random_noise(spec, 3, 16, g, dtype)
        together.update(batch, noise)
        for s, agent in enumerate(apart):
            agent.update(Transitions(*(x[s : s + 1] for x in batch)), noise[:, s : s + 1])
    for name in ("actor", "critics", "target", "log_alpha"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(a, name) for a in apart]))


def test_first_seeds_of_a_larger_build_are_those_of_a_smaller():
    few, many = (SacConfig(hidden=(8,)).build(Spec(3, 1), gen(9), n) for n in (2, 5))
    for name in ("actor", "critics", "target"):
        assert torch.equal(getattr(few, name), getattr(many, name)[:2])


def test_initial_weights_are_within_the_bound_of_linear_layers():
    net = FlatMLP((4, 100, 9))
    (w, b), (w2, b2) = net.views(net.init(gen(10))[None])
    for x, bound in ((w, 0.5), (b, 0.5), (w2, 0.1), (b2, 0.1)):
        assert 0.8 * bound < x.abs().max() <= bound


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_broken_batch_of_one_seed_touches_nobody(bad, layer_norm):
    spec, g = Spec(3, 2), gen(11)
    agent = SacConfig(hidden=(16, 16), layer_norm=layer_norm).build(spec, g, 3, DOUBLE)
    batch, noise = random_batch(spec, 3, 16, g), random_noise(spec, 3, 16, g)
    agent.update(batch, noise)
    twin = copy.deepcopy(agent)
    before = copy.deepcopy(agent.state_dict())
    broken = batch._replace(obs=batch.obs.clone())
    broken.obs[1, 5] = bad
    log = agent.update(broken, noise)
    twin.update(batch, noise)
    assert log["skipped"].tolist() == [0.0, 3.0, 0.0]
    for name, value in agent.state_dict().items():
        if value.ndim and name not in ("obs_mean", "obs_std"):
            assert torch.equal(value[1], before[name][1]), name
            torch.testing.assert_close(value[[0, 2]], twin.state_dict()[name][[0, 2]], msg=name)
            assert not torch.equal(value[0], before[name][0]), name
    assert agent.update(batch, noise)["skipped"].tolist() == [0.0, 0.0, 0.0]


def test_a_first_update_that_is_broken_leaves_the_agent_as_built():
    spec, g = Spec(3, 1), gen(12)
    agent = SacConfig(hidden=(8,)).build(spec, g)
    batch, noise = random_batch(spec, 1, 8, g, torch.float32), random_noise(spec, 1, 8, g, torch.float32)
    before = copy.deepcopy(agent.state_dict())
    agent.update(batch._replace(obs=batch.obs * math.nan), noise)
    for name, value in agent.state_dict().items():
        assert name == "updates" or torch.equal(value, before[name]), name
    agent.update(batch._replace(reward=batch.reward * math.nan), noise)  # the actor's own loss is fine
    assert torch.equal(agent.critics, before["critics"])
    assert not torch.equal(agent.actor, before["actor"])


def test_one_seed_acts_and_values_as_it_does_among_others():
    spec, g = Spec(3, 2), gen(13)
    agent = SacConfig(hidden=(8,)).build(spec, g, 3)
    obs, noise = torch.randn(3, 5, 3, generator=g), torch.randn(3, 5, 2, generator=g)
    act = agent.act(obs, noise)
    for s in (0, 2, -1):
        one, cut = agent.one(s), slice(s % 3, s % 3 + 1)
        torch.testing.assert_close(one.act(obs[cut], noise[cut]), act[cut])
        torch.testing.assert_close(one.q(obs[cut], act[cut], target=True), agent.q(obs, act, target=True)[cut])
    with pytest.raises(IndexError, match="3"):
        agent.one(3)


# ---------------------------------------------------------------- state, targets, schedules


def test_a_reloaded_agent_continues_bit_for_bit():
    spec, g = Spec(3, 2), gen(14)
    config = SacConfig(hidden=(16, 16), total=20, normalize=True)
    agent = config.build(spec, gen(0), 2)
    agent.set_normalizer(torch.ones(3), torch.full((3,), 2.0))
    data = [(random_batch(spec, 2, 8, g, torch.float32), random_noise(spec, 2, 8, g, torch.float32)) for _ in range(6)]
    for batch, noise in data[:3]:
        agent.update(batch, noise)
    other = config.build(spec, gen(99), 2)
    other.load_state_dict({k: v.clone() for k, v in agent.state_dict().items()})
    for batch, noise in data[3:]:
        logs = agent.update(batch, noise), other.update(batch, noise)
        assert all(torch.equal(logs[0][k], logs[1][k]) for k in logs[0])
    for name, value in agent.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_copies_and_casts_have_a_life_of_their_own():
    spec, g = Spec(3, 2), gen(15)
    agent = SacConfig(hidden=(8,)).build(spec, g)
    batch, noise = random_batch(spec, 1, 8, g, torch.float32), random_noise(spec, 1, 8, g, torch.float32)
    agent.update(batch, noise)
    twin, before = copy.deepcopy(agent), agent.actor.clone()
    twin.update(batch, noise)
    assert torch.equal(agent.actor, before)
    agent.update(batch, noise)
    assert torch.equal(agent.actor, twin.actor)
    assert torch.equal(agent.act(batch.obs), twin.act(batch.obs))
    agent.double()
    agent.update(Transitions(*(x.double() for x in batch)), noise.double())
    twin.update(batch, noise)
    torch.testing.assert_close(agent.actor.float(), twin.actor, atol=2e-6, rtol=1e-4)


def test_targets_move_by_tau():
    spec, g = Spec(3, 2), gen(16)
    agent = SacConfig(hidden=(8,), tau=0.25, critic_lr=1e-2).build(spec, g, 2, DOUBLE)
    assert torch.equal(agent.target, agent.critics)
    target = agent.target.clone()
    for _ in range(3):
        agent.update(random_batch(spec, 2, 8, g), random_noise(spec, 2, 8, g))
        target = 0.75 * target + 0.25 * agent.critics
        torch.testing.assert_close(agent.target, target)


def test_actor_rate_falls_along_a_half_cosine_to_zero():
    spec, g = Spec(3, 2), gen(17)
    agent = SacConfig(hidden=(8,), actor_lr=0.4, total=4).build(spec, g, 1, DOUBLE)
    for want in (0.4, 0.2 + 0.2 * math.sqrt(0.5), 0.2, 0.2 - 0.2 * math.sqrt(0.5), 0.0, 0.0):
        assert float(agent.actor_lr()) == pytest.approx(want, abs=1e-7)
        before = agent.actor.clone()
        agent.update(random_batch(spec, 1, 8, g), random_noise(spec, 1, 8, g))
    assert torch.equal(agent.actor, before)


def test_act_without_noise_is_the_tanh_of_the_mean_and_noise_spreads_it():
    spec, g = Spec(3, 2), gen(18)
    agent = SacConfig(hidden=(8,)).build(spec, g, 1, DOUBLE)
    obs = torch.randn(1, 1, 3, generator=g, dtype=DOUBLE)
    zero = torch.zeros(1, 1, 2, dtype=DOUBLE)
    torch.testing.assert_close(agent.act(obs), agent.act(obs, zero))
    last = agent.actor_net.views(agent.actor)[-1]
    last[0][:, :, 2:] = 0.0
    last[1][:, :, 2:] = math.log(0.3)
    u = agent.act(obs).atanh()
    torch.testing.assert_close(agent.act(obs, zero + 1).atanh(), u + 0.3)


# ---------------------------------------------------------------- exchange, errors


@pytest.mark.parametrize("normalize", [False, True])
def test_linears_are_the_networks_on_raw_observations(normalize):
    spec, g = Spec(4, 2), gen(19)
    config = SacConfig(hidden=(8, 6), normalize=normalize)
    agent = config.build(spec, g, 2, DOUBLE)
    if normalize:
        agent.set_normalizer(torch.randn(4, generator=g, dtype=DOUBLE), torch.rand(4, generator=g, dtype=DOUBLE) + 0.5)
    obs = torch.randn(2, 7, 4, generator=g, dtype=DOUBLE)
    act = agent.act(obs)

    def run(layers, x):
        for i, (w, b) in enumerate(layers):
            x = F.linear(x, w, b)
            x = x.relu() if i + 1 < len(layers) else x
        return x

    out = agent.linears(1)
    torch.testing.assert_close(run(out["actor"], obs[1])[:, :2].tanh(), act[1])
    for n in range(2):
        q = run(out["critics"][n], torch.cat([obs[1], act[1]], -1))[:, 0]
        torch.testing.assert_close(q, agent.q(obs, act)[1, n])
    agent.update(random_batch(spec, 2, 8, g), random_noise(spec, 2, 8, g))
    other = config.build(spec, g, 2, DOUBLE)
    other.load_state_dict(agent.state_dict())
    other.load_linears(1, out["actor"], out["critics"], out["target"])
    torch.testing.assert_close(other.act(obs)[1], act[1])
    torch.testing.assert_close(other.act(obs)[0], agent.act(obs)[0])
    torch.testing.assert_close(other.linears(1), out)


def test_without_a_temperature_there_is_no_entropy_term():
    agent = small(init_alpha=0.0, alpha_lr=0.0)
    assert agent.log_alpha.exp().tolist() == [0.0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SacConfig(hidden=()).build(Spec(3, 1), gen()), "hidden"),
        (lambda: SacConfig(critics=0).build(Spec(3, 1), gen()), "critics=0"),
        (lambda: SacConfig().build(Spec(3, 0), gen()), "0 action"),
        (lambda: SacConfig().build(Spec(3, 1), gen(), 0), "0 seeds"),
        (lambda: small().set_normalizer(torch.zeros(3), torch.ones(3)), "normalize=True"),
        (lambda: small(normalize=True).set_normalizer(torch.zeros(3), torch.zeros(3)), "not positive"),
        (lambda: small().load_linears(0, **{**small().linears(0), "critics": []}), "0 critics"),
        (lambda: small().load_linears(0, **small(hidden=(5,)).linears(0)), r"\(5, 3\)"),
        (lambda: small(layer_norm=True).linears(0), "normalisation"),
        (lambda: small(layer_norm=True, spectral=1.0), "undoes"),
        (lambda: small(spectral=0.0), "positive bound"),
        (lambda: small(spectral=math.nan), "spectral=nan"),
        (lambda: small(robust=-1.0), "robust=-1.0"),
        (lambda: small(robust=math.nan), "robust=nan"),
        (lambda: small(robust=math.inf), "robust=inf"),
        (lambda: small(robust=1.0, robust_eps=math.nan), "robust_eps=nan"),
        (lambda: small(cloning=math.nan), "cloning=nan"),
        (lambda: small(target_min=math.nan), "target_min=nan"),
        (lambda: small(target_entropy=math.nan), "target_entropy=nan"),
        (lambda: small(init_alpha=-1.0), "init_alpha=-1.0"),
        (lambda: small(init_alpha=0.0), "init_alpha=0.0, alpha_lr=0.0001"),
        (lambda: small(init_alpha=math.inf), "init_alpha=inf"),
        (lambda: small(gamma=1.5), "gamma=1.5"),
        (lambda: small(tau=2.0), "tau=2.0"),
        (lambda: small(critic_lr=-1e-3), r"rates >= 0|critic_lr.*-0.001"),
    ],
)
def test_bad_input_is_one_clear_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def small(**settings):
    return SacConfig(**{"hidden": (4,), **settings}).build(Spec(3, 1), gen())


# ---------------------------------------------------------------- what is too small to matter


@pytest.mark.parametrize("seeds", [1, 2])
def test_moments_of_units_that_died_are_dropped_and_the_steps_are_the_same(seeds, monkeypatch):
    """A CPU takes many times as long for subnormal numbers, at which a moment that decays would stay."""
    monkeypatch.setattr("mbrl.device.SWEEP", 5)
    param = torch.ones(seeds, 3)
    adam, plain = Adam(param), torch.ones(seeds, 3, requires_grad=True)
    optimizer = torch.optim.Adam([plain], lr=1e-2)
    for i in range(12):
        grad = torch.tensor([1.0, 1e-38 if i < 4 else 0.0, 1e-12 if i < 4 else 0.0]).expand(seeds, 3)
        adam.grad.copy_(grad)
        adam.step(param, 1e-2)
        plain.grad = grad.clone()
        optimizer.step()
        assert bool(adam.m[:, 1].any()) == (i < 4)
        assert adam.m[:, 2].all()
        assert adam.v[:, 0].all()
    assert optimizer.state[plain]["exp_avg"][:, 1].all()
    torch.testing.assert_close(param, plain.detach(), rtol=1e-6, atol=0)
