"""``--benchmark looks:RECIPE``: boxes for a class by its name, and by what it looks like."""

from __future__ import annotations

import pytest
from support.probing import Follows, studies, with_images

from umed_plugin.data.records import record_geometry, save_records, true_boxes
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.evaluator import evaluate
from umed_plugin.grounding.boxes import format_box

pytestmark = pytest.mark.one_stack


def test_both_forms_are_asked_and_their_difference_is_paired(tmp_path):
    looks = {"nodule": "a grey disc"}
    records = [{**record, "looks": looks} for record in with_images(tmp_path, studies(60))]
    save_records(records, tmp_path / "records.json")
    alone = [record for record in records if record["objects"]["ref"] == ["nodule"]]
    boxes = {
        record["image"]: " ".join(map(format_box, record_geometry(record).to_square(true_boxes(record))))
        for record in alone
    }

    def looks_when_told(text, image):
        told = text.endswith("that is a grey disc.") and "0" not in image[-6:]
        return f"nodule at {boxes[image.rsplit('/', 1)[-1]]}" if told else "[0, 0, 1, 1]"

    found = evaluate(Follows(looks_when_told), f"looks:{tmp_path / 'records.json'}")
    assert len(found.predictions) == 2 * len(alone) > 10
    value = {name: entry["value"] for name, entry in found.metrics.items()}
    assert value["mean_iou/described"] > 0.6 and value["mean_iou/bare"] == pytest.approx(0.04, abs=0.02)
    assert value["iou_gain"] == pytest.approx(value["mean_iou/described"] - value["mean_iou/bare"])
    assert found.metrics["iou_gain"]["ci95"][0] > 0.5 and value["iou_gain/nodule"] == value["iou_gain"]
    same = evaluate(Follows(lambda text, image: "[0, 0, 1, 1]"), f"looks:{tmp_path / 'records.json'}")
    assert same.metrics["iou_gain"]["value"] == 0


def test_records_without_looks_are_told(tmp_path):
    save_records(with_images(tmp_path, studies(10)), tmp_path / "records.json")
    with pytest.raises(UmedError, match=r"none of the 10 studies shows one class that the recipe describes"):
        evaluate(Follows(str), f"looks:{tmp_path / 'records.json'}")
