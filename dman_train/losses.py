"""Eq. 9: the loss of the next item, in four forms. Knows no model: it gets user embeddings and an item table.

- full: softmax over all items,
- sampled: softmax over negatives shared by the batch, drawn from the flattened unigram, with logQ correction,
- negatives-softmax: eq. 9 with a sum over the target and a few uniform negatives per position,
- negatives: the binary classification that the paper's text also names, with the same negatives.

Symbols: B pieces of histories, T positions each, P real positions among them, D width, V items, n negatives.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_train.config import TrainConfig

FULL_SOFTMAX_LIMIT = 50_000  # items; beyond it loss="auto" samples
SOFTMAX_BLOCK = 1 << 19  # scores that the full softmax holds at a time: they stay in the cache of a CPU
CUDA_SOFTMAX_BLOCK = 1 << 26  # on a GPU many small kernels cost more than memory
# (V, D) item embeddings, or what gives those (..., D) of (...) items, for a step that must not touch all.
Table = Tensor | Callable[[Tensor], Tensor]


def rows_of(table: Table, items: Tensor) -> Tensor:
    """(..., D) the embeddings of (...) items."""
    return F.embedding(items, table) if isinstance(table, Tensor) else table(items)


def kind_of_loss(choice: str, items: int) -> str:
    """What `TrainConfig.loss` means for a catalogue of so many items."""
    return ("full" if items <= FULL_SOFTMAX_LIMIT else "sampled") if choice == "auto" else choice


@dataclass(frozen=True)
class Losses:
    """Sums over positions with the numbers of positions, so that processes can be averaged exactly."""

    likelihood: Tensor  # eq. 9
    likelihood_count: Tensor
    abstraction: Tensor  # eq. 5, unweighted; for a baseline its penalty
    abstraction_count: Tensor


class NextItemLoss(nn.Module):
    """Eq. 9 as `TrainConfig.loss` has it.

    With `seen_before`, items that the user has already seen are no negatives. The ranking leaves them out, and as
    negatives they would push down the scores of the items that are similar to them.
    """

    def __init__(self, config: TrainConfig, item_counts: Tensor) -> None:
        """`item_counts` (V): training events of each item."""
        super().__init__()
        self.vocabulary, self.negatives = len(item_counts), config.negatives
        self.kind = kind_of_loss(config.loss, self.vocabulary)
        self.proposal: Tensor  # (V) probabilities of the negatives of loss="sampled"
        if self.kind == "sampled":
            proposal = item_counts.double().clamp(min=1).pow(0.75)
            self.register_buffer("proposal", (proposal / proposal.sum()).float(), persistent=False)

    def draw_negatives(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Negatives of one step: (n) if sampled, None for the full softmax, else `shape` + (n)."""
        if self.kind == "full":
            return None
        if self.kind == "sampled":
            return torch.multinomial(self.proposal.cpu(), self.negatives, replacement=True, generator=generator)
        return torch.randint(self.vocabulary, (*shape, self.negatives), generator=generator)

    def forward(
        self,
        users: Tensor,
        table: Table,
        targets: Tensor,
        *,
        negatives: Tensor | None,
        items: Tensor,
        real: Tensor,
        seen_before: list[Tensor] | None,
        added: Added | None = None,
    ) -> Tensor:
        """The sum over P real positions.

        Args:
            users, table, targets: (P, D) user embeddings, (V, D) item embeddings, (P) item indices. The full softmax
                needs them as a tensor.
            negatives: As `draw_negatives` returns them.
            items, real: (B, T) the inputs, and which of them are real: P in all.
            seen_before: B x (H) int64 items that the users saw before these inputs; None: seen items are negatives too.
            added: What is added to the scores of some items.
        """
        if self.kind == "full":
            seen = None if seen_before is None else SeenItems.of(seen_before, items, real)
            extra = (None, None) if added is None else added
            return _FullSoftmax.apply(users, table, targets, seen, *extra)  # type: ignore[no-untyped-call]
        assert negatives is not None
        positive = (users * rows_of(table, targets)).sum(-1)  # (P)
        drawn = negatives[real] if negatives.dim() == 3 else negatives[None]  # (P, n) or (1, n)
        left_out = drawn == targets[:, None]  # (P, n)
        if seen_before is not None:
            left_out |= _seen_at(negatives, seen_before, items, self.vocabulary)[real]
        if added is not None:
            positive = positive + _added_at(added, targets[:, None])[:, 0]
        if self.kind == "sampled":
            return self._sampled_softmax(users, table, positive, negatives, left_out, added)
        scores = torch.einsum("pd,pnd->pn", users, rows_of(table, drawn)).float()
        if added is not None:
            scores = scores + _added_at(added, drawn)
        scores = scores.masked_fill(left_out, float("-inf"))
        if self.kind == "negatives-softmax":
            return (torch.logsumexp(torch.cat([positive[:, None], scores], 1), 1) - positive).sum()
        return (F.softplus(-positive) + F.softplus(scores).sum(-1)).sum()

    def _sampled_softmax(
        self,
        users: Tensor,
        table: Table,
        positive: Tensor,
        negatives: Tensor,
        left_out: Tensor,
        added: Added | None,
    ) -> Tensor:
        logits = (users @ rows_of(table, negatives).T).float() - torch.log(self.proposal[negatives] * len(negatives))
        if added is not None:
            logits = logits + _added_to_shared(added, negatives)
        logits = logits.masked_fill(left_out, float("-inf"))
        # The target gets no correction, because it is not drawn but always there. With one, the loss would not tend to
        # the full softmax for items that are expected more than once among the negatives.
        return (torch.logsumexp(torch.cat([positive[:, None], logits], 1), 1) - positive).sum()


