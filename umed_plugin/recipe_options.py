"""The keys of a recipe's parts: annotation readers, image options, split rule. `recipe.Recipe` puts them together."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from umed_plugin.errors import unknown_name

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
}
Column = Union[int, str]


class StrictModel(BaseModel):
    """Refuses keys it does not know, and cannot be changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _by_split(value: Any) -> Any:
    return {"": value} if isinstance(value, (str, int)) else value


# A path for all, or one per split; "" is the key of the former.
FilesBySplit = Annotated[
    dict[Literal["", "train", "val", "test"], str], BeforeValidator(_by_split), Field(min_length=1)
]


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


class ReaderOptions(StrictModel):
    """What every reader takes.

    Attributes:
        reader: coco, voc, yolo, csv, mask, or ``my_module:my_reader`` (then all further keys are handed to it).
        files: annotation file, folder or pattern under the data root, or one per split (train, val, test).
        image_root: folder of the images under the data root; ``{split}`` stands for the split. Default: the folder of the
            annotation file (coco, csv) or the data root (the others).
    """

    reader: str
    files: FilesBySplit
    image_root: Optional[str] = None


class CocoOptions(ReaderOptions):
    """COCO JSON: ``images``, ``annotations`` with ``bbox`` [x, y, width, height], ``categories``."""


class VocOptions(ReaderOptions):
    """Pascal VOC: ``files`` is a pattern of XML files, such as ``Annotations/*.xml``.

    Attributes:
        convention: ``one_based`` is Pascal VOC's own (first pixel is 1, last pixel belongs to the box), ``inclusive`` counts
            from 0 and includes the last pixel, ``half_open`` counts from 0 and does not.
        split_lists: text file per split that lists file stems (``ImageSets/Main/train.txt``).
    """

    convention: Literal["one_based", "inclusive", "half_open"] = "one_based"
    split_lists: dict[Split, str] = {}


class YoloOptions(ReaderOptions):
    """YOLO: ``files`` is the folder of label files, ``image_root`` that of the images; an image without one is negative.

    Attributes:
        names: class names in order, or the YAML file (``data.yaml``) that holds them under ``names``.
    """

    names: Union[str, list[str]]


class CsvColumns(StrictModel):
    """Which column holds what, by its header or by its number from 0.

    Attributes:
        file: image file, relative to ``image_root``.
        box: four columns, or one that holds four numbers ("12.5, 30, 44, 71"). An empty box marks a negative image.
        lesion: class; leave out when the file has one class, given as ``only_class``.
        patient, split, modality, slice, window: optional; ``window`` holds "low, high".
    """

    file: Column
    box: Union[Column, list[Column]]
    lesion: Optional[Column] = None
    patient: Optional[Column] = None
    split: Optional[Column] = None
    modality: Optional[Column] = None
    slice: Optional[Column] = None
    window: Optional[Column] = None

    @field_validator("box")
    @classmethod
    def _four(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) != 4:
            raise ValueError(f"{len(value)} columns given; needed: 4, or one column that holds 4 numbers")
        return value


class CsvOptions(ReaderOptions):
    """CSV with a header line; rows of the same image (and slice) belong together.

    Attributes:
        convention: ``xyxy``, ``xywh`` (corner and size) or ``cxcywh`` (middle and size).
        normalised: coordinates are 0-1 of the image instead of pixels.
        only_class: class of every row, where no column says it.
        split_values: value of the split column -> train, val or test; without it the column must say these.
        only_rows: column header -> values to keep; other rows are left out.
        rename: ``[pattern, replacement]`` applied to the file column (regular expression), to get from name to path.
    """

    columns: CsvColumns
    convention: Literal["xyxy", "xywh", "cxcywh"] = "xyxy"
    normalised: bool = False
    delimiter: str = ","
    only_class: Optional[str] = None
    split_values: dict[str, Split] = {}
    only_rows: dict[str, list[str]] = {}
    rename: Optional[tuple[str, str]] = None

    @field_validator("split_values", mode="before")
    @classmethod
    def _keys_as_text(cls, value: Any) -> Any:
        return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_class_source(self) -> CsvOptions:
        if (self.columns.lesion is None) == (self.only_class is None):
            raise ValueError("give either columns.lesion or only_class")
        return self


