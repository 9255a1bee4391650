"""Items that are switched off and on in a store, for all its servers and all bundles at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dman_runtime.data.ids import RULE, id_problem
from dman_runtime.errors import UsageError
from dman_runtime.store.base import StateStore

_NAMED = 10  # unknown ids that are shown to people


@dataclass(frozen=True)
class Switched:
    """What a command did to the items that it named."""

    changed: int
    unchanged: int  # they were so already
    unknown: Sequence[str]  # ids that the store has no item of; nothing was done about them
    off: int  # items that are switched off now

    def summary(self, *, off: bool) -> str:
        """For people."""
        word = "off" if off else "on"
        text = f"items switched {word}: {self.changed}; {word} already: {self.unchanged}; off now: {self.off}"
        if self.unknown:
            more = ", ..." if len(self.unknown) > _NAMED else ""
            named = ", ".join(repr(item_id) for item_id in self.unknown[:_NAMED])
            text += f"\nwarning: no item in this store has these ids ({len(self.unknown)}): {named}{more}"
        return text


def switch(store: StateStore, item_ids: Sequence[str], *, off: bool) -> Switched:
    """Switches items off or on, durably when it returns. Raises UsageError for what is no id, and StoreError."""
    distinct = list(dict.fromkeys(item_ids))
    for item_id in distinct:
        if (problem := id_problem(item_id)) is not None:
            raise UsageError(f"item id {item_id!r:.80} {problem}", RULE)
    numbers = store.find_items(distinct)
    known = numbers[numbers >= 0]
    changed = store.switch_items(known, off=off)
    unknown = [distinct[position] for position in np.flatnonzero(numbers < 0).tolist()]
    return Switched(changed, len(known) - changed, unknown, len(store.catalogue().off))


def switched_off(store: StateStore) -> list[str]:
    """The ids of the items that are off, in the order in which the store learnt of them. Raises StoreError."""
    return store.item_ids(store.catalogue().off)
