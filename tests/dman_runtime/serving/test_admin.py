"""The admin service of real servers: what the commands do, through a server; who may ask; and how jobs end."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import lmdb
import psutil
import pytest
from access_files import write_lines
from conftest import running, running_server, serve_config

import sdk
from dman_runtime import cli
from dman_runtime.access.tokens import new_token
from dman_runtime.model.generation import Generation
from dman_runtime.serving.app import App
from dman_runtime.store.lmdb import LmdbStore
from protos.dman.v1 import admin_pb2 as pb
from protos.dman.v1.admin_pb2_grpc import AdminStub
from sdk import AdminClient, Client, JobError, Progress
from tools.faults.servers import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # each job is a process
USERS, EVENTS = 40, 30


def send_users(address: str, users: int = USERS) -> None:
    with Client(address, timeout=30) as client:
        client.update_many({f"user {n}": [1 + (n + i) % 60 for i in range(EVENTS)] for n in range(users)})


@pytest.fixture
def place(exact_bundle: Path, renamed_bundle: Path, tmp_path: Path) -> Path:
    """A directory with two bundles, `old` and `new`."""
    for name, bundle in (("old", exact_bundle), ("new", renamed_bundle)):
        shutil.copytree(bundle, tmp_path / name)
    return tmp_path


@contextmanager
def serving(place: Path, **options: Any) -> Iterator[App]:
    """One worker, in this process, with users."""
    options = {"admin_socket": place / "admin.sock", "admin_root": place, **options}
    with running(App(serve_config(place / "old", place / "state", **options))) as app:
        yield app


@pytest.fixture
def app(place: Path) -> Iterator[App]:
    with serving(place) as app:
        send_users(f"localhost:{app.port}")
        yield app


def client_of(app: App) -> AdminClient:
    return AdminClient(app.admin_address)


def jobs() -> list[psutil.Process]:
    """Of servers that this process started, or is."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "dman_runtime.attended" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def calling(call: Callable[[], Any]) -> Iterator[list[Any]]:
    """A call on a thread of its own, which ends with the block: the list gets its result or its error."""
    ended = list[Any]()

    def run() -> None:
        try:
            ended.append(call())
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield ended
    thread.join(60)
    assert not thread.is_alive()


@contextmanager
def under_way(client: AdminClient, bundle: str) -> Iterator[tuple[psutil.Process, list[Any]]]:
    """A rebuild that takes long: its process, and the list of `calling`."""
    began = threading.Event()
    with calling(lambda: client.rebuild(bundle, max_share=0.001, progress=lambda _: began.set())) as ended:
        assert began.wait(60), ended
        (process,) = jobs()
        yield process, ended


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


# -- what the commands do --------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Status, output and error of a command."""
    capsys.readouterr()
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, "".join(line for line in err.splitlines() if line.startswith("error: "))


@pytest.fixture
def served(place: Path) -> Iterator[Callable[[], str]]:
    """Starts a server over `state`, in a process of its own, so that the commands can open the store here."""
    with ExitStack() as stack:

        def start() -> str:
            options = ["--provider", "cpu", "--admin-socket", str(place / "admin.sock"), "--admin-root", str(place)]
            address, _ = stack.enter_context(running_server(place / "old", place / "state", *options))
            return address

        yield start


def test_commands_say_the_same_through_a_server_as_on_its_store(
    served: Callable[[], str], place: Path, exact: Generation, capsys: pytest.CaptureFixture[str]
) -> None:
    send_users(served())
    for command in (
        ["generations", "--json"],
        ["verify", "--json"],
        ["export-user", "user 7"],
        ["expire", "--idle-days", 3, "--dry-run"],
        ["rebuild", "--bundle", place / "old", "--json"],
        ["activate", "--bundle", place / "old"],
        ["verify", "--bundle", place / "old", "--sample", 3, "--json"],
        # And what they refuse.
        ["export-user", "nobody"],
        ["items", "off"],
        ["items", "list", 3],
        ["expire", "--idle-days", -3],
        ["drop", exact.bundle_id],
        ["drop", "--", "--help"],
        ["rebuild", "--bundle", place / "old", "--max-share", 2],
        ["activate", "--bundle", place / "missing"],
        ["activate", "--bundle", place / "old", "--share", "nan"],
        ["backup", "--output", place / "new"],
    ):
        local = said(capsys, command[0], "--state", place / "state", *command[1:])
        remote = said(capsys, command[0], "--target", f"unix:{place / 'admin.sock'}", *command[1:])
        assert remote[:2] == local[:2], command
        assert local[2].startswith(remote[2]), command  # a library, and so a server, names no options
        assert (local[0] == 0) == (local[2] == "")


