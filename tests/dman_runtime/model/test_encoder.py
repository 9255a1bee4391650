"""How ONNX Runtime is asked for CUDA, on machines with and without it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dman_runtime.errors import EncoderError
from dman_runtime.model import sessions
from dman_runtime.model.bundle import open_bundle
from dman_runtime.model.encoder import Encoder
from dman_runtime.model.sessions import CPU


@pytest.fixture
def card_without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver and a card, but no CUDA libraries: ONNX Runtime prints what it misses, then refuses."""

    def preload() -> None:
        print("Failed to load libcublas.so.13: cannot open shared object file")

    session = sessions._session

    def refusing(graph: bytes, provider: str, threads: int) -> object:
        if provider != CPU:
            raise RuntimeError("libcublas.so.13: cannot open shared object file\n/build/provider.cc:1")
        return session(graph, provider, threads)

    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: [sessions.CUDA, CPU])
    monkeypatch.setattr(sessions.ort, "preload_dlls", preload, raising=False)
    monkeypatch.setattr(sessions, "_has_cuda_device", lambda: True)
    monkeypatch.setattr(sessions, "_session", refusing)


@pytest.mark.usefixtures("card_without_libraries")
def test_auto_takes_the_cpu_and_keeps_stdout_clean(
    tiny_bundle: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger=sessions.__name__):
        assert Encoder.of(open_bundle(tiny_bundle), provider="auto").provider == CPU
    assert capfd.readouterr().out == ""
    assert "ONNX Runtime: Failed to load libcublas.so.13" in caplog.text
    assert "CUDA is not used: ONNX Runtime does not start on CUDA (libcublas.so.13: cannot open" in caplog.text


@pytest.mark.usefixtures("card_without_libraries")
def test_cuda_that_does_not_start_is_refused_with_the_reason(tiny_bundle: Path) -> None:
    with pytest.raises(EncoderError, match=r"ONNX Runtime does not start on CUDA \(libcublas") as refused:
        Encoder.of(open_bundle(tiny_bundle), provider="cuda")
    assert refused.value.parameter == "provider"
