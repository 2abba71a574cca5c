"""Which classes an answer names, and how its boxes are scored, on hand-worked cases."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from support.regex_steps import CountingPattern

from umed_plugin.data.templates import NEGATIVES, PHRASINGS
from umed_plugin.grounding import terms
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.grounding.terms import find_terms, named_classes

TERMS = {"nodule": ["nodule", "small mass"], "mass": ["mass"], "cyst": ["cyst", "fluid-filled cavity"]}
GEOMETRY = ImageGeometry(200, 100, "pad", 336, 14)  # the square is 200 wide, 50 px of padding above


def record(refs, boxes):
    return {"objects": {"ref": refs, "bbox": boxes}, "terms": TERMS}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("It is a nodule.", {"nodule"}),
        ("Two Nodules and a cyst", {"nodule", "cyst"}),
        ("a small mass", {"nodule"}),  # the longer name wins over "mass"
        ("a  small\nmass", {"nodule"}),
        ("a fluid-filled cavity", {"cyst"}),
        *((f"a fluid{mark}filled cavity", {"cyst"}) for mark in ("\u2010", "\u2011", "\u2013", " ", "\n", " - ")),
        ("a small-mass", {"nodule"}),
        ("\uff4e\uff4f\uff44\uff55\uff4c\uff45", {"nodule"}),
        ("cystic nodular masses", {"mass"}),  # adjectives are not the name
        ("No nodule is seen, but a mass is present.", {"mass"}),
        ("There is no evidence of a cyst.", set()),
        ("The finding is a nodule rather than a cyst.", {"nodule"}),
        ("", set()),
    ],
)
def test_named_classes(text, named):
    assert named_classes(text, TERMS) == named


@pytest.mark.parametrize(
    ("text", "named"),
    [
        # A negator reaches through a list.
        ("No nodule, mass, or effusion is seen.", set()),
        ("No evidence of nodule, cyst or effusion.", set()),
        ("There is neither nodule nor cyst.", set()),
        ("Without nodules and cysts, but with a mass.", {"mass"}),
        ("I do not see a nodule, a cyst, or a mass.", set()),
        ("The lesion does not clearly show a cyst. It is a nodule.", {"nodule"}),
        ("No nodule; nor is a cyst seen.", set()),
        ("There is no evidence that this is a nodule.", set()),
        # What follows a name may rule it out, as in a table or a list.
        ("Nodule: no. Mass: yes.", {"mass"}),
        ("nodule: absent, mass: present", {"mass"}),
        ("A nodule? No, a cyst.", {"cyst"}),
        ("nodule \u2013 none\ncyst", {"cyst"}),
        ("Nodule not seen.", set()),
        ("Diagnosis: nodule. Location: not known.", {"nodule"}),
        ("Is there more? No cyst: a mass.", {"mass"}),
        # And ends at a verb, a new clause, or the end of the sentence.
        ("It isn't a nodule, it is a cyst.", {"cyst"}),
        ("It isn\u2019t a nodule but a cyst.", {"cyst"}),
        ("There is no mass, a nodule is present.", {"nodule"}),
        ("Image without artefacts shows a nodule.", {"nodule"}),
        ("The images without contrast show a nodule.", {"nodule"}),
        ("No. A nodule lies at [0.1, 0.2, 0.3, 0.4].", {"nodule"}),
        ("Not at [0.1, 0.2, 0.3, 0.4] is the cyst, nothing but a nodule.", {"cyst", "nodule"}),
        ("I see no type I cyst, I see a nodule.", {"nodule"}),
        # A name can be ruled out behind it.
        ("A nodule was ruled out.", set()),
        ("A nodule is absent.", set()),
        ("A nodule or a cyst is not present, but a mass is.", {"mass"}),
        ("It shows a nodule, and a cyst is excluded.", {"nodule"}),
        ("A mass is visible and an effusion isn't seen.", {"mass"}),
        ("A cyst cannot be seen.", set()),
        # What looks like a negation and is none.
        ("The image is not normal and shows a nodule at [0.1, 0.2, 0.3, 0.4].", {"nodule"}),
        ("The image does not look normal, nodule.", {"nodule"}),
        ("No doubt a nodule.", {"nodule"}),
        ("Not only a nodule, a cyst as well.", {"nodule", "cyst"}),
        ("No, a nodule at [0.1, 0.2, 0.3, 0.4].", {"nodule"}),
        ("A nodule cannot be ruled out.", {"nodule"}),
    ],
)
def test_negation(text, named):
    terms = {**TERMS, "effusion": ["effusion"]}
    assert named_classes(text, terms) == named
    pieces = " " + text  # as an answer looks when it is put together from word pieces
    assert {cls for _, _, cls in find_terms(pieces, terms)} == named


def test_every_wording_of_the_writer_names_its_classes():
    for phrasing in PHRASINGS:
        told = [f"{phrasing.single} {phrasing.only}", f"{phrasing.several} {phrasing.each} {phrasing.each}"]
        for text in told:
            filled = text.format(
                count="two", ordinal="first", box="[0.10, 0.20, 0.30, 0.40]", region="centre", name="cyst"
            )
            assert [cls for _, _, cls in find_terms(filled, TERMS)] == ["cyst"] * text.count("{name}")
    assert not any(named_classes(text, {"area": ["area"], "finding": ["finding"]}) for text in NEGATIVES)


def test_names_may_begin_and_end_with_any_character_and_hold_a_negator():
    terms = {
        "tb": ["TB (tuberculosis)"],
        "plus": ["+1 oedema"],
        "plain": ["mass without calcification"],
        "mass": ["mass"],
    }
    assert named_classes("It is tb  (Tuberculosis).", terms) == {"tb"}
    assert named_classes("It is +1 oedema", terms) == {"plus"}
    assert named_classes("No TB (tuberculosis) but a mass without calcification.", terms) == {"plain"}
    assert named_classes("TB (tuberculosis)x, x+1 oedema", terms) == set()


def test_letters_that_only_look_alike_to_a_pattern_do_not_raise():
    assert find_terms("a cy\u017ft and a MA\u017fS", TERMS) == [(2, 6, "cyst"), (13, 17, "mass")]


@contextmanager
def counted_lines(file: str) -> Iterator[list[int]]:
    """How many lines of one source file run, as the single item of a list."""
    lines, before = [0], sys.gettrace()

    def count(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != file:
            return None
        lines[0] += event == "line"
        return count

    sys.settrace(count)
    try:
        yield lines
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    "text",
    [
        "There is no nodule, cyst or mass, but the area at [0.1, 0.2, 0.3, 0.4] shows a small mass. A cyst is absent. ",
        "no nodule ",
        "nodule, and a ",
        "nodule cannot not be ",
        "a nodule, the a-b-c ",
        "cyst is absent ",
        "fluid-filled cyst  \n ",
    ],
)
def test_the_work_to_find_terms_grows_as_the_text_does(text, monkeypatch):
    """It runs on every answer of a training step, and an answer may be cut off in the middle of an endless repetition.

    Work is what the two regular expressions try and the lines of Python that run: what a clock would measure, on any machine.
    """
    names, owners = terms._pattern(tuple((name, tuple(synonyms)) for name, synonyms in TERMS.items()))
    patterns = [CountingPattern(names), CountingPattern(terms._CUES)]
    monkeypatch.setattr(terms, "_pattern", lambda _: (patterns[0], owners))
    monkeypatch.setattr(terms, "_CUES", patterns[1])

    def work(count: int) -> list[int]:
        before = [pattern.steps for pattern in patterns]
        with counted_lines(terms.__file__) as lines:
            assert isinstance(find_terms(text * count, TERMS), list)
        return [pattern.steps - steps for pattern, steps in zip(patterns, before)] + lines

    short, long = work(4), work(64)
    assert min(short) > 10
    assert all(many < 1.1 * 16 * few for few, many in zip(short, long)), (short, long)


def test_places_of_terms_are_character_spans():
    text = "A cyst, then a small mass."
    assert [(text[a:b], cls) for a, b, cls in find_terms(text, TERMS)] == [("cyst", "cyst"), ("small mass", "nodule")]


def test_no_terms_name_nothing():
    assert find_terms("a nodule", {}) == []


def test_right_answer():
    # (50, 25)-(100, 75) px is x 0.25-0.5 and y (25 + 50) / 200 = 0.375 to 0.625 of the square.
    score = score_answer("At [0.25, 0.375, 0.50, 0.625] a nodule.", record(["nodule"], [[50, 25, 100, 75]]), GEOMETRY)
    assert (score.accuracy, score.class_f1, score.n_true) == (1.0, 1.0, 1)
    assert score.set_iou == pytest.approx(1.0)
    assert score.boxes[0] == pytest.approx((50, 25, 100, 75))


def test_half_right_answer():
    true = record(["nodule", "cyst"], [[0, 0, 50, 100], [150, 0, 200, 100]])
    score = score_answer("At [0.0, 0.25, 0.25, 0.75] a nodule.", true, GEOMETRY)
    assert score.accuracy == 0.0
    assert score.class_f1 == pytest.approx(2 / 3)
    assert score.set_iou == pytest.approx(0.5)  # one of two boxes found exactly


@pytest.mark.parametrize(
    ("text", "accuracy", "set_iou"),
    [
        ("Nothing abnormal.", 1.0, 1.0),
        ("Nothing, look: [0.1, 0.1, 0.2, 0.2].", 0.0, 0.0),
        ("A nodule.", 0.0, 1.0),
    ],
)
def test_negative_study(text, accuracy, set_iou):
    score = score_answer(text, record([], []), GEOMETRY)
    assert (score.accuracy, score.set_iou) == (accuracy, set_iou)


@pytest.mark.parametrize("box", ["[0.50, 0.50, 1.10, 1.05]", "[-0.01, 0.50, 1.00, 1.00]", "[0.50, 0.50, 0.50, 1.00]"])
def test_a_box_that_leaves_the_square_scores_nothing(box):
    true = record(["nodule"], [[100, 100, 200, 200]])
    square = ImageGeometry(200, 200)
    assert score_answer("[0.50, 0.50, 1.00, 1.00]", true, square).set_iou == 1.0
    score = score_answer(box, true, square)
    assert (score.set_iou, len(score.boxes)) == (0.0, 1)
    assert score_answer(f"[0.50, 0.50, 1.00, 1.00] {box}", true, square).set_iou == 0.5


def test_a_lesion_that_the_crop_cuts_away_is_not_asked_for():
    """200 x 100 in square mode: x from 50 to 150 is seen."""
    square = ImageGeometry(200, 100, "square")
    gone, seen = [0, 0, 40, 100], [50, 0, 100, 100]
    answer = "[0.00, 0.00, 0.50, 1.00] a nodule"
    score = score_answer(answer, record(["cyst", "nodule"], [gone, seen]), square)
    assert (score.accuracy, score.class_f1, score.set_iou, score.n_true) == (1.0, 1.0, 1.0, 1)
    score = score_answer(answer, record(["nodule", "nodule"], [gone, seen]), square)
    assert (score.accuracy, score.set_iou, score.n_true) == (1.0, 1.0, 1)
    score = score_answer("Nothing abnormal.", record(["cyst"], [gone]), square)
    assert (score.accuracy, score.set_iou, score.n_true) == (1.0, 1.0, 0)


def test_a_box_that_is_none_counts_against():
    true = record(["nodule"], [[50, 25, 100, 75]])
    assert score_answer(
        "[0.25, 0.375, 0.5, 0.625] [0.9, 0.9, 0.1, 0.1] nodule", true, GEOMETRY
    ).set_iou == pytest.approx(0.5)
