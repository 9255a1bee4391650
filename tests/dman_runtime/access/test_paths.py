"""What remote callers may name: nothing outside one directory, whatever they write."""

from __future__ import annotations

from pathlib import Path

import pytest

from dman_runtime.access.paths import path_within
from dman_runtime.errors import JobError, RequestError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with a bundle, beside a secret; with links to both, and one that goes round in a circle."""
    root = tmp_path / "root"
    (root / "bundle").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "rooted").mkdir()
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "in").symlink_to("bundle")
    (root / "round").symlink_to("round")
    return root


def test_names_in_the_directory_are_found_relative_and_absolute(root: Path) -> None:
    for text in ("bundle", "./bundle/", "bundle/../bundle", "in", str(root / "bundle")):
        assert path_within(root, text, parameter="bundle") == root.resolve() / "bundle"
    assert path_within(root, "new/one", parameter="output") == root.resolve() / "new" / "one"
    assert path_within(root, "~", parameter="output") == root.resolve() / "~"  # a name like any other


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "../secret",
        "bundle/../..",
        "bundle/../../secret",
        "/",
        "/etc/passwd",
        "out",
        "out/x",
        "../rooted",
    ],
)
def test_names_outside_are_refused(root: Path, text: str) -> None:
    with pytest.raises(RequestError, match=r"^bundle '.*' is not within the directory whose files callers may name"):
        path_within(root, text, parameter="bundle")


@pytest.mark.parametrize("text", ["round", "a\0b", "x" * 5000])
def test_what_is_no_path_is_refused(root: Path, text: str) -> None:
    with pytest.raises(RequestError, match=r"^bundle '.* is (no path|not within)") as caught:
        path_within(root, text, parameter="bundle")
    assert len(str(caught.value)) < 400


def test_a_root_that_is_a_link_is_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert path_within(tmp_path / "link", "bundle", parameter="bundle") == root.resolve() / "bundle"
    assert path_within(tmp_path / "link", str(root / "bundle"), parameter="bundle") == root.resolve() / "bundle"


def test_without_a_directory_nothing_can_be_named() -> None:
    with pytest.raises(JobError, match=r"without a directory whose files callers may name; start it with one"):
        path_within(None, "bundle", parameter="bundle")
