"""The package as a whole: its names and its imports."""

import subprocess
import sys
from pathlib import Path

import pytest

import sdk


def test_the_public_names_are_sorted_and_complete() -> None:
    assert sdk.__all__ == sorted(sdk.__all__)
    public = {name for name in vars(sdk) if not name.startswith("_")}
    assert public == {name for name in sdk.__all__ if not name.startswith("_")}


@pytest.mark.slow
def test_importing_the_sdk_needs_grpc_and_protobuf_only() -> None:
    script = (
        "import sys, threading, sdk\n"
        "heavy = {'numpy', 'torch', 'onnxruntime', 'lmdb', 'dman_runtime', 'dman_train', 'tools'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert threading.active_count() == 1\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
