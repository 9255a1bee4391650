"""Which records stand in the tables of reports/paper.md, and their numbers.

Metrics are computed from the stored ranks, so that records of earlier versions have all of them up to their rank limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from dman_runtime.data.evaluation import Ranking
from dman_train.stored_config import is_earlier_form
from tools.bootstrap import Difference, paired_bootstrap
from tools.paper_figures import FIGURE_2, ML_1M, STARRED, SYSTEMS, VARIANTS, Log
from tools.record_file import Record, ranking_of
from tools.report_rows import RECIPE, Row, changed_options, decisive, preset_name, standard_options

NAMES = (*SYSTEMS, *(name for name in VARIANTS.values() if name not in SYSTEMS))
# Values of seen_items that differ in the rank of targets that were seen only
SAME_WITHOUT_REPEATS = {"exclude-from-ranking", "keep-target"}

Picked = dict[str, Row]  # by the paper's name of the system


def records_of(records: Iterable[Record], log: Log) -> list[Record]:
    """The records of a log, of the version of it that most records have."""
    chosen = [record for record in records if record.dataset == log.name]
    versions = Counter(record.content["dataset"]["fingerprint"] for record in chosen)
    return [r for r in chosen if r.content["dataset"]["fingerprint"] == versions.most_common(1)[0][0]]


def paper_name(content: dict[str, Any], log: Log) -> str:
    """The paper's name of a system; that of our records if the paper does not have it."""
    model = content["model"]
    if "system" not in model:
        return VARIANTS[model["variant"]]
    name = next((name for name in SYSTEMS if name.lower() == model["system"]), model["system"])
    return f"{name}*" if model["system"] in STARRED and model["history"] <= log.segment_length else name


def ranking_on(content: dict[str, Any], log: Log) -> Ranking:
    """The ranking of a run on a log. Where no target was seen before, keeping it makes no difference."""
    ranking = ranking_of(content)
    return "seen_excluded" if ranking == "target_kept" and not log.repeats else ranking


def changes(content: dict[str, Any], log: Log) -> set[str]:
    """The options in which a run differs from its preset, with the paper's segment length for this log."""
    standard, name = standard_options(content), paper_name(content, log)
    if "system" not in content["model"] and preset_name(content) == "paper":
        standard["segment_length"] = log.segment_length
    if name.endswith("*"):
        standard["history"] = log.segment_length
    found = set(changed_options(content, standard))
    if content["model"].get("history") != standard.get("history"):
        found.add("history")
    if not log.repeats and {content["train"].get("seen_items"), standard["seen_items"]} == SAME_WITHOUT_REPEATS:
        found.discard("seen_items")
    return found


def pick(rows: Iterable[Row], log: Log, preset: str) -> Picked:
    """Of each of the paper's systems, the row nearest to the preset; all in the ranking that most of them have.

    Rows of an earlier form are left out: they had other equations than the paper.
    """
    candidates = []
    for place, row in enumerate(rows):
        now = not is_earlier_form(row.content["model"], row.content["train"])
        if now and preset_name(row.content) == preset and paper_name(row.content, log) in NAMES:
            found = changes(row.content, log)
            if preset == "paper" or found.isdisjoint(RECIPE):
                candidates.append((len(found), -len(row.records), place, row))
    best: dict[Ranking, Picked] = {}
    for *_, row in sorted(candidates, reverse=True):  # the nearest comes last
        best.setdefault(ranking_on(row.content, log), {})[paper_name(row.content, log)] = row
    most = max(best.values(), key=len, default={})
    return {name: most[name] for name in NAMES if name in most}


def sweep(rows: Iterable[Row], size: str) -> dict[int, Row]:
    """By the values of a size: DMAN's rows on MovieLens that differ from `paper` in this size and their epochs only.

    All have the same number of epochs: the one with most values. Of two rows with one value, the better one by
    validation is taken, which comes first.
    """
    by_epochs: dict[int, dict[int, Row]] = {}
    for row in rows:
        is_dman = paper_name(row.content, ML_1M) == "DMAN" and preset_name(row.content) == "paper"
        if is_dman and changes(row.content, ML_1M) <= {size, "epochs", "patience"}:
            options = decisive(row.content)
            by_epochs.setdefault(options["epochs"], {}).setdefault(options[size], row)
    found = max(by_epochs.values(), key=len, default={})
    return {value: found[value] for value in FIGURE_2[size][1] if value in found}


def values_of(row: Row | None, metric: str) -> list[float]:
    """A test metric of each run of a row; none if there is no row, or if its ranks are not stored so far."""
    found = [record.rank_metrics() for record in row.records] if row else []
    return [values[metric] for values in found] if all(metric in values for values in found) else []


def difference(one: Row | None, other: Row | None, metric: str) -> Difference | None:
    """How much better `one` is; None without both numbers, or if another option than the variant differs."""
    if one is None or other is None or not (values_of(one, metric) and values_of(other, metric)):
        return None
    mine, theirs = decisive(one.content), decisive(other.content)
    if any(mine[key] != theirs[key] for key in mine.keys() & theirs.keys() - {"variant"}):
        return None
    return paired_bootstrap(one.ranks(), other.ranks(), metric=metric)
