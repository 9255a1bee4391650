"""Encodings of text files: found by their marks, or named by an option; always handed on as UTF-8."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from dman_runtime.data.files.sources import Source
from dman_runtime.data.log_options import AUTO
from dman_runtime.errors import InputError

_MARKS = {  # longer ones first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_ZEROS = {  # bytes of a character, and those that are zero in ASCII
    "utf-32-le": (4, {1, 2, 3}),
    "utf-32-be": (4, {0, 1, 2}),
    "utf-16-le": (2, {1}),
    "utf-16-be": (2, {0}),
}


@dataclass(frozen=True)
class Encoding:
    """What a text file is written in."""

    codec: str  # Python's name
    mark: bytes = b""  # the byte order mark at the beginning
    given: str = ""  # what the option calls it

    @property
    def words(self) -> str:
        return (self.given or self.codec.upper()) + (" with a byte order mark" if self.mark else "")


def find_encoding(source: Source, head: bytes, option: str) -> Encoding:
    """The encoding of a file from its first bytes, or the one that the option names. Raises InputError."""
    mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
    if option == AUTO:
        return Encoding(_MARKS[mark] if mark else _by_zeros(head) or "utf-8", mark)
    try:
        codec = codecs.lookup(option)
    except (LookupError, ValueError):
        codec = None
    if codec is None or not codec._is_text_encoding:
        raise InputError(
            f"encoding {option!r:.60} is not known", "give one such as utf-16 or windows-1252", parameter="encoding"
        )
    name = codec.name.removesuffix("-sig")  # Python's name for UTF-8 with a mark
    if mark and not _MARKS[mark].startswith(name):
        raise source.error(
            f"begins with the mark of {_MARKS[mark].upper()}, but the encoding is given as {name}",
            "leave the encoding out, or give that of the mark",
            parameter="encoding",
        )
    return Encoding(_MARKS[mark] if mark else name, mark, option)


def _by_zeros(head: bytes) -> str:
    """UTF-16 and UTF-32 without a mark: most characters of a log are ASCII, and the rest of their bytes is zero."""
    for codec, (width, zeros) in _ZEROS.items():
        text = head[: len(head) // width * width]
        counts = [text[place::width].count(0) for place in range(width)]
        characters = len(text) // width
        least = min(counts[place] for place in zeros)
        most = max(count for place, count in enumerate(counts) if place not in zeros)
        if least > characters / 2 and most < characters / 8:
            return codec
    return ""


def check_no_nul(source: Source, lines: bytes, first_line: int) -> None:
    """Raise InputError, with the line, if there is a NUL in text."""
    if (position := lines.find(b"\0")) >= 0:
        line = first_line + lines.count(b"\n", 0, position)
        raise source.error(
            f"line {line} holds a NUL byte",
            "give a text file; if it is one, name its encoding",
            parameter="encoding",
        )


def decoded(source: Source, stream: BinaryIO, encoding: Encoding, block_bytes: int) -> Iterator[bytes]:
    """The file in blocks of UTF-8, without a mark. Files in UTF-8 are not checked here: `check_utf8` does it."""
    stream.read(len(encoding.mark))
    if encoding.codec == "utf-8":
        while block := stream.read(block_bytes):
            yield block
        return
    decoder = codecs.getincrementaldecoder(encoding.codec)()
    lines = 1
    while True:
        block = stream.read(block_bytes)
        try:
            text = decoder.decode(block, final=not block).encode()
        except UnicodeError as error:
            raise _not_in_encoding(source, encoding, lines, error) from None
        lines += text.count(b"\n")
        if text:
            yield text
        if not block:
            return


def _not_in_encoding(source: Source, encoding: Encoding, line: int, error: UnicodeError) -> InputError:
    if isinstance(error, UnicodeDecodeError):
        line += bytes(error.object[: error.start]).decode(encoding.codec, "ignore").count("\n")
    return source.error(f"line {line} is not {encoding.words}", "name the file's encoding", parameter="encoding")


def check_utf8(source: Source, lines: bytes, first_line: int) -> None:
    """Raise InputError, with the line and the encoding that is likely, unless these whole lines are UTF-8."""
    if lines.isascii():
        return
    try:
        codecs.utf_8_decode(lines, "strict", True)
    except UnicodeDecodeError as error:
        number = first_line + lines.count(b"\n", 0, error.start)
        begin, end = lines.rfind(b"\n", 0, error.start) + 1, lines.find(b"\n", error.start)
        line = lines[begin : end if end >= 0 else None]
        try:
            line.decode("cp1252")
            likely = "windows-1252"
        except UnicodeDecodeError:
            likely = "latin-1"
        if b"\0" in lines:
            likely = "utf-16"
        raise source.error(
            f"line {number} holds text that is not UTF-8",
            f"save the file as UTF-8, or name its encoding, probably {likely}",
            parameter="encoding",
        ) from None


def decoded_sample(source: Source, head: bytes, encoding: Encoding, *, complete: bool) -> bytes:
    """The beginning of a file in UTF-8, checked, without a mark and without a character that is cut off at its end."""
    sample = head[len(encoding.mark) :]
    if encoding.codec != "utf-8":
        try:
            sample = codecs.getincrementaldecoder(encoding.codec)().decode(sample, complete).encode()
        except UnicodeError as error:
            raise _not_in_encoding(source, encoding, 1, error) from None
    whole_lines = sample if complete else sample[: sample.rfind(b"\n") + 1]
    check_no_nul(source, whole_lines, 1)
    check_utf8(source, whole_lines, 1)
    return sample
