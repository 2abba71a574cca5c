"""Check whether a recipe fits the files on disk, and count what they hold: ``umed recipe check R --data-root FOLDER``.

`report` prints the result and writes it as a page with contact sheets.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Union

import numpy as np

from umed_plugin.data.annotations import Annotated, AnnotationSet, read_annotations
from umed_plugin.data.annotations.merging import overlapping_count
from umed_plugin.data.checking.augmented_sheet import AugmentedSheets
from umed_plugin.data.checking.contact_sheet import ContactSheets
from umed_plugin.data.checking.gallery import BoxPlaces, CheckedImages
from umed_plugin.data.leaks import Leak, Pictures, evaluation_pictures
from umed_plugin.data.normal_images import Group, enough_normals, normal_images
from umed_plugin.data.preparation import LEAST_VISIBLE, prepare
from umed_plugin.data.prepared import Prepared
from umed_plugin.data.recipes.recipe import AnyRecipe, slice_axes
from umed_plugin.data.record_writer import record_id
from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import best_iou_for_decimals
from umed_plugin.grounding.geometry import ImageGeometry

DECIMALS = (2, 3)
# Share of an image's pixels at the two ends of its window above which the window is hardly meant.
MOST_AT_ENDS = 0.95


@dataclass
class ClassCheck:
    """Lesions of one class, or of one source.

    Attributes:
        per_split: split -> number of lesions.
        sides: width and height of every box, in pixels of its image.
        lost, cut: number of lesions that LLaVA's centre crop (mode ``square``) removes or trims.
        best_iou: number of decimals -> the best IoU that they allow, in 0-1, one per box (mode ``pad``).
        places: sizes and positions of the boxes (mode ``pad``).
    """

    per_split: Counter[str] = field(default_factory=Counter)
    sides: list[tuple[float, float]] = field(default_factory=list)
    lost: int = 0
    cut: int = 0
    best_iou: dict[int, list[float]] = field(default_factory=lambda: {decimals: [] for decimals in DECIMALS})
    places: BoxPlaces = field(default_factory=BoxPlaces)


@dataclass
class SourceCheck(ClassCheck):
    """One data set of a mixture (or the only one) with its lesions.

    Attributes:
        images: number of images, with and without a lesion.
        negatives: number of images without a lesion.
        missing: number of annotated images that are not on disk.
        patients: names of the patients.
    """

    images: int = 0
    negatives: int = 0
    missing: int = 0
    patients: set[str] = field(default_factory=set)


@dataclass
class RecipeCheck:
    """Result of `check_recipe`.

    Attributes:
        images, negatives, labelled: split -> number of images, of images without a lesion, and of images with a label and no box.
        in_need_of_boxes: recipe and modality -> number of images with one label and no box.
        records: id of a record -> number of images that give it.
        patients: split -> patients, with their source. ``shared_patients`` are in more than one split.
        sources: data set -> its counts.
        classes: plain name -> its lesions.
        pictures: split -> thumbnails of its images, by name.
        split_leaks: images of val and test that are also in train, and images of test that are also in val.
        patient_images: patient, with its source -> number of images.
        thin_boxes, overlapping_boxes: names of the images of boxes under a pixel wide or high, and of boxes that overlap another
            of their class by more than half; one entry for each box.
        windowed: number of images that are shown through a window: DICOM, NIfTI, and pictures of more than 8 bits.
        black_or_white: names of those that then consist of black and white nearly alone.
        evaluation_leaks: images of train and val that are also in an evaluation set; None if no set was given.
        sheets, images_shown: images with their boxes, for contact sheets and for the page.
        augmented: studies as ``--umed_augment`` shows them, for the page; None if they were not asked for.
        bad_images: images that are missing on disk (first) or cannot be read.
    """

    recipe: AnyRecipe
    annotations: AnnotationSet
    images: Counter[str] = field(default_factory=Counter)
    negatives: Counter[str] = field(default_factory=Counter)
    labelled: Counter[str] = field(default_factory=Counter)
    in_need_of_boxes: Counter[Group] = field(default_factory=Counter)
    records: Counter[str] = field(default_factory=Counter)
    patients: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    sources: dict[str, SourceCheck] = field(default_factory=lambda: defaultdict(SourceCheck))
    classes: dict[str, ClassCheck] = field(default_factory=dict)
    pictures: dict[str, Pictures] = field(default_factory=lambda: defaultdict(Pictures))
    split_leaks: list[Leak] = field(default_factory=list)
    patient_images: Counter[str] = field(default_factory=Counter)
    thin_boxes: list[str] = field(default_factory=list)
    overlapping_boxes: list[str] = field(default_factory=list)
    windowed: int = 0
    black_or_white: list[str] = field(default_factory=list)
    evaluation_leaks: Optional[list[Leak]] = None
    sheets: ContactSheets = field(default_factory=lambda: ContactSheets([]))
    augmented: Optional[AugmentedSheets] = None
    images_shown: CheckedImages = field(default_factory=lambda: CheckedImages([], 0))
    bad_images: list[UmedError] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """Everything that would stop a build, except missing images."""
        return self.annotations.faults.messages + [str(error) for error in self.bad_images]

    @property
    def ok(self) -> bool:
        """True if a build would succeed."""
        return not self.faults and not self.annotations.missing

    @property
    def shared_patients(self) -> list[str]:
        """Patients in more than one split: test results would include patients seen in training."""
        counts = Counter(patient for patients in self.patients.values() for patient in patients)
        return sorted(patient for patient, count in counts.items() if count > 1)


def check_recipe(
    recipe: AnyRecipe,
    *,
    data_root: Optional[Union[str, Path]] = None,
    against: Sequence[Union[str, Path]] = (),
    progress: bool = False,
    augmented: bool = False,
    most_shown: int = 0,
) -> RecipeCheck:
    """Read all annotations and images of a recipe, and count what they hold.

    Args:
        data_root: folder of the data set; overrides the recipe's.
        against: folders with the images of evaluation sets, which must not be trained on.
        progress: show a progress bar.
        augmented: draw augmented studies too.
        most_shown: number of images that the page shows at most.

    Raises:
        UmedError: there is no data folder, or a folder of ``against`` holds no image.
    """
    evaluated = evaluation_pictures(against, slice_axes(recipe))
    check = RecipeCheck(recipe, read_annotations(recipe, data_root))
    check.classes = {name: ClassCheck() for name in recipe.names}
    check.sheets = ContactSheets(check.annotations.items)
    check.augmented = AugmentedSheets(check.annotations.items) if augmented else None
    check.images_shown = CheckedImages(check.annotations.items, most_shown)
    items = check.annotations.items
    for prepared in prepare(items, check.annotations, check.bad_images, recipe.name if progress else None):
        _count(prepared, check)
    for item in check.annotations.missing:
        check.sources[item.recipe.name].missing += 1
    if check.ok:
        _add_faults_of_a_build(check)
    for held_out, others in (("val", ["train"]), ("test", ["train", "val"])):
        for other in others:
            check.split_leaks += check.pictures[held_out].also_in(check.pictures[other])
    if against:
        trained = [check.pictures[split].also_in(evaluated) for split in ("train", "val")]
        check.evaluation_leaks = [leak for leaks in trained for leak in leaks]
    return check


def _count(prepared: Prepared, check: RecipeCheck) -> None:
    item = prepared.item
    split, patient = item.split, f"{item.recipe.name} {item.patient}"
    check.images[split] += 1
    negative = not prepared.boxes and not prepared.labels and not item.report
    check.negatives[split] += negative
    check.labelled[split] += bool(prepared.labels)
    if len(prepared.labels) == 1:
        check.in_need_of_boxes[item.recipe.name, item.modality] += 1
    check.records[record_id(item)] += 1
    check.patients[split].add(patient)
    source = check.sources[item.recipe.name]
    source.images += 1
    source.negatives += negative
    source.patients.add(patient)
    check.patient_images[patient] += 1
    name = picture_name(item)
    check.pictures[split].add(name, prepared.shown)
    thin = sum(min(x2 - x1, y2 - y1) < 1 for x1, y1, x2, y2 in prepared.boxes)
    overlapping = overlapping_count(prepared.boxes, prepared.classes)
    check.thin_boxes += [name] * thin
    check.overlapping_boxes += [name] * overlapping
    clipped = not prepared.is_grey_levels and share_at_ends(prepared.shown) > MOST_AT_ENDS
    check.windowed += not prepared.is_grey_levels
    check.black_or_white += [name] * clipped
    check.sheets.add(prepared)
    if check.augmented is not None and not prepared.labels:  # they have no answer yet
        check.augmented.add(prepared)
    kinds = {"box under a pixel": thin, "overlapping boxes of a class": overlapping, "black or white": clipped}
    check.images_shown.add(name, prepared, [kind for kind, count in kinds.items() if count])
    padded, cropped = (ImageGeometry(*prepared.size, mode) for mode in ("pad", "square"))
    for box, lesion in zip(prepared.boxes, prepared.classes):
        share = cropped.visible_fraction(box)
        in_square = padded.to_square([box])[0]
        for counts in (check.classes[lesion], source):
            counts.per_split[split] += 1
            counts.sides.append((box[2] - box[0], box[3] - box[1]))
            counts.lost += share < LEAST_VISIBLE
            counts.cut += LEAST_VISIBLE <= share < 1
            for decimals, values in counts.best_iou.items():
                values.append(best_iou_for_decimals(in_square, decimals))
            counts.places.add(in_square)


def _add_faults_of_a_build(check: RecipeCheck) -> None:
    """Add the faults that a build would find at its end, or would first train an anomaly map to find."""
    faults = check.annotations.faults
    if not check.images:
        faults.add("annotations", f"name no image under {check.annotations.root}")
    shots: dict[Group, list[Annotated]] = defaultdict(list)
    for item in normal_images(check.annotations.normals):
        shots[item.recipe.name, item.modality].append(item)
    for group, labelled in check.in_need_of_boxes.items():
        enough_normals(group, shots[group], labelled, faults)
    for name, count in check.records.items():
        if count > 1:
            faults.add(
                name, f"is the id of {count} records. Name each image once in the annotations, by its plain path"
            )


def share_at_ends(pixels: np.ndarray) -> float:
    """Share of the pixels of uint8 ``[height, width, 3]`` that are 0 or 255 in every channel, 0-1."""
    return float(((pixels == 0) | (pixels == 255)).all(axis=2).mean())


def picture_name(item: Annotated) -> str:
    """Name of an image in messages: split, data set, path in it, and slice."""
    slice_ = "" if item.slice is None else f"#{item.slice}"
    return f"{item.split}: {item.recipe.name}/{os.path.relpath(item.image, item.root)}{slice_}"
