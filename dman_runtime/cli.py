"""The options of `dman-runtime` and of its commands; what they do is in `commands`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

<<<<<<< HEAD
from dman_runtime.commands import COMMANDS
from dman_runtime.data.log_options import LogOptions
from dman_runtime.jobs.partitions import MAX_UNKNOWN
from dman_runtime.options import Parser, configure_logging, run_command
=======
from dman_runtime.data.filters import FILTERS, Filters
from dman_runtime.data.log_options import AUTO, LogOptions, options_of_training
from dman_runtime.errors import UsageError
from dman_runtime.jobs.partitions import EVENTS_PER_PARTITION, MAX_UNKNOWN
from dman_runtime.options import Parser, configure_logging, overridden, print_json, run_command
from dman_runtime.serving.config import ServeConfig

if TYPE_CHECKING:
    from dman_runtime.data.input_report import InputReport
    from dman_runtime.model.generation import Generation
>>>>>>> h-edges

DEFAULT_BUNDLE, DEFAULT_STATE, DEFAULT_LOG = Path("bundle"), Path("state"), Path("data/log.csv")
DEFAULT_MAP_SIZE_MIB = 64 << 10  # of address space; the disk holds only what is used


def parser() -> Parser:
    p = Parser(prog="dman-runtime", description="Serve and score with an exported DMAN bundle.")
    p.add_argument("--verbose", action="store_true", help="log more")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _serve_options(_command(commands, "serve", "answer gRPC requests"))
    _status_options(_plain_command(commands, "status", "ask a running server whether it can do its work"))
    _verify_options(_plain_command(commands, "verify", "read everything in a state store and list what is damaged"))
    _token_options(_plain_command(commands, "token", "make a token for a caller"))
    _import_options(_command(commands, "import", "merge the histories of a log into the state store"))
    _export_log_options(_plain_command(commands, "export-log", "write all histories as a log, to train on or import"))
    _score_options(_command(commands, "score", "write the top K of every user in a log to a Parquet file"))
    _evaluate_options(_command(commands, "evaluate", "leave-one-out metrics of a bundle on a log"))
    _inspect_options(_command(commands, "inspect", "show what a bundle, a state store or a user's state holds"))
    return p


def _plain_command(commands: Any, name: str, help_text: str) -> Parser:
    command: Parser = commands.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
    return command


def _command(commands: Any, name: str, help_text: str) -> Parser:
    command = _plain_command(commands, name, help_text)
    command.flag("--bundle", type=Path, default=DEFAULT_BUNDLE, help="bundle directory")
    return command


def _serve_options(p: Parser) -> None:
    p.flag("--state", type=Path, default=DEFAULT_STATE, help="state directory; created when absent")
    p.flag("--host", default="127.0.0.1", help="address to listen on; beyond loopback give TLS, or --insecure")
    p.flag("--port", type=int, default=50051, help="port to listen on; 0 takes a free one")
    _encoder_options(p)
    p.flag("--workers", type=int, default=1, help="worker processes sharing the port and the state")
    p.flag(
        "--max-concurrent", type=int, default=512, help="requests that one worker holds; more get RESOURCE_EXHAUSTED"
    )
    _map_option(p)
    p.flag("--grace", type=float, default=10.0, help="seconds that running requests get when stopping")
    p.flag(
        "--idle-timeout", type=float, default=300.0, help="seconds after which a connection without a call is closed"
    )
    p.flag(
        "--max-in-flight-mib",
        type=int,
        default=128,
        help="MiB of messages and replies that one worker holds; more get RESOURCE_EXHAUSTED",
    )
    p.add_argument("--state-must-exist", action="store_true", help="refuse to start without a state store")
    _access_options(p)
    p.flag("--metrics-port", type=int, default=None, help="port for Prometheus metrics; none without it")
    p.flag("--metrics-host", default="127.0.0.1", help="address for Prometheus metrics")
    p.flag("--log-format", choices=["text", "json"], default="text", help="json: one object a line, for log collectors")


def _access_options(p: Parser) -> None:
    p.add_argument("--insecure", action="store_true", help="allow plain text beyond loopback: anybody can listen in")
    p.flag(
        "--tls-cert", type=Path, default=None, help="certificate chain of the server, PEM; read again when it changes"
    )
    p.flag("--tls-key", type=Path, default=None, help="private key of the certificate, PEM")
    p.flag("--tls-client-ca", type=Path, default=None, help="clients must show a certificate signed by these, PEM")
    p.flag(
        "--tokens", type=Path, default=None, help="file of callers, roles and hashed tokens; read again when it changes"
    )
    p.flag("--caller-requests", type=float, default=0.0, help="requests per second and caller; 0: no limit")
    p.flag("--caller-events", type=float, default=0.0, help="events to encode per second and caller; 0: no limit")


def _status_options(p: Parser) -> None:
    p.flag("--target", default="localhost:50051", help="address of the server")
    p.flag("--token-file", type=Path, default=None, help="file that holds a token with the role admin")
    p.flag("--ca", type=Path, default=None, help="who signed the server's certificate, PEM; switches TLS on")
    p.flag("--client-cert", type=Path, default=None, help="certificate for a server that asks for one, PEM")
    p.flag("--client-key", type=Path, default=None, help="private key of the client's certificate, PEM")
    p.flag("--timeout", type=float, default=5.0, help="seconds to wait for the answer")
    p.add_argument("--json", action="store_true", help="print the status as JSON on the last line")


def _verify_options(p: Parser) -> None:
    p.flag("--state", type=Path, default=DEFAULT_STATE, help="state directory to read; a server may be using it")
    p.add_argument("--json", action="store_true", help="print the report as JSON on the last line")


def _token_options(p: Parser) -> None:
    p.add_argument("name", help="of the caller, for logs and limits")
    p.flag("--roles", default="read,write", help="what the caller may do: read, write, admin, with commas between")


def _encoder_options(p: Parser) -> None:
    p.flag(
        "--provider",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="where the graphs run; auto: CUDA if it works",
    )
    p.flag("--encoder-threads", type=int, default=1, help="CPU threads inside one graph run")


def _map_option(p: Parser) -> None:
    p.flag(
        "--map-size-mib",
        type=int,
        default=DEFAULT_MAP_SIZE_MIB,
        help="largest size of the state store in MiB; the disk must have room for it",
    )


def _log_options(p: Parser, *, any_items: bool = False) -> None:
    if not any_items:
        p.flag("--max-unknown", type=float, default=MAX_UNKNOWN, help="largest share of events of unknown items")
    p.add_argument("--dry-run", action="store_true", help="read the log, say what was understood, and stop")
    p.config_flags(LogOptions, title="log (default: as in training)")


def _import_options(p: Parser) -> None:
    p.flag("--state", type=Path, default=DEFAULT_STATE, help="state directory; created when absent")
    p.flag("--input", type=Path, default=DEFAULT_LOG, help="interaction log")
<<<<<<< HEAD
    _unknown_option(p)
=======
    p.flag(
        "--existing",
        choices=["skip", "append"],
        default="skip",
        help="users already in the store: leave them as they are, or append the events of the file",
    )
>>>>>>> h-edges
    _log_options(p)
    _encoder_options(p)
    _map_option(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")


<<<<<<< HEAD
def _unknown_option(p: Parser) -> None:
    p.flag(
        "--max-unknown",
        type=float,
        default=MAX_UNKNOWN,
        help="largest share of events of items that the bundle does not know, from 0 to 1; above it, nothing is done",
    )


def _export_log_options(p: Parser) -> None:
    p.flag("--state", type=Path, default=DEFAULT_STATE, help="state directory to read; a server may be using it")
    p.flag("--output", type=Path, default=Path("log.parquet"), help="Parquet file to write")
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")


=======
>>>>>>> h-edges
def _score_options(p: Parser) -> None:
    p.flag("--input", type=Path, default=DEFAULT_LOG, help="interaction log")
    p.flag("--output", type=Path, default=Path("scores.parquet"), help="Parquet file to write")
    p.flag("--k", type=int, default=100, help="items per user")
    p.add_argument("--include-seen", action="store_true", help="do not leave out items in the user's history")
    _log_options(p)
    _encoder_options(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")


def _evaluate_options(p: Parser) -> None:
    p.flag("--data", type=Path, default=DEFAULT_LOG, help="interaction log")
    p.flag("--split", choices=["valid", "test"], default="test", help="which held-out event to predict")
    p.config_flags(Filters, title="filters (default: as in training for the log of the training, else none)")
    _log_options(p, any_items=True)
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
    configure_logging(verbose=arguments.verbose, json=getattr(arguments, "log_format", "text") == "json")
<<<<<<< HEAD
    return COMMANDS[arguments.command](arguments)
=======
    commands = {
        "serve": _serve,
        "status": _status,
        "verify": _verify,
        "token": _token,
        "import": _import,
        "score": _score,
        "evaluate": _evaluate,
        "inspect": _inspect,
    }
    return commands[arguments.command](arguments)


def _serve(arguments: argparse.Namespace) -> int:
    from dman_runtime.serving.supervisor import serve

    names = {field.name for field in fields(ServeConfig)}
    return serve(ServeConfig(**{name: value for name, value in vars(arguments).items() if name in names}))


def _status(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.asking import ask_status, format_status

    status = ask_status(
        arguments.target,
        token_file=arguments.token_file,
        ca=arguments.ca,
        client_cert=arguments.client_cert,
        client_key=arguments.client_key,
        timeout=arguments.timeout,
    )
    print(format_status(status))
    if arguments.json:
        print_json(status)
    return 0 if status["ready"] and not status["problems"] else 1


def _verify(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.verifying import format_report, verify_store

    report = verify_store(arguments.state)
    print(format_report(report))
    if arguments.json:
        print_json(report.as_dict())
    return report.exit_status


def _token(arguments: argparse.Namespace) -> int:
    from dman_runtime.access.tokens import new_token

    token, line = new_token(arguments.name, arguments.roles.split(","))
    print(f"token, shown this once: {token}")
    print(f"line for the token file: {line}")
    return 0


def _log(arguments: argparse.Namespace, path: Path, generation: Generation, *, max_rows: int | None) -> Any:
    """The log that a command reads, as the bundle's training read its own but for the options given."""
    from dman_runtime.data.logs import open_log

    bundle = generation.bundle
    options = overridden(options_of_training(bundle.manifest.data), arguments)
    return open_log(path, options, known_items=bundle.items.index, max_rows=max_rows)


