"""Where a client connects: one gRPC name, or several servers, each of which serves every user.

Of several, a user is kept on one, as that has what it knows of the user in memory: by gRPC's ring hash (without xDS)
over a header that every call of one user carries. If that server is gone, its users go to others, and all others stay.
The same header lets a proxy such as Envoy do the same.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from sdk._access import host_and_port, is_local
from sdk._exceptions import InvalidArgumentError

USER_HEADER = "dman-user"  # a hash of the user id, so that ids are in nobody's access log
_RING_HASH = "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"  # gRPC hashes a header only where this is "true"
_POLICY = {"loadBalancingConfig": [{"ring_hash_experimental": {"requestHashHeader": USER_HEADER}}]}
_MOST_SERVERS = 1000


def user_pair(user_id: str) -> tuple[str, str]:
    """The metadata that routes the calls of a user."""
    return USER_HEADER, hashlib.blake2b(user_id.encode(), digest_size=8).hexdigest()


class LookupFailedError(grpc.RpcError):
    """The name of a server is not known now. Within a client it counts as an answer of gRPC."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return f"looking up {self.args[0]} failed: {self.args[1]}"


@dataclass(frozen=True, slots=True)
class Servers:
    """The checked target of a client, made by `servers`."""

    names: tuple[str, ...]
    several: bool  # they were given as a list

    def __str__(self) -> str:
        return ",".join(self.names)

    @property
    def local(self) -> bool:
        """Whether gRPC certainly connects to this machine."""
        return all(is_local(name) for name in self.names)

    def options(self) -> dict[str, Any]:
        """Channel options."""
        found: dict[str, Any] = {}
        if self.local or len(self.names) > 1:
            # Else gRPC would use the proxy of the environment for this machine too, and send a token there in plain
            # text; and of several servers it would ask a proxy as of one.
            found["grpc.enable_http_proxy"] = 0
        if self.several:
            found["grpc.service_config"] = json.dumps(_POLICY)
        if len(self.names) > 1:
            found["grpc.default_authority"] = self.names[0]  # else the first address would be the name of all
        return found

    def address(self) -> str:
        """What gRPC is to connect to. Looks names up, which may take seconds. Raises LookupFailedError."""
        if not self.several:
            return self.names[0]
        os.environ.setdefault(_RING_HASH, "true")
        if len(self.names) == 1:
            return f"dns:///{self.names[0]}"  # gRPC looks again where a connection breaks
        return _addresses([_looked_up(name) for name in self.names])


def servers(target: str | Iterable[str]) -> Servers:
    """Raises InvalidArgumentError."""
    if isinstance(target, str):
        if not target:
            raise InvalidArgumentError("target must be an address such as 'localhost:50051', not ''.")
        return Servers((target,), several=False)
    try:
        names = tuple(target)
    except TypeError:
        raise InvalidArgumentError(
            f"target must be an address such as 'localhost:50051', or a list of them, not {target!r:.80}."
        ) from None
    if not 1 <= len(names) <= _MOST_SERVERS:
        raise InvalidArgumentError(
            f"target must be an address, or a list of 1 to {_MOST_SERVERS}, not of {len(names)}."
        )
    for position, name in enumerate(names):
        if not isinstance(name, str) or host_and_port(name) is None:
            raise InvalidArgumentError(f"target[{position}] must be 'host:port', not {name!r:.80}.")
    if len(set(names)) < len(names):
        raise InvalidArgumentError("target names a server twice.")
    return Servers(names, several=True)


def _looked_up(name: str) -> dict[socket.AddressFamily, tuple[str, int]]:
    """The first address of a server of each kind. Raises LookupFailedError."""
    parts = host_and_port(name)
    assert parts is not None
    found: dict[socket.AddressFamily, tuple[str, int]] = {}
    try:
        addresses = socket.getaddrinfo(*parts, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LookupFailedError(name, error.strerror or "unknown") from None
    for family, _, _, _, address in addresses:
        found.setdefault(family, (str(address[0]), int(address[1])))
    return found


def _addresses(found: Sequence[dict[socket.AddressFamily, tuple[str, int]]]) -> str:
    """A gRPC name of several addresses, which must be of one kind."""
    for family, scheme, form in ((socket.AF_INET, "ipv4", "{}:{}"), (socket.AF_INET6, "ipv6", "[{}]:{}")):
        if all(family in one for one in found):
            return f"{scheme}:" + ",".join(form.format(*one[family]) for one in found)
    raise LookupFailedError("the servers", "some have IPv4 addresses only, others IPv6")
