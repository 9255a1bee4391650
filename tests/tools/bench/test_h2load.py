"""The client in C: what its logs say, and that a call which fails is never taken for a fast one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dman_runtime.errors import UsageError
from tools.bench import __main__ as command
from tools.bench import h2load
from tools.bench.floor import PROCESSES, Floor
from tools.bench.h2load import ECHO, Call, Group, Load
from tools.bench.messages import recommend_calls
from tools.bench.servers import echo_server
from tools.bench.setting import Bench
from tools.faults.http2 import framed

SECOND = 1_000_000  # microseconds
needs_h2load = pytest.mark.skipif(not h2load.is_here(), reason=h2load.HOW_TO_GET_IT)


def log(*rows: tuple[float, int, float]) -> np.ndarray:
    """Requests: when they began, in seconds, HTTP's status, and the seconds that they took."""
    return np.array([(begin * SECOND, status, taken * SECOND) for begin, status, taken in rows], np.int64)


def test_blocks_count_what_ended_while_all_processes_were_sending() -> None:
    one = log((0.0, 200, 0.2), (0.2, 200, 1.1), (1.3, 200, 0.6), (1.9, 200, 2.1))
    other = log((1.0, 200, 0.5), (1.5, 200, 0.5), (2.0, 503, 0.5), (2.5, 200, 0.5))
    blocks = h2load._blocks({"read": [one], "write": [other]}, warm_up=0.1, least=0.5)
    assert blocks is not None
    read, write = blocks["read"], blocks["write"]
    assert (read.began, read.ended) == (write.began, write.ended) == (1.1, 3.0)
    assert read.milliseconds.tolist() == [1100.0, 600.0] and read.per_second == pytest.approx(2 / 1.9)
    assert write.milliseconds.tolist() == [500.0, 500.0] and write.errors == {"HTTP 503": 1}


def test_blocks_are_none_when_processes_did_not_send_at_the_same_time() -> None:
    early, late = log((0.0, 200, 0.5), (0.5, 200, 0.5)), log((0.9, 200, 0.2), (1.1, 200, 0.9))
    assert h2load._blocks({"echo": [early, late]}, warm_up=0.0, least=0.5) is None
    assert h2load._blocks({"echo": [early, log().reshape(0, 3)]}, warm_up=0.0, least=0.1) is None


@pytest.mark.parametrize(("calls", "clients", "shares"), [(4, 9, [2, 2, 3, 2]), (4, 3, [1, 1, 1]), (1, 5, [5])])
def test_clients_are_shared_out_over_the_calls(calls: int, clients: int, shares: list[int]) -> None:
    group = Group([Call("/service/method", b"%d" % number) for number in range(calls)], clients)
    assert [share for _, share in group.shares] == shares
    assert [call.message for call, _ in group.shares] == [b"%d" % number for number in range(len(shares))]


def test_message_is_framed_as_grpc_sends_it() -> None:
    assert framed(b"abc") == b"\0\0\0\0\3abc"


def test_report_says_how_to_get_the_client_where_it_is_missing(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(h2load, "is_here", lambda: False)
    report = tmp_path / "performance.md"
    options = ["--quick", "--bundle", str(tiny_bundle), "--out", str(report), "--scratch", str(tmp_path)]
    assert command.main([*options, "--only", "closed", "history"]) == 0
    assert "apt-get install nghttp2-client. What it measures is left out." in capsys.readouterr().out
    assert report.read_text().count("Not measured: h2load is missing") == 2


# -- with the client -------------------------------------------------------------------------------------------------


@needs_h2load
@pytest.mark.slow
def test_closed_loop_measures_an_echo_with_several_processes() -> None:
    with echo_server("2 threads") as echo:
        blocks = h2load.in_turns([h2load.echo_load(echo, 6, 3)], rounds=2, seconds=0.5)
    assert len(blocks["echo"]) == 2
    for block in blocks["echo"]:
        assert len(block.milliseconds) > 10 and not block.errors
        assert 0 < block.p50 < 1000 * (block.ended - block.began)


@needs_h2load
@pytest.mark.slow
def test_closed_loop_refuses_a_server_that_does_not_answer_with_ok(bench: Bench) -> None:
    with bench.server("refusing") as server:
        bench.ordinary_users(server.address)
        good, wrong = recommend_calls(["user-1"]), recommend_calls(["user-1"], k=100_000)
        assert h2load.run(Load(server, {"good": Group(good, 2)}), seconds=0.3)["good"].count > 0
        with pytest.raises(UsageError, match="INVALID_ARGUMENT"):
            h2load.run(Load(server, {"wrong": Group(wrong, 2)}), seconds=0.3)


@needs_h2load
@pytest.mark.slow
def test_floor_chooses_the_fastest_echo_for_the_nearest_number_of_clients(bench: Bench) -> None:
    with echo_server("1 thread") as one, echo_server("uvloop") as other:
        echoes = {"1 thread": one, "uvloop": other}
        floor = Floor(Bench(bench.bundle, bench.scratch, "cpu", bench.sizes, other.address, echoes))
    rates = {kind: blocks[0].per_second for kind, blocks in floor.blocks[8].items()}
    assert floor.best(100) == floor.best(8) == (max(rates, key=rates.__getitem__), echoes[floor.best(8)[0]])
    assert PROCESSES == 8 and ECHO.message == b""
