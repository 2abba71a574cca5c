"""COCO JSON: boxes as [x, y, width, height] in pixels from 0; an image without annotations is negative."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Optional

from pydantic import Field, model_validator

from umed_plugin.data.annotations.base import Annotated, drop_box, four_numbers, in_unit, is_pixels, stated_size
from umed_plugin.data.annotations.finding import ImageFolders, json_files
from umed_plugin.data.annotations.phrases import by_phrase, checked_phrase
from umed_plugin.data.annotations.shapes import number, turned_about_centre
from umed_plugin.data.recipes.options import Unit
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box, iou_matrix

# A bbox is the extent of its polygons, up to rounding; one of corners instead of a size is mostly another box.
_LEAST_AGREEMENT = 0.5
# Fields that the reader needs of each entry, and their types in JSON.
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "width": (int, float), "height": (int, float)},
    "annotations": {"image_id": (int, str), "category_id": (int, str), "bbox": (list,)},
    "categories": {"id": (int, str), "name": (str, int)},
}


class CocoOptions(ReaderOptions):
    """COCO JSON: ``images``, ``annotations`` with ``bbox`` [x, y, width, height], ``categories``."""

    names_images_ = True
    yaml_example_ = """
annotations:
  reader: coco
  files: {train: annotations/train.json, val: annotations/val.json}
  image_root: images
"""

    normalised: Unit = False
    crowd: Literal["drop", "keep"] = Field(
        "drop",
        description="Annotations with ``iscrowd`` or ``ignore``, which mark a region of many objects. ``drop``: leave the box "
        "out, and the image if no other box is left. ``keep``: each is a lesion (CVAT marks every mask so).",
    )
    reader_field: Optional[str] = Field(
        None,
        description="Field of an annotation that names who marked it. See ``annotations.readers``. Who found nothing in an image "
        "is not named in COCO, and does not count as a reader of it.",
    )

    phrase: Optional[str] = Field(
        None,
        description="Field of an annotation that holds a sentence, such as ``label_text`` of MS-CXR. Each pair of image and "
        "sentence is a record then: the question asks where the sentence is seen, and the answer is its boxes.",
    )
    file_field: str = Field(
        "file_name",
        description="Field of an image that holds its file. MS-CXR has the path in ``path``, and the bare name in ``file_name``.",
    )

    @model_validator(mode="after")
    def _readers_are_named(self) -> CocoOptions:
        if self.readers is not None and self.reader_field is None:
            raise ValueError("readers needs reader_field, the field that names who marked a box")
        return self


@register_reader("coco", CocoOptions)
def read_coco(options: CocoOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read one COCO file per split."""
    items: list[Annotated] = []
    for split, path, content in json_files(options, root, faults):
        if _is_coco(content, path, options, faults):
            folders = ImageFolders(options, root, split, path.parent, faults)
            items += _CocoFile(options, path, split, folders, faults).items(content)
    return items


def _is_coco(content: Any, path: Path, options: CocoOptions, faults: Faults) -> bool:
    """Whether the content has all that is needed of COCO; what it lacks is a fault."""
    if not isinstance(content, dict):
        faults.add(
            path, f"holds a {type(content).__name__}; needed: an object with lists {', '.join(_FIELDS)}. Is it COCO?"
        )
        return False
    missing = [key for key in _FIELDS if not isinstance(content.get(key), list)]
    if missing:
        faults.add(path, f"has no {', '.join(missing)}; it holds {', '.join(content) or 'nothing'}. Is it COCO?")
        return False
    needed = {**_FIELDS, "images": {**_FIELDS["images"], options.file_field: (str,)}}
    wrong = [
        (f"{path} {key}[{number}]", fault)
        for key, fields in needed.items()
        for number, entry in enumerate(content[key])
        for fault in _entry_faults(entry, fields)
    ]
    for where, fault in wrong:
        faults.add(where, fault)
    return not wrong


def _entry_faults(entry: Any, fields: dict[str, tuple[type, ...]]) -> list[str]:
    if not isinstance(entry, dict):
        return [f"is {entry!r}; needed: an object with {', '.join(fields)}"]
    return [
        f"{name} is {entry.get(name, 'missing')!r}; needed: {' or '.join(kind.__name__ for kind in kinds)}"
        for name, kinds in fields.items()
        if not isinstance(entry.get(name), kinds)
    ]


