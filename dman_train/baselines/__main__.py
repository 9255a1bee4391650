"""Trains a baseline: python -m dman_train.baselines --system NAME --history N --data FILE --run DIR

It writes a run directory like `dman_train.train`. `dman_train.evaluate` can evaluate it; only a DMAN can be exported.
"""

from __future__ import annotations

import sys

from dman_train.presets import BASELINE_PRESETS
from dman_train.train import main

if __name__ == "__main__":
    sys.exit(main(presets=BASELINE_PRESETS))
