"""Where the bytes of a table come from: a file, a glob pattern or a folder, members of archives, decompressed.

pyarrow is imported only when a compressed file is read.
"""

from __future__ import annotations

import glob
import io
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from dman_runtime.errors import InputError

TEXT, JSON_LINES, PARQUET = "text", "jsonl", "parquet"
_FORMATS = {
    TEXT: ".csv .tsv .tab .psv .txt .dat .data .inter .item .user .log",
    JSON_LINES: ".json .jsonl .ndjson",
    PARQUET: ".parquet .pq",
}
FORMATS = {extension: name for name, extensions in _FORMATS.items() for extension in extensions.split()}
_COMPRESSED = (".gz", ".bz2", ".zst", ".zip")
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the second is an empty archive
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
_FOREIGN = {
    b"\xfd7zXZ": "an xz file",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x04\x22\x4d\x18": "an lz4 file",
    b"SQLite format 3": "an SQLite database",
    b"\xd0\xcf\x11\xe0": "an Office file",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"\x89HDF": "an HDF5 file",
}
_MAGIC_BYTES = 300  # enough for a tar header


def error_of(path: str, cause: str, remedy: str, *, parameter: str = "") -> InputError:
    """An error that names the path, on one line whatever the names of columns hold."""
    return InputError(re.sub(r"[\x00-\x1f\x7f]", " ", f"{path}: {cause}"), remedy, parameter=parameter)


