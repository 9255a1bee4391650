"""Shows that the served system equals the trained one: leave-one-out metrics by three ways on the same users.

    python -m tools.compare --run runs/ml-1m --bundle bundle [--data FILE] [--users N] [--out reports/served.md]

PyTorch replays the model of the run, the engine replays the bundle, and a client feeds each history to a live server
and looks for the held-out item in its recommendations.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dman_runtime.data.evaluation import CUTOFFS_HR, MISS, UNKNOWN, HeldOut, metrics
from dman_runtime.data.log_options import options_of_training
from dman_runtime.data.vocabulary import read_known
from dman_runtime.errors import BundleError
from dman_runtime.jobs.evaluating import held_out_ranks
from dman_runtime.model.generation import Generation
from dman_runtime.options import Parser, configure_logging, print_json, run_command
from dman_train.ranking import all_ranks
from dman_train.run import open_run
from sdk import Client
from tools.bench.report import table, write_page

K = max(CUTOFFS_HR)


def parser() -> Parser:
    p = Parser(
        prog="python -m tools.compare", description="Metrics by PyTorch, by the engine and through a live server."
    )
    p.flag("--run", type=Path, default=Path("runs/latest"), help="run directory that the bundle was exported from")
    p.flag("--bundle", type=Path, default=Path("bundle"), help="bundle directory")
    p.flag("--data", type=Path, default=None, help="interaction log; without it, the one that was trained on")
    p.flag("--split", choices=["valid", "test"], default="test", help="which held-out event to predict")
    p.flag("--users", type=int, default=0, help="users, drawn at random; 0 for all")
    p.flag("--out", type=Path, default=Path("reports/served.md"), help="Markdown report to write")
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    return p


@contextlib.contextmanager
def live_server(bundle: Path) -> Iterator[str]:
    """`dman-runtime serve` on a free loopback port over an empty state directory; yields its address."""
    with tempfile.TemporaryDirectory(prefix="dman-compare-") as state:
        command = [sys.executable, "-m", "dman_runtime", "serve", "--port", "0", "--bundle", str(bundle)]
        process = subprocess.Popen(
            [*command, "--state", state], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            if " on " not in ready:
                raise BundleError("the server did not start; see the messages above")
            yield ready.split(" on ")[1].split(" ")[0]
        finally:
            process.terminate()
            process.wait(timeout=60)
            process.stdout.close()


def served_ranks(address: str, data: HeldOut, item_ids: list[str]) -> np.ndarray:
    """Ranks of the targets in the first K recommendations after feeding each history; MISS beyond, and if unknown."""
    ranks = np.full(len(data.targets), MISS, np.int64)
    with Client(address, timeout=60) as client:
        for row, history in enumerate(tqdm(data.histories, desc="serve", unit="user", disable=None)):
            user_id = f"user {row}"
            times = data.times[row].tolist()
            client.update(user_id, [item_ids[item] for item in history], timestamps=times if any(times) else None)
            if data.targets[row] == UNKNOWN:
                continue
            target = item_ids[data.targets[row]]
            at = int(data.target_times[row]) or None
            for rank, item in enumerate(client.recommend(user_id, k=K, at=at), start=1):
                if str(item.item_id) == target:
                    ranks[row] = rank
    return ranks


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    run, generation = open_run(arguments.run), Generation.open(arguments.bundle)
    bundle = generation.bundle
    trained = run.data_record
    log = read_known(
        arguments.data or Path(trained["path"]), bundle.items.index, options_of_training(trained), trained=trained
    )
    data = log.held_out(arguments.split)
    # Without a known event, items are ranked by popularity. It has ties, which a server breaks and the metrics do not.
    data = data.rows(np.flatnonzero([len(history) for history in data.histories]))
    if 0 < arguments.users < len(data.users):
        data = data.rows(np.sort(np.random.default_rng(0).choice(len(data.users), arguments.users, replace=False)))
    with live_server(arguments.bundle) as address:
        served = served_ranks(address, data, bundle.items.item_ids)
    return {
        "split": arguments.split,
        "users": len(data.users),
        "bundle_id": bundle.bundle_id,
        "pytorch": metrics(all_ranks(run.best_model(), data).seen_excluded),
        "engine": metrics(held_out_ranks(data, generation).seen_excluded),
        "server": metrics(served),
    }


def write_report(result: dict[str, Any], path: Path, command: str) -> float:
    """Writes the table; returns the largest difference between two ways."""
    ways = ("pytorch", "engine", "server")
    spread = {name: float(np.ptp([result[way][name] for way in ways])) for name in result["pytorch"]}
    heads = ("metric", "PyTorch", "engine (ONNX Runtime)", "client and live server", "largest difference")
    rows = [
        [name, *(f"{result[way][name]:.4f}" for way in ways), f"{difference:.4f}"]
        for name, difference in spread.items()
    ]
    parts = [
        "# The served system equals the trained one",
        f"`{command}`",
        f"{result['split']} split, {result['users']} users, bundle {result['bundle_id']}, seen items excluded.",
        table(heads, rows),
    ]
    write_page(path, parts)
    print("\n\n".join(parts))
    return max(spread.values())


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    configure_logging()
    result = compare(arguments)
    command = " ".join(["python -m tools.compare", *(sys.argv[1:] if argv is None else argv)])
    difference = write_report(result, arguments.out, command)
    if arguments.json:
        print_json(result)
    return 0 if difference <= 0.001 else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when all metrics agree within .001, 1 when they do not, 2 on errors."""
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
