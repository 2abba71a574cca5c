"""Whether two evaluations asked the same, so that they can be compared pair by pair.

Equal ids are not enough: two files of questions may both count from 0. So questions, references and true boxes are compared too.
What differs between two checkpoints that are asked the same does not count: boxes in texts, which each sees in its own square,
similar cases before a question, and true boxes that are given behind it. True boxes are compared in pixels of the image file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import blot_boxes

if TYPE_CHECKING:
    from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion
    from umed_plugin.evaluation.results import Evaluation, Prediction

# `umed_plugin.data.similar.sentence`, and what `--give-box` writes behind a question.
_ADDED = re.compile(r"\ASimilar studies, nearest first: .*\n| The abnormal region(?: is|s are) at [^\n]*\Z")
_REMEDY = "Evaluate both with the same benchmark, split and limit."
_SHOWN = 120  # characters of a text
_PIXELS = 0.5  # by which a box may differ: another version may have rounded in another way


@dataclass(frozen=True)
class Asked:
    """What a comparison must know of a question.

    Attributes:
        id: unique within the evaluation.
        truth: the reference; of a recipe's study its true classes, which do not depend on how the image is seen.
        question: None while it is not known, since it must still be fitted to the model.
        boxes: true boxes of a recipe's study, xyxy in pixels of the image file; None where they are not known.
    """

    id: str
    truth: str
    question: str | None
    boxes: Sequence[Sequence[float]] | None = None


def asked_of(prediction: Prediction) -> Asked:
    """What was asked for an answer."""
    classes, boxes = (prediction.details.get(name) for name in ("true_classes", "true_boxes"))
    truth = prediction.truth if classes is None else _classes(classes)
    return Asked(prediction.id, truth, prediction.question, boxes)


def _asked_before(benchmark: Benchmark, question: BenchmarkQuestion) -> Asked:
    """What will be asked, before the checkpoint is loaded."""
    record = question.about.get("record") if benchmark.details is not None else None
    truth = question.truth if record is None else _classes(record["objects"]["ref"])
    text = question.options_after if question.text is None else question.text
    boxes = None if record is None else record["objects"]["bbox"]
    return Asked(question.id, truth, text if benchmark.adapt is None else None, boxes)


def _classes(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def may_be_compared(before: str, after: str) -> bool:
    """Whether evaluations of two benchmarks have questions in common: the same one, or a recipe with and without its boxes."""
    from umed_plugin.evaluation.benchmarks.recipe import GIVEN_BOX, RECIPE

    return before == after or {before, after} == {RECIPE.name, GIVEN_BOX.name}


def check_before_asking(before: Evaluation, benchmark: Benchmark, questions: Sequence[BenchmarkQuestion]) -> None:
    """Refuse a comparison as soon as it is known which questions are asked; hours are spent on the answers.

    Raises:
        UmedError: the earlier evaluation is of another benchmark, of other questions, or treated texts in another way.
    """
    from umed_plugin.evaluation.benchmarks.recipe import GIVEN_BOX

    # Studies without a lesion are among the questions still, and are left out once the model's geometry is known.
    some = GIVEN_BOX.name in (before.benchmark, benchmark.name)
    asked = [_asked_before(benchmark, question) for question in questions]
    try:
        if not may_be_compared(before.benchmark, benchmark.name):
            raise UmedError(f"that was an evaluation of {before.benchmark}, and this is one of {benchmark.name}.")
        check_treatments(before.treatment, benchmark.treatment)
        check_questions([asked_of(prediction) for prediction in before.predictions], asked, some=some)
    except UmedError as error:
        raise UmedError(f"comparison with {before.checkpoint}: {error}") from error


def check_treatments(before: str, after: str) -> None:
    """Refuse scores of texts that were treated in two ways: the difference would be the treatment's.

    Raises:
        UmedError: they are not the same.
    """
    if before != after:
        first, second = (f"--as {name}" if name else "no --as" for name in (before, after))
        raise UmedError(
            f"texts were scored with {first} in one evaluation and with {second} in the other, so they cannot be compared. "
            "Evaluate both with the same --as."
        )


def check_questions(before: Sequence[Asked], after: Sequence[Asked], *, some: bool = False) -> None:
    """Refuse to pair questions that are not the same.

    Args:
        before, after: the questions of two evaluations, in any order.
        some: it is enough that they have some questions in common.

    Raises:
        UmedError: an id is in one of them only, or a question, reference or true box differs; the first is named.
    """
    earlier = {asked.id: asked for asked in before}
    later = {asked.id for asked in after}
    start = (
        f"the two evaluations were not asked the same questions ({len(before)} and {len(after)} of them), so they cannot be "
        "compared pair by pair"
    )
    alone = [a.id for a in after if a.id not in earlier] + [a.id for a in before if a.id not in later]
    if len(earlier) != len(before):
        raise UmedError(f"{start}: an id of the earlier one comes twice. {_REMEDY}")
    if alone and (not some or not later & set(earlier)):
        raise UmedError(f"{start}: question {alone[0]!r} is in one of them only. {_REMEDY}")
    for new in after:
        old = earlier.get(new.id)
        if old is None:
            continue
        if old.question is not None and new.question is not None and _differ(old.question, new.question):
            raise UmedError(f"{start}: question {new.id!r} is {_both(old.question, new.question)}. {_REMEDY}")
        # Files of earlier versions hold no references of studies.
        if old.truth and new.truth and _differ(old.truth, new.truth):
            raise UmedError(
                f"{start}: the reference of question {new.id!r} is {_both(old.truth, new.truth)}. {_REMEDY}"
            )
        if old.boxes is not None and new.boxes is not None and not _same_boxes(old.boxes, new.boxes):
            first, second = (", ".join(map(str, map(list, boxes))) or "none" for boxes in (old.boxes, new.boxes))
            raise UmedError(f"{start}: the true boxes of question {new.id!r} are {_both(first, second)}. {_REMEDY}")


def _same_boxes(old: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> bool:
    """Whether each box has one of its own in the other list that lies in the same place; the order does not count."""
    left = list(new)
    for box in old:
        same = next((one for one in left if all(abs(a - b) <= _PIXELS for a, b in zip(box, one))), None)
        if same is None:
            return False
        left.remove(same)
    return not left


def _differ(old: str, new: str) -> bool:
    return old != new and _key(old) != _key(new)


def _key(text: str) -> str:
    """A text without what depends on the checkpoint."""
    return " ".join(blot_boxes(_ADDED.sub("", text)).replace("[outside]", "[box]").split())


def _both(old: str, new: str) -> str:
    first, second = (repr(text[:_SHOWN]) + (" ..." if len(text) > _SHOWN else "") for text in (old, new))
    return f"{first} in the earlier one and {second} in the other"
