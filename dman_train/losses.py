"""What a training step minimises, and what a lane carries from one segment to the next.

The likelihood (eq. 9) trains everything but f_abs; the abstraction loss (eq. 5) trains f_abs. Their gradients are
disjoint by construction, so one backward pass serves both optimisers. Items that a user has had are no negatives in
eq. 9 where the ranking will leave them out (`seen_items`): with a score that must be low for what the user has had and
high for what is like it, the two pull against each other. With `memory_training="joint"` the memory that a
segment reads stays attached to the last `backprop_segments` abstractions, and eq. 9 reaches f_abs as well. Eq. 5
is computed on every `abstraction_every`-th lane only.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_train.baselines.base import Baseline
from dman_train.config import TrainConfig
from dman_train.model import DMAN, Encoding

FULL_SOFTMAX_LIMIT = 50_000  # items; beyond it loss="auto" samples
SOFTMAX_BLOCK = 1 << 19  # scores that the full softmax holds at a time


@dataclass
class LaneState:
    """What each lane remembers between steps. N is `backprop_segments`. No tensor carries gradient."""

    context: Tensor  # (B, L, T, D) layer inputs of the previous segment, right-aligned
    context_lengths: Tensor  # (B) int64
    memory: Tensor  # (B, L, m, D) before the absorptions below
    initial: Tensor  # (B) bool: `memory` stands for the learned initial slots
    absorbed: Tensor  # (N, B, L, T, D) segments to absorb, oldest first, right-aligned
    absorbed_lengths: Tensor  # (N, B) int64; 0 where there is nothing to absorb

    @classmethod
    def empty(cls, model: DMAN, lanes: int, backprop_segments: int) -> LaneState:
        config = model.config
        shape = (lanes, config.layers, config.segment_length, config.width)
        device = model.items.device
        return cls(
            context=torch.zeros(shape, device=device),
            context_lengths=torch.zeros(lanes, dtype=torch.int64, device=device),
            memory=torch.zeros(lanes, config.layers, config.slots, config.width, device=device),
            initial=torch.ones(lanes, dtype=torch.bool, device=device),
            absorbed=torch.zeros(backprop_segments, *shape, device=device),
            absorbed_lengths=torch.zeros(backprop_segments, lanes, dtype=torch.int64, device=device),
        )

    def restarted(self, starts: Tensor) -> LaneState:
        """Forgets everything in the lanes where `starts` (B) is true."""
        return LaneState(
            context=self.context,
            context_lengths=self.context_lengths.masked_fill(starts, 0),
            memory=self.memory,
            initial=self.initial | starts,
            absorbed=self.absorbed,
            absorbed_lengths=self.absorbed_lengths.masked_fill(starts[None], 0),
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Losses:
    """Sums over positions, with the number of positions, so that ranks can be averaged exactly."""

    likelihood: Tensor  # eq. 9
    likelihood_count: Tensor
    abstraction: Tensor  # eq. 5, unweighted
    abstraction_count: Tensor


class _Memories(NamedTuple):
    """(B, L, m, D), where not said otherwise."""

    settled: Tensor  # after the oldest absorption in the window: where the next step starts from
    before: Tensor  # (B/n, L, m, D) before the newest absorption, on the lanes of eq. 5
    after: Tensor  # (B/n, L, m, D) after it, attached to f_abs
    read: Tensor  # what this segment attends to; attached to f_abs when eq. 9 trains it


class NextItemObjective(nn.Module):
    """The loss of eq. 9, whatever model gives the user embeddings.

    A subclass names in `inputs` the fields of a `Batch` that its `forward` takes, before a state and negatives.
    """

    inputs: tuple[str, ...]

    def __init__(self, model: DMAN | Baseline, config: TrainConfig, item_counts: Tensor) -> None:
        """`item_counts` (V): training events of each item, for the logQ correction."""
        super().__init__()
        self.model, self.config = model, config
        self.loss = config.loss
        if self.loss == "auto":
            self.loss = "full" if model.vocabulary <= FULL_SOFTMAX_LIMIT else "sampled"
        self.proposal: Tensor  # (V) where negatives of loss="sampled" are drawn from: flattened unigram
        if self.loss == "sampled":
            proposal = item_counts.double().clamp(min=1).pow(0.75)
            self.register_buffer("proposal", (proposal / proposal.sum()).float(), persistent=False)

    def _likelihood(
        self,
        users: Tensor,
        targets: Tensor,
        negatives: Tensor | None,
        items: Tensor,
        real: Tensor,
        before: list[Tensor] | None,
    ) -> Tensor:
        """Eq. 9 summed over P real positions.

        Args:
            users, targets: (P, D) user embeddings, (P).
            negatives: As `draw_negatives` gives them.
            items, real: (B, T) the inputs, and which of them are real: P in all.
            before: B x (H) what the users have had before these inputs; None when seen items are negatives as well.
        """
        table = self.model.item_table()
        if self.loss == "full":
            seen = None if before is None else Seen.of(before, items, real)
            return _FullSoftmax.apply(users, table, targets, seen)  # type: ignore[no-untyped-call]
        assert negatives is not None
        positive = (users * F.embedding(targets, table)).sum(-1)  # (P)
        drawn = negatives[real] if negatives.dim() == 3 else negatives[None]  # (P, n) or (1, n)
        left_out = drawn == targets[:, None]  # (P, n)
        if before is not None:
            left_out |= _had(negatives, before, items)[real]
        if self.loss == "sampled":
            logits = (users @ F.embedding(negatives, table).T).float() - torch.log(
                self.proposal[negatives] * len(negatives)
            )
            logits = logits.masked_fill(left_out, float("-inf"))
            # No correction here: the target is not drawn but always there. Corrected as well, the loss would no longer
            # tend to the full softmax where an item is expected more than once among the negatives.
            return (torch.logsumexp(torch.cat([positive[:, None], logits], 1), 1) - positive).sum()
        scores = torch.einsum("pd,pnd->pn", users, F.embedding(drawn, table)).float()
        return (F.softplus(-positive) + F.softplus(scores).masked_fill(left_out, 0.0).sum(-1)).sum()


class Objective(NextItemObjective):
    """One step over all lanes, as a module so that DistributedDataParallel can wrap it."""

    inputs = ("items", "targets", "lengths", "starts")
    model: DMAN

    def forward(
        self,
        items: Tensor,
        targets: Tensor,
        lengths: Tensor,
        starts: Tensor,
        state: LaneState,
        negatives: Tensor | None,
        before: list[Tensor] | None = None,
    ) -> tuple[Losses, LaneState]:
        """(B, T) items and targets, (B) lengths and starts. Losses and the lanes' state after the segment."""
        state = state.restarted(starts)
        memories = self._absorb(state)
        item_embeddings = self.model.embed(items)
        context_lengths = state.context_lengths if self.model.config.recurrent else torch.zeros_like(lengths)
        encoding = self.model.encode(item_embeddings, state.context, context_lengths, memories.read)
        real = torch.arange(items.shape[1], device=items.device) < lengths[:, None]  # (B, T)
        likelihood = self._likelihood(encoding.user_embedding[real], targets[real], negatives, items, real, before)
        reconstructed = (real & (state.absorbed_lengths[-1] > 0)[:, None])[self._reconstructed_lanes]
        abstraction = self._abstraction_loss(state, memories, encoding, reconstructed)
        losses = Losses(likelihood, real.sum(), abstraction, reconstructed.sum())
        return losses, _next_state(state, memories, encoding, lengths)

    def _absorb(self, state: LaneState) -> _Memories:
        model = self.model
        # f_abs sees the initial slots detached, so that eq. 5 cannot reach them; reading them directly does train them.
        first = torch.where(state.initial[:, None, None, None], model.initial_memory.detach(), state.memory)
        joint, lanes = self.config.memory_training == "joint", self._reconstructed_lanes
        with torch.set_grad_enabled(joint and torch.is_grad_enabled()):
            chain = self._chain(first, state.absorbed, state.absorbed_lengths)
        if joint:
            after = chain[-1][lanes]
        else:
            after = self._chain(first[lanes], state.absorbed[:, lanes], state.absorbed_lengths[:, lanes])[-1]
        untouched = (state.initial & (state.absorbed_lengths == 0).all(0))[:, None, None, None]
        read = torch.where(untouched, model.initial_memory, chain[-1])
        return _Memories(settled=chain[1].detach(), before=chain[-2][lanes].detach(), after=after, read=read)

    def _chain(self, memory: Tensor, absorbed: Tensor, absorbed_lengths: Tensor) -> list[Tensor]:
        """(B, L, m, D) `memory` and what it becomes by each of N absorptions; fields as in LaneState."""
        chain = [memory]
        for hidden, lengths in zip(absorbed, absorbed_lengths, strict=True):
            due = (lengths > 0)[:, None, None, None]
            chain.append(torch.where(due, self.model.abstract(chain[-1], hidden, lengths), chain[-1]))
        return chain

    @property
    def _reconstructed_lanes(self) -> slice:
        """The lanes that eq. 5 is computed on. Any lane gets any user in turn."""
        return slice(None, None, self.config.abstraction_every)

    def _abstraction_loss(self, state: LaneState, memories: _Memories, encoding: Encoding, positions: Tensor) -> Tensor:
        """Eq. 5 on its lanes, over the `positions` (B/n, T) that count."""
        if not self.model.abstraction_parameters():
            return encoding.user_embedding.new_zeros(())
        lanes = self._reconstructed_lanes
        return self.model.abstraction_loss(
            old_memory=memories.before,
            new_memory=memories.after,
            hidden=state.absorbed[-1, lanes],
            lengths=state.absorbed_lengths[-1, lanes],
            pulled=[queries[lanes] for queries in encoding.pulled],
            query_mask=positions,
        )


