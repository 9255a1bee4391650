"""Which proxy gRPC connects through, by the rules of its `http_proxy_mapper.cc`. For error messages only."""

import ipaddress
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")  # the first that is set counts, even if it is empty
EXCEPTION_VARIABLES = ("no_grpc_proxy", "no_proxy")
_SCHEMES = ("dns", "ipv4", "ipv6")


def proxy_remedy(target: str, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> str:
    """A sentence that names the proxy, where it came from, and how to do without. Empty where there is none."""
    if not options.get("grpc.enable_http_proxy", 1) or target.startswith(("unix:", "unix-abstract:", "vsock:")):
        return ""
    given = options.get("grpc.http_proxy")
    source = next((name for name in PROXY_VARIABLES if name in environ), None)
    value = str(given) if given is not None else environ[source] if source is not None else ""
    proxy, host = _address(value), _host(target)
    if proxy is None or _is_excepted(host, environ):
        return ""
    where = "the option grpc.http_proxy" if given is not None else f"the variable {source}"
    return (
        f"The connection goes through the proxy http://{proxy} of {where}. If the server is reached without it, add "
        f"{host} to the variable no_proxy."
    )


def _address(value: str) -> str | None:
    """Host and port of a proxy that gRPC takes, without user and password."""
    try:
        parts = urlsplit(value.strip())
    except ValueError:
        return None
    return parts.netloc.rpartition("@")[2] or None if parts.scheme == "http" else None


def _host(target: str) -> str:
    scheme, separator, rest = target.partition(":")
    if separator and scheme.lower() in _SCHEMES:
        target = rest.rpartition("/")[2]
    if target.startswith("["):
        return target[1:].partition("]")[0]
    return target.partition(":")[0] if target.count(":") == 1 else target


def _is_excepted(host: str, environ: Mapping[str, str]) -> bool:
    source = next((name for name in EXCEPTION_VARIABLES if name in environ), None)
    entries = environ[source].split(",") if source is not None else []
    return any(_covers(entry.strip(), host) for entry in entries if entry)


def _covers(entry: str, host: str) -> bool:
    """Whether an entry is the end of the host's name, or a network that has its address."""
    if host.lower().endswith(entry.lower()):
        return True
    try:
        return "/" in entry and ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
