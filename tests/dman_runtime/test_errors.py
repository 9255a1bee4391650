"""The family of errors: what each carries, how it travels, and what its messages may say."""

from __future__ import annotations

import argparse
import ast
import importlib
import pickle
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from conftest import ROOT

import dman_runtime
import dman_train
from dman_runtime import cli
from dman_runtime.errors import DmanError, UsageError
from dman_runtime.options import Parser, run_command
from dman_train import evaluate, export, train
from dman_train.presets import BASELINE_PRESETS

SOURCES = [path for package in ("dman_runtime", "dman_train") for path in sorted((ROOT / package).rglob("*.py"))]
COMMANDS = [path for path in SOURCES if "run_command(" in path.read_text(encoding="utf-8")]  # they know their flags


def subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def all_errors() -> list[type[DmanError]]:
    """Every class of the family that the packages define."""
    for package in (dman_runtime, dman_train):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    found = {kind for kind in subclasses(DmanError) if kind.__module__.split(".")[0] in ("dman_runtime", "dman_train")}
    return sorted(found, key=lambda kind: kind.__qualname__)


ERRORS = all_errors()


def test_the_family_is_found() -> None:
    names = {kind.__name__ for kind in ERRORS}
    assert {"UsageError", "RequestError", "UserNotFoundError", "StoreFullError", "ConfigError", "RunError"} <= names


@pytest.mark.parametrize("kind", ERRORS)
def test_error_has_a_grpc_status_and_words_for_outsiders(kind: type[DmanError]) -> None:
    assert kind.status in grpc.StatusCode.__members__ and kind.status != "OK"
    assert kind.public is None or kind.public.strip()


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("parts", [("a cause", "a remedy", "map_size_mib"), ("a cause", "", "")])
def test_error_keeps_its_parts_and_survives_pickling(kind: type[DmanError], parts: tuple[str, str, str]) -> None:
    cause, remedy, parameter = parts
    error = kind(cause, remedy, parameter=parameter)
    assert str(error) == (f"{cause}; {remedy}" if remedy else cause)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error)
    assert (again.cause, again.remedy, again.parameter) == parts


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("it broke", "mend it", parameter="map_size_mib"), "error: it broke; mend it (--map-size-mib)\n"),
        (UsageError("it broke", "mend it"), "error: it broke; mend it\n"),
        (UsageError("it broke", parameter="k"), "error: it broke (--k)\n"),
    ],
)
def test_command_adds_the_flag_of_the_parameter(
    error: DmanError, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    assert run_command(fail, []) == 2
    assert capsys.readouterr().err == line


# -- what the sources say ----------------------------------------------------------------------------------------------


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found |= options_of(child)
        elif action.option_strings:
            found |= {
                action.dest,
                *(one.lstrip("-").replace("-", "_") for one in action.option_strings),
            }  # also --no-...
    return found


def all_options() -> set[str]:
    parsers: list[Parser] = [cli.parser(), train.parser(), train.parser(BASELINE_PRESETS), export.parser()]
    return set().union(*map(options_of, [*parsers, evaluate.parser()]))


def error_calls(path: Path) -> Iterator[ast.Call]:
    """Calls that make an error of the family, by the name of the class."""
    names = {kind.__name__ for kind in ERRORS}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node


def texts(node: ast.AST) -> list[str]:
    """The literal parts of an expression, those of f-strings included."""
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


@pytest.mark.slow
def test_parameters_that_the_sources_name_are_options_of_a_command() -> None:
    options, named = all_options(), set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "parameter":
                named |= {(path.name, text) for text in parameters(node.value) if text}
    assert {text for _, text in named} >= {"port", "state", "provider", "output", "map_size_mib", ".+_column"}
    unknown = [(name, text) for name, text in named if not any(re.fullmatch(text, option) for option in options)]
    assert sorted(unknown) == []


def parameters(value: ast.expr) -> list[str]:
    """The names, or for an f-string a pattern of the name, that an expression may be."""
    if not isinstance(value, ast.JoinedStr):
        return texts(value)
    return ["".join(str(part.value) if isinstance(part, ast.Constant) else ".+" for part in value.values)]


@pytest.mark.slow
def test_messages_of_the_library_name_no_flag() -> None:
    assert {"cli.py", "train.py"} <= {path.name for path in COMMANDS} < {path.name for path in SOURCES}
    found = []
    for path in SOURCES:
        if path not in COMMANDS:
            found += [
                f"{path.relative_to(ROOT)}:{call.lineno}: {text!r}"
                for call in error_calls(path)
                for argument in call.args
                for text in texts(argument)
                if "--" in text
            ]
    assert found == []


PROPER_NAMES = ("PyTorch", "Python")


def problems(message: ast.expr) -> list[str]:
    """What is wrong with the text of a cause or a remedy, as far as its literal parts show it."""
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    first, last = (part.value if isinstance(part, ast.Constant) else "" for part in (parts[0], parts[-1]))
    found = ["is more than one line"] if any("\n" in text for text in texts(message)) else []
    if isinstance(first, str) and first[:1].isupper() and first[1:2].islower() and not first.startswith(PROPER_NAMES):
        found.append("begins with a capital letter")
    if isinstance(last, str) and last.endswith("."):
        found.append("ends with a full stop")
    return found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("'All wrong.'", ["begins with a capital letter", "ends with a full stop"]),
        ("f'{path}: two\\nlines'", ["is more than one line"]),
        ("f'CUDA cannot be used: {reason}'", []),
        ("'PyTorch finds no device'", []),
    ],
)
def test_problems_of_messages_are_found(code: str, expected: list[str]) -> None:
    assert problems(ast.parse(code, mode="eval").body) == expected


@pytest.mark.slow
def test_messages_are_one_line_without_a_full_stop_and_begin_small() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {problem}"
        for path in SOURCES
        for call in error_calls(path)
        for argument in call.args
        for problem in problems(argument)
    ]
    assert found == []
