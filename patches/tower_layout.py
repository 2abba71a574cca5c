"""Build the vision tower with the names of LLaVA's checkpoints, and give it the pixels on which it was trained.

Targets: `CLIPVisionModel` and `CLIPImageProcessor` in LLaVA's `clip_encoder`.
Why: (1) transformers 5 has no ``vision_model`` level. It translates the names in a tower's own files, but not those of a tower
inside a LLaVA checkpoint. Such weights would fit no tower, and stock LLaVA would not know the names that training saves.
(2) Without a request it loads the tower in the dtype of its file; transformers 4 loads float32. (3) It resizes images with
torchvision if that is installed, else it warns. The pixels differ slightly from Pillow's, on which every checkpoint was trained.
(4) It builds a checkpoint's model on the meta device and refuses to load another model inside it. LLaVA does that for a tower
whose weights are in the checkpoint.
Versions: LLaVA 1.2.x, transformers 5.
Delete when: no LLaVA checkpoint with ``vision_model`` in its names is in use.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.errors import UsageError
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
    """The class with a ``vision_model`` level between itself and its layers."""
    import torch

    class VisionModel(stock):
        """A subclass, since transformers translates only the names of its own classes."""

        weights_follow = False  # built on the meta device; the checkpoint's weights are loaded afterwards

        def _init_weights(self, module: Any) -> None:
            own = module.named_parameters(recurse=False)
            missing = [key for key, weight in own if not getattr(weight, "_is_hf_initialized", False)]
            if self.weights_follow and missing:
                raise UsageError(
                    "config.json sets unfreeze_mm_vision_tower, so the checkpoint should contain the tower's weights, but it "
                    f"lacks {', '.join(missing)} of a {type(module).__name__}. Remove the setting from config.json to load the "
                    "tower that mm_vision_tower names, or use a checkpoint that contains the tower."
                )
            super()._init_weights(module)

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
        def from_pretrained(cls, name: Any, *args: Any, **keywords: Any) -> Any:
            if torch.empty(0).device.type != "meta":
                return super().from_pretrained(name, *args, **in_float32(keywords))
            tower = cls(cls.config_class.from_pretrained(name))
            tower.vision_model.weights_follow = True
            return tower

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
    why="transformers 5 builds a CLIP tower with other weight names than LLaVA's checkpoints, in the dtype of its file, and "
    "resizes images with torchvision, which gives other pixels",
    delete_when="no LLaVA checkpoint with vision_model in its names is in use",
    change=change,
    trigger="llava.model",
    needed=ON_5,
)
