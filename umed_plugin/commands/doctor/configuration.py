"""Checks of config.json, also against the shapes of the weights.

The language model's tensor names are known: Llama and Mistral share them. A LoRA folder or projector is checked together with its
base, because it uses the weights of the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from umed_plugin.checkpoints.folder import FAMILIES, TOWER, is_buffer
from umed_plugin.checkpoints.missing_tensors import LAYER, language_shapes, layers_to_look_for
from umed_plugin.checkpoints.rope import LLAVA_KINDS, is_old, old_scaling
from umed_plugin.checkpoints.stored import StoredTensor
from umed_plugin.commands.doctor.catalogue import finding
from umed_plugin.commands.doctor.contents import FULL, Contents
from umed_plugin.commands.doctor.findings import Finding, JsonChange
from umed_plugin.errors import did_you_mean

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROJECTOR, NEWLINE = "model.mm_projector.", "model.image_newline"
MISTRAL, LLAMA = "llava_mistral", "llava_llama"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MODES = ("pad", "square", "anyres")


def is_transformers_form(config: dict[str, Any]) -> bool:
    """Whether config.json belongs to transformers' LLaVA class instead of LLaVA's own."""
    return "text_config" in config and str(config.get("model_type", "")).startswith("llava")


def check_configuration(contents: Contents) -> Iterator[Finding]:
    """Check config.json, and whether the weights agree with it."""
    config = contents.config
    if not config:
        return
    if is_transformers_form(config) or config.get("model_type") not in FAMILIES:
        yield _other_family(contents)
        return
    yield from _mixed(contents)
    yield from _newer_keys(contents)
    yield from _scaling(contents)
    yield from _image_mode(contents)
    yield from _sampling(contents)
    if contents.kind == FULL and contents.weights:
        yield from _language_model(contents)
        yield from _projector(contents)
    elif contents.others and any(name.startswith(PROJECTOR) for name in contents.others):
        yield from _projector(contents)


def _other_family(contents: Contents) -> Finding:
    config, where = contents.config, f"{contents.config_file}: model_type"
    kind = str(config.get("model_type"))
    if is_transformers_form(config) and kind == "llava":
        mistral = "-mistral" if config["text_config"].get("model_type") == "mistral" else ""
        found = f"model_type is llava, with a text_config of {config['text_config'].get('model_type', 'llama')}"
        return finding("transformers-form", found, where, checkpoint=contents.path, mistral=mistral)
    advice = (
        f"Allowed: {', '.join(sorted(FAMILIES))}.{did_you_mean(kind, FAMILIES)} Take the original form of the checkpoint, as on "
        "the hub under liuhaotian/ or microsoft/llava-med-v1.5-mistral-7b."
        if kind.startswith("llava")
        else f"A language model alone becomes LLaVA by training: --model_name_or_path {contents.path} "
        "--pretrain_mm_mlp_adapter mm_projector.bin."
    )
    return finding("family-unknown", f"model_type is {config.get('model_type')!r}", where, advice=advice)


def _mixed(contents: Contents) -> Iterator[Finding]:
    """Detect a Mistral checkpoint that LLaVA's train() saved as Llama: it has keys that only Mistral has."""
    config = contents.config
    named = " ".join(map(str, config.get("architectures") or []))
    is_mistral = config["model_type"] == MISTRAL
    if is_mistral and "Llama" in named:
        signs, change = [f"architectures is {named}"], None
    else:
        signs = [] if is_mistral else [sign for sign, present in _signs_of_mistral(config, named).items() if present]
        window, longest = config.get("sliding_window"), config.get("tokenizer_model_max_length") or 2048
        # Both classes compute the same unless the sliding window is shorter than the context.
        same = not window or window >= max(longest, 4096)
        values = {"model_type": MISTRAL, "architectures": ["LlavaMistralForCausalLM"]}
        change = contents.configures(**values) if same and not config.get("attention_bias") else None
    if signs:
        found = f"model_type is {config['model_type']}, but {' and '.join(signs)}"
        yield finding("mixed-config", found, f"{contents.config_file}: model_type", change)


def _signs_of_mistral(config: dict[str, Any], named: str) -> dict[str, bool]:
    return {
        "sliding_window is set, which Llama does not have": "sliding_window" in config,
        f"architectures is {named}": "Mistral" in named,
    }


