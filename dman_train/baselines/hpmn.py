"""HPMN: Ren et al., "Lifelong Sequential Modeling with Personalized Memorization for User Response Prediction",
SIGIR 2019 (arXiv 1905.00758).

Layer i of a stack of GRUs reads every PERIOD-th state of layer i - 1, so it is updated every PERIOD^(i-1) events and
remembers further back. The newest states of all K layers are the memory slots. Attention reads them, and a penalty on
the covariance of any two slots keeps them different.

The reference (alimamarankgroup/HPMN) estimates the response to a given item. That item is the last input and the query.
It reads three times. After each read the query is a linear map of itself plus what was read, and a deep network
classifies [last query, target]. The periods between its layers are 2, 2 (Amazon), 2, 2, 3 (Taobao) and always 2 (XLong,
five layers). Its inputs have one length, are padded on the left, and end with the end of a period. Here: `hops` reads
in the same way; there is no target item, so the last event is the first query; a linear layer of [last query, last
event]; one period for all layers, so that four layers have slots with the periods 1, 4, 16 and 64; periods counted from
the left end of a window, so that a slot is up to one period old, and zero before its first period ends; layers that
would never be updated are left out. The energies are those of the reference, a network over query, slot and their
product (their difference adds nothing). The penalty is that of the reference, which sums it over a batch of 128 with
weight 1e-5. Here it is a mean over all positions, including padding. If it sees times, the gap to the event before is
embedded into each input, and the one from the last event to the request into that event as query and output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_train.baselines.base import Baseline
from dman_train.baselines.latest import Moments
from dman_train.config import BaselineConfig

PERIOD = 4  # states of a layer per state of the next
PENALTY = 1e-3  # weight of the covariance penalty


class HPMN(Baseline):
    def __init__(self, config: BaselineConfig, vocabulary: int, users: int) -> None:
        super().__init__(config, vocabulary, users)
        width = config.width
        self.periods = [PERIOD**i for i in range(config.layers) if PERIOD**i <= config.history]
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in self.periods)
        self.query = nn.Linear(width, width)
        self.carry = nn.Linear(width, width, bias=False)  # of the query from one read to the next
        self.energy = nn.Sequential(
            nn.Linear(3 * width, 80), nn.ReLU(), nn.Linear(80, 40), nn.ReLU(), nn.Linear(40, 1, bias=False)
        )
        self.output = nn.Linear(2 * width, width)
        self._penalty = torch.zeros(())

    def encode(self, items: Tensor, users: Tensor, lengths: Tensor, moments: Moments | None = None) -> Tensor:
        events = self.embed(items, moments)
        memory, last = self._memory(events), self.at_request(events, moments)
        self._penalty = PENALTY * _covariance_norm(memory)
        read = self._read(memory, self.query(last))
        return self.output(self.dropout(torch.cat([read, last], dim=-1)))  # small: needs no output_scale

    def _read(self, memory: Tensor, query: Tensor) -> Tensor:
        """(B, W, K, D) slots, (B, W, D) queries -> (B, W, D) what the last hop gives.

        `energy` over [query, slot, product], but its first layer sees the slots once for all hops.
        """
        first, rest = self.energy[0], self.energy[1:]
        assert isinstance(first, nn.Linear)
        of_query, of_slot, of_product = first.weight.chunk(3, dim=1)
        from_slots = F.linear(memory, of_slot, first.bias)  # (B, W, K, 80)
        for _ in range(self.config.hops):
            queries = query[:, :, None]
            hidden = from_slots + F.linear(queries, of_query) + F.linear(queries * memory, of_product)
            weights = torch.softmax(rest(hidden), dim=2)  # (B, W, K, 1)
            query = self.carry(query) + (weights * memory).sum(2)
        return query

    def penalty(self) -> Tensor:
        return self._penalty

    def _memory(self, x: Tensor) -> Tensor:
        """(B, W, D) events -> (B, W, K, D) the slots after each event."""
        event, slots, states = torch.arange(1, x.shape[1] + 1, device=x.device), [], x
        for period, gru in zip(self.periods, self.layers, strict=True):
            if period > 1:
                states = states[:, PERIOD - 1 :: PERIOD]
            if states.shape[1]:
                states, _ = gru(states)  # (B, W // period, D)
            slots.append(F.pad(states, (0, 0, 1, 0)).index_select(1, event // period))
        return torch.stack(slots, dim=2)


def _covariance_norm(memory: Tensor) -> Tensor:
    """(..., K, D) slots -> mean Frobenius norm of the covariances (K, K) of different slots."""
    centred = memory - memory.mean(-1, keepdim=True)
    covariance = centred @ centred.transpose(-1, -2) / memory.shape[-1]  # (..., K, K)
    same = torch.eye(memory.shape[-2], dtype=torch.bool, device=memory.device)
    return torch.linalg.vector_norm(covariance.masked_fill(same, 0.0), dim=(-2, -1)).mean()
