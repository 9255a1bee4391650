"""A run directory: everything that one training wrote, which is all that export and evaluation need.

config.json       model, train and data configs, the data's path and fingerprint, versions, command
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
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dman_runtime.data.evaluation import Ranks, Split
from dman_runtime.data.interactions import Interactions, ItemInfo
from dman_runtime.errors import DmanError
from dman_train.config import BaselineConfig, DataConfig, ModelConfig, TrainConfig, from_dict, to_dict
from dman_train.families import Family, Model, family_of_fields

RESTORE = "restore it or train again"


class RunError(DmanError):
    """A run directory that cannot be used as asked."""


@dataclass(frozen=True)
class Vocabulary:
    """The items of a run, in index order."""

    item_ids: list[str]
    integer_item_ids: bool
    counts: np.ndarray  # (V) int64 training events
    items: dict[str, ItemInfo]  # by item id; may lack some

    def to_json(self) -> str:
        info = {i: {"title": x.title, "attributes": x.attributes} for i, x in self.items.items()}
        return json.dumps(
            {
                "item_ids": self.item_ids,
                "integer_item_ids": self.integer_item_ids,
                "counts": self.counts.tolist(),
                "items": info,
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        data = json.loads(text)
        items = {i: ItemInfo(x["title"], x["attributes"]) for i, x in data["items"].items()}
        return cls(data["item_ids"], data["integer_item_ids"], np.array(data["counts"], np.int64), items)


@dataclass(frozen=True)
class Run:
    """An opened run directory."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        config, file = self._json("config.json"), self.path / "config.json"
        if not isinstance(config, dict):
            raise RunError(f"{file} holds no object, so this is not a run", "choose another", parameter="run")
        if missing := {"model", "train", "data", "dataset"} - set(config):
            raise RunError(
                f"{file} lacks {', '.join(sorted(missing))}, so this is not a run", "choose another", parameter="run"
            )
        return config

    @property
    def metrics(self) -> dict[str, Any] | None:
        """Final metrics, or None while the run is unfinished."""
        return self._json("metrics.json") if (self.path / "metrics.json").exists() else None

    @property
    def family(self) -> Family:
        return family_of_fields(self.config["model"])

    def model_config(self) -> ModelConfig | BaselineConfig:
        return from_dict(self.family.config, self.config["model"], where=f"{self.path}/config.json")

    def train_config(self) -> TrainConfig:
        return from_dict(TrainConfig, self.config["train"], where=f"{self.path}/config.json")

    def data_config(self) -> DataConfig:
        return from_dict(DataConfig, self.config["data"], where=f"{self.path}/config.json")

    def vocabulary(self) -> Vocabulary:
        try:
            return Vocabulary.from_json(self._read("vocabulary.json"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            file = self.path / "vocabulary.json"
            raise RunError(f"{file} is damaged ({error!r})", RESTORE) from None

    def epochs(self) -> list[dict[str, float]]:
        """What was measured after each epoch so far."""
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def best_model(self) -> Model:
        """The model with the weights of the best epoch, in evaluation mode. Raises RunError, ConfigError."""
        file = self.path / "best.pt"
        if not file.exists():
            raise RunError(f"{self.path} has no trained weights yet", "finish an epoch of training first")
        weights = self.load_tensors(file)
        try:
            vocabulary, users = weights["items"].shape[0], self.config["dataset"]["users"]
            model = self.family.build(self.model_config(), vocabulary, users)
            model.load_state_dict(weights)
        except (RuntimeError, KeyError, TypeError, AttributeError):
            raise RunError(f"{file} does not fit config.json", "restore both or train again") from None
        return model.eval()

    def load_tensors(self, file: Path) -> Any:
        """Reads a .pt file. Raises RunError if it is damaged."""
        try:
            return torch.load(file, map_location="cpu", weights_only=file.name != "checkpoint.pt")
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0] or "it is empty"
            raise RunError(f"{file} cannot be read ({reason})", RESTORE) from None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads(self._read(name))
        except json.JSONDecodeError as error:
            raise RunError(f"{self.path / name} is damaged ({error})", RESTORE) from None

    def _read(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RunError(
                f"{self.path} is not a run ({name} is missing)",
                "choose another, or train one with python -m dman_train.train",
                parameter="run",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{self.path / name} cannot be read ({error})", RESTORE) from None

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
        """`ranks.npz`: (N) seen_excluded and seen_kept ranks of each split, and the (N) lengths of the test inputs."""
        arrays = {f"{split}_{name}": value for split, both in ranks.items() for name, value in asdict(both).items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, lengths=np.array(lengths, np.int64), **arrays)
        self.write("ranks.npz", buffer.getvalue())

    def append_epoch(self, result: dict[str, float]) -> None:
        self.write_epochs([*self.epochs(), result])

    def write_epochs(self, epochs: list[dict[str, float]]) -> None:
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in epochs))


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
    command: list[str],
) -> dict[str, Any]:
    """The content of config.json."""
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
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "command": command,
    }
