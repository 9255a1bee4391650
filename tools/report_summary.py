"""The first section of reports/accuracy.md: the default beside what others published, and beside counting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dman_runtime.data.evaluation import metrics
from dman_train.baselines.counts import COUNTS
from dman_train.presets import SHORT_HISTORY
from tools.bench.report import table
from tools.bootstrap import paired_bootstrap
from tools.report_rows import DEFAULTS, FORMER, METRICS, WORDS, Row, changed_options, mean_and_spread, standard_options

ANCHORED = "ml-1m"  # the log that published figures are about
EXACT_TIMES = 2999  # its first users, whose times are all exact; see the README beside the log
WITH_SIGNALS = ("sasrec", "gru4rec", "hpmn")


class Published(NamedTuple):
    """A figure of others on MovieLens-1M, with its protocol; "?" where it is not said."""

    system: str
    times: str
    seen: str
    ties: str
    values: tuple[float | None, ...]  # as METRICS


_USES = "of events, and of the target itself"
PUBLISHED = (
    Published("HSTU-large, 8 blocks (RecTools)", _USES, "left out", "stable", (0.3642, 0.2164, None, None)),
    Published("HSTU, full softmax (NetEase)", _USES, "?", "?", (0.3419, 0.1944, None, None)),
    Published("HSTU-large (Meta)", _USES, "the last 200 left out", "unstable", (0.3294, 0.1893, 0.5935, None)),
    Published("HSTU, 2 blocks (RecTools)", _USES, "left out", "stable", (0.3227, 0.1879, None, None)),
    Published("SASRec, 3000 sampled negatives", "none", "?", "?", (0.3159, 0.1857, None, None)),
    Published("SASRec, full softmax", "none", "?", "?", (0.3152, 0.1821, None, None)),
    Published("SASRec, 2 blocks (RecTools)", "none", "left out", "stable", (0.2877, 0.1622, None, None)),
    Published("BERT4Rec", "none", "?", "?", (0.2843, 0.1537, None, None)),
    Published("DMAN, the paper's figures", "none", "?", "?", (0.2518, None, 0.5324, 0.2203)),
    Published("SASRec, 1 negative", "none", "?", "?", (0.2500, 0.1341, None, None)),
)
_FORMER_DEFAULTS = (f"DMAN, {FORMER}", f"DMAN, {FORMER}, no times")
_TIMES = {"request": "of events and request", "events": "of events"}
_HEADS = ("MovieLens-1M", "times", "seen items", "ties", "seeds", "HR@10", "NDCG@10", "HR@50", "NDCG@100")
_ABOUT = """\
What a user may ask first. Each row names its protocol, as numbers of different protocols cannot be compared: whether \
the model sees times, whether items that the user has seen are left out of the ranking, in which order events of one \
second come, and how many trainings a mean is of (± half the distance between the lowest and the highest). "Of events \
and request": the model knows when it is asked, which here is the time of the event to be predicted, as with the HSTU \
rows. Rows without "ours" are what others published; "?" is what they do not say."""
_EXACT = """\
In our copy of the log, the times of {count:,} users are exact. Those of the other users are in part reconstructed. \
Results of the {count:,} users alone: {rows}."""
_COUNTED = """\
On logs whose users come back to items, rules that only count are hard to beat. Test NDCG@10 of the default on the \
other logs, and what it has more than rules that count, than other systems with the same signals, than itself without \
memory (`xl`) or with a queue for one (`fifo`), and than the former default, with a 95 % interval over users. A log on \
which the default has not been trained yet has the former default in its place:"""
_MEMORY = """\
**What the memory is worth.** DMAN minus itself without memory (`xl`), NDCG@10. {better} Elsewhere no gain is \
shown: {others}. Logs whose names begin with `planted` are generated: only what lies far back answers them."""

_COUNTED_HEADS = (
    "log", "ours", "seeds", "NDCG@10", "minus", "NDCG@10 of that", "difference", "users with >= 200 events"
)  # fmt: skip


def summary_section(rows: Mapping[str, Sequence[Row]]) -> str:
    """Of the rows of each log that were trained with the default recipe or only count."""
    parts = ["## At a glance", _ABOUT]
    if ANCHORED in rows:
        parts += _anchored(rows[ANCHORED])
    compared = {name: found for name in sorted(rows) if name != ANCHORED and (found := _compared(rows[name]))}
    if compared:
        lines = [[name, *cells] for name, found in compared.items() for cells in found]
        parts += [_COUNTED, table(_COUNTED_HEADS, lines)]
    if memory := _memory(rows):
        parts.append(memory)
    return "\n\n".join(parts)


def _anchored(rows: Sequence[Row]) -> list[str]:
    shown = [row for row in rows if _is_default(row) or _is_plain_baseline(row)]
    mine = [(_mean(row, "hr@10"), _own_cells(row)) for row in shown]
    theirs = [(one.values[0] or 0.0, _published_cells(one)) for one in PUBLISHED]
    lines = [cells for _, cells in sorted([*mine, *theirs], key=lambda line: -line[0])]
    exact = [
        f"{row.label} {_of_first(row, 'hr@10')} / {_of_first(row, 'ndcg@10')}" for row in shown if _is_default(row)
    ]
    text = _EXACT.format(count=EXACT_TIMES, rows="; ".join(exact))
    return [table(_HEADS, lines), *([text] if exact else [])]


def _is_default(row: Row) -> bool:
    return row.label in (*DEFAULTS, *_FORMER_DEFAULTS, f"DMAN, {WORDS['time', 'events']}")


def _is_plain_baseline(row: Row) -> bool:
    """A system that can see times, over the whole window, with no option changed but what it sees of them."""
    model, changed = row.content["model"], changed_options(row.content, standard_options(row.content))
    return model.get("system") in WITH_SIGNALS and model["history"] > SHORT_HISTORY and changed.keys() <= {"time"}


def _own_cells(row: Row) -> list[str]:
    content = row.content
    seen = "left out" if content["train"].get("seen_items", "exclude").startswith("exclude") else "kept"
    times = _TIMES.get(content["model"].get("time", "none"), "none")
    return [f"ours: {row.label}", times, seen, "stable", str(len(row.records)), *(row.metric(name) for name in METRICS)]


def _published_cells(one: Published) -> list[str]:
    values = [f"{value:.4f}" if value else "" for value in one.values]
    return [f"*{one.system}*", one.times, one.seen, one.ties, "?", *values]


def _of_first(row: Row, metric: str) -> str:
    """Of the users whose times are exact, who come first in the log."""
    return mean_and_spread([metrics(ranks[:EXACT_TIMES])[metric] for ranks in row.ranks()])


def _compared(rows: Sequence[Row]) -> list[list[str]]:
    """The default minus each counting rule and each system with the same signals, the best first."""
    ours = next((row for label in (*DEFAULTS, *_FORMER_DEFAULTS) for row in rows if row.label == label), None)
    if ours is None:
        return []
    metric = "ndcg@10"
    others = [row for row in rows if row is not ours and _is_opponent(row) and row.is_of_the_same_users_as(ours)]
    return [
        [
            ours.label,
            str(len(ours.records)),
            ours.metric(metric),
            row.label,
            row.metric(metric),
            ours.gain_over(row, metric),
            ours.gain_of_long_histories_over(row, metric),
        ]
        for row in sorted(others, key=lambda row: -_mean(row, metric))
    ]


def _memory(rows: Mapping[str, Sequence[Row]]) -> str:
    """On which logs the default is better than itself without memory; empty where there is nothing to compare."""
    shown: dict[bool, list[str]] = {True: [], False: []}
    for log in sorted(rows):
        ours = next((row for label in DEFAULTS for row in rows[log] if row.label == label), None)
        without = [row for row in rows[log] if _is_opponent(row) and row.content["model"].get("variant") == "xl"]
        if ours is not None and without and without[0].is_of_the_same_users_as(ours):
            gain = paired_bootstrap(ours.ranks(), without[0].ranks(), metric="ndcg@10")
            shown[gain.low > 0].append(f"{log} {gain}")
    if not any(shown.values()):
        return ""
    better = f"Beyond the interval: {', '.join(shown[True])}." if shown[True] else "Nowhere beyond the interval."
    return _MEMORY.format(better=better, others=", ".join(shown[False]) or "-")


def _mean(row: Row, metric: str) -> float:
    return float(np.mean([record.metric(metric) for record in row.records]))


def _is_opponent(row: Row) -> bool:
    """A rule that counts, another system, DMAN with another memory or as it was; with the signals of the default."""
    model = row.content["model"]
    if model.get("system") in COUNTS:
        return True
    signals = model.get("time") == "request" or model.get("returns") == "on"
    memory = model.get("variant") in ("xl", "fifo") or row.label in _FORMER_DEFAULTS
    return signals and (model.get("system") in WITH_SIGNALS or memory)
