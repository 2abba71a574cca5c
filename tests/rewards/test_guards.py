"""The guards on simulated policies: an honest one, and one for each way to exploit the rewards."""

from __future__ import annotations

import random

import pytest

from umed_plugin.data.template_writer import write_conversation
from umed_plugin.grounding.boxes import format_box
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.rewards.guard_limits import crossed_limits
from umed_plugin.rewards.guards import (
    GUARDS,
    HELD_OUT_GUARDS,
    QUESTIONS_OVER_HELD_OUT,
    VISION_RELEVANCE_METRICS,
    WINDOW,
    Guards,
    skeleton,
    vision_relevance_metrics,
)

SQUARE = ImageGeometry(100, 100)
TERMS = {"nodule": ["nodule", "small nodule"], "cyst": ["cyst"]}


def make_record(boxes, seed=0, geometry=SQUARE):
    record = {"objects": {"ref": ["nodule"] * len(boxes), "bbox": boxes}, "terms": TERMS, "id": seed}
    return record | {"conversations": write_conversation(record, geometry, random.Random(seed))}


def study(seed):
    """A record with one lesion at a random position, and honest candidates: other wordings, boxes slightly off."""
    draw = random.Random(seed)
    x, y, side = draw.uniform(0, 60), draw.uniform(0, 60), draw.uniform(15, 35)
    record = make_record([[x, y, x + side, y + side]], seed)
    moved = [[max(0.0, v + draw.uniform(-3, 3)) for v in record["objects"]["bbox"][0]] for _ in range(4)]
    return record, [make_record([box], seed * 100 + i)["conversations"][1]["value"] for i, box in enumerate(moved)]


def add(guards, texts, record, geometry=SQUARE):
    scores = [score_answer(text, record, geometry) for text in texts]
    guards.add(texts, scores, [record] * len(texts), [geometry] * len(texts))


def after(policy, questions=WINDOW, window=WINDOW):
    """The guards and their metrics after a policy ``(record, honest answers) -> answers`` has answered."""
    guards = Guards(window)
    for seed in range(questions):
        record, honest = study(seed)
        add(guards, policy(record, honest), record)
    return guards, guards.metrics()


def answer_with(*boxes):
    return "At " + ", ".join(format_box(box) for box in boxes) + " there is a nodule."


def grown(record, by):
    """The true box with ``by`` times its area, moved to fit into the square."""
    x1, y1, x2, y2 = (value / 100 for value in record["objects"]["bbox"][0])
    side = (x2 - x1) * by**0.5
    x, y = min(x1, 1 - side), min(y1, 1 - side)
    return (x, y, x + side, y + side)


def test_an_honest_policy_gives_every_figure_and_no_warning():
    guards, metrics = after(lambda record, honest: honest)
    assert set(metrics) == set(GUARDS)
    assert guards.warnings(metrics) == []
    assert metrics["guard/box_area_ratio"] == pytest.approx(1, abs=0.1)
    assert metrics["guard/length_ratio"] == pytest.approx(1, abs=0.1)
    assert metrics["guard/whole_image_boxes"] == metrics["guard/extra_boxes"] == metrics["guard/missing_boxes"] == 0
    assert metrics["guard/top_skeleton"] < 0.2
    assert metrics["guard/distinct_coordinates"] > 60


def test_answers_without_any_box_are_not_called_stock_boxes():
    """Any stage 2 from a checkpoint that writes no boxes: 1.25 boxes are missing, and 0 of 67 coordinates are used."""
    reference = {"guard/distinct_coordinates_reference": 67.0}
    without = {**reference, "guard/missing_boxes": 1.25, "guard/distinct_coordinates": 0.0}
    (name,) = (found := crossed_limits(without))
    assert name == "guard/missing_boxes" and "Stage 1 is too short" in found[name] and "collapsing" not in found[name]
    few = {**without, "guard/distinct_coordinates": 4.0}
    (name,) = (found := crossed_limits(few))
    assert name == "guard/distinct_coordinates" and "a few stock ones" in found[name]
    assert crossed_limits({**without, "guard/missing_boxes": 0.0}) == {}, "studies without lesions need no box"


