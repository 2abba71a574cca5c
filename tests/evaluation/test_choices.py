"""Multiple choice: the option that an answer means, by its letter in any spelling or by the nearest text."""

from __future__ import annotations

import pytest

from umed_plugin.evaluation.metrics import choices


def test_the_nearest_option_by_hand():
    options = ["CT", "MRI", "X-ray"]
    assert choices.nearest_option("This is an X-ray image", options) == 2
    assert choices.nearest_option("MR", options) == 1
    assert choices.nearest_option("", options) is None, "nothing in common with any"
    assert choices.nearest_option("CT or MRI", ["CT scan", "MRI scan"]) in (0, 1)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", 1), ("b.", 1), ("(C)", 2), ("C: a cyst", 2), ("The answer is D", 3), ("Answer: A. cyst", 0), ("**B**", 1),
        ("The correct option is (B).", 1), ("A cyst", None), ("E", None), ("Benign", None), ("", None), ("I see B", None),
    ],
)  # fmt: skip
def test_the_letter_that_an_answer_begins_with(answer, letter):
    assert choices.named_letter(answer, 4) == letter


def test_a_letter_goes_before_the_nearest_text():
    options = ["no cyst", "a cyst", "B cells"]
    assert choices.chosen_option("B", options) == 1
    assert choices.chosen_option("B cells", options) == 2
    assert choices.lowest([2.0, 1.0, 1.0]) == 1


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "B",
            "b",
            "B.",
            "B)",
            "(B)",
            "[B]",
            "B:",
            "**B**",
            "*B*",
            "_B_",
            "`B`",
            '"B"',
            "\u201cB\u201d",
            "{B}",
            "$B$",
            "B\n",
            "B!",
            "#B",
            "> B",
        ),
        *(
            "B because A is wrong",
            "B, since A is wrong",
            "B is correct",
            "B is the correct answer, A is not.",
            "B - left",
            "B\nA is wrong.",
        ),
        *(
            "option B is correct",
            "Option B",
            "Choice B.",
            "option (B)",
            "The answer is B.",
            "The answer is B",
            "the correct answer is: B",
        ),
        *(
            "The best choice is B.",
            "Answer: B",
            "Answer:B",
            "**Answer: B**",
            "**Answer:** B",
            "Final answer: (B)",
            "<answer>B</answer>",
        ),
        *(
            "<think>A? C?</think>B",
            "A is wrong, so the answer is B.",
            "Option A is incorrect. Option B is correct.",
            "\\boxed{B}",
        ),
        *(
            "I choose B.",
            "I would go with option B because of the shape",
            "A is not right. B is right.",
            "<answer>\n(B) left\n</answer>",
        ),
        *(
            "Answer: A. Wait, no. Answer: B",
            "The answer is based on the shape.\nB",
            "B: left side",
            "\uff22",
            "The lesion is round. Therefore: B",
        ),
    ],
)
def test_a_letter_is_found_in_any_spelling(answer):
    assert choices.named_letter(answer, 4) == 1
    assert choices.chosen_option(answer, ["right side", "left side", "both", "neither"]) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "A nodule",
        "B cells",
        "a mass in the lung",
        "Both",
        "hepatitis B infection",
        "vitamin A",
        "In the lung",
        "I see it",
        "E",
        "J.",
        "",
    ],
)
def test_what_is_no_letter(answer):
    assert choices.named_letter(answer, 4) is None
