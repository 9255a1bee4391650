"""Bundles with changed files, by their documented format alone: `manifest.json` names sizes and checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

# Fields of the state that came later: not in the bundle id while they have these values.
LATER_FIELDS = {"times": "none", "sketch_items": 0, "closed": "full", "longest_gap": 1 << 40}
MANIFEST, ITEMS, EMBEDDINGS, GOLDEN = "manifest.json", "items.jsonl", "item_embeddings.npy", "golden.npz"


def read_manifest(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))


def write_manifest(bundle: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest with the bundle id that fits the rest of it."""
    content = {
        "format_version": manifest["format_version"],
        "state": {name: value for name, value in manifest["state"].items() if LATER_FIELDS.get(name) != value},
        "integer_item_ids": manifest["integer_item_ids"],
        "files": {name: entry["sha256"] for name, entry in manifest["files"].items()},
    }
    bundle_id = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    (bundle / MANIFEST).write_text(json.dumps(manifest | {"bundle_id": bundle_id}), encoding="utf-8")


def refit(bundle: Path, *names: str, **changes: Any) -> None:
    """Makes the manifest fit files that were changed, and changes fields of it."""
    manifest = read_manifest(bundle) | changes
    for name in names:
        content = (bundle / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    write_manifest(bundle, manifest)


def enlarge(bundle: Path, items: int) -> None:
    """Adds random items, whose ids are integers from a million on, until there are `items` of them."""
    embeddings = np.load(bundle / EMBEDDINGS)
    more = np.random.default_rng(0).normal(size=(items - len(embeddings), embeddings.shape[1]))
    np.save(bundle / EMBEDDINGS, np.concatenate([embeddings, more.astype(np.float32)]))
    with (bundle / ITEMS).open("a", encoding="utf-8") as file:
        for number in range(len(more)):
            entry = {"item_id": str(1_000_000 + number), "events": 1, "title": f"Added {number}"}
            file.write(json.dumps(entry) + "\n")
    refit(bundle, EMBEDDINGS, ITEMS, vocabulary=items)


def rename_items(bundle: Path, count: int) -> None:
    """Makes it a bundle of another catalogue: the first `count` items are gone, and there are as many new ones.

    Each item gets the embedding of another one, so the states of a history are others, too.
    """
    entries = [json.loads(line) for line in (bundle / ITEMS).read_text(encoding="utf-8").splitlines()]
    item_ids = [entry["item_id"] for entry in entries[count:]] + [str(2_000_000 + number) for number in range(count)]
    lines = [json.dumps(entry | {"item_id": item}) for entry, item in zip(entries, item_ids, strict=True)]
    (bundle / ITEMS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    refit(bundle, ITEMS)
