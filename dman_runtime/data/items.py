"""Reading of item files: titles and attributes from CSV, TSV, Parquet or MovieLens' `movies.dat`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dman_runtime.data._old_tables import TableColumn, TableFile, quoted
from dman_runtime.data.interactions import ItemInfo

_MISSING: tuple[Any, ...] = (None, "", [])


def read_items(path: str | Path, *, item_column: str = "item_id", title_column: str = "title") -> dict[str, ItemInfo]:
    """Titles and attributes by external item id, in file order. Raises InputError.

    Every other column is an attribute, as text; the values of a list are joined by "|".
    """
    file = TableFile(path)
    rows = _movielens_rows(file) if file.kind == ".dat" else _table_rows(file, item_column, title_column)
    infos: dict[str, ItemInfo] = {}
    for number, (item_id, info) in enumerate(rows):
        if item_id in infos:
            cause = f"{file.where(number)}: item {quoted(item_id)} appears a second time"
            raise file.error(cause, "keep one row per item")
        infos[item_id] = info
    if not infos:
        raise file.error("no rows", "give a file with one row per item")
    return infos


def _table_rows(file: TableFile, item_column: str, title_column: str) -> Iterator[tuple[str, ItemInfo]]:
    file.require(item_column, "name the column that holds the items", parameter="item_column")
    file.require(title_column, f"rename the column that holds the titles to {title_column!r}")
    first_row = 0
    for batch in file.batches(list(dict.fromkeys(file.names))):
        with file.errors():
            ids = TableColumn(file, item_column, batch[item_column], first_row).ids().to_pylist()
            rows = batch.drop_columns([item_column]).to_pylist()
        first_row += len(ids)
        for item_id, row in zip(ids, rows, strict=True):
            texts = {name: _text(value) for name, value in row.items() if value not in _MISSING}
            yield item_id, ItemInfo(texts.pop(title_column, ""), texts)


def _text(value: object) -> str:
    return "|".join(map(str, value)) if isinstance(value, list) else str(value)


def _movielens_rows(file: TableFile) -> Iterator[tuple[str, ItemInfo]]:
    with file.errors():
        import pyarrow as pa

        with pa.input_stream(str(file.path)) as stream:  # decompresses .gz
            text = stream.read().decode("latin-1")
    for number, line in enumerate(text.rstrip("\n").split("\n") if text.strip() else []):
        parts = line.removesuffix("\r").split("::")
        if len(parts) != 3 or not parts[0]:
            raise file.error(f"{file.where(number)} is {quoted(line)}", "every line needs item::title::genres")
        yield parts[0], ItemInfo(parts[1], {"genres": parts[2]} if parts[2] else {})
