"""Bundles made to harm: each is refused in one line, at no cost, and nothing on disk reaches an opened bundle."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import (
    ROOT,
    TINY_ITEMS,
    change_file_entry,
    events_of,
    rewrite_manifest,
)
from hostile_bundles import write_fitting_manifest

from dman_runtime.errors import BundleError, DmanError, EncoderError
from dman_runtime.model.bundle import (
    ABSTRACTION,
    EMBEDDINGS,
    ENCODER,
    FILES,
    GAPS,
    GOLDEN,
    ITEMS,
    MANIFEST,
    REQUEST,
    RETURNS,
    open_bundle,
    read_manifest,
)
from dman_runtime.model.generation import Generation
from dman_runtime.model.manifest import SIZE_LIMITS
from dman_train.config import ConfigError, ModelConfig


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def refusal(bundle: Path, kind: type[DmanError] = BundleError) -> str:
    """The message with which a generation is not opened."""
    with pytest.raises(kind) as caught:
        Generation.open(bundle, provider="cpu")
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 400
    assert str(bundle) in message
    return message


def put(bundle: Path, name: str, content: bytes) -> None:
    """Replaces a file, and makes size, checksum and bundle id fit."""
    (bundle / name).write_bytes(content)
    change_file_entry(bundle, name)


# --- What is no file.


def make_pipe(file: Path) -> None:
    os.mkfifo(file)


def make_link_to_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
@pytest.mark.parametrize("make", [make_pipe, make_link_to_device, Path.mkdir])
def test_open_refuses_what_is_no_regular_file(copy: Path, name: str, make: Callable[[Path], None]) -> None:
    (copy / name).unlink()
    make(copy / name)
    message = refusal(copy)
    assert name in message and ("not a regular file" in message or "Is a directory" in message)


def test_open_refuses_a_pipe_as_bundle(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "Not a directory" in refusal(tmp_path / "pipe")


def test_open_follows_links_to_a_bundle_and_to_its_files(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    (copy / ITEMS).rename(tmp_path / "elsewhere")
    (copy / ITEMS).symlink_to(tmp_path / "elsewhere")
    assert Generation.open(tmp_path / "link", provider="cpu").bundle.changed() == ""


# --- Sizes are checked before anything is read or unpacked.


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_open_refuses_a_file_that_claims_a_terabyte(copy: Path, name: str) -> None:
    """A sparse file has any size at no cost; reading this one would take minutes and all memory."""
    os.truncate(copy / name, 1 << 40)
    assert name in refusal(copy)
    if name != MANIFEST:
        files = read_manifest(copy).files
        rewrite_manifest(copy, files=files | {name: files[name] | {"bytes": 1 << 40}})
        assert "this machine has" in refusal(copy)


def test_open_refuses_tables_that_the_machine_cannot_hold(copy: Path) -> None:
    files, size = read_manifest(copy).files, 4 * 4096 * 100_000_000 + 128
    os.truncate(copy / EMBEDDINGS, size)
    shape = replace(read_manifest(copy).state, width=4096)
    files |= {EMBEDDINGS: files[EMBEDDINGS] | {"bytes": size}}
    rewrite_manifest(copy, files=files, state=shape, vocabulary=100_000_000)
    assert "MiB of memory" in refusal(copy)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def golden_members(bundle: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(bundle / GOLDEN) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_open_refuses_a_golden_replay_that_expands(copy: Path) -> None:
    members = golden_members(copy)
    members["user_embeddings.npy"] = npy(np.zeros((1 << 19, 32), np.float32))  # 64 MiB in 65 kB
    content = npz(members, zipfile.ZIP_DEFLATED)
    assert len(content) < 200_000
    put(copy, GOLDEN, content)
    assert "would take" in refusal(copy) or "more than" in refusal(copy)


def test_open_refuses_a_golden_replay_that_lies_about_its_size(copy: Path) -> None:
    """The directory of the archive says 1,000 bytes; what it holds would unpack to 64 MiB."""
    members = golden_members(copy)
    size = 1 << 26
    members["user_embeddings.npy"] = bytes(size)
    content = npz(members, zipfile.ZIP_DEFLATED).replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    put(copy, GOLDEN, content)
    refusal(copy)


GOLDEN_EDITS: dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "no histories": lambda g: {name: array[:0] for name, array in g.items()},
    "many histories": lambda g: {name: np.repeat(array, 3, axis=0) for name, array in g.items()},
    "long histories": lambda g: g | {"histories": np.zeros((7, 81), np.int64)},
    "other counts": lambda g: g | {"memories": g["memories"][:-1]},
    "item beyond the table": lambda g: g | {"histories": np.where(g["histories"] == 33, TINY_ITEMS, g["histories"])},
    "item below the padding": lambda g: g | {"histories": np.where(g["histories"] == 33, -2, g["histories"])},
    "padding on the left": lambda g: g | {"histories": g["histories"][:, ::-1].copy()},
    "float histories": lambda g: g | {"histories": g["histories"].astype(np.float64)},
    "other width": lambda g: g | {"user_embeddings": g["user_embeddings"][:, :-1].copy()},
    "objects": lambda g: g | {"histories": g["histories"].astype(object)},
    "one more": lambda g: g | {"more": g["histories"]},
    "one less": lambda g: {name: array for name, array in g.items() if name != "memories"},
    "infinite": lambda g: g | {"user_embeddings": np.full_like(g["user_embeddings"], np.inf)},
}


@pytest.mark.parametrize("edit", GOLDEN_EDITS)
def test_open_refuses_a_golden_replay_that_cannot_be_one(copy: Path, edit: str) -> None:
    with np.load(copy / GOLDEN) as arrays:
        golden = {name: arrays[name] for name in arrays.files}
    assert (golden["histories"] == 33).any(), "the edits of an item do something"
    stream = io.BytesIO()
    np.savez(stream, **GOLDEN_EDITS[edit](golden))  # type: ignore[arg-type]
    put(copy, GOLDEN, stream.getvalue())
    message = refusal(copy)
    assert GOLDEN in message or "golden replay is off" in message


# --- Arrays.


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((TINY_ITEMS, 32), np.float64),
        np.zeros((TINY_ITEMS, 16), np.float32),
        np.zeros((TINY_ITEMS, 32), ">f4"),
        np.zeros((TINY_ITEMS, 32), [("x", "<f4")]),
        np.zeros((32, TINY_ITEMS), np.float32),
        np.zeros(TINY_ITEMS * 32, np.float32),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_open_refuses_another_array(copy: Path, array: np.ndarray) -> None:
    put(copy, EMBEDDINGS, npy(array))
    assert EMBEDDINGS in refusal(copy)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 32), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-60, -32), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (60, True), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (60L, 32L), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (60, 32), }",
        "__import__('os').abort()",
        "(" * 100,
        "",
    ],
)
def test_open_refuses_a_header_that_lies(copy: Path, header: str) -> None:
    content = (copy / EMBEDDINGS).read_bytes()
    put(copy, EMBEDDINGS, content[:10] + header.encode().ljust(117) + b"\n" + content[128:])
    assert EMBEDDINGS in refusal(copy)


def test_open_takes_arrays_in_fortran_order(copy: Path) -> None:
    expected = np.load(copy / EMBEDDINGS)
    put(copy, EMBEDDINGS, npy(np.asfortranarray(expected)))
    assert b"'fortran_order': True" in (copy / EMBEDDINGS).read_bytes()
    np.testing.assert_array_equal(Generation.open(copy, provider="cpu").bundle.item_embeddings, expected)


# --- The manifest.


MANIFEST_EDITS: dict[str, Any] = {
    "vocabulary": ["60", 60.0, -1, 0, 10**30, None, True, [60]],
    "format_version": [True, 1.0, "1\n2", [1]],
    "bundle_id": [None, 3, "x" * 16, ["0"]],
    "integer_item_ids": [1, "true", None],
    "model": [3, None, []],
    "tensors": [3, []],
    "metrics": [[], {"test": [1]}],
    "data": ["x"],
    "export": [0],
    "versions": [None],
    "state": [None, [], {}],
    "files": [None, [], {ITEMS: {}}],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in MANIFEST_EDITS.items() for value in values]
)
def test_open_refuses_a_manifest_with_a_value_of_another_type(copy: Path, name: str, value: object) -> None:
    content = json.loads((copy / MANIFEST).read_text()) | {name: value}
    if name == "bundle_id":
        (copy / MANIFEST).write_text(json.dumps(content))
    else:
        write_fitting_manifest(copy, content)
    message = refusal(copy)
    assert name in message or "bundle format" in message or "bundle id" in message


@pytest.mark.parametrize("name", SIZE_LIMITS)
@pytest.mark.parametrize("value", [-1, 10**6, 2**64, "8", 8.0, None, True])
def test_open_refuses_sizes_that_cannot_be(copy: Path, name: str, value: object) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    content["state"][name] = value
    write_fitting_manifest(copy, content)
    assert f"state.{name}" in refusal(copy)


def test_open_refuses_states_that_are_too_large_together(copy: Path) -> None:
    shape = replace(read_manifest(copy).state, segment_length=512, memory_slots=512, layers=16, width=4096)
    rewrite_manifest(copy, state=shape)
    assert "a state would have" in refusal(copy)


def test_size_of_a_state_counts_the_context_that_it_can_hold(copy: Path) -> None:
    shape = replace(read_manifest(copy).state, segment_length=512, memory_slots=512, layers=8, width=2048)
    rewrite_manifest(copy, state=replace(shape, recurrent=False))
    assert read_manifest(copy).state.context_limit == 512, "64 MiB, which is the limit"
    rewrite_manifest(copy, state=shape)
    with pytest.raises(BundleError, match="a state would have 100663296 bytes"):
        read_manifest(copy)


@pytest.mark.parametrize(
    "entry", [None, [], {"bytes": 3}, {"sha256": "0" * 64, "bytes": "3"}, {"sha256": 3, "bytes": 3}]
)
def test_open_refuses_a_malformed_entry_of_a_file(copy: Path, entry: object) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    content["files"][ITEMS] = entry
    (copy / MANIFEST).write_text(json.dumps(content))
    assert ITEMS in refusal(copy)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, '{"format_version": 1, "format_version": 1}', '{"format_version": NaN}',
     '{"format_version": 1e999}', '{"format_version": "\\ud800"}', "1" * 10_000],
    ids=["lists", "objects", "a name twice", "NaN", "beyond floats", "half a character", "digits"],
)  # fmt: skip
def test_open_refuses_json_that_is_a_trap(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_text(text)
    assert MANIFEST in refusal(copy)


def test_every_model_that_training_allows_has_sizes_within_the_limits() -> None:
    for name, (low, high) in SIZE_LIMITS.items():
        with pytest.raises(ConfigError):
            ModelConfig(**{name: high + 1})
        if name != "width":
            assert getattr(ModelConfig(**{name: high}), name) == high
        assert low <= getattr(ModelConfig(), name) <= high


# --- Items.


BAD_ITEMS: dict[str, object] = {
    "no object": 3,
    "number as id": {"item_id": 5, "events": 1},
    "empty id": {"item_id": "", "events": 1},
    "long id": {"item_id": "5" * 401, "events": 1},
    "control character": {"item_id": "a\u0000b", "events": 1},
    "half a character": {"item_id": "\ud800", "events": 1},
    "no integer": {"item_id": "five", "events": 1},
    "negative events": {"item_id": "5", "events": -1},
    "half an event": {"item_id": "5", "events": 0.5},
    "events without end": {"item_id": "5", "events": float("inf")},
    "huge events": {"item_id": "5", "events": 10**30},
    "true events": {"item_id": "5", "events": True},
    "title that is no text": {"item_id": "5", "events": 1, "title": 3},
    "title of half a character": {"item_id": "5", "events": 1, "title": "\ud800"},
    "attributes that are no object": {"item_id": "5", "events": 1, "attributes": []},
    "attribute that is no text": {"item_id": "5", "events": 1, "attributes": {"year": 1999}},
    "long line": {"item_id": "5", "events": 1, "title": "x" * (1 << 20)},
    "deep line": "[" * 3000,
}


@pytest.mark.parametrize("bad", BAD_ITEMS)
def test_open_refuses_a_malformed_item(copy: Path, bad: str) -> None:
    lines = (copy / ITEMS).read_text().splitlines()
    line = BAD_ITEMS[bad]
    lines[4] = line if isinstance(line, str) else json.dumps(line)
    put(copy, ITEMS, ("\n".join(lines) + "\n").encode())
    assert f"{ITEMS} line 5 is malformed" in refusal(copy)


# --- Graphs.


def change_graph(bundle: Path, name: str, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(str(bundle / name))
    change(model)
    put(bundle, name, model.SerializeToString())


def read_from_disk(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="manifest.json")


def read_from_disk_in_a_constant(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="x", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["x"], value=tensor))


def loop(model: onnx.ModelProto) -> None:
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node.append(onnx.helper.make_node("Loop", ["", ""], [], body=body))


def rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "other"


def widen_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value = 33


def flatten_input(model: onnx.ModelProto) -> None:
    del model.graph.input[0].type.tensor_type.shape.dim[-1]


def drop_output(model: onnx.ModelProto) -> None:
    del model.graph.output[-1]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (ENCODER, read_from_disk, "external data"),
        (ABSTRACTION, read_from_disk, "external data"),
        (ENCODER, read_from_disk_in_a_constant, "external data"),
        (ENCODER, loop, "control flow"),
        (ENCODER, rename_input, "cannot be loaded"),
        (ENCODER, widen_input, "cannot be loaded"),
        (ENCODER, flatten_input, "cannot be loaded"),
        (ENCODER, drop_output, "outputs"),
        (ABSTRACTION, drop_output, "cannot be loaded"),
    ],
)
def test_open_refuses_a_graph_of_another_kind(
    copy: Path, capfd: pytest.CaptureFixture[str], name: str, change: Callable[[onnx.ModelProto], object], words: str
) -> None:
    change_graph(copy, name, change)
    message = refusal(copy, EncoderError)
    assert name in message and words in message
    assert capfd.readouterr() == ("", "")  # ONNX Runtime has its own ways to report


def test_open_refuses_the_graph_of_another_model(copy: Path) -> None:
    put(copy, ENCODER, (copy / ABSTRACTION).read_bytes())
    assert "its inputs are not item_embeddings" in refusal(copy, EncoderError)


@pytest.mark.parametrize("content", [b"", b"\0", b"ORTM" * 100, b"\x08\x09:\xff\xff\xff\xff\x0f", b"\x0b\x0c"])
def test_open_refuses_what_is_no_graph(copy: Path, content: bytes) -> None:
    put(copy, ENCODER, content)
    refusal(copy, EncoderError)


# --- What was checked is what is used.


def ranking(generation: Generation) -> tuple[bytes, bytes]:
    user = generation.replay([events_of(np.arange(30) % TINY_ITEMS)])[0].user_embedding
    (hits,) = generation.retriever.search(user[None], 10, exclude=[np.zeros(0, np.int64)])
    return user.tobytes(), hits.items.tobytes() + hits.scores.tobytes()


@pytest.mark.parametrize("content", [b"", bytes(100_000)], ids=["truncated", "overwritten"])
def test_files_changed_in_place_do_not_change_answers(copy: Path, content: bytes) -> None:
    generation = Generation.open(copy, provider="cpu")
    before = ranking(generation)
    for name in (MANIFEST, *FILES):
        with (copy / name).open("r+b") as file:
            file.write(content)
            file.truncate(len(content))
    assert ranking(generation) == before
    assert generation.check_golden() < 1e-5


def test_opened_arrays_cannot_be_written(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    for array in (bundle.item_embeddings, bundle.initial_memory, *bundle.golden().values()):
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    assert bundle.item_embeddings.ctypes.data % 64 == 0, "products are faster on aligned rows"


# --- The watch.


def test_bundle_reports_every_change_of_its_files(copy: Path, tiny_bundle: Path) -> None:
    bundle = open_bundle(copy)
    assert bundle.changed() == ""
    (copy / "notes.txt").touch()
    assert bundle.changed() == "", "other files do not matter"
    for name in (MANIFEST, *FILES):
        status = (copy / name).stat()
        os.utime(copy / name, ns=(0, status.st_mtime_ns + 1))
        assert bundle.changed() == f"{name} was overwritten"
        os.utime(copy / name, ns=(0, status.st_mtime_ns))
        assert bundle.changed() == ""
        (copy / name).rename(copy / "aside")
        assert bundle.changed() == f"{name} cannot be read: No such file or directory"
        shutil.copy2(copy / "aside", copy / name)
        assert bundle.changed() == f"{name} was replaced"
        (copy / "aside").rename(copy / name)
        assert bundle.changed() == ""


def test_bundle_reports_a_directory_that_was_replaced_or_removed(copy: Path) -> None:
    bundle = open_bundle(copy)
    shutil.move(copy, copy.with_name("old"))
    assert "cannot be read" in bundle.changed()
    shutil.copytree(copy.with_name("old"), copy)
    assert bundle.changed() == f"{MANIFEST} was replaced"


def test_open_of_another_bundle_than_expected_says_what_to_do(tiny_bundle: Path, exact_bundle: Path) -> None:
    served, now = read_manifest(tiny_bundle).bundle_id, read_manifest(exact_bundle).bundle_id
    assert Generation.open(tiny_bundle, provider="cpu", expected_bundle_id=served).bundle_id == served
    with pytest.raises(BundleError) as caught:
        Generation.open(exact_bundle, provider="cpu", expected_bundle_id=served)
    assert caught.value.cause == f"the bundle at {exact_bundle} is now {now}, the server serves {served}"
    assert caught.value.remedy == "restart the server to serve it, or put the old one back"


# --- Times and returns.


@pytest.fixture
def timed(timed_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of a model that sees times and returns, to damage."""
    return Path(shutil.copytree(timed_bundle, tmp_path / "timed"))


