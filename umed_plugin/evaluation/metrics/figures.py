"""Figures over scored questions: a value, how many questions it rests on, and its 95 % bootstrap interval.

A question that was asked and scored is a `Row` of named numbers and of groups that it belongs to. A `Figure` is a pure function
of some of these columns. Intervals are percentile bootstrap intervals (Efron 1979) with a fixed generator: the same answers give
the same interval. What is drawn is not the question but its cluster, which is the image: several questions about one image are
not independent, and drawing them one by one would make intervals too narrow (Field and Welsh 2007).

Two runs are compared pair by pair: both are computed on the same draws, so what is common to them cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from umed_plugin.errors import UmedError

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
# A figure that needs what is rare (both classes of an AUC) is undefined on some draws; with more of them there is no interval.
MOST_UNDEFINED = 0.05

Columns = Mapping[str, "np.ndarray"]
Statistic = Callable[[Columns], float]


@dataclass(frozen=True)
class Row:
    """One question, scored.

    Attributes:
        id: of the question, unique within a run.
        cluster: what is drawn as a whole: the image, or the patient.
        values: name -> number; a figure leaves out rows that lack one of its columns.
        groups: name -> group, such as ``{"source": "deeplesion"}``.
    """

    id: str
    cluster: str
    values: Mapping[str, float]
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A number that a benchmark reports.

    Attributes:
        name: unique within the benchmark; ``accuracy/deeplesion`` is the figure ``accuracy`` of a group.
        statistic: of the columns in ``of``, each an array [n] over the rows; NaN where it is not defined.
        of: columns that it reads: names of values (float64), or of groups, which it sees as numbers from 0 in the order of
            their names.
        where: groups that a row must belong to.
    """

    name: str
    statistic: Statistic
    of: tuple[str, ...]
    where: Mapping[str, str] = field(default_factory=dict)

    def takes(self, row: Row) -> bool:
        """Whether the row has all columns and belongs to the groups."""
        there = all(name in row.values or name in row.groups for name in self.of)
        return there and all(row.groups.get(name) == group for name, group in self.where.items())


def mean(column: str) -> Statistic:
    """Statistic: the mean of a column."""
    return lambda columns: float(columns[column].mean())


def ratio(counted: str, of: str) -> Statistic:
    """Statistic: the sum of one column over the sum of another; NaN when that is 0."""
    return lambda columns: float(columns[counted].sum() / total) if (total := columns[of].sum()) else float("nan")


def mean_of_groups(column: str, group: str) -> Statistic:
    """Statistic: the plain mean, over the groups that are there, of each group's mean: every group weighs the same."""

    def statistic(columns: Columns) -> float:
        import numpy as np

        counts = np.bincount(columns[group])
        there = counts > 0  # a draw may leave out a group
        sums = np.bincount(columns[group], weights=columns[column])
        return float((sums[there] / counts[there]).mean())

    return statistic


def means(*names: str, where: Mapping[str, str] | None = None) -> list[Figure]:
    """Figures that are the means of the columns of the same names."""
    return [Figure(name, mean(name), (name,), where or {}) for name in names]


def by_group(figure: Figure, group: str, rows: Iterable[Row]) -> list[Figure]:
    """The same figure for each group that there is, in alphabetical order, named ``figure/group``."""
    found = sorted({row.groups[group] for row in rows if group in row.groups and figure.takes(row)})
    return [
        Figure(f"{figure.name}/{name}", figure.statistic, figure.of, {**figure.where, group: name}) for name in found
    ]


