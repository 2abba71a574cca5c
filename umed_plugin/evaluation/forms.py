"""Forms of what a run leaves on disk: the keys and types of ``evaluation.json`` and of each line of ``predictions.jsonl``.

A file is checked where it is read, once. A damaged value is then an error that names file, line and key, and not a Python error
in the table or the gallery that uses the value. Types are exact (``"1"`` is not a number). Further keys are kept.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

from umed_plugin.faults import Faults, validated


class Form(BaseModel):
    """Base of all forms."""

    model_config = ConfigDict(strict=True, extra="allow")


Box = Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
Count = Annotated[int, Field(ge=0, le=2**53)]  # what a float, and JavaScript, can still count to


class HeatForm(Form):
    """`umed_plugin.model.heat_map.HeatMap`."""

    grid: Annotated[list[Count], Field(min_length=2, max_length=2)]
    values: str
    peak: FiniteFloat
    covers: FiniteFloat
    of_true_name: bool

    @model_validator(mode="after")
    def _one_byte_a_patch(self) -> HeatForm:
        values, (rows, columns) = base64.b64decode(self.values), self.grid
        if len(values) != rows * columns:
            raise ValueError(f"{len(values)} values for a grid of {rows} x {columns} patches.")
        return self


class ExaminedForm(Form):
    """What a further pass of the model found."""

    vision_relevance: Optional[float] = None
    heat: Optional[HeatForm] = None


class KeptForm(Form):
    """What is read back of an answer that was kept before it was scored."""

    answer: str
    losses: list[Optional[float]]
    examined: Optional[ExaminedForm] = None


class PredictionForm(Form):
    """A line of ``predictions.jsonl``."""

    id: str
    image: str
    question: str
    answer: str
    truth: str
    values: dict[str, FiniteFloat]
    cluster: str
    options: list[str] = []
    losses: list[Optional[float]] = []
    groups: dict[str, str] = {}
    examined: Optional[ExaminedForm] = None


class _DrawnForm(Form):
    """What a report draws of a recipe's study, in lines of all versions."""

    true_classes: list[str]
    true_boxes: list[Box]
    boxes: list[Box]
    set_iou: FiniteFloat
    modality: str = ""
    image_aspect_ratio: Literal["pad", "square"] = "pad"
    reading: Optional[dict[str, Any]] = None
    answer_type: str = ""
    image_size: Optional[Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]] = None


class StudyForm(PredictionForm, _DrawnForm):
    """A line of a recipe's evaluation."""

    groups: dict[str, str]

    @field_validator("values")
    @classmethod
    def _has_accuracy(cls, values: dict[str, float]) -> dict[str, float]:
        return values if "without_box" in values else _having(values, "accuracy")  # a phrase asks for no class

    @field_validator("groups")
    @classmethod
    def _has_source(cls, groups: dict[str, str]) -> dict[str, str]:
        return _having(groups, "source")


class OldStudyForm(_DrawnForm):
    """A line of a recipe's evaluation from before schema 2."""

    id: str
    image: str
    question: str
    answer: str
    accuracy: FiniteFloat
    values: Optional[dict[str, FiniteFloat]] = None
    vision_relevance: Optional[float] = None
    heat: Optional[HeatForm] = None


class MetricForm(Form):
    """What `umed_plugin.evaluation.metrics.metric.measure` gives for a metric; earlier versions gave a part of it."""

    value: Optional[float] = None
    ci95: Optional[Interval] = None
    n: Count
    units: Optional[Count] = None
    interval: Optional[str] = None
    lower_is_better: bool = False


class ConstantForm(Form):
    """What `umed_plugin.evaluation.constants.best_constants` gives for a metric."""

    value: float
    answer: str
    limit: Optional[float] = None


class _ResamplingForm(Form):
    unit: str = "image"


class SummaryForm(Form):
    """``evaluation.json``."""

    benchmark: str
    checkpoint: str
    template: str
    metrics: dict[str, MetricForm]
    resampling: Optional[_ResamplingForm] = None
    boxes: dict[str, Any] = {}
    skipped: Count = 0
    constants: dict[str, ConstantForm] = {}
    treatment: str = ""


class RecipeSummaryForm(SummaryForm):
    """``evaluation.json`` of a recipe's studies."""

    @field_validator("metrics")
    @classmethod
    def _has_mean_iou(cls, metrics: dict[str, MetricForm]) -> dict[str, MetricForm]:
        return _having(metrics, "mean_iou")


def _having(named: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in named:
        raise ValueError(f"has no {name}; found: {', '.join(named) or 'nothing'}.")
    return named


def check_object(file: Path, content: Any, form: type[Form], remedy: str) -> None:
    """Check what a JSON file holds. ``remedy`` says what to do about a damaged one, as in "evaluate again".

    Raises:
        UmedError: it is damaged; all of its faults are named.
    """
    _check(file, [(f"{file}: ", content)], form, remedy)


def check_lines(file: Path, lines: Iterable[Any], form: type[Form], remedy: str) -> None:
    """Check the lines of a JSONL file, the first of which is line 1. See `check_object`.

    Raises:
        UmedError: it is damaged; all of its faults are named with their lines, the first 25 in full.
    """
    _check(file, ((f"{file}:{number}: ", line) for number, line in enumerate(lines, start=1)), form, remedy)


def _check(file: Path, parts: Iterable[tuple[str, Any]], form: type[Form], remedy: str) -> None:
    faults = Faults()
    for prefix, content in parts:
        if isinstance(content, dict):
            validated(form, content, prefix, faults)
        else:
            faults.add(prefix.rstrip(": "), f"holds a {type(content).__name__}; expected an object.")
    faults.raise_if_any(f"{file} is damaged (remedy: {remedy})")
