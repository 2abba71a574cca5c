"""The local judges, deterministic and free: ``lexical`` (class names and words, the default) and ``classes`` (class names only).

``lexical`` is ``language * (CLASS_WEIGHT * class F1 + (1 - CLASS_WEIGHT) * word F1)``, in 0..1. Class F1 asks whether the right
abnormalities are named. Word F1 (the F1 of SQuAD, Rajpurkar et al. 2016) compares the words of the two texts as multisets. It
ignores numbers, so that boxes are not judged twice. Both see a bag of words, and a garbled answer may hold the right ones. So
``language``, in 0..1, says how much the answer has the form of language beside its reference (`wording.language_beside`). Without
faults of form it is exactly 1, also for right words in a wrong order and for invented words that look like words.

``classes`` is the class F1 alone. Where references word the same finding in random phrases, as a template writer does, word F1
mostly tells which phrase was guessed, and learning it draws all answers to one wording.

Departure from the paper: it asks an external LLM (:mod:`umed_plugin.rewards.judges.relevance`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from umed_plugin.grounding.answer_types import asks_for_names
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.grounding.wording import known_words, language_beside

# One half: the right name in wrong words is worth as much as wrong names in the reference's words.
CLASS_WEIGHT = 0.5

_WORD = re.compile(r"[^\W\d_]+")


def lexical_relevance(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    record: Sequence[Mapping[str, Any]],
    geometry: Sequence[ImageGeometry],
    **columns: Any,
) -> list[float | None]:
    """Relevance of each completion to its record's reference diagnosis, in 0..1; never ``None``.

    Example:
        >>> study = {"terms": {"cyst": ["cyst"]}, "objects": {"ref": ["cyst"], "bbox": [[10, 20, 30, 40]]}}
        >>> study["conversations"] = [{"value": "Where?"}, {"value": "A cyst lies here."}]
        >>> answers = ["A cyst lies here.", "A cyst.", "cyst b there0 A [0. lies here d2:"]
        >>> columns = {"record": [study] * 3, "geometry": [ImageGeometry(100, 100)] * 3}
        >>> [round(score, 2) for score in lexical_relevance([""] * 3, answers, **columns)]
        [1.0, 0.83, 0.0]
    """
    scores: list[float | None] = []
    for completion, study, in_square in zip(completions, record, geometry):
        class_f1 = score_answer(completion, study, in_square).class_f1
        reference = study["conversations"][1]["value"]
        word_f1 = _word_f1(completion, reference)
        read = language_beside(completion, reference, known_words(study))
        scores.append(read * (CLASS_WEIGHT * class_f1 + (1 - CLASS_WEIGHT) * word_f1))
    return scores


def class_relevance(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    record: Sequence[Mapping[str, Any]],
    geometry: Sequence[ImageGeometry],
    **columns: Any,
) -> list[float | None]:
    """F1 of the abnormalities that each completion names against those of its record, in 0..1; never ``None``."""
    scored = zip(completions, record, geometry)
    return [score_answer(text, study, in_square).class_f1 for text, study, in_square in scored]


# Of a phrase, whose answer names nothing, there is nothing to judge.
lexical_relevance.applies_to = class_relevance.applies_to = asks_for_names  # type: ignore[attr-defined]

LOCAL_JUDGES = {"lexical": lexical_relevance, "classes": class_relevance}


def _word_f1(text: str, reference: str) -> float:
    words, expected = (Counter(_WORD.findall(part.lower())) for part in (text, reference))
    common = sum((words & expected).values())
    return 2 * common / (sum(words.values()) + sum(expected.values())) if common else 0.0
