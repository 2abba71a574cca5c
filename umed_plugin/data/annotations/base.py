"""What every annotation reader returns, and boxes in the conventions of the formats."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from umed_plugin.data.recipes.options import Convention, Unit
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box


@dataclass
class Annotated:
    """One image, or one slice of a volume, with its annotations.

    Attributes:
        image: absolute path of the file.
        boxes: xyxy, half-open, in pixels of the frame that the recipe declares (0-1 of it if ``normalised``).
        classes: one per box: names as in the annotations, and plain names after `read_annotations`. Of an image with a label and
            no box, its labels.
        where: annotation file and line, for messages.
        size: width and height that the annotations state, in pixels, or None.
        slice: index from 0 in a volume, or None.
        window: low and high that the annotations state, or None.
        left_out: why the recipe leaves the image out; empty if it does not.
        copy_of: the picture of which the image is an augmented copy, or empty.
        reader: who read the image, such as a radiologist, or empty. An image read by several has one item for each of them, also
            for one who found nothing; `consensus.one_reading` makes one of them.
        phrase: the sentence that the boxes are of, or empty. An image has one item for each of its phrases.
        report: text of the report on the image, or empty. Its item has no boxes, and says nothing about where findings lie.
        views: further pictures of the study that are shown beside the image, left to right.
        dropped_boxes: number of boxes that the reader left out. An image that keeps none is left out, and is no negative.
        unread: slices of its volume that show what no record says, such as an ignored class; None stands for the whole file. Set
            by `read_annotations` where the recipe makes one image of a volume.
        patient_is_file: whether nothing names the patient, so that the file's name stands there; set by `read_annotations`.
        held_out: whether the recipe's ``hold_out`` keeps it from training; set by `read_annotations`.
        recipe, root: recipe and folder of the image's data set; set by `read_annotations`.
    """

    image: Path
    boxes: list[Box]
    classes: list[str]
    where: str
    size: Optional[tuple[int, int]] = None
    normalised: bool = False
    patient: str = ""
    split: str = ""
    modality: str = ""
    slice: Optional[int] = None
    window: Optional[tuple[float, float]] = None
    left_out: str = ""
    copy_of: str = ""
    reader: str = ""
    phrase: str = ""
    report: str = ""
    views: tuple[Path, ...] = ()
    dropped_boxes: int = field(default=0, repr=False)
    unread: frozenset[Optional[int]] = field(default=frozenset(), repr=False)
    patient_is_file: bool = field(default=False, repr=False)
    held_out: bool = field(default=False, repr=False)
    # Not in the repr: recipes are long, and the same for thousands of images.
    recipe: Recipe = field(default=None, repr=False)  # type: ignore[assignment]
    root: Path = Path()

    @property
    def is_negative(self) -> bool:
        """True if the image shows no lesion, as far as the annotations say."""
        return not self.classes and not self.report

    @property
    def is_there(self) -> bool:
        """Whether the image is on disk, with all of its views."""
        return self.not_on_disk() is None

    @property
    def labels(self) -> list[str]:
        """What the image shows, where no box says at which place; else empty."""
        return [] if self.boxes else self.classes

    def not_on_disk(self) -> Optional[Path]:
        """The first of its pictures that is not on disk; None if all are."""
        return next((picture for picture in (self.image, *self.views) if not picture.exists()), None)


@dataclass
class AnnotationSet:
    """All annotations of a recipe, or of a mixture.

    Attributes:
        root: data root.
        wanted: number of images that a mixture asks for, or None.
        items: images that are on disk, with plain class names, patient and split.
        missing: items of which a picture is not on disk.
        normals: images on disk without a lesion, before ``negatives.per_positive`` or a mixture selects some of them.
        left_out: reason -> number of images left out.
        dropped_boxes: number of degenerate boxes left out, known after the images are read.
        read: number of images whose pixels were read so far.
        image_remarks: what a user should know of images that are used: its words -> their names, known after they are read.
        told_options: (recipe's name, option of ``image``) that the remarks name already: the files' endings rule it out.
        unused_options: other options of the recipe that change nothing for its images, known after they are read.
        faults: mistakes in the data, with remarks and the boxes and rows that are not used. Nothing may be built while there
            are mistakes.
    """

    root: Path
    wanted: Optional[int] = None
    items: list[Annotated] = field(default_factory=list)
    missing: list[Annotated] = field(default_factory=list)
    normals: list[Annotated] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    dropped_boxes: int = 0
    read: int = 0
    image_remarks: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    told_options: set[tuple[str, str]] = field(default_factory=set)
    unused_options: list[str] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)

    def told(self) -> list[str]:
        """What ``check`` and ``build`` say about data that stops nothing: what is left out, then remarks."""
        lines = [f"{count} images left out ({reason})" for reason, count in self.left_out.items()]
        lines += [f"{count} {what} left out ({reason})" for (what, reason), count in self.faults.left_out.items()]
        if self.dropped_boxes:
            lines.append(f"{self.dropped_boxes} degenerate boxes left out")
        lines += [
            f"{len(examples)} of {self.read} images {kind} (the first: {examples[0]})"
            for kind, examples in self.image_remarks.items()
        ]
        return lines + self.unused_options + self.faults.remarks


def as_xyxy(values: Sequence[float], convention: Convention) -> Box:
    """A box of four numbers as xyxy, in the same unit.

    Args:
        convention: ``xyxy`` (two corners), ``xywh`` (corner and size) or ``cxcywh`` (centre and size).
    """
    a, b, c, d = values
    if convention == "xywh":
        return (a, b, a + c, b + d)
    return (a - c / 2, b - d / 2, a + c / 2, b + d / 2) if convention == "cxcywh" else (a, b, c, d)


def four_numbers(values: Any) -> Optional[Box]:
    """Four numbers of JSON as floats; None for anything else, such as text, null, true or a number above all floats."""
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        return None
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return None
    try:
        a, b, c, d = (float(value) for value in values)
    except OverflowError:
        return None
    return a, b, c, d


def drop_box(item: Annotated, reason: str, faults: Faults) -> None:
    """Count a box that is not used. An image of which no box is left is left out: it must not become a negative."""
    item.dropped_boxes += 1
    faults.left_out["boxes", reason] += 1


def check_normal(item: Annotated, said: Iterable[str], no_finding: Sequence[str], faults: Faults) -> None:
    """Add a fault for an image with a box that is called normal as well.

    Args:
        said: tags, flags or choices of the image.
        no_finding: those that say that it has no lesion.
    """
    normal = [name for name in said if name in no_finding]
    if normal and item.boxes:
        faults.add(item.where, f"says {normal[0]!r} (annotations.no_finding), but has a box. Remove one of the two")


def by_reader(item: Annotated, readers: Sequence[str]) -> list[Annotated]:
    """One item for each reader of an item's boxes.

    Args:
        readers: who marked each box; empty texts if nobody is named.
    """
    parts = []
    for number, reader in enumerate(sorted(set(readers))):
        mine = [index for index, name in enumerate(readers) if name == reader]
        boxes, classes = [item.boxes[index] for index in mine], [item.classes[index] for index in mine]
        dropped = item.dropped_boxes if number == 0 else 0
        parts.append(replace(item, boxes=boxes, classes=classes, reader=reader, dropped_boxes=dropped))
    return parts or [item]


def in_unit(box: Box, unit: Unit) -> Box:
    """The box in pixels, or in fractions of the image if the unit is not pixels."""
    if unit != "percent":
        return box
    return box[0] / 100, box[1] / 100, box[2] / 100, box[3] / 100


def stated_size(width: Any, height: Any) -> Optional[tuple[int, int]]:
    """Width and height in pixels; None where a tool writes 0 for what it does not know, or after a fault of `is_pixels`."""
    return (int(width), int(height)) if is_pixels(width) and is_pixels(height) and width and height else None


def is_pixels(side: Any) -> bool:
    """Whether a value is a whole number of pixels, 0 or more; it may be written as 100.0."""
    return type(side) in (int, float) and 0 <= side < math.inf and side == int(side)
