"""Writes docs/options.md, the reference of every command, from the parsers themselves: `make docs`.

    python -m tools.options_page [--out docs/options.md]

A test writes the page again and compares, so the page cannot differ from what the commands accept.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from dman_runtime import cli
from dman_runtime.options import Parser, run_command
from dman_train import evaluate, export, train
from dman_train.config import BaselineConfig, DataConfig, ModelConfig, TrainConfig, to_dict
from dman_train.presets import BASELINE_PRESETS, PRESETS
from tools import cold, compare, generate, gpu_check, loadgen, records, report, runs, tune
from tools.bench import __main__ as bench
from tools.bench import engines, life, reading, signals, training, versus
from tools.bench.peers import __main__ as peers
from tools.bench.report import table, write_page
from tools.scale import __main__ as scale
from tools.scale import plan
from tools.soak import __main__ as soak

HEADS = ("option", "default", "choices", "variable", "meaning")
CONFIGS: dict[type, str] = {
    ModelConfig: "The network. Travels into the bundle.",
    BaselineConfig: "A system to compare with, for `dman_train.baselines`.",
    TrainConfig: "How the weights are found.",
    DataConfig: "How an interaction log is read. See [your own data](data.md).",
}
NOTES = {
    "dman-runtime": "`--verbose` comes before the command: `dman-runtime --verbose serve`.",
    "dman-runtime status": (
        "The exit status is 0 for a server that is ready and has no problems, 1 for any other, 2 where none answers. "
        "[Operations](operations.md#dman-runtime-status) shows the output."
    ),
    "dman-runtime ingest": "See [events from a topic or a file](ingest.md).",
    "dman-runtime verify": (
        "The exit status is 0 for a sound store, 1 for a damaged one. See [operations](operations.md#check-the-store)."
    ),
    "dman-runtime token": (
        "It prints a new token and the line for the file of `--tokens`. "
        "See [SECURITY.md](../SECURITY.md#tokens-and-roles)."
    ),
    "python -m dman_train.evaluate": "The fields of DataConfig have the values of the training by default.",
    "python -m dman_train.baselines": "A run of a baseline can be evaluated, but not exported.",
    "python -m tools.tune": (
        "Repeat `--space` for each field to vary: `field=low:high`, `field=low:high:log` (drawn on a log scale) or "
        "`field=a,b,c`. The config options below set the fields that do not vary. With `--system` the search is for a "
        "baseline, and the fields of [BaselineConfig](#baselineconfig) replace those of ModelConfig."
    ),
    "python -m tools.generate": (
        "`--task planted` writes a puzzle. Two keys among the first 15 events of a user decide the validation target "
        "and the test target, hundreds of events later. By default nothing among the last 80 inputs reveals them. "
        "Guessing gives an HR@10 of 10 / answers: .25 by default."
    ),
}
INTRODUCTION = """\
Written by `make docs` from the code. Do not edit.

- An option whose row names a variable takes its default from that environment variable when it is set:
  `DMAN_PORT=50052 dman-runtime serve`. An option on the command line wins.
- A variable of the form `DMAN_PORT=tcp://10.0.0.1:50051`, which Kubernetes and Docker set for a service called `dman`,
  is ignored with a warning.
- A field of a config with the default `True` or `False` is a pair of options, such as `--random-first-segment` and
  `--no-random-first-segment`. Its variable takes `true` or `false`.
- An option with the default `off` takes no value and has no variable.
- A name in capitals, such as `NAME`, stands for a word without an option: `dman-runtime token shop`.
- With `--json` the last line of the output is one JSON object.
- A command that fails prints one line, `error: ...`, and exits with status 2.
- The numbers in the meanings (`eq. 6`) are the equations of the paper, arXiv 2102.09269."""


def parsers() -> Iterator[argparse.ArgumentParser]:
    """The parser of every command, in the order of the page."""
    yield from _with_subcommands(cli.parser())
    yield train.parser()
    yield export.parser()
    yield evaluate.parser()
    yield train.parser(BASELINE_PRESETS)
    yield generate._parser()
    yield compare.parser()
    yield cold.parser()
    yield loadgen._parser()
    yield bench._parser()
    yield training._parser()
    yield versus._parser()
    yield reading._parser()
    yield signals._parser()
    yield engines._parser()
    yield life._parser()
    yield peers._parser()
    yield soak._parser()
    yield scale._parser()
    yield plan.parser()
    yield gpu_check.parser()
    yield runs.parser()
    yield records.parser()
    yield report.parser()
    yield tune._parser(ModelConfig)
    yield parser()


def _with_subcommands(root: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield root
    for action in root._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def page() -> list[str]:
    """The paragraphs and tables of docs/options.md."""
    with _no_variables():
        found = list(parsers())
    sections = [_command(command) for command in found]
    configs = [_config(config, purpose, found) for config, purpose in CONFIGS.items()]
    return ["# Options", INTRODUCTION, _contents(found), *sections, "## Presets", _presets(), *configs]


@contextmanager
def _no_variables() -> Iterator[None]:
    """Hides `DMAN_*` variables, which would change the defaults."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("DMAN_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _contents(found: Sequence[argparse.ArgumentParser]) -> str:
    titles = [command.prog for command in found] + ["Presets", *(config.__name__ for config in CONFIGS)]
    return "\n".join(f"- {_link(title)}" for title in titles)


