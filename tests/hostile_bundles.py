"""Bundles that somebody has damaged on purpose, with checksums and bundle id made to fit again.

As a script, one process that opens many of them: `python tests/hostile_bundles.py BUNDLE SEED COUNT SECONDS`. It prints
how many were refused and how many worked, and fails on anything else: another error, or more memory than it may take.
It opens at least LEAST of them, however long that takes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np

from dman_runtime.errors import BundleError, EncoderError
from dman_runtime.model.bundle import (
    EMBEDDINGS,
    FILES,
    GAPS,
    GOLDEN,
    GRAPHS,
    INITIAL_MEMORY,
    ITEMS,
    MANIFEST,
    PREDICTOR,
    REQUEST,
    RETURNS,
    StateShape,
)
from dman_runtime.model.events import without_times
from dman_runtime.model.generation import Generation

LEAST = 70
MEMORY_LIMIT = 4 << 30  # address space; a process that serves a tiny bundle takes about 1.5 GiB of it
VALUES = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, -0.5, 1e308, float("nan"), float("inf"), "", "x", "0", "-1",
    "a\nb", "\ud800", "x" * 1000, [], [[]], {}, {"a": 1},
]  # fmt: skip
Random = np.random.Generator
ANY_FILES = (*FILES, REQUEST, GAPS, RETURNS, PREDICTOR)
LATER = {
    f.name: f.default for f in fields(StateShape) if f.default is not MISSING
}  # not in the id while they say nothing


def write_fitting_manifest(bundle: Path, manifest: Any) -> None:
    """Writes this JSON value as the manifest, with sizes, checksums and bundle id that fit where it has any."""
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
        for name, entry in manifest["files"].items():
            if isinstance(entry, dict) and name in ANY_FILES and (bundle / name).is_file():
                content = (bundle / name).read_bytes()
                entry.update({"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)})
    write_manifest_with_id(bundle, manifest)


def write_manifest_with_id(bundle: Path, manifest: Any) -> None:
    try:
        content = {name: manifest[name] for name in ("format_version", "state", "integer_item_ids")}
        content["state"] = {name: value for name, value in content["state"].items() if LATER.get(name) != value}
        content["files"] = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        text = json.dumps(content, sort_keys=True)
        manifest["bundle_id"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    except (TypeError, KeyError, AttributeError):
        pass  # there is nothing that could fit
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Also where the file is a hard link to that of another bundle."""
    (bundle / name).unlink()
    (bundle / name).write_bytes(content)


