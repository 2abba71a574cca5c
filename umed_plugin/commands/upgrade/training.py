"""The training command of a stage: LLaVA's script, the launcher that starts it, and the flags of LLaVA and the plugin."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Union

from umed_plugin.checkpoints.added_tokens import flags_that_add
from umed_plugin.checkpoints.folder import UMED_TEMPLATES, read_config
from umed_plugin.commands.machine import Machine
from umed_plugin.commands.memory import ModelSize, Work, on_this_stack
from umed_plugin.commands.memory_extras import Extras, ImageEncoder
from umed_plugin.commands.upgrade.origin import Origin
from umed_plugin.commands.upgrade.settings import Rewarding, Settings, Stage
from umed_plugin.errors import UmedError
from umed_plugin.flags.names import BOX_REWARDS
from umed_plugin.flags.rules import TUNING, parse_keep

# Paths that differ from run to run; `flags` of the settings must not set them either.
PATH_FLAGS = ("model_name_or_path", "data_path", "image_folder", "output_dir")
# From LLaVA's finetune_task_lora.sh, for what the settings have no key for. `flags` may override these.
_DEFAULTS = {"lr_scheduler_type": "cosine", "weight_decay": 0.0, "logging_steps": 1, "report_to": "none"}
# Log sampled answers with their rewards, for the report.
_REWARDING_DEFAULTS = {"umed_log_candidates": 10}


def training_flags(
    name: str, stage: Stage, settings: Settings, origin: Origin, *, validated: bool = False
) -> dict[str, Any]:
    """LLaVA's and the plugin's flags of a stage, except `PATH_FLAGS`.

    Args:
        name: of the stage.
        stage: its settings.
        settings: all settings, filled in.
        origin: the checkpoint to upgrade; training must agree with its configuration.
        validated: whether held-out records are answered every ``save_steps`` steps, unless ``flags`` says otherwise.

    Raises:
        UmedError: ``flags`` sets a flag for which the settings have a key.
    """
    flags = {
        "umed_stage": name,
        **_model_flags(settings, origin),
        **_schedule_flags(stage, settings),
        **_precision_flags(settings),
        **_method_flags(name, settings),
        "deepspeed": settings.deepspeed,
        **(_rewarding_flags(stage) if isinstance(stage, Rewarding) else {}),
    }
    taken = sorted(set(stage.flags) & {*flags, *PATH_FLAGS})
    if taken:
        raise UmedError(
            f"{name}.flags: {', '.join(taken)} cannot be set there: other settings of the run, or the checkpoint, determine it. "
            "Remove it."
        )
    defaults = {**_DEFAULTS, **(_REWARDING_DEFAULTS if isinstance(stage, Rewarding) else {})}
    defaults |= {"umed_val_every": stage.save_steps} if validated else {}
    return {flag: value for flag, value in {**flags, **defaults, **stage.flags}.items() if value is not None}


def trial_flags(stage: Rewarding) -> dict[str, Any]:
    """What the trial of ``rewarding: auto`` sets whatever stage 2's ``flags`` say: it logs each step and answers at its end.

    It begins unchecked: a refusal would end the run before the decision.
    """
    each_step = {"logging_strategy": "steps", "logging_steps": 1}
    return {"umed_val_every": stage.trial_steps, **each_step, **unchecked_start(stage)}


def unchecked_start(stage: Rewarding) -> dict[str, Any]:
    """No look for boxes before the first step: the trial of ``rewarding: auto`` decides by its own answers."""
    return {"umed_start_check": 0} if {*BOX_REWARDS} & {*stage.rewards} else {}


def _model_flags(settings: Settings, origin: Origin) -> dict[str, Any]:
    config = origin.config
    return {
        "version": UMED_TEMPLATES[config["model_type"]],
        "vision_tower": config.get("mm_vision_tower", config.get("vision_tower")),
        "mm_vision_select_layer": config.get("mm_vision_select_layer", -2),
        "mm_vision_select_feature": config.get("mm_vision_select_feature", "patch"),
        "mm_projector_type": config.get("mm_projector_type", "linear"),
        "mm_use_im_start_end": config.get("mm_use_im_start_end", False),
        "mm_use_im_patch_token": _use_im_patch_token(settings, origin),
        "image_aspect_ratio": origin.image_mode,
        "model_max_length": settings.model_max_length,
        "umed_on_bad_image": settings.on_bad_image,
        # Left out where unset, so that the `flags` of one stage may set them.
        **({"umed_augment": True} if settings.augment else {}),
        **({"umed_label_share": settings.label_share} if settings.label_share is not None else {}),
    }


def _use_im_patch_token(settings: Settings, origin: Origin) -> bool:
    """What the checkpoint's ``config.json`` says. Where it says nothing, LLaVA's default can add a row, which LoRA loses."""
    name = "mm_use_im_patch_token"
    unsaid = name not in origin.config and settings.method == "lora"
    return not (unsaid and flags_that_add({name: True}, origin.full)) and bool(origin.config.get(name, True))


def _schedule_flags(stage: Stage, settings: Settings) -> dict[str, Any]:
    return {
        "learning_rate": stage.learning_rate,
        "mm_projector_lr": stage.projector_learning_rate,
        "num_train_epochs": stage.epochs,
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch_size,
        "gradient_accumulation_steps": stage.accumulation,
        "warmup_ratio": stage.warmup_ratio,
        "save_strategy": "steps",
        "save_steps": stage.save_steps,
        "save_total_limit": 1,
        "seed": settings.seed,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "dataloader_num_workers": 4 if settings.device == "cuda" else 0,
        "lazy_preprocess": True,
    }


def _precision_flags(settings: Settings) -> dict[str, Any]:
    bf16 = settings.precision == "bf16"
    if settings.device == "cpu":
        return {"use_cpu": True, "bf16": bf16}
    return {"bf16": bf16, "fp16": settings.precision == "fp16", "tf32": bf16 or None}


def _method_flags(name: str, settings: Settings) -> dict[str, Any]:
    if settings.method == "full":
        return {"lora_enable": False}
    lora = settings.lora
    flags = {"lora_enable": True, "lora_r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": _dropout(name, settings)}
    return {
        **flags,
        "umed_lora_targets": ",".join(lora.targets) if lora.targets else None,
        "bits": settings.bits if settings.bits != 16 else None,
    }


def _dropout(name: str, settings: Settings) -> float:
    """Of the adapter. Stage 2 turns it off whatever the flag says."""
    return settings.lora.dropout if name == TUNING else 0.0


def what_is_trained(name: str, settings: Settings) -> str:
    """A sentence on the weights that a stage trains, for a dry run."""
    stage: Stage = getattr(settings, name)
    projector = "the projector is frozen" if stage.flags.get("freeze_mm_mlp_adapter") else "with the projector"
    rate = stage.flags.get("umed_tower_lr")
    tower = "the vision tower is frozen" if rate is None else f"the vision tower is trained at {rate:g}"
    if settings.method == "full":
        # LLaVA's --freeze_backbone freezes all but the layer that gives the logits.
        part = "the output layer alone" if stage.flags.get("freeze_backbone") else "all weights"
        return f"trains {part} of the language model, {projector}; {tower}"
    lora = settings.lora
    layers = " and ".join(lora.targets) if lora.targets else "all linear layers"
    adapter = f"a LoRA adapter of rank {lora.r}, alpha {lora.alpha}, dropout {_dropout(name, settings):g}"
    return f"trains {adapter} on {layers}, {projector}; {tower}"


def _rewarding_flags(stage: Rewarding) -> dict[str, Any]:
    weights = stage.reward_weights
    return {
        "umed_algorithm": stage.algorithm,
        "umed_num_candidates": stage.candidates,
        "umed_rewards": ",".join(stage.rewards),
        "umed_reward_weights": ",".join(map(_weight, weights)) if weights else None,
        "umed_temperature": stage.temperature,
        "umed_max_new_tokens": stage.max_new_tokens,
    }


def _weight(weight: Union[float, str]) -> str:
    return weight if isinstance(weight, str) else f"{weight:g}"


def launcher(settings: Settings) -> tuple[str, ...]:
    """Start LLaVA's script under ``umed-run``: with Python or torchrun.

    With a DeepSpeed configuration too: DeepSpeed's own launcher ignores CUDA_VISIBLE_DEVICES where it is told how many GPUs to
    use, and would train on other people's.
    """
    umed_run = program("umed-run", "umed_plugin.launch")
    processes = str(settings.processes)
    if settings.device == "cpu" and settings.processes == 1 and settings.deepspeed is None:
        return (*umed_run, sys.executable, "-m", "llava.train.train_mem")
    # torchrun for one GPU process as well: under plain Python, transformers uses all visible GPUs (DataParallel).
    # Not --standalone: before torch 2.1 it uses one fixed port, on which two runs would collide.
    torchrun = [*program("torchrun", "torch.distributed.run"), "--rdzv_backend", "c10d"]
    torchrun += ["--rdzv_endpoint", f"localhost:{settings.master_port}", "--nproc_per_node", processes]
    return (*umed_run, *torchrun, "-m", "llava.train.train_mem")


def program(name: str, module: str) -> list[str]:
    """A program of this Python's environment, by its full path: the one on PATH may belong to another environment."""
    beside = Path(sys.executable).parent / name
    return [str(beside)] if beside.is_file() else [sys.executable, "-m", module]