def anchor(title: str) -> str:
    """The fragment by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _command(command: argparse.ArgumentParser) -> str:
    rows: list[Sequence[str]] = []
    configs = []
    for group in command._action_groups:
        if config := _config_of(group):
            configs.append(_link(config.__name__))
        else:
            rows += [_row(action, command) for action in _options(group)]
    parts = [f"## {command.prog}", command.description, NOTES.get(command.prog), rows and table(HEADS, rows)]
    if configs:
        parts.append(f"It also takes the fields of {', '.join(configs)} as options.")
    return "\n\n".join(part for part in parts if part)


def _link(title: str) -> str:
    return f"[{title}](#{anchor(title)})"


def _options(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    """Options, and words that need none; neither help nor subcommands."""
    left_out = (argparse._HelpAction, argparse._SubParsersAction)
    return [action for action in group._group_actions if not isinstance(action, left_out)]


def _config_of(group: argparse._ArgumentGroup) -> type | None:
    """The config whose fields are the options of this group."""
    names = {action.dest for action in _options(group)}
    return next((config for config in CONFIGS if names == {field.name for field in fields(config)}), None)


def _config(config: type, purpose: str, found: Sequence[argparse.ArgumentParser]) -> str:
    command, group = next(
        (command, group) for command in found for group in command._action_groups if _config_of(group) is config
    )
    rows = [_row(action, command) for action in _options(group)]
    return "\n\n".join([f"## {config.__name__}", purpose, table(HEADS, rows)])


def _row(action: argparse.Action, command: argparse.ArgumentParser) -> Sequence[str]:
    name = action.option_strings[0] if action.option_strings else action.dest.upper()
    help_text, default = _help_and_default(action)
    variable = command.variables.get(name) if isinstance(command, Parser) else None
    cells = [_code(name), _code(default), ", ".join(map(_code, action.choices or ())), _code(variable), help_text]
    return [cell.replace("|", "\\|") for cell in cells]


def _code(text: str | None) -> str:
    return f"`{text}`" if text else ""


def _help_and_default(action: argparse.Action) -> tuple[str, str]:
    """Options without a default of their own say it at the end of their help: `(default: 20)`."""
    help_text = (action.help or "").replace("%%", "%")
    if action.default is argparse.SUPPRESS:
        help_text, _, default = help_text.removesuffix(")").partition(" (default: ")
        return help_text, default
    if action.required:
        return help_text, "required"
    if action.nargs == 0:
        return help_text, "off"
    return help_text, "" if action.default is None else str(action.default)


def _presets() -> str:
    """What each preset changes."""
    rows = [("`default`", f"the defaults of {_link('ModelConfig')} and {_link('TrainConfig')}")]
    before = _values(PRESETS["default"])
    for name in sorted(set(PRESETS) - {"default"}):
        rows.append((_code(name), _changes(_values(PRESETS[name]), before)))
    return "\n\n".join([PRESET_NOTE, table(("preset", "stands for"), rows), *_baseline_presets()])


def _baseline_presets() -> list[str]:
    """What the presets of each system change in the defaults."""
    rows = []
    for system in BASELINE_PRESETS["default"]:
        before = to_dict(BaselineConfig()) | {"system": system} | to_dict(TrainConfig())
        rows.append([system, *(_changes(_values(found[system]), before) for found in BASELINE_PRESETS.values())])
    return [BASELINE_PRESET_NOTE, table(("system", *map(_code, BASELINE_PRESETS)), rows)]


def _changes(values: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """The options that turn `before` into `values`."""
    changed = {field: value for field, value in values.items() if value != before[field]}
    return _code(" ".join(_as_option(field, value) for field, value in changed.items()))


def _as_option(field: str, value: Any) -> str:
    name = field.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


PRESET_NOTE = """\
`--preset` chooses where the options start from. Single options change a preset further.

- `default`: chosen by validation on MovieLens-1M, see the [experiments](experiments.md).
- `paper`: the equations of the paper. [The paper](paper.md) lists every difference from the text.
- `paper-literal`: the same equations with the settings of the text. Its 50 epochs are those of MovieLens; the text has
  8 elsewhere.
- `tiny`: a small network for a first try. On generated data it trains in a minute ([README](../README.md))."""

BASELINE_PRESET_NOTE = """\
The presets of `dman_train.baselines` differ by system. They change these defaults:

- `default`: the training options of a DMAN; SHAN's short sessions come from two short runs on MovieLens-1M.
- `paper`: the same network, five negatives, a step size of 0.001, no averaging; the rest as in the default."""


def _values(preset: Any) -> Mapping[str, Any]:
    return to_dict(preset.model) | to_dict(preset.train)


def parser() -> Parser:
    p = Parser(prog="python -m tools.options_page", description="Write the reference of all options.")
    p.add_argument("--out", type=Path, default=Path("docs/options.md"), help="Markdown file to write")
    return p


def _main(argv: Sequence[str] | None) -> int:
    out = parser().parse_args(argv).out
    write_page(out, page())
    print(f"wrote {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
