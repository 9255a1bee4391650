"""`dman-runtime ingest` beside `dman-runtime import`: the same events give the same store."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from histories import Histories, make_histories, with_unknown_items, write_csv

from dman_runtime import cli
from dman_runtime.errors import UsageError
from dman_runtime.ingest.opening import check_source
from dman_runtime.ingest.options import IngestOptions
from dman_runtime.metrics import IngestCounts
from dman_runtime.serving.ingest_metrics import ingest_registry
from tools.faults.kafka import IngestProcess
from tools.faults.servers import wait_until
from tools.soak.ingestion import compare_stores


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert cli.main([*map(str, arguments), "--provider", "cpu", "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    histories: Histories = with_unknown_items(make_histories(12, seed=3))
    return write_csv(tmp_path_factory.mktemp("log") / "log.csv", histories)


def as_json_lines(log: Path) -> Path:
    names, *rows = (line.split(",") for line in log.read_text().splitlines())
    path = log.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(dict(zip(names, map(int, row), strict=True))) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_file_that_is_ingested_gives_the_store_of_an_import(
    exact_bundle: Path, log: Path, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--bundle", exact_bundle, "--state")
    imported = run(capsys, "import", *common, tmp_path / "imported", "--input", log)
    path = log if form == "csv" else as_json_lines(log)
    options = ("--once", "--batch-events", 50, "--position", tmp_path / "position")
    result = run(capsys, "ingest", *common, tmp_path / "ingested", "--from", path, *options)
    assert (result["events"], result["unknown"]) == (imported["events"], imported["unknown_events"])
    assert result["lags"] == {str(path): 0} and not result["rejected"]
    wrong, errors = compare_stores(tmp_path / "ingested", tmp_path / "imported", exact_bundle)
    assert wrong == [] and len(errors) == 13 and max(errors) < 1e-4
    again = run(capsys, "ingest", *common, tmp_path / "ingested", "--from", path, *options)
    assert (again["events"], again["repeats"]) == (0, 0)


@pytest.mark.slow
def test_file_is_followed_beside_its_metrics_until_sigterm(exact_bundle: Path, tmp_path: Path) -> None:
    path, line = tmp_path / "events.jsonl", '{"user_id": 1, "item_id": 2, "timestamp": 1600000000}\n'
    path.write_text(line + "no event\n" + line)
    options = ("--bad-events", "skip", "--metrics-port", "0", "--batch-ms", "20")
    with IngestProcess(path, exact_bundle, tmp_path / "state", *options) as process:

        def served() -> str:
            url = next((found[0] for one in process.log if (found := re.search(r"http://\S+", one))), "")
            return urllib.request.urlopen(url, timeout=5).read().decode() if url else ""

        assert wait_until(lambda: "dman_ingest_events_total 2.0" in served(), seconds=30)
        with path.open("a") as writer:
            writer.write(line[:20])
            writer.flush()
            writer.write(line[20:])
        assert wait_until(lambda: "dman_ingest_events_total 3.0" in served(), seconds=30)
        assert "dman_ingest_rejected_total 1.0" in served() and 'dman_ingest_lag{partition="' in served()
        status, output = process.stop()
    assert (status, output.startswith("3 events stored")) == (0, True), output
    assert any("byte 54: the message is not a JSON object" in one for one in process.log)


def test_metrics_are_the_counts_of_now() -> None:
    counts = IngestCounts(events=3, lags={"t/0": 5})
    registry = ingest_registry(counts)
    counts.events += 1
    assert registry.get_sample_value("dman_ingest_events_total") == 4
    assert registry.get_sample_value("dman_ingest_lag", {"partition": "t/0"}) == 5


@pytest.mark.parametrize(
    ("name", "options", "parameter"),
    [
        ("http://host/topic", {}, "from"),
        ("kafka://host", {}, "from"),
        ("events.jsonl", {"partitions": "0"}, "partitions"),
        ("events.jsonl", {"kafka_options": "x"}, "kafka_options"),
        ("kafka://h/t", {"position": "x"}, "position"),
        ("events.jsonl", {"event_format": "protobuf"}, "event_format"),
        ("kafka://h/t", {"event_format": "csv"}, "event_format"),
    ],
)
def test_options_that_do_not_fit_the_source_are_named(name: str, options: dict[str, Any], parameter: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_source(name, IngestOptions(**options))
    assert caught.value.parameter == parameter
