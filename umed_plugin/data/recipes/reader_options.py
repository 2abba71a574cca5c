"""The keys of a recipe's ``annotations``, by reader."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from umed_plugin.data.recipes.options import Column, Split
from umed_plugin.faults import StrictModel


def _by_split(value: Any) -> Any:
    return {"": value} if isinstance(value, (str, int)) else value


# A path for all, or one per split; "" is the key of the former.
FilesBySplit = Annotated[
    dict[Literal["", "train", "val", "test"], str], BeforeValidator(_by_split), Field(min_length=1)
]


class ReaderOptions(StrictModel):
    """What every reader takes.

    Attributes:
        reader: coco, voc, yolo, csv, json, mask, or ``my_module:my_reader`` (then all further keys are handed to it).
        files: annotation file, folder or pattern under the data root, or one per split (train, val, test). For coco, csv and
            json a pattern stands for the one file that it matches.
        image_root: folder of the images under the data root, a list of folders that are looked through in order, or either
            per split. ``*`` stands for any part of a name, ``{split}`` for the split. Default: the folder of the annotation
            file (coco, csv, json) or the data root (the others).
    """

    reader: str
    files: FilesBySplit
    image_root: Union[str, list[str], dict[Split, Union[str, list[str]]], None] = None

    def image_roots(self, split: str) -> list[str]:
        """The folders of a split's images, as the recipe writes them; none where it leaves them to the reader."""
        given = self.image_root.get(split) if isinstance(self.image_root, dict) else self.image_root  # type: ignore[call-overload]
        listed = [given] if isinstance(given, str) else given or []
        return [folder.format(split=split) for folder in listed]


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
        leave_out_images: column header -> values; an image (or slice) with such a row is left out whole, since without that
            row it would show a lesion that nothing marks.
        rename: ``[pattern, replacement]`` applied to the file column (regular expression), to get from name to path. Where
            there is no such file, the name as it stands is looked for.
    """

    columns: CsvColumns
    convention: Literal["xyxy", "xywh", "cxcywh"] = "xyxy"
    normalised: bool = False
    delimiter: str = ","
    only_class: Optional[str] = None
    split_values: dict[str, Split] = {}
    only_rows: dict[str, list[str]] = {}
    leave_out_images: dict[str, list[str]] = {}
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


class JsonOptions(ReaderOptions):
    """JSON with one entry per image: an object of image name -> entry, or a list of entries.

    Attributes:
        image: path of an image, with ``{key}`` for its name in the object, or ``{field}`` for a field of its entry.
        boxes: field of the entry that lists the boxes; an empty list marks a negative image.
        box: four fields of a box, in the order of ``convention``, or one field that holds four numbers.
        lesion: field of a box that names the class; leave out when there is one class, given as ``only_class``.
        size: fields of the entry with the image's width and height in pixels; patient: field of the entry. Both optional.
        convention: ``xyxy``, ``xywh`` (corner and size) or ``cxcywh`` (middle and size), in pixels.
    """

    image: str
    boxes: str
    box: Union[str, list[str]]
    lesion: Optional[str] = None
    only_class: Optional[str] = None
    size: Optional[tuple[str, str]] = None
    patient: Optional[str] = None
    convention: Literal["xyxy", "xywh", "cxcywh"] = "xyxy"

    @field_validator("box")
    @classmethod
    def _four(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) != 4:
            raise ValueError(f"{len(value)} fields given; needed: 4, or one field that holds 4 numbers")
        return value

    @model_validator(mode="after")
    def _one_class_source(self) -> JsonOptions:
        if (self.lesion is None) == (self.only_class is None):
            raise ValueError("give either lesion or only_class")
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
    "json": JsonOptions,
    "mask": MaskOptions,
    "voc": VocOptions,
    "yolo": YoloOptions,
}
