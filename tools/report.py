"""Builds reports/accuracy.md and reports/paper.md from the records in reports/records.parquet: `make report`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dman_runtime.errors import UsageError
from dman_runtime.options import Parser, run_command
from dman_train.config import TrainConfig, to_dict
from dman_train.interpret import LENGTH_GROUPS
from dman_train.presets import PRESETS
from tools.bench.report import table, write_page
from tools.paper import paper_page
from tools.record_file import RECORDS, Record, read_records
from tools.report_rows import DEFAULTS, FORMER, FORMER_DEFAULT, RECIPE, Row, decisive, label_of, options_of, rows_of
from tools.report_summary import summary_section

CHARTED = {"memory_slots": "m, memory slots", "layers": "L, layers", "segment_length": "T, events per segment"}
HOW_TO_READ = """\
Written by `make report` from `{records}`. [The log of experiments](../docs/experiments.md) says what the numbers \
mean, and what was tried without a record.

**Protocol.** Leave-one-out: the last event of a user is the test target, the second last the validation target. All \
items are ranked, and ties count against the model. The epoch is chosen by validation NDCG@10. Items the user has \
already seen are left out of the ranking, except for runs with `--seen-items keep`: these are on logs whose users come \
back to items. With `--seen-items keep-target` a target that was seen is ranked too.

**Rows.** A row is one configuration. A label names what differs from its preset: `paper` marks the runs of that \
preset, all others are compared with the default, or with "{former}" if they are nearer to that. With several seeds, a \
number is their mean, ± half the distance between the lowest and the highest.

**Differences.** A difference is a mean over users, with its 95 % interval from 2,000 bootstrap samples of users. A \
user's gain is the mean over the seeds. Only runs with the same recipe are compared.

**Recipes.** The first sections of a data set use the recipe of the default preset for all systems: eight epochs, \
learning rate 4e-3, and a moving average of the weights (`--ema-decay 0.998`) that is validated and exported. "Runs \
with another recipe" differ in `--seen-items` or in `--ema-decay`. The runs of `paper` are among them: weights not \
averaged, seen items used as negatives, seen targets ranked. So are our first runs: weights not averaged, learning \
rate 1e-3, twelve epochs. Before that, seen items were also used as negatives (and DMAN had GELU instead of ReLU).

**Earlier forms.** Today the commands of some rows train another network, or none:

- "{former}": the default before it had three layers. The commands repeat these rows with `{options}` in front of \
their own options.
- "earlier form": `paper`, `nran`, `caser`, `shan`, `hpmn` and `sdm` had other equations. The commands repeat these \
rows at commit a1a6dfd.
- `long_term=light` and `long_term=full`: DMAN had a long-term branch and a gate. The commands work at commit 50de181. \
Variant `xl` is the same as then.
- Other former options, such as `residual=plain` and `routing=shared`, work at commit 7b13317."""

HEADS = (
    "", "seeds", "valid HR@10", "HR@10", "NDCG@10", "HR@50", "NDCG@100", "parameters", "state bytes", "seconds"
)  # fmt: skip


def _how_to_read(records: Path) -> str:
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in FORMER_DEFAULT.items())
    return HOW_TO_READ.format(records=records, former=FORMER, options=options)


def ours(rows: Sequence[Row]) -> Row | None:
    """The row of the default preset in the recipe of these rows; without one, DMAN's best row."""
    candidates = [row for row in rows if row.is_dman and row.content["model"]["variant"] == "dman"]
    labelled = {label_of(row.content, but=(*RECIPE, "epochs")): row for row in reversed(candidates)}
    defaults = [labelled[label] for label in DEFAULTS if label in labelled]
    return next(iter(defaults or candidates), None)


def by_recipe(rows: Iterable[Row]) -> list[list[Row]]:
    """Groups of rows that can be compared: those with the same options of RECIPE.

    The group with the default recipe is first, also if it keeps seen items. It includes systems that only count.
    """
    default, groups = to_dict(TrainConfig()), dict[tuple[Any, ...], list[Row]]()
    for row in rows:
        groups.setdefault(tuple(row.content["train"].get(name, default[name]) for name in RECIPE), []).append(row)

    def order(recipe: tuple[Any, ...]) -> list[tuple[bool, bool]]:
        return [
            (value not in (default[name], "keep"), value == "keep") for name, value in zip(RECIPE, recipe, strict=True)
        ]

    return [groups[recipe] for recipe in sorted(groups, key=order)]


