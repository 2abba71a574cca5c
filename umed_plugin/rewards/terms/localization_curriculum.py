"""Localization by a threshold that grows with the model; use it instead of `localization`.

The idea is MedLoc-R1's (arXiv 2603.28120): 1 if the IoU reaches the threshold, else 0. IoU itself pays nearly as much for a box
that is roughly right as for an exact one, so its advantages fade while boxes could still improve. A fixed high threshold pays
nothing at the start. Here the threshold rises when most answers to the last questions reach it.

Departures from MedLoc-R1, of which only the paper and a port could be read:

- the window keeps the IoUs and not the hits, so that all of it is measured against today's threshold;
- several lesions count by their set IoU, as in `localization`. A study without a lesion scores 1 for no box, and is left out of
  the window: whether it is answered by no box says nothing about how exact boxes are;
- the window has the questions of all processes, so the threshold is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean, pstdev
from typing import Any

from umed_plugin.grounding.answer_types import asks_for_boxes
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import AnswerScore, score_answer
from umed_plugin.rewards.contract import register_reward

FIRST, LAST = 0.3, 0.8
WINDOW = 30  # questions
MARGIN = 0.1  # of the mean IoU above the threshold
# The next step up, below a threshold: large at first. The way is 0.3, 0.45, 0.6, 0.7, 0.8; the port has more rows for thresholds
# that no run reaches.
_STEPS = ((0.55, 0.15), (1.0, 0.10))
# Least hit rate and largest standard deviation of the questions' hit rates, from a threshold on: those of the port. Where each
# question's answers all hit or all miss, the deviation allows 1 or 4 misses of 30, fewer than the hit rate does.
_DEMANDS = ((0.60, 0.75, 0.35), (0.0, 0.80, 0.20))


@register_reward("localization_curriculum", applies_to=asks_for_boxes)
class LocalizationCurriculum:
    """1 if the set IoU of an answer is at least the threshold, else 0; a study without a lesion as in `localization`.

    The threshold begins at 0.3 and ends at 0.8. It rises after a rollout if, over the last 30 questions with a lesion, the hit
    rate and its standard deviation over the questions meet `_DEMANDS`, and the mean IoU lies at least 0.1 above the threshold.
    The older half of the window is dropped then. The threshold is part of a checkpoint: see `umed_plugin.rewards`.

    Example:
        >>> study = {"objects": {"ref": ["cyst"], "bbox": [[0, 0, 50, 50]]}, "terms": {"cyst": ["cyst"]}}
        >>> curriculum, geometry = LocalizationCurriculum(), ImageGeometry(100, 100)
        >>> curriculum([""], ["A cyst at [0.00, 0.00, 0.25, 0.50]."], record=[study], geometry=[geometry])  # IoU 0.5
        [1.0]
        >>> curriculum.advance([[0.9, 1.0]] * 30)
        >>> curriculum.threshold
        0.45

    Attributes:
        num_candidates: K, answers in a row to each question; a run sets it. None: as many as have the same record object.
    """

    num_candidates: int | None = None
    metric_names = (
        "localization_curriculum/threshold",
        "localization_curriculum/hit_rate",
        "localization_curriculum/mean_iou",
    )

    def __init__(self) -> None:
        self.threshold = FIRST
        self._window: list[list[float]] = []  # IoUs of the answers to each question, oldest first
        self._questions: list[list[float] | None] = []

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        record: Sequence[Mapping[str, Any]],
        geometry: Sequence[ImageGeometry],
        **columns: Any,
    ) -> list[float | None]:
        """0.0 or 1.0 for each completion."""
        scores = [score_answer(*answer) for answer in zip(completions, record, geometry)]
        self._questions = [
            [score.set_iou for score in group] if group[0].n_true else None
            for group in self._by_question(scores, record)
        ]
        return [float(score.set_iou >= self.threshold) for score in scores]

    def _by_question(self, scores: list[AnswerScore], record: Sequence[Mapping[str, Any]]) -> list[list[AnswerScore]]:
        """The scores of each question's answers."""
        each = self.num_candidates
        if each is not None:
            return [scores[first : first + each] for first in range(0, len(scores), each)]
        rows = groupby(zip(record, scores), key=lambda row: id(row[0]))
        return [[score for _, score in group] for _, group in rows]

    def for_all_processes(self) -> list[list[float] | None]:
        """The IoUs of the answers to each question of the last call, None for one without a lesion."""
        return self._questions

    def advance(self, questions: Sequence[list[float] | None]) -> None:
        """Take the questions of all processes into the window, and raise the threshold if the model is ready for the next."""
        known = [question for question in questions if question]
        self._window = [*self._window, *known][-WINDOW:]
        if len(self._window) == WINDOW and self.threshold < LAST and self._is_mastered():
            step = next(step for below, step in _STEPS if self.threshold < below)
            self.threshold = round(min(self.threshold + step, LAST), 2)
            self._window = self._window[WINDOW // 2 :]

    def _is_mastered(self) -> bool:
        rates = self._hit_rates()
        least, largest = next(demand for start, *demand in _DEMANDS if self.threshold >= start)
        return fmean(rates) >= least and pstdev(rates) <= largest and self._mean_iou() >= self.threshold + MARGIN

    def _hit_rates(self) -> list[float]:
        return [fmean(iou >= self.threshold for iou in question) for question in self._window]

    def _mean_iou(self) -> float:
        return fmean(fmean(question) for question in self._window)

    def metrics(self) -> dict[str, float]:
        """The threshold of the last call, and hit rate and mean IoU over the window before it."""
        values = (self._hit_rates() and [fmean(self._hit_rates()), self._mean_iou()]) or []
        return dict(zip(self.metric_names, [self.threshold, *values]))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {"threshold": self.threshold, "window": self._window}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.threshold, self._window = float(state["threshold"]), [list(question) for question in state["window"]]
