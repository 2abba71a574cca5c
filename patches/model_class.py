"""Choose the model class by the checkpoint's ``model_type``.

Target: the global `LlavaLlamaForCausalLM` of `llava.train.train`.
Why: `train()` builds only Llama or MPT. LLaVA-Med 1.5 is ``llava_mistral``: loaded as Llama it warns, trains, and saves mixed
configurations. LLaVA-Med 1.0 is a Llama with ``model_type`` ``llava``.
Versions: LLaVA 1.2.x.
Delete when: LLaVA's `train()` reads the configuration before it chooses a class.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.folder import ADAPTER, ORIGINAL_TOWER
from umed_plugin.checkpoints.folder import FAMILIES as LLAVA_FAMILIES
from umed_plugin.checkpoints.label_share import largest_share
from umed_plugin.checkpoints.missing_tensors import lacking_in_tower, names_in, refuse, refuse_missing, tower_names
from umed_plugin.errors import UmedError, warn
from umed_plugin.flags.checkpoint_settings import find_contradictions, find_departures, find_other_share
from umed_plugin.flags.rules import REWARDING, TUNING
from umed_plugin.flags.sharding import fsdp_fault
from umed_plugin.patches.training_run import LLAVA, TRAIN, TrainingRun
from umed_plugin.patching import Patch, Recorder, Target

# train() also accepts plain language models, to which it adds the projector.
FAMILIES = {**LLAVA_FAMILIES, "llama": LLAVA_FAMILIES["llava_llama"], "mistral": LLAVA_FAMILIES["llava_mistral"]}


def change(recorder: Recorder) -> None:
    """Rebind the class on which `train()` calls `from_pretrained`."""
    from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

    llava_train = sys.modules["llava.train.train"]
    stock = llava_train.LlavaLlamaForCausalLM

    class ByModelType(stock):  # type: ignore[valid-type, misc]
        """Stands in for the Llama class; `from_pretrained` returns an instance of LLaVA's own class."""

        @classmethod
        def from_pretrained(cls, name: str, *args: Any, **keywords: Any) -> Any:
            config = read_config(name, keywords.get("cache_dir"))
            _, class_name = FAMILIES.get(str(config.get("model_type")), FAMILIES["llama"])
            chosen = LlavaMistralForCausalLM if class_name == LlavaMistralForCausalLM.__name__ else stock
            return chosen.from_pretrained(name, *args, **keywords)

    recorder.replace(llava_train, "LlavaLlamaForCausalLM", ByModelType)


def read_config(name: str, cache_dir: str | None = None) -> dict[str, Any]:
    """The checkpoint's ``config.json``, from a folder or the hub, without building a configuration object."""
    from transformers import PretrainedConfig

    return PretrainedConfig.get_config_dict(name, cache_dir=cache_dir)[0]


def find_faults(run: TrainingRun) -> list[str]:
    """Why the checkpoint cannot be trained in a stage. Without --umed_stage, stock LLaVA behaviour applies."""
    if not run.active:
        return []
    name = run.model_args.model_name_or_path
    unfinished = _part_of_a_checkpoint(Path(name))
    if unfinished is not None:
        return [f"--model_name_or_path {name}: {unfinished}"]
    try:
        config = read_config(name, run.training_args.cache_dir)
    except (OSError, ValueError) as error:
        return [f"--model_name_or_path {name}: has no readable config.json ({str(error).splitlines()[0]})"]
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        return [
            f"--model_name_or_path {name}: model_type is {model_type!r}, which is not a LLaVA checkpoint. Allowed: "
            f"{', '.join(sorted(FAMILIES))}. Use a LLaVA-Med checkpoint, such as microsoft/llava-med-v1.5-mistral-7b."
        ]
    faults = []
    has_projector = "mm_vision_tower" in config or run.model_args.pretrain_mm_mlp_adapter is not None
    if not model_type.startswith("llava") and not has_projector:
        faults.append(
            f"--model_name_or_path {name}: model_type {model_type!r} without mm_vision_tower is a language model without a "
            "projector. Use a LLaVA checkpoint, or give --pretrain_mm_mlp_adapter."
        )
    if "mpt" in name:
        faults.append(
            f"--model_name_or_path {name}: LLaVA treats any path with 'mpt' in it as an MPT model. "
            "Rename the folder, or pass a symbolic link to it."
        )
    return [
        *faults,
        *_fsdp_faults(run, config),
        *_missing_tensors(run, config),
        *find_contradictions(config, run.model_args),
    ]


