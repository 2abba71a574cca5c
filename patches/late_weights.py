"""Train LoRA in bf16 or fp16 under ZeRO-3.

Target: `DeepSpeedEngine._cast_module_mixed_precision` in `deepspeed.runtime.engine`.
Why: DeepSpeed takes the weights of a model that was sliced while it was loaded for cast already. Those made later are not: peft
makes an adapter's in float32. ZeRO-3 then fails on trainable weights of two number formats.
Versions: DeepSpeed 0.19.
Delete when: DeepSpeed casts what it has not sliced yet.

Without slices DeepSpeed casts an adapter too; the optimizer keeps float32 copies of all that it trains.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Wrap the method."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    stock = DeepSpeedEngine._cast_module_mixed_precision

    def cast(self: Any, param_dtype: Any, *args: Any, **keywords: Any) -> None:
        stock(self, param_dtype, *args, **keywords)
        for parameter in self.module.parameters():
            late = not hasattr(parameter, "ds_id") and parameter.is_floating_point()
            if param_dtype is not None and late and parameter.dtype != param_dtype:
                parameter.data = parameter.data.to(param_dtype)

    recorder.replace(DeepSpeedEngine, "_cast_module_mixed_precision", cast)


PATCH = Patch(
    name="late_weights",
    targets=(
        Target(
            "deepspeed.runtime.engine:DeepSpeedEngine._cast_module_mixed_precision",
            ">=0.19,<0.20",
            ("3d82870aeee1c22bdeed6bd978083201213aa6738e3d0fee6f8caaabd893e67b",),
        ),
    ),
    why="LoRA in bf16 fails under ZeRO-3: the adapter is left in float32 among sliced weights",
    delete_when="DeepSpeed casts the weights that it has not sliced yet",
    change=change,
    trigger="deepspeed.runtime.engine",
    needed=("deepspeed", ">=0.19"),
)
