"""Checks and measures what only a GPU can show, and writes a report: python -m tools.gpu_check

It generates a log, trains, exports and serves it on CUDA, each beside the CPU. What is missing on a machine is a check
that failed, with the reason, and the others still run. Where there is no CUDA at all, no report is written.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch

from dman_runtime.data.evaluation import HeldOut, held_out
from dman_runtime.errors import UsageError
from dman_runtime.model.bundle import Bundle, open_bundle
from dman_runtime.model.encoder import Encoder
from dman_runtime.model.events import without_times
from dman_runtime.model.generation import GOLDEN_TOLERANCE, Generation
from dman_runtime.model.sessions import CUDA, chosen
from dman_runtime.options import Parser, require_positive, run_command
from dman_runtime.retrieval.base import Hits
from dman_train.config import DataConfig
from dman_train.data import load
from dman_train.graphs import search_graph
from dman_train.presets import PRESETS
from dman_train.synthetic import SyntheticConfig, generate, write_log
from tools.bench.batch import encoder_latency
from tools.bench.device_search import device_search
from tools.bench.report import HOW_TO_READ, Claim, Section, claims_table, machine, show, sizes_of, write_report
from tools.bench.servers import dman_server
from tools.bench.setting import Clock, scratch_directory
from tools.gpu_training import Training, every_form, first_line, reason, resuming, speed

K, ROOT, COMMAND_SECONDS = 20, Path(__file__).resolve().parents[1], 300
SCORE_TOLERANCE = {"float32": GOLDEN_TOLERANCE, "float16": 2e-2}  # by what states are stored as; of the largest score
BATCHES, LATENCY_REPEATS = (1, 32, 256), 15


@dataclass(frozen=True)
class Served:
    """What is served: a model trained here, on a generated log."""

    log: Path
    scratch: Path
    preset: str

    @property
    def bundle_path(self) -> Path:
        return self.scratch / "bundle"

    @property
    def bundle(self) -> Bundle:
        return open_bundle(self.bundle_path)

    def inputs(self) -> HeldOut:
        """The users of the log; the items of the training and of the bundle have the same numbers."""
        return held_out(load(self.log, DataConfig()), "test")


def commands(served: Served) -> Section:
    """The commands as people type them: two epochs of training, export, metrics of the run and of the bundle."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run, log, bundle = served.scratch / "run", served.log, served.bundle_path
    options = ["--preset", served.preset, "--epochs", "2", "--device", device]
    trained = _result("dman_train.train", "--data", log, "--run", run, *options)
    exported = _result("dman_train.export", "--run", run, "--out", bundle)
    evaluate = ("dman_runtime", "evaluate", "--bundle", bundle, "--data", log, "--provider")
    found = [trained["test"], _result(*evaluate, "auto"), _result(*evaluate, "cpu")]
    rates = [float(metrics["hr@10"]) for metrics in found]
    agree = max(rates) - min(rates) <= 0.01
    claims = [
        Claim(f"2 epochs of training on {device}", f"{trained['training_seconds']:.1f} s"),
        Claim("torch-to-ONNX error at export", f"{exported['max_relative_error']:.1e}"),
        Claim("HR@10: PyTorch, bundle with auto, with cpu", ", ".join(f"{x:.4f}" for x in rates), "within .01", agree),
    ]
    return Section("Commands", first_line(commands), claims)


