"""SECURITY.md is true: its commands make files that work, its file is read, its roles and options are the real ones."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest
from conftest import ROOT

from dman_runtime import cli
from dman_runtime.access.callers import Access, role_for
from dman_runtime.access.certificates import CertificateFiles, read_certificates
from dman_runtime.access.tls import server_credentials
from dman_runtime.access.tokens import parse_tokens

PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SCRIPTS = [block for block in BLOCKS if "openssl" in block]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A directory with what the commands of the page made."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command")
    assert len(SCRIPTS) == 2
    script = "set -e\n" + "\n".join(SCRIPTS)
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return tmp_path


async def test_commands_make_certificates_with_which_client_and_server_meet(made: Path) -> None:
    files = CertificateFiles(made / "server.pem", made / "server.key", made / "ca.pem")
    assert read_certificates(files).client_ca is not None
    assert files.key.stat().st_mode & 0o077 == 0
    access = Access.open(None)

    async def who(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return access.identify((), context.auth_context(), context.peer()).name.encode()

    server = grpc.aio.server()
    handlers = {"Who": grpc.unary_unary_rpc_method_handler(who)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(files.cert, files.key, files.client_ca))
    await server.start()
    try:
        pem = [(made / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem")]
        for host in ("localhost", "127.0.0.1"):
            async with grpc.aio.secure_channel(f"{host}:{port}", grpc.ssl_channel_credentials(*pem)) as channel:
                assert await channel.unary_unary("/test.Test/Who")(b"", timeout=10) == b"Ingest Service"
    finally:
        await server.stop(None)


def test_token_file_of_the_page_is_read_but_opens_nothing_when_copied() -> None:
    block = next(block for block in BLOCKS if "sha256:" in block)
    with pytest.raises(ValueError, match="not 64 hexadecimal digits"):
        parse_tokens(block, source="SECURITY.md")
    numbers = iter(range(1, 10))
    text = re.sub(r"<[^>]*>", lambda _: f"{next(numbers):064x}", block)
    assert len(parse_tokens(text, source="SECURITY.md")) == 3


def test_roles_of_the_page_are_the_real_ones() -> None:
    for role in ("read", "write"):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{role}` |"))
        methods = re.findall(r"\b[A-Z][A-Za-z]+\b", row)
        assert methods
        assert {role_for(f"/dman.v1.Recommender/{method}") for method in methods} == {role}
    assert role_for("/dman.v1.Recommender/DeleteUser") == "admin"


def test_options_of_the_page_exist() -> None:
    source = Path(cli.__file__).read_text(encoding="utf-8")
    serve = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", source))
    named = set(re.findall(r"--[a-z]+(?:-[a-z]+)+|--(?:host|tokens|insecure)\b", PAGE))
    assert {"--insecure", "--tls-cert", "--tls-key", "--tls-client-ca", "--tokens", "--caller-requests"} <= named
    assert named <= serve
