"""Vision towers of which there is no more than a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What the config.json of CLIP ViT-L/14 says, with the values that transformers leaves out: image_size is 224.
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LARGE |= {"patch_size": 14}


def cache_tower(cache: Path, name: str, **changes: Any) -> Path:
    """Put a config.json where the Hugging Face Hub's client caches it, and return the file."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0123abc")
    file = place / "snapshots" / "0123abc" / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"model_type": "clip", "vision_config": LARGE, **changes}))
    return file
