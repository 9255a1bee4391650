"""Parquet files that appear under their name only when they are complete. pyarrow is imported on use only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetOutput:
    """A file that is written table by table; until its end it is `.NAME.partial` beside its place.

    Raises InputError where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.partial")
        self._writer: Any = None

    def __enter__(self) -> Self:
        if self._path.is_dir():
            raise InputError(f"cannot write {self._path}: it is a directory", "choose another file", parameter="output")
        try:
            self._temporary.touch()
        except OSError as error:
            raise self._error(error) from None
        return self

    def write_table(self, table: pa.Table) -> None:
        """Appends rows. All tables must have the schema of the first."""
        import pyarrow.parquet as pq

        try:
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._temporary, table.schema, compression="zstd")
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
            raise self._error(error) from None
        finally:
            self._temporary.unlink(missing_ok=True)

    def _error(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write {self._path}: {error.strerror or error}", "choose another file", parameter="output"
        )
