"""Who serves over a state directory: told by files that only living processes keep locked."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from contract.processes import release, start

from dman_runtime.presence import Presence, Present, present

ONE = Present(1, "one", "/one", ["one"])


def test_present_is_who_has_said_so_and_not_left(tmp_path: Path) -> None:
    assert present(tmp_path) == []
    first, second = Presence(tmp_path), Presence(tmp_path)
    assert present(tmp_path) == []  # nobody has said anything
    first.tell(ONE)
    second.tell(Present(2, "one", "/one", ["one", "two"], {"three": "it is damaged"}))
    first.tell(Present(1, "one", "/one", ["two"]))  # shorter than before
    found = sorted(present(tmp_path), key=lambda one: one.pid)
    assert [(one.pid, one.loaded, one.failed) for one in found] == [
        (1, ["two"], {}),
        (2, ["one", "two"], {"three": "it is damaged"}),
    ]
    second.close()
    second.close()
    assert [one.pid for one in present(tmp_path)] == [1]
    first.close()
    assert present(tmp_path) == [] and list((tmp_path / "workers").iterdir()) == []


def test_process_that_was_killed_is_not_present_and_its_file_is_removed(tmp_path: Path) -> None:
    script = """
    from dman_runtime.presence import Presence, Present
    presence = Presence(Path(sys.argv[1]))
    presence.tell(Present(3, "one", "/one"))
    print("ready", flush=True)
    sys.stdin.readline(), sys.stdin.readline()
    """
    process = start(script, tmp_path)
    release([process])
    assert [one.pid for one in present(tmp_path)] == [3]
    process.kill()
    process.communicate()
    assert present(tmp_path) == [] and list((tmp_path / "workers").iterdir()) == []


def test_what_cannot_be_said_is_logged_and_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "workers").write_text("no directory")
    presence = Presence(tmp_path)
    with caplog.at_level(logging.WARNING):
        presence.tell(ONE)
    assert "cannot say in" in caplog.text
    presence.close()


def test_file_that_is_none_of_ours_counts_for_nobody(tmp_path: Path) -> None:
    presence = Presence(tmp_path)
    presence.tell(ONE)
    file = next((tmp_path / "workers").iterdir())
    for text in ("", "{", "[]", '{"pid": 1}', '{"unknown": 1}'):
        file.write_text(text)
        assert present(tmp_path) == []
    presence.close()
