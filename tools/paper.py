"""The page reports/paper.md: Tables 3, 4, 5 and Figure 2 of the paper, its figures beside those of our records.

`tools.report` writes it. What the tables show is data of `tools.paper_figures`; `tools.paper_rows` chooses the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tools.bench.report import table
from tools.paper_figures import (
    FIGURE_2,
    LOGS,
    ML_1M,
    ORDER,
    SYSTEMS,
    TABLE_3,
    TABLE_4,
    TABLE_5,
    TAOBAO,
    VARIANTS,
    Comparison,
    Log,
)  # fmt: skip
from tools.paper_rows import Picked, difference, pick, ranking_on, records_of, sweep, values_of
from tools.record_file import Record
from tools.report_rows import Row, decisive, mean_and_spread, rows_of

COLUMNS = {"paper": "`paper`", "default": "default"}  # by preset
CHART = "paper-figure-2.png"
CHARTED = ("hr@10", "ndcg@100")
Panel = dict[str, dict[int, float]]  # of the chart: by metric, values by size or epoch
HOW_TO_READ = """\
Written by `make report`. Our numbers are from `{records}`; the paper's are those that it prints.

**Presets.** `paper` is trained with five negatives per event, as in the paper. "default" is our own recipe: softmax \
over all items. Its rows differ in whether they see times; [Records](#records) says so. If a system has several \
configurations, the one nearest to its preset is shown.

**Numbers.** All are shares, also those that the paper prints in percent. With several seeds, a number is their mean, \
± half the distance between the lowest and the highest. "-" means that there is no number: no record yet, or one that \
holds no ranks so high. With one target per user, the paper's Recall@k is HR@k.

**Rankings.** All our numbers in a column have one ranking, named above the table. *Seen excluded* leaves out items \
the user has already seen. *Seen kept* ranks them too. *Target kept* leaves them out, but never the target; this is \
the paper's protocol. [Measuring](../docs/measuring.md#what-the-metrics-mean) says more.

**How to repeat a number.** [Records](#records) names the records of each row. Their commands are in \
[accuracy](accuracy.md#commands). Records of an earlier form are in that report only: they had other equations, and \
today their commands train another network."""
STAND_INS = """\
Only MovieLens is the same data. The others are not available here as a whole, so other logs stand in for them. \
**Numbers on a stand-in can be compared between systems only, not with the paper's.** The paper does not give the \
number of events. Ours are counted after the filters of training."""
ABLATION = """\
All runs are under `paper`. "DMAN minus" is the mean difference over users, with its 95 % interval from 2,000 \
bootstrap samples of users. Two runs are only subtracted if they share all other settings. The paper's order is: DMAN \
above FIFO and NRAN, and these above XL."""


def paper_page(records: Sequence[Record], directory: Path, *, source: Path) -> list[str]:
    """The parts of the page, from the records in the file `source`. Writes the chart, if any, into `directory`."""
    rows = {log: rows_of(records_of(records, log)) for log in LOGS}
    picked = {(log, preset): pick(rows[log], log, preset) for log in LOGS for preset in COLUMNS}
    sweeps = {size: sweep(rows[ML_1M], size) for size in FIGURE_2}
    return [
        "# The paper's tables",
        HOW_TO_READ.format(records=source),
        "## Data sets",
        STAND_INS,
        _data_sets(rows),
        "## Table 3: three data sets",
        *(part for comparison in TABLE_3 for part in _systems(comparison, picked)),
        "## Table 4: long histories",
        *(part for comparison in TABLE_4 for part in _systems(comparison, picked)),
        "## Table 5: the memory",
        ABLATION,
        *(part for comparison in TABLE_5 for part in _variants(comparison, picked[comparison.log, "paper"])),
        "## Figure 2: sizes and learning curve",
        *_figure_2(sweeps, picked[TAOBAO, "paper"].get("DMAN"), directory),
        "## Records",
        _records(picked, sweeps),
    ]


def _data_sets(rows: Mapping[Log, Sequence[Row]]) -> str:
    lines = []
    for log in LOGS:
        ours = rows[log][0].content["dataset"] if rows[log] else {}
        sizes = [f"{ours[name]:,}" if ours else "-" for name in ("users", "items", "events")]
        paper = [f"{size:,}" if size else "-" for size in (log.users, log.items)]
        lines.append([log.paper or "-", *paper, f"`{log.name}`", *sizes, log.about])
    return table(("the paper's", "users", "items", "ours", "users", "items", "events", "what ours is"), lines)


def _systems(comparison: Comparison, picked: Mapping[tuple[Log, str], Picked]) -> list[str]:
    """Tables 3 and 4: the paper's systems on one log, under both presets."""
    by_preset = {preset: picked[comparison.log, preset] for preset in COLUMNS}
    lines = []
    for name in SYSTEMS:
        line = [name]
        for column, metric in enumerate(comparison.metrics):
            line += _papers(comparison, name, column)
            line += [_number(found.get(name), metric) for found in by_preset.values()]
        lines.append(line)
    about = _ranking(by_preset, comparison.log) + _segment_length(by_preset, comparison.log)
    return [_heading(comparison), about, table(_heads(comparison, *COLUMNS.values()), lines)]


def _variants(comparison: Comparison, picked: Picked) -> list[str]:
    """Table 5: DMAN and its variants on one log, and what their order says."""
    lines = []
    for name in VARIANTS.values():
        line, others = [name], [] if name == "DMAN" else [picked.get(name)]
        for column, metric in enumerate(comparison.metrics):
            found = [difference(picked.get("DMAN"), other, metric) for other in others]
            line += [*_papers(comparison, name, column), _number(picked.get(name), metric)]
            line.append(str(found[0]) if found and found[0] else "-")
        lines.append(line)
    by_preset = {"paper": picked}
    about = _ranking(by_preset, comparison.log) + _segment_length(by_preset, comparison.log)
    about += f" {_order(comparison.metrics, picked)}"
    return [_heading(comparison), about, table(_heads(comparison, COLUMNS["paper"], "DMAN minus"), lines)]


def _order(metrics: Iterable[str], picked: Picked) -> str:
    """Whether the variants are in the paper's order, as a sentence."""
    reversed_pairs = []
    for metric in metrics:
        for better, worse in ORDER:
            values, others = (values_of(picked.get(name), metric) for name in (better, worse))
            if values and others and np.mean(values) <= np.mean(others):
                found = difference(picked[better], picked[worse], metric) or "with other settings"
                reversed_pairs.append(f"{better} is not above {worse} in {metric.upper()}: {found}")
    if reversed_pairs:
        return f"**The order is not the paper's.** {'. '.join(reversed_pairs)}."
    if missing := [name for name in VARIANTS.values() if name not in picked]:
        return f"No record yet of {', '.join(missing)}."
    return "The order is the paper's."


def _heading(comparison: Comparison) -> str:
    log = comparison.log
    return f"### {log.paper}: `{log.name}`" if comparison.figures else f"### `{log.name}`"


def _heads(comparison: Comparison, *ours: str) -> list[str]:
    columns = ("the paper", *ours) if comparison.figures else ours
    return ["", *(f"{metric.upper()}, {column}" for metric in comparison.metrics for column in columns)]


def _papers(comparison: Comparison, name: str, column: int) -> list[str]:
    """The cell of the paper's number, if the table has such cells."""
    numbers = comparison.figures.get(name, ())
    return [f"{numbers[column]:.4f}" if column < len(numbers) else "-"] if comparison.figures else []


def _number(row: Row | None, metric: str) -> str:
    values = values_of(row, metric)
    return mean_and_spread(values) if values else "-"


def _ranking(by_preset: Mapping[str, Picked], log: Log) -> str:
    named = [
        f"{_words(next(iter(rows.values())), log)} ({COLUMNS[preset]})" for preset, rows in by_preset.items() if rows
    ]
    return f"Ranking: {', '.join(named) or '-'}."


def _segment_length(by_preset: Mapping[str, Picked], log: Log) -> str:
    """Says where our runs have another T than the paper has on this log."""
    lengths = {
        (row.content["model"]["segment_length" if row.is_dman else "history"], COLUMNS[preset])
        for preset, rows in by_preset.items()
        for name, row in rows.items()
        if row.is_dman or name.endswith("*")
    }
    if not log.paper or all(length == log.segment_length for length, _ in lengths):
        return ""
    ours = ", ".join(f"{length} ({column})" for length, column in sorted(lengths))
    return f" **T, events per segment:** {log.segment_length} in the paper; ours {ours}."


def _words(row: Row, log: Log) -> str:
    return ranking_on(row.content, log).replace("_", " ")


def _figure_2(sweeps: Mapping[str, Mapping[int, Row]], curve: Row | None, directory: Path) -> list[str]:
    """Figure 2: the chart, and its numbers."""
    panels, tables = dict[str, Panel](), list[str]()
    for letter, (size, rows) in zip("ab", sweeps.items(), strict=True):
        symbol, _ = FIGURE_2[size]
        epochs = next((f", {decisive(row.content)['epochs']} epochs" for row in rows.values()), "")
        title = f"({letter}) test metrics by {symbol}, {ML_1M.name}{epochs}"
        panels[title] = _means(rows)
        lines = [[str(value), *(_number(row, metric) for metric in CHARTED)] for value, row in rows.items()]
        tables += [f"{title}:", _points(symbol, lines)]
    title = f"(c) validation by epoch, {TAOBAO.paper}"
    panels[title] = learning_curve(curve)
    by_metric = list(panels[title].values())
    lines = [[str(epoch), *(f"{values[epoch]:.4f}" for values in by_metric)] for epoch in by_metric[0]]
    tables += [f"{title} (`{TAOBAO.name}`):", _points("epoch", lines)]
    return [*_chart(panels, directory), *tables]


def _means(rows: Mapping[int, Row]) -> Panel:
    """Test metrics by the values of a size, as means over the seeds."""
    return {
        metric.upper(): {value: float(np.mean(values_of(row, metric))) for value, row in rows.items()}
        for metric in CHARTED
    }


def _chart(panels: dict[str, Panel], directory: Path) -> list[str]:
    """Draws the panels and links to the picture; nothing if there is no point."""
    if not any(points for panel in panels.values() for points in panel.values()):
        return []
    from dman_train.plots import plot_lines

    plot_lines(panels, directory / CHART)
    return [f"![sizes and learning curve of DMAN under `paper`]({CHART})"]


def _points(symbol: str, lines: Sequence[Sequence[str]]) -> str:
    return table((symbol, *(metric.upper() for metric in CHARTED)), lines or [["-"] * (1 + len(CHARTED))])


def learning_curve(row: Row | None) -> Panel:
    """Validation metrics by epoch, as means over the runs that reached it."""
    epochs = [epoch for record in row.records for epoch in record.content["epochs"]] if row else []
    numbers = sorted({int(epoch["epoch"]) for epoch in epochs})
    return {
        metric.upper(): {
            number: float(np.mean([epoch[f"valid/{metric}"] for epoch in epochs if epoch["epoch"] == number]))
            for number in numbers
        }
        for metric in CHARTED
    }


def _records(picked: Mapping[tuple[Log, str], Picked], sweeps: Mapping[str, Mapping[int, Row]]) -> str:
    """The records of each row in a table or a panel."""
    used = [
        (log, name, row)
        for (log, preset), rows in picked.items()
        for name, row in rows.items()
        if preset == "paper" or (log.paper and name in SYSTEMS)
    ]
    points = {row.records[0].name: row for rows in sweeps.values() for row in rows.values()}  # one is in both panels
    used += [(ML_1M, "DMAN, Figure 2", row) for row in points.values()]
    lines = [
        [f"`{log.name}`", name, row.label, _words(row, log), ", ".join(f"`{record.name}`" for record in row.records)]
        for log, name, row in used
    ]
    return table(("log", "system", "settings", "ranking", "records"), lines or [["-"] * 5])
