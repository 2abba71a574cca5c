"""Load a checkpoint's model and tokenizer, with the tower and the projector that belong to it.

Stock LLaVA chooses the loader by the folder's name; this module reads ``model_type`` from ``config.json``. Vision-tower weights
inside a checkpoint are used (stock LLaVA drops them unless ``unfreeze_mm_vision_tower`` is set).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.adapter_folder import (
    adapter_settings,
    adapter_tensors,
    find_base,
    refuse_transformers_adapter,
)
from umed_plugin.checkpoints.folder import (
    ADAPTER,
    EMBEDDING,
    FAMILIES,
    NON_LORA,
    READ_WHEN_ANSWERING,
    TOWER,
    UNFREEZE,
    is_buffer,
    is_hub_tower,
    is_lora,
    left_out_own_tower,
    read_config,
    read_tensors,
    weight_files,
)
from umed_plugin.checkpoints.missing_tensors import names_in, refuse_missing, refuse_missing_of_tower
from umed_plugin.checkpoints.plain_lora import layer_of, untrained_fault
from umed_plugin.checkpoints.safe_loading import behind_the_door, check_plain
from umed_plugin.checkpoints.tokenizers import load_tokenizer
from umed_plugin.checkpoints.tower_weights import as_in
from umed_plugin.errors import UmedError
from umed_plugin.terminal.progress import library_bars


def load_checkpoint(
    path: Path | str, base: Path | str | None = None, device: str | None = None, dtype: Any = None
) -> tuple[Any, Any, Any]:
    """Load a checkpoint, or a LoRA folder over its base, in evaluation mode.

    Args:
        path: a full checkpoint, or a folder that LLaVA's training wrote with ``--lora_enable True``.
        base: base of a LoRA folder; by default the checkpoint that its adapter names.
        device: by default ``cuda`` if available, else ``cpu``.
        dtype: of the weights; by default ``torch.float32``.

    Returns:
        (tokenizer, model, image processor). For a LoRA folder the model is a PEFT model, whose adapter can be disabled.

    Raises:
        UmedError: it is not a LLaVA checkpoint, or its base, tower or weights are missing or do not fit; or there is no such
            device.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
        >>> checkpoint = make_checkpoint(Path(tempfile.mkdtemp()) / "llava-mistral-tiny")
        >>> tokenizer, model, image_processor = load_checkpoint(checkpoint, device="cpu")
        >>> type(model).__name__, model.dtype
        ('LlavaMistralForCausalLM', torch.float32)
    """
    import torch

    from umed_plugin.checkpoints.precision import answering_device

    device = answering_device(device)
    dtype = dtype or torch.float32
    path = Path(path)
    if not is_lora(path):
        tokenizer, model = _load_full(path, dtype)
    else:
        refuse_transformers_adapter(path)
        settings, config = adapter_settings(path), read_config(path)
        tokenizer, model = _load_full(find_base(path, base), dtype, config)
        model = _wrap_adapter(model, path, settings)
    model = model.to(device=device, dtype=dtype).eval()
    tower = model.get_vision_tower() if not is_lora(path) else model.get_base_model().get_vision_tower()
    return tokenizer, model, tower.image_processor


def _load_full(path: Path, dtype: Any, config: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """(tokenizer, model) of a full checkpoint, with its own tower weights; ``config`` overrides values."""
    import importlib

    own = read_config(path)
    changes = {key: config[key] for key in READ_WHEN_ANSWERING if key in config} if config else {}
    _check_tower(path, own)
    check_plain([*weight_files(path), *_files_of_tower(own)])
    refuse_missing(path, own)
    module, name = FAMILIES[own["model_type"]]
    model_class = getattr(importlib.import_module(module), name)
    with _quiet(), behind_the_door():
        model_config = model_class.config_class.from_pretrained(path, **changes)
        # In the requested dtype at once: 7 billion parameters in float32 are 28 GB. A tower inside the checkpoint is built, and
        # filled, while the model is: its weights need memory from the start.
        # transformers 4 fills no embeddings of that kind where the files hold a tied tensor by its second name alone.
        lean = not own.get(UNFREEZE) and EMBEDDING in names_in(path)
        model = model_class.from_pretrained(path, config=model_config, torch_dtype=dtype, low_cpu_mem_usage=lean)
        tokenizer = load_tokenizer(path)
        tower = model.get_vision_tower()
        # Of a LoRA folder the configuration says with which tower it was trained: --umed_tower_weights.
        original = config is not None and left_out_own_tower(config)
        if original or not tower.is_loaded:
            tower.is_loaded = False  # built with the model, it holds the checkpoint's own weights
            tower.load_model()
    _add_image_tokens(tokenizer, model)
    inside = {} if original else tower_tensors(path)
    if not inside:
        refuse_missing_of_tower(tower.vision_tower_name)
    else:
        inside = as_in(tower.state_dict(), inside)
        misfit = tower_misfit(tower.state_dict(), inside)
        if misfit:
            raise UmedError(
                f"{path}: its vision-tower weights do not fit {tower.vision_tower_name}, the mm_vision_tower of its "
                f"config.json: {misfit}. Set mm_vision_tower to the tower with which the checkpoint was trained."
            )
        tower.load_state_dict(inside, strict=False)
    return tokenizer, model


def tower_tensors(checkpoint: Path | str, cache_dir: str | None = None) -> dict[str, Any]:
    """The vision tower's weights inside a checkpoint (folder or Hub), by their names in LLaVA's tower; empty if none."""
    tensors = {}
    for file in weight_files(checkpoint, TOWER, cache_dir):
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            check_plain([file])
            with safe_open(str(file), framework="pt", device="cpu") as stream:
                names = [name for name in list(stream.keys()) if name.startswith(TOWER)]
                tensors.update({name[len(TOWER) :]: stream.get_tensor(name) for name in names})
        else:
            tensors.update({n[len(TOWER) :]: t for n, t in read_tensors(file).items() if n.startswith(TOWER)})
    return {name: tensor for name, tensor in tensors.items() if not is_buffer(name)}


def tower_misfit(own: dict[str, Any], inside: dict[str, Any]) -> str | None:
    """Why the weights ``inside`` a checkpoint cannot replace a tower's ``own`` ones, as text; None if they fit."""
    own = {name: tensor for name, tensor in own.items() if not is_buffer(name)}
    missing, unknown = sorted(set(own) - set(inside)), sorted(set(inside) - set(own))
    shapes = [
        f"{name} is {tuple(inside[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(inside))
        if inside[name].shape != own[name].shape
    ]
    if not (missing or unknown or shapes):
        return None
    return (
        f"{len(missing)} tensors are missing, {len(unknown)} are unknown, {len(shapes)} have another shape "
        f"({'; '.join([*shapes, *missing, *unknown][:3])})"
    )


