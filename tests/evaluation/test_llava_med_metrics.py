"""LLaVA-Med's metrics of open and closed answers against cases worked out by hand."""

from __future__ import annotations

import pytest

from umed_plugin.evaluation.metrics import llava_med


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("the left lung.", "left lung"),
        ("An X-ray, of two lungs", "x ray of 2 lungs"),  # ", " is in the text: commas go; "-" stands alone: a space
        ("T1/T2", "t1 t2"),
        ("1,000 mm/s", "1000 mms"),  # a comma between digits: every mark is taken away, also the slash
        ("none of dont", "0 of don't"),
        ("3.5 cm. wide...", "3.5 cm wide"),
        (" ".join(["x."] * 40), " ".join(["x"] * 32 + ["x."] * 8)),  # only the first 32 full stops
    ],
)
def test_normalisation_by_hand(text, wanted):
    assert llava_med.normalise(text) == wanted


def test_open_recall_counts_the_words_of_the_answer_and_does_not_clip_them():
    # truth: lung, cancer. answer: lung x3, mass. TP = 3, FP = 1 (mass), FN = 1 (cancer).
    precision, recall, f1 = llava_med.token_overlap("Lung lung lung mass", "lung cancer")
    assert (precision, recall) == (3 / 4, 3 / 4) and f1 == pytest.approx(3 / 4)
    assert llava_med.token_overlap("The lung", "lung cancer")[1] == 1 / 2
    assert llava_med.token_overlap("heart", "lung") == (0, 0, 0)
    assert llava_med.token_overlap("", "lung") == (0, 0, 0)
    assert llava_med.exact_match("right lung mass", "the right lung") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "truth", "run_eval", "batch", "corrected"),
    [
        ("Yes, there is.", "Yes", (1, 1), 1, 1),
        ("No.", "yes", (0, 0), 0, 0),  # wrong, and dropped from the denominator there
        ("The heart is normal.", "no", (1, 1), 1, 0),  # "no" inside "normal"
        ("A nodule can be seen", "no", (1, 1), 1, 0),
        ("It is healthy", "yes", (0, 1), 0, 0),
        ("Yes, no fracture is seen", "yes", (1, 1), 1, 1),  # the first word says it
        ("Yes, no fracture is seen", "no", (1, 1), 1, 0),
        ("There is no fracture", "no", (1, 1), 1, 1),
        ("It is neither yes nor no", "no", (1, 1), 1, 0),
        ("The left lung", "left lung", (0, 1), 1, 1),  # neither yes nor no: a miss in run_eval.py
        ("T2", "T1", (0, 1), 0, 0),
        ("unhealthy", "healthy", (0, 1), 1, 0),  # a substring, but no word
    ],
)
def test_closed_accuracies_by_hand(answer, truth, run_eval, batch, corrected):
    assert llava_med.closed_hit(answer, truth) == run_eval
    assert llava_med.closed_hit_batch(answer, truth) == batch
    assert llava_med.closed_accuracy(answer, truth) == corrected


