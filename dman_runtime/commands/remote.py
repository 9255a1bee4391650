"""The commands that look after a store, asked of a running server: the same output, and the same exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dman_runtime.commands.items import check_items, show_off
from dman_runtime.commands.steps import done, server_of

if TYPE_CHECKING:
    from sdk import AdminClient, Progress, Rebuilt, Switched


def _items(client: AdminClient, given: argparse.Namespace) -> Switched | tuple[str, ...]:
    check_items(given)
    if given.action == "list":
        return client.items_off()
    return client.switch_items(given.ids, off=given.action == "off", file=given.file, item_column=given.item_column)


def _rebuild(client: AdminClient, given: argparse.Namespace) -> Rebuilt:
    if (given.engine, given.processes) != ("local", 1):
        print("warning: a server rebuilds in one process (--engine, --processes)", file=sys.stderr)
    return client.rebuild(given.bundle, max_share=given.max_share, progress=_show_progress)


# What each command asks for; the result has its output.
ASKED: dict[str, Callable[[AdminClient, argparse.Namespace], Any]] = {
    "generations": lambda client, given: client.generations(),
    "rebuild": _rebuild,
    "activate": lambda client, given: client.activate(
        given.bundle, share=given.share, wait=given.wait, catch_up=given.catch_up
    ),
    "drop": lambda client, given: client.drop(given.bundle_id),
    "backup": lambda client, given: client.backup(given.output),
    "export-user": lambda client, given: client.export_user(given.user),
    "expire": lambda client, given: client.expire(given.idle_days, dry_run=given.dry_run),
    "verify": lambda client, given: client.verify(bundle=given.bundle, sample=given.sample),
    "items": _items,
    "add-items": lambda client, given: client.add_items(
        given.bundle,
        given.file,
        embeddings=given.embeddings,
        item_column=given.item_column,
        like_column=given.like_column,
    ),
}


def ask(arguments: argparse.Namespace) -> int:
    """Does a command through the server that it names."""
    from dman_runtime.jobs.leaving import document_text
    from sdk import AdminClient

    with server_of(arguments).client(AdminClient) as client:
        try:
            result = ASKED[arguments.command](client, arguments)
        finally:
            _show("")
    if isinstance(result, dict):  # a document
        print(document_text(result))
        return 0
    if isinstance(result, tuple):
        return show_off(arguments, result)
    content = asdict(result)
    text = content.pop("text")
    done(arguments, text, content)
    return 0 if content.get("sound", True) and not (content.get("unknown") or content.get("unusable")) else 1


def _show(text: str) -> None:
    """On the last line of a terminal, in place of what was shown there before."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def _show_progress(progress: Progress) -> None:
    left = "" if progress.seconds_left is None else f", {progress.seconds_left:,.0f} s left"
    _show(f"{progress.done:,} of {progress.total:,}{left}")
