"""What was changed of the items of a store while it serves, for all servers and all bundles. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dman_runtime.store.rollout import NO_ROLLOUT, Rollout


@dataclass(frozen=True, slots=True, eq=False)
class Catalogue:
    """All changes, at one moment."""

    revision: int = 0  # one more with each change; 0: there was none
    off: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))  # (n) items switched off, ascending


class Standing(NamedTuple):
    """What every request has to know before it begins, at one moment."""

    rollout: Rollout = NO_ROLLOUT
    catalogue_revision: int = 0  # of the catalogue: whoever has read another one reads it again


NOTHING_STANDS = Standing()
