"""A file that grows: every complete line once, whatever is cut, renamed, replaced or lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

import pytest

from dman_runtime.errors import SourceError, SourceUnavailableError, UsageError
from dman_runtime.ingest import file
from dman_runtime.ingest.base import Message, Rejected
from dman_runtime.ingest.file import FileSource
from dman_runtime.ingest.options import MAX_EVENT_BYTES

FIRST, SECOND, THIRD = (f'{{"n": {number}}}\n'.encode() for number in (1, 2, 3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


class Open(Protocol):
    def __call__(self, path: Path, **options: Any) -> FileSource: ...


@pytest.fixture
def opened() -> Iterator[Open]:
    with ExitStack() as stack:

        def open_one(path: Path, **options: Any) -> FileSource:
            source = FileSource(path, **{"position": path.with_suffix(".position")} | options)
            return stack.enter_context(closing(source))

        yield open_one


def values(source: FileSource, count: int = 100) -> list[bytes]:
    return [message.value or b"" for message in source.read(count, 0)]


def settle(source: FileSource, count: int = 100) -> list[Message]:
    """Reads, and commits what was read."""
    found = list(source.read(count, 0))
    source.commit({message.partition: message.after for message in found})
    return found


def test_lines_are_read_as_they_become_complete(path: Path, opened: Open) -> None:
    path.write_bytes(b"")
    source = opened(path)
    assert values(source) == []
    with path.open("ab", buffering=0) as writer:
        writer.write(FIRST[:5])
        assert values(source) == []
        writer.write(FIRST[5:] + b"\r\n  \n" + SECOND + THIRD[:3])
        found = source.read(100, 0)
        assert [one.value for one in found] == [FIRST.strip(), SECOND.strip()]
        assert [(one.sequence, one.after) for one in found] == [
            (0, len(FIRST) + 5),
            (len(FIRST) + 5, 5 + 2 * len(FIRST)),
        ]
        assert source.lags() == {str(path): path.stat().st_size}
        source.commit({0: found[-1].after})
        assert source.lags() == {str(path): 3}
        writer.write(THIRD[3:])
        assert values(source) == [THIRD.strip()] and not source.ended


def test_position_is_gone_on_from_also_under_another_name(path: Path, opened: Open) -> None:
    path.write_bytes(FIRST + SECOND)
    assert len(settle(opened(path), 1)) == 1
    (again,) = settle(opened(path))
    assert again.value == SECOND.strip()
    moved = path.rename(path.with_name("old.jsonl"))
    source = opened(moved, position=path.with_suffix(".position"))
    assert values(source) == []
    fresh = opened(moved, position=path.with_suffix(".other"))
    assert [message.producer for message in fresh.read(9, 0)] == [again.producer] * 2


def test_another_file_is_another_producer_and_begins_at_its_start(path: Path, opened: Open) -> None:
    path.write_bytes(FIRST + SECOND)
    before = settle(opened(path))
    path.write_bytes(SECOND + THIRD)
    after = settle(opened(path))
    assert [one.value for one in after] == [SECOND.strip(), THIRD.strip()]
    assert {one.producer for one in before}.isdisjoint(one.producer for one in after)


def test_name_that_is_given_stands_for_one_file(path: Path, opened: Open) -> None:
    path.write_bytes(FIRST + SECOND)
    assert {message.producer for message in settle(opened(path, producer="clicks"))} == {"clicks"}
    path.write_bytes(SECOND + THIRD)
    with pytest.raises(SourceError, match="is not the file whose position is in") as caught:
        opened(path, producer="clicks")
    assert caught.value.parameter == "producer"
    assert len(settle(opened(path, producer="clicks 2"))) == 2
    assert values(opened(path, producer="clicks 3")) == []  # another name doubles nothing


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"position": -1}', b'{"position": "5"}', b"\xff"])
def test_position_that_is_none_is_read_from_the_beginning(path: Path, opened: Open, content: bytes) -> None:
    path.write_bytes(FIRST)
    path.with_suffix(".position").write_bytes(content)
    assert values(opened(path)) == [FIRST.strip()]


def test_file_that_is_written_anew_is_an_error_and_then_another_one(path: Path, opened: Open) -> None:
    path.write_bytes(FIRST + SECOND)
    source = opened(path)
    settle(source)
    path.write_bytes(SECOND + SECOND + THIRD)  # longer than before, at the same place
    with pytest.raises(SourceError, match="was written anew"):
        source.read(9, 0)
    assert len(settle(opened(path))) == 3


def test_file_that_lacks_what_was_read_is_refused(path: Path, opened: Open) -> None:
    path.write_bytes(FIRST + SECOND)
    source = opened(path)
    settle(source)
    os.truncate(path, len(FIRST))
    with pytest.raises(SourceError, match="was cut or changed"):
        source.read(9, 0)
    with pytest.raises(SourceError, match="was cut or changed"):
        opened(path)
    path.write_bytes(FIRST + THIRD + SECOND)  # grown again, to another content
    with pytest.raises(SourceError, match="was cut or changed"):
        opened(path)


def test_disk_that_fails_is_waited_for(path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(FIRST)
    source = opened(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(SourceUnavailableError, match="Input/output error"):
            source.read(9, 0)
    assert values(source) == [FIRST.strip()]


@pytest.mark.parametrize("replaced", [False, True])
def test_file_that_is_renamed_is_read_to_its_end_first(path: Path, opened: Open, replaced: bool) -> None:
    path.write_bytes(FIRST)
    source = opened(path)
    settle(source)
    moved = path.rename(path.with_name("old.jsonl"))
    with moved.open("ab") as writer:
        writer.write(SECOND)
    if replaced:
        path.write_bytes(THIRD)
    assert values(source) == [SECOND.strip()]
    with pytest.raises(SourceError, match="renamed or removed"):
        source.read(9, 0)


def test_once_ends_at_the_end_of_now_and_leaves_a_line_without_end(
    path: Path, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(FIRST + SECOND + THIRD[:4])
    source = opened(path, once=True)
    with path.open("ab") as writer:
        writer.write(THIRD[4:] + THIRD)
    assert not source.ended
    assert len(settle(source)) == 2 and settle(source) == [] and source.ended
    assert "the last line, from byte 18 on, has no end" in caplog.text
    empty = path.with_name("empty.jsonl")
    empty.write_bytes(b"\n")
    source = opened(empty, once=True)
    assert values(source) == [] and source.ended


def test_long_files_and_lines_take_bounded_reads(path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "CHUNK_BYTES", 100_000)
    many = [b"%d" % number for number in range(30_000)]
    path.write_bytes(b"\n".join(many) + b"\n")
    source, found = opened(path, once=True), list[bytes]()
    while not source.ended:
        found += values(source, 1000)
    assert found == many
    long = b"x" * 450_000
    path.write_bytes(FIRST + b"\n" * 150_000 + long)
    source = opened(path)
    assert values(source) == [FIRST.strip()] and values(source) == []
    with path.open("ab") as writer:
        writer.write(b"\n" + SECOND)
    (line,) = source.read(9, 0)
    assert line.value == long[: MAX_EVENT_BYTES + 1] and line.after - line.sequence == len(long) + 1
    assert values(source) == [SECOND.strip()]


def test_header_is_read_at_every_start(path: Path, opened: Open) -> None:
    path.write_bytes(b"\xef\xbb\xbfuser_id, item_id\n")
    source = opened(path, header=True)
    assert values(source) == [] and source.header() == []
    with path.open("ab") as writer:
        writer.write(b"u,1\nu,2\n")
    assert [one.value for one in settle(source, 1)] == [b"u,1"] and source.header() == ["user_id", "item_id"]
    again = opened(path, header=True)
    assert again.header() == ["user_id", "item_id"] and values(again) == [b"u,2"]
    path.with_suffix(".position").unlink()
    assert values(opened(path, header=True)) == [b"u,1", b"u,2"]
    assert values(opened(path)) == [b"user_id, item_id", b"u,1", b"u,2"]  # without its byte order mark


def test_file_without_events_or_with_a_broken_header_is_an_error(
    path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        opened(path)
    path.write_bytes(b'user_id,"item\nu,1\n')
    with pytest.raises(SourceError, match="header"):
        opened(path, header=True)
    monkeypatch.setattr(file, "CHUNK_BYTES", 10)
    path.write_bytes(b"x" * 11)
    with pytest.raises(SourceError, match="no event in its first MiB"):
        opened(path)


def test_dead_letters_are_lines_with_reason_and_place(path: Path, opened: Open, tmp_path: Path) -> None:
    path.write_bytes(b"bad\nb\xff\n")
    letters = tmp_path / "letters.jsonl"
    source = opened(path, dead_letters=letters)
    source.reject([Rejected(message, "no") for message in source.read(9, 0)])
    common = {"reason": "no", "file": str(path)}
    assert [json.loads(line) for line in letters.read_text().splitlines()] == [
        common | {"byte": 0, "value": "bad"},
        common | {"byte": 4, "value_base64": "Yv8="},
    ]
    with pytest.raises(SourceUnavailableError, match="dead letters"):
        opened(path, dead_letters=tmp_path / "missing" / "letters.jsonl")
    source = opened(path, position=tmp_path / "missing" / "position")
    with pytest.raises(SourceUnavailableError, match=r"position .* cannot be written"):
        settle(source)
