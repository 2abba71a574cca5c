"""The reward `consistency`: what our writer writes agrees with itself, and every single corruption is found."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from umed_plugin.data import template_writer
from umed_plugin.data.augmentation.study import augmented_study
from umed_plugin.data.recipes.recipe import load_recipe, shipped_recipes
from umed_plugin.data.templates import NEGATIVES, PHRASINGS
from umed_plugin.errors import UmedError
from umed_plugin.files import text_bytes
from umed_plugin.grounding.consistency import checks
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.rewards import REWARDS, combine_rewards, localization
from umed_plugin.rewards.judges.lexical import class_relevance

SQUARE = ImageGeometry(100, 100)
TERMS = {"nodule": ["nodule", "nodular opacity"], "cyst": ["cyst"]}
OPPOSITE = {"upper": "lower", "lower": "upper", "left": "right", "right": "left"}


def scored(text: str, record: dict, geometry: ImageGeometry = SQUARE) -> float | None:
    (value,) = REWARDS.get("consistency")(["Where?"], [text], record=[record], geometry=[geometry])
    return value


def lesions(count: int, geometry: ImageGeometry, draw: random.Random) -> list[list[float]]:
    """Boxes that lie apart, side by side."""
    width = geometry.width / max(count, 1)
    found = []
    for i in range(count):
        x, y = draw.uniform(width * i, width * (i + 0.3)), draw.uniform(0, 0.6 * geometry.height)
        found.append([x, y, x + draw.uniform(0.3, 0.6) * width, y + draw.uniform(0.2, 0.4) * geometry.height])
    return found


def written(terms: dict, seed: int) -> Iterator[tuple[dict, ImageGeometry, str]]:
    """Records with 0 to 12 lesions of the classes, and the answers of our writer in each of its phrasings."""
    draw = random.Random(seed)
    for count in (0, 1, 2, 3, 12):
        geometry = ImageGeometry(*draw.choice([(100, 100), (200, 100), (100, 160)]))
        refs = [draw.choice(list(terms)) for _ in range(count)]
        record = {"id": seed, "terms": terms, "objects": {"ref": refs, "bbox": lesions(count, geometry, draw)}}
        names = [name for words in terms.values() for name in words]
        if not count:
            yield from ((record, geometry, text) for text in template_writer._without(NEGATIVES, names, record))
        for phrasing in PHRASINGS if count else ():
            text = answer(record, geometry, phrasing, draw)
            if text is not None:
                yield record, geometry, text


def answer(record: dict, geometry: ImageGeometry, phrasing, draw: random.Random) -> str | None:
    """What our writer writes for a record in one phrasing; None if the phrasing has a name of the recipe."""
    before, template_writer.PHRASINGS = template_writer.PHRASINGS, (phrasing,)
    try:
        return template_writer.write_conversation(record, geometry, draw)[1]["value"]
    except UmedError:
        return None
    finally:
        template_writer.PHRASINGS = before


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_what_our_writer_writes_for_a_shipped_recipe_agrees_with_itself(name):
    answers = [part for seed in range(4) for part in written(load_recipe(name).names, seed)]
    assert len(answers) >= 40
    for record, geometry, text in answers:
        assert scored(text, record, geometry) == 1, (text, checks(text, record["terms"], geometry))


def test_every_single_corruption_is_found():
    counts = dict.fromkeys(("box", "side", "negated"), 0)
    for seed in range(6):
        for record, geometry, text in written(TERMS, seed):
            for kind, corrupted in corruptions(text, record):
                counts[kind] += 1
                assert scored(corrupted, record, geometry) < 1, (kind, corrupted)
    assert all(count > 100 for count in counts.values()), counts


def corruptions(text: str, record: dict) -> Iterator[tuple[str, str]]:
    for box in re.finditer(r"(?: at| within| with the box| occupies)? \[[\d., ]+\]", text):
        yield "box", text[: box.start()] + text[box.end() :]
    for side in re.finditer(r"\b(upper|lower|left|right)\b", text):
        yield "side", text[: side.start()] + OPPOSITE[side[0]] + text[side.end() :]
    for ref in set(record["objects"]["ref"]):
        for negated in (f"There is no {TERMS[ref][0]}.", f"A {TERMS[ref][-1]} is absent.", f"{TERMS[ref][0]}: no."):
            yield "negated", f"{text} {negated}"


POSITIVE = {"terms": TERMS, "objects": {"ref": ["nodule"], "bbox": [[10, 10, 30, 30]]}}
NEGATIVE = {"terms": TERMS, "objects": {"ref": [], "bbox": []}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("One nodule at [0.10, 0.10, 0.30, 0.30].", 1.0),
        ("Two nodules at [0.10, 0.10, 0.30, 0.30] and [0.60, 0.10, 0.80, 0.30].", 1.0),
        ("A nodule at [0.10, 0.10, 0.30, 0.30]. The nodule is small; no other nodule is seen.", 1.0),
        ("Two nodules at [0.10, 0.10, 0.30, 0.30].", 3 / 4),  # number; named, ruled_out, inside hold
        ("A nodule and a cyst at [0.10, 0.10, 0.30, 0.30].", 2 / 3),  # named
        ("A nodule.", 1 / 2),  # named
        ("A nodule at [0.10, 0.10, 0.30, 0.30] in the lower right.", 3 / 4),  # side
        ("A nodule in the left upper lobe at [0.60, 0.10, 0.80, 0.30].", 1.0),  # a side of the patient
        ("A nodule at [0.10, 0.10, 0.30, 0.30]. The image is normal.", 3 / 4),  # normal
        ("A nodule at [0.10, 0.10, 0.30, 0.30]. There is no nodule.", 2 / 3),  # ruled_out
        ("Nodules at [0.10, 0.10, 0.30, 0.30], nodule at [0.10, 0.10, 0.30, 0.30].", 3 / 4),  # same_box
        ("A nodule and a cyst at [0.10, 0.10, 0.30, 0.30] and [0.10, 0.10, 0.30, 0.30].", 1.0),  # one place, two names
        ("A nodule at [0.10, 0.10, 1.30, 0.30].", 2 / 3),  # inside
        ("A nodule at [0.10, 0.10, 0.30", 2 / 3),  # a box that cannot be read is one without area
        ("The weather is fine.", None),
        ("", None),
    ],
)
def test_answers_by_hand(text, value):
    assert scored(text, POSITIVE) == (value if value is None else pytest.approx(value))


def test_a_box_in_the_padding_is_outside_of_the_image():
    wide = ImageGeometry(200, 100)
    assert scored("A nodule at [0.10, 0.25, 0.30, 0.50].", POSITIVE, wide) == 1
    assert scored("A nodule at [0.10, 0.05, 0.30, 0.50].", POSITIVE, wide) == pytest.approx(2 / 3)


def test_a_reference_agrees_with_itself_where_augmentation_has_moved_the_image():
    """The image moves in the square along with its boxes."""
    draw = random.Random(0)
    for size in ((512, 512), (640, 480), (300, 600)):
        geometry, moved, lowest = ImageGeometry(*size), 0, 1.0
        for number in range(20):
            # Near the edges and corners of the image.
            x, y = (draw.choice([0.0, draw.uniform(0, 0.8), 0.8]) * side for side in size)
            box = [x, y, x + 0.2 * size[0], y + 0.2 * size[1]]
            record = {
                "id": f"r{number}",
                "image": "a.png",
                "image_size": list(size),
                "split": "train",
                "terms": TERMS,
                "objects": {"ref": ["cyst"], "bbox": [box]},
                "answer_type": "grounded",
                "provenance": {"image_aspect_ratio": "pad", "seed": 0, "box_decimals": 2},
            }
            wording = random.Random(text_bytes(f"0:r{number}"))
            record["conversations"] = template_writer.write_conversation(record, geometry, wording)
            for epoch in range(10):
                study = augmented_study(record, 0, epoch)
                shown = {**study.record, "augmented": study.as_json()}
                lowest = min(lowest, scored(shown["conversations"][1]["value"], shown, geometry))
                moved += study.move.resamples
        assert lowest == 1 and moved > 50, size


def test_a_box_in_the_padding_of_a_moved_image_is_outside_of_it():
    wide, zoomed_out = ImageGeometry(200, 100), {**POSITIVE, "augmented": {"zoom": 0.5, "shift": [0.0, -0.25]}}
    assert scored("A nodule at [0.30, 0.15, 0.70, 0.35].", zoomed_out, wide) == 1
    assert scored("A nodule at [0.30, 0.30, 0.70, 0.50].", zoomed_out, wide) == pytest.approx(2 / 3)
    assert scored("A nodule at [0.10, 0.15, 0.70, 0.35].", zoomed_out, wide) == pytest.approx(2 / 3)


def test_to_call_every_image_normal_earns_no_more_than_the_negatives():
    """With the README's weights. On a study with a lesion the term is left out for such an answer."""
    for text in (NEGATIVES[0], "0 findings.", "There are 0 abnormal findings in this image."):
        assert scored(text, NEGATIVE) == 1 and scored(text, POSITIVE) is None, text
    studies = [POSITIVE] * 3 + [NEGATIVE]
    columns = {"record": [study for study in studies for _ in range(2)], "geometry": [SQUARE] * 8}
    texts = [NEGATIVES[0]] * 8
    values = {
        "relevance": class_relevance([""] * 8, texts, **columns),
        "localization": localization([""] * 8, texts, **columns),
        "vision_relevance": [0.0] * 6 + [None] * 2,
        "consistency": REWARDS.get("consistency")([""] * 8, texts, **columns),
    }
    weights = {"relevance": 4.0, "localization": 2.0, "vision_relevance": 1.0, "consistency": 1.0}
    total = combine_rewards(values, 2, weights=weights).mean() / sum(weights.values())
    assert total <= 1 / 4
