"""Presets: settings of a model and its training that belong together. Options change the chosen one further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dman_runtime.data.interactions import Interactions
from dman_train.config import BaselineConfig, ModelConfig, TrainConfig
from dman_train.item_rows import refusal_of_rows
from dman_train.lanes import WINDOW_EVENTS
from dman_train.losses import FULL_SOFTMAX_LIMIT


@dataclass(frozen=True)
class Preset:
    """A model and the training settings that go with it."""

    model: ModelConfig | BaselineConfig
    train: TrainConfig


EPOCH_STEPS = 100  # as many as a small log should have
FEWEST_LANES, MOST_LANES = 8, 128
SHORT_HISTORY = 20  # events that a system of the paper's `*` form sees: one segment
PAPER_MODEL = ModelConfig(
    architecture="paper",
    heads=1,
    long_term="gated",
    time="none",
    returns="off",
    layers=2,
    memory_slots=20,
    closed_states="full",
    dropout=0.1,
    routing_iterations=3,
)
# What all systems share that are trained as in the paper. All epochs are trained: validation stands still at first, and
# a patience of four would end a run there.
PAPER_TRAINING = TrainConfig(
    loss="negatives-softmax",
    negatives=5,
    lanes=128,
    learning_rate=1e-3,
    ema_decay=0.0,
    epochs=30,
    patience=30,
    seen_items="keep-target",
)
PAPER_MEMORY_TRAINING = replace(
    PAPER_TRAINING,
    memory_training="alternating",
    abstraction_loss="reads",
    abstraction_every=1,
    abstraction_learning_rate=1e-3,
)
PRESETS = {
    "default": Preset(ModelConfig(), TrainConfig()),
    # The equations; step size and dropout from short comparisons on MovieLens-1M.
    "paper": Preset(PAPER_MODEL, replace(PAPER_MEMORY_TRAINING, learning_rate=2e-3)),
    # The equations with the settings of the text, and nothing that it does not name. 50 epochs are those of MovieLens.
    "paper-literal": Preset(
        replace(PAPER_MODEL, dropout=0.0),
        replace(
            PAPER_MEMORY_TRAINING,
            adam_beta2=0.999,
            warmup_steps=0,
            final_learning_rate=1.0,
            gradient_clip=0.0,
            epochs=50,
            patience=50,
            random_first_segment=False,
        ),
    ),
    "tiny": Preset(
        ModelConfig(width=32, heads=1, segment_length=10, layers=2, memory_slots=8, dropout=0.1),
        TrainConfig(lanes=64, epochs=8, warmup_steps=20, learning_rate=5e-3, abstraction_learning_rate=5e-3),
    ),
}


_BASELINE_DEFAULTS = {  # by system
    "gru4rec": Preset(BaselineConfig("gru4rec"), TrainConfig()),
    "caser": Preset(BaselineConfig("caser"), TrainConfig()),
    "sasrec": Preset(BaselineConfig("sasrec"), TrainConfig()),
    "shan": Preset(BaselineConfig("shan", segment_length=2), TrainConfig()),
    "hpmn": Preset(BaselineConfig("hpmn", layers=4), TrainConfig()),
    "sdm": Preset(BaselineConfig("sdm"), TrainConfig()),
}
BASELINE_PRESETS = {  # by name, then by system
    "default": _BASELINE_DEFAULTS,
    "paper": {
        system: Preset(replace(preset.model, time="none", returns="off"), PAPER_TRAINING)
        for system, preset in _BASELINE_DEFAULTS.items()
    },
}
Presets = Mapping[str, Preset | Mapping[str, Preset]]


def preset_of(presets: Presets, name: str, *, system: str = BaselineConfig.system) -> Preset:
    """The preset of this name; among BASELINE_PRESETS, that of this system."""
    found = presets[name]
    return found if isinstance(found, Preset) else found[system]


def decided(preset: Preset, *, has_times: bool, events: int, items: int) -> Preset:
    """The preset with what the log decides, if it has times, and so many events and items.

    That is `time`, `returns` and `item_updates` where they are "auto", and `lanes` where they are 0: with as many as a
    large log takes, an epoch of a small one would have too few steps to learn from.
    """
    model, train = preset.model, preset.train
    if model.time == "auto":
        model = replace(model, time="request" if has_times and model.times_by_default else "none")
    if model.returns == "auto":
        counted = model.returns_by_default and train.seen_items == "keep"
        model = replace(model, returns="on" if counted else "off")
    if not train.lanes:
        positions = model.segment_length if isinstance(model, ModelConfig) else WINDOW_EVENTS
        lanes = events // (EPOCH_STEPS * positions * FEWEST_LANES) * FEWEST_LANES  # a multiple, which processes share
        train = replace(train, lanes=min(max(lanes, FEWEST_LANES), MOST_LANES))
    if train.item_updates == "auto":
        by_rows = items > FULL_SOFTMAX_LIMIT and refusal_of_rows(model, train, items=items) is None
        train = replace(train, item_updates="rows" if by_rows else "all")
    return Preset(model, train)


def decided_by(interactions: Interactions, preset: Preset) -> Preset:
    """The preset with what this log decides."""
    has_times, items = bool(interactions.timestamps.any()), len(interactions.item_ids)
    return decided(preset, has_times=has_times, events=len(interactions), items=items)
