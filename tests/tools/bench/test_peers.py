"""Our server beside peers: a fake peer with our model, a stand-in for h2load, and measurements with a known answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import whole_benchmark

from dman_runtime.engine import Engine
from dman_runtime.errors import UsageError
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Query, Update
from dman_runtime.store.memory import MemoryStore
from tools.bench.blocks import WRONG_REPLY, Block
from tools.bench.h2load import Request
from tools.bench.peers import __main__ as peers
from tools.bench.peers import environments, h2load, ladder, reencoding, same_model, search, searching
from tools.bench.peers.catalogue import PEERS, Peer
from tools.bench.peers.environments import UnavailableError, pinned, python_of
from tools.bench.peers.hosted import HostedModel, Settings
from tools.bench.peers.ladder import Climb, Effort, Step, ratio_within
from tools.bench.peers.running import Server, peer_server
from tools.bench.peers.same_model import same
from tools.bench.peers.searching import BEST, Index, chosen_effort, enlarged, recall
from tools.bench.peers.wire import BatchOfOneWire, DmanWire, JsonWire, Ranked, TritonWire
from tools.bench.setting import Bench

FAKES = Path(__file__).parent / "fakes"
USERS = {f"user-{number}": [str(1 + (number + place) % 30) for place in range(12)] for number in range(4)}


@dataclass(frozen=True)
class FakePeer(Peer):
    """A server of the standard library, in this environment."""

    def command(self, cache: Path) -> list[str]:
        return [sys.executable, str(FAKES / "peer.py")]

    def facts(self) -> str:
        return self.settings


@dataclass(frozen=True)
class BrokenPeer(FakePeer):
    """One that ends at once."""

    def command(self, cache: Path) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit('its shared library is missing')"]


FAKE = FakePeer("fake", "Fake", "fake", JsonWire("/"), "no batches")
BROKEN = BrokenPeer("broken", "Broken", "broken", JsonWire("/"), "none")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """h2load is a script of ours."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "h2load").write_text(f'#!/bin/sh\nexec {sys.executable} {FAKES / "h2load.py"} "$@"\n')
    (programs / "h2load").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")


def settings_of(bundle: Path, directory: Path, port: int = 0) -> Settings:
    histories = directory / "histories.json"
    histories.write_text(json.dumps(USERS))
    return Settings(str(bundle), str(histories), str(directory / "store"), port, 1)


# -- the model in a peer ---------------------------------------------------------------------------------------------


def test_hosted_model_recommends_what_our_engine_does(tiny_bundle: Path, tmp_path: Path) -> None:
    engine = Engine(Generation.open(tiny_bundle, provider="cpu"), MemoryStore())
    hosted = HostedModel(settings_of(tiny_bundle, tmp_path))
    updates = [("user-0", "7"), ("user-1", "8"), ("user-0", "9"), ("user-0", "40")]
    engine.update([Update(user, items) for user, items in USERS.items()])
    assert hosted.update(updates) == [13, 13, 14, 15]
    engine.update([Update(user, [item]) for user, item in updates])
    answers = engine.recommend([Query(user, 10) for user in USERS])
    for answer, hits in zip(answers, hosted.recommend(list(USERS), 10), strict=True):
        assert hits.items.tolist() == answer.item_indices.tolist()
        np.testing.assert_allclose(hits.scores, answer.scores, rtol=1e-4)


def test_hosted_model_answers_updates_and_questions_of_one_batch(tiny_bundle: Path, tmp_path: Path) -> None:
    hosted = HostedModel(settings_of(tiny_bundle, tmp_path))
    asked, updated, fewer = hosted.answer(
        [{"user_id": "user-0", "k": 4}, {"user_id": "user-0", "item_id": "40"}, {"user_id": "user-1", "k": 2}]
    )
    assert updated == {"event_count": 13}
    assert len(asked["item_ids"]) == len(asked["scores"]) == 4 and len(fewer["item_ids"]) == 2
    assert "40" not in asked["item_ids"] and not set(asked["item_ids"]) & set(USERS["user-0"])


# -- the wires -------------------------------------------------------------------------------------------------------


