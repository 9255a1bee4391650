"""The result types."""

import copy
import dataclasses
import pickle

import pytest

from sdk import Recommendation, Recommendations


def test_recommendations_are_an_immutable_sequence_that_survives_copy_and_pickle() -> None:
    best = tuple(Recommendation(item, 1.0 / item, "") for item in (1, 2, 3))
    answer = Recommendations(
        items=best, source="popular", event_count=0, unknown_item_ids=(), unknown_count=0, bundle_id="b"
    )
    assert answer[0] == best[0] and answer[-1] == best[2] and best[1] in answer and len(answer) == 3
    assert answer[:2].item_ids == (1, 2) and answer[:2].is_popular
    assert [*reversed(answer)] == [*reversed(best)]
    assert pickle.loads(pickle.dumps(answer)) == copy.deepcopy(answer) == answer and hash(answer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.source = "personalized"  # type: ignore[misc]
