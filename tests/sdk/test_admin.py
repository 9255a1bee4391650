"""AdminClient: what each method sends and returns, and how its calls end."""

import dataclasses
import inspect
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

import sdk
from protos.dman.v1 import admin_pb2 as pb
from sdk import AdminClient, ClientClosedError, GenerationInfo, JobError, Progress, Rollout, UnavailableError

from .fake_server import ADMIN_REPLIES, ROLLOUT, Recorder, hold

pytestmark = pytest.mark.timeout(60)
# Method, its arguments, what is sent, and the result.
CASES: list[tuple[str, tuple[Any, ...], dict[str, Any], Any, Any]] = [
    (
        "generations",
        (),
        {},
        pb.ListGenerationsRequest(),
        sdk.Generations(
            9,
            (GenerationInfo(1, "b1", 9, 8, 900, 0.0), GenerationInfo(2, "b2", 3, 3, 300, 1.0)),
            "9 users",
        ),
    ),
    ("rollout", (), {}, pb.GetRolloutRequest(), Rollout(4, "b2", "", 0.0, "", {"b2": "/srv/b2"})),
    (
        "rebuild",
        ("new",),
        {},
        pb.RebuildRequest(bundle="new", max_share=0.5),
        sdk.Rebuilt(9, 8, 70, 1, "b2", "encoded"),
    ),
    (
        "activate",
        ("new",),
        {"share": 0.1, "wait": 3, "catch_up": 0},
        pb.ActivateRequest(bundle="new", share=0.1, wait=3.0, catch_up=0),
        sdk.Activated(**ROLLOUT, before="b1", servers=2, caught_up=7, text="bundle b2 answers"),
    ),
    ("drop", ("b1",), {}, pb.DropRequest(bundle_id="b1"), sdk.Dropped("b1", 9, "dropped")),
    (
        "backup",
        ("backups/1",),
        {},
        pb.BackupRequest(output="backups/1"),
        sdk.BackedUp("/srv/backup", 4096, {"users": 9, "events": 70}, "copied"),
    ),
    (
        "export_user",
        (42,),
        {},
        pb.ExportUserRequest(user_id="42"),
        {"user_id": "42", "events": [], "states": []},
    ),
    (
        "expire",
        (30,),
        {"dry_run": True},
        pb.ExpireRequest(idle_days=30.0, dry_run=True),
        sdk.Expired(9, 2, 20, 1, 1000, True, "would"),
    ),
    (
        "verify",
        (),
        {},
        pb.VerifyRequest(),
        sdk.Verified("/srv/state", {"users": 9}, 3, ("one", "two"), False, "damaged"),
    ),
    (
        "switch_items",
        ([7, "x"],),
        {"off": True, "file": "off.txt"},
        pb.SwitchItemsRequest(item_ids=["7", "x"], file="off.txt", off=True),
        sdk.Switched(2, 1, ("x",), 5, "switched"),
    ),
    ("items_off", (), {}, pb.ListItemsOffRequest(), ("7", "K\u00e4se")),
    (
        "add_items",
        ("new", "items.csv"),
        {"embeddings": "items.npy", "item_column": "sku", "like_column": "as"},
        pb.AddItemsRequest(bundle="new", file="items.csv", embeddings="items.npy", item_column="sku", like_column="as"),
        sdk.ItemsAdded(3, 1, ("7",), {"x": "no title"}, 4, "added"),
    ),
]
NAMES = [case[0] for case in CASES]
REPEATABLE = {"generations", "rollout", "export_user", "verify", "items_off"}


@pytest.fixture
def admin(server: SimpleNamespace) -> Iterator[AdminClient]:
    with AdminClient(server.target) as client:
        yield client


def test_every_method_is_tried_here() -> None:
    methods = {name for name, value in vars(AdminClient).items() if callable(value) and not name.startswith("_")}
    assert methods == set(NAMES)
    assert len(ADMIN_REPLIES) == len(NAMES)


@pytest.mark.parametrize(("name", "args", "options", "sent", "result"), CASES, ids=NAMES)
def test_method_sends_its_request_and_returns_a_typed_result(
    admin: AdminClient, recorder: Recorder, name: str, args: Any, options: Any, sent: Any, result: Any
) -> None:
    assert getattr(admin, name)(*args, **options) == result
    assert recorder.request == sent
    assert 86_000 < recorder.seen[0].seconds_left <= 86_400
    if dataclasses.is_dataclass(result):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, dataclasses.fields(result)[0].name, None)


