"""What the commands do that read or write logs. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from dman_runtime.commands.steps import by_whom, done, open_generation, open_state, spread_of
from dman_runtime.data.filters import FILTERS
from dman_runtime.data.log_options import LogOptions, options_of_training
from dman_runtime.errors import UsageError
from dman_runtime.jobs.partitions import EVENTS_PER_PARTITION
from dman_runtime.options import overridden, print_json

if TYPE_CHECKING:
    from dman_runtime.data.input_report import InputReport
    from dman_runtime.data.logs import Log
    from dman_runtime.model.generation import Generation


def _log_options(arguments: argparse.Namespace, generation: Generation) -> LogOptions:
    """A command reads a log as the bundle's training read its own, but for the options given."""
    options: LogOptions = overridden(options_of_training(generation.bundle.manifest.data), arguments)
    return options


def _input(arguments: argparse.Namespace, generation: Generation) -> AbstractContextManager[Log]:
    """The log of a command that works on it part by part."""
    from dman_runtime.data.logs import open_log

    options, known = _log_options(arguments, generation), generation.bundle.items.index
    return open_log(arguments.input, options, known_items=known, max_rows=EVENTS_PER_PARTITION)


def _goes_on(arguments: argparse.Namespace, report: InputReport, generation: Generation) -> bool:
    """Prints what was understood of a log. Returns whether the command does more than that. Raises InputError."""
    from dman_runtime.jobs.input import notice_differences, require_known

    notice_differences(report, generation.bundle)
    print(report.table(), flush=True)
    if arguments.dry_run and arguments.json:
        print_json(report.as_dict())
    elif not arguments.dry_run and hasattr(arguments, "max_unknown"):
        require_known(report, generation.bundle, arguments.max_unknown)
    return not arguments.dry_run


def import_(arguments: argparse.Namespace) -> int:
    from dman_runtime.engine import Engine
    from dman_runtime.jobs.importing import import_histories

    generation = open_generation(arguments)
    with _input(arguments, generation) as log:
        if not _goes_on(arguments, log.report, generation):
            return 0
        spread = spread_of(arguments, generation, events=log.report.events)
        with open_state(arguments) as store:
            result = import_histories(log, Engine(generation, store), spread, threads=arguments.encoder_threads)
    log.report.unknown_users = result.new_users
    text = f"imported {result.events} events of {result.users} users into {arguments.state}; {result.summary()}"
    text += by_whom(spread, events=result.events)
    return done(arguments, text, vars(result) | {"input": log.report.as_dict()})


def export_log(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.exporting import export_log as export_store
    from dman_runtime.store.opening import open_store

    with open_store(arguments.state, readonly=True) as store:
        result = export_store(store, arguments.output)
    print(f"exported {result.summary()} into {arguments.output}")
    print("".join(f"warning: {text}\n" for text in result.warnings), end="")
    if arguments.json:
        print_json(vars(result) | {"output": str(arguments.output)})
    return 0


def score(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.scoring import score as score_log
    from dman_runtime.requests import MAX_K

    if not 1 <= arguments.k <= MAX_K:
        raise UsageError(f"k is {arguments.k}", f"choose 1 to {MAX_K}", parameter="k")
    generation = open_generation(arguments)
    with _input(arguments, generation) as log:
        if not _goes_on(arguments, log.report, generation):
            return 0
        result = score_log(
            log,
            arguments.output,
            generation,
            k=arguments.k,
            include_seen=arguments.include_seen,
            at=arguments.at,
            spread=spread_of(arguments, generation, events=log.report.events),
            threads=arguments.encoder_threads,
        )
    print("\n".join(result.lines(arguments.output, arguments.k)))
    if arguments.json:
        about = {"output": str(arguments.output), "bundle_id": generation.bundle_id}
        print_json(vars(result) | about | {"input": log.report.as_dict()})
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from dman_runtime.data.evaluation import format_report
    from dman_runtime.data.vocabulary import read_known
    from dman_runtime.jobs.evaluating import evaluate as evaluate_log

    filters = {name: getattr(arguments, name) for name in FILTERS if hasattr(arguments, name)}
    generation = open_generation(arguments)
    bundle, options = generation.bundle, _log_options(arguments, generation)
    log = read_known(arguments.data, bundle.items.index, options, trained=bundle.manifest.data, filters=filters)
    if not _goes_on(arguments, log.report, generation):
        return 0
    result = evaluate_log(log, generation, split=arguments.split)
    print(f"\n{format_report(result)}")
    if arguments.json:
        print_json(result | {"bundle_id": generation.bundle_id, "input": log.report.as_dict()})
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "import": import_,
    "export-log": export_log,
    "score": score,
    "evaluate": evaluate,
}
