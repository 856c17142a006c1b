"""What the tests of conversions share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not ask whether bytes survive a power failure: every small file would wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
