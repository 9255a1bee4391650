"""Eq. 9 in its four forms, each against a hand computation, and the items that a user has already seen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dman_train.config import TrainConfig
from dman_train.losses import FULL_SOFTMAX_LIMIT, Added, NextItemLoss, SeenItems, _FullSoftmax, _seen_at


def loss_of(kind: str, *, counts: Tensor | None = None, negatives: int = 1) -> NextItemLoss:
    counts = torch.ones(len(TABLE), dtype=torch.int64) if counts is None else counts
    return NextItemLoss(TrainConfig(loss=kind, negatives=negatives), counts)  # type: ignore[arg-type]


USERS = torch.tensor([[1.0, 0.0, 2.0, -1.0], [0.5, -1.0, 0.0, 1.0]])
TABLE = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [2, 0, -1, 0], [0, 0, 0, 1.5]])
TARGETS = torch.tensor([1, 2])
REAL = torch.ones(1, 2, dtype=torch.bool)  # one lane with two positions
ITEMS = torch.tensor([[0, 3]])  # their inputs
# scores of user 0: 1, 2, -1, 0, -1.5; of user 1: -.5, 0, 0, 1, 1.5


def full_losses() -> list[float]:
    scores = [[1, 2, -1, 0, -1.5], [-0.5, 0, 0, 1, 1.5]]
    return [math.log(sum(math.exp(s) for s in row)) - row[t] for row, t in zip(scores, (1, 2), strict=True)]


def test_full_softmax_equals_hand_computation() -> None:
    loss = loss_of("full")
    found = loss(USERS, TABLE, TARGETS, negatives=None, items=ITEMS, real=REAL, seen_before=None)
    assert found.item() == pytest.approx(sum(full_losses()), rel=1e-5)


@pytest.mark.parametrize("block", [1, 40, 250, 1 << 19])  # scores at a time: one position, one, several, all
def test_full_softmax_and_its_gradients_equal_cross_entropy(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dman_train.losses.SOFTMAX_BLOCK", block)
    users, table, targets = torch.randn(23, 8), torch.randn(40, 8), torch.randint(40, (23,))
    found, expected = ([x.clone().requires_grad_() for x in (users, table)] for _ in range(2))
    loss = _FullSoftmax.apply(*found, targets, None, None, None)
    reference = torch.nn.functional.cross_entropy(expected[0] @ expected[1].T, targets, reduction="sum")
    (0.3 * loss).backward()
    (0.3 * reference).backward()
    torch.testing.assert_close(loss, reference)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("block", [1, 40, 250, 1 << 19])
def test_full_softmax_with_added_scores_and_its_gradients_equal_cross_entropy(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item may come up several times in one position: all that is added counts."""
    monkeypatch.setattr("dman_train.losses.SOFTMAX_BLOCK", block)
    torch.manual_seed(0)
    users, table, added = torch.randn(23, 8), torch.randn(40, 8), torch.randn(23, 9)
    targets, items = torch.randint(40, (23,)), torch.randint(40, (23, 9))
    assert (items == targets[:, None]).any(), "something is added to targets as well"
    found, expected = ([x.clone().requires_grad_() for x in (users, table, added)] for _ in range(2))
    loss = loss_of("full", counts=torch.ones(40))(
        *found[:2], targets, negatives=None, items=targets[None], real=torch.ones(1, 23, dtype=torch.bool),
        seen_before=None, added=Added(found[2], items),
    )  # fmt: skip
    scores = (expected[0] @ expected[1].T).scatter_add(1, items, expected[2])
    reference = torch.nn.functional.cross_entropy(scores, targets, reduction="sum")
    (0.3 * loss).backward()
    (0.3 * reference).backward()
    torch.testing.assert_close(loss, reference)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_full_softmax_survives_large_scores() -> None:
    users, table = torch.full((1, 4), 50.0), torch.stack([torch.full((4,), 50.0), torch.full((4,), -50.0)])
    assert _FullSoftmax.apply(users, table, torch.tensor([1]), None, None, None).item() == pytest.approx(20_000)


