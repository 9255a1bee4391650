"""The index file: what is written is found again, and what is no such index is refused."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from dman_runtime.retrieval.index import ItemIndex, max_index_bytes

TABLE = np.random.default_rng(0).standard_normal((3000, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "index"
    index = ItemIndex.build(TABLE, threads=1)
    index.probes = 7
    index.write(path)
    return path


def test_opened_index_finds_what_the_built_one_finds(file: Path) -> None:
    built, opened = ItemIndex.build(TABLE, threads=1), ItemIndex.open(file, items=3000, width=12)
    assert (opened.items, opened.lists, opened.probes) == (3000, built.lists, 7)
    built.probes = 7
    counts = [50] * 19 + [3]
    for one, other in zip(opened.find(TABLE[:20], counts), built.find(TABLE[:20], counts), strict=True):
        assert one.tolist() == other.tolist()


def test_same_table_gives_the_same_file(file: Path, tmp_path: Path) -> None:
    index = ItemIndex.build(TABLE, threads=1)
    index.probes = 7
    index.write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_search_that_reads_all_lists_finds_each_item_once(file: Path) -> None:
    index = ItemIndex.open(file, items=3000, width=12)
    index.probes = index.lists
    (found,) = index.find(TABLE[:1], [5000])
    assert sorted(found.tolist()) == list(range(3000))
    index.probes = 1
    assert 0 < len(index.find(TABLE[:1], [5000])[0]) < 3000


def test_file_is_no_larger_than_what_is_allowed(file: Path) -> None:
    assert file.stat().st_size <= max_index_bytes(3000, 12)


def test_what_is_no_index_of_these_items_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3000 x 12 values, expected 2999 x 12"):
        ItemIndex.open(file, items=2999, width=12)
    (tmp_path / "text").write_bytes(b"no index" * 100)
    with pytest.raises(ValueError, match="no index that FAISS reads"):
        ItemIndex.open(tmp_path / "text", items=3000, width=12)
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="no index that FAISS reads"):
        ItemIndex.open(tmp_path / "cut", items=3000, width=12)
    flat = faiss.IndexFlatIP(12)
    flat.add(TABLE)
    faiss.write_index(flat, str(tmp_path / "flat"))
    with pytest.raises(ValueError, match="another kind"):
        ItemIndex.open(tmp_path / "flat", items=3000, width=12)
