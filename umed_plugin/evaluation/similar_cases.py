"""``umed evaluate --similar K``: diagnoses of similar training studies before each question (`umed_plugin.data.similar`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.data.records import Record
from umed_plugin.data.similar import Bank, Case, Encode, make_bank, patient_of, said_of
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import BenchmarkQuestion

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class SimilarCases:
    """Where similar cases are taken from.

    Attributes:
        count: of them, before each question.
        studies: training records, each with the path of its image.
        kept: file that keeps their features for the next time; None: nowhere.
    """

    count: int
    studies: Sequence[tuple[Record, str]]
    kept: Path | None = None

    def bank(self, answerer: Any) -> tuple[Bank, Encode]:
        """The studies as a checkpoint's tower sees them, and the tower.

        Raises:
            UmedError: the answerer has no vision tower that can be read.
        """
        encode = encoder(answerer)
        weights = hashlib.sha256(repr(answerer.fingerprint().get("weights")).encode()).hexdigest()
        placed = [{**record, "image": image} for record, image in self.studies]
        return make_bank(placed, "", encode, kept=self.kept, tower=f"{weights} {answerer.dtype}"), encode

    def before(self, questions: Sequence[BenchmarkQuestion], answerer: Any) -> list[BenchmarkQuestion]:
        """The questions, each after what its similar cases show. A bare text behind the image gets them too."""
        bank, encode = self.bank(answerer)
        cases = [_case(question) for question in questions]
        said = said_of(cases, bank, encode, self.count)
        return [
            replace(
                question,
                text=None if question.text is None else text + question.text,
                options_after=None if question.options_after is None else text + question.options_after,
            )
            for question, text in zip(questions, said)
        ]


def _case(question: BenchmarkQuestion) -> Case:
    record = question.about.get("record") or {}
    reading = None if question.reading is None else dict(question.reading)
    return Case(str(record.get("id", "")), question.image, reading, patient_of(record) or question.patient)


def encoder(answerer: Any) -> Encode:
    """The mean patch features of images in an `umed_plugin.model.answerer.Answerer`'s tower.

    Raises:
        UmedError: it is no such answerer.
    """
    if not hasattr(answerer, "features"):
        raise UmedError(f"similar cases need the checkpoint's vision tower; {type(answerer).__name__} has none.")

    def encode(cases: Sequence[Case]) -> np.ndarray:
        features = answerer.features([case.path for case in cases], [case.reading for case in cases])
        found: np.ndarray = features.float().mean(dim=1).cpu().numpy()
        return found

    return encode
