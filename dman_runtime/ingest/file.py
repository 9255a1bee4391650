"""A file of lines that grows: JSON lines, or CSV with a header.

The file is known by its first event: the bytes up to the end of that line. So it may be renamed or copied and keeps its
place, and another file under its name is another one. Its `sequence` is the byte at which a line begins.

A line counts when its end is there. A file that is replaced or cut while it is followed is an error, behind the last
line of the old one: what the writer did meanwhile is not known here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dman_runtime.errors import SourceError, SourceUnavailableError, UsageError
from dman_runtime.ingest.base import Message, Rejected
from dman_runtime.ingest.dead_letters import DeadLetterFile
from dman_runtime.ingest.events import UnusableError, csv_row
from dman_runtime.ingest.options import MAX_EVENT_BYTES

logger = logging.getLogger(__name__)
CHUNK_BYTES = 1 << 20  # read at a time
BEFORE_BYTES = 4096  # before a position, of which a hash is kept with it
LOOK_SECONDS = 0.05  # between looks for new lines
_BOM = b"\xef\xbb\xbf"


class FileSource:
    """A `Source` with one partition, 0. Raises UsageError, SourceError."""

    unit = "bytes"

    def __init__(
        self,
        path: Path,
        *,
        position: Path,
        header: bool = False,
        producer: str = "",
        once: bool = False,
        dead_letters: Path | None = None,
    ) -> None:
        """`header`: the first line names the columns. `position` holds the position and is made where it is missing.
        `producer` is a name for the file instead of its first event. With `once`, the end is that of now.
        """
        try:
            self._file: BinaryIO = path.open("rb", buffering=0)
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror})", "check the path", parameter="from") from None
        self.leaving: Callable[[Collection[int]], None] = lambda _partitions: None
        self._path, self._position, self._named = path, position, producer
        self._end = self._size() if once else None
        self._has_header, self._header = header, list[str]()
        self._first = b""  # the bytes up to the end of the first event; none as long as there is none
        self._producer = ""
        self._at = self._settled = 0  # read to; committed to
        self._scanned = 0  # a long line has no end up to here
        self._ahead = deque[Message]()
        self._over = False
        try:
            self._dead_letters = DeadLetterFile(dead_letters, str(path)) if dead_letters else None
            self._identify()
        except SourceError:
            self._file.close()
            raise

    def header(self) -> list[str]:
        """The names of the columns, once a line was read."""
        return self._header

    # -- which file it is ------------------------------------------------------------------------------------------

    def _identify(self) -> None:
        """Finds the first event, and then the place to go on. Nothing is read before."""
        start, end = os.pread(self._file.fileno(), CHUNK_BYTES, 0), 0
        for line in _lines_of(start):
            end += len(line)
            if not _is_blank(line) and self._has_header and not self._header:
                self._header, self._at = self._names(line), end
            elif not _is_blank(line):
                break
        else:
            if len(start) == CHUNK_BYTES:
                raise SourceError(f"{self._path} has no event in its first MiB", "check that it is a file of events")
            self._header, self._at = [], 0
            return
        self._first = start[:end]
        self._producer = self._named or f"file:{self._identity}"
        self._at = self._settled = max(self._at, self._stored_position())

    def _names(self, line: bytes) -> list[str]:
        try:
            return [name.strip() for name in csv_row(line.removeprefix(_BOM))]
        except UnusableError as error:
            raise SourceError(f"{self._path}, header: {error}", "check that it is a CSV file") from None

    @property
    def _identity(self) -> str:
        return _hash(self._first)

    def _before(self, position: int) -> str:
        """What stands before a position, so that another content is noticed."""
        size = min(position, BEFORE_BYTES)
        return _hash(os.pread(self._file.fileno(), size, position - size))

    def _stored_position(self) -> int:
        found = self._read_position()
        if found is None:
            return 0
        same = found.get("first_event") == self._identity
        if not same and self._named and found.get("producer") == self._named:
            raise SourceError(
                f"{self._path} is not the file whose position is in {self._position}: it begins with another event",
                f"give it another name than {self._named!r:.80}, or put the former file back",
                parameter="producer",
            )
        if not same:
            logger.warning("%s is of another file; %s is read from its beginning", self._position, self._path)
            return 0
        position: int = found["position"]
        if position > self._size() or found.get("before") != self._before(position):
            raise self._cut(position)
        return position

    def _read_position(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._position.read_bytes())
            if isinstance(found["position"], int) and found["position"] >= 0:
                return dict(found)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        logger.warning("%s holds no position; %s is read from its beginning", self._position, self._path)
        return None

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _cut(self, position: int) -> SourceError:
        return SourceError(
            f"{self._path} was cut or changed: of the {position} bytes that were read, not all are there any more",
            "let the writer begin a new file: what stands in this one now cannot be told from what was stored; what "
            "was removed before it was read is lost",
        )

    def _check_content(self) -> None:
        """Raises SourceError where what was read is not there any more."""
        if os.pread(self._file.fileno(), len(self._first), 0) != self._first:
            raise SourceError(
                f"{self._path} was written anew; it was read up to byte {self._at}",
                "start again to read what is there now; what was removed before it was read is lost",
            )
        if self._size() < self._at:
            raise self._cut(self._at)

    def _check_path(self) -> None:
        """Raises SourceError where another file, or none, has the name."""
        own = os.fstat(self._file.fileno())
        try:
            there = self._path.stat()
            if (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino):
                return
        except OSError:
            pass
        raise SourceError(
            f"{self._path} was renamed or removed, behind its byte {self._at}",
            "start again for the file that has the name now; if the old one has grown since, read it first, "
            "where it is now",
        )

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, count: int, seconds: float) -> Sequence[Message]:
        deadline = time.monotonic() + seconds
        while not self._ahead:
            try:
                self._read_lines()
            except OSError as error:
                raise SourceUnavailableError(
                    f"{self._path} cannot be read ({error.strerror})", "check the disk and its mount", parameter="from"
                ) from error
            left = deadline - time.monotonic()
            if self._ahead or self.ended:
                break
            self._check_path()
            if left <= 0:
                break
            time.sleep(min(LOOK_SECONDS, left))
        return [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]

    def _read_lines(self) -> None:
        """Reads on, as far as lines are complete."""
        self._check_content()
        if not self._first:
            self._identify()
        before = self._at
        stop = self._size() if self._end is None else self._end
        data = os.pread(self._file.fileno(), min(CHUNK_BYTES, max(0, stop - self._at)), self._at)
        lines = _lines_of(data) if self._first else []
        for line in lines:
            self._take(line)
        if not lines and len(data) == CHUNK_BYTES:
            self._take_long_line(data, stop)
        if self._end is not None and self._at == before:
            self._over = True
            if self._at < self._end:
                logger.warning("%s: the last line, from byte %d on, has no end; it was left", self._path, self._at)

    def _take(self, line: bytes) -> None:
        start, value = self._at, line.rstrip(b"\r\n")
        self._at += len(line)
        if not _is_blank(line):
            value = value if start else value.removeprefix(_BOM)
            self._ahead.append(Message(self._producer, 0, start, self._at, None, value))
        elif self._ahead:
            self._ahead[-1] = self._ahead[-1]._replace(after=self._at)

    def _take_long_line(self, data: bytes, stop: int) -> None:
        """A line longer than a chunk, which is no event: its beginning, once its end is there."""
        self._scanned = max(self._scanned, self._at + len(data))
        while self._scanned < stop:
            more = os.pread(self._file.fileno(), min(CHUNK_BYTES, stop - self._scanned), self._scanned)
            end = more.find(b"\n") + 1
            self._scanned += end or len(more)
            if end:
                start, self._at = self._at, self._scanned
                self._ahead.append(Message(self._producer, 0, start, self._at, None, data[: MAX_EVENT_BYTES + 1]))
                return

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    @property
    def ended(self) -> bool:
        return self._over and not self._ahead

    # -- what becomes of it ----------------------------------------------------------------------------------------

    def reject(self, rejected: Sequence[Rejected]) -> None:
        if self._dead_letters is not None:
            self._dead_letters.put(rejected)

    def commit(self, positions: Mapping[int, int]) -> None:
        """Not synced: a position that a power loss takes is read again."""
        if 0 not in positions:
            return
        new, position = self._position.with_name(f".{self._position.name}.new"), positions[0]
        content = {"producer": self._producer, "first_event": self._identity, "position": position}
        try:
            new.write_text(json.dumps(content | {"before": self._before(position)}) + "\n", encoding="utf-8")
            new.replace(self._position)
        except OSError as error:
            raise SourceUnavailableError(
                f"the position {self._position} cannot be written ({error.strerror})",
                "check the path, its permissions and the disk",
                parameter="position",
            ) from error
        self._settled = position

    def place(self, message: Message) -> str:
        return f"{self._path}, byte {message.sequence}"

    def lags(self) -> Mapping[str, int]:
        return {str(self._path): max(0, (self._size() if self._end is None else self._end) - self._settled)}

    def close(self) -> None:
        self._file.close()


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _lines_of(data: bytes) -> list[bytes]:
    """The complete lines, with their ends."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def _is_blank(line: bytes) -> bool:
    return not line.removeprefix(_BOM).strip(b"\r\n \t")
