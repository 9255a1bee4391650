"""A history that is read page by page. Nothing here does I/O: a client makes the calls."""

from typing import SupportsIndex

from protos.dman.v1 import dman_pb2 as pb
from sdk import _replies, _wire
from sdk._calls import Call
from sdk._exceptions import ConflictError, InvalidArgumentError
from sdk._types import Event, Id

OVERLAP = 32  # events of the page before that a page repeats
_INT64 = 1 << 63
_AGAIN = "It was deleted, or older events were imported. Read the history again from its start."


class Pages:
    """The pages of one history, in order, and what is known after each.

    Updates only append. What is read stays true unless the user is deleted or older events are imported, which moves
    the events behind them. Each page therefore repeats the last events of the page before: where they differ, or are
    gone, the rest would not fit what was read.
    """

    def __init__(self, user_id: str, start: int, timeout: float | None) -> None:
        self._user_id, self._timeout = user_id, timeout
        self._position = start  # of the first event that was not read
        self._last: list[tuple[str, int]] = []  # events before it, as the server wrote them
        self._complete = False

    def next_call(self) -> Call[pb.GetHistoryRequest, pb.GetHistoryReply, list[Event]] | None:
        """The call for the next page; None after the last one. Its result are the new events of the page."""
        if self._complete:
            return None
        request = pb.GetHistoryRequest(user_id=self._user_id, start=self._position - len(self._last))
        return Call("GetHistory", request, self._read, True, self._timeout, user_id=self._user_id)

    def _read(self, reply: pb.GetHistoryReply) -> list[Event]:
        """Raises ConflictError; ValueError for a reply that makes no sense."""
        stored = [*zip(reply.item_ids, reply.timestamps, strict=True)]
        if reply.history_count < self._position:
            raise self._changed(f"has {reply.history_count} events, and {self._position} were expected at least")
        if stored[: len(self._last)] != self._last:
            raise self._changed(f"has other events before position {self._position} than were read there")
        new = stored[len(self._last) :]
        self._position += len(new)
        self._complete = self._position >= reply.history_count
        if not new and not self._complete:
            raise ValueError("a part of a history without events")
        self._last = stored[-OVERLAP:]
        return _replies.events(new, integer_item_ids=reply.integer_item_ids)

    def _changed(self, how: str) -> ConflictError:
        return ConflictError(f"the history of {self._user_id!r} {how}. {_AGAIN}", method="GetHistory")


def history(user_id: Id, start: SupportsIndex = 0, *, timeout: float | None = None) -> Pages:
    """All stored events of a user, oldest first, also of items that the bundle does not know.

    Reads 10,000 events a call, as you go: the first call is made when you ask for the first event. Events that arrive
    meanwhile are read too. Retried while the server is unavailable.

    Args:
        user_id: Text or an integer.
        start: Position of the first event, to read on where an earlier reading ended. The oldest event is at 0.
        timeout: Seconds for each call, retries included; the client's by default.

    Raises:
        UserNotFoundError: Nothing is stored about the user.
        ConflictError: The user has fewer events than `start`, or was deleted or given older events while you read.
        InvalidArgumentError: An argument is not valid.
        CallError: A call failed, after retries if the server was unavailable.
    """
    position = _wire.integer(start, "start", limit=_INT64)
    if position < 0:
        raise InvalidArgumentError(f"start must not be negative: {position}.")
    return Pages(_wire.id_text(user_id, "user_id"), position, timeout)
