"""The examples of docs/sdk.md work."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from .certificates import Pki, certificate, key

pytestmark = pytest.mark.timeout(90)
ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "sdk.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
REMOTE = "recommender.example:50051"


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_of_the_guide_works(
    server: SimpleNamespace,
    mtls_server: SimpleNamespace,
    *,
    pki: Pki,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    example: str,
) -> None:
    """What is local in the guide is a plain server here, what is remote asks for TLS and a certificate."""
    files = {
        "ca.pem": pki.authority,
        "client.pem": certificate(pki.client),
        "client.key": key(pki.client),
        "token": b"t0ken\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    code = re.sub("localhost:5005[12]", server.target, example).replace(REMOTE, mtls_server.target)
    code = re.sub(r'\["host1:.*?\]', f'["{server.target}"]', code)
    if "__main__" in code:  # other processes import it
        (tmp_path / "example.py").write_text(code, encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "example.py"], env=environment, cwd=tmp_path, timeout=60, check=True)
    else:
        names: dict[str, object] = {}
        exec(compile(code, "docs/sdk.md", "exec"), names)  # our own document
        if "main" in names:
            asyncio.run(names["main"]())  # type: ignore[operator]
    assert server.recorder.seen or mtls_server.recorder.seen


def test_guide_has_an_example_of_each_kind() -> None:
    assert len(EXAMPLES) >= 5
    for word in (
        "history(",
        "unit=",
        "ProcessPoolExecutor",
        "AsyncClient",
        "request_id=error.request_id",
        "ca_certificate=",
        "client_key=",
        "status()",
        "AdminClient",
    ):
        assert any(word in example for example in EXAMPLES)
