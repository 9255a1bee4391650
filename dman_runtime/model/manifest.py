"""manifest.json: what a bundle is. Read with every type and size checked; format: docs/formats.md."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dman_runtime.data.untrusted import is_whole_number, parse_json, shown
from dman_runtime.errors import BundleError
from dman_runtime.model.times import ANY_GAP

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ENCODER, ABSTRACTION = "segment_encoder.onnx", "memory_abstraction.onnx"
REQUEST, GAPS, RETURNS = "request_reader.onnx", "gap_embeddings.npy", "returns.npz"  # of some models only
EMBEDDINGS, INITIAL_MEMORY, ITEMS, GOLDEN = "item_embeddings.npy", "initial_memory.npy", "items.jsonl", "golden.npz"
GRAPHS = (ENCODER, ABSTRACTION)
FILES = (*GRAPHS, EMBEDDINGS, INITIAL_MEMORY, ITEMS, GOLDEN)
PREDICTOR = "predictor.npz"  # of bundles that predict the embeddings of new items
INDEX = "item_index.faiss"  # of bundles whose catalogue is searched through an index
SEARCH = "item_search.onnx"  # of large catalogues: finds the best items on a device
OPTIONAL = (PREDICTOR, INDEX, SEARCH)
STATE_DTYPES = ("float16", "float32")
CLOSED = ("full", "int8")  # in the precision of the state; as whole numbers of steps, see `rounding`
TIMES = ("none", "events", "request")
MAX_MANIFEST_BYTES = 1 << 20
MAX_VOCABULARY = 100_000_000
MAX_STATE_BYTES = 64 << 20  # of one user in float32; the default model has 50 kB
MAX_FILE_BYTES = 1 << 50  # keeps sums of sizes far below 64 bits; each file has its own, lower limit
# The ranges that training has for the same sizes (`dman_train.config`), and 0 slots for a model without memory.
SIZE_LIMITS = {"segment_length": (1, 512), "memory_slots": (0, 512), "layers": (1, 16), "width": (1, 4096)}


@dataclass(frozen=True)
class StateShape:
    """The sizes that a user's state depends on."""

    segment_length: int  # T
    memory_slots: int  # m; 0 when the model has no memory
    layers: int  # L
    width: int  # D
    recurrent: bool  # the context reaches into the previous segment
    dtype: str  # what hidden states and memory are stored as
    times: str = "none"  # one of TIMES: what the model sees of times
    sketch_items: int = 0  # R; 0 for a model that does not count what users come back to
    closed: str = "full"  # one of CLOSED: how the hidden states of a closed segment are kept
    longest_gap: int = ANY_GAP  # seconds; a request later than that after the last event counts as that late

    @property
    def sees_times(self) -> bool:
        return self.times != "none"

    @property
    def answers_read_states(self) -> bool:
        """Whether an answer depends on more than the user embedding. Then a full segment stays open until the next
        event, as in training: the answer must not see the memory that is made of it."""
        return self.times == "request" or self.sketch_items > 0

    @property
    def closed_segments(self) -> int:
        """How many closed segments the context holds before the memory absorbs them."""
        return 1 if self.recurrent else 0

    @property
    def context_limit(self) -> int:
        """Most positions a context can hold: its closed segments and an open one."""
        return (self.closed_segments + 1) * self.segment_length


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
    new_items: dict[str, Any] = field(default_factory=dict)  # what the predictor is worth, on items held out
    search: dict[str, Any] = field(default_factory=dict)  # what the index finds, measured at export

    def content_hash(self) -> str:
        """What `bundle_id` must be."""
        content = {
            "format_version": self.format_version,
            "state": _without_defaults(self.state),
            "integer_item_ids": self.integer_item_ids,
            "files": {name: entry["sha256"] for name, entry in self.files.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def graphs_of(state: StateShape) -> tuple[str, ...]:
    """The names of the graphs in a bundle."""
    return (*GRAPHS, REQUEST) if state.times == "request" else GRAPHS


def files_of(state: StateShape) -> tuple[str, ...]:
    """The names of the files that a bundle has beside its manifest; it may have the OPTIONAL ones too."""
    optional = ((REQUEST, state.times == "request"), (GAPS, state.sees_times), (RETURNS, state.sketch_items > 0))
    return (*FILES, *(name for name, there in optional if there))


def _without_defaults(state: StateShape) -> dict[str, Any]:
    """The fields, without those that came later and say nothing: the ids of older bundles stay what they are."""
    values = asdict(state)
    return {f.name: values[f.name] for f in fields(StateShape) if f.default is MISSING or values[f.name] != f.default}


def parse_manifest(content: bytes, file: Path) -> Manifest:
    """The manifest in the content of `file`, with every value checked. Raises BundleError."""
    try:
        values = parse_json(content)
    except ValueError as error:
        raise BundleError(f"{file} cannot be read ({error})", "export the bundle again") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise BundleError(
            f"{file.parent} has bundle format {shown(version)}, this runtime reads format {FORMAT_VERSION}",
            "export it again with the version of dman that serves it",
        )
    try:
        _check(values)
        manifest = Manifest(**values | {"state": StateShape(**values["state"])})
        _require(manifest.content_hash() == manifest.bundle_id, "its bundle id does not fit its content")
    except ValueError as error:
        raise BundleError(f"{file} is damaged or was edited: {error}", "export the bundle again") from None
    return manifest


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _check(values: dict[str, Any]) -> None:
    """Raises ValueError if the content of a manifest is not what the class describes."""
    required = {f.name for f in fields(Manifest) if f.default_factory is MISSING}
    if missing := sorted(required - set(values)):
        raise ValueError(f"it lacks {', '.join(missing)}")
    if unknown := sorted(set(values) - {f.name for f in fields(Manifest)}):
        raise ValueError(f"it has an unknown field {shown(unknown[0])}")
    for name in ("model", "tensors", "data", "metrics", "export", "versions", "new_items", "search"):
        _require(isinstance(values.get(name, {}), dict), f"{name} is not an object")
    _require(isinstance(values.get("metrics", {}).get("test", {}), dict), "metrics.test is not an object")
    _require(_is_hex(values["bundle_id"], 16), "bundle_id is not 16 hex digits")
    _require_number("vocabulary", values["vocabulary"], 1, MAX_VOCABULARY)
    _require(isinstance(values["integer_item_ids"], bool), "integer_item_ids is neither true nor false")
    _check_state(values["state"])
    _check_files(values["files"], files_of(StateShape(**values["state"])))


def _check_state(state: object) -> None:
    known = {f.name: f.default is MISSING for f in fields(StateShape)}
    required = {name for name, needed in known.items() if needed}
    if not isinstance(state, dict) or not required <= set(state) <= set(known):
        raise ValueError("state does not have exactly its fields")
    for name, (low, high) in SIZE_LIMITS.items():
        _require_number(f"state.{name}", state[name], low, high)
    _require(isinstance(state["recurrent"], bool), "state.recurrent is neither true nor false")
    _require(state["dtype"] in STATE_DTYPES, f"state.dtype is {shown(state['dtype'])}")
    _require(state.get("times", "none") in TIMES, f"state.times is {shown(state.get('times'))}")
    _require(state.get("closed", "full") in CLOSED, f"state.closed is {shown(state.get('closed'))}")
    _require_number("state.sketch_items", state.get("sketch_items", 0), 0, 512)
    _require_number("state.longest_gap", state.get("longest_gap", 0), 0, ANY_GAP)
    shape = StateShape(**state)
    size = 4 * shape.layers * shape.width * (shape.context_limit + shape.memory_slots)
    _require(size <= MAX_STATE_BYTES, f"a state would have {size} bytes, more than {MAX_STATE_BYTES}")


def _check_files(files: object, expected: tuple[str, ...]) -> None:
    if not isinstance(files, dict) or set(files) - set(OPTIONAL) != set(expected):
        raise ValueError("files does not list exactly the files of a bundle")
    for name, entry in files.items():
        if not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"}:
            raise ValueError(f"the entry of {name} does not have exactly sha256 and bytes")
        _require(_is_hex(entry["sha256"], 64), f"the sha256 of {name} is not 64 hex digits")
        _require_number(f"the size of {name}", entry["bytes"], 0, MAX_FILE_BYTES)


def _require_number(what: str, value: object, low: int, high: int) -> None:
    _require(is_whole_number(value, low, high), f"{what} is {shown(value)}, expected {low} to {high}")


def _is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None