@pytest.mark.parametrize(
    ("policy", "name", "value"),
    [
        (lambda record, honest: [answer_with((0, 0, 1, 1))] * 4, "guard/whole_image_boxes", 1.0),
        (lambda record, honest: [answer_with(grown(record, 1.7))] * 4, "guard/box_area_ratio", 1.7),
        (lambda record, honest: [answer_with((0, 0, 0.2, 0.2), (0.4, 0.4, 0.6, 0.6))] * 4, "guard/extra_boxes", 1.0),
        (lambda record, honest: ["At [0.50, 0.50, 0.20, 0.20], nodule."] * 4, "guard/malformed_boxes", 1.0),
        (lambda record, honest: ["nodule"] * 4, "guard/length_ratio", None),
        (lambda record, honest: [text + " nodule" * 30 for text in honest], "guard/length_ratio", None),
        (lambda record, honest: [answer_with(grown(record, 1.0))] * 4, "guard/top_skeleton", 1.0),
        (lambda record, honest: [answer_with((0.2, 0.2, 0.5, 0.5))] * 4, "guard/distinct_coordinates", 2),
    ],
    ids=["whole image", "large boxes", "many boxes", "malformed", "bare", "padded", "one sentence", "one box"],
)
def test_each_way_around_the_rewards_moves_its_figure_and_is_warned_of_once(policy, name, value):
    guards, metrics = after(policy)
    if value is not None:
        assert metrics[name] == pytest.approx(value, rel=0.05)
    warned = guards.warnings(metrics)
    assert [text for text in warned if text.startswith(f"{name} is ")]
    assert guards.warnings(metrics) == []


def test_no_warning_before_the_window_is_full_and_the_window_moves():
    guards, metrics = after(lambda record, honest: ["nodule"] * 4, questions=7, window=8)
    assert guards.warnings(metrics) == []
    assert metrics["guard/missing_boxes"] == 1.0
    for seed in range(8):
        record, honest = study(seed)
        add(guards, honest, record)
    assert guards.metrics()["guard/missing_boxes"] == 0.0
    assert Guards().metrics() == {}


def test_padding_is_no_part_of_the_image():
    """A 200 x 100 image fills half of the square: a box around all of it has an area of 0.5 there."""
    wide = ImageGeometry(200, 100)
    whole, half = "[0.00, 0.25, 1.00, 0.75]", "[0.00, 0.25, 0.50, 0.75]"
    record = make_record([[10, 10, 60, 60]], geometry=wide)
    guards = Guards()
    add(guards, [whole, half], record, wide)
    assert guards.metrics()["guard/whole_image_boxes"] == 0.5
    guards = Guards()
    add(guards, [whole, whole], make_record([[0, 0, 200, 100]], geometry=wide), wide)
    assert guards.metrics()["guard/whole_image_boxes"] == 0.0, "here the lesion is as large as that"

    zoomed_out = {**record, "augmented": {"zoom": 0.5, "shift": [0.0, 0.25]}}
    guards = Guards()
    add(guards, ["[0.25, 0.62, 0.75, 0.88]", half], zoomed_out, wide)
    assert guards.metrics()["guard/whole_image_boxes"] == 0.5, "the image has moved along"


def test_a_study_without_lesion_counts_its_boxes_and_has_no_area_to_compare():
    guards = Guards()
    add(guards, ["No, nothing.", "[0.1, 0.1, 0.2, 0.2]"], make_record([]))
    metrics = guards.metrics()
    assert metrics["guard/extra_boxes"] == 0.5
    assert "guard/box_area_ratio" not in metrics


def test_the_area_ratio_weighs_half_and_double_alike():
    guards = Guards()
    add(guards, ["[0.1, 0.1, 0.3, 0.5] nodule", "[0.1, 0.1, 0.5, 0.9] nodule"], make_record([[10, 10, 50, 50]]))
    assert guards.metrics()["guard/box_area_ratio"] == pytest.approx(1.0)


def test_vision_relevance_against_the_area_and_the_iou():
    attention, covers = [0.3, 0.2, 0.1, None, 0.0], [0.1, 0.1, 0.1, 0.0, 0.2]
    metrics = vision_relevance_metrics(attention, covers, [0.9, 0.5, 0.1, 1.0, 1.0])
    assert metrics == pytest.approx(dict(zip(VISION_RELEVANCE_METRICS, (2.0, 1.0))))
    assert vision_relevance_metrics(attention, covers, [0.1, 0.5, 0.9, 1.0, 1.0])[VISION_RELEVANCE_METRICS[1]] == -1
    # Attention in proportion to the area of the lesion has no correlation: large lesions get more without being looked at.
    assert set(vision_relevance_metrics([0.1, 0.4, 0.2], [0.1, 0.4, 0.2], [0.1, 0.9, 0.5])) == {
        VISION_RELEVANCE_METRICS[0]
    }


