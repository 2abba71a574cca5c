"""Evaluation of grounded diagnoses: greedy answers to the records' questions, scored as the rewards score them.

The four figures that every stage of the demo is measured by, all 0-1:

- ``accuracy``: share of studies whose answer names exactly the true classes (for one without abnormality: none, and no box).
- ``mean_iou``: mean set IoU over the studies WITH a lesion; unmatched boxes, true or predicted, count as 0.
- ``acc_at_50``: share of the studies with a lesion whose set IoU is at least 0.5.
- ``vision_relevance``: mean attention of the tokens that name the abnormality on the lesion's patches, over the studies with
  a lesion; 0 where it is not named.

Studies without a lesion are left out of the last three, where "no box" would score 1 without a look at the image; a box that is
drawn on one of them costs accuracy. ``<name>_ci95`` is the 95 % percentile bootstrap interval over studies, with a fixed
generator: the same answers give the same interval. ``figures`` holds more, by source and by lesion size, with intervals over
patients: `umed_plugin.evaluation.metrics.mau`. Benchmarks that are no records of a recipe: `umed_plugin.evaluation`.

How to run: ``umed evaluate CKPT --benchmark RECIPE_OR_JSON``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from umed_plugin import __version__, files
from umed_plugin.checkpoints.loading import UMED_TEMPLATES
from umed_plugin.data.records import Record
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.kept_answers import KeptAnswers
from umed_plugin.evaluation.metrics.figures import Row, compare_rows, mean_interval, measure
from umed_plugin.evaluation.metrics.mau import case_values, mau_figures
from umed_plugin.grounding.dialects import LLAVA, BoxDialect
from umed_plugin.grounding.scoring import AnswerScore
from umed_plugin.model.answerer import Answerer, AnswererSettings, prompt_ids

__all__ = [
    "METRICS",
    "Case",
    "Evaluation",
    "compare",
    "evaluate",
    "mean_interval",
    "metrics",
    "prompt_ids",
]

METRICS = ("accuracy", "mean_iou", "acc_at_50", "vision_relevance")
PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class Case:
    """One study: what was asked, answered and true, and how the answer scores.

    Attributes:
        image: path of the image file as the model's loader opened it.
        true_boxes: xyxy in pixels of the image file.
        boxes: predicted, in the same pixels; a malformed box is all zeros.
        vision_relevance: None for a study without a lesion.
        source: the recipe that the record came from.
        patient: as the record names it; empty where it names none.
        values: columns that the figures are computed from (`umed_plugin.evaluation.metrics.mau`).
        modality: of the record.
        image_aspect_ratio: how the model sees the image: ``pad`` or ``square``.
        reading: arguments of `umed_plugin.data.images.load_image` for a record that names a DICOM or NIfTI file; else None.
        heat: where the name of the abnormality looks (`umed_plugin.model.heat_map`); None where the answer names none.
    """

    id: str
    image: str
    question: str
    answer: str
    true_classes: list[str]
    true_boxes: list[list[float]]
    boxes: list[list[float]]
    accuracy: float
    set_iou: float
    vision_relevance: float | None
    source: str = ""
    patient: str = ""
    values: dict[str, float] = field(default_factory=dict)
    modality: str = ""
    image_aspect_ratio: str = "pad"
    reading: dict[str, Any] | None = None
    heat: dict[str, Any] | None = None

    def value(self, metric: str) -> float | None:
        """The case's value of a metric, or None where the metric does not ask about it."""
        if metric == "accuracy":
            return self.accuracy
        if not self.true_boxes:
            return None
        if metric == "mean_iou":
            return self.set_iou
        return float(self.set_iou >= 0.5) if metric == "acc_at_50" else self.vision_relevance

    def row(self) -> Row:
        """The case as a row of `umed_plugin.evaluation.metrics.figures`; what is drawn for intervals is the patient, else the
        image.
        """
        cluster = f"{self.source}/{self.patient}" if self.patient else self.image or self.id
        return Row(self.id, cluster, self.values, {"source": self.source})