def test_wires_put_the_same_question_in_the_form_of_each_server() -> None:
    assert DmanWire().recommend("u", 3).body[:5] == bytes([0, 0, 0, 0, 5])
    assert json.loads(JsonWire("/x").update("u", "i").body) == {"user_id": "u", "item_id": "i"}
    assert json.loads(BatchOfOneWire("/x").recommend("u", 3).body) == {"requests": [{"user_id": "u", "k": 3}]}
    triton = TritonWire().recommend("u", 3)
    assert triton.path == "/v2/models/recommend/infer"
    assert [one["data"] for one in json.loads(triton.body)["inputs"]] == [["u"], [3]]


def test_wires_read_the_replies_of_each_server() -> None:
    ranked = Ranked(["7", "8"], [1.5, 0.5])
    content = {"item_ids": ranked.item_ids, "scores": ranked.scores}
    outputs = {"outputs": [{"name": name, "data": data} for name, data in content.items()]}
    assert JsonWire("/").ranked(json.dumps(content).encode()) == ranked
    assert BatchOfOneWire("/").ranked(json.dumps([content]).encode()) == ranked
    assert TritonWire().ranked(json.dumps(outputs).encode()) == ranked
    assert TritonWire().event_count(b'{"outputs":[{"name":"event_count","data":[5]}]}') == 5
    assert BatchOfOneWire("/").event_count(b'[{"event_count": 5}]') == 5


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Ranked(["a", "b"], [2.0, 1.0]), True),
        (Ranked(["a", "b"], [2.0005, 0.9995]), True),
        (Ranked(["a", "c"], [2.0, 1.0]), True),  # as good as the last one
        (Ranked(["b", "a"], [2.0, 1.0]), False),
        (Ranked(["c", "b"], [2.0, 1.0]), False),
        (Ranked(["a", "b"], [2.0, 1.1]), False),
        (Ranked(["a"], [2.0]), False),
    ],
)
def test_same_rankings_may_differ_in_the_last_digits_only(found: Ranked, expected: bool) -> None:
    assert same(found, Ranked(["a", "b"], [2.0, 1.0])) is expected


# -- h2load ----------------------------------------------------------------------------------------------------------


def test_missing_h2load_is_an_error_that_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert peers.main([]) == 2
    assert capsys.readouterr().err == "error: h2load is not installed; apt-get install nghttp2-client\n"


def test_blocks_hold_what_was_answered_while_all_clients_ran() -> None:
    early = np.array([[1_000_000, 200, 10], [1_399_990, 200, 4], [1_400_000, 200, 2000], [2_000_000, 200, 9]])
    late = np.array([[1_100_000, 200, 10], [1_500_000, 500, 3], [2_050_000, 200, 9]])
    begin, end = h2load._common([early, late], 1.0)
    assert (begin, end) == (pytest.approx(1.1 + h2load.SETTLE_SECONDS), pytest.approx(2.0))
    block = h2load._answered([early, late], 1.4, 2.0, short=False)
    assert block.milliseconds.tolist() == [2.0] and block.errors == Counter({"status 500": 1})
    assert block.per_second == pytest.approx(1 / 0.6)
    assert h2load._answered([early, late], 1.4, 2.0, short=True).errors[WRONG_REPLY] == 1


def test_block_is_measured_longer_where_clients_start_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = list[float]()

    def run(address: str, requests: Sequence[Request], **options: Any) -> tuple[list[np.ndarray], int]:
        given.append(options["seconds"])
        return [np.array([[start, 200, 10], [start + 2_000_000, 200, 10]]) for start in (1_000_000, 2_500_000)], 999

    monkeypatch.setattr(h2load, "_run", run)
    requests = [DmanWire().recommend("u", 3)] * 2

    def measured(seconds: float) -> h2load.Load:
        return h2load.block("", requests, http1=False, seconds=seconds, reply_bytes=1, scratch=tmp_path)

    assert measured(1.0).block.milliseconds.tolist() == [0.01]
    assert given == [1.0 + h2load.SETTLE_SECONDS, 2.0 + h2load.SETTLE_SECONDS]
    with pytest.raises(UsageError, match="2 clients did not run together"):
        measured(0.1)


