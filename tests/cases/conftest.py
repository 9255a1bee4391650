"""Bundles for the cases: the tiny model under other item ids, and one of twelve items."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases.commands import Commands
from conftest import TINY, TINY_ITEMS, Shared, change_file_entry, random_model, rewrite_manifest

from dman_runtime.model.bundle import ITEMS, items_jsonl
from dman_train.export import export_bundle
from dman_train.run import Vocabulary

Rename = Callable[..., Path]
SMALL_ITEMS = [f"p{n:02}" for n in range(12)]


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(scope="session")
def bundle_of(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Rename:
    """`bundle_of(item_ids, **data)`: the tiny bundle with other text ids, and with what its training recorded."""

    def renamed(ids: list[str], /, **data: object) -> Path:
        path = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundle") / "bundle"))
        assert len(ids) == TINY_ITEMS
        (path / ITEMS).write_text(items_jsonl([{"item_id": one, "events": n} for n, one in enumerate(ids, 1)]))
        change_file_entry(path, ITEMS)
        rewrite_manifest(path, integer_item_ids=False, data={"user_ids": "text", "item_ids": "text"} | data)
        return path

    return renamed


@pytest.fixture(scope="session")
def ring_bundle(bundle_of: Rename) -> Path:
    """For the items i00 to i59."""
    return bundle_of([f"i{n:02}" for n in range(TINY_ITEMS)])


@pytest.fixture(scope="session")
def small_bundle(shared: Shared) -> Path:
    """For the items p00 to p11: users soon have had everything."""

    def export(path: Path) -> None:
        vocabulary = Vocabulary(SMALL_ITEMS, False, np.arange(1, 13), {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export_bundle(random_model(TINY, 12), vocabulary, path, data={"user_ids": "text", "item_ids": "text"})

    return shared("small-bundle", export)
