"""VQA-RAD and SLAKE: open and closed questions, scored as LLaVA-Med scores them, and closed ones in a corrected way too.

VQA-RAD (Lau et al. 2018): ``VQA_RAD Dataset Public.json`` and a folder of images; what is asked are the 451 questions whose
``phrase_type`` begins with ``test``. Its images are in its training part too: it tests new questions, not new patients.
SLAKE (Liu et al. 2021): ``{train,validate,test}.json`` and ``imgs/``; its English questions. Some of its X-rays come from NIH
ChestX-ray14: whoever trains on that checks it with ``umed recipe check ... --against slake/imgs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import (
    Benchmark,
    Question,
    existing_image,
    field_of,
    find_one,
    read_json,
)
from umed_plugin.evaluation.metrics.figures import Figure, Row, means, ratio
from umed_plugin.evaluation.metrics.llava_med import (
    closed_accuracy,
    closed_hit,
    closed_hit_batch,
    exact_match,
    open_accuracy,
    token_overlap,
)
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

OPEN, CLOSED = "OPEN", "CLOSED"
_SLAKE_FILES = {"test": "test.json", "val": "validate.json", "train": "train.json"}


def rad_questions(root: Path, split: str, work: Path) -> list[Question]:
    """The questions of VQA-RAD's test or training part, in the file's order."""
    file = find_one(root, ["VQA_RAD Dataset Public.json", "*VQA_RAD*.json", "*.json"], "vqa_rad")
    folders = [file.parent / name for name in ("VQA_RAD Image Folder", "images", ".")]
    questions = []
    for number, record in enumerate(_records(file, "vqa_rad")):
        where = f"{file}[{number}]"
        if str(field_of(record, where, "phrase_type")).startswith("test") != (split == "test"):
            continue
        name = str(field_of(record, where, "image_name"))
        questions.append(_question(record, where, existing_image(folders, name)))
    return questions


def slake_questions(root: Path, split: str, work: Path) -> list[Question]:
    """The English questions of a part of SLAKE, in the file's order."""
    file = find_one(root, [_SLAKE_FILES[split], f"*/{_SLAKE_FILES[split]}"], "slake")
    folders = [file.parent / "imgs", file.parent]
    return [
        _question(record, f"{file}[{number}]", existing_image(folders, str(field_of(record, file.name, "img_name"))))
        for number, record in enumerate(_records(file, "slake"))
        if record.get("q_lang", "en") == "en"
    ]


def rad_candidates(root: Path) -> list[str]:
    """The open answers of VQA-RAD's training part."""
    return _open_answers(rad_questions(root, "train", root))


def slake_candidates(root: Path) -> list[str]:
    """The open answers of SLAKE's training part, if its file is there."""
    there = any(root.glob("train.json")) or any(root.glob("*/train.json"))
    return _open_answers(slake_questions(root, "train", root)) if there else []


def _open_answers(questions: Sequence[Question]) -> list[str]:
    return [question.truth for question in questions if question.groups["answer_type"] == OPEN]


def _records(file: Path, benchmark: str) -> list[dict[str, Any]]:
    records = read_json(file, benchmark)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UmedError(f"{file}: is no list of questions, which {benchmark} needs. Is it the right file?")
    return records


def _question(record: dict[str, Any], where: str, image: str) -> Question:
    kind = str(field_of(record, where, "answer_type")).strip().upper()
    if kind not in (OPEN, CLOSED):
        raise UmedError(f"{where}: answer_type is {kind!r}; allowed: {OPEN}, {CLOSED}.")
    return Question(
        id=str(field_of(record, where, "qid")),
        image=image,
        text=str(field_of(record, where, "question")).strip(),
        truth=str(field_of(record, where, "answer")).strip(),
        groups={"answer_type": kind},
    )


def score(question: Question, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    """LLaVA-Med's numbers of one answer; which there are depends on whether the question is open or closed."""
    said, wanted = answer.text, question.truth
    if question.groups["answer_type"] == OPEN:
        precision, recall, f1 = token_overlap(said, wanted)
        return {
            "open_recall": recall,
            "open_precision": precision,
            "open_f1": f1,
            "open_exact_match": exact_match(said, wanted),
            "open_accuracy": open_accuracy(said, wanted),
        }
    hit, counted = closed_hit(said, wanted)
    return {
        "closed_hit": hit,
        "closed_counted": counted,
        "closed_llava_med_batch": closed_hit_batch(said, wanted),
        "closed_accuracy": closed_accuracy(said, wanted),
    }


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Open recall, and three closed accuracies: two of LLaVA-Med's scripts, and the corrected one."""
    return [
        *means("open_recall"),
        Figure("closed_llava_med", ratio("closed_hit", "closed_counted"), ("closed_hit", "closed_counted")),
        *means("closed_llava_med_batch", "closed_accuracy"),
        *means("open_accuracy", "open_precision", "open_f1", "open_exact_match"),
    ]


_REPORTED = (
    "open: token recall (LLaVA-Med's), accuracy; closed: accuracy as LLaVA-Med's two scripts compute it, and corrected"
)
VQA_RAD = Benchmark(
    name="vqa_rad",
    title="VQA-RAD, 451 test questions about radiology images",
    needs="`VQA_RAD Dataset Public.json` and its image folder",
    url="https://osf.io/89kps/ (CC0)",
    reported=_REPORTED,
    questions=rad_questions,
    score=score,
    figures=figures,
    splits=("test", "train"),
    candidates=rad_candidates,
)
SLAKE = Benchmark(
    name="slake",
    title="SLAKE, 1,061 English test questions",
    needs="`test.json` and `imgs/`",
    url="https://www.med-vqa.com/slake/ (CC BY 4.0)",
    reported=_REPORTED,
    questions=slake_questions,
    score=score,
    figures=figures,
    splits=("test", "val", "train"),
    candidates=slake_candidates,
)
