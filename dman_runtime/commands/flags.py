"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path

from dman_runtime.data.log_options import LogOptions
from dman_runtime.jobs.partitions import MAX_UNKNOWN
from dman_runtime.jobs.spreading import ENGINES
from dman_runtime.options import Parser
from dman_runtime.store.place import DURABILITIES, parse_place

DEFAULT_BUNDLE, DEFAULT_STATE, DEFAULT_LOG = Path("bundle"), Path("state"), Path("data/log.csv")
DEFAULT_MAP_SIZE_MIB = 64 << 10  # of address space; the disk holds only what is used


def state_option(p: Parser, text: str, *, default: Path | None = DEFAULT_STATE) -> None:
    p.flag("--state", type=parse_place, default=default, help=f"{text}; or redis://host:port/name")


def caller_options(p: Parser) -> None:
    p.flag("--token-file", type=Path, default=None, help="file that holds a token with the role admin")
    p.flag("--ca", type=Path, default=None, help="who signed the server's certificate, PEM; switches TLS on")
    p.flag("--client-cert", type=Path, default=None, help="certificate for a server that asks for one, PEM")
    p.flag("--client-key", type=Path, default=None, help="private key of the client's certificate, PEM")


def remote_options(p: Parser) -> None:
    """Of commands that a running server may do. `--target` has no variable: that of `status` would redirect them."""
    p.add_argument(
        "--target",
        default=None,
        help="address of a server's admin service, which then does this with its own store; paths are of its machine",
    )
    caller_options(p)
    p.flag("--timeout", type=float, default=86_400.0, help="seconds to wait for the server to do it")


def encoder_options(p: Parser) -> None:
    p.flag(
        "--provider",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="where the graphs run; auto: CUDA if it works",
    )
    p.flag("--encoder-threads", type=int, default=1, help="CPU threads inside one graph run")


def spread_options(p: Parser, *, processes: int) -> None:
    p.flag("--engine", choices=ENGINES, default="local", help="processes of this machine, or a Ray cluster (dman[ray])")
    p.flag("--processes", type=int, default=processes, help="of this machine; 0: one a core, or one for few events")


def store_options(p: Parser) -> None:
    p.flag(
        "--map-size-mib",
        type=int,
        default=DEFAULT_MAP_SIZE_MIB,
        help="largest size of a state directory in MiB; the disk must have room for it",
    )
    p.flag(
        "--durability",
        choices=DURABILITIES,
        default="local",
        help="what a commit waits for in a store on servers: its primary, one replica, or a majority of disks",
    )


def watching_options(p: Parser) -> None:
    p.flag("--metrics-port", type=int, default=None, help="port for Prometheus metrics; none without it")
    p.flag("--metrics-host", default="127.0.0.1", help="address for Prometheus metrics")
    p.flag("--log-format", choices=["text", "json"], default="text", help="json: one object a line, for log collectors")


def log_options(p: Parser, *, any_items: bool = False) -> None:
    if not any_items:
        p.flag("--max-unknown", type=float, default=MAX_UNKNOWN, help="largest share of events of unknown items")
    p.add_argument("--dry-run", action="store_true", help="read the log, say what was understood, and stop")
    p.config_flags(LogOptions, title="log (default: as in training)")
