"""The rule for external ids: its limits, and what it calls each problem."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dman_runtime.data.ids import MAX_ID_BYTES, id_problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("7", None),
        (" a b ", None),
        ("x" * 400, None),
        ("é" * 200, None),
        ("😀" * 100, None),
        ("\u00a0\u2028\ufeff\u200b", None),  # odd, but not control characters
        ("", "is empty"),
        ("x" * 401, "is longer than 400 bytes"),
        ("é" * 200 + "x", "is longer than 400 bytes"),
        ("a\nb", "holds control characters"),
        ("\x00", "holds control characters"),
        ("a\x7f", "holds control characters"),
        ("é\x80", "holds control characters"),
        ("\x9f", "holds control characters"),
        ("a\ud800", "is not valid Unicode"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_id_problem_names_what_is_wrong(text: str, problem: str | None) -> None:
    assert id_problem(text) == problem


@pytest.mark.slow
@given(st.text(max_size=6) | st.text(st.sampled_from("aé😀"), min_size=95, max_size=410))
def test_id_is_valid_exactly_when_the_rule_written_out_says_so(text: str) -> None:
    controls = any(unicodedata.category(character) == "Cc" for character in text)
    assert (id_problem(text) is None) == (1 <= len(text.encode()) <= MAX_ID_BYTES and not controls)


def test_every_control_character_is_refused() -> None:
    refused = {code for code in range(0x10000) if not 0xD800 <= code <= 0xDFFF and id_problem(chr(code))}
    assert refused == {*range(0x20), *range(0x7F, 0xA0)}
