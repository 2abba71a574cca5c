"""What a benchmark is: how to read its questions, score an answer, and compute metrics over the scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.checkpoints.folder import STOCK_TEMPLATES
from umed_plugin.data.annotations.finding import matches
from umed_plugin.data.places import check_fetched
from umed_plugin.errors import UmedError, warn
from umed_plugin.evaluation.metrics.metric import Metric, Row
from umed_plugin.files import parse_json
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

if TYPE_CHECKING:
    from umed_plugin.model.forward import Candidates, PromptBatch


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One question about one image.

    Attributes:
        id: unique within the benchmark.
        image: path of the file.
        text: the question as the model gets it, without image token; may be empty. None if only the options behind a bare text
            count.
        truth: the reference answer as the benchmark's files have it.
        options: answers whose likelihood is computed, each as ``" {option}."`` behind ``options_after``.
        options_after: a bare text behind the image, without template; None: the question in its template.
        groups: name -> group, for metrics by group, and ``part``: ``--limit N`` takes the first N questions of each part.
        about: what else scoring needs to know; JSON values.
        write: whether the model writes an answer; else only likelihoods are computed.
        patient: whom the image shows, unique within the benchmark; empty if unknown. Intervals resample patients.
        part_of: the file that the image is a part of, such as a volume, where the patient is not known; else empty.
        reading: arguments of `umed_plugin.data.images.load_image` for a DICOM or NIfTI file; else None.
        made_from: path of the file from which the benchmark writes the image; empty if the image is a file of its own.
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
    patient: str = ""
    part_of: str = ""
    reading: Mapping[str, Any] | None = None
    made_from: str = ""

    def __post_init__(self) -> None:
        """Refuse a question that asks for nothing."""
        has_text = self.text is not None
        has_options = self.options and (self.options_after is not None or has_text)
        if not (has_text if self.write else has_options):
            raise ValueError(f"question {self.id!r} has neither a text to answer nor options behind one")

    @property
    def cluster(self) -> str:
        """What confidence intervals resample as a whole: the patient where it is known, else the image with all of its slices."""
        return self.patient or self.part_of or self.image


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: what differs between benchmarks. What they share is in `umed_plugin.evaluation.evaluator`.

    Attributes:
        name: for ``--benchmark``.
        title: what it is, in a few words.
        needs: files that ``--data-root`` must hold, in words.
        url: where to get them, and their terms of use.
        reported: what its metrics are, in words, for the documentation.
        questions: (data root, split, folder for images that must be written) -> questions in the order of the files.
        score: (question, answer, scorer of boxes) -> named numbers.
        metrics: rows -> what is reported.
        order: place in the documentation's table; equal numbers are sorted by name.
        splits: all of them; the first is the default.
        max_new_tokens: longest answer that it needs.
        templates: model_type -> default prompt template.
        left_out: number of images that `questions` left out when it was last called, since they are missing or unreadable.
        prepare: writes the images of the chosen questions, for a benchmark whose images are not files.
        adapt: (questions, scorer) -> questions fitted to the model, such as boxes in its coordinates.
        examine: a further pass over the answers of each batch, see `ExamineHook`; None for benchmarks that score texts alone.
        details: (question, answer, scorer) -> further keys of the question's line in ``predictions.jsonl``.
        candidates: data root -> the open answers of the training split, empty if its file is missing.
        reads_boxes: whether boxes in the answers are scored, so that the user is told of those that could not be read.
        treatment: of texts before they are scored, such as ``r2gen:3,60``; scores of two treatments are not compared.
    """

    name: str
    title: str
    needs: str
    url: str
    reported: str
    questions: Callable[[Path, str, Path], list[BenchmarkQuestion]]
    score: Callable[[BenchmarkQuestion, ModelAnswer, Scorer], dict[str, float]]
    metrics: Callable[[Sequence[Row]], list[Metric]]
    order: int = 100
    splits: tuple[str, ...] = ("test",)
    max_new_tokens: int = 128
    templates: Mapping[str, str] = field(default_factory=lambda: STOCK_TEMPLATES)
    left_out: Callable[[], int] | None = None
    prepare: Callable[[Sequence[BenchmarkQuestion]], None] | None = None
    adapt: Callable[[Sequence[BenchmarkQuestion], Scorer], list[BenchmarkQuestion]] | None = None
    examine: ExamineHook | None = None
    details: Callable[[BenchmarkQuestion, ModelAnswer, Scorer], dict[str, Any]] | None = None
    candidates: Callable[[Path], list[str]] | None = None
    reads_boxes: bool = False
    treatment: str = ""


