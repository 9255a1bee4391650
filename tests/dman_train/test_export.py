"""Bundles: what export writes equals PyTorch, and what is damaged, foreign or wrong is refused with a remedy."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from conftest import PAPER, TIMED, TINY, TINY_ITEMS, events_of, export_tiny, random_model, vocabulary_of

from dman_runtime.errors import BundleError
from dman_runtime.model.bundle import (
    ABSTRACTION,
    ENCODER,
    FILES,
    FORMAT_VERSION,
    GAPS,
    MANIFEST,
    REQUEST,
    RETURNS,
    files_of,
    open_bundle,
    read_manifest,
)
from dman_runtime.model.bundle_writer import sha256
from dman_runtime.model.encoder import Encoder
from dman_runtime.model.generation import Generation
from dman_runtime.model.times import BUCKETS, NO_EVENT
from dman_train import export, graphs
from dman_train.config import to_dict
from dman_train.export import export_bundle
from dman_train.graphs import AbstractionGraph, EncoderGraph, RequestGraph, state_shape
from dman_train.model import DMAN
from dman_train.replay import replay as torch_replay

ONNX_ERROR = {"rtol": 1e-4, "atol": 1e-5}
# Each has a different graph: other branches, other blocks, other routing. Exports take seconds; fewer layers, fewer.
GRAPHS = {
    "dman": TINY,
    "gated": replace(TINY, long_term="gated", layers=1),
    "paper-fifo": replace(PAPER, variant="fifo", layers=1),
    "xl": replace(TINY, variant="xl", layers=1),
    "requests": TIMED,
    "event-times": replace(TINY, time="events", variant="xl", layers=1),
    "nran-full": replace(TINY, variant="nran", routing="full", routing_softmax="primaries", layers=1),
}


@pytest.fixture(
    scope="module", params=["dman", *(pytest.param(n, marks=pytest.mark.slow) for n in GRAPHS if n != "dman")]
)
def exported(
    request: pytest.FixtureRequest, tiny_model: DMAN, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DMAN, Path]:
    """A model and its bundle."""
    if request.param == "dman":
        return tiny_model, tiny_bundle
    model = random_model(GRAPHS[request.param], TINY_ITEMS)
    return model, export_tiny(model, tmp_path_factory.mktemp("exports") / request.param)


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    path = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, path)
    return path


# --- Equality with PyTorch.


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "new", "context"),
    [(1, 1, 0), (1, 1, 1), (1, 5, 0), (1, 1, 9), (7, 3, 6), (2, 5, 5), (64, 1, 4), (1, 40, 25)],
)
def test_export_graphs_equal_pytorch_for_any_shape(
    exported: tuple[DMAN, Path], batch: int, new: int, context: int
) -> None:
    model, path = exported
    encoder, config = Encoder.of(open_bundle(path), provider="cpu"), model.config
    torch.manual_seed(batch + new)
    inputs = (
        torch.randn(batch, new, config.width),
        torch.randint(1, new + 1, (batch,)),
        torch.randn(batch, config.layers, context, config.width),
        torch.randint(0, context + 1, (batch,)),
        torch.randn(batch, config.layers, config.slots, config.width),
    )
    if config.sees_times:
        inputs += (torch.randint(0, BUCKETS, (batch, new, context + new)),)
    found, expected = encoder.encode(*(tensor.numpy() for tensor in inputs)), EncoderGraph(model)(*inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, **ONNX_ERROR)
    if config.slots:
        memory, hidden = inputs[4], torch.randn(batch, config.layers, config.segment_length, config.width)
        new_memory = torch.from_numpy(encoder.abstract(memory.numpy(), hidden.numpy()))
        torch.testing.assert_close(new_memory, AbstractionGraph(model)(memory, hidden), **ONNX_ERROR)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "events"), [(1, 1), (1, 10), (7, 4), (64, 9)])
def test_export_graph_of_requests_equals_pytorch_for_any_shape(
    exported: tuple[DMAN, Path], batch: int, events: int
) -> None:
    model, path = exported
    config, graph = model.config, path / REQUEST
    if config.time != "request":
        assert not graph.exists()
        return
    encoder = Encoder.of(open_bundle(path), provider="cpu")
    torch.manual_seed(batch)
    context = state_shape(config, "float32").context_limit
    ages = torch.randint(0, BUCKETS, (batch, context))
    ages[:, : max(0, context - events)] = NO_EVENT
    inputs = (
        torch.randn(batch, context, config.width),
        torch.randn(batch, config.slots, config.width),
        ages,
        torch.randint(0, BUCKETS, (batch,)),
    )
    found = torch.from_numpy(encoder.read_at_request(*(tensor.numpy() for tensor in inputs)))
    torch.testing.assert_close(found, RequestGraph(model)(*inputs), **ONNX_ERROR)


def test_export_replay_equals_pytorch_replay(exported: tuple[DMAN, Path]) -> None:
    """Whole histories through states stored as float32, of every length up to more than four segments."""
    model, path = exported
    bundle = open_bundle(path)
    exact = replace(bundle, manifest=replace(bundle.manifest, state=replace(bundle.manifest.state, dtype="float32")))
    histories = [np.random.default_rng(n).integers(0, TINY_ITEMS, n) for n in range(1, 23)]
    times = [10**9 + np.cumsum(np.random.default_rng(n).geometric(1e-4, n)) for n in range(1, 23)]
    moments = np.array([of[-1] + 3600 for of in times])
    generation = Generation.of(exact, Encoder.of(exact, provider="cpu"))
    states = generation.replay([events_of(*history) for history in zip(histories, times, strict=True)])
    users, memories = torch_replay(model, histories, times=times)
    asked, _ = torch_replay(model, histories, times=times, request_times=moments)
    found = torch.from_numpy(generation.asked(states, moments.tolist())[0])
    torch.testing.assert_close(found, asked, **ONNX_ERROR)
    for state, user, memory in zip(states, users, memories, strict=True):
        torch.testing.assert_close(torch.from_numpy(state.user_embedding), user, **ONNX_ERROR)
        torch.testing.assert_close(torch.from_numpy(state.memory), memory, **ONNX_ERROR)


def test_export_golden_replay_passes(exported: tuple[DMAN, Path]) -> None:
    model, path = exported
    golden = open_bundle(path).golden()
    lengths = (golden["histories"] >= 0).sum(1)
    assert lengths.min() == 1
    assert lengths.max() > 5 * model.config.segment_length
    assert Generation.open(path, provider="cpu").check_golden() < 1e-4


def test_export_manifest_describes_model_and_tensors(exported: tuple[DMAN, Path]) -> None:
    model, path = exported
    manifest, config = open_bundle(path).manifest, model.config
    assert manifest.format_version == FORMAT_VERSION
    assert manifest.model == to_dict(config)
    assert manifest.vocabulary == TINY_ITEMS
    state = manifest.state
    assert (state.segment_length, state.memory_slots, state.layers, state.width) == (
        config.segment_length,
        config.slots,
        config.layers,
        config.width,
    )
    assert state.recurrent == (config.variant != "nran")
    depth, slots, context = config.layers, config.slots, state.context_limit
    shapes = {
        graph: {tensor["name"]: (tensor["dtype"], tensor["shape"]) for tensor in sides["inputs"] + sides["outputs"]}
        for graph, sides in manifest.tensors.items()
    }
    ages = {"ages": ("int64", ["B", "S", ANY])} if config.sees_times else {}
    request = {
        "sources": ("float32", ["B", context, 32]),
        "memory": ("float32", ["B", slots, 32]),
        "ages": ("int64", ["B", context]),
        "gaps": ("int64", ["B"]),
        "user_embedding": ("float32", ["B", 32]),
    }
    assert shapes == ({REQUEST: request} if config.time == "request" else {}) | {
        ENCODER: {
            "item_embeddings": ("float32", ["B", "S", 32]),
            "new_lengths": ("int64", ["B"]),
            "context": ("float32", ["B", depth, "C", 32]),
            "context_lengths": ("int64", ["B"]),
            "memory": ("float32", ["B", depth, slots, 32]),
            "user_embedding": ("float32", ["B", 32]),
            "hidden": ("float32", ["B", depth, "S", 32]),
            **ages,
        },
        ABSTRACTION: {
            "memory": ("float32", ["B", depth, slots, 32]),
            "segment_hidden": ("float32", ["B", depth, 5, 32]),
            "new_memory": ("float32", ["B", depth, slots, 32]),
        },
    }
    for name, entry in manifest.files.items():
        assert entry == {"sha256": sha256(path / name), "bytes": (path / name).stat().st_size}


def test_export_tables_of_times_and_returns_are_those_of_the_model(exported: tuple[DMAN, Path]) -> None:
    model, path = exported
    bundle, config = open_bundle(path), model.config
    assert set(bundle.manifest.files) == set(files_of(bundle.manifest.state))
    assert bundle.manifest.state.times == (config.time if config.sees_times else "none")
    assert bundle.manifest.state.sketch_items == (config.sketch_items if config.returns == "on" else 0)
    assert bundle.manifest.state.longest_gap == model.longest_gap
    if config.sees_times:
        assert np.array_equal(bundle.gap_embeddings, (model.gaps * model.input_scale).detach().numpy())
    else:
        assert bundle.gap_embeddings is None and not (path / GAPS).exists()
    if config.returns == "on":
        term, (embedding, item) = model.returns, (torch.randn(32), 7)
        weights = (
            bundle.returns["by_user"] @ embedding.numpy() + bundle.returns["bias"] + bundle.returns["by_item"][item]
        )
        expected = term.by_user(embedding) + term.by_item(model.item_table()[item])
        torch.testing.assert_close(torch.from_numpy(weights), expected.detach(), **ONNX_ERROR)
    else:
        assert not bundle.returns and not (path / RETURNS).exists()


def test_export_tables_equal_the_model(tiny_model: DMAN, tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert np.array_equal(bundle.item_embeddings, tiny_model.item_table().detach().numpy())
    assert np.array_equal(bundle.initial_memory, tiny_model.initial_memory.detach().numpy())
    assert bundle.items.item_ids == [str(i) for i in range(1, TINY_ITEMS + 1)]
    assert bundle.items.titles[6] == "Title 7"
    assert bundle.items.attributes[6] == {"genre": "odd"}
    assert bundle.items.popularity.sum() == pytest.approx(1)
    assert bundle.items.popularity[1] / bundle.items.popularity[0] == pytest.approx(2)
    assert bundle.manifest.integer_item_ids


# --- What export refuses, and what it replaces.


@pytest.fixture
def other_graphs(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports write the graphs of `tiny_bundle`, whatever the model."""

    def copy_graphs(_model: DMAN, directory: Path) -> dict:
        for name in (ENCODER, ABSTRACTION):
            shutil.copy(tiny_bundle / name, directory)
        return read_manifest(tiny_bundle).tensors

    monkeypatch.setattr(export, "export_graphs", copy_graphs)


