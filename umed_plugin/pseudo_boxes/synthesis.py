"""Anomalies drawn into normal images: cut and paste, intensity, bulge, and none (MediCLIP, arXiv 2405.11315).

Sizes and strengths are MediCLIP's, in shares of the square's side instead of pixels of 224. Departures: the label of a pasted
region is 0 or 1 (MediCLIP's soft labels are nearly so, and its loss counts those below 1 as 0), and nothing is drawn on the
padding around an image that is not square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

PASTE, INTENSITY, BULGE, NOTHING = "paste", "intensity", "bulge", "nothing"
KINDS = (PASTE, INTENSITY, BULGE, NOTHING)
# Range of an anomaly's sides, as shares of the square's side.
_SIDES = {PASTE: (0.1, 0.6), INTENSITY: (0.3, 0.8), BULGE: (0.2, 0.6)}
_OF_224 = 1 / 224  # one pixel of MediCLIP's images, as a share of the side
_VISIBLE = 2 / 255  # a pixel that is changed by less looks as before


@dataclass(frozen=True)
class Picture:
    """An image as the tower sees it.

    Attributes:
        pixels: float32 RGB ``[S, S, 3]`` in 0-1.
        inside: bool ``[S, S]``, False on the padding.
    """

    pixels: np.ndarray
    inside: np.ndarray


@dataclass(frozen=True)
class Place:
    """Where an anomaly is drawn: a turned shape.

    Attributes:
        x, y: of its centre, in pixels.
        half: half of its width and of its height, in pixels.
        angle: by which it is turned, in radians.
    """

    x: float
    y: float
    half: tuple[float, float]
    angle: float

    def coordinates(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each pixel ``[S, S]`` along the shape's own axes, in units of its half sides."""
        y, x = np.mgrid[0:size, 0:size] + 0.5
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        along, across = (x - self.x) * cos + (y - self.y) * sin, (y - self.y) * cos - (x - self.x) * sin
        return along / self.half[0], across / self.half[1]


def anomaly(
    rng: Generator, pictures: Sequence[Picture], index: int, kinds: Sequence[str] = KINDS
) -> tuple[np.ndarray, np.ndarray]:
    """One normal image with one or two anomalies of a kind that is drawn evenly.

    Args:
        rng: determines everything.
        pictures: normal images of one size.
        index: of the one to draw into.
        kinds: to draw from.

    Returns:
        float32 RGB ``[S, S, 3]`` in 0-1, and bool ``[S, S]``, True where the image was changed.

    Example:
        >>> import numpy as np
        >>> from umed_plugin.pseudo_boxes.synthesis import Picture, anomaly
        >>> flat = Picture(np.full((64, 64, 3), 0.5, np.float32), np.ones((64, 64), bool))
        >>> image, changed = anomaly(np.random.default_rng(0), [flat, flat], 0, kinds=["intensity"])
        >>> bool(changed.any()), bool((image[~changed] == 0.5).all())
        (True, True)
    """
    picture = pictures[index]
    kind = kinds[int(rng.integers(len(kinds)))]
    image, changed = picture.pixels, np.zeros(picture.inside.shape, bool)
    if kind == NOTHING:
        return image, changed
    others = [other for number, other in enumerate(pictures) if number != index] or [picture]
    for _ in range(1 + int(rng.random() < 0.5)):
        place = _place(rng, picture.inside, _SIDES[kind])
        drawn, where = _DRAW[kind](rng, image, place, others)
        where = where & picture.inside
        image = np.where(where[:, :, None], drawn, image).astype(np.float32)
        changed |= where
    return image, changed


def _place(rng: Generator, inside: np.ndarray, sides: tuple[float, float]) -> Place:
    """A place with its centre on the picture. Sides are 0.03 + Gamma(2, 0.1) of the square's, within the range."""
    size = inside.shape[0]
    width, height = np.clip(0.03 + rng.gamma(2, 0.1, 2), *sides) * size
    rows, columns = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
    x = _between(rng, columns[0], columns[-1] + 1, width / 2)
    y = _between(rng, rows[0], rows[-1] + 1, height / 2)
    return Place(x, y, (width / 2, height / 2), float(rng.uniform(-np.pi / 2, np.pi / 2)))


def _between(rng: Generator, low: float, high: float, margin: float) -> float:
    """A coordinate at least ``margin`` from both ends, or the middle if there is no such."""
    low, high = low + margin, high - margin
    return float(rng.uniform(low, high)) if low < high else (low + high) / 2


