"""Read and write ``config.json`` with the keys of LLaVA and its checkpoints.

Targets: `LlavaConfig` and `LlavaMistralConfig`: their attribute ``rope_theta`` and their `to_diff_dict`.
Why: transformers 5 keeps the rotary base in ``rope_parameters`` and the precision in ``dtype``, and writes these keys. A stock
LLaVA that loads such a checkpoint finds no ``rope_theta`` and silently uses 10000 instead of the 1000000 of LLaVA-Med 1.5. Its
answers are then nonsense.
Versions: LLaVA 1.2.x, transformers 5.
Delete when: LLaVA runs only on transformers 5.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.patches.training_run import LLAVA, ON_5, TRANSFORMERS_5
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Add the attribute to both classes, and wrap the method."""
    from llava.model.language_model.llava_llama import LlavaConfig
    from llava.model.language_model.llava_mistral import LlavaMistralConfig

    for config_class in (LlavaConfig, LlavaMistralConfig):
        recorder.add(config_class, "rope_theta", property(_rope_theta))
        recorder.replace(config_class, "to_diff_dict", _in_llavas_keys(config_class.to_diff_dict))


def _rope_theta(config: Any) -> float:
    try:
        return config.rope_parameters["rope_theta"]
    except (KeyError, TypeError) as error:  # while the configuration is being built
        raise AttributeError("rope_theta") from error


def _in_llavas_keys(stock: Any) -> Any:
    def to_diff_dict(self: Any) -> dict[str, Any]:
        values = stock(self)
        rope = dict(values.pop("rope_parameters", None) or {})
        if rope:
            values["rope_theta"] = rope.pop("rope_theta")
            kind = rope.pop("rope_type")
            values["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
        if "dtype" in values:
            values["torch_dtype"] = values.pop("dtype")
        return dict(sorted(values.items()))

    return to_diff_dict


PATCH = Patch(
    name="config_layout",
    targets=(
        Target(
            "llava.model.language_model.llava_llama:LlavaConfig",
            LLAVA,
            ("67dd6cdab1e35599f03f1dc363a0f4652948f5d6359cbd15cfcfa9c0299d864d",),
        ),
        Target(
            "llava.model.language_model.llava_mistral:LlavaMistralConfig",
            LLAVA,
            ("2ec56aca37837b3865cfabaf6785f200390b05585a4258a124928278b0482d90",),
        ),
        Target(
            "transformers.configuration_utils:PreTrainedConfig.to_diff_dict",
            TRANSFORMERS_5,
            ("ca25a17722e6dc8c1782243d81ec7fdeda80e2775d4d47ca486cc63196207ea1",),
        ),
        Target(
            "transformers.modeling_rope_utils:RotaryEmbeddingConfigMixin.convert_rope_params_to_dict",
            TRANSFORMERS_5,
            ("1d2d6e6c67c2c5eb1d80e797ad54836731d9e1ac9a24971e77365a4cd2015c63",),
        ),
    ),
    why="transformers 5 writes config.json with keys that stock LLaVA does not read, so it would use a wrong rotary base",
    delete_when="LLaVA runs only on transformers 5",
    change=change,
    trigger="llava.model",
    needed=ON_5,
)
