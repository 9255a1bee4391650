"""A change of bundles under load: what callers see of it, how fast it is, and whether everything is right afterwards.

    python -m tools.bench.life --data FILE

Without --bundle and --other, the two bundles are made: untrained models of the default preset with different seeds,
which cost as much as trained ones, and catalogues that differ. Without --data, the log is made, too. The exit status is
1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dman_runtime.data.interactions import Interactions
from dman_runtime.data.logs import read_interactions
from dman_runtime.errors import UsageError
from dman_runtime.model.generation import Generation
from dman_runtime.options import Parser, run_command
from dman_runtime.store.lmdb import LmdbStore
from dman_train.synthetic import generate, write_log
from tools.bench import life_checks
from tools.bench.life_bundles import MADE_LOG, few_users, made_pair
from tools.bench.life_speed import speed
from tools.bench.lifecycle import QUICK, Course, Effort, Pair, Setting, roll_over, run
from tools.bench.report import Claim, Section, machine, show, sizes_of, write_report
from tools.bench.setting import Clock, end_with, measuring_parser, scratch_directory
from tools.bench.steady import RECOMMEND, UPDATE

MAX_RATIO = 2.0  # p99 of a phase, by that before
TOLERANCE = 1e-2  # states may be stored in float16, and histories are long
QUICK_USERS = 320  # a rebuild commits 64 at a time, and is to be killed between


# -- under load ------------------------------------------------------------------------------------------------------


def under_load(setting: Setting, base: Path, workers: int) -> Section:
    """Roll-over, roll-back and roll-over of a server, and what there is in its store afterwards."""
    state, fresh = setting.scratch / f"state-{workers}", setting.scratch / f"fresh-{workers}"
    shutil.copytree(base, state)
    with LmdbStore.open(base, readonly=True) as store:
        before = life_checks.history_counts(store)
    course = roll_over(setting, state, list(before), workers)
    added = course.found.added
    errors = life_checks.reply_errors(state, setting.pair.by_id, course.found.kept)
    wrong = life_checks.wrong_counts(state, before, added)
    log = setting.scratch / f"histories-{workers}.parquet"
    run("export-log", "--state", state, "--output", log)
    new = setting.pair.new
    run("import", "--bundle", new.bundle.path, "--state", fresh, "--input", log, "--provider", "cpu")
    states = life_checks.compared(new, state, fresh)
    shutil.rmtree(state)
    shutil.rmtree(fresh)
    effort = setting.effort
    return Section(
        f"Roll-over, {workers} worker{'s' if workers > 1 else ''}",
        f"{effort.clients} clients made {effort.per_second:g} calls a second, without retries: recommendations (k=10), "
        f"and for every fifth call an update of one event, for {len(before):,} users at random. Meanwhile: `rebuild` "
        f"with {effort.max_share:g} of a core, killed by SIGKILL {course.kills} times on the way and started again; "
        f"`activate` of the new bundle, of the old one again, and of the new one again, each with "
        f"{effort.settle_seconds:g} s of load behind it. A call belongs to the phase in which it was sent. "
        f"{len(course.found.kept):,} replies were computed again from the histories, under the bundle that each names. "
        "At the end all histories were exported and imported into a fresh store under the new bundle.",
        [*_claims_of_calls(course, effort), *_claims_of_states(errors, wrong, states, sum(added.values()))],
        ("phase", "s", "call", "calls", "failed", "p50 ms", "p99 ms", "max ms", "p99 by before"),
        _rows(course),
        {"phases": [phase._asdict() for phase in course.phases], "kills": course.kills},
    )


def _claims_of_calls(course: Course, effort: Effort) -> list[Claim]:
    failed, wrong, calls = course.failed(), course.wrong_bundle(), len(course.found.samples)
    shown = "; ".join(f"{count} {what}" for what, count in failed.most_common(5)) or "none"
    claims = [
        Claim("SIGKILLs of the rebuild", str(course.kills), f">= {effort.kills}", course.kills >= effort.kills),
        Claim("failed calls, and replies with items of another catalogue", f"{shown} of {calls:,}", "none", not failed),
        Claim(
            "replies of a bundle that did not serve then",
            f"{len(wrong)} of {calls:,}",
            "none",
            bool(calls) and not wrong,
        ),
    ]
    for phase in course.phases[1:]:
        for call in (RECOMMEND, UPDATE):
            ratio, title = course.ratio(phase, call), f"p99 of {call}, {phase.name}, by before"
            claims.append(Claim(title, f"{ratio:.2f}x", f"<= {MAX_RATIO:g}x", bool(ratio <= MAX_RATIO)))
    return claims


def _claims_of_states(
    errors: Sequence[float], wrong: Sequence[str], states: life_checks.Comparison, added: int
) -> list[Claim]:
    worst_reply, worst = (max(found, default=float("nan")) for found in (errors, states.errors.values()))
    return [
        Claim(
            "worst score of a reply, computed again",
            f"{worst_reply:.1e} of {len(errors):,} replies",
            f"<= {TOLERANCE:g}",
            bool(worst_reply <= TOLERANCE),
        ),
        Claim("users with an event lost or doubled", f"{len(wrong)}, {added:,} events added", "none", not wrong),
        Claim("histories unlike those imported", str(len(states.other_histories)), "none", not states.other_histories),
        Claim(
            "worst state beside that of a fresh import",
            f"{worst:.1e} of {len(states.errors):,} users",
            f"<= {TOLERANCE:g}",
            bool(worst <= TOLERANCE),
        ),
    ]


def _rows(course: Course) -> list[list[str]]:
    rows = []
    for phase in course.phases:
        for call in (RECOMMEND, UPDATE):
            calls = course.calls(phase, call)
            times = [f"{course.percentile(phase, call, percent):.2f}" for percent in (50, 99, 100)]
            failed = sum(bool(one.error) for one in calls)
            seconds, ratio = f"{phase.ended - phase.began:.0f}", f"{course.ratio(phase, call):.2f}"
            rows.append([phase.name, seconds, call, str(len(calls)), str(failed), *times, ratio])
    return rows


# -- the command -----------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    p = measuring_parser("tools.bench.life", "Measure a change of bundles under load.", Path("reports/life.md"))
    p.add_argument("--data", type=Path, default=None, help="interaction log; without it one is made")
    p.add_argument("--bundle", type=Path, default=None, help="the bundle before; without it both are made")
    p.add_argument("--other", type=Path, default=None, help="the bundle to change to")
    p.add_argument("--workers", default="1,2", metavar="N,...", help="numbers of workers to measure")
    p.add_argument("--rate", type=float, default=None, metavar="N", help="calls a second (default: 200)")
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments, clock = _parser().parse_args(argv), Clock()
    effort, workers = _effort(arguments), _numbers(arguments.workers)
    if (arguments.bundle is None) != (arguments.other is None):
        raise UsageError("one bundle only", "give both, or none", parameter="other")
    with scratch_directory(arguments.scratch) as scratch:
        interactions = read_interactions(arguments.data) if arguments.data else generate(MADE_LOG)
        if arguments.quick:
            interactions = few_users(interactions, QUICK_USERS)
        if interactions.num_users < effort.clients:
            raise UsageError("the log has too few users", "take a larger one", parameter="data")
        write_log(interactions, scratch / "log.parquet")
        given = arguments.bundle is not None
        paths = (arguments.bundle, arguments.other) if given else made_pair(interactions, scratch)
        old, new = (Generation.open(path.resolve(), provider="cpu") for path in paths)
        setting = Setting(scratch / "log.parquet", Pair(old, new), scratch, effort)
        facts = machine(scratch) | _facts(interactions, setting.pair, given=given)
        print("speed ...", flush=True)
        sections = [speed(setting, scratch / "base")]
        for count in workers:
            print(f"roll-over with {count} worker(s) ...", flush=True)
            sections.append(under_load(setting, scratch / "base", count))
    facts |= clock.facts(quick=arguments.quick)
    broken = sum(claim.met is False for section in sections for claim in section.claims)
    verdict = f"{broken} bounds were broken." if broken else "Every bound was kept."
    method = f"Written by `{_command(arguments)}`. {verdict}"
    write_report(arguments.out, "A change of bundles under load", method, facts, sections)
    show(arguments.out, facts, sections, as_json=arguments.json)
    return 1 if broken else 0


def _effort(arguments: argparse.Namespace) -> Effort:
    """Raises UsageError."""
    effort = QUICK if arguments.quick else Effort()
    if arguments.rate is None:
        return effort
    if not arguments.rate > 0:
        raise UsageError(f"rate is {arguments.rate:g}", "choose more than 0", parameter="rate")
    return replace(effort, per_second=arguments.rate)


def _command(arguments: argparse.Namespace) -> str:
    """What to run for the same report. It names no directory: those of this machine tell a reader nothing."""
    words = ["python -m tools.bench.life", f"--workers {arguments.workers}"]
    words += ["--quick"] * arguments.quick
    words += ["--data FILE"] if arguments.data else []
    words += ["--bundle OLD --other NEW"] if arguments.bundle else []
    words += [f"--rate {arguments.rate:g}"] if arguments.rate is not None else []
    return " ".join(words)


def _numbers(text: str) -> list[int]:
    """Raises UsageError."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 100 for part in parts):
        raise UsageError(f"workers is {text!r}", "give numbers from 1 to 99, such as 1,2", parameter="workers")
    return [int(part) for part in parts]


def _facts(log: Interactions, pair: Pair, *, given: bool) -> dict[str, str]:
    shared = len(pair.common_items)
    old, new = (sizes_of(one.bundle) for one in (pair.old, pair.new))
    retired, added = (len(one.bundle.items.item_ids) - shared for one in (pair.old, pair.new))
    return {
        "log": f"{len(log):,} events of {log.num_users:,} users on {len(log.item_ids):,} items",
        "old bundle": old["bundle"],
        "new bundle": f"{new['bundle']}: {retired:,} of those of the old one retired, {added:,} new",
        "sizes": f"{new['sizes']}, times: {pair.new.bundle.manifest.state.times}",
        "weights": "those of the given bundles" if given else "untrained, of different seeds",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where a bound is broken, 2 for what cannot be done."""
    return run_command(_main, argv)


if __name__ == "__main__":
    end_with(main)
