"""Timed blocks of calls that take turns: what makes two numbers of one run comparable on a machine that is not quiet.

A round holds one block of every operation; rounds differ in which operation comes first. Compare operations round by
round, and take the median over the rounds.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise, zip_longest
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

import grpc
import numpy as np

from dman_runtime.errors import UsageError

CALLS_PER_BLOCK = 20  # per thread, of the least frequent operation, where a plan does not say how many rounds
WARM_UP_CALLS = 20  # per thread and operation, not counted
BARRIER_SECONDS = 120.0
WRONG_REPLY = "WRONG_REPLY"


@dataclass(frozen=True)
class Operation:
    """Something to time. Only `send` is timed: the request is made before, and the reply checked after."""

    name: str
    prepare: Callable[[], Any]
    send: Callable[[Any], Any]
    accept: Callable[[Any, Any], bool] = lambda request, reply: True


@dataclass
class Block:
    """Consecutive calls of one operation, by all threads."""

    began: float  # time.perf_counter(), one clock for all processes of a machine
    ended: float
    milliseconds: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (successes) float64
    errors: Counter[str] = field(default_factory=Counter)  # by status

    @property
    def count(self) -> int:
        return len(self.milliseconds) + self.errors.total()

    @property
    def p50(self) -> float:
        return float(np.median(self.milliseconds)) if len(self.milliseconds) else float("nan")

    @property
    def p99(self) -> float:
        return float(np.percentile(self.milliseconds, 99)) if len(self.milliseconds) else float("nan")

    @property
    def per_second(self) -> float:
        return len(self.milliseconds) / max(self.ended - self.began, 1e-9)

    @staticmethod
    def merged(blocks: Sequence[Block]) -> Block:
        return Block(
            min(block.began for block in blocks),
            max(block.ended for block in blocks),
            np.concatenate([block.milliseconds for block in blocks]),
            sum((block.errors for block in blocks), Counter()),
        )


@dataclass(frozen=True)
class Plan:
    """How many calls of each operation, by how many threads, and when to stop at the latest."""

    counts: Mapping[str, int]  # operation -> calls in all; the order is that of the first round
    concurrency: int
    seconds: float = 3600.0
    rounds: int | None = None  # None: as many as give every thread CALLS_PER_BLOCK

    def schedule(self) -> Schedule:
        """For each round the operations in their order, with their numbers of calls."""
        rounds = self.rounds or max(1, min(self.counts.values()) // (CALLS_PER_BLOCK * self.concurrency))
        shares = {name: split(count, [1.0] * rounds) for name, count in self.counts.items()}
        names = list(self.counts)
        return [
            [(name, shares[name][r]) for name in names[r % len(names) :] + names[: r % len(names)]]
            for r in range(rounds)
        ]


def split(total: int, shares: Sequence[float]) -> list[int]:
    """`total` in whole parts proportional to `shares`, which add up to it."""
    ends = np.rint(np.cumsum(shares) / np.sum(shares) * total).astype(int).tolist()
    return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def run_block(threads: Sequence[Operation], count: int, deadline: float, pool: ThreadPoolExecutor | None) -> Block:
    """`count` calls of one operation, shared out over the threads, each of which has its own `Operation`."""
    began = time.perf_counter()
    counts = split(count, [1.0] * len(threads))
    if pool is None:
        parts = [_calls(threads[0], count, deadline)]
    else:
        parts = list(pool.map(_calls, threads, counts, [deadline] * len(threads)))
    ended = time.perf_counter()
    nanoseconds = [taken for times, _ in parts for taken in times]
    return Block(began, ended, np.array(nanoseconds) / 1e6, sum((errors for _, errors in parts), Counter()))


def _calls(operation: Operation, count: int, deadline: float) -> tuple[list[int], Counter[str]]:
    """Nanoseconds of the calls that succeeded, and the others by status."""
    times: list[int] = []
    errors: Counter[str] = Counter()
    for _ in range(count):
        if time.perf_counter() > deadline:
            break
        request = operation.prepare()
        began = time.perf_counter_ns()
        try:
            reply = operation.send(request)
        except grpc.RpcError as error:
            errors[error.code().name] += 1
            continue
        taken = time.perf_counter_ns() - began
        if operation.accept(request, reply):
            times.append(taken)
        else:
            errors[WRONG_REPLY] += 1
    return times, errors


Schedule = list[list[tuple[str, int]]]
Open = Callable[[ExitStack, int, Sequence[str]], Sequence[Operation]]  # the operations of thread number N, by name


def interleave(
    schedule: Schedule,
    threads: Sequence[Sequence[Operation]],
    *,
    seconds: float,
    before_block: Callable[[], bool] = lambda: True,
) -> dict[str, list[Block]]:
    """Runs a schedule after a short warm-up; `threads` holds the same operations for every thread.

    Ends early after `seconds`, or when `before_block` says so by False. The warm-up has as many seconds to itself.
    """
    by_name = {one.name: [operations[index] for operations in threads] for index, one in enumerate(threads[0])}
    blocks: dict[str, list[Block]] = {name: [] for name in by_name}
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(threads))) if len(threads) > 1 else None
        warm_by = time.perf_counter() + seconds
        for operations in by_name.values():
            run_block(operations, WARM_UP_CALLS * len(threads), warm_by, pool)
        deadline = time.perf_counter() + seconds
        for current in schedule:
            for name, count in current:
                if time.perf_counter() > deadline or not before_block():
                    return blocks
                blocks[name].append(run_block(by_name[name], count, deadline, pool))
    return blocks


def run_in_processes(plan: Plan, opened: Open, processes: int = 1) -> dict[str, list[Block]]:
    """Runs a plan with its threads spread over client processes, which begin every block together."""
    if processes == 1:
        return _one_process(opened, plan, (0, plan.concurrency), lambda: True)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    ends = np.cumsum([0, *split(plan.concurrency, [1.0] * processes)]).tolist()
    pipes = []
    for part in pairwise(ends):
        ours, theirs = context.Pipe(duplex=False)
        context.Process(target=_worker, args=(opened, plan, part, barrier, theirs), daemon=True).start()
        theirs.close()  # so that the pipe ends when the process does
        pipes.append(ours)
    found = [_received(pipe) for pipe in pipes]
    return {
        name: [Block.merged([one for one in parts if one]) for parts in zip_longest(*(each[name] for each in found))]
        for name in found[0]
    }


@contextmanager
def beside(main: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A process that runs `main(pipe, *arguments)`, and the other end of its pipe. It ends, or is ended, with that."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()  # so that the pipe ends when the process does
    try:
        yield ours
    finally:
        ours.close()  # ends the process
        process.join(10)
        process.kill()
        process.join()


def _received(pipe: Connection) -> dict[str, list[Block]]:
    with pipe:
        try:
            found = pipe.recv()
        except EOFError:
            found = "it died"
    if isinstance(found, str):
        raise UsageError(f"a client process failed: {found}")
    return found


def _one_process(
    opened: Open, plan: Plan, part: tuple[int, int], before_block: Callable[[], bool]
) -> dict[str, list[Block]]:
    """The share of the threads numbered part[0] to part[1] - 1."""
    begin, end = part
    others = [begin, end - begin, plan.concurrency - end]
    schedule = [[(name, split(count, others)[1]) for name, count in current] for current in plan.schedule()]
    with ExitStack() as stack:
        threads = [opened(stack, number, list(plan.counts)) for number in range(begin, end)]
        return interleave(schedule, threads, seconds=plan.seconds, before_block=before_block)


def _worker(opened: Open, plan: Plan, part: tuple[int, int], barrier: Barrier, pipe: Connection) -> None:
    def together() -> bool:
        try:
            barrier.wait(BARRIER_SECONDS)
        except threading.BrokenBarrierError:
            return False  # some process is out of time
        return True

    complete = False
    try:
        blocks = _one_process(opened, plan, part, together)
        complete = sum(map(len, blocks.values())) == sum(map(len, plan.schedule()))
        pipe.send(blocks)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
    finally:
        if not complete:
            barrier.abort()  # nobody need wait for this process


# -- what blocks say -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """One operation over all blocks; times in milliseconds, of calls that succeeded."""

    name: str
    count: int
    errors: dict[str, int]
    per_second: float
    p50: float
    p90: float
    p99: float
    max: float

    def as_json(self) -> dict[str, Any]:
        """Times that no call succeeded to give are null."""
        numbers = {name: value for name, value in asdict(self).items() if name != "name"}
        return {name: None if name != "errors" and np.isnan(value) else value for name, value in numbers.items()}


def summary(name: str, blocks: Sequence[Block]) -> Summary:
    times = np.concatenate([np.zeros(0), *(block.milliseconds for block in blocks)])  # there may be no block
    seconds = sum(block.ended - block.began for block in blocks)
    p50, p90, p99, most = np.percentile(times, (50, 90, 99, 100)).tolist() if len(times) else [float("nan")] * 4
    return Summary(
        name,
        sum(block.count for block in blocks),
        dict(sum((block.errors for block in blocks), Counter())),
        len(times) / max(seconds, 1e-9),
        p50,
        p90,
        p99,
        most,
    )


@dataclass(frozen=True)
class Spread:
    """One number per round: their median, and the smallest and largest."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({min(self.values):.3g} to {max(self.values):.3g})"


def clean(blocks: Mapping[str, Sequence[Block]]) -> Mapping[str, Sequence[Block]]:
    """The blocks. Raises UsageError when a call failed: times of a server that fails say nothing."""
    for name, of_name in blocks.items():
        if errors := summary(name, of_name).errors:
            raise UsageError(f"{name} calls failed while measuring: {errors}")
    return blocks


def p50s(blocks: Sequence[Block]) -> Spread:
    return Spread(tuple(block.p50 for block in blocks))


def ratios(blocks: Sequence[Block], floor: Sequence[Block]) -> Spread:
    """p50 by p50, round by round."""
    return Spread(tuple(block.p50 / other.p50 for block, other in zip(blocks, floor, strict=True)))


def rates(blocks: Sequence[Block]) -> Spread:
    return Spread(tuple(block.per_second for block in blocks))


def rate_ratios(blocks: Sequence[Block], floor: Sequence[Block]) -> Spread:
    """Throughput by throughput, round by round."""
    return Spread(tuple(one.per_second / other.per_second for one, other in zip(blocks, floor, strict=True)))
