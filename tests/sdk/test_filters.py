"""What filters and rules of diversity send."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from protos.dman.v1 import dman_pb2 as pb
from sdk import Diversity, Filter, InvalidArgumentError, between, has

from .awaited import Awaited
from .fake_server import Recorder

pytestmark = pytest.mark.timeout(30)


def in_(field: str, *values: str) -> pb.Filter:
    return pb.Filter(**{"in": pb.Filter.In(field=field, values=values)})


def parts(kind: str, *filters: pb.Filter) -> pb.Filter:
    return pb.Filter(**{kind: pb.Filter.Parts(filters=filters)})


def not_(one: pb.Filter) -> pb.Filter:
    return pb.Filter(**{"not": one})


A, B, C = has("kind", "a"), has("kind", "b"), has("kind", "c")
PB_A, PB_B, PB_C = in_("kind", "a"), in_("kind", "b"), in_("kind", "c")
YEAR = pb.Filter(range=pb.Filter.Range(field="year", min=1990, max=1999.5))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (A, PB_A),
        (has("kind", "a", 7, np.int64(8)), in_("kind", "a", "7", "8")),
        (between("year", 1990, 1999.5), YEAR),
        (between("year", Decimal(1990), np.float32(1999.5)), YEAR),
        (between("year", min=0), pb.Filter(range=pb.Filter.Range(field="year", min=0))),
        (between("year", max=-math.inf), pb.Filter(range=pb.Filter.Range(field="year", max=-math.inf))),
        (between("year"), pb.Filter(range=pb.Filter.Range(field="year"))),
        (A & B, parts("all", PB_A, PB_B)),
        (A & B & C, parts("all", PB_A, PB_B, PB_C)),
        (A & (B & C), parts("all", PB_A, PB_B, PB_C)),
        (A | B | C, parts("any", PB_A, PB_B, PB_C)),
        (A | B & ~C, parts("any", PB_A, parts("all", PB_B, not_(PB_C)))),
        ((A | B) & between("year", 1990, 1999.5), parts("all", parts("any", PB_A, PB_B), YEAR)),
        (~~A, not_(not_(PB_A))),
    ],
)
async def test_filter_is_sent_as_written(
    client: Awaited, recorder: Recorder, wanted: Filter, message: pb.Filter
) -> None:
    await client.recommend("anna", filter=wanted)
    await client.recommend_many(["anna", "bob"], filter=wanted)
    one, many = (seen.request for seen in recorder.seen)
    assert one == pb.RecommendRequest(user_id="anna", k=10, filter=message)
    assert [request.filter for request in many.requests] == [message] * 2


async def test_combining_changes_no_filter(client: Awaited, recorder: Recorder) -> None:
    both = A & B
    assert (both & C) is not both
    await client.recommend("anna", filter=both)
    assert recorder.request.filter == parts("all", PB_A, PB_B)


async def test_request_without_filter_has_none(client: Awaited, recorder: Recorder) -> None:
    await client.recommend("anna")
    assert not recorder.request.HasField("filter") and not recorder.request.diversity


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (Diversity("genre", 2), [pb.Diversity(field="genre", at_most=2)]),
        (
            (Diversity("genre", np.int64(1), first=5), Diversity("studio", 3)),
            [pb.Diversity(field="genre", at_most=1, first=5), pb.Diversity(field="studio", at_most=3)],
        ),
        ([], []),
    ],
)
async def test_rules_are_sent_in_order(
    client: Awaited, recorder: Recorder, given: Any, sent: list[pb.Diversity]
) -> None:
    await client.recommend("anna", diversity=given)
    assert recorder.request == pb.RecommendRequest(user_id="anna", k=10, diversity=sent)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: has("genre"), "needs at least one value"),
        (lambda: has("genre", 4.5), r"values\[0\] must be str or int, not float"),
        (lambda: has("genre", ["a", "b"]), r"values\[0\] must be str or int, not list"),
        (lambda: has("", "a"), "field must not be empty"),
        (lambda: between("year", "1990"), "min must be a number, not '1990'"),
        (lambda: between("year", 1, math.nan), "max must be a number, not nan"),
        (lambda: between("year", 2, 1), "min must not be above max: 2.0 and 1.0"),
        (lambda: between("", 1), "field must not be empty"),
    ],
)
def test_filter_that_cannot_be_meant_is_refused_where_it_is_made(make: Any, complaint: str) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint):
        make()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"filter": "genre"}, "filter must be made with has or between, not of str"),
        ({"diversity": ["genre"]}, r"diversity\[0\] must be a Diversity, not str"),
        ({"diversity": Diversity("", 1)}, r"diversity\[0\].field must not be empty"),
        ({"diversity": Diversity("genre", "1")}, r"diversity\[0\].at_most must be an integer"),
        ({"diversity": [Diversity("genre", 1, first=True)]}, r"diversity\[0\].first must be an integer"),
    ],
)
async def test_bad_options_are_named_and_nothing_is_sent(
    client: Awaited, recorder: Recorder, options: Any, complaint: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint):
        await client.recommend("anna", **options)
    assert not recorder.seen


def test_filters_are_not_joined_by_words_or_with_other_things() -> None:
    with pytest.raises(TypeError, match="combine filters with"):
        A and B  # noqa: B018
    for other in ("a", None, True):
        with pytest.raises(TypeError):
            A & other  # type: ignore[operator]
    assert "kind" in repr(A)
