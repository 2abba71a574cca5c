"""Faults of a vision model's replies, as sentences for the model, the reviewer and the user.

What names a class and what is a box is decided as in rewards and evaluation: by `umed_plugin.grounding.terms` and
`umed_plugin.grounding.boxes`.

These sentences are part of the request for a better reply, and so of its key in the ledger. Changing one means that replies to
such requests that were paid for are not found again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from umed_plugin.data.records import Record, record_geometry, true_boxes
from umed_plugin.grounding.boxes import Box, find_boxes, format_box, parse_boxes, rewrite_boxes, round_box
from umed_plugin.grounding.terms import find_terms

DEFAULT_WORDS = (15, 150)

# Words that are in almost every sentence of a language, and rarely in one of another language.
_ENGLISH = re.compile(r"the|of|and|is|in|with|at|to|which|a|an|are|this|that|there|it|by|on|from|as|its|has")
_OTHERS = re.compile(
    "der|die|das|und|ist|mit|ein|eine|im|den|le|la|les|des|et|est|une|dans|du|el|los|las|es|una|con|por|en|que|il|di|che|per|uma|"
    "com|não|het|een|van|de"
)
# Words for the frames, which are drawn only for the writing model: a model trained on such texts would look for frames.
_MARKING = re.compile(
    r"\b(?:rectangles?|outlined|highlighted|annotat\w*|(?:coloured|colored|green) (?:frame|box)\w*|frames?)\b", re.I
)
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Findings:
    """The lesions of a record, as the model is told them.

    Attributes:
        refs: class of each lesion.
        names: plain name of each lesion.
        boxes01: box of each lesion, xyxy, 0-1 of the square, not rounded.
        decimals: number of decimals of coordinates in text.
        class_names: class -> plain name and synonyms, for all classes of the source.
        looks: plain name -> what the class looks like, of those whose recipe says it.
    """

    refs: tuple[str, ...]
    names: tuple[str, ...]
    boxes01: tuple[Box, ...]
    decimals: int
    class_names: dict[str, list[str]]
    looks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Record) -> Findings:
        """The lesions of a record that `umed recipe build` has made."""
        refs = record["objects"]["ref"]
        boxes = record_geometry(record).to_square(true_boxes(record))
        names = tuple(record["terms"][ref][0] for ref in refs)
        decimals, looks = record["provenance"]["box_decimals"], record.get("looks", {})
        return cls(tuple(refs), names, tuple(boxes), decimals, record["terms"], looks)

    @property
    def rounded(self) -> list[Box]:
        """The boxes as they are written in text."""
        return [round_box(box, self.decimals) for box in self.boxes01]

    def nearest(self, box: Box) -> Box | None:
        """The lesion's box, as written in text, that equals this one up to rounding; None if there is none."""
        half = 0.5 * 10**-self.decimals + 1e-9
        matches = (true for true in self.rounded if all(abs(a - b) <= half for a, b in zip(box, true)))
        return next(matches, None)

    def lines(self) -> str:
        """One line per lesion: number, name, box, and what such a finding looks like in general, where the recipe says it."""
        lines = []
        for number, (name, box) in enumerate(zip(self.names, self.boxes01), start=1):
            looks = f" (in general: {self.looks[name]})" if name in self.looks else ""
            lines.append(f"{number}. {name} at {format_box(box, self.decimals)}{looks}")
        return "\n".join(lines)


@dataclass(frozen=True)
class TextRules:
    """Rules for a finished text.

    Attributes:
        words: minimum and maximum number of words.
        language: ``en``, or ``any`` for no check.
    """

    words: tuple[int, int] = DEFAULT_WORDS
    language: str = "en"


def reply_faults(text: str | None, finish_reason: str) -> list[str]:
    """Faults of any reply, whatever its text: unreadable, withheld, empty, cut off."""
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
    """Faults that make a draft useless for reflection: it does not name a finding."""
    named = {cls for _, _, cls in find_terms(text, findings.class_names)}
    missing = [name for ref, name in zip(findings.refs, findings.names) if ref not in named]
    return [f'It does not name "{name}".' for name in dict.fromkeys(missing)]


def text_faults(text: str, findings: Findings, rules: TextRules) -> list[str]:
    """Faults of a finished text."""
    return [
        *_class_faults(text, findings),
        *box_faults(text, findings),
        *_order_faults(text, findings),
        *_language_faults(text, rules.language),
        *_length_faults(text, rules.words),
        *_marking_faults(text),
    ]


def box_faults(text: str, findings: Findings) -> list[str]:
    """Boxes of the record that the text omits or repeats, and boxes that are not in the record."""
    matches = [(box, findings.nearest(box)) for box in parse_boxes(text)]
    counts = Counter(true for _, true in matches)
    faults = []
    # Boxes of two lesions may be equal after rounding: then the text must have that box twice.
    for true, times in Counter(findings.rounded).items():
        if counts[true] != times:
            often = f"stands {counts[true]} times" if counts[true] else "is missing"
            faults.append(f"The box {format_box(true, findings.decimals)} {often}; needed: {times}.")
    return faults + [f"The box {list(box)} is none of the image's boxes." for box, true in matches if true is None]


def in_our_dialect(text: str, findings: Findings) -> str:
    """A text without `box_faults`, with its boxes in the training dialect, on one line without surrounding blanks."""

    def write(box: Box) -> str:
        true = findings.nearest(box)
        assert true is not None, f"{box} is not a box of the image: call box_faults first"
        return format_box(true, findings.decimals)

    return " ".join(rewrite_boxes(text, write).split())


def _class_faults(text: str, findings: Findings) -> list[str]:
    faults = draft_faults(text, findings)
    named = {cls for _, _, cls in find_terms(text, findings.class_names)}
    others = sorted(named - set(findings.refs))
    return faults + [f'It names "{findings.class_names[ref][0]}", which is not in this image.' for ref in others]


def _order_faults(text: str, findings: Findings) -> list[str]:
    """Localisation comes before recognition: no finding may be named before the first box."""
    named = [start for start, _, ref in find_terms(text, findings.class_names) if ref in findings.refs]
    boxes = [start for start, _ in find_boxes(text)]
    if named and boxes and min(named) < min(boxes):
        return ["A finding is named before the first box: first say where it lies, then what it is."]
    return []


def _language_faults(text: str, language: str) -> list[str]:
    """Whether a text is English, by its script and its most common words. That needs no library and is enough for prose."""
    if language == "any":
        return []
    words = [word.lower() for word in _WORD.findall(text)]
    english, other = (sum(common.fullmatch(word) is not None for word in words) for common in (_ENGLISH, _OTHERS))
    latin = sum(word.isascii() for word in words)
    if words and latin >= 0.9 * len(words) and english >= 0.1 * len(words) and english > other:
        return []
    return ["The text is not English."]


def _length_faults(text: str, words: tuple[int, int]) -> list[str]:
    # A box counts as one word.
    count = len(rewrite_boxes(text, lambda box: "box").split())
    if words[0] <= count <= words[1]:
        return []
    return [f"The text has {count} words; needed: {words[0]} to {words[1]}."]


def _marking_faults(text: str) -> list[str]:
    match = _MARKING.search(text)
    return [f'It speaks of "{match.group(0)}": write as if the image had no marks.'] if match else []
