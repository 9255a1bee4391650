"""Filters and rules over the wire: answered exactly, and refused early where they are hostile."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import TINY_ITEMS, running, serve_config

from dman_runtime.api import recommender
from dman_runtime.api.conditions import filter_of, filter_size, rules_of, weight_of_queries
from dman_runtime.diversity import Rule
from dman_runtime.errors import RequestError
from dman_runtime.item_filters import MAX_DEPTH, MAX_PARTS, MAX_VALUES, AllOf, AnyOf, In, Not, Range
from dman_runtime.requests import MAX_REQUEST_IDS
from dman_runtime.serving.app import App
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def of(kind: str, message: Any) -> pb.Filter:
    return pb.Filter(**{kind: message})


def in_(field: str, *values: str) -> pb.Filter:
    return of("in", pb.Filter.In(field=field, values=values))


def parts(kind: str, *filters: pb.Filter) -> pb.Filter:
    return of(kind, pb.Filter.Parts(filters=filters))


def nested(levels: int) -> pb.Filter:
    found = in_("genre", "odd")
    for _ in range(levels - 1):
        found = of("not", found)
    return found


ODD = in_("genre", "odd")


@pytest.fixture(scope="module")
def channel(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    config = serve_config(tiny_bundle, tmp_path_factory.mktemp("conditions") / "state")
    with running(App(config)) as app, grpc.insecure_channel(f"127.0.0.1:{app.port}") as opened:
        yield opened


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> RecommenderStub:
    found = RecommenderStub(channel)
    found.Update(pb.UpdateRequest(user_id="anna", events=[pb.Event(item_id=str(item)) for item in (3, 4, 9)]))
    return found


def refused(call: Any, request: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=30)
    assert caught.value.code() is INVALID
    details = str(caught.value.details())
    assert details and "\n" not in details and len(details) < 400
    assert not re.search(r"Traceback|File |\.py\b|/tmp|/work|0x[0-9a-f]{6}|Error\b", details)
    return details


def test_messages_become_filters_and_rules() -> None:
    year = of("range", pb.Filter.Range(field="year", min=0, max=2.5))
    message = parts("all", of("not", ODD), parts("any", year, of("range", pb.Filter.Range(field="n"))), parts("any"))
    expected = AllOf((Not(In("genre", ("odd",))), AnyOf((Range("year", 0, 2.5), Range("n"))), AnyOf(())))
    assert filter_of(message) == expected and hash(filter_of(message)) == hash(expected)
    assert filter_size(message) == (7, 1)
    rules = [pb.Diversity(field="genre", at_most=2), pb.Diversity(field="genre", at_most=2, first=0)]
    assert rules_of(rules, 7) == [Rule("genre", 2, 7), Rule("genre", 2, 0)]


@pytest.mark.parametrize("user_id", ["anna", "nobody", ""])
def test_filter_and_rule_hold_in_every_rpc(stub: RecommenderStub, user_id: str) -> None:
    plain = stub.Recommend(pb.RecommendRequest(user_id=user_id, k=TINY_ITEMS))
    ranking = [item.item_id for item in plain.items]
    request = pb.RecommendRequest(user_id=user_id, k=5, filter=ODD)
    expected = [item_id for item_id in ranking if int(item_id) % 2][:5]
    both = pb.RecommendRequest(user_id=user_id, k=4, diversity=[pb.Diversity(field="genre", at_most=2, first=4)])
    mixed, counts = list[str](), {0: 0, 1: 0}
    for item_id in ranking:
        counts[int(item_id) % 2] += 1
        if counts[int(item_id) % 2] <= 2:
            mixed.append(item_id)
    for _ in range(2):  # the second time the server knows what the filter leaves
        batch = stub.BatchRecommend(pb.BatchRecommendRequest(requests=[request, both, request]))
        for found in (stub.Recommend(request), batch.replies[0], batch.replies[2]):
            assert [item.item_id for item in found.items] == expected and found.source == plain.source
        for found in (stub.Recommend(both), batch.replies[1]):
            assert [item.item_id for item in found.items] == mixed


HOSTILE: dict[str, tuple[pb.Filter, str]] = {
    "empty": (pb.Filter(), "a filter says nothing; set one of in, range, all, any and not"),
    "empty in another": (parts("any", ODD, pb.Filter()), "a filter says nothing"),
    "deep": (nested(MAX_DEPTH + 1), f"more than {MAX_DEPTH} levels deep"),
    "very deep": (nested(40), f"more than {MAX_DEPTH} levels deep"),
    "wide": (parts("any", *[ODD] * MAX_PARTS), f"more than {MAX_PARTS} parts"),
    "very wide": (parts("all", *[pb.Filter()] * 200_000), f"more than {MAX_PARTS} parts"),
    "wide below": (parts("all", *[parts("any", *[ODD] * 60)] * 60), f"more than {MAX_PARTS} parts"),
    "values": (in_("genre", *["x"] * (MAX_VALUES + 1)), f"more than {MAX_VALUES} values"),
    "many values": (in_("genre", *["x"] * (MAX_REQUEST_IDS + 1)), f"send at most {MAX_REQUEST_IDS}"),
    "unknown": (in_("x" * 10_000, "odd"), "no item has an attribute 'xxx"),
    "control": (in_("a\nb", "odd"), "no item has an attribute 'a\\nb'; use one of 'genre'"),
    "separator": (in_("genre", "odd|even"), "'|' separates the values of a list"),
    "numbers": (of("range", pb.Filter.Range(field="genre", min=1)), "no item has a number as 'genre'"),
    "turned": (of("range", pb.Filter.Range(field="genre", min=2, max=1)), "the smaller one first"),
    "nan": (of("range", pb.Filter.Range(field="genre", min=float("nan"))), "give numbers"),
}


@pytest.mark.parametrize(("wanted", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_filter_is_refused_in_words(stub: RecommenderStub, wanted: pb.Filter, message: str) -> None:
    request = pb.RecommendRequest(user_id="anna", filter=wanted)
    began = time.monotonic()
    assert message in refused(stub.Recommend, request)
    assert message in refused(stub.BatchRecommend, pb.BatchRecommendRequest(requests=[pb.RecommendRequest(), request]))
    assert time.monotonic() - began < 20
    assert len(stub.Recommend(pb.RecommendRequest(user_id="anna")).items) == 10


def test_filter_that_no_parser_takes_is_refused(stub: RecommenderStub, channel: grpc.Channel) -> None:
    """Nested deeper than protobuf goes."""
    message = b""
    for _ in range(5000):
        message = b"\x2a" + _varint(len(message)) + message
    encoded = b"\x42" + _varint(len(message)) + message
    send = channel.unary_unary("/dman.v1.Recommender/Recommend")
    assert refused(send, encoded)
    assert len(stub.Recommend(pb.RecommendRequest(user_id="anna")).items) == 10


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([pb.Diversity(field="genre")], "at most 0 items with the same 'genre'; allow 1 or more"),
        ([pb.Diversity(field="genre", at_most=1, first=1001)], "choose 1 to 1000"),
        ([pb.Diversity(field="genre", at_most=1)] * 5, "send at most 4"),
        ([pb.Diversity(at_most=1)], "no item has an attribute ''"),
    ],
)
def test_hostile_rule_is_refused_in_words(stub: RecommenderStub, rules: list[pb.Diversity], message: str) -> None:
    assert message in refused(stub.Recommend, pb.RecommendRequest(user_id="anna", diversity=rules))


def test_conditions_weigh_and_are_answered_a_few_at_a_time() -> None:
    wanted = parts("any", *[ODD] * 49)
    heavy = pb.RecommendRequest(user_id="u", filter=wanted, diversity=[pb.Diversity(field="genre", at_most=1)] * 2)
    light = pb.RecommendRequest(user_id="u")
    weigh = weight_of_queries
    assert weigh([light] * 3) == 3 and weigh([heavy]) == 1 + 50 + 2 and weigh([heavy, light]) == 54
    chunks = recommender._chunks([recommender._query(heavy) for _ in range(5)])
    assert [len(chunk) for chunk in chunks] == [1] * 5
    assert len(recommender._chunks([recommender._query(light) for _ in range(64)])) == 1
    with pytest.raises(RequestError, match="values of filters in one request"):
        weigh([pb.RecommendRequest(filter=in_("genre", *["x"] * 9000))] * 12)
