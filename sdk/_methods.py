"""Makes the methods of the clients from the functions that build their calls.

Each has the signature and the docstring of its function, and gives the call to the `_run` of its client.
"""

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from sdk._calls import Call
from sdk._history import Pages
from sdk._types import Event

P = ParamSpec("P")
R = TypeVar("R")


class _Runs(Protocol):
    def _run(self, call: Call[Any, Any, R]) -> R: ...


class _Iterates(Protocol):
    def _iterate(self, pages: Pages) -> Iterator[Event]: ...


class _RunsAsync(Protocol):
    async def _run(self, call: Call[Any, Any, R]) -> R: ...

    def _iterate(self, pages: Pages) -> AsyncIterator[Event]: ...


def blocking(build: Callable[P, Call[Any, Any, R]], owner: str = "Client") -> Callable[Concatenate[_Runs, P], R]:
    """A method of Client, or of another class that blocks, from the function that builds its call."""

    def method(self: _Runs, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(build(*args, **kwargs))

    _copy_signature(method, build, owner)
    return method


def awaitable(
    build: Callable[P, Call[Any, Any, R]],
) -> Callable[Concatenate[_RunsAsync, P], Coroutine[Any, Any, R]]:
    """A method of AsyncClient from the function that builds its call."""

    async def method(self: _RunsAsync, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._run(build(*args, **kwargs))

    _copy_signature(method, build, "AsyncClient")
    return method


def iterating(build: Callable[P, Pages]) -> Callable[Concatenate[_Iterates, P], Iterator[Event]]:
    """A method of Client from the function that plans its calls."""

    def method(self: _Iterates, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[Event]:
        return self._iterate(build(*args, **kwargs))

    _copy_signature(method, build, "Client", Iterator[Event])
    return method


def async_iterating(build: Callable[P, Pages]) -> Callable[Concatenate[_RunsAsync, P], AsyncIterator[Event]]:
    """A method of AsyncClient from the function that plans its calls."""

    def method(self: _RunsAsync, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[Event]:
        return self._iterate(build(*args, **kwargs))

    _copy_signature(method, build, "AsyncClient", AsyncIterator[Event])
    return method


def _copy_signature(method: Any, build: Callable[..., Any], owner: str, result_type: Any = None) -> None:
    """Makes help() and inspect show `method` as if it were written by hand: the parameters of `build` after self."""
    functools.update_wrapper(method, build, assigned=("__name__", "__doc__"))
    del method.__wrapped__
    method.__qualname__ = f"{owner}.{build.__name__}"
    result_type = result_type or build.__annotations__["return"].__args__[-1]  # of Call[request, reply, result]
    method.__annotations__ = {**build.__annotations__, "return": result_type}
    signature = inspect.signature(build)
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = signature.replace(
        parameters=[self_parameter, *signature.parameters.values()], return_annotation=result_type
    )
