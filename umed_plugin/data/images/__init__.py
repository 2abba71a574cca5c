"""The only code that reads pixels: PNG, JPEG, TIFF, 16-bit PNG, DICOM and NIfTI slices -> 8-bit RGB as the model sees it.

MONAI's readers open DICOM and NIfTI files, Pillow all others. The reader objects are used directly, because
``LoadImage(reader=...)`` silently falls back to other readers, and because the default of PydicomReader swaps rows and columns.
All arrays here are ``[row, column]``. Whatever turns an image for display also returns an `Orientation`, which turns its boxes.

8-bit images keep their grey values, as in LLaVA. All others go through a window, after the DICOM modality table or rescale, the
NIfTI scaling, or the recipe's offset. DICOM and NIfTI slices whose pixels are not square are resampled, as a viewer does.
`dicom`, `nifti` and `raster` read files, which `by_format` chooses between, `series` orders folders, `windows` computes grey
levels, and `shown` turns and joins slices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

from umed_plugin.data.endings import RASTER_ENDINGS
from umed_plugin.data.images.by_format import burned_in_annotation, has_dicom_magic, read_stored, slice_count
from umed_plugin.data.images.raster import DEEP_MODES, load_pixels, opened_raster, read_by_llava, swaps_sides
from umed_plugin.data.images.series_folder import file_states
from umed_plugin.data.images.shown import ShownImage, canonical_orientation, load_image, show_image
from umed_plugin.data.images.stored import READERS, Remark, StoredSlice, check_for_model
from umed_plugin.data.images.windows import Window
from umed_plugin.errors import UmedError

__all__ = [
    "READERS",
    "Remark",
    "ShownImage",
    "StoredSlice",
    "Window",
    "burned_in_annotation",
    "canonical_orientation",
    "check_picture",
    "file_states",
    "has_dicom_magic",
    "load_image",
    "open_image",
    "read_by_llava",
    "read_stored",
    "reader_version",
    "show_image",
    "shown_size",
    "slice_count",
]


def check_picture(path: Path) -> None:
    """Check a file that LLaVA itself will open; only a TIFF that is turned is decoded for it.

    Raises:
        UmedError: the file is missing, damaged or too large, or has a size that LLaVA's image processor cannot take. Or it has
            more than 8 bits, which LLaVA would clip. Or it is a TIFF that LLaVA would show scrambled.
    """
    with opened_raster(path) as image:
        check_for_model(path, *image.size)
        if image.mode in DEEP_MODES:
            raise UmedError(
                f"{path}: has more than 8 bits (mode {image.mode}). LLaVA shows all values above 255 as white, and `umed "
                "evaluate` does not. `umed recipe build` renders such images. Or save it with 8 bits, or train with "
                "--umed_image_cache."
            )
        if swaps_sides(image):
            load_pixels(image, path)


def reader_version(path: Union[str, Path]) -> list[str]:
    """What the name of a cached image depends on beside its file and reading: the version of our readers.

    PNG, JPEG and the like look the same in every version, so their entries stay valid.
    """
    name = str(path).lower()
    same = name.endswith(RASTER_ENDINGS) and not name.endswith((".tif", ".tiff"))
    return [] if same else [READERS]


def open_image(path: Union[str, Path], reading: Optional[dict[str, Any]] = None) -> Any:
    """A PIL image in RGB without metadata: 8-bit images exactly as LLaVA opens them, all others by `load_image`.

    Args:
        path: an image file, or the folder of a DICOM series.
        reading: arguments of `load_image`, as in records that name a DICOM or NIfTI file.

    Raises:
        UmedError: the file is missing, damaged, or holds something that cannot be shown.
    """
    from PIL import Image

    path = Path(path)
    if not reading and path.name.lower().endswith(RASTER_ENDINGS):
        with opened_raster(path) as image:
            if image.mode not in DEEP_MODES:
                load_pixels(image, path)
                shown = image.convert("RGB")
                # Other libraries would turn the picture by an EXIF orientation that it still carries, and its boxes not.
                shown.info = {}
                return shown
    # Records that were built before slices were resampled do not say so, and their boxes are of stored pixels.
    options = {"pixels": "as_stored", **reading} if reading else {}
    return Image.fromarray(load_image(path, **options)[0])


def shown_size(path: Union[str, Path], reading: Optional[dict[str, Any]] = None) -> tuple[int, int]:
    """(width, height) of what `open_image` gives; of PNG, JPEG and their like, but TIFF, without decoding the pixels.

    Raises:
        UmedError: as `open_image`.
    """
    path = Path(path)
    if reading or not path.name.lower().endswith(RASTER_ENDINGS):
        width, height = open_image(path, reading).size
    else:
        with opened_raster(path) as image:
            # Some versions of Pillow state the sides of a TIFF before they turn it.
            if image.format == "TIFF":
                load_pixels(image, path)
            width, height = image.size
    return width, height
