"""Two hosts on one machine: network namespaces, joined by a cable of their own. Needs root and `ip` (iproute2)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

INTERFACE = "cable"  # the end of the cable, in either host


@dataclass(frozen=True)
class Host:
    """A namespace, which shares nothing of the network with the machine: not even its loopback."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """The command line that runs another one on this host."""
        return ["ip", "netns", "exec", self.name, *words]


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Hosts that reach each other at their addresses. Skips the test, with the reason, where there can be none."""
    if os.geteuid():
        pytest.skip("only root can make network namespaces")
    if not shutil.which("ip"):
        pytest.skip("there is no `ip` here: apt-get install iproute2")
    hosts = tuple(Host(f"dman-{os.getpid()}-{number}", f"10.77.0.{number}") for number in (1, 2))
    made = []
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            made.append(host)
        first, second = hosts
        # Both ends are made inside the namespaces: names of the machine's own interfaces do not matter.
        _ip("-n", first.name, "link", "add", INTERFACE, "type", "veth", "peer", INTERFACE, "netns", second.name)
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield first, second
    finally:
        for host in made:
            _ip("netns", "delete", host.name)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True, timeout=20)
    if "Operation not permitted" in done.stderr:
        pytest.skip(f"this root may not make network namespaces: {done.stderr.strip()}")
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
