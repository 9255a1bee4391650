"""What several commands do."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from dman_runtime.options import print_json

if TYPE_CHECKING:
    from dman_runtime.jobs.asking import Server
    from dman_runtime.jobs.spreading import Spread
    from dman_runtime.model.generation import Generation
    from dman_runtime.store.opening import AnyStore


def done(arguments: argparse.Namespace, text: str, content: dict[str, Any]) -> int:
    """Prints the result of a command for people and, if asked for, as JSON. Returns the exit status."""
    print(text)
    if arguments.json:
        print_json(content)
    return 0


def open_generation(arguments: argparse.Namespace) -> Generation:
    from dman_runtime.model.generation import Generation

    return Generation.open(arguments.bundle, provider=arguments.provider, threads=arguments.encoder_threads)


def spread_of(arguments: argparse.Namespace, generation: Generation, *, events: int | None) -> Spread:
    """Where a command works on users, for a job of so many events; None: nobody knows. Raises UsageError."""
    from dman_runtime.jobs.spreading import spread

    return spread(arguments.engine, arguments.processes, events=events, on_cuda=generation.graphs.on_cuda)


def by_whom(spread: Spread, *, events: int) -> str:
    """For people: the end of a sentence about events that were encoded, if it was not in the command's own process."""
    from dman_runtime.jobs.spreading import HERE

    return "" if spread is HERE or not events else f"; the users were encoded {spread.name}"


def open_state(arguments: argparse.Namespace, *, readonly: bool = False, must_exist: bool = False) -> AnyStore:
    """The store of a command that may write."""
    from dman_runtime.store.opening import open_store

    return open_store(
        arguments.state,
        map_size=arguments.map_size_mib << 20,
        readonly=readonly,
        must_exist=must_exist,
        durability=arguments.durability,
    )


def server_of(arguments: argparse.Namespace) -> Server:
    """The server that a command names."""
    from dman_runtime.jobs.asking import Server

    return Server(**{field.name: getattr(arguments, field.name) for field in fields(Server)})