@dataclass(frozen=True)
class Evaluation:
    """The cases of one checkpoint and the metrics over them."""

    checkpoint: str
    template: str
    cases: list[Case]
    metrics: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path | str) -> None:
        """Write ``evaluation.json`` (metrics) and ``predictions.jsonl`` (one case a line) into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(case), ensure_ascii=False) for case in self.cases]
        files.write_text(folder / PREDICTIONS, "\n".join(lines) + "\n")
        summary = {"benchmark": "mau", "checkpoint": self.checkpoint, "template": self.template, **self.metrics}
        files.write_text(folder / "evaluation.json", json.dumps(summary, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> Evaluation:
        """What `save` wrote.

        Raises:
            UmedError: the folder does not hold it.
        """
        summary, predictions = Path(folder) / "evaluation.json", Path(folder) / PREDICTIONS
        if not summary.is_file() or not predictions.is_file():
            raise UmedError(f"{folder}: no finished evaluation. Needed: evaluation.json and {PREDICTIONS}.")
        found = json.loads(summary.read_text(encoding="utf-8"))
        cases = [Case(**json.loads(line)) for line in predictions.read_text(encoding="utf-8").splitlines()]
        return cls(found["checkpoint"], found["template"], cases, metrics(cases))


def evaluate(
    checkpoint: Path | str,
    records: Sequence[Record],
    *,
    image_folder: Path | str = "",
    template: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    base: Path | str | None = None,
    device: str | None = None,
    image_cache: Path | str | None = None,
    image_cache_gb: float = 20.0,
    dialect: BoxDialect = LLAVA,
    folder: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask a checkpoint every record's question, greedily, and score the answers.

    Args:
        checkpoint: a full checkpoint, or a LoRA folder over ``base``.
        records: with the same ``image_aspect_ratio`` as the checkpoint.
        image_folder: goes before the records' relative image paths.
        template: of the prompt; by default the umed template of the checkpoint's family.
        batch_size: studies at a time.
        max_new_tokens: longest answer.
        base: of a LoRA folder.
        device: ``cuda`` (float16) where there is one, else ``cpu`` (float32).
        image_cache: folder that keeps images decoded and resized (`umed_plugin.data.images.cache`).
        image_cache_gb: most that it may hold, in GB.
        dialect: in which the checkpoint writes boxes.
        folder: where answers are kept as they come; a run that was killed goes on from there. None: nowhere.
        progress: called with (studies done, studies in all).
    """
    if not records:
        raise UmedError("there is nothing to evaluate on: no records. Is it the right --split?")
    settings = AnswererSettings(
        base=base,
        template=template,
        templates=UMED_TEMPLATES,
        device=device,
        image_cache=image_cache,
        image_cache_gb=image_cache_gb,
        max_new_tokens=max_new_tokens,
    )
    answerer = Answerer(checkpoint, settings)
    _check_aspect_ratio(records, answerer.images.mode, checkpoint)
    kept = None
    if folder is not None:
        answers_depend_on = {
            "plugin": __version__,  # the lines hold scores, too
            **answerer.fingerprint(),
            "batch_size": batch_size,
            "boxes": asdict(dialect),
            "records": hashlib.sha256(json.dumps(list(records), sort_keys=True).encode()).hexdigest()[:16],
        }
        kept = KeptAnswers(folder, PREDICTIONS, answers_depend_on)
    cases: list[Case] = []
    batches = [records[start : start + batch_size] for start in range(0, len(records), batch_size)]
    if kept is not None:
        whole = [batch for batch in batches if all(str(record["id"]) in kept.lines for record in batch)]
        kept.keep_only(str(record["id"]) for batch in whole for record in batch)
    for batch in batches:
        if kept is not None and str(batch[0]["id"]) in kept.lines:
            # The folder may have been moved since.
            lines = [(kept.lines[str(record["id"])], os.path.join(image_folder, record["image"])) for record in batch]
            cases += [Case(**{**line, "image": path}) for line, path in lines]
        else:
            asked = _ask(answerer, batch, str(image_folder), dialect)
            cases += asked
            if kept is not None:
                kept.add([asdict(case) for case in asked])
        if progress is not None:
            progress(len(cases), len(records))
    return Evaluation(str(checkpoint), answerer.template, cases, metrics(cases))


def _check_aspect_ratio(records: Sequence[Record], model_mode: str, checkpoint: Path | str) -> None:
    other = [record["id"] for record in records if record["provenance"]["image_aspect_ratio"] != model_mode]
    if other:
        raise UmedError(
            f"{checkpoint}: sees images as {model_mode!r} (image_aspect_ratio in config.json), but {len(other)} of "
            f"{len(records)} records, the first {other[0]!r}, were built otherwise: their boxes would be in the wrong place. "
            f"Build them with: umed recipe build RECIPE --image-aspect-ratio {model_mode} --out FILE"
        )