def _check_tower(path: Path, config: dict[str, Any]) -> None:
    tower = config.get("mm_vision_tower", config.get("vision_tower"))
    if tower is None:
        raise UmedError(
            f"{path}/config.json: has no mm_vision_tower, so this model cannot see images. Needed: a LLaVA checkpoint."
        )
    if not os.path.isdir(tower) and not is_hub_tower(tower):
        relative = "" if os.path.isabs(tower) else " in the working folder"
        raise UmedError(
            f"{path}/config.json: mm_vision_tower is {tower}, which does not exist{relative}. If the tower was moved, set "
            "mm_vision_tower to its new absolute path."
        )


def _files_of_tower(config: dict[str, Any]) -> list[Path]:
    """Weight files of a tower that is a folder on this machine."""
    tower = config.get("mm_vision_tower", config.get("vision_tower"))
    return weight_files(tower) if tower and os.path.isdir(tower) else []


def _add_image_tokens(tokenizer: Any, model: Any) -> None:
    """Add the tokens that the configuration requests and the tokenizer lacks, as LLaVA's loader does after loading."""
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN

    if getattr(model.config, "mm_use_im_patch_token", True):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(model.config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


def _wrap_adapter(model: Any, lora_dir: Path, settings: dict[str, Any]) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    adapter, others = adapter_tensors(lora_dir, settings)
    unknown = model.load_state_dict(as_in(model.state_dict(), others), strict=False).unexpected_keys
    if unknown:
        raise UmedError(f"{lora_dir / NON_LORA}: contains {unknown[0]!r}, which the base does not have. Check --base.")
    config = LoraConfig.from_pretrained(lora_dir)
    with torch.no_grad():
        try:
            model = get_peft_model(model, config)
        except ValueError as error:
            raise UmedError(
                f"{lora_dir / ADAPTER}: PEFT {version('peft')} cannot use its settings: {error}. Its target_modules must name "
                "layers of the base as this PEFT reads them. Check --base, or merge the adapter into it with umed merge."
            ) from None
        adapter = as_in([name.replace(".default", "") for name in model.state_dict()], adapter)
        _refuse_misplaced(model, adapter, lora_dir)
        set_peft_model_state_dict(model, adapter)
    return model


def _refuse_misplaced(model: Any, adapter: dict[str, Any], lora_dir: Path) -> None:
    """Refuse an adapter whose tensors are not the low-rank matrices of the model: PEFT says nothing of those that it leaves out.

    Raises:
        UmedError: one of either has no place in the other. The tower may have matrices that the training left at zero.
    """
    own = {name.replace(".default", "").replace(".base_layer", "") for name in model.state_dict()}
    unknown = [name for name in adapter if name.replace(".base_layer", "") not in own]
    if unknown:
        raise UmedError(
            f"{lora_dir}: its adapter contains {unknown[0]!r} ({len(unknown)} such in all), which the base does not have. Check "
            "--base."
        )
    untrained = sorted(n for n in own if ".lora_" in n and ".vision_tower." not in n and n not in adapter)
    if untrained:
        raise UmedError(untrained_fault(lora_dir, [layer_of(name) for name in untrained]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' warnings, and its bars.

    It warns of tower weights, which `_load_full` uses right afterwards, and of missing ones, which `refuse_missing` has refused.
    """
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with library_bars():
            yield
    finally:
        logger.setLevel(level)
