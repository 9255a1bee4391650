"""The two graphs of a bundle, run by ONNX Runtime; the only module that imports it.

B rows, S new positions, C context positions; T events per segment, m memory slots, L layers, D width.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dman_runtime.errors import EncoderError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported; since 1.29 it reports home

import onnxruntime as ort

from dman_runtime.model.bundle import ABSTRACTION, ENCODER, REQUEST, Bundle, StateShape
from dman_runtime.model.graph_file import check_graph

logger = logging.getLogger(__name__)
Provider = Literal["auto", "cuda", "cpu"]
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
FATAL = 4  # ONNX Runtime's log severity; a provider that fails to start is reported by us


class Encoder:
    """Runs the segment encoder and the memory abstraction. Thread-safe on CPU; use one thread on CUDA."""

    def __init__(
        self,
        graphs: Mapping[str, bytes],
        shape: StateShape,
        *,
        provider: Provider = "auto",
        threads: int = 1,
        where: Path = Path(),
    ) -> None:
        """Loads the two graphs, given as ONNX files by name.

        Args:
            provider: "auto" takes CUDA when a device is there and ONNX Runtime really initialises on it.
            threads: CPU threads inside one run.
            where: The bundle that they are from, for messages.

        Raises:
            EncoderError: provider "cuda" does not work here, or a graph cannot be loaded or is of another model.
        """
        self._where = where
        tensors = _expected_tensors(shape)
        for name in tensors:
            try:
                check_graph(graphs[name])
            except ValueError as error:
                raise _not_loaded(where / name, str(error)) from None
        self.provider = _choose(provider, graphs[ABSTRACTION])
        sessions = {name: self._load(graphs[name], name, threads) for name in tensors}
        self._reader = sessions.get(REQUEST)
        for name, session in sessions.items():
            if problem := _problem(session, *tensors[name]):
                raise _not_loaded(where / name, problem)
        self._encoder, self._abstraction = sessions[ENCODER], sessions[ABSTRACTION]
        logger.info("ONNX Runtime %s runs on %s", ort.__version__, self.provider)

    @classmethod
    def of(cls, bundle: Bundle, *, provider: Provider = "auto", threads: int = 1) -> Encoder:
        """The graphs of an opened bundle. Arguments and errors as above."""
        return cls(bundle.graphs, bundle.manifest.state, provider=provider, threads=threads, where=bundle.path)

    def _load(self, graph: bytes, name: str, threads: int) -> ort.InferenceSession:
        try:
            return _session(graph, self.provider, threads)
        except Exception as error:  # onnxruntime raises pybind classes of its own
            raise _not_loaded(self._where / name, _first_line(error)) from None

    @property
    def on_cuda(self) -> bool:
        return self.provider == CUDA

    def encode(
        self,
        item_embeddings: np.ndarray,
        new_lengths: np.ndarray,
        context: np.ndarray,
        context_lengths: np.ndarray,
        memory: np.ndarray,
        ages: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes new positions (eq. 1-3).

        Args:
            item_embeddings: (B, S, D) float32, left-aligned; new_lengths: (B) int64, 1..S.
            context: (B, L, C, D) float32, right-aligned; context_lengths: (B) int64, 0..C.
            memory: (B, L, m, D) float32.
            ages: (B, S, C + S) int64 buckets of the time from each event to each new position; for a model that sees
                times.

        Returns:
            User embeddings (B, D) at the last new position, and the layer inputs (B, L, S, D) to keep as context.
        """
        feed = {
            "item_embeddings": item_embeddings,
            "new_lengths": new_lengths,
            "context": context,
            "context_lengths": context_lengths,
            "memory": memory,
        }
        if ages is not None:
            feed["ages"] = ages
        user_embedding, hidden = self._encoder.run(("user_embedding", "hidden"), feed)
        return user_embedding, hidden

    def abstract(self, memory: np.ndarray, segment_hidden: np.ndarray) -> np.ndarray:
        """Absorbs a closed segment (eq. 4): (B, L, m, D), (B, L, T, D) -> (B, L, m, D), all float32."""
        return self._abstraction.run(("new_memory",), {"memory": memory, "segment_hidden": segment_hidden})[0]

    def read_at_request(
        self, sources: np.ndarray, memory: np.ndarray, ages: np.ndarray, gaps: np.ndarray
    ) -> np.ndarray:
        """User embeddings (B, D) for requests at known times.

        Args:
            sources: (B, C, D) float32 inputs of the last layer, right-aligned, C the most context.
            memory: (B, m, D) float32, of the last layer.
            ages: (B, C) int64 buckets of the time from each event to the request, NO_EVENT before the first.
            gaps: (B) int64 buckets of the time from the last event to the request.
        """
        assert self._reader is not None
        feed = {"sources": sources, "memory": memory, "ages": ages, "gaps": gaps}
        return self._reader.run(("user_embedding",), feed)[0]


def _not_loaded(file: Path, reason: str) -> EncoderError:
    return EncoderError(f"{file} cannot be loaded ({reason})", "export the bundle again")