@pytest.mark.parametrize(("name", "args", "options"), [case[:3] for case in CASES], ids=NAMES)
def test_only_what_changes_nothing_is_retried(
    admin: AdminClient, recorder: Recorder, name: str, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    recorder.script.append(grpc.StatusCode.UNAVAILABLE)
    if name in REPEATABLE:
        getattr(admin, name)(*args, **options)
        assert len(recorder.seen) == 2
    else:
        with pytest.raises(UnavailableError, match="no luck today"):
            getattr(admin, name)(*args, **options)
        assert len(recorder.seen) == 1


@pytest.mark.parametrize("name", NAMES)
def test_methods_are_documented(name: str) -> None:
    method = getattr(AdminClient, name)
    assert method.__qualname__ == f"AdminClient.{name}"
    for parameter in [*inspect.signature(method).parameters][1:]:
        assert f"    {parameter}: " in method.__doc__
    assert "Raises:" in method.__doc__


def test_progress_of_a_rebuild_is_told(admin: AdminClient) -> None:
    told: list[Progress] = []
    admin.rebuild("new", progress=told.append)
    assert told == [Progress(0, 70, 0.0), Progress(35, 70, 17.5)]
    assert [one.seconds_left for one in told] == [None, 17.5]


def test_what_progress_raises_ends_the_call(admin: AdminClient, recorder: Recorder) -> None:
    def refuse(progress: Progress) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        admin.rebuild("new", progress=refuse)
    assert admin.rebuild("new").events == 70  # the client is as good as before


def test_a_job_that_cannot_be_done_is_an_error_of_its_own(admin: AdminClient, recorder: Recorder) -> None:
    recorder.script.append(grpc.StatusCode.FAILED_PRECONDITION)
    with pytest.raises(JobError, match=r"no luck today.*call again") as caught:
        admin.rebuild("new")
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("method", ["rebuild", "verify"])
def test_closing_ends_a_call_under_way(admin: AdminClient, recorder: Recorder, method: str) -> None:
    release, arrived = threading.Event(), threading.Event()
    recorder.script.append(lambda: hold(arrived, release))
    failures: list[BaseException] = []

    def call() -> None:
        try:
            getattr(admin, method)(*(["new"] if method == "rebuild" else []))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert arrived.wait(10)
    admin.close()
    thread.join(10)
    release.set()
    assert [type(one) for one in failures] == [ClientClosedError]


@pytest.mark.parametrize(
    ("method", "args", "name"),
    [
        ("rebuild", (None,), "bundle"),
        ("rebuild", ("",), "bundle"),
        ("backup", (7,), "directory"),
        ("activate", ("new", "all"), "share"),
        ("expire", (True,), "idle_days"),
        ("expire", ("7",), "idle_days"),
        ("drop", ("",), "bundle_id"),
        ("export_user", (None,), "user_id"),
    ],
)
def test_wrong_arguments_are_named_and_not_sent(
    admin: AdminClient, recorder: Recorder, method: str, args: tuple[Any, ...], name: str
) -> None:
    options = {"share": args[1]} if method == "activate" else {}
    with pytest.raises(sdk.InvalidArgumentError, match=f"^{name} must"):
        getattr(admin, method)(args[0], **options)
    assert recorder.seen == []


def test_settings_are_those_of_client(server: SimpleNamespace, recorder: Recorder) -> None:
    with AdminClient(server.target, timeout=5, token="t0ken", options=[("grpc.primary_user_agent", "mine")]) as client:
        client.rollout()
    assert recorder.seen[0].seconds_left <= 5
    assert recorder.seen[0].metadata["authorization"] == "Bearer t0ken"
    assert recorder.seen[0].metadata["user-agent"].startswith("mine")
    with pytest.raises(sdk.InvalidArgumentError, match="plain text"):
        AdminClient("recommender.example:50052", token="t0ken")
    with pytest.raises(TypeError, match="retrys"):
        AdminClient(server.target, retrys=3)
