"""The gain by which ``rewarding: auto`` decides: the mean of several metrics, with an interval of its own.

The interval of a mean does not follow from the intervals of its parts: IoU and accuracy of one study go together. So the mean is
resampled as a whole, with the same draws for both evaluations (`umed_plugin.evaluation.metrics.metric`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from umed_plugin.evaluation.metrics.metric import FEWEST, Columns, Metric, Row, compare_rows

if TYPE_CHECKING:
    import numpy as np

FEWEST_TO_TELL = FEWEST  # patients or images; fewer have no interval


def paired_mean(names: Sequence[str], before: Sequence[Row], after: Sequence[Row]) -> dict[str, Any]:
    """The paired difference of the unweighted mean of some metrics, as `compare_rows` gives it.

    Args:
        names: columns of the rows. Each metric is the mean over the studies that have its column on both sides.
        before, after: rows of the same questions.

    Example:
        >>> rows = [[Row(str(i), f"scan{i}", {"iou": 0.1 * up, "accuracy": 0.5}) for i in range(8)] for up in (0, 2)]
        >>> found = paired_mean(["iou", "accuracy"], *rows)
        >>> round(found["difference"], 3), found["n"]
        (0.1, 8)
    """
    later = {row.id: row for row in after}
    pairs = [(row, later[row.id]) for row in before if row.id in later]
    sides = [[_with_gaps(pair[side], pair, names) for pair in pairs] for side in (0, 1)]
    # A row without any of the columns counts for nothing.
    kept = [index for index, row in enumerate(sides[0]) if not all(math.isnan(value) for value in row.values.values())]
    metric = Metric("mean", _mean_of_means, tuple(names))
    return compare_rows([metric], *([rows[index] for index in kept] for rows in sides))["mean"]


def more_studies(gain: Mapping[str, Any]) -> int | None:
    """How many more studies it takes until the interval of such a gain ends at 0. It narrows with the root of their number.

    Args:
        gain: as `paired_mean` gives it, above 0.

    Returns:
        1 or more; None for a gain without an interval.

    Example:
        >>> more_studies({"difference": 0.01, "ci95": [-0.01, 0.03], "n": 100})
        300
    """
    if gain["ci95"] is None:
        return None
    times = ((gain["difference"] - gain["ci95"][0]) / gain["difference"]) ** 2
    return max(1, math.ceil(round(gain["n"] * (times - 1), 6)))


def _with_gaps(row: Row, pair: Sequence[Row], names: Sequence[str]) -> Row:
    """The row with NaN in each column that one side lacks, such as IoU for a study without a lesion."""
    values = {name: row.values[name] if all(name in one.values for one in pair) else math.nan for name in names}
    return Row(row.id, row.cluster, values)


def _mean_of_means(columns: Columns) -> float:
    means = [_mean_of_known(column) for column in columns.values()]
    return sum(means) / len(means)


def _mean_of_known(column: np.ndarray) -> float:
    known = column[column == column]
    return float(known.mean()) if len(known) else math.nan
