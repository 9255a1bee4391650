"""The accuracy report: rows, recipes, labels and charts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dman_train.config import BaselineConfig, DataConfig, ModelConfig, TrainConfig, to_dict
from dman_train.presets import Preset, decided
from dman_train.run import Run
from dman_train.stored_config import FORMER_DEFAULTS
from tools import paper_rows, report, report_rows
from tools.bootstrap import paired_bootstrap
from tools.record_file import Record, add, read_records
from tools.records import record_of, record_of_counts


def changed(record: Record, name: str, **options: dict[str, Any]) -> Record:
    """The record under another name, with some of its options in `model` or `train` replaced."""
    content = record.content | {part: record.content[part] | values for part, values in options.items()}
    return replace(record, name=name, content=content)


def reported(directory: Path, records: Sequence[Record]) -> tuple[list[Record], str]:
    """Stores the records and builds their report: what is stored, and the page."""
    for record in records:
        add(directory / "records.parquet", record)
    assert report.main(["--records", str(directory / "records.parquet"), "--out", str(directory)]) == 0
    return read_records(directory / "records.parquet"), (directory / "accuracy.md").read_text()


def test_report_shows_runs_seeds_and_differences(trained_run: Path, small_log: Path, tmp_path: Path) -> None:
    first = record_of(Run(trained_run), "one")
    popular = record_of_counts("popular", small_log, "popular", DataConfig(), "exclude")
    stored, text = reported(tmp_path, [first, changed(first, "two", train={"seed": 1}), popular])
    row = next(line for line in text.splitlines() if line.startswith("| DMAN"))
    assert "| 0, 1 |" in row and f"{first.metric('hr@10'):.4f} ± 0.0000" in row
    assert f"| popular | {paired_bootstrap([first.ranks], [popular.ranks], metric='hr@10')}" in text
    assert [record.name for record in stored] == ["one", "popular", "two"]
    for record in stored:
        assert f"| `{record.name}` | `{record.content['command']}` |" in text


def test_report_says_which_seconds_are_those_of_a_gpu(trained_run: Path, tmp_path: Path) -> None:
    here = record_of(Run(trained_run), "here")
    there = changed(here, "there", versions={"gpu": "NVIDIA H200"}, model={"variant": "xl"})
    _, text = reported(tmp_path, [here, there])
    (row,) = [row for row in text.splitlines() if row.endswith(" (GPU) |")]
    assert row.startswith("| xl (no memory)")


@pytest.mark.parametrize(
    ("option", "before"), [("seen_items", "exclude-from-ranking"), ("ema_decay", 0.0)], ids=["seen-items", "average"]
)
def test_report_compares_what_has_one_recipe(
    option: str, before: object, trained_run: Path, small_log: Path, tmp_path: Path
) -> None:
    first = record_of(Run(trained_run), "first")
    made = [
        changed(first, f"{variant}-{value}", model={"variant": variant}, train={option: value})
        for value in (getattr(TrainConfig(), option), before)
        for variant in ("dman", "xl")
    ]
    _, text = reported(tmp_path, [*made, record_of_counts("popular", small_log, "popular", DataConfig(), "exclude")])
    parts = text.split("\n## Commands")[0].split("\n### ")
    compared = [part.splitlines()[0].endswith("each other row") and part for part in parts]
    ours, theirs = [part for part in compared if part]
    words = report_rows.WORDS[option, before]
    assert words not in ours and "\n| xl" in ours and "| popular |" in ours
    assert theirs.count(words) == 2 and "\n| xl" in theirs and "popular" not in theirs
    assert parts[1].count("\n| ") == 4, "head, rule, our system and the counts"


@pytest.mark.parametrize(
    ("model", "idle", "decisive"),
    [
        ({"system": "gru4rec", "history": 200}, {"memory_training": "alternating"}, {"learning_rate": 0.5}),
        ({"system": "shan", "hops": 3}, {"hops": 2}, {"learning_rate": 0.5}),
        ({"system": "hpmn", "hops": 3}, {"memory_training": "alternating"}, {"hops": 2}),
        ({"variant": "xl", "memory_slots": 10}, {"abstraction_every": 1}, {"dropout": 0.5}),
        ({"variant": "fifo", "memory_slots": 10}, {"routing_iterations": 3}, {"memory_slots": 20}),
        ({"variant": "dman", "memory_slots": 10}, {"seed": 3}, {"memory_training": "alternating"}),
        ({"architecture": "paper", "variant": "dman", "long_term": "light"}, {"long_term": "gated"}, {"dropout": 0.5}),
    ],
)
def test_runs_are_told_apart_by_what_decides_them(
    model: dict[str, Any], idle: dict[str, Any], decisive: dict[str, Any]
) -> None:
    def options(changed: dict[str, Any]) -> dict[str, Any]:
        train = to_dict(TrainConfig()) | changed
        return report_rows.decisive({"model": model | {k: train.pop(k) for k in model if k in train}, "train": train})

    assert options(idle) == options({}) != options(decisive)
    old = {name: value for name, value in to_dict(TrainConfig()).items() if name != "warmup_steps"}
    assert report_rows.decisive({"model": model, "train": old}) == options({})


def test_report_of_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--records", str(tmp_path / "none.parquet")]) == 2
    assert "holds no records" in capsys.readouterr().err


def test_report_goes_into_a_directory(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, taken = tmp_path / "records.parquet", tmp_path / "paper.md"
    add(records, record_of(Run(trained_run), "one"))
    taken.write_text("mine")
    assert report.main(["--records", str(records), "--out", str(taken)]) == 2
    assert "paper.md is no directory; name one (--out)" in capsys.readouterr().err and taken.read_text() == "mine"


def timed(model: ModelConfig | BaselineConfig) -> ModelConfig | BaselineConfig:
    """As a run on a log with times has it."""
    return decided(Preset(model, TrainConfig()), has_times=True, events=1, items=1).model


def sized(train: TrainConfig, first: Record) -> TrainConfig:
    """As a run on the log of a record has it."""
    events = first.content["dataset"]["events"]
    return decided(Preset(ModelConfig(), train), has_times=True, events=events, items=1).train


@pytest.mark.slow
def test_report_charts_sizes_that_were_varied(trained_run: Path, tmp_path: Path) -> None:
    first, preset = record_of(Run(trained_run), "first"), report.PRESETS["default"]
    model, train = report.to_dict(timed(preset.model)), report.to_dict(sized(preset.train, first))
    made = [changed(first, f"m{slots}", model=model | {"memory_slots": slots}, train=train) for slots in (20, 5)]
    _, text = reported(tmp_path, made)
    (chart,) = tmp_path.glob("accuracy-*.png")
    assert chart.read_bytes().startswith(b"\x89PNG") and f"]({chart.name})" in text
    assert "DMAN, memory_slots=5" in text


@pytest.mark.slow
def test_report_still_labels_options_that_no_longer_exist(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_residual(config: object) -> dict[str, Any]:
        return {name: value for name, value in to_dict(config).items() if name != "residual"}

    for module in (report, report_rows):
        monkeypatch.setattr(module, "to_dict", without_residual)
    first, preset = record_of(Run(trained_run), "first"), report.PRESETS["default"]
    today = {"model": without_residual(timed(preset.model)), "train": without_residual(sized(preset.train, first))}
    stored = replace(first, content=first.content | today)
    made = [
        changed(stored, "today"),
        changed(stored, "gated", model={"residual": "gated"}, train={"seed": 1}),
        changed(stored, "plain", model={"residual": "plain"}),
        changed(stored, "shared", model={"residual": "gated", "routing": "shared"}),
        changed(stored, "m5", model={"residual": "gated", "memory_slots": 5}),
    ]
    _, text = reported(tmp_path, made)
    assert "| DMAN, residual=plain | 0 |" in text and "| DMAN, routing=shared | 0 |" in text
    assert re.search(r"^\| DMAN \| (0, 1|1, 0) \|", text, re.MULTILINE), (
        "today's runs and those that say gated are one row"
    )
    assert len(list(tmp_path.glob("accuracy-*.png"))) == 1, "a stored former option does not keep a run off the chart"


def test_report_links_to_the_log_of_experiments(trained_run: Path, tmp_path: Path) -> None:
    _, text = reported(tmp_path, [record_of(Run(trained_run), "one")])
    root = Path(__file__).parents[2]
    assert "](../docs/experiments.md)" in text and (root / "docs/experiments.md").exists()


@pytest.mark.slow
def test_committed_report_is_that_of_the_committed_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the intervals, which would take half a minute; their means are compared."""
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    for module in (report_rows, paper_rows):
        monkeypatch.setattr(module, "paired_bootstrap", partial(paired_bootstrap, samples=1))
    assert report.main(["--out", str(tmp_path)]) == 0
    interval = re.compile(r"\([+-][.\d]+ to [+-][.\d]+\)")
    for page in ("accuracy.md", "paper.md"):
        found, committed = (interval.sub("", file.read_text()) for file in (tmp_path / page, root / "reports" / page))
        assert found == committed
    charts = [{file.name for file in folder.glob("*.png")} for folder in (tmp_path, root / "reports")]
    assert charts[0] <= charts[1]


