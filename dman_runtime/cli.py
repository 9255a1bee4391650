"""The options of `dman-runtime` and of its commands; what they do is in `commands`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dman_runtime.commands import ingesting, items, logs, remote, servers, stores
from dman_runtime.commands.flags import (
    DEFAULT_BUNDLE,
    DEFAULT_LOG,
    DEFAULT_STATE,
    caller_options,
    encoder_options,
    log_options,
    remote_options,
    spread_options,
    state_option,
    store_options,
    watching_options,
)
from dman_runtime.data.filters import Filters
from dman_runtime.ingest.options import IngestOptions
from dman_runtime.options import Parser, configure_logging, run_command
from dman_runtime.store.place import parse_directory

COMMANDS = servers.COMMANDS | stores.COMMANDS | items.COMMANDS | logs.COMMANDS | ingesting.COMMANDS
_GIVE_WAY, _NICENESS = {"rebuild", "activate"}, 10  # commands beside servers, which need the processor first


def give_way(arguments: Sequence[str]) -> None:
    """Lowers the priority of this process for a command that encodes histories beside servers."""
    if _GIVE_WAY.intersection(arguments[:2]) and hasattr(os, "nice"):
        os.nice(_NICENESS)


def parser() -> Parser:
    p = Parser(prog="dman-runtime", description="Serve and score with an exported DMAN bundle.")
    p.add_argument("--verbose", action="store_true", help="log more")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _serve_options(_command(commands, "serve", "answer gRPC requests"))
    _status_options(_plain_command(commands, "status", "ask a running server whether it can do its work"))
    _verify_options(_plain_command(commands, "verify", "read everything in a state store and list what is damaged"))
    _backup_options(_plain_command(commands, "backup", "copy a state store, also of a running server, and check it"))
    _restore_options(_plain_command(commands, "restore", "put a backup where a state store belongs"))
    _compact_options(_plain_command(commands, "compact", "write a state store anew, without traces of deleted users"))
    _export_user_options(_plain_command(commands, "export-user", "print all that is stored of a user, as JSON"))
    _expire_options(_plain_command(commands, "expire", "delete the users who have been idle for long"))
    _token_options(_plain_command(commands, "token", "make a token for a caller"))
    _import_options(_command(commands, "import", "merge the histories of a log into the state store"))
    _ingest_options(_command(commands, "ingest", "store events as they come, from a topic or a file"))
    _rebuild_options(_command(commands, "rebuild", "encode all histories under a bundle, beside a running server"))
    _activate_options(_command(commands, "activate", "let another bundle answer, in running servers too"))
    _generations_options(_plain_command(commands, "generations", "list the bundles that a state store has states of"))
    _drop_options(_plain_command(commands, "drop", "remove the states of a bundle that is no longer served"))
    _items_options(_plain_command(commands, "items", "switch items off and on, in running servers too, or list them"))
    _add_items_options(_command(commands, "add-items", "add new items without training, in running servers too"))
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
    state_option(p, "state directory, created when absent")
    p.flag("--host", default="127.0.0.1", help="address to listen on; beyond loopback give TLS, or --insecure")
    p.flag("--port", type=int, default=50051, help="port to listen on; 0 takes a free one")
    encoder_options(p)
    p.flag("--workers", type=int, default=1, help="worker processes sharing the port and the state")
    p.flag(
        "--max-concurrent", type=int, default=512, help="requests that one worker holds; more get RESOURCE_EXHAUSTED"
    )
    store_options(p)
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
    p.flag(
        "--late-events",
        choices=["arrival", "drop", "place"],
        default="arrival",
        help="events of before the end of their user's history: take them as they arrive, drop them, or place by time",
    )
    p.add_argument("--state-must-exist", action="store_true", help="refuse to start without a state store")
    _access_options(p)
    _admin_options(p)
    watching_options(p)


def _admin_options(p: Parser) -> None:
    p.flag("--admin-port", type=int, default=None, help="port for the admin service; none without it")
    p.flag("--admin-host", default="127.0.0.1", help="address for the admin service; beyond loopback as for --host")
    p.flag(
        "--admin-socket", type=Path, default=None, help="Unix socket for the admin service, for this system user only"
    )
    p.flag(
        "--admin-root",
        type=Path,
        default=None,
        help="directory of the bundles and backups that callers of the admin service may name; none without it",
    )


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
    caller_options(p)
    p.flag("--timeout", type=float, default=5.0, help="seconds to wait for the answer")
    p.add_argument("--json", action="store_true", help="print the status as JSON on the last line")


def _verify_options(p: Parser) -> None:
    p.flag(
        "--state", type=parse_directory, default=DEFAULT_STATE, help="state directory to read; a server may be using it"
    )
    p.flag("--bundle", type=Path, default=None, help="read the states of this bundle, too, and replay some")
    p.flag(
        "--sample", type=int, default=100, help="users whose histories are replayed, drawn by chance; needs --bundle"
    )
    p.add_argument("--json", action="store_true", help="print the report as JSON on the last line")
    remote_options(p)


def _backup_options(p: Parser) -> None:
    p.flag(
        "--state", type=parse_directory, default=DEFAULT_STATE, help="state directory to copy; a server may be using it"
    )
    p.flag("--output", type=Path, default=Path("backup"), help="directory to make")
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    remote_options(p)


def _restore_options(p: Parser) -> None:
    p.flag("--backup", type=Path, default=Path("backup"), help="directory that `dman-runtime backup` made")
    p.flag(
        "--state",
        type=parse_directory,
        default=DEFAULT_STATE,
        help="state directory to make; it must be empty or missing",
    )
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")


def _compact_options(p: Parser) -> None:
    p.flag("--state", type=parse_directory, default=DEFAULT_STATE, help="state directory; no process may use it")
    store_options(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")


def _export_user_options(p: Parser) -> None:
    p.add_argument("user", help="id of the user")
    state_option(p, "state directory to read, also of a server")
    remote_options(p)


def _expire_options(p: Parser) -> None:
    state_option(p, "state directory, also of a server")
    p.flag("--idle-days", type=float, required=True, help="delete users whose latest event is older")
    p.add_argument("--dry-run", action="store_true", help="say how many that are, and delete none")
    store_options(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    remote_options(p)


def _token_options(p: Parser) -> None:
    p.add_argument("name", help="of the caller, for logs and limits")
    p.flag("--roles", default="read,write", help="what the caller may do: read, write, admin, with commas between")


def _import_options(p: Parser) -> None:
    state_option(p, "state directory, created when absent")
    p.flag("--input", type=Path, default=DEFAULT_LOG, help="interaction log: a file, a folder or a glob pattern")
    spread_options(p, processes=0)
    log_options(p)
    encoder_options(p)
    store_options(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")


def _ingest_options(p: Parser) -> None:
    p.flag("--from", dest="source", required=True, help="kafka://host:9092/topic, or a file that grows")
    state_option(p, "state directory, created when absent")
    p.config_flags(IngestOptions, title="ingestion")
    encoder_options(p)
    store_options(p)
    watching_options(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")


def _rebuild_options(p: Parser) -> None:
    p.set_defaults(progress=None)  # a bar on the terminal
    state_option(p, "state directory, also of a server")
    p.flag("--max-share", type=float, default=0.5, help="of one core that each process may use, above 0 up to 1")
    spread_options(p, processes=1)
    encoder_options(p)
    store_options(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    remote_options(p)


def _activate_options(p: Parser) -> None:
    state_option(p, "state directory, also of servers")
    p.flag("--share", type=float, default=1.0, help="of the users that get the bundle, above 0; 1: all of them")
    p.flag("--wait", type=float, default=120.0, help="seconds that running servers get to load it")
    p.flag("--catch-up", type=float, default=5.0, help="seconds at most to bring states up to date first; 0: none")
    encoder_options(p)
    store_options(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    remote_options(p)


def _generations_options(p: Parser) -> None:
    state_option(p, "state directory to read, also of a server")
    p.add_argument("--json", action="store_true", help="print the list as JSON on the last line")
    remote_options(p)


def _drop_options(p: Parser) -> None:
    p.add_argument("bundle_id", help="whose states to remove; `dman-runtime generations` lists them")
    state_option(p, "state directory, also of a server")
    store_options(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    remote_options(p)


def _items_options(p: Parser) -> None:
    p.add_argument("action", choices=["off", "on", "list"], help="what to do; list: those that are off, one id a line")
    p.add_argument("ids", nargs="*", help="ids of items, right behind that word; one with a dash goes behind --")
    p.flag("--file", type=Path, default=None, help="more of them: a .txt file with one id a line, or a table of items")
    p.flag("--item-column", default="item_id", help="column of the ids in such a table")
    state_option(p, "state directory, also of servers")
    store_options(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    remote_options(p)


def _add_items_options(p: Parser) -> None:
    p.flag("--file", type=Path, required=True, help="table of the items: ids, and titles and attributes if it has any")
    p.flag("--item-column", default="item_id", help="column of the ids")
    p.flag("--like-column", default="like", help="column of ids, with | between them, whose mean an item gets")
    p.flag("--embeddings", type=Path, default=None, help=".npy file of float32, one row per item, made for the bundle")
    state_option(p, "state directory, also of servers")
    store_options(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    remote_options(p)


def _export_log_options(p: Parser) -> None:
    state_option(p, "state directory to read, also of a server")
    p.flag("--output", type=Path, default=Path("log.parquet"), help="Parquet file to write")
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")


def _score_options(p: Parser) -> None:
    p.flag("--input", type=Path, default=DEFAULT_LOG, help="interaction log: a file, a folder or a glob pattern")
    p.flag("--output", type=Path, default=Path("scores.parquet"), help="Parquet file to write")
    p.flag("--k", type=int, default=100, help="items per user")
    p.flag("--at", type=int, default=None, help="seconds since 1970 of the moment to score for; without it, unknown")
    p.add_argument("--include-seen", action="store_true", help="do not leave out items in the user's history")
    spread_options(p, processes=0)
    log_options(p)
    encoder_options(p)
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")


def _evaluate_options(p: Parser) -> None:
    p.flag("--data", type=Path, default=DEFAULT_LOG, help="interaction log")
    p.flag("--split", choices=["valid", "test"], default="test", help="which held-out event to predict")
    p.config_flags(Filters, title="filters (default: as in training for the log of the training, else none)")
    log_options(p, any_items=True)
    encoder_options(p)
    p.add_argument("--json", action="store_true", help="print the metrics as JSON on the last line")


def _inspect_options(p: Parser) -> None:
    state_option(p, "state directory to inspect as well", default=None)
    p.flag("--user", default=None, help="user whose state to show; needs --state")
    p.add_argument("--json", action="store_true", help="print everything as JSON on the last line")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    configure_logging(verbose=arguments.verbose, json=getattr(arguments, "log_format", "text") == "json")
    asks = arguments.command in remote.ASKED and arguments.target is not None
    return remote.ask(arguments) if asks else COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