def _first_line(error: Exception) -> str:
    """What ONNX Runtime says, without the paths of its sources, and not too much of it."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return "".join(c for c in re.sub(r"\S*/\S*", "...", line) if c.isprintable())[:200]


_FLOAT, _INTEGER = "tensor(float)", "tensor(int64)"
_Tensors = dict[str, tuple[str, tuple[int | str, ...]]]  # name -> type and sizes; a text is a size that varies


def _expected_tensors(shape: StateShape) -> dict[str, tuple[_Tensors, _Tensors]]:
    """Inputs and outputs of each graph, as the format has them."""
    L, D = shape.layers, shape.width
    memory = (_FLOAT, ("B", L, shape.memory_slots, D))
    encoder_inputs: _Tensors = {
        "item_embeddings": (_FLOAT, ("B", "S", D)),
        "new_lengths": (_INTEGER, ("B",)),
        "context": (_FLOAT, ("B", L, "C", D)),
        "context_lengths": (_INTEGER, ("B",)),
        "memory": memory,
    }
    if shape.sees_times:
        encoder_inputs["ages"] = (_INTEGER, ("B", "S", "K"))
    encoder_outputs: _Tensors = {"user_embedding": (_FLOAT, ("B", D)), "hidden": (_FLOAT, ("B", L, "S", D))}
    abstraction_inputs: _Tensors = {"memory": memory, "segment_hidden": (_FLOAT, ("B", L, shape.segment_length, D))}
    expected: dict[str, tuple[_Tensors, _Tensors]] = {
        ENCODER: (encoder_inputs, encoder_outputs),
        ABSTRACTION: (abstraction_inputs, {"new_memory": memory}),
    }
    if shape.times == "request":
        reader_inputs: _Tensors = {
            "sources": (_FLOAT, ("B", shape.context_limit, D)),
            "memory": (_FLOAT, ("B", shape.memory_slots, D)),
            "ages": (_INTEGER, ("B", shape.context_limit)),
            "gaps": (_INTEGER, ("B",)),
        }
        expected[REQUEST] = (reader_inputs, {"user_embedding": (_FLOAT, ("B", D))})
    return expected


def _problem(session: ort.InferenceSession, inputs: _Tensors, outputs: _Tensors) -> str:
    """How a graph differs from what this runtime feeds it and takes from it; "" if it does not."""
    for found, expected, what in (
        (session.get_inputs(), inputs, "inputs"),
        (session.get_outputs(), outputs, "outputs"),
    ):
        if {tensor.name for tensor in found} != set(expected):
            return f"its {what} are not {', '.join(expected)}"
        for tensor in found:
            kind, sizes = expected[tensor.name]
            if tensor.type != kind or not _fits(tensor.shape, sizes):
                return f"{tensor.name} is not {kind} [{', '.join(map(str, sizes))}]"
    return ""


def _fits(found: list[int | str | None], expected: tuple[int | str, ...]) -> bool:
    """Whether every size that the graph fixes is the one expected."""
    return len(found) == len(expected) and all(
        not isinstance(size, int) or size == wanted for size, wanted in zip(found, expected, strict=True)
    )


def _choose(provider: Provider, graph: bytes) -> str:
    if provider == "cpu":
        return CPU
    reason = _cuda_problem(graph)
    if reason is None:
        return CUDA
    if provider == "cuda":
        raise EncoderError(
            f"CUDA cannot be used: {reason}",
            "use auto or cpu, or install dman[gpu] and a driver",
            parameter="provider",
        )
    logger.debug("CUDA is not used: %s", reason)
    return CPU


def _cuda_problem(graph: bytes) -> str | None:
    """Why CUDA cannot be used, or None when a session really starts on it."""
    if CUDA not in ort.get_available_providers():
        return "this build of ONNX Runtime has no CUDA provider"
    if not _has_cuda_device():  # asked first: loading the provider takes seconds and hundreds of megabytes
        return "no CUDA device found"
    try:
        _load_cuda_libraries()
        session = _session(graph, CUDA, threads=1)
    except Exception as error:  # whatever a driver mismatch throws must not stop a CPU server
        return f"ONNX Runtime does not start on CUDA ({_first_line(error)})"
    return None if session.get_providers()[0] == CUDA else "ONNX Runtime does not start on CUDA"


def _load_cuda_libraries() -> None:
    """Those that pip installed. ONNX Runtime prints to stdout what is missing, where only our own output belongs."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ort.preload_dlls()
    for line in printed.getvalue().splitlines():
        logger.debug("ONNX Runtime: %s", line)


def _has_cuda_device() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _session(graph: bytes, provider: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL
    options.add_session_config_entry("session.load_model_format", "ONNX")  # its own format is checked less
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # servers share few cores
    options.enable_cpu_mem_arena = False  # batches vary in size; an arena keeps the largest of each
    # TF32 would round to 10 bits what the golden replay recorded in full precision.
    providers: list[Any] = [(CUDA, {"use_tf32": "0"}), CPU] if provider == CUDA else [CPU]
    session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)  # it would print to stdout
    if provider == CUDA:
        session.enable_fallback()  # in `run`: a device that fails later must not stop the server
    return session
