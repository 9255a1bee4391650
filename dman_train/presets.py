"""Presets: settings of a model and its training that belong together. Options change the chosen one further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dman_train.config import BaselineConfig, ModelConfig, TrainConfig


@dataclass(frozen=True)
class Preset:
    """A model and the training settings that go with it."""

    model: ModelConfig | BaselineConfig
    train: TrainConfig


SHORT_HISTORY = 20  # events that a system of the paper's `*` form sees: one segment
PAPER_MODEL = ModelConfig(
    architecture="paper",
    heads=1,
    long_term="gated",
    time="none",
    returns="off",
    dropout=0.1,
    memory_slots=20,
    routing_iterations=3,
)
# What all systems share that are trained as in the paper. All epochs are trained: validation stands still at first, and
# a patience of four would end a run there.
PAPER_TRAINING = TrainConfig(
    loss="negatives-softmax",
    negatives=5,
    learning_rate=1e-3,
    ema_decay=0.0,
    epochs=30,
    patience=30,
    seen_items="keep-target",
)
PAPER_MEMORY_TRAINING = replace(
    PAPER_TRAINING, memory_training="alternating", abstraction_every=1, abstraction_learning_rate=1e-3
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
            lanes=128,
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
        ModelConfig(width=32, heads=1, segment_length=10, memory_slots=8, dropout=0.1),
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


def decided(model: ModelConfig | BaselineConfig, *, seen_items: str, has_times: bool) -> ModelConfig | BaselineConfig:
    """The model with `time` and `returns` decided, where they are "auto": by the log and by what is ranked."""
    if model.time == "auto":
        model = replace(model, time="request" if has_times and model.times_by_default else "none")
    if model.returns == "auto":
        counted = model.returns_by_default and seen_items == "keep"
        model = replace(model, returns="on" if counted else "off")
    return model
