"""The commands of `dman-runtime`, which must agree with one another and with a server to the last item."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TINY_ITEMS, running, running_server, serve_config
from histories import ONLY_UNKNOWN, Histories, make_histories, write_csv

from dman_runtime import cli
from dman_runtime.access.tokens import Caller, read_tokens, token_digest
from dman_runtime.data.evaluation import MISS, metrics
from dman_runtime.model.bundle import open_bundle
from dman_runtime.requests import MAX_K
from dman_runtime.serving.app import App
from dman_runtime.store.base import Write
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_layout import FORMAT_VERSION
from dman_train import evaluate as train_evaluate
from dman_train import export
from sdk import Client, Event, Recommendations

TOLERANCE = 1e-4  # of exact_bundle, whose states are float32


def run(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    run(*arguments, "--json")
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def stored_histories(state: Path) -> Histories:
    """All events of all users in a store; every id of these tests is an integer."""
    with LmdbStore.open(state, readonly=True) as store:
        found = {}
        for user_id in store.scan():
            numbers, times = store.history(user_id)
            found[int(user_id)] = list(zip(map(int, store.item_ids(numbers)), times.tolist(), strict=True))
        return found


# -- import, serve, update, score and recommend agree ----------------------------------------------------------------

Ranking = list[tuple[int, float]]  # (item id, score), best first


def scored(path: Path) -> dict[int, Ranking]:
    rankings: dict[int, Ranking] = {}
    for row in pq.read_table(path).to_pylist():
        ranking = rankings.setdefault(row["user_id"], [])
        ranking.append((row["item_id"], row["score"]))
        assert row["rank"] == len(ranking)
    return rankings


def ranking_of(answer: Recommendations) -> Ranking:
    return [(int(item.item_id), item.score) for item in answer]


def assert_same(found: dict[int, Ranking], expected: dict[int, Ranking]) -> None:
    """The same items in the same places, unless their scores are ties within the tolerance."""
    assert found.keys() == expected.keys()
    for user, ranking in found.items():
        reference = expected[user]
        assert len(ranking) == len(reference)
        margin = TOLERANCE * max(abs(score) for _, score in reference)
        for (item, score), (other, other_score) in zip(ranking, reference, strict=True):
            assert abs(score - other_score) <= margin
            assert item == other or abs(dict(reference).get(item, reference[-1][1]) - score) <= margin


@pytest.mark.slow
def test_import_then_serve_equals_updates_by_a_client_and_offline_scores(
    exact_bundle: Path, log: Path, mixed_histories: Histories, tmp_path: Path
) -> None:
    run("import", "--bundle", exact_bundle, "--state", tmp_path / "imported", "--input", log)
    run("score", "--bundle", exact_bundle, "--input", log, "--output", tmp_path / "s.parquet", "--k", 15)
    users = list(mixed_histories)
    with running_server(exact_bundle, tmp_path / "imported") as (address, _), Client(address, timeout=30) as client:
        imported = dict(zip(users, map(ranking_of, client.recommend_many(users, 15)), strict=True))
        first = client.user(1, recent_events=100)
        assert first.recent_events == tuple(Event(item, time) for item, time in mixed_histories[1])
    with running_server(exact_bundle, tmp_path / "updated") as (address, _), Client(address, timeout=30) as client:
        for n in range(max(map(len, mixed_histories.values()))):  # the events of all users, interleaved
            client.update_many(
                [(user, Event(*events[n])) for user, events in mixed_histories.items() if n < len(events)]
            )
        updated = {user: ranking_of(client.recommend(user, 15)) for user in users}
        assert client.recommend(ONLY_UNKNOWN).is_popular
    assert_same(updated, imported)
    assert_same(scored(tmp_path / "s.parquet"), imported)
    assert stored_histories(tmp_path / "imported") == stored_histories(tmp_path / "updated") == mixed_histories


# -- import ----------------------------------------------------------------------------------------------------------


def test_import_says_what_it_did_and_repeated_doubles_nothing(
    exact_bundle: Path, log: Path, mixed_histories: Histories, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("import", "--bundle", exact_bundle, "--state", tmp_path / "state", "--input", log)
    events, unknown = sum(map(len, mixed_histories.values())), len(mixed_histories) + 1
    first = {"users": 25, "new_users": 25, "events": events, "recognised_events": 0, "unknown_events": unknown}
    found = run_json(capsys, *command)
    assert found.pop("input")["events"] == events
    assert found == first | {"rebuilt_users": 0}
    again = {"users": 25, "new_users": 0, "events": 0, "recognised_events": events, "unknown_events": 0}
    found = run_json(capsys, *command)
    del found["input"]
    assert found == again | {"rebuilt_users": 0}
    assert stored_histories(tmp_path / "state") == mixed_histories
    capsys.readouterr()
    run(*command)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("imported 0 events of 25 users into ") and f"{events} events were there already" in last


def test_import_of_a_second_file_merges_it(
    exact_bundle: Path, log: Path, mixed_histories: Histories, tmp_path: Path
) -> None:
    command = ("import", "--bundle", exact_bundle, "--state", tmp_path / "state", "--input")
    run(*command, log)
    more = {1: [(3, 1), *mixed_histories[1][:2], (4, 90_001)], 200: [(5, 1), (6, 2), (7, 3)]}
    run(*command, write_csv(tmp_path / "more.csv", more))
    expected = {**mixed_histories, 1: [(3, 1), *mixed_histories[1], (4, 90_001)], 200: more[200]}
    assert stored_histories(tmp_path / "state") == expected


def test_import_interrupted_ends_with_130_and_keeps_what_was_stored(
    exact_bundle: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> list[str]:
        raise KeyboardInterrupt

    command = ("import", "--bundle", exact_bundle, "--state", tmp_path / "state", "--input", log)
    with monkeypatch.context() as patch:
        patch.setattr(LmdbStore, "commit", interrupted)
        assert cli.main([str(argument) for argument in command]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert run_json(capsys, *command)["users"] == 25


@pytest.mark.slow
def test_import_refuses_to_overwrite_what_a_server_changes_meanwhile(
    exact_bundle: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LmdbStore, "commit", lambda self, writes: [write.user_id for write in writes])
    message = error_of(capsys, "import", "--bundle", exact_bundle, "--state", tmp_path / "state", "--input", log)
    assert "a server keeps updating users of this file" in message


# -- export-log ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_export_log_of_a_store_that_is_served_imports_as_the_same_histories(
    exact_bundle: Path, log: Path, mixed_histories: Histories, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, output = tmp_path / "state", tmp_path / "log.parquet"
    run("import", "--bundle", exact_bundle, "--state", state, "--input", log)
    with running_server(exact_bundle, state) as (address, _), Client(address, timeout=30) as client:
        client.update("1", [Event("5", timestamp=90_000)])
        events = sum(map(len, mixed_histories.values())) + 1
        found = run_json(capsys, "export-log", "--state", state, "--output", output)
        client.update("1", [Event("6", timestamp=90_001)])
    assert (found["events"], found["users"], found["output"]) == (events, 25, str(output))
    assert (found["user_ids"], found["item_ids"], found["warnings"]) == ("integer", "integer", [])
    run("import", "--bundle", exact_bundle, "--state", tmp_path / "new", "--input", output)
    expected = {**mixed_histories, 1: [*mixed_histories[1], (5, 90_000)]}
    assert stored_histories(tmp_path / "new") == expected


def test_export_log_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LmdbStore.open(tmp_path / "state") as store:
        items, times = store.add_items(["a", "b", "a"]), np.array([5, 0, 7])
        store.commit([Write("anna", 0, {}, items, times)])
    run("export-log", "--state", tmp_path / "state", "--output", tmp_path / "log.parquet")
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"exported 3 events of 1 users, 2 items into {tmp_path / 'log.parquet'}"
    assert second == "warning: 1 events without a time were written with that of the event before"
    assert "does not exist" in error_of(capsys, "export-log", "--state", tmp_path / "nowhere")
    message = error_of(capsys, "export-log", "--state", tmp_path / "state", "--output", tmp_path / "log.csv")
    assert message.endswith("let its name end in .parquet (--output)")


# -- address space ---------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from dman_runtime import cli
resource.setrlimit(resource.RLIMIT_AS, (16_000_000 << 10, 16_000_000 << 10))
sys.exit(cli.main(sys.argv[1:]))
"""


