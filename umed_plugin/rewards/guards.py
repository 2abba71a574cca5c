"""Guards: metrics that reveal reward hacking, that is, better grounding versus exploiting the reward.

Each is taken over the last `WINDOW` questions of each process, with all candidates of each question. The log has the mean over
processes. A resumed run starts with an empty window.

Each is logged as ``guard/<name>``. After the dash: what a bad trend looks like.

- ``whole_image_boxes``: share of boxes that cover more than 0.8 of the visible image, where no true box covers as much - rises: a
  box around everything always overlaps.
- ``malformed_boxes``: share of boxes without area or outside the square - rises: coordinates are no longer read off the image.
  Boxes that could not be read are among them.
- ``unread_boxes``: boxes that could not be read, such as one that is cut off, mean over answers - rises: boxes lose their
  form, or answers are too long for ``--umed_max_new_tokens``.
- ``box_area_ratio``: mean area of an answer's boxes over that of the true ones, geometric mean over the answers that have
  both - climbs above 1 while the rewards rise: boxes hedge. Seen in this project: sampled at temperature 1, greedy boxes grew to
  1.5 times the lesion.
- ``extra_boxes``: boxes beyond the true number, mean over answers - rises: boxes are scattered in the hope of a hit.
- ``missing_boxes``: boxes short of the true number, mean over answers - rises: lesions are left out, or every image is called
  normal.
- ``length_ratio``: words of the answers over words of the references - drifts: answers are padded, or stripped to what is scored.
- ``distinct_skeletons``: number of different wordings over number of answers, with numbers and class names blanked out - falls
  towards 0: one sentence for every image. Seen in this project's stage 2.
- ``top_skeleton``: share of answers with the most frequent wording - rises far above ``top_skeleton_reference``, the same for the
  reference answers.
- ``distinct_coordinates``: number of different coordinates in all boxes - falls far below ``distinct_coordinates_reference``: a
  few stock boxes. Seen in this project's stage 2.

- ``unscored/<reward>``: share of answers for which the reward returned None - 1: the reward scores nothing, and the run trains
  without it.

With ``--umed_val_every``, two more compare the answers sampled to training studies with the greedy ones to held-out studies:

- ``iou_over_held_out``, ``accuracy_over_held_out``: mean set IoU (of studies with a lesion) and accuracy of the sampled answers
  in the window, minus ``val/iou`` and ``val/accuracy`` of the last validation - high from the start: stage 1 knows the training
  studies by heart, so stage 2 has nothing to learn from them. Seen in this project: 0.95 against 0.15 after 40 epochs on 200
  studies, and stage 2 only lost. Sampled answers are worse than greedy ones, so the true gap is larger.
- ``questions_over_held_out``: number of questions in the window that these two are taken over. Below `WINDOW`, they are noisy.

Two more metrics tell what the vision relevance reward is worth, over the candidates of one step that name the lesion:

- ``vision_relevance/over_uniform``: mean attention on the lesion over the mean share of the image that the lesion covers. 1 is no
  better than uniform attention. A reward that rises while this stays near 1 rewards large lesions.
- ``vision_relevance/iou_correlation``: Spearman's rank correlation of that ratio with the IoU of the same candidate, -1 to 1. At
  0 or below, attention on the lesion does not help to find it, and the term works against localization.

The first time a metric crosses its limit (`umed_plugin.rewards.guard_limits`) after the first `WINDOW` questions, the run
prints a warning. No lesion that was measured comes near 0.8 of the image: the largest of 1,247 boxes of brain tumours, polyps,
liver lesions and chest X-rays (NIH) covers 0.56. The share is of the visible image, wherever augmentation has moved it, and not
of the square, half of which may be padding. The paper has no such metrics; metrics and limits are ours.
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from umed_plugin.grounding.boxes import Box, is_degenerate, parse_boxes
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import AnswerScore
from umed_plugin.grounding.square_move import image_in_square
from umed_plugin.grounding.terms import ClassNames, replace_terms
from umed_plugin.rewards.guard_limits import crossed_limits, unscored

WINDOW = 64
WHOLE_IMAGE_SHARE = 0.8

GUARDS = (
    "guard/whole_image_boxes",
    "guard/malformed_boxes",
    "guard/unread_boxes",
    "guard/box_area_ratio",
    "guard/extra_boxes",
    "guard/missing_boxes",
    "guard/length_ratio",
    "guard/distinct_skeletons",
    "guard/top_skeleton",
    "guard/top_skeleton_reference",
    "guard/distinct_coordinates",
    "guard/distinct_coordinates_reference",
)

# Guard -> what it is compared with, a metric of the held-out validation.
HELD_OUT_GUARDS = {
    "guard/iou_over_held_out": "val/iou",
    "guard/accuracy_over_held_out": "val/accuracy",
}

# The number of training questions that they are taken over, per process.
QUESTIONS_OVER_HELD_OUT = "guard/questions_over_held_out"

VISION_RELEVANCE_METRICS = ("vision_relevance/over_uniform", "vision_relevance/iou_correlation")

_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class _TextStats:
    """What the guards keep of one text, an answer or a reference.

    Attributes:
        malformed, whole: number of malformed and of whole-image boxes among ``boxes``.
        unread: number of boxes that could not be read, among ``boxes``.
        true: number of true boxes that the model can see.
        log_area_ratio: log of the mean box area over the mean true area; None where either has no box.
        iou: set IoU, 0-1; None for a study without a lesion.
        accuracy: 1 if exactly the true classes are named, else 0; None for a question that asks for no diagnosis.
    """

    words: int
    skeleton: str
    coordinates: tuple[float, ...]
    boxes: int = 0
    malformed: int = 0
    whole: int = 0
    unread: int = 0
    true: int = 0
    log_area_ratio: float | None = None
    iou: float | None = None
    accuracy: float | None = None


class Guards:
    """The guards over a sliding window of questions, and the warnings that have not been given yet.

    Args:
        window: number of questions.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._answers: deque[list[_TextStats]] = deque(maxlen=window)
        self._references: deque[_TextStats] = deque(maxlen=window)
        self._unscored: deque[dict[str, float]] = deque(maxlen=window)
        self._warned: set[str] = set()
        self._held_out: dict[str, float] = {}

    def held_out(self, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of a validation, which the answers to training studies are compared with from now on."""
        self._held_out = dict(metrics)

    def add(
        self,
        texts: Sequence[str],
        scores: Sequence[AnswerScore],
        records: Sequence[Mapping[str, Any]],
        geometries: Sequence[ImageGeometry],
    ) -> None:
        """Add the K candidates of one question: ``texts`` and their ``scores``, with one record and geometry per candidate."""
        self._answers.append([_answer_stats(*parts) for parts in zip(texts, scores, records, geometries)])
        self._references.append(_text_stats(records[0]["conversations"][1]["value"], records[0]["terms"]))

    def add_terms(self, terms: Mapping[str, Sequence[float | None]]) -> None:
        """Add the rewards of one question: K values of each, None for an answer that the reward cannot score."""
        self._unscored.append({name: sum(v is None for v in column) / len(column) for name, column in terms.items()})

    def metrics(self) -> dict[str, float]:
        """The guards over the window, without those that nothing in the window can give."""
        answers = [answer for group in self._answers for answer in group]
        if not answers:
            return {}
        boxes = sum(answer.boxes for answer in answers)
        ratios = [answer.log_area_ratio for answer in answers if answer.log_area_ratio is not None]
        skeletons = Counter(answer.skeleton for answer in answers)
        reference_words = [reference.words for reference in self._references]
        metrics = {
            "guard/extra_boxes": _mean([max(answer.boxes - answer.true, 0) for answer in answers]),
            "guard/unread_boxes": _mean([answer.unread for answer in answers]),
            "guard/missing_boxes": _mean([max(answer.true - answer.boxes, 0) for answer in answers]),
            "guard/length_ratio": _mean([answer.words for answer in answers]) / max(_mean(reference_words), 1),
            "guard/distinct_skeletons": len(skeletons) / len(answers),
            "guard/top_skeleton": max(skeletons.values()) / len(answers),
            "guard/top_skeleton_reference": _top_share([reference.skeleton for reference in self._references]),
            "guard/distinct_coordinates": len({c for answer in answers for c in answer.coordinates}),
            "guard/distinct_coordinates_reference": len(
                {c for reference in self._references for c in reference.coordinates}
            ),
        }
        for name in self._unscored[-1] if self._unscored else ():
            metrics[unscored(name)] = _mean([shares[name] for shares in self._unscored])
        if boxes:
            metrics["guard/whole_image_boxes"] = sum(answer.whole for answer in answers) / boxes
            metrics["guard/malformed_boxes"] = sum(answer.malformed for answer in answers) / boxes
        if ratios:
            metrics["guard/box_area_ratio"] = math.exp(_mean(ratios))
        return {**metrics, **self._over_held_out(answers)}

    def _over_held_out(self, answers: Sequence[_TextStats]) -> dict[str, float]:
        """`HELD_OUT_GUARDS`, without those that the window or the validation cannot give, and over how many questions."""
        ious = [answer.iou for answer in answers if answer.iou is not None]
        accuracies = [answer.accuracy for answer in answers if answer.accuracy is not None]
        values = {"val/iou": ious, "val/accuracy": accuracies}
        found = {
            guard: _mean(values[name]) - self._held_out[name]
            for guard, name in HELD_OUT_GUARDS.items()
            if values[name] and name in self._held_out
        }
        return {**found, QUESTIONS_OVER_HELD_OUT: float(len(self._answers))} if found else {}

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        """A sentence for each guard that crosses its limit for the first time; empty until the window is full."""
        if len(self._answers) < (self._answers.maxlen or 0):
            return []
        crossed = {name: words for name, words in crossed_limits(metrics).items() if name not in self._warned}
        self._warned.update(crossed)
        return [f"{name} is {metrics[name]:.3g}, {words}." for name, words in crossed.items()]


def vision_relevance_metrics(
    attention: Sequence[float | None], covers: Sequence[float], overlaps: Sequence[float]
) -> dict[str, float]:
    """The metrics in `VISION_RELEVANCE_METRICS`, without those that the candidates cannot give.

    Args:
        attention: [N] attention on the lesion, 0-1; 0 where the lesion is not named, None where it was not computed.
        covers: [N] share of the image's patches that the true boxes cover, 0-1; 0 for a study without a lesion.
        overlaps: [N] set IoU, 0-1.
    """
    from scipy.stats import spearmanr

    named = [(a, c, o) for a, c, o in zip(attention, covers, overlaps) if a is not None and a > 0 and c > 0]
    if not named:
        return {}
    metrics = {VISION_RELEVANCE_METRICS[0]: sum(a for a, _, _ in named) / sum(c for _, c, _ in named)}
    ratios, ious = [a / c for a, c, _ in named], [o for _, _, o in named]
    # The ranks of only two candidates always correlate at 1 or -1, and equal values have no ranks.
    if len(named) > 2 and len(set(ratios)) > 1 and len(set(ious)) > 1:
        metrics[VISION_RELEVANCE_METRICS[1]] = float(spearmanr(ratios, ious).statistic)
    return metrics


def box_area_ratio(predicted01: Sequence[Box], true01: Sequence[Box]) -> float | None:
    """Mean area of the predicted boxes over the mean area of the true ones; None where either side has no proper box."""
    predicted, true = ([_area(box) for box in boxes if not is_degenerate(box)] for boxes in (predicted01, true01))
    return _mean(predicted) / _mean(true) if predicted and true else None


def skeleton(text: str, terms: ClassNames) -> str:
    """The wording of an answer: numbers become ``#``, class names ``@``; case and spacing are ignored."""
    return _SPACE.sub(" ", _NUMBER.sub("#", replace_terms(text, terms, "@"))).strip().lower()


def _text_stats(text: str, terms: ClassNames) -> _TextStats:
    coordinates = tuple(round(value, 3) for box in parse_boxes(text) for value in box)
    return _TextStats(len(text.split()), skeleton(text, terms), coordinates)


def _answer_stats(text: str, score: AnswerScore, record: Mapping[str, Any], geometry: ImageGeometry) -> _TextStats:
    plain, ratio = _text_stats(text, record["terms"]), box_area_ratio(score.predicted01, score.true01)
    visible = image_in_square(record, geometry)
    lesion_covers_image = any(_share_of(visible, box) > WHOLE_IMAGE_SHARE for box in score.true01)
    whole = 0 if lesion_covers_image else sum(_share_of(visible, box) > WHOLE_IMAGE_SHARE for box in score.predicted01)
    return _TextStats(
        plain.words,
        plain.skeleton,
        plain.coordinates,
        boxes=len(score.predicted01),
        malformed=sum(is_degenerate(box) for box in score.predicted01),
        whole=whole,
        unread=score.unread,
        true=score.n_true,
        log_area_ratio=None if ratio is None else math.log(ratio),
        iou=score.set_iou if score.n_true else None,
        accuracy=score.accuracy if score.diagnosed else None,
    )


def _share_of(visible: Box, box: Box) -> float:
    """Share of the area of ``visible`` that the box covers, 0-1."""
    shared = (*map(max, visible[:2], box[:2]), *map(min, visible[2:], box[2:]))
    return 0.0 if is_degenerate(shared) else _area(shared) / _area(visible)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _top_share(values: Sequence[str]) -> float:
    return max(Counter(values).values()) / len(values)
