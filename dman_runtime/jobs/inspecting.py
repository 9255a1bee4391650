"""What a bundle, a store, or a user's state holds, for people. Writes nothing; works while a server runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dman_runtime.data.ids import id_problem
from dman_runtime.engine import Engine
from dman_runtime.errors import StoreMismatchError, UsageError
from dman_runtime.model.bundle import open_bundle
from dman_runtime.model.generation import Generation
from dman_runtime.store.opening import open_store
from dman_runtime.store.place import Place

RECENT_EVENTS = 20


def inspect_bundle(path: Path) -> dict[str, Any]:
    """Verifies every checksum. Raises BundleError."""
    manifest = open_bundle(path).manifest
    test = manifest.metrics.get("test", {})
    return {
        "path": str(path),
        "bundle_id": manifest.bundle_id,
        "format_version": manifest.format_version,
        "items": manifest.vocabulary,
        "bytes": sum(entry["bytes"] for entry in manifest.files.values()),
        "model": manifest.model,
        "state": vars(manifest.state),
        "test_metrics": {name: value for name, value in test.items() if "@" in name},
        "data": manifest.data,
        "export": manifest.export,
        "versions": manifest.versions,
    }


def inspect_store(place: Place) -> dict[str, Any]:
    """Raises StoreError."""
    with open_store(place, readonly=True) as store:
        return {"format_version": store.format_version, "generations": list(store.generations()), **vars(store.stats())}


def inspect_user(bundle_path: Path, state: Place, user_id: str) -> dict[str, Any]:
    """The user under the bundle, as a server would see it now. Raises UsageError, BundleError, StoreError."""
    if (problem := id_problem(user_id)) is not None:
        raise UsageError(f"user id {user_id!r:.80} {problem}", "give the id of a stored user", parameter="user")
    generation = Generation.open(bundle_path, provider="cpu")
    bundle = generation.bundle
    with open_store(state, readonly=True) as store:
        if bundle.bundle_id not in store.generations():
            raise StoreMismatchError(
                f"the state store {state} was never served with bundle {bundle.bundle_id}",
                f"name one of these bundles: {', '.join(store.generations()) or 'none yet'}",
                parameter="bundle",
            )
        engine = Engine(generation, store, reads_only=True)
        (user,) = engine.open_users([user_id])
        if not user.head.version:
            raise UsageError(f"no user {user_id!r} in {state}", "check the id", parameter="user")
        engine.advance([user])
        count = user.head.history_count
        numbers, timestamps = store.history(user_id, max(0, count - RECENT_EVENTS), count)
        item_ids = store.item_ids(numbers)
    titles = {
        item_id: bundle.items.titles[bundle.items.index[item_id]]
        for item_id in item_ids
        if item_id in bundle.items.index
    }
    return {
        "user_id": user_id,
        "bundle_id": bundle.bundle_id,
        "event_count": user.state.event_count,
        "history_count": count,
        "version": user.head.version,
        "record_is_current": not user.record_lags,
        "deferred_events": user.state.lacking,
        "state_bytes": len(generation.pack(user.state)),
        "context_positions": user.state.context_length,
        "user_embedding_norm": float(np.linalg.norm(user.state.user_embedding)),
        "memory_slot_norms": np.linalg.norm(user.state.memory.astype(np.float32), axis=-1).round(3).tolist(),
        "recent_events": [
            {"item_id": item_id, "title": titles.get(item_id, ""), "timestamp": time}
            for item_id, time in zip(item_ids, timestamps.tolist(), strict=True)
        ],
    }
