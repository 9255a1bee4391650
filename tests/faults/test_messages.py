"""Bytes that are no message: answered, forgotten, and hardly mentioned."""

from __future__ import annotations

import pytest

from tools.faults.attacks import malformed_messages
from tools.faults.honest import failures, health, recommend

from .conftest import Start

pytestmark = pytest.mark.slow


def test_malformed_messages_are_invalid_arguments(start: Start) -> None:
    server = start()
    with malformed_messages(server.address, calls=100) as attack:
        attack.wait()
    assert attack.statuses == {"INVALID_ARGUMENT": 100}
    assert failures(server.address, recommend, health, rounds=1) == []


def test_malformed_messages_leave_nothing_in_memory_and_little_in_the_log(start: Start) -> None:
    server = start()
    with malformed_messages(server.address, calls=1000) as attack:
        attack.wait()
    memory, log = server.resident_bytes(), server.log_bytes()
    with malformed_messages(server.address, calls=4000) as attack:
        attack.wait()
    grown, logged = server.resident_bytes() - memory, server.log_bytes() - log
    assert (grown < 8e6, logged < 50e3) == (True, True), f"4,000 messages: {grown} bytes of memory, {logged} of log"
