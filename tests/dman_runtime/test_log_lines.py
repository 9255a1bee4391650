"""Log lines: JSON that every reader can parse, text as before, and a limit for what comes too often."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
from conftest import ROOT

from dman_runtime.log_lines import MAX_KEYS, JsonFormatter, RateLimited, TextFormatter


def record(message: str = "a message", *arguments: object, **options: Any) -> logging.LogRecord:
    extra, exc_info = options.get("extra"), options.get("exc_info")
    return logging.getLogger("part").makeRecord(
        "part", logging.WARNING, "file.py", 1, message, arguments, exc_info, extra=extra
    )


def parsed(one: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(one)
    assert len(line.splitlines()) == 1 and line.isascii()
    found: dict[str, Any] = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return found


def caught(error: BaseException) -> Any:
    try:
        raise error
    except type(error):
        return sys.exc_info()


# -- JSON ------------------------------------------------------------------------------------------------------------


def test_a_json_line_says_when_where_and_what() -> None:
    one = record("%d of %s", 3, "five", extra={"event": "commit_failed", "request": "abc", "seconds": 0.5})
    one.created = datetime(2026, 3, 4, 5, 6, 7, 89_500, tzinfo=UTC).timestamp()
    assert parsed(one) == {
        "time": "2026-03-04T05:06:07.089Z", "level": "WARNING", "logger": "part", "message": "3 of five",
        "process": os.getpid(), "event": "commit_failed", "request": "abc", "seconds": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["two\nlines", "\r\x1b[31m", "\u2028\u2029\x85", "Zürich", "\udc80", '"}{', "\0"])
def test_any_text_stays_on_one_line(text: str) -> None:
    found = parsed(record("%s", text, extra={"user": text}))
    assert found["message"] == text and found["user"] == text


def test_an_exception_is_one_string_with_its_traceback() -> None:
    found = parsed(record(exc_info=caught(ValueError("bad\nvalue"))))
    assert found["exception"].startswith("Traceback") and found["exception"].endswith("ValueError: bad\nvalue")


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"), (float("inf"), "inf"), ({(1, 2): 3}, "{(1, 2): 3}"), (ROOT, str(ROOT)),
        (b"x", "b'x'"), ([1, {"a": None}], [1, {"a": None}]), (Unprintable(), "<Unprintable>"),
    ],
)  # fmt: skip
def test_a_field_of_any_kind_can_be_written(value: object, shown: object) -> None:
    assert parsed(record(extra={"field": value}))["field"] == shown


def test_a_field_replaces_none_of_the_line() -> None:
    found = parsed(record(extra={"level": "mine", "time": "mine", "logger": "mine"}))
    assert (found["level"], found["logger"]) == ("WARNING", "part") and found["time"] != "mine"


def test_arguments_that_do_not_fit_do_not_lose_the_line() -> None:
    assert parsed(record("%d of %d", "three"))["message"] == "%d of %d ('three',)"


# -- text ------------------------------------------------------------------------------------------------------------


def test_a_text_line_is_as_before_with_the_fields_behind_it() -> None:
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    one = record("%d of five", 3, exc_info=caught(ValueError("bad")))
    assert TextFormatter().format(one) == plain.format(one)
    one = record("no", extra={"event": "faked", "user": "two words", "count": 3, "none": ""})
    assert TextFormatter().format(one).endswith('WARNING part: no event=faked user="two words" count=3 none=""')


# -- the limit -------------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_line_per_key_and_period_says_how_many_were_left_out(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    limited = RateLimited(logging.getLogger("part"), every=10.0, clock=clock)
    written = [limited.warning("parse", "message %d does not parse", n) for n in range(1000)]
    assert written == [True] + [False] * 999
    assert limited.error("full", "the store is full", extra={"event": "store_full"})  # another key
    clock.now += 9.9
    assert not limited.warning("parse", "message %d does not parse", 1000)
    clock.now += 0.1
    assert limited.warning("parse", "message %d does not parse", 1001)
    clock.now += 10
    assert limited.warning("parse", "message %d does not parse", 1002)
    assert [one.getMessage() for one in caplog.records] == [
        "message 0 does not parse",
        "the store is full",
        "message 1001 does not parse (and 1000 more like this before)",
        "message 1002 does not parse",
    ]
    assert vars(caplog.records[1])["event"] == "store_full" and vars(caplog.records[2])["left_out"] == 1000


def test_keys_that_outsiders_make_up_are_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    limited = RateLimited(logging.getLogger("part"), clock=clock)
    for number in range(5 * MAX_KEYS):
        clock.now += 0.001
        limited.warning(f"key {number}", "a message")
    assert len(limited._last) == MAX_KEYS and f"key {5 * MAX_KEYS - 1}" in limited._last


# -- configured ------------------------------------------------------------------------------------------------------

SCRIPT = """
import logging, threading, warnings
from dman_runtime.options import configure_logging
configure_logging(verbose={verbose}, json={json})
logging.getLogger("part").debug("a detail")
logging.getLogger("part").info("a message", extra={{"event": "faked"}})
warnings.warn("mind this")
thread = threading.Thread(target=lambda: [][0])
thread.start(); thread.join()
raise ValueError("two\\nlines")
"""


def run(*, verbose: bool, json: bool) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(verbose=verbose, json=json)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr.splitlines()


def test_with_json_every_line_on_stderr_is_an_object() -> None:
    lines = [json.loads(line) for line in run(verbose=False, json=True)]
    assert [line["message"] for line in lines[:1]] == ["a message"] and lines[0]["event"] == "faked"
    assert "mind this" in lines[1]["message"] and lines[1]["logger"] == "py.warnings"
    assert [line["message"] for line in lines[2:]] == ["uncaught IndexError", "uncaught ValueError"]
    assert lines[3]["exception"].endswith("ValueError: two\nlines") and lines[3]["level"] == "CRITICAL"


def test_without_json_the_format_is_text() -> None:
    lines = run(verbose=True, json=False)
    moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"
    assert re.fullmatch(f"{moment} DEBUG part: a detail", lines[0])
    assert re.fullmatch(f"{moment} INFO part: a message event=faked", lines[1])