@pytest.mark.parametrize("name", [REQUEST, GAPS, RETURNS])
@pytest.mark.parametrize("make", [make_pipe, make_link_to_device, Path.mkdir])
def test_open_refuses_an_optional_file_that_is_none(timed: Path, name: str, make: Callable[[Path], None]) -> None:
    (timed / name).unlink()
    assert name in refusal(timed)
    make(timed / name)
    assert name in refusal(timed)


Arrays = dict[str, np.ndarray]
RETURNS_EDITS: dict[str, Callable[[Arrays], Arrays]] = {
    "one less": lambda r: {name: array for name, array in r.items() if name != "by_gap"},
    "one more": lambda r: r | {"more": r["bias"]},
    "other half-lives": lambda r: r | {"bias": r["bias"][:-1]},
    "other width": lambda r: r | {"by_user": r["by_user"][:, :-1].copy()},
    "other items": lambda r: r | {"by_item": r["by_item"][:-1]},
    "other buckets": lambda r: r | {"by_age": r["by_age"][:-1]},
    "float64": lambda r: r | {"by_gap": r["by_gap"].astype(np.float64)},
    "objects": lambda r: r | {"by_gap": r["by_gap"].astype(object)},
}


@pytest.mark.parametrize("edit", RETURNS_EDITS)
def test_open_refuses_weights_of_returns_that_cannot_be(timed: Path, edit: str) -> None:
    with np.load(timed / RETURNS) as arrays:
        changed = RETURNS_EDITS[edit]({name: arrays[name] for name in arrays.files})
    stream = io.BytesIO()
    np.savez(stream, **changed)  # type: ignore[arg-type]
    put(timed, RETURNS, stream.getvalue())
    assert RETURNS in refusal(timed)


