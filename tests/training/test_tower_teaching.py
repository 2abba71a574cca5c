"""The tower learns from its teacher what a linear map of its features could not say before, on images that it has not seen."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from support.llava_models import load
from support.sam_files import sam_encoder

from umed_plugin.evaluation.metrics.metric import Row, means, measure
from umed_plugin.model.tower_teacher import TowerTeacher
from umed_plugin.training.tower_teaching import TowerTeachingLoss
from umed_plugin.training.trained_tower import unfreeze_tower

IMAGES, HELD_OUT, STEPS, BATCH = 64, 24, 120, 16


def images(count: int) -> torch.Tensor:
    """Squares of 64 px with soft shapes and texture."""
    shuffle = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 6, 6, generator=shuffle)
    shapes = torch.nn.functional.interpolate(coarse, size=64, mode="bicubic", align_corners=False)
    return shapes + 0.3 * torch.randn(count, 3, 64, 64, generator=shuffle)


def varied_encoder():
    """A SAM encoder with random weights whose features differ from place to place: no biases, plain norms."""
    encoder = sam_encoder()
    for name, parameter in encoder.named_parameters():
        if "layer_norm" in name:
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
        elif name.endswith("bias") or name == "pos_embed":
            torch.nn.init.zeros_(parameter)
    return encoder


@torch.no_grad()
def cosines(tower, targets: torch.Tensor, pixels: torch.Tensor) -> list[float]:
    """Of each held-out image, behind the linear map that fits the others best."""
    features = torch.cat([tower(pixels), torch.ones(len(pixels), targets.shape[1], 1)], dim=-1)
    seen, theirs = (part[HELD_OUT:].flatten(0, 1).double() for part in (features, targets))
    onto = torch.linalg.lstsq(seen, theirs).solution.float()
    mapped = features[:HELD_OUT] @ onto
    return torch.nn.functional.cosine_similarity(mapped, targets[:HELD_OUT], dim=-1).mean(dim=1).tolist()


@pytest.mark.run
def test_the_cosine_of_held_out_images_rises(tiny_mistral):
    _, model = load(tiny_mistral)
    tower = model.get_vision_tower()
    tower.forward = partial(CLIPVisionTower.forward.__wrapped__, tower)  # as `patches/vision_tower.py` does
    unfreeze_tower(model)
    processor = tower.image_processor
    teacher = TowerTeacher(varied_encoder(), processor.image_mean, processor.image_std)
    loss, pixels = TowerTeachingLoss(model, teacher, 1.0, seed=0), images(IMAGES + HELD_OUT)
    targets = teacher.features(pixels, tower.num_patches_per_side)
    before = cosines(tower, targets, pixels)
    optimizer = torch.optim.Adam([p for p in tower.parameters() if p.requires_grad], lr=1e-3)
    shuffle = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        chosen = HELD_OUT + torch.randperm(IMAGES, generator=shuffle)[:BATCH]
        inputs = {"images": pixels[chosen], "input_ids": torch.full((BATCH, 1), -200)}
        with loss.watching(inputs):
            loss.before_pass(inputs)
            tower(inputs["images"])
            loss.added_to(torch.zeros(()), None).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.after_step()
    after = cosines(tower, targets, pixels)
    rows = [Row(str(i), str(i), {"rise": new - old}) for i, (old, new) in enumerate(zip(before, after))]
    rise = measure(means("rise"), rows)["rise"]
    print(
        f"held-out cosine {sum(before) / HELD_OUT:.3f} -> {sum(after) / HELD_OUT:.3f}, {rise['value']:+.3f} {rise['ci95']}"
    )
    assert rise["ci95"][0] > 0.02
    told = loss.metrics(list)
    assert 0 < told["tower_cosine"] < 1 and loss.metrics(list) == {}
