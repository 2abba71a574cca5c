"""Which options of a recipe's ``image`` changed something: one that is given and has no effect is a mistake, and is said."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set
from pathlib import Path

from umed_plugin.data.endings import NIFTI_ENDINGS, RASTER_ENDINGS
from umed_plugin.data.images import slice_count
from umed_plugin.data.recipes.recipe import Recipe

# Option -> the images that it acts on, in words.
_ACTS_ON = {
    "window": "images of more than 8 bits",
    "offset": "PNG or TIFF files of more than 8 bits",
    "orientation": "DICOM or NIfTI files",
    "box_frame": "pictures with an EXIF orientation",
    "pixels": "DICOM or NIfTI files",
    "slice_axis": "NIfTI files",
    "volume": "NIfTI files",
    "slices": "volumes, series or files of several pages",
    "tiles": "volumes, series or files of several pages",
}


class UsedOptions:
    """Collects, image by image, which options act on a recipe's images."""

    def __init__(self) -> None:
        self._recipes: dict[str, Recipe] = {}
        self._used: dict[str, set[str]] = defaultdict(set)
        self._images: dict[str, int] = defaultdict(int)

    def add(self, recipe: Recipe, image: Path, *, is_grey_levels: bool, exif: int = 1) -> None:
        """Note an image that was read.

        Args:
            is_grey_levels: True for 8-bit values, to which no window applies.
            exif: its EXIF orientation.
        """
        self._recipes[recipe.name] = recipe
        self._images[recipe.name] += 1
        used = self._used[recipe.name]
        name = image.name.lower()
        is_raster, is_nifti = name.endswith(RASTER_ENDINGS), name.endswith(NIFTI_ENDINGS)
        used |= {"window"} if not is_grey_levels else set()
        used |= {"offset"} if is_raster and not is_grey_levels else set()
        used |= set() if is_raster else {"orientation", "pixels"}
        used |= {"slice_axis", "volume"} if is_nifti else set()
        frame = recipe.image.box_frame
        used |= {"box_frame"} if (exif != 1 if frame == "exif" else not is_raster) else set()
        if "slices" not in used and recipe.image.slices != "annotated":
            used |= {"slices", "tiles"} if slice_count(image, recipe.image.slice_axis) > 1 else set()

    def unused(self, told: Set[tuple[str, str]]) -> list[str]:
        """A line for every option that is given, differs from its default, and acts on none of the images.

        Args:
            told: (recipe's name, option) for which there is a line already.
        """
        lines = []
        for name, recipe in self._recipes.items():
            options, fields = recipe.image, type(recipe.image).model_fields
            for option in _ACTS_ON:
                if getattr(options, option) == fields[option].default or (name, option) in told:
                    continue
                if option == "tiles" and options.slices != "montage":
                    lines.append(f"image.tiles of {name} has no effect, since image.slices is not montage")
                elif option not in self._used[name]:
                    what = "orientation" if option == "box_frame" and options.box_frame == "displayed" else option
                    lines.append(
                        f"image.{option} of {name} has no effect: none of its {self._images[name]} images are "
                        f"{_ACTS_ON[what]}"
                    )
        return lines
