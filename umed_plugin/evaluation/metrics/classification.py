"""AUC and accuracy as MedMNIST's evaluator defines them, from the likelihoods that a model gives to class names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def likelihoods(losses: Sequence[float]) -> list[float]:
    """Class probabilities from the mean cross-entropy (nats) of each class's name: the softmax of the negative losses.

    The mean over a name's tokens, not their sum: a long name would have lost before the image is looked at.
    """
    import numpy as np

    scores = np.exp(min(losses) - np.asarray(losses, dtype=float))
    return [float(value) for value in scores / scores.sum()]


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve, 0-1: the chance that a positive scores above a negative, equal scores counting half.

    From ranks (Mann and Whitney 1947): (R - P (P + 1) / 2) / (P N), R the sum of the positives' ranks, P and N the counts.

    Args:
        scores: [n], higher is more positive.
        positive: [n] bool.

    Returns:
        NaN when there is no positive or no negative.
    """
    from scipy.stats import rankdata

    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores)[positive].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


def macro_auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """AUC of several classes, 0-1: the plain mean over classes of each against the rest.

    Two classes: the AUC of the second, as MedMNIST has it. A class without positives or negatives makes it NaN.

    Args:
        scores: [n, classes].
        truth: [n] class indices.
    """
    classes = scores.shape[1]
    if classes == 2:
        return auc(scores[:, 1], truth == 1)
    found = [auc(scores[:, one], truth == one) for one in range(classes)]
    return float(sum(found) / classes)
