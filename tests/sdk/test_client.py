"""The life of a client: opening, closing, sharing, reconnecting. Both clients have the same methods."""

import asyncio
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from sdk import AsyncClient, Client, ClientClosedError, EventLoopError, Recommendations

from .awaited import Awaited, Connect
from .fake_server import Recorder, hold, serve_recorder

METHODS = ("delete_user", "recommend", "recommend_many", "status", "update", "update_many", "user")

pytestmark = pytest.mark.timeout(30)


async def test_a_closed_client_says_so(client: Awaited) -> None:
    await client.recommend("anna")
    await client.close()
    await client.close()
    for method, args in (("update", ("anna", 1)), ("recommend", ()), ("__enter__", ()), ("__aenter__", ())):
        if hasattr(client.client, method):
            with pytest.raises(ClientClosedError, match="Create a new one"):
                await getattr(client, method)(*args)
    assert "(closed)" in repr(client.client)


async def test_a_client_that_never_called_can_be_closed(client: Awaited) -> None:
    await client.close()
    with pytest.raises(ClientClosedError):
        await client.recommend("anna")


async def test_closing_ends_the_calls_under_way(client: Awaited, recorder: Recorder) -> None:
    release, arrived = threading.Event(), threading.Event()
    recorder.script.append(lambda: hold(arrived, release))

    async def call() -> None:
        with pytest.raises(ClientClosedError) as caught:
            if isinstance(client.client, Client):
                await asyncio.to_thread(client.client.update, "anna", 1)
            else:
                await client.update("anna", 1)
        assert caught.value.request_id == recorder.request.request_id  # it may be stored

    calling = asyncio.create_task(call())
    await asyncio.to_thread(arrived.wait, 10)
    await client.close()
    await calling
    release.set()


async def test_one_connection_is_reused_and_each_client_has_its_own(
    server: SimpleNamespace, connect: Connect, recorder: Recorder
) -> None:
    first, second = connect(server.target), connect(server.target)
    for _ in range(5):
        await first.recommend("anna")
    assert len({seen.peer for seen in recorder.seen}) == 1
    await second.recommend("anna")
    assert len({seen.peer for seen in recorder.seen}) == 2


async def test_a_client_outlives_a_restart_of_its_server(connect: Connect) -> None:
    first, target = serve_recorder(Recorder())
    client = connect(target, wait_for_ready=True)
    await client.recommend("anna")
    first.stop(None).wait()
    second, _ = serve_recorder(Recorder(), target)
    assert len(await client.recommend("anna")) == 2
    second.stop(None).wait()


def test_a_client_is_shared_by_threads(server: SimpleNamespace, recorder: Recorder) -> None:
    with Client(server.target, timeout=10) as client, ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda user: client.update(user, [1]).applied, range(64)))
    assert results == [1] * 64
    assert {seen.request.user_id for seen in recorder.seen} == {str(user) for user in range(64)}


async def test_an_async_client_is_shared_by_tasks(server: SimpleNamespace) -> None:
    async with AsyncClient(server.target, timeout=10) as client:
        results = await asyncio.gather(*(client.update(user, [1]) for user in range(64)))
    assert [result.applied for result in results] == [1] * 64


async def test_cancelling_a_task_cancels_its_call(server: SimpleNamespace, recorder: Recorder) -> None:
    release, arrived = threading.Event(), threading.Event()
    recorder.script.append(lambda: hold(arrived, release))
    async with AsyncClient(server.target, timeout=10) as client:
        calling = asyncio.create_task(client.recommend("anna"))
        await asyncio.to_thread(arrived.wait, 10)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        release.set()
        assert len(await client.recommend("anna")) == 2  # the client is as good as before


async def test_an_async_client_refuses_another_event_loop(server: SimpleNamespace) -> None:
    async with AsyncClient(server.target, timeout=10) as client:
        await client.recommend("anna")
        with pytest.raises(EventLoopError, match="one client for each loop"):
            await asyncio.to_thread(lambda: asyncio.run(client.recommend("anna")))


@pytest.mark.parametrize("name", METHODS)
def test_both_clients_have_the_same_documented_methods(name: str) -> None:
    sync, async_ = getattr(Client, name), getattr(AsyncClient, name)
    assert inspect.signature(sync) == inspect.signature(async_)
    assert next(iter(inspect.signature(sync).parameters)) == "self"
    assert inspect.getdoc(sync) == inspect.getdoc(async_)
    assert "Raises:" in sync.__doc__
    for parameter in [*inspect.signature(sync).parameters][1:]:
        assert f"    {parameter}: " in sync.__doc__
    assert inspect.iscoroutinefunction(async_) and not inspect.iscoroutinefunction(sync)
    assert async_.__qualname__ == f"AsyncClient.{name}"


def test_both_clients_have_the_same_names() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient) == {*METHODS, "close", "history", "target"}
    assert inspect.signature(Client) == inspect.signature(AsyncClient)
    assert inspect.signature(Client.recommend).return_annotation is Recommendations
