"""Images that have a label and no box: checks that hold for every reader that can give them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Optional

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.faults import Faults

GOOD_FOR = (
    "They say what an image shows and not where, so they teach nothing about boxes. Give the recipe `pseudo_boxes: "
    "{normal: negatives}`: then `umed recipe build --tower CKPT` finds boxes for them, on which both stages train"
)


def labels_of(texts: Sequence[str], no_finding: Sequence[str], where: str, faults: Faults) -> Optional[list[str]]:
    """The labels of an image, each once; an empty list for one without a lesion, None after a fault.

    Args:
        texts: as written; an empty one stands for a label that is not there.
        no_finding: texts that say that there is no lesion.
    """
    texts = list(dict.fromkeys(text.strip() for text in texts)) or [""]
    none = [text for text in texts if text in no_finding]
    labels = [text for text in texts if text and text not in no_finding]
    if labels and none:
        faults.add(where, f"says {none[0]!r} (annotations.no_finding) and names {labels[0]!r}. Remove one of the two")
        return None
    if not labels and not none:
        faults.add(
            where,
            "has no label. Name what the image shows; for an image without a lesion write a value of annotations.no_finding "
            '(`no_finding: [""]` if an empty label means none)',
        )
        return None
    return labels


def check_labels(items: Sequence[Annotated], recipe: Recipe, faults: Faults) -> None:
    """Add faults for labels without boxes that cannot become records, and for recipes that have both boxes and pseudo-boxes."""
    labelled = [item for item in items if item.labels]
    boxed = [item for item in items if item.boxes]
    rule = recipe.pseudo_boxes
    if rule is None and labelled:
        faults.add(
            labelled[0].where,
            f"{len(labelled)} images have a label and no box ({_counted(labelled)}). {GOOD_FOR}",
        )
    if rule is not None and boxed:
        faults.add(
            boxed[0].where,
            f"{len(boxed)} images have boxes, and the recipe has pseudo_boxes. Which of the two? Remove pseudo_boxes, or read "
            "the annotations without their boxes (csv: no columns.box)",
        )
    elif rule is not None and not labelled:
        faults.no_effect("pseudo_boxes", "has no effect, since no image has a label without a box")
    if labelled and recipe.image.slices != "annotated":
        faults.add(
            "image.slices",
            f"is {recipe.image.slices!r}, which needs boxes: a label does not say which slice shows the lesion. Use annotated, "
            "and name the slice",
        )


def _counted(items: Sequence[Annotated]) -> str:
    counts = Counter(name for item in items for name in item.labels)
    shown = ", ".join(f"{name}: {count}" for name, count in counts.most_common(3))
    return shown + (", ..." if len(counts) > 3 else "")


def split_label(text: str, separator: Optional[str]) -> list[str]:
    """The labels in one cell."""
    return [text] if not separator else re.split(re.escape(separator), text)