@dataclass(frozen=True)
class Source:
    """One table on disk: a file, or a member of a zip archive."""

    path: str  # for people; "x.zip: base.csv" for a member
    file: Path
    member: str = ""
    bytes: int = 0  # on disk

    @property
    def name(self) -> str:
        """The name of the file or the member without folders and without .gz and the like, in lower case."""
        name = (self.member or self.file.name).rpartition("/")[2].lower()
        while name.endswith(_COMPRESSED):
            name = name.rpartition(".")[0]
        return name

    def error(self, cause: str, remedy: str, *, parameter: str = "") -> InputError:
        return error_of(self.path, cause, remedy, parameter=parameter)

    @contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, str]]:
        """Its decompressed bytes, and the name of the compression or "". Raises InputError, also if it changes."""
        with self.errors(), ExitStack() as stack:
            file = stack.enter_context(self.file.open("rb", buffering=0))
            before = _state(os.fstat(file.fileno()))
            stream, packed = self._unpacked(file, stack)
            yield stream, packed
            if _state(os.fstat(file.fileno())) != before or _state(self.file.stat()) != before:
                raise self.error("the file changed while it was read", "read it when nothing writes to it any more")

    def _unpacked(self, file: io.FileIO, stack: ExitStack) -> tuple[BinaryIO, str]:
        stream: BinaryIO = file
        words = ""
        if self.member:
            archive = stack.enter_context(zipfile.ZipFile(file))
            stream, words = cast(BinaryIO, stack.enter_context(archive.open(self.member))), "zip"
        magic = stream.read(_MAGIC_BYTES)
        stream.seek(0)
        for start, foreign in _FOREIGN.items():
            if magic.startswith(start):
                raise self.error(f"is {foreign}", "unpack or convert it: text, JSON lines and Parquet are read")
        if packed := _compression(magic):
            import pyarrow as pa

            name = "bz2" if packed == "bzip2" else packed
            stream = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), name))
            words = f"{packed} in zip" if words else packed
        return stream, words

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the errors of the system, of archives and of pyarrow into InputError."""
        try:
            yield
        except FileNotFoundError:
            raise self.error("no such file", "check the path") from None
        except PermissionError as error:
            raise self.error(error.strerror or "cannot be opened", "ask for the right to read it") from None
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
            problem = " ".join(str(error).split())[:200]
            raise self.error(f"cannot be read ({problem})", "check that the file is complete and not damaged") from None
        except RuntimeError as error:  # zipfile has no class of its own for it
            if "password" not in str(error):
                raise
            raise self.error("is an encrypted archive", "unpack it") from None


def find_sources(path: str | Path) -> tuple[list[Source], list[str]]:
    """The tables at a path, a glob pattern or a folder, in natural order, and what was ignored: "NAME (why)".

    Raises InputError if there are none.
    """
    text = str(path)
    given = Source(text, Path(path))
    with given.errors():
        if Path(path).is_dir():
            files = list(_walk(Path(path), set()))
        elif not Path(path).exists() and glob.has_magic(text):
            found = [Path(one) for one in glob.glob(text, recursive=True)]  # noqa: PTH207 - Path.glob takes no whole path
            files = [one for name in found for one in (_walk(name, set()) if name.is_dir() else [name])]
            if not files:
                raise given.error("no file matches", "check the pattern")
        else:
            return _single(given)
    return _several(given, sorted(set(files), key=lambda one: _natural(str(one))))


def _single(given: Source) -> tuple[list[Source], list[str]]:
    information = given.file.stat()
    if not stat.S_ISREG(information.st_mode):
        raise given.error("is not a regular file", "give a file on disk: it is read more than once")
    if not information.st_size:
        raise given.error("the file is empty", "give one with rows")
    ignored: list[str] = []
    sources = _expanded(given.file, given.path, ignored)
    if not sources:
        raise given.error(f"nothing in it can be read: {_few(ignored)}", "give text, JSON lines or Parquet")
    return sources, ignored


def _several(given: Source, files: list[Path]) -> tuple[list[Source], list[str]]:
    in_folder = given.file.is_dir()
    sources: list[Source] = []
    ignored: list[str] = []
    for file in files:
        with Source(str(file), file).errors():
            why = _hidden(file.relative_to(given.file) if in_folder else Path(file.name))
            why = why or ("" if file.is_file() else "not a regular file")
            why = why or ("" if file.stat().st_size else "empty")
            if not why and in_folder and not _usable(file.name):
                why = "unknown extension"
            if why:
                ignored.append(f"{file} ({why})")
            else:
                sources += _expanded(file, str(file), ignored)
    if not sources:
        raise given.error(
            f"no file in it can be read{': ' if ignored else ''}{_few(ignored)}", "give text, JSON lines or Parquet"
        )
    return sources, ignored


def _walk(folder: Path, above: set[tuple[int, int]]) -> Iterator[Path]:
    """All files below a folder; links are followed, but not in circles."""
    information = folder.stat()
    identity = (information.st_dev, information.st_ino)
    if identity in above:
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, above | {identity})
        else:
            yield entry


def _expanded(file: Path, path: str, ignored: list[str]) -> list[Source]:
    """The file itself, or the members of a zip archive."""
    source = Source(path, file, bytes=file.stat().st_size)
    with source.errors(), file.open("rb") as stream:
        if not stream.read(4).startswith(_ZIP):
            return [source]
        sources = []
        with zipfile.ZipFile(stream) as archive:
            for member in sorted(archive.infolist(), key=lambda one: _natural(one.filename)):
                if member.is_dir():
                    continue
                why = _hidden(Path(member.filename)) or ("" if member.file_size else "empty")
                if why or not _usable(member.filename):
                    ignored.append(f"{path}: {member.filename} ({why or 'unknown extension'})")
                else:
                    sources.append(Source(f"{path}: {member.filename}", file, member.filename, member.compress_size))
    return sources


def _hidden(path: Path) -> str:
    """Why a name in a folder is not data: markers and checksums of Spark and Hadoop, hidden files."""
    name = path.name
    if name.endswith(".crc"):
        return "checksum"
    if name in ("_SUCCESS", "_metadata", "_common_metadata"):
        return "marker"
    if any(part.startswith((".", "_")) for part in path.parts):
        return "hidden"
    return ""


def _usable(name: str) -> bool:
    name = Source("", Path(name.rpartition("/")[2])).name
    return Path(name).suffix in FORMATS or ("." not in name and name.startswith("part-"))


def _compression(magic: bytes) -> str:
    if _BZIP2.match(magic):
        return "bzip2"
    return next((name for start, name in _PACKED.items() if magic.startswith(start)), "")


def _natural(name: str) -> tuple[list[int | str], str]:
    """A sort key that puts part-2 before part-10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def _state(information: os.stat_result) -> tuple[int, int, int]:
    return information.st_size, information.st_mtime_ns, information.st_ino


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
