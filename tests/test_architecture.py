"""What keeps the parts apart: imports, what a process loads, sizes, generated code."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

OURS = ("protos", "sdk", "dman_runtime", "dman_train", "tools", "tests")


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no modules"
    return found


@cache
def import_groups(file: Path) -> list[list[str]]:
    """Full dotted names that a file imports anywhere, also inside functions and under TYPE_CHECKING.

    One group for each name it binds: of `from a import b`, "a" and "a.b", as b may be a module or not.
    """
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [[alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: from the package of the file
                package = file.relative_to(ROOT).parent.parts
                base = ".".join(package[: len(package) - node.level + 1] + tuple(filter(None, [node.module])))
            found += [[base, f"{base}.{alias.name}"] for alias in node.names]
    return found


@cache
def imports(file: Path) -> set[str]:
    return {name for group in import_groups(file) for name in group}


def imports_of(package: str) -> dict[Path, set[str]]:
    return {file: imports(file) for file in modules(package)}


def dotted(file: Path) -> str:
    """The name by which a module is imported."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def importers(package: str, library: str) -> set[str]:
    """Modules of a package, named from the package on, that import a library or something in it."""
    return {
        dotted(file).removeprefix(f"{package}.")
        for file, names in imports_of(package).items()
        if any(within(name, library) for name in names)
    }


def import_graph(*packages: str) -> dict[str, set[str]]:
    """Which modules of these packages each of them imports. `from package import module` counts for the module only."""
    files = {dotted(file): file for package in packages for file in modules(package)}
    graph = {}
    for name, file in files.items():
        longest = [max((one for one in group if one in files), key=len, default=name) for group in import_groups(file)]
        graph[name] = set(longest) - {name}
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """What `start` imports, directly or through others."""
    found, todo = set[str](), [start]
    while todo:
        for name in graph[todo.pop()] - found:
            found.add(name)
            todo.append(name)
    return found


# -- layers ----------------------------------------------------------------------------------------------------------

ALLOWED = {
    "protos": {"protos"},
    "sdk": {"sdk", "protos"},
    "dman_runtime": {"dman_runtime", "protos", "sdk"},  # sdk: for commands that ask a server
    "dman_train": {"dman_train", "dman_runtime"},
}


@pytest.mark.parametrize("package", ALLOWED)
def test_package_depends_only_on_those_below_it(package: str) -> None:
    used = {name.partition(".")[0] for names in imports_of(package).values() for name in names} & set(OURS)
    assert used <= ALLOWED[package]


# Each part of dman_runtime, and the parts that it may import.
LAYERS = {
    "errors": set(),
    "log_lines": set(),
    "metrics": set(),
    "data": {"errors"},
    "access": {"data", "errors"},
    "item_filters": {"data", "errors", "model"},
    "diversity": {"errors", "item_filters", "model", "retrieval"},
    "assortment": {"item_filters", "model", "retrieval"},
    "requests": {"data", "diversity", "errors", "item_filters", "model", "store"},
    "retrieval": set(),
    "model": {"data", "errors", "retrieval"},
    "store": {"data", "errors"},
    "history": {"errors", "requests", "store"},
    "projection": {"assortment", "errors", "model", "store"},
    "repeats": {"requests"},
    "opened": {"model", "projection", "repeats", "requests", "retrieval", "store"},
    "queries": {"diversity", "errors", "model", "opened", "projection", "requests", "retrieval", "store"},
    "merging": {"model", "store"},
    "late": {"merging", "model", "opened", "store"},
    "id_types": {"data", "errors", "model", "store"},
    "ranking": {"diversity", "model", "opened", "requests", "retrieval"},
    "presence": set(),
    "routing": {"errors", "projection", "store"},
    "engine": {
        "errors",
        "late",
        "merging",
        "model",
        "opened",
        "projection",
        "queries",
        "ranking",
        "repeats",
        "requests",
        "routing",
        "store",
    },
    "waiting": {"errors", "opened", "requests"},
    "batcher": {"engine", "errors", "metrics", "model", "opened", "requests", "waiting"},
    "problems": set(),
    "api": {
        "access",
        "batcher",
        "diversity",
        "engine",
        "errors",
        "history",
        "item_filters",
        "log_lines",
        "metrics",
        "problems",
        "requests",
        "waiting",
    },
    "options": {"errors", "log_lines"},
    "ingest": {"data", "errors", "log_lines", "requests"},
    "jobs": {
        "data",
        "engine",
        "errors",
        "id_types",
        "ingest",
        "log_lines",
        "merging",
        "metrics",
        "model",
        "opened",
        "presence",
        "projection",
        "requests",
        "retrieval",
        "store",
    },
    "serving": {
        "access",
        "api",
        "batcher",
        "engine",
        "errors",
        "id_types",
        "late",
        "log_lines",
        "metrics",
        "model",
        "options",
        "presence",
        "problems",
        "projection",
        "retrieval",
        "routing",
        "store",
    },
    "commands": {
        "access",
        "data",
        "engine",
        "errors",
        "id_types",
        "ingest",
        "jobs",
        "metrics",
        "model",
        "options",
        "presence",
        "requests",
        "serving",
        "store",
    },
    "cli": {"commands", "data", "ingest", "options", "store"},
    "attended": {"cli", "errors", "options"},
    "__main__": {"cli"},
}


