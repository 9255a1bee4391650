"""What the engine reads for a query: the state and the seen items of its user, and which items it may get."""

from __future__ import annotations

from contextlib import suppress

from dman_runtime.diversity import fields_of
from dman_runtime.errors import StateError
from dman_runtime.model.generation import Answering
from dman_runtime.opened import OpenQuery, OpenUser, read_users, what_if_events
from dman_runtime.projection import Projection
from dman_runtime.requests import Answer, Query, check_query
from dman_runtime.retrieval.base import NO_ITEMS
from dman_runtime.store.base import RankingView, Snapshot, StateStore


def plain_answer(query: Query, store: StateStore, projection: Projection) -> Answer | None:
    """The answer to the most frequent query, a user and k with a current record, by the shortest way; or None."""
    generation = projection.generation
    if not generation.answers_anywhere:
        return None
    check_query(query)
    offered = projection.offered
    allowed = offered.on
    unmade = query.filter is not None and (allowed := offered.kept(query.filter)) is None
    if unmade or not generation.retriever.quick(allowed):
        return None  # it takes longer than others should wait
    assert query.user_id is not None
    view = store.ranking_view(query.user_id, projection.number, generation.answer_bytes)
    if view is None or view.record is None:
        return None
    before = generation.asked_before(view.record, query.at)
    try:
        user: Answering = before[0] if before else generation.read_for_answer(view.record)
    except StateError:
        return None
    if _lags(user, view, projection) or not user.event_count:
        return None
    seen = NO_ITEMS if query.include_seen else projection.known_indices(view.seen)
    if before:
        embedding, added = before[1].embedding[None], [before[1].added]
    else:
        embedding, added = generation.asked((user,), (query.at,))
    (best,) = generation.retriever.search(embedding, query.k, exclude=(seen,), allowed=(allowed,), added=added)
    return Answer(generation.bundle, best.items, best.scores, False, user.event_count, [])


def _lags(user: Answering, view: RankingView, projection: Projection) -> bool:
    """Whether a record does not cover the stored history, or not with the items of now."""
    return user.history_count != view.history_count or projection.holds_later(view.seen, user.vocabulary)


def open_query(query: Query, projection: Projection, snapshot: Snapshot, *, catch_up: bool) -> OpenQuery:
    """A checked query with what it needs, of one moment; `Engine.open_queries` says more.

    Raises RequestError where a filter or a rule asks for an attribute that no item has.
    """
    generation = projection.generation
    what_if, unknown = what_if_events(query, generation.bundle.items)
    opened = OpenQuery(query, projection, NO_ITEMS, 0, None, None, what_if, unknown)
    opened.allowed = projection.offered.allowed(query.filter)
    opened.fields = fields_of(query.diversity, projection.offered.attributes)
    user_id, found = query.user_id, None
    view = None if user_id is None else snapshot.ranking_view(user_id, projection.number, generation.answer_bytes)
    if view is not None:
        opened.seen = projection.known_indices(view.seen)
        with suppress(StateError):  # a damaged record is made anew
            found = generation.read_for_answer(view.record) if view.record is not None else None
    elif user_id is not None:
        opened.seen = projection.known_indices(snapshot.shown(user_id)[0])
    lags = view is not None and (found is None or _lags(found, view, projection))
    if lags and catch_up:
        opened.lags = True
    elif lags or len(what_if):
        opened.user = OpenUser.anonymous(projection)
        if view is not None and user_id is not None:
            (opened.user,) = read_users(snapshot, [user_id], [projection])
        opened.user.left += what_if
        opened.event_count = opened.user.event_count
    elif found is not None:
        opened.record, opened.event_count = found, found.event_count
    return opened
