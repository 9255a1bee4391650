"""A generation: opened, checked, and refused where its golden replay does not repeat."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import change_file_entry, change_golden, events_of

from dman_runtime.errors import BundleError, EncoderError
from dman_runtime.model.bundle import read_manifest
from dman_runtime.model.generation import GOLDEN_TOLERANCE, Generation
from dman_runtime.retrieval.exact import ExactRetriever


def test_generation_repeats_its_golden_replay_whatever_its_states_are_stored_in(
    tiny: Generation, exact: Generation
) -> None:
    for generation in (tiny, exact):
        assert generation.check_golden() < GOLDEN_TOLERANCE / 10
    assert tiny.bundle.manifest.state.dtype == "float16"  # the check ran in float32 and changed nothing


@pytest.mark.parametrize("name", ["user_embeddings", "memories"])
def test_generation_with_another_golden_replay_is_refused(exact_bundle: Path, tmp_path: Path, name: str) -> None:
    bundle = Path(shutil.copytree(exact_bundle, tmp_path / "bundle"))
    change_golden(bundle, name, 1.01)
    with pytest.raises(BundleError, match=r"golden replay is off by .*e-0") as caught:
        Generation.open(bundle, provider="cpu")
    assert (caught.value.parameter, "export" in caught.value.remedy) == ("provider", True)


def test_generation_with_a_golden_replay_that_is_not_a_number_is_refused(exact_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exact_bundle, tmp_path / "bundle"))
    change_golden(bundle, "user_embeddings", np.nan)
    with pytest.raises(BundleError, match="golden replay"):
        Generation.open(bundle, provider="cpu")


def test_generation_searches_exactly_by_default(exact: Generation) -> None:
    assert isinstance(exact.retriever, ExactRetriever)
    user = exact.replay([events_of(range(8))])[0].user_embedding
    (hits,) = exact.retriever.search(user[None], 5, exclude=[np.zeros(0, np.int64)])
    scores = exact.bundle.item_embeddings @ user
    assert hits.items.tolist() == np.argsort(-scores, kind="stable")[:5].tolist()


def test_generation_keeps_the_bundle_id_that_names_it(exact: Generation, exact_bundle: Path) -> None:
    assert exact.bundle_id == exact.bundle.bundle_id == read_manifest(exact_bundle).bundle_id


def test_generation_whose_graph_cannot_be_loaded_is_refused(exact_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exact_bundle, tmp_path / "bundle"))
    graph = bundle / "segment_encoder.onnx"
    graph.write_bytes(b"not a graph")
    change_file_entry(bundle, graph.name)
    with pytest.raises(EncoderError, match="cannot be loaded"):
        Generation.open(bundle, provider="cpu")