class WindowObjective(NextItemObjective):
    """One step over windows, for models without a state."""

    inputs = ("items", "targets", "lengths", "users")
    model: Baseline

    def forward(
        self,
        items: Tensor,
        targets: Tensor,
        lengths: Tensor,
        users: Tensor,
        state: None,
        negatives: Tensor | None,
        before: list[Tensor] | None = None,
    ) -> tuple[Losses, None]:
        """(B, W) items and targets, (B) lengths and users. The penalty of a model stands where eq. 5 stands."""
        real = torch.arange(items.shape[1], device=items.device) < lengths[:, None]  # (B, W)
        embeddings = self.model.encode(items, users)
        likelihood = self._likelihood(embeddings[real], targets[real], negatives, items, real, before)
        penalty = self.model.penalty()
        return Losses(likelihood, real.sum(), penalty * real.sum(), real.sum()), state


class Seen(NamedTuple):
    """What the users of P positions have had up to and with each; the positions of a piece are neighbours."""

    before: list[Tensor]  # B x (H) items from before the piece
    rows: list[int]  # (B+1) the positions of piece b begin at rows[b]
    positions: Tensor  # (M) int64, ascending: at this position,
    items: Tensor  # (M) int64 ... this item of the piece itself has been had
    borders: list[int]  # (P+1) the pairs of position p begin at borders[p]

    @classmethod
    def of(cls, before: list[Tensor], items: Tensor, real: Tensor) -> Seen:
        """`items`, `real` (B, T), `before` B x (H)."""
        later, earlier = torch.tril_indices(items.shape[1], items.shape[1], device=items.device)  # (T (T+1) / 2) each
        chosen = real[:, later]
        position = (real.flatten().cumsum(0) - 1).view_as(items)[:, later][chosen]
        counts = (torch.arange(1, items.shape[1] + 1, device=items.device) * real)[real]  # pairs of each position
        rows, borders = ([0, *x.cumsum(0).tolist()] for x in (real.sum(1), counts))
        return cls([had.long() for had in before], rows, position, items[:, earlier][chosen], borders)

    def leave_out(self, scores: Tensor, first: int) -> None:
        """Sets (N, V) scores of the positions from `first` on to minus infinity where the item has been had."""
        last, vocabulary = first + len(scores), scores.shape[1]
        for piece in range(bisect_right(self.rows, first) - 1, bisect_left(self.rows, last)):
            start, end = max(self.rows[piece], first), self.rows[piece + 1]
            scores[start - first : end - first].index_fill_(1, self.before[piece], float("-inf"))
        pairs = slice(self.borders[first], self.borders[last])
        index = (self.positions[pairs] - first) * vocabulary + self.items[pairs]
        scores.view(-1).index_fill_(0, index, float("-inf"))