def _newer_keys(contents: Contents) -> Iterator[Finding]:
    config = contents.config
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in config:
        return
    kind = rope.get("rope_type", "default")
    older = {"rope_theta": rope.get("rope_theta")}
    if kind in LLAVA_KINDS:
        older["rope_scaling"] = old_scaling(rope) if rope.get("factor") is not None else None
    if "dtype" in config and "torch_dtype" not in config:
        older["torch_dtype"] = config["dtype"]
    known = kind in ("default", *LLAVA_KINDS) and None not in older.values()
    found = f"rope_parameters is {rope}, and rope_theta is not set"
    where = f"{contents.config_file}: rope_theta"
    change = contents.configures(**older) if known else None
    yield finding("config-of-transformers-5", found, where, change, checkpoint=contents.path)


def _scaling(contents: Contents) -> Iterator[Finding]:
    """LLaVA's transformers takes a scaling of two keys, with a fraction as its factor; newer versions write more."""
    scaling, where = contents.config.get("rope_scaling"), f"{contents.config_file}: rope_scaling"
    if scaling is None or is_old(scaling):
        return
    older = old_scaling(scaling)
    change = contents.configures(rope_scaling=older) if older is None or is_old(older) else None
    yield finding("rope-scaling", f"rope_scaling is {scaling!r}", where, change, checkpoint=contents.path)


def _image_mode(contents: Contents) -> Iterator[Finding]:
    config, where = contents.config, f"{contents.config_file}: image_aspect_ratio"
    mode, unpad = config.get("image_aspect_ratio"), "unpad" in str(config.get("mm_patch_merge_type", ""))
    if mode is None:
        yield finding("image-mode-unset", "image_aspect_ratio is not set", where)
    elif mode not in _MODES:
        yield finding("image-mode-unknown", f"image_aspect_ratio is {mode!r}", where)
    elif mode == "anyres":
        yield finding("image-mode-anyres", "image_aspect_ratio is anyres", where)
        if not config.get("image_grid_pinpoints"):
            yield finding("image-tiles-unset", "image_grid_pinpoints is not set", str(contents.config_file))
    if unpad and contents.kind == FULL and contents.weights and NEWLINE not in contents.weights:
        found = f"mm_patch_merge_type is {config['mm_patch_merge_type']}, and the weights contain no image_newline"
        yield finding("image-tiles-unset", found, str(contents.config_file))


def _sampling(contents: Contents) -> Iterator[Finding]:
    generation = contents.generation_config
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0}
    odd = [
        f"{key} {generation[key]}" for key, value in neutral.items() if generation.get(key, value) not in (value, None)
    ]
    if odd and not generation.get("do_sample"):
        file = contents.path / "generation_config.json"
        found = f"{', '.join(odd)}, and do_sample is not set"
        yield finding("generation-config", found, str(file), JsonChange(file, {"do_sample": True}))


def _language_model(contents: Contents) -> Iterator[Finding]:
    config, weights = contents.config, contents.weights
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    unset = [key for key in needed if key not in config]
    if unset:
        if not any(noted.code == "config-value" for noted in contents.findings):
            yield finding("config-value", f"{', '.join(unset)} is not set", str(contents.config_file))
        return
    if any(tensor.dtype in ("U8", "I8") for tensor in weights.values()) or "quantization_config" in config:
        yield finding("quantized", "integer weights, or quantization_config in config.json", str(contents.path))
        return
    stored = 1 + max((int(match[1]) for match in map(_LAYER.match, weights) if match), default=-1)
    layers = config["num_hidden_layers"]
    if stored > layers:
        found = f"num_hidden_layers is {layers}, but the weights contain {stored} layers"
        yield finding("layers-dropped", found, f"{contents.config_file}: num_hidden_layers")
    expected = language_shapes(config, layers_to_look_for(layers, weights, LAYER))
    missing = sorted(name for name in expected if name not in weights)
    # Tensors of unreadable files have a finding of their own.
    unread = any(f.code.startswith(("file-", "shard-", "pickle-")) for f in contents.findings)
    if missing and not unread:
        yield finding("tensors-missing", f"{len(missing)} tensors are missing ({missing[0]}, ...)", str(contents.path))
    unknown = sorted(name for name in weights if name not in expected and not _is_known_beside(name, layers))
    if unknown:
        yield finding("tensors-unknown", f"{len(unknown)} tensors are unknown ({unknown[0]}, ...)", str(contents.path))
    yield from _wrong_shapes(contents, expected)


def _is_known_beside(name: str, layers: int) -> bool:
    match = _LAYER.match(name)
    dropped = match is not None and int(match[1]) >= layers  # reported as layers-dropped
    return dropped or name.startswith((PROJECTOR, TOWER)) or name in (NEWLINE, HEAD) or is_buffer(name)