def work_of(name: str, settings: Settings, machine: Machine) -> Work:
    """What a process of a stage holds in memory at a time, on this machine."""
    stage = getattr(settings, name)
    rewarding = isinstance(stage, Rewarding)
    work = Work(
        rank=settings.lora.r if settings.method == "lora" else 0,
        half=settings.precision != "fp32",
        checkpointing=bool(settings.gradient_checkpointing),
        fused=True,
        ddp=settings.device == "cuda" and settings.deepspeed is None,
        rows=stage.batch_size,
        sampled=_sampled_together(stage) if rewarding else 0,
        candidates=stage.candidates if rewarding else 0,
        answer=stage.max_new_tokens if rewarding else 0,
        bits=settings.bits,
        logit_rows=int(stage.flags.get("umed_logit_rows", Work.logit_rows)),
        extras=_extras(stage) if name == TUNING else Extras(),
    )
    return on_this_stack(work, machine)


def _sampled_together(stage: Rewarding) -> int:
    """Questions of which a process samples the answers at a time."""
    return int(stage.flags.get("umed_sampling_batch_size", 0)) or stage.batch_size * stage.accumulation


def _extras(stage: Stage) -> Extras:
    """The further losses that a stage's `flags` ask for. What is wrong with a flag is said when the stage begins."""
    flags, keeps, teacher, tower = stage.flags, False, 0, "umed_tower_lr" in stage.flags
    with suppress(ValueError):
        keeps = parse_keep(str(flags.get("umed_keep", 0))).kl > 0
    if keeps and "umed_teacher" in flags:
        with suppress(UmedError):
            teacher = ModelSize.of(read_config(str(flags["umed_teacher"]))).weights
    taught = tower and "umed_tower_teacher" in flags and flags.get("umed_tower_teacher_weight") != 0
    return Extras(keeps, teacher, tower, _encoder(str(flags["umed_tower_teacher"])) if taught else None)


def _encoder(file: str) -> ImageEncoder:
    """The sizes of a tower's teacher; those of SAM's ViT-B where the file cannot be read."""
    from umed_plugin.checkpoints.sam_encoder import read_sam_file

    try:
        found = read_sam_file(file)
    except UmedError:
        return ImageEncoder()
    settings = found.settings
    cells = (settings["image_size"] // settings["patch_size"]) ** 2
    weights = sum(math.prod(tensor.shape) for tensor in found.tensors.values())
    return ImageEncoder(weights, settings["num_attention_heads"], cells, settings["output_channels"])
