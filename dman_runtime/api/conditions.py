"""Filters, rules and weights of requests, from protobuf. What a hostile client sends is bounded before it is used."""

from __future__ import annotations

from collections.abc import Sequence

from dman_runtime.diversity import Rule
from dman_runtime.errors import RequestError
from dman_runtime.item_filters import MAX_PARTS, AllOf, AnyOf, Filter, In, Not, Range
from dman_runtime.requests import check_size
from protos.dman.v1 import dman_pb2 as pb


def filter_size(message: pb.Filter) -> tuple[int, int]:
    """Filters in a filter, itself included, and values in them. Raises RequestError where they are too many to count.

    protobuf itself refuses messages that are nested too deep to be walked.
    """
    parts, values, level = 0, 0, [message]
    while level:
        parts += len(level)
        if parts > MAX_PARTS:
            raise RequestError(f"a filter has more than {MAX_PARTS} parts", "list more values in one `in`")
        deeper: list[pb.Filter] = []
        for one in level:
            kind = one.WhichOneof("kind")
            if kind == "in":
                values += len(getattr(one, "in").values)
            elif kind == "not":
                deeper.append(getattr(one, "not"))
            elif kind in ("all", "any"):
                found = getattr(one, kind).filters
                deeper += found[: MAX_PARTS + 1]
        level = deeper
    return parts, values


def filter_of(message: pb.Filter) -> Filter:
    """A filter that `filter_size` has counted. Raises RequestError for one that says nothing."""
    match message.WhichOneof("kind"):
        case "in":
            one = getattr(message, "in")
            return In(one.field, tuple(one.values))
        case "range":
            least, most = (message.range.HasField(end) for end in ("min", "max"))
            return Range(message.range.field, message.range.min if least else None, message.range.max if most else None)
        case "all":
            return AllOf(tuple(filter_of(one) for one in message.all.filters))
        case "any":
            return AnyOf(tuple(filter_of(one) for one in message.any.filters))
        case "not":
            return Not(filter_of(getattr(message, "not")))
    raise RequestError("a filter says nothing", "set one of in, range, all, any and not")


def rules_of(messages: Sequence[pb.Diversity], k: int) -> Sequence[Rule]:
    return [Rule(one.field, one.at_most, one.first if one.HasField("first") else k) for one in messages]


def weight_of_updates(updates: Sequence[pb.UpdateRequest]) -> int:
    """Events to encode. Raises RequestError where they are too many to be converted."""
    events = sum([len(update.events) for update in updates])
    check_size(len(updates), events, sum([len(update.shown_item_ids) for update in updates]))
    return events


def weight_of_queries(queries: Sequence[pb.RecommendRequest]) -> int:
    """Events to encode, and one for each query, filter and rule: ranking, and a pass over all items, take about as
    long. Raises RequestError as `weight_of_updates`."""
    events = sum([len(query.what_if_events) for query in queries])
    listed = sum([len(query.exclude_item_ids) + len(query.candidate_item_ids) for query in queries])
    conditions = sum([len(query.diversity) for query in queries])
    for query in queries:
        if query.HasField("filter"):
            parts, values = filter_size(query.filter)
            conditions, listed = conditions + parts, listed + values
    check_size(len(queries), events, listed)
    return len(queries) + events + conditions
