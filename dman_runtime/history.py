"""Reads the history of a user in parts. The history needs no model, so neither does this."""

from __future__ import annotations

from dataclasses import dataclass

from dman_runtime.errors import RequestError
from dman_runtime.requests import MAX_EVENTS, check_user_id
from dman_runtime.store.base import StateStore


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """A part of a history, of one moment."""

    history_count: int  # events stored, in this part or not
    item_ids: list[str]  # (n) oldest first
    timestamps: list[int]  # (n) seconds since the epoch, 0 unknown


def history_page(store: StateStore, user_id: str, *, start: int = 0, limit: int = MAX_EVENTS) -> HistoryPage | None:
    """The stored events of a user from position `start` on, or None for an unknown user.

    Raises RequestError, StoreError.
    """
    check_user_id(user_id)
    if start < 0 or not 1 <= limit <= MAX_EVENTS:
        raise RequestError(
            f"start is {start} and limit is {limit}", f"choose a start of 0 or more and a limit of 1 to {MAX_EVENTS}"
        )
    with store.snapshot() as snapshot:
        (stored,) = snapshot.get_many([user_id], 0)  # no generation has this number: no record is read
        if stored is None:
            return None
        count = stored.head.history_count
        items, timestamps = snapshot.history(user_id, min(start, count), min(start + limit, count))
        return HistoryPage(count, snapshot.item_ids(items), timestamps.tolist())
