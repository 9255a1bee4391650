"""The items of a bundle that may be recommended, at one revision of the store's catalogue."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from dman_runtime.item_filters import Filter, bytes_of, mask_of
from dman_runtime.model.attributes import Attributes
from dman_runtime.retrieval.base import Allowed

KEPT_BYTES = 64 << 20  # of filters and what they leave


class Assortment:
    """May be used from any thread. Replaced, not changed, when the catalogue changes."""

    def __init__(self, attributes: Attributes, *, off: np.ndarray | None = None) -> None:
        """`off`: the item indices (n) that are switched off."""
        self.attributes = attributes
        self.on: Allowed | None = None  # the items that are not switched off; None: all
        if off is not None and len(off):
            mask = np.ones(attributes.vocabulary, bool)
            mask[off] = False
            self.on = Allowed.of(mask)
        self._kept: OrderedDict[Filter, Allowed] = OrderedDict()  # the one that was asked for last is the last one
        self._kept_bytes, self._lock = 0, threading.Lock()

    def kept(self, wanted: Filter) -> Allowed | None:
        """What a checked filter leaves, if that is known."""
        with self._lock:
            if (found := self._kept.get(wanted)) is not None:
                self._kept.move_to_end(wanted)
            return found

    def allowed(self, wanted: Filter | None) -> Allowed | None:
        """What a checked filter leaves of the items that are on; None: all items. Raises RequestError."""
        if wanted is None:
            return self.on
        if (found := self.kept(wanted)) is not None:
            return found
        mask = mask_of(wanted, self.attributes)
        found = Allowed.of(mask if self.on is None else mask & self.on.mask)
        with self._lock:
            if wanted not in self._kept:  # another thread may have been first
                self._kept[wanted] = found
                self._kept_bytes += found.size + bytes_of(wanted)
            while self._kept_bytes > KEPT_BYTES:
                oldest, left = self._kept.popitem(last=False)
                self._kept_bytes -= left.size + bytes_of(oldest)
        return found
