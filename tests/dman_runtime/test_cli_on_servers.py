"""The commands over a store of the Redis protocol answer as those over a directory."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from contract.stores import RedisHarness

from dman_runtime.cli import main
from dman_runtime.errors import UsageError
from dman_runtime.store.place import ServerAddress, parse_place

ROWS = [f"user {user},{1 + (user * number) % 9},{number}" for user in range(12) for number in range(1, 50)]


def told(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main([str(one) for one in arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def everything(state: str, bundle: Path, renamed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the commands print, without what differs by the kind of store."""
    log, cpu = tmp_path / "log.csv", ["--provider", "cpu"]
    log.write_text("user_id,item_id,timestamp\n" + "\n".join(ROWS))
    exported = tmp_path / "exported.parquet"
    position = tmp_path / f"{parse_place(state).__class__.__name__}.position"
    old = json.loads((bundle / "manifest.json").read_text())["bundle_id"]
    printed = [
        told([*command, "--state", state], capsys)
        for command in (
            ["import", "--bundle", bundle, "--input", log, *cpu],
            ["import", "--bundle", bundle, "--input", log, *cpu],
            ["ingest", "--bundle", bundle, "--from", log, "--once", "--position", position, *cpu],
            ["rebuild", "--bundle", renamed, "--max-share", "1", *cpu],
            ["items", "off", "3"],
            ["items", "list"],
            ["activate", "--bundle", renamed, *cpu],
            ["generations"],
            ["drop", old],
            ["generations", "--json"],
            ["export-user", "user 7"],
            ["expire", "--idle-days", "1"],
            ["export-log", "--output", exported],
        )
    ]
    printed.append((0, str(pq.read_table(exported).sort_by("user_id").to_pydict())))
    text = "\n".join(f"{status} {line}" for status, line in printed)
    return re.sub(r"in \d+(\.\d+)? s\b|\d+ of 5\d\d events.*?encoded", "", text).replace(state, "STATE")


def test_commands_do_the_same_on_servers_as_in_a_directory(
    exact_bundle: Path, renamed_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        everything(state, exact_bundle, renamed_bundle, tmp_path, capsys)
        for state in (str(tmp_path / "state"), f"redis://{RedisHarness.address()}/commands-{tmp_path.name}")
    ]
    assert found[0] == found[1]
    assert found[0].count("\n0 ") >= 13 and "imported 588 events of 12 users" in found[0]
    assert "587 events stored" in found[0]  # the last line has no end


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["export-user", "anna", "--state", "redis://127.0.0.1:1/none"], "is unavailable"),
        (["backup", "--state", "redis://127.0.0.1:1/none"], "looks after a state directory"),
        (["compact", "--state", "rediss://h/none"], "looks after a state directory"),
        (["verify", "--state", "redis://h"], "looks after a state directory"),
        (
            ["generations", "--state", "http://127.0.0.1"],
            "http://... is of no known kind; write redis://host:port/name",
        ),
        (["generations", "--state", "redis://127.0.0.1:port/x"], "has the host '127.0.0.1:port'"),
        (["generations", "--state", "redis://h/a b"], "'a b' cannot begin keys"),
        (["items", "off", "3", "--durability", "quorum"], "a state directory has no replicas"),
    ],
)
def test_place_that_cannot_be_used_is_one_line(
    command: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, text = told(command, capsys)
    assert status and says in text and len(text.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_store_that_is_not_there_is_not_made_by_reading(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    state = f"redis://{RedisHarness.address()}/missing-{tmp_path.name}"
    for _ in range(2):
        status, text = told(["generations", "--state", state], capsys)
        assert status and f"there is no state store {state}; check the address and the name at its end" in text


def test_missing_library_is_one_line_that_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "dman_runtime.store.redis", raising=False)
    monkeypatch.delitem(sys.modules, "dman_runtime.store.redis_servers", raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)
    status, text = told(["generations", "--state", "redis://127.0.0.1:1/none"], capsys)
    assert status and "the library for a state store on servers is not installed; install dman[cluster]" in text


def test_password_is_in_no_message() -> None:
    place = parse_place("rediss://anna:s%40fe@one:7000,[::1]/shop")
    assert place == ServerAddress((("one", 7000), ("::1", 6379)), "shop", True, "anna", "s@fe")
    assert str(place) == "rediss://one:7000,[::1]:6379/shop" and "s@fe" not in repr(place)
    assert isinstance(place, ServerAddress) and parse_place(place.url) == place
    assert parse_place("redis://h") == ServerAddress((("h", 6379),))
    assert parse_place("state") == Path("state")
    with pytest.raises(UsageError, match="behind \\? or #"):
        parse_place("redis://h/x?db=1")
