"""Writes columns as CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dman_runtime.errors import InputError

_CHUNK = 100_000  # rows that are Python objects at a time


def write_columns(columns: dict[str, np.ndarray], path: Path) -> None:
    """Writes columns of one length by the extension of `path`; the file appears complete or not at all."""
    writers: dict[str, Callable[[dict[str, np.ndarray], Path], None]] = {
        ".csv": partial(_write_text, separator=","),
        ".tsv": partial(_write_text, separator="\t"),
        ".parquet": _write_parquet,
    }
    if path.suffix.lower() not in writers:
        raise InputError(f"{path}: unknown extension {path.suffix!r}", f"write a {', '.join(writers)} file")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writers[path.suffix.lower()](columns, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_text(columns: dict[str, np.ndarray], path: Path, *, separator: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator="\n")
        writer.writerow(columns)
        for begin in range(0, len(next(iter(columns.values()))), _CHUNK):
            writer.writerows(zip(*(c[begin : begin + _CHUNK].tolist() for c in columns.values()), strict=True))


def _write_parquet(columns: dict[str, np.ndarray], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), str(path))
