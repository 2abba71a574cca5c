"""The one check of all flags, before the model is loaded: flags without effect, values out of range, conflicts with LLaVA's.

What holds for one flag stands in its field (`umed_plugin.flags.groups`) and is only read here. The functions below add what
several flags, or a flag and LLaVA's own, must agree on. Imports the standard library alone.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from umed_plugin.errors import UsageError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.needs import rules_of
from umed_plugin.flags.rewards import find_judge_faults, find_reward_faults
from umed_plugin.flags.rules import CREATED, EXISTING, REWARDING, STAGES, TUNING
from umed_plugin.flags.sharding import find_launcher_faults, find_rate_faults, find_rate_remarks, is_zero_3
from umed_plugin.remote.settings import rollout_server_faults


def find_faults(
    flags: UmedFlags, model_args: Any, data_args: Any, training_args: Any, *, files: bool = True, goes_on: bool = False
) -> list[str]:
    """All faults of the flags, one sentence each; empty when the flags are valid together.

    Args:
        flags: the plugin's.
        model_args, data_args, training_args: LLaVA's.
        files: whether the files and folders that the flags name must exist.
        goes_on: whether the run goes on from a checkpoint of its own. What it began with is a remark then; see `find_remarks`.
    """
    values = _value_faults(flags)
    if flags.umed_stage not in (None, *STAGES):
        return values[:1]  # that of the stage, on which all else depends
    return [
        *_flags_without_effect(flags),
        *values,
        *_group_faults(flags),
        *find_reward_faults(flags, imported=flags.umed_stage == REWARDING),
        *(find_judge_faults(flags) if flags.umed_stage == REWARDING else []),
        *(_file_faults(flags, data_args) if flags.umed_stage and files else []),
        *(_conflicts_with_llava(flags, model_args, data_args, training_args) if flags.umed_stage else []),
        *(find_rate_faults(flags, training_args) if flags.umed_stage and not goes_on else []),
    ]


def check(flags: UmedFlags, model_args: Any, data_args: Any, training_args: Any) -> None:
    """Refuse invalid flags, with all faults at once.

    Raises:
        UsageError: with one line for each fault.
    """
    raise_faults(find_faults(flags, model_args, data_args, training_args))


def find_remarks(flags: UmedFlags, training_args: Any, *, goes_on: bool = False) -> list[str]:
    """What a stage does under valid flags and a user may not expect, one sentence each; the run says it and goes on.

    Args:
        flags: the plugin's.
        training_args: LLaVA's.
        goes_on: as for `find_faults`.
    """
    remarks = _remarks_of_rewarding(training_args) if flags.umed_stage == REWARDING else []
    remarks += find_rate_remarks(flags, training_args) if goes_on else []
    takes_pictures = {"tensorboard", "wandb"} & {*(getattr(training_args, "report_to", None) or [])}
    if flags.umed_val_pictures != UmedFlags().umed_val_pictures and not takes_pictures:
        remarks.append("--umed_val_pictures has no effect without --report_to tensorboard or wandb.")
    return remarks


def _remarks_of_rewarding(training_args: Any) -> list[str]:
    remarks = []
    for name in ("group_by_modality_length", "group_by_length"):
        if getattr(training_args, name, False):
            remarks.append(
                f"--{name} has no effect in --umed_stage rewarding: its batches are queries, in an order of their own."
            )
    if getattr(training_args, "label_smoothing_factor", 0):
        remarks.append("--label_smoothing_factor has no effect in --umed_stage rewarding: it supervises no labels.")
    return remarks


def raise_faults(faults: list[str]) -> None:
    """Raise one UsageError that lists ``faults``, unless there are none."""
    if faults:
        raise UsageError("invalid training flags:\n" + "\n".join(f"  - {fault}" for fault in faults))


def _flags_without_effect(flags: UmedFlags) -> list[str]:
    """Flags that were set and would be ignored: the user expects an effect, so each is a fault."""
    faults = []
    for flag in dataclasses.fields(flags):
        if getattr(flags, flag.name) == flag.default:
            continue
        rules = rules_of(flag)
        if flags.umed_stage is None:
            stages = " or ".join(rules.stages)
            faults.append(f"--{flag.name} has no effect without --umed_stage. Add --umed_stage {stages}.")
        elif flags.umed_stage not in rules.stages:
            faults.append(
                f"--{flag.name} has no effect in --umed_stage {flags.umed_stage}, only in {rules.stage}. "
                f"{rules.instead or 'Remove it.'}"
            )
        elif rules.needs is not None and not rules.needs.met(flags):
            faults.append(f"--{flag.name} has no effect without {rules.needs.words}.")
    return faults


def _value_faults(flags: UmedFlags) -> list[str]:
    """Values that their own fields do not allow."""
    faults = (rules_of(flag).value_fault(flag.name, getattr(flags, flag.name)) for flag in dataclasses.fields(flags))
    return [fault for fault in faults if fault is not None]


def _group_faults(flags: UmedFlags) -> list[str]:
    faults = []
    if flags.umed_augment and flags.umed_feature_cache is not None:
        faults.append(
            "--umed_feature_cache does not work with --umed_augment: each epoch shows other pixels, so no features could be read "
            "again. Remove one of them."
        )
    if flags.umed_algorithm == "grpo" and flags.umed_num_candidates == 1:
        faults.append("--umed_num_candidates 1: must be 2 or more with grpo (a group of one has no advantage).")
    return faults


def _file_faults(flags: UmedFlags, data_args: Any) -> list[str]:
    """Files and folders that must exist, LLaVA's and those whose fields name a folder."""
    faults = []
    if flags.umed_recipe is None and data_args.data_path is None:
        faults.append("no training data: give --umed_recipe or --data_path.")
    if data_args.data_path is not None and not os.path.isfile(data_args.data_path):
        faults.append(f"--data_path {data_args.data_path}: there is no such file.")
    if data_args.image_folder is not None and not os.path.isdir(data_args.image_folder):
        faults.append(f"--image_folder {data_args.image_folder}: there is no such folder.")
    for flag in dataclasses.fields(flags):
        folder, kind = getattr(flags, flag.name), rules_of(flag).folder
        if folder is not None and kind == EXISTING and not os.path.isdir(folder):
            faults.append(f"--{flag.name} {folder}: there is no such folder.")
        if folder is not None and kind == CREATED and os.path.isfile(folder):
            faults.append(f"--{flag.name} {folder}: is a file. Give a folder; it is created if it does not exist.")
    return faults


