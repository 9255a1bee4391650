"""The token file: who may call, and what. One caller a line:

    # name      roles        kind:value
    shop        read         sha256:<64 hex digits, the SHA-256 of the token>
    ingest      write        cn:<common name of a client certificate>

- Roles: `read` allows Recommend, BatchRecommend, GetUser and GetHistory; `write` allows Update and BatchUpdate; `admin`
  allows everything. `write` does not allow reading: what feeds events in need not see what comes out.
- Blank lines, and lines that start with `#`, are skipped. There is no comment behind a caller.
- A name may have several lines, such as an old and a new token; each line has its own roles. A hash or a common name
  stands once.

Messages about the file name lines and never what is on them, as a token may stand in the wrong column.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from dman_runtime.access.files import read_file, reason
from dman_runtime.errors import InputError, UsageError

Role = Literal["read", "write", "admin"]
ROLES: frozenset[Role] = frozenset(get_args(Role))

_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_HASH = re.compile(r"[0-9a-fA-F]{64}")
_NAME_RULE = "1 to 64 letters, digits, dots, dashes, underscores or @"
_ROLE_RULE = "read, write and admin, with commas and no spaces between them"
_EMPTY = hashlib.sha256(b"").digest()  # what a script writes whose variable is not set
_NEWLINE = hashlib.sha256(b"\n").digest()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call, and what this caller may do. `name` is for logs and limits."""

    name: str
    roles: frozenset[Role]


@dataclass(frozen=True)
class Callers:
    """What a token file says: callers by the SHA-256 digest of their token, and by common name.

    `warnings` are messages about a file that can be used and should be looked at.
    """

    by_digest: dict[bytes, Caller] = field(default_factory=dict, repr=False)
    by_common_name: dict[str, Caller] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.by_digest) + len(self.by_common_name)


def token_digest(token: str) -> bytes:
    """What the file holds of a token (32 bytes)."""
    return hashlib.sha256(token.encode("utf-8", "backslashreplace")).digest()


def new_token(name: str, roles: Iterable[str]) -> tuple[str, str]:
    """A token of 256 random bits, and the line for the token file, without a line end. The token is kept nowhere.

    Raises UsageError for a name or a role that the file cannot hold.
    """
    listed = ",".join(roles)
    if not _NAME.fullmatch(name):
        raise UsageError("the name of the caller cannot be used", f"use {_NAME_RULE}")
    if _roles(listed) is None:
        raise UsageError("the roles of the caller cannot be used", f"list {_ROLE_RULE}, each once")
    token = secrets.token_urlsafe(32)
    return token, f"{name}  {listed}  sha256:{token_digest(token).hex()}"


def read_tokens(path: Path) -> Callers:
    """Reads a token file. Raises InputError, which names the line. A file without callers lets nobody in.

    It warns if nobody is let in, and if every user of the machine can read or change the file.
    """
    try:
        content = read_file(path)
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise _error(f"cannot read the token file {path}: {reason(error)}", "give a readable file") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _error(f"{path}, line {line} is not UTF-8", "save the file as UTF-8") from None
    callers = parse_tokens(text, source=str(path))
    warnings = []
    if not len(callers):
        warnings.append(f"{path} names no caller: every call is refused")
    if mode & 0o006:
        warnings.append(f"{path} is open to every user of this machine; run chmod o-rw on it")
    return replace(callers, warnings=tuple(warnings))


def parse_tokens(text: str, *, source: str) -> Callers:
    """The callers of a token file's text. Raises InputError; `source` says where the text is from."""
    callers, first_lines = Callers(), dict[object, int]()
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        try:
            key, caller = _parse_line(line)
        except ValueError as error:
            cause, remedy = error.args
            raise _error(f"{source}, line {number}: {cause}", remedy) from None
        first = first_lines.setdefault(key, number)
        if first != number:
            kind = "hash" if isinstance(key, bytes) else "common name"
            raise _error(f"{source}, line {number} repeats the {kind} of line {first}", "remove one of the two lines")
        if isinstance(key, bytes):
            callers.by_digest[key] = caller
        else:
            callers.by_common_name[key] = caller
    return callers


def _parse_line(line: str) -> tuple[bytes | str, Caller]:
    """A digest or a common name, and its caller. Raises ValueError(cause, remedy)."""
    parts = re.split(r"[ \t]+", line, maxsplit=2)  # a common name may have spaces
    if len(parts) != 3:
        raise ValueError("it has not three columns", "write name, roles and sha256:... or cn:..., with spaces between")
    name, listed, credential = parts
    if not _NAME.fullmatch(name):
        raise ValueError("the name in column 1 cannot be used", f"use {_NAME_RULE}")
    roles = _roles(listed)
    if roles is None:
        raise ValueError("the roles in column 2 cannot be used", f"list {_ROLE_RULE}, each once")
    kind, _, value = credential.partition(":")
    if kind == "sha256":
        return _digest(value), Caller(name, roles)
    if kind == "cn":
        if not value.isprintable() or not 0 < len(value) <= 64 or value != value.strip() or "#" in value:
            raise ValueError("the common name cannot be used", "write 1 to 64 printable characters, without #")
        return value, Caller(name, roles)
    raise ValueError("column 3 is neither sha256:... nor cn:...", "write the kind and a colon first")


def _digest(value: str) -> bytes:
    if not _HASH.fullmatch(value):
        raise ValueError(
            "the value of sha256 is not 64 hexadecimal digits", "write the SHA-256 of the token, and nothing behind it"
        )
    digest = bytes.fromhex(value)
    if digest in (_EMPTY, _NEWLINE):
        raise ValueError("this is the SHA-256 of an empty text", "hash the token itself")
    return digest


def _roles(listed: str) -> frozenset[Role] | None:
    """What a list of roles allows; None if it is not such a list."""
    names = listed.split(",")
    if not set(names) <= ROLES or len(set(names)) != len(names):
        return None
    return ROLES if "admin" in names else frozenset(role for role in ROLES if role in names)


def _error(cause: str, remedy: str) -> InputError:
    return InputError(cause, remedy, parameter="tokens")
