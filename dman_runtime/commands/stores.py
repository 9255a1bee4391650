"""What the commands do that look after a state store. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dman_runtime.commands.steps import by_whom, done, open_generation, open_state, spread_of
from dman_runtime.errors import UsageError
from dman_runtime.options import print_json
from dman_runtime.store.place import directory_of

if TYPE_CHECKING:
    from dman_runtime.store.lmdb import LmdbStore
    from dman_runtime.store.lmdb_verify import Problems

MAX_IDLE_DAYS = 36_500
MAX_WAIT_SECONDS = 86_400


def verify(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.verifying import format_report, verify_store

    if arguments.sample < 0:
        raise UsageError(f"sample is {arguments.sample}", "choose 0 or more", parameter="sample")
    report = verify_store(arguments.state, _records_check(arguments) if arguments.bundle else None)
    print(format_report(report))
    if arguments.json:
        print_json(report.as_dict())
    return report.exit_status


def _records_check(arguments: argparse.Namespace) -> Callable[[LmdbStore, Problems], Mapping[str, int]]:
    from dman_runtime.jobs.replaying import verify_records
    from dman_runtime.model.generation import Generation

    generation = Generation.open(arguments.bundle, provider="cpu")
    return lambda store, problems: verify_records(store, generation, problems, sample=arguments.sample)


def backup(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.backup import backup as copy_store

    copied = copy_store(arguments.state, arguments.output)
    return done(arguments, f"copied {arguments.state} to {copied.summary()}", vars(copied))


def restore(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.backup import restore as restore_store

    copied = restore_store(arguments.backup, arguments.state)
    return done(arguments, f"restored {arguments.backup} to {copied.summary()}", vars(copied))


def compact(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.compacting import compact as compact_store

    result = compact_store(arguments.state, map_size=arguments.map_size_mib << 20)
    return done(arguments, f"compacted {arguments.state}: {result.summary()}", vars(result))


def export_user(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.leaving import document_text, user_document
    from dman_runtime.store.opening import open_store

    with open_store(arguments.state, readonly=True) as store:
        print(document_text(user_document(store, arguments.user)))
    return 0


def expire(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.leaving import DAY
    from dman_runtime.jobs.leaving import expire as expire_users

    if not 0 < arguments.idle_days < MAX_IDLE_DAYS:
        raise UsageError(
            f"idle-days is {arguments.idle_days:g}", f"choose more than 0, below {MAX_IDLE_DAYS}", parameter="idle_days"
        )
    before = int(time.time() - DAY * arguments.idle_days)
    with open_state(arguments, readonly=arguments.dry_run, must_exist=True) as store:
        result = expire_users(store, before=before, dry_run=arguments.dry_run)
    content = vars(result) | {"before": before, "dry_run": arguments.dry_run}
    return done(arguments, result.summary(dry_run=arguments.dry_run), content)


def rebuild(arguments: argparse.Namespace) -> int:
    from dman_runtime.engine import Engine
    from dman_runtime.jobs.rebuilding import rebuild as rebuild_store

    if not 0 < arguments.max_share <= 1:
        raise UsageError(
            f"max-share is {arguments.max_share}", "choose more than 0, and 1 at most", parameter="max_share"
        )
    generation = open_generation(arguments)
    spread = spread_of(arguments, generation, events=None)
    with open_state(arguments, must_exist=True) as store:
        result = rebuild_store(
            Engine(generation, store),
            path=directory_of(arguments.state),
            max_share=arguments.max_share,
            progress=arguments.progress,
            spread=spread,
            threads=arguments.encoder_threads,
        )
    text = f"encoded {result.events} events for {result.rebuilt} records of bundle {generation.bundle_id}"
    content = vars(result) | {"bundle_id": generation.bundle_id}
    text += f" in {arguments.state}; {result.summary()}{by_whom(spread, events=result.events)}"
    return done(arguments, text, content)


def activate(arguments: argparse.Namespace) -> int:
    from dman_runtime.engine import Engine
    from dman_runtime.jobs.activating import activate as activate_bundle
    from dman_runtime.jobs.rebuilding import catch_up

    if not 0 < arguments.share <= 1:
        raise UsageError(f"share is {arguments.share}", "choose more than 0, and 1 at most", parameter="share")
    if not 0 <= arguments.wait <= MAX_WAIT_SECONDS:
        raise UsageError(f"wait is {arguments.wait}", f"choose 0 to {MAX_WAIT_SECONDS} seconds", parameter="wait")
    if not 0 <= arguments.catch_up <= MAX_WAIT_SECONDS:
        raise UsageError(
            f"catch-up is {arguments.catch_up}", f"choose 0 to {MAX_WAIT_SECONDS} seconds", parameter="catch_up"
        )
    generation = open_generation(arguments)
    with open_state(arguments, must_exist=True) as store:
        engine = Engine(generation, store)  # gives the bundle its numbers
        result = activate_bundle(
            store,
            arguments.state,
            generation.bundle_id,
            arguments.bundle,
            share=arguments.share,
            wait=arguments.wait,
            catch_up=lambda: catch_up(engine, seconds=arguments.catch_up),
        )
    content = result.rollout._asdict()
    content |= {"before": result.before, "servers": result.servers, "caught_up": result.caught_up}
    return done(arguments, result.summary(), content)


def generations(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.generations import format_generations, list_generations
    from dman_runtime.store.opening import open_store

    with open_store(arguments.state, readonly=True) as store:
        found = list_generations(store)
    content = {"users": found.users, "generations": [vars(one) for one in found.generations]}
    return done(arguments, format_generations(found), content)


def drop(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.generations import drop_generation
    from dman_runtime.presence import present_at

    with open_state(arguments, must_exist=True) as store:
        dropped = drop_generation(store, arguments.bundle_id, present_at(arguments.state, store))
    text = f"dropped {dropped} records of bundle {arguments.bundle_id} from {arguments.state}; all histories stay"
    return done(arguments, text, {"bundle_id": arguments.bundle_id, "dropped": dropped})


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
    "verify": verify,
    "backup": backup,
    "restore": restore,
    "compact": compact,
    "export-user": export_user,
    "expire": expire,
    "rebuild": rebuild,
    "activate": activate,
    "generations": generations,
    "drop": drop,
    "inspect": inspect,
}
