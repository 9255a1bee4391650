"""NumPy arrays from bytes that anybody may have written. Type and size are checked before memory is taken."""

from __future__ import annotations

import io
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping

import numpy as np
from numpy.lib import format as npy

MAX_HEADER_BYTES = 1024  # of an .npy file; that of a plain array has about 100
_HEADERS: Mapping[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype]]] = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}
# What zipfile and zlib raise for archives that are damaged, encrypted or of methods they do not know.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, RuntimeError, EOFError, OSError)


def parse_npy(content: bytes | memoryview, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """The array of an .npy file: a read-only view of `content`, which must be read-only too.

    `shape` is what it must be; None stands for any size. Raises ValueError.
    """
    found, fortran, found_dtype, start = _read_header(bytes(content[: MAX_HEADER_BYTES + 16]))
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    fits = len(found) == len(shape) and all(e in (None, f) for f, e in zip(found, shape, strict=True))
    if found_dtype != np.dtype(dtype) or not fits:
        raise ValueError(f"holds {found_dtype}{list(found)}, expected {dtype}[{sizes}]")
    count = math.prod(found)
    if start + count * found_dtype.itemsize != len(content):
        raise ValueError("its length does not fit its header")
    flat = np.frombuffer(content, dtype, count, start if count else 0)
    return flat.reshape(found, order="F" if fortran else "C")


def _read_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran order, dtype, and where the values begin."""
    stream = io.BytesIO(head)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy warns of headers that only Python 2 could write
            read = _HEADERS[npy.read_magic(stream)]
            shape, fortran, dtype = read(stream, max_header_size=MAX_HEADER_BYTES)
    except Exception:  # numpy parses the header as Python literals, which fail in many ways
        raise ValueError("is not an array: its header is malformed") from None
    if not all(type(size) is int and size >= 0 for size in shape) or dtype.hasobject:
        raise ValueError("is not an array: its header is malformed")
    return shape, fortran, dtype, stream.tell()


def parse_npz(
    content: bytes,
    arrays: Mapping[str, tuple[str, tuple[int | None, ...]]],
    *,
    limit: int,
    optional: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name: exactly those of `arrays`, which gives dtype and shape as for `parse_npy`.

    Those of `optional` may be missing. Nothing is unpacked unless all arrays together have at most `limit` bytes.
    Raises ValueError.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except _ZIP_ERRORS:
        raise ValueError("is not an archive of arrays") from None
    members = archive.infolist()
    missing = set(optional) - {member.filename.removesuffix(".npy") for member in members}
    arrays = {name: kind for name, kind in arrays.items() if name not in missing}
    if sorted(member.filename for member in members) != sorted(f"{name}.npy" for name in arrays):
        raise ValueError(f"does not hold exactly the arrays {', '.join(arrays)}")
    size = sum(member.file_size for member in members)
    if size > limit:
        raise ValueError(f"would take {size} bytes of memory, more than {limit}")
    found = {}
    for name, (dtype, shape) in arrays.items():
        try:
            found[name] = parse_npy(_unpacked(archive, archive.getinfo(f"{name}.npy")), dtype, shape)
        except ValueError as error:
            raise ValueError(f"array {name} {error}") from None
    return found


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(member) as stream:
            content = stream.read(member.file_size)  # without the size, a lie in it costs up to 2 GiB
    except _ZIP_ERRORS:
        raise ValueError("cannot be unpacked") from None
    if len(content) != member.file_size:
        raise ValueError("cannot be unpacked")
    return content