def _had(negatives: Tensor, before: list[Tensor], items: Tensor) -> Tensor:
    """(B, T, n) bool: which of (n) or (B, T, n) negatives the user has had up to and with each of the (B, T) items."""
    if negatives.dim() == 1:
        within = (items[:, :, None] == negatives).cumsum(1) > 0
        return within | torch.stack([torch.isin(negatives, had) for had in before])[:, None]
    earlier = torch.ones(items.shape[1], items.shape[1], dtype=torch.bool, device=items.device).tril()
    within = ((negatives[..., None] == items[:, None, None]) & earlier[:, None]).any(-1)
    return within | torch.stack([torch.isin(drawn, had) for drawn, had in zip(negatives, before, strict=True)])


class _FullSoftmax(torch.autograd.Function):
    """F.cross_entropy(users @ table.T, targets, reduction="sum"), a block of positions at a time.

    What `seen` names for a position has no part in its softmax, unless it is the target.
    The scores of all positions, 35 MB at 2,560 positions and 3,416 items, never exist at once: a block stays in the
    cache of a CPU, and its gradients are taken on the way. Under autocast the products are in its precision, the
    softmax and all sums in float32.
    """

    @staticmethod
    def forward(ctx: Any, users: Tensor, table: Tensor, targets: Tensor, seen: Seen | None) -> Tensor:
        """(P, D) users, (V, D) table, (P) targets -> the sum over P."""
        device = users.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else table.dtype
        with torch.autocast(device, enabled=False):
            total, gradients = _full_softmax(users.to(dtype), table.to(dtype), targets, seen)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_users, by_table = ctx.saved_tensors
        return by_users * gradient, by_table * gradient, None, None


