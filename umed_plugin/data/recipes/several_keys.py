"""Faults of a recipe that no key has by itself: keys that contradict each other, or have no effect beside another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from umed_plugin.data.recipes.image_options import preset_misfit
from umed_plugin.data.recipes.options import HoldOut
from umed_plugin.data.recipes.readers import FreeOptions
from umed_plugin.data.templates import without_a_template
from umed_plugin.errors import unknown_name
from umed_plugin.faults import Faults
from umed_plugin.grounding.side_words import names_side

if TYPE_CHECKING:
    from umed_plugin.data.recipes.recipe import Recipe


def check_together(recipe: Recipe, faults: Faults) -> None:
    """Check what depends on several keys."""
    options = recipe.annotations
    check_hold_out(recipe.hold_out, set(recipe.names), set(), faults)
    per_split = "" not in options.files or bool(getattr(options, "split_lists", None))
    if recipe.split.by == "file" and not per_split:
        faults.add(
            "split.by", "is 'file', but annotations.files is one for all. Give it per split: {train: ..., val: ...}"
        )
    if "" in options.files and (isinstance(options.image_root, dict) or "{split}" in str(options.image_root)):
        faults.add(
            "annotations.image_root", "is given per split, but annotations.files is one for all; give both per split"
        )
    listed = recipe.negatives.listed
    if listed is not None and recipe.split.by == "file":
        faults.add(
            "negatives.listed", "gives its images no split, and split.by is 'file'. Use split.by: patient or column"
        )
    if listed is not None and recipe.split.by == "column" and listed.split is None:
        faults.add(
            "negatives.listed.split", "missing. split.by is 'column', so the list must name the column of its split"
        )
    if recipe.phrase is not None and getattr(options, "labels_only", False):
        faults.add("annotations.phrase", "needs boxes, and the annotations name labels alone")
    if listed is not None and recipe.phrase is not None:
        faults.add(
            "negatives.listed", "has no effect together with annotations.phrase: no phrase is about these images"
        )
    if options.stored_frame_ and (recipe.image.box_frame, recipe.image.box_axes) != ("stored", "xy"):
        faults.add(
            "image.box_frame", f"and box_axes must be left out: the reader {options.reader} computes boxes as stored"
        )
    if options.from_masks_ and recipe.image.box_axes != "xy":
        faults.add("image.box_axes", f"must be left out: the reader {options.reader} computes boxes, as x and y")
    slice_axis = getattr(options, "slice_axis", recipe.image.slice_axis)
    if slice_axis != recipe.image.slice_axis:
        faults.add(
            "annotations.slice_axis",
            f"is {slice_axis}, and image.slice_axis is {recipe.image.slice_axis}; give both the same",
        )
    _check_labels_only(recipe, faults)
    columns = getattr(options, "columns", None)
    if recipe.split.by == "column" and not options.names_split:
        faults.add("split.by", "is 'column', but annotations.columns.split names none (reader csv)")
    if recipe.image.window == "column" and getattr(columns, "window", None) is None:
        faults.add("image.window", "is 'column', but annotations.columns.window names none (reader csv)")
    # Where a column or a reader of the user's may name modalities, each image is asked as it is read.
    one_modality = getattr(columns, "modality", None) is None and type(options) is not FreeOptions
    if one_modality and (misfit := preset_misfit(recipe.image.window, recipe.modality)):
        faults.add("image.window", misfit)
    for ignored in set(recipe.ignore_classes) & set(recipe.classes):
        faults.add("ignore_classes", f"{ignored!r} is in classes too; keep one of them")
    if recipe.looks_share and not recipe.looks:
        faults.add("looks_share", "has no effect: no class has looks. Give classes.NAME.looks, or remove it")
    owners: dict[str, str] = {}
    for name, words in recipe.names.items():
        for word in words:
            owner = owners.setdefault(" ".join(word.lower().split()), name)
            if owner != name:
                faults.add("classes", f"{word!r} stands for {owner!r} and for {name!r}; an answer must tell them apart")
    if recipe.phrase is None and not options.reports_only_ and type(options) is not FreeOptions:
        words = [word for words in recipe.names.values() for word in words]
        unwritten = without_a_template(words, negatives=recipe.negatives.use != "drop")
        if unwritten:
            faults.add(
                "classes",
                f"no {unwritten} could be written: each of umed's templates contains one of the names and synonyms "
                f"({', '.join(words)}). Remove the most general of them",
            )
    for flip in recipe.augment.flips if recipe.augment is not None else []:
        sided = [word for words in recipe.names.values() for word in words if names_side(word, flip)]
        if sided:
            faults.add(
                "augment.flips",
                f"{flip} would make the class name {sided[0]!r} false: it holds a side, or what may be one. Remove it",
            )


def _check_labels_only(recipe: Recipe, faults: Faults) -> None:
    """Check ``pseudo_boxes``, and keys that are about boxes where the annotations have none."""
    options = recipe.annotations
    own = type(options) is not FreeOptions  # a user's reader may give either
    if recipe.pseudo_boxes is not None and own and not options.labels_only:
        faults.add(
            "pseudo_boxes",
            f"is given, and the reader {options.reader} gives boxes. Which of the two? Remove pseudo_boxes, or the keys of the "
            "boxes (csv: columns.box; json: boxes and box)",
        )
    if not options.labels_only:
        return
    if options.readers is not None:
        faults.add("annotations.readers", "is about boxes of several readers, and these annotations have no boxes")
    given = recipe.model_fields_set & {"box_tolerance", "least_box_side", "degenerate_boxes"}
    given |= {f"image.{key}" for key in recipe.image.model_fields_set & {"box_frame", "box_axes", "other_size"}}
    for key in sorted(given):
        faults.add(key, "is about boxes, and these annotations have none; remove it")
    if recipe.negatives.use == "drop" and recipe.pseudo_boxes is not None:
        faults.add(
            "negatives", "is 'drop', but pseudo_boxes learns from images without a lesion what is normal; keep them"
        )


def check_hold_out(rule: Optional[HoldOut], classes: set[str], sources: set[str], faults: Faults) -> None:
    """Name classes and sources that the recipe does not have."""
    for key, names, known in (("classes", rule and rule.classes, classes), ("sources", rule and rule.sources, sources)):
        for name in names or ():
            if not known:
                faults.add(f"hold_out.{key}", "has a meaning only in a mixture, which has sources; remove it")
            elif name not in known:
                faults.add(
                    f"hold_out.{key}", unknown_name(key[:-2] if key == "classes" else "source", name, sorted(known))
                )
