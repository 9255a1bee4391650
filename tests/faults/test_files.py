"""Files that change under a server, or were made to harm: the same answers, or one clear line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import ROOT

from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.servers import connect
from tools.faults.bundles import EMBEDDINGS, GOLDEN, ITEMS, MANIFEST, refit
from tools.faults.honest import failures, recommend
from tools.faults.servers import FaultServer, python_environment

from .conftest import Start

pytestmark = pytest.mark.slow

GIB = 1 << 30


# -- a bundle that changes -------------------------------------------------------------------------------------------


def answers(server: FaultServer) -> list[tuple[str, list[tuple[str, float]]]]:
    with connect(server.address) as channel:
        stub = RecommenderStub(channel)
        found = []
        for n in range(1, 11):
            reply = stub.Recommend(pb.RecommendRequest(what_if_events=[pb.Event(item_id=str(n))], k=20), timeout=5)
            found.append((reply.bundle_id, [(item.item_id, item.score) for item in reply.items]))
    return found


def test_a_bundle_overwritten_in_place_changes_no_answer(start: Start, own_bundle: Path) -> None:
    server = start(bundle=own_bundle)
    before = answers(server)
    embeddings = np.load(own_bundle / EMBEDDINGS)
    for file in own_bundle.iterdir():
        with file.open("r+b") as opened:  # the same file, not another one of its name
            if file.name == EMBEDDINGS:
                np.save(opened, embeddings[::-1])
            else:
                opened.write(np.random.default_rng(0).bytes(file.stat().st_size))
    assert answers(server) == before


def test_a_bundle_truncated_in_place_stops_no_server(start: Start, own_bundle: Path) -> None:
    server = start(bundle=own_bundle)
    before = answers(server)
    for file in own_bundle.iterdir():
        os.truncate(file, 0)
    assert failures(server.address, recommend, rounds=3) == []
    assert answers(server) == before


# -- hostile bundles -------------------------------------------------------------------------------------------------


class Refusal:
    """What a command that must refuse a file did: it was run for at most so many seconds."""

    def __init__(self, root: Path, *arguments: str, seconds: float = 30) -> None:
        self.peak = 0
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=root,
            env=python_environment(root),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < deadline and self.peak < 3 * GIB:
                try:
                    self.peak = max(self.peak, psutil.Process(process.pid).memory_info().rss)
                except psutil.Error:
                    break
                time.sleep(0.005)
            self.status = process.poll() if self.peak >= 3 * GIB else _status_by(process, deadline)
        finally:
            process.kill()
            self.printed, self.errors = process.communicate()

    def check(self) -> None:
        assert self.status is not None, "it did not end"
        assert "Traceback" not in self.errors
        assert self.status == 2 and "error: " in self.errors.splitlines()[-1], self.errors


def _status_by(process: subprocess.Popen[str], deadline: float) -> int | None:
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def serve(root: Path, bundle: Path, state: Path, *options: str, seconds: float = 30) -> Refusal:
    arguments = ["--bundle", str(bundle), "--state", str(state), "--port", "0", "--provider", "cpu", *options]
    return Refusal(root, "dman_runtime", "serve", *arguments, seconds=seconds)


def test_a_pipe_in_a_bundle_does_not_hang_the_start(root: Path, own_bundle: Path, tmp_path: Path) -> None:
    (own_bundle / ITEMS).unlink()
    os.mkfifo(own_bundle / ITEMS)
    serve(root, own_bundle, tmp_path / "state", seconds=12).check()


def test_a_small_file_that_unpacks_to_gigabytes_takes_little_memory(
    root: Path, own_bundle: Path, tmp_path: Path
) -> None:
    """Some MiB of `golden.npz` that hold 1 GiB of zeros."""
    with np.load(own_bundle / GOLDEN) as arrays:
        kept = {name: arrays[name] for name in arrays.files if name != "memories"}
    np.savez_compressed(own_bundle / GOLDEN, **kept)
    with (
        zipfile.ZipFile(own_bundle / GOLDEN, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("memories.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (GIB // 4,)})
        for _ in range(GIB >> 24):
            member.write(bytes(1 << 24))
    assert (own_bundle / GOLDEN).stat().st_size < 8 << 20
    refit(own_bundle, GOLDEN)
    refusal = serve(root, own_bundle, tmp_path / "state")
    assert refusal.peak < 600e6
    refusal.check()


Change = Callable[[Path], None]


def _manifest_text(text: str) -> Change:
    return lambda bundle: (bundle / MANIFEST).write_text(text) and None


def _items_with(line: str) -> Change:
    def change(bundle: Path) -> None:
        lines = (bundle / ITEMS).read_text(encoding="utf-8").splitlines()
        (bundle / ITEMS).write_text("\n".join([*lines[:-1], line]) + "\n", encoding="utf-8")
        refit(bundle, ITEMS)

    return change


def _embeddings_with(value: float) -> Change:
    def change(bundle: Path) -> None:
        embeddings = np.load(bundle / EMBEDDINGS)
        embeddings[-1, -1] = value
        np.save(bundle / EMBEDDINGS, embeddings)
        refit(bundle, EMBEDDINGS)

    return change


def _golden_with(**changes: Any) -> Change:
    def change(bundle: Path) -> None:
        with np.load(bundle / GOLDEN) as arrays:
            content = {name: arrays[name] for name in arrays.files} | changes
        np.savez(bundle / GOLDEN, **{name: array for name, array in content.items() if array is not None})
        refit(bundle, GOLDEN)

    return change


MALFORMED: dict[str, Change] = {
    "manifest nested too deep": _manifest_text("[" * 200_000),
    "items nested too deep": _items_with("[" * 200_000),
    "events as text": _items_with('{"item_id": "60", "events": "many"}'),
    "item id as number": _items_with('{"item_id": 60, "events": 60}'),
    "title as number": _items_with('{"item_id": "60", "events": 60, "title": 7}'),
    "golden without an array": _golden_with(memories=None),
    "golden with histories of floats": _golden_with(histories=np.full((2, 3), 0.5)),
    "golden with items out of range": _golden_with(histories=np.full((2, 3), 10**6)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_bundle_gives_one_line(root: Path, own_bundle: Path, tmp_path: Path, name: str) -> None:
    MALFORMED[name](own_bundle)
    serve(root, own_bundle, tmp_path / "state", seconds=15).check()


# -- a hostile checkpoint --------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished_run(root: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A run directory that can be resumed but for its checkpoint, and its log, by the checkout under test."""
    if root == ROOT:
        log, trained = request.getfixturevalue("small_log"), request.getfixturevalue("trained_run")
    else:
        log, trained = tmp_path / "log.csv", tmp_path / "trained"
        small = ["--users", "80", "--num-items", "100", "--mean-events", "40", "--items", str(tmp_path / "items.csv")]
        options = ["--preset", "tiny", "--epochs", "1", "--lanes", "16", "--threads", "1"]
        for command in (
            ["tools.generate", "--output", str(log), *small],
            ["dman_train.train", "--data", str(log), "--run", str(trained), *options],
        ):
            subprocess.run([sys.executable, "-m", *command], cwd=root, env=python_environment(root), check=True)
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "metrics.json").unlink()  # what says that it is finished
    return run, log


def test_a_checkpoint_runs_no_command(root: Path, unfinished_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, log = unfinished_run
    proof = tmp_path / "proof"
    make = f"import os, torch\nclass Bomb:\n    def __reduce__(self): return os.mkdir, ({str(proof)!r},)\n"
    save = f"torch.save({{'step': Bomb()}}, {str(run / 'checkpoint.pt')!r})"
    subprocess.run([sys.executable, "-c", make + save], check=True)
    arguments = ["--data", str(log), "--run", str(run), "--threads", "1", "--resume"]
    refusal = Refusal(root, "dman_train.train", *arguments, seconds=60)
    assert not proof.exists()
    refusal.check()
    assert "checkpoint" in refusal.errors.splitlines()[-1]


# -- who may listen in -----------------------------------------------------------------------------------------------


def test_plain_text_beyond_loopback_is_refused(root: Path, bundle: Path, tmp_path: Path) -> None:
    serve(root, bundle, tmp_path / "state", "--host", "0.0.0.0", seconds=10).check()
