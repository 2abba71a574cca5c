"""Pictures of held-out studies: what is drawn and where, and that TensorBoard and W&B get it from a real run."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.drawn import scene, write_png
from support.records import grounded_records
from support.umed_runs import reward

from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.training.validation_pictures import (
    ANSWERED,
    TRUE,
    PictureLog,
    Shown,
    chosen_for_pictures,
    with_boxes,
)


def test_boxes_are_drawn_where_they_are() -> None:
    drawn = np.asarray(
        with_boxes(Image.new("RGB", (401, 401)), [(0.25, 0.5, 0.75, 1.0)], [(0.0, 0.0, 0.1, 0.1), (0.3,) * 4])
    )
    rows, columns = np.nonzero((drawn == TRUE).all(axis=2))
    assert (columns.min(), columns.max(), rows.min()) == pytest.approx((100, 300, 200), abs=1)
    rows, columns = np.nonzero((drawn == ANSWERED).all(axis=2))
    assert columns.max() <= 42 and rows.max() <= 42, "a box without area is not drawn"
    edge = (drawn[0, :41] == ANSWERED).all(axis=1)
    assert 10 < edge.sum() < 35, "dashed"


def test_studies_with_a_lesion_come_first() -> None:
    records = [{"objects": {"bbox": [[0, 0, 1, 1]] * (n % 2)}} for n in range(6)]
    assert chosen_for_pictures(records, [0, 1, 2, 5], 2) == {1, 5}
    assert chosen_for_pictures(records, [0, 1, 2], 2) == {0, 1} and chosen_for_pictures(records, [0, 1], 0) == set()


def test_a_picture_that_is_gone_is_said_once_and_the_others_are_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.integrations import TensorBoardCallback

    record = {"objects": {"ref": ["cyst"], "bbox": [[10, 10, 50, 40]]}, "terms": {"cyst": ["cyst"]}}
    geometry = ImageGeometry(97, 61, "pad")
    score = score_answer("A cyst at [0.10, 0.20, 0.50, 0.60].", record, geometry)
    images = [write_png(tmp_path / "a.png", scene()), tmp_path / "gone.png"]
    studies = [Shown(f"d/{image.name}", image, None, geometry, "a\ncyst", score) for image in images]
    sent = []

    class Writer:
        def add_image(self, *args: object, **_: object) -> None:
            sent.append(args)

        add_text = add_image

    callback = TensorBoardCallback.__new__(TensorBoardCallback)
    callback.tb_writer = Writer()
    log = PictureLog()
    for step in (0, 5):
        log.log(step, studies, [callback, object()])
    assert [(args[0], args[2]) for args in sent] == [
        ("val/d/a.png", 0),
        ("val/answers", 0),
        ("val/d/a.png", 5),
        ("val/answers", 5),
    ]
    assert sent[1][1] == f"d/a.png: IoU {score.set_iou:.2f}, right diagnosis. a cyst"
    assert capsys.readouterr().err.count("gone.png") == 1


@pytest.mark.run
@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_run_shows_its_held_out_studies(
    package: str, tiny_mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    records = grounded_records(tmp_path / "data")
    every = json.loads(records.read_text())
    held_out = [{**record, "id": f"held out {n}", "split": "val"} for n, record in enumerate(every[:3])]
    records.write_text(json.dumps([{**record, "split": "train"} for record in every] + held_out))
    (records.parent / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(Path(find_spec(package).origin).parent.parent)!r})\n"
    )
    more = ["--report_to", package, "--logging_dir", str(tmp_path / "logs"), "--max_steps", "2", "--save_steps", "9"]
    run = reward(tiny_mistral, records, tmp_path / "out", *more, "--umed_val_every", "1", "--umed_val_pictures", "2")
    assert run.returncode == 0, run.stderr[-3000:]
    if package == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0, "tensors": 0})
        events.Reload()
        tags = events.Tags()["images"]
        assert len(tags) == 2 and all(tag.startswith("val/held out") for tag in tags)
        shown = events.Images(tags[0])
        assert [image.step for image in shown] == [0, 1, 2]
        picture = np.asarray(Image.open(io.BytesIO(shown[0].encoded_image_string)).convert("RGB"))
        assert picture.shape[0] == picture.shape[1] and (picture == TRUE).all(axis=2).sum() > 20
    else:
        (files,) = tmp_path.glob("wandb/offline-run-*/files/media")
        assert len(list(files.glob("images/val/pictures_*.png"))) == 6
        boxes = [json.loads(file.read_text()) for file in files.rglob("*.boxes2D.json")]
        assert any(box["box_data"] for box in boxes) and all("class_labels" in box for box in boxes)
