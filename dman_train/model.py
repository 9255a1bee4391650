"""DMAN: Tan et al., "Dynamic Memory based Attention Network for Sequential Recommendation", AAAI 2021
(arXiv 2102.09269). Equation numbers are the paper's.

Symbols: B batch, S new positions in this call, C context positions, K = C + S, T segment length, m memory slots,
L layers, D width, H heads, V items, Q queries (S, or 1 when only the last new position is asked for).

A history is cut into segments of T events from its head. While segment n is encoded,
- the *context* holds the layer inputs h^l of segment n-1 and of the positions of segment n so far (eq. 1),
- the *memory* M^l summarises segments 1..n-2 in m slots per layer,
- a query of layer l reads both. `long_term="merged"`: one attention whose keys are the slots and the events.
  `long_term="gated"`: as in the paper, a second branch reads the slots (eq. 2), and a gate mixes it with the
  short-term branch into the user embedding (eq. 3). Score = item embedding . user embedding.
When segment n closes, M^l <- f_abs^l(M^l, H^l_{n-1}) (eq. 4): `dman_train.abstraction`, trained by eq. 5.
Variant `nran` has no recurrence: the context is segment n alone, the memory summarises segments 1..n-1, and H^l_n is
absorbed when segment n closes.

Keys and values are never projected: W_k is multiplied into the query and W_v into the output. A call costs
O(S H D^2 + S H K D), however many context positions there are. The result is that of plain attention.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dman_runtime.model.times import ANY_GAP, BUCKETS
from dman_train.abstraction import MASKED, FifoAbstraction, RoutingAbstraction, valid_primaries
from dman_train.blocks import PaperBlock, PlusBlock, blocks_of
from dman_train.config import ModelConfig
from dman_train.dropout import Dropout
from dman_train.item_rows import ItemRows
from dman_train.losses import Table
from dman_train.returns import ReturnTerm
from dman_train.timing import Timing, at_position, of_gaps

# Length of a LayerNormed user embedding. Untrained scores then have a standard deviation of about one; with length 1
# the first epochs do little but make the scores larger.
SCORE_SCALE = 4.0


class Encoding(NamedTuple):
    """The result of encoding S new positions."""

    user_embedding: Tensor  # (B, Q, D)
    hidden: Tensor  # (B, L, S, D) the layer inputs h^l: what a state keeps as context
    memory_queries: list[Tensor]  # L x (B, Q*H, D) the queries that read the memory, in the space of the sources


class _ReadDifference(nn.Module):
    """What the attention of a block reads from `new` minus what it reads from `old`: the difference of eq. 5."""

    def __init__(self, block: PaperBlock | PlusBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, queries: Tensor, new: Tensor, old: Tensor, old_bias: Tensor) -> Tensor:
        attention, norm = self.block.attention, self.block.norm_memory
        return attention.project(attention.mix(queries, norm(new)) - attention.mix(queries, norm(old), old_bias))


def _frozen_read_difference(
    block: PaperBlock | PlusBlock, queries: Tensor, new: Tensor, old: Tensor, old_bias: Tensor
) -> Tensor:
    """`_ReadDifference` without dropout and without gradient to the weights of the block."""
    reader, training = _ReadDifference(block), block.training
    frozen = {name: weight.detach() for name, weight in reader.named_parameters()}
    block.eval()
    try:
        return functional_call(reader, frozen, (queries, new, old, old_bias))
    finally:
        block.train(training)


class DMAN(nn.Module):
    """The network; `vocabulary` is V."""

    known_gap: Tensor  # () int64, see `longest_gap`
    item_rows: ItemRows | None = None  # in training that moves only some rows of `items`: gives them as they are now

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        depth, width = config.layers, config.width
        self.items = nn.Parameter(torch.randn(vocabulary, width) * 0.02)
        self.input_scale = math.sqrt(width)
        self.output_scale = (SCORE_SCALE if config.architecture == "plus" else 1.0) / math.sqrt(width)
        self.input_dropout = Dropout(config.dropout)
        self.distance_bias = nn.Parameter(torch.zeros(depth, config.heads, 2 * config.segment_length))
        if config.sees_times:
            self.gaps = nn.Parameter(torch.zeros(BUCKETS, width))  # by the time since the event before
            self.age_bias = nn.Parameter(torch.zeros(depth, BUCKETS, config.heads))
        if config.time == "request":
            self.request_gaps = nn.Parameter(torch.zeros(BUCKETS, width))  # by the time since the last event
            self.register_buffer("known_gap", torch.tensor(ANY_GAP))
        if config.returns == "on":
            self.returns = ReturnTerm(width, sees_times=config.sees_times)
        self.short_term, self.norm_short = self._branch(reads_memory=config.merged)
        if config.has_memory:
            # Of the length that f_abs gives to slots: squash keeps it below 1, LayerNorm at sqrt(D).
            slot_scale = 1 / math.sqrt(width) if config.architecture == "paper" else 1.0
            self.initial_memory = nn.Parameter(torch.randn(depth, config.memory_slots, width) * slot_scale)
            if config.merged:
                self.slot_bias = nn.Parameter(torch.zeros(depth, config.heads, config.memory_slots))
            else:
                self.long_term, self.norm_long = self._branch(reads_memory=True)
                self.gate_short = nn.Linear(width, width, bias=config.architecture != "paper")
                self.gate_long = nn.Linear(width, width, bias=False)
            self.abstraction = nn.ModuleList(
                FifoAbstraction() if config.variant == "fifo" else RoutingAbstraction(config) for _ in range(depth)
            )
        else:
            self.register_buffer("initial_memory", torch.zeros(depth, 0, width), persistent=False)

    def _branch(self, *, reads_memory: bool) -> tuple[nn.ModuleList, nn.Module]:
        """L blocks, and the normalisation of the last output."""
        config, depth = self.config, range(self.config.layers)
        if config.architecture == "paper":
            return nn.ModuleList(PaperBlock(config) for _ in depth), nn.Identity()
        blocks = nn.ModuleList(PlusBlock(config, reads_memory=reads_memory) for _ in depth)
        return blocks, nn.LayerNorm(config.width)

    @property
    def longest_gap(self) -> int:
        """Seconds: a request later than that after the last event counts as that late. Training sets it."""
        return int(self.known_gap) if self.config.time == "request" else ANY_GAP

    @property
    def memory_blocks(self) -> list[PaperBlock | PlusBlock]:
        """The L blocks whose attention reads the memory; the slots come first among its sources."""
        return blocks_of(self.short_term if self.config.merged else self.long_term)

    def item_table(self) -> Tensor:
        """(V, D) item embeddings as the layers read them and as scores are computed with them."""
        return self.items * self.input_scale

    def table_in_training(self) -> Table:
        """`item_table`, or what gives rows of it if a step must not touch all."""
        rows = self.item_rows
        return self.item_table() if rows is None else lambda items: rows(items) * self.input_scale

    def embed(self, item_indices: Tensor, gaps: Tensor | None = None) -> Tensor:
        """(...) item indices, (...) buckets of the time since the event before -> (..., D) layer-0 inputs."""
        x = F.embedding(item_indices, self.items) if self.item_rows is None else self.item_rows(item_indices)
        if self.config.sees_times:
            assert gaps is not None
            x = x + of_gaps(self.gaps, gaps)
        return self.input_dropout(x * self.input_scale)

    def encode(
        self,
        item_embeddings: Tensor,
        context: Tensor,
        context_lengths: Tensor,
        memory: Tensor,
        last: Tensor | None = None,
        timing: Timing | None = None,
    ) -> Encoding:
        """Encodes S new positions (eq. 1-3).

        The keys never depend on the request: the query of the last layer alone stands at its time.

        Args:
            item_embeddings: (B, S, D), rows of `item_table`, left-aligned.
            context: (B, L, C, D) layer inputs of earlier positions, right-aligned; C may be 0.
            context_lengths: (B) int64, how many of the C rows are real.
            memory: (B, L, m, D).
            last: (B) int64, the one position to return a user embedding for (Q = 1); None: all of them (Q = S).
            timing: Of the S positions, for a model that sees times.
        """
        bias, visible = self._positions(item_embeddings.shape[1], context.shape[2], context_lengths)
        h, hidden, memory_queries = item_embeddings, [], []
        for layer, block in enumerate(blocks_of(self.short_term)):
            hidden.append(h)
            queries, layer_bias = block.norm(h), bias[layer] + visible  # (B, S, D), (B, S, H, K)
            slots = [block.norm_memory(memory[:, layer])] if self.config.merged else []
            sources = torch.cat([*slots, block.norm(context[:, layer]), queries], dim=1)  # (B, K, D)
            final = layer == self.config.layers - 1
            if last is not None and final:  # nothing later reads the other positions
                h, queries, layer_bias = at_position(h, last), at_position(queries, last), at_position(layer_bias, last)
                timing = None if timing is None else timing.at(last)
            if timing is not None:
                layer_bias = layer_bias + self._age_bias(layer, timing.request_ages if final else timing.ages)
                if final and timing.request_gaps is not None:
                    h = h + of_gaps(self.request_gaps, timing.request_gaps) * self.input_scale
                    queries = block.norm(h)
            memory_queries.append(block.attention.queries_in_source_space(queries))
            h = block.add(h, block.attention(memory_queries[-1], sources, layer_bias))
        user = self.norm_short(h)
        if self.config.has_memory and not self.config.merged:
            newest = item_embeddings if last is None else at_position(item_embeddings, last)  # (B, Q, D)
            g, memory_queries = self._read_memory(newest, memory)
            share = torch.sigmoid(self.gate_short(user) + self.gate_long(g))  # (B, Q, D) of the short-term branch
            user = g + share * (user - g)
        return Encoding(user * self.output_scale, torch.stack(hidden, dim=1), memory_queries)

    def read_at_request(self, sources: Tensor, memory: Tensor, ages: Tensor, gaps: Tensor) -> Tensor:
        """The last layer for requests at known times: what `encode` gives for the last of some positions.

        Args:
            sources: (B, C, D) inputs of the last layer, right-aligned, C the most context; the last is the query.
            memory: (B, m, D) of the last layer.
            ages: (B, C) buckets of the time from each event to the request; NO_EVENT before the first.
            gaps: (B) buckets of the time from the last event to the request.
        """
        layer = self.config.layers - 1
        block = blocks_of(self.short_term)[layer]
        by_place = self.distance_bias[layer, :, : sources.shape[1]].flip(-1)  # (H, C), the last at distance 0
        keys = [block.norm_memory(memory)] if self.config.merged else []
        slots = [self.slot_bias[layer]] if self.config.merged else []
        by_age = torch.cat([self.age_bias[layer], torch.full_like(self.age_bias[layer][:1], MASKED)])
        bias = torch.cat([*slots, by_place], dim=-1) + self._with_slots(F.embedding(ages[:, None], by_age))
        h = sources[:, -1:] + F.embedding(gaps[:, None], self.request_gaps) * self.input_scale
        queries = block.attention.queries_in_source_space(block.norm(h))
        h = block.add(h, block.attention(queries, torch.cat([*keys, block.norm(sources)], dim=1), bias))
        return (self.norm_short(h) * self.output_scale)[:, 0]

    def _age_bias(self, layer: int, ages: Tensor | None) -> Tensor:
        """(B, Q, K) buckets -> (B, Q, H, m + K): a bias by age for each head."""
        assert ages is not None
        return self._with_slots(F.embedding(ages, self.age_bias[layer]))

    def _with_slots(self, by_age: Tensor) -> Tensor:
        """(B, Q, K, H) -> (B, Q, H, m + K), zeros for the slots, which have no age."""
        return F.pad(by_age.transpose(2, 3), (self.config.memory_slots if self.config.merged else 0, 0))

    def _read_memory(self, g: Tensor, memory: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Eq. 2: (B, Q, D) item embeddings, (B, L, m, D) -> (B, Q, D), and `Encoding.memory_queries`."""
        memory_queries = []
        for layer, block in enumerate(blocks_of(self.long_term)):
            memory_queries.append(block.attention.queries_in_source_space(block.norm(g)))
            g = block.add(g, block.attention(memory_queries[-1], block.norm_memory(memory[:, layer])))
        return self.norm_long(g), memory_queries

    def _positions(self, new: int, context: int, context_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Relative bias (L, S, H, K) and visibility (B, S, 1, K) as additive terms; distances are query minus key.

        Slots among the keys have no distance but a bias each, and every query sees them.
        """
        device = context_lengths.device
        key = torch.arange(context + new, device=device)
        query = torch.arange(new, device=device) + context
        distance = query[:, None] - key[None, :]  # (S, K)
        bias = self.distance_bias[:, :, distance.clamp(0, 2 * self.config.segment_length - 1)].transpose(1, 2)
        seen = (key >= context - context_lengths[:, None])[:, None, :] & (distance >= 0)[None]  # (B, S, K)
        visible = torch.where(seen, 0.0, MASKED)[:, :, None]
        if not self.config.merged:
            return bias, visible
        slots = self.slot_bias[:, None].expand(-1, new, -1, -1)  # (L, S, H, m)
        return torch.cat([slots, bias], dim=-1), F.pad(visible, (self.config.memory_slots, 0))

    def abstract(self, memory: Tensor, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """f_abs of every layer (eq. 4): (B, L, m, D), (B, L, T, D) -> (B, L, m, D).

        `lengths` (B): only that many rows of `hidden`, counted from the right, are real; all when None.
        """
        if not self.config.has_memory:
            return memory
        layers = zip(self.abstraction, memory.unbind(1), hidden.unbind(1), strict=True)
        return torch.stack([f_abs(m, h, lengths) for f_abs, m, h in layers], dim=1)

    def abstraction_parameters(self) -> list[nn.Parameter]:
        """The parameters of f_abs, which eq. 5 trains."""
        return list(self.abstraction.parameters()) if self.config.has_memory else []

    def abstraction_queries(self, encoding: Encoding) -> list[Tensor]:
        """L x (B, Q*H, D) without gradient: what eq. 5 compares the two memories with.

        Architecture `paper`: the hidden states of the segment as queries of the short-term attention, as the text has
        it. Architecture `plus`: the queries that read the memory.
        """
        if self.config.architecture == "plus":
            return [queries.detach() for queries in encoding.memory_queries]
        layers = zip(blocks_of(self.short_term), encoding.hidden.unbind(1), strict=True)
        return [block.attention.queries_in_source_space(hidden).detach() for block, hidden in layers]

    def abstraction_loss(
        self,
        *,
        old_memory: Tensor,
        new_memory: Tensor,
        hidden: Tensor,
        lengths: Tensor,
        queries: list[Tensor],
        query_mask: Tensor,
    ) -> Tensor:
        """Eq. 5: the new memory should read like the old memory together with the absorbed segment.

        Squared error, summed over the positions that count. Architecture `paper`: summed over layers and width, as in
        the text; `plus`: their mean. Gradient reaches f_abs only, through `new_memory`: the weights of the attention,
        queries and target are detached.

        Args:
            old_memory, new_memory: (B, L, m, D); hidden: (B, L, T, D), its last `lengths` (B) rows real.
            queries: L x (B, S*H, D), `abstraction_queries`.
            query_mask: (B, S) bool, the positions that count.
        """
        literal, slots, segment = self.config.architecture == "paper", old_memory.shape[2], hidden.shape[2]
        bias = torch.where(valid_primaries(slots, segment, lengths), 0.0, MASKED)[:, None, None]  # (B, 1, 1, m+T)
        total = new_memory.new_zeros(())
        for layer, block in enumerate(blocks_of(self.short_term) if literal else self.memory_blocks):
            sources = torch.cat([old_memory[:, layer], hidden[:, layer]], dim=1)
            difference = _frozen_read_difference(block, queries[layer], new_memory[:, layer], sources.detach(), bias)
            total = total + (difference.float().square().sum(-1) * query_mask).sum()
        return total if literal else total / (self.config.layers * self.config.width)

    def recall_loss(self, memory: Tensor, items: Tensor, table: Tensor) -> Tensor:
        """How badly memories name what they absorbed: the sum over their (N, K) items, the mean over layers.

        Cross-entropy over the rows of `table` (V, D). A memory (N, L, m, D) scores an item by its slots: the log of
        their summed exponentials, so that one slot is enough.
        """
        total = memory.new_zeros((), dtype=torch.float32)
        for slots in memory.unbind(1):
            scores = torch.logsumexp((slots @ table.T).float() * self.output_scale, dim=1)  # (N, V)
            total = total - torch.log_softmax(scores, dim=1).gather(1, items).sum()
        return total / self.config.layers
