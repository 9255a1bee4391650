"""`dman.v1.Operations`: the status of a server, for those who run it."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable

from dman_runtime.api.admission import Admission
from dman_runtime.api.door import Call, Method
from dman_runtime.problems import ClusterStatus, Problems
from protos.dman.v1 import dman_pb2 as pb

SERVICE_NAME = "dman.v1.Operations"


class OperationsService:
    def __init__(
        self,
        bundle_id: Callable[[], str],
        problems: Problems,
        admission: Admission,
        cluster: Callable[[], ClusterStatus],
    ) -> None:
        """`bundle_id` tells which bundle answers, `cluster` what the supervisor knows of all workers."""
        self._bundle_id, self._problems, self._admission, self._cluster = bundle_id, problems, admission, cluster
        self._started, self._version = time.monotonic(), importlib.metadata.version("dman")

    def methods(self) -> list[Method]:
        return [Method(f"/{SERVICE_NAME}/GetStatus", pb.GetStatusRequest, self.GetStatus)]

    async def GetStatus(self, request: pb.GetStatusRequest, call: Call) -> pb.GetStatusReply:
        now, cluster = time.monotonic(), self._cluster()
        problems = [
            pb.Problem(name=one.name, detail=one.detail, seconds=max(0, now - one.since), blocking=one.blocking)
            for one in self._problems.now()
        ]
        problems += [
            pb.Problem(name=one.name, detail=one.detail, seconds=max(0, now - one.since)) for one in cluster.problems
        ]
        return pb.GetStatusReply(
            ready=not self._problems.blocking,
            problems=problems,
            bundle_id=self._bundle_id(),
            workers=cluster.workers,
            workers_ready=cluster.ready,
            restarts=cluster.restarts,
            uptime_seconds=now - self._started,
            requests=self._admission.requests,
            bytes_in_flight=self._admission.bytes,
            version=self._version,
        )
