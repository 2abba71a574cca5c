"""Metrics over scored questions: value, number of questions, and 95 % confidence interval.

A question that was answered and scored is a `Row` of named numbers and of the groups that it belongs to. A `Metric` is a pure
function of some of these columns.

Intervals are percentile bootstrap confidence intervals (Efron 1979). The generator has a fixed seed, so the same answers give
the same interval. Resampling draws clusters, not questions: the patient where it is known, else the image. Questions about one
image, and slices of one patient, are not independent; drawing them one by one would make intervals too narrow (Field and
Welsh 2007).

Where every draw gives the same value, as for a rate of 0 or 1, the bootstrap cannot give an interval: it has no width, however
few questions there were. There the interval is exact (Clopper and Pearson 1934), counted in clusters. It holds for every mean of
values within known limits: if n clusters all score 0, the chance of another score is below 1 - 0.025^(1/n).

Below `FEWEST` clusters there is no bootstrap interval. Below `FEW` it covers the true value less often than 95 %, and whoever
shows it says so (`umed_plugin.evaluation.tables.interval_notes`).

Two runs are compared pair by pair: both are resampled with the same draws, so what they have in common cancels out.

This is the only place that computes intervals: `umed evaluate`, `report`, `upgrade`, `demo` and the benchmarks all show these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from umed_plugin.errors import UmedError

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
# A metric that needs rare rows (both classes of an AUC) is undefined on some draws. Above this share it gets no interval.
MAX_UNDEFINED = 0.05
FEWEST, FEW = 5, 30  # clusters
# How an interval was computed, or why there is none.
BOOTSTRAP, EXACT, TOO_FEW, UNDEFINED = "bootstrap", "exact", "too few", "undefined"

RATE = (0.0, 1.0)  # limits of a share, an IoU, a score of 0-1

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
        limits: the least and the greatest value that a question can have, if the statistic is a mean of the questions; an exact
            interval needs them.
        lower_is_better: whether a positive difference is for the worse.
        rates: whether it can be computed for any answer, and rates it. False if it only describes answers, such as how often the
            last choice is taken, or comes from a file of scores.
    """

    name: str
    statistic: Statistic
    of: tuple[str, ...]
    where: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[float, float] | None = None
    lower_is_better: bool = False
    rates: bool = True

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


def means(
    *names: str, where: Mapping[str, str] | None = None, limits: tuple[float, float] | None = RATE
) -> list[Metric]:
    """Metrics that are the means of the columns of the same names, whose values are within ``limits``."""
    return [Metric(name, mean(name), (name,), where or {}, limits) for name in names]


def by_group(metric: Metric, group: str, rows: Iterable[Row]) -> list[Metric]:
    """The same metric for each group that has rows, in alphabetical order, named ``metric/group``."""
    names = sorted({row.groups[group] for row in rows if group in row.groups and metric.takes(row)})
    return [replace(metric, name=f"{metric.name}/{name}", where={**metric.where, group: name}) for name in names]


