"""Answers queries whose users have been advanced: what to leave out, one search for all, popular items for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from dman_runtime.diversity import WIDER, diverse
from dman_runtime.model.bundle import Items
from dman_runtime.model.generation import Generation
from dman_runtime.opened import OpenQuery, by_projection
from dman_runtime.requests import Answer, Query
from dman_runtime.retrieval.base import NO_ITEMS, Added, Allowed, Hits, Retriever
from dman_runtime.retrieval.exact import first_of, search_scores


class _Limits(NamedTuple):
    """Which items a query may get."""

    exclude: np.ndarray  # (n) item indices
    candidates: np.ndarray | None  # (n) item indices; None: all
    allowed: Allowed | None  # None: all


def rank(opened: Sequence[OpenQuery]) -> list[Answer]:
    """Ranks for opened queries whose users have been advanced, those of a generation together."""
    answers: dict[int, Answer] = {}
    for projection, group in by_projection(opened):
        ranked = _rank(group, projection.generation)
        answers |= {id(one): answer for one, answer in zip(group, ranked, strict=True)}
    return [answers[id(one)] for one in opened]


def _rank(opened: Sequence[OpenQuery], generation: Generation) -> list[Answer]:
    bundle, retriever = generation.bundle, generation.retriever
    limits = [_limits(one, bundle.items) for one in opened]
    hits: dict[int, Hits] = {}
    personal = [row for row, one in enumerate(opened) if one.event_count]
    if personal:
        users, added = _asked([opened[row] for row in personal], generation)
        most = max(_wanted(opened[row].query) for row in personal)
        found = _search(retriever, users, [limits[row] for row in personal], added, most)
        for place, (row, best) in enumerate(zip(personal, found, strict=True)):
            again = partial(_search_one, retriever, users[place : place + 1], limits[row], added[place])
            hits[row] = _first(opened[row], best, again)
    answers = []
    for row, one in enumerate(opened):
        if popular := row not in hits:  # the model has seen no event
            search = partial(_search_popular, bundle.items, limits[row])
            hits[row] = _first(one, search(_wanted(one.query)), search)
        best = hits[row]
        answers.append(Answer(bundle, best.items, best.scores, popular, one.event_count, one.unknown))
    return answers


def _limits(one: OpenQuery, items: Items) -> _Limits:
    query, indices = one.query, items.indices
    exclude, candidates = NO_ITEMS if query.include_seen else one.seen, None
    if query.exclude:
        listed, unknown = indices(query.exclude)
        exclude = np.concatenate([listed, exclude])
        one.unknown += unknown
    if len(one.what_if) and not query.include_seen:
        exclude = np.concatenate([exclude, one.what_if.items])
    if query.candidates is not None:
        candidates, unknown = indices(query.candidates)
        one.unknown += unknown
    return _Limits(exclude, candidates, one.allowed)


def _asked(opened: Sequence[OpenQuery], generation: Generation) -> tuple[np.ndarray, list[Added | None]]:
    """As `Generation.asked`, of queries whose users have events."""
    users = [one.user.state if one.user else one.record for one in opened]
    return generation.asked([user for user in users if user is not None], [one.query.at for one in opened])


def _wanted(query: Query) -> int:
    """How many of the best items are looked for at first."""
    return query.k * WIDER if query.diversity else query.k


def _first(one: OpenQuery, found: Hits, search: Callable[[int], Hits]) -> Hits:
    """The items of an answer, from at least as many as were `_wanted`."""
    k, rules = one.query.k, one.query.diversity
    if rules:
        return diverse(search, k, rules, one.fields, found=found)
    return Hits(found.items[:k], found.scores[:k])


def _search(
    retriever: Retriever, users: np.ndarray, limits: Sequence[_Limits], added: Sequence[Added | None], k: int
) -> list[Hits]:
    exclude, candidates, allowed = zip(*limits, strict=True)
    return retriever.search(users, k, exclude=exclude, candidates=candidates, allowed=allowed, added=added)


def _search_one(retriever: Retriever, user: np.ndarray, limits: _Limits, added: Added | None, k: int) -> Hits:
    return _search(retriever, user, [limits], [added], k)[0]


def _search_popular(items: Items, limits: _Limits, k: int) -> Hits:
    exclude, candidates, allowed = limits
    if candidates is None:
        return first_of(items.by_popularity, items.popularity, k, exclude=exclude, allowed=allowed)
    return search_scores(items.popularity, k, exclude=exclude, candidates=candidates, allowed=allowed)
