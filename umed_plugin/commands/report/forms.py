"""Forms of what a training leaves for the report: ``trainer_state.json``, ``umed.json`` and ``candidates.jsonl``.

See `umed_plugin.evaluation.forms`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional, Union

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError, ValidationInfo, field_validator, model_validator

from umed_plugin.evaluation.forms import Box, Count, Form
from umed_plugin.grounding.square_move import SquareMove


class TrainerStateForm(Form):
    """``trainer_state.json`` of transformers' trainer.

    A metric is a number in each row of ``log_history`` that has it. What is never a number is not a metric and may be anything.
    """

    global_step: Count = 0
    max_steps: int = 0
    log_history: list[dict[str, Any]] = []

    @field_validator("log_history")
    @classmethod
    def _metrics_are_numbers(cls, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        metrics = {name for row in rows for name, value in row.items() if _is_number(value)} | {"step", "train_runtime"}
        for place, row in enumerate(rows):
            for name in metrics & row.keys():
                if not _is_number(row[name]) or (name == "step" and type(row[name]) is not int):
                    raise ValueError(f"row {place} has {name} = {row[name]!r}. Expected: a number.")
        return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) <= 2**53)


class _SettingsForm(Form):
    """Flags of a training: the one that the report computes with."""

    max_steps: int = -1


class ManifestForm(Form):
    """What a training or an upgrade was made with, as ``umed.json`` and ``umed_manifest.json`` hold it."""

    versions: Optional[dict[str, Any]] = None


class DecisionForm(Form):
    """What ``rewarding: auto`` has decided."""

    stage_2: str
    because: list[str]


class RunSummaryForm(Form):
    """``summary.json`` of a demo or an upgrade: what the report shows of it."""

    seconds: Optional[Annotated[FiniteFloat, Field(ge=0)]] = None
    rewarding_auto: Optional[DecisionForm] = None


class FlagsForm(Form):
    """``umed.json``."""

    umed_stage: Optional[str] = None
    settings: Optional[_SettingsForm] = None
    made_with: Optional[ManifestForm] = None


class _ObjectsForm(Form):
    ref: list[str]
    bbox: list[Box]


class _CandidateForm(Form):
    """An answer; all further keys are rewards."""

    __pydantic_extra__: dict[str, Optional[float]]

    text: str
    reward: Optional[float]


class _StudyForm(Form):
    """The study that was asked about. Without ``image``, it is not drawn."""

    image: Optional[str] = None
    image_aspect_ratio: Optional[Literal["pad", "square"]] = None
    reading: Optional[dict[str, Any]] = None
    augmented: Optional[dict[str, Any]] = None
    source: Optional[str] = None
    modality: Optional[str] = None
    question: str = ""
    reference: str = ""

    @field_validator("augmented")
    @classmethod
    def _is_a_move(cls, augmented: Optional[dict[str, Any]]) -> Optional[dict[str, Any]]:
        if augmented is not None:
            try:
                TypeAdapter(SquareMove).validate_python({**augmented})
            except ValidationError as error:
                raise ValueError(f"is not a movement ({error.errors()[0]['msg']}).") from error
            unknown = augmented.keys() - SquareMove.__dataclass_fields__.keys()
            if unknown or "shift" not in augmented:
                raise ValueError(f"is not a movement: found the keys {', '.join(augmented) or 'none'}.")
        return augmented

    @model_validator(mode="after")
    def _is_seen_somehow(self) -> _StudyForm:
        if self.image and self.image_aspect_ratio is None:
            raise ValueError("names an image, but no image_aspect_ratio. Expected: pad or square.")
        return self


class CandidatesForm(Form):
    """A line of ``candidates.jsonl`` (`umed_plugin.training.candidate_log`)."""

    step: Count
    id: Union[str, int]
    true: _ObjectsForm
    study: _StudyForm = _StudyForm()
    candidates: list[_CandidateForm] = Field(min_length=1)
    weights: Optional[dict[str, Optional[float]]] = None
    normalised: Optional[dict[str, list[Optional[float]]]] = None
    extra_sampling: Count = 0
    learnt_from: bool = True

    @field_validator("candidates")
    @classmethod
    def _have_the_same_rewards(cls, candidates: list[_CandidateForm]) -> list[_CandidateForm]:
        names = [set(candidate.__pydantic_extra__ or {}) for candidate in candidates]
        if any(other != names[0] for other in names):
            raise ValueError(f"differ in their rewards. Expected in each: {', '.join(sorted(names[0])) or 'none'}.")
        return candidates

    @field_validator("normalised")
    @classmethod
    def _of_every_reward(cls, normalised: Any, info: ValidationInfo) -> Any:
        candidates = info.data.get("candidates") or []  # missing if they are damaged
        for name in (candidates[0].__pydantic_extra__ or {}) if candidates and normalised else ():
            if len(normalised.get(name, [])) != len(candidates):
                found = f"{len(normalised.get(name, []))} values of {name}"
                raise ValueError(f"holds {found} for {len(candidates)} candidates.")
        return normalised
