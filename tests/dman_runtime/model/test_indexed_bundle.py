"""Bundles of large catalogues: searched through an index, with tables that are mapped."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import change_file_entry, ids, new_store

from dman_runtime.data.added_items import AddedItem
from dman_runtime.engine import Engine
from dman_runtime.errors import BundleError
from dman_runtime.jobs.adding import add_items
from dman_runtime.model import bundle as bundle_format
from dman_runtime.model.bundle import EMBEDDINGS, INDEX, open_bundle
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Query, Update
from dman_runtime.retrieval.candidates import CandidateRetriever
from dman_runtime.retrieval.exact import ExactRetriever
from dman_runtime.retrieval.index import ItemIndex
from tools.faults.bundles import enlarge, refit

LARGE = 3000  # items


@pytest.fixture(scope="module")
def indexed(exact_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(exact_bundle, tmp_path_factory.mktemp("indexed") / "bundle"))
    enlarge(path, LARGE)
    index = ItemIndex.build(np.load(path / EMBEDDINGS), threads=1)
    index.probes = index.lists // 2
    index.write(path / INDEX)
    refit(path, INDEX)
    return path


@pytest.fixture
def copy(indexed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(indexed, tmp_path / "bundle"))


def recommended(engine: Engine, k: int) -> list[str]:
    (answer,) = engine.recommend([Query("u", k=k)])
    plain = engine.plain_answer(Query("u", k=k))
    assert plain is not None and plain.item_indices.tolist() == answer.item_indices.tolist()
    return [answer.bundle.items.item_ids[item] for item in answer.item_indices]


def test_recommendations_come_through_the_index(indexed: Path) -> None:
    generation = Generation.open(indexed, provider="cpu")
    assert isinstance(generation.retriever, CandidateRetriever)
    exact = replace(generation, retriever=ExactRetriever(generation.bundle.item_embeddings))
    with new_store("lmdb") as store, new_store("lmdb") as other:
        answers = []
        for engine in (Engine(generation, store), Engine(exact, other)):
            engine.update([Update("u", ids([3, 70, 8]))])
            answers.append(recommended(engine, 20))
    assert len(set(answers[0]) & set(answers[1])) >= 18 and not set(answers[0]) & set(ids([3, 70, 8]))


def test_item_that_is_added_is_found_at_once(indexed: Path) -> None:
    generation = Generation.open(indexed, provider="cpu")
    with new_store("lmdb") as store:
        engine = Engine(generation, store)
        engine.update([Update("u", ids([3, 70, 8]))])
        (first,) = recommended(engine, 1)
        add_items(store, generation.bundle, {"999": AddedItem(like=(first,))})
        assert recommended(engine, 2) == [first, "999"]
        assert isinstance(engine.current.generation.retriever, CandidateRetriever)


def test_index_that_is_damaged_or_of_other_items_is_refused(copy: Path) -> None:
    content = bytearray((copy / INDEX).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / INDEX).write_bytes(content)
    with pytest.raises(BundleError, match=f"{INDEX} does not match its checksum"):
        open_bundle(copy)
    ItemIndex.build(np.load(copy / EMBEDDINGS)[1:], threads=1).write(copy / INDEX)
    refit(copy, INDEX)
    with pytest.raises(BundleError, match=f"{INDEX} is an index of {LARGE - 1} x .* export the bundle again"):
        open_bundle(copy)
    (copy / INDEX).write_bytes(b"nothing" * 1000)
    refit(copy, INDEX)
    with pytest.raises(BundleError, match=f"{INDEX} is no index"):
        open_bundle(copy)


def test_without_the_library_search_is_exact_and_says_so(
    indexed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bundle_format, "faiss", lambda: None)
    generation = Generation.open(indexed, provider="cpu")
    assert isinstance(generation.retriever, ExactRetriever)
    assert "FAISS is not installed" in caplog.text and "install dman[ann]" in caplog.text


def test_table_that_is_mapped_is_the_same_and_tells_of_changes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = open_bundle(copy)
    monkeypatch.setattr(bundle_format, "MAPPED_BYTES", 0)
    mapped = open_bundle(copy)
    assert (mapped.item_embeddings == read.item_embeddings).all()
    assert mapped.item_embeddings.ctypes.data % 64 == 0 and not mapped.item_embeddings.flags.writeable
    assert mapped.changed() == ""
    os.utime(copy / EMBEDDINGS)
    assert EMBEDDINGS in mapped.changed()
    (copy / EMBEDDINGS).write_bytes((copy / EMBEDDINGS).read_bytes()[:-4])
    with pytest.raises(BundleError, match="bytes instead of"):
        open_bundle(copy)
    change_file_entry(copy, EMBEDDINGS)
    with pytest.raises(BundleError, match="its length does not fit its header"):
        open_bundle(copy)