@dataclass(frozen=True)
class OfRecipe:
    """A benchmark made from the studies of any recipe or JSON of records: ``--benchmark NAME:RECIPE``.

    A file of this folder that ends with ``OF_RECIPE = OfRecipe(...)`` adds one.

    Attributes:
        benchmark: all but its questions.
        made: (the recipe's studies as questions, each with its ``record`` in ``about``) -> the questions to ask.
    """

    benchmark: Benchmark
    made: Callable[[Sequence[BenchmarkQuestion]], list[BenchmarkQuestion]]


def no_questions(name: str) -> Callable[[Path, str, Path], list[BenchmarkQuestion]]:
    """``questions`` of the benchmark of an `OfRecipe`, which has none without a recipe.

    Args:
        name: of the benchmark.
    """

    def refuse(_root: Path, _split: str, _work: Path) -> list[BenchmarkQuestion]:
        raise UmedError(f"{name} are made from a recipe: --benchmark {name}:RECIPE")

    return refuse


# A hook for what needs the model again once it has answered, such as attention. It is called for each batch while the prompts,
# with their image features, are in memory: (answerer, N questions, their N embedded prompts, their N answers) -> N dicts of JSON
# values. `score` and `details` find the dict of a question in `ModelAnswer.examined`; it is kept with the answer on disk.
ExamineHook = Callable[
    [Any, Sequence[BenchmarkQuestion], "PromptBatch", "Candidates"],
    "list[dict[str, Any]]",
]