def _full_softmax(
    users: Tensor, table: Tensor, targets: Tensor, seen: Seen | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The loss and its gradients by users and table, in float32."""
    total, rows = users.new_zeros((), dtype=torch.float32), max(1, SOFTMAX_BLOCK // table.shape[0])
    by_users, by_table = [], torch.zeros_like(table, dtype=torch.float32)
    for first in range(0, len(users), rows):
        block, chosen = users[first : first + rows], targets[first : first + rows, None]
        scores = (block @ table.T).float()
        positive = scores.gather(1, chosen)
        if seen is not None:
            seen.leave_out(scores, first)
            scores.scatter_(1, chosen, positive)
        highest = scores.amax(1, keepdim=True)
        weights = scores.sub_(highest).exp_()
        normaliser = weights.sum(1, keepdim=True)
        total += (normaliser.log() + highest - positive).sum()
        weights /= normaliser
        weights.scatter_add_(1, chosen, torch.full_like(positive, -1))
        by_scores = weights.to(table.dtype)  # d loss / d scores
        by_users.append((by_scores @ table).float())
        by_table += by_scores.T @ block
    return total, (torch.cat(by_users), by_table)


def _next_state(state: LaneState, memories: _Memories, encoding: Encoding, lengths: Tensor) -> LaneState:
    """Shifts H_n into the context and H_{n-1} into the segments to absorb."""
    newest = state.context[None]
    return LaneState(
        context=_right_aligned(encoding.hidden.detach(), lengths),
        context_lengths=lengths,
        memory=memories.settled,
        initial=state.initial & (state.absorbed_lengths[0] == 0),
        absorbed=torch.cat([state.absorbed[1:], newest]) if len(state.absorbed) > 1 else newest,
        absorbed_lengths=torch.cat([state.absorbed_lengths[1:], state.context_lengths[None]]),
    )


def draw_negatives(objective: NextItemObjective, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    """Negatives of one step: (n) for loss="sampled", `shape` + (n) for loss="negatives", None for the full softmax."""
    count, vocabulary = objective.config.negatives, objective.model.vocabulary
    if objective.loss == "full":
        return None
    if objective.loss == "sampled":
        return torch.multinomial(objective.proposal.cpu(), count, replacement=True, generator=generator)
    return torch.randint(vocabulary, (*shape, count), generator=generator)


def _right_aligned(hidden: Tensor, lengths: Tensor) -> Tensor:
    """(B, L, T, D) with `lengths` real rows on the left -> the same rows on the right. In place."""
    segment = hidden.shape[2]
    partial = (lengths < segment).nonzero().squeeze(1)  # few: the first and the last segment of a user
    source = torch.arange(segment, device=hidden.device) - (segment - lengths[partial, None])  # (P, T)
    index = source.clamp(min=0)[:, None, :, None].expand(-1, *hidden.shape[1:])
    hidden[partial] = hidden[partial].gather(2, index) * (source >= 0)[:, None, :, None]
    return hidden
