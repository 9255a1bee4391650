"""Real servers of different bundles over one state directory: histories outlive the models that see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import LATER_FIRST, LATER_ITEMS, TINY_ITEMS, running_server
from streams import assert_states_are_replays

from dman_runtime import cli
from dman_runtime.model.generation import Generation
from sdk import Client, Event, Recommendations

pytestmark = pytest.mark.slow

# The first bundle knows 1 to 60, the later one 31 to 80; nobody knows 999, nor "new".
HISTORY = [59, 70, 60, 999, "new", 80, 5, 31, 33, 31, 79, 12, 44]
TIMES = [100 * n for n in range(1, len(HISTORY) + 1)]


def known(item_ids: Sequence[object], first: int, last: int) -> list[object]:
    return [item for item in item_ids if isinstance(item, int) and first <= item <= last]


def assert_same(found: Recommendations, expected: Recommendations) -> None:
    assert (found.event_count, found.source) == (expected.event_count, expected.source)
    assert [item.item_id for item in found] == [item.item_id for item in expected]
    scores = np.array([item.score for item in expected])
    assert np.abs(np.array([item.score for item in found]) - scores).max() <= 1e-4 * np.abs(scores).max()


def test_event_of_an_unknown_item_is_shown_survives_and_enters_the_state_of_a_later_bundle(
    exact_bundle: Path, later_bundle: Path, later: Generation, tmp_path: Path
) -> None:
    state, events = tmp_path / "state", tuple(map(Event, HISTORY, TIMES))
    seen_by_first = known(HISTORY, 1, TINY_ITEMS)
    with running_server(exact_bundle, state) as (address, _), Client(address, timeout=30) as client:
        first = client.update("anna", HISTORY[:6], timestamps=TIMES[:6])
        assert (first.event_count, first.history_count, first.applied) == (2, 6, 2)
        assert first.unknown_item_ids == ("70", "999", "new", "80")
        client.update("anna", HISTORY[6:], timestamps=TIMES[6:])
        client.update("bert", [75, 76, 77])  # of unknown items only
        assert client.recommend("bert").is_popular
        assert client.user("anna", recent_events=100).recent_events == events

    with running_server(exact_bundle, state) as (address, _), Client(address, timeout=30) as client:
        user = client.user("anna", recent_events=100)
        assert (user.event_count, user.history_count) == (len(seen_by_first), len(HISTORY))
        assert user.recent_events == events
        before = client.recommend("anna", 60)

    with running_server(later_bundle, state) as (address, _), Client(address, timeout=30) as client:
        seen_by_later = known(HISTORY, LATER_FIRST, LATER_FIRST + LATER_ITEMS - 1)
        user = client.user("anna", recent_events=100)
        assert (user.event_count, user.history_count) == (len(seen_by_later), len(HISTORY))
        assert user.recent_events == events
        answers = {name: client.recommend(name, 50) for name in ("anna", "bert", "nobody")}
        assert not {item.item_id for item in answers["anna"]} & set(seen_by_later)
        assert answers["bert"].event_count == 3 and not answers["bert"].is_popular
        what_if = client.recommend("anna", 50, what_if=[40, 41])
        assert client.update("anna", [], request_id="nothing").event_count == len(seen_by_later)
    assert set(assert_states_are_replays(later, state)) == {"anna", "bert"}

    log = tmp_path / "log.csv"
    rows = [f"anna,{item},{time}\n" for item, time in zip(HISTORY, TIMES, strict=True)]
    rows += [f"bert,{item},{n}\n" for n, item in enumerate((75, 76, 77), start=1)]
    log.write_text("user_id,item_id,timestamp\n" + "".join(rows))
    fresh = tmp_path / "fresh"
    options = ["--bundle", later_bundle, "--state", fresh, "--input", log]
    assert cli.main(["import", *map(str, options)]) == 0
    with running_server(later_bundle, fresh) as (address, _), Client(address, timeout=30) as client:
        for name, answer in answers.items():
            assert_same(answer, client.recommend(name, 50))
        assert_same(what_if, client.recommend("anna", 50, what_if=[40, 41]))

    with running_server(exact_bundle, state) as (address, _), Client(address, timeout=30) as client:
        assert_same(client.recommend("anna", 60), before)  # and back again


def test_servers_of_two_bundles_share_a_state_directory_at_the_same_time(
    exact_bundle: Path, later_bundle: Path, exact: Generation, later: Generation, tmp_path: Path
) -> None:
    """As while a new bundle is rolled out: updates through either server are in the answers of both."""
    state = tmp_path / "state"
    with (
        running_server(exact_bundle, state) as (old_address, _),
        running_server(later_bundle, state) as (new_address, _),
        Client(old_address, timeout=30) as old,
        Client(new_address, timeout=30) as new,
    ):
        for n in range(1, 31):
            client = (old, new)[n % 2]
            result = client.update("anna", [2 * n + 20])  # 22 to 80
            assert result.history_count == n
        for client, (first, last) in ((old, (1, 60)), (new, (31, 80))):
            items = known([2 * n + 20 for n in range(1, 31)], first, last)
            answer = client.recommend("anna", 1000)
            assert answer.event_count == len(items)
            assert {item.item_id for item in answer} == set(range(first, last + 1)) - set(items)
    for generation in (exact, later):
        assert len(assert_states_are_replays(generation, state)["anna"]) == 30
