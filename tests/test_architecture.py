"""What keeps the parts apart: imports, what a process loads, generated code."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OURS = ("protos", "sdk", "dman_runtime", "dman_train", "tools", "tests")
SERVING = ("batcher", "cli", "engine", "serving", "api", "store")  # of dman_runtime; training needs none of them


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no modules"
    return found


def imports(file: Path) -> set[str]:
    """Full dotted names that a file imports anywhere, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # relative: from the package of the file
                package = file.relative_to(ROOT).parent.parts
                base = ".".join(package[: len(package) - node.level + 1] + tuple(filter(None, [node.module])))
            else:
                base = node.module or ""
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def imports_of(package: str) -> dict[Path, set[str]]:
    return {file: imports(file) for file in modules(package)}


def importers(package: str, library: str) -> set[str]:
    """Modules of a package that import a library or something in it."""
    return {
        file.stem
        for file, names in imports_of(package).items()
        if any(name == library or name.startswith(f"{library}.") for name in names)
    }


# -- layers ----------------------------------------------------------------------------------------------------------

ALLOWED = {
    "protos": {"protos"},
    "sdk": {"sdk", "protos"},
    "dman_runtime": {"dman_runtime", "protos"},
    "dman_train": {"dman_train", "dman_runtime"},
}


@pytest.mark.parametrize("package", ALLOWED)
def test_package_depends_only_on_those_below_it(package: str) -> None:
    used = {name.partition(".")[0] for names in imports_of(package).values() for name in names} & set(OURS)
    assert used <= ALLOWED[package]


def test_training_uses_no_part_of_the_server() -> None:
    forbidden = {f"dman_runtime.{module}" for module in SERVING}
    for file, names in imports_of("dman_train").items():
        assert not {".".join(name.split(".")[:2]) for name in names} & forbidden, file.name


@pytest.mark.parametrize(
    ("library", "only"),
    [
        ("onnxruntime", {"encoder"}),
        ("lmdb", {"lmdb"}),
        ("protos.dman.v1.dman_pb2", {"recommender"}),
        ("grpc", {"server", "recommender"}),
        ("torch", set()),
        ("sdk", set()),
        ("matplotlib", set()),
    ],
)
def test_library_is_imported_by_its_own_module_only(library: str, only: set[str]) -> None:
    assert importers("dman_runtime", library) == only


def test_engine_knows_neither_grpc_nor_files() -> None:
    names = imports(ROOT / "dman_runtime" / "engine.py")
    assert not {name.partition(".")[0] for name in names} & {"grpc", "protos", "pathlib", "os", "onnxruntime", "lmdb"}


def test_no_module_imports_itself_through_others() -> None:
    """No import cycle within a package of ours, deferred imports and those of types included."""
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for p in ALLOWED for f in modules(p)}
    graph = {name: {n for n in imports(file) if n in files and n != name} for name, file in files.items()}
    assert [sorted(circle) for circle in circles(graph)] == []


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules of which each can reach each other."""

    def reached(start: str) -> set[str]:
        found, todo = set[str](), [start]
        while todo:
            for name in graph[todo.pop()] - found:
                found.add(name)
                todo.append(name)
        return found

    reach = {name: reached(name) for name in graph}
    return [{other for other in reach[name] if name in reach[other]} for name in graph if name in reach[name]]


def test_serving_process_loads_no_heavy_library_that_it_does_not_need(tiny_bundle: Path, tmp_path: Path) -> None:
    script = """
import json, sys
from pathlib import Path
from dman_runtime import cli
from dman_runtime.serving.server import ServeConfig, Server
config = ServeConfig(bundle=Path(sys.argv[1]), state=Path(sys.argv[2]), host="127.0.0.1", port=0, provider="cpu",
                     workers=1, threads=2, encoder_threads=1, max_concurrent=8, map_size_mib=64, grace=1.0)
with Server(config) as server:
    import grpc
    from protos.dman.v1 import dman_pb2 as pb
    from protos.dman.v1.dman_pb2_grpc import RecommenderStub
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = RecommenderStub(channel)
        stub.Update(pb.UpdateRequest(user_id="u", events=[pb.Event(item_id="1")]), timeout=30)
        stub.Recommend(pb.RecommendRequest(user_id="u"), timeout=30)
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_bundle), str(tmp_path / "state")],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert {"grpc", "onnxruntime", "lmdb", "numpy"} <= loaded
    assert not loaded & {"torch", "pyarrow", "matplotlib", "onnx", "pandas", "tqdm", "tensorboard", "dman_train", "sdk"}


def test_supervisor_and_help_load_no_serving_library() -> None:
    script = "import sys, dman_runtime.cli; print(sorted(set(sys.modules) & {'grpc', 'onnxruntime', 'torch'}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


# -- generated code --------------------------------------------------------------------------------------------------


def test_committed_stubs_are_what_the_proto_generates(tmp_path: Path) -> None:
    bin_directory = Path(sys.executable).parent
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    plugins = [f"--plugin=protoc-gen-{name}={bin_directory / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *plugins, "protos/dman/v1/dman.proto"]
    subprocess.run(command, check=True, cwd=ROOT, timeout=60, capture_output=True)
    generated = sorted((tmp_path / "protos" / "dman" / "v1").iterdir())
    assert [file.name for file in generated] == sorted(
        ["dman_pb2.py", "dman_pb2.pyi", "dman_pb2_grpc.py", "dman_pb2_grpc.pyi"]
    )
    for file in generated:
        assert file.read_text() == (ROOT / "protos" / "dman" / "v1" / file.name).read_text(), "run `make proto`"