def _conflicts_with_llava(flags: UmedFlags, model_args: Any, data_args: Any, training_args: Any) -> list[str]:
    """Faults between our flags and LLaVA's own."""
    faults = []
    if model_args.vision_tower is None:
        faults.append(
            "--vision_tower is missing: both stages train on images. LLaVA-Med 1.5: openai/clip-vit-large-patch14-336."
        )
    if data_args.image_aspect_ratio not in ("pad", "square"):
        faults.append(
            f"--image_aspect_ratio {data_args.image_aspect_ratio}: boxes are defined for pad and square (LLaVA's default)."
        )
    faults += _faults_of_bits(training_args)
    faults += _faults_of_validation(flags, training_args)
    faults += _faults_of_several_gpus(flags, training_args)
    faults += find_launcher_faults(training_args)
    if getattr(training_args, "lora_enable", False) and getattr(model_args, "tune_mm_mlp_adapter", False):
        faults.append(
            "--lora_enable True does not work with --tune_mm_mlp_adapter True: LLaVA then trains the projector alone, and the "
            "adapter learns nothing. LoRA trains the projector too. Remove one of them."
        )
    if flags.umed_stage == TUNING:
        faults += _faults_of_tuning(flags, model_args, training_args)
    if flags.umed_lora_targets is not None and not getattr(training_args, "lora_enable", False):
        faults.append("--umed_lora_targets has no effect without --lora_enable True.")
    if flags.umed_stage == REWARDING:
        if training_args.fsdp:
            faults.append(
                "--fsdp does not work with --umed_stage rewarding: sampling needs the full weights on every rank. Remove "
                "--fsdp, or use --deepspeed with ZeRO-3, which also shards the weights."
            )
        if training_args.deepspeed and flags.umed_algorithm == "ppo":
            faults.append(
                "--deepspeed does not work with --umed_algorithm ppo: the value network is not part of the model that DeepSpeed "
                "trains. Use --umed_algorithm grpo, or remove --deepspeed and start the script with torchrun."
            )
        faults += _faults_of_rollouts(training_args)
        faults += _faults_of_rollout_server(flags, training_args)
    return [*faults, *_evaluation_faults(flags, training_args)]


