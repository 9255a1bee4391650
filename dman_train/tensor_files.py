"""Reading of files of `torch.save` that anybody may have written: weights and checkpoints.

Such a file is a ZIP archive of tensors and a pickle that arranges them. A pickle can run any command, so this one is
looked through first, without running it: it may name nothing but tensors and dictionaries. Then `torch.load` reads it
with `weights_only`, which enforces the same once more.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dman_runtime.data.untrusted import opened_file
from dman_runtime.errors import InputError

MAX_FILE_BYTES = 1 << 40
MAX_PICKLE_BYTES = 64 << 20  # names, shapes and numbers; the values of tensors lie beside it
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}Storage" for name in _STORAGES),
}
# Opcodes that name or call something in other ways than GLOBAL and REDUCE, which is all that torch.save writes.
_REFUSED = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}


def read_tensors(file: Path) -> Any:
    """What `torch.save` wrote, on the CPU: tensors, dictionaries, lists and plain values, and nothing else.

    Raises FileNotFoundError, and InputError for a file that is damaged, or that would do more than hold values.
    """
    with opened_file(file, limit=MAX_FILE_BYTES) as (stream, identity):
        try:
            _check_archive(stream, identity.size)
            stream.seek(0)
            content = torch.load(stream, map_location="cpu", weights_only=True)
            _check_tensors(content)
        except InputError as error:
            raise InputError(f"{file} {error.cause}", error.remedy) from None
        except Exception as error:  # whatever torch stumbles over in a damaged file
            raise InputError(f"{file} cannot be read ({_reason(error)})") from None
    return content


def _reason(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "".join(c for c in line if c.isprintable())[:160]


def _check_archive(stream: BinaryIO, size: int) -> None:
    """Raises InputError for an archive that would unpack to more than its size, or whose pickle names other things."""
    if not size:
        raise InputError("cannot be read (it is empty)")
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > size:
            raise InputError("cannot be read (it is not a file of torch.save)")
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise InputError("cannot be read (it is not a file of torch.save)")
        _check_pickle(archive.read(pickles[0]))


def _check_pickle(content: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(content):  # decodes, and runs nothing
        if opcode.name == "GLOBAL" and str(argument).startswith("numpy"):  # checkpoints once held numpy arrays
            remedy = "resume with the version of dman that wrote it, or start again in another directory"
            raise InputError("was written by an earlier version, and cannot be read safely", remedy)
        if opcode.name in _REFUSED or (opcode.name == "GLOBAL" and argument not in _NAMES):
            raise InputError("holds more than values, and was not read: it could run commands")


def _check_tensors(content: object) -> None:
    """Raises InputError for tensors that claim more values than the file holds, by repeating some."""
    todo, seen = [content], set[int]()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError("cannot be read (a tensor claims more values than it has)")
