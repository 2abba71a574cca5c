"""What lies in a LoRA folder: the adapter, its settings, the other trained tensors, and the base that it names."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.folder import ADAPTER, NON_LORA, is_lora, read_object, read_tensors
from umed_plugin.checkpoints.pickles import read_pickle
from umed_plugin.checkpoints.plain_lora import settings_fault, tensors_fault
from umed_plugin.checkpoints.safe_loading import check_plain
from umed_plugin.checkpoints.stored import read_safetensors
from umed_plugin.errors import UmedError

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def named_base(lora_dir: Path, named: Any) -> Any:
    """The base that an adapter names. A path that was typed relative to another folder is looked for above the adapter's own."""
    if not isinstance(named, str) or Path(named).is_absolute() or Path(named).is_dir():
        return named
    above = (folder / named for folder in Path(os.path.abspath(lora_dir)).parents)
    return next((str(path) for path in above if path.is_dir()), named)


def find_base(lora_dir: Path, base: Path | str | None) -> Path:
    """The base of a LoRA folder: ``base`` if given, else the one that its adapter names.

    Raises:
        UmedError: it is not on this machine, is a LoRA folder itself, or has not the weights on which the adapter was trained.
    """
    from umed_plugin.checkpoints.trained_on import check_trained_on

    folder = base or named_base(lora_dir, read_object(lora_dir / ADAPTER).get("base_model_name_or_path"))
    if not folder or not Path(folder).is_dir():
        raise UmedError(
            f"{lora_dir}: is a LoRA folder over {folder!r}, which is not a folder on this machine. Pass the checkpoint on which "
            "it was trained with --base."
        )
    if is_lora(folder):
        raise UmedError(
            f"--base {folder}: is a LoRA folder itself. Merge it first: umed merge {shlex.quote(str(folder))} --base CKPT "
            "--out DIR"
        )
    check_trained_on(lora_dir, Path(folder))
    return Path(folder)


def refuse_transformers_adapter(lora_dir: Path) -> None:
    """Refuse an adapter that was trained over transformers' form of LLaVA, with TRL or peft.

    Raises:
        UmedError: its tensors are named as in that form.
    """
    for name in _ADAPTER_FILES:
        file = lora_dir / name
        if not file.is_file():
            continue
        check_plain([file])
        names = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file).tensors
        if any(".language_model." in tensor for tensor in names):
            raise UmedError(
                f"{lora_dir}: is an adapter of transformers' form of LLaVA, as TRL trains it. Merge it there first: "
                "model = PeftModel.from_pretrained(model, FOLDER).merge_and_unload(); model.save_pretrained(MERGED). Then "
                "convert it to LLaVA's layout: umed convert MERGED --out DIR"
            )


def adapter_settings(lora_dir: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a LoRA folder. PEFT must not read one that this refuses: some kinds open files that they name.

    Raises:
        UmedError: it is not that of plain LoRA.
    """
    config = read_object(lora_dir / ADAPTER)
    fault = settings_fault(config)
    if fault is not None:
        raise UmedError(f"{lora_dir / ADAPTER}: {fault}")
    return config


def adapter_tensors(lora_dir: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a LoRA folder: (the adapter's tensors under PEFT's names, the other trained tensors under the base's names).

    Args:
        lora_dir: the folder.
        settings: its `adapter_settings`.

    Raises:
        UmedError: a file is missing, its tensors are not those of its settings, or a low-rank matrix lacks its other half: its
            layer would stay untrained.
    """
    files = [lora_dir / name for name in _ADAPTER_FILES if (lora_dir / name).is_file()]
    if not files:
        raise UmedError(f"{lora_dir}: has {ADAPTER} but neither adapter_model.safetensors nor adapter_model.bin.")
    if not (lora_dir / NON_LORA).is_file():
        raise UmedError(
            f"{lora_dir}: has no {NON_LORA} (the trained projector), which LLaVA writes at the end of training only. Use the "
            "output folder of a finished run, not one of its checkpoint-N folders."
        )
    others = {name.removeprefix("base_model.model."): t for name, t in read_tensors(lora_dir / NON_LORA).items()}
    # Another library than PEFT saves the adapter's name too, which PEFT would add once more.
    adapter = {_plain_name(name): tensor for name, tensor in read_tensors(files[0]).items()}
    lacking = missing_halves(adapter)
    if lacking:
        raise UmedError(
            f"{files[0]}: lacks {lacking[0]!r} ({len(lacking)} such in all), the other half of a low-rank change. The file is "
            "not whole: copy it again from the training's output folder."
        )
    fault = tensors_fault(settings, {name: tuple(tensor.shape) for name, tensor in adapter.items()})
    if fault is not None:
        raise UmedError(f"{files[0]}: {fault}")
    return adapter, others


def _plain_name(name: str) -> str:
    return re.sub(r"(\.lora_[AB])\.default\.weight$", r"\1.weight", name)


def missing_halves(adapter: Collection[str]) -> list[str]:
    """Names that an adapter of such tensor names lacks: a change is the product of its lora_B and its lora_A.

    Example:
        >>> missing_halves(["q_proj.lora_A.weight", "q_proj.lora_B.weight", "v_proj.lora_A.weight"])
        ['v_proj.lora_B.weight']
    """
    halves = ((".lora_A.", ".lora_B."), (".lora_B.", ".lora_A."))
    wanted = [
        name.replace(one, other)
        for name in adapter
        for one, other in halves
        if one in name and name.endswith(".weight")
    ]
    return [name for name in wanted if name not in adapter]
