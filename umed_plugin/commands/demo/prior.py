"""What the demo's checkpoint knows before the plugin is used: it names abnormalities, but gives no boxes.

With random weights, a before/after comparison would be meaningless. So the small model is first trained on captions (detection
and recognition, never a box) with LLaVA's stock training script, without any ``--umed_*`` flag. It then stands for LLaVA-Med,
which has seen many captions and no boxes.

How to run: ``write_captions(annotations.csv, out)``, then train on it; `umed_plugin.commands.demo.pipeline` does both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from umed_plugin.checkpoints.prompt_templates import SYSTEM
from umed_plugin.commands.demo.studies import LESIONS
from umed_plugin.data.records import Record, record_geometry
from umed_plugin.data.template_writer import write_conversation
from umed_plugin.data.templates import NEGATIVES, PHRASINGS, QUESTIONS
from umed_plugin.grounding.geometry import ImageGeometry

CAPTION_QUESTIONS = (
    "What is shown in this image?",
    "Describe the image.",
    "Which abnormality does this study show?",
    "What is the diagnosis?",
)


def caption(record: Record, geometry: ImageGeometry, rng: random.Random) -> list[dict[str, str]]:
    """LLaVA's ``conversations`` for one record: a question, and an answer that names every lesion without a box."""
    names = [record["terms"][ref][0] for ref in record["objects"]["ref"]]
    if names:
        boxes = geometry.to_square(record["objects"]["bbox"])
        phrases = [f"{name} in the {region_words(box)}" for name, box in zip(names, boxes)]
        answer = f"The image shows {' and '.join(phrases)}."
    else:
        answer = "The image looks normal."
    question = rng.choice(CAPTION_QUESTIONS + QUESTIONS)
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


def region_words(box01: Sequence[float]) -> str:
    """Where a box is, in words: thirds of the square. ``box01`` is (x1, y1, x2, y2), 0-1 of the square."""
    across = ("left", "centre", "right")[min(int((box01[0] + box01[2]) / 2 * 3), 2)]
    down = ("upper", "middle", "lower")[min(int((box01[1] + box01[3]) / 2 * 3), 2)]
    return f"{down} {across}"


def caption_records(records: Sequence[Record], seed: int = 0) -> list[Record]:
    """The records with captions instead of grounded diagnoses, as plain LLaVA data without boxes and provenance."""
    rng = random.Random(seed)
    return [
        {"id": record["id"], "image": record["image"], "conversations": caption(record, record_geometry(record), rng)}
        for record in records
    ]


def corpus(seed: int = 0, size: int = 400) -> list[str]:
    """Texts to train the tokenizer: questions, captions and diagnoses like the demo's, about random boxes."""
    rng = random.Random(seed)
    terms = {name: [name] for name in LESIONS}
    geometry = ImageGeometry(100, 100)
    # Text of every prompt is repeated, so that it needs few tokens.
    texts = [SYSTEM, "[INST] <<SYS>>", "<</SYS>>", "a [/INST]"] * (size // 4)
    texts += [*CAPTION_QUESTIONS, *QUESTIONS, *NEGATIVES] * 8
    texts += [text for phrasing in PHRASINGS for text in vars(phrasing).values()]
    for _ in range(size):
        refs = rng.sample(LESIONS, rng.choice((1, 1, 2)))
        boxes = []
        for _ in refs:
            x, y = rng.randint(0, 80), rng.randint(0, 80)
            boxes.append([x, y, x + rng.randint(5, 20), y + rng.randint(5, 20)])
        record = {"id": "corpus", "terms": terms, "objects": {"ref": refs, "bbox": boxes}}
        for turns in (write_conversation(record, geometry, rng), caption(record, geometry, rng)):
            texts += [turn["value"].replace("<image>\n", "") for turn in turns]
    return texts
