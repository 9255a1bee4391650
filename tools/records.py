"""Finished runs as small JSON files that can be committed, and what can be told from them.

    python -m tools.records --run runs/ml-1m --name dman-s0 --out reports/runs

A record has everything a report needs without the run: configuration, data fingerprint, metrics of each epoch, seconds,
and the test ranks of all users, so that two systems can be compared user by user.
"""

from __future__ import annotations

import base64
import json
import platform
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dman_runtime.data.evaluation import Ranks, held_out, metrics, report, training_events
from dman_runtime.errors import UsageError
from dman_runtime.model.bundle import StateShape
from dman_runtime.model.record import max_record_bytes
from dman_runtime.options import Parser, run_command
from dman_train.baselines.counts import COUNTS, count_ranks
from dman_train.config import DataConfig, ModelConfig, to_dict
from dman_train.interpret import length_group
from dman_train.run import Run, RunError, open_run
from dman_train.train import SPLITS, load

FORMAT_VERSION = 1
RANK_LIMIT = 255  # larger ranks are stored as this one, which no metric tells apart
_DROPPED = {"--run": 1, "--json": 0, "--threads": 1, "--resume": 0}  # options that say nothing of the result


@dataclass(frozen=True)
class Record:
    """One finished run."""

    name: str
    content: dict[str, Any]
    ranks: dict[str, np.ndarray]  # "seen_excluded" and "seen_kept": (N) uint8 test ranks, capped at RANK_LIMIT
    groups: np.ndarray  # (N) uint8 index into LENGTH_GROUPS

    @property
    def dataset(self) -> str:
        return self.content["dataset"]["name"]

    def metric(self, name: str, *, split: str = "test", seen: str | None = None) -> float:
        return metrics_of(self.content, split=split, seen=seen)[name]

    @property
    def test_ranks(self) -> np.ndarray:
        """(N) uint8, of the ranking that the run was chosen by."""
        return self.ranks[ranking_of(self.content)]

    def group_metrics(self, group: int) -> dict[str, float]:
        """Test metrics of the users of one group; empty without users."""
        return metrics(self.test_ranks[self.groups == group])


def ranking_of(content: dict[str, Any]) -> str:
    """The ranking that the run was chosen by: "seen_kept" if it kept seen items, else "seen_excluded"."""
    return "seen_kept" if content["train"].get("seen_items") == "keep" else "seen_excluded"


def metrics_of(content: dict[str, Any], *, split: str = "test", seen: str | None = None) -> dict[str, Any]:
    """Metrics of a split, in the ranking that the run was chosen by unless `seen` names one."""
    result = content["metrics"][split]
    return result["seen_kept"] if (seen or ranking_of(content)) == "seen_kept" else result


def record_of(run: Run) -> dict[str, Any]:
    """What is kept of a finished run. Raises RunError."""
    if run.metrics is None or not (run.path / "ranks.npz").exists():
        raise RunError(f"{run.path} is not finished; let the training end first")
    config, model = run.config, run.best_model()
    with np.load(run.path / "ranks.npz") as arrays:
        ranks = Ranks(arrays["test_seen_excluded"], arrays["test_seen_kept"])
        lengths = arrays["lengths"]
    return {
        "format_version": FORMAT_VERSION,
        "command": _command(config),
        "model": config["model"],
        "train": config["train"],
        "data": config["data"],
        "dataset": config["dataset"] | _place(Path(config["dataset"]["path"])),
        "versions": config["versions"],
        "machine": platform.machine(),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "state_bytes": _state_bytes(run),
        "epochs": run.epochs(),
        "metrics": run.metrics,
        **_ranks(ranks, lengths),
    }


def record_of_counts(system: str, path: Path) -> dict[str, Any]:
    """The record of a system of `dman_train.baselines.counts`, which has no run. Raises InputError."""
    began, data = time.perf_counter(), load(path, DataConfig())
    scorer = COUNTS[system](*training_events(data), len(data.item_ids))
    held = {split: held_out(data, split) for split in SPLITS}
    ranks = {split: count_ranks(scorer, held[split]) for split in SPLITS}
    result: dict[str, Any] = {split: report(ranks[split], split) for split in SPLITS}
    described = {
        "fingerprint": data.fingerprint(),
        "users": data.num_users,
        "items": len(data.item_ids),
        "events": len(data),
    }
    dataset = described | _place(path)
    return {
        "format_version": FORMAT_VERSION,
        "command": f"python -m tools.records --counts {system} --data {dataset['path']}",
        "model": {"system": system},
        "train": {},
        "data": to_dict(DataConfig()),
        "dataset": dataset,
        "versions": {"numpy": np.__version__},
        "machine": platform.machine(),
        "parameters": 0,
        "state_bytes": None,
        "epochs": [],
        "metrics": result | {"epochs": 0, "training_seconds": time.perf_counter() - began},
        **_ranks(ranks["test"], np.array([len(history) for history in held["test"].histories])),
    }


