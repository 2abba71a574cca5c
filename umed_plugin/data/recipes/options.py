"""The keys of a recipe's parts: terms, classes, image options, splits, negatives. `recipe.Recipe` puts them together."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import AfterValidator, Field, field_validator, model_validator

from umed_plugin.errors import unknown_name
from umed_plugin.faults import StrictModel

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
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
Column = Union[int, str]


class Terms(StrictModel):
    """Terms of use: nothing is redistributed, so the user must know where to get the data and under which licence."""

    licence: str
    url: str
    note: str = ""


class AbnormalityClass(StrictModel):
    """How a class of the annotations is called in plain words.

    Attributes:
        name: plain name, written in diagnoses; classes with the same name are one class.
        synonyms: further names that count as naming it.
    """

    name: str = Field(min_length=1)
    synonyms: list[str] = []


class WindowRange(StrictModel):
    """A grey-value window in the image's unit after the offset: ``centre`` and ``width``, or ``low`` and ``high``."""

    centre: Optional[float] = None
    width: Optional[float] = Field(None, gt=0)
    low: Optional[float] = None
    high: Optional[float] = None

    @model_validator(mode="after")
    def _one_form(self) -> WindowRange:
        given = [name for name in ("centre", "width", "low", "high") if getattr(self, name) is not None]
        if given not in (["centre", "width"], ["low", "high"]):
            raise ValueError(f"{', '.join(given) or 'nothing'} given; needed: centre and width, or low and high")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        return self


