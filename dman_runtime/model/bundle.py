"""The bundle: one self-describing directory that holds all the runtime needs. Format: docs/formats.md.

Written by `bundle_writer`, read by everything else. Opening trusts nothing: each file is read once into private memory,
and what was checked is what is used. Changes on disk cannot reach an opened bundle; `Bundle.changed` tells of them.
Only the tables of large catalogues are mapped, so that workers share them: those files must never change.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dman_runtime.data.arrays import MAX_HEADER_BYTES, parse_npy, parse_npz
from dman_runtime.data.untrusted import (
    FileIdentity,
    opened_file,
    read_aligned,
    read_mapped,
    read_stream,
    sha256_of,
    system_reason,
)
from dman_runtime.errors import BundleError, InputError, replaced_bundle
from dman_runtime.model.items import MAX_LINE_BYTES, Items, items_jsonl, parse_items
from dman_runtime.model.manifest import (
    ABSTRACTION,
    EMBEDDINGS,
    ENCODER,
    FILES,
    FORMAT_VERSION,
    GAPS,
    GOLDEN,
    GRAPHS,
    INDEX,
    INITIAL_MEMORY,
    ITEMS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    PREDICTOR,
    REQUEST,
    RETURNS,
    SEARCH,
    STATE_DTYPES,
    Manifest,
    StateShape,
    files_of,
    graphs_of,
    parse_manifest,
)
from dman_runtime.model.predictor import Predictor, max_predictor_bytes, parse_predictor
from dman_runtime.model.sketch import HALF_LIVES
from dman_runtime.model.times import BUCKETS
from dman_runtime.retrieval.index import ItemIndex, faiss, max_index_bytes

__all__ = [
    "ABSTRACTION",
    "EMBEDDINGS",
    "ENCODER",
    "FILES",
    "FORMAT_VERSION",
    "GAPS",
    "GOLDEN",
    "GRAPHS",
    "INDEX",
    "INITIAL_MEMORY",
    "ITEMS",
    "MANIFEST",
    "PREDICTOR",
    "REQUEST",
    "RETURNS",
    "SEARCH",
    "STATE_DTYPES",
    "Bundle",
    "Items",
    "Manifest",
    "StateShape",
    "files_of",
    "graphs_of",
    "items_jsonl",
    "open_bundle",
    "read_manifest",
]

logger = logging.getLogger(__name__)
MAPPED_BYTES = 64 << 20  # tables from here on are mapped; one of 3,000 items has 2 MB
MAX_GRAPH_BYTES = (1 << 31) - 1  # a protobuf message has no more
MAX_GOLDEN_HISTORIES, MAX_GOLDEN_SEGMENTS = 16, 16  # the exporter writes 7 histories of up to 6.1 segments
_ARCHIVE_BYTES = 4096  # names and headers of an .npz file; beyond its arrays
_EXPORT_AGAIN = "export the bundle again"


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle, in memory of its own."""

    path: Path
    manifest: Manifest
    items: Items
    item_embeddings: np.ndarray  # (V, D) float32, read-only
    initial_memory: np.ndarray  # (L, m, D) float32, read-only
    gap_embeddings: np.ndarray | None = None  # (BUCKETS, D) float32 added to an item by the time since the event before
    returns: Mapping[str, np.ndarray] = field(default_factory=dict)  # weights of the term for items that come back
    graphs: Mapping[str, bytes] = field(default_factory=dict)  # the ONNX files by name
    recorded: Mapping[str, np.ndarray] = field(default_factory=dict)  # what `golden` gives
    identities: Mapping[str, FileIdentity] = field(default_factory=dict)  # of the files when they were read
    predictor: Predictor | None = None  # of the embeddings of new items
    index: ItemIndex | None = None  # of the items that training knew, where search goes through one
    added: int = 0  # how many of the V items, the last ones, were added at run time (`additions`)

    @property
    def bundle_id(self) -> str:
        return self.manifest.bundle_id

    def golden(self) -> Mapping[str, np.ndarray]:
        """The recorded replay: `histories` (N, longest) with -1 as padding, `user_embeddings` (N, D), `memories`."""
        return self.recorded

    def changed(self) -> str:
        """What happened to the files since they were read, for people; "" for nothing. One `stat` a file."""
        for name, identity in self.identities.items():
            try:
                now = FileIdentity.of((self.path / name).stat())
            except OSError as error:
                return f"{name} cannot be read: {system_reason(error)}"
            if now[:2] != identity[:2]:
                return f"{name} was replaced"
            if now != identity:
                return f"{name} was overwritten"
        return ""


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, with every value checked. Raises BundleError."""
    with _opened_directory(path) as directory:
        return _read_manifest(path, directory)[0]


def open_bundle(path: Path, *, expected_bundle_id: str | None = None) -> Bundle:
    """Opens and verifies a bundle: every size, type, shape and checksum.

    Raises BundleError, also for another bundle than the one expected.
    """
    with _opened_directory(path) as directory:
        manifest, identity = _read_manifest(path, directory)
        if expected_bundle_id is not None and manifest.bundle_id != expected_bundle_id:
            raise replaced_bundle(path, found=manifest.bundle_id, served=expected_bundle_id)
        _require_memory(path, manifest)
        files = _Files(path, directory, manifest)
        shape, items = manifest.state, manifest.vocabulary
        return Bundle(
            path,
            manifest,
            item_embeddings=files.array(EMBEDDINGS, (items, shape.width)),
            initial_memory=files.array(INITIAL_MEMORY, (shape.layers, shape.memory_slots, shape.width)),
            items=files.items(),
            gap_embeddings=files.array(GAPS, (BUCKETS, shape.width)) if shape.sees_times else None,
            returns=files.returns() if shape.sketch_items else {},
            graphs=files.graphs(),
            recorded=files.golden(),
            predictor=files.predictor() if PREDICTOR in manifest.files else None,
            index=files.index() if INDEX in manifest.files else None,
            identities={MANIFEST: identity, **files.identities},
        )


@contextmanager
def _opened_directory(path: Path) -> Iterator[int]:
    """Its descriptor: all files come from one directory, even if another one takes its name meanwhile."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _no_bundle(path) from None
    except OSError as error:
        raise BundleError(f"{path / MANIFEST} cannot be read: {system_reason(error)}", _EXPORT_AGAIN) from None
    try:
        yield directory
    finally:
        os.close(directory)


