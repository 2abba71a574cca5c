"""The default relevance: a bag of names and words. Broken forms earn nothing, and clean text earns what it did before."""

from __future__ import annotations

import random

import pytest

from umed_plugin.data.template_writer import write_conversation
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.grounding.wording import language_beside
from umed_plugin.rewards import REWARDS
from umed_plugin.rewards.judges.lexical import CLASS_WEIGHT, _word_f1

SQUARE = ImageGeometry(100, 100)
TERMS = {"tumor": ["brain tumor", "tumor", "tumour"], "cyst": ["cyst", "cystic change"]}
GARBLED = "r with areain t there0. The at [0. tumor. b isain tumor.c2 occupies:m], in the right centre."


def study(seed: int) -> dict:
    """A record of our writer with 0 to 3 lesions."""
    draw = random.Random(seed)
    boxes = [[33 * i, draw.uniform(0, 60), 33 * i + 20, 90] for i in range(seed % 4)]
    record = {"id": seed, "terms": TERMS, "objects": {"ref": ["tumor", "cyst", "tumor"][: seed % 4], "bbox": boxes}}
    return record | {"conversations": write_conversation(record, SQUARE, draw)}


STUDIES = [study(seed) for seed in range(60)]


def scored(text: str, record: dict) -> float:
    (value,) = REWARDS.get("relevance")(["Where?"], [text], record=[record], geometry=[SQUARE])
    return value


def bag(text: str, record: dict) -> float:
    """The score without the language: names and words."""
    class_f1 = score_answer(text, record, SQUARE).class_f1
    return CLASS_WEIGHT * class_f1 + (1 - CLASS_WEIGHT) * _word_f1(text, record["conversations"][1]["value"])


def test_a_garbled_answer_is_below_the_clean_one_that_says_less():
    two = next(record for record in STUDIES if record["objects"]["ref"] == ["tumor", "cyst"])
    assert bag(GARBLED, two) > 0.4, "its words alone would be worth something"
    assert scored(GARBLED, two) == 0 < scored("brain tumor", two)


def test_clean_answers_keep_their_scores_to_the_bit():
    """Right or wrong, long or short: every reference as an answer to every study, and answers by hand."""
    by_hand = [
        "brain tumor",
        "A cyst.",
        "No tumor.",
        "Nothing abnormal.",
        "No.",
        "A 3-cm cyst (grade II), e.g. at C5-C6.",
    ]
    answers = [*by_hand, *(record["conversations"][1]["value"] for record in STUDIES[:20])]
    assert all(scored(text, record) == bag(text, record) for text in answers for record in STUDIES)
    assert {scored(record["conversations"][1]["value"], record) for record in STUDIES} == {1.0}


def test_words_in_another_order_and_invented_ones_are_no_faults_of_form():
    """docs/rewards.md says so. `format` finds them by the references of the run."""
    reference = "One abnormal area is visible. It lies at [0.10, 0.20, 0.30, 0.40]. It is a cyst."
    record = {**STUDIES[2], "conversations": [{"value": "Where?"}, {"value": reference}]}
    record["objects"] = {"ref": ["cyst"], "bbox": [[10, 20, 30, 40]]}
    assert scored("cyst a is it lies at it is visible area abnormal one", record) == 1
    invented = "zorp wombat cyst plim gorf"
    assert scored(invented, record) == bag(invented, record) > 0.5


def test_the_score_falls_with_the_share_of_faulty_words():
    record = STUDIES[1]
    clean = record["conversations"][1]["value"]
    scores = [scored(clean + " b0q" * number, record) for number in range(9)]
    assert scores == sorted(scores, reverse=True) and scores[0] == 1 and scores[1] < 1 and scores[-1] == 0


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("the heart is large. no effusion. there is a cyst.", "no effusion is seen. there is a cyst."),
        ("左肺有 cyst。", "肺部有 cyst。"),
        ("xxxx pT2N0 b0q.", "xxxx pT2N0 b0q."),
    ],
)
def test_an_answer_may_break_rules_that_its_reference_breaks(reference: str, answer: str):
    record = {**STUDIES[1], "conversations": [{"value": "Where?"}, {"value": reference}]}
    assert language_beside(answer, reference) == 1
    assert scored(answer, record) == bag(answer, record) > 0
