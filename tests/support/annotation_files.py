"""Small annotation files of every format, without the images: what tests of mistakes write, and how they read it.

Most of the mistakes are from public reports on COCO, VOC, YOLO, CSV and masks. No test of them shows an image, so that
none needs torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from support.drawn import write_recipe
from umed_plugin.data.annotations import AnnotationSet, read_annotations
from umed_plugin.data.recipes.recipe import load_recipe

ALL_IN_TRAIN = "{by: patient, fractions: {train: 1}}"
CSV = "{reader: csv, files: a.csv, columns: {file: f, box: [x1, y1, x2, y2], lesion: c}%s}"
COCO = "{reader: coco, files: a.json%s}"
JSON = "{reader: json, files: a.json, image: '{key}', boxes: b, box: at, only_class: nod%s}"
VOC = "{reader: voc, files: 'xml/*.xml', image_root: img%s}"
YOLO = "{reader: yolo, files: labels, image_root: images, names: [nod, cy]%s}"
MASK = "{reader: mask, files: 'i/*.png', masks: 'm/{stem}.png', only_class: nod%s}"
HEAD = "f,x1,y1,x2,y2,c\n"
BOX = (10.0, 20.0, 30.0, 40.0)
OTHER = (50.0, 50.0, 70.0, 70.0)


def put(path: Path, content: Any = b"") -> None:
    """Write a picture, bytes or text; an empty file stands for an image, which is not opened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode())


def read(folder: Path, annotations: str, split: str = ALL_IN_TRAIN, extra: str = "") -> AnnotationSet:
    """What a recipe with these annotations reads; ``extra`` is further YAML at the top level."""
    return read_annotations(load_recipe(write_recipe(folder, annotations, split, extra)))


def boxes(found: AnnotationSet) -> dict[str, list[tuple[float, ...]]]:
    """Name of the image below the data root -> its boxes; no fault may have been found."""
    assert found.faults.messages == []
    return {os.path.relpath(item.image, found.root): item.boxes for item in found.items}


def coco(folder: Path, images: list[Any], annotations: list[Any], **more: Any) -> None:
    """Images are (id, file), annotations (image, bbox, further fields)."""
    content = {
        "images": [{"id": i, "file_name": name, "width": 100, "height": 80} for i, name in images],
        "annotations": [
            {"id": i, "image_id": image, "category_id": 1, "bbox": box, **fields}
            for i, (image, box, fields) in enumerate(annotations)
        ],
        "categories": [{"id": 1, "name": "nod"}],
    }
    put(folder / "a.json", json.dumps({**content, **more}))


def xml(name: str, *objects: str, size: str = "") -> str:
    """A file of Pascal VOC."""
    return f"<annotation><filename>{name}</filename>{size}{''.join(objects)}</annotation>"


def an_object(box: tuple[int, ...] = (11, 21, 30, 40), more: str = "") -> str:
    """An object of Pascal VOC: corners from 1, the last pixel included; the default is `BOX`."""
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>nod</name>{more}<bndbox>{corners}</bndbox></object>"


def two_regions(first: int, second: int) -> np.ndarray:
    """A mask whose two squares have these values; the second is `OTHER`."""
    values = np.zeros((80, 100), np.uint8)
    values[10:30, 10:30], values[50:70, 50:70] = first, second
    return values