def _result(module: str, *arguments: str | Path) -> dict[str, Any]:
    """What a command prints with --json. Raises UsageError."""
    command = [sys.executable, "-m", module, *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    if done.returncode:
        raise UsageError(f"{module}: {(done.stderr.strip().splitlines() or ['it failed without a message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def golden_replay(served: Served) -> Section:
    """The bundle opens with each provider, auto chooses CUDA, and all repeat what PyTorch recorded."""
    names: tuple[Literal["cuda", "auto", "cpu"], ...] = ("cuda", "auto", "cpu")
    claims = []
    for name in names:
        generation = Generation.open(served.bundle_path, provider=name)
        provider, error = generation.graphs.provider, generation.check_golden()
        if name != "cpu":
            claims.append(Claim(f"provider {name} runs on", provider, CUDA, provider == CUDA))
        met = error <= GOLDEN_TOLERANCE
        claims.append(Claim(f"golden replay, provider {name}", f"off by {error:.1e}", f"<= {GOLDEN_TOLERANCE:g}", met))
    return Section("Golden replay", first_line(golden_replay), claims)


def recommendations(served: Served) -> Section:
    """The best items after whole generated histories, provider cuda beside provider cpu."""
    bundle, histories, claims = served.bundle, served.inputs().histories, []
    graphs = (Encoder.of(bundle, provider="cuda"), Encoder.of(bundle, provider="cpu"))
    for dtype, tolerance in SCORE_TOLERANCE.items():
        state = replace(bundle.manifest.state, dtype=dtype)
        stored = replace(bundle, manifest=replace(bundle.manifest, state=state))
        found, expected = (_best(Generation.of(stored, encoder), histories) for encoder in graphs)
        claims += compare(found, expected, f"states in {dtype}", tolerance)
    method = (
        f"{first_line(recommendations)} {len(histories)} users, {sum(map(len, histories))} events, at most "
        f"{max(map(len, histories))} of a user. Scores are compared rank by rank: items of nearly the same score may "
        "change places."
    )
    return Section("Recommendations", method, claims)


def _best(generation: Generation, histories: Sequence[np.ndarray]) -> list[Hits]:
    users = np.stack([state.user_embedding for state in generation.replay(without_times(histories))])
    return generation.retriever.search(users, K, exclude=histories)


def compare(found: Sequence[Hits], expected: Sequence[Hits], what: str, tolerance: float) -> list[Claim]:
    """The claims about recommendations of the same users. Who has seen every item gets none."""
    pairs = list(zip(found, expected, strict=True))
    largest = max((float(np.abs(b.scores).max()) for _, b in pairs if len(b.scores)), default=0.0)
    difference = float(np.max([_difference(a, b) for a, b in pairs], initial=0.0))  # keeps NaN
    order = sum(np.array_equal(a.items, b.items) for a, b in pairs)
    items = sum(set(a.items.tolist()) == set(b.items.tolist()) for a, b in pairs)
    relative = difference / max(largest, 1e-12)
    met = relative <= tolerance
    return [
        Claim(
            f"{what}: largest difference of a score by the largest score", f"{relative:.1e}", f"<= {tolerance:g}", met
        ),
        Claim(f"{what}: users with the same {K} items; in the same order", f"{items}; {order} of {len(pairs)}"),
    ]


def _difference(found: Hits, expected: Hits) -> float:
    """The largest at any rank; infinite where another number of items was found."""
    if len(found.scores) != len(expected.scores):
        return float("inf")
    return float(np.abs(found.scores - expected.scores).max(initial=0.0))


def latency(served: Served) -> Section:
    """Runs of the encoder on CUDA and on the CPU, in turns."""
    return encoder_latency(served.bundle, BATCHES, repeats=LATENCY_REPEATS)


def search() -> Section:
    """Large catalogues on CUDA and on the CPU, in turns. Raises EncoderError where CUDA does not work."""
    return device_search(chosen("cuda", search_graph(1)))


def server(served: Served) -> Section:
    """A server on CUDA, then one on the CPU: the same updates, the same recommendations."""
    item_ids, providers = served.bundle.items.item_ids, ("auto", "cpu")
    histories = [[item_ids[item] for item in history] for history in served.inputs().histories]
    found: dict[str, list[Hits]] = {}
    rows, lines = [], []
    for provider in providers:
        state = served.scratch / f"state-{provider}"
        before = _gpu_mib()
        with dman_server(served.bundle_path, state, "--provider", provider) as running:
            found[provider], times = _serve(running.address, histories, item_ids)
            memory = [_resident_mib(running.pid), _gpu_mib() - before]
            rows.append([f"--provider {provider}", *(f"{x:.2f}" for x in times), *(f"{x:.0f}" for x in memory)])
            lines.append(running.ready_line)
    claims = compare(found["auto"], found["cpu"], "two servers", SCORE_TOLERANCE[served.bundle.manifest.state.dtype])
    claims.append(Claim("serve --provider auto says", lines[0].partition(" (")[2].rstrip(")"), CUDA, CUDA in lines[0]))
    method = (
        f"{first_line(server)} Medians of the round trips of one client; updates are durable. Memory is that of the "
        "whole server after these calls, and what it took of the card."
    )
    heads = ("server", "whole history, ms", "one event, ms", "recommend, ms", "memory, MiB", "GPU memory, MiB")
    return Section("Server", method, claims, heads, rows)


def _resident_mib(pid: int) -> float:
    """Of a process and all that it started."""
    parent = psutil.Process(pid)
    return sum(process.memory_info().rss for process in [parent, *parent.children(recursive=True)]) / (1 << 20)


def _gpu_mib() -> float:
    """GPU memory in use, by all processes; not a number where nvidia-smi does not answer."""
    try:
        return float(nvidia_smi("memory.used").removesuffix(" MiB"))
    except (UsageError, ValueError):
        return float("nan")


def nvidia_smi(fields: str) -> str:
    """What it says of the first card. Raises UsageError."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        raise UsageError("nvidia-smi does not answer") from None


def _serve(
    address: str, histories: Sequence[Sequence[str]], item_ids: Sequence[str]
) -> tuple[list[Hits], tuple[float, float, float]]:
    """What a server recommends after these histories and one event more; median milliseconds of the three calls."""
    from sdk import Client

    index, hits = {item_id: i for i, item_id in enumerate(item_ids)}, []
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    with Client(address) as client:
        for user, history in enumerate(histories):
            clock = [time.perf_counter()]
            client.update(f"u{user}", history)
            clock.append(time.perf_counter())
            client.update(f"u{user}", [item_ids[user % len(item_ids)]])
            clock.append(time.perf_counter())
            reply = client.recommend(f"u{user}", k=K)
            clock.append(time.perf_counter())
            for taken, began, ended in zip(times, clock, clock[1:], strict=False):
                taken.append(1000 * (ended - began))
            items = [index[str(item.item_id)] for item in reply]
            hits.append(Hits(np.array(items), np.array([item.score for item in reply])))
    return hits, (float(np.median(times[0])), float(np.median(times[1])), float(np.median(times[2])))


def facts(scratch: Path) -> dict[str, str]:
    """The card, the libraries, and the rest of the machine."""
    import onnxruntime

    try:
        card = nvidia_smi("name,memory.total,driver_version")
    except UsageError as error:
        card = f"none: {error.cause}"
    return {
        "card, memory, driver": card,
        "PyTorch": f"{torch.__version__}, made for CUDA {torch.version.cuda}",
        "ONNX Runtime offers": ", ".join(onnxruntime.get_available_providers()),
        **machine(scratch),
    }


def attempted(title: str, measure: Callable[[], Section]) -> Section:
    """A section, or one that says why it could not be made."""
    print(f"{title} ...", file=sys.stderr, flush=True)
    try:
        return replace(measure(), title=title)
    except Exception as error:  # a missing library or a broken device is a result here
        return Section(title, f"Not checked: {reason(error)}.", [Claim(title, reason(error), "works", False)])


def cuda_device() -> torch.device:
    """Raises UsageError."""
    if not torch.cuda.is_available():
        raise UsageError(f"PyTorch {torch.__version__} finds no CUDA device")
    return torch.device("cuda")


def all_sections(training: Training, served: Served) -> list[Section]:
    """Training first, as its memory must not be there when servers are measured; then what is served."""
    parts: Mapping[str, Callable[[], Section]] = {
        "Every form of training": lambda: every_form(training, cuda_device()),
        "Resuming": lambda: resuming(training, cuda_device()),
        "Speed of training": lambda: speed(training, cuda_device()),
        "Commands": lambda: commands(served),
        "Golden replay": lambda: golden_replay(served),
        "Recommendations": lambda: recommendations(served),
        "Latency of the encoder": lambda: latency(served),
        "Search": search,
        "Server": lambda: server(served),
    }
    return [attempted(title, measure) for title, measure in parts.items()]


def parser() -> Parser:
    p = Parser(prog="python -m tools.gpu_check", description="Check training and serving on CUDA; write a report.")
    p.add_argument("--out", type=Path, default=Path("reports/cuda.md"), help="the report")
    p.add_argument("--preset", choices=sorted(PRESETS), default="default", help="the model to train, export and serve")
    p.add_argument("--users", type=int, default=600, metavar="N", help="users of the generated log")
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each device when training is timed")
    p.add_argument("--steps", type=int, default=10, metavar="N", help="training steps of a turn")
    p.add_argument("--scratch", type=Path, default=Path(), help="where temporary files go")
    p.add_argument("--note", default="", metavar="TEXT", help="what readers of the report should know of the machine")
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments, clock = parser().parse_args(argv), Clock()
    require_positive(arguments, "users", "rounds", "steps")
    with scratch_directory(arguments.scratch) as scratch:
        log = scratch / "log.csv"
        write_log(generate(SyntheticConfig(users=arguments.users)), log)
        training = Training(log, scratch, arguments.preset, arguments.rounds, arguments.steps)
        served = Served(log, scratch, arguments.preset)
        sections, found = all_sections(training, served), facts(scratch)
        if served.bundle_path.exists():
            found |= sizes_of(served.bundle)
    found |= clock.facts(quick=False) | ({"note": arguments.note} if arguments.note else {})
    claims = [claim for section in sections for claim in section.claims]
    failed = sum(claim.met is False for claim in claims)
    if not torch.cuda.is_available() and all(claim.measured != CUDA for claim in claims):
        print(claims_table(claims))
        print(f"there is no CUDA here, neither for PyTorch nor for ONNX Runtime: {arguments.out} was not written")
        return 1
    command = shlex.join(["python", "-m", "tools.gpu_check", *(sys.argv[1:] if argv is None else argv)])
    verdict = f"{failed} of {len(claims)} checks failed." if failed else "Every check passed."
    write_report(arguments.out, "On a GPU", f"Written by `{command}`. {verdict} {HOW_TO_READ}", found, sections)
    show(arguments.out, found, sections, as_json=arguments.json)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if every check passed, 1 if one failed or could not be made."""
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
