"""Resident memory of a worker that has served, against a process that only loads the libraries and the graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tools.bench.blocks import Plan, clean
from tools.bench.report import Claim, Section
from tools.bench.servers import ROOT
from tools.bench.setting import CLIENTS, Bench, K
from tools.loadgen import Load, run_load

MAX_RSS = 150e6  # bytes


def resident_memory(bench: Bench) -> Section:
    """A worker that has served, against a process that only loads the libraries and the graphs."""
    sizes, rows, served, loaded = bench.sizes, [], [], []
    half = sizes.memory_requests // 2
    for repeat in range(sizes.memory_repeats):
        loaded.append(_loaded_rss(bench.bundle.path))
        with bench.server(f"memory-{repeat}") as server:
            started = psutil.Process(server.pid).memory_info().rss
            users = bench.ordinary_users(server.address)
            plan = Plan({"recommend": half, "update": half}, concurrency=CLIENTS, rounds=1)
            clean(run_load(Load(server.address, bench.echo, users, bench.items, plan, k=K)))
            memory = psutil.Process(server.pid).memory_full_info()
        served.append(memory.rss)
        numbers = (loaded[-1], started, memory.rss, getattr(memory, "uss", 0))
        rows.append([str(repeat + 1), *(f"{number / 1e6:.1f}" for number in numbers)])
    worst, least = max(served), min(loaded)
    return Section(
        "Resident memory",
        f"RSS in MB (10^6 bytes) of a worker before and after {sizes.memory_requests} requests by {CLIENTS} clients, "
        "half recommend and half update, and of a process that only imports onnxruntime, grpc and lmdb and loads both "
        "graphs. RSS counts the pages of the state store and of the item table that were touched, which workers share "
        "and the system can take back; USS is what the process has to itself.",
        [
            Claim("resident memory of a worker after serving", f"{worst / 1e6:.0f} MB", "<= 150 MB", worst <= MAX_RSS),
            Claim("of a process that only loads libraries and graphs", f"{least / 1e6:.0f} MB"),
        ],
        ("repeat", "libraries and graphs", "worker, started", "worker, served", "of it USS"),
        rows,
        {"served_rss": served, "libraries_and_graphs_rss": loaded},
    )


def _loaded_rss(bundle: Path) -> int:
    """Bytes, as such a process reports them of itself."""
    command = [sys.executable, str(ROOT / "tools" / "bench" / "baseline.py"), str(bundle)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120).stdout)