def damage(bundle: Path, random: Random) -> str:
    """Changes one file of a bundle in a random way. Returns a description."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    name = str(random.choice([MANIFEST, *manifest["files"]]))
    (bundle / MANIFEST).unlink()
    if name == MANIFEST:
        what = _damaged_json(manifest, random)
        if random.random() < 0.5:
            write_manifest_with_id(bundle, manifest)
        else:
            write_fitting_manifest(bundle, manifest)
        if random.random() < 0.1:
            replace_file(bundle, MANIFEST, _damaged_bytes((bundle / MANIFEST).read_bytes(), random))
        return f"{name}: {what}"
    content = (bundle / name).read_bytes()
    if name == ITEMS and random.random() < 0.7:
        changed = _damaged_items(content, random)
    elif name in (GOLDEN, RETURNS, PREDICTOR) and random.random() < 0.7:
        changed = _damaged_archive(content, random)
    elif name in (EMBEDDINGS, INITIAL_MEMORY, GAPS) and random.random() < 0.7:
        changed = _damaged_header(content, random)
    elif name in (*GRAPHS, REQUEST) and random.random() < 0.5:
        changed = _damaged_graph(content, random)
    else:
        changed = _damaged_bytes(content, random)
    replace_file(bundle, name, changed)
    write_fitting_manifest(bundle, manifest)
    return f"{name}: {len(content)} bytes to {len(changed)}"


def _damaged_bytes(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    kind = random.integers(4)
    if kind == 0:
        return content[: int(random.integers(len(content)))]
    if kind == 1:
        return content + random.bytes(int(random.integers(1, 100)))
    if kind == 2:
        at, size = int(random.integers(len(content))), int(random.integers(1, 200))
        del changed[at : at + size]
        return bytes(changed)
    for _ in range(int(random.integers(1, 9))):
        changed[int(random.integers(len(changed)))] = int(random.integers(256))
    return bytes(changed)


def _damaged_json(value: Any, random: Random) -> str:
    """Replaces, removes or adds one value somewhere in an object, in place."""
    path = []
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return "/".join(map(str, path)) + " is empty"
        key = keys[int(random.integers(len(keys)))]
        path.append(key)
        if not isinstance(value[key], dict | list) or random.random() < 0.25:
            break
        value = value[key]
    chosen = VALUES[int(random.integers(len(VALUES)))]
    if random.random() < 0.1:
        del value[key]
    elif random.random() < 0.1 and isinstance(value, dict):
        value[str(chosen)[:9]] = chosen
    else:
        value[key] = chosen
    return f"{'/'.join(map(str, path))} is {chosen!r:.20}"


def _damaged_items(content: bytes, random: Random) -> bytes:
    lines = content.decode().splitlines()
    at = int(random.integers(len(lines)))
    entry = json.loads(lines[at])
    _damaged_json(entry, random)
    special = [
        json.dumps(entry),
        "[" * 5000,
        '{"item_id": "1", "item_id": "2", "events": 1}',
        '{"events":',
        "",
        lines[0],
    ]
    lines[at] = special[0 if random.random() < 0.7 else int(random.integers(len(special)))]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _damaged_header(content: bytes, random: Random) -> bytes:
    """Another digit, letter or number in the header of an .npy file."""
    header = content[10:128].decode("latin-1")
    numbers = [str(value) for value in (0, 1, 7, 10**9, 2**62, -3)]
    edits = [
        lambda: re.sub(r"\d+(?=[,)])", str(random.choice(numbers)), header, count=1),
        lambda: header.replace("<f4", str(random.choice(["<f8", ">f4", "|O", "<i4", "|V4", "|S0", "x"]))),
        lambda: header.replace("False", str(random.choice(["True", "1L", "[]", "((((", "0x" * 30]))),
        lambda: "".join(c if random.random() > 0.03 else chr(int(random.integers(32, 127))) for c in header),
    ]
    changed = edits[int(random.integers(len(edits)))]().encode("latin-1")[:118].ljust(118, b" ")
    return content[:10] + changed + content[128:]


def _damaged_archive(content: bytes, random: Random) -> bytes:
    with np.load(io.BytesIO(content)) as arrays:
        golden = {name: arrays[name] for name in arrays.files}
    name = str(random.choice(sorted(golden)))
    array = golden[name]
    choice = int(random.integers(8))
    if choice == 0:
        del golden[name]
    elif choice == 1:
        golden["more"] = array
    else:
        with np.errstate(all="ignore"):
            golden[name] = [
                lambda: array[:-1], lambda: array[:0], lambda: array.astype(np.float16), lambda: array.T,
                lambda: array * 10**6, lambda: -array,
            ][choice - 2]()  # fmt: skip
    stream = io.BytesIO()
    (np.savez if random.random() < 0.5 else np.savez_compressed)(stream, **golden)
    return stream.getvalue()


def _damaged_graph(content: bytes, random: Random) -> bytes:
    """A model that is still a protobuf message."""
    import onnx

    model = onnx.load_from_string(content)
    nodes, graph = list(model.graph.node), model.graph
    node = nodes[int(random.integers(len(nodes)))]
    choice = int(random.integers(7))
    if choice == 0:
        graph.node.remove(node)
    elif choice == 1:
        node.op_type = str(random.choice([other.op_type for other in nodes]))
    elif choice == 2 and node.input:
        node.input[int(random.integers(len(node.input)))] = str(random.choice([n.output[0] for n in nodes]))
    elif choice == 3:
        tensor = graph.initializer[int(random.integers(len(graph.initializer)))]
        tensor.data_type = int(random.integers(0, 24))
    elif choice == 4:
        tensor = graph.initializer[int(random.integers(len(graph.initializer)))]
        tensor.dims[:] = [int(size) for size in random.choice([-1, 0, 1, 7, 2**40], len(tensor.dims))]
    elif choice == 5:
        value = list(graph.input)[int(random.integers(len(graph.input)))]
        value.type.tensor_type.elem_type = int(random.integers(0, 17))
    elif node.attribute:
        attribute = node.attribute[int(random.integers(len(node.attribute)))]
        attribute.i = int(random.choice([-1, 0, 1, 5, 2**31, 2**62]))
    return model.SerializeToString()


def opened(bundle: Path) -> str:
    """How a hostile bundle ends: "refused" in one line, or "works". Anything else raises."""
    try:
        generation = Generation.open(bundle, provider="cpu")
        state = generation.replay(without_times([np.arange(7) % generation.bundle.manifest.vocabulary]))[0]
        assert generation.retriever.search(state.user_embedding[None], 3, exclude=[np.zeros(0, np.int64)])
        return "works"
    except (BundleError, EncoderError) as error:
        text = str(error)
        assert len(text.splitlines()) == 1 and text.isprintable() and len(text) < 400, text
        assert "/" not in text.replace(f"{bundle}/", "").replace(str(bundle), ""), text
        return "refused"


def main(bundle: Path, seed: int, count: int, seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    warnings.simplefilter("error")
    found, began = Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for case in range(seed, seed + count):
            copy = Path(shutil.copytree(bundle, Path(scratch) / f"b{case}"))
            description = damage(copy, np.random.default_rng(case))
            print(f"case {case}: {description!r}", file=sys.stderr, flush=True)
            found[opened(copy)] += 1
            shutil.rmtree(copy)
            if found.total() >= LEAST and time.monotonic() - began > seconds:
                break
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
