"""The rule for external ids, of users and items alike: 1 to 400 bytes of UTF-8 without control characters."""

from __future__ import annotations

import re

MAX_ID_BYTES = 400
RULE = f"an id is 1 to {MAX_ID_BYTES} bytes of UTF-8 without control characters"
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def id_problem(text: str) -> str | None:
    """What is wrong with an id, or None."""
    if not text:
        return "is empty"
    if _CONTROL_CHARACTER.search(text):
        return "holds control characters"
    if len(text) * 4 > MAX_ID_BYTES or not text.isascii():
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            return "is not valid Unicode"
        if size > MAX_ID_BYTES:
            return f"is longer than {MAX_ID_BYTES} bytes"
    return None
