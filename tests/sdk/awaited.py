"""One way to call both clients."""

import inspect
from collections.abc import Callable
from typing import Any

from sdk import AsyncClient, Client


class Awaited:
    """A Client or an AsyncClient. Every method is awaited, so that one test fits both."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self.client, name)(*args, **kwargs)
            return await result if inspect.isawaitable(result) else result

        return call


Connect = Callable[..., Awaited]
