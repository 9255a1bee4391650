"""Which bundle serves whom, as a store keeps it for all servers. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple


class Rollout(NamedTuple):
    """Which bundles serve the users of a store, for all servers that take part."""

    revision: int = 0  # one more with each change
    active: str = ""  # id of the bundle that answers; "": none was activated, and servers use what they started with
    trial: str = ""  # id of a bundle that answers a share of the users instead; or ""
    share: float = 0.0  # of the users, 0 to 1
    prepared: str = ""  # id of a bundle that servers load, as it is about to answer; or ""
    bundles: Mapping[str, str] = {}  # by id, their directories, or "": a server that was started with one takes part

    def answering(self, own: str) -> str:
        """The id of the bundle that a server answers with, trials aside, if it was started with the bundle `own`."""
        return self.active if self.active and own in self.bundles else own

    def of(self, user_id: str) -> str:
        """The id of the bundle that serves a user."""
        if not self.trial:
            return self.active
        drawn = hashlib.blake2b(user_id.encode(), digest_size=8, salt=self.trial[:16].encode()).digest()
        return self.trial if int.from_bytes(drawn, "little") < self.share * 2.0**64 else self.active


NO_ROLLOUT = Rollout()


def checked_rollout(rollout: Rollout) -> Rollout:
    """The roll-out itself. ValueError where it names bundles that it does not have, or an impossible share."""
    named = {rollout.active, rollout.trial, rollout.prepared} - {""}
    shared = 0.0 < rollout.share <= 1.0 if rollout.trial else not rollout.share
    if not named <= rollout.bundles.keys() or not shared or (rollout.trial and not rollout.active):
        raise ValueError(f"{rollout!r:.200} is no roll-out")
    return rollout
