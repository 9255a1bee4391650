"""The one family of errors. Each says what is wrong and what to do, and knows its gRPC status.

    DmanError
    ├── UsageError                  a command or a call that cannot work as asked
    │   └── EncoderError            the graphs cannot run here as asked
    ├── InputError                  a log or an item file that cannot be used
    ├── BundleError                 a bundle that cannot be used
    ├── RequestError                a request that can never succeed as sent
    │   └── UserNotFoundError
    ├── UnauthenticatedError        a call whose caller is not known
    ├── ForbiddenError              a call that its caller may not make
    ├── LimitError                  a caller that asks for more than its share
    ├── ConflictError               other writers kept changing the same users
    ├── StoppedError                the server takes no new work
    ├── NotLoadedError              the server lacks the bundle that is to answer
    ├── RefusedError                the server holds all that it can
    ├── ExpiredError                the caller's deadline has passed
    ├── JobError                    a job that a remote caller asked for failed, or cannot begin
    ├── SourceError                 a topic or a file that events come from cannot be read on
    │   └── SourceUnavailableError  for now
    ├── StoreError                  the store cannot do what was asked
    │   ├── StoreFullError
    │   ├── StoreMismatchError
    │   ├── StoreUnavailableError
    │   │   ├── StoreDamagedError   stored bytes are not what was written
    │   │   └── StoreGoneError      the files were removed or replaced
    │   ├── TooManyRequestIdsError
    │   └── TooManyProducersError
    └── StateError                  a stored record that cannot be used

`dman_train` adds ConfigError and RunError. The library knows no flags: an error names the *parameter* to change, and a
command adds the flag of that name (`options.run_command`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar


class DmanError(Exception):
    """What a user or a caller can understand: one line, `cause; remedy`.

    Attributes:
        cause: What is wrong, and where.
        remedy: What to do about it; may be empty.
        parameter: The name of the argument or option that the remedy is about; empty if there is none.
        status: Name of the gRPC status that a remote caller gets.
        public: What a remote caller is told. None: the message itself; else these words, and the message goes to the
            log only, as it may name paths.
    """

    status: str = "INTERNAL"
    public: ClassVar[str | None] = "internal error"

    def __init__(self, cause: str, remedy: str = "", *, parameter: str = "") -> None:
        super().__init__(cause, remedy, parameter)
        self.cause, self.remedy, self.parameter = cause, remedy, parameter

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}" if self.remedy else self.cause

    def __reduce__(self) -> tuple[object, ...]:  # parameter is keyword-only; workers send errors to their supervisor
        return _rebuild, (type(self), self.cause, self.remedy, self.parameter)


def _rebuild(kind: type[DmanError], cause: str, remedy: str, parameter: str) -> DmanError:
    return kind(cause, remedy, parameter=parameter)


class UsageError(DmanError):
    """What the user asked for cannot be done."""

    status = "INVALID_ARGUMENT"


class EncoderError(UsageError):
    """The graphs cannot be run as asked."""

    status = "FAILED_PRECONDITION"


class InputError(DmanError, ValueError):
    """A file cannot be used. The cause names the file and the place in it."""

    status = "INVALID_ARGUMENT"


class BundleError(DmanError):
    """A bundle that cannot be used."""

    status = "FAILED_PRECONDITION"


def replaced_bundle(path: object, *, found: str, served: str) -> BundleError:
    """The error for another bundle at `path` than the one that is served."""
    return BundleError(
        f"the bundle at {path} is now {found}, the server serves {served}",
        "restart the server to serve it, or put the old one back",
    )


class RequestError(DmanError, ValueError):
    """A request that can never succeed as it is."""

    status, public = "INVALID_ARGUMENT", None


class UserNotFoundError(RequestError):
    """Nothing is stored about the user."""

    status = "NOT_FOUND"


class UnauthenticatedError(DmanError):
    """Nobody known makes this call."""

    status, public = "UNAUTHENTICATED", None


class ForbiddenError(DmanError):
    """The caller is known and may not do this."""

    status, public = "PERMISSION_DENIED", None


class LimitError(DmanError):
    """The caller is over one of its limits; the remedy says when to try again."""

    status, public = "RESOURCE_EXHAUSTED", None


class ConflictError(DmanError):
    """Other writers kept changing the same users."""

    status, public = "ABORTED", None


class StoppedError(DmanError):
    """The server is stopping and takes no new work."""

    status, public = "UNAVAILABLE", None


class NotLoadedError(DmanError):
    """The server has not loaded the bundle that is to answer."""

    status, public = "UNAVAILABLE", None


class RefusedError(DmanError):
    """The server holds as many requests or bytes as it can, or a request took too long to arrive."""

    status, public = "RESOURCE_EXHAUSTED", None


class ExpiredError(DmanError):
    """The caller's deadline passed before the work was done."""

    status, public = "DEADLINE_EXCEEDED", None


class JobError(DmanError):
    """A job that a caller with the role admin asked for failed, or cannot begin: the caller is told why, paths too."""

    status, public = "FAILED_PRECONDITION", None

    @classmethod
    def failed(cls, *, status: str, cause: str, remedy: str) -> JobError:
        """The error of a job, with the status that it would have had here."""
        error = cls(cause, remedy)
        error.status = status
        return error


class SourceError(DmanError):
    """Events cannot be read on from where they come, or those that are bad cannot be put where they belong."""

    status = "FAILED_PRECONDITION"


class SourceUnavailableError(SourceError):
    """It may be possible again without any help."""

    status = "UNAVAILABLE"


class StoreError(DmanError):
    """The store cannot do what was asked.

    Attributes:
        stored: The users of a commit that were stored all the same, in a store that commits each by itself.
    """

    status = "UNAVAILABLE"
    public: ClassVar[str | None] = "the state store is unavailable"
    stored: Collection[str] = frozenset()


class StoreFullError(StoreError):
    """The map or the disk is full: nothing was written; reads and deletions still work."""

    status, public = "RESOURCE_EXHAUSTED", "the state store is full; nothing was written"


class StoreMismatchError(StoreError):
    """The store was written by another format version or by another program."""


class StoreUnavailableError(StoreError):
    """The store is missing, unwritable, corrupted or out of reader slots, or its disk fails."""


class StoreDamagedError(StoreUnavailableError):
    """Stored bytes are not what was written, or are missing. Retrying does not help."""

    status, public = "DATA_LOSS", "stored data is damaged"


class StoreGoneError(StoreUnavailableError):
    """The files of the store were removed, replaced or cut while it was open: no write is acknowledged any more."""


class TooManyRequestIdsError(StoreError):
    """A user has more request ids than can be remembered for a day: nothing was written."""

    status, public = "RESOURCE_EXHAUSTED", None


class TooManyProducersError(StoreError):
    """A user has updates of more producers than are remembered: nothing was written."""

    status, public = "RESOURCE_EXHAUSTED", None


class StateError(DmanError):
    """A stored record that cannot be used."""
