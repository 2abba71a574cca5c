"""Med-GRIT: its conversations as they are published, and metrics by hand."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from support.benchmark_files import grit, questions_of
from support.benchmark_runs import metrics_of

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
from umed_plugin.grounding.dialects import find_dialect
from umed_plugin.grounding.scoring import Scorer

pytestmark = pytest.mark.one_stack


def test_a_grounding_row_without_a_box_is_left_out_and_named(tmp_path, capsys):
    root = grit(tmp_path / "grit")
    file = root / "test_VG_img_coord.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([*rows, {"id": "ct_1", "conversations": [["Where is it?", "It is not there."]]}]))
    assert sum(question.groups["part"] == "VG" for question in questions_of("med_grit", root)) == len(rows)
    told = capsys.readouterr().err
    assert "med_grit/VG: 1 of 3 rows are left out" in told and "'It is not there.' has no box" in told


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"], ids=["empty", "text", "cut"]
)
def test_an_image_that_cannot_be_read_is_named(tmp_path, content):
    root = grit(tmp_path / "grit")
    (root / "images" / "ct_1.png").write_bytes(content)
    with pytest.raises(UmedError, match="ct_1.png: cannot be read as an image"):
        BENCHMARKS["med_grit"].adapt(questions_of("med_grit", root), Scorer())


def test_a_turned_tiff_has_the_size_that_the_model_sees(tmp_path):
    """Med-GRIT names every image as PNG; some versions of Pillow state a TIFF's sides before they turn it."""
    root, turned = grit(tmp_path / "grit"), Image.Exif()
    turned[274] = 6
    Image.new("RGB", (200, 100)).save(root / "images" / "ct_1.png", "TIFF", exif=turned, compression="tiff_lzw")
    (asked, *_) = BENCHMARKS["med_grit"].adapt(questions_of("med_grit", root), Scorer())
    assert asked.about["size"] == [100, 200]


def test_med_grit_by_hand(tmp_path):
    benchmark, scorer = BENCHMARKS["med_grit"], Scorer()
    questions = {q.id: q for q in benchmark.adapt(questions_of("med_grit", grit(tmp_path / "grit")), scorer)}
    assert questions["VG/ct_1"].text == "Where is liver?"
    # 200 x 100 in a square of 200: the upper left quarter of the image is x 0-0.5, y 0.25-0.5 of the square.
    assert questions["RO/ct_1"].text == "What is at [0.00, 0.25, 0.50, 0.50]?"
    answers = {
        "VG/ct_1": "At [0.00, 0.25, 0.50, 0.50].",
        "VG/mr_1": "[0.00, 0.00, 0.10, 0.05] and [0.50, 0.50, 1.00, 1.00]",  # the first at an IoU of 0.5: not above it
        "RO/ct_1": "the left kidney",
        "MII/ct_1": "The liver is large and bright",
    }
    found = metrics_of("med_grit", list(questions.values()), [answers[one] for one in questions], scorer)
    assert (found["recall_at_50/ct"], found["recall_at_50/mr"], found["recall_at_50"]) == (1, 0.5, 0.75)
    assert found["referring_accuracy"] == 1
    # BLEU 1 each, ROUGE-L 1, METEOR 1 - 0.5 (1/6)^3.
    assert found["mbmr_mii"] == pytest.approx((5 + 1 - 0.5 / 216) / 6)
    # The same boxes in Qwen-VL's way.
    qwen = Scorer(dialect=find_dialect("qwen_vl"))
    answers["VG/ct_1"] = "<ref>liver</ref><box>(0,0),(500,500)</box>"
    found = metrics_of("med_grit", list(questions.values()), [answers[one] for one in questions], qwen)
    assert found["recall_at_50/ct"] == 1
