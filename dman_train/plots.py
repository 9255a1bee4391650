"""Pictures of a run; the only module that imports matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_curves(epochs: list[dict[str, float]], path: Path) -> None:
    """Writes the losses and validation metrics by epoch as a PNG."""
    number = [epoch["epoch"] for epoch in epochs]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    left.plot(number, [epoch["loss"] for epoch in epochs], marker="o")
    left.set(title="likelihood loss (eq. 9)", xlabel="epoch")
    middle.plot(number, [epoch["abstraction_loss"] for epoch in epochs], marker="o", color="tab:green")
    middle.set(title="abstraction loss (eq. 5)", xlabel="epoch")
    for metric in ("hr@10", "hr@50", "ndcg@10"):
        right.plot(number, [epoch.get(f"valid/{metric}", float("nan")) for epoch in epochs], marker="o", label=metric)
    right.set(title="validation, seen items excluded", xlabel="epoch")
    right.legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
    temporary.replace(path)
