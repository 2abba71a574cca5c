"""What a checkpoint is: family, kind, templates, image mode, tower, size."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from umed_plugin.checkpoints.folder import FAMILIES, TOWER
from umed_plugin.commands.doctor.configuration import MISTRAL, is_transformers_form
from umed_plugin.commands.doctor.contents import Contents
from umed_plugin.commands.doctor.values import Values

DELTA = "LLaVA-Med 1.0 delta"
FIRST = "LLaVA 1.0 or LLaVA-Med 1.0"
VICUNA = "LLaVA 1.5"
MED_MISTRAL = "LLaVA-Med 1.5 Mistral"
NEXT = "LLaVA-NeXT"
TRANSFORMERS = "transformers' LlavaForConditionalGeneration"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is, in words.

    Attributes:
        family: the published checkpoint family whose layout it has.
        kind: full, LoRA, projector only, or nothing.
        model_type: as config.json names it.
        language_model: its class and size.
        template: the template to use with stock LLaVA (``--conv-mode``).
        umed_template: the template that umed trains and evaluates with (``--version``).
        image_mode: how images that are not square are processed (image_aspect_ratio).
        tower: the vision tower that config.json names.
        tower_inside: number of tower tensors in the checkpoint.
        image_tokens: how the prompt marks the image.
        parameters: number of values in the files, including the tower's.
        dtypes: dtype -> number of tensors.
        base: base of a LoRA folder or projector; None for others, or if no base is named.
    """

    family: str
    kind: str
    model_type: str
    language_model: str
    template: str
    umed_template: str
    image_mode: str
    tower: str
    tower_inside: int
    image_tokens: str
    parameters: int
    dtypes: dict[str, int]
    base: str | None

    def as_dict(self) -> dict[str, Any]:
        """The identity as JSON."""
        return asdict(self)


def identify(contents: Contents, values: Values) -> Identity:
    """Identify a checkpoint.

    Args:
        contents: of its folder.
        values: statistics of its tensors' values.
    """
    config = contents.config
    stored = [*contents.weights.values(), *contents.adapter.values(), *contents.others.values()]
    known = config.get("model_type") in FAMILIES and not is_transformers_form(config)
    return Identity(
        family=family_of(contents, values),
        kind=contents.kind,
        model_type=str(config.get("model_type")),
        language_model=_language_model(config.get("text_config", config)),
        template=stock_template(contents)[0] if known else UNKNOWN,
        umed_template=("umed_mistral" if config["model_type"] == MISTRAL else "umed_v1") if known else UNKNOWN,
        image_mode=str(config.get("image_aspect_ratio", "not set: square")),
        tower=str(config.get("mm_vision_tower", config.get("vision_tower"))),
        tower_inside=sum(name.startswith(TOWER) for name in contents.weights),
        image_tokens="<im_start><image><im_end>" if config.get("mm_use_im_start_end") else "<image>",
        parameters=sum(tensor.values for tensor in stored),
        dtypes=dict(Counter(tensor.dtype for tensor in stored).most_common()),
        base=str(contents.base.path) if contents.base else contents.adapter_config.get("base_model_name_or_path"),
    )


def family_of(contents: Contents, values: Values) -> str:
    """The published checkpoint family that it belongs to."""
    config = contents.config
    if is_transformers_form(config):
        return TRANSFORMERS
    if config.get("model_type") not in FAMILIES:
        return UNKNOWN
    if values.is_delta:
        return DELTA
    if config.get("image_aspect_ratio") == "anyres" or "spatial" in str(config.get("mm_patch_merge_type", "")):
        return NEXT
    if config["model_type"] == MISTRAL:
        return MED_MISTRAL
    return FIRST if _is_first(config) else VICUNA


def _is_first(config: dict[str, Any]) -> bool:
    """LLaVA 1.0 and LLaVA-Med 1.0: a linear projector, and start and end tokens around the image."""
    return config.get("mm_projector_type", "linear") == "linear" and bool(config.get("mm_use_im_start_end"))


def stock_template(contents: Contents) -> tuple[str, ...]:
    """The stock LLaVA templates that match the model's training, the usual one first."""
    config = contents.config
    named = f"{config.get('_name_or_path', '')} {contents.path.name}".lower()
    if config.get("model_type") == MISTRAL:
        return ("mistral_instruct",)
    if "34b" in named:
        return ("chatml_direct", "mistral_direct")
    if "llama-2" in named:
        return ("llava_llama_2", "llama_2")
    if _is_first(config):
        return ("llava_v0", "v0")
    return ("llava_v1", "vicuna_v1", "v1")


def _language_model(config: dict[str, Any]) -> str:
    kind = "Mistral" if "mistral" in str(config.get("model_type")) else "Llama"
    heads, keys = config.get("num_attention_heads"), config.get("num_key_value_heads")
    of_keys = f", {keys} of keys" if keys and keys != heads else ""
    return f"{kind}, {config.get('num_hidden_layers')} layers of {config.get('hidden_size')}, {heads} heads{of_keys}"