def test_every_part_of_the_runtime_has_its_layer() -> None:
    parts = {dotted(file).split(".")[1] for file in modules("dman_runtime") if dotted(file) != "dman_runtime"}
    assert parts == set(LAYERS)


@pytest.mark.parametrize("part", LAYERS)
def test_part_of_the_runtime_imports_only_the_layers_below_it(part: str) -> None:
    used = set()
    for file, names in imports_of("dman_runtime").items():
        if within(dotted(file), f"dman_runtime.{part}"):
            used |= {name.split(".")[1] for name in names if name.startswith("dman_runtime.")}
    assert used - {part} <= LAYERS[part]


def test_what_answers_requests_knows_the_interface_of_stores_and_no_store() -> None:
    """`serving` and commands choose one."""
    found = {
        dotted(file): name
        for file, names in imports_of("dman_runtime").items()
        if dotted(file).split(".")[-1] in ("engine", "history", "opened", "batcher", "recommender", "importing")
        for name in names
        if within(name, "dman_runtime.store") and not within(name, "dman_runtime.store", "dman_runtime.store.base")
    }
    assert found == {}
    assert importers("dman_runtime", "dman_runtime.store.lmdb") == {
        "commands.stores", "jobs.backup", "jobs.compacting", "jobs.verifying", "store.lmdb_compact",
        "store.lmdb_verify", "store.opening",
    }  # fmt: skip
    assert importers("dman_runtime", "dman_runtime.store.redis") == {"store.opening"}
    assert importers("dman_runtime", "dman_runtime.store.memory") == set()  # for tests


def test_nothing_but_commands_imports_the_server() -> None:
    outside = {name for name in importers("dman_runtime", "dman_runtime.serving") if not within(name, "serving")}
    assert outside == {"commands.ingesting", "commands.servers"}


TRAINING_MAY_IMPORT = ("data", "errors", "jobs.evaluating", "model", "options", "retrieval")


def test_training_imports_only_what_it_shares_with_the_runtime() -> None:
    graph = import_graph("dman_runtime", "dman_train")
    allowed = [f"dman_runtime.{name}" for name in TRAINING_MAY_IMPORT]
    found = {
        f"{module} imports {name}"
        for module, names in graph.items()
        for name in names
        if within(module, "dman_train") and within(name, "dman_runtime") and not within(name, *allowed)
    }
    assert found == set()


def test_training_reaches_no_part_of_the_server_not_even_through_others() -> None:
    graph = import_graph("dman_runtime", "dman_train", "protos")
    reached = set().union(*(reachable(graph, name) for name in graph if within(name, "dman_train")))
    serving = [f"dman_runtime.{name}" for name in ("engine", "batcher", "api", "serving", "store", "cli", "commands")]
    assert {name for name in reached if within(name, *serving, "protos")} == set()


@pytest.mark.parametrize(
    ("library", "only"),
    [
        ("onnxruntime", {"model.sessions"}),
        ("fcntl", {"presence", "store.files"}),
        ("protos.dman.v1.dman_pb2", {"api.conditions", "api.operations", "api.recommender", "ingest.events"}),
        ("protos.dman.v1.admin_pb2", {"api.admin"}),
        ("protos.dman.v1.dman_pb2_grpc", set()),
        ("protos.dman.v1.admin_pb2_grpc", set()),
        ("google", {"api.admin", "api.door", "api.standard", "ingest.events"}),
        (
            "grpc",
            {"access.tls", "api.admission", "api.door", "api.standard", "jobs.asking", "serving.admin", "serving.app"},
        ),
        ("ssl", {"access.certificates"}),
        ("grpc_health", {"api.standard"}),
        ("grpc_reflection", {"api.standard"}),
        ("multiprocessing", {"jobs.processes", "serving.cluster", "serving.slot"}),
        ("prometheus_client", {"serving.ingest_metrics", "serving.metrics_server", "serving.prometheus"}),
        ("confluent_kafka", {"ingest.broker", "ingest.kafka"}),
        ("tqdm", {"jobs.evaluating", "jobs.exporting", "jobs.importing", "jobs.rebuilding", "jobs.scoring"}),
        ("redis", {"store.redis_errors", "store.redis_servers"}),
        ("torch", set()),
        ("sdk", {"commands.remote", "jobs.asking"}),
        ("matplotlib", set()),
    ],
)
def test_library_is_imported_by_its_own_module_only(library: str, only: set[str]) -> None:
    assert importers("dman_runtime", library) == only


