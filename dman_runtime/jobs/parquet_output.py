"""Parquet files that appear under their name only when they are complete. pyarrow is imported on use only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetOutput:
    """A file that is written table by table, as a context; until its end it is `.NAME.partial` beside its place.

    The file has the schema that is given, also without any table, or that of its first table. Raises InputError where
    it cannot be written.
    """

    def __init__(self, path: Path, schema: pa.Schema | None = None) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.partial")
        self._schema = schema
        self._writer: Any = None

    def __enter__(self) -> Self:
        if self._path.is_dir():
            raise InputError(f"cannot write {self._path}: it is a directory", "choose another file", parameter="output")
        try:
            self._temporary.touch()
            if self._schema is not None:
                self._begin(self._schema)
        except OSError as error:
            raise self._error(error) from None
        return self

    def _begin(self, schema: pa.Schema) -> None:
        import pyarrow.parquet as pq

        self._writer = pq.ParquetWriter(self._temporary, schema, compression="zstd")

    def write(self, table: pa.Table) -> None:
        """Appends rows, which have the schema of the file."""
        try:
            if self._writer is None:
                self._begin(table.schema)
            self._writer.write_table(table)
        except OSError as error:
            raise self._error(error) from None

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
            if failure is None:
                self._temporary.replace(self._path)
        except OSError as error:
            if failure is None:
                raise self._error(error) from None
        finally:
            self._temporary.unlink(missing_ok=True)

    def _error(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write {self._path}: {error.strerror or error}", "choose another file", parameter="output"
        )
