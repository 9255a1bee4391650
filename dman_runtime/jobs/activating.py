"""Changes which bundle serves whom: for all servers of a store in one moment, and only once they have all loaded it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dman_runtime.errors import BundleError, ConflictError, UsageError
from dman_runtime.presence import Present, present_at
from dman_runtime.store.base import StateStore
from dman_runtime.store.place import Place
from dman_runtime.store.rollout import Rollout

_ATTEMPTS = 20
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Activated:
    """What was changed."""

    rollout: Rollout
    before: str  # id of the bundle that answered before; "" where none was activated and no server runs
    servers: int  # processes that had loaded the bundle first
    caught_up: int = 0  # records that were brought up to date first

    def summary(self) -> str:
        """For people."""
        active, trial, share, count = self.rollout.active, self.rollout.trial, self.rollout.share, self.servers
        answers = f"bundle {active} answers"
        if trial:
            answers = f"bundle {trial} answers {share:.2%} of the users, and {active} the others"
        elif self.before not in ("", active):
            answers += f" instead of {self.before}"
        running = f"in {count} running server process{'es' if count != 1 else ''}" if count else "no server runs now"
        caught_up = f"; {self.caught_up} records were brought up to date first" if self.caught_up else ""
        return f"{answers}; {running}{caught_up}"


def activate(
    store: StateStore,
    state: Place,
    bundle_id: str,
    path: Path,
    *,
    share: float = 1.0,
    wait: float = 120.0,
    catch_up: Callable[[], int] = lambda: 0,
) -> Activated:
    """Lets the bundle at `path`, which was opened and checked, answer a share of the users; 1: all of them.

    Running servers load it first. Where one cannot, nothing changes. With a share below 1, the bundle that answers now
    goes on for the other users.

    Args:
        state: The place of the store, where servers say that they are there.
        wait: Seconds that servers get.
        catch_up: Brings records of the bundle up to date, and returns how many; called right before the change, so
            that few users have to be caught up when they are first touched.

    Raises UsageError, BundleError, ConflictError, StoreError.
    """
    servers = present_at(state, store)
    before = _answering(store.rollout(), servers)
    if share < 1 and before in ("", bundle_id):
        raise UsageError(
            f"a share of the users needs another bundle for the rest, and {before or 'none'} is active",
            "activate the other one first",
            parameter="share",
        )
    members = dict.fromkeys(store.generations(), "") | {one.bundle_id: one.path for one in servers}
    members[bundle_id] = str(path.resolve())
    try:
        prepared = _change(store, lambda rollout: _prepared(rollout, bundle_id, members))
        count = _wait_until_loaded(store, state, bundle_id, prepared, wait)
        caught_up = catch_up()
    except BaseException:  # also when interrupted, be it right after the change
        if store.rollout().prepared == bundle_id:
            _change(store, lambda rollout: rollout._replace(prepared=""))
        raise
    rollout = _change(store, lambda rollout: _answers(rollout, before, bundle_id, share))
    return Activated(rollout, before, count, caught_up)


def _answering(rollout: Rollout, servers: list[Present]) -> str:
    """The bundle that answers now, as far as there is one."""
    if rollout.active:
        return rollout.active
    started = {one.bundle_id for one in servers}
    if len(started) > 1:
        raise UsageError(
            f"servers of this store were started with different bundles: {', '.join(sorted(started))}",
            "start them with the same one",
        )
    return next(iter(started), "")


def _prepared(rollout: Rollout, bundle_id: str, members: dict[str, str]) -> Rollout:
    known = {name: path or rollout.bundles.get(name, "") for name, path in members.items()}
    return rollout._replace(prepared=bundle_id, bundles={**rollout.bundles, **known})


def _answers(rollout: Rollout, before: str, bundle_id: str, share: float) -> Rollout:
    if share < 1:
        return rollout._replace(prepared="", active=before, trial=bundle_id, share=share)
    return rollout._replace(prepared="", active=bundle_id, trial="", share=0.0)


def _change(store: StateStore, change: Callable[[Rollout], Rollout]) -> Rollout:
    for _ in range(_ATTEMPTS):
        before = store.rollout()
        after = change(before)._replace(revision=before.revision + 1)
        if store.set_rollout(after):
            return after
    raise ConflictError("others keep changing which bundle answers", "try again")


def _wait_until_loaded(store: StateStore, state: Place, bundle_id: str, rollout: Rollout, seconds: float) -> int:
    """Returns how many servers have loaded the bundle: all that take part. Raises BundleError."""
    deadline = time.monotonic() + seconds
    while True:
        servers = [one for one in present_at(state, store) if one.bundle_id in rollout.bundles]
        for one in servers:
            if bundle_id in one.failed:
                raise BundleError(
                    f"the server process {one.pid} cannot load bundle {bundle_id}: {one.failed[bundle_id]}",
                    "nothing was changed; mend that, and activate it again",
                )
        missing = [one.pid for one in servers if bundle_id not in one.loaded]
        if not missing:
            return len(servers)
        if time.monotonic() > deadline:
            raise BundleError(
                f"the server processes {', '.join(map(str, missing))} have not loaded bundle {bundle_id} within "
                f"{seconds:g} s",
                "nothing was changed; look at their logs, and activate it again",
            )
        time.sleep(_POLL_SECONDS)
