"""What the tests of faults share: servers of the checkout under test, and its bundle.

Every server is a real process, seen from outside only. `FAULTS_ROOT` names another checkout to test, for example one of
an earlier commit: what a test is worth shows where it fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest
from conftest import ROOT, TINY_ITEMS, Shared

from tools.faults import bundles
from tools.faults.servers import FaultServer, python_environment

UNDER_TEST = Path(os.environ.get("FAULTS_ROOT", ROOT)).resolve()
ITEMS = [str(number) for number in range(1, TINY_ITEMS + 1)]  # of the bundle
_EXPORT = """
import conftest, pathlib, sys
conftest.export_tiny(conftest.random_model(conftest.TINY, conftest.TINY_ITEMS), pathlib.Path(sys.argv[1]))
"""


class Start(Protocol):
    def __call__(
        self,
        *options: str,
        bundle: Path | None = None,
        state: str = "state",
        if_known: tuple[str, ...] = (),
        open_files: int | None = None,
    ) -> FaultServer: ...


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout under test."""
    return UNDER_TEST


@pytest.fixture(scope="session")
def bundle(root: Path, request: pytest.FixtureRequest, shared: Shared) -> Path:
    """The tiny bundle, as the checkout under test exports it. Copy it before changing it."""
    if "FAULTS_BUNDLE" in os.environ:  # made before, by that checkout
        return Path(os.environ["FAULTS_BUNDLE"])
    if root == ROOT:
        return request.getfixturevalue("tiny_bundle")

    def export(path: Path) -> None:
        environment = python_environment(root) | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
        subprocess.run([sys.executable, "-c", _EXPORT, str(path)], cwd=root, env=environment, check=True, timeout=200)

    return shared("faults-bundle", export)


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def large_bundle(own_bundle: Path) -> Path:
    """One with 600 items: a reply can have 13 MiB."""
    bundles.enlarge(own_bundle, 600)
    return own_bundle


@pytest.fixture
def start(bundle: Path, tmp_path: Path, root: Path) -> Iterator[Start]:
    """Starts servers, which end with the test."""
    own_bundle = bundle
    with ExitStack() as stack:

        def started(
            *options: str,
            bundle: Path | None = None,
            state: str = "state",
            if_known: tuple[str, ...] = (),
            open_files: int | None = None,
        ) -> FaultServer:
            server = FaultServer(
                bundle or own_bundle,
                tmp_path / state,
                *options,
                root=root,
                if_known=if_known,
                open_files=open_files,
            )
            return stack.enter_context(server)

        yield started