def test_items_are_switched_off_and_added_from_elsewhere(
    served: Callable[[], str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "off.txt").write_text("5\n")
    (place / "new.csv").write_text("sku,as\n900,3|4\n901,777\n")
    address = served()
    send_users(address)
    with AdminClient(f"unix:{place / 'admin.sock'}") as admin, Client(address) as client:
        switched = admin.switch_items([3, "nothing"], off=True, file=place / "off.txt")
        assert (switched.changed, switched.unchanged, switched.unknown, switched.off) == (2, 0, ("nothing",), 2)
        offered = {item.item_id for item in client.recommend("user 7", k=60, include_seen=True)}
        assert len(offered) == 58 and not offered & {3, 5}
        assert admin.items_off() == ("3", "5")
        added = admin.add_items("old", "new.csv", item_column="sku", like_column="as")
        assert (added.added, added.unchanged, added.known, list(added.unusable), added.total) == (2, 0, (), ["901"], 2)
        assert 900 in {item.item_id for item in client.recommend("user 7", k=60, include_seen=True)}
        assert admin.switch_items([3, 5], off=False).off == 0
        with pytest.raises(sdk.InvalidArgumentError, match="not within"):
            admin.switch_items(off=True, file="/etc/passwd")
    table = ["--bundle", place / "old", "--file", place / "new.csv", "--item-column", "sku", "--like-column", "as"]
    for command in (["items", "off", 4, "nothing"], ["items", "list"], ["add-items", *table]):
        said(capsys, command[0], "--state", place / "state", *command[1:], "--json")  # so that nothing changes now
        local = said(capsys, command[0], "--state", place / "state", *command[1:], "--json")
        remote = said(capsys, command[0], "--target", f"unix:{place / 'admin.sock'}", *command[1:], "--json")
        assert remote == local, command
        assert local[0] == (command[:2] != ["items", "list"])  # of ids that are unknown, or cannot be served


def test_damage_is_told_and_ends_the_command_with_1(
    served: Callable[[], str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    send_users(served())
    environment = lmdb.open(str(place / "state"), max_dbs=16)
    with environment.begin(write=True) as transaction:
        users = environment.open_db(b"users", transaction, create=False)
        key, value = next(iter(transaction.cursor(users)))
        transaction.put(key, value[:-1] + bytes([value[-1] ^ 1]), db=users)
    environment.close()
    local = said(capsys, "verify", "--state", place / "state", "--json")
    assert said(capsys, "verify", "--target", f"unix:{place / 'admin.sock'}", "--json") == local
    assert local[0] == 1 and not json.loads(local[1].splitlines()[-1])["sound"]


def test_a_bundle_is_rolled_out_from_elsewhere(app: App, place: Path, exact: Generation, renamed: Generation) -> None:
    old, new, told = exact.bundle_id, renamed.bundle_id, list[Progress]()
    with client_of(app) as client, Client(f"localhost:{app.port}", timeout=30) as caller:
        rebuilt = client.rebuild("new", max_share=1.0, progress=told.append)
        assert (rebuilt.users, rebuilt.lagging, rebuilt.bundle_id) == (USERS, 0, new)
        assert told and all(0 <= one.done <= one.total == USERS * EVENTS for one in told)
        assert [(one.bundle_id, one.current) for one in client.generations().generations] == [
            (old, USERS),
            (new, USERS),
        ]
        assert client.rollout() == sdk.Rollout(0, "", "", 0.0, "", {})

        trial = client.activate(place / "new", share=0.5)
        assert (trial.active, trial.trial, trial.share, trial.servers) == (old, new, 0.5, 1)
        assert trial.bundles == {old: str(place / "old"), new: str(place / "new")}
        assert {caller.recommend(f"user {n}").bundle_id for n in range(USERS)} == {old, new}
        assert client.activate("new").before == old
        rollout = client.rollout()
        assert (rollout.active, rollout.trial, rollout.share) == (new, "", 0.0)
        assert caller.recommend("user 1").bundle_id == new
        assert client.drop(old).dropped == USERS
        with pytest.raises(sdk.InvalidArgumentError, match="answers, or is about to"):
            client.drop(new)


def test_a_backup_is_made_and_users_leave(app: App, place: Path) -> None:
    with client_of(app) as client:
        made = client.backup("backups/1")
        assert Path(made.path) == place / "backups" / "1" and made.counts["users"] == USERS
        with LmdbStore.open(made.path, readonly=True) as store:
            assert store.stats().users == USERS
        assert [event["item_id"] for event in client.export_user("user 3")["events"]][:2] == ["4", "5"]
        with Client(f"localhost:{app.port}", timeout=30) as caller:
            caller.update("long ago", 5, timestamps=1000)
        assert client.expire(30, dry_run=True).expired == 1
        assert (client.expire(30).expired, client.verify().counts["users"]) == (1, USERS)


def test_a_long_document_comes_in_pieces(app: App) -> None:
    with Client(f"localhost:{app.port}", timeout=60) as caller, client_of(app) as client:
        for _ in range(3):
            caller.update("long", [1 + n % 60 for n in range(5000)], timestamps=range(1, 5001))
        document = client.export_user("long")
    assert len(document["events"]) == 15_000 and document["events"][-1] == {"item_id": "20", "timestamp": 5000}


# -- who may ask, and what -------------------------------------------------------------------------------------------


def test_only_the_role_admin_may_ask_and_only_at_the_admin_address(place: Path) -> None:
    tokens, lines = {}, []
    for role in ("read", "write", "admin"):
        tokens[role], line = new_token(role, [role])
        lines.append(line)
    file = write_lines(place / "tokens", *lines)
    with serving(place, tokens=file, admin_socket=None, admin_port=0) as app:
        assert app.admin_address.startswith("127.0.0.1:") and app.admin_address != f"127.0.0.1:{app.port}"
        for role in ("read", "write"):
            with AdminClient(app.admin_address, token=tokens[role]) as client:
                for call in (client.generations, client.rollout, lambda c=client: c.export_user("user 1")):
                    with pytest.raises(sdk.PermissionDeniedError, match="lacks the role admin"):
                        call()
        with AdminClient(app.admin_address) as client, pytest.raises(sdk.UnauthenticatedError, match="no token"):
            client.verify()
        with AdminClient(app.admin_address, token=tokens["admin"]) as client:
            assert client.generations().users == 0
        with (
            AdminClient(f"127.0.0.1:{app.port}", token=tokens["admin"]) as client,
            pytest.raises(sdk.UnimplementedError),
        ):
            client.generations()
        with Client(app.admin_address, token=tokens["admin"]) as other, pytest.raises(sdk.UnimplementedError):
            other.recommend("anna")


def test_hostile_requests_are_refused_and_start_nothing(app: App, place: Path) -> None:
    (place / "link").symlink_to("/etc")
    with client_of(app) as client:
        for call in (client.rebuild, client.activate, client.backup):
            for path in ("/etc", "../x", "link/x", ".", "a\0b", "state", "state/backup", "x" * 5000):
                with pytest.raises(sdk.InvalidArgumentError) as caught:
                    call(path)
                assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 1000
        with pytest.raises(sdk.InvalidArgumentError, match="more than 8 KiB"):
            client.export_user("x" * 9000)
        for user in ("--help", "-h", "--state=/etc", "a\0b", "a\nb", "'; rm -rf /", "x" * 8000):
            with pytest.raises(sdk.InvalidArgumentError):
                client.export_user(user)
    assert jobs() == []
    with grpc.insecure_channel(app.admin_address) as channel:
        for method in ("Rebuild", "ExportUser"):
            raw = channel.unary_stream(f"/dman.v1.Admin/{method}")
            for body in (b"\xff\xff\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\0" * 100_000):
                with pytest.raises(grpc.RpcError) as failed:
                    list(raw(body, timeout=30))
                assert failed.value.code() in (
                    grpc.StatusCode.INVALID_ARGUMENT,
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                )
        stub = AdminStub(channel)
        for share in (float("nan"), float("inf"), -1.0, 0.0):
            with pytest.raises(grpc.RpcError) as failed:
                list(stub.Rebuild(pb.RebuildRequest(bundle="old", max_share=share), timeout=60))
            assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (place / "new").is_dir() and not (place / "x").exists()


def test_a_server_without_a_directory_for_callers_takes_no_paths(place: Path) -> None:
    with serving(place, admin_root=None) as app, client_of(app) as client:
        for call in (client.rebuild, client.activate, client.backup):
            with pytest.raises(JobError, match="without a directory whose files callers may name"):
                call("old")
        assert client.generations().users == 0


# -- how jobs end ----------------------------------------------------------------------------------------------------


def test_one_job_of_a_kind_runs_at_a_time_and_a_cancelled_one_goes_on_later(app: App) -> None:
    with client_of(app) as client, client_of(app) as other:
        with under_way(client, "new") as (process, ended):
            with pytest.raises(JobError, match="another rebuild runs; wait until it has ended"):
                other.rebuild("new")
            assert other.generations().users == USERS  # another kind
            client.close()
            assert wait_until(lambda: gone(process), seconds=20)
        assert [type(one) for one in ended] == [sdk.ClientClosedError]

        def rebuilt() -> bool:
            try:
                return other.rebuild("new", max_share=1.0).lagging == 0
            except JobError:  # the process has gone, and the server has not noticed yet
                return False

        assert wait_until(rebuilt, seconds=60)


def test_a_job_ends_at_the_deadline_of_its_call(app: App) -> None:
    with client_of(app) as client:
        with pytest.raises(sdk.DeadlineExceededError):
            client.rebuild("new", max_share=0.001, timeout=6)
        assert wait_until(lambda: jobs() == [], seconds=20)


def test_a_job_that_is_killed_is_an_error_and_the_server_goes_on(app: App) -> None:
    with client_of(app) as client:
        with under_way(client, "new") as (process, ended):
            process.kill()
        (error,) = ended
        assert isinstance(error, sdk.InternalError) and "ended early, killed by SIGKILL" in str(error)
        assert client.rebuild("new", max_share=1.0).lagging == 0


def test_an_activation_that_is_cancelled_leaves_nothing_prepared(app: App) -> None:
    """It waits for a server that never loads the bundle."""
    app._loader.look = lambda: None  # type: ignore[method-assign]
    with client_of(app) as client, client_of(app) as other:
        with calling(lambda: client.activate("new")) as ended:
            assert wait_until(lambda: other.rollout().prepared != "", seconds=60)
            client.close()
        assert isinstance(ended[0], sdk.ClientClosedError)
        assert wait_until(lambda: other.rollout().prepared == "", seconds=60)
        assert other.rollout().active == ""


def test_a_server_that_stops_ends_its_jobs_and_removes_its_socket(place: Path) -> None:
    with ExitStack() as after, serving(place) as app:
        send_users(f"localhost:{app.port}")
        client = after.enter_context(client_of(app))
        process, ended = after.enter_context(under_way(client, "new"))
        assert (place / "admin.sock").is_socket()
    assert gone(process) and isinstance(ended[0], sdk.UnavailableError)
    assert not (place / "admin.sock").exists()


# -- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["port", "socket"])
def test_with_two_workers_one_has_the_service_and_another_takes_over(
    place: Path, kind: str, renamed: Generation, unused_tcp_port: int
) -> None:
    """The worker that has it is killed during a rebuild."""
    port = unused_tcp_port
    target = f"127.0.0.1:{port}" if kind == "port" else f"unix:{place / 'admin.sock'}"
    where = ["--admin-port", str(port)] if kind == "port" else ["--admin-socket", str(place / "admin.sock")]
    options = ["--workers", "2", "--provider", "cpu", "--admin-root", str(place), *where]
    with running_server(place / "old", place / "state", *options) as (address, server):
        send_users(address)
        with AdminClient(target, wait_for_ready=True, timeout=120) as client:
            assert client.generations().users == USERS
            for _ in range(2):
                with under_way(client, "new") as (job, ended):
                    owner = job.parent()
                    assert owner is not None and owner.ppid() == server.pid
                    owner.kill()
                    assert wait_until(lambda job=job: gone(job), seconds=20)  # type: ignore[misc]
                assert isinstance(ended[0], sdk.UnavailableError)
                began = time.monotonic()
                assert client.generations().users == USERS  # of the other worker, as soon as that has taken over
                assert time.monotonic() - began < 60
            result = client.rebuild("new", max_share=1.0)
            assert (result.lagging, result.bundle_id) == (0, renamed.bundle_id)
            assert client.activate("new").servers == 2
        server.send_signal(signal.SIGTERM)
        assert server.wait(40) == 0
    assert jobs() == []
    assert not (place / "admin.sock").exists()
