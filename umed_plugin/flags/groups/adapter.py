"""The flags of the LoRA adapter, beside LLaVA's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from umed_plugin.flags.needs import flag
from umed_plugin.flags.rules import FIXED


@dataclass
class AdapterFlags:
    """The flags of the LoRA adapter."""

    umed_lora_targets: Optional[str] = flag(
        None,
        "Linear layers of the language model that get the adapter, as a comma list of names such as q_proj,v_proj. Default: all, "
        "as in LLaVA. Needs --lora_enable True.",
        pattern=r"\w+(,\w+)*",
        form="names of layers, separated by commas: q_proj,v_proj",
        on_resume=FIXED,
    )
