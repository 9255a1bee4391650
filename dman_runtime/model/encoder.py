"""The two graphs of a bundle, run by ONNX Runtime; the only module that imports it."""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dman_runtime.errors import EncoderError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported; since 1.29 it reports home

import onnxruntime as ort

from dman_runtime.model.bundle import ABSTRACTION, ENCODER

logger = logging.getLogger(__name__)
Provider = Literal["auto", "cuda", "cpu"]
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
FATAL = 4  # ONNX Runtime's log severity; a provider that fails to start is reported by us


class Encoder:
    """Runs the segment encoder and the memory abstraction. Thread-safe on CPU; use one thread on CUDA."""

    def __init__(self, path: Path, *, provider: Provider = "auto", threads: int = 1) -> None:
        """Loads the graphs of the bundle at `path`.

        Args:
            provider: "auto" takes CUDA when a device is there and ONNX Runtime really initialises on it.
            threads: CPU threads inside one run.

        Raises:
            EncoderError: provider "cuda" does not work here, or a graph cannot be loaded.
        """
        self.provider = _choose(provider, path / ABSTRACTION)
        self._encoder = _session(path / ENCODER, self.provider, threads)
        self._abstraction = _session(path / ABSTRACTION, self.provider, threads)
        logger.info("ONNX Runtime %s runs on %s", ort.__version__, self.provider)

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
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes new positions (eq. 1-3).

        Args:
            item_embeddings: (B, S, D) float32, left-aligned; new_lengths: (B) int64, 1..S.
            context: (B, L, C, D) float32, right-aligned; context_lengths: (B) int64, 0..C.
            memory: (B, L, m, D) float32.

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
        user_embedding, hidden = self._encoder.run(("user_embedding", "hidden"), feed)
        return user_embedding, hidden

    def abstract(self, memory: np.ndarray, segment_hidden: np.ndarray) -> np.ndarray:
        """Absorbs a closed segment (eq. 4): (B, L, m, D), (B, L, T, D) -> (B, L, m, D), all float32."""
        return self._abstraction.run(("new_memory",), {"memory": memory, "segment_hidden": segment_hidden})[0]


def _choose(provider: Provider, graph: Path) -> str:
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


def _cuda_problem(graph: Path) -> str | None:
    """Why CUDA cannot be used, or None when a session really starts on it."""
    if CUDA not in ort.get_available_providers():
        return "this build of ONNX Runtime has no CUDA provider"
    if not _has_cuda_device():  # asked first: loading the provider takes seconds and hundreds of megabytes
        return "no CUDA device found"
    try:
        ort.preload_dlls()
        session = _session(graph, CUDA, threads=1)
    except Exception as error:  # whatever a driver mismatch throws must not stop a CPU server
        return f"ONNX Runtime does not start on CUDA ({str(error).splitlines()[0]})"
    return None if session.get_providers()[0] == CUDA else "ONNX Runtime does not start on CUDA"


def _has_cuda_device() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _session(graph: Path, provider: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # servers share few cores
    options.enable_cpu_mem_arena = False  # batches vary in size; an arena keeps the largest of each
    # TF32 would round to 10 bits what the golden replay recorded in full precision.
    providers: list[Any] = [(CUDA, {"use_tf32": "0"}), CPU] if provider == CUDA else [CPU]
    try:
        return ort.InferenceSession(str(graph), options, providers=providers)
    except Exception as error:  # onnxruntime raises pybind classes of its own
        raise EncoderError(
            f"{graph} cannot be loaded ({str(error).splitlines()[0]})", "export the bundle again"
        ) from None
