"""ONNX Runtime: checked graphs on a device, and tensors that stay there. The only module that imports it."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dman_runtime.errors import EncoderError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported; since 1.29 it reports home

import onnxruntime as ort

from dman_runtime.model.graph_file import check_graph

logger = logging.getLogger(__name__)
Provider = Literal["auto", "cuda", "cpu"]
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
VERSION = ort.__version__
FATAL = 4  # ONNX Runtime's log severity; a provider that fails to start is reported by us
FLOAT, INTEGER = "tensor(float)", "tensor(int64)"
Tensors = dict[str, tuple[str, tuple[int | str, ...]]]  # name -> type and sizes; a text is a size that varies


class Graph:
    """One ONNX file, loaded on a device. Thread-safe on CPU; use one thread on CUDA."""

    def __init__(
        self, content: bytes, file: Path, *, inputs: Tensors, outputs: Tensors, provider: str, threads: int
    ) -> None:
        """Args:
            file: Where it is from, for messages.
            inputs, outputs: What it must take and give.
            provider: What `chosen` gave.
            threads: CPU threads inside one run.

        Raises EncoderError where it cannot be loaded, or is of another model.
        """
        self._outputs = tuple(outputs)
        self._device = "cuda" if provider == CUDA else "cpu"
        try:
            self._session = _session(content, provider, threads)
        except Exception as error:  # ONNX Runtime raises pybind classes of its own
            raise _not_loaded(file, _first_line(error)) from None
        if problem := _problem(self._session, inputs, outputs):
            raise _not_loaded(file, problem)

    def run(self, feed: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        """All outputs for arrays by the names of inputs."""
        found: Sequence[np.ndarray] = self._session.run(self._outputs, feed)
        return found

    def resident(self, array: np.ndarray) -> ort.OrtValue:
        """A copy of an array on the device of the graph, for many runs. Raises EncoderError where it has no room."""
        try:
            return ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)
        except Exception as error:  # as above
            raise EncoderError(f"{array.nbytes >> 20} MiB do not fit on the device ({_first_line(error)})") from None

    def run_beside(self, resident: Mapping[str, ort.OrtValue], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs, for some inputs that are on the device already and others that are not."""
        binding = self._session.io_binding()
        for name, value in resident.items():
            binding.bind_ortvalue_input(name, value)
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        found: list[np.ndarray] = binding.copy_outputs_to_cpu()
        return found


def chosen(provider: Provider, graph: bytes) -> str:
    """The provider of ONNX Runtime that graphs run on. Asked with one of them, which is loaded to find out.

    "auto" takes CUDA when a device is there and ONNX Runtime really initialises on it.

    Raises EncoderError for "cuda" where that does not work.
    """
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
    check_graph(graph)
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


def _not_loaded(file: Path, reason: str) -> EncoderError:
    return EncoderError(f"{file} cannot be loaded ({reason})", "export the bundle again")


def _first_line(error: Exception) -> str:
    """What ONNX Runtime says, without the paths of its sources, and not too much of it."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return "".join(c for c in re.sub(r"\S*/\S*", "...", line) if c.isprintable())[:200]


def _problem(session: ort.InferenceSession, inputs: Tensors, outputs: Tensors) -> str:
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
