"""The file of all records: one Parquet file, one row per finished run. `tools.records` is its command line.

Numbers and names have typed columns. Options, metrics and epochs are JSON text, so that an option that no longer exists
stays readable. `ranks` holds the test rank of every user, in the ranking that the run was chosen by; ranks above
`rank_limit` are stored as `rank_limit + 1`. `groups` holds each user's history-length group. Rows are sorted by name:
the same records give the same bytes, with one version of pyarrow. A change replaces the whole file at once.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dman_runtime.data.evaluation import Ranking, metrics, ranking_for
from dman_runtime.errors import UsageError
from dman_train.interpret import LENGTH_GROUPS

FORMAT = {b"format": b"dman-records", b"version": b"2"}
RECORDS = Path("reports/records.parquet")
TYPED = {"command": pa.string(), "machine": pa.string(), "parameters": pa.int64(), "state_bytes": pa.int64()}
JSON_TEXT = ("model", "train", "data", "dataset", "versions", "epochs", "metrics")
SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        *(pa.field(name, kind, nullable=name == "state_bytes") for name, kind in TYPED.items()),
        *(pa.field(name, pa.string(), nullable=False) for name in JSON_TEXT),
        pa.field("rank_limit", pa.uint16(), nullable=False),
        pa.field("ranks", pa.list_(pa.field("element", pa.uint16(), nullable=False)), nullable=False),
        pa.field("groups", pa.binary(), nullable=False),
    ],
    metadata=FORMAT,
)


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        name: Unique in the file.
        content: What `tools.records` keeps of a run: the columns of TYPED and of JSON_TEXT.
        ranks: (N) uint16 test ranks in the ranking that the run was chosen by, above `rank_limit`: `rank_limit + 1`.
        groups: (N) uint8 indices into LENGTH_GROUPS.
        rank_limit: The largest rank that is stored exactly, so no metric may look further.
    """

    name: str
    content: dict[str, Any]
    ranks: np.ndarray
    groups: np.ndarray
    rank_limit: int

    @property
    def dataset(self) -> str:
        return self.content["dataset"]["name"]

    def metric(self, name: str, *, split: str = "test", seen: str | None = None) -> float:
        return metrics_of(self.content, split=split, seen=seen)[name]

    def rank_metrics(self) -> dict[str, float]:
        """Test metrics from the stored ranks, as far as `rank_limit` allows. `metric` gives what the run measured."""
        return self._metrics(self.ranks)

    def group_metrics(self, group: int) -> dict[str, float]:
        """The same of the users of one group; empty without users."""
        return self._metrics(self.ranks[self.groups == group])

    def _metrics(self, ranks: np.ndarray) -> dict[str, float]:
        found = metrics(ranks)
        return {name: value for name, value in found.items() if int(name.partition("@")[2]) <= self.rank_limit}


def ranking_of(content: dict[str, Any]) -> Ranking:
    """The ranking that the run was chosen by. A system without training leaves seen items out."""
    return ranking_for(content["train"].get("seen_items", "exclude"))


def metrics_of(content: dict[str, Any], *, split: str = "test", seen: str | None = None) -> dict[str, Any]:
    """Metrics of a split, in the ranking that the run was chosen by unless `seen` names one."""
    result, ranking = content["metrics"][split], seen or ranking_of(content)
    return result if ranking == "seen_excluded" else result[ranking]


def read_records(path: Path) -> list[Record]:
    """All records of a file, by name; none if there is no file. Raises UsageError for a file that is none of ours."""
    if not path.exists():
        return []
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        found = {key: (file.schema_arrow.metadata or {}).get(key) for key in FORMAT}
        if found != FORMAT:
            raise ValueError(f"its format is {found}, not {FORMAT}")
        records = [_record(row) for row in file.read().cast(SCHEMA).to_pylist()]
        if [record.name for record in records] != sorted({record.name for record in records}):
            raise ValueError("its names are not unique and sorted")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200] or repr(error)
        raise UsageError(
            f"{path} cannot be read as a records file ({reason})", "restore it from git", parameter="records"
        ) from None
    return records


def _record(row: dict[str, Any]) -> Record:
    content = {name: row[name] for name in TYPED} | {name: json.loads(row[name]) for name in JSON_TEXT}
    ranks, groups = np.array(row["ranks"], np.uint16), np.frombuffer(row["groups"], np.uint8)
    if len(ranks) != len(groups) or not len(ranks):
        raise ValueError(f"{row['name']} has {len(ranks)} ranks and {len(groups)} groups")
    if ranks.min() < 1 or ranks.max() > row["rank_limit"] + 1 or groups.max() >= len(LENGTH_GROUPS):
        raise ValueError(f"{row['name']} has ranks or groups out of range")
    record = Record(row["name"], content, ranks, groups, row["rank_limit"])
    record.dataset, record.metric("hr@10"), record.metric("hr@10", split="valid")  # what every reader uses
    return record


def records_bytes(records: Iterable[Record]) -> bytes:
    """The file of these records. The same records give the same bytes, in whatever order they come."""
    rows = [_row(record) for record in sorted(records, key=lambda record: record.name)]
    buffer = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(rows, schema=SCHEMA),
        buffer,
        compression="zstd",
        compression_level=19,
        use_dictionary=["groups"],  # the runs of a dataset share them
        column_encoding={"ranks.list.element": "BYTE_STREAM_SPLIT"},  # the upper bytes are nearly all zero
        data_page_size=1 << 26,
        row_group_size=1 << 20,
        write_statistics=False,
        write_page_checksum=True,
    )
    return buffer.getvalue()


def _row(record: Record) -> dict[str, Any]:
    text = {name: json.dumps(record.content[name], separators=(",", ":")) for name in JSON_TEXT}
    return {
        "name": record.name,
        **{name: record.content[name] for name in TYPED},
        **text,
        "rank_limit": record.rank_limit,
        "ranks": record.ranks,
        "groups": record.groups.astype(np.uint8).tobytes(),
    }


def change_records(path: Path, change: Callable[[dict[str, Record]], None]) -> list[Record]:
    """Reads a file, lets `change` edit its records by name, and replaces the file at once. Returns the new records.

    Another process that changes the file at the same time waits. Nothing is written if `change` raises. Raises
    UsageError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            records = {record.name: record for record in read_records(path)}
            change(records)
            _write_atomically(path, records_bytes(records.values()))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror})", "choose another file", parameter="records"
        ) from None
    return list(records.values())


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_atomically(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        new = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            new.chmod(0o644)
            new.replace(path)
        except BaseException:
            new.unlink()
            raise


def add(path: Path, record: Record) -> None:
    """Adds a record, or replaces the one of that name."""
    change_records(path, lambda records: records.update({record.name: record}))


def drop(path: Path, names: Sequence[str]) -> None:
    """Removes records. Raises UsageError, and removes none, if one of the names is unknown."""

    def remove(records: dict[str, Record]) -> None:
        if unknown := [name for name in names if name not in records]:
            raise UsageError(
                f"{path} has no record {', '.join(unknown)}", "list the records to see their names", parameter="drop"
            )
        for name in names:
            records.pop(name, None)

    change_records(path, remove)
