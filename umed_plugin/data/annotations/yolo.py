"""YOLO: one text file per image, ``class cx cy w h`` in 0-1; polygons become their box; no label file is a negative."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union

from pydantic import Field

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.finding import ImageFolders, did_you_mean_file, matches, tell_own_files
from umed_plugin.data.endings import IMAGE_ENDINGS
from umed_plugin.data.own_files import OwnFiles
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.data.texts import read_text, read_yaml
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box

_LABELS = (".txt",)


class YoloOptions(ReaderOptions):
    """YOLO text files. ``files`` is the folder of the label files, ``image_root`` the folder of the images.

    An image without a label file is negative. Images in a sub folder belong to the labels in the sub folder of the same name.
    """

    yaml_example_ = """
annotations:
  reader: yolo
  files: {train: train/labels, val: valid/labels}
  image_root: {train: train/images, val: valid/images}
  names: data.yaml
"""

    names: Union[str, list[str]] = Field(
        description="Class names in order, or the YAML file (``data.yaml``) that holds them under ``names``."
    )
    rows: Optional[Literal["boxes", "polygons"]] = Field(
        None,
        description="What the numbers of a row are after its class. ``boxes``: the first four are cx cy w h; what follows, such "
        "as keypoints or a confidence, is not read. ``polygons``: x y x y ... Default: four numbers are a box; more are a box "
        "and keypoints if the YAML file of ``names`` has ``kpt_shape``, and else a polygon.",
    )


class _Row(NamedTuple):
    """A line of a label file: its numbers after the class, in 0-1."""

    item: Annotated
    where: str
    name: str
    numbers: list[float]


@register_reader("yolo", YoloOptions)
def read_yolo(options: YoloOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read every image of ``image_root`` with the label file of the same stem, or of none."""
    names, keypoints = _class_names(options.names, root, faults)
    items: list[Annotated] = []
    rows: list[_Row] = []
    for split, label_folder in options.files.items():
        folders = ImageFolders(options, root, split, root, faults)
        if not (root / label_folder).is_dir():
            faults.add(root / label_folder, "no such label folder (annotations.files)")
            continue
        for image, label in _pairs(root / label_folder, folders, faults):
            item = Annotated(image, [], [], str(label or image), normalised=True, split=split)
            items.append(item)
            rows += _rows(item, label, names, faults) if label is not None else []
    _fill_boxes(rows, options, keypoints, faults)
    return items


def _class_names(names: Union[str, list[str]], root: Path, faults: Faults) -> tuple[dict[int, str], Optional[int]]:
    """Number -> name of every class, and how many numbers of keypoints follow a box; None if no file says."""
    if isinstance(names, list):
        return dict(enumerate(names)), None
    path = root / names
    if not path.is_file():
        faults.add(path, f"no such file (annotations.names).{did_you_mean_file(path, root)}")
        return {}, None
    before = len(faults.messages)
    content = faults.read(read_yaml, path)
    if len(faults.messages) > before:
        return {}, None
    content = content if isinstance(content, dict) else {}
    listed = content.get("names")
    pairs = dict(enumerate(listed)) if isinstance(listed, list) else listed
    if not isinstance(pairs, dict) or not all(_is_number(str(number)) for number in pairs):
        faults.add(path, "has no class names under 'names'; needed: a list, or a mapping of number to name")
        return {}, None
    shape: Any = content.get("kpt_shape")
    if isinstance(shape, list) and len(shape) == 2 and all(isinstance(side, int) for side in shape):
        return {int(number): str(name) for number, name in pairs.items()}, shape[0] * shape[1]
    return {int(number): str(name) for number, name in pairs.items()}, None


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 10


def _pairs(label_folder: Path, folders: ImageFolders, faults: Faults) -> list[tuple[Path, Optional[Path]]]:
    """Every image with its label file, or None. A label file without an image, or with several, is a fault."""
    labels = _by_place(label_folder, OwnFiles(label_folder).without(matches(label_folder, "**/*")), _LABELS)
    below = {os.path.dirname(place) for place in labels}
    images: dict[str, list[Path]] = {}
    passed_over: list[Path] = []
    for folder in folders.folders:
        own = OwnFiles(folder)
        files = own.without(matches(folder, "**/*"))
        tell_own_files(own, folder, faults)
        for place, paths in _by_place(folder, files, IMAGE_ENDINGS).items():
            # Other sub folders may hold anything: masks, plots, or the images of another split.
            if not os.path.dirname(place) or os.path.dirname(place) in below:
                images.setdefault(place, []).extend(paths)
            else:
                passed_over += paths
        _count_others([path for path in files if os.path.relpath(path.parent, folder) in (os.curdir, *below)], faults)
    shown = ", ".join(map(str, folders.folders))
    if not images:
        faults.add(shown, f"holds no image ({', '.join(IMAGE_ENDINGS)}); check annotations.image_root")
    if passed_over:
        faults.remark(
            shown,
            f"{len(passed_over)} images are in sub folders of which {label_folder} has none, and are not read. The first: "
            f"{passed_over[0]}",
        )
    for place, paths in labels.items():
        if len(paths) > 1:
            faults.add(paths[0], f"is there as {paths[1].name} too; needed: one label file for an image")
        if place not in images and os.path.basename(place) != "classes":
            faults.add(paths[0], f"there is no image {place}.* in {shown}")
    for place, paths in images.items():
        if len(paths) > 1 and place in labels:
            faults.add(labels[place][0], f"fits {paths[0]} and {paths[1]}, and nothing says which of them it is about")
    return sorted((image, labels.get(place, [None])[0]) for place, paths in images.items() for image in paths)


