"""The measurements without a server: import against its bare graph runs, and the encoder on CUDA against the CPU."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dman_runtime.data.logs import open_log
from dman_runtime.engine import Engine
from dman_runtime.errors import EncoderError
from dman_runtime.jobs.importing import import_histories
from dman_runtime.jobs.partitions import EVENTS_PER_PARTITION
from dman_runtime.model.bundle import Bundle, StateShape
from dman_runtime.model.encoder import Encoder
from dman_runtime.model.generation import Generation
from dman_runtime.model.recurrence import Graphs
from dman_runtime.model.times import BUCKETS
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.marker import marker_path
from tools.bench.blocks import Spread
from tools.bench.report import Claim, Section
from tools.bench.setting import Bench

MIN_IMPORT_SHARE = 0.8  # of the speed of the bare graphs
T = TypeVar("T")
CUDA_BATCHES, CUDA_REPEATS, CUDA_RUNS = (1, 64, 1024), 5, 10


class Recorder:
    """Graphs that remember every call."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs, self.provider, self.on_cuda = graphs, graphs.provider, graphs.on_cuda
        self.calls: list[tuple[Callable[..., object], tuple[np.ndarray, ...]]] = []

    def encode(self, *arrays: Any) -> tuple[np.ndarray, np.ndarray]:
        return self._remember(self._graphs.encode, tuple(array for array in arrays if array is not None))

    def abstract(self, *arrays: np.ndarray) -> np.ndarray:
        return self._remember(self._graphs.abstract, arrays)

    def read_at_request(self, *arrays: np.ndarray) -> np.ndarray:
        return self._remember(self._graphs.read_at_request, arrays)

    def _remember(self, graph: Callable[..., T], arrays: tuple[np.ndarray, ...]) -> T:
        self.calls.append((graph, tuple(array.copy(order="K") for array in arrays)))
        return graph(*arrays)

    def replay(self) -> float:
        """Seconds that the remembered calls take by themselves."""
        began = time.perf_counter()
        for graph, arrays in self.calls:
            graph(*arrays)
        return time.perf_counter() - began


