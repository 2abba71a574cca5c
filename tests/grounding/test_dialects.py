"""The ways in which other models write boxes, by hand, and through the scorer that rewards and evaluation share."""

from __future__ import annotations

import pytest

from umed_plugin.errors import UsageError
from umed_plugin.grounding.boxes import parse_boxes
from umed_plugin.grounding.dialects import DIALECTS, LLAVA, find_dialect
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import boxes_in_square, score_answer

# 200 x 100: in the square of 200 it lies at y 50 to 150. The box of all cases, in pixels of the image:
WIDE = ImageGeometry(200, 100, "pad")
BOX = (20, 10, 60, 50)
IN_SQUARE = (0.1, 0.3, 0.3, 0.5)


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        ("llava", "[0.10, 0.30, 0.30, 0.50]"),
        ("shikra", "A nodule[0.100,0.300,0.300,0.500]"),
        ("llava", "<box>(100,300),(300,500)</box>"),
        ("qwen_vl", "<ref>nodule</ref><box>(100,100),(300,500)</box>"),
        ("qwen_vl", "<|box_start|>(100,100),(300,500)<|box_end|>"),
        ("internvl", "<ref>nodule</ref><box>[[100, 100, 300, 500]]</box>"),
        ("qwen2_5_vl", '```json\n[{"bbox_2d": [20, 10, 60, 50], "label": "nodule"}]\n```'),
        ("radvlm", "nodule at [0.10, 0.10, 0.30, 0.50]"),
        ("coco", "[20, 10, 40, 40]"),
        ("paligemma", "<loc0102><loc0102><loc0512><loc0307> nodule"),
        ("xywh,1000,image", "[100, 100, 200, 400]"),
        ("cxcywh,1,square", "[0.2, 0.4, 0.2, 0.2]"),
        ("yxyx,1000,square", "[300, 100, 500, 300]"),
        ("xywh,100,square", "[10, 30, 20, 20]"),
    ],
)
def test_one_box_written_in_many_ways(dialect, text):
    (found,) = boxes_in_square(text, WIDE, find_dialect(dialect))
    assert found == pytest.approx(IN_SQUARE, abs=1.5e-3)
    record = {"objects": {"ref": ["nodule"], "bbox": [list(BOX)]}, "terms": {"nodule": ["nodule"]}}
    score = score_answer(text, record, WIDE, find_dialect(dialect))
    assert score.set_iou > 0.98
    assert score.boxes[0] == pytest.approx(BOX, abs=0.3), "and back in pixels of the image"


def test_bins_have_their_own_unit():
    # Kosmos-2: 32 x 32 cells. 44 is row 1, column 12; 863 is row 26, column 31: from middle to middle.
    (kosmos,) = parse_boxes("<object><patch_index_0044><patch_index_0863></object>")
    assert kosmos == pytest.approx((12.5 / 32, 1.5 / 32, 31.5 / 32, 26.5 / 32))
    (row,) = parse_boxes("<patch_index_0032><patch_index_0035>")
    assert row == pytest.approx((0, 1 / 32, 4 / 32, 2 / 32)), "cells in one row are taken whole"
    (maira,) = parse_boxes("<box><x55><y45><x70><y56></box>")
    assert maira == pytest.approx((0.555, 0.455, 0.705, 0.565))
    assert find_dialect("xywh,pixels,square").read("<x55><y45><x70><y56>", 10, 10) == [maira]


def test_a_box_of_the_image_that_leaves_it_counts_as_wrong():
    read = boxes_in_square("[0.10, 0.50, 0.30, 1.20] and [0.5, 0.5, 0.4, 0.6]", WIDE, DIALECTS["radvlm"])
    assert read == [(0, 0, 0, 0)] * 2
    record = {"objects": {"ref": ["nodule"], "bbox": [list(BOX)]}, "terms": {"nodule": ["nodule"]}}
    assert score_answer("[20, 10, 260, 50]", record, WIDE, DIALECTS["qwen2_5_vl"]).set_iou == 0


def test_a_sum_of_rounded_numbers_may_reach_the_edge():
    dialect = find_dialect("xywh,1,square")
    for start in (0.1, 0.2, 0.3, 0.6, 0.7):
        (box,) = dialect.read(f"[{start}, {start}, {1 - start:.1f}, {1 - start:.1f}]", 10, 10)
        assert box[2] <= 1 and box[3] <= 1
    (outside,) = dialect.read("[0.5, 0.5, 0.51, 0.2]", 10, 10)
    assert outside[2] == pytest.approx(1.01)


def test_what_is_declared_must_exist():
    with pytest.raises(UsageError, match="unknown box dialect 'qwen'.*order,unit,frame"):
        find_dialect("qwen")
    with pytest.raises(UsageError, match="unknown unit of a box dialect '10'"):
        find_dialect("xywh,10,image")
    with pytest.raises(UsageError, match="has 2 parts"):
        find_dialect("xywh,1000")
    assert find_dialect("llava") == LLAVA


def test_the_default_reads_what_rewards_read():
    for text in ("[0.1, 0.2, 0.3, 0.4]", "<box>(1,2),(3,4)</box>", "(100, 200, 1300, 400)", "[0, 0, 1, 1]", "none"):
        assert LLAVA.read(text, 50, 60) == parse_boxes(text)
