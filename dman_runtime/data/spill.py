"""Splits rows into parts of complete users that fit into memory, through temporary files.

Rows go to one of 32 files by a hash of their user. A file with too many rows is split again by the next bits of the
hash, and small files are joined. The rows of a user keep their order. pyarrow is imported on use only.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

_FILE_BITS = 5  # 32 files are open at a time
_HASH_BITS = 30  # users with the same 30 bits are not separated: their file becomes a part as it is


def split_by_user(batches: Iterable[pa.RecordBatch], *, max_rows: int) -> Generator[list[pa.RecordBatch], None, None]:
    """Parts of at most max_rows rows, or of one user who has more; every user is in one part only.

    The batches have one schema with a column "user", a dictionary of text. If all rows fit, the only part is the
    input in its order, and nothing is written. Otherwise about max_rows rows are in memory at a time, and the others
    are in the temporary folder. Raises OSError if that folder cannot be used.
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
        yield from _split(chain(_released(first), batches), Path(folder), used_bits=0, max_rows=max_rows)


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
            hashes = _hashes(batch["user"])
            files = ((hashes >> shift) % np.uint64(len(paths))).astype(np.int64)  # (rows,)
            np.minimum.at(lowest, files, hashes)
            np.maximum.at(highest, files, hashes)
            by_file = _as_text(batch).take(pa.array(np.argsort(files, kind="stable")))
            counts = np.bincount(files, minlength=len(paths))
            ends = np.cumsum(counts)
            for number in np.flatnonzero(counts).tolist():
                if number not in writers:
                    writers[number] = stack.enter_context(pa.ipc.new_stream(str(paths[number]), by_file.schema))
                writers[number].write_batch(by_file.slice(ends[number] - counts[number], counts[number]))
            rows += counts
    divisible = (lowest != highest) & (used_bits + _FILE_BITS < _HASH_BITS)
    return [(paths[number], int(rows[number]), bool(divisible[number])) for number in sorted(writers)]


def _hashes(users: pa.DictionaryArray) -> np.ndarray:
    """A hash of each row's user, (rows,) uint64, whose upper bits are well mixed; the same in every process."""
    checksums = [zlib.crc32(user_id.encode()) for user_id in users.dictionary.to_pylist()]
    mixed = np.array(checksums, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    by_row: np.ndarray = mixed[users.indices.to_numpy()]
    return by_row


def _as_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with plain text for dictionaries: a stream of batches has only one dictionary."""
    import pyarrow as pa

    columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _read_file(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a file, with dictionaries for text again."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            columns = [c.dictionary_encode() if pa.types.is_string(c.type) else c for c in batch.columns]
            yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
