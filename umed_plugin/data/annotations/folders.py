"""Folders of images, each named by the class that its images show: a label and no box."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

from pydantic import Field, model_validator

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.effects import Applied
from umed_plugin.data.annotations.finding import matches, tell_own_files
from umed_plugin.data.annotations.labels import labels_of
from umed_plugin.data.endings import IMAGE_ENDINGS
from umed_plugin.data.own_files import OwnFiles
from umed_plugin.data.places import folders_below
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.faults import Faults


class FoldersOptions(ReaderOptions):
    """Folders named by a class. ``files`` is the folder that holds them, ``.`` for the data root. Images may lie deeper."""

    yaml_example_ = """
annotations:
  reader: folders
  files: .
  no_finding: [normal]
"""

    no_finding: list[str] = Field([], description="Names of folders whose images have no lesion.")
    endings: list[str] = Field(
        list(IMAGE_ENDINGS), min_length=1, description="Endings of image files. Other files are counted and not read."
    )

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> FoldersOptions:
        for key in ("image_root", "readers"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} has no effect with reader folders; remove it")
        wrong = [ending for ending in self.endings if not ending.startswith(".")]
        if wrong:
            raise ValueError(f"endings: {wrong[0]!r} has no dot; write {'.' + wrong[0]!r}")
        return self

    @property
    def labels_only(self) -> bool:
        """True: a folder's name says what its images show and not where."""
        return True


@register_reader("folders", FoldersOptions)
def read_folders(options: FoldersOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read every image of every class folder. An image beside the folders has no label, which is a fault."""
    items: list[Annotated] = []
    applied = Applied({"annotations.no_finding": options.no_finding})
    for split, name in options.files.items():
        found = [path for path in matches(root, name) if path.is_dir()] if name not in ("", ".") else [root]
        if not found:
            faults.add(
                root / name, "no such folder (annotations.files). Needed: the folder that holds one folder per class"
            )
        for folder in found:
            items += _images_below(folder, split, options, applied, faults)
    if not faults.messages:
        applied.tell(faults)
    return items


def _images_below(
    folder: Path, split: str, options: FoldersOptions, applied: Applied, faults: Faults
) -> list[Annotated]:
    items: list[Annotated] = []
    own = OwnFiles(folder)
    endings = tuple(ending.lower() for ending in options.endings)
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    pictures = [folder / name for name in names if not (folder / name).is_dir() and name.lower().endswith(endings)]
    classes = [name for name in names if (folder / name).is_dir()]
    below = {name: _files_below(folder / name) for name in classes}
    # All at once: rendered pictures are meant only where nothing else is there.
    kept = set(own.without([*pictures, *itertools.chain(*below.values())]))
    beside = [path for path in pictures if path in kept]
    if beside:
        faults.add(
            folder,
            f"{len(beside)} images lie beside the class folders and have no label, the first: {beside[0].name}. Move them into "
            "the folder of their class",
        )
    if not classes:
        faults.add(folder, "holds no folder. Needed: one folder per class, with its images")
    others: Counter[str] = Counter()
    for name in classes:
        images = _images_of([path for path in below[name] if path in kept], endings, others)
        if not images and not kept.issuperset(below[name]):
            continue  # a folder that umed has made
        if not images:
            faults.remark(folder / name, "holds no image, so its class has none")
        applied.meet("annotations.no_finding", name)
        labels = labels_of([name], options.no_finding, str(folder / name), faults)
        items += [Annotated(image, [], list(labels or []), str(image), split=split) for image in images]
    tell_own_files(own, folder, faults)
    for ending, count in others.items():
        faults.left_out["files", f"{ending or 'no ending'}, which is not one of annotations.endings"] += count
    return items


def _files_below(folder: Path) -> list[Path]:
    """The files of a class folder and of the folders below it. Links to folders are followed, as by other readers' patterns."""
    paths = [path for place in folders_below(folder) for path in place.iterdir() if not path.name.startswith(".")]
    return [path for path in paths if not path.is_dir()]


def _images_of(paths: list[Path], endings: tuple[str, ...], others: Counter[str]) -> list[Path]:
    """The images among a class's files, sorted; other files are counted by their ending."""
    images: list[Path] = []
    for path in paths:
        if path.name.lower().endswith(endings):
            images.append(path)
        else:
            others[path.suffix.lower()] += 1
    return sorted(images)
