"""Writes a bundle under a temporary name and renames it, so that a directory with a manifest is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dman_runtime.data.untrusted import parse_json, read_file
from dman_runtime.errors import BundleError
from dman_runtime.model.manifest import FORMAT_VERSION, MANIFEST, MAX_MANIFEST_BYTES, OPTIONAL, Manifest, files_of


def write_bundle(path: Path, fill: Callable[[Path], dict[str, Any]]) -> Manifest:
    """Writes a bundle atomically: `fill` puts FILES into a temporary directory and returns the Manifest's other fields.

    An older bundle at `path` is replaced; any other directory there is an error. Raises BundleError.
    """
    if path.exists() and not _may_be_replaced(path):
        raise BundleError(f"{path} exists and is not a bundle", "choose another directory", parameter="out")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        details = fill(temporary)
        files = {
            name: {"sha256": sha256(temporary / name), "bytes": (temporary / name).stat().st_size}
            for name in (*files_of(details["state"]), *OPTIONAL)
            if name not in OPTIONAL or (temporary / name).exists()
        }
        manifest = Manifest(format_version=FORMAT_VERSION, bundle_id="", files=files, **details)
        manifest = Manifest(**{**vars(manifest), "bundle_id": manifest.content_hash()})
        (temporary / MANIFEST).write_text(_manifest_text(manifest), encoding="utf-8")
        _sync(temporary)
        _replace_directory(temporary, path)
    except OSError as error:
        raise BundleError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _manifest_text(manifest: Manifest) -> str:
    try:
        return json.dumps(asdict(manifest), indent=2, allow_nan=False) + "\n"
    except ValueError:
        raise BundleError("a value of the manifest is not finite", "check the metrics and the tolerance") from None


def _may_be_replaced(path: Path) -> bool:
    """An empty directory or an older bundle, of whatever format; nothing else is ours to delete."""
    if not path.is_dir():
        return False
    try:
        manifest = parse_json(read_file(path / MANIFEST, limit=MAX_MANIFEST_BYTES))
        return isinstance(manifest, dict) and {"format_version", "bundle_id"} <= set(manifest)
    except (OSError, ValueError):  # InputError is a ValueError
        return not any(path.iterdir())


def _sync(directory: Path) -> None:
    for entry in [*directory.iterdir(), directory]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace_directory(new: Path, path: Path) -> None:
    """Puts `new` in place of `path`; a directory cannot be renamed over one that has content."""
    old = path.with_name(f"{new.name}.old")
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
