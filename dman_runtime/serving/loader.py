"""Loads the bundles that the roll-out of the store asks for, beside the one that the server was started with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dman_runtime.errors import BundleError, DmanError
from dman_runtime.model.generation import Generation
from dman_runtime.presence import LeasedPresence, Presence, Present
from dman_runtime.problems import Problems
from dman_runtime.projection import Projection
from dman_runtime.routing import Router
from dman_runtime.store.base import StateStore
from dman_runtime.store.rollout import Rollout

logger = logging.getLogger(__name__)
PROBLEM = "bundle_unusable"


class Loader:
    """Keeps a router's bundles to what the roll-out names. A bundle answers only after its golden replay."""

    def __init__(
        self,
        router: Router,
        store: StateStore,
        *,
        open_bundle: Callable[[Path], Generation],
        presence: Presence | LeasedPresence,
        problems: Problems,
        pid: int,
        loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """`loaded` is called, on the thread that loads, after a bundle or items were."""
        self._router, self._store, self._open_bundle, self._problems = router, store, open_bundle, problems
        self._pid, self._presence, self._loaded = pid, presence, loaded
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._loading: Future[None] | None = None
        self._seen: Rollout | None = None
        self._revision = 0  # of the catalogue
        self._failed: dict[str, str] = {}

    def load(self) -> None:
        """Before the start: loads what answers. Raises DmanError where that cannot be had."""
        self._tell()  # first: whoever changes the roll-out from now on waits for this server
        rollout = self._router.rollout()
        for bundle_id in self._missing({rollout.active, rollout.trial}):
            self._load(bundle_id, rollout.bundles[bundle_id])
        self._tell()

    def look(self) -> None:
        """Begins to load what a change of the roll-out asks for, and drops what it does not name; or adds
        what was added to the catalogue. Raises StoreError."""
        if self._loading is not None and not self._loading.done():
            return
        rollout, revision = self._router.standing()
        if rollout is not self._seen:
            self._loading = self._thread.submit(self._follow, rollout)
        elif revision != self._revision:
            self._loading = self._thread.submit(self._extend, revision)

    def _extend(self, revision: int) -> None:
        """Before a request has to: with a large item table it would wait."""
        for projection in self._router.loaded.values():
            projection.at(revision)
        self._revision = revision
        self._loaded()

    def _follow(self, rollout: Rollout) -> None:
        wanted = {rollout.active, rollout.trial, rollout.prepared}
        failed: dict[str, str] = {}
        for bundle_id in self._missing(wanted):
            try:
                self._load(bundle_id, rollout.bundles[bundle_id])
            except Exception as error:  # whatever is wrong with the bundle: the server goes on with the others
                if not isinstance(error, DmanError):
                    logger.exception("loading bundle %s failed", bundle_id)
                failed[bundle_id] = str(error)
        for bundle_id in self._router.loaded.keys() - wanted:
            self._router.remove(bundle_id)
        self._failed, self._seen = failed, rollout
        self._problems.set(PROBLEM, "; ".join(failed.values()), blocking=rollout.active in failed)
        self._tell()

    def _missing(self, wanted: set[str]) -> set[str]:
        return wanted - {""} - self._router.loaded.keys()

    def _load(self, bundle_id: str, path: str) -> None:
        """Raises DmanError."""
        if not path:
            raise BundleError(
                f"bundle {bundle_id} is to answer, and the store does not know where it is",
                "activate it again with its directory",
            )
        generation = self._open_bundle(Path(path))
        if generation.bundle_id != bundle_id:
            raise BundleError(
                f"{path} holds bundle {generation.bundle_id}, and {bundle_id} is to answer",
                "put the bundle back, or activate another one",
            )
        self._router.add(Projection(generation, self._store))
        self._loaded()
        logger.info("loaded bundle %s from %s", bundle_id, path)

    def _tell(self) -> None:
        own = self._router.own.bundle
        loaded = sorted(self._router.loaded)
        self._presence.tell(Present(self._pid, own.bundle_id, str(own.path.resolve()), loaded, dict(self._failed)))

    def close(self) -> None:
        self._thread.shutdown()
        self._presence.close()