def dataset_section(name: str, groups: Sequence[Sequence[Row]], directory: Path) -> str:
    """Of one log, whose rows are grouped by their recipes."""
    rows, *others = groups
    described, best = rows[0].content["dataset"], ours(rows)
    parts = [
        f"## {name}",
        "{users:,} users, {items:,} items, {events:,} events (fingerprint `{fingerprint:.12}`).".format(**described),
        "### Systems",
    ]
    systems = [row for row in rows if not row.is_dman or row is best]
    parts.append(table(HEADS, [row.cells() for row in systems]))
    variants = [row for row in rows if row.is_dman]
    if len(variants) > 1:
        parts += ["### DMAN: variants and decisions", table(HEADS, [row.cells() for row in variants])]
        parts += charts(name, variants, directory)
    parts += comparison(rows)
    parts += ["### By length of the history", by_length(rows)]
    for group in others:
        parts += ["### Runs with another recipe", table(HEADS, [row.cells() for row in group]), *comparison(group)]
    return "\n\n".join(parts)


def comparison(rows: Sequence[Row]) -> list[str]:
    """Our system minus each other one of the same recipe, if there is one of each."""
    mine = ours(rows)
    if mine is None or len(rows) == 1:
        return []
    return [f"### {mine.label} minus each other row", differences(mine, [row for row in rows if row is not mine])]


def differences(best: Row, others: Sequence[Row]) -> str:
    heads = ("minus", "HR@10", "NDCG@10", "NDCG@10, >= 200 events")
    lines = []
    for row in others:
        if best.is_of_the_same_users_as(row):
            whole = [best.gain_over(row, metric) for metric in ("hr@10", "ndcg@10")]
            lines.append([row.label, *whole, best.gain_of_long_histories_over(row, "ndcg@10")])
    return table(heads, lines)


def by_length(rows: Sequence[Row]) -> str:
    sizes = zip(LENGTH_GROUPS, _sizes(rows), strict=True)
    heads = ["HR@10 / NDCG@10", *(f"{group} events ({n} users)" for group, n in sizes)]
    lines = []
    for row in rows:
        cells = []
        for group in range(len(LENGTH_GROUPS)):
            found = [record.group_metrics(group) for record in row.records]
            cells.append(
                f"{np.mean([m['hr@10'] for m in found]):.4f} / {np.mean([m['ndcg@10'] for m in found]):.4f}"
                if found[0]
                else "-"
            )
        lines.append([row.label, *cells])
    return table(heads, lines)


def _sizes(rows: Sequence[Row]) -> list[int]:
    return np.bincount(rows[0].records[0].groups, minlength=len(LENGTH_GROUPS)).tolist()


def charts(name: str, rows: Sequence[Row], directory: Path) -> list[str]:
    """Figure 2 of the paper: a chart for each size that was run with several values, all else as in the preset."""
    from dman_train.plots import plot_lines

    standard, series = options_of(PRESETS["default"], rows[0].content["dataset"]), {}
    for key, title in CHARTED.items():
        points = {}
        for row in rows:
            config = decisive(row.content)
            others = {k: v for k, v in config.items() if k != key}
            if all(standard.get(k, v) == v for k, v in others.items()):
                points[config[key]] = float(np.mean([r.metric("ndcg@10") for r in row.records]))
        if len(points) > 1:
            series[title] = {"test NDCG@10": dict(sorted(points.items()))}
    if not series:
        return []
    plot_lines(series, directory / f"accuracy-{name}.png")
    return [f"![test NDCG@10 by sizes](accuracy-{name}.png)"]


def commands(records: Sequence[Record]) -> str:
    lines = [[f"`{record.name}`", f"`{record.content['command']}`"] for record in records]
    return table(("record", "command"), lines)


def parser() -> Parser:
    p = Parser(prog="python -m tools.report", description="Build the reports on accuracy from the records.")
    p.flag("--records", type=Path, default=RECORDS, help="the file of all records")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("reports"),
        metavar="DIRECTORY",
        help="where accuracy.md, paper.md and their charts go",
    )
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    records = read_records(arguments.records)
    if not records:
        raise UsageError(
            f"{arguments.records} holds no records", "add some with python -m tools.records", parameter="records"
        )
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"{arguments.out} is no directory", "name one", parameter="out")
    by_log = {
        name: by_recipe(rows_of(record for record in records if record.dataset == name))
        for name in sorted({record.dataset for record in records})
    }
    summary = summary_section({name: rows for name, (rows, *_) in by_log.items()})
    parts = ["# Accuracy", summary, "## How to read this page", _how_to_read(arguments.records)]
    parts += [dataset_section(name, groups, arguments.out) for name, groups in by_log.items()]
    parts += ["## Commands", commands(records)]
    accuracy, paper = arguments.out / "accuracy.md", arguments.out / "paper.md"
    write_page(accuracy, parts)
    write_page(paper, paper_page(records, arguments.out, source=arguments.records))
    print(f"{accuracy}, {paper}: {len(records)} runs")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
