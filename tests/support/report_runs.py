"""A run's folder for tests of the report: generated studies that are not rendered, and answers whose boxes are known."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.data.build import build_records
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import record_geometry
from umed_plugin.evaluation.benchmarks.recipe import RECIPE, record_questions
from umed_plugin.evaluation.evaluator import evaluate_questions
from umed_plugin.grounding.boxes import format_box, is_degenerate
from umed_plugin.grounding.dialects import LLAVA
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer
from umed_plugin.model.heat_map import encode_heat_map
from umed_plugin.training.candidate_log import log_candidates

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'></p></script><b>bold</b>"
# How far a stage's boxes are from the true ones, in pixels; the base gives none.
SHIFTS = {"base": None, "instruction_tuning": 14, "rewarding": 4}


def make_records(folder: Path, count: int, mode: str = "pad") -> list[dict]:
    """Records of DICOM, NIfTI and PNG files as they are: nothing is rendered."""
    make_studies(folder / "studies", seed=3, train=0, val=0, test=count)
    recipe = load_recipe("demo_studies")
    return build_records(
        recipe, out_dir=folder, image_aspect_ratio=mode, data_root=folder / "studies", split="test", render=False
    )


class Stage:
    """A model of a stage, for `evaluate`: its boxes are the true ones moved to one side."""

    template = "umed_mistral"

    def __init__(self, stage: str, records: list[dict]) -> None:
        self.shift = SHIFTS[stage]
        self.mode = records[0]["provenance"]["image_aspect_ratio"]
        self.asked, self.rng = iter(records), random.Random(0)

    def fingerprint(self) -> dict:
        return {}

    def scorer(self, dialect=LLAVA) -> Scorer:
        return Scorer(self.mode, 64, 8, dialect)

    def answer(self, questions, examine=None) -> list[ModelAnswer]:
        return [self._answer(next(self.asked)) for _ in questions]

    def _answer(self, record: dict) -> ModelAnswer:
        true, geometry = record["objects"]["bbox"], record_geometry(record, 64, 8)
        moved = [] if self.shift is None else [[x1 + self.shift, y1, x2 + self.shift, y2] for x1, y1, x2, y2 in true]
        boxes = [box for box in geometry.to_square(moved) if not is_degenerate(box)]
        names = record["objects"]["ref"]
        named = names if self.rng.random() < 0.8 else ["cyst"]
        looked = geometry.patch_cover(true) + 0.02 * np.arange(64) / 64 + 0.05
        heat = encode_heat_map(looked / looked.sum(), geometry, of_true_name=named == names) if named else None
        text = f"There is {', '.join(named) or 'nothing'}. " + " ".join(map(format_box, boxes))
        return ModelAnswer(text, [], {"vision_relevance": 0.1 if true else 0.0, "heat": heat})


def write_evaluation(folder: Path, stage: str, records: list[dict]) -> None:
    """What a stage answers to the records, as `umed evaluate` keeps it in ``folder/evaluation/STAGE``."""
    evaluate_questions(Stage(stage, records), RECIPE, record_questions(records)).save(folder / "evaluation" / stage)


def write_run(folder: Path, count: int = 16, mode: str = "pad") -> list[dict]:
    """Evaluations of three stages, logs of two trainings, candidates; returns the records."""
    records = make_records(folder / "data", count, mode)
    for stage in SHIFTS:
        write_evaluation(folder, stage, records)
    tuned, rewarded = folder / "runs" / "tuned-llava-mistral", folder / "runs" / "rewarded-llava-mistral"
    write_log(tuned, "instruction_tuning", [{"loss": 3 / step, "learning_rate": 1e-3} for step in range(1, 12)])
    rows = [
        {
            "loss": 0.1,
            "kl": 0.001 * step,
            "reward/total": 2 + 0.1 * step,
            "reward/localization": 0.2 + 0.01 * step,
            "guard/box_area_ratio": 1 + 0.1 * step,
            "guard/top_skeleton": 0.1,
            "guard/top_skeleton_reference": 0.2,
        }
        for step in range(1, 12)
    ]
    write_log(rewarded, "rewarding", rows)
    for step, record in enumerate(records[:8]):
        geometry = record_geometry(record)
        texts = []
        for shift in (0, 5, 40):
            moved = [[x1 + shift, y1, x2 + shift, y2] for x1, y1, x2, y2 in record["objects"]["bbox"]]
            boxes = [box for box in geometry.to_square(moved) if not is_degenerate(box)]
            texts.append("An answer: " + " ".join(map(format_box, boxes)))
        terms = {"relevance": [1.0, 1.0, None], "localization": [1.0, 0.6, 0.0]}
        rewards = [2.0, 1.5 - 0.1 * step, 0.25]  # the last one was cut off and has lost 0.75
        normalised = {"relevance": [1.0, 1.0, 1.0], "localization": [1.0, 0.5 - 0.1 * step, 0.0]}
        recipe = (normalised, {"relevance": 1.0, "localization": 1.0})
        log_candidates(10 * step, record, texts, rewards, terms, rewarded, [], record["image"], recipe)
    return records


def write_log(folder: Path, stage: str | None, rows: list[dict]) -> None:
    """What a training leaves of its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"step": 10 * number, "epoch": 0.1 * number, **row} for number, row in enumerate(rows, start=1)]
    history.append({"step": 10 * len(rows), "train_loss": 0.5, "train_runtime": 9.0})
    state = {"global_step": 10 * len(rows), "max_steps": 10 * len(rows), "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if stage:
        (folder / "umed.json").write_text(json.dumps({"umed_stage": stage}))


def change_predictions(folder: Path, stage: str, change) -> None:
    """Apply ``change`` to every line of a stage's predictions."""
    file = folder / "evaluation" / stage / "predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for number, line in enumerate(lines):
        change(number, line)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
