"""Any image file by the reader of its format: one slice as it is stored, the number of slices, text in the pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Optional

from umed_plugin.data.endings import DICOM_ENDINGS, IMAGE_ENDINGS, NIFTI_ENDINGS, RASTER_ENDINGS
from umed_plugin.data.images.dicom import frame_count, open_header, read_dicom
from umed_plugin.data.images.nifti import read_nifti, volume_shape
from umed_plugin.data.images.raster import raster_pages, read_raster
from umed_plugin.data.images.series import burned_in_flag, series_files, series_flags, series_stack
from umed_plugin.data.images.stored import StoredSlice, checked_index
from umed_plugin.data.places import not_fetched
from umed_plugin.errors import UmedError


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
