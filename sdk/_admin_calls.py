"""The methods of AdminClient: what each sends, whether it may be sent again, and what reads its reply."""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from google.protobuf.message import Message

from protos.dman.v1 import admin_pb2 as pb
from sdk import _wire
from sdk._admin_types import (
    Activated,
    BackedUp,
    Dropped,
    Expired,
    GenerationInfo,
    Generations,
    Progress,
    Rebuilt,
    Rollout,
    Verified,
)
from sdk._calls import Call
from sdk._exceptions import InvalidArgumentError
from sdk._types import Id

Result = TypeVar("Result")
Directory = str | os.PathLike[str]


def generations(
    *, timeout: float | None = None
) -> Call[pb.ListGenerationsRequest, pb.ListGenerationsReply, Generations]:
    """The bundles that the store has states of, and how complete they are.

    Args:
        timeout: Seconds for the whole call, retries included; the client's by default.

    Raises:
        CallError: The call failed, after retries if the server was unavailable.
    """
    return Call("ListGenerations", pb.ListGenerationsRequest(), _generations, True, timeout)


def rollout(*, timeout: float | None = None) -> Call[pb.GetRolloutRequest, pb.GetRolloutReply, Rollout]:
    """Which bundle answers whom.

    Args:
        timeout: Seconds for the whole call, retries included; the client's by default.

    Raises:
        CallError: The call failed, after retries if the server was unavailable.
    """
    return Call("GetRollout", pb.GetRolloutRequest(), _reader(Rollout), True, timeout)


def rebuild(
    bundle: Directory,
    *,
    max_share: float = 0.5,
    progress: Callable[[Progress], None] | None = None,
    timeout: float | None = None,
) -> Call[pb.RebuildRequest, pb.RebuildResult, Rebuilt]:
    """Encodes all histories under a bundle, beside the server. It ends when this call does.

    Never retried. One that was ended goes on where it was when you call it again.

    Args:
        bundle: Its directory on the server's machine, absolute or relative to the server's `--admin-root`.
        max_share: Of one core, above 0 up to 1.
        progress: Called about twice a second. What it raises ends the rebuild.
        timeout: Seconds for the whole call; the client's by default.

    Raises:
        InvalidArgumentError: An argument is not valid.
        JobError: The bundle cannot be used, or another rebuild runs.
        CallError: The call failed.
    """
    request = pb.RebuildRequest(bundle=_path(bundle, "bundle"), max_share=_number(max_share, "max_share"))

    def read(replies: Iterator[pb.RebuildReply]) -> pb.RebuildResult | None:
        for reply in replies:
            if reply.HasField("result"):
                return reply.result
            if progress is not None:
                progress(_reader(Progress)(reply.progress))
        return None

    return Call("Rebuild", request, _reader(Rebuilt), False, timeout, receive=read)


def activate(
    bundle: Directory,
    *,
    share: float = 1.0,
    wait: float = 120.0,
    timeout: float | None = None,
) -> Call[pb.ActivateRequest, pb.ActivateReply, Activated]:
    """Lets a bundle answer once all processes have loaded it. Where one cannot, nothing changes.

    Never retried. Calling again does no harm.

    Args:
        bundle: Its directory on the server's machine, absolute or relative to the server's `--admin-root`.
        share: Of the users that get the bundle, above 0; 1: all of them.
        wait: Seconds that processes get to load it.
        timeout: Seconds for the whole call; the client's by default.

    Raises:
        InvalidArgumentError: An argument is not valid.
        JobError: The bundle cannot be used, or another activation runs.
        CallError: The call failed. The bundle may or may not be activated: `rollout` tells.
    """
    request = pb.ActivateRequest(
        bundle=_path(bundle, "bundle"), share=_number(share, "share"), wait=_number(wait, "wait")
    )
    return Call("Activate", request, _reader(Activated), False, timeout)


def drop(bundle_id: str, *, timeout: float | None = None) -> Call[pb.DropRequest, pb.DropReply, Dropped]:
    """Removes the states of a bundle that answers nobody. All histories stay. Never retried.

    Args:
        bundle_id: Of the bundle; `generations` lists them.
        timeout: Seconds for the whole call; the client's by default.

    Raises:
        InvalidArgumentError: The bundle answers, or the store has no states of it.
        CallError: The call failed. The states may or may not be removed.
    """
    request = pb.DropRequest(bundle_id=_wire.id_text(bundle_id, "bundle_id"))
    return Call("Drop", request, _reader(Dropped), False, timeout)


