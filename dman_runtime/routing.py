"""Which of the bundles that a server has loaded serves whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dman_runtime.errors import NotLoadedError
from dman_runtime.projection import Projection
from dman_runtime.store.base import StateStore
from dman_runtime.store.catalogue import Standing
from dman_runtime.store.rollout import NO_ROLLOUT, Rollout


class Router:
    """Follows the roll-out of a store, if the bundle that the server was started with takes part in it.

    A roll-out changes for all servers of a store in one moment, as every request asks the store. May be called from any
    thread.
    """

    def __init__(self, own: Projection, store: StateStore) -> None:
        """`own`: of the bundle that the server was started with."""
        self.own, self._store = own, store
        self._loaded: Mapping[str, Projection] = {own.bundle.bundle_id: own}  # replaced, never changed
        self._rollout = NO_ROLLOUT  # as seen last

    @property
    def loaded(self) -> Mapping[str, Projection]:
        """By bundle id."""
        return self._loaded

    def add(self, projection: Projection) -> None:
        self._loaded = {**self._loaded, projection.bundle.bundle_id: projection}

    def remove(self, bundle_id: str) -> None:
        """Requests under way keep what they have."""
        self._loaded = {name: one for name, one in self._loaded.items() if name != bundle_id or one is self.own}

    def rollout(self) -> Rollout:
        """What servers with this bundle follow now; NO_ROLLOUT where it takes no part. Raises StoreError."""
        return self.standing().rollout

    def standing(self) -> Standing:
        """The roll-out, as above, and the revision of the catalogue. Raises StoreError."""
        found = self._store.standing()
        if self.own.bundle.bundle_id not in found.rollout.bundles:
            found = Standing(NO_ROLLOUT, found.catalogue_revision)
        self._rollout = found.rollout
        return found

    def of(self, user_ids: Sequence[str | None]) -> Sequence[Projection]:
        """The projection that serves each of some users, with the items of now. Raises NotLoadedError, StoreError."""
        rollout, revision = self.standing()
        if not rollout.trial:
            projection = self._projection(rollout.active) if rollout.active else self.own
            return [projection.at(revision)] * len(user_ids)
        return [
            self._projection(rollout.of(user_id) if user_id else rollout.active).at(revision) for user_id in user_ids
        ]

    @property
    def bundle_id(self) -> str:
        """Of the bundle that answers, trials aside, as it was seen last."""
        return self._rollout.active or self.own.bundle.bundle_id

    def _projection(self, bundle_id: str) -> Projection:
        found = self._loaded.get(bundle_id)
        if found is None:
            raise NotLoadedError(
                f"this server has not loaded bundle {bundle_id}, which is to answer", "try again, or another server"
            )
        return found
