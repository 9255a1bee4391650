"""The command that stores events as they come. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from dman_runtime.commands.steps import done, open_generation, open_state
from dman_runtime.ingest.options import IngestOptions
from dman_runtime.metrics import IngestCounts
from dman_runtime.options import overridden


def ingest(arguments: argparse.Namespace) -> int:
    from dman_runtime.ingest.opening import check_source
    from dman_runtime.serving.stop import StopRequest

    options: IngestOptions = overridden(IngestOptions(), arguments)
    check_source(arguments.source, options)
    with StopRequest() as stop:
        return _ingest(arguments, options, lambda: stop.wait(0))


def _ingest(arguments: argparse.Namespace, options: IngestOptions, stopped: Callable[[], bool]) -> int:
    from dman_runtime.engine import Engine
    from dman_runtime.id_types import remember_id_types
    from dman_runtime.ingest.opening import open_source
    from dman_runtime.jobs.ingesting import Ingester

    generation = open_generation(arguments)
    with open_state(arguments) as store:
        engine = Engine(generation, store, late_events=options.late_events)
        remember_id_types(store, generation.bundle.manifest)
        types = store.id_types()
        source, reader = open_source(arguments.source, options, user_ids=types.users, item_ids=types.items)
        ingester = Ingester(
            engine,
            source,
            reader,
            batch_events=options.batch_events,
            batch_seconds=options.batch_ms / 1000,
            stop_at_bad=options.bad_events == "fail" and not options.dead_letters,
            stopped=stopped,
        )
        with closing(source), _metrics(arguments, ingester.counts):
            print(f"ingesting {arguments.source} into {arguments.state}, bundle {generation.bundle_id}", flush=True)
            counts = ingester.run()
    return done(arguments, f"{counts.summary()}; lag {counts.lag} {source.unit}", vars(counts))


@contextmanager
def _metrics(arguments: argparse.Namespace, counts: IngestCounts) -> Iterator[None]:
    if arguments.metrics_port is None:
        yield
        return
    from dman_runtime.serving.ingest_metrics import ingest_registry
    from dman_runtime.serving.metrics_server import serve_metrics

    server = serve_metrics(ingest_registry(counts), host=arguments.metrics_host, port=arguments.metrics_port)
    try:
        yield
    finally:
        server.stop()


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"ingest": ingest}
