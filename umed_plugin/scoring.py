"""One scorer for rewards and evaluation: which classes an answer names, and how its boxes fit.

The paper does not say how its accuracy matches an answer. Here an answer is right when the set of classes that it names equals
the record's set; for a study without abnormality, when it names none and gives no box.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from umed_plugin.boxes import Box, parse_boxes, set_iou
from umed_plugin.geometry import ImageGeometry

Terms = Mapping[str, Sequence[str]]

# A class behind one of these, within the same clause, is ruled out by the answer and not named by it.
_NEGATION = re.compile(
    r"\b(?:no|not|without|absence of|free of|negative for|rather than|exclud\w*|rules? out)\b[^.;:,]*$", re.I
)


@dataclass(frozen=True)
class AnswerScore:
    """How one answer fits its record.

    Attributes:
        accuracy: 1.0 when exactly the record's classes are named (none, and no box, for a negative), else 0.0.
        class_f1: F1 in 0..1 of the named classes against the record's; 1.0 when both are empty.
        set_iou: IoU in 0..1 of predicted and true boxes, matched one to one; a negative scores 1.0 for no box, else 0.0.
        boxes: predicted boxes in pixels of the record's image, in the order of the answer.
        n_true: number of true boxes.
    """

    accuracy: float
    class_f1: float
    set_iou: float
    boxes: list[Box]
    n_true: int


@lru_cache(maxsize=256)
def _pattern(terms: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern that finds the longest term at each place, and the class of each term in lower case."""
    owner = {name.lower(): cls for cls, names in terms for name in names}
    words = sorted(owner, key=len, reverse=True)
    alternatives = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in words)
    return re.compile(rf"\b({alternatives})(?:s|es)?\b", re.I), owner


def find_terms(text: str, terms: Terms) -> list[tuple[int, int, str]]:
    """Places where ``text`` names a class: (start, end, class), in order, whole words, longest term first.

    A name that the same clause negates ("no nodule") is left out.
    """
    if not terms:
        return []
    pattern, owner = _pattern(tuple((cls, tuple(names)) for cls, names in terms.items()))
    return [
        (match.start(), match.end(), owner[" ".join(match.group(1).lower().split())])
        for match in pattern.finditer(text)
        if not _NEGATION.search(text, 0, match.start())
    ]


def named_classes(text: str, terms: Terms) -> set[str]:
    """The classes of ``terms`` (class -> plain name and synonyms) that ``text`` names."""
    return {cls for _, _, cls in find_terms(text, terms)}


def score_answer(text: str, record: Mapping[str, Any], geometry: ImageGeometry) -> AnswerScore:
    """Score an answer against its record.

    Boxes are compared as the model sees them, in the square; a true box that the square crop has cut away is not asked for.

    Args:
        text: the model's answer.
        record: ``objects`` and ``terms`` of DESIGN 6.
        geometry: of the record's image.
    """
    predicted = parse_boxes(text)
    true = geometry.to_square(record["objects"]["bbox"])
    wanted, named = set(record["objects"]["ref"]), named_classes(text, record["terms"])
    right = named == wanted and (bool(wanted) or not predicted)
    f1 = 2 * len(named & wanted) / (len(named) + len(wanted)) if named or wanted else 1.0
    return AnswerScore(float(right), f1, set_iou(predicted, true), geometry.from_square(predicted), len(true))
