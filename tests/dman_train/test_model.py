"""The model against naive transcriptions of the paper's equations, and the invariances that serving rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import PAPER, TINY, TINY_ITEMS, random_model
from torch import Tensor

from dman_train.blocks import Attention
from dman_train.config import ModelConfig
from dman_train.model import DMAN, Encoding
from dman_train.replay import replay, returned

EXACT = {"rtol": 1e-4, "atol": 2e-5}  # float32, two orders of summation
VARIANTS = {
    "plus": TINY,
    "deep": replace(TINY, heads=4, layers=3),
    "paper": PAPER,
    "gated": replace(TINY, long_term="gated"),
    "xl": replace(TINY, variant="xl"),
    "fifo": replace(TINY, variant="fifo"),
    "nran": replace(TINY, variant="nran"),
    "full": replace(TINY, routing="full", routing_softmax="primaries"),
}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def random_inputs(config: ModelConfig, *, batch: int, new: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Item indices (B, S), context (B, L, C, D) and memory (B, L, m, D)."""
    generator = torch.Generator().manual_seed(3)
    items = torch.randint(TINY_ITEMS, (batch, new), generator=generator)
    cached = torch.randn(batch, config.layers, context, config.width, generator=generator)
    return items, cached, torch.randn(batch, config.layers, config.slots, config.width, generator=generator)


