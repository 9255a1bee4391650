"""How a server is asked to run, and the address it listens on."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dman_runtime.errors import UsageError
from dman_runtime.store.place import Durability, Place

if TYPE_CHECKING:
    from dman_runtime.late import LateEvents
    from dman_runtime.model.sessions import Provider
    from dman_runtime.store.opening import AnyStore

MAX_MESSAGE_BYTES = 16 << 20
LogFormat = Literal["text", "json"]


@dataclass(frozen=True)
class ServeConfig:
    bundle: Path
    state: Place
    host: str
    port: int  # 0: any free one
    provider: Provider
    workers: int
    encoder_threads: int  # CPU threads per graph run
    max_concurrent: int  # requests per worker, running and waiting; beyond it RESOURCE_EXHAUSTED
    map_size_mib: int
    grace: float  # seconds that in-flight requests get when stopping
    share_port: bool = False  # set by the supervisor
    state_must_exist: bool = False  # never create a store
    insecure: bool = False  # plain text beyond loopback is meant
    tls_cert: Path | None = None  # PEM
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # clients must show a certificate that it signed
    tokens: Path | None = None  # who may call, and what
    caller_requests: float = 0.0  # per second and caller; 0: no limit
    caller_events: float = 0.0  # events to encode, per second and caller; 0: no limit
    max_in_flight_mib: int = 128  # messages and replies that one worker holds
    idle_timeout: float = 300.0  # seconds after which a connection without a call is closed
    metrics_port: int | None = None  # None: no metrics
    metrics_host: str = "127.0.0.1"
    log_format: LogFormat = "text"
    admin_port: int | None = None  # None: no admin service on a port; 0: any free one
    admin_host: str = "127.0.0.1"
    admin_socket: Path | None = None  # None: no admin service on a Unix socket
    admin_root: Path | None = None  # what callers of the admin service name is in here; None: they may name nothing
    durability: Durability = "local"  # what a commit waits for, in a store on servers
    late_events: LateEvents = "arrival"  # what becomes of events of before the end of their user's history

    def __post_init__(self) -> None:
        for name in ("port", "admin_port"):
            if not 0 <= (getattr(self, name) or 0) <= 65535:
                raise UsageError(f"{name} is {getattr(self, name)}", "choose 0 to 65535", parameter=name)
        if self.admin_port is not None and self.admin_socket is not None:
            raise UsageError(
                "an admin port and an admin socket are both asked for", "choose one", parameter="admin_port"
            )
        for name in ("workers", "encoder_threads", "max_concurrent", "map_size_mib", "max_in_flight_mib"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", "choose 1 or more", parameter=name)
        if not 0 <= self.grace <= 3600:  # nor NaN
            raise UsageError(f"grace is {self.grace}", "choose 0 to 3600 seconds", parameter="grace")
        if not 1 <= self.idle_timeout <= 86_400:
            raise UsageError(
                f"idle_timeout is {self.idle_timeout}", "choose 1 to 86400 seconds", parameter="idle_timeout"
            )

    def open_state(self) -> AnyStore:
        """Raises StoreError, UsageError."""
        from dman_runtime.store.opening import open_store  # a supervisor stays small

        return open_store(
            self.state,
            map_size=self.map_size_mib << 20,
            must_exist=self.state_must_exist,
            durability=self.durability,
        )

    def at_port(self, port: int, *, shared: bool = False) -> ServeConfig:
        """The same on the port that was found for 0; `shared` among several processes."""
        return replace(self, port=port, share_port=shared)

    @property
    def has_admin(self) -> bool:
        return self.admin_port is not None or self.admin_socket is not None

    def of_admin(self) -> ServeConfig:
        """The same with the host and port of the admin service."""
        return replace(self, host=self.admin_host, port=self.admin_port or 0, admin_port=None)

    @property
    def admin_address(self) -> str:
        """Empty where there is none."""
        if self.admin_socket is not None:
            return f"unix:{self.admin_socket}"
        return self.of_admin().address if self.admin_port is not None else ""

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def socket_for(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)


def free_port(config: ServeConfig, *, parameter: str = "port") -> int:
    """The port to listen on, a free one for 0. Raises UsageError where any server listens, shared or not."""
    try:
        with socket_for(config.host) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a crash left in TIME_WAIT is no server
            probe.bind((config.host, config.port))
            port: int = probe.getsockname()[1]
            return port
    except OSError as error:
        raise cannot_listen(config, error.strerror or str(error), parameter=parameter) from None


def cannot_listen(config: ServeConfig, reason: str, *, parameter: str) -> UsageError:
    return UsageError(
        f"cannot listen on {config.address}: {reason}",
        "stop the other server or choose another port",
        parameter=parameter,
    )
