"""Pascal VOC: one XML per image; an image without ``object`` is negative."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Literal, Optional

from pydantic import Field

from umed_plugin.data.annotations.base import Annotated, ImageFolders, matching_files
from umed_plugin.data.recipes.options import Split
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.faults import Faults

# What to add to xmin, ymin, xmax, ymax to count from 0 and leave the last pixel's far edge outside.
_SHIFTS = {"one_based": (-1, -1, 0, 0), "inclusive": (0, 0, 1, 1), "half_open": (0, 0, 0, 0)}


class VocOptions(ReaderOptions):
    """Pascal VOC XML: one file per image. ``files`` is a pattern of XML files."""

    yaml_example_ = """
annotations:
  reader: voc
  files: Annotations/*.xml
  image_root: JPEGImages
  split_lists: {train: ImageSets/Main/train.txt, val: ImageSets/Main/val.txt}
"""

    convention: Literal["one_based", "inclusive", "half_open"] = Field(
        "one_based",
        description="How pixels are counted. ``one_based``: as in Pascal VOC, the first pixel is 1 and the last pixel belongs to "
        "the box. ``inclusive``: from 0, the last pixel belongs to the box. ``half_open``: from 0, the last pixel does not.",
    )
    split_lists: dict[Split, str] = Field(
        {}, description="For each split, a text file that lists file stems (``ImageSets/Main/train.txt``)."
    )


@register_reader("voc", VocOptions)
def read_voc(options: VocOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read all XML files of each pattern; ``split_lists`` say which split a file belongs to, others are left out."""
    splits = _listed_splits(options, root, faults)
    items: list[Annotated] = []
    for split, pattern in options.files.items():
        folders = ImageFolders(options, root, split, root)
        for path in matching_files(root, pattern, faults):
            if splits is None or path.stem in splits:
                item = _item(path, folders, options, faults)
                if item is not None:
                    item.split = splits[path.stem] if splits is not None else split
                    items.append(item)
    return items


def _listed_splits(options: VocOptions, root: Path, faults: Faults) -> Optional[dict[str, str]]:
    if not options.split_lists:
        return None
    splits: dict[str, str] = {}
    for split, name in options.split_lists.items():
        path = root / name
        if not path.is_file():
            faults.add(path, "no such split list")
            continue
        for stem in path.read_text(encoding="utf-8").split():
            if splits.setdefault(stem, split) != split:
                faults.add(path, f"{stem!r} is in {splits[stem]} already")
    return splits


def _item(path: Path, folders: ImageFolders, options: VocOptions, faults: Faults) -> Optional[Annotated]:
    try:
        tree = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        faults.add(path, f"not XML: {error}")
        return None
    name = tree.findtext("filename")
    if not name:
        faults.add(path, "has no <filename>")
        return None
    item = Annotated(folders.find([name]), [], [], str(path), _size(tree, path, faults))
    for number, entry in enumerate(tree.findall("object")):
        texts = [entry.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = (float(text or "") + shift for text, shift in zip(texts, _SHIFTS[options.convention]))
        except ValueError:
            faults.add(f"{path} object {number}", f"bndbox is {texts}; needed: numbers xmin, ymin, xmax, ymax")
            continue
        item.boxes.append((x1, y1, x2, y2))
        item.classes.append(entry.findtext("name") or "")
    return item


def _size(tree: ElementTree.Element, path: Path, faults: Faults) -> Optional[tuple[int, int]]:
    """Width and height in pixels; None where they are missing or 0, as some tools write them, and after a fault."""
    texts = [(tree.findtext(f"size/{key}") or "0").strip() for key in ("width", "height")]
    if not all(re.fullmatch(r"\d+(\.0*)?", text) for text in texts):
        faults.add(path, f"size is {texts}; needed: whole numbers <width> and <height>, or no <size>")
        return None
    width, height = (int(float(text)) for text in texts)
    return (width, height) if width and height else None
