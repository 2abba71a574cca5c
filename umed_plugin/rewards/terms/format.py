"""The form of an answer: every abnormality that it names has a box, nothing comes twice, and the text is language."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from umed_plugin.grounding.answer_types import asks_for_diagnosis
from umed_plugin.grounding.boxes import Box, copies, is_inside
from umed_plugin.grounding.claims import says_normal
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import boxes_in_square
from umed_plugin.grounding.terms import named_classes, ruled_out_classes
from umed_plugin.grounding.wording import Wording, count_words, known_words, language, repeated_words
from umed_plugin.rewards.contract import register_reward


@register_reward("format", applies_to=asks_for_diagnosis)
def format(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    record: Sequence[Mapping[str, Any]],
    geometry: Sequence[ImageGeometry],
    **columns: Any,
) -> list[float | None]:
    """``language * unrepeated * (1 + boxes) / 2``, in 0..1; never ``None``.

    - ``language``: how much the text reads like language (`umed_plugin.grounding.wording`).
    - ``unrepeated``: share of the words that do not only repeat others.
    - ``boxes``: share of the named classes that a box can belong to, times the share of the boxes that have an area, lie in the
      square and are not the same box again. Without a name and a box: 1 for an answer that says that nothing is abnormal, else 0.

    So an answer in clean language scores at least 0.5 if no words repeat, also in words that no reference has. It says nothing
    about truth: a wrong diagnosis in good form scores 1. Use it beside `relevance` and `localization`.

    In a run with at least 100 training records, the language is compared with that of their references (`FormatOf`). Only then
    are their words found with letters or spaces lost, and in a wrong order. Invented words are not found, nor is a wrong order of
    words that the references lack.

    Example:
        >>> study = {"terms": {"cyst": ["cyst"]}, "conversations": [{"value": "Where?"}, {"value": "A cyst."}]}
        >>> format(["Where?"], ["A cyst at [0.10, 0.20, 0.30, 0.40]."], record=[study], geometry=[ImageGeometry(100, 100)])
        [1.0]
    """
    return [_value(*answer, None) for answer in zip(completions, record, geometry)]


class FormatOf:
    """The reward `format` in a run, which knows how the references of the training records are worded."""

    applies_to = staticmethod(asks_for_diagnosis)

    def __init__(self, references: Iterable[str]) -> None:
        self._wording = Wording.of(references)

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        record: Sequence[Mapping[str, Any]],
        geometry: Sequence[ImageGeometry],
        **columns: Any,
    ) -> list[float | None]:
        """As `format`."""
        return [_value(*answer, self._wording) for answer in zip(completions, record, geometry)]


# Fewer records do not show which words are usual.
LEAST_RECORDS = 100


def _for_records(records: Sequence[Mapping[str, Any]]) -> Any:
    if len(records) < LEAST_RECORDS:
        return format
    return FormatOf(turn["value"] for record in records for turn in record["conversations"][:2])


format.for_records = _for_records  # type: ignore[attr-defined]


def _value(text: str, record: Mapping[str, Any], geometry: ImageGeometry, wording: Wording | None) -> float:
    boxes = boxes_in_square(text, geometry)
    words = count_words(text)
    if not words:
        return 0.0
    read = language(text, known_words(record), wording)
    unrepeated = 1 - min(1.0, repeated_words(text, times=max(1, len(boxes))) / words)
    return read * unrepeated * (1 + _boxed(text, boxes, record["terms"])) / 2


def _boxed(text: str, boxes: Sequence[Box], terms: Mapping[str, Sequence[str]]) -> float:
    named = named_classes(text, terms)
    if not named:
        return float(not boxes and (says_normal(text, terms) or bool(ruled_out_classes(text, terms))))
    proper = [box for box in boxes if is_inside(box)]
    # One place may hold as many findings as there are names.
    own = sum(earlier < len(named) for earlier in copies(proper))
    return min(1.0, own / len(named)) * (own / len(boxes) if boxes else 0.0)
