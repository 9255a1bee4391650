"""Messages become events by the rules of a log that is imported, or say why they are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from log_files import histories

from dman_runtime.data.ids import INTEGER, TEXT
from dman_runtime.data.log_options import ANY_LOG
from dman_runtime.data.logs import read_interactions
from dman_runtime.errors import DmanError, UsageError
from dman_runtime.ingest.base import Message
from dman_runtime.ingest.events import (
    Event,
    EventReader,
    UnusableError,
    csv_fields,
    json_fields,
    protobuf_fields,
    seconds_of,
)
from dman_runtime.ingest.options import MAX_EVENT_BYTES, IngestOptions
from protos.dman.v1 import dman_pb2 as pb

DEFAULT = IngestOptions()


def message(value: bytes | None, key: bytes | None = None) -> Message:
    return Message("log", 0, 7, 8, key, value)


def read(value: Any, *, key: bytes | None = None, users: str = TEXT, items: str = TEXT, **options: Any) -> Event:
    raw = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
    reader = EventReader(IngestOptions(**options), json_fields, user_ids=users, item_ids=items)
    return reader.read(message(raw, key))


def event(**changes: Any) -> dict[str, Any]:
    return {"user_id": "anna", "item_id": 7, "timestamp": 1_600_000_000} | changes


def test_json_object_is_an_event() -> None:
    assert read(event(more="ignored")) == Event("anna", "7", 1_600_000_000)
    renamed = {"u": " 5\u00a0", "i": "alien", "t": 1_600_000_000_123}
    columns = {"user_column": "u", "item_column": "i", "time_column": "t"}
    assert read(renamed, users=INTEGER, **columns) == Event("5", "alien", 1_600_000_000)
    assert read({"user_id": "u", "item_id": "i"}, time_column="none") == Event("u", "i", 0)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no value"),
        (b"", "no value"),
        (b"not json", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'{"user_id": 1, "user_id": 2}', "'user_id' twice"),
        (b"\xff\xfe\x00", "not a JSON object"),
        (b" " * (MAX_EVENT_BYTES + 1), f"more than {MAX_EVENT_BYTES} bytes"),
        (event(user_id=None), "user_id has no value"),
        (event(item_id=""), "item_id has no value"),
        (event(user_id="  "), "is empty"),
        (event(user_id=True), "neither text nor an integer"),
        (event(item_id=7.0), "neither text nor an integer"),
        (event(item_id=["7"]), "neither text nor an integer"),
        (event(user_id="x" * 401), "longer than 400 bytes"),
        (event(user_id="a\x00b"), "control characters"),
        (b'{"user_id": "\\ud800", "item_id": 1, "timestamp": 1}', "not a JSON object"),
        ({"user_id": "u", "item_id": "i"}, "timestamp has no value"),
        (event(timestamp="yesterday"), "not a time"),
        (event(timestamp=True), "not a time"),
        (event(timestamp={}), "not a time"),
        (b'{"user_id": "u", "item_id": "i", "timestamp": NaN}', "not a time"),
        (event(timestamp=-(2**64)), "not a time"),
        (event(timestamp=10**11), "beyond the next year"),
        (event(timestamp=10**30), "beyond the next year"),
        (event(timestamp="9999-01-01"), "beyond the next year"),
    ],
)
def test_message_that_is_no_event_says_why(value: Any, reason: str) -> None:
    with pytest.raises(UnusableError, match=reason):
        read(value)


@pytest.mark.parametrize("ids", ["1.0", "007", "abc", 2**63, "-"])
def test_ids_follow_the_types_of_the_bundle_or_the_options(ids: object) -> None:
    with pytest.raises(UnusableError, match="user ids are integers"):
        read(event(user_id=ids), users=INTEGER)
    with pytest.raises(UnusableError, match="item ids are integers"):
        read(event(item_id=ids), item_ids="integer")
    assert read(event(user_id=ids), users=INTEGER, user_ids="text").user_id == str(ids)
    assert read(event(user_id=ids), users="").user_id == str(ids)


@pytest.mark.parametrize("key", [None, b"", b"anna"])
def test_key_of_a_message_is_the_user_or_empty(key: bytes | None) -> None:
    assert read(event(), key=key).user_id == "anna"


@pytest.mark.parametrize("key", [b"bob", b"\xff", b"anna "])
def test_other_key_is_refused_unless_any_may_be(key: bytes) -> None:
    with pytest.raises(UnusableError, match="is not the user id"):
        read(event(), key=key)
    assert read(event(), key=key, keys="any").user_id == "anna"


TIMES = [
    *(0, 5, 631_152_000, 1_600_000_000, 1_600_000_000_999, 1_600_000_000_999_999, 1_600_000_000_999_999_999),
    *(1_600_000_000.75, -5, -5.5, "1600000000", " 1600000000.5 ", "1.6e9", "2024-01-31", "2024-01-31 12:00:00"),
    *("2024-01-31T12:00:00.5Z", "2024/01/31 12:00:00 UTC", "2024-01-31T12:00:00+02:00", "2024-01-31T12:00:00-0230"),
]


@pytest.mark.parametrize("value", TIMES)
def test_times_are_those_of_an_import(value: object, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"user_id": "u", "item_id": "i", "timestamp": value}) + "\n")
    assert histories(read_interactions(path, ANY_LOG)) == {"u": [("i", seconds_of("timestamp", value, "auto"))]}


@pytest.mark.parametrize(("unit", "number"), [("s", 5), ("ms", 5_999), ("us", 5_000_001), ("ns", 5 * 10**9)])
def test_unit_that_is_named_counts(unit: str, number: int) -> None:
    assert seconds_of("t", number, unit) == 5


def test_protobuf_message_is_an_event() -> None:
    reader = EventReader(DEFAULT, protobuf_fields(DEFAULT), user_ids=TEXT, item_ids=TEXT)
    sent = pb.InteractionEvent(user_id="anna", item_id="7", timestamp=1_600_000_000)
    assert reader.read(message(sent.SerializeToString(), b"anna")) == Event("anna", "7", 1_600_000_000)
    sent.timestamp = 0
    assert reader.read(message(sent.SerializeToString())).timestamp == 0
    for value, reason in ((b"\x0a\xff", "no InteractionEvent"), (b"\x18\x01", "user_id has no value")):
        with pytest.raises(UnusableError, match=reason):
            reader.read(message(value))


def test_csv_line_is_an_event() -> None:
    header = ["timestamp", "user_id", "item_id"]
    reader = EventReader(DEFAULT, csv_fields(DEFAULT, lambda: header), user_ids=TEXT, item_ids=INTEGER)
    assert reader.read(message(b'1600000000,"a ""b"", c",7')) == Event('a "b", c', "7", 1_600_000_000)
    for line, reason in (
        (b"1,2", "2 values, the header 3"),
        (b'1,"2,3', "no line of CSV"),
        (b"\xff,2,3", "UTF-8"),
        (b",u,7", "timestamp has no value"),
    ):
        with pytest.raises(UnusableError, match=reason):
            reader.read(message(line))
    header[1] = "user"
    with pytest.raises(UnusableError, match="no column 'user_id'"):
        reader.read(message(b"1600000000,a,7"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_events", 0), ("batch_events", 10_001), ("batch_ms", 0), ("group", ""), ("partitions", "0,x"),
     ("partitions", "-1"), ("partitions", "0,,1"), ("user_column", "")],
)  # fmt: skip
def test_options_that_cannot_be_name_themselves(field: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        IngestOptions(**{field: value})
    assert isinstance(caught.value, DmanError) and caught.value.parameter == field


def test_partitions_are_listed_once_each() -> None:
    assert IngestOptions(partitions="3, 0,3").listed_partitions() == [0, 3]