def _fsdp_faults(run: TrainingRun, config: dict[str, Any]) -> list[str]:
    """Why a checkpoint cannot be trained under FSDP; the flags' own check refuses it in stage 2."""
    fault = fsdp_fault(run.training_args.fsdp, config)
    return [fault] if fault is not None and run.flags.umed_stage == TUNING else []


def _missing_tensors(run: TrainingRun, config: dict[str, Any]) -> list[str]:
    """Why a checkpoint or tower on this machine lacks weights: transformers warns in a long log, and trains random ones."""
    name, faults = run.model_args.model_name_or_path, []
    if _has_weights(Path(name)):
        try:
            refuse_missing(name, config, projector=run.model_args.pretrain_mm_mlp_adapter is None)
        except UmedError as error:
            faults.append(f"--model_name_or_path {error}")
    return faults + _missing_of_tower(run)


def _missing_of_tower(run: TrainingRun) -> list[str]:
    """Why the folder of ``--vision_tower`` lacks weights that are trained with. A whole tower in the checkpoint replaces all."""
    tower = run.model_args.vision_tower
    if tower is None or not os.path.isdir(tower):
        return []
    try:
        if lacking_in_tower(Path(tower)):
            refuse(lacking_in_tower(Path(tower), _tower_inside(run)), tower)
    except UmedError as error:
        return [f"--vision_tower {error}"]
    return []


def _tower_inside(run: TrainingRun) -> list[str]:
    """Names of the tower in the checkpoint; none if it is left out (see `patches/vision_tower.py`)."""
    if run.flags.umed_tower_weights == ORIGINAL_TOWER:
        return []
    try:
        return tower_names(names_in(run.model_args.model_name_or_path, run.training_args.cache_dir))
    except UmedError:  # said of --model_name_or_path
        return []


def _part_of_a_checkpoint(folder: Path) -> str | None:
    """Why a folder holds only what a training adds to a checkpoint: LLaVA would load the base without the trained projector."""
    if (folder / ADAPTER).is_file():
        return "is a LoRA adapter, not a checkpoint. Merge it first (`umed merge`), and train the merged checkpoint."
    if (folder / "mm_projector.bin").is_file() and not _has_weights(folder):
        return "holds a trained projector alone. Start from its base with --pretrain_mm_mlp_adapter FOLDER/mm_projector.bin."
    return None


def _has_weights(folder: Path) -> bool:
    return any((*folder.glob("*.safetensors*"), *folder.glob("pytorch_model*")))


def warn_of_departures(run: TrainingRun) -> None:
    """Say, once per run, where the flags depart from what the checkpoint was trained with."""
    if run.active and run.training_args.process_index == 0:
        config = read_config(run.model_args.model_name_or_path, run.training_args.cache_dir)
        remarks = find_departures(config, run.model_args, run.data_args)
        if run.flags.umed_stage == REWARDING:
            had = largest_share(config, run.model_args.pretrain_mm_mlp_adapter)
            remarks += find_other_share(had, run.flags.umed_label_share)
        for remark in remarks:
            warn(remark)


PATCH = Patch(
    name="model_class",
    targets=(
        TRAIN,
        Target(
            "llava.train.train:LlavaLlamaForCausalLM",
            LLAVA,
            ("8953c12ea9387cded167f8712f3dc1adec07117395acc4f5c55424050c9fc811",),
        ),
        Target(
            "llava.model.language_model.llava_mistral:LlavaMistralForCausalLM",
            LLAVA,
            ("35ee835e96234834d2927240f971df1a874a3aca544060054805fe081137aa77",),
        ),
    ),
    why="train() loads every checkpoint as Llama, even LLaVA-Med 1.5 (Mistral)",
    delete_when="LLaVA's train() chooses the class by model_type",
    change=change,
)