def measure(figures: Sequence[Figure], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """``{figure: {"value", "ci95": [low, high], "n"}}``; value and interval are None where no row answers the figure."""
    found: dict[str, dict[str, Any]] = {one.name: {"value": None, "ci95": None, "n": 0} for one in figures}
    for together, places in _same_rows(figures, rows):
        chosen_rows = [rows[place] for place in places]
        columns = [_columns(figure, chosen_rows) for figure in together]
        drawn: list[list[float]] = [[] for _ in together]
        for chosen in _draws([row.cluster for row in chosen_rows]):
            for figure, mine, values in zip(together, columns, drawn):
                values.append(figure.statistic(_take(mine, chosen)))
        for figure, mine, values in zip(together, columns, drawn):
            value = _number(figure.statistic(mine))
            found[figure.name] = {"value": value, "ci95": _interval(values), "n": len(places)}
    return found


def _same_rows(figures: Sequence[Figure], rows: Sequence[Row]) -> Iterable[tuple[list[Figure], list[int]]]:
    """Figures that take the same rows, which are drawn once for them, with the places of these rows."""
    groups: dict[bytes, list[Figure]] = {}
    for figure in figures:
        taken = bytes(figure.takes(row) for row in rows)
        if any(taken):
            groups.setdefault(taken, []).append(figure)
    for taken, together in groups.items():
        yield together, [place for place, here in enumerate(taken) if here]


def compare_rows(figures: Sequence[Figure], before: Sequence[Row], after: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Paired differences ``after - before``: ``{figure: {"difference", "ci95", "n"}}``.

    Raises:
        UmedError: the two did not answer the same questions.
    """
    earlier = {row.id: row for row in before}
    if len(earlier) != len(before) or sorted(earlier) != sorted(row.id for row in after):
        raise UmedError(
            "the two evaluations were not asked the same questions, so they cannot be compared pair by pair "
            f"({len(before)} and {len(after)} of them). Evaluate both with the same benchmark, split and limit."
        )
    result: dict[str, dict[str, Any]] = {}
    for figure in figures:
        pairs = [(earlier[row.id], row) for row in after if figure.takes(row) and figure.takes(earlier[row.id])]
        if not pairs:
            result[figure.name] = {"difference": None, "ci95": None, "n": 0}
            continue
        # Groups are those of the question, the same in both runs.
        old, new = (_columns(figure, rows) for rows in zip(*pairs))
        drawn = [
            figure.statistic(_take(new, chosen)) - figure.statistic(_take(old, chosen))
            for chosen in _draws([row.cluster for _, row in pairs])
        ]
        difference = figure.statistic(new) - figure.statistic(old)
        result[figure.name] = {"difference": _number(difference), "ci95": _interval(drawn), "n": len(pairs)}
    return result


def _columns(figure: Figure, rows: Sequence[Row]) -> Columns:
    import numpy as np

    columns: dict[str, np.ndarray] = {}
    for name in figure.of:
        if name in rows[0].values:
            columns[name] = np.array([row.values[name] for row in rows])
        else:
            _, columns[name] = np.unique([row.groups[name] for row in rows], return_inverse=True)
    return columns


def _take(columns: Columns, chosen: np.ndarray) -> Columns:
    return {name: column[chosen] for name, column in columns.items()}


def _draws(clusters: Sequence[str]) -> Iterable[np.ndarray]:
    """Row indices of each draw: as many clusters as there are, with replacement, each with all of its rows."""
    import numpy as np

    generator = np.random.default_rng(0)
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    order = np.argsort(place, kind="stable")
    sizes = np.bincount(place)
    starts = np.cumsum(sizes) - sizes
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, len(sizes), len(sizes))
        lengths = sizes[drawn]
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        yield order[np.repeat(starts[drawn], lengths) + within]


def _interval(drawn: Sequence[float]) -> list[float] | None:
    import numpy as np

    values = np.asarray(drawn, dtype=float)
    if np.isnan(values).mean() > MOST_UNDEFINED:
        return None
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def _number(value: float) -> float | None:
    return None if value != value else float(value)


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """95 % percentile bootstrap interval of the mean; of one value, or of equal values, the value twice."""
    import numpy as np
    from scipy.stats import bootstrap

    if not values:
        return None
    if len(set(values)) == 1:
        return [float(values[0])] * 2
    sample = np.asarray(values, dtype=float)
    found = bootstrap(
        (sample,), np.mean, n_resamples=RESAMPLES, method="percentile", random_state=np.random.default_rng(0)
    ).confidence_interval
    return [float(found.low), float(found.high)]
