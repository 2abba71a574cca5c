"""One image between its annotations and its record, and what finds boxes for images that have a label and none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Protocol

import numpy as np

from umed_plugin.data.annotations import Annotated, AnnotationSet
from umed_plugin.data.recipes.recipe import AnyRecipe, sources_of
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.grounding.boxes import Box


@dataclass
class Prepared:
    """One annotated image after its pixels were read and its boxes checked against them.

    Attributes:
        size: width and height of the image as the model receives it, in pixels.
        boxes, classes: of its lesions, in pixels of that image, from top to bottom.
        labels: what it shows, where no box says at which place; else empty.
        shown: uint8 RGB ``[height, width, 3]``, as the model receives it; empty in a build, which reads no image that is known.
        by_llava: True if LLaVA itself reads the file as ``shown``; else ``shown`` is written as PNG.
        reading: arguments of `load_image` that gave the pixels, serializable as JSON.
        is_grey_levels: True for 8-bit values, to which no window applies.
        exif: its EXIF orientation, 1 to 8.
        evaluated: True if the image is also in an evaluation set.
        rendered: path of the PNG under ``out_dir`` that shows it; empty if there is none.
        burned_in: what its DICOM header says about text in the pixels, or None.
        file_size: width and height of the picture in its file, in pixels.
        box_score: how far the anomaly map stands out where it drew the image's pseudo-box, 0-1; None for annotated boxes.
    """

    item: Annotated
    size: tuple[int, int]
    boxes: list[Box]
    classes: list[str]
    shown: np.ndarray
    by_llava: bool
    reading: dict[str, Any] = field(default_factory=dict)
    is_grey_levels: bool = False
    exif: int = 1
    evaluated: bool = False
    rendered: str = ""
    burned_in: Optional[str] = None
    labels: list[str] = field(default_factory=list)
    file_size: tuple[int, int] = (0, 0)
    box_score: Optional[float] = None


class FindsBoxes(Protocol):
    """Finds boxes for images that have a label and none."""

    def normals(self, normals: Sequence[Annotated]) -> list[Annotated]:
        """Those of the recipes' normal images that are needed."""

    def __call__(
        self,
        images: Sequence[Prepared],
        normals: Sequence[Prepared],
        annotations: AnnotationSet,
        image_aspect_ratio: str,
    ) -> None:
        """Set ``boxes``, ``classes`` and ``box_score`` of images with ``labels``, and empty ``labels``.

        Images that keep their labels get no box. They are counted in ``annotations.left_out``; mistakes are added to
        ``annotations.faults``.
        """


def has_pseudo_boxes(recipe: AnyRecipe) -> bool:
    """Whether a recipe, or a source of a mixture, asks for pseudo-boxes."""
    return any(source.pseudo_boxes is not None for source in sources_of(recipe))


def check_finder(recipe: AnyRecipe, find_boxes: Optional[FindsBoxes], render: bool) -> None:
    """Refuse a recipe with ``pseudo_boxes`` where nothing can find them."""
    if not has_pseudo_boxes(recipe):
        return
    if find_boxes is None:
        raise UmedError(
            f"{recipe.path}: has pseudo_boxes, which need a vision tower. Build the records first: umed recipe build "
            f"{recipe.path} --tower CKPT --out FILE. Then give FILE in place of the recipe"
        )
    if not render:
        raise UsageError(
            "render: pseudo-boxes are found in images as LLaVA reads them, so they are rendered; set render=True"
        )


def picture_name(item: Annotated) -> str:
    """The name of what an item shows."""
    original = os.path.relpath(item.image, item.root)
    return f"{item.recipe.name}/{original}" + ("" if item.slice is None else f"#{item.slice}")


def rendered_name(item: Annotated) -> str:
    """Where the item's image is rendered to, relative to ``out_dir``, if no other picture is there."""
    return (Path("images") / (picture_name(item).replace("../", "").replace("#", "_slice") + ".png")).as_posix()
