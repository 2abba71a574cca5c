"""What is wrong with an answer of the vision model, in sentences that the model, the reviewer and the user can read.

Scoring has the last word on what names a class and what is a box: the checks use `umed_plugin.grounding.scoring` and
`umed_plugin.grounding.boxes`, as rewards and evaluation do.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from umed_plugin.data.records import Record, record_geometry, true_boxes
from umed_plugin.grounding.boxes import Box, find_boxes, format_box, parse_boxes, rewrite_boxes, round_box
from umed_plugin.grounding.terms import find_terms

DEFAULT_WORDS = (15, 150)

# Words that a sentence of a language can hardly do without, and that hardly stand in one of another.
_ENGLISH = re.compile(r"the|of|and|is|in|with|at|to|which|a|an|are|this|that|there|it|by|on|from|as|its|has")
_OTHERS = re.compile(
    "der|die|das|und|ist|mit|ein|eine|im|den|le|la|les|des|et|est|une|dans|du|el|los|las|es|una|con|por|en|que|il|di|che|per|uma|"
    "com|não|het|een|van|de"
)
# Of what was only drawn for the writing model: a model that is trained on it would look for frames.
_MARKING = re.compile(
    r"\b(?:rectangles?|outlined|highlighted|annotat\w*|(?:coloured|colored|green) (?:frame|box)\w*|frames?)\b", re.I
)
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Findings:
    """What a record says is in its image, as the model is told it.

    Attributes:
        refs: class of each lesion.
        names: plain name of each lesion.
        boxes01: of each lesion, in 0-1 of the square, not rounded.
        decimals: of the coordinates in text.
        terms: class -> plain name and synonyms, of all classes of the source.
    """

    refs: tuple[str, ...]
    names: tuple[str, ...]
    boxes01: tuple[Box, ...]
    decimals: int
    terms: dict[str, list[str]]

    @classmethod
    def of(cls, record: Record) -> Findings:
        """Of a record that `umed recipe build` has made."""
        refs = record["objects"]["ref"]
        boxes = record_geometry(record).to_square(true_boxes(record))
        names = tuple(record["terms"][ref][0] for ref in refs)
        return cls(tuple(refs), names, tuple(boxes), record["provenance"]["box_decimals"], record["terms"])

    @property
    def rounded(self) -> list[Box]:
        """The boxes as they stand in text."""
        return [round_box(box, self.decimals) for box in self.boxes01]

    def nearest(self, box: Box) -> Box | None:
        """The lesion's box, as it stands in text, that this is to rounding; None when it is no lesion's."""
        half = 0.5 * 10**-self.decimals + 1e-9
        fitting = (own for own in self.rounded if all(abs(said - value) <= half for said, value in zip(box, own)))
        return next(fitting, None)

    def lines(self) -> str:
        """One line a lesion: number, name, box."""
        pairs = enumerate(zip(self.names, self.boxes01), start=1)
        return "\n".join(f"{number}. {name} at {format_box(box, self.decimals)}" for number, (name, box) in pairs)


@dataclass(frozen=True)
class Rules:
    """What an answer must keep to.

    Attributes:
        words: fewest and most words.
        language: ``en``, or ``any`` for no check.
    """

    words: tuple[int, int] = DEFAULT_WORDS
    language: str = "en"


def reply_faults(text: str | None, finish_reason: str) -> list[str]:
    """What is wrong with a reply whatever its words: nothing in it, cut off, withheld."""
    if finish_reason == "unreadable":
        return ["The server sent no readable answer."]
    if finish_reason == "content_filter":
        return ["The answer was withheld by a content filter."]
    if text is None or not text.strip():
        return ["There is no text: the model refused or wrote nothing."]
    if finish_reason == "length":
        return ["The text was cut off before its end. Be shorter."]
    return []


def draft_faults(text: str, findings: Findings) -> list[str]:
    """What makes a first answer useless to reflect on: it is about something else."""
    named = {cls for _, _, cls in find_terms(text, findings.terms)}
    missing = [name for ref, name in zip(findings.refs, findings.names) if ref not in named]
    return [f'It does not name "{name}".' for name in dict.fromkeys(missing)]


def text_faults(text: str, findings: Findings, rules: Rules) -> list[str]:
    """What is wrong with a finished text."""
    return [
        *_class_faults(text, findings),
        *box_faults(text, findings),
        *_order_faults(text, findings),
        *_language_faults(text, rules.language),
        *_length_faults(text, rules.words),
        *_marking_faults(text),
    ]


def box_faults(text: str, findings: Findings) -> list[str]:
    """Boxes of the record that the text leaves out or repeats, and boxes that are not the record's."""
    said = [(box, findings.nearest(box)) for box in parse_boxes(text)]
    counts = Counter(own for _, own in said)
    faults = []
    # Two lesions may be alike to the last decimal: then their box is told twice.
    for own, times in Counter(findings.rounded).items():
        if counts[own] != times:
            often = f"stands {counts[own]} times" if counts[own] else "is missing"
            faults.append(f"The box {format_box(own, findings.decimals)} {often}; needed: {times}.")
    return faults + [f"The box {list(box)} is none of the image's boxes." for box, own in said if own is None]


def in_our_dialect(text: str, findings: Findings) -> str:
    """A text that `box_faults` finds right, with its boxes written as all others are, on one line without outer blanks."""

    def write(box: Box) -> str:
        own = findings.nearest(box)
        assert own is not None, f"{box} is no box of the image: box_faults was not asked"
        return format_box(own, findings.decimals)

    return " ".join(rewrite_boxes(text, write).split())


def _class_faults(text: str, findings: Findings) -> list[str]:
    faults = draft_faults(text, findings)
    named = {cls for _, _, cls in find_terms(text, findings.terms)}
    others = sorted(named - set(findings.refs))
    return faults + [f'It names "{findings.terms[ref][0]}", which is not in this image.' for ref in others]


def _order_faults(text: str, findings: Findings) -> list[str]:
    """Localisation comes before recognition: no finding is named before the first box."""
    named = [start for start, _, ref in find_terms(text, findings.terms) if ref in findings.refs]
    boxes = [start for start, _ in find_boxes(text)]
    if named and boxes and min(named) < min(boxes):
        return ["A finding is named before the first box: first say where it lies, then what it is."]
    return []


def _language_faults(text: str, language: str) -> list[str]:
    """Whether a text is English, told by its script and its commonest words: needs no library, and is enough for prose."""
    if language == "any":
        return []
    words = [word.lower() for word in _WORD.findall(text)]
    english, other = (sum(common.fullmatch(word) is not None for word in words) for common in (_ENGLISH, _OTHERS))
    latin = sum(word.isascii() for word in words)
    if words and latin >= 0.9 * len(words) and english >= 0.1 * len(words) and english > other:
        return []
    return ["The text is not English."]


def _length_faults(text: str, words: tuple[int, int]) -> list[str]:
    # A box is one word, however many digits it has.
    count = len(rewrite_boxes(text, lambda box: "box").split())
    if words[0] <= count <= words[1]:
        return []
    return [f"The text has {count} words; needed: {words[0]} to {words[1]}."]


def _marking_faults(text: str) -> list[str]:
    found = _MARKING.search(text)
    return [f'It speaks of "{found.group(0)}": write as if the image had no marks.'] if found else []
