"""Resize images as LLaVA always has, with Pillow.

Target: `CLIPImageProcessor` in LLaVA's `clip_encoder`.
Why: under this name transformers 5 has a processor that resizes with torchvision, whose pixels differ slightly from Pillow's, and
falls back to Pillow with a warning where torchvision is missing. The tower and every checkpoint were trained on Pillow's.
Versions: LLaVA 1.2.x, transformers 5.
Delete when: LLaVA names the backend that it means.
"""

from __future__ import annotations

from umed_plugin.patches.training_run import LLAVA, ON_5, TRANSFORMERS_5

from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Rebind the name."""
    from llava.model.multimodal_encoder import clip_encoder
    from transformers import CLIPImageProcessorPil

    recorder.replace(clip_encoder, "CLIPImageProcessor", CLIPImageProcessorPil)


PATCH = Patch(
    name="image_processor",
    targets=(
        Target(
            "llava.model.multimodal_encoder.clip_encoder:CLIPVisionTower",
            LLAVA,
            ("c9a48b32051e29f766c7a01e03795bc5e77187cd2b74e759e08cf5fd283fc170",),
        ),
        Target("transformers:CLIPImageProcessorPil", TRANSFORMERS_5, ()),
    ),
    why="transformers 5 resizes images with torchvision where that is installed, which gives other pixels",
    delete_when="LLaVA names the image backend that it means",
    change=change,
    trigger="llava.model",
    needed=ON_5,
)
