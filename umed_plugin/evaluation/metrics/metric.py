"""Metrics over scored questions: value, number of questions, and 95 % bootstrap confidence interval.

A question that was answered and scored is a `Row` of named numbers and of the groups that it belongs to. A `Metric` is a pure
function of some of these columns.

Intervals are percentile bootstrap confidence intervals (Efron 1979). The generator has a fixed seed, so the same answers give
the same interval. Resampling draws clusters, not questions: the patient where it is known, else the image. Questions about one
image, and slices of one patient, are not independent; drawing them one by one would make intervals too narrow (Field and
Welsh 2007).

Two runs are compared pair by pair: both are resampled with the same draws, so what they have in common cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from umed_plugin.errors import UmedError

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
# A metric that needs rare rows (both classes of an AUC) is undefined on some draws. Above this share it gets no interval.
MAX_UNDEFINED = 0.05

Columns = Mapping[str, "np.ndarray"]
Statistic = Callable[[Columns], float]


@dataclass(frozen=True)
class Row:
    """One scored question.

    Attributes:
        id: of the question, unique within an evaluation.
        cluster: what is resampled as a whole: the patient where it is known, else the image.
        values: name -> number. A metric leaves out rows that lack one of its columns.
        groups: name -> group, such as ``{"source": "deeplesion"}``.
    """

    id: str
    cluster: str
    values: Mapping[str, float]
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A number that a benchmark reports.

    Attributes:
        name: unique within the benchmark. ``accuracy/deeplesion`` is the metric ``accuracy`` of one group.
        statistic: of the columns in ``of``, each an array [n] over the rows; NaN where it is undefined.
        of: columns that it reads: names of values (float64) or of groups. A group's names become the numbers 0, 1, ... in
            alphabetical order.
        where: groups that a row must belong to.
    """

    name: str
    statistic: Statistic
    of: tuple[str, ...]
    where: Mapping[str, str] = field(default_factory=dict)

    def takes(self, row: Row) -> bool:
        """Whether the row has all columns and belongs to the groups."""
        has_columns = all(name in row.values or name in row.groups for name in self.of)
        return has_columns and all(row.groups.get(name) == group for name, group in self.where.items())


def mean(column: str) -> Statistic:
    """Statistic: the mean of a column."""
    return lambda columns: float(columns[column].mean())


def ratio(counted: str, of: str) -> Statistic:
    """Statistic: the sum of one column over the sum of another; NaN if that is 0."""
    return lambda columns: float(columns[counted].sum() / total) if (total := columns[of].sum()) else float("nan")


def mean_of_groups(column: str, group: str) -> Statistic:
    """Statistic: the unweighted mean of the groups' means; every group that has rows weighs the same."""

    def statistic(columns: Columns) -> float:
        import numpy as np

        counts = np.bincount(columns[group])
        present = counts > 0  # a draw may miss a group
        sums = np.bincount(columns[group], weights=columns[column])
        return float((sums[present] / counts[present]).mean())

    return statistic


def means(*names: str, where: Mapping[str, str] | None = None) -> list[Metric]:
    """Metrics that are the means of the columns of the same names."""
    return [Metric(name, mean(name), (name,), where or {}) for name in names]


def by_group(metric: Metric, group: str, rows: Iterable[Row]) -> list[Metric]:
    """The same metric for each group that has rows, in alphabetical order, named ``metric/group``."""
    names = sorted({row.groups[group] for row in rows if group in row.groups and metric.takes(row)})
    return [
        Metric(f"{metric.name}/{name}", metric.statistic, metric.of, {**metric.where, group: name}) for name in names
    ]


