"""CVAT for images 1.1: one XML with an ``image`` element for each image, in pixels; an image without shapes is negative."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Optional

from pydantic import Field

from umed_plugin.data.annotations.base import Annotated, check_normal, drop_box, is_pixels, stated_size
from umed_plugin.data.annotations.finding import ImageFolders, annotation_file
from umed_plugin.data.annotations.shapes import ellipse, extent, numbers, points_of, turned_about_centre
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.data.texts import read_xml
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box

if TYPE_CHECKING:
    from xml.etree import ElementTree

_SHAPES = ("box", "polygon", "ellipse", "mask")
_WITHOUT_BOX = ("polyline", "points", "cuboid", "skeleton")


class CvatOptions(ReaderOptions):
    """CVAT for images 1.1 (``annotations.xml``). Boxes (turned ones too), polygons, ellipses and masks become their boxes."""

    names_images_ = True
    yaml_example_ = """
annotations:
  reader: cvat
  files: annotations.xml
  image_root: images
"""

    no_finding: list[str] = Field(
        [],
        description="Labels of ``tag`` elements that say that the image has no lesion. An image without a shape is left out if "
        "it has other tags, or, where this is given, none of these.",
    )


@register_reader("cvat", CvatOptions)
def read_cvat(options: CvatOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read one XML file per split."""
    items: list[Annotated] = []
    automatic = 0
    for split, name in options.files.items():
        path = annotation_file(root, name, faults)
        tree = faults.read(read_xml, path) if path is not None else None
        if path is None or tree is None or not _is_for_images(tree, path, faults):
            continue
        folders = ImageFolders(options, root, split, path.parent, faults)
        for number, element in enumerate(tree.findall("image")):
            item = _item(element, f"{path} image {element.get('id', number)}", options, folders, faults)
            automatic += sum(shape.get("source") == "auto" for shape in element)
            if item is not None:
                item.split = split
                items.append(item)
    if automatic:
        faults.remark(
            "annotations", f"{automatic} shapes are of a model that CVAT ran (source auto), and are read as the others"
        )
    return items


def _is_for_images(tree: ElementTree.Element, path: Path, faults: Faults) -> bool:
    tracks = len(tree.findall("track"))
    if tracks:
        faults.add(
            path,
            f"has {tracks} <track>, as in 'CVAT for video 1.1', where boxes between key frames are computed. Export the task as "
            "'CVAT for images 1.1', which writes every frame",
        )
    elif tree.tag != "annotations" or not tree.findall("image"):
        faults.add(path, f"has no <image> in <annotations>; its root is <{tree.tag}>. Is it CVAT for images 1.1?")
    else:
        return True
    return False


def _item(
    element: ElementTree.Element, where: str, options: CvatOptions, folders: ImageFolders, faults: Faults
) -> Optional[Annotated]:
    name, subset = (element.get("name") or "").replace("\\", "/"), element.get("subset")
    if not name:
        faults.add(where, "has no name; needed: the image's file")
        return None
    sides = numbers([element.get("width", "0"), element.get("height", "0")])
    if sides is None or not all(map(is_pixels, sides)):
        found = [element.get("width"), element.get("height")]
        faults.add(where, f"width and height are {found}; needed: whole numbers of pixels")
        return None
    names = [f"{subset}/{name}", name] if subset else [name]
    item = Annotated(folders.find(names), [], [], where, stated_size(*sides))
    tags: set[str] = set()
    for number, shape in enumerate(element):
        if shape.tag == "tag":
            tags.add(shape.get("label") or "")
        elif shape.tag in _WITHOUT_BOX:
            drop_box(item, f"<{shape.tag}>, which has no box", faults)
        elif shape.tag in _SHAPES and shape.get("outside") == "1":
            drop_box(item, "outside of the frame (outside=1)", faults)
        elif shape.tag in _SHAPES:
            _add(item, shape, f"{where} {shape.tag} {number}", faults)
        else:
            faults.add(where, f"has a <{shape.tag}>. Allowed: tag, {', '.join((*_SHAPES, *_WITHOUT_BOX))}")
    check_normal(item, sorted(tags), options.no_finding, faults)
    if not item.boxes and not tags <= set(options.no_finding):
        item.left_out = "has a tag, but no box; annotations.no_finding"
    elif options.no_finding and not (tags or item.boxes or item.dropped_boxes):
        item.left_out = "has no shape, and none of annotations.no_finding"
    return item


def _add(item: Annotated, shape: ElementTree.Element, where: str, faults: Faults) -> None:
    label, box = shape.get("label"), _box(shape)
    if not label:
        faults.add(where, "has no label")
    elif box is None:
        faults.add(where, f"is {dict(list(shape.attrib.items())[:12])}; needed: numbers in pixels"[:600])
    else:
        item.boxes.append(box)
        item.classes.append(label)


def _box(shape: ElementTree.Element) -> Optional[Box]:
    """The shape's box, with its rotation in degrees clockwise about the centre."""
    if shape.tag == "polygon":
        pairs: list[object] = [pair.split(",") for pair in (shape.get("points") or "").split(";")]
        points = points_of(pairs)
        return extent(points) if points is not None and len(points) >= 3 else None
    keys = {"box": "xtl ytl xbr ybr", "ellipse": "cx cy rx ry", "mask": "left top width height"}[shape.tag].split()
    found = numbers([shape.get(key) for key in keys] + [shape.get("rotation", "0")])
    if found is None:
        return None
    a, b, c, d, degrees = found
    if shape.tag == "ellipse":
        return ellipse((a, b), (c, d), degrees)
    box = (a, b, c, d) if shape.tag == "box" else (a, b, a + c, b + d)
    return turned_about_centre(box, degrees)
