"""Pass a prepared 4-D attention mask through to the layers of Llama and Mistral.

Targets: `_prepare_4d_causal_attention_mask` and `_prepare_4d_causal_attention_mask_for_sdpa` in transformers' `modeling_llama`
and `modeling_mistral` (the latter has both from 4.37 on).
Why: they accept only a 2-D mask and fail on any other. Then answers packed into one row with their prompt cannot be masked from
one another.
Versions: transformers 4.36 and 4.37. (4.37 accepts a 4-D mask of ones and zeros, 5 the additive one that is passed here.)
Delete when: LLaVA's pins reach a transformers that accepts an additive 4-D mask.
"""

from __future__ import annotations

import sys
from typing import Any

from umed_plugin.patches.training_run import BEFORE_5, TRANSFORMERS_4
from umed_plugin.patching import Patch, Recorder, Target

_EAGER = "_prepare_4d_causal_attention_mask"
_SDPA = f"{_EAGER}_for_sdpa"
_LLAMA = "transformers.models.llama.modeling_llama"
_MISTRAL = "transformers.models.mistral.modeling_mistral"
_EAGER_HASHES = (
    "5900f05ea360fcadb127534fa7491b3952b0bedc2ae8eee80d76664ab07a8da5",
    "536e1e6fd450e31d727fc8b098a61d1da687319f2f6cfd86a05b45201eef774e",
)


def change(recorder: Recorder) -> None:
    """Rebind the functions in the modules where the models look them up."""
    for module in (sys.modules[_LLAMA], sys.modules[_MISTRAL]):
        for function in (_EAGER, _SDPA):
            if hasattr(module, function):
                recorder.replace(module, function, _passing_4d_masks(getattr(module, function)))


def _passing_4d_masks(stock: Any) -> Any:
    def prepare(attention_mask: Any, *args: Any, **keywords: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask
        return stock(attention_mask, *args, **keywords)

    return prepare


PATCH = Patch(
    name="attention_mask",
    targets=(
        Target(f"{_LLAMA}:{_EAGER}", TRANSFORMERS_4, _EAGER_HASHES),
        Target(
            f"{_LLAMA}:{_SDPA}",
            TRANSFORMERS_4,
            (
                "11cd4d792e50f0ca336fc4599207e3ea652361ab63f3663b3e9196c22b363356",
                "bfa1a46c307ddfbabde8532f3c8b410b0c5b4b80190882fdb212a35e079a72ae",
            ),
        ),
        Target(f"{_MISTRAL}:{_EAGER}", TRANSFORMERS_4, _EAGER_HASHES),
        Target(
            f"{_LLAMA}:LlamaModel.forward",
            TRANSFORMERS_4,
            ("625665ff77a5292da56c5059a53d2985b8c6511b5b25f06db3f2c881828d625c",),
        ),
        Target(
            f"{_MISTRAL}:MistralModel.forward",
            TRANSFORMERS_4,
            (
                "7beb8f273fe15eecdccaac5d98f751eee9cc4d28c1de9fbec1a46147d3b8b2c3",
                "f052cf0df1d8014c2e73597e0aa46fc3702f4266eb52cbed5302383aa4ef5915",
            ),
        ),
    ),
    why="Llama and Mistral fail on a 4-D attention mask, which packed answers of one row need",
    delete_when="LLaVA's pins reach a transformers that accepts an additive 4-D mask",
    change=change,
    needed=BEFORE_5,
)
