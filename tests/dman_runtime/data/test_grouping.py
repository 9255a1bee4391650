"""Orders and codes of the grouping, compared with NumPy's general sorts and with plain Python."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dman_runtime.data.grouping import exact_repeats, in_order_of_appearance, in_order_of_value, stable_order
from dman_runtime.data.hash_counts import HashCounts

INT64 = st.integers(-(2**63), 2**63 - 1)
KEYS = st.one_of(st.integers(-3, 3), st.integers(1_600_000_000, 1_700_000_000), INT64)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_stable_order_is_that_of_lexsort(data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 60))
    kind = data.draw(st.sampled_from([st.integers(-3, 3), KEYS]))
    keys = [data.draw(arrays.arrays(np.int64, rows, elements=kind)) for _ in range(data.draw(st.integers(0, 2)))]
    users = data.draw(arrays.arrays(np.int32, rows, elements=st.integers(0, 5)))
    found = stable_order(keys, users)
    expected = np.lexsort((*reversed(keys), users))
    assert (np.arange(rows) if found is None else found).tolist() == expected.tolist()


IDS = st.one_of(
    st.lists(st.integers(-5, 5)),
    st.lists(INT64),
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=3)),
)


@settings(max_examples=200, deadline=None)
@given(ids=IDS, cut=st.integers(0, 10))
def test_codes_are_those_of_a_dictionary(ids: list[int] | list[str], cut: int) -> None:
    kind = pa.int64() if ids and isinstance(ids[0], int) else pa.string()
    chunks = pa.chunked_array([pa.array(ids[:cut], kind), pa.array(ids[cut:], kind)])
    distinct, codes = in_order_of_appearance(chunks)
    assert distinct.to_pylist() == list(dict.fromkeys(ids))
    assert [distinct[code].as_py() for code in codes.tolist()] == ids
    texts, codes = in_order_of_value(chunks, integers=kind == pa.int64())
    assert texts == list(map(str, sorted(set(ids))))
    assert [texts[code] for code in codes.tolist()] == list(map(str, ids))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=8), max_size=4
    )
)
def test_exact_repeats_are_all_but_the_first_of_equal_events(users: list[list[tuple[int, int, int]]]) -> None:
    users = [sorted(history, key=lambda event: event[1:]) for history in users]
    offsets = np.cumsum([0, *map(len, users)])
    events = [event for history in users for event in history]
    items, *times = (np.array([event[n] for event in events], np.int64) for n in range(3))
    found = exact_repeats(offsets, items, times)
    expected = [event in history[:place] for history in users for place, event in enumerate(history)]
    assert (np.zeros(len(events), bool) if found is None else found).tolist() == expected


@given(st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5))))
def test_tally_counts_each_hash(batches: list[list[int]]) -> None:
    tally = HashCounts()
    for batch in batches:
        tally.add(np.array(batch, np.uint64))
    everything = [one for batch in batches for one in batch]
    assert tally.counts().tolist() == [everything.count(one) for one in sorted(set(everything))]


@pytest.mark.slow
def test_tally_of_many_batches_stays_small() -> None:
    tally = HashCounts()
    random = np.random.default_rng(0)
    for _ in range(50):
        tally.add(random.integers(0, 100_000, 100_000).astype(np.uint64))
        assert tally._new_size <= max(1 << 20, 2 * 100_000) + 100_000
    assert tally.counts().sum() == 5_000_000
