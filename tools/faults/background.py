"""What goes on beside a test or a measurement."""

from __future__ import annotations

import threading
from typing import Self


class Background:
    """Does its `run` on a thread of its own from the beginning of a block to its end, when `over` is set."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._thread.join()

    def run(self) -> None:
        """Returns soon after `over` is set."""
        raise NotImplementedError
