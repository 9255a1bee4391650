"""Comparing two checkouts: fakes with a known answer, and this checkout against itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest
from conftest import whole_benchmark

from dman_runtime.errors import UsageError
from tools.bench import comparison as compared
from tools.bench import stored, versus
from tools.bench.checkouts import Checkout, stored_bytes
from tools.bench.comparison import OTHER, THIS, Comparison
from tools.bench.servers import ROOT
from tools.bench.setting import QUICK, Bench
from tools.bench.whatif import Effort


def fake_checkout(root: Path, main: str) -> Path:
    """A checkout whose `dman_runtime` command is this code."""
    package = root / "dman_runtime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(main)
    return root


def comparison_of(bench: Bench) -> Comparison:
    here = Checkout(ROOT)
    return Comparison(bench, {OTHER: here, THIS: here}, Effort(rounds=1, calls=8, seconds=5.0, events=5), 50)


# -- checkouts -------------------------------------------------------------------------------------------------------


def test_checkout_runs_its_own_code_in_its_own_directory(tmp_path: Path) -> None:
    code = "import json, os, sys; print('imported'); print(json.dumps({'cwd': os.getcwd(), 'arguments': sys.argv[1:]}))"
    checkout = Checkout.at(fake_checkout(tmp_path / "fake", code))
    seconds, result = checkout.import_log(Path("/log"), Path("/bundle"), Path("/state"), provider="cpu")
    assert seconds > 0 and result["cwd"] == str(tmp_path / "fake")
    options = ["--input", "/log", "--bundle", "/bundle", "--state", "/state", "--provider", "cpu", "--json"]
    assert result["arguments"] == ["import", *options]


def test_checkout_names_why_its_command_failed(tmp_path: Path) -> None:
    checkout = Checkout.at(fake_checkout(tmp_path, "raise SystemExit('first\\nerror: the disk is full')"))
    with pytest.raises(UsageError, match="failed: error: the disk is full"):
        checkout.import_log(Path("/log"), Path("/bundle"), Path("/state"), provider="cpu")


def test_checkout_refuses_a_directory_without_the_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert versus.main(["--other", str(tmp_path), "--out", str(tmp_path / "report.md")]) == 2
    error = capsys.readouterr().err
    assert "no checkout of this project; give a directory with dman_runtime (--other)" in error
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_stored_bytes_counts_the_values_of_every_database(tmp_path: Path) -> None:
    path = tmp_path / "state" / "lmdb"
    path.mkdir(parents=True)
    with lmdb.open(str(path), lib_version=0, max_dbs=2) as env:
        for name, values in (("head", [b"1234", b"12"]), ("history", [b"123"])):
            database = env.open_db(name.encode())
            with env.begin(db=database, write=True) as txn:
                for number, value in enumerate(values):
                    txn.put(b"%d" % number, value)
    assert stored_bytes(tmp_path / "state") == {"head": (2, 6), "history": (1, 3)}
    with pytest.raises(UsageError, match="no LMDB database"):
        stored_bytes(path / "none")


# -- measurements with a known answer --------------------------------------------------------------------------------


@pytest.mark.slow
def test_calls_give_this_checkout_by_the_other_one(
    bench: Bench, serve_fake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def servers(self: Comparison, name: str) -> Iterator[dict[str, str]]:
        yield {OTHER: serve_fake(), THIS: serve_fake(call=0.01)}

    monkeypatch.setattr(Comparison, "servers", servers)
    sections = compared.calls(comparison_of(replace(bench, sizes=replace(QUICK, rounds=2, calls=4))))
    assert [section.title for section in sections] == ["Recommend", "Durable update"]
    for section in sections:
        assert len(section.data["ratio"]) == 2 and min(section.data["ratio"]) > 1.05
        assert section.claims[0].met is False and section.claims[0].target == "<= 1.05x"
        assert {name: one["count"] for name, one in section.data["operations"].items()} == {OTHER: 8, THIS: 8}


@pytest.mark.parametrize(("speed", "met"), [(960.0, True), (940.0, False)])
def test_imports_subtract_the_start_of_the_command(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, speed: float, met: bool
) -> None:
    tiny: list[int] = []

    def import_seconds(self: Comparison, side: str, log: Path, events: int) -> float:
        if log.stem == "tiny":
            tiny.append(events)
            return {OTHER: 3.0, THIS: 5.0}[side]
        return {OTHER: 3.0 + events / 1000, THIS: 5.0 + events / speed}[side]

    monkeypatch.setattr(Comparison, "import_seconds", import_seconds)
    (section,) = compared.imports(comparison_of(bench))
    ratio = f"{speed / 1000:.2f}"
    assert section.claims[0].measured == f"{ratio}x ({ratio} to {ratio}), {speed:.0f} by 1000"
    assert section.claims[0].met is met
    assert max(tiny) < section.data["events"] / 10 and len(tiny) == 2 * QUICK.import_repeats


@pytest.mark.parametrize(("segment_length", "events"), [(20, 159), (10, 159), (64, 191)])
def test_stored_users_have_the_largest_record_and_head(segment_length: int, events: int) -> None:
    assert stored._event_count(segment_length) == events


# -- real servers ----------------------------------------------------------------------------------------------------


@whole_benchmark
@pytest.mark.slow
def test_versus_compares_this_checkout_with_itself(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versus, "QUICK", replace(QUICK, rounds=2, calls=4, import_repeats=1))
    monkeypatch.setattr(versus.Effort, "of", lambda _: Effort(rounds=1, calls=8, seconds=2.0))
    monkeypatch.setattr(versus, "QUICK_IMPORT_USERS", 50)
    scratch, report = tmp_path / "scratch", tmp_path / "reports" / "versus.md"
    scratch.mkdir()
    options = ["--other", str(ROOT), "--bundle", str(tiny_bundle), "--out", str(report), "--scratch", str(scratch)]
    assert versus.main([*options, "--quick", "--what-if-events", "50", "--provider", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = result["sections"]
    assert set(found) == {"Recommend", "Durable update", "Import", "Updates during what-ifs", "Stored bytes"}
    assert found["Stored bytes"]["record_and_head"][THIS] == found["Stored bytes"]["record_and_head"][OTHER]
    assert 0 < found["Stored bytes"]["state_bytes"][THIS] <= found["Stored bytes"]["record_and_head"][THIS]
    assert found["Updates during what-ifs"][THIS]["clients"]["1"]["during"]["count"] == 8
    assert all(seconds > 0 for times in found["Import"]["seconds"].values() for seconds in times)
    text = report.read_text()
    for claim in result["claims"]:
        assert f"| {claim['claim']} | {claim['measured']} |" in text
    assert "ten what-ifs of 50 events" in text
    assert str(ROOT) not in text and str(tmp_path) not in text
    assert list(scratch.iterdir()) == [] and list(report.parent.iterdir()) == [report]


def test_versus_refuses_more_what_if_events_than_a_server_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert versus.main(["--other", str(ROOT), "--what-if-events", "10001"]) == 2
    error = capsys.readouterr().err
    assert "10001 events in a what-if; choose 1 to 10000 (--what-if-events)" in error and error.count("\n") == 1