def measure(metrics: Sequence[Metric], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """``{metric: {"value", "ci95": [low, high], "n"}}``, n being the rows that count; value and interval are None without any.

    Example:
        >>> rows = [Row("q1", "scan1", {"accuracy": 1.0}), Row("q2", "scan2", {"accuracy": 0.0})]
        >>> measure(means("accuracy"), rows)
        {'accuracy': {'value': 0.5, 'ci95': [0.0, 1.0], 'n': 2}}
    """
    results: dict[str, dict[str, Any]] = {metric.name: {"value": None, "ci95": None, "n": 0} for metric in metrics}
    for sharing, indices in _grouped_by_rows(metrics, rows):
        chosen_rows = [rows[index] for index in indices]
        columns = [_columns(metric, chosen_rows) for metric in sharing]
        resampled: list[list[float]] = [[] for _ in sharing]
        for draw in _draws([row.cluster for row in chosen_rows]):
            for metric, own, values in zip(sharing, columns, resampled):
                values.append(metric.statistic(_take(own, draw)))
        for metric, own, values in zip(sharing, columns, resampled):
            value = _number(metric.statistic(own))
            results[metric.name] = {"value": value, "ci95": _interval(values), "n": len(indices)}
    return results


def _grouped_by_rows(metrics: Sequence[Metric], rows: Sequence[Row]) -> Iterable[tuple[list[Metric], list[int]]]:
    """Metrics that take the same rows, so that these are drawn only once, with the indices of these rows."""
    groups: dict[bytes, list[Metric]] = {}
    for metric in metrics:
        taken = bytes(metric.takes(row) for row in rows)
        if any(taken):
            groups.setdefault(taken, []).append(metric)
    for taken, sharing in groups.items():
        yield sharing, [index for index, is_taken in enumerate(taken) if is_taken]


def compare_rows(metrics: Sequence[Metric], before: Sequence[Row], after: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Paired differences ``after - before``: ``{metric: {"difference", "ci95", "n"}}``.

    Raises:
        UmedError: the two did not answer the same questions.
    """
    earlier = {row.id: row for row in before}
    if len(earlier) != len(before) or sorted(earlier) != sorted(row.id for row in after):
        raise UmedError(
            f"the two evaluations were not asked the same questions ({len(before)} and {len(after)} of them), so they cannot "
            "be compared pair by pair. Evaluate both with the same benchmark, split and limit."
        )
    results: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        pairs = [(earlier[row.id], row) for row in after if metric.takes(row) and metric.takes(earlier[row.id])]
        if not pairs:
            results[metric.name] = {"difference": None, "ci95": None, "n": 0}
            continue
        # Groups are those of the question, the same in both runs.
        old, new = (_columns(metric, rows) for rows in zip(*pairs))
        resampled = [
            metric.statistic(_take(new, draw)) - metric.statistic(_take(old, draw))
            for draw in _draws([row.cluster for _, row in pairs])
        ]
        difference = metric.statistic(new) - metric.statistic(old)
        results[metric.name] = {"difference": _number(difference), "ci95": _interval(resampled), "n": len(pairs)}
    return results


def _columns(metric: Metric, rows: Sequence[Row]) -> Columns:
    import numpy as np

    columns: dict[str, np.ndarray] = {}
    for name in metric.of:
        if name in rows[0].values:
            columns[name] = np.array([row.values[name] for row in rows])
        else:
            _, columns[name] = np.unique([row.groups[name] for row in rows], return_inverse=True)
    return columns


def _take(columns: Columns, draw: np.ndarray) -> Columns:
    return {name: column[draw] for name, column in columns.items()}


def _draws(clusters: Sequence[str]) -> Iterable[np.ndarray]:
    """Row indices of each draw: as many clusters as there are, with replacement, each with all of its rows."""
    import numpy as np

    generator = np.random.default_rng(0)
    _, cluster_of_row = np.unique(np.asarray(clusters), return_inverse=True)
    # The rows of cluster c stand in `order` from starts[c] on, sizes[c] of them.
    order = np.argsort(cluster_of_row, kind="stable")
    sizes = np.bincount(cluster_of_row)
    starts = np.cumsum(sizes) - sizes
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, len(sizes), len(sizes))
        # All rows of the drawn clusters without a loop: each cluster's start, repeated, plus 0, 1, ... within the cluster.
        lengths = sizes[drawn]
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        yield order[np.repeat(starts[drawn], lengths) + within]


def _interval(resampled: Sequence[float]) -> list[float] | None:
    import numpy as np

    values = np.asarray(resampled, dtype=float)
    if np.isnan(values).mean() > MAX_UNDEFINED:
        return None
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def _number(value: float) -> float | None:
    return None if value != value else float(value)
