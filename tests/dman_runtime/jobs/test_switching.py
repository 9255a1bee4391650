"""`dman-runtime items`: by id or by file, idempotent, with unknown ids reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import running_server

from dman_runtime import cli
from dman_runtime.store.lmdb import LmdbStore
from sdk import Client

ITEMS = ["a", "b b", "c", "ü", "-5", "7"]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    with LmdbStore.open(tmp_path / "state") as store:
        store.add_items(ITEMS)
    return tmp_path / "state"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in ("items", *arguments)])
    return status, *capsys.readouterr()


def off(capsys: pytest.CaptureFixture[str], state: Path) -> list[str]:
    status, out, _ = run(capsys, "list", "--state", state)
    assert status == 0
    return out.splitlines()


def test_items_are_switched_by_id_and_listed(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    assert off(capsys, state) == []
    status, out, _ = run(capsys, "off", "c", "b b", "--state", state)
    assert (status, out) == (0, "items switched off: 2; off already: 0; off now: 2\n")
    assert off(capsys, state) == ["b b", "c"]
    status, out, _ = run(capsys, "--state", state, "off", "--", "c", "-5")
    assert (status, out) == (0, "items switched off: 1; off already: 1; off now: 3\n")
    status, out, _ = run(capsys, "on", "c", "a", "c", "--state", state)
    assert (status, out) == (0, "items switched on: 1; on already: 1; off now: 2\n")
    assert off(capsys, state) == ["b b", "-5"]


def test_unknown_ids_are_named_and_the_others_switched(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    status, out, _ = run(capsys, "off", "a", "x", "y", "--state", state, "--json")
    assert status == 1 and "warning: no item in this store has these ids (2): 'x', 'y'\n" in out
    expected: dict[str, Any] = {"changed": 1, "unchanged": 0, "unknown": ["x", "y"], "off": 1}
    assert json.loads(out.splitlines()[-1]) == expected
    status, out, _ = run(capsys, "on", *(f"x{number}" for number in range(20)), "--state", state)
    assert status == 1 and "'x9', ...\n" in out and "x10" not in out


def test_list_as_json(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    run(capsys, "off", "ü", "--state", state)
    assert json.loads(run(capsys, "list", "--state", state, "--json")[1].splitlines()[-1]) == {"off": ["ü"]}


def files(directory: Path) -> dict[str, Path]:
    """The items "ü" and "7" in every form."""
    texts = {
        "ids.txt": "ü\r\n\n  7\n",
        "with mark.txt": "\ufeff7\nü",
        "items.csv": "item_id,title\nü,U\n7,Seven\n",
        "only.csv": "item_id\nü\n7\n",
        "other.csv": "stock,sku\n0,ü\n1,7\n",
        "movies.dat": "ü::U (1999)::Drama\n7::Seven::Comedy|Drama\n",
        "items.jsonl": '{"item_id": "ü"}\n{"item_id": "7"}\n',
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8", newline="")
    pq.write_table(pa.table({"item_id": ["ü", "7"]}), directory / "items.parquet")
    return {name: directory / name for name in (*texts, "items.parquet")}


def test_items_are_read_from_files_of_every_form(
    capsys: pytest.CaptureFixture[str], state: Path, tmp_path: Path
) -> None:
    for name, path in files(tmp_path).items():
        status, out, _ = run(capsys, "off", "--file", path, "--state", state)
        assert status == 0 and out.startswith("items switched off: 2"), name
        assert off(capsys, state) == ["ü", "7"], name
        status, out, _ = run(capsys, "on", "a", "--file", path, "--state", state)
        assert status == 0 and out.startswith("items switched on: 2; on already: 1"), name
    (tmp_path / "named.csv").write_text("a,b\nü,7\n")
    run(capsys, "off", "--file", tmp_path / "named.csv", "--item-column", "b", "--state", state)
    assert off(capsys, state) == ["7"]


def test_list_can_be_given_back(capsys: pytest.CaptureFixture[str], state: Path, tmp_path: Path) -> None:
    run(capsys, "--state", state, "off", "--", *ITEMS)
    (tmp_path / "off.txt").write_text(run(capsys, "list", "--state", state)[1], encoding="utf-8")
    assert run(capsys, "on", "--file", tmp_path / "off.txt", "--state", state)[0] == 0
    assert off(capsys, state) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["off"], "no items to switch off; give their ids, or a file that lists them"),
        (["list", "a"], "`items list` takes no ids"),
        (["off", "a\nb"], "control characters"),
        (["off", "--file", "missing.txt"], "missing.txt: no such file"),
        (["off", "--file", "bad.txt"], "bad.txt: line 2: the id "),
        (["off", "--file", "latin.txt"], "latin.txt: is not UTF-8; write it as UTF-8, one id a line"),
        (["off", "--file", "table.csv"], "no column 'item_id'"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(
    capsys: pytest.CaptureFixture[str], state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("bad.txt").write_text("a\n" + "x" * 401)
    Path("latin.txt").write_bytes(b"\xfc\n")
    Path("table.csv").write_text("x,y\na,b\n")
    status, out, err = run(capsys, *arguments, "--state", state)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1
    assert off(capsys, state) == []


def test_missing_store_is_not_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["off", "a"], ["list"]):
        status, _, err = run(capsys, *arguments, "--state", tmp_path / "none")
        assert status == 2 and "none" in err and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_all_workers_of_a_running_server_keep_to_a_switch_from_the_next_request_on(
    capsys: pytest.CaptureFixture[str], exact_bundle: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with running_server(exact_bundle, state, "--workers", "2", "--provider", "cpu") as (address, _):
        # A connection belongs to one worker: enough of them reach both.
        clients = [Client(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(12)]
        try:
            clients[0].update("anna", [1, 2, 3])
            for _ in range(3):
                best = clients[0].recommend("anna", k=1).item_ids[0]
                assert run(capsys, "off", best, "--state", state)[0] == 0
                for client in clients:
                    found = [client.recommend(user, k=60) for user in ("anna", "nobody")]
                    found += client.recommend_many(["anna", "nobody"], k=60)
                    assert all(found) and not any(best in answer.item_ids for answer in found)
                assert run(capsys, "on", best, "--state", state)[0] == 0
                assert all(client.recommend("anna", k=1).item_ids == (best,) for client in clients)
        finally:
            for client in clients:
                client.close()
