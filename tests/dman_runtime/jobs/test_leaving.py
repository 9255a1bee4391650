"""Users who leave: their document holds all, and only who has been idle for long is deleted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from record_checks import HookedStore

from dman_runtime.cli import main
from dman_runtime.engine import Engine
from dman_runtime.errors import UsageError
from dman_runtime.jobs.leaving import DAY, Expired, expire, user_document
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Update
from dman_runtime.store.base import StateStore, Write
from dman_runtime.store.lmdb import LmdbStore

NOW = 1_800_000_000


def put(store: StateStore, user_id: str, times: list[int]) -> None:
    items = store.add_items([f"item {number}" for number in range(3)])
    (stored,) = store.get_many([user_id], 1)
    version = stored.head.version if stored else 0
    assert store.commit([Write(user_id, version, {}, np.resize(items, len(times)), np.array(times, np.int64))]) == []


def test_document_has_every_event_and_every_state(exact: Generation, renamed: Generation, store: StateStore) -> None:
    engine = Engine(exact, store)
    engine.update([Update("anna", ["7", "unknown", "8"], [5, 0, 9])])
    late = Engine(renamed, store)
    late.commit(late.open_users(["anna"]))
    document = user_document(store, "anna")
    assert document["user_id"] == "anna"
    assert document["events"] == [
        {"item_id": "7", "timestamp": 5},
        {"item_id": "unknown", "timestamp": 0},
        {"item_id": "8", "timestamp": 9},
    ]
    assert [(one["bundle_id"], one["covered_events"]) for one in document["states"]] == [
        (exact.bundle_id, 3),
        (renamed.bundle_id, 3),
    ]
    for user_id, cause in (("ben", "no user 'ben'"), ("", "is empty")):
        with pytest.raises(UsageError, match=cause):
            user_document(store, user_id)


def test_idle_users_are_deleted_and_others_kept(store: StateStore) -> None:
    put(store, "idle", [NOW - 20 * DAY, 0, NOW - 11 * DAY])
    put(store, "late", [NOW - 5 * DAY, NOW - 50 * DAY])  # the latest by time is not the last that came
    put(store, "untimed", [0, 0])
    put(store, "empty", [])
    expected = Expired(users=4, expired=1, events=3, untimed=2)
    assert expire(store, before=NOW - 10 * DAY, dry_run=True) == expected
    assert sorted(store.scan()) == ["empty", "idle", "late", "untimed"]
    assert expire(store, before=NOW - 10 * DAY) == expected
    assert sorted(store.scan()) == ["empty", "late", "untimed"]
    assert expire(store, before=NOW - 10 * DAY) == Expired(users=3, untimed=2)


def test_user_who_comes_back_meanwhile_is_kept(store: StateStore) -> None:
    put(store, "idle", [NOW - 20 * DAY])

    class Busy(HookedStore):
        def delete(self, user_id: str, **options: int) -> int | None:
            put(store, user_id, [NOW])
            return store.delete(user_id, **options)

    assert expire(Busy(store, lambda _: None), before=NOW - 10 * DAY) == Expired(users=1)  # type: ignore[arg-type]
    assert len(store.history("idle")[0]) == 2


def test_commands_export_and_expire(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = str(tmp_path / "state")
    with LmdbStore.open(state) as store:
        put(store, "anna", [int(time.time())])
        put(store, "ben", [1000, 0])
    assert main(["export-user", "ben", "--state", state]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [event["timestamp"] for event in document["events"]] == [1000, 0] and document["states"] == []
    assert main(["expire", "--idle-days", "30", "--state", state, "--dry-run"]) == 0
    assert capsys.readouterr().out == "would delete 1 of 2 users with 2 events\n"
    assert main(["expire", "--idle-days", "30", "--state", state, "--json"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == "deleted 1 of 2 users with 2 events" and json.loads(last)["expired"] == 1
    for arguments in (["export-user", "ben"], ["expire", "--idle-days", "0"], ["expire", "--idle-days", "nan"]):
        assert main([*arguments, "--state", state]) == 2
        assert capsys.readouterr().err.startswith("error: ")
