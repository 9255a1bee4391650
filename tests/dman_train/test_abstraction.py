"""f_abs by routing, against every vote of eq. 6-7 written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TINY
from torch import Tensor

from dman_train.abstraction import RoutingAbstraction
from dman_train.config import ModelConfig


def softmax(logits: Tensor) -> Tensor:
    weights = logits.exp()
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("axis", ["slots", "primaries"])
@pytest.mark.parametrize("routing", ["slot", "full"])
def test_routing_equals_naive_votes(routing: str, axis: str) -> None:
    torch.manual_seed(0)
    config = replace(TINY, routing=routing, routing_softmax=axis)
    f_abs = RoutingAbstraction(config)
    with torch.no_grad():
        for parameter in f_abs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    memory, hidden = torch.randn(2, 4, 32), torch.randn(2, 5, 32)
    found = f_abs(memory, hidden)
    for row in range(2):
        torch.testing.assert_close(found[row], _routed(f_abs, config, memory[row], hidden[row]), rtol=1e-4, atol=2e-5)


def _routed(f_abs: RoutingAbstraction, config: ModelConfig, memory: Tensor, hidden: Tensor) -> Tensor:
    """Eq. 6-7 for one user with every vote W_ij x_i written out: (m, D)."""
    x, slots = f_abs.norm_primaries(torch.cat([memory, hidden])), 4
    w = {
        "slot": lambda i, j: f_abs.maps[j],
        "full": lambda i, j: f_abs.maps[i, j],
    }[config.routing]
    votes = torch.stack([torch.stack([x[i] @ w(i, j) for j in range(slots)]) for i in range(9)])  # (m+T, m, D)
    capsules, logits = f_abs.norm_capsules(memory), torch.zeros(9, slots)
    for _ in range(config.routing_iterations):
        logits = logits + (votes * capsules).sum(-1) / 32**0.5
        coupling = softmax(logits) if config.routing_softmax == "slots" else softmax(logits.T).T
        capsules = f_abs.norm_capsules((coupling[..., None] * votes).sum(0))
    return capsules