def measure(metrics: Sequence[Metric], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """``{metric: {"value", "ci95": [low, high], "n", "units", "interval"}}``.

    ``n`` rows count, of ``units`` clusters; in a ratio, of those whose denominator is not 0. ``interval`` is ``bootstrap`` or
    ``exact``; or the reason why ``ci95`` is None: ``too few`` clusters, or ``undefined``, where too many draws have no value or
    all have the same. ``value`` is None without any row. A metric of which less is better has ``lower_is_better``.

    Example:
        >>> rows = [Row(str(i), f"scan{i}", {"accuracy": 1.0}) for i in range(8)]
        >>> measure(means("accuracy"), rows)
        {'accuracy': {'value': 1.0, 'ci95': [0.6305834261220803, 1.0], 'n': 8, 'units': 8, 'interval': 'exact'}}
    """
    results = {metric.name: _result(metric, "value", None, None, UNDEFINED, 0, 0) for metric in metrics}
    for sharing, indices in _grouped_by_rows(metrics, rows):
        chosen_rows = [rows[index] for index in indices]
        clusters = [row.cluster for row in chosen_rows]
        columns = [_columns(metric, chosen_rows) for metric in sharing]
        resampled: list[list[float]] = [[] for _ in sharing]
        for draw in _draws(clusters):
            for metric, own, values in zip(sharing, columns, resampled):
                values.append(metric.statistic(_take(own, draw)))
        for metric, own, values in zip(sharing, columns, resampled):
            value, units = _number(metric.statistic(own)), _defined_clusters(metric, own, clusters)
            found = _interval(value, values, units, metric.limits)
            results[metric.name] = _result(metric, "value", value, *found, len(indices), units)
    return results


def statistics(metrics: Sequence[Metric], rows: Sequence[Row]) -> dict[str, float | None]:
    """The value of each metric as `measure` gives it, without an interval; None where it is undefined."""
    return {
        metric.name: _number(metric.statistic(_columns(metric, [rows[index] for index in indices])))
        for sharing, indices in _grouped_by_rows(metrics, rows)
        for metric in sharing
    }


def _result(
    metric: Metric, what: str, value: float | None, ci95: list[float] | None, interval: str, n: int, units: int
) -> dict[str, Any]:
    """One entry of what `measure` and `compare_rows` return."""
    entry: dict[str, Any] = {what: value, "ci95": ci95, "n": n, "units": units, "interval": interval}
    return {**entry, "lower_is_better": True} if metric.lower_is_better else entry


def _grouped_by_rows(metrics: Sequence[Metric], rows: Sequence[Row]) -> Iterable[tuple[list[Metric], list[int]]]:
    """Metrics that take the same rows, so that these are drawn only once, with the indices of these rows."""
    groups: dict[bytes, list[Metric]] = {}
    for metric in metrics:
        taken = bytes(metric.takes(row) for row in rows)
        if any(taken):
            groups.setdefault(taken, []).append(metric)
    for taken, sharing in groups.items():
        yield sharing, [index for index, is_taken in enumerate(taken) if is_taken]


def with_shared_groups(before: Sequence[Row], after: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of two evaluations, each with the groups that the question has in the other one alone.

    A group is of the question. One side lacks it if its recipe names no such group, such as what ``hold_out`` holds out. A row
    that is of two different groups keeps its own on each side, and counts for neither.
    """

    def completed(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
        known = {row.id: row.groups for row in others}
        return [replace(row, groups={**known.get(row.id, {}), **row.groups}) for row in rows]

    return completed(before, after), completed(after, before)


def compare_rows(metrics: Sequence[Metric], before: Sequence[Row], after: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Paired differences ``after - before``: ``{metric: {"difference", "ci95", "n", "units", "interval"}}``, as in `measure`.

    Raises:
        UmedError: the two did not answer the same questions.
    """
    earlier = {row.id: row for row in before}
    if len(earlier) != len(before) or sorted(earlier) != sorted(row.id for row in after):
        raise UmedError(
            f"the two evaluations were not asked the same questions ({len(before)} and {len(after)} of them), so they cannot "
            "be compared pair by pair. Evaluate both with the same benchmark, split and limit."
        )
    results = {metric.name: _result(metric, "difference", None, None, UNDEFINED, 0, 0) for metric in metrics}
    pairs = [(earlier[row.id], row) for row in after]
    groups: dict[bytes, list[Metric]] = {}
    for metric in metrics:
        taken = bytes(metric.takes(row) and metric.takes(old) for old, row in pairs)
        if any(taken):
            groups.setdefault(taken, []).append(metric)
    for taken, sharing in groups.items():
        results.update(_compared(sharing, [pair for pair, is_taken in zip(pairs, taken) if is_taken]))
    return results


def _compared(sharing: Sequence[Metric], pairs: Sequence[tuple[Row, Row]]) -> dict[str, dict[str, Any]]:
    """The differences of metrics that take the same (before, after) pairs, so that these are drawn only once."""
    clusters = [row.cluster for _, row in pairs]
    # Groups are those of the question, the same in both runs.
    columns = [tuple(_columns(metric, rows) for rows in zip(*pairs)) for metric in sharing]
    resampled: list[list[float]] = [[] for _ in sharing]
    for draw in _draws(clusters):
        for metric, (old, new), values in zip(sharing, columns, resampled):
            values.append(metric.statistic(_take(new, draw)) - metric.statistic(_take(old, draw)))
    results: dict[str, dict[str, Any]] = {}
    for metric, (old, new), values in zip(sharing, columns, resampled):
        difference = _number(metric.statistic(new) - metric.statistic(old))
        span = None if metric.limits is None else metric.limits[1] - metric.limits[0]
        units = min(_defined_clusters(metric, side, clusters) for side in (old, new))
        found = _interval(difference, values, units, None if span is None else (-span, span))
        results[metric.name] = _result(metric, "difference", difference, *found, len(pairs), units)
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
    order, starts, sizes = _rows_of_clusters(clusters)
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, len(sizes), len(sizes))
        # All rows of the drawn clusters without a loop: each cluster's start, repeated, plus 0, 1, ... within the cluster.
        lengths = sizes[drawn]
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        yield order[np.repeat(starts[drawn], lengths) + within]


def _rows_of_clusters(clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row indices in the order of the clusters; where each cluster starts there; and how many rows it has."""
    import numpy as np

    _, cluster_of_row = np.unique(np.asarray(clusters), return_inverse=True)
    sizes = np.bincount(cluster_of_row)
    return np.argsort(cluster_of_row, kind="stable"), np.cumsum(sizes) - sizes, sizes


def _interval(
    value: float | None, resampled: Sequence[float], units: int, limits: tuple[float, float] | None
) -> tuple[list[float] | None, str]:
    """The 95 % interval of a number from so many clusters, and how it was computed or why there is none."""
    import numpy as np

    values = np.asarray(resampled, dtype=float)
    if value is None or np.isnan(values).mean() > MAX_UNDEFINED:
        return None, UNDEFINED
    # Equal up to rounding of the sums.
    without_width = float(np.nanmax(values) - np.nanmin(values)) < 1e-9
    if without_width and limits is not None and min(abs(value - mark) for mark in (*limits, 0.0)) < 1e-9:
        return _exact(value, limits, max(units, 1)), EXACT
    if units < FEWEST:
        return None, TOO_FEW
    if without_width:
        return None, UNDEFINED
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(low), float(high)], BOOTSTRAP


def _exact(value: float, limits: tuple[float, float], units: int) -> list[float]:
    """The interval of a mean where all of ``units`` independent values are ``value``, which is 0 or one of the ``limits``.

    Another value has a probability of at most 1 - 0.025^(1/units), and is at worst one of the limits.
    """
    other = 1 - 0.025 ** (1 / units)
    low, high = (value * (1 - other) + limit * other for limit in limits)
    return [max(low, limits[0]), min(high, limits[1])]


def _defined_clusters(metric: Metric, columns: Columns, clusters: Sequence[str]) -> int:
    """Number of clusters that say something about the metric: in a ratio, those whose denominator is not 0.

    A difference of two ratios has as many units as the one with fewer, also where these are other clusters than the other's.
    Only of means and ratios, which have limits, a cluster alone can be asked. An AUC needs several.
    """
    import numpy as np

    order, starts, _ = _rows_of_clusters(clusters)
    if metric.limits is None:
        return len(starts)
    rows_of = np.split(order, starts[1:])
    return sum(_number(metric.statistic(_take(columns, rows))) is not None for rows in rows_of)


def _number(value: float) -> float | None:
    return None if value != value else float(value)
