"""What may spoil training and its metrics on a log, as notices of the input report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dman_runtime.data.evaluation import Ranking, ranking_for
from dman_runtime.data.input_report import InputReport
from dman_runtime.data.interactions import Interactions, ItemInfo
from dman_runtime.data.log_options import NONE, LogOptions
from dman_runtime.data.logs import Log
from dman_runtime.data.vocabulary import examples

MANY_REPEATS = 0.3  # share of events with already seen items, above which users seem to return to items
MANY_SEEN_TARGETS = 0.2  # share of the test targets
MANY_TIED = 0.1  # share of the users with held-out events
MANY_REMOVED_EVENTS, MANY_REMOVED_USERS = 0.1, 0.3  # shares that the filters take
MANY_DONE = 0.1  # share of the users who have had every item
FEW_TITLES = 0.5  # share of the items
FEW_USERS = 50  # whose held-out events are ranked
BASKET = 3.0  # mean events of a user at one time
EVENTS_PER_BLOCK = 5_000_000  # about 200 MB while repeats are looked for


def warn_of_log(log: Log, interactions: Interactions, *, seen_items: str) -> None:
    """Adds notices to the report of a log about its filtered `interactions`. `seen_items` as in TrainConfig."""
    report, lengths = log.report, np.diff(interactions.offsets)
    _warn_of_filters(report, interactions)
    _warn_of_few(report, interactions, evaluated=int(np.count_nonzero(lengths >= 3)))
    if ranking_for(seen_items) != "seen_kept":
        _warn_of_repeats(report, interactions, ranking_for(seen_items))
    if log.options.order_by == "time":
        _warn_of_ties(report, interactions, log.options)


def warn_of_items(report: InputReport, file: Path, infos: Mapping[str, ItemInfo], item_ids: list[str]) -> None:
    """Adds a notice if few items of a log have a title in the item file."""
    titled = sum(1 for item_id in item_ids if item_id in infos and infos[item_id].title)
    if titled > FEW_TITLES * len(item_ids):
        return
    unknown = len(infos.keys() - set(item_ids))
    report.notice(
        f"{titled:,} of {len(item_ids):,} items have a title, and {unknown:,} of {len(infos):,} rows of {file} are of "
        f"other items. Its ids are such as {examples(infos)}, those of the log such as {examples(item_ids)}",
        parameter="items",
        weight=40,
    )


def _warn_of_filters(report: InputReport, interactions: Interactions) -> None:
    removed = report.filters
    if not removed:
        return
    users, events = removed["users"] + interactions.num_users, removed["events"] + len(interactions)
    if removed["events"] > MANY_REMOVED_EVENTS * events or removed["users"] > MANY_REMOVED_USERS * users:
        report.notice(
            f"filters remove {removed['users']:,} of {users:,} users and {removed['events']:,} of {events:,} events",
            parameter="min_user_events" if removed["min_user_events"] > 1 else "min_item_events",
            weight=45,
        )


def _warn_of_few(report: InputReport, interactions: Interactions, *, evaluated: int) -> None:
    users = interactions.num_users
    if len(interactions.item_ids) == 1:
        report.notice("the log has one item: there is nothing to rank", weight=90)
    if not evaluated:
        report.notice(
            "no user has three events: no metrics can be computed, and no epoch is known to be the best", weight=95
        )
    elif evaluated < FEW_USERS:
        text = f"{evaluated} of {users:,} users have three events: metrics of so few users are mostly chance"
        report.notice(text, weight=35)


def _warn_of_repeats(report: InputReport, interactions: Interactions, ranking: Ranking) -> None:
    """What a ranking without seen items means for the targets and the users of a log."""
    seen, lengths = seen_before(interactions), np.diff(interactions.offsets)
    targets = interactions.offsets[1:][lengths >= 3] - 1
    missed, share = int(seen[targets].sum()), float(seen.mean())
    so_many = f"{missed:,} of {len(targets):,} test targets"
    kept = ranking == "target_kept"
    effect = "are ranked against unseen items only, as no server does" if kept else "count as misses"
    if share > MANY_REPEATS:
        text = (
            f"{100 * share:.0f} % of the events are of items that the user has already seen, and the ranking leaves "
            f"such items out: {so_many} {effect}; if users return to items, choose keep, and call recommend "
            "with include_seen"
        )
        report.notice(text, parameter="seen_items", weight=60)
    elif missed > MANY_SEEN_TARGETS * len(targets):
        text = f"{so_many} were seen before by their user: they {effect}"
        report.notice(text, parameter="seen_items", weight=60)
    distinct = np.diff(np.concatenate([[0], np.cumsum(~seen)])[interactions.offsets])
    done = int(np.count_nonzero(distinct == len(interactions.item_ids)))
    if done > MANY_DONE * interactions.num_users and len(interactions.item_ids) > 1:
        text = (
            f"{done:,} of {interactions.num_users:,} users have had all {len(interactions.item_ids):,} items: nothing "
            "is left to recommend to them"
        )
        report.notice(text, parameter="seen_items", weight=55)


def seen_before(interactions: Interactions) -> np.ndarray:
    """(N) bool: whether the user of each event had its item before."""
    offsets, seen = interactions.offsets, np.zeros(len(interactions), bool)
    first = 0
    while first < interactions.num_users:  # a block of complete users
        last = int(np.searchsorted(offsets, offsets[first] + EVENTS_PER_BLOCK, side="right")) - 1
        last = min(max(last, first + 1), interactions.num_users)
        block = slice(offsets[first], offsets[last])
        users = np.repeat(np.arange(last - first), np.diff(offsets[first : last + 1]))
        pairs = users * len(interactions.item_ids) + interactions.items[block]
        order = np.argsort(pairs, kind="stable")  # equal pairs stay in the order of the history
        ordered = pairs[order]
        seen[block][order[1:]] = ordered[1:] == ordered[:-1]
        first = last
    return seen


def _warn_of_ties(report: InputReport, interactions: Interactions, options: LogOptions) -> None:
    times, offsets = interactions.timestamps, interactions.offsets
    starts_moment = np.ones(len(times), bool)
    starts_moment[1:] = times[1:] != times[:-1]
    starts_moment[offsets[:-1]] = True
    mean = len(times) / int(starts_moment.sum())
    ends = offsets[1:][np.diff(offsets) >= 3]
    tied = int(np.count_nonzero(~starts_moment[ends - 1] | ~starts_moment[ends - 2]))
    if mean >= BASKET:
        text = (
            f"users have {mean:.1f} events at a time on average (baskets): a target is mostly predicted from its own "
            "basket, whose order means little"
        )
        report.notice(text, parameter="position_column", weight=50)
    elif tied > MANY_TIED * len(ends) and _rows_decide(options):
        text = (
            f"the held-out events of {tied:,} of {len(ends):,} users have the same time as an event beside them: the "
            "order of the rows decides which one is held out"
        )
        report.notice(text, parameter="position_column", weight=50)


def _rows_decide(options: LogOptions) -> bool:
    """Whether events with the same second are in the order of the rows. Finer times order them, if there are any."""
    return options.position_column == NONE and options.time_unit not in ("ms", "us", "ns")
