"""What an answer's numbers are: a box in any spelling that models write, an attempt at one, or prose."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umed_plugin.grounding import box_text, box_tokens, written_box
from umed_plugin.grounding.boxes import blot_boxes, parse_boxes, rewrite_boxes
from umed_plugin.grounding.dialects import DIALECTS, LLAVA, find_dialect
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.rewards.guard_limits import crossed_limits
from umed_plugin.rewards.guards import Guards

BOX = (0.16, 0.28, 0.47, 0.59)
SQUARE = ImageGeometry(100, 100)
TERMS = {"nodule": ["nodule"]}
NODULE = {"objects": {"ref": ["nodule"], "bbox": [[16, 28, 47, 59]]}, "terms": TERMS}
NEGATIVE = {
    "objects": {"ref": [], "bbox": []},
    "terms": TERMS,
    "conversations": [{"value": "Anything?"}, {"value": "No."}],
}

SPELLINGS = [
    "<0.16, 0.28, 0.47, 0.59>",
    "⟨0.16; 0.28; 0.47; 0.59⟩",
    "〈0.16、0.28、0.47、0.59〉",
    "<16%, 28%, 47%, 59%>",
    "<0.16, 0.28>, <0.47, 0.59>",
    "[0.16, 0.28, 0.47, 0.59,]",
    "[+0.16, 0.28, 0.47, 0.59]",
    "[[0.16, 0.28], [0.47, 0.59]]",
    "[16%, 28%, 47%, 59%]",
    "[0.16，0.28，0.47，0.59]",
    '{"x1": 0.16, "y1": 0.28, "x2": 0.47, "y2": 0.59}',
    '{"y2": 0.59, "x2": 0.47, "y1": 0.28, "x1": 0.16}',
    "x1=0.16, y1=0.28, x2=0.47, y2=0.59",
    "<loc_160><loc_280><loc_470><loc_590>",
    "[0,16, 0,28, 0,47, 0,59]",
    "[0,16; 0,28; 0,47; 0,59]",
    "[0,16,0,28,0,47,0,59]",
    '{"xmin": 0.16, "ymin": 0.28, "xmax": 0.47, "ymax": 0.59}',
    '{"bbox_2d": [160, 280, 470, 590], "label": "nodule"}',
    "(0.16, 0.28), (0.47, 0.59)",
    "((0.16, 0.28), (0.47, 0.59))",
    "[(0.16, 0.28), (0.47, 0.59)]",
    "from (0.16, 0.28) to (0.47, 0.59)",
    "（0.16, 0.28, 0.47, 0.59）",
    "【0.16、0.28、0.47、0.59】",
    "[０．１６，０．２８，０．４７，０．５９]",
    "[0.16 0.28 0.47 0.59]",
    "[0.16; 0.28; 0.47; 0.59]",
    "{0.16, 0.28, 0.47, 0.59}",
    "\\[0.16, 0.28, 0.47, 0.59\\]",
    "$[0.16, 0.28, 0.47, 0.59]$",
    "**[0.16, 0.28, 0.47, 0.59]**",
    "[**0.16**, **0.28**, **0.47**, **0.59**]",
    '["0.16", "0.28", "0.47", "0.59"]',
    "<box>0.16 0.28 0.47 0.59</box>",
    "<box>[0.16, 0.28, 0.47, 0.59]</box>",
    "<box>(160,280),(470,590)</box>",
    "<|box_start|>(160,280),(470,590)<|box_end|>",
    "<|det|>[[160, 280, 470, 590]]<|/det|>",
    "<bbox>160, 280, 470, 590</bbox>",
    "[160, 280, 470, 590]",
    "(160, 280, 470, 590)",
    "[[160,280,470,590]]",
    "[160.0, 280.0, 470.0, 590.0]",
    "<loc0287><loc0164><loc0604><loc0481>",
    "<x16><y28><x47><y59>",
    '{"x": 0.16, "y": 0.28, "width": 0.31, "height": 0.31}',
    '{"left": 0.16, "top": 0.28, "right": 0.47, "bottom": 0.59}',
    "xmin: 0.16\nymin: 0.28\nxmax: 0.47\nymax: 0.59",
    "[0.16,\n 0.28,\n 0.47,\n 0.59\n]",
    "[.16, .28, .47, .59]",
    "[1.6e-1, 2.8e-1, 4.7e-1, 5.9e-1]",
    "[ 0.16 , 0.28 , 0.47 , 0.59 ]",
    "[0.16,, 0.28, 0.47, 0.59]",
    "[0.16, 0.28, 0.47, 0.59)",
    "bbox: {x1: 160, y1: 280, x2: 470, y2: 590}",
    "x_min = 0.16, y_min = 0.28, x_max = 0.47, y_max = 0.59",
    '{"x0": 0.16, "y0": 0.28, "x1": 0.47, "y1": 0.59}',
    '```json\n[{"bbox_2d": [160, 280, 470, 590], "label": "nodule"}]\n```',
    "[0.16, 0.28, 0.47, 0.59].",
    "top-left (0.16, 0.28), bottom-right (0.47, 0.59)",
    "[١٦٠, ٢٨٠, ٤٧٠, ٥٩٠]",
    "[16 %, 28 %, 47 %, 59 %]",
    "[16.0%, 28.0%, 47.0%, 59.0%]",
    "{'x1': '0.16', 'y1': '0.28', 'x2': '0.47', 'y2': '0.59'}",
    '{"bbox": [[0.16, 0.28], [0.47, 0.59]]}',
    "<box> <x16> <y28> <x47> <y59> </box>",
    "[ [0.16, 0.28] , [0.47, 0.59] ]",
    "[0.16, 0.28], [0.47, 0.59]",
    '{"bbox": {"xmin": 160, "ymin": 280, "xmax": 470, "ymax": 590}}',
]
ATTEMPTS = [
    "<0.16, 0.28, 0.47",
    "<0.16, 0.28, 0.47, 0.59",
    "<0.16, 0.28, 0.47>",
    "[0.1, 0.2, 0.3, 0.4 [nodule",
    "[0.1, 0.2\x1b[31m",
    "[0.1, 0.2 (see",
    "[0.1, 0.2, 0.3, 0.4",
    "[0.1, 0.2, 0.3",
    "[0.1, 0.",
    "[",
    "[0.1, 0.2, 0.3]",
    "[0.1, 0.2, 0.3, 0.4, 0.5]",
    "x1=0.1, y1=0.2, x2=0.3",
    '{"x1": 0.1, "y1": 0.2, "x2": 0.3',
    "<box>0.1, 0.2</box>",
    "<box>0.1, 0.2, 0.3, 0.4",
    "<loc_100><loc_200><loc_300>",
    "<loc_100><loc_2",
    "[0.1, 0.2, 0.3, 0.4 is a nodule",
    "(0.1, 0.2, 0.3, 0.4",
    "[0.1-0.3, 0.2-0.4]",
    "[nan, 0.2, 0.3, 0.4]",
    "[0.1, 0.2, ..., 0.4]",
    "0.1, 0.2, 0.3, 0.4",
    "<x10><y20><x30>",
    "<box>(100,200),(300",
    "[[0.1, 0.2], [0.3",
    "<patch_index_0044>",
    "[10%, 20%, 30%]",
    "[0.1 / 0.2 / 0.3 / 0.4]",
    "(0.1, 0.2)",
    '{"bbox_2d": [100, 200, 300',
    '{"bbox_2d": [100, 200',
    '"bbox": [',
    "[0.1, 0.2, 0.3, 0.4, nodule]",
    "[0.1, 0.2, 0.3, 0,4]",
    "[0.12, 0.2",
    "(0.1 0.2 0.3)",
    "<box>",
    "[[0.1,0.2],[0.3,0.2],[0.3,0.4],[0.1,0.4]]",
    "[12%, 20%, 35%, 40%",
]
PROSE = [
    "p < 0.05",
    "(p<0.05, n=12)",
    "2 < 3, 4 > 1",
    "see (1, 2, 3, 4)",
    "(12, 20, 35, 40)",
    "[1, 2, 3, 4]",
    "as in [12, 20, 35, 40]",
    "a 3.2 cm x 2.1 cm mass",
    "grade [3]",
    "(3.2 x 2.1 x 1.5 cm)",
    "images (1, 2, 3, 4)",
    "[1]",
    "refs [1, 2, 3]",
    "95% CI [0.5, 0.8]",
    "OR 1.2 (0.9, 1.4)",
    "at 3.2 cm",
    "in 2019, 2020, 2021 and 2022",
    "T1/T2 ratio 0.5, 0.7",
    "BI-RADS 4 (3.2 cm)",
    "(2019, 2020, 2021, 2022)",
    "the lesion measures 12 mm (series 3, image 45)",
    "L1, L2, L3 (1, 2, 3)",
    "ribs 3, 4, 5 and 6",
    "right: 3.2 cm, left: 4.1 cm",
    "width: 3 cm, height: 2 cm",
    "SUV 3.2 (0.5-4.1)",
    "1) no effusion 2) no nodule 3) no mass 4) normal",
    "score [2/5]",
    "labs (13.5, 4.2, 1.1, 30.9)",
    "100% (4/4)",
    "Hounsfield units (-20, 40)",
    "segments (5, 6, 7, 8)",
    "segments [2, 3, 6, 7]",
    "levels C3, C4, C5, C6",
    "at 10:30, 11:30",
    "2.5 x 3.5 x 4.5 x 5.5",
    "(a) 0.5 (b) 0.6",
    "(see Fig. 1, 2, 3, 4)",
    "[a, b, c, d] []",
    "age 65 (range 40-80)",
    "No box: [] .",
    "seen in slices 12, 20, 35, 40",
    "CT at 120 kV, 200 mA",
    "p < 0.05 (n = 12)",
    "at age 65",
    "blood pressure 120/80",
    "(0.5 cm, 0.6 cm, 0.7 cm, 0.8 cm)",
    "[sic]",
    "e.g. 0.1% to 0.5%",
    "ratio 1:2:3:4",
    "HR 72, RR 16, T 36.6, SpO2 98%",
    "pT1c pN0 (0/12)",
    "at L4-L5 (2, 3)",
    "in areas 1, 2, 3 and 4",
    "(10%, 20%)",
    "Series [12, 20, 35, 40]",
    "an x of 3, a y of 4",
    "x = 3 cm",
    "The x1 lead",
    "windows [0, 80]",
    "lesions at 2 and 4 o'clock",
    "at T5 [3, 4]",
    *("grade 1, 2, 3", "0.5 cm", "(see 1, 2, 3)", "T1, T2, L3", "2.1 x 3.4 x 1.0 cm", "BI-RADS [4]", "[12, 13, 14]"),
    *("at 0.5, 1.0 and 1.5 T", "at 0.12, 0.30, 0.80 mm", "at 0.12, 0.30, 0.80 of it", "at 0.5, 0.6, 0.7"),
    *("p values (0.01, 0.03, 0.04)", "HR 0.80 (0.12, 0.30, 0.80)", "(0.5, 0.6, 0.7)", "at [1, none]", "[0, 80"),
    *(
        "left: 0.5, right: 0.6",
        "left: 0.5 cm, right: 0.6 cm, width: 0.7 cm",
        "left: 3, right: 4, top: 2",
        "x = 3, y = 4",
    ),
    *("bbox: [null, null, null, null]", "in the form [x1, y1, x2, y2]", "at [a, b, c, d]", "at segments [S1, S2]"),
]
# Of a box, although it cannot be read; the whole answer.
MEANT = [
    "Abnormal area at x=0.12, y=0.30, w=0.80",
    "Abnormal area at x: 120, y: 300, w: 80.",
    '[{"x": 0.12, "y": 0.30, "w": 0.4',
    '[{"x": 0.12',
    '[{"left": 0.12, "top": 0.30, "width": 0.4',
    '{"left": 120, "top": 300, "right": 400}',
    "Abnormal area at 0.12, 0.30, 0.80",
    "Abnormal area at [nan, nan, nan, nan].",
    "[nan, nan, nan, nan]",
    "Abnormal area at [x1, y1, x2, y2].",
    "A lesion at [xmin, ymin, xmax, ymax]",
    "Nodule [0",
    "Nodule at [[0",
    "A nodule (0.12, 0.30, 0.80).",
]


@pytest.mark.parametrize("frame", ["{}", "A nodule at {} is seen.", "There is a nodule {}."])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_box_is_read_in_every_spelling(spelling, frame):
    text = frame.format(spelling)
    (box,) = parse_boxes(text)
    assert box == pytest.approx(BOX, abs=0.006)
    score = score_answer(text, NODULE, SQUARE)
    assert score.set_iou > 0.9 and score.unread == 0 and len(score.boxes) == 1
    assert LLAVA.unread(text) == []


@pytest.mark.parametrize("end", ["", ".", " \n"])
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_attempt_at_a_box_is_no_absence(attempt, end):
    text = f"An abnormal area at {attempt}{end}"
    assert parse_boxes(text) == []
    score = score_answer(text, NEGATIVE, SQUARE)
    assert (score.accuracy, score.set_iou, score.unread, len(score.boxes)) == (0.0, 0.0, 1, 1)
    score = score_answer(f"A nodule [0.16, 0.28, 0.47, 0.59]. {text}", NODULE, SQUARE)
    assert score.set_iou == pytest.approx(0.5), "a second box, which overlaps nothing"
    assert len(LLAVA.unread(text)) == 1


@pytest.mark.parametrize("text", MEANT)
def test_what_was_meant_as_a_box_is_no_absence(text):
    score = score_answer(text.replace("nodule", "lesion").replace("Nodule", "Lesion"), NEGATIVE, SQUARE)
    assert (score.accuracy, score.unread, len(score.boxes)) == (0.0, 1, 1)


def test_names_in_place_of_numbers_beside_a_box_say_how_it_is_written():
    assert LLAVA.read_all("The box [x1, y1, x2, y2] is [0.1, 0.2, 0.3, 0.4].", 100, 100) == [(0.1, 0.2, 0.3, 0.4)]


@pytest.mark.parametrize("frame", ["{}", "A nodule {}.", "{}, which is normal"])
@pytest.mark.parametrize("prose", PROSE)
def test_numbers_of_prose_are_no_box(prose, frame):
    text = frame.format(prose)
    score = score_answer(text.replace("nodule", "lung"), NEGATIVE, SQUARE)
    assert (score.accuracy, score.set_iou, score.boxes) == (1.0, 1.0, [])
    beside = score_answer(f"A nodule at [0.16, 0.28, 0.47, 0.59]. {text}", NODULE, SQUARE)
    assert beside.set_iou == pytest.approx(1.0)


@pytest.mark.parametrize("unit", ["100", "1000", "1024", "pixels"])
def test_bare_numbers_are_a_box_in_a_dialect_of_their_unit(unit):
    dialect = find_dialect(f"xyxy,{unit},square")
    side = 100.0 if unit == "pixels" else float(unit)
    assert dialect.read("A nodule (12, 20, 35, 41).", 100, 100) == [
        pytest.approx((12 / side, 20 / side, 35 / side, 41 / side))
    ]
    assert dialect.read("A nodule, see (1, 2, 3, 4) and [5, 6, 7, 8].", 100, 100) == []
    assert dialect.read("A nodule at (1, 2, 3, 4).", 100, 100) == [
        pytest.approx((1 / side, 2 / side, 3 / side, 4 / side))
    ]


def test_named_numbers_keep_their_order_in_a_dialect_of_another_order():
    coco = DIALECTS["coco"]
    assert coco.read('{"x1": 16, "y1": 28, "x2": 47, "y2": 59}', 100, 100) == [pytest.approx(BOX)]
    assert coco.read('{"x": 16, "y": 28, "w": 31, "h": 31}', 100, 100) == [pytest.approx(BOX)]
    assert coco.read("[16, 28, 31, 31]", 100, 100) == [pytest.approx(BOX)]
    assert coco.read("[16%, 28%, 31%, 31%]", 100, 100) == [pytest.approx(BOX)]
    assert find_dialect("yxyx,1000,image").read("[280, 160, 590, 470]", 100, 100) == [pytest.approx(BOX)]


def test_several_boxes_keep_their_order_beside_an_attempt():
    text = (
        "At [0.1, 0.1, 0.2, 0.2], <box>(300,300),(400,400)</box>, [0.5, 0.5, 0.5], [0.6, 0.6, 0.7, 0.7]; [0.8, 0.8, 0.9"
    )
    assert [round(box[0], 1) for box in parse_boxes(text)] == [0.1, 0.3, 0.6]
    read = LLAVA.read_all(text, 100, 100)
    assert [None if box is None else round(box[0], 1) for box in read] == [0.1, 0.3, None, 0.6, None]
    assert rewrite_boxes("a [0.1, 0.1, 0.2, 0.2] b <box>(300,300),(400,400)</box>.", lambda box: "B") == "a B b B."
    assert blot_boxes("a [0.1, 0.1, 0.2, 0.2] b [0.1, 0.2", "B") == "a B b B"


def test_what_could_not_be_read_is_named_with_the_place():
    assert LLAVA.unread("A nodule, see (12, 20, 35, 40).") == ["(12, 20, 35, 40)"]
    assert LLAVA.unread("A nodule at [0.1, 0.2") == ["[0.1, 0.2"]
    assert DIALECTS["qwen_vl"].unread("A nodule, see (12, 20, 35, 40).") == []


def test_guards_count_boxes_that_could_not_be_read():
    guards = Guards(window=1)
    texts = ["At [0.1, 0.2, 0.3", "Normal."]
    scores = [score_answer(text, NEGATIVE, SQUARE) for text in texts]
    guards.add(texts, scores, [NEGATIVE] * 2, [SQUARE] * 2)
    metrics = guards.metrics()
    assert (metrics["guard/unread_boxes"], metrics["guard/malformed_boxes"]) == (0.5, 1.0)
    assert "guard/unread_boxes" in crossed_limits(metrics)


@given(st.text(alphabet="[](){}<>,.;0123456789 %-+boxyatlc_1=:\"'/|\n，", max_size=60))
def test_scanning_never_raises(text):
    found = box_text.scan(text)
    assert all(0 <= box.start < box.end <= len(text) for box in found)
    assert len(LLAVA.read_all(text, 100, 50)) <= len(found)


HOSTILE = [
    "<1, 1, 1",
    *(
        "[",
        "(",
        "[0.1, ",
        "[[0.1,0.2],",
        "<box>",
        "</box>[",
        "x1=0.1, ",
        "0.1 ",
        "<loc_1>",
        '{"x1": 0.1',
        "1",
        ".",
        "a [",
        "at ",
    ),
    *(" ", "\t[", "% ", "<x1>", "- ", "(0.1,0.2)", "_", "x_", '"x1"    ', "[0.1 0.2 0.3 0.4 a ", "0.1 0.2 0.3 0.4 a "),
    *("a (0.12, 0.30, 0.80) ", "at 0.12, 0.30, 0.80. ", "x=0.1, y=0.2, w=0.3 a ", "[nan, ", "at [x1, y1, x2, y2] "),
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_the_work_to_find_boxes_grows_as_the_text_does(piece):
    """Lines of Python that run: what a clock would measure, on any machine."""
    files = {module.__file__ for module in (box_text, box_tokens, written_box)}

    def work(length: int) -> int:
        lines = 0

        def count(frame, event, _):
            nonlocal lines
            if frame.f_code.co_filename not in files:
                return None
            lines += event == "line"
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            box_text._scan.__wrapped__((piece * length)[:length])
        finally:
            sys.settrace(before)
        return lines

    short, long = work(400), work(4000)
    assert long < 1.2 * 10 * short + 100
