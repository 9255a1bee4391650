"""Where a store is: a directory of this machine, or servers that speak the Redis protocol. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import SplitResult, quote, unquote, urlsplit

from dman_runtime.errors import UsageError

Durability = Literal["local", "replica", "quorum"]
DURABILITIES: tuple[Durability, ...] = get_args(Durability)
SCHEMES = ("redis", "rediss")
DEFAULT_PORT, DEFAULT_NAMESPACE = 6379, "dman"
_NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_REMEDY = "write redis://host:port/name, with several host:port separated by commas where they are a cluster"


@dataclass(frozen=True)
class ServerAddress:
    """Servers that keep a store: one, or some of a cluster, from which the others are found.

    `namespace` begins all keys, so that several stores, and other programs, can share the servers.
    """

    hosts: tuple[tuple[str, int], ...]
    namespace: str = DEFAULT_NAMESPACE
    tls: bool = False
    username: str = ""
    password: str = ""

    def __str__(self) -> str:
        """Without user and password: it goes into messages."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{'rediss' if self.tls else 'redis'}://{hosts}/{self.namespace}"

    @property
    def url(self) -> str:
        """With user and password: for other processes of ours only."""
        credentials = f"{quote(self.username, safe='')}:{quote(self.password, safe='')}@"
        return str(self).replace("://", f"://{credentials}", 1) if self.username or self.password else str(self)

    def __repr__(self) -> str:
        return f"ServerAddress({self})"


Place = Path | ServerAddress


def parse_place(text: str) -> Place:
    """The place that a text names: `redis://` or `rediss://`, or else a directory. Raises UsageError."""
    if not text.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        if "://" in text:
            raise UsageError(f"the state {text.partition('://')[0]}://... is of no known kind", _REMEDY)
        return Path(text)
    parts = urlsplit(text)
    credentials, _, hosts = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    namespace = parts.path.strip("/") or DEFAULT_NAMESPACE
    if parts.query or parts.fragment:
        raise UsageError("the address of the state has a part behind ? or #", _REMEDY)
    if not _NAMESPACE.fullmatch(namespace):
        raise UsageError(
            f"the state's name {namespace!r:.80} cannot begin keys", "use 1 to 64 letters, digits and any of _ . -"
        )
    return ServerAddress(
        tuple(_host(one) for one in hosts.split(",")),
        namespace,
        tls=parts.scheme == "rediss",
        username=unquote(username),
        password=unquote(password),
    )


def directory_of(place: Place) -> Path | None:
    """None for a place on servers."""
    return place if isinstance(place, Path) else None


def parse_directory(text: str) -> Path:
    """A place that is a directory. Raises UsageError for another one."""
    place = parse_place(text)
    if isinstance(place, Path):
        return place
    raise UsageError(
        f"this command looks after a state directory, and {place} is on servers",
        "copy and check a store on servers with their own tools: docs/cluster.md names them",
        parameter="state",
    )


def _host(text: str) -> tuple[str, int]:
    try:
        parts = SplitResult("", text, "", "", "")
        if parts.hostname:
            return parts.hostname, DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        pass
    raise UsageError(f"the address of the state has the host {text!r:.80}", _REMEDY)
