"""What is counted, what it costs, and that the metrics of several workers add up and outlive restarts."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from prometheus_client import generate_latest

from dman_runtime.metrics import NO_METRICS, Metrics
from dman_runtime.serving.prometheus import FILE_BYTES, MAX_LABELS, PrometheusMetrics, metrics_here, renew_files, sum_of

RECORD = """
import os, signal, sys
from pathlib import Path
from dman_runtime.serving.prometheus import metrics_in
metrics = metrics_in(Path(sys.argv[1]), sys.argv[2])
exec(sys.argv[3])
os.kill(os.getpid(), signal.SIGKILL)
"""


def samples(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(dman.*) (\S+)$", text, re.MULTILINE)}


def of(metrics: PrometheusMetrics) -> dict[str, float]:
    return samples(generate_latest(metrics.registry).decode())


def record(directory: Path, writer: str, code: str) -> None:
    """In a process that is killed at the end, as workers are."""
    done = subprocess.run(
        [sys.executable, "-c", RECORD, str(directory), writer, code],
        cwd=ROOT, timeout=60, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr


def total(directory: Path) -> dict[str, float]:
    return samples(generate_latest(sum_of(directory)).decode())


def use_everything(metrics: Metrics) -> None:
    metrics.call("Update", "OK", 0.003)
    metrics.call("Update", "OK", 40.0)
    metrics.refused("in_flight_bytes")
    metrics.turn(3, 70)
    metrics.commit(0.0004)
    metrics.applied(5, 1, 2)
    metrics.late(1, 5, 2)
    metrics.fallback()
    metrics.fallback(4)
    metrics.queue_depth(7)
    metrics.bytes_in_flight(1000)
    metrics.requests_in_flight(8)
    metrics.store(2000, 4096, 8192)
    metrics.stale_readers(2)
    metrics.unparsable(3)
    metrics.restarts(1)
    metrics.workers(2, 1)
    metrics.problems(["disk_full", "worker_down"])
    metrics.problems(["disk_full"])


EXPECTED = {
    'dman_late_events_total{outcome="dropped"}': 1,
    'dman_late_events_total{outcome="placed"}': 3,
    'dman_late_events_total{outcome="deferred"}': 2,
    'dman_request_duration_seconds_bucket{le="0.002",method="Update",status="OK"}': 0,
    'dman_request_duration_seconds_bucket{le="0.005",method="Update",status="OK"}': 1,
    'dman_request_duration_seconds_bucket{le="30.0",method="Update",status="OK"}': 1,
    'dman_request_duration_seconds_bucket{le="+Inf",method="Update",status="OK"}': 2,
    'dman_request_duration_seconds_count{method="Update",status="OK"}': 2,
    'dman_request_duration_seconds_sum{method="Update",status="OK"}': 40.003,
    'dman_refused_requests_total{cause="in_flight_bytes"}': 1,
    'dman_turn_requests_bucket{le="2.0"}': 0,
    'dman_turn_requests_bucket{le="4.0"}': 1,
    "dman_turn_events_sum": 70,
    "dman_commit_duration_seconds_sum": 0.0004,
    "dman_applied_events_total": 5,
    "dman_duplicate_updates_total": 1,
    "dman_unknown_events_total": 2,
    "dman_fallback_answers_total": 5,
    "dman_queue_depth": 7,
    "dman_in_flight_bytes": 1000,
    "dman_in_flight_requests": 8,
    "dman_store_used_bytes": 2000,
    "dman_store_file_bytes": 4096,
    "dman_stale_readers_cleared_total": 2,
    "dman_unparsable_messages_total": 3,
    "dman_worker_restarts_total": 1,
    "dman_workers": 2,
    "dman_workers_ready": 1,
    'dman_problem{problem="disk_full"}': 1,
    'dman_problem{problem="worker_down"}': 0,
}


def test_every_method_changes_what_it_names() -> None:
    metrics = metrics_here()
    use_everything(metrics)
    found = of(metrics)
    assert {name: found.get(name) for name in EXPECTED} == EXPECTED
    assert not [name for name in found if "_created" in name]


def test_no_metrics_takes_the_same_calls_and_the_counting_one_overrides_all_of_them() -> None:
    use_everything(NO_METRICS)
    methods = {name for name, _ in inspect.getmembers(Metrics, inspect.isfunction)}
    assert len(methods) == 16 and methods <= set(vars(PrometheusMetrics))
    for name in methods:
        assert inspect.signature(getattr(Metrics, name)) == inspect.signature(getattr(PrometheusMetrics, name))


def test_names_follow_the_conventions() -> None:
    for family in metrics_here().registry.collect():
        assert re.fullmatch("dman_[a-z_]+", family.name) and family.documentation
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{family.name}_total"}
        assert not re.search("_(ms|milliseconds|kb|mib|count)$", family.name)


def test_labels_that_callers_make_up_do_not_grow_without_end() -> None:
    metrics = metrics_here()
    for number in range(3 * MAX_LABELS):
        metrics.call(f"method {number}", "OK", 0.1)
        metrics.refused(f"cause {number}")
    found = of(metrics)
    assert sum(name.startswith("dman_request_duration_seconds_count") for name in found) == MAX_LABELS + 1
    assert found['dman_request_duration_seconds_count{method="other",status="other"}'] == 2 * MAX_LABELS
    assert found['dman_refused_requests_total{cause="other"}'] == 2 * MAX_LABELS


def test_a_server_of_one_process_ready_is_one_worker_of_one() -> None:
    found = of(metrics_here())
    assert (found["dman_workers"], found["dman_workers_ready"]) == (1, 1)


@pytest.mark.slow
def test_workers_add_up_and_their_gauges_end_with_them_and_their_counters_do_not(tmp_path: Path) -> None:
    for writer in ("0", "1", "supervisor"):
        renew_files(tmp_path, writer)
    record(tmp_path, "0", "metrics.call('Update', 'OK', 0.003); metrics.queue_depth(3); metrics.store(10, 50, 90)")
    record(tmp_path, "1", "metrics.call('Update', 'OK', 0.004); metrics.queue_depth(4); metrics.store(11, 50, 90)")
    record(tmp_path, "supervisor", "metrics.workers(2, 2); metrics.problems(['worker_down'])")
    calls = 'dman_request_duration_seconds_count{method="Update",status="OK"}'
    found = total(tmp_path)
    assert (found[calls], found["dman_queue_depth"], found["dman_store_file_bytes"]) == (2, 7, 50)
    assert (found["dman_workers"], found['dman_problem{problem="worker_down"}']) == (2, 1)

    renew_files(tmp_path, "1")
    found = total(tmp_path)
    assert (found[calls], found["dman_queue_depth"]) == (2, 3)
    record(tmp_path, "1", "metrics.call('Update', 'OK', 0.005); metrics.queue_depth(5)")
    found = total(tmp_path)
    assert (found[calls], found["dman_queue_depth"]) == (3, 8)
    assert found['dman_request_duration_seconds_bucket{le="0.005",method="Update",status="OK"}'] == 3


@pytest.mark.slow
def test_restarts_do_not_grow_the_directory_and_the_files_have_room_for_all_labels(tmp_path: Path) -> None:
    code = f"[metrics.call(f'A long method name {{n}}', 'RESOURCE_EXHAUSTED', 1) for n in range({MAX_LABELS + 5})]"
    code += f"; [metrics.refused(f'a cause {{n}}') for n in range({MAX_LABELS + 5})]"
    for _ in range(3):
        renew_files(tmp_path, "0")
        record(tmp_path, "0", code)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {f"{kind}_0.db": size for kind, size in FILE_BYTES.items()}  # none had to grow
    assert total(tmp_path)['dman_refused_requests_total{cause="a cause 7"}'] == 3


def test_files_of_metrics_have_their_blocks_on_disk(tmp_path: Path) -> None:
    """A write into a hole of a mapped file ends the process when the disk is full."""
    renew_files(tmp_path, "0")
    os.sync()
    for path in tmp_path.iterdir():
        assert path.stat().st_blocks * 512 >= path.stat().st_size


def measured(code: str, *arguments: str) -> dict[str, float]:
    """Microseconds of each method, in a process of its own."""
    script = (
        "import json, sys, timeit\nfrom pathlib import Path\nfrom dman_runtime.serving.prometheus import *\n"
        f"metrics = {code}\n"
        "calls = {'call': lambda: metrics.call('Update', 'OK', 0.003), 'turn': lambda: metrics.turn(3, 70),\n"
        "         'commit': lambda: metrics.commit(0.0004), 'applied': lambda: metrics.applied(5, 0, 0),\n"
        "         'bytes_in_flight': lambda: metrics.bytes_in_flight(1000)}\n"
        "print(json.dumps({name: min(timeit.repeat(one, number=2000, repeat=5)) / 2000 * 1e6\n"
        "                  for name, one in calls.items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, timeout=60, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_counting_takes_a_few_microseconds(tmp_path: Path) -> None:
    renew_files(tmp_path, "0")
    alone = measured("metrics_here()")
    shared = measured("metrics_in(Path(sys.argv[1]), '0')", str(tmp_path))
    print(alone, shared)
    assert max(alone.values()) < 20 and max(shared.values()) < 40  # microseconds; a busy machine included


@pytest.mark.slow
def test_the_sum_of_eight_workers_takes_a_fraction_of_a_second(tmp_path: Path) -> None:
    code = "[metrics.call(f'Method{n}', s, 1) for n in range(9) for s in ('OK', 'UNAVAILABLE', 'ABORTED', 'CANCELLED')]"
    for writer in range(8):
        renew_files(tmp_path, str(writer))
        record(tmp_path, str(writer), code)
    started = time.monotonic()
    found = total(tmp_path)
    assert time.monotonic() - started < 1.0
    assert found['dman_request_duration_seconds_count{method="Method3",status="OK"}'] == 8
