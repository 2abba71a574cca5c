"""YOLO: one text file per image, ``class cx cy w h`` in 0-1; polygons become their box; no label file is a negative."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

import yaml
from pydantic import Field

from umed_plugin.data.annotations.base import Annotated, ImageFolders
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class YoloOptions(ReaderOptions):
    """YOLO text files. ``files`` is the folder of the label files, ``image_root`` the folder of the images.

    An image without a label file is negative.
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


@register_reader("yolo", YoloOptions)
def read_yolo(options: YoloOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read every image of ``image_root`` with the label file of the same stem, or of none."""
    names = _class_names(options.names, root, faults)
    items: list[Annotated] = []
    for split, label_folder in options.files.items():
        folders = ImageFolders(options, root, split, root)
        if not (root / label_folder).is_dir():
            faults.add(root / label_folder, "no such label folder (annotations.files)")
            continue
        images = folders.images(_IMAGES)
        folder = ", ".join(map(str, folders.folders))
        if not images:
            faults.add(folder, f"holds no image ({', '.join(_IMAGES)}); check annotations.image_root")
        stems = {path.stem for path in images}
        for label in sorted((root / label_folder).glob("*.txt")):
            if label.stem not in stems and label.stem != "classes":
                faults.add(label, f"there is no image {label.stem}.* in {folder}")
        for image in images:
            items.append(_item(image, root / label_folder / f"{image.stem}.txt", split, names, faults))
    return items


def _class_names(names: Union[str, list[str]], root: Path, faults: Faults) -> dict[int, str]:
    if isinstance(names, list):
        return dict(enumerate(names))
    path = root / names
    if not path.is_file():
        faults.add(path, "no such file (annotations.names)")
        return {}
    listed = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("names", {})
    pairs = listed.items() if isinstance(listed, dict) else enumerate(listed)
    return {int(number): str(name) for number, name in pairs}


def _item(image: Path, label: Path, split: str, names: dict[int, str], faults: Faults) -> Annotated:
    item = Annotated(image, [], [], str(label if label.is_file() else image), normalised=True, split=split)
    lines = label.read_text(encoding="utf-8").splitlines() if label.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        box = _box(line.split()[1:])
        index = line.split()[0]
        if box is None:
            faults.add(
                f"{label}:{number}", f"found {line!r}; needed: class cx cy w h, or class and a polygon, all in 0-1"
            )
        elif not index.isdigit() or int(index) not in names:
            faults.add(f"{label}:{number}", f"class {index} has no name. Allowed: {names}")
        else:
            item.boxes.append(box)
            item.classes.append(names[int(index)])
    return item


def _box(words: list[str]) -> Optional[Box]:
    try:
        values = [float(word) for word in words]
    except ValueError:
        return None
    if len(values) == 4:
        x, y, width, height = values
        return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if len(values) >= 6 and len(values) % 2 == 0:
        return (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    return None
