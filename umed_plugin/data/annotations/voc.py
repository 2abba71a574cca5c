"""Pascal VOC: one XML per image; an image without ``object`` is negative."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from pydantic import Field

from umed_plugin.data.annotations.base import Annotated, drop_box
from umed_plugin.data.annotations.finding import ImageFolders, matching_files, without_ending
from umed_plugin.data.annotations.shapes import number, turned_about_centre
from umed_plugin.data.annotations.units import within_first_pixel
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.data.splits import Split
from umed_plugin.data.texts import read_text, read_xml
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box

if TYPE_CHECKING:
    from xml.etree import ElementTree

# What to add to xmin, ymin, xmax, ymax to count from 0 and leave the last pixel's far edge outside.
_SHIFTS = {"one_based": (-1, -1, 0, 0), "inclusive": (0, 0, 1, 1), "half_open": (0, 0, 0, 0)}


class VocOptions(ReaderOptions):
    """Pascal VOC XML: one file per image. ``files`` is a pattern of XML files."""

    names_images_ = True
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
    difficult: Literal["keep", "drop"] = Field(
        "keep",
        description="Objects that are marked as difficult. ``keep``: read them as the others. ``drop``: leave the box out, and "
        "the image if no other box is left.",
    )
    split_lists: dict[Split, str] = Field(
        {},
        description="For each split, a text file that lists file stems (``ImageSets/Main/train.txt``). Where several "
        "XML files have one stem, write their folders before it, or those of their images, or give ``files`` for each split.",
    )


@register_reader("voc", VocOptions)
def read_voc(options: VocOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read all XML files of each pattern; ``split_lists`` say which split a file belongs to, others are left out."""
    paths = {split: matching_files(root, pattern, faults) for split, pattern in options.files.items()}
    splits = _listed_splits(options, root, paths, faults)
    difficult: Counter[str] = Counter()
    items: list[Annotated] = []
    for split, found in paths.items():
        folders = ImageFolders(options, root, split, root, faults)
        for path in found:
            item = _item(path, folders, options, faults, difficult)
            if item is None:
                continue
            item.split = split if splits is None else splits.get(path, "")
            if splits is not None and path not in splits:
                item.left_out = "its XML is in none of split_lists"
            items.append(item)
    if difficult["keep"]:
        faults.remark(
            "annotations.difficult",
            f"{difficult['keep']} boxes are marked difficult and are read as the others; drop leaves them out",
        )
    return items


def _listed_splits(
    options: VocOptions, root: Path, paths: Mapping[Any, Sequence[Path]], faults: Faults
) -> Optional[dict[Path, str]]:
    """XML -> split, by the lists; None without lists. ``paths`` are those of each pattern of ``files``."""
    if not options.split_lists:
        return None
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in sorted({path for found in paths.values() for path in found}):
        by_stem[path.stem].append(path)
    of_split = {split: set(found) for split, found in paths.items()}
    splits: dict[Path, str] = {}
    for split, name in options.split_lists.items():
        path = root / name
        if not path.is_file():
            faults.add(path, "no such split list")
            continue
        lost: list[str] = []
        unclear: list[tuple[str, list[Path]]] = []
        for written in _written_names(faults.read(read_text, path) or "", by_stem):
            fitting = _fitting(written, by_stem)
            if len(fitting) > 1:
                # Of two trees with the same names, a split's list means the one that `files` gives to the split.
                fitting = [one for one in fitting if one in of_split.get(split, ())] or fitting
            if not fitting:
                lost.append(written)
            elif len({os.path.realpath(one) for one in fitting}) > 1:
                unclear.append((written, fitting))
            elif any(splits.setdefault(one, split) != split for one in fitting):
                faults.add(path, f"{written!r} is in {splits[fitting[0]]} already")
        if lost:
            faults.left_out[f"names in {name}", "no XML has this name"] += len(lost)
            faults.remark(path, f"{len(lost)} names have no XML. The first: {lost[0]!r}")
        if unclear:
            written, (one, other, *_) = unclear[0]
            faults.add(
                path,
                f"{written!r} may be {one} or {other}, like {len(unclear)} names that fit several XML files. Write the folder "
                f"before each name, such as {_told_apart(one, other)}, or give each split the pattern of its own XML files in "
                "annotations.files",
            )
    return splits


def _written_names(text: str, stems: Collection[str]) -> list[str]:
    """One name per line, as Pascal VOC has it, or several; ``name -1`` and ``name 1`` in the lists of one class."""
    names: list[str] = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        words = line.split()
        if _stem_of(line, stems) is not None or len(words) == 1:
            names.append(line)
        elif len(words) == 2 and words[1] in ("1", "0", "-1") and words[1] not in stems:
            names.append(words[0])
        else:
            names += words
    return names