class MaskOptions(ReaderOptions):
    """Mask images: ``files`` is a pattern of the images, each connected region of its mask is a lesion.

    Attributes:
        masks: path of an image's mask, with ``{stem}`` for the image's name without ending, ``{split}`` for the split.
        values: grey value -> class, for label masks.
        only_class: the class of everything at or above ``threshold`` (JPEG masks have grey levels), for yes/no masks.
        min_area: regions of fewer pixels are slivers and are left out.
    """

    masks: str
    values: dict[int, str] = {}
    only_class: Optional[str] = None
    threshold: int = 128
    min_area: int = 1

    @model_validator(mode="after")
    def _one_class_source(self) -> MaskOptions:
        if bool(self.values) == (self.only_class is not None):
            raise ValueError("give either values (label masks) or only_class (yes/no masks)")
        return self


class FreeOptions(ReaderOptions):
    """Options of a user's own reader: every further key is allowed and handed on."""

    model_config = ConfigDict(extra="allow", frozen=True)


READER_OPTIONS: dict[str, type[ReaderOptions]] = {
    "coco": CocoOptions,
    "csv": CsvOptions,
    "mask": MaskOptions,
    "voc": VocOptions,
    "yolo": YoloOptions,
}


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
            ``column`` (the CSV's window column), a preset (abdomen, bone, brain, liver, lung, mediastinum) or a range.
        offset: subtracted from the values of 16-bit PNGs (DeepLesion: 32768 gives Hounsfield units).
        orientation: ``as_stored``, or ``canonical``: DICOM and NIfTI slices are turned as a radiologist sees them (patient's
            right on the image's left, front or head up), by their affine or ImageOrientationPatient.
        slice_axis: stored axis of a NIfTI volume along which ``slice`` counts from 0.
        box_frame: ``displayed``, boxes are pixels of the image as turned by ``orientation``, or ``stored``, of the slice as
            it lies in the file (NIfTI: x along its first remaining axis, y along the second); these move along.
        box_axes: ``xy``; ``yx`` when boxes were read off the array by row and column.
    """

    window: Union[str, WindowRange] = "file"
    offset: float = 0
    orientation: Literal["canonical", "as_stored"] = "canonical"
    slice_axis: Literal[0, 1, 2] = 2
    box_frame: Literal["displayed", "stored"] = "displayed"
    box_axes: Literal["xy", "yx"] = "xy"

    @field_validator("window", mode="before")
    @classmethod
    def _known_window(cls, value: Any) -> Any:
        allowed = ["file", "full", "column", *WINDOW_PRESETS]
        if isinstance(value, str) and value not in allowed:
            raise ValueError(unknown_name("window", value, allowed) + " Or a range: {centre: 40, width: 400}")
        return WindowRange.model_validate(value) if isinstance(value, dict) else value


class SplitRule(StrictModel):
    """Who goes to train, val and test.

    Attributes:
        by: ``file`` (``files`` or ``split_lists`` say it), ``column`` (the CSV's split column), or ``patient``: patients are
            dealt out by a hash of ``seed`` and their name, so the same patient is never in two splits.
        fractions: for ``patient``.
        patient_pattern: regular expression on the image's file name whose first group is the patient, where no column says it
            (also to keep augmented copies of one image together). Default: the file name without ending.
    """

    by: Literal["file", "column", "patient"]
    seed: int = 0
    fractions: dict[Split, float] = {"train": 0.8, "val": 0.1, "test": 0.1}
    patient_pattern: Optional[str] = None

    @field_validator("fractions")
    @classmethod
    def _sum_to_one(cls, value: dict[str, float]) -> dict[str, float]:
        if abs(sum(value.values()) - 1) > 1e-6 or min(value.values()) < 0:
            raise ValueError(f"sum to {sum(value.values()):g}; needed: 1, none below 0")
        return value

    @field_validator("patient_pattern")
    @classmethod
    def _has_group(cls, value: Optional[str]) -> Optional[str]:
        try:
            groups = re.compile(value or "()").groups
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        if not groups:
            raise ValueError("needs a group in parentheses around what names the patient")
        return value
