"""What keeps gRPC working in a process that forks, and says so at once where it cannot.

A forked child has the memory of gRPC and none of its threads. Measured with grpcio 1.85.1 on Linux:

- A child of a process without calls under way opens a channel of its own and works: 400 of 400. While threads were
  calling, 1 child in 30 hung, and next to a busy AsyncClient 1 in 12 was aborted: gRPC then skips its own preparations.
  So a fork waits until no call is under way, and calls wait for the fork.
- While a call of grpc.aio is under way, 1 child in 4 is ended by a signal 11, whatever it does itself. The thread of an
  event loop that forks cannot wait for such calls; it says so in the log.
- Where the parent has used grpc.aio, whose poller is a thread, every call of an AsyncClient in the child hangs.
- With GRPC_ENABLE_FORK_SUPPORT=0, every call in the child hangs.
- A child that destroys a grpc.aio channel of its parent hangs, and so does the parent. So a child keeps such channels.

The first call in a child is watched, for what is not known here: other users of gRPC in the process, other versions.
"""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from sdk._exceptions import ForkError

ResultT = TypeVar("ResultT")
_log = logging.getLogger(__name__)
WAIT_SECONDS = 2.0  # that a fork waits for calls under way; by default a call takes 1 second at most
OVERDUE_SECONDS = 0.5  # after its deadline, a call that gRPC has not ended never ends
_OFF = ("0", "f", "false", "n", "no")  # of GRPC_ENABLE_FORK_SUPPORT


class Forks:
    """What the process knows of its forks. One object for all clients."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()  # held while the process forks
        self._running: dict[int, int] = {}  # calls under way, by thread
        self._forking = self._held = False
        self._hooked = self._uses_aio = False
        self._channels: weakref.WeakSet[object] = weakref.WeakSet()
        self._kept: list[object] = []
        self._refusal = self._aio_refusal = ""  # why gRPC cannot work in this process
        self.unproven = False  # no call has been answered in this child yet

    def opened(self, channel: object, *, aio: bool = False) -> None:
        """To be called with every new channel."""
        self._channels.add(channel)
        self._uses_aio |= aio
        if not self._hooked and hasattr(os, "register_at_fork"):
            self._hooked = True  # after gRPC's own hooks, so that these run before them
            os.register_at_fork(
                before=self._before, after_in_parent=self._after_in_parent, after_in_child=self._after_in_child
            )

    def check(self, *, aio: bool = False, request_id: str | None = None) -> None:
        """Raises ForkError where gRPC cannot work in this process. To be called before it is used."""
        if os.getpid() != self._pid:  # forked by C code that runs no hooks
            self._after_in_child()
        refusal = self._refusal or (self._aio_refusal if aio else "")
        if refusal:
            raise ForkError(refusal, request_id=request_id)

    @contextmanager
    def running(self, seconds: float = 0.0) -> Iterator[None]:
        """One call. Waits for a fork in another thread, for at most so many seconds."""
        thread = threading.get_ident()
        with self._changed:
            if self._forking:
                self._changed.wait_for(lambda: not self._forking, seconds)
            self._running[thread] = self._running.get(thread, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                left = self._running.pop(thread, 0) - 1
                if left > 0:
                    self._running[thread] = left
                elif self._forking:
                    self._changed.notify_all()

    @property
    def forking(self) -> bool:
        """A fork waits for the calls under way."""
        return self._forking

    def watched(self, send: Callable[[], ResultT], seconds: float, request_id: str | None) -> ResultT:
        """`send()`, on a thread that is left behind where it does not return in time. Then raises ForkError."""
        future: Future[ResultT] = Future()

        def run() -> None:
            try:
                future.set_result(send())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="first call", daemon=True).start()
        try:
            result = future.result(seconds + OVERDUE_SECONDS)
        except TimeoutError:
            raise self.hung(request_id) from None
        self.unproven = False
        return result

    def hung(self, request_id: str | None) -> ForkError:
        """The error for a call that gRPC has not ended, now and for all later ones."""
        self._refusal = "gRPC does not work in this process, which was forked from one that used gRPC."
        return ForkError(self._refusal, request_id=request_id)

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _before(self) -> None:
        self._changed.acquire()
        self._held = True
        if threading.get_ident() not in self._running:  # else they cannot end before this returns
            self._forking = True
            self._changed.wait_for(lambda: not self._running, WAIT_SECONDS)
        if self._running:
            _log.warning("forking while calls are under way: gRPC cannot work in the child. %s", ForkError.remedy)

    def _after_in_parent(self) -> None:
        if self._held:
            self._held = self._forking = False
            self._changed.notify_all()
            self._changed.release()

    def _after_in_child(self) -> None:
        interrupted, used = bool(self._running), self._hooked
        self._pid = os.getpid()
        self._changed = threading.Condition()  # another thread of the parent may have held it
        self._running = {}
        self._forking = self._held = False
        self._kept = [*self._kept, *self._channels]
        self.unproven |= used
        if interrupted:
            self._refusal = self._refusal or "This process was forked while calls were under way."
        if used and os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "").lower() in _OFF:
            self._refusal = "This process was forked, and GRPC_ENABLE_FORK_SUPPORT switches off what gRPC needs then."
        if self._uses_aio:
            self._aio_refusal = "This process was forked from one that had used an AsyncClient."


FORKS = Forks()
