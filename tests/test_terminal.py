"""The learned termination: a limit that is known is found, and an absent one stays absent."""

import dataclasses

import pytest
import torch

from mbrl.data import Dataset
from mbrl.terminal import TerminalConfig, TerminalHead, fit_terminal

close = torch.testing.assert_close
QUICK = TerminalConfig(hidden=(64, 64), steps=1000)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def falling(n, seed=0):
    """A height and two other numbers of other sizes; a transition ends the task where the height falls below -1.5
    (one in fifteen)."""
    g = gen(seed)
    obs, act = torch.randn(n, 3, generator=g), torch.rand(n, 1, generator=g) * 2 - 1
    after = obs + 0.3 * torch.randn(n, 3, generator=g)
    scale = torch.tensor([0.01, 1.0, 100.0])
    terminal = after[:, 0] < -1.5
    yes = torch.ones(n, dtype=torch.bool)
    low = -torch.ones(1)
    return Dataset(obs * scale, act, obs[:, 0], after * scale, terminal, yes, torch.tensor([0, n]), low, -low)


@pytest.fixture(scope="module")
def head():
    return fit_terminal(falling(6000), QUICK, gen())


def test_it_finds_a_known_limit(head):
    fresh = falling(5000, seed=1)
    got = head(fresh.obs, fresh.act, fresh.next_obs)
    assert got.dtype == torch.bool
    right = [(got == fresh.terminal)[fresh.terminal == kind].double().mean() for kind in (False, True)]
    assert sum(right) / 2 > 0.95
    assert abs(head.accuracy - sum(right) / 2) < 0.05  # its own estimate, from some eighty endings
    assert int(head.endings) == int(falling(6000).terminal.sum())
    assert "balanced accuracy 0.9" in head.describe()


def test_its_odds_are_those_of_the_data(head):
    """Trained on as many endings as others, it must not end more transitions than end in the data."""
    fresh = falling(5000, seed=2)
    share = head(fresh.obs, fresh.act, fresh.next_obs).double().mean() / fresh.terminal.double().mean()
    assert 0.85 < share < 1.15
    with torch.no_grad():
        far = fresh.next_obs.clone()
        far[:, 0] = 0.01  # well above the limit
        assert head.logit(fresh.obs, fresh.act, far).sigmoid().mean() < 0.01
    close(head.prior, falling(6000).terminal.double().mean().logit().float())


def test_where_nothing_ends_it_ends_nothing():
    data = falling(300)
    head = fit_terminal(dataclasses.replace(data, terminal=torch.zeros(300, dtype=torch.bool)), QUICK, gen())
    assert not head(data.obs * 1e6, data.act, data.next_obs * 1e6).any()
    assert "never do" in head.describe()
    untrained = TerminalHead(3, 1, QUICK, gen())
    assert not untrained(data.obs, data.act, data.next_obs).any()


def test_it_does_not_learn_from_steps_without_a_successor():
    data = falling(2000)
    paired = torch.arange(2000) % 2 == 0
    spoiled = torch.where(paired[:, None], data.next_obs, torch.nan)
    head = fit_terminal(dataclasses.replace(data, paired=paired, next_obs=spoiled), QUICK, gen())
    assert all(p.isfinite().all() for p in head.parameters())
    assert int(head.endings) == int((data.terminal & paired).sum())


def test_endings_that_teach_nothing_are_told():
    """A file without next_observations has no successor of the last step of an episode."""
    data = falling(300)
    with pytest.warns(UserWarning, match=f"never do, since the {int(data.terminal.sum())} that end it have none"):
        head = fit_terminal(dataclasses.replace(data, paired=~data.terminal), QUICK, gen())
    assert not head(data.obs, data.act, data.next_obs).any()


def test_a_single_ending_is_enough_to_train():
    data = falling(200)
    terminal = torch.zeros(200, dtype=torch.bool)
    terminal[7] = True
    head = fit_terminal(dataclasses.replace(data, terminal=terminal), dataclasses.replace(QUICK, steps=20), gen())
    assert "not known" in head.describe()


def test_it_is_saved_and_loaded(head):
    other = TerminalHead(3, 1, QUICK)
    other.load_state_dict(head.state_dict())
    fresh = falling(1000, seed=3)
    close(other.logit(fresh.obs, fresh.act, fresh.next_obs), head.logit(fresh.obs, fresh.act, fresh.next_obs))
    assert torch.equal(other(fresh.obs, fresh.act, fresh.next_obs), head(fresh.obs, fresh.act, fresh.next_obs))
    assert not any(p.requires_grad for p in head.parameters())


def test_a_seed_repeats():
    a, b = (fit_terminal(falling(500), dataclasses.replace(QUICK, steps=50), gen(1)) for _ in range(2))
    close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
