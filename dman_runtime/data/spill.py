"""Splits rows into parts of complete users that fit into memory, through temporary files.

Rows go to one of 32 files by the hash of their user, which is a column. A file with too many rows is split again by the
next bits of the hash, and small files are joined. The rows of a user keep their order. pyarrow is imported on use only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

_FILE_BITS = 5  # 32 files are open at a time
HASH = "hash"  # the column with the hash of a row's user, uint64
_HASH_BITS = 60  # users with the same 60 bits are not separated: their file becomes a part as it is


def split_by_user(
    batches: Iterable[pa.RecordBatch], prepared: Callable[[pa.RecordBatch], pa.RecordBatch], *, max_rows: int
) -> Generator[list[pa.RecordBatch], None, None]:
    """Parts of at most max_rows rows, or of one user who has more; every user is in one part only.

    If all rows fit, the only part is the input in its order, and nothing is written. Otherwise each batch is
    `prepared`, which gives all one schema and the column HASH; about max_rows rows are in memory at a time, and the
    others are in the temporary folder. Raises OSError if that folder cannot be used.
    """
    batches = iter(batches)
    first: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        first.append(batch)
        rows += len(batch)
        if rows > max_rows:
            break
    else:
        yield first
        return
    with tempfile.TemporaryDirectory(prefix="dman-") as folder:
        rest = map(prepared, chain(_released(first), batches))
        yield from _split(rest, Path(folder), used_bits=0, max_rows=max_rows)


def _released(batches: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches in order; the list lets go of each, so that it can be freed after use."""
    while batches:
        yield batches.pop(0)


def _split(
    batches: Iterable[pa.RecordBatch], folder: Path, *, used_bits: int, max_rows: int
) -> Iterator[list[pa.RecordBatch]]:
    part: list[pa.RecordBatch] = []
    for path, rows, divisible in _write_files(batches, folder, used_bits):
        if rows > max_rows and divisible:
            subfolder = path.with_suffix("")
            subfolder.mkdir()
            yield from _split(_read_file(path), subfolder, used_bits=used_bits + _FILE_BITS, max_rows=max_rows)
        else:
            if part and sum(map(len, part)) + rows > max_rows:
                yield part
                part = []
            part += _read_file(path)
        path.unlink()
    if part:
        yield part


def _write_files(batches: Iterable[pa.RecordBatch], folder: Path, used_bits: int) -> list[tuple[Path, int, bool]]:
    """Write each row to the file of its user. For each file: path, rows, and whether it can be split further."""
    import pyarrow as pa

    paths = [folder / f"{number}.arrow" for number in range(1 << _FILE_BITS)]
    shift = np.uint64(64 - used_bits - _FILE_BITS)
    rows = np.zeros(len(paths), dtype=np.int64)
    lowest = np.full(len(paths), np.iinfo(np.uint64).max, dtype=np.uint64)  # hash in each file
    highest = np.zeros(len(paths), dtype=np.uint64)
    writers: dict[int, Any] = {}
    with ExitStack() as stack:
        for batch in batches:
            hashes = batch[HASH].to_numpy()
            files = ((hashes >> shift) % np.uint64(len(paths))).astype(np.int64)  # (rows,)
            np.minimum.at(lowest, files, hashes)
            np.maximum.at(highest, files, hashes)
            by_file = batch.take(pa.array(np.argsort(files, kind="stable")))
            counts = np.bincount(files, minlength=len(paths))
            ends = np.cumsum(counts)
            for number in np.flatnonzero(counts).tolist():
                if number not in writers:
                    writers[number] = stack.enter_context(pa.ipc.new_stream(str(paths[number]), by_file.schema))
                writers[number].write_batch(by_file.slice(ends[number] - counts[number], counts[number]))
            rows += counts
    divisible = (lowest != highest) & (used_bits + _FILE_BITS < _HASH_BITS)
    return [(paths[number], int(rows[number]), bool(divisible[number])) for number in sorted(writers)]


def _read_file(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader
