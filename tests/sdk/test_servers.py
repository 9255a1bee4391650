"""Several servers behind one client: who serves whom, and what happens when one is gone."""

from __future__ import annotations

import pickle
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from sdk import AsyncClient, Client, InvalidArgumentError, UnavailableError
from sdk._servers import USER_HEADER, Servers, servers

from .awaited import Connect
from .certificates import Pki, certificate, key
from .fake_server import Recorder, serve_recorder

pytestmark = pytest.mark.timeout(60)
USERS = [f"user {n}" for n in range(60)]


class Fleet:
    """Running servers, each with its recorder."""

    def __init__(self, count: int, credentials: grpc.ServerCredentials | None = None) -> None:
        self.recorders = [Recorder() for _ in range(count)]
        started = [serve_recorder(recorder, credentials=credentials) for recorder in self.recorders]
        self._servers, self.addresses = [server for server, _ in started], [address for _, address in started]

    def serves(self) -> dict[str, int]:
        """Which server each user was served by last."""
        return {seen.request.user_id: n for n, one in enumerate(self.recorders) for seen in one.seen}

    def clear(self) -> None:
        for recorder in self.recorders:
            recorder.seen.clear()

    def stop(self, number: int) -> None:
        self._servers[number].stop(None).wait()

    def stop_all(self) -> None:
        for number in range(len(self._servers)):
            self.stop(number)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet(3)
    yield fleet
    fleet.stop_all()


async def test_each_user_stays_with_one_server_and_all_servers_have_users(fleet: Fleet, connect: Connect) -> None:
    client = connect(fleet.addresses)
    for user in USERS:
        await client.recommend(user)
    first = fleet.serves()
    assert min(Counter(first.values()).values()) >= 8 and len(set(first.values())) == 3
    fleet.clear()
    other = connect(fleet.addresses[::-1])  # another process would not know in which order the first has them
    for asked in (client, other):
        for user in USERS:
            await asked.update(user, 1)
            await asked.user(user)
    assert fleet.serves() == first
    assert sum(len(one.seen) for one in fleet.recorders) == 4 * len(USERS)


async def test_users_of_a_server_that_is_gone_are_served_by_others_and_no_other_user_moves(
    fleet: Fleet, connect: Connect
) -> None:
    client = connect(fleet.addresses)
    for user in USERS:
        await client.recommend(user)
    before = fleet.serves()
    fleet.clear()
    fleet.stop(1)
    for user in USERS:
        await client.recommend(user)
    after = fleet.serves()
    assert {user: n for user, n in before.items() if n != 1} == {u: n for u, n in after.items() if before[u] != 1}
    assert {after[user] for user, n in before.items() if n == 1} == {0, 2}


async def test_batch_goes_to_any_server(fleet: Fleet, connect: Connect) -> None:
    answers = await connect(fleet.addresses).recommend_many(USERS)
    assert [one.bundle_id for one in answers] == [f"for {user}" for user in USERS]


async def test_calls_of_a_user_carry_the_same_header_which_does_not_name_the_user(
    fleet: Fleet, connect: Connect
) -> None:
    client = connect(fleet.addresses[0])  # a proxy may be there
    await client.update("anna", 1)
    await client.recommend("anna")
    await client.user("anna")
    await client.delete_user("anna")
    await client.recommend("ümit")
    await client.recommend(what_if=[1])
    await client.update_many({"anna": [1]})
    found = [seen.metadata.get(USER_HEADER) for seen in fleet.recorders[0].seen]
    assert len(set(found[:4])) == 1 and len(found[0]) == 16 and found[4] not in (None, found[0])
    assert found[5:] == [None, None]


async def test_token_and_user_go_together(fleet: Fleet, connect: Connect) -> None:
    client = connect(fleet.addresses, token="s3cret")
    await client.recommend("anna")
    (seen,) = [seen for recorder in fleet.recorders for seen in recorder.seen]
    assert seen.metadata["authorization"] == "Bearer s3cret" and USER_HEADER in seen.metadata


