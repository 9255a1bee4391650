"""The plan on paper: its page is what the reports and the arithmetic give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from dman_runtime.errors import UsageError
from tools.scale import plan
from tools.scale.measured import MEASURED, Measured, measured
from tools.scale.plan import CORES, DISK, EMBEDDED, WRITER, Assumed, Plan, beyond, limits

PAGE = ROOT / "docs" / "scale.md"
M = {
    "record": 16_000.0, "record_on_disk": 20_000.0, "event_on_disk": 20.0, "calls": 500.0, "commit": 1.0,
    "rebuild": 20_000.0, "command": 0.1, "cores": 1.5, "redis_recommend": 50.0, "redis_update": 250.0,
    "redis_memory": 1.1,
}  # fmt: skip


def test_scale_page_is_what_the_reports_and_the_arithmetic_give() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert plan.page(text) == text, "run `make docs`"


def test_plan_is_the_arithmetic_by_hand() -> None:
    found = Plan(10**6, M, Assumed())
    assert found.updates == pytest.approx(10**6 * 3 * 3 / 86_400)
    assert found.calls == pytest.approx(5 * found.updates)
    assert found.cores == pytest.approx(520.83 / 500 / 0.6, rel=1e-4)
    assert (found.stored, found.rolling) == (40e9, 60e9)
    assert found.network == pytest.approx(found.updates * (4 * 5000 + 16_000 * 4))
    assert found.primary_seconds == pytest.approx(found.updates * 450e-6)
    assert found.rebuild_hours == pytest.approx(1e9 / 20_000 / 3600)
    assert found.night_machines == pytest.approx(found.rebuild_hours / 12 / 8)
    assert found.command_hours == pytest.approx(10**6 * 0.1 * 150 / 20_000 / 3600)


def test_machines_are_at_least_as_many_as_copies_and_grow_with_the_bytes() -> None:
    assert Plan(10, M, Assumed()).kvrocks_machines == Plan(10, M, Assumed()).valkey_machines == 3
    large = Plan(10**8, M, Assumed())
    assert large.kvrocks_machines == pytest.approx(6e12 * 3 / 3e12)
    assert large.valkey_machines == pytest.approx(6e12 * 1.1 * 3 / 96e9)


def test_a_slow_wire_asks_for_more_machines_than_the_disk() -> None:
    slow = Plan(10**8, M, replace(Assumed(), network=10e6))
    assert slow.kvrocks_machines == pytest.approx(slow.network / 6e6)


def test_a_limit_is_the_number_of_users_at_which_the_plan_reaches_it() -> None:
    a = Assumed()
    of = {what: users for what, _, users in limits(M, a)}
    assert Plan(of[CORES], M, a).cores == pytest.approx(a.cores)
    assert Plan(of[DISK], M, a).rolling == pytest.approx(a.disk * a.full)
    assert Plan(of[WRITER], M, a).updates * 1e-3 == pytest.approx(a.busy)
    assert Plan(of["a new model in a night"], M, a).night_machines == pytest.approx(1)
    assert list(of.values()) == sorted(of.values())
    least = min(of[what] for what in EMBEDDED)
    assert beyond(least - 1, M, a) == [] and len(beyond(least + 1, M, a)) == 1


def test_rolling_over_takes_as_long_as_its_slower_part() -> None:
    encoding, committing = Plan(10**6, M, Assumed()), Plan(10**9, M | {"command": 0.9}, Assumed())
    assert encoding.rolling_hours > encoding.command_hours
    assert committing.rolling_hours == committing.command_hours


def test_every_number_is_on_its_page() -> None:
    values = measured(ROOT)
    assert set(M) <= set(values) == set(MEASURED)
    assert all(value > 0 for value in values.values())


def test_a_page_that_no_longer_says_a_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing\n")
    with pytest.raises(UsageError, match=r"page\.md no longer says: speed"):
        Measured("speed", "/s", "page.md", (r"speed ([\d.]+)",)).value(tmp_path)


def test_a_number_is_read_with_its_commas_and_its_arithmetic_shown(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("took 1,200 and 300\n")
    both = Measured("sum", "", "page.md", (r"took ([\d,]+) and ([\d,]+)",), lambda a, b: a + b, "{0} + {1}")
    assert (both.value(tmp_path), both.arithmetic(tmp_path)) == (1500, "1,200 + 300")


def test_a_page_without_the_place_of_a_table_is_refused() -> None:
    with pytest.raises(UsageError, match="no single place for the table 'measured'"):
        plan.page("# Scale\n")


def test_the_command_writes_the_page_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "scale.md"
    copy.write_text(PAGE.read_text(encoding="utf-8").replace("| 1,000,000 users |", "| users |"), encoding="utf-8")
    assert plan.main(["--out", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    assert str(copy) in capsys.readouterr().out
