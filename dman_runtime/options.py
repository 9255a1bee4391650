"""Command-line plumbing that every command shares: flags from config dataclasses, `DMAN_*` variables, clean errors.

A dataclass field `min_user_events` becomes `--min-user-events` and takes its default from `DMAN_MIN_USER_EVENTS` when
that is set. Errors of the user's making end in one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from dman_runtime.errors import DmanError, UsageError
from dman_runtime.log_lines import JsonFormatter, TextFormatter


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with `DMAN_*` variables behind its options, and one-line errors."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)
        self.variables: dict[str, str] = {}  # option -> the variable that sets its default

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def flag(self, name: str, **kwargs: Any) -> None:
        """`add_argument` for one option whose default may come from the environment."""
        variable = f"DMAN_{name.lstrip('-').upper().replace('-', '_')}"
        if variable in os.environ and kwargs.get("action") is None:
            kwargs["default"] = os.environ[variable]  # argparse converts and checks string defaults with `type`
            if (choices := kwargs.get("choices")) and os.environ[variable] not in choices:
                raise UsageError(f"{variable} is {os.environ[variable]!r}; choose one of {', '.join(choices)}")
        self.add_argument(name, **kwargs)
        if kwargs.get("action") is None:
            self.variables[name] = variable

    def config_flags(self, config_class: type, *, title: str) -> None:
        """One option per field of a dataclass whose fields carry `help` metadata. Unset options stay absent."""
        group = self.add_argument_group(title)
        hints = get_type_hints(config_class)
        for field in fields(config_class):
            name, kind = f"--{field.name.replace('_', '-')}", hints[field.name]
            help_text = f"{field.metadata['help']} (default: {field.default})"
            options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": help_text}
            if kind is bool:
                group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
            elif get_origin(kind) is Literal:
                group.add_argument(name, choices=get_args(kind), **options)
            else:
                group.add_argument(name, type=kind, metavar=kind.__name__.upper(), **options)
            self.variables[name] = variable = f"DMAN_{field.name.upper()}"
            if variable in os.environ:
                self.set_defaults(**{field.name: _from_environment(variable, kind)})


def field_value(text: str, kind: Any) -> Any:
    """`text` as a config field of this type holds it. Raises ValueError. Choices are left to the config to check."""
    if kind is bool:
        if text.lower() not in ("0", "1", "true", "false"):
            raise ValueError(text)
        return text.lower() in ("1", "true")
    return text if get_origin(kind) is Literal else kind(text)


def _from_environment(variable: str, kind: Any) -> Any:
    text = os.environ[variable]
    try:
        return field_value(text, kind)
    except ValueError:
        remedy = "; use true or false" if kind is bool else f", not of type {kind.__name__}"
        raise UsageError(f"{variable} is {text!r}{remedy}") from None


def overridden(config: Any, arguments: argparse.Namespace) -> Any:
    """`config` with the fields that were given as options."""
    given = {f.name: getattr(arguments, f.name) for f in fields(config) if hasattr(arguments, f.name)}
    return replace(config, **given)


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} is {getattr(arguments, name)}; give 1 or more")


def print_json(result: dict[str, Any]) -> None:
    """The machine-readable last line of a command run with `--json`."""
    print(json.dumps(result, sort_keys=True), flush=True)


def configure_logging(*, verbose: bool = False, json: bool = False) -> None:
    """Logs to stderr, as text or as one JSON object a line; in JSON also warnings and exceptions that nobody caught."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if json else TextFormatter())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    if json:
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda failed: _log_uncaught(
            failed.exc_type, failed.exc_value or failed.exc_type(), failed.exc_traceback
        )


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt | SystemExit):
        logging.getLogger("dman_runtime").critical("uncaught %s", kind.__name__, exc_info=(kind, error, traceback))


def run_command(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Runs a command; a DmanError becomes one line on stderr, with the flag that its remedy is about, and status 2."""
    try:
        return command(argv)
    except DmanError as error:
        flag = f" (--{error.parameter.replace('_', '-')})" if error.parameter else ""
        print(f"error: {error}{flag}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
