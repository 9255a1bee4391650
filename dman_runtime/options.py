"""Command-line plumbing that every command shares: flags from config dataclasses, `DMAN_*` variables, clean errors.

A dataclass field `min_user_events` becomes `--min-user-events` and takes its default from `DMAN_MIN_USER_EVENTS` when
that is set. Errors of the user's making end in one line on stderr and exit status 2.

Kubernetes and Docker set variables of the form `DMAN_PORT=tcp://10.0.0.1:50051` for a service called "dman". No option
takes such a value, so they are ignored, with a warning.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from dman_runtime.errors import DmanError, UsageError
from dman_runtime.log_lines import JsonFormatter, TextFormatter

_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)


@dataclass(frozen=True)
class _FromEnvironment:
    """The default of an option that a variable sets. It is converted only if the command line does not give the option,
    and only for the command that runs."""

    variable: str
    kind: Any  # what converts a text: a type, or a Literal of choices

    @property
    def text(self) -> str:
        return os.environ[self.variable]

    def __str__(self) -> str:  # in help texts
        return self.text

    def value(self) -> Any:
        """Raises UsageError, which names the variable."""
        choices = get_args(self.kind) if get_origin(self.kind) is Literal else ()
        if choices and self.text not in choices:
            raise UsageError(f"{self.variable} is {self.text!r}; choose one of {', '.join(choices)}")
        try:
            return field_value(self.text, self.kind)
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            remedy = "; use true or false" if self.kind is bool else f", not of type {self.kind.__name__}"
            raise UsageError(f"{self.variable} is {self.text!r}{remedy}") from None


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with `DMAN_*` variables behind its options, and one-line errors."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)
        self.variables: dict[str, str] = {}  # option -> the variable that sets its default
        self._links: dict[str, str] = {}  # option -> its variable that is ignored

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def flag(self, name: str, **kwargs: Any) -> None:
        """`add_argument` for one option whose default may come from the environment."""
        if kwargs.get("action") is None:
            choices = kwargs.get("choices")
            found = self._variable(name, Literal[tuple(choices)] if choices else kwargs.get("type", str))
            if found is not None:
                kwargs["default"] = found
        self.add_argument(name, **kwargs)

    def _variable(self, name: str, kind: Any) -> _FromEnvironment | None:
        """The default of an option from its variable, if that is set to more than a service link."""
        variable = f"DMAN_{name.lstrip('-').upper().replace('-', '_')}"
        self.variables[name] = variable
        if _SERVICE_LINK.match(os.environ.get(variable, "")):
            self._links[name] = variable
            return None
        return _FromEnvironment(variable, kind) if variable in os.environ else None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Also converts the defaults from variables. Only the command that runs gets here, not its siblings."""
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, _FromEnvironment):
                setattr(found, name, value.value())
        for name, variable in self._links.items():
            value = os.environ[variable]
            print(f"warning: {variable} is {value!r}, the link of a service; it is ignored ({name})", file=sys.stderr)
        return found, rest

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
            found = self._variable(name, kind)
            if found is not None:
                self.set_defaults(**{field.name: found})


def field_value(text: str, kind: Any) -> Any:
    """`text` as a config field of this type holds it. Raises ValueError. Choices are left to the caller to check."""
    if kind is bool:
        if text.lower() not in ("0", "1", "true", "false"):
            raise ValueError(text)
        return text.lower() in ("1", "true")
    return text if get_origin(kind) is Literal else kind(text)


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
        print(f"error: {error}{_flag(error.parameter)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _flag(parameter: str | None) -> str:
    """How an error names the option that it is about, and the variable where that may have set it."""
    if not parameter:
        return ""
    variable = f"DMAN_{parameter.upper()}"
    return f" (--{parameter.replace('_', '-')}{f' or {variable}' if variable in os.environ else ''})"
