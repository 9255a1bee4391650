"""Users who leave: all that is stored of one as a document, and the deletion of those who have been idle for long."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from dman_runtime.data.ids import id_problem
from dman_runtime.errors import UsageError
from dman_runtime.model.record import HEADER_BYTES, covered_events, lacking_events
from dman_runtime.store.base import StateStore

DAY = 24 * 3600  # seconds


@dataclass
class Expired:
    """What became of the users of a store."""

    users: int = 0  # there were
    expired: int = 0  # deleted, or to be deleted
    events: int = 0  # of those
    untimed: int = 0  # kept, as no time of any of their events is known

    def summary(self, *, dry_run: bool) -> str:
        """For people."""
        verb = "would delete" if dry_run else "deleted"
        text = f"{verb} {self.expired} of {self.users} users with {self.events} events"
        return f"{text}; kept {self.untimed} users without any known time" if self.untimed else text


def user_document(store: StateStore, user_id: str) -> dict[str, Any]:
    """All that is stored of a user, of one moment, as JSON can hold it. Raises UsageError, StoreError."""
    if (problem := id_problem(user_id)) is not None:
        raise UsageError(f"user id {user_id!r:.80} {problem}", "give the id of a stored user")
    generations = store.generations()
    with store.snapshot() as snapshot:
        (stored,) = snapshot.get_many([user_id], 0)  # no generation has this number
        shown, until = snapshot.shown(user_id)
        if stored is None and not len(shown):
            raise UsageError(f"no user {user_id!r}", "check the id, and that this is its store")
        items, times = snapshot.history(user_id)
        item_ids, shown_ids = snapshot.item_ids(items), snapshot.item_ids(shown)
        records = {
            bundle_id: found.record
            for bundle_id, number in generations.items()
            if (found := snapshot.get_many([user_id], number)[0]) and found.record is not None
        }
    return {
        "user_id": user_id,
        "events": [
            {"item_id": item_id, "timestamp": time} for item_id, time in zip(item_ids, times.tolist(), strict=True)
        ],
        "states": [
            {
                "bundle_id": bundle_id,
                "bytes": len(record),
                "covered_events": covered_events(record[:HEADER_BYTES]),
                "deferred_events": lacking_events(record),
            }
            for bundle_id, record in records.items()
        ],
        "shown": [
            {"item_id": item_id, "until": moment} for item_id, moment in zip(shown_ids, until.tolist(), strict=True)
        ],
    }


def document_text(document: dict[str, Any]) -> str:
    """As JSON, readable."""
    return json.dumps(document, ensure_ascii=False, indent=1)


def expire(store: StateStore, *, before: int, dry_run: bool = False) -> Expired:
    """Deletes the users whose latest event is of before a moment, in seconds since 1970; servers may go on.

    A user who is changed meanwhile is kept. Raises StoreError.
    """
    result = Expired()
    for user_id in store.scan():
        with store.snapshot() as snapshot:
            (stored,) = snapshot.get_many([user_id], 0)
            times = snapshot.history(user_id)[1] if stored else np.zeros(0, np.int64)
        if stored is None:
            continue
        result.users += 1
        known = times[times != 0]
        if not len(known):
            result.untimed += 1
        elif known.max() < before:
            version = stored.head.version
            if dry_run or store.delete(user_id, expected_version=version) is not None:
                result.expired += 1
                result.events += len(times)
    return result