def _no_bundle(path: Path) -> BundleError:
    return BundleError(f"{path} is not a bundle ({MANIFEST} is missing)", "write one with python -m dman_train.export")


def _read_manifest(path: Path, directory: int) -> tuple[Manifest, FileIdentity]:
    file = path / MANIFEST
    try:
        with opened_file(file, limit=MAX_MANIFEST_BYTES, directory=directory) as (stream, identity):
            content = read_stream(file, stream, identity.size)
    except FileNotFoundError:
        raise _no_bundle(path) from None
    except InputError as error:
        raise BundleError(error.cause, _EXPORT_AGAIN) from None
    return parse_manifest(content, file), identity


def _require_memory(path: Path, manifest: Manifest) -> None:
    """Refuses what cannot fit: a sparse file can claim any size at no cost."""
    needed = sum(entry["bytes"] for entry in manifest.files.values())
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise BundleError(
            f"{path} needs {needed >> 20} MiB of memory, this machine has {available >> 20}", "use a larger machine"
        )


class _Files:
    """The files of a bundle, each of them read once. All methods raise BundleError."""

    def __init__(self, path: Path, directory: int, manifest: Manifest) -> None:
        self._path, self._directory, self._manifest = path, directory, manifest
        self.identities: dict[str, FileIdentity] = {}

    def read(self, name: str, *, limit: int, read: Callable[[Path, BinaryIO, int], Any] = read_stream) -> Any:
        """The content of a file whose size and checksum are those of the manifest."""
        file, entry = self._path / name, self._manifest.files[name]
        try:
            with opened_file(file, limit=limit, directory=self._directory) as (stream, identity):
                if identity.size != entry["bytes"]:
                    problem = f"has {identity.size} bytes instead of {entry['bytes']}, so it"
                    raise _damaged(file, problem)
                content = read(file, stream, identity.size)
        except FileNotFoundError as error:
            raise BundleError(f"{file} cannot be read: {system_reason(error)}", "restore the bundle") from None
        except InputError as error:
            raise BundleError(error.cause, "restore the bundle") from None
        if sha256_of(content) != entry["sha256"]:
            raise _damaged(file)
        self.identities[name] = identity
        return content

    def graphs(self) -> dict[str, bytes]:
        names = [*graphs_of(self._manifest.state), *({SEARCH} & set(self._manifest.files))]
        return {name: self.read(name, limit=MAX_GRAPH_BYTES) for name in names}

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        size = 4 * math.prod(shape)
        read = read_aligned if size < MAPPED_BYTES else read_mapped
        content = self.read(name, limit=size + 2 * MAX_HEADER_BYTES, read=read)
        with self._understood(name):
            return parse_npy(content, "float32", shape)

    def items(self) -> Items:
        count = self._manifest.vocabulary
        content = self.read(ITEMS, limit=count * MAX_LINE_BYTES)
        with self._understood(ITEMS):
            return parse_items(content, count, integer_item_ids=self._manifest.integer_item_ids)

    def returns(self) -> dict[str, np.ndarray]:
        """The arrays that `sketch.return_scores` takes."""
        shape, items, lives = self._manifest.state, self._manifest.vocabulary, len(HALF_LIVES)
        arrays: dict[str, tuple[str, tuple[int | None, ...]]] = {
            "by_user": ("float32", (lives, shape.width)),
            "bias": ("float32", (lives,)),
            "by_item": ("float32", (items, lives)),
            "by_age": ("float32", (BUCKETS,)),
        }
        if shape.sees_times:
            arrays["by_gap"] = ("float32", (BUCKETS,))
        limit = 4 * lives * (shape.width + 1 + items) + 8 * BUCKETS + _ARCHIVE_BYTES
        content = self.read(RETURNS, limit=limit + _ARCHIVE_BYTES)
        with self._understood(RETURNS):
            return parse_npz(content, arrays, limit=limit)

    def golden(self) -> dict[str, np.ndarray]:
        """The arrays that `Bundle.golden` describes."""
        shape, rows = self._manifest.state, MAX_GOLDEN_HISTORIES
        longest = MAX_GOLDEN_SEGMENTS * shape.segment_length
        limit = rows * (8 * longest + 4 * shape.width * (1 + shape.layers * shape.memory_slots)) + _ARCHIVE_BYTES
        arrays: dict[str, tuple[str, tuple[int | None, ...]]] = {
            "histories": ("int64", (None, None)),
            "user_embeddings": ("float32", (None, shape.width)),
            "memories": ("float32", (None, shape.layers, shape.memory_slots, shape.width)),
        }
        if shape.sees_times:
            arrays["times"] = ("int64", (None, None))
            limit += rows * 8 * longest
        content = self.read(GOLDEN, limit=limit + _ARCHIVE_BYTES)
        with self._understood(GOLDEN):
            golden = parse_npz(content, arrays, limit=limit)
            _check_golden(golden, self._manifest.vocabulary, longest=longest)
            return golden

    def predictor(self) -> Predictor:
        width = self._manifest.state.width
        content = self.read(PREDICTOR, limit=max_predictor_bytes(width))
        with self._understood(PREDICTOR):
            return parse_predictor(content, width)

    def index(self) -> ItemIndex | None:
        """None where FAISS is not installed: then search is exact."""
        items, width = self._manifest.vocabulary, self._manifest.state.width
        if faiss() is None:
            logger.warning(
                "bundle %s is made to be searched through an index, but FAISS is not installed: searching all %d items "
                "takes many times as long; install dman[ann]",
                self._manifest.bundle_id, items,
            )  # fmt: skip
            return None
        self.read(INDEX, limit=max_index_bytes(items, width), read=read_mapped)  # it is what the manifest says
        with self._understood(INDEX):
            index = ItemIndex.open(self._path / INDEX, items=items, width=width)
        if FileIdentity.of(os.stat(INDEX, dir_fd=self._directory)) != self.identities[INDEX]:
            raise _damaged(self._path / INDEX, "was changed while it was opened, so it")
        return index

    @contextmanager
    def _understood(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise BundleError(f"{self._path / name} {error}", _EXPORT_AGAIN) from None


def _damaged(file: Path, problem: str = "") -> BundleError:
    subject = f"{file} {problem}" if problem else str(file)
    return BundleError(f"{subject} does not match its checksum: the bundle is damaged", "copy or export it again")


def _check_golden(golden: Mapping[str, np.ndarray], vocabulary: int, *, longest: int) -> None:
    """Raises ValueError for arrays that do not fit together, or histories that cannot be replayed."""
    histories = golden["histories"]
    count, length = histories.shape
    if not 1 <= count <= MAX_GOLDEN_HISTORIES or not 1 <= length <= longest:
        raise ValueError(
            f"holds {count} histories of up to {length} events, expected 1 to {MAX_GOLDEN_HISTORIES} of up to {longest}"
        )
    if any(len(values) != count for values in golden.values()) or golden.get("times", histories).shape[1] != length:
        raise ValueError("holds arrays of different lengths")
    real = histories >= 0
    if histories.min() < -1 or histories.max() >= vocabulary or (real[:, 1:] > real[:, :-1]).any():
        raise ValueError("holds a history that is not one of item indices, padded with -1 on the right")
