"""Records are compared with replays of the histories, in a store that a server has filled in pieces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from histories import Histories, make_histories, with_unknown_items

from dman_runtime.cli import main
from dman_runtime.engine import Engine
from dman_runtime.errors import UsageError
from dman_runtime.jobs.compacting import compact
from dman_runtime.jobs.replaying import verify_records
from dman_runtime.jobs.verifying import VerifyReport, verify_store
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Update
from dman_runtime.store.base import Write
from dman_runtime.store.lmdb import LmdbStore

HISTORIES: Histories = with_unknown_items(make_histories(12, seed=5))
NONE = np.zeros(0, np.int64)


@pytest.fixture
def state(exact: Generation, tmp_path: Path) -> Path:
    with LmdbStore.open(tmp_path / "state", map_size=64 << 20) as store:
        engine = Engine(exact, store)
        for user, events in HISTORIES.items():
            for start in range(0, len(events), 7):
                part = events[start : start + 7]
                engine.update([Update(str(user), [str(item) for item, _ in part], [time for _, time in part])])
    return tmp_path / "state"


def verify(state: Path, generation: Generation, *, sample: int = 100) -> VerifyReport:
    return verify_store(state, lambda store, problems: verify_records(store, generation, problems, sample=sample))


def put_record(state: Path, user_id: str, number: int, record: bytes) -> None:
    with LmdbStore.open(state, map_size=64 << 20) as store:
        (stored,) = store.get_many([user_id], number)
        assert stored is not None
        assert store.commit([Write(user_id, stored.head.version, {number: record}, NONE, NONE)]) == []


def test_records_of_a_sound_store_are_what_replays_give(state: Path, exact: Generation) -> None:
    report = verify(state, exact)
    assert report.problems == () and report.counts["records_read"] == report.counts["records_replayed"] == len(
        HISTORIES
    )
    assert verify(state, exact, sample=3).counts["records_replayed"] == 3
    compact(state, map_size=64 << 20)  # items that no history has lose their numbers
    assert verify(state, exact).problems == ()


def test_record_that_lags_is_compared_with_what_it_covers(state: Path, exact: Generation) -> None:
    with LmdbStore.open(state, map_size=64 << 20) as store:
        user_id = next(store.scan())
        (stored,) = store.get_many([user_id], 1)
        assert stored is not None
        assert store.commit([Write(user_id, stored.head.version, {}, np.arange(3), np.arange(3))]) == []
    assert verify(state, exact).problems == ()


def test_record_of_another_history_and_a_damaged_one_are_named(state: Path, exact: Generation) -> None:
    long = max(HISTORIES, key=lambda user: len(HISTORIES[user]))
    with LmdbStore.open(state, readonly=True) as store:
        (stored,) = store.get_many([str(long)], 1)
        assert stored is not None and stored.record is not None
    state_of = exact.unpack(stored.record)
    put_record(state, str(long), 1, exact.pack(replace(state_of, user_embedding=-state_of.user_embedding)))
    report = verify(state, exact)
    (problem,) = report.problems
    assert problem.startswith(f"user '{long}': the user embedding differs by ")
    put_record(state, str(long), 1, stored.record[:-1] + bytes([stored.record[-1] ^ 1]))
    assert verify_store(state).sound  # only the bundle says where the checksums of a record are
    assert verify(state, exact, sample=0).problems == (f"user '{long}': a state record is damaged",)


def test_bundle_that_the_store_does_not_know_is_refused(state: Path, renamed: Generation) -> None:
    with pytest.raises(UsageError, match="never served with bundle"):
        verify(state, renamed)


def test_command_replays(state: Path, exact_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(file.name for file in state.iterdir())
    assert main(["verify", "--state", str(state), "--bundle", str(exact_bundle), "--sample", "5"]) == 0
    assert "records read: 13\nrecords replayed: 5\n" in capsys.readouterr().out
    assert main(["verify", "--state", str(state), "--sample", "-1"]) == 2
    assert sorted(file.name for file in state.iterdir()) == files
