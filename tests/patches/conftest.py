"""Fixtures of the tests of patches."""

from __future__ import annotations

import pytest
from support.records import write_records
from support.umed_runs import train_flags

from umed_plugin import patching
from umed_plugin.patches import STACK


@pytest.fixture
def nothing_left_behind():
    """Patches are for training processes: other tests get LLaVA as it is, but for those that let it run (tests/conftest.py)."""
    yield
    patching.undo_all()
    patching.apply(STACK)


@pytest.fixture
def flags(tiny_mistral, tmp_path):
    """Flags of a short run from a tiny checkpoint, none of them the plugin's."""
    records = write_records(tmp_path / "data")
    return train_flags(tiny_mistral, records, tmp_path / "out")
