"""Answers queries whose users have been advanced: what to leave out, one search for all, popular items for the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dman_runtime.model.bundle import Bundle, Items
from dman_runtime.model.generation import Generation
from dman_runtime.opened import OpenQuery, by_projection
from dman_runtime.requests import Answer
from dman_runtime.retrieval.base import NO_ITEMS, Added, Hits
from dman_runtime.retrieval.exact import search_scores


def rank(opened: Sequence[OpenQuery]) -> list[Answer]:
    """Ranks for opened queries whose users have been advanced, those of a generation together."""
    answers: dict[int, Answer] = {}
    for projection, group in by_projection(opened):
        ranked = _rank(group, projection.generation)
        answers |= {id(one): answer for one, answer in zip(group, ranked, strict=True)}
    return [answers[id(one)] for one in opened]


def _rank(opened: Sequence[OpenQuery], generation: Generation) -> list[Answer]:
    hits: list[Hits | None] = [None] * len(opened)
    limits = [_limits(one, generation.bundle.items) for one in opened]
    personal = [row for row, one in enumerate(opened) if one.event_count]
    if personal:
        users, added = _asked([opened[row] for row in personal], generation)
        found = generation.retriever.search(
            users,
            max(opened[row].query.k for row in personal),
            exclude=[limits[row][0] for row in personal],
            candidates=[limits[row][1] for row in personal],
            added=added,
        )
        for row, best in zip(personal, found, strict=True):
            hits[row] = best
    return [
        _answer(one, best, exclude, candidates, generation.bundle)
        for one, best, (exclude, candidates) in zip(opened, hits, limits, strict=True)
    ]


def _limits(one: OpenQuery, items: Items) -> tuple[np.ndarray, np.ndarray | None]:
    """Item indices to exclude, and those to choose among, if there is a choice."""
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
    return exclude, candidates


def _asked(opened: Sequence[OpenQuery], generation: Generation) -> tuple[np.ndarray, list[Added | None]]:
    """As `Generation.asked`, of queries whose users have events."""
    users = [one.user.state if one.user else one.record for one in opened]
    return generation.asked([user for user in users if user is not None], [one.query.at for one in opened])


def _answer(
    one: OpenQuery, best: Hits | None, exclude: np.ndarray, candidates: np.ndarray | None, bundle: Bundle
) -> Answer:
    """Without hits: by popularity, as the model has seen no event."""
    k, popular = one.query.k, best is None
    if best is None:
        best = search_scores(bundle.items.popularity, k, exclude=exclude, candidates=candidates)
    return Answer(bundle, best.items[:k], best.scores[:k], popular, one.event_count, one.unknown)
