"""A note beside the directory of a store that says which store belongs there.

It guards against an empty mount point: where the note is and the store is not, nothing is created. It is written as
well as it goes, and may be removed at any time; the next start writes it again.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

from dman_runtime.errors import StoreError, StoreMismatchError, StoreUnavailableError

_COMMENT = (
    "dman-runtime wrote this when it opened the state store of that name beside it. While this file is here, an empty "
    "directory is not taken for a new store: it may be a volume that is not mounted. Remove this file if the store is "
    "gone for good, or was replaced on purpose."
)

logger = logging.getLogger(__name__)


def marker_path(path: Path) -> Path:
    """Beside the directory as it is named, so that a link to a volume has it on this side."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow the link
    return absolute.parent / f".{absolute.name}.dman-store"


def read_marker(path: Path) -> str | None:
    """The id of the store that belongs into a directory; None: there is no note. Raises StoreUnavailableError."""
    marker = marker_path(path)
    try:
        return str(json.loads(marker.read_text(encoding="utf-8"))["store_id"])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise StoreUnavailableError(
            f"{marker} is damaged", "remove it if the state store beside it is right"
        ) from error


def write_marker(path: Path, store_id: str) -> None:
    """Logs a warning where the note cannot be written."""
    marker = marker_path(path)
    partial = marker.with_name(f"{marker.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"store_id": store_id, "comment": _COMMENT}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(marker)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        logger.warning("cannot write %s (%s): an unmounted state store would look like a new one", marker, error)


def absent(path: Path, *, expected: str | None, readonly: bool, must_exist: bool) -> StoreError | None:
    """Why no store may be created in a directory that has none; None: it may."""
    if expected is not None:
        return StoreUnavailableError(
            f"the state store {path} is missing or empty, and {marker_path(path)} says that there was one",
            "mount its volume or restore a backup; remove that file to start with an empty store",
            parameter="state",
        )
    if must_exist:
        return StoreUnavailableError(
            f"the state store {path} does not exist, and none may be created",
            "mount its volume or check the path; allow creation for the first start",
            parameter="state_must_exist",
        )
    return missing(path) if readonly else None


def missing(path: Path) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"the state store {path} does not exist", "check the path, or create it by serving a bundle", parameter="state"
    )


def check_id(path: Path, *, expected: str | None, found: str) -> None:
    """StoreMismatchError where another store is in the directory than belongs there."""
    if expected is not None and found != expected:
        raise StoreMismatchError(
            f"the state store {path} is another one than {marker_path(path)} says",
            "mount the right volume or restore a backup of it; remove that file to accept this store",
            parameter="state",
        )
