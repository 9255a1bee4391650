"""How a repeat of an update is recognised: by its request id, for a day, or by the sequence of its producer, for ever.

An update is a repeat if its id was applied to its user before, or if its sequence is at or below the last one of its
producer that was. The commit checks both again, so that of two workers one is first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dman_runtime.requests import Update, name_hash


class Mark(NamedTuple):
    """What a store remembers of an update, once it is applied."""

    request: int | None  # hash of its request id, or of that of its batch
    of_batch: bool  # all updates of a batch have the same one
    producer: int | None = None  # hash of its name
    sequence: int = 0


class Asked(NamedTuple):
    """What a store is asked about the updates of a user."""

    request_ids: list[int]
    producers: list[int]


NOTHING_ASKED: Mapping[str, Asked] = {}


def marks_of(updates: Sequence[Update], batch_id: str) -> list[Mark]:
    """Those of updates that are applied together; `batch_id` is "" for updates with ids of their own, or none."""
    batch = name_hash(batch_id) if batch_id else None
    return [
        Mark(
            batch if batch is not None else name_hash(one.request_id) if one.request_id else None,
            batch is not None,
            name_hash(one.producer) if one.producer else None,
            one.sequence or 0,
        )
        for one in updates
    ]


def asked_of(updates: Sequence[Update], marks: Sequence[Mark]) -> dict[str, Asked]:
    """What to ask the store, by user; nothing about users without any mark."""
    asked: dict[str, Asked] = {}
    for update, mark in zip(updates, marks, strict=True):
        if mark.request is not None:
            asked.setdefault(update.user_id, Asked([], [])).request_ids.append(mark.request)
        if mark.producer is not None:
            asked.setdefault(update.user_id, Asked([], [])).producers.append(mark.producer)
    return asked
