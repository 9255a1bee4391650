"""`dman.v1.Admin`: the commands that look after a store, for callers of a running server.

Each command runs as a process of its own (a *job*), beside the server and not in it. `VERBS` says which.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from dman_runtime.access.paths import path_within
from dman_runtime.api.door import Call, Method
from dman_runtime.errors import JobError, RequestError
from protos.dman.v1 import admin_pb2 as pb

logger = logging.getLogger(__name__)
SERVICE_NAME = "dman.v1.Admin"
MAX_REQUEST_BYTES = 8 << 10
_STORE = ("state",)
_WRITING = (*_STORE, "map_size_mib")
_ENCODING = (*_WRITING, "provider", "encoder_threads")

Paths = Callable[[str, str], str]  # the path that a caller names, by the name of the field


class RunningJob(Protocol):
    """A command that runs; see `serving.job`."""

    def frames(self) -> AsyncIterator[dict[str, Any]]: ...

    async def end(self) -> str: ...


@dataclass(frozen=True)
class Verb:
    """How a method becomes a command, and the last line of its output, which is JSON, the reply."""

    command: str
    request: type[Message]
    reply: type[Message]
    settings: Sequence[str]  # the options of the server that the command gets
    arguments: Callable[[Any, Paths], Sequence[str]] = lambda _request, _path: ()
    waits: bool = False  # for another one of its kind, as it takes little time; else it is refused
    streams: bool = False
    prints_document: bool = False  # which is the reply, piece by piece


VERBS = {
    "ListGenerations": Verb("generations", pb.ListGenerationsRequest, pb.ListGenerationsReply, _STORE, waits=True),
    "Rebuild": Verb(
        "rebuild",
        pb.RebuildRequest,
        pb.RebuildReply,
        _ENCODING,
        lambda request, path: [f"--bundle={path(request.bundle, 'bundle')}", *_given(request, "max_share")],
        streams=True,
    ),
    "Activate": Verb(
        "activate",
        pb.ActivateRequest,
        pb.ActivateReply,
        _ENCODING,
        lambda request, path: [
            f"--bundle={path(request.bundle, 'bundle')}",
            *_given(request, "share", "wait", "catch_up"),
        ],
    ),
    "Drop": Verb("drop", pb.DropRequest, pb.DropReply, _WRITING, lambda request, _: ["--", request.bundle_id]),
    "Backup": Verb(
        "backup",
        pb.BackupRequest,
        pb.BackupReply,
        _STORE,
        lambda request, path: [f"--output={path(request.output, 'output')}"],
    ),
    "ExportUser": Verb(
        "export-user",
        pb.ExportUserRequest,
        pb.ExportUserReply,
        _STORE,
        lambda request, _: ["--", request.user_id],
        waits=True,
        streams=True,
        prints_document=True,
    ),
    "Expire": Verb(
        "expire",
        pb.ExpireRequest,
        pb.ExpireReply,
        _WRITING,
        lambda request, _: [f"--idle-days={request.idle_days!r}", *(["--dry-run"] if request.dry_run else [])],
    ),
    "Verify": Verb(
        "verify",
        pb.VerifyRequest,
        pb.VerifyReply,
        _STORE,
        lambda request, path: [*_paths(request, path, "bundle"), *_given(request, "sample")],
    ),
    "SwitchItems": Verb(
        "items",
        pb.SwitchItemsRequest,
        pb.SwitchItemsReply,
        _WRITING,
        lambda request, path: [
            *_paths(request, path, "file"),
            *_texts(request, "item_column"),
            "off" if request.off else "on",
            "--",
            *request.item_ids,
        ],
        waits=True,
    ),
    "ListItemsOff": Verb(
        "items",
        pb.ListItemsOffRequest,
        pb.ListItemsOffReply,
        _STORE,
        lambda _request, _path: ["list"],
        waits=True,
        streams=True,
        prints_document=True,
    ),
    "AddItems": Verb(
        "add-items",
        pb.AddItemsRequest,
        pb.AddItemsReply,
        _WRITING,
        lambda request, path: [
            f"--bundle={path(request.bundle, 'bundle')}",
            f"--file={path(request.file, 'file')}",
            *_paths(request, path, "embeddings"),
            *_texts(request, "item_column", "like_column"),
        ],
    ),
}


def _given(request: Any, *names: str) -> list[str]:
    """Options for the optional numbers of a request that are there."""
    return [f"--{name.replace('_', '-')}={getattr(request, name)!r}" for name in names if request.HasField(name)]


def _texts(request: Any, *names: str) -> list[str]:
    """Options for the texts of a request that are not empty."""
    return [f"--{name.replace('_', '-')}={text}" for name in names if (text := getattr(request, name))]


def _paths(request: Any, path: Paths, *names: str) -> list[str]:
    """The same for paths."""
    return [f"--{name}={path(text, name)}" for name in names if (text := getattr(request, name))]


class AdminService:
    """All of it belongs to one event loop."""

    def __init__(
        self,
        start: Callable[[Sequence[str]], RunningJob],
        *,
        settings: Mapping[str, object],
        root: Path | None,
        rollout: Callable[[], Mapping[str, Any]],
    ) -> None:
        """`start` runs a command; `settings` are options of the server by name; what callers name is in `root`;
        `rollout` gives the fields of a GetRolloutReply.
        """
        self._start, self._settings, self._root, self._rollout = start, settings, root, rollout
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by command

    def methods(self) -> list[Method]:
        return [
            Method(f"/{SERVICE_NAME}/GetRollout", pb.GetRolloutRequest, self.GetRollout),
            *(self._method(name, verb) for name, verb in VERBS.items()),
        ]

    async def GetRollout(self, request: pb.GetRolloutRequest, call: Call) -> pb.GetRolloutReply:
        return pb.GetRolloutReply(**self._rollout())

    def _method(self, name: str, verb: Verb) -> Method:
        async def run(request: Message, call: Call) -> Message:
            if request.ByteSize() > MAX_REQUEST_BYTES:
                raise RequestError(f"the message has more than {MAX_REQUEST_BYTES >> 10} KiB", "send a smaller one")
            settings = [f"--{name.replace('_', '-')}={self._settings[name]}" for name in verb.settings]
            json_line = [] if verb.prints_document else ["--json"]
            arguments = verb.arguments(request, self._path)
            async with self._turn(verb):
                return await self._run(verb, [verb.command, *settings, *json_line, *arguments], call)

        return Method(f"/{SERVICE_NAME}/{name}", verb.request, run, streams=verb.streams)

    def _path(self, text: str, parameter: str) -> str:
        found = path_within(self._root, text, parameter=parameter)
        if found.is_relative_to(Path(str(self._settings["state"])).resolve()):
            raise RequestError(f"{parameter} {text!r:.200} is in the state directory", "name another directory")
        return str(found)

    @asynccontextmanager
    async def _turn(self, verb: Verb) -> AsyncIterator[None]:
        """One job of a kind at a time."""
        turn = self._turns[verb.command]
        if turn.locked() and not verb.waits:
            raise JobError(f"another {verb.command} runs", "wait until it has ended, or cancel it")
        async with turn:
            yield

    async def _run(self, verb: Verb, arguments: Sequence[str], call: Call) -> Message:
        began, ended = time.monotonic(), "cancelled"
        fields = {"event": "admin_job", "command": verb.command, "caller": call.caller}
        logger.info("%s for %s begins", verb.command, call.caller, extra=fields)
        try:
            reply = await self._reply(verb, arguments, call)
            ended = "done"
            return reply
        except JobError as error:
            ended = f"failed: {error}"
            raise
        finally:
            logger.info(
                "%s for %s, %.1f s: %s", verb.command, call.caller, time.monotonic() - began, ended, extra=fields
            )

    async def _reply(self, verb: Verb, arguments: Sequence[str], call: Call) -> Message:
        began, output, ended = time.monotonic(), list[str](), None
        job = self._start(arguments)
        try:
            async with aclosing(job.frames()) as frames:  # type: ignore[type-var]
                async for frame in frames:
                    if "progress" in frame:
                        done, total = frame["progress"]
                        progress = pb.Progress(done=done, total=total, seconds=time.monotonic() - began)
                        await call.tell(verb.reply(progress=progress))
                    elif "output" not in frame:
                        ended = frame
                    elif verb.prints_document:
                        await call.tell(verb.reply(part=frame["output"].encode()))
                    else:
                        output.append(frame["output"])
        finally:
            how = await job.end()
        if ended is None:
            raise JobError.failed(
                status="INTERNAL", cause=f"the process of the job ended early, {how}", remedy="look at the server's log"
            )
        if "failure" in ended:
            raise JobError.failed(**ended["failure"])
        return verb.reply() if verb.prints_document else _result(verb, "".join(output))


def _result(verb: Verb, output: str) -> Message:
    """The reply that a command printed: its last line, and the text before it."""
    text, _, last = output.rstrip("\n").rpartition("\n")
    result = json.loads(last) | {"text": text}
    return ParseDict({"result": result} if verb.streams else result, verb.reply())
