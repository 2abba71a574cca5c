"""Build the vision tower as LLaVA's checkpoints hold it, and give it the images that it was trained on.

Targets: `CLIPVisionModel` and `CLIPImageProcessor` in LLaVA's `clip_encoder`.
Why: (1) transformers 5 has no ``vision_model`` level. It translates the names of a tower's own files, but not those of a tower
inside a LLaVA checkpoint: its weights would fit no tower, and those that training saves would be unknown to stock LLaVA.
(2) Unasked it loads the tower in the number format of its file, where transformers 4 took float32. (3) It resizes images
with torchvision where that is installed, and says so with a warning where it is not; its pixels differ slightly from those of
Pillow, on which every checkpoint was trained.
Versions: LLaVA 1.2.x, transformers 5.
Delete when: no LLaVA checkpoint with ``vision_model`` in its names is of interest.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.patches.full_precision import in_float32
from umed_plugin.patches.training_run import LLAVA, ON_5, TRANSFORMERS_5

from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Rebind both names."""
    from llava.model.multimodal_encoder import clip_encoder
    from transformers import CLIPImageProcessorPil

    recorder.replace(clip_encoder, "CLIPImageProcessor", CLIPImageProcessorPil)
    recorder.replace(clip_encoder, "CLIPVisionModel", _with_the_level(clip_encoder.CLIPVisionModel))


def _with_the_level(stock: Any) -> type:
    """The class with ``vision_model`` between itself and its layers."""

    class VisionModel(stock):
        """A class of its own: transformers translates the names of its own classes alone."""

    class CLIPVisionModel(stock.__base__):
        config_class = stock.config_class
        main_input_name = stock.main_input_name
        base_model_prefix = "vision_model"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.vision_model = VisionModel(config)
            self.post_init()

        def get_input_embeddings(self) -> Any:
            return self.vision_model.get_input_embeddings()

        def forward(self, pixel_values: Any = None, **keywords: Any) -> Any:
            return self.vision_model(pixel_values, **keywords)

        @classmethod
        def from_pretrained(cls, *args: Any, **keywords: Any) -> Any:
            return super().from_pretrained(*args, **in_float32(keywords))

    return CLIPVisionModel


PATCH = Patch(
    name="tower_layout",
    targets=(
        Target(
            "llava.model.multimodal_encoder.clip_encoder:CLIPVisionTower",
            LLAVA,
            ("c9a48b32051e29f766c7a01e03795bc5e77187cd2b74e759e08cf5fd283fc170",),
        ),
        Target(
            "transformers.models.clip.modeling_clip:CLIPVisionModel",
            TRANSFORMERS_5,
            ("e224271b1895db7405089a9da7480d339b034adb5ddba0cc8c7444cc9b1b97c7",),
        ),
        Target("transformers:CLIPImageProcessorPil", TRANSFORMERS_5, ()),
    ),
    why="transformers 5 builds a CLIP tower with other names than LLaVA's checkpoints have, in the number format of its file, "
    "and resizes images with torchvision, which gives other pixels",
    delete_when="no LLaVA checkpoint with vision_model in its names is of interest",
    change=change,
    trigger="llava.model",
    needed=ON_5,
)
