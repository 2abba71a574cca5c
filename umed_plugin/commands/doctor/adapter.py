"""LoRA folders and projectors: whether base, adapter and the installed peft are compatible."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from umed_plugin.checkpoints.adapter_folder import missing_halves
from umed_plugin.checkpoints.folder import ADAPTER
from umed_plugin.checkpoints.plain_lora import settings_fault, tensors_fault
from umed_plugin.checkpoints.trained_on import MARKER, other_base
from umed_plugin.commands.doctor.catalogue import finding
from umed_plugin.commands.doctor.configuration import MISTRAL, PROJECTOR, is_transformers_form
from umed_plugin.commands.doctor.contents import LORA, Contents
from umed_plugin.commands.doctor.contents import PROJECTOR as PROJECTOR_ONLY
from umed_plugin.commands.doctor.findings import Finding, JsonChange

# Values with which a field of newer peft versions has no effect, besides None, False and empty ones.
_NEUTRAL = {"megatron_core": "megatron.core", "qalora_group_size": 16}
_ABOUT_THE_FILE = ("peft_version", "auto_mapping")


def check_adapter(contents: Contents) -> Iterator[Finding]:
    """Check whether a LoRA folder or projector can be loaded over its base by stock LLaVA and the installed peft."""
    config = contents.config
    if contents.kind not in (LORA, PROJECTOR_ONLY) or is_transformers_form(config):
        return
    where = f"{contents.config_file}: model_type"
    if contents.is_intermediate:
        yield finding(
            "adapter-not-merged", "umed.json is beside the adapter", str(contents.path), checkpoint=contents.path
        )
    elif config.get("model_type") == MISTRAL:
        yield finding("adapter-of-mistral", f"model_type is {MISTRAL}", where, checkpoint=contents.path)
    if config.get("model_type") == "llava":
        change = contents.configures(model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"])
        yield finding("adapter-model-type", "model_type is 'llava'", where, change)
    if contents.kind == LORA:
        yield from _settings(contents)
        yield from _fields(contents)
    yield from _base(contents)


def _settings(contents: Contents) -> Iterator[Finding]:
    """Find an adapter that is not plain LoRA, or whose tensors are not those of its settings."""
    file = contents.path / ADAPTER
    config = contents.adapter_config
    fault = settings_fault(config) if config else None  # one that is no JSON object is reported already
    if fault is not None:
        yield finding("adapter-not-plain", fault, str(file))
    elif config:
        fault = tensors_fault(config, {name: tensor.shape for name, tensor in contents.adapter.items()})
        if fault is not None:
            yield finding("adapter-tensors", f"the adapter {fault}", str(contents.path))


def _base(contents: Contents) -> Iterator[Finding]:
    base = contents.base
    if base is None:
        named = contents.adapter_config.get("base_model_name_or_path") or contents.config.get("_name_or_path")
        where = str(contents.path / ADAPTER if contents.kind == LORA else contents.config_file)
        yield finding("base-missing", f"the base that it names is {named!r}", where, checkpoint=contents.path)
        return
    if not base.weights:
        yield finding("base-mismatch", f"{base.path} holds no full model ({base.kind})", str(base.path))
        return
    misfits = list(_misfits(contents, base))
    if misfits:
        text = f"{len(misfits)} tensors do not fit: {misfits[0]} ({base.path})"
        yield finding("base-mismatch", text, str(contents.path))
    elif other := other_base(contents.path, base.path):
        yield finding("base-mismatch", other, str(contents.path / MARKER))


def _misfits(contents: Contents, base: Contents) -> Iterator[str]:
    """Describe the low-rank matrices and other trained tensors that do not fit the base, or lack their other half."""
    yield from (f"the adapter lacks {name}" for name in missing_halves(contents.adapter))
    for name, tensor in contents.adapter.items():
        if ".lora_A." not in name and ".lora_B." not in name:
            continue
        target = name.removeprefix("base_model.model.").replace(".default", "")
        target = target.replace(".lora_A", "").replace(".lora_B", "")
        # The adapter may also target the tower, which the base need not contain.
        if target not in base.weights:
            if "vision_tower" not in target:
                yield f"{target} is not in the base"
            continue
        side = 1 if ".lora_A." in name else 0
        wanted = base.weights[target].shape
        if len(tensor.shape) == 2 and len(wanted) == 2 and tensor.shape[side] != wanted[side]:
            yield f"{name} has shape {tensor.shape}, and in the base {target} has shape {wanted}"
    for name, tensor in contents.others.items():
        in_base = base.weights.get(name)
        if in_base is not None and in_base.shape != tensor.shape and not name.startswith(PROJECTOR):
            yield f"{name} has shape {tensor.shape}, and in the base {in_base.shape}"


def _fields(contents: Contents) -> Iterator[Finding]:
    import dataclasses

    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = {key: value for key, value in contents.adapter_config.items() if key not in known}
    needed = {key: value for key, value in unknown.items() if not _is_neutral(key, value)}
    file = contents.path / ADAPTER
    if needed:
        text = ", ".join(f"{key}: {value}" for key, value in needed.items())
        yield finding("adapter-fields-needed", text, str(file))
    neutral = tuple(key for key in unknown if key not in needed)
    if neutral:
        change = JsonChange(file, {}, remove=neutral)
        yield finding("adapter-fields", ", ".join(neutral), str(file), change)


def _is_neutral(key: str, value: Any) -> bool:
    return key in _ABOUT_THE_FILE or not value or _NEUTRAL.get(key) == value