def read_json(file: Path, benchmark: str) -> Any:
    """What a JSON file of a benchmark holds.

    Raises:
        UmedError: it is missing or not JSON.
    """
    if not file.is_file():
        raise UmedError(f"{file}: no such file; {benchmark} needs it. Is --data-root the folder that holds it?")
    check_whole(file)
    try:
        return parse_json(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UmedError(f"{file}: not JSON ({error}). Download it again.") from error


_POINTER = b"version https://git-lfs.github.com/spec/"


def check_whole(file: Path) -> None:
    """Refuse the few lines that git leaves in place of a large file, which many published repositories hold.

    Raises:
        UmedError: it is such a pointer.
    """
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise UmedError(
                f"{file}: is a Git LFS pointer and not the file itself. Get it: git lfs pull, in its repository."
            )


def read_records(file: Path, benchmark: str) -> list[Any]:
    """The rows of a JSON file.

    Raises:
        UmedError: it is not a list of objects.
    """
    records = read_json(file, benchmark)
    if not isinstance(records, list) or not any(isinstance(record, dict) for record in records):
        raise UmedError(f"{file}: is not a list of questions, which {benchmark} needs. Is it the right file?")
    return records


Rows = Iterable[tuple[str, Any]]


def numbered(file: Path, records: Iterable[Any]) -> Rows:
    """The rows of a file, each behind where it stands, such as ``test.json[13]``."""
    return ((f"{file}[{number}]", record) for number, record in enumerate(records))


_ODD_SHOWN = 5
# What reading a row raises if a key is missing, or a value has another type than the published files have.
_ODD = (UmedError, AttributeError, IndexError, KeyError, TypeError, ValueError)


def questions_of_rows(
    rows: Rows, make: Callable[[Any, str], Sequence[BenchmarkQuestion]], benchmark: str
) -> list[BenchmarkQuestion]:
    """The questions of a benchmark's rows. A row that cannot be read is left out, counted and named, and ends nothing.

    Args:
        rows: where each row stands, and the row, as `numbered` gives them.
        make: the questions of a row, none to pass over it; raises what is wrong with it.
        benchmark: its name, for the message.

    Raises:
        UmedError: more than half of the rows cannot be read: it is not the right file.
    """
    listed: list[BenchmarkQuestion] = []
    odd: list[str] = []
    count = 0
    for where, row in rows:
        count += 1
        try:
            if not isinstance(row, Mapping):
                raise UmedError(f"{where}: is {_shown(row)}, not an object.")
            listed += make(row, where)
        except _ODD as error:
            message = str(error) if isinstance(error, UmedError) else f"{where}: {type(error).__name__}: {error}"
            odd.append("".join(char if char.isprintable() else ascii(char)[1:-1] for char in message))
    if not odd:
        return listed
    shown = "\n".join(f"  {message[:300]}" for message in odd[:_ODD_SHOWN])
    shown += f"\n  ... and {len(odd) - _ODD_SHOWN} more" if len(odd) > _ODD_SHOWN else ""
    if len(odd) > count / 2:
        raise UmedError(f"{benchmark}: {len(odd)} of {count} rows cannot be read. Is it the right file?\n{shown}")
    warn(f"{benchmark}: {len(odd)} of {count} rows are left out, because they cannot be read:\n{shown}")
    return listed


def _shown(row: Any) -> str:
    """What a row is that is no object: its type, and a text itself."""
    return f"a {type(row).__name__}" + (f" ({row[:80]})" if isinstance(row, str) else "")


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


def text_of(record: Mapping[str, Any], where: str, *names: str) -> str:
    """The text of the first of the fields that the record has, as it stands there; a number as text.

    Raises:
        UmedError: it has none of them, or nothing is in it: null, NaN or blanks; or it is no text.
    """
    value = field_of(record, where, *names)
    name = next(name for name in names if name in record)
    if value is None or value != value or not str(value).strip():
        raise UmedError(f"{where}: its {name} is empty.")
    if isinstance(value, (list, dict)):
        raise UmedError(f"{where}: its {name} is {_shown(value)}; needed: a text.")
    return str(value)


def files_matching(root: Path, *patterns: str) -> list[Path]:
    """The files below ``root`` that match any of the patterns, sorted. Links to folders are followed.

    Raises:
        UmedError: one is a link to a file that is not there, so its questions would be passed over.
    """
    found = sorted({path for pattern in patterns for path in matches(root, pattern) if not path.is_dir()})
    for path in found:
        check_fetched(path)
    return found


def find_one(root: Path, patterns: Sequence[str], benchmark: str) -> Path:
    """The first file below ``root`` that matches one of the patterns.

    Raises:
        UmedError: there is none, or one is a link to a file that is not there.
    """
    for pattern in patterns:
        found = files_matching(root, pattern)
        if found:
            return found[0]
    raise UmedError(
        f"{root}: holds none of {', '.join(patterns)}; {benchmark} needs one of them. Is it the right --data-root?"
    )


def existing_image(folders: Sequence[Path], name: str, where: str) -> str:
    """Path of an image in the first of the folders that has it; if none has it, in the first.

    Missing images are reported together, once it is known which questions are asked.

    Raises:
        UmedError: it lies outside of the folders: a question file comes from strangers, and must not choose other files.
    """
    from umed_plugin.data.annotations.inside import VARIABLE

    paths = [folder / name for folder in folders]
    path = next((path for path in paths if path.is_file()), paths[0])
    linked = [Path(folder) for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    real = os.path.realpath(path)
    if not any(real.startswith(os.path.join(os.path.realpath(folder), "")) for folder in (*folders, *linked)):
        raise UmedError(
            f"{where}: image {name!r} is {real}, which is not in {folders[0]}. If this is meant, name its folder in the "
            f"environment variable {VARIABLE}."
        )
    return str(path)
