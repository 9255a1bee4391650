"""The settings of a client."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdk import AsyncClient, Client, InvalidArgumentError, ResourceExhaustedError

from .awaited import Connect
from .fake_server import Recorder

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"target": ""}, "target must be an address"),
        ({"timeout": -1}, "timeout must be a positive"),
        ({"timeout": float("inf")}, "timeout must be a positive"),
        ({"timeout": None}, "timeout must be a number of seconds, not NoneType"),
        ({"retries": -1}, "retries must not be negative"),
        ({"retries": 1.5}, "retries must be an integer"),
        ({"metadata": [("Authorization", "x")]}, "metadata keys are lower-case"),
        ({"metadata": {"token": "x"}}, "metadata must be pairs"),
        ({"options": ["grpc.enable_retries"]}, "options must be pairs"),
        ({"metadata": [("token", b"x")]}, "metadata 'token' must be printable ASCII"),
        ({"metadata": [("token", "line\nbreak")]}, "metadata 'token' must be printable ASCII"),
        ({"metadata": [("token-bin", "x")]}, "metadata 'token-bin' must be bytes"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings: dict[str, Any], complaint: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidArgumentError, match=complaint):
            kind(**settings)


async def test_metadata_goes_with_every_call_and_is_not_shown(
    server: SimpleNamespace, connect: Connect, recorder: Recorder
) -> None:
    client = connect(server.target, metadata=[("authorization", "Bearer s3cret"), ("trace-bin", b"\0\1")])
    await client.update("anna", 1)
    await client.recommend("anna")
    for seen in recorder.seen:
        assert seen.metadata["authorization"] == "Bearer s3cret" and seen.metadata["trace-bin"] == b"\0\1"
    assert "s3cret" not in repr(client.client) + repr(client.client._settings)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_every_setting_is_documented(kind: type) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "sdk.md").read_text(encoding="utf-8")
    names = [*inspect.signature(kind).parameters]
    assert len(names) == 13
    for name in names:
        assert f"\n    {name}: " in (kind.__init__.__doc__ or "")  # type: ignore[misc]
        assert f"`{name}`" in guide


@pytest.mark.slow
async def test_a_message_over_the_limit_is_resource_exhausted(
    server: SimpleNamespace, connect: Connect, recorder: Recorder
) -> None:
    with pytest.raises(ResourceExhaustedError, match=r"larger than max.*Split a large batch"):
        await connect(server.target).update("anna", ["x" * (17 << 20)])
    assert not recorder.seen
    with pytest.raises(ResourceExhaustedError, match="larger than max"):
        await connect(server.target, options=[("grpc.max_receive_message_length", 10)]).recommend("anna")
