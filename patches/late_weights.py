"""Train LoRA in bf16 or fp16 under ZeRO-3.

Target: `DeepSpeedEngine._cast_module_mixed_precision` in `deepspeed.runtime.engine`.
Why: DeepSpeed assumes that all weights are cast already if the model was partitioned while it was loaded. Weights created later
are not: peft creates an adapter in float32. ZeRO-3 then fails on trainable weights of two dtypes.
Versions: DeepSpeed 0.19.
Delete when: DeepSpeed casts weights that it has not partitioned yet.

If the model was not partitioned while it was loaded, DeepSpeed casts an adapter too. The optimizer keeps float32 copies of all
trained weights.
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
    why="LoRA in bf16 or fp16 fails under ZeRO-3: the adapter stays in float32 among partitioned weights",
    delete_when="DeepSpeed casts weights that it has not partitioned yet",
    change=change,
    trigger="deepspeed.runtime.engine",
    needed=("deepspeed", ">=0.19"),
)
