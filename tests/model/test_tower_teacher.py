"""A medical encoder as teacher of the tower: where a place lands in both grids, and the map between them."""

from __future__ import annotations

import pytest
import torch
from llava.mm_utils import expand2square
from PIL import Image
from support.sam_files import sam_encoder
from transformers import CLIPImageProcessor

from umed_plugin.model.tower_teacher import TowerTeacher, new_map, patch_cosine

SIDE = 8


class Brightness(torch.nn.Module):
    """In place of a SAM encoder: channel 0 is the mean pixel of each cell, whose receptive field is known."""

    def __init__(self, image_size: int, cells: int) -> None:
        super().__init__()
        self.config = type("Config", (), {"image_size": image_size, "output_channels": 1})
        self._cells = cells

    def forward(self, pixels: torch.Tensor):
        assert pixels.shape[-2:] == (self.config.image_size,) * 2
        grid = torch.nn.functional.adaptive_avg_pool2d(pixels.mean(dim=1, keepdim=True), self._cells)
        return type("Output", (), {"last_hidden_state": grid})


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_a_bright_square_lands_on_the_same_patch_in_both_grids(mode):
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    image = Image.new("RGB", (96, 64), "black")
    image.paste("white", (72, 24, 84, 36))
    if mode == "pad":  # else the processor cuts the middle out
        image = expand2square(image, tuple(int(x * 255) for x in processor.image_mean))
    pixels = processor.preprocess(image, return_tensors="pt")["pixel_values"]
    teacher = TowerTeacher(Brightness(128, 16), processor.image_mean, processor.image_std)
    theirs = teacher.features(pixels, SIDE)[0, :, 0]
    # The tower's own grid: the mean of each of its patches.
    ours = torch.nn.functional.adaptive_avg_pool2d(pixels.mean(dim=1, keepdim=True), SIDE).flatten()
    assert theirs.argmax() == ours.argmax()
    assert torch.corrcoef(torch.stack([theirs, ours]))[0, 1] > 0.95


def test_the_teacher_sees_its_own_normalisation():
    processor = CLIPImageProcessor()
    gray = torch.full((1, 3, 64, 64), 0.5)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    seen = []
    encoder = sam_encoder()
    encoder.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    features = TowerTeacher(encoder, processor.image_mean, processor.image_std).features((gray - mean) / std, 4)
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0][0, :, 5, 5], expected)
    assert features.shape == (1, 16, 12) and not features.requires_grad


def test_the_map_draws_nothing_from_the_random_state_and_can_be_right():
    before = torch.random.get_rng_state()
    onto = new_map(6, 4, seed=3)
    assert torch.equal(before, torch.random.get_rng_state()) and torch.equal(onto.weight, new_map(6, 4, 3).weight)
    features = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(patch_cosine(features, onto(features).detach() * 7, onto), torch.ones(2, 5))
