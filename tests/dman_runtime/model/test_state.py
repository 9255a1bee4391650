"""User state records: exact round trips, hostile bytes, sizes."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dman_runtime.errors import StateError
from dman_runtime.model.bundle import FORMAT_VERSION, Bundle, Items, Manifest, StateShape, open_bundle
from dman_runtime.model.encoder import Encoder
from dman_runtime.model.recurrence import advance, replay
from dman_runtime.model.state import (
    REQUEST_IDS,
    StateBatch,
    absorbed_segments,
    context_positions,
    head_bytes,
    read_user_embedding,
    request_hash,
)

LENGTHS = (0, 1, 4, 5, 6, 9, 10, 11, 14, 15, 23, 40)  # T = 5: around every border


@pytest.fixture(scope="module", params=["float16", "float32"])
def bundle(request: pytest.FixtureRequest, tiny_bundle: Path, exact_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle if request.param == "float16" else exact_bundle)


@pytest.fixture(scope="module")
def states(bundle: Bundle) -> StateBatch:
    """Real states of every length, each with another number of request ids."""
    random = np.random.default_rng(7)
    histories = [random.integers(0, bundle.manifest.vocabulary, length) for length in LENGTHS]
    states = replay(histories, bundle=bundle, graphs=Encoder(bundle.path, provider="cpu"))
    for row, length in enumerate(LENGTHS):
        states.request_ids[row] = random.integers(0, 1 << 63, min(length, REQUEST_IDS)).tolist()
    return states


def longest_record(states: StateBatch, bundle: Bundle) -> bytes:
    return max((states.to_record(row, bundle) for row in range(len(states))), key=len)


def refused(record: bytes, bundle: Bundle) -> None:
    """Every way to read the record raises a one-line StateError."""
    whole_refused(record, bundle)
    for head in (record, record[: head_bytes(bundle.manifest.state)]):
        with pytest.raises(StateError) as caught:
            read_user_embedding(head, bundle)
        assert "\n" not in str(caught.value)


def whole_refused(record: bytes, bundle: Bundle) -> None:
    """The same, but for the embedding, which needs an intact head only."""
    with pytest.raises(StateError) as caught:
        StateBatch.from_records(bundle, [record])
    assert "\n" not in str(caught.value)


def refused_or_only_the_tail(damaged: bytes, record: bytes, bundle: Bundle) -> None:
    """`damaged` is refused; if its head is that of `record`, the embedding alone may be read, and is right."""
    head = head_bytes(bundle.manifest.state)
    if damaged[:head] != record[:head]:
        refused(damaged, bundle)
        return
    whole_refused(damaged, bundle)
    embedding, events = read_user_embedding(damaged[:head], bundle)
    expected, expected_events = read_user_embedding(record, bundle)
    assert events == expected_events and embedding.tobytes() == expected.tobytes()


def test_record_round_trip_is_exact(bundle: Bundle, states: StateBatch) -> None:
    records = [states.to_record(row, bundle) for row in range(len(states))]
    found = StateBatch.from_records(bundle, records)
    np.testing.assert_array_equal(found.event_counts, LENGTHS)
    np.testing.assert_array_equal(found.counts, states.counts)
    np.testing.assert_array_equal(found.memory, states.memory)
    np.testing.assert_array_equal(found.user_embeddings, states.user_embeddings)
    assert found.request_ids == states.request_ids
    for row, count in enumerate(states.counts):
        np.testing.assert_array_equal(found.recent[row, :count], states.recent[row, :count])
        np.testing.assert_array_equal(found.hidden[row, :, :count], states.hidden[row, :, :count])
    assert [found.to_record(row, bundle) for row in range(len(found))] == records


def test_record_readers_agree_with_the_whole_state(bundle: Bundle, states: StateBatch) -> None:
    for row, length in enumerate(LENGTHS):
        record = states.to_record(row, bundle)
        embedding, events = read_user_embedding(record, bundle)
        assert events == length
        np.testing.assert_array_equal(embedding, states.user_embeddings[row])


def test_record_keeps_only_the_newest_request_ids(bundle: Bundle) -> None:
    state = StateBatch.empty(bundle, 1)
    state.request_ids[0] = list(range(REQUEST_IDS + 5))
    found = StateBatch.from_records(bundle, [state.to_record(0, bundle)])
    assert found.request_ids == [list(range(5, REQUEST_IDS + 5))]


def test_no_record_is_the_state_of_an_empty_history(bundle: Bundle) -> None:
    empty, none = StateBatch.empty(bundle, 1), StateBatch.from_records(bundle, [None])
    assert none.to_record(0, bundle) == empty.to_record(0, bundle)
    assert not none.event_counts[0] and not none.user_embeddings.any() and none.request_ids == [[]]
    np.testing.assert_array_equal(none.memory[0], bundle.initial_memory.astype(none.memory.dtype))


def test_record_truncated_or_extended_is_refused(bundle: Bundle, states: StateBatch) -> None:
    record = longest_record(states, bundle)
    for size in range(len(record)):
        refused_or_only_the_tail(record[:size], record, bundle)
    for longer in (record + b"\0", record + record):
        refused_or_only_the_tail(longer, record, bundle)


def test_record_with_any_byte_changed_is_refused(bundle: Bundle, states: StateBatch) -> None:
    record, random = longest_record(states, bundle), np.random.default_rng(0)
    for place in range(len(record)):
        changed = bytearray(record)
        changed[place] ^= int(random.integers(1, 256))
        refused_or_only_the_tail(bytes(changed), record, bundle)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=600))
def test_record_of_random_bytes_is_refused(tiny_bundle: Path, junk: bytes) -> None:
    bundle = open_bundle(tiny_bundle)
    refused(junk, bundle)
    header = struct.pack("<BBHHH8s", 1, 1, 0, 0, 0, bytes.fromhex(bundle.bundle_id))
    refused(header + junk, bundle)  # the same behind a header that looks right


def test_record_of_another_bundle_is_refused_and_named(tiny_bundle: Path, exact_bundle: Path) -> None:
    tiny, exact = open_bundle(tiny_bundle), open_bundle(exact_bundle)
    record = StateBatch.empty(exact, 1).to_record(0, exact)
    refused(record, tiny)
    with pytest.raises(StateError, match=f"{exact.bundle_id}.*{tiny.bundle_id}.*import"):
        read_user_embedding(record, tiny)


def test_record_of_another_vocabulary_is_refused(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    larger = replace(bundle, manifest=replace(bundle.manifest, vocabulary=bundle.manifest.vocabulary + 1))
    refused(StateBatch.empty(larger, 1).to_record(0, larger), bundle)


def test_record_of_a_newer_format_is_refused_and_named(bundle: Bundle, states: StateBatch) -> None:
    record = b"\x09" + longest_record(states, bundle)[1:]
    refused(record, bundle)
    with pytest.raises(StateError, match="format 9"):
        read_user_embedding(record, bundle)


class ZeroGraphs:
    """Graphs of any size whose outputs are zero: what a record's size does not depend on."""

    def encode(
        self,
        item_embeddings: np.ndarray,
        new_lengths: np.ndarray,
        context: np.ndarray,
        context_lengths: np.ndarray,
        memory: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        rows, new, width = item_embeddings.shape
        return np.zeros((rows, width), np.float32), np.zeros((rows, context.shape[1], new, width), np.float32)

    def abstract(self, memory: np.ndarray, segment_hidden: np.ndarray) -> np.ndarray:
        return np.zeros_like(memory)


def test_record_at_the_default_sizes_takes_at_most_24000_bytes() -> None:
    shape = StateShape(segment_length=20, memory_slots=20, layers=2, width=128, recurrent=True, dtype="float16")
    manifest = Manifest(FORMAT_VERSION, "00" * 8, {}, shape, 10, True, {}, {})
    items = Items([str(i) for i in range(10)], np.full(10, 0.1), [""] * 10, [{}] * 10, {})
    bundle = Bundle(Path(), manifest, items, np.zeros((10, 128), np.float32), np.zeros((2, 20, 128), np.float32))
    state, sizes = StateBatch.empty(bundle, 1), []
    state.request_ids[0] = list(range(REQUEST_IDS))
    for _ in range(100):
        advance(state, [np.array([3])], bundle=bundle, graphs=ZeroGraphs())
        sizes.append(len(state.to_record(0, bundle)))
    assert max(sizes) <= 24_000
    assert max(sizes) == max(sizes[40:60]) == max(sizes[60:80])  # it does not grow with the history
    assert max(sizes) > 20_000  # both segments and the memory are in it


@pytest.mark.parametrize(
    ("events", "positions", "absorbed"),
    [(0, 0, 0), (1, 1, 0), (4, 4, 0), (5, 5, 0), (9, 9, 0), (10, 5, 1), (14, 9, 1), (15, 5, 2), (103, 8, 19)],
)
def test_state_holds_one_to_two_segments_and_the_rest_in_memory(events: int, positions: int, absorbed: int) -> None:
    shape = StateShape(segment_length=5, memory_slots=4, layers=2, width=32, recurrent=True, dtype="float16")
    assert (context_positions(events, shape), absorbed_segments(events, shape)) == (positions, absorbed)


def test_request_hash_is_pinned_and_tells_ids_apart() -> None:
    stored = bytes.fromhex("40f89e395b66422f")  # printf a | b2sum -l 64; another hash needs a new record format
    assert request_hash("a") == int.from_bytes(stored, "little")
    assert len({request_hash(str(i)) for i in range(10_000)}) == 10_000
