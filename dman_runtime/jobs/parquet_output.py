"""A Parquet file that appears under its name only when it is complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetOutput:
    """Writes tables of one schema, as a context. Without any, the file has the columns and no rows."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.partial")
        self._schema = schema

    def __enter__(self) -> ParquetOutput:
        import pyarrow.parquet as pq

        if self._path.is_dir():
            raise self._error("it is a directory")
        try:
            self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")
        except OSError as error:
            raise self._error(os.strerror(error.errno) if error.errno else "unknown error") from None
        return self

    def write(self, table: pa.Table) -> None:
        """Raises InputError if the file cannot be written any more."""
        try:
            self._writer.write_table(table)
        except OSError as error:
            raise self._error(os.strerror(error.errno) if error.errno else "unknown error") from None

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
            self._writer.close()
            if failure is None:
                self._temporary.replace(self._path)
        except OSError as error:
            if failure is None:
                raise self._error(os.strerror(error.errno) if error.errno else "unknown error") from None
        finally:
            self._temporary.unlink(missing_ok=True)

    def _error(self, reason: str) -> InputError:
        return InputError(f"cannot write {self._path}: {reason}", "choose another file", parameter="output")
