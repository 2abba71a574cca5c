"""Offline writer of questions and diagnoses from templates.

In the paper GPT-4V writes the diagnoses; this writer needs no network. It keeps the paper's order of detection, localisation,
recognition: an answer states how many abnormal areas there are, then where each lies, then what each is. Every lesion is named
once, by its plain name, after its box. A negative answer contains no class name and no box.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from umed_plugin.data.records import Record, true_boxes
from umed_plugin.data.templates import NEGATIVES, PHRASINGS, QUESTIONS, whole_text, without_names
from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import Box, format_box
from umed_plugin.grounding.geometry import ImageGeometry

WRITER = "templates-1"  # name and version; records are built anew when it changes

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
    usable = _without([whole_text(phrasing) for phrasing in PHRASINGS], terms, record)
    phrasing = rng.choice([candidate for candidate in PHRASINGS if whole_text(candidate) in usable])
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
    """The templates that contain none of the terms."""
    free = without_names(templates, terms)
    if not free:
        raise UmedError(
            f"record {record.get('id')!r}: every template of the writer contains one of the source's names or synonyms "
            f"({', '.join(sorted(set(terms)))}). Remove the most general of them from the recipe's classes."
        )
    return free
