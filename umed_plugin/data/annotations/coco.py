"""COCO JSON: boxes as [x, y, width, height] in pixels from 0; an image without annotations is negative."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from umed_plugin.data.annotations.base import Annotated, ImageFolders, annotation_file
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.faults import Faults

# Fields that the reader needs of each entry, and their types in JSON.
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,), "width": (int, float), "height": (int, float)},
    "annotations": {"image_id": (int, str), "category_id": (int, str), "bbox": (list,)},
    "categories": {"id": (int, str), "name": (str, int)},
}


class CocoOptions(ReaderOptions):
    """COCO JSON: ``images``, ``annotations`` with ``bbox`` [x, y, width, height], ``categories``."""

    yaml_example_ = """
annotations:
  reader: coco
  files: {train: annotations/train.json, val: annotations/val.json}
  image_root: images
"""


@register_reader("coco", CocoOptions)
def read_coco(options: CocoOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read one COCO file per split."""
    items: list[Annotated] = []
    for split, name in options.files.items():
        path = annotation_file(root, name, faults)
        content = _content(path, faults) if path is not None else None
        if path is not None and content is not None:
            items += _items(content, path, split, ImageFolders(options, root, split, path.parent), faults)
    return items


def _content(path: Path, faults: Faults) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        faults.add(path, f"not JSON: {error}")
        return None
    if not isinstance(content, dict):
        faults.add(
            path, f"holds a {type(content).__name__}; needed: an object with lists {', '.join(_FIELDS)}. Is it COCO?"
        )
        return None
    missing = [key for key in _FIELDS if not isinstance(content.get(key), list)]
    if missing:
        faults.add(path, f"has no {', '.join(missing)}; it holds {', '.join(content) or 'nothing'}. Is it COCO?")
        return None
    wrong = [
        (f"{path} {key}[{number}]", fault)
        for key, fields in _FIELDS.items()
        for number, entry in enumerate(content[key])
        for fault in _entry_faults(entry, fields)
    ]
    for where, fault in wrong:
        faults.add(where, fault)
    return None if wrong else content


def _entry_faults(entry: Any, fields: dict[str, tuple[type, ...]]) -> list[str]:
    if not isinstance(entry, dict):
        return [f"is {entry!r}; needed: an object with {', '.join(fields)}"]
    return [
        f"{name} is {entry.get(name, 'missing')!r}; needed: {' or '.join(kind.__name__ for kind in kinds)}"
        for name, kinds in fields.items()
        if not isinstance(entry.get(name), kinds)
    ]


def _items(content: Any, path: Path, split: str, folders: ImageFolders, faults: Faults) -> list[Annotated]:
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    by_id = {
        image["id"]: Annotated(
            folders.find([image["file_name"]]),
            [],
            [],
            f"{path} image {image['id']}",
            (image["width"], image["height"]),
            split=split,
        )
        for image in content["images"]
    }
    for annotation in content["annotations"]:
        where = f"{path} annotation {annotation.get('id')}"
        box = annotation["bbox"]
        if annotation["image_id"] not in by_id:
            faults.add(where, f"image_id {annotation['image_id']!r} is not among the images")
        elif annotation["category_id"] not in names:
            faults.add(where, f"category_id {annotation['category_id']!r} is not among {list(names)}")
        elif len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
            faults.add(where, f"bbox is {box!r}; needed: [x, y, width, height], numbers in pixels")
        else:
            item = by_id[annotation["image_id"]]
            x, y, width, height = (float(value) for value in box)
            item.boxes.append((x, y, x + width, y + height))
            item.classes.append(names[annotation["category_id"]])
    return list(by_id.values())