def _wrong_shapes(contents: Contents, expected: dict[str, tuple[int, ...]]) -> Iterator[Finding]:
    """Group wrong shapes by their cause in config.json: vocabulary, key and value heads, or anything else."""
    weights, config = contents.weights, contents.config
    wrong = {name for name, shape in expected.items() if name in weights and weights[name].shape != shape}
    wrong -= {name for name in wrong if 0 in weights[name].shape}  # reported as empty-tensors
    rows = {name: weights[name].shape for name in (EMBEDDING, HEAD) if name in wrong}
    if rows and all(shape[1:] == (config["hidden_size"],) for shape in rows.values()):
        wrong -= set(rows)
        counts = {weights[name].shape[0] for name in (EMBEDDING, HEAD) if name in weights}
        change = contents.configures(vocab_size=next(iter(counts))) if len(counts) == 1 else None
        stored = ", ".join(f"{name} has {shape[0]} rows" for name, shape in rows.items())
        found = f"vocab_size is {config['vocab_size']}, but {stored}"
        where = f"{contents.config_file}: vocab_size"
        yield finding("vocabulary-size", found, where, change, rows=" or ".join(map(str, sorted(counts))))
    keys = {name for name in wrong if re.search(r"\.(k|v)_proj\.weight$", name)}
    if keys:
        wrong -= keys
        yield _wrong_heads(contents, {name: weights[name] for name in expected if re.search(r"\.(k|v)_proj\.", name)})
    if wrong:
        name = min(wrong)
        found = (
            f"{len(wrong)} tensors; {name} has shape {weights[name].shape}, but config.json implies {expected[name]}"
        )
        yield finding("shape-mismatch", found, str(weights[name].file))


def _wrong_heads(contents: Contents, keys: dict[str, StoredTensor]) -> Finding:
    config = contents.config
    head = config.get("head_dim") or max(config["hidden_size"] // config["num_attention_heads"], 1)
    rows = {tensor.shape[0] for tensor in keys.values()}
    counts = {count // head for count in rows}
    agree = len(rows) == 1 and min(rows) % head == 0 and config["num_attention_heads"] % max(min(counts), 1) == 0
    change = contents.configures(num_key_value_heads=min(counts)) if agree else None
    value = config.get("num_key_value_heads", f"not set, so {config['num_attention_heads']}")
    stored = " or ".join(map(str, sorted(rows)))
    found = f"num_key_value_heads is {value}, but k_proj and v_proj have {stored} rows, {head} per head"
    where = f"{contents.config_file}: num_key_value_heads"
    return finding("head-counts", found, where, change, heads=" or ".join(map(str, sorted(counts))))


def _projector(contents: Contents) -> Iterator[Finding]:
    """Check the projector's type, known from its tensor names, and its output width."""
    stored = contents.weights if contents.kind == FULL else contents.others
    projector = {name[len(PROJECTOR) :]: tensor for name, tensor in stored.items() if name.startswith(PROJECTOR)}
    kind, where = contents.config.get("mm_projector_type", "linear"), f"{contents.config_file}: mm_projector_type"
    if not projector:
        if kind != "identity" and not any(f.code.startswith(("file-", "shard-")) for f in contents.findings):
            yield finding("projector-missing", "no tensor is named model.mm_projector.*", str(contents.path))
        return
    stored_type = projector_type(projector)
    if stored_type != kind:
        value = kind if "mm_projector_type" in contents.config else "not set, so linear"
        found = f"mm_projector_type is {value}, but the weights are {stored_type or ', '.join(sorted(projector)[:3])}"
        change = contents.configures(mm_projector_type=stored_type) if stored_type else None
        yield finding("projector-type", found, where, change, kind=stored_type or "the type that it was trained with")
    first = next((projector[name] for name in ("weight", "0.weight") if name in projector), None)
    width = contents.config.get("hidden_size")
    last = max((name for name in projector if name.endswith("weight")), default="")
    if first is not None and isinstance(width, int) and projector[last].shape[0] != width:
        found = f"{PROJECTOR}{last} has shape {projector[last].shape}, but hidden_size is {width}"
        yield finding("shape-mismatch", found, str(projector[last].file))


def projector_type(projector: dict[str, StoredTensor]) -> str | None:
    """The projector type for these tensor names, ``linear`` or ``mlpNx_gelu`` as in LLaVA; None for anything else."""
    if set(projector) == {"weight", "bias"}:
        return "linear"
    depth = len(projector) // 2
    layers = {f"{2 * layer}.{part}" for layer in range(depth) for part in ("weight", "bias")}
    return f"mlp{depth}x_gelu" if set(projector) == layers else None
