"""Which paths a remote caller may name."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from dman_runtime.errors import JobError, RequestError


def path_within(root: Path | None, text: str, *, parameter: str) -> Path:
    """The path that a caller names, without links, which is in `root`. A relative one starts there.

    Raises JobError where there is no such directory, RequestError for paths that leave it.
    """
    if root is None:
        raise JobError(
            "this server was started without a directory whose files callers may name",
            "start it with one, or run the command on its machine",
        )
    try:
        top = root.resolve()
        found = (top / text).resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            found.lstat()  # `resolve` says nothing of a name that is too long
    except (OSError, RuntimeError, ValueError):  # too long, a circle of links, a null character
        raise RequestError(f"{parameter} {text!r:.200} is no path", "name a directory") from None
    if not text or found == top or not found.is_relative_to(top):
        raise RequestError(
            f"{parameter} {text!r:.200} is not within the directory whose files callers may name",
            "name a path in it, absolute or relative to it",
        )
    return found
