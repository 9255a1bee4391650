"""The token file: what it allows, what it refuses, and that no message tells what is on a line."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dman_runtime.access.files import MAX_FILE_BYTES
from dman_runtime.access.tokens import ROLES, Caller, Callers, new_token, parse_tokens, read_tokens, token_digest
from dman_runtime.errors import InputError, UsageError

HASH = hashlib.sha256(b"secret").hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()
ROLE = st.sampled_from(sorted(ROLES))
NAME = st.from_regex(r"[A-Za-z0-9._@-]{1,64}", fullmatch=True)


def parsed(*lines: str) -> Callers:
    return parse_tokens("\n".join(lines), source="tokens.txt")


def test_file_names_callers_by_hash_and_by_common_name() -> None:
    callers = parsed("# callers", "", f"shop read sha256:{HASH}", "  ingest\twrite   cn:Ingest Service  ")
    assert callers.by_digest == {token_digest("secret"): Caller("shop", frozenset({"read"}))}
    assert callers.by_common_name == {"Ingest Service": Caller("ingest", frozenset({"write"}))}
    assert len(callers) == 2


@pytest.mark.parametrize(
    ("listed", "allowed"),
    [
        ("read", {"read"}),
        ("write", {"write"}),  # what feeds events in need not read
        ("read,write", {"read", "write"}),
        ("admin", {"read", "write", "admin"}),
        ("admin,read", {"read", "write", "admin"}),
    ],
)
def test_roles_allow_what_they_say_and_admin_everything(listed: str, allowed: set[str]) -> None:
    assert parsed(f"shop {listed} sha256:{HASH}").by_digest[token_digest("secret")].roles == allowed


def test_name_may_have_several_lines_with_their_own_roles() -> None:
    callers = parsed(f"shop read sha256:{HASH}", f"shop write sha256:{OTHER}")
    assert [caller.name for caller in callers.by_digest.values()] == ["shop", "shop"]
    assert callers.by_digest[token_digest("other")].roles == {"write"}


def test_hash_may_be_written_in_capitals_and_lines_may_end_as_on_windows() -> None:
    callers = parse_tokens(f"shop read sha256:{HASH.upper()}\r\n\r\n", source="tokens.txt")
    assert token_digest("secret") in callers.by_digest


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (f"shop sha256:{HASH}", "it has not three columns"),
        (f"sh/op read sha256:{HASH}", "the name in column 1 cannot be used"),
        (f"{'n' * 65} read sha256:{HASH}", "the name in column 1 cannot be used"),
        (f"{HASH} shop read", "column 3 is neither|the roles in column 2"),
        (f"shop root sha256:{HASH}", "the roles in column 2 cannot be used"),
        (f"shop read,read sha256:{HASH}", "the roles in column 2 cannot be used"),
        (f"shop read, sha256:{HASH}", "the roles in column 2 cannot be used"),
        (f"shop Read sha256:{HASH}", "the roles in column 2 cannot be used"),
        (f"shop read {HASH}", "column 3 is neither sha256:... nor cn:..."),
        (f"shop read md5:{HASH}", "column 3 is neither sha256:... nor cn:..."),
        (f"shop read sha256:{HASH[1:]}", "the value of sha256 is not 64 hexadecimal digits"),
        (f"shop read sha256:{HASH}  # new", "the value of sha256 is not 64 hexadecimal digits"),
        (f"shop read sha256:{HASH[:-1]}g", "the value of sha256 is not 64 hexadecimal digits"),
        (f"shop read sha256:{hashlib.sha256().hexdigest()}", "this is the SHA-256 of an empty text"),
        (f"shop read sha256:{hashlib.sha256(b'%c' % 10).hexdigest()}", "this is the SHA-256 of an empty text"),
        ("shop read cn:", "the common name cannot be used"),
        ("shop read cn: ingest", "the common name cannot be used"),
        ("shop read cn:ingest # new", "the common name cannot be used"),
        ("shop read cn:in\x00gest", "the common name cannot be used"),
        (f"shop read cn:{'n' * 65}", "the common name cannot be used"),
    ],
)
def test_bad_line_is_named_by_its_number_and_its_content_stays_secret(line: str, cause: str) -> None:
    with pytest.raises(InputError, match=cause) as caught:
        parsed("# callers", line)
    message = str(caught.value)
    assert message.startswith("tokens.txt, line 2: ") and caught.value.remedy and caught.value.parameter == "tokens"
    assert HASH[1:-1] not in message and "\n" not in message and "ingest" not in message


@pytest.mark.parametrize(
    ("credential", "kind"),
    [(f"sha256:{HASH}", "hash"), ("cn:Ingest", "common name")],
)
def test_credential_that_stands_twice_is_refused(credential: str, kind: str) -> None:
    with pytest.raises(InputError, match=rf"tokens.txt, line 3 repeats the {kind} of line 1; remove one") as caught:
        parsed(f"shop read {credential}", "", f"ingest write {credential}")
    assert HASH not in str(caught.value) and "Ingest" not in str(caught.value)


# A single line end is what a script hashes whose variable is empty: refused on purpose, as a test above says.
TOKEN = st.text(min_size=1).filter(lambda token: token != "\n")


@given(st.lists(st.tuples(NAME, st.sets(ROLE, min_size=1), TOKEN), max_size=8, unique_by=lambda t: t[2]))
def test_what_is_written_is_read(callers: list[tuple[str, set[str], str]]) -> None:
    lines = [f"{n} {','.join(roles)} sha256:{token_digest(token).hex()}" for n, roles, token in callers]
    found = parsed(*lines).by_digest
    assert len(found) == len(callers)
    for name, roles, token in callers:
        caller = found[token_digest(token)]
        assert caller.name == name and caller.roles == (ROLES if "admin" in roles else roles)


@given(st.text() | st.lists(st.sampled_from(["a", "read", "admin,write", f"sha256:{HASH}", "cn:x y", "#", " ", "\n"]),
                            max_size=20).map(" ".join))  # fmt: skip
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        callers = parse_tokens(text, source="tokens.txt")
    except InputError as error:
        assert str(error).startswith("tokens.txt, line ") and len(str(error).splitlines()) == 1
    else:
        assert all(caller.roles for caller in (*callers.by_digest.values(), *callers.by_common_name.values()))


def test_new_token_fits_its_line_and_is_not_in_it() -> None:
    token, line = new_token("shop", ["read", "write"])
    assert len(token) == 43 and token not in line
    assert parsed(line).by_digest == {token_digest(token): Caller("shop", frozenset({"read", "write"}))}
    assert new_token("shop", ["read"])[0] != token


@pytest.mark.parametrize(
    ("name", "roles", "cause"),
    [("", ["read"], "name"), ("a b", ["read"], "name"), ("#a", ["read"], "name"), ("a\n", ["read"], "name"),
     ("a", [], "roles"), ("a", ["root"], "roles"), ("a", ["read", "read"], "roles")],
)  # fmt: skip
def test_new_token_refuses_what_the_file_cannot_hold(name: str, roles: list[str], cause: str) -> None:
    with pytest.raises(UsageError, match=f"^the {cause} of the caller cannot be used; "):
        new_token(name, roles)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_tokens(path)
    assert caught.value.parameter == "tokens" and str(path) in str(caught.value)
    return str(caught.value)


def test_file_that_is_missing_or_none_is_refused_at_once(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent")
    assert "not a regular file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refusal(tmp_path / "fifo")
    assert "not a regular file" in refusal(Path("/dev/zero"))


def test_file_above_one_mebibyte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(b"#" * MAX_FILE_BYTES)
    assert len(read_tokens(path)) == 0
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    assert "larger than 1 MiB" in refusal(path)


def test_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(b"# one\n# two \xff\n")
    assert "line 2 is not UTF-8; save the file as UTF-8" in refusal(path)


@pytest.mark.parametrize(
    ("mode", "warned"), [(0o600, False), (0o640, False), (0o660, False), (0o644, True), (0o602, True)]
)
def test_file_that_others_may_open_is_warned_about(mode: int, warned: bool, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"shop read sha256:{HASH}\n")
    path.chmod(mode)
    assert any("open to every user" in warning for warning in read_tokens(path).warnings) == warned


def test_file_without_callers_is_warned_about(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# nobody\n")
    path.chmod(0o600)
    assert read_tokens(path).warnings == (f"{path} names no caller: every call is refused",)


def test_callers_show_no_hash_when_printed() -> None:
    assert HASH not in repr(parsed(f"shop read sha256:{HASH}")) and "shop" in repr(parsed("shop read cn:x"))
