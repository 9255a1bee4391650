"""The command `dman-runtime`: serve, import, score, evaluate, inspect."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dman_runtime.data.logs import Columns
from dman_runtime.errors import UsageError
from dman_runtime.model.bundle import Bundle, open_bundle, read_manifest
from dman_runtime.options import Parser, configure_logging, print_json, run_command
from dman_runtime.serving.server import ServeConfig, serve
from dman_runtime.store.lmdb import DEFAULT_MAP_SIZE, StateStore, read_store_info

DEFAULT_BUNDLE, DEFAULT_STATE, DEFAULT_LOG = Path("bundle"), Path("state"), Path("data/log.csv")


def parser() -> Parser:
    p = Parser(prog="dman-runtime", description="Serve and score with an exported DMAN bundle.")
    p.add_argument("--verbose", action="store_true", help="log more")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _serve_options(_command(commands, "serve", "answer gRPC requests"))
    _import_options(_command(commands, "import", "backfill histories from a log into the state store"))
    _score_options(_command(commands, "score", "write the top K of every user in a log to a Parquet file"))
    _evaluate_options(_command(commands, "evaluate", "leave-one-out metrics of a bundle on a log"))
    _inspect_options(_command(commands, "inspect", "show what a bundle, a state store or a user's state holds"))
    return p


def _command(commands: Any, name: str, help_text: str) -> Parser:
    command: Parser = commands.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
    command.flag("--bundle", type=Path, default=DEFAULT_BUNDLE, help="bundle directory")
    return command


def _serve_options(p: Parser) -> None:
    p.flag("--state", type=Path, default=DEFAULT_STATE, help="state directory; created when absent")
    p.flag(
        "--host", default="127.0.0.1", help="address to listen on; there is no authentication, so mind who can reach it"
    )
    p.flag("--port", type=int, default=50051, help="port to listen on; 0 takes a free one")
    _encoder_options(p)
    p.flag("--workers", type=int, default=1, help="worker processes sharing the port and the state")
    p.flag("--threads", type=int, default=16, help="requests that one worker runs at a time; more wait")
    p.flag(
        "--max-concurrent", type=int, default=512, help="requests that one worker holds; more get RESOURCE_EXHAUSTED"
    )
    _map_option(p)
    p.flag("--grace", type=float, default=10.0, help="seconds that running requests get when stopping")


def _encoder_options(p: Parser) -> None:
    p.flag(
        "--provider",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="where the graphs run; auto: CUDA if it works",
    )
    p.flag("--encoder-threads", type=int, default=1, help="CPU threads inside one graph run")


def _map_option(p: Parser) -> None:
    default = DEFAULT_MAP_SIZE >> 20
    p.flag(
        "--map-size-mib", type=int, default=default, help="largest size of the state store in MiB; must fit the disk"
    )


def _column_options(p: Parser) -> None:
    for field in fields(Columns):
        p.flag(f"--{field.name}-column", default=field.default, help=f"name of the {field.name} column")


def _import_options(p: Parser) -> None:
    p.flag("--state", type=Path, default=DEFAULT_STATE, help="state directory; created when absent")
    p.flag("--input", type=Path, default=DEFAULT_LOG, help="interaction log")
    p.flag(
        "--existing",
        choices=["skip", "append"],
        default="skip",
        help="users already in the store: leave them as they are, or append the events of the file",
    )
    _column_options(p)
    _encoder_options(p)
    _map_option(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")


def _score_options(p: Parser) -> None:
    p.flag("--input", type=Path, default=DEFAULT_LOG, help="interaction log")
    p.flag("--output", type=Path, default=Path("scores.parquet"), help="Parquet file to write")
    p.flag("--k", type=int, default=100, help="items per user")
    p.add_argument("--include-seen", action="store_true", help="do not leave out items in the user's history")
    _column_options(p)
    _encoder_options(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")


def _evaluate_options(p: Parser) -> None:
    p.flag("--data", type=Path, default=DEFAULT_LOG, help="interaction log")
    p.flag("--split", choices=["valid", "test"], default="test", help="which held-out event to predict")
    _column_options(p)
    _encoder_options(p)
    p.add_argument("--json", action="store_true", help="print the metrics as JSON on the last line")


def _inspect_options(p: Parser) -> None:
    p.flag("--state", type=Path, default=None, help="state directory to inspect as well")
    p.flag("--user", default=None, help="user whose state to show; needs --state")
    p.add_argument("--json", action="store_true", help="print everything as JSON on the last line")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    configure_logging(verbose=arguments.verbose)
    commands = {"serve": _serve, "import": _import, "score": _score, "evaluate": _evaluate, "inspect": _inspect}
    return commands[arguments.command](arguments)


def _serve(arguments: argparse.Namespace) -> int:
    names = {field.name for field in fields(ServeConfig)}
    return serve(ServeConfig(**{name: value for name, value in vars(arguments).items() if name in names}))


def _columns(arguments: argparse.Namespace) -> Columns:
    return Columns(**{field.name: getattr(arguments, f"{field.name}_column") for field in fields(Columns)})


def _open(arguments: argparse.Namespace) -> tuple[Bundle, Any]:
    """Bundle and graphs, checked against the golden replay."""
    from dman_runtime.model.encoder import Encoder
    from dman_runtime.model.recurrence import check_golden

    bundle = open_bundle(arguments.bundle)
    graphs = Encoder(bundle.path, provider=arguments.provider, threads=arguments.encoder_threads)
    check_golden(bundle, graphs)
    return bundle, graphs


def _import(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.offline import import_histories

    bundle, graphs = _open(arguments)
    with StateStore.open(
        arguments.state,
        bundle_id=bundle.bundle_id,
        item_ids=bundle.items.item_ids,
        map_size=arguments.map_size_mib << 20,
    ) as store:
        result = import_histories(
            arguments.input,
            bundle=bundle,
            graphs=graphs,
            store=store,
            columns=_columns(arguments),
            existing=arguments.existing,
        )
    print(
        f"imported {result.events} events of {result.users} users into {arguments.state}; {result.skipped_users} users "
        f"were there already, {result.unknown_events} events of unknown items were left out"
    )
    if arguments.json:
        print_json(vars(result))
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from dman_runtime.engine import MAX_K
    from dman_runtime.jobs.offline import score

    if not 1 <= arguments.k <= MAX_K:
        raise UsageError(f"--k is {arguments.k}; choose 1 to {MAX_K}")
    bundle, graphs = _open(arguments)
    users = score(
        arguments.input,
        arguments.output,
        bundle=bundle,
        graphs=graphs,
        k=arguments.k,
        include_seen=arguments.include_seen,
        columns=_columns(arguments),
    )
    print(f"scored {users} users into {arguments.output}")
    if arguments.json:
        print_json({"users": users, "output": str(arguments.output), "bundle_id": bundle.bundle_id})
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from dman_runtime.data.evaluation import format_report
    from dman_runtime.jobs.offline import evaluate

    bundle, graphs = _open(arguments)
    filters = {name: int(bundle.manifest.data.get(name, 0)) for name in ("min_user_events", "min_item_events")}
    result = evaluate(
        arguments.data, bundle=bundle, graphs=graphs, split=arguments.split, columns=_columns(arguments), **filters
    )
    print(format_report(result))
    if arguments.json:
        print_json(result | {"bundle_id": bundle.bundle_id})
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.user is not None and arguments.state is None:
        raise UsageError("--user needs --state, the directory that holds the user's state")
    if arguments.user is not None:
        result = _inspect_user(arguments)
    else:
        result = {"bundle": _inspect_bundle(arguments.bundle)}
        if arguments.state is not None:
            result["state"] = vars(read_store_info(arguments.state))
    if arguments.json:
        print_json(result)
    else:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


def _inspect_bundle(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    open_bundle(path)  # verifies every checksum
    test = manifest.metrics.get("test", {})
    return {
        "path": str(path),
        "bundle_id": manifest.bundle_id,
        "format_version": manifest.format_version,
        "items": manifest.vocabulary,
        "bytes": sum(entry["bytes"] for entry in manifest.files.values()),
        "model": manifest.model,
        "state": vars(manifest.state),
        "test_metrics": {name: value for name, value in test.items() if "@" in name},
        "data": manifest.data,
        "export": manifest.export,
        "versions": manifest.versions,
    }


def _inspect_user(arguments: argparse.Namespace) -> dict[str, Any]:
    from dman_runtime.model.state import StateBatch, read_user_embedding

    bundle = open_bundle(arguments.bundle)
    with StateStore.open(
        arguments.state, bundle_id=bundle.bundle_id, item_ids=bundle.items.item_ids, readonly=True
    ) as store:
        try:
            stored = store.get(arguments.user)
        except ValueError as error:
            raise UsageError(f"--user: {error}") from None
        if stored is None:
            raise UsageError(f"no user {arguments.user!r} in {arguments.state}")
        items, timestamps = store.history(arguments.user, limit=20)
    states = StateBatch.from_records(bundle, [stored.record])
    embedding, events = read_user_embedding(stored.record, bundle)
    return {
        "user_id": arguments.user,
        "bundle_id": bundle.bundle_id,
        "event_count": events,
        "version": stored.version,
        "state_bytes": len(stored.record),
        "context_positions": int(states.counts[0]),
        "remembered_request_ids": len(states.request_ids[0]),
        "user_embedding_norm": float((embedding**2).sum() ** 0.5),
        "memory_slot_norms": [
            [round(float((slot.astype("f4") ** 2).sum() ** 0.5), 3) for slot in layer] for layer in states.memory[0]
        ],
        "recent_events": [
            {"item_id": bundle.items.item_ids[item], "title": bundle.items.titles[item], "timestamp": time}
            for item, time in zip(items.tolist(), timestamps.tolist(), strict=True)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