@pytest.mark.parametrize("array", [np.zeros((63, 32), np.float32), np.zeros((64, 31), np.float32), np.zeros((64, 32))])
def test_open_refuses_other_embeddings_of_gaps(timed: Path, array: np.ndarray) -> None:
    put(timed, GAPS, npy(array))
    assert GAPS in refusal(timed)


def test_open_refuses_a_golden_replay_without_its_times(timed: Path) -> None:
    with np.load(timed / GOLDEN) as arrays:
        golden = {name: arrays[name] for name in arrays.files}
    for times in (None, golden["times"][:-1], golden["times"][:, :-1], golden["times"].astype(np.float64)):
        stream = io.BytesIO()
        np.savez(
            stream,
            **(
                {name: array for name, array in golden.items() if name != "times"}
                | ({} if times is None else {"times": times})
            ),
        )
        put(timed, GOLDEN, stream.getvalue())
        assert GOLDEN in refusal(timed)


@pytest.mark.parametrize("wrong", [{"times": "none"}, {"times": "events"}, {"sketch_items": 0}])
def test_open_refuses_files_that_do_not_belong_to_the_state(timed: Path, wrong: dict[str, Any]) -> None:
    rewrite_manifest(timed, state=replace(read_manifest(timed).state, **wrong))
    assert "files does not list exactly the files of a bundle" in refusal(timed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("times", "always"),
        ("times", 1),
        ("sketch_items", 513),
        ("sketch_items", "9"),
        ("longest_gap", -1),
        ("longest_gap", 2**41),
    ],
)
def test_open_refuses_times_and_sketches_that_cannot_be(timed: Path, name: str, value: object) -> None:
    manifest = json.loads((timed / MANIFEST).read_text())
    manifest["state"][name] = value
    write_fitting_manifest(timed, manifest)
    assert f"state.{name}" in refusal(timed)


def test_open_refuses_the_request_reader_of_another_model(timed: Path) -> None:
    put(timed, REQUEST, (timed / ABSTRACTION).read_bytes())
    assert REQUEST in refusal(timed, EncoderError)


# --- Random damage.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_bundle", "timed_bundle"])
def test_random_damage_is_refused_or_harmless(name: str, request: pytest.FixtureRequest) -> None:
    """In a process of its own, with bounded memory: a crash of ONNX Runtime would end it."""
    bundle = request.getfixturevalue(name)
    command = [sys.executable, str(ROOT / "tests" / "hostile_bundles.py"), str(bundle), "0", "1000", "6"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert counts["refused"] > 50 and counts["works"] > 5
