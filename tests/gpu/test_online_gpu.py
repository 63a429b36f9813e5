"""The online loop on an accelerator: several seeds at once, their updates one captured graph."""

from dataclasses import replace

import pytest
import torch
from test_online import SHORT, SINGLE, SMALL
from worlds import LineEnv, never

from mbrl import device as devices
from mbrl import online

pytestmark = pytest.mark.gpu


def test_seeds_that_learn_at_once_by_a_graph_learn_the_same_without(monkeypatch):
    device, config, found = devices.pick(), replace(SMALL, steps=60, updates=1), []
    for graphs in ("1", "0"):
        monkeypatch.setenv("MBRL_GRAPHS", graphs)
        found.append(
            online.train_together(
                config, [LineEnv(13, 2.0) for _ in range(3)], seeds=[0, 1, 2], dynamics=SINGLE, fitting=SHORT,
                terminal=never, device=device,
            )
        )  # fmt: skip
    for graphed, eager in zip(*found, strict=True):
        assert graphed.agent.actor.device.type == device.type
        torch.testing.assert_close(graphed.agent.actor, eager.agent.actor, rtol=1e-3, atol=1e-4)
        assert [n for n, _ in graphed.episodes] == [n for n, _ in eager.episodes]
