"""What an ONNX file may hold, checked before ONNX Runtime gets it: no external data, no control flow.

External data would let a graph read other files of this machine. A loop could run for ever; the graphs of a bundle need
none. The file is a protobuf message: the walk below looks at its structure only, and skips all values.
Source of the field numbers: onnx.proto of ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4, groups, are not used by ONNX
# Message -> field number -> message in it.
_MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {5: "TensorProto", 10: "TensorProto", 22: "SparseTensorProto", 23: "SparseTensorProto"},
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}
_REFUSED = {
    ("AttributeProto", 6): "it holds control flow",  # a graph in a node
    ("AttributeProto", 11): "it holds control flow",
    ("TensorProto", 13): "it refers to external data",  # external_data
    ("TensorProto", 14): "it refers to external data",  # data_location; 0, here, need not be written
}


def check_graph(content: bytes) -> None:
    """Raises ValueError for a file that is no ONNX model, or holds what it must not."""
    todo = [("ModelProto", 0, len(content))]
    while todo:
        message, start, end = todo.pop()
        inner = _MESSAGES[message]
        for number, wire_type, first, last in _fields(content, start, end):
            refusal = _REFUSED.get((message, number))
            if refusal and (wire_type != _VARINT or content[first:last] != b"\0"):
                raise ValueError(refusal)
            if number in inner:
                if wire_type != _BYTES:
                    raise ValueError("it is not an ONNX model")
                todo.append((inner[number], first, last))


def _fields(content: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, and where the value begins and ends, of each field of a message."""
    while start < end:
        key, start = _varint(content, start, end)
        number, wire_type = key >> 3, key & 7
        first = start
        if wire_type == _VARINT:
            _, start = _varint(content, start, end)
        elif wire_type == _BYTES:
            size, first = _varint(content, start, end)
            start = first + size
        elif wire_type in (_FIXED64, _FIXED32):
            start += 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError("it is not an ONNX model")
        if start > end or not 0 < number < 1 << 29:  # the range of protobuf
            raise ValueError("it is not an ONNX model")
        yield number, wire_type, first, start


def _varint(content: bytes, start: int, end: int) -> tuple[int, int]:
    """A number in base 128, lowest digits first, and where the next field begins."""
    value = 0
    for position in range(start, min(end, start + 10)):
        byte = content[position]
        value |= (byte & 127) << 7 * (position - start)
        if byte < 128:
            return value, position + 1
    raise ValueError("it is not an ONNX model")
