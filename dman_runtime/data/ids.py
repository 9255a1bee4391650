"""The product's rule for external ids of users and items: 1 to 400 bytes of UTF-8 without control characters."""

from __future__ import annotations

import re

MAX_ID_BYTES = 400  # in UTF-8
RULE = f"use ids of 1 to {MAX_ID_BYTES} bytes without control characters"
CONTROL_CHARACTERS = r"[\x00-\x1f\x7f-\x9f]"  # Unicode category Cc, as Python's and Arrow's regular expressions read it
_CONTROL = re.compile(CONTROL_CHARACTERS)
INTEGER, TEXT = "integer", "text"  # what the ids of a log, a bundle or a store are
INTEGER_FORM = r"^(0|-?[1-9][0-9]*)$"  # in plain decimal, for Python and Arrow
# Taken off around ids: Unicode category Z, and the tab. Other control characters make an id unusable instead.
BLANKS = (
    " \t\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)


def is_integer_id(text: str) -> bool:
    """Whether an id is an integer in plain decimal that fits 64 bits, so that text and integer are one to one."""
    return re.match(INTEGER_FORM, text) is not None and -(1 << 63) <= int(text) < 1 << 63


def id_problem(text: str) -> str | None:
    """What is wrong with an external id, to be put after it ("is empty"); None for a valid one."""
    if text.isascii() and text.isprintable() and 0 < len(text) <= MAX_ID_BYTES:  # nearly all ids: keep this fast
        return None
    if not text:
        return "is empty"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # a lone surrogate
        return "is not valid Unicode"
    if size > MAX_ID_BYTES:
        return f"is longer than {MAX_ID_BYTES} bytes"
    return "holds control characters" if _CONTROL.search(text) else None
