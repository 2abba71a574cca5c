"""What a record asks for: ``answer_type``, and which measures mean something for it.

- ``grounded``: all lesions with their names and boxes. ``negative``: the same of an image without one.
- ``phrase``: the boxes of one sentence. The answer names no class, so a missing name is no fault.
- ``report``: a text. Nothing is known about where findings lie, so an answer without boxes is no fault.
- ``probe``: one of the options in its question (`umed_plugin.data.probes`). Stage 1 trains on it; nothing scores it. Its boxes
  say what the picture shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GROUNDED, NEGATIVE, PHRASE, REPORT, PROBE = "grounded", "negative", "phrase", "report", "probe"
ANSWER_TYPES = (GROUNDED, NEGATIVE, PHRASE, REPORT, PROBE)


def asks_for_names(record: Mapping[str, Any]) -> bool:
    """Whether the answer must name what is abnormal."""
    return record.get("answer_type") != PHRASE


def asks_for_boxes(record: Mapping[str, Any]) -> bool:
    """Whether the answer must say where the lesions lie, or that there is none."""
    return record.get("answer_type") != REPORT


def asks_for_diagnosis(record: Mapping[str, Any]) -> bool:
    """Whether the answer is a diagnosis with names and boxes."""
    return asks_for_names(record) and asks_for_boxes(record) and record.get("answer_type") != PROBE
