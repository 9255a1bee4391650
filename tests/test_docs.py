"""The documents are complete and true: all names are in them, links and commands exist, generated pages are fresh."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import sdk
from dman_runtime import cli
from dman_runtime.metrics import IngestCounts
from dman_runtime.model.bundle import (
    FILES,
    FORMAT_VERSION,
    ITEMS,
    MANIFEST,
    STATE_DTYPES,
    Manifest,
    StateShape,
    open_bundle,
    read_manifest,
)
from dman_runtime.options import Parser
from dman_runtime.serving.ingest_metrics import ingest_registry
from dman_runtime.serving.prometheus import PrometheusMetrics
from dman_train import evaluate, export, train
from dman_train.config import BaselineConfig, DataConfig, ModelConfig, TrainConfig
from dman_train.presets import BASELINE_PRESETS
from protos.dman.v1 import admin_pb2
from protos.dman.v1 import dman_pb2 as pb
from tools import options_page

OURS = ("sdk", "dman_runtime", "dman_train", "tools")
GUIDE = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))  # what a user reads
DOCUMENTS = (*GUIDE, *(ROOT / name for name in ("ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md")))
OPTIONS = ROOT / "docs" / "options.md"
INTERNAL = {  # started by tools.bench, by its peers and by servers, not by people
    "tools.bench.servers",
    "tools.bench.traced",
    "tools.bench.peers.host",
    "tools.bench.peers.searching",
    "dman_runtime.attended",
}
NAMES = [str(document.relative_to(ROOT)) for document in DOCUMENTS]


def read(document: str | Path) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


# -- complete --------------------------------------------------------------------------------------------------------


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def options(make: Callable[[], Parser]) -> set[str]:
    actions = [action for parser in parsers(make()) for action in parser._actions]
    return {name for action in actions for name in action.option_strings[:1] if name not in ("-h", "--help")}


def field_names(*configs: type) -> set[str]:
    return {field.name for config in configs for field in dataclasses.fields(config)}


def client_methods() -> set[str]:
    members = [member for kind in (sdk.Client, sdk.AdminClient) for member in vars(kind).items()]
    return {name for name, value in members if callable(value) and not name.startswith("_")}


def result_fields() -> set[str]:
    return field_names(*(value for value in vars(sdk).values() if dataclasses.is_dataclass(value)))


def metric_names() -> set[str]:
    """As a scraper sees them, histograms without `_bucket`."""
    found = [*PrometheusMetrics().registry.collect(), *ingest_registry(IngestCounts()).collect()]
    return {f"{one.name}_total" if one.type == "counter" else one.name for one in found}


def problem_names() -> set[str]:
    """What a status can name: all first arguments of `Problems.set`, and the names that a slot gives."""
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "dman_runtime").rglob("*.py"))
    return {*re.findall(r'problems\.set\(\s*"(\w+)"', sources), *re.findall(r'"(worker_(?:down|hung))"', sources)}


DOCUMENTED: dict[str, Callable[[], set[str]]] = {
    "commands of dman-runtime": lambda: {
        f"dman-runtime {name}"
        for action in cli.parser()._actions
        if isinstance(action, argparse._SubParsersAction)
        for name in action.choices
    },
    "options of dman-runtime": lambda: options(cli.parser),
    "options of dman_train.train": lambda: options(train.parser),
    "options of dman_train.export": lambda: options(export.parser),
    "options of dman_train.evaluate": lambda: options(evaluate.parser),
    "options of dman_train.baselines": lambda: options(lambda: train.parser(BASELINE_PRESETS)),
    "baseline fields": lambda: field_names(BaselineConfig),
    "model fields": lambda: field_names(ModelConfig),
    "training fields": lambda: field_names(TrainConfig),
    "data fields": lambda: field_names(DataConfig),
    "RPCs": lambda: {
        method.name
        for file in (pb, admin_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    },
    "names of the SDK": lambda: {name for name in sdk.__all__ if not name.startswith("__")},
    "methods of Client and AdminClient": client_methods,
    "fields of the results of the SDK": result_fields,
}


def mentioned(name: str, text: str) -> bool:
    """Whether the text has the name as a whole word; a field may be written as its option, and the reverse."""
    spellings = {name, f"--{name.replace('_', '-')}", name.removeprefix("--").replace("-", "_")}
    return any(re.search(rf"(?<![\w-]){re.escape(spelling)}(?![\w-])", text) for spelling in spellings)


@pytest.mark.slow
@pytest.mark.parametrize("what", DOCUMENTED)
def test_documents_mention_all(what: str) -> None:
    text = "\n".join(read(document) for document in GUIDE)
    names = DOCUMENTED[what]()
    assert len(names) > 3
    missing = sorted(name for name in names if not mentioned(name, text))
    assert missing == [], f"README.md and docs/ say nothing about these {what}"


def commands() -> set[str]:
    """Every module that can be run, as one types it."""
    files = [file for package in OURS for file in (ROOT / package).rglob("*.py")]
    runnable = [file for file in files if '\nif __name__ == "__main__":' in file.read_text(encoding="utf-8")]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for file in runnable}
    modules -= {*INTERNAL, "dman_runtime", "dman_runtime.cli"}
    return {"dman-runtime", *(f"python -m {module}" for module in modules)}


def test_documents_mention_every_command_that_can_be_run() -> None:
    text = "\n".join(read(document) for document in GUIDE)
    assert {"python -m dman_train.baselines", "python -m tools.bench", "python -m tools.demo"} <= commands()
    assert {"python -m tools.soak", "dman-runtime"} <= commands()
    assert sorted(command for command in commands() if not re.search(rf"{re.escape(command)}(?![\w.])", text)) == []


# -- true ------------------------------------------------------------------------------------------------------------


def test_options_page_is_what_the_code_gives() -> None:
    assert "\n\n".join(options_page.page()) + "\n" == read(OPTIONS), "run `make docs`"


def test_options_page_lists_words_that_need_no_option() -> None:
    page = read(OPTIONS)
    words = {
        (parser.prog, action.dest.upper())
        for parser in options_page.parsers()
        for action in parser._actions
        if not action.option_strings and not isinstance(action, argparse._SubParsersAction)
    }
    assert ("dman-runtime token", "NAME") in words
    sections = {section.partition("\n")[0]: section for section in page.split("\n## ")}
    assert sorted((prog, word) for prog, word in words if f"\n| `{word}` |" not in sections[prog]) == []


def test_operations_page_names_every_problem_and_metric() -> None:
    text, problems, metrics = read("docs/operations.md"), problem_names(), metric_names()
    assert {"disk_full", "commits_blocked", "worker_hung"} <= problems
    assert len(metrics) > 15
    assert sorted(name for name in problems | metrics if f"`{name}`" not in text) == []


def test_options_page_ignores_variables_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = options_page.page()
    monkeypatch.setenv("DMAN_PORT", "1234")
    monkeypatch.setenv("DMAN_EPOCHS", "77")
    assert options_page.page() == before


def test_variables_of_the_options_page_set_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """All variables of whole numbers at once, each of which may stand for options of several commands."""
    rows = re.findall(r"^\| `(--[\w-]+)` \| `\d+` \|  \| `(DMAN_\w+)` \|", read(OPTIONS), re.MULTILINE)
    assert len(rows) > 20
    for _, variable in rows:
        monkeypatch.setenv(variable, "7777")
    actions = [action for parser in options_page.parsers() for action in parser._actions]
    set_options = {name for action in actions if str(action.default) == "7777" for name in action.option_strings}
    assert {option for option, _ in rows} <= set_options


def slugs(document: Path) -> set[str]:
    """The fragments of a document's headings."""
    return {options_page.anchor(title) for title in re.findall(r"^#+ (.+)$", read(document), re.MULTILINE)}