class ImageOptions(StrictModel):
    """How pixels become what the model sees. An 8-bit image is grey levels already and gets neither window nor offset.

    Attributes:
        window: ``file`` (DICOM's own window, else the full range), ``full`` (smallest to largest value of the slice),
            ``column`` (the CSV's window column), a preset (abdomen, bone, brain, liver, lung, mediastinum, soft_tissue; CT
            alone) or a range. A list of three of these, without ``column``, gives the red, green and blue channel.
        offset: subtracted from the values of 16-bit PNGs (DeepLesion: 32768 gives Hounsfield units).
        orientation: ``as_stored``, or ``canonical``: DICOM and NIfTI slices are turned as a radiologist sees them (patient's
            right on the image's left, front or head up), by their affine or ImageOrientationPatient.
        slice_axis: stored axis of a NIfTI volume along which ``slice`` counts from 0.
        slices: what becomes an image of a volume or DICOM series: ``annotated``, each slice that the annotations name;
            ``largest_lesion``, the slice with the largest box (the middle one where there is no lesion); ``montage``, slices
            side by side, spread over the volume and moved onto those with lesions.
        tiles: most slices in a montage.
        volume: index from 0 of the volume that is shown of a 4-D NIfTI file.
        box_frame: ``displayed``, boxes are pixels of the image as turned by ``orientation``, or ``stored``, of the slice as
            it lies in the file (NIfTI: x along its first remaining axis, y along the second); these move along.
        box_axes: ``xy``; ``yx`` when boxes were read off the array by row and column.
        other_size: ``stop`` where the annotations claim another size than the file has, or ``scale``: they were drawn on the
            same picture at that size, and their boxes are scaled along with it (TBX11K's XML).
    """

    window: Union[str, WindowRange, list[Union[str, WindowRange]]] = "file"
    offset: float = 0
    orientation: Literal["canonical", "as_stored"] = "canonical"
    slice_axis: Literal[0, 1, 2] = 2
    slices: Literal["annotated", "largest_lesion", "montage"] = "annotated"
    tiles: int = Field(9, ge=2, le=36)
    volume: Optional[int] = Field(None, ge=0)
    box_frame: Literal["displayed", "stored"] = "displayed"
    box_axes: Literal["xy", "yx"] = "xy"
    other_size: Literal["stop", "scale"] = "stop"

    @field_validator("window", mode="before")
    @classmethod
    def _known_windows(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return _known_window(value, ["file", "full", "column", *WINDOW_PRESETS])
        if len(value) != 3:
            raise ValueError(f"{len(value)} windows given; needed: one, or three for red, green and blue")
        return [_known_window(one, ["file", "full", *WINDOW_PRESETS]) for one in value]


def _known_window(value: Any, allowed: list[str]) -> Any:
    if isinstance(value, str) and value not in allowed:
        raise ValueError(unknown_name("window", value, allowed) + " Or a range: {centre: 40, width: 400}")
    return WindowRange.model_validate(value) if isinstance(value, dict) else value


def _sum_to_one(value: dict[str, float]) -> dict[str, float]:
    if not value or abs(sum(value.values()) - 1) > 1e-6 or min(value.values()) < 0:
        raise ValueError(f"sum to {sum(value.values()):g}; needed: 1, none below 0")
    return value


Fractions = Annotated[dict[Split, float], AfterValidator(_sum_to_one)]


class SplitRule(StrictModel):
    """Who goes to train, val and test.

    Attributes:
        by: ``file`` (``files`` or ``split_lists`` say it), ``column`` (the CSV's split column), or ``patient``: a hash of
            ``seed`` and the patient's name says the split. So a patient is never in two, and stays where they are when
            further images are downloaded.
        fractions: for ``patient``; they are met on average, the closer the more patients there are.
        patient_pattern: regular expression on the image's file name whose first group is the patient, where no column says it.
            Default: the first group of ``copy_pattern``, else the file name without ending.
        copy_pattern: regular expression on the image's file name whose first group is the picture that it is an augmented
            copy of. All copies are trained on; val and test keep the first by name, as copies say nothing new there.
    """

    by: Literal["file", "column", "patient"]
    seed: int = 0
    fractions: Fractions = {"train": 0.8, "val": 0.1, "test": 0.1}
    patient_pattern: Optional[str] = None
    copy_pattern: Optional[str] = None

    @field_validator("patient_pattern", "copy_pattern")
    @classmethod
    def _has_group(cls, value: Optional[str]) -> Optional[str]:
        if not _compiled(value).groups and value is not None:
            raise ValueError("needs a group in parentheses around what names the patient or picture")
        return value


def _compiled(pattern: Optional[str]) -> re.Pattern[str]:
    try:
        return re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error


class NegativeList(StrictModel):
    """A CSV that lists images without a lesion, beside annotations that know only images with one.

    Attributes:
        files: the CSV under the data root; a pattern stands for the one file that it matches.
        file, patient: its columns, by header or by number from 0.
        only_rows: column header -> values to keep; other rows are left out.
    """

    files: str
    file: Column
    patient: Optional[Column] = None
    only_rows: dict[str, list[str]] = {}
    delimiter: str = ","


class NegativeRule(StrictModel):
    """Which images without a lesion are taken. ``negatives: keep`` and ``negatives: drop`` are short for ``use`` alone.

    Attributes:
        use: ``keep`` or ``drop`` them.
        only: regular expression on the image's path under the data root; an image without a lesion that it does not match is
            left out, since it may show one that nobody marked.
        listed: a CSV of further images without a lesion; those that are not on disk are left out.
        per_positive: at most so many, in each split, for one image with a lesion; a hash of ``split.seed`` and the path picks.
    """

    use: Literal["keep", "drop"] = "keep"
    only: Optional[str] = None
    listed: Optional[NegativeList] = None
    per_positive: Optional[float] = Field(None, ge=0)

    @field_validator("only")
    @classmethod
    def _is_pattern(cls, value: Optional[str]) -> Optional[str]:
        _compiled(value)
        return value

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> NegativeRule:
        given = [name for name in ("only", "listed", "per_positive") if getattr(self, name) is not None]
        if self.use == "drop" and given:
            raise ValueError(f"use is 'drop', so {', '.join(given)} would have no effect; take out one or the other")
        return self
