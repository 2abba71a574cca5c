"""COCO JSON: boxes as [x, y, width, height] in pixels from 0; an image without annotations is negative."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from umed_plugin.annotations.base import ANNOTATION_READERS, Annotated, image_folder
from umed_plugin.recipe_faults import Faults
from umed_plugin.recipe_options import CocoOptions


@ANNOTATION_READERS.register("coco")
def read_coco(options: CocoOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read one COCO file per split."""
    items: list[Annotated] = []
    for split, name in options.files.items():
        path = root / name
        content = _content(path, faults)
        if content is not None:
            items += _items(content, path, split, image_folder(options, root, split, path.parent), faults)
    return items


def _content(path: Path, faults: Faults) -> Any:
    if not path.is_file():
        faults.add(path, "no such annotation file")
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        faults.add(path, f"not JSON: {error}")
        return None
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        faults.add(path, f"has no {', '.join(missing)}; it holds {', '.join(content) or 'nothing'}. Is it COCO?")
        return None
    return content


def _items(content: Any, path: Path, split: str, folder: Path, faults: Faults) -> list[Annotated]:
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    by_id = {
        image["id"]: Annotated(
            folder / image["file_name"],
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
        box = annotation.get("bbox")
        if annotation.get("image_id") not in by_id:
            faults.add(where, f"image_id {annotation.get('image_id')!r} is not among the images")
        elif annotation.get("category_id") not in names:
            faults.add(where, f"category_id {annotation.get('category_id')!r} is not among {sorted(names)}")
        elif not isinstance(box, list) or len(box) != 4:
            faults.add(where, f"bbox is {box!r}; needed: [x, y, width, height]")
        else:
            item = by_id[annotation["image_id"]]
            x, y, width, height = (float(value) for value in box)
            item.boxes.append((x, y, x + width, y + height))
            item.classes.append(names[annotation["category_id"]])
    return list(by_id.values())
