"""What the calls of honest callers say: percentiles by phase, ratios, rows of the report. Nothing here does I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tools.bench.report import Claim
from tools.soak.callers import Sample

PHASES = ("quiet", "during", "after")
MAX_RATIO = 3.0
Phases = Mapping[str, tuple[float, float]]  # phase -> when it began and ended


def by_phase(samples: Sequence[Sample], phases: Phases) -> dict[str, list[Sample]]:
    """The calls that began in each phase; those between phases are left out."""
    return {
        name: [sample for sample in samples if begin <= sample.began < end] for name, (begin, end) in phases.items()
    }


def percentile(samples: Sequence[Sample], call: str, q: float) -> float:
    """Milliseconds of the calls of one kind that succeeded; NaN where none did."""
    times = [sample.milliseconds for sample in samples if sample.call == call and not sample.error]
    return float(np.percentile(times, q)) if times else float("nan")


@dataclass
class RowResult:
    """What one row of the table of faults did to honest callers, over all its turns."""

    row: str
    attack: str
    bounded: bool  # whether the ratio of the 99th percentiles must stay below MAX_RATIO
    turns: int = 0
    phases: dict[str, list[Sample]] = field(default_factory=lambda: {name: [] for name in PHASES})
    memory: list[tuple[int, int]] = field(default_factory=list)  # resident bytes before and after each turn
    log_bytes: int = 0
    did: str = ""  # by the last turn

    def add(self, phases: Mapping[str, Sequence[Sample]], memory: tuple[int, int], log_bytes: int, did: str) -> None:
        for name, samples in phases.items():
            self.phases[name] += samples
        self.turns += 1
        self.memory.append(memory)
        self.log_bytes = max(self.log_bytes, log_bytes)
        self.did = did

    @property
    def errors(self) -> Counter[str]:
        found = [sample for samples in self.phases.values() for sample in samples if sample.error]
        return Counter(f"{sample.call} {sample.error}" for sample in found)

    @property
    def calls(self) -> int:
        return sum(map(len, self.phases.values()))

    def kinds(self) -> list[str]:
        return sorted({sample.call for samples in self.phases.values() for sample in samples})

    def ratio(self, call: str, phase: str) -> float:
        """p99 of a phase by p99 of the quiet one. NaN where no call of one of them succeeded."""
        return percentile(self.phases[phase], call, 99) / percentile(self.phases["quiet"], call, 99)

    @property
    def worst_ratio(self) -> float:
        """Of all calls but health checks, during and after. NaN where there is nothing to compare."""
        ratios = [self.ratio(call, phase) for call in self.kinds() if call != "health" for phase in PHASES[1:]]
        return max(ratios, key=lambda ratio: np.inf if np.isnan(ratio) else ratio, default=float("nan"))

    def claims(self) -> list[Claim]:
        errors = self.errors.total()
        shown = ", ".join(f"{count} {name}" for name, count in sorted(self.errors.items())) or "none"
        claims = [
            Claim(
                f"row {self.row}, {self.attack}: errors of honest callers",
                f"{shown} in {self.calls}",
                "none",
                errors == 0,
            )
        ]
        if self.bounded:
            ratio = self.worst_ratio
            claim = f"row {self.row}, {self.attack}: worst p99 during and after by quiet"
            claims.append(Claim(claim, f"{ratio:.2f}", f"< {MAX_RATIO:g}", bool(ratio < MAX_RATIO)))
        return claims

    def rows(self) -> list[list[str]]:
        """One line for each kind of call."""
        before, after = (max((pair[side] for pair in self.memory), default=0) for side in (0, 1))
        lines = []
        for call in self.kinds():
            samples = [sample for phase in PHASES for sample in self.phases[phase] if sample.call == call]
            errors = sum(bool(sample.error) for sample in samples)
            times = [
                f"{percentile(self.phases[phase], call, 50):.1f} / {percentile(self.phases[phase], call, 99):.1f}"
                for phase in PHASES
            ]
            ratio = f"{self.ratio(call, 'during'):.2f}, {self.ratio(call, 'after'):.2f}"
            memory = f"{before / 1e6:.0f}, {after / 1e6:.0f}"
            line = [self.row, f"{self.attack} ({self.turns} turns; last: {self.did})", call, str(len(samples))]
            lines.append([*line, str(errors), *times, ratio, memory, f"{self.log_bytes / 1e3:.0f}"])
        return lines


HEADS = (
    "row",
    "attack",
    "honest call",
    "calls",
    "errors",
    "quiet p50 / p99 ms",
    "during",
    "after",
    "p99 by quiet: during, after",
    "worker MB: before, after",
    "log kB",
)