@pytest.mark.usefixtures("other_graphs")
def test_export_refuses_graphs_that_differ_from_the_model(tiny_model: DMAN, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(BundleError, match=r"ONNX differs from PyTorch by .* no bundle written"):
        export_bundle(random_model(TINY, TINY_ITEMS, seed=1), vocabulary_of(TINY_ITEMS), out)
    with pytest.raises(BundleError, match=r"more than 1\.0e-12"):
        export_bundle(tiny_model, vocabulary_of(TINY_ITEMS), out, tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_export_refuses_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    model = random_model(TINY, TINY_ITEMS)
    with torch.no_grad():
        model.slot_bias[1, 1, 3] = value
    with pytest.raises(BundleError, match=r"slot_bias is not finite"):
        export_bundle(model, vocabulary_of(TINY_ITEMS), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_export_error_of_nan_outputs_is_above_every_tolerance() -> None:
    """Finite weights may still overflow; an error of NaN must not pass as a small one."""
    nan = np.array([1.0, np.nan])
    assert max(0.0, graphs._relative(nan, torch.ones(2))) == np.inf
    assert max(0.0, graphs._relative(nan, torch.from_numpy(nan))) == np.inf


def test_export_replaces_an_older_bundle_whole(tiny_model: DMAN, copy: Path) -> None:
    (copy / "left over").write_text("by an older version")
    before = read_manifest(copy).bundle_id
    result = export_bundle(tiny_model, vocabulary_of(TINY_ITEMS), copy, state_dtype="float32")
    bundle = open_bundle(copy)
    assert result["bundle_id"] == bundle.bundle_id != before
    assert bundle.manifest.state.dtype == "float32"
    assert {path.name for path in copy.iterdir()} == {MANIFEST, *FILES}
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_export_that_fails_keeps_the_older_bundle(tiny_model: DMAN, copy: Path) -> None:
    before = read_manifest(copy)
    with pytest.raises(BundleError):
        export_bundle(tiny_model, vocabulary_of(TINY_ITEMS), copy, tolerance=0.0)
    assert open_bundle(copy).manifest == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_export_refuses_a_foreign_place(tiny_model: DMAN, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(BundleError, match=r"exists and is not a bundle; choose another directory"):
            export_bundle(tiny_model, vocabulary_of(TINY_ITEMS), out)
    with pytest.raises(BundleError, match="cannot write"):
        export_bundle(tiny_model, vocabulary_of(TINY_ITEMS), tmp_path / "thesis.tex" / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_export_of_the_same_model_gives_the_same_bundle_id(tiny_model: DMAN, tiny_bundle: Path, tmp_path: Path) -> None:
    result = export_bundle(tiny_model, vocabulary_of(TINY_ITEMS), tmp_path / "bundle")
    assert result["bundle_id"] == read_manifest(tiny_bundle).bundle_id
