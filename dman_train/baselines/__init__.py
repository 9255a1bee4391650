"""The systems that the paper compares DMAN with, trained and evaluated like it: same data, split, loss and metrics.

    python -m dman_train.baselines --system sasrec --history 200 --data FILE --run DIR

They carry no state, so they learn from windows of histories (`dman_train.baselines.windows`) instead of endless lanes.
"""

from __future__ import annotations

from dman_train.baselines.base import Baseline
from dman_train.baselines.caser import Caser
from dman_train.baselines.gru4rec import GRU4Rec
from dman_train.baselines.hpmn import HPMN
from dman_train.baselines.sasrec import SASRec
from dman_train.baselines.sdm import SDM
from dman_train.baselines.shan import SHAN
from dman_train.config import BaselineConfig

BASELINES: dict[str, type[Baseline]] = {  # by BaselineConfig.system
    "gru4rec": GRU4Rec,
    "caser": Caser,
    "sasrec": SASRec,
    "shan": SHAN,
    "hpmn": HPMN,
    "sdm": SDM,
}


def build(config: BaselineConfig, vocabulary: int, users: int) -> Baseline:
    """A fresh model of `config.system` for V = `vocabulary` items and U = `users` of the training log."""
    return BASELINES[config.system](config, vocabulary, users)
