"""Every suite here runs over every implementation: `harness` and `store` are parametrised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from contract.stores import DURABLE, HARNESSES, Harness, fresh_directory

from dman_runtime.store.base import StateStore


@pytest.fixture
def directory() -> Iterator[Path]:
    with fresh_directory() as path:
        yield path


@pytest.fixture(params=HARNESSES)
def harness(request: pytest.FixtureRequest, directory: Path) -> Harness:
    return HARNESSES[request.param](directory)


@pytest.fixture(params=DURABLE)
def durable(request: pytest.FixtureRequest, directory: Path) -> Harness:
    return HARNESSES[request.param](directory)


@pytest.fixture(params=[name for name, one in HARNESSES.items() if one.together])
def whole_store(request: pytest.FixtureRequest, directory: Path) -> Iterator[StateStore]:
    """A store whose commits and snapshots are of one moment for all users."""
    with HARNESSES[request.param](directory).open() as opened:
        yield opened


@pytest.fixture(params=[name for name, one in HARNESSES.items() if not one.together])
def divided(request: pytest.FixtureRequest, directory: Path) -> Iterator[StateStore]:
    """A store that commits and shows each user by itself."""
    with HARNESSES[request.param](directory).open() as opened:
        yield opened


@pytest.fixture
def store(harness: Harness) -> Iterator[StateStore]:
    with harness.open() as opened:
        yield opened
    assert harness.problems() == []
