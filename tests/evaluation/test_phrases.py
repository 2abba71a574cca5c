"""Phrases: figures by hand in both arithmetics, and a recipe's evaluation of phrases from question to file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from umed_plugin import evaluate
from umed_plugin.commands.report.gallery import study_cards
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.recipe_cases import headline
from umed_plugin.evaluation.metrics.phrases import (
    dice_matrix,
    integer_dice_matrix,
    integer_iou_matrix,
    phrase_values,
    whole_numbers,
)
from umed_plugin.evaluation.results import Evaluation
from umed_plugin.grounding.boxes import iou_matrix
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.phrases import phrase_spans
from umed_plugin.grounding.scoring import Scorer, score_answer
from umed_plugin.model.answerer import ModelAnswer

pytestmark = pytest.mark.one_stack
# Two boxes, then IoU and Dice of areas, then those of whole pixels, worked out on paper.
PAIRS = [
    ((10, 10, 20, 20), (20, 10, 30, 20), (0, 1), (0, 1), (11, 231), (22, 242)),  # they touch
    ((10, 10, 20, 20), (10, 10, 20, 20), (1, 1), (1, 1), (1, 1), (1, 1)),
    ((0, 0, 10, 10), (5, 0, 15, 10), (50, 150), (100, 200), (66, 176), (132, 242)),
    ((0, 0, 4, 9), (0, 0, 9, 9), (36, 81), (72, 117), (50, 100), (100, 150)),
    ((0, 0, 10, 10), (40, 40, 60, 60), (0, 1), (0, 1), (0, 1), (0, 1)),
]


@pytest.mark.parametrize(("said", "true", "iou", "dice", "integer_iou", "integer_dice"), PAIRS)
def test_iou_and_dice_by_hand_in_both_arithmetics(said, true, iou, dice, integer_iou, integer_dice):
    for measure, (part, whole) in (
        (iou_matrix, iou),
        (dice_matrix, dice),
        (integer_iou_matrix, integer_iou),
        (integer_dice_matrix, integer_dice),
    ):
        assert measure([said], [true])[0, 0] == pytest.approx(part / whole, abs=1e-12), measure.__name__


def test_whole_numbers_are_percent_of_the_squeezed_image_cut_off():
    assert whole_numbers([(0, 0, 199.9, 100)], (200, 100)) == [(0, 0, 99, 100)]
    assert whole_numbers([(-20, 29, 300, 57)], (200, 100)) == [(0, 29, 100, 57)]


def record_of(phrase: str, box: list, number: int = 0) -> dict:
    return {
        "id": f"drawn/{number}: {phrase}",
        "image": f"{number}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\nWhere is this: {phrase}?"},
            {"from": "gpt", "value": "[0.00, 0.25, 0.50, 0.75]"},
        ],
        "objects": {"ref": ["cyst"], "bbox": [box], "bbox_type": "real"},
        "phrase": phrase,
        "image_size": [200, 100],
        "terms": {"cyst": ["cyst"]},
        "source": "drawn",
        "modality": "CT",
        "patient": f"p{number}",
        "split": "test",
        "answer_type": "phrase",
        "provenance": {"image_aspect_ratio": "pad"},
    }


def test_a_phrase_is_scored_by_its_boxes_alone():
    """In a padded square of 200 pixels, the true box [0, 0, 100, 100] is [0, 0.25, 0.5, 0.75]."""
    record = record_of("large cyst", [0, 0, 100, 100])

    def values(text):
        return phrase_values(score_answer(text, record, ImageGeometry(200, 100)), [[0, 0, 100, 100]], (200, 100))

    half = values("[0.25, 0.25, 0.50, 0.75]")
    assert (half["mean_iou"], half["mean_dice"], half["without_box"]) == pytest.approx((0.5, 2 / 3, 0))
    assert (half["acc_at_10"], half["acc_at_50"], half["acc_at_70"]) == (1, 1, 0)
    # 26 x 101 of 51 x 101 pixels.
    assert half["integer_iou"] == pytest.approx(26 / 51) and half["integer_dice"] == pytest.approx(52 / 77)
    assert (half["integer_acc_at_50"], half["integer_acc_at_70"]) == (1, 0)
    for text in ("I cannot see it.", "[0.25, 0.25, 0.50"):
        none = values(text)
        assert none.pop("without_box") == 1 and set(none.values()) == {0.0}, text
    two = values("[0.00, 0.25, 0.50, 0.75], [0.60, 0.60, 0.70, 0.70]")
    assert (two["mean_iou"], two["integer_iou"]) == (0.5, 0.5), "a box too many halves both"


class Answers:
    """In place of a checkpoint: the first half of the image for every phrase but one, about which it talks."""

    template = "none"

    def fingerprint(self):
        return {}

    def scorer(self, dialect=None):
        return Scorer()

    def answer(self, questions, examine=None):
        heat = {"grid": [1, 1], "values": "/w==", "peak": 1.0, "covers": 1.0, "of_true_name": True}
        return [
            ModelAnswer("Not there.", [])
            if "shadow" in question.text
            else ModelAnswer("The cyst: [0.00, 0.25, 0.50, 0.75]", [], {"vision_relevance": 0.25, "heat": heat})
            for question in questions
        ]


def test_with_boxes_given_phrases_have_no_diagnosis(tmp_path, capsys):
    """To give the box of a phrase gives away the answer, and a phrase asks for no class."""
    records = [record_of("large cyst", [0, 0, 100, 100], number) for number in range(3)]
    records[0] |= {"answer_type": "grounded"}
    for number in range(3):
        Image.fromarray(np.full((100, 200), 50 * number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "r.json").write_text(json.dumps(records))
    evaluation = evaluate(Answers(), tmp_path / "r.json", give_box=True)
    assert [prediction.id for prediction in evaluation.predictions] == [records[0]["id"]]
    assert evaluation.metrics["accuracy"]["n"] == 1
    assert "2 of 3 questions are phrases, which ask for boxes and for no diagnosis" in capsys.readouterr().out
    (tmp_path / "r.json").write_text(json.dumps(records[1:]))
    with pytest.raises(UmedError, match=r"no box to give\. 2 of 2 questions are phrases"):
        evaluate(Answers(), tmp_path / "r.json", give_box=True)


def test_the_evaluation_of_a_recipe_has_the_figures_of_its_phrases(tmp_path):
    records = []
    for number, phrase in enumerate(["large cyst", "small nodule", "shadow"]):
        Image.fromarray(np.full((100, 200), 50 * number, np.uint8)).save(tmp_path / f"{number}.png")
        records.append(record_of(phrase, [0, 0, 100, 100] if number != 1 else [0, 0, 50, 100], number))
    (tmp_path / "r.json").write_text(json.dumps(records))
    evaluation = evaluate(Answers(), tmp_path / "r.json", out=tmp_path / "out")
    values = {name: entry["value"] for name, entry in evaluation.metrics.items()}
    assert values["mean_iou"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert values["mean_dice"] == pytest.approx((1 + 2 / 3) / 3)
    assert values["integer_iou"] == pytest.approx((1 + 26 / 51) / 3)
    assert [round(3 * values[f"acc_at_{n}"]) for n in (10, 30, 50, 70)] == [2, 2, 2, 1]
    assert values["without_box"] == pytest.approx(1 / 3) and evaluation.metrics["without_box"]["lower_is_better"]
    assert evaluation.metrics["without_box"]["n"] == 3
    # Only the answer that repeats its phrase's words says where it looks.
    assert values["vision_relevance"] == 0.25 and evaluation.metrics["vision_relevance"]["n"] == 1
    assert values["accuracy"] is None and "false_box_rate" not in values and "findings_f1" not in values
    assert headline(evaluation)["accuracy"] is None
    # The files are read again, and the page's cards are made of them.
    again = Evaluation.load(tmp_path / "out")
    assert again.metrics == evaluation.metrics
    cards = study_cards({"base": again}, 2, tmp_path)
    assert [card["answers"][0]["accuracy"] for card in cards] == [None] * 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[0.10, 0.20, 0.30, 0.40]", []),
        ("Left: the LEFT lung.", ["Left", "LEFT"]),
        ("leftover in the lung", []),
    ],
)
def test_words_of_a_phrase_are_whole_words_without_the_small_ones(text, words):
    assert [text[start:end] for start, end in phrase_spans(text, "opacity in the left upper lobe")] == words
