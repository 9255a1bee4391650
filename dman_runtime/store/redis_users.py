"""How a Redis-protocol store writes one user: the arguments of the function `commit`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dman_runtime.errors import TooManyProducersError, TooManyRequestIdsError
from dman_runtime.store import checks
from dman_runtime.store.base import MAX_SHOWN, NOTHING_SHOWN, REMEMBER_SECONDS, Head, Write
from dman_runtime.store.changes import NOBODY, changed_history
from dman_runtime.store.history import (
    StoredHead,
    events_of,
    pack_head,
    pack_record,
    pack_shown,
    seed_of,
    unpack_head,
    version_of,
)
from dman_runtime.store.redis_functions import call
from dman_runtime.store.redis_layout import IDS_EXPIRE_SECONDS, WORD, Keys, record_fields
from dman_runtime.store.redis_reads import read_chunks
from dman_runtime.store.redis_servers import Command, Servers
from dman_runtime.store.shown import joined_shown, unpacked_shown


class Change:
    """A write, as it is sent. Its token becomes the version, so that it can be sent again, also by a later call: who
    finds that version stored knows that it was."""

    def __init__(self, servers: Servers, keys: Keys, write: Write, head: bytes, now: float) -> None:
        """`head` is the stored one of the expected version, empty for a new user. Reads what else it needs.

        Raises ValueError, StoreError.
        """
        self.write, self.head = write, head
        self._servers, self._keys, self._now = servers, keys, now
        self._user = write.user_id.encode()
        self._of_user = keys.of_user(self._user)
        self._version = write.token
        self._seed = seed_of(self._user)
        with servers.errors():
            arguments: list[Any] = [*self._versions()]
            if version_of(head) != write.token:  # else it was stored before, and that is all that the servers look at
                arguments += [*self._steps(), *self._shown(), *self._ids(), *self._fields()]
        named = (self._of_user.user, self._of_user.chunks, self._of_user.sequences, self._of_user.requests)
        self.command = Command(self._of_user.user, call("commit", [*named, self._of_user.shown], *arguments))

    def _versions(self) -> Iterable[bytes]:
        return self.head[:8], WORD.pack(self._version)

    def _steps(self) -> Iterable[bytes | int]:
        yield checks.MAX_PRODUCERS
        yield len(self.write.sequences)
        for producer, (before, last) in self.write.sequences.items():
            yield from (WORD.pack(producer), b"" if before is None else WORD.pack(before), WORD.pack(last))

    def _shown(self) -> Iterable[bytes | int]:
        if not len(self.write.shown[0]):
            return b"", b"", 0
        stored = self._servers.one(self._of_user.shown, "GET", self._of_user.shown) or b""
        before = unpacked_shown(self._user, stored) if stored else NOTHING_SHOWN
        items, until = joined_shown(before, self.write.shown, self._now)
        assert len(items) <= MAX_SHOWN
        return stored, pack_shown(events_of(items, until), self._seed), max(1, int(until.max() - self._now) + 1)

    def _ids(self) -> Iterable[bytes | str | int]:
        yield from (repr(self._now), repr(self._now - REMEMBER_SECONDS), repr(self._now - checks.PERIOD_SECONDS))
        yield from (checks.MAX_IDS, IDS_EXPIRE_SECONDS)
        ids = list(dict.fromkeys(self.write.request_ids))
        yield len(ids)
        yield from map(WORD.pack, ids)

    def _fields(self) -> Iterable[bytes | int]:
        write = self.write
        if write.only_shows:
            return 0, 0, 0
        before = unpack_head(self.head, self._seed, False) if self.head else NOBODY
        changed = changed_history(before, write, self._seed, chunks=self._read_chunks, seen=self._read_seen)
        version = WORD.pack(self._version)
        after = Head(self._version, changed.history_count, max(write.records, default=before.head.generation))
        self.head = pack_head(StoredHead(after, changed.tail), self._seed)
        fields = {b"h": self.head}
        if not before.head.version:
            fields |= {b"i": self._user, b"e": version}
        elif write.replace_from is not None:
            fields[b"e"] = version
        if changed.seen is not None:
            fields[b"s"] = changed.seen
        for generation, record in write.records.items():
            fields |= record_fields(generation, pack_record(record, self._seed, generation))
        chunks = {b"%d" % number: value for number, value in changed.chunks.items()}
        return int(write.replace_from is not None), len(fields), *_flat(fields), len(chunks), *_flat(chunks)

    def _read_chunks(self, first: int, last: int) -> list[NDArray[np.void]]:
        if first >= last:
            return []
        key = self._of_user.user
        epoch = self._servers.one(key, "HGET", key, b"e") or b""
        return read_chunks(self._servers, self._keys, self._user, epoch, first, last)

    def _read_seen(self) -> bytes:
        key = self._of_user.user
        return self._servers.one(key, "HGET", key, b"s") or b""

    def problem(self, answer: int) -> TooManyProducersError | TooManyRequestIdsError | None:
        """Why the servers refused the change, if they did."""
        if answer == -1:
            return checks.too_many_producers(self.write.user_id)
        if answer == -2:
            return checks.too_many_request_ids(self.write.user_id, checks.MAX_IDS)
        return None


def _flat(fields: dict[bytes, bytes]) -> Iterable[bytes]:
    for name, value in fields.items():
        yield from (name, value)
