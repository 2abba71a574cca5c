"""Multiple choice: the option that an answer means, by its letter in any spelling or by the nearest text."""

from __future__ import annotations

import pytest

from umed_plugin.evaluation.benchmarks.probes import stated_option
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


FINDINGS = ["pneumonia", "cyst", "nodule", "normal"]
SIDES = ["left lung", "right lung", "both lungs", "none"]


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        *((text, 1) for text in ("I think it's B.", "I think it is B", "This is option B", "The image shows B")),
        *((text, 1) for text in ("Based on the image, B", "I would say B.", "So, B", "Hence B.", "I see B")),
        *((text, 1) for text in ("It looks like (B) to me: (B)", "B rather than C", "I think B, not C.", "A cyst, thus B")),
        ("I would say A because of the shadow", 0), ("It could only be D here.", 3), ("Both lungs are clear, so C", 2),
    ],
)  # fmt: skip
def test_a_letter_that_stands_alone_goes_before_the_nearest_text(answer, index):
    assert choices.chosen_option(answer, FINDINGS) == index
    assert stated_option(answer, FINDINGS) == index


@pytest.mark.parametrize(
    ("answer", "letters"),
    [
        ("The answer is not B but C", [2]),
        ("Neither A nor C, so B", [1]),
        ("It is not A, B or D; it is C.", [2]),
        ("I don't think it is B.", []),
        ("I don't think B is correct.", []),
        ("I would not choose B.", []),
        ("Not B", []),
        ("It is A or B.", [0, 1]),
        ("A and B", [0, 1]),
        ("B is wrong", []),
        ("A lesion is in the right lung", []),
        ("I, too, see a lesion", []),
        ("The image shows E", []),
        ("This is hepatitis B.", []),
        ("It is a type B", []),
        ("Cirrhosis, Child-Pugh B.", []),
        ("An infection with C. difficile", []),
    ],
)
def test_letters_that_are_ruled_out_left_open_or_part_of_a_name(answer, letters):
    assert choices.stated_letters(answer, SIDES) == letters
    if len(letters) != 1:
        assert choices.chosen_option(answer, SIDES) == (None if letters else choices.nearest_option(answer, SIDES))
    else:
        assert choices.chosen_option(answer, SIDES) == stated_option(answer, SIDES) == letters[0]


def test_the_letter_of_an_option_s_own_text_is_not_its_place():
    assert choices.chosen_option("I would say influenza B.", ["influenza B", "influenza A", "none"]) == 0
    assert choices.chosen_option("I think it is B", ["A cyst", "A nodule"]) == 1
