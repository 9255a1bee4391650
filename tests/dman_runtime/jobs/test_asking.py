"""`ask_status` against real servers: plain, with tokens, with TLS, not ready, and away."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from access_files import write_certificate, write_lines
from conftest import running, serve_config

from dman_runtime.access.tokens import new_token
from dman_runtime.errors import UsageError
from dman_runtime.jobs.asking import MAX_TOKEN_BYTES, Server, ask_status, format_status
from dman_runtime.serving.app import App
from tools.faults.servers import free_port

TIMEOUT = 30.0


@contextmanager
def serving(bundle: Path, state: Path, **options: Any) -> Iterator[tuple[App, str]]:
    """An app, and the address to ask by name."""
    with running(App(serve_config(bundle, state, **options))) as app:
        yield app, f"localhost:{app.port}"


@pytest.fixture(scope="module")
def plain(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[App, str]]:
    with serving(tiny_bundle, tmp_path_factory.mktemp("plain") / "state") as served:
        yield served


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A server with TLS and tokens, and the files of those who may ask it, or not."""
    directory, authority = tmp_path_factory.mktemp("guarded"), trustme.CA()
    cert, key = write_certificate(authority.issue_cert("localhost", "127.0.0.1"), directory, "server")
    (ca := directory / "ca.pem").write_bytes(authority.cert_pem.bytes())
    (other := directory / "other.pem").write_bytes(trustme.CA().cert_pem.bytes())
    lines = []
    for name in ("admin", "read"):
        token, line = new_token(name, [name])
        (directory / name).write_text(f"{token}\n")
        lines.append(line)
    tokens = write_lines(directory / "tokens.txt", *lines)
    options = {"tls_cert": cert, "tls_key": key, "tokens": tokens}
    with serving(tiny_bundle, directory / "state", **options) as (_, target):
        yield {"target": target, "ca": ca, "other": other, "admin": directory / "admin", "read": directory / "read"}


def refusal(target: str, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        ask_status(Server(target, **{"timeout": TIMEOUT, **options}))
    message = str(caught.value)
    assert message == message.strip() and "\n" not in message and not message.endswith(".")
    return caught.value


# -- answers ---------------------------------------------------------------------------------------------------------


def test_a_server_without_problems_is_ready(plain: tuple[App, str]) -> None:
    app, target = plain
    status = ask_status(Server(target, timeout=TIMEOUT))
    assert (status["ready"], list(status["problems"]), status["bundle_id"]) == (True, [], app.generation.bundle_id)
    assert (status["workers"], status["workers_ready"], status["restarts"]) == (1, 1, 0)
    (line,) = format_status(status).splitlines()
    assert line.startswith(f"ready: bundle {app.generation.bundle_id}, 1 of 1 workers, 0 restarts, 1 requests, ")


def test_a_server_that_cannot_serve_is_not_ready_and_says_why(plain: tuple[App, str]) -> None:
    app, target = plain
    app.problems.set("store_gone", "the files were removed; restore them", blocking=True)
    app.problems.set("worker_slow", "it takes long")
    try:
        status = ask_status(Server(target, timeout=TIMEOUT))
    finally:
        app.problems.set("store_gone", "")
        app.problems.set("worker_slow", "")
    assert not status["ready"]
    first, second, third = format_status(status).splitlines()
    assert first.startswith("NOT READY: bundle ")
    assert second == "store_gone for 0 s, blocking: the files were removed; restore them"
    assert third == "worker_slow for 0 s: it takes long"


def test_a_server_with_tls_and_tokens_is_asked_with_both(guarded: dict[str, Any]) -> None:
    status = ask_status(Server(guarded["target"], ca=guarded["ca"], token_file=guarded["admin"], timeout=TIMEOUT))
    assert status["ready"]


@pytest.mark.slow
def test_a_server_that_wants_a_certificate_gets_one(tiny_bundle: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    cert, key = write_certificate(authority.issue_cert("localhost"), tmp_path, "server")
    client_cert, client_key = write_certificate(authority.issue_cert("ops", common_name="ops"), tmp_path, "client")
    (ca := tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    options = {"tls_cert": cert, "tls_key": key, "tls_client_ca": ca}
    with serving(tiny_bundle, tmp_path / "state", **options) as (_, target):
        server = Server(target, ca=ca, client_cert=client_cert, client_key=client_key, timeout=TIMEOUT)
        assert ask_status(server)["ready"]
        refusal(target, ca=ca, timeout=2.0)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_server_that_is_away_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    error = refusal(f"127.0.0.1:{port}", timeout=1.0)
    assert error.parameter == "target"
    assert f"127.0.0.1:{port}" in str(error)


def test_a_server_that_accepts_and_says_nothing_is_not_waited_for_without_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        refusal(f"127.0.0.1:{silent.getsockname()[1]}", timeout=1.0)


def test_a_caller_without_the_role_or_a_token_is_told_so(guarded: dict[str, Any]) -> None:
    assert "lacks the role admin" in str(refusal(guarded["target"], ca=guarded["ca"], token_file=guarded["read"]))
    assert "no token" in str(refusal(guarded["target"], ca=guarded["ca"]))


def test_a_server_whose_certificate_is_not_known_gets_no_token(guarded: dict[str, Any]) -> None:
    refusal(guarded["target"], ca=guarded["other"], token_file=guarded["admin"], timeout=2.0)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\n", "schlüssel".encode(), b"\xff\xfe", b"two\nlines", b"\0" * 10, b"x" * MAX_TOKEN_BYTES * 2],
    ids=["missing", "empty", "blank", "not ASCII", "not text", "two lines", "zeros", "too long"],
)
def test_a_token_file_that_holds_no_token_is_refused_and_not_shown(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    error = refusal("localhost:1", token_file=file, timeout=1.0)
    assert str(error) == f"{file} holds no token; name a readable file with one"
    assert error.parameter == "token_file"


def test_a_token_file_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    assert refusal("localhost:1", token_file=tmp_path, timeout=1.0).parameter == "token_file"


@pytest.mark.parametrize("option", ["ca", "client_cert", "client_key"])
def test_a_certificate_file_that_is_missing_is_named(tmp_path: Path, option: str) -> None:
    missing = tmp_path / "missing.pem"
    others = {"ca": {}, "client_cert": {"client_key": missing}, "client_key": {"client_cert": missing}}[option]
    error = refusal("localhost:1", **{option: missing, **others}, timeout=1.0)
    assert str(missing) in str(error)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    refusal("localhost:1", timeout=timeout)


@pytest.mark.parametrize("target", ["", "localhost:port", "no such host:1"])
def test_a_target_that_is_no_address_is_refused(target: str) -> None:
    assert refusal(target, timeout=1.0).parameter == "target"


def test_a_token_is_not_sent_in_plain_text_beyond_this_machine(tmp_path: Path) -> None:
    (token := tmp_path / "token").write_text("xyzzy")
    error = refusal("example.invalid:1", token_file=token, timeout=1.0)
    assert "xyzzy" not in str(error) and "in plain text" in str(error)