@pytest.mark.parametrize(
    ("attention", "overlaps"),
    [([0.1, 0.2], [0.1, 0.2]), ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5]), ([0.2, 0.2, 0.2], [0.1, 0.2, 0.3])],
    ids=["two", "equal IoU", "equal attention"],
)
def test_no_correlation_is_made_up(attention, overlaps):
    assert list(vision_relevance_metrics(attention, [0.1] * len(attention), overlaps)) == [VISION_RELEVANCE_METRICS[0]]
    assert vision_relevance_metrics([None, 0.0], [0.1, 0.1], [0.0, 1.0]) == {}


@pytest.mark.parametrize(
    "text",
    [
        "A small nodule at [0.1, 0.20, 1, .5].",
        "a  cyst at [0.7, 0.25, 0.93, 0.5].",
        "A Nodule at [5, 0.25, 0.93, 0.5].",
    ],
)
def test_the_skeleton_keeps_the_wording_alone(text):
    assert skeleton(text, TERMS) == "a @ at [#, #, #, #]."


def test_a_name_that_is_ruled_out_is_blanked_too():
    assert skeleton("No cyst, but 1 nodule.", TERMS) == skeleton("No nodule, but 2 cysts.", TERMS) == "no @, but # @."


@pytest.mark.parametrize(
    ("iou", "accuracy", "crossed"), [(0.15, 0.75, 2), (0.15, 0.95, 1), (0.75, 0.95, 0), (0.95, 1.0, 0)]
)
def test_training_studies_that_are_known_by_heart_are_warned_of(iou, accuracy, crossed):
    """Honest candidates are all but right on the training studies; how good the policy is on others, validation says."""
    guards, metrics = after(lambda record, honest: honest)
    assert not {*HELD_OUT_GUARDS} & {*metrics}, "nothing to compare with yet"
    guards.held_out({"val/iou": iou, "val/accuracy": accuracy, "val/box_area_ratio": 1.0})
    metrics = guards.metrics()
    assert 0.75 < metrics["guard/iou_over_held_out"] + iou < 0.95
    assert metrics["guard/accuracy_over_held_out"] == pytest.approx(1 - accuracy)
    assert metrics[QUESTIONS_OVER_HELD_OUT] == WINDOW
    said = guards.warnings(metrics)
    assert len(said) == crossed and all("knows the training studies by heart" in text for text in said)
    assert guards.warnings(metrics) == []


def test_the_log_says_over_how_many_questions_a_comparison_with_held_out_studies_is():
    guards, metrics = after(lambda record, honest: honest, questions=8)
    assert QUESTIONS_OVER_HELD_OUT not in metrics
    guards.held_out({"val/iou": 0.5})
    assert guards.metrics()[QUESTIONS_OVER_HELD_OUT] == 8


def test_a_phrase_has_no_diagnosis_that_could_be_known_by_heart():
    guards = Guards(WINDOW)
    for seed in range(WINDOW):
        record, honest = study(seed)
        if seed % 2:
            record = {**record, "answer_type": "phrase", "phrase": "the shadow"}
            honest = [f"It is at {format_box((0.1, 0.1, 0.5, 0.5))}."] * 4
        add(guards, honest, record)
    guards.held_out({"val/accuracy": 0.4})
    assert guards.metrics()["guard/accuracy_over_held_out"] == pytest.approx(0.6)


def test_rewards_that_teach_nothing_and_answers_that_never_end_are_warned_of_once():
    guards, metrics = after(lambda record, honest: honest)
    for _ in range(WINDOW):
        guards.add_terms({"mine:none": [None] * 4, "some": [None, None, 0.5, None], "all": [0.0] * 4})
    found = guards.metrics() | {"answers_cut_off": 0.25, "groups_without_signal": 1.0}
    assert found["guard/unscored/mine:none"] == 1 and found["guard/unscored/some"] == 0.75
    assert found["guard/unscored/all"] == 0
    said = guards.warnings(found)
    assert len(said) == 3
    assert "answers_cut_off is 0.25, above 0.2" in said[0] and "--umed_max_new_tokens" in said[0]
    assert "groups_without_signal is 1, above 0.95" in said[1]
    assert "--umed_rewards mine:none returned None for every answer" in said[2]
    assert guards.warnings(found) == [], "once"
    at_the_limit = metrics | {"answers_cut_off": 0.2, "groups_without_signal": 0.95, "guard/unscored/some": 0.99}
    assert crossed_limits(at_the_limit) == {}


def test_equal_rewards_within_a_question_are_a_fault_under_grpo_alone():
    assert "groups_without_signal" in crossed_limits({"groups_without_signal": 1.0})
    assert crossed_limits({"groups_without_signal": 1.0, "value_loss": 0.2}) == {}, "PPO compares questions too"
