"""Random bits of the file are flipped: whatever is read is exactly right, or an error that is reported.

Each try reads everything in a child process, which may crash only as far as is said here.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dman_runtime.errors import StoreDamagedError, StoreError
from dman_runtime.store import files
from dman_runtime.store.base import StateStore, Write
from dman_runtime.store.lmdb import LmdbStore

USERS = [f"user-{number}" for number in range(80)]
STRANGERS = [*(f"user-{number}x" for number in range(0, 80, 5)), "zzz"]
ITEMS = [f"item-{number}" for number in range(300)]
Contents = dict[str, Any]


def fill(path: Path) -> None:
    """Histories of up to 300 events in one to three commits, small records, and two deletions."""
    random = np.random.default_rng(0)
    with LmdbStore.open(path, map_size=64 << 20) as store:
        store.add_items(ITEMS)
        store.add_generation("bundle")
        for part in range(3):
            for user_id in [*USERS, "gone", "away"]:
                (found,) = store.get_many([user_id], 1)
                items = random.integers(0, 300, random.integers(0, 100))
                ids = random.integers(0, 2**63, 12).tolist()
                version, records = found.head.version if found else 0, {1: b"record of " + user_id.encode() * 20}
                store.commit([Write(user_id, version, records, items, random.integers(0, 2**40, len(items)), ids)])
            store.delete(["none", "gone", "away"][part])


def readings(store: StateStore) -> dict[str, Callable[[], Any]]:
    """Everything that can be asked, by name."""
    asked: dict[str, Callable[[], Any]] = {"generations": store.generations, "scan": lambda: sorted(store.scan())}
    for item in ITEMS[::7]:
        asked[f"find {item}"] = lambda item=item: store.find_items([item]).tolist()
    for number in range(0, 300, 7):
        asked[f"item {number}"] = lambda number=number: store.item_ids([number])
    for user_id in [*USERS, *STRANGERS]:
        asked[f"head {user_id}"] = lambda user_id=user_id: [one and one.head for one in store.get_many([user_id], 1)]
        asked[f"record {user_id}"] = lambda user_id=user_id: [
            one and one.record for one in store.get_many([user_id], 1)
        ]
        asked[f"view {user_id}"] = lambda user_id=user_id: view_of(store, user_id)
        asked[f"history {user_id}"] = lambda user_id=user_id: [part.tolist() for part in store.history(user_id)]
        asked[f"seen {user_id}"] = lambda user_id=user_id: store.seen(user_id).tolist()
    return asked


def view_of(store: StateStore, user_id: str) -> Any:
    view = store.ranking_view(user_id, 1, 20)
    return view and (view.history_count, view.record, sorted(set(view.seen.tolist())))


def outcome_of(path: Path, expected: Contents) -> str:
    """What somebody who reads everything meets: right, refused, reported, or what must not be."""
    try:
        store = LmdbStore.open(path, map_size=64 << 20)
    except StoreError:
        return "refused"
    errors = missing_records = 0
    for name, read in readings(store).items():
        try:
            found = read()
        except StoreDamagedError:
            errors += 1
        except StoreError as error:
            return f"WRONG: {name}: {error!r}"
        else:
            if found != expected[name]:
                if name.startswith(("record", "view")) and without_record(found) == without_record(expected[name]):
                    missing_records += 1
                    continue
                return f"WRONG: {name}: {found!r:.200} instead of {expected[name]!r:.200}"
    return "reported" if errors else "rebuilt" if missing_records else "right"


def without_record(answer: Any) -> Any:
    """An answer as it is where the record is not there: it is made anew from the history."""
    if isinstance(answer, list):
        return []
    return answer and (answer[0], answer[2])


def in_child(work: Callable[[], str]) -> str:
    """The result of a function in a forked process, or how that ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(60)
            os.write(writing, pickle.dumps(work()))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return str(pickle.loads(answer)) if answer and not code else f"DIED: {code}"


def flip_bits(path: Path, random: np.random.Generator, count: int) -> list[int]:
    data = bytearray((path / "data.mdb").read_bytes())
    bits = random.integers(0, 8 * len(data), count).tolist()
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    (path / "data.mdb").write_bytes(data)
    return [int(bit) for bit in bits]


def tried(directory: Path, tries: int, *, seed: int, checked_bytes: int) -> tuple[Counter[str], list[str]]:
    """How often each outcome came, and what must not be, with the bits that did it."""
    whole = directory / "whole"
    fill(whole)
    with LmdbStore.open(whole, readonly=True) as store:
        expected = {name: read() for name, read in readings(store).items()}
    random, outcomes, bad = np.random.default_rng(seed), Counter[str](), []
    for number in range(tries):
        path = directory / "damaged" / str(number)
        shutil.copytree(whole, path)
        bits = flip_bits(path, random, int(random.choice([1, 1, 2, 8])))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_CHECKED_BYTES", checked_bytes)
            outcome = in_child(lambda path=path: outcome_of(path, expected))
        outcomes[outcome.partition(":")[0]] += 1
        if ":" in outcome:
            bad.append(f"{bits}: {outcome}")
        shutil.rmtree(directory / "damaged")
    return outcomes, bad


@pytest.mark.slow
def test_flipped_bits_are_never_read_as_something_else(tmp_path: Path) -> None:
    outcomes, bad = tried(tmp_path, 100, seed=1, checked_bytes=256 << 20)
    assert bad == []
    assert min(outcomes[name] for name in ("right", "refused", "reported")) > 0
