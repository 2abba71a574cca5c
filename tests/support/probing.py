"""Studies for probes: records without pixels, of four classes and negatives, and answerers that follow a rule."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

NAMES = ("nodule", "cyst", "calcification", "effusion")
TERMS = {name: [name] for name in NAMES}


def studies(count=60, seed=0, *, source="drawn", names=NAMES, negatives=0.2, split="test", patients=True, weights=None):
    """Records of one or two lesions, or none; the first name is the most frequent with ``weights``."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        shown = [] if rng.random() < negatives else rng.choices(names, weights)
        if shown and len(names) > 1 and rng.random() < 0.1:
            shown.append(next(name for name in names if name != shown[0]))
        corners = [(rng.choice([5, 60]), rng.randrange(5, 70)) for _ in shown]
        made.append(
            {
                "id": f"{source}/{split}{number}",
                "image": f"{source}-{split}{number}.png",
                "image_size": [100, 100],
                "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}],
                "objects": {"ref": shown, "bbox": [[x, y, x + 20, y + 20] for x, y in corners], "bbox_type": "real"},
                "terms": {name: [name] for name in names},
                "source": source,
                "modality": "CT",
                "patient": f"p{number}" if patients else "",
                "split": split,
                "answer_type": "grounded" if shown else "negative",
                "provenance": {"image_aspect_ratio": "pad", "box_decimals": 2},
            }
        )
    return made


def with_images(folder: Path, records):
    """The same records; their images, of one grey level, now exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        Image.new("L", (8, 8)).save(folder / record["image"])
    return records


class Follows:
    """Answers by a rule, in place of a checkpoint: ``rule(question text, image path) -> answer``."""

    template = "none"

    def __init__(self, rule):
        self.rule = rule

    def fingerprint(self):
        return {}

    def scorer(self, dialect=None):
        return Scorer()

    def answer(self, questions, examine=None):
        return [ModelAnswer(self.rule(question.text, question.image), []) for question in questions]


def choices_of(text):
    """The options of a probe's text."""
    listed = text.split("Choices: ")[1].removesuffix(" Answer with the text of one choice.")
    parts = [part.split(": ", 1)[1] for part in listed.rstrip(".").split(". ")]
    assert len(parts) > 1
    return parts