def _fitting(written: str, by_stem: dict[str, list[Path]]) -> list[Path]:
    """The XML files that a list may mean by a name: of those with its stem, the ones that share most folders before it.

    Where images and XML files lie in different folders, such as ``train/JPEGImages`` and ``train/Annotations``, the folders
    count that both have in the same order.
    """
    paths = by_stem.get(_stem_of(written, by_stem) or "", [])
    folders = written.replace("\\", "/").split("/")[-2::-1]
    common = len(Path(os.path.commonpath(paths)).parts) if len(paths) > 1 else 0
    shared = [
        (_equal_at_start(folders, path.parts[-2::-1]), _found_in_order(folders, path.parts[common:-1][::-1]))
        for path in paths
    ]
    return [path for path, count in zip(paths, shared) if count == max(shared)]


def _told_apart(one: Path, other: Path) -> str:
    """The first file's stem, with as many folders before it as tell it from the other."""
    count = _equal_at_start(one.parts[-2::-1], other.parts[-2::-1]) + 1
    return "/".join([*one.parts[:-1][-count:], one.stem])


def _found_in_order(wanted: Sequence[str], given: Sequence[str]) -> int:
    """Number of the wanted parts that the given ones have, each behind the one before."""
    rest, found = list(given), 0
    for part in wanted:
        if part in rest:
            rest, found = rest[rest.index(part) + 1 :], found + 1
    return found


def _equal_at_start(first: Sequence[str], second: Sequence[str]) -> int:
    """Number of equal parts before the first that differ."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


def _stem_of(written: str, stems: Collection[str]) -> Optional[str]:
    """The XML's stem for a name that may have folders before it and an ending: ``JPEGImages/a.png`` is ``a``."""
    last = written.replace("\\", "/").rsplit("/", 1)[-1]
    return next((name for name in (written, last, without_ending(last)) if name in stems), None)


def _item(
    path: Path, folders: ImageFolders, options: VocOptions, faults: Faults, difficult: Counter[str]
) -> Optional[Annotated]:
    tree = faults.read(read_xml, path)
    if tree is None:
        return None
    name = (tree.findtext("filename") or "").strip()
    if not name:
        faults.add(path, "has no <filename>")
        return None
    elsewhere = sum(1 for _ in tree.iter("object")) - len(tree.findall("object"))
    if elsewhere:
        faults.add(path, f"has {elsewhere} <object> that are not directly in <{tree.tag}>, where Pascal VOC has them")
    item = Annotated(folders.find([name]), [], [], str(path), _size(tree, path, faults))
    for place, entry in enumerate(tree.findall("object")):
        box = _box(entry, options.convention, f"{path} object {place}", faults)
        if box is None:
            continue
        if (entry.findtext("difficult") or "").strip().lower() in ("1", "true"):
            difficult[options.difficult] += 1
            if options.difficult == "drop":
                drop_box(item, "difficult; annotations.difficult", faults)
                continue
        item.boxes.append(box)
        item.classes.append((entry.findtext("name") or "").strip())
    return item


def _box(entry: ElementTree.Element, convention: str, where: str, faults: Faults) -> Optional[Box]:
    """The object's box, half-open from 0, around its rotation; None after a fault."""
    texts = [entry.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    count, degrees = len(entry.findall("bndbox")), _degrees(entry)
    try:
        x1, y1, x2, y2 = (float(text or "") for text in texts)
    except ValueError:
        faults.add(where, f"bndbox is {texts}; needed: numbers xmin, ymin, xmax, ymax")
        return None
    if count > 1:
        faults.add(where, f"has {count} <bndbox>; needed: one. Write an <object> for each box")
        return None
    if degrees is None:
        faults.add(where, "has an attribute 'rotation' that is no number; needed: degrees, as CVAT writes them")
        return None
    box = _half_open((x1, y1, x2, y2), convention)
    return turned_about_centre(box, degrees) if degrees else box


def _half_open(box: Box, convention: str) -> Box:
    """The box half-open from 0. One without width or height as written has none here either: it is a mistake, not a pixel."""
    x1, y1, x2, y2 = box
    # Fractions stay as they are, so that `check_units` knows them: a shift by a pixel would move them out of 0-1.
    is_fraction = within_first_pixel(box) and not all(value.is_integer() for value in box)
    if x1 >= x2 or y1 >= y2 or is_fraction:
        return box
    left, top, right, bottom = _SHIFTS[convention]
    return (x1 + left, y1 + top, x2 + right, y2 + bottom)


def _degrees(entry: ElementTree.Element) -> Optional[float]:
    """How far CVAT turned the box clockwise about its centre, in degrees; None if that is no number."""
    for attribute in entry.findall("attributes/attribute"):
        written = (attribute.findtext("value") or "").strip()
        if (attribute.findtext("name") or "").strip() == "rotation" and written:
            return number(written)
    return 0.0


def _size(tree: ElementTree.Element, path: Path, faults: Faults) -> Optional[tuple[int, int]]:
    """Width and height in pixels; None where they are missing or 0, as some tools write them, and after a fault."""
    texts = [(tree.findtext(f"size/{key}") or "0").strip() for key in ("width", "height")]
    if not all(re.fullmatch(r"\d+(\.0*)?", text) for text in texts):
        faults.add(path, f"size is {texts}; needed: whole numbers <width> and <height>, or no <size>")
        return None
    width, height = (int(float(text)) for text in texts)
    return (width, height) if width and height else None
