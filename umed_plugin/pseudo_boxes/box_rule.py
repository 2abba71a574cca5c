"""From an anomaly map to one box: the region around its peak."""

from __future__ import annotations

from typing import Optional

import numpy as np

from umed_plugin.grounding.boxes import Box

QUANTILE = 0.99  # of the map on normal images: the level above which a place stands out


def box_of(anomalies: np.ndarray, inside: np.ndarray, level: float, peak_share: float) -> tuple[Optional[Box], float]:
    """The box around the peak, and the peak's value.

    The box is the extent of the connected region (8 neighbours) around the peak in which the map is at least
    ``level + peak_share * (peak - level)``.

    Args:
        anomalies: the map, ``[S, S]`` in 0-1.
        inside: bool ``[S, S]``, False on padding, where no peak is looked for.
        level: of normal images, 0-1.
        peak_share: 0-1; the larger, the smaller the box.

    Returns:
        xyxy in 0-1 of the square, or None if nothing is above the level; the peak, 0-1.

    Example:
        >>> import numpy as np
        >>> from umed_plugin.pseudo_boxes.box_rule import box_of
        >>> map_ = np.full((8, 8), 0.2)
        >>> map_[2:4, 4:8] = 0.9
        >>> box_of(map_, np.ones((8, 8), bool), level=0.3, peak_share=0.5)
        ((0.5, 0.25, 1.0, 0.5), 0.9)
    """
    from scipy.ndimage import find_objects, label

    values = np.where(inside, anomalies, -1.0)
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    peak = float(values[row, column])
    if peak <= level:
        return None, max(peak, 0.0)
    regions, _ = label(values >= level + peak_share * (peak - level), structure=np.ones((3, 3)))
    rows, columns = find_objects(regions)[regions[row, column] - 1]
    height, width = values.shape
    return (columns.start / width, rows.start / height, columns.stop / width, rows.stop / height), peak
