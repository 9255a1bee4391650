"""Every failure is a DmanError that says where, why and what to do."""

import pickle
import threading
from typing import Any

import grpc
import pytest

import sdk
from protos.dman.v1 import dman_pb2 as pb
from sdk import (
    CallError,
    ConflictError,
    DeadlineExceededError,
    DmanError,
    InternalError,
    InvalidArgumentError,
    JobError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnimplementedError,
    UserNotFoundError,
)
from sdk._exceptions import ERROR_OF_STATUS, error_from_status

from .awaited import Awaited, Connect
from .fake_server import Recorder, hold, serve

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_becomes_an_error_that_says_where_why_and_what_to_do(code: grpc.StatusCode) -> None:
    error = error_from_status(
        code, method="Update", target="host:1", details="disk on fire.", attempts=3, request_id="order-17"
    )
    assert type(error) is ERROR_OF_STATUS[code]
    assert (error.code, error.method, error.target, error.details) == (code, "Update", "host:1", "disk on fire.")
    assert error.request_id == "order-17"
    assert str(error).startswith(f"Update at host:1: disk on fire [{code.name} after 3 attempts]. ")
    assert str(error).endswith(type(error).remedy) and type(error).remedy
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert again.code is code and again.request_id == "order-17"


def test_the_error_tree_is_the_documented_one() -> None:
    public = {name: kind for name, kind in vars(sdk).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    drawn = [line.split("── ")[-1].split()[0] for line in (DmanError.__doc__ or "").splitlines() if "── " in line]
    assert {"DmanError", *drawn} == set(public)
    assert set(ERROR_OF_STATUS) == set(grpc.StatusCode)
    assert set(ERROR_OF_STATUS.values()) <= set(public.values())
    called = set(ERROR_OF_STATUS.values()) - {InvalidArgumentError}
    assert all(issubclass(kind, CallError) for kind in called)
    assert not any(issubclass(kind, grpc.RpcError) for kind in public.values())


async def test_an_unknown_user_is_not_found(client: Awaited, recorder: Recorder) -> None:
    recorder.script.append(grpc.StatusCode.NOT_FOUND)
    with pytest.raises(UserNotFoundError, match="no luck today") as caught:
        await client.user("nobody")
    assert isinstance(caught.value, LookupError) and caught.value.details == "no luck today"


@pytest.mark.parametrize(
    ("code", "kind", "remedy"),
    [
        (grpc.StatusCode.ABORTED, ConflictError, "Send it again: an update with the request_id of this error."),
        (grpc.StatusCode.UNAUTHENTICATED, UnauthenticatedError, "Create the client with a valid token=."),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDeniedError, "Use a token whose roles allow this method."),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhaustedError, "send less at a time"),
        (grpc.StatusCode.FAILED_PRECONDITION, JobError, "call again"),
    ],
)
@pytest.mark.parametrize(("method", "args"), [("update", ("anna", 1)), ("update_many", ({"anna": 1},))])
async def test_a_failed_update_can_be_sent_again_with_the_request_id_of_its_error(
    client: Awaited, recorder: Recorder, *, code: Any, kind: Any, remedy: str, method: str, args: Any
) -> None:
    recorder.script.append(code)
    with pytest.raises(kind, match=remedy) as caught:
        await getattr(client, method)(*args)
    assert len(recorder.seen) == 1  # not retried
    await getattr(client, method)(*args, request_id=caught.value.request_id)
    first, second = recorder.seen
    assert first.request == second.request and first.request.request_id


async def test_an_update_that_times_out_says_its_request_id(client: Awaited, recorder: Recorder) -> None:
    release = threading.Event()
    recorder.script.append(lambda: hold(threading.Event(), release))
    with pytest.raises(DeadlineExceededError) as caught:
        await client.update("anna", 1, timeout=0.3)
    release.set()
    assert caught.value.request_id == recorder.request.request_id


async def test_an_update_whose_reply_cannot_be_read_says_its_request_id(client: Awaited, recorder: Recorder) -> None:
    recorder.script.append(pb.BatchUpdateReply())
    with pytest.raises(InternalError) as caught:
        await client.update_many({"anna": 1})
    assert caught.value.request_id == recorder.request.request_id


async def test_other_calls_and_arguments_have_no_request_id(client: Awaited, recorder: Recorder) -> None:
    recorder.script.append(grpc.StatusCode.NOT_FOUND)
    with pytest.raises(UserNotFoundError) as caught:
        await client.user("nobody")
    assert caught.value.request_id is None
    with pytest.raises(InvalidArgumentError) as refused:
        await client.update("", 1)
    assert refused.value.request_id is None


async def test_another_server_is_unimplemented(connect: Connect) -> None:
    other, target = serve(lambda _: None)
    with pytest.raises(UnimplementedError, match="address is that of a DMAN server"):
        await connect(target).recommend("anna")
    other.stop(None).wait()


async def test_a_crashing_server_is_an_internal_error(client: Awaited, recorder: Recorder) -> None:
    def crash() -> None:
        raise RuntimeError("bug")

    recorder.script.append(crash)
    with pytest.raises(InternalError, match="server's log") as caught:
        await client.recommend("anna")
    assert caught.value.code is grpc.StatusCode.UNKNOWN


async def test_a_reply_that_is_no_message_is_an_internal_error(connect: Connect) -> None:
    def register(new: grpc.Server) -> None:
        garbage = grpc.unary_unary_rpc_method_handler(lambda request, context: b"\xff\xff\xff")
        new.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("dman.v1.Recommender", {"Update": garbage})])

    broken, target = serve(register)
    with pytest.raises(InternalError):
        await connect(target).update("anna", 1)
    broken.stop(None).wait()
