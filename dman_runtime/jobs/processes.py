"""Processes of this machine that work on batches. Each has a pipe of its own: one that dies costs what it was given."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

from dman_runtime.errors import DmanError, UsageError

AHEAD = 2  # batches of each process that wait or run
MAX_DEATHS = 3  # of processes, one after the other, that worked on the same batch
_LAST_SECONDS = 5.0  # from the end of a pipe to that of its process
Open = Callable[[], Callable[[Any], Any]]  # loads what the work needs, and returns what does it


def killed(how: str = "") -> DmanError:
    """The error that ends the work where a batch was given to MAX_DEATHS processes."""
    return UsageError(
        f"the processes that work on the users were killed {MAX_DEATHS} times in a row{how}",
        "look for the kernel's reason (memory?), and use fewer of them",
        parameter="processes",
    )


@dataclass(eq=False)
class Task:
    """A batch on its way to its result."""

    batch: Any
    deaths: int = 0  # of processes that worked on it
    done: bool = False
    result: Any = None
    error: BaseException | None = None  # in place of a result

    def finish(self, *, result: Any = None, error: BaseException | None = None) -> None:
        self.batch, self.done, self.result, self.error = None, True, result, error


class Pool:
    """Some processes that do the same. They start when there is something to do."""

    def __init__(self, count: int, open_work: Open) -> None:
        self._count, self._open = count, open_work
        self._workers, self._waiting = list[_Worker](), deque[Task]()

    def put(self, task: Task) -> None:
        self._waiting.append(task)

    def step(self) -> None:
        """Gives tasks to processes, waits until one of them has done something, and notes that.

        What a process had that has died goes to others.
        """
        while len(self._workers) < self._count and len(self._workers) < self._tasks():
            self._workers.append(_Worker(self._open))  # all of them before one is waited for
        while self._waiting and len((free := min(self._workers, key=lambda one: len(one.tasks))).tasks) < AHEAD:
            free.give(self._waiting.popleft())
        by_pipe = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(by_pipe)):
            worker = by_pipe[pipe]  # type: ignore[index]
            if not worker.receive():
                self._workers.remove(worker)
                self._take_back(worker)

    def _tasks(self) -> int:
        return len(self._waiting) + sum(len(worker.tasks) for worker in self._workers)

    def _take_back(self, worker: _Worker) -> None:
        how = worker.ended()
        if worker.tasks:
            first = worker.tasks[0]
            first.deaths += 1
            if first.deaths == MAX_DEATHS:
                worker.tasks.popleft().finish(error=killed(f" ({how})"))
        self._waiting.extendleft(reversed(worker.tasks))

    def end(self) -> None:
        """Ends all processes, in the middle of a batch too."""
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process. It takes its next batch while it works on one, and sends results while it works on."""

    def __init__(self, open_work: Open) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # a daemon: this process does not wait for it at its end
        self._process = context.Process(target=_work, args=(open_work, theirs), daemon=True)
        with _no_interrupts():  # Ctrl-C is for this process, not for the one that starts with the same mask
            self._process.start()
        theirs.close()  # so that the pipe ends with the process
        self.tasks = deque[Task]()  # given to it, the one that it works on first

    def give(self, task: Task) -> None:
        self.tasks.append(task)
        with suppress(OSError):  # it has died, which `receive` finds
            self.pipe.send(task.batch)

    def receive(self) -> bool:
        """Finishes the task that it has worked on; returns whether the process lives."""
        try:
            done, answer = self.pipe.recv()
        except (EOFError, OSError):
            return False
        self.tasks.popleft().finish(**{"result" if done else "error": answer})
        return True

    def end(self) -> None:
        self._process.kill()  # nothing if it has ended
        self._process.join()
        self.pipe.close()

    def ended(self) -> str:
        """How the process, which closes its pipe when it ends, has ended, in words."""
        self._process.join(_LAST_SECONDS)
        self.end()
        code = self._process.exitcode or 0
        names = {number.value: number.name for number in signal.Signals}
        return f"exit status {code}" if code >= 0 else names.get(-code, f"signal {-code}")


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """They come when this has ended."""
    resource_tracker.ensure_running()  # else it is started within, and lets them through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(open_work: Open, pipe: Connection) -> None:
    """What the process does. It ends when its pipe does: whoever started it has gone, or needs it no more."""
    batches, answers = SimpleQueue[Any](), SimpleQueue[bytes]()
    threading.Thread(target=_receive, args=(pipe, batches), daemon=True).start()
    threading.Thread(target=_send, args=(pipe, answers), daemon=True).start()
    do = None
    while True:
        batch = batches.get()
        try:
            do = do or open_work()
            answer = pickle.dumps((True, do(batch)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            answer = pickle.dumps((False, _portable(error)))
        answers.put(answer)


def _receive(pipe: Connection, batches: SimpleQueue[Any]) -> None:
    with suppress(EOFError, OSError):
        while True:
            batches.put(pipe.recv())
    os._exit(0)


def _send(pipe: Connection, answers: SimpleQueue[bytes]) -> None:
    with suppress(OSError):
        while True:
            pipe.send_bytes(answers.get())
    os._exit(0)


def _portable(error: Exception) -> Exception:
    """The same, with where it comes from, if another process can read it."""
    if isinstance(error, DmanError):
        return error
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(traceback.format_exc())
    return error
