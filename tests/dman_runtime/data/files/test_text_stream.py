"""Text as pieces of whole records: encodings, lines and what is counted, whatever the size of a piece."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from table_files import Written, packed, reference_rows, rows_of, write_bytes, written_tables

from dman_runtime.data import tables as tables_module
from dman_runtime.data.files import text_stream
from dman_runtime.data.files.line_rows import LineReader
from dman_runtime.data.files.sources import Source
from dman_runtime.data.files.text_rows import TextRows
from dman_runtime.data.log_options import ANY_LOG, LogOptions
from dman_runtime.data.tables import open_tables
from dman_runtime.errors import InputError

TEXT = "user_id,item_id\nJosé,1\nb,2\n"
ROWS = [("José", "1"), ("b", "2")]


def error_of(path: Path, options: LogOptions = ANY_LOG) -> InputError:
    with pytest.raises(InputError) as raised:
        rows_of(open_tables(path, options))
    return raised.value


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_stream, "BLOCK_BYTES", 16)


# -- encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (TEXT.encode(), "UTF-8"),
        (TEXT.encode("utf-8-sig"), "UTF-8 with a byte order mark"),
        (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), "UTF-16-LE with a byte order mark"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "UTF-16-BE with a byte order mark"),
        (codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"), "UTF-32-LE with a byte order mark"),
        (codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"), "UTF-32-BE with a byte order mark"),
        (TEXT.encode("utf-16-le"), "UTF-16-LE"),
        (TEXT.encode("utf-16-be"), "UTF-16-BE"),
        (TEXT.encode("utf-32-le"), "UTF-32-LE"),
        (TEXT.encode("utf-32-be"), "UTF-32-BE"),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_unicode_is_found_and_said(tmp_path: Path, content: bytes, words: str) -> None:
    path = write_bytes(tmp_path / "log.csv", content)
    tables = open_tables(path)
    assert (rows_of(tables), tables.names) == (ROWS, ["user_id", "item_id"])
    assert tables.files[0].dialect == f"text, comma, quotes double, header, {words}"


@pytest.mark.parametrize("encoding", ["latin-1", "windows-1252", "cp850"])
def test_other_encodings_are_read_if_named(tmp_path: Path, encoding: str) -> None:
    path = write_bytes(tmp_path / "log.csv", TEXT.encode(encoding))
    tables = open_tables(path, LogOptions(encoding=encoding))
    assert rows_of(tables) == ROWS
    assert tables.files[0].dialect.endswith(encoding)


def test_text_that_is_not_utf8_is_refused_with_its_line_and_what_it_may_be(tmp_path: Path) -> None:
    error = error_of(write_bytes(tmp_path / "log.csv", TEXT.encode("cp1252")))
    assert error.cause.endswith("log.csv: line 2 holds text that is not UTF-8")
    assert error.remedy == "save the file as UTF-8, or name its encoding, probably windows-1252"
    assert error.parameter == "encoding"
    late = ("user_id,item_id\n" + "a,1\n" * 400_000).encode() + b"\x81,1\n"
    error = error_of(write_bytes(tmp_path / "log.csv", late))
    assert "line 400002 holds" in error.cause
    assert error.remedy.endswith("probably latin-1")


def test_columns_that_nobody_reads_must_be_text_too(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "log.csv", b"user_id,title\na,\xff\n")
    with pytest.raises(InputError, match="line 2 holds text that is not UTF-8"):
        list(open_tables(path).batches(["user_id"]))


@pytest.mark.parametrize("encoding", ["klingon", "base64", "rot13", "utf\0"])
def test_unknown_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    error = error_of(write_bytes(tmp_path / "log.csv", TEXT.encode()), LogOptions(encoding=encoding))
    assert error.parameter == "encoding"


def test_encoding_that_does_not_fit_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "log.csv", b"a,b\n1,2\n\xff,2\n")
    assert "line 3 is not ascii" in error_of(path, LogOptions(encoding="ascii")).cause
    path = write_bytes(tmp_path / "log.csv", b"a,b\n" + b"1,2\n" * 500_000 + b"\xff,2\n")
    assert "line 500002 is not ascii" in error_of(path, LogOptions(encoding="ascii")).cause


def test_encoding_that_contradicts_the_mark_is_refused(tmp_path: Path) -> None:
    error = error_of(write_bytes(tmp_path / "log.csv", TEXT.encode("utf-8-sig")), LogOptions(encoding="latin-1"))
    assert "begins with the mark of UTF-8, but the encoding is given as" in error.cause


@pytest.mark.parametrize("lines", [1, 400_000])
def test_nul_byte_is_refused_with_its_line(tmp_path: Path, lines: int) -> None:
    path = write_bytes(tmp_path / "log.csv", b"a,b\n" + b"1,2\n" * lines + b"\0,2\n")
    error = error_of(path)
    assert f"line {lines + 2} holds a NUL byte" in error.cause
    assert error.parameter == "encoding"


# -- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_line_ends_of_all_systems_are_read(tmp_path: Path, line_end: str, last: bool) -> None:
    text = TEXT if last else TEXT.removesuffix("\n")
    path = write_bytes(tmp_path / "log.csv", text.replace("\n", line_end).encode())
    tables = open_tables(path)
    assert rows_of(tables) == ROWS
    assert ("carriage return" in tables.files[0].dialect) == (line_end == "\r")


def test_carriage_return_among_other_line_ends_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "log.csv", b"a,b\n1,2\r3,4\n5,6\n")
    assert "line 2 has a carriage return in it that ends no line" in error_of(path).cause
    path = write_bytes(tmp_path / "log.csv", b'a,b\n1,"2\r3"\n5,6\n')  # in quotes it is part of the value
    assert rows_of(open_tables(path)) == [("1", "2\r3"), ("5", "6")]


@pytest.mark.usefixtures("small_blocks")
def test_blank_lines_are_counted_and_lines_are_still_right(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "log.csv", b'\n\na,b\n\n1,"x\n\ny, z"\n\r\n  \n2,3\n\n')
    tables = open_tables(path)
    assert rows_of(tables) == [("1", "x\n\ny, z"), ("2", "3")]
    assert tables.blank_lines == 6
    assert tables.files[0].places([1, 0]) == [f"{path}: line 10", f"{path}: line 5"]


def test_value_that_never_ends_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    monkeypatch.setattr(text_stream, "MAX_RECORD_BYTES", 1000)
    path = write_bytes(tmp_path / "log.csv", b'a,b\n1,"x\n' + b"y\n" * 1000)
    assert "line 2, column b: a quote that is never closed" in error_of(path, LogOptions(quote="double")).cause
    path = write_bytes(tmp_path / "log.csv", b"a,b\n1,2\n" + b"y" * 5000)
    assert "line 3 is longer than" in error_of(path, LogOptions(quote="double")).cause


# -- every line is accounted for -------------------------------------------------------------------------------------


def test_parser_that_loses_a_row_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bytes(tmp_path / "log.csv", b"a,b\n" + b"1,2\n" * 10)
    parse = TextRows._batch

    def forgetful(self: TextRows, piece: text_stream.Piece, columns: list[int]) -> object:
        return parse(self, piece, columns)[1:]

    monkeypatch.setattr(TextRows, "_batch", forgetful)
    assert "lines 2 to 11 cannot be parsed" in error_of(path).cause


def test_stream_that_loses_a_piece_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bytes(tmp_path / "log.csv", b"a,b\n" + b"1,2\n" * 10)
    monkeypatch.setattr(text_stream, "BLOCK_BYTES", 16)
    pieces = TextRows.pieces

    def forgetful(self: TextRows, stream: text_stream.TextStream) -> object:
        yield from list(pieces(self, stream))[:-1]

    monkeypatch.setattr(TextRows, "pieces", forgetful)
    assert "has 11 lines, but" in error_of(path).cause


DAMAGE = st.sampled_from(
    ['"', '""', "\n", "\r", "\r\n", "\\", '\\"', ",", ";", "|", "::", "\t", " ", "7", "x", "é", "\0", "\x1f"]
)
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def damaged(written: Written, damage: list[tuple[int, int, str]]) -> bytes:
    content = written.text()
    for position, removed, added in damage:
        start = position % (len(content) + 1)
        content = content[:start] + added + content[start + removed :]
    return content.encode(written.encoding, "replace")


@pytest.mark.slow
@FUZZ
@given(
    written=st.booleans().flatmap(lambda known: written_tables(known=known)),
    damage=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2), DAMAGE), min_size=1, max_size=3),
    content=st.none() | st.binary(max_size=60),
    known=st.booleans(),
    sample=st.sampled_from((200, 1 << 20)),
)
def test_damaged_files_give_the_rows_that_their_dialect_says_or_an_error(
    tmp_path: Path,
    written: Written,
    damage: list[tuple[int, int, str]],
    content: bytes | None,
    known: bool,
    sample: int,
) -> None:
    raw = damaged(written, damage) if content is None else content
    path = write_bytes(tmp_path / "log.csv", raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_stream, "BLOCK_BYTES", 16)
        patch.setattr(tables_module, "_SAMPLE_BYTES", sample)
        try:
            tables = open_tables(path, written.options if known else ANY_LOG)
            found = rows_of(tables)
        except InputError as error:
            assert str(tmp_path) in error.cause or error.parameter
            assert "report this as an error" not in error.remedy
            return
    if tables.files[0].typed:  # bytes that happen to be JSON
        return
    assert isinstance(tables.files[0].reader, LineReader)
    rows = tables.files[0].reader.format
    assert isinstance(rows, TextRows)
    dialect, text = rows.dialect, raw[len(rows.encoding.mark) :].decode(rows.encoding.codec)
    text = text.replace("\r", "\n") if dialect.returns else text
    expected = reference_rows(text, dialect.separator.decode(), dialect.quote)[dialect.header :]
    assert found == [tuple(row[: len(dialect.names)]) for row in expected]


def test_pieces_hold_all_bytes_after_the_header(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "log.csv", b"a,b\n" + b"1,2\n" * 600_000, "gz")
    source = Source(str(path), path)
    reader = open_tables(path).files[0].reader
    assert isinstance(reader, LineReader)
    assert reader.source.path == source.path
    stream = reader.format.stream()
    pieces = list(reader.format.pieces(stream))
    assert len(pieces) > 1
    assert b"".join(piece.data for piece in pieces) == b"1,2\n" * 600_000
    assert sum(piece.rows for piece in pieces) == 600_000
    assert [piece.first_line for piece in pieces[:1]] == [2]
    assert stream.lines == 600_001
    assert packed(b"", "gz") != b""
