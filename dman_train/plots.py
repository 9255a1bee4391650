"""Plots of a run and of its interpretation; the only module that imports matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MOST_TICKS = 12  # of an axis with a tick for each value


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
    right.set(title="validation", xlabel="epoch")
    right.legend()
    _save(figure, path)


def plot_lines(panels: dict[str, dict[str, dict[int, float]]], path: Path, *, logarithmic: bool = False) -> None:
    """Writes a panel for each title as a PNG; each has lines by label, and each line has values by whole numbers.

    `logarithmic`: of these numbers, which then are above 0.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.5), layout="constrained", squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, points in lines.items():
            axis.plot(list(points), list(points.values()), marker="o", label=label)
        axis.set(title=title)
        numbers = sorted({number for points in lines.values() for number in points})
        if logarithmic:
            axis.set_xscale("log")
            axis.set_ylim(bottom=0)
        if len(numbers) <= MOST_TICKS:
            axis.set_xticks(numbers, [f"{number:g}" for number in numbers])
            axis.minorticks_off()
        if len(lines) == 1:
            axis.set(ylabel=next(iter(lines)))
        elif lines:
            axis.legend()
    _save(figure, path)


# Plots of `dman_train.interpret`; each takes its part of interpretation.json


def plot_share(share: dict[str, Any], path: Path) -> None:
    """Writes the short-term share of the users, over all and by length of the history, as a PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    edges = share["histogram"]["edges"]
    left.stairs(share["histogram"]["fraction"], edges, fill=True)
    left.axvline(share["mean"], color="black", linestyle="--", label=f"mean {share['mean']:.3f}")
    left.set(title="short-term share of what is read", xlabel="share", ylabel="fraction of users")
    left.legend()
    groups = [group for group in share["by_history_length"] if group["users"]]
    _boxes(right, [(f"{group['events']}\n{group['users']} users", group) for group in groups])
    right.set(title="by events in the history", ylabel="share")
    _save(figure, path)


def plot_attention(layers: list[dict[str, Any]], path: Path) -> None:
    """Writes the mean attention to each memory slot, and how concentrated it is, as a PNG."""
    figure, axes = plt.subplots(1, len(layers) + 1, figsize=(4 * len(layers) + 4, 3.5), layout="constrained")
    for number, layer in enumerate(layers):
        slots = range(len(layer["slots"]))
        axes[number].bar(slots, layer["slots"])
        axes[number].axhline(1 / len(slots), color="black", linestyle="--", label="1/m")
        axes[number].set(title=f"layer {number}: mean attention to the slots", xlabel="memory slot", ylim=(0, None))
        axes[number].legend()
    measures = [("entropy\n/ log m", "entropy"), ("largest\nslot", "largest_slot")]
    _boxes(axes[-1], [(f"{text}\n(layer {n})", layer[key]) for text, key in measures for n, layer in enumerate(layers)])
    axes[-1].set(title="over users", ylim=(0, 1.05))
    _save(figure, path)


def plot_slots(diversity: dict[str, Any], path: Path) -> None:
    """Writes the similarity of the memory slots, and the effective rank of the memory, as a PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    layers, initial = diversity["layers"], diversity["initial"]
    if diversity["users"]:
        for number, layer in enumerate(layers):
            label = f"layer {number}: mean {layer['cosine']['mean']:.2f}"
            left.stairs(layer["pairs"]["fraction"], layer["pairs"]["edges"], label=label)
        left.legend()
        _boxes(right, [(f"layer {number}", layer["effective_rank"]) for number, layer in enumerate(layers)])
    positions = range(1, len(initial) + 1)
    right.plot(positions, [layer["effective_rank"] for layer in initial], "kx", label="initial memory")
    right.legend()
    left.set(
        title=f"pairs of slots, {diversity['users']} written memories", xlabel="cosine", ylabel="fraction of pairs"
    )
    right.set(title="effective rank of the memory", ylim=(0, 1.1 * right.get_ylim()[1]))
    left.set(xticks=[-1, -0.5, 0, 0.5, 1])
    _save(figure, path)


def plot_trajectory(segments: list[dict[str, Any]], path: Path) -> None:
    """Writes one user's short-term share, slot attention and slot diversity, segment by segment, as a PNG."""
    layers, number = len(segments[0]["cosine"]), range(1, len(segments) + 1)
    figure, axes = plt.subplots(3 + layers, 1, figsize=(9, 2.2 * (3 + layers)), layout="constrained", sharex=True)
    axes[0].plot(number, [segment["short_term_share"] for segment in segments], marker=".")
    axes[0].set(title="short-term share of what is read")
    for layer in range(layers):
        weights = list(zip(*(segment["attention"][layer] for segment in segments), strict=True))  # (m, segments)
        extent = (0.5, len(segments) + 0.5, len(weights) - 0.5, -0.5)
        image = axes[1 + layer].imshow(weights, aspect="auto", interpolation="nearest", vmin=0, extent=extent)
        axes[1 + layer].set(title=f"attention to the slots, layer {layer}", ylabel="slot")
        figure.colorbar(image, ax=axes[1 + layer])
    for axis, name, title in (
        (axes[-2], "cosine", "mean cosine of two slots"),
        (axes[-1], "effective_rank", "effective rank"),
    ):
        for layer in range(layers):
            axis.plot(number, [segment[name][layer] for segment in segments], marker=".", label=f"layer {layer}")
        axis.set(title=title)
        axis.legend()
    axes[-1].set(xlabel="segment")
    _save(figure, path)


def _boxes(axis: Axes, spreads: list[tuple[str, dict[str, float]]]) -> None:
    """Boxes of the quartiles with whiskers to the 5th and 95th percentile, one for each label and spread."""
    keys = {"whislo": "p5", "q1": "p25", "med": "p50", "q3": "p75", "whishi": "p95"}
    axis.bxp(
        [{"label": label} | {k: spread[p] for k, p in keys.items()} for label, spread in spreads], showfliers=False
    )


def _save(figure: Figure, path: Path) -> None:
    """Replaces the file at once, and forgets the figure."""
    temporary = path.with_name(f".{path.name}")
    try:
        figure.savefig(temporary, dpi=100, format="png")
    finally:
        plt.close(figure)
    temporary.replace(path)
