"""What answers score that never look at an image: the best of them stands beside each metric.

MedVH's published files have the right answer in the last place in every row of three tasks, so "the last choice" scores 1 there.
Nothing in an accuracy shows that. So answers that are the same for every image are scored like the model's own: the place of a
choice, the choice that is most often right, the commonest references, yes and no, nothing, and, where boxes count, the whole
image, its middle, and a grid of boxes. One more reads the question, and still no image: it says what the same question has mostly
about the other images.

Constants are written in LLaVA's form of boxes and read in it, whatever form the checkpoint has (``--boxes``).

They are chosen with the references at hand, which a model has not: an upper bound of what needs no image. At most `MOST`
questions, drawn at random by a fixed seed, are scored for it; of studies with boxes `MOST_STUDIES`, since each takes longer.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion
from umed_plugin.evaluation.metrics.answers import words
from umed_plugin.evaluation.metrics.choices import LETTERS
from umed_plugin.evaluation.metrics.metric import RATE, Row, statistics
from umed_plugin.grounding.answer_types import REPORT, asks_for_boxes
from umed_plugin.grounding.boxes import format_box
from umed_plugin.grounding.dialects import LLAVA
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

MOST, MOST_STUDIES = 2000, 200
HIGH = 0.9  # share of a metric's upper limit; a constant answer that reaches it is said, whatever the model scores
_COMMONEST, _WORDS = 4, 50
_PLACES = ("the first choice", "the second choice", "the third choice", "the fourth choice")
_BOXES = {
    "a box around all": [(0.0, 0.0, 1.0, 1.0)],
    "a box in the middle": [(0.25, 0.25, 0.75, 0.75)],
    "a grid of boxes": [
        (x / 4, y / 4, (x + size) / 4, (y + size) / 4)
        for size in (1, 2)
        for y in range(5 - size)
        for x in range(5 - size)
    ],
}

Constant = Callable[[BenchmarkQuestion], ModelAnswer]


def best_constants(
    benchmark: Benchmark, questions: Sequence[BenchmarkQuestion], scorer: Scorer
) -> dict[str, dict[str, Any]]:
    """``{metric: {"value", "answer"}}``: the highest value that one of `constant_answers` reaches, and which one.

    A metric whose upper limit is not 1, such as CIDEr-D, also has this ``limit``.

    Metrics of which less is better are left out, and those that only describe answers. So are those that no constant answer has,
    such as attention.

    Args:
        questions: as the model was asked.
        scorer: of the model's answers. Its dialect is not used: these answers are ours.
    """
    asked = list(questions)
    most = MOST_STUDIES if benchmark.reads_boxes else MOST
    if len(asked) > most:
        asked = [asked[i] for i in sorted(random.Random(0).sample(range(len(asked)), most))]
    best: dict[str, dict[str, Any]] = {}
    scorer = replace(scorer, dialect=LLAVA)
    for name, constant in constant_answers(asked, benchmark).items():
        rows = [
            Row(question.id, question.cluster, benchmark.score(question, constant(question), scorer), question.groups)
            for question in asked
        ]
        metrics = [metric for metric in benchmark.metrics(rows) if metric.rates and not metric.lower_is_better]
        limits = {
            one.name: {"limit": one.limits[1]} for one in metrics if one.limits is not None and one.limits != RATE
        }
        for metric, value in statistics(metrics, rows).items():
            if value is not None and (metric not in best or value > best[metric]["value"]):
                best[metric] = {"value": value, "answer": name, **limits.get(metric, {})}
    return best


def constant_answers(questions: Sequence[BenchmarkQuestion], benchmark: Benchmark) -> dict[str, Constant]:
    """Answers that do not depend on the image, by what they are, simplest first: of equal ones the first is reported."""
    if any(asks_for_boxes(question.about.get("record", {"answer_type": REPORT})) for question in questions):
        return {"nothing": _text(""), **_with_boxes(questions)}
    found: dict[str, Constant] = {}
    if any(_choices(question) for question in questions):
        found |= {name: _place(place) for place, name in enumerate(_PLACES)}
        found |= {"the last choice": _place(-1), "the last choice but one": _place(-2)}
        found["the choice that is most often right"] = _prior(questions)
    found |= {'"Yes."': _text("Yes."), '"No."': _text("No."), '"Yes or no."': _text("Yes or no.")}
    truths = Counter(question.truth for question in questions if question.write)
    found |= {f'"{truth[:40]}"': _text(truth) for truth, _ in truths.most_common(_COMMONEST)}
    found["nothing"] = _text("")
    if truths:
        common = Counter(word for question in questions for word in words(question.truth))
        found[f"the {_WORDS} commonest words"] = _text(" ".join(word for word, _ in common.most_common(_WORDS)))
    if benchmark.reads_boxes:
        found |= _with_boxes(questions)
    if len({(_words_of(question), question.cluster) for question in questions}) > len(set(map(_words_of, questions))):
        found["what the same question mostly has elsewhere"] = _elsewhere(questions)
    return found


def _choices(question: BenchmarkQuestion) -> Sequence[str]:
    return question.options or question.about.get("choices") or ()


def _text(text: str) -> Constant:
    """The text. Of options whose likelihood is asked, none is likelier than another."""
    return lambda question: ModelAnswer(text, [1.0] * len(question.options))


def _place(place: int) -> Constant:
    """The choice at a place, counted from the end if negative; the last one where there is none."""

    def answer(question: BenchmarkQuestion) -> ModelAnswer:
        choices = _choices(question)
        return _chosen(question, min(place, len(choices) - 1) if place >= 0 else max(len(choices) + place, 0))

    return answer


def _prior(questions: Sequence[BenchmarkQuestion]) -> Constant:
    """Of the choices the one that is the reference most often, over all questions."""
    often = Counter(question.truth for question in questions)

    def answer(question: BenchmarkQuestion) -> ModelAnswer:
        choices = _choices(question)
        return _chosen(question, max(range(len(choices)), key=lambda i: often[choices[i]]) if choices else 0)

    return answer


def _words_of(question: BenchmarkQuestion) -> tuple[Any, ...]:
    """All that who does not look knows of a question: its words, and its choices in whatever order."""
    asked = (question.groups.get("part", ""), question.text or "", question.options_after or "")
    return (*asked, *sorted(_choices(question)))


def _elsewhere(questions: Sequence[BenchmarkQuestion]) -> Constant:
    """The commonest reference of the same words about other images; where there is none, the commonest of all."""
    often = Counter(question.truth for question in questions)
    same: dict[Any, Counter[str]] = defaultdict(Counter)
    own: dict[Any, Counter[str]] = defaultdict(Counter)
    for question in questions:
        same[_words_of(question)][question.truth] += 1
        own[_words_of(question), question.cluster][question.truth] += 1

    def answer(question: BenchmarkQuestion) -> ModelAnswer:
        others = same[_words_of(question)] - own[_words_of(question), question.cluster]
        choices = _choices(question)
        if choices:
            return _chosen(question, max(range(len(choices)), key=lambda i: (others[choices[i]], often[choices[i]])))
        return _text((others or often).most_common(1)[0][0])(question)

    return answer


def _chosen(question: BenchmarkQuestion, index: int) -> ModelAnswer:
    """A choice said in full, and likelier than the others."""
    choices = _choices(question)
    if not choices:
        return ModelAnswer("", [])
    losses = [0.0 if i == index else 1.0 for i in range(len(question.options))]
    lettered = f"{LETTERS[index]}: {choices[index]}" if index < len(LETTERS) else choices[index]
    return ModelAnswer(choices[index] if question.options else lettered, losses)


def _with_boxes(questions: Sequence[BenchmarkQuestion]) -> dict[str, Constant]:
    """Each of the commonest findings in a box around all, and the commonest also in the other boxes; else the boxes alone."""
    records: list[Mapping[str, Any]] = [q.about["record"] for q in questions if "record" in q.about]
    common = Counter(record["terms"][ref][0] for record in records for ref in set(record["objects"]["ref"]))
    names = [name for name, _ in common.most_common(_COMMONEST)] or [""]
    whole, *others = _BOXES
    said = [(name, whole) for name in names] + [(names[0], where) for where in others]
    return {
        f"{name}{', ' if name else ''}{where}": _text(
            (f"{name} at " if name else "") + " ".join(map(format_box, _BOXES[where]))
        )
        for name, where in said
    }


def constant_notes(metrics: Mapping[str, Mapping[str, Any]], constants: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences on metrics that a constant answer does as well as the model in, and on those in which it scores high."""
    known = {name: (metrics[name]["value"], best) for name, best in constants.items() if name in metrics}
    is_high = {name: best["value"] >= HIGH * best.get("limit", 1) for name, (_, best) in known.items()}
    high = [f"{name} ({best['answer']}: {best['value']:.3f})" for name, (_, best) in known.items() if is_high[name]]
    beaten = [
        f"{name} ({best['answer']}: {best['value']:.3f})"
        for name, (value, best) in known.items()
        if value is not None and best["value"] >= value and not is_high[name]
    ]
    notes = []
    if high:
        notes.append(
            f"An answer that never looks at the image reaches {100 * HIGH:.0f} % of the highest value or more here, so these say "
            f"little: {_some(high)}."
        )
    if beaten:
        notes.append(f"No better than an answer that never looks at the image: {_some(beaten)}.")
    return notes


def _some(texts: Sequence[str], most: int = 8) -> str:
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if len(texts) > most else "")
