"""Offline writer of questions and diagnoses from templates.

In the paper GPT-4V writes the diagnoses; this writer needs no network. It keeps the paper's order of detection, localisation,
recognition: an answer states how many abnormal areas there are, then where each lies, then what each is. Every lesion is named
once, by its plain name, after its box. A negative answer contains no class name and no box.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from umed_plugin.data.records import Record, true_boxes
from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import Box, format_box
from umed_plugin.grounding.geometry import ImageGeometry

WRITER = "templates-1"  # name and version; records are built anew when it changes

# No template contains "lesion", "mass" or "tumor": in some sources these are class names or synonyms.
QUESTIONS = (
    "Is there anything abnormal in this image? Mark it and say what it is.",
    "Please examine this scan, locate every abnormal area and name it.",
    "What abnormality can be seen here, and where does it lie?",
    "Describe the abnormal findings with their location and diagnosis.",
    "Look for abnormal regions. Give each one's box, then your diagnosis.",
    "Which findings do you see? Locate them first, then identify them.",
    "Read this study: detect, localise and recognise what is not normal.",
    "Does this image look normal? If not, show where and tell what it is.",
)


@dataclass(frozen=True)
class Phrasing:
    """Templates of one way to write an answer.

    Attributes:
        single, several: detection, for one lesion and for more (``{count}`` in words).
        only, each: localisation and recognition, of a single lesion and of each of several (``{ordinal}``). ``{box}`` comes
            before ``{name}``; ``{region}`` is "upper left", "centre", ...
    """

    single: str
    several: str
    only: str
    each: str


PHRASINGS = (
    Phrasing(
        "Yes, one abnormal area is visible.",
        "Yes, {count} abnormal areas are visible.",
        "It lies in the {region} of the image at {box} and is consistent with {name}.",
        "The {ordinal} lies in the {region} at {box} and is consistent with {name}.",
    ),
    Phrasing(
        "The image is not normal: there is a single finding.",
        "The image is not normal: there are {count} findings.",
        "The finding is located at {box}, in the {region}. Its appearance suggests {name}.",
        "The {ordinal} is located at {box}, in the {region}. Its appearance suggests {name}.",
    ),
    Phrasing(
        "There is one region that looks abnormal.",
        "There are {count} regions that look abnormal.",
        "It can be marked in the {region} with the box {box}. The diagnosis is {name}.",
        "The {ordinal} can be marked in the {region} with the box {box}; the diagnosis is {name}.",
    ),
    Phrasing(
        "An abnormality is present.",
        "In total {count} abnormalities are present.",
        "It occupies {box} in the {region} of this image, and I identify it as {name}.",
        "The {ordinal} occupies {box} in the {region}, and I identify it as {name}.",
    ),
    Phrasing(
        "I detect one area of concern.",
        "I detect {count} areas of concern.",
        "Its position is the {region}, within {box}. Most likely this is {name}.",
        "The position of the {ordinal} is the {region}, within {box}; most likely this is {name}.",
    ),
)

NEGATIVES = (
    "No, nothing abnormal is visible in this image.",
    "The image looks normal: there is no finding to mark.",
    "I see no area of concern, so there is nothing to locate or name.",
    "There is no sign of an abnormality. The study appears normal.",
    "No abnormal region is present here.",
)

_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ORDINALS = ("zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def write_conversation(
    record: Record, geometry: ImageGeometry, rng: random.Random, decimals: int = 2
) -> list[dict[str, str]]:
    """Write one question and its answer for a record, from its ``objects`` and ``terms``.

    Args:
        record: its ``objects`` (in pixels of the image file, in the order of the answer) and ``terms`` (names) are used. So are
            ``asked``, a question of its own (`umed_plugin.data.looks`), and ``similar``, what is said before the question
            (`umed_plugin.data.similar`).
        geometry: of the record's image. Boxes are written in 0-1 of its square.
        rng: selects the templates. Seed it per record, so that a build can be repeated.
        decimals: of the coordinates.

    Returns:
        LLaVA's ``conversations``: a human turn that starts with ``<image>``, and a gpt turn.

    Raises:
        UmedError: every template contains a name or synonym of the record's classes.
    """
    terms = [term for names in record["terms"].values() for term in names]
    # Drawn in any case: the answer's wording does not depend on what is asked.
    question = rng.choice(_without(QUESTIONS, terms, record))
    question = record.get("similar", "") + record.get("asked", question)
    if record["objects"]["ref"]:
        names = [record["terms"][ref][0] for ref in record["objects"]["ref"]]
        answer = _grounded_answer(names, geometry.to_square(true_boxes(record)), rng, terms, decimals, record)
    else:
        answer = rng.choice(_without(NEGATIVES, terms, record))
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


def _grounded_answer(
    names: Sequence[str],
    boxes01: Sequence[Box],
    rng: random.Random,
    terms: Sequence[str],
    decimals: int,
    record: Record,
) -> str:
    usable = _without([" ".join(vars(phrasing).values()) for phrasing in PHRASINGS], terms, record)
    phrasing = rng.choice([candidate for candidate in PHRASINGS if " ".join(vars(candidate).values()) in usable])
    if len(names) == 1:
        box = boxes01[0]
        finding = phrasing.only.format(box=format_box(box, decimals), region=region_of(box), name=names[0])
        return f"{phrasing.single} {finding}"
    sentences = [phrasing.several.format(count=_word(_COUNTS, len(names)))]
    for number, (name, box) in enumerate(zip(names, boxes01), start=1):
        sentences.append(
            phrasing.each.format(
                ordinal=_word(_ORDINALS, number), box=format_box(box, decimals), region=region_of(box), name=name
            )
        )
    return " ".join(sentences)


def _word(words: Sequence[str], number: int) -> str:
    if number < len(words):
        return words[number]
    if words is _COUNTS:
        return str(number)
    ending = "th" if 11 <= number % 100 <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def region_of(box01: Sequence[float]) -> str:
    """Where the centre of the box lies, in thirds of the square: "upper left" ... "centre" ... "lower right"."""
    across = ("left", "", "right")[min(int((box01[0] + box01[2]) / 2 * 3), 2)]
    down = ("upper", "", "lower")[min(int((box01[1] + box01[3]) / 2 * 3), 2)]
    if down and across:
        return f"{down} {across}"
    return f"{down} centre" if down else f"{across} centre" if across else "centre"


def _without(templates: Iterable[str], terms: Sequence[str], record: Record) -> list[str]:
    """The templates that contain none of the terms: scoring would count such a term as a class that the answer names."""
    # The same pattern as `terms.find_terms` uses for a name.
    named = re.compile("|".join(rf"(?<!\w){re.escape(term)}(?:s|es)?(?!\w)" for term in terms) or "(?!)", re.IGNORECASE)
    free = [template for template in templates if not named.search(template)]
    if not free:
        raise UmedError(
            f"record {record.get('id')!r}: every template of the writer contains one of the source's names or synonyms "
            f"({', '.join(sorted(set(terms)))}). Remove the most general of them from the recipe's classes."
        )
    return free
