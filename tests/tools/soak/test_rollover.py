"""What a soak finds in records that are not the views of their histories."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dman_runtime.engine import Engine
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Update
from dman_runtime.store.base import Write
from dman_runtime.store.lmdb import LmdbStore
from tools.soak.exactly_once import TOLERANCE
from tools.soak.rollover import compare_records


def test_records_are_compared_with_what_they_cover(
    exact: Generation, exact_bundle: Path, renamed_bundle: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with LmdbStore.open(state, map_size=32 << 20) as store:
        engine = Engine(exact, store)
        engine.update([Update(user, [str(n) for n in range(1, 18)]) for user in ("anna", "ben", "cara")])
        (stored,) = store.get_many(["ben"], engine.projection.number)
        assert stored is not None
        lagging = Write("ben", stored.head.version, {}, np.array([3], np.uint32), np.array([0], np.int64))
        assert store.commit([lagging]) == []
    found = compare_records(state, exact_bundle)
    assert (len(found.errors), found.missing, found.lagging) == (3, 0, 1)
    assert max(found.errors) < 1e-4
    assert compare_records(state, renamed_bundle).missing == 3

    with LmdbStore.open(state) as store:
        engine = Engine(exact, store)
        (user,) = engine.open_users(["cara"])
        user.state.memory = user.state.memory + np.float32(5)
        records = {engine.projection.number: exact.pack(user.state)}
        assert store.commit([Write("cara", user.head.version, records, *user.new_events)]) == []
    assert max(compare_records(state, exact_bundle).errors) > TOLERANCE


@pytest.mark.parametrize("place", [0, -1])
def test_a_damaged_record_is_as_wrong_as_can_be(
    exact: Generation, exact_bundle: Path, tmp_path: Path, place: int
) -> None:
    state = tmp_path / "state"
    with LmdbStore.open(state, map_size=32 << 20) as store:
        engine = Engine(exact, store)
        engine.update([Update("anna", [str(n) for n in range(1, 18)])])
        (stored,) = store.get_many(["anna"], engine.projection.number)
        assert stored is not None and stored.record is not None
        record = bytearray(stored.record)
        record[place] ^= 1
        records, none = {engine.projection.number: bytes(record)}, (np.zeros(0, np.uint32), np.zeros(0, np.int64))
        assert store.commit([Write("anna", stored.head.version, records, *none)]) == []
    assert compare_records(state, exact_bundle).errors == [float("inf")]
