"""What the test files share: a tiny model, its bundles and generations, stores, a log, a trained run, a server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

os.environ["OMP_NUM_THREADS"] = "1"  # several threads collapse when the cores are busy; small matrices need none
for name in [name for name in os.environ if name.startswith("DMAN_")]:
    del os.environ[name]  # a developer's settings must not reach the tests

import numpy as np
import pytest
import torch
from filelock import FileLock

from dman_runtime.data.evaluation import HeldOut, Ranking
from dman_runtime.data.interactions import ItemInfo
from dman_runtime.model.bundle import GOLDEN, ITEMS, MANIFEST, items_jsonl, read_manifest
from dman_runtime.model.bundle_writer import sha256
from dman_runtime.model.events import KnownEvents
from dman_runtime.model.generation import Generation
from dman_runtime.serving.config import ServeConfig
from dman_runtime.store.base import StateStore
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.memory import MemoryStore
from dman_train import graphs, train
from dman_train.config import ModelConfig
from dman_train.export import export_bundle
from dman_train.model import DMAN
from dman_train.run import Vocabulary
from dman_train.synthetic import SyntheticConfig, generate, write_log

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
WHOLE_BENCHMARKS = os.environ.get("WHOLE_BENCHMARKS") == "1"
# A tool for measurements, from its start to its report: its parts have tests of their own, which always run.
whole_benchmark = pytest.mark.skipif(not WHOLE_BENCHMARKS, reason="takes long: set WHOLE_BENCHMARKS=1")
MOVIELENS = ROOT.parent / "shared" / "data" / "ml-1m"
TINY = ModelConfig(width=32, heads=2, segment_length=5, memory_slots=4, layers=2, closed_states="full", dropout=0.1)
TIMED = replace(TINY, time="request", returns="on", sketch_items=6)
PAPER = replace(TINY, architecture="paper", heads=1, long_term="gated")
TINY_ITEMS = 60
LATER = replace(TINY, width=24, segment_length=4, memory_slots=3)
LATER_FIRST, LATER_ITEMS = 31, 50  # items "31" to "80"
STORES = ("memory", "lmdb")
RANKING_OF_SEEN_ITEMS: dict[str, Ranking] = {  # of each choice of `TrainConfig.seen_items`
    "exclude": "seen_excluded",
    "exclude-from-ranking": "seen_excluded",
    "keep-target": "target_kept",
    "keep": "seen_kept",
}
Entered = TypeVar("Entered")
Shared = Callable[[str, Callable[[Path], object]], Path]  # the fixture `shared`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need an exported bundle come last: one process exports it while others run the tests before.

    Of either kind, long ones come first: else one process has them all at the end, and the others nothing.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: ("tiny_bundle" in getattr(item, "fixturenames", ()), item.path not in slow))


def random_model(config: ModelConfig, vocabulary: int, *, seed: int = 0) -> DMAN:
    """A model whose every part matters: random weights, biases and norms, and embeddings of ordinary size.

    Only the items depend on the vocabulary, so that models of different ones have the same graphs.
    """
    torch.manual_seed(seed)
    model = DMAN(config, vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if vocabulary != TINY_ITEMS:
        weights = random_model(config, TINY_ITEMS, seed=seed).state_dict()
        del weights["items"]
        model.load_state_dict(weights, strict=False)
    return model.eval()


def vocabulary_of(size: int, *, first: int = 1) -> Vocabulary:
    """Integer item ids from `first` on, with titles; the n-th item was trained on n times."""
    ids = [str(i) for i in range(first, first + size)]
    infos = {i: ItemInfo(f"Title {i}", {"genre": "odd" if int(i) % 2 else "even"}) for i in ids}
    return Vocabulary(ids, True, np.arange(1, size + 1), infos)


def export_tiny(model: DMAN, path: Path, *, first: int = 1, state_dtype: str = "float16") -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_bundle(model, vocabulary_of(model.vocabulary, first=first), path, state_dtype=state_dtype)
    return path


@pytest.fixture(scope="session")
def tiny_model() -> DMAN:
    return random_model(TINY, TINY_ITEMS)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Shared:
    """`shared(name, make)`: the path that `make` wrote to, made once for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    directory = base if worker_id == "master" else base.parent

    def made_once(name: str, make: Callable[[Path], object]) -> Path:
        path, done = directory / f"shared-{name}", directory / f"shared-{name}.done"
        with FileLock(directory / f"shared-{name}.lock"):
            if not done.exists():
                make(path)
                done.touch()
        return path

    return made_once


