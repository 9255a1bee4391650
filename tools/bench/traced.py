"""A real server that notes where its time goes: `python -m tools.bench.traced FILE serve ...`, as `dman-runtime serve`.

Its functions are wrapped, nothing else is changed. Each wrapper takes about a microsecond, which counts for what called
the function. A stage has the time that its functions take themselves, without those of other stages in them. When the
server stops, FILE gets all stages as arrays: number of the stage, and begin and nanoseconds by `time.perf_counter_ns`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from dman_runtime import retrieval
from dman_runtime.retrieval.base import Retriever

HANDLER, RECEIVE, SEARCH = "handler", "gRPC: handing over the message", "search"
STAGES: dict[str, tuple[str, ...]] = {
    "who calls, limits, admission": (
        "dman_runtime.api.door:Door.caller_of",
        "dman_runtime.api.admission:Admission.enter",
        "dman_runtime.api.admission:Admission.leave",
        "dman_runtime.api.admission:Admission.hold",
        "dman_runtime.api.admission:Admission.release",
        "dman_runtime.api.admission:Held.__init__",
        "dman_runtime.access.limits:Limits.admit",
    ),
    "parsing and checking": (
        "dman_runtime.api.door:Door._read",
        "dman_runtime.api.recommender:_query",
        "dman_runtime.api.recommender:_update",
        "dman_runtime.api.recommender:check_query",
        "dman_runtime.api.recommender:check_queries",
        "dman_runtime.api.recommender:check_update",
        "dman_runtime.queries:check_query",
    ),
    "which bundle and catalogue": ("dman_runtime.routing:Router.of",),
    "reading the store": (
        "dman_runtime.store.environment:ReadTransaction.__enter__",
        "dman_runtime.store.environment:ReadTransaction.__exit__",
        "dman_runtime.store.lmdb_reads:LmdbSnapshot.ranking_view",
        "dman_runtime.store.lmdb_reads:LmdbSnapshot.get_many",
        "dman_runtime.store.lmdb_reads:LmdbSnapshot.applied",
        "dman_runtime.store.lmdb_reads:LmdbSnapshot.history",
        "dman_runtime.store.lmdb_reads:LmdbSnapshot.seen",
    ),
    "states from and to bytes": (
        "dman_runtime.model.generation:Generation.read_for_answer",
        "dman_runtime.model.generation:Generation.unpack",
        "dman_runtime.model.generation:Generation.pack",
    ),
    "graph": (
        "dman_runtime.model.encoder:Encoder.encode",
        "dman_runtime.model.encoder:Encoder.abstract",
        "dman_runtime.model.encoder:Encoder.read_at_request",
    ),
    "around the graph": (
        "dman_runtime.model.generation:Generation.asked",
        "dman_runtime.model.generation:Generation.advance",
        "dman_runtime.model.generation:Generation.advance_pieces",
    ),
    SEARCH: (),  # of every `Retriever`
    "engine": (
        "dman_runtime.engine:Engine.plain_answer",
        "dman_runtime.engine:Engine.open_queries",
        "dman_runtime.engine:Engine.open_updates",
        "dman_runtime.engine:Engine.answer",
        "dman_runtime.engine:Engine.commit",
    ),
    "commit": ("dman_runtime.store.lmdb:LmdbStore.commit",),
    "batcher": ("dman_runtime.batcher:Batcher._turn", "dman_runtime.batcher:Batcher._submit"),
    "reply": (
        "dman_runtime.api.recommender:RecommenderService._recommend_reply",
        "dman_runtime.api.recommender:RecommenderService._batch_reply",
        "dman_runtime.api.recommender:RecommenderService._update_reply",
        "dman_runtime.api.door:_serialized",
    ),
}
NAMES = (*STAGES, RECEIVE, HANDLER)


class Trace:
    """What was noted, by all threads."""

    def __init__(self) -> None:
        self._noted: list[tuple[int, int, int]] = []  # stage, begin, nanoseconds
        self._running = threading.local()  # of each thread: nanoseconds of the stages within those that run

    def wrap(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        number, noted, running = NAMES.index(stage), self._noted, self._running

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            inner = running.__dict__.setdefault("inner", [0])
            inner.append(0)
            began = perf_counter_ns()
            try:
                return function(*arguments, **options)
            finally:
                taken = perf_counter_ns() - began
                noted.append((number, began, taken - inner.pop()))
                inner[-1] += taken

        return timed

    def wrap_waiting(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Of a coroutine: the whole time until it has its result."""
        number, noted = NAMES.index(stage), self._noted

        @functools.wraps(function)
        async def timed(*arguments: Any, **options: Any) -> Any:
            began = perf_counter_ns()
            try:
                return await function(*arguments, **options)
            finally:
                noted.append((number, began, perf_counter_ns() - began))

        return timed

    def call(self, metrics: Any, method: str, status: str, seconds: float) -> None:
        """In place of `Metrics.call`: a handler has ended."""
        now, taken = perf_counter_ns(), round(seconds * 1e9)
        self._noted.append((NAMES.index(HANDLER), now - taken, taken))

    def write(self, path: Path) -> None:
        np.save(path, np.array(self._noted, np.int64).reshape(-1, 3))


def install(trace: Trace) -> None:
    """Wraps all functions. AttributeError where one has gone: then name the one in its place."""
    for stage, functions in (STAGES | {SEARCH: _searches()}).items():
        for name in functions:
            _replace(name, functools.partial(trace.wrap, stage))
    _replace("dman_runtime.api.admission:Receiver.receive", functools.partial(trace.wrap_waiting, RECEIVE))
    _replace("dman_runtime.metrics:Metrics.call", lambda _: _method(trace))


def _searches() -> tuple[str, ...]:
    """Of all classes that are retrievers."""
    names = (f"{retrieval.__name__}.{module.name}" for module in pkgutil.iter_modules(retrieval.__path__))
    return tuple(
        f"{name}:{kind.__name__}.search"
        for name in names
        for kind in vars(importlib.import_module(name)).values()
        if inspect.isclass(kind) and kind.__module__ == name and "search" in vars(kind) and kind is not Retriever
    )


def _method(trace: Trace) -> Callable[..., None]:
    def call(metrics: Any, method: str, status: str, seconds: float) -> None:
        trace.call(metrics, method, status, seconds)

    return call


def _replace(name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, last = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, last, change(getattr(owner, last)))


def main() -> int:
    from dman_runtime import cli

    trace = Trace()
    install(trace)
    try:
        return cli.main(sys.argv[2:])
    finally:
        trace.write(Path(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
