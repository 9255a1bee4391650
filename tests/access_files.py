"""Certificate and token files for tests."""

from __future__ import annotations

from pathlib import Path

import trustme


def chain(made: trustme.LeafCert) -> bytes:
    """A certificate and those that lead to its CA, PEM."""
    return b"".join(blob.bytes() for blob in made.cert_chain_pems)


def write_certificate(made: trustme.LeafCert, directory: Path, name: str) -> tuple[Path, Path]:
    """The file of a certificate with its chain, and that of its key."""
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    cert.write_bytes(chain(made))
    key.write_bytes(made.private_key_pem.bytes())
    return cert, key


def write_lines(path: Path, *lines: str) -> Path:
    """A token file as it should be: a new file in the place of the old one, for its owner only."""
    new = path.with_suffix(".new")
    new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    new.chmod(0o600)
    return new.replace(path)
