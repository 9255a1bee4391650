"""What each command of `dman-runtime` does with its options. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from dman_runtime.data.filters import FILTERS
from dman_runtime.data.log_options import LogOptions, options_of_training
from dman_runtime.errors import UsageError
from dman_runtime.jobs.partitions import EVENTS_PER_PARTITION
from dman_runtime.options import overridden, print_json
from dman_runtime.serving.config import ServeConfig

if TYPE_CHECKING:
    from dman_runtime.data.input_report import InputReport
    from dman_runtime.data.logs import Log
    from dman_runtime.model.generation import Generation


MAX_IDLE_DAYS = 36_500


def serve(arguments: argparse.Namespace) -> int:
    from dman_runtime.serving.supervisor import serve as supervise

    names = {field.name for field in fields(ServeConfig)}
    return supervise(ServeConfig(**{name: value for name, value in vars(arguments).items() if name in names}))


def status(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.asking import ask_status, format_status

    status = ask_status(
        arguments.target,
        token_file=arguments.token_file,
        ca=arguments.ca,
        client_cert=arguments.client_cert,
        client_key=arguments.client_key,
        timeout=arguments.timeout,
    )
    print(format_status(status))
    if arguments.json:
        print_json(status)
    return 0 if status["ready"] and not status["problems"] else 1


def verify(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.verifying import format_report, verify_store

    report = verify_store(arguments.state)
    print(format_report(report))
    if arguments.json:
        print_json(report.as_dict())
    return report.exit_status


def backup(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.backup import backup as copy_store

    copied = copy_store(arguments.state, arguments.output)
    return _done(arguments, f"copied {arguments.state} to {copied.summary()}", vars(copied))


def restore(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.backup import restore as restore_store

    copied = restore_store(arguments.backup, arguments.state)
    return _done(arguments, f"restored {arguments.backup} to {copied.summary()}", vars(copied))


def export_user(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.leaving import document_text, user_document
    from dman_runtime.store.lmdb import LmdbStore

    with LmdbStore.open(arguments.state, readonly=True) as store:
        print(document_text(user_document(store, arguments.user)))
    return 0


def expire(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.leaving import DAY
    from dman_runtime.jobs.leaving import expire as expire_users
    from dman_runtime.store.lmdb import LmdbStore

    if not 0 < arguments.idle_days < MAX_IDLE_DAYS:
        raise UsageError(
            f"idle-days is {arguments.idle_days:g}", f"choose more than 0, below {MAX_IDLE_DAYS}", parameter="idle_days"
        )
    before = int(time.time() - DAY * arguments.idle_days)
    with LmdbStore.open(
        arguments.state, map_size=arguments.map_size_mib << 20, readonly=arguments.dry_run, must_exist=True
    ) as store:
        result = expire_users(store, before=before, dry_run=arguments.dry_run)
    content = vars(result) | {"before": before, "dry_run": arguments.dry_run}
    return _done(arguments, result.summary(dry_run=arguments.dry_run), content)


def token(arguments: argparse.Namespace) -> int:
    from dman_runtime.access.tokens import new_token

    token, line = new_token(arguments.name, arguments.roles.split(","))
    print(f"token, shown this once: {token}")
    print(f"line for the token file: {line}")
    return 0


def _done(arguments: argparse.Namespace, text: str, content: dict[str, Any]) -> int:
    """Prints the result of a command for people and, if asked for, as JSON. Returns the exit status."""
    print(text)
    if arguments.json:
        print_json(content)
    return 0


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


def _generation(arguments: argparse.Namespace) -> Generation:
    from dman_runtime.model.generation import Generation

    return Generation.open(arguments.bundle, provider=arguments.provider, threads=arguments.encoder_threads)


def import_(arguments: argparse.Namespace) -> int:
    from dman_runtime.engine import Engine
    from dman_runtime.jobs.importing import import_histories
    from dman_runtime.store.lmdb import LmdbStore

    generation = _generation(arguments)
    with _input(arguments, generation) as log:
        if not _goes_on(arguments, log.report, generation):
            return 0
        with LmdbStore.open(arguments.state, map_size=arguments.map_size_mib << 20) as store:
            result = import_histories(log, Engine(generation, store))
    log.report.unknown_users = result.new_users
    text = f"imported {result.events} events of {result.users} users into {arguments.state}; {result.summary()}"
    return _done(arguments, text, vars(result) | {"input": log.report.as_dict()})


def rebuild(arguments: argparse.Namespace) -> int:
    from dman_runtime.engine import Engine
    from dman_runtime.jobs.rebuilding import rebuild as rebuild_store
    from dman_runtime.store.lmdb import LmdbStore

    if not 0 < arguments.max_share <= 1:
        raise UsageError(
            f"max-share is {arguments.max_share}", "choose more than 0, and 1 at most", parameter="max_share"
        )
    generation = _generation(arguments)
    with LmdbStore.open(arguments.state, map_size=arguments.map_size_mib << 20, must_exist=True) as store:
        result = rebuild_store(Engine(generation, store), path=arguments.state, max_share=arguments.max_share)
    text = f"encoded {result.events} events for {result.rebuilt} records of bundle {generation.bundle_id}"
    content = vars(result) | {"bundle_id": generation.bundle_id}
    return _done(arguments, f"{text} in {arguments.state}; {result.summary()}", content)


def activate(arguments: argparse.Namespace) -> int:
    from dman_runtime.engine import Engine
    from dman_runtime.jobs.activating import activate as activate_bundle
    from dman_runtime.store.lmdb import LmdbStore

    if not 0 < arguments.share <= 1:
        raise UsageError(f"share is {arguments.share}", "choose more than 0, and 1 at most", parameter="share")
    generation = _generation(arguments)
    with LmdbStore.open(arguments.state, map_size=arguments.map_size_mib << 20, must_exist=True) as store:
        Engine(generation, store)  # gives the bundle its numbers
        result = activate_bundle(
            store,
            arguments.state,
            generation.bundle_id,
            arguments.bundle,
            share=arguments.share,
            wait=arguments.wait,
        )
    content = result.rollout._asdict() | {"before": result.before, "servers": result.servers}
    return _done(arguments, result.summary(), content)


def generations(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.generations import format_generations, list_generations
    from dman_runtime.store.lmdb import LmdbStore

    with LmdbStore.open(arguments.state, readonly=True) as store:
        found = list_generations(store)
    content = {"users": found.users, "generations": [vars(one) for one in found.generations]}
    return _done(arguments, format_generations(found), content)


def drop(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.generations import drop_generation
    from dman_runtime.presence import present
    from dman_runtime.store.lmdb import LmdbStore

    with LmdbStore.open(arguments.state, map_size=arguments.map_size_mib << 20, must_exist=True) as store:
        dropped = drop_generation(store, arguments.bundle_id, present(arguments.state))
    print(f"dropped {dropped} records of bundle {arguments.bundle_id} from {arguments.state}; all histories stay")
    return 0


def export_log(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.exporting import export_log as export_store
    from dman_runtime.store.lmdb import LmdbStore

    with LmdbStore.open(arguments.state, readonly=True) as store:
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
    generation = _generation(arguments)
    with _input(arguments, generation) as log:
        if not _goes_on(arguments, log.report, generation):
            return 0
        result = score_log(
            log, arguments.output, generation, k=arguments.k, include_seen=arguments.include_seen, at=arguments.at
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
    generation = _generation(arguments)
    bundle, options = generation.bundle, _log_options(arguments, generation)
    log = read_known(arguments.data, bundle.items.index, options, trained=bundle.manifest.data, filters=filters)
    if not _goes_on(arguments, log.report, generation):
        return 0
    result = evaluate_log(log, generation, split=arguments.split)
    print(f"\n{format_report(result)}")
    if arguments.json:
        print_json(result | {"bundle_id": generation.bundle_id, "input": log.report.as_dict()})
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.inspecting import inspect_bundle, inspect_store, inspect_user

    if arguments.user is not None and arguments.state is None:
        raise UsageError("a user needs the store that holds the state", "name its directory", parameter="state")
    if arguments.user is not None:
        result = inspect_user(arguments.bundle, arguments.state, arguments.user)
    else:
        result = {"bundle": inspect_bundle(arguments.bundle)}
        if arguments.state is not None:
            result["state"] = inspect_store(arguments.state)
    if arguments.json:
        print_json(result)
    else:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "serve": serve,
    "status": status,
    "verify": verify,
    "backup": backup,
    "restore": restore,
    "export-user": export_user,
    "expire": expire,
    "token": token,
    "import": import_,
    "rebuild": rebuild,
    "activate": activate,
    "generations": generations,
    "drop": drop,
    "export-log": export_log,
    "score": score,
    "evaluate": evaluate,
    "inspect": inspect,
}