@pytest.mark.parametrize("document", NAMES)
def test_links_lead_somewhere(document: str) -> None:
    wrong = []
    for target, fragment in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", read(document)):
        if "://" in target:
            continue
        file = (ROOT / document).parent / target if target else ROOT / document
        if not file.exists() or (fragment and fragment not in slugs(file)):
            wrong.append(f"{target}#{fragment}")
    assert wrong == []


@pytest.mark.parametrize("document", NAMES)
def test_modules_that_a_document_runs_exist(document: str) -> None:
    named = {name for name in re.findall(r"python -m ([\w.]+\w)", read(document)) if name.partition(".")[0] in OURS}
    paths = {name: ROOT / Path(*name.split(".")) for name in named}
    missing = [
        n for n, path in paths.items() if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists())
    ]
    assert sorted(missing) == []


@pytest.mark.parametrize("document", NAMES)
def test_make_targets_that_a_document_names_exist(document: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", read(document))) <= targets


def test_formats_page_names_every_part_of_a_bundle(tiny_bundle: Path) -> None:
    text, manifest = read("docs/formats.md"), read_manifest(tiny_bundle)
    tensors = {
        tensor["name"] for graph in manifest.tensors.values() for tensor in (*graph["inputs"], *graph["outputs"])
    }
    arrays = set(open_bundle(tiny_bundle).golden())
    fields = {field.name for kind in (Manifest, StateShape) for field in dataclasses.fields(kind)}
    lines = [json.loads(line) for line in (tiny_bundle / ITEMS).read_text(encoding="utf-8").splitlines()]
    names = {MANIFEST, *FILES, *fields, *tensors, *arrays, *STATE_DTYPES, *(key for line in lines for key in line)}
    assert len(names) > 30
    assert sorted(name for name in names if f"`{name}`" not in text) == []
    assert f"## Bundle (format {FORMAT_VERSION})" in text


def test_bundle_id_is_what_the_formats_page_says(tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    content = {name: manifest[name] for name in ("format_version", "integer_item_ids", "state")}
    later = {
        "times": "none",
        "sketch_items": 0,
        "closed": "full",
        "longest_gap": 2**40,
    }  # came later: not in the text while they say nothing
    content["state"] = {name: value for name, value in content["state"].items() if (name, value) not in later.items()}
    content["files"] = {name: hashlib.sha256((tiny_bundle / name).read_bytes()).hexdigest() for name in FILES}
    text = json.dumps(content, sort_keys=True, separators=(", ", ": "), ensure_ascii=True)
    assert manifest["bundle_id"] == hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


# -- short -----------------------------------------------------------------------------------------------------------


def test_readme_fits_a_few_screens() -> None:
    lines = read("README.md").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 400  # long lines would only hide the length


@pytest.mark.parametrize("document", NAMES)
def test_document_cites_nothing_outside_the_repository(document: str) -> None:
    assert re.findall(r"\b(?:DESIGN|FACTS|STYLE)\.md", read(document)) == []
