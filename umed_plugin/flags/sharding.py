"""DeepSpeed and FSDP: what their files and their launchers decide, which the flags must agree with.

Imports the standard library alone.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from umed_plugin.files import parse_json

NONE = "none"


@dataclass(frozen=True)
class DeepSpeedFile:
    """What matters here of a DeepSpeed configuration.

    Attributes:
        zero_stage: 0 without ZeRO.
        optimizer, scheduler: their types, such as ``AdamW``; ``none`` where transformers makes them by its flags.
        layout: what else decides in which order, or by which class, the optimizer's state is stored; mostly ``none``.
    """

    zero_stage: Any
    optimizer: str
    scheduler: str
    layout: str


def read_deepspeed(deepspeed: Any) -> Optional[DeepSpeedFile]:
    """Read the value of ``--deepspeed``: a file, or its content, also as text or in base64.

    Returns:
        None without a configuration, or for one that cannot be read. DeepSpeed reports that.
    """
    content = deepspeed
    if isinstance(deepspeed, str):
        try:
            content = parse_json(_text_of(deepspeed))
        except (OSError, ValueError):
            return None
    if not content or not isinstance(content, dict):
        return None
    zero = content.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    optimizer, scheduler = (_type_of(content.get(part)) for part in ("optimizer", "scheduler"))
    stage = zero.get("stage", 0)
    return DeepSpeedFile(stage, optimizer, scheduler, _layout(stage, zero, content.get("data_types")))


def _layout(stage: Any, zero: dict[str, Any], types: Any) -> str:
    """ZeRO-1 and ZeRO-2 store the same state, unless one of these is set: ZeRO-1 has another class for sums in fp32."""
    sums = types.get("grad_accum_dtype") if isinstance(types, dict) and stage == 1 else None
    parts = [f"grad_accum_dtype {sums}"] * (sums is not None)
    parts += ["round_robin_gradients"] * (stage in (1, 2) and bool(zero.get("round_robin_gradients")))
    return ", ".join(parts) or NONE


def _text_of(deepspeed: str) -> str:
    if os.path.exists(deepspeed):
        with open(deepspeed, encoding="utf-8") as file:
            return file.read()
    return deepspeed if deepspeed.lstrip().startswith("{") else base64.urlsafe_b64decode(deepspeed).decode()


def _type_of(part: Any) -> str:
    if part is None:
        return NONE
    return str(part.get("type", "unnamed")) if isinstance(part, dict) else str(part)


def is_zero_3(deepspeed: Any) -> bool:
    """Whether the value of ``--deepspeed`` asks for ZeRO-3."""
    file = read_deepspeed(deepspeed)
    return file is not None and file.zero_stage == 3


def fsdp_fault(fsdp: Any, config: Mapping[str, Any]) -> Optional[str]:
    """Why LLaVA cannot start stage 1 under FSDP, or None.

    It takes the tower out of a list that it has made itself, and counts the options. transformers 5 keeps True in place of them.

    Args:
        fsdp: value of ``--fsdp``, as given or as transformers has read it.
        config: ``config.json`` of the checkpoint to train.
    """
    if not fsdp:
        return None
    if "mm_vision_tower" in config:
        found = "LLaVA cannot start under FSDP from a checkpoint with a vision tower (mm_vision_tower in config.json)"
    elif fsdp is True:
        found = "LLaVA cannot read this flag as the installed transformers passes it on"
    else:
        return None
    return f"--fsdp: {found}. Remove --fsdp, or use --deepspeed with ZeRO-3, which also shards the weights."


def find_launcher_faults(training_args: Any) -> list[str]:
    """What ``accelerate launch`` has switched on behind the flags, by which a stage would not know of it."""
    faults = []
    if getattr(training_args, "deepspeed_plugin", None) is not None and not training_args.deepspeed:
        faults.append(
            f"{_switched_on('DEEPSPEED')}, and no --deepspeed was given. To train with DeepSpeed, give its file with "
            f"--deepspeed, and start the script with torchrun or deepspeed. {_without('DEEPSPEED')}"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1") and not training_args.fsdp:
        faults.append(
            f"{_switched_on('FSDP')}, and no --fsdp was given. To shard the weights, give --deepspeed with ZeRO-3, and start the "
            f"script with torchrun or deepspeed. {_without('FSDP')}"
        )
    return faults


def _switched_on(name: str) -> str:
    # transformers 4 sets the variable where it parses the flag, and never unsets it.
    return f"ACCELERATE_USE_{name} is true (by accelerate launch, or an earlier training in this process)"


def _without(name: str) -> str:
    return f"To train without it, start the training in a process of its own, or unset ACCELERATE_USE_{name}."


def find_rate_faults(flags: Any, training_args: Any) -> list[str]:
    """Learning rates that a DeepSpeed file undoes, for a run that begins."""
    instead = {
        "umed_tower_lr": "or leave it out, which freezes the tower",
        "mm_projector_lr": "or give --mm_projector_lr the value of --learning_rate, or leave it out",
    }
    return [
        f"{undone}. Remove optimizer and scheduler from the file: the Trainer then makes them by its flags; {instead[name]}."
        for name, undone in _undone_rates(flags, training_args).items()
    ]


def find_rate_remarks(flags: Any, training_args: Any) -> list[str]:
    """The same for a run that goes on: its checkpoint's optimizer fits no other file, and no other rate."""
    return [
        f"{undone}. The run goes on as it began. To train at that rate, remove optimizer and scheduler from the file and choose "
        "another --output_dir."
        for undone in _undone_rates(flags, training_args).values()
    ]


def _undone_rates(flags: Any, training_args: Any) -> dict[str, str]:
    """Flag -> why its rate has no effect: DeepSpeed's own optimizer has one group, and most of its schedules one rate."""
    file = read_deepspeed(training_args.deepspeed)
    if file is None:
        return {}
    # WarmupCosineLR scales the rate of each group. The others set all groups to one.
    found = {"optimizer": file.optimizer != NONE, "scheduler": file.scheduler not in (NONE, "WarmupCosineLR")}
    parts = " and ".join(part for part, own in found.items() if own)
    rate, projector = (getattr(training_args, name, None) for name in ("learning_rate", "mm_projector_lr"))
    given = {
        "umed_tower_lr": flags.umed_tower_lr,
        "mm_projector_lr": None if projector == rate else projector,
    }
    return {
        name: f"--{name} {value:g} has no effect with {training_args.deepspeed}: its {parts} trains all weights at one rate"
        for name, value in given.items()
        if value is not None and parts
    }
