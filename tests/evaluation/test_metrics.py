"""Metrics against cases worked out by hand, and against public implementations where one is installed."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap
from support.oracles import oracle

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.metrics import captions, choices, classification, grounding, llava_med, metric
from umed_plugin.evaluation.metrics.metric import (
    Metric,
    Row,
    by_group,
    compare_rows,
    mean,
    mean_of_groups,
    means,
    measure,
    ratio,
)
from umed_plugin.evaluation.tables import direction_note, interval_notes


def row(name, value=None, cluster=None, **groups):
    return Row(name, cluster or name, {} if value is None else {"x": float(value)}, groups)


# --- LLaVA-Med


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


# --- captions

SAID = ["the", "cat", "sat", "on", "the", "mat", "near", "the", "red", "door"]
WANTED = ["the", "cat", "was", "on", "the", "mat", "by", "the", "red", "door"]


def test_bleu_by_hand():
    # 1-grams: the x3, cat, on, mat, red, door = 8 of 10. 2-grams: "the cat", "on the", "the mat", "the red", "red door" = 5 of 9.
    counts = captions.bleu_counts(SAID, WANTED)
    assert (counts["ngrams_shared_1"], counts["ngrams_said_1"]) == (8, 10)
    assert (counts["ngrams_shared_2"], counts["ngrams_said_2"]) == (5, 9)
    columns = {name: np.array([value]) for name, value in counts.items()}
    assert captions.bleu(columns, 1) == pytest.approx(0.8)
    assert captions.bleu(columns, 2) == pytest.approx(math.sqrt(0.8 * 5 / 9))
    short = {name: np.array([value]) for name, value in captions.bleu_counts(["the", "cat"], WANTED).items()}
    assert captions.bleu(short, 1) == pytest.approx(math.exp(1 - 10 / 2)), "too short: the brevity penalty"
    assert captions.bleu(short, 3) == 0


def test_rouge_l_and_meteor_by_hand():
    # Longest common subsequence: the cat on the mat the red door = 8; P = R = 0.8.
    assert captions.rouge_l(SAID, WANTED) == pytest.approx(0.8)
    # P = 2/2, R = 2/10, beta 1.2: (1 + 1.44) * 0.2 / (0.2 + 1.44)
    assert captions.rouge_l(["the", "cat"], WANTED) == pytest.approx(2.44 * 0.2 / 1.64)
    # 8 matches in 3 chunks ("the cat", "on the mat", "the red door"): F = 0.8.
    assert captions.meteor(SAID, WANTED) == pytest.approx(0.8 * (1 - 0.5 * (3 / 8) ** 3))
    assert captions.meteor(["a"], ["b"]) == 0 and captions.rouge_l(["a"], ["b"]) == 0
    assert captions.meteor([], ["b"]) == 0 and captions.rouge_l([], ["b"]) == 0


def test_words_are_lower_case_and_without_boxes_tags_and_punctuation():
    text = "<ref>Left lung</ref><box>(12,30),(45,60)</box>: 2.5 cm T1-weighted, [0.10, 0.20, 0.30, 0.40]."
    assert captions.words(text) == ["left", "lung", "2.5", "cm", "t1-weighted"]


def some_captions(count=40):
    generator = np.random.default_rng(5)
    vocabulary = [
        "the",
        "a",
        "left",
        "right",
        "lung",
        "mass",
        "nodule",
        "is",
        "in",
        "of",
        "upper",
        "lobe",
        "small",
        "large",
        "seen",
    ]
    for _ in range(count):
        wanted = list(generator.choice(vocabulary, generator.integers(3, 14)))
        said = [word if generator.random() < 0.7 else str(generator.choice(vocabulary)) for word in wanted]
        yield said[: generator.integers(1, 14)] + list(generator.choice(vocabulary, generator.integers(0, 3))), wanted


def test_bleu_is_sacrebleu_s():
    sacrebleu = oracle("sacrebleu")
    pairs = list(some_captions())
    counts = [captions.bleu_counts(*pair) for pair in pairs]
    columns = {name: np.array([one[name] for one in counts]) for name in counts[0]}
    for order in captions.ORDERS:
        theirs_of = sacrebleu.metrics.BLEU(
            tokenize="none", smooth_method="none", max_ngram_order=order, effective_order=False, force=True
        )
        theirs = theirs_of.corpus_score([" ".join(said) for said, _ in pairs], [[" ".join(w) for _, w in pairs]]).score
        assert captions.bleu(columns, order) == pytest.approx(theirs / 100, abs=1e-9)


def test_rouge_l_is_that_of_the_rouge_score_package():
    scorer = oracle("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for said, wanted in some_captions():
        theirs = scorer.score(" ".join(wanted), " ".join(said))["rougeL"].fmeasure
        assert captions.rouge_l(said, wanted, beta=1.0) == pytest.approx(theirs)


def test_meteor_is_nltk_s_with_equal_words_alone():
    """On captions without repeated words, of which each library aligns which it likes."""
    nltk = oracle("nltk.translate.meteor_score")

    class Same:
        def stem(self, word):
            return word

    class NoSynonyms:
        def synsets(self, word):
            return []

    checked = 0
    for said, wanted in some_captions(200):
        said, wanted = list(dict.fromkeys(said)), list(dict.fromkeys(wanted))
        theirs = nltk.single_meteor_score(wanted, said, stemmer=Same(), wordnet=NoSynonyms())
        assert captions.meteor(said, wanted) == pytest.approx(theirs)
        checked += theirs > 0
    assert checked > 100


# --- multiple choice


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


# --- classification


def test_auc_by_hand():
    scores, positive = np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, False, True, False])
    # Pairs (positive, negative): 0.9 beats both; 0.5 ties with 0.5 (half) and beats 0.1: 3.5 of 4.
    assert classification.auc(scores, positive) == pytest.approx(3.5 / 4)
    assert math.isnan(classification.auc(scores, np.zeros(4, bool)))
    assert classification.likelihoods([1.0, 1.0]) == [0.5, 0.5]
    assert classification.likelihoods([0.0, math.log(3)]) == pytest.approx([0.75, 0.25])
    assert sum(classification.likelihoods([800.0, 801.0, 900.0])) == pytest.approx(1)


@pytest.mark.parametrize("classes", [2, 5])
def test_auc_is_scikit_learn_s(classes):
    metrics = oracle("sklearn.metrics")
    from scipy.stats import mannwhitneyu

    generator = np.random.default_rng(classes)
    truth = generator.integers(0, classes, 300)
    scores = np.round(generator.random((300, classes)) + 0.4 * np.eye(classes)[truth], 1)  # rounded: with ties
    if classes == 2:
        theirs = metrics.roc_auc_score(truth, scores[:, 1])
    else:
        theirs = np.mean([metrics.roc_auc_score(truth == one, scores[:, one]) for one in range(classes)])
    assert classification.macro_auc(scores, truth) == pytest.approx(theirs)
    # The chance that a positive scores above a negative, from ranks.
    positive = truth == 1
    pairs = positive.sum() * (~positive).sum()
    by_ranks = mannwhitneyu(scores[positive, 1], scores[~positive, 1]).statistic / pairs
    assert classification.auc(scores[:, 1], positive) == pytest.approx(by_ranks)


# --- boxes


def test_the_pointing_game_by_hand():
    true = [[0, 0, 10, 10], [50, 50, 60, 60]]
    assert grounding.points_at([[48, 48, 60, 60]], true) == 1, "its centre is 54, 54"
    assert grounding.points_at([[0, 0, 22, 22]], true) == 0
    assert grounding.points_at([[20, 20, 30, 30], [0, 0, 10, 10]], true) == 0, "the first box counts"
    assert grounding.points_at([], true) == 0 and grounding.points_at([[5, 5, 5, 5]], true) == 0


def test_the_pointing_game_of_attention_by_hand():
    attention = np.zeros((4, 4))
    attention[1, 2] = 1  # its middle is at x 2.5 / 4, y 1.5 / 4 of what the patches cover
    assert grounding.attention_points_at(attention, 1.0, [[0.6, 0.3, 0.7, 0.4]]) == 1
    assert grounding.attention_points_at(attention, 1.0, [[0.3, 0.6, 0.4, 0.7]]) == 0, "columns are x"
    assert grounding.attention_points_at(attention, 0.8, [[0.6, 0.3, 0.7, 0.4]]) == 0, "x is 0.5 then"
    assert grounding.attention_points_at(attention, 0.8, [[0, 0, 0.1, 0.1], [0.45, 0.25, 0.55, 0.35]]) == 1


def test_lesions_by_size_by_hand():
    # 336 px: 16 px is small, 64 medium, 200 large.
    true = [[0, 0, 16 / 336, 16 / 336], [0.5, 0.5, 0.5 + 64 / 336, 0.5 + 64 / 336], [0, 0, 200 / 336, 200 / 336]]
    overlaps = grounding.lesion_overlaps([true[1]], true)
    assert overlaps == [0, pytest.approx(1), 0]
    values = grounding.overlaps_by_size(overlaps, true)
    assert values["lesions_small"] == values["lesions_medium"] == values["lesions_large"] == 1
    assert (values["lesion_iou_medium"], values["lesions_found_medium"], values["lesions_found_small"]) == (1, 1, 0)


def test_recall_at_50_by_hand():
    true = [[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]]
    assert grounding.recalled([[0, 0, 10, 10]], true) == (2, 3), "one box may find two lesions, as BiRD counts"
    assert grounding.recalled([[0, 0, 10, 5]], true[:1]) == (0, 1), "an IoU of exactly 0.5 does not count"
    assert grounding.recalled([], true) == (0, 3)
    assert grounding.recalled([[0, 0, 1, 1]], []) == (0, 0)


def test_recall_at_50_is_that_of_pycocotools_where_one_box_answers_one_lesion():
    """COCO matches one to one and counts 0.5 itself; with one box for each lesion and no IoU of 0.5 both are the same."""
    mask = oracle("pycocotools.mask")
    generator = np.random.default_rng(0)
    for _ in range(50):
        corner = generator.integers(0, 100, (2, 2)).astype(float)
        size = generator.integers(5, 80, (2, 2)).astype(float)
        a, b = (np.concatenate([corner[i], corner[i] + size[i]]) for i in (0, 1))
        theirs = mask.iou([[*corner[0], *size[0]]], [[*corner[1], *size[1]]], [0])[0, 0]
        assert grounding.recalled([a], [b])[0] == (theirs > 0.5)
        assert grounding.lesion_overlaps([a], [b])[0] == pytest.approx(theirs)


# --- metrics and intervals


def test_metrics_by_hand():
    rows = [row("a", 1, source="u"), row("b", 0, source="u"), row("c", 1, source="v"), row("d", source="v")]
    (x,) = means("x")
    found = measure(
        [x, *by_group(x, "source", rows), Metric("mean", mean_of_groups("x", "source"), ("x", "source"))], rows
    )
    assert found["x"]["value"] == pytest.approx(2 / 3) and found["x"]["n"] == 3, "a row without the column is left out"
    assert (found["x/u"]["value"], found["x/v"]["value"]) == (0.5, 1.0)
    assert found["mean"]["value"] == pytest.approx(0.75), "every group weighs the same"
    assert found["x"] == {"value": 2 / 3, "ci95": None, "n": 3, "units": 3, "interval": "too few"}
    nothing = {"value": None, "ci95": None, "n": 0, "units": 0, "interval": "undefined"}
    assert measure(means("y"), rows)["y"] == nothing


def test_the_interval_is_scipy_s_where_every_row_is_drawn_alone():
    values = np.random.default_rng(1).random(200)
    found = measure(means("x"), [row(str(i), value) for i, value in enumerate(values)])["x"]["ci95"]
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=9999, random_state=0).confidence_interval
    assert found == pytest.approx([theirs.low, theirs.high], abs=0.004)


def test_questions_about_one_image_are_drawn_together():
    """Ten copies of each answer tell no more than one: the interval must not become narrower."""
    values = np.random.default_rng(1).random(40)
    alone = [row(str(i), value) for i, value in enumerate(values)]
    copies = [row(f"{i}-{k}", value, cluster=str(i)) for i, value in enumerate(values) for k in range(10)]
    as_if_independent = [row(one.id, one.values["x"]) for one in copies]
    width = {
        name: np.ptp(measure(means("x"), rows)["x"]["ci95"])
        for name, rows in {"alone": alone, "copies": copies, "independent": as_if_independent}.items()
    }
    assert width["copies"] == pytest.approx(width["alone"], rel=0.1)
    assert width["independent"] < 0.5 * width["copies"]


def test_clusters_of_different_size_keep_all_their_rows():
    rows = [row("a", 0, cluster="one"), *[row(f"b{i}", 1, cluster="two") for i in range(3)]]
    drawn = [sorted(chosen) for chosen in metric._draws([one.cluster for one in rows])]
    assert {tuple(chosen) for chosen in drawn} == {(0, 0), (0, 1, 2, 3), (1, 1, 2, 2, 3, 3)}
    five = [row(f"{n}{name}", x, cluster=f"{name}{n}") for n in range(5) for name, x in (("one", 0), *[("two", 1)] * 3)]
    low, high = measure(means("x"), five)["x"]["ci95"]
    assert 0.3 < low < 0.75 < high <= 1


def test_what_is_undefined_on_too_many_draws_has_no_interval():
    rows = [Row(str(i), str(i), {"hit": 0.0, "counted": float(i == 0)}) for i in range(4)]
    found = measure([Metric("r", ratio("hit", "counted"), ("hit", "counted"))], rows)["r"]
    assert found["value"] == 0 and found["ci95"] is None


def test_a_paired_difference_is_narrower_than_two_intervals():
    generator = np.random.default_rng(2)
    before = generator.random(100)
    after = before + 0.02 + 0.01 * generator.standard_normal(100)
    rows = [[row(str(i), value) for i, value in enumerate(values)] for values in (before, after)]
    found = compare_rows(means("x"), rows[0], list(reversed(rows[1])))["x"]
    assert found["difference"] == pytest.approx((after - before).mean()) and found["n"] == 100
    low, high = found["ci95"]
    assert 0 < low < found["difference"] < high < 0.03
    with pytest.raises(UmedError, match="same questions"):
        compare_rows(means("x"), rows[0], rows[1][1:])


def test_a_constant_whose_limits_are_unknown_has_no_interval():
    """Not [1, 1]: no width would look like certainty."""
    for count, why in ((2, "too few"), (50, "undefined")):
        found = measure([Metric("x", mean("x"), ("x",))], [row(str(n), 1) for n in range(count)])["x"]
        assert (found["value"], found["ci95"], found["interval"]) == (1, None, why)


@pytest.mark.parametrize("n", [1, 3, 4, 40])
def test_a_rate_of_0_or_1_has_the_interval_of_clopper_and_pearson(n):
    for hits in (0, n):
        found = measure(means("x"), [row(str(i), float(hits > 0)) for i in range(n)])["x"]
        theirs = binomtest(hits, n).proportion_ci(method="exact")
        assert found["interval"] == "exact" and found["ci95"] == pytest.approx([theirs.low, theirs.high])


def test_copies_of_a_patient_do_not_make_a_rate_surer():
    copies = [row(f"{i}-{k}", 0.0, cluster=str(i)) for i in range(3) for k in range(100)]
    found = measure(means("x"), copies)["x"]
    assert found["ci95"] == pytest.approx([0, 0.7076], abs=1e-4) and (found["n"], found["units"]) == (300, 3)


def test_no_difference_in_any_pair_is_not_certainty():
    four = [row(str(i), 0.25 * i) for i in range(4)]
    found = compare_rows(means("x"), four, four)["x"]
    assert found["difference"] == 0 and found["ci95"] == pytest.approx([-0.6024, 0.6024], abs=1e-4)
    none, all_ = ([row(str(i), value) for i in range(40)] for value in (0.0, 1.0))
    assert compare_rows(means("x"), none, all_)["x"]["ci95"] == pytest.approx([1 - 2 * 0.0881, 1], abs=1e-3)


def test_clusters_whose_denominator_is_0_do_not_count():
    rows = [Row(str(i), str(i), {"hit": 0.0, "of": float(i < 6)}) for i in range(12)]
    found = measure([Metric("r", ratio("hit", "of"), ("hit", "of"), limits=(0, 1))], rows)["r"]
    assert found["ci95"] == pytest.approx([0, 1 - 0.025 ** (1 / 6)])


def test_the_words_below_a_table():
    many, few = ([row(str(i), i % 2) for i in range(count)] for count in (40, 12))
    assert interval_notes(measure(means("x"), many), "patient") == []
    (note,) = interval_notes(measure(means("x"), few), "patient")
    assert note.startswith("Few patients (fewer than 30): x (12).")
    assert interval_notes(measure(means("x"), few[:3]), "image") == [
        "Too few images for an interval (fewer than 5): x (3)."
    ]
    (note,) = interval_notes(measure(means("x"), [row(str(i), 1) for i in range(40)]))
    assert note.startswith("Exact intervals (Clopper-Pearson)")
    (iou,), (false_boxes,) = means("iou"), [replace(metric, lower_is_better=True) for metric in means("false")]
    both = compare_rows([iou, false_boxes], *[[Row("a", "a", {"iou": 0.5, "false": 1.0})]] * 2)
    assert direction_note(both) == "A positive difference is an improvement, except for false: there less is better."


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


def test_the_bootstrap_holds_one_draw_at_a_time(monkeypatch):
    monkeypatch.setattr(metric, "RESAMPLES", 200)
    rows = [Row(str(number), str(number), {"iou": number % 7 / 7}) for number in range(20_000)]
    measure(means("iou"), rows[:10])
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        measure(means("iou"), rows)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 8e6, "all draws at once take 32 MB"
