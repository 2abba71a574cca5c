"""Paired differences of the tables that pool studies of several seeds, with the project's own interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from umed_plugin.evaluation.metrics.metric import Row, means, measure


def differences(key: str, before: Iterable[Row], after: Iterable[Row], seed: object = "") -> list[Row]:
    """``after - before`` of a metric, for each study that has it in both, in the order of ``before``.

    Args:
        key: of the metric in `Row.values`.
        before, after: scored studies, joined by their ids.
        seed: of the studies. Those of different seeds have the same ids and patients, and are others.
    """
    later = {row.id: row.values for row in after}
    return [
        Row(f"{seed}/{row.id}", f"{seed}/{row.cluster}", {"difference": later[row.id][key] - row.values[key]})
        for row in before
        if key in row.values and key in later.get(row.id, {})
    ]


def mean_difference(rows: Sequence[Row]) -> tuple[float | None, list[float] | None]:
    """Mean of `differences`, and its 95 % interval, which resamples patients (where they are unknown: images).

    None in place of the interval if there are too few of them.
    """
    found: dict[str, Any] = measure(means("difference", limits=(-1.0, 1.0)), rows)["difference"]
    return found["value"], found["ci95"]
