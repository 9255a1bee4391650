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
    ItemsAdded,
    Progress,
    Rebuilt,
    Rollout,
    Switched,
    Verified,
)
from sdk._calls import Call
from sdk._exceptions import InvalidArgumentError
from sdk._types import Id, Ids

Result = TypeVar("Result")
Part = TypeVar("Part", pb.ExportUserReply, pb.ListItemsOffReply)
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
    catch_up: float = 5.0,
    timeout: float | None = None,
) -> Call[pb.ActivateRequest, pb.ActivateReply, Activated]:
    """Lets a bundle answer once all processes have loaded it. Where one cannot, nothing changes.

    Never retried. Calling again does no harm.

    Args:
        bundle: Its directory on the server's machine, absolute or relative to the server's `--admin-root`.
        share: Of the users that get the bundle, above 0; 1: all of them.
        wait: Seconds that processes get to load it.
        catch_up: Seconds at most in which states are brought up to date first; 0: none are, to be fast.
        timeout: Seconds for the whole call; the client's by default.

    Raises:
        InvalidArgumentError: An argument is not valid.
        JobError: The bundle cannot be used, or another activation runs.
        CallError: The call failed. The bundle may or may not be activated: `rollout` tells.
    """
    request = pb.ActivateRequest(
        bundle=_path(bundle, "bundle"),
        share=_number(share, "share"),
        wait=_number(wait, "wait"),
        catch_up=_number(catch_up, "catch_up"),
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
    return Call("ExportUser", request, _document, True, timeout, receive=_joined(pb.ExportUserReply))


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


def verify(
    *, bundle: Directory | None = None, sample: int | None = None, timeout: float | None = None
) -> Call[pb.VerifyRequest, pb.VerifyReply, Verified]:
    """Reads everything in the store and lists what is damaged. Damage is a result, and no error.

    Args:
        bundle: Its directory on the server's machine: its states are read, too, and some of them replayed.
        sample: Users whose states are replayed; None: 100.
        timeout: Seconds for the whole call, retries included; the client's by default.

    Raises:
        JobError: Another one runs.
        CallError: The call failed, after retries if the server was unavailable.
    """
    request = pb.VerifyRequest(bundle=_path_or_none(bundle, "bundle"))
    if sample is not None:
        request.sample = _wire.integer(sample, "sample")
    return Call("Verify", request, _reader(Verified), True, timeout)


def switch_items(
    item_ids: Ids = (),
    *,
    off: bool,
    file: Directory | None = None,
    item_column: str = "",
    timeout: float | None = None,
) -> Call[pb.SwitchItemsRequest, pb.SwitchItemsReply, Switched]:
    """Switches items off, or on again, for all workers at once. Never retried. Calling again does no harm.

    Args:
        item_ids: One id or several: text or integers. A request holds about 8,000 bytes; send more in a file.
        off: Off, or on again.
        file: More of them, on the server's machine, absolute or relative to the server's `--admin-root`: a .txt file
            with one id a line, or a table of items.
        item_column: Of the ids in such a table; item_id by default.
        timeout: Seconds for the whole call; the client's by default.

    Raises:
        InvalidArgumentError: An argument is not valid, or there are no items.
        CallError: The call failed. The items may or may not be switched: `items_off` tells.
    """
    request = pb.SwitchItemsRequest(
        item_ids=_wire.id_texts(item_ids, "item_ids"),
        file=_path_or_none(file, "file"),
        off=bool(off),
        item_column=item_column,
    )
    return Call("SwitchItems", request, _reader(Switched), False, timeout)


def items_off(*, timeout: float | None = None) -> Call[pb.ListItemsOffRequest, pb.ListItemsOffReply, tuple[str, ...]]:
    """The external ids of the items that are switched off, as text.

    Args:
        timeout: Seconds for the whole call, retries included; the client's by default.

    Raises:
        CallError: The call failed, after retries if the server was unavailable.
    """
    request = pb.ListItemsOffRequest()
    return Call("ListItemsOff", request, _lines, True, timeout, receive=_joined(pb.ListItemsOffReply))


def add_items(
    bundle: Directory,
    file: Directory,
    *,
    embeddings: Directory | None = None,
    item_column: str = "",
    like_column: str = "",
    timeout: float | None = None,
) -> Call[pb.AddItemsRequest, pb.AddItemsReply, ItemsAdded]:
    """Adds new items without training: workers serve them within a second. Never retried. Calling again does no harm.

    All paths are of the server's machine, absolute or relative to the server's `--admin-root`.

    Args:
        bundle: Directory of the bundle that is to serve them.
        file: Table of the items: ids, and titles and attributes if it has any.
        embeddings: A .npy file of float32 with one row per item, made for the bundle.
        item_column: Of the ids; item_id by default.
        like_column: Of the ids, with | between them, whose mean an item gets; like by default.
        timeout: Seconds for the whole call; the client's by default.

    Raises:
        InvalidArgumentError: An argument is not valid, or the file cannot be used.
        JobError: The bundle cannot be used, or another one runs.
        CallError: The call failed. The items may or may not be added.
    """
    request = pb.AddItemsRequest(
        bundle=_path(bundle, "bundle"),
        file=_path(file, "file"),
        embeddings=_path_or_none(embeddings, "embeddings"),
        item_column=item_column,
        like_column=like_column,
    )
    return Call("AddItems", request, _reader(ItemsAdded), False, timeout)


def _joined(kind: Callable[..., Part]) -> Callable[[Iterator[Part]], Part]:
    """Puts the parts of a document together, as one reply of this kind."""
    return lambda replies: kind(part=b"".join(reply.part for reply in replies))


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


def _lines(reply: pb.ListItemsOffReply) -> tuple[str, ...]:
    return tuple(reply.part.decode().split("\n")[:-1])  # ids hold no newline


def _path(path: Directory, name: str) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidArgumentError(f"{name} must be a path, not {type(path).__name__}.")
    return _wire.id_text(os.fspath(path), name, kinds="a path")


def _path_or_none(path: Directory | None, name: str) -> str:
    return "" if path is None else _path(path, name)


def _number(value: float, name: str) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise InvalidArgumentError(f"{name} must be a number, not {type(value).__name__}.")
    return float(value)
