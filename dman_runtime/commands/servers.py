"""What the commands around a server do: start one, ask one, let callers in. Heavy imports wait inside."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields

from dman_runtime.commands.steps import server_of
from dman_runtime.options import print_json
from dman_runtime.serving.config import ServeConfig


def serve(arguments: argparse.Namespace) -> int:
    from dman_runtime.serving.supervisor import serve as supervise

    names = {field.name for field in fields(ServeConfig)}
    return supervise(ServeConfig(**{name: value for name, value in vars(arguments).items() if name in names}))


def status(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.asking import ask_status, format_status

    status = ask_status(server_of(arguments))
    print(format_status(status))
    if arguments.json:
        print_json(status)
    return 0 if status["ready"] and not status["problems"] else 1


def token(arguments: argparse.Namespace) -> int:
    from dman_runtime.access.tokens import new_token

    token, line = new_token(arguments.name, arguments.roles.split(","))
    print(f"token, shown this once: {token}")
    print(f"line for the token file: {line}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "serve": serve,
    "status": status,
    "token": token,
}
