"""Who calls and what they may: with and without a token file, and while the file changes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from access_files import write_lines

from dman_runtime.access.callers import Access, role_for
from dman_runtime.access.tokens import ROLES, Caller, Role, new_token, token_digest
from dman_runtime.errors import DmanError, ForbiddenError, InputError, UnauthenticatedError
from protos.dman.v1 import admin_pb2
from protos.dman.v1 import dman_pb2 as pb

PEER = "ipv4:127.0.0.1:4711"
CERTIFICATE: Mapping[str, list[bytes]] = {"x509_common_name": [b"Ingest Service"], "transport_security_type": [b"ssl"]}
TOKEN = "a-token-that-never-changes-as-it-is-in-the-names-of-tests"
LINE = f"shop  read  sha256:{token_digest(TOKEN).hex()}"


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("user-agent", "test"), ("authorization", f"Bearer {token}"))


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "tokens", LINE, "ingest write cn:Ingest Service")


@pytest.fixture
def access(tokens: Path) -> Access:
    return Access.open(tokens)


def refused(access: Access, metadata: object, auth_context: Mapping[str, list[bytes]] | None = None) -> str:
    with pytest.raises(UnauthenticatedError) as caught:
        access.identify(metadata, auth_context or {}, PEER)  # type: ignore[arg-type]
    assert caught.value.status == "UNAUTHENTICATED" and caught.value.public is None
    return str(caught.value)


def test_without_token_file_everybody_may_do_everything_under_the_name_of_the_connection() -> None:
    access = Access.open(None)
    assert access.open_to_all
    assert access.identify(bearer("whatever"), {}, PEER) == Caller(PEER, ROLES)
    assert access.identify((), CERTIFICATE, PEER) == Caller("Ingest Service", ROLES)
    assert access.reload() is None


def test_token_tells_the_caller(access: Access) -> None:
    assert not access.open_to_all
    assert access.identify(bearer(TOKEN), {}, PEER) == Caller("shop", frozenset({"read"}))


@pytest.mark.parametrize("header", [f"bearer {TOKEN}", f"BEARER {TOKEN}", f"Bearer  {TOKEN} "])
def test_scheme_is_read_in_any_case(header: str, access: Access) -> None:
    assert access.identify((("authorization", header),), {}, PEER).name == "shop"


def test_common_name_tells_the_caller_where_there_is_no_token(access: Access) -> None:
    assert access.identify((), CERTIFICATE, PEER) == Caller("ingest", frozenset({"write"}))
    assert access.identify(bearer(TOKEN), CERTIFICATE, PEER).name == "shop"


def test_call_without_token_or_known_certificate_is_refused(access: Access) -> None:
    assert refused(access, ()) == "the call has no token; send the metadata authorization: Bearer <token>"
    for names in ([b"Somebody"], [b"ingest service"]):
        assert "does not know the client's certificate" in refused(access, (), {"x509_common_name": names})
    for unusable in ([], [b""], [b"\xff"], [b"Ingest Service", b"Ingest Service"]):
        assert "has no token" in refused(access, (), {"x509_common_name": unusable})


def test_wrong_token_is_refused_even_with_a_good_certificate_and_is_not_repeated(access: Access) -> None:
    message = refused(access, bearer(TOKEN[:-1]), CERTIFICATE)
    assert message == "the server does not know this token; ask its operator for a new one"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, f"Bearer{TOKEN}", TOKEN.encode()])
def test_other_authorizations_are_refused(header: str | bytes, access: Access) -> None:
    assert "metadata authorization cannot be read" in refused(access, (("authorization", header),))


@pytest.mark.parametrize("token", ["é" * 40, "\udcff", "\x00", "x" * 100_000, f"{TOKEN} {TOKEN}"])
def test_odd_tokens_are_refused_like_unknown_ones(token: str, access: Access) -> None:
    assert "does not know this token" in refused(access, bearer(token))


def test_two_tokens_are_refused(access: Access) -> None:
    assert "send it once" in refused(access, (*bearer(TOKEN), *bearer(TOKEN)))


def test_hash_is_no_token(access: Access) -> None:
    assert "does not know this token" in refused(access, bearer(LINE.rpartition(":")[2]))


# -- roles -----------------------------------------------------------------------------------------------------------


def test_caller_without_the_role_is_forbidden(access: Access) -> None:
    shop = access.identify(bearer(TOKEN), {}, PEER)
    access.require(shop, "read")
    for role in ("write", "admin"):
        with pytest.raises(
            ForbiddenError, match=f"^shop lacks the role {role}; ask the operator of the server for it$"
        ):
            access.require(shop, role)  # type: ignore[arg-type]
    assert ForbiddenError.status == "PERMISSION_DENIED" and ForbiddenError.public is None


EXPECTED: dict[str, Role] = {
    "/dman.v1.Recommender/Recommend": "read",
    "/dman.v1.Recommender/BatchRecommend": "read",
    "/dman.v1.Recommender/GetUser": "read",
    "/dman.v1.Recommender/GetHistory": "read",
    "/dman.v1.Recommender/Update": "write",
    "/dman.v1.Recommender/BatchUpdate": "write",
    "/dman.v1.Recommender/DeleteUser": "admin",
    "/dman.v1.Operations/GetStatus": "admin",
    **{
        f"/dman.v1.Admin/{name}": "admin"
        for name in (
            "ListGenerations",
            "GetRollout",
            "Rebuild",
            "Activate",
            "Drop",
            "Backup",
            "ExportUser",
            "Expire",
            "Verify",
            "SwitchItems",
            "ListItemsOff",
            "AddItems",
        )
    },
}


def test_every_rpc_of_ours_needs_a_role_and_none_is_forgotten() -> None:
    services = [one for file in (pb, admin_pb2) for one in file.DESCRIPTOR.services_by_name.values()]
    ours = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert {method: role_for(method) for method in ours} == EXPECTED


def test_health_needs_no_role_and_what_is_unknown_needs_admin() -> None:
    assert role_for("/grpc.health.v1.Health/Check") is None
    assert role_for("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo") == "admin"
    assert role_for("/dman.v1.Recommender/New") == "admin"


# -- changes of the file ---------------------------------------------------------------------------------------------


def test_changed_file_is_read_again_and_a_removed_token_stops_working(access: Access, tokens: Path) -> None:
    assert access.reload() is None
    token, line = new_token("report", ["admin"])
    write_lines(tokens, line)
    assert access.identify(bearer(TOKEN), {}, PEER).name == "shop"  # until it is read
    assert access.reload() is None
    assert access.identify(bearer(token), {}, PEER).name == "report"
    assert "does not know this token" in refused(access, bearer(TOKEN))


def test_change_that_leaves_time_and_size_alone_is_seen(tmp_path: Path) -> None:
    first, second = new_token("shop", ["read"]), new_token("shop", ["read"])
    path = write_lines(tmp_path / "tokens", first[1])
    access, before = Access.open(path), path.stat()
    with path.open("r+") as file:  # in place: the inode stays too
        file.write(second[1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert access.reload() is None
    assert access.identify(bearer(second[0]), {}, PEER).name == "shop"
    assert "does not know this token" in refused(access, bearer(first[0]))


def test_file_that_stays_is_not_read_again(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access, reads = Access.open(tokens), []
    monkeypatch.setattr("dman_runtime.access.files._SETTLED_NS", 0)
    assert access.reload() is None  # settles
    monkeypatch.setattr("dman_runtime.access.callers.read_tokens", reads.append)
    assert access.reload() is None and access.reload() is None
    assert reads == []


def test_last_caller_can_be_removed(access: Access, tokens: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tokens, "# nobody")
    assert access.reload() is None
    assert "does not know this token" in refused(access, bearer(TOKEN))
    assert "names no caller: every call is refused" in caplog.text


def spoil(tokens: Path, how: str) -> None:
    if how == "missing":
        tokens.unlink()
    elif how == "directory":
        tokens.unlink()
        tokens.mkdir()
    else:
        write_lines(tokens, LINE, "half a li")


@pytest.mark.parametrize("how", ["missing", "directory", "malformed"])
def test_spoilt_file_keeps_the_callers_and_is_reported_until_it_is_good_again(
    how: str, access: Access, tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(tokens, how)
    errors = [access.reload() for _ in range(3)]
    assert all(isinstance(error, InputError) and error.parameter == "tokens" for error in errors)
    assert access.identify(bearer(TOKEN), {}, PEER).name == "shop"
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == 1 and "kept the callers known before" in logged[0].getMessage()
    if how == "directory":
        tokens.rmdir()
    write_lines(tokens, new_token("shop", ["read"])[1])
    assert access.reload() is None
    assert "does not know this token" in refused(access, bearer(TOKEN))


def test_warning_is_logged_once_per_change(tokens: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens.chmod(0o644)
    access = Access.open(tokens)
    for _ in range(3):
        assert access.reload() is None
    assert caplog.text.count("open to every user") == 1


def test_malformed_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(DmanError, match="line 1: it has not three columns"):
        Access.open(write_lines(tmp_path / "tokens", "shop"))
