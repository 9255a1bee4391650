"""The client of those who look after a server's store."""

from typing import Any

from sdk import _admin_calls
from sdk._client import BlockingClient
from sdk._methods import blocking

ADMIN_TIMEOUT = 86_400.0  # seconds: a rebuild may take hours, and a server that is away is noticed at once


class AdminClient(BlockingClient):
    """A connection to the admin service of a DMAN server, which has an address of its own.

    Jobs run beside the server and end with their call: when its timeout has passed, and when the client is closed.

        with AdminClient("unix:/run/dman/admin.sock") as admin:
            print(admin.rebuild("bundles/new", progress=print).text)
            print(admin.activate("bundles/new").text)

    Threads may share it. Every failure is a `DmanError`.
    """

    def __init__(self, target: str, *, timeout: float = ADMIN_TIMEOUT, **settings: Any) -> None:
        """Takes the arguments of `Client`, and raises what that raises. A call may take a day by default."""
        options = {**_KEEPALIVE, **dict(settings.pop("options", ()))}
        super().__init__(target, timeout=timeout, options=tuple(options.items()), **settings)

    generations = blocking(_admin_calls.generations, "AdminClient")
    rollout = blocking(_admin_calls.rollout, "AdminClient")
    rebuild = blocking(_admin_calls.rebuild, "AdminClient")
    activate = blocking(_admin_calls.activate, "AdminClient")
    drop = blocking(_admin_calls.drop, "AdminClient")
    backup = blocking(_admin_calls.backup, "AdminClient")
    export_user = blocking(_admin_calls.export_user, "AdminClient")
    expire = blocking(_admin_calls.expire, "AdminClient")
    verify = blocking(_admin_calls.verify, "AdminClient")
    switch_items = blocking(_admin_calls.switch_items, "AdminClient")
    items_off = blocking(_admin_calls.items_off, "AdminClient")
    add_items = blocking(_admin_calls.add_items, "AdminClient")


# A server that is gone without a word is noticed within a minute or so.
_KEEPALIVE = {"grpc.keepalive_time_ms": 60_000, "grpc.keepalive_timeout_ms": 20_000}
