"""Parquet files that appear under their name only when they are complete. pyarrow is imported on use only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetOutput:
    """A file that is written table by table, as a context; until its end it is `.NAME.partial` beside its place.

    Without any table the file has the columns and no rows. Raises InputError where it cannot be written.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.partial")
        self._schema = schema

    def __enter__(self) -> Self:
        import pyarrow.parquet as pq

        if self._path.is_dir():
            raise InputError(f"cannot write {self._path}: it is a directory", "choose another file", parameter="output")
        try:
            self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")
        except OSError as error:
            raise self._error(error) from None
        return self

    def write(self, table: pa.Table) -> None:
        """Appends rows, which have the schema of the file."""
        try:
            self._writer.write_table(table)
        except OSError as error:
            raise self._error(error) from None

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
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