def test_lmdb_is_imported_by_the_store_only() -> None:
    assert {name.partition(".")[0] for name in importers("dman_runtime", "lmdb")} == {"store"}


def test_log_files_are_read_by_the_data_part_and_tables_written_by_their_jobs() -> None:
    writers = {"jobs.exporting", "jobs.parquet_output", "jobs.scoring"}
    assert {name.split(".")[0] for name in importers("dman_runtime", "pyarrow") - writers} == {"data"}


@pytest.mark.parametrize("module", ["engine", "opened", "requests", "batcher"])
def test_what_answers_requests_knows_neither_grpc_nor_files(module: str) -> None:
    names = imports(ROOT / "dman_runtime" / f"{module}.py")
    assert not {name.partition(".")[0] for name in names} & {"grpc", "protos", "pathlib", "os", "onnxruntime", "lmdb"}


def test_no_module_imports_itself_through_others() -> None:
    """No import cycle within or between packages of ours, deferred imports and those of types included."""
    graph = import_graph(*ALLOWED)
    assert sorted(name for name in graph if name in reachable(graph, name)) == []


def test_an_import_cycle_would_be_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert sorted(name for name in graph if name in reachable(graph, name)) == ["b", "c"]


@pytest.mark.slow
def test_serving_process_loads_no_heavy_library_that_it_does_not_need(tiny_bundle: Path, tmp_path: Path) -> None:
    script = """
import json, sys
from pathlib import Path
from dman_runtime import cli
from dman_runtime.serving.app import App
from dman_runtime.serving.config import ServeConfig
config = ServeConfig(bundle=Path(sys.argv[1]), state=Path(sys.argv[2]), host="127.0.0.1", port=0, provider="cpu",
                     workers=1, encoder_threads=1, max_concurrent=8, map_size_mib=64, grace=1.0)
import asyncio, grpc
async def call():
    from protos.dman.v1 import dman_pb2 as pb
    from protos.dman.v1.dman_pb2_grpc import RecommenderStub
    async with App(config) as app, grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        stub = RecommenderStub(channel)
        await stub.Update(pb.UpdateRequest(user_id="u", events=[pb.Event(item_id="1")]), timeout=30)
        await stub.Recommend(pb.RecommendRequest(user_id="u"), timeout=30)
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
asyncio.run(call())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_bundle), str(tmp_path / "state")],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert {"grpc", "onnxruntime", "lmdb", "numpy"} <= loaded
    assert not loaded & {
        "torch",
        "pyarrow",
        "matplotlib",
        "onnx",
        "pandas",
        "tqdm",
        "tensorboard",
        "faiss",
        "dman_train",
        "sdk",
    }


def test_faiss_is_imported_by_the_index_only() -> None:
    assert importers("dman_runtime", "faiss") == {"retrieval.index"} and not importers("dman_train", "faiss")


@pytest.mark.slow
def test_supervisor_and_help_load_no_serving_library() -> None:
    modules = "{'grpc', 'onnxruntime', 'prometheus_client', 'torch'}"
    script = (
        f"import sys, dman_runtime.cli, dman_runtime.serving.supervisor; print(sorted(set(sys.modules) & {modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


# -- sizes -----------------------------------------------------------------------------------------------------------

LINES_OF_A_MODULE, LINES_OF_A_FUNCTION = 350, 50
BOUNDED = ("dman_runtime", "dman_train", "sdk")


@pytest.mark.parametrize("package", BOUNDED)
def test_no_module_is_too_long(package: str) -> None:
    lines = {dotted(file): len(file.read_text(encoding="utf-8").splitlines()) for file in modules(package)}
    assert {name: count for name, count in lines.items() if count > LINES_OF_A_MODULE} == {}


@pytest.mark.parametrize("package", BOUNDED)
def test_no_function_is_too_long(package: str) -> None:
    found = {}
    for file in modules(package):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LINES_OF_A_FUNCTION:
                    found[f"{dotted(file)}.{node.name}"] = lines
    assert found == {}


# -- generated code --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_committed_stubs_are_what_the_proto_generates(tmp_path: Path) -> None:
    bin_directory = Path(sys.executable).parent
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    plugins = [f"--plugin=protoc-gen-{name}={bin_directory / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I.",
        *outputs,
        *plugins,
        "protos/dman/v1/dman.proto",
        "protos/dman/v1/admin.proto",
    ]
    subprocess.run(command, check=True, cwd=ROOT, timeout=60, capture_output=True)
    generated = sorted((tmp_path / "protos" / "dman" / "v1").iterdir())
    kinds = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
    assert [file.name for file in generated] == sorted(name + kind for name in ("admin", "dman") for kind in kinds)
    for file in generated:
        assert file.read_text() == (ROOT / "protos" / "dman" / "v1" / file.name).read_text(), "run `make proto`"
