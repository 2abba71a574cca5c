"""The parts of pseudo-boxes by hand: drawn anomalies, the map against a plain loop, the loss, and the box around a peak."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from umed_plugin.pseudo_boxes.anomaly_map import ABNORMAL, AnomalyMap, map_loss
from umed_plugin.pseudo_boxes.box_rule import box_of
from umed_plugin.pseudo_boxes.synthesis import BULGE, INTENSITY, KINDS, NOTHING, PASTE, Picture, anomaly

SIDE = 64


def pictures(count: int = 3, padding: int = 0) -> list[Picture]:
    rng = np.random.default_rng(5)
    inside = np.ones((SIDE, SIDE), bool)
    inside[:padding] = inside[SIDE - padding :] = False
    return [Picture(rng.random((SIDE, SIDE, 3)).astype(np.float32), inside) for _ in range(count)]


@pytest.mark.parametrize("kind", [PASTE, INTENSITY, BULGE])
def test_an_anomaly_changes_the_picture_where_it_says_and_nowhere_else(kind: str) -> None:
    normal, areas = pictures(padding=8), []
    for seed in range(40):
        image, changed = anomaly(np.random.default_rng(seed), normal, 0, [kind])
        assert image.dtype == np.float32 and image.shape == (SIDE, SIDE, 3)
        assert np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1
        assert (image[~changed] == normal[0].pixels[~changed]).all()
        assert not changed[:8].any() and not changed[-8:].any(), "nothing is drawn on padding"
        areas.append(changed.mean())
    assert np.mean(np.array(areas) > 0) > 0.9
    assert 0.005 < np.mean(areas) < 0.4
    again, _ = anomaly(np.random.default_rng(39), normal, 0, [kind])
    assert (again == image).all(), "the seed determines it"


def test_a_bulge_enlarges_the_middle_and_keeps_the_edge() -> None:
    rows = np.repeat(np.arange(SIDE, dtype=np.float32)[:, None] / SIDE, SIDE, axis=1)
    ramp = Picture(np.stack([rows] * 3, axis=-1), np.ones((SIDE, SIDE), bool))
    steeper = flatter = 0
    for seed in range(20):
        image, changed = anomaly(np.random.default_rng(seed), [ramp], 0, [BULGE])
        slope = np.abs(np.gradient(image[:, :, 0], axis=0))[changed] * SIDE
        flatter += int((slope < 0.7).sum())
        steeper += int((slope > 1.3).sum())
        lowest, highest = ramp.pixels[changed].min(), ramp.pixels[changed].max()
        assert image[changed].min() >= lowest - 0.05 and image[changed].max() <= highest + 0.05
    assert flatter > 500, "an enlarged ramp rises slowly in the middle"
    assert steeper > 500, "and steeply towards the edge"


def test_kinds_are_drawn_evenly_and_nothing_is_one_of_them() -> None:
    normal = pictures()
    unchanged = [not anomaly(np.random.default_rng(seed), normal, 0)[1].any() for seed in range(200)]
    assert 0.15 < np.mean(unchanged) < 0.37
    assert NOTHING in KINDS
    assert not any(anomaly(np.random.default_rng(seed), normal, 0, [NOTHING])[1].any() for seed in range(20))


def test_the_map_is_what_a_plain_loop_over_places_gives() -> None:
    torch.manual_seed(0)
    network, grid, side = AnomalyMap(width=6, depths=3).double(), 4, 12
    features = [torch.randn(2, grid * grid, 6, dtype=torch.float64) for _ in range(3)]
    maps = network(features, side).detach().numpy()
    towards = network.directions.detach().numpy()
    towards = towards / np.linalg.norm(towards, axis=1, keepdims=True)
    coarse = np.zeros((2, 2, grid, grid))
    for image in range(2):
        for place in range(grid * grid):
            for depth, adapter in enumerate(network.adapters):
                weight, bias = adapter.weight.detach().numpy(), adapter.bias.detach().numpy()
                token = weight @ features[depth][image, place].numpy() + bias
                for direction in range(2):
                    value = token @ towards[direction] / np.linalg.norm(token)
                    coarse[image, direction, place // grid, place % grid] += value / 3

    def at(values: np.ndarray, row: int, column: int) -> float:
        """Bilinear between the centres of patches; constant beyond them."""
        found = 0.0
        y, x = ((v + 0.5) * grid / side - 0.5 for v in (row, column))
        y, x = (min(max(v, 0.0), grid - 1.0) for v in (y, x))
        for i in (math.floor(y), min(math.floor(y) + 1, grid - 1)):
            for j in (math.floor(x), min(math.floor(x) + 1, grid - 1)):
                share = max(1 - abs(y - i), 0) * max(1 - abs(x - j), 0)
                found += (
                    share
                    * values[i, j]
                    / max((i == math.floor(y) == grid - 1) + 1, 1)
                    / ((j == math.floor(x) == grid - 1) + 1)
                )
        return found

    for image in range(2):
        for row in range(side):
            for column in range(side):
                both = np.exp([at(coarse[image, direction], row, column) for direction in range(2)])
                assert maps[image, ABNORMAL, row, column] == pytest.approx(both[1] / both.sum(), abs=1e-9)
    assert maps.min() > 0.119 and maps.max() < 0.881, "without a temperature"


def test_the_loss_is_0_for_a_perfect_map_and_grows_with_what_is_wrong() -> None:
    changed = torch.zeros(2, 8, 8)
    changed[0, 2:4, 2:4] = 1

    def loss(abnormal: torch.Tensor) -> float:
        return float(map_loss(torch.stack([1 - abnormal, abnormal], dim=1), changed))

    assert loss(changed) == pytest.approx(0, abs=1e-4)
    half = torch.full((2, 8, 8), 0.5)
    focal = -(0.5**2) * math.log(0.5 + 1e-5)
    dice = [1 - (2 * 0.5 * 4 + 1) / (32 + 4 + 1), 1 - 1 / (32 + 1)]
    assert loss(half) == pytest.approx(focal + sum(dice) / 2, abs=1e-6)
    assert loss(1 - changed) > loss(half)


def test_the_box_is_the_region_around_the_peak() -> None:
    values, inside = np.full((10, 20), 0.2), np.ones((10, 20), bool)
    values[2:5, 4:8] = 0.6
    values[3, 5] = 0.8
    values[7:9, 15:19] = 0.75
    box, score = box_of(values, inside, level=0.4, peak_share=0.4)
    assert (box, score) == ((0.2, 0.2, 0.4, 0.5), 0.8), "the other region is not part of it"
    assert box_of(values, inside, level=0.4, peak_share=1.0)[0] == (0.25, 0.3, 0.3, 0.4)
    assert box_of(values, inside, level=0.8, peak_share=0.5) == (None, 0.8)
    inside[:6] = False
    assert box_of(values, inside, level=0.4, peak_share=0.5) == ((0.75, 0.7, 0.95, 0.9), 0.75), "not on padding"
