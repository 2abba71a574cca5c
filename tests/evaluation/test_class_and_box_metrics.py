"""AUC and the metrics of boxes against cases worked out by hand, and against public implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.oracles import oracle

from umed_plugin.evaluation.metrics import classification, grounding

# --- classification


def test_auc_by_hand():
    scores, positive = np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, False, True, False])
    # Pairs (positive, negative): 0.9 beats both; 0.5 ties with 0.5 (half) and beats 0.1: 3.5 of 4.
    assert classification.auc(scores, positive) == pytest.approx(3.5 / 4)
    assert math.isnan(classification.auc(scores, np.zeros(4, bool)))
    assert classification.likelihoods([1.0, 1.0]) == [0.5, 0.5]
    assert classification.likelihoods([0.0, math.log(3)]) == pytest.approx([0.75, 0.25])
    assert sum(classification.likelihoods([800.0, 801.0, 900.0])) == pytest.approx(1)


@pytest.mark.parametrize("classes", [2, 5])
def test_auc_is_scikit_learn_s(classes):
    metrics = oracle("sklearn.metrics")
    from scipy.stats import mannwhitneyu

    generator = np.random.default_rng(classes)
    truth = generator.integers(0, classes, 300)
    scores = np.round(generator.random((300, classes)) + 0.4 * np.eye(classes)[truth], 1)  # rounded: with ties
    if classes == 2:
        theirs = metrics.roc_auc_score(truth, scores[:, 1])
    else:
        theirs = np.mean([metrics.roc_auc_score(truth == one, scores[:, one]) for one in range(classes)])
    assert classification.macro_auc(scores, truth) == pytest.approx(theirs)
    # The chance that a positive scores above a negative, from ranks.
    positive = truth == 1
    pairs = positive.sum() * (~positive).sum()
    by_ranks = mannwhitneyu(scores[positive, 1], scores[~positive, 1]).statistic / pairs
    assert classification.auc(scores[:, 1], positive) == pytest.approx(by_ranks)


# --- boxes


def test_the_pointing_game_by_hand():
    true = [[0, 0, 10, 10], [50, 50, 60, 60]]
    assert grounding.points_at([[48, 48, 60, 60]], true) == 1, "its centre is 54, 54"
    assert grounding.points_at([[0, 0, 22, 22]], true) == 0
    assert grounding.points_at([[20, 20, 30, 30], [0, 0, 10, 10]], true) == 0, "the first box counts"
    assert grounding.points_at([], true) == 0 and grounding.points_at([[5, 5, 5, 5]], true) == 0


def test_the_pointing_game_of_attention_by_hand():
    attention = np.zeros((4, 4))
    attention[1, 2] = 1  # its middle is at x 2.5 / 4, y 1.5 / 4 of what the patches cover
    assert grounding.attention_points_at(attention, 1.0, [[0.6, 0.3, 0.7, 0.4]]) == 1
    assert grounding.attention_points_at(attention, 1.0, [[0.3, 0.6, 0.4, 0.7]]) == 0, "columns are x"
    assert grounding.attention_points_at(attention, 0.8, [[0.6, 0.3, 0.7, 0.4]]) == 0, "x is 0.5 then"
    assert grounding.attention_points_at(attention, 0.8, [[0, 0, 0.1, 0.1], [0.45, 0.25, 0.55, 0.35]]) == 1


def test_lesions_by_size_by_hand():
    # 336 px: 16 px is small, 64 medium, 200 large.
    true = [[0, 0, 16 / 336, 16 / 336], [0.5, 0.5, 0.5 + 64 / 336, 0.5 + 64 / 336], [0, 0, 200 / 336, 200 / 336]]
    overlaps = grounding.lesion_overlaps([true[1]], true)
    assert overlaps == [0, pytest.approx(1), 0]
    values = grounding.overlaps_by_size(overlaps, true)
    assert values["lesions_small"] == values["lesions_medium"] == values["lesions_large"] == 1
    assert (values["lesion_iou_medium"], values["lesions_found_medium"], values["lesions_found_small"]) == (1, 1, 0)


def test_recall_at_50_by_hand():
    true = [[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]]
    assert grounding.recalled([[0, 0, 10, 10]], true) == (2, 3), "one box may find two lesions, as BiRD counts"
    assert grounding.recalled([[0, 0, 10, 5]], true[:1]) == (0, 1), "an IoU of exactly 0.5 does not count"
    assert grounding.recalled([], true) == (0, 3)
    assert grounding.recalled([[0, 0, 1, 1]], []) == (0, 0)


def test_recall_at_50_is_that_of_pycocotools_where_one_box_answers_one_lesion():
    """COCO matches one to one and counts 0.5 itself; with one box for each lesion and no IoU of 0.5 both are the same."""
    mask = oracle("pycocotools.mask")
    generator = np.random.default_rng(0)
    for _ in range(50):
        corner = generator.integers(0, 100, (2, 2)).astype(float)
        size = generator.integers(5, 80, (2, 2)).astype(float)
        a, b = (np.concatenate([corner[i], corner[i] + size[i]]) for i in (0, 1))
        theirs = mask.iou([[*corner[0], *size[0]]], [[*corner[1], *size[1]]], [0])[0, 0]
        assert grounding.recalled([a], [b])[0] == (theirs > 0.5)
        assert grounding.lesion_overlaps([a], [b])[0] == pytest.approx(theirs)
