"""Parquet files as batches of columns, as they are stored."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from dman_runtime.data.files.line_rows import Tally

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dman_runtime.data.files.sources import Source

_BATCH_ROWS = 1 << 17


class ParquetReader:
    """Reads one Parquet file."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.words, self.typed = ["Parquet"], True
        with self._open() as file:
            self.names = list(file.schema_arrow.names)

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        """Raises InputError for what cannot be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self.source.open() as (stream, packed), ExitStack() as stack:
            try:
                if packed:  # Parquet is read from its end
                    copy = stack.enter_context(tempfile.TemporaryFile())
                    shutil.copyfileobj(stream, copy, 1 << 20)
                    copy.seek(0)
                    file = stack.enter_context(pq.ParquetFile(pa.PythonFile(copy, mode="r")))
                else:
                    file = stack.enter_context(pq.ParquetFile(str(self.source.file)))
                yield file
            except (pa.ArrowException, OSError) as error:
                problem = " ".join(str(error).split())[:200]
                raise self.source.error(
                    f"cannot be read as Parquet ({problem})", "check that the file is complete and of this format"
                ) from None

    def batches(self, names: list[str], tally: Tally) -> Iterator[pa.RecordBatch]:
        """All rows. Raises InputError unless they are as many as the file says."""
        with self._open() as file:
            rows, expected = 0, file.metadata.num_rows
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=names):
                rows += len(batch)
                yield batch.select(names)
            if rows != expected:
                raise self.source.error(f"{rows} of {expected} rows were read", "check that the file is complete")

    def places(self, rows: Sequence[int]) -> list[str]:
        return [f"{self.source.path}: row {row + 1}" for row in rows]
