"""The normal images of which ``pseudo_boxes`` learns what is normal: which ones, and whether there are enough."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.splits import picked_by_hash
from umed_plugin.data.recipes.pseudo_boxes import FEWEST_NORMALS, NEGATIVES
from umed_plugin.faults import Faults

Group = tuple[str, str]  # recipe and modality, which have one map


def normal_images(normals: Sequence[Annotated]) -> list[Annotated]:
    """The normal images of every recipe and modality: ``shots`` of the train split, from as many patients as possible."""
    groups: dict[Group, list[Annotated]] = defaultdict(list)
    for item in normals:
        rule = item.recipe.pseudo_boxes
        if rule is None or item.split != "train":
            continue
        inside = item.image.is_relative_to(item.root)
        name = item.image.relative_to(item.root).as_posix() if inside else str(item.image)
        if rule.normal == NEGATIVES or re.search(rule.normal, name):
            groups[item.recipe.name, item.modality].append(item)
    return [item for group in groups.values() for item in by_patients_in_turn(group)]


def enough_normals(group: Group, shots: Sequence[Annotated], labelled: int, faults: Faults) -> bool:
    """Whether there are enough normal images of a modality, of more than one patient; a fault is added if not.

    Args:
        group: recipe and modality.
        shots: its normal images that can be read.
        labelled: number of images that need boxes.
        faults: of the recipe.
    """
    name, modality = group
    what = f"modality {modality!r}" if modality else "the images (the recipe names no modality)"
    if len(shots) < FEWEST_NORMALS:
        faults.add(
            f"{name}: pseudo_boxes.normal",
            f"{what}: {labelled} images have a label and no box, and the train split has {len(shots)} without a lesion. Needed: "
            f"{FEWEST_NORMALS} at least, of which the map learns what is normal. Add some (negatives, annotations.no_finding), "
            "or leave these images out",
        )
        return False
    patients = {item.patient for item in shots}
    if len(patients) < 2:
        faults.add(
            f"{name}: pseudo_boxes.normal",
            f"{what}: all {len(shots)} normal images are of one patient ({shots[0].patient!r}), and the map would learn "
            "that everybody else is abnormal. Needed: two patients at least. Is split.patient_pattern right?",
        )
        return False
    return True


def by_patients_in_turn(items: list[Annotated]) -> list[Annotated]:
    """The first ``shots`` of the items, chosen by a hash: one of each patient, then a second of each, and so on."""
    rule = items[0].recipe.pseudo_boxes
    assert rule is not None
    turn: dict[str, int] = defaultdict(int)
    turns: list[tuple[int, Annotated]] = []
    for item in picked_by_hash(items, len(items), rule.seed):
        turns.append((turn[item.patient], item))
        turn[item.patient] += 1
    return [item for _, item in sorted(turns, key=lambda pair: pair[0])][: rule.shots]
