"""The records of states: exact round trips, hostile bytes, sizes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import TIMED, TINY, TINY_ITEMS, events_of, random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_graphs import ZeroGraphs, bundle_of, generation_of

from dman_runtime.errors import StateError
from dman_runtime.model.bundle import Bundle, StateShape
from dman_runtime.model.generation import Generation
from dman_runtime.model.record import (
    HEADER_BYTES,
    LACKING_BYTES,
    RECORD_FORMAT,
    covered_events,
    head_bytes,
    lacking_events,
    lacks_events,
    max_record_bytes,
    pack,
    read_head,
    record_bytes,
    unpack,
    view,
)
from dman_runtime.model.recurrence import advance
from dman_runtime.model.state import State, absorbed_segments
from dman_train.config import ModelConfig
from dman_train.graphs import state_shape

LENGTHS = (0, 1, 4, 5, 6, 9, 10, 11, 14, 15, 23, 40)  # T = 5: around every border


WITH_MORE = {
    "times and returns": TIMED,
    "event times": replace(TINY, time="events"),
    "rounded": replace(TIMED, layers=3, closed_states="int8"),
    "rounded without times": replace(TINY, closed_states="int8"),
    "returns without recurrence": replace(TINY, variant="nran", returns="on", sketch_items=6),
}


@pytest.fixture(scope="module", params=["float16", "float32", "without recurrence", *WITH_MORE])
def generation(request: pytest.FixtureRequest, tiny: Generation, exact: Generation) -> Generation:
    """Two layers each, so that records have hidden states."""
    if request.param in WITH_MORE:
        return generation_of(random_model(WITH_MORE[request.param], TINY_ITEMS), "float16")
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
    items = [random.integers(0, vocabulary, length) for length in LENGTHS]
    times = [10**9 + np.cumsum(random.geometric(1e-5, length)) for length in LENGTHS]
    states = generation.replay([events_of(*history) for history in zip(items, times, strict=True)])
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
        np.testing.assert_array_equal(found.times[:count], state.times[:count])
        np.testing.assert_array_equal(found.gaps[:count], state.gaps[:count])
        assert (found.last_time, found.last_is_known) == (state.last_time, state.last_is_known)
        for one, other in zip(found.sketch, state.sketch, strict=True):
            np.testing.assert_array_equal(one, other)
        assert pack(found, bundle) == record


def test_record_head_agrees_with_the_whole_state(bundle: Bundle, states: list[State]) -> None:
    for state in states:
        head = read_head(pack(state, bundle)[: head_bytes(bundle.manifest.state)], bundle)
        assert (head.event_count, head.history_count) == (state.event_count, state.history_count)
        np.testing.assert_array_equal(head.user_embedding, state.user_embedding)


def test_size_of_a_record_is_known_from_the_number_of_events(bundle: Bundle, states: list[State]) -> None:
    shape = bundle.manifest.state
    for state in states:
        expected, size = record_bytes(state.event_count, shape), len(pack(state, bundle))
        assert size <= expected <= max_record_bytes(shape)
        assert shape.sketch_items or size == expected


def test_what_a_record_covers_is_read_without_its_bundle(bundle: Bundle, states: list[State]) -> None:
    for state in states:
        assert covered_events(pack(state, bundle)[:HEADER_BYTES]) == state.history_count
    record = pack(states[0], bundle)
    assert covered_events(record[: HEADER_BYTES - 1]) is covered_events(b"\x09" + record[1:]) is None


def test_record_that_lacks_events_says_how_many_and_is_else_the_same(bundle: Bundle, states: list[State]) -> None:
    for state in states:
        before = pack(state, bundle)
        record = pack(replace(state, lacking=7), bundle)
        assert (record[0], len(record)) == (3, len(before) + LACKING_BYTES)
        assert (lacks_events(before), lacks_events(record)) == (False, True)
        assert (lacking_events(before), lacking_events(record)) == (0, 7)
        assert covered_events(record[:HEADER_BYTES]) == state.history_count
        assert read_head(record, bundle).lacks and not read_head(before, bundle).lacks
        for read in (unpack, view):
            assert read(record, bundle).lacking == 7 and read(before, bundle).lacking == 0
        assert pack(replace(unpack(record, bundle), lacking=0), bundle) == before
        for broken in (record[:-1], record[:-LACKING_BYTES], b"\2" + record[1:], record + b"\0"):
            whole_refused(broken, bundle)
    assert lacking_events(pack(replace(states[-1], lacking=2**40), bundle)) == 2**32 - 1


def test_records_hold_no_more_than_their_model_needs(bundle: Bundle, states: list[State]) -> None:
    shape = bundle.manifest.state
    sizes = [len(pack(state, bundle)) for state in states]
    assert max(sizes) <= max_record_bytes(shape)
    for state, size in zip(states, sizes, strict=True):
        values = state.context_length * shape.width * (shape.layers - 1)
        values += state.memory.size if absorbed_segments(state.event_count, shape) else 0
        times = 9 + 9 * state.context_length if shape.sees_times else 0
        sketch = 4 + (36 if shape.sees_times else 28) * len(state.sketch.items) if shape.sketch_items else 0
        expected = head_bytes(shape) + 4 * state.context_length + np.dtype(shape.dtype).itemsize * values
        if shape.closed == "int8" and state.context_length >= shape.segment_length + shape.answers_read_states:
            vectors = shape.segment_length * (shape.layers - 1)
            expected -= vectors * (np.dtype(shape.dtype).itemsize * (shape.width - 1) - shape.width)
        assert size == expected + times + sketch


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_record_with_fewer_sketch_items_than_it_holds_is_refused(rows: int) -> None:
    """Even under a checksum that fits."""
    generation = generation_of(random_model(TIMED, TINY_ITEMS), "float16")
    (state,) = generation.replay([events_of(range(23))])
    record = bytearray(pack(state, generation.bundle))
    at = len(record) - 36 * 6 - 4
    assert record[at : at + 4] == (6).to_bytes(4, "little")
    record[at : at + 4] = rows.to_bytes(4, "little")
    whole_refused(with_checksums(record, generation.bundle), generation.bundle)


def with_checksums(record: bytearray, bundle: Bundle) -> bytes:
    """The record with checksums that fit what it holds."""
    head = head_bytes(bundle.manifest.state)
    record[head - 4 : head] = zlib.crc32(record[head:]).to_bytes(4, "little")
    record[32:36] = zlib.crc32(record[36:head], zlib.crc32(record[:32])).to_bytes(4, "little")
    return bytes(record)


def test_record_whose_checksums_are_made_again_is_read() -> None:
    """So the refusals above are not those of a checksum."""
    generation = generation_of(random_model(TIMED, TINY_ITEMS), "float16")
    record = pack(generation.replay([events_of(range(23))])[0], generation.bundle)
    assert with_checksums(bytearray(record), generation.bundle) == record
    changed = bytearray(record)
    changed[-1] ^= 1
    assert pack(unpack(with_checksums(changed, generation.bundle), generation.bundle), generation.bundle) != record


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


def test_record_takes_what_the_module_says() -> None:
    shape = state_shape(ModelConfig(time="request", returns="off"), "float16")
    sizes = sizes_of_records(shape, range(100))
    assert max(sizes) == max_record_bytes(shape) == 32 + 4 + 512 + 4 + 160 + 5200 + 10_240 + 6912 + 369
    assert max(sizes) == max(sizes[40:60]) == max(sizes[60:80])  # it does not grow with the history


@pytest.mark.parametrize(
    ("dtype", "recurrent", "largest"),
    [("float16", True, 15_812), ("float32", True, 30_916), ("float16", False, 10_612), ("float32", False, 20_596)],
)
def test_record_of_two_layers_takes_as_much_as_its_parts(dtype: str, recurrent: bool, largest: int) -> None:
    """T=20, m=10, D=128, and no times: twice the hidden states and memory in float32; 19 instead of 39 positions
    without recurrence."""
    shape = StateShape(segment_length=20, memory_slots=10, layers=2, width=128, recurrent=recurrent, dtype=dtype)
    sizes = sizes_of_records(shape, range(100))
    assert max(sizes) == max_record_bytes(shape) == largest
    assert max(sizes) == max(sizes[40:60]) == max(sizes[60:80])  # it does not grow with the history


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"times": "events"}, 360),
        ({"times": "request"}, 360 + 269),
        ({"sketch_items": 64}, 1796 + 260),
        ({"times": "request", "sketch_items": 64}, 360 + 269 + 1796 + 512),
    ],
    ids=["events", "request", "returns", "both"],
)
def test_times_and_sketch_take_what_the_module_says(options: dict[str, Any], more: int) -> None:
    """Beside the 15,812 B above; a segment that closes late has one position more: 4 + 256 B, and 9 B for its time."""
    shape = StateShape(
        segment_length=20, memory_slots=10, layers=2, width=128, recurrent=True, dtype="float16", **options
    )
    sizes = sizes_of_records(shape, range(100))
    assert max(sizes) == max_record_bytes(shape) == 15_812 + more
    assert max(sizes[:200]) == max(sizes[-20:])


def test_closed_segment_in_steps_takes_about_half() -> None:
    """20 vectors of 128 B and a float16 instead of 256 B each, in one cached layer."""
    shape = StateShape(
        segment_length=20, memory_slots=10, layers=2, width=128, recurrent=True, dtype="float16", closed="int8"
    )
    sizes = sizes_of_records(shape, range(100))
    assert max(sizes) == max_record_bytes(shape) == 15_812 - 20 * (256 - 130)


def sizes_of_records(shape: StateShape, items: Sequence[int]) -> list[int]:
    """Of one user, after each of 100 events at once of different items, and each of 100 more of the same."""
    bundle = bundle_of(shape, len(items))
    state, sizes = State.empty(bundle), []
    for item in (*items, *items):
        advance([state], [events_of([item], [10**9])], bundle=bundle, graphs=ZeroGraphs())
        sizes.append(len(pack(state, bundle)))
    return sizes
