"""Interaction logs for tests: random rows, files of them, and histories in external ids to compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from dman_runtime.data.interactions import Interactions
from dman_runtime.data.log_options import ANY_LOG, LogOptions, options_of_training
from dman_runtime.data.logs import open_log
from dman_runtime.engine import Engine
from dman_runtime.jobs import partitions, scoring
from dman_runtime.jobs.importing import ImportResult, import_histories
from dman_runtime.jobs.spreading import HERE, Spread
from dman_runtime.model.generation import Generation

HEADER = "user_id,item_id,timestamp\n"
Row = tuple[str, str, int]  # user, item, time
_PLAIN_ID = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=6).filter(
    lambda text: text == text.strip()  # blanks around ids are removed
)
_INTEGER_ID = st.integers(-50, 10**20).map(str)


@st.composite
def logs(draw: st.DrawFn) -> list[Row]:
    """Rows with few users, items and times, so that ties are common."""
    users, items = (
        draw(st.lists(draw(st.sampled_from((_PLAIN_ID, _INTEGER_ID))), min_size=1, max_size=4)) for _ in "ui"
    )
    # whole numbers in two forms are refused, and exact repeats are left out; other tests say so
    row = st.tuples(st.sampled_from([*users, "x"]), st.sampled_from([*items, "7"]), st.integers(-3, 3))
    return [("x", "7", 0), *draw(st.lists(row, max_size=40))]


KEEP = LogOptions(exact_repeats="keep")


def write(path: Path, rows: Iterable[Row]) -> Path:
    """The rows as a file in the format that the name asks for."""
    rows = list(rows)
    if path.suffix == ".parquet":
        columns = zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True), strict=True)
        pq.write_table(pa.table({name: list(values) for name, values in columns}), path)
        return path
    separator = "," if path.suffix == ".csv" else "\t"
    lines = [("user_id", "item_id", "timestamp"), *((_quoted(u), _quoted(i), str(t)) for u, i, t in rows)]
    path.write_text("".join(separator.join(line) + "\n" for line in lines), encoding="utf-8", newline="")
    return path


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def histories(log: Interactions) -> dict[str, list[tuple[str, int]]]:
    """External ids and times by user."""
    return {
        user: [(log.item_ids[i], int(t)) for i, t in zip(log.history(u), log.user_timestamps(u), strict=True)]
        for u, user in enumerate(log.user_ids)
    }


def expected_histories(rows: list[Row]) -> dict[str, list[tuple[str, int]]]:
    """The reference: Python's stable sort by time, user by user."""
    users = dict.fromkeys(user for user, _, _ in rows)
    return {user: sorted(((i, t) for u, i, t in rows if u == user), key=lambda event: event[1]) for user in users}


def as_tuple(log: Interactions) -> tuple[object, ...]:
    arrays = (log.offsets.tolist(), log.items.tolist(), log.timestamps.tolist())
    return log.user_ids, log.item_ids, *arrays, log.integer_user_ids, log.integer_item_ids


def text_log(folder: Path, text: str, name: str = "log.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def parquet_log(folder: Path, **columns: object) -> Path:
    path = folder / "log.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def parts_of(path: Path, options: LogOptions = ANY_LOG, *, max_rows: int) -> list[Interactions]:
    with open_log(path, options, max_rows=max_rows) as log:
        return list(log.parts())


def import_log(path: Path, engine: Engine, options: LogOptions = ANY_LOG, *, spread: Spread = HERE) -> ImportResult:
    """Imports a file as the command does."""
    with open_log(path, options, max_rows=partitions.EVENTS_PER_PARTITION) as log:
        return import_histories(log, engine, spread)


def score_log(path: Path, output: Path, generation: Generation, **options: Any) -> scoring.ScoreResult:
    """Scores a file as the command does; `user_ids` is that option."""
    given = options_of_training(generation.bundle.manifest.data)
    given = replace(given, user_ids=options.pop("user_ids", given.user_ids))
    with open_log(path, given, max_rows=partitions.EVENTS_PER_PARTITION) as log:
        return scoring.score(log, output, generation, **options)
