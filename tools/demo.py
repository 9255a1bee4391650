"""The main job on generated data, as `make demo` runs it: generate, train, export, serve, update, recommend, score.

Every step is the command a user would type; it is printed before its output. All files go to demo/.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdk import Client

DIRECTORY = Path("demo")
COMMANDS = {  # what stands for a command of the README, by its first words
    "python": [sys.executable],
    "dman-runtime": [sys.executable, "-m", "dman_runtime"],
}


def command(line: str) -> list[str]:
    first, *rest = shlex.split(line)
    return [*COMMANDS[first], *rest]


def run(line: str) -> None:
    print(f"\n$ {line}", flush=True)
    subprocess.run(command(line), cwd=DIRECTORY, check=True, env=environment())


def environment() -> dict[str, str]:
    """The project is importable, and small matrices do not pay for threads."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@contextmanager
def server(line: str) -> Iterator[str]:
    """Runs `serve --port 0` and yields its address."""
    print(f"\n$ {line} &", flush=True)
    process = subprocess.Popen(command(line), cwd=DIRECTORY, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline().strip()
        if " on " not in ready:
            raise SystemExit("the server did not start; see the messages above")
        print(ready, flush=True)
        yield ready.split(" on ")[1].split(" ")[0]
    finally:
        process.terminate()
        process.wait(timeout=30)


def main() -> int:
    began = time.monotonic()
    shutil.rmtree(DIRECTORY, ignore_errors=True)  # what an earlier demo left
    DIRECTORY.mkdir()
    run("python -m tools.generate --output data/log.csv --items data/items.csv")
    run("python -m dman_train.train --data data/log.csv --items data/items.csv --preset tiny")
    run("python -m dman_train.export")
    run("dman-runtime evaluate --data data/log.csv")
    run("dman-runtime import --input data/log.csv")
    with server("dman-runtime serve --port 0") as address, Client(address) as client:
        show_recommendations(client)
    run("dman-runtime score --input data/log.csv --output scores.parquet --k 20")
    run("dman-runtime inspect --state state --user u0001")
    print(f"\ndone in {time.monotonic() - began:.0f} s; everything is in {DIRECTORY}/")
    return 0


def show_recommendations(client: Client) -> None:
    print('\n>>> client.recommend("u0001", k=5)')
    first = client.recommend("u0001", k=5)
    for item in first:
        print(f"{item.item_id!s:>6}  {item.score:7.3f}  {item.title}")
    chosen = first[0].item_id
    print(f'>>> client.update("u0001", [{chosen!r}])')
    print(client.update("u0001", [chosen]))
    print('>>> client.recommend("u0001", k=5)')
    for item in client.recommend("u0001", k=5):
        print(f"{item.item_id!s:>6}  {item.score:7.3f}  {item.title}")
    stranger = client.recommend("somebody new", k=3)
    print(f'>>> client.recommend("somebody new", k=3).source\n{stranger.source!r}')


if __name__ == "__main__":
    sys.exit(main())
