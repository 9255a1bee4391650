"""The dialect of a text file: what separates values, how they are quoted, and how its columns are named."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from dman_runtime.data.files.records import Records
from dman_runtime.errors import InputError

SEPARATORS = {"comma": b",", "tab": b"\t", "semicolon": b";", "pipe": b"|", "::": b"::", "blanks": b" "}
_BLANKS = bytes.maketrans(b" \t", b"\x1f\x1f")
_ESCAPES = re.compile(rb'\\([\\"])')
_QUOTED_OR = {b"::": re.compile(rb'("[^"]*")|::'), b" ": re.compile(rb'("[^"]*")|[ \t]+')}
INNER = b"\x1f"  # stands for separators of several bytes


def separator_of(option: str) -> bytes:
    """The separator that the option means. Raises InputError."""
    names = {"tab": b"\t", "\\t": b"\t", "blank": b" ", "blanks": b" "}
    found = names.get(option.lower(), option.encode())
    if found not in SEPARATORS.values():
        raise InputError(
            f"separator {option!r:.60} is not known", "choose one of , ; | :: tab blank", parameter="separator"
        )
    return found


@dataclass(frozen=True)
class Dialect:
    """How the lines of a text file become rows."""

    separator: bytes  # one of SEPARATORS
    quote: str  # none, double or backslash
    quote_given: bool  # by an option: not found out
    names: tuple[str, ...]  # of the columns
    header: bool  # the first line holds the names
    trailing: bool = False  # one more separator ends each line, but not the header
    returns: bool = False  # lines end with a carriage return alone
    looks_headerless: bool = False
    first_line: tuple[str, ...] = ()
    quote_remark: str = ""  # for people: why there are no quotes
    has_quotes: bool = False  # in the first lines
    remarks: tuple[str, ...] = ()  # for people: what was found besides

    @property
    def width(self) -> int:
        """How many values a line has, with the empty one after a trailing separator."""
        return len(self.names) + self.trailing

    @property
    def quoted(self) -> bool:
        return self.quote != "none"

    @property
    def byte(self) -> bytes:
        """The separator after `one_byte`."""
        return inner_byte(self.separator)

    @property
    def words(self) -> list[str]:
        name = next(name for name, value in SEPARATORS.items() if value == self.separator)
        quotes = {"double": "quotes double", "backslash": "quotes with backslash", "none": "no quotes"}[self.quote]
        if self.quote_remark:
            quotes += f" ({self.quote_remark})"
        return [name, quotes, "header" if self.header else "no header", *self.remarks]


def inner_byte(separator: bytes) -> bytes:
    """What stands for a separator after `one_byte`."""
    return INNER if separator in _QUOTED_OR else separator


def unescaped(data: bytes) -> bytes:
    """Quotes that have a backslash as doubled quotes, and doubled backslashes as one."""
    if b"\\" not in data:
        return data
    return _ESCAPES.sub(lambda found: b'""' if found[1] == b'"' else b"\\", data)


def one_byte(data: bytes, separator: bytes, *, quoted: bool) -> bytes:
    """The same text with INNER for a separator of several bytes, and nothing for blanks around lines."""
    if separator not in _QUOTED_OR:
        return data
    if quoted and b'"' in data:
        data = _QUOTED_OR[separator].sub(lambda found: found[1] or INNER, data)
        return re.sub(rb"(?m)^\x1f|\x1f(?=\r?$)", b"", data) if separator == b" " else data
    if separator == b"::":
        return data.replace(b"::", INNER)
    return _single_blanks(data).translate(_BLANKS)


def _single_blanks(data: bytes) -> bytes:
    """The text with one blank for several, and none at the beginning or the end of a line."""
    text = np.frombuffer(data, np.uint8)
    blank = (text == ord(" ")) | (text == ord("\t"))
    newline = text == ord("\n")
    before = np.append(True, blank[:-1] | newline[:-1])  # a blank or the beginning of a line
    extra = blank & before
    if extra.any():
        text = text[~extra]
        blank = (text == ord(" ")) | (text == ord("\t"))
    end = np.append((text[1:] == ord("\n")) | (text[1:] == ord("\r")), True)
    last = blank & end
    return text[~last].tobytes() if last.any() else data if len(text) == len(data) else text.tobytes()


def header_end(records: Records) -> int:
    """The number of the first record that is not blank; the number of records if all are."""
    filled = ~records.blank
    return int(filled.argmax()) if filled.any() else len(records)
