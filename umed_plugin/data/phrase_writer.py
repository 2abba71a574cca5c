"""Offline writer of questions about one phrase, and of answers that are its boxes.

The question quotes the sentence of the annotations, in the manner of referring expressions (PFMVG, arXiv 2410.23822). The answer
holds the boxes and no class name, so that only the sentence tells where to look.
"""

from __future__ import annotations

import random

from umed_plugin.data.records import Record, true_boxes
from umed_plugin.grounding.boxes import format_box
from umed_plugin.grounding.geometry import ImageGeometry

WRITER = "phrases-1"

QUESTIONS = (
    "Where is this: {phrase}?",
    "Where in this image is this seen: {phrase}?",
    "Locate the following finding: {phrase}.",
    "Mark the region that this sentence describes: {phrase}.",
    "A report says: {phrase}. Which part of the image does it mean?",
    "Give the box of this finding: {phrase}.",
)


def write_phrase_conversation(
    record: Record, geometry: ImageGeometry, rng: random.Random, decimals: int = 2
) -> list[dict[str, str]]:
    r"""Write one question and its answer for a record of a phrase.

    Args:
        record: its ``phrase`` and ``objects`` (in pixels of the image file, in the order of the answer) are used.
        geometry: of the record's image. Boxes are written in 0-1 of its square.
        rng: selects the question. Seed it per record, so that a build can be repeated.
        decimals: of the coordinates.

    Returns:
        LLaVA's ``conversations``: a human turn that starts with ``<image>``, and a gpt turn of boxes.

    Example:
        >>> record = {"phrase": "Small left effusion.", "objects": {"ref": ["effusion"], "bbox": [[50, 25, 100, 75]]}}
        >>> turns = write_phrase_conversation(record, ImageGeometry(200, 100), random.Random(0))
        >>> turns[0]["value"], turns[1]["value"]
        ('<image>\nLocate the following finding: Small left effusion.', '[0.25, 0.38, 0.50, 0.62]')
    """
    question = rng.choice(QUESTIONS).format(phrase=record["phrase"].rstrip(" .?"))
    answer = ", ".join(format_box(box, decimals) for box in geometry.to_square(true_boxes(record)))
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
