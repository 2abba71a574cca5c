"""PNG, JPEG, BMP, TIFF, GIF and WebP files, of 8 bits and of more, with one page or several.

What is shown is what LLaVA's own ``Image.open(path).convert("RGB")`` shows. It does not follow the EXIF orientation of JPEG, PNG
and WebP; Pillow itself turns TIFF. Nor does it follow a resolution that differs between x and y. `StoredSlice.remarks` say so.

Pillow opens the files. MONAI's PILReader gives the same values, but importing it imports torch, transformers and bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import numpy as np

from umed_plugin.data.endings import RASTER_ENDINGS
from umed_plugin.data.images.stored import Remark, StoredSlice, check_file_size, check_size, checked_index, unreadable
from umed_plugin.data.places import not_fetched
from umed_plugin.errors import UmedError

DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
# Pillow goes by the content and would start other programs for some formats (EPS), whatever the file is called.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "GIF", "WEBP", "JPEG2000", "PPM")
_MANY_PAGES = ("TIFF", "GIF", "WEBP", "PNG")
_WIDTH, _HEIGHT, _PHOTOMETRIC, _SUBFILE, _TIFF_ORIENTATION = 256, 257, 262, 254, 274
_TRANSPOSED = (5, 6, 7, 8)  # orientations that swap the sides
_EXIF_ORIENTATION = 0x0112


def read_raster(path: Path, offset: float, page: Optional[int] = None) -> StoredSlice:
    """Read an image, or one page of it.

    Args:
        offset: subtracted from the values of an image with more than 8 bits.
        page: index from 0 of a page of a TIFF, or of a frame of an animation; None only for files with one.

    Raises:
        UmedError: the file is damaged or too large, or has no such page.
    """
    with opened_raster(path) as image:
        index = checked_index(path, page, page_count(image), "page")
        if index:
            image.seek(index)
            check_raster(image, path)
        # Pillow takes the tag out while it turns a TIFF.
        turned = _tiff_orientation(image)
        load_pixels(image, path)
        deep = image.mode in DEEP_MODES
        # Palette, alpha and CMYK images would become indices or wrong channels. LLaVA converts in the same way.
        values = np.asarray(image if deep else image.convert("RGB"))
        exif, remarks, inverted = exif_tag(image), _remarks(image, turned), _white_is_zero(image)
    if not deep:
        return StoredSlice(values, is_grey_levels=True, exif=exif, remarks=remarks)
    grey = values.astype(np.float32)
    grey -= np.float32(offset)
    return StoredSlice(grey, exif=exif, remarks=remarks, inverted=inverted)


@contextmanager
def opened_raster(path: Path) -> Iterator[Any]:
    """The file as a PIL image whose size was checked and whose pixels are not decoded yet.

    Raises:
        UmedError: the file is damaged or too large.
    """
    from PIL import Image

    if not path.is_file():
        raise UmedError(f"{path}: {not_fetched(path) or 'no such image file'}")
    with unreadable(path):
        check_file_size(path)
        _check_webp(path)
        with Image.open(path, formats=_FORMATS) as image:
            check_raster(image, path)
            yield image


def load_pixels(image: Any, path: Path) -> None:
    """Decode the pixels of an opened image, as LLaVA does.

    Raises:
        UmedError: a TIFF is shown scrambled. Pillow maps one without compression into memory, and some of its versions then take
            the sides as they are after it is turned.
    """
    size = (image.tag_v2[_HEIGHT], image.tag_v2[_WIDTH]) if swaps_sides(image) else None
    image.load()
    if size not in (None, image.size):
        raise UmedError(
            f"{path}: is a TIFF with an orientation and without compression, and this Pillow, so LLaVA too, shows it scrambled. "
            "Save it compressed or without the tag, in the orientation in which the boxes were drawn"
        )


def swaps_sides(image: Any) -> bool:
    """Whether Pillow swaps width and height of an opened TIFF when it decodes it."""
    return _tiff_orientation(image) in _TRANSPOSED


def _tiff_orientation(image: Any) -> Any:
    return image.tag_v2.get(_TIFF_ORIENTATION, 1) if image.format == "TIFF" else 1


def check_raster(image: Any, path: Path) -> None:
    """Refuse an opened image that is too large to be decoded."""
    width, height = image.size
    check_size(path, width, height, 4 if image.mode in ("I", "F", "RGBA", "CMYK") else 3)


def read_by_llava(path: Path) -> bool:
    """True if LLaVA's own ``Image.open(path).convert("RGB")`` reads this file correctly: an 8-bit image in a PIL format.

    A file with several pages is not, since LLaVA always reads its first.
    """
    if not path.name.lower().endswith(RASTER_ENDINGS):
        return False
    with opened_raster(path) as image:
        return image.mode not in DEEP_MODES and page_count(image) == 1


def raster_pages(path: Path) -> int:
    """Number of pages of a file."""
    with opened_raster(path) as image:
        return page_count(image)


def page_count(image: Any) -> int:
    """Number of pages of an opened image. Smaller copies of the first page (a TIFF's thumbnails) do not count.

    The second picture of a phone's JPEG (MPO) is a depth map or the like, and does not count either.
    """
    pages = int(getattr(image, "n_frames", 1)) if image.format in _MANY_PAGES else 1
    if pages == 1 or image.format != "TIFF":
        return pages
    reduced = []
    for page in range(1, pages):
        image.seek(page)
        reduced.append(bool(int(image.tag_v2.get(_SUBFILE, 0)) & 1))
    image.seek(0)
    return 1 if all(reduced) else pages


def exif_tag(image: Any) -> int:
    """The EXIF orientation, 1 to 8, that Pillow has not applied; 1 if there is none, or if Pillow turned the picture (TIFF)."""
    if image.format == "TIFF":
        return 1
    try:
        value = int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except (ValueError, TypeError, LookupError, SyntaxError, OSError):
        return 1  # damaged metadata of a picture that can be shown
    return value if 1 <= value <= 8 else 1


def _white_is_zero(image: Any) -> bool:
    """True if small values of a deep TIFF are bright. Pillow inverts only those of 8 bits."""
    return image.mode in DEEP_MODES and image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0


def _remarks(image: Any, turned: int) -> tuple[Remark, ...]:
    found = []
    value = exif_tag(image)
    if value != 1:
        found.append(Remark("carry an EXIF orientation, which LLaVA does not follow", f"orientation {value}"))
    if turned != 1:
        found.append(
            Remark("are TIFF files with an orientation. Pillow, and so LLaVA, turns them", f"orientation {turned}")
        )
    if not _square_pixels(image):
        found.append(Remark("state pixels that are not square, which LLaVA does not follow: they are shown as stored"))
    return tuple(found)


def _square_pixels(image: Any) -> bool:
    """False if the file's resolution, or its ratio of the sides, differs between x and y."""
    for key in ("aspect", "dpi", "resolution", "jfif_density"):
        value = image.info.get(key)
        if isinstance(value, tuple) and len(value) == 2 and all(float(each) > 0 for each in value):
            return abs(float(value[0]) / float(value[1]) - 1) <= 0.01
    return True


def _check_webp(path: Path) -> None:
    """Check the size that a WebP file states before Pillow opens it, which already allocates its canvas."""
    with path.open("rb") as file:
        head = file.read(30).ljust(30, b"\0")
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return

    def number(start: int, stop: int) -> int:
        return int.from_bytes(head[start:stop], "little")

    if head[12:16] == b"VP8X":
        check_size(path, 1 + number(24, 27), 1 + number(27, 30), bytes_per_pixel=4)
    elif head[12:16] == b"VP8L":
        check_size(path, 1 + (number(21, 25) & 0x3FFF), 1 + (number(21, 25) >> 14 & 0x3FFF), bytes_per_pixel=4)
    else:
        check_size(path, number(26, 28) & 0x3FFF, number(28, 30) & 0x3FFF, bytes_per_pixel=4)