class Added(NamedTuple):
    """What is added to the scores of some items of P positions."""

    scores: Tensor  # (P, K)
    items: Tensor  # (P, K) int64; one may come up several times


def _added_at(added: Added, items: Tensor) -> Tensor:
    """(P, n) items -> (P, n) what is added to their scores."""
    same = items[:, :, None] == added.items[:, None]  # (P, n, K)
    return torch.einsum("pnk,pk->pn", same.float(), added.scores.float())


def _added_to_shared(added: Added, items: Tensor) -> Tensor:
    """(n) items that all positions share -> (P, n) what is added to their scores."""
    distinct, place = torch.unique(items, return_inverse=True)  # ascending
    at = torch.searchsorted(distinct, added.items.contiguous()).clamp(max=len(distinct) - 1)  # (P, K)
    scores = torch.where(distinct[at] == added.items, added.scores.float(), 0.0)
    return scores.new_zeros(len(scores), len(distinct)).scatter_add(1, at, scores)[:, place]


class SeenItems(NamedTuple):
    """What the users of P positions have seen up to and including each position. Positions of a piece are adjacent."""

    earlier: list[Tensor]  # B x (H) items from before the piece
    rows: list[int]  # (B+1) the positions of piece b begin at rows[b]
    positions: Tensor  # (M) int64, ascending: at this position,
    items: Tensor  # (M) int64 ... this item of the piece itself has been seen
    borders: list[int]  # (P+1) the pairs of position p begin at borders[p]

    @classmethod
    def of(cls, seen_before: list[Tensor], items: Tensor, real: Tensor) -> SeenItems:
        """`items`, `real` (B, T), `seen_before` B x (H)."""
        later, earlier = torch.tril_indices(items.shape[1], items.shape[1], device=items.device)  # (T (T+1) / 2) each
        chosen = real[:, later]
        position = (real.flatten().cumsum(0) - 1).view_as(items)[:, later][chosen]
        counts = (torch.arange(1, items.shape[1] + 1, device=items.device) * real)[real]  # pairs of each position
        rows, borders = ([0, *x.cumsum(0).tolist()] for x in (real.sum(1), counts))
        return cls(seen_before, rows, position, items[:, earlier][chosen], borders)

    def leave_out(self, scores: Tensor, first: int) -> None:
        """Sets (N, V) scores of the positions from `first` on to minus infinity for the items seen at each."""
        (self._leave_out_earlier_at_once if scores.is_cuda else self._leave_out_earlier)(scores, first)
        vocabulary, pairs = scores.shape[1], slice(self.borders[first], self.borders[first + len(scores)])
        index = (self.positions[pairs] - first) * vocabulary + self.items[pairs]
        scores.view(-1).index_fill_(0, index, float("-inf"))

    def _leave_out_earlier(self, scores: Tensor, first: int) -> None:
        """The items from before the pieces, piece by piece."""
        last = first + len(scores)
        for piece in range(bisect_right(self.rows, first) - 1, bisect_left(self.rows, last)):
            start, end = max(self.rows[piece], first), self.rows[piece + 1]
            scores[start - first : end - first].index_fill_(1, self.earlier[piece], float("-inf"))

    def _leave_out_earlier_at_once(self, scores: Tensor, first: int) -> None:
        """The same in a few kernels, with a mask of (B, V) bytes."""
        seen = torch.zeros(len(self.earlier), scores.shape[1], dtype=torch.bool, device=scores.device)
        seen[_places(self.earlier), torch.cat(self.earlier)] = True
        pieces = torch.arange(len(self.earlier)).repeat_interleave(torch.tensor(self.rows).diff())  # (P)
        scores.masked_fill_(seen[pieces[first : first + len(scores)].to(scores.device)], float("-inf"))


