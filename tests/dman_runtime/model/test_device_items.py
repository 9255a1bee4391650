"""Search on the device of the graphs: here the CPU, by the same way. `tools.gpu_check` looks at a GPU."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ids, new_store

from dman_runtime.data.added_items import AddedItem
from dman_runtime.engine import Engine
from dman_runtime.errors import EncoderError
from dman_runtime.jobs.adding import add_items
from dman_runtime.model import device_items, encoder
from dman_runtime.model.bundle import SEARCH
from dman_runtime.model.device_items import DeviceItems
from dman_runtime.model.generation import Generation
from dman_runtime.model.sessions import CPU
from dman_runtime.requests import Query, Update
from dman_runtime.retrieval.candidates import CandidateRetriever
from dman_runtime.retrieval.exact import ExactRetriever
from dman_train.graphs import search_graph
from tools.faults.bundles import enlarge, refit

RANDOM = np.random.default_rng(0)
TABLE, USERS = RANDOM.standard_normal((500, 8), np.float32), RANDOM.standard_normal((11, 8), np.float32)


def on_device(table: np.ndarray, graph: bytes = search_graph(8)) -> DeviceItems:
    return DeviceItems(graph, table, Path(SEARCH), provider=CPU)


@pytest.fixture
def bundle(exact_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of 3000 items and with the graph, on a machine whose card is its CPU."""
    path = Path(shutil.copytree(exact_bundle, tmp_path / "bundle"))
    enlarge(path, 3000)
    width = np.load(path / "item_embeddings.npy").shape[1]
    (path / SEARCH).write_bytes(search_graph(width))
    refit(path, SEARCH)
    monkeypatch.setattr(encoder, "CUDA", CPU)
    monkeypatch.setattr(encoder, "MIN_ITEMS", 3000)
    return path


@pytest.mark.parametrize("scores_per_run", [500 * 4, 1])
def test_it_finds_the_best_of_each_user_in_runs_of_any_size(
    scores_per_run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_items, "SCORES_PER_RUN", scores_per_run)
    found = on_device(TABLE).find(USERS, [3] * 10 + [7])
    expected = np.argsort(-(USERS @ TABLE.T), axis=1)[:, :7]
    assert [items.tolist() for items in found] == expected.tolist()


def test_more_than_all_are_all() -> None:
    (found,) = on_device(TABLE).find(USERS[:1], [9999])
    assert sorted(found.tolist()) == list(range(500))


def test_graph_of_another_width_is_refused() -> None:
    with pytest.raises(EncoderError, match=r"item_search.onnx cannot be loaded \(users is not .* \[B, 8\]\)"):
        on_device(TABLE, search_graph(9))


def test_server_searches_on_the_device_and_finds_items_that_were_added(bundle: Path) -> None:
    generation = Generation.open(bundle, provider="cpu")
    exact = Generation.of(generation.bundle, generation.graphs)
    assert isinstance(generation.retriever, CandidateRetriever) and isinstance(exact.retriever, ExactRetriever)
    assert not generation.retriever.quick(None)  # only the thread of the graphs may search
    with new_store("lmdb") as store, new_store("lmdb") as other:
        answers = []
        for one, where in ((generation, store), (exact, other)):
            engine = Engine(one, where)
            engine.update([Update("u", ids([3, 70, 8]))])
            answers.append(engine.recommend([Query("u", k=20), Query("nobody", k=5)])[0].item_indices.tolist())
        assert answers[0] == answers[1]
        engine = Engine(generation, store)
        first = generation.bundle.items.item_ids[answers[0][0]]
        add_items(store, generation.bundle, {"999": AddedItem(like=(first,))})
        (answer,) = engine.recommend([Query("u", k=2)])
        assert [answer.bundle.items.item_ids[item] for item in answer.item_indices] == [first, "999"]
        assert isinstance(engine.current.generation.retriever, CandidateRetriever)


def test_without_room_on_the_device_search_stays_on_the_cpu_and_says_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("dman_runtime.model.sessions.ort.OrtValue.ortvalue_from_numpy", full)
    with caplog.at_level(logging.WARNING):
        generation = Generation.open(bundle, provider="cpu")
    assert isinstance(generation.retriever, ExactRetriever)
    assert "items are searched on the CPU: 0 MiB do not fit on the device (out of memory)" in caplog.text
