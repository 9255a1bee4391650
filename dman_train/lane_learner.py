"""DMAN in training: one step over all lanes, and what a lane carries from one segment to the next.

The likelihood (eq. 9) trains everything but f_abs; the abstraction loss trains f_abs. No weight gets a gradient from
both, so one backward pass serves both optimisers. With `memory_training="joint"` the memory that a segment reads stays
attached to the last `backprop_segments` abstractions, and eq. 9 reaches f_abs too. The abstraction loss is computed on
every `abstraction_every`-th lane only.

It has two forms. `reads` is eq. 5: the memory should be read as before it absorbed a segment. `recall`: the memory
should name items that it stands for, however long ago they were absorbed. Eq. 9 and eq. 5 reach no further back than a
few segments, so that nothing else teaches f_abs to keep what is asked for much later.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dman_runtime.model.times import NO_GAP
from dman_train import distributed
from dman_train.checkpoint import like, within
from dman_train.config import ModelConfig, TrainConfig
from dman_train.data import TrainingData, longest_gap
from dman_train.lanes import Batch, Lanes
from dman_train.learner import UNKNOWN_TIME, Learner, StepInputs
from dman_train.losses import Added, Losses, Table, rows_of
from dman_train.model import DMAN, Encoding
from dman_train.returns import Sketch, follow
from dman_train.rounding import as_kept
from dman_train.timing import Timing, gap_buckets, timing_of

RECALLED_ITEMS = 20  # of a lane, in each step


@dataclass
class LaneState:
    """What each lane carries between steps. N is `backprop_segments`. No tensor carries gradient."""

    context: Tensor  # (B, L, T, D) layer inputs of the previous segment, right-aligned
    context_lengths: Tensor  # (B) int64
    context_times: Tensor  # (B, T) int64 seconds, right-aligned
    memory: Tensor  # (B, L, m, D) before the absorptions below
    initial: Tensor  # (B) bool: use the learned initial slots in place of `memory`
    absorbed: Tensor  # (N, B, L, T, D) segments to absorb, oldest first, right-aligned
    absorbed_lengths: Tensor  # (N, B) int64; 0 where there is nothing to absorb
    timeless: Tensor  # (B) bool: the user's events have no times here
    sketch_items: Tensor  # (B, R) int64, like the next ones as in `returns.Sketch`
    sketch_counts: Tensor  # (B, R, H)
    sketch_ages: Tensor  # (B, R) int64
    sketch_times: Tensor  # (B, R) int64

    @classmethod
    def empty(cls, model: DMAN, lanes: int, backprop_segments: int) -> LaneState:
        config = model.config
        shape = (lanes, config.layers, config.segment_length, config.width)
        device = model.items.device
        return cls(
            context=torch.zeros(shape, device=device),
            context_lengths=torch.zeros(lanes, dtype=torch.int64, device=device),
            context_times=torch.zeros(lanes, config.segment_length, dtype=torch.int64, device=device),
            memory=torch.zeros(lanes, config.layers, config.slots, config.width, device=device),
            initial=torch.ones(lanes, dtype=torch.bool, device=device),
            absorbed=torch.zeros(backprop_segments, *shape, device=device),
            absorbed_lengths=torch.zeros(backprop_segments, lanes, dtype=torch.int64, device=device),
            timeless=torch.zeros(lanes, dtype=torch.bool, device=device),
            **_fields_of(Sketch.empty(lanes, config.sketch_items, device)),
        )

    def restarted(self, starts: Tensor) -> LaneState:
        """Forgets everything in the lanes where `starts` (B) is true."""
        return LaneState(
            context=self.context,
            context_lengths=self.context_lengths.masked_fill(starts, 0),
            context_times=self.context_times,
            memory=self.memory,
            initial=self.initial | starts,
            absorbed=self.absorbed,
            absorbed_lengths=self.absorbed_lengths.masked_fill(starts[None], 0),
            timeless=self.timeless & ~starts,
            **_fields_of(self.sketch.restarted(starts)),
        )

    @property
    def sketch(self) -> Sketch:
        return Sketch(*(getattr(self, f"sketch_{name}") for name in Sketch._fields))

    def state_dict(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def _fields_of(sketch: Sketch) -> dict[str, Tensor]:
    return {f"sketch_{name}": tensor for name, tensor in sketch._asdict().items()}


class _Judged(NamedTuple):
    """The absorption that eq. 5 judges in a step, on every n-th lane."""

    old: Tensor  # (B/n, L, m, D) the memory before it
    new: Tensor  # (B/n, L, m, D) after it, attached to f_abs; `old` if f_abs has no parameters
    hidden: Tensor  # (B/n, L, T, D) the absorbed segment, right-aligned
    lengths: Tensor  # (B/n) its real rows; 0 where nothing is absorbed


class _Memories(NamedTuple):
    """Memories (B, L, m, D) at a step."""

    window_start: Tensor  # after the oldest absorption in the window: the next step starts from it
    read: Tensor  # what this segment attends to; attached to f_abs if eq. 9 trains it
    judged: _Judged


class LaneLearner(Learner):
    """Trains a DMAN over endless lanes. Raises ConfigError if the processes cannot share the lanes."""

    model: DMAN

    def __init__(self, model: DMAN, config: TrainConfig, data: TrainingData) -> None:
        part = distributed.share_of_lanes(config.lanes)
        schedule = Lanes(
            data.items,
            data.offsets,
            data.times,
            segment_length=model.config.segment_length,
            lanes=config.lanes,
            vary_first=config.random_first_segment,
            seed=config.seed,
        )
        super().__init__(model, config, data, schedule, part)
        if model.config.time == "request":
            model.known_gap.fill_(longest_gap(data))
        self.state = LaneState.empty(model, part.stop - part.start, config.backprop_segments)

    def inputs(self, batch: Batch) -> StepInputs:
        found = super().inputs(batch)
        if self.config.abstraction_loss == "reads":
            return found
        shares = torch.rand(len(batch.users), RECALLED_ITEMS, generator=self.generator, dtype=torch.float64)
        items = self._absorbed_items(batch.pieces(self._part), shares[self._part].numpy())
        return found._replace(absorbed_items=torch.from_numpy(items).to(self.device))

    def _absorbed_items(self, batch: Batch, shares: np.ndarray) -> np.ndarray:
        """(B, K) items at these shares of the events that are more than a segment before the pieces; -1 for none.

        They are absorbed, whatever the context is.
        """
        begin = self._offsets[batch.users]
        count = (batch.first_events - begin - self.model.config.segment_length).clip(min=0)[:, None]
        items = self._items[begin[:, None] + (shares * count).astype(np.int64)].astype(np.int64)
        return np.where(count > 0, items, -1)

    def forward(self, inputs: StepInputs) -> Losses:
        losses, self.state = self.step(inputs, self.state)
        return losses

    def step(self, inputs: StepInputs, state: LaneState) -> tuple[Losses, LaneState]:
        """The losses of one segment in each lane, and the lanes' state after it."""
        state, lengths, real = state.restarted(inputs.starts), inputs.lengths, inputs.real
        memories = self._absorb(state)
        inputs, state = self._without_times(inputs, state)
        requests = self._requests(inputs)
        gaps, timing = self._timing(inputs, state, requests)
        item_embeddings = self.model.embed(inputs.items, gaps)
        context_lengths = state.context_lengths if self.model.config.recurrent else torch.zeros_like(lengths)
        encoding = self.model.encode(item_embeddings, state.context, context_lengths, memories.read, timing=timing)
        table = self.model.table_in_training()
        added, sketch = self._returns(inputs, state, requests, encoding, table)
        likelihood = self.likelihood(encoding.user_embedding, table, inputs, added)
        if inputs.absorbed_items is None:
            abstraction = self._reads_loss(memories.judged, encoding, real)
        else:
            abstraction = self._recall_loss(memories.judged, inputs.absorbed_items, table)
        losses = Losses(likelihood, real.sum(), *abstraction)
        following = _next_state(state, memories, encoding, inputs, self.model.config)
        return losses, replace(following, **_fields_of(sketch))

    def _returns(
        self, inputs: StepInputs, state: LaneState, requests: Tensor | None, encoding: Encoding, table: Table
    ) -> tuple[Added | None, Sketch]:
        """What is added to the scores for items that users come back to, and the sketches after the segment."""
        if self.model.config.returns != "on":
            return None, state.sketch
        with torch.no_grad():
            returns, sketch = follow(state.sketch, inputs.items, inputs.lengths, inputs.times)
        return self._added(returns, encoding.user_embedding, table, inputs, requests), sketch

    def _without_times(self, inputs: StepInputs, state: LaneState) -> tuple[StepInputs, LaneState]:
        """In training, a share of the users have no times at all, so that a model learns to do without."""
        if not (self.training and self.model.config.sees_times):
            return inputs, state
        drawn = torch.rand(len(inputs.starts), device=inputs.starts.device) < self.config.times_dropout
        timeless = torch.where(inputs.starts, drawn, state.timeless)
        inputs = inputs._replace(
            times=inputs.times.masked_fill(timeless[:, None], 0),
            next_times=inputs.next_times.masked_fill(timeless[:, None], UNKNOWN_TIME),
            since_last=inputs.since_last.masked_fill(timeless[:, None], NO_GAP),
        )
        return inputs, replace(state, timeless=timeless)

    def _requests(self, inputs: StepInputs) -> Tensor | None:
        requests = super()._requests(inputs)
        return None if requests is None else torch.minimum(requests, inputs.times + self.model.known_gap)

    def _timing(
        self, inputs: StepInputs, state: LaneState, requests: Tensor | None
    ) -> tuple[Tensor | None, Timing | None]:
        """(B, T) buckets of the gaps between events, and what the positions know of times."""
        if not self.model.config.sees_times:
            return None, None
        keys = torch.cat([state.context_times, inputs.times], dim=1)
        return gap_buckets(inputs.since_last), timing_of(inputs.times, keys, requests)

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """All but f_abs, and f_abs if it has parameters."""
        f_abs = self.model.abstraction_parameters()
        chosen = {id(parameter) for parameter in f_abs}
        groups = [([p for p in self.model.parameters() if id(p) not in chosen], self.config.learning_rate)]
        if f_abs:
            groups.append((f_abs, self.config.abstraction_learning_rate))
        return groups

    def carried_state(self) -> dict[str, Tensor]:
        return self.state.state_dict()

    def load_carried_state(self, state: dict[str, Tensor] | None) -> None:
        """Raises ValueError for a state of other lanes or another model."""
        segment, saved, rounded = self.model.config.segment_length, state or {}, self.config.precision == "bfloat16"
        empty = LaneState.empty(self.model, len(self.state.initial), self.config.backprop_segments).state_dict()
        found = {name: like(saved.get(name), tensor, name, or_bfloat16=rounded) for name, tensor in empty.items()}
        for name in ("context_lengths", "absorbed_lengths"):
            within(found[name], 0, segment, name)
        self.state = LaneState(**{name: tensor.to(self.device) for name, tensor in found.items()})

    def _absorb(self, state: LaneState) -> _Memories:
        model = self.model
        # f_abs sees the initial slots detached, so that eq. 5 cannot reach them; reading them directly does train them.
        first = torch.where(state.initial[:, None, None, None], model.initial_memory.detach(), state.memory)
        joint = self.config.memory_training == "joint"
        with torch.set_grad_enabled(joint and torch.is_grad_enabled()):
            chain = self._chain(first, state.absorbed, state.absorbed_lengths)
        untouched = (state.initial & (state.absorbed_lengths == 0).all(0))[:, None, None, None]
        read = torch.where(untouched, model.initial_memory, chain[-1])
        return _Memories(window_start=chain[1].detach(), read=read, judged=self._judged(state, chain, joint))

    def _judged(self, state: LaneState, chain: list[Tensor], joint: bool) -> _Judged:
        """Architecture `paper`: the absorption of H_{n-1}, which follows this segment S_n. Else the one before it.

        The text judges H_{n-1} by the hidden states of S_n. The queries that read a memory are those of the segment
        after its absorption. Without recurrence, H_{n-1} is absorbed before S_n, so that both are the same.
        """
        lanes, config = self._abstraction_lanes, self.model.config
        if config.architecture == "paper" and config.recurrent:
            old, hidden, lengths = chain[-1], state.context, state.context_lengths
        else:
            old, hidden, lengths = chain[-2], state.absorbed[-1], state.absorbed_lengths[-1]
            if joint:
                return _Judged(old[lanes].detach(), chain[-1][lanes], hidden[lanes], lengths[lanes])
        old, hidden, lengths = old[lanes].detach(), hidden[lanes], lengths[lanes]
        if not self.model.abstraction_parameters():  # eq. 5 has nothing to train
            return _Judged(old, old, hidden, lengths)
        return _Judged(old, self._chain(old, hidden[None], lengths[None])[-1], hidden, lengths)

    def _chain(self, memory: Tensor, absorbed: Tensor, absorbed_lengths: Tensor) -> list[Tensor]:
        """(B, L, m, D) `memory`, and the memory after each of N absorptions; fields as in LaneState."""
        chain = [memory]
        for hidden, lengths in zip(absorbed, absorbed_lengths, strict=True):
            closes = (lengths > 0)[:, None, None, None]
            chain.append(torch.where(closes, self.model.abstract(chain[-1], hidden, lengths), chain[-1]))
        return chain

    @property
    def _abstraction_lanes(self) -> slice:
        """The lanes that the abstraction loss is computed on. Every lane gets every user in turn."""
        return slice(None, None, self.config.abstraction_every)

    def _reads_loss(self, judged: _Judged, encoding: Encoding, real: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 5 on its lanes, and over how many of the `real` (B, T) positions: those after an absorption."""
        lanes = self._abstraction_lanes
        positions = real[lanes] & (judged.lengths > 0)[:, None]
        if not self.model.abstraction_parameters():
            return encoding.user_embedding.new_zeros(()), positions.sum()
        loss = self.model.abstraction_loss(
            old_memory=judged.old,
            new_memory=judged.new,
            hidden=judged.hidden,
            lengths=judged.lengths,
            queries=[queries[lanes] for queries in self.model.abstraction_queries(encoding)],
            query_mask=positions,
        )
        return loss, positions.sum()

    def _recall_loss(self, judged: _Judged, absorbed_items: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """Of the lanes in which something was absorbed: the loss of their (B, K) items, and how many these are."""
        items = absorbed_items[self._abstraction_lanes]
        if not self.model.abstraction_parameters():
            return self.model.items.new_zeros(()), items.new_zeros(())
        known = (items[:, 0] >= 0) & (judged.lengths > 0)
        items, count = items[known], known.sum() * items.shape[1]
        if isinstance(table, Tensor) and self.loss.kind == "full":
            named = table.detach()
        else:  # a large catalogue: the items of this step stand for it
            drawn, items = torch.unique(items, return_inverse=True)
            named = rows_of(table, drawn).detach()
        return self.model.recall_loss(judged.new[known], items, named), count


def _next_state(
    state: LaneState, memories: _Memories, encoding: Encoding, inputs: StepInputs, config: ModelConfig
) -> LaneState:
    """H_n becomes the context, and H_{n-1} is to be absorbed; without recurrence H_n, as no query reads it later."""
    lengths = inputs.lengths
    context = _right_aligned(encoding.hidden.detach(), lengths)
    newest, newest_lengths = context, lengths
    if config.recurrent:
        context, newest, newest_lengths = as_kept(context, config), state.context, state.context_lengths
    return LaneState(
        context=context,
        context_lengths=lengths,
        context_times=_times_right_aligned(inputs.times, lengths),
        timeless=state.timeless,
        **_fields_of(state.sketch),
        memory=memories.window_start,
        initial=state.initial & (state.absorbed_lengths[0] == 0),
        absorbed=torch.cat([state.absorbed[1:], newest[None]]) if len(state.absorbed) > 1 else newest[None],
        absorbed_lengths=torch.cat([state.absorbed_lengths[1:], newest_lengths[None]]),
    )


def _times_right_aligned(times: Tensor, lengths: Tensor) -> Tensor:
    """(B, T) with `lengths` real values on the left -> the same values on the right."""
    segment = times.shape[1]
    source = torch.arange(segment, device=times.device) - (segment - lengths[:, None])
    return times.gather(1, source.clamp(min=0))


def _right_aligned(hidden: Tensor, lengths: Tensor) -> Tensor:
    """(B, L, T, D) with `lengths` real rows on the left -> the same rows on the right. In place."""
    segment = hidden.shape[2]
    partial = (lengths < segment).nonzero().squeeze(1)  # few: the first and the last segment of a user
    source = torch.arange(segment, device=hidden.device) - (segment - lengths[partial, None])  # (P, T)
    index = source.clamp(min=0)[:, None, :, None].expand(-1, *hidden.shape[1:])
    hidden[partial] = hidden[partial].gather(2, index) * (source >= 0)[:, None, :, None]
    return hidden