def _faults_of_validation(flags: UmedFlags, training_args: Any) -> list[str]:
    """Where stage 1 cannot answer held-out records, and where no process has the weights that are to be kept."""
    faults = []
    if flags.umed_val_every and training_args.fsdp:
        faults.append(
            "--umed_val_every does not work with --fsdp: answers need the full weights on every rank. Remove one."
        )
    if flags.umed_stop_after and is_zero_3(training_args.deepspeed):
        faults.append(
            f"--umed_stop_after does not work with ZeRO-3 ({training_args.deepspeed}): no process has all weights to keep. Use "
            "ZeRO-2, or set --umed_stop_after 0 and choose the number of steps by the curve of --umed_val_every."
        )
    return faults


def _faults_of_several_gpus(flags: UmedFlags, training_args: Any) -> list[str]:
    """What one process with several GPUs cannot compute: it splits each batch without its answers' tensors."""
    gpus = getattr(training_args, "n_gpu", 1)
    if gpus < 2:
        return []
    given = {
        "umed_stage rewarding": flags.umed_stage == REWARDING,
        "umed_keep": flags.keeps(),
        "umed_attention_loss": flags.umed_attention_loss > 0,
        "umed_tower_teacher": flags.umed_tower_teacher is not None and flags.umed_tower_teacher_weight > 0,
        "umed_replay": flags.umed_replay > 0,
    }
    return [
        f"--{name}: one process drives {gpus} GPUs. Start one process per GPU: umed-run torchrun --nproc_per_node {gpus} -m "
        "llava.train.train_mem ... Or show it one: CUDA_VISIBLE_DEVICES=0 umed-run python -m llava.train.train_mem ..."
        for name, asked in given.items()
        if asked
    ]


def _faults_of_rollouts(training_args: Any) -> list[str]:
    """Flags of transformers that change what stage 2 samples, or how much, behind its back."""
    faults = []
    if getattr(training_args, "auto_find_batch_size", False):
        faults.append(
            "--auto_find_batch_size does not work with --umed_stage rewarding: answers are sampled for the whole step before a "
            "batch can fail. Remove it. If memory runs out, the error says which flag to lower."
        )
    if getattr(training_args, "neftune_noise_alpha", None):
        faults.append(
            f"--neftune_noise_alpha {training_args.neftune_noise_alpha} does not work with --umed_stage rewarding: answers would "
            "be scored under other noise than they were sampled under. Remove it."
        )
    return faults


def _faults_of_tuning(flags: UmedFlags, model_args: Any, training_args: Any) -> list[str]:
    """What the losses and the order of stage 1 do not go with."""
    faults = []
    zero_3 = is_zero_3(training_args.deepspeed)
    outside = {
        "umed_keep": (flags.keeps(), "the KL needs"),
        "umed_replay": (flags.umed_replay > 0, "each record's loss needs"),
    }
    faults += [
        f"--{name} does not work with ZeRO-3 ({training_args.deepspeed}): {needs} the output layer outside the model's own "
        "pass, where ZeRO-3 has no whole weights. Use ZeRO-2, or remove the flag."
        for name, (given, needs) in outside.items()
        if given and zero_3
    ]
    if getattr(training_args, "label_smoothing_factor", 0):
        faults.append(
            "--label_smoothing_factor does not work with LLaVA: transformers smooths labels of the text alone, and the logits "
            "are of text and image. Remove it."
        )
    if flags.umed_tower_teacher is not None and training_args.deepspeed:
        faults.append(
            "--umed_tower_teacher does not work with --deepspeed, which scales the gradient of the teacher's map as it likes. "
            "Start the script with torchrun, or remove the flag."
        )
    if training_args.fsdp:
        found = {
            "umed_keep": flags.keeps(),
            "umed_tower_lr": flags.umed_tower_lr is not None,
            "umed_replay": flags.umed_replay > 0,
        }
        faults += [
            f"--{name} does not work with --fsdp. Use --deepspeed with ZeRO-2, or torchrun alone."
            for name, given in found.items()
            if given
        ]
    if flags.umed_tower_lr is not None and getattr(model_args, "tune_mm_mlp_adapter", False):
        faults.append(
            "--umed_tower_lr does not work with --tune_mm_mlp_adapter True: LLaVA then saves the projector alone, and the "
            "trained tower would be lost. Remove one of them."
        )
    if flags.umed_replay > 0 and getattr(training_args, "group_by_length", False):
        faults.append(
            "--umed_replay does not work with --group_by_length. LLaVA's own --group_by_modality_length works with it."
        )
    return faults


