"""Answers queries whose users have been advanced: what to leave out, one search for all, popular items for the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dman_runtime.model.bundle import Items
from dman_runtime.model.generation import Generation
from dman_runtime.opened import OpenQuery
from dman_runtime.requests import UNKNOWN_MOMENT, Answer
from dman_runtime.retrieval.base import NO_ITEMS, Hits
from dman_runtime.retrieval.exact import search_scores


def rank(opened: Sequence[OpenQuery], generation: Generation) -> list[Answer]:
    """Ranks for opened queries whose users have been advanced."""
    hits: list[Hits | None] = [None] * len(opened)
    limits = [_limits(one, generation.bundle.items) for one in opened]
    personal = [row for row, one in enumerate(opened) if one.event_count]
    _read_states([opened[row] for row in personal], generation)
    if personal:
        found = generation.retriever.search(
            _rows([opened[row].embedding for row in personal]),
            max(opened[row].query.k for row in personal),
            exclude=[limits[row][0] for row in personal],
            candidates=[limits[row][1] for row in personal],
            added=[opened[row].added for row in personal],
        )
        for row, best in zip(personal, found, strict=True):
            hits[row] = best
    return [
        _answer(one, best, exclude, candidates, generation.bundle.items)
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


def _read_states(opened: Sequence[OpenQuery], generation: Generation) -> None:
    """The user embeddings at the times of the requests, and what is added to scores, where that takes a state."""
    asked = [(one, state) for one in opened if (state := one.user.state if one.user else one.state) is not None]
    if not asked:
        return
    moments = [UNKNOWN_MOMENT if one.query.at is None else one.query.at for one, _ in asked]
    found = generation.asked([state for _, state in asked], moments)
    for (one, _), embedding, added in zip(asked, *found, strict=True):
        one.embedding, one.added = embedding, added


def _answer(
    one: OpenQuery, best: Hits | None, exclude: np.ndarray, candidates: np.ndarray | None, items: Items
) -> Answer:
    """Without hits: by popularity, as the model has seen no event."""
    k, popular = one.query.k, best is None
    if best is None:
        best = search_scores(items.popularity, k, exclude=exclude, candidates=candidates)
    return Answer(best.items[:k], best.scores[:k], popular, one.event_count, one.unknown)


def _rows(vectors: list[np.ndarray]) -> np.ndarray:
    """(D) vectors as (B, D); np.stack takes longer than the search where there is one."""
    return vectors[0][None] if len(vectors) == 1 else np.stack(vectors)