@pytest.mark.slow
def test_block_counts_replies_that_are_too_short_as_wrong(
    stand_in: None, serve_fake: Callable[..., str], tmp_path: Path
) -> None:
    address, request = serve_fake(), DmanWire().recommend("u", 3)

    def measured(request: Request, reply_bytes: int) -> Block:
        return h2load.block(
            address, [request], http1=False, seconds=0.5, reply_bytes=reply_bytes, scratch=tmp_path
        ).block

    assert not measured(request, 7).errors
    assert measured(request, 70).errors[WRONG_REPLY] > 0
    refused = request._replace(path="/dman.v1.Recommender/Nothing")  # status 200, and an error in the trailers
    assert measured(refused, 7).errors[WRONG_REPLY] > 0


# -- load at equal p99 -----------------------------------------------------------------------------------------------


def climb_of(name: str, *, ours: bool = False, **of_clients: Sequence[tuple[int, float]]) -> Climb:
    """Blocks of a second: calls and p99 by round, for each number of clients."""
    steps = {
        int(clients.removeprefix("c")): [Step(Block(0.0, 1.0, np.full(calls, p99)), 0.5) for calls, p99 in rounds]
        for clients, rounds in of_clients.items()
    }
    return Climb(Server(name, JsonWire("/"), "", 0, ours), steps)


def test_throughput_within_a_bound_is_that_of_the_best_number_of_clients_that_keeps_it() -> None:
    one = climb_of("x", c1=[(100, 2.0), (100, 30.0), (100, 2.0)], c8=[(300, 9.0)] * 3, c64=[(500, 70.0)] * 3)
    assert [one.within(bound) for bound in (1.0, 5.0, 10.0, 100.0)] == [None, 1, 8, 64]
    one.steps[64][1].block.errors["status 503"] += 1
    assert one.within(100.0) == 8 and one.failed(64) == 1


def test_ratio_within_a_bound_is_ours_by_the_best_peer_round_by_round() -> None:
    ours = climb_of("ours", ours=True, c1=[(100, 1.0)] * 2, c8=[(600, 8.0), (900, 8.0)])
    slow = climb_of("slow", c1=[(50, 2.0)] * 2, c8=[(100, 8.0)] * 2)
    fast = climb_of("fast", c1=[(40, 6.0)] * 2, c8=[(300, 9.0), (300, 9.0)])
    found = ratio_within([ours], [slow, fast], 10.0)
    assert found is not None
    mine, other, ratio = found
    assert (mine, other, ratio.values) == (ours, fast, (2.0, 3.0))
    within = ratio_within([ours], [slow, fast], 2.0)
    assert within is not None and within[1] is slow and within[2].values == (2.0, 2.0)
    assert ratio_within([ours], [slow, fast], 1.0) is None


@pytest.mark.parametrize(("calls", "met"), [(160, True), (140, False)])
def test_claims_want_half_as_much_again_as_the_best_peer(calls: int, met: bool) -> None:
    ours, other = climb_of("ours", ours=True, c1=[(calls, 1.0)]), climb_of("peer", c1=[(100, 1.0)])
    claim = same_model._claim("recommend", [ours], [other], 5.0)
    assert claim is not None and claim.met is met
    assert claim.measured == f"{calls / 100:.2f}x ({calls / 100:.2f} to {calls / 100:.2f}), ours by peer"


# -- environments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*(peer.name for peer in PEERS), search.NAME])
def test_requirements_pin_every_version(name: str) -> None:
    lines = (environments.REQUIREMENTS / f"{name}.txt").read_text().splitlines()
    assert lines and all(line.count("==") == 1 for line in lines)
    assert "numpy" in pinned(name)


def test_peers_name_the_package_that_they_are() -> None:
    assert all(peer.facts().startswith(f"{peer.package} {pinned(peer.name)[peer.package]}: ") for peer in PEERS)


