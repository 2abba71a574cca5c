"""Rules of a recipe that apply to nothing. Such a rule is mostly a spelling mistake, and nothing else would show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from umed_plugin.data.endings import NIFTI_ENDINGS, RASTER_ENDINGS
from umed_plugin.data.recipes.image_options import ImageOptions
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.errors import did_you_mean
from umed_plugin.faults import Faults

_SHOWN = 5
# Option of `image` -> the kinds of files that it concerns, and what they are called. PNG and TIFF may have more than 8 bits.
# Whether a picture has pages or an EXIF orientation is known once it is read: `images.options`.
_CONCERN = {
    "window": ({"nifti", "dicom", "deep"}, "images of more than 8 bits"),
    "offset": ({"deep"}, "PNG and TIFF files"),
    "orientation": ({"nifti", "dicom"}, "DICOM and NIfTI files"),
    "slice_axis": ({"nifti"}, "NIfTI volumes"),
    "volume": ({"nifti"}, "NIfTI volumes"),
}


class Applied:
    """Counts to how many values of the data each value of some rules applies.

    Args:
        rules: key of the recipe -> the values that it names.
    """

    def __init__(self, rules: Mapping[str, Iterable[str]]) -> None:
        self._named = {rule: list(values) for rule, values in rules.items()}
        self._met: dict[str, Counter[str]] = {rule: Counter() for rule in rules}

    def meet(self, rule: str, value: str) -> None:
        """Count a value of the data, whether the rule names it or not."""
        self._met[rule][value] += 1

    def tell(self, faults: Faults) -> None:
        """Name the values of each rule that are nowhere in the data."""
        for rule, values in self._named.items():
            met = self._met[rule]
            unmet = [value for value in values if not met[value]]
            if unmet:
                closest = did_you_mean(unmet[0], met) if met else ""
                faults.no_effect(rule, f"nothing in the data is {_listed(unmet)}, so that has no effect.{closest}")


def tell_unused_rules(recipe: Recipe, met: Counter[str], without_lesion: int, faults: Faults) -> None:
    """Remark on classes, split options and rules for negatives that have no effect.

    Args:
        met: class of the annotations -> number of its boxes, before classes are ignored or renamed.
        without_lesion: number of images without a lesion that ``negatives`` was asked about.
    """
    for key, names in (("classes", recipe.classes), ("ignore_classes", recipe.ignore_classes)):
        unmet = [name for name in names if not met[name]]
        if unmet:
            faults.no_effect(key, f"no annotation names {_listed(unmet)} ({len(unmet)} of {len(names)})")
    given = recipe.split.model_fields_set
    if recipe.split.by != "patient" and "fractions" in given:
        faults.no_effect("split.fractions", f"has no effect, since split.by is {recipe.split.by!r}")
    rules: dict[str, Any] = {name: getattr(recipe.negatives, name) for name in ("only", "per_positive")}
    given_rules = [f"negatives.{name}" for name, value in rules.items() if value is not None]
    if given_rules and not without_lesion:
        faults.no_effect(" and ".join(given_rules), "has no effect, since every image has a lesion")


def tell_unused_image_options(images: Iterable[Path], options: ImageOptions, faults: Faults) -> set[str]:
    """Remark on options of ``image`` that concern kinds of files of which the data has none, by their endings; returns them."""
    kinds, told = {_kind(image) for image in images}, set()
    for key, (concerned, words) in _CONCERN.items():
        default = type(options).model_fields[key].default
        if kinds and getattr(options, key) != default and not kinds & concerned:
            faults.no_effect(f"image.{key}", f"has no effect, since it concerns {words}, and the data has none")
            told.add(key)
    return told


def _kind(image: Path) -> str:
    name = image.name.lower()
    if name.endswith(NIFTI_ENDINGS):
        return "nifti"
    if name.endswith((".png", ".tif", ".tiff")):
        return "deep"
    return "flat" if name.endswith(RASTER_ENDINGS) else "dicom"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more
