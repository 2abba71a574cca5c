"""``hold_out``: classes and sources that training never sees, so that the test says what a model makes of them (tables 7 and 8).

An image that shows a held-out class, or is of a held-out source, is left out of train and val. In the test it stays, so results
with and without the key are of the same studies. An image with another lesion beside it is left out too: to train on half of its
lesions would teach that the other half is normal. So are all phrases of an image, and all slices of a volume that becomes one.
A report, and a phrase about another class, shows what it names. One that only rules the class out ("no effusion") stays: nearly
every report does so. A remark counts them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Optional

from umed_plugin.data.annotations.base import Annotated, AnnotationSet
from umed_plugin.data.annotations.finding import real_path
from umed_plugin.data.recipes.options import HoldOut
from umed_plugin.grounding.terms import find_terms, ruled_out_classes

TEST = "test"
Picture = tuple[str, Optional[int]]  # real path, and slice


def hold_out(annotations: AnnotationSet, rule: Optional[HoldOut], sources: Mapping[str, str]) -> None:
    """Leave what is held out out of train and val, and mark it in the test.

    Args:
        annotations: of the recipe or mixture, with plain class names and splits; changed.
        rule: None: nothing is held out.
        sources: name in ``hold_out.sources`` -> name of its recipe.
    """
    if rule is None:
        return
    by_recipe = {sources[name]: name for name in rule.sources if name in sources}
    folders: dict[str, str] = {}
    found: dict[Picture, set[str]] = defaultdict(set)
    for item in (*annotations.items, *annotations.missing):
        found[_picture(item, folders)].update(_reasons(item, rule, by_recipe))
    tested: Counter[str] = Counter()
    counted: set[tuple[Picture, str]] = set()
    for items in (annotations.items, annotations.missing):
        kept = []
        for item in items:
            picture = _picture(item, folders)
            reasons = [name for name in (*rule.classes, *rule.sources) if name in found[picture]]
            item.held_out = bool(reasons)
            if reasons and item.split != TEST:
                annotations.left_out[f"held out of {item.split}: {reasons[0]}"] += (picture, item.split) not in counted
                counted.add((picture, item.split))
                continue
            tested.update(reasons)
            kept.append(item)
        items[:] = kept
    _tell(annotations, rule, tested)
    _tell_ruled_out(annotations, rule)
    _tell_described(annotations, rule)


def _picture(item: Annotated, folders: dict[str, str]) -> Picture:
    """What is seen together: an image, whatever sentences are said of it, and all slices of a montage."""
    return real_path(str(item.image), folders), None if item.recipe.image.slices == "montage" else item.slice


def _reasons(item: Annotated, rule: HoldOut, by_recipe: Mapping[str, str]) -> list[str]:
    """The names in the rule that concern the image, or what is said of it."""
    source = [by_recipe[item.recipe.name]] if item.recipe.name in by_recipe else []
    shown = {*item.classes, *(name for text in _texts(item) for _, _, name in find_terms(text, item.recipe.names))}
    return [*(name for name in rule.classes if name in shown), *source]


def _texts(item: Annotated) -> list[str]:
    """The sentences of the annotations that training would show."""
    return [text for text in (item.report, item.phrase) if text]


def _tell_ruled_out(annotations: AnnotationSet, rule: HoldOut) -> None:
    """Remark on the texts of train and val that name a held-out class to say that it is absent."""
    trained = [item for item in annotations.items if item.split != TEST]
    for name in rule.classes:
        count = sum(name in ruled_out_classes(text, item.recipe.names) for item in trained for text in _texts(item))
        if count:
            annotations.faults.remark(
                "hold_out.classes",
                f"{count} reports or phrases of train and val say that {name!r} is absent. They stay, so training reads the name",
            )


def _tell_described(annotations: AnnotationSet, rule: HoldOut) -> None:
    """Remark on what the recipe says of other classes, where that names a held-out class and training questions say it."""
    recipes = {id(item.recipe): item.recipe for item in annotations.items}.values()
    for recipe in (one for one in recipes if one.looks_share):
        for name, looks in recipe.looks.items():
            named = {term for _, _, term in find_terms(looks, recipe.names)} & set(rule.classes)
            if name not in rule.classes and named:
                annotations.faults.remark(
                    f"classes.{name}.looks",
                    f"is {looks!r}. With looks_share, training reads it, so the name of the held-out {', '.join(sorted(named))}",
                )


def _tell(annotations: AnnotationSet, rule: HoldOut, tested: Counter[str]) -> None:
    """Faults for names without a test image, and for a training split that is empty now."""
    for key, names in (("classes", rule.classes), ("sources", rule.sources)):
        for name in names:
            if not tested[name]:
                annotations.faults.add(
                    f"hold_out.{key}", f"{name!r} has no image in the split test, so holding it out would test nothing"
                )
    used = [*annotations.items, *annotations.missing]
    if used and not any(item.split == "train" for item in used):
        annotations.faults.add("hold_out", "leaves no image in the split train. Hold out less")
