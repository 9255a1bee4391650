"""The check of a GPU, with the CPU in its place: what it compares, and what it says where something is missing."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import whole_benchmark

from dman_runtime import cli
from dman_runtime.errors import UsageError
from dman_runtime.model import sessions
from dman_runtime.retrieval.base import Hits
from dman_train import export, train
from tools import gpu_check, gpu_training
from tools.bench.report import Claim, Section
from tools.gpu_training import CPU, Training

QUICK = ["--preset", "tiny", "--users", "40", "--rounds", "1", "--steps", "1"]
HAS_CUDA = torch.cuda.is_available() or sessions._has_cuda_device()


@pytest.fixture
def training(small_log: Path, tmp_path: Path) -> Training:
    return Training(small_log, tmp_path, "tiny", rounds=2, steps=1)


def hits(items: list[int], scores: list[float]) -> Hits:
    return Hits(np.array(items, np.int64), np.array(scores))


def in_this_process(module: str, *arguments: str | Path) -> dict[str, Any]:
    """As `gpu_check._result`, without the seconds that a process takes to load PyTorch."""
    commands = {"dman_train.train": train.main, "dman_train.export": export.main, "dman_runtime": cli.main}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert commands[module]([*map(str, arguments), "--json"]) == 0
    return json.loads(out.getvalue().splitlines()[-1])


# -- training --------------------------------------------------------------------------------------------------------


@whole_benchmark
def test_every_form_trains_and_agrees_with_itself(training: Training) -> None:
    section = gpu_training.every_form(training, CPU)
    assert len(section.claims) == len(section.rows) == len(gpu_training.forms()) > 15
    assert all(claim.met and claim.measured == "off by 0.0e+00" for claim in section.claims)


def test_a_form_that_breaks_is_one_missed_check(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = {name: gpu_training.forms()[name] for name in ("default", "gated")}
    monkeypatch.setattr(gpu_training, "forms", lambda: forms)
    taken = iter([RuntimeError("no kernel\nfor this card"), None, None, None])
    losses = gpu_training.losses

    def broken(trainer: gpu_training.Trainer, steps: int) -> np.ndarray:
        if error := next(taken):
            raise error
        return losses(trainer, steps)

    monkeypatch.setattr(gpu_training, "losses", broken)
    section = gpu_training.every_form(training, CPU)
    assert [claim.met for claim in section.claims] == [False, True]
    assert section.claims[0].measured == "RuntimeError: no kernel"


@pytest.mark.slow
def test_resuming_gives_the_losses_of_the_training_that_went_on(training: Training) -> None:
    claims = gpu_training.resuming(training, CPU).claims
    assert len(claims) == 4 and all(claim.met for claim in claims)


@pytest.mark.slow
def test_speed_has_a_row_for_each_device_and_precision(training: Training) -> None:
    section = gpu_training.speed(training, CPU)
    assert [row[:2] for row in section.rows] == [
        [device, precision] for precision in ("float32", "bfloat16") for device in ("CUDA", "CPU")
    ]
    assert all(len(values) == 2 and min(values) > 0 for values in section.data.values())


def test_losses_that_differ_or_are_no_numbers_are_missed() -> None:
    expected = np.array([2.0, 1.0])
    assert gpu_training._close("x", np.array([2.0, 1.00001]), expected, 1e-4).met
    assert gpu_training._close("x", np.array([2.0, 1.001]), expected, 1e-4).met is False
    assert gpu_training._close("x", np.array([2.0, np.nan]), expected, 1e-4).met is False


# -- serving ---------------------------------------------------------------------------------------------------------


def test_compare_looks_at_scores_by_rank_and_counts_users() -> None:
    expected = [hits([1, 2], [4.0, 3.0]), hits([5, 6], [2.0, 1.0]), hits([], [])]
    same = gpu_check.compare(expected, expected, "same", 1e-3)
    assert same[0].met and same[0].measured == "0.0e+00" and same[1].measured == "3; 3 of 3"
    swapped = gpu_check.compare([expected[0], hits([6, 5], [2.02, 1.0]), expected[2]], expected, "swapped", 1e-2)
    assert swapped[0].met and swapped[0].measured == "5.0e-03" and swapped[1].measured == "3; 2 of 3"
    other = gpu_check.compare([hits([1, 3], [4.0, 2.0]), *expected[1:]], expected, "other", 1e-2)
    assert other[0].met is False and other[1].measured == "2; 2 of 3"


def test_compare_misses_users_with_fewer_items_and_scores_that_are_no_numbers() -> None:
    expected = [hits([1, 2], [4.0, 3.0])]
    assert gpu_check.compare([hits([1], [4.0])], expected, "fewer", 1e-2)[0].met is False
    nan = [*expected, hits([1, 2], [4.0, np.nan]), *expected]
    assert gpu_check.compare(nan, 3 * expected, "nan", 1e-2)[0].met is False


@pytest.mark.slow
def test_commands_that_fail_are_quoted(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dman_train\.export: error: .*nowhere"):
        gpu_check._result("dman_train.export", "--run", tmp_path / "nowhere")


# -- the whole -------------------------------------------------------------------------------------------------------


@whole_benchmark
@pytest.mark.slow
@pytest.mark.skipif(HAS_CUDA, reason="there is a CUDA device")
def test_without_cuda_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMAN_LAYERS", "1")  # the export of a second layer takes as long as all checks
    monkeypatch.setattr(gpu_check, "_result", in_this_process)
    out = tmp_path / "cuda.md"
    assert gpu_check.main([*QUICK, "--scratch", str(tmp_path), "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "there is no CUDA here" in said and "finds no CUDA device | works | NO |" in said
    assert "| Golden replay | CUDA cannot be used: " in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("met", [True, False])
def test_report_says_whether_every_check_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], met: bool
) -> None:
    claim = Claim("provider auto runs on", gpu_check.CUDA, gpu_check.CUDA, met)
    monkeypatch.setattr(gpu_check, "all_sections", lambda *_: [Section("Golden replay", "How.", [claim])])
    out = tmp_path / "cuda.md"
    options = ["--scratch", str(tmp_path), "--out", str(out), "--note", "borrowed", "--json"]
    assert gpu_check.main([*QUICK, *options]) == (0 if met else 1)
    text = out.read_text()
    assert ("Every check passed." if met else "1 of 1 checks failed.") in text and "| note | borrowed |" in text
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["claims"][0]["met"] is met


def test_what_cannot_be_made_is_a_section_that_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    def measure() -> Section:
        raise ModuleNotFoundError("No module named 'lmdb'")

    section = gpu_check.attempted("Server", measure)
    assert section.method == "Not checked: ModuleNotFoundError: No module named 'lmdb'."
    assert section.claims[0].met is False
