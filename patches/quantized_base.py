"""Load a base of 4 bits (``--bits 4``, QLoRA) on transformers 5.

Targets: `from_pretrained` of `LlavaLlamaForCausalLM` and `LlavaMistralForCausalLM`.
Why: (1) LLaVA's `train()` requests quantization twice, by a `BitsAndBytesConfig` and by ``load_in_4bit`` and ``load_in_8bit``.
transformers 5 knows the configuration alone, and passes the others on to the model's constructor, which refuses them. (2) LLaVA
keeps ``mm_projector`` out of it. transformers 4 finds that name anywhere in a layer's name, transformers 5 only at its beginning
or end. So the projector, which is trained, would get 4 bits. (3) On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weights
at the first pass in evaluation mode, and computes in bf16 from then on. Such a layer has no gradient: after stage 2 has sampled,
none would learn.
Versions: LLaVA 1.2.x, transformers 5.
Delete when: LLaVA's `train()` passes the configuration alone.

`find_faults` refuses, before the model is loaded, a machine that cannot compute with 4 bits.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.patches.training_run import LLAVA, ON_5, TRAIN, TRANSFORMERS_5, TrainingRun
from umed_plugin.patching import Patch, Recorder, Target
from umed_plugin.terminal.silent_imports import silent_imports

_REPACKS = "support_avx512bf16_for_cpu"  # an attribute of bitsandbytes' layers
_REPEATED = ("load_in_4bit", "load_in_8bit")


def change(recorder: Recorder) -> None:
    """Wrap the method in each of LLaVA's classes on which it is called."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

    for model_class in (LlavaLlamaForCausalLM, LlavaMistralForCausalLM):
        recorder.replace(model_class, "from_pretrained", classmethod(_from_pretrained(model_class.from_pretrained)))


def _from_pretrained(stock: Any) -> Any:
    def from_pretrained(cls: Any, *args: Any, **keywords: Any) -> Any:
        quantization = keywords.get("quantization_config")
        if quantization is not None:
            keywords = {name: value for name, value in keywords.items() if name not in _REPEATED}
            quantization.llm_int8_skip_modules = [*quantization.llm_int8_skip_modules, r".*\.mm_projector"]
        model = stock.__func__(cls, *args, **keywords)
        for layer in model.modules() if quantization is not None else ():
            if hasattr(layer, _REPACKS):
                setattr(layer, _REPACKS, False)
        return model

    return from_pretrained


def find_faults(run: TrainingRun) -> list[str]:
    """Why this machine cannot compute with a base of 4 bits. `umed_plugin.flags.checks` checks the flags among themselves."""
    if not run.active or run.training_args.bits != 4:
        return []
    reason = _unavailable(run.training_args.device)
    return [] if reason is None else [f"--bits 4: {reason} Or use --bits 16."]


def _unavailable(device: Any) -> str | None:
    """Why this device cannot store 64 weights in 4 bits and read them back, as a sentence."""
    import torch

    try:
        with silent_imports():
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        dequantize_4bit(*quantize_4bit(torch.linspace(-1, 1, 64, device=device), quant_type="nf4"))
    except ImportError:
        return "bitsandbytes is not installed. Install it: pip install bitsandbytes."
    except Exception as error:  # noqa: BLE001 (whatever a build without kernels for this device raises)
        found = " ".join(str(error).split())[:120] or type(error).__name__
        return f"the installed bitsandbytes has no 4-bit kernels for {device} ({found}). Train on a GPU, or use a newer one."
    return None


PATCH = Patch(
    name="quantized_base",
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
        TRAIN,
    ),
    why="under --bits 4, transformers 5 refuses load_in_4bit and quantizes the projector; on a CPU, layers that have sampled "
    "lose their gradient",
    delete_when="LLaVA's train() requests quantization by its configuration alone, and bitsandbytes repacks no trained layer",
    change=change,
    needed=ON_5,
)
