"""Ingesters of a topic that are killed, and that share it with others: every event once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tools.soak.ingestion import ingestion
from tools.soak.setting import QUICK, Soak

pytestmark = pytest.mark.slow


def test_events_of_a_topic_are_stored_once_while_ingesters_are_killed_and_share_it(
    bundle: Path, tmp_path: Path
) -> None:
    """A short form of `python -m tools.soak ingestion`."""
    section = ingestion(Soak(bundle, tmp_path, replace(QUICK, ingested=1000)))
    assert [claim for claim in section.claims if claim.met is False] == []
