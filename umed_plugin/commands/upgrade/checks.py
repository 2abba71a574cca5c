"""Check before hours of training: settings against checkpoint and machine, and the flags of both stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Optional

from umed_plugin.checkpoints.added_tokens import flags_that_add
from umed_plugin.checkpoints.writing import stock_name_fault
from umed_plugin.commands.doctor.catalogue import KINDS
from umed_plugin.commands.machine import Machine
from umed_plugin.commands.upgrade.origin import Origin
from umed_plugin.commands.upgrade.settings import Settings
from umed_plugin.commands.upgrade.training import training_flags
from umed_plugin.errors import UmedError, unknown_name
from umed_plugin.flags.checks import find_faults
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.names import SYMBOLIC
from umed_plugin.flags.rules import TUNING
from umed_plugin.flags.sharding import fsdp_fault


def check_together(
    settings: Settings,
    origin: Origin,
    machine: Machine,
    has_val: Optional[bool] = None,
    going_on: Collection[str] = (),
) -> None:
    """Refuse invalid settings, all faults at once.

    Args:
        settings: filled in.
        origin: the checkpoint to upgrade.
        machine: that the run is for.
        has_val: whether the records have a split val; None: they are not built yet.
        going_on: stages whose training has begun; see `umed_plugin.commands.upgrade.resuming.stages_going_on`.

    Raises:
        UmedError: with one line per fault.
    """
    faults = _machine_faults(settings, machine)
    if settings.bits == 4 and find_spec("bitsandbytes") is None:
        faults.append("bits: 4 needs bitsandbytes, which is not installed. Install it: pip install bitsandbytes.")
    if settings.in_place and origin.lora:
        faults.append("in_place: the result is a full checkpoint, but the input is a LoRA folder. Remove in_place.")
    name_fault = stock_name_fault(str(settings.name), origin.config["model_type"])
    faults += [f"name: {name_fault}"] if name_fault else []
    unknown = sorted(set(settings.accept_findings) - set(KINDS))
    faults += [f"accept_findings: {unknown_name('finding', code, KINDS)}" for code in unknown]
    if settings.method == "full" and settings.lora != type(settings.lora)():
        faults.append("lora: has no effect with method full.")
    faults += _lost_tokens(settings, origin)
    if settings.label_share is not None and settings.rewarding.run == "never":
        faults.append(
            f"label_share: {settings.label_share:g} keeps the other labelled studies for stage 2, and rewarding: never leaves it "
            "out, so nothing would train on them. Set label_share to null, or run stage 2 (rewarding: always or auto)."
        )
    _refuse([*faults, *_stage_faults(settings, origin, has_val, going_on)])


def check_stages(settings: Settings, origin: Origin, has_val: Optional[bool], going_on: Collection[str] = ()) -> None:
    """Refuse flags that a training would refuse, once the records are built. In a finished run they may have been removed again.

    Args:
        settings, origin, has_val, going_on: as for `check_together`.

    Raises:
        UmedError: with one line per fault.
    """
    _refuse(_stage_faults(settings, origin, has_val, going_on))


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise UmedError("invalid settings:\n" + "\n".join(f"  - {fault}" for fault in faults))


def _stage_faults(settings: Settings, origin: Origin, has_val: Optional[bool], going_on: Collection[str]) -> list[str]:
    """What the trainings themselves would refuse in their flags, as they will be given.

    The plan adds ``--umed_val_every`` where the records have a split val. While nobody knows whether they do, a fault is one that
    both cases have.
    """
    faults = []
    for name in settings.stages:
        fsdp = fsdp_fault(getattr(settings, name).flags.get("fsdp"), origin.config) if name == TUNING else None
        faults += [f"{name}: {fsdp}"] if fsdp else []
        with_or_without = [
            _flag_faults(
                training_flags(name, getattr(settings, name), settings, origin, validated=validated), name in going_on
            )
            for validated in ((True, False) if has_val is None else (has_val,))
        ]
        shared = [fault for fault in with_or_without[0] if all(fault in others for others in with_or_without)]
        hints = {"--mm_projector_lr": f" Here: --set {name}.projector_learning_rate=null."}
        if has_val is False:
            hints["--umed_val_every"] = " The records have no split val, so this command does not set it."
        for fault in shared:
            faults.append(f"{name}: {fault}" + "".join(hint for flag, hint in hints.items() if flag in fault))
    return faults


def _lost_tokens(settings: Settings, origin: Origin) -> list[str]:
    """Tokens that ``config.json`` asks for and the tokenizer lacks: LLaVA would add them, and LoRA would lose their rows."""
    lost = flags_that_add(origin.config, origin.full) if settings.method == "lora" else []
    return [
        f"method: lora, but {origin.full / 'config.json'} says {key}, whose tokens its tokenizer lacks. LLaVA saves their rows "
        f"with full fine-tuning only. Set {key} to false there, or use method: full."
        for key in lost
    ]


def _machine_faults(settings: Settings, machine: Machine) -> list[str]:
    if settings.device == "cpu":
        fp16 = settings.precision == "fp16"
        return ["precision: fp16 needs a GPU. On a CPU use fp32 or bf16."] if fp16 else []
    if not machine.gpus:
        return ["device: cuda, but torch sees no GPU on this machine."]
    if settings.processes is not None and settings.processes > machine.gpus:
        return [f"processes: {settings.processes}, but torch sees {machine.gpus} GPUs. Each process needs one."]
    if settings.precision == "bf16" and not machine.bf16:
        return ["precision: bf16 needs GPUs of Ampere or later, all of them. Use precision: fp16."]
    return []


def _flag_faults(flags: Mapping[str, Any], goes_on: bool) -> list[str]:
    """Flags that the training itself would refuse, except for files that do not exist yet."""
    known = {flag.name: str(flag.type) for flag in dataclasses.fields(UmedFlags)}
    own = {flag: value for flag, value in flags.items() if flag.startswith("umed_")}
    unknown = [unknown_name("flag", flag, known) for flag in own if flag not in known]
    if unknown:
        return unknown
    numbers = {flag: value for flag, value in own.items() if isinstance(value, str) and "float" in known[flag]}
    for flag, value in numbers.items():
        try:
            own[flag] = float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            return [f"--{flag} {value!r}: must be a number."]
    faults = []
    if SYMBOLIC in str(own.get("umed_rewards", "")):
        from umed_plugin.rewards.symbols import find_symbol_faults  # imports torch, which no other setting needs

        faults = find_symbol_faults(UmedFlags(**own).reward_names())
    return faults + find_faults(
        UmedFlags(**own),
        SimpleNamespace(
            vision_tower=flags["vision_tower"], tune_mm_mlp_adapter=flags.get("tune_mm_mlp_adapter", False)
        ),
        SimpleNamespace(data_path="", image_folder=None, image_aspect_ratio=flags["image_aspect_ratio"]),
        SimpleNamespace(
            fsdp=flags.get("fsdp"),
            deepspeed=flags.get("deepspeed"),
            learning_rate=flags.get("learning_rate"),
            mm_projector_lr=flags.get("mm_projector_lr"),
            evaluation_strategy=flags.get("evaluation_strategy", "no"),
            bits=flags.get("bits", 16),
            lora_enable=flags["lora_enable"],
            auto_find_batch_size=flags.get("auto_find_batch_size", False),
            neftune_noise_alpha=flags.get("neftune_noise_alpha"),
        ),
        files=False,
        goes_on=goes_on,
    )
