"""`dman-runtime` where the SDK is installed and its own libraries are not."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if (name + ".").startswith(LIBRARY + "."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from dman_runtime.__main__ import main
sys.exit(main())
"""


def run_without(library: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"LIBRARY = {library!r}\n{BLOCKED}", *arguments],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "arguments"),
    [
        ("numpy", ["--help"]),
        ("numpy", ["serve"]),
        ("lmdb", ["inspect"]),
        ("onnxruntime", ["score"]),
        ("tqdm", ["import"]),
        ("grpc_health", ["serve", "--port", "0"]),
    ],
)
def test_missing_library_is_one_line_that_says_what_to_install(library: str, arguments: list[str]) -> None:
    done = run_without(library, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    remedy = "install dman with its extra `runtime`, in a checkout: pip install '.[runtime]'"
    assert done.stderr == f"error: dman-runtime needs {library}; {remedy}\n"


@pytest.mark.slow
def test_missing_library_of_an_extra_names_the_extra() -> None:
    done = run_without("confluent_kafka", "ingest", "--from", "kafka://host:9092/topic")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the library confluent-kafka is not installed; install dman[kafka] (--from)\n"


@pytest.mark.slow
def test_missing_module_of_our_own_is_no_matter_of_installing() -> None:
    done = run_without("dman_runtime.options")
    assert done.returncode == 1 and "No module named 'dman_runtime.options'" in done.stderr
    assert "pip install" not in done.stderr


@pytest.mark.slow
def test_with_all_libraries_the_command_runs() -> None:
    done = run_without("no_such_library", "--help")
    assert done.returncode == 0 and "serve" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("command", "lower"), [("rebuild", 10), ("activate", 10), ("generations", 0)])
def test_commands_that_encode_beside_servers_give_way_to_them(command: str, lower: int) -> None:
    code = (
        "import os, sys\nfrom unittest import mock\nfrom dman_runtime.__main__ import main\n"
        "before = os.nice(0)\nwith mock.patch('dman_runtime.cli.main', lambda: os.nice(0) - before):\n"
        "    print(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert int(done.stdout) == lower
