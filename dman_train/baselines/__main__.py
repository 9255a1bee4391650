"""Trains a baseline: python -m dman_train.baselines --system NAME --history N --data FILE --run DIR

A run directory like any other: `dman_train.evaluate` evaluates it. Only a DMAN can be exported.
"""

from __future__ import annotations

import sys

from dman_train.config import BASELINE_PRESETS
from dman_train.train import main

if __name__ == "__main__":
    sys.exit(main(presets=BASELINE_PRESETS))
