"""Commands as a user runs them, in this process, and what they said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from log_files import histories

from dman_runtime import cli
from dman_runtime.data.input_report import InputReport
from dman_runtime.data.log_options import ANY_LOG, LogOptions
from dman_runtime.data.logs import open_log
from dman_runtime.errors import InputError
from dman_runtime.store.lmdb import LmdbStore
from dman_train import train

CASES = ROOT.parent / "shared" / "cases"
Read = dict[str, list[tuple[str, int]]]  # user -> (item, seconds since 1970), in order


def case(name: str) -> Path:
    """A file of the public cases; the test is skipped where they are not."""
    path = CASES / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line, of a command run with --json."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.out.splitlines() if line.startswith("warning: ")]


class Commands:
    """Runs commands; none may show a traceback or say more than one line when it fails."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def runtime(self, *arguments: object) -> Said:
        return self._run(cli.main, arguments)

    def train(self, *arguments: object) -> Said:
        return self._run(train.main, arguments)

    def dry_train(self, data: Path, *arguments: object) -> dict[str, Any]:
        """What training understands of a log: its input report."""
        return self.done("train", "--data", data, "--dry-run", "--json", *arguments).json

    def done(self, command: str, *arguments: object) -> Said:
        """Runs a command that must succeed: `train`, or one of `dman-runtime`."""
        said = self.train(*arguments) if command == "train" else self.runtime(command, *arguments)
        assert said.code == 0, said.err
        return said

    def _run(self, main: Callable[[list[str]], int], arguments: tuple[object, ...]) -> Said:
        self._capsys.readouterr()
        code = main([str(one) for one in arguments])
        said = self._capsys.readouterr()
        if code == 2:
            (error,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
            assert said.err.rstrip().endswith(error)
        assert "Traceback" not in said.err
        return Said(code, said.out, said.err)

    def cured(self, answers: Mapping[str, object], *arguments: object) -> tuple[Said, list[str]]:
        """Runs a command of `dman-runtime`, and does what its errors say until it succeeds: the options that it took.

        `answers` holds what a user can know: the value of an option, where an error leaves it open. None: no value.
        """
        command, asked = list(arguments), []
        for _ in range(5):
            said = self.runtime(*command)
            if said.code == 0:
                return said, asked
            options = asked_for(said.err, answers)
            new = {name: value for name, value in options.items() if name not in asked}
            assert new, f"the remedy {options} is no cure: {said.err}"
            for name, value in new.items():
                asked.append(name)
                command += [name] if value is None else [name, value]
        raise AssertionError(f"no end of remedies: {asked}")


def asked_for(error: str, answers: Mapping[str, object]) -> dict[str, object]:
    """The options that an error asks for, with the values in its example or else in `answers`."""
    flag = re.search(r"\((--[a-z-]+)\)\s*$", error)
    assert flag, f"no option is named: {error}"
    examples = {f"--{name.replace('_', '-')}": value for name, value in re.findall(r"\b([a-z]+_column) (\d+)", error)}
    if flag[1].startswith("--no-"):
        return {flag[1]: None} | examples
    assert flag[1] in answers or examples, f"nobody can know {flag[1]}: {error}"
    return examples if flag[1] in examples else {flag[1]: answers[flag[1]]} | examples


def read(path: Path, options: LogOptions = ANY_LOG) -> tuple[Read, InputReport]:
    """The histories of a log, and its report; every row is accounted for."""
    with open_log(path, options) as log:
        found = histories(log.whole())
    report = log.report
    assert report.rows == report.events + sum(report.left_out.values())
    assert report.events == sum(map(len, found.values()))
    return found, report


def refused(path: Path, options: LogOptions = ANY_LOG) -> InputError:
    """The error that a log is refused with."""
    with pytest.raises(InputError) as raised, open_log(path, options):
        pass
    return raised.value


def order(path: Path, options: LogOptions = ANY_LOG) -> dict[str, list[str]]:
    """The items of each user, in the order of the events."""
    return {user: [item for item, _ in events] for user, events in read(path, options)[0].items()}


def asks_about(report: InputReport, option: str) -> list[str]:
    """The warnings that name an option."""
    flag = f"(--{option.replace('_', '-')})"
    return [text for text in report.warnings() if flag in text]


def stored(state: Path) -> Read:
    """All events of all users in a store."""
    with LmdbStore.open(state, readonly=True) as store:
        found = {}
        for user_id in store.scan():
            numbers, times = store.history(user_id)
            found[user_id] = list(zip(store.item_ids(numbers), times.tolist(), strict=True))
        return found


def log_file(folder: Path, text: str, name: str = "log.csv") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(text.encode())
    return path


def scores(path: Path) -> dict[Any, list[Any]]:
    """Users and their items, best first, with the types that the file has."""
    found: dict[Any, list[Any]] = {}
    for row in pq.read_table(path).to_pylist():
        found.setdefault(row["user_id"], []).append(row["item_id"])
        assert row["rank"] == len(found[row["user_id"]])
    return found
