"""The measurement of search on a device, taken on the CPU."""

from __future__ import annotations

from dman_runtime.model.sessions import CPU
from tools.bench.device_search import device_search


def test_device_and_cpu_are_timed_and_compared() -> None:
    section = device_search(CPU, items=(300, 900), batches=(1, 5))
    assert [row[:2] for row in section.rows] == [["300", "1"], ["300", "5"], ["900", "1"], ["900", "5"]]
    assert [row[-1] for row in section.rows] == ["1 of 1", "5 of 5"] * 2
