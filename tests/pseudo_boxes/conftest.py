"""A small CLIP tower, and chest-like pictures with and without a bright spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP vision tower with random weights, 32 pixels wide."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=32, patch_size=4)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """``labels.csv`` and images of two modalities: 6 normal ones and 4 with a bright spot of each; boxes in ``hidden.csv``."""
    return draw_studies(tmp_path / "studies")


def draw_studies(folder: Path, normal: int = 6, abnormal: int = 4) -> Path:
    (folder / "images").mkdir(parents=True)
    labels, hidden = ["file,label,patient,modality,x1,y1,x2,y2"], ["file,x1,y1,x2,y2"]
    for modality in ("CT", "X-ray"):
        for index in range(normal + abnormal):
            rng = np.random.default_rng([len(modality), index])
            pixels = rng.normal(90 if modality == "CT" else 120, 6, (48, 64))
            name, label = f"{modality}_{index}.png", ""
            if index >= normal:
                x, y = int(rng.integers(8, 40)), int(rng.integers(8, 28))
                pixels[y : y + 12, x : x + 14] += 80
                label = "nod"
                hidden.append(f"{name},{x},{y},{x + 14},{y + 12}")
            Image.fromarray(np.uint8(np.clip(pixels, 0, 255))).save(folder / "images" / name)
            labels.append(f"{name},{label},{modality}-{index},{modality},,,,")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    (folder / "hidden.csv").write_text("\n".join(hidden) + "\n")
    return folder