def write_log(bench: Bench, path: Path) -> int:
    """A log over the bundle's items with Zipfian popularity and log-normal history lengths; returns its events."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes, random = bench.sizes, np.random.default_rng(0)
    sigma = 0.9  # as in dman_train.synthetic: the longest percentile is 8 times the median
    lengths = random.lognormal(np.log(sizes.import_events) - sigma**2 / 2, sigma, sizes.import_users)
    lengths = np.maximum(lengths.astype(int), 2)
    weights = 1 / np.arange(1, bench.bundle.manifest.vocabulary + 1) ** 0.8
    events = int(lengths.sum())
    items = random.choice(len(weights), events, p=weights / weights.sum())
    table = pa.table(
        {
            "user_id": np.repeat(np.arange(sizes.import_users), lengths),
            "item_id": pa.array(bench.bundle.items.item_ids).take(pa.array(items)),
            "timestamp": np.arange(events),
        }
    )
    pq.write_table(table, path)
    return events


def import_speed(bench: Bench) -> Section:
    """`import` of a log into a fresh store, against the graph runs of that import alone, in turns."""
    log = bench.scratch / "log.parquet"
    events = write_log(bench, log)
    encoder = Encoder.of(bench.bundle, provider=bench.provider)  # type: ignore[arg-type]
    recorder = Recorder(encoder)
    _, stored_bytes = _import(bench, log, recorder, events)
    recorder.replay()  # warm, as the import now is
    times = [(_import(bench, log, encoder, events)[0], recorder.replay()) for _ in range(bench.sizes.import_repeats)]
    share = Spread(tuple(bare / whole for whole, bare in times))
    speed, bare_speed = (Spread(tuple(events / pair[which] for pair in times)) for which in (0, 1))
    runs = sum(graph == encoder.encode for graph, _ in recorder.calls)
    measured = f"{share.median:.2f}x ({speed.median:.0f} by {bare_speed.median:.0f})"
    return Section(
        "Import",
        f"{events} events of {bench.sizes.import_users} users (Zipfian items, log-normal lengths) from a Parquet file "
        f"into a fresh store, durable commits included, on {encoder.provider}; the bare graphs are the {runs} encoder "
        f"and {len(recorder.calls) - runs} abstraction runs of that import on the same arrays. Speed of import by "
        f"speed of the bare graphs: {share}. The store held {stored_bytes / bench.sizes.import_users / 1000:.1f} kB "
        "a user afterwards, history included.",
        [
            Claim(
                "import by bare graph runs, events/s",
                measured,
                f">= {MIN_IMPORT_SHARE}x",
                share.median >= MIN_IMPORT_SHARE,
            ),
        ],
        ("repeat", "import s", "bare graphs s", "import events/s", "share"),
        [
            [str(i + 1), f"{whole:.2f}", f"{bare:.2f}", f"{events / whole:.0f}", f"{bare / whole:.2f}"]
            for i, (whole, bare) in enumerate(times)
        ],
        {
            "events": events,
            "import_s": [whole for whole, _ in times],
            "bare_s": [bare for _, bare in times],
            "share": share.values,
            "stored_bytes_per_user": stored_bytes / bench.sizes.import_users,
        },
    )


def _import(bench: Bench, log: Path, graphs: Graphs, events: int) -> tuple[float, int]:
    """Seconds, and the bytes in the store afterwards."""
    state = bench.scratch / "import"
    with LmdbStore.open(state) as store:
        began = time.perf_counter()
        with open_log(log, max_rows=EVENTS_PER_PARTITION) as opened:
            result = import_histories(opened, Engine(Generation.of(bench.bundle, graphs), store))
        taken = time.perf_counter() - began
        used = store.stats().bytes_used
    shutil.rmtree(state)
    marker_path(state).unlink(missing_ok=True)
    assert result.events == events, f"{result.events} of {events} events were imported"
    return taken, used


def cuda(bench: Bench) -> Section:
    """The encoder on CUDA against the CPU; a line saying why not where there is none."""
    try:
        return encoder_latency(bench.bundle, CUDA_BATCHES, repeats=CUDA_REPEATS)
    except EncoderError as error:
        return Section("CUDA", f"Not measured: {str(error).partition(';')[0]}.", [])


def encoder_latency(bundle: Bundle, batches: Sequence[int], *, repeats: int) -> Section:
    """Runs of the encoder on CUDA and on the CPU, in turns. Raises EncoderError where CUDA does not work."""
    on_cuda, on_cpu, rows = Encoder.of(bundle, provider="cuda"), Encoder.of(bundle, provider="cpu"), []
    for batch in batches:
        for new in (1, bundle.manifest.state.segment_length):
            arrays = segment_arrays(bundle.manifest.state, batch, new)
            pairs = [(_run_seconds(on_cuda, arrays), _run_seconds(on_cpu, arrays)) for _ in range(repeats)]
            cuda_ms, cpu_ms = (Spread(tuple(1000 * pair[which] for pair in pairs)) for which in (0, 1))
            gain = Spread(tuple(cpu / gpu for gpu, cpu in pairs))
            rows.append([str(batch), str(new), str(cuda_ms), str(cpu_ms), str(gain)])
    return Section(
        "CUDA",
        "One run of the segment encoder with a full context, copies to and from the device included; the CPU with one "
        "thread.",
        [
            Claim(f"encoder on CUDA by CPU, batches of {row[0]} x {row[1]} events", f"{row[4]} times the speed")
            for row in rows
        ],
        ("batch", "new events", "CUDA ms", "CPU ms", "CPU by CUDA"),
        rows,
        {"runs": [dict(zip(("batch", "new", "cuda_ms", "cpu_ms", "gain"), row, strict=True)) for row in rows]},
    )


def segment_arrays(shape: StateShape, batch: int, new: int) -> tuple[np.ndarray, ...]:
    """What the encoder takes for `new` events of each of some users, with a full context."""
    random = np.random.default_rng(0)
    context = shape.context_limit - new

    def normal(*size: int) -> np.ndarray:
        return random.standard_normal(size, np.float32)

    return (
        normal(batch, new, shape.width),
        np.full(batch, new),
        normal(batch, shape.layers, context, shape.width),
        np.full(batch, context),
        normal(batch, shape.layers, shape.memory_slots, shape.width),
        *([random.integers(0, BUCKETS, (batch, new, shape.context_limit))] if shape.sees_times else []),
    )


def _run_seconds(encoder: Encoder, arrays: tuple[np.ndarray, ...]) -> float:
    encoder.encode(*arrays)
    began = time.perf_counter()
    for _ in range(CUDA_RUNS):
        encoder.encode(*arrays)
    return (time.perf_counter() - began) / CUDA_RUNS
