"""All settings of a model and its training, checked once. `dman_train.presets` has the combinations that are used.

`ModelConfig` describes the network and is copied into the bundle; `TrainConfig` describes how the weights are trained.
The options of `dman_train.train` are derived from the fields of both (`dman_runtime.options`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dman_runtime.data.log_options import LogOptions, option
from dman_runtime.data.tables import quoted
from dman_runtime.errors import DmanError, InputError


class ConfigError(DmanError, ValueError):
    """A configuration that cannot work; `parameter` names the field."""


# What two options of DMAN and of the baselines mean.
_TIME = (
    "what the model sees of times: request: those of the events and of the request; events: those of the events; "
    "none; auto: request if the log has times"
)
_RETURNS = "whether the scores have a term for items that the user had before: auto: if seen_items is keep"


class _SeesTimes:
    """What the configs of both families say of times."""

    time: str

    @property
    def sees_times(self) -> bool:
        """Whether the model sees the times of events. `auto` is decided before a model is built."""
        return self.time in ("request", "events")


@dataclass(frozen=True)
class ModelConfig(_SeesTimes):
    """The network of `dman_train.model`; symbols in its docstring. Raises ConfigError."""

    architecture: Literal["plus", "paper"] = option(
        "plus", "plus: blocks with LayerNorm, heads, gated residuals and feed-forward; paper: only the equations"
    )
    variant: Literal["dman", "xl", "fifo", "nran"] = option(
        "dman",
        "dman; or an ablation of the paper's Table 5: xl (no memory), "
        "fifo (memory = the last m hidden states), nran (no context from earlier segments)",
    )
    segment_length: int = option(20, "T: events per segment")
    # Nine slots of three layers take a state to 23.4 kB, with `closed_states` rounded. Fewer slots do not keep a key
    # of the planted puzzle; two layers have .005 less NDCG@10 on MovieLens-1M.
    memory_slots: int = option(9, "m: memory slots per layer")
    layers: int = option(3, "L: attention layers")
    width: int = option(128, "D: width of embeddings and hidden states")
    heads: int = option(2, "attention heads; must divide the width (1 for paper)")
    ffn_multiplier: int = option(2, "hidden width of the feed-forward blocks, as a multiple of D (plus only)")
    long_term: Literal["merged", "gated"] = option(
        "merged",
        "how the memory is read: merged: one attention reads slots and events (plus only); "
        "gated: a second branch reads the slots, and the gate of eq. 3 mixes both",
    )
    time: Literal["auto", "request", "events", "none"] = option("auto", f"{_TIME} (plus only)")
    returns: Literal["auto", "on", "off"] = option("auto", f"{_RETURNS} (plus only)")
    sketch_items: int = option(64, "R: items per user whose counts are kept for it")
    closed_states: Literal["full", "int8"] = option(
        "int8", "how hidden states are kept once their segment is full: full; int8: rounded, which takes half the bytes"
    )
    dropout: float = option(0.2, "dropout rate on inputs, attention weights and block outputs")
    routing: Literal["slot", "full"] = option(
        "slot", "bilinear maps of eq. 6: slot: one per memory slot; full: one per pair of input and slot"
    )
    routing_iterations: int = option(1, "routing iterations of eq. 7")
    routing_softmax: Literal["slots", "primaries"] = option(
        "slots", "the axis over which the coupling coefficients of eq. 7 sum to one"
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(self, 1, 512, "segment_length", "memory_slots", "sketch_items")
        _check_range(self, 1, 16, "layers", "heads", "ffn_multiplier", "routing_iterations")
        _check_range(self, 4, 4096, "width")
        _check_range(self, 0.0, 0.95, "dropout")
        _check_heads(self)
        if self.architecture == "paper" and self.heads != 1:
            raise ConfigError(f"heads is {self.heads}, and 'paper' has one", "set heads to 1", parameter="heads")
        if self.architecture == "paper" and self.long_term != "gated":
            raise ConfigError(
                "architecture 'paper' has a long-term branch", "set long_term to 'gated'", parameter="long_term"
            )
        if self.sees_times and self.long_term == "gated":
            raise ConfigError("long_term 'gated' sees no times", "set time to 'none'", parameter="time")

    @property
    def has_memory(self) -> bool:
        """Whether the model has a memory. Without one, a state has no slots."""
        return self.variant != "xl"

    @property
    def merged(self) -> bool:
        """Whether one attention per layer reads events and memory."""
        return self.has_memory and self.long_term == "merged"

    @property
    def times_by_default(self) -> bool:
        """Whether time "auto" means "request" for a log with times."""
        return self.architecture == "plus" and self.long_term == "merged"

    @property
    def returns_by_default(self) -> bool:
        """Whether returns "auto" means "on" if seen items are kept."""
        return self.architecture == "plus"

    @property
    def answers_read_states(self) -> bool:
        """As in `StateShape`."""
        return self.time == "request" or self.returns == "on"

    @property
    def slots(self) -> int:
        """Number of memory slots in a state."""
        return self.memory_slots if self.has_memory else 0

    @property
    def recurrent(self) -> bool:
        """Whether the context reaches into the previous segment."""
        return self.variant != "nran"


@dataclass(frozen=True)
class BaselineConfig(_SeesTimes):
    """A comparison model of `dman_train.baselines`. Raises ConfigError."""

    system: Literal["gru4rec", "caser", "sasrec", "shan", "hpmn", "sdm"] = option("sasrec", "which model")
    history: int = option(200, "latest events that the model sees; 20 for the paper's * form, which sees one segment")
    width: int = option(128, "D: width of embeddings and hidden states")
    layers: int = option(2, "layers (sasrec, gru4rec), or memory slots (hpmn)")
    heads: int = option(2, "attention heads (sasrec, sdm); must divide the width")
    dropout: float = option(0.2, "dropout rate")
    segment_length: int = option(20, "events of the current session (shan, sdm)")
    hops: int = option(3, "how often the memory is read (hpmn)")
    time: Literal["auto", "request", "events", "none"] = option("auto", f"{_TIME} (gru4rec, sasrec, hpmn only)")
    returns: Literal["auto", "on", "off"] = option("auto", f"{_RETURNS} (gru4rec, sasrec, hpmn only)")

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(self, 1, 4096, "history", "segment_length")
        _check_range(self, 1, 16, "layers", "heads", "hops")
        _check_range(self, 4, 4096, "width")
        _check_range(self, 0.0, 0.95, "dropout")
        _check_heads(self)
        if self.sees_times and not self.times_by_default:
            raise ConfigError(f"system {self.system!r} sees no times", "set time to 'none'", parameter="time")

    @property
    def times_by_default(self) -> bool:
        """As in `ModelConfig`."""
        return self.system in ("gru4rec", "sasrec", "hpmn")

    @property
    def returns_by_default(self) -> bool:
        """As in `ModelConfig`."""
        return self.times_by_default


@dataclass(frozen=True)
class TrainConfig:
    """How the weights are trained. Raises ConfigError."""

    loss: Literal["auto", "full", "sampled", "negatives", "negatives-softmax"] = option(
        "auto",
        "full: softmax over all items; sampled: softmax over shared negatives, with logQ correction; negatives: binary "
        "loss with a few negatives per event; negatives-softmax: eq. 9 over the target and a few negatives per event; "
        "auto: full up to 50,000 items, else sampled",
    )
    negatives: int = option(1024, "number of negatives: per batch for loss=sampled, else per event")
    memory_training: Literal["alternating", "joint"] = option(
        "joint", "what trains f_abs: alternating: abstraction_loss; joint: that, and eq. 9 through the memory"
    )
    backprop_segments: int = option(1, "joint only: how many segment borders the gradient of eq. 9 crosses, 1 to 4")
    # "reads" sees one segment further than eq. 9, so nothing teaches f_abs to keep what is asked for later.
    abstraction_loss: Literal["reads", "recall"] = option(
        "recall", "the loss of f_abs: reads: eq. 5; recall: the slots name items that they absorbed, however long ago"
    )
    abstraction_weight: float = option(1.0, "weight of the abstraction loss")
    abstraction_every: int = option(4, "compute the abstraction loss on every n-th lane of a process only")
    item_updates: Literal["auto", "all", "rows"] = option(
        "auto",
        "what a step does with the item table: all: works on the whole table; rows: on the items of the step, which "
        "gives the same up to rounding (DMAN only, not with loss=full); auto: rows beyond 50,000 items, where it can",
    )
    lanes: int = option(
        0,
        "users side by side, each with T events of a batch (baselines: 20); 0: 8 to 128, for 100 steps an epoch",
    )
    learning_rate: float = option(4e-3, "Adam step size, except for f_abs")
    abstraction_learning_rate: float = option(4e-3, "Adam step size of f_abs")
    adam_beta2: float = option(0.98, "decay per step of Adam's mean of squared gradients; 0.999 is Adam's own default")
    warmup_steps: int = option(200, "steps over which the learning rate rises to its full value")
    final_learning_rate: float = option(0.1, "learning rate at the end, as a share of the full one (cosine)")
    weight_decay: float = option(0.0, "decoupled weight decay")
    ema_decay: float = option(
        0.998,
        "decay per step of the moving average of the weights; the average is validated and exported; 0: no averaging",
    )
    gradient_clip: float = option(1.0, "largest gradient norm, per optimiser; 0: no limit")
    precision: Literal["float32", "bfloat16"] = option(
        "float32", "of the matrix products; bfloat16 is faster if the CPU or GPU supports it; sums stay in float32"
    )
    epochs: int = option(8, "passes over the training events")
    patience: int = option(4, "stop after this many epochs without a better validation NDCG@10")
    seen_items: Literal["exclude", "exclude-from-ranking", "keep-target", "keep"] = option(
        "exclude",
        "items the user has already seen: exclude: neither negatives in the loss nor ranked in validation; "
        "exclude-from-ranking: still used as negatives; keep-target: the same, but a target that was seen is ranked "
        "(the paper's protocol); keep: both, for logs where users return to items",
    )
    evaluation_users: int = option(0, "users validated after each epoch; 0: all")
    request_dropout: float = option(0.1, "share of segments in training whose time of request is unknown")
    times_dropout: float = option(0.05, "share of users in training whose events have no times (DMAN only)")
    random_first_segment: bool = option(True, "vary the length of a user's first segment, so that all shifts occur")
    seed: int = option(0, "seed of the initial weights, the order of users, dropout and negatives")

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(self, 1, 1_000_000, "negatives", "abstraction_every", "epochs", "patience")
        _check_range(self, 0, 1_000_000, "lanes")
        _check_range(self, 0, 1_000_000_000, "warmup_steps", "evaluation_users", "seed")
        _check_range(self, 1, 4, "backprop_segments")
        _check_range(
            self, 0.0, 1.0, "final_learning_rate", "learning_rate", "abstraction_learning_rate", "weight_decay"
        )
        _check_range(self, 0.0, 1e6, "gradient_clip", "abstraction_weight")
        _check_range(self, 0.0, 1.0, "request_dropout", "times_dropout")
        _check_range(self, 0.0, 0.999999, "ema_decay", "adam_beta2")
        _check_switch(self, "random_first_segment")
        if self.backprop_segments > 1 and self.memory_training != "joint":
            raise ConfigError(
                "backprop_segments above 1 needs memory_training 'joint'",
                "set it to 1 or train jointly",
                parameter="backprop_segments",
            )


@dataclass(frozen=True)
class DataConfig(LogOptions):
    """How the log is read. Raises ConfigError."""

    min_user_events: int = option(5, "leave out users with fewer events")
    min_item_events: int = option(5, "leave out items with fewer events")

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except InputError as error:
            raise ConfigError(error.cause, error.remedy, parameter=error.parameter) from None
        _check_range(self, 0, 1_000_000, "min_user_events", "min_item_events")


def _check_choices(config: Any) -> None:
    for name, choices in literal_choices(type(config)).items():
        if getattr(config, name) not in choices:
            raise ConfigError(
                f"{name} is {quoted(getattr(config, name))}",
                f"choose one of {', '.join(map(repr, choices))}",
                parameter=name,
            )


def literal_choices(config_class: type) -> dict[str, tuple[str, ...]]:
    """The allowed values of each Literal field."""
    hints = get_type_hints(config_class)
    return {f.name: get_args(hints[f.name]) for f in fields(config_class) if get_origin(hints[f.name]) is Literal}


def _check_heads(config: ModelConfig | BaselineConfig) -> None:
    if config.width % config.heads:
        raise ConfigError(
            f"width {config.width} is not a multiple of heads {config.heads}",
            "choose heads that divide it",
            parameter="heads",
        )


def _check_texts(config: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), str):
            raise ConfigError(f"{name} is {quoted(getattr(config, name))}", "give a text", parameter=name)


def _check_switch(config: Any, name: str) -> None:
    if not isinstance(getattr(config, name), bool):
        raise ConfigError(f"{name} is {quoted(getattr(config, name))}", "choose true or false", parameter=name)


def _check_range(config: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        kind = int if isinstance(low, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            number = "whole number" if kind is int else "number"
            raise ConfigError(
                f"{name} is {quoted(value)}", f"choose a {number} from {low:g} to {high:g}", parameter=name
            )


def to_dict(config: ModelConfig | BaselineConfig | TrainConfig | DataConfig) -> dict[str, Any]:
    """The fields of a config by name, as JSON can hold them."""
    return asdict(config)
