"""`dman-runtime add-items`: what it reads, what it says, and that running servers serve the items within a second."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_ITEMS, running_server

from dman_runtime import cli
from dman_runtime.model.bundle import open_bundle
from dman_runtime.store.lmdb import LmdbStore
from sdk import Client


@pytest.fixture
def state(tmp_path: Path) -> Path:
    with LmdbStore.open(tmp_path / "state"):
        return tmp_path / "state"


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], bundle: Path, state: Path, *options: object) -> tuple[int, str, str]:
    arguments = ["add-items", "--bundle", bundle, "--state", state, *options]
    status = cli.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_table_with_titles_attributes_and_likes_is_added(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, state: Path, tmp_path: Path
) -> None:
    table = write(tmp_path / "new.csv", "item_id,title,genre,like", '900,"One, two",odd,3|4', "901,Three,,5")
    status, out, _ = run(capsys, tiny_bundle, state, "--file", table, "--json")
    assert status == 0 and out.startswith("added 2 items; 0 were there already; the store has 2 additions now\n")
    assert json.loads(out.splitlines()[-1]) == {"added": 2, "unchanged": 0, "known": [], "unusable": {}, "total": 2}
    status, out, _ = run(capsys, tiny_bundle, state, "--file", table)  # it may be repeated
    assert (status, out) == (0, "added 0 items; 2 were there already; the store has 2 additions now\n")
    with LmdbStore.open(state, readonly=True) as store:
        first, second = store.catalogue().added
        assert store.item_ids([first.number, second.number]) == ["900", "901"]
    assert (first.item.title, first.item.attributes, first.item.like) == ("One, two", {"genre": "odd"}, ("3", "4"))
    assert (second.item.title, second.item.attributes, second.item.like) == ("Three", {}, ("5",))


def test_json_lines_and_other_columns_are_read(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, state: Path, tmp_path: Path
) -> None:
    table = write(tmp_path / "new.jsonl", '{"sku": "900", "similar": "3|4"}')
    options = ("--file", table, "--item-column", "sku", "--like-column", "similar")
    assert run(capsys, tiny_bundle, state, *options)[0] == 0
    with LmdbStore.open(state, readonly=True) as store:
        assert store.catalogue().added[0].item.like == ("3", "4")


def test_embeddings_belong_to_the_bundle_and_to_the_rows(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, state: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(tiny_bundle)
    vectors = np.arange(2 * bundle.manifest.state.width, dtype=np.float32).reshape(2, -1)
    np.save(tmp_path / "new.npy", vectors)
    table = write(tmp_path / "new.csv", "item_id,title", "900,One", "901,Two")
    assert run(capsys, tiny_bundle, state, "--file", table, "--embeddings", tmp_path / "new.npy")[0] == 0
    with LmdbStore.open(state, readonly=True) as store:
        found = [one.item for one in store.catalogue().added]
    assert all(item.bundle_id == bundle.bundle_id for item in found)
    np.testing.assert_array_equal([item.embedding for item in found], vectors)
    for wrong in (vectors[:1], vectors[:, 1:], vectors.astype(np.float64)):
        np.save(tmp_path / "new.npy", wrong)
        status, _, err = run(capsys, tiny_bundle, state, "--file", table, "--embeddings", tmp_path / "new.npy")
        assert status == 2 and "one row of float32 per item" in err
    np.save(tmp_path / "new.npy", np.full_like(vectors, np.inf))
    status, _, err = run(capsys, tiny_bundle, state, "--file", table, "--embeddings", tmp_path / "new.npy")
    assert status == 2 and "not finite" in err
    status, _, err = run(capsys, tiny_bundle, state, "--file", table, "--embeddings", tmp_path / "none.npy")
    assert status == 2 and "is missing" in err


def test_items_that_cannot_be_served_are_named(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, state: Path, tmp_path: Path
) -> None:
    table = write(tmp_path / "new.csv", "item_id,title,like", "900,One,", "901,Two,950", "7,Known,", "902,,3")
    status, out, _ = run(capsys, tiny_bundle, state, "--file", table)
    assert status == 1
    bundle_id = open_bundle(tiny_bundle).bundle_id
    assert out.splitlines() == [
        "added 3 items; 0 were there already; the store has 3 additions now",
        f"1 items not added: bundle {bundle_id} was trained with them",
        f"warning: bundle {bundle_id} cannot serve 2 of them:",
        "  '900': the bundle predicts no embeddings",
        "  '901': training knew none of the items that it is like and the bundle predicts no embeddings",
    ]


def test_wrong_files_are_refused_and_add_nothing(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, state: Path, tmp_path: Path
) -> None:
    many = "|".join(str(n) for n in range(101))
    for lines, problem in (
        (["item_id,like", f"900,{many}"], "more than 100"),
        (["item_id,like", "new,3"], "no integer"),
        (["title,like", "900,3"], "no column 'item_id'"),
        (["item_id,like", "900,3", "900,4"], "a second time"),
    ):
        status, _, err = run(capsys, tiny_bundle, state, "--file", write(tmp_path / "new.csv", *lines))
        assert status == 2 and problem in err
    with LmdbStore.open(state, readonly=True) as store:
        assert not store.catalogue().added


@pytest.mark.slow
def test_two_running_workers_serve_added_items_at_once(
    capsys: pytest.CaptureFixture[str], exact_bundle: Path, tmp_path: Path
) -> None:
    state, bundle = tmp_path / "state", open_bundle(exact_bundle)
    with running_server(exact_bundle, state, "--workers", "2") as (address, _), ExitStack() as stack:
        clients = [stack.enter_context(Client(address, timeout=30)) for _ in range(12)]  # some at each worker
        clients[0].update("u", [1, 2, 900, 3])
        assert clients[1].user("u").event_count == 3
        table = write(tmp_path / "new.csv", "item_id,title,like", "900,First,5", "901,Second,7")
        assert run(capsys, exact_bundle, state, "--file", table)[0] == 0
        for client in clients:
            found = {item.item_id: item.title for item in client.recommend("u", k=100, include_seen=True)}
            assert (found[900], found[901]) == ("First", "Second") and len(found) == TINY_ITEMS + 2
        for client in clients:
            assert client.user("u").event_count == 4
            assert {item.item_id for item in client.recommend("u", k=100)} == {*range(4, TINY_ITEMS + 1), 901}
        assert clients[2].update("u", [901]).applied == 1
        assert clients[3].recommend("u").bundle_id == bundle.bundle_id
