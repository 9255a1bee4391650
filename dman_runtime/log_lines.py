"""How a log line looks, as text or as JSON, and how often the same line may come.

Callers give fields for programs as `extra`: `logger.error("...", extra={"event": "commit_failed", "user": user_id})`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}  # of every record
MAX_KEYS = 1000  # that a RateLimited remembers


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller gave as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in OWN_FIELDS}


def message_of(record: logging.LogRecord) -> str:
    """The message; also where its arguments do not fit, as a line about an error must not be lost to another."""
    try:
        return record.getMessage()
    except Exception:
        return f"{record.msg} {record.args!r}"


class TextFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER: MESSAGE key=value ...`, local time; an exception follows on its own lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_word(value)}" for name, value in extra_fields(record).items())
        return super().formatMessage(record) + fields


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC, milliseconds), level, logger, message, process and the extra fields.

    An exception is one string. The line is ASCII, so no reader takes a character in it for the end of a line.
    """

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        entry: dict[str, Any] = {
            "time": moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": message_of(record),
            "process": record.process,
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        extra = extra_fields(record)
        try:
            return json.dumps(
                entry | extra | entry, default=str, allow_nan=False
            )  # the caller replaces no field of ours
        except Exception:  # a value that JSON has no form for
            return json.dumps(entry | {name: _shown(value) for name, value in extra.items()} | entry)


def _word(value: object) -> str:
    """A value on a text line: in quotes if it would not read as one word."""
    text = _shown(value)
    return text if text.isprintable() and text and not set(text) & set(' "=') else json.dumps(text)


def _shown(value: object) -> str:
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__}>"


class RateLimited:
    """Writes at most one line per key and period, and with it how many it left out since the last one.

    For what outsiders or a full disk can cause any number of times. Safe for threads.
    """

    def __init__(
        self, logger: logging.Logger, *, every: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`every` is in seconds."""
        self._logger, self._every, self._clock = logger, every, clock
        self._lock = threading.Lock()
        self._last: dict[str, tuple[float, int]] = {}  # key -> time of its last line, lines left out since

    def log(self, level: int, key: str, message: str, *arguments: object, **options: Any) -> bool:
        """As `Logger.log`, for the lines with this key. Returns whether the line was written."""
        now = self._clock()
        with self._lock:
            written, left_out = self._last.get(key, (-float("inf"), 0))
            due = now - written >= self._every
            if due:
                self._last.pop(key, None)  # to the end: the first key is the one that was written longest ago
                if len(self._last) >= MAX_KEYS:
                    del self._last[next(iter(self._last))]
            self._last[key] = (now, 0) if due else (written, left_out + 1)
        if due:
            if left_out:
                message, arguments = f"{message} (and %d more like this before)", (*arguments, left_out)
                options["extra"] = {**(options.get("extra") or {}), "left_out": left_out}
            self._logger.log(level, message, *arguments, **options)
        return due

    def warning(self, key: str, message: str, *arguments: object, **options: Any) -> bool:
        return self.log(logging.WARNING, key, message, *arguments, **options)

    def error(self, key: str, message: str, *arguments: object, **options: Any) -> bool:
        return self.log(logging.ERROR, key, message, *arguments, **options)