def backup(directory: Directory, *, timeout: float | None = None) -> Call[pb.BackupRequest, pb.BackupReply, BackedUp]:
    """Copies the store of one moment while the server goes on, and reads the copy back. Never retried.

    Args:
        directory: To make on the server's machine, absolute or relative to the server's `--admin-root`.
        timeout: Seconds for the whole call; the client's by default.

    Raises:
        InvalidArgumentError: The directory exists, or may not be named.
        JobError: Another backup runs.
        CallError: The call failed. Then there is no such directory, unless only the reply was lost.
    """
    return Call("Backup", pb.BackupRequest(output=_path(directory, "directory")), _reader(BackedUp), False, timeout)


def export_user(
    user_id: Id, *, timeout: float | None = None
) -> Call[pb.ExportUserRequest, pb.ExportUserReply, dict[str, Any]]:
    """All that is stored of a user: `user_id`, `events` and `states`, as docs/operations.md shows it.

    Args:
        user_id: Text or an integer.
        timeout: Seconds for the whole call, retries included; the client's by default.

    Raises:
        InvalidArgumentError: There is no such user.
        CallError: The call failed, after retries if the server was unavailable.
    """
    request = pb.ExportUserRequest(user_id=_wire.id_text(user_id, "user_id"))

    def read(replies: Iterator[pb.ExportUserReply]) -> pb.ExportUserReply:
        return pb.ExportUserReply(part=b"".join(reply.part for reply in replies))

    return Call("ExportUser", request, _document, True, timeout, receive=read)


def expire(
    idle_days: float, *, dry_run: bool = False, timeout: float | None = None
) -> Call[pb.ExpireRequest, pb.ExpireReply, Expired]:
    """Deletes the users whose latest event is older than so many days. Never retried. Calling again does no harm.

    Args:
        idle_days: More than 0.
        dry_run: Count them, and delete none.
        timeout: Seconds for the whole call; the client's by default.

    Raises:
        InvalidArgumentError: An argument is not valid.
        JobError: Another one runs.
        CallError: The call failed. Some of the users may be deleted.
    """
    request = pb.ExpireRequest(idle_days=_number(idle_days, "idle_days"), dry_run=bool(dry_run))
    return Call("Expire", request, _reader(Expired), False, timeout)


def verify(*, timeout: float | None = None) -> Call[pb.VerifyRequest, pb.VerifyReply, Verified]:
    """Reads everything in the store and lists what is damaged. Damage is a result, and no error.

    Args:
        timeout: Seconds for the whole call, retries included; the client's by default.

    Raises:
        JobError: Another one runs.
        CallError: The call failed, after retries if the server was unavailable.
    """
    return Call("Verify", pb.VerifyRequest(), _reader(Verified), True, timeout)


def _reader(kind: Callable[..., Result]) -> Callable[[Message], Result]:
    """Reads a message whose fields are those of a result."""

    def read(message: Message) -> Result:
        values = {field.name: _value(getattr(message, field.name)) for field in message.DESCRIPTOR.fields}
        return kind(**{name: value for name, value in values.items() if name in kind.__annotations__})

    return read


def _value(value: Any) -> Any:
    """Lists as tuples, maps as dictionaries."""
    if isinstance(value, (str, bool, int, float)):
        return value
    return dict(value) if hasattr(value, "items") else tuple(value)


def _generations(reply: pb.ListGenerationsReply) -> Generations:
    return Generations(reply.users, tuple(map(_reader(GenerationInfo), reply.generations)), reply.text)


def _document(reply: pb.ExportUserReply) -> dict[str, Any]:
    document = json.loads(reply.part)
    if not isinstance(document, dict):
        raise ValueError("the document is no object")
    return document


def _path(path: Directory, name: str) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidArgumentError(f"{name} must be a path, not {type(path).__name__}.")
    return _wire.id_text(os.fspath(path), name, kinds="a path")


def _number(value: float, name: str) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise InvalidArgumentError(f"{name} must be a number, not {type(value).__name__}.")
    return float(value)
