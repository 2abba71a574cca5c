"""In which pixels the boxes of an image are, and the way from there to the image as the model sees it.

Boxes are of the pixels as they lie in the file (``stored``, what annotation formats of DICOM mean), of the slice as a radiologist
sees it before it is resampled (``displayed``), or of a picture that was turned by its EXIF orientation (``exif``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from umed_plugin.data.images import Remark, ShownImage
from umed_plugin.grounding.boxes import Box
from umed_plugin.grounding.geometry import exif_orientation

Size = tuple[int, int]


@dataclass(frozen=True)
class BoxFrame:
    """The pixels in which the boxes of an image are.

    Attributes:
        name: ``stored``, ``displayed`` or ``exif`` (``image.box_frame`` of a recipe).
        shown: the image.
    """

    name: str
    shown: ShownImage

    @property
    def size(self) -> Size:
        """Width and height of the frame, in pixels."""
        turned = self.shown.orientation
        if self.name == "displayed":
            return turned.turned_size
        if self.name == "exif":
            return exif_orientation(self.shown.exif, turned.width, turned.height).size
        return turned.width, turned.height

    def to_shown(self, boxes_px: Sequence[Sequence[float]]) -> list[Box]:
        """Boxes of the frame -> boxes of the image as shown, xyxy in pixels."""
        turned = self.shown.orientation
        if self.name == "displayed":
            return turned.resample_boxes(boxes_px)
        if self.name == "exif":
            boxes_px = exif_orientation(self.shown.exif, turned.width, turned.height).undo_boxes(boxes_px)
        return turned.apply_boxes(boxes_px)


def size_fault(stated: Sequence[int], frame: BoxFrame, name: str, other_size: str) -> Optional[str]:
    """Why boxes that were drawn on an image of the stated size would be wrong; None if they fit, or can be scaled.

    Args:
        stated: width and height in the annotations, in pixels.
        name: of the image.
        other_size: ``stop``, ``scale`` or ``stretch`` (``image.other_size`` of a recipe).
    """
    size, stated = frame.size, (int(stated[0]), int(stated[1]))
    # Boxes drawn on the slice after resampling are on the same picture.
    if stated == size or (frame.name == "displayed" and stated == frame.shown.orientation.size):
        return None
    found = f"says that {name} is {stated[0]}x{stated[1]}, but the file is {size[0]}x{size[1]}"
    turned = _turned_remedy(stated, frame)
    if turned:
        return f"{found}. {turned}"
    if other_size == "stop":
        remedy = "scale" if _same_shape(stated, size) else "stretch"
        return (
            f"{found}. Boxes would be wrong: annotations and images are not of the same version. If only the size differs: "
            f"image: {{other_size: {remedy}}}"
        )
    if other_size == "scale" and not _same_shape(stated, size):
        return (
            f"{found}. The ratio of the sides differs, so it is not the same picture at another size. If it was squeezed "
            "to the other size: image: {other_size: stretch}"
        )
    return None


def _turned_remedy(stated: Size, frame: BoxFrame) -> Optional[str]:
    """What to do if the sides are swapped because something turned the picture; None if nothing known did."""
    if stated != frame.size[::-1]:
        return None
    if frame.shown.exif >= 5:
        other = "stored" if frame.name == "exif" else "exif"
        drawn = "as stored" if frame.name == "exif" else "as programs show it that follow EXIF"
        return (
            f"Its EXIF orientation is {frame.shown.exif}, and LLaVA reads it unturned. If the boxes were drawn on the picture "
            f"{drawn}: image: {{box_frame: {other}}}"
        )
    if frame.shown.orientation.transpose:
        other = "stored" if frame.name == "displayed" else "displayed"
        return f"The slice is turned for display. If the boxes are of the {other} slice: image: {{box_frame: {other}}}"
    if any("TIFF" in remark.kind for remark in frame.shown.remarks):
        return (
            "It is a TIFF with an orientation, and Pillow, so LLaVA too, turns it. Write the files without that tag, in the "
            "orientation in which the boxes were drawn."
        )
    return "Width and height are swapped. Are the columns of the size right?"


def _same_shape(stated: Size, size: Size) -> bool:
    """True if the ratio of the sides is the same, up to rounding to whole pixels."""
    scale = max(size) / max(stated)
    return all(abs(one * scale - other) <= max(1.0, scale) for one, other in zip(stated, size))


def frame_remarks(frame: BoxFrame, boxes: bool) -> list[Remark]:
    """What a user should know of how the image was turned, and of where its boxes were taken from."""
    shown, turned = frame.shown, frame.shown.orientation
    where = {"stored": "stored", "displayed": "displayed", "exif": "turned"}[frame.name]
    taken = f"Boxes are taken as in {where} pixels (image.box_frame: {frame.name})" if boxes else ""
    found = []
    for remark in shown.remarks:
        is_turned = "orientation" in remark.kind
        found.append(remark._replace(kind=f"{remark.kind}. {taken}") if is_turned and taken else remark)
    if turned.turns and taken:
        found.append(Remark(f"were turned as a radiologist sees them. {taken}"))
    if turned.square_size:
        stored, square = turned.turned_size, turned.square_size
        found.append(
            Remark(
                "have pixels that are not square, and were resampled together with their boxes (image.pixels: square)",
                f"{stored[0]}x{stored[1]} is shown as {square[0]}x{square[1]}",
            )
        )
    return found
