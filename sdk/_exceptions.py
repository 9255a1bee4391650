"""The errors of this package, and which gRPC status becomes which error."""

import re

import grpc


class DmanError(Exception):
    """Base of all errors of this package.

        DmanError
        ├── InvalidArgumentError     (also ValueError)       the request can never succeed as it is
        ├── ClientClosedError        (also RuntimeError)     the client was used after close()
        ├── EventLoopError           (also RuntimeError)     an AsyncClient was used outside its event loop
        ├── ForkError                (also RuntimeError)     gRPC cannot work in this forked process
        └── CallError                                        a call was made and failed
            ├── UserNotFoundError    (also LookupError)      nothing is stored about the user
            ├── DeadlineExceededError  (also TimeoutError)   no answer within the timeout
            ├── UnavailableError     (also ConnectionError)  no server, TLS failed, or the server is stopping
            ├── ConflictError                                others kept changing the same user, or rewrote a history
            ├── ResourceExhaustedError                       message too large, store full, over a limit, overloaded
            ├── UnauthenticatedError                         the token is missing or not valid
            ├── PermissionDeniedError  (also PermissionError)  the token may not do this
            ├── JobError                                     a job of the admin service cannot be done now
            ├── UnimplementedError                           the server does not know this method
            └── InternalError                                every other failure of a server

    No gRPC exception gets out; it is the `__cause__` of the error. `code`, `method`, `target` and `details` (the
    server's words) are None when nothing was sent. `request_id` is that of a failed `update` or `update_many`, and
    None for other calls. Send the update again with it: the server applies an id only once.
    """

    remedy = ""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        method: str | None = None,
        target: str | None = None,
        details: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.method = method
        self.target = target
        self.details = details
        self.request_id = request_id


class InvalidArgumentError(DmanError, ValueError):
    """The request can never succeed as it is. Found before sending, or by the server."""

    remedy = "Correct the argument; sending it again will not help."


class ClientClosedError(DmanError, RuntimeError):
    """The client was used after `close()`, or was closed during the call. An update may then have been applied."""

    def __init__(
        self, message: str = "The client is closed. Create a new one.", *, request_id: str | None = None
    ) -> None:
        super().__init__(message, request_id=request_id)


class EventLoopError(DmanError, RuntimeError):
    """An AsyncClient was used in another event loop than that of its first call."""

    def __init__(
        self, message: str = "This AsyncClient belongs to another event loop. Create one client for each loop."
    ) -> None:
        super().__init__(message)


class ForkError(DmanError, RuntimeError):
    """gRPC cannot work in this process, because of how it was forked. An update may have been applied."""

    remedy = 'Start processes with the method "spawn" or "forkserver", or fork before the first call.'

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(f"{message} {self.remedy}", request_id=request_id)


class CallError(DmanError):
    """A call was made and failed; `code` holds the gRPC status."""


class UserNotFoundError(CallError, LookupError):
    """Nothing is stored about the user."""

    remedy = "Send the user's events with update() first."


class DeadlineExceededError(CallError, TimeoutError):
    """No answer arrived within the timeout. An update may still have been applied."""

    remedy = "Check the load of the server and the network, or allow more with timeout=."


class UnavailableError(CallError, ConnectionError):
    """No server could be reached, TLS failed, or the server is stopping. Safe calls were retried first."""

    remedy = (
        "Check that a server is running at this address, that TLS is on at both ends or at neither, "
        "and that the client has a certificate if the server wants one."
    )


class ConflictError(CallError):
    """Other writers kept changing the same user. Nothing was stored. The server tried until the deadline.

    Or a history was rewritten while it was read.
    """

    remedy = "Send it again: an update with the request_id of this error."


class ResourceExhaustedError(CallError):
    """A message over the size limit, a full state store, a caller over its limits, or an overloaded server.

    Never retried.
    """

    remedy = "Split a large batch; otherwise send less at a time, or give the server more room."


class UnauthenticatedError(CallError):
    """The server wants a token, and it is missing or not valid."""

    remedy = "Create the client with a valid token=."


class PermissionDeniedError(CallError, PermissionError):
    """The token is valid, but its roles do not allow this."""

    remedy = "Use a token whose roles allow this method."


class JobError(CallError):
    """A job of the admin service cannot be done now: a bundle cannot be used, or another job of its kind runs."""

    remedy = "Correct that, then call again."


class UnimplementedError(CallError):
    """The server does not know this method."""

    remedy = "Check that the address is that of a DMAN server whose version fits this SDK."


class InternalError(CallError):
    """Every other failure: a fault of the server, or a reply that cannot be understood."""

    remedy = "Look for this call in the server's log."


ERROR_OF_STATUS: dict[grpc.StatusCode, type[DmanError]] = {
    grpc.StatusCode.OK: InternalError,  # never an error; here so that the table is complete
    grpc.StatusCode.CANCELLED: UnavailableError,  # by a stopping server; a call of a closed client never gets here
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.NOT_FOUND: UserNotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: InternalError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: JobError,
    grpc.StatusCode.ABORTED: ConflictError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: InternalError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
}

_TLS_FAILURE = re.compile(r"tls handshake|SSL_ERROR|hostname verification|security handshaker", re.IGNORECASE)
_TLS_REMEDY = (
    "TLS failed. Check that ca_certificate= signed the server's certificate, that this names the host of the target, "
    "and that client_certificate= and client_key= are a pair that the server trusts."
)


def error_from_status(
    code: grpc.StatusCode,
    *,
    method: str,
    target: str,
    details: str,
    attempts: int = 1,
    request_id: str | None = None,
    proxy: str = "",
) -> DmanError:
    """The error for a call that ended with `code`. `details` are the server's words, or gRPC's.

    `proxy` is a sentence about the proxy on the way; errors that it may have caused say it.
    """
    error_type = ERROR_OF_STATUS.get(code, InternalError)
    tls_failed = error_type is UnavailableError and _TLS_FAILURE.search(details)
    remedy = _TLS_REMEDY if tls_failed else error_type.remedy
    tries = f" after {attempts} attempts" if attempts > 1 else ""
    reason = details.strip().rstrip(".") or "no details given"
    message = f"{method} at {target}: {reason} [{code.name}{tries}]. {remedy}"
    if proxy and error_type in (UnavailableError, DeadlineExceededError):
        message += f" {proxy}"
    return error_type(message, code=code, method=method, target=target, details=details, request_id=request_id)
