"""Who may call what, over every method of every service: a new one fails here until somebody says who may call it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from access_files import write_lines
from conftest import running, serve_config
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from dman_runtime.access.callers import _ROLE_OF_METHOD, role_for
from dman_runtime.access.tokens import new_token
from dman_runtime.serving.app import App
from protos.dman.v1 import dman_pb2 as pb

FILES = (pb.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
}
ROLES = {  # None: anybody
    "/dman.v1.Recommender/Update": "write",
    "/dman.v1.Recommender/BatchUpdate": "write",
    "/dman.v1.Recommender/Recommend": "read",
    "/dman.v1.Recommender/BatchRecommend": "read",
    "/dman.v1.Recommender/GetUser": "read",
    "/dman.v1.Recommender/GetHistory": "read",
    "/dman.v1.Recommender/DeleteUser": "admin",
    "/dman.v1.Operations/GetStatus": "admin",
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/List": None,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "admin",
}
GUARDED = [path for path, role in ROLES.items() if role is not None]
OPEN = [path for path, role in ROLES.items() if role is None]
REQUESTS: dict[str, Any] = {
    "Update": pb.UpdateRequest(user_id="anna", events=[pb.Event(item_id="1")]),
    "BatchUpdate": pb.BatchUpdateRequest(updates=[pb.UpdateRequest(user_id="bert")]),
    "GetUser": pb.GetUserRequest(user_id="known"),
    "GetHistory": pb.GetHistoryRequest(user_id="known"),
    "DeleteUser": pb.DeleteUserRequest(user_id="nobody"),
    "ServerReflectionInfo": reflection_pb2.ServerReflectionRequest(list_services=""),
}  # the others may be empty
OTHER_ROLES = {"read": "write", "write": "read", "admin": "read,write"}


class Tokens:
    """One caller for each list of roles."""

    def __init__(self, directory: Path) -> None:
        made = {
            roles: new_token(roles.replace(",", "-"), roles.split(",")) for roles in ("admin", *OTHER_ROLES.values())
        }
        self.of = {roles: token for roles, (token, _) in made.items()}
        self.file = write_lines(directory / "tokens.txt", *(line for _, line in made.values()))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return Tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def channel(tiny_bundle: Path, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    config = serve_config(tiny_bundle, tmp_path_factory.mktemp("access") / "state", tokens=tokens.file)
    with running(App(config)) as app, grpc.insecure_channel(f"127.0.0.1:{app.port}") as opened:
        known = pb.UpdateRequest(user_id="known", events=[pb.Event(item_id="1")])
        assert outcome(opened, "/dman.v1.Recommender/Update", tokens.of["write"], message=known) == ("OK", "")
        yield opened


@pytest.fixture(scope="module")
def limited(tiny_bundle: Path, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    """A server where every caller has one request, which the administrator has made."""
    state = tmp_path_factory.mktemp("limited") / "state"
    config = serve_config(tiny_bundle, state, tokens=tokens.file, caller_requests=0.0001)
    with running(App(config)) as app, grpc.insecure_channel(f"127.0.0.1:{app.port}") as opened:
        assert outcome(opened, "/dman.v1.Recommender/Recommend", tokens.of["admin"]) == ("OK", "")
        yield opened


def outcome(channel: grpc.Channel, path: str, token: str | None, *, message: Any = None) -> tuple[str, str]:
    """Status and details of a call, or of its first reply where it is a stream that stays open."""
    if message is None:
        message = REQUESTS.get(METHODS[path].name) or GetMessageClass(METHODS[path].input_type)()
    metadata = [("authorization", f"Bearer {token}")] if token is not None else []
    # On the wire, a method with one message is a stream of one.
    call = channel.stream_stream(path)(iter([message.SerializeToString()]), timeout=30, metadata=metadata)
    try:
        next(call)
    except grpc.RpcError as error:
        assert not re.search(r"Traceback|\.py\b|/tmp|/work", error.details())
        return error.code().name, error.details()
    finally:
        call.cancel()
    return "OK", ""


def test_every_method_has_a_role_here_and_in_the_server() -> None:
    assert set(ROLES) == set(METHODS)
    assert _ROLE_OF_METHOD == ROLES
    assert role_for("/dman.v1.Recommender/New") == "admin"  # until somebody says who may call it


@pytest.mark.parametrize("path", GUARDED)
def test_a_call_without_a_token_or_with_a_wrong_one_is_unauthenticated(channel: grpc.Channel, path: str) -> None:
    assert outcome(channel, path, None) == (
        "UNAUTHENTICATED",
        "the call has no token; send the metadata authorization: Bearer <token>",
    )
    code, details = outcome(channel, path, "wrong")
    assert code == "UNAUTHENTICATED" and "does not know this token" in details


@pytest.mark.parametrize("path", GUARDED)
def test_a_caller_without_the_role_is_denied(channel: grpc.Channel, tokens: Tokens, path: str) -> None:
    role = ROLES[path]
    assert role is not None
    code, details = outcome(channel, path, tokens.of[OTHER_ROLES[role]])
    assert code == "PERMISSION_DENIED" and f"lacks the role {role}" in details


@pytest.mark.parametrize("path", GUARDED)
def test_a_caller_with_the_role_is_served(channel: grpc.Channel, tokens: Tokens, path: str) -> None:
    assert outcome(channel, path, tokens.of[ROLES[path] or ""]) == ("OK", "")


@pytest.mark.parametrize("path", OPEN)
@pytest.mark.parametrize("token", [None, "wrong"])
def test_anybody_may_ask_for_health(channel: grpc.Channel, path: str, token: str | None) -> None:
    assert outcome(channel, path, token) == ("OK", "")


@pytest.mark.parametrize("path", GUARDED)
def test_a_caller_over_the_limit_is_refused(limited: grpc.Channel, tokens: Tokens, path: str) -> None:
    code, details = outcome(limited, path, tokens.of["admin"])
    assert code == "RESOURCE_EXHAUSTED"
    assert re.fullmatch(r"the limit of 0\.0001 requests per second is reached; try again in [\d.]+ seconds", details)


@pytest.mark.parametrize("path", OPEN)
def test_health_has_no_limit(limited: grpc.Channel, path: str) -> None:
    for _ in range(3):
        assert outcome(limited, path, None) == ("OK", "")
