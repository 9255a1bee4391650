"""Opening bundles: whatever was done to their files is noticed, by checksums or by the golden replay."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_ITEMS, rewrite_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from dman_runtime.errors import BundleError
from dman_runtime.model.bundle import (
    EMBEDDINGS,
    FILES,
    FORMAT_VERSION,
    GOLDEN,
    INITIAL_MEMORY,
    ITEMS,
    MANIFEST,
    open_bundle,
    read_manifest,
)
from dman_runtime.model.bundle_writer import sha256
from dman_runtime.model.encoder import Encoder
from dman_runtime.model.generation import Generation
from dman_train.export import golden_replay
from dman_train.model import DMAN


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    path = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, path)
    return path


def assert_refused(bundle: Path, *parts: str) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(bundle), *parts):
        assert part in message


def rewrite_checksums(bundle: Path) -> None:
    """What somebody does who edits a file of the bundle and covers it up."""
    files = {name: {"sha256": sha256(bundle / name), "bytes": (bundle / name).stat().st_size} for name in FILES}
    rewrite_manifest(bundle, files=files)


def golden_error(bundle: Path) -> float:
    """What opening a generation computes."""
    opened = open_bundle(bundle)
    return Generation.of(opened, Encoder.of(opened, provider="cpu")).check_golden()


# --- Damage.


@pytest.mark.slow
@settings(max_examples=40)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_open_bundle_refuses_any_flipped_bit(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, name: str, where: float, bit: int
) -> None:
    path = tmp_path_factory.mktemp("flipped") / "bundle"
    shutil.copytree(tiny_bundle, path)
    content = bytearray((path / name).read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (path / name).write_bytes(content)
    assert_refused(path, name, "checksum", "export it again")


@pytest.mark.parametrize("name", FILES)
def test_open_bundle_refuses_missing_and_truncated_files(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1])
    assert_refused(copy, name, "checksum", "export it again")
    (copy / name).write_bytes(b"")
    assert_refused(copy, name, "checksum", "export it again")
    (copy / name).unlink()
    assert_refused(copy, name, "No such file", "restore the bundle")
    (copy / name).mkdir()
    assert_refused(copy, name, "Is a directory", "restore the bundle")


def test_open_bundle_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    assert_refused(tmp_path, MANIFEST, "python -m dman_train.export")
    assert_refused(tmp_path / "nowhere", MANIFEST, "python -m dman_train.export")
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file", MANIFEST)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"format_version": 1,'])
def test_open_bundle_refuses_a_broken_manifest(copy: Path, content: bytes) -> None:
    (copy / MANIFEST).write_bytes(content)
    assert_refused(copy, MANIFEST, "cannot be read", "export the bundle again")


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, None, "1"])
def test_open_bundle_refuses_other_format_versions(copy: Path, version: object) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(content | {"format_version": version}))
    assert_refused(copy, f"format {version}", f"reads format {FORMAT_VERSION}", "export it again")


def test_open_bundle_refuses_manifests_of_other_shape(copy: Path) -> None:
    for content in ("[]", "null", "3"):
        (copy / MANIFEST).write_text(content)
        assert_refused(copy, "format None")


@pytest.mark.parametrize(
    "edit",
    [
        {"bundle_id": "0" * 16},
        {"integer_item_ids": False},
        {"state": {"segment_length": 7}},
        {"state": {"dtype": "float32"}},
        {"state": None},
        {"files": {}},
        {"files": None},
        {"colour": "red"},
    ],
    ids=str,
)
def test_open_bundle_refuses_an_edited_manifest(copy: Path, edit: dict) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    for name, value in edit.items():
        content[name] = content[name] | value if name == "state" and value else value
    (copy / MANIFEST).write_text(json.dumps(content))
    assert_refused(copy, MANIFEST, "was edited", "export the bundle again")


def test_open_bundle_refuses_consistent_manifests_that_the_files_contradict(copy: Path) -> None:
    state = read_manifest(copy).state
    rewrite_manifest(copy, vocabulary=TINY_ITEMS + 1)
    assert_refused(copy, EMBEDDINGS, "float32[61, 32]")
    rewrite_manifest(copy, vocabulary=TINY_ITEMS, state=replace(state, memory_slots=3))
    assert_refused(copy, INITIAL_MEMORY, "float32[2, 3, 32]")
    rewrite_manifest(copy, state=state)
    lines = (copy / ITEMS).read_text().splitlines()
    for content in (lines[:-1], [*lines[:-1], lines[0]], [*lines[:-1], "{}"], [*lines[:-1], "title"]):
        (copy / ITEMS).write_text("\n".join(content) + "\n")
        rewrite_checksums(copy)
        assert_refused(copy, ITEMS, "export the bundle again")
    files = read_manifest(copy).files
    rewrite_manifest(copy, files={name: entry for name, entry in files.items() if name != GOLDEN})
    assert_refused(copy, MANIFEST, "export the bundle again")


def test_open_bundle_refuses_a_state_dtype_it_does_not_know(copy: Path) -> None:
    rewrite_manifest(copy, state=replace(read_manifest(copy).state, dtype="int8"))
    assert_refused(copy, MANIFEST, "export the bundle again")


# --- The golden replay notices what checksums cannot.


def test_golden_replay_notices_an_altered_item_table(copy: Path) -> None:
    np.save(copy / EMBEDDINGS, np.roll(np.load(copy / EMBEDDINGS), 1, axis=0))  # each item has its neighbour's row
    rewrite_checksums(copy)
    with pytest.raises(
        BundleError, match=r"golden replay is off by .*run the graphs on the CPU.*export the bundle again"
    ):
        golden_error(copy)


def test_golden_replay_of_a_model_without_recurrence_names_the_earlier_form(copy: Path) -> None:
    rewrite_manifest(copy, state=replace(read_manifest(copy).state, recurrent=False))
    with pytest.raises(
        BundleError, match=r"golden replay is off by .* an earlier version trained it.*train again.*CPU"
    ):
        golden_error(copy)


@pytest.mark.parametrize("altered", ["user_embeddings", "memories"])
def test_golden_replay_notices_each_of_its_parts(copy: Path, tiny_model: DMAN, altered: str) -> None:
    golden = golden_replay(tiny_model)
    golden[altered] = golden[altered] * 1.01
    np.savez(copy / GOLDEN, allow_pickle=False, **golden)
    rewrite_checksums(copy)
    with pytest.raises(BundleError, match="golden replay"):
        golden_error(copy)


def test_golden_replay_is_in_float32_whatever_states_are_stored_as(tiny_bundle: Path, exact_bundle: Path) -> None:
    errors = [golden_error(path) for path in (tiny_bundle, exact_bundle)]
    assert errors[0] == errors[1] < 1e-5
