"""The bundle: one self-describing directory that holds all the runtime needs. Format: docs/formats.md.

Written by `dman_train.export`, read by everything else. A bundle is written under a temporary name and renamed, so a
directory with a manifest is complete; every file's SHA-256 is checked when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dman_runtime.errors import BundleError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ENCODER, ABSTRACTION = "segment_encoder.onnx", "memory_abstraction.onnx"
EMBEDDINGS, INITIAL_MEMORY, ITEMS, GOLDEN = "item_embeddings.npy", "initial_memory.npy", "items.jsonl", "golden.npz"
FILES = (ENCODER, ABSTRACTION, EMBEDDINGS, INITIAL_MEMORY, ITEMS, GOLDEN)
_NO_ITEMS = np.zeros(0, np.int64)
STATE_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class StateShape:
    """The sizes that a user's state depends on."""

    segment_length: int  # T
    memory_slots: int  # m; 0 when the model has no memory
    layers: int  # L
    width: int  # D
    recurrent: bool  # the context reaches into the previous segment
    dtype: str  # what hidden states and memory are stored as

    @property
    def context_limit(self) -> int:
        """Most positions a context can hold: a closed segment and an open one."""
        return 2 * self.segment_length


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. `bundle_id` is a hash over everything that can change an answer."""

    format_version: int
    bundle_id: str  # 16 hex digits
    model: dict[str, Any]  # ModelConfig of dman_train, for people and for retraining
    state: StateShape
    vocabulary: int  # V
    integer_item_ids: bool
    tensors: dict[str, dict[str, list[dict[str, Any]]]]  # graph -> inputs/outputs -> name, dtype, shape
    files: dict[str, dict[str, Any]]  # name -> sha256, bytes
    data: dict[str, Any] = field(default_factory=dict)  # filters and fingerprint of the training data
    metrics: dict[str, Any] = field(default_factory=dict)  # offline metrics with their protocol
    export: dict[str, Any] = field(default_factory=dict)  # torch-to-ONNX error and its tolerance
    versions: dict[str, str] = field(default_factory=dict)

    def content_hash(self) -> str:
        """What `bundle_id` must be."""
        content = {
            "format_version": self.format_version,
            "state": asdict(self.state),
            "integer_item_ids": self.integer_item_ids,
            "files": {name: entry["sha256"] for name, entry in self.files.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Items:
    """The vocabulary, in index order."""

    item_ids: list[str]
    popularity: np.ndarray  # (V) float64 share of the training events
    titles: list[str]  # "" where unknown
    attributes: list[dict[str, str]]
    index: dict[str, int]  # item id -> item index

    def indices(self, item_ids: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Item indices (int64) of the known ids in order, and the unknown ids."""
        if not item_ids:
            return _NO_ITEMS, []
        known, unknown = [], []
        for item_id in item_ids:
            index = self.index.get(item_id)
            if index is None:
                unknown.append(item_id)
            else:
                known.append(index)
        return np.array(known, np.int64), unknown


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle."""

    path: Path
    manifest: Manifest
    items: Items
    item_embeddings: np.ndarray  # (V, D) float32, memory-mapped
    initial_memory: np.ndarray  # (L, m, D) float32

    @property
    def bundle_id(self) -> str:
        return self.manifest.bundle_id

    def changed(self) -> str:
        return ""

    def golden(self) -> dict[str, np.ndarray]:
        """The recorded replay: `histories` (N, longest) with -1 as padding, `user_embeddings` (N, D), `memories`."""
        with np.load(self.path / GOLDEN, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, checked for form. Raises BundleError."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{path} is not a bundle ({MANIFEST} is missing)", "write one with python -m dman_train.export"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path / MANIFEST} cannot be read ({error})", "export the bundle again") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has bundle format {version}, this runtime reads format {FORMAT_VERSION}",
            "export it again with the version of dman that serves it",
        )
    try:
        manifest = Manifest(**{**content, "state": StateShape(**content["state"])})
        intact = manifest.content_hash() == manifest.bundle_id and set(manifest.files) == set(FILES)
    except (TypeError, KeyError, AttributeError):
        intact = False
    if not intact or manifest.state.dtype not in STATE_DTYPES:
        raise BundleError(f"{path / MANIFEST} is damaged or was edited", "export the bundle again")
    return manifest


def open_bundle(path: Path) -> Bundle:
    """Opens and verifies a bundle: every checksum, every shape. Raises BundleError."""
    manifest = read_manifest(path)
    for name in FILES:
        _check_file(path / name, manifest.files[name]["sha256"])
    shape = manifest.state
    embeddings = _load_array(path / EMBEDDINGS, (manifest.vocabulary, shape.width), memory_map=True)
    memory = _load_array(path / INITIAL_MEMORY, (shape.layers, shape.memory_slots, shape.width), memory_map=False)
    return Bundle(path, manifest, _read_items(path / ITEMS, manifest.vocabulary), embeddings, memory)


def _check_file(file: Path, expected: str) -> None:
    try:
        found = sha256(file)
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {os.strerror(error.errno or 0)}", "restore the bundle") from None
    if found != expected:
        raise BundleError(f"{file} does not match its checksum: the bundle is damaged", "copy or export it again")


def _load_array(file: Path, shape: tuple[int, ...], *, memory_map: bool) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r" if memory_map else None, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise BundleError(f"{file} is not an array ({error})", "export the bundle again") from None
    if array.shape != shape or array.dtype != np.float32:
        raise BundleError(
            f"{file} holds {array.dtype}{list(array.shape)}, expected float32{list(shape)}", "export again"
        )
    return np.asarray(array)  # np.memmap wraps the result of every indexing in Python


def _read_items(file: Path, vocabulary: int) -> Items:
    item_ids, counts, titles, attributes = [], [], [], []
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                item_ids.append(entry["item_id"])
                counts.append(entry["events"])
                titles.append(entry.get("title", ""))
                attributes.append(entry.get("attributes", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{file} line {len(item_ids) + 1} is malformed ({error})", "export the bundle again"
        ) from None
    index = {item_id: i for i, item_id in enumerate(item_ids)}
    if not len(item_ids) == len(index) == vocabulary:
        raise BundleError(f"{file} lists {len(index)} distinct items, expected {vocabulary}", "export the bundle again")
    popularity = np.array(counts, np.float64)
    return Items(item_ids, popularity / max(popularity.sum(), 1.0), titles, attributes, index)


def items_jsonl(entries: Iterable[dict[str, Any]]) -> str:
    """The content of items.jsonl: one object a line with item_id, events and optional title and attributes."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def write_bundle(path: Path, fill: Callable[[Path], dict[str, Any]]) -> Manifest:
    """Writes a bundle atomically: `fill` puts FILES into a temporary directory and returns the Manifest's other fields.

    An older bundle at `path` is replaced; any other directory there is an error. Raises BundleError.
    """
    if path.exists() and not _may_be_replaced(path):
        raise BundleError(f"{path} exists and is not a bundle", "choose another directory", parameter="out")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        details = fill(temporary)
        files = {
            name: {"sha256": sha256(temporary / name), "bytes": (temporary / name).stat().st_size} for name in FILES
        }
        manifest = Manifest(format_version=FORMAT_VERSION, bundle_id="", files=files, **details)
        manifest = Manifest(**{**vars(manifest), "bundle_id": manifest.content_hash()})
        (temporary / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        _sync(temporary)
        _replace_directory(temporary, path)
    except OSError as error:
        raise BundleError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _may_be_replaced(path: Path) -> bool:
    """An empty directory or an older bundle, of whatever format; nothing else is ours to delete."""
    if not path.is_dir():
        return False
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(manifest, dict) and {"format_version", "bundle_id"} <= set(manifest)
    except (OSError, ValueError):
        return not any(path.iterdir())


def _sync(directory: Path) -> None:
    for entry in [*directory.iterdir(), directory]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace_directory(new: Path, path: Path) -> None:
    """Puts `new` in place of `path`; a directory cannot be renamed over one that has content."""
    old = path.with_name(f"{new.name}.old")
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
