"""Records on disk, with small images, for training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_records(folder: Path, count: int = 8, questions: int = 1) -> Path:
    """``count`` small images (64 x 48) and records with one or two questions each; returns the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        turns = [
            ("human", "<image>\nIs there anything abnormal?"),
            ("gpt", f"There is one abnormal area at [0.1{i % 10}, 0.20, 0.35, 0.40]. It is a nodule."),
            ("human", "Where is it?"),
            ("gpt", "At the top left."),
        ]
        records.append(
            {
                "id": f"record-{i}",
                "image": f"{i}.png",
                "conversations": [{"from": who, "value": text} for who, text in turns[: 2 * questions]],
                "split": "train",
                "provenance": {"image_aspect_ratio": "pad"},
            }
        )
    file = folder / "records.json"
    file.write_text(json.dumps(records))
    return file


def evaluated_records(folder: Path, count: int = 3, mode: str = "pad") -> list[dict]:
    """Records with one box each, of patients of their own, as `umed evaluate` reads them."""
    made = []
    for index in range(count):
        Image.fromarray(np.full((40, 60), 50 * index % 256, np.uint8)).save(folder / f"{index}.png")
        made.append(
            {
                "id": f"r{index}",
                "image": f"{index}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": "A nodule at [0.10, 0.30, 0.40, 0.60]."},
                ],
                "objects": {"ref": ["nodule"], "bbox": [[6, 8, 24, 26]], "bbox_type": "real"},
                "image_size": [60, 40],
                "terms": {"nodule": ["nodule"], "cyst": ["cyst"]},
                "source": "test",
                "modality": "CT",
                "patient": f"p{index}",
                "split": "test",
                "answer_type": "grounded",
                "provenance": {"image_aspect_ratio": mode},
            }
        )
    return made


def grounded_records(folder: Path) -> Path:
    """Records with the true boxes that rewards need: one lesion, two, or none."""
    file = write_records(folder, count=9)
    records = json.loads(file.read_text())
    for i, record in enumerate(records):
        boxes = [[5, 5, 30, 30], [35, 10, 60, 40]][: i % 3]
        record["objects"] = {"ref": ["nodule", "cyst"][: i % 3], "bbox": boxes, "bbox_type": "real"}
        record["terms"] = {"nodule": ["nodule"], "cyst": ["cyst"]}
        record |= {"image_size": [64, 48], "source": "test", "modality": "CT", "patient": str(i)}
        record["answer_type"] = "grounded" if boxes else "negative"
    file.write_text(json.dumps(records))
    return file


def records_of_four_patients(folder: Path, **more: Any) -> Path:
    """Eight records of `grounded_records`, two of each patient, with these keys besides."""
    file = grounded_records(folder)
    kept = [{**record, "patient": f"p{i // 2}"} for i, record in enumerate(json.loads(file.read_text())[:8])]
    file.write_text(json.dumps([{**record, **more} for record in kept]))
    return file