def test_environment_is_made_once_and_says_why_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    (tmp_path / "some.txt").write_text("")
    python = python_of("some", tmp_path / "cache")
    found = subprocess.check_output([python, "-c", "import sys; print(sys.prefix)"], text=True, timeout=60)
    assert Path(found.strip()) == python.parent.parent
    monkeypatch.setattr(environments, "_run", lambda command: pytest.fail("made again"))
    assert python_of("some", tmp_path / "cache") == python
    monkeypatch.undo()
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    (tmp_path / "other.txt").write_text(f"{tmp_path}/missing-directory\n")
    with pytest.raises(UnavailableError, match="missing-directory"):
        python_of("other", tmp_path / "cache")
    with pytest.raises(UnavailableError, match="there is no python-of-old"):
        python_of("some", tmp_path / "cache", interpreters=["python-of-old"])


# -- encoding histories again ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_last_embedding_is_that_of_the_whole_model_in_both_forms(tmp_path: Path) -> None:
    model = reencoding.sasrec(50, 30)
    items = torch.randint(0, 50, (3, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.encode(items, torch.zeros(3, dtype=torch.int64), torch.full((3,), 30))[:, -1].numpy()
    encode = reencoding._in_onnx(reencoding.export(model, 30, tmp_path / "sasrec.onnx"))
    np.testing.assert_allclose(reencoding._in_torch(model)(items.numpy()), expected, atol=1e-5)
    np.testing.assert_allclose(encode(items.numpy()), expected, atol=1e-4)
    np.testing.assert_allclose(encode(items.numpy()[:1]), expected[:1], atol=1e-4)


def test_compute_is_cpu_time_and_not_waiting() -> None:
    waited = reencoding.cpu_seconds(lambda: subprocess.run(["sleep", "0.2"], check=True), 1)
    assert waited < 0.1
    assert reencoding.cpu_seconds(lambda: sum(range(2_000_000)), 2) > 1e-3


# -- search ----------------------------------------------------------------------------------------------------------


def test_recall_is_the_share_of_the_right_items_that_was_found() -> None:
    right = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert recall(np.array([[3, 2, 1, 0], [4, 5, -1, 9]]), right) == 0.75


def test_chosen_effort_is_the_least_with_the_recall() -> None:
    given = list[int]()

    def search_some(users: np.ndarray) -> np.ndarray:
        right = np.tile(np.arange(BEST), (len(users), 1))
        return np.where(right < 3 * given[-1], right, -1)

    users, right = np.zeros((2, 4), np.float32), np.tile(np.arange(BEST), (2, 1))
    assert chosen_effort(Index("some", search_some, 0.0, given.append), users, right, 0.9) == 32
    assert given == [1, 2, 4, 8, 16, 32]
    assert chosen_effort(Index("exact", search_some, 0.0), users, right, 0.9) is None


def test_enlarged_table_keeps_its_rows_and_stays_close_to_them() -> None:
    table = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    larger = enlarged(table, 1000)
    assert larger.shape == (1000, 8) and (larger[:40] == table).all()
    nearest = np.sqrt(((larger[:, None] - table) ** 2).sum(axis=-1)).min(axis=1)
    between = np.sqrt(((table[:, None] - table) ** 2).sum(axis=-1)).mean()
    assert nearest[40:].max() < between and len(np.unique(larger, axis=0)) == 1000
    assert enlarged(table, 10).shape == (10, 8)


def test_measure_compares_indexes_with_the_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(items: np.ndarray) -> list[Index]:
        ours = searching.exact(items)

        def search_half(users: np.ndarray) -> np.ndarray:
            found = ours.search(users).copy()
            found[:, ::2] = -1
            return found

        return [Index("half", search_half, 1.0)]

    monkeypatch.setattr(searching, "faiss_indexes", half)
    monkeypatch.setattr(searching, "usearch_indexes", lambda items: [])
    monkeypatch.setattr(searching, "_one_thread", lambda: None)
    random = np.random.default_rng(0)
    items, users = (random.standard_normal((count, 8)).astype(np.float32) for count in (300, 20))
    settings = {"recall": 0.9, "batches": [1, 4], "rounds": 2, "seconds": 0.0}
    ours, other = searching.measure(items, users, settings)
    assert (ours["recall"], other["recall"]) == (1.0, 0.5)
    assert {batch: len(times) for batch, times in other["seconds"].items()} == {"1": 2, "4": 2}


def found_of(name: str, recall: float, seconds: float) -> dict[str, Any]:
    return {"index": name, "recall": recall, "seconds": {"1": [seconds, 2 * seconds]}}


@pytest.mark.parametrize(("recall", "ours", "ratio"), [(0.99, "index (ours)", "0.50"), (0.9, "numpy (ours)", "3.00")])
def test_search_claims_compare_what_the_export_would_choose(recall: float, ours: str, ratio: str) -> None:
    indexes = [found_of("numpy (ours)", 1.0, 6.0), found_of("index (ours)", recall, 1.0)]
    indexes += [found_of("quick and wrong", 0.5, 0.1), found_of("good", 0.99, 2.0)]
    (claim,) = search._claims([{"items": 1000, "indexes": indexes}])
    assert claim.claim == f"1,000 items, batch 1: time of {ours} by the fastest other"
    assert claim.measured == f"{ratio}x ({ratio} to {ratio}) that of good"


# -- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_peer_that_recommends_something_else_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_model, "WORKERS", (1,))
    monkeypatch.setattr(JsonWire, "ranked", lambda self, reply: Ranked([str(i) for i in range(10)], [1.0] * 10))
    with ExitStack() as stack, pytest.raises(UsageError, match="Fake, 1 worker recommends"):
        same_model.start(stack, bench, bench.scratch, [FAKE])


def test_peer_that_does_not_start_says_why(tiny_bundle: Path, tmp_path: Path) -> None:
    settings, command = settings_of(tiny_bundle, tmp_path, port=1), BROKEN.command(tmp_path)
    with (
        pytest.raises(UnavailableError, match="ended with status 1; its last line: its shared library is missing"),
        peer_server("Broken", command, BROKEN.wire, settings, tmp_path, ("user-0", "1")),
    ):
        pass


@whole_benchmark
@pytest.mark.slow
def test_peers_measures_ours_beside_a_fake_peer(
    stand_in: None,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def not_here(name: str, cache: Path) -> Path:
        raise UnavailableError("no network")

    monkeypatch.setattr(peers, "PEERS", (replace(FAKE, name="mosec"), replace(BROKEN, name="litserve")))
    monkeypatch.setattr(ladder, "QUICK", Effort(clients=(1, 2), rounds=1, seconds=0.5))
    monkeypatch.setattr(search, "python_of", not_here)
    monkeypatch.setattr(reencoding, "TARGETS", {20: 20.0, 40: 100.0})
    monkeypatch.setattr(reencoding, "SHORT", 20)
    monkeypatch.setattr(reencoding, "LONG", 40)
    scratch, report = tmp_path / "scratch", tmp_path / "reports" / "peers.md"
    scratch.mkdir()
    options = ["--bundle", str(tiny_bundle), "--out", str(report), "--scratch", str(scratch), "--quick", "--json"]
    assert peers.main(options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = result["sections"]
    assert set(found) == {"Recommendations", "Updates", "Encoding histories again", "Search"}
    servers = {"dman-runtime, 1 worker", "dman-runtime, 2 workers", "Fake, 1 worker", "Fake, 2 workers"}
    assert set(found["Recommendations"]) == servers
    assert set(found["Updates"]) == servers - {"Fake, 2 workers"}
    for section in ("Recommendations", "Updates"):
        for steps in found[section].values():
            assert all(one["per_second"][0] > 0 and one["cpu_ms"][0] > 0 for one in steps.values())
    assert len(found["Encoding histories again"]) == 9
    claims = {claim["claim"]: claim["measured"] for claim in result["claims"]}
    assert "its shared library is missing" in claims["recommend in Broken"]
    assert claims["search in FAISS and USearch"] == "not measured"
    text = report.read_text()
    assert "| client | a stand-in for h2load |" in text and "| Fake | no batches |" in text and "no network" in text
    assert str(tmp_path) not in text and str(tiny_bundle) not in text
    assert list(scratch.iterdir()) == []
