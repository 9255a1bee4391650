"""What may be recommended: filters and switched-off items together, and how much of it is kept."""

from __future__ import annotations

import numpy as np
import pytest

from dman_runtime import assortment
from dman_runtime.assortment import Assortment
from dman_runtime.item_filters import In, Not
from dman_runtime.model.attributes import Attributes

ATTRIBUTES = Attributes([{"kind": "ab"[row % 2], "row": str(row)} for row in range(100)])
A = In("kind", ("a",))


def test_without_filter_and_switches_everything_is_allowed() -> None:
    assert Assortment(ATTRIBUTES).allowed(None) is None


def test_switched_off_items_are_allowed_by_no_filter() -> None:
    found = Assortment(ATTRIBUTES, off=np.array([0, 7]))
    for wanted, items in ((None, range(100)), (A, range(0, 100, 2)), (Not(A), range(1, 100, 2))):
        allowed = found.allowed(wanted)
        assert allowed is not None
        assert np.flatnonzero(allowed.mask).tolist() == [item for item in items if item not in (0, 7)]


def test_what_a_filter_leaves_is_made_once() -> None:
    found = Assortment(ATTRIBUTES)
    assert found.kept(A) is None
    first = found.allowed(In("kind", ("a",)))
    assert found.kept(A) is found.allowed(A) is first


def test_filters_that_were_not_asked_for_lately_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    found, wanted = Assortment(ATTRIBUTES), [In("row", (str(row),)) for row in range(60)]
    monkeypatch.setattr(assortment, "KEPT_BYTES", 10_000)
    for one in wanted:
        found.allowed(one)
        found.allowed(wanted[0])
    kept = [one for one in wanted if found.kept(one)]
    assert wanted[0] in kept and kept[1:] == wanted[-len(kept) + 1 :] and 10 < len(kept) < 50
    large = In("row", tuple(str(row) for row in range(1000)))
    allowed = found.allowed(large)
    assert allowed is not None and allowed.mask.all() and found.kept(large) is None  # larger than all that is kept