def _ranks(ranks: Ranks, lengths: np.ndarray) -> dict[str, Any]:
    groups = length_group(lengths)
    return {
        "ranks": {name: _packed(np.minimum(values, RANK_LIMIT)) for name, values in asdict(ranks).items()},
        "groups": _packed(groups),
    }


def _place(path: Path) -> dict[str, str]:
    """Name and path of a log. Generated ones lie in `data`, named by the file; else the folder names it."""
    folder, file = path.resolve().parts[-2:]
    if folder == "data":
        return {"name": path.stem, "path": f"data/{file}"}
    return {"name": folder, "path": f"../shared/data/{folder}/{file}"}


def _command(config: dict[str, Any]) -> str:
    """The command line that repeats the run, without what says nothing of the result."""
    words, kept = iter(config["command"]), []
    for word in words:
        if word in _DROPPED:
            for _ in range(_DROPPED[word]):
                next(words, None)
        elif word == "--data":
            kept += [word, _place(Path(next(words)))["path"]]
        elif word == "--items":
            next(words, None)
        else:
            kept.append(word)
    module = "dman_train.baselines" if "system" in config["model"] else "dman_train.train"
    return " ".join(["python -m", module, *kept])


def _state_bytes(run: Run) -> int | None:
    """Largest state of a user in float16, or None for a model without one."""
    config = run.model_config()
    if not isinstance(config, ModelConfig):
        return None
    shape = StateShape(config.segment_length, config.slots, config.layers, config.width, config.recurrent, "float16")
    return max_record_bytes(shape)


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.astype(np.uint8).tobytes(), 9)).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)


def read_records(directory: Path) -> list[Record]:
    """All records of a directory, by name. Raises UsageError for a file that is none."""
    records = []
    for file in sorted(directory.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                raise UsageError(f"{file} has format version {content['format_version']}, not {FORMAT_VERSION}")
            ranks = {name: _unpacked(text) for name, text in content["ranks"].items()}
            records.append(Record(file.stem, content, ranks, _unpacked(content["groups"])))
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            raise UsageError(f"{file} is no record of a run ({error!r}); write it again with tools.records") from None
    return records


@dataclass(frozen=True)
class Difference:
    """A mean over users of one system less that of another, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def paired_bootstrap(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], *, metric: str, samples: int = 2000, seed: int = 0
) -> Difference:
    """How much better `ours` is by `metric` ("hr@10", "ndcg@10"), users drawn with replacement.

    `ours` and `theirs` hold one array (N) of test ranks per seed; a user's gain is the mean over the seeds.
    """
    gain = _gain(ours, metric) - _gain(theirs, metric)
    random = np.random.default_rng(seed)
    means = np.concatenate([
        gain[random.integers(0, len(gain), (100, len(gain)))].mean(1) for _ in range(max(1, samples // 100))
    ])  # fmt: skip
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(gain.mean()), float(low), float(high))


def _gain(ranks: Iterable[np.ndarray], metric: str) -> np.ndarray:
    """(N) what each user adds to the metric, mean over the seeds."""
    kind, _, cutoff = metric.partition("@")
    each = []
    for rank in ranks:
        hit = rank <= int(cutoff)
        each.append(hit / np.log2(1.0 + rank) if kind == "ndcg" else hit.astype(float))
    return np.mean(each, axis=0)


def parser() -> Parser:
    p = Parser(prog="python -m tools.records", description="Write a finished run as a small JSON record.")
    p.flag("--run", type=Path, default=Path("runs/latest"), help="run directory")
    p.flag("--counts", choices=sorted(COUNTS), default=None, help="instead of a run: a system that only counts")
    p.flag("--data", type=Path, default=None, help="interaction log, with --counts")
    p.flag("--name", default=None, help="name of the record; the run's without it")
    p.flag("--out", type=Path, default=Path("reports/runs"), help="directory of the records")
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.counts:
        if arguments.data is None:
            raise UsageError("--counts needs --data")
        content, name = record_of_counts(arguments.counts, arguments.data), arguments.counts
    else:
        content, name = record_of(open_run(arguments.run)), arguments.run.resolve().name
    file = arguments.out / f"{arguments.name or name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    test = metrics_of(content)
    print(f"{file}: test HR@10 {test['hr@10']:.4f}, NDCG@10 {test['ndcg@10']:.4f}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
