"""Fixtures of the tests of forward passes, packing and sampling."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from umed_plugin import patching
from umed_plugin.patches import attention_mask


@pytest.fixture
def patched() -> Iterator[None]:
    """Mistral takes a block mask; without the patch again afterwards."""
    patching.apply([attention_mask.PATCH])
    yield
    patching.undo(attention_mask.PATCH)
