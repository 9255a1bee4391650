"""What was changed of the items of a store while it serves, for all servers and all bundles. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dman_runtime.data.added_items import AddedItem
from dman_runtime.store.rollout import NO_ROLLOUT, Rollout

MAX_ADDED = 100_000  # items that can be added to a store, one that is added again counted again


class Addition(NamedTuple):
    """An item that was added at run time."""

    number: int  # of the item
    item: AddedItem


@dataclass(frozen=True, slots=True, eq=False)
class Catalogue:
    """All changes, at one moment."""

    revision: int = 0  # one more with each change; 0: there was none
    off: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))  # (n) items switched off, ascending
    added: Sequence[Addition] = ()  # by slot, from 0, for ever; of those of one item the last one counts


class Standing(NamedTuple):
    """What every request has to know before it begins, at one moment."""

    rollout: Rollout = NO_ROLLOUT
    catalogue_revision: int = 0  # of the catalogue: whoever has read another one reads it again


NOTHING_STANDS = Standing()
