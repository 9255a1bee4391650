"""What every store refuses, whatever is behind it: a caller's values that break the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dman_runtime.data.added_items import checked_item
from dman_runtime.data.ids import INTEGER, RULE, TEXT, id_problem
from dman_runtime.errors import TooManyProducersError, TooManyRequestIdsError
from dman_runtime.store.base import UNKNOWN, IdTypes, Step, Write
from dman_runtime.store.catalogue import MAX_ADDED, Addition

MAX_PRODUCERS = 4096  # of one user
MAX_IDS, PERIOD_SECONDS = 100_000, 6 * 3600  # request ids of one user in so long


def checked_id(text: str) -> str:
    """The id itself. ValueError where it breaks the rule of `data.ids`."""
    if (problem := id_problem(text)) is not None:
        raise ValueError(f"{text!r:.80} {problem}; {RULE}")
    return text


def checked_numbers(numbers: Sequence[int] | NDArray[np.integer], item_count: int) -> list[int]:
    """Item numbers, ascending and distinct. ValueError for one that was never given."""
    distinct = sorted(set(np.asarray(numbers).tolist()))
    if distinct and not 0 <= distinct[0] <= distinct[-1] < item_count:
        raise ValueError(f"one of the items {distinct[:10]} was never given a number")
    return distinct


def check_additions(additions: Sequence[Addition], slots: int, item_count: int) -> None:
    """ValueError where items cannot be added to a catalogue that has so many already."""
    checked_numbers([one.number for one in additions], item_count)
    for one in additions:
        checked_item(one.item)
    if slots + len(additions) > MAX_ADDED:
        raise ValueError(f"{slots} items were added already, and {MAX_ADDED} are the most; train a bundle with them")


def checked_types(types: IdTypes) -> IdTypes:
    """The types themselves. ValueError for others than the three."""
    if any(kind not in (INTEGER, TEXT, UNKNOWN) for kind in types):
        raise ValueError(f"ids are {INTEGER!r}, {TEXT!r} or {UNKNOWN!r}, not {types!r:.80}")
    return types


def check_replacement(write: Write, stored_events: int) -> None:
    """ValueError where a write would shorten a history, or leave a gap in it."""
    if write.replace_from is None:
        return
    replaced = stored_events - write.replace_from
    if not 0 <= write.replace_from <= stored_events or len(write.items) < replaced:
        raise ValueError(
            f"user {write.user_id!r:.80} has {stored_events} events; "
            f"{len(write.items)} cannot replace {replaced} of them"
        )


def checked_writes(writes: Sequence[Write], item_count: int) -> None:
    """ValueError where a write holds what no store takes."""
    if len({write.user_id for write in writes}) != len(writes):
        raise ValueError("a user appears twice in one commit; merge the writes of one user")
    for write in writes:
        checked_id(write.user_id)
        if any(generation < 1 for generation in write.records):
            raise ValueError(f"generations are numbered from 1, not {sorted(write.records)}")
        for before, last in write.sequences.values():
            if not (-1 if before is None else before) < last < 1 << 64:
                raise ValueError(f"a sequence cannot go from {before} to {last}")
        _check_events(write.items, write.timestamps, item_count)
        _check_events(*write.shown, item_count)


def _check_events(numbers: NDArray[Any], times: NDArray[Any], item_count: int) -> None:
    items, timestamps = np.asarray(numbers), np.asarray(times)
    if items.ndim != 1 or items.shape != timestamps.shape:
        raise ValueError(f"items {items.shape} and timestamps {timestamps.shape} must be two lists of one length")
    if not len(items):
        return
    if items.dtype.kind not in "iu" or not np.can_cast(timestamps.dtype, np.int64):
        raise ValueError(f"items ({items.dtype}) must be integers and timestamps ({timestamps.dtype}) fit 64 bits")
    if items.max() >= item_count or (items.dtype.kind == "i" and items.min() < 0):
        raise ValueError(f"item numbers must be 0 to {item_count - 1}, not {items.min()} to {items.max()}")


def differ(found: Mapping[int, int], steps: Mapping[int, Step]) -> bool:
    """Whether some producer, of whom the last sequences are `found`, is not where a step of it begins."""
    return any(found.get(producer) != step.before for producer, step in steps.items())


def check_producers(user_id: str, sequences: Mapping[int, int]) -> None:
    """Raises TooManyProducersError."""
    if len(sequences) > MAX_PRODUCERS:
        raise too_many_producers(user_id)


def too_many_request_ids(user_id: str, limit: int) -> TooManyRequestIdsError:
    return TooManyRequestIdsError(
        f"user {user_id!r:.80} has more than {limit} updates with a request id in 6 hours",
        "send several events in one update, or wait",
    )


def check_positions(start: int, stop: int | None) -> None:
    """ValueError for negative ones, of a part of a history."""
    if start < 0 or (stop is not None and stop < 0):
        raise ValueError(f"positions must be 0 or more, not {start} to {stop}")


def too_many_producers(user_id: str) -> TooManyProducersError:
    return TooManyProducersError(
        f"user {user_id!r:.80} has updates of more than {MAX_PRODUCERS} producers",
        "name producers after logs or their partitions, not after processes or runs, or send a request_id instead",
    )
