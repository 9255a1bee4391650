"""Who calls, and what they may. What runs per call takes a few microseconds and reads no file."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from dman_runtime.access.files import signature
from dman_runtime.access.tokens import ROLES, Caller, Callers, Role, read_tokens, token_digest
from dman_runtime.errors import DmanError, ForbiddenError, UnauthenticatedError

logger = logging.getLogger(__name__)
COMMON_NAME = "x509_common_name"  # gRPC's key for it in the auth context; only verified certificates get there

_ROLE_OF_METHOD: dict[str, Role | None] = {
    "/dman.v1.Recommender/Recommend": "read",
    "/dman.v1.Recommender/BatchRecommend": "read",
    "/dman.v1.Recommender/GetUser": "read",
    "/dman.v1.Recommender/GetHistory": "read",
    "/dman.v1.Recommender/Update": "write",
    "/dman.v1.Recommender/BatchUpdate": "write",
    "/dman.v1.Recommender/DeleteUser": "admin",
    "/dman.v1.Operations/GetStatus": "admin",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "admin",
    # Probes of load balancers carry no token, and learn no more than "serving" or "not serving".
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/List": None,
    "/grpc.health.v1.Health/Watch": None,
}


def role_for(method: str) -> Role | None:
    """The role that a call of this method (`/package.Service/Method`) needs; None: anybody may. Unknown ones: admin."""
    return _ROLE_OF_METHOD.get(method, "admin")


class Access:
    """The callers that a server knows. Calls may come from several threads, `reload` from any one of them."""

    def __init__(self, path: Path | None, callers: Callers, read_at: object) -> None:
        self._path, self._callers, self._read_at = path, callers, read_at
        self._problem: DmanError | None = None
        _log_warnings(callers)

    @classmethod
    def open(cls, tokens: Path | None) -> Access:
        """Reads the token file. Without one, everybody may do everything. Raises InputError."""
        if tokens is None:
            return cls(None, Callers(), None)
        read_at = signature([tokens])
        return cls(tokens, read_tokens(tokens), read_at)

    @property
    def open_to_all(self) -> bool:
        """Nobody needs a token."""
        return self._path is None

    def identify(
        self, metadata: Iterable[tuple[str, str | bytes]], auth_context: Mapping[str, Iterable[bytes]], peer: str
    ) -> Caller:
        """Who makes this call.

        Without a token file that is the common name of the client's certificate if it showed one, else the connection
        (`peer`). With one, it is what the file says of the token in `authorization: Bearer <token>`, or, if there is
        no token, of the common name. A wrong token is refused even with a good certificate.

        metadata: (key, value) pairs; auth_context: as gRPC gives it. Raises UnauthenticatedError.
        """
        if self._path is None:
            return Caller(_common_name(auth_context) or peer, ROLES)
        headers = [value for key, value in metadata if key == "authorization"]
        if headers:
            return self._by_token(headers)
        name = _common_name(auth_context)
        if name is None:
            raise UnauthenticatedError("the call has no token", "send the metadata authorization: Bearer <token>")
        caller = self._callers.by_common_name.get(name)
        if caller is None:
            raise UnauthenticatedError(
                "the server does not know the client's certificate", "ask its operator for access, or send a token"
            )
        return caller

    def _by_token(self, headers: list[str | bytes]) -> Caller:
        header = headers[0]
        scheme, _, token = header.partition(" ") if isinstance(header, str) else ("", "", "")
        token = token.strip()
        if len(headers) > 1 or scheme.lower() != "bearer" or not token:
            raise UnauthenticatedError(
                "the metadata authorization cannot be read", "send it once, as authorization: Bearer <token>"
            )
        caller = self._callers.by_digest.get(token_digest(token))
        if caller is None:
            raise UnauthenticatedError("the server does not know this token", "ask its operator for a new one")
        return caller

    def reload(self) -> DmanError | None:
        """Reads the token file again if it changed. Call it every second or so; it may read a file of 1 MiB.

        A file that cannot be used changes nothing: the old callers stay, the error is logged once, and every call
        returns it until the file is good again. None: all is well.
        """
        if self._path is None:
            return None
        found = signature([self._path])
        if found == self._read_at:
            return self._problem
        self._read_at, before = found, str(self._problem)
        try:
            callers = read_tokens(self._path)
        except DmanError as error:
            self._problem = error
            if str(error) != before:
                logger.error("kept the callers known before: %s", error)
            return error
        if callers != self._callers or self._problem is not None:
            logger.info("read %s again: it names %d tokens and certificates", self._path, len(callers))
            _log_warnings(callers)
        self._callers, self._problem = callers, None  # one assignment each: a call sees the old or the new callers
        return None

    @staticmethod
    def require(caller: Caller, role: Role) -> None:
        """Raises ForbiddenError unless the caller has this role."""
        if role not in caller.roles:
            raise ForbiddenError(f"{caller.name} lacks the role {role}", "ask the operator of the server for it")


def _log_warnings(callers: Callers) -> None:
    for warning in callers.warnings:
        logger.warning("%s", warning)


def _common_name(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """None if there is not exactly one, or if it is not text."""
    names = list(auth_context.get(COMMON_NAME, ()))
    try:
        return names[0].decode("utf-8") if len(names) == 1 and names[0] else None
    except UnicodeDecodeError:
        return None
