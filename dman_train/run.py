"""A run directory: everything that one training wrote, which is all that export and evaluation need.

config.json       model, train and data configs, the data's path and fingerprint, its input report, versions, command
vocabulary.json   external item ids in index order, training counts, titles and attributes
metrics.jsonl     one line per epoch
metrics.json      validation and test metrics of the best epoch; its presence marks a finished run
best.pt           weights of the best epoch
checkpoint.pt     exact training state for --resume; removed when the run is finished
curves.png        loss and validation metrics by epoch
tensorboard/      the same and more, for TensorBoard
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dman_runtime.data.arrays import parse_npz
from dman_runtime.data.evaluation import RANKINGS, Ranking, Ranks, Split
from dman_runtime.data.input_report import InputReport
from dman_runtime.data.interactions import Interactions
from dman_runtime.data.log_options import options_of_training
from dman_runtime.data.untrusted import is_whole_number, parse_json, read_file
from dman_runtime.errors import DmanError, InputError
from dman_train.config import BaselineConfig, ConfigError, DataConfig, ModelConfig, TrainConfig, to_dict
from dman_train.families import Family, Model, family_of_fields
from dman_train.stored_config import from_dict, is_earlier_form
from dman_train.tensor_files import read_tensors
from dman_train.vocabulary import Vocabulary

MAX_CONFIG_BYTES, MAX_EPOCHS_BYTES, MAX_VOCABULARY_BYTES = 4 << 20, 64 << 20, 64 << 30
MAX_COUNT = 1 << 40  # of users or items
MAX_LISTED_FILES = 100  # of a log of many, in its report: a manifest holds a megabyte
EPOCH_FIELDS = {"epoch", "loss", "abstraction_loss", "seconds"}  # of a line of metrics.jsonl, at least
RESTORE = "restore it or train again"


class RunError(DmanError):
    """A run directory that cannot be used as asked."""


@dataclass(frozen=True)
class Run:
    """An opened run directory."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """What `describe` returned. Raises RunError."""
        config, file = self._json("config.json"), self.path / "config.json"
        if not isinstance(config, dict):
            raise RunError(f"{file} holds no object, so this is not a run", "choose another", parameter="run")
        if missing := {"model", "train", "data", "dataset"} - set(config):
            raise RunError(
                f"{file} lacks {', '.join(sorted(missing))}, so this is not a run", "choose another", parameter="run"
            )
        if problem := _config_problem(config):
            raise RunError(f"{file} is damaged ({problem})", RESTORE)
        return config

    @property
    def data_record(self) -> dict[str, Any]:
        """How the training log was read, which one it was, and what was understood of it: `data` of a bundle."""
        config = self.config
        return config["data"] | config["dataset"] | {name: config[name] for name in ("input",) if name in config}

    @property
    def metrics(self) -> dict[str, Any] | None:
        """Final metrics, or None while the run is unfinished. Raises RunError."""
        if not (self.path / "metrics.json").exists():
            return None
        metrics = self._json("metrics.json")
        if not isinstance(metrics, dict) or not all(
            isinstance(metrics.get(split), dict) for split in ("valid", "test")
        ):
            raise RunError(f"{self.path / 'metrics.json'} is damaged (it lacks the metrics of a split)", RESTORE)
        return metrics

    @property
    def family(self) -> Family:
        return family_of_fields(self.config["model"])

    def model_config(self) -> ModelConfig | BaselineConfig:
        return from_dict(self.family.config, self.config["model"], where=f"{self.path}/config.json")

    def train_config(self) -> TrainConfig:
        return from_dict(TrainConfig, self.config["train"], where=f"{self.path}/config.json")

    def refuse_earlier_form(self) -> None:
        """Raises RunError if the weights belong to a network that this version has no longer."""
        config = self.config
        if is_earlier_form(model := config["model"], config["train"]):
            name = model.get("system") or ("nran" if model.get("variant") == "nran" else "architecture 'paper'")
            raise RunError(
                f"{self.path} was trained with an earlier form of {name}, which this version does not have",
                "train again, or use the version of dman that trained it",
                parameter="run",
            )

    def data_config(self) -> DataConfig:
        data = self.config["data"]
        config: DataConfig = from_dict(DataConfig, data, where=f"{self.path}/config.json")
        if "order_by" in data:
            return config
        # An older version recorded its defaults, also for columns that the log did not have.
        return replace(config, **asdict(options_of_training(data)))

    def vocabulary(self) -> Vocabulary:
        """Raises RunError if the file is damaged or is that of another run."""
        file = self.path / "vocabulary.json"
        try:
            vocabulary = Vocabulary.from_json(self._read(file.name, limit=MAX_VOCABULARY_BYTES))
        except ValueError as error:
            raise RunError(f"{file} is damaged ({error})", RESTORE) from None
        if len(vocabulary.item_ids) != self.config["dataset"]["items"]:
            raise RunError(f"{file} does not fit config.json", "restore both or train again")
        return vocabulary

    def epochs(self) -> list[dict[str, float]]:
        """What was measured after each epoch so far. Raises RunError."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        try:
            return [_epoch(line) for line in self._read(file.name, limit=MAX_EPOCHS_BYTES).splitlines()]
        except ValueError as error:
            raise RunError(f"{file} is damaged ({error})", RESTORE) from None

    def best_model(self) -> Model:
        """The model with the weights of the best epoch, in evaluation mode. Raises RunError, ConfigError."""
        file = self.path / "best.pt"
        if not file.exists():
            raise RunError(f"{self.path} has no trained weights yet", "finish an epoch of training first")
        self.refuse_earlier_form()
        weights, dataset = self.load_tensors(file.name), self.config["dataset"]
        try:
            sizes = (self.model_config(), dataset["items"], dataset["users"])
            with torch.device("meta"):  # takes no memory: sizes that are made up must not take any
                expected = {name: weight.shape for name, weight in self.family.build(*sizes).state_dict().items()}
            if {name: weight.shape for name, weight in weights.items()} != expected:
                raise ValueError("other weights than those of the model")
            model = self.family.build(*sizes)
            model.load_state_dict(weights)
        except ConfigError:
            raise
        except (RuntimeError, KeyError, TypeError, AttributeError, ValueError):
            raise RunError(f"{file} does not fit config.json", "restore both or train again") from None
        return model.eval()

    def load_tensors(self, name: str) -> Any:
        """Reads a .pt file. Raises RunError if it is damaged, or holds more than values."""
        file = self.path / name
        try:
            return read_tensors(file)
        except FileNotFoundError:
            raise RunError(f"{file} is missing", RESTORE) from None
        except InputError as error:
            raise RunError(error.cause, error.remedy or RESTORE) from None

    def test_ranks(self, ranking: Ranking) -> tuple[np.ndarray, np.ndarray]:
        """From what `save_ranks` wrote: (N) ranks of the test targets, and (N) lengths of their inputs.

        Raises RunError, also for a ranking that the version that wrote the run did not have.
        """
        names = [f"{split}_{name}" for split in ("valid", "test") for name in RANKINGS]
        later = [name for name in names if name.endswith("target_kept")]  # earlier versions did not write them
        file, users = self.path / "ranks.npz", self.config["dataset"]["users"]
        content = self._read(file.name, limit=MAX_EPOCHS_BYTES + 70 * users)
        try:
            kinds = dict.fromkeys((*names, "lengths"), ("int64", (None,)))
            arrays = parse_npz(content, kinds, limit=4096 + 56 * users, optional=later)
            if len({len(array) for array in arrays.values()}) > 1:
                raise ValueError("its arrays have different lengths")
        except ValueError as error:
            raise RunError(f"{file} is damaged ({error})", RESTORE) from None
        if f"test_{ranking}" not in arrays:
            raise RunError(f"{file} has no ranks {ranking}: an earlier version wrote it", "train again")
        return arrays[f"test_{ranking}"], arrays["lengths"]

    def _json(self, name: str) -> Any:
        try:
            return parse_json(self._read(name, limit=MAX_CONFIG_BYTES))
        except ValueError as error:
            raise RunError(f"{self.path / name} is damaged ({error})", RESTORE) from None

    def _read(self, name: str, *, limit: int) -> bytes:
        try:
            return read_file(self.path / name, limit=limit)
        except FileNotFoundError:
            raise RunError(
                f"{self.path} is not a run ({name} is missing)",
                "choose another, or train one with python -m dman_train.train",
                parameter="run",
            ) from None
        except InputError as error:
            raise RunError(error.cause, RESTORE) from None

    def write(self, name: str, content: str | bytes) -> None:
        """Replaces a file at once: readers see the old content or the new."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(self.path / name)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.write(name, json.dumps(content, indent=2) + "\n")

    def save_tensors(self, name: str, content: Any) -> None:
        """As `write`, with `torch.save`."""
        temporary = self.path / f".{name}.tmp"
        torch.save(content, temporary)
        temporary.replace(self.path / name)

    def save_ranks(self, ranks: Mapping[Split, Ranks], lengths: Sequence[int]) -> None:
        """`ranks.npz`: the (N) Ranks of each split, and the (N) lengths of the test inputs."""
        arrays = {f"{split}_{name}": value for split, found in ranks.items() for name, value in asdict(found).items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, lengths=np.array(lengths, np.int64), **arrays)
        self.write("ranks.npz", buffer.getvalue())

    def append_epoch(self, result: dict[str, float]) -> None:
        self.write_epochs([*self.epochs(), result])

    def write_epochs(self, epochs: list[dict[str, float]]) -> None:
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in epochs))


def _config_problem(config: dict[str, Any]) -> str:
    """What is wrong with the parts of config.json that are not configs; "" for nothing."""
    for name in ("model", "train", "data", "dataset"):
        if not isinstance(config[name], dict):
            return f"{name} is not an object"
    if not isinstance(config.get("input", {}), dict):  # older runs have none
        return "input is not an object"
    dataset = config["dataset"]
    for name in ("path", "fingerprint"):
        if not isinstance(dataset.get(name), str) or "\0" in dataset[name]:
            return f"dataset.{name} is not a text"
    for name in ("users", "items"):
        if not is_whole_number(dataset.get(name), 1, MAX_COUNT):
            return f"dataset.{name} is not a whole number"
    return ""


def _epoch(line: bytes) -> dict[str, float]:
    """One line of metrics.jsonl. Raises ValueError."""
    epoch = parse_json(line)
    if not isinstance(epoch, dict) or not epoch.keys() >= EPOCH_FIELDS:
        raise ValueError("a line is not an object with the measurements of an epoch")
    if not all(type(value) in (int, float) for value in epoch.values()):
        raise ValueError("a measurement is not a number")
    return epoch


def open_run(path: Path) -> Run:
    """Raises RunError if `path` holds no run."""
    run = Run(path)
    _ = run.config
    return run


def create_run(path: Path, *, keep_old: bool) -> Run:
    """An empty run directory. A run that is already there is moved aside if `keep_old`. Raises RunError otherwise."""
    if (path / "config.json").exists():
        if not keep_old:
            raise RunError(f"{path} holds a run already", "resume it or choose another directory", parameter="run")
        aside = path.with_name(f"{path.name}-{int((path / 'config.json').stat().st_mtime)}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path} exists and is not a run", "choose another directory", parameter="run")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise RunError(f"{path} cannot be created ({reason})", "choose another directory", parameter="run") from None
    return Run(path)


def describe(
    model: ModelConfig | BaselineConfig,
    train: TrainConfig,
    data: DataConfig,
    *,
    path: Path,
    interactions: Interactions,
    input_report: InputReport,
    command: list[str],
    device: torch.device,
) -> dict[str, Any]:
    """The content of config.json."""
    card = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "model": to_dict(model),
        "train": to_dict(train),
        "data": to_dict(data),
        "dataset": {
            "path": str(path),
            "fingerprint": interactions.fingerprint(),
            "users": interactions.num_users,
            "items": len(interactions.item_ids),
            "events": len(interactions),
        },
        "input": _shortened(input_report.as_dict()),
        "versions": {"torch": torch.__version__, "numpy": np.__version__} | card,
        "command": command,
    }


def _shortened(report: dict[str, Any]) -> dict[str, Any]:
    """A report with the first of its files only."""
    return report | {name: report[name][:MAX_LISTED_FILES] for name in ("files", "ignored_files")}
