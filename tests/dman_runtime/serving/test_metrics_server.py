"""The endpoint for metrics: one path, one method, and clients that do not behave."""

from __future__ import annotations

import http.client
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from dman_runtime.errors import UsageError
from dman_runtime.serving import metrics_server
from dman_runtime.serving.metrics_server import MAX_CONNECTIONS, MetricsServer, serve_metrics


def registry(samples: int = 1) -> CollectorRegistry:
    found = CollectorRegistry()
    Counter("one", "One", registry=found).inc(42)
    many = Gauge("many", "Many", ["number"], registry=found)
    for number in range(samples):
        many.labels(f"{number}" * 100).set(number)
    return found


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    running = serve_metrics(registry(), host="127.0.0.1", port=0)
    yield running
    running.stop()


def get(server: MetricsServer, path: str = "/metrics", *, timeout: float = 10.0) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=timeout) as reply:
        found: str = reply.read().decode()
    return found


def connect(server: MetricsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def test_get_metrics_gives_them(server: MetricsServer) -> None:
    assert "one_total 42.0" in get(server) and "one_total 42.0" in get(server, "/metrics?name[]=one_total")


@pytest.mark.parametrize("path", ["/", "/metrics/", "/favicon.ico", "/metrics/../etc/passwd"])
def test_nothing_else_is_there(server: MetricsServer, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(server, path)
    with caught.value as reply:
        assert reply.code == 404 and "Python" not in str(reply.headers) + reply.read().decode()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "ODD"])
def test_no_other_method_is_answered(server: MetricsServer, method: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, "/metrics")
    reply = connection.getresponse()
    assert reply.status == 501 and b"one_total" not in reply.read()
    connection.close()


def test_a_taken_port_is_an_error_that_names_the_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError) as caught:
        serve_metrics(registry(), host="127.0.0.1", port=taken.getsockname()[1])
    assert caught.value.parameter == "metrics_port" and "Address already in use" in caught.value.cause


@pytest.mark.parametrize(
    ("host", "port", "parameter"), [("127.0.0.1", 70000, "metrics_port"), ("no such host", 0, "metrics_host")]
)
def test_an_address_that_cannot_be_is_an_error_that_names_the_option(host: str, port: int, parameter: str) -> None:
    with pytest.raises(UsageError) as caught:
        serve_metrics(registry(), host=host, port=port)
    assert caught.value.parameter == parameter


def test_stopping_frees_the_port_and_does_not_wait_for_idle_clients() -> None:
    running = serve_metrics(registry(), host="127.0.0.1", port=0)
    with connect(running):
        started = time.monotonic()
        running.stop()
        assert time.monotonic() - started < 3
        with pytest.raises(OSError):
            connect(running)


def test_100_idle_connections_do_not_keep_a_scraper_out_and_hold_few_threads(server: MetricsServer) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(connect(server))
        for _ in range(5):
            assert "one_total 42.0" in get(server, timeout=3)
        deadline = time.monotonic() + 5
        while threading.active_count() > before + MAX_CONNECTIONS and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= before + MAX_CONNECTIONS


def test_clients_that_send_or_read_nothing_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server._Handler, "timeout", 0.3)
    running = serve_metrics(registry(samples=20_000), host="127.0.0.1", port=0)
    try:
        with connect(running) as idle, connect(running) as half, connect(running) as slow:
            half.sendall(b"GET /metr")
            slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")  # megabytes, of which it reads nothing
            assert "one_total 42.0" in get(running)
            for silent in (idle, half):
                assert silent.recv(1) == b""
            deadline = time.monotonic() + 10
            while running._open and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not running._open
    finally:
        running.stop()
