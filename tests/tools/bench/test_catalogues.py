"""Bundles that differ in their items only, and which of them are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, whole_benchmark

from dman_runtime.model.generation import Generation
from tools.bench import catalogues, sweeps
from tools.bench.catalogues import Catalogues
from tools.bench.sweeps import Catalogue


@whole_benchmark
@pytest.mark.slow
def test_catalogues_share_their_graphs_and_pass_every_check_of_a_bundle(tmp_path: Path) -> None:
    bundles = Catalogues(TINY)
    opened = []
    for items in (40, 70):
        assert bundles.make(tmp_path / str(items), items) is None
        opened.append(Generation.open(tmp_path / str(items), provider="cpu"))
    assert [one.bundle.manifest.vocabulary for one in opened] == [40, 70]
    for graph in ("segment_encoder.onnx", "memory_abstraction.onnx"):
        assert (tmp_path / "40" / graph).read_bytes() == (tmp_path / "70" / graph).read_bytes()
    assert opened[0].bundle_id != opened[1].bundle_id


def test_items_lie_in_clusters_and_are_the_same_each_time() -> None:
    table = catalogues._clustered(2000, 16)
    np.testing.assert_array_equal(table, catalogues._clustered(2000, 16))
    assert table.shape == (2000, 16) and table.dtype == np.float32
    distances = np.linalg.norm(table[:, None] - table[None, :200], axis=-1)
    nearest = np.sort(distances, axis=0)[1:50]
    assert nearest.mean() < 0.6 * distances.mean()


def test_index_finds_what_users_near_items_should_get() -> None:
    pytest.importorskip("faiss")
    found = catalogues._index_of(catalogues._clustered(20_000, 16))
    assert found is not None and found.quality["recall"] >= found.quality["floor"]


def test_large_catalogues_are_searched_through_an_index_and_only_the_largest_not_exactly_too() -> None:
    assert sweeps._catalogues((1000, 200_000, 1_000_000, 4_000_000)) == [
        Catalogue(1000, False),
        Catalogue(200_000, False),
        Catalogue(200_000, True),
        Catalogue(1_000_000, False),
        Catalogue(1_000_000, True),
        Catalogue(4_000_000, True),
    ]
