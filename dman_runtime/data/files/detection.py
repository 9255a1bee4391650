"""Finding out the dialect of a text file from its first lines: only what all of them agree with, never a guess."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from dman_runtime.data.files.dialect import SEPARATORS, Dialect, header_end, separator_of
from dman_runtime.data.files.quoting import Fit, Sample, ambiguous_error, bad_quote_error, best_quoting
from dman_runtime.data.log_options import AUTO, LogOptions
from dman_runtime.errors import InputError

if TYPE_CHECKING:
    from dman_runtime.data.files.sources import Source

_MOVIELENS = {"u.data": b"\t", "ratings.dat": b"::"}
_RATING_NAMES = ("user_id", "item_id", "rating", "timestamp")
_RECBOLE = re.compile(r"(.+):(token|float|token_seq|float_seq)")
_DATUM = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?|\d{4}-\d\d?-\d\d?([T ].*)?|\d\d?[./]\d\d?[./]\d{2,4}( .*)?")
_FITS = 0.9  # share of the lines from which on another separator is a rival


class Detector:
    """Finds the dialect of the sample of a file: its beginning, in UTF-8, and whether that is all of it."""

    def __init__(self, source: Source, options: LogOptions, sample: bytes, *, complete: bool) -> None:
        self.source, self.options = source, options
        self.returns = b"\r" in sample and b"\n" not in sample
        data = sample.replace(b"\r", b"\n") if self.returns else sample
        data = data if complete else data[: data.rfind(b"\n") + 1]
        if not data.strip(b"\r\n"):
            raise source.error("the file holds no lines" if complete else "the first line is too long", "give rows")
        self.sample = Sample(source, options, data, complete)

    def dialect(self) -> Dialect:
        """Raises InputError if the lines have no dialect in common, or fit more than one."""
        fit = self._fit()
        if fit.bad:
            name = fit.column_name(fit.bad.column, header=self.options.header)
            raise bad_quote_error(self.source, fit.bad, name, 1)
        if fit.ambiguous:
            raise ambiguous_error(self.source, (fit.ambiguous[0] + 1, fit.ambiguous[1] + 1))
        first = header_end(fit.records)
        if first == len(fit.records):
            raise self.source.error("its first lines hold nothing but blanks", "give rows")
        line, *below = (fit.values(number) for number in range(first, min(first + 20, len(fit.records))))
        names, header, remarks = self._names(fit, line)
        remarks += ["an empty last value in every line"] if fit.trailing else []
        remarks += ["lines end with a carriage return alone"] if self.returns else []
        return Dialect(
            fit.separator,
            fit.quote,
            self.options.quote != AUTO,
            names,
            header,
            trailing=fit.trailing,
            returns=self.returns,
            looks_headerless=header and _looks_like_data(line, below),
            first_line=tuple(line),
            quote_remark=fit.remark,
            has_quotes=b'"' in self.sample.data,
            remarks=tuple(remarks),
        )

    def _names(self, fit: Fit, line: list[str]) -> tuple[tuple[str, ...], bool, list[str]]:
        """Names of the columns, whether they are in the file, and what to say about it."""
        if not self.options.header:
            return tuple(str(number + 1) for number in range(len(line))), False, []
        file = self.source.name
        if fit.separator == _MOVIELENS.get(file) and len(line) == len(_RATING_NAMES) and _is_datum(line):
            return _RATING_NAMES, False, [f"columns of MovieLens' {file}"]
        names = [name.strip() for name in line]
        typed = [_RECBOLE.fullmatch(name) for name in names]
        if all(typed):
            return tuple(found[1] for found in typed if found), True, ["types of RecBole taken off the names"]
        return tuple(names), True, []

    # -- separators ---------------------------------------------------------------------------------------------

    def _fit(self) -> Fit:
        if self.options.separator != AUTO:
            return best_quoting(self.sample, separator_of(self.options.separator))
        first = self._first_record()
        present = [one for one in SEPARATORS.values() if one in first or (one == b" " and b"\t" in first.strip(b"\t"))]
        fits = [best_quoting(self.sample, one) for one in present]
        fits = [fit for fit in fits if fit.width > 1]
        blank = [fit for fit in fits if fit.separator == b" " and fit.perfect]
        named = [fit for fit in fits if fit.separator != b" " and not (blank and fit.bad)]
        perfect = [fit for fit in named if fit.perfect]
        expected = b"\t" if self.source.name.endswith((".tsv", ".inter")) else _MOVIELENS.get(self.source.name)
        for fit in perfect:
            if fit.separator == expected:
                return fit
        rivals = [
            fit for fit in named if fit.share >= _FITS and (fit.perfect or not perfect or fit.width >= perfect[0].width)
        ]
        if len(rivals) > 1:
            raise self._undecided(rivals)
        halves = [fit for fit in named if fit.share >= 0.5]
        if rivals or (not blank and len(halves) == 1):
            return (rivals or halves)[0]
        if blank and not halves:
            return blank[0]
        if len(halves) + len(blank) > 1:
            raise self._undecided(halves + blank)
        if named:
            best = max(named, key=lambda fit: fit.share)
            if best.bad:  # it may be why the numbers of values differ
                return best
            raise self._inconsistent(best)
        return best_quoting(self.sample, b",")  # one column

    def _first_record(self) -> bytes:
        """All that the first row can be: to where its line ends and quotes that it opens are closed."""
        data = self.sample.data.lstrip(b"\r\n")
        end = data.find(b"\n")
        while end >= 0 and data.count(b'"', 0, end) % 2:
            end = data.find(b"\n", end + 1)
        return data[:end] if end >= 0 else data

    def _undecided(self, fits: list[Fit]) -> InputError:
        ways = " and ".join(f"{_name(fit.separator)} ({fit.width} columns)" for fit in fits)
        return self.source.error(f"its lines can be separated by {ways}", "choose one", parameter="separator")

    def _inconsistent(self, fit: Fit) -> InputError:
        records = fit.records
        other = int(np.argmax(~records.blank & (records.columns != records.columns[header_end(records)])))
        lines = [int(records.first_lines[number]) + 1 for number in (header_end(records), other)]
        counts = [int(records.columns[number]) for number in (header_end(records), other)]
        return self.source.error(
            f"its lines have different numbers of values: with {_name(fit.separator)}, line {lines[0]} has {counts[0]} "
            f"and line {lines[1]} has {counts[1]}",
            "give the separator",
            parameter="separator",
        )


def _name(separator: bytes) -> str:
    return next(name for name, value in SEPARATORS.items() if value == separator)


def _is_datum(values: list[str]) -> bool:
    """All of the values are numbers or times."""
    return all(_DATUM.fullmatch(value.strip()) for value in values)


def _looks_like_data(line: list[str], below: list[list[str]]) -> bool:
    """Whether a first line holds a number, a time or a text with digits such as the lines below it hold there."""
    if not below:
        return any(_DATUM.fullmatch(value.strip()) for value in line)
    for column, value in enumerate(line):
        others = [values[column].strip() for values in below if column < len(values)]
        shape = _shape(value.strip())
        if others and "9" in shape and sum(_shape(other) == shape for other in others) >= 0.8 * len(others):
            return True
    return False


def _shape(text: str) -> str:
    """What a value looks like: 9 for a number or a time, else its runs of letters and digits."""
    if _DATUM.fullmatch(text):
        return "9"
    return re.sub(r"\d+", "9", re.sub(r"[^\W\d]+", "a", text))