def test_log_of_experiments_names_records_that_exist() -> None:
    root = Path(__file__).parents[2]
    names = {record.name for record in read_records(root / "reports/records.parquet")}
    text = (root / "docs/experiments.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9-]+-s\d)`", text))
    assert len(named) > 30 and named - names == set()


# The first section


@pytest.fixture(scope="module")
def at_a_glance(trained_run: Path, small_log: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a log with the default, an ablation, baselines and a rule that counts, and of one that others published on."""
    first, preset = record_of(Run(trained_run), "first"), report.PRESETS["default"]
    train = to_dict(sized(preset.train, first))
    made = []
    for log in ("ml-1m", "shop"):
        dataset = first.content["dataset"] | {"name": log}
        options = {
            "default": to_dict(timed(preset.model)),
            "none": to_dict(timed(preset.model)) | {"time": "none"},
            "former": to_dict(timed(preset.model)) | FORMER_DEFAULTS[ModelConfig],
            "xl": to_dict(timed(preset.model)) | {"variant": "xl"},
            "sasrec": to_dict(timed(BaselineConfig("sasrec"))),
            "deep": to_dict(timed(BaselineConfig("sasrec"))) | {"layers": 5},
            "shan": to_dict(BaselineConfig("shan", segment_length=2, time="none", returns="off")),
        }
        for name, model in options.items():
            trained = train | (FORMER_DEFAULTS[TrainConfig] if name == "former" else {})
            found = replace(first, name=f"{log}-{name}", content=first.content | {"model": model, "train": trained})
            made.append(replace(found, content=found.content | {"dataset": dataset}))
        counted = record_of_counts("popular", small_log, f"{log}-popular", DataConfig(), "exclude")
        made.append(replace(counted, content=counted.content | {"dataset": dataset}))
    directory = tmp_path_factory.mktemp("report")
    text = reported(directory, made)[1]
    return text[text.index("## At a glance") : text.index("## How to read")]


def test_report_begins_with_the_default_beside_published_figures(at_a_glance: str) -> None:
    (header, *lines) = [line for line in at_a_glance.splitlines() if line.startswith("|")]
    assert header.startswith("| MovieLens-1M | times | seen items | ties | seeds |")
    ours = [line for line in lines if line.startswith("| ours: ")]
    assert [line.split(" | ")[:2] for line in ours] == [
        ["| ours: DMAN", "of events and request"],
        ["| ours: DMAN, former default", "of events and request"],
        ["| ours: DMAN, no times", "none"],
        ["| ours: sasrec, last 200", "of events and request"],
    ]
    assert any("HSTU-large, 8 blocks" in line and "0.3642" in line for line in lines)


def test_report_begins_with_what_the_default_gains_over_counting_and_over_the_same_signals(at_a_glance: str) -> None:
    lines = [line.split(" | ") for line in at_a_glance.splitlines() if line.startswith("| shop")]
    assert {tuple(line[1:3]) for line in lines} == {("DMAN", "1")}
    assert {line[4] for line in lines} == {
        "DMAN, former default",
        "popular",
        "sasrec, last 200",
        "sasrec, last 200, layers=5",
        "xl (no memory)",
    }
    for line in lines:
        if line[4] != "popular":
            assert line[6] == "+0.0000 (+0.0000 to +0.0000)"


def test_report_says_where_the_memory_is_worth_something(at_a_glance: str, trained_run: Path, tmp_path: Path) -> None:
    nothing = "+0.0000 (+0.0000 to +0.0000)"
    assert f"Nowhere beyond the interval. Elsewhere no gain is shown: ml-1m {nothing}, shop {nothing}." in at_a_glance
    first, preset = record_of(Run(trained_run), "first"), report.PRESETS["default"]
    ours = changed(first, "ours", model=to_dict(timed(preset.model)), train=to_dict(sized(preset.train, first)))
    far = changed(ours, "far", model={"variant": "xl"})
    _, text = reported(tmp_path, [replace(ours, ranks=np.ones_like(ours.ranks)), replace(far, ranks=far.ranks * 0 + 9)])
    assert f"Beyond the interval: {first.dataset} +0.6990 (+0.6990 to +0.6990). Elsewhere no gain is shown: -." in text


@pytest.mark.parametrize(
    ("variant", "model", "train", "label"),
    [
        ("dman", {}, {}, "DMAN"),
        ("dman", {"memory_slots": 5}, {}, "DMAN, memory_slots=5"),
        ("dman", FORMER_DEFAULTS[ModelConfig], FORMER_DEFAULTS[TrainConfig], "DMAN, former default"),
        ("dman", {"layers": 2, "memory_slots": 10}, {}, "DMAN, layers=2, memory_slots=10"),
        (
            "dman",
            FORMER_DEFAULTS[ModelConfig] | {"layers": 3, "memory_slots": 3},
            FORMER_DEFAULTS[TrainConfig],
            "DMAN, former default, layers=3, memory_slots=3",
        ),
        ("xl", FORMER_DEFAULTS[ModelConfig], FORMER_DEFAULTS[TrainConfig], "xl (no memory), former default"),
        ("xl", {}, FORMER_DEFAULTS[TrainConfig], "xl (no memory)"),
    ],
)
def test_row_is_named_after_the_default_that_it_is_nearer_to(
    variant: str, model: dict[str, Any], train: dict[str, Any], label: str
) -> None:
    standard = decided(report.PRESETS["default"], has_times=True, events=10**6, items=100)
    content = {
        "model": to_dict(standard.model) | {"variant": variant} | model,
        "train": to_dict(standard.train) | train,
        "dataset": {"events": 10**6, "items": 100},
    }
    assert set(report_rows.label_of(content).split(", ")) == set(label.split(", "))


def test_log_without_the_default_shows_the_former_one_in_its_place(
    trained_run: Path, small_log: Path, tmp_path: Path
) -> None:
    first, preset = record_of(Run(trained_run), "first"), report.PRESETS["default"]
    model = to_dict(timed(preset.model)) | FORMER_DEFAULTS[ModelConfig]
    train = to_dict(sized(preset.train, first)) | FORMER_DEFAULTS[TrainConfig]
    former = [changed(first, f"s{seed}", model=model, train=train | {"seed": seed}) for seed in (0, 1)]
    _, text = reported(tmp_path, [*former, record_of_counts("popular", small_log, "popular", DataConfig(), "exclude")])
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first.dataset} | ")]
    assert line.startswith(f"| {first.dataset} | DMAN, former default | 2 |") and "| popular |" in line
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in report.FORMER_DEFAULT.items())
    assert f"The commands repeat these rows with `{options}`" in text


@pytest.mark.parametrize("time", ["request", "none"])
def test_default_stands_for_us_even_if_the_former_one_was_better(time: str, trained_run: Path) -> None:
    first, preset = record_of(Run(trained_run), "first"), report.PRESETS["default"]
    model = to_dict(timed(preset.model)) | {"time": time}
    now = changed(first, "now", model=model, train=to_dict(sized(preset.train, first)))
    former = changed(now, "former", model=FORMER_DEFAULTS[ModelConfig], train=FORMER_DEFAULTS[TrainConfig])
    former.content["metrics"] = first.content["metrics"] | {"valid": first.content["metrics"]["valid"] | {"hr@10": 1.0}}
    rows = report_rows.rows_of([now, former])
    assert [row.records[0].name for row in rows] == ["former", "now"]
    found = report.ours(rows)
    assert found is not None and found.records == (now,)
