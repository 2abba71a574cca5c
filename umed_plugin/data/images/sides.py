"""Which side of the patient lies at each edge of a shown slice: the letters R, L, A, P, S and I of a viewer."""

from __future__ import annotations

import numpy as np

from umed_plugin.data.images import canonical_orientation

# By patient axis (left, posterior, superior): the letters of its positive and of its negative direction.
_LETTERS = (("L", "R"), ("P", "A"), ("S", "I"))
_OBLIQUE = 0.35  # a second letter from about 20 degrees on

Edges = tuple[str, str, str, str]


def edge_letters(along_x: np.ndarray, along_y: np.ndarray) -> Edges:
    """Letters at the left, right, top and bottom edge of a slice that is shown in canonical orientation.

    An oblique slice has two letters at an edge, the nearer side first, as in ``RA``.

    Args:
        along_x, along_y: unit vectors of stored x and y in patient coordinates (left, posterior, superior).

    Example:
        >>> edge_letters(np.array([1.0, 0, 0]), np.array([0, 1.0, 0]))
        ('R', 'L', 'A', 'P')
    """
    turned = canonical_orientation(1, 1, along_x, along_y)
    right, down = (along_y, along_x) if turned.transpose else (along_x, along_y)
    right = -right if turned.flip_x else right
    down = -down if turned.flip_y else down
    return _letters(-right), _letters(right), _letters(-down), _letters(down)


def _letters(direction: np.ndarray) -> str:
    """The sides that a direction points to."""
    axes = sorted(range(3), key=lambda axis: -abs(direction[axis]))[:2]
    wanted = [axis for place, axis in enumerate(axes) if not place or abs(direction[axis]) >= _OBLIQUE]
    return "".join(_LETTERS[axis][int(direction[axis] < 0)] for axis in wanted)