def run_limited(*arguments: object) -> tuple[int, str]:
    """A command as under `ulimit -v 16000000`, and what it writes to stderr."""
    command = [sys.executable, "-c", LIMITED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_commands_work_in_little_address_space_or_name_an_option_that_they_take(
    exact_bundle: Path, log: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    run("import", "--bundle", exact_bundle, "--state", state, "--input", log)  # with the map of a server
    one_user = ("inspect", "--bundle", exact_bundle, "--state", state, "--user", "1")
    export = ("export-log", "--state", state, "--output", tmp_path / "log.parquet")
    for command in (one_user[:-2], one_user, ("verify", "--state", state), export):
        code, message = run_limited(*command)
        assert code == 0, message
    command = ("import", "--bundle", exact_bundle, "--state", state, "--input", log)
    code, message = run_limited(*command)
    assert code == 2
    assert message.endswith("address space; lower the map size or raise `ulimit -v` (--map-size-mib)\n")
    code, message = run_limited(*command, "--map-size-mib", "1024")
    assert code == 0, message


# -- score -----------------------------------------------------------------------------------------------------------


def test_score_says_what_it_wrote_and_leaves_out_what_was_seen(
    exact_bundle: Path, log: Path, histories: Histories, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.parquet"
    result = run_json(capsys, "score", "--bundle", exact_bundle, "--input", log, "--output", output, "--k", 7)
    assert result.pop("input")["users"] == 25
    counts = {"users": 25, "rows": 175, "popular_users": 1, "users_with_nothing": 0, "users_with_fewer_than_k": 0}
    counts |= {"where": "in this process"}  # as it is a small log
    assert result == counts | {"output": str(output), "bundle_id": open_bundle(exact_bundle).bundle_id}
    rankings = scored(output)
    assert rankings.keys() == {*histories, ONLY_UNKNOWN}
    for user, ranking in rankings.items():
        assert len(ranking) == 7
        assert not {item for item, _ in ranking} & {item for item, _ in histories.get(user, [])}


def test_score_with_seen_items_ranks_them_too(exact_bundle: Path, log: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.parquet"
    run("score", "--bundle", exact_bundle, "--input", log, "--output", output, "--k", 1000, "--include-seen")
    assert {len(ranking) for ranking in scored(output).values()} == {TINY_ITEMS}


def test_score_says_how_many_users_have_nothing_left(
    exact_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = [(item, item) for item in range(1, TINY_ITEMS + 1)]
    log = write_csv(tmp_path / "log.csv", {1: everything, 2: everything, 3: everything[:5]})
    run("score", "--bundle", exact_bundle, "--input", log, "--output", tmp_path / "s.parquet", "--k", 3)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"scored 3 users into {tmp_path / 's.parquet'}: 3 rows", "2 of 3 users have nothing left to recommend",
    ]  # fmt: skip
    assert {row["user_id"] for row in pq.read_table(tmp_path / "s.parquet").to_pylist()} == {3}


def test_score_with_text_ids_writes_text_for_a_bundle_that_has_integers(exact_bundle: Path, tmp_path: Path) -> None:
    log, output = tmp_path / "log.csv", tmp_path / "s.parquet"
    log.write_text("user_id,item_id\n12,1\n13,2\n")
    run("score", "--bundle", exact_bundle, "--input", log, "--output", output, "--user-ids", "text")
    assert set(pq.read_table(output)["user_id"].to_pylist()) == {"12", "13"}


def test_score_that_fails_keeps_the_old_file(
    exact_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "s.parquet"
    output.write_text("old")
    (tmp_path / "bad.csv").write_text("user_id,item_id,timestamp\n1,1,1\n2,2,never\n")
    error_of(capsys, "score", "--bundle", exact_bundle, "--input", tmp_path / "bad.csv", "--output", output)
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "s.parquet"]


# -- evaluate --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("split", "held_out"), [("test", 1), ("valid", 2)])
def test_evaluate_equals_what_a_client_of_a_live_server_finds(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, held_out: int
) -> None:
    histories = make_histories(60, seed=9, longest=30)
    log = write_csv(tmp_path / "log.csv", histories)
    found = run_json(capsys, "evaluate", "--bundle", tiny_bundle, "--data", log, "--split", split)
    ranks, kept = [], []
    with running_server(tiny_bundle, tmp_path / "state") as (address, _), Client(address, timeout=30) as client:
        for user, events in histories.items():
            items = [item for item, _ in events]
            client.update(user, items[:-held_out])
            for target, include_seen in ((ranks, False), (kept, True)):
                ranking = client.recommend(user, 200, include_seen=include_seen).item_ids
                goal = items[-held_out]
                target.append(ranking.index(goal) + 1 if goal in ranking else MISS)
    assert (found["split"], found["users"]) == (split, 60)
    expected, expected_kept = metrics(np.array(ranks)), metrics(np.array(kept))
    assert 0 < expected["hr@10"] < expected["hr@50"] < 1  # there is something to get wrong
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=0.001)
    assert found["seen_kept"] == pytest.approx(expected_kept, abs=0.001)


def test_evaluate_says_how_many_targets_are_unknown_and_filters_only_if_asked_to(
    exact_bundle: Path, histories: Histories, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_csv(tmp_path / "log.csv", {user: [*events, (900 + user, 10**6)] for user, events in histories.items()})
    command = ("evaluate", "--bundle", exact_bundle, "--data", log)
    run(*command)
    out = capsys.readouterr().out
    assert "24 of 24 targets are items that the model does not know: they count as misses" in out
    assert "another log than that of the training, not filtered" in out
    found = run_json(capsys, *command)
    assert (found["users"], found["unknown_targets"], found["hr@200"]) == (24, 24, 0.0)
    found = run_json(capsys, *command, "--min-item-events", 2)
    assert (found["unknown_targets"], found["min_item_events"], found["log"]) == (0, 2, "another log")
    assert found["input"]["filters"]["items"] == 24
    assert "(--min-user-events)" in error_of(capsys, *command, "--min-user-events", -1)


@pytest.mark.slow
def test_evaluate_prints_what_the_evaluation_of_the_trainer_prints(
    small_log: Path, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    options = ["--run", str(trained_run), "--out", str(bundle), "--state-dtype", "float32"]
    assert export.main(options) == 0
    for split in ("valid", "test"):
        found = run_json(capsys, "evaluate", "--bundle", bundle, "--data", small_log, "--split", split)
        assert found.pop("bundle_id") == open_bundle(bundle).bundle_id
        for source in ("--bundle", bundle), ("--run", trained_run):
            assert train_evaluate.main([*map(str, source), "--split", split, "--json"]) == 0
            expected = json.loads(capsys.readouterr().out.splitlines()[-1])
            if source[0] == "--bundle":
                assert found == expected
            for column in (lambda result: result, *(itemgetter(name) for name in ("seen_kept", "target_kept"))):
                for name in (name for name in column(expected) if "@" in name):
                    assert column(found)[name] == pytest.approx(column(expected)[name], abs=0.001)


# -- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_shows_bundle_state_and_user(
    exact_bundle: Path, log: Path, mixed_histories: Histories, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    run("import", "--bundle", exact_bundle, "--state", state, "--input", log)
    bundle = open_bundle(exact_bundle)
    shown = run_json(capsys, "inspect", "--bundle", exact_bundle)["bundle"]
    assert (shown["bundle_id"], shown["items"]) == (bundle.bundle_id, TINY_ITEMS)

    both = run_json(capsys, "inspect", "--bundle", exact_bundle, "--state", state)
    assert both["bundle"] == shown
    assert (both["state"]["format_version"], both["state"]["users"]) == (FORMAT_VERSION, 25)
    assert both["state"]["generations"] == [bundle.bundle_id]

    user = run_json(capsys, "inspect", "--bundle", exact_bundle, "--state", state, "--user", "1")
    events = mixed_histories[1]
    assert (user["user_id"], user["event_count"], user["history_count"]) == ("1", len(events) - 1, len(events))
    assert [(int(event["item_id"]), event["timestamp"]) for event in user["recent_events"]] == events[-20:]

    capsys.readouterr()
    run("inspect", "--bundle", exact_bundle)
    assert json.loads(capsys.readouterr().out)["bundle"] == shown  # for people: the same, indented


@pytest.mark.slow
def test_inspect_works_while_a_server_runs_and_shows_what_it_stored(
    exact_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_server(exact_bundle, tmp_path / "state") as (address, _), Client(address, timeout=30) as client:
        for n in range(1, 4):
            client.update("anna", [n, 900 + n])
            options = ("--bundle", exact_bundle, "--state", tmp_path / "state", "--user", "anna")
            shown = run_json(capsys, "inspect", *options)
            assert (shown["event_count"], shown["history_count"]) == (n, 2 * n)


# -- status and token --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_status_of_a_running_server_is_printed_and_ends_with_0_or_1(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle_id = open_bundle(tiny_bundle).bundle_id
    with running(App(serve_config(tiny_bundle, tmp_path / "state"))) as app:
        status = ("status", "--target", f"localhost:{app.port}", "--timeout", "30")
        found = run_json(capsys, *status)
        assert (found["ready"], found["bundle_id"], found["problems"]) == (True, bundle_id, [])
        run(*status)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"ready: bundle {bundle_id}, 1 of 1 workers")

        app.problems.set("disk_full", "free some")
        assert cli.main(list(status)) == 1  # ready, and something is wrong
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith("ready: ") and second.endswith("s: free some")
        app.problems.set("store_gone", "restore it", blocking=True)
        assert cli.main([*status, "--json"]) == 1
        out = capsys.readouterr().out
        assert out.startswith("NOT READY: ")
        found = json.loads(out.splitlines()[-1])
        assert [problem["name"] for problem in found["problems"]] == ["store_gone", "disk_full"]


def test_status_of_a_server_that_is_away_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "status", "--target", "localhost:1", "--timeout", "1")
    assert "localhost:1" in message and message.endswith("(--target)")
    message = error_of(capsys, "status", "--token-file", "nowhere")
    assert message == "error: nowhere holds no token; name a readable file with one (--token-file)"


def test_token_prints_a_token_and_the_line_that_lets_its_caller_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("token", "shop", "--roles", "read")
    first, second = capsys.readouterr().out.splitlines()
    token = first.removeprefix("token, shown this once: ")
    (tmp_path / "tokens").write_text(second.removeprefix("line for the token file: ") + "\n")
    (caller,) = read_tokens(tmp_path / "tokens").by_digest.items()
    assert caller == (token_digest(token), Caller("shop", frozenset({"read"})))
    assert token not in second

    run("token", "shop")
    other, line = capsys.readouterr().out.splitlines()
    assert other != first and "  read,write  sha256:" in line


@pytest.mark.parametrize("arguments", [["a b"], [""], ["shop", "--roles", "root"], ["shop", "--roles", ""]])
def test_token_refuses_a_name_or_a_role_that_the_file_cannot_hold(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "of the caller cannot be used" in error_of(capsys, "token", *arguments)


# -- errors ----------------------------------------------------------------------------------------------------------


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr with which a command refuses, with exit status 2."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("command", ["import", "score"])
def test_log_of_unknown_items_is_refused_until_told_to_go_on(
    exact_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    log = write_csv(tmp_path / "log.csv", {user: [(1, 1), (901, 2), (902, 3)] for user in range(5)})
    arguments = command_on(command, log, exact_bundle, tmp_path)
    message = error_of(capsys, *arguments)
    assert "66.7% of the events are of items that the bundle does not know, such as '901', '902'" in message
    assert "its items are such as '1', '2', '3'" in message and message.endswith("(--max-unknown)")
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
    assert "choose 0 to 1" in error_of(capsys, *arguments, "--max-unknown", 2)
    result = run_json(capsys, *arguments, "--max-unknown", 0.7)
    assert (result["users"], result["input"]["unknown_events"]) == (5, 10)


@pytest.mark.parametrize("command", ["import", "score", "evaluate"])
def test_dry_run_says_what_was_understood_and_stops(
    exact_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    histories = {user: [(1, 1), (901, 2), (902, 3)] for user in range(5)}
    log = write_csv(tmp_path / "log.csv", histories)
    arguments = [*command_on(command, log, exact_bundle, tmp_path), "--dry-run"]
    run(*arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["input", str(log)]
    assert lines[-1].startswith("unknown") and "2 of 3 items are not in the bundle" in lines[-1]
    found = run_json(capsys, *arguments)
    assert (found["path"], found["events"], found["unknown_items"]) == (str(log), 15, 2)
    assert found["unknown_examples"] == ["901", "902"]
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


BAD_LOGS = {
    "wrong columns": ("a,b\n1,2\n", "user_id"),
    "empty file": ("", "empty"),
    "no rows": ("user_id,item_id,timestamp\n", "no rows"),
    "bad time": ("user_id,item_id,timestamp\n1,1,never\n", "never"),
}


def command_on(command: str, log: Path, bundle: Path, tmp_path: Path) -> list[object]:
    log_option = "--data" if command == "evaluate" else "--input"
    options: dict[str, list[object]] = {
        "import": ["--state", tmp_path / "state"],
        "score": ["--output", tmp_path / "s.parquet"],
        "evaluate": [],
    }
    return [command, "--bundle", bundle, log_option, log, *options[command]]


@pytest.mark.parametrize(("content", "cause"), BAD_LOGS.values(), ids=BAD_LOGS)
@pytest.mark.parametrize("command", ["import", "score", "evaluate"])
def test_unusable_log_is_refused_with_the_cause(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: str, cause: str
) -> None:
    (tmp_path / "log.csv").write_text(content)
    message = error_of(capsys, *command_on(command, tmp_path / "log.csv", tiny_bundle, tmp_path))
    assert "log.csv" in message and cause in message
    assert not (tmp_path / "s.parquet").exists()


@pytest.mark.parametrize("command", ["import", "score", "evaluate"])
def test_missing_log_and_bundle_are_refused(
    tiny_bundle: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for wrong in (tmp_path / "nowhere.csv", tmp_path):
        assert str(wrong) in error_of(capsys, *command_on(command, wrong, tiny_bundle, tmp_path))
    assert "is not a bundle" in error_of(capsys, *command_on(command, log, tmp_path / "nowhere", tmp_path))
    column = [*command_on(command, log, tiny_bundle, tmp_path), "--item-column", "film"]
    assert "film" in error_of(capsys, *column)


def test_evaluate_on_a_log_of_other_items_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_csv(tmp_path / "log.csv", {1: [(900 + n, n) for n in range(9)]})
    message = error_of(capsys, "evaluate", "--bundle", tiny_bundle, "--data", log)
    assert "the model knows none of its items, such as '900', '901', '902'" in message


@pytest.mark.parametrize("k", ["0", "-1", str(MAX_K + 1), "many"])
def test_score_with_a_bad_k_is_refused(
    tiny_bundle: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], k: str
) -> None:
    message = error_of(capsys, *command_on("score", log, tiny_bundle, tmp_path), "--k", k)
    assert "--k" in message and k in message
    assert not (tmp_path / "s.parquet").exists()


def test_score_into_a_directory_that_cannot_be_written_is_refused(
    tiny_bundle: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "nowhere" / "s.parquet"
    message = error_of(capsys, "score", "--bundle", tiny_bundle, "--input", log, "--output", output)
    assert str(output) in message and "--output" in message


def test_score_into_a_directory_is_refused(
    tiny_bundle: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(capsys, "score", "--bundle", tiny_bundle, "--input", log, "--output", tmp_path)
    assert str(tmp_path) in message and "is a directory" in message
    assert list(tmp_path.parent.glob(".*.partial")) == []


def test_score_of_ids_beyond_64_bits_writes_text(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.csv").write_text(f"user_id,item_id\n{2**64},1\n5,2\n")
    run_json(capsys, *command_on("score", tmp_path / "log.csv", tiny_bundle, tmp_path))
    users = pq.read_table(tmp_path / "s.parquet")["user_id"]
    assert users.type == pa.string()
    assert set(users.to_pylist()) == {str(2**64), "5"}


@pytest.mark.slow
def test_inspect_refuses_what_is_not_there(
    tiny_bundle: Path, exact_bundle: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    assert "is not a bundle" in error_of(capsys, "inspect", "--bundle", tmp_path / "nowhere")
    assert "does not exist" in error_of(capsys, "inspect", "--bundle", tiny_bundle, "--state", state)
    assert not state.exists()
    message = error_of(capsys, "inspect", "--bundle", tiny_bundle, "--user", "1")
    assert message == "error: a user needs the store that holds the state; name its directory (--state)"
    run("import", "--bundle", exact_bundle, "--state", state, "--input", log)
    one = ("inspect", "--state", state, "--user")
    assert "no user 'nobody'" in error_of(capsys, *one, "nobody", "--bundle", exact_bundle)
    assert "was never served with bundle" in error_of(capsys, *one, "1", "--bundle", tiny_bundle)
    assert "is empty" in error_of(capsys, *one, "", "--bundle", exact_bundle)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["serve", "--nonsense"], ["serve", "--port", "high"]])
def test_wrong_usage_is_refused_with_a_pointer_to_help(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--help" in error_of(capsys, *arguments)


# -- options ---------------------------------------------------------------------------------------------------------

# What a command needs besides its options.
# What a command needs besides options that have a default.
NEEDED = {
    "token": ["shop"],
    "drop": ["bundle"],
    "export-user": ["anna"],
    "items": ["list"],
    "expire": ["--idle-days", "9"],
    "add-items": ["--file", "items.csv"],
    "ingest": ["--from", "events.jsonl"],
}
COMMANDS = list(cli.COMMANDS)


def options_of(command: str) -> list[argparse.Action]:
    choices = next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    return [action for action in choices[command]._actions if action.option_strings]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_of_every_command_names_every_option(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main([*([command] if command else []), "--help"])
    text = capsys.readouterr().out
    assert exited.value.code == 0
    for expected in COMMANDS if command is None else [option.option_strings[0] for option in options_of(command)]:
        assert expected in text
    if command:
        assert all(option.help for option in options_of(command))


def test_dman_variables_set_defaults_and_options_win(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"DMAN_BUNDLE": "/a", "DMAN_STATE": "/b", "DMAN_PORT": "7", "DMAN_PROVIDER": "cpu", "DMAN_GRACE": "2.5"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = cli.parser().parse_args(["serve", "--state", "/c"])
    assert (found.bundle, found.state, found.port) == (Path("/a"), Path("/c"), 7)
    assert (found.provider, found.grace) == ("cpu", 2.5)


@pytest.mark.parametrize(("name", "value"), [("DMAN_PORT", "high"), ("DMAN_PROVIDER", "gpu")])
def test_bad_dman_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert value in error_of(capsys, "serve")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_with_a_value_has_its_dman_variable(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in options_of(command):
        if option.nargs == 0 or option.dest == "help" or option.required:
            continue
        if option.dest == "target" and command != "status":
            continue  # it would send to a server what is meant for a store
        variable = f"DMAN_{option.dest.upper()}"
        value = option.choices[-1] if isinstance(option.choices, list | tuple) else "3"
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            found = getattr(cli.parser().parse_args([command, *NEEDED.get(command, [])]), option.dest)
        assert str(found) in (value, f"{value}.0"), variable


@pytest.mark.slow
def test_module_and_command_run_the_same_program() -> None:
    for command in ([sys.executable, "-m", "dman_runtime"], [str(Path(sys.executable).parent / "dman-runtime")]):
        done = subprocess.run([*command, "inspect", "--bundle", "/nowhere"], capture_output=True, text=True, cwd=ROOT,
                              timeout=60, check=False)  # fmt: skip
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: /nowhere is not a bundle") and done.stderr.count("\n") == 1
