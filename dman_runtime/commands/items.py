"""What the commands do that change the items of a store. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from dman_runtime.commands.steps import done, open_state
from dman_runtime.errors import UsageError
from dman_runtime.options import print_json


def items(arguments: argparse.Namespace) -> int:
    check_items(arguments)
    if arguments.action == "list":
        return _list(arguments)
    from dman_runtime.data.items import read_item_ids
    from dman_runtime.jobs.switching import switch

    item_ids = list(arguments.ids)
    if arguments.file is not None:
        item_ids += read_item_ids(arguments.file, item_column=arguments.item_column)
    off = arguments.action == "off"
    with open_state(arguments, must_exist=True) as store:
        result = switch(store, item_ids, off=off)
    done(arguments, result.summary(off=off), vars(result))
    return 1 if result.unknown else 0


def add_items(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.adding import add_items as add
    from dman_runtime.jobs.adding import read_additions
    from dman_runtime.model.bundle import open_bundle

    bundle = open_bundle(arguments.bundle)
    found = read_additions(
        arguments.file,
        bundle,
        item_column=arguments.item_column,
        like_column=arguments.like_column,
        embeddings=arguments.embeddings,
    )
    with open_state(arguments, must_exist=True) as store:
        result = add(store, bundle, found)
    done(arguments, result.summary(bundle), vars(result))
    return 1 if result.unusable else 0


def _list(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.switching import switched_off
    from dman_runtime.store.opening import open_store

    with open_store(arguments.state, readonly=True) as store:
        return show_off(arguments, switched_off(store))


def check_items(arguments: argparse.Namespace) -> None:
    """Raises UsageError where no items are named, or some for a list of them."""
    named = bool(arguments.ids) or arguments.file is not None
    if arguments.action == "list" and named:
        raise UsageError("`items list` takes no ids", "it lists all items that are switched off")
    if arguments.action != "list" and not named:
        raise UsageError(f"no items to switch {arguments.action}", "give their ids, or a file that lists them")


def show_off(arguments: argparse.Namespace, item_ids: Sequence[str]) -> int:
    """Prints the items that are switched off. Returns the exit status."""
    print("".join(f"{item_id}\n" for item_id in item_ids), end="", flush=True)
    if arguments.json:
        print_json({"off": list(item_ids)})
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"items": items, "add-items": add_items}
