"""Remedies cure: each test reads what an error advises, does it, and the command succeeds."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from cases.commands import Commands, asked_for, case, log_file, stored
from conftest import ROOT

T = 1_600_000_000
ADDRESS_SPACE = 16_000_000 << 10  # bytes, as the case has it; the map of a store takes 64 GiB where it can


# -- logs --------------------------------------------------------------------------------------------------------------


def test_the_headerless_log_is_imported_whole_after_the_remedy(
    commands: Commands, tiny_bundle: Path, tmp_path: Path
) -> None:
    path, state = case("headerless-remedy-loses-a-row/log.csv"), tmp_path / "state"
    _, asked = commands.cured({}, "import", "--bundle", tiny_bundle, "--state", state, "--input", path)
    assert "--no-header" in asked
    assert stored(state) == {"h1": [(str(n), T + n - 1) for n in range(1, 7)]}


ROWS = "".join(f"h{n % 2},{n},{T + n}\n" for n in range(1, 7))
HEADER = "user_id,item_id,timestamp\n"
BY_NUMBER: dict[str, object] = {"--user-column": 1, "--item-column": 2, "--time-column": 3}
SICK: dict[str, tuple[bytes, dict[str, object], int]] = {
    "no header": (ROWS.encode(), BY_NUMBER, 6),
    "no header, tabs": (ROWS.replace(",", "\t").encode(), BY_NUMBER, 6),
    "no header, pipes": (ROWS.replace(",", "|").encode(), BY_NUMBER, 6),
    "no header, numbers": (ROWS.replace("h", "").encode(), BY_NUMBER, 6),
    "no header, one row": (ROWS.splitlines(keepends=True)[0].encode(), BY_NUMBER, 1),
    "no header, no times": (
        "".join(f"h{n % 2} {n}\n" for n in range(1, 7)).encode(),
        BY_NUMBER | {"--separator": "blank", "--time-column": "none"},
        6,
    ),
    "another user column": ((HEADER.replace("user_id", "who") + ROWS).encode(), {"--user-column": "who"}, 6),
    "another item column": ((HEADER.replace("item_id", "what") + ROWS).encode(), {"--item-column": "what"}, 6),
    "two times": (
        HEADER.replace("timestamp", "date,created_at").encode() + ROWS.replace("\n", f",{T}\n").encode(),
        {"--time-column": "date"},
        6,
    ),
    "a bad row": ((HEADER + ROWS + "h1,1,never\n").encode(), {"--bad-rows": "skip"}, 6),
    "a short row": ((HEADER + ROWS + "h1,1\n").encode(), {"--bad-rows": "skip"}, 6),
    "latin-1": ((HEADER + ROWS + f"é,1,{T}\n").encode("latin-1"), {"--encoding": "latin-1"}, 7),
    "utf-16 without a mark": ((HEADER + ROWS).encode("utf-16-le"), {"--encoding": "utf-16-le"}, 6),
    "unknown items": ((HEADER + "".join(f"h1,x{n},{T + n}\n" for n in range(6))).encode(), {"--max-unknown": 1}, 6),
}


@pytest.mark.parametrize(("content", "answers", "events"), SICK.values(), ids=SICK.keys())
def test_what_an_error_advises_cures(
    commands: Commands, tiny_bundle: Path, tmp_path: Path, content: bytes, answers: dict[str, object], events: int
) -> None:
    path, state = tmp_path / "log.csv", tmp_path / "state"
    path.write_bytes(content)
    run = ("import", "--bundle", tiny_bundle, "--state", state, "--input", path)
    commands.cured(answers, *run)
    assert sum(map(len, stored(state).values())) == events


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_folder_of_headerless_files_is_cured_too(
    commands: Commands, tiny_bundle: Path, tmp_path: Path, size: int, separator: str
) -> None:
    """Their first rows would be other columns in each file."""
    rows = ROWS.replace(",", separator).splitlines(keepends=True)
    for n in range(0, len(rows), size):
        log_file(tmp_path / "log", "".join(rows[n : n + size]), f"part-{n}.csv")
    state = tmp_path / "state"
    commands.cured(BY_NUMBER, "import", "--bundle", tiny_bundle, "--state", state, "--input", tmp_path / "log")
    assert sum(map(len, stored(state).values())) == 6


@pytest.mark.parametrize("command", ["score", "evaluate", "train"])
def test_a_headerless_log_is_cured_for_every_command(
    commands: Commands, tiny_bundle: Path, tmp_path: Path, command: str
) -> None:
    path = log_file(tmp_path, ROWS)
    where: dict[str, tuple[object, ...]] = {
        "score": ("--bundle", tiny_bundle, "--input", path, "--output", tmp_path / "scores.parquet"),
        "evaluate": ("--bundle", tiny_bundle, "--data", path),
        "train": ("--data", path, "--dry-run", "--min-user-events", 1, "--min-item-events", 1),
    }
    if command != "train":
        commands.cured(BY_NUMBER, command, *where[command])
        return
    said = commands.train(*where["train"])
    options = [str(one) for pair in asked_for(said.err, BY_NUMBER).items() for one in pair if one]
    assert "used" in commands.done("train", *where["train"], *options).out


# -- address space -----------------------------------------------------------------------------------------------------


def limited(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in a process that may use less address space than the map of a store takes by default."""
    return subprocess.run(
        [sys.executable, "-m", "dman_runtime", *map(str, arguments)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "inspect a user", "verify", "import", "export-log"])
def test_little_address_space_is_enough_or_the_remedy_is_one_that_the_command_has(
    commands: Commands, tiny_bundle: Path, tmp_path: Path, command: str
) -> None:
    state, path = tmp_path / "state", log_file(tmp_path, HEADER + ROWS)
    commands.done("import", "--bundle", tiny_bundle, "--state", state, "--input", path)
    commands_of = {
        "inspect": ("inspect", "--bundle", tiny_bundle, "--state", state),
        "inspect a user": ("inspect", "--bundle", tiny_bundle, "--state", state, "--user", "h1"),
        "verify": ("verify", "--state", state),
        "import": ("import", "--bundle", tiny_bundle, "--state", state, "--input", path),
        "export-log": ("export-log", "--state", state, "--output", tmp_path / "out.parquet"),
    }
    said = limited(*commands_of[command])
    if said.returncode == 2:
        (error,) = [line for line in said.stderr.splitlines() if line.startswith("error: ")]
        ((option, value),) = asked_for(error, {"--map-size-mib": 256}).items()
        said = limited(*commands_of[command], option, value)
    assert said.returncode == 0, said.stderr
