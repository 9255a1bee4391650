"""How many bytes a store holds for a user, in two checkouts."""

from __future__ import annotations

import uuid

from dman_runtime.model.bundle import StateShape
from dman_runtime.store.history import CHUNK_EVENTS
from dman_train.config import ModelConfig
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.comparison import OTHER, THIS, Comparison
from tools.bench.report import Claim, Section
from tools.bench.servers import connect
from tools.bench.setting import Bench
from tools.loadgen import CALL_SECONDS, add_events

MAX_BYTES = 24_000  # record and head of a user, at the default sizes
SIZES = ("segment_length", "memory_slots", "layers", "width")
USERS, REQUEST_IDS = 5, 16
NOT_PER_STATE = ("meta", "item", "generation", "history", "seen")  # how the names of the other databases begin


def stored_sizes(comparison: Comparison) -> list[Section]:
    """Bytes of a user in the store: record and head."""
    shape = comparison.bench.bundle.manifest.state
    events = _event_count(shape.segment_length)
    with comparison.servers("stored") as addresses:
        reported = {side: _store_users(comparison.bench, address, events) for side, address in addresses.items()}
    databases = comparison.stored("stored")
    per_user = {
        side: sum(size for name, (_, size) in found.items() if not name.startswith(NOT_PER_STATE)) / USERS
        for side, found in databases.items()
    }
    limited = has_default_sizes(shape)
    section = Section(
        "Stored bytes",
        f"{USERS} users with {events} events each: the open segment has room for one more, which is when a record is "
        f"largest. The head holds {events % CHUNK_EVENTS} events that fill no chunk of {CHUNK_EVENTS} yet: then "
        "a head of this checkout is largest, too. The last "
        f"{REQUEST_IDS} events came one by one, each with a request id. Values in LMDB were counted after the servers "
        "had stopped. "
        "Record and head are the values of all databases except those whose names begin with "
        f"{', '.join(NOT_PER_STATE)}. `state_bytes` is what `GetUser` says.",
        [
            Claim(
                "record and head of a user",
                f"{per_user[THIS]:.0f} B ({per_user[OTHER]:.0f} B in the other checkout)",
                f"<= {MAX_BYTES} B" if limited else "none at these sizes",
                per_user[THIS] <= MAX_BYTES if limited else None,
            )
        ],
        ("checkout", "what", "values", "bytes a user"),
        [
            row
            for side in databases
            for row in (
                *([side, f"`{name}`", str(n), f"{size / USERS:.0f}"] for name, (n, size) in databases[side].items()),
                [side, "record and head", "", f"{per_user[side]:.0f}"],
                [side, "`state_bytes`", "", str(reported[side])],
            )
        ],
        {"databases": databases, "record_and_head": per_user, "state_bytes": reported},
    )
    return [section]


def has_default_sizes(shape: StateShape) -> bool:
    """Whether states are of the default preset, which limits of bytes hold for."""
    default = ModelConfig()
    same = all(getattr(shape, name) == getattr(default, name) for name in SIZES)
    return same and shape.dtype == "float16" and shape.closed == default.closed_states


def _event_count(segment_length: int) -> int:
    """When a record is as large as it gets, and as many events as possible fill no chunk yet."""
    full_but_one = [segments * segment_length - 1 for segments in range(3, 3 + CHUNK_EVENTS)]
    return max(full_but_one, key=lambda events: events % CHUNK_EVENTS)


def _store_users(bench: Bench, address: str, events: int) -> int:
    """Gives the users their events; the largest `state_bytes`."""
    users, sizes = [f"stored-{number}" for number in range(USERS)], []
    alone = min(REQUEST_IDS, events)
    with connect(address) as channel:
        stub = RecommenderStub(channel)
        histories = {user: bench.history(user, events) for user in users}
        add_events(channel, {user: items[: events - alone] for user, items in histories.items()})
        for user, items in histories.items():
            for item in items[events - alone :]:
                stub.Update(
                    pb.UpdateRequest(user_id=user, events=[pb.Event(item_id=item)], request_id=uuid.uuid4().hex),
                    timeout=CALL_SECONDS,
                )
            sizes.append(stub.GetUser(pb.GetUserRequest(user_id=user), timeout=CALL_SECONDS).state_bytes)
    return max(sizes)
