"""Reading of item files: titles and attributes from any table, or MovieLens' `movies.dat`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dman_runtime.data.files.sources import Source
from dman_runtime.data.ids import BLANKS, RULE, id_problem
from dman_runtime.data.interactions import LIST_SEPARATOR, ItemInfo
from dman_runtime.data.log_options import LogOptions
from dman_runtime.data.roles import OWN_NAMES, candidates
from dman_runtime.data.tables import Rows, Tables, open_tables, quoted
from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

_log = logging.getLogger(__name__)
_MISSING: tuple[Any, ...] = (None, "", [])
_MOVIELENS_NAMES = ("item_id", "title", "genres")  # what a line of movies.dat holds


def read_items(
    path: str | Path, *, item_column: str = "item_id", title_column: str = "title", titles: bool = True
) -> dict[str, ItemInfo]:
    """Titles and attributes by external item id, in file order. Raises InputError.

    Where there is no such item column, one called item_id, or the only one with another well-known name, is taken.
    Every other column is an attribute, as text; the values of a list are joined by "|". Blanks around ids are taken
    off, as in logs. Without `titles`, the column of titles may be missing.
    """
    if Source("", Path(path)).name.endswith(".dat"):
        return _movielens_items(path)
    tables = open_tables(path)
    item_column = _item_column(tables, item_column)
    if titles or title_column in tables.names:
        _require(tables, title_column, f"rename the column that holds the titles to {title_column!r}")
    return _items(tables, tables.names, item_column, title_column)


def read_item_ids(path: str | Path, *, item_column: str = "item_id") -> list[str]:
    """External item ids in file order: of a `.txt` file one a line, of others those of a table as `read_items` takes.

    Blanks around ids are taken off, and empty lines left out. Raises InputError.
    """
    source = Source(str(path), Path(path))
    if source.name.endswith(".dat"):
        return list(_movielens_items(path))
    if source.name.endswith(".txt"):
        return _listed_ids(source)
    tables = open_tables(path)
    item_column = _item_column(tables, item_column)
    return [
        item_id
        for rows in tables.batches([item_column])
        for item_id in _ids(rows, rows.batch[item_column], item_column)
    ]


def _listed_ids(source: Source) -> list[str]:
    with source.open() as (stream, _):
        content = stream.read()
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise source.error("is not UTF-8", "write it as UTF-8, one id a line") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if item_id := line.strip(BLANKS + "\r"):
            if problem := id_problem(item_id):
                raise source.error(
                    f"line {number}: the id {quoted(item_id)} {problem}", f"{RULE}, or remove such lines"
                )
            found.append(item_id)
    return found


def _item_column(tables: Tables, wanted: str) -> str:
    known = candidates(tables, "item")
    found = next((name for name in (wanted, OWN_NAMES["item"]) if name in tables.names), None)
    if found is None and len(known) == 1:
        found = known[0]
    if found is None:
        _require(tables, wanted, "name the column that holds the items", parameter="item_column")
    elif found != wanted:
        _log.warning("%s has no column %r: %r is taken for the items", tables.path, wanted, found)
    return found or wanted


def _movielens_items(path: str | Path) -> dict[str, ItemInfo]:
    """Items of a file in UTF-8 or, as those of the older data sets are, in Latin-1."""
    try:
        try:
            return _movielens_items_in("utf-8", path)
        except InputError as error:
            if error.parameter != "encoding":
                raise
            _log.info("%s is not UTF-8: it is read as Latin-1", path)
            return _movielens_items_in("latin-1", path)
    except InputError as error:
        if error.parameter != "bad_rows":
            raise
        raise InputError(error.cause, "every line needs item::title::genres") from None


def _movielens_items_in(encoding: str, path: str | Path) -> dict[str, ItemInfo]:
    tables = open_tables(path, LogOptions(header=False, separator="::", quote="none", encoding=encoding))
    if len(tables.names) != len(_MOVIELENS_NAMES):
        raise tables.error(
            f"line 1 has {len(tables.names)} values instead of 3", "every line needs item::title::genres"
        )
    return _items(tables, list(_MOVIELENS_NAMES), "item_id", "title")


def _require(tables: Tables, name: str, remedy: str, *, parameter: str = "") -> None:
    """Raise InputError, with this remedy if the column is absent, unless one column has that name."""
    if name not in tables.names:
        cause = f"no column {name!r}; it has: {', '.join(tables.names)[:300]}"
        raise tables.error(cause, remedy, parameter=parameter)


def _items(tables: Tables, names: list[str], item_column: str, title_column: str) -> dict[str, ItemInfo]:
    """The items of a table whose columns are called `names`."""
    infos: dict[str, ItemInfo] = {}
    for rows in tables.batches(tables.names):
        batch = rows.batch.rename_columns(names)
        ids = _ids(rows, batch[item_column], item_column)
        for number, (item_id, row) in enumerate(zip(ids, batch.drop_columns([item_column]).to_pylist(), strict=True)):
            if item_id in infos:
                cause = f"{rows.file.where(rows.first_row + number)}: item {quoted(item_id)} appears a second time"
                raise InputError(cause, "keep one row per item")
            texts = {name: _text(value) for name, value in row.items() if value not in _MISSING}
            infos[item_id] = ItemInfo(texts.pop(title_column, ""), texts)
    if not infos:
        raise tables.error("no rows", "give a file with one row per item")
    return infos


def _ids(rows: Rows, values: pa.Array, name: str) -> Iterator[str]:
    import pyarrow as pa

    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_integer(kind) or kind in (pa.string(), pa.large_string(), pa.string_view())):
        raise InputError(f"{rows.file.path}: column {name!r} has type {kind}", "write the ids as integers or text")
    for number, value in enumerate(values.to_pylist()):
        text = "" if value is None else str(value).strip(BLANKS)
        if problem := id_problem(text):
            raise InputError(
                f"{rows.file.where(rows.first_row + number)}: {name} {quoted(text)} {problem}",
                f"{RULE}, or remove such rows",
            )
        yield text


def _text(value: object) -> str:
    return LIST_SEPARATOR.join(map(str, value)) if isinstance(value, list) else str(value)
