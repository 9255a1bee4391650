"""Write a synthetic interaction log and its item file: `python -m tools.generate --output data/log.csv`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dman_train.synthetic import SyntheticConfig, generate, write_items, write_log

_DEFAULTS = SyntheticConfig()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.generate",
        description="Write a synthetic interaction log with long histories, and the file that describes its items.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("data/log.csv"), help="the log: .csv, .tsv or .parquet")
    parser.add_argument("--items", type=Path, default=Path("data/items.csv"), help="titles and attributes: likewise")
    parser.add_argument("--users", type=int, default=_DEFAULTS.users, help="number of users")
    parser.add_argument("--num-items", type=int, default=_DEFAULTS.items, help="items in the catalogue")
    parser.add_argument("--mean-events", type=int, default=_DEFAULTS.mean_events, help="mean events per user")
    parser.add_argument("--seed", type=int, default=_DEFAULTS.seed, help="the same seed gives the same files")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        config = SyntheticConfig(
            users=options.users, items=options.num_items, mean_events=options.mean_events, seed=options.seed
        )
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
