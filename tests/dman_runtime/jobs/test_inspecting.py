"""What `inspect` shows: a bundle, a store, and a user as a server would see them now."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, TINY_ITEMS, events_of
from histories import UNKNOWN_ITEM, Histories
from log_files import import_log

from dman_runtime.engine import Engine
from dman_runtime.errors import StoreMismatchError, StoreUnavailableError, UsageError
from dman_runtime.jobs.inspecting import RECENT_EVENTS, inspect_bundle, inspect_store, inspect_user
from dman_runtime.model.generation import Generation
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_layout import FORMAT_VERSION


@pytest.fixture(scope="module")
def state(exact: Generation, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspecting") / "state"
    with LmdbStore.open(path, map_size=64 << 20) as store:
        import_log(log, Engine(exact, store))
    return path


def test_bundle_shows_its_manifest(exact: Generation, exact_bundle: Path) -> None:
    shown = inspect_bundle(exact_bundle)
    assert (shown["bundle_id"], shown["items"], shown["format_version"]) == (exact.bundle_id, TINY_ITEMS, 1)
    assert shown["model"]["segment_length"] == shown["state"]["segment_length"] == TINY.segment_length
    assert shown["bytes"] == sum(path.stat().st_size for path in exact_bundle.iterdir() if path.suffix != ".json")


def test_store_shows_its_counts_and_generations(exact: Generation, state: Path) -> None:
    shown = inspect_store(state)
    assert (shown["format_version"], shown["generations"]) == (FORMAT_VERSION, [exact.bundle_id])
    assert (shown["users"], shown["items"]) == (25, TINY_ITEMS + 2)
    assert 0 < shown["bytes_used"] <= shown["file_bytes"]


def test_user_shows_the_state_and_the_last_events(
    exact: Generation, exact_bundle: Path, state: Path, mixed_histories: Histories, histories: Histories
) -> None:
    user = max(histories, key=lambda user: len(histories[user]))
    shown = inspect_user(exact_bundle, state, str(user))
    events = mixed_histories[user]
    (expected,) = exact.replay([events_of([item - 1 for item, _ in histories[user]])])
    assert (shown["user_id"], shown["bundle_id"]) == (str(user), exact.bundle_id)
    assert (shown["event_count"], shown["history_count"]) == (len(events) - 1, len(events))
    assert shown["record_is_current"] is True and shown["deferred_events"] == 0
    assert shown["state_bytes"] == len(exact.pack(expected))
    assert shown["context_positions"] == expected.context_length
    assert shown["user_embedding_norm"] == pytest.approx(np.linalg.norm(expected.user_embedding), rel=1e-4)
    assert np.shape(shown["memory_slot_norms"]) == (TINY.layers, TINY.memory_slots)
    recent = [(int(event["item_id"]), event["timestamp"]) for event in shown["recent_events"]]
    assert recent == events[-RECENT_EVENTS:] and len(events) > RECENT_EVENTS
    assert shown["recent_events"][-1]["title"] == f"Title {events[-1][0]}"


def test_user_shows_events_of_unknown_items_without_a_title(
    exact_bundle: Path, state: Path, histories: Histories
) -> None:
    user = min(histories, key=lambda user: len(histories[user]))
    second = inspect_user(exact_bundle, state, str(user))["recent_events"][1]
    assert (second["item_id"], second["title"]) == (str(UNKNOWN_ITEM), "")


def test_user_is_shown_as_caught_up_and_nothing_is_written(
    exact_bundle: Path, exact: Generation, renamed: Generation, renamed_bundle: Path, log: Path, tmp_path: Path
) -> None:
    with LmdbStore.open(tmp_path / "state", map_size=64 << 20) as store:
        import_log(log, Engine(exact, store))
        Engine(renamed, store)  # served, so that its items have numbers; no record is made
    before = (tmp_path / "state" / "data.mdb").read_bytes()
    shown = inspect_user(renamed_bundle, tmp_path / "state", "1")
    assert shown["record_is_current"] is False
    assert shown["event_count"] > 0 and shown["bundle_id"] == renamed.bundle_id
    assert inspect_user(exact_bundle, tmp_path / "state", "1")["record_is_current"] is True
    assert (tmp_path / "state" / "data.mdb").read_bytes() == before


def test_what_is_not_there_is_refused(exact_bundle: Path, tiny_bundle: Path, state: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no user 'nobody'"):
        inspect_user(exact_bundle, state, "nobody")
    with pytest.raises(UsageError, match="is empty"):
        inspect_user(exact_bundle, state, "")
    with pytest.raises(StoreMismatchError, match="was never served with bundle"):
        inspect_user(tiny_bundle, state, "1")
    with pytest.raises(StoreUnavailableError, match="does not exist"):
        inspect_store(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
