"""What a benchmark found: claims with their targets, and the Markdown page that shows them."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from dman_runtime.model.bundle import Bundle
from dman_runtime.options import print_json
from tools.bench.blocks import Block, p50s, summary

HOW_TO_READ = (
    "Every number is of that run. What is compared ran in turns, in blocks, and a ratio is the median of the ratios of "
    "single rounds; (a to b) is the smallest and the largest round."
)
BLOCK_HEADS = ("operation", "calls", "p50 ms, median of rounds", "p50 ms", "p90 ms", "p99 ms", "max ms", "calls/s")
RUNTIMES = ("onnxruntime-gpu", "onnxruntime")
Panels = dict[str, dict[str, dict[int, float]]]  # title -> label of a line -> its points


@dataclass(frozen=True)
class Claim:
    """One measured number; `met` is None where there is no target to meet."""

    claim: str
    measured: str
    target: str = "none"
    met: bool | None = None

    @classmethod
    def at_least(cls, claim: str, found: int, wanted: int) -> Claim:
        return cls(claim, str(found), f">= {wanted}", found >= wanted)

    def row(self) -> list[str]:
        return [self.claim, self.measured, self.target, {True: "yes", False: "NO", None: "-"}[self.met]]


@dataclass
class Section:
    """One measurement: what was done, in words, its claims, and every number for a reader who doubts them."""

    title: str
    method: str
    claims: list[Claim]
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    data: dict[str, Any] = field(default_factory=dict)
    panels: Panels = field(default_factory=dict)  # of its picture; none: it has no picture

    def markdown(self, picture: str = "") -> str:
        """`picture` is the name of its file."""
        parts = [f"## {self.title}", self.method]
        if picture:
            parts.append(f"![{', '.join(self.panels)}]({picture})")
        if self.rows:
            parts.append(table(self.heads, self.rows))
        return "\n\n".join(parts)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def block_rows(blocks: Mapping[str, Sequence[Block]]) -> list[list[str]]:
    rows = []
    for name, of_name in blocks.items():
        one = summary(name, of_name)
        times = [f"{value:.3f}" for value in (one.p50, one.p90, one.p99, one.max)]
        rows.append([name, str(one.count), str(p50s(of_name)), *times, f"{one.per_second:.0f}"])
    return rows


def block_data(blocks: Mapping[str, Sequence[Block]]) -> dict[str, object]:
    return {name: summary(name, of_name).as_json() for name, of_name in blocks.items()}


def machine(scratch: Path) -> dict[str, str]:
    """What the numbers depend on besides the code."""
    return {
        "CPU": f"{cpu_model()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable",
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "ONNX Runtime": next((f"{name} {found}" for name in RUNTIMES if (found := _version(name))), "unknown"),
        "gRPC, LMDB, NumPy": ", ".join(f"{_version(name)}" for name in ("grpcio", "lmdb", "numpy")),
        "file system of the state": _file_system(scratch),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or "unknown"])[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _file_system(path: Path) -> str:
    path = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if path.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown"


def sizes_of(bundle: Bundle) -> dict[str, str]:
    shape = bundle.manifest.state
    return {
        "bundle": f"`{bundle.bundle_id}`, {bundle.manifest.vocabulary} items",
        "sizes": f"T={shape.segment_length}, m={shape.memory_slots}, L={shape.layers}, D={shape.width}, "
        f"state in {shape.dtype}",
    }


def claims_table(claims: Sequence[Claim]) -> str:
    return table(("claim", "measured", "target", "met"), [claim.row() for claim in claims])


def write_report(path: Path, title: str, method: str, facts: dict[str, str], sections: Sequence[Section]) -> None:
    """A page: what ran and how, on which machine, all claims, then the sections, with pictures beside the page."""
    pictures = {section.title: _picture(path, section) for section in sections}
    parts = [
        f"# {title}",
        method,
        table(("", ""), list(facts.items())),
        claims_table([claim for section in sections for claim in section.claims]),
        *(section.markdown(pictures[section.title]) for section in sections),
    ]
    write_page(path, parts)


def _picture(page: Path, section: Section) -> str:
    """Draws what a section has to show beside its page; the name of the file, "" for none."""
    if not section.panels:
        return ""
    from dman_train.plots import plot_lines

    words = re.sub(r"[^a-z0-9]+", "-", section.title.lower().partition(":")[0]).strip("-")
    path = page.with_name(f"{page.stem}-{words}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_lines(section.panels, path, logarithmic=True)
    return path.name


def show(path: Path, facts: dict[str, str], sections: Sequence[Section], *, as_json: bool) -> None:
    """Prints the claims of a report that was written to `path`."""
    claims = [claim for section in sections for claim in section.claims]
    print(claims_table(claims))
    print(f"wrote {path}")
    if as_json:
        found = {section.title: section.data for section in sections}
        print_json({"facts": facts, "claims": [asdict(claim) for claim in claims], "sections": found})


def write_page(path: Path, parts: Sequence[str]) -> None:
    """Writes paragraphs and tables as a page, under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    temporary.replace(path)