def test_full_softmax_in_bfloat16_stays_near_float32() -> None:
    users, table, targets = torch.randn(50, 16), torch.randn(60, 16), torch.randint(60, (50,))
    exact, rounded = ([x.clone().requires_grad_() for x in (users, table)] for _ in range(2))
    reference = _FullSoftmax.apply(*exact, targets, None, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        loss = _FullSoftmax.apply(*rounded, targets, None, None, None)
    reference.backward()
    loss.backward()
    assert loss.dtype == torch.float32 and loss != reference
    torch.testing.assert_close(loss, reference, rtol=1e-2, atol=0)
    for a, b in zip(rounded, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).abs().max() < 2e-2 * b.grad.abs().max()


def test_negatives_loss_equals_hand_computation_and_masks_accidental_hits() -> None:
    loss = loss_of("negatives", negatives=3)
    negatives = torch.tensor([[[0, 3, 1], [4, 4, 0]]])  # (lanes, T, n); user 0 draws its target 1: no loss
    sigmoid = lambda s: 1 / (1 + math.exp(-s))  # noqa: E731
    first = -math.log(sigmoid(2)) - math.log(1 - sigmoid(1)) - math.log(1 - sigmoid(0))
    second = -math.log(sigmoid(0)) - 2 * math.log(1 - sigmoid(1.5)) - math.log(1 - sigmoid(-0.5))
    found = loss(USERS, TABLE, TARGETS, negatives=negatives, items=ITEMS, real=REAL, seen_before=None)
    assert found.item() == pytest.approx(first + second, rel=1e-5)


def test_softmax_over_negatives_equals_hand_computation_and_masks_accidental_hits() -> None:
    """Eq. 9 with the sum over the target and its own negatives; a drawn target is not counted twice."""
    loss = loss_of("negatives-softmax", negatives=3)
    negatives = torch.tensor([[[0, 3, 1], [4, 4, 0]]])
    users, targets = USERS.double(), TARGETS.tolist()
    expected = 0.0
    for row, target in enumerate(targets):
        score = [float(users[row] @ item) for item in TABLE.double()]
        drawn = [j for j in negatives[0, row].tolist() if j != target]
        expected -= score[target] - math.log(math.exp(score[target]) + sum(math.exp(score[j]) for j in drawn))
    found = loss(USERS, TABLE, TARGETS, negatives=negatives, items=ITEMS, real=REAL, seen_before=None)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_negatives_loss_ignores_draws_of_padded_positions() -> None:
    loss = loss_of("negatives", negatives=1)
    real = torch.tensor([[True, False], [True, False]])
    draws = torch.tensor([[[0], [3]], [[4], [1]]])
    other = torch.tensor([[[0], [1]], [[4], [2]]])
    found = loss(USERS, TABLE, TARGETS, negatives=draws, items=ITEMS, real=real, seen_before=None)
    assert found == loss(USERS, TABLE, TARGETS, negatives=other, items=ITEMS, real=real, seen_before=None)


def test_sampled_softmax_over_all_items_equals_full_softmax() -> None:
    loss = loss_of("sampled", negatives=5)
    found = loss(
        USERS, TABLE, TARGETS, negatives=torch.arange(5), items=ITEMS, real=REAL, seen_before=None
    )  # the proposal is uniform
    assert found.item() == pytest.approx(sum(full_losses()), rel=1e-5)


def added_to(items: Tensor) -> tuple[Added, Tensor]:
    """Scores for some items of two positions, one of them twice; and the same as (P, V)."""
    scores = torch.tensor([[0.5, -1.0, 2.0, 0.25], [1.0, 3.0, -0.5, 0.0]]).requires_grad_()
    return Added(scores, items), torch.zeros(2, len(TABLE)).scatter_add(1, items, scores)


ADDED_ITEMS = torch.tensor([[1, 4, 0, 1], [3, 3, 0, 2]])  # targets among them


@pytest.mark.parametrize("drawn", [[0, 1, 2, 3, 4], [4, 4, 0, 3], [2]])
def test_sampled_softmax_with_added_scores_and_their_gradients_equal_plain_torch(drawn: list[int]) -> None:
    negatives = torch.tensor(drawn)
    (added, dense), (again, expected_dense) = added_to(ADDED_ITEMS), added_to(ADDED_ITEMS)
    loss = loss_of("sampled", negatives=len(drawn))
    found = loss(USERS, TABLE, TARGETS, negatives=negatives, items=ITEMS, real=REAL, seen_before=None, added=added)
    scores, rows = USERS @ TABLE.T + expected_dense, torch.arange(2)
    positive = scores[rows, TARGETS]
    logits = scores[:, negatives] - math.log(len(drawn) / len(TABLE))
    logits = logits.masked_fill(negatives == TARGETS[:, None], float("-inf"))
    expected = (torch.logsumexp(torch.cat([positive[:, None], logits], 1), 1) - positive).sum()
    torch.testing.assert_close(found, expected)
    found.backward(), expected.backward()
    torch.testing.assert_close(added.scores.grad, again.scores.grad)
    assert not torch.equal(dense, torch.zeros_like(dense))


@pytest.mark.parametrize("kind", ["negatives", "negatives-softmax"])
def test_negatives_with_added_scores_equal_hand_computation(kind: str) -> None:
    negatives = torch.tensor([[[0, 3, 1], [4, 4, 0]]])
    added, dense = added_to(ADDED_ITEMS)
    found = loss_of(kind, negatives=3)(
        USERS, TABLE, TARGETS, negatives=negatives, items=ITEMS, real=REAL, seen_before=None, added=added
    )
    scores, expected = (USERS @ TABLE.T + dense).tolist(), 0.0
    for row, target in enumerate(TARGETS.tolist()):
        drawn = [scores[row][item] for item in negatives[0, row].tolist() if item != target]
        if kind == "negatives":
            expected += math.log1p(math.exp(-scores[row][target])) + sum(math.log1p(math.exp(s)) for s in drawn)
        else:
            expected += math.log(sum(math.exp(s) for s in [scores[row][target], *drawn])) - scores[row][target]
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_sampled_softmax_is_unbiased_under_a_skewed_proposal() -> None:
    """exp(loss) = 1 + sum of exp(s_j - s_target) / (n q_j), whose expectation is exp(full loss): all draws tried."""
    loss = loss_of("sampled", counts=torch.tensor([1, 100, 10, 3, 40]))
    q = loss.proposal.tolist()
    for user, full in enumerate(full_losses()):
        one = slice(user, user + 1)
        losses = [
            loss(
                USERS[one],
                TABLE,
                TARGETS[one],
                negatives=torch.tensor([j]),
                items=ITEMS[:, :1],
                real=REAL[:, :1],
                seen_before=None,
            ).item()
            for j in range(5)
        ]
        assert losses[int(TARGETS[user])] == 0, "an accidental hit counts for nothing"
        expected = sum(p * math.exp(loss) for p, loss in zip(q, losses, strict=True))
        assert expected == pytest.approx(math.exp(full), rel=1e-4)


def test_sampled_softmax_tends_to_full_softmax_with_many_negatives() -> None:
    torch.manual_seed(0)
    users, table, targets = torch.randn(20, 4), torch.randn(50, 4), torch.randint(50, (20,))
    loss = loss_of("sampled", counts=torch.arange(1, 51), negatives=100_000)
    negatives = loss.draw_negatives((1, 20), torch.Generator().manual_seed(0))
    full = torch.nn.functional.cross_entropy(users @ table.T, targets, reduction="sum")
    real = torch.ones(1, 20, dtype=torch.bool)
    found = loss(users, table, targets, negatives=negatives, items=real.long(), real=real, seen_before=None)
    assert found.item() == pytest.approx(full.item(), rel=5e-3)


# Items that the user has already seen


def seen_by_hand(before: list[list[int]], items: Tensor, real: Tensor, vocabulary: int) -> Tensor:
    """(P, V) bool: what has been seen up to and including each position."""
    rows = []
    for earlier, inputs, row in zip(before, items.tolist(), real.tolist(), strict=True):
        for position in range(sum(row)):
            rows.append([i in earlier or i in inputs[: position + 1] for i in range(vocabulary)])
    return torch.tensor(rows)


def random_pieces(vocabulary: int) -> tuple[list[list[int]], Tensor, Tensor]:
    """Four pieces of up to seven inputs, 20 in all, with repetitions; one user has seen nothing before."""
    items, lengths = torch.randint(vocabulary, (4, 7)), torch.tensor([7, 1, 7, 5])
    before = [torch.randint(vocabulary, (n,)).tolist() for n in (9, 0, 3, 30)]
    return before, items, torch.arange(7) < lengths[:, None]


def lists(before: list[list[int]]) -> list[Tensor]:
    return [torch.tensor(x, dtype=torch.int64) for x in before]


@pytest.mark.parametrize("block", [1, 40, 250, 1 << 19])
def test_full_softmax_and_its_gradients_leave_seen_items_out(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dman_train.losses.SOFTMAX_BLOCK", block)
    torch.manual_seed(0)
    before, items, real = random_pieces(40)
    by_hand = seen_by_hand(before, items, real, 40)
    users, table, targets = torch.randn(20, 8), torch.randn(40, 8), torch.randint(40, (20,))
    assert by_hand[torch.arange(20), targets].any(), "some targets have been seen: they stay in"
    found, expected = ([x.clone().requires_grad_() for x in (users, table)] for _ in range(2))
    seen = SeenItems.of(lists(before), items, real)
    loss = _FullSoftmax.apply(*found, targets, seen, None, None)
    left_out = by_hand.scatter(1, targets[:, None], False)
    scores = (expected[0] @ expected[1].T).masked_fill(left_out, float("-inf"))
    reference = torch.nn.functional.cross_entropy(scores, targets, reduction="sum")
    loss.backward()
    reference.backward()
    torch.testing.assert_close(loss, reference)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_full_softmax_leaves_seen_items_out_whatever_is_added_to_them() -> None:
    torch.manual_seed(0)
    before, items, real = random_pieces(40)
    left_out = seen_by_hand(before, items, real, 40)
    users, table, added = torch.randn(20, 8), torch.randn(40, 8), torch.randn(20, 9)
    targets, places = torch.randint(40, (20,)), torch.randint(40, (20, 9))
    found, expected = ([x.clone().requires_grad_() for x in (users, table, added)] for _ in range(2))
    loss = loss_of("full", counts=torch.ones(40))(
        *found[:2], targets, negatives=None, items=items, real=real,
        seen_before=lists(before), added=Added(found[2], places),
    )  # fmt: skip
    scores = (expected[0] @ expected[1].T).scatter_add(1, places, expected[2])
    scores = scores.masked_fill(left_out.scatter(1, targets[:, None], False), float("-inf"))
    reference = torch.nn.functional.cross_entropy(scores, targets, reduction="sum")
    loss.backward()
    reference.backward()
    torch.testing.assert_close(loss, reference)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(("first", "last"), [(0, 20), (3, 4), (6, 13), (8, 20)])
def test_scores_lose_seen_items_in_the_form_of_a_gpu_as_in_that_of_a_cpu(first: int, last: int) -> None:
    torch.manual_seed(0)
    before, items, real = random_pieces(40)
    seen = SeenItems.of(lists(before), items, real)
    piece_by_piece, at_once = (torch.zeros(last - first, 40) for _ in range(2))
    seen._leave_out_earlier(piece_by_piece, first)
    seen._leave_out_earlier_at_once(at_once, first)
    assert torch.equal(at_once, piece_by_piece)
    assert at_once.isinf().any()


def test_no_negative_has_been_seen_before_by_users_without_a_past() -> None:
    items = torch.zeros(2, 3, dtype=torch.int64)
    found = _seen_at(torch.tensor([1, 2]), lists([[], []]), items, 5)
    assert found.shape == (2, 3, 2)
    assert not found.any()


@pytest.mark.parametrize("shape", [(30,), (4, 7, 6)], ids=["shared", "of each position"])
def test_negatives_that_have_been_seen_are_found(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    before, items, real = random_pieces(40)
    negatives = torch.randint(40, shape)  # with repetitions
    found = _seen_at(negatives, lists(before), items, 40)[real]
    drawn = negatives[real] if len(shape) == 3 else negatives.expand(20, -1)
    assert torch.equal(found, seen_by_hand(before, items, real, 40).gather(1, drawn))


SEEN_BEFORE = [torch.tensor([4])]  # with ITEMS: seen are 4 and 0, then 3 as well; the target 2 of position 1 is new


def test_sampled_softmax_over_all_items_leaves_seen_items_out() -> None:
    loss = loss_of("sampled", negatives=5)
    first = math.log(sum(math.exp(s) for s in (2, -1, 0))) - 2
    second = math.log(sum(math.exp(s) for s in (0, 0))) - 0
    found = loss(USERS, TABLE, TARGETS, negatives=torch.arange(5), items=ITEMS, real=REAL, seen_before=SEEN_BEFORE)
    assert found.item() == pytest.approx(first + second, rel=1e-5)


def test_negatives_loss_leaves_seen_items_out() -> None:
    loss = loss_of("negatives", negatives=2)
    draws = torch.tensor([[[0, 3], [3, 0]]])
    sigmoid = lambda s: 1 / (1 + math.exp(-s))  # noqa: E731
    expected = -math.log(sigmoid(2)) - math.log(1 - sigmoid(0)) - math.log(sigmoid(0))
    found = loss(USERS, TABLE, TARGETS, negatives=draws, items=ITEMS, real=REAL, seen_before=SEEN_BEFORE)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_sampled_negatives_follow_the_flattened_unigram() -> None:
    counts = torch.tensor([0, 1, 16, 81, 256])  # ^ .75: 1 (unseen items can be drawn), 1, 8, 27, 64
    loss = loss_of("sampled", counts=counts, negatives=200_000)
    expected = torch.tensor([1, 1, 8, 27, 64]) / 101
    torch.testing.assert_close(loss.proposal, expected)
    drawn = loss.draw_negatives((3, 5), torch.Generator().manual_seed(0))
    assert drawn is not None and drawn.shape == (200_000,)
    torch.testing.assert_close(torch.bincount(drawn) / 200_000, expected, rtol=0.05, atol=5e-4)


def test_paper_negatives_are_uniform_per_position() -> None:
    loss = loss_of("negatives", negatives=2000)
    drawn = loss.draw_negatives((3, 5), torch.Generator().manual_seed(0))
    assert drawn is not None and drawn.shape == (3, 5, 2000)
    torch.testing.assert_close(torch.bincount(drawn.flatten()) / 30_000, torch.full((5,), 0.2), rtol=0.05, atol=0)


def test_auto_loss_is_full_up_to_the_limit_and_sampled_beyond() -> None:
    for vocabulary, expected in [(FULL_SOFTMAX_LIMIT, "full"), (FULL_SOFTMAX_LIMIT + 1, "sampled")]:
        assert NextItemLoss(TrainConfig(), torch.ones(vocabulary, dtype=torch.int64)).kind == expected
