"""The guards on made-up policies: an honest one, and one for each way around the rewards."""

from __future__ import annotations

import random

import pytest

from umed_plugin.data.template_writer import write_conversation
from umed_plugin.grounding.boxes import format_box
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.rewards.guards import GUARDS, VISION_RELEVANCE, WINDOW, Guards, skeleton, vision_relevance_figures

SQUARE = ImageGeometry(100, 100)
TERMS = {"nodule": ["nodule", "small nodule"], "cyst": ["cyst"]}


def make_record(boxes, seed=0, geometry=SQUARE):
    record = {"objects": {"ref": ["nodule"] * len(boxes), "bbox": boxes}, "terms": TERMS, "id": seed}
    return record | {"conversations": write_conversation(record, geometry, random.Random(seed))}


def study(seed):
    """A record with one lesion at a place of its own, and honest candidates: other wordings, boxes a little off."""
    draw = random.Random(seed)
    x, y, side = draw.uniform(0, 60), draw.uniform(0, 60), draw.uniform(15, 35)
    record = make_record([[x, y, x + side, y + side]], seed)
    moved = [[max(0.0, v + draw.uniform(-3, 3)) for v in record["objects"]["bbox"][0]] for _ in range(4)]
    return record, [make_record([box], seed * 100 + i)["conversations"][1]["value"] for i, box in enumerate(moved)]


def see(guards, texts, record, geometry=SQUARE):
    scores = [score_answer(text, record, geometry) for text in texts]
    guards.see(texts, scores, [record] * len(texts), [geometry] * len(texts))


def after(policy, questions=WINDOW, window=WINDOW):
    """The guards and their figures after a policy ``(record, honest answers) -> answers`` was asked."""
    guards = Guards(window)
    for seed in range(questions):
        record, honest = study(seed)
        see(guards, policy(record, honest), record)
    return guards, guards.figures()


def answer_with(*boxes):
    return "At " + ", ".join(format_box(box) for box in boxes) + " there is a nodule."


def grown(record, by):
    """The true box with ``by`` times its area, as far as the square goes, and no other fault."""
    x1, y1, x2, y2 = (value / 100 for value in record["objects"]["bbox"][0])
    side = (x2 - x1) * by**0.5
    x, y = min(x1, 1 - side), min(y1, 1 - side)
    return (x, y, x + side, y + side)


def test_an_honest_policy_gives_every_figure_and_no_warning():
    guards, figures = after(lambda record, honest: honest)
    assert set(figures) == set(GUARDS)
    assert guards.warnings(figures) == []
    assert figures["guard/box_area_ratio"] == pytest.approx(1, abs=0.1)
    assert figures["guard/length_ratio"] == pytest.approx(1, abs=0.1)
    assert figures["guard/whole_image_boxes"] == figures["guard/extra_boxes"] == figures["guard/missing_boxes"] == 0
    assert figures["guard/top_skeleton"] < 0.2
    assert figures["guard/distinct_coordinates"] > 60


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
    guards, figures = after(policy)
    if value is not None:
        assert figures[name] == pytest.approx(value, rel=0.05)
    warned = guards.warnings(figures)
    assert [text for text in warned if text.startswith(f"{name} is ")]
    assert guards.warnings(figures) == []


def test_no_warning_before_the_window_is_full_and_the_window_moves():
    guards, figures = after(lambda record, honest: ["nodule"] * 4, questions=7, window=8)
    assert guards.warnings(figures) == []
    assert figures["guard/missing_boxes"] == 1.0
    for seed in range(8):
        record, honest = study(seed)
        see(guards, honest, record)
    assert guards.figures()["guard/missing_boxes"] == 0.0
    assert Guards().figures() == {}


def test_padding_is_no_part_of_the_image():
    """A 200 x 100 image fills half of the square: a box around all of it has an area of 0.5 there."""
    wide = ImageGeometry(200, 100)
    whole, half = "[0.00, 0.25, 1.00, 0.75]", "[0.00, 0.25, 0.50, 0.75]"
    record = make_record([[10, 10, 60, 60]], geometry=wide)
    guards = Guards()
    see(guards, [whole, half], record, wide)
    assert guards.figures()["guard/whole_image_boxes"] == 0.5
    guards = Guards()
    see(guards, [whole, whole], make_record([[0, 0, 200, 100]], geometry=wide), wide)
    assert guards.figures()["guard/whole_image_boxes"] == 0.0, "here the lesion is as large as that"


def test_a_study_without_lesion_counts_its_boxes_and_has_no_area_to_compare():
    guards = Guards()
    see(guards, ["No, nothing.", "[0.1, 0.1, 0.2, 0.2]"], make_record([]))
    figures = guards.figures()
    assert figures["guard/extra_boxes"] == 0.5
    assert "guard/box_area_ratio" not in figures


def test_the_area_ratio_weighs_half_and_double_alike():
    guards = Guards()
    see(guards, ["[0.1, 0.1, 0.3, 0.5] nodule", "[0.1, 0.1, 0.5, 0.9] nodule"], make_record([[10, 10, 50, 50]]))
    assert guards.figures()["guard/box_area_ratio"] == pytest.approx(1.0)


def test_vision_relevance_against_the_area_and_the_iou():
    attention, covers = [0.3, 0.2, 0.1, None, 0.0], [0.1, 0.1, 0.1, 0.0, 0.2]
    figures = vision_relevance_figures(attention, covers, [0.9, 0.5, 0.1, 1.0, 1.0])
    assert figures == pytest.approx(dict(zip(VISION_RELEVANCE, (2.0, 1.0))))
    assert vision_relevance_figures(attention, covers, [0.1, 0.5, 0.9, 1.0, 1.0])[VISION_RELEVANCE[1]] == -1
    # A large lesion draws more without being looked at: attention in proportion to the area is no correlation.
    assert set(vision_relevance_figures([0.1, 0.4, 0.2], [0.1, 0.4, 0.2], [0.1, 0.9, 0.5])) == {VISION_RELEVANCE[0]}


@pytest.mark.parametrize(
    ("attention", "overlaps"),
    [([0.1, 0.2], [0.1, 0.2]), ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5]), ([0.2, 0.2, 0.2], [0.1, 0.2, 0.3])],
    ids=["two", "equal IoU", "equal attention"],
)
def test_no_correlation_is_made_up(attention, overlaps):
    assert list(vision_relevance_figures(attention, [0.1] * len(attention), overlaps)) == [VISION_RELEVANCE[0]]
    assert vision_relevance_figures([None, 0.0], [0.1, 0.1], [0.0, 1.0]) == {}


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