def _seen_at(negatives: Tensor, seen_before: list[Tensor], items: Tensor, vocabulary: int) -> Tensor:
    """(B, T, n) bool: which of (n) or (B, T, n) negatives the user has seen up to and including each (B, T) item."""
    if negatives.dim() == 1:
        within = (items[:, :, None] == negatives).cumsum(1) > 0
        return within | _seen_earlier(negatives.expand(len(items), 1, -1), seen_before, vocabulary)
    earlier = torch.ones(items.shape[1], items.shape[1], dtype=torch.bool, device=items.device).tril()
    within = ((negatives[..., None] == items[:, None, None]) & earlier[:, None]).any(-1)
    return within | _seen_earlier(negatives, seen_before, vocabulary)


def _seen_earlier(negatives: Tensor, seen_before: list[Tensor], vocabulary: int) -> Tensor:
    """(B, T, n) bool: which of the negatives are in the list of their piece."""
    # One search over all pieces: a search for each takes a GPU more time to start than to do.
    keys = (_places(seen_before) * vocabulary + torch.cat(seen_before)).sort().values
    if not len(keys):
        return torch.zeros_like(negatives, dtype=torch.bool)
    wanted = torch.arange(len(negatives), device=negatives.device)[:, None, None] * vocabulary + negatives
    return keys[torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)] == wanted


def _places(lists: list[Tensor]) -> Tensor:
    """(S) int64: for each of the S items of all lists, which list it is in. On their device."""
    lengths = torch.tensor([len(items) for items in lists])
    return torch.arange(len(lists)).repeat_interleave(lengths).to(lists[0].device)


class _FullSoftmax(torch.autograd.Function):
    """F.cross_entropy(users @ table.T, targets, reduction="sum"), one block of positions at a time.

    The items that `seen` names for a position have no part in its softmax, except the target.
    On a CPU the scores of all positions (35 MB for 2,560 positions and 3,416 items) never exist at once: a block stays
    in its cache, and its gradients are computed with it. Under autocast the products have its precision, the
    softmax and all sums float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        table: Tensor,
        targets: Tensor,
        seen: SeenItems | None,
        added: Tensor | None,
        added_items: Tensor | None,
    ) -> Tensor:
        """(P, D) users, (V, D) table, (P) targets, (P, K) `Added` -> the sum over P."""
        device = users.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else table.dtype
        with torch.autocast(device, enabled=False):
            extra = None if added is None or added_items is None else Added(added.float(), added_items)
            total, gradients = _full_softmax(users.to(dtype), table.to(dtype), targets, seen, extra)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_users, by_table, *by_added = ctx.saved_tensors
        extra = by_added[0] * gradient if by_added else None
        return by_users * gradient, by_table * gradient, None, None, extra, None


def _full_softmax(
    users: Tensor, table: Tensor, targets: Tensor, seen: SeenItems | None, added: Added | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and its gradients by users, table and what was added, in float32."""
    limit = CUDA_SOFTMAX_BLOCK if users.is_cuda else SOFTMAX_BLOCK
    total, rows = users.new_zeros((), dtype=torch.float32), max(1, limit // table.shape[0])
    by_users, by_added, by_table = [], [], torch.zeros_like(table, dtype=torch.float32)
    for first in range(0, len(users), rows):
        block, chosen = users[first : first + rows], targets[first : first + rows, None]
        scores = (block @ table.T).float()
        extra = None if added is None else Added(*(x[first : first + rows] for x in added))
        if extra is not None:
            scores.scatter_add_(1, extra.items, extra.scores)
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
        if extra is not None:
            by_added.append(weights.gather(1, extra.items))
        by_scores = weights.to(table.dtype)  # d loss / d scores
        by_users.append((by_scores @ table).float())
        by_table += by_scores.T @ block
    return total, (torch.cat(by_users), by_table, *([torch.cat(by_added)] if by_added else []))