def random_histories(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [random.integers(0, TINY_ITEMS, length) for length in lengths]


def softmax(logits: Tensor) -> Tensor:
    weights = logits.exp()
    return weights / weights.sum(-1, keepdim=True)


# Attention


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_absorbed_equals_projected_keys_and_values(heads: int) -> None:
    torch.manual_seed(0)
    attention = Attention(replace(TINY, heads=heads)).eval()
    queries, sources, bias = torch.randn(3, 4, 32), torch.randn(3, 7, 32), torch.randn(3, 4, heads, 7)
    outputs = []
    for head in range(heads):
        rows = slice(head * 32 // heads, (head + 1) * 32 // heads)
        q = queries @ attention.query.weight[rows].T  # (B, Q, d)
        k, v = sources @ attention.key[head].T, sources @ attention.value[head]  # (B, K, d)
        outputs.append(softmax(q @ k.transpose(1, 2) / (32 / heads) ** 0.5 + bias[:, :, head]) @ v)
    expected = torch.cat(outputs, -1) @ attention.output.weight.T
    torch.testing.assert_close(attention(attention.queries_in_source_space(queries), sources, bias), expected, **EXACT)


def test_paper_architecture_equals_equations_1_to_3() -> None:
    model = random_model(PAPER, TINY_ITEMS)
    items, context, memory = random_inputs(PAPER, batch=2, new=3, context=4)
    context_lengths = [4, 2]
    found = model.encode(model.embed(items), context, torch.tensor(context_lengths), memory)
    for row, length in enumerate(context_lengths):
        for position in range(3):
            expected = _paper_user_embedding(model, items[row], context[row, :, 4 - length :], memory[row], position)
            torch.testing.assert_close(found.user_embedding[row, position], expected, **EXACT)


def _paper_user_embedding(model: DMAN, items: Tensor, context: Tensor, memory: Tensor, position: int) -> Tensor:
    """Eq. 1-3 for one user and one position, one vector at a time: (D)."""
    scale = 32**0.5
    h = [vector * scale for vector in model.items[items]]
    g = h[position]
    for layer in range(2):
        w, keys = model.short_term[layer].attention, [*context[layer], *h]
        h = [_attend(w, h[i], keys[: len(context[layer]) + i + 1], model.distance_bias[layer, 0]) for i in range(3)]
        g = _attend(model.long_term[layer].attention, g, list(memory[layer]), None)
    inner = model.gate_short.weight @ h[position] + model.gate_long.weight @ g
    gate = 1 / (1 + torch.exp(-inner))
    return (gate * h[position] + (1 - gate) * g) / scale


def _attend(w: Attention, query: Tensor, sources: list[Tensor], bias: Tensor | None) -> Tensor:
    logits = torch.stack([(w.query.weight @ query) @ (w.key[0] @ s) / 32**0.5 for s in sources])
    if bias is not None:
        logits = logits + torch.stack([bias[len(sources) - 1 - j] for j in range(len(sources))])
    return sum(a * (w.value[0].T @ s) for a, s in zip(softmax(logits), sources, strict=True))  # type: ignore[return-value]


def test_scores_are_products_of_item_and_user_embeddings_of_one_scale() -> None:
    model = random_model(TINY, TINY_ITEMS)
    assert torch.equal(model.embed(torch.arange(TINY_ITEMS)), model.item_table())


# What must not matter


@every_variant
def test_encode_is_causal(config: ModelConfig) -> None:
    model = random_model(config, TINY_ITEMS)
    items, context, memory = random_inputs(config, batch=2, new=5, context=4)
    changed = items.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % TINY_ITEMS
    lengths = torch.tensor([4, 1])
    before, after = (model.encode(model.embed(x), context, lengths, memory) for x in (items, changed))
    assert torch.equal(before.user_embedding[:, :3], after.user_embedding[:, :3])
    assert torch.equal(before.hidden[:, :, :3], after.hidden[:, :, :3])
    assert not torch.allclose(before.user_embedding[:, 3], after.user_embedding[:, 3])


@pytest.mark.slow
@every_variant
def test_encode_ignores_padding_and_batch_mates(config: ModelConfig) -> None:
    model = random_model(config, TINY_ITEMS)
    items, context, memory = random_inputs(config, batch=3, new=3, context=4)
    lengths = torch.tensor([4, 2, 0])
    together = model.encode(model.embed(items), context, lengths, memory)
    for row, length in enumerate(lengths.tolist()):
        for left, right in [(0, 0), (3, 0), (0, 4), (3, 4)]:
            junk = torch.full((1, config.layers, left, config.width), 1e3)
            padded = torch.cat([junk, context[row : row + 1, :, 4 - length :]], dim=2)
            new = torch.cat([items[row : row + 1], torch.full((1, right), 7)], dim=1)
            alone = model.encode(model.embed(new), padded, lengths[row : row + 1], memory[row : row + 1])
            torch.testing.assert_close(alone.user_embedding[0, :3], together.user_embedding[row], **EXACT)
            torch.testing.assert_close(alone.hidden[0, :, :3], together.hidden[row], **EXACT)


@every_variant
def test_encode_of_the_last_position_equals_that_of_all(config: ModelConfig) -> None:
    model = random_model(config, TINY_ITEMS)
    items, context, memory = random_inputs(config, batch=4, new=5, context=6)
    lengths, last = torch.tensor([6, 0, 3, 1]), torch.tensor([4, 0, 2, 3])
    everything = model.encode(model.embed(items), context, lengths, memory)
    one = model.encode(model.embed(items), context, lengths, memory, last)
    assert one.user_embedding.shape == (4, 1, config.width)
    expected = everything.user_embedding[torch.arange(4), last]
    torch.testing.assert_close(one.user_embedding[:, 0], expected, **EXACT)
    assert torch.equal(one.hidden, everything.hidden)


@pytest.mark.parametrize("config", [TINY, VARIANTS["full"], VARIANTS["fifo"]], ids=["slot", "full", "fifo"])
def test_abstract_ignores_padding_and_batch_mates(config: ModelConfig) -> None:
    model = random_model(config, TINY_ITEMS)
    memory, hidden = torch.randn(3, 2, 4, 32), torch.randn(3, 2, 5, 32)
    lengths = torch.tensor([5, 2, 1])
    junk = torch.where(torch.arange(5) < 5 - lengths[:, None], 1e3, 0.0)[:, None, :, None]
    together = model.abstract(memory, hidden + junk, lengths)
    for row, length in enumerate(lengths.tolist()):
        other_junk = hidden[row : row + 1].clone()
        other_junk[:, :, : 5 - length] = -7.0
        alone = model.abstract(memory[row : row + 1], other_junk, lengths[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], **EXACT)
    torch.testing.assert_close(model.abstract(memory, hidden), model.abstract(memory, hidden, torch.tensor([5] * 3)))


def feed(model: DMAN, history: np.ndarray, pieces: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One history in calls of `pieces` events, contexts built by hand: user embedding (D), memory (L, m, D)."""
    config, T = model.config, model.config.segment_length
    memory, previous = model.initial_memory.detach(), torch.zeros(config.layers, 0, config.width)
    current, encoding, done = previous, None, 0
    for piece in pieces:
        context = torch.cat([previous, current], dim=1) if config.recurrent else current
        new = model.embed(torch.from_numpy(history[done : done + piece]))[None]
        encoding = model.encode(new, context[None], torch.tensor([context.shape[1]]), memory[None])
        current, done = torch.cat([current, encoding.hidden[0]], dim=1), done + piece
        assert current.shape[1] <= T, "a piece crosses a segment border"
        if current.shape[1] == T:
            absorbed = previous if config.recurrent else current
            if absorbed.shape[1]:
                memory = model.abstract(memory[None], absorbed[None])[0]
            previous, current = current, current[:, :0]
    assert encoding is not None
    return encoding.user_embedding[0, -1], memory


def random_pieces(length: int, segment: int, random: np.random.Generator) -> list[int]:
    pieces = []
    while (done := sum(pieces)) < length:
        pieces.append(int(random.integers(1, min(segment - done % segment, length - done) + 1)))
    return pieces


@pytest.mark.slow
@every_variant
@torch.no_grad()
def test_history_fed_in_any_split_equals_one_replay(config: ModelConfig) -> None:
    model, random = random_model(config, TINY_ITEMS), np.random.default_rng(1)
    histories = random_histories(1, 4, 5, 6, 10, 14, 15, 23)
    users, memories = replay(model, histories)
    for history, user, memory in zip(histories, users, memories, strict=True):
        for pieces in ([1] * len(history), random_pieces(len(history), 5, random)):
            fed_user, fed_memory = feed(model, history, pieces)
            torch.testing.assert_close(fed_user, user, **EXACT)
            torch.testing.assert_close(fed_memory, memory, **EXACT)


def test_replay_refuses_an_empty_history() -> None:
    with pytest.raises(ValueError, match="empty history"):
        replay(random_model(TINY, TINY_ITEMS), [np.zeros(0, np.int64)])


# The memory


@pytest.mark.parametrize("slots", [3, 5, 8])  # fewer than, as many as, and more than a segment has events
@torch.no_grad()
def test_fifo_memory_is_the_last_hidden_states(slots: int) -> None:
    config = replace(TINY, variant="fifo", memory_slots=slots)
    model, (history,) = random_model(config, TINY_ITEMS), random_histories(20)
    _, memory = replay(model, [history])
    encoded: list[Encoding] = []
    old = model.initial_memory.detach()
    context, stream = torch.zeros(1, 2, 0, 32), old
    for start in range(0, 20, 5):
        new = model.embed(torch.from_numpy(history[start : start + 5]))[None]
        encoded.append(model.encode(new, context, torch.tensor([context.shape[2]]), stream[None, :, -slots:]))
        if len(encoded) > 1:  # segment n is encoded while the memory covers 1..n-2
            stream = torch.cat([stream, encoded[-2].hidden[0]], dim=1)
        context = encoded[-1].hidden
    torch.testing.assert_close(memory[0], stream[:, -slots:], **EXACT)


def test_fifo_memory_keeps_old_slots_behind_a_short_segment() -> None:
    model = random_model(replace(TINY, variant="fifo"), TINY_ITEMS)
    memory, hidden = torch.randn(2, 2, 4, 32), torch.randn(2, 2, 5, 32)
    found = model.abstract(memory, hidden, torch.tensor([1, 3]))
    assert torch.equal(found[0], torch.cat([memory[0, :, 1:], hidden[0, :, 4:]], dim=1))
    assert torch.equal(found[1], torch.cat([memory[1, :, 3:], hidden[1, :, 2:]], dim=1))
    assert model.abstraction_parameters() == []


@torch.no_grad()
def test_xl_has_no_memory_and_forgets_what_left_the_context() -> None:
    config = replace(TINY, variant="xl", layers=1)
    model = random_model(config, TINY_ITEMS)
    assert not any(
        "norm_memory" in name or name.startswith(("long_term", "slot_bias", "abstraction", "gate"))
        for name, _ in model.named_parameters()
    )
    assert model.initial_memory.shape == (1, 0, 32)
    assert model.abstraction_parameters() == []
    (history,) = random_histories(15)
    old, previous = history.copy(), history.copy()
    old[:5] = (old[:5] + 1) % TINY_ITEMS
    previous[5:10] = (previous[5:10] + 1) % TINY_ITEMS
    users, _ = replay(model, [history, old, previous])
    assert torch.equal(users[0], users[1])
    assert not torch.allclose(users[0], users[2])


@pytest.mark.parametrize("variant", ["dman", "nran"])
@torch.no_grad()
def test_previous_segment_is_read_by_attention_or_through_the_memory(variant: str) -> None:
    """Without recurrence, the memory has absorbed it. Nothing of the past is left out, whatever the variant."""
    model = random_model(replace(TINY, variant=variant), TINY_ITEMS)
    (history,) = random_histories(12)
    previous, first = history.copy(), history.copy()
    previous[5:7] = (previous[5:7] + 1) % TINY_ITEMS
    first[:2] = (first[:2] + 1) % TINY_ITEMS
    users, memories = replay(model, [history, previous, first])
    assert not torch.allclose(users[0], users[1]) and not torch.allclose(users[0], users[2])
    assert torch.allclose(memories[0], memories[1]) is (variant == "dman")
    assert not torch.allclose(memories[0], memories[2])


@torch.no_grad()
def test_nran_reads_a_segment_of_its_own_only() -> None:
    """The user embedding depends on the open segment and on the memory, not on how the memory came about."""
    model = random_model(replace(TINY, variant="nran"), TINY_ITEMS)
    (history,) = random_histories(12)
    users, memories = replay(model, [history])
    new = model.embed(torch.from_numpy(history[10:]))[None]
    alone = model.encode(new, torch.zeros(1, 2, 0, 32), torch.tensor([0]), memories).user_embedding[:, -1]
    torch.testing.assert_close(alone, users, **EXACT)


@pytest.mark.parametrize("architecture", ["paper", "plus"])
@torch.no_grad()
def test_abstraction_loss_equals_equation_5(architecture: str) -> None:
    """The squared difference of two plain attention reads.

    `paper`: by the weights of the short-term attention, summed over layers and width. `plus` with a branch for the
    memory: by its weights, on normalised slots, as a mean over layers and width.
    """
    model = random_model(PAPER if architecture == "paper" else replace(TINY, long_term="gated", heads=1), TINY_ITEMS)
    old, new, hidden = torch.randn(2, 2, 4, 32), torch.randn(2, 2, 4, 32), torch.randn(2, 2, 5, 32)
    rows, lengths = torch.randn(2, 2, 3, 32), [5, 2]  # (B, L, S, D) what the queries are made of
    blocks = model.short_term if architecture == "paper" else model.long_term
    queries = [block.attention.queries_in_source_space(rows[:, layer]) for layer, block in enumerate(blocks)]
    encoding = Encoding(torch.zeros(2, 3, 32), rows, queries if architecture == "plus" else [])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    expected = torch.zeros(())
    for row, position in mask.nonzero().tolist():
        for layer, block in enumerate(blocks):
            w, query = block.attention, rows[row, layer, position]
            real = hidden[row, layer, 5 - lengths[row] :]
            before = [block.norm_memory(x) for x in (*old[row, layer], *real)]
            after = [block.norm_memory(x) for x in new[row, layer]]
            difference = w.output(_attend(w, query, after, None) - _attend(w, query, before, None))
            expected += difference.square().sum() / (1 if architecture == "paper" else 2 * 32)
    found = model.abstraction_loss(
        old_memory=old,
        new_memory=new,
        hidden=hidden,
        lengths=torch.tensor(lengths),
        queries=model.abstraction_queries(encoding),
        query_mask=mask,
    )
    torch.testing.assert_close(found, expected, **EXACT)


# Configuration


OTHER_MODEL = {
    "architecture": "paper",
    "variant": "fifo",
    "segment_length": 6,
    "memory_slots": 5,
    "layers": 1,
    "width": 16,
    "heads": 1,
    "ffn_multiplier": 3,
    "long_term": "gated",
    "time": "request",
    "returns": "on",
    "sketch_items": 3,
    "closed_states": "int8",
    "dropout": 0.5,
    "routing": "full",
    "routing_iterations": 2,
    "routing_softmax": "primaries",
}


def outcome(config: ModelConfig) -> list[np.ndarray]:
    """What a seeded model makes of a long history in training mode."""
    torch.manual_seed(0)
    model = DMAN(config, TINY_ITEMS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.arange(parameter.numel()).view_as(parameter).sin() * 0.1)
    torch.manual_seed(1)
    (history,) = histories = random_histories(17)
    times = [10**9 + 60 * np.arange(len(history))]
    users, memories = replay(model.train(), histories, times=times, request_times=times[0][-1:] + 99)
    results = [users, memories]
    if config.returns == "on":
        results.append(returned(model, users, histories, times=times)[1])
    return [tensor.numpy() for tensor in results]


def differ(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return len(a) != len(b) or any(x.shape != y.shape or not np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [f.name for f in fields(ModelConfig)])
def test_model_config_field_changes_the_model(name: str) -> None:
    bases = {
        "architecture": replace(TINY, heads=1, long_term="gated"),
        "sketch_items": replace(TINY, returns="on", sketch_items=4),
    }
    base = bases.get(name, TINY)
    assert not differ(outcome(base), outcome(base)), "the comparison itself is not reproducible"
    assert differ(outcome(base), outcome(replace(base, **{name: OTHER_MODEL[name]})))
