"""Load LLaVA's models in float32 unless another number format is asked for.

Targets: `from_pretrained` of `LlavaLlamaForCausalLM` and `LlavaMistralForCausalLM`. (The tower's is in `tower_layout`.)
Why: LLaVA trains in the format that its checkpoint is loaded in. Without a request transformers 4 took float32; transformers 5
takes the one that the checkpoint was saved in, so that a run without ``--bf16`` would train float16 weights.
Versions: LLaVA 1.2.x, transformers 5.
Delete when: LLaVA's `train()` asks for the format that it means.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.patches.training_run import LLAVA, ON_5, TRANSFORMERS_5
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Wrap the methods, each in the class of LLaVA's that it is called on."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

    for model_class in (LlavaLlamaForCausalLM, LlavaMistralForCausalLM):
        recorder.replace(model_class, "from_pretrained", classmethod(_from_pretrained(model_class)))


def _from_pretrained(owner: Any) -> Any:
    def from_pretrained(cls: Any, *args: Any, **keywords: Any) -> Any:
        return super(owner, cls).from_pretrained(*args, **in_float32(keywords))

    return from_pretrained


def in_float32(keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a `from_pretrained`, with float32 where they ask for no number format."""
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
    why="transformers 5 loads a checkpoint in the number format that it was saved in, and LLaVA trains in that",
    delete_when="LLaVA asks for the number format that it means",
    change=change,
    trigger="llava.model",
    needed=ON_5,
)
