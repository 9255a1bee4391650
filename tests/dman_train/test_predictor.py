"""Fitting the map from titles and attributes, on item tables in which the truth was planted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, random_model

from dman_runtime.data.interactions import ItemInfo
from dman_runtime.errors import BundleError
from dman_runtime.model.bundle import PREDICTOR, open_bundle, read_manifest
from dman_train.export import export_bundle, validation_audience
from dman_train.model import DMAN
from dman_train.predictor import MIN_ITEMS, Audience, Fitted, fit_predictor
from dman_train.run import open_run
from dman_train.vocabulary import Vocabulary

ITEMS, WIDTH, GENRES = 400, 16, 8


def planted(noise: float, *, width: int = WIDTH, seed: int = 0) -> tuple[np.ndarray, Vocabulary, Audience]:
    """Items whose embeddings are the sum of those of their genres, and users who like one genre each."""
    random = np.random.default_rng(seed)
    genres = random.normal(size=(GENRES, width))
    of = [random.choice(GENRES, 2, replace=False) for _ in range(ITEMS)]
    table = np.array([genres[pair].sum(0) for pair in of]) + noise * random.normal(size=(ITEMS, width))
    ids = [str(number) for number in range(ITEMS)]
    infos = {
        i: ItemInfo(f"Film {i}", {"genre": "|".join(f"G{g}" for g in pair)}) for i, pair in zip(ids, of, strict=True)
    }
    vocabulary = Vocabulary(ids, True, np.arange(ITEMS, 0, -1), infos)
    users = genres[random.integers(0, GENRES, 200)] + 0.3 * random.normal(size=(200, width))
    seen = [random.choice(ITEMS, 5, replace=False) for _ in users]
    targets = np.argmax(users @ table.T, axis=1)
    keep = [row for row in range(200) if targets[row] not in seen[row]]
    audience = Audience(users.astype(np.float32)[keep], [seen[row] for row in keep], targets[keep])
    return table.astype(np.float32), vocabulary, audience


def fitted(noise: float = 0.1) -> Fitted:
    found = fit_predictor(*planted(noise))
    assert found is not None
    return found


def test_planted_map_is_found_and_the_quality_says_so() -> None:
    table, vocabulary, _ = planted(0.1)
    predictor, quality = fitted()
    predicted = np.array([predictor.predict(info.title, info.attributes) for info in vocabulary.items.values()])
    assert np.corrcoef(predicted.ravel(), table.ravel())[0, 1] > 0.98
    assert quality["cosine"] > 0.95 and quality["r2"] > 0.85 and quality["neighbour_rank"] < 30
    assert quality["fitted_items"] == ITEMS and quality["features"] == GENRES + 1  # and "film"; numbers come once each
    assert quality["hr@10"] > 0.5


def test_quality_is_that_of_items_held_out() -> None:
    """Attributes that say nothing predict nothing, however many there are."""
    table, vocabulary, audience = planted(0.0)
    random = np.random.default_rng(1)
    nonsense = {
        i: ItemInfo("", {"a": str(random.integers(100)), "b": f"x{random.integers(100)}"}) for i in vocabulary.item_ids
    }
    found = fit_predictor(table, replace(vocabulary, items=nonsense), audience)
    assert found is not None
    assert found.quality["r2"] < 0.05 and found.quality["neighbour_rank"] > ITEMS / 4


def test_scale_shows_held_out_items_as_often_as_trained_ones() -> None:
    """With noise the predictions shrink, and the scale makes up for it."""
    table, vocabulary, audience = planted(1.0)
    predictor, quality = fitted(1.0)
    assert quality["scale"] > 1.1
    predicted = np.array([predictor.predict(i.title, i.attributes) for i in vocabulary.items.values()])
    scores, trained = audience.users @ predicted.T, audience.users @ table.T
    for row, seen in enumerate(audience.seen):
        scores[row, seen] = trained[row, seen] = -np.inf
    bound = np.sort(trained, axis=1)[:, -10][:, None]
    assert (scores >= bound).sum() == pytest.approx((trained >= bound).sum(), rel=0.2)


def test_nothing_is_fitted_without_enough_items_with_attributes() -> None:
    table, vocabulary, audience = planted(0.1)
    few = {i: vocabulary.items[i] for i in vocabulary.item_ids[: MIN_ITEMS - 1]}
    assert fit_predictor(table, replace(vocabulary, items=few), audience) is None


def test_numbers_become_knots_and_are_no_values() -> None:
    table, vocabulary, audience = planted(0.1)
    infos = {i: ItemInfo(f"Film ({1900 + int(i) % 100})", {"price": str(int(i) / 7)}) for i in vocabulary.item_ids}
    found = fit_predictor(table, replace(vocabulary, items=infos), audience)
    assert found is not None
    kinds = {(one.kind, one.field) for one in found.predictor.features}
    assert kinds == {("near", "price"), ("near", "year in the title"), ("word", "title")}


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Fitted]:
    path = tmp_path_factory.mktemp("predicting") / "bundle"
    table, vocabulary, audience = planted(0.1, width=TINY.width)
    found = fit_predictor(table, vocabulary, audience)
    assert found is not None
    model = random_model(TINY, ITEMS)
    export_bundle(model, vocabulary, path, fitted=found)
    return path, found


def test_bundle_holds_the_map_and_its_quality(exported: tuple[Path, Fitted]) -> None:
    path, found = exported
    bundle = open_bundle(path)
    assert bundle.predictor is not None and bundle.manifest.new_items == found.quality
    np.testing.assert_array_equal(bundle.predictor.weights, found.predictor.weights)
    assert bundle.predictor.predict("", {"genre": "G1"}) is not None


def test_damaged_map_is_refused(exported: tuple[Path, Fitted], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported[0], tmp_path / "bundle"))
    content = bytearray((copy / PREDICTOR).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / PREDICTOR).write_bytes(content)
    with pytest.raises(BundleError, match="does not match its checksum"):
        open_bundle(copy)
    (copy / PREDICTOR).unlink()
    with pytest.raises(BundleError, match=PREDICTOR):
        open_bundle(copy)


def test_bundle_without_attributes_has_no_map(tiny_bundle: Path) -> None:
    assert open_bundle(tiny_bundle).predictor is None
    assert PREDICTOR not in read_manifest(tiny_bundle).files and read_manifest(tiny_bundle).new_items == {}


def test_run_without_its_log_is_exported_without_a_map(
    trained_run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(trained_run)
    vocabulary, config = run.vocabulary(), run.config
    described = replace(vocabulary, items={i: ItemInfo("", {"a": "b"}) for i in vocabulary.item_ids})
    model = run.best_model()
    assert isinstance(model, DMAN)
    assert validation_audience(run, model, described) is not None and not caplog.records
    config["dataset"]["path"] = "/nowhere/log.csv"
    monkeypatch.setattr(type(run), "config", property(lambda _: config))
    assert validation_audience(run, model, described) is None
    assert "will not predict" in caplog.text
