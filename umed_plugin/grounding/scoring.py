"""One scorer for rewards and evaluation: which classes an answer names, and how its boxes fit.

The paper does not say how its accuracy matches an answer. Here an answer is right when the set of classes that it names equals
the record's set; for a study without abnormality, when it names none and gives no box. A class that the answer rules out ("no
nodule") is not named by it; that is told by a few cue words in the manner of NegEx (Chapman et al. 2001), not by a parser.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from umed_plugin.grounding.boxes import Box, is_degenerate, is_inside, set_iou
from umed_plugin.grounding.dialects import LLAVA, BoxDialect
from umed_plugin.grounding.geometry import ImageGeometry

Terms = Mapping[str, Sequence[str]]

_BOX_THAT_IS_NONE: Box = (0.0, 0.0, 0.0, 0.0)

# Words that rule classes out, and words at which that ends. At one place the first group that fits is taken.
_NOT = r"(?:\b(?:can)?not|n['\u2019]t)"
_BE = r"(?:is|are|was|were)"
_CUES = re.compile(
    rf"""
    (?P<pseudo>  # looks like a negation, but rules nothing out
        {_NOT}\s+(?:only|just|without|free\s+of|(?:be\s+|been\s+)?(?:absent|rul\w+\s+out|exclud\w+))\b
        | {_NOT}\s+(?:\w+\s+){{0,2}}normal\b
        | \b(?:no|without(?:\s+a)?)\s+(?:doubt|question)\b
        | \bno\s*,
    )
    | (?P<behind>  # rules out what the clause has named: "a nodule is absent"
        \b(?:{_BE}|ha(?:s|ve)\s+been)\s+(?:ruled\s+out|excluded|absent|unlikely)\b
        | \b(?:{_BE}|has|have|can?|could)(?:\s*not|n['\u2019]t)\s+(?:be\s+|been\s+)?
          (?:seen|present|visible|found|identified|detected|evident|likely)\b
    )
    | (?P<ahead>  # rules out what follows, a whole list of names: "no nodule, cyst or mass"
        (?:\bno|{_NOT})\s+\w+\s+(?:that\s+)?(?:it|this|there)\s+{_BE}\b
        | {_NOT}(?:\s+\w+ly)?\b
        | \b(?:no|never|nothing|neither|nor|without|absence\s+of|lack\s+of|free\s+of|negative\s+for)\b
        | \b(?:rather\s+than|instead\s+of|exclud(?:es?|ed|ing)|rul(?:es?|ed|ing)\s+out)\b
    )
    | (?P<verb> \b(?<!to\ )(?:{_BE}|has|have|(?:show|reveal|demonstrate|contain|lie)s?)\b )
    | (?P<end>
        \.(?!\d) | [!?;:)\n]
        | \b(?:but|however|although|though|yet|while|whereas|except|apart\s+from|other\s+than|only|rather|instead)\b
        | \b(?:(?:more|most)\s+likely|there|it|we|they|,\s*I)\b
        | (?:,\s+(?:and\s+)?|\band\s+)  # a new clause: ", a cyst is", but not ", a cyst or a mass is"
          (?=(?:an?|the)\s+(?:(?!(?:or|nor|and)\b)[\w-]+\s+){{1,4}}?(?:is|was|has|shows|lies)\b)
    )
    """,
    re.I | re.X,
)


@dataclass(frozen=True)
class AnswerScore:
    """How one answer fits its record.

    Attributes:
        accuracy: 1.0 when exactly the record's classes are named (none, and no box, for a negative), else 0.0.
        class_f1: F1 in 0..1 of the named classes against the record's; 1.0 when both are empty.
        set_iou: IoU in 0..1 of predicted and true boxes, matched one to one; a negative scores 1.0 for no box, else 0.0.
        boxes: predicted boxes in pixels of the record's image, in the order of the answer.
        predicted01: the same boxes as they are compared, in 0-1 of the square; one that is malformed has no area.
        true01: the true boxes that the model can see, in 0-1 of the square.
    """

    accuracy: float
    class_f1: float
    set_iou: float
    boxes: list[Box]
    predicted01: list[Box]
    true01: list[Box]

    @property
    def n_true(self) -> int:
        """Number of true boxes that the model can see."""
        return len(self.true01)


@lru_cache(maxsize=256)
def _pattern(terms: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[re.Pattern[str], list[str]]:
    """A pattern that finds the longest term at each place, and the class of each of its groups."""
    words = sorted(((name, cls) for cls, names in terms for name in names), key=lambda word: len(word[0]), reverse=True)
    alternatives = "|".join(f"({re.escape(name)})".replace(r"\ ", r"\s+") for name, _ in words)
    # Not \b, which asks for a letter on one side: a name may end in a parenthesis.
    return re.compile(rf"(?<!\w)(?:{alternatives})(?:s|es)?(?!\w)", re.I), [cls for _, cls in words]


def find_terms(text: str, terms: Terms) -> list[tuple[int, int, str]]:
    """Places where ``text`` names a class: (start, end, class), in order, whole words, longest term first.

    A name that the text rules out ("no nodule", "a nodule is absent") is left out.
    """
    if not terms:
        return []
    pattern, owners = _pattern(tuple((cls, tuple(names)) for cls, names in terms.items()))
    places = [(match.start(), match.end(), owners[(match.lastindex or 1) - 1]) for match in pattern.finditer(text)]
    if not places:
        return []
    # Names are blotted out before cues are looked for: "mass without calcification" may be a class.
    blotted = list(text)
    for start, end, _ in places:
        blotted[start:end] = "x" * (end - start)
    ruled_out = _ruled_out("".join(blotted))
    return [place for place in places if not any(start <= place[0] < end for start, end in ruled_out)]


def replace_terms(text: str, terms: Terms, filler: str) -> str:
    """``text`` with ``filler`` in place of every name of a class, ruled out or not."""
    return _pattern(tuple((cls, tuple(names)) for cls, names in terms.items()))[0].sub(filler, text) if terms else text


def _ruled_out(text: str) -> list[tuple[int, int]]:
    """Stretches ``[start, end)`` of the text in which a name is given only to say that it is not there."""
    stretches: list[tuple[int, int]] = []
    clause, opened = 0, None
    for cue in _CUES.finditer(text):
        kind = cue.lastgroup
        # A verb right after its negator belongs to it: "does not show", "nor is".
        own_verb = kind == "verb" and opened is not None and not text[opened : cue.start()].strip()
        if kind == "pseudo" or own_verb:
            continue
        if kind == "behind":
            stretches.append((clause, cue.start()))
        elif opened is not None:
            stretches.append((opened, cue.start()))
        opened = cue.end() if kind == "ahead" else None
        clause = clause if kind == "ahead" else cue.end()
    return stretches if opened is None else [*stretches, (opened, len(text))]


def named_classes(text: str, terms: Terms) -> set[str]:
    """The classes of ``terms`` (class -> plain name and synonyms) that ``text`` names."""
    return {cls for _, _, cls in find_terms(text, terms)}


def boxes_in_square(text: str, geometry: ImageGeometry, dialect: BoxDialect = LLAVA) -> list[Box]:
    """The boxes of an answer in 0-1 of the square that the model sees, in the order of the answer; not clipped to it.

    A box of the image's frame that leaves the image becomes ``(0, 0, 0, 0)``, which overlaps nothing.
    """
    read = dialect.read(text, geometry.width, geometry.height)
    if dialect.frame == "square":
        return read
    width, height = geometry.width, geometry.height
    pixels = [(x1 * width, y1 * height, x2 * width, y2 * height) for x1, y1, x2, y2 in read]
    return [placed if is_inside(box) else _BOX_THAT_IS_NONE for box, placed in zip(read, geometry.to_square(pixels))]


def score_answer(
    text: str, record: Mapping[str, Any], geometry: ImageGeometry, dialect: BoxDialect = LLAVA
) -> AnswerScore:
    """Score an answer against its record.

    Boxes are compared as the model sees them, in the square. A lesion that LLaVA's centre crop has cut away whole is not asked
    for, nor is its class unless another lesion has it. A predicted box that has no area or leaves the square overlaps nothing and
    counts as wrong.

    Args:
        text: the model's answer.
        record: of it ``objects`` (``ref`` classes and ``bbox`` in pixels of the image file) and ``terms``.
        geometry: of the record's image.
        dialect: in which the answer writes boxes.
    """
    predicted = boxes_in_square(text, geometry, dialect)
    in_square = geometry.to_square(record["objects"]["bbox"])
    seen = [(ref, box) for ref, box in zip(record["objects"]["ref"], in_square) if not is_degenerate(box)]
    true = [box for _, box in seen]
    wanted, named = {ref for ref, _ in seen}, named_classes(text, record["terms"])
    right = named == wanted and (bool(wanted) or not predicted)
    f1 = 2 * len(named & wanted) / (len(named) + len(wanted)) if named or wanted else 1.0
    compared = [box if is_inside(box) else _BOX_THAT_IS_NONE for box in predicted]
    return AnswerScore(float(right), f1, set_iou(compared, true), geometry.from_square(predicted), compared, true)


@dataclass(frozen=True)
class Scorer:
    """What scoring an evaluated checkpoint's answers needs to know of it.

    Attributes:
        mode: ``pad`` or ``square``, how it sees images.
        image_size, patch_size: of its vision tower, in pixels.
        dialect: in which it writes boxes.
    """

    mode: str = "pad"
    image_size: int = 336
    patch_size: int = 14
    dialect: BoxDialect = LLAVA

    def geometry(self, size: Sequence[int]) -> ImageGeometry:
        """Of an image of this width and height."""
        return ImageGeometry(int(size[0]), int(size[1]), self.mode, self.image_size, self.patch_size)