YES = [
    "Yes, no doubt.",
    *(
        "Yes",
        "yes.",
        "YES!",
        '"Yes"',
        "\u201cYes\u201d",
        "\u2018Yes\u2019",
        "Yes\u2026",
        "Yes...",
        "**Yes**, a nodule is visible.",
        "*Yes*",
    ),
    *(
        "Yes: a nodule.",
        "Yes\u2014there is.",
        "Yes - there is",
        "_Yes_",
        "# Yes",
        "- Yes",
        "Answer:Yes",
        "Answer: Yes",
        "**Answer:** Yes",
    ),
    *(
        "The answer is yes.",
        "<answer>Yes</answer>",
        "\\boxed{Yes}",
        "`Yes`",
        "(Yes)",
        "[Yes]",
        "Yes/",
        "\uff39\uff45\uff53",
        "Yes\n\nThere is.",
    ),
    *(
        "It is not normal. Answer: Yes",
        "<think>No, wait. No.</think>Yes",
        "<think>no</think><answer>Yes.</answer>",
        "\u00abYes\u00bb",
    ),
    *(
        "There is no fracture, but a nodule, so the answer is: **yes**",
        "Final answer: Yes, no doubt",
        "I think yes",
        "Yes\u3002",
        "\tYes;",
    ),
]
NO = [
    *(
        "No",
        "No: the ribs are intact.",
        "**No**",
        "\u201cNo\u201d",
        "Answer:No",
        "There is no fracture.",
        "<answer>no</answer>",
        "No\u2026",
    ),
    *(
        "no\u2014none",
        "No, I cannot see a nodule.",
        "The answer is: No.",
        "No evidence of a nodule.",
        "'No'",
        "There's no nodule",
    ),
]
NEITHER = [
    *(
        "Not visible",
        "I cannot tell",
        "I cannot tell.",
        "normal",
        "It is a nodule",
        "",
        "...",
        "Nothing",
        "Unknown",
        "nodule",
        "know",
    ),
    *(
        "I have no idea.",
        "No idea",
        "I do not know whether there is no fracture",
        "It cannot be determined; there is no lateral view.",
    ),
    *("The answer is not yes.", "It is not no", "It isn't yes.", "not a yes"),
    *("yes/no", "No / yes.", "**Yes**|**No**"),
    *("yes or no", "It is neither yes nor no", "Yesterday", "Nor", "eyes", "N/A", "I'm not sure if yes"),
]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [*((text, "yes") for text in YES), *((text, "no") for text in NO), *((text, None) for text in NEITHER)],
)
def test_a_verdict_is_found_in_any_spelling(answer, verdict):
    assert llava_med.closed_accuracy(answer, "Yes") == (verdict == "yes")
    assert llava_med.closed_accuracy(answer, "no.") == (verdict == "no")


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("**CT**", "CT", 1),
        ("CT: with contrast", "CT", 1),
        ("\u201cCT\u201d", "CT", 1),
        ("<answer>CT</answer>", "CT", 1),
        ("an electrocardiogram-CT", "CT", 1),
        ("PACT", "CT", 0),
        ("in the left lower lobe:", "left lower lobe.", 1),
        ("Left-lower lobe", "left lower lobe", 1),
        ("*left lower lobe*", "Left lower lobe", 1),
        ("the lobe, left lower", "left lower lobe", 0),
        ("two lesions", "2 lesions", 1),
        ("3.5 cm", "3.5cm", 1),
        ("3.5 cm", "3 cm", 0),
        ("5 cm", "3.5 cm", 0),
        ("Crohn\u2019s disease", "Crohn's disease", 1),
        ("\u80ba\u7ed3\u8282\u3002", "\u80ba\u7ed3\u8282", 1),
    ],
)
def test_words_are_compared_without_marks(answer, truth, right):
    assert llava_med.open_accuracy(answer, truth) == right
    assert llava_med.closed_accuracy(answer, truth) == right


def test_open_accuracy_wants_the_words_in_a_row():
    assert llava_med.open_accuracy("It is the left upper lobe.", "left upper lobe") == 1
    assert llava_med.open_accuracy("upper left lobe", "left upper lobe") == 0
    assert llava_med.open_accuracy("anything", "") == 0


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("hepatitis B", "hepatitis A", 0),
        ("hepatitis A", "hepatitis A", 1),
        ("It is hepatitis a.", "Hepatitis A", 1),
        ("A", "A", 1),
        ("B", "A", 0),
        ("type dissection", "type A dissection", 0),
        ("A type a dissection", "type A dissection", 1),
        ("A-scan", "an A-scan", 1),
        ("nodule", "A nodule", 1),
        ("THERE IS A NODULE", "a nodule", 1),
        ("Answer: A nodule", "the nodule", 1),
        ("in the lung", "in lung", 1),
    ],
)
def test_an_article_is_dropped_and_the_letter_a_is_not(answer, truth, right):
    assert llava_med.open_accuracy(answer, truth) == right
    assert llava_med.closed_accuracy(answer, truth) == right
