"""What an answer claims beside boxes and names: that the image is normal, how many findings there are, and on which side.

Like the negations of `umed_plugin.grounding.terms`, these are found by a few patterns and not by a parser. They are English.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from umed_plugin.grounding.box_text import scan
from umed_plugin.grounding.boxes import blot_boxes
from umed_plugin.grounding.terms import ClassNames, replace_terms

_IMAGE = r"(?:image|study|scan|slice|picture|radiograph|x-?ray|film|frame|examination|exam|it|this|everything|all)"
# Words for what is not normal, in general.
_FINDING = (
    r"(?:abnormalit(?:y|ies)|abnormal\s+(?:area|region|finding|spot)s?|findings?|lesions?|(?:area|region|spot)s?|"
    r"patholog(?:y|ies)|diseases?)"
)
_MORE = r"(?:other|else|further|additional|more|another|second|new|doubt|question)"
_NORMAL = re.compile(
    rf"""
    ^\W*(?:no|normal)\s*(?:[.,;!]|$)
    | \bnothing\s+(?!else|other|further|more|but)(?:\w+\s+){{0,2}}?
      (?:abnormal|suspicious|unusual|pathological|to\s+(?:mark|locate|report))
    | \b(?:no|without(?:\s+any)?|neither|free\s+of|absence\s+of|negative\s+for)\s+
      (?!{_MORE}\b)(?:(?!{_MORE}\b)[\w-]+\s+){{0,4}}?{_FINDING}(?![\w-])
    | \b{_IMAGE}\s+(?:looks|appears|is|seems|are|look)\s+(?:to\s+be\s+)?(?:completely|entirely|quite|all)?\s*
      (?:normal|unremarkable|clear)\b
    | \bnormal\s+{_IMAGE}\b(?<!not\ a\ normal)
    | \b(?:unremarkable|(?:is|are)\s+clear)\b
    """,
    re.I | re.X,
)
_NUMBERS = {
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "single": 1,
    "solitary": 1,
    "eleven": 11,
    "twelve": 12,
}
_COUNT = re.compile(
    rf"(?<![\w.,-])({'|'.join(_NUMBERS)}|\d{{1,3}})\s+(?:(?!(?:of|[cm]m|ml)\b)[a-z-]+\s+){{0,2}}?({_FINDING}|@)(?![\w-])",
    re.I,
)
# "upper left", "left centre", "centre"; not the "left upper lobe", which is a side of the patient.
_DOWN, _ACROSS, _CENTRE = r"(?:upper|lower|top|bottom)", r"(?:left|right)", r"(?:centre|center|middle)"
_PART = r"(?:[\s-]+(?:corner|part|third|half|side|area|region))?"
_SIDE = re.compile(
    rf"""
    \b(?P<side>{_DOWN}[\s-]+(?:{_ACROSS}|{_CENTRE}) | {_ACROSS}[\s-]+(?:{_DOWN}|{_CENTRE}) | (?<=the\ ){_CENTRE}){_PART}
    (?= \s*(?:[.,;:()\[\]]|$) | \s+(?:quadrant\s+)?of\s+(?:the|this)\s+{_IMAGE}\b | \s+(?:at|within|with|inside|and|by|is)\b )
    """,
    re.I | re.X,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")


def says_normal(text: str, terms: ClassNames) -> bool:
    """Whether a text says that nothing is abnormal.

    "No other lesion" and "the heart is normal" do not say it of the whole image.

    Example:
        >>> says_normal("The study appears normal.", {}), says_normal("The image is not normal.", {})
        (True, False)
    """
    return bool(_NORMAL.search(_plain(text, terms)))


def number_said(text: str, terms: ClassNames) -> int | None:
    """How many findings a text says there are; None if it does not say so. The first number counts.

    Example:
        >>> number_said("Yes, two abnormal areas are visible. The first is a cyst.", {"cyst": ["cyst"]})
        2
    """
    for found in _COUNT.finditer(_plain(text, terms)):
        word, noun = found[1].lower(), found[2].lower()
        number = _NUMBERS[word] if word in _NUMBERS else int(word)
        # "a grade 2 lesion" counts nothing. A class name has lost its ending here.
        if number == 1 or noun.endswith("s") or (noun == "@" and word in _NUMBERS):
            return number
    return None


@dataclass(frozen=True)
class SideSaid:
    """A place in the image that a text names beside a box.

    Attributes:
        words: as the text has them, such as ``upper left``, in lower case.
        box: index of the box among those of `umed_plugin.grounding.box_text.scan` that are boxes or attempts.
    """

    words: str
    box: int

    def fits(self, x: float, y: float) -> bool:
        """Whether a point in 0-1 of the square lies there: a side is its half, and the centre the middle half, of the square."""
        said = set(re.split(r"[\s-]+", self.words))
        return all(
            (
                not said & {"left"} or x < 0.5 + _ROUNDING,
                not said & {"right"} or x > 0.5 - _ROUNDING,
                not said & {"upper", "top"} or y < 0.5 + _ROUNDING,
                not said & {"lower", "bottom"} or y > 0.5 - _ROUNDING,
                not self._is_centre_of(said, {"left", "right"}) or 0.25 <= x <= 0.75,
                not self._is_centre_of(said, {"upper", "top", "lower", "bottom"}) or 0.25 <= y <= 0.75,
            )
        )

    @staticmethod
    def _is_centre_of(said: set[str], sides: set[str]) -> bool:
        return bool(said & {"centre", "center", "middle"}) and not said & sides


# Numbers in an answer are rounded, so a centre on the line may be written on either side of it.
_ROUNDING = 0.02


def sides_said(text: str) -> list[SideSaid]:
    """The places that a text names in a sentence with a box, each with the box nearest to it.

    "Upper left of the image" counts, and "upper left lobe" does not: that is a side of the patient.

    Example:
        >>> sides_said("It lies in the upper left at [0.10, 0.20, 0.30, 0.40].")
        [SideSaid(words='upper left', box=0)]
    """
    spans = [(found.start, found.end) for found in scan(text) if found.is_box() or found.is_attempt()]
    ends = [found.start() for found in _SENTENCE_END.finditer(text)]
    said = []
    for side in _SIDE.finditer(text):
        sentence = sum(end < side.start() for end in ends)
        near = [
            (max(start - side.end(), side.start() - end), index)
            for index, (start, end) in enumerate(spans)
            if sum(place < start for place in ends) == sentence
        ]
        if near:
            said.append(SideSaid(side["side"].lower(), min(near)[1]))
    return said


def _plain(text: str, terms: ClassNames) -> str:
    """The text with ``@`` for each class name, without the numbers of boxes."""
    return replace_terms(blot_boxes(text, "[box]"), terms, "@")
