"""labelme JSON: one file per image with its ``shapes``, in pixels; a file without shapes is negative."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Optional

from pydantic import Field

from umed_plugin.data.annotations.base import Annotated, check_normal, drop_box, is_pixels, stated_size
from umed_plugin.data.annotations.finding import ImageFolders, matching_files
from umed_plugin.data.annotations.shapes import Point, extent, points_of
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.data.texts import read_json
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box

_WITHOUT_AREA = ("point", "points", "line", "linestrip")


class LabelmeOptions(ReaderOptions):
    """labelme JSON: one file per image. ``files`` is a pattern of JSON files. Rectangles, polygons, circles and masks become
    boxes; shapes of one label and ``group_id`` are one lesion.
    """

    names_images_ = True
    yaml_example_ = """
annotations:
  reader: labelme
  files: annotated/*.json
"""

    no_finding: list[str] = Field(
        [],
        description="Flags of a file that say that the image has no lesion. An image without a shape is left out if it has other "
        "flags set, or, where this is given, none of these.",
    )


@register_reader("labelme", LabelmeOptions)
def read_labelme(options: LabelmeOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read every JSON file. ``imagePath`` counts from the file's own folder, or ``image_root``; ``imageData`` is not read."""
    items: list[Annotated] = []
    folders: dict[tuple[str, Path], ImageFolders] = {}
    for split, pattern in options.files.items():
        for path in matching_files(root, pattern, faults):
            before = len(faults.messages)
            content = faults.read(read_json, path)
            if len(faults.messages) > before:
                continue
            if (split, path.parent) not in folders:
                folders[split, path.parent] = ImageFolders(options, root, split, path.parent, faults)
            item = _item(path, content, folders[split, path.parent], options, faults)
            if item is not None:
                item.split = split
                items.append(item)
    return items


def _item(
    path: Path, content: Any, folders: ImageFolders, options: LabelmeOptions, faults: Faults
) -> Optional[Annotated]:
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        faults.add(path, "has no list 'shapes'. Is it labelme?")
        return None
    image = content.get("imagePath")
    if not isinstance(image, str) or not image.strip():
        faults.add(path, f"imagePath is {image!r}; needed: the image's file")
        return None
    # Written on Windows, or on another machine: there only the name counts.
    written = image.strip().replace("\\", "/")
    is_elsewhere = written.startswith("/") or re.match(r"[A-Za-z]:", written)
    names = [written.rsplit("/", 1)[-1]] if is_elsewhere else [written, written.rsplit("/", 1)[-1]]
    item = Annotated(folders.find(names), [], [], str(path), _size(path, content, faults))
    grouped: dict[tuple[str, str], list[Box]] = {}
    for number, shape in enumerate(shapes):
        read = _shape(f"{path} shape {number}", shape, item, faults)
        if read is not None:
            label, group, box = read
            grouped.setdefault((label, group or f" {number}"), []).append(box)
    for (label, _), boxes in grouped.items():
        item.boxes.append(extent([point for x1, y1, x2, y2 in boxes for point in ((x1, y1), (x2, y2))]))
        item.classes.append(label)
        if len(boxes) > 1:
            faults.left_out["shapes", "parts of one lesion by their group_id, joined into one box"] += len(boxes) - 1
    flags = _flags(path, content, faults)
    check_normal(item, sorted(flags), options.no_finding, faults)
    if not item.boxes and not flags <= set(options.no_finding):
        item.left_out = "has a flag, but no shape; annotations.no_finding"
    elif options.no_finding and not (flags or item.boxes or item.dropped_boxes):
        item.left_out = "has no shape, and none of annotations.no_finding"
    return item


def _flags(path: Path, content: dict[str, Any], faults: Faults) -> set[str]:
    """The flags that the file sets."""
    flags = content.get("flags") or {}
    if not isinstance(flags, dict):
        faults.add(path, f"flags are {_short(flags)}; needed: an object of names, each true or false")
        return set()
    return {name for name, value in flags.items() if value}


def _size(path: Path, content: dict[str, Any], faults: Faults) -> Optional[tuple[int, int]]:
    sides = [content.get(name) or 0 for name in ("imageWidth", "imageHeight")]
    if not all(map(is_pixels, sides)):
        faults.add(path, f"imageWidth and imageHeight are {sides}; needed: whole numbers of pixels")
        return None
    return stated_size(*sides)


def _shape(where: str, shape: Any, item: Annotated, faults: Faults) -> Optional[tuple[str, str, Box]]:
    """Label, group and box of a shape; None after a fault, or if the shape has no area."""
    label = shape.get("label") if isinstance(shape, dict) else None
    points = points_of(shape.get("points")) if isinstance(shape, dict) else None
    if not isinstance(label, (str, int)) or isinstance(label, bool) or label == "" or points is None:
        faults.add(where, f"is {_short(shape)}; needed: a label, and points [[x, y], ...] in pixels")
        return None
    kind = shape.get("shape_type") or "polygon"
    if kind in _WITHOUT_AREA:
        drop_box(item, f"shape_type {kind}, which has no area", faults)
        return None
    box = _box(kind, points)
    if box is None:
        faults.add(
            where,
            f"is a {kind!r} of {len(points)} points. Allowed: rectangle (2 or 4 points), polygon (3 or more), circle (2: centre "
            "and edge), mask (2)",
        )
        return None
    group = shape.get("group_id")
    return str(label), "" if group is None else str(group), box


def _box(kind: str, points: list[Point]) -> Optional[Box]:
    if kind == "circle" and len(points) == 2:
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return x - radius, y - radius, x + radius, y + radius
    if kind == "mask" and len(points) == 2:
        x1, y1, x2, y2 = extent(points)
        return x1, y1, x2 + 1, y2 + 1  # its corners are the first and the last pixel
    if (kind == "rectangle" and len(points) in (2, 4)) or (kind in ("polygon", "rotation") and len(points) >= 3):
        return extent(points)
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
