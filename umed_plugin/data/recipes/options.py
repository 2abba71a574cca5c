"""The keys of a recipe's parts: terms of use, classes, splits, negatives; `image_options` has those of its images.

`recipe.Recipe` puts them together. Every field has a ``description``: the recipe reference (`recipes.reference`) and the error
for a missing key are made of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import AfterValidator, Field, field_validator, model_validator

from umed_plugin.data.splits import Split
from umed_plugin.errors import unknown_name
from umed_plugin.faults import StrictModel


@dataclass(frozen=True)
class InWords:
    """The type of a key as the recipe reference states it, where the Python type says less than the user may write."""

    text: str


# A column of a CSV by its header, or by its number from 0.
Column = Annotated[Union[int, str], InWords("column")]
BoxColumns = Annotated[Union[Column, list[Column]], InWords("column, or list of four columns")]
# The keys ``convention`` and ``normalised`` of readers whose boxes are four numbers.
Convention = Annotated[
    Literal["xyxy", "xywh", "cxcywh"],
    Field(description="``xyxy``: two corners. ``xywh``: corner and size. ``cxcywh``: centre and size."),
]
Unit = Annotated[
    Literal[False, True, "percent"],
    Field(
        description="``true`` if coordinates are fractions of the image (0-1), ``percent`` if they are percent of it (0-100), as "
        "Label Studio writes them, ``false`` if they are pixels."
    ),
]


class UsageTerms(StrictModel):
    """Terms of use. The plugin redistributes no data, so users must know where to get it and under which licence."""

    licence: str = Field(description="Licence of the data, in words.")
    url: str = Field(description="Where to get the data.")
    note: str = Field("", description="What else a user should know: citation, file names, quirks.")


class AbnormalityClass(StrictModel):
    """Plain name and synonyms of one class of the annotations."""

    name: str = Field(
        min_length=1, description="Plain name, written in diagnoses. Classes with the same name become one class."
    )
    synonyms: list[str] = Field([], description="Further names that count as naming the class in an answer.")
    looks: str = Field(
        "",
        description="What the class looks like, as the end of a sentence: ``a small bright disc``. Some training questions say "
        "it (``looks_share``), and so does the prompt of ``--writer openai``.",
    )

    @field_validator("looks")
    @classmethod
    def _one_sentence(cls, value: str) -> str:
        text = " ".join(value.split()).rstrip(".")
        if value and (not text or re.search(r"[.!?]\s", text)):
            raise ValueError(f"is {value!r}; needed: one sentence, such as: a small bright disc")
        return text


def _sum_to_one(value: dict[str, float]) -> dict[str, float]:
    if not value or not abs(sum(value.values()) - 1) <= 1e-6 or min(value.values()) < 0:  # a NaN is no share either
        raise ValueError(f"sum to {sum(value.values()):g}; needed: 1, none below 0")
    return value


Fractions = Annotated[
    dict[Split, float], AfterValidator(_sum_to_one), InWords("mapping of split to number; they sum to 1")
]


class SplitRule(StrictModel):
    """Which images go to train, val and test."""

    by: Literal["file", "column", "patient"] = Field(
        description="``file``: ``annotations.files`` or ``split_lists`` decide. ``column``: the split column of the table or "
        "JSON. ``patient``: a hash of ``seed`` and the patient's name, so a patient is never in two splits and keeps the split "
        "when more images are downloaded."
    )
    seed: int = Field(0, description="Seed of the hash for ``by: patient``.")
    fractions: Fractions = Field(
        {"train": 0.8, "val": 0.1, "test": 0.1},
        description="Share of each split for ``by: patient``. They are met on average: the more patients, the closer.",
    )
    patient: Optional[Literal["header"]] = Field(
        None,
        description="``header``: a hash of the PatientID in the DICOM header is the patient, where an image has one.",
    )
    patient_pattern: Optional[str] = Field(
        None,
        description="Regular expression on the image's file name, or on its path under the data root if the expression has a "
        "slash. Its first group is the patient, if no column names one. Default: the first group of ``copy_pattern``, else the "
        "file name without its ending.",
    )
    copy_pattern: Optional[str] = Field(
        None,
        description="Regular expression on the same name or path. Its first group is the picture that the image is an augmented "
        "copy of. Training uses all copies; val and test keep only the first by name that is on disk, since copies add no "
        "information there.",
    )

    @field_validator("patient_pattern", "copy_pattern")
    @classmethod
    def _has_group(cls, value: Optional[str]) -> Optional[str]:
        if not compiled(value).groups and value is not None:
            raise ValueError("needs a group in parentheses around what names the patient or picture")
        return value


def compiled(pattern: Optional[str]) -> re.Pattern[str]:
    """A regular expression; the empty one for None.

    Raises:
        ValueError: it is none.
    """
    try:
        return re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error


def with_text_keys(value: dict[Any, Any]) -> dict[str, Any]:
    """A mapping with its keys as text: YAML reads ``1`` as a number, and annotations have names.

    Raises:
        ValueError: two keys are the same text, such as ``1`` and ``"1"``.
    """
    texts = {str(key): item for key, item in value.items()}
    if len(texts) < len(value):
        names = [str(key) for key in value]
        raise ValueError(
            f"the key {next(name for name in names if names.count(name) > 1)!r} is there as number and as text"
        )
    return texts


def checked_template(text: str, allowed: Optional[Sequence[str]] = None) -> str:
    """A text with ``{name}`` to fill in.

    Args:
        allowed: the names that it may hold; None allows every plain name.

    Raises:
        ValueError: it has another name, or braces that do not match.
    """
    names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    for name in names:
        if not re.fullmatch(r"[^.!:{}]+", name) or (allowed is not None and name not in allowed):
            raise ValueError(unknown_name("name in braces", name, allowed or ("key", "field")))
    return text


class ReadersRule(StrictModel):
    """Whose boxes count where several people (readers) read an image. Give ``use`` or ``consensus``."""

    use: Optional[str] = Field(
        None, description="Name of the one reader whose boxes are used, as the annotations write it."
    )
    consensus: Optional[Literal["wbf"]] = Field(
        None,
        description="``wbf``: boxes of one class that overlap by more than ``iou`` are fused by weighted box fusion (Solovyev et "
        "al. 2021). Each reader has the weight 1, shared by the reader's boxes of the same lesion. The fused box is the weighted "
        "mean of the coordinates.",
    )
    iou: float = Field(0.5, gt=0, lt=1, description="Boxes are of one lesion if their IoU is above this.")
    at_least: int = Field(
        2,
        ge=1,
        description="Number of readers who must mark a lesion. An image without such a lesion is negative if at least this many "
        "readers found nothing, and else it is left out. So is an image that fewer readers read.",
    )

    @field_validator("use", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_rule(self) -> ReadersRule:
        if (self.use is None) == (self.consensus is None):
            raise ValueError("give either use (the name of a reader) or consensus (wbf)")
        given = [key for key in ("iou", "at_least") if key in self.model_fields_set]
        if self.use is not None and given:
            raise ValueError(f"{' and '.join(given)} would have no effect together with use")
        return self


def _one_character(value: str) -> str:
    if value == "\\t":  # in single quotes, YAML keeps the backslash
        return "\t"
    if len(value) != 1 or value in '"\r\n':
        raise ValueError(f"is {value!r}; needed: one character, such as ',' or ';', or \\t for a tab")
    return value


Delimiter = Annotated[
    str, AfterValidator(_one_character), Field(description="Character between two columns. ``\\t`` is a tab.")
]
HasHeader = Annotated[
    bool,
    Field(
        description="Whether the first line holds the titles of the columns. If not, name the columns by their numbers."
    ),
]


class ImageList(StrictModel):
    """A CSV that names images."""

    files: str = Field(description="The CSV under the data root. A pattern stands for the one file that it matches.")
    file: Column = Field(description="Column of the image file. Folders in it are not compared.")
    delimiter: Delimiter = ","
    header: HasHeader = True


ProbeKind = Literal["wrong_image", "removed_option", "false_premise", "suggestion"]


class ProbesRule(StrictModel):
    """Probes in the training split (see Evaluation): questions to refuse, wrong suggestions, and their controls."""

    share: float = Field(
        gt=0,
        le=1,
        description="Number of probes and controls to add, as a share of the training records. 0.1 is a start.",
    )
    kinds: list[ProbeKind] = Field(
        ["wrong_image", "removed_option", "false_premise", "suggestion"],
        min_length=1,
        description="Which probes to add, in equal parts.",
    )


class NegativeList(StrictModel):
    """A CSV that lists images without a lesion, for annotations that cover only images with one."""

    files: str = Field(description="The CSV under the data root. A pattern stands for the one file that it matches.")
    file: Column = Field(description="Column of the image file.")
    patient: Optional[Column] = Field(None, description="Column of the patient.")
    split: Optional[Column] = Field(None, description="Column of the split, needed for ``split.by: column``.")
    only_rows: dict[str, list[str]] = Field(
        {}, description="Column header and the values to keep. Other rows are left out."
    )
    delimiter: Delimiter = ","
    header: HasHeader = True


class HoldOut(StrictModel):
    """What is in the test alone: an image that shows it is left out of train and val."""

    classes: list[str] = Field([], description="Plain names of classes.")
    sources: list[str] = Field([], description="Sources, in a mixture: their names under ``sources``.")

    @model_validator(mode="after")
    def _names_something(self) -> HoldOut:
        if not self.classes and not self.sources:
            raise ValueError("names neither classes nor sources; name some, or remove hold_out")
        return self


class NegativeRule(StrictModel):
    """Which images without a lesion are used."""

    use: Literal["keep", "drop"] = Field("keep", description="Keep or drop images without a lesion.")
    only: Optional[str] = Field(
        None,
        description="Regular expression on the image's path under the data root. Images without a lesion that do not match are "
        "left out, since they may show a lesion that nobody marked.",
    )
    listed: Optional[NegativeList] = Field(
        None, description="A CSV of further images without a lesion. Those that are not on disk are left out."
    )
    per_positive: Optional[float] = Field(
        None,
        ge=0,
        description="In each split, at most this many for each image with a lesion. A hash of ``split.seed`` and the path "
        "selects them. A volume that is shown as one image counts once. In a mixture it limits what a source offers, and "
        "``negative_share`` what is used.",
    )

    @field_validator("only")
    @classmethod
    def _is_pattern(cls, value: Optional[str]) -> Optional[str]:
        compiled(value)
        return value

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> NegativeRule:
        given = [name for name in ("only", "listed", "per_positive") if getattr(self, name) is not None]
        if self.use == "drop" and given:
            raise ValueError(f"use is 'drop', so {', '.join(given)} would have no effect; remove one or the other")
        return self
