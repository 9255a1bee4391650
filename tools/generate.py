"""Write a synthetic interaction log and its item file: `python -m tools.generate --output data/log.csv`.

`--task planted` writes the puzzle of `PlantedConfig` instead: every user's last two events depend on the first few.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from dman_train.synthetic import PlantedConfig, SyntheticConfig, generate, write_items, write_log

_TASKS: dict[str, type[SyntheticConfig] | type[PlantedConfig]] = {
    "interests": SyntheticConfig,
    "planted": PlantedConfig,
}
_FIELDS = {
    "users": "number of users",
    "items": "items in the catalogue",
    "mean_events": "mean events per user",
    "answers": "values of a key: chance is 10 / answers at HR@10",
    "queries": "queries per user",
    "min_gap": "ordinary events before a query, at least",
    "max_gap": "and at most",
    "seed": "the same seed gives the same files",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.generate",
        description="Write a synthetic interaction log with long histories, and the file that describes its items.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("data/log.csv"), help="the log: .csv, .tsv or .parquet")
    parser.add_argument("--items", type=Path, default=Path("data/items.csv"), help="titles and attributes: likewise")
    parser.add_argument("--task", choices=_TASKS, default="interests", help="what a long memory is good for")
    for field, meaning in _FIELDS.items():
        defaults = [f"{getattr(config, field)} for {task}" for task, config in _TASKS.items() if hasattr(config, field)]
        text = f"{meaning} (default: {', '.join(defaults)})"
        parser.add_argument(
            _flag(field), dest=_dest(field), type=int, default=argparse.SUPPRESS, metavar="N", help=text
        )
    return parser


def _flag(field: str) -> str:
    return "--num-items" if field == "items" else f"--{field.replace('_', '-')}"


def _dest(field: str) -> str:
    return f"config_{field}"  # --items is a path


def _config(options: argparse.Namespace) -> SyntheticConfig | PlantedConfig:
    """Raises ValueError."""
    given = {field: getattr(options, _dest(field)) for field in _FIELDS if hasattr(options, _dest(field))}
    config_class = _TASKS[options.task]
    if strange := sorted(map(_flag, set(given) - {field.name for field in fields(config_class)})):
        raise ValueError(f"task {options.task} has no {', '.join(strange)}. Leave it out or choose another --task")
    return config_class(**given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        config = _config(options)
        log = generate(config)
        write_log(log, options.output)
        write_items(config, options.items)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"wrote {len(log):,} events of {log.num_users:,} users on {len(log.item_ids):,} items to {options.output}, "
        f"the {config.items:,} items of the catalogue to {options.items}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
