"""Measures how fast training is, DMAN beside the systems it is compared with, and writes a report.

    python -m tools.bench.training --data ../shared/data/ml-1m/interactions.parquet --out reports/training.md

All systems take turns of a few steps in one process and on one thread; an event counts once it was an input of a step.
`--catalogue N` adds a run on a generated log of N items, on all cores, with the memory of each of its commands.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from dman_runtime.options import Parser, print_json, require_positive, run_command
from dman_train.config import BaselineConfig, DataConfig, ModelConfig
from dman_train.data import load, training_data
from dman_train.presets import BASELINE_PRESETS, PRESETS, SHORT_HISTORY, Preset, decided_by
from dman_train.trainer import Trainer
from tools.bench.blocks import Spread
from tools.bench.catalogue import large_catalogue
from tools.bench.report import Claim, Section, claims_table, cpu_model, table, write_page
from tools.bench.setting import scratch_directory

REFERENCE = "SASRec, 200 events"  # what the speed of DMAN is measured against
HEADS = ("system", "events/s", "ms a step", "DMAN / this")


def systems() -> dict[str, ModelConfig | BaselineConfig]:
    """What is measured; DMAN first."""
    chosen: dict[str, ModelConfig | BaselineConfig] = {
        "DMAN": ModelConfig(),
        "DMAN without memory (xl)": ModelConfig(variant="xl"),
        REFERENCE: BaselineConfig(),
    }
    for system in ("gru4rec", "caser", "shan", "hpmn", "sdm"):
        chosen[f"{system}, 200 events"] = BASELINE_PRESETS["default"][system].model
    chosen["SASRec*, 20 events"] = BaselineConfig(history=SHORT_HISTORY)
    return chosen


def measure(trainers: dict[str, Trainer], *, rounds: int, steps: int) -> dict[str, list[tuple[int, float]]]:
    """Events and seconds of each system's turn in each round; a round more comes first and does not count."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in trainers}
    for turn in range(rounds + 1):
        for name, trainer in trainers.items():
            began, events = time.perf_counter(), trainer.events
            for _ in range(steps):
                trainer.train_step()
            if turn:
                found[name].append((trainer.events - events, time.perf_counter() - began))
    return found


def report(found: dict[str, list[tuple[int, float]]], *, steps: int) -> tuple[Claim, str]:
    """The claim, and the table of all systems."""
    speeds = {name: Spread(tuple(events / seconds for events, seconds in turns)) for name, turns in found.items()}
    dman, rows, ratios = speeds["DMAN"].values, [], {}
    for name, speed in speeds.items():
        ratios[name] = Spread(tuple(ours / theirs for ours, theirs in zip(dman, speed.values, strict=True)))
        milliseconds = statistics.median(seconds for _, seconds in found[name]) / steps * 1e3
        lowest, highest = min(speed.values), max(speed.values)
        rows.append(
            [name, f"{speed.median:,.0f} ({lowest:,.0f} to {highest:,.0f})", f"{milliseconds:.0f}", str(ratios[name])]
        )
    ratio = ratios[REFERENCE].median
    return Claim(f"events/s of DMAN / {REFERENCE}", f"{ratio:.2f}", ">= 1", ratio >= 1), table(HEADS, rows)


def _parser() -> Parser:
    p = Parser(prog="python -m tools.bench.training", description="Measure how fast training is; write a report.")
    p.add_argument("--data", type=Path, required=True, help="interaction log")
    p.add_argument("--out", type=Path, default=Path("reports/training.md"), help="the report")
    p.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16", help="of the matrix products")
    p.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each system")
    p.add_argument("--steps", type=int, default=6, metavar="N", help="steps of a turn")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads")
    p.add_argument("--catalogue", type=int, default=0, metavar="N", help="measure a log of N items too; 0: do not")
    p.add_argument(
        "--scratch",
        type=Path,
        default=Path(),
        help="where its files go while it runs: 6 kB an item, removed at the end",
    )
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    require_positive(arguments, "rounds", "steps", "threads")
    load_before = os.getloadavg()[0]
    torch.set_num_threads(arguments.threads)
    interactions = load(arguments.data, DataConfig())
    data, recipe = training_data(interactions), replace(PRESETS["default"].train, precision=arguments.precision)
    chosen = {name: decided_by(interactions, Preset(config, recipe)) for name, config in systems().items()}
    trainers = {name: Trainer(one.model, one.train, data, torch.device("cpu")) for name, one in chosen.items()}
    found = measure(trainers, rounds=arguments.rounds, steps=arguments.steps)
    given = sys.argv[1:] if argv is None else argv
    how = (
        f"`{shlex.join(['python', '-m', 'tools.bench.training', *given])}`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, "
        f"{cpu_model()}, {arguments.threads} thread(s), {arguments.precision}, "
        f"load average before it {load_before:.2f}. D={ModelConfig().width}, L={ModelConfig().layers}, "
        f"the recipe of the default preset and its loss for all. {arguments.rounds} rounds of {arguments.steps} steps "
        "of each system in turn; numbers are medians of the rounds (smallest to largest), ratios are of single rounds."
    )
    claim, speeds = report(found, steps=arguments.steps)
    del trainers, interactions, data
    sections = _catalogue(arguments) if arguments.catalogue else []
    claims = [claim, *(one for section in sections for one in section.claims)]
    pages = [section.markdown() for section in sections]
    write_page(arguments.out, ["# Speed of training", how, claims_table(claims), speeds, *pages])
    print(claims_table(claims), speeds, f"wrote {arguments.out}", sep="\n\n")
    if arguments.json:
        large = [section.data for section in sections]
        print_json({"ratio": claim.measured, "met": claim.met, "turns": found, "catalogue": large})
    return 0


def _catalogue(arguments: argparse.Namespace) -> list[Section]:
    require_positive(arguments, "catalogue")
    with scratch_directory(arguments.scratch) as scratch:
        return [large_catalogue(arguments.catalogue, scratch)]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
