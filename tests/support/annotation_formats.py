"""The same two images and their lesions in every annotation format, and how a recipe reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from support.drawn import BOX, HEIGHT, WIDTH, scene, write_png, write_recipe
from umed_plugin.data.annotations import Annotated, AnnotationSet, read_annotations
from umed_plugin.data.recipes.recipe import load_recipe

X1, Y1, X2, Y2 = BOX
SECOND = (60, 30, 70, 55)
CSV = "{reader: csv, files: a.csv, columns: {file: file, box: [x1, y1, x2, y2], lesion: lesion}%s}"


def two_images(folder: Path) -> Path:
    """pos.png with two lesions, neg.png without."""
    write_png(folder / "pos.png", scene())
    write_png(folder / "neg.png", scene() * 0.3)
    return folder


def read(folder: Path, annotations: str, split: str = "{by: patient}", extra: str = "") -> AnnotationSet:
    """What a recipe with these annotations reads; ``extra`` is further YAML at the top level."""
    return read_annotations(load_recipe(write_recipe(folder, annotations, split, extra)))


def by_name(found: AnnotationSet) -> dict[str, Annotated]:
    """Name of the image -> what is annotated there; no fault may have been found."""
    assert found.faults.messages == []
    return {item.image.name: item for item in found.items}


def write_coco(folder: Path, **changes: Any) -> None:
    """A file of COCO; ``changes`` take the place of its lists."""
    content = {
        "images": [
            {"id": 5, "file_name": "pos.png", "width": WIDTH, "height": HEIGHT},
            {"id": 6, "file_name": "neg.png", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 1, "name": "nod"}, {"id": 2, "name": "cy"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 1, "bbox": [X1, Y1, X2 - X1, Y2 - Y1]},
            {"id": 2, "image_id": 5, "category_id": 2, "bbox": [60, 30, 10, 25]},
        ],
    }
    (folder / "a.json").write_text(json.dumps({**content, **changes}))


def coco(folder: Path) -> str:
    """COCO's form: corner and size. Each of these functions writes the files and returns the recipe's annotations."""
    write_coco(folder)
    return "{reader: coco, files: a.json}"


def voc(folder: Path) -> str:
    """Pascal VOC counts from 1 and includes the last pixel."""
    (folder / "xml").mkdir()
    for name, boxes in (("pos", [("nod", BOX), ("cy", SECOND)]), ("neg", [])):
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax>"
            f"<ymax>{y2}</ymax></bndbox></object>"
            for label, (x1, y1, x2, y2) in boxes
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        (folder / "xml" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.png</filename>{size}{objects}</annotation>"
        )
    return "{reader: voc, files: 'xml/*.xml'}"


def yolo(folder: Path) -> str:
    """YOLO's form: centre and size in fractions, classes by number."""
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text("names: [cy, nod]\n")
    lines = [
        f"1 {(X1 + X2) / 2 / WIDTH} {(Y1 + Y2) / 2 / HEIGHT} {(X2 - X1) / WIDTH} {(Y2 - Y1) / HEIGHT}",
        # A polygon, as the segmentation variant of YOLO writes it.
        f"0 {60 / WIDTH} {30 / HEIGHT} {70 / WIDTH} {40 / HEIGHT} {65 / WIDTH} {55 / HEIGHT}",
    ]
    (folder / "labels" / "pos.txt").write_text("\n".join(lines))
    return "{reader: yolo, files: labels, image_root: '.', names: data.yaml}"


def csv_xyxy(folder: Path) -> str:
    """A row for each box, with corners in pixels."""
    (folder / "a.csv").write_text(
        f"file,x1,y1,x2,y2,lesion\npos.png,{X1},{Y1},{X2},{Y2},nod\nneg.png,,,,,\npos.png,60,30,70,55,cy\n"
    )
    return CSV % ""


def json_by_image(folder: Path) -> str:
    """Kvasir-SEG's form: an object of image name -> entry."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    boxes = [{"label": label, **dict(zip(keys, box))} for label, box in (("nod", BOX), ("cy", SECOND))]
    entries = {name: {"height": HEIGHT, "width": WIDTH, "bbox": found} for name, found in (("pos", boxes), ("neg", []))}
    (folder / "a.json").write_text(json.dumps(entries))
    return (
        "{reader: json, files: 'a*.json', image: '{key}.png', boxes: bbox, box: [xmin, ymin, xmax, ymax], lesion: label, "
        "size: [width, height]}"
    )


def mask(folder: Path) -> str:
    """A mask beside each image, with a value for each class."""
    (folder / "masks").mkdir()
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[Y1:Y2, X1:X2] = 1
    labels[30:55, 60:70] = 2
    Image.fromarray(labels).save(folder / "masks" / "pos_mask.png")
    Image.fromarray(labels * 0).save(folder / "masks" / "neg_mask.png")
    return "{reader: mask, files: '*.png', masks: 'masks/{stem}_mask.png', values: {1: nod, 2: cy}}"
