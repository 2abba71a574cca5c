"""What can be seen to be wrong before hours of training: settings against checkpoint and machine, flags of both stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from umed_plugin.checkpoints.merging import stock_name_fault
from umed_plugin.commands.doctor.catalogue import KINDS
from umed_plugin.commands.upgrade.plan import EVALUATED, Origin, training_flags
from umed_plugin.commands.upgrade.settings import Settings
from umed_plugin.errors import UmedError, unknown_name
from umed_plugin.flags.checks import find_faults
from umed_plugin.flags.definition import UmedFlags


def check_together(settings: Settings, origin: Origin) -> None:
    """Refuse settings that cannot work, all faults at once.

    Args:
        settings: filled in.
        origin: what is upgraded.

    Raises:
        UmedError: with a line for each fault.
    """
    faults = _machine_faults(settings)
    if settings.in_place and origin.lora:
        faults.append("in_place: the result is a full checkpoint and the input a LoRA folder; leave in_place out.")
    misread = stock_name_fault(str(settings.name), origin.config["model_type"])
    faults += [f"name: {misread}"] if misread else []
    unknown = sorted(set(settings.accept_findings) - set(KINDS))
    faults += [f"accept_findings: {unknown_name('finding', code, KINDS)}" for code in unknown]
    if settings.method == "full" and settings.lora != type(settings.lora)():
        faults.append("lora: has no effect with method full.")
    for name in EVALUATED[1:]:
        flags = training_flags(name, getattr(settings, name), settings, origin)
        faults += [f"{name}: {fault}" for fault in _flag_faults(flags)]
    if faults:
        raise UmedError("the settings cannot work:\n" + "\n".join(f"  - {fault}" for fault in faults))


def _machine_faults(settings: Settings) -> list[str]:
    import torch

    if settings.device == "cpu":
        fp16 = settings.precision == "fp16"
        return ["precision: fp16 needs a GPU; on a CPU fp32 or bf16."] if fp16 else []
    there = torch.cuda.device_count()
    if not there:
        return ["device: cuda, but torch sees no GPU on this machine."]
    if settings.processes is not None and settings.processes > there:
        return [f"processes: {settings.processes}, but torch sees {there} GPUs; each process needs one."]
    return []


def _flag_faults(flags: Mapping[str, Any]) -> list[str]:
    """What the training itself would refuse, but for files that are not there yet."""
    known = {flag.name: str(flag.type) for flag in dataclasses.fields(UmedFlags)}
    own = {flag: value for flag, value in flags.items() if flag.startswith("umed_")}
    unknown = [unknown_name("flag", flag, known) for flag in own if flag not in known]
    if unknown:
        return unknown
    numbers = {flag: value for flag, value in own.items() if isinstance(value, str) and "float" in known[flag]}
    for flag, value in numbers.items():
        try:
            own[flag] = float(value)  # YAML takes 1e-4 for a text
        except ValueError:
            return [f"--{flag} {value!r}: must be a number."]
    return find_faults(
        UmedFlags(**own),
        SimpleNamespace(vision_tower=flags["vision_tower"]),
        SimpleNamespace(data_path="", image_folder=None, image_aspect_ratio=flags["image_aspect_ratio"]),
        SimpleNamespace(
            fsdp=flags.get("fsdp"),
            deepspeed=flags.get("deepspeed"),
            evaluation_strategy=flags.get("evaluation_strategy", "no"),
        ),
        files=False,
    )
