"""Phrases: annotations that say where one sentence is seen, such as MS-CXR's. Each image has one item for each of its phrases.

A recipe names the field of the sentence as ``phrase`` (readers coco, csv and json). Several annotations of one image with one
sentence are several boxes of one phrase. The same sentence on two images is two items: nothing is joined over images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from umed_plugin.data.annotations.base import Annotated, by_reader
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.faults import Faults

NO_PHRASE = "no phrase is about it; annotations.phrase"
_SHOWN = 60  # characters of a phrase in a message


def checked_phrase(value: object, where: str, field: object, faults: Faults) -> str:
    """The phrase of an annotation on one line; empty after a fault."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text:
        found = "is empty" if value == "" else f"is {value!r}"
        faults.add(where, f"{field!r} {found} (annotations.phrase); needed: the sentence that the box is of")
    return text


def by_phrase(item: Annotated, phrases: Sequence[str], readers: Sequence[str]) -> list[Annotated]:
    """One item for each phrase of an image, and for each reader of its boxes.

    Args:
        phrases: of each box; empty texts where the recipe names no field of phrases.
        readers: who marked each box; empty texts if nobody is named.
    """
    parts: list[Annotated] = []
    for number, phrase in enumerate(dict.fromkeys(phrases)):
        mine = [index for index, text in enumerate(phrases) if text == phrase]
        part = replace(
            item,
            boxes=[item.boxes[index] for index in mine],
            classes=[item.classes[index] for index in mine],
            phrase=phrase,
            dropped_boxes=item.dropped_boxes if number == 0 else 0,
        )
        parts += by_reader(part, [readers[index] for index in mine])
    return parts or [item]


def leave_out_without_phrase(items: Sequence[Annotated], recipe: Recipe, faults: Faults) -> None:
    """Leave out the images of which no phrase is known, and say how many phrases are of several images."""
    if recipe.phrase is None:
        return
    images: dict[str, set[str]] = {}
    for item in items:
        if item.phrase:
            images.setdefault(item.phrase, set()).add(str(item.image))
        elif not item.dropped_boxes:
            item.left_out = item.left_out or NO_PHRASE
    shared = [phrase for phrase, of in images.items() if len(of) > 1]
    if shared:
        shown = shared[0][:_SHOWN]
        faults.remark(
            "phrases",
            f"{len(shared)} of {len(images)} phrases are said of several images, such as {shown!r} of "
            f"{len(images[shared[0]])}. Each image has a record of its own, with its own boxes",
        )