class _CocoFile:
    """One COCO file, read entry by entry."""

    def __init__(self, options: CocoOptions, path: Path, split: str, folders: ImageFolders, faults: Faults) -> None:
        self.options, self.path, self.split, self.folders, self.faults = options, path, split, folders, faults

    def items(self, content: Any) -> list[Annotated]:
        names = self._categories(content["categories"])
        by_id = self._images(content["images"])
        readers: dict[Any, list[str]] = {key: [] for key in by_id}
        phrases: dict[Any, list[str]] = {key: [] for key in by_id}
        disagreeing: list[str] = []
        with_outline = 0
        for annotation in content["annotations"]:
            where = f"{self.path} annotation {annotation.get('id')}"
            item = by_id.get(annotation["image_id"])
            box = self._box(annotation, item, where)
            if item is None:
                self.faults.add(where, f"image_id {annotation['image_id']!r} is not among the images")
            elif annotation["category_id"] not in names:
                self.faults.add(where, f"category_id {annotation['category_id']!r} is not among {list(names)}")
            elif box is not None and self._is_crowd(annotation):
                drop_box(item, "iscrowd or ignore; annotations.crowd", self.faults)
            elif box is not None:
                item.boxes.append(in_unit(box, self.options.normalised))
                item.classes.append(names[annotation["category_id"]])
                readers[annotation["image_id"]].append(self._reader(annotation, where))
                phrases[annotation["image_id"]].append(self._phrase(annotation, where))
                outline = _outline(annotation.get("segmentation"))
                with_outline += outline is not None
                if outline is not None and iou_matrix([box], [outline])[0, 0] < _LEAST_AGREEMENT:
                    disagreeing.append(where)
        self._tell_disagreeing(disagreeing, with_outline)
        return [part for key, item in by_id.items() for part in by_phrase(item, phrases[key], readers[key])]

    def _reader(self, annotation: Any, where: str) -> str:
        if self.options.reader_field is None:
            return ""
        name = annotation.get(self.options.reader_field)
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            self.faults.add(
                where, f"{self.options.reader_field} is {name!r} (annotations.reader_field); needed: a name"
            )
        return str(name)

    def _phrase(self, annotation: Any, where: str) -> str:
        field = self.options.phrase
        return "" if field is None else checked_phrase(annotation.get(field), where, field, self.faults)

    def _categories(self, entries: list[Any]) -> dict[Any, str]:
        names: dict[Any, str] = {}
        for entry in entries:
            name = names.setdefault(entry["id"], str(entry["name"]))
            if name != str(entry["name"]):
                self.faults.add(
                    f"{self.path} category {entry['id']!r}",
                    f"is named {name!r} and {entry['name']!r}; needed: one name",
                )
        return names

    def _images(self, entries: list[Any]) -> dict[Any, Annotated]:
        by_id: dict[Any, Annotated] = {}
        names: dict[Any, str] = {}
        for entry in entries:
            where, name = f"{self.path} image {entry['id']}", entry[self.options.file_field]
            if names.setdefault(entry["id"], name) != name:
                self.faults.add(
                    where,
                    f"is {names[entry['id']]!r} and {name!r}. Nothing says whose the boxes are; give each its own id",
                )
            if entry["id"] in by_id:
                continue
            sides = (entry["width"], entry["height"])
            if not all(map(is_pixels, sides)):
                self.faults.add(where, f"width and height are {list(sides)}; needed: whole numbers of pixels")
            size = stated_size(*sides)
            by_id[entry["id"]] = Annotated(
                self.folders.find([name]), [], [], where, size, bool(self.options.normalised), split=self.split
            )
        return by_id

    def _box(self, annotation: Any, item: Optional[Annotated], where: str) -> Optional[Box]:
        numbers = four_numbers(annotation["bbox"])
        if numbers is None:
            self.faults.add(where, f"bbox is {annotation['bbox']!r}; needed: [x, y, width, height], numbers in pixels")
            return None
        x, y, width, height = numbers
        return self._turned((x, y, x + width, y + height), annotation, item, where)

    def _turned(self, box: Box, annotation: Any, item: Optional[Annotated], where: str) -> Optional[Box]:
        """The extent of a box that CVAT states unturned, with its rotation; None after a fault.

        The bbox of an outline or a mask is their extent, which is turned already.
        """
        attributes = annotation.get("attributes")
        written = attributes.get("rotation") if isinstance(attributes, dict) else None
        if written in (None, "") or annotation.get("segmentation"):
            return box
        degrees = number(written)
        if degrees is None:
            self.faults.add(where, f"attributes.rotation is {written!r}; needed: degrees, as CVAT writes them")
            return None
        if not degrees or item is None:
            return box
        # Fractions and percent turn as the pixels do, whose sides differ.
        width, height = (item.size or (0, 0)) if self.options.normalised else (1, 1)
        if not width or not height:
            self.faults.add(where, "has attributes.rotation and no pixels; needed: width and height of its image")
            return None
        x1, y1, x2, y2 = box
        x1, y1, x2, y2 = turned_about_centre((x1 * width, y1 * height, x2 * width, y2 * height), degrees)
        return (x1 / width, y1 / height, x2 / width, y2 / height)

    def _is_crowd(self, annotation: Any) -> bool:
        flags = (annotation.get("iscrowd"), annotation.get("ignore"))
        return self.options.crowd == "drop" and any(str(flag).lower() in ("1", "1.0", "true") for flag in flags)

    def _tell_disagreeing(self, disagreeing: list[str], with_outline: int) -> None:
        """A bbox that holds corners instead of a size agrees with hardly any outline."""
        if not disagreeing:
            return
        message = (
            f"bbox and segmentation disagree (IoU below {_LEAST_AGREEMENT}), as in {len(disagreeing)} of {with_outline} "
            "annotations with both; bbox must be [x, y, width, height]"
        )
        if 2 * len(disagreeing) > with_outline:
            self.faults.add(disagreeing[0], message)
        else:
            self.faults.remark(disagreeing[0], f"{message}. The bbox is used")


def _outline(segmentation: Any) -> Optional[Box]:
    """The extent of all polygons of an annotation, in the unit of its bbox; None without polygons."""
    if not isinstance(segmentation, list):
        return None
    numbers = [part for part in segmentation if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0]
    if not numbers or not all(type(value) in (int, float) for part in numbers for value in part):
        return None
    xs = [float(x) for part in numbers for x in part[::2]]
    ys = [float(y) for part in numbers for y in part[1::2]]
    return (min(xs), min(ys), max(xs), max(ys)) if max(xs) > min(xs) and max(ys) > min(ys) else None
