"""The confidence interval of the tables that pool studies of several seeds."""

from __future__ import annotations

from collections.abc import Sequence

from umed_plugin.evaluation.metrics.metric import RESAMPLES


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """95 % percentile bootstrap interval of the mean of independent values, resampled one by one.

    One value, or equal values, give that value twice; no values give None.
    """
    import numpy as np
    from scipy.stats import bootstrap

    if not values:
        return None
    if len(set(values)) == 1:
        return [float(values[0])] * 2
    sample = np.asarray(values, dtype=float)
    interval = bootstrap(
        (sample,), np.mean, n_resamples=RESAMPLES, method="percentile", random_state=np.random.default_rng(0)
    ).confidence_interval
    return [float(interval.low), float(interval.high)]
