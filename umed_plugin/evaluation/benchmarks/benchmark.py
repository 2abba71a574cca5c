"""What a benchmark is: questions with their truth, a score for each answer, and figures over the scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.metrics.figures import Figure, Row
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        id: unique within the benchmark.
        image: path of the file.
        text: the question as the model is asked it, without image token; None where only options behind a bare text count.
        truth: the reference answer as the benchmark's files have it.
        options: whose likelihood is asked for, as ``" {option}."`` behind ``options_after``.
        options_after: a bare text behind the image, without template; None: the question in its template.
        groups: name -> group, for figures by group and for ``part``, of which ``--limit`` takes the first N each.
        about: what else scoring needs to know; fit for JSON.
        write: whether an answer is to be written; else only likelihoods are asked for.
    """

    id: str
    image: str
    text: str | None
    truth: str
    options: Sequence[str] = ()
    options_after: str | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    write: bool = True

    def __post_init__(self) -> None:
        """Refuse a question that asks for nothing."""
        asked = self.options and (self.options_after or self.text)
        if not (self.text if self.write else asked):
            raise ValueError(f"question {self.id!r} has neither a text to answer nor options behind one")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: for ``--benchmark``.
        title: what it is, in a few words.
        needs: files that ``--data-root`` must hold, in words.
        url: where they are had, and under which terms they stand.
        reported: what its figures are, in words, for docs/evaluation.md and ``--help``.
        questions: (data root, split, folder for images that must be written) -> questions.
        score: (question, answer, scorer of boxes) -> named numbers.
        figures: rows -> what is reported.
        splits: that it has; the first is asked if none is named.
        max_new_tokens: longest answer that it needs.
        prepare: writes the images of the questions that are asked, where they are no files of their own.
        in_form: the questions with their boxes as the model writes them.
        candidates: (data root) -> the training split's open answers, empty where it is not there.
    """

    name: str
    title: str
    needs: str
    url: str
    reported: str
    questions: Callable[[Path, str, Path], list[Question]]
    score: Callable[[Question, ModelAnswer, Scorer], dict[str, float]]
    figures: Callable[[Sequence[Row]], list[Figure]]
    splits: tuple[str, ...] = ("test",)
    max_new_tokens: int = 128
    prepare: Callable[[Sequence[Question]], None] | None = None
    in_form: Callable[[Sequence[Question], Scorer], list[Question]] | None = None
    candidates: Callable[[Path], list[str]] | None = None


def read_json(file: Path, benchmark: str) -> Any:
    """What a JSON file of a benchmark holds.

    Raises:
        UmedError: it is missing or not JSON.
    """
    if not file.is_file():
        raise UmedError(f"{file}: no such file, and {benchmark} needs it. Is --data-root the folder that holds it?")
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UmedError(f"{file}: not JSON ({error}). Get it again.") from error


def field_of(record: Mapping[str, Any], where: str, *names: str) -> Any:
    """The first of the fields that the record has.

    Raises:
        UmedError: it has none of them.
    """
    for name in names:
        if name in record:
            return record[name]
    raise UmedError(
        f"{where}: has none of the fields {', '.join(names)}; it has {', '.join(map(str, record))}. Is it the right file?"
    )


def find_one(root: Path, patterns: Sequence[str], benchmark: str) -> Path:
    """The first file below ``root`` that fits one of the patterns.

    Raises:
        UmedError: there is none.
    """
    for pattern in patterns:
        found = sorted(path for path in root.glob(pattern) if path.is_file())
        if found:
            return found[0]
    raise UmedError(
        f"{root}: holds none of {', '.join(patterns)}, of which {benchmark} needs one. Is it the right --data-root?"
    )


def existing_image(folders: Sequence[Path], name: str) -> str:
    """Path of an image in the first of the folders that has it; if none has, in the first.

    Missing images are reported together, once it is known which are asked about.
    """
    there = [folder / name for folder in folders if (folder / name).is_file()]
    return str(there[0] if there else folders[0] / name)
