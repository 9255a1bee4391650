"""The Python SDK of DMAN: `Client`, and `AsyncClient` with the same methods as coroutines.

    from sdk import Client

    with Client("localhost:50051") as client:
        client.update("anna", ["matrix", "alien"])
        recommendations = client.recommend("anna", k=5)

It needs grpcio and protobuf only. Every error is a `DmanError`.
"""

from sdk._client import AsyncClient, Client
from sdk._exceptions import (
    CallError,
    ClientClosedError,
    ConflictError,
    DeadlineExceededError,
    DmanError,
    EventLoopError,
    ForkError,
    InternalError,
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    UserNotFoundError,
)
from sdk._times import Time, Unit
from sdk._types import (
    DeletedUser,
    Event,
    Id,
    Ids,
    Items,
    Problem,
    Recommendation,
    Recommendations,
    Source,
    Status,
    UpdateResult,
    User,
)
from sdk._version import __version__

__all__ = [
    "AsyncClient",
    "CallError",
    "Client",
    "ClientClosedError",
    "ConflictError",
    "DeadlineExceededError",
    "DeletedUser",
    "DmanError",
    "Event",
    "EventLoopError",
    "ForkError",
    "Id",
    "Ids",
    "InternalError",
    "InvalidArgumentError",
    "Items",
    "PermissionDeniedError",
    "Problem",
    "Recommendation",
    "Recommendations",
    "ResourceExhaustedError",
    "Source",
    "Status",
    "Time",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Unit",
    "UpdateResult",
    "User",
    "UserNotFoundError",
    "__version__",
]

# Tracebacks and help() then name a class as it is imported: sdk.UserNotFoundError.
for _name in __all__:
    if isinstance(_public := globals()[_name], type):
        _public.__module__ = __name__
del _name, _public
