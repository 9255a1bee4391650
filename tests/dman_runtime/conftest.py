"""What tests of the runtime share: stores, an engine, histories and the log that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import STORES, new_store
from histories import Histories, make_histories, with_unknown_items, write_csv

from dman_runtime.engine import Engine
from dman_runtime.model.generation import Generation
from dman_runtime.store.base import StateStore


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Iterator[StateStore]:
    with new_store(request.param) as store:
        yield store


@pytest.fixture
def engine(exact: Generation, store: StateStore) -> Engine:
    return Engine(exact, store)


@pytest.fixture(scope="session")
def histories() -> Histories:
    """24 users; the bundle knows all items."""
    return make_histories(24, seed=5)


@pytest.fixture(scope="session")
def mixed_histories(histories: Histories) -> Histories:
    """The same users with unknown items among their events, and one who has nothing else."""
    return with_unknown_items(histories)


@pytest.fixture(scope="session")
def log(mixed_histories: Histories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of `mixed_histories`."""
    return write_csv(tmp_path_factory.mktemp("histories") / "log.csv", mixed_histories)
