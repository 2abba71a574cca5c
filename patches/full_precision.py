"""Load LLaVA's models in float32 unless another dtype is requested.

Targets: `from_pretrained` of `LlavaLlamaForCausalLM` and `LlavaMistralForCausalLM`. (The tower's is in `tower_layout`.)
Why: LLaVA trains in the dtype in which its checkpoint is loaded. Without a request transformers 4 loads float32; transformers 5
loads the dtype in which the checkpoint was saved. So a run without ``--bf16`` would train float16 weights.
Versions: LLaVA 1.2.x, transformers 5.
Delete when: LLaVA's `train()` requests a dtype.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.patches.training_run import LLAVA, ON_5, TRANSFORMERS_5
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Wrap the method in each of LLaVA's classes on which it is called."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

    for model_class in (LlavaLlamaForCausalLM, LlavaMistralForCausalLM):
        recorder.replace(model_class, "from_pretrained", classmethod(_from_pretrained(model_class)))


def _from_pretrained(owner: Any) -> Any:
    def from_pretrained(cls: Any, *args: Any, **keywords: Any) -> Any:
        return super(owner, cls).from_pretrained(*args, **in_float32(keywords))

    return from_pretrained


def in_float32(keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a `from_pretrained`, with float32 if they request no dtype."""
    import torch

    if keywords.get("torch_dtype") is None and keywords.get("dtype") is None:
        return {**keywords, "dtype": torch.float32}
    return keywords


PATCH = Patch(
    name="full_precision",
    targets=(
        Target(
            "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM",
            LLAVA,
            ("8953c12ea9387cded167f8712f3dc1adec07117395acc4f5c55424050c9fc811",),
        ),
        Target(
            "llava.model.language_model.llava_mistral:LlavaMistralForCausalLM",
            LLAVA,
            ("35ee835e96234834d2927240f971df1a874a3aca544060054805fe081137aa77",),
        ),
        Target("transformers.modeling_utils:PreTrainedModel.from_pretrained", TRANSFORMERS_5, ()),
    ),
    why="transformers 5 loads a checkpoint in the dtype in which it was saved, and LLaVA trains in that dtype",
    delete_when="LLaVA's train() requests a dtype",
    change=change,
    trigger="llava.model",
    needed=ON_5,
)