def _by_place(folder: Path, paths: Sequence[Path], endings: tuple[str, ...]) -> dict[str, list[Path]]:
    """Path below the folder without ending -> the files there with one of the endings, in any case."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        ending = next((ending for ending in endings if path.name.lower().endswith(ending)), None)
        if ending is not None:
            place = os.path.relpath(path.with_name(path.name[: -len(ending)]), folder)
            found.setdefault(place, []).append(path)
    return found


def _count_others(paths: Sequence[Path], faults: Faults) -> None:
    """Count by their ending what lies among the images and is neither an image nor a label file."""
    for path in paths:
        if not path.name.lower().endswith((*IMAGE_ENDINGS, *_LABELS)) and not path.is_dir():
            what = f"{path.suffix.lower() or 'no ending'}, which is not one of {', '.join(IMAGE_ENDINGS)}"
            faults.left_out["files beside the images", what] += 1


def _rows(item: Annotated, label: Path, names: dict[int, str], faults: Faults) -> list[_Row]:
    rows = []
    for number, line in enumerate((faults.read(read_text, label) or "").splitlines(), start=1):
        where, words = f"{label}:{number}", line.split()
        if not words:
            continue
        try:
            numbers = [float(word) for word in words[1:]]
        except ValueError:
            numbers = []
        if len(numbers) < 4:
            faults.add(where, f"found {line[:200]!r}; needed: class cx cy w h, or class and a polygon, all in 0-1")
        elif not _is_number(words[0]) or int(words[0]) not in names:
            number_or_text = words[0] if _is_number(words[0]) else repr(words[0][:80])
            faults.add(where, f"class {number_or_text} has no name. Allowed: {names}")
        else:
            rows.append(_Row(item, where, names[int(words[0])], numbers))
    return rows


def _fill_boxes(rows: list[_Row], options: YoloOptions, keypoints: Optional[int], faults: Faults) -> None:
    """Give every row's box to its image."""
    if options.rows is None and keypoints is None and _may_hold_keypoints(rows):
        faults.add(
            rows[0].where,
            f"every row has {len(rows[0].numbers)} numbers after its class, which may be a polygon, or a box and keypoints. "
            "Add annotations.rows: polygons, or boxes",
        )
        return
    for row in rows:
        box = _box(row.numbers, options.rows, keypoints)
        if box is None:
            faults.add(
                row.where,
                f"has {len(row.numbers)} numbers after its class; needed: cx cy w h, or a polygon, all in 0-1. If keypoints or a "
                "confidence follow the box: annotations.rows: boxes",
            )
        else:
            row.item.boxes.append(box)
            row.item.classes.append(row.name)


def _may_hold_keypoints(rows: list[_Row]) -> bool:
    """True if all rows have the same even number of numbers, as with keypoints, and are not corners of turned boxes."""
    counts = {len(row.numbers) for row in rows}
    if len(counts) != 1 or min(counts) == 4 or min(counts) % 2:
        return False
    return not (counts == {8} and all(_is_parallelogram(row.numbers) for row in rows))


def _is_parallelogram(corners: list[float]) -> bool:
    """True for four corners in a row, as of an oriented box: both diagonals have the same middle."""
    return all(abs(corners[i] + corners[i + 4] - corners[i + 2] - corners[i + 6]) < 0.01 for i in (0, 1))


def _box(numbers: list[float], form: Optional[str], keypoints: Optional[int]) -> Optional[Box]:
    if form == "boxes" or len(numbers) == 4 or (form is None and keypoints and len(numbers) == 4 + keypoints):
        x, y, width, height = numbers[:4]
        return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if len(numbers) >= 6 and len(numbers) % 2 == 0 and (form == "polygons" or not keypoints):
        return (min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2]))
    return None
