"""The records of states: exact round trips, hostile bytes, sizes."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import events_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dman_runtime.errors import StateError
from dman_runtime.model.bundle import FORMAT_VERSION, Bundle, Items, Manifest, StateShape
from dman_runtime.model.generation import Generation
from dman_runtime.model.record import RECORD_FORMAT, head_bytes, max_record_bytes, pack, read_head, unpack
from dman_runtime.model.recurrence import advance
from dman_runtime.model.state import State

LENGTHS = (0, 1, 4, 5, 6, 9, 10, 11, 14, 15, 23, 40)  # T = 5: around every border


@pytest.fixture(scope="module", params=["float16", "float32", "without recurrence"])
def generation(request: pytest.FixtureRequest, tiny: Generation, exact: Generation) -> Generation:
    """Two layers each, so that records have hidden states."""
    return {"float16": tiny, "float32": exact, "without recurrence": without_recurrence(tiny)}[request.param]


def without_recurrence(generation: Generation) -> Generation:
    """With the same graphs, whose context is then the open segment alone."""
    manifest = generation.bundle.manifest
    manifest = replace(manifest, state=replace(manifest.state, recurrent=False))
    return replace(generation, bundle=replace(generation.bundle, manifest=manifest))


@pytest.fixture
def bundle(generation: Generation) -> Bundle:
    return generation.bundle


@pytest.fixture(scope="module")
def states(generation: Generation) -> list[State]:
    """Real states of every length, each with another number of events of unknown items."""
    random = np.random.default_rng(7)
    vocabulary = generation.bundle.manifest.vocabulary
    states = generation.replay([events_of(random.integers(0, vocabulary, length)) for length in LENGTHS])
    for row, state in enumerate(states):
        state.history_count += 3 * row
    return states


def longest_record(states: list[State], bundle: Bundle) -> bytes:
    return max((pack(state, bundle) for state in states), key=len)


def refused(record: bytes, bundle: Bundle) -> None:
    """Every way to read the record raises a one-line StateError."""
    whole_refused(record, bundle)
    for head in (record, record[: head_bytes(bundle.manifest.state)]):
        with pytest.raises(StateError) as caught:
            read_head(head, bundle)
        assert "\n" not in str(caught.value)


def whole_refused(record: bytes, bundle: Bundle) -> None:
    """The same, but for the head, which needs no intact tail."""
    with pytest.raises(StateError) as caught:
        unpack(record, bundle)
    assert "\n" not in str(caught.value)


def refused_or_only_the_tail(damaged: bytes, record: bytes, bundle: Bundle) -> None:
    """`damaged` is refused; if its head is that of `record`, the head alone may be read, and is right."""
    head = head_bytes(bundle.manifest.state)
    if damaged[:head] != record[:head]:
        refused(damaged, bundle)
        return
    whole_refused(damaged, bundle)
    found, expected = read_head(damaged[:head], bundle), read_head(record, bundle)
    assert (found.event_count, found.history_count) == (expected.event_count, expected.history_count)
    assert found.user_embedding.tobytes() == expected.user_embedding.tobytes()


def test_record_round_trip_is_exact(bundle: Bundle, states: list[State]) -> None:
    for state, length in zip(states, LENGTHS, strict=True):
        record = pack(state, bundle)
        found, count = unpack(record, bundle), state.context_length
        assert (found.event_count, found.history_count) == (length, state.history_count)
        np.testing.assert_array_equal(found.memory, state.memory)
        np.testing.assert_array_equal(found.user_embedding, state.user_embedding)
        np.testing.assert_array_equal(found.recent[:count], state.recent[:count])
        np.testing.assert_array_equal(found.hidden[:, :count], state.hidden[:, :count])
        assert pack(found, bundle) == record


def test_record_head_agrees_with_the_whole_state(bundle: Bundle, states: list[State]) -> None:
    for state in states:
        head = read_head(pack(state, bundle)[: head_bytes(bundle.manifest.state)], bundle)
        assert (head.event_count, head.history_count) == (state.event_count, state.history_count)
        np.testing.assert_array_equal(head.user_embedding, state.user_embedding)


def test_no_record_is_the_state_of_an_empty_history(generation: Generation) -> None:
    empty, none = State.empty(generation.bundle), generation.unpack(None)
    assert generation.pack(none) == generation.pack(empty)
    assert not none.event_count and not none.history_count and not none.user_embedding.any()
    np.testing.assert_array_equal(none.memory, generation.bundle.initial_memory.astype(none.memory.dtype))


def test_record_truncated_or_extended_is_refused(bundle: Bundle, states: list[State]) -> None:
    record = longest_record(states, bundle)
    for size in range(len(record)):
        refused_or_only_the_tail(record[:size], record, bundle)
    for longer in (record + b"\0", record + record):
        refused_or_only_the_tail(longer, record, bundle)


def test_record_with_any_byte_changed_is_refused(bundle: Bundle, states: list[State]) -> None:
    record, random = longest_record(states, bundle), np.random.default_rng(0)
    for position in range(len(record)):
        changed = bytearray(record)
        changed[position] ^= int(random.integers(1, 256))
        refused_or_only_the_tail(bytes(changed), record, bundle)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=600))
def test_record_of_random_bytes_is_refused(tiny: Generation, junk: bytes) -> None:
    refused(junk, tiny.bundle)
    bundle_id = bytes.fromhex(tiny.bundle_id)
    header = struct.pack("<BBHI8sQQ", RECORD_FORMAT, 1, 0, tiny.bundle.manifest.vocabulary, bundle_id, 0, 0)
    refused(header + junk, tiny.bundle)  # the same behind a header that looks right


def test_record_of_another_bundle_is_refused_and_named(tiny: Generation, exact: Generation) -> None:
    record = exact.pack(State.empty(exact.bundle))
    refused(record, tiny.bundle)
    with pytest.raises(StateError, match=f"{exact.bundle_id}.*{tiny.bundle_id}"):
        read_head(record, tiny.bundle)


def test_record_of_another_vocabulary_is_refused(tiny: Generation) -> None:
    bundle = tiny.bundle
    larger = replace(bundle, manifest=replace(bundle.manifest, vocabulary=bundle.manifest.vocabulary + 1))
    refused(pack(State.empty(larger), larger), bundle)


def test_record_of_another_format_is_refused_and_named(bundle: Bundle, states: list[State]) -> None:
    record = b"\x09" + longest_record(states, bundle)[1:]
    refused(record, bundle)
    with pytest.raises(StateError, match=f"format 9, this runtime reads {RECORD_FORMAT}"):
        read_head(record, bundle)


class ZeroGraphs:
    """Graphs of any size whose outputs are zero: what a record's size does not depend on."""

    provider, on_cuda = "none", False

    def encode(
        self,
        item_embeddings: np.ndarray,
        new_lengths: np.ndarray,
        context: np.ndarray,
        context_lengths: np.ndarray,
        memory: np.ndarray,
        ages: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        rows, new, width = item_embeddings.shape
        return np.zeros((rows, width), np.float32), np.zeros((rows, context.shape[1], new, width), np.float32)

    def abstract(self, memory: np.ndarray, segment_hidden: np.ndarray) -> np.ndarray:
        return np.zeros_like(memory)


@pytest.mark.parametrize(
    ("dtype", "recurrent", "largest"),
    [("float16", True, 15_812), ("float32", True, 30_916), ("float16", False, 10_612), ("float32", False, 20_596)],
)
def test_record_at_the_default_sizes_takes_what_the_module_says(dtype: str, recurrent: bool, largest: int) -> None:
    """T=20, m=10, L=2, D=128: the sum of the sizes at the head of `record.py`; twice the hidden states and memory
    in float32; 19 instead of 39 positions without recurrence."""
    shape = StateShape(segment_length=20, memory_slots=10, layers=2, width=128, recurrent=recurrent, dtype=dtype)
    manifest = Manifest(FORMAT_VERSION, "00" * 8, {}, shape, 10, True, {}, {})
    items = Items([str(i) for i in range(10)], np.full(10, 0.1), [""] * 10, [{}] * 10, {})
    bundle = Bundle(Path(), manifest, items, np.zeros((10, 128), np.float32), np.zeros((2, 10, 128), np.float32))
    state, sizes = State.empty(bundle), []
    for _ in range(100):
        advance([state], [events_of([3])], bundle=bundle, graphs=ZeroGraphs())
        sizes.append(len(pack(state, bundle)))
    assert max(sizes) == max_record_bytes(shape) == largest
    assert max(sizes) == max(sizes[40:60]) == max(sizes[60:80])  # it does not grow with the history
