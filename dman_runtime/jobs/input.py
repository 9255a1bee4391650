"""What is asked of a log before a job works on it."""

from __future__ import annotations

from dman_runtime.data.input_report import InputReport
from dman_runtime.data.vocabulary import examples
from dman_runtime.errors import InputError, UsageError
from dman_runtime.jobs.partitions import MAX_UNKNOWN
from dman_runtime.model.bundle import Bundle


def notice_differences(report: InputReport, bundle: Bundle) -> None:
    """Adds a notice for what is written in another way than in the log of the training."""
    trained = bundle.manifest.data.get("input")  # older bundles have none
    unit = trained.get("time_unit") if isinstance(trained, dict) else None
    if report.time_unit and isinstance(unit, str) and unit and unit != report.time_unit:
        text = f"times are {report.time_unit} here, and were {unit[:30]} in the log of the training"
        report.notice(text, parameter="time_unit", weight=70)
    if bundle.manifest.integer_item_ids and report.item_ids == "text":
        text = "item ids are text here and integers in the bundle: items whose ids are no integers are unknown"
        report.notice(text, parameter="item_ids", weight=60)


def require_known(report: InputReport, bundle: Bundle, max_unknown: float = MAX_UNKNOWN) -> None:
    """Raises InputError if a larger share of the events, from 0 to 1, is of items that the bundle does not know.

    Ids of another form ("1.0" for "1") look like that, and so does a log of another catalogue. Raises UsageError for
    a limit that is no share.
    """
    if not 0 <= max_unknown <= 1:
        raise UsageError(f"max_unknown is {max_unknown:g}", "choose 0 to 1", parameter="max_unknown")
    if report.unknown_share > max_unknown:
        raise InputError(
            f"{report.path}: {report.unknown_share:.1%} of the events are of items that the bundle does not know, "
            f"such as {examples(report.unknown_examples)}; its items are such as {examples(bundle.items.item_ids)}",
            "write the ids as in training, or accept a larger share of unknown events",
            parameter="max_unknown",
        )
