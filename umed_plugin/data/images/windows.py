"""From stored values to grey levels: the windows of DICOM PS3.3 C.11.2, presets, ranges, and three windows as RGB."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from umed_plugin.data.images.stored import StoredSlice, View
from umed_plugin.data.recipes.image_options import WINDOW_PRESETS, WindowRange
from umed_plugin.errors import UmedError, UsageError, unknown_name

_PART = 2**18  # pixels that are changed to grey levels at once
OneWindow = Union[str, WindowRange, tuple[float, float]]
# Three windows become the red, green and blue channel.
Window = Union[OneWindow, Sequence[OneWindow]]


@dataclass(frozen=True)
class LinearView:
    """Black up to ``low``, white from ``high`` on, linear between them."""

    low: float
    high: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if self.high <= self.low:
            return (values > self.low).astype(np.float32)
        return np.clip((values - np.float32(self.low)) / np.float32(self.high - self.low), 0, 1)


@dataclass(frozen=True)
class SigmoidView:
    """VOI LUT function SIGMOID (DICOM PS3.3 C.11.2.1.3.1): ``1 / (1 + exp(-4 (x - centre) / width))``."""

    centre: float
    width: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        # Beyond +-80 the result is 0 or 1 to the last bit, and the exponential could overflow.
        return 1 / (1 + np.exp(np.clip(-4 * (values - self.centre) / self.width, -80, 80)))


@dataclass(frozen=True)
class TableView:
    """A look-up table: ``entries[0]`` for values up to ``first``, then one entry per integer; 0-``maximum`` becomes 0-1."""

    first: int
    entries: np.ndarray
    maximum: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return look_up(values, self.first, self.entries) / np.float32(self.maximum)


def look_up(values: np.ndarray, first: int, entries: np.ndarray) -> np.ndarray:
    """The table's entries for the values: ``entries[0]`` for ``first`` and below, the last for all above. NaN stays NaN."""
    finite = np.isfinite(values)
    index = np.clip(np.rint(np.where(finite, values, 0)) - first, 0, len(entries) - 1).astype(np.int64)
    return np.where(finite, entries[index], np.float32(np.nan)).astype(np.float32)


def to_grey_levels(stored: StoredSlice, window: Window, path: Path) -> np.ndarray:
    """uint8 ``[height, width]`` of a slice, or ``[height, width, 3]`` when it is in colour or there are three windows."""
    if stored.is_grey_levels:
        return 255 - stored.values if stored.inverted else stored.values
    finite = np.isfinite(stored.values)
    if not finite.any():
        raise UmedError(f"{path}: has no finite value")
    shown = [_through(stored, finite, each, path) for each in each_window(window)]
    return shown[0] if len(shown) == 1 else np.stack(shown, axis=2)


def _through(stored: StoredSlice, finite: np.ndarray, window: OneWindow, path: Path) -> np.ndarray:
    view = _view(stored, finite, window, path)
    lowest = _least(stored.values, finite)
    grey = np.empty(stored.values.shape, np.uint8)
    rows = max(1, _PART // max(1, grey.shape[1]))
    # In parts: the numbers between values and grey levels would take ten times the memory of the values.
    for start in range(0, len(grey), rows):
        part, measured = stored.values[start : start + rows], finite[start : start + rows]
        shown = np.rint(view(np.where(measured, part, lowest)) * 255).astype(np.uint8)
        grey[start : start + rows] = np.where(measured, 255 - shown if stored.inverted else shown, 0)
    return grey


def _least(values: np.ndarray, finite: np.ndarray) -> np.floating[Any]:
    """The smallest of the finite values, of their type."""
    return np.min(values, where=finite, initial=np.inf)


def _view(stored: StoredSlice, finite: np.ndarray, window: OneWindow, path: Path) -> View:
    chosen = window_range(window)
    if chosen is not None:
        if isinstance(window, str) and not stored.hounsfield:
            raise UmedError(
                f"{path}: window {window!r} is in Hounsfield units, and this file says that it is not a CT. Allowed here: "
                "file, full, or a range in its own unit (image.window)."
            )
        return LinearView(*chosen)
    own = stored.view() if window == "file" else None
    if own is not None:
        return own
    return LinearView(float(_least(stored.values, finite)), float(np.max(stored.values, where=finite, initial=-np.inf)))


def range_of(stored: StoredSlice, window: OneWindow, path: Path) -> tuple[float, float]:
    """The values of a slice that become black and white: where a person who changes a window by hand begins.

    Of a file's sigmoid it is the range around its centre; of a look-up table, the slice's least and largest value.

    Raises:
        UmedError: the slice has no finite value, or the window is not for it.
    """
    finite = np.isfinite(stored.values)
    if not finite.any():
        raise UmedError(f"{path}: has no finite value")
    view = _view(stored, finite, window, path)
    if isinstance(view, LinearView):
        return view.low, view.high
    if isinstance(view, SigmoidView):
        return view.centre - view.width / 2, view.centre + view.width / 2
    return float(_least(stored.values, finite)), float(np.max(stored.values, where=finite, initial=-np.inf))


def each_window(window: Window) -> list[OneWindow]:
    """The windows as a list: of one, or of three for red, green and blue.

    Raises:
        UsageError: the value is not a window, or there is another number of them.
    """
    if isinstance(window, (str, WindowRange)):
        return [window]
    if len(window) == 2 and all(isinstance(bound, (int, float)) for bound in window):
        return [(float(window[0]), float(window[1]))]  # type: ignore[arg-type]
    if len(window) != 3 or any(isinstance(each, (int, float)) for each in window):
        raise UsageError(
            f"{window!r} is not a window. Allowed: a name, (low, high), or three windows for red, green, blue."
        )
    return list(window)


def plain_window(window: Window) -> Any:
    """The same window as JSON: names, and ``[low, high]`` for ranges."""
    if isinstance(window, str):
        return window
    plain = [each if isinstance(each, str) else list(window_range(each) or ()) for each in each_window(window)]
    return plain[0] if len(plain) == 1 else plain


def window_range(window: OneWindow) -> Optional[tuple[float, float]]:
    """``(low, high)`` of a preset or a range; None for ``file`` and ``full``, which depend on the image."""
    if isinstance(window, str) and window in ("file", "full"):
        return None
    if isinstance(window, str):
        if window not in WINDOW_PRESETS:
            raise UsageError(unknown_name("window", window, ["file", "full", *WINDOW_PRESETS]))
        centre, width = WINDOW_PRESETS[window]
        return centre - width / 2, centre + width / 2
    if isinstance(window, WindowRange):
        if window.low is not None and window.high is not None:
            return window.low, window.high
        if window.centre is not None and window.width is not None:
            return window.centre - window.width / 2, window.centre + window.width / 2
        raise ValueError(f"not a window: {window}")
    return float(window[0]), float(window[1])
