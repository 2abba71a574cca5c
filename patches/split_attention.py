"""Let the layers of Llama and Mistral attend to packed rows in two calls, and decode without copies of keys and values.

Targets: the `forward` of every attention class in transformers' `modeling_llama` and `modeling_mistral`.
Why: (1) Answers packed behind their prompt need a mask over the whole row. Flash attention does not take it, and other kinds of
attention compute twice the scores (`umed_plugin.model.split_attention`). (2) With a mask and a KV cache, keys and values are
copied for all query heads that share them, in each layer and for each token.
Versions: transformers 4.36, 4.37 and 5.23.
Delete when: transformers computes a shared prefix once, also under flash attention.

Every other call goes to the stock method.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from umed_plugin.patches.training_run import TRANSFORMERS
from umed_plugin.patching import Patch, Recorder, Target

_LLAMA = "transformers.models.llama.modeling_llama"
_MISTRAL = "transformers.models.mistral.modeling_mistral"


def change(recorder: Recorder) -> None:
    """Wrap the method of each class that has one of its own: transformers 4 has a class for each kind of attention."""
    for name, family in ((_LLAMA, "Llama"), (_MISTRAL, "Mistral")):
        module = sys.modules[name]
        for kind in ("Attention", "FlashAttention2", "SdpaAttention"):
            attention = getattr(module, f"{family}{kind}", None)
            if attention is not None and "forward" in vars(attention):
                recorder.replace(attention, "forward", _splitting(attention.forward, module.apply_rotary_pos_emb))


def _splitting(stock: Any, apply_rotary: Any) -> Any:
    from umed_plugin.model.split_attention import MARK, attend, attend_rows, is_description

    @functools.wraps(stock)
    def forward(self: Any, hidden_states: Any, *args: Any, **keywords: Any) -> Any:
        mask = keywords.get("attention_mask")
        cache: Any = keywords.get("past_key_values", keywords.get("past_key_value"))  # transformers 5, or 4
        rows = is_description(mask)
        if not rows and not _decodes(self, mask, cache, keywords):
            return stock(self, hidden_states, *args, **keywords)
        q, k, v = _rotated(self, hidden_states, apply_rotary, cache, keywords)
        if rows:
            output = attend_rows(q, k, v, mask, _kernel(self, q))
        else:
            k, v = cache.update(k, v, self.layer_idx)
            output = attend(q, k, v, mask, _kernel(self, q).name).transpose(1, 2)
        output = self.o_proj(output.reshape(*hidden_states.shape[:2], -1))
        # transformers 4, which passes no rotary embeddings, wants the cache back.
        return (output, None) if "position_embeddings" in keywords else (output, None, cache)

    setattr(forward, MARK, True)
    return forward


def _decodes(attention: Any, mask: Any, cache: Any, keywords: dict[str, Any]) -> bool:
    """Whether these are new tokens behind a filled cache, under a 4-D mask."""
    if mask is None or mask.dim() != 4 or cache is None or cache.get_seq_length(attention.layer_idx) == 0:
        return False
    # The weights themselves are only known to the stock method.
    wanted = keywords.get("output_attentions") or getattr(attention.config, "output_attentions", False)
    return not wanted and not (attention.training and attention.attention_dropout)


def _rotated(attention: Any, hidden: Any, apply_rotary: Any, cache: Any, keywords: dict[str, Any]) -> Any:
    """Queries [R, h, n, d], keys and values [R, g, n, d] of new columns, as the stock methods make them."""
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (projection(hidden).view(shape).transpose(1, 2) for projection in projections)
    if keywords.get("position_embeddings") is not None:  # transformers 5 computes them once for all layers
        q, k = apply_rotary(q, k, *keywords["position_embeddings"])
        return q, k, v
    columns = hidden.shape[1] + (0 if cache is None else cache.get_seq_length(attention.layer_idx))
    q, k = apply_rotary(q, k, *attention.rotary_emb(v, seq_len=columns), keywords["position_ids"])
    return q, k, v


def _kernel(attention: Any, q: Any) -> Any:
    """The kind of attention that the model was loaded with."""
    import torch

    from umed_plugin.errors import UmedError
    from umed_plugin.model.split_attention import Kernel

    if attention.training and attention.attention_dropout:
        raise UmedError("packed rows are computed without attention dropout: set attention_dropout to 0 in config.json")
    kind = type(attention).__name__
    chosen = str(getattr(attention.config, "_attn_implementation", "eager"))
    name = "eager"
    if "Flash" in kind or "flash" in chosen:
        name = "flash"
    elif "Sdpa" in kind or chosen == "sdpa":
        name = "sdpa"
    half = None
    if name == "flash" and q.dtype == torch.float32:
        half = _autocast_dtype(q.device.type) or _half_of(attention)
    return Kernel(name, getattr(attention.config, "sliding_window", None), half)


def _half_of(attention: Any) -> Any:
    """The 16-bit dtype that a layer computes in: of its weights; over 4-bit ones, and before DeepSpeed casts, of the model."""
    import torch

    weights = attention.q_proj.weight.dtype
    before = getattr(attention.config, "_pre_quantization_dtype", None)
    known = [weights, before, getattr(attention.config, "dtype", None), getattr(attention.config, "torch_dtype", None)]
    return next((dtype for dtype in known if dtype in (torch.float16, torch.bfloat16)), weights)


def _autocast_dtype(device: str) -> Any:
    """The dtype of autocast on a device; None where it is off."""
    import torch

    if device == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


PATCH = Patch(
    name="split_attention",
    targets=(
        Target(
            f"{_LLAMA}:LlamaAttention.forward",
            TRANSFORMERS,
            (
                "320494d7e6f79719b4f10514249212c79b80659db844dc6ecb218c1f7a0765ff",  # 4.36
                "dc6807936ef6103d2675e82361b9c82359d43356a331140bbb1a974595522bff",  # 5.23
            ),
        ),
        Target(
            f"{_MISTRAL}:MistralAttention.forward",
            TRANSFORMERS,
            (
                "832b429a81859b47a1979852d3c8d412b77979067a742af92999a6519bf9c97d",  # 4.36
                "98e841a5cfbac69612269a9ee7b0c20f1d20107da7addbdfbce1560e40c77d65",  # 5.23
            ),
        ),
    ),
    why="flash attention takes no mask for answers packed behind their prompt, and decoding copies keys and values",
    delete_when="transformers computes a shared prefix once, also under flash attention",
    change=change,
)
