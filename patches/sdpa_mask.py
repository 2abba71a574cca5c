"""Attend to the right tokens when prompts are padded and answers use a KV cache.

Targets: `_prepare_4d_causal_attention_mask_for_sdpa` in transformers' `modeling_llama` and `modeling_mistral`.
Why: (1) transformers 4.37 unmasks rows that attend to nothing (padding), for PyTorch's memory-efficient attention. It computes
the indices of these rows as if there were no KV cache. With a cache it unmasks rows of real tokens, which then attend to later
tokens, or it fails. (2) On a CPU, autocast casts queries but not the mask, so full fine-tuning under ``--bf16`` fails.
Versions: transformers 4.37. (4.36 on LLaVA's pins has no such attention; 5 builds its masks in another way.)
Delete when: LLaVA's repository pins a transformers after 4.38.
"""

from __future__ import annotations

import sys
from typing import Any

from umed_plugin.patching import Patch, Recorder, Target

_LLAMA, _MISTRAL = "transformers.models.llama.modeling_llama", "transformers.models.mistral.modeling_mistral"
_FUNCTION = "_prepare_4d_causal_attention_mask_for_sdpa"
_HASHES = ("bfa1a46c307ddfbabde8532f3c8b410b0c5b4b80190882fdb212a35e079a72ae",)


def change(recorder: Recorder) -> None:
    """Rebind the function in the modules where the models look it up."""
    for module in (sys.modules[_LLAMA], sys.modules[_MISTRAL]):
        recorder.replace(module, _FUNCTION, _counting_the_cache(getattr(module, _FUNCTION)))


def _counting_the_cache(stock: Any) -> Any:
    import torch
    from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask

    def prepare(mask: Any, shape: Any, embeds: Any, past: int, *args: Any, **keywords: Any) -> Any:
        if mask is None or mask.dim() != 2 or past == 0:
            return _as_queries(stock(mask, shape, embeds, past, *args, **keywords))
        prepared = _prepare_4d_causal_attention_mask(mask, shape, embeds, past, *args, **keywords)
        sees_nothing = (prepared == torch.finfo(embeds.dtype).min).all(dim=-1, keepdim=True)
        return _as_queries(prepared.masked_fill(sees_nothing, 0.0))

    return prepare


def _as_queries(mask: Any) -> Any:
    """The mask as bool under autocast on a CPU, where queries have one dtype or another. On a GPU autocast casts it too."""
    import torch

    if mask is None or mask.device.type != "cpu" or not torch.is_autocast_cpu_enabled() or not mask.is_floating_point():
        return mask
    return mask == 0  # what is added to the scores is 0, or the lowest number


PATCH = Patch(
    name="sdpa_mask",
    targets=(
        Target(f"{_LLAMA}:{_FUNCTION}", ">=4.37,<4.38", _HASHES),
        Target(f"{_MISTRAL}:{_FUNCTION}", ">=4.37,<4.38", _HASHES),
    ),
    why="with padded prompts and a KV cache, transformers 4.37 lets tokens attend to later tokens, or fails; it also fails under "
    "autocast on a CPU",
    delete_when="LLaVA's repository pins a transformers after 4.38",
    change=change,
    trigger="llava.model",
    needed=("transformers", ">=4.37,<4.38"),
)
