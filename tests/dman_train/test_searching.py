"""The index of a large catalogue: built only where it finds enough, and what an export does without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dman_runtime.model.bundle import INDEX, open_bundle
from dman_runtime.model.generation import Generation
from dman_runtime.retrieval import candidates
from dman_runtime.retrieval.candidates import CandidateRetriever
from dman_train import export, searching
from dman_train.searching import build_index


def clustered(items: int, users: int, *, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Item and user embeddings around common centres."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((40, 16))

    def around(count: int) -> np.ndarray:
        near = centres[random.integers(0, 40, count)] + spread * random.standard_normal((count, 16))
        return near.astype(np.float32)

    return around(items), around(users)


def test_index_reads_no_more_lists_than_the_recall_needs() -> None:
    table, users = clustered(4000, 200, spread=0.2)
    low, high = (build_index(table, users, floor=floor) for floor in (0.5, 0.95))
    for found, floor in ((low, 0.5), (high, 0.95)):
        quality = found.quality
        assert quality["recall"] >= quality["floor"] == floor and quality["users"] == 100
        assert quality["lists_read"] == found.item_index.probes <= quality["lists"] // searching.MAX_READ
    assert low.item_index.probes < high.item_index.probes


def test_index_that_finds_too_little_is_refused() -> None:
    random = np.random.default_rng(0)
    table, users = (random.standard_normal((count, 64)).astype(np.float32) for count in (4000, 100))  # no clusters
    with pytest.raises(ValueError, match=r"recall@100 is 0\.\d+ where it reads one list in 4, less than 0\.99"):
        build_index(table, users)


def test_too_few_users_to_measure_with_are_refused() -> None:
    table, users = clustered(500, 99, spread=0.2)
    with pytest.raises(ValueError, match="99 validation users are too few"):
        build_index(table, users)


@pytest.fixture
def few_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue of 20 items is large, and ten users tell."""
    for module in (export, searching):
        monkeypatch.setattr(module, "MIN_ITEMS", 20)
    monkeypatch.setattr(searching, "MIN_USERS", 10)
    monkeypatch.setattr(searching, "MAX_READ", 1)
    monkeypatch.setattr(searching, "K", 5)
    monkeypatch.setattr(candidates, "MAX_SHARE", 1)


@pytest.mark.usefixtures("few_will_do")
def test_large_catalogue_is_exported_with_an_index(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert export.main(["--run", str(trained_run), "--out", str(out)]) == 0
    assert "search: an index of " in capsys.readouterr().out
    bundle = open_bundle(out)
    assert bundle.index is not None and bundle.manifest.search["lists_read"] == bundle.index.probes
    assert isinstance(Generation.open(out, provider="cpu").retriever, CandidateRetriever)
    assert export.main(["--run", str(trained_run), "--out", str(out), "--search", "exact"]) == 0
    assert open_bundle(out).index is None and INDEX not in {path.name for path in out.iterdir()}


@pytest.mark.usefixtures("few_will_do")
@pytest.mark.parametrize("search", ["auto", "index"])
def test_export_without_faiss_says_how_to_get_it(
    trained_run: Path, tmp_path: Path, search: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError

    monkeypatch.setattr(export, "build_index", missing)
    status = export.main(["--run", str(trained_run), "--out", str(tmp_path / "bundle"), "--search", search])
    assert status == (0 if search == "auto" else 2)
    if search == "auto":
        assert "searched exactly" in caplog.text and "install dman[ann]" in caplog.text
        assert open_bundle(tmp_path / "bundle").index is None


def test_export_of_a_small_catalogue_builds_an_index_only_if_asked(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "bundle"
    assert export.main(["--run", str(trained_run), "--out", str(out)]) == 0
    assert open_bundle(out).index is None and "searched exactly" not in caplog.text
    assert export.main(["--run", str(trained_run), "--out", str(out), "--search", "index"]) == 2
    assert "validation users are too few" in capsys.readouterr().err