def _faults_of_bits(training_args: Any) -> list[str]:
    """What cannot be trained over a base of fewer than 16 bits."""
    bits = getattr(training_args, "bits", 16)
    if bits == 16:
        return []
    if bits == 8:
        # LLM.int8 keeps columns with outliers in 16 bits, and finds these columns anew in each batch.
        return [
            "--bits 8: 8-bit layers compute an answer differently in another batch, so its probabilities would differ between "
            "sampling and update. Use --bits 4, which also needs less memory, or 16."
        ]
    if bits != 4:
        return [f"--bits {bits}: LLaVA would ignore it and load the weights as they are. Allowed: 16 and 4."]
    faults = []
    if not getattr(training_args, "lora_enable", False):
        faults.append(
            "--bits 4: weights of 4 bits cannot be trained themselves. Add --lora_enable True, or use --bits 16."
        )
    if training_args.fsdp:
        faults.append("--bits 4 does not work with --fsdp, which shards weights of one dtype only. Remove --fsdp.")
    if is_zero_3(training_args.deepspeed):
        faults.append(f"--bits 4 does not work with ZeRO-3 ({training_args.deepspeed}). Use ZeRO-2, or --bits 16.")
    return faults


def _faults_of_rollout_server(flags: UmedFlags, training_args: Any) -> list[str]:
    """Where the rollout server may be, and what it can learn of the policy."""
    if flags.umed_rollout_server is None:
        return []
    faults = rollout_server_faults(
        "--umed_rollout_server", flags.umed_rollout_server, "--umed_rollout_remote True", flags.umed_rollout_remote
    )
    if not getattr(training_args, "lora_enable", False):
        faults.append(
            "--umed_rollout_server needs --lora_enable True: after each step an adapter is sent to the server. All weights would "
            "have to be written and loaded anew, and vLLM can replace them at run time only in its own process."
        )
    if getattr(training_args, "bits", 16) != 16:
        faults.append(
            f"--umed_rollout_server does not work with --bits {training_args.bits}: the server holds the weights in 16 bits or "
            "more, which is another policy than the one that learns. Use --bits 16, or sample here."
        )
    return faults


def _evaluation_faults(flags: UmedFlags, training_args: Any) -> list[str]:
    """LLaVA's `train()` has no evaluation set, so its trainer would stop at the first evaluation, hours into the run."""
    strategy = training_args.evaluation_strategy  # an enum of strings, or a string
    saves = getattr(training_args, "save_strategy", "steps")
    if strategy != "no":
        flag, off = f"--evaluation_strategy {getattr(strategy, 'value', strategy)}", "no"
    elif getattr(training_args, "eval_on_start", False):  # of transformers 5
        flag, off = "--eval_on_start True", "False"
    elif getattr(saves, "value", saves) == "best":  # of transformers 5: without an evaluation there is no checkpoint
        return [
            "--save_strategy best: saves after an evaluation, and LLaVA's training script has no evaluation set. Use steps or "
            "epoch; --umed_stop_after N keeps the best weights by --umed_val_every."
        ]
    else:
        return []
    instead = "--umed_val_every N evaluates on held-out records every N steps."
    return [f"{flag}: LLaVA's training script has no evaluation set. Leave it at {off}. {instead}"]