def _ask(answerer: Answerer, records: Sequence[Record], image_folder: str, dialect: BoxDialect) -> list[Case]:
    """Greedy answers of one batch of records, scored."""
    import torch

    from umed_plugin.grounding.scoring import score_answer
    from umed_plugin.model.forward import decode_answers, embed_prompts
    from umed_plugin.model.heat_map import relevance_and_heat_maps
    from umed_plugin.model.sampling import SamplingSettings, generate

    model, tokenizer, llava = answerer.model, answerer.tokenizer, answerer.llava
    paths = [os.path.join(image_folder, record["image"]) for record in records]
    features = answerer.features(paths, [record.get("reading") for record in records])
    questions = [record["conversations"][0]["value"].replace("<image>", "").strip() for record in records]
    with torch.no_grad():
        prompts = embed_prompts(model, [answerer.prompt_ids(question) for question in questions], features)
        limit, eos = answerer.max_new_tokens, tokenizer.eos_token_id
        answers = generate(model, prompts, SamplingSettings(max_new_tokens=limit, temperature=0.0, eos_token_id=eos))
        looked = relevance_and_heat_maps(
            model, tokenizer, prompts, answers, records, [_geometry(llava, one) for one in records]
        )
    texts = decode_answers(tokenizer, answers)
    cases = []
    for record, path, question, text, (relevance, heat) in zip(records, paths, questions, texts, looked):
        score = score_answer(text, record, _geometry(llava, record), dialect)
        true = [list(map(float, box)) for box in record["objects"]["bbox"]]
        cases.append(
            Case(
                id=str(record["id"]),
                image=path,
                question=question,
                answer=text,
                true_classes=list(record["objects"]["ref"]),
                true_boxes=true,
                boxes=[[round(float(value), 3) for value in box] for box in score.boxes],
                accuracy=score.accuracy,
                set_iou=score.set_iou,
                vision_relevance=relevance if true else None,
                source=str(record.get("source", "")),
                patient=str(record.get("patient") or ""),
                values=case_values(score, relevance, _attention_hit(heat, score)) if true else case_values(score, None),
                modality=str(record.get("modality") or ""),
                image_aspect_ratio=record["provenance"]["image_aspect_ratio"],
                reading=record.get("reading"),
                heat=heat,
            )
        )
    return cases


def _attention_hit(heat: dict[str, Any] | None, score: AnswerScore) -> float:
    """1.0 where the name of an abnormality that is there looks most at a lesion; 0.0 elsewhere, and where none is named."""
    from umed_plugin.evaluation.metrics.grounding import attention_points_at
    from umed_plugin.model.heat_map import decode_heat_map

    if heat is None or not heat["of_true_name"]:
        return 0.0
    return attention_points_at(decode_heat_map(heat), heat["covers"], score.true01)


def _geometry(llava: Any, record: Record) -> Any:
    from umed_plugin.data.records import record_geometry

    tower = llava.get_vision_tower().config
    return record_geometry(record, tower.image_size, tower.patch_size)


def metrics(cases: Sequence[Case]) -> dict[str, Any]:
    """Every metric with its interval, ``n`` (studies) and ``n_with_lesion``; a metric that no case answers is None."""
    result: dict[str, Any] = {}
    for name in METRICS:
        values = [value for case in cases if (value := case.value(name)) is not None]
        result[name] = sum(values) / len(values) if values else None
        result[f"{name}_ci95"] = mean_interval(values)
    result["n"] = len(cases)
    result["n_with_lesion"] = sum(bool(case.true_boxes) for case in cases)
    rows = [case.row() for case in cases]
    result["figures"] = measure(mau_figures(rows), rows)
    return result


def compare(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Paired differences ``after - before`` over the same studies: ``{metric: {difference, ci95, n}}``, and ``figures`` of them.

    Raises:
        UmedError: the two did not answer the same studies.
    """
    earlier = {case.id: case for case in before.cases}
    if len(earlier) != len(before.cases) or set(earlier) != {case.id for case in after.cases}:
        raise UmedError(
            f"{before.checkpoint} and {after.checkpoint} were not asked about the same studies, so they cannot be compared "
            "pair by pair. Evaluate both on the same records."
        )
    result: dict[str, Any] = {}
    for name in METRICS:
        pairs = [(earlier[case.id].value(name), case.value(name)) for case in after.cases]
        differences = [new - old for old, new in pairs if old is not None and new is not None]
        mean = sum(differences) / len(differences) if differences else None
        result[name] = {"difference": mean, "ci95": mean_interval(differences), "n": len(differences)}
    after_rows = [case.row() for case in after.cases]
    result["figures"] = compare_rows(mau_figures(after_rows), [case.row() for case in before.cases], after_rows)
    return result
