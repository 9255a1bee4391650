"""How events are read from a topic or a file, and what becomes of those that cannot be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dman_runtime.data.log_options import AUTO, option
from dman_runtime.errors import UsageError

MAX_BATCH_EVENTS, MAX_BATCH_MS = 10_000, 60_000
MAX_EVENT_BYTES = 64 << 10  # of one message


@dataclass(frozen=True)
class IngestOptions:
    """Raises UsageError, whose parameter is the field, for a value that cannot be meant."""

    event_format: Literal["auto", "json", "protobuf", "csv"] = option(
        AUTO, "what a message is; auto: JSON, and CSV with a header for a file whose name ends in .csv"
    )
    user_column: str = option("user_id", "key of the user id in a JSON object, or column of a CSV file")
    item_column: str = option("item_id", "key of the item id")
    time_column: str = option("timestamp", "key of the time; none: events have none")
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = option(
        AUTO, "unit of times that are numbers; auto: the one in which the time is between 1990 and the next year"
    )
    user_ids: Literal["auto", "text", "integer"] = option(AUTO, "what user ids are; auto: as the bundle decided")
    item_ids: Literal["auto", "text", "integer"] = option(AUTO, "what item ids are; auto: as the bundle decided")
    keys: Literal["user", "any"] = option(
        "user", "key of a message of a topic: the user id, or empty; any: it is not looked at"
    )
    bad_events: Literal["fail", "skip"] = option(
        "fail", "events that can never be stored, without --dead-letters: stop at the first, or log and leave them out"
    )
    dead_letters: str = option("", "topic, or for a file the file, that gets them instead, with the reason")
    batch_events: int = option(1000, "events that are stored in one commit at most")
    batch_ms: int = option(200, "milliseconds that an event waits for others at most")
    late_events: Literal["arrival", "drop", "place"] = option(
        "arrival", "events of before the end of their user's history, as for serve"
    )
    once: bool = option(False, "stop at the end of what is there at the start, instead of waiting for more")
    producer: str = option(
        "", "name by which repeats are recognised; without it, name and id of the topic, or the first line of the file"
    )
    position: str = option("", "file that holds the position in a file; without it, FILE.position beside that")
    group: str = option("dman", "consumer group whose offsets are committed")
    partitions: str = option("", "partitions to read, such as 0,3; without it, the group shares out all of them")
    start: Literal["earliest", "latest"] = option("earliest", "where a group begins that has no offset yet")
    kafka_options: str = option("", "file with further settings of librdkafka, `name=value` a line, such as for SASL")

    def __post_init__(self) -> None:
        for name, value, most in (
            ("batch_events", self.batch_events, MAX_BATCH_EVENTS),
            ("batch_ms", self.batch_ms, MAX_BATCH_MS),
        ):
            if not 1 <= value <= most:
                raise UsageError(f"{name} is {value}", f"choose 1 to {most}", parameter=name)
        for name in ("user_column", "item_column", "time_column", "group"):
            if not getattr(self, name):
                raise UsageError(f"{name} is empty", "give a name", parameter=name)
        self.listed_partitions()

    def listed_partitions(self) -> list[int]:
        """Those to read, ascending; none where the group decides."""
        words = [word.strip() for word in self.partitions.split(",")] if self.partitions else []
        if not all(word.isascii() and word.isdigit() for word in words):
            raise UsageError(f"partitions is {self.partitions!r:.60}", "list numbers, such as 0,3",
                             parameter="partitions")  # fmt: skip
        return sorted({int(word) for word in words})