async def test_proxy_of_the_environment_is_left_out(
    fleet: Fleet, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(Servers, "local", property(lambda self: False))  # else it would be left out anyway
    assert (await connect(fleet.addresses).recommend("anna")).bundle_id == "b1"


async def test_names_are_looked_up(fleet: Fleet, connect: Connect) -> None:
    names = [address.replace("127.0.0.1", "localhost") for address in fleet.addresses]
    for target in (names, names[:1]):
        for user in USERS[:5]:
            assert (await connect(target).recommend(user)).bundle_id == "b1"


async def test_tls_knows_several_servers_by_the_name_of_the_first(pki: Pki, connect: Connect) -> None:
    fleet = Fleet(2, grpc.ssl_server_credentials([(key(pki.server), certificate(pki.server))]))
    try:
        names = [address.replace("127.0.0.1", "localhost") for address in fleet.addresses]
        client = connect(names, ca_certificate=pki.authority)
        for user in USERS[:20]:
            await client.recommend(user)
        assert set(fleet.serves().values()) == {0, 1}
    finally:
        fleet.stop_all()


@pytest.mark.parametrize("retries", [0, 2])
async def test_name_that_is_unknown_is_a_server_that_is_unavailable(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, retries: int
) -> None:
    asked = []

    def lookup(host: str, port: int, **_: Any) -> Any:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    client = connect(["one.example:50051", "two.example:50051"], retries=retries)
    with pytest.raises(UnavailableError, match=r"looking up one\.example:50051 failed: Name or service") as caught:
        await client.update("anna", 1, request_id="r1")
    assert caught.value.request_id == "r1" and len(asked) == retries + 1


def test_servers_without_a_kind_of_address_in_common_are_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(host: str, port: int, **_: Any) -> Any:
        if host == "one":
            return [(socket.AF_INET, 1, 6, "", ("10.0.0.1", port))]
        return [(socket.AF_INET6, 1, 6, "", ("fd00::1", port, 0, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert servers(["one:1"]).address() == "dns:///one:1"
    assert servers(["two:1", "[fd00::2]:2"]).address() == "ipv6:[fd00::1]:1,[fd00::1]:2"
    with pytest.raises(grpc.RpcError) as caught:
        servers(["one:1", "two:1"]).address()
    assert "some have IPv4 addresses only" in caught.value.details()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ([], "a list of 1 to 1000, not of 0"),
        (["host"], r"target\[0\] must be 'host:port', not 'host'"),
        (["a:1", "b:0"], r"target\[1\] must be"),
        (["a:1", "b:70000"], r"target\[1\] must be"),
        (["a:1,b:2"], r"target\[0\] must be"),
        (["unix:/run/x"], r"target\[0\] must be"),
        (["a:1", 5], r"target\[1\] must be"),
        (["a:1", "a:1"], "names a server twice"),
        (7, "must be an address such as 'localhost:50051', or a list of them, not 7"),
    ],
)
def test_lists_that_cannot_work_are_refused(kind: Any, target: Any, complaint: str) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint):
        kind(target)


def test_token_for_servers_of_which_one_is_elsewhere_needs_tls() -> None:
    with pytest.raises(InvalidArgumentError, match="plain text"):
        Client(["localhost:1", "elsewhere.example:1"], token="s3cret")
    Client(["localhost:1", "127.0.0.1:2"], token="s3cret").close()


def test_client_of_several_servers_can_be_pickled(fleet: Fleet) -> None:
    with Client(fleet.addresses) as client, pickle.loads(pickle.dumps(client)) as copy:
        assert copy.target == client.target == ",".join(fleet.addresses)
        assert copy._settings.servers == Servers(tuple(fleet.addresses), several=True)
        for user in USERS[:10]:
            client.recommend(user)
            copy.recommend(user)
    assert all(len(one.seen) % 2 == 0 for one in fleet.recorders)