def _goes_on(arguments: argparse.Namespace, report: InputReport, generation: Generation) -> bool:
    """Prints what was understood of a log. Returns whether the command does more than that. Raises InputError."""
    from dman_runtime.jobs.input import notice_other_ids, require_known

    notice_other_ids(report, generation.bundle)
    print(report.table(), flush=True)
    if arguments.dry_run and arguments.json:
        print_json(report.as_dict())
    elif not arguments.dry_run and hasattr(arguments, "max_unknown"):
        require_known(report, generation.bundle, arguments.max_unknown)
    return not arguments.dry_run


def _generation(arguments: argparse.Namespace) -> Generation:
    from dman_runtime.model.generation import Generation

    return Generation.open(arguments.bundle, provider=arguments.provider, threads=arguments.encoder_threads)


def _import(arguments: argparse.Namespace) -> int:
    from dman_runtime.engine import Engine
    from dman_runtime.jobs.importing import import_histories
    from dman_runtime.store.lmdb import LmdbStore

    generation = _generation(arguments)
    with _log(arguments, arguments.input, generation, max_rows=EVENTS_PER_PARTITION) as log:
        if not _goes_on(arguments, log.report, generation):
            return 0
        with LmdbStore.open(arguments.state, map_size=arguments.map_size_mib << 20) as store:
            result = import_histories(log, Engine(generation, store), existing=arguments.existing)
    print(
        f"imported {result.events} events of {result.users} users into {arguments.state}; {result.skipped_users} users "
        f"were there already, {result.unknown_events} events are of items that the bundle does not know"
    )
    if arguments.json:
        print_json(vars(result) | {"input": log.report.as_dict()})
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.scoring import score
    from dman_runtime.requests import MAX_K

    if not 1 <= arguments.k <= MAX_K:
        raise UsageError(f"k is {arguments.k}", f"choose 1 to {MAX_K}", parameter="k")
    generation = _generation(arguments)
    with _log(arguments, arguments.input, generation, max_rows=EVENTS_PER_PARTITION) as log:
        if not _goes_on(arguments, log.report, generation):
            return 0
        options = {"include_seen": arguments.include_seen, "user_ids": getattr(arguments, "user_ids", AUTO)}
        result = score(log, arguments.output, generation, k=arguments.k, **options)
    print("\n".join(result.lines(arguments.output, arguments.k)))
    if arguments.json:
        about = {"output": str(arguments.output), "bundle_id": generation.bundle_id, "input": log.report.as_dict()}
        print_json(vars(result) | about)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from dman_runtime.data.evaluation import format_report
    from dman_runtime.data.vocabulary import read_known
    from dman_runtime.jobs.evaluating import evaluate

    filters = {name: getattr(arguments, name) for name in FILTERS if hasattr(arguments, name)}
    generation = _generation(arguments)
    trained = generation.bundle.manifest.data
    options = overridden(options_of_training(trained), arguments)
    log = read_known(arguments.data, generation.bundle.items.index, options, trained=trained, filters=filters)
    if not _goes_on(arguments, log.report, generation):
        return 0
    result = evaluate(log, generation, split=arguments.split)
    print(f"\n{format_report(result)}")
    if arguments.json:
        print_json(result | {"bundle_id": generation.bundle_id, "input": log.report.as_dict()})
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from dman_runtime.jobs.inspecting import inspect_bundle, inspect_store, inspect_user

    if arguments.user is not None and arguments.state is None:
        raise UsageError("a user needs the store that holds the state", "name its directory", parameter="state")
    if arguments.user is not None:
        result = inspect_user(arguments.bundle, arguments.state, arguments.user)
    else:
        result = {"bundle": inspect_bundle(arguments.bundle)}
        if arguments.state is not None:
            result["state"] = inspect_store(arguments.state)
    if arguments.json:
        print_json(result)
    else:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0
>>>>>>> h-edges


if __name__ == "__main__":
    sys.exit(main())
