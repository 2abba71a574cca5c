"""The key ``image`` of a recipe: windows of grey values, planes and slices, and the frame that boxes are in."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BeforeValidator, Field, model_validator

from umed_plugin.data.recipes.options import InWords
from umed_plugin.errors import unknown_name
from umed_plugin.faults import StrictModel

# Centre and width in Hounsfield units, as radiologists set them.
WINDOW_PRESETS = {
    "abdomen": (50.0, 400.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "liver": (60.0, 160.0),
    "lung": (-600.0, 1500.0),
    "mediastinum": (50.0, 350.0),
    "soft_tissue": (40.0, 400.0),
}


class WindowRange(StrictModel):
    """A grey-value window, in the image's unit after ``offset``. Give ``centre`` and ``width``, or ``low`` and ``high``."""

    centre: Optional[float] = Field(None, description="Middle of the window.")
    width: Optional[float] = Field(None, gt=0, description="Width of the window.")
    low: Optional[float] = Field(None, description="Value shown as black.")
    high: Optional[float] = Field(None, description="Value shown as white; above ``low``.")

    @model_validator(mode="after")
    def _one_form(self) -> WindowRange:
        given = [name for name in ("centre", "width", "low", "high") if getattr(self, name) is not None]
        if given not in (["centre", "width"], ["low", "high"]):
            raise ValueError(f"{', '.join(given) or 'nothing'} given; needed: centre and width, or low and high")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        return self


def _known_windows(value: Any) -> Any:
    if not isinstance(value, list):
        return _known_window(value, ["file", "full", "column", *WINDOW_PRESETS])
    if len(value) != 3:
        raise ValueError(f"{len(value)} windows given; needed: one, or three for red, green and blue")
    return [_known_window(window, ["file", "full", *WINDOW_PRESETS]) for window in value]


def _known_window(value: Any, allowed: list[str]) -> Any:
    if isinstance(value, str) and value not in allowed:
        raise ValueError(unknown_name("window", value, allowed) + " Or a range: {centre: 40, width: 400}")
    return WindowRange.model_validate(value) if isinstance(value, dict) else value


class ImageOptions(StrictModel):
    """How pixels become what the model sees. 8-bit images are grey levels already: window and offset do not apply to them."""

    window: Annotated[
        Union[str, WindowRange, list[Union[str, WindowRange]]],
        BeforeValidator(_known_windows),
        InWords("name, range, or list of three"),
    ] = Field(
        "file",
        description="``file``: DICOM's own window, or the full range where the file has none. ``full``: from the smallest to "
        "the largest value of the slice. ``column``: the window column of the CSV. A preset, for CT alone: "
        + ", ".join(f"``{name}``" for name in WINDOW_PRESETS)
        + ". Or a range: ``{centre: 40, width: 400}`` or ``{low: -160, high: 240}``. A list of three, without ``column``, gives "
        "the red, green and blue channel.",
    )
    offset: float = Field(
        0, description="Subtracted from the values of 16-bit PNGs (DeepLesion: 32768 gives Hounsfield units)."
    )
    orientation: Literal["canonical", "as_stored"] = Field(
        "canonical",
        description="``canonical``: DICOM and NIfTI slices are turned as a radiologist views them, by their affine or "
        "ImageOrientationPatient (patient's right on the image's left, front or head up). ``as_stored``: not turned.",
    )
    slice_axis: Literal[0, 1, 2] = Field(
        2, description="Stored axis of a NIfTI volume along which slices are numbered from 0."
    )
    slices: Literal["annotated", "largest_lesion", "montage"] = Field(
        "annotated",
        description="Images made from a volume or DICOM series. ``annotated``: every slice that the annotations name. "
        "``largest_lesion``: the slice with the largest box (the middle slice if there is no lesion). ``montage``: slices side "
        "by side, spread over the volume and moved onto those with lesions. All slices of the volume must be in one split, and a "
        "montage that would show a slice that is left out, such as one with an ignored class, is left out too.",
    )
    tiles: int = Field(9, ge=2, le=36, description="Maximum number of slices in a montage.")
    volume: Optional[int] = Field(None, ge=0, description="Index from 0 of the volume to show from a 4-D NIfTI file.")
    pixels: Literal["square", "as_stored"] = Field(
        "square",
        description="``square``: DICOM and NIfTI slices whose pixels are not square are resampled for display, together with "
        "their boxes. ``as_stored``: one stored pixel is one shown pixel.",
    )
    box_frame: Literal["stored", "displayed", "exif"] = Field(
        "stored",
        description="``stored``: boxes are in pixels of the image as it lies in the file (NIfTI: x along its first remaining "
        "axis, y along the second), and are turned along with it. ``displayed``: in pixels of the DICOM or NIfTI slice as turned "
        "by ``orientation``, before it is resampled. ``exif``: in pixels of the picture as programs show it that follow its EXIF "
        "orientation; LLaVA does not follow it.",
    )
    box_axes: Literal["xy", "yx"] = Field(
        "xy", description="``yx`` if the boxes were read off the array by row and column, else ``xy``."
    )
    other_size: Literal["stop", "scale", "stretch"] = Field(
        "stop",
        description="When the annotations state another image size than the file has. ``stop``: report a fault. ``scale``: the "
        "boxes were drawn on the same picture at that size and are scaled with it. ``stretch``: the same, for a picture that "
        "was squeezed, each side by its own factor (TBX11K's XML).",
    )


# Words that stand for computed tomography in a modality. Neither OCT nor SPECT is in Hounsfield units.
_CT_WORDS = frozenset({"ct", "cta", "cbct", "cect", "hrct", "ldct", "mdct", "msct", "ncct", "nect"})


def is_ct(modality: str) -> bool:
    """Whether a modality in words is computed tomography, whose values are Hounsfield units.

    Example:
        >>> [is_ct(text) for text in ("CT", "PET/CT", "chest ct", "Computed Tomography", "OCT", "SPECT", "MRI", "")]
        [True, True, True, True, False, False, False, False]
    """
    words = re.findall(r"[a-z]+", modality.lower())
    return not _CT_WORDS.isdisjoint(words) or " ".join(words[:2]).startswith(
        ("computed tomograph", "computertomograph")
    )


def preset_misfit(window: Any, modality: str) -> Optional[str]:
    """Why a window of ``image.window`` is not for images of a modality, as text; None if it is, or the modality is not known."""
    presets = [each for each in (window if isinstance(window, list) else [window]) if each in list(WINDOW_PRESETS)]
    if not presets or not modality or is_ct(modality):
        return None
    return (
        f"is {presets[0]!r}, a range in Hounsfield units, and the modality is {modality!r}, not CT. Allowed here: file, full, "
        "column, or a range in the images' own unit, such as {low: 0, high: 800}"
    )
