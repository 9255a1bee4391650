"""What the client of the Redis protocol, the codecs and the servers raise: what may pass, and it as StoreErrors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis import exceptions as raised

from dman_runtime.errors import StoreDamagedError, StoreFullError, StoreUnavailableError
from dman_runtime.store.history import DamagedError

AWAY = (raised.ConnectionError, raised.TimeoutError, OSError)
_MOVING = ("MOVED", "ASK", "CLUSTERDOWN", "TRYAGAIN", "READONLY", "LOADING", "MASTERDOWN", "UNBLOCKED", "NOREPLICAS")
_REFUSED = ("NOAUTH", "WRONGPASS", "NOPERM")


@contextmanager
def store_errors(store: str) -> Iterator[None]:
    """Turns errors into StoreErrors, in which `store` names the store."""
    try:
        yield
    except DamagedError as error:
        raise StoreDamagedError(
            f"{store} is corrupted ({error})", "delete the user and import its history again"
        ) from error
    except (raised.RedisError, raised.RedisClusterException, OSError) as error:
        text = f"{type(error).__name__}: {error}"[:200]
        if isinstance(error, raised.AuthenticationError | raised.NoPermissionError) or str(error).startswith(_REFUSED):
            raise StoreUnavailableError(
                f"{store} refuses this process ({text})", "check the user, the password and what they may do"
            ) from error
        if isinstance(error, raised.OutOfMemoryError) or str(error).startswith(("OOM", "MISCONF")):
            raise StoreFullError(
                f"{store} takes no writes ({text})", "give the servers more memory or disk, or add some"
            ) from error
        if isinstance(error, NotReplicatedError):
            raise StoreUnavailableError(
                f"in {store}, {error}",
                "see that each primary has its replicas, or choose another durability",
                parameter="durability",
            ) from error
        raise StoreUnavailableError(
            f"{store} is unavailable ({text})", "check the address, the network and the servers", parameter="state"
        ) from error


def confirmed(found: list[Any], wait: tuple[Any, ...]) -> list[Any]:
    """The answers of commands, or why they do not count: too few replicas have them."""
    if not wait:
        return found
    *answers, copies = found
    if isinstance(copies, Exception):
        return [copies if not isinstance(one, Exception) else one for one in answers]
    has = copies if isinstance(copies, list) else [copies]
    if all(have >= wanted for have, wanted in zip(has, wait[1:], strict=False)):
        return answers
    missing = NotReplicatedError(f"{min(has)} of {max(wait[1 : 1 + len(has)])} replicas have a write")
    return [one if isinstance(one, Exception) else missing for one in answers]


class NotReplicatedError(raised.ResponseError):
    """A write is done, and too few copies have it."""


def passes(error: Exception) -> bool:
    """Whether a command may succeed later."""
    if isinstance(error, raised.AuthenticationError | raised.AuthorizationError | raised.NoPermissionError):
        return False
    if isinstance(error, (*AWAY, raised.RedisClusterException, raised.AskError, raised.ClusterError)):
        return True
    if isinstance(error, NotReplicatedError | raised.ReadOnlyError | raised.TryAgainError):
        return True
    text = str(error)
    return text.startswith(_MOVING) or lacks_functions(error)


def lacks_functions(error: Exception) -> bool:
    """Whether a server has not got our functions: it may be new in its cluster."""
    return isinstance(error, raised.ResponseError) and (
        "unction not found" in str(error) or "No such function" in str(error)
    )
