"""Arguments become protobuf fields, or errors that name the argument."""

import inspect
from typing import Any

import numpy as np
import pytest

from sdk import Event, InvalidArgumentError

from .awaited import Awaited
from .fake_server import Recorder

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize(
    ("items", "timestamps", "expected"),
    [
        ("alien", None, [("alien", 0)]),
        (7, None, [("7", 0)]),
        (Event("alien", 5), None, [("alien", 5)]),
        (["a", 7, Event(8, 9), "ü"], None, [("a", 0), ("7", 0), ("8", 9), ("ü", 0)]),
        ([1, 2], [10, 20], [("1", 10), ("2", 20)]),
        ("alien", 10, [("alien", 10)]),
        ((item for item in (1, 1)), None, [("1", 0), ("1", 0)]),
        (np.array([3, -1]), np.array([5, 6]), [("3", 5), ("-1", 6)]),
        (np.int64(3), np.int32(4), [("3", 4)]),
        (np.array(3), None, [("3", 0)]),
        (np.array(["a", "b"]), None, [("a", 0), ("b", 0)]),
        (np.uint64(2**64 - 1), None, [("18446744073709551615", 0)]),
        ([], None, []),
    ],
)
async def test_update_takes_one_item_or_several(
    client: Awaited, recorder: Recorder, items: Any, timestamps: Any, expected: list[tuple[str, int]]
) -> None:
    if inspect.isgenerator(items):  # parameters are shared between the two clients
        items = iter([1, 1])
    await client.update(np.int64(42), items, timestamps=timestamps)
    assert recorder.request.user_id == "42"
    assert [(event.item_id, event.timestamp) for event in recorder.request.events] == expected


@pytest.mark.parametrize(
    ("method", "args", "kwargs", "complaint"),
    [
        ("update", (1.5, [1]), {}, "user_id must be str or int, not float"),
        ("update", (True, [1]), {}, "user_id must be str or int, not bool"),
        ("update", ("", [1]), {}, "user_id must not be empty"),
        ("update", (None, [1]), {}, "user_id must be str or int, not NoneType"),
        ("update", ("\ud800", [1]), {}, "user_id is not valid Unicode"),
        ("update", ("anna", [1, 2.0]), {}, r"items\[1\] must be str, int or Event, not float"),
        ("update", ("anna", [(1, 5)]), {}, r"items\[0\] must be str, int or Event, not tuple"),
        ("update", ("anna", None), {}, "items must be one value or several, not NoneType"),
        ("update", ("anna", b"alien"), {}, "items must be one value or several, not bytes"),
        ("update", ("anna", {1, 2}), {}, "items must be in order, oldest first; set has no order"),
        ("update", ("anna", {1: 2}), {}, "items must be in order, oldest first; dict has no order"),
        ("update", ("anna", np.array([[1], [2]])), {}, r"items\[0\] must be str, int or Event, not ndarray"),
        ("update", ("anna", [1, 2]), {"timestamps": [1]}, "timestamps must have one value for each of items"),
        ("update", ("anna", [Event(1)]), {"timestamps": [1]}, "timestamps go with ids"),
        ("update", ("anna", [1]), {"request_id": ""}, "request_id must not be empty"),
        ("update", ("anna", [1]), {"timeout": 0}, "timeout must be a positive number"),
        ("update_many", ([("anna", [1]), ("bob", [1, None])],), {}, r"updates\[1\]\.items\[1\] must be"),
        ("update_many", ({"anna": 1},), {"request_id": ""}, "request_id must not be empty"),
        ("update_many", (["anna"],), {}, r"updates\[0\] must be a pair"),
        ("recommend", ("",), {}, "user_id must not be empty"),
        ("recommend", ("anna", "10"), {}, "k must be an integer, not str"),
        ("recommend", ("anna", 2**31), {}, "k is out of range"),
        ("recommend", ("anna",), {"candidates": []}, "candidates must not be empty"),
        ("recommend", ("anna",), {"exclude": [None]}, r"exclude\[0\] must be str or int, not NoneType"),
        ("recommend_many", (["anna", ""],), {}, r"user_ids\[1\] must not be empty"),
        ("user", ("anna",), {"recent_events": True}, "recent_events must be an integer, not bool"),
        ("delete_user", (b"anna",), {}, "user_id must be str or int, not bytes"),
    ],
)
async def test_bad_arguments_are_named_and_nothing_is_sent(
    client: Awaited, recorder: Recorder, *, method: str, args: Any, kwargs: Any, complaint: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint) as caught:
        await getattr(client, method)(*args, **kwargs)
    assert isinstance(caught.value, ValueError)
    assert not recorder.seen
