"""What every annotation reader gives, and the registry they stand in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from umed_plugin.boxes import Box
from umed_plugin.recipe_faults import Faults
from umed_plugin.registry import Registry


@dataclass
class Annotated:
    """One image, or one slice of a volume, with what the annotations say about it.

    Attributes:
        image: absolute path of the file.
        boxes: xyxy, half-open; pixels in the frame the recipe declares, or 0-1 of it when ``normalised``.
        classes: one per box, as the annotations call it; plain names after `read_annotations`.
        where: annotation file and line, for messages.
        size: width and height that the annotations claim, or None.
        slice: index from 0 in a volume, or None.
        window: low and high that the annotations give, or None.
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
    extras: dict[str, Any] = field(default_factory=dict)


# A reader takes its options (recipe.annotations), the data root and the place to note faults.
Reader = Callable[[Any, Path, Faults], list[Annotated]]
ANNOTATION_READERS: Registry[Reader] = Registry("annotation reader")


def image_folder(options: Any, root: Path, split: str, default: Path) -> Path:
    """The folder of a split's images: ``image_root`` under the data root, or ``default``."""
    return root / options.image_root.format(split=split) if options.image_root is not None else default


def matching_files(root: Path, pattern: str, faults: Faults) -> list[Path]:
    """Files that match a pattern under the root, sorted; none is a fault."""
    found = sorted(path for path in root.glob(pattern) if path.is_file())
    if not found:
        faults.add(root / pattern, "no file matches. Check annotations.files and the data root")
    return found