def _paste(rng: Generator, image: np.ndarray, place: Place, others: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
    """A part of another normal image, turned by up to 45 degrees and scaled, in a shape of smooth noise."""
    from scipy.ndimage import binary_fill_holes, map_coordinates

    size = image.shape[0]
    source = others[int(rng.integers(len(others)))]
    angle, scale = rng.uniform(-np.pi / 4, np.pi / 4), 1 + rng.exponential(0.1)
    scale = scale if rng.random() < 0.5 else 1 / scale
    from_x, from_y = rng.uniform(0.2, 0.8, 2) * size
    y, x = np.mgrid[0:size, 0:size] + 0.5
    dx, dy = (x - place.x) / scale, (y - place.y) / scale
    cos, sin = np.cos(angle), np.sin(angle)
    at = [from_y + dx * sin + dy * cos - 0.5, from_x + dx * cos - dy * sin - 0.5]
    pasted = np.stack([map_coordinates(source.pixels[:, :, c], at, order=1, mode="reflect") for c in range(3)], axis=-1)
    shape = _ellipse(place, size) & (_smooth_noise(rng, size, sigma=0.04) > 0.4)
    seen = shape & (np.abs(pasted - image).max(-1) > _VISIBLE)
    return pasted, binary_fill_holes(seen)


def _intensity(
    rng: Generator, image: np.ndarray, place: Place, others: Sequence[Picture]
) -> tuple[np.ndarray, np.ndarray]:
    """A cloud that is brighter or darker by up to 0.4-0.6, with a soft edge."""
    from scipy.ndimage import gaussian_filter

    size = image.shape[0]
    sigma = (4, 7)[int(rng.integers(2))] * _OF_224 * size
    cloud = gaussian_filter((rng.random((size, size)) < 0.5).astype(np.float32), sigma)
    cloud = (cloud - cloud.min()) / max(float(np.ptp(cloud)), 1e-6)
    strength = rng.uniform(0.4, 0.6) * (1 if rng.random() < 0.5 else -1)
    shape = _ellipse(place, size) if rng.random() < 0.5 else _rectangle(place, size)
    soft = gaussian_filter(shape.astype(np.float32), rng.uniform(1, 4) * _OF_224 * size)
    drawn = np.clip(image + (strength * cloud * soft)[:, :, None], 0, 1)
    return drawn, shape & (np.abs(drawn - image).max(-1) > _VISIBLE)


def _bulge(rng: Generator, image: np.ndarray, place: Place, others: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
    """What lies around a point inside the shape swells: radius r shows what was at r^f / R^(f-1), R the distance to the edge.

    f is 2^U(0.5, 2), so the middle is enlarged and the edge stays where it is.
    """
    from scipy.ndimage import map_coordinates

    size = image.shape[0]
    f = 2 ** rng.uniform(0.5, 2)
    centre_u, centre_v = rng.uniform(-0.3, 0.3, 2)
    u, v = place.coordinates(size)
    du, dv = u - centre_u, v - centre_v
    elliptic = rng.random() < 0.5
    shape = (u**2 + v**2 < 1) if elliptic else (np.maximum(abs(u), abs(v)) < 1)
    # Share of the way from the centre to the edge, 0-1, along the ray through each pixel: both are in the shape's own units.
    share = _share_of_ray(du, dv, centre_u, centre_v, elliptic)
    factor = np.clip(share, 0, 1) ** (f - 1)
    old_u, old_v = centre_u + du * factor, centre_v + dv * factor
    cos, sin = np.cos(place.angle), np.sin(place.angle)
    along, across = old_u * place.half[0], old_v * place.half[1]
    at = [place.y + along * sin + across * cos - 0.5, place.x + along * cos - across * sin - 0.5]
    drawn = np.stack([map_coordinates(image[:, :, c], at, order=1, mode="nearest") for c in range(3)], axis=-1)
    return drawn, shape


def _share_of_ray(du: np.ndarray, dv: np.ndarray, cu: float, cv: float, elliptic: bool) -> np.ndarray:
    """r / R of each pixel: its distance from the centre over that of the edge on the same ray."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if elliptic:
            # |c + t d| = 1 for t > 0; the share is 1 / t.
            a, b, c = du**2 + dv**2, 2 * (cu * du + cv * dv), cu**2 + cv**2 - 1
            t = (-b + np.sqrt(b**2 - 4 * a * c)) / (2 * a)
        else:
            to_u = np.where(du > 0, (1 - cu) / du, np.where(du < 0, (-1 - cu) / du, np.inf))
            to_v = np.where(dv > 0, (1 - cv) / dv, np.where(dv < 0, (-1 - cv) / dv, np.inf))
            t = np.minimum(to_u, to_v)
        return np.nan_to_num(1 / t, nan=0.0, posinf=1.0)


def _ellipse(place: Place, size: int) -> np.ndarray:
    u, v = place.coordinates(size)
    return u**2 + v**2 < 1


def _rectangle(place: Place, size: int) -> np.ndarray:
    u, v = place.coordinates(size)
    return np.maximum(abs(u), abs(v)) < 1


def _smooth_noise(rng: Generator, size: int, sigma: float) -> np.ndarray:
    """Noise ``[S, S]`` in 0-1 whose patches are about ``sigma`` of the side wide."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(rng.random((size, size)), max(sigma * size, 0.5))
    return (noise - noise.min()) / max(float(np.ptp(noise)), 1e-9)


_Drawing = Callable[[Generator, np.ndarray, Place, Sequence[Picture]], tuple[np.ndarray, np.ndarray]]
_DRAW: dict[str, _Drawing] = {PASTE: _paste, INTENSITY: _intensity, BULGE: _bulge}