@pytest.fixture(scope="session", autouse=True)
def each_graph_is_exported_once(shared: Shared) -> Iterator[None]:
    """Tracing a graph takes 5 to 15 seconds. One of the same weights is copied; the items are no part of it."""
    traced = graphs._export_graph

    def copied(graph: Any, example: Any, file: Path, **names: Any) -> None:
        content = hashlib.sha256(repr((type(graph), graph.model.config, names)).encode())
        for name, tensor in graph.state_dict().items():
            if name != "model.items":
                content.update(name.encode() + tensor.numpy().tobytes())
        made = shared(f"graph-{content.hexdigest()}", lambda path: traced(graph, example, path, **names))
        shutil.copyfile(made, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_export_graph", copied)
        yield


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: DMAN, shared: Shared) -> Path:
    """`tiny_model` exported with float16 states. Copy it before changing it."""
    return shared("tiny-bundle", lambda path: export_tiny(tiny_model, path))


@pytest.fixture(scope="session")
def timed_bundle(shared: Shared) -> Path:
    """Of a model that sees times and returns, with every optional file. Copy it before changing it."""
    return shared("timed-bundle", lambda path: export_tiny(random_model(TIMED, TINY_ITEMS), path))


def rewrite_manifest(bundle: Path, **changes: object) -> None:
    """Changes manifest fields and makes the bundle id fit again."""
    manifest = replace(read_manifest(bundle), **changes)  # type: ignore[arg-type]
    manifest = replace(manifest, bundle_id=manifest.content_hash())
    (bundle / MANIFEST).write_text(json.dumps(asdict(manifest)))


def change_golden(bundle: Path, name: str, factor: float) -> None:
    """Multiplies an array of the golden replay, and makes checksum and bundle id fit again."""
    with np.load(bundle / GOLDEN) as arrays:
        changed = {key: arrays[key] for key in arrays.files}
    changed[name] = changed[name] * np.float32(factor)
    np.savez(bundle / GOLDEN, **changed)
    change_file_entry(bundle, GOLDEN)


def change_file_entry(bundle: Path, name: str) -> None:
    """Makes the manifest fit a file that was changed."""
    entry = {"sha256": sha256(bundle / name), "bytes": (bundle / name).stat().st_size}
    rewrite_manifest(bundle, files=read_manifest(bundle).files | {name: entry})


@pytest.fixture(scope="session")
def exact_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with float32 states, where splits differ by arithmetic only."""
    path = tmp_path_factory.mktemp("exact") / "bundle"
    shutil.copytree(tiny_bundle, path)
    rewrite_manifest(path, state=replace(read_manifest(path).state, dtype="float32"))
    return path


@pytest.fixture(scope="session")
def later_bundle(shared: Shared) -> Path:
    """A newer model of other sizes, with float32 states. It knows half of the items of `exact_bundle`, and others.

    Takes seconds to export: `renamed_bundle` serves where another catalogue is enough.
    """
    model = random_model(LATER, LATER_ITEMS, seed=1)
    return shared("later-bundle", lambda path: export_tiny(model, path, first=LATER_FIRST, state_dtype="float32"))


@pytest.fixture(scope="session")
def renamed_bundle(exact_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`exact_bundle` for the items "21" to "80"."""
    path = Path(shutil.copytree(exact_bundle, tmp_path_factory.mktemp("renamed") / "bundle"))
    entries = [{"item_id": str(n), "events": n} for n in range(21, 21 + TINY_ITEMS)]
    (path / ITEMS).write_text(items_jsonl(entries))
    change_file_entry(path, ITEMS)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_bundle: Path) -> Generation:
    return Generation.open(tiny_bundle, provider="cpu")


