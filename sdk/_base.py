"""What both clients share: their settings, and what follows from an attempt."""

import logging
from collections.abc import Iterable
from typing import Any

import grpc

from protos.dman.v1.admin_pb2_grpc import AdminStub
from protos.dman.v1.dman_pb2_grpc import OperationsStub, RecommenderStub
from sdk._access import Metadata, Pem, access
from sdk._calls import Call, ReplyT, RequestT, ResultT
from sdk._exceptions import ClientClosedError, DmanError, InvalidArgumentError, error_from_status
from sdk._proxy import proxy_remedy
from sdk._retry import Attempts
from sdk._servers import servers, user_pair
from sdk._settings import ARGUMENTS, DEFAULT_RETRIES, DEFAULT_TARGET, DEFAULT_TIMEOUT, positive_seconds, settings

_log = logging.getLogger(__name__)


def methods_of(channel: Any) -> dict[str, Any]:
    """What invokes each RPC, by its name."""
    stubs = (RecommenderStub(channel), OperationsStub(channel), AdminStub(channel))
    return {name: method for stub in stubs for name, method in vars(stub).items()}


class ClientBase:
    """What both clients share: settings, the closed flag, and what happens after a failed attempt."""

    def __init__(
        self,
        target: str | Iterable[str] = DEFAULT_TARGET,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
        wait_for_ready: bool = False,
        token: str | None = None,
        tls: bool | None = None,
        ca_certificate: Pem | None = None,
        client_certificate: Pem | None = None,
        client_key: Pem | None = None,
        insecure: bool = False,
        channel_credentials: grpc.ChannelCredentials | None = None,
        metadata: Iterable[tuple[str, str | bytes]] = (),
        options: Iterable[tuple[str, Any]] = (),
    ) -> None:
        where = servers(target)
        checked_access = access(
            str(where),
            local=where.local,
            token=token,
            tls=tls,
            ca_certificate=ca_certificate,
            client_certificate=client_certificate,
            client_key=client_key,
            insecure=insecure,
            channel_credentials=channel_credentials,
            metadata=metadata,
        )
        self._settings = settings(
            where,
            timeout=timeout,
            retries=retries,
            wait_for_ready=wait_for_ready,
            access=checked_access,
            options=options,
        )
        self._metadata = checked_access.metadata or None
        self._closed = False
        self._prepare()

    __init__.__doc__ = ARGUMENTS

    def __getstate__(self) -> dict[str, Any]:
        """The settings, with token and key: whoever reads a pickled client can use them."""
        if self._settings.access.given is not None:
            raise InvalidArgumentError(
                f"a {type(self).__name__} with channel_credentials= cannot be pickled. "
                "Use ca_certificate= and client_certificate= instead, or create the client in the other process."
            )
        return {"settings": self._settings, "closed": self._closed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._settings, self._closed = state["settings"], state["closed"]
        self._metadata = self._settings.access.metadata or None
        self._prepare()

    def _prepare(self) -> None:
        """Sets up what one kind of client needs."""
        raise NotImplementedError

    @property
    def target(self) -> str:
        """The address of the server; of several, all of them, separated by commas."""
        return str(self._settings.servers)

    def _metadata_of(self, call: Call[Any, Any, Any]) -> Metadata | None:
        if call.user_id is None:
            return self._metadata
        return (*(self._metadata or ()), user_pair(call.user_id))

    def __repr__(self) -> str:
        state = " (closed)" if self._closed else ""
        return f"<{type(self).__name__} of {self.target}{state}>"

    def _check_open(self, call: Call[Any, Any, Any] | None = None) -> None:
        if self._closed:
            raise ClientClosedError(request_id=call.request_id if call else None)

    def _attempts(self, call: Call[Any, Any, Any]) -> Attempts:
        timeout = self._settings.timeout if call.timeout is None else positive_seconds(call.timeout, "timeout")
        return Attempts(self._settings.retries if call.repeatable else 0, timeout)

    def _pause(self, call: Call[Any, Any, Any], attempts: Attempts, error: grpc.RpcError) -> float:
        """Seconds to wait before the next attempt. Raises a DmanError when there is none."""
        code, details = error.code(), error.details() or ""
        if self._closed and code is grpc.StatusCode.CANCELLED:
            raise ClientClosedError(request_id=call.request_id) from error
        delay = attempts.delay_after(code)
        if delay is None:
            raise self._error(call, code, details, attempts.count) from error
        _log.debug("%s at %s: %s; next attempt in %.3f s", call.rpc, self.target, details, delay)
        return delay

    def _result(self, call: Call[RequestT, ReplyT, ResultT], reply: ReplyT | None) -> ResultT:
        """The reply as a result. gRPC gives None when the bytes are not a message of the expected type."""
        try:
            if reply is None:
                raise ValueError("not a message of this type")
            return call.parse(reply)
        except ValueError as error:
            raise self._error(call, grpc.StatusCode.INTERNAL, f"unreadable reply: {error}") from error

    def _error(self, call: Call[Any, Any, Any], code: grpc.StatusCode, details: str, attempts: int = 1) -> DmanError:
        return error_from_status(
            code,
            method=call.rpc,
            target=self.target,
            details=details,
            attempts=attempts,
            request_id=call.request_id,
            proxy=proxy_remedy(self.target, dict(self._settings.options)),
        )
