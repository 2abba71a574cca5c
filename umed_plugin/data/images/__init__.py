"""The only code that reads pixels: PNG, JPEG, TIFF, 16-bit PNG, DICOM and NIfTI slices -> 8-bit RGB as the model sees it.

MONAI's readers open DICOM and NIfTI files, Pillow all others. The reader objects are used directly, because
``LoadImage(reader=...)`` silently falls back to other readers, and because the default of PydicomReader swaps rows and columns.
All arrays here are ``[row, column]``. Whatever turns an image for display also returns an `Orientation`, which turns its boxes.

8-bit images keep their grey values, as in LLaVA. All others go through a window, after the DICOM modality table or rescale, the
NIfTI scaling, or the recipe's offset. DICOM and NIfTI slices whose pixels are not square are resampled, as a viewer does.
`dicom`, `nifti` and `raster` read files, `series` orders folders, `windows` computes grey levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from umed_plugin.data.endings import DICOM_ENDINGS, IMAGE_ENDINGS, NIFTI_ENDINGS, RASTER_ENDINGS
from umed_plugin.data.images.dicom import frame_count, open_header, read_dicom
from umed_plugin.data.images.nifti import read_nifti, volume_shape
from umed_plugin.data.images.raster import (
    DEEP_MODES,
    load_pixels,
    opened_raster,
    raster_pages,
    read_by_llava,
    read_raster,
    swaps_sides,
)
from umed_plugin.data.images.series import burned_in_flag, series_files, series_flags, series_stack
from umed_plugin.data.images.series_folder import file_states
from umed_plugin.data.images.stored import (
    READERS,
    Remark,
    StoredSlice,
    check_for_model,
    check_size,
    checked_index,
    square_size,
)
from umed_plugin.data.images.windows import Window, to_grey_levels
from umed_plugin.data.places import not_fetched
from umed_plugin.errors import UmedError, UsageError, unknown_name
from umed_plugin.grounding.geometry import Montage, Orientation

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
    "slice_count",
]


@dataclass(frozen=True)
class ShownImage:
    """An image as the model sees it, and what is known of its file.

    Attributes:
        pixels: uint8 RGB ``[height, width, 3]``.
        orientation: how it was turned from the stored slice; for a montage, how each tile was.
        exif: an EXIF orientation that was not applied, 1 to 8; 1 if there is none.
        is_grey_levels: True for 8-bit values, to which no window applies.
        remarks: what a user should know of the file.
    """

    pixels: np.ndarray
    orientation: Orientation
    exif: int = 1
    is_grey_levels: bool = False
    remarks: tuple[Remark, ...] = ()


def load_image(
    path: Union[str, Path],
    *,
    window: Window = "file",
    offset: float = 0.0,
    orientation: str = "canonical",
    slice: Union[int, Sequence[int], None] = None,
    slice_axis: int = 2,
    volume: Optional[int] = None,
    pixels: str = "square",
    beside: Sequence[Union[str, Path]] = (),
) -> tuple[np.ndarray, Orientation]:
    """Read an image, a slice of a volume or series, or a montage of slices, as the model sees it.

    Args:
        path: an image file, or the folder of one DICOM series.
        window: ``file`` (the file's own window), ``full`` (minimum to maximum), a preset such as ``lung``, ``(low, high)``, or a
            `WindowRange`. Three of these give the red, green and blue channel. See `image_options.ImageOptions`.
        offset: subtracted from the values of PNG and TIFF files of more than 8 bits.
        orientation: ``canonical`` (as a radiologist sees it) or ``as_stored``.
        slice: index from 0: along ``slice_axis`` of a NIfTI volume, of a frame of a multi-frame DICOM file, of a page of a TIFF,
            or in a series, counted from the patient's right, front or feet. A sequence of indices gives a montage
            (`geometry.Montage`).
        slice_axis: 0, 1 or 2, of the NIfTI array as stored.
        volume: index from 0 of a volume in a 4-D NIfTI file.
        pixels: ``square``: DICOM and NIfTI slices whose pixels are not square are resampled. ``as_stored``: they are not.
        beside: further images that are shown to the right of it, all of the height of the lowest one.

    Returns:
        uint8 RGB ``[height, width, 3]``, and how it was turned from the stored slice (for a montage: how each tile was; with
        ``beside``: not at all, and of the size of the whole).

    Raises:
        UmedError: the file is missing, unreadable, or holds something that cannot be shown.
        UsageError: the window does not exist.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from PIL import Image
        >>> file = Path(tempfile.mkdtemp()) / "slice.png"
        >>> Image.fromarray(np.array([[0, 100, 200]], dtype=np.uint16)).save(file)
        >>> pixels, orientation = load_image(file, window=(0, 100))
        >>> pixels.shape, pixels[0, :, 0].tolist()
        ((1, 3, 3), [0, 255, 255])
        >>> orientation.size
        (3, 1)
    """
    shown = show_image(
        path,
        window=window,
        offset=offset,
        orientation=orientation,
        slice=slice,
        slice_axis=slice_axis,
        volume=volume,
        pixels=pixels,
        beside=beside,
    )
    return shown.pixels, shown.orientation


def show_image(
    path: Union[str, Path],
    *,
    slice: Union[int, Sequence[int], None] = None,
    volume: Optional[int] = None,
    beside: Sequence[Union[str, Path]] = (),
    **options: Any,
) -> ShownImage:
    """Read an image as `load_image` does, with its arguments, and return what is known of its file too.

    Raises:
        UmedError: as `load_image`.
    """
    path = Path(path)
    if beside:
        parts = [show_image(path, slice=slice, volume=volume, **options)]
        return _side_by_side(path, parts + [show_image(other, **options) for other in beside])
    if slice is not None and not isinstance(slice, int):
        return _montage(path, [show_image(path, slice=index, volume=volume, **options) for index in slice])
    return _show_one(path, slice, volume, **options)


def _show_one(
    path: Path,
    slice: Optional[int],
    volume: Optional[int],
    *,
    window: Window = "file",
    offset: float = 0.0,
    orientation: str = "canonical",
    slice_axis: int = 2,
    pixels: str = "square",
) -> ShownImage:
    for name, value, allowed in (
        ("orientation", orientation, ("canonical", "as_stored")),
        ("pixels", pixels, ("square", "as_stored")),
    ):
        if value not in allowed:
            raise UsageError(unknown_name(name, value, allowed))
    stored = read_stored(path, offset=offset, slice=slice, slice_axis=slice_axis, volume=volume)
    height, width = stored.values.shape[:2]
    square = square_size(path, width, height, stored.pixel_size) if pixels == "square" else None
    turned = Orientation(width, height, square_size=square)
    if orientation == "canonical" and stored.directions is not None:
        turned = canonical_orientation(width, height, *stored.directions)
        turned = replace(turned, square_size=square[::-1] if square and turned.transpose else square)
    grey = turned.apply_array(to_grey_levels(stored, window, path))
    rgb = grey if grey.ndim == 3 else np.repeat(grey[:, :, None], 3, axis=2)
    return ShownImage(
        np.ascontiguousarray(rgb, dtype=np.uint8), turned, stored.exif, stored.is_grey_levels, stored.remarks
    )


def _montage(path: Path, parts: list[ShownImage]) -> ShownImage:
    """The slices side by side, and the orientation that they share."""
    kinds = {part.orientation for part in parts}
    if len(kinds) != 1:
        shapes = sorted({f"{kind.size[0]}x{kind.size[1]}" for kind in kinds})
        raise UmedError(
            f"{path}: slices of {', '.join(shapes) or 'no'} pixels cannot be one montage: all must have the same size and be "
            "turned in the same way."
        )
    plan = Montage(*parts[0].orientation.size, len(parts))
    check_size(path, *plan.size)
    whole = np.zeros((plan.size[1], plan.size[0], 3), np.uint8)
    for tile, part in enumerate(parts):
        x, y = plan.corner(tile)
        whole[y : y + plan.height, x : x + plan.width] = part.pixels
    remarks = tuple(dict.fromkeys(remark for part in parts for remark in part.remarks))
    return replace(parts[0], pixels=whole, remarks=remarks)


def _side_by_side(path: Path, parts: list[ShownImage]) -> ShownImage:
    """Images next to each other, left to right, scaled to the height of the lowest one."""
    from PIL import Image

    height = min(part.pixels.shape[0] for part in parts)
    scaled = []
    for part in parts:
        rows, columns = part.pixels.shape[:2]
        picture = Image.fromarray(part.pixels)
        same = (max(1, round(columns * height / rows)), height)
        scaled.append(part.pixels if rows == height else np.asarray(picture.resize(same, Image.Resampling.BICUBIC)))
    width = sum(picture.shape[1] for picture in scaled)
    check_size(path, width, height)
    remarks = tuple(dict.fromkeys(remark for part in parts for remark in part.remarks))
    whole = np.ascontiguousarray(np.concatenate(scaled, axis=1))
    grey = all(part.is_grey_levels for part in parts)
    return ShownImage(whole, Orientation(width, height), is_grey_levels=grey, remarks=remarks)


def slice_count(path: Path, slice_axis: int = 2) -> int:
    """Number of slices of a NIfTI volume or a series, of frames of a DICOM file, or of pages of another image.

    Raises:
        UmedError: the file cannot be read.
    """
    if path.is_dir():
        return len(series_files(path))
    if path.name.lower().endswith(NIFTI_ENDINGS):
        return volume_shape(path)[slice_axis]
    if path.name.lower().endswith(DICOM_ENDINGS) or has_dicom_magic(path):
        return frame_count(path)
    return raster_pages(path) if path.name.lower().endswith(RASTER_ENDINGS) else 1


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


def read_stored(
    path: Path,
    *,
    offset: float = 0.0,
    slice: Optional[int] = None,
    slice_axis: int = 2,
    volume: Optional[int] = None,
) -> StoredSlice:
    """Read one slice as it is stored in the file. The arguments are those of `load_image`."""
    if path.is_dir():
        stack = series_stack(path)
        stored = read_dicom(stack.files[checked_index(path, slice, len(stack.files), "slice")], None)
        return replace(stored, remarks=(*stored.remarks, *stack.remarks))
    if not path.is_file():
        raise UmedError(f"{path}: {not_fetched(path) or 'no such image file'}")
    name = path.name.lower()
    if name.endswith(NIFTI_ENDINGS):
        return read_nifti(path, slice, slice_axis, volume)
    if name.endswith(DICOM_ENDINGS) or has_dicom_magic(path):
        return read_dicom(path, slice)
    if name.endswith(RASTER_ENDINGS):
        return read_raster(path, offset, slice)
    raise UmedError(
        f"{path}: has neither a known file extension nor a DICOM header. Allowed: {', '.join(IMAGE_ENDINGS)}"
    )


def burned_in_annotation(path: Path) -> Optional[str]:
    """What a DICOM header says about text in the pixels: ``YES`` or ``NO``; None if it says nothing, and for other files.

    A series has text if one of its files says so, and no text only if all of its files say so.
    """
    if path.is_dir():
        flags = series_flags(path)
        if "YES" in flags:
            return "YES"
        return "NO" if flags == {"NO"} else None
    if not path.name.lower().endswith(DICOM_ENDINGS) and not has_dicom_magic(path):
        return None
    return burned_in_flag(open_header(path, pixels=False))


def has_dicom_magic(path: Path) -> bool:
    """True for a DICOM file with a preamble, whatever its name is."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def canonical_orientation(width: int, height: int, along_x: np.ndarray, along_y: np.ndarray) -> Orientation:
    """The orientation in which a radiologist sees a slice.

    Axial: the patient's left is on the right, the back is down. Coronal: left on the right, feet down. Sagittal: back on the
    right, feet down. Oblique slices are treated as the nearest of these.

    Args:
        width, height: of the stored slice, in pixels.
        along_x, along_y: directions of stored x and y in patient coordinates (left, posterior, superior).
    """
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    x_axis, y_axis = max(pairs, key=lambda pair: abs(along_x[pair[0]]) + abs(along_y[pair[1]]))
    # The first of the plane's two patient axes, in the order left, posterior, superior, must point to the right.
    transpose = x_axis > y_axis
    x_sign, y_sign = along_x[x_axis], along_y[y_axis]
    right, down = (y_sign, x_sign) if transpose else (x_sign, y_sign)
    down_axis = max(x_axis, y_axis)
    return Orientation(width, height, transpose, bool(right < 0), bool(down > 0 if down_axis == 2 else down < 0))