@pytest.fixture(scope="session")
def exact(exact_bundle: Path) -> Generation:
    return Generation.open(exact_bundle, provider="cpu")


@pytest.fixture(scope="session")
def later(later_bundle: Path) -> Generation:
    return Generation.open(later_bundle, provider="cpu")


@pytest.fixture(scope="session")
def renamed(renamed_bundle: Path) -> Generation:
    return Generation.open(renamed_bundle, provider="cpu")


@contextmanager
def new_store(kind: str) -> Iterator[StateStore]:
    """An empty store of a kind in STORES; nothing of it is left afterwards."""
    if kind == "memory":
        with MemoryStore() as store:
            yield store
    else:
        with tempfile.TemporaryDirectory() as path, LmdbStore.open(path, map_size=32 << 20) as store:
            yield store


def ids(items: Iterable[int]) -> list[str]:
    """External ids of item indices of the tiny bundles."""
    return [str(int(item) + 1) for item in items]


def events_of(items: Sequence[int] | np.ndarray, times: Sequence[int] | np.ndarray | None = None) -> KnownEvents:
    """Events of item indices, oldest first; without `times`, at unknown ones."""
    moments = np.zeros(len(items), np.int64) if times is None else np.asarray(times, np.int64)
    return KnownEvents(np.asarray(items, np.int64), moments)


def held_out_of(histories: Sequence[np.ndarray], targets: np.ndarray, users: np.ndarray | None = None) -> HeldOut:
    """Of a log without times."""
    users = np.arange(len(histories)) if users is None else users
    times = [np.zeros(len(history), np.int64) for history in histories]
    return HeldOut(users, list(histories), targets, times, np.zeros(len(targets), np.int64))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Equal up to `tolerance` times the expected values, both in root mean square."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.fixture(scope="session")
def small_log(shared: Shared) -> Path:
    log = generate(SyntheticConfig(users=80, items=100, mean_events=40, seed=1))
    return shared("log.csv", lambda path: write_log(log, path))


@pytest.fixture(scope="session")
def trained_run(small_log: Path, shared: Shared) -> Path:
    """A finished run of the tiny preset, one epoch. Copy it before changing it."""

    def make(path: Path) -> None:
        options = ["--preset", "tiny", "--epochs", "1", "--lanes", "16", "--threads", "1"]
        assert train.main(["--data", str(small_log), "--run", str(path), *options]) == 0

    return shared("trained-run", make)


def serve_config(bundle: Path, state: Path, **options: Any) -> ServeConfig:
    """One worker on a free loopback port."""
    config = ServeConfig(
        bundle=bundle, state=state, host="127.0.0.1", port=0, provider="cpu", workers=1, encoder_threads=1,
        max_concurrent=64, map_size_mib=256, grace=5.0,
    )  # fmt: skip
    return replace(config, **options)


@contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_end_of_tasks(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end_of_tasks() -> None:
    """Waits for the loop's other tasks, which would else be logged as pending during a later test."""
    for cancels in (False, True):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others if cancels else ():
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=1)


@contextmanager
def running(entered: AbstractAsyncContextManager[Entered]) -> Iterator[Entered]:
    """An async context manager, such as an `App`, entered on a loop of its own while the block runs."""
    with running_loop() as loop:
        value = asyncio.run_coroutine_threadsafe(entered.__aenter__(), loop).result(60)
        try:
            yield value
        finally:
            asyncio.run_coroutine_threadsafe(entered.__aexit__(None, None, None), loop).result(60)


@contextmanager
def running_server(bundle: Path, state: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A real `dman-runtime serve` on a free loopback port: its address and process, stopped by SIGTERM at the end."""
    command = [sys.executable, "-m", "dman_runtime", "serve", "--port", "0"]
    command += ["--bundle", str(bundle), "--state", str(state), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " on " in line, f"the server did not start: {line!r}"
        yield line.split(" on ")[1].split(" ")[0], process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        finally:
            process.kill()
            process.stdout.close()  # type: ignore[union-attr]
