"""What has been read of a user of a Redis-protocol store, and the commands that read it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dman_runtime.errors import ConflictError
from dman_runtime.store.base import Expected
from dman_runtime.store.history import DamagedError
from dman_runtime.store.redis_layout import WORD, UserKeys, back, front
from dman_runtime.store.redis_servers import Command


@dataclass(slots=True)
class Known:
    """What a snapshot has read of a user. Values of None were not asked for, empty ones are not there."""

    head: bytes
    epoch: bytes
    seen: bytes | None = None
    fronts: dict[int, bytes] = field(default_factory=dict)
    backs: dict[int, bytes] = field(default_factory=dict)
    shown: bytes | None = None
    applied: set[int] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)
    sequences: dict[int, int | None] = field(default_factory=dict)


def reading(
    keys: UserKeys, user_id: str, known: Known | None, wanted: Expected, into: dict[str, Known]
) -> Iterable[tuple[Command, Callable[[object], None]]]:
    """The commands that read what is wanted of a user, the head first, and what takes their answers."""
    generation, seen = wanted.generation, wanted.ranking
    fields = [b"h", b"e", *([b"s"] if seen else ()), *([front(generation)] if generation > 0 else ())]
    fields += [back(generation)] if generation > 0 and wanted.whole else []

    def take(answer: object) -> None:
        values = iter(list(answer))  # type: ignore[call-overload]
        head, epoch = next(values) or b"", next(values) or b""
        one = into.get(user_id)
        if one is None:
            one = into[user_id] = Known(head, epoch)
        elif one.head != head:  # what was read belongs to another moment than what is read now
            raise ConflictError("the user was changed while it was read", "try again")
        if seen:
            one.seen = next(values) or b""
        if generation > 0:
            one.fronts[generation] = next(values) or b""
            if wanted.whole:
                one.backs[generation] = next(values) or b""

    yield Command(keys.user, ("HMGET", keys.user, *fields)), take
    if wanted.ranking:

        def take_shown(answer: object) -> None:
            into[user_id].shown = answer or b""  # type: ignore[assignment]

        yield Command(keys.shown, ("GET", keys.shown)), take_shown
    if wanted.request_ids:  # behind the head: what was applied by the moment of that is found

        def take_ids(answer: object) -> None:
            one = into[user_id]
            one.asked |= set(wanted.request_ids)
            scores = zip(wanted.request_ids, list(answer), strict=True)  # type: ignore[call-overload]
            one.applied |= {request_id for request_id, score in scores if score is not None}

        yield Command(keys.requests, ("ZMSCORE", keys.requests, *map(WORD.pack, wanted.request_ids))), take_ids

    if wanted.producers:

        def take_sequences(answer: object) -> None:
            values = zip(wanted.producers, list(answer), strict=True)  # type: ignore[call-overload]
            into[user_id].sequences |= {one: unpack_word(value) if value else None for one, value in values}

        yield Command(keys.sequences, ("HMGET", keys.sequences, *map(WORD.pack, wanted.producers))), take_sequences


def lacks(known: Known, wanted: Expected) -> bool:
    generation = wanted.generation
    return (
        (generation > 0 and generation not in known.fronts)
        or (generation > 0 and wanted.whole and generation not in known.backs)
        or (wanted.ranking and known.seen is None)
    )


def unpack_word(value: bytes) -> int:
    try:
        return int(WORD.unpack(value)[0])
    except struct.error as error:
        raise DamagedError("a number is damaged") from error
