"""The keys of a recipe for the reader ``csv``: which column holds what, and which rows count."""

from __future__ import annotations

import re
from typing import Any, Optional

from pydantic import Field, field_validator, model_validator

from umed_plugin.data.recipes.options import (
    BoxColumns,
    Column,
    Convention,
    Delimiter,
    HasHeader,
    ImageList,
    Unit,
    compiled,
    with_text_keys,
)
from umed_plugin.data.recipes.readers import ReaderOptions
from umed_plugin.data.splits import Split
from umed_plugin.faults import StrictModel


class CsvColumns(StrictModel):
    """Which column holds what. Name a column by its header, or by its number from 0."""

    file: Column = Field(description="Image file, relative to ``image_root``.")
    box: Optional[BoxColumns] = Field(
        None,
        description='Four columns, or one column that holds four numbers ("12.5, 30, 44, 71"). An empty box marks a negative '
        "image. Without this key the rows are labels of images, for ``pseudo_boxes``.",
    )
    lesion: Optional[Column] = Field(None, description="Class. Leave it out if ``only_class`` is given.")
    patient: Optional[Column] = Field(None, description="Patient.")
    split: Optional[Column] = Field(None, description="Split, for ``split.by: column``.")
    reader: Optional[Column] = Field(
        None,
        description="Who read the image, where several people did (VinDr-CXR: ``rad_id``). See ``annotations.readers``.",
    )
    modality: Optional[Column] = Field(None, description="Modality, such as CT.")
    slice: Optional[Column] = Field(
        None, description="Index from 0 of a slice in its volume. The column may be absent from the file."
    )
    window: Optional[Column] = Field(None, description='Grey-value window "low, high", for ``image.window: column``.')

    @field_validator("box")
    @classmethod
    def _four(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) != 4:
            raise ValueError(f"{len(value)} columns given; needed: 4, or one column that holds 4 numbers")
        return value


class CsvOptions(ReaderOptions):
    """CSV, with a header line unless ``header: false``. Rows of the same image (and slice) belong together."""

    names_images_ = True
    yaml_example_ = """
annotations:
  reader: csv
  files: boxes.csv
  image_root: images
  columns: {file: file, box: [x1, y1, x2, y2], lesion: finding, patient: patient_id}
  convention: xyxy
"""

    columns: CsvColumns = Field(description="Which column holds what.")
    convention: Convention = "xyxy"
    normalised: Unit = False
    delimiter: Delimiter = ","
    header: HasHeader = True
    label_separator: Optional[str] = Field(
        None,
        min_length=1,
        description="For labels without boxes: text between several labels in one cell (NIH: a vertical bar).",
    )
    leave_out_listed: Optional[ImageList] = Field(
        None,
        description="A CSV of images that are left out, such as those to which another recipe gives boxes.",
    )
    phrase: Optional[Column] = Field(
        None,
        description="Column that holds a sentence, such as ``label_text`` of MS-CXR. Each pair of image and "
        "sentence is a record then: the question asks where the sentence is seen, and the answer is its boxes.",
    )
    only_class: Optional[str] = Field(None, description="Class of every row, if no column names it.")
    split_values: dict[str, Split] = Field(
        {}, description="Value of the split column and its split. Without it the column must hold train, val or test."
    )
    only_rows: dict[str, list[str]] = Field(
        {}, description="Column header and the values to keep. Other rows are left out."
    )
    no_finding: list[str] = Field(
        [],
        description="Values of the class column that say that the image has no lesion, such as ``No finding``. Their rows have "
        "no box. For labels without boxes, an empty text stands for an empty cell.",
    )
    leave_out_images: dict[str, list[str]] = Field(
        {},
        description="Column header and values. An image (or slice) with such a row is left out whole: without that row it would "
        "show a lesion that is not marked.",
    )
    rename: Optional[tuple[str, str]] = Field(
        None,
        description="Regular expression and replacement that turn the file column into a path. If there is no such file, the "
        "name is looked up unchanged. Holds for ``negatives.listed`` too.",
    )

    @field_validator("rename")
    @classmethod
    def _can_rename(cls, value: Optional[tuple[str, str]]) -> Optional[tuple[str, str]]:
        if value is not None:
            try:
                compiled(value[0]).sub(value[1], "")
            except re.error as error:
                raise ValueError(f"the replacement {value[1]!r} does not fit the expression: {error}") from error
        return value

    @field_validator("split_values", mode="before")
    @classmethod
    def _keys_as_text(cls, value: Any) -> Any:
        return with_text_keys(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_class_source(self) -> CsvOptions:
        if (self.columns.lesion is None) == (self.only_class is None):
            raise ValueError("give either columns.lesion or only_class")
        if self.no_finding and self.columns.lesion is None:
            raise ValueError("no_finding has no effect without columns.lesion")
        if self.readers is not None and self.columns.reader is None:
            raise ValueError("readers needs columns.reader, the column that names who read the image")
        if self.labels_only:
            given = [key for key in ("convention", "normalised") if key in self.model_fields_set]
            given += ["columns.reader"] if self.columns.reader is not None else []
            if given:
                raise ValueError(
                    f"{' and '.join(given)} would have no effect without columns.box; give it, or remove them"
                )
        elif self.label_separator is not None:
            raise ValueError(
                "label_separator is for labels without boxes, and columns.box is given; remove one of the two"
            )
        return self

    @property
    def labels_only(self) -> bool:
        """True if no column holds boxes."""
        return self.columns.box is None

    @property
    def names_split(self) -> bool:
        """True if a column names the split."""
        return self.columns.split is not None
