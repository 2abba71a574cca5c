"""Provide the list of layer norms that LLaVA imports from transformers.

Target: `ALL_LAYERNORM_LAYERS` in `transformers.trainer`.
Why: LLaVA's trainer imports it, but transformers 5 has removed it, so ``import llava.train.train`` fails.
Versions: transformers 5.
Delete when: LLaVA gets the parameters with weight decay from `Trainer.get_decay_parameter_names`.

The list is that of transformers 4.36, so the same parameters get weight decay (Mistral's norms are not in it).
"""

from __future__ import annotations

import sys

from umed_plugin.patches.training_run import ON_5, TRANSFORMERS_5
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Add the name."""
    from torch import nn
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    recorder.add(sys.modules["transformers.trainer"], "ALL_LAYERNORM_LAYERS", [nn.LayerNorm, LlamaRMSNorm])


PATCH = Patch(
    name="layer_norms",
    targets=(Target("transformers.trainer:get_parameter_names", TRANSFORMERS_5, ()),),
    why="LLaVA's trainer imports a list that transformers 5 has removed",
    delete_when="LLaVA's trainer gets the parameters with weight decay from transformers",
    change=change,
    trigger="transformers.trainer",
    needed=ON_5,
)
