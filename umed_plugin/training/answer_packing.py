"""Whether the K answers to a query share one row with its prompt: settled as stage 2 starts, and told to the user."""

from __future__ import annotations

from typing import Any

from umed_plugin.errors import note
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.model.packing import packing_fault
from umed_plugin.model.sharding import gathered_parameters
from umed_plugin.training.run_precision import precision_of


def can_pack(llava: Any, flags: UmedFlags, args: Any) -> bool:
    """Whether answers are packed: the flags ask for it, and the attention fits. The first process tells the user.

    Args:
        llava: the model at the start of stage 2. Under ZeRO-3 all ranks must call.
        flags: of the run.
        args: LLaVA's training arguments.
    """
    fault = None
    if flags.umed_packed:
        with gathered_parameters(llava), precision_of(args):
            fault = packing_fault(llava)
    packed = flags.umed_packed and fault is None
    if args.process_index == 0:
        note(_attention_note(llava, packed, fault))
    return packed


def _attention_note(llava: Any, packed: bool, fault: str | None) -> str:
    used = f"attention: {getattr(llava.config, '_attn_implementation', 'unknown')}"
    if packed:
        return f"{used}. The answers to a question share its prompt in sampling, scoring and update."
    repeated = (
        "Sampling copies the prompt's KV cache for each answer, and under gradient checkpointing the update repeats the prompt "
        "for each"
    )
    if fault is None:
        return f"{used}. --umed_packed False: answers do not share their prompt. {repeated}."
    return (
        f"{used}. {fault}: answers are not packed. {repeated}. Another --umed_attention may do better; --umed_packed False "
        "accepts this."
    )
