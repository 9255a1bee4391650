"""The load generator and the benchmark, against real servers; numbers are checked for sense, never for speed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from conftest import TIMED, TINY, random_model, whole_benchmark
from hypothesis import given
from hypothesis import strategies as st

from dman_runtime.data.items import read_items
from dman_runtime.data.logs import read_interactions
from dman_runtime.errors import UsageError
from dman_runtime.model.bundle import Bundle, open_bundle
from dman_runtime.model.encoder import Encoder
from dman_train.run import open_run
from dman_train.synthetic import PlantedConfig
from dman_train.synthetic import generate as generated
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools import generate, loadgen
from tools.bench import __main__ as bench
from tools.bench import batch as bench_batch
from tools.bench import catalogue, setting, signals
from tools.bench import training as bench_training
from tools.bench.blocks import (
    WARM_UP_CALLS,
    Block,
    Operation,
    Plan,
    clean,
    interleave,
    ratios,
    run_block,
    split,
    summary,
)
from tools.bench.report import Claim, Section, write_report
from tools.bench.servers import ROOT, connect, dman_server, echo_server
from tools.bench.setting import QUICK, Bench
from tools.bench.updates import durable_updates


@pytest.fixture(scope="module")
def address(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory):
    with dman_server(tiny_bundle, tmp_path_factory.mktemp("loadgen") / "state") as running:
        yield running.address


def last_json(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# -- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.integers(0, 10**6), st.lists(st.floats(0.01, 10), min_size=1, max_size=20))
def test_split_parts_are_proportional_and_add_up(total: int, shares: list[float]) -> None:
    parts = split(total, shares)
    assert sum(parts) == total
    assert np.allclose(parts, np.array(shares) / sum(shares) * total, atol=1.01)


def test_schedule_interleaves_all_operations_and_rotates_which_is_first() -> None:
    schedule = Plan({"a": 10, "b": 7}, concurrency=1, rounds=3).schedule()
    assert [[name for name, _ in current] for current in schedule] == [["a", "b"], ["b", "a"], ["a", "b"]]
    totals: Counter[str] = Counter()
    for current in schedule:
        totals.update(dict(current))
    assert totals == {"a": 10, "b": 7}


class _Refused(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.RESOURCE_EXHAUSTED


def test_run_block_counts_refusals_and_wrong_replies_apart_from_latencies() -> None:
    numbers = iter(range(10))

    def send(number: int) -> int:
        if number < 3:
            raise _Refused
        return number

    operation = Operation("fake", lambda: next(numbers), send, lambda request, reply: reply != 9)
    block = run_block([operation], 10, time.perf_counter() + 60, None)
    assert block.errors == {"RESOURCE_EXHAUSTED": 3, "WRONG_REPLY": 1}
    assert len(block.milliseconds) == 6 and block.count == 10
    with pytest.raises(UsageError, match="RESOURCE_EXHAUSTED"):
        clean({"fake": [block]})


@pytest.mark.slow
def test_interleave_stops_at_its_time_limit() -> None:
    operation = Operation("nap", lambda: 0.01, time.sleep)
    began = time.perf_counter()
    blocks = interleave([[("nap", 10**6)]], [[operation]], seconds=0.5)
    assert time.perf_counter() - began < 20
    assert 0 < sum(block.count for block in blocks["nap"]) < 60


@pytest.mark.slow
def test_interleave_measures_even_when_the_warm_up_takes_all_its_time() -> None:
    operation = Operation("nap", lambda: 0.2, time.sleep)  # the warm-up alone would take WARM_UP_CALLS times as long
    blocks = interleave([[("nap", 1)]], [[operation]], seconds=0.5)
    assert [block.count for block in blocks["nap"]] == [1]


def test_summary_percentiles_and_ratios_are_those_of_the_samples() -> None:
    fast = [Block(0.0, 1.0, np.array([1.0, 2.0, 3.0])), Block(1.0, 2.0, np.array([4.0]))]
    slow = [Block(0.0, 1.0, np.array([6.0, 6.0])), Block(1.0, 2.0, np.array([2.0]), Counter(UNAVAILABLE=1))]
    assert ratios(slow, fast).values == (3.0, 0.5)
    assert summary("fast", fast).p50 == 2.5 and summary("fast", fast).per_second == 2.0
    assert summary("slow", slow).count == 4 and summary("slow", slow).errors == {"UNAVAILABLE": 1}
    for nothing in ([Block(0.0, 1.0)], []):
        assert json.loads(json.dumps(summary("none", nothing).as_json()))["p50"] is None


# -- load generator --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_loadgen_has_no_errors_and_every_counted_update_is_stored(
    address: str, processes: int, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users, events, requests, concurrency = 6, 8, 203, 3
    options = f"--target {address} --users {users} --events {events} --requests {requests} --concurrency {concurrency}"
    options += f" --processes {processes} --prefix p{processes}- --mix recommend=0.8,update=0.2 --bundle {tiny_bundle}"
    assert loadgen.main([*options.split(), "--json"]) == 0
    result = last_json(capsys)
    assert result["recommend"]["count"] + result["update"]["count"] == requests
    assert result["recommend"]["count"] == result["echo"]["count"] == round(0.8 * requests)
    for one in result.values():
        assert one["errors"] == {}
        assert 0 < one["p50"] <= one["p90"] <= one["p99"] <= one["max"]
    with connect(address) as channel:
        stub = RecommenderStub(channel)
        stored = [stub.GetUser(pb.GetUserRequest(user_id=f"p{processes}-{i}")).event_count for i in range(users)]
    assert sum(stored) == users * events + WARM_UP_CALLS * concurrency + result["update"]["count"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_loadgen_without_a_bundle_takes_its_items_from_the_server_and_stops_in_time(
    address: str, processes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--target {address} --users 2 --requests 1000000 --concurrency 2 --seconds 3 --mix update=1"
    began = time.monotonic()
    assert loadgen.main([*options.split(), "--processes", str(processes), "--json"]) == 0
    assert time.monotonic() - began < 30
    result = last_json(capsys)
    assert set(result) == {"echo", "update"}
    assert 0 < result["update"]["count"] < 1_000_000 and not result["update"]["errors"]


@pytest.mark.slow
def test_loadgen_reports_errors_by_status_and_fails(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(loadgen, "MAX_K", 10**6)  # let a k through that the server refuses
    monkeypatch.setattr(loadgen, "_prepare", lambda *_: ["1"])
    options = f"--target {address} --users 1 --requests 20 --concurrency 1 --mix recommend=1 --k 5000 --json"
    assert loadgen.main(options.split()) == 1
    result = last_json(capsys)
    assert result["recommend"]["errors"] == {"INVALID_ARGUMENT": 20} and result["recommend"]["p50"] is None


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_loadgen_with_hardly_any_time_still_ends_in_a_table(
    address: str, processes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--target {address} --users 2 --seconds 0.000001 --concurrency 2 --processes {processes} --json"
    assert loadgen.main(options.split()) == 0
    assert set(last_json(capsys)) == {"echo", "recommend", "update"}


@pytest.mark.parametrize(
    "target",
    ["10.0.0.1:50051", "example.com:50051", "localhost.example.com:1", "0.0.0.0:50051", "[::]:1", "dns:///localhost:1"],
)
def test_loadgen_refuses_targets_that_are_not_loopback(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert loadgen.main(["--target", target]) == 2
    assert "this machine only" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["localhost:50051", "127.0.0.1:1", "127.9.9.9:65535", "[::1]:50051"])
def test_loadgen_accepts_loopback_targets(target: str) -> None:
    assert loadgen.loopback_target(target) == target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "localhost"], "HOST:PORT"),
        (["--mix", "delete=1"], "--mix"),
        (["--mix", "recommend=0"], "above 0"),
        (["--mix", "recommend=nan"], "--mix"),
        (["--requests", "0"], "--requests"),
        (["--seconds", "0"], "--seconds"),
        (["--processes", "9"], "--concurrency"),
        (["--k", "1001"], "--k"),
    ],
)
def test_loadgen_refuses_bad_options_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loadgen.main(options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_loadgen_names_the_remedy_when_no_server_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadgen, "CALL_SECONDS", 0.5)
    assert loadgen.main(["--target", "127.0.0.1:9"]) == 2
    assert "dman-runtime serve" in capsys.readouterr().err


@pytest.mark.slow
def test_echo_server_ends_with_the_process_that_started_it() -> None:
    code = (
        "import os; from tools.bench.servers import echo_server\n"
        "with echo_server() as echo: print(echo.pid, flush=True); os._exit(0)"
    )
    command = [sys.executable, "-c", code]
    pid = int(subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60).stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the echo server outlived its parent")


# -- benchmark -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_training_compares_dman_with_every_system(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = {name: replace(config, width=16) for name, config in bench_training.systems().items()}
    monkeypatch.setattr(bench_training, "systems", lambda: narrow)
    log, page, threads = tmp_path / "log.parquet", tmp_path / "reports" / "training.md", torch.get_num_threads()
    assert generate.main(["--users", "40", "--output", str(log), "--items", str(tmp_path / "items.csv")]) == 0
    options = ["--data", str(log), "--out", str(page), "--rounds", "1", "--steps", "1", "--threads", str(threads)]
    assert bench_training.main([*options, "--json"]) == 0
    result = last_json(capsys)
    names = ["DMAN", "SASRec", "gru4rec", "caser", "shan", "hpmn", "sdm"]
    assert all(any(turn.startswith(name) for turn in result["turns"]) for name in names)
    assert all(events > 0 and seconds > 0 for turns in result["turns"].values() for events, seconds in turns)
    speed = {name: [events / seconds for events, seconds in turns] for name, turns in result["turns"].items()}
    rounds = zip(speed["DMAN"], speed["SASRec, 200 events"], strict=True)
    assert float(result["ratio"]) == pytest.approx(np.median([dman / sasrec for dman, sasrec in rounds]), abs=0.006)
    text = page.read_text()
    assert f"| {result['ratio']} | >= 1 | {'yes' if result['met'] else 'NO'} |" in text
    assert all(f"| {name} |" in text for name in result["turns"])


@whole_benchmark
@pytest.mark.slow
def test_bench_of_signals_compares_servers_of_each_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "MODELS", {signals.WITHOUT: TINY, "times and returns": TIMED})
    monkeypatch.setattr(signals, "DMAN", random_model)  # whose graphs other tests export too
    monkeypatch.setattr(signals, "QUICK", replace(setting.QUICK, rounds=2, calls=4, users=4))
    page, scratch = tmp_path / "reports" / "signals.md", tmp_path / "scratch"
    scratch.mkdir()
    options = ["--quick", "--num-items", "60", "--out", str(page), "--scratch", str(scratch), "--json"]
    assert signals.main(options) == 0
    claims = last_json(capsys)["claims"]
    assert [claim["claim"].partition(" with ")[0] for claim in claims] == [
        *(f"p50 of {kind}" for kind in ("recommend", "first recommend", "update")),
        *["largest state"] * 2,
    ]
    assert all(f"| {claim['claim']} | {claim['measured']} |" in page.read_text() for claim in claims)
    assert list(scratch.iterdir()) == []


@whole_benchmark
@pytest.mark.slow
def test_bench_of_a_large_catalogue_runs_each_command(tmp_path: Path) -> None:
    section = catalogue.large_catalogue(400, tmp_path)
    assert [row[0] for row in section.rows] == [
        "`dman_train.train --data`",
        "`dman_train.export --run`",
        "`dman_train.evaluate --run`",
        "`dman_train.evaluate --bundle`",
    ]
    assert open_run(tmp_path / "run").config["dataset"]["items"] == 400
    commands = section.data["commands"]
    assert all(one["seconds"] > 1 and one["peak"] > 100e6 for one in commands)
    assert [one["left"] > 0 for one in commands] == [True, True, False, False]
    speed, memory = section.claims
    assert speed.measured == f"{section.data['events_per_second']:,.0f}" and speed.target == ">= 5,000"
    assert memory.measured == f"{max(one['peak'] for one in commands) / 2**30:.2f} GiB" and memory.met


def test_bench_of_a_large_catalogue_names_the_command_that_fails(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dman_train.export failed: .*none is not a run"):
        catalogue._run("dman_train.export", "--run", tmp_path / "none")


def test_log_of_a_large_catalogue_has_every_item_and_favourites() -> None:
    log = catalogue.catalogue_log(5000)
    counts = np.bincount(log.items)
    assert len(log) == 10_000 and len(counts) == len(log.item_ids) == 5000 and counts.min() == 1
    assert counts.max() > 100 and log.num_users > 30
    assert np.array_equal(log.items, catalogue.catalogue_log(5000).items)


def test_bench_training_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_training.main(["--data", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err
    assert bench_training.main(["--data", str(tmp_path / "none.csv"), "--rounds", "0"]) == 2
    assert "--rounds is 0; give 1 or more" in capsys.readouterr().err


def test_bench_without_a_bundle_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--bundle", str(tmp_path / "none"), "--out", str(tmp_path / "report.md")]) == 2
    assert "dman_train.export" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_durable_updates_makes_no_claim_when_an_update_seems_faster_than_its_commit(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Operation("bare LMDB commit", lambda: 0.05, time.sleep)
    monkeypatch.setattr("tools.bench.updates._bare_commit", lambda *_: slow)
    sizes = replace(QUICK, rounds=1, calls=10)
    with echo_server() as echo:
        section = durable_updates(Bench(open_bundle(tiny_bundle), tmp_path, "cpu", sizes, echo.address))
    assert section.claims[0].met is None and "measure again" in section.claims[0].measured


def test_recorder_replays_the_very_calls_of_an_import(tiny_bundle: Path, tmp_path: Path) -> None:
    setting, log = Bench(open_bundle(tiny_bundle), tmp_path, "cpu", QUICK, ""), tmp_path / "log.parquet"
    events = bench_batch.write_log(setting, log)
    recorder = bench_batch.Recorder(Encoder.of(setting.bundle, provider="cpu"))
    bench_batch._import(setting, log, recorder, events)
    encoded = [arrays for _, arrays in recorder.calls if len(arrays) == 5]
    assert sum(int(new_lengths.sum()) for _, new_lengths, *_ in encoded) == events
    assert recorder.replay() > 0


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["tiny_bundle", "timed_bundle"])
def test_cuda_section_compares_both_devices_or_says_why_not(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    setting = Bench(open_bundle(request.getfixturevalue(bundle)), tmp_path, "cpu", QUICK, "")
    on_cpu = Encoder.of(setting.bundle, provider="cpu")
    monkeypatch.setattr(Encoder, "of", lambda bundle, provider: on_cpu)
    monkeypatch.setattr(bench_batch, "CUDA_BATCHES", (1, 3))
    section = bench_batch.cuda(setting)
    assert len(section.rows) == len(section.claims) == 4

    def absent(bundle: Bundle, provider: str) -> Encoder:
        raise bench_batch.EncoderError("no CUDA device found; do this")

    monkeypatch.setattr(Encoder, "of", absent)
    assert "no CUDA device found" in bench_batch.cuda(setting).markdown()


def test_report_shows_missed_targets_and_replaces_the_old_page_whole(tmp_path: Path) -> None:
    report = tmp_path / "performance.md"
    report.write_text("old")
    claims = [Claim("speed", "2x", "<= 1x", False), Claim("size", "1 B", "<= 2 B", True), Claim("other", "3")]
    write_report(report, "What serving costs", "Measured.", {"CPU": "one"}, [Section("Speed", "How.", claims)])
    text = report.read_text()
    assert "| speed | 2x | <= 1x | NO |" in text and "| size | 1 B | <= 2 B | yes |" in text
    assert "| other | 3 | none | - |" in text and "old" not in text
    assert list(tmp_path.iterdir()) == [report]


# -- generator -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generate_writes_a_planted_log_that_reads_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = "--users 300 --num-items 200 --answers 5 --queries 3 --min-gap 8 --max-gap 9 --seed 2"
    assert generate.main(["--task", "planted", *options.split()]) == 0
    log = read_interactions(Path("data/log.csv"), min_user_events=5, min_item_events=5)
    config = PlantedConfig(users=300, items=200, answers=5, queries=3, min_gap=8, max_gap=9, seed=2)
    assert log.fingerprint() == generated(config).fingerprint()
    assert list(read_items(Path("data/items.csv"))) == log.item_ids
    printed = capsys.readouterr().out
    assert printed.startswith(f"wrote {len(log):,} events of 300 users on 200 items to data/log.csv, the 200 items")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--task planted --mean-events 9", "error: task planted has no --mean-events. Leave it out or choose another"),
        ("--queries 3 --answers 9", "error: task interests has no --answers, --queries. Leave it out"),
        ("--task planted --min-gap 121", "error: max_gap is 120. Make it at least min_gap, 121"),
    ],
)
def test_generate_refuses_options_of_the_other_task(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate.main(options.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
