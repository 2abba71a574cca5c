"""What a recipe's data holds that is allowed and yet rarely meant: the last table of ``umed recipe check``.

One row a kind, with its number and the first examples. Nothing here stops a build or changes the exit status.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from umed_plugin.data.checking.check import MOST_AT_ENDS, RecipeCheck
from umed_plugin.data.recipes.recipe import Mixture
from umed_plugin.data.splits import SPLITS

LOOKED_AT = (
    "boxes under a pixel",
    "boxes of one class that overlap by more than half",
    "images turned or resampled",
    "pixels that are not square",
    "windows that leave black and white alone",
    "empty splits",
    "a small test split",
    "training images without a lesion",
    "patients with most of the data",
    "patients and pictures in two splits",
    "rules without effect",
    "what is left out and why",
)
# A patient with more than half of at least so many images is mostly a name that was cut or matched too short.
_ENOUGH_IMAGES = 10
_WORTH_A_DECIMAL = 0.05  # of the worst box's best possible IoU
# Patients below which `umed_plugin.evaluation.metrics.metric` gives no interval, and below which it is unsure.
_FEWEST, _FEW = 5, 30


@dataclass(frozen=True)
class Finding:
    """One row.

    Attributes:
        what: kind of the finding.
        count: how many there are.
        of: of how many, or None.
        examples: the first of them, without repeats.
    """

    what: str
    count: int
    of: Optional[int] = None
    examples: Sequence[str] = ()


def plausibility(check: RecipeCheck) -> list[Finding]:
    """The findings of a check; kinds of which there is none are not among them."""
    boxes = sum(len(counts.sides) for counts in check.classes.values())
    images = sum(check.images.values())
    annotations = check.annotations
    shared = check.shared_patients
    unused = [*annotations.unused_options, *annotations.faults.without_effect]
    split_leaks = [f"{leak.name} = {leak.other}" for leak in check.split_leaks]
    found = [
        _of("boxes under a pixel wide or high", check.thin_boxes, boxes),
        _of("boxes that overlap another of their class by more than half", check.overlapping_boxes, boxes),
        *(
            Finding(f"images that {kind}", len(names), annotations.read, names[:3])
            for kind, names in _image_kinds(check)
        ),
        _of(
            f"images of which over {100 * MOST_AT_ENDS:g} % is black or white: is image.window (or offset) right?",
            check.black_or_white,
            check.windowed,
        ),
        _of("splits that are asked for and empty", _empty_splits(check)),
        *_no_negatives(check),
        *_small_test_split(check),
        *_largest_patients(check.patient_images, images),
        _of("patients in more than one split", shared, len(check.patient_images)),
        _of("pictures in two splits", split_leaks, images),
        _of("pictures in an evaluation set too", [leak.name for leak in check.evaluation_leaks or []], images),
        _of("rules or options without effect", unused),
        *(Finding(f"images left out: {reason}", count) for reason, count in annotations.left_out.items()),
        *(
            Finding(f"{what} left out: {reason}", count)
            for (what, reason), count in annotations.faults.left_out.items()
        ),
        Finding("boxes left out: degenerate (degenerate_boxes: drop)", annotations.dropped_boxes),
    ]
    return [finding for finding in found if finding.count]


def suggestions(check: RecipeCheck) -> list[str]:
    """What to change in the recipe or the build, with the numbers that speak for it."""
    found = []
    best = {
        decimals: [v for counts in check.classes.values() for v in counts.best_iou[decimals]] for decimals in (2, 3)
    }
    if best[2] and min(best[3]) - min(best[2]) >= _WORTH_A_DECIMAL:
        found.append(
            f"three decimals: with two, the best possible IoU of a box is as low as {min(best[2]):.2f}, with three "
            f"{min(best[3]):.2f}. Build with --box-decimals 3. Other commands: --umed_box_decimals 3 beside --umed_recipe, "
            "--set box_decimals=3 for umed upgrade."
        )
    images, patients = sum(check.images.values()), len(check.patient_images)
    if images >= _ENOUGH_IMAGES and patients == images:
        found.append(
            "groups: every image counts as a patient of its own, because the recipe knows none. If several images are of one "
            "patient, or copies of one picture, give split.patient_pattern, so that they stay in one split and count as one."
        )
    if check.split_leaks:
        found.append(
            f"a split by groups: {len(check.split_leaks)} pictures are in two splits. Give split.by: patient and a "
            "patient_pattern that keeps copies and neighbouring slices together."
        )
    return found


def _of(what: str, names: Iterable[str], of: Optional[int] = None) -> Finding:
    listed = list(names)
    return Finding(what, len(listed), of, list(dict.fromkeys(listed))[:3])


def _image_kinds(check: RecipeCheck) -> list[tuple[str, list[str]]]:
    return list(check.annotations.image_remarks.items())


def _empty_splits(check: RecipeCheck) -> list[str]:
    """Splits that the recipe asks for, and that have no image."""
    recipe = check.recipe
    asked: Iterable[Any]
    if isinstance(recipe, Mixture) or recipe.split.by == "patient":
        asked = [split for split, share in recipe.split.fractions.items() if share > 0]
    else:
        options = recipe.annotations
        values = getattr(options, "split_values", {}).values()
        asked = {*options.files, *getattr(options, "split_lists", {}), *values}
    return [split for split in SPLITS if split in asked and check.images and not check.images[split]]


def _no_negatives(check: RecipeCheck) -> list[Finding]:
    """A training split of images with a lesion alone. Phrases and reports are asked for what the image shows."""
    trained = [item for item in check.annotations.items if item.split == "train"]
    if not trained or check.negatives["train"] or any(item.phrase or item.report for item in trained):
        return []
    return [Finding("images in train, all with a lesion: a model may learn to see one in every image", len(trained))]


def _small_test_split(check: RecipeCheck) -> list[Finding]:
    """What an evaluation on the test split cannot show, said before anything is trained."""
    images, patients = check.images["test"], len(check.patients.get("test", ()))
    if not images:
        return []
    found = []
    if patients < _FEW:
        unsure = "no intervals" if patients < _FEWEST else "unsure intervals"
        found.append(
            Finding(f"patients in test, fewer than {_FEWEST if patients < _FEWEST else _FEW}: {unsure}", patients)
        )
    if not check.negatives["test"]:
        found.append(Finding("images in test, all with a lesion: false boxes cannot be counted", images))
    return found


def _largest_patients(images: Counter[str], total: int) -> list[Finding]:
    """The patient with more than half of the images."""
    if total < _ENOUGH_IMAGES:
        return []
    return [
        Finding("images of one patient, who has most of the data", count, total, [patient])
        for patient, count in images.most_common(1)
        if 2 * count > total
    ]
