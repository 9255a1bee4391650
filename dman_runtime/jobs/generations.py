"""Which bundles a store has states of, how complete they are, and what they take; dropping those of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dman_runtime.errors import UsageError
from dman_runtime.model.record import HEADER_BYTES, covered_events, lacks_events
from dman_runtime.presence import Present
from dman_runtime.store.base import StateStore


@dataclass
class GenerationInfo:
    """The records that a store has of one bundle."""

    number: int
    bundle_id: str
    records: int = 0  # users who have one
    current: int = 0  # of those: records that cover the history and lack no event of it
    bytes: int = 0
    share: float = 0.0  # of the users that it was activated for


@dataclass(frozen=True)
class Generations:
    users: int  # of the store
    generations: Sequence[GenerationInfo]  # oldest first


def list_generations(store: StateStore) -> Generations:
    """Reads the start of every record. Raises StoreError."""
    rollout = store.rollout()
    shares = {rollout.active: 1 - rollout.share, rollout.trial: rollout.share}
    found = {
        number: GenerationInfo(number, bundle_id, share=shares.get(bundle_id, 0.0))
        for bundle_id, number in store.generations().items()
    }
    for record in store.records(HEADER_BYTES):
        if (info := found.get(record.generation)) is None:  # added since the list was read
            continue
        info.records += 1
        info.current += covered_events(record.start) == record.history_count and not lacks_events(record.start)
        info.bytes += record.size
    return Generations(store.stats().users, list(found.values()))


def format_generations(found: Generations) -> str:
    """For people: one line per generation."""
    head = f"{'generation':>10}  {'bundle':16}  {'records':>11}  {'current':>11}  {'MB':>9}  activated for"
    rows = [
        f"{one.number:>10}  {one.bundle_id:16}  {one.records:>11,}  {one.current:>11,}  {one.bytes / 1e6:>9,.1f}  "
        + (f"{one.share:.2%}" if one.share else "-")
        for one in found.generations
    ]
    lines = [f"{found.users:,} users", head, *rows]
    return "\n".join(lines)


def drop_generation(store: StateStore, bundle_id: str, servers: Sequence[Present] = ()) -> int:
    """Removes all records of a bundle; returns how many there were. Histories stay.

    Raises UsageError for a bundle that some `servers`, or the next ones, answer with; StoreError.
    """
    known, rollout = store.generations(), store.rollout()
    answering = {rollout.active, rollout.trial, rollout.prepared}
    answering |= {rollout.answering(one.bundle_id) for one in servers}
    if bundle_id in answering:
        raise UsageError(f"bundle {bundle_id} answers, or is about to", "activate another one first")
    if bundle_id not in known:
        raise UsageError(
            f"the store was never served with bundle {bundle_id!r:.80}",
            f"name one of these: {', '.join(known) or 'none yet'}",
        )
    return store.drop_records(known[bundle_id])
