"""The Python SDK of DMAN: `Client`, and `AsyncClient` with the same methods as coroutines.

`AdminClient` is for those who look after a server's store.

    from sdk import Client

    with Client("localhost:50051") as client:
        client.update("anna", ["matrix", "alien"])
        recommendations = client.recommend("anna", k=5)

It needs grpcio and protobuf only. Every error is a `DmanError`.
"""

from sdk._admin import AdminClient
from sdk._admin_types import (
    Activated,
    BackedUp,
    Dropped,
    Expired,
    GenerationInfo,
    Generations,
    ItemsAdded,
    Progress,
    Rebuilt,
    Rollout,
    Switched,
    Verified,
)
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
    JobError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    UserNotFoundError,
)
from sdk._filters import Diversity, Filter, between, has
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
    "Activated",
    "AdminClient",
    "AsyncClient",
    "BackedUp",
    "CallError",
    "Client",
    "ClientClosedError",
    "ConflictError",
    "DeadlineExceededError",
    "DeletedUser",
    "Diversity",
    "DmanError",
    "Dropped",
    "Event",
    "EventLoopError",
    "Expired",
    "Filter",
    "ForkError",
    "GenerationInfo",
    "Generations",
    "Id",
    "Ids",
    "InternalError",
    "InvalidArgumentError",
    "Items",
    "ItemsAdded",
    "JobError",
    "PermissionDeniedError",
    "Problem",
    "Progress",
    "Rebuilt",
    "Recommendation",
    "Recommendations",
    "ResourceExhaustedError",
    "Rollout",
    "Source",
    "Status",
    "Switched",
    "Time",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Unit",
    "UpdateResult",
    "User",
    "UserNotFoundError",
    "Verified",
    "__version__",
    "between",
    "has",
]

# Tracebacks and help() then name a class as it is imported: sdk.UserNotFoundError.
for _name in __all__:
    if isinstance(_public := globals()[_name], type):
        _public.__module__ = __name__
del _name, _public
